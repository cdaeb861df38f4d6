"""Charts of two runs on common axes, and of the difference between them."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import TIP
from albert_ablate.report.charts_run import gradient_legend, shaded
from albert_ablate.report.style import arm_color, log_axis, loss_range, nearest_point, text_tip, tip, tokens_axis


def losses(batches: pd.DataFrame, evals: pd.DataFrame, names: Sequence[str], initial: float | None, unit: str):
    """Losses of two runs: validation with dots, train dashed, each batch thin. batches: arm, tokens, y; evals: with
    split."""
    import altair as alt

    scale = alt.Scale(domain=loss_range(np.r_[batches["y"], evals["y"]], initial), nice=False, zero=False)
    x, y, color = tokens_axis(), alt.Y("y:Q", title=unit, scale=scale), arm_color(names, 1)
    held = evals[evals["split"] == "validation"]
    tips = [text_tip("arm", "run"), tip("tokens", form=","), text_tip("split"), tip("y", "loss", ".4f")]
    dash = alt.StrokeDash(
        "split:N", scale=alt.Scale(domain=["validation", "train"], range=[[1, 0], [4, 3]]), legend=None
    )
    return alt.layer(
        alt.Chart(batches).mark_line(strokeWidth=0.7, opacity=0.45, clip=True).encode(x, y, color),
        alt.Chart(evals).mark_line(strokeWidth=2, clip=True).encode(x, y, color, dash),
        alt.Chart(held).mark_circle(size=30, opacity=1, clip=True).encode(x, y, color),
        alt.Chart(evals)
        .mark_circle(size=40, opacity=0)
        .encode(x, y, tooltip=tips)
        .add_params(nearest_point("near_loss")),
    )


def difference(table: pd.DataFrame, batches: pd.DataFrame):
    """The difference of two runs over tokens. table, batches: tokens, percent; batches: of each training batch."""
    import altair as alt

    fine = table["percent"].to_numpy(float)
    fine = fine[np.isfinite(fine)]
    inner = np.percentile(batches["percent"], [2, 98]) if len(batches) else [0.0]
    low, high = min(0.0, *fine, *inner), max(0.0, *fine, *inner)
    pad = 0.06 * (high - low) or 0.05
    scale = alt.Scale(domain=[low - pad, high + pad], nice=False, zero=False)
    y = alt.Y("percent:Q", title="change of the loss (%)", scale=scale, axis=alt.Axis(format=TIP))
    x, tips = tokens_axis(), [tip("tokens", form=","), tip("percent", "difference (%)", "+.3f")]
    return alt.layer(
        alt.Chart(pd.DataFrame({"percent": [0.0]})).mark_rule(style="reference").encode(y),
        alt.Chart(batches).mark_line(style="batch", strokeWidth=1, clip=True).encode(x, y),
        alt.Chart(table).mark_line(style="line", strokeWidth=2, clip=True).encode(x, y),
        alt.Chart(table)
        .mark_point(style="plain", filled=True, size=34, opacity=1, clip=True)
        .encode(x, y, tooltip=tips)
        .add_params(nearest_point("near_difference")),
    ).properties(height=210)


def lines_of(table: pd.DataFrame, column: str, names: Sequence[str], log: bool):
    """One column of two runs over tokens. table: arm, tokens, `column`."""
    import altair as alt

    scale, axis = log_axis(table[column]) if log else (alt.Scale(zero=False), alt.Axis(format=TIP, tickCount=4))
    y = alt.Y(f"{column}:Q", title=None, scale=scale, axis=axis)
    tips = [text_tip("arm", "run"), tip("tokens", form=","), tip(column)]
    lines = alt.Chart(table).mark_line(strokeWidth=1.4, clip=True).encode(tokens_axis(), y, arm_color(names, 1))
    points = alt.Chart(table).mark_circle(size=20, opacity=0).encode(tokens_axis(), y, tooltip=tips)
    return alt.layer(lines, points.add_params(nearest_point(f"near_{column}")))


def change_map(cells: pd.DataFrame, what: str, depth: int, until: float):
    """A heat map of what changed from one run to another, white where nothing did. what: ratio (1 is nothing, the scale
    is logarithmic) or difference. cells: tokens, end, layer, value."""
    import altair as alt

    size = np.abs(np.log(cells["value"])) if what == "ratio" else np.abs(cells["value"])
    reach = max(float(np.quantile(size, 0.98)), 1e-6 if what == "difference" else math.log(1.05))
    shade = (np.log(cells["value"]) if what == "ratio" else cells["value"]).clip(-reach, reach)
    values = [-reach, -reach / 2, 0.0, reach / 2, reach]
    labels = "format(exp(datum.value), '.3~g')" if what == "ratio" else "format(datum.value, '.2~g')"
    colors = alt.Scale(domain=[-reach, 0, reach], range=["#4a8fd0", "#f7f7f7", "#e5803c"], interpolate="rgb")
    color = alt.Color("shade:Q", scale=colors, legend=gradient_legend(values, labels))
    return shaded(cells.assign(shade=shade), color, depth, until).properties(view=alt.ViewBackground(style="map"))
