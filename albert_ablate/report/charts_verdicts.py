"""Charts of judged contrasts: effects beside their margins, every look with its boundary."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import TIP
from albert_ablate.report.style import arm_color, arm_dash, nearest_point, text_tip, tip

FOREST_LINEAR = 20.0  # margins: effects beyond have an axis that is linear to 1 and logarithmic from there


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
    tips = [text_tip("row"), text_tip("text", "effect"), text_tip("verdict"), text_tip("kind")]
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
    tips = [text_tip("arm"), tip("pairs", form="d"), tip("statistic", form=".3f"), tip("boundary", form=".3f")]
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
        axis=alt.Axis(values=list(range(4, pairs + 1, max(1, pairs // 10))), format="d", grid=False),
    )
    if len(ahead) == 1:  # an area needs two points
        ahead = pd.concat([ahead.assign(pairs=ahead["pairs"] + half) for half in (-0.4, 0.4)])

    def y(column: str):
        return alt.Y(f"{column}:Q", title="test statistic", scale=scale, axis=alt.Axis(values=ticks, format=TIP))

    tips = [tip("pairs", form="d"), tip("statistic"), tip("boundary"), tip("p")]
    layers = [alt.Chart(pd.DataFrame({"statistic": [0.0]})).mark_rule(style="reference").encode(y("statistic"))]
    if len(ahead):
        layers.append(alt.Chart(ahead).mark_area(style="inside", clip=True).encode(x, y("below"), alt.Y2("boundary")))
    layers += [
        alt.Chart(steps).mark_line(style="line", strokeWidth=2).encode(x, y("statistic")),
        alt.Chart(steps)
        .mark_point(style="plain", filled=True, size=45, opacity=1)
        .encode(x, y("statistic"), tooltip=tips)
        .add_params(nearest_point()),
    ]
    return alt.layer(*layers).properties(height=150)
