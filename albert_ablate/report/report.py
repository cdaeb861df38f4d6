"""`albert-ablate report RUNS`: all runs below a folder, and what was judged of them, as one report.

An arm here is a setting, named by what it differs in from the others. Tuning runs appear in the tuning section only.
"""

from pathlib import Path

from albert_ablate.records.collector import without_collector
from albert_ablate.report import render
from albert_ablate.report.histories import inputs
from albert_ablate.report.material import counted, gather
from albert_ablate.report.page import Page, is_current, write_csv, write_html, write_markdown
from albert_ablate.report.sections.cost import cost_section
from albert_ablate.report.sections.curves import curves_section
from albert_ablate.report.sections.depth import depth_section
from albert_ablate.report.sections.factors import factorial_section
from albert_ablate.report.sections.generalization import generalization_section
from albert_ablate.report.sections.leaderboard import leaderboard_section
from albert_ablate.report.sections.ledger import effects_section, ledger_section
from albert_ablate.report.sections.pairs import pairs_section
from albert_ablate.report.sections.rates import rates_section
from albert_ablate.report.sections.settings import SCOPE, methods_section, settings_section
from albert_ablate.report.sections.stability import divergence_section


def make(root: Path, ledger: Path | None = None, baseline: str | None = None) -> Page:
    """The report on the runs below `root`: claims first where there are any, else the leaderboard."""
    m = gather(root, ledger, baseline)
    claims = [ledger_section(m), effects_section(m)]
    leaders = leaderboard_section(m)
    sections = [
        *([claims[0], leaders, claims[1]] if m.ledger else [leaders]),
        curves_section(m),
        rates_section(m),
        pairs_section(m),
        divergence_section(m),
        depth_section(m),
        generalization_section(m),
        factorial_section(m),
        cost_section(m),
        settings_section(m),
        *([] if m.ledger else claims[:1]),
        methods_section(m),
    ]
    states = m.rows["status"].value_counts().to_dict()
    said = ", ".join(f"{n:,} {s}" for s, n in states.items())
    bad = f"; {len(m.unreadable):,} more cannot be read" if len(m.unreadable) else ""
    counts = f"{counted(len(m.arms), 'arm')}, {counted(len(m.rows), 'run')} ({said}{bad})."
    return Page(f"Report on {m.root.resolve().name}", " ".join([counts, *m.notes, SCOPE]), sections, m.arms)


def write(
    root: Path, output: Path | None, kind: str, ledger: Path | None = None, baseline: str | None = None
) -> list[Path]:
    """Write the report; gives the files. A page on the same inputs that is there already stays as it is."""
    output = output or Path({"html": "report.html", "md": "report.md", "csv": "report"}[kind])
    if kind != "csv":
        render.require()
    render.writable(output, () if kind == "csv" else (f".{kind}",))
    made_from = inputs(root, ledger or root / "ledger.json", baseline) if kind == "html" and root.is_dir() else ""
    if made_from and is_current(output, made_from):
        return [output]
    if made_from:  # there is a folder of runs
        render.begin_vega_bundle()
    with without_collector():
        with render.unchecked():
            page = make(root, ledger, baseline)
        if kind == "html":
            return write_html(page, output, made_from)
        return write_markdown(page, output) if kind == "md" else write_csv(page, output)
