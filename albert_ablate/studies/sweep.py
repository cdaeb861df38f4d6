"""`albert-ablate sweep`: train what a sweep file still lacks, with no server."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from albert_ablate.records.keys import Keys
from albert_ablate.records.tuning import LEARNING_RATE
from albert_ablate.studies.bayes import run_bayes
from albert_ablate.studies.estimates import show_plan
from albert_ablate.studies.launch import Study, split_overrides
from albert_ablate.studies.planned_runs import plan, plan_random
from albert_ablate.studies.stacking import OFF
from albert_ablate.studies.states import has_ended, last_line
from albert_ablate.studies.sweep_settings import Sweep


def run_sweep(
    sweep: Sweep,
    runs: Path,
    workers: int,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    use_tuned: bool = True,
    say: Callable[[str], None] = print,
    stack: int = OFF,
) -> int:
    """Complete a sweep below `runs`: exit code 0 all done, 1 some failed, 130 and 143 stopped."""
    launcher, extra, workers = split_overrides(sweep, overrides, workers, say)
    tuned: dict[str, float | None] | None = {} if use_tuned else None
    if sweep.method == "bayes":
        return run_bayes(sweep, runs, workers, launcher, extra, dry_run, tuned, say)
    refused, missing, keys = list[str](), 0, Keys(runs)
    if sweep.method == "random":
        planned, refused, missing = plan_random(sweep, runs, extra, tuned, keys)
    else:
        planned = plan(sweep, sweep.settings(), runs, extra, tuned, keys)
    for sentence in refused:
        say(f"refused: {sentence}")
    _say_tuned(tuned or {}, say)
    to_do = [p for p in planned if not has_ended(p.folder)]
    if sweep.repeated:
        say(f"{sweep.repeated} combinations are skipped: they repeat the settings of others.")
    say(f"{sweep.path}: {len(planned)} runs, {len(planned) - len(to_do)} done, {len(to_do)} to do.")
    if dry_run:
        show_plan(planned, runs, workers, say)
        return 0
    with contextlib.suppress(OSError):  # which the launch says
        runs.mkdir(parents=True, exist_ok=True)
        keys.save()
    study = Study(launcher, workers, say, stack)
    failed = study.complete(planned)
    done = sum(has_ended(p.folder) for p in planned)
    for p, error in failed.items():
        say(f"failed: {p.name}: {last_line(error)} ({p.folder})")
    lacking = f"; {missing} are missing, {len(refused)} draws were refused" if missing else ""
    say(f"{done} of {len(planned)} runs are done, {len(failed)} failed{lacking}.")
    if study.stopped is not None:
        return 128 + study.stopped
    return 1 if failed or missing else 0


def _say_tuned(tuned: Mapping[str, float | None], say: Callable[[str], None]) -> None:
    """Which arms take a tuned learning rate, said where any does."""
    if not any(tuned.values()):
        return
    for label, rate in tuned.items():
        say(f"{label}: {LEARNING_RATE}={rate:g}, tuned" if rate else f"{label}: not tuned, keeps its default rate")
