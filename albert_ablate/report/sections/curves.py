"""Losses over tokens, and the paired difference to the baseline."""

import numpy as np
import pandas as pd

from albert_ablate.analysis import thinning
from albert_ablate.analysis.numbers import human
from albert_ablate.analysis.tables import differences_by, key_of, with_mean
from albert_ablate.report import charts_curves, style
from albert_ablate.report.material import Material, counted, extremes, factors, read_columns, warn
from albert_ablate.report.page import Figure, Section

POINTS = 120_000  # of training curves on the whole page


def curves_section(m: Material) -> Section:
    section = Section("Loss curves", zoom=True)
    evals, batches, ends, lost = [], [], [], []
    points = max(30, min(400, POINTS // max(1, len(m.rows))))
    for i, row in enumerate(m.rows.itertuples(index=False)):
        own = {"arm": row.name, "run": i, "seed": int(row.seed)}
        held = read_columns(m, row, "evals", ("tokens", "split", "loss", "bits_per_byte"))
        steps = read_columns(m, row, "steps", ("tokens", "loss"))
        if held is None or steps is None:
            lost.append(m.place(row.folder))
            continue
        held = held[held["split"].isin(["train", "validation"])]
        evals.append(held.assign(**own))
        kept = steps.iloc[thinning.thinned(steps["loss"], points)]
        batches.append(kept.assign(**own))
        if row.status == "diverged":
            at = held[(held["split"] == "validation") & np.isfinite(held["loss"])].tail(1)
            tokens = steps["tokens"].iloc[-1] if len(steps) else 0
            loss = kept["loss"].iloc[-1] if len(kept) else (at["loss"].iloc[-1] if len(at) else np.nan)
            kind = getattr(row, "divergence", None)
            ends.append({**own, "tokens": tokens, "loss": loss, "divergence": kind})
    if lost:
        warn(
            section,
            f"Histories of {counted(len(lost), 'run')} cannot be read: {', '.join(lost[:5])}"
            f"{' …' if len(lost) > 5 else ''}.",
        )
    if not evals or not sum(map(len, evals)):
        section.missing.append("No run has committed an evaluation yet.")
        return section
    held = pd.concat(evals)
    validation = held[held["split"] == "validation"].drop(columns="split")
    unit = "nats per token"
    if m.mixed:
        validation["loss"], unit = validation["bits_per_byte"], "bits per byte"
    validation = with_mean(validation.drop(columns="bits_per_byte"))
    if validation.empty:
        section.missing.append("No run has a finite validation loss.")
        return section
    over = pd.DataFrame(ends or [], columns=["arm", "run", "seed", "tokens", "loss", "divergence"])
    if m.mixed:  # batch losses are in nats only
        over = over.iloc[:0]
    note = (
        "Thin: each run; thick: the mean over an arm's seeds; band: their range. Crosses: diverged runs; from there on "
        "mean and range are those of the others."
    )
    drawn = charts_curves.loss_curves(validation, over, m.arms, unit, m.initial)
    last = last_means(validation)
    section.figures.append(Figure(f"Validation loss ({unit})", drawn, note, data=extremes(last, "mean")))
    _draw_differences(section, m, validation)
    _draw_levels(section, m, validation, unit)
    late = validation[validation["tokens"] >= validation["tokens"].max() / 2]
    if late["tokens"].nunique() > 1:
        ended = over[over["tokens"] >= late["tokens"].min()]
        drawn = charts_curves.loss_curves(late, ended, m.arms, unit, None)
        section.figures.append(
            Figure(
                f"Validation loss, second half ({unit})",
                drawn,
                "The same, from half of the tokens on.",
            )
        )
    training = pd.concat(batches)
    if len(training) and not m.mixed:
        section.figures.append(
            Figure(
                "Training loss of each batch (nats per token)",
                charts_curves.batch_curves(training, m.arms, m.initial),
                "Thinned to the least and greatest loss of each stretch: a spike stays.",
                wide=True,
            )
        )
    pair = held.pivot_table(index=["arm", "run", "seed", "tokens"], columns="split", values="loss").reset_index()
    m.both = pair.dropna() if {"train", "validation"} <= {*pair} else None
    return section


def last_means(validation: pd.DataFrame) -> pd.DataFrame:
    """arm, mean: of each arm at the last tokens at which it has a mean."""
    known = validation.dropna(subset="mean").sort_values("tokens")
    return known.groupby("arm")["mean"].last().reset_index()


def _draw_differences(section: Section, m: Material, validation: pd.DataFrame) -> None:
    table = differences_by(validation, m.baseline, "tokens")
    if table["tokens"].nunique() < 2:
        return
    end = table[table["tokens"] == table["tokens"].max()]
    note = (
        f"Change of the validation loss against {m.baseline} at equal tokens, in percent, over the seeds that both "
        "have; band: 95 % t interval at each point alone, brighter where the pointer rests."
    )
    drawn = charts_curves.differences_over_tokens(table, m.arms, "validation loss against the baseline (%)")
    section.figures.append(
        Figure("Paired difference to the baseline over tokens", drawn, note, data=extremes(end, "mean", " %"))
    )


def _draw_levels(section: Section, m: Material, validation: pd.DataFrame, unit: str) -> None:
    """One small chart for each level of the first factor, the other arms in gray."""
    found = factors(m.settings)
    if len(found) < 2 or len(m.arms) < 5:
        return
    curves = validation.dropna(subset="mean").drop_duplicates(["arm", "tokens"])[["arm", "tokens", "mean"]]
    late = curves[curves["tokens"] >= curves["tokens"].max() / 3]
    fine = late["mean"] if len(late) else curves["mean"]
    span = style.loss_range(fine[fine <= fine.quantile(0.95) * 1.2], None)
    section.text.append(
        f"Small charts: the mean {'bits per byte' if m.mixed else 'validation loss'} of each level of {found[0]} in "
        "color, of all other arms in gray."
    )
    for _, arms in m.settings.groupby(m.settings[found[0]].map(key_of), sort=False):
        own = curves[curves["arm"].isin(arms.index)]
        if len(own):
            name = f"{found[0]}={human(arms[found[0]].iloc[0])}"
            drawn = charts_curves.one_level(curves, own, m.arms, span, unit)
            section.figures.append(Figure(name, drawn, small=True, data=extremes(last_means(own), "mean")))
