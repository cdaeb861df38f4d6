"""Files of Python modules, found without importing any of them."""

import importlib.util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def module_file(name: str) -> Path | None:
    """The source file of a module, None where there is none: a built-in or compiled one, or no module of this name."""
    spec = _spec(name)
    file = spec.origin if spec and spec.has_location else None
    return Path(file) if file and file.endswith(".py") else None


def folders_of_package(name: str) -> list[str]:
    """The folders of a package, of which a namespace package has several; empty where there is none of this name."""
    spec = _spec(name)
    return list(spec.submodule_search_locations or ()) if spec else []


def _spec(name: str) -> ModuleSpec | None:
    """importlib's `find_spec`, which imports the packages above a module, without that."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):  # loaded by other means, such as __main__ of a script
        return None
    for part in parts[1:]:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # by its last name: a namespace package would look for the package above it among the imported ones
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec
