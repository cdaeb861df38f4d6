"""Losses over the learning rate: tuning runs and grids of runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import visible
from albert_ablate.analysis.setting_names import key_of
from albert_ablate.analysis.tables import means
from albert_ablate.records.checked import read_checked
from albert_ablate.report import charts_arms
from albert_ablate.report.contrasts import number
from albert_ablate.report.material import Material, warn
from albert_ablate.report.page import Figure, Section, Table
from albert_ablate.stats.effects import rate_sensitivity


def rates_section(m: Material) -> Section:
    """Section of the report: loss over learning rate, tuned learning rates, sensitivity."""
    section = Section("Learning rates")
    points, tuned, names = [], [], _names_of_arms(m)
    for file in sorted((m.root / "tuning").glob("*.json")):
        try:
            found = read_checked(file, file.stem)
            arm = names.get(file.stem, visible(found["arm"]))
            for at in found["curve"]:
                losses, seeds = at["losses"], at.get("seeds") or []
                values = (
                    losses.items()
                    if isinstance(losses, Mapping)
                    else zip(_seeds(seeds, len(losses)), losses, strict=False)
                )
                for seed, loss in values:
                    points.append(
                        (
                            arm,
                            float(at["rate"]),
                            int(seed),
                            math.nan if loss is None else number(loss),
                            int(at.get("tokens") or 0),
                        )
                    )
            kept = {k: found.get(k) for k in ("rate", "edge", "slack", "tokens", "objective", "trained")}
            tuned.append({"arm": arm} | kept)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
            warn(section, f"tuning/{file.name} is left out, it cannot be used ({why}).")
    if points:
        table = pd.DataFrame(points, columns=["arm", "rate", "seed", "loss", "tokens"])
        table = table[table["tokens"] == table.groupby("arm")["tokens"].transform("max")]
        about = "tuning_rates", "Tuning: validation loss over the learning rate", "Tuning runs by learning rate"
        axis = "validation loss at the end (nats per token)"
        _draw_rates(section, m, table.drop(columns="tokens"), *about, axis, pd.DataFrame(tuned))
        note = (
            "edge: the side on which the best rate is the last that was run, after four moves of the window. slack: "
            "expected loss above the optimum, in nats per token; empty where it is unknown. Tuning runs choose the "
            "rate and are never evidence."
        )
        section.tables.append(Table("tuned_rates", pd.DataFrame(tuned), "Tuned rates", note))
    if (grid := _grid(m)) is not None:
        about = "rates", "Learning-rate sensitivity", "Runs by learning rate"
        _draw_rates(section, m, grid.drop(columns="initial"), *about, m.quality[1])
        if not m.mixed and len(found := _sensitivity(grid)):
            note = (
                "Mean over the rates of min(loss, initial loss) minus the seed's least loss, in nats per token, with a "
                "95 % t interval from two seeds on; seeds that have every rate (Wortsman et al. 2023, 2309.14322)."
            )
            section.tables.append(Table("sensitivity", found, "Sensitivity to the learning rate", note))
    if not section.figures:
        section.missing.append(
            f"Learning-rate curves come from albert-ablate tune, which writes {m.root.name or '.'}/tuning, and from "
            "runs at three rates or more that are else alike."
        )
    return section


def _names_of_arms(m: Material) -> dict[str, str]:
    """An arm's id -> its name here, where it has one setting alone."""
    one = m.rows.groupby("arm")["name"].agg(["nunique", "first"])
    return one.loc[one["nunique"] == 1, "first"].to_dict()


def _seeds(seeds: Any, n: int) -> Sequence:
    return seeds if isinstance(seeds, Sequence) and len(seeds) == n else range(n)


