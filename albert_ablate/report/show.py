"""`albert-ablate show RUN`: one run, drawn from its folder, whatever became of it. Two runs: `two_runs.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis import thinning
from albert_ablate.analysis.measures import log_of_positive, spike_window, spikes
from albert_ablate.analysis.numbers import human
from albert_ablate.config import ConfigError, unwritable
from albert_ablate.records import store
from albert_ablate.records.atomic import replace_file
from albert_ablate.records.evaluation_results import read_evaluations
from albert_ablate.records.history import SCHEMAS, read_history
from albert_ablate.report import charts_run, render
from albert_ablate.report.html import write_html
from albert_ablate.report.page import Figure, Page, Section, Table

MAX_POINTS = 2000  # of a curve over steps
SPIKE_DEVIATIONS = 7.0
METRIC_TITLES = {
    "train_loss": "train loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "best_val_loss": "best validation loss",
    "val_bits_per_byte": "validation bits per byte",
    "gap": "gap: validation - train",
    "test_loss": "test loss at the best weights",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "probe_macro_f1": "macro-F1 of the frozen trunk's linear probe",
    "baseline_tfidf_macro_f1": "macro-F1 of tf-idf and logistic regression",
    "baseline_majority_macro_f1": "macro-F1 of the commonest class",
    "initial_loss": "initial loss",
    "unigram_loss": "loss of the unigram model",
    "below_unigram": "2 % below the unigram model",
    "divergence": "divergence",
    "tokens": "tokens",
    "steps": "steps",
    "passes": "passes over the training text",
    "parameters": "parameters",
    "mean_dropout": "mean dropout rate",
    "seconds": "seconds",
    "tokens_per_second": "tokens per second",
    "flops": "training FLOPs",
    "peak_memory_bytes": "peak memory (bytes)",
}

HEADLINE_METRICS = ("val_loss", "macro_f1", "test_loss", "accuracy", "gap", "tokens", "seconds", "train_loss", "steps")
HEADLINES = 5  # of HEADLINE_METRICS, those that the run has: what stands in large print above everything else


@dataclass(frozen=True)
class OneRun:
    """A run to show: its folder, record and histories."""

    folder: Path
    record: Mapping[str, Any]
    steps: pd.DataFrame
    evals: pd.DataFrame
    layers: pd.DataFrame

    @property
    def decides(self) -> bool:
        """Whether its task is to classify documents: it has losses per document, and no rows by layer."""
        return bool(self.record.get("data", {}).get("task"))

    @property
    def unit(self) -> str:
        """Of its losses."""
        return "nats per document" if self.decides else "nats per token"

    @property
    def ended(self) -> float | None:
        """Tokens at which the run diverged; None where it did not, or was only found stuck at its end."""
        return float(self.steps["tokens"].iloc[-1]) if self.record["status"] == "diverged" else None


def read_run(folder: Path) -> OneRun:
    """The run in `folder`. Raises ConfigError with one sentence where there is nothing that could be drawn."""
    record = store.read(folder)
    if isinstance(record, store.Unreadable) and not record.missing:
        raise ConfigError(f"{folder} cannot be drawn: {record.reason}.")
    if isinstance(record, store.Unreadable):
        raise store.not_a_run(folder)
    tables = {}
    for name in SCHEMAS:
        try:
            tables[name] = read_history(folder, name, record["histories"], record.identity).to_pandas()
        except FileNotFoundError as error:
            raise ConfigError(
                f"{folder} cannot be drawn: its history {Path(error.filename or name).name} is missing."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
            raise ConfigError(
                f"{folder} cannot be drawn: its history {name} cannot be read ({type(error).__name__})."
            ) from None
    if tables["steps"].empty:
        raise ConfigError(f"{folder} cannot be drawn yet: the run ({record['status']}) has committed no step.")
    return OneRun(folder, record, tables["steps"], tables["evals"], tables["layers"])


def spike_marks(steps: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """step, tokens, what, value of the spikes of loss and gradient norm, the worst 200; and the window they stand in,
    which is that of the measures spike_score and grad_spike_score."""
    window = spike_window(len(steps))
    found = []
    for column, what in (("loss", "loss spike"), ("grad_norm", "gradient spike")):
        x = steps[column].to_numpy(float)
        x = log_of_positive(x) if column == "grad_norm" else x
        at = steps[spikes(x.tolist(), window, SPIKE_DEVIATIONS)]
        found.append(at[["step", "tokens"]].assign(what=what, value=at[column]))
    return pd.concat(found).nlargest(200, "value").sort_values("step"), window


def over_training(run: OneRun) -> dict[str, Figure]:
    """The charts of a run by name, those its histories have something for."""
    steps, evals, summary = run.steps, run.evals, run.record["summary"]
    marks, window = spike_marks(steps)
    batches = steps.iloc[thinning.thinned(steps["loss"], MAX_POINTS)][["step", "tokens", "loss"]]
    held = evals[evals["split"].isin(["train", "validation"])].rename(columns={"split": "series"})
    held = held[["tokens", "series", "loss", "bits_per_byte"]]
    lines = pd.DataFrame(
        [(summary.get(key), what) for key, what in (("unigram_loss", "unigram model"),) if summary.get(key)],
        columns=["loss", "what"],
    ).astype({"loss": float})
    n = f"{len(marks)} spikes" if len(marks) != 1 else "1 spike"
    note = (
        f"Gray: each training batch; dots: both splits in evaluation mode. {n} of loss or gradient norm (triangles): "
    )
    note += f"{SPIKE_DEVIATIONS:g} standard deviations from the mean of the {window} steps before."
    initial = summary.get("initial_loss")
    found = {}
    if len(batches) or np.isfinite(held["loss"]).any():
        found["loss"] = Figure("Loss", charts_run.run_losses(batches, held, marks, lines, initial, run.unit), note)
    norms = []
    for column, series in (("grad_norm", "before clipping"), ("grad_norm_clipped", "after clipping")):
        if column in steps and np.isfinite(steps[column]).any():
            positive = steps[column].where(steps[column] > 0)
            kept = steps.iloc[thinning.thinned(positive, MAX_POINTS)]
            norms.append(kept[["tokens"]].assign(norm=kept[column], series=series))
    if norms:
        before = "" if len(norms) == 2 else " This run's history has no norm after clipping."
        drawn = charts_run.run_norms(pd.concat(norms), marks[marks["what"] == "gradient spike"])
        found["norms"] = Figure("Gradient norm", drawn, f"Of all parameters together.{before}")
    found["rate"] = Figure("Learning rate", _line(steps, "lr"))
    for column, title, log in (
        ("noise_scale", "Gradient noise scale (tokens)", True),
        ("logit_rms", "RMS of the output logits", False),
    ):
        if column in steps and (steps[column] > 0).any():
            found[column] = Figure(title, _line(steps[~log | (steps[column] > 0)], column, log))
    return found


def _line(steps: pd.DataFrame, column: str, log: bool = False):
    return charts_run.line_of(steps.iloc[thinning.thinned(steps[column], MAX_POINTS)][["tokens", column]], column, log)


def maps(run: OneRun) -> dict[str, Figure]:
    """The heat maps of depth by tokens, of the quantities the run has."""
    found = {}
    ended = run.ended if run.record["summary"].get("divergence") != "stuck" else None
    logged, until = run.layers["step"].nunique(), float(run.steps["tokens"].iloc[-1])
    for quantity, title in thinning.QUANTITIES.items():
        cells = thinning.depth_map(run.layers, quantity, until=until)
        if cells.empty:
            continue
        worst = "least" if quantity in thinning.LOW_IS_BAD else "largest"
        columns = thinning.MAX_COLUMNS
        note = f"Each column shows the {worst} of {logged / columns:.1f} logged steps." if logged > columns else ""
        depth = int(run.layers["layer"].max()) + 1
        drawn = charts_run.heat_map(cells, quantity, ended=ended, depth=depth, until=until)
        found[quantity] = Figure(title, drawn, note)
    return found


figures = over_training  # its name before, for notebooks that call it


def known_metrics(run: OneRun) -> dict[str, tuple[str, Any]]:
    """Key -> name and value of what was measured of the run, in the order of METRIC_TITLES."""
    known = {**run.record["summary"], **run.record["cost"]}
    return {
        key: (title.replace("nats per token", run.unit), known[key])
        for key, title in METRIC_TITLES.items()
        if known.get(key) is not None
    }


def page(run: OneRun) -> Page:
    """The page of one run: outcome, curves, maps over depth, evaluations."""
    record, known = run.record, known_metrics(run)
    over, drawn = over_training(run), maps(run)
    first = [known[key] for key in HEADLINE_METRICS if key in known][:HEADLINES]
    about = Section("Outcome", [outcome(record)], facts=[(title, human(value)) for title, value in first])
    about.figures += [replace(over.pop("loss"), wide=True)] if "loss" in over else []
    if record.get("error"):
        about.text.append(f"Error: {store.last_line(record['error'])}")
    depth = Section(
        "Depth by tokens",
        ["Block 1 is next to the input. Where nothing is drawn there was no finite value."] if drawn else [],
        figures=list(drawn.values()),
    )
    absent = [title for quantity, title in thinning.QUANTITIES.items() if quantity not in drawn]
    if absent and not run.decides:
        depth.missing.append(
            f"Not in this run's history (python run.py diagnostics.every=10 writes it): {'; '.join(absent)}."
        )
    table = Table("summary", pd.DataFrame(known.values(), columns=["metric", "value"]))
    sections = [
        about,
        *([depth] if drawn or depth.missing else []),
        Section("Over training", figures=list(over.values())),
        Section("All metrics", tables=[table]),
        *_evaluated(run),
    ]
    setting = record.get("setting") or run.folder.parent.name
    return Page(
        record.get("name") or record["label"] or run.folder.name,
        f"seed {record['seed']} · {record['status']} · {run.folder.name}, setting {setting}",
        sections,
    )


def outcome(record: Mapping[str, Any]) -> str:
    """How the run ended, in a sentence."""
    kind = record["summary"].get("divergence")
    done = record.get("progress") or {}
    said = {
        "finished": "It finished."
        if record["summary"].get("below_unigram") is not False
        else "It finished, too short to beat the unigram model.",
        "diverged": {
            "non_finite": "It diverged: a loss or gradient was not finite.",
            "above_initial": "It diverged: its loss lay above the initial one for a tenth of the budget.",
            "stuck": "It diverged: it is stuck, its losses have stopped falling without getting 2 % below that of the "
            "text's unigram model.",
        }.get(kind, f"It diverged ({kind})."),
        "running": "It is still running, or was killed; this is what it had committed.",
        "stopped": "It was stopped; starting it again resumes it.",
        "failed": "It failed; starting it again resumes it.",
    }.get(record["status"], f"Its status is {record['status']}.")
    return f"{said} {human(done.get('step'))} of {human(done.get('steps'))} steps."


def _evaluated(run: OneRun) -> list[Section]:
    """What was measured of the trained weights, where it was."""
    try:
        found = read_evaluations(run.folder, run.record.get("identity"))
        rows = [(name, figure, value) for name, kept in found.items() for figure, value in kept["summary"].items()]
    except ConfigError as error:
        return [Section("Evaluations after training", missing=[str(error)])]
    if not rows:
        return []
    table = Table("evaluations", pd.DataFrame(rows, columns=["evaluation", "figure", "value"]))
    return [Section("Evaluations after training", tables=[table])]


def poster(run: OneRun):
    """All charts of a run in one picture."""
    import altair as alt

    def sized(figure: Figure, height: int):
        return figure.chart.properties(title=figure.title, width=330, height=height)

    over, depth = over_training(run), maps(run)
    cells = [sized(over[n], 250) for n in ("loss",) if n in over]
    for names in (("norms", "rate"), ("noise_scale", "logit_rms")):
        small = [sized(over[n], 82) for n in names if n in over]
        cells += [_apart(alt.vconcat(*small, spacing=12))] if small else []
    cells += [sized(figure, 210) for figure in depth.values()]
    grid = alt.concat(*cells, columns=3, align="each", spacing={"row": 26, "column": 34})
    record = run.record
    subtitle = f"seed {record['seed']}. {outcome(record)}"
    named = record.get("name") or record["label"] or run.folder.name
    title = alt.Title(named, subtitle=subtitle, fontSize=15, offset=14)
    return _apart(grid).properties(title=title, padding=12)


def _apart(charts_: Any) -> Any:
    return charts_.resolve_scale(color="independent", stroke="independent")


def as_document(folder: Path) -> dict[str, Any]:
    """The run as `schemas/run.schema.json` has it, without the key `schema`; units are those of the record."""
    run = read_run(folder)
    record = run.record
    progress = record.get("progress") or {}
    metrics = {**record["summary"], **record["cost"]}
    evaluated = read_evaluations(folder, record.get("identity"))
    return {
        "folder": str(folder),
        "name": record.get("name") or record["label"] or folder.name,
        "setting": record.get("setting") or folder.resolve().parent.name,
        "seed": record["seed"],
        "role": record.get("role"),
        "status": record["status"],
        "outcome": outcome(record),
        "error": store.last_line(record["error"]) if record.get("error") else None,
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "learning_rate": (record["config"].get("optimizer") or {}).get("lr"),
        "choices": dict(record["choices"]),
        "figures": {k: v for k, v in metrics.items() if v is None or isinstance(v, bool | int | float | str)},
        "evaluations": {name: kept["summary"] for name, kept in evaluated.items()},
        "evals": run.evals.drop(columns="data_order", errors="ignore").to_dict("records"),
        "spikes": spike_marks(run.steps)[0].to_dict("records"),
    }


def draw(folder: Path, output: Path, other: Path | None = None) -> None:
    """Write the picture (.png, .svg) or the interactive page (.html) of the run in `folder`, beside that in `other` if
    it is given."""
    from albert_ablate.report import two_runs

    render.require()
    render.writable(output)
    run = read_run(folder)
    both = None if other is None else two_runs.combine(run, read_run(other))
    if output.suffix == ".html":
        write_html(two_runs.page(both) if both else page(run), output)
        return
    drawn, arms = (two_runs.poster(both), both.names) if both else (poster(run), ())
    try:
        replace_file(output, render.picture(drawn, output.suffix, arms=arms))
    except OSError as error:
        raise unwritable(output, error) from None
