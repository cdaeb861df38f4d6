"""Arms and seeds as a table, from the records alone: no torch."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError, is_outdated
from albert_ablate.studies.states import is_done, last_line, states
from albert_ablate.studies.sweepfile import REFUSALS, Sweep, own_overrides, read_sweep, varied_labels
from albert_ablate.training.console import duration


def read_states(root: Path, configured: bool = True) -> list[dict[str, Any]]:
    """What the records below `root` say, with each run's folder; see `states`."""
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder of runs.")
    return states(root, configured)


def arms(
    records: Iterable[Mapping[str, Any]], sweep: Sweep | None = None, overrides: Sequence[str] = ()
) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Arm -> seed -> record. Of a sweep file: its runs in its order, those not begun as pending.

    `overrides` are those the sweep was run with, which count over the file's.

    A run belongs to a sweep whose every key it has at the sweep's value; of several the last one touched counts.
    """
    table: dict[str, dict[int, Mapping[str, Any]]] = {}
    if sweep is None:
        named: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}  # name -> setting -> seed
        for record in records:
            folder, lr = Path(record["folder"]), record.get("lr")
            name = record.get("name") or (record.get("label") or "?") + (f" lr={lr:g}" if lr is not None else "")
            named.setdefault(str(name), {}).setdefault(folder.parent.name, {})[int(folder.name[4:])] = record
        for name, alike in named.items():  # a hash only where a name has several settings
            for folder_name, seeds in alike.items():
                table[name if len(alike) == 1 else f"{name} ({folder_name})"] = seeds
        return table
    settings = sweep.settings()
    over = dict(o.lstrip("+").split("=", 1) for o in overrides if not o.lstrip("+").startswith("hydra"))
    fixed = dict(o.split("=", 1) for o in sweep.fixed)
    if sweep.method == "random":
        # in the place of draws that were refused are later ones, which have records
        settings += [sweep.draw(len(settings) + i) for i in range(REFUSALS)]
    asked = [sweep.folded(fixed | s | over) for s in settings]
    keys = list(dict.fromkeys(key for setting in asked for key in setting))
    found: dict[tuple, Mapping[str, Any]] = {}
    for record in sorted((r for r in records if not is_outdated(r)), key=lambda r: r.get("updated") or 0):
        found[tuple(_same(_value(record, key)) for key in keys)] = record
    place = [found.get(tuple(_same(setting.get(key)) for key in keys)) for setting in asked]
    shown = _drawn(place, sweep.run_cap or 0) if sweep.method == "random" else range(len(asked))
    labels = [*varied_labels(sweep, settings)]
    for i in shown:
        setting, label, record = asked[i], labels[i], place[i] or {"status": "pending"}
        table.setdefault(label, {})[int(setting.get("seed", 0))] = record
    return table


def _drawn(records: Sequence[Mapping[str, Any] | None], number: int) -> list[int]:
    """Which draws of a random sweep are its runs: those that have a record, and of the others the first."""
    begun = [i for i, record in enumerate(records) if record is not None][:number]
    return sorted(begun + [i for i, record in enumerate(records) if record is None][: number - len(begun)])


def _value(record: Mapping[str, Any], key: str) -> Any:
    """What a record's configuration has at a sweep's key."""
    choices, tree = record.get("choices") or {}, record.get("config") or {}
    if key in choices:
        return choices[key]
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None  # type: ignore[assignment]
    return tree


def _same(value: Any) -> Any:
    """Equal for values that are written differently and mean the same: 1, 1.0 and "1"; [a] and "[a]"; true."""
    import yaml

    if isinstance(value, str) and (value[:1] in "['\"" or value in ("true", "false", "True", "False", "null")):
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if isinstance(value, list | tuple):
        return tuple(map(_same, value))
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


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
    root: Path, file: Path | None = None, watch: bool = False, overrides: Sequence[str] = (), every: float = 2.0
) -> None:
    """Print the table, the failed runs' errors and a count of states; with `watch` again until all is done."""
    from rich.console import Console
    from rich.live import Live

    sweep = None if file is None else read_sweep(file)
    if overrides and sweep is None:
        raise ConfigError(f"{overrides[0]} would do nothing: it says how a sweep was run, give its file with --sweep.")

    overrides = own_overrides(overrides) if sweep else overrides

    def table() -> dict[str, dict[int, Mapping[str, Any]]]:
        return arms(read_states(root, sweep is not None), sweep, overrides)

    console = Console(highlight=False, width=None if os.isatty(1) else 200)
    if not watch:
        console.print(_picture(table()))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = table()
            live.update(_picture(found), refresh=True)
            if all(is_done(dict(r)) for row in found.values() for r in row.values()):
                return
            time.sleep(every)


def _picture(table: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Any:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    seeds = sorted({seed for row in table.values() for seed in row})
    wide = len(seeds) <= 8
    grid = Table(box=None, padding=(0, 2, 0, 0))
    grid.add_column("arm")
    for seed in seeds if wide else ["runs"]:
        grid.add_column(f"seed {seed}" if wide else str(seed))
    counts: dict[str, int] = {}
    errors = []
    for name, row in table.items():
        for seed, record in row.items():
            counts[record["status"]] = counts.get(record["status"], 0) + 1
            if record["status"] in ("failed", "unreadable"):
                where = record.get("folder", "")
                errors.append(escape(f"{name} seed={seed}: {last_line(record.get('error'))} ({where})"))
        cells = [escape(cell(row[s])) if s in row else "" for s in seeds] if wide else [_counted(row.values())]
        grid.add_row(escape(name), *cells)
    total = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    return Group(grid, *errors, f"{sum(counts.values())} runs: {total or 'none'}")


def _counted(records: Iterable[Mapping[str, Any]]) -> str:
    """States of an arm of many seeds: how many of each, and what is not done in full."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record["status"]] = counts.get(record["status"], 0) + 1
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
