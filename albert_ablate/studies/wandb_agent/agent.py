"""A warm W&B agent: it asks the server for runs as `wandb agent` does, and keeps its processes from run to run."""

import contextlib
import math
import multiprocessing
import os
import reprlib
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.config.secrets import masked
from albert_ablate.config.untrusted import flattened, refuse_untrusted, with_wandb_logger
from albert_ablate.records.signals import stops_handled
from albert_ablate.studies.bayes import corners
from albert_ablate.studies.jobs import KILLED, attempt, import_training, interrupt, outcome_of
from albert_ablate.studies.launch import note_killed
from albert_ablate.studies.planned_runs import Planned, plan
from albert_ablate.studies.states import read_record
from albert_ablate.studies.sweep_settings import Sweep, overrides_of, own_overrides
from albert_ablate.studies.sweepfile import served_sweep
from albert_ablate.studies.wandb_agent.server import SweepGone, SweepServer, Unreachable

HEARTBEAT_SECONDS = 5.0  # between two requests of a slot for the server's commands
MAX_RETRY_SECONDS = 60.0  # between two tries of a server that does not answer
MAX_MESSAGE, MAX_RUN_ID = 1000, 200  # characters of a message, and of a run's id
MAX_CHECKED_SETTINGS = 1000  # a grid of so many is checked whole before its first run


def find_server(sweep: str, entity: str | None, project: str | None) -> SweepServer:
    """The sweep that ENTITY/PROJECT/SWEEP, PROJECT/SWEEP or SWEEP names, with the key that wandb has for its server."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    parts = sweep.split("/")
    if not all(parts) or len(parts) > 3:
        raise ConfigError(f"{sweep} does not name a sweep: write ENTITY/PROJECT/SWEEP, as `wandb sweep` shows it.")
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "dryrun", "disabled"):
        raise ConfigError(f"WANDB_MODE={mode} keeps W&B from its server, which an agent needs: unset it.")
    if not wandb.login(prompt=False, verify=False) or not (settings := wandb.setup().settings).api_key:
        raise ConfigError("W&B has no key: set WANDB_API_KEY or call `wandb login`.")
    project = parts[-2] if len(parts) > 1 else project or settings.project
    entity = parts[0] if len(parts) > 2 else entity or settings.entity
    if not project:
        raise ConfigError(f"{sweep} needs its project: write ENTITY/PROJECT/{parts[-1]}, or --project.")
    return SweepServer(settings.base_url.rstrip("/"), settings.api_key, entity, project, parts[-1])


@dataclass(frozen=True)
class SweepRuns:
    """How a worker makes a planned run of the values that the server sends."""

    sweep: Sweep
    runs: Path
    extra: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    scratch: Path
    use_tuned: bool

    def planned(self, settings: Sequence[Mapping[str, Any]]) -> list[Planned]:
        """The runs of these settings. Raises ConfigError for values that are not allowed."""
        return plan(self.sweep, settings, self.runs, self.extra, {} if self.use_tuned else None)


class Slot:
    """A place for one run at a time: an agent in the server's eyes, and a process that stays warm."""

    def __init__(self, sweep_runs: SweepRuns, agent: str):
        self.sweep_runs, self.agent = sweep_runs, agent
        self.process: BaseProcess | None = None
        self.pipe: Connection | None = None
        self.run: str | None = None  # its id on the server
        self.planned: Planned | None = None
        self.due = 0.0  # when the next heartbeat is
        self.stopping = False  # its run was sent the signal to stop
        self.done = False

    def start(self, run: str, setting: Mapping[str, Any]) -> None:
        """Hand a run's values to the process, which is started where there is none."""
        if self.process is None or not self.process.is_alive():
            spawn = multiprocessing.get_context("spawn")
            self.pipe, theirs = spawn.Pipe()
            self.process = spawn.Process(target=worker, args=(theirs, self.sweep_runs))
            self.process.start()
            theirs.close()
        assert self.pipe is not None
        self.run, self.planned, self.stopping = run, None, False
        self.pipe.send((run, dict(setting)))

    def result(self) -> dict[str, Any] | None:
        """How the run ended, None while it has not."""
        assert self.pipe is not None and self.process is not None
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if not isinstance(message, Planned):
                    return message
                self.planned = message
        except (EOFError, OSError):
            self.process.join()
            return {"status": "killed", "error": f"{KILLED} (exit code {self.process.exitcode})"}
        return None

    def signal(self, number: int = signal.SIGTERM) -> None:
        """To its process, whose run then stops at a step's end; one that is still importing ends."""
        self.stopping = True
        if self.process is not None and self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, number)

    def close(self) -> None:
        """End the process; a run in it stops, resumable."""
        if self.pipe is not None:
            self.pipe.close()
        if self.run is not None:
            self.signal()
        if self.process is not None:
            self.process.join()


