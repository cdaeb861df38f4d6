"""Claims and the effects they were judged by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import human
from albert_ablate.report import charts_verdicts
from albert_ablate.report.contrasts import (
    contrast_name,
    contrast_row,
    effect_text,
    number,
    parts_of,
    percent_text,
    three_numbers,
)
from albert_ablate.report.material import Material, counted
from albert_ablate.report.page import Figure, Interval, Section, Table
from albert_ablate.stats.sequential import FIRST


def ledger_section(m: Material) -> Section:
    """Section of the report: the claims of the ledger with verdicts, intervals and looks."""
    section = Section("Claims")
    if m.ledger is None:
        section.missing.append(
            f"Nothing is judged yet: albert-ablate judge sweeps/claims.yaml --runs {m.root.name or '.'} writes the "
            "ledger."
        )
        return section
    family = m.ledger.get("family") or {}
    section.text.append(
        f"{counted(len(m.ledger['claims']), 'claim')} of {m.ledger.get('claims_file', 'a claims file')}, in a family "
        f"of {human(family.get('size'))}, judged together at {human(family.get('alpha'))} (Holm)."
    )
    section.text.append(
        "In the drawings what the claim says lies to the right of the dashed zero, the margin is shaded, and the line "
        "is the interval that was judged."
    )
    rows, looks = list[dict[str, Any]](), list[dict[str, Any]]()
    for claim in m.ledger["claims"]:
        parts = parts_of(claim)
        rows_of_claim = [
            {"claim": claim["name"], "verdict": claim["verdict"], **contrast_row(p, kind)} for p, kind in parts
        ]
        seen = [
            {"claim": claim["name"], "contrast": contrast_name(p), "measure": p.get("measure")}
            | {k: number(look.get(k)) for k in ("pairs", "statistic", "p", "boundary")}
            for p, _ in parts
            for look in p.get("looks") or []
        ]
        rows, looks = rows + rows_of_claim, looks + seen
        title = f"Contrasts of {claim['name']}"
        tables = (
            [Table("parts", pd.DataFrame(), title, folded=True, shown=_contrast_cells(rows_of_claim))]
            if rows_of_claim
            else []
        )
        if seen:
            shown = pd.DataFrame(seen).drop(columns="claim")
            tables.append(Table("looks", shown, f"Every look of {claim['name']}, with its boundary", folded=True))
        sentence = str(claim.get("sentence") or "")
        notes = [str(claim.get("reason") or ""), *map(str, claim.get("notes") or []), _spent(claim.get("cost") or {})]
        notes = [n for n in dict.fromkeys(notes) if n and n not in sentence]
        if claim.get("edited"):
            how = claim.get("registration") or "edited after its first judged pair"
            notes.insert(0, f"This claim is not pre-registered: {how}.")
        section.cards.append(
            {
                "verdict": str(claim["verdict"]),
                "name": str(claim["name"]),
                "statement": str(claim.get("statement") or ""),
                "sentence": sentence[:1].upper() + sentence[1:],
                "notes": notes,
                "tables": tables,
                "drawings": [d for p in claim["parts"] if (d := interval_of(p)) is not None],
                "figures": [f for p in claim["parts"] if (f := looks_figure(claim, p)) is not None],
            }
        )
    if rows:
        section.tables.append(
            Table("ledger", pd.DataFrame(rows), "All contrasts", folded=True, shown=_contrast_cells(rows))
        )
    if looks:
        section.tables.append(Table("looks", pd.DataFrame(looks), "All looks", folded=True))
    return section


def interval_of(p: Mapping) -> Interval | None:
    """The interval and the margin of a contrast, to be drawn."""
    mean, low, high = three_numbers([p.get(k) for k in ("mean", "low", "high")])
    margin = number(p.get("margin"))
    if not math.isfinite(mean):
        return None
    size = (
        f"{human(100 * math.expm1(margin), 3)} %" if p.get("percent") else f"{human(margin, 3)} {p.get('unit') or ''}"
    )
    words = f"{contrast_name(p)}: {effect_text(p)}; margin ±{size.strip()}"
    return Interval(mean, low, high, margin, words, f"margin ±{size.strip()}")


def looks_figure(claim: Mapping, p: Mapping) -> Figure | None:
    """Every look at a contrast with its boundary, to the planned number of pairs."""
    seen = [look for look in p.get("looks") or [] if look.get("test", "t") == "t"]
    columns = ("pairs", "statistic", "boundary", "p")
    steps = pd.DataFrame([{k: number(look.get(k)) for k in columns} for look in seen], columns=columns, dtype=float)
    steps = steps[np.isfinite(steps["statistic"])]
    if steps.empty:
        return None
    planned = max(int(number(claim.get("N") or 0)), int(steps["pairs"].max()))
    ahead = boundaries(steps, planned)
    if p.get("test") == "moderated":  # which has degrees of freedom of its own
        ahead = ahead.iloc[:0]
    last = steps.iloc[-1]
    text = f"After {human(last['pairs'])} of {planned} pairs the statistic is {human(last['statistic'], 3)}"
    has_boundary = math.isfinite(last["boundary"])
    return Figure(
        f"Looks: {contrast_name(p)}, {p.get('measure')}",
        charts_verdicts.looks_of_contrast(steps, ahead, planned),
        f"To the planned {planned} pairs; outside the shaded band an effect is found.",
        data=f"{text}, its boundary {human(last['boundary'], 3)}." if has_boundary else f"{text}.",
    )


def boundaries(steps: pd.DataFrame, planned: int) -> pd.DataFrame:
    """pairs, boundary, below: of all looks to the planned one, at the level of the last look, which is the same at all:
    |t| must exceed t(1 - a/2, n - 1). Empty where the last look has no finite boundary."""
    from scipy.special import stdtr, stdtrit

    pairs, boundary = (float(steps[k].iloc[-1]) for k in ("pairs", "boundary"))
    if not (math.isfinite(boundary) and boundary > 0 and pairs > 1):
        return pd.DataFrame({"pairs": [], "boundary": [], "below": []})
    level = 2 * float(stdtr(pairs - 1, -boundary))
    n = np.arange(FIRST, planned + 1)
    at = -stdtrit(n - 1, level / 2)
    return pd.DataFrame({"pairs": n, "boundary": at, "below": -at})


def _spent(cost: Mapping) -> str:
    """So far 8 runs (2 of them of tuning), 1,000 tokens, 12 s."""
    runs, tuning = (int(number(cost.get(k) or 0)) for k in ("runs", "tuning_runs"))
    if not runs:
        return ""
    of = f" ({tuning:,} of them of tuning)" if tuning else ""
    tokens, seconds = (number(cost.get(k) or 0) for k in ("tokens", "seconds"))
    return f"So far {counted(runs, 'run')}{of}, {tokens:,.0f} tokens, {seconds:,.0f} s."


def _contrast_cells(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Contrasts as a reader wants them: an effect, a rate and a correlation with their intervals in one cell each."""

    def rate(row: Mapping, side: str) -> str | None:
        lost, low, high = (row[f"{side}_diverged{end}"] for end in ("", "_low", "_high"))
        return None if math.isnan(lost) else f"{lost:g} of {row['pairs']} ({percent_text(low)} to {percent_text(high)})"

    def triple(row: Mapping, name: str) -> str | None:
        mean, low, high = (human(row[f"{name}{end}"], 3) for end in ("", "_low", "_high"))
        return None if math.isnan(row[name]) else f"{mean} ({low} to {high})"

    return pd.DataFrame(
        [
            {k: row[k] for k in ("claim", "verdict") if k in row and len({r["claim"] for r in rows}) > 1}
            | {"contrast": f"{row['treatment']} against {row['control']}"}
            | {k: row[k] for k in ("kind", "measure", "effect", "margin", "pairs")}
            | {f"{side} diverged": rate(row, side) for side in ("treatment", "control")}
            | {"correlation": triple(row, "correlation"), "pairs to the margin": triple(row, "pairs_to_margin")}
            | {"signed rank": row["signed_rank"]}
            for row in rows
        ]
    )


