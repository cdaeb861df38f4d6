"""From the differences of each claim's contrasts to its verdict: a ledger is `verdicts(claims, m)`.

In this order: *no effect* (the sequential 90 % interval lies inside the margin, even if it excludes 0); *supported* or
*refuted* (Holm rejects); *mixed* (it rejects for the arm that diverged in more pairs); *inconclusive* at N pairs, or
from 8 on when nothing is within reach; else *undecided*. Effects and no-effects are each kept at 5 % by Holm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Literal

import numpy as np

from albert_ablate.stats.sequential import (
    ALPHA,
    FIRST,
    FUTILE,
    FUTILE_FROM,
    PAIRS,
    PLAIN,
    Look,
    Sequential,
    Test,
    critical,
    fisher,
    holm,
    inside_from,
    looks,
    nominal,
    rank_check,
    rank_pairs,
    refuse_unusable,
    running_interval,
    sequential,
)

NULLS = {"0": 0, "margin": 1, "-margin": -1}
OPPOSITE, SMALLER = "opposite found", "smaller than the margin"


@dataclass(frozen=True)
class Contrast:
    """One signed number per seed, positive = what the claim says, in the named order; the gapless prefix only."""

    differences: Sequence[float]
    margin: float
    null: str = "0"  # "margin": better by the margin; "-margin": not worse than the margin
    slack: float = 0.0  # tuning slack of the two arms together, in the unit of the differences
    mixed: str = ""  # why no clean verdict is possible, such as a factorial cell that diverges in every seed
    test: Test = PLAIN
    discrete: bool = False  # the measure has few values, such as a share of five rates: equal differences are evidence

    def __post_init__(self) -> None:
        if str(self.null) not in NULLS:
            raise ValueError(f"null is one of 0, margin, -margin; got {self.null!r}.")
        if not 0 <= self.margin < np.inf:
            raise ValueError(f"A margin is a finite number that is not negative, got {self.margin}.")

    @property
    def shift(self) -> float:
        """The difference that is tested against: 0, the margin or minus the margin."""
        return NULLS[str(self.null)] * self.margin


@dataclass(frozen=True)
class Claim:
    """The contrasts that a claim rests on, the most pairs, and how many of the contrasts must hold."""

    parts: Sequence[Contrast]
    N: int = PAIRS
    needs: Literal["one", "all", "any"] = "one"

    def __post_init__(self) -> None:
        if self.needs not in ("one", "all", "any"):
            raise ValueError(f"needs is one of one, all, any; got {self.needs!r}.")
        if not self.parts or (self.needs == "one" and len(self.parts) > 1):
            raise ValueError(f"A claim that needs {self.needs!r} cannot have {len(self.parts)} primary contrasts.")


@dataclass(frozen=True)
class PartResult:
    """What the pairs so far say about one contrast."""

    pairs: int
    mean: float  # over the seeds where both arms finished, as low and high
    low: float  # what the repeated 95 % intervals of all looks have in common; nan: nothing
    high: float
    finished: int  # pairs in which both arms finished
    lost: int  # pairs in which only the control diverged, minus those in which only the treatment did
    p: Sequential
    rank: str  # does the signed rank agree
    looks: list[Look]
    step_low: float  # as low and high, at the Holm step at which the part was judged
    step_high: float
    inside_from: float  # least margin with which the looks so far would have found no effect; inf: none


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim, its p-values and the levels they had to reach."""

    verdict: str
    reason: str
    detail: str  # what the word leaves open: opposite found, smaller than the margin, a part failed; or ""
    failed: dict[int, str]  # parts that an `all` claim fails by: how
    p_effect: float
    p_inside: float
    level_effect: float  # the Holm steps the two were compared with
    level_inside: float
    parts: list[PartResult]


@dataclass(frozen=True)
class Combined:
    """A claim's parts as one pair of p-values and what a rejection would say."""

    effect: float
    inside: float
    supports: bool  # what a rejected `effect` says
    deciding: list[int]  # the parts it rests on


