"""Arms beside each other at equal seeds: every pair of arms, and whether pairing by seed helps."""

from albert_ablate.analysis.tables import all_paired, seed_against_seed
from albert_ablate.report import charts_arms, style
from albert_ablate.report.material import Material
from albert_ablate.report.page import Figure, Section, Table

MAX_MATRIX_ARMS = 15  # arms of the matrix at most


def pairs_section(m: Material) -> Section:
    """Section of the report: paired differences of all pairs of arms, and seed against seed."""
    section, called = Section("Pairs of arms"), m.compared[1]
    runs = m.compared_runs if m.compared[0] in m.done else None
    table = None if runs is None or len(m.arms) > MAX_MATRIX_ARMS else all_paired(runs, m.arms)
    if table is not None and len(m.arms) > 2 and len(table):
        intervals = int(table["low"].notna().sum()) // 2
        section.figures.append(
            Figure(
                f"Every arm against every other: {called} (%)",
                charts_arms.difference_matrix(table, m.arms),
                "Row against column over the seeds that both finished: minus (blue) means that the row is better. "
                f"Bold: the 95 % t interval excludes zero; of {intervals} comparisons about {0.05 * intervals:.1f} "
                "would do so by chance were all arms equal.",
                wide=True,
                data=f"{len(m.arms)} arms, {intervals} comparisons with an interval.",
            )
        )
        section.tables.append(Table("pairs_of_arms", table, "All paired differences in percent", folded=True))
    if runs is not None:
        finished = runs[~runs["diverged"]].dropna(subset="value")
        both = seed_against_seed(finished, m.baseline)
        both = both[both.groupby("arm")["seed"].transform("size") > 2]
        if len(both):
            section.figures.append(
                Figure(
                    f"Seed against seed: {called}",
                    style.filtered(charts_arms.pairs(both, m.arms, m.baseline), m.arms),
                    "Each run over the baseline's run of the same seed, both less the mean of their arm. Along the "
                    "dashed line pairing by seed removes what a seed adds to both; a round cloud: it does not help.",
                )
            )
    if not section.figures:
        section.missing.append("Pairs need arms with three finished runs of the same seeds as the baseline.")
    return section
