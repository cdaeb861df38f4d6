"""`albert-ablate judge`: print the ledger, price the claims, or train what the undecided ones lack, cheapest first."""

import contextlib
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from albert_ablate.analysis.external.runs import home_folder, is_external
from albert_ablate.config import ConfigError, compose
from albert_ablate.judge import registration
from albert_ablate.judge.claim_models import Form
from albert_ablate.judge.claims import ClaimsFile, ClaimText, arms_of, measure_of, read_claims
from albert_ablate.judge.console import show_ledger
from albert_ablate.judge.contrast_data import Job
from albert_ablate.judge.export import exported
from albert_ablate.judge.ledger import judge_and_register, judged, refuse_unknown, write_ledger
from albert_ablate.judge.run_store import RunStore
from albert_ablate.judge.words import OPEN
from albert_ablate.records.folder import DONE
from albert_ablate.records.json_output import document, nonfinite_as_text, output_to_stderr
from albert_ablate.records.store import last_line, require_runs_folder
from albert_ablate.records.tuning import tuning_tokens
from albert_ablate.stats.learning_rate import tuning_price
from albert_ablate.studies.launch import Study, split_overrides
from albert_ablate.studies.planned_runs import Planned, plan
from albert_ablate.studies.price import show_price
from albert_ablate.studies.stacking import OFF
from albert_ablate.studies.sweep_settings import Sweep
from albert_ablate.studies.tune import tune_together

SKIPPED = "is skipped"  # in the line that tells why a claim gets no more runs


def run_judge(
    claims: Path,
    runs: Path,
    as_json: bool,
    ledger_file: Path | None,
    form: str,
    only: Sequence[str],
    run: bool,
    budget: str | None,
    secondary: bool,
    workers: int,
    dry_run: bool,
    format: Literal["latex", "md", "csv"] | None,
    plot: Literal["png", "svg", "html"] | None,
    verify: int,
    stack: int = OFF,
) -> int:
    """Do what `albert-ablate judge` is asked for: its exit code. Arguments are the command's options."""
    limit = _budget(budget)
    if budget and not run:
        raise ConfigError(f"--budget={budget} would do nothing: it limits --run.")
    if secondary and not run:
        raise ConfigError("--secondary would do nothing: it is about what --run trains.")
    for one, other in ((run, "--run"), (as_json, "--json")):
        if one and dry_run:
            raise ConfigError(f"{other} and --dry-run exclude each other.")
    if as_json and format:
        raise ConfigError(f"--json and --format={format} exclude each other: both say how the ledger is printed.")
    file = read_claims(claims)
    refuse_unknown(file, only)
    if lacking := [c.name for c in file.claims if c.name in only and form not in c.forms and not dry_run]:
        raise ConfigError(f"{file.path}: the claim {lacking[0]} has no form {form}.")
    external = is_external(runs)
    if external and (asked := [o for o, on in (("--run", run), ("--dry-run", dry_run), ("--verify", verify)) if on]):
        raise ConfigError(
            f"{asked[0]} is not possible: {runs} was made by another trainer, and nothing of it is trained here."
        )
    if dry_run:
        show_price(file, runs, only)
        return 0
    aside = output_to_stderr if as_json else contextlib.nullcontext
    code = 0
    with aside():
        if run:
            code = PairRunner(file, runs, form, only, secondary, workers, limit, print, stack).go()
        elif not external and not any(runs.glob("*/seed*")):
            if runs.exists():
                require_runs_folder(runs)
            why = "holds no runs" if runs.exists() else "does not exist"
            raise ConfigError(f"{runs} {why}: --run trains them, --dry-run estimates what that costs.")
        ledger = judge_and_register(file, runs, form)
        place = ledger_file or home_folder(runs) / "ledger.json"
        write_ledger(ledger, place)
    _print_ledger(ledger, place, as_json, format, only)
    with aside():
        if plot:
            from albert_ablate.report.claims import draw_claims  # loads pandas

            for drawn in draw_claims(ledger, place.parent / "claims" / "plots", plot, only):
                print(drawn, file=sys.stderr if format else sys.stdout)
        return code or (verify_runs(file, runs, form, only, verify, print) if verify else 0)


