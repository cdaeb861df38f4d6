"""The tuned learning rate and its slack; planning: what pairs can reach, and the false positives of a pool of runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np

from albert_ablate.config import ConfigError
from albert_ablate.stats.effects import refuse_bootstrap
from albert_ablate.stats.sequential import (
    ALPHA,
    FIRST,
    MOST_PAIRS,
    PAIRS,
    critical,
    nominal,
    p_effect,
    refuse_unusable,
)

TUNING_SEEDS = 3
LEAST_RATES = 5  # odd, so that a default rate lies in the middle
SHARE = 4  # the first stage runs every rate on one tuning seed with 1 / SHARE of the budget
WINDOW, MOVES = 3, 4  # rates at the full budget to begin with, and how many more a window may get
EXPECTED_MOVES = 0.9  # of two arms with as many rates each, simulated: tests/stats/test_learning_rate.py
SLACK_BOUND = 3.84  # the 95 % point of chi squared with one degree of freedom
STEPS = (2.0, sqrt(10))  # of a grid: those whose false winners were counted (STATISTICS.md, 2.4)


def log_step(step: float, key: str) -> float:
    """The step of a log grid of rates that `step` stands for: 3.16 is sqrt(10). ConfigError for any other."""
    for known in STEPS:
        if abs(step - known) <= 0.02 * known:
            return known
    raise ConfigError(f"{key}={step:g} is not allowed: a log grid has steps of 2, or of 3.16 for sqrt(10).")


@dataclass(frozen=True)
class TuningPrice:
    """Of one arm, in full budgets of a run."""

    expected: float
    worst: float


def tuning_price(rates: int, seeds: int = TUNING_SEEDS) -> TuningPrice:
    """What tuning an arm costs: rates / SHARE + (WINDOW + moves) seeds, with EXPECTED_MOVES and with MOVES moves."""
    return TuningPrice(*(rates / SHARE + (WINDOW + moves) * seeds for moves in (EXPECTED_MOVES, MOVES)))


def next_rate(means: Mapping[int, float]) -> int | None:
    """The rate to run next at the full budget, by its place in the grid: beside the best one where that is an end.

    means: mean loss over the tuning seeds by place, of neighboring places; inf where a loss is not finite. None: the
    best rate has a neighbor on either side, or the window has moved MOVES times, or no loss is finite.
    """
    best = min(means, key=lambda k: means[k])
    if len(means) >= WINDOW + MOVES or not np.isfinite(means[best]):
        return None
    return best - 1 if best == min(means) else best + 1 if best == max(means) else None


def adjacent_rate(means: Mapping[int, float]) -> int:
    """The rate that a window gets because another arm's window moved: on the side of the better one of its ends."""
    low, high = min(means), max(means)
    return low - 1 if means[low] < means[high] else high + 1


@dataclass(frozen=True)
class TunedRate:
    """The learning rate of an arm from its curve of losses, and how sure it is."""

    rate: float
    best: float  # the best rate that was run; never itself the answer unless it is the vertex or nothing was fitted
    edge: bool  # the best rate is the first or last that was run
    trains: bool  # False: every run diverged, and so will the arm's runs
    slack: float  # expected loss above the optimum, in nats; nan: unknown
    curve: list[float]  # mean loss per rate; inf where one is not finite, nan where it was not run on every tuning seed
    fitted: bool  # whether the rate is the vertex of a parabola; else it is the best one


