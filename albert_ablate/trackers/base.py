"""What all trackers share. A tracker mirrors the run folder: it is sent what that holds, never the other way round.

A tracker is a class with `begin`, `push` and `end`, and one YAML in conf/logger. Several at once are a dictionary.
"""

import contextlib
import copy
import queue
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from albert_ablate.config import ConfigError
from albert_ablate.config.dotted import dotted
from albert_ablate.config.secrets import masked

AXES = ("tokens", "step", "seconds", "flops")
NOT_METRICS = {*AXES, "split", "layer", "sublayer", "data_order"}
Rows = Mapping[str, list[Mapping]]  # by history

# Seconds. All trackers of a run may hold it up so long, of which the second at its beginning; letting go of what hangs
# costs a few more.
LIMIT, LIMIT_AT_BEGINNING = 25.0, 15.0
SLOW_FAILURE_SECONDS = 2.0  # a server that has failed after as long is not asked again by this process for a while
RETRY_PAUSE_SECONDS = 600.0
_unanswered: dict[str, float] = {}  # address of such a server -> when it may be asked again


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

    `begin`, `push` and `end` do the work and raise what they raise. They are called in a thread of their own, one after
    the other: a server or a client process that hangs does not hold up the training, and the end of a run waits for
    what is left to be sent until LIMIT.
    """

    NAME = ""  # for people
    SYNC = ""  # what `albert-ablate sync --to` calls it
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

    def mirror(self, folder: Path, record: Mapping, rows: Rows) -> None:
        """How a run begins: `begin`, unless the server has lately not answered."""
        self.try_server(self.begin, folder, record, rows)

    def abandon(self) -> None:
        """After a failure: let go of what would hold up the process."""

    def address(self) -> str | None:
        """The server that is sent to; None: there is none."""
        return None

    def sync_options(self) -> str:
        """What the `sync` command needs beside the folder to send the run to the same place."""
        return ""

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        self.start(folder, record, lists(histories))
        self.wait_begun()

    def start(self, folder: Path, record: Mapping, rows: Rows) -> None:
        """Begin, without waiting."""
        self.folder, self.live, self.told, self.left = folder, True, False, LIMIT
        self.acts: queue.SimpleQueue[tuple[threading.Event, Callable, tuple] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(self.acts,), daemon=True, name=self.NAME).start()
        self.begun = self._ask(self.mirror, folder, copy.deepcopy(dict(record)), rows)

    def wait_begun(self) -> None:
        self._wait(self.begun, LIMIT_AT_BEGINNING)

    def send(self, rows: Rows) -> None:
        if self.live:
            self._ask(self.push, rows)

    def close(self, record: Mapping) -> None:
        self.start_closing(record)
        self.wait_closed()

    def start_closing(self, record: Mapping) -> None:
        """Everything has been handed over: end, without waiting."""
        self.closed = self._ask(self.end, copy.deepcopy(dict(record))) if self.live else None

    def wait_closed(self) -> None:
        if self.closed is not None and not self._wait(self.closed, LIMIT):
            self.live = False
            self._pause()
            self.tell("it has not taken everything in time")
            self.abandon()
        self.live = False
        if hasattr(self, "acts"):
            self.acts.put(None)

    def guard(self, act: Callable, *args: Any) -> bool:
        """Whether `act` did its work. A tracker must not end a run, whatever it raises."""
        try:
            with self._slow_failure_noted():
                act(*args)
        except Exception as error:
            self.tell(reason(error))
            self.abandon()
            return False
        return True

    def try_server(self, act: Callable, *args: Any) -> None:
        """Call `act`; OSError at once where this process has lately waited for the server in vain."""
        if time.monotonic() < _unanswered.get(self.address() or "", 0.0):
            raise OSError("the server has not answered before")
        with self._slow_failure_noted():
            act(*args)

    def tell(self, why: str) -> None:
        """One sentence, once a run: what has happened, and which command sends what is missing."""
        if self.told:
            return
        self.told = True
        command = f"albert-ablate sync {shlex.quote(str(self.folder))} --to {self.SYNC}{self.sync_options()}"
        mends = f"; `{command}` sends what is missing once the run is done" if self.SYNC else ""
        print(masked(f"{self.NAME} failed and the run goes on ({why}){mends}."), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _slow_failure_noted(self) -> Iterator[None]:
        """The next runs of this process are not to wait for a server that has just been waited for in vain."""
        began = time.monotonic()
        try:
            yield
        except Exception:
            if time.monotonic() - began > SLOW_FAILURE_SECONDS:
                self._pause()
            raise

    def _pause(self) -> None:
        if address := self.address():
            _unanswered[address] = time.monotonic() + RETRY_PAUSE_SECONDS

    def _ask(self, act: Callable, *args: Any) -> threading.Event:
        done = threading.Event()
        self.acts.put((done, act, args))
        return done

    def _wait(self, done: threading.Event, limit: float) -> bool:
        began = time.monotonic()
        is_done = done.wait(max(0.0, min(self.left, limit)))
        self.left -= time.monotonic() - began
        return is_done

    def _work(self, acts: queue.SimpleQueue) -> None:
        while (task := acts.get()) is not None:
            done, act, args = task
            if self.live and not self.guard(act, *args):
                self.live = False
            done.set()


class Several(NoLogger):
    """Several trackers, none of which knows of the others. Limits are shared: they are waited for together."""

    def __init__(self, trackers: list[NoLogger]):
        self.trackers = trackers
        self.threaded = [t for t in trackers if isinstance(t, Tracker)]

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        for tracker in self.trackers:
            if isinstance(tracker, Tracker):
                tracker.start(folder, record, lists(histories))
            else:
                tracker.open(folder, record, histories)
        began = time.monotonic()
        for tracker in self.threaded:
            tracker.left = LIMIT - (time.monotonic() - began)
            tracker._wait(tracker.begun, LIMIT_AT_BEGINNING - (time.monotonic() - began))
        for tracker in self.threaded:
            tracker.left = LIMIT - (time.monotonic() - began)

    def send(self, rows: Rows) -> None:
        for tracker in self.trackers:
            tracker.send(rows)

    def close(self, record: Mapping) -> None:
        for tracker in self.trackers:
            if isinstance(tracker, Tracker):
                tracker.start_closing(record)
            else:
                tracker.close(record)
        began = time.monotonic()
        for tracker in self.threaded:
            tracker.left -= time.monotonic() - began
            tracker.wait_closed()


def joined(loggers: Any) -> NoLogger:
    """One tracker of what `logger` builds: itself, a dictionary of several, or a logger of Lightning's."""
    if isinstance(loggers, Mapping):
        return Several([joined(one) for one in loggers.values()])
    if isinstance(loggers, NoLogger):
        return loggers
    from albert_ablate.trackers.lightning import LightningTracker

    return LightningTracker(loggers)


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
    return {"arm": record["arm"], "setting": record["setting"], **dict(dotted(record["config"]))}


def figures(record: Mapping) -> dict[str, float]:
    """The numbers of the summary."""
    return {k: float(v) for k, v in record["summary"].items() if isinstance(v, int | float)}


def status_of(record: Mapping) -> str:
    """finished, diverged, stopped, or failed for whatever else a session has left."""
    return record["status"] if record["status"] in ("finished", "diverged", "stopped") else "failed"
