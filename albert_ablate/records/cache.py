"""The user's cache folder, and files in it that save work: one that is missing or damaged is made anew."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from albert_ablate.records.atomic import replace_file

_SIZE = hashlib.sha256().digest_size


def cache_folder(configured: str | None = None) -> Path:
    """paths.cache, or the user's cache folder."""
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "albert_ablate"


def read_cached(file: Path) -> bytes | None:
    """What `write_cached` was given; None where there is no such file, or it does not hold what was written to it."""
    try:
        raw = file.read_bytes()
    except OSError:
        return None
    return raw[_SIZE:] if hashlib.sha256(raw[_SIZE:]).digest() == raw[:_SIZE] else None


def write_cached(file: Path, content: bytes) -> None:
    """Keep the content behind its SHA-256. Where the folder cannot be written nothing is kept."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, hashlib.sha256(content).digest() + content)
