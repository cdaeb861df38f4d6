"""What a report draws of the histories of its runs: read once, thinned, and kept for the next report.

A history is reduced to a few arrays of numbers, which are kept in the user's cache folder beside the state of the run's
files: a report on the same runs reads only those that have changed since.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from albert_ablate.analysis.thinning import depth_map, thinned
from albert_ablate.records import store
from albert_ablate.records.cache import cache_folder, read_cached, write_cached
from albert_ablate.records.evaluation_results import FILE as EVALUATIONS
from albert_ablate.records.folder import DONE
from albert_ablate.records.history import read_history
from albert_ablate.streams import digest

LIBRARIES = ("altair", "pandas", "vl-convert-python", "scipy")
VERSION = 1  # raised when a history is reduced in another way
BATCH_POINTS = 120_000  # of training curves on the whole page
POINTS_OF_A_RUN = (400, 200, 100, 60, 30)  # few sizes, so that some more runs do not change those of all others
EVAL_COLUMNS = ("tokens", "split", "loss", "bits_per_byte")
MAP_KEYS = ("step", "tokens", "layer", "sublayer", "weight_norm")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)
Arrays = Mapping[str, np.ndarray]
Remote = Mapping[str, Callable[[str], pa.Table]]


@dataclass(frozen=True)
class Histories:
    """The curves of each run: eval_tokens, eval_train (1 of the training split), eval_loss, eval_bits, batch_tokens,
    batch_loss (thinned), end_tokens (of the last step); None where its histories cannot be read."""

    runs: Sequence[Arrays | None]

    @property
    def unreadable(self) -> list[int]:
        """Positions of the runs whose histories cannot be read."""
        return [i for i, run in enumerate(self.runs) if run is None]

    @cached_property
    def evals(self) -> pd.DataFrame:
        """run (its number), tokens, split, loss, bits_per_byte of each evaluation of the train or validation split."""
        table = self._table("eval_tokens", "eval_train", "eval_loss", "eval_bits")
        table = table.set_axis(["run", "tokens", "split", "loss", "bits_per_byte"], axis=1)
        return table.assign(split=np.where(table["split"] > 0, "train", "validation"))

    @cached_property
    def batches(self) -> pd.DataFrame:
        """run (its number), tokens, loss of the thinned training batches."""
        return self._table("batch_tokens", "batch_loss").set_axis(["run", "tokens", "loss"], axis=1)

    def _table(self, *names: str) -> pd.DataFrame:
        known = [(i, run) for i, run in enumerate(self.runs) if run is not None]
        lengths = [len(run[names[0]]) for _, run in known]
        columns = {"run": np.repeat(np.array([i for i, _ in known], int), lengths)}
        for name in names:
            columns[name] = np.concatenate([run[name] for _, run in known]) if known else np.empty(0)
        return pd.DataFrame(columns)


def read_histories(root: Path, rows: pd.DataFrame, remote: Remote) -> Histories:
    """The curves of all runs of the summary `rows`."""
    points = next((p for p in POINTS_OF_A_RUN if p * len(rows) <= BATCH_POINTS), POINTS_OF_A_RUN[-1])

    def reduce(row: Any) -> Arrays | None:
        held, steps = (_columns(row, remote, name, columns) for name, columns in _WANTED.items())
        if held is None or steps is None:
            return None
        split = held["split"]
        kept = (split == "train") | (split == "validation")
        at = thinned(steps["loss"], points)
        return {
            "eval_tokens": held["tokens"][kept].astype(float),
            "eval_train": (split[kept] == "train").astype(float),
            "eval_loss": held["loss"][kept].astype(float),
            "eval_bits": held.get("bits_per_byte", np.full(len(split), np.nan))[kept].astype(float),
            "batch_tokens": steps["tokens"][at].astype(float),
            "batch_loss": steps["loss"][at].astype(float),
            "end_tokens": steps["tokens"][-1:].astype(float),
        }

    return Histories(_reduced(root, rows, remote, f"curves-{points}", reduce))


_WANTED = {"evals": EVAL_COLUMNS, "steps": ("tokens", "loss")}


def read_maps(
    root: Path, rows: pd.DataFrame, remote: Remote, quantities: Sequence[str], columns: int
) -> list[dict[str, pd.DataFrame]]:
    """Of each run in the summary `rows` the maps of depth by tokens, by quantity; those that it has."""

    def reduce(row: Any) -> Arrays | None:
        found = _columns(row, remote, "layers", (*MAP_KEYS, *quantities))
        if found is None:
            return None
        if len(found.get("sublayer", ())) and pd.isna(found["sublayer"]).all():
            del found["sublayer"]  # an older release wrote one row a block
        layers = pd.DataFrame(found)
        maps = {q: depth_map(layers, q, columns) for q in quantities}
        return {f"{q}.{c}": maps[q][c].to_numpy(float) for q in quantities for c in maps[q]}

    kind = f"maps-{columns}-{digest(' '.join(quantities).encode())}"
    out = []
    for run in _reduced(root, rows, remote, kind, reduce):
        names = {} if run is None else {q: [c for c in run if c.startswith(f"{q}.")] for q in quantities}
        maps = {q: pd.DataFrame({c.split(".", 1)[1]: run[c] for c in own}) for q, own in names.items()}  # type: ignore[index]
        out.append({q: m.astype({"layer": int}) for q, m in maps.items() if len(m)})
    return out


def _columns(row: Any, remote: Remote, name: str, columns: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Those of the columns that the run's history has; None where it cannot be read."""
    try:
        if row.folder in remote:
            table = remote[row.folder](name)
        elif row.status in DONE:  # it changes no more
            table = read_history(Path(row.folder), name, None, row.identity)
        else:
            record = store.read(row.folder)
            if isinstance(record, store.Unreadable):
                return None
            table = read_history(Path(row.folder), name, record.histories, record.identity)
        return {c: table[c].to_numpy() for c in columns if c in table.column_names}
    except UNREADABLE:
        return None


