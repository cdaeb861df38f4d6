"""Charts of records: tables in, Altair charts out, and the one look of all of them.

A chart draws what it is given and computes nothing else. One color belongs to one arm in every chart; colors that
depend on the page's background (light or dark) come from the theme: a chart names a style instead.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import TIP
from albert_ablate.config import ConfigError

# told apart with each of the common color blindnesses (Okabe and Ito 2008, without black and yellow); lighter on dark
LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7f87"]
DARK = ["#4fa8e0", "#ff8744", "#2cc79c", "#e79cc6", "#f3b73e", "#9bd4f8", "#a3a9b2"]
DASHES = [[1, 0], [6, 3], [2, 2], [9, 3, 2, 3]]  # an arm beyond the seventh has a used color with another dash
SHOWN = len(LIGHT) * len(DASHES)  # arms that a page draws at first, all of which look different; its filter has all
WIDTH, HEIGHT = 620, 280  # of a picture; on a page the width is that of its container
STEPS_OF_A_CURVE = 200
FORMATS = (".html", ".png", ".svg")
CELLS = 96  # columns of a heat map
# 0, 40k, 20M, 1.5B, whole numbers alone: an axis's own format says 0k, 1.5G and, of half a token, 500m
COUNT = "datum.value % 1 ? '' : replace(format(datum.value, '~s'), 'G', 'B')"
SIZE = "datum.value >= 100 && datum.value < 1e6 ? format(datum.value, ',.0f') : format(datum.value, '.2~g')"
SHAPES = ["circle", "square", "triangle-up", "diamond"]  # of points, as DASHES of lines
FOREST_LINEAR = 20.0  # margins: effects beyond have an axis that is linear to 1 and logarithmic from there
LOGARITHMIC = 3.0  # a quantity whose sizes span less than this factor is colored on a linear scale

MANY = 6  # arms from which on bands are faint, since they lie on each other
# of a selection: a hover finds the nearest point
NEAR: dict[str, Any] = {"on": "pointerover", "nearest": True, "empty": False, "clear": "pointerout"}

QUANTITIES = {
    "grad_norm": "Gradient norm before clipping",
    "residual_rms": "Activation RMS of the residual stream",
    "output_rms": "Activation RMS of the sublayers' outputs",
    "update_ratio": "Update ratio: change of the weights / weights",
    "entropy": "Attention entropy (nats)",
    "max_logit": "Largest attention logit",
}
LOWEST = ("entropy",)  # quantities that are bad when small: a column of several steps shows the least of them
LINEAR = ("entropy",)  # quantities whose zero is a value like any other: never on a logarithmic scale
FLAT = 0.1  # the least that a color scale spans, as a share of its end: below it noise would look like a pattern


class Arms(tuple[str, ...]):
    """The names of the arms of a page, in the order of its tables, with the color and the dash of each by number."""

    colors: tuple[int, ...]
    dashes: tuple[int, ...]

    def __new__(cls, names: Sequence[str], looks: Sequence[tuple[int, int]] | None = None) -> "Arms":
        made = super().__new__(cls, tuple(names))
        looks = looks or [(i % len(LIGHT), i // len(LIGHT) % len(DASHES)) for i in range(len(made))]
        made.colors, made.dashes = tuple(c for c, _ in looks), tuple(d for _, d in looks)
        return made

    def __reduce__(self):
        return Arms, (tuple(self), list(zip(self.colors, self.dashes, strict=True)))


def styled(names: Sequence[str], levels: pd.DataFrame) -> Arms:
    """Arms whose color is the first factor and whose dash is the second, where two factors with few enough levels tell
    all arms apart; the other way round where only that fits; else one color after the other, then the next dash.

    levels: arm x factor, the factor with most levels first.
    """
    if levels.shape[1] == 2:
        codes = [pd.factorize(levels[c].map(lambda v: json.dumps(v, default=str)))[0] for c in levels]
        for first, second in (codes, codes[::-1]):
            looks = dict(zip(levels.index, zip(first.tolist(), second.tolist(), strict=True), strict=True))
            if first.max() < len(LIGHT) and second.max() < len(DASHES) and len({*looks.values()}) == len(levels):
                return Arms(names, [looks[a] for a in names])
    return Arms(names)


def theme(dark: bool = False, arms: Sequence[str] = ()) -> dict[str, Any]:
    """The Vega configuration of all charts, for a light or a dark page, with the colors of its arms."""
    ink, soft, line, empty = (
        ("#e6e8eb", "#a3a9b2", "#3a4049", "#20252c") if dark else ("#1d2229", "#626a75", "#dfe3e8", "#eef0f3")
    )
    palette = DARK if dark else LIGHT
    words = {"labelColor": soft, "titleColor": ink, "titleFontWeight": "normal", "labelFontSize": 11}
    return {
        "background": "transparent" if dark else "#ffffff",
        "font": "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif",
        "range": {"category": palette, "ordinal": [palette[c] for c in getattr(arms, "colors", ())] or palette},
        "view": {"stroke": None},
        "axis": words | {"gridColor": line, "domainColor": line, "tickColor": line, "labelLimit": 190},
        "legend": words | {"symbolStrokeWidth": 2, "labelLimit": 330},
        "title": {
            "color": ink,
            "subtitleColor": soft,
            "anchor": "start",
            "frame": "group",
            "fontSize": 13,
            "subtitleFontSize": 11,
        },
        "text": {"color": ink},
        "style": {
            "line": {"color": palette[0]},
            "plain": {"color": palette[0]},
            "batch": {"color": "#6f7a88" if dark else "#b3bcc8"},
            "reference": {"color": soft},
            "context": {"color": "#454d58" if dark else "#d3d9e0"},
            "note": {"color": soft},
            "warning": {"color": palette[1]},
            "map": {"fill": empty},
            "inside": {"color": "#2c3440" if dark else "#e9eef4"},
        },
    }


# --- thinning --------------------------------------------------------------------------------------------------------


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


# --- parts of charts -------------------------------------------------------------------------------------------------


def arm_color(arms: Sequence[str], columns: int = 2):
    """Color by arm: the same in all charts that are given the same arms in the same order."""
    import altair as alt

    legend = _arm_legend(columns) if columns else None
    return alt.Color("arm:N", title=None, scale=alt.Scale(domain=list(arms), range="ordinal"), legend=legend)


def _arm_legend(columns: int):
    import altair as alt

    return alt.Legend(orient="bottom", columns=columns, symbolOpacity=1, symbolType="stroke", symbolSize=250)


def arm_dash(arms: Sequence[str], columns: int = 0):
    """Dash by arm; with columns its legend is that of the color, which must have as many."""
    import altair as alt

    dashes = [DASHES[d] for d in (arms if isinstance(arms, Arms) else Arms(arms)).dashes]
    scale = alt.Scale(domain=list(arms), range=dashes)
    return alt.StrokeDash("arm:N", title=None, scale=scale, legend=_arm_legend(columns) if columns else None)


def filtered(chart, arms: Sequence[str]):
    """The chart with the page's filter: the parameter `arms` lists those that are drawn."""
    import altair as alt

    shown = "indexof(arms, datum.arm) >= 0"
    if isinstance(chart, alt.LayerChart) and chart.data is alt.Undefined:
        chart = chart.copy()  # a layer with data of its own does not see the transforms of the whole
        chart.layer = [own.transform_filter(shown) if "arm" in own.data else own for own in chart.layer]
    else:
        chart = chart.transform_filter(shown)
    return chart.add_params(alt.param(name="arms", value=list(arms)))


