"""Pairing of runs by seed into the differences of a contrast."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from albert_ablate.analysis.registry import Evidence, Measure, Missing, Unusable
from albert_ablate.config import ConfigError, corrections, unlike_code
from albert_ablate.judge.claims import ClaimsFile, ClaimText, Part, arms_of, measure_of
from albert_ablate.judge.comparability import (
    check_text,
    check_tuning,
    failed,
    held_up,
    other_code,
    suspect,
    unfair,
    why_no_contrast,
)
from albert_ablate.judge.contrast_data import ContrastData, Job, finite_mean
from albert_ablate.judge.run_store import ContrastArm, RunStore
from albert_ablate.judge.words import joined
from albert_ablate.records.folder import DONE
from albert_ablate.stats import effects
from albert_ablate.stats.learning_rate import TUNING_SEEDS, slack_bound

NOT_PROVENANCE = ("created", "command")


def gather(file: ClaimsFile, claim: ClaimText, part: Part, form: str, store: RunStore) -> ContrastData:
    """The differences of a contrast over the gapless prefix of its seeds, or why there are none."""
    out, m, f = ContrastData(), measure_of(part), claim.forms[form]
    tuned = claim.rate_matters(m)
    arms = {
        a: ContrastArm(a, file.overrides(claim, part, form, a), store, tuned, part.rate_factor) for a in arms_of(part)
    }
    treatment = _chosen(part, arms, out, claim)
    if treatment is None:
        return out
    out.treatment = treatment
    compared = [arms[a] for a in (arms_of(part) if part.other_end else [treatment, part.control, *part.singles])]
    if refusal := why_no_contrast(compared):
        out.refusal = refusal
        return out
    out.notes += [_not_counted(a) for a in compared if a.outdated]
    out.notes += [
        f"Runs of {a.name} that do not count, because its own code has changed since: {len(a.other_code)}."
        for a in compared
        if a.other_code
    ]
    if tuned and any(a.runs for a in compared):
        advised = (claim.name, form) not in store.seen
        check_tuning(compared, out, advised)
        if out.refusal:  # no pair at rates that are not those of the claim, so that nothing is seen of it before
            out.jobs = [Job(a.name, a.overrides, None, claim.seeds[0]) for a in compared if not a.known]
            return out
    check_text(compared, out)
    rates: tuple[float, ...] = f.grid if m.kind == "grid" else ()
    used: dict[str, list[Evidence]] = {a.name: [] for a in compared}
    for seed in claim.seeds[: f.N]:
        runs = {a.name: [a.run_of(seed, r) for r in rates] if rates else [a.run_of(seed)] for a in compared}
        if refusal := failed(runs):
            out.refusal = out.refusal or refusal
            break
        gaps = [
            Job(a.name, a.overrides, (r if rates else a.rate) if a.known else None, seed)
            for a in compared
            for r, run in zip(rates or (a.rate,), runs[a.name], strict=True)
            if run is None or run.record["status"] not in DONE
        ]
        if gaps:
            out.jobs = gaps
            out.pending_reason = held_up(compared, rates, claim.seeds[: f.N], seed, store)
            break
        done = {name: [r for r in several if r is not None] for name, several in runs.items()}
        try:
            for a in compared:
                used[a.name] += done[a.name]
                out.refusal = out.refusal or suspect(a, used[a.name], done[a.name], seed, rates)
                out.refusal = out.refusal or other_code(a.name, [used[a.name][0], *done[a.name]])
            if refusal := unfair(done, part.control, claim.equal, m):
                out.refusal = out.refusal or refusal
            add_pair(out, m, part, treatment, done)
        except Missing as sentence:
            out.pending_reason = str(sentence)
            lacking = [(a, r) for a in compared for r in done[a.name]]
            out.jobs = [Job(a.name, a.overrides, r.lr, seed, m.evaluation) for a, r in lacking if m.evaluation]
            break
        except (Unusable, ValueError) as sentence:
            out.refusal = out.refusal or str(sentence)
            break
        out.seeds.append(seed)
        out.used |= {r.relative_folder: r for several in done.values() for r in several}
        out.trained |= {r.relative_folder: Job(a.name, a.overrides, r.lr, seed) for a in compared for r in done[a.name]}
    if m.looks and out.used:
        out.notes += _resolution([*out.used.values()][0], m)
    _notes(out, compared)
    if claim.test == "moderated":
        out.prior = _prior(arms, part, m)
        if not out.prior:
            out.notes.append(
                f"{treatment} against {part.control} is judged by the t test: no spread of {m.name} can be taken from "
                "tuning runs."
            )
    if m.loss and m.log and out.values[1] and tuned:
        level = finite_mean(out.values[1])
        slacks = {a.name: slack_bound(a.tuning) for a in compared if a.tuning and a.tuning.get("trained", True)}
        if part.other_end:  # of a mean of arms, and at most of the one end that counts
            slacks = {a: x / len(part.treatment) if a in part.treatment else x for a, x in slacks.items()}
        out.slack = float(sum(slacks.values()) / level) if slacks and math.isfinite(level) else 0.0
        if unknown := [name for name, slack in slacks.items() if math.isnan(slack)]:
            out.notes.append(
                f"The tuning slack of {' and '.join(unknown)} is unknown: it is not held against the verdict."
            )
    return out


def tuning_variance(file: ClaimsFile, claim: ClaimText, part: Part, form: str, store: RunStore) -> float:
    """Variance of a pair's difference as the tuning runs have it; 0 where it cannot be had."""
    arms = {a: ContrastArm(a, file.overrides(claim, part, form, a), store, True, 1.0) for a in arms_of(part)}
    return _prior(arms, part, measure_of(part))


