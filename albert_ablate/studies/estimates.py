"""How long planned runs will take, from what done runs of their model's size took."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from albert_ablate.studies.planned_runs import Planned
from albert_ablate.studies.states import is_done, read_record, state, states
from albert_ablate.training.console import duration


def estimates(planned: Iterable[Planned], runs: Path) -> dict[Planned, float | None]:
    """Seconds each run will take: as many per token as done runs of its model's size took; None: no such run."""

    def size(cfg: Mapping[str, Any]) -> str:  # a checked configuration, or that of a record
        parts = [cfg["model"], cfg["data"]["batch"], cfg["trainer"]["precision"]]
        return json.dumps(parts, sort_keys=True, default=dict)

    rates: dict[str, list[float]] = {}  # seconds per token
    for record in states(runs) if runs.is_dir() else ():
        if is_done(record) and record["cost"].get("seconds") and record["summary"].get("tokens"):
            rates.setdefault(size(record["config"]), []).append(record["cost"]["seconds"] / record["summary"]["tokens"])
    return {
        p: statistics.median(rates[size(p.cfg)]) * p.cfg.budget.tokens if size(p.cfg) in rates else None
        for p in planned
    }


def say_price(
    planned: Sequence[Planned], runs: Path, workers: int, say: Callable[[str], None]
) -> dict[Planned, float | None]:
    """Say how long the runs that are not done will take; gives the estimate for each run as a whole."""
    times, total, unknown = estimates(planned, runs), 0.0, 0
    for p in planned:
        seconds, record = times[p], read_record(p.folder)
        if is_done(record):
            continue
        unknown += seconds is None
        total += (seconds or 0.0) * _share_left(record)
    if unknown:
        say(f"{unknown} runs have no time estimate: there is no finished run of their model size below {runs}.")
    if total:
        say(f"About {duration(total / workers)} with {workers} workers.")
    return times


def show_plan(planned: Sequence[Planned], runs: Path, workers: int, say: Callable[[str], None]) -> None:
    """A line for each run, with its state, folder and the time it will still take; then the time of all."""
    closing: list[str] = []
    times = say_price(planned, runs, workers, closing.append)
    for p in planned:
        record, seconds = state(p.folder), times[p]
        words = record["status"]
        if not is_done(record) and seconds is not None:
            words += f", about {duration(seconds * _share_left(record))}"
        say(f"{p.name}: {words} ({p.folder})")
    for line in closing:
        say(line)


def _share_left(record: Mapping[str, Any]) -> float:
    progress = record.get("progress") or {"step": 0, "steps": 1}
    return 1 - progress["step"] / progress["steps"]