def tuned_rate(rates: Sequence[float], losses, seeds: int = TUNING_SEEDS, diverged=None) -> TunedRate:
    """Vertex of the parabola through the best rate and its neighbors, in log rate, at most half a step away.

    losses (tuning seeds, rates) at the full budget, in nats: inf = not finite, nan = not run. diverged, of the same
    shape: runs that count as diverged; a stuck one has a finite loss, which is part of the curve. The curve is the mean
    over seeds. The grid's best point alone gives 13 to 62 % false positives, the vertex 5 to 9 %.
    With x in steps of the grid: vertex = (y- - y+) / (2 (y- - 2 y0 + y+)). Beside a neighbor whose loss is not finite
    the parabola goes through the best rate and the two on its other side, and the rate stays between the best and
    the finite neighbor. Where there are no three such points, or no bend, the rate is the best one.
    """
    grid, losses = np.asarray(rates, float), np.asarray(losses, float)
    if losses.ndim != 2 or losses.shape[1] != len(grid):
        raise ValueError(f"Losses have shape (tuning seeds, {len(grid)} rates), got {losses.shape}.")
    if len(grid) < 3 or not ((grid > 0) & np.isfinite(grid)).all() or (np.diff(grid) <= 0).any():
        raise ValueError(f"A grid has at least 3 positive rates in rising order, got {grid.tolist()}.")
    steps = np.diff(np.log(grid))
    # written to three digits, a grid of sqrt(10) has steps of 1.151 +- 0.01
    if np.ptp(steps) > 0.02 * steps.mean():
        raise ValueError(f"The parabola needs a grid with equal steps in log rate, got {grid.tolist()}.")
    ran = (~np.isnan(losses)).sum(0)
    whole = ran >= seeds
    if not whole.any():
        raise ValueError(
            f"Tuning ends with {seeds} tuning seeds at the best rates, and no rate has more than {ran.max()}."
        )
    mean = np.full(len(grid), np.nan)
    mean[whole] = np.nanmean(losses[:, whole], axis=0)
    curve, best = mean.tolist(), int(np.nanargmin(mean))
    top = float(grid[best])
    lost = ~np.isfinite(losses) if diverged is None else np.asarray(diverged, bool)
    trains = not lost[:, whole].all()
    if not np.isfinite(mean[best]):
        return TunedRate(float(grid[whole][0]), top, edge=False, trains=False, slack=np.nan, curve=curve, fitted=False)
    if best in (0, len(grid) - 1):
        return TunedRate(top, top, edge=trains, trains=trains, slack=np.nan, curve=curve, fitted=False)
    beside = [best - 1, best + 1]
    if not whole[beside].all():
        missing = grid[beside][~whole[beside]].tolist()
        raise ValueError(f"The best rate {top:g} needs its neighbors on {seeds} tuning seeds: run {missing}.")
    middle = _middle(mean, best)
    vertex = _vertex(*mean[middle - 1 : middle + 2]) if middle is not None else None
    if middle is None or vertex is None:
        return TunedRate(top, top, edge=False, trains=trains, slack=np.nan, curve=curve, fitted=False)
    at = min(max(middle + vertex, best - 0.5), best + 0.5)
    if middle != best:  # on the one finite side of the best
        at = max(at, best) if middle > best else min(at, best)
    slack = _slack(losses[:, middle - 1 : middle + 2], vertex) if at == middle + vertex else np.nan
    rate = top * float(np.exp((at - best) * steps.mean()))
    return TunedRate(rate, top, edge=False, trains=trains, slack=slack, curve=curve, fitted=True)


def tuning_slack(s: float, c: float, h: float, r: int, v: float = 0.0) -> float:
    """s^2 (1 + 12 v^2) / (8 c h^2 r): expected loss above the optimum of a vertex from three points, means of r runs.

    s spread of a run, c curvature (loss = c x^2, x the log rate), h the grid's step in x, v distance of the vertex from
    the middle point in steps. It is c times the variance of the vertex, whose derivatives by the three means give
    (h/2)^2 (2 s^2 / r) / (2 c h^2)^2 at v = 0. Over SLACK_BOUND times it lie 5 % of such losses where s is known; with
    s from three seeds (4 degrees of freedom) 12 %.
    """
    return s**2 * (1 + 12 * v**2) / (8 * c * h**2 * r)


