"""How the judge decides: one signed number per seed, one sequential p-value per claim, Holm, one repeated interval.

d differences of one contrast in the named seed order, positive = what the claim says, +-inf where one arm of the pair
diverged, nan where both did; N most pairs the claim may use, named before; a nominal two-sided level used at each look;
m size of the family, named before. Functions of `d` work along its last axis, so that 10,000 studies are one call.

Why this is valid:
1. `overall(smallest nominal p so far)` is a p-value at every look, hence at whatever moment sampling stops and for
   whatever reason, as long as N was named before and seeds come in the named order.
2. It can only fall as pairs come in and Holm is monotone, so what Holm rejects at the stopping times it would also
   reject had all claims run to N: the family-wise error is at most 5 % under any dependence and any stopping.
3. The same nominal level gives the repeated interval mean +- t(1 - a/2, n - 1) s / sqrt(n), right at all looks at once,
   and so is what all of them have in common: an interval that never again holds what a look has excluded.
4. The signed-rank p may use the same formula, because its own curve lies below that of the t test.
It assumes differences symmetric about their mean, as exchangeable arms have; skew 1 makes 5 % into 8 %, and skew 2 into
16 %; in a family of 15 into 15 and 52 % (docs/verdicts.md; `student.Test` has what to do about it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import comb, exp, inf, log
from typing import Any, NamedTuple

import numpy as np

from albert_ablate.stats.student import FIRST as FIRST
from albert_ablate.stats.student import PLAIN, Test, mean_and_error, t_tail

ALPHA = 0.05
PAIRS = 20
MOST_PAIRS = 60  # the formula of `overall` was fitted to N = 4..60
FUTILE_FROM, FUTILE = 8, 0.6
SMALLEST_FITTED = 6e-5  # below this nominal level the fitted formula falls under the truth (at 1e-10, N = 60: tenfold)


def overall(a, N: int, test: Test = PLAIN):
    """Chance under the null that any look at n = FIRST..N has a nominal p <= a: Pocock's constant boundary for t.

    a exp(k (.3520 - .0987 l - .0122 k + .0055 l k - .0033 l^2 - .0032 k^2)), k = log(N - 3), l = log a: a fit to
    simulated paths, within 3 % for overall levels .001 to .1 (4 % at .001 and N = 60). For smaller a the union bound
    (N - 3) a holds instead.
    Pocock 1977; Jennison & Turnbull 2000, chapter 2.
    """
    _check_pairs(N)
    a = np.asarray(a, float)
    if test.name == "moderated":
        return _overall_moderated(a, N)
    fitted = np.maximum(a, SMALLEST_FITTED)
    k, x = log(N - 3), np.log(fitted)
    power = k * (0.3520 - 0.0987 * x - 0.0122 * k + 0.0055 * x * k - 0.0033 * x**2 - 0.0032 * k**2)
    level = np.minimum(1.0, fitted * np.exp(power))
    return np.where(a < SMALLEST_FITTED, np.minimum(level, a * (N - 3)), level)[()]


def _overall_moderated(a: np.ndarray, N: int):
    """`overall` of the moderated t with looks at n = 3..N, where .9 of a seed's noise is common to its three rates.

    Fitted like that of the t test, with k = log(N - 2): within 1 % at .05, 5 % down to .0007. Below, the level falls as
    a^.8 at most, since t with 5 degrees of freedom is taken where a shared prior has 4.
    """
    fitted = np.maximum(a, SMALLEST_FITTED)
    k, x = log(N - 2), np.log(fitted)
    power = -0.2439 - 0.1481 * x - 0.0149 * x**2
    power = power + k * (0.4152 - 0.0694 * x - 0.0207 * k + 0.0076 * x * k + 0.0003 * x**2)
    level = fitted * np.exp(power)
    return np.minimum(1.0, np.where(a < SMALLEST_FITTED, level * (a / SMALLEST_FITTED) ** 0.8, level))[()]


def nominal(level: float, N: int, test: Test = PLAIN) -> float:
    """Two-sided level to use at every look for an overall `level`: the inverse of `overall` (.0089 for 5 %, N = 20)."""
    return _nominal(level, N, test.name == "moderated")


@cache
def _nominal(level: float, N: int, moderated: bool) -> float:
    test = Test("moderated", 1.0) if moderated else PLAIN
    if not 0 < level < 1:
        raise ValueError(f"A level lies between 0 and 1, got {level}.")
    low, high = log(level / N), log(level)
    for _ in range(60):  # halvings: more than a float's 53 bits, so the root is exact
        middle = (low + high) / 2
        low, high = (low, middle) if overall(exp(middle), N, test) > level else (middle, high)
    return exp(low)


def signed_rank(d):
    """Exact two-sided Wilcoxon signed-rank p, midranks for ties; +-inf rank last, zero and nan say nothing.

    Wilcoxon 1945; the law is that of these very ranks under random signs, so ties cost no exactness.
    """
    d = np.asarray(d, float)
    doubled = doubled_ranks(d).reshape(-1, d.shape[-1])
    won = np.where(d.reshape(doubled.shape) > 0, doubled, 0).sum(-1)
    lost = doubled.sum(-1) - won
    # the null distribution depends on the ranks alone: rows of many simulated studies share a few of them
    laws, which = np.unique(np.sort(doubled, axis=-1), axis=0, return_inverse=True)
    p = np.ones(len(doubled))
    for i, law in enumerate(laws):
        rows = which.reshape(-1) == i
        p[rows] = _rank_law(tuple(law[law > 0]))[np.minimum(won, lost)[rows]]
    return np.minimum(1.0, 2 * p).reshape(d.shape[:-1])[()]


def fisher(d):
    """Fisher's exact two-sided p that both arms diverge as often, from the pairs' d (Fisher 1922).

    +inf: only the control diverged, -inf: only the treatment, nan: both. Of n runs an arm, given how many diverged in
    all: twice the smaller tail of the hypergeometric law. Runs of a seed that diverge together make it conservative.
    """
    d = np.asarray(d, float)
    both = np.isnan(d).sum(-1)
    return _fisher_table(d.shape[-1])[(d == inf).sum(-1) + both, (d == -inf).sum(-1) + both][()]


def p_effect(d, discrete: bool = False, test: Test = PLAIN):
    """Nominal two-sided p of one look: paired t while every pair has two finished runs.

    Once a run diverged the smaller one of `signed_rank` and `fisher`: in at most 4.9 % of simulated studies that finds
    what is not there, and a control that always diverges is told after 5 pairs instead of 8.

    Equal differences are not a random measure and give 1; but of a discrete one (a share of five rates, a count), where
    they are the strongest evidence there is, they go to `signed_rank`. On differences of three values the t test errs
    in up to 7.3 % of studies, with and without that (N = 8 to 40).
    """
    d = _differences(d)
    by_rank = _by_rank(d, discrete)
    finite = np.where(by_rank[..., None], 0.0, d)  # so that the t test of all rows at once meets no inf; replaced below
    mean, se = mean_and_error(finite, test)
    p = np.array(t_tail(mean, se, d.shape[-1] - 1 + test.freedom))
    if test.corrected:  # both tests must reject: the larger p
        p = np.maximum(p, test.corrected(finite))
    if by_rank.any():
        p[by_rank] = np.minimum(signed_rank(d[by_rank]), fisher(d[by_rank]))
    return p[()]


def p_inside(d, margin: float, test: Test = PLAIN):
    """Nominal p of one look that the mean lies inside +-margin: twice the larger one-sided t p (Schuirmann 1987).

    Never inside where a run diverged.
    """
    d = _differences(d)
    finite = np.isfinite(d).all(-1)
    d = np.where(finite[..., None], d, 0.0)
    mean, se = mean_and_error(d, test)
    room = margin - np.abs(mean)
    p = t_tail(room, se, d.shape[-1] - 1 + test.freedom)
    if test.corrected:
        p = np.maximum(p, np.maximum(test.corrected(d, margin), test.corrected(d, -margin)))
    return np.where(finite & (room > 0), p, 1.0)[()]


def sign(d):
    """Direction of one look: of the mean; once a run diverged of the signed-rank sum, or of the counts of diverged runs
    where Fisher's test finds more."""
    d = np.asarray(d, float)
    finite = np.isfinite(d).all(-1)
    direction = np.array(np.sign(mean_and_error(np.where(finite[..., None], d, 0.0))[0]))
    if not finite.all():
        lost = d[~finite]
        ranks = (np.sign(np.nan_to_num(lost)) * doubled_ranks(lost)).sum(-1)
        counts = (lost == inf).sum(-1) - (lost == -inf).sum(-1)
        direction[~finite] = np.sign(np.where(fisher(lost) < signed_rank(lost), counts, ranks))
    return direction[()]


