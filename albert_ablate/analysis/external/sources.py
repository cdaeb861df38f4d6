"""Runs as their sources have them: a table's groups of rows, W&B runs, TensorBoard's folders, MLflow's runs."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from albert_ablate.analysis.external.cells import RawRun, number, whole_number
from albert_ablate.analysis.external.mapping import TABLES, Columns
from albert_ablate.config import ConfigError
from albert_ablate.config.dotted import dotted
from albert_ablate.config.secrets import masked

EVENTS = "*tfevents*"


def kind_of(place: Path) -> str:
    """tensorboard or mlflow, where a folder is what these write; else nothing."""
    if any(any(place.glob(f"*/seed*/{name}")) for name in ("record.json", "lock")):
        return ""  # our own, which hold event files too; a lock is there before the first record
    if any(place.glob("*/meta.yaml")) or (place / "mlruns.db").exists():
        return "mlflow"
    return "tensorboard" if next(place.rglob(EVENTS), None) is not None else ""


def raw_runs(columns: Columns) -> Iterator[RawRun]:
    """The runs of a source; ConfigError in one sentence where it cannot be read."""
    source = columns.source
    if source.startswith("wandb:"):
        return _wandb_runs(columns)
    if source.startswith("mlflow:"):
        return _mlflow_runs(_whole_address(source.removeprefix("mlflow:")), columns)
    place = Path(source.removeprefix("tensorboard:")).expanduser()
    place = place if place.is_absolute() else columns.folder / place
    if place.suffix in TABLES and not place.is_dir():
        return _table_runs(place, columns)
    if not place.is_dir():
        raise ConfigError(f"{place} cannot be read: there is no such file or folder.")
    kind = "tensorboard" if source.startswith("tensorboard:") else kind_of(place)
    if kind == "mlflow":
        return _mlflow_runs(str(place), columns)
    if kind == "tensorboard":
        return _tensorboard_runs(place, columns)
    raise ConfigError(f"{place} holds neither TensorBoard's event files nor an MLflow store.")


def _whole_address(text: str) -> str:
    """An address whose slashes a path has joined, as those of a command's argument are."""
    for scheme, slashes in (("sqlite", "///"), ("file", "///"), ("http", "//"), ("https", "//")):
        text = re.sub(rf"^{scheme}:/(?!/)", f"{scheme}:{slashes}", text)
    return text


# --- tables ----------------------------------------------------------------------------------------------------------


def _table_runs(file: Path, columns: Columns) -> Iterator[RawRun]:
    """A run for each arm and seed of a table; its facts are the last value of each column that has one."""
    rows = _read_table(file)
    groups: dict[tuple, list[tuple[int, Mapping[str, Any]]]] = {}
    names = list(dict.fromkeys(k for _, row in rows for k in row))
    for name in (*columns.arm, columns.seed):
        if name not in names:
            raise ConfigError(f"{file} has no column {name}: it has {', '.join(names) or 'no row'}.")
    for key in columns.given & {"step", "tokens", "status"}:
        if getattr(columns, key) not in names:
            raise ConfigError(f"{file} has no column {getattr(columns, key)}, which is its {key}.")
    if lacking := [c for c in (columns.metrics or {}).values() if c not in names]:
        raise ConfigError(f"{file} has no column {lacking[0]}, which is a metric: it has {', '.join(names)}.")
    axis = next((c for c in (columns.step, columns.tokens) if c in names), None)
    for line, row in rows:
        seed = row.get(columns.seed)
        if whole_number(seed) is None:
            raise ConfigError(f"{file}, line {line}: the seed {seed!r} is not a whole number.")
        for name in (columns.metrics or {}).values():
            if not _is_empty(row.get(name)) and number(row[name]) is None:
                raise ConfigError(f"{file}, line {line}: {name} must be a number or diverged, got {row[name]!r}.")
        groups.setdefault((*(str(row.get(a)) for a in columns.arm), whole_number(seed)), []).append((line, row))
    for run_name, lines in groups.items():
        named = f"{' '.join(map(str, run_name[:-1]))}, seed {run_name[-1]}"
        if axis is None and len(lines) > 1:
            raise ConfigError(
                f"{file}, line {lines[1][0]}: {named} is given twice; several rows of a run need a column step or "
                "tokens."
            )
        if axis is not None:
            _check_rising(file, axis, named, lines)
        facts: dict[str, Any] = {}
        for _, cells in lines:
            facts |= {k: v for k, v in cells.items() if not _is_empty(v)}
        held = [row for _, row in lines] if axis is not None else []
        yield RawRun(f"{file}, line {lines[0][0]}", {n: facts.get(n) for n in names}, partial(list, held))


