"""What the arms differ in, all runs, and how the report reads them."""

from collections.abc import Mapping
from typing import Any

from albert_ablate.report.material import Material, counted
from albert_ablate.report.page import Section, Table

SCOPE = "Intervals speak about new seeds on this text, this tokenizer and these sizes; not about new text."


def settings_section(m: Material) -> Section:
    """Section of the report: in what settings the arms differ."""
    section = Section("Configurations")
    if m.settings.shape[1]:
        table = m.settings.rename_axis("arm").reset_index()
        section.tables.append(Table("configurations", table, "What the arms differ in; all else is the same"))
    else:
        section.missing.append("There is one arm only: nothing to compare its configuration with.")
    listed = [
        c
        for c in (
            "name",
            "seed",
            "status",
            "val_loss",
            "train_loss",
            "test_loss",
            "tokens",
            "seconds",
            "divergence",
            "reason",
            "setting",
            "folder",
        )
        if c in m.rows and m.rows[c].notna().any()
    ]
    rows = m.rows[listed].rename(columns={"name": "arm"}).sort_values(["arm", "seed"])
    rows["folder"] = rows["folder"].map(m.place)
    section.tables.append(Table("runs", rows, f"All {counted(len(rows), 'run')}", folded=True))
    return section


METHODS = """\
The unit is the run: differences are paired by seed, in the named order of seeds, without gaps. A claim is looked at
after every pair from the fourth on, with a paired t test at a level that keeps the chance of an error at 5 % over all
looks; Holm keeps it over the family, whose size was named before.

A pair with one diverged run counts as an infinite difference: from the first such pair on the exact signed rank
decides. No effect means that the sequential 90 % interval lies inside the margin, which was named before; inconclusive
means that the pairs do not tell. Means of a claim that stopped early run high.

Refused: bootstrap intervals under 20 runs, standardized effects of stopped claims, a test that cannot reach its level,
arms that differ in data, data order or what the claim holds equal, and a learning rate at the end of its grid.

Curves, bands and heat maps describe; only the ledger judges. Losses are in nats per token, measured without dropout,
unless said otherwise."""


def methods_section(m: Material) -> Section:
    """Section of the report: how numbers and verdicts come about, refused records, unreadable runs."""
    section = Section("Methods and refusals", [SCOPE, *(" ".join(p.split()) for p in METHODS.split("\n\n"))])
    if m.ledger and m.ledger.get("refusals"):
        section.text.append("Refused in this ledger:")
        section.text += [_sentence(r) for r in m.ledger["refusals"]]
    if len(m.unreadable):
        table = m.unreadable[["folder", "reason"]].assign(folder=m.unreadable["folder"].map(m.place))
        section.tables.append(Table("unreadable", table, f"{counted(len(table), 'run')} that cannot be read"))
    return section


def _sentence(refusal: Any) -> str:
    return ": ".join(str(v) for v in refusal.values()) if isinstance(refusal, Mapping) else str(refusal)
