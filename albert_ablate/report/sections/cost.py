"""Losses beside what the runs cost."""

from albert_ablate.analysis.numbers import human
from albert_ablate.report import charts_arms
from albert_ablate.report.material import COLUMN_TITLES, Material, extremes, relative_spread
from albert_ablate.report.page import Figure, Section, Table
from albert_ablate.report.sections.leaderboard import SAME_COST


def cost_section(m: Material) -> Section:
    """Section of the report: final loss against training FLOPs, where these differ between arms."""
    section = Section("Cost and quality")
    rows, (quality, axis) = m.finished, m.quality
    if {"flops", quality} <= {*rows} and relative_spread(rows["flops"]) > SAME_COST:
        points = rows[["name", "seed", quality, "flops"]].set_axis(["arm", "seed", "loss", "flops"], axis=1).dropna()
        points = points[points["flops"] > 0].astype({"loss": float, "flops": float, "seed": int})
        if len(points):
            means_ = points.groupby("arm")[["loss", "flops"]].mean().reset_index()
            note = "Small: runs; large: the mean of an arm; dashed: no arm is better and cheaper. FLOPs are counted."
            drawn = charts_arms.cost(points, means_, m.arms, "flops", "training FLOPs", axis)
            section.figures.append(Figure("Loss over training FLOPs", drawn, note, data=extremes(means_, "loss")))
    elif "flops" in rows and rows["flops"].notna().any():
        section.text.append(f"All finished runs cost the same: {human(rows['flops'].mean(), 3)} training FLOPs.")
    titles = {k: v for k, v in COLUMN_TITLES.items() if v and k in rows and rows[k].notna().any()}
    if titles:
        numbers = rows[[*titles]].assign(arm=rows["name"])
        table = numbers.groupby("arm").mean().rename(columns=titles)
        table.insert(0, "finished", numbers.groupby("arm").size())
        order = [a for a in m.arms if a in table.index]
        section.tables.append(
            Table(
                "arms",
                table.loc[order].reset_index(),
                "Means over the finished seeds of each arm",
                "Losses and gap in nats per token. Seeds that diverged are not in these means.",
            )
        )
    if not section.figures and not section.tables:
        section.missing.append("Cost and quality are those of finished runs, and no run has finished.")
    return section
