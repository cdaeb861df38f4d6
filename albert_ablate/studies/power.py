"""`albert-ablate plan`: pairs, runs and hours that claims can be expected to take, and the margins they can reach."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from albert_ablate.analysis.registry import Measure
from albert_ablate.config import ConfigError
from albert_ablate.judge.claims import ClaimsFile, ClaimText, measure_of
from albert_ablate.judge.ledger import refuse_unknown
from albert_ablate.judge.run_store import RunStore
from albert_ablate.stats.learning_rate import half_width
from albert_ablate.stats.sequential import ALPHA
from albert_ablate.studies.price import price, speed_of
from albert_ablate.studies.spreads import expected, spread_of


def show_plan(
    file: ClaimsFile,
    runs: Path,
    form: str,
    only: Sequence[str] = (),
    effects: Sequence[str] = (),
    spread: str | None = None,
) -> None:
    """Print for each claim what it can be expected to take. effects, spread: as `albert-ablate plan --help` says."""
    refuse_unknown(file, only)
    store = RunStore(runs)
    speed = speed_of(store)
    for claim in file.claims:
        if form in claim.forms and (not only or claim.name in only):
            for line in plan_lines(file, claim, form, store, speed, effects, spread):
                print(line)
    if speed:
        print(f"Hours assume one process at {speed:.2g} FLOPs/s, as the runs below {runs} had.")


def plan_lines(
    file: ClaimsFile,
    claim: ClaimText,
    form: str,
    store: RunStore,
    speed: float | None,
    effects: Sequence[str],
    spread: str | None,
) -> list[str]:
    """Lines about a claim; a contrast whose spread nobody knows says how to get it."""
    N, tests = claim.forms[form].N, file.size * len({*file.forms, form})
    jobs = price(file, claim, form, store)
    tuning = sum(x[3] for key, x in jobs.items() if key[1] == "tuning")
    each = sum(x[0] for key, x in jobs.items() if key[1] != "tuning") / N
    flops = sum(x[2] for x in jobs.values()) / len(jobs)
    out = [f"{claim.name} ({form}, at most {N} pairs of {each:g} runs, {tuning:.0f} runs of tuning)"]
    for part in claim.contrasts(form):
        m = measure_of(part)
        name = f"  {'|'.join(part.treatment)} against {part.control}, {m.name}"
        if m.kind == "exact":
            out.append(f"{name}: compared exactly, without a test")
            continue
        s, source = spread_of(file, claim, part, form, store, amount(spread, m.log) if spread else 0.0)
        if not s:
            out.append(f"{name}: its spread is unknown: tune or calibrate the arms, run 4 pairs, or give --spread")
            continue
        least = half_width(s, N, 2 * ALPHA)
        can = "can" if least <= part.margin else "cannot"
        out.append(
            f'{name}: spread of a pair {effect_text(s, m)} ({source}); "no effect" {can} be found with the margin of '
            f"{effect_text(part.margin, m)}: the least is about {effect_text(least, m)}"
        )
        wanted = [amount(e, m.log) for e in effects] or [k * part.margin for k in (1, 2, 4)]
        for x in wanted:
            pairs, power = expected((round(abs(x) / s, 2),), N, ALPHA)
            holm, holm_power = expected((round(abs(x) / s, 2),), N, ALPHA / tests)
            total = pairs * each + tuning
            hours = f", {total * flops / speed / 3600:.2g} h" if speed else ""
            out.append(
                f"    effect of {effect_text(x, m)}: {pairs:.1f} pairs, found in {100 * power:.0f} % of studies; "
                f"{total:.0f} runs{hours}; at the first of {tests} steps of Holm {holm:.1f} pairs, "
                f"{100 * holm_power:.0f} %"
            )
    return out


def amount(text: str, log: bool) -> float:
    """0.5% as a log ratio, or a number in the unit of the measure."""
    match = re.fullmatch(r"([0-9.]+(?:e-?[0-9]+)?)( ?%)?", text.strip())
    try:
        assert match
        value = float(match[1])
        assert value > 0 and bool(match[2]) == log
    except (AssertionError, ValueError):
        wanted = "0.5%, as the measure is judged by log ratios" if log else "a number in the measure's unit, without %"
        raise ConfigError(f"{text} is not allowed: write {wanted}.") from None
    return math.log1p(value / 100) if log else value


def effect_text(x: float, m: Measure) -> str:
    """An effect in percent of log ratios, or in the measure's unit."""
    return f"{100 * math.expm1(x):.2g} %" if m.log else f"{x:.2g} {m.unit}"
