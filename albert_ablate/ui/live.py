"""The pages of `albert-ablate ui`, made anew when the files that they are made from have changed.

A page is made from the same sections as a report. What a section shows of runs that have ended is kept from one making
to the next, so that following a study costs little (see `Material.keep`).
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from albert_ablate.collector import without_collector
from albert_ablate.config import ConfigError
from albert_ablate.records import store
from albert_ablate.report import html, render, report, show
from albert_ablate.report.histories import run_stamp, study_stamp
from albert_ablate.report.page import Page, Section
from albert_ablate.report.section_cache import SectionCache
from albert_ablate.streams import digest
from albert_ablate.studies.states import is_held
from albert_ablate.studies.status import arms, read_states
from albert_ablate.studies.sweep_settings import Sweep
from albert_ablate.ui.status_section import status_section

CPU_SHARE = 0.2  # of one core that pages are made with at most, while they are looked at
MAX_WAIT_SECONDS = 10.0  # seconds that a page is not made anew at most, though files have changed
MAX_RUN_PAGES = 8  # of single runs that are kept


@dataclass
class RenderedPage:
    """A page as it was made last: what from, when, and what that took, in seconds of processor time."""

    stamp: str = ""
    version: str = ""
    content: bytes = b""
    at: float = 0.0
    took: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Pages:
    """The pages of the runs below `root`, with the status of what a sweep file asks for. Threads may ask at once."""

    def __init__(
        self,
        root: Path,
        sweep: Sweep | None = None,
        overrides: Sequence[str] = (),
        ledger: Path | None = None,
        baseline: str | None = None,
    ) -> None:
        self.root, self.sweep, self.overrides = root, sweep, overrides
        self.ledger, self.baseline = ledger, baseline
        self.files = {
            "page.css": ("text/css", html.stylesheet(live=True).encode()),
            "page.js": ("text/javascript", html.script().encode()),
            "vega.js": ("text/javascript", render.vega_bundle().encode()),
        }
        self.addresses = {name: f"/static/{name}?{digest(data)}" for name, (_, data) in self.files.items()}
        self.cache = SectionCache()
        self.study = RenderedPage()
        self.runs: OrderedDict[str, RenderedPage] = OrderedDict()
        self.runs_lock = threading.Lock()

    def of_study(self) -> RenderedPage:
        """The page of all runs."""
        return self._current(self.study, self._study_stamp, lambda version: self._draw(self._study(), version))

    def of_run(self, setting: str, seed: str) -> RenderedPage | None:
        """The page of a run; None where there is no such run folder. The name is looked up, never made into a path."""
        name = f"{setting}/{seed}"
        folder = next((f for f in store.run_folders(self.root) if f"{f.parent.name}/{f.name}" == name), None)
        if folder is None:
            return None
        with self.runs_lock:
            made = self.runs.setdefault(name, RenderedPage())
            self.runs.move_to_end(name)
            while len(self.runs) > MAX_RUN_PAGES:
                self.runs.popitem(last=False)
        return self._current(made, lambda: run_stamp(folder), lambda version: self._draw(_run(folder), version, "/"))

    def _current(self, made: RenderedPage, stamp: Callable[[], str], make: Callable[[str], bytes]) -> RenderedPage:
        """The page, made anew where its files have changed, and not so soon after the last time that pages would take
        more than `CPU_SHARE` of a core. Who asks while it is being made gets the last one."""
        if not made.lock.acquire(blocking=not made.content):
            return replace(made)
        try:
            if made.content and time.monotonic() - made.at < min(made.took / CPU_SHARE, MAX_WAIT_SECONDS):
                return replace(made)
            now = stamp()
            if now != made.stamp:
                begun, version = time.thread_time(), digest(f"{now} {time.time_ns()}".encode())
                with without_collector(), render.unchecked():
                    content = make(version)
                made.stamp = "" if made is self.study and self.cache.behind else now  # the rest follows
                made.version, made.content = version, content
                made.at, made.took = time.monotonic(), time.thread_time() - begun
            return replace(made)
        finally:
            made.lock.release()

    def _study_stamp(self) -> str:
        folders = list(store.run_folders(self.root)) if self.root.is_dir() else []
        held = "".join("01"[is_held(f)] for f in folders if not (f / "steps.arrow").exists())  # of those not ended
        ledger = self.ledger or self.root / "ledger.json"
        return f"{study_stamp(self.root, folders, ledger, self.sweep.path if self.sweep else None)} {held}"

    def _draw(self, page: Page, version: str, home: str = "") -> bytes:
        live = html.Live(version, self.addresses, home)
        return html.html(page, live).encode("utf-8", "replace")

    def _study(self) -> Page:
        name = self.root.resolve().name
        if not self.root.is_dir() or not any(True for _ in store.run_folders(self.root)):
            begins = "No run has begun yet: this page follows as soon as one does."
            status = status_section(arms([], self.root, self.sweep, self.overrides)) if self.sweep else None
            return Page(f"Live report on {name}", begins, [status] if status else [])
        try:
            status = status_section(arms(read_states(self.root), self.root, self.sweep, self.overrides))
        except ConfigError as error:
            status = Section("Status", missing=[str(error)])
        try:
            page = report.make(self.root, self.ledger, self.baseline, self.cache)
        except ConfigError as error:  # no run that can be read yet, or a ledger that cannot
            return Page(f"Live report on {name}", str(error), [status])
        return Page(f"Live report on {name}", page.subtitle, [status, *page.sections], page.arms)


def _run(folder: Path) -> Page:
    try:
        return show.page(show.read_run(folder))
    except ConfigError as error:
        return Page(f"{folder.parent.name}/{folder.name}", "", [Section("Outcome", missing=[_below(error, folder)])])


def _below(error: Any, folder: Path) -> str:
    """The sentence without the folders above the run's."""
    return str(error).replace(str(folder), f"{folder.parent.name}/{folder.name}")
