"""Each arm's own learning rate, found with the same rule and the same number of full runs for every arm.

Rates `center * step^k` on a log grid. First all of them on one tuning seed with a quarter of the budget, each with its
own complete schedule (halving); then the best of them and its two neighbors on three tuning seeds at the full budget.
While the best mean there is an end of what ran, one rate more on that side, at most four, beyond the grid if need be;
an arm whose window did not move gets the missing rates beside its window when that of another arm did. The rate is the
vertex of the parabola through the best three mean losses, at most half a step from the best (STATISTICS.md, rule 3: the
grid's best point alone gives 13 to 62 % false positives).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from albert_ablate.config import ConfigError
from albert_ablate.records.tuning import FIRST_SEED, LEARNING_RATE, RULE, read_tuning, write_tuning
from albert_ablate.stats.learning_rate import (
    LEAST_RATES,
    MOVES,
    SHARE,
    TUNING_SEEDS,
    WINDOW,
    adjacent_rate,
    log_step,
    next_rate,
    tuned_rate,
    tuning_price,
)
from albert_ablate.studies.distributions import Parameter
from albert_ablate.studies.estimates import say_price
from albert_ablate.studies.launch import Study, split_overrides
from albert_ablate.studies.planned_runs import Planned, plan
from albert_ablate.studies.stacking import OFF
from albert_ablate.studies.states import is_done, last_line, read_record
from albert_ablate.studies.sweep_settings import BUDGETS, Sweep, varied_labels

RATES, STEP, SEEDS = 7, 2.0, TUNING_SEEDS
OBJECTIVES = ("val_loss", "best_val_loss")
EXPLODED = ("non_finite", "above_initial")  # divergences that end a run early; a stuck run has its whole budget


@dataclass
class Arm:
    """An arm being tuned: its grid, and every loss so far by (tokens, place in the grid, seed)."""

    label: str
    id: str
    setting: Mapping[str, Any]  # of the sweep, without seed and rate
    sweep: Sweep  # without rate and seed
    tokens: int
    center: float
    step: float
    rates: int
    losses: dict[tuple[int, int, int], float] = field(default_factory=dict)
    diverged: dict[tuple[int, int, int], bool] = field(default_factory=dict)
    settings: set[str] = field(default_factory=set)  # ids of the settings that were run
    error: str = ""

    @property
    def grid(self) -> list[float]:
        """The rates of the first stage."""
        return [self.rate(k) for k in range(self.rates)]

    def rate(self, k: int) -> float:
        """The rate at a place of the grid, which goes on below 0 and beyond its last."""
        return float(f"{self.center * self.step ** (k - self.rates // 2):.4g}")

    def means(self) -> dict[int, float]:
        """Mean loss over the tuning seeds at the full budget, by place; inf where one is not finite."""
        losses_at: dict[int, list[float]] = {}
        for (tokens, k, _), loss in self.losses.items():
            if tokens == self.tokens:
                losses_at.setdefault(k, []).append(loss)
        return {k: float(np.mean(losses)) for k, losses in sorted(losses_at.items())}


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
    stack: int = OFF,
) -> int:
    """Tune the arms of a sweep that are not tuned yet: exit code 0 all tuned, 1 some failed, 130 and 143 stopped."""
    _refuse(sweep, overrides, rates, seeds, objective)
    return tune_together([sweep], runs, workers, overrides, rates, step, seeds, objective, force, dry_run, say, stack)


def tune_together(
    sweeps: Sequence[Sweep],
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
    stack: int = OFF,
) -> int:
    """`tune` of the arms of several sweeps, all of which get as many full runs."""
    step = log_step(step, "--step")
    launcher, extra, workers = split_overrides(sweeps[0], overrides, workers, say)
    by_id: dict[str, Arm] = {}
    for sweep in sweeps:
        for arm in arms_of(sweep, _without_rate(sweep), runs, extra, rates, step):
            by_id.setdefault(arm.id, arm)
    arms = [*by_id.values()]
    asked = {
        "rule": RULE, "rates": rates, "step": step, "objective": objective,
        "seeds": list(range(FIRST_SEED, FIRST_SEED + seeds)),
    }  # fmt: skip
    known = {arm.id: tuning for arm in arms if (tuning := read_tuning(runs, arm.id))}
    tuned = [] if force else [arm for arm in arms if arm.id in known and _same_tuning(known[arm.id], asked, arm)]
    for arm in tuned:
        _take_up(arm, known[arm.id])
    to_tune = [arm for arm in arms if arm not in tuned]
    widest = max((len(arm.means()) for arm in tuned), default=0)
    narrow = [arm for arm in tuned if len(arm.means()) < widest]
    price = tuning_price(rates, seeds)
    say(
        f"{', '.join(dict.fromkeys(str(s.path) for s in sweeps))}: {len(arms)} arms, {len(tuned)} tuned, "
        f"{len(to_tune)} to tune, each with {rates} runs of 1/{SHARE} of the budget and {WINDOW * seeds} to "
        f"{(WINDOW + MOVES) * seeds} runs of the whole budget: the cost of {price.expected:.4g} runs expected, of "
        f"{price.worst:.4g} at most."
    )
    if narrow:
        labels = ", ".join(a.label for a in narrow)
        say(f"Tuned with fewer learning rates than other arms, the missing ones are trained now: {labels}.")
    tuner = _Tuner(runs, extra, Study(launcher, workers, say, stack), seeds, objective, named=len(sweeps) > 1)
    if dry_run:
        _show_price(tuner, to_tune, rates, seeds, workers, say)
        return 0
    retuned = tuner.go(to_tune, tuned) if to_tune or narrow else []
    if tuner.study.stopped is not None:
        return 128 + tuner.study.stopped
    for arm in retuned:
        if not arm.error:
            write_tuning(runs, arm.id, asked | tuner.result(arm))
    for arm in arms:
        tuning = None if arm.error else read_tuning(runs, arm.id)
        say(describe(arm.label, tuning) if tuning else f"{arm.label}: not tuned: {arm.error}")
    return 1 if any(arm.error for arm in arms) else 0


def describe(label: str, tuning: Mapping[str, Any]) -> str:
    """A tuned arm in a line or two: rate, curve at the full budget, slack, and what is wrong with it."""
    full = sorted((c for c in tuning["curve"] if c["tokens"] == tuning["tokens"]), key=lambda c: c["rate"])
    curve = ", ".join(f"{c['rate']:g}: {_mean_words(c)}" for c in full)
    if not tuning["trained"]:
        return f"{label}: no learning rate trains it; its runs use {tuning['rate']:g} and will diverge ({curve})"
    slack = f"slack {tuning['slack']:.2g} nats" if tuning["slack"] is not None else "slack unknown"
    line = f"{label}: {LEARNING_RATE}={tuning['rate']:g} ({curve}; {slack})"
    if tuning["edge"]:
        tried = f" after {len(full) - WINDOW} moves of the window" if tuning.get("rule") else ""
        return (
            f"{line}; the best learning rate is the {tuning['edge']}est that was run{tried}: set {LEARNING_RATE} in "
            "the file to move the grid"
        )
    if tuning.get("fitted") is False:
        line += "; no parabola was fitted, this is the best learning rate that was run"
    return line


def _mean_words(cell: Mapping[str, Any]) -> str:
    """1.6210, 1.6210 (2 of 3 diverged), or not finite."""
    lost = cell.get("diverged") or 0
    of = f" ({lost} of {len(cell['losses'])} diverged)" if lost else ""
    return ("not finite" if cell["mean"] is None else format(cell["mean"], ".4f")) + of


def arms_of(sweep: Sweep, bare: Sweep, runs: Path, extra: Sequence[str], rates: int, step: float) -> list[Arm]:
    """The arms of a sweep, each once, with the grid around the rate that the file gives it or else its optimizer's."""
    stated = {p.name: p for p in sweep.parameters}.get(LEARNING_RATE)
    given = [stated.values[0]] if stated and len(stated.values) == 1 else []
    given = [float(o.partition("=")[2]) for o in sweep.fixed if o.startswith(f"{LEARNING_RATE}=")] or given
    settings, by_id = [], dict[str, Arm]()
    for setting in sweep.settings():
        arm_setting = {k: v for k, v in setting.items() if k not in (LEARNING_RATE, "seed")}
        if arm_setting not in settings:
            settings.append(arm_setting)
    labels = [*varied_labels(bare, settings)]
    for setting, label in zip(settings, labels, strict=True):
        (planned,) = plan(bare, [setting], runs, extra)
        center = given[0] if given else planned.cfg.optimizer.lr
        tokens = planned.cfg.budget.tokens
        by_id.setdefault(planned.arm, Arm(label, planned.arm, setting, bare, tokens, center, step, rates))
    return [*by_id.values()]


