"""Base classes of trackers, which mirror a run folder to W&B, MLflow, TensorBoard and others, never the other way.

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

# Seconds that all trackers of a run together may delay it, and how much of that at its beginning. Giving up a client
# that hangs takes a few more.
LIMIT, LIMIT_AT_BEGINNING = 25.0, 15.0
SLOW_FAILURE_SECONDS = 2.0  # a server whose failure took this long is not contacted again by this process for a while
RETRY_PAUSE_SECONDS = 600.0
_unanswered: dict[str, float] = {}  # address of such a server -> when it may be contacted again


class NoLogger:
    """No tracker: the run folder alone. Also the interface that the recorder calls."""

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        """Start tracking; `histories` are the rows that a resumed run already has."""

    def send(self, rows: Rows) -> None:
        """Send rows that have just been committed, by history."""

    def close(self, record: Mapping) -> None:
        """End tracking at the end of the session, whatever the run's status."""


class Tracker(NoLogger):
    """Base of all trackers: a failure is printed once, and the run continues without the tracker.

    Subclasses implement `begin`, `push` and `end`, which may raise anything. These are called in a thread of their own,
    one after the other, so that a server or client process that hangs does not delay training; the end of a run waits
    for what is left to be sent, at most LIMIT.
    """

    NAME = ""  # in messages
    SYNC = ""  # its name in `albert-ablate sync --to`
    PACKAGE: str | None = None  # package that must be installed, and the extra of this project that installs it
    EXTRA = ""

    def __init__(self, layers: bool = False) -> None:
        self.live = False
        self.layers = layers  # every layer, instead of the least, median and largest over depth
        if self.PACKAGE and not _installed(self.PACKAGE):
            raise ConfigError(f"{self.NAME} is not installed: pip install 'albert_ablate[{self.EXTRA}]'.")

    def begin(self, folder: Path, record: Mapping, rows: Rows) -> None:
        """Create or reopen the tracker's run, and send `rows`, those that a resumed run already has."""
        raise NotImplementedError

    def push(self, rows: Rows) -> None:
        """Send new rows, by history."""
        raise NotImplementedError

    def end(self, record: Mapping) -> None:
        """Send the summary and the status, and close the tracker's run."""
        raise NotImplementedError

    def mirror(self, folder: Path, record: Mapping, rows: Rows) -> None:
        """Call `begin`, unless the server has lately not answered."""
        self.try_server(self.begin, folder, record, rows)

    def abandon(self) -> None:
        """Clean up after a failure: end what could keep the process from exiting."""

    def address(self) -> str | None:
        """Address of the server; None if there is none."""
        return None

    def sync_options(self) -> str:
        """Options with which the `sync` command sends the run to the same place."""
        return ""

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        self.start(folder, record, lists(histories))
        self.wait_begun()

    def start(self, folder: Path, record: Mapping, rows: Rows) -> None:
        """Start tracking in a thread, without waiting for it."""
        self.folder, self.live, self.failure_reported, self.seconds_left = folder, True, False, LIMIT
        self.acts: queue.SimpleQueue[tuple[threading.Event, Callable, tuple] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run_queue, args=(self.acts,), daemon=True, name=self.NAME).start()
        self.begun = self._enqueue(self.mirror, folder, copy.deepcopy(dict(record)), rows)

    def wait_begun(self) -> None:
        """Wait until `begin` is done, at most LIMIT_AT_BEGINNING."""
        self._wait(self.begun, LIMIT_AT_BEGINNING)

    def send(self, rows: Rows) -> None:
        if self.live:
            self._enqueue(self.push, rows)

    def close(self, record: Mapping) -> None:
        self.start_closing(record)
        self.wait_closed()

    def start_closing(self, record: Mapping) -> None:
        """Queue the end of tracking after what is still to be sent, without waiting."""
        self.closed = self._enqueue(self.end, copy.deepcopy(dict(record))) if self.live else None

    def wait_closed(self) -> None:
        """Wait until everything is sent, at most LIMIT; then give up what is left and say so."""
        if self.closed is not None and not self._wait(self.closed, LIMIT):
            self.live = False
            self._pause()
            self.report_failure("it has not taken everything in time")
            self.abandon()
        self.live = False
        if hasattr(self, "acts"):
            self.acts.put(None)

    def guard(self, act: Callable, *args: Any) -> bool:
        """Call `act` and return whether it succeeded: an error is printed and the tracker given up, the run goes on."""
        try:
            with self._slow_failure_noted():
                act(*args)
        except Exception as error:
            self.report_failure(reason(error))
            self.abandon()
            return False
        return True

    def try_server(self, act: Callable, *args: Any) -> None:
        """Call `act`; raises OSError at once if the server lately failed to answer this process."""
        if time.monotonic() < _unanswered.get(self.address() or "", 0.0):
            raise OSError("the server has not answered before")
        with self._slow_failure_noted():
            act(*args)

    def report_failure(self, why: str) -> None:
        """Print once per run what went wrong, and which command sends what is missing."""
        if self.failure_reported:
            return
        self.failure_reported = True
        command = f"albert-ablate sync {shlex.quote(str(self.folder))} --to {self.SYNC}{self.sync_options()}"
        mends = f"; `{command}` sends what is missing once the run is done" if self.SYNC else ""
        print(masked(f"{self.NAME} failed and the run continues ({why}){mends}."), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _slow_failure_noted(self) -> Iterator[None]:
        """Note a failure that took long, so that the next runs of this process do not wait for that server again."""
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

    def _enqueue(self, act: Callable, *args: Any) -> threading.Event:
        done = threading.Event()
        self.acts.put((done, act, args))
        return done

    def _wait(self, done: threading.Event, limit: float) -> bool:
        began = time.monotonic()
        is_done = done.wait(max(0.0, min(self.seconds_left, limit)))
        self.seconds_left -= time.monotonic() - began
        return is_done

    def _run_queue(self, acts: queue.SimpleQueue) -> None:
        while (task := acts.get()) is not None:
            done, act, args = task
            if self.live and not self.guard(act, *args):
                self.live = False
            done.set()


class Several(NoLogger):
    """Several trackers at once. They share the time limits: the run waits for all together, not one by one."""

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
            tracker.seconds_left = LIMIT - (time.monotonic() - began)
            tracker._wait(tracker.begun, LIMIT_AT_BEGINNING - (time.monotonic() - began))
        for tracker in self.threaded:
            tracker.seconds_left = LIMIT - (time.monotonic() - began)

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
            tracker.seconds_left -= time.monotonic() - began
            tracker.wait_closed()


def joined(loggers: Any) -> NoLogger:
    """Make one tracker of what `logger` built: a tracker, a dictionary of several, or a Lightning logger."""
    if isinstance(loggers, Mapping):
        return Several([joined(one) for one in loggers.values()])
    if isinstance(loggers, NoLogger):
        return loggers
    from albert_ablate.trackers.lightning import LightningTracker

    return LightningTracker(loggers)


def lists(histories: Mapping[str, pa.Table]) -> dict[str, list[Mapping]]:
    """Rows of Arrow tables as dictionaries, by history."""
    return {name: table.to_pylist() for name, table in histories.items()}


def reason(error: Exception) -> str:
    """An error in one line of at most 300 characters, without secrets."""
    return masked(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


def _installed(name: str) -> bool:
    try:
        return name in sys.modules or find_spec(name) is not None
    except ValueError:  # a stand-in without a spec
        return False


def merged(rows: Rows, sent: int = 0, every_layer: bool = False) -> list[dict]:
    """Merge histories into one row per step with metric paths such as train/loss and layers/mlp/grad_norm/median.

    Layers are summarized by min, median and max over depth, or with every_layer logged one by one,
    layers/3/mlp/grad_norm: some 5,400 scalars per logged step at 96 layers.

    Rows are in the order of steps, except that rows of an earlier step than one already sent come last: the test of the
    best weights, made after training. Layers at step 0, known once the first step is taken, are in that step's row as
    initial/mlp/grad_norm/median. Values that do not apply (nan) are left out.
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
    """Summarize rows of layers over depth: min, median and max of each column, a row for each step and sublayer."""
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
    """Whether a value is to be sent; nan is, for a loss or a norm of all gradients, which may really not be finite."""
    optional = history == "layers" or column in ("noise_scale", "grad_norm_clipped", "logit_rms")
    return value is not None and not (optional and value != value)


def settings(record: Mapping) -> dict[str, Any]:
    """Configuration, arm and setting of a run as a flat dictionary with dotted keys."""
    return {"arm": record["arm"], "setting": record["setting"], **dict(dotted(record["config"]))}


def summary_metrics(record: Mapping) -> dict[str, float]:
    """The numbers of a record's summary, by name."""
    return {k: float(v) for k, v in record["summary"].items() if isinstance(v, int | float)}


def status_of(record: Mapping) -> str:
    """Status of a run for trackers: finished, diverged, stopped, or failed for any other."""
    return record["status"] if record["status"] in ("finished", "diverged", "stopped") else "failed"
