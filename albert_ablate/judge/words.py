"""The sentences of a ledger: verdicts, effects, and what is missing until there is a verdict."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from albert_ablate.judge.claims import Part
from albert_ablate.judge.contrast_data import ContrastData
from albert_ablate.stats.sequential import FIRST, MOST_PAIRS
from albert_ablate.stats.verdicts import NULLS, PartResult, Verdict

OPEN = ("open", "undecided")  # verdicts that another pair may change

DECIDED = ("supported", "refuted", "no effect", "mixed", "within tuning slack")

UNDECIDED = ("inconclusive", "undecided")

TEST_WORDS = {
    "skew_corrected": "Judged by the t test and Johnson's modified t, which must agree, from pair 8 on.",
    "skew_bounded": "Judged by the t test, Johnson's modified t and Hall's transformed t with the skew one standard "
    "error farther against the effect, which must all agree, from pair 8 on.",
    "moderated": "Judged by the moderated t, whose spread is partly that of tuning runs, from pair 3 on.",
}

RATIOS = {  # measures of a pair that are ratios: verb, what of, and the words for less and more of it
    "speedup": ("needed", "tokens", "fewer", "more"),
    "speedup_flops": ("needed", "FLOPs", "fewer", "more"),
    "loss_at_equal_flops": ("had", "loss at equal FLOPs", "less", "more"),
}


def sentence(entry: Mapping[str, Any]) -> str:
    """The verdict as a sentence to repeat, with its regime."""
    word = entry["verdict"]
    if word in ("inadmissible", "open"):
        return f"{entry['regime']}: {word}. {entry['reason']}"
    said = []
    for p in entry["parts"]:
        verb = f"beyond the sum of {', '.join(p['singles'])} changed" if p["singles"] else "changed"
        if p["measure"] in RATIOS and math.isfinite(p["mean"]):
            said.append(ratio_words(p))
        elif math.isnan(p["mean"]):
            said.append(f"{p['treatment']} against {p['control']}, {p['measure']}: {effect_words(p)}")
        else:
            said.append(f"{p['treatment']} {verb} {p['measure']} against {p['control']} by {effect_words(p)}")
    out = f"{entry['regime']}, {'; '.join(said)}{rates_words(entry)}: {word}" + (
        f" ({entry['detail']})" if entry.get("detail") else ""
    )
    missing = [(p, p["missing"]) for p in entry["parts"] if p.get("missing")]
    if word in UNDECIDED and missing:
        p, lacking = max(missing, key=lambda x: x[1]["pairs"][0])
        out += f"; {missing_words(p, lacking, entry['N'])}"
    return f"{out}. {entry['registration'][:1].upper()}{entry['registration'][1:]}."


def rates_words(entry: Mapping[str, Any]) -> str:
    """That the arms were not tuned, and their learning rates."""
    if entry["tuned"] is not False or not entry["rates"]:
        return ""
    rates = entry["rates"]
    if len({*rates.values()}) == 1:
        return f", not tuned (learning rate {next(iter(rates.values())):g})"
    return f", not tuned (learning rates {', '.join(f'{arm} {rate:g}' for arm, rate in rates.items())})"


def effect_words(p: Mapping[str, Any]) -> str:
    """-0.4 % (95 % interval -0.9 to +0.1, 8 pairs), or in the measure's unit."""
    numbers = p["percent"] or [p["mean"], p["low"], p["high"]]
    unit = " %" if p["percent"] else " (log ratio)" if p["log"] else f" {p['unit']}"
    if math.isnan(numbers[0]):
        lost = [f"{p[side]} diverged in {p[f'{side}_diverged'][0]}" for side in ("treatment", "control")]
        return f"no finite difference in {p['pairs']} pairs ({', '.join(lost)})"
    if not p["percent"] and p["direction"] == "lower" and not p["singles"]:
        numbers = [-numbers[0], -numbers[2], -numbers[1]]
    mean, low, high = (f"{x + 0.0:+.3g}" for x in numbers)  # +0.0: no minus zero
    if p["rank"] == "not tested":
        return f"{mean}{unit} (exact)"
    interval = f"95 % interval {low} to {high}" if math.isfinite(numbers[1]) else _no_interval(p)
    return f"{mean}{unit} ({interval}, {_pairs(p)})"


