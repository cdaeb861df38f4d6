"""Weights & Biases tracker: a W&B run that mirrors the run folder."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from albert_ablate.records.history import SCHEMAS, read_history
from albert_ablate.records.naming import display_name

# NoLogger: what records of earlier releases name
from albert_ablate.trackers.base import AXES as AXES
from albert_ablate.trackers.base import NOT_METRICS as NOT_METRICS
from albert_ablate.trackers.base import NoLogger as NoLogger
from albert_ablate.trackers.base import Rows, Several, Tracker, lists, merged, reason, status_of

# Seconds. wandb waits up to 90 at the start and for ever at the end; see the limits of all trackers in tracker.py.
START, END = 12, 20
RELEASE_SECONDS = 3.0  # for wandb to let go of a process of its own that has been killed


class Wandb(Tracker):
    """A W&B run whose id is the run's identity and whose group is its arm; tokens are the step metric.

    What the histories say about one step is one row of W&B's, numbered by the step. Rows are sent when they are
    committed, and a session begins by sending what the server has not got, so a killed run's curve has no row twice
    and no gap. Offline, a resumed run is written anew from its first row, since segments that share an id overwrite
    each other when synced. Trouble with W&B never ends a run: it is said once, offline takes over where it can.

    project, name, group, tags: null is what WANDB_PROJECT, WANDB_NAME, WANDB_RUN_GROUP and WANDB_TAGS say, and where
    those are not set albert_ablate, what differs from the defaults with the seed, the arm, and none. layers: every
    layer's values instead of min, median and max over depth.

    Under a W&B agent the run has the id and the project that the agent gives it; its config says which run it is.
    """

    NAME, SYNC = "W&B", "wandb"

    def __init__(
        self,
        mode: Literal["online", "offline"] = "online",
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] | None = None,
        layers: bool = False,
    ):
        super().__init__(layers)
        self.mode, self.entity = mode, entity
        self.project = project or os.environ.get("WANDB_PROJECT") or "albert_ablate"
        self.name = name or os.environ.get("WANDB_NAME")
        self.group = group or os.environ.get("WANDB_RUN_GROUP")
        given = os.environ.get("WANDB_TAGS", "").split(",") if tags is None else tags
        self.tags = [tag.strip() for tag in given if tag.strip()]
        self.run: Any = None
        self.next = 0  # number of the next row
        self.strict = True  # raise where the server has not taken everything in time
        self.online = self.mode == "online"

    def mirror(self, folder: Path, record: Mapping, rows: Rows) -> None:
        """Start online if that is configured and the server answers, else offline."""
        if self.mode == "online":
            try:
                return self.try_server(self._begin, folder, record, rows, "online")
            except Exception as error:
                self.report_failure(f"{reason(error)}; it is logged offline")
                self.abandon()
        if self.live:  # the run may have ended meanwhile
            self._begin(folder, record, rows, "offline")

    def address(self) -> str | None:
        return f"W&B {os.environ.get('WANDB_BASE_URL', '')}" if self.mode == "online" else None

    def sync_options(self) -> str:
        options = {"--project": self.project if self.project != "albert_ablate" else None, "--entity": self.entity}
        return "".join(f" {name} {shlex.quote(value)}" for name, value in options.items() if value)

    def abandon(self) -> None:
        release()

    def begin(self, folder: Path, record: Mapping, rows: Rows) -> None:
        self._begin(folder, record, rows, self.mode)

    def _begin(self, folder: Path, record: Mapping, rows: Rows, mode: str) -> None:
        quiet(folder)
        import wandb

        if mode == "online":
            mode = os.environ.get("WANDB_MODE", mode)
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            print("W&B: no key found, logging offline; `wandb sync` sends it later.", file=sys.stderr)
            mode = "offline"
        # earlier sessions' files: all they held is in the histories
        for session in [*folder.glob("wandb/run-*"), *folder.glob("wandb/offline-run-*")]:
            shutil.rmtree(session, ignore_errors=True)
        self._init(folder, record, mode)
        self.online = mode == "online"
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        self.next = 0
        self.push(rows)

    def _init(self, folder: Path, record: Mapping, mode: str) -> None:
        import wandb

        given = agent_run() is not None  # wandb then takes these from the agent's environment, and from nowhere else
        self.run = wandb.init(
            id=None if given else record["identity"],
            project=None if given else self.project,
            entity=None if given else self.entity,
            group=self.group or record["arm"],
            name=self.name or display_name(record),
            tags=self.tags or None,
            config=_config(record, swept_keys() if given else ()),
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            reinit="create_new",  # else a process's second run would be given its first, if that is still open
            settings=wandb.Settings(
                init_timeout=START,
                finish_timeout=END,
                finish_timeout_raises=self.strict,
                silent=True,
                console="off",
                # the record holds the provenance, without names of hosts, users, paths and remotes
                disable_git=True,
                save_code=False,
                host="",
                program="run.py",
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def push(self, rows: Rows) -> None:
        for row in merged(rows, self.next, self.layers):
            number = max(row["step"], self.next)  # an evaluation of earlier weights, at the end, has its own row
            self.next = number + 1
            if number >= self.run.starting_step:  # else the server has it from an earlier session
                self.run.log(row, step=number)

    def end(self, record: Mapping) -> None:
        status = status_of(record)
        self.run.summary.update({"status": status, **{k: v for k, v in record["summary"].items() if v is not None}})
        if status == "stopped":
            self.run.mark_preempting()  # with an exit code that is not 0: to be gone on with
        run, self.run = self.run, None
        run.finish(exit_code=_exit_code(record))
        if self.online:
            self._verify(run)

    def _verify(self, run: Any) -> None:
        """Raise OSError if the server has fewer rows than it was sent: wandb does not report rows that were refused."""
        from albert_ablate.trackers.graphql import history_rows

        settings = run.settings
        for pause in (0.3, 0.7, 2.0, None):  # a server may count a moment later
            rows_on_server = history_rows(settings.base_url, settings.api_key, run.entity, run.project, run.id)
            if rows_on_server >= self.next:
                return
            if pause is not None:
                time.sleep(pause)
        raise OSError(f"the server did not receive every row: {rows_on_server} of {self.next}")

    def arrived(self, folder: Path, record: Mapping) -> bool:
        """Whether the server has every row; asked by opening the run there once more."""
        self._init(folder, record, "online")
        rows_on_server = self.run.starting_step
        self.run.finish(exit_code=_exit_code(record))
        self.run = None
        return rows_on_server >= self.next


def agent_run() -> str | None:
    """Run id that a W&B agent has assigned to this process; None without an agent."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def swept_keys() -> set[str]:
    """Configuration keys whose values the sweep's server has set; wandb lets a run not change these."""
    import yaml

    try:
        return set(yaml.safe_load(Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text()))
    except (KeyError, OSError, TypeError, yaml.YAMLError):
        return set()


