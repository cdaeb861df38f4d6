"""What all trackers share. A tracker mirrors the run folder: it is sent what that holds, never the other way round.

A tracker is a class with `begin`, `push` and `end`, and one YAML in conf/logger. Several at once are a dictionary.
"""

import statistics
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from albert_ablate.config import ConfigError
from albert_ablate.records.secrets import masked

AXES = ("tokens", "step", "seconds", "flops")
NOT_METRICS = {*AXES, "split", "layer", "sublayer", "data_order"}
Rows = Mapping[str, list[Mapping]]  # by history


class NoLogger:
    """The run folder alone."""

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        """Begin, with the histories a resumed run already has."""

    def send(self, rows: Rows) -> None:
        """Rows that have just been committed, by history."""

    def close(self, record: Mapping) -> None:
        """The session's end, whatever the run's status."""


class Tracker(NoLogger):
    """A mirror whose trouble never ends a run: it is said once, and the run goes on without it.

    `begin`, `push` and `end` do the work and raise what they raise; `open`, `send` and `close` guard them.
    """

    NAME = ""  # for people
    PACKAGE: str | None = None  # what must be installed, and the extra of this project that brings it
    EXTRA = ""

    def __init__(self, layers: bool = False) -> None:
        self.live = False
        self.layers = layers  # every layer, instead of the least, median and largest over depth
        if self.PACKAGE and not _installed(self.PACKAGE):
            raise ConfigError(f"{self.NAME} is not installed: pip install 'albert_ablate[{self.EXTRA}]'.")

    def begin(self, folder: Path, record: Mapping, rows: Rows) -> None:
        raise NotImplementedError

    def push(self, rows: Rows) -> None:
        raise NotImplementedError

    def end(self, record: Mapping) -> None:
        raise NotImplementedError

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        self.live = self.guard(self.begin, folder, record, lists(histories))

    def send(self, rows: Rows) -> None:
        if self.live:
            self.live = self.guard(self.push, rows)

    def close(self, record: Mapping) -> None:
        if self.live:
            self.guard(self.end, record)
            self.live = False

    def guard(self, act: Any, *args: Any) -> bool:
        """Whether `act` did its work. A tracker must not end a run, whatever it raises."""
        try:
            act(*args)
        except Exception as error:
            print(f"{self.NAME} failed and the run goes on ({reason(error)}).", file=sys.stderr)
            return False
        return True


class Several(NoLogger):
    """Several trackers, none of which knows of the others."""

    def __init__(self, trackers: list[NoLogger]):
        self.trackers = trackers

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        for tracker in self.trackers:
            tracker.open(folder, record, histories)

    def send(self, rows: Rows) -> None:
        for tracker in self.trackers:
            tracker.send(rows)

    def close(self, record: Mapping) -> None:
        for tracker in self.trackers:
            tracker.close(record)


def joined(made: Any) -> NoLogger:
    """One tracker of what `logger` builds: itself, or a dictionary of several."""
    return Several(list(made.values())) if isinstance(made, Mapping) else made


def lists(histories: Mapping[str, pa.Table]) -> dict[str, list[Mapping]]:
    return {name: table.to_pylist() for name, table in histories.items()}


def reason(error: Exception) -> str:
    """An error of a tracker's in one line, without secrets."""
    return masked(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


def _installed(name: str) -> bool:
    try:
        return name in sys.modules or find_spec(name) is not None
    except ValueError:  # a stand-in without a spec
        return False


def merged(rows: Rows, sent: int = 0, every_layer: bool = False) -> list[dict]:
    """One row per step under a tracker's metric paths: train/loss, eval/validation/loss, layers/mlp/grad_norm/median.

    Of the layers come least (min), median and largest (max) over depth, or with every_layer each one's own figure,
    layers/3/mlp/grad_norm: some 5,400 scalars a step at 96 layers.

    In the order of the steps; last the rows below `sent` and those that follow a later step in their history: a test of
    the weights that were best, taken when training is over. The layers at step 0, known when the first step has been
    taken, are in its row as initial/mlp/grad_norm/median. What does not apply (nan) is left out.
    """
    folded: dict[tuple[bool, int], dict] = {}
    for name, new in rows.items():
        if name == "layers" and not every_layer:
            new = _over_depth(new)
        latest = sent
        for row in new:
            initial = name == "layers" and row["step"] == 0
            step = 1 if initial else row["step"]
            late, latest = step < latest, max(latest, step)
            prefix = {
                "steps": "train",
                "evals": f"eval/{row.get('split')}",
                "layers": "/".join(
                    str(part)
                    for part in ("initial" if initial else "layers", row.get("layer"), row.get("sublayer"))
                    if part is not None
                ),
            }[name]
            values = {f"{prefix}/{k}": v for k, v in row.items() if k not in NOT_METRICS and _applies(name, k, v)}
            key = (late, step)
            folded[key] = {k: row[k] for k in AXES} | folded.get(key, {}) | values
    return [folded[key] for key in sorted(folded)]


def _over_depth(rows: list[Mapping]) -> list[Mapping]:
    """Rows of the layers, one for each step and sublayer: least, median and largest of each column over depth."""
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault((row["step"], row.get("sublayer")), []).append(row)
    out: list[Mapping] = []
    for (_, sublayer), alike in groups.items():
        summary: dict[str, Any] = {k: alike[0][k] for k in AXES} | {"sublayer": sublayer}
        for column in alike[0]:
            if column in NOT_METRICS:
                continue
            values = [r[column] for r in alike if _applies("layers", column, r.get(column))]
            if values:
                summary |= {
                    f"{column}/min": min(values),
                    f"{column}/median": statistics.median(values),
                    f"{column}/max": max(values),
                }
        out.append(summary)
    return out


def _applies(history: str, column: str, value: Any) -> bool:
    """Whether there is a value; nan is one for a loss or a norm of all gradients, which may not be finite."""
    optional = history == "layers" or column in ("noise_scale", "grad_norm_clipped", "logit_rms")
    return value is not None and not (optional and value != value)


def settings(record: Mapping) -> dict[str, Any]:
    """The configuration and the names of a run, by dotted key."""
    return {"arm": record["arm"], "setting": record["setting"], **dict(_dotted(record["config"]))}


def figures(record: Mapping) -> dict[str, float]:
    """The numbers of the summary."""
    return {k: float(v) for k, v in record["summary"].items() if isinstance(v, int | float)}


def status_of(record: Mapping) -> str:
    """finished, diverged, stopped, or failed for whatever else a session has left."""
    return record["status"] if record["status"] in ("finished", "diverged", "stopped") else "failed"


def _dotted(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
