"""What a page is made of: sections of text, tables and charts.

`html.py` writes a page as one file or for a server, `files.py` as Markdown with pictures, or its tables as CSV.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import DIGITS, human, is_number
from albert_ablate.report import render

SAME_DECIMALS_RATIO = 1000  # the greatest of a column over the least, where its numbers have as many decimals


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

    @cached_property
    def embedded(self) -> tuple[str, str]:
        """A digest of the chart as a page has it, and that as JSON (`render.embedded`)."""
        return render.embedded(self.chart)

    @property
    def spoken(self) -> str:
        """Text for screen readers: title and data."""
        return f"{self.title}. {self.data}".strip()


@dataclass(frozen=True)
class Cell:
    """What else a page shows of a cell: a state that has a color, a share that is done as a bar, an address."""

    state: str = ""
    done: float | None = None
    link: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values: numbers are written short in a page, whole in CSV.

    shown: what a page has in their place, such as a rate and its interval in one cell. by: column of `shown` -> column
    of `rows` that it is sorted by. arm: the column that names an arm: a page shows the rows of the arms that its filter
    has chosen. first: before the section's charts. more: by row and column, what else a page shows of a cell.
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
    more: Sequence[Sequence[Cell | None]] = ()

    @property
    def display(self) -> pd.DataFrame:
        """Cells as they are shown: texts where there are any, else the values."""
        return self.rows if self.shown is None else self.shown

    @cached_property
    def cells(self) -> list[list[str]]:
        """Cells of `display` as text, by row; measurements of similar size in a column have equally many decimals."""
        columns = [_aligned(self.display.iloc[:, i].tolist()) for i in range(self.display.shape[1])]
        return [list(row) for row in zip(*columns, strict=True)]

    @cached_property
    def arms(self) -> list[Any]:
        """The arm of each row; None where rows are not of arms."""
        own = next((t for t in (self.rows, self.display) if self.arm in t and len(t) == len(self.display)), None)
        return [None] * len(self.display) if own is None else own[self.arm].tolist()

    @cached_property
    def sorted_by(self) -> list[list[float | None] | None]:
        """Per column of `display` the numbers that it is sorted by; None where it is sorted as text."""
        out: list[list[float | None] | None] = []
        for i, name in enumerate(map(str, self.display.columns)):
            own = self.rows[self.by[name]] if name in self.by else self.display.iloc[:, i]
            numbers = name in self.by or self.numeric[i]
            out.append([_sortable(v) for v in own] if numbers else None)
        return out

    @cached_property
    def numeric(self) -> list[bool]:
        """Which columns of `display` hold numbers alone."""
        return [
            bool(len(own := self.display.iloc[:, i].dropna())) and all(is_number(v) for v in own)
            for i in range(self.display.shape[1])
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
    if not fine or not long or max(fine) >= 1e4 or max(fine) > SAME_DECIMALS_RATIO * min(fine):
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
    done: tuple[float, str] | None = None  # a share as a bar, and what it says
    markup: tuple[Any, Any] | None = None  # of a page that is made again and again: for which looks, and the HTML

    @property
    def all_figures(self) -> list[Figure]:
        """Charts of the section and of its cards."""
        return [*self.figures, *(f for card in self.cards for f in card.get("figures", ()))]

    @property
    def anchor(self) -> str:
        """Id of the heading in the page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class ColorScale:
    """What the colors of heat maps mean: the values at the two ends of the scale."""

    low: float
    high: float
    log: bool

    @property
    def labels(self) -> tuple[str, str, str]:
        """Labels of the low end, the middle and the high end."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return human(self.low, 3), human(middle, 3), human(self.high, 3)


@dataclass(frozen=True)
class Interval:
    """A drawing of an interval and a margin for a card, all in one unit; zero is in the middle of the margin."""

    mean: float
    low: float
    high: float
    margin: float
    description: str  # all of it, for those who do not see it
    note: str = ""  # below the drawing

    @property
    def positions(self) -> dict[str, float] | None:
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
