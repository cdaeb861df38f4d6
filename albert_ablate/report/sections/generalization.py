"""Gaps between the splits, and evaluations after training."""

from pathlib import Path
from typing import Any

import pandas as pd

from albert_ablate.analysis.tables import means
from albert_ablate.config import ConfigError
from albert_ablate.records.evaluation_results import read_evaluations
from albert_ablate.report import charts_arms, charts_curves
from albert_ablate.report.material import Material, warn
from albert_ablate.report.page import Figure, Section, Table


def generalization_section(m: Material) -> Section:
    """Section of the report: generalization gap, training against validation loss, evaluations."""
    section = Section("Generalization")
    table = m.finished
    if "gap" in table and table["gap"].notna().any():
        values = table[["name", "seed", "gap"]].set_axis(["arm", "seed", "value"], axis=1).dropna()
        values = values.astype({"value": float, "seed": int})
        section.figures.append(
            Figure(
                "Gap: validation minus training loss at the end (nats per token)",
                charts_arms.strip(values, means(values, m.arms), m.arms, "gap (nats per token)", zero=True),
                "Dots: runs; bar: mean; line: 95 % t interval from two seeds on. Both losses without dropout.",
            )
        )
    both = _train_and_validation(m)
    if len(both):
        section.figures.append(
            Figure(
                "Validation over training loss",
                charts_curves.train_and_validation(both, m.arms, m.initial),
                "At equal training loss the lower curve generalizes better; on the dashed line both are equal.",
            )
        )
    curves: dict[str, list[dict[str, Any]]] = {"corruption": [], "units": []}
    evaluated = []
    for i, row in enumerate(m.rows.itertuples(index=False)):
        try:
            evaluations = read_evaluations(Path(row.folder), row.identity)
        except ConfigError as error:
            warn(section, str(error))
            continue
        names = {"arm": row.name, "seed": int(row.seed), "run": i}
        for name, entry in evaluations.items():
            evaluated += [names | {"figure": f"{name}.{figure}", "value": v} for figure, v in entry["summary"].items()]
            if name in curves:
                curves[name] += [names | at for at in entry["rows"]]
    for name, title in (("corruption", "tokens"), ("units", "hidden units")):
        _rises(section, m, pd.DataFrame(curves[name]), name, title)
    if evaluated:
        over = pd.DataFrame(evaluated).groupby(["figure", "arm"], sort=False)["value"]
        wide = over.agg(lambda x: pd.to_numeric(x, errors="coerce").mean()).unstack("arm")
        wide = wide[[a for a in m.arms if a in wide]]
        wide = wide if wide.shape[1] <= 6 else wide.T  # the longer side goes down
        title = "Evaluations after training, means over seeds"
        note = (
            "Losses, rises of the loss and areas in nats per token, domains in bits per byte, calibration and "
            "memorization as shares. Of arms that were evaluated."
        )
        section.tables.append(Table("evaluations", wide.reset_index(), title, note, folded=len(wide) > 16))
    if not curves["corruption"]:
        section.missing.append(
            "Loss under missing and noisy tokens: albert-ablate evaluate RUN corruption measures it."
        )
    return section


def _train_and_validation(m: Material) -> pd.DataFrame:
    """arm, run, seed, tokens, train, validation of the evaluations of both splits."""
    held = m.histories.evals.dropna(subset="loss").drop_duplicates(["run", "tokens", "split"])
    train, validation = (held.loc[held["split"] == s, ["run", "tokens", "loss"]] for s in ("train", "validation"))
    train, validation = train.rename(columns={"loss": "train"}), validation.rename(columns={"loss": "validation"})
    return m.of_runs(train.merge(validation, on=["run", "tokens"]))


def _rises(section: Section, m: Material, rows: pd.DataFrame, name: str, title: str) -> None:
    """Charts of the rise of the loss over the share of what is taken away, one a kind."""
    if rows.empty:
        return
    rows = rows.rename(columns={"share": "rate"})
    if not {"rate", "rise"} <= {*rows}:
        section.missing.append(f"The rows of the evaluation {name} have no rise over a rate, and are not drawn.")
        return
    rows["kind"] = rows["kind"] if "kind" in rows else "zeroed"
    over = rows.groupby(["kind", "arm", "run", "seed", "rate"], sort=False)["rise"].mean().reset_index()
    over["mean"] = over.groupby(["kind", "arm", "rate"])["rise"].transform("mean")
    for kind, own in over.groupby("kind", sort=False):
        chart = charts_arms.corruption(own, m.arms, f"share of {kind} {title}")
        note = (
            "Rise above the loss on clean text." if name == "corruption" else "Rise above the loss of the whole model."
        )
        section.figures.append(Figure(f"Loss under {kind} {title}", chart, note))
