"""Arms and seeds as a table, from the records alone: no torch."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from albert_ablate.analysis.setting_names import setting_names
from albert_ablate.config import ConfigError, Identity, is_outdated
from albert_ablate.config.dotted import dotted, is_internal
from albert_ablate.records.json_output import document
from albert_ablate.records.keys import Keys
from albert_ablate.records.store import require_runs_folder
from albert_ablate.records.tuning import LEARNING_RATE
from albert_ablate.studies.sparklines import sparkline_of
from albert_ablate.studies.states import is_done, last_line, states
from albert_ablate.studies.sweep_settings import (
    MAX_REFUSALS,
    Sweep,
    of_arm,
    own_overrides,
    run_overrides,
    varied_labels,
)
from albert_ablate.studies.sweepfile import read_sweep
from albert_ablate.training.console import duration, rough_duration

# of states in a terminal; rich leaves colors out where NO_COLOR is set and where nobody watches
COLORS = {"finished": "green", "running": "bold cyan", "diverged": "magenta", "failed": "bold red", "stopped": "yellow"}
SPARKLINE_ARMS = 100  # at most, whose histories are read
COLORS |= {"orphaned": "yellow", "unreadable": "bold red", "pending": "dim"}


def read_states(root: Path, configured: bool = True) -> list[dict[str, Any]]:
    """What the records below `root` say, with each run's folder; see `states`."""
    require_runs_folder(root)
    return states(root, configured)


def arms(
    records: Iterable[Mapping[str, Any]], root: Path, sweep: Sweep | None = None, overrides: Sequence[str] = ()
) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Arm -> seed -> record. Of a sweep file: its runs in its order, those not begun as pending.

    `overrides` are those the sweep was run with, which count over the file's.

    A run is found by its key, below `root`; of several at another learning rate than a file without one would have,
    such as a tuned one, the last one touched counts.
    """
    table: dict[str, dict[int, Mapping[str, Any]]] = {}
    if sweep is None:
        records = list(records)
        named = _names(records)
        for record in records:
            folder = Path(record["folder"])
            table.setdefault(named[folder.parent.name], {})[int(folder.name[4:])] = record
        return dict(sorted(table.items()))
    key_cache = Keys(root, apart=True)
    settings, runs, wanted = _asked(sweep, overrides, key_cache)
    by_key: dict[tuple[str, int], Mapping[str, Any]] = {}  # by the key of the arm and by that of the setting
    current = sorted((r for r in records if not is_outdated(r)), key=lambda r: r.get("updated") or 0)
    for record, keys in zip(current, key_cache.of_records(current), strict=True):
        if keys is not None:
            seed = int(Path(record["folder"]).name[4:])
            by_key[keys.arm, seed] = by_key[keys.setting, seed] = record
    key_cache.save()
    for label, run, keys in zip(varied_labels(sweep, settings), runs, wanted, strict=True):
        # without a rate in the file it may be the tuned one
        key = None if keys is None else keys.setting if LEARNING_RATE in run else keys.arm
        table.setdefault(label, {})[_seed(run)] = by_key.get((key or "", _seed(run))) or {"status": "pending"}
    return table


def _names(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name of the folder of a setting -> what its runs are called: what tells the setting from the others, as in a
    report; where its configuration cannot be read, its label and the folder."""
    rows: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for record in records:
        folder = Path(record["folder"]).parent.name
        label = record.get("label")
        names.setdefault(folder, f"{label} ({folder})" if label else folder)
        if record.get("config") and folder not in rows:
            own = {"setting": folder, "label": label or folder}
            rows[folder] = {**(record.get("choices") or {}), **_nested(record["config"]), **own}
    return names | setting_names([*rows.values()])[1]


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration's groups by their dotted keys."""
    return {key: value for key, value in dotted(config) if "." in key and not is_internal(key)}


