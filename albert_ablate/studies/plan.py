"""`albert-ablate plan`: pairs, runs and hours that claims can be expected to take, and the margins they can reach."""

import math
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from albert_ablate.config import ConfigError
from albert_ablate.studies.commands import RUNS

STUDIES = 4000  # simulated, of one effect


def plan(
    claims: Annotated[Path, typer.Argument(help="A claims file, such as sweeps/claims.yaml.", show_default=False)],
    runs: RUNS = Path("runs"),
    form: Annotated[Literal["screen", "full"], typer.Option(help="The claims' small or large form.")] = "screen",
    only: Annotated[list[str] | None, typer.Option(help="Only this claim, as often as wanted.")] = None,
    effect: Annotated[
        list[str] | None,
        typer.Option(help="An effect of interest: 0.5% of log ratios, else in the measure's unit; 1, 2 and 4 margins."),
    ] = None,
    spread: Annotated[
        str | None,
        typer.Option(help="Spread of a pair's difference, as `calibrate` says it: 0.3%; from pairs or tuning runs."),
    ] = None,
) -> None:
    """Say what claims will take before they are run: pairs, runs and hours by effect, and reachable margins."""
    from albert_ablate.judge.claims import read_claims
    from albert_ablate.judge.ledger import refuse_unknown
    from albert_ablate.judge.run_store import RunStore
    from albert_ablate.studies.price import _speed

    file = read_claims(claims)
    refuse_unknown(file, only or ())
    bench = RunStore(runs)
    speed = _speed(bench)
    for claim in file.claims:
        if form in claim.forms and (not only or claim.name in only):
            for line in planned(file, claim, form, bench, speed, effect or (), spread):
                print(line)
    if speed:
        print(f"Hours are of one process at {speed:.2g} FLOPs/s, as the runs below {runs} had.")


def planned(
    file: Any, claim: Any, form: str, bench: Any, speed: float | None, effects: Any, given: str | None
) -> list[str]:
    """Lines about a claim; a contrast whose spread nobody knows says how to get it."""
    from albert_ablate.judge.claims import measure_of
    from albert_ablate.stats.learning_rate import half_width
    from albert_ablate.stats.sequential import ALPHA
    from albert_ablate.studies.price import price

    N, tests = claim.forms[form].N, file.size * len(file.forms)
    jobs = price(file, claim, form, bench)
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
        s, source = _spread(file, claim, part, form, bench, amount(given, m.log) if given else 0.0)
        if not s:
            out.append(f"{name}: its spread is unknown: tune the arms, run 4 pairs, or give --spread from `calibrate`")
            continue
        least = half_width(s, N, 2 * ALPHA)
        can = "can" if least <= part.margin else "cannot"
        out.append(
            f'{name}: spread of a pair {words(s, m)} ({source}); "no effect" {can} be found with the margin of '
            f"{words(part.margin, m)}: the least is about {words(least, m)}"
        )
        wanted = [amount(e, m.log) for e in effects] or [k * part.margin for k in (1, 2, 4)]
        for x in wanted:
            pairs, power = expected(round(abs(x) / s, 2), N, ALPHA)
            holm, holm_power = expected(round(abs(x) / s, 2), N, ALPHA / tests)
            total = pairs * each + tuning
            hours = f", {total * flops / speed / 3600:.2g} h" if speed else ""
            out.append(
                f"    effect of {words(x, m)}: {pairs:.1f} pairs, found in {100 * power:.0f} % of studies; "
                f"{total:.0f} runs{hours}; at the first of {tests} steps of Holm {holm:.1f} pairs, "
                f"{100 * holm_power:.0f} %"
            )
    return out


@cache
def expected(d: float, N: int, level: float) -> tuple[float, float]:
    """Mean pairs and power of a claim alone at `level`, d in spreads of a pair: simulated normal differences."""
    import numpy as np

    from albert_ablate.stats.sequential import FIRST, nominal, p_effect

    x = np.random.default_rng(0).standard_normal((STUDIES, N)) + d
    found = np.stack([p_effect(x[:, :n]) for n in range(FIRST, N + 1)], -1) <= nominal(level, N)
    return float(np.where(found.any(1), found.argmax(1) + FIRST, N).mean()), float(found.any(1).mean())


def _spread(file: Any, claim: Any, part: Any, form: str, bench: Any, given: float) -> tuple[float, str]:
    """Standard deviation of a pair's difference and where it is from; 0 where nobody knows."""
    import numpy as np

    from albert_ablate.judge.contrasts import gather, tuning_variance

    if given:
        return given, "given"
    found = gather(file, claim, part, form, bench)
    d = np.asarray(found.d)[np.isfinite(found.d)] if found.d else np.empty(0)
    if len(d) >= 4 and np.ptp(d) > 0:
        return float(d.std(ddof=1)), f"of {len(d)} pairs that are there"
    variance = tuning_variance(file, claim, part, form, bench)
    return math.sqrt(variance), "of tuning runs"


def amount(text: str, log: bool) -> float:
    """0.5% as a log ratio, or a number in the unit of the measure."""
    found = re.fullmatch(r"([0-9.]+(?:e-?[0-9]+)?)( ?%)?", text.strip())
    try:
        assert found
        value = float(found[1])
        assert value > 0 and bool(found[2]) == log
    except (AssertionError, ValueError):
        wanted = "0.5%, as the measure is judged by log ratios" if log else "a number in the measure's unit, without %"
        raise ConfigError(f"{text} is not allowed: write {wanted}.") from None
    return math.log1p(value / 100) if log else value


def words(x: float, m: Any) -> str:
    return f"{100 * math.expm1(x):.2g} %" if m.log else f"{x:.2g} {m.unit}"
