"""What `--json` prints, checked against the published schema that it names."""

import json
from typing import Any

import pytest

from albert_ablate.records.json_output import VERSIONS, schema


def published(text: str, name: str) -> dict[str, Any]:
    """The document: strict JSON, nothing else in the text, and as schemas/NAME.schema.json has it."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no strict JSON"))
    assert found["schema"] == f"albert_ablate.{name}.v{VERSIONS[name]}"
    validator(schema(name)).validate(found)
    return found