def _asked(
    sweep: Sweep, overrides: Sequence[str], key_cache: Keys
) -> tuple[list[dict[str, Any]], list[dict[str, str]], list[Identity | None]]:
    """The settings of a sweep, the overrides and the keys of each. In the place of draws of a random sweep that are
    refused are the next ones, as in `plan_random`."""
    settings = sweep.settings()
    while True:
        runs = [run_overrides(sweep, setting, overrides) for setting in settings]
        wanted = key_cache.of_overrides([of_arm(run) for run in runs])
        if sweep.method != "random" or sweep.run_cap is None:
            return settings, runs, wanted
        allowed = [i for i, keys in enumerate(wanted) if keys is not None]
        if len(allowed) >= sweep.run_cap or len(settings) - max(allowed, default=-1) > MAX_REFUSALS:
            return tuple([several[i] for i in allowed] for several in (settings, runs, wanted))  # type: ignore[return-value]
        settings += [sweep.draw(len(settings) + i) for i in range(sweep.run_cap - len(allowed))]


def _seed(run: Mapping[str, str]) -> int:
    return int(run.get("seed", "seed=0").partition("=")[2])


def cell(record: Mapping[str, Any]) -> str:
    """A run in a few words: its state, and while it trains its progress, speed and time left."""
    status = record["status"]
    if is_done(dict(record)):
        loss = record["summary"].get("val_loss")
        return f"{status} {loss:.4f}" if loss is not None else status
    progress = record.get("progress")
    if not progress or status in ("pending", "unreadable"):
        return status
    step, steps = progress["step"], progress["steps"]
    words = f"{status} {step / steps:.0%}"
    speed, seconds = record["cost"].get("tokens_per_second"), record["cost"].get("seconds")
    if status == "running" and speed and step:
        words += f", {speed:,.0f} tok/s, {duration(seconds / step * (steps - step))} left"
    return words


def show_status(
    root: Path,
    file: Path | None = None,
    watch: bool = False,
    overrides: Sequence[str] = (),
    as_json: bool = False,
    every: float = 2.0,
) -> None:
    """Print the table, the failed runs' errors and a count of states, or all that as JSON; with `watch` again until
    all is done."""
    from rich.console import Console
    from rich.live import Live

    if watch and as_json:
        raise ConfigError("--watch and --json exclude each other: --json prints one document.")
    sweep = None if file is None else read_sweep(file)
    if overrides and sweep is None:
        raise ConfigError(f"{overrides[0]} has no effect without --sweep: overrides say how a sweep was run.")

    overrides = own_overrides(overrides) if sweep else overrides

    def table() -> dict[str, dict[int, Mapping[str, Any]]]:
        return arms(read_states(root), root, sweep, overrides)

    console = Console(highlight=False, width=None if os.isatty(1) else 200)
    if not watch:
        arms_table = table()
        if as_json:
            print(document("status", as_document(root, file, arms_table)))
        else:
            console.print(_picture(arms_table, console))
        if sweep and arms_table and all(r["status"] == "pending" for row in arms_table.values() for r in row.values()):
            print(
                "None of these runs was started: give the overrides that the sweep was run with, if any.",
                file=sys.stderr,
            )
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            arms_table = table()
            live.update(_picture(arms_table, console), refresh=True)
            if all(is_done(dict(r)) for row in arms_table.values() for r in row.values()):
                return
            time.sleep(every)


