"""What claims cost before anything is trained."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from albert_ablate.judge.claims import ClaimsFile, ClaimText, arms_of, measure_of
from albert_ablate.judge.ledger import refuse_unknown
from albert_ablate.judge.run_store import RunStore
from albert_ablate.stats.learning_rate import tuning_price
from albert_ablate.stats.sequential import ALPHA
from albert_ablate.studies.spreads import expected, spread_of

Price = tuple[float, float, float, float]  # runs at most, tokens of each, FLOPs of each, runs expected


def show_price(file: ClaimsFile, runs: Path, only: Sequence[str] = ()) -> None:
    """Runs, tokens, FLOPs and hours of each claim in both forms, and of all claims together, shared runs once.

    At most: all of a claim's pairs, and every window of tuning moved as often as it may; and the tuning to be expected.
    Below it what can be expected at three effects of interest.
    """
    refuse_unknown(file, only)
    print(f"{'':<10}{'at most':>8}{'of them tuning':>18}")
    print(f"{'':<10}{'runs':>8}{'expected':>9}{'at most':>9}{'tokens':>10}{'FLOPs':>10}{'hours':>10}")

    store = RunStore(runs)
    speed = speed_of(store)
    all_jobs: dict[str, dict[Any, Price]] = {"screen": {}, "full": {}}
    outlooks: dict[str, list[Outlook]] = {"screen": [], "full": []}
    for claim in file.claims:
        if only and claim.name not in only:
            continue
        print(claim.name)
        for form in claim.forms:
            jobs = price(file, claim, form, store)
            all_jobs[form] |= jobs
            print(_row(form, jobs, speed))
            outlook = Outlook(file, claim, form, store, jobs)
            print(outlook.line(speed))
            outlooks[form].append(outlook)
    store.keys.save()
    print("all of these (shared runs counted once)")
    for form, jobs in all_jobs.items():
        if jobs:
            print(_row(form, jobs, speed))
            print(_all_line(outlooks[form], speed))
    print(
        "Expected: mean number of pairs until an effect of this size is found, in spreads of a pair's difference, or "
        "in margins where the spread is known; at the strictest step of Holm's correction."
    )
    if speed:
        print(f"Hours assume one process at {speed:.2g} FLOPs/s, as the runs below {runs} had.")
    else:
        print(f"No run below {runs} is done: hours are unknown until one is.")


def price(file: ClaimsFile, claim: ClaimText, form: str, store: RunStore) -> dict[Any, Price]:
    """Runs that a claim takes: what is trained -> its price.

    Of its primary contrasts, as `judge --run` trains them. Secondary ones are shown where their runs are there.
    """
    f = claim.forms[form]
    out: dict[Any, Price] = {}
    for part in claim.contrasts(form):
        m = measure_of(part)
        for arm in arms_of(part):
            overrides = file.overrides(claim, part, form, arm)
            cfg = store.arm(overrides).cfg
            tokens = float(cfg["budget"]["tokens"])
            flops = tokens * _flops_per_token(cfg)
            if m.kind == "grid":
                out |= {
                    (overrides, seed, rate): (1.0, tokens, flops, 1.0) for seed in claim.seeds[: f.N] for rate in f.grid
                }
                continue
            out |= {(overrides, seed, part.rate_factor): (1.0, tokens, flops, 1.0) for seed in claim.seeds[: f.N]}
            if claim.rate_matters(m):
                trunk = tuple(o for o in overrides if not o.startswith("task"))
                tuning = tuning_price(f.rates)
                out[trunk, "tuning", f.rates] = (tuning.worst, tokens, flops, tuning.expected)
    return out


class Outlook:
    """What a claim can be expected to take at three effects of interest."""

    def __init__(self, file: ClaimsFile, claim: ClaimText, form: str, store: RunStore, jobs: Mapping[Any, Price]):
        N, parts = claim.forms[form].N, [p for p in claim.contrasts(form) if measure_of(p).kind != "exact"]
        self.jobs, self.N = jobs, N
        spreads = [spread_of(file, claim, p, form, store)[0] for p in parts]
        known = bool(parts) and all(spreads) and all(p.margin for p in parts)
        self.factors, self.unit = ((1, 2, 4), "margins") if known else ((1, 2, 3), "spreads")
        level = ALPHA / (file.size * len({*file.forms, form}))
        self.pairs = [1.0] * len(self.factors)  # compared exactly
        for i, k in enumerate(self.factors if parts else ()):
            effects = [round(k * p.margin / s, 1) if known else float(k) for p, s in zip(parts, spreads, strict=True)]
            self.pairs[i] = expected(tuple(effects), N, level, claim.needs)[0]

    def runs(self, i: int) -> dict[Any, Price]:
        """Runs expected at the i-th effect: those of a pair as a share of all, and tuning."""
        share = self.pairs[i] / self.N
        return {key: (x[3] if key[1] == "tuning" else x[0] * share, x[1], x[2], x[3]) for key, x in self.jobs.items()}

    def line(self, speed: float | None) -> str:
        """What to expect, as a line of output; speed in FLOPs per second, None: no hours."""
        pairs = " / ".join(f"{n:.1f}" for n in self.pairs)
        factors = " / ".join(map(str, self.factors))
        return f"    expected at {factors} {self.unit}: {pairs} pairs, {_totals([*map(self.runs, range(3))], speed)}"


def _all_line(outlooks: Sequence[Outlook], speed: float | None) -> str:
    """What all claims can be expected to take, an arm as long as the longest of its claims."""
    totals = []
    for i in range(3):
        together: dict[Any, Price] = {}
        for outlook in outlooks:
            for key, x in outlook.runs(i).items():
                together[key] = max(x, together.get(key, x))
        totals.append(together)
    return f"    expected at the first / second / third of these effects: {_totals(totals, speed)}"


def _totals(several: Sequence[Mapping[Any, Price]], speed: float | None) -> str:
    runs = " / ".join(f"{sum(x[0] for x in jobs.values()):,.0f}" for jobs in several)
    if not speed:
        return f"{runs} runs"
    hours = [sum(x[0] * x[2] for x in jobs.values()) / speed / 3600 for jobs in several]
    return f"{runs} runs, {' / '.join(f'{h:,.0f}' if h >= 10 else f'{h:.2g}' for h in hours)} hours"


def _row(form: str, jobs: dict[Any, Price], speed: float | None) -> str:
    runs = sum(n for n, *_ in jobs.values())
    tuning = [p for key, p in jobs.items() if key[1] == "tuning"]
    expected, worst = (sum(p[i] for p in tuning) for i in (3, 0))
    tokens, flops = (sum(x[0] * x[i] for x in jobs.values()) for i in (1, 2))
    hours = f"{flops / speed / 3600:,.1f}" if speed else "?"
    return f"  {form:<8}{runs:>8,.0f}{expected:>9,.0f}{worst:>9,.0f}{tokens:>10.2g}{flops:>10.2g}{hours:>10}"


_FLOPS: dict[str, float] = {}


def _flops_per_token(cfg: Mapping[str, Any]) -> float:
    """Counted once for each model, norm and attention; dropout, optimizer and clipping add none that are counted."""
    from albert_ablate.training.cost import flops_per_token  # loads torch

    key = json.dumps([cfg[k] for k in ("model", "norm", "norm_type", "attention", "loss")], sort_keys=True)
    if key not in _FLOPS:
        _FLOPS[key] = flops_per_token(cfg)
    return _FLOPS[key]


def speed_of(store: RunStore) -> float | None:
    """FLOPs per second of the done runs here: the median over all their FLOPs, which short runs hardly move."""
    costs = [r.record["cost"] for r in store.evidence]
    done = sorted((c["flops"] / c["seconds"], c["flops"]) for c in costs if c.get("seconds") and c.get("flops"))
    below, total = 0.0, sum(flops for _, flops in done)
    for speed, flops in done:
        below += flops
        if below >= total / 2:
            return speed
    return None
