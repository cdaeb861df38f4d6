"""Parallel coordinates of a search: every setting that was tried as a line through what it varied, to its loss."""

import math

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import human
from albert_ablate.report.style import nearest_point, text_tip, tip

COLORS = ["#e8650a", "#3f8fc9", "#98a1ab"]  # from the least loss on, to be seen on white and on black
TITLE_WIDTH = 140  # pixels for the title of an axis; where there are fewer, titles are slanted
LOG_AXIS_RATIO = 20.0  # an axis whose values span more than this factor is logarithmic


def placed(values: pd.Series) -> tuple[np.ndarray, pd.DataFrame]:
    """Where the values of an axis stand from 0 to 1, and its labels (at, text). Numbers by size, logarithmically where
    they span more than a factor of LOG_AXIS_RATIO and lie at its low end; anything else by name, at equal distances."""
    numbers = pd.to_numeric(values, errors="coerce") if not values.map(lambda v: isinstance(v, bool)).any() else None
    if numbers is None or numbers.isna().any():
        names = sorted({str(v) for v in values})
        at = {name: i / max(1, len(names) - 1) if len(names) > 1 else 0.5 for i, name in enumerate(names)}
        shown = names if len(names) <= 8 else [names[0], names[-1]]
        return values.map(lambda v: at[str(v)]).to_numpy(float), pd.DataFrame(
            {"at": [at[n] for n in shown], "text": shown}
        )
    x = numbers.to_numpy(float)
    crowded = np.median(x) < x.min() + 0.25 * (x.max() - x.min())  # toward the low end: not drawn evenly
    log = crowded and x.min() > 0 and x.max() / x.min() > LOG_AXIS_RATIO
    scaled = np.log(x) if log else x
    low, high = float(scaled.min()), float(scaled.max())
    ticks = np.linspace(low, high, 4) if high > low else np.array([low])
    text = [human(float(f"{math.exp(t) if log else t:.3g}"), 3) for t in ticks]
    span = (high - low) or 1.0
    shift = 0.0 if high > low else 0.5
    return (scaled - low) / span + shift, pd.DataFrame({"at": (ticks - low) / span + shift, "text": text})


def parallel_coordinates(settings: pd.DataFrame, losses: pd.Series, title: str):
    """A line a setting over the axes of what was varied and, last, of the loss; its color is the loss, the best in
    front. settings: arm x setting, losses: by arm, all finite."""
    import altair as alt

    axes = [*map(str, settings.columns), title]
    table = settings.loc[losses.index].set_axis(axes[:-1], axis=1).assign(**{title: losses})
    parts, labels = [], []
    for axis in axes:
        at, ticks = placed(table[axis])
        shown = [human(v) for v in table[axis]]
        parts.append(
            pd.DataFrame({"arm": table.index, "axis": axis, "at": at, "value": shown, "loss": losses.to_numpy()})
        )
        labels.append(ticks.assign(axis=axis))
    lines = pd.concat(parts, ignore_index=True)
    lines["order"] = lines["axis"].map({axis: i for i, axis in enumerate(axes)})
    lines = lines.sort_values(["loss", "order"], ascending=[False, True])  # the best is drawn last, above the others
    x = alt.X("axis:N", title=None, sort=axes, scale=alt.Scale(type="point", padding=0.4, domain=axes))
    x = x.axis(
        alt.Axis(
            orient="top",
            labelAngle=alt.ExprRef(f"width < {TITLE_WIDTH * len(axes)} ? -25 : 0"),
            labelLimit=TITLE_WIDTH,
            domain=False,
            ticks=False,
        )
    )
    y = alt.Y("at:Q", title=None, axis=None, scale=alt.Scale(domain=[-0.03, 1.03], nice=False))
    best, middle, worst = (float(v) for v in np.quantile(losses, [0.0, 0.3, 0.8]))
    scale = alt.Scale(domain=[best, middle, max(worst, middle + 1e-9)], range=COLORS, clamp=True, interpolate="rgb")
    near = nearest_point("near", ["arm"])
    color = alt.Color("loss:Q", title=None, scale=scale, legend=None)
    faint = alt.condition(near, alt.value(1.0), alt.value(0.5))
    width = alt.condition(near, alt.value(3.5), alt.value(1.3))
    tips = [text_tip("arm"), text_tip("axis", "setting"), text_tip("value"), tip("loss", form=".4f")]
    return alt.layer(
        alt.Chart(pd.DataFrame({"axis": axes})).mark_rule(style="reference").encode(x),
        alt.Chart(lines)
        .mark_line()
        .encode(x, y, color, detail="arm:N", order="order:Q", opacity=faint, strokeWidth=width),
        alt.Chart(pd.concat(labels, ignore_index=True))
        .mark_text(align="left", dx=5, fontSize=10, style="note")
        .encode(x, y, text="text:N"),
        alt.Chart(lines).mark_circle(size=40, opacity=0).encode(x, y, tooltip=tips).add_params(near),
    ).properties(height=330)