def verdicts(claims: Sequence[Claim], m: int, alpha: float = ALPHA) -> list[Verdict]:
    """Verdict of every claim of a family of m, named before; the same differences give the same ledger."""
    refused = [inadmissible(c) for c in claims]
    tests = [
        [
            Sequential(*map(float, sequential(x.differences, x.margin, c.N, x.shift, x.discrete, x.test)))
            for x in c.parts
        ]
        for c in claims
    ]
    joint = [combine(p, c.needs) for p, c in zip(tests, claims, strict=True)]
    effect, effect_level = holm([1.0 if r else j.effect for j, r in zip(joint, refused, strict=True)], m, alpha)
    inside, inside_level = holm([1.0 if r else j.inside for j, r in zip(joint, refused, strict=True)], m, alpha)
    out = []
    for i, (claim, j) in enumerate(zip(claims, joint, strict=True)):
        word, reason = ("inadmissible", refused[i]) if refused[i] else _word(claim, j, effect[i], inside[i])
        # the level at which one part alone decides: an `any` is split for support, an `all` for "without effect"
        level = effect_level[i] / (len(claim.parts) if claim.needs == "any" else 1)
        wide = inside_level[i] / (len(claim.parts) if claim.needs == "all" else 1)
        parts = [_part(x, claim, p, level, wide) for x, p in zip(claim.parts, tests[i], strict=True)]
        failed = _failed(claim, parts, level, wide) if word == "refuted" and claim.needs == "all" else {}
        detail = "a part failed" if failed else _detail(claim, parts, word)
        out.append(Verdict(word, reason, detail, failed, float(j.effect), float(j.inside), effect_level[i],
                           inside_level[i], parts))  # fmt: skip
    return out


def _detail(claim: Claim, parts: Sequence[PartResult], word: str) -> str:
    """What a claim that needs one part, or any of several, is refuted by, and whether "no effect" is one below it."""
    found = {_shortfall(x, p) for x, p in zip(claim.parts, parts, strict=True)}
    if word == "refuted":
        return OPPOSITE if found == {OPPOSITE} else SMALLER
    return SMALLER if word == "no effect" and any(p.low > 0 for p in parts) else ""


def _failed(claim: Claim, parts: Sequence[PartResult], level: float, wide: float) -> dict[int, str]:
    """The parts that refute a claim that needs all of them, each at its share of the level."""
    k, out = len(parts), {}
    for i, (x, p) in enumerate(zip(claim.parts, parts, strict=True)):
        if p.p.inside <= wide:
            out[i] = SMALLER if p.low > 0 else "no effect"
        elif p.p.effect <= level / k and p.p.sign < 0:
            out[i] = _shortfall(x, p)
    return out


def _shortfall(x: Contrast, p: PartResult) -> str:
    """How a contrast fails: below zero, or only below the margin by which it was to be better."""
    return SMALLER if x.shift > 0 and not p.high < 0 and p.finished == p.pairs else OPPOSITE


def combine(p: Sequence[Sequential], needs: str) -> Combined:
    """One p for "effect" and one for "no effect" out of the parts' own.

    all: supported by the largest p (Berger 1982), refuted when one of k parts is refuted or without effect at level/k.
    any: supported when one of k parts is at level/k, refuted (no effect) when every part is. one: any with k = 1.
    """
    k = len(p)
    up = [x.effect if x.sign > 0 else 1.0 for x in p]
    down = [x.effect if x.sign < 0 else 1.0 for x in p]
    inside = [x.inside for x in p]
    every = list(range(k))
    if needs == "all":
        support, refute, nothing = max(up), min(1.0, k * min(down)), min(1.0, k * min(inside))
        on_support, on_refute = every, [int(np.argmin(down))]
    else:
        support, refute, nothing = min(1.0, k * min(up)), max(down), max(inside)
        on_support, on_refute = [int(np.argmin(up))], every
    if support <= refute:
        return Combined(support, nothing, True, on_support)
    return Combined(refute, nothing, False, on_refute)


def inadmissible(claim: Claim) -> str:
    """The sentence why no test of this claim can mean anything, or ""."""
    for x in claim.parts:
        differences = np.asarray(x.differences, float)[: claim.N]
        if (
            np.isnan(differences).all()
            and len(differences) >= FUTILE_FROM
            or np.isfinite(differences).all()
            and len(differences) >= FIRST
            and not x.discrete
        ):
            try:
                refuse_unusable(differences)
            except ValueError as sentence:
                return str(sentence)
        usable = claim.N - int(np.sum(np.isnan(differences) | (differences == 0)))
        if (
            not np.isfinite(differences).all()
            and usable < (need := rank_pairs(claim.N))
            and not _fisher_can(differences, claim.N)
        ):
            tried = sequential(differences, x.margin, claim.N, x.shift, x.discrete, x.test)
            if min(tried.effect, tried.inside) > ALPHA:
                return (
                    f"Runs diverged, and the signed rank needs {need} pairs that say something to reach the level; "
                    f"with N = {claim.N} at most {usable} can come, nor can Fisher's exact test on the diverged runs."
                )
    return ""