class _Tuner:
    """Runs the stages of all arms side by side, so that no worker waits for an arm."""

    def __init__(self, runs: Path, extra: Sequence[str], study: Study, seeds: int, objective: str, named: bool = False):
        self.named = named  # labels of runs begin with the arm's
        self.extra = [o for o in extra if not o.lstrip("+").startswith(("budget.tokens=", "budget.steps="))]
        self.runs, self.study, self.seeds, self.objective = runs, study, seeds, objective

    def go(self, to_tune: Sequence[Arm], tuned: Sequence[Arm]) -> list[Arm]:
        """Tune the open arms; gives them and those tuned ones that got rates because another's window moved."""
        before = {arm.id: len(arm.losses) for arm in tuned}
        self._run({arm.id: [(arm.tokens // SHARE, k, 0) for k in range(arm.rates)] for arm in to_tune}, to_tune)
        wanted = {arm.id: [*self._first_window(arm)] for arm in to_tune if not arm.error}
        while wanted and self.study.stopped is None:
            arms = [arm for arm in (*to_tune, *tuned) if arm.id in wanted]
            self._run({a.id: [(a.tokens, k, s) for s in range(self.seeds) for k in wanted[a.id]] for a in arms}, arms)
            wanted = self._wanted([arm for arm in (*to_tune, *tuned) if not arm.error])
        return [*to_tune, *(arm for arm in tuned if len(arm.losses) > before[arm.id])]

    def _first_window(self, arm: Arm) -> range:
        """The best rate of the first stage and its neighbors; the least three where no loss is finite."""
        if self.study.stopped is not None:
            return range(0)
        first = [arm.losses[arm.tokens // SHARE, k, 0] for k in range(arm.rates)]
        best = int(np.argmin(first)) if np.isfinite(first).any() else 1
        return range(best - 1, best + 2)

    def _wanted(self, arms: Sequence[Arm]) -> dict[str, list[int]]:
        """The rates to run next, by arm: where windows move; when none does, where one has fewer rates than others."""
        if self.study.stopped is not None or not arms:
            return {}
        means = {arm.id: arm.means() for arm in arms}
        moves = {id: [k] for id, means_of_arm in means.items() if (k := next_rate(means_of_arm)) is not None}
        if moves:
            return moves
        widest = max(map(len, means.values()))
        return {id: [adjacent_rate(means_of_arm)] for id, means_of_arm in means.items() if len(means_of_arm) < widest}

    def price(self, arms: Sequence[Arm], windows: int) -> list[Planned]:
        """Runs as dear as those to come, with `windows` rates at the full budget: which they are is not known yet."""
        out = []
        for arm in arms:
            low = arm.rates // 2 - windows // 2
            jobs = [(arm.tokens // SHARE, k, 0) for k in range(arm.rates)]
            jobs += [(arm.tokens, k, s) for s in range(self.seeds) for k in range(low, low + windows)]
            out += plan(_named(arm.sweep), [self._setting(arm, job) for job in jobs], self.runs, self.extra)
        return out

    def _setting(self, arm: Arm, job: tuple[int, int, int]) -> dict[str, Any]:
        tokens, k, seed = job
        kept = {key: value for key, value in arm.setting.items() if key != "budget.steps"}
        return {
            **kept, "budget.tokens": tokens, LEARNING_RATE: arm.rate(k), "seed": FIRST_SEED + seed
        }  # fmt: skip

    def _run(self, jobs: Mapping[str, Sequence[tuple[int, int, int]]], arms: Sequence[Arm]) -> None:
        """Train the jobs of all arms, seeds outermost, and read their losses."""
        wanted: list[tuple[Arm, tuple[int, int, int], Planned]] = []
        sweeps = list[Sweep]()
        for arm in arms:
            if arm.sweep not in sweeps:
                sweeps.append(arm.sweep)
        for sweep in sweeps:
            pairs = [(arm, job) for arm in arms if arm.sweep == sweep for job in jobs[arm.id]]
            planned = plan(_named(sweep), [self._setting(*pair) for pair in pairs], self.runs, self.extra)
            if self.named:  # labels of several sweeps name rate and budget alone
                planned = [
                    replace(p, label=f"{arm.label} {p.label}") for (arm, _), p in zip(pairs, planned, strict=True)
                ]
            wanted += [(arm, job, p) for (arm, job), p in zip(pairs, planned, strict=True)]
        wanted.sort(key=lambda job: job[1][2])
        failed = self.study.complete([p for *_, p in wanted])
        if self.study.stopped is not None:
            return
        for arm, job, p in wanted:
            record = read_record(p.folder)
            arm.settings.add(p.folder.parent.name)
            if not is_done(record):
                arm.error = arm.error or f"{p.name} failed: {last_line(failed.get(p) or record.get('error'))}"
                continue
            arm.losses[job], arm.diverged[job] = loss_of(record, self.objective), record["status"] == "diverged"

    def result(self, arm: Arm) -> dict[str, Any]:
        """The arm's rate from the losses at the full budget, as it is written."""
        ran = [*arm.means()]
        losses, lost = (
            [[values[arm.tokens, k, s] for k in ran] for s in range(self.seeds)]
            for values in (arm.losses, arm.diverged)
        )
        rate = tuned_rate([arm.rate(k) for k in ran], losses, self.seeds, lost)
        edge = ("low" if rate.best == arm.rate(ran[0]) else "high") if rate.edge else None
        cells: dict[tuple[int, int], list[int]] = {}
        for tokens, k, s in sorted(arm.losses):
            cells.setdefault((tokens, k), []).append(s)
        return {
            "arm": arm.label,
            "key": arm.id,
            "rate": float(f"{rate.rate:.4g}"),
            "trained": rate.trains,
            "fitted": rate.fitted,
            "edge": edge,
            "slack": rate.slack,
            "tokens": arm.tokens,
            "curve": [
                {
                    "rate": arm.rate(k),
                    "tokens": tokens,
                    "losses": [arm.losses[tokens, k, s] for s in ran_on],
                    "mean": float(np.mean([arm.losses[tokens, k, s] for s in ran_on])),
                    "seeds": [FIRST_SEED + s for s in ran_on],
                    "diverged": sum(arm.diverged[tokens, k, s] for s in ran_on),
                }
                for (tokens, k), ran_on in sorted(cells.items())
            ],
            "runs": sorted(arm.settings),
        }


def loss_of(record: Mapping[str, Any], objective: str) -> float:
    """The loss with which a done run enters the curve, in nats; inf where it is not finite.

    A stuck run has its whole budget and its own figure. A run that exploded has the loss it ended with, however good it
    once was.
    """
    summary = record["summary"]
    kind = summary.get("divergence") if record["status"] == "diverged" else None
    loss = summary.get("val_loss" if kind in EXPLODED else objective)
    if kind == "non_finite" or loss is None or not math.isfinite(loss):
        return math.inf
    return float(loss)


def _same_tuning(tuning: Mapping[str, Any], asked: Mapping[str, Any], arm: Arm) -> bool:
    """Whether an arm was tuned as it is asked for now, the grid's place included."""
    if any(tuning.get(key) != value for key, value in asked.items()) or tuning["tokens"] != arm.tokens:
        return False
    return [c["rate"] for c in tuning["curve"] if c["tokens"] == arm.tokens // SHARE] == arm.grid


def _take_up(arm: Arm, tuning: Mapping[str, Any]) -> None:
    """The losses that a tuned arm's file holds."""
    places = {arm.rate(k): k for k in range(-MOVES - 1, arm.rates + MOVES + 1)}
    for cell in tuning["curve"]:
        for i, (seed, loss) in enumerate(zip(cell["seeds"], cell["losses"], strict=True)):
            job = cell["tokens"], places[cell["rate"]], seed - FIRST_SEED
            arm.losses[job] = math.inf if loss is None else loss
            arm.diverged[job] = i < cell["diverged"]  # which of them is not kept, and nothing asks for it
    arm.settings |= set(tuning["runs"])


def _named(sweep: Sweep) -> Sweep:
    """The sweep with rate and budget among what varies, so that labels name them."""
    more = (Parameter(LEARNING_RATE, (0, 1)), Parameter("budget.tokens", (0, 1)))
    return replace(sweep, parameters=tuple(p for p in sweep.parameters if p.name not in BUDGETS) + more)


def _without_rate(sweep: Sweep) -> Sweep:
    """The sweep without what tuning chooses itself: rate and seed."""
    parameters = tuple(p for p in sweep.parameters if p.name not in (LEARNING_RATE, "seed"))
    fixed = tuple(o for o in sweep.fixed if o.partition("=")[0] not in (LEARNING_RATE, "seed"))
    return replace(sweep, parameters=parameters, fixed=fixed)


def _refuse(sweep: Sweep, overrides: Sequence[str], rates: int, seeds: int, objective: str) -> None:
    for o in overrides:
        if o.lstrip("+").partition("=")[0] in (LEARNING_RATE, "seed"):
            raise ConfigError(f"{o} is not allowed: tune chooses the learning rate and the seeds.")
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


def _show_price(tuner: _Tuner, arms: Sequence[Arm], rates: int, seeds: int, workers: int,
                say: Callable[[str], None]) -> None:  # fmt: skip
    for arm in arms:
        say(f"{arm.label}: rates {', '.join(f'{r:g}' for r in arm.grid)}, {arm.tokens:,} tokens ({arm.id})")
    if arms:
        price = tuning_price(rates, seeds)
        say(f"If no window moves (expected: {price.expected / (rates / SHARE + WINDOW * seeds):.2f} times this):")
    say_price(tuner.price(arms, WINDOW), tuner.runs, workers, say)
    if arms:
        say("At most:")
        say_price(tuner.price(arms, WINDOW + MOVES), tuner.runs, workers, say)
