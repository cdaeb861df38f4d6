"""Records into pandas tables: a row a run, and the runs' histories."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from albert_ablate.analysis.measures import spike_score
from albert_ablate.config import ConfigError
from albert_ablate.records.evaluations import read_evaluations
from albert_ablate.records.history import SCHEMAS, read_history

KEYS = ("label", "arm", "setting", "identity", "seed", "role", "status")
SPIKING = ("loss", "grad_norm")


@dataclass(frozen=True)
class Runs:
    """All runs of a source.

    summary: a row a run, with its folder, status, `reason` (why it could not be read, or failed), the option taken in
    each group, every setting by its dotted key, every summary metric and its cost, and the figures of its evaluations
    as `<name>.<figure>`. steps, evals, layers: the histories
    with the run's arm, setting and seed beside each row, read when first asked for.
    """

    summary: pd.DataFrame
    remote: Mapping[str, Callable[[str], pa.Table]] = field(default_factory=dict, repr=False)

    @cached_property
    def steps(self) -> pd.DataFrame:
        return self.history("steps")

    @cached_property
    def evals(self) -> pd.DataFrame:
        return self.history("evals")

    @cached_property
    def layers(self) -> pd.DataFrame:
        return self.history("layers")

    def spikes(self, window: int = 1000, deviations: float = 7.0) -> pd.DataFrame:
        """The spike score (`measures.spike_score`) of each run's loss and gradient norm by step: arm, setting, seed,
        loss, grad_norm. nan where a run has no more than `window` steps: give a shorter one."""
        keys = ["arm", "setting", "seed"]
        rows = [
            {**dict(zip(keys, key, strict=True)), **{x: spike_score(run[x], window, deviations) for x in SPIKING}}
            for key, run in self.history("steps", ["step", *SPIKING]).groupby(keys, sort=False)
        ]
        return pd.DataFrame(rows, columns=[*keys, *SPIKING])

    def where(self, **wanted: Any) -> "Runs":
        """The runs whose summary has these values: `runs.where(norm="pre_ln", seed=[0, 1])`."""
        rows = self.summary
        for name, value in wanted.items():
            if name not in rows:
                raise ConfigError(f"{name}={value} cannot be asked for: the summary has no column {name}.")
            rows = rows[rows[name].isin(value if isinstance(value, list | tuple | set) else [value])]
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
        tables = []
        for row in self.summary[self.summary["status"].notna()].itertuples():
            if row.folder in self.remote:
                table = self.remote[row.folder](name)
            else:
                lengths = json.loads((Path(row.folder) / "record.json").read_text())["histories"]
                table = read_history(Path(row.folder), name, lengths)
            table = table.select(columns) if columns else table
            for key in ("seed", "setting", "arm"):
                value = pa.scalar(getattr(row, key), pa.int64() if key == "seed" else pa.string())
                table = table.add_column(0, key, pa.repeat(value, len(table)))
            tables.append(table)
        if not tables:
            return SCHEMAS[name].empty_table().to_pandas()
        return pa.concat_tables(tables).to_pandas()

    def evaluation(self, name: str) -> pd.DataFrame:
        """The table of the evaluation `name` of these runs: its rows with the run's arm, setting and seed beside each,
        and which weights it is of. Runs that lack it have no row."""
        rows: list[dict[str, Any]] = []
        there: set[str] = set()
        for run in self.summary[self.summary["status"].notna()].to_dict("records"):
            entries = read_evaluations(Path(run["folder"]))
            there |= set(entries)
            entry = entries.get(name, {"rows": []})
            own = {key: run[key] for key in ("arm", "setting", "seed")}
            rows += [{**own, "weights": entry["weights"], **row} for row in entry["rows"]]
        if name not in there:
            raise ConfigError(f"No run here has the evaluation {name}: they have {', '.join(sorted(there)) or 'none'}.")
        return pd.DataFrame(rows)


def load_runs(path: str | Path) -> Runs:
    """The runs below a folder; of a W&B project or sweep, `wandb:entity/project[/sweep]`; or of `.wandb` files, one or
    a folder of them. A run that cannot be read is a row with its reason, never left out.

    Raises ConfigError where there is no such source, or no run in it.
    """
    if str(path).startswith("wandb:"):
        from albert_ablate.analysis.wandb import server_rows

        return _collected(server_rows(str(path)))
    root = Path(path).expanduser()
    if root.suffix == ".wandb" and root.is_file():
        from albert_ablate.analysis.wandb import offline_rows

        return _collected(offline_rows([root]))
    if not root.is_dir():
        raise ConfigError(f"{path} is no folder of runs.")
    rows = [_row(folder) for folder in sorted(root.glob("*/seed*")) if folder.is_dir()]
    if not rows and (files := [*root.rglob("*.wandb")]):
        from albert_ablate.analysis.wandb import offline_rows

        return _collected(offline_rows(files))
    if not rows:
        raise ConfigError(f"{path} holds no run: runs lie in {path}/<setting>/seed<N>/.")
    return Runs(_summary(rows))


def _collected(found: Iterator[tuple[dict[str, Any], Callable[[str], pa.Table]]]) -> Runs:
    rows, remote = [], {}
    for row, read in found:
        rows.append(row)
        remote[row["folder"]] = read
    return Runs(_summary(rows), remote)


def _summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    summary = pd.DataFrame(rows)
    if "seed" in summary:
        summary["seed"] = summary["seed"].astype("Int64")  # stays whole where some records cannot be read
    return summary


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"folder": str(folder), "status": None, "reason": None}
    try:
        record = json.loads((folder / "record.json").read_text())
        row |= {key: record[key] for key in KEYS}
        row |= {group: option for group, option in (record["choices"] or {}).items()}
        row |= dict(_dotted(record["config"]))
        row |= record["summary"] | record["cost"]
        row["reason"] = _last_line(record["error"])
    except FileNotFoundError:
        row["reason"] = "it has no record.json: it was stopped before its first commit"
    except (OSError, ValueError, KeyError, TypeError) as error:
        row |= {"status": None, "reason": f"record.json cannot be read: {type(error).__name__}: {error}"}
    try:
        for name, entry in read_evaluations(folder).items():
            row |= {f"{name}.{figure}": value for figure, value in entry["summary"].items()}
    except ConfigError as error:
        row["reason"] = str(error)
    return row


def _dotted(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        elif not name.startswith("_") and prefix:
            yield f"{prefix}{name}", value


def _last_line(error: str | None) -> str | None:
    return error.strip().splitlines()[-1] if error else None