def ratio_words(p: Mapping[str, Any]) -> str:
    """pre needed 0.4 % fewer tokens than post (95 % interval 1.2 % more to 2 % fewer, 8 pairs)."""
    verb, noun, less, more = RATIOS[p["measure"]]
    sign = -1 if p["direction"] == "higher" else 1  # of the log ratio treatment over control, for positive = as claimed
    mean, *ends = (math.expm1(min(sign * p[k], 700)) for k in ("mean", "low", "high"))

    def said(change: float) -> str:
        return f"{100 * abs(change):.3g} % {less if change < 0 else more}"

    same = all(x < 0 for x in (mean, *ends)) or all(x > 0 for x in (mean, *ends))
    shown = [f"{100 * abs(x):.3g}" if same else said(x) for x in ends]
    if same:
        shown = [min(shown, key=float), max(shown, key=float)]
    interval = f"95 % interval {shown[0]} to {shown[1]}" if math.isfinite(p["low"]) else _no_interval(p)
    return f"{p['treatment']} {verb} {said(mean)} {noun} than {p['control']} ({interval}, {_pairs(p)})"


def missing_words(p: Mapping[str, Any], lacking: Mapping[str, Any], N: int) -> str:
    """What is still missing until a verdict: pairs of this claim, or of a new one."""
    total, low, high = lacking["pairs"]
    sign = 1 if p["percent"] or p["direction"] == "higher" or p["singles"] else -1
    mean, other = (p["percent"][0] if p["percent"] else sign * p["mean"]), sign * lacking["from"]
    unit = "%" if p["percent"] else "(log ratio)" if p["log"] else p["unit"]
    tell = f"to tell {mean + 0.0:+.3g} from {f'{other:+.3g}' if other else 0} {unit}"
    if total <= N:
        more, least, most = (n - p["pairs"] for n in (total, low, high))
        pairs = "1 more pair" if more == 1 else f"{more:g} more pairs"
        return f"if mean and spread stay as they are, about {pairs} ({least:g} to {most:g}) are missing {tell}"
    if total <= MOST_PAIRS:
        return f"{tell} a new claim on new seeds would need about {total:g} pairs ({low:g} to {high:g})"
    return f"{tell} it would take more than the {MOST_PAIRS} pairs that a claim may have"


def margin_words(p: Mapping[str, Any], result: PartResult, several: bool) -> str:
    """How the verdict on a contrast depends on its margin, at the levels of this ledger; "" where a run diverged."""
    if result.finished < result.pairs or result.pairs < FIRST:
        return ""
    low, high, inside = result.step_low, result.step_high, result.inside_from
    said = []
    if p["null"] == "margin" and low > 0:
        said.append(f"better by any margin up to {_margin(p, low)}")
    if p["null"] == "margin" and high > 0:
        said.append(f"not better by {_margin(p, high)} or more")
    if p["null"] == "-margin" and low < 0:
        said.append(f"not worse by margins from {_margin(p, -low)} on")
    if p["null"] == "0" and (low > 0 or high < 0) and p["margin"] < inside:
        said.append(f"an effect for every margin below {_margin(p, inside)}, and within it from there on")
    elif p["null"] != "-margin" and math.isfinite(inside):
        said.append(f"no effect for margins from {_margin(p, inside)} on")
    if not said:
        return ""
    own = f"that of the claim is {_margin(p, p['margin'])}"
    return f"By margin{f', {_contrast(p)}, ' + p['measure'] if several else ''}: {'; '.join(said)}; {own}."


