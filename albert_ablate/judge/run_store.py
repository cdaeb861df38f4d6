"""The runs below a folder, each read once, by the arm that they are of."""

import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from albert_ablate.analysis.registry import Evidence
from albert_ablate.config import corrections
from albert_ablate.judge import admission
from albert_ablate.records.keys import Arm, Keys
from albert_ablate.records.store import FILE, Record, read, run_folders
from albert_ablate.records.tuning import read_tuning


class ContrastArm:
    """An arm of a contrast: its runs, and the learning rate at which it is judged."""

    def __init__(self, name: str, overrides: tuple[str, ...], store: "RunStore", tuned: bool, factor: float):
        self.name, self.overrides = name, overrides
        self.composed = store.arm(overrides)
        self.runs, self.outdated = store.runs_of(overrides), store.runs_of(overrides, outdated=True)
        self.other_code = store.of_other_code(self.composed)
        # a classification run is tuned as the language model it builds on
        language = tuple(o for o in overrides if o.partition("=")[0].split(".")[0] != "task")
        ids = sorted({r.record["arm"] for r in store.runs_of(language) if r.record.get("arm")})
        tunings = [t for t in (read_tuning(store.root, i) for i in ids) if t]
        self.tuning: Mapping[str, Any] | None = tunings[0] if tunings else None
        given = float(self.composed.cfg["optimizer"]["lr"])
        self.rate = float(self.tuning["rate"] if tuned and self.tuning else given) * factor
        self.known = bool(self.tuning) or not tuned  # False: to be tuned, or tuned further

    @property
    def full_runs(self) -> int:
        """Tuning runs at the full budget."""
        full = [c for c in self.tuning["curve"] if c["tokens"] == self.tuning["tokens"]] if self.tuning else []
        return sum(len(c["losses"]) for c in full)

    def run_of(self, seed: int, rate: float | None = None) -> Evidence | None:
        """The run of a seed and rate, whatever its status."""
        return next(iter(self.records_of(seed, rate)), None)

    def records_of(self, seed: int, rate: float | None = None) -> list[Evidence]:
        """Every record of a seed and rate: more than one where a setting has had several names."""
        wanted = self.rate if rate is None else rate
        return [r for r in self._by_seed.get(seed, ()) if math.isclose(r.lr, wanted, rel_tol=1e-9)]

    @cached_property
    def _by_seed(self) -> dict[int, list[Evidence]]:
        out: dict[int, list[Evidence]] = {}
        for run in self.runs:
            out.setdefault(run.record["seed"], []).append(run)
        return out

    def tuned_loss(self) -> float:
        """The least mean loss over tuning seeds, by which a level is chosen and nothing is judged."""
        assert self.tuning is not None
        means = [c["mean"] for c in self.tuning["curve"] if c["tokens"] == self.tuning["tokens"]]
        return min((m for m in means if m is not None), default=math.inf)


class RunStore:
    """All runs below a folder, and which arm they are of."""

    def __init__(self, root: Path):
        self.root, self.keys = root, Keys(root)
        self.seen = set[tuple[str, str]]()  # claims and forms of which a pair was judged before
        self._read: dict[str, tuple[Any, Evidence | str | None]] = {}  # by folder: when it was written, what it holds
        self.update()

    def update(self) -> None:
        """Read the records that are new or were written since."""
        self.evidence, self.unreadable = list[Evidence](), list[str]()
        self.outdated = list[Evidence]()  # made by a component that was corrected since: no evidence about today's
        for folder in run_folders(self.root) if self.root.is_dir() else ():
            place, written = f"{folder.parent.name}/{folder.name}", _written(folder)
            before, evidence = self._read.get(place, (None, None))
            if before != written:
                evidence = _evidence(folder, place)
                self._read[place] = written, evidence
            if isinstance(evidence, str):
                self.unreadable.append(evidence)
            elif evidence is not None:
                (self.outdated if corrections(evidence.record) else self.evidence).append(evidence)
        self._admit()
        self._by_arm = dict[bool, dict[str, list[Evidence]]]()

    def _arms(self, runs: Sequence[Evidence]) -> dict[str, list[Evidence]]:
        """The runs of each arm, by its key."""
        out: dict[str, list[Evidence]] = {}
        for run, keys in zip(runs, self.keys.of_records([r.record for r in runs]), strict=True):
            if keys is not None:
                out.setdefault(keys.arm, []).append(run)
        return out

    def _admit(self) -> None:
        """Keep what is evidence; what is not is listed with the unreadable records."""
        admitted = []
        for run in self.evidence:
            if why := admission.refusal(run.folder, run.record):
                self.unreadable.append(f"{run.relative_folder}/record.json is not evidence: {why}")
            else:
                admitted.append(run)
        self.evidence = admitted

    def arm(self, overrides: Sequence[str]) -> Arm:
        """What overrides compose to; ConfigError for what is not allowed."""
        return self.keys.arm(overrides)

    def seeds_of(self, seeds: Sequence[int], arms: Sequence[Sequence[str]]) -> Sequence[int]:
        """The seeds of a claim about these arms, in the order in which they are judged."""
        return seeds

    def runs_of(self, overrides: Sequence[str], outdated: bool = False) -> list[Evidence]:
        """The runs, of any seed and rate, of an arm."""
        if outdated not in self._by_arm:
            self._by_arm[outdated] = self._arms(self.outdated if outdated else self.evidence)
        return self._by_arm[outdated].get(self.arm(overrides).keys.arm, [])

    def of_other_code(self, arm: Arm) -> list[Evidence]:
        """The runs of an arm that were made before the source of somebody's own component was edited."""
        if arm.plain == arm.keys.arm:
            return []
        keys = [r.record.get("key") or {} for r in self.evidence]
        other = (k.get("plain") == arm.plain and k.get("arm") != arm.keys.arm for k in keys)
        return [run for run, found in zip(self.evidence, other, strict=True) if found]


def _written(folder: Path) -> list[Any]:
    """When and how large a run's record and its evaluations were last written."""
    out: list[Any] = []
    for name in (FILE, "evaluations.json"):
        try:
            about = os.stat(folder / name)
            out.append((about.st_mtime_ns, about.st_size, about.st_ino))
        except OSError:
            out.append(None)
    return out


def _evidence(folder: Path, place: str) -> Evidence | str | None:
    """A run's record, why it cannot be read, or None where it is begun and nothing was committed."""
    record = read(folder)
    if isinstance(record, Record):
        if record.learning_rate is None:
            return f"{place}/record.json cannot be read: it has no config.optimizer.lr"
        return Evidence(folder, record)
    return None if record.missing else f"{place}/{record.reason}"