# --- kept reductions -------------------------------------------------------------------------------------------------


def _reduced(
    root: Path, rows: pd.DataFrame, remote: Remote, kind: str, reduce: Callable[[Any], Arrays | None]
) -> list[Arrays | None]:
    """`reduce` of every row; from the cache, where the run's files are as they were."""
    file = cache_folder() / "report" / digest(os.fsencode(root.resolve())) / f"{kind}.arrow"
    known = _load(file)
    now = {folder: kept for folder, kept in known.items() if os.path.isdir(folder)}  # of other runs of the root, too
    found: list[Arrays | None] = []
    changed = False
    for row in rows.itertuples(index=False):
        if row.folder in remote:
            found.append(reduce(row))
            continue
        state = run_stamp(row.folder)
        was, arrays = known.get(str(row.folder), ("", None))
        if was != state or arrays is None:
            arrays, changed = reduce(row), True
        if arrays is not None:
            now[str(row.folder)] = state, arrays
        found.append(arrays)
    if changed and now:
        write_cached(file, _stored(now))
    return found


def run_stamp(folder: str | Path) -> str:
    """Time and size of the files of a run that a page is made from."""
    said = []
    try:
        for entry in os.scandir(folder):
            if entry.name in (store.FILE, EVALUATIONS) or entry.name.endswith((".arrow", ".arrows")):
                said.append(f"{entry.name} {_stamp(entry.stat())}")
    except OSError:
        return ""
    return f"{VERSION}; " + "; ".join(sorted(said))


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns} {stat.st_size} {stat.st_ino}"


def inputs(root: Path, *more: Path | str | None) -> str:
    """A digest that is another one as soon as any file that a report on `root` is made from has changed: runs, tuning
    results, this package. more: other files, and other settings."""
    package = Path(__file__).parent.parent
    files = [*sorted((root / "tuning").glob("*.json")), *(f for f in more if isinstance(f, Path))]
    files += sorted(f for f in package.rglob("*") if f.suffix in (".py", ".j2", ".js", ".yaml"))
    said = [str(root.resolve()), *(str(m) for m in more), *(f"{n} {version(n)}" for n in LIBRARIES)]
    said += [f"{f} {_stamp(f.stat()) if f.exists() else ''}" for f in files]
    said += [f"{folder} {run_stamp(folder)}" for folder in store.run_folders(root)]
    return digest("\n".join(said).encode("utf-8", "surrogateescape"))


def study_stamp(root: Path, folders: Sequence[Path], *more: Path | None) -> str:
    """What changes as soon as a file of the runs in `folders`, a tuning result or one of `more` does: `inputs` without
    what stays the same while a command runs."""
    said = [*tuning_stamp(root), *(f"{f} {_stamp(f.stat())}" for f in more if f is not None and f.exists())]
    return digest("\n".join([*said, *(f"{f} {run_stamp(f)}" for f in folders)]).encode("utf-8", "surrogateescape"))


def tuning_stamp(root: Path) -> tuple[str, ...]:
    """Time and size of the tuning results below `root`."""
    return tuple(f"{f} {_stamp(f.stat())}" for f in sorted((root / "tuning").glob("*.json")))


def _stored(runs: Mapping[str, tuple[str, Arrays]]) -> bytes:
    """A row a run: its folder, the state of its files, and a list of numbers for each array."""
    names = list(next(iter(runs.values()))[1])
    columns: dict[str, pa.Array] = {
        "folder": pa.array([os.fsencode(f) for f in runs], pa.binary()),
        "state": pa.array([state for state, _ in runs.values()]),
    }
    for name in names:
        each = [arrays[name] for _, arrays in runs.values()]
        offsets = np.r_[0, np.cumsum([len(x) for x in each])].astype(np.int64)
        columns[name] = pa.LargeListArray.from_arrays(offsets, np.concatenate(each).astype(float))
    table = pa.table(columns)
    out = io.BytesIO()
    with pa.ipc.new_file(out, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return out.getvalue()


def _load(file: Path) -> dict[str, tuple[str, Arrays]]:
    """What `_stored` was given; empty where nothing is kept."""
    raw = read_cached(file)
    if raw is None:
        return {}
    table = pa.ipc.open_file(pa.BufferReader(raw)).read_all().combine_chunks()
    names = [n for n in table.column_names if n not in ("folder", "state")]
    lists = {}
    for name in names:
        column = table[name].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        lists[name] = np.split(column.values.to_numpy(), column.offsets.to_numpy()[1:-1])
    folders = [os.fsdecode(f) for f in table["folder"].to_pylist()]
    arrays: list[Arrays] = [dict(zip(names, each, strict=True)) for each in zip(*lists.values(), strict=True)]
    return dict(zip(folders, zip(table["state"].to_pylist(), arrays, strict=True), strict=True))
