"""Where runs stand, from their records and locks alone."""

import contextlib
import fcntl
import json
import os
import struct
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from albert_ablate.collector import without_collector
from albert_ablate.config import SIGNIFICANT
from albert_ablate.records import store
from albert_ablate.records.lease import NO_LOCKS, is_leased
from albert_ablate.records.store import DONE
from albert_ablate.records.store import has_ended as has_ended
from albert_ablate.records.store import last_line as last_line
from albert_ablate.records.store import run_folders as run_folders

INDEX, VERSION = ".status", "6"
INDEX_WRITE_THRESHOLD = 200  # records newly read
BRIEF_FIELDS = (
    "status label name arm setting identity seed role error updated created progress sessions cost summary".split()
)
BRIEF_FIELDS += ["revisions", "key"]


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run folder; a status of "pending" where there is none, "unreadable" where it cannot be read."""
    record = store.read(folder)
    if isinstance(record, store.Record):
        return record.with_defaults()
    return {"status": "pending"} if record.missing else {"status": "unreadable", "error": record.reason}


def state(folder: Path) -> dict[str, Any]:
    """The record, whose status is "orphaned" where it says running and no process holds the run."""
    return _judged(read_record(folder), folder)


def _judged(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    if record["status"] == "running" and not is_held(folder):
        record["status"] = "orphaned"
    return record


def states(root: Path, configured: bool = True) -> list[dict[str, Any]]:
    """`state` of each run below `root`: what a table needs of it, its folder, and if asked for what of its
    configuration determines its weights.

    What was read stands in an index beside the runs, a line each, so that next time only records that have changed are
    read. It may be lost at any time.
    """
    with without_collector():
        return _states(root, configured)


def _states(root: Path, configured: bool) -> list[dict[str, Any]]:
    known, configuration = _known(root / INDEX), cache(json.loads)  # runs of a setting have one text
    entries, read, out = list[str](), 0, []
    configs: dict[str, tuple[float | None, str]] = {}  # by setting, whose runs differ in nothing that is kept
    for folder in run_folders(root):
        name = f"{folder.parent.name}/{folder.name}"
        try:
            about = os.stat(f"{root}/{name}/record.json")
        except OSError:
            out.append(_judged(read_record(folder), folder) | {"folder": str(folder)})
            continue
        stamp = f"{about.st_mtime_ns} {about.st_size} {about.st_ino}"
        entry = known.get(name, "").split("\t")
        if entry[0] == stamp and len(entry) == 3:
            brief = json.loads(entry[1]) | (configuration(entry[2]) if configured else {})
        else:
            brief, config = _brief(folder, configs)
            entry = [stamp, json.dumps(brief), config]
            if configured:
                brief |= configuration(config)
            read += 1
        entries.append("\t".join([name, *entry]))
        out.append(_judged(brief, folder) | {"folder": str(folder)})
    if read >= INDEX_WRITE_THRESHOLD:
        _write_index(root / INDEX, "\n".join([*entries, ""]))
    return out


def _brief(folder: Path, configs: dict[str, tuple[float | None, str]]) -> tuple[dict[str, Any], str]:
    """What a table needs of a record, and as JSON what determines its weights.

    configs: the learning rate and that JSON by setting, whose runs do not differ in it.
    """
    brief = store.read_fields(folder, BRIEF_FIELDS)
    if isinstance(brief, store.Unreadable):
        return {"status": "pending"} if brief.missing else {"status": "unreadable", "error": brief.reason}, "{}"
    setting = brief["setting"]
    if setting not in configs:
        fields = store.read_fields(folder, ("config", "choices"))
        config, choices = ({}, {}) if isinstance(fields, store.Unreadable) else (fields["config"], fields["choices"])
        significant = {key: config[key] for key in (*SIGNIFICANT, "trainer") if key in config}
        made = (config.get("optimizer") or {}).get("lr"), json.dumps({"config": significant, "choices": choices})
        if setting is None:
            return brief | {"lr": made[0]}, made[1]
        configs[setting] = made
    return brief | {"lr": configs[setting][0]}, configs[setting][1]


def _known(index: Path) -> dict[str, str]:
    """The index's line of each run; none where it is damaged, of another release or no plain file: it is made anew."""
    try:
        head, _, body = index.read_text(encoding="utf-8").partition("\n") if index.is_file() else ("", "", "")
        return dict(line.split("\t", 1) for line in body.split("\n")[:-1]) if head == _head(body) else {}
    except (OSError, ValueError):
        return {}


def _head(body: str) -> str:
    """The first line of an index: its version, and a checksum of the rest."""
    return f"{VERSION} {zlib.crc32(body.encode()):08x}"


def _write_index(file: Path, body: str) -> None:
    scratch = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # somebody else's folder, a full disk
        try:
            with scratch.open("x", encoding="utf-8") as new:  # created anew, so that no link is followed
                new.write(f"{_head(body)}\n{body}")
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


def is_done(record: dict[str, Any]) -> bool:
    """Whether a run has ended with a result, finished or diverged."""
    return record["status"] in DONE
