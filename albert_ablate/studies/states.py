"""Where runs stand, from their records and locks alone."""

import contextlib
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
from albert_ablate.records.secrets import masked

INDEX, VERSION = ".status", "3"
WORTH_WRITING = 200  # records newly read
BRIEF = "status label name arm setting identity seed role error updated created progress sessions cost summary".split()
BRIEF += ["revisions"]
HEAD = re.compile(rb'\{\s*"status": "(\w+)"')
HASHES = re.compile(rb'"initial_draws": \{[^}]*\}')  # one a parameter, most of a deep model's record


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run folder without its proof; a status of "pending" or "unreadable" where there is none."""
    try:
        with open(f"{folder}/record.json", "rb", buffering=0) as file:
            record = json.loads(HASHES.sub(b'"initial_draws": {}', file.read()))
        return record if "status" in record else {"status": "unreadable", "error": "record.json has no status"}
    except (FileNotFoundError, NotADirectoryError):
        return {"status": "pending"}
    except (OSError, ValueError, TypeError) as error:
        return {"status": "unreadable", "error": f"record.json cannot be read: {error}"}


def has_ended(folder: Path) -> bool:
    """Whether a run is finished or diverged: of ten thousand records only the first line is read."""
    try:
        fd = os.open(folder / "record.json", os.O_RDONLY)
    except OSError:
        return False
    try:
        first = HEAD.match(os.read(fd, 100))
    finally:
        os.close(fd)
    return first[1].decode() in DONE if first else is_done(read_record(folder))


def state(folder: Path) -> dict[str, Any]:
    """The record, whose status is "orphaned" where it says running and no process holds the run."""
    return _judged(read_record(folder), folder)


def _judged(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    if record["status"] == "running" and not is_held(folder):
        record["status"] = "orphaned"
    return record


def states(root: Path, configured: bool = True) -> list[dict[str, Any]]:
    """`state` of each run below `root`: what a table needs of it, its folder, and if asked for its configuration.

    What was read stands in an index beside the runs, a line each, so that next time only records that have changed are
    read. It may be lost at any time.
    """
    try:
        lines = (root / INDEX).read_text().split("\n")
        known = dict(line.split("\t", 1) for line in lines[1:-1]) if lines[0] == VERSION else {}
    except (OSError, ValueError):
        known = {}
    entries, read, found = [VERSION], 0, []
    for folder in run_folders(root):
        name = f"{folder.parent.name}/{folder.name}"
        try:
            about = os.stat(f"{root}/{name}/record.json")
        except OSError:
            found.append(_judged(read_record(folder), folder) | {"folder": str(folder)})
            continue
        stamp = f"{about.st_mtime_ns} {about.st_size} {about.st_ino}"
        entry = known.get(name, "").split("\t")
        if entry[0] != stamp or len(entry) != 3:
            record = read_record(folder)
            brief = {key: record[key] for key in BRIEF if key in record}
            brief["lr"] = ((record.get("config") or {}).get("optimizer") or {}).get("lr")
            entry = [stamp, json.dumps(brief), json.dumps({k: record.get(k) for k in ("config", "choices")})]
            read += 1
        entries.append("\t".join([name, *entry]))
        record = json.loads(entry[1]) | (json.loads(entry[2]) if configured else {})
        found.append(_judged(record, folder) | {"folder": str(folder)})
    if read >= WORTH_WRITING:
        _write_index(root / INDEX, "\n".join([*entries, ""]))
    return found


def _write_index(file: Path, text: str) -> None:
    scratch = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # somebody else's folder, a full disk
        try:
            with scratch.open("x") as new:  # created anew, so that no link is followed
                new.write(text)
            os.replace(scratch, file)
        finally:
            scratch.unlink(missing_ok=True)


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
    for setting in sorted(root.iterdir()):
        if setting.is_dir():
            for name in sorted(os.listdir(setting)):
                if name.startswith("seed") and name[4:].isdigit():
                    yield setting / name


def last_line(error: str | None) -> str:
    return masked(error.strip().splitlines()[-1]) if error and error.strip() else ""


def is_done(record: dict[str, Any]) -> bool:
    return record["status"] in DONE
