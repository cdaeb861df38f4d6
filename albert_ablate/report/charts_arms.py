"""Charts that compare arms by one number a run: strips, learning rates, cost, corruption, interactions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import TIP
from albert_ablate.report.style import (
    DASHES,
    SHAPES,
    Arms,
    arm_color,
    arm_dash,
    filtered,
    log_axis,
    loss_range,
    nearest_point,
    text_tip,
    tip,
)


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
    tips = [text_tip("arm"), tip("rate", "learning rate"), tip("loss", form=".4f"), tip("seed", form="d")]
    diverged = points[points["diverged"]].drop(columns="loss")
    layers = [
        alt.Chart(means)
        .mark_line(strokeWidth=2, clip=True)
        .encode(x, alt.Y("mean:Q", title=title, scale=scale), color, dash),
        alt.Chart(points[~points["diverged"]])
        .mark_circle(size=34, opacity=0.8, clip=True)
        .encode(x, y, color, tooltip=tips)
        .add_params(nearest_point()),
        alt.Chart(diverged)
        .mark_point(shape="cross", angle=45, size=70, filled=True)
        .encode(
            x,
            color,
            y=alt.value(5),
            tooltip=[text_tip("arm"), tip("rate", "learning rate"), tip("seed", form="d"), text_tip("outcome")],
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
    finite_ends = ends[np.isfinite(ends)]
    span = [
        min(low, max(low - room, finite_ends.min(initial=low))),
        max(high, min(high + room, finite_ends.max(initial=high))),
    ]
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
    tips = [text_tip("arm"), tip("seed", form="d"), tip("value"), tip("mean"), tip("low"), tip("high")]
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
        .add_params(nearest_point()),
    ]
    return filtered(alt.layer(*layers).properties(height=alt.Step(32)), arms)


def corruption(points: pd.DataFrame, arms: Sequence[str], title: str):
    """Rise of the loss over the share of what was corrupted: each run thin, the arm's mean thick.

    points: arm, run, seed, rate, rise, mean.
    """
    import altair as alt

    x = alt.X("rate:Q", title=title, axis=alt.Axis(format="~%", grid=False, tickCount=5))
    y = alt.Y("rise:Q", title="rise of the loss (nats per token)")
    color, dash = arm_color(arms), arm_dash(arms)
    over = points.drop_duplicates(["arm", "rate"])
    tips = [text_tip("arm"), tip("seed", form="d"), tip("rate", form=".0%"), tip("rise", form=".4f")]
    chart = alt.layer(
        alt.Chart(points).mark_line(strokeWidth=0.8, opacity=0.5).encode(x, y, color, dash, alt.Detail("run:N")),
        alt.Chart(over)
        .mark_line(strokeWidth=2.2)
        .encode(x, alt.Y("mean:Q", title="rise of the loss (nats per token)"), color, dash),
        alt.Chart(points).mark_circle(size=22).encode(x, y, color, tooltip=tips).add_params(nearest_point()),
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
    tips = [text_tip("x", one), text_tip("level", other), tip("seed", form="d")]
    tips.append(tip("value", "validation loss", ".4f"))
    return alt.layer(
        alt.Chart(cells)
        .mark_line(style="line", strokeWidth=2)
        .encode(x, alt.Y("mean:Q", title=title, scale=scale), dash),
        alt.Chart(points)
        .mark_point(style="plain", size=42, fillOpacity=0.25)
        .encode(x, alt.Y("value:Q", title=title, scale=scale), shape, tooltip=tips)
        .add_params(nearest_point()),
    )


def cost(points: pd.DataFrame, means: pd.DataFrame, arms: Sequence[str], column: str, title: str, loss: str):
    """Loss at the end against what the run took: a dot a run, a larger one the mean of an arm, and the front of the
    means, which no other arm beats in both. points: arm, seed, loss, `column`. means: arm, loss, `column`."""
    import altair as alt

    tips = [text_tip("arm"), tip("seed", form="d"), tip(column), tip("loss", form=".4f")]
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
    color = arm_color(arms, symbol="circle")
    front = ordered[ordered["loss"] <= ordered["loss"].cummin()].drop(columns="arm")
    chart = alt.layer(
        alt.Chart(front).mark_line(style="reference", interpolate="step-after", strokeDash=[4, 3]).encode(x, y),
        alt.Chart(means).mark_point(size=130, filled=True).encode(x, y, color, shapes),
        alt.Chart(points)
        .mark_point(size=36, opacity=0.6, filled=True)
        .encode(x, y, color, shapes, tooltip=tips)
        .add_params(nearest_point()),
    )
    return filtered(chart, arms)


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
    tips = [text_tip("arm"), tip("seed", form="d"), tip("control"), tip("value")]
    return alt.layer(
        alt.Chart(equal).mark_line(style="reference", strokeDash=[4, 3], strokeWidth=1).encode(x, y),
        alt.Chart(points)
        .mark_circle(size=60, opacity=0.8)
        .encode(x, y, arm_color(arms, symbol="circle"), tooltip=tips)
        .add_params(nearest_point()),
    )


def difference_matrix(table: pd.DataFrame, arms: Sequence[str]):
    """The paired difference of each arm (row) to each other arm (column) in percent, bold where its interval excludes
    zero. table: arm, control, pairs, mean, low, high."""
    import altair as alt

    number = {arm: i + 1 for i, arm in enumerate(arms)}
    rows = [f"{i} {arm}" for arm, i in number.items()]
    reach = float(np.quantile(table["mean"].abs(), 0.9)) or 1.0  # a few that are far worse do not take all colors
    table = table.assign(
        row=[f"{number[a]} {a}" for a in table["arm"]],
        column=table["control"].map(number),
        text=[f"{x:+.1f}".replace("-", "−") for x in table["mean"]],
        apart=table["low"] * table["high"] > 0,
    )
    color = alt.Color(
        "mean:Q",
        scale=alt.Scale(
            domain=[-reach, 0, reach], range=["#6aaee0", "#f3f4f6", "#f2a06f"], clamp=True, interpolate="rgb"
        ),
        legend=None,
    )
    x = alt.X(
        "column:O",
        title="against arm number",
        sort=list(number.values()),
        scale=alt.Scale(domain=list(number.values())),
        axis=alt.Axis(orient="top", labelAngle=0, grid=False),
    )
    y = alt.Y("row:N", title=None, sort=rows, scale=alt.Scale(domain=rows), axis=alt.Axis(grid=False))
    tips = [text_tip("arm"), text_tip("control", "against"), tip("mean", "difference (%)"), tip("low"), tip("high")]
    cells = alt.Chart(table).mark_rect().encode(x, y, color, tooltip=[*tips, tip("pairs", form="d")])
    normal = alt.Chart(table[~table["apart"]]).mark_text(fontSize=10, color="#14181d", tooltip=None)
    bold = alt.Chart(table[table["apart"]]).mark_text(fontSize=10, color="#14181d", tooltip=None, fontWeight="bold")
    words = [marks.encode(x, y, text="text:N") for marks in (normal, bold)]
    return alt.layer(cells, *words).properties(height=alt.Step(24))
