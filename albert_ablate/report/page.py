"""Sections of text, tables and charts, written as one HTML page, as Markdown with pictures, or as CSV.

A page holds everything it needs: Vega once, the tables behind the charts by column, a chart drawn when it comes into
view. Nothing is fetched, and a policy in the page forbids it. Whatever comes from records is escaped.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import DIGITS, human, is_number, visible
from albert_ablate.config import unwritable
from albert_ablate.records.atomic import replace_file
from albert_ablate.report import render, style

LIKE = 1000  # the greatest of a column over the least, where its numbers have as many decimals
FOLDED = 40  # rows of a folded table that Markdown, which cannot fold, still has
UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True)
class Figure:
    """One chart. arm: shown with the filter's arm; group: shown when chosen among the section's groups; data: one
    sentence of what it shows, for those who do not see it; small: several of them in a row."""

    title: str
    chart: Any
    note: str = ""
    arm: str | None = None
    group: str | None = None
    wide: bool = False
    data: str = ""
    small: bool = False

    @property
    def spoken(self) -> str:
        return f"{self.title}. {self.data}".strip()


@dataclass(frozen=True)
class Table:
    """Rows of plain values: numbers are written short in a page, whole in CSV.

    shown: what a page has in their place, such as a rate and its interval in one cell. by: column of `shown` -> column
    of `rows` that it is sorted by. arm: the column that names an arm: a page shows the rows of the arms that its filter
    has chosen. first: before the section's charts.
    """

    name: str  # of the CSV file
    rows: pd.DataFrame
    title: str = ""
    note: str = ""
    folded: bool = False
    shown: pd.DataFrame | None = None
    by: Mapping[str, str] = field(default_factory=dict)
    arm: str = "arm"
    first: bool = False

    @property
    def words(self) -> pd.DataFrame:
        return self.rows if self.shown is None else self.shown

    @property
    def cells(self) -> list[list[str]]:
        """`words` written out, by row. Measurements of a column that is of one size have as many decimals each, so that
        they can be compared down the column."""
        columns = [_aligned(self.words.iloc[:, i].tolist()) for i in range(self.words.shape[1])]
        return [list(row) for row in zip(*columns, strict=True)]

    @property
    def arms(self) -> list[Any]:
        """The arm of each row; None where rows are not of arms."""
        own = next((t for t in (self.rows, self.words) if self.arm in t and len(t) == len(self.words)), None)
        return [None] * len(self.words) if own is None else own[self.arm].tolist()

    @property
    def sorted_by(self) -> list[list[float | None] | None]:
        """Per column of `words` the numbers that it is sorted by; None where it is sorted as text."""
        out: list[list[float | None] | None] = []
        for i, name in enumerate(map(str, self.words.columns)):
            own = self.rows[self.by[name]] if name in self.by else self.words.iloc[:, i]
            numbers = name in self.by or self.numeric[i]
            out.append([_sortable(v) for v in own] if numbers else None)
        return out

    @property
    def numeric(self) -> list[bool]:
        """Which columns of `words` hold numbers alone."""
        return [
            bool(len(own := self.words.iloc[:, i].dropna())) and all(is_number(v) for v in own)
            for i in range(self.words.shape[1])
        ]


def _sortable(value: Any) -> float | None:
    """The number; None, which comes last, for none. Infinite ones are larger than any other."""
    if not is_number(value) or math.isnan(value):
        return None
    return float(np.clip(float(value), -1e300, 1e300))


def _aligned(values: Sequence[Any]) -> list[str]:
    text = [human(v) for v in values]
    fine = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v) and v]
    long = any(len(re.sub(r"\D", "", t).lstrip("0")) >= DIGITS for t in text)  # settings such as 0.002 are short
    if not fine or not long or max(fine) >= 1e4 or max(fine) > LIKE * min(fine):
        return text
    decimals = max(0, DIGITS - 1 - math.floor(math.log10(max(fine))))
    return [
        f"{v + 0.0:.{decimals}f}".replace("-", "−") if isinstance(v, float) and math.isfinite(v) else t
        for v, t in zip(values, text, strict=True)
    ]


@dataclass
class Section:
    """What a page is made of. missing: one line in place of what there is no material for."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    zoom: bool = False  # whether its charts can be zoomed, which a page says and a picture need not
    cards: list[Mapping[str, Any]] = field(default_factory=list)  # claims: verdict, name, statement, sentence, details
    scales: dict[str, "ColorScale"] = field(default_factory=dict)  # group of small figures -> the one legend of all
    warnings: list[str] = field(default_factory=list)  # of the text: what was said on the terminal too
    facts: list[tuple[str, str]] = field(default_factory=list)  # what is measured -> its value, in large print

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class ColorScale:
    """What the colors of heat maps mean: the values at the two ends of the scale."""

    low: float
    high: float
    log: bool

    @property
    def words(self) -> tuple[str, str, str]:
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return human(self.low, 3), human(middle, 3), human(self.high, 3)


