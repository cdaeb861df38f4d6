"""What a random or bayes sweep has found: its settings as parallel coordinates."""

import math

from albert_ablate.analysis.numbers import human
from albert_ablate.analysis.setting_names import key_of
from albert_ablate.report import charts_search
from albert_ablate.report.material import Material
from albert_ablate.report.page import Figure, Section

MIN_SETTINGS = 20  # fewer are seen in the leaderboard
MAX_AXES = 10
GRID_FILL = 0.5  # of all combinations of the levels: a study that has more of them is a grid


def search_section(m: Material) -> Section | None:
    """Parallel coordinates of the arms, where they are many settings of a search and no grid; else None."""
    quality, axis = m.quality
    if len(m.arms) < MIN_SETTINGS or quality not in m.finished:
        return None
    levels = m.settings.map(key_of).nunique()
    varied = [c for c in m.settings if levels[c] > 1 and m.settings[c].notna().all()]
    losses = m.finished.groupby("name")[quality].mean().dropna()
    if len(varied) < 2 or len(m.arms) > GRID_FILL * math.prod(levels[varied].tolist()) or len(losses) < 2:
        return None
    shown = varied[:MAX_AXES]
    best = losses.idxmin()
    note = "A line a setting, its color the loss at the end, orange for the least. Point at a line to see its numbers."
    note += f" Of {len(varied)} varied settings the first {MAX_AXES} are drawn." if len(varied) > MAX_AXES else ""
    drawn = charts_search.parallel_coordinates(m.settings[shown], losses, axis.partition(" at")[0])
    said = f"{len(losses)} settings; the least loss, {human(losses.min())}, has {best}."
    section = Section("Search", figures=[Figure("Settings and their loss", drawn, note, wide=True, data=said)])
    section.text.append("The lowest loss of many settings is biased low: train that setting again on new seeds.")
    return section