class Sequential(NamedTuple):
    """Numbers for one study, arrays for many."""

    effect: Any  # p-value of "no effect at all", right whenever sampling stops
    inside: Any  # p-value of "outside the margin"
    sign: Any  # direction at the look with the smallest p


def sequential(d, margin: float, N: int = PAIRS, null: float = 0.0, discrete: bool = False,
               test: Test = PLAIN) -> Sequential:  # fmt: skip
    """Sequential p-values of one contrast after the looks at n = FIRST..min(len(d), N); (1, 1, 0) before the first.

    Both are running minima, so they never rise and stopping cannot hurt. The effect is judged on d - null, "inside" on
    d itself; a claim of "not worse than the margin" (null < 0) has no "inside": being inside is what it claims.
    """
    _check_pairs(N)
    d = np.asarray(d, float)[..., :N]
    looks = [d[..., :n] for n in range(test.first, d.shape[-1] + 1)]
    if not looks:
        none = np.ones(d.shape[:-1])
        return Sequential(none[()], none[()], (0 * none)[()])
    p = np.stack([p_effect(x - null, discrete, test) for x in looks], -1)
    best = p.argmin(-1)[..., None]  # the look with the smallest p also gives the direction, so that both agree
    direction = np.take_along_axis(np.stack([sign(x - null) for x in looks], -1), best, -1)[..., 0][()]
    inside = np.minimum.reduce([p_inside(x, margin, test) for x in looks]) if null >= 0 else np.ones(d.shape[:-1])
    # p_inside is twice a one-sided p, the scale of `overall`; of the two one-sided tests only one can err: half
    return Sequential(overall(p.min(-1), N, test), overall(inside, N, test) / 2, direction)


