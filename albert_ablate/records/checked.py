"""JSON files with a checksum and an owner, so that damaged, edited and misplaced files are noticed.

Such a file is an object with two extra keys: `checksum` of all the rest, and `of`, the id of the run or arm that it
belongs to, if it belongs to one. A file without them was written by an older release and is accepted.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.records.atomic import replace_file

SUM, OWNER = "checksum", "of"


def checksum(content: Any) -> str:
    """Checksum of JSON content, independent of white space and order of keys: 128 bits of its SHA-256."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_checked(path: Path, content: Mapping[str, Any], owner: str | None = None) -> None:
    """Write a JSON file with its checksum. `content` must be valid JSON, with texts as keys; ValueError for a number
    that is not finite."""
    whole = {**content} if owner is None else {**content, OWNER: owner}
    text = json.dumps({**whole, SUM: checksum(whole)}, indent=1, allow_nan=False)
    replace_file(path, f"{text}\n".encode())


def read_checked(path: Path, owner: str | None = None) -> dict[str, Any]:
    """Read a file of `write_checked` and verify it. Raises ValueError with half a sentence if it is damaged, was
    edited, or belongs to another run or arm than `owner`; OSError if it cannot be opened."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    written = content.pop(SUM, None)
    if written is not None and written != checksum(content):
        raise ValueError(f"it does not match its checksum: it was damaged, or edited without removing `{SUM}`")
    whose = content.pop(OWNER, owner)
    if owner is not None and whose != owner:
        raise ValueError(f"it belongs to another, {whose}")
    return content
