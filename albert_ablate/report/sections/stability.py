"""How many runs of each arm diverged."""

import math

import pandas as pd

from albert_ablate.report.contrasts import percent_text
from albert_ablate.report.material import Material
from albert_ablate.report.page import Section, Table
from albert_ablate.stats.effects import rate_interval


def divergence_section(m: Material) -> Section:
    rows, shown = [], []
    runs = dict(list(m.rows.filter(["name", "status", "divergence"]).groupby("name")))
    for arm in m.arms:
        own = runs[arm]
        done = own[own["status"].isin(["finished", "diverged"])]
        lost = done[done["status"] == "diverged"]
        share, low, high = rate_interval(len(lost), len(done)) if len(done) else (math.nan,) * 3
        kinds = lost["divergence"].dropna().value_counts().to_dict() if "divergence" in lost else {}
        others = own[~own.index.isin(done.index)]["status"].value_counts().to_dict()
        counts = {"arm": arm, "seeds": len(done), "diverged": len(lost)}
        rows.append(counts | {"share": share, "low": low, "high": high} | {**kinds, **others})
        text = None if math.isnan(share) else f"{percent_text(share)} ({percent_text(low)} to {percent_text(high)})"
        said = {
            k: ", ".join(f"{n} {w.replace('_', ' ')}" for w, n in found.items()) or None
            for k, found in (("how", kinds), ("not done", others))
        }
        shown.append(counts | {"share that diverged": text} | said)
    table = pd.DataFrame(rows)
    whole = [c for c in table if c not in ("arm", "share", "low", "high")]
    table[whole] = table[whole].fillna(0).astype(int)
    note = (
        "Seeds: finished or diverged; share: with its exact 95 % interval (Clopper and Pearson 1934). Diverged runs "
        "are never dropped."
    )
    return Section("Divergence", tables=[Table("divergence", table, note=note, shown=pd.DataFrame(shown))])
