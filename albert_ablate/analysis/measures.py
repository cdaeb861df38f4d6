"""What a run's histories say: convergence, stability, generalization. Functions of numbers, one run or one pair each.

A curve is two sequences of equal length, x rising (tokens, or FLOPs) and losses in nats per token. Measures of two arms
are antisymmetric: exchanging the arms flips the sign exactly; positive favors the treatment. Raises ValueError with one
sentence for numbers that no measure can be made of; what never happened (a loss not reached) is nan or infinite.
"""

from collections.abc import Sequence

import numpy as np

Curve = tuple[Sequence[float], Sequence[float]]
DECIDED = ("supported", "refuted", "no effect")

# --- convergence -----------------------------------------------------------------------------------------------------


def first_reached(curve: Curve, loss: float) -> float:
    """x at which the curve, straight between its points, first is at or below `loss`; inf where it never is.

    Unit: that of x.
    """
    x, y = _curve(curve)
    below = np.flatnonzero(y <= loss)
    if not len(below):
        return np.inf
    i = below[0]
    if i == 0 or y[i] == loss:
        return float(x[i])
    return float(x[i - 1] + (y[i - 1] - loss) / (y[i - 1] - y[i]) * (x[i] - x[i - 1]))


def speedup(treatment: Curve, control: Curve) -> float:
    """ln(x_control / x_treatment), x where each arm first reaches the worse of the two final losses.

    The target is symmetric: with the control's final loss as the target an arm beats its own copy in 46 % of ten-seed
    studies. Unit: log ratio; 0.69 is half the tokens.
    """
    (_, t), (_, c) = _curve(treatment), _curve(control)
    if not np.isfinite([t[-1], c[-1]]).all():
        raise ValueError("A run without a finite final loss has no speed-up: it is judged as diverged.")
    target = max(t[-1], c[-1])
    at = [first_reached(curve, target) for curve in (treatment, control)]
    if min(at) <= 0:
        raise ValueError("The worse final loss is reached before the first step: neither run has learned anything.")
    return float(np.log(at[1]) - np.log(at[0]))


def speedup_over_control(treatment: Curve, control: Curve) -> float:
    """ln(x_control / x_treatment) to the control's final loss; -inf where the treatment never reaches it.

    What papers report. It is drawn and never judged: it is not antisymmetric, and an arm beats its own copy in 46 % of
    ten-seed studies, since the target is a lucky or unlucky end of one run. Unit: log ratio; 0.69 is half the tokens.
    """
    (x, y), at = _curve(control), first_reached(treatment, float(_curve(control)[1][-1]))
    if not np.isfinite(y[-1]) or min(at, x[-1]) <= 0:
        raise ValueError("A speed-up over the control needs its finite final loss, reached after the first step.")
    return float(np.log(x[-1]) - np.log(at))


def loss_at_equal_budget(treatment: Curve, control: Curve) -> float:
    """ln(loss_control / loss_treatment) at the smaller of the two final x, straight between points.

    x is the budget that is to be equal: tokens, FLOPs or seconds. Unit: log ratio of losses.
    """
    curves = [_curve(curve) for curve in (treatment, control)]
    end = min(x[-1] for x, _ in curves)
    if end < max(x[0] for x, _ in curves):
        raise ValueError("The two curves have no x in common: there is no equal budget at which both have a loss.")
    t, c = (float(np.interp(end, x, y)) for x, y in curves)
    if not (np.isfinite([t, c]).all() and min(t, c) > 0):
        raise ValueError("A log ratio needs finite positive losses at the equal budget.")
    return float(np.log(c) - np.log(t))


def mean_loss(curve: Curve) -> float:
    """Area under the curve, by trapezoids, over the length of its x axis. Unit: that of the losses."""
    x, y = _curve(curve)
    if len(x) < 2:
        raise ValueError("An area needs a curve of at least two points.")
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


# --- stability -------------------------------------------------------------------------------------------------------


def spike_score(values: Sequence[float], window: int = 1000, deviations: float = 7.0) -> float:
    """Share of values that are `spikes`, in percent in the source; nan where there are no more than `window`.

    OLMo 2: Team OLMo 2024, 2501.00656, where 7 and 1000 are from.
    """
    if len(scores := spikes(values, window, deviations)) <= window:
        return np.nan
    return float(np.mean(scores[window:]))