def _prior(arms: Mapping[str, ContrastArm], part: Part, m: Measure) -> float:
    """Mean over the best rate of each arm and its two neighbors of the variance over tuning seeds of the difference.

    0 where it cannot be had: a rate is missing, a run diverged, or the tuning runs lack the measure.
    """
    # of gaps the spread of tuning runs was .34 and .44 of that of pairs, of losses .7 to 1.4 (docs/verdicts.md)
    plain = m.kind == "run" and m.loss and m.log and not part.singles and part.rate_factor == 1
    if not plain or len(part.treatment) > 1:
        return 0.0
    treatment, control = arms[part.treatment[0]], arms[part.control]
    sides = [_around_best(arm) for arm in (treatment, control)]
    seeds = sorted({r.record["seed"] for r in treatment.runs if r.record.get("role") == "tuning"})[:TUNING_SEEDS]
    if not all(sides) or len(seeds) < TUNING_SEEDS:
        return 0.0
    variances = []
    for rates in zip(*sides, strict=True):
        runs = [[arm.run_of(s, rate) for s in seeds] for arm, rate in zip((treatment, control), rates, strict=True)]
        if any(r is None or r.record["status"] != "finished" for side in runs for r in side):
            return 0.0
        try:
            values = [[float(m.of(r)) for r in side] for side in runs]
            differences = effects.signed_difference(values[0], values[1], part.direction, m.log)  # type: ignore[arg-type]
        except (Missing, Unusable, ValueError):
            return 0.0
        variances.append(differences.var(ddof=1))
    return float(np.mean(variances))


def _around_best(arm: ContrastArm) -> list[float]:
    """The best rate at the full budget and its neighbors."""
    curve = [c for c in (arm.tuning or {"curve": ()})["curve"] if c["tokens"] == arm.tuning["tokens"]]  # type: ignore[index]
    means = {c["rate"]: math.inf if c["mean"] is None else c["mean"] for c in curve}
    rates = sorted(means)
    best = rates.index(min(means, key=lambda r: means[r])) if means else 0
    return rates[best - 1 : best + 2] if 0 < best < len(rates) - 1 else []


def _chosen(part: Part, arms: Mapping[str, ContrastArm], out: ContrastData, claim: ClaimText) -> str | None:
    """The treatment, of several levels the one that is best on tuning seeds."""
    if len(part.treatment) == 1 or part.other_end:
        return part.treatment[0] if len(part.treatment) == 1 else f"the mean of {joined(part.treatment)}"
    if lacking := [a for a in part.treatment if arms[a].tuning is None]:
        out.pending_reason = f"The level is chosen on tuning seeds, and {', '.join(lacking)} has not been tuned."
        out.treatment = "|".join(part.treatment)
        out.jobs = [Job(a, arms[a].overrides, None, claim.seeds[0]) for a in lacking]
        return None
    best = min(part.treatment, key=lambda a: arms[a].tuned_loss())
    out.notes.append(f"Of {', '.join(part.treatment)} tuning seeds chose {best}.")
    return best


def _not_counted(arm: ContrastArm) -> str:
    what = "; ".join(corrections(arm.outdated[0].record))
    return f"Runs of {arm.name} that do not count, because of a correction made since: {len(arm.outdated)} ({what})."


