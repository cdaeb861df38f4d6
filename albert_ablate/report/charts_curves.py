"""Charts of many runs over tokens or depth: loss curves, differences, batches, profiles of depth."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import TIP
from albert_ablate.report.style import (
    HEIGHT,
    WIDTH,
    arm_color,
    arm_dash,
    filtered,
    log_axis,
    loss_range,
    nearest_point,
    text_tip,
    tip,
    tokens_axis,
    zoom_with_shift,
)

FAINT_BANDS_FROM = 6  # arms from which on bands are faint, since they lie on each other


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
    tips = [text_tip("arm"), tip("seed", form="d"), tip("tokens", form=","), tip("loss", form=".4f")]
    over = evals.drop_duplicates(["arm", "tokens"])[["arm", "tokens", "mean", "low", "high"]].dropna()
    hovered = nearest_point("hovered", ["run"])
    layers = [
        alt.Chart(over)
        .mark_area(opacity=0.16 if len(arms) <= FAINT_BANDS_FROM else 0.06, clip=True)
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
        .add_params(hovered, zoom_with_shift()),
    ]
    if len(ends):
        top = scale.domain[1] - 0.02 * (scale.domain[1] - scale.domain[0])
        ends = ends.assign(at=ends["loss"].clip(upper=top).fillna(top))
        cross = alt.Chart(ends).mark_point(shape="cross", size=90, filled=True, angle=45, opacity=1)
        layers.append(
            cross.encode(x, alt.Y("at:Q", title=unit, scale=scale), color, tooltip=[*tips, text_tip("divergence")])
        )
    return filtered(alt.layer(*layers), arms)


def one_level(means: pd.DataFrame, own: pd.DataFrame, arms: Sequence[str], span: Sequence[float], unit: str):
    """One of several small charts: the mean curves of some arms in color over those of all arms in gray.

    means, own: arm, tokens, mean, of all arms and of those in color.
    """
    import altair as alt

    scale = alt.Scale(domain=list(span), nice=False, zero=False)
    y = alt.Y("mean:Q", title=unit, scale=scale, axis=alt.Axis(tickCount=4))
    tips = [text_tip("arm"), tip("tokens", form=","), tip("mean", form=".4f")]
    return alt.layer(
        alt.Chart(means)
        .mark_line(style="context", strokeWidth=1, clip=True)
        .encode(tokens_axis(), y, alt.Detail("arm:N")),
        alt.Chart(own).mark_line(strokeWidth=2, clip=True).encode(tokens_axis(), y, arm_color(arms, 0), arm_dash(arms)),
        alt.Chart(own)
        .mark_circle(size=20, opacity=0, clip=True)
        .encode(tokens_axis(), y, tooltip=tips)
        .add_params(nearest_point()),
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
    tips = [text_tip("arm"), tip("tokens", form=","), tip("mean", "difference (%)"), tip("low"), tip("high")]
    tips.append(tip("pairs", form="d"))
    chosen = nearest_point("hovered", ["arm"])
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
        .add_params(chosen, zoom_with_shift()),
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
    tips = [text_tip("arm"), tip("seed", form="d"), tip("tokens", form=","), tip("loss", form=".4f")]
    points = alt.Chart(steps).mark_circle(size=20, opacity=0, clip=True)
    y = alt.Y("loss:Q", title="nats per token", scale=scale)
    near = points.encode(tokens_axis(), y, tooltip=tips).add_params(nearest_point(), zoom_with_shift())
    return filtered(alt.layer(chart, near), arms)


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
        text_tip("arm"),
        tip("seed", form="d"),
        tip("tokens", form=","),
        tip("train", form=".4f"),
        tip("validation", form=".4f"),
    ]
    chart = alt.layer(
        alt.Chart(equal).mark_line(style="reference", strokeDash=[4, 3], strokeWidth=1).encode(x, y),
        alt.Chart(points)
        .mark_line(strokeWidth=1.3, clip=True)
        .encode(x, y, arm_color(arms), arm_dash(arms), alt.Detail("run:N"), alt.Order("tokens:Q")),
        alt.Chart(points)
        .mark_circle(size=18, clip=True)
        .encode(x, y, arm_color(arms), tooltip=tips)
        .add_params(nearest_point()),
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
    tips = [text_tip("arm"), tip("seed", form="d"), tip("block", form="d"), tip("value")]
    panels = []
    for when in ("initialization", "end"):
        part = points[points["when"] == when]
        over = part.drop_duplicates(["arm", "block"])
        thin = alt.Chart(part).mark_line(strokeWidth=0.7, opacity=0.45, clip=True)
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
    tips = [text_tip("arm"), tip("block", form="d"), tip("value")]
    lines = alt.Chart(points).mark_line(strokeWidth=1.8).encode(x, y, arm_color(arms), arm_dash(arms))
    dots = (
        alt.Chart(points).mark_circle(size=22).encode(x, y, arm_color(arms), tooltip=tips).add_params(nearest_point())
    )
    return filtered(alt.layer(lines, dots), arms)
