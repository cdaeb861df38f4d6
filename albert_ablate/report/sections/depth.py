"""What happened in each block over training, as heat maps."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis import thinning
from albert_ablate.analysis.numbers import human
from albert_ablate.report import charts_curves, charts_run
from albert_ablate.report.histories import read_maps
from albert_ablate.report.material import Material
from albert_ablate.report.page import ColorScale, Figure, Section

MAX_CELLS = 240_000  # of heat maps on the whole page
MAX_MAPS = 24  # arms with heat maps
MAPPED_SEEDS = 5  # seeds of an arm in its heat map
MAPPED = ("grad_norm", "residual_rms", "update_ratio", "entropy")


def _median(maps: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The median over the maps of an arm's seeds, of those whose columns of time are columns of the longest."""
    longest = max(maps, key=lambda f: f["tokens"].nunique())
    alike = [f for f in maps if {*f["tokens"]} <= {*longest["tokens"]}]
    middle = pd.concat(alike).groupby(["tokens", "layer"])["value"].median().reset_index()
    return middle.merge(longest.drop_duplicates("tokens")[["tokens", "end"]], on="tokens")


def _maps(m: Material, arms: Sequence[str], columns: int) -> dict[str, tuple[Any, dict[str, pd.DataFrame]]]:
    """Arm -> a state of the runs behind its maps, and its maps by quantity. Read are those of arms whose runs have
    changed since the last time."""
    rows = {arm: m.rows[m.rows["name"] == arm].head(MAPPED_SEEDS) for arm in arms}
    states = {arm: ("maps", columns, *own["folder"], *map(m.stamps.get, own["folder"])) for arm, own in rows.items()}
    new = [rows[arm] for arm in arms if not m.cache.has(states[arm])]
    read: dict[str, list[dict[str, pd.DataFrame]]] = {}
    if new:
        table = pd.concat(new)
        for maps, name in zip(read_maps(m.root, table, m.remote, MAPPED, columns), table["name"], strict=True):
            read.setdefault(name, []).append(maps)

    def medians(arm: str) -> dict[str, pd.DataFrame]:
        each = {q: [maps[q] for maps in read.get(arm, ()) if q in maps] for q in MAPPED}
        return {q: _median(found) for q, found in each.items() if found}

    return {arm: (states[arm], m.cache.part(states[arm], partial(medians, arm))) for arm in arms}


def _rounded(domain: Sequence[float]) -> list[float]:
    """The ends of a color scale to two digits, outward: one more run does not change the colors of all others."""
    low, high = (f"{abs(v):.1e}" for v in domain)
    unit = [10.0 ** (int(text.partition("e")[2]) - 1) for text in (low, high)]
    ends = [math.floor(domain[0] / unit[0]) * unit[0], math.ceil(domain[1] / unit[1]) * unit[1]]
    return [float(f"{v:.3g}") for v in ends]


def _figure(arm: str, cells: pd.DataFrame, quantity: str, title: str, domain: Sequence[float]) -> Figure:
    return Figure(
        arm,
        charts_run.heat_map(cells, quantity, domain, legend=False).properties(height=120),
        arm=arm,
        group=title,
        small=True,
        data=f"{title} by block and tokens, {human(cells['value'].min(), 3)} to {human(cells['value'].max(), 3)}.",
    )


def depth_section(m: Material) -> Section:
    """Heat maps by arm: the median over up to five seeds of what each showed."""
    section = Section("Depth by tokens", scales={})
    chosen = m.arms[:MAX_MAPS]
    layers = m.rows["model.layers"].max() if "model.layers" in m.rows else 12
    layers = 12 if pd.isna(layers) else int(layers)
    columns = max(8, min(48, MAX_CELLS // max(1, len(chosen) * len(MAPPED) * layers)))
    cells: dict[str, dict[str, pd.DataFrame]] = {q: {} for q in MAPPED}
    states = dict[str, Any]()  # of the runs behind the maps of an arm
    for arm, (state, found) in _maps(m, chosen, columns).items():
        states[arm] = state
        for quantity, map_ in found.items():
            cells[quantity][arm] = map_
    for quantity, title in thinning.QUANTITIES.items():
        if quantity not in MAPPED or not cells[quantity]:
            continue
        domain = _rounded(charts_run.color_range(np.concatenate([c["value"] for c in cells[quantity].values()])))
        section.scales[title] = ColorScale(*charts_run.color_scale(domain, quantity))
        ends = pd.concat(
            c[c["tokens"] == c["tokens"].max()].assign(arm=arm) for arm, c in cells[quantity].items()
        ).rename(columns={"layer": "block"})
        profile = charts_curves.depth_profile(
            ends[["arm", "block", "value"]], m.arms, title, quantity not in charts_run.LINEAR_QUANTITIES
        )
        name = f"{title}, by block at the end"
        section.figures.append(Figure(name, profile, "Median over up to five seeds.", group=title, wide=True))
        section.figures += [
            m.cache.part(
                ("map", arm, quantity, *domain, states[arm]), partial(_figure, arm, c, quantity, title, domain)
            )
            for arm, c in cells[quantity].items()
        ]
    if section.figures:
        section.text.append(
            "Colors mean the same in all arms, from the 1st to the 98th percentile. Of several logged steps in a "
            "column the worst is shown; over seeds (five at most) the median. Gray: no finite value."
        )
        if len(m.arms) > MAX_MAPS:
            section.text.append(f"Drawn for the first {MAX_MAPS} of {len(m.arms)} arms.")
    absent = [t for q, t in thinning.QUANTITIES.items() if q in MAPPED and not cells[q]]
    if absent:
        section.missing.append(f"Not in these runs' histories (diagnostics.every=10 writes it): {'; '.join(absent)}.")
    return section