def tokens_axis(title: str = "tokens"):
    import altair as alt

    return alt.X(
        "tokens:Q",
        title=title,
        axis=alt.Axis(labelExpr=COUNT, tickCount=5, grid=False),
        scale=alt.Scale(nice=False),
    )


def _word(name: str, title: str | None = None):
    """A tooltip's text. The empty format matters: without one Vega-Lite looks for the text of the nearest point in the
    wrong place, and says undefined."""
    import altair as alt

    return alt.Tooltip(f"{name}:N", title=title or name, format="")


def _near(name: str = "near", fields: Sequence[str] | None = None):
    """What a layer of points needs so that resting anywhere in the chart gives the numbers of the nearest of them. The
    layer must be the last: marks above it take the pointer away."""
    import altair as alt

    return alt.selection_point(name=name, fields=list(fields) if fields else alt.Undefined, **NEAR)


def _tip(name: str, title: str | None = None, form: str = TIP):
    import altair as alt

    return alt.Tooltip(f"{name}:Q", title=title or name.replace("_", " "), format=form)


def _zoom():
    """Shift and wheel zoom, shift and drag move: without shift the page scrolls on."""
    import altair as alt

    return alt.selection_interval(
        bind="scales",
        zoom="wheel![event.shiftKey]",
        translate="[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
        on="[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
    )


def loss_range(values: Sequence[float] | np.ndarray, initial: float | None) -> list[float]:
    """What a loss axis spans: from the least loss to a little above the initial one, whatever a run diverged to."""
    y = np.asarray(values, float)
    y = y[np.isfinite(y)]
    if not len(y):
        return [0.0, 1.0]
    low, high = float(y.min()), float(y.max())
    if initial is not None and math.isfinite(initial):
        high = min(high, max(1.1 * initial, low * 1.05))
    pad = 0.03 * (high - low) or 0.05
    return [low - pad, high + pad]


# --- one run ---------------------------------------------------------------------------------------------------------


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
                _tip("tokens", form=","),
                _word("series", "split"),
                _tip("loss", form=".4f"),
                _tip("bits_per_byte", form=".4f"),
            ],
        )
        .add_params(_near()),
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
            tooltip=[_tip("tokens", form=","), _word("series"), _tip("norm")],
        )
        .add_params(_near("near_norm")),
    )


def _spikes(spikes: pd.DataFrame):
    import altair as alt

    return (
        alt.Chart(spikes)
        .mark_point(style="warning", shape="triangle-down", size=55, filled=True)
        .encode(
            tokens_axis(),
            y=alt.value(4),
            tooltip=[_tip("step", form=","), _word("what", "mark"), _tip("value")],
        )
    )


def line_of(table: pd.DataFrame, column: str, log: bool = False):
    """One column over tokens."""
    import altair as alt

    scale, axis = log_axis(table[column]) if log else (alt.Scale(zero=False), alt.Axis(format=TIP, tickCount=4))
    y = alt.Y(f"{column}:Q", title=None, scale=scale, axis=axis)
    tips = [_tip("tokens", form=","), _tip(column)]
    line = alt.Chart(table).mark_line(
        style="line", strokeWidth=1.5, point={"style": "plain"} if len(table) < 3 else False
    )
    points = alt.Chart(table).mark_circle(size=20, opacity=0).encode(tokens_axis(), y, tooltip=tips)
    return alt.layer(line.encode(tokens_axis(), y), points.add_params(_near(f"near_{column}")))


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
    gradient = alt.Legend(
        type="gradient",
        title=None,
        orient="right",
        gradientLength=170,
        gradientThickness=10,
        labelExpr=SIZE,
        values=round_values(low, high, log),
    )
    depth = depth or int(cells["layer"].max())
    # within the scale: a logarithm of 0 is no color, and the largest logit may even be negative
    cells = cells.assign(top=cells["layer"] + 0.5, bottom=cells["layer"] - 0.5, shade=cells["value"].clip(low, high))
    color = alt.Color("shade:Q", scale=scale, legend=gradient if legend else None)
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
    map_ = (
        alt.Chart(cells)
        .mark_rect(x2Offset=0.7, y2Offset=-0.7, clip=True)
        .encode(
            x,
            alt.X2("end"),
            y,
            alt.Y2("top"),
            color,
            tooltip=[_tip("tokens", form=","), _tip("layer", "block", "d"), _tip("value")],
        )
    )
    if ended is None:
        return map_.properties(view=alt.ViewBackground(style="map"))
    mark = pd.DataFrame({"tokens": [ended], "what": ["diverged"]})
    return alt.layer(
        map_,
        alt.Chart(mark).mark_rule(style="warning", strokeWidth=2, strokeDash=[4, 2]).encode(x="tokens:Q"),
        view=alt.ViewBackground(style="map"),
    )


