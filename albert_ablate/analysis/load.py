"""Records into pandas tables: a row a run, and the runs' histories."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from albert_ablate.analysis.external.runs import external_rows, is_external
from albert_ablate.analysis.measures import log_of_positive, spike_score, spike_window
from albert_ablate.config import ConfigError
from albert_ablate.config.dotted import dotted, is_internal
from albert_ablate.records import store
from albert_ablate.records.evaluation_results import read_evaluations
from albert_ablate.records.history import SCHEMAS, read_history
from albert_ablate.records.tuning import role

RUN_COLUMNS = {
    "seed": pa.int64(),
    "setting": pa.string(),
    "arm": pa.string(),
}  # of the run, beside each row of a history
SPIKE_COLUMNS = ("loss", "grad_norm")
MAGIC = b"ARROW1"  # begins and ends an Arrow file


@dataclass(frozen=True)
class Runs:
    """All runs of a source.

    summary: a row a run, with its folder, status (none where its record cannot be read), `reason` (what of it cannot
    be read, or why it failed), the option taken in each group, every setting by its dotted key, every summary metric
    and its cost, and the figures of its evaluations as `<name>.<figure>`. steps, evals, layers: the histories with the
    run's arm, setting and seed beside each row, read when first asked for; a run whose history cannot be read is left
    out of it with a warning that names it.
    """

    summary: pd.DataFrame
    remote: Mapping[str, Callable[[str], pa.Table]] = field(default_factory=dict, repr=False)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Rows of every logged training step: losses, learning rate, gradient norms."""
        return self.history("steps")

    @cached_property
    def evals(self) -> pd.DataFrame:
        """Rows of every evaluation on training, validation and test samples."""
        return self.history("evals")

    @cached_property
    def layers(self) -> pd.DataFrame:
        """Rows of per-layer diagnostics."""
        return self.history("layers")

    def spikes(self, window: int | None = None, deviations: float = 7.0) -> pd.DataFrame:
        """The spike scores (`measures.spike_score`) of each run's loss and of the logarithm of its gradient norm, which
        are the measures spike_score and grad_spike_score: arm, setting, seed, loss, grad_norm.

        window: steps that a value is compared with; `measures.spike_window` of the run's steps where none is given. nan
        where a run has no more steps than that."""
        keys = ["arm", "setting", "seed"]
        rows = []
        for key, run in self.history("steps", ["step", *SPIKE_COLUMNS]).groupby(keys, sort=False):
            values = {"loss": run["loss"].to_numpy(), "grad_norm": log_of_positive(run["grad_norm"])}
            steps = window or spike_window(len(run))
            scores = {x: spike_score(values[x], steps, deviations) for x in SPIKE_COLUMNS}
            rows.append(dict(zip(keys, key, strict=True)) | scores)
        return pd.DataFrame(rows, columns=[*keys, *SPIKE_COLUMNS])

    def where(self, **wanted: Any) -> "Runs":
        """The runs whose summary has these values: `runs.where(norm="pre_ln", seed=[0, 1])`."""
        rows = self.summary
        for name, value in wanted.items():
            if name not in rows:
                raise ConfigError(f"{name}={value} cannot be selected: the summary has no column {name}.")
            rows = rows[rows[name].isin(list(value) if pd.api.types.is_list_like(value) else [value])]
        return Runs(rows, self.remote)

    def history(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The history `name` of these runs, only `columns` of it if they are given."""
        if name not in SCHEMAS:
            raise ConfigError(f"There is no history {name}: there are {', '.join(SCHEMAS)}.")
        unknown = set(columns or ()) - set(SCHEMAS[name].names)
        if unknown:
            raise ConfigError(
                f"{name} has no column {', '.join(sorted(unknown))}: it has {', '.join(SCHEMAS[name].names)}."
            )
        schema = SCHEMAS[name] if columns is None else pa.schema([SCHEMAS[name].field(c) for c in columns])
        empty = pa.schema([*((k, RUN_COLUMNS[k]) for k in reversed(RUN_COLUMNS)), *schema]).empty_table()
        tables, trouble = [empty], dict[str, str]()
        for row in self.summary[self.summary["status"].notna()].itertuples():
            try:
                table = self._history(row.folder, name).select(schema.names)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                trouble[row.folder] = f"{type(error).__name__}: {error}"
                continue
            for key, kind in RUN_COLUMNS.items():
                table = table.add_column(0, key, pa.repeat(pa.scalar(getattr(row, key), kind), len(table)))
            tables.append(table)
        if trouble:
            _warn(name, trouble)
        return pa.concat_tables(tables).to_pandas()

    def _history(self, folder: str, name: str) -> pa.Table:
        if folder in self.remote:
            return self.remote[folder](name)
        # read again: a run that goes on has committed more since
        record = store.read(folder)
        if isinstance(record, store.Unreadable):
            raise ValueError(record.reason)
        table = read_history(Path(folder), name, record.histories, record.identity)
        step = table["step"].to_numpy()
        if (np.diff(step) < (name == "steps")).any():  # what a disk lost reads as zeros
            raise ValueError("its steps do not rise")
        return table

    def evaluation(self, name: str) -> pd.DataFrame:
        """The table of the evaluation `name` of these runs: its rows with the run's arm, setting and seed beside each,
        and which weights it is of. Runs that lack it have no row."""
        rows: list[dict[str, Any]] = []
        available: set[str] = set()
        trouble = dict[str, str]()
        for run in self.summary[self.summary["status"].notna()].to_dict("records"):
            try:
                entries = read_evaluations(Path(run["folder"]), run.get("identity"))
            except ConfigError as error:
                trouble[run["folder"]] = str(error)
                continue
            available |= set(entries)
            entry = entries.get(name, {"rows": []})
            run_names = {key: run[key] for key in ("arm", "setting", "seed")}
            rows += [{**run_names, "weights": entry["weights"], **row} for row in entry["rows"]]
        if trouble:
            _warn("evaluations", trouble)
        if name not in available:
            raise ConfigError(
                f"No run here has the evaluation {name}: they have {', '.join(sorted(available)) or 'none'}."
            )
        return pd.DataFrame(rows)


def load_runs(path: str | Path) -> Runs:
    """The runs below a folder; of a W&B project or sweep, `wandb:entity/project[/sweep]`; of `.wandb` files, one or a
    folder of them; or of another trainer (`analysis/external`): a table, a folder of TensorBoard's event files,
    `mlflow:URI/EXPERIMENT`, or a YAML that says where in their columns everything stands. A run that cannot be read is
    a row with its reason, never left out.

    Raises ConfigError where there is no such source, or no run in it.
    """
    if str(path).startswith("wandb:"):
        from albert_ablate.analysis.wandb_reader import server_rows

        return _collected(server_rows(str(path)))
    if is_external(path):
        return _collected(external_rows(path))
    root = Path(path).expanduser()
    if root.suffix == ".wandb" and root.is_file():
        from albert_ablate.analysis.wandb_reader import offline_rows

        return _collected(offline_rows([root]))
    store.require_runs_folder(root)
    rows = [_row(folder) for folder in store.run_folders(root)]
    if not rows and (files := [*root.rglob("*.wandb")]):
        from albert_ablate.analysis.wandb_reader import offline_rows

        return _collected(offline_rows(files))
    if not rows:
        raise store.no_runs(root)
    return Runs(_summary(rows))


def runs_in(folders: Sequence[Path]) -> Runs:
    """The runs in these run folders, a row each in their order."""
    return Runs(_summary([_row(folder) for folder in folders]))


def _collected(runs_read: Iterator[tuple[dict[str, Any], Callable[[str], pa.Table]]]) -> Runs:
    rows, remote = [], {}
    for row, read in runs_read:
        rows.append(row)
        remote[row["folder"]] = read
    return Runs(_summary(rows), remote)


def _warn(what: str, trouble: Mapping[str, str]) -> None:
    runs = f"{len(trouble)} run{'s' * (len(trouble) > 1)}"
    shown = "; ".join(f"{folder} ({why})" for folder, why in list(trouble.items())[:3])
    more = "; …" if len(trouble) > 3 else ""
    warnings.warn(f"The {what} of {runs} cannot be read and are left out: {shown}{more}", stacklevel=3)


def _summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    # a folder's name may be no text, and stands as it is
    folders = pd.Series([row["folder"] for row in rows], dtype=object)
    summary = pd.DataFrame([{k: v for k, v in row.items() if k != "folder"} for row in rows])
    summary.insert(0, "folder", folders)
    if "seed" in summary:
        summary["seed"] = summary["seed"].astype("Int64")  # stays whole where some records cannot be read
    return summary


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"folder": str(folder), "status": None, "reason": None}
    record = store.read(folder)
    if isinstance(record, store.Unreadable):
        return row | {"reason": record.reason}
    row |= _facts(folder, record)
    try:
        for name, entry in read_evaluations(folder, record.identity).items():
            row |= {f"{name}.{figure}": value for figure, value in entry["summary"].items()}
    except ConfigError as error:
        row["reason"] = str(error)
    if torn := _torn(folder, record.histories):
        row["reason"] = f"{row['reason']}; {torn}" if row["reason"] else torn
    row["reason"] = row["reason"] or record.note
    return row


def _facts(folder: Path, record: store.Record) -> dict[str, Any]:
    """The row of a record; what an older or a foreign one lacks is left out."""
    setting = record.setting or folder.parent.name
    row = {
        "label": record.label or setting,
        "arm": record.arm or setting,
        "setting": setting,
        "identity": record.identity,
        "seed": record.seed,
        "role": record.role or role(record.seed),
        "status": record.status,
    }
    row["fingerprint"] = record.data.get("fingerprint")  # of the text as tokens
    columns = set(row) | {"folder", "reason"}  # no option or figure takes their place
    nested = {key: value for key, value in dotted(record.config) if "." in key and not is_internal(key)}
    more = {**record.choices, **nested}
    more |= {f"{group}.revision": number for group, number in record.revisions.items()}
    more |= {**record.summary, **record.cost}
    row |= {k: v for k, v in more.items() if k not in columns} | {"reason": store.last_line(record.error) or None}
    return {_text(k): _text(v) for k, v in row.items()}


def _text(value: Any) -> Any:
    """JSON can hold half a surrogate pair, which is no character."""
    plain = not isinstance(value, str) or value.isascii()
    return value if plain else value.encode("utf-8", "replace").decode("utf-8")


def _torn(folder: Path, lengths: Mapping[str, int] | None) -> str | None:
    """What of the histories is missing or cut, seen from their ends alone: nothing is read."""
    for name in SCHEMAS:
        try:
            if lengths is not None and (committed := lengths.get(name, 0)):
                file = folder / f"{name}.arrows"
                whole = os.stat(file).st_size >= committed
            elif lengths is None:
                file = folder / f"{name}.arrow"
                with open(file, "rb", buffering=0) as stream:
                    size = stream.seek(0, os.SEEK_END)
                    stream.seek(max(0, size - len(MAGIC)))
                    whole = stream.read() == MAGIC
            else:
                continue
        except FileNotFoundError:
            if lengths is not None and (folder / f"{name}.arrow").exists():
                continue  # the run has ended since its record was read
            return f"{file.name} is missing"
        except (OSError, TypeError, AttributeError) as error:
            return f"{name} cannot be read: {type(error).__name__}: {error}"
        if not whole:
            return f"{file.name} is cut off"
    return None
