"""A picture a claim: the differences by seed with the interval as it narrowed, and every look beside its boundary."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.config import unwritable
from albert_ablate.report import charts_verdicts, render, style
from albert_ablate.report.sections.ledger import boundaries
from albert_ablate.stats.sequential import FIRST, running_interval


def draw_claims(ledger: Mapping[str, Any], folder: Path, suffix: str, only: Sequence[str] = ()) -> list[Path]:
    """<folder>/<claim>.<suffix> of every claim that has a finite difference; suffix png, svg or html."""
    render.require()
    files = []
    for entry in ledger["claims"]:
        parts = [p for p in entry["parts"] if np.isfinite(p["d"]).any()]
        if not parts or (only and entry["name"] not in only):
            continue
        file = folder / f"{entry['name']}.{suffix}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if suffix == "html":
                picture(entry, parts).configure(**style.theme()).save(file)
            else:
                file.write_bytes(render.picture(picture(entry, parts), f".{suffix}"))
        except OSError as error:
            raise unwritable(file, error) from None
        files.append(file)
    return files


def picture(entry: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Any:
    """All contrasts of a claim, below each other."""
    import altair as alt

    word = f"{entry['verdict']}, {entry['detail']}" if entry.get("detail") else entry["verdict"]
    title = alt.Title(entry["statement"], subtitle=f"{word}; {entry['registration']}", fontSize=14, offset=12)
    rows = []
    for p in parts:
        rows.append(differences(p, entry["N"]).properties(width=style.WIDTH, height=210))
        steps = pd.DataFrame(
            [{k: x[k] for k in ("pairs", "statistic", "boundary", "p")} for x in p["looks"] if x["test"] == "t"]
        )
        if len(steps):
            ahead = boundaries(steps, entry["N"])
            ahead = ahead.iloc[:0] if p.get("test") == "moderated" else ahead
            rows.append(
                charts_verdicts.looks_of_contrast(steps, ahead, entry["N"]).properties(width=style.WIDTH, height=120)
            )
    return alt.vconcat(*rows, spacing=14).properties(title=title)


def differences(p: Mapping[str, Any], N: int) -> Any:
    """The difference of each pair, and after it what the repeated intervals so far have in common."""
    import altair as alt

    def size(x: float) -> float:
        return 100 * math.expm1(x) if p["log"] and math.isfinite(x) else x

    d = [float(x) for x in p["d"]]
    points = pd.DataFrame({"pair": range(1, len(d) + 1), "seed": p["seeds"], "difference": [size(x) for x in d]})
    ends = [running_interval(d[:n], N) for n in range(FIRST, len(d) + 1) if p.get("test") != "moderated"]
    band = pd.DataFrame(
        [{"pair": n, "mean": size(m), "low": size(a), "high": size(b)} for n, (m, a, b) in enumerate(ends, FIRST)]
    )
    finite = points[np.isfinite(points["difference"])]
    margin = size(p["margin"])
    shown = [*finite["difference"], margin, -margin, 0.0]
    if len(band):
        late = band
        band = band[np.isfinite(band[["low", "high"]]).all(axis=1)]
        shown += [x for x in [*late["low"], *late["high"]] if math.isfinite(x)]
    pad = 0.08 * (max(shown) - min(shown))
    low, high = min(shown) - pad, max(shown) + pad
    unit = "%" if p["log"] else p["unit"]
    y = alt.Scale(domain=[low, high], nice=False)
    x = alt.X(
        "pair:Q",
        title="pair",
        scale=alt.Scale(domain=[0.5, N + 0.5], nice=False),
        axis=alt.Axis(format="d", grid=False),
    )
    title = f"{p['measure']}: better as claimed ({unit})"
    area = pd.DataFrame({"from": [-margin], "to": [margin], "zero": [0.0]})
    layers = [
        alt.Chart(area).mark_rect(style="inside").encode(alt.Y("from:Q", scale=y, title=title), alt.Y2("to")),
        alt.Chart(area).mark_rule(style="reference").encode(alt.Y("zero:Q", scale=y)),
    ]
    if len(band):
        layers += [
            alt.Chart(band).mark_area(style="line", opacity=0.22, clip=True, interpolate="step-after")
            .encode(x, alt.Y("low:Q", scale=y), alt.Y2("high")),
            alt.Chart(band).mark_line(style="line", clip=True).encode(x, alt.Y("mean:Q", scale=y)),
        ]  # fmt: skip
    tips = [alt.Tooltip("seed:O"), alt.Tooltip("difference:Q", format=".4")]
    layers.append(
        alt.Chart(finite)
        .mark_point(style="plain", filled=True, size=55, opacity=1)
        .encode(x, alt.Y("difference:Q", scale=y), tooltip=tips)
    )
    lost = points[~np.isfinite(points["difference"])].assign(
        at=lambda t: np.where(t["difference"] > 0, high, low), word="diverged"
    )
    if len(lost):
        layers.append(
            alt.Chart(lost)
            .mark_point(style="warning", shape="triangle", filled=True, size=70, clip=False)
            .encode(x, alt.Y("at:Q", scale=y), tooltip=[alt.Tooltip("seed:O"), "word:N"])
        )
    name = f"{p['treatment']} against {p['control']}: pairs, mean, interval of all looks; shaded: the margin"
    return alt.layer(*layers).properties(title=alt.Title(name, fontSize=12))