def slack_bound(tuning: Mapping[str, Any]) -> float:
    """SLACK_BOUND times the slack of a tuned arm, in nats, from its file; nan: unknown.

    Files written before `rule` stood in them hold a slack without its factor 1 + 12 v^2.
    """
    slack = tuning.get("slack")
    if slack is None or not np.isfinite(slack):
        return np.nan
    if tuning.get("rule") is None:
        means = {c["rate"]: c["mean"] for c in tuning["curve"] if c["tokens"] == tuning["tokens"]}
        means = {rate: mean for rate, mean in means.items() if mean is not None}
        best = min(means, key=lambda rate: means[rate]) if means else tuning["rate"]
        slack *= 1 + 12 * (np.log(tuning["rate"] / best) / np.log(tuning.get("step", STEPS[0]))) ** 2
    return SLACK_BOUND * float(slack)


def pairs_to_margin(
    differences, margin: float, level: float = ALPHA, coverage: float = 0.8
) -> tuple[float, float, float]:
    """Pairs at which the half-width reaches the margin, and their range, from s and its 80 % interval (chi squared).

    Not "seeds needed" from the observed effect, which is off by orders of magnitude. A claim of n pairs is one named
    with N = n; beyond 60, where the level formula ends, with the level of N = 60.
    """
    differences = np.asarray(differences, float)
    differences = differences[np.isfinite(differences)]
    refuse_unusable(differences)
    if not margin > 0:
        raise ValueError(f"A half-width reaches only a positive margin, got {margin:g}.")
    s, low, high = spread(differences, 1 - coverage)
    return _pairs(margin / s, level), _pairs(margin / low, level), _pairs(margin / high, level)


def pairs_missing(differences, distance: float, N: int, level: float = ALPHA,
                  coverage: float = 0.8) -> tuple[int, float, float] | None:  # fmt: skip
    """Pairs at which the half-width is down to `distance` if mean and spread stay as they are, and their range.

    distance: of the mean from what it is to be told from. Up to N at the claim's own level, beyond N for a new claim
    that names so many. None where it is down to that already: no pair is missing for this.
    """
    differences = np.asarray(differences, float)
    if critical(len(differences), N, level) * differences.std(ddof=1) / sqrt(len(differences)) <= distance:
        return None

    def total(s: float) -> float:
        within = (n for n in range(len(differences) + 1, N + 1) if critical(n, N, level) * s / sqrt(n) <= distance)
        return next(within, None) or max(N + 1, _pairs(distance / s, level))

    n, low, high = map(total, spread(differences, 1 - coverage))
    return n, low, high  # type: ignore[return-value]


def spread(values, level: float = 0.05) -> tuple[float, float, float]:
    """Standard deviation over seeds with its chi-squared interval: s sqrt((n - 1) / chi2)."""
    from scipy.special import gammaincinv

    values = np.asarray(values, float)
    refuse_unusable(values)
    n, s = len(values), float(values.std(ddof=1))
    high, low = np.sqrt((n - 1) / (2 * gammaincinv((n - 1) / 2, [level / 2, 1 - level / 2])))
    return s, s * float(low), s * float(high)


def half_width(s: float, n: int, level: float = ALPHA) -> float:
    """t(1 - a/2, n - 1) s / sqrt(n) after n pairs of a claim named with N = n (at most 60's level)."""
    from scipy.special import stdtrit

    return -float(stdtrit(n - 1, nominal(level, min(max(n, FIRST), MOST_PAIRS)) / 2)) * s / sqrt(n)


@dataclass(frozen=True)
class Reach:
    """What the paired spread of a few pairs implies for a claim, at planning time."""

    s: float
    low: float
    high: float
    half_widths: dict[int, float]
    reached: dict[int, bool]  # whether the half-width of the 90 % interval, which "no effect" needs, is in the margin


def reach(differences, margin: float, pairs: Sequence[int] = (10, 20, 40)) -> Reach:
    """Half-widths (95 %) at 10, 20, 40 pairs from the paired spread so far, and whether "no effect" is within reach.

    Reached is generous: with a margin under .75 s (N = 20) or .55 s (N = 40) "no effect" is rare.
    """
    s, low, high = spread(differences)
    return Reach(s, low, high, {n: half_width(s, n) for n in pairs},
                 {n: half_width(s, n, 2 * ALPHA) <= margin for n in pairs})  # fmt: skip


