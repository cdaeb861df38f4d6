"""From records to verdicts: tables, statistics, charts. Imports no torch; pandas and scipy only where they are used."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("Runs", "load_runs"):
        from albert_ablate.analysis import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
