"""Charts of one run: losses, gradient norms, heat maps of depth by tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import TIP
from albert_ablate.report.style import (
    COUNT,
    SIZE,
    log_axis,
    loss_range,
    nearest_point,
    round_values,
    text_tip,
    tip,
    tokens_axis,
)

LOG_SCALE_RATIO = 3.0  # a quantity whose sizes span less than this factor is colored on a linear scale
LINEAR_QUANTITIES = ("entropy",)  # quantities whose zero is a value like any other: never on a logarithmic scale
MIN_COLOR_RANGE = (
    0.1  # the least that a color scale spans, as a share of its end: below it noise would look like a pattern
)


def run_losses(
    batches: pd.DataFrame,
    evals: pd.DataFrame,
    spikes: pd.DataFrame,
    lines: pd.DataFrame,
    initial: float | None,
    unit: str = "nats per token",
):
    """Losses of each training batch and of both splits, spikes at the top, named horizontal lines (loss, what)."""
    import altair as alt

    x = tokens_axis()
    span = loss_range(np.r_[batches["loss"], evals["loss"], lines["loss"]], initial)
    y = alt.Y("loss:Q", title=unit, scale=alt.Scale(domain=span, nice=False, zero=False))
    color = alt.Color(
        "series:N",
        title=None,
        scale=alt.Scale(domain=["train", "validation"]),
        legend=alt.Legend(orient="top", offset=2),
    )
    return alt.layer(
        alt.Chart(batches).mark_line(style="batch", strokeWidth=1, clip=True).encode(x, y),
        alt.Chart(evals).mark_line(clip=True).encode(x, y, color),
        alt.Chart(lines).mark_rule(style="reference", strokeDash=[4, 3]).encode(y="loss:Q"),
        alt.Chart(lines)
        .mark_text(style="note", align="right", dx=-4, dy=-6)
        .encode(x=alt.value("width"), y="loss:Q", text="what:N"),
        _spikes(spikes),
        alt.Chart(evals)
        .mark_circle(size=34, opacity=1, clip=True)
        .encode(
            x,
            y,
            color,
            tooltip=[
                tip("tokens", form=","),
                text_tip("series", "split"),
                tip("loss", form=".4f"),
                tip("bits_per_byte", form=".4f"),
            ],
        )
        .add_params(nearest_point()),
    )


def run_norms(norms: pd.DataFrame, spikes: pd.DataFrame):
    """tokens, norm, series ("before clipping", "after clipping"), on a log scale."""
    import altair as alt

    names = ["before clipping", "after clipping"]
    scale, axis = log_axis(norms["norm"])
    return alt.layer(
        alt.Chart(norms)
        .mark_line(strokeWidth=1.2)
        .encode(
            tokens_axis(),
            alt.Y("norm:Q", title="norm", scale=scale, axis=axis),
            alt.Color(
                "series:N",
                title=None,
                scale=alt.Scale(domain=names),
                sort=names,
                legend=alt.Legend(orient="top", offset=2),
            ),
        ),
        _spikes(spikes),
        alt.Chart(norms)
        .mark_circle(size=20, opacity=0, clip=True)
        .encode(
            tokens_axis(),
            alt.Y("norm:Q", title="norm", scale=scale, axis=axis),
            tooltip=[tip("tokens", form=","), text_tip("series"), tip("norm")],
        )
        .add_params(nearest_point("near_norm")),
    )


def _spikes(spikes: pd.DataFrame):
    import altair as alt

    return (
        alt.Chart(spikes)
        .mark_point(style="warning", shape="triangle-down", size=55, filled=True)
        .encode(
            tokens_axis(),
            y=alt.value(4),
            tooltip=[tip("step", form=","), text_tip("what", "mark"), tip("value")],
        )
    )


def line_of(table: pd.DataFrame, column: str, log: bool = False):
    """One column over tokens."""
    import altair as alt

    scale, axis = log_axis(table[column]) if log else (alt.Scale(zero=False), alt.Axis(format=TIP, tickCount=4))
    y = alt.Y(f"{column}:Q", title=None, scale=scale, axis=axis)
    tips = [tip("tokens", form=","), tip(column)]
    line = alt.Chart(table).mark_line(
        style="line", strokeWidth=1.5, point={"style": "plain"} if len(table) < 3 else False
    )
    points = alt.Chart(table).mark_circle(size=20, opacity=0).encode(tokens_axis(), y, tooltip=tips)
    return alt.layer(line.encode(tokens_axis(), y), points.add_params(nearest_point(f"near_{column}")))


def heat_map(
    cells: pd.DataFrame,
    quantity: str,
    domain: Sequence[float] | None = None,
    ended: float | None = None,
    depth: int | None = None,
    until: float | None = None,
    legend: bool = True,
):
    """`depth_map` in color; nothing where a run had no finite value. legend: whether it has one of its own.

    ended: tokens at which the run diverged. depth, until: blocks and tokens that the axes span, finite or not.
    """
    import altair as alt

    low, high, log = color_scale(domain or color_range(cells["value"]), quantity)
    scale = alt.Scale(type="log" if log else "linear", domain=[low, high], scheme="viridis", nice=False)
    gradient = gradient_legend(round_values(low, high, log), SIZE)
    # within the scale: a logarithm of 0 is not a color, and the largest logit may even be negative
    cells = cells.assign(shade=cells["value"].clip(low, high))
    map_ = shaded(cells, alt.Color("shade:Q", scale=scale, legend=gradient if legend else None), depth, until)
    if ended is None:
        return map_.properties(view=alt.ViewBackground(style="map"))
    mark = pd.DataFrame({"tokens": [ended], "what": ["diverged"]})
    return alt.layer(
        map_,
        alt.Chart(mark).mark_rule(style="warning", strokeWidth=2, strokeDash=[4, 2]).encode(x="tokens:Q"),
        view=alt.ViewBackground(style="map"),
    )


def gradient_legend(values: Sequence[float], labels: str):
    """Legend of a heat map: its colors in a bar beside it. values: that are labelled; labels: Vega expression."""
    import altair as alt

    return alt.Legend(
        type="gradient",
        title=None,
        orient="right",
        gradientLength=170,
        gradientThickness=10,
        values=list(values),
        labelExpr=labels,
    )


def shaded(cells: pd.DataFrame, color: Any, depth: int | None = None, until: float | None = None):
    """Cells of blocks by tokens in a color: tokens, end, layer, value, and what `color` is of."""
    import altair as alt

    depth = depth or int(cells["layer"].max())
    cells = cells.assign(top=cells["layer"] + 0.5, bottom=cells["layer"] - 0.5)
    x = alt.X(
        "tokens:Q",
        title="tokens",
        axis=alt.Axis(labelExpr=COUNT, tickCount=4, grid=False),
        scale=alt.Scale(nice=False, zero=False),
    )
    if until is not None:
        x = x.scale(nice=False, zero=False, domain=[0, until])
    ticks = sorted({1, *(round(depth * i / 4) for i in range(1, 5))} - {0})
    y = alt.Y(
        "bottom:Q",
        title="block",
        scale=alt.Scale(domain=[0.5, depth + 0.5], nice=False, zero=False),
        axis=alt.Axis(values=ticks, format="d", grid=False),
    )
    # cells overlap a little: antialiasing leaves seams between neighbors
    return (
        alt.Chart(cells)
        .mark_rect(x2Offset=0.7, y2Offset=-0.7, clip=True)
        .encode(
            x,
            alt.X2("end"),
            y,
            alt.Y2("top"),
            color,
            tooltip=[tip("tokens", form=","), tip("layer", "block", "d"), tip("value")],
        )
    )


def color_scale(domain: Sequence[float], quantity: str) -> tuple[float, float, bool]:
    """low, high and whether the scale between them is logarithmic."""
    low, high = domain
    log = low > 0 and high / low > LOG_SCALE_RATIO and quantity not in LINEAR_QUANTITIES
    return (0.0 if not log and 0 < low < high / 10 else low), high, log


def color_range(values: Sequence[float] | np.ndarray) -> list[float]:
    """The 1st to 98th percentile, of positive values if there are any: the last column before a divergence would take
    the colors from all others. What varies by less than a share `MIN_COLOR_RANGE` is to look even."""
    v = np.asarray(values, float)
    v = v[np.isfinite(v)]
    v = v[v > 0] if (v > 0).any() else v
    if not len(v):
        return [0.0, 1.0]
    low, high = (float(q) for q in np.quantile(v, [0.01, 0.98]))
    least = MIN_COLOR_RANGE * max(abs(low), abs(high))
    if high - low < least:
        return [(low + high - least) / 2, (low + high + least) / 2]
    return [low, high] if high > low else [0.0, 1.0]