def holm(p: Sequence[float], m: int, alpha: float = ALPHA) -> tuple[list[bool], list[float]]:
    """Holm's step-down (Holm 1979): which p are rejected, and the level each was compared with.

    m is the family's size as named before, run or not: a claim without runs counts as p = 1.
    """
    if m < len(p):
        raise ValueError(
            f"The family was named with {m} claims, and {len(p)} are judged: a new claim needs a new family."
        )
    if bad := [x for x in p if not 0 <= x <= 1]:
        raise ValueError(f"Holm needs a p-value for every claim judged, got {bad[0]}.")
    rejected, levels, count = [False] * len(p), [alpha / m] * len(p), 0
    order = np.argsort(p, kind="stable")  # claims with equal p keep their order in the file
    for j in order:
        if p[j] > alpha / (m - count):
            break
        rejected[j], levels[j], count = True, alpha / (m - count), count + 1
    for j in order[count:]:  # all that remain are held to the level at which the first one failed
        levels[j] = alpha / (m - count)
    return rejected, levels


def interval(d, N: int = PAIRS, level: float = ALPHA, test: Test = PLAIN) -> tuple[float, float, float]:
    """Repeated interval (mean, low, high): mean +- t(1 - a/2, n - 1) s / sqrt(n), right at every look.

    Over the pairs where both arms finished. Without two of them, or without spread, it has no end: (mean, -inf, inf).
    Means of an early stop run high by .05 to .35 sd. Jennison & Turnbull 2000, chapter 9.
    """
    d = np.asarray(d, float)[:N]
    d = d[np.isfinite(d)]
    if len(d) < 2:
        return float(d.sum()) if len(d) else np.nan, -inf, inf
    mean, se = map(float, mean_and_error(d, test))
    half = critical(len(d), N, level, test) * se if se else inf
    return mean, mean - half, mean + half


def running_interval(d, N: int = PAIRS, level: float = ALPHA, test: Test = PLAIN) -> tuple[float, float, float]:
    """Mean of all pairs, low and high end of what the repeated intervals of all looks so far have in common.

    Right at all looks at once, as each of them is: it covers in .947 to .952 of studies, and is narrower than the last
    one by 6 % (N = 12) to 10 % (60) in the median. A claim decided alone never prints an interval that holds its null
    value, whatever came after. The mean may lie outside; where the looks have nothing in common (2 in 1,000 studies)
    the ends are nan. Before FIRST finished pairs it is `interval`.
    """
    d = np.asarray(d, float)[:N]
    d = d[np.isfinite(d)]
    mean, low, high = interval(d, N, level, test)
    for n in range(test.first, len(d)):
        _, below, above = interval(d[:n], N, level, test)
        low, high = max(low, below), min(high, above)
    return (mean, low, high) if low <= high else (mean, np.nan, np.nan)


