"""Hashes of the source of components: comments, layout and docstrings left out. Nothing is imported.

What stands outside the package is somebody's own, and its hash is part of a run's identity: of the module that holds
the component and of every local module that it imports, whole. Of a library (a module in site-packages) it is the
module and the version of its distribution. What stands in the package is hashed as narrowly as it can be, so that a
run is told only of changes that concern it: the definitions that a component reaches by name. Data that code reads, and
modules imported by a computed name, are not seen.
"""

import ast
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from albert_ablate.config.errors import ConfigError
from albert_ablate.config.modules import module_file
from albert_ablate.streams import digest

PACKAGE = "albert_ablate"
# what says how a component is configured and recorded, not what it computes
NOT_FOLLOWED = tuple(f"{PACKAGE}.{name}" for name in ("config", "records", "trackers"))
LIBRARY_FOLDERS = ("site-packages", "dist-packages")


def is_own(target: str) -> bool:
    """Whether a `_target_` stands outside the package."""
    return target.partition(".")[0] != PACKAGE


def targets_in(node: Any) -> Iterator[str]:
    """Every `_target_` of a node and of the nodes in it."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from targets_in(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from targets_in(value)


def own_code(node: Mapping) -> str | None:
    """The hash of somebody's own code that a component's node names; None where all of it is the package's."""
    hashes = [code_of(target) for target in dict.fromkeys(targets_in(node)) if is_own(target)]
    return digest(*map(str.encode, hashes), size=6) if hashes else None


def code_by_group(cfg: Mapping, groups: list[str]) -> dict[str, str]:
    """The hash of the code of the component of each group: somebody's own as in the identity, else the package's."""
    nodes = {group: cfg[group] for group in groups if isinstance(cfg.get(group), Mapping) and "_target_" in cfg[group]}
    return {group: own_code(node) or code_of(node["_target_"]) for group, node in nodes.items()}


# --- of a target -----------------------------------------------------------------------------------------------------

_first: dict[str, tuple[str, dict[Path, tuple[int, int]]]] = {}  # of somebody's own: as it was when it was imported


def code_of(target: str) -> str:
    """The hash of the code of a target.

    In one process it stays what it was when the target was imported, which is what runs. Raises ConfigError where the
    source of somebody's own has changed since.
    """
    module = target.rpartition(".")[0]
    if not is_own(target):
        return _of_package(target)
    before = _first.get(module)
    if before is None:
        _first[module] = before = _of_module(module), {f: _stamp(f) for f in local_files(module)}
    changed = [file for file, stamp in before[1].items() if _stamp(file) != stamp]
    if changed and _of_module(module) != before[0]:
        raise ConfigError(
            f"{changed[0]} has changed since it was imported here: start the command, or the kernel of the notebook, "
            "again."
        )
    return before[0]


def _stamp(file: Path) -> tuple[int, int]:
    try:
        about = file.stat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


def _of_module(module: str) -> str:
    parts = [_dump(_tree(file, _stamp(file))).encode() for file in local_files(module)]
    if _is_library(module):
        parts.append(_release(module.partition(".")[0]).encode())
    return digest(*parts, size=6)


# --- somebody's own: whole modules -----------------------------------------------------------------------------------


def local_files(module: str) -> list[Path]:
    """The source files of a module, the packages above it, and every local module that these import; of a library the
    module's alone. The order is that of their names."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for above in _with_parents(name):
            file = None if above in found or above.partition(".")[0] == PACKAGE else module_file(above)
            if file is None or _is_library(above) and above != module:
                continue
            found[above] = file
            if not _is_library(above):
                waiting += _imports(_tree(file, _stamp(file)), above, file)
    return [found[name] for name in sorted(found)]


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _imports(tree: ast.AST, module: str, file: Path) -> list[str]:
    """The names of modules that a tree may import anywhere; of `from a import b` both a and a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, file)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names if alias.name != "*")]
    return found


def _absolute(node: ast.ImportFrom, module: str, file: Path) -> str:
    """The module that `from ... import` names, written in full."""
    if not node.level:
        return node.module or ""
    parts = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


@cache
def _is_library(module: str) -> bool:
    """Whether a module is installed or Python's own, not somebody's local file."""
    file = module_file(module)
    if file is None:
        return True
    standard = Path(sysconfig.get_path("stdlib"))
    return file.is_relative_to(standard) or any(name in file.parts for name in LIBRARY_FOLDERS)


@cache
def _release(package: str) -> str:
    names = packages_distributions().get(package, [package])
    try:
        return f"{names[0]} {version(names[0])}"
    except PackageNotFoundError:
        return package


# --- the package's own: the definitions that are reached -------------------------------------------------------------


@cache
def _of_package(target: str) -> str:
    module, _, name = target.rpartition(".")
    reached: dict[tuple[str, str], str] = {}
    _reach(module, name, reached)
    return digest(*(reached[key].encode() for key in sorted(reached)), size=6)


def _reach(module: str, name: str, reached: dict[tuple[str, str], str]) -> None:
    """Add a definition of a module, and what it reaches by name in the package, to what is `reached`."""
    if (module, name) in reached or module.partition(".")[0] != PACKAGE or module.startswith(NOT_FOLLOWED):
        return
    known = _definitions(module)
    if name in known.imported:
        _reach(*known.imported[name], reached)
    if name not in known.defined:
        return
    nodes = known.defined[name]
    reached[module, name] = "".join(map(_dump, nodes))
    for node in (part for top in nodes for part in ast.walk(top)):
        if isinstance(node, ast.Name):
            _reach(module, node.id, reached)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (whole := known.modules.get(node.value.id)) is not None:
                _reach(whole, node.attr, reached)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                _reach(_absolute(node, module, known.file), alias.name, reached)


class _Definitions:
    """What the names of a module stand for: defined in it, imported from another, or another module."""

    def __init__(self, module: str, file: Path):
        self.file = file
        self.defined: dict[str, list[ast.AST]] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        self.modules: dict[str, str] = {}
        for node in _tree(file, _stamp(file)).body:
            if isinstance(node, ast.ImportFrom):
                base = _absolute(node, module, file)
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = base, alias.name
                    if module_file(f"{base}.{alias.name}"):
                        self.modules[alias.asname or alias.name] = f"{base}.{alias.name}"
            elif not isinstance(node, ast.Import):
                for name in _names_given(node):
                    self.defined.setdefault(name, []).append(node)


@cache
def _definitions(module: str) -> _Definitions:
    file = module_file(module)
    return _Definitions(module, file) if file else _Definitions(module, Path(__file__).parent / "__init__.py")


def _names_given(node: ast.stmt) -> list[str]:
    """The names that a statement of a module gives a value, or an attribute (f.verify = ...)."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = []
    for part in (part for target in targets if target is not None for part in ast.walk(target)):
        if isinstance(part, ast.Name):
            names.append(part.id)
    return names


# --- trees -----------------------------------------------------------------------------------------------------------


@cache
def _tree(file: Path, stamp: tuple[int, int]) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{file} cannot be read as Python: {' '.join(str(error).split())}.") from None


def _dump(node: Any) -> str:
    """A tree as text that depends on what it does: no positions, no docstrings, and no empty fields, which differ
    between versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, []) and name not in _ASIDE}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        fields["body"] = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return f"{type(node).__name__}({','.join(f'{name}={_dump(value)}' for name, value in fields.items())})"


_ASIDE = ("ctx", "kind", "type_comment", "type_ignores")