def _print_ledger(
    ledger: Mapping[str, Any], place: Path, as_json: bool, format: Literal["latex", "md", "csv"] | None,
    only: Sequence[str],
) -> None:  # fmt: skip
    if as_json:
        shown = [e for e in ledger["claims"] if not only or e["name"] in only]
        print(document("ledger", nonfinite_as_text({**ledger, "claims": shown})))
    elif format:
        print(exported(ledger, format, only), end="")
    else:
        show_ledger(ledger, only)
        print(place)


def verify_runs(
    file: ClaimsFile, runs: Path, form: str, only: Sequence[str], count: int, say: Callable[[str], None]
) -> int:
    """Train `count` of the runs that the claims rest on again, drawn at random: exit code 0 if all end as they did."""
    from albert_ablate.training.run import run  # loads torch

    now = judged(file, runs, form)
    contrasts = [
        contrast
        for by_claim in (now.primary, now.secondary)
        for name, several in by_claim.items()
        if not only or name in only
        for contrast in several
    ]
    trained = {place: job for contrast in contrasts for place, job in contrast.trained.items()}
    drawn = random.SystemRandom().sample(sorted(trained), min(count, len(trained)))
    same = 0
    for place in drawn:
        (planned,) = planned_of(trained[place], runs, ["force=true"])
        if planned.folder.resolve() != (runs / place).resolve():
            say(f"{place}: not compared, its arm is trained as {planned.folder.parent.name} today.")
            continue
        verdict = run(compose([*planned.overrides])).get("reproduction", "not finished")
        same += verdict == "reproduced"
        say(f"{place} ({planned.name}): {verdict}")
    say(f"{same} of {len(drawn)} runs, drawn at random from {len(trained)}, reproduced bit for bit.")
    return 0 if same == len(drawn) else 1


@dataclass(frozen=True)
class Budget:
    """What `judge --run` may spend."""

    seconds: float = float("inf")
    tokens: float = float("inf")


def _budget(text: str | None) -> Budget:
    if text is None:
        return Budget()
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)(s|tokens)", text.replace("_", "").strip(), re.IGNORECASE)
    try:
        assert match
        amount = float(match[1])
        assert amount > 0
    except (AssertionError, ValueError):
        raise ConfigError(f"--budget={text} is not allowed: write 3600s or 5e8tokens.") from None
    return Budget(seconds=amount) if match[2].lower() == "s" else Budget(tokens=amount)


class PairRunner:
    """Trains, of all undecided claims, the cheapest next pair; what two claims share is trained once."""

    def __init__(self, file: ClaimsFile, runs: Path, form: str, only: Sequence[str], secondary: bool, workers: int,
                 budget: Budget, say: Callable[[str], None], stack: int = OFF):  # fmt: skip
        self.file, self.runs, self.form, self.only, self.secondary = file, runs, form, only, secondary
        self.workers, self.budget, self.say, self.stack = workers, budget, say, stack
        self.begun, self.tokens = time.monotonic(), 0.0
        self.store: RunStore | None = None  # the records below `runs`, each read again only when it was written again
        self.broken = set[str]()  # claims whose next pair cannot be had

    def go(self) -> int:
        """Exit code 0, also where the budget ends; 130 and 143 stopped by a signal."""
        while True:
            following = self.next()
            if following is None:
                return 0
            claim, jobs = following
            if time.monotonic() - self.begun >= self.budget.seconds or self.tokens >= self.budget.tokens:
                self.say("The budget is used up; the same command continues from here.")
                return 0
            if code := self.do(claim, jobs):
                return code

    def next(self) -> tuple[ClaimText, list[Job]] | None:
        """The cheapest claim to go on with and its jobs; secondary contrasts wait until every claim is decided."""
        claims = {c.name: c for c in self.file.claims}
        lacking = [
            (bool(kind), self._price(name, jobs), i, claims[name], jobs)
            for i, (name, kinds) in enumerate(self._lacking(self.only).items())
            for kind, jobs in enumerate(kinds)
            if jobs and name not in self.broken
        ]
        if not lacking:
            return None
        *_, claim, jobs = min(lacking)
        return claim, jobs

    def _lacking(self, only: Sequence[str]) -> dict[str, tuple[list[Job], list[Job]]]:
        """By claim what its primary contrasts still lack, and what the secondary ones lack to have as many pairs."""
        out = {}
        now = judged(self.file, self.runs, self.form, self._updated())
        registration.write(self.file, self.runs, now.registration)
        for entry in now.ledger["claims"]:
            if only and entry["name"] not in only:
                continue
            name, pairs = entry["name"], max(p["pairs"] for p in entry["parts"])
            undecided = entry["verdict"] in OPEN or any(c.untuned for c in now.primary[name])
            primary = [job for c in now.primary[name] for job in c.jobs] if undecided else []
            behind = [c for c in now.secondary[name] if len(c.differences) < pairs and (not c.refusal or c.untuned)]
            secondary = [job for c in behind for job in c.jobs] if self.secondary else []
            out[name] = (list(dict.fromkeys(primary)), list(dict.fromkeys(secondary)))
        return out

    def _updated(self) -> RunStore:
        if self.store is None:
            self.store = RunStore(self.runs)
        else:
            self.store.update()
        return self.store

    def done(self) -> int:
        """How many runs of the folder are done."""
        return sum(r.record["status"] in DONE for r in self._updated().evidence)

    def _price(self, name: str, jobs: Sequence[Job]) -> float:
        """Tokens times the size of the model, tuning included, in a unit that orders claims."""
        assert self.store is not None
        tuning = tuning_price(self._form(name).rates).expected
        return sum(cost_rank(self.store.arm(j.overrides).cfg) * (1 if j.rate else tuning) for j in jobs)

    def _form(self, name: str) -> Form:
        return next(c for c in self.file.claims if c.name == name).forms[self.form]

    def do(self, claim: ClaimText, jobs: Sequence[Job]) -> int:
        """Tune, evaluate or train what a claim's next pair lacks: exit code 0, or that of a signal."""
        if any(j.rate is None for j in jobs):
            return self._tune(claim, {j.overrides: j.arm for j in jobs if j.rate is None})
        ready = [j for j in jobs if j.rate is not None]
        if any(j.evaluation for j in ready):
            return self._evaluate(claim, ready)
        return self._train(claim, ready)

    def _tune(self, claim: ClaimText, lacking: Mapping[tuple[str, ...], str]) -> int:
        """Tune what lacks it together with the claim's other arms, so that all get as many full runs."""
        form = self._form(claim.name)
        arms = {
            self.file.overrides(claim, p, self.form, a): a
            for p in claim.contrasts(self.form) if claim.rate_matters(measure_of(p)) for a in arms_of(p)
        } | dict(lacking)  # fmt: skip
        self.say(f"{claim.name}: tuning {', '.join(dict.fromkeys(lacking.values()))}")
        before = tuning_tokens(self.runs)
        code = tune_arms(arms, self.runs, self.workers, form, self.say, self.stack)
        if code in (130, 143):
            return code
        self.tokens += max(0, tuning_tokens(self.runs) - before)
        if code:
            self.broken.add(claim.name)
        elif any(j.rate is None for kind in self._lacking([claim.name])[claim.name] for j in kind):
            self.say(f"{claim.name} {SKIPPED}: its arms cannot be tuned alike.")
            self.broken.add(claim.name)
        return 0

    def _train(self, claim: ClaimText, jobs: Sequence[Job]) -> int:
        study, extra = study_of(self.workers, jobs[0].overrides, self.say, self.stack)
        planned = [p for j in jobs for p in planned_of(j, self.runs, extra)]
        self.say(f"{claim.name}: {', '.join(p.name for p in planned)}")
        failed = study.complete(planned)
        self.tokens += sum(p.cfg.budget.tokens for p in planned)
        if study.stopped is not None:
            return 128 + study.stopped
        for p, error in failed.items():
            self.say(f"{claim.name} {SKIPPED}: {p.name} failed: {last_line(error)}")
            self.broken.add(claim.name)
        if not failed and self._still_lacks(claim, jobs):
            self.say(f"{claim.name} {SKIPPED}: the runs it trained do not belong to its arms.")
            self.broken.add(claim.name)
        return 0

    def _evaluate(self, claim: ClaimText, jobs: Sequence[Job]) -> int:
        """Add the evaluation that a done run lacks, from its kept weights."""
        from albert_ablate.training.run import run  # loads torch

        for j in jobs:
            for p in planned_of(j, self.runs, [f"evaluation={j.evaluation}"]):
                self.say(f"{claim.name}: {j.evaluation} of {p.name}")
                try:
                    run(compose([*p.overrides]))
                except ConfigError as error:
                    self.say(f"{claim.name} {SKIPPED}: {error}")
                    self.broken.add(claim.name)
                    return 0
        if self._still_lacks(claim, jobs):
            self.say(f"{claim.name} {SKIPPED}: its runs still lack {jobs[0].evaluation} after evaluating.")
            self.broken.add(claim.name)
        return 0

    def _still_lacks(self, claim: ClaimText, jobs: Sequence[Job]) -> bool:
        primary, secondary = self._lacking([claim.name])[claim.name]
        return set(jobs) <= {*primary, *secondary}


