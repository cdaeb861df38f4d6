"""`albert-ablate sync`: send finished run folders to a tracker afterwards, each once, as noted in the run folder."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from albert_ablate.config import ConfigError
from albert_ablate.config.secrets import masked
from albert_ablate.records.checked import read_checked, write_checked
from albert_ablate.records.folder import DONE, RunFolder, recorded_folders
from albert_ablate.records.history import SCHEMAS, read_history
from albert_ablate.records.naming import display_name
from albert_ablate.trackers.base import Rows, Tracker, lists, reason

SENT_FILE = "synced.json"  # destination -> when


def sync_runs(
    path: Path, to: str, project: str | None = None, entity: str | None = None, say: Callable[[str], None] = print
) -> int:
    """Send every finished or diverged run below `path` that was not sent there before; returns how many were sent.

    Unfinished runs are named and skipped. A run is noted as sent once the tracker has received all of it. Raises
    ConfigError before anything is sent, RuntimeError with one sentence if the tracker fails.
    """
    folders = [RunFolder(folder) for folder in recorded_folders(path)]
    with tempfile.TemporaryDirectory(prefix="albert_ablate_") as scratch:
        send, destination = SENDERS[to](project, entity, Path(scratch))
        sent = already = 0
        for folder in folders:
            try:
                with folder.lock():
                    record = folder.record()
                    if record is None or record["status"] not in DONE:
                        say(f"{folder.path} is {record['status'] if record else 'gone'}, not sent.")
                        continue
                    notes = _notes(folder.path, record.get("identity"))
                    if destination in notes:
                        already += 1
                        continue
                    rows = _rows(folder.path, record.get("identity"))
                    try:
                        send(folder.path, record, rows)
                    except Exception as error:
                        raise RuntimeError(
                            f"{folder.path} could not be sent to {destination} ({reason(error)}); "
                            f"{sent} sent before it."
                        ) from error
                    notes[destination] = time.time()
                    write_checked(folder.path / SENT_FILE, notes, record.get("identity"))
                    sent += 1
                    say(f"{folder.path} sent: {display_name(record)}, {record['status']}.")
            except ConfigError as error:  # busy, or a file in it that cannot be read
                say(f"{error} Not sent.")
        earlier = f", {already} had been sent before" if already else ""
        say(f"{sent or 'Nothing'} sent to {destination}{earlier}.")
    return sent


def _rows(folder: Path, run: str | None) -> Rows:
    try:
        return lists({name: read_history(folder, name, None, run) for name in SCHEMAS})
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has a history that cannot be read ({' '.join(str(error).split())}).") from None


def _notes(folder: Path, run: str | None) -> dict[str, float]:
    try:
        return read_checked(folder / SENT_FILE, run)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / SENT_FILE} cannot be read ({error}); remove it to send the run again.") from None


Send = Callable[[Path, dict, Rows], None]


def _wandb(project: str | None, entity: str | None, scratch: Path) -> tuple[Send, str]:
    from albert_ablate.trackers.wandb import Wandb, quiet, release

    quiet(scratch)
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        raise ConfigError(f"WANDB_MODE={mode} is not allowed here: sending to W&B needs it online.")
    if not wandb.login(prompt=False, verify=False):
        raise ConfigError("W&B has no key: set WANDB_API_KEY or call `wandb login`.")
    server = masked(wandb.setup().settings.base_url).rstrip("/").partition("://")[2]

    def send(folder: Path, record: dict, rows: Rows) -> None:
        tracker = Wandb("online", project, entity)  # a name, group and tags of the environment are of single runs
        tracker.name = tracker.group = None
        tracker.strict = True
        try:
            # not in the run folder: an offline log in it stays until the rows have arrived, and after
            tracker.begin(scratch, record, rows)
            tracker.end(record)
            if not tracker.arrived(scratch, record):
                raise OSError("the server did not receive every row")
        except BaseException:
            release()
            raise

    return send, f"W&B {server}/{entity + '/' if entity else ''}{Wandb('online', project).project}"


def _plain(tracker: Tracker, destination: str) -> tuple[Send, str]:
    def send(folder: Path, record: dict, rows: Rows) -> None:
        tracker.begin(folder, record, rows)
        tracker.end(record)

    return send, destination


def _tensorboard(project: str | None, entity: str | None, scratch: Path) -> tuple[Send, str]:
    from albert_ablate.trackers.tensorboard import TensorBoard

    _refuse(entity, "tensorboard")
    if project is not None:
        raise ConfigError(f"--project {project} is not allowed: TensorBoard's files lie in the run folders.")
    return _plain(TensorBoard(), "TensorBoard")


def _mlflow(project: str | None, entity: str | None, scratch: Path) -> tuple[Send, str]:
    from albert_ablate.trackers.mlflow import MLflow

    _refuse(entity, "mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    tracker = MLflow(uri, project)
    shown = masked(uri) if uri else "mlruns beside the runs"
    return _plain(tracker, f"MLflow {shown}, experiment {tracker.experiment}")


def _refuse(entity: str | None, to: str) -> None:
    if entity:
        raise ConfigError(f"--entity {entity} is not allowed: it belongs to --to wandb, not to --to {to}.")


SENDERS = {"wandb": _wandb, "tensorboard": _tensorboard, "mlflow": _mlflow}