def add_pair(out: ContrastData, m: Measure, part: Part, treatment: str, runs: Mapping[str, Sequence[Evidence]]) -> None:
    """Add the difference of one seed to a contrast. Raises Missing or Unusable where its measure cannot be had."""
    better = part.direction
    if part.other_end:
        _add_curve(out, m, part, runs)
        return
    t, c = runs[treatment], runs[part.control]
    if m.kind == "initial":
        lost = [not math.isfinite(m.of(side[0])) for side in (t, c)]
    else:
        lost = [any(r.diverged for r in side) and m.kind != "grid" for side in (t, c)]
    value, other = math.nan, math.nan
    if part.singles:
        cells = [runs[a][0] for a in (treatment, part.control, *part.singles)]
        scale: Callable[[float], float] = math.log if m.log else float
        full, base, *singles = [math.nan if r.diverged else scale(_finite(m, r, r)) for r in cells]
        difference = float(effects.more_than_the_sum([full], [base], [singles], better)[0])  # type: ignore[arg-type]
        if dead := [a for a in runs if all(r.diverged for r in runs[a])]:
            out.mixed_reason = f"Runs of {', '.join(dead)} diverged: a diverged cell is no interaction."
        value, other = (math.exp(x) if m.log else x for x in (full, base))
    elif m.kind == "pair":
        if any(lost):
            difference = math.nan if all(lost) else (-math.inf if lost[0] else math.inf)
        else:
            difference = float(m.of(t[0], c[0])) * (1 if better == m.better else -1)
            if not math.isfinite(difference):
                raise Unusable(f"{t[0].name} and {c[0].name} have no finite {m.name}.")
    else:
        value, other = (
            math.nan if gone else _finite(m, side if m.kind == "grid" else side[0], side[0])
            for gone, side in zip(lost, (t, c), strict=True)
        )
        signed = effects.signed_difference([value], [other], better, m.log, [lost[0]], [lost[1]])  # type: ignore[arg-type]
        difference = float(signed[0])
    out.differences.append(difference)
    out.values[0].append(value)
    out.values[1].append(other)
    for side, gone in zip(out.diverged, lost, strict=True):
        side.append(gone)


def _add_curve(out: ContrastData, m: Measure, part: Part, runs: Mapping[str, Sequence[Evidence]]) -> None:
    """The mean of the treatments against the better one of the two ends of the curve, both of this seed.

    The better end is chosen after the fact, which only makes the difference smaller: E min <= min E. So where the mean
    of these differences is above a margin, the treatments' mean is better than either end by it, and so is the best.
    """
    sign = 1 if part.direction == "lower" else -1
    lost = {a: runs[a][0].diverged for a in runs}
    x = {
        a: math.inf if lost[a] else sign * (math.log(v) if m.log else v)
        for a in runs for v in [1.0 if lost[a] else _finite(m, runs[a][0], runs[a][0])]
    }  # fmt: skip
    inner, end = float(np.mean([x[a] for a in part.treatment])), min(x[part.control], x[part.other_end])
    out.differences.append(math.nan if math.isinf(inner) and math.isinf(end) else end - inner)
    for side, gone, value in zip((0, 1), (math.isinf(inner), math.isinf(end)), (inner, end), strict=True):
        out.values[side].append(math.nan if gone else math.exp(sign * value) if m.log else sign * value)
        out.diverged[side].append(gone)


def _finite(m: Measure, what: Any, run: Evidence) -> float:
    value = float(m.of(what))
    if not math.isfinite(value):
        raise Unusable(f"{run.name} finished without a finite {m.name}.")
    return float(f"{value:.12g}") if m.kind == "exact" else value


def _resolution(run: Evidence, m: Measure) -> list[str]:
    """How finely a measure that is read from the evaluations during training can tell."""
    try:
        count, apart = run.between_evaluations()
    except (Missing, Unusable, ConfigError):
        return []
    where = f"{count} evaluations on validation text, {apart:,.0f} tokens apart"
    if m.kind == "pair" or m.name == "mean_val_loss":
        return [f"{m.name} is read from {where}: it tells nothing finer."]
    return [f"{m.name} is taken at the best of {where}."]


def _notes(out: ContrastData, arms: Sequence[ContrastArm]) -> None:
    """What a reader should know: provenance that differs, initial weights that are not shared."""
    places: dict[str, list[dict[str, str]]] = {}
    for a in arms:
        for r in out.used.values():
            if r in a.runs:
                flat = {k: json.dumps(v, sort_keys=True) for k, v in (r.record.get("provenance") or {}).items()}
                places.setdefault(a.name, []).append(flat)
    keys = {k for rows in places.values() for row in rows for k in row} - set(NOT_PROVENANCE)
    differ = [k for k in sorted(keys) if len({frozenset(row.get(k) for row in rows) for rows in places.values()}) > 1]
    if differ:
        out.notes.append(f"Provenance differs between the arms: {', '.join(differ)}.")
    within = [
        k for k in sorted(keys - {*differ}) if any(len({row.get(k) for row in rows}) > 1 for rows in places.values())
    ]
    if within:
        out.notes.append(f"Provenance differs between the seeds of an arm: {', '.join(within)}.")
    first = [next((r for r in out.used.values() if r in a.runs), None) for a in arms]
    unlike = {g for x in first for y in first if x and y for g in unlike_code(x.record, y.record)}
    if unlike:
        out.notes.append(
            f"The code of components that the arms share differs between them: {', '.join(sorted(unlike))}."
        )
    for a, run in zip(arms[:-1], first[:-1], strict=True):
        other = next((x for x in arms[-1].runs if run and x.record["seed"] == run.record["seed"]), None)
        x, y = ((z.record.get("proof") or {}).get("initial_draws") or {} if z else {} for z in (run, other))
        if x and y:
            shared = sum(y.get(k) == v for k, v in x.items())
            if shared < max(len(x), len(y)):
                out.notes.append(
                    f"{a.name} and {arms[-1].name} share {shared} of {max(len(x), len(y))} initial draws of a seed."
                )
