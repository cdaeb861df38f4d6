"""Runs of a study carried by any Hydra launcher. Of how a run ended only its record is believed."""

import contextlib
import errno
import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError, as_config_error, conf_folder, quoted, refuse_changed_code, search
from albert_ablate.config.secrets import HANDED_ON, masked
from albert_ablate.records.folder import DONE, RunFolder
from albert_ablate.records.record import REQUEST_KEYS
from albert_ablate.records.signals import stops_handled
from albert_ablate.studies.jobs import KILLED, job, process_name
from albert_ablate.studies.packing import AUTO, choose
from albert_ablate.studies.planned_runs import Planned, first_run
from albert_ablate.studies.progress import Bar
from albert_ablate.studies.stacking import OFF, Stacking
from albert_ablate.studies.states import has_ended, is_done, is_held, read_record
from albert_ablate.studies.sweep_settings import Sweep, own_overrides

ATTEMPTS = 3
POLL_SECONDS = 2.0  # between looks at runs that others are training
FRESH_LAUNCH_SECONDS = 60.0  # within which a launch has written which runs it is of


class Study:
    """Runs being completed by one launcher. `stopped` is the signal that ended it. stack: runs that are trained as one
    where they can be."""

    def __init__(self, launcher: Sequence[str], workers: int, say: Callable[[str], None] = print, stack: int = OFF):
        self.overrides, self.workers, self._print = launcher, workers, say
        self.stacking = Stacking(stack, workers)
        self.stopped: int | None = None
        self.launch_folders: list[Path] = []  # of launches that may have workers: one that fails leaves some running
        self._bar: Bar | None = None  # while runs are being completed

    def say(self, text: str) -> None:
        """Print a line, in the place of the progress bar where there is one."""
        if self._bar is not None:
            self._bar.clear()
        self._print(text)

    def complete(self, planned: Sequence[Planned]) -> dict[Planned, str]:
        """Train what is not done, up to three attempts a run; gives the runs that failed, each with its error."""
        for p in planned:
            if has_ended(p.folder):
                refuse_changed_code(p.folder, read_record(p.folder), p.cfg)
        self._say_alone([p for p in planned if not has_ended(p.folder)])
        with self._signals(), Bar(planned, self._training) as self._bar:
            errors = self._complete(planned)
        self._bar = None
        if planned:
            _remove_ended_launches(_launches(planned[0]))
        for p in planned:  # killed after the final record was written but before cleanup
            folder = RunFolder(p.folder)
            if (folder.checkpoints / "resume.ckpt").exists() and has_ended(p.folder):
                folder.tidy()
        return {p: error for p, error in errors.items() if not has_ended(p.folder)}

    def _say_alone(self, to_do: Sequence[Planned]) -> None:
        """Where stacks are asked for, say which runs cannot be in one, and why."""
        if self.stacking.size != OFF:
            reasons = Counter(self.stacking.reason(p.cfg) for p in to_do)
            for reason, count in reasons.items():
                if reason is not None:
                    self.say(f"{count} runs are trained alone, which cannot be stacked: {reason}.")

    def _complete(self, planned: Sequence[Planned]) -> dict[Planned, str]:
        attempts: Counter[Planned] = Counter()  # of this command: asked again, a run gets three more
        killed: Counter[Planned] = Counter()
        errors: dict[Planned, str] = {}
        given_up: set[Planned] = set()
        failed_launches, waiting = 0, False  # launches in a row that failed before a run began
        while self.stopped is None:
            to_do = [p for p in planned if p not in given_up and not has_ended(p.folder)]
            free = [p for p in to_do if not is_held(p.folder)]
            if not to_do:
                break
            if not free:
                if not waiting:
                    self.say(f"{len(to_do)} runs are being trained by another process; waiting for them.")
                waiting = True
                time.sleep(POLL_SECONDS)
                continue
            # a run in flight when its worker died is launched alone for its third attempt, so that it cannot end other
            # runs and they cannot end it; not sooner, since a node of a cluster that dies has many runs in flight
            batch = [p for p in free if killed[p] < ATTEMPTS - 1] or free[:1]
            # one that has failed is tried alone: what it lacks may be memory
            results, trouble, begun = self._launch(batch, self.stacking.groups(batch, attempts))
            for i, p in enumerate(batch):
                result = results.get(i)
                if result is None and i in begun and not is_held(p.folder):  # some launchers let the others go on
                    attempts[p] += 1
                    killed[p] += 1
                    errors[p] = KILLED
                elif result and result["status"] in ("failed", "refused"):
                    attempts[p] += 1 if result["status"] == "failed" else ATTEMPTS
                    errors[p] = result["error"]
                elif result and result["status"] in DONE and not has_ended(p.folder):  # its identity is another now
                    attempts[p] = ATTEMPTS
                    errors[p] = f"its code has changed since this command began: the run lies in {result['folder']}."
                if attempts[p] >= ATTEMPTS:
                    given_up.add(p)
                    if killed[p]:
                        note_killed(p, errors[p])
            failed_launches = failed_launches + 1 if trouble and not begun else 0
            if failed_launches == ATTEMPTS:
                raise RuntimeError(f"The launcher failed {ATTEMPTS} times: {trouble}")
        return {p: errors[p] for p in planned if p in given_up}

    def _launch(self, batch: Sequence[Planned], jobs: Sequence[Sequence[int]]) -> tuple[dict[int, dict], str, set[int]]:
        """One launch: how the runs ended, or nothing and what the launcher said; the runs that were cut short.

        jobs: the numbers of the runs of each."""
        with launch_folder(batch, jobs) as folder:
            self.launch_folders.append(folder)
            results, trouble = dict[int, dict](), ""
            if self.stopped is None:
                with launcher_of(self.overrides, folder) as launcher:
                    try:
                        for returned in launcher.launch([[] for _ in jobs], initial_job_idx=0):
                            results |= returned.return_value
                        self.launch_folders.remove(folder)
                    except Exception as error:
                        trouble = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if self.stopped is None and (folder / "stop").exists():  # by a signal that a run in this process took
                self.stopped = int((folder / "stop").read_text() or signal.SIGINT)
            return results, trouble, {int(f.stem) for f in folder.glob("*.begun")}

    def _training(self) -> set[Path]:
        """The folders of the runs that its workers are training now."""
        found = set[Path]()
        for folder in self.launch_folders:
            with contextlib.suppress(OSError, ValueError):  # it is being made, or removed
                runs = json.loads((folder / "folders.json").read_text())
                found |= {Path(runs[int(file.stem)]) for file in folder.glob("*.begun")}
        return found

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass Ctrl-C and SIGTERM on to the workers, whose runs then stop at a step's end; the second time, just go."""

        def stop(number: int, frame: Any) -> None:
            if self.stopped is not None:
                raise KeyboardInterrupt
            self.stopped = number
            self.say("Stopping; the same command continues from here.")
            asked = set[str]()  # a process may train several runs
            for folder in self.launch_folders:
                with contextlib.suppress(OSError):  # a full disk
                    (folder / "stop").write_text(str(number))
                for file in folder.glob("*.begun"):  # workers on other nodes look for the file `stop` themselves
                    with contextlib.suppress(OSError, ValueError):
                        node, process = file.read_text().split()
                        run = Path(json.loads((folder / "folders.json").read_text())[int(file.stem)])
                        # the process number of a worker that was killed may be another's by now, so the run must be
                        # locked; a run in this process is not asked, since is_held would lose its lock
                        here = node == os.uname().nodename and process not in asked
                        if here and (int(process) == os.getpid() or is_held(run)):
                            asked.add(process)
                            os.kill(int(process), signal.SIGTERM)

        with stops_handled(stop):
            yield


