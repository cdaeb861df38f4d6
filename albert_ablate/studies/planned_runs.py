"""The runs of a sweep's settings: how each is asked for, in which folder it lies, and which are refused."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albert_ablate.config import Config, ConfigError, Identity, checked_config, identity, quoted, with_seed
from albert_ablate.records.keys import Keys
from albert_ablate.records.tuning import LEARNING_RATE, read_tuning
from albert_ablate.studies.sweep_settings import MAX_REFUSALS, Sweep, of_arm, run_overrides, varied_labels


@dataclass(frozen=True)
class Planned:
    """A run of a sweep: how it is asked for and where it lies."""

    label: str  # what varies in its arm
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    arm: str
    cfg: Config = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The run as lines of output name it."""
        return f"{self.label} seed={self.seed}"


def first_run(sweep: Sweep, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """The overrides of one run: the first of each parameter's values, the median of its distribution."""
    setting = sweep.folded({p.name: p.values[0] if p.values else p.at(0.5) for p in sweep.parameters})
    return tuple(run_overrides(sweep, setting, list(extra)).values())


def plan(
    sweep: Sweep,
    settings: Sequence[Mapping[str, Any]],
    runs: Path,
    extra: Sequence[str] = (),
    tuned: dict[str, float | None] | None = None,
    keys: Keys | None = None,
) -> list[Planned]:
    """The runs of `settings`, each once. `extra` overrides count over the file's. Raises ConfigError for a setting that
    is not allowed, before anything is trained.

    With `tuned` an arm whose learning rate nobody sets takes the one that `albert-ablate tune` found; the tuned rates
    are filled in by label (None: never tuned). `keys` takes note of the arms' keys, for `status`.
    """
    planner = Planner(sweep, runs, extra, tuned)
    planned: dict[Path, Planned] = {}
    for setting in settings:
        run = planner.run(setting)
        planned.setdefault(run.folder, run)
    if keys is not None:
        keys.note(planner.composed_arms)
    return list(planned.values())


def plan_random(
    sweep: Sweep,
    runs: Path,
    extra: Sequence[str] = (),
    tuned: dict[str, float | None] | None = None,
    keys: Keys | None = None,
) -> tuple[list[Planned], list[str], int]:
    """`plan` of a random sweep, the sentences on draws whose values do not go together, and how many runs are missing.

    The next draw takes the place of one that is refused, until MAX_REFUSALS in a row are. Raises ConfigError where
    no draw is allowed.
    """
    assert sweep.run_cap is not None
    planner = Planner(sweep, runs, extra, tuned)
    planned: dict[Path, Planned] = {}
    refused: list[str] = []
    allowed = index = in_a_row = 0
    while allowed < sweep.run_cap and in_a_row < MAX_REFUSALS:
        try:
            run = planner.run(sweep.draw(index))
            planned.setdefault(run.folder, run)
            allowed, in_a_row = allowed + 1, 0
        except ConfigError as error:
            refused.append(str(error))
            in_a_row += 1
        index += 1
    if not allowed:
        raise ConfigError(refused[0])
    if keys is not None:
        keys.note(planner.composed_arms)
    return list(planned.values()), refused, sweep.run_cap - allowed


class Planner:
    """Settings of one sweep made into runs. What several of them share is composed and packed once."""

    def __init__(
        self, sweep: Sweep, runs: Path, extra: Sequence[str], tuned: dict[str, float | None] | None = None
    ) -> None:
        self.sweep, self.extra, self.tuned = sweep, extra, tuned
        self.place = f"paths.runs={quoted(str(runs.expanduser().resolve()))}"
        self.fingerprints: dict[str, str] = {}  # of texts, by the configuration that leads to each
        # by the overrides that make an arm, what they compose to; None where they are refused
        self.composed_arms: dict[tuple[str, ...], Mapping[str, Any] | None] = {}
        self.arms: dict[tuple[str, ...], tuple[tuple[str, ...], Config, Identity]] = {}

    def run(self, setting: Mapping[str, Any]) -> Planned:
        """The run of a setting; ConfigError if it is not allowed."""
        (label,) = varied_labels(self.sweep, [setting])
        by_key = run_overrides(self.sweep, setting, [*self.extra, self.place])
        seed = by_key.pop("seed", "seed=0").partition("=")[2]
        try:
            overrides, cfg, arm = self._arm(label, by_key)
            cfg = with_seed(cfg, _number(seed))
        except ConfigError as error:
            self.composed_arms.setdefault(of_arm(by_key), None)
            raise ConfigError(f"{self.sweep.path}: {label}: {error}") from None
        folder = Path(cfg.paths.runs) / arm.setting / f"seed{cfg.seed}"
        return Planned(label, cfg.seed, (*overrides, f"seed={cfg.seed}"), folder, arm.arm, cfg)

    def _arm(self, label: str, by_key: Mapping[str, str]) -> tuple[tuple[str, ...], Config, Identity]:
        """The overrides of an arm, the tuned learning rate among them, and what they compose to."""
        given = tuple(by_key.values())
        if given not in self.arms:
            overrides = given
            cfg, arm = self._composed(overrides)
            self.composed_arms[of_arm(by_key)] = cfg
            if self.tuned is not None and LEARNING_RATE not in by_key:
                tuning = read_tuning(Path(cfg.paths.runs), arm.arm)
                self.tuned[label] = tuning["rate"] if tuning else None
                if tuning:
                    overrides = (*given, f"{LEARNING_RATE}={tuning['rate']!r}")
                    cfg, arm = self._composed(overrides)
            self.arms[given] = overrides, cfg, arm
        return self.arms[given]

    def _composed(self, overrides: tuple[str, ...]) -> tuple[Config, Identity]:
        # imported here, so that a mistake in a sweep file is said without torch
        from albert_ablate.data.own_task import is_own_task
        from albert_ablate.data.packed import cache_folder, pack
        from albert_ablate.data.tasks import fingerprint
        from albert_ablate.model.build import build

        cfg = checked_config(overrides)
        if is_own_task(cfg):
            from albert_ablate.training.prepare import identified

            return cfg, identified(cfg)[1]
        text = json.dumps([cfg.data, cfg.tokenizer, cfg.task, cfg.paths.cache], default=dict)
        if text not in self.fingerprints:
            cache = cache_folder(cfg.paths.cache)
            packed = pack(build(cfg.data), build(cfg.tokenizer), cache)
            self.fingerprints[text] = fingerprint(cfg, build, packed.fingerprint, cache)
        return cfg, identity(cfg, self.fingerprints[text])


def _number(text: str) -> Any:
    """A number that an override holds, to its last digit."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
