"""JSON files that show whether they are as they were written, and whose they are.

Such a file is an object with two keys more: `checksum` of all the rest, and where it belongs to one run or arm `of`,
its id. A file without them is of an older release and is taken as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.records.atomic import replace_file

SUM, OWNER = "checksum", "of"


def checksum(content: Any) -> str:
    """128 bits of the SHA-256 of the content, whatever white space and order of keys it is written with."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_checked(path: Path, content: Mapping[str, Any], owner: str | None = None) -> None:
    """Replace the file. `content` must be what JSON can hold, with texts as keys; ValueError for a number that is not
    finite."""
    whole = {**content} if owner is None else {**content, OWNER: owner}
    text = json.dumps({**whole, SUM: checksum(whole)}, indent=1, allow_nan=False)
    replace_file(path, f"{text}\n".encode())


def read_checked(path: Path, owner: str | None = None) -> dict[str, Any]:
    """What `write_checked` was given. ValueError with half a sentence where the file is damaged, was edited, or is that
    of another run or arm than `owner`; OSError where it cannot be opened."""
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
