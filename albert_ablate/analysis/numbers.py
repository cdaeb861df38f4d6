"""Numbers and texts as a reader sees them: one way of writing them for every page, table, chart label and sentence."""

import math
import re
from typing import Any

import numpy as np

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
DIGITS = 4
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# the same in a chart's tooltip: four significant digits, never an exponent
TIP = ",.4~r"


def visible(value: Any) -> str:
    """Text in which nothing acts unseen: control characters, and those that turn the direction of what follows."""
    return CONTROLS.sub("\ufffd", str(value).encode("utf-8", "replace").decode("utf-8"))


def is_number(value: Any) -> bool:
    """Whether a value is a number; booleans are not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)


def human(value: Any, digits: int = DIGITS, sign: bool = False) -> str:
    """A value in words: 18,160 and 0.9861, 1.2 × 10⁻⁵ and 4.2 × 10¹², − for a minus, – for nothing.

    Fractions have `digits` significant digits; whole numbers below 10⁹, and fractions from 10,000 on, are written
    out. sign: a plus before what is positive.
    """
    if value is None or type(value).__name__ == "NAType":  # pandas' own, which is not imported for it
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(human(v) for v in value) + "]"
    if not is_number(value):
        return visible(value)
    x = float(value)
    if math.isnan(x):
        return "–"
    plus = "+" if sign else ""
    if math.isinf(x):
        return (f"{plus}∞" if x > 0 else "−∞").replace("-", "−")
    x += 0.0  # no minus before a zero
    size = abs(float(f"{x:.{digits}g}"))
    if size >= 1e9 or 0 < size < 1e-4:
        mantissa, exponent = f"{x:{plus}.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa} × 10{str(int(exponent)).translate(RAISED)}"
    elif x == int(x) or size >= 10_000:
        text = f"{x:{plus},.0f}" if size >= 10_000 else f"{x:{plus}.0f}"
    else:
        text = f"{x:{plus}.{digits}g}" if size < 10 ** (digits - 1) else f"{x:{plus}.0f}"
    return text.replace("-", "−")
