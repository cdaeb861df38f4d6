"""What a study can see before it is begun: noise over seeds, paired spread, reachable margins, false positives.

The same arm on the same seed is bitwise equal to itself, and on other seeds it shows the unpaired floor: so K runs of
one arm on fresh seeds are the pool, and the first pairs of each treatment on those seeds give the paired spread
(STATISTICS.md, rule 10).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from albert_ablate.config import ConfigError, keys_of, nearest
from albert_ablate.records.atomic import replace_file
from albert_ablate.records.folder import plain
from albert_ablate.records.tuning import FIRST_CALIBRATION_SEED
from albert_ablate.stats import learning_rate as planning
from albert_ablate.streams import stream_seed
from albert_ablate.studies.estimates import say_price
from albert_ablate.studies.launch import Study, split_overrides
from albert_ablate.studies.planned_runs import Planned, plan
from albert_ablate.studies.states import is_done, last_line, read_record
from albert_ablate.studies.sweep_settings import Sweep, varied_labels

RUNS, PAIRS, PLANNED = 24, 4, (10, 20, 40)
MARGIN = 0.005
MEASURES = ("test_loss", "val_loss", "best_val_loss", "test_bits_per_byte", "train_loss")


def calibrate(
    sweep: Sweep,
    runs: Path,
    workers: int,
    overrides: Sequence[str] = (),
    arm: str | None = None,
    treatments: Sequence[str] | None = None,
    count: int = RUNS,
    measure: str = MEASURES[0],
    margin: float = MARGIN,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Train what is missing and say it: exit code 0, 1 where runs failed, 130 and 143 stopped."""
    _refuse(sweep, overrides, count, measure, margin)
    launcher, extra, workers = split_overrides(sweep, overrides, workers, say)
    wanted = _wanted(sweep, arm, treatments, count)
    bare = replace(sweep, parameters=tuple(p for p in sweep.parameters if p.name != "seed"))
    planned: dict[str, list[Planned]] = {}
    for label, setting, seeds in wanted:
        each = [{**setting, "seed": FIRST_CALIBRATION_SEED + k} for k in range(seeds)]
        planned[label] = [replace(p, label=label) for p in plan(bare, each, runs, extra, {})]
    all_ = [p for part in planned.values() for p in part]
    control = wanted[0][0]
    say(
        f"{sweep.path}: {len(planned[control])} runs of {control}, {PAIRS} of each of {len(wanted) - 1} treatments; "
        f"{sum(not is_done(read_record(p.folder)) for p in all_)} to do."
    )
    if dry_run:
        say_price(all_, runs, workers, say)
        return 0
    study = Study(launcher, workers, say)
    failed = study.complete(all_)
    if study.stopped is not None:
        return 128 + study.stopped
    for p, error in failed.items():
        say(f"failed: {p.name}: {last_line(error)} ({p.folder})")
    if failed:
        return 1
    finals = {label: [_final(p, measure) for p in part] for label, part in planned.items()}
    result = calibration(finals, control, measure, math.log1p(margin))
    result["keys"] = {label: keys_of(part[0].cfg).arm for label, part in planned.items()}  # by which `plan` finds it
    file = runs / "calibration" / f"{planned[control][0].arm}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, (json.dumps(plain(result), indent=1) + "\n").encode())
    for line in describe(result):
        say(line)
    say(str(file))
    return 0


def calibration(finals: Mapping[str, Sequence[float]], control: str, measure: str, margin: float) -> dict[str, Any]:
    """Spread, reach and false positives from the finals of each arm, seed by seed; inf = diverged.

    Differences are log ratios per seed, ln(control / treatment): positive where the treatment's figure is the lower.
    """
    log_control = np.log(np.asarray(finals[control], float))
    fine = log_control[np.isfinite(log_control)]
    if len(fine) < 2:
        raise RuntimeError(
            f"All but {len(fine)} of the {len(log_control)} runs of {control} diverged: there is no spread."
        )
    if not np.ptp(fine):
        raise RuntimeError(f"All runs of {control} ended with the same {measure}: there is no noise to measure.")
    s, low, high = planning.spread(fine)
    pool = planning.false_positive_rate(log_control, np.random.default_rng(stream_seed(0, "calibrate")))
    out: dict[str, Any] = {
        "control": control,
        "measure": measure,
        "margin": margin,
        "runs": len(log_control),
        "diverged": int(np.isinf(log_control).sum()),
        "mean": float(np.exp(fine).mean()),
        "spread": [s, low, high],
        "unpaired_spread": s * math.sqrt(2),  # of the difference of two arms on seeds of their own
        "false_positives": {"rate": pool.rate, "low": pool.low, "high": pool.high, "pairs": pool.pairs},
        "treatments": {},
    }
    for label, values in finals.items():
        if label == control:
            continue
        differences = log_control[: len(values)] - np.log(np.asarray(values, float))
        finite = differences[np.isfinite(differences)]
        entry: dict[str, Any] = {
            "pairs": len(differences),
            "finished": len(finite),
            "mean": float(finite.mean()) if len(finite) else None,
        }
        if len(finite) > 1 and np.ptp(finite) > 0:
            reach = planning.reach(finite, margin, PLANNED)
            entry |= {
                "spread": [reach.s, reach.low, reach.high],
                "half_widths": {str(n): w for n, w in reach.half_widths.items()},
                "reached": {str(n): r for n, r in reach.reached.items()},
            }
        out["treatments"][label] = entry
    return out


