"""Losses over tokens, and the paired difference to the baseline."""

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import human
from albert_ablate.analysis.setting_names import key_of
from albert_ablate.analysis.tables import differences_by, with_mean
from albert_ablate.report import charts_curves, style
from albert_ablate.report.material import Material, counted, extremes, factors, warn
from albert_ablate.report.page import Figure, Section


def curves_section(m: Material) -> Section:
    """Section of the report: loss over tokens, differences to the baseline, levels of a factor."""
    section = Section("Loss curves", zoom=True)
    histories = m.histories
    if lost := [m.place(m.rows["folder"].iloc[i]) for i in histories.unreadable]:
        warn(
            section,
            f"Histories of {counted(len(lost), 'run')} cannot be read: {', '.join(lost[:5])}"
            f"{' …' if len(lost) > 5 else ''}.",
        )
    if histories.evals.empty or histories.evals["tokens"].isna().all():
        section.missing.append(
            "These runs have no losses over tokens: a column tokens, or tokens_per_step in a mapping, gives them."
            if m.remote
            else "No run has committed an evaluation yet."
        )
        return section
    held = m.of_runs(histories.evals)
    validation = held[held["split"] == "validation"].drop(columns="split")
    unit = "nats per token"
    if m.mixed:
        validation["loss"], unit = validation["bits_per_byte"], "bits per byte"
    validation = with_mean(validation.drop(columns="bits_per_byte"))
    if validation.empty:
        section.missing.append("No run has a finite validation loss.")
        return section
    over = _ends_of_diverged(m)
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
    training = m.of_runs(histories.batches)
    if len(training) and not m.mixed:
        section.figures.append(
            Figure(
                "Training loss of each batch (nats per token)",
                charts_curves.batch_curves(training, m.arms, m.initial),
                "Thinned to the least and greatest loss of each stretch: a spike stays.",
                wide=True,
            )
        )
    return section


def _ends_of_diverged(m: Material) -> pd.DataFrame:
    """arm, run, seed, tokens, loss, divergence of the diverged runs: their last tokens, and the last finite loss of a
    batch or, without one, of the validation split."""
    rows = []
    for i in np.flatnonzero((m.rows["status"] == "diverged").to_numpy()).tolist():
        run = m.histories.runs[i]
        if run is None:
            continue
        held = run["eval_loss"][(run["eval_train"] == 0) & np.isfinite(run["eval_loss"])]
        losses = np.r_[np.nan, held[-1:], run["batch_loss"][-1:]]
        kind = m.rows["divergence"].iloc[i] if "divergence" in m.rows else None
        rows.append((i, *(run["end_tokens"].tolist() or [0]), losses[-1], kind))
    table = pd.DataFrame(rows, columns=["run", "tokens", "loss", "divergence"]).astype({"run": int})
    return m.of_runs(table)


def last_means(validation: pd.DataFrame) -> pd.DataFrame:
    """arm, mean: of each arm at the last tokens at which it has a mean."""
    measured = validation.dropna(subset="mean").sort_values("tokens")
    return measured.groupby("arm")["mean"].last().reset_index()


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
    levels = factors(m.settings)
    if len(levels) < 2 or len(m.arms) < 5:
        return
    curves = validation.dropna(subset="mean").drop_duplicates(["arm", "tokens"])[["arm", "tokens", "mean"]]
    late = curves[curves["tokens"] >= curves["tokens"].max() / 3]
    fine = late["mean"] if len(late) else curves["mean"]
    span = style.loss_range(fine[fine <= fine.quantile(0.95) * 1.2], None)
    section.text.append(
        f"Small charts: the mean {'bits per byte' if m.mixed else 'validation loss'} of each level of {levels[0]} in "
        "color, of all other arms in gray."
    )
    for _, arms in m.settings.groupby(m.settings[levels[0]].map(key_of), sort=False):
        level_curves = curves[curves["arm"].isin(arms.index)]
        if len(level_curves):
            name = f"{levels[0]}={human(arms[levels[0]].iloc[0])}"
            drawn = charts_curves.one_level(curves, level_curves, m.arms, span, unit)
            section.figures.append(Figure(name, drawn, small=True, data=extremes(last_means(level_curves), "mean")))