def _sweep(fixed: Sequence[str], name: str = "judge") -> Sweep:
    return Sweep(Path(f"{name}.yaml"), "grid", (), tuple(fixed))


def study_of(workers: int, run: Sequence[str], say: Callable[[str], None], stack: int = OFF) -> tuple[Study, list[str]]:
    """A study on so many workers of this machine (AUTO: measured on `run`, one run's overrides), and the overrides that
    its runs take for that."""
    launcher, extra, workers = split_overrides(_sweep(run), (), workers, say)
    return Study(launcher, workers, say, stack), extra


def planned_of(job: Job, runs: Path, extra: Sequence[str] = ()) -> Iterator[Planned]:
    """The run of a job as a study knows it, at the arm's learning rate."""
    for p in plan(_sweep(job.overrides), [{"seed": job.seed}], runs, [*extra, f"optimizer.lr={job.rate!r}"]):
        yield replace(p, label=f"{job.arm} lr={job.rate:g}")


def tune_arms(arms: Mapping[tuple[str, ...], str], runs: Path, workers: int, form: Form,
              say: Callable[[str], None], stack: int = OFF) -> int:  # fmt: skip
    """Tune arms, by their overrides, as `albert-ablate tune` does, as many full runs each; its exit code."""
    # a classification run is tuned as the language model it builds on
    language = {tuple(o for o in a if o.partition("=")[0].split(".")[0] != "task"): name for a, name in arms.items()}
    objective = "best_val_loss"  # as claims are judged by test loss at the checkpoint chosen on validation
    sweeps = [_sweep(overrides, name) for overrides, name in language.items()]
    return tune_together(sweeps, runs, workers, (), form.rates, form.step, objective=objective, say=say, stack=stack)


def cost_rank(cfg: Mapping[str, Any]) -> float:
    """Tokens times layers times the square of the width: what orders runs by their price without building one."""
    model = cfg["model"]  # one of one's own names neither
    return float(cfg["budget"]["tokens"]) * model.get("layers", 1) * model.get("width", 1) ** 2