@dataclass(frozen=True)
class FalsePositives:
    """The share of random pairings of one arm's runs in which the test finds an effect."""

    rate: float
    low: float  # bootstrap over the runs: what another pool of as many runs might have shown
    high: float
    runs: int
    pairs: int
    pairings: int


def false_positive_rate(finals, rng: np.random.Generator, N: int | None = None, level: float = ALPHA,
                        pairings: int = 10_000, resamples: int = 200) -> FalsePositives:  # fmt: skip
    """Share of random pairings of one arm's K finals in which the sequential test finds an effect: about this pool.

    Each pairing splits the K runs into K // 2 pairs and looks at every one from the fourth to N. The interval is a
    bootstrap over the K runs (percentiles, hence K >= 20): what another pool of K might have shown; a run drawn twice
    may meet its copy, a difference of 0. inf or nan = diverged.
    """
    finals = np.asarray(finals, float)
    finals = np.where(np.isnan(finals), inf, finals)
    K = len(finals)
    refuse_bootstrap(K)
    N = min(K // 2, PAIRS) if N is None else N
    if N > K // 2:
        raise ValueError(f"{K} runs give at most {K // 2} pairs, not {N}.")
    if not np.isfinite(finals).any() or not np.ptp(finals[np.isfinite(finals)]):
        raise ValueError("All finals are equal or diverged: there is no random measure to pair.")
    runs = np.broadcast_to(np.arange(K), (pairings, K))
    rate = _share_found(finals, rng.permuted(runs, axis=1)[:, : 2 * N], level, N)
    size = max(1000, pairings // 10)
    drawn = []
    for _ in range(resamples):
        pool = rng.integers(K, size=K)
        order = rng.permuted(np.broadcast_to(pool, (size, K)), axis=1)
        drawn.append(_share_found(finals, order[:, : 2 * N], level, N))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return FalsePositives(rate, float(low), float(high), K, N, pairings)


def _share_found(finals: np.ndarray, order: np.ndarray, level: float, N: int) -> float:
    a, b = finals[order[:, ::2]], finals[order[:, 1::2]]
    both_diverged = np.isinf(a) & np.isinf(b)
    differences = np.where(both_diverged, np.nan, np.where(both_diverged, 0, a) - np.where(both_diverged, 0, b))
    a = nominal(level, N)
    return float(np.mean(np.any([p_effect(differences[:, :n]) <= a for n in range(FIRST, N + 1)], axis=0)))


def _middle(mean: np.ndarray, best: int) -> int | None:
    """The middle one of the three points that a parabola goes through, the best among them; None: there are no three.

    The best, or its one finite neighbor.
    """
    left, right = (bool(np.isfinite(mean[k])) for k in (best - 1, best + 1))
    if left and right:
        return best
    side = 1 if right else -1
    third = best + 2 * side
    return best + side if (left or right) and 0 <= third < len(mean) and np.isfinite(mean[third]) else None


def _vertex(left: float, middle: float, right: float) -> float | None:
    """Vertex in grid steps from the middle; None where the three points have no bend upwards."""
    bend = left - 2 * middle + right
    return float((left - right) / (2 * bend)) if bend > 0 else None


def _slack(losses: np.ndarray, vertex: float) -> float:
    """Tuning slack from three columns (seeds, 3); s is the residual after rates and seeds, since seeds are shared."""
    losses = losses[~np.isnan(losses).any(1)]
    r = len(losses)
    if r < 2:
        return np.nan
    residual = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    s = sqrt((residual**2).sum() / (2 * (r - 1)))
    left, middle, right = losses.mean(0)
    return float(tuning_slack(s, (left - 2 * middle + right) / 2, 1.0, r, vertex))


def _pairs(ratio: float, level: float) -> float:
    """Least n with half_width(1, n) <= ratio; inf beyond a million."""
    low, high = 2, 1_000_000
    if half_width(1.0, high, level) > ratio:
        return inf
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if half_width(1.0, middle, level) <= ratio else (middle + 1, high)
    return low
