"""Nested settings as dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any


def dotted(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten: {"optimizer": {"lr": 0.1}} gives ("optimizer.lr", 0.1); an empty mapping gives nothing."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_internal(key: str) -> bool:
    """Whether the last name of a dotted key begins with an underscore, as Hydra's `_target_` does."""
    return key.rpartition(".")[2].startswith("_")
