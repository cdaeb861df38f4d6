"""The record of a run, record.json: one class, one writer, one reader. No torch.

`read` gives a Record or, where the file cannot be read, an Unreadable with the reason in one sentence; it never raises.
The fields of a file that is not byte for byte as `write` left it are checked one by one, so that whoever has a Record
can rely on its types. A record carries its format version; one without a version is of format 1 and is read with what
it has. It ends with checksums: of the file as it was written, and of each part that holds results, so that a record
that a disk has damaged is not taken for a result.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.config.secrets import masked
from albert_ablate.records.atomic import replace_file
from albert_ablate.records.checked import checksum
from albert_ablate.records.fields import Wrong, check_fields, shown_value

FILE = "record.json"
FORMAT = 2  # 1: before there were versions and checksums
DONE = ("finished", "diverged")  # outcomes: never trained again. running, stopped and failed go on
# what is refused where its checksum is wrong; the rest (label, choices, times) carries no result
CHECKED = ("seed", "arm", "key", "role", "config", "revisions", "code", "budget", "data", "model", "summary", "proof",
           "provenance", "cost", "histories", "trunk")  # fmt: skip
LARGEST_FILE = 1 << 28  # bytes; a model of a million parameters' names would have a record of this size
_SUMS = b',\n "checksums": '
_TOP_LEVEL = b'\n "'  # before a key
END = b"\n}"  # of the file, before its checksums are put in


@dataclass(frozen=True, eq=False)
class Record(Mapping[str, Any]):
    """What a run has written about itself. Losses in nats per token, times in seconds; what an older release did not
    write has its default. As a mapping it has every key of the file, those of no release known here too, and the parts
    that are objects even where the file lacks them.
    """

    status: str
    seed: int
    format: int = 1
    name: str | None = None  # what varies and the seed, for people
    label: str | None = None  # the options that make the arm, in words
    arm: str | None = None  # id of the configuration without seed and learning rate
    setting: str | None = None  # id of the configuration without seed
    identity: str | None = None  # id of the run
    key: Mapping[str, str] = field(default_factory=dict)  # of arm and setting, without the text (config.keys_of)
    role: str | None = None  # confirmation, tuning or calibration
    error: str | None = None  # of a failed run, with its traceback
    choices: Mapping[str, Any] = field(default_factory=dict)  # option by group
    config: Mapping[str, Any] = field(default_factory=dict)
    revisions: Mapping[str, int] = field(default_factory=dict)  # of components whose formula was corrected, by group
    code: Mapping[str, str] = field(default_factory=dict)  # hash of the source of each component, by group
    budget: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)  # figure by name
    proof: Mapping[str, Any] = field(default_factory=dict)  # hashes of initial draws, order of data, final weights
    provenance: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    histories: Mapping[str, int] | None = None  # committed bytes of each; None once the run is done
    progress: Mapping[str, int] | None = None  # step, steps
    sessions: int = 0
    signal: int | None = None
    created: float | None = None
    updated: float | None = None
    note: str | None = None  # what was changed after the run wrote it, where no result depends on it
    content: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, key: str) -> Any:
        if self.content.get(key) is None and key in _DEFAULTED:
            return getattr(self, key)
        return self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    @property
    def is_done(self) -> bool:
        """Whether it finished or diverged."""
        return self.status in DONE

    @property
    def learning_rate(self) -> float | None:
        """The peak learning rate of its configuration."""
        return (self.config.get("optimizer") or {}).get("lr")

    def with_defaults(self) -> dict[str, Any]:
        """The file's content, with the defaults of what it lacks."""
        return self.content | {key: getattr(self, key) for key in _NAMES}


@dataclass(frozen=True)
class Unreadable:
    """Why a record cannot be read."""

    reason: str  # one sentence, without its period
    missing: bool = False  # there is no file: nothing was committed yet


REMEDY = "remove the folder to train it again"


def read(folder: Path | str) -> Record | Unreadable:
    """Read the record of a run folder: a Record, or an Unreadable with the reason; never raises."""
    try:
        raw = _bytes(f"{folder}/{FILE}")
    except (FileNotFoundError, NotADirectoryError):
        nowhere = os.path.islink(folder) and not os.path.exists(folder)
        why = "it is a link to nowhere" if nowhere else f"it has no {FILE}: it was stopped before its first commit"
        return Unreadable(why, missing=True)
    except (OSError, ValueError) as error:
        return _unreadable(error)
    try:
        return _parsed(raw, str(folder))
    except (ValueError, RecursionError) as error:
        return _unreadable(error)