# --- the work folder of a launch -------------------------------------------------------------------------------------


@contextlib.contextmanager
def launch_folder(batch: Sequence[Planned], jobs: Sequence[Sequence[int]]) -> Iterator[Path]:
    """The work folder of one launch, below the folder of runs, which all nodes see; locked while the launch lasts.

    In it lie the overrides and folders of its runs, which of them are one job, a file NUMBER.begun for each run in
    training, `stop` once the study is stopped, and `closed` once the launch is over. Raises ConfigError where the
    folder of runs cannot be written to, RuntimeError where the disk has no room.
    """
    root = _launches(batch[0])
    _remove_ended_launches(root)
    with contextlib.ExitStack() as after:
        after.callback(_remove_ended_launches, root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=root))
            after.enter_context(RunFolder(folder).lock())
            (folder / "owner").write_text(process_name())
            (folder / "labels.json").write_text(json.dumps([p.name for p in batch]))
            (folder / "overrides.json").write_text(json.dumps([without_passwords(p.overrides) for p in batch]))
            (folder / "jobs.json").write_text(json.dumps(jobs))
            # last: where it is there, all files are
            (folder / "folders.json").write_text(json.dumps([str(p.folder) for p in batch]))
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
                raise ConfigError(f"--runs={root.parent} cannot be written to: {error.strerror}.") from None
            raise RuntimeError(f"The sweep cannot continue: {root}: {error.strerror or error}.") from None
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                (folder / "closed").touch()


def _launches(planned: Planned) -> Path:
    return planned.folder.parents[1] / ".launches"


def without_passwords(overrides: Sequence[str]) -> list[str]:
    """A run's overrides for a worker's file: no password in a tracker's address, which the environment hands on."""
    for override in overrides:
        key, _, address = override.partition("=")
        if key.lstrip("+").startswith("logger.") and masked(address) != address:
            os.environ[HANDED_ON] = address.strip("'\"")
    return masked([*overrides])


