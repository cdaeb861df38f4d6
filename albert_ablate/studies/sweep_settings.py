"""The settings of a sweep and the overrides that their runs are asked for by."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError, each_once, lacking, quoted
from albert_ablate.config.untrusted import SAFE_VALUE
from albert_ablate.studies.distributions import Parameter

MAX_REFUSALS = 50  # draws or proposals in a row that are refused, before no more are tried


@dataclass(frozen=True)
class Sweep:
    """A sweep file. `fixed` are the overrides its command gives to every run."""

    path: Path
    method: str
    parameters: tuple[Parameter, ...]
    fixed: tuple[str, ...] = ()
    run_cap: int | None = None
    metric: str | None = None
    maximize: bool = False

    @property
    def varied(self) -> list[str]:
        """The keys that have more than one value."""
        return [p.name for p in self.parameters if len(p.values) != 1]

    def settings(self) -> list[dict[str, Any]]:
        """The values of each run, seeds outermost: the first seed of all arms comes before the second of any.

        Of a grid the product; random: `run_cap` draws, of which a larger run_cap keeps the first and adds to them.
        """
        if self.method == "bayes":
            raise ConfigError(
                f"{self.path}: method=bayes finds its settings as it goes: `albert-ablate sweep` trains it."
            )
        if self.method == "random":
            assert self.run_cap is not None
            return [self.draw(i) for i in range(self.run_cap)]
        return self._grid()[0][: self.run_cap]

    def draw(self, index: int) -> dict[str, Any]:
        """The setting of a random sweep's run `index`."""
        return self.folded({p.name: p.draw(index) for p in self.parameters})

    @property
    def repeated(self) -> int:
        """How many combinations of a grid are settings that another combination gives already."""
        return self._grid()[1] if self.method == "grid" else 0

    def _grid(self) -> tuple[list[dict[str, Any]], int]:
        """The settings that differ, and how many combinations do not."""
        order = sorted(self.parameters, key=lambda p: p.name != "seed")
        names = [p.name for p in order]
        distinct: dict[str, dict[str, Any]] = {}
        combinations = 0
        for combinations, values in enumerate(itertools.product(*[p.values for p in order]), 1):  # noqa: B007
            setting = self.folded(dict(zip(names, values, strict=True)))
            distinct.setdefault(json.dumps(setting, sort_keys=True), setting)
        return [*distinct.values()], combinations - len(distinct)

    def folded(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """A setting without the keys that its option lacks and another option of the sweep has.

        In a grid of dropout over none and uniform and of dropout.mean, dropout=none has no mean.
        """
        listed = {p.name: p.values for p in self.parameters}

        def others(group: str) -> Sequence[Any]:
            return listed.get(group, ())

        return {key: value for key, value in setting.items() if not lacking(key, setting, others)}


def written(value: Any) -> str:
    """A value as an override holds it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    return quoted(value) if isinstance(value, str) and not SAFE_VALUE.fullmatch(value) else str(value)


def overrides_of(setting: Mapping[str, Any]) -> list[str]:
    """Values by key as `key=value`."""
    return [f"{key}={written(value)}" for key, value in setting.items()]


def refuse_places(overrides: Iterable[str], where: str) -> None:
    """Raise ConfigError for an override that says where the runs lie, which `--runs` does."""
    for override in overrides:
        if override.lstrip("+").partition("=")[0] in ("paths.runs", "paths"):
            raise ConfigError(f"{where}: {override} is not allowed: name the folder of runs by --runs.")


def own_overrides(overrides: Iterable[str]) -> list[str]:
    """Overrides of a command line, each key once: of one given twice the last counts, which is said.

    Raises ConfigError for one that says where the runs lie.
    """
    overrides = list(overrides)
    refuse_places(overrides, "command line")
    return each_once(overrides)


BUDGETS = ("budget.tokens", "budget.steps")


def run_overrides(sweep: Sweep, setting: Mapping[str, Any], more: Iterable[str] = ()) -> dict[str, str]:
    """The overrides of a setting's run, by key: the file's, the setting's, and `more`, of which the last counts; so it
    does of budget.tokens and budget.steps, which are one budget."""
    by_key: dict[str, str] = {}
    for overrides in (sweep.fixed, overrides_of(setting), more):
        given = {o.partition("=")[0].lstrip("+"): o for o in overrides}
        if not given.keys().isdisjoint(BUDGETS):
            by_key = {key: o for key, o in by_key.items() if key not in BUDGETS or key in given}
        by_key |= given
    return {key: by_key[key] for key in sweep.folded({key: o.partition("=")[2] for key, o in by_key.items()})}


# groups and keys that do not determine the weights
NOT_ARM_KEYS = ("seed", "paths", "logger", "evaluation", "diagnostics", "checkpoint", "force", "accept_code", "debug")


def of_arm(overrides: Mapping[str, str]) -> tuple[str, ...]:
    """Those of a run's overrides by key that may make its arm or its learning rate."""
    return tuple(o for k, o in overrides.items() if k.partition(".")[0] not in NOT_ARM_KEYS and k != "trainer.threads")


def varied_labels(sweep: Sweep, settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A name for the arm of each setting: what varies between them, the seed left out."""
    keys = [key for key in sweep.varied if key != "seed"]
    for setting in settings:
        has = {k: setting[k] for k in keys if k in setting}
        shown = [f"{k}={f'{v:g}' if isinstance(v, float) else written(v)}" for k, v in has.items()]
        yield " ".join(shown) or sweep.path.stem
