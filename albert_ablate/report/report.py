"""`albert-ablate report RUNS`: all runs below a folder, and what was judged of them, as one report.

An arm here is a setting, named by what it differs in from the others. Tuning runs appear in the tuning section only.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from albert_ablate.collector import without_collector
from albert_ablate.report import render
from albert_ablate.report.files import write_csv, write_markdown
from albert_ablate.report.histories import inputs, tuning_stamp
from albert_ablate.report.html import is_current, write_html
from albert_ablate.report.material import Material, counted, gather
from albert_ablate.report.page import Page, Section
from albert_ablate.report.section_cache import SectionCache
from albert_ablate.report.sections.cost import cost_section
from albert_ablate.report.sections.curves import curves_section
from albert_ablate.report.sections.depth import depth_section
from albert_ablate.report.sections.factors import factorial_section
from albert_ablate.report.sections.generalization import generalization_section
from albert_ablate.report.sections.leaderboard import leaderboard_section
from albert_ablate.report.sections.ledger import effects_section, ledger_section
from albert_ablate.report.sections.pairs import pairs_section
from albert_ablate.report.sections.rates import rates_section
from albert_ablate.report.sections.search import search_section
from albert_ablate.report.sections.settings import SCOPE, methods_section, settings_section
from albert_ablate.report.sections.stability import divergence_section

SECTIONS = (  # in the order of the page
    leaderboard_section,
    search_section,
    effects_section,
    curves_section,
    rates_section,
    pairs_section,
    divergence_section,
    depth_section,
    generalization_section,
    factorial_section,
    cost_section,
    settings_section,
    methods_section,
)
OF_DONE = (
    search_section,
    ledger_section,
    effects_section,
    leaderboard_section,
    pairs_section,
    factorial_section,
    cost_section,
)


def make(
    root: Path, ledger: Path | None = None, baseline: str | None = None, cache: SectionCache | None = None
) -> Page:
    """The report on the runs below `root`: claims first where there are any, else the leaderboard.

    cache: of a page that is updated again and again; a section may then be slightly out of date
    (`SectionCache.sections_of`)."""
    m = gather(root, ledger, baseline, cache)
    judged = json.dumps(m.ledger, default=str), *(tuning_stamp(root) if cache else ())
    of_all = *m.stamps.items(), *m.rows["status"], judged
    of_done = *((folder, m.stamps[folder]) for folder in m.done["folder"]), judged  # what other runs do moves nothing
    chosen = [s for s in SECTIONS if m.ledger or s is not effects_section]
    order = [ledger_section, *chosen] if m.ledger else [*chosen[:-1], ledger_section, chosen[-1]]
    wanted = {s.__name__: (of_done if s in OF_DONE else of_all, partial(_section, s, m)) for s in order}
    sections = [section for section in m.cache.sections_of(wanted, m.appearance).values() if section is not None]
    states = m.rows["status"].value_counts().to_dict()
    said = ", ".join(f"{n:,} {s}" for s, n in states.items())
    bad = f"; {len(m.unreadable):,} more cannot be read" if len(m.unreadable) else ""
    counts = f"{counted(len(m.arms), 'arm')}, {counted(len(m.rows), 'run')} ({said}{bad})."
    return Page(f"Report on {m.root.resolve().name}", " ".join([counts, *m.notes, SCOPE]), sections, m.arms)


def _section(section: Callable[[Material], Section | None], m: Material) -> Section | None:
    out = section(m)
    if out and m.cache.keeps:  # embed the charts now, so that their cost counts towards the time limit
        for figure in out.all_figures:
            figure.embedded  # noqa: B018
    return out


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
