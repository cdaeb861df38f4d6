"""Settings of a session and options of one call, and the checks of the command's arguments."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from albert_ablate.config import nearest
from albert_ablate.referee.sides import Inadmissible
from albert_ablate.stats.sequential import ALPHA


@dataclass(frozen=True)
class Settings:
    """Settings of a session, fixed when it begins."""

    control: str = "fwer"
    alpha: float = ALPHA
    margin: str = "0.5%"
    metric: str = ""
    higher: bool = False
    max_pairs: int = 0  # 0: as many as find one spread at the level, from 12 to 30
    command: str = ""  # of git sides
    evaluator: tuple[str, ...] = ()
    crash_is_outcome: bool = False
    common: tuple[str, ...] = ()
    equal: tuple[str, ...] = ("tokens", "parameters", "flops")

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON, as the ledger stores them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class CallOptions:
    """Folders and limits of one call: nothing that an answer depends on."""

    folder: Path  # of the session
    runs: Path  # of overrides
    repository: Path  # of commands and refs
    limit: float = math.inf  # seconds a run of a command
    budget: float = math.inf  # seconds of this call
    workers: int = 1


def check_name(name: str) -> str:
    """Check the name of a session, which becomes a folder's name; Inadmissible if it is not allowed."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise Inadmissible(f"--session={name} is not allowed: a name has letters, digits, ., _ and -.")
    return name


def read_control(text: str) -> str:
    """Check --control: fwer (any false accept) or fdr (their share)."""
    if text not in ("fwer", "fdr"):
        raise Inadmissible(f"--control={text} is not allowed: it is {nearest(text, ['fwer', 'fdr'])}.")
    return text
