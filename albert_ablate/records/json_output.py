"""Output of `--json`: one JSON document on standard output, which names its schema, and nothing else."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from albert_ablate.records.store import plain

SCHEMAS = Path(__file__).parent.parent / "schemas"  # NAME.schema.json, published: docs/referee.md
NO_BARS = "ALBERT_ABLATE_NO_BARS"  # an environment variable, for processes that are started too
VERSIONS = {"answer": 1, "ledger": 1, "status": 1, "run": 1, "methods": 1, "measures": 1}


def schema_id(name: str) -> str:
    """Schema id of a document, albert_ablate.NAME.vN; N rises when a key is changed or removed."""
    return f"albert_ablate.{name}.v{VERSIONS[name]}"


def schema(name: str) -> dict[str, Any]:
    """The published JSON schema of a document."""
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


def document(name: str, content: Mapping[str, Any]) -> str:
    """A JSON document as text, with its schema id; numbers that are not finite become null."""
    return json.dumps(plain({"schema": schema_id(name), **content}), indent=1, ensure_ascii=False, allow_nan=False)


def nonfinite_as_text(value: Any) -> Any:
    """Replace numbers that are not finite by "NaN", "Infinity" or "-Infinity", at any depth; numpy's become plain."""
    if isinstance(value, Mapping):
        return {str(k): nonfinite_as_text(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_as_text(v) for v in value]
    if type(value).__module__ == "numpy":
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


@contextlib.contextmanager
def output_to_stderr() -> Iterator[None]:
    """Redirect standard output to standard error, for child processes too: the former is for the document alone."""
    with _output_on(2, sys.stderr):
        yield


@contextlib.contextmanager
def output_to(path: str) -> Iterator[None]:
    """Redirect standard output to a file, for child processes too."""
    with open(path, "w") as file, _output_on(file.fileno(), file):
        yield


@contextlib.contextmanager
def _output_on(descriptor: int, stream: TextIO) -> Iterator[None]:
    """Redirect Python's standard output to `stream`, and that of child processes to `descriptor`."""
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        with contextlib.redirect_stdout(stream):
            yield
    finally:
        os.dup2(original, 1)
        os.close(original)