def looks_words(alpha: float, tests: int, verdict: Verdict, word: str) -> list[str]:
    """p with all looks counted, and the level it needed."""
    inside = word == "no effect" or (word == "refuted" and verdict.p_inside <= verdict.level_inside)
    p, level = (verdict.p_inside, verdict.level_inside) if inside else (verdict.p_effect, verdict.level_effect)
    of = f" ({_ordinal(tests - round(alpha / level) + 1)} of {tests} by Holm)" if tests > 1 else ""
    what = "of an effect inside the margin " if inside else ""
    return [f"p {what}= {p:.2g} with all looks counted; {level:.2g} was needed{of}."]


def step_words(p: Mapping[str, Any], word: str) -> str:
    """Why a 95 % interval that excludes the null value is no verdict: what Holm's step leaves of it."""
    shift = NULLS[p["null"]] * p["margin"]
    if word not in UNDECIDED or p["low"] <= shift <= p["high"] or not p["step"][0] <= shift <= p["step"][1]:
        return ""
    low, high = (_size(p, x) for x in p["step"])
    if p["direction"] == "lower" and not p["singles"]:
        low, high = high, low
    return f"At the significance level that Holm leaves this claim, the interval of {_contrast(p)} is {low} to {high}."


def joined(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def control_words(part: Part) -> str:
    """The control of a contrast in words."""
    return f"the better of {part.control} and {part.other_end}" if part.other_end else part.control


def part_words(part: Part, data: ContrastData) -> str:
    """A contrast in words: pre against post, test_loss."""
    return f"{data.treatment or '|'.join(part.treatment)} against {control_words(part)}, {part.measure}"


def percent_of(part: Mapping[str, Any], value: float) -> float:
    """A log ratio in favor of the treatment as the change of the measure in percent."""
    return 100 * math.expm1(-value if part["direction"] == "lower" else value)


def _no_interval(p: Mapping[str, Any]) -> str:
    return "the intervals of the looks do not overlap" if math.isnan(p["low"]) else "no interval"


def _pairs(p: Mapping[str, Any]) -> str:
    """12 pairs; decided at pair 7, -0.23 % in the 5 pairs after it."""
    out = f"{p['pairs']} pairs" + (f", {p['finished']} of which finished" if p["finished"] < p["pairs"] else "")
    if not p.get("decided_at"):
        return out
    out += f"; decided at pair {p['decided_at']}"
    rest = p["pairs"] - p["decided_at"]
    if not rest:
        return out
    after = "no finite difference" if p["after"] is None else _change(p, p["after"])
    return f"{out}, {after} in the {f'{rest} pairs' if rest > 1 else 'pair'} after it"


def _change(p: Mapping[str, Any], value: float) -> str:
    """A difference in favor of the treatment as the change of the measure, as `effect_words` says it."""
    if p["measure"] in RATIOS:
        verb, noun, less, more = RATIOS[p["measure"]]
        change = math.expm1(min(value if p["direction"] == "lower" else -value, 700))
        return f"{100 * abs(change):.3g} % {less if change < 0 else more}"
    if p["percent"]:
        return f"{percent_of(p, value) + 0.0:+.3g} %"
    sign = -1 if p["direction"] == "lower" and not p["singles"] else 1
    return f"{sign * value + 0.0:+.3g}{' (log ratio)' if p['log'] else ' ' + p['unit']}"


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 10 <= n % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def _margin(p: Mapping[str, Any], value: float) -> str:
    """A margin in the unit that the claim names it in: percent of log ratios."""
    return f"{100 * math.expm1(value):.3g} %" if p["log"] else f"{value:.3g} {p['unit']}"


def _size(p: Mapping[str, Any], value: float) -> str:
    return _change(p, value) if math.isfinite(value) else "no end"


def _contrast(p: Mapping[str, Any]) -> str:
    return f"{p['treatment']} against {p['control']}"
