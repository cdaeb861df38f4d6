"""What claims cost before anything is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from albert_ablate.studies.judging import tuning_runs


def show_price(file: Any, runs: Path, only: Sequence[str] = ()) -> None:
    """Runs, tokens, FLOPs and seconds of each claim in both forms, and of all claims together, shared runs once."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("claim", "form", "runs", "of them tuning", "tokens", "FLOPs", "hours"):
        table.add_column(column, justify="left" if column in ("claim", "form") else "right", overflow="fold")
    from albert_ablate.analysis.judge import Bench

    speed = _speed(Bench(runs))
    every: dict[str, dict[Any, tuple[float, float, float]]] = {"screen": {}, "full": {}}
    for claim in file.claims:
        for form in claim.forms:
            if only and claim.name not in only:
                continue
            jobs = price(file, claim, form)
            every[form] |= jobs
            table.add_row(claim.name, form, *_row(jobs, speed))
    for form, jobs in every.items():
        if jobs and not only:
            table.add_row("all, shared runs once", form, *_row(jobs, speed))
    Console(highlight=False).print(table)
    if not speed:
        print(f"No run below {runs} is done: hours are unknown until one is.")


def price(file: Any, claim: Any, form: str) -> dict[Any, tuple[float, float, float]]:
    """Runs that a claim takes at most: what is trained -> (runs, tokens of each, FLOPs of each)."""
    from albert_ablate.analysis.claims import arms_of, composed, measure_of

    f = claim.forms[form]
    out: dict[Any, tuple[float, float, float]] = {}
    for part in (*claim.contrasts(form), *claim.secondary):
        m = measure_of(part)
        for arm in arms_of(part):
            overrides = file.overrides(claim, part, form, arm)
            tokens = float(composed(overrides)["budget"]["tokens"])
            flops = tokens * _flops_per_token(overrides)
            if m.kind == "grid":
                out |= {(overrides, seed, rate): (1.0, tokens, flops) for seed in claim.seeds[: f.N] for rate in f.grid}
                continue
            out |= {(overrides, seed, part.rate_factor): (1.0, tokens, flops) for seed in claim.seeds[: f.N]}
            if claim.rate_matters(m):
                trunk = tuple(o for o in overrides if not o.startswith("task"))
                out[trunk, "tuning", f.rates] = (tuning_runs(f.rates), tokens, flops)
    return out


def _row(jobs: dict[Any, tuple[float, float, float]], speed: float | None) -> list[str]:
    runs = sum(n for n, _, _ in jobs.values())
    tuning = sum(n for key, (n, _, _) in jobs.items() if key[1] == "tuning")
    tokens, flops = (sum(x[0] * x[i] for x in jobs.values()) for i in (1, 2))
    hours = f"{flops / speed / 3600:,.1f}" if speed else "?"
    return [f"{runs:,.0f}", f"{tuning:,.0f}", f"{tokens:.2g}", f"{flops:.2g}", hours]


_FLOPS: dict[str, float] = {}


def _flops_per_token(overrides: tuple[str, ...]) -> float:
    """Counted once for each model, norm and attention; dropout, optimizer and clipping add none that are counted."""
    import json

    from albert_ablate.analysis.claims import composed
    from albert_ablate.config import check, compose
    from albert_ablate.training.cost import flops_per_token

    cfg = composed(overrides)
    key = json.dumps([cfg[k] for k in ("model", "norm", "norm_type", "attention", "loss")], sort_keys=True)
    if key not in _FLOPS:
        _FLOPS[key] = flops_per_token(check(compose([*overrides])))
    return _FLOPS[key]


def _speed(bench: Any) -> float | None:
    """FLOPs per second of the done runs here, all together."""
    done = [
        r.record["cost"] for r in bench.evidence if r.record["cost"].get("seconds") and r.record["cost"].get("flops")
    ]
    seconds = sum(c["seconds"] for c in done)
    return sum(c["flops"] for c in done) / seconds if seconds else None