def color_scale(domain: Sequence[float], quantity: str) -> tuple[float, float, bool]:
    """low, high and whether the scale between them is logarithmic."""
    low, high = domain
    log = low > 0 and high / low > LOGARITHMIC and quantity not in LINEAR
    return (0.0 if not log and 0 < low < high / 10 else low), high, log


def color_range(values: Sequence[float] | np.ndarray) -> list[float]:
    """The 1st to 98th percentile, of positive values if there are any: the last column before a divergence would take
    the colors from all others. What varies by less than a share `FLAT` is to look even."""
    v = np.asarray(values, float)
    v = v[np.isfinite(v)]
    v = v[v > 0] if (v > 0).any() else v
    if not len(v):
        return [0.0, 1.0]
    low, high = (float(q) for q in np.quantile(v, [0.01, 0.98]))
    least = FLAT * max(abs(low), abs(high))
    if high - low < least:
        return [(low + high - least) / 2, (low + high + least) / 2]
    return [low, high] if high > low else [0.0, 1.0]


def round_values(low: float, high: float, log: bool, most: int = 6) -> list[float]:
    """A few round values between the ends of a scale; on a log scale powers of ten, or 1, 2, 5 of each."""
    if not log:
        return [float(f"{v:.3g}") for v in np.linspace(low, high, 4)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    for factors in (fine, (1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        inside = [v for n in decades for f in factors if low <= (v := float(f"{f}e{n}")) <= high]
        if len(inside) <= most:
            break
    inside = inside[:: math.ceil(len(inside) / most)] if inside else []
    return inside if len(inside) > 1 else [float(f"{v:.3g}") for v in np.geomspace(low, high, 4)]


def log_axis(values: Sequence[float] | np.ndarray, grid: bool = True) -> tuple[Any, Any]:
    """Scale and axis of positive values, with few lines."""
    import altair as alt

    v = np.asarray(values, float)
    v = v[np.isfinite(v) & (v > 0)]
    low, high = (float(v.min()) / 1.15, float(v.max()) * 1.15) if len(v) else (0.1, 10.0)
    return alt.Scale(type="log", domain=[low, high], nice=False), alt.Axis(
        values=round_values(low, high, log=True),
        format=".1~e" if high / low > 1e6 else ".3~g" if high < 1e4 else ".3~s",
        grid=grid,
    )


# --- many runs -------------------------------------------------------------------------------------------------------


def loss_curves(evals: pd.DataFrame, ends: pd.DataFrame, arms: Sequence[str], unit: str, initial: float | None):
    """Every run thin, the mean of an arm's seeds thick, their range as a band; a cross where a run diverged.

    evals: arm, run, seed, tokens, loss, and per arm and tokens mean, low, high (nan: not drawn). ends: the last row of
    diverged runs. The axis ends a little above the initial loss or, where that is None, spans the runs that did not
    diverge: beside the others they would be one line.
    """
    import altair as alt

    x = tokens_axis()
    fine = evals["loss"][~evals["run"].isin(ends["run"])] if initial is None else evals["loss"]
    spanned = fine if np.isfinite(fine).any() else evals["loss"]
    scale = alt.Scale(domain=loss_range(spanned, initial), nice=False, zero=False)
    y = alt.Y("loss:Q", title=unit, scale=scale)
    color, dash = arm_color(arms), arm_dash(arms)
    tips = [_word("arm"), _tip("seed", form="d"), _tip("tokens", form=","), _tip("loss", form=".4f")]
    over = evals.drop_duplicates(["arm", "tokens"])[["arm", "tokens", "mean", "low", "high"]].dropna()
    hovered = _near("hovered", ["run"])
    layers = [
        alt.Chart(over)
        .mark_area(opacity=0.16 if len(arms) <= MANY else 0.06, clip=True)
        .encode(x, alt.Y("low:Q", title=unit, scale=scale), alt.Y2("high"), color),
        alt.Chart(evals)
        .mark_line(clip=True)
        .encode(
            x,
            y,
            color,
            dash,
            alt.Detail("run:N"),
            opacity=alt.condition(hovered, alt.value(1.0), alt.value(0.4)),
            strokeWidth=alt.condition(hovered, alt.value(2.5), alt.value(0.9)),
        ),
        alt.Chart(over)
        .mark_line(strokeWidth=2.2, clip=True)
        .encode(x, alt.Y("mean:Q", title=unit, scale=scale), color, dash),
        alt.Chart(evals)
        .mark_circle(size=60, opacity=0)
        .encode(x, y, tooltip=tips, detail="run:N")
        .add_params(hovered, _zoom()),
    ]
    if len(ends):
        top = scale.domain[1] - 0.02 * (scale.domain[1] - scale.domain[0])
        ends = ends.assign(at=ends["loss"].clip(upper=top).fillna(top))
        cross = alt.Chart(ends).mark_point(shape="cross", size=90, filled=True, angle=45, opacity=1)
        layers.append(
            cross.encode(x, alt.Y("at:Q", title=unit, scale=scale), color, tooltip=[*tips, _word("divergence")])
        )
    return filtered(alt.layer(*layers), arms)


def one_level(means: pd.DataFrame, own: pd.DataFrame, arms: Sequence[str], span: Sequence[float], unit: str):
    """One of several small charts: the mean curves of some arms in color over those of all arms in gray.

    means, own: arm, tokens, mean, of all arms and of those in color.
    """
    import altair as alt

    scale = alt.Scale(domain=list(span), nice=False, zero=False)
    y = alt.Y("mean:Q", title=unit, scale=scale, axis=alt.Axis(tickCount=4))
    tips = [_word("arm"), _tip("tokens", form=","), _tip("mean", form=".4f")]
    return alt.layer(
        alt.Chart(means)
        .mark_line(style="context", strokeWidth=1, clip=True)
        .encode(tokens_axis(), y, alt.Detail("arm:N")),
        alt.Chart(own).mark_line(strokeWidth=2, clip=True).encode(tokens_axis(), y, arm_color(arms, 0), arm_dash(arms)),
        alt.Chart(own)
        .mark_circle(size=20, opacity=0, clip=True)
        .encode(tokens_axis(), y, tooltip=tips)
        .add_params(_near()),
    ).properties(height=150)


def differences_over_tokens(table: pd.DataFrame, arms: Sequence[str], title: str):
    """The mean paired difference to the baseline over tokens, its interval as a band: where loss curves lie on each
    other these do not. table: arm, tokens, pairs, mean, low, high (nan: no band)."""
    import altair as alt

    means = table["mean"].to_numpy(float)
    late = table[table["tokens"] >= table["tokens"].max() / 2]
    ends = late[["low", "high"]].to_numpy(float)
    ends = ends[np.isfinite(ends)]
    wide = [float(q) for q in np.percentile(ends, [2, 98])] if len(ends) else [0.0, 0.0]
    reach = [min(float(np.nanmin(means)), 0.0, wide[0]), max(float(np.nanmax(means)), 0.0, wide[1])]
    pad = 0.05 * (reach[1] - reach[0]) or 0.05
    scale = alt.Scale(domain=[reach[0] - pad, reach[1] + pad], nice=False, zero=False)

    def y(column: str):
        return alt.Y(f"{column}:Q", title=title, scale=scale, axis=alt.Axis(format=TIP))

    color, dash = arm_color(arms), arm_dash(arms)
    tips = [_word("arm"), _tip("tokens", form=","), _tip("mean", "difference (%)"), _tip("low"), _tip("high")]
    tips.append(_tip("pairs", form="d"))
    chosen = _near("hovered", ["arm"])
    layers = [
        alt.Chart(pd.DataFrame({"mean": [0.0]})).mark_rule(style="reference").encode(y("mean")),
        alt.Chart(table.dropna())
        .mark_area(clip=True)
        .encode(
            tokens_axis(),
            y("low"),
            alt.Y2("high"),
            color,
            opacity=alt.condition(chosen, alt.value(0.35), alt.value(0.07)),
        ),
        alt.Chart(table).mark_line(strokeWidth=2, clip=True).encode(tokens_axis(), y("mean"), color, dash),
        alt.Chart(table)
        .mark_circle(size=20, opacity=0, clip=True)
        .encode(tokens_axis(), y("mean"), tooltip=tips)
        .add_params(chosen, _zoom()),
    ]
    return filtered(alt.layer(*layers), arms)


def batch_curves(steps: pd.DataFrame, arms: Sequence[str], initial: float | None):
    """Training loss of each batch, thinned to the extremes of its buckets. steps: arm, run, seed, tokens, loss."""
    import altair as alt

    scale = alt.Scale(domain=loss_range(steps["loss"], initial), nice=False, zero=False)
    chart = (
        alt.Chart(steps)
        .mark_line(strokeWidth=0.8, opacity=0.65, clip=True)
        .encode(
            tokens_axis(),
            alt.Y("loss:Q", title="nats per token", scale=scale),
            arm_color(arms),
            arm_dash(arms),
            alt.Detail("run:N"),
        )
    )
    tips = [_word("arm"), _tip("seed", form="d"), _tip("tokens", form=","), _tip("loss", form=".4f")]
    points = alt.Chart(steps).mark_circle(size=20, opacity=0, clip=True)
    y = alt.Y("loss:Q", title="nats per token", scale=scale)
    near = points.encode(tokens_axis(), y, tooltip=tips).add_params(_near(), _zoom())
    return filtered(alt.layer(chart, near), arms)


def forest(effects: pd.DataFrame):
    """Effects with their intervals in multiples of the margin, which is shaded: several units share one axis.

    effects: row (name), mean, low, high (in margins), text (in natural units), verdict, kind (primary or secondary).
    """
    import altair as alt

    rows = list(dict.fromkeys(effects["row"]))
    finite = effects[["mean", "low", "high"]].to_numpy(float)
    reach = max(2.0, 1.1 * float(np.abs(finite[np.isfinite(finite)]).max(initial=0.0)))
    effects = effects.assign(low=effects["low"].clip(-2 * reach), high=effects["high"].clip(upper=2 * reach))
    if reach > FOREST_LINEAR:
        powers = [10.0**k for k in range(int(math.log10(reach)) + 1)]
        scale = alt.Scale(type="symlog", constant=1, domain=[-reach, reach], nice=False)
        axis = alt.Axis(values=[*(-v for v in powers), 0, *powers], format="~s", grid=False, labelOverlap=True)
    else:
        scale, axis = alt.Scale(domain=[-reach, reach], nice=False), alt.Axis(tickCount=5, grid=False)
    x = alt.X("mean:Q", title="effect / margin", scale=scale, axis=axis)
    y = alt.Y("row:N", title=None, sort=rows, axis=None, scale=alt.Scale(paddingOuter=0.3))
    margin = pd.DataFrame({"from": [-1.0], "to": [1.0], "zero": [0.0]})
    tips = [_word("row"), _word("text", "effect"), _word("verdict"), _word("kind")]
    words: dict[str, Any] = {"align": "left", "limit": alt.ExprRef("width - 8"), "dx": 4}
    layers = [
        alt.Chart(margin).mark_rect(style="inside").encode(x="from:Q", x2="to:Q"),
        alt.Chart(margin).mark_rule(style="reference").encode(x="zero:Q"),
        alt.Chart(effects).mark_rule(style="line", strokeWidth=2, clip=True).encode(alt.X("low:Q"), alt.X2("high"), y),
        *(
            alt.Chart(own)
            .mark_point(style="plain", size=70, clip=True, filled=kind == "primary", opacity=1)
            .encode(x, y, tooltip=tips)
            for kind, own in effects.groupby("kind")
        ),
        # the name stands above its line, not beside the axis: it is as long as the page is wide
        alt.Chart(effects).mark_text(dy=-24, fontSize=11, **words).encode(x=alt.value(0), y=y, text="row:N"),
        alt.Chart(effects)
        .mark_text(style="note", dy=-11, fontSize=10, **words)
        .encode(x=alt.value(0), y=y, text="text:N"),
    ]
    return alt.layer(*layers).properties(height=max(90, 56 * len(rows)))


def sensitivity(
    points: pd.DataFrame,
    means: pd.DataFrame,
    arms: Sequence[str],
    initial: float | None,
    title: str = "validation loss at the end (nats per token)",
    filters: bool = True,
    chosen: pd.DataFrame | None = None,
):
    """Final loss over the learning rate, each run and the mean, diverged runs as crosses at the top.

    points: arm, rate, loss, diverged (loss: the axis's top), seed. means: arm, rate, mean. filters: whether the arms
    are those of the page's filter; others have a legend of their own. chosen: arm, rate, mean, best (mean less the
    slack) of the tuned rates: a ring, and below it how much better the optimum is expected to be.
    """
    import altair as alt

    span = loss_range(points.loc[~points["diverged"], "loss"], initial)
    rates = sorted({*points["rate"]})
    x = alt.X(
        "rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", domain=[rates[0] / 1.3, rates[-1] * 1.3], nice=False),
        axis=alt.Axis(values=rates, format=".3~g", grid=False, labelOverlap=True),
    )
    scale = alt.Scale(domain=[span[0], span[1] + 0.06 * (span[1] - span[0])], nice=False, zero=False)
    y = alt.Y("loss:Q", title=title, scale=scale)
    color, dash = (arm_color(arms), arm_dash(arms)) if filters else (arm_color(arms, 1), arm_dash(arms, 1))
    tips = [_word("arm"), _tip("rate", "learning rate"), _tip("loss", form=".4f"), _tip("seed", form="d")]
    lost = points[points["diverged"]].drop(columns="loss")
    layers = [
        alt.Chart(means)
        .mark_line(strokeWidth=2, clip=True)
        .encode(x, alt.Y("mean:Q", title=title, scale=scale), color, dash),
        alt.Chart(points[~points["diverged"]])
        .mark_circle(size=34, opacity=0.8, clip=True)
        .encode(x, y, color, tooltip=tips)
        .add_params(_near()),
        alt.Chart(lost)
        .mark_point(shape="cross", angle=45, size=70, filled=True)
        .encode(
            x,
            color,
            y=alt.value(5),
            tooltip=[_word("arm"), _tip("rate", "learning rate"), _tip("seed", form="d"), _word("outcome")],
        ),
    ]
    if chosen is not None and len(chosen):
        at = alt.Chart(chosen)
        ring = at.mark_point(size=170, strokeWidth=2, clip=True)
        below = at.mark_rule(strokeWidth=3, clip=True)
        layers = [
            below.encode(x, alt.Y("best:Q", title=title, scale=scale), alt.Y2("mean"), color),
            ring.encode(x, alt.Y("mean:Q", title=title, scale=scale), color),
            *layers,
        ]
    chart = alt.layer(*layers)
    return filtered(chart, arms) if filters else chart


def strip(
    values: pd.DataFrame,
    means: pd.DataFrame,
    arms: Sequence[str],
    title: str,
    zero: bool = False,
    order: Sequence[str] = (),
):
    """A dot a run and the mean as a bar. values: arm, seed, value. means: arm, mean, low, high (nan: no interval).

    order: the arms from top to bottom, that of `arms` where it is not given. The axis spans the runs and, of the
    intervals, at most as much on each side: two seeds have an interval of thirteen standard errors. zero: a line there.
    """
    import altair as alt

    color = arm_color(arms, columns=0)  # each is named
    finite = values["value"].to_numpy(float)
    low, high = float(np.min(finite)), float(np.max(finite))
    room = (high - low) or abs(high) * 0.05 or 1.0
    ends = means[["low", "high"]].to_numpy(float)
    known = ends[np.isfinite(ends)]
    span = [min(low, max(low - room, known.min(initial=low))), max(high, min(high + room, known.max(initial=high)))]
    if zero:
        span = [min(span[0], 0.0), max(span[1], 0.0)]
    pad = 0.03 * (span[1] - span[0])
    scale = alt.Scale(zero=False, domain=[span[0] - pad, span[1] + pad], nice=False)
    y = alt.Y("arm:N", title=None, sort=list(order or arms), axis=None, scale=alt.Scale(paddingOuter=0.3))
    axis = alt.Axis(format=TIP, tickCount=5, labelOverlap=True)
    x = alt.X("value:Q", title=title, scale=scale, axis=axis)
    none = pd.DataFrame({"value": [0.0]})
    whole = means.dropna().assign(
        low=lambda t: t["low"].clip(*scale.domain), high=lambda t: t["high"].clip(*scale.domain)
    )
    tips = [_word("arm"), _tip("seed", form="d"), _tip("value"), _tip("mean"), _tip("low"), _tip("high")]
    layers = [
        *([alt.Chart(none).mark_rule(style="reference").encode(x)] if zero else []),
        # names above their line are as long as the page is wide
        alt.Chart(means)
        .mark_text(align="left", dx=4, dy=-13, fontSize=10, limit=alt.ExprRef("width - 8"), style="note")
        .encode(x=alt.value(0), y=y, text="arm:N"),
        alt.Chart(whole)
        .mark_rule(strokeWidth=2)
        .encode(alt.X("low:Q", title=title, scale=scale), alt.X2("high"), y, color),
        alt.Chart(means).mark_tick(thickness=3, size=16).encode(alt.X("mean:Q", title=title, scale=scale), y, color),
        alt.Chart(values.merge(means, on="arm"))
        .mark_circle(size=42, opacity=0.7)
        .encode(x, y, color, tooltip=tips)
        .add_params(_near()),
    ]
    return filtered(alt.layer(*layers).properties(height=alt.Step(32)), arms)


def train_and_validation(points: pd.DataFrame, arms: Sequence[str], initial: float | None):
    """Validation loss over training loss, both in evaluation mode: at equal training loss the lower curve generalizes.

    points: arm, run, seed, tokens, train, validation.
    """
    import altair as alt

    span = loss_range(np.r_[points["train"], points["validation"]], initial)
    scale = alt.Scale(domain=span, nice=False, zero=False)
    x = alt.X("train:Q", title="training loss (nats per token)", scale=scale, axis=alt.Axis(grid=False, tickCount=6))
    y = alt.Y("validation:Q", title="validation loss (nats per token)", scale=scale)
    equal = pd.DataFrame({"train": span, "validation": span})
    tips = [
        _word("arm"),
        _tip("seed", form="d"),
        _tip("tokens", form=","),
        _tip("train", form=".4f"),
        _tip("validation", form=".4f"),
    ]
    chart = alt.layer(
        alt.Chart(equal).mark_line(style="reference", strokeDash=[4, 3], strokeWidth=1).encode(x, y),
        alt.Chart(points)
        .mark_line(strokeWidth=1.3, clip=True)
        .encode(x, y, arm_color(arms), arm_dash(arms), alt.Detail("run:N"), alt.Order("tokens:Q")),
        alt.Chart(points)
        .mark_circle(size=18, clip=True)
        .encode(x, y, arm_color(arms), tooltip=tips)
        .add_params(_near()),
    )
    return filtered(chart, arms)


def corruption(points: pd.DataFrame, arms: Sequence[str], title: str):
    """Rise of the loss over the share of what was corrupted: each run thin, the arm's mean thick.

    points: arm, run, seed, rate, rise, mean.
    """
    import altair as alt

    x = alt.X("rate:Q", title=title, axis=alt.Axis(format="~%", grid=False, tickCount=5))
    y = alt.Y("rise:Q", title="rise of the loss (nats per token)")
    color, dash = arm_color(arms), arm_dash(arms)
    over = points.drop_duplicates(["arm", "rate"])
    tips = [_word("arm"), _tip("seed", form="d"), _tip("rate", form=".0%"), _tip("rise", form=".4f")]
    chart = alt.layer(
        alt.Chart(points).mark_line(strokeWidth=0.8, opacity=0.5).encode(x, y, color, dash, alt.Detail("run:N")),
        alt.Chart(over)
        .mark_line(strokeWidth=2.2)
        .encode(x, alt.Y("mean:Q", title="rise of the loss (nats per token)"), color, dash),
        alt.Chart(points).mark_circle(size=22).encode(x, y, color, tooltip=tips).add_params(_near()),
    )
    return filtered(chart, arms)


def interaction(cells: pd.DataFrame, points: pd.DataFrame, one: str, other: str, title: str):
    """Two factors: parallel lines mean that they add up. Levels of the second by dash and shape; color is the arm's.

    cells: x (level of one), level (of other), mean. points: the runs, with value and seed.
    """
    import altair as alt

    levels = sorted({*cells["level"]})
    x = alt.X(
        "x:N",
        title=one,
        sort=sorted({*cells["x"]}),
        axis=alt.Axis(labelAngle=0 if cells["x"].nunique() < 5 else -35, grid=False, labelLimit=110),
        scale=alt.Scale(type="point", padding=0.4),
    )
    scale = alt.Scale(zero=False, nice=True)
    legend = alt.Legend(orient="bottom", columns=1, symbolSize=120)
    dash = alt.StrokeDash(
        "level:N",
        title=other,
        scale=alt.Scale(domain=levels, range=[DASHES[i % 4] for i in range(len(levels))]),
        legend=legend,
    )
    shape = alt.Shape("level:N", title=other, scale=alt.Scale(domain=levels), legend=legend)
    tips = [_word("x", one), _word("level", other), _tip("seed", form="d")]
    tips.append(_tip("value", "validation loss", ".4f"))
    return alt.layer(
        alt.Chart(cells)
        .mark_line(style="line", strokeWidth=2)
        .encode(x, alt.Y("mean:Q", title=title, scale=scale), dash),
        alt.Chart(points)
        .mark_point(style="plain", size=42, fillOpacity=0.25)
        .encode(x, alt.Y("value:Q", title=title, scale=scale), shape, tooltip=tips)
        .add_params(_near()),
    )


def cost(points: pd.DataFrame, means: pd.DataFrame, arms: Sequence[str], column: str, title: str, loss: str):
    """Loss at the end against what the run took: a dot a run, a larger one the mean of an arm, and the front of the
    means, which no other arm beats in both. points: arm, seed, loss, `column`. means: arm, loss, `column`."""
    import altair as alt

    tips = [_word("arm"), _tip("seed", form="d"), _tip(column), _tip("loss", form=".4f")]
    scale, axis = log_axis(points[column], grid=False)
    if points[column].max() < 2 * points[column].min():
        scale, axis = alt.Scale(zero=False, padding=12), alt.Axis(format=".4~s", tickCount=5, labelOverlap=True)
    every = arms if isinstance(arms, Arms) else Arms(arms)
    shapes = alt.Shape(
        "arm:N", scale=alt.Scale(domain=list(arms), range=[SHAPES[d] for d in every.dashes]), legend=None
    )
    x = alt.X(f"{column}:Q", title=title, scale=scale, axis=axis)
    y = alt.Y("loss:Q", title=loss, scale=alt.Scale(zero=False, padding=8))
    ordered = means.sort_values([column, "loss"])
    front = ordered[ordered["loss"] <= ordered["loss"].cummin()].drop(columns="arm")
    chart = alt.layer(
        alt.Chart(front).mark_line(style="reference", interpolate="step-after", strokeDash=[4, 3]).encode(x, y),
        alt.Chart(means).mark_point(size=130, filled=True).encode(x, y, arm_color(arms), shapes),
        alt.Chart(points)
        .mark_point(size=36, opacity=0.6, filled=True)
        .encode(x, y, arm_color(arms), shapes, tooltip=tips)
        .add_params(_near()),
    )
    return filtered(chart, arms)


def by_depth(points: pd.DataFrame, arms: Sequence[str], title: str, log: bool = True):
    """A quantity over the blocks, as initialized and at the end: each run thin, the mean of an arm's seeds thick.

    points: arm, run, seed, block, when, value.
    """
    import altair as alt

    points = points.assign(mean=points.groupby(["arm", "when", "block"])["value"].transform("mean"))
    scale, axis = log_axis(points["value"]) if log else (alt.Scale(zero=False), alt.Axis(format="~g", tickCount=5))
    depth = int(points["block"].max())
    ticks = sorted({1, *(round(depth * i / 4) for i in range(1, 5))} - {0})
    x = alt.X("block:Q", title="block", scale=alt.Scale(nice=False), axis=alt.Axis(values=ticks, grid=False))
    color, dash = arm_color(arms), arm_dash(arms)
    tips = [_word("arm"), _tip("seed", form="d"), _tip("block", form="d"), _tip("value")]
    panels = []
    for when in ("initialization", "end"):
        own = points[points["when"] == when]
        over = own.drop_duplicates(["arm", "block"])
        thin = alt.Chart(own).mark_line(strokeWidth=0.7, opacity=0.45, clip=True)
        thick = alt.Chart(over).mark_line(strokeWidth=2.2, clip=True)
        drawn = alt.layer(
            thin.encode(
                x, alt.Y("value:Q", title=title, scale=scale, axis=axis), color, dash, alt.Detail("run:N"), tooltip=tips
            ),
            thick.encode(x, alt.Y("mean:Q", title=title, scale=scale, axis=axis), color, dash),
        )
        panels.append(drawn.properties(title=when, width=WIDTH // 2 - 50, height=HEIGHT - 40))
    return alt.hconcat(*panels)


def depth_profile(points: pd.DataFrame, arms: Sequence[str], title: str, log: bool = True):
    """A quantity over the blocks at the end of training, all arms on one axis. points: arm, block, value."""
    import altair as alt

    scale, axis = log_axis(points["value"]) if log else (alt.Scale(zero=False), alt.Axis(format=TIP, tickCount=5))
    depth = int(points["block"].max())
    ticks = sorted({1, *(round(depth * i / 4) for i in range(1, 5))} - {0})
    x = alt.X("block:Q", title="block", scale=alt.Scale(nice=False), axis=alt.Axis(values=ticks, grid=False))
    y = alt.Y("value:Q", title=title, scale=scale, axis=axis)
    tips = [_word("arm"), _tip("block", form="d"), _tip("value")]
    lines = alt.Chart(points).mark_line(strokeWidth=1.8).encode(x, y, arm_color(arms), arm_dash(arms))
    dots = alt.Chart(points).mark_circle(size=22).encode(x, y, arm_color(arms), tooltip=tips).add_params(_near())
    return filtered(alt.layer(lines, dots), arms)


def pairs(points: pd.DataFrame, arms: Sequence[str], control: str):
    """A dot a seed, the arm's run over the control's, each less its arm's mean: along the dashed line pairing helps.

    points: arm, seed, control, value.
    """
    import altair as alt

    both = points[["control", "value"]].to_numpy(float)
    low, high = float(np.min(both)), float(np.max(both))
    pad = 0.06 * (high - low) or 0.05
    span = [low - pad, high + pad]
    scale = alt.Scale(domain=span, nice=False, zero=False)
    x = alt.X("control:Q", title=control, scale=scale, axis=alt.Axis(grid=False, tickCount=5))
    y = alt.Y("value:Q", title="the arm", scale=scale, axis=alt.Axis(tickCount=5))
    equal = pd.DataFrame({"control": span, "value": span})
    tips = [_word("arm"), _tip("seed", form="d"), _tip("control"), _tip("value")]
    return alt.layer(
        alt.Chart(equal).mark_line(style="reference", strokeDash=[4, 3], strokeWidth=1).encode(x, y),
        alt.Chart(points)
        .mark_circle(size=60, opacity=0.8)
        .encode(x, y, arm_color(arms), tooltip=tips)
        .add_params(_near()),
    )


def looks(steps: pd.DataFrame, arms: Sequence[str]):
    """The statistic of every look against its boundary: outside the shaded band an effect is found.

    steps: arm, pairs, statistic, boundary (infinite where the test cannot reach its level yet).
    """
    import altair as alt

    finite = steps[["statistic", "boundary"]].to_numpy(float)
    reach = 1.15 * float(np.abs(finite[np.isfinite(finite)]).max(initial=1.0))
    # linear near the boundaries, logarithmic where a large effect is far beyond them
    scale = alt.Scale(type="symlog", constant=5, domain=[-reach, reach], nice=False)
    ticks = [v for v in (-100, -30, -10, -5, 0, 5, 10, 30, 100) if abs(v) <= reach]
    y = alt.Y("statistic:Q", title="statistic", scale=scale, axis=alt.Axis(values=ticks))
    counts = sorted({*steps["pairs"]})
    x = alt.X(
        "pairs:Q", title="pairs", axis=alt.Axis(values=counts, format="d", grid=False), scale=alt.Scale(nice=False)
    )
    band = steps[np.isfinite(steps["boundary"])].assign(below=lambda s: -s["boundary"])
    tips = [_word("arm"), _tip("pairs", form="d"), _tip("statistic", form=".3f"), _tip("boundary", form=".3f")]
    layers = [
        alt.Chart(steps)
        .mark_line(point=True, strokeWidth=2)
        .encode(x, y, arm_color(arms), arm_dash(arms), tooltip=tips)
    ]
    if len(band):
        edge = alt.Chart(band.drop_duplicates("pairs")).mark_area(style="inside").encode(
            x, alt.Y("below:Q", title="statistic", scale=scale), alt.Y2("boundary")
        )  # fmt: skip
        layers.insert(0, edge)
    return alt.layer(*layers)


def looks_of_contrast(steps: pd.DataFrame, ahead: pd.DataFrame, pairs: int):
    """The statistic of each look at one contrast and its boundary, to the planned number of pairs.

    steps: pairs, statistic, p (of the looks so far). ahead: pairs, boundary, below (of all looks, where known).
    """
    import altair as alt

    inside = np.r_[steps["statistic"], ahead["boundary"].head(max(1, len(steps)) + 3)].astype(float)
    reach = 1.15 * float(np.abs(inside[np.isfinite(inside)]).max(initial=3.0))
    scale = alt.Scale(type="symlog", constant=5, domain=[-reach, reach], nice=False)
    ticks = [v for v in (-100, -30, -10, -5, 0, 5, 10, 30, 100) if abs(v) <= reach]
    x = alt.X(
        "pairs:Q",
        title="pairs",
        scale=alt.Scale(domain=[3.5, pairs + 0.5], nice=False, zero=False),
        axis=alt.Axis(tickMinStep=1, format="d", grid=False),
    )

    def y(column: str):
        return alt.Y(f"{column}:Q", title="test statistic", scale=scale, axis=alt.Axis(values=ticks, format=TIP))

    tips = [_tip("pairs", form="d"), _tip("statistic"), _tip("boundary"), _tip("p")]
    layers = [alt.Chart(pd.DataFrame({"statistic": [0.0]})).mark_rule(style="reference").encode(y("statistic"))]
    if len(ahead):
        layers.append(alt.Chart(ahead).mark_area(style="inside", clip=True).encode(x, y("below"), alt.Y2("boundary")))
    layers += [
        alt.Chart(steps).mark_line(style="line", strokeWidth=2).encode(x, y("statistic")),
        alt.Chart(steps)
        .mark_point(style="plain", filled=True, size=45, opacity=1)
        .encode(x, y("statistic"), tooltip=tips)
        .add_params(_near()),
    ]
    return alt.layer(*layers).properties(height=150)


# --- out -------------------------------------------------------------------------------------------------------------


def require() -> None:
    """One sentence where the extra is not installed."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Charts need {error.name}: pip install 'albert_ablate[plot]'.") from None


def specification(chart: Any) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """The chart as Vega-Lite, and its tables by the names that stand for them there."""
    import altair as alt

    frames: dict[str, pd.DataFrame] = {}
    names: dict[int, str] = {}

    def collect(data=None, **options):
        if data is None:
            return collect
        if id(data) not in names:
            names[id(data)] = f"table{len(names)}"
            frames[names[id(data)]] = data
        return {"name": names[id(data)]}

    alt.data_transformers.register("albert_ablate", collect)
    with alt.data_transformers.enable("albert_ablate"):
        return chart.to_dict(validate=False), frames  # validation takes half of a report's time


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON can hold them: what is not finite is null."""
    plain = frame.astype(object).where(frame.notna() & ~frame.isin([np.inf, -np.inf]), None)
    return json.loads(json.dumps(plain.to_dict("records"), default=lambda v: v.item()))


class Drawn:
    """A chart as a notebook shows and stores it: a small PNG, that needs nothing to be looked at."""

    def __init__(self, chart: Any, title: str = ""):
        import altair as alt

        if title:
            chart = chart.properties(title=alt.Title(title, offset=14))
        joined = isinstance(chart, alt.HConcatChart | alt.VConcatChart)
        self.chart = chart if joined else chart.properties(width=WIDTH - 120)

    def _repr_png_(self) -> bytes:
        return picture(self.chart, ".png", scale=1.1)


def drawn(title: str, chart: Callable[..., Any], table: pd.DataFrame, *more: Any) -> Drawn | str:
    """`chart` of the table, for a notebook; a sentence where the table is empty."""
    return f"{title}: these runs hold nothing to draw." if table.empty else Drawn(chart(table, *more), title)


def picture(chart: Any, suffix: str, scale: float = 2, arms: Sequence[str] = ()) -> bytes:
    """The chart as PNG (twice the pixels) or SVG, on white, in the colors of the page's arms."""
    import vl_convert

    spec, frames = specification(chart)
    _keep_near(spec, frames)
    if not {"hconcat", "vconcat", "concat"} & {*spec}:
        spec.setdefault("height", HEIGHT)
    spec |= {
        "datasets": {name: records(frame) for name, frame in frames.items()},
        "config": theme(arms=arms),
        "padding": 10,
    }
    if suffix == ".svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    return vl_convert.vegalite_to_png(spec, scale=scale)


def _keep_near(node: dict[str, Any], frames: dict[str, pd.DataFrame], table: str = "") -> None:
    """Move what lies more than four lengths of its axis beyond it to there, where it is cut off all the same: the
    renderer ends the process where a diverged run's loss is a line of 10^7 axis lengths."""
    table = (node.get("data") or {}).get("name", table)
    encoding = node.get("encoding") or {}
    for channel in ("x", "y"):
        coded = encoding.get(channel) or {}
        scale = coded.get("scale") or {}
        linear = coded.get("type") == "quantitative" and scale.get("type", "linear") == "linear"
        if table not in frames or not linear or not isinstance(scale.get("domain"), list):
            continue
        low, high = scale["domain"]
        for name in (channel, f"{channel}2"):
            if (field := (encoding.get(name) or {}).get("field")) in frames[table]:
                frames[table] = frames[table].copy()
                frames[table][field] = frames[table][field].clip(5 * low - 4 * high, 5 * high - 4 * low)
    for part in ("layer", "concat", "hconcat", "vconcat"):
        for child in node.get(part, ()):
            _keep_near(child, frames, table)


def writable(output: Path, suffixes: Sequence[str] = FORMATS) -> None:
    """One sentence where nothing can be written to `output`, before the work: a file, without suffixes a folder."""
    if suffixes and output.suffix not in suffixes:
        allowed = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]
        raise ConfigError(f"{output} cannot be written: its name must end in {allowed}.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output} cannot be written: there is no folder {output.parent}.")
    if output.exists() and output.is_dir() == bool(suffixes):
        raise ConfigError(f"{output} cannot be written: it is a {'folder' if suffixes else 'file'}.")
    if not os.access(output if output.is_dir() else output.absolute().parent, os.W_OK):
        raise ConfigError(f"{output} cannot be written: you may not write there.")
