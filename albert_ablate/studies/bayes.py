"""A sweep of method bayes with no server: Optuna proposes, W&B's distributions are its prior."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from albert_ablate.config import SIGNIFICANT, ConfigError
from albert_ablate.data.tasks import is_language
from albert_ablate.records.atomic import replace_file
from albert_ablate.records.folder import RunFolder
from albert_ablate.streams import digest, stream_seed
from albert_ablate.studies.distributions import TAIL_PROBABILITY, Parameter
from albert_ablate.studies.launch import Study
from albert_ablate.studies.planned_runs import Planned, plan
from albert_ablate.studies.states import is_done, last_line, state
from albert_ablate.studies.sweep_settings import MAX_REFUSALS, Sweep, varied_labels
from albert_ablate.studies.sweepfile import CLASSIFICATION_METRICS

MAX_REPEATS = 50  # proposals in a row of what has been tried, before one is drawn at random, and before all is tried

Trial = dict[str, Any]  # draws: by key a place in `values` or a cumulative probability; setting; folder; error


class TrialLog:
    """The file of a sweep's trials in their order, below runs/bayes/. A trial is written before it is trained, so that
    none is lost; its result is in its run's record and nowhere else."""

    def __init__(self, runs: Path, key: str):
        self.runs = runs.expanduser().resolve()
        self.folder = RunFolder(self.runs / "bayes" / key)
        self.file = self.folder.path / "trials.json"

    def read(self) -> list[Trial]:
        """The trials so far; none where the file is not there. Raises ConfigError where it cannot be read."""
        try:
            return json.loads(self.file.read_text())["trials"]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.file} cannot be read ({error}); remove it: its runs are found again.") from None

    def write(self, trials: Sequence[Trial]) -> None:
        """Replace the file by these trials."""
        replace_file(self.file, (json.dumps({"version": 1, "trials": trials}, indent=1) + "\n").encode())

    def record(self, trial: Trial) -> dict[str, Any]:
        """What a trial's run says; "refused" where there is none to be."""
        return state(self.runs / trial["folder"]) if trial["folder"] else {"status": "refused"}


def search_key(sweep: Sweep, extra: Sequence[str] = ()) -> str:
    """Names what is searched: parameters, metric and what every run shares. A larger run_cap goes on with the same."""
    shared = [o for o in (*sweep.fixed, *extra) if o.lstrip("+").split("=")[0].split(".")[0] in {*SIGNIFICANT, "seed"}]
    spec = [[p.name, p.values, p.probabilities, p.distribution, dict(p.arguments)] for p in sweep.parameters]
    return digest(json.dumps([spec, sweep.metric, sweep.maximize, shared], sort_keys=True).encode(), size=6)


