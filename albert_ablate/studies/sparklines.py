"""The validation loss of a run over its evaluations, drawn in one line of text: ▇▅▃▂▁."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from albert_ablate.records import store

LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 15  # characters at most


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Draw values in at most `width` characters, the lowest as ▁ and the highest as █; of more values every n-th, with
    the first and the last. What is not finite is drawn as the highest. Empty for fewer than two values."""
    n = len(values)
    if n < 2:
        return ""
    if n > width:
        values = [values[round(i * (n - 1) / (width - 1))] for i in range(width)]
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    top = len(LEVELS) - 1
    places = [(v - low) / (high - low) if high > low else 0.0 for v in values if math.isfinite(v)]
    drawn = iter(LEVELS[round(place * top)] for place in places)
    return "".join(next(drawn) if math.isfinite(v) else LEVELS[-1] for v in values)


def sparkline_of(record: Mapping[str, Any]) -> str:
    """The sparkline of a run's validation loss; empty where it has fewer than two evaluations, or a damaged history.

    record: as `states` gives it. A history is read again only once its record was written again.
    """
    if not record.get("folder") or record["status"] in ("pending", "unreadable"):
        return ""
    return _of_folder(Path(record["folder"]), record.get("updated"))


@lru_cache(maxsize=1024)
def _of_folder(folder: Path, updated: float | None) -> str:
    from albert_ablate.records.history import read_history  # loads pyarrow

    fields = store.read_fields(folder, ("histories", "identity"))
    if isinstance(fields, store.Unreadable):
        return ""
    with contextlib.suppress(OSError, ValueError):  # a history that is missing or damaged, which `report` says
        rows = read_history(folder, "evals", fields["histories"], fields["identity"])
        pairs = zip(rows["split"].to_pylist(), rows["loss"].to_pylist(), strict=True)
        return sparkline([loss for split, loss in pairs if split == "validation"])
    return ""
