"""What is drawn of a long history: curves thinned without losing a spike, and maps of depth by tokens."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

STEPS_OF_A_CURVE = 200
CELLS = 96  # columns of a heat map


QUANTITIES = {
    "grad_norm": "Gradient norm before clipping",
    "residual_rms": "Activation RMS of the residual stream",
    "output_rms": "Activation RMS of the sublayers' outputs",
    "update_ratio": "Update ratio: change of the weights / weights",
    "entropy": "Attention entropy (nats)",
    "max_logit": "Largest attention logit",
}


LOWEST = ("entropy",)  # quantities that are bad when small: a column of several steps shows the least of them


def thinned(values: Sequence[float] | np.ndarray, points: int = STEPS_OF_A_CURVE) -> np.ndarray:
    """Which of the values to draw: the ends, and of every bucket its least and its greatest, so that no spike is lost.

    About `points` rising indices of finite values; all finite ones where there are no more.
    """
    y = np.asarray(values, float)
    at = np.flatnonzero(np.isfinite(y))
    if len(at) <= points:
        return at
    edges = np.linspace(0, len(at), max(1, (points - 2) // 2) + 1).astype(int)
    kept = [at[0], at[-1]]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part = y[at[low:high]]
        kept += [at[low + part.argmin()], at[low + part.argmax()]]
    return np.unique(kept)


def columns_of_time(steps: np.ndarray, columns: int = CELLS) -> np.ndarray:
    """The index of the heat map's column that each of the rising distinct steps falls into; at most `columns`."""
    return np.arange(len(steps)) * min(columns, len(steps)) // max(1, len(steps))


def depth_map(layers: pd.DataFrame, quantity: str, columns: int = CELLS, until: float | None = None) -> pd.DataFrame:
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
    x = layers[[c for c in ("step", "tokens", "layer", "sublayer", "weight_norm", quantity) if c in layers]]
    x = x[np.isfinite(x[quantity])]
    if x.empty:
        return empty
    keys = [x["step"], x["tokens"], x["layer"]]
    if "sublayer" not in x:
        block = x.set_index(["step", "tokens", "layer"])[quantity]
    elif quantity == "grad_norm":
        block = np.sqrt((x[quantity] ** 2).groupby(keys).sum())
    elif quantity == "update_ratio" and "weight_norm" in x:
        changed = ((x[quantity] * x["weight_norm"]) ** 2).groupby(keys).sum()
        block = np.sqrt(changed / (x["weight_norm"] ** 2).groupby(keys).sum())
    elif quantity == "residual_rms":
        block = x[quantity].groupby(keys).last()
    elif quantity.endswith("_rms"):
        block = np.sqrt((x[quantity] ** 2).groupby(keys).mean())
    else:
        block = x[quantity].groupby(keys).agg("min" if quantity in LOWEST else "max")
    block = block.rename("value").reset_index()
    times = layers[["step", "tokens"]].drop_duplicates("step").sort_values("step")
    column = columns_of_time(times["step"].to_numpy(), columns)
    starts = times["tokens"].to_numpy()[np.unique(column, return_index=True)[1]].astype(float)
    width = np.diff(starts).mean() if len(starts) > 1 else max(1.0, float(starts[0]))
    ends = np.append(starts[1:], starts[-1] + width if until is None or until <= starts[-1] else until)
    block["column"] = block["step"].map(dict(zip(times["step"], column, strict=True)))
    worst = block.groupby(["column", "layer"])["value"].agg("min" if quantity in LOWEST else "max").reset_index()
    return pd.DataFrame(
        {
            "tokens": starts[worst["column"]],
            "end": ends[worst["column"]],
            "layer": worst["layer"] + 1,
            "value": worst["value"],
        }
    )