def _config(record: Mapping, swept: Collection[str] = ()) -> dict[str, Any]:
    """The run's config for W&B. A group that the sweep sets itself (norm) holds its settings as `norm_settings`."""
    tree = {f"{k}_settings" if k in swept and isinstance(v, Mapping) else k: v for k, v in record["config"].items()}
    return {**tree, **{k: record.get(k) for k in ("arm", "setting", "identity", "choices", "label")}}


def mirror_found(tracker: NoLogger, folder: Path, record: Mapping) -> None:
    """Under a W&B agent send a run that was done before, so that the sweep has its curve and its result."""
    rows = lists({name: read_history(folder, name, None, record.get("identity")) for name in SCHEMAS})
    for one in tracker.trackers if isinstance(tracker, Several) else [tracker]:
        if not isinstance(one, Wandb):
            continue
        with tempfile.TemporaryDirectory(prefix="albert_ablate_", ignore_cleanup_errors=True) as scratch:
            one.mirror = lambda *args, one=one: one.try_server(one.begin, *args)  # type: ignore[method-assign]
            one.start(Path(scratch), record, rows)
            one.folder = folder  # for the sentence that says how to send it
            one.wait_begun()
            one.close(record)


def _exit_code(record: Mapping) -> int:
    if status_of(record) == "stopped":
        return 128 + record.get("signal", signal.SIGTERM)
    return 1 if status_of(record) == "failed" else 0


def quiet(folder: Path) -> None:
    """Configure wandb before its process starts: logs below `folder`, no telemetry, which delays the exit."""
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")


def release() -> None:
    """End wandb's own process after a failed attempt: it would keep the run's id while it lives, and if it hangs it
    would keep this process from exiting."""
    import wandb

    if wandb.run is not None:  # a run of the user's own would end with it
        return
    for process in _clients():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)

    def teardown() -> None:
        with contextlib.suppress(Exception):
            wandb.teardown()

    thread = threading.Thread(target=teardown, daemon=True)
    thread.start()
    thread.join(RELEASE_SECONDS)


def _clients() -> list[int]:
    """Process ids of the wandb processes that this one has started."""
    try:
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, timeout=RELEASE_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    return [int(r[0]) for r in rows if len(r) == 3 and r[1] == str(os.getpid()) and "wandb-core" in r[2]]
