"""From two arms' values to one signed number per seed, and the figures printed beside a verdict.

Every two-arm measure is antisymmetric: exchanging the arms flips its sign exactly. Positive favors the treatment.
Losses of diverged runs are +-inf or nan; where that matters the function says what becomes of them.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

# --- pairs -----------------------------------------------------------------------------------------------------------


def prefix(order: Sequence[Hashable], *arms: Mapping) -> list:
    """The gapless prefix of the named seed order for which every arm has an outcome (finished or diverged).

    Order of completion would select seeds by outcome: a seed ahead of a gap waits.
    """
    if len(set(order)) < len(order):
        raise ValueError(f"The seed order names a seed twice: {list(order)}.")
    seeds = []
    for seed in order:
        if not all(seed in arm for arm in arms):
            break
        seeds.append(seed)
    return seeds


def signed_difference(treatment, control, better: Literal["lower", "higher"] = "lower", log: bool = False,
                      treatment_diverged=False, control_diverged=False) -> np.ndarray:  # fmt: skip
    """Per seed: control - treatment where lower is better, else the reverse; log: of the logarithms (a log ratio).

    -inf where only the treatment diverged, +inf where only the control did, nan where both did. A finished run without
    a finite value is a mistake and refused.
    """
    sides = []
    for name, values, lost in (("treatment", treatment, treatment_diverged), ("control", control, control_diverged)):
        x = np.asarray(values, float)
        lost = np.broadcast_to(np.asarray(lost, bool), x.shape)
        if len(bad := np.flatnonzero(~lost & ~np.isfinite(x))):
            raise ValueError(f"The {name}'s finished run {bad[0]} has no finite value of the measure: {x[bad[0]]}.")
        if log and len(bad := np.flatnonzero(~lost & (x <= 0))):
            raise ValueError(f"A log ratio needs positive values; the {name}'s run {bad[0]} has {x[bad[0]]:g}.")
        x = np.where(lost, 1.0, x)
        sides.append((np.log(x) if log else x, lost))
    (t, t_lost), (c, c_lost) = sides
    if t.shape != c.shape:
        raise ValueError(f"Pairs need one value per seed in each arm, got {t.shape[0]} and {c.shape[0]}.")
    d = c - t if better == "lower" else t - c
    d = np.where(c_lost & ~t_lost, np.inf, np.where(t_lost & ~c_lost, -np.inf, d))
    return np.where(c_lost & t_lost, np.nan, d)


# --- intervals and descriptions --------------------------------------------------------------------------------------


def rate_interval(k: int, n: int, level: float = 0.05) -> tuple[float, float, float]:
    """(k/n, low, high), exact (Clopper & Pearson 1934); at a look give it that look's nominal level."""
    from scipy.stats import binomtest

    if not 0 <= k <= n or n < 1:
        raise ValueError(f"A rate needs at least one run and a count between 0 and their number, got {k} of {n}.")
    found = binomtest(int(k), int(n)).proportion_ci(1 - level, method="exact")
    return k / n, float(found.low), float(found.high)


def correlation(x, y, level: float = 0.05) -> tuple[float, float, float]:
    """Pearson's r between the paired arms and its interval by Fisher's z (Fisher 1921): printed, never a gate.

    Over the seeds where both are finite; at least 4, since z has variance 1 / (n - 3).
    """
    from scipy.stats import pearsonr

    x, y = np.asarray(x, float), np.asarray(y, float)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 4:
        raise ValueError(f"A correlation with its interval needs at least 4 pairs that both finished, got {len(x)}.")
    if not np.ptp(x) or not np.ptp(y):
        raise ValueError("A correlation needs values that vary; one arm has the same value on every seed.")
    found = pearsonr(x, y)
    low, high = found.confidence_interval(1 - level)
    return float(found.statistic), float(low), float(high)


def benjamini_hochberg(p: Sequence[float], m: int) -> np.ndarray:
    """Adjusted p-values (Benjamini & Hochberg 1995) in a family of m; a column beside Holm, not a verdict."""
    from scipy.stats import false_discovery_control

    if m < len(p):
        raise ValueError(f"The family was named with {m} claims but {len(p)} are judged.")
    return false_discovery_control(np.r_[np.asarray(p, float), np.ones(m - len(p))])[: len(p)]


def percentile_bootstrap(values, statistic, rng: np.random.Generator, level: float = 0.05,
                         resamples: int = 2000) -> tuple[float, float, float]:  # fmt: skip
    """(estimate, low, high) over resampled runs; `statistic` maps (..., n) to (...). Refused under 20 runs.

    With 3, 5, 10 runs it rejects a true null 25, 17, 9 % of the time at a nominal 5 %.
    """
    values = np.asarray(values, float)
    refuse_bootstrap(len(values))
    drawn = statistic(values[rng.integers(len(values), size=(resamples, len(values)))])
    low, high = np.quantile(drawn, [level / 2, 1 - level / 2])
    return float(statistic(values)), float(low), float(high)


