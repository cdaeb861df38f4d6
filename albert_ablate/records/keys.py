"""Cache of arm and setting keys of records and overrides, in RUNS/.keys.

Computing a key (`config.keys_of`) imports the components, which takes seconds, and composes the configuration, which
takes a tenth of a second per arm. So keys are cached, one per line, until conf/ or the package changes. The file may be
deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from albert_ablate.config import (
    SIGNIFICANT,
    ConfigError,
    Identity,
    checked_config,
    conf_folder,
    is_outdated,
    keys_of,
    own_option_files,
    own_targets,
    text_locations,
)
from albert_ablate.config.code import local_files
from albert_ablate.config.components import TRUST
from albert_ablate.config.folders import extend_path
from albert_ablate.config.secrets import masked
from albert_ablate.records.atomic import replace_file
from albert_ablate.records.store import last_line

FILE = ".keys"


@dataclass(frozen=True)
class Arm:
    """The checked configuration of some overrides, its keys, and the places of its text (`config.text_locations`).

    plain: the arm's key without the source of somebody's own components.
    """

    cfg: Mapping[str, Any]
    keys: Identity
    text_locations: Mapping[str, Any]
    plain: str


class Keys:
    """Keys of records and overrides, cached in the folder of runs `root`.

    apart: compute keys that are not cached in another process, so that this one imports no torch; where it has done so
    already they are computed here.
    """

    def __init__(self, root: Path, apart: bool = False):
        self.file, self.apart, self.fresh = root / FILE, apart and "torch" not in sys.modules, 0
        self.lines, self.passing = _read(self.file), set[str]()
        self.arms: dict[tuple[str, ...], Arm] = {}

    def arm(self, overrides: Sequence[str]) -> Arm:
        """The arm of some overrides, composed once. Raises ConfigError if they are not allowed."""
        overrides = tuple(overrides)
        if overrides not in self.arms:
            cache_name = _name(["arm", os.getcwd(), *overrides])
            key = self.lines.get(cache_name)
            if key is None:
                key = _arm(overrides)
                self._keep(cache_name, key, overrides)
            self.arms[overrides] = Arm(key["cfg"], Identity(*key["keys"]), key["places"], key["plain"])
        return self.arms[overrides]

    def of_overrides(self, several: Sequence[Sequence[str]]) -> list[Identity | None]:
        """The keys of several lists of overrides; None for those that are not allowed."""
        names = [_name(["overrides", os.getcwd(), *overrides]) for overrides in several]
        return self._found(dict(zip(names, ({"overrides": [*o]} for o in several), strict=True)), names)

    def note(self, arms: Mapping[tuple[str, ...], Mapping[str, Any] | None]) -> None:
        """Cache the keys of checked configurations by the overrides they were composed from; None: not allowed."""
        for overrides, cfg in arms.items():
            keys, name = None if cfg is None else keys_of(cfg), _name(["overrides", os.getcwd(), *overrides])
            if name not in self.lines:
                self._keep(name, None if keys is None else [keys.arm, keys.setting, keys.run], overrides)

    def of_records(self, records: Sequence[Mapping[str, Any]]) -> list[Identity | None]:
        """The keys of several records; None for a configuration that this release cannot read.

        Taken from the record if training wrote them, else computed from its configuration. For a run whose components
        were corrected since then they are computed with today's revisions.
        """
        out: list[Identity | None] = []
        names, jobs = list[str](), dict[str, Any]()
        for record in records:
            recorded = record.get("key") or {}
            if "arm" in recorded and "setting" in recorded and not is_outdated(record):
                out.append(Identity(recorded["arm"], recorded["setting"], ""))
                continue
            config = record.get("config") or {}
            parts = {key: config.get(key) for key in (*SIGNIFICANT, "trainer")}
            names.append(_name(["config", os.getcwd(), json.dumps(parts, sort_keys=True)]))
            jobs.setdefault(names[-1], {"config": parts})
            out.append(None)
        computed = iter(self._found(jobs, names))
        return [keys if keys is not None else next(computed) for keys in out]

    def _found(self, jobs: Mapping[str, Any], names: Sequence[str]) -> list[Identity | None]:
        lacking = [name for name in jobs if name not in self.lines]
        if lacking:
            done = (_apart if self.apart else _computed)([jobs[name] for name in lacking])
            for name, keys in zip(lacking, done, strict=True):
                self._keep(name, keys, jobs[name].get("overrides", ()))
        return [Identity(*self.lines[name]) if self.lines[name] else None for name in names]

    def _keep(self, name: str, value: Any, overrides: Sequence[str]) -> None:
        self.lines[name] = value
        if any(o.lstrip("+").startswith("model.path=") for o in overrides):
            self.passing.add(name)  # it follows from a checkpoint, which may change
        else:
            self.fresh += 1

    def save(self) -> None:
        """Write the cache file if a key was computed."""
        if not self.fresh or not self.file.parent.is_dir():
            return
        body = "".join(
            f"{name}\t{json.dumps(value)}\n" for name, value in self.lines.items() if name not in self.passing
        )
        with contextlib.suppress(OSError):  # somebody else's folder, a full disk
            replace_file(self.file, f"{_head(body)}\n{body}".encode())
            self.fresh = 0


def _name(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _arm(overrides: Sequence[str]) -> dict[str, Any]:
    cfg = dict(checked_config(overrides))
    keys = keys_of(cfg)
    plain = keys_of(cfg, with_code=False).arm
    return {
        "keys": [keys.arm, keys.setting, keys.run],
        "plain": plain,
        "cfg": masked(cfg),
        "places": text_locations(cfg),
    }


def _computed(jobs: Sequence[Mapping[str, Any]]) -> list[list[str] | None]:
    out: list[list[str] | None] = []
    for job in jobs:
        try:
            keys = keys_of(job["config"] if "config" in job else checked_config(job["overrides"]))
            out.append([keys.arm, keys.setting, keys.run])
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError):  # of another release, or not allowed
            out.append(None)
    return out


def _apart(jobs: Sequence[Mapping[str, Any]]) -> list[list[str] | None]:
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"The keys of the runs cannot be computed: {last_line(done.stderr)}.")
    return json.loads(done.stdout)


def _read(file: Path) -> dict[str, Any]:
    """What is kept; nothing where the file is damaged or of other sources."""
    try:
        head, _, body = file.read_text(encoding="utf-8").partition("\n") if file.is_file() else ("", "", "")
        if head != _head(body):
            return {}
        return {name: json.loads(text) for name, text in (line.split("\t") for line in body.split("\n")[:-1])}
    except (OSError, ValueError):
        return {}


def _head(body: str) -> str:
    return f"{_sources()} {zlib.crc32(body.encode()):08x}"


def _sources() -> str:
    """Of the files that keys follow from: those of conf/ and of the package, and the user's own, by size and time of
    change."""
    extend_path()
    trusted = [name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip()]
    modules = {target.rpartition(".")[0] for target in own_targets()} | {n.rpartition(".")[0] or n for n in trusted}
    files = set(own_option_files())
    for module in modules | set(trusted):
        with contextlib.suppress(ConfigError):  # broken, which is said where it is taken
            files |= set(local_files(module))
    return _name([_shipped_sources(), *map(_stamp, sorted(files)), os.environ.get(TRUST, "")])


@cache
def _shipped_sources() -> str:
    folders = ((conf_folder(), "*.yaml"), (Path(__file__).parent.parent, "*.py"))
    return _name([_stamp(file) for folder, kind in folders for file in sorted(folder.rglob(kind))])


def _stamp(file: Path) -> str:
    about = file.stat()
    return f"{file} {about.st_mtime_ns} {about.st_size}"


if __name__ == "__main__":
    json.dump(_computed(json.load(sys.stdin)), sys.stdout)
