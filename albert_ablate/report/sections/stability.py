"""How many runs of each arm diverged."""

import math
from functools import cache

import pandas as pd

from albert_ablate.report.contrasts import percent_text
from albert_ablate.report.material import Material
from albert_ablate.report.page import Section, Table
from albert_ablate.stats.effects import rate_interval


def divergence_section(m: Material) -> Section:
    """Section of the report: states of the runs, and how many diverged, how, with exact intervals."""
    rows, shown = [], []
    interval = cache(rate_interval)  # arms with as many runs and losses have the same
    ended = m.rows["status"].isin(["finished", "diverged"])
    states, done, lost = (
        _counts(m.rows[~ended], "status"),
        m.rows.loc[ended, "name"].value_counts(),
        m.rows.loc[m.rows["status"] == "diverged"],
    )
    diverged, ways = lost["name"].value_counts(), _counts(lost, "divergence")
    for arm in m.arms:
        n, k = int(done.get(arm, 0)), int(diverged.get(arm, 0))
        share, low, high = interval(k, n) if n else (math.nan,) * 3
        kinds, others = ways.get(arm, {}), states.get(arm, {})
        counts = {"arm": arm, "seeds": n, "diverged": k}
        rows.append(counts | {"share": share, "low": low, "high": high} | {**kinds, **others})
        text = None if math.isnan(share) else f"{percent_text(share)} ({percent_text(low)} to {percent_text(high)})"
        columns = {
            k: ", ".join(f"{n} {w.replace('_', ' ')}" for w, n in found.items()) or None
            for k, found in (("how", kinds), ("not done", others))
        }
        shown.append(counts | {"share that diverged": text} | columns)
    table = pd.DataFrame(rows)
    whole = [c for c in table if c not in ("arm", "share", "low", "high")]
    table[whole] = table[whole].fillna(0).astype(int)
    note = (
        "Seeds: finished or diverged; share: with its exact 95 % interval (Clopper and Pearson 1934). Diverged runs "
        "are never dropped."
    )
    return Section("Divergence", tables=[Table("divergence", table, note=note, shown=pd.DataFrame(shown))])


def _counts(rows: pd.DataFrame, column: str) -> dict[str, dict[str, int]]:
    """arm -> value of the column -> how many of its rows have it."""
    out: dict[str, dict[str, int]] = {}
    if column in rows:
        for (arm, value), n in rows.groupby(["name", column]).size().items():  # type: ignore[misc]
            out.setdefault(str(arm), {})[str(value)] = int(n)
    return out
