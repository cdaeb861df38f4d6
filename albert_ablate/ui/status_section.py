"""Where the runs stand, as the first section of a live page: progress, time left, arms by seeds."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pandas as pd

from albert_ablate.report.page import Cell, Section, Table
from albert_ablate.studies.states import last_line
from albert_ablate.studies.status import cell, share_done, time_left

MAX_SEED_COLUMNS = 12  # columns; arms of more seeds have the states of all counted

Arms = Mapping[str, Mapping[int, Mapping[str, Any]]]


def status_section(table: Arms) -> Section:
    """The section of `studies.status.arms`: arm -> seed -> record. Each run is a link to its own page."""
    section = Section("Status")
    records = [record for row in table.values() for record in row.values()]
    if not records:
        return section
    counts = pd.Series([record["status"] for record in records]).value_counts()
    said = [f"{len(records):,} run{'s' * (len(records) != 1)}", *(f"{n:,} {status}" for status, n in counts.items())]
    share = sum(map(share_done, records)) / len(records)
    left = time_left(records)
    section.done = share, f"{share:.0%} done{f', {left}' if left else ''}"
    section.text.append(f"{said[0]}: {', '.join(said[1:])}.")
    section.text += [
        f"{arm} seed={seed}: {last_line(record.get('error'))}"
        for arm, row in table.items()
        for seed, record in row.items()
        if record["status"] in ("failed", "unreadable")
    ]
    section.tables.append(_by_seed(table) if max(map(len, table.values())) <= MAX_SEED_COLUMNS else _counted(table))
    return section


def _by_seed(table: Arms) -> Table:
    seeds = sorted({seed for row in table.values() for seed in row})
    rows, more = [], []
    for arm, row in table.items():
        rows.append({"arm": arm, **{f"seed {s}": cell(row[s]) if s in row else "" for s in seeds}})
        more.append([None, *(_cell(row[s]) if s in row else None for s in seeds)])
    return Table("status", pd.DataFrame(rows), "Arms by seeds", more=more)


def _cell(record: Mapping[str, Any]) -> Cell:
    folder = str(record.get("folder", ""))
    link = "/run/" + "/".join(quote(part, safe="") for part in folder.rsplit("/", 2)[-2:]) if folder else ""
    running = record["status"] == "running"
    return Cell(record["status"], share_done(record) if running else None, link)


def _counted(table: Arms) -> Table:
    states = [record["status"] for row in table.values() for record in row.values()]
    rows = [
        {"arm": arm, "runs": len(row)} | {s: sum(r["status"] == s for r in row.values()) for s in dict.fromkeys(states)}
        for arm, row in table.items()
    ]
    return Table("status", pd.DataFrame(rows), "Arms and the states of their runs")
