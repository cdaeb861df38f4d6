"""Lease on a run folder, in place of a lock where the file system has none."""

import errno
import os
import tempfile
import threading
import time
from pathlib import Path

from albert_ablate.config import ConfigError

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # what fcntl says of such a file system
BEAT, EXPIRY = 10.0, 60.0  # seconds: between heartbeats, and without one until the lease expires
SETTLE_SECONDS = 2.0  # seconds within which another process that saw the folder free has written its claim too


class Busy(ConfigError):
    """Raised when another process is training this run."""


class Lease:
    """The file `lease` in a folder, which its owner touches while it lives.

    A process that finds no lease, or one untouched for EXPIRY seconds by the file system's own clock, writes its token
    there, waits SETTLE_SECONDS for whoever did the same, and owns the folder if the token is still its own. An owner
    that stood still for so long that it was replaced learns so from `check`, before its next commit.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lease"
        self.token = os.urandom(16).hex()
        self._over = threading.Event()

    def take(self) -> None:
        """Take the lease of the folder, or raise Busy. Takes SETTLE_SECONDS."""
        if is_leased(self.path.parent):
            raise Busy(f"This run is being trained by {self._owner()}: {self.path.parent}.")
        scratch = self.path.with_name(f".lease.{self.token}")
        with scratch.open("x") as file:  # created anew, so that no link is followed
            file.write(f"{self.token}\nprocess {os.getpid()} on {os.uname().nodename}\n")
        os.replace(scratch, self.path)
        time.sleep(SETTLE_SECONDS)
        self.check()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raise Busy if another process has taken over the lease."""
        if self._lines()[0] != self.token:
            raise Busy(f"This run has been taken over by {self._owner()}: {self.path.parent}.")

    def free(self) -> None:
        """Give the lease back, if it is still held."""
        self._over.set()
        if self._lines()[0] == self.token:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                if self._lines()[0] != self.token:
                    return
                os.utime(self.path)
            except OSError:
                pass  # the file system may come back before the lease is over

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text().splitlines() or [""]
        except FileNotFoundError:
            return [""]

    def _owner(self) -> str:
        return next(iter(self._lines()[1:]), "another process")


def is_leased(folder: Path) -> bool:
    """Whether a live process holds a lease on `folder`."""
    try:
        beat = (folder / "lease").stat().st_mtime
    except OSError:
        return False
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock.") as probe:  # of this clock, not of ours
            now = os.stat(probe.name).st_mtime
    except OSError:
        now = time.time()
    return now - beat < EXPIRY
