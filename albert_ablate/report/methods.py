"""What can be varied, read off the disk: each option's formula, source and defaults. Imports none of the options.

Formulas and sources are parsed from the docstrings of the targets (their files are read, not run), defaults from the
YAML files.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from albert_ablate.config import HYDRA_KEYS, ConfigError, conf_folder, nearest, option_files, own_targets, read_yaml
from albert_ablate.config.folders import extend_path
from albert_ablate.config.modules import module_file
from albert_ablate.records.json_output import document

# "Ba et al. 2016, 1607.06450", "Loshchilov and Hutter 2017, 1711.05101", "Shannon 1948"
_NAME = r"(?!(?:In|Since|Until|By|Of|On|At|From|The|Python)\b)(?:(?:Le|Team) )?[A-ZÀ-Ž][\w'’-]+(?: Team)?"
SOURCE = re.compile(
    rf"({_NAME}(?:(?:, {_NAME})*,? and {_NAME}| et al\.?)?),? \(?((?:19|20)\d\d)\)?(?:, (\d{{4}}\.\d{{4,5}}))?"
)


@dataclass(frozen=True)
class Method:
    """One option: `formula` in a line, `sources` (authors, year, arXiv id or null), `defaults` from its YAML.

    license and origin are given for corpora alone, the YAML file for options besides the package's own.
    """

    kind: str
    option: str
    formula: str
    sources: list[dict[str, str | None]]
    defaults: dict[str, Any]
    license: str | None = None
    origin: str | None = None
    file: str | None = None


def methods(kind: str | None = None) -> list[Method]:
    """Every option on disk, or those of one group."""
    groups = option_files()
    extend_path()
    if kind is not None and kind not in groups:
        raise ConfigError(f"{kind} is not a group of options: there are {nearest(kind, groups)}.")
    kinds = [kind] if kind else groups
    return [_method(group, name, file) for group in kinds for name, file in sorted(groups[group].items())]


def _method(group: str, name: str, file: Path) -> Method:
    place = None if file.parent.parent == conf_folder() else str(file)
    node = read_yaml(file) or {}
    if not isinstance(node, dict):
        raise ConfigError(f"{file} is not an option: it holds key: value lines.")
    if isinstance(node.get(name), dict):  # an evaluation stands under its own name
        node = node[name]
    defaults = {k: v for k, v in node.items() if k not in HYDRA_KEYS and k != "defaults"}
    if group == "recipe":  # its choices are its content
        chosen = [item for item in node.get("defaults", []) if isinstance(item, dict)]
        defaults |= {k.split("/")[-1]: v for item in chosen for k, v in item.items()}
    if "_target_" not in node:
        return Method(group, name, "", [], defaults, file=place)
    text = docstring(node["_target_"])
    known, origin = (attribute(node["_target_"], f) if group == "data" else None for f in ("LICENSE", "ORIGIN"))
    return Method(group, name, formula_of(text), sources_of(text), defaults, known, origin, place)


def formula_of(text: str) -> str:
    """The first sentence of a docstring, without the sources in brackets."""
    whole = " ".join(text.split("\n\n")[0].split())
    bare = re.sub(r" \([^()]*\)", lambda m: "" if SOURCE.search(m.group()) else m.group(), whole)
    first = re.split(r"(?<=[.:]) (?=[A-Z][a-z]+ )", bare)[0] if len(bare) > 110 else bare
    return first.rstrip(".:")


def sources_of(text: str) -> list[dict[str, str | None]]:
    """Papers cited in a docstring: authors, year, arXiv id."""
    sources = {}
    for authors, year, arxiv in SOURCE.findall(" ".join(text.split())):
        sources[authors, year, arxiv or None] = {"authors": authors, "year": year, "arxiv": arxiv or None}
    return list(sources.values())


@cache
def _module(name: str) -> tuple[dict[str, ast.AST], dict[str, tuple[str, str]]]:
    """Classes and functions of a module, and what it imports from others: name -> (module, name)."""
    file, package = module_file(name), name.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
    except (OSError, ValueError, SyntaxError):  # somebody's own, which the command that trains it will say
        tree = ast.Module([], [])
    kinds = (ast.ClassDef, ast.FunctionDef)
    imports = {
        alias.asname or alias.name: (f"{package}.{node.module}" if node.level else node.module or "", alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {node.name: node for node in tree.body if isinstance(node, kinds)}, imports


def _lineage(module: str, name: str) -> Iterator[ast.AST]:
    """A class or function and then its base classes, as far as they are the package's or the user's own."""
    if module.split(".")[0] not in {"albert_ablate", *(target.split(".")[0] for target in own_targets())}:
        return
    known, imports = _module(module)
    node = known.get(name)
    if node is None:
        if name in imports:
            yield from _lineage(*imports[name])
        return
    yield node
    for base in getattr(node, "bases", []):
        if isinstance(base, ast.Name):
            yield from _lineage(module, base.id)


def docstring(target: str) -> str:
    """The docstring of a target, its base class's where it has none of its own."""
    module, _, name = target.rpartition(".")
    for node in _lineage(module, name):
        if text := ast.get_docstring(node):  # type: ignore[arg-type]
            return text
    return ""


def attribute(target: str, name: str) -> str | None:
    """The text a class, or a base of it, gives the class variable `name`."""
    module, _, owner = target.rpartition(".")
    for node in _lineage(module, owner):
        for line in getattr(node, "body", []):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id == name:
                if line.value is not None:
                    return ast.literal_eval(line.value)
    return None


def show_methods(kind: str | None, as_json: bool = False, plot: Path | None = None) -> None:
    """Print the list as tables or JSON, or draw `plot`."""
    if plot is not None:
        from albert_ablate.report.profiles import draw

        if kind or as_json:
            raise ConfigError("--plot draws dropout and norm: it takes neither a group nor --json.")
        for note in draw(plot):
            print(note)
        print(plot)
        return
    options = methods(kind)
    if as_json:
        print(document("methods", {"methods": [asdict(m) for m in options]}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for group in dict.fromkeys(m.kind for m in options):
        columns = ["what it is", "license", "from"] if group == "data" else ["formula", "source"]
        table = Table(
            title=group, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), expand=True
        )
        for title, ratio in zip(
            ["option", *columns, "defaults"], [2, 5, 3, 3, 5] if group == "data" else [2, 7, 4, 4], strict=True
        ):
            table.add_column(title, ratio=ratio, header_style="dim", overflow="fold")
        for m in (m for m in options if m.kind == group):
            source = f"your own: {m.file}" if m.file else ""
            about = [m.formula, m.license or "", m.origin or source] if group == "data" else [m.formula, _cited(m)]
            about[-1] = "; ".join(filter(None, [about[-1], "" if group == "data" else source]))
            table.add_row(*map(Text, [m.option, *about, _written(m.defaults)]))
        console.print(table)
        console.print()


def _cited(m: Method) -> str:
    return "; ".join(f"{s['authors']} {s['year']}" + (f", {s['arxiv']}" if s["arxiv"] else "") for s in m.sources)


def _written(defaults: dict[str, Any]) -> str:
    """As one would write them on the command line."""
    words = (f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in defaults.items())
    return " ".join(w.replace(", ", ",").replace('"', "") for w in words)
