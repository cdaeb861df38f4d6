"""Results of learning-rate tuning, one file per arm: <runs>/tuning/<arm>.json, shared by all studies below `runs`."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.records.checked import read_checked, write_checked
from albert_ablate.records.folder import plain

LEARNING_RATE = "optimizer.lr"
RULE = "moving window"  # by which rates are tuned; files without it had four rates and counted stuck runs as infinite
FIRST_SEED = 1_000_000  # of tuning; those of confirmation count from 0
FIRST_CALIBRATION_SEED = 2_000_000


def role(seed: int) -> str:
    """Role of a run by its seed: confirmation (the only one that is evidence), tuning or calibration."""
    if seed >= FIRST_CALIBRATION_SEED:
        return "calibration"
    return "tuning" if seed >= FIRST_SEED else "confirmation"


def tuning_file(runs: Path, arm: str) -> Path:
    """Path of the tuning result of an arm."""
    return runs / "tuning" / f"{arm}.json"


def read_tuning(runs: Path, arm: str) -> dict[str, Any] | None:
    """Read the tuning result of the arm with this id; None if it was never tuned.

    rate: the learning rate to use. curve: for every rate and budget that was run its losses by seed (None: not finite),
    their mean and how many runs diverged. edge: "low" or "high" where the best rate lies at the end of what was run.
    slack: expected loss above the optimum, in nats (None: unknown). fitted: whether the rate is a parabola's vertex.
    trained: False where every run diverged.
    """
    file = tuning_file(runs, arm)
    try:
        content = read_checked(file, arm)
        return content if float(content["rate"]) > 0 else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise ConfigError(f"{file} cannot be read ({why}): remove it to tune the arm again.") from None


def tuning_tokens(runs: Path) -> int:
    """Total tokens of all tuning runs below `runs`; files that cannot be read are ignored."""
    total = 0
    for file in runs.glob("tuning/*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            total += sum(c["tokens"] * len(c["losses"]) for c in read_checked(file, file.stem)["curve"])
    return total


def write_tuning(runs: Path, arm: str, result: Mapping[str, Any]) -> None:
    """Write the tuning result of an arm, atomically."""
    file = tuning_file(runs, arm)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{arm}.{os.getpid()}")  # of two commands that tune one arm both come to the same
    write_checked(scratch, plain(result), arm)
    os.replace(scratch, file)
