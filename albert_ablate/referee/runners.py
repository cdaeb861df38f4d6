"""Run the sides of a comparison: start a command, or train overrides with the warm workers of a study."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from albert_ablate.config import ConfigError
from albert_ablate.records.atomic import replace_file
from albert_ablate.records.store import last_line
from albert_ablate.referee.sides import Crash, Inadmissible, Side, Worktrees, clock, run_command

SECONDS = "seconds"  # the metric that is the time of the command itself
EQUAL = {"tokens": 0.0, "parameters": 0.02, "flops": 0.05}  # as claims have it, by what --equal names


@dataclass(frozen=True)
class Outcome:
    """Result of one run of a side: its metric, and the seconds it took."""

    role: str  # baseline or candidate
    metric: str
    value: float  # inf where the run diverged
    seconds: float


class Stopped(Exception):
    """Raised when a signal has ended the runs."""

    def __init__(self, number: int):
        self.number = number


class Runner(Protocol):
    """Interface of what runs the sides of a comparison: one run, or the runs of a pair."""

    def run_one(self, side: Side, seed: int, role: str) -> Outcome:
        """Run one side with one seed."""

    def run_pair(self, sides: Mapping[str, Side], seeds: Sequence[int], at: int, roles: Sequence[str],
             claim: Path) -> Iterator[Outcome]:  # fmt: skip
        """The runs of `roles`, in that order, of the pair seeds[at]. Raises Crash, with the role in `args[1]`."""


@dataclass
class Commands:
    """Commands one after the other, or the two of a pair at once."""

    metric: str
    limit: float
    crash_is_outcome: bool
    worktrees: Worktrees
    workers: int = 1

    def run_one(self, side: Side, seed: int, role: str) -> Outcome:
        """Run the command of one side with one seed. Raises Crash, with the role in `args[1]`."""
        begun = clock()
        try:
            asked = "" if self.metric == SECONDS else self.metric
            name, value = run_command(
                side, seed, asked, self.limit, self.worktrees.folder_of(side), self.metric != SECONDS
            )
        except Crash as error:
            if not self.crash_is_outcome:
                raise Crash(str(error), role) from None
            name, value = self.metric, math.inf
        seconds = clock() - begun
        if self.metric == SECONDS and math.isfinite(value):
            name, value = SECONDS, seconds
        return Outcome(role, name, value if math.isfinite(value) else math.inf, seconds)

    def run_pair(self, sides: Mapping[str, Side], seeds: Sequence[int], at: int, roles: Sequence[str],
             claim: Path) -> Iterator[Outcome]:  # fmt: skip
        """Run the commands of a pair; both at once where workers allow it and time is not the metric."""
        if self.workers > 1 and len(roles) > 1 and self.metric != SECONDS:
            for role in roles:
                self.worktrees.folder_of(sides[role])
            with ThreadPoolExecutor(len(roles)) as pool:
                jobs = [pool.submit(self.run_one, sides[role], seeds[at], role) for role in roles]
            yield from (job.result() for job in jobs)
        else:
            for role in roles:
                yield self.run_one(sides[role], seeds[at], role)


@dataclass
class Training:
    """Runs of this package, below a folder of runs; what is there already is not trained again."""

    runs: Path
    metric: str
    workers: int
    say: Callable[[str], None]

    def run_one(self, side: Side, seed: int, role: str) -> Outcome:
        """Train one run, or find it. Raises Crash, with the role in `args[1]`."""
        from albert_ablate.analysis.registry import measure
        from albert_ablate.judge.contrast_data import Job
        from albert_ablate.judge.run_store import RunStore
        from albert_ablate.records.folder import DONE

        store = RunStore(self.runs)
        rate = float(store.arm(side.overrides).cfg["optimizer"]["lr"])

        def there() -> Any:
            store.update()
            runs = store.runs_of(side.overrides)
            same = (r for r in runs if r.record["seed"] == seed and math.isclose(r.lr, rate, rel_tol=1e-9))
            return next((r for r in same if r.record["status"] in DONE), None)

        begun, run = clock(), there()
        if run is None:
            self.train([Job(role, side.overrides, rate, seed)])
            run = there()
        if run is None:
            raise Crash("its run is finished but does not belong to this arm", role)
        value = math.inf if run.diverged else float(measure(self.metric).of(run))
        return Outcome(role, self.metric, value, clock() - begun)

    def run_pair(self, sides: Mapping[str, Side], seeds: Sequence[int], at: int, roles: Sequence[str],
             claim: Path) -> Iterator[Outcome]:  # fmt: skip
        """Train what the pair lacks, with the runs that its claim asks for."""
        from albert_ablate.judge.claims import read_claims
        from albert_ablate.judge.contrasts import gather
        from albert_ablate.judge.run_store import RunStore

        file, begun = read_claims(claim), clock()
        asked = file.claims[0]
        for _ in range(2):
            data = gather(file, asked, asked.contrasts("full")[0], "full", RunStore(self.runs))
            if data.refusal:
                raise Inadmissible(data.refusal)
            if len(data.differences) > at:
                break
            if not data.jobs:
                raise Inadmissible(data.pending_reason)
            self.train(data.jobs)
        else:
            raise Crash(f"its runs do not form a pair: {data.pending_reason or 'they do not belong to the arms'}")
        seconds = (clock() - begun) / 2
        values = {
            role: math.inf if gone[at] else side[at]
            for role, side, gone in zip(("candidate", "baseline"), data.values, data.diverged, strict=True)
        }
        yield from (Outcome(role, self.metric, values[role], seconds) for role in roles)

    def train(self, jobs: Sequence[Any]) -> None:
        """Train runs; Crash where one fails, Stopped where a signal ends them."""
        from albert_ablate.studies.judge_run import planned_of, study_of

        study, extra = study_of(self.workers, jobs[0].overrides, self.say)
        planned = [p for j in jobs for p in planned_of(j, self.runs, extra)]
        failed = study.complete(planned)
        if study.stopped is not None:
            raise Stopped(study.stopped)
        for p, error in failed.items():
            raise Crash(f"{p.name}: {last_line(error)}")


def write_claim(
    path: Path, baseline: Side, candidates: Mapping[str, Side], common: Sequence[str], measure: str, margin: float,
    pairs: int, first_seed: int, equal: Sequence[str], tune: bool,
) -> None:  # fmt: skip
    """A claims file of one claim a candidate, each against the baseline: what `albert-ablate judge` reads too."""
    n = len(common)
    arms = {side.text: list(side.overrides[n:]) for side in (baseline, *candidates.values())}
    if unknown := [e for e in equal if e not in EQUAL]:
        raise ConfigError(f"--equal={unknown[0]} is not allowed: it is one or more of {', '.join(EQUAL)}.")
    claims = [
        {
            "name": name,
            "statement": f"{side.text} is better than {baseline.text} by {measure}.",
            "parts": [{"treatment": side.text, "control": baseline.text, "measure": measure, "margin": margin}],
            "full": {"regime": "asked", "N": pairs},
            "equal": {e: EQUAL[e] for e in equal},
            "tuned": ["optimizer.lr"] if tune else [],
            "seeds": list(range(first_seed, first_seed + pairs)),
        }
        for name, side in candidates.items()
    ]
    regime = {"text": " ".join(common) or "at the defaults", "overrides": list(common)}
    tree = {
        "family": {"name": f"{path.parent.name}-{path.stem}", "size": len(claims)},
        "arms": arms,
        "regimes": {"asked": regime},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, yaml.safe_dump(tree | {"claims": claims}, sort_keys=False).encode())


def measure_refusal(name: str, margin: str, relative: bool) -> str:
    """Reason why overrides cannot be judged by this measure with this margin, or ""."""
    from albert_ablate.analysis.registry import measure

    m = measure(name)
    if m.kind != "run" or m.evaluation:
        return f"--metric={name} is not allowed here: it is not read from one run alone."
    return margin_refusal(m, margin, relative)


def margin_refusal(m: Any, margin: str, relative: bool) -> str:
    """Reason why a measure cannot have this margin, a percentage (relative) or a number, or ""."""
    if m.log == relative:
        return ""
    need = "a percentage, such as 0.5%" if m.log else f"a number in {m.unit}"
    return f"--margin={margin} is not allowed for {m.name}: it must be {need}."
