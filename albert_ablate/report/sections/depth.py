"""What happened in each block over training, as heat maps."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from albert_ablate.analysis import thinning
from albert_ablate.analysis.numbers import human
from albert_ablate.report import charts_curves, charts_run
from albert_ablate.report.histories import read_maps
from albert_ablate.report.material import Material
from albert_ablate.report.page import ColorScale, Figure, Section

CELLS = 240_000  # of heat maps on the whole page
MAPS = 24  # arms with heat maps
MAPPED_SEEDS = 5  # seeds of an arm in its heat map
MAPPED = ("grad_norm", "residual_rms", "update_ratio", "entropy")


def _median(maps: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The median over the maps of an arm's seeds, of those whose columns of time are columns of the longest."""
    longest = max(maps, key=lambda f: f["tokens"].nunique())
    alike = [f for f in maps if {*f["tokens"]} <= {*longest["tokens"]}]
    middle = pd.concat(alike).groupby(["tokens", "layer"])["value"].median().reset_index()
    return middle.merge(longest.drop_duplicates("tokens")[["tokens", "end"]], on="tokens")


def depth_section(m: Material) -> Section:
    """Heat maps by arm: the median over up to five seeds of what each showed."""
    section = Section("Depth by tokens", scales={})
    chosen = m.arms[:MAPS]
    layers = m.rows["model.layers"].max() if "model.layers" in m.rows else 12
    layers = 12 if pd.isna(layers) else int(layers)
    columns = max(8, min(48, CELLS // max(1, len(chosen) * len(MAPPED) * layers)))
    rows = pd.concat(m.rows[m.rows["name"] == arm].head(MAPPED_SEEDS) for arm in chosen)
    each = read_maps(m.root, rows, m.remote, MAPPED, columns)
    cells: dict[str, dict[str, pd.DataFrame]] = {q: {} for q in MAPPED}
    for arm in chosen:
        own = [maps for maps, name in zip(each, rows["name"], strict=True) if name == arm]
        for quantity in MAPPED:
            if found := [maps[quantity] for maps in own if quantity in maps]:
                cells[quantity][arm] = _median(found)
    for quantity, title in thinning.QUANTITIES.items():
        if quantity not in MAPPED or not cells[quantity]:
            continue
        domain = charts_run.color_range(np.concatenate([c["value"].to_numpy() for c in cells[quantity].values()]))
        section.scales[title] = ColorScale(*charts_run.color_scale(domain, quantity))
        ends = pd.concat(
            c[c["tokens"] == c["tokens"].max()].assign(arm=arm) for arm, c in cells[quantity].items()
        ).rename(columns={"layer": "block"})
        profile = charts_curves.depth_profile(
            ends[["arm", "block", "value"]], m.arms, title, quantity not in charts_run.LINEAR
        )
        name = f"{title}, by block at the end"
        section.figures.append(Figure(name, profile, "Median over up to five seeds.", group=title, wide=True))
        section.figures += [
            Figure(
                arm,
                charts_run.heat_map(c, quantity, domain, legend=False).properties(height=120),
                arm=arm,
                group=title,
                small=True,
                data=f"{title} by block and tokens, {human(c['value'].min(), 3)} to {human(c['value'].max(), 3)}.",
            )
            for arm, c in cells[quantity].items()
        ]
    if section.figures:
        section.text.append(
            "Colors mean the same in all arms, from the 1st to the 98th percentile. Of several logged steps in a "
            "column the worst is shown; over seeds (five at most) the median. Gray: no finite value."
        )
        if len(m.arms) > MAPS:
            section.text.append(f"Drawn for the first {MAPS} of {len(m.arms)} arms.")
    absent = [t for q, t in thinning.QUANTITIES.items() if q in MAPPED and not cells[q]]
    if absent:
        section.missing.append(f"Not in these runs' histories (diagnostics.every=10 writes it): {'; '.join(absent)}.")
    return section
