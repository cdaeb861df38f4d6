"""Which arm leads, by how much, and how sure that is."""

import math
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import human
from albert_ablate.analysis.tables import mean_interval, means, of_other_size, percent
from albert_ablate.report import charts_arms
from albert_ablate.report.material import Material, counted, extremes, relative_spread
from albert_ablate.report.page import Figure, Section, Table

SAME_COST = 0.01  # cost that differs by less is the same


def leaderboard(m: Material) -> pd.DataFrame:
    """A row an arm, the best first: runs and how many diverged, mean and standard deviation of the losses of finished
    runs, and the paired difference to the baseline in percent with its 95 % t interval (minus: better)."""
    quality, compared = m.quality[0], m.compared[0]
    pairs = {arm: x.to_numpy(float) for arm, x in m.paired_losses.groupby("arm")["d"]}
    done, fine = m.done["name"].value_counts(), m.finished.groupby("name")
    table = pd.DataFrame({"arm": m.arms, "seeds": done.reindex(m.arms, fill_value=0).to_numpy(int)})
    table["diverged"] = table["seeds"] - fine.size().reindex(m.arms, fill_value=0).to_numpy(int)
    for column in dict.fromkeys((quality, compared)):
        has_column = column in m.finished
        for name, statistic in ((column, "mean"), (f"{column}_sd", "std")):
            table[name] = fine[column].agg(statistic).reindex(m.arms).to_numpy(float) if has_column else math.nan
    rows = []
    for arm in m.arms:
        x = pairs.get(arm, np.empty(0))
        mean, low, high = mean_interval(x)
        row: dict[str, Any] = {"difference": percent(mean), "low": percent(high), "high": percent(low)}
        rows.append(row | {"pairs": len(x), "finished_pairs": int(np.isfinite(x).sum()), "better": int((x > 0).sum())})
    table = pd.concat([table, pd.DataFrame(rows)], axis=1)
    for column in ("flops", "parameters"):
        table[column] = fine[column].mean().reindex(m.arms).to_numpy(float) if column in m.finished else math.nan
    return table


def leaderboard_section(m: Material) -> Section:
    """Section of the report: arms ranked by loss, with paired differences to the baseline."""
    section = Section("Leaderboard")
    if m.done.empty:
        section.missing.append("No run has finished or diverged yet.")
        return section
    table, quality, called = leaderboard(m), m.quality[0], m.compared[1]
    section.tables.append(_leaderboard_table(m, table))
    others = table[table["arm"] != m.baseline]
    compared, intervals = int((others["pairs"] > 0).sum()), int((others["finished_pairs"] > 1).sum())
    if compared:
        section.text.append(
            f"Exploratory: {counted(compared, 'comparison')} with the baseline, {m.baseline} (--baseline ARM names "
            "another), each with a 95 % t interval of its own and without a verdict."
        )
    others_in_size, settings = of_other_size(m.settings, m.baseline)
    if compared and others_in_size:
        section.text.append(
            f"{counted(len(others_in_size), 'arm')} differ from the baseline in {', '.join(settings)} too: such a "
            "difference is not that of one change alone."
        )
    if intervals > 1:
        section.text.append(
            f"Were all arms equal, about {human(0.05 * intervals, 2)} of these {intervals} intervals would exclude "
            "zero by chance."
        )
    finished = m.finished
    if quality in finished and finished[quality].notna().any():
        values = finished[["name", "seed", quality]].set_axis(["arm", "seed", "value"], axis=1).dropna()
        values = values.astype({"value": float, "seed": int})
        over = means(values, m.arms)
        section.figures.append(
            Figure(
                f"{m.quality[1][:1].upper()}{m.quality[1][1:]}, each seed",
                charts_arms.strip(values, over, m.arms, m.quality[1]),
                "Dots: finished runs; bar: their mean; line: its 95 % t interval, from two seeds on.",
                data=extremes(over, "mean"),
            )
        )
    d = m.paired_losses
    d = d[np.isfinite(d["d"].astype(float))]
    if len(d):
        values = pd.DataFrame({"arm": d["arm"], "seed": d["seed"].astype(int), "value": percent(d["d"])})
        # the interval is that of the leaderboard: of the log ratios, then in percent
        over = (
            table[["arm", "difference", "low", "high"]]
            .set_axis(["arm", "mean", "low", "high"], axis=1)
            .dropna(subset="mean")
        )
        section.figures.append(
            Figure(
                f"Paired difference to {m.baseline}, each seed",
                charts_arms.strip(
                    values, over, m.arms, f"{called} against the baseline (%), left is better", zero=True
                ),
                "Dots: the difference of two runs of one seed; bar: the mean; line: its 95 % t interval.",
                data=extremes(over, "mean", " %"),
            )
        )
    return section


def _leaderboard_table(m: Material, table: pd.DataFrame) -> Table:
    """The leaderboard with mean and spread, difference and interval in one cell each."""
    (compared, called), quality = m.compared, m.quality[0]

    def spread(column: str) -> list[str]:
        size = table[column].abs().max()
        decimals = max(0, 3 - math.floor(math.log10(size))) if size > 0 and math.isfinite(size) else 4
        return [
            "–" if math.isnan(x) else f"{x:.{decimals}f}" + ("" if math.isnan(sd) else f" ± {sd:.{decimals}f}")
            for x, sd in zip(table[column], table[f"{column}_sd"], strict=True)
        ]

    shown = pd.DataFrame({"arm": [f"{a} (baseline)" if a == m.baseline else a for a in table["arm"]]})
    by = {}
    names = {"val_loss": "validation loss", "test_loss": "test loss", "val_bits_per_byte": "bits per byte"}
    for column in dict.fromkeys((quality, compared)):
        shown[names[column]] = spread(column)
        by[names[column]] = column
    difference = f"{called}: paired difference to the baseline"
    shown[difference] = ["–" if row.arm == m.baseline else _change(row) for row in table.itertuples()]
    by[difference] = "difference"
    shown["better on"] = [f"{row.better} of {row.pairs} seeds" if row.pairs else "–" for row in table.itertuples()]
    by["better on"] = "better"
    shown["seeds"] = table["seeds"]
    shown["diverged"] = table["diverged"]
    for column, title in (("flops", "FLOPs"), ("parameters", "parameters")):
        if relative_spread(table[column]) > SAME_COST:
            shown[title] = [human(x, 3) for x in table[column]]
            by[title] = column
    note = (
        "± is the standard deviation over the finished seeds. A difference is of two runs of one seed, as a change in "
        "percent: minus is better. A pair of which one run diverged counts in “better on”, not in the mean."
    )
    title = f"{counted(len(table), 'arm')}, the least validation loss first"
    return Table("leaderboard", table, title, note, shown=shown, by=by, first=True)


def _change(row: Any) -> str:
    """−1.76 % (−3.93 to +0.42), of a row of the leaderboard."""
    if not row.pairs:
        return "–"
    if math.isnan(row.difference):
        return "no pair finished"
    ends = "" if math.isnan(row.low) else f" ({row.low:+.2f} to {row.high:+.2f})"
    return f"{row.difference:+.2f} %{ends}".replace("-", "−")
