"""A run of a study, or a stack of them, in a worker of whatever launcher: what happens there stays there."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from albert_ablate.collector import preload
from albert_ablate.config import ConfigError, compose
from albert_ablate.records.folder import Busy
from albert_ablate.studies.progress import print_line
from albert_ablate.training.errors import RunFailed

KILLED = "Its process was killed, often for lack of memory"
PARENT_CHECK_SECONDS = 2.0  # between a worker's looks at whether its command is still there

_warm = False
_training = threading.Event()  # a run is being trained


def job(cfg: Any) -> dict[int, dict[str, Any]]:
    """Train or find the run of this job, or its stack of runs. Gives how each ended, by number; raises nothing.

    `hydra.sweep.dir` is the work folder of the launch (launch.launch_folder). There a worker finds the numbers of the
    job's runs and their overrides (it composes options once for all its runs, where a launcher would read conf/ for
    each), writes a file NUMBER.begun that is there while it trains, and learns that the study is being stopped (a file
    `stop`, or the folder is gone), or that nothing more is to be begun since the launch is over (a file `closed`).
    """
    from hydra.core.hydra_config import HydraConfig

    _lighten_results()
    about = HydraConfig.get()
    folder = Path(about.sweep.dir)
    if is_over(folder) or (folder / "closed").exists():
        return {}
    is_worker = _prepare_process(folder)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main and is_worker else None
    ended = threading.Event()
    if is_worker:
        threading.Thread(target=_watch, args=(folder, ended), daemon=True).start()
    _training.set()
    try:
        results = _train(folder, json.loads((folder / "jobs.json").read_text())[about.job.num])
    finally:
        _training.clear()
        ended.set()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    stopped = [result for result in results.values() if result["status"] == "stopped"]
    if stopped and not is_worker:
        (folder / "stop").write_text(str(stopped[0].get("signal", int(signal.SIGINT))))
    return results


def _train(folder: Path, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """How the runs of these numbers ended, each said as it ends; several are trained as a stack."""

    def train(number: int, member: Any = None) -> dict[str, Any]:
        begun = folder / f"{number}.begun"
        with contextlib.suppress(OSError):  # a full disk
            begun.write_text(process_name())
        try:
            result = attempt(lambda: _run(json.loads((folder / "overrides.json").read_text())[number], member))
        finally:
            begun.unlink(missing_ok=True)
        _print_outcome(folder, number, result)
        return result

    if len(numbers) == 1:
        return {numbers[0]: train(numbers[0])}
    from albert_ablate.training.stack import together

    return dict(zip(numbers, together([partial(train, number) for number in numbers]), strict=True))


def _lighten_results() -> None:
    """Leave the two configurations out of what Hydra hands back for a job: nobody reads them, and at 100 KB a job they
    add up in the command of a sweep, which keeps the results of a launch until its end."""
    from hydra.core.utils import JobReturn

    def keep(self: Any, name: str, value: Any) -> None:
        object.__setattr__(self, name, None if name in ("cfg", "hydra_cfg") else value)

    def pickled(self: Any) -> dict[str, Any]:  # this job's own, which has them already
        return {**vars(self), "cfg": None, "hydra_cfg": None}

    JobReturn.__setattr__ = keep  # type: ignore[method-assign]
    JobReturn.__getstate__ = pickled  # type: ignore[method-assign]


def process_name() -> str:
    """This process, among those of all nodes."""
    return f"{os.uname().nodename} {os.getpid()}"


def is_over(folder: Path) -> bool:
    """Whether the study has been stopped, or the launch's folder removed by the next command."""
    return (folder / "stop").exists() or not folder.exists()


def _watch(folder: Path, ended: threading.Event) -> None:
    """Stop this worker's run with its study: the only way for a worker on another node."""
    while not ended.wait(1):
        if is_over(folder):
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _exit_with_parent(parent: int) -> None:
    """End this worker when the process that started it is gone and its run done: joblib's would wait for ever."""
    while os.getppid() == parent or _training.is_set():
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(0)


def _run(overrides: list[str], member: Any) -> dict[str, Any]:
    from albert_ablate.training.run import run

    return run(compose(overrides), member=member)


def attempt(train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """How a run ended whose record `train` gives: its status, and its error where it has one. Raises nothing."""
    try:
        record = train()
    except (KeyboardInterrupt, SystemExit):
        return {"status": "stopped"}
    except Busy as error:
        return {"status": "busy", "error": str(error)}
    except ConfigError as error:
        return {"status": "refused", "error": str(error)}
    except RunFailed as error:
        return {"status": "failed", "error": str(error)}
    except Exception as error:  # before there was a record to keep it
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return {k: record.get(k) for k in ("status", "signal", "found", "folder")} | {
        "val_loss": record["summary"].get("val_loss"),
        "seconds": record["cost"].get("seconds"),
    }


def _prepare_process(folder: Path) -> bool:
    """Import what a run needs, once; gives whether this process is a worker, not the command itself.

    A worker leaves the terminal's Ctrl-C to the command, which passes it on, and ends with the command.
    """
    global _warm
    try:
        is_worker = (folder / "owner").read_text() != process_name()
    except OSError:
        is_worker = True
    if not _warm:
        if is_worker:
            with contextlib.suppress(PermissionError):  # it leads a session already
                os.setpgid(0, 0)
            threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
        import_training(freeze=is_worker)
        _warm = True
    return is_worker


def import_training(freeze: bool) -> None:
    """Load what a run needs, once for all of a process."""
    import gc

    preload("pytorch_lightning")
    import albert_ablate.training.fit  # noqa: F401
    import albert_ablate.training.run  # noqa: F401

    if freeze:
        gc.collect()
        gc.freeze()  # half a million objects that no later collection need look at


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of a signal: stop the run at the end of its step, as Ctrl-C does."""
    raise KeyboardInterrupt


def _print_outcome(folder: Path, number: int, result: dict[str, Any]) -> None:
    """A line about the run, on the command's own output where the worker shares it."""
    try:
        label = json.loads((folder / "labels.json").read_text())[number]
    except (OSError, ValueError, IndexError):
        return
    print_line(f"{label}: {outcome_of(result)}")


def outcome_of(result: dict[str, Any]) -> str:
    """What `attempt` gave, in a few words."""
    if result.get("error"):
        return result["error"].splitlines()[0]
    if result["status"] == "stopped":
        return "stopped, resumable"
    loss = result["val_loss"]
    words = f"{result['status']}, validation loss {'not finite' if loss is None else f'{loss:.4f}'}"
    return f"{words}, {result['seconds']:.1f} s{', found' if result['found'] else ''}"