def _grid(m: Material) -> pd.DataFrame | None:
    """Runs that differ in the learning rate alone, at least three rates of an arm."""
    if "optimizer.lr" not in m.settings:
        return None
    others = [c for c in m.settings if c != "optimizer.lr"]
    named = m.done.merge(
        m.settings[others].map(key_of).agg(" ".join, axis=1).rename("else_"), left_on="name", right_index=True
    )
    grids = []
    for _, rows in named.groupby("else_"):
        if rows["optimizer.lr"].nunique() >= 3:
            name = " ".join(w for w in str(rows["name"].iloc[0]).split() if not w.startswith("optimizer.lr="))
            grids.append(rows.assign(arm=name or "all"))
    if not grids:
        return None
    rows = pd.concat(grids)
    columns = {"rate": "optimizer.lr", "seed": "seed", "loss": m.quality[0], "initial": "initial_loss"}
    values = {to: rows[c] if c in rows else math.nan for to, c in columns.items()}
    grid = pd.DataFrame({"arm": rows["arm"]} | values).astype({"rate": float, "seed": int, "loss": float})
    return grid.assign(loss=grid["loss"].where(rows["status"] == "finished"))


def _sensitivity(grid: pd.DataFrame) -> pd.DataFrame:
    """arm, rates, seeds, mean, low, high of the sensitivity of the seeds that have every rate of their arm."""
    out = []
    for arm, arm_rows in grid.groupby("arm", sort=False):
        losses = arm_rows.pivot_table(index="seed", columns="rate", values="loss", dropna=False)
        every = arm_rows.groupby("seed")["rate"].nunique() == arm_rows["rate"].nunique()
        initial = arm_rows.groupby("seed")["initial"].max()
        seeds = [s for s in losses.index if every[s] and math.isfinite(initial[s])]
        if seeds:
            each = rate_sensitivity(losses.loc[seeds].to_numpy(), initial[seeds].to_numpy())
            table = means(pd.DataFrame({"arm": arm, "value": each}), [str(arm)])
            out.append({"arm": arm, "rates": losses.shape[1], "seeds": len(seeds)} | table.iloc[0, 1:].to_dict())
    return pd.DataFrame(out)


def _draw_rates(
    section: Section,
    m: Material,
    table: pd.DataFrame,
    name: str,
    title: str,
    rows: str,
    axis: str,
    tuned: pd.DataFrame | None = None,
) -> None:
    arms = list(dict.fromkeys(table["arm"]))
    known = set(arms) <= set(m.arms)
    over = table.groupby(["arm", "rate"])["loss"].agg(lambda x: x.mean(skipna=False)).rename("mean").reset_index()
    points = table.assign(diverged=~np.isfinite(table["loss"]), outcome="diverged")
    chosen = None if tuned is None else _chosen_rates(over, tuned)
    chart = charts_arms.sensitivity(points, over, m.arms if known else arms, m.initial, axis, known, chosen)
    note = "Dots: runs; the line: their mean, where no seed diverged; crosses at the top: diverged runs."
    if chosen is not None and len(chosen):
        note += " Ring: the chosen rate; the bar below it is its slack, the expected loss above the optimum."
    if not known:  # they have colors of their own
        note += " Arms are settings without their learning rate here, which the filter does not know."
    section.figures.append(Figure(title, chart, note, wide=True))
    section.tables.append(Table(name, table, rows, folded=True))


def _chosen_rates(over: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """arm, rate, mean, best of the tuned rates: the mean of the runs nearest to the rate, and that less the slack."""
    rows = []
    for arm, rate, slack in tuned[["arm", "rate", "slack"]].itertuples(index=False):
        arm_rows = over[(over["arm"] == arm) & np.isfinite(over["mean"])]
        rate = number(rate)
        if len(arm_rows) and rate > 0:
            near = arm_rows.loc[(np.log(arm_rows["rate"]) - math.log(rate)).abs().idxmin()]
            spare = number(slack)
            best = near["mean"] - (spare if math.isfinite(spare) else 0.0)
            rows.append({"arm": arm, "rate": rate, "mean": near["mean"], "best": best})
    return pd.DataFrame(rows, columns=["arm", "rate", "mean", "best"])