def read_fields(folder: Path | str, names: Sequence[str]) -> dict[str, Any] | Unreadable:
    """Read some fields of a run's record, with defaults for missing ones, or the reason why it cannot be read.

    Of a record that is byte for byte as `write` left it only these fields are parsed, which takes a third of the time:
    each top-level key then begins a line.
    """
    try:
        raw = _bytes(f"{folder}/{FILE}")
    except (OSError, ValueError):
        raw = b""
    if _is_intact(raw):
        lines = (line.partition(b'": ') for line in raw[: raw.rfind(_SUMS)].split(_TOP_LEVEL))
        text = {key: value.removesuffix(b",") for key, _, value in lines}
        wanted = [key for name in {*names, "format", "setting", "seed"} if (key := name.encode()) in text]
        fields = json.loads(b"{%s}" % b",".join(b'"%s":%s' % (key, text[key]) for key in wanted))
        with contextlib.suppress(Wrong):
            _belongs(fields, str(folder))
            if fields.get("format") == FORMAT:
                return {name: _DEFAULTS[name]() if fields.get(name) is None else fields[name] for name in names}
    record = read(folder)
    return {name: getattr(record, name) for name in names} if isinstance(record, Record) else record


def require(folder: Path, record: Mapping[str, Any], *keys: str) -> None:
    """Raise ConfigError with one sentence if a record lacks one of these dotted keys, or has null there."""
    for key in keys:
        value: Any = record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise ConfigError(f"{folder / FILE} cannot be used: it has no {key}; {REMEDY}.")


def has_ended(folder: Path | str) -> bool:
    """Whether a run is finished or diverged. A record that is byte for byte as it was written needs no parsing: its
    status stands first."""
    try:
        raw = _bytes(f"{folder}/{FILE}")
    except (OSError, ValueError):
        return False
    if _is_intact(raw):
        return any(raw.startswith(b'{\n "status": "%s",' % status.encode()) for status in DONE)
    try:
        return _parsed(raw, str(folder)).is_done
    except (ValueError, RecursionError):
        return False


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write record.json. Numbers that are not finite become null, which JSON lacks; secrets become `***`."""
    content = plain(masked({"status": record["status"], **record, "format": FORMAT}))
    content.pop("checksums", None)
    body = _dumped(content)
    sums = {key: checksum(content[key]) for key in CHECKED if key in content} | {"file": _hash(body)}
    if isinstance(record, dict):
        record |= {"format": FORMAT, "checksums": sums}  # what is in memory is what a reader gets
    replace_file(folder / FILE, body[:-2] + _SUMS + json.dumps(sums).encode() + b"\n}\n")


def run_folders(root: Path) -> list[Path]:
    """The run folders below `root`, runs/<setting>/seed<N>, in order. Links to folders are followed."""
    folders = []
    try:
        settings = sorted((e for e in os.scandir(root) if _is_folder(e)), key=lambda e: e.name)
    except OSError as error:
        raise ConfigError(f"{root} cannot be read: {error.strerror or error}.") from None
    for setting in settings:
        try:
            names = sorted(e.name for e in os.scandir(setting.path) if is_seed(e.name) and not _is_file(e))
        except OSError:
            continue  # a link to nowhere, or somebody else's
        folders += [root / setting.name / name for name in names]
    return folders


def is_seed(name: str) -> bool:
    """Whether a folder's name is seed<N>."""
    return name.startswith("seed") and name[4:].isascii() and name[4:].isdigit()


def plain(value: Any) -> Any:
    """Convert a value to plain JSON: text keys, lists, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def last_line(error: str | None) -> str:
    """Last line of a traceback, which holds the error, without secrets."""
    return masked(error.strip().splitlines()[-1]) if error and error.strip() else ""


def require_runs_folder(path: Path) -> None:
    """Raise ConfigError unless `path` is a folder that can hold runs; it may be empty."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a folder of runs, which holds {path}/<setting>/seed<N>/.")
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder of runs: it is a file.")
    if (path / "record.json").exists():
        raise ConfigError(f"{path} is one run, not a folder of runs: `albert-ablate show` draws it.")


def no_runs(path: Path) -> ConfigError:
    """The error of a command that needs at least one run below `path`."""
    if not path.exists():
        return ConfigError(f"{path} does not exist.")
    if (path / "record.json").exists():
        return ConfigError(f"{path} is one run, not a folder of runs: `albert-ablate show` draws it.")
    return ConfigError(f"{path} holds no runs: runs lie in {path}/<setting>/seed<N>/.")


def not_a_run(folder: Path) -> ConfigError:
    """The error of a command on one run whose folder has no record."""
    if not folder.exists():
        return ConfigError(f"{folder} does not exist: name a run folder, such as runs/<setting>/seed0.")
    inside = sorted(folder.glob("**/record.json"))
    hint = f"; a run in it is {inside[0].parent}, and `albert-ablate report` takes all of them" if inside else ""
    return ConfigError(f"{folder} is not a run folder: it holds no record.json{hint}.")


