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
    differences = c - t if better == "lower" else t - c
    differences = np.where(c_lost & ~t_lost, np.inf, np.where(t_lost & ~c_lost, -np.inf, differences))
    return np.where(c_lost & t_lost, np.nan, differences)


# --- intervals and descriptions --------------------------------------------------------------------------------------


def rate_interval(k: int, n: int, level: float = 0.05) -> tuple[float, float, float]:
    """(k/n, low, high), exact (Clopper & Pearson 1934); at a look give it that look's nominal level."""
    from scipy.special import betaincinv

    if not 0 <= k <= n or n < 1:
        raise ValueError(f"A rate needs at least one run and a count between 0 and their number, got {k} of {n}.")
    low = betaincinv(k, n - k + 1, level / 2) if k else 0.0
    high = betaincinv(k + 1, n - k, 1 - level / 2) if k < n else 1.0
    return k / n, float(low), float(high)


def correlation(x, y, level: float = 0.05) -> tuple[float, float, float]:
    """Pearson's r between the paired arms and its interval by Fisher's z (Fisher 1921): printed, never a gate.

    Over the seeds where both are finite; at least 4, since z has variance 1 / (n - 3).
    """
    from scipy.special import ndtri

    x, y = np.asarray(x, float), np.asarray(y, float)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 4:
        raise ValueError(f"A correlation with its interval needs at least 4 pairs that both finished, got {len(x)}.")
    if not np.ptp(x) or not np.ptp(y):
        raise ValueError("A correlation needs values that vary; one arm has the same value on every seed.")
    x, y = (_unit(v - v.mean()) for v in (x, y))
    r = np.clip(x @ y, -1.0, 1.0)
    with np.errstate(divide="ignore"):
        z, half = np.arctanh(r), ndtri(1 - level / 2) * np.sqrt(1 / (len(x) - 3))
    return float(r), float(np.tanh(z - half)), float(np.tanh(z + half))


def _unit(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max()  # squares of 1e200 would overflow
    return x / (largest * np.sqrt(np.square(x / largest).sum()))


def refuse_bootstrap(n: int) -> None:
    """Raise ValueError for fewer than 20 runs, of which a percentile bootstrap is too narrow."""
    if n < 20:
        raise ValueError(f"A percentile bootstrap over {n} runs is too narrow; it needs 20. Use the t interval.")


def interquartile_mean(values) -> float:
    """Mean of the middle half (Agarwal et al. 2021, arXiv:2108.13264); a description, diverged runs as inf."""
    values = np.asarray(values, float)
    if np.isnan(values).any() or not len(values):
        raise ValueError("An interquartile mean needs a value of every run; give a diverged run as inf, not NaN.")
    cut = len(values) // 4
    return float(np.partition(values, (cut, len(values) - cut - 1))[cut : len(values) - cut].mean())


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
    with a diverged cell has no contrast (nan).
    """
    full, base, singles = np.asarray(full, float), np.asarray(base, float), np.asarray(singles, float)
    if singles.ndim != 2 or singles.shape[0] != len(full) or len(full) != len(base):
        raise ValueError("Each seed needs all its cells: full, base and one column per single factor.")
    finite = np.isfinite(full) & np.isfinite(base) & np.isfinite(singles).all(-1)
    full, base, singles = (np.where(finite, x.T, 0.0).T for x in (full, base, singles))
    gain = (full - base) - (singles - base[:, None]).sum(-1)
    return np.where(finite, -gain if better == "lower" else gain, np.nan)


# --- learning rates, measures without noise --------------------------------------------------------------------------


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
    difference = float(signed_difference(values[:1], values[1:], better, log)[0])
    word = "no effect" if abs(difference) <= margin else "supported" if difference > 0 else "refuted"
    return Exact(float(values[0]), float(values[1]), difference, word)
