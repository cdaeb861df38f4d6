"""From the columns of somebody else's runs to the rows and histories of `load_runs`."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from albert_ablate.analysis.external import sources
from albert_ablate.analysis.external.cells import RawRun, number, whole_number
from albert_ablate.analysis.external.mapping import MAPPINGS, TABLES, Columns, read_mapping
from albert_ablate.config import ConfigError, nearest
from albert_ablate.config.errors import shown
from albert_ablate.records.history import SCHEMAS

STATES = {
    "": "finished", "finished": "finished", "completed": "finished", "success": "finished", "running": "running",
    "pending": "running", "scheduled": "running", "queued": "running", "crashed": "failed", "failed": "failed",
    "killed": "stopped", "stopped": "stopped", "preempting": "stopped", "preempted": "stopped", "diverged": "diverged",
}  # fmt: skip
SPLITS = {"val_loss": "validation", "validation_loss": "validation", "train_loss": "train", "test_loss": "test"}
STEPS = {"loss": "loss", "lr": "lr", "learning_rate": "lr", "grad_norm": "grad_norm"}


def is_external(path: str | Path) -> bool:
    """Whether a path names runs of another trainer: a table, a mapping, event files or an MLflow store."""
    text = str(path)
    if text.startswith(("mlflow:", "tensorboard:")):
        return True
    place = Path(path).expanduser()
    if place.suffix in (*TABLES, *MAPPINGS):
        return not place.is_dir()
    return place.is_dir() and sources.kind_of(place) != ""


def home_folder(path: str | Path) -> Path:
    """Where what is written about runs lies: their folder, or for those of another trainer one beside them."""
    if not is_external(path) and not str(path).startswith("wandb:"):
        return Path(path)
    text = re.sub(r"^(?:mlflow|tensorboard|wandb):", "", str(path))
    if "://" in text or str(path).startswith("wandb:"):
        return Path(re.sub(r"[^\w.-]+", "_", text) + ".judge")
    place = Path(text).expanduser()
    return place.with_name(place.name + ".judge")


def external_rows(path: str | Path, metric: str = "") -> Iterator[tuple[dict[str, Any], Callable[[str], pa.Table]]]:
    """A row of the summary and a reader of histories for each run of the source that a path names.

    The path: a table (CSV, TSV, Parquet, JSON Lines) with columns arm, seed and metrics, and step or tokens where it
    has a row for each; a folder of TensorBoard's event files; mlflow:URI/EXPERIMENT; or a YAML that says which columns
    are which (`mapping.py`). metric: the only one that is wanted, which must be there. ConfigError in one sentence for
    what cannot be read.
    """
    place = Path(path).expanduser()
    columns = read_mapping(place) if place.suffix in MAPPINGS else Columns(str(path))
    if metric and metric not in (columns.metrics or ()):
        columns = replace(columns, metrics={metric: metric})
    taken: dict[tuple[str, int], str] = {}
    empty = True
    for raw in sources.raw_runs(columns):
        empty = False
        arm, seed = _who(raw, columns)
        if (arm, seed) in taken:
            raise ConfigError(
                f"{columns.source} has seed {seed} of {arm} twice: {taken[arm, seed]} and {raw.place}. Give one run "
                "an arm and seed, or name the columns that make up an arm."
            )
        taken[arm, seed] = raw.place
        yield _row(raw, arm, seed, columns), partial(_history, raw, columns)
    if empty:
        raise ConfigError(f"{columns.source} holds no run.")


def column(raw: RawRun, name: str, key: str, needed: bool) -> Any:
    """The fact called `name`; ConfigError naming what there is, where it is needed and missing."""
    if name in raw.facts:
        return raw.facts[name]
    if needed:
        near = nearest(name, map(str, raw.facts))
        raise ConfigError(f"{raw.place} has no {name}, which is its {key}: it has {near or 'nothing'}.")
    return None


def _who(raw: RawRun, columns: Columns) -> tuple[str, int]:
    values = [column(raw, name, "arm", True) for name in columns.arm]
    if any(v is None or str(v).strip() == "" for v in values):
        raise ConfigError(f"{raw.place} has no arm: its {' and '.join(columns.arm)} is empty.")
    names = [str(v).strip() for v in values]
    if len(names) > 1:
        names = [f"{n.rpartition('.')[2]}={v}" for n, v in zip(columns.arm, names, strict=True)]
    value = column(raw, columns.seed, "seed", True)
    seed = whole_number(value)
    if seed is None:
        raise ConfigError(f"{raw.place}: the seed {shown(value)} is not a whole number.")
    return " ".join(names), seed


def metric_columns(raw: RawRun, columns: Columns) -> Mapping[str, str]:
    """Metric -> column. Without a mapping every column is one that is nothing else and holds a number."""
    if columns.metrics is not None:
        return columns.metrics
    used = {*columns.arm, columns.seed, columns.step, columns.tokens, columns.status, *columns.settings.values()}
    return {n: n for n, v in raw.facts.items() if n not in used and number(v) is not None and not n.startswith("_")}


def _row(raw: RawRun, arm: str, seed: int, columns: Columns) -> dict[str, Any]:
    setting = hashlib.sha256(arm.encode()).hexdigest()[:12]
    wanted = metric_columns(raw, columns)
    metrics = {name: number(column(raw, source, name, False)) for name, source in wanted.items()}
    word = str(column(raw, columns.status, "status", "status" in columns.given) or "").strip().lower()
    if word not in STATES:
        raise ConfigError(f"{raw.place}: the status {shown(word)} is not one of {nearest(word, filter(None, STATES))}.")
    status = STATES[word]
    if status == "finished" and any(v is not None and not math.isfinite(v) for v in metrics.values()):
        status = "diverged"
    tokens = number(column(raw, columns.tokens, "tokens", "tokens" in columns.given))
    if tokens is None and columns.tokens_per_step and (last := number(raw.facts.get(columns.step))) is not None:
        tokens = last * columns.tokens_per_step
    row: dict[str, Any] = {
        "folder": f"{columns.source}:{arm}/seed{seed}", "status": status, "reason": None, "label": arm, "arm": setting,
        "setting": setting, "identity": f"{setting}-{seed}", "seed": seed, "role": "confirmation",
    }  # fmt: skip
    settings = columns.settings
    if columns.metrics is None:  # without a mapping what holds text is a setting
        used = {*columns.arm, columns.seed, columns.status, *row}
        settings = {n: n for n, v in raw.facts.items() if isinstance(v, str) and n not in used} | {**settings}
    row |= {name: raw.facts.get(source) for name, source in settings.items() if name not in row and name not in metrics}
    row |= {n: v for n, v in metrics.items() if v is not None and math.isfinite(v) and n not in row}
    return row | ({"tokens": tokens} if tokens is not None else {})


def _history(raw: RawRun, columns: Columns, name: str) -> pa.Table:
    """The rows of a run as our history `name`: losses of splits as evaluations, the rest of the steps as steps."""
    schema = SCHEMAS[name]
    rows = raw.rows() if name != "layers" else []
    wanted = metric_columns(raw, columns)
    out: list[dict[str, Any]] = []
    for row in rows:
        step = whole_number(row.get(columns.step))
        tokens = number(row.get(columns.tokens))
        if tokens is None and step is not None and columns.tokens_per_step:
            tokens = step * columns.tokens_per_step
        if step is None and tokens is None:
            continue
        axes = {"step": step if step is not None else len(out), "tokens": None if tokens is None else int(tokens)}
        values = {metric: number(row.get(source)) for metric, source in wanted.items()}
        if name == "evals":
            out += [
                {**axes, "split": split, "loss": values[m]} for m, split in SPLITS.items() if values.get(m) is not None
            ]
        else:
            row_values = {ours: values[m] for m, ours in STEPS.items() if values.get(m) is not None}
            out += [axes | row_values] if "loss" in row_values else []
    columns_ = [_typed([row.get(f.name) for row in out], f.type) for f in schema]
    return pa.Table.from_arrays(columns_, schema=schema)


def _typed(values: list, kind: pa.DataType) -> pa.Array:
    if pa.types.is_floating(kind):
        return pa.array([math.nan if v is None else float(v) for v in values], kind)
    return pa.array(values, kind)
