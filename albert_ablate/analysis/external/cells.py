"""A run of another trainer as its source holds it, and parsers for table cells."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOT_FINITE = ("diverged", "nan", "inf", "+inf", "-inf", "infinity", "-infinity")
WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


@dataclass(frozen=True)
class RawRun:
    """A run as its source has it. facts: one value a column. rows: its history, a mapping of columns each, in order."""

    place: str  # of the source: a line, a folder, an address
    facts: Mapping[str, Any]
    rows: Callable[[], Sequence[Mapping[str, Any]]]


def whole_number(value: Any) -> int | None:
    """Parse a cell as a whole number."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    return int(float(value)) if WHOLE.fullmatch(str(value).strip()) else None


def number(value: Any) -> float | None:
    """The number that a cell holds: nan where it says that the run diverged, None where it holds none."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip().lower()
        if text in NOT_FINITE:
            return math.nan
        try:
            return float(text)
        except ValueError:
            return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
