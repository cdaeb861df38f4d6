"""The folder of one run: its record, its lock, the places of its files."""

import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.config.secrets import masked
from albert_ablate.records.atomic import open_own, replace_file
from albert_ablate.records.lease import NO_LOCKS, Lease
from albert_ablate.records.lease import Busy as Busy
from albert_ablate.records.store import DONE as DONE
from albert_ablate.records.store import REMEDY, Record, no_runs, read, write
from albert_ablate.records.store import plain as plain

# files and folders that a run opens for writing, rather than replacing them whole
WRITTEN_INTO = ("lock", "checkpoints", "wandb", "tensorboard", "steps.arrows", "evals.arrows", "layers.arrows")

# POSIX locks do not exclude other threads of the process that holds them, so these are noted here. By process id: a
# forked child inherits this set but not the locks.
_held: set[tuple[int, str]] = set()
_taking = threading.Lock()


class RunFolder:
    """The folder runs/<setting>/seed<N>/ of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.lease: Lease | None = None  # held instead of a lock, where the file system has none

    def record(self) -> dict[str, Any] | None:
        """Read the record; None if there is none. Raises ConfigError with one sentence if it cannot be read."""
        result = read(self.path)
        if isinstance(result, Record):
            return result.content
        if result.missing:
            return None
        why = result.reason.removeprefix("record.json cannot be read: ")
        raise ConfigError(f"{self.path / 'record.json'} cannot be read: {why}; {REMEDY}.")

    def write(self, record: Mapping) -> None:
        """Write the record, atomically."""
        self.check_lease()
        write(self.path, record)

    def write_config(self, cfg: Mapping) -> None:
        """Write config.yaml, without secrets."""
        import yaml

        replace_file(self.path / "config.yaml", yaml.safe_dump(masked(cfg), sort_keys=False).encode())

    def create(self) -> None:
        """Create the folders; ConfigError with one sentence if they cannot be written."""
        self.refuse_links()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):  # has no name: leaves a folder in use as it is
                pass
        except OSError as error:
            raise ConfigError(
                f"paths.runs={self.path.parent.parent} cannot be written to: {error.strerror or error}."
            ) from None

    def refuse_links(self) -> None:
        """Raise ConfigError if a file or folder that a run writes into is a symbolic link, which could point anywhere.

        Files that are replaced whole (record.json, checkpoints) need no check: that replaces the link itself.
        """
        for name in WRITTEN_INTO:
            if (self.path / name).is_symlink():
                raise ConfigError(
                    f"{self.path / name} is a link, and a run writes to its own folder only: remove the link."
                )

    def set_aside(self, name: str) -> None:
        """Rename the checkpoint <name>.ckpt to <name>.previous.ckpt: a run resumes from it if the next is damaged."""
        with suppress(FileNotFoundError):
            os.replace(self.checkpoints / f"{name}.ckpt", self.checkpoints / f"{name}.previous.ckpt")

    def check_lease(self) -> None:
        """Raise Busy if another process has taken over the lease of this one; called before each commit."""
        if self.lease is not None:
            self.lease.check()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process: by fcntl, which the kernel releases when the process dies, or by a lease where
        the file system has no locks.

        Raises Busy if another process, or another thread of this one, holds the lock.
        """
        self.refuse_links()
        key = (os.getpid(), str(self.path.resolve()))
        with _taking:
            if key in _held:  # not even opened: closing any descriptor of the file would free the lock
                raise Busy(f"This run is being trained by another thread of this process: {self.path}.")
            _held.add(key)
        try:
            fd = open_own(self.path / "lock")
            try:
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    owner = os.pread(fd, 100, 0).decode(errors="replace").strip() or "another process"
                    raise Busy(f"This run is being trained by {owner}: {self.path}.") from None
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    self.lease = Lease(self.path)
                    self.lease.take()
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                yield
            finally:
                os.close(fd)
                if self.lease is not None:
                    self.lease.free()
                    self.lease = None
        finally:
            _held.discard(key)

    def clear(self) -> None:
        """Remove the files of an attempt that never committed; the record first, since it refers to the others."""
        (self.path / "record.json").unlink(missing_ok=True)
        self.tidy()
        for file in [*self.path.glob("*.arrow"), *self.checkpoints.glob("*.ckpt")]:
            file.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove files that only an unfinished run needs, and checkpoints that a killed process left half-written."""
        for pattern in ("*.arrows", "checkpoints/resume.ckpt", "checkpoints/*.previous.ckpt", "checkpoints/.*.tmp"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)


def recorded_folders(path: Path) -> list[Path]:
    """Run folders with a record at or below `path` (RUN, runs/<setting> or runs). ConfigError if there are none."""
    folders = [f.parent for pattern in ("", "seed*/", "*/seed*/") for f in path.glob(f"{pattern}record.json")]
    if not folders:
        raise no_runs(path)
    return sorted(folders)