def _fisher_can(differences: np.ndarray, N: int) -> bool:
    """Whether Fisher's test can still reach the level: all further pairs lose one arm's run alone."""
    return any(
        fisher(np.r_[differences, np.full(N - len(differences), end)]) <= nominal(ALPHA, N) for end in (inf, -inf)
    )


def _word(claim: Claim, joint: Combined, effect: bool, inside: bool) -> tuple[str, str]:
    if notes := [x.mixed for x in claim.parts if x.mixed]:
        return "mixed", notes[0]
    if inside:
        if claim.needs == "all":
            return "refuted", "A part it needs is without effect: its 90 % interval lies inside the margin."
        return "no effect", "The sequential 90 % interval lies inside the margin."
    differences = [np.asarray(x.differences, float)[: claim.N] for x in claim.parts]
    if effect:
        if any((_lost(differences[i]) < 0) if joint.supports else (_lost(differences[i]) > 0) for i in joint.deciding):
            return "mixed", "The arm that is better by this measure diverged in more pairs."
        for i in joint.deciding:
            x = claim.parts[i]
            if np.isfinite(differences[i]).all() and abs(differences[i].mean() - x.shift) < x.slack:
                return "within tuning slack", f"The estimate is smaller than the arms' tuning slack of {x.slack:.3g}."
        return (
            "supported" if joint.supports else "refuted"
        ), "An effect was found at the significance level that Holm leaves it."
    if all(len(x) >= claim.N for x in differences):
        return "inconclusive", f"All {claim.N} pairs are in and neither bound was reached."
    if not any(len(x) for x in differences):
        return "open", "No pair of finished or diverged runs yet."
    if not within_reach(claim):
        return "inconclusive", "Out of reach: if mean and spread stay as they are, N pairs will not decide."
    return "undecided", "More pairs may decide."


def within_reach(claim: Claim) -> bool:
    """Whether a verdict is still likely (non-binding): with mean and s as now, by FUTILE of the half-width at N.

    Asked only from FUTILE_FROM finite pairs on.
    """
    up, down, inside = [], [], []
    for x in claim.parts:
        differences = np.asarray(x.differences, float)[: claim.N]
        if len(differences) < FUTILE_FROM or not np.isfinite(differences).all():
            return True
        mean, error = differences.mean(), FUTILE * differences.std(ddof=1) / sqrt(claim.N)
        up.append(mean - x.shift >= error * critical(claim.N, claim.N, ALPHA, x.test))
        down.append(x.shift - mean >= error * critical(claim.N, claim.N, ALPHA, x.test))
        inside.append(x.shift >= 0 and x.margin - abs(mean) >= error * critical(claim.N, claim.N, 2 * ALPHA, x.test))
    if claim.needs == "all":
        return all(up) or any(down) or any(inside)
    return any(up) or all(down) or all(inside)


def _part(x: Contrast, claim: Claim, p: Sequential, level: float, inside_level: float) -> PartResult:
    differences = np.asarray(x.differences, float)[: claim.N]
    mean, low, high = running_interval(differences, claim.N, test=x.test)
    steps = looks(differences, x.margin, claim.N, level, inside_level, x.shift, x.discrete, x.test)
    _, step_low, step_high = running_interval(differences, claim.N, level, x.test)
    return PartResult(
        len(differences),
        mean,
        low,
        high,
        int(np.isfinite(differences).sum()),
        _lost(differences),
        p,
        rank_check(differences - x.shift, claim.N, discrete=x.discrete, test=x.test),
        steps,
        step_low,
        step_high,
        inside_from(differences, claim.N, inside_level, x.test) if x.shift >= 0 else inf,
    )


def deciding_look(part: PartResult, verdict: str) -> int:
    """Pairs at the first look of a part that decides as the claim was decided; 0 where no look of it does."""
    for x in part.looks:
        inside = x.inside >= x.inside_boundary
        effect = abs(x.statistic) >= x.boundary and np.sign(x.statistic) == part.p.sign
        if inside if verdict == "no effect" else effect:
            return x.pairs
    return 0


def _lost(differences: np.ndarray) -> int:
    """Pairs in which only the control diverged minus those in which only the treatment did."""
    return int(np.sum(np.sign(differences[np.isinf(differences)])))