def inside_from(d, N: int = PAIRS, level: float = ALPHA, test: Test = PLAIN) -> float:
    """Least margin with which a look so far would have found no effect at `level`: min over looks of |mean| + h.

    h half-width of the interval of level 2 `level`, as two one-sided tests have it. inf before the first look, and
    where a run diverged.
    """
    d = np.asarray(d, float)[:N]
    if not np.isfinite(d).all():
        return inf
    ends = [interval(d[:n], N, 2 * level, test)[1:] for n in range(test.first, len(d) + 1)]
    return min((max(-low, high) for low, high in ends), default=inf)


def paired_interval(d, level: float = ALPHA) -> tuple[float, float, float]:
    """(mean, low, high) for a number of pairs fixed before: mean +- t(1 - level/2, n - 1) s / sqrt(n)."""
    from scipy.special import stdtrit

    d = _differences(d)
    refuse_unusable(d)
    mean, se = map(float, mean_and_error(d))
    half = -float(stdtrit(len(d) - 1, level / 2)) * se
    return mean, mean - half, mean + half


def critical(n: int, N: int, level: float = ALPHA, test: Test = PLAIN) -> float:
    """t(1 - a/2, n - 1) with a = nominal(level, N): what |t| must reach at a look after n pairs."""
    from scipy.special import stdtrit

    return -float(stdtrit(n - 1 + test.freedom, nominal(level, N, test) / 2))


def rank_pairs(N: int, level: float = ALPHA) -> int:
    """Fewest pairs with which the signed rank, whose least p is 2^(1-n), reaches the nominal level (8 at N = 20)."""
    a, n = nominal(level, N), 1
    while 2.0 ** (1 - n) > a:
        n += 1
    return n


def rank_check(d, N: int = PAIRS, level: float = ALPHA, discrete: bool = False, test: Test = PLAIN) -> str:
    """Whether the signed rank finds at these looks what the t test finds: agrees, disagrees or cannot say yet."""
    d = np.asarray(d, float)[:N]
    if np.sum(~np.isnan(d) & (d != 0)) < rank_pairs(N, level):
        return "cannot say yet"
    a, looks = nominal(level, N), [d[:n] for n in range(test.first, len(d) + 1)]
    found = any(p_effect(x, discrete, test) <= nominal(level, N, test) for x in looks)
    return "agrees" if any(signed_rank(x) <= a for x in looks) == found else "disagrees"


@dataclass(frozen=True)
class Look:
    """One look, so that a reader can check the stopping: an effect is found where |statistic| >= boundary."""

    pairs: int
    test: str  # t, signed rank, or Fisher's exact test
    statistic: float  # t, the sum of signed midranks, or the runs of the control that diverged minus the treatment's
    boundary: float  # inf where the test cannot reach the level yet
    p: float  # nominal
    inside: float  # (margin - |mean|) / standard error; -inf where a run diverged
    inside_boundary: float


def looks(d, margin: float, N: int = PAIRS, level: float = ALPHA, inside_level: float | None = None,
          null: float = 0.0, discrete: bool = False, test: Test = PLAIN) -> list[Look]:  # fmt: skip
    """Every look taken, with the boundaries that belong to the Holm step `level` at which the claim was judged."""
    d = np.asarray(d, float)[:N]
    # two one-sided tests at a level are one interval of twice that level
    a, wide, out = nominal(level, N, test), 2 * (inside_level or level), []
    for n in range(test.first, len(d) + 1):
        x, inside = d[:n] - null, -inf
        p = float(p_effect(x, discrete, test))
        if not _by_rank(x, discrete):
            mean, se = mean_and_error(x, test)
            name, statistic, boundary = "t", (mean / se if se else 0.0), critical(n, N, level, test)
            if test.corrected and p > a >= t_tail(mean, se, n - 1):
                boundary = inf  # the corrected t does not reach the level
            if se and null >= 0:
                inside = (margin - abs(mean_and_error(d[:n])[0])) / se
            if test.corrected and p_inside(d[:n], margin, test) > nominal(wide, N, test):
                inside = min(inside, 0.0)
        elif fisher(x) < signed_rank(x):
            lost = [int((np.isnan(x) | (x == end)).sum()) for end in (inf, -inf)]
            name, statistic = "Fisher's exact test", float(lost[0] - lost[1])
            boundary = _fisher_boundary(n, min(lost), a)
        else:
            ranks = doubled_ranks(x)
            name, statistic, boundary = "signed rank", (np.sign(np.nan_to_num(x)) * ranks).sum() / 2, inf
            reached = np.flatnonzero(2 * _rank_law(tuple(np.sort(ranks[ranks > 0]))) <= a)
            if len(reached):
                boundary = ranks.sum() / 2 - reached[-1]
        out.append(Look(n, name, float(statistic), float(boundary), p, float(inside), critical(n, N, wide, test)))
    return out


