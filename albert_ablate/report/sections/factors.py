"""How two varied settings act together."""

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import human
from albert_ablate.analysis.setting_names import key_of
from albert_ablate.analysis.tables import mean_interval
from albert_ablate.report import charts_arms
from albert_ablate.report.material import Material, factors
from albert_ablate.report.page import Figure, Section, Table
from albert_ablate.stats.effects import factorial_effects

PAIRS_OF_FACTORS = 6


def factorial_section(m: Material) -> Section:
    """Section of the report: interactions of pairs of factors, where the arms cross them."""
    section = Section("Interactions")
    quality, axis = m.quality
    effects, partly = [], []
    for one, other in combinations(factors(m.settings), 2):
        if len(section.figures) == PAIRS_OF_FACTORS:
            section.text.append(f"Only the first {PAIRS_OF_FACTORS} pairs of factors are drawn.")
            break
        points, others = _crossed(m, one, other)
        if points.empty:
            partly += [f"{one} and {other}"] if _crosses(m.settings, one, other) else []
            continue
        cells = points.groupby(["x", "level"])["value"].mean().rename("mean").reset_index()
        over = f", over the {others} combinations of the other settings that have all cells" if others > 1 else ""
        section.figures.append(
            Figure(
                f"{one} and {other}",
                charts_arms.interaction(cells, points, one, other, axis),
                f"Parallel lines: the effects add up. Lines: means of the finished runs{over}; marks: each of them.",
            )
        )
        if len(cells) == 4:
            effects += _contrasts(m, points, one, other)
    if effects:
        section.tables.append(
            Table(
                "interactions",
                pd.DataFrame(effects),
                f"Effects on the {axis}",
                "A contrast per seed that has all four cells, with a 95 % t interval; a description, no verdict. "
                "The interaction: the first factor's effect at the second's second level minus that at its first.",
            )
        )
    if partly:
        section.missing.append(f"Crossed, but without a finished run in every cell: {'; '.join(partly)}.")
    if not section.figures and not partly:
        section.missing.append(
            "Interactions need finished runs of arms that cross the levels of two settings, as a factorial sweep has."
        )
    return section


def _crosses(settings: pd.DataFrame, one: str, other: str) -> bool:
    """Whether there is an arm for every level of the one with every level of the other."""
    keys = settings[[one, other]].map(key_of)
    return len(keys.drop_duplicates()) == keys[one].nunique() * keys[other].nunique()


def _crossed(m: Material, one: str, other: str) -> tuple[pd.DataFrame, int]:
    """x (level of one), level (of other), seed, rest, value of the finished runs in combinations of the other settings
    (rest) that have every cell of the two, and how many such combinations there are: elsewhere a cell's mean would be
    one of other settings too."""
    quality = m.quality[0]
    if quality not in m.finished:
        return pd.DataFrame(), 0
    keys = m.settings.map(key_of)
    cell = keys[one] + keys[other]
    rest = [c for c in keys if c not in (one, other) and keys.groupby(cell)[c].nunique().gt(1).any()]
    keys = keys.assign(rest=keys[rest].agg(" ".join, axis=1) if rest else "", cell=cell)
    wanted = m.settings[one].map(key_of).nunique() * m.settings[other].map(key_of).nunique()
    rows = m.finished[["name", "seed", quality]].merge(keys[["rest", "cell"]], left_on="name", right_index=True)
    rows = rows.merge(m.settings[[one, other]].map(human), left_on="name", right_index=True)
    whole = rows.groupby("rest")["cell"].transform("nunique") == wanted
    points = rows[whole].rename(columns={one: "x", other: "level", quality: "value"}).astype({"seed": int})
    return points[["name", "x", "level", "seed", "rest", "value"]].astype({"value": float}), points["rest"].nunique()


def _contrasts(m: Material, points: pd.DataFrame, one: str, other: str) -> list[dict[str, Any]]:
    levels = [sorted({*points[c]}) for c in ("x", "level")]
    wide = points.pivot_table(index=["seed", "rest"], columns=["x", "level"], values="value").dropna()
    per = points["rest"].nunique()
    mean = wide.groupby("seed").mean()[wide.groupby("seed").size() == per]  # a seed counts with all its cells
    cells = [[[row[a, b] for b in levels[1]] for a in levels[0]] for _, row in mean.iterrows()]
    if len(cells) < 3:
        return []
    out = []
    for names, d in factorial_effects(np.array(cells, float), (one, other)).items():
        mean, low, high = mean_interval(d)
        words = [f"{n}: {levels[(one, other).index(n)][1]} minus {levels[(one, other).index(n)][0]}" for n in names]
        what = " x ".join(names) if len(names) > 1 else words[0]
        out.append({"effect": what, "seeds": len(d), "mean": mean, "low": low, "high": high})
    return out
