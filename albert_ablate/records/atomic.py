"""Atomic file writes: after a crash a file holds its old or its new content, never a part."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically by `content` (bytes, or a function that writes them): temporary file, fsync, rename.

    The temporary file's name is fixed, so that the next write takes the place of what a killed process left: for one
    writer at a time. It is created anew, and a link at either name is replaced, never written through: a run folder may
    come from somebody else.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk shows at a write, which knows no name
        raise
    flush_to_disk(path.parent)


def open_own(path: Path) -> int:
    """Open `path` for reading and writing, created if missing: its file descriptor. OSError if it is a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