class Agent:
    """The runs of a sweep on a server, so many at a time. `stopped` is the signal that ended it."""

    def __init__(
        self,
        server: SweepServer,
        sweep_runs: SweepRuns,
        workers: int,
        count: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self.server, self.sweep_runs = server, sweep_runs
        self.say = lambda text: say(_short(masked(text)))
        self.workers, self.left = workers, count
        self.slots: list[Slot] = []
        self.stopped: int | None = None
        self.silent = 0  # tries of a server that does not answer
        self.ended: dict[str, int] = {}  # status -> runs

    def run(self) -> int:
        """Until the server has no more: exit code 0, 1 some failed, 130 and 143 stopped."""
        with stops_handled(self._stop):
            try:
                self.slots = [Slot(self.sweep_runs, self.server.register()) for _ in range(self.workers)]
                while any(not slot.done for slot in self.slots):
                    self._poll()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):  # the second signal
                    for slot in self.slots:
                        slot.signal(signal.SIGKILL)
                raise
            finally:
                for slot in self.slots:
                    slot.close()
        counts = ", ".join(f"{n} {status}" for status, n in sorted(self.ended.items()))
        self.say(f"{self.server.name}: {counts or 'no runs'}.")
        if self.stopped is not None:
            return 128 + self.stopped
        return 1 if self.ended.get("failed") else 0

    def _poll(self) -> None:
        """Take what the workers have to say, then ask the server for those whose turn it is."""
        for slot in self.slots:
            if slot.run is not None and (result := slot.result()):
                self._finish_run(slot, result)
        for slot in self.slots:
            if slot.run is None and (self.stopped is not None or self.left == 0):
                slot.done = True
            if not slot.done and time.monotonic() >= slot.due:
                self._ask(slot)
        busy = [slot for slot in self.slots if slot.run is not None]
        soon = min((slot.due for slot in self.slots if not slot.done), default=0.0) - time.monotonic()
        pause = min(max(soon, 0.0), 1.0)  # a signal does not end a wait
        if busy:
            wait([slot.pipe for slot in busy if slot.pipe], pause)
        else:
            time.sleep(pause)

    def _ask(self, slot: Slot) -> None:
        slot.due = time.monotonic() + HEARTBEAT_SECONDS
        try:
            commands = self.server.heartbeat(slot.agent, [slot.run] if slot.run else [])
        except SweepGone as error:
            self.say(f"{error} Runs in training are finished.")
            self.left = 0
            return
        except Unreachable as error:
            if not self.silent:
                self.say(f"{self.server.url} does not answer ({error}); asking again; runs in training continue.")
            self.silent += 1
            slot.due = time.monotonic() + min(MAX_RETRY_SECONDS, HEARTBEAT_SECONDS * 2 ** min(self.silent - 1, 8))
            return
        if self.silent:
            self.say(f"{self.server.url} answers again.")
        self.silent = 0
        for command in commands:
            self._obey(slot, command)

    def _obey(self, slot: Slot, command: Mapping[str, Any]) -> None:
        kind, run = command.get("type"), str(command.get("run_id"))[:MAX_RUN_ID]
        if kind in ("run", "resume") and slot.run is None and self.stopped is None:
            try:
                setting = _setting(command.get("args"))
                refuse_untrusted(overrides_of(setting))
            except ConfigError as error:
                raise ConfigError(f"{self.server.name}: run {run}: {error}") from None
            slot.start(run, setting)
            if self.left is not None:
                self.left -= 1
        elif kind == "stop" and run == slot.run:
            slot.signal()
        elif kind == "exit":
            slot.signal()
            slot.done = slot.run is None
            if slot.run is not None:
                self.left = 0

    def _finish_run(self, slot: Slot, result: dict[str, Any]) -> None:
        """A run has ended: say how; the next is asked for at once."""
        name = slot.planned.name if slot.planned else str(slot.run)
        if result["status"] == "killed" and (self.stopped is not None or slot.stopping):
            result = {"status": "stopped"}
        elif result["status"] == "killed":
            result["status"] = "failed"
            if slot.planned:
                note_killed(slot.planned, result["error"])
        elif result["status"] == "failed" and slot.planned and read_record(slot.planned.folder)["status"] == "pending":
            note_killed(slot.planned, result["error"])  # it broke before it had a record
        status = "failed" if result["status"] in ("refused", "busy") else result["status"]
        self.ended[status] = self.ended.get(status, 0) + 1
        self.say(f"{name}: {outcome_of(result)}")
        slot.run, slot.due = None, 0.0

    def _stop(self, number: int, frame: Any) -> None:
        if self.stopped is not None:
            raise KeyboardInterrupt
        self.stopped = number
        self.say("Stopping; the same command continues from here.")
        for slot in self.slots:
            slot.signal()


