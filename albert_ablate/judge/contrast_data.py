"""What the records say about one contrast: its paired differences, or why there are none yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from albert_ablate.analysis.registry import Evidence


@dataclass(frozen=True)
class Job:
    """A run that a contrast still lacks; rate None: its arm has to be tuned first."""

    arm: str
    overrides: tuple[str, ...]
    rate: float | None
    seed: int
    evaluation: str = ""


@dataclass
class ContrastData:
    """What the records say about one contrast."""

    differences: list[float] = field(default_factory=list)  # a pair each, positive: as the claim says
    seeds: list[int] = field(default_factory=list)
    treatment: str = ""
    values: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    diverged: tuple[list[bool], list[bool]] = field(default_factory=lambda: ([], []))
    refusal: str = ""
    pending_reason: str = ""  # why the next pair is not there yet
    mixed_reason: str = ""
    slack: float = 0.0  # bound on the tuning slack of the arms together; nan: unknown
    prior: float = 0.0  # variance of the paired differences of tuning runs, for the moderated t; 0: there is none
    untuned: bool = False  # an arm is to be tuned, or tuned further, which `--run` does
    notes: list[str] = field(default_factory=list)
    used: dict[str, Evidence] = field(default_factory=dict)
    trained: dict[str, Job] = field(default_factory=dict)  # by place: what trained a run that is used
    jobs: list[Job] = field(default_factory=list)


def finite_mean(values: Sequence[float]) -> float:
    """The mean of the values that are finite; nan where none is."""
    fine = [v for v in values if math.isfinite(v)]
    return float(np.mean(fine)) if fine else math.nan
