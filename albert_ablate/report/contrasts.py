"""Contrasts of a ledger as rows and in words."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from albert_ablate.analysis.numbers import human
from albert_ablate.config import ConfigError
from albert_ablate.records.checked import read_checked


def read_ledger(file: Path, needed: bool) -> Mapping[str, Any] | None:
    """The ledger, None where there is none and none was asked for."""
    try:
        content = read_checked(file)
        if not isinstance(content["claims"], list):
            raise ValueError("its claims are not a list")
        for claim in content["claims"]:
            claim["verdict"], claim["name"]
            for part in (*claim["parts"], *(claim.get("secondary") or ())):
                contrast_name(part), contrast_row(part, ""), [number(look.get("p")) for look in part.get("looks") or ()]
        return content
    except (FileNotFoundError, NotADirectoryError):
        if needed:
            raise ConfigError(f"There is no ledger {file}: albert-ablate judge writes it.") from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise ConfigError(f"{file} is not a ledger that can be used ({why}): albert-ablate judge writes one.") from None


def number(value: Any) -> float:
    """A ledger's number: strict JSON has no word for infinite ones, so they are texts."""
    return math.nan if value is None else float(value)


def parts_of(claim: Mapping) -> list[tuple[Mapping, str]]:
    """The contrasts of a claim, each primary or secondary."""
    return [*((p, "primary") for p in claim["parts"]), *((p, "secondary") for p in claim.get("secondary") or [])]


def contrast_name(part: Mapping) -> str:
    """Name of a contrast: treatment against control."""
    return f"{part['treatment']} against {part['control']}"


def contrast_row(p: Mapping, kind: str) -> dict[str, Any]:
    """A contrast in columns. mean, low, high: the effect as it was judged, positive where it is what the claim says."""
    row: dict[str, Any] = {k: p.get(k) for k in ("treatment", "control", "measure", "unit", "direction")}
    row |= {"kind": kind} | {k: number(p.get(k)) for k in ("mean", "low", "high", "margin")}
    row |= dict(zip(("percent", "percent_low", "percent_high"), three_numbers(p.get("percent")), strict=True))
    row["pairs"] = int(number(p.get("pairs") or 0))
    for side in ("treatment", "control"):
        diverged_share, _, low, high = map(number, p.get(f"{side}_diverged") or (None,) * 4)
        row |= {f"{side}_diverged": diverged_share, f"{side}_diverged_low": low, f"{side}_diverged_high": high}
    for name in ("correlation", "pairs_to_margin"):
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), three_numbers(p.get(name)), strict=True))
    return row | {"signed_rank": p.get("rank"), "effect": effect_text(p)}


def interval_text(mean: float, low: float, high: float, unit: str = "") -> str:
    """+1.48 % (+0.99 to +1.96); without its ends where there are none."""
    text = f"{human(mean, 3, sign=True)}{unit}"
    return text if math.isnan(low) else f"{text} ({human(low, 3, sign=True)} to {human(high, 3, sign=True)})"


def three_numbers(values: Sequence | None) -> tuple[float, float, float]:
    """Mean and interval of a ledger's entry as floats; nan where there are none."""
    mean, low, high = map(number, values or (None,) * 3)
    return mean, low, high


def percent_text(share: float) -> str:
    """0.6 % and 80.6 %, but 0 % and 100 %."""
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def effect_text(p: Mapping) -> str:
    """-0.4 % (-0.9 to +0.1): the change of the measure from control to treatment, in percent or in its unit."""
    mean, low, high = three_numbers(p.get("percent") or [p.get(k) for k in ("mean", "low", "high")])
    unit = " %" if p.get("percent") else f" {p['unit']}" if p.get("unit") else ""
    if p.get("log") and not p.get("percent"):  # beyond the sum of the parts: on the scale of logarithms
        unit = " (log ratio)"
    if not p.get("percent") and p.get("direction") == "lower" and not p.get("singles"):
        mean, low, high = -mean, -high, -low
    if math.isnan(mean):
        return "no finite pair"
    if p.get("rank") == "not tested":
        return f"{human(mean, 3, sign=True)}{unit} (exact)"
    return interval_text(mean, low, high, unit)