def _remove_ended_launches(root: Path) -> None:
    """Remove the work folders of launches that are over, unless one of their runs still goes on: a worker that outlives
    its launch, or its command, ends the run it has begun."""
    for folder in root.glob("*"):
        with contextlib.suppress(OSError, ValueError):
            listed = folder / "folders.json"
            if not listed.exists() and time.time() - folder.stat().st_mtime < FRESH_LAUNCH_SECONDS:
                continue  # another command is about to write it
            runs = json.loads(listed.read_text()) if listed.exists() else []
            begun = [Path(runs[int(f.stem)]) for f in folder.glob("*.begun")]
            if not is_held(folder) and not any(is_held(f) and not has_ended(f) for f in begun):
                shutil.rmtree(folder, ignore_errors=True)


# --- the launcher ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launcher_of(overrides: Sequence[str], folder: Path) -> Iterator[Any]:
    """The launcher that hydra/launcher=... names, as a Hydra sweeper is handed it. folder: of the launch."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    with _launcher_config([*overrides, f"hydra.sweep.dir={quoted(str(folder))}"]) as (main, cfg):
        context = HydraContext(config_loader=main.config_loader, callbacks=Callbacks(cfg))
        yield Plugins.instance().instantiate_launcher(hydra_context=context, task_function=job, config=cfg)


@contextlib.contextmanager
def _launcher_config(overrides: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Hydra and its configuration with a launcher's overrides; ConfigError for one that is not there or not allowed."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    os.environ["HYDRA_FULL_ERROR"] = "1"
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="sweep"):
        main = GlobalHydra.instance().hydra
        assert main is not None
        try:
            cfg = main.compose_config(
                config_name="job",
                overrides=[*overrides, *search()],
                run_mode=RunMode.MULTIRUN,
                from_shell=False,
                with_log_configuration=False,
            )
        except Exception as error:
            raise as_config_error(error) from None
        yield main, cfg


def split_overrides(
    sweep: Sweep, overrides: Sequence[str], workers: int, say: Callable[[str], None] = print
) -> tuple[list[str], list[str], int]:
    """Overrides of a command apart: those of the launcher (joblib with `workers` if none is named), those of a run; and
    the number of workers, which is measured on the sweep's first run where it is AUTO."""
    overrides = own_overrides(overrides)
    launcher = [o for o in overrides if o.lstrip("+").startswith(("hydra/", "hydra."))]
    extra = [o for o in overrides if o not in launcher]
    engine = next((o.partition("=")[2] for o in launcher if o.startswith("hydra/launcher=")), None)
    given = {o.partition("=")[0] for o in [*sweep.fixed, *extra]} | {p.name for p in sweep.parameters}
    threads = 1
    if workers == AUTO:
        if engine is not None or "trainer.threads" in given:
            other = f"hydra/launcher={engine}" if engine is not None else "trainer.threads"
            raise ConfigError(f"--workers=auto contradicts {other}: it chooses processes and threads on this machine.")
        workers, threads = choose(first_run(sweep, extra), say)
    if engine is None:
        launcher += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}", "hydra.launcher.batch_size=1"]
    elif engine == "ray":
        for key in ("remote.max_retries=0", "init.object_store_memory=null"):
            # Ray tries what ran out of memory again for ever: what is pending is launched again from here. And a memory
            # that the launcher asks for by default is refused by a cluster that is there already
            if not any(f"hydra.launcher.ray.{key.partition('=')[0]}" in o for o in launcher):
                launcher += [f"+hydra.launcher.ray.{key}"]
    if any(o in launcher for o in overrides):  # the user's own: a mistake in it is said before anything else
        with _launcher_config(launcher):
            pass
    if engine != "basic" and "trainer.threads" not in given:
        extra = [f"trainer.threads={threads}", *extra]
    return launcher, extra, workers


def note_killed(planned: Planned, error: str) -> None:
    """The record of a run that killed its process each time: failed, with the reason."""
    folder = RunFolder(planned.folder)
    with contextlib.suppress(ConfigError, OSError):  # another user's folder, or a full disk
        folder.create()
    with contextlib.suppress(ConfigError, OSError), folder.lock():
        record = read_record(planned.folder)
        if is_done(record):
            return
        config = {k: v for k, v in planned.cfg.items() if k not in REQUEST_KEYS}
        fresh = {
            "label": planned.label,
            "seed": planned.seed,
            "setting": planned.folder.parent.name,
            "arm": None,
            "identity": None,
            "role": None,
            "config": config,
            "choices": planned.cfg.choices,
            "summary": {},
            "cost": {},
            "histories": {},
        }
        whole = folder.record() or fresh  # one that is there holds its proof
        folder.write(whole | {"status": "failed", "error": error, "updated": time.time()})
