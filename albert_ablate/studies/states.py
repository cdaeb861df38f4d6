"""Where runs stand, from their records and locks alone."""

import fcntl
import json
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from albert_ablate.records.folder import DONE
from albert_ablate.records.lease import NO_LOCKS, is_leased

HASHES = re.compile(r'"initial_draws": \{[^}]*\}')  # one a parameter, most of a deep model's record


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run folder without its proof; a status of "pending" or "unreadable" where there is none."""
    try:
        record = json.loads(HASHES.sub('"initial_draws": {}', (folder / "record.json").read_text()))
        return record if "status" in record else {"status": "unreadable", "error": "record.json has no status"}
    except (FileNotFoundError, NotADirectoryError):
        return {"status": "pending"}
    except (OSError, ValueError, TypeError) as error:
        return {"status": "unreadable", "error": f"record.json cannot be read: {error}"}


def state(folder: Path) -> dict[str, Any]:
    """The record, whose status is "orphaned" where it says running and no process holds the run."""
    record = read_record(folder)
    if record["status"] == "running" and not is_held(folder):
        record["status"] = "orphaned"
    return record


def is_held(folder: Path) -> bool:
    """Whether another process holds the run's lock. Asks without taking it where the system can."""
    try:
        fd = os.open(folder / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        if sys.platform == "linux":
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack("hhqqi", fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return is_leased(folder)
    finally:
        os.close(fd)


def run_folders(root: Path) -> Iterator[Path]:
    """runs/<setting>/seed<N> below `root`."""
    for setting in sorted(os.scandir(root), key=lambda e: e.name):
        if setting.is_dir():
            for entry in os.scandir(setting.path):
                if entry.name.startswith("seed") and entry.name[4:].isdigit():
                    yield Path(entry.path)


def last_line(error: str | None) -> str:
    return error.strip().splitlines()[-1] if error and error.strip() else ""


def is_done(record: dict[str, Any]) -> bool:
    return record["status"] in DONE
