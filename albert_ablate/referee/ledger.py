"""What a session or a comparison has seen: JSON Lines that are only ever added to, each bound to the one before it.

A line holds its number, its kind, what it says, and `hash`: the SHA-256 of the line before it and of itself. Beside the
file stands `ledger.head` with the hash of the last line, so that a missing end is seen too. A line is written by
putting a whole new file in place of the old one, so that a kill leaves the old or the new one, never half a line.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.records.atomic import open_own, replace_file

FIRST_HASH = "0" * 64


class InUse(RuntimeError):
    """Raised when another process is writing this ledger."""


class Ledger:
    """FOLDER/ledger.jsonl. Raises ConfigError, one sentence, where it was edited or cannot be read."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.head = folder, folder / "ledger.jsonl", folder / "ledger.head"
        self.entries: list[dict[str, Any]] = []
        self._text = b""
        self.read()

    def read(self) -> None:
        """Read what is there and check every line against the one before it."""
        try:
            self._text = self.path.read_bytes()
        except FileNotFoundError:
            if self.head.exists():
                raise ConfigError(f"{self.path} is missing, and {self.head.name} says that it had entries.") from None
            self._text = b""
        self.entries, previous = [], FIRST_HASH
        for number, line in enumerate(self._text.splitlines(), 1):
            try:
                entry = json.loads(line)
                given = entry["hash"]
            except (ValueError, TypeError, KeyError):
                raise self._edited(number, "cannot be read") from None
            if given != _hash(previous, entry) or entry.get("line") != number:
                raise self._edited(number, "is not what was written")
            self.entries.append(entry)
            previous = given
        if not self.head.exists():
            # a kill before the head of the first line was written
            if len(self.entries) > 1:
                raise ConfigError(f"{self.head} is missing: without it {self.path.name} cannot be verified.")
            return
        head_hash = self.head.read_text().strip()
        # the head is written after the line, so that a kill may leave it one line behind
        if head_hash not in [e["hash"] for e in self.entries[-2:]] and not (
            head_hash == FIRST_HASH and len(self.entries) <= 1
        ):
            raise ConfigError(f"{self.path} was edited: it does not end where its last entry was written.")

    def _edited(self, number: int, what: str) -> ConfigError:
        return ConfigError(f"{self.path} was edited: line {number} {what}.")

    @property
    def hash(self) -> str:
        """Hash of the last line, which covers all lines before it."""
        return self.entries[-1]["hash"] if self.entries else FIRST_HASH

    def add(self, kind: str, **content: Any) -> dict[str, Any]:
        """Append one line, atomically; after an OSError the ledger is unchanged."""
        entry = {"line": len(self.entries) + 1, "kind": kind, **content}
        entry["hash"] = _hash(self.hash, entry)
        text = self._text + json.dumps(entry, allow_nan=False).encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, text)
        self._text = text
        self.entries.append(entry)
        replace_file(self.head, f"{self.hash}\n".encode())
        return entry

    def entries_of(self, kind: str) -> list[dict[str, Any]]:
        """Entries of one kind, in order."""
        return [e for e in self.entries if e["kind"] == kind]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the ledger for this process and read it again; raises InUse if another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = open_own(self.folder / "lock")
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUse(f"{self.path} is in use by another process: ask again when it is done.") from None
            self.read()
            yield
        finally:
            os.close(fd)


def _hash(previous: str, entry: dict[str, Any]) -> str:
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(f"{previous}\n{json.dumps(content, sort_keys=True)}".encode()).hexdigest()
