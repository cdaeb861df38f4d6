"""Names of settings, from plain rows: `status` calls a run as a report does, and loads no table library for it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from albert_ablate.analysis.numbers import human, visible
from albert_ablate.config import NUISANCE, SIGNIFICANT

# settings that determine the weights, beside the groups that do
OUTSIDE = ("trainer.precision", "trainer.compile", "trainer.graph")


def key_of(value: Any) -> str:
    """A setting's value as text that is equal where the values are."""
    return json.dumps(value, default=str)


def setting_names(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """The columns in which settings differ, groups first, and a name for each setting: its choices, and what else is
    needed to tell it from the settings of the same choices. rows: setting, label, options by group, values by dotted
    key; of several rows of a setting the first counts. The names are in their alphabetical order."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault(row["setting"], row)
    names, one = dict.fromkeys(first, ""), first.values()
    columns = {}
    for c in dict.fromkeys(c for row in rows for c in row):
        values = _as_in_a_table([row.get(c, math.nan) for row in one])
        if _differ(values):
            columns[c] = values
    groups = [c for c in SIGNIFICANT if c in columns]
    dotted = [c for c in columns if c.split(".")[0] in SIGNIFICANT and "." in c or c in OUTSIDE]
    dotted.sort(key=lambda c: c in NUISANCE)  # an arm is told by its rate only where nothing else tells it
    for i, s in enumerate(names):
        names[s] = " ".join(f"{c}={columns[c][i]}" for c in groups if isinstance(columns[c][i], str))
    for column in dotted:
        value_of = dict(zip(names, columns[column], strict=True))
        alike: dict[str, set[str]] = {}
        for s, name in names.items():
            alike.setdefault(name, set()).add(key_of(value_of[s]))
        for s, name in names.items():
            if len(alike[name]) > 1:
                names[s] = f"{name} {column}={_plain(value_of[s])}".strip()
    taken: dict[str, int] = {}
    for s, row in first.items():
        name = visible(names[s] or row["label"])
        taken[name] = taken.get(name, 0) + 1  # settings may differ in nothing that is named, such as the text itself
        names[s] = f"{name} ({s[:6]})" if taken[name] > 1 else name
    return [*groups, *dotted], {s: names[s] for s in sorted(names, key=lambda s: names[s])}


def _as_in_a_table(values: list[Any]) -> list[Any]:
    """Values of a column as pandas has them: None is nan among numbers and among texts, and whole numbers are fractions
    where fractions or nan stand beside them."""
    kinds = set(map(type, values))
    if len(kinds) > 1 and kinds <= {int, float, type(None)}:
        return [math.nan if v is None else float(v) for v in values]
    if str in kinds and all(isinstance(v, str) or v is None or v != v for v in values):
        return [math.nan if v is None else v for v in values]
    return values


def _differ(values: list[Any]) -> bool:
    first = values[0]
    if isinstance(first, str | int) and all(type(v) is type(first) and v == first for v in values):
        return False  # of ten thousand runs most values are the same
    return len(set(map(key_of, values))) > 1


def _plain(value: Any) -> str:
    """A setting's value as one types it: 1e-05, not 1 × 10⁻⁵."""
    return f"{value:.6g}" if isinstance(value, float) else human(value)
