"""Draw which package imports which, read off the source: `python docs/packages.py` writes it into architecture.md.

An arrow goes from a package to one that it imports, in functions too. Arrows that follow from others (A to C where
A to B and B to C are drawn) are left out.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"


def imports() -> dict[str, set[str]]:
    """Package or module directly below albert_ablate/ -> those that it imports."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "albert_ablate").rglob("*.py")):
        own = file.relative_to(ROOT / "albert_ablate").with_suffix("").parts[0]
        if own.startswith("__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "albert_ablate":
                names = [node.module] if "." in node.module else [f"albert_ablate.{a.name}" for a in node.names]
                found.setdefault(own, set()).update({n.split(".")[1] for n in names} - {own})
    known = {p.stem for p in (ROOT / "albert_ablate").iterdir()}
    return {own: {o for o in others if o in known} for own, others in found.items()}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that a package imports, directly or by way of others."""
    seen: set[str] = set()
    waiting = [*graph.get(start, ())]
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            waiting += graph.get(node, ())
    return seen


def diagram() -> str:
    """The imports as a Mermaid graph."""
    graph = imports()
    lines = ["```mermaid", "graph TD"]
    for own in sorted(graph):
        implied = set().union(*(reachable(graph, other) for other in graph[own]), set())
        lines += [f"    {own} --> {other}" for other in sorted(graph[own] - implied)]
    return "\n".join([*lines, "```"])


if __name__ == "__main__":
    PAGE.write_text(re.sub(r"```mermaid\n.*?```", lambda m: diagram(), PAGE.read_text(), flags=re.DOTALL))