def _short(text: str) -> str:
    """A message that may hold words of the server's."""
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def _setting(arguments: Any) -> dict[str, Any]:
    """A run's values by key, from what the server has handed over."""
    if not isinstance(arguments, Mapping) or not all(isinstance(a, Mapping) for a in arguments.values()):
        raise ConfigError(f"its arguments cannot be read: {reprlib.repr(arguments)}.")
    return flattened({str(key): argument.get("value") for key, argument in arguments.items()})


def worker(pipe: Connection, sweep_runs: SweepRuns) -> None:
    """A worker: runs one after the other, until the agent has hung up. Nothing that happens in a run ends it."""
    os.setpgid(0, 0)  # the terminal's Ctrl-C is the agent's, which passes it on
    signal.signal(signal.SIGTERM, interrupt)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        import_training(freeze=True)
        os.environ.update(sweep_runs.environment)
        while True:
            run, setting = pipe.recv()
            pipe.send(_train_one(pipe, sweep_runs, run, setting))


def _train_one(pipe: Connection, sweep_runs: SweepRuns, run: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    import wandb
    import yaml

    from albert_ablate.training.swept import run_swept

    def train() -> dict[str, Any]:
        (planned,) = sweep_runs.planned([setting])
        pipe.send(planned)
        return run_swept(planned.cfg)

    # as `wandb agent` tells its processes, and in a session that has read it
    parameters = sweep_runs.scratch / f"{os.getpid()}.yaml"
    parameters.write_text(yaml.safe_dump({"wandb_version": 1, **{k: {"value": v} for k, v in setting.items()}}))
    os.environ |= {"WANDB_RUN_ID": run, "WANDB_SWEEP_PARAM_PATH": str(parameters)}
    try:
        return attempt(train)
    finally:
        with contextlib.suppress(Exception):
            wandb.teardown()


def run_agent(
    sweep: str,
    runs: Path,
    workers: int,
    entity: str | None = None,
    project: str | None = None,
    count: int | None = None,
    overrides: tuple[str, ...] = (),
    use_tuned: bool = True,
    say: Callable[[str], None] = print,
) -> int:
    """Train what a sweep on a W&B server hands out, below `runs`. `overrides` are the user's own, for every run."""
    server = find_server(sweep, entity, project)
    try:
        served = served_sweep(server.name, server.config())
    except ConfigError as error:
        raise ConfigError(_short(str(error))) from None
    except Unreachable as error:
        raise RuntimeError(f"{server.url} does not answer: {error}.") from None
    except SweepGone as error:
        raise ConfigError(str(error)) from None
    overrides = tuple(own_overrides(overrides))
    extra = with_wandb_logger(list(overrides))
    if not any(o.startswith("trainer.threads=") for o in [*served.fixed, *overrides]) and workers > 1:
        extra = ["trainer.threads=1", *extra]
    with tempfile.TemporaryDirectory(prefix="albert_ablate_", ignore_cleanup_errors=True) as scratch:
        environment = {"WANDB_SWEEP_ID": server.sweep, "WANDB_PROJECT": server.project, "WANDB_CACHE_DIR": scratch}
        environment |= {"WANDB_ENTITY": server.entity} if server.entity else {}
        sweep_runs = SweepRuns(served, runs, tuple(extra), tuple(environment.items()), Path(scratch), use_tuned)
        if served.method != "grid":
            sweep_runs.planned(corners(served)[:1])  # a draw whose values do not go together is refused by itself
        elif math.prod(len(p.values) for p in served.parameters) <= MAX_CHECKED_SETTINGS:
            sweep_runs.planned(served.settings())
        else:
            sweep_runs.planned(corners(served))
        try:
            return Agent(server, sweep_runs, workers, count, say).run()
        except Unreachable as error:
            raise RuntimeError(f"{server.url} does not answer: {error}.") from None
        except SweepGone as error:
            raise ConfigError(str(error)) from None