def _fisher_boundary(n: int, fewer: int, a: float) -> float:
    """The difference in diverged runs with which Fisher's test reaches the level a, `fewer` of an arm's n diverged."""
    for more in range(fewer, n + 1):
        both = np.full(n, 0.0)
        both[:fewer] = np.nan
        both[fewer:more] = inf
        if fisher(both) <= a:
            return float(more - fewer)
    return inf


def refuse_unusable(d) -> None:
    """Refuse, each with its sentence, differences that no test of a random measure can use."""
    d = np.asarray(d, float)
    if len(d) < 2:
        raise ValueError(f"An interval over seeds needs at least 2 pairs, got {len(d)}.")
    if np.isnan(d).all():
        raise ValueError("Every difference is NaN: both arms diverged, or lack the measure, on every seed.")
    if not np.isfinite(d).all():
        raise ValueError(
            "A pair with a diverged run has no finite difference: use the signed rank or the finished pairs."
        )
    if not mean_and_error(d)[1]:
        raise ValueError(f"All {len(d)} differences equal {d[0]:g}: not a random measure; compare it exactly.")


def _check_pairs(N: int) -> None:
    if not FIRST <= N <= MOST_PAIRS or N != int(N):
        raise ValueError(f"A claim names at most N pairs with N a whole number from {FIRST} to {MOST_PAIRS}, got {N}.")


def _differences(d) -> np.ndarray:
    d = np.asarray(d, float)
    if d.ndim == 0 or d.shape[-1] < 2:
        raise ValueError(f"A paired test needs at least 2 differences, got {d.shape[-1] if d.ndim else 1}.")
    return d


def _by_rank(d: np.ndarray, discrete: bool) -> np.ndarray:
    """Whether the signed rank judges these differences: a run diverged, or discrete ones are all equal."""
    finite = np.isfinite(d).all(-1)
    if not discrete:
        return ~finite
    return ~finite | (mean_and_error(np.where(finite[..., None], d, 0.0))[1] == 0)


def doubled_ranks(d: np.ndarray) -> np.ndarray:
    """Twice the midranks of |d|, whole numbers; 0 for the pairs that say nothing (zero, nan)."""
    size = np.where(np.isnan(d), 0.0, np.abs(d))
    others, own, nothing = size[..., None, :], size[..., None], (size == 0).sum(-1, keepdims=True)
    twice = (others < own).sum(-1) + (others <= own).sum(-1) + 1  # the first and the last rank of what is equal
    return np.where(size > 0, twice - 2 * nothing, 0)


@cache
def _fisher_table(n: int) -> np.ndarray:
    """p of Fisher's test by the diverged runs of either arm, of n each."""
    table = np.ones((n + 1, n + 1))
    for total in range(1, 2 * n):
        low = max(0, total - n)
        ways = np.array([comb(n, k) * comb(n, total - k) for k in range(low, min(n, total) + 1)], float)
        upper = np.cumsum(ways[::-1])[::-1] / comb(2 * n, total)  # P(an arm has k or more), which is symmetric
        for k, tail in enumerate(upper, low):
            if 2 * k >= total:
                table[k, total - k] = table[total - k, k] = min(1.0, 2 * tail)
    return table


@lru_cache(4096)
def _rank_law(doubled: tuple[int, ...]) -> np.ndarray:
    """P(sum of the doubled ranks with a + <= w), w = 0, 1, ..., under random signs."""
    ways = np.ones(1)
    for r in doubled:
        ways = np.convolve(ways, np.bincount([0, r]))
    return np.cumsum(ways) / ways.sum()
