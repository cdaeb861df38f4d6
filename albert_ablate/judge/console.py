"""The ledger on a terminal."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from albert_ablate.judge.words import RATIOS, effect_words, ratio_words

COLORS = {
    "supported": "green", "refuted": "red", "no effect": "blue", "mixed": "yellow", "inadmissible": "magenta",
    "inconclusive": "yellow", "within tuning slack": "yellow",
}  # fmt: skip
GAPS = ("gap", "gap_at_best", "gap_at_equal_training_loss")  # loss on validation minus training text
CAVEAT = (
    "Intervals speak about new seeds on this text, this tokenizer and these sizes; not about new text. "
    "Means of claims that stopped early run high. Where differences have a skew of 1 or 2, 5 % of error are 8 or 16 %, "
    "in a family of 15 claims 15 or 52 % (test: skew_corrected in the claim keeps 5 % of one claim, skew_bounded of a "
    "family)."
)


def show_ledger(ledger: Mapping[str, Any], only: Sequence[str] = ()) -> None:
    """Print the ledger at the terminal's width, of `only` these claims where it names any."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    width = max(40, console.width)
    for number, entry in enumerate(ledger["claims"], 1):
        if only and entry["name"] not in only:
            continue
        word = ": ".join(filter(None, [entry["verdict"].upper(), entry.get("detail", "")]))
        head = f"{number:>2} {entry['name']}"
        gap = " " * max(1, width - len(head) - len(word))
        console.print(Text.assemble((head, "bold"), gap, (word, f"bold {COLORS.get(entry['verdict'], 'default')}")))
        for line in textwrap.wrap(entry["statement"], width, initial_indent="   ", subsequent_indent="   "):
            console.print(Text(line, style="italic"))
        for line in lines(entry, width):
            console.print(Text(line))
        console.print()
    for text in ledger.get("unreadable", ()):
        console.print(Text(textwrap.fill(f"Not counted: {text}", width), style="yellow"))
    for text in ledger.get("gone", ()):
        console.print(Text(textwrap.fill(text, width), style="yellow"))
    family = ledger["family"]
    several = len(family["forms"]) > 1
    shared = f", shared by its forms {' and '.join(family['forms'])}: {family['tests']} tests" if several else ""
    closing = f"{ledger['form']} form; family of {family['size']} at {family['alpha']:g} (Holm){shared}. {CAVEAT}"
    console.print(Text(textwrap.fill(closing, width), style="dim"))


def lines(entry: Mapping[str, Any], width: int) -> list[str]:
    """A claim's lines below its headline."""
    out: list[str] = []

    def say(text: str, indent: str = "   ", more: str = "   ") -> None:
        out.extend(textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False))

    say(entry["sentence"][:1].upper() + entry["sentence"][1:])
    for kind, parts in (("", entry["parts"]), ("secondary: ", entry["secondary"])):
        for p in parts:
            if p["pairs"] and (kind or len(_extras(p)) > 0):
                said = f"{p['treatment']} / {p['control']}, {p['measure']}"
                ratio = p["measure"] in RATIOS and math.isfinite(p["mean"])
                effect = f": {ratio_words(p) if ratio else effect_words(p)}" if kind else ""
                say(f"{kind}{said}{effect}" + "".join(f"; {x}" for x in _extras(p)), "   - ", "     ")
    if entry["edited"]:
        say(f"Not pre-registered: {entry['registration']}.", "   ! ", "     ")
    if entry["verdict"] not in ("inadmissible", "open"):
        say(entry["reason"], "   . ", "     ")
    for note in entry["notes"]:
        if note != entry["reason"]:
            say(note, "   . ", "     ")
    cost = entry["cost"]
    if cost["runs"]:
        of = f" ({cost['tuning_runs']} of them tuning)" if cost["tuning_runs"] else ""
        say(f"So far {cost['runs']} runs{of}, {cost['tokens']:,} tokens, {cost['seconds']:,.0f} s.")
    return out


def _negative(p: Mapping[str, Any]) -> bool:
    return min(p["treatment_mean"], p["control_mean"]) < 0


def _extras(p: Mapping[str, Any]) -> list[str]:
    """Units, pairing, divergence and reach of a contrast."""
    out = []
    if math.isfinite(p["treatment_mean"]) and math.isfinite(p["control_mean"]):
        below = ", minus where validation is below training" if p["measure"] in GAPS and _negative(p) else ""
        out.append(f"{p['treatment_mean']:.4g} against {p['control_mean']:.4g} {p['unit']}{below}")
    if p["correlation"]:
        r, low, high = p["correlation"]
        out.append(f"pairs correlate {r:.2f} ({low:.2f} to {high:.2f})")
    if p.get("skew"):
        out.append("skew of the differences {:+.1f} (standard error {:.1f})".format(*p["skew"]))
    for side in ("treatment", "control"):
        k, n, low, high = p[f"{side}_diverged"]
        if k:
            out.append(f"{side} diverged {k} of {n} ({100 * low:.0f} to {100 * high:.0f} %)")
    if p["rank"] not in ("cannot say yet", "not tested"):
        out.append(f"signed rank {p['rank']}")
    return out