def _check_rising(file: Path, axis: str, named: str, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    before = -math.inf
    for line, row in rows:
        at = number(row.get(axis))
        if at is None or not math.isfinite(at):
            raise ConfigError(f"{file}, line {line}: the {axis} {row.get(axis)!r} is not a number.")
        if at < before:
            raise ConfigError(f"{file}, line {line}: the {axis} of {named} goes back from {before:g} to {at:g}.")
        before = at


def _is_empty(value: Any) -> bool:
    """An empty cell: nothing was measured. What says nan stays: the run diverged."""
    return value is None or isinstance(value, str) and not value.strip()


def _read_table(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line or row number and cells of each row of a table; cells of CSV files are texts, empty ones None."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return [*enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)]
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix in (".csv", ".tsv"):
            return _read_csv(file, text)
        rows = [(n, json.loads(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} cannot be read: byte {error.start} is not UTF-8 text.") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None
    for line, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f'{file}, line {line}: a line holds an object such as {{"arm": "a", "seed": 0}}.')
    return rows


def _read_csv(file: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    names = next(reader, [])
    if twice := [n for n in names if names.count(n) > 1]:
        raise ConfigError(f"{file} has the column {twice[0]} twice.")
    rows = []
    for row in reader:
        if not row:
            continue
        if len(row) != len(names):
            raise ConfigError(
                f"{file}, line {reader.line_num} has {len(row)} cells, and there are {len(names)} columns."
            )
        rows.append((reader.line_num, {n: cell if cell.strip() else None for n, cell in zip(names, row, strict=True)}))
    return rows


# --- W&B -------------------------------------------------------------------------------------------------------------


def _wandb_runs(columns: Columns) -> Iterator[RawRun]:
    """config.<key> and summary.<key>, each also without its prefix where nothing else has the name."""
    from albert_ablate.analysis.wandb_reader import server_runs

    for run in server_runs(columns.source):
        config, summary = dict(dotted(dict(run.config))), dict(dotted(dict(run.summary)))
        facts: dict[str, Any] = {**_named(run.name, columns), **config, **summary}
        facts |= {f"config.{k}": v for k, v in config.items()} | {f"summary.{k}": v for k, v in summary.items()}
        facts |= {"name": run.name, "state": run.state, "status": run.state, "group": run.group}
        yield RawRun(f"{columns.source}/{run.id}", facts, partial(_scanned, run, columns.step))


def _named(name: str, columns: Columns) -> dict[str, str]:
    """What the pattern `run` takes out of a run's name."""
    match = re.fullmatch(columns.run, name or "")
    return {k: v for k, v in match.groupdict().items() if v is not None} if match else {}


def _scanned(run: Any, axis: str) -> list[dict[str, Any]]:
    return _rising(run.scan_history(), axis)


def _rising(rows: Any, axis: str) -> list[dict[str, Any]]:
    """Rows by step: those that a run which began again wrote once more replace the first ones."""
    by_step: dict[Any, dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault(row.get(axis), {}).update({k: v for k, v in row.items() if v is not None})
    return [by_step[at] for at in sorted((a for a in by_step if number(a) is not None), key=float)]


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def _tensorboard_runs(root: Path, columns: Columns) -> Iterator[RawRun]:
    """A run for each folder with event files; its name is the folder's below the root."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise ConfigError("TensorBoard's files need tensorboard: pip install 'albert_ablate[tensorboard]'.") from None

    for folder in sorted({file.parent for file in root.rglob(EVENTS)}):
        name = folder.relative_to(root).as_posix()
        scalars = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        rows: dict[int, dict[str, Any]] = {}
        last: dict[str, Any] = {}
        for tag in scalars.Tags()["scalars"]:
            for event in scalars.Scalars(tag):
                rows.setdefault(event.step, {"step": event.step})[tag] = event.value
                last[tag] = event.value
        if not rows:
            continue  # a folder of hyperparameters or graphs
        named = _named(name, columns)
        if not {*columns.arm, columns.seed} <= named.keys():
            raise ConfigError(
                f"{folder}: the name {name} does not say arm and seed: call the folders ARM/seedN, or give `run`, a "
                "regular expression with the groups arm and seed, in a mapping."
            )
        held = [rows[step] for step in sorted(rows)]
        yield RawRun(str(folder), {"step": max(rows), **named, **last}, partial(list, held))


# --- MLflow ----------------------------------------------------------------------------------------------------------


def _mlflow_runs(address: str, columns: Columns) -> Iterator[RawRun]:
    """The runs of URI/EXPERIMENT, or of all experiments of a store; facts: parameters, tags and the last metrics."""
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise ConfigError("MLflow's runs need mlflow: pip install 'albert_ablate[mlflow]'.") from None
    uri, _, wanted = address.rpartition("/")
    try:
        if Path(address).is_dir() or not uri:
            uri, wanted = address, ""
        client = MlflowClient(uri)
        experiments = {e.name: e.experiment_id for e in client.search_experiments()}
        if wanted and wanted not in experiments:
            raise ConfigError(
                f"{masked(address)} has no experiment {wanted}: it has {', '.join(experiments) or 'none'}."
            )
        ids = [experiments[wanted]] if wanted else [*experiments.values()]
        token: str | None = None
        while True:
            page = client.search_runs(ids, max_results=1000, page_token=token)
            for run in page:
                yield _mlflow_run(client, run, columns)
            token = page.token
            if not token:
                return
    except (MlflowException, OSError) as error:
        why = " ".join(str(masked(str(error))).split())[:200]
        raise ConfigError(f"{masked(address)} cannot be read as an MLflow store: {why}.") from None


def _mlflow_run(client: Any, run: Any, columns: Columns) -> RawRun:
    name = run.info.run_name or ""
    tags = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")}
    facts = {**_named(name, columns), **run.data.params, **tags, **run.data.metrics}
    metrics = sorted(run.data.metrics)

    def rows() -> list[dict[str, Any]]:
        by_step: dict[int, dict[str, Any]] = {}
        for metric in metrics:
            for point in client.get_metric_history(run.info.run_id, metric):
                by_step.setdefault(point.step, {"step": point.step})[metric] = point.value
        return [by_step[step] for step in sorted(by_step)]

    return RawRun(f"run {run.info.run_id}", {**facts, "name": name, "status": run.info.status}, rows)
