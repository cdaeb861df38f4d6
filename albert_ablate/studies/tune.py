"""Each arm's own learning rate, found with the same rule and the same number of runs for every arm.

Rates `center * step^k` on a log grid. First all of them on one tuning seed with a quarter of the budget, each with its
own complete schedule (halving); then the best of them and its two neighbors, and one more neighbor on the better side,
on three tuning seeds at the full budget. The rate is the vertex of the parabola through the best three mean losses,
at most half a step from the best (STATISTICS.md, rule 3: the grid's best point alone gives 13 to 62 % false positives).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from albert_ablate.analysis.tuning import LEAST_RATES, log_step
from albert_ablate.config import ConfigError
from albert_ablate.records.tuning import FIRST_SEED, LEARNING_RATE, read_tuning, write_tuning
from albert_ablate.studies.states import is_done, last_line, read_record
from albert_ablate.studies.sweeper import Planned, Study, launched, plan, say_price
from albert_ablate.studies.sweepfile import Parameter, Sweep, varied_labels

RATES, STEP, SEEDS = 7, 2.0, 3
SHARE = 4  # the first rung has a budget of 1 / SHARE
WINDOW = 4  # rates that end with all seeds at the full budget
OBJECTIVES = ("val_loss", "best_val_loss")


@dataclass
class Arm:
    """An arm being tuned: its grid, and every loss so far by (tokens, rate index, seed)."""

    label: str
    id: str
    setting: Mapping[str, Any]  # of the sweep, without seed and rate
    tokens: int
    grid: list[float]
    losses: dict[tuple[int, int, int], float] = field(default_factory=dict)
    settings: set[str] = field(default_factory=set)  # ids of the settings that were run
    error: str = ""


def tune(
    sweep: Sweep,
    runs: Path,
    workers: int,
    overrides: Sequence[str] = (),
    rates: int = RATES,
    step: float = STEP,
    seeds: int = SEEDS,
    objective: str = OBJECTIVES[0],
    force: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Tune the arms of a sweep that are not tuned yet: exit code 0 all tuned, 1 some failed, 130 and 143 stopped."""
    _refuse(sweep, overrides, rates, seeds, objective)
    step = log_step(step, "--step")
    launcher, extra = launched(sweep, overrides, workers)
    bare = _without_rate(sweep)
    arms = arms_of(sweep, bare, runs, extra, rates, step)
    known = {arm.id: read_tuning(runs, arm.id) for arm in arms}
    asked = {"rates": rates, "step": step, "objective": objective, "seeds": list(range(FIRST_SEED, FIRST_SEED + seeds))}
    open_ = [arm for arm in arms if force or not _same_tuning(known[arm.id], asked, arm)]
    each = rates + WINDOW * seeds
    say(
        f"{sweep.path}: {len(arms)} arms, {len(arms) - len(open_)} tuned, {len(open_)} to tune "
        f"with {each} runs each, {rates / SHARE + WINDOW * seeds:.4g} times a run's budget."
    )
    tuner = _Tuner(bare, runs, extra, Study(launcher, workers, say), seeds, objective)
    if dry_run:
        _show_price(tuner, open_, workers, say)
        return 0
    if open_:
        tuner.first_rung(open_)
        tuner.second_rung(open_)
    if tuner.study.stopped is not None:
        return 128 + tuner.study.stopped
    for arm in open_:
        if not arm.error:
            write_tuning(runs, arm.id, asked | tuner.result(arm))
    for arm in arms:
        found = None if arm.error else read_tuning(runs, arm.id)
        say(describe(arm.label, found) if found else f"{arm.label}: not tuned: {arm.error}")
    return 1 if any(arm.error for arm in arms) else 0


def describe(label: str, found: Mapping[str, Any]) -> str:
    """A tuned arm in a line or two: rate, curve at the full budget, slack, and what is wrong with it."""
    full = [c for c in found["curve"] if c["tokens"] == found["tokens"]]
    curve = ", ".join(f"{c['rate']:g}: {'diverged' if c['mean'] is None else format(c['mean'], '.4f')}" for c in full)
    if not found["trained"]:
        return f"{label}: no rate trains it; its runs take {found['rate']:g} and will diverge ({curve})"
    line = f"{label}: {LEARNING_RATE}={found['rate']:g} ({curve}"
    line += f"; slack {found['slack']:.2g} nats)" if found["slack"] is not None else ")"
    if found["edge"]:
        line += (
            f"; the best rate is the {found['edge']}est that was run: give {LEARNING_RATE} in the file to move the grid"
        )
    return line