def refuse_bootstrap(n: int) -> None:
    if n < 20:
        raise ValueError(f"A percentile bootstrap over {n} runs is too narrow; it needs 20. Use the t interval.")


def interquartile_mean(values) -> float:
    """Mean of the middle half (Agarwal et al. 2021, arXiv:2108.13264); a description, diverged runs as inf."""
    from scipy.stats import trim_mean

    values = np.asarray(values, float)
    if np.isnan(values).any() or not len(values):
        raise ValueError("An interquartile mean needs a value of every run; give a diverged run as inf, not NaN.")
    return float(trim_mean(values, 0.25))


def probability_of_improvement(treatment, control, better: Literal["lower", "higher"] = "lower") -> float:
    """P(treatment better) + P(equal) / 2 over all pairs of runs (arXiv:2108.13264): Mann-Whitney U / (n m)."""
    t, c = np.asarray(treatment, float)[:, None], np.asarray(control, float)[None, :]
    if np.isnan(t).any() or np.isnan(c).any() or not t.size or not c.size:
        raise ValueError("Every run needs a value; give a diverged run as the worst, +-inf, not NaN.")
    wins, ties = (t < c if better == "lower" else t > c).sum(), (t == c).sum()
    return float((2 * wins + ties) / (2 * t.size * c.size))


# --- factorial sweeps ------------------------------------------------------------------------------------------------


def factorial_effects(cells, names: Sequence[str]) -> dict[tuple[str, ...], np.ndarray]:
    """Main effects and two-way interactions of a 2^k factorial, one number per seed each.

    cells has shape (seeds, 2, ..., 2), index 1 = the factor is on. (a,): mean with a on minus mean with it off.
    (a, b): the effect of a with b on minus the effect of a with b off, both averaged over the other factors. A contrast
    per seed, then one-sample t: pooled least squares covers 50 % under a seed x factor interaction. A seed with a
    diverged cell has no contrast (nan).
    """
    cells = np.asarray(cells, float)
    if cells.shape[1:] != (2,) * len(names):
        raise ValueError(f"{len(names)} factors need cells of shape (seeds{', 2' * len(names)}), got {cells.shape}.")
    cells = np.where(np.isfinite(cells), cells, np.nan)
    effects = {}
    for size in (1, 2):
        for chosen in combinations(range(len(names)), size):
            x = cells
            for axis in reversed(chosen):  # the last axis first, so that the others keep their numbers
                x = np.take(x, 1, axis=axis + 1) - np.take(x, 0, axis=axis + 1)
            effects[tuple(names[i] for i in chosen)] = x.reshape(len(x), -1).mean(-1)
    return effects


def more_than_the_sum(full, base, singles, better: Literal["lower", "higher"] = "lower") -> np.ndarray:
    """Per seed, full + (k - 1) base - the k single-factor cells, signed so that positive = more than the sum.

    singles has shape (seeds, k); six cells at k = 4. On the scale of the values given (say which: nats, log). A seed
    with a diverged cell has no contrast (nan); `dead_cells` names those no seed trains, which make the verdict *mixed*.
    """
    full, base, singles = np.asarray(full, float), np.asarray(base, float), np.asarray(singles, float)
    if singles.ndim != 2 or singles.shape[0] != len(full) or len(full) != len(base):
        raise ValueError("Each seed needs all its cells: full, base and one column per single factor.")
    finite = np.isfinite(full) & np.isfinite(base) & np.isfinite(singles).all(-1)
    full, base, singles = (np.where(finite, x.T, 0.0).T for x in (full, base, singles))
    gain = (full - base) - (singles - base[:, None]).sum(-1)
    return np.where(finite, -gain if better == "lower" else gain, np.nan)