def describe(result: Mapping[str, Any]) -> list[str]:
    """The calibration in lines; log ratios as percent."""
    s, low, high = (f"{100 * x:.3g}" for x in result["spread"])
    pool = result["false_positives"]
    out = [
        f"{result['control']}: {result['measure']} {result['mean']:.4f}; spread over {result['runs']} seeds "
        f"{s} % (95 % interval {low} to {high}), of the difference of unpaired arms "
        f"{100 * result['unpaired_spread']:.3g} %" + (f"; {result['diverged']} diverged" if result["diverged"] else ""),
        f"false positives in 10,000 random pairings of these {result['runs']} runs, up to {pool['pairs']} pairs each: "
        f"{100 * pool['rate']:.1f} % (bootstrap over the runs {100 * pool['low']:.1f} to {100 * pool['high']:.1f}); "
        "about this pool, nominal 5 %",
    ]
    for label, entry in result["treatments"].items():
        if "spread" not in entry:
            out.append(f"{label}: {entry['finished']} of {entry['pairs']} pairs finished: no paired spread")
            continue
        s, low, high = (f"{100 * x:.3g}" for x in entry["spread"])
        widths = ", ".join(
            f"{n} pairs +-{100 * w:.3g} % (no effect {'within' if entry['reached'][n] else 'out of'} reach)"
            for n, w in entry["half_widths"].items()
        )
        out.append(
            f"{label}: paired spread {s} % (95 % interval {low} to {high}) from {entry['finished']} pairs; {widths}"
        )
    margin = f"margin {100 * math.expm1(result['margin']):.3g} %"
    if any("reached" in entry for entry in result["treatments"].values()):
        margin += "; half-widths of 95 %, no effect is within reach where that of 90 % fits the margin"
    return [*out, margin]


def _final(planned: Planned, measure: str) -> float:
    record = read_record(planned.folder)
    value = record["summary"].get(measure)
    return math.inf if record["status"] == "diverged" or value is None else float(value)


def _wanted(
    sweep: Sweep, arm: str | None, treatments: Sequence[str] | None, count: int
) -> list[tuple[str, Mapping[str, Any], int]]:
    """Label, setting and number of runs: the control first, then the treatments."""
    settings = list[dict[str, Any]]()
    for setting in sweep.settings():
        arm_setting = {k: v for k, v in setting.items() if k != "seed"}
        if arm_setting not in settings:
            settings.append(arm_setting)
    named = dict(zip(varied_labels(sweep, settings), settings, strict=True))
    control = arm or next(iter(named))
    others = [label for label in named if label != control] if treatments is None else list(dict.fromkeys(treatments))
    for label in (control, *others):
        if label not in named:
            raise ConfigError(f"{sweep.path} has no arm {label}: it has {nearest(label, [*named])}.")
    if control in others:
        raise ConfigError(f"{control} is the control: it cannot be a treatment too.")
    return [(control, named[control], count), *((label, named[label], PAIRS) for label in others)]


def _refuse(sweep: Sweep, overrides: Sequence[str], count: int, measure: str, margin: float) -> None:
    for o in overrides:
        if o.lstrip("+").partition("=")[0] == "seed":
            raise ConfigError(f"{o} is not allowed: calibrate trains on seeds of its own.")
    if sweep.method == "bayes":
        raise ConfigError(f"{sweep.path}: method=bayes has no arms before it is run: take grid or random.")
    if count < 20:
        raise ConfigError(f"--count={count} is not allowed: the bootstrap over the runs needs 20 or more; take {RUNS}.")
    if measure not in MEASURES:
        raise ConfigError(f"--measure={measure} is not allowed: it must be one of {', '.join(MEASURES)}.")
    if not 0 < margin < math.inf:
        raise ConfigError(f"--margin={margin:g} is not allowed: it is a share above 0, such as {MARGIN:g}.")