def arms_of(sweep: Sweep, bare: Sweep, runs: Path, extra: Sequence[str], rates: int, step: float) -> list[Arm]:
    """The arms of a sweep, each once, with the grid around the rate that the file gives it or else its optimizer's."""
    stated = {p.name: p for p in sweep.parameters}.get(LEARNING_RATE)
    given = [stated.values[0]] if stated and len(stated.values) == 1 else []
    given = [float(o.partition("=")[2]) for o in sweep.fixed if o.startswith(f"{LEARNING_RATE}=")] or given
    settings, found = [], dict[str, Arm]()
    for setting in sweep.settings():
        own = {k: v for k, v in setting.items() if k not in (LEARNING_RATE, "seed")}
        if own not in settings:
            settings.append(own)
    labels = [*varied_labels(bare, settings)]
    for setting, label in zip(settings, labels, strict=True):
        (planned,) = plan(bare, [setting], runs, extra)
        center = given[0] if given else planned.cfg["optimizer"]["lr"]
        grid = [float(f"{center * step ** (k - rates // 2):.4g}") for k in range(rates)]
        found.setdefault(planned.arm, Arm(label, planned.arm, setting, planned.cfg["budget"]["tokens"], grid))
    return [*found.values()]


class _Tuner:
    """Runs the rungs of all arms side by side, so that no worker waits for an arm."""

    def __init__(self, sweep: Sweep, runs: Path, extra: Sequence[str], study: Study, seeds: int, objective: str):
        more = (Parameter(LEARNING_RATE, (0, 1)), Parameter("budget.tokens", (0, 1)))  # to be named in labels
        kept = tuple(p for p in sweep.parameters if p.name != "budget.tokens")
        self.sweep = replace(sweep, parameters=kept + more)
        self.extra = [o for o in extra if not o.startswith("budget.tokens=")]
        self.runs, self.study, self.seeds, self.objective = runs, study, seeds, objective

    def first_rung(self, arms: Sequence[Arm]) -> None:
        self._run({arm.id: [(arm.tokens // SHARE, k, 0) for k in range(len(arm.grid))] for arm in arms}, arms)

    def second_rung(self, arms: Sequence[Arm]) -> None:
        for window in (self._best_three, self._one_more):
            alive = [arm for arm in arms if not arm.error]
            if self.study.stopped is not None:
                return
            self._run({a.id: [(a.tokens, k, s) for s in range(self.seeds) for k in window(a)] for a in alive}, alive)

    def _best_three(self, arm: Arm) -> range:
        """The best rate of the first rung in the middle, as far as the grid goes; the least three if none trained."""
        first = [arm.losses[arm.tokens // SHARE, k, 0] for k in range(len(arm.grid))]
        best = int(np.argmin(first)) if np.isfinite(first).any() else 0
        middle = min(max(best, 1), len(arm.grid) - 2)
        return range(middle - 1, middle + 2)

    def _one_more(self, arm: Arm) -> list[int]:
        """The rate beside the three, on the side of the better one of their ends."""
        three = self._best_three(arm)
        low, high = (self.means(arm)[k] for k in (three[0], three[-1]))
        order = [three[0] - 1, three[-1] + 1] if low < high else [three[-1] + 1, three[0] - 1]
        return [k for k in order if 0 <= k < len(arm.grid)][:1]

    def price(self, arms: Sequence[Arm]) -> list[Planned]:
        """Runs as dear as those to come; which rates the last rung has is not known yet."""
        middle = [len(arms[0].grid) // 2 + k for k in range(-(WINDOW // 2), WINDOW - WINDOW // 2)] if arms else []
        wanted = [
            self._setting(arm, job)
            for arm in arms
            for job in [(arm.tokens // SHARE, k, 0) for k in range(len(arm.grid))]
            + [(arm.tokens, k, s) for s in range(self.seeds) for k in middle if 0 <= k < len(arm.grid)]
        ]
        return plan(self.sweep, wanted, self.runs, self.extra)

    def means(self, arm: Arm) -> dict[int, float]:
        """Mean loss over the tuning seeds at the full budget, by rate index; inf where one diverged."""
        found: dict[int, list[float]] = {}
        for (tokens, k, _), loss in arm.losses.items():
            if tokens == arm.tokens:
                found.setdefault(k, []).append(loss)
        return {k: float(np.mean(losses)) for k, losses in sorted(found.items())}

    def _setting(self, arm: Arm, job: tuple[int, int, int]) -> dict[str, Any]:
        tokens, k, seed = job
        return {
            **arm.setting, "budget.tokens": tokens, LEARNING_RATE: arm.grid[k], "seed": FIRST_SEED + seed
        }  # fmt: skip

    def _run(self, jobs: Mapping[str, Sequence[tuple[int, int, int]]], arms: Sequence[Arm]) -> None:
        """Train the jobs of all arms, seeds outermost, and read their losses."""
        wanted = [(arm, job) for arm in arms for job in jobs[arm.id]]
        wanted.sort(key=lambda pair: pair[1][2])
        planned = plan(self.sweep, [self._setting(*pair) for pair in wanted], self.runs, self.extra)
        failed = self.study.complete(planned)
        if self.study.stopped is not None:
            return
        for (arm, job), p in zip(wanted, planned, strict=True):
            record = read_record(p.folder)
            arm.settings.add(p.folder.parent.name)
            if not is_done(record):
                arm.error = arm.error or f"{p.name} failed: {last_line(failed.get(p) or record.get('error'))}"
                continue
            loss = record["summary"].get(self.objective)
            arm.losses[job] = math.inf if record["status"] == "diverged" or loss is None else loss

    def result(self, arm: Arm) -> dict[str, Any]:
        """The arm's rate from the losses at the full budget, as it is written."""
        from albert_ablate.analysis.tuning import tuned_rate

        ran = [*self.means(arm)]
        losses = [[arm.losses[arm.tokens, k, s] for k in ran] for s in range(self.seeds)]
        found = tuned_rate([arm.grid[k] for k in ran], losses, self.seeds)
        edge = ("low" if found.best == arm.grid[ran[0]] else "high") if found.edge else None
        cells: dict[tuple[int, int], list[float]] = {}
        for (tokens, k, _), loss in sorted(arm.losses.items()):
            cells.setdefault((tokens, k), []).append(loss)
        return {
            "arm": arm.label,
            "key": arm.id,
            "rate": float(f"{found.rate:.4g}"),
            "trained": found.trains,
            "edge": edge,
            "slack": found.slack,
            "tokens": arm.tokens,
            "curve": [
                {
                    "rate": arm.grid[k],
                    "tokens": tokens,
                    "losses": losses,
                    "mean": float(np.mean(losses)),
                    "seeds": [FIRST_SEED + s for s in range(len(losses))],
                }
                for (tokens, k), losses in sorted(cells.items())
            ],
            "runs": sorted(arm.settings),
        }


def _same_tuning(found: Mapping[str, Any] | None, asked: Mapping[str, Any], arm: Arm) -> bool:
    """Whether an arm was tuned as it is asked for now, the grid's place included."""
    if found is None or any(found.get(key) != value for key, value in asked.items()):
        return False
    return [c["rate"] for c in found["curve"] if c["tokens"] == arm.tokens // SHARE] == arm.grid


def _without_rate(sweep: Sweep) -> Sweep:
    """The sweep without what tuning chooses itself: rate and seed."""
    parameters = tuple(p for p in sweep.parameters if p.name not in (LEARNING_RATE, "seed"))
    fixed = tuple(o for o in sweep.fixed if o.partition("=")[0] not in (LEARNING_RATE, "seed"))
    return replace(sweep, parameters=parameters, fixed=fixed)


def _refuse(sweep: Sweep, overrides: Sequence[str], rates: int, seeds: int, objective: str) -> None:
    for o in overrides:
        if o.lstrip("+").partition("=")[0] in (LEARNING_RATE, "seed"):
            raise ConfigError(f"{o} is not allowed: tune chooses the rate, and trains on tuning seeds.")
    if sweep.method == "bayes":
        raise ConfigError(f"{sweep.path}: method=bayes has no arms to tune before it is run: take grid or random.")
    if rates < LEAST_RATES or rates % 2 == 0:
        raise ConfigError(f"--rates={rates} is not allowed: it must be odd, at least {LEAST_RATES}.")
    if seeds < 2:
        raise ConfigError(
            f"--seeds={seeds} is not allowed: one tuning seed alone gives 11 % false winners; take {SEEDS}."
        )
    if objective not in OBJECTIVES:
        raise ConfigError(f"--objective={objective} is not allowed: it must be one of {', '.join(OBJECTIVES)}.")


def _show_price(tuner: _Tuner, arms: Sequence[Arm], workers: int, say: Callable[[str], None]) -> None:
    for arm in arms:
        say(f"{arm.label}: rates {', '.join(f'{r:g}' for r in arm.grid)}, {arm.tokens:,} tokens ({arm.id})")
    say_price(tuner.price(arms), tuner.runs, workers, say)