def dead_cells(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Cells in which every seed diverged (no finite value)."""
    return [name for name, x in values.items() if not np.isfinite(np.asarray(x, float)).any()]


# --- rates, depth, measures without noise ----------------------------------------------------------------------------


def rate_sensitivity(losses, initial) -> np.ndarray:
    """Learning-rate sensitivity per seed: mean over the grid of min(loss, initial loss) minus that seed's least.

    losses (seeds, rates), initial loss per seed; diverged runs (inf, nan) count as the initial loss, here by definition
    (arXiv:2309.14322). The estimand of its mean is the mean over seeds, not the sensitivity of the mean curve.
    """
    losses = np.asarray(losses, float)
    if losses.ndim != 2 or losses.shape[1] < 2:
        raise ValueError(f"Sensitivity needs losses of shape (seeds, rates) with at least 2 rates, got {losses.shape}.")
    initial = np.broadcast_to(np.asarray(initial, float), losses.shape[:1])[:, None]
    if not np.isfinite(initial).all():
        raise ValueError("Sensitivity clamps at the initial loss, which must be finite for every seed.")
    clamped = np.minimum(np.nan_to_num(losses, nan=np.inf, posinf=np.inf, neginf=np.inf), initial)
    return clamped.mean(-1) - clamped.min(-1)


def sensitivity_difference(treatment, control, initial_treatment, initial_control) -> np.ndarray:
    """Control's minus treatment's sensitivity per seed: positive where the treatment is the less sensitive."""
    return rate_sensitivity(control, initial_control) - rate_sensitivity(treatment, initial_treatment)


def diverging_share(diverged) -> np.ndarray:
    """Share of the rate grid that diverges, per seed; diverged has shape (seeds, rates)."""
    diverged = np.asarray(diverged, bool)
    if diverged.ndim != 2 or not diverged.shape[1]:
        raise ValueError(f"The share that diverges needs outcomes of shape (seeds, rates), got {diverged.shape}.")
    return diverged.mean(-1)


def decision_accuracy(shallow, deep) -> float:
    """Share of pairs of arms that the shallow and the deep models put in the same order (arXiv:2504.11393).

    One value per arm (inf = diverged, the worst); a pair tied at one depth only counts half, one tied at both whole.
    """
    shallow, deep = np.asarray(shallow, float), np.asarray(deep, float)
    if shallow.shape != deep.shape or len(shallow) < 2:
        raise ValueError(f"Two depths need the same two arms or more, got {shallow.shape} and {deep.shape}.")
    if np.isnan(shallow).any() or np.isnan(deep).any():
        raise ValueError("Every arm needs a value at both depths; give a diverged arm as inf, not NaN.")
    i, j = np.triu_indices(len(shallow), 1)
    order = [np.sign((x[i] > x[j]).astype(int) - (x[i] < x[j])) for x in (shallow, deep)]
    return float((1 - np.abs(order[0] - order[1]) / 2).mean())


def transfer(values: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """`decision_accuracy` of each depth against the deepest: does what 12 layers say hold at 96?

    values: depth -> one value per arm, the arms in the same order at every depth.
    """
    if len(values) < 2:
        raise ValueError(f"Transfer needs at least two depths, got {len(values)}.")
    deepest = max(values)
    return {depth: decision_accuracy(values[depth], values[deepest]) for depth in sorted(values) if depth < deepest}


@dataclass(frozen=True)
class Exact:
    """Two deterministic measures: no test, no n."""

    treatment: float
    control: float
    difference: float  # positive in favor of the treatment: of the logarithms, or in the unit
    verdict: str  # supported, refuted or no effect


def compare_exactly(treatment, control, margin: float, better: Literal["lower", "higher"] = "lower",
                    log: bool = True) -> Exact:  # fmt: skip
    """FLOPs or parameters, the same in every run of an arm: the difference against the margin, without a test."""
    values = []
    for name, x in (("treatment", treatment), ("control", control)):
        x = np.unique(np.asarray(x, float))
        if len(x) != 1 or not np.isfinite(x[0]):
            raise ValueError(f"A measure without noise is one finite number per arm; the {name} has {x.tolist()}.")
        values.append(x[0])
    d = signed_difference(values[:1], values[1:], better, log)[0]
    word = "no effect" if abs(d) <= margin else "supported" if d > 0 else "refuted"
    return Exact(float(values[0]), float(values[1]), float(d), word)


def block_differences(seconds, order: Literal["ABBA", "BAAB"] = "ABBA") -> np.ndarray:
    """log(seconds of A) - log(seconds of B) per interleaved block: one block, not a seed, is the unit.

    seconds has shape (blocks, 4), in the order they ran; A the control, B the treatment; positive = B is faster. A
    linear drift of the machine cancels within a block.
    """
    seconds = np.asarray(seconds, float)
    if seconds.ndim != 2 or seconds.shape[1] != 4 or order not in ("ABBA", "BAAB"):
        raise ValueError(f"Blocks of seconds have shape (blocks, 4) in the order ABBA or BAAB, got {seconds.shape}.")
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise ValueError("Seconds are positive and finite; a block with a failed timing is run again.")
    outer, inner = np.log(seconds[:, 0] + seconds[:, 3]), np.log(seconds[:, 1] + seconds[:, 2])
    return outer - inner if order == "ABBA" else inner - outer