def as_document(root: Path, file: Path | None, table: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """As `schemas/status.schema.json` has it, without the key `schema`; times in seconds, losses in nats per token."""
    runs = [_described(arm, seed, record) for arm, row in table.items() for seed, record in row.items()]
    counts = {s: sum(r["status"] == s for r in runs) for s in sorted({r["status"] for r in runs})}
    return {"folder": str(root), "sweep": None if file is None else str(file), "counts": counts, "runs": runs}


def _described(arm: str, seed: int, record: Mapping[str, Any]) -> dict[str, Any]:
    progress, cost = record.get("progress") or {}, record.get("cost") or {}
    summary = record.get("summary") or {}
    return {
        "arm": arm,
        "seed": seed,
        "status": record["status"],
        "folder": record.get("folder"),
        "learning_rate": record.get("lr"),
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "seconds": cost.get("seconds"),
        "tokens_per_second": cost.get("tokens_per_second"),
        "val_loss": summary.get("val_loss"),
        "test_loss": summary.get("test_loss"),
        "error": last_line(record["error"]) if record.get("error") else None,
    }


def _picture(table: Mapping[str, Mapping[int, Mapping[str, Any]]], console: Any) -> Any:
    """What `status` prints; on a terminal with room for it with the validation loss of a run of each arm as well."""
    from rich.console import Group
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.text import Text

    records = [record for row in table.values() for record in row.values()]
    if not records:
        return Text("No run has started yet.")
    errors = [
        escape(f"{name} seed={seed}: {last_line(record.get('error'))} ({record.get('folder', '')})")
        for name, row in table.items()
        for seed, record in row.items()
        if record["status"] in ("failed", "unreadable")
    ]
    grid = _grid(table)
    if console.is_terminal and len(table) <= SPARKLINE_ARMS:
        curves = {
            name: next(filter(None, (sparkline_of(row[s]) for s in sorted(row))), "") for name, row in table.items()
        }
        with_curves = _grid(table, curves)
        unlimited = console.options.update(max_width=10_000)
        if any(curves.values()) and Measurement.get(console, unlimited, with_curves).maximum <= console.width:
            grid = with_curves
    counts = sorted(Counter(record["status"] for record in records).items())
    total = Text(", ").join(Text(f"{n} {status}", COLORS.get(status, "")) for status, n in counts)
    left = time_left(records)
    return Group(grid, *errors, Text(f"{len(records)} runs: ") + total + (f"; {left}" if left else ""))


def _grid(table: Mapping[str, Mapping[int, Mapping[str, Any]]], curves: Mapping[str, str] | None = None) -> Any:
    """Arms by seeds; of more than eight seeds the states of all, counted. curves: a sparkline of each arm."""
    from rich.table import Table
    from rich.text import Text

    seeds = sorted({seed for row in table.values() for seed in row})
    wide = len(seeds) <= 8
    grid = Table(box=None, padding=(0, 2, 0, 0))
    grid.add_column("arm")
    for seed in seeds if wide else ["runs"]:
        grid.add_column(f"seed {seed}" if wide else str(seed))
    if curves is not None:
        grid.add_column("validation loss")
    for name, row in table.items():
        if wide:
            cells = [Text(cell(row[s]), COLORS.get(row[s]["status"], "")) if s in row else "" for s in seeds]
        else:
            cells = [_counted(row.values())]
        grid.add_row(Text(name), *cells, *([] if curves is None else [curves[name]]))
    return grid


def time_left(records: Iterable[Mapping[str, Any]]) -> str:
    """About how long until all runs are done, at the speed so far; empty where none is running, or none can tell."""
    done = seconds = todo = running = 0.0
    for record in records:
        share = share_done(record)
        todo += 1 - share
        running += record["status"] == "running"
        if share and (record.get("cost") or {}).get("seconds"):
            done, seconds = done + share, seconds + record["cost"]["seconds"]
    return f"about {rough_duration(todo * seconds / done / running)} left" if running and done else ""


def share_done(record: Mapping[str, Any]) -> float:
    """0 to 1: steps that a run has done of those it is to do; 1 once it has ended."""
    progress = record.get("progress") or {}
    if is_done(dict(record)):
        return 1.0
    return min(1.0, progress["step"] / progress["steps"]) if progress.get("steps") else 0.0


def _counted(records: Iterable[Mapping[str, Any]]) -> str:
    """States of an arm of many seeds: how many of each, and what is not done in full."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record["status"]] = counts.get(record["status"], 0) + 1
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