def propose(sweep: Sweep, trials: Sequence[Trial], results: Sequence[float | None], number: int) -> list[Trial]:
    """The next trials, none like an earlier one: fewer than `number` where nothing is left to try.

    Tree-structured Parzen estimator (Bergstra et al. 2011); within a batch the others are taken to come out badly (the
    constant liar, Ginsbourger et al. 2010), so that they spread. A function of its arguments and of nothing else.
    It searches cumulative probabilities, so each distribution is its own prior. `results`: None for a failed trial.
    """
    optuna = _optuna()
    varied = [p for p in sweep.parameters if len(p.values) != 1]
    space = {p.name: _distribution(optuna, p) for p in varied}
    sampler = optuna.samplers.TPESampler(
        seed=stream_seed(0, "bayes", search_key(sweep), len(trials)) % 2**32, constant_liar=True
    )
    study = optuna.create_study(direction="maximize" if sweep.maximize else "minimize", sampler=sampler)
    states = optuna.trial.TrialState
    for trial, result in zip(trials, results, strict=True):
        ended = {"state": states.FAIL} if result is None else {"state": states.COMPLETE, "value": result}
        study.add_trial(optuna.trial.create_trial(params=trial["draws"], distributions=space, **ended))
    tried = {json.dumps(t["setting"], sort_keys=True) for t in trials}
    new: list[Trial] = []
    repeats = 0
    while len(new) < number and repeats < 2 * MAX_REPEATS:
        if repeats < MAX_REPEATS:
            asked = study.ask(space)
            draws = dict(asked.params)
        else:
            place = ("bayes random", len(trials) + len(new), repeats)
            draws = {p.name: _at_random(p, (stream_seed(0, p.name, *place) + 0.5) / 2**63) for p in varied}
        setting = sweep.folded({p.name: _value(p, draws.get(p.name)) for p in sweep.parameters})
        name = json.dumps(setting, sort_keys=True)
        if name in tried:
            repeats += 1
            if repeats <= MAX_REPEATS:
                study.tell(asked, state=states.FAIL)
            continue
        tried.add(name)
        new.append({"draws": draws, "setting": setting, "folder": None, "error": None})
        repeats = 0
    return new


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("method=bayes needs Optuna: pip install 'albert_ablate[bayes]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: Any, parameter: Parameter) -> Any:
    """Values of equal weight are categories, without an order; all else is found by its cumulative probability."""
    if parameter.values and not parameter.probabilities:
        return optuna.distributions.CategoricalDistribution(range(len(parameter.values)))
    return optuna.distributions.FloatDistribution(TAIL_PROBABILITY, 1 - TAIL_PROBABILITY)


def _at_random(parameter: Parameter, u: float) -> float:
    places = len(parameter.values)
    return (
        math.floor(u * places)
        if places and not parameter.probabilities
        else TAIL_PROBABILITY + u * (1 - 2 * TAIL_PROBABILITY)
    )


def _value(parameter: Parameter, draw: float | None) -> Any:
    if draw is None:
        return parameter.values[0]
    if parameter.values and not parameter.probabilities:
        return parameter.values[int(draw)]
    return parameter.at(draw)


def corners(sweep: Sweep) -> list[dict[str, Any]]:
    """Settings that show whether a sweep is allowed: each value, or end of a range, with the others in their middle."""
    middle = {p.name: p.at(0.5) for p in sweep.parameters}
    ends = {
        p.name: p.values or ((p.at(TAIL_PROBABILITY), p.at(1 - TAIL_PROBABILITY)) if "min" in p.arguments else ())
        for p in sweep.parameters
    }
    return [middle, *({**middle, name: value} for name, values in ends.items() for value in values)]


def result_of(record: Mapping[str, Any], sweep: Sweep) -> float | None:
    """The metric of a done run; of one that diverged and has no number, infinitely bad. None: not done."""
    if not is_done(dict(record)):
        return None
    value = record["summary"].get(sweep.metric)
    if value is None or not math.isfinite(value):
        return -math.inf if sweep.maximize else math.inf
    return value


def run_bayes(
    sweep: Sweep,
    runs: Path,
    workers: int,
    launcher: Sequence[str],
    extra: Sequence[str],
    dry_run: bool,
    tuned: dict[str, float | None] | None,
    say: Callable[[str], None],
) -> int:
    """Complete a bayes sweep below `runs`, `workers` trials at a time: exit code as `run_sweep`."""
    assert sweep.run_cap is not None
    _optuna()
    planned = plan(sweep, corners(sweep), runs, extra)
    if sweep.metric in CLASSIFICATION_METRICS and any(is_language(p.cfg) for p in planned):
        raise ConfigError(f"{sweep.path}: metric {sweep.metric} is of task=classify, and these runs have none.")
    log = TrialLog(runs, search_key(sweep, extra))
    trials = log.read()
    done = sum(is_done(log.record(t)) for t in trials)
    refused = _refused(trials)
    proposed = f"{len(trials) - len(refused)} proposed" + (f", {len(refused)} refused" if refused else "")
    say(f"{sweep.path}: {sweep.run_cap} trials, {done} done, {proposed}.")
    if dry_run:
        for trial in trials:
            say(f"{_label(sweep, trial)}: {log.record(trial)['status']}")
        return 0
    log.folder.create()
    with log.folder.lock():
        return _search(sweep, log, Study(launcher, workers, say), runs, extra, tuned, say)


def _search(
    sweep: Sweep,
    log: TrialLog,
    study: Study,
    runs: Path,
    extra: Sequence[str],
    tuned: dict[str, float | None] | None,
    say: Callable[[str], None],
) -> int:
    assert sweep.run_cap is not None
    trials, failed = log.read(), dict[str, str]()  # by folder

    plans: dict[str, Planned] = {}  # by folder
    in_a_row = 0  # proposals refused

    def planned_of(trial: Trial) -> Planned:
        if trial["folder"] not in plans:
            (planned,) = plan(sweep, [trial["setting"]], runs, extra, tuned)
            trial["folder"] = str(planned.folder.relative_to(log.runs))
            plans[trial["folder"]] = planned
        return plans[trial["folder"]]

    while True:
        begun = [t for t in trials if t["folder"] and t["folder"] not in failed]
        to_do = [planned_of(t) for t in begun if not is_done(log.record(t))]
        errors = study.complete(list(dict.fromkeys(to_do)))
        failed |= {str(p.folder.relative_to(log.runs)): error for p, error in errors.items()}
        results = [result_of(log.record(t), sweep) for t in trials]
        left = sweep.run_cap - (len(trials) - len(_refused(trials)))
        if study.stopped is not None or left <= 0:
            break
        if in_a_row >= MAX_REFUSALS:
            say(f"The last {in_a_row} proposals were refused: no more are tried.")
            break
        new = propose(sweep, trials, results, min(study.workers, left))
        if not new:
            say("Every setting has been tried.")
            break
        for trial in new:
            try:
                planned_of(trial)
                in_a_row = 0
            except ConfigError as error:  # two values that do not go together: another proposal takes its place
                trial["error"] = str(error)
                in_a_row += 1
                say(f"refused: {error}")
        trials += new
        log.write(trials)
    for trial in trials:
        if trial["folder"] in failed:
            say(f"failed: {_label(sweep, trial)}: {last_line(failed[trial['folder']])} ({trial['folder']})")
    finite = [(r, i) for i, r in enumerate(results) if r is not None and math.isfinite(r)]
    if finite:
        best, place = (max if sweep.maximize else min)(finite)
        won = trials[place]
        say(f"best of {len(finite)}: {_label(sweep, won)}, {sweep.metric} {best:.4f} ({won['folder']})")
    refused = _refused(trials)
    last = f", {len(refused)} refused" if refused else ""
    say(f"{sum(r is not None for r in results)} of {sweep.run_cap} trials are done, {len(failed)} failed{last}.")
    if study.stopped is not None:
        return 128 + study.stopped
    if refused and len(refused) == len(trials):
        raise ConfigError(refused[0]["error"])
    return 1 if failed or (refused and left > 0) else 0


def _refused(trials: Sequence[Trial]) -> list[Trial]:
    """Those whose values do not go together: there is no run of them, and they do not count towards run_cap."""
    return [t for t in trials if t["error"]]


def _label(sweep: Sweep, trial: Trial) -> str:
    return next(varied_labels(sweep, [trial["setting"]]))
