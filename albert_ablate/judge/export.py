"""The ledger as a table for a paper or a spreadsheet, with a paragraph on the method filled in with its numbers."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from albert_ablate.judge.words import TEST_WORDS, effect_words
from albert_ablate.stats.sequential import FIRST, nominal

COLUMNS = (
    "claim",
    "verdict",
    "contrast",
    "measure",
    "change (95 % interval)",
    "pairs",
    "p",
    "adjusted p",
    "registered",
)
METHOD = (
    "{claims} judged from pairs of runs of one seed by a group-sequential paired t test at every pair from pair "
    "{first} on, to at most {N} pairs, with Pocock's constant boundary (Pocock 1977; nominal two-sided level {level} "
    "for 5 % with N = {most}). Once a run diverged, the smaller p of the exact signed-rank test (Wilcoxon 1945) and "
    "Fisher's exact test on the diverged runs (Fisher 1922) was used at the same level. The family-wise error over "
    '{tests} named tests was kept at {alpha} by Holm\'s step-down (Holm 1979). "No effect" means that two one-sided '
    "tests (Schuirmann 1987) found the difference inside the margin named before. Intervals are what the repeated 95 % "
    "intervals of all looks have in common (Jennison and Turnbull 2000). {tuned}{others}In all {runs} runs, {tuning} "
    "of them for tuning; runs that claims share count in each."
)
TUNED = (
    "The learning rate of each arm was tuned on three seeds of their own by the vertex of a parabola through the best "
    "rate and its neighbors. "
)
ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


def exported(ledger: Mapping[str, Any], form: str, only: Sequence[str] = ()) -> str:
    """The claims, or `only` some of them, as `latex`, `md` or `csv`; of csv a row has every number unrounded."""
    entries = [e for e in ledger["claims"] if not only or e["name"] in only]
    if form == "csv":
        return _csv(ledger, entries)
    rows = [_cells(e, p, i, adjusted(ledger)[e["name"]]) for e in entries for i, p in enumerate(e["parts"])]
    write = _latex if form == "latex" else _markdown
    return write(rows, _method(ledger, entries))


def adjusted(ledger: Mapping[str, Any]) -> dict[str, float]:
    """Holm's adjusted p of an effect by claim: the largest of p (m - i) so far, i claims with a smaller p before it."""
    p = {e["name"]: float(e["p_effect"]) for e in ledger["claims"]}
    tests, so_far, out = ledger["family"].get("tests", ledger["family"]["size"]), 0.0, {}
    for i, name in enumerate(sorted(p, key=lambda n: p[n])):
        so_far = max(so_far, min(1.0, p[name] * (tests - i)))
        out[name] = so_far
    return out


def _cells(entry: Mapping[str, Any], p: Mapping[str, Any], part: int, adjusted_p: float) -> list[str]:
    first = part == 0
    effect = effect_words(p).replace("95 % interval ", "")
    effect = effect.partition(f", {p['pairs']} pairs")[0] + ")" if f", {p['pairs']} pairs" in effect else effect
    word = f"{entry['verdict']} ({entry['detail']})" if entry.get("detail") else entry["verdict"]
    said = [entry["statement"], word] if first else ["", ""]
    tested = p["looks"] and entry["verdict"] != "inadmissible"
    figures = [f"{entry['p_effect']:.2g}", f"{adjusted_p:.2g}"] if first and tested else ["", ""]
    contrast = [f"{p['treatment']} against {p['control']}", p["measure"], effect if p["pairs"] else "", str(p["pairs"])]
    return [*said, *contrast, *figures, entry["registration"] if first else ""]


def _method(ledger: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    N = sorted({e["N"] for e in entries})
    cost = [e["cost"] for e in entries]
    tests = {p.get("test", "t") for e in entries for p in e["parts"]} - {"t"}
    family = ledger["family"]
    return METHOD.format(
        claims=f"{len(entries)} claims were" if len(entries) != 1 else "One claim was",
        first=FIRST,
        N=" or ".join(map(str, N)),
        level=f"{nominal(0.05, N[-1]):.3g}",
        most=N[-1],
        tests=family.get("tests", family["size"]),
        word="test" if family.get("tests", family["size"]) == 1 else "tests",
        alpha=f"{100 * family['alpha']:g} %",
        tuned=TUNED if any(c["tuning_runs"] for c in cost) else "",
        others="".join(f"{TEST_WORDS[t]} " for t in sorted(tests)),
        runs=sum(c["runs"] for c in cost),
        tuning=sum(c["tuning_runs"] for c in cost),
    )


def _markdown(rows: Sequence[Sequence[str]], method: str) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table}\n\n{method}\n"


def _latex(rows: Sequence[Sequence[str]], method: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escaped(c) for c in cells) + r" \\"

    body = "\n".join(line(r) for r in rows)
    columns = "p{4cm}lp{3cm}lp{3.5cm}rrrp{3cm}"
    return (
        f"% needs \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(COLUMNS)}\n\\midrule\n"
        f"{body}\n\\bottomrule\n\\end{{tabular}}\n\n{_escaped(method)}\n"
    )


def _escaped(text: str) -> str:
    return "".join(ESCAPES.get(c, c) for c in text)


def _csv(ledger: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    of_claim = ("name", "statement", "verdict", "detail", "registration", "N", "p_effect", "p_inside", "level_effect",
                "level_inside")  # fmt: skip
    of_part = ("treatment", "control", "measure", "unit", "direction", "margin", "null", "test", "pairs", "mean", "low",
               "high")  # fmt: skip
    out, holm = io.StringIO(), adjusted(ledger)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*of_claim, "p_adjusted", "part", *of_part, "seeds", "differences"])
    for e in entries:
        for i, p in enumerate(e["parts"], 1):
            numbers = (" ".join(map(str, p["seeds"])), " ".join("nan" if math.isnan(d) else repr(d) for d in p["d"]))
            writer.writerow([*(e[k] for k in of_claim), holm[e["name"]], i, *(p[k] for k in of_part), *numbers])
    return out.getvalue()
