"""One progress bar over the runs of a study, on a terminal: runs done, running and failed, and the time left."""

import contextlib
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tqdm import tqdm

from albert_ablate.records import store
from albert_ablate.records.json_output import NO_BARS
from albert_ablate.studies.planned_runs import Planned
from albert_ablate.studies.status import share_done
from albert_ablate.training.console import rough_duration

REDRAW_SECONDS = 1.0  # between two drawings
ERASE = "\x1b[K"  # from the cursor to the end of its line
WIDTH = 100  # columns at most


def is_drawn() -> bool:
    """Whether a bar is drawn: stderr is a terminal, stdout no pipe (which may end in the same terminal, as that of
    `| tee` does), and the environment variable records.json_output.NO_BARS is not set."""
    if os.environ.get(NO_BARS) or os.environ.get("TERM", "dumb") == "dumb" or not os.isatty(2):
        return False
    try:
        return not stat.S_ISFIFO(os.fstat(1).st_mode)
    except OSError:  # it is closed
        return False


def print_line(text: str) -> None:
    """Print a line in one write; where a bar is drawn it takes the bar's place, which is drawn again below it.

    The bar leaves the cursor at the beginning of its line, so this works in the processes of workers too.
    """
    end = f"{ERASE}\n" if is_drawn() and sys.stdout.isatty() else "\n"
    sys.stdout.write(text + end)
    sys.stdout.flush()


class Bar(AbstractContextManager["Bar"]):
    """A bar over the runs of one `Study.complete`, from their records, drawn by a thread; nothing where none is to be.

    training: the folders of the runs that this study is training now. The time left follows from the work done since
    this command began, in tokens times layers of the model.
    """

    def __init__(self, planned: Sequence[Planned], training: Callable[[], set[Path]]):
        self.training, self.drawn = training, is_drawn() and bool(planned)
        self.begun = time.time()
        self.first: float | None = None  # when a run was seen in training first
        self.layer_tokens = {p.folder: p.cfg.budget.tokens * p.cfg["model"].get("layers", 1) for p in planned}
        self.shares = dict.fromkeys(self.layer_tokens, 0.0)
        self.status = dict.fromkeys(self.layer_tokens, "")
        self.before = 0.0  # work done before this command
        self._stamps: dict[Path, int] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Bar":
        if self.drawn:
            self.look()
            self.before = sum(self.layer_tokens[folder] * share for folder, share in self.shares.items())
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self.clear()

    def clear(self) -> None:
        """Remove the bar, before the command itself prints a line."""
        if self.drawn:
            self._write(f"\r{ERASE}")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed, and the runs go on
            os.write(2, text.encode())

    def _draw(self) -> None:
        while not self._over.wait(REDRAW_SECONDS):
            self.look()
            width = min(WIDTH, shutil.get_terminal_size().columns - 1)
            self._write(f"\r{self.line(width)}{ERASE}\r")

    def look(self) -> None:
        """Read again the records that were written since the last look."""
        for folder in self.layer_tokens:
            try:
                stamp = os.stat(folder / store.FILE).st_mtime_ns
            except OSError:
                continue
            if self._stamps.get(folder) == stamp:
                continue
            self._stamps[folder] = stamp
            record = store.read_fields(folder, ("status", "progress", "updated"))
            if isinstance(record, store.Unreadable):
                continue
            old = record["status"] == "failed" and (record["updated"] or 0) < self.begun  # is tried again
            self.status[folder] = "" if old else record["status"]
            self.shares[folder] = share_done(record)

    def line(self, width: int) -> str:
        """The bar in `width` columns."""
        running = self.training() & self.layer_tokens.keys()
        states = [state for folder, state in self.status.items() if folder not in running]
        done, failed = sum(s in store.DONE for s in states), states.count("failed")
        words = f"{done} of {len(self.layer_tokens)} runs done, {len(running)} running"
        words += f", {failed} failed" if failed else ""
        left = self.seconds_left(bool(running))
        words += "" if left is None else f", about {rough_duration(left)} left"
        total = sum(self.layer_tokens.values())
        share = sum(self.layer_tokens[folder] * part for folder, part in self.shares.items()) / total
        form = "{percentage:3.0f}% {bar} {desc}"
        return tqdm.format_meter(share, 1, 0, ncols=width, bar_format=form, prefix=words)

    def seconds_left(self, running: bool) -> float | None:
        """Time until all runs are done at the speed since the first began; None while nothing was done since."""
        if running and self.first is None:
            self.first = time.time()
        done = sum(self.layer_tokens[folder] * share for folder, share in self.shares.items())
        if self.first is None or done <= self.before:
            return None
        failed = sum(self.layer_tokens[f] * (1 - self.shares[f]) for f, s in self.status.items() if s == "failed")
        left = sum(self.layer_tokens.values()) - done - failed
        return left * (time.time() - self.first) / (done - self.before)
