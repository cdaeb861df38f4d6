"""An error budget for an unbounded stream of proposals: at which level the next one is tested, and what it is told.

A proposal is judged by the sequential paired test of `verdicts` on seeds of its own, and only a false *accept* costs:
it is accepted where d is positive and its two-sided sequential p is at most twice its level. Levels are functions of
which of the earlier proposals were accepted, so that they can be computed again from a session's ledger.

Why this holds:
1. Seeds are fresh, so whatever was seen before and however the proposal was chosen, one that changes nothing is
   accepted with a chance of at most its level: its differences are symmetric about 0, and half of a two-sided error is
   in the direction of an accept.
2. `spending_level`: until the first false accept every proposal that changes nothing has a share of its own, since only
   proposals that are not accepted use one up; the shares sum to 1, so the chance of any false accept is at most alpha.
3. `lord_level` keeps the sum of levels at or below alpha times the number of accepts (1 if none), which bounds the
   expected false accepts over expected accepts, and the expected share of false accepts where proposals do not depend
   on earlier verdicts (Ramdas, Yang, Wainwright & Jordan 2017, arXiv:1710.00499).
4. Stopping early for "worse", "no effect" or "out of reach", or never coming back, only takes chances to accept away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, nan, sqrt

import numpy as np

from albert_ablate.stats.sequential import (
    ALPHA,
    FIRST,
    FUTILE,
    FUTILE_FROM,
    MOST_PAIRS,
    critical,
    doubled_ranks,
    overall,
    p_effect,
    p_inside,
    running_interval,
    sequential,
    sign,
)

FIRST_SHARE = 0.72  # an effect of one spread is then found in 12 pairs with a chance of .8, by the first proposal
DECAY = 1.6
SPENT_SHARE = 0.97  # of alpha is spent: what the judge's sequential p may be too small by
LAST_LOOK = 0.745  # chance at the last look alone that goes with about .8 over all looks
FEWEST, MOST = 12, 30
CONTROLS = ("fwer", "fdr")


@cache
def share(j: int) -> float:
    """Share of proposal j = 1, 2, ...: .72 of the budget for the first, then .28 (j - 1)^-1.6 / zeta(1.6)."""
    from scipy.special import zeta

    return FIRST_SHARE if j == 1 else (1 - FIRST_SHARE) * (j - 1) ** -DECAY / float(zeta(DECAY))


Share = Callable[[int], float]


def spending_level(accepted: Sequence[bool], alpha: float = ALPHA, share: Share = share) -> float:
    """Level of the next proposal so that the chance of any false accept, ever, is at most alpha.

    alpha share(1 + number of earlier proposals that were not accepted). It is alpha spending where nothing is accepted
    (Foster & Stine 2008); an accept gives its share on, as in the fallback procedure (Tian & Ramdas 2021,
    arXiv:1910.04900).
    """
    return alpha * share(1 + sum(not a for a in accepted))


def lord_level(
    accepted: Sequence[bool], alpha: float = ALPHA, wealth: float | None = None, share: Share = share
) -> float:
    """Level of the next proposal by LORD++, so that the false discovery rate is at most alpha.

    wealth share(t) + (alpha - wealth) share(t - t_1) + alpha sum_{k > 1} share(t - t_k), for proposal t after accepts
    at t_1 < t_2 < ...; the starting wealth is at most alpha, and alpha if not given.
    Ramdas, Yang, Wainwright & Jordan 2017, arXiv:1710.00499.
    """
    wealth = alpha if wealth is None else wealth
    if not 0 <= wealth <= alpha:
        raise ValueError(f"The starting wealth lies between 0 and alpha = {alpha:g}, got {wealth:g}.")
    t = len(accepted) + 1
    since = [t - i for i, a in enumerate(accepted, 1) if a]
    level = wealth * share(t)
    if since:
        level += (alpha - wealth) * share(since[0]) + alpha * sum(share(s) for s in since[1:])
    return level


def level_of(control: str, accepted: Sequence[bool], alpha: float = ALPHA) -> float:
    """Level of the next proposal under `control`, fwer or fdr: 3 % less than the rule allows, since the formula of the
    sequential p, `overall`, is within 3 % of the truth."""
    if control not in CONTROLS:
        raise ValueError(f"The error is controlled as one of {', '.join(CONTROLS)}, got {control!r}.")
    return SPENT_SHARE * (spending_level if control == "fwer" else lord_level)(accepted, alpha)


@cache
def pairs_for(level: float, most: int = MOST) -> int:
    """Most pairs to give a proposal: the fewest, from 12 on, in which an effect of one spread of the paired difference
    is accepted with a chance of about .8 (simulated: .81 by the first proposal, .76 by the third); at most `most`.

    At the last look P(T' > t(1 - a/2, N - 1)) >= .745, a = nominal(2 level, N), T' noncentral t with N - 1 degrees of
    freedom and noncentrality sqrt(N).
    """
    from scipy.special import nctdtr

    for N in range(min(FEWEST, most), most):
        if 1 - nctdtr(N - 1, sqrt(N), critical(N, N, 2 * level)) >= LAST_LOOK:
            return N
    return most


@dataclass(frozen=True)
class Decision:
    """What is known of a proposal after its pairs so far."""

    outcome: str  # accept, reject, no effect, undecided
    reason: str
    pairs: int
    mean: float  # over the pairs where both finished, as low and high
    low: float  # what the repeated 95 % intervals of all looks have in common
    high: float
    p: float  # one-sided sequential p of "better", right whenever sampling stops
    level: float
    statistic: float  # t of the pairs so far; nan where a run diverged
    boundary: float  # what it must reach to be accepted


def decide(d: Sequence[float], margin: float, N: int, level: float) -> Decision:
    """What is known of a proposal after the pairs in d, positive = the candidate is better, +-inf where one diverged.

    In the judge's order: no effect (the sequential 90 % interval lies inside the margin); accept (one-sided p at most
    the level); reject, for "worse" at 2.5 %, after N pairs, or from 8 on where an accept is out of reach; else
    undecided. A candidate that diverged in more pairs than the baseline is not accepted.
    """
    if not 0 < level < 0.5:
        raise ValueError(f"A level lies between 0 and .5, got {level}.")
    if not FIRST <= N <= MOST_PAIRS:
        raise ValueError(f"A proposal has from {FIRST} to {MOST_PAIRS} pairs, got {N}.")
    x = np.asarray(d, float)[:N]
    n = len(x)
    mean, low, high = running_interval(x, N)
    found = sequential(x, margin, N)
    better = float(found.effect) / 2 if found.sign > 0 else 1.0
    error = float(x.std(ddof=1)) / sqrt(n) if n > 1 and np.isfinite(x).all() else nan
    statistic = float(x.mean()) / error if error > 0 else nan
    boundary = critical(max(FIRST, n), N, 2 * level)
    lost = int(np.sum(np.sign(x[np.isinf(x)])))

    def said(word: str, reason: str) -> Decision:
        return Decision(word, reason, n, mean, low, high, better, level, statistic, boundary)

    if found.inside <= ALPHA:
        return said("no effect", "The sequential 90 % interval lies inside the margin.")
    if better <= level:
        if lost < 0:
            return said("reject", "The candidate is better by this measure, but diverged in more pairs.")
        return said("accept", f"The candidate is better: p = {better:.2g}, all looks counted; needed {level:.2g}.")
    if found.sign < 0 and found.effect <= ALPHA:
        return said("reject", "The candidate is worse.")
    if n >= N:
        return said("reject", f"All {N} pairs are in, and the candidate was not shown to be better.")
    if not within_reach(x, margin, N, level):
        return said("reject", "An accept is out of reach: with mean and spread as they are, none comes.")
    return said("undecided", "More pairs may decide.")


def within_reach(d: np.ndarray, margin: float, N: int, level):
    """Whether an accept, or "no effect", may still come by N pairs if all goes on as it did. Non-binding.

    z sqrt(N / n) >= .6 t(1 - a/2, N - 1), z the t of the n pairs, or their standardized signed-rank sum where a run
    diverged; or the margin minus the mean is that far from 0. Asked from FUTILE_FROM pairs on, along the last axis.
    """
    d = np.asarray(d, float)
    n = d.shape[-1]
    if n < FUTILE_FROM:
        return np.ones(d.shape[:-1], bool)[()]
    finite = np.isfinite(d).all(-1)
    x = np.where(finite[..., None], d, 0.0)
    mean, error = x.mean(-1), x.std(-1, ddof=1) / sqrt(n)
    z, size = mean * sqrt(N / n), np.array(error)
    if not finite.all():
        ranks = signed_ranks(d[~finite])
        z = np.array(z)
        z[~finite], size[~finite] = ranks.sum(-1) * sqrt(N / n), np.sqrt((ranks**2).sum(-1))
    accept = z >= FUTILE * size * _criticals(N, level)
    nothing = finite & ((margin - np.abs(mean)) * sqrt(N / n) >= FUTILE * error * critical(N, N, 2 * ALPHA))
    return (accept | nothing)[()]


def _criticals(N: int, level) -> np.ndarray:
    values, which = np.unique(level, return_inverse=True)
    return np.array([critical(N, N, 2 * float(x)) for x in values])[which].reshape(np.shape(level))


def signed_ranks(d: np.ndarray) -> np.ndarray:
    """Midranks of |d| along the last axis with the signs of d; +-inf ranks last, zero and nan are 0."""
    d = np.asarray(d, float)
    return np.sign(np.nan_to_num(d)) * (doubled_ranks(d) / 2)


def decide_many(d: np.ndarray, margin: float, N: int, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`decide` for many proposals of N pairs at once, each stopped at its first look that decides: whether each was
    accepted, and after how many pairs it stopped. d (proposals, N), levels (proposals,)."""
    accepted, pairs = np.zeros(len(d), bool), np.full(len(d), N)
    at, level = np.arange(len(d)), np.asarray(levels, float)
    least, inside = np.ones(len(d)), np.ones(len(d))
    upward = np.zeros(len(d), bool)
    lost = np.cumsum(np.where(np.isinf(d), np.sign(d), 0.0), -1)
    for n in range(FIRST, N + 1):
        x, mine = d[at, :n], level[at]
        p, direction = p_effect(x), sign(x)
        upward[at] = np.where(p < least[at], direction > 0, upward[at])
        least[at] = np.minimum(least[at], p)
        inside[at] = np.minimum(inside[at], p_inside(x, margin))
        total = overall(least[at], N)
        nothing = overall(inside[at], N) / 2 <= ALPHA
        better = upward[at] & (total / 2 <= mine)
        stop = nothing | better | (~upward[at] & (total <= ALPHA))
        accepted[at] = better & ~nothing & (lost[at, n - 1] >= 0)
        stop |= ~within_reach(x, margin, N, mine)
        pairs[at[stop]] = n
        at = at[~stop]
        if not len(at):
            break
    return accepted, pairs


def noise_floor(d: Sequence[float], N: int) -> float:
    """Half-width of the 90 % interval after N pairs with the spread of d: no margin below it can show "no effect"."""
    x = np.asarray(d, float)
    if len(x) < 2 or not np.isfinite(x).all():
        return inf
    return float(x.std(ddof=1)) * critical(N, N, 2 * ALPHA) / sqrt(N)
