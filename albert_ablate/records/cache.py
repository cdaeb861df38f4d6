"""The user's cache folder and checked files in it: one that is missing or damaged is computed again."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from albert_ablate.records.atomic import replace_file

_SIZE = hashlib.sha256().digest_size


def cache_folder(configured: str | None = None) -> Path:
    """Folder of cached files: paths.cache, or the user's cache folder."""
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "albert_ablate"


def read_cached(file: Path) -> bytes | None:
    """Read a cached file; None if it is missing or does not match its checksum."""
    try:
        raw = file.read_bytes()
    except OSError:
        return None
    return raw[_SIZE:] if hashlib.sha256(raw[_SIZE:]).digest() == raw[:_SIZE] else None


def write_cached(file: Path, content: bytes) -> None:
    """Write a cached file with the SHA-256 of its content in front; does nothing if the folder cannot be written."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, hashlib.sha256(content).digest() + content)
