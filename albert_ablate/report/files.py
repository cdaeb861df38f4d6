"""A page as Markdown with pictures, and its tables as CSV."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from albert_ablate.analysis.numbers import visible
from albert_ablate.config import unwritable
from albert_ablate.records.atomic import replace_file
from albert_ablate.report import render, style
from albert_ablate.report.page import Page, Section, Table

MAX_FOLDED_ROWS = 40  # rows of a folded table that Markdown, which cannot fold, still has


def write_markdown(page: Page, output: Path) -> list[Path]:
    """Markdown, and its charts as PNG in a folder of the same name beside it."""
    folder = output.with_name(f"{output.stem}_files")
    files, lines = [output], [f"# {_plain(page.title)}", "", _plain(page.subtitle), ""]
    for number, section in enumerate(page.sections, 1):
        lines += [f"## {_plain(section.title)}", ""]
        lines += [line for text in [*section.text, *section.missing] for line in (_plain(text), "")]
        lines += [_plain(section.done[1]), ""] if section.done else []
        lines += [*(f"- {_plain(name)}: {_plain(value)}" for name, value in section.facts), ""] if section.facts else []
        for card in section.cards:
            lines += [f"**{_plain(card['statement'] or card['name'])}**", ""]
            lines += [f"{_plain(card['verdict'])} ({_plain(card['name'])})", ""]
            lines += [line for d in card.get("drawings", ()) for line in (_plain(d.description), "")]
            lines += [line for text in [card["sentence"], *card["notes"]] if text for line in (_plain(text), "")]
        for i, (title, chart, note) in enumerate(_pictures(section), 1):
            file = folder / f"{number:02d}_{section.anchor}_{i:02d}.png"
            _make(folder)
            replace(file, render.picture(chart, ".png", arms=page.arms))
            files.append(file)
            lines += [f"![{_plain(title)}]({folder.name}/{file.name})", ""]
            lines += [_plain(note), ""] if note else []
        for table in section.tables:
            lines += [_plain(table.title), ""] if table.title else []
            if table.folded and len(table.display) > MAX_FOLDED_ROWS:
                lines += [f"({len(table.display):,} rows: --format csv has them, in {_plain(table.name)}.csv.)", ""]
                continue
            lines += [*_markdown_rows(table), ""]
            lines += [_plain(table.note), ""] if table.note else []
    replace(output, ("\n".join(lines).rstrip() + "\n").encode())
    return files


def _pictures(section: Section) -> Iterator[tuple[str, Any, str]]:
    """title, chart, note; the figures of a group in one chart."""
    import altair as alt

    for figure in section.all_figures:
        if figure.group is None:
            yield figure.title, figure.chart.properties(title=figure.title, width=style.WIDTH), figure.note
    for group in dict.fromkeys(f.group for f in section.figures if f.group is not None):
        own = [f.chart.properties(title=f.title, width=260, height=170) for f in section.figures if f.group == group]
        chart = alt.concat(*own, columns=3).resolve_scale(color="shared").properties(title=alt.Title(group, offset=12))
        yield group, chart, ""


def write_csv(page: Page, output: Path) -> list[Path]:
    """Every table as a CSV file in the folder `output`."""
    _make(output)
    files = []
    for section in page.sections:
        for table in section.tables:
            file = output / f"{table.name}.csv"
            replace(file, _csv(table.rows).encode("utf-8", "replace"))
            files.append(file)
    return files


def _csv(rows: pd.DataFrame) -> str:
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_harmless, rows.columns))
    for row in rows.itertuples(index=False):
        writer.writerow([_harmless(v) for v in row])
    return out.getvalue()


def _harmless(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula stands behind an apostrophe; a list is JSON."""
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, default=str, ensure_ascii=False)
    if value is None or value is pd.NA or value != value:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _markdown_rows(table: Table) -> Iterator[str]:
    yield "| " + " | ".join(_plain(str(c)) for c in table.display.columns) + " |"
    yield "|" + "".join(" ---: |" if number else " --- |" for number in table.numeric)
    for row in table.cells:
        yield "| " + " | ".join(map(_plain, row)) + " |"


def _plain(text: Any) -> str:
    """Text in which Markdown sees no markup of its own, on one line."""
    text = visible(" ".join(str(text).split()))
    text = re.sub(r"([\\`*_\[\]|<>#&~$])", r"\\\1", text)
    return re.sub(r"^(\d*)([-+.)])(?=\s|$)", r"\1\\\2", text)  # no list begins here


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def replace(file: Path, content: bytes) -> None:
    """Write a file whole. Raises ConfigError where that is not allowed."""
    try:
        replace_file(file, content)
    except OSError as error:
        raise unwritable(file, error) from None