@dataclass(frozen=True)
class Interval:
    """A drawing of an interval and a margin for a card, all in one unit; zero is in the middle of the margin."""

    mean: float
    low: float
    high: float
    margin: float
    words: str  # all of it, for those who do not see it
    note: str = ""  # below the drawing

    @property
    def places(self) -> dict[str, float] | None:
        """Where to draw what, from 0 to 100; None where there is no mean."""
        if not math.isfinite(self.mean):
            return None
        margin = self.margin if math.isfinite(self.margin) else 0.0
        low, high = (self.mean if math.isnan(x) else x for x in (self.low, self.high))
        finite = [abs(v) for v in (self.mean, margin, low, high) if math.isfinite(v)]
        reach = min(1.15 * max(finite), 12 * max(margin, abs(self.mean))) or 1.0

        def at(x: float) -> float:
            return round(float(np.clip(50 + 50 * x / reach, 0, 100)), 2)

        return {"low": at(low), "high": at(high), "mean": at(self.mean), "left": at(-margin), "right": at(margin)}


@dataclass(frozen=True)
class Page:
    """A page: title, subtitle, sections, and the arms of its filter."""

    title: str
    subtitle: str
    sections: list[Section]
    arms: Sequence[str] = ()  # of the filter, in the order of the charts' colors
    filtered: bool = True  # whether it has a filter of its arms


def html(page: Page) -> str:
    """The page as one file."""
    import jinja2

    frames: dict[str, Any] = {}
    figures = [f for s in page.sections for f in (*s.figures, *(f for c in s.cards for f in c.get("figures", ())))]
    every = page.arms if isinstance(page.arms, style.Arms) else style.Arms(page.arms)
    content = {
        "arms": list(page.arms),
        "shown": style.SHOWN,
        "themes": {
            "light": style.theme(arms=every),
            "dark": style.theme(dark=True, arms=every) | {"background": "transparent"},
        },
        "charts": [_responsive(f.chart, f"f{i}", frames) for i, f in enumerate(figures)],
        "tables": frames,
    }
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup is ours
    )
    arms = list(zip(every, every.colors, every.dashes, strict=True))
    return environment.get_template("page.html.j2").render(
        page=page,
        arms=arms,
        numbers={id(f): i for i, f in enumerate(figures)},
        identity=id,
        content=safe_json(content),
        vega=render.vega_bundle(),
        light=style.LIGHT,
        dark=style.DARK,
        dashes=[" ".join(map(str, d)) for d in style.DASHES],
        number_of={arm: i for i, arm in enumerate(every)},
    )