def spike_window(steps: int) -> int:
    """Steps that a value is compared with in a run of so many steps: a tenth of them, at least 20, at most the 1,000 of
    the source."""
    return int(min(1000, max(20, steps // 10)))


def log_of_positive(norms: Sequence[float]) -> np.ndarray:
    """ln of gradient norms, whose noise is multiplicative; nan for what is not positive."""
    x = np.asarray(norms, float)
    return np.log(np.where(x > 0, x, np.nan))


def spikes(values: Sequence[float], window: int = 1000, deviations: float = 7.0) -> np.ndarray:
    """Whether a value lies at least `deviations` standard deviations from the mean of the `window` values before it.

    Of a loss or a gradient norm by step. The first `window` values are none. A value that is not finite is a spike, and
    stays out of the means of others.
    """
    x = np.asarray(values, float)
    if window < 2:
        raise ValueError(f"A standard deviation needs a window of at least two values, not {window}.")
    if len(x) <= window:
        return np.zeros(len(x), bool)
    finite = np.isfinite(x)
    # shifted by the median, so that sums of squares lose no digits
    shifted = np.where(finite, x - np.median(x[finite]) if finite.any() else 0.0, 0.0)
    n, total, squares = (
        np.concatenate([[0.0], np.cumsum(v)]) for v in (finite.astype(float), shifted, np.square(shifted))
    )
    n, total, squares = (v[window:-1] - v[: -window - 1] for v in (n, total, squares))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n
        deviation = np.sqrt(np.maximum(squares / n - mean**2, 0.0))
        far = np.abs(shifted[window:] - mean) >= deviations * deviation
    # where the window is constant, only what differs from it is a spike
    far &= np.abs(shifted[window:] - mean) > 1e-12 * np.maximum(1.0, np.abs(mean))
    return np.concatenate([np.zeros(window, bool), far | ~finite[window:]])


def roughness(losses: Sequence[float]) -> float:
    """Root mean square of the change of the loss from step to step: its trend adds nothing that counts.

    Unit: nats per token. nan for fewer than two steps.
    """
    y = np.asarray(losses, float)
    return float(np.sqrt(np.mean(np.square(np.diff(y))))) if len(y) > 1 else np.nan


def largest_stable_rate(rates: Sequence[float], diverged: Sequence[bool]) -> float:
    """The largest learning rate of the grid that, like all below it, did not diverge; 0 where the least one did."""
    if len(rates) != len(diverged) or not len(rates):
        raise ValueError(f"Each rate needs an outcome, got {len(rates)} rates and {len(diverged)} outcomes.")
    stable = 0.0
    for rate, has_diverged in sorted(zip(rates, diverged, strict=True)):
        if has_diverged:
            break
        stable = float(rate)
    return stable


def depth_imbalance(norms: Sequence[float]) -> float:
    """|ln(g_1 / g_M)| of gradient norms by layer: 0 where the first and the last are equal, 0.69 for twice or half."""
    g = np.asarray(norms, float)
    if len(g) < 2 or not (g[[0, -1]] > 0).all():
        raise ValueError("A ratio over depth needs at least two layers, and gradients in the first and the last.")
    return float(abs(np.log(g[0]) - np.log(g[-1])))


def growth_exponent(first: float, last: float, layers: int) -> float:
    """ln(last / first) / layers of activation or gradient sizes: 0 is ideal (OLMo 2: 2501.00656)."""
    if not (first > 0 and last > 0 and layers > 0):
        raise ValueError(f"A growth needs positive sizes and layers, got {first:g}, {last:g} and {layers}.")
    return float((np.log(last) - np.log(first)) / layers)


def entropy_floor(entropies) -> float:
    """Least attention entropy (mean over heads and positions, nats) over layers and logged steps.

    0 where every position attends to one token only: entropy collapse (Zhai et al. 2023, 2303.06296). Higher is safer.
    """
    return _extreme(entropies, np.nanmin)


def largest_logit(logits) -> float:
    """Largest attention logit over layers and logged steps: beyond about 50 softmax saturates in low precision.

    Dehghani et al. 2023, 2302.05442; Wortsman et al. 2023, 2309.14322. No unit; negative where every logit is.
    """
    return _extreme(logits, np.nanmax)


def largest_update(ratios) -> float:
    """Largest ||change of the weights by a step|| / ||weights|| over layers and logged steps; about 1e-3 is usual."""
    return _extreme(ratios, np.nanmax)


def _extreme(values, of) -> float:
    v = np.asarray(values, float)
    if not v.size or np.isnan(v).all():
        raise ValueError("The least or largest of layers needs at least one value that is not NaN.")
    return float(of(v))


def spread_over_depth(sizes) -> float:
    """Standard deviation of ln(size) over layers, averaged over logged steps; sizes (steps, layers) or (layers,).

    nan, such as of a block that dropout skipped in a step, is left out.
    """
    s = np.atleast_2d(np.asarray(sizes, float))
    s = s[~np.isnan(s).all(axis=1)]
    if not s.size or not (s[~np.isnan(s)] > 0).all():
        raise ValueError("Sizes must be positive, their logarithms are compared.")
    return float(np.nanstd(np.log(s), axis=1).mean())


# --- cost ------------------------------------------------------------------------------------------------------------


def cost_per_verdict(costs: Sequence[float], verdicts: Sequence[str]) -> float:
    """Sum of the costs of all runs, tuning included and each run once, over the number of claims that are decided.

    Unit: that of the costs (seconds, tokens, FLOPs, runs) a verdict; inf where nothing is decided.
    """
    decided = sum(word in DECIDED for word in verdicts)
    return float(np.sum(costs)) / decided if decided else np.inf


# --- generalization --------------------------------------------------------------------------------------------------


def gap_at_equal_training_loss(treatment: Curve, control: Curve) -> float:
    """Control's minus treatment's validation loss, each where its training loss first is the worse final training loss.

    A curve here is (training losses, validation losses) of successive evaluations. The gaps differ by as much, since
    the training losses are equal. Unit: nats per token.
    """
    (t, _), (c, _) = treatment, control
    target = max(t[-1], c[-1])
    at = [_crossing(np.asarray(x, float), np.asarray(y, float), target) for x, y in (treatment, control)]
    return at[1] - at[0]


def _crossing(x: np.ndarray, y: np.ndarray, target: float) -> float:
    """y where x, straight between successive points, first is at or below `target`."""
    below = np.flatnonzero(x <= target)
    if not len(x) == len(y) or not len(below) or not np.isfinite(y).all():
        raise ValueError("Training and validation losses must be finite, and one of each per evaluation.")
    i = below[0]
    if i == 0 or x[i] == target:
        return float(y[i])
    share = (x[i - 1] - target) / (x[i - 1] - x[i])
    return float(y[i - 1] + share * (y[i] - y[i - 1]))


def _curve(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(part, float) for part in curve)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"A curve needs as many x as y, at least one; got {x.size} and {y.size}.")
    if not (np.diff(x) > 0).all():
        raise ValueError("The x of a curve must rise from point to point.")
    return x, y