def effects_section(m: Material) -> Section:
    """Section of the report: the effects of all judged contrasts in units of their margins."""
    section = Section("Effects")
    rows, without, refused, taken = [], [], [], dict[str, int]()
    for claim in (m.ledger or {}).get("claims", []):
        parts = parts_of(claim)
        if claim["verdict"] == "inadmissible":
            refused.append(str(claim["name"]))
            continue
        for p, kind in parts:
            margin, (mean, low, high) = (
                number(p.get("margin")),
                three_numbers([p.get(k) for k in ("mean", "low", "high")]),
            )
            name = str(claim["name"]) + (f": {contrast_name(p)}, {p.get('measure')}" if len(parts) > 1 else "")
            taken[name] = taken.get(name, 0) + 1
            name += f" ({taken[name]})" if taken[name] > 1 else ""
            if not (margin > 0 and math.isfinite(mean)):
                without.append(name)
                continue
            ends = [mean if math.isnan(x) else x for x in (low, high)]
            row = {"row": name, "mean": mean / margin, "low": ends[0] / margin, "high": ends[1] / margin}
            rows.append(row | {"text": effect_text(p), "verdict": claim["verdict"], "kind": kind})
    if rows:
        section.figures.append(
            Figure(
                "Effects in multiples of their margins",
                charts_verdicts.forest(pd.DataFrame(rows)),
                "Right of zero is what the claim says. Shaded: inside the margin. Filled: primary contrasts, with the "
                "interval that was judged; hollow: secondary ones, which carry no verdict. In words: how the measure "
                "changes from control to treatment, so that a loss that falls has a minus.",
                wide=True,
            )
        )
    else:
        section.missing.append("This chart needs a ledger with judged pairs: `albert-ablate judge` writes it.")
    if refused:
        section.text.append(f"Not drawn, because inadmissible: {', '.join(refused)}.")
    if without:
        section.text.append(f"Not drawn, for lack of a finite mean or a margin: {'; '.join(without)}.")
    return section
