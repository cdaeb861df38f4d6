"""What is drawn of a long history: curves thinned without losing a spike, and maps of depth by tokens."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

STEPS_OF_A_CURVE = 200
MAX_COLUMNS = 96  # columns of a heat map


QUANTITIES = {
    "grad_norm": "Gradient norm before clipping",
    "residual_rms": "Activation RMS of the residual stream",
    "output_rms": "Activation RMS of the sublayers' outputs",
    "update_ratio": "Update ratio: change of the weights / weights",
    "entropy": "Attention entropy (nats)",
    "max_logit": "Largest attention logit",
}


LOW_IS_BAD = ("entropy",)  # quantities that are bad when small: a column of several steps shows the least of them


def thinned(values: Sequence[float] | np.ndarray, points: int = STEPS_OF_A_CURVE) -> np.ndarray:
    """Which of the values to draw: the ends, and of every bucket its least and its greatest, so that no spike is lost.

    About `points` rising indices of finite values; all finite ones where there are no more.
    """
    y = np.asarray(values, float)
    at = np.flatnonzero(np.isfinite(y))
    if len(at) <= points:
        return at
    buckets = max(1, (points - 2) // 2)
    edges = np.linspace(0, len(at), buckets + 1).astype(int)
    bucket, part = np.repeat(np.arange(buckets), np.diff(edges)), y[at]
    positions = [np.array([0, len(at) - 1])]
    for extreme in (np.minimum, np.maximum):
        extremes = np.flatnonzero(part == extreme.reduceat(part, edges[:-1])[bucket])
        positions.append(extremes[np.unique(bucket[extremes], return_index=True)[1]])  # the first of each bucket
    return at[np.unique(np.concatenate(positions))]


def columns_of_time(steps: np.ndarray, columns: int = MAX_COLUMNS) -> np.ndarray:
    """The index of the heat map's column that each of the rising distinct steps falls into; at most `columns`."""
    return np.arange(len(steps)) * min(columns, len(steps)) // max(1, len(steps))


def depth_map(
    layers: pd.DataFrame, quantity: str, columns: int = MAX_COLUMNS, until: float | None = None
) -> pd.DataFrame:
    """tokens, end, layer, value: a block's rows joined, and of several steps in a column the worst one.

    A column lasts until the next logged step, whether that has a finite value or not; the last one until the end of the
    run, `until`, where that is given.

    Of a block's sublayers: norms add by their squares, as do the changes of weights behind an update ratio; RMS is the
    root of the mean square, of the residual stream that of the last; entropy the least and a logit the largest. The
    worst is the largest, of an entropy the least. Empty where the history has no such quantity. Layers count from 1.
    """
    empty = pd.DataFrame({"tokens": [], "end": [], "layer": [], "value": []})
    if quantity not in layers or layers.empty:
        return empty
    x = layers[quantity].to_numpy(float)
    logged, first, time = np.unique(layers["step"].to_numpy(), return_index=True, return_inverse=True)
    column = columns_of_time(logged, columns)
    starts = layers["tokens"].to_numpy(float)[first][np.unique(column, return_index=True)[1]]
    fine = np.isfinite(x)
    if not fine.any():
        return empty
    x, time, layer = x[fine], time[fine], layers["layer"].to_numpy(int)[fine]
    depth = int(layer.max()) + 1
    weights = layers["weight_norm"].to_numpy(float)[fine] if "weight_norm" in layers else None
    joined = _of_blocks(x, time * depth + layer, len(logged) * depth, quantity, "sublayer" in layers, weights)
    worst = np.fmin if quantity in LOW_IS_BAD else np.fmax
    value = np.full((column[-1] + 1, depth), np.nan)
    with np.errstate(invalid="ignore"):
        worst.at(value, column, joined.reshape(len(logged), depth))
    width = np.diff(starts).mean() if len(starts) > 1 else max(1.0, float(starts[0]))
    ends = np.append(starts[1:], starts[-1] + width if until is None or until <= starts[-1] else until)
    at, block = np.nonzero(~np.isnan(value))
    return pd.DataFrame({"tokens": starts[at], "end": ends[at], "layer": block + 1, "value": value[at, block]})


def _of_blocks(
    x: np.ndarray, key: np.ndarray, size: int, quantity: str, sublayers: bool, weights: np.ndarray | None
) -> np.ndarray:
    """The values of each block's sublayers joined, by key; nan for keys without a value."""

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(key, np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf), size)

    counts = np.bincount(key, minlength=size)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if quantity == "residual_rms" or not sublayers:
            joined = np.full(size, np.nan)
            joined[key] = x  # of several the last
        elif quantity == "grad_norm":
            joined = np.sqrt(total(x**2))
        elif quantity == "update_ratio" and weights is not None:
            joined = np.sqrt(total((x * weights) ** 2) / total(weights**2))
        elif quantity.endswith("_rms"):
            joined = np.sqrt(total(x**2) / counts)
        else:
            joined = np.full(size, np.nan)
            (np.fmin if quantity in LOW_IS_BAD else np.fmax).at(joined, key, x)
    return np.where(counts > 0, joined, np.nan)