def safe_json(value: Any) -> str:
    """JSON that stands safely in a script element: no text of it can end the element or begin another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029]", lambda m: UNSAFE[m.group()], text)


def _responsive(chart: Any, prefix: str, frames: dict[str, Any]) -> dict[str, Any]:
    """The chart's specification as wide as its place, its tables added to `frames`; the page's filter is the legend."""
    spec, own = render.specification(chart)
    names = {name: f"{prefix}-{name}" for name in own}
    for name, frame in own.items():
        frames[names[name]] = packed(frame)

    filtered = any(p["name"] == "arms" for p in spec.get("params", ()))

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "name" in node and node["name"] in names and len(node) == 1:
                node["name"] = names[node["name"]]
            if filtered and node.get("field") == "arm" and "legend" in node:
                node["legend"] = None
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(spec)
    spec.pop("config", None)
    spec.setdefault("height", style.HEIGHT)
    return spec | {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}


def packed(frame: pd.DataFrame) -> dict[str, Any]:
    """A table by column, numbers rounded: {"n": rows, "c": {name: values, or {"u": unique values, "i": indices}}}."""
    columns: dict[str, Any] = {}
    for name in frame:
        column = frame[name]
        if column.dtype.kind in "biuf":
            values = _numbers(column.to_numpy())
        else:
            values = [
                None if v is None or v is pd.NA or v != v else v if isinstance(v, bool | int) else str(v)
                for v in column.to_numpy(object)  # ten times as fast as going through a column of texts
            ]
        unique = list(dict.fromkeys(values))
        if 4 * len(unique) < len(values):
            index = {v: i for i, v in enumerate(unique)}
            columns[str(name)] = {"u": unique, "i": [index[v] for v in values]}
        else:
            columns[str(name)] = values
    return {"n": len(frame), "c": columns}


def _numbers(values: np.ndarray) -> list[Any]:
    if values.dtype.kind in "bui":
        return values.tolist()
    whole = np.isfinite(values) & (values == np.round(values)) & (np.abs(values) < 1e15)
    return [
        int(v) if i else float(f"{v:.{DIGITS + 1}g}") if math.isfinite(v) else None
        for v, i in zip(values.tolist(), whole.tolist(), strict=True)
    ]


def write_html(page: Page, output: Path, inputs: str = "") -> list[Path]:
    """inputs: a digest of all that the page was made from, by which `is_current` knows the file again."""
    content = html(page).encode()
    if inputs and not any(section.warnings for section in page.sections):  # which must be said again
        content += _stamp(inputs, content)
    _replace(output, content)
    return [output]


def is_current(output: Path, inputs: str) -> bool:
    """Whether the file is a page made from just these inputs, and has not been changed since."""
    try:
        content = output.read_bytes()
    except OSError:
        return False
    stamp = _stamp(inputs, b"")
    return content.endswith(_stamp(inputs, content[: -len(stamp)]))


def _stamp(inputs: str, content: bytes) -> bytes:
    return f"<!-- {inputs} {hashlib.sha256(content).hexdigest()} -->\n".encode()


def write_markdown(page: Page, output: Path) -> list[Path]:
    """Markdown, and its charts as PNG in a folder of the same name beside it."""
    folder = output.with_name(f"{output.stem}_files")
    files, lines = [output], [f"# {_plain(page.title)}", "", _plain(page.subtitle), ""]
    for number, section in enumerate(page.sections, 1):
        lines += [f"## {_plain(section.title)}", ""]
        lines += [line for text in [*section.text, *section.missing] for line in (_plain(text), "")]
        lines += [*(f"- {_plain(name)}: {_plain(value)}" for name, value in section.facts), ""] if section.facts else []
        for card in section.cards:
            lines += [f"**{_plain(card['statement'] or card['name'])}**", ""]
            lines += [f"{_plain(card['verdict'])} ({_plain(card['name'])})", ""]
            lines += [line for d in card.get("drawings", ()) for line in (_plain(d.words), "")]
            lines += [line for text in [card["sentence"], *card["notes"]] if text for line in (_plain(text), "")]
        for i, (title, chart, note) in enumerate(_pictures(section), 1):
            file = folder / f"{number:02d}_{section.anchor}_{i:02d}.png"
            _make(folder)
            _replace(file, render.picture(chart, ".png", arms=page.arms))
            files.append(file)
            lines += [f"![{_plain(title)}]({folder.name}/{file.name})", ""]
            lines += [_plain(note), ""] if note else []
        for table in section.tables:
            lines += [_plain(table.title), ""] if table.title else []
            if table.folded and len(table.words) > FOLDED:
                lines += [f"({len(table.words):,} rows: --format csv has them, in {_plain(table.name)}.csv.)", ""]
                continue
            lines += [*_markdown_rows(table), ""]
            lines += [_plain(table.note), ""] if table.note else []
    _replace(output, ("\n".join(lines).rstrip() + "\n").encode())
    return files


def _pictures(section: Section) -> Iterator[tuple[str, Any, str]]:
    """title, chart, note; the figures of a group in one chart."""
    import altair as alt

    for figure in [*section.figures, *(f for card in section.cards for f in card.get("figures", ()))]:
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
            _replace(file, _csv(table.rows).encode("utf-8", "replace"))
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
    yield "| " + " | ".join(_plain(str(c)) for c in table.words.columns) + " |"
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


def _replace(file: Path, content: bytes) -> None:
    try:
        replace_file(file, content)
    except OSError as error:
        raise unwritable(file, error) from None
