"""The measures that claims and comparisons take, as a table or as JSON."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from albert_ablate.analysis.registry import MEASURES, Measure
from albert_ablate.config import ConfigError
from albert_ablate.records.json_output import document

OF = {"run": "a run", "initial": "a run before its first step", "grid": "a seed's runs over learning rates",
      "pair": "the two runs of a seed", "exact": "a run, without noise"}  # fmt: skip


def measure_facts(m: Measure) -> dict[str, Any]:
    """What there is to say of a measure: name, text, unit, better, scale (log ratio or difference), of, evaluation."""
    return {
        "name": m.name, "text": "" if m.description == m.name else m.description, "unit": m.unit, "better": m.better,
        "scale": "log ratio" if m.log else "difference", "of": OF[m.kind], "evaluation": m.evaluation or None,
    }  # fmt: skip


def show_measures(word: str | None = None, as_json: bool = False) -> None:
    """Print the measures with `word` in their name or text, all without one."""
    rows = [measure_facts(m) for m in MEASURES.values()]
    rows = [r for r in rows if word is None or word.lower() in f"{r['name']} {r['text']}".lower()]
    if not rows:
        raise ConfigError(f"No measure has {word!r} in its name or text: albert-ablate measures lists them.")
    if as_json:
        print(document("measures", {"measures": rows}))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("measure", "unit", "better", "judged as", "of", "what it is"):
        table.add_column(column, overflow="fold")
    for r in rows:
        needs = f" (needs albert-ablate evaluate RUN {r['evaluation']})" if r["evaluation"] else ""
        table.add_row(r["name"], r["unit"], r["better"], r["scale"], r["of"], f"{r['text']}{needs}".strip())
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