# --- files -----------------------------------------------------------------------------------------------------------


def _is_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir(follow_symlinks=False) or entry.is_symlink() and not entry.is_file()


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return False


def _bytes(path: str) -> bytes:
    """A file's content. A pipe or a device would never end: only a plain file is read."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(fd)
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(21, "it is a folder")
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_FILE:
            raise ValueError("it is not a plain file" if about.st_size <= LARGEST_FILE else "it is larger than 256 MiB")
        parts = []
        while part := os.read(fd, max(about.st_size, 4096) + 1):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def _unreadable(error: BaseException) -> Unreadable:
    if isinstance(error, Wrong):
        return Unreadable(f"{FILE} cannot be read: {error}")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return Unreadable(f"{FILE} cannot be read: {' '.join(reason.split())[:300]}")


# --- checksums -------------------------------------------------------------------------------------------------------


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _dumped(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def _is_intact(raw: bytes) -> bool:
    """Whether the file is byte for byte as `write` left it."""
    at = raw.rfind(_SUMS)
    return at >= 0 and raw[at:].rstrip(b"\n}").endswith(f'"file": "{_hash(raw[:at] + END)}"'.encode())


def _compare(record: dict[str, Any]) -> str | None:
    """Raise Wrong where a part that holds results is not what was written; gives a note on the others."""
    sums = record["checksums"]
    if not isinstance(sums, dict):
        raise Wrong("its checksums are not an object")
    for key in CHECKED:
        if key in sums and key in record and checksum(record[key]) != sums[key]:
            raise Wrong(
                f"its {key} does not match its checksum, so it was damaged or edited after the run wrote it "
                "(to accept an edit, remove `checksums` from the file)"
            )
    content = {key: value for key, value in record.items() if key != "checksums"}
    same = _hash(_dumped(content)) == sums.get("file")
    return None if same else f"{FILE} was changed after the run wrote it, but not in its results"


# --- reading ---------------------------------------------------------------------------------------------------------


def _constant(word: str) -> None:
    raise Wrong(f"it holds {word}, which is not a JSON number")


def _parsed(raw: bytes, folder: str) -> Record:
    content = json.loads(raw.decode("utf-8"), parse_constant=_constant)
    if not isinstance(content, dict):
        raise Wrong("it is not a JSON object")
    version = content.get("format", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise Wrong(f"its format is {shown_value(version)}")
    if version > FORMAT:
        raise Wrong(
            f"its format is version {version}, and this release reads up to version {FORMAT}: update albert_ablate"
        )
    name = os.path.basename(os.path.abspath(folder))
    if "seed" not in content and is_seed(name):  # the folder says it too
        content["seed"] = int(name[4:])
    for key in ("status", "seed"):
        if key not in content:
            raise Wrong(f"it has no {key}")
    intact = _is_intact(raw)
    if not intact:  # else it holds what `write` was given, and its fields need no look
        check_fields(content)
    _belongs(content, folder)
    note = _compare(content) if "checksums" in content and not intact else None
    content = content if intact else masked(content)  # older releases kept passwords
    named = {key: content[key] for key in _NAMES if content.get(key) is not None}
    return Record(**named, note=note, content=content)


def _belongs(content: Mapping[str, Any], folder: str) -> None:
    """Raise Wrong if the record belongs to another folder, judged by the folder's name if that is seed<N>."""
    parent, _, name = os.path.abspath(folder).rpartition("/")
    setting, setting_recorded = parent.rpartition("/")[2], content.get("setting") or parent.rpartition("/")[2]
    if not is_seed(name):
        return
    moved = _is_id(setting) and _is_id(setting_recorded) and setting != setting_recorded
    if moved or int(name[4:]) != content.get("seed"):
        raise Wrong(
            f"it is the record of another run: it lies in {setting}/{name} and says that it is "
            f"{setting_recorded}/seed{content.get('seed')}"
        )


def _is_id(name: str) -> bool:
    return len(name) == 12 and not name.strip("0123456789abcdef")


_NAMES = [f.name for f in fields(Record) if f.name not in ("note", "content")]
_DEFAULTS: dict[str, Callable[[], Any]] = {
    f.name: partial(copy, f.default) if f.default_factory is MISSING else f.default_factory for f in fields(Record)
}
_PARTS = [f.name for f in fields(Record) if f.default_factory is dict and f.name != "content"]
_DEFAULTED = {*_PARTS, "histories", "label"}
