"""The look that all charts share: one color and dash for each arm, themes, axes, tooltips."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import TIP

# told apart with each of the common color blindnesses (Okabe and Ito 2008, without black and yellow); lighter on dark
LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7f87"]


DARK = ["#4fa8e0", "#ff8744", "#2cc79c", "#e79cc6", "#f3b73e", "#9bd4f8", "#a3a9b2"]
DASHES = [[1, 0], [6, 3], [2, 2], [9, 3, 2, 3]]  # an arm beyond the seventh has a used color with another dash
SHOWN_ARMS = len(LIGHT) * len(
    DASHES
)  # arms that a page draws at first, all of which look different; its filter has all
WIDTH = 620  # of a picture; on a page the width is that of its container
HEIGHT = 280


# 0, 40k, 20M, 1.5B, whole numbers alone: an axis's own format says 0k, 1.5G and, of half a token, 500m
COUNT = "datum.value % 1 ? '' : replace(format(datum.value, '~s'), 'G', 'B')"


SIZE = "datum.value >= 100 && datum.value < 1e6 ? format(datum.value, ',.0f') : format(datum.value, '.2~g')"
SHAPES = ["circle", "square", "triangle-up", "diamond"]  # of points, as DASHES of lines


# of a selection: a hover finds the nearest point
NEAR: dict[str, Any] = {"on": "pointerover", "nearest": True, "empty": False, "clear": "pointerout"}


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
    if (
        len(levels) <= SHOWN_ARMS
    ):  # by the order of levels, not by rank: an arm's color is the same when another one leads
        first = Arms(levels.index)
        every = dict(zip(first, zip(first.colors, first.dashes, strict=True), strict=True))
        return Arms(names, [every[a] for a in names])
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
        "range": {"category": palette, "ordinal": _by_name(arms, palette) or palette},
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


def _by_name(arms: Sequence[str], palette: Sequence[str]) -> list[str]:
    """The colors of the arms, in the order of their names."""
    return [palette[color] for _, color in sorted(zip(arms, getattr(arms, "colors", ()), strict=False))]


def arm_color(arms: Sequence[str], columns: int = 2, symbol: str = "stroke"):
    """Color by arm: the same in all charts that are given the same arms in the same order. symbol: of the legend, a
    piece of line; of a chart whose arms have points alone it must be a shape, or the legend shows nothing."""
    import altair as alt

    legend = _arm_legend(arms, columns, symbol) if columns else None
    # by name, as in `theme`: the colors of a chart stay right when another arm leads
    return alt.Color("arm:N", title=None, scale=alt.Scale(domain=sorted(arms), range="ordinal"), legend=legend)


def _arm_legend(arms: Sequence[str], columns: int, symbol: str = "stroke"):
    import altair as alt

    size = 250 if symbol == "stroke" else 90
    return alt.Legend(
        orient="bottom", values=list(arms), columns=columns, symbolOpacity=1, symbolType=symbol, symbolSize=size
    )


def arm_dash(arms: Sequence[str], columns: int = 0):
    """Dash by arm; with columns its legend is that of the color, which must have as many."""
    import altair as alt

    dashes = [DASHES[d] for d in (arms if isinstance(arms, Arms) else Arms(arms)).dashes]
    scale = alt.Scale(domain=list(arms), range=dashes)
    return alt.StrokeDash("arm:N", title=None, scale=scale, legend=_arm_legend(arms, columns) if columns else None)


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
    """Altair's x axis of tokens."""
    import altair as alt

    return alt.X(
        "tokens:Q",
        title=title,
        axis=alt.Axis(labelExpr=COUNT, tickCount=5, grid=False),
        scale=alt.Scale(nice=False),
    )


def text_tip(name: str, title: str | None = None):
    """A tooltip's text. The empty format matters: without one Vega-Lite looks for the text of the nearest point in the
    wrong place, and says undefined."""
    import altair as alt

    return alt.Tooltip(f"{name}:N", title=title or name, format="")


def nearest_point(name: str = "near", fields: Sequence[str] | None = None):
    """What a layer of points needs so that resting anywhere in the chart gives the numbers of the nearest of them. The
    layer must be the last: marks above it take the pointer away."""
    import altair as alt

    return alt.selection_point(name=name, fields=list(fields) if fields else alt.Undefined, **NEAR)


def tip(name: str, title: str | None = None, form: str = TIP):
    """Tooltip of a number in a chart."""
    import altair as alt

    return alt.Tooltip(f"{name}:Q", title=title or name.replace("_", " "), format=form)


def zoom_with_shift():
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
