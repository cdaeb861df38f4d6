"""Results of evaluations after training: `evaluations.json` in the run folder. No torch here.

By evaluation: rows (a table), summary (metric -> number), settings, weights (last or best), weights_hash, seconds.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.records.checked import read_checked, write_checked
from albert_ablate.records.json_output import nonfinite_as_text

FILE = "evaluations.json"
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no numbers for them


def read_evaluations(folder: Path, run: str | None = None) -> dict[str, dict[str, Any]]:
    """Read the evaluations of a run folder by name; empty if there are none. run: identity that the file must have.

    Raises ConfigError with one sentence where the file is damaged or belongs to another run."""
    try:
        content = read_checked(folder / FILE, run)
        for entry in content.values():
            missing = {"rows", "summary", "settings", "weights", "weights_hash"} - set(entry)
            if missing:
                raise ValueError(f"{', '.join(sorted(missing))} missing")
        return {
            name: {
                **entry,
                "rows": [_numbers(row) for row in entry["rows"]],
                "summary": _numbers(entry["summary"]),
            }
            for name, entry in content.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / FILE} cannot be read ({error}); remove it to evaluate again.") from None


def write_evaluations(folder: Path, entries: Mapping[str, Mapping], run: str | None = None) -> None:
    """Write the evaluations of a run folder. Numbers that are not finite become the texts NaN, Infinity, -Infinity."""
    write_checked(folder / FILE, nonfinite_as_text(entries), run)


def _numbers(row: Mapping) -> dict[str, Any]:
    return {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
