"""Claims and records in, a ledger out: what may be compared, the differences per seed, the verdicts of STATISTICS.md.

The same claims and records give the same ledger, byte for byte: nothing in it depends on when or where it was made.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from albert_ablate.analysis.registry import Evidence, Measure, Missing, Unusable
from albert_ablate.config import TEXT, ConfigError, corrections, nearest, unwritable
from albert_ablate.judge import admission, registration
from albert_ablate.judge.claims import FORMS, ClaimsFile, ClaimText, Form, Part, arms_of, measure_of
from albert_ablate.records import store
from albert_ablate.records.checked import write_checked
from albert_ablate.records.folder import DONE
from albert_ablate.records.keys import Arm, Keys
from albert_ablate.records.tuning import read_tuning
from albert_ablate.stats import effects
from albert_ablate.stats.learning_rate import TUNING_SEEDS, pairs_missing, pairs_to_margin, slack_bound
from albert_ablate.stats.sequential import FIRST, MOST_PAIRS, Test, nominal, skew, skew_error
from albert_ablate.stats.verdicts import (
    NULLS,
    OPPOSITE,
    Claim,
    Contrast,
    PartResult,
    Verdict,
    deciding_look,
    verdicts,
)

OPEN = ("open", "undecided")  # verdicts that another pair may change
DECIDED = ("supported", "refuted", "no effect", "mixed", "within tuning slack")
UNDECIDED = ("inconclusive", "undecided")
ATTEMPTS = 3
TEST_WORDS = {
    "skew_corrected": "Judged by the t test and Johnson's modified t, which must agree, from pair 8 on.",
    "moderated": "Judged by the moderated t, whose spread is partly that of tuning runs, from pair 3 on.",
}
EVALUATED = ("tokens", "every")  # of the evaluations during training: their sample, and how often they are
NOT_PROVENANCE = ("created", "command")


@dataclass(frozen=True)
class Job:
    """A run that a contrast still lacks; rate None: its arm has to be tuned first."""

    arm: str
    overrides: tuple[str, ...]
    rate: float | None
    seed: int
    evaluation: str = ""


@dataclass
class Found:
    """What the records say about one contrast."""

    d: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    treatment: str = ""
    values: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    diverged: tuple[list[bool], list[bool]] = field(default_factory=lambda: ([], []))
    refusal: str = ""
    waiting: str = ""  # why the next pair is not there yet
    mixed: str = ""
    slack: float = 0.0  # bound on the tuning slack of the arms together; nan: unknown
    prior: float = 0.0  # variance of the paired differences of tuning runs, for the moderated t; 0: there is none
    untuned: bool = False  # an arm is to be tuned, or tuned further, which `--run` does
    notes: list[str] = field(default_factory=list)
    used: dict[str, Evidence] = field(default_factory=dict)
    trained: dict[str, Job] = field(default_factory=dict)  # by place: what trained a run that is used
    jobs: list[Job] = field(default_factory=list)


class _Arm:
    """An arm of a contrast: its runs, and the learning rate at which it is judged."""

    def __init__(self, name: str, overrides: tuple[str, ...], bench: "Bench", tuned: bool, factor: float):
        self.name, self.overrides = name, overrides
        self.composed = bench.arm(overrides)
        self.runs, self.outdated = bench.runs_of(overrides), bench.runs_of(overrides, outdated=True)
        # what decides is tuned as a language model
        trunk = tuple(o for o in overrides if o.partition("=")[0].split(".")[0] != "task")
        ids = sorted({r.record["arm"] for r in bench.runs_of(trunk) if r.record.get("arm")})
        found = [t for t in (read_tuning(bench.root, i) for i in ids) if t]
        self.tuning: Mapping[str, Any] | None = found[0] if found else None
        own = float(self.composed.cfg["optimizer"]["lr"])
        self.rate = float(self.tuning["rate"] if tuned and self.tuning else own) * factor
        self.known = bool(self.tuning) or not tuned  # False: to be tuned, or tuned further

    @property
    def full_runs(self) -> int:
        """Tuning runs at the full budget."""
        full = [c for c in self.tuning["curve"] if c["tokens"] == self.tuning["tokens"]] if self.tuning else []
        return sum(len(c["losses"]) for c in full)

    def at(self, seed: int, rate: float | None = None) -> Evidence | None:
        """The run of a seed and rate, whatever its status."""
        found = self.all_at(seed, rate)
        return found[0] if found else None

    def all_at(self, seed: int, rate: float | None = None) -> list[Evidence]:
        """Every record of a seed and rate: more than one where a setting has had several names."""
        wanted = self.rate if rate is None else rate
        return [r for r in self.runs if r.record["seed"] == seed and math.isclose(r.lr, wanted, rel_tol=1e-9)]

    def tuned_loss(self) -> float:
        """The least mean loss over tuning seeds, by which a level is chosen and nothing is judged."""
        assert self.tuning is not None
        means = [c["mean"] for c in self.tuning["curve"] if c["tokens"] == self.tuning["tokens"]]
        return min((m for m in means if m is not None), default=math.inf)


class Bench:
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
        for folder in store.run_folders(self.root) if self.root.is_dir() else ():
            place, written = f"{folder.parent.name}/{folder.name}", _written(folder)
            before, found = self._read.get(place, (None, None))
            if before != written:
                found = _evidence(folder, place)
                self._read[place] = written, found
            if isinstance(found, str):
                self.unreadable.append(found)
            elif found is not None:
                (self.outdated if corrections(found.record) else self.evidence).append(found)
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
        """Keep what is evidence; what is not stands beside the unreadable records."""
        admitted = []
        for run in self.evidence:
            if why := admission.refusal(run.folder, run.record):
                self.unreadable.append(f"{run.place}/record.json is not evidence: {why}")
            else:
                admitted.append(run)
        self.evidence = admitted

    def arm(self, overrides: Sequence[str]) -> Arm:
        """What overrides compose to; ConfigError for what is not allowed."""
        return self.keys.arm(overrides)

    def runs_of(self, overrides: Sequence[str], outdated: bool = False) -> list[Evidence]:
        """The runs, of any seed and rate, of an arm."""
        if outdated not in self._by_arm:
            self._by_arm[outdated] = self._arms(self.outdated if outdated else self.evidence)
        return self._by_arm[outdated].get(self.arm(overrides).keys.arm, [])


def _written(folder: Path) -> list[Any]:
    """When and how large a run's record and its evaluations were last written."""
    out: list[Any] = []
    for name in (store.FILE, "evaluations.json"):
        try:
            about = os.stat(folder / name)
            out.append((about.st_mtime_ns, about.st_size, about.st_ino))
        except OSError:
            out.append(None)
    return out


def _evidence(folder: Path, place: str) -> Evidence | str | None:
    """A run's record, why it cannot be read, or None where it is begun and nothing was committed."""
    record = store.read(folder)
    if isinstance(record, store.Record):
        if record.learning_rate is None:
            return f"{place}/record.json cannot be read: it has no config.optimizer.lr"
        return Evidence(folder, record)
    return None if record.missing else f"{place}/{record.reason}"


def judge(file: ClaimsFile, runs: Path, form: str = "screen") -> dict[str, Any]:
    """The ledger of a claims file from the records below `runs`."""
    return judged(file, runs, form).ledger


@dataclass(frozen=True)
class Judged:
    """A ledger; what was found of a claim's primary and secondary contrasts; the family's registration from now on."""

    ledger: dict[str, Any]
    found: dict[str, list[Found]]
    beside: dict[str, list[Found]]
    registration: dict[str, Any]


def judged(file: ClaimsFile, runs: Path, form: str, bench: Bench | None = None) -> Judged:
    """All claims of a form, together with those of another form that has been looked at: both share the level.

    bench: of the same runs, read before.
    """
    bench = bench or Bench(runs)
    chosen = [c for c in file.claims if form in c.forms]
    if not chosen:
        raise ConfigError(f"{file.path} has no claim with the form {form}.")
    kept = registration.registered(file, runs, form, lambda claim, form: _there(file, claim, form, bench))
    bench.seen = {(c.name, f) for c in file.claims for f in c.forms if registration.is_seen(kept, c.name, f)}
    asked: dict[tuple[str, str], Claim] = {}
    every = dict[tuple[str, str], list[Found]]()
    for f in [form, *(f for f in kept["looked"] if f != form)]:
        for c in (c for c in file.claims if f in c.forms):
            parts = c.contrasts(f)
            own = every[f, c.name] = [gather(file, c, p, f, bench) for p in parts]
            if not _refusals(own) and measure_of(parts[0]).kind != "exact":
                asked[f, c.name] = Claim(_contrasts(parts, own, c.test), c.forms[f].N, c.needs)  # type: ignore[arg-type]
            if any(x.seeds for x in own):
                kept["claims"][c.name]["forms"][f]["seen"] = True
    found = {c.name: every[form, c.name] for c in chosen}
    beside = {c.name: [gather(file, c, p, form, bench) for p in c.beside(form)] for c in chosen}
    forms = [f for f in FORMS if f in kept["forms"] or f == form]
    tests = file.size * len(forms)
    decided = dict(zip(asked, verdicts([*asked.values()], tests, file.alpha), strict=True))
    entries = [
        _entry(file, c, form, bench, found[c.name], beside[c.name], decided.get((form, c.name)), kept, tests)
        for c in chosen
    ]
    bench.keys.save()
    refused = [f"{e['name']}: {e['reason']}" for e in entries if e["verdict"] == "inadmissible"]
    gone = registration.gone(file, kept)
    ledger = {
        "version": 1,
        "claims_file": file.path.name,
        "form": form,
        "family": {"name": file.family, "size": file.size, "alpha": file.alpha, "forms": forms, "tests": tests},
        "claims": entries,
        "refusals": [*bench.unreadable, *refused, *gone],
        "unreadable": bench.unreadable,
        "gone": gone,
    }
    return Judged(ledger, found, beside, kept)


def _there(file: ClaimsFile, claim: ClaimText, form: str, bench: Bench) -> registration.There:
    """How many of a claim's runs are done, at whatever learning rate."""
    seeds = claim.seeds[: claim.forms[form].N]
    arms = dict[tuple[str, ...], set[int]]()
    pairs = 0
    for part in claim.contrasts(form):
        sides = [file.overrides(claim, part, form, a) for a in arms_of(part)]
        for side in sides:
            if side not in arms:
                done = [r for r in bench.runs_of(side) if r.record["status"] in DONE] if bench.evidence else []
                arms[side] = {r.record["seed"] for r in done}
        pairs += sum(all(s in arms[side] for side in sides) for s in seeds)
    there = sum(s in done for done in arms.values() for s in seeds)
    return registration.There(there, len(arms) * len(seeds), pairs)


def refuse_unknown(file: ClaimsFile, only: Sequence[str]) -> None:
    names = [c.name for c in file.claims]
    if bad := [n for n in only if n not in names]:
        raise ConfigError(f"{file.path} has no claim {bad[0]}: it has {nearest(bad[0], names)}.")


def _contrasts(parts: Sequence[Part], found: Sequence[Found], test: str) -> list[Contrast]:
    return [_contrast_of(p, f, test) for p, f in zip(parts, found, strict=True)]


def _contrast_of(part: Part, found: Found, test: str) -> Contrast:
    discrete = measure_of(part).discrete
    if discrete or (test == "moderated" and not found.prior):
        test = "t"
    own = Test(test, found.prior if test == "moderated" else 0.0)
    return Contrast(found.d, part.margin, part.null, found.slack, found.mixed, own, discrete)


def _refusals(found: Sequence[Found]) -> list[str]:
    return [f.refusal for f in found if f.refusal]


# --- what the records say of a contrast ------------------------------------------------------------------------------


def gather(file: ClaimsFile, claim: ClaimText, part: Part, form: str, bench: Bench) -> Found:
    """The differences of a contrast over the gapless prefix of its seeds, or why there are none."""
    out, m, f = Found(), measure_of(part), claim.forms[form]
    tuned = claim.rate_matters(m)
    arms = {a: _Arm(a, file.overrides(claim, part, form, a), bench, tuned, part.rate_factor) for a in arms_of(part)}
    treatment = _chosen(part, arms, out, claim)
    if treatment is None:
        return out
    out.treatment = treatment
    kept = [arms[a] for a in (arms_of(part) if part.other_end else [treatment, part.control, *part.singles])]
    if refusal := _no_contrast(kept):
        out.refusal = refusal
        return out
    out.notes += [_not_counted(a) for a in kept if a.outdated]
    if tuned and any(a.runs for a in kept):
        advised = (claim.name, form) not in bench.seen
        _check_tuning(kept, out, advised)
        if out.refusal:  # no pair at rates that are not those of the claim, so that nothing is seen of it before
            out.jobs = [Job(a.name, a.overrides, None, claim.seeds[0]) for a in kept if not a.known]
            return out
    _check_text(kept, out)
    rates: tuple[float, ...] = f.grid if m.kind == "grid" else ()
    used: dict[str, list[Evidence]] = {a.name: [] for a in kept}
    for seed in claim.seeds[: f.N]:
        runs = {a.name: [a.at(seed, r) for r in rates] if rates else [a.at(seed)] for a in kept}
        if refusal := _failed(runs):
            out.refusal = out.refusal or refusal
            break
        gaps = [
            Job(a.name, a.overrides, (r if rates else a.rate) if a.known else None, seed)
            for a in kept
            for r, run in zip(rates or (a.rate,), runs[a.name], strict=True)
            if run is None or run.record["status"] not in DONE
        ]
        if gaps:
            out.jobs = gaps
            out.waiting = _behind(kept, rates, claim.seeds[: f.N], seed, bench)
            break
        done = {name: [r for r in found if r is not None] for name, found in runs.items()}
        for a in kept:
            used[a.name] += done[a.name]
            out.refusal = out.refusal or _suspect(a, used[a.name], done[a.name], seed, rates)
        if refusal := _unfair(done, part.control, claim.equal, m):
            out.refusal = out.refusal or refusal
        try:
            _add_pair(out, m, part, treatment, done)
        except Missing as sentence:
            out.waiting = str(sentence)
            lacking = [(a, r) for a in kept for r in done[a.name]]
            out.jobs = [Job(a.name, a.overrides, r.lr, seed, m.evaluation) for a, r in lacking if m.evaluation]
            break
        except (Unusable, ValueError) as sentence:
            out.refusal = out.refusal or str(sentence)
            break
        out.seeds.append(seed)
        out.used |= {r.place: r for found in done.values() for r in found}
        out.trained |= {r.place: Job(a.name, a.overrides, r.lr, seed) for a in kept for r in done[a.name]}
    if m.looks and out.used:
        out.notes += _resolution([*out.used.values()][0], m)
    _notes(out, kept)
    if claim.test == "moderated":
        out.prior = _prior(arms, part, m)
        if not out.prior:
            out.notes.append(
                f"{treatment} against {part.control} is judged by the t test: no spread of {m.name} can be taken from "
                "tuning runs."
            )
    if m.loss and m.log and out.values[1] and tuned:
        level = _mean(out.values[1])
        slacks = {a.name: slack_bound(a.tuning) for a in kept if a.tuning and a.tuning.get("trained", True)}
        if part.other_end:  # of a mean of arms, and at most of the one end that counts
            slacks = {a: x / len(part.treatment) if a in part.treatment else x for a, x in slacks.items()}
        out.slack = float(sum(slacks.values()) / level) if slacks and math.isfinite(level) else 0.0
        if unknown := [name for name, slack in slacks.items() if math.isnan(slack)]:
            out.notes.append(
                f"The tuning slack of {' and '.join(unknown)} is unknown: it is not held against the verdict."
            )
    return out


def tuning_variance(file: ClaimsFile, claim: ClaimText, part: Part, form: str, bench: Bench) -> float:
    """Variance of a pair's difference as the tuning runs have it; 0 where it cannot be had."""
    arms = {a: _Arm(a, file.overrides(claim, part, form, a), bench, True, 1.0) for a in arms_of(part)}
    return _prior(arms, part, measure_of(part))


def _prior(arms: Mapping[str, _Arm], part: Part, m: Measure) -> float:
    """Mean over the best rate of each arm and its two neighbors of the variance over tuning seeds of the difference.

    0 where it cannot be had: a rate is missing, a run diverged, or the tuning runs lack the measure.
    """
    # of gaps the spread of tuning runs was .34 and .44 of that of pairs, of losses .7 to 1.4 (docs/verdicts.md)
    plain = m.kind == "run" and m.loss and m.log and not part.singles and part.rate_factor == 1
    if not plain or len(part.treatment) > 1:
        return 0.0
    treatment, control = arms[part.treatment[0]], arms[part.control]
    sides = [_around_best(arm) for arm in (treatment, control)]
    seeds = sorted({r.record["seed"] for r in treatment.runs if r.record.get("role") == "tuning"})[:TUNING_SEEDS]
    if not all(sides) or len(seeds) < TUNING_SEEDS:
        return 0.0
    found = []
    for rates in zip(*sides, strict=True):
        runs = [[arm.at(s, rate) for s in seeds] for arm, rate in zip((treatment, control), rates, strict=True)]
        if any(r is None or r.record["status"] != "finished" for side in runs for r in side):
            return 0.0
        try:
            values = [[float(m.of(r)) for r in side] for side in runs]
            d = effects.signed_difference(values[0], values[1], part.direction, m.log)  # type: ignore[arg-type]
        except (Missing, Unusable, ValueError):
            return 0.0
        found.append(d.var(ddof=1))
    return float(np.mean(found))


def _around_best(arm: _Arm) -> list[float]:
    """The best rate at the full budget and its neighbors."""
    curve = [c for c in (arm.tuning or {"curve": ()})["curve"] if c["tokens"] == arm.tuning["tokens"]]  # type: ignore[index]
    means = {c["rate"]: math.inf if c["mean"] is None else c["mean"] for c in curve}
    rates = sorted(means)
    best = rates.index(min(means, key=lambda r: means[r])) if means else 0
    return rates[best - 1 : best + 2] if 0 < best < len(rates) - 1 else []


def _chosen(part: Part, arms: Mapping[str, _Arm], out: Found, claim: ClaimText) -> str | None:
    """The treatment, of several levels the one that is best on tuning seeds."""
    if len(part.treatment) == 1 or part.other_end:
        return part.treatment[0] if len(part.treatment) == 1 else f"the mean of {_and(part.treatment)}"
    if lacking := [a for a in part.treatment if arms[a].tuning is None]:
        out.waiting = f"The level is chosen on tuning seeds, and {', '.join(lacking)} has not been tuned."
        out.treatment = "|".join(part.treatment)
        out.jobs = [Job(a, arms[a].overrides, None, claim.seeds[0]) for a in lacking]
        return None
    best = min(part.treatment, key=lambda a: arms[a].tuned_loss())
    out.notes.append(f"Of {', '.join(part.treatment)} tuning seeds chose {best}.")
    return best


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _control(part: Part) -> str:
    return f"the better of {part.control} and {part.other_end}" if part.other_end else part.control


def _not_counted(arm: _Arm) -> str:
    what = "; ".join(corrections(arm.outdated[0].record))
    return f"Runs of {arm.name} that do not count, because of a correction made since: {len(arm.outdated)} ({what})."


def _no_contrast(arms: Sequence[_Arm]) -> str:
    """Why these arms cannot be compared whatever their runs say, or "": nothing has to be trained to see it."""
    for a, b in combinations(arms, 2):
        x, y = a.composed, b.composed
        if x.keys.arm == y.keys.arm and a.rate == b.rate:
            return f"{a.name} and {b.name} are the same arm: nothing differs."
        one, other = _text_of(x), _text_of(y)
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                name, values = key.removesuffix("._target_"), [str(z.get(key)) for z in (one, other)]
                if name != key:  # a component, by its last name
                    values = [v.rpartition(".")[2] for v in values]
                return f"Different data: {name} is {values[0]} in {a.name} and {values[1]} in {b.name}."
    for a, b in combinations(arms, 2):
        looked = [z.composed.cfg.get("evaluation") or {} for z in (a, b)]
        for key in (*EVALUATED, "weights"):
            if looked[0].get(key) != looked[1].get(key):
                p, q = (found.get(key) for found in looked)
                return f"Measured unlike: evaluation.{key} is {p} in {a.name} and {q} in {b.name}."
    return ""


def _text_of(arm: Arm) -> dict[str, Any]:
    """What an arm is trained on, by dotted key: the arms of a contrast must agree in it."""
    return {f"{group}.{name}": value for group in TEXT for name, value in arm.cfg[group].items()} | dict(arm.places)


RULES = {  # what must be equal in how the arms were tuned, and its words
    "rule": "rule", "rates": "rates of the first stage", "step": "step", "objective": "objective", "seeds": "seeds",
    "tokens": "tokens",
}  # fmt: skip


def _check_tuning(arms: Sequence[_Arm], out: Found, advised: bool) -> None:
    """Refuse arms that are not tuned, not alike, or still at an end of what was run; mark those that `--run` tunes.

    advised: whether advice to edit the claim may be given, which it may not once a pair was judged.
    """
    for a in arms:
        if a.tuning is None:
            out.untuned, a.known = True, False
            out.refusal = out.refusal or (
                f"The learning rate of {a.name} is not tuned: albert-ablate judge --run tunes it"
                + (", or set tuned: [] in the claim." if advised else ".")
            )
        elif edge := a.tuning.get("edge"):
            # files of the rule before this one ended at four rates
            a.known = a.tuning.get("rule") is not None
            out.untuned |= not a.known
            out.refusal = out.refusal or (
                f"The best learning rate of {a.name} is the {edge}est that was run, "
                + (
                    "by an older rule: albert-ablate judge --run tunes it on."
                    if not a.known
                    else "after four moves of the window: give the arm an optimizer.lr nearer to it."
                    if advised
                    else "after four moves of the window: a new claim can give the arm an optimizer.lr nearer to it."
                )
            )
        elif not a.tuning.get("trained", True):
            out.notes.append(f"No learning rate trains {a.name}: its runs are diverged.")
        elif a.tuning.get("fitted") is False:
            out.notes.append(f"No parabola was fitted for {a.name}: its learning rate is the best one that was run.")
    _refuse_unlike_tuning([a for a in arms if a.tuning], out)


def _refuse_unlike_tuning(arms: Sequence[_Arm], out: Found) -> None:
    for a, b in combinations(arms, 2):
        assert a.tuning is not None and b.tuning is not None
        unlike = [words for key, words in RULES.items() if a.tuning.get(key) != b.tuning.get(key)]
        if not unlike and a.full_runs != b.full_runs:
            unlike = [f"number of full runs ({a.full_runs} and {b.full_runs})"]
        if unlike:
            out.untuned, a.known, b.known = True, False, False
            out.refusal = out.refusal or (
                f"{a.name} and {b.name} were tuned with another {unlike[0]}: albert-ablate judge --run tunes them "
                "alike."
            )


def _check_text(arms: Sequence[_Arm], out: Found) -> None:
    texts = {(r.record.get("data") or {}).get("fingerprint") for a in arms for r in a.runs}
    if len(texts) > 1:
        out.refusal = (
            "Mixed corpora or tokenizers: the arms' runs were trained on "
            f"{len(texts)} different texts, by their fingerprints."
        )


def _behind(arms: Sequence[_Arm], rates: Sequence[float], seeds: Sequence[int], seed: int, bench: Bench) -> str:
    """What a missing seed holds up, and the record of it that cannot be read; "" where it is only the next one."""

    def lacks(arm: _Arm, at: int) -> bool:
        return any((r := arm.at(at, rate)) is None or r.record["status"] not in DONE for rate in rates or (arm.rate,))

    lacking = [a for a in arms if lacks(a, seed)]
    waiting = sum(not any(lacks(a, s) for a in arms) for s in seeds[seeds.index(seed) + 1 :])
    places = {
        f"{r.folder.parent.name}/seed{seed}/"
        for a in lacking for r in a.runs if any(math.isclose(r.lr, rate, rel_tol=1e-9) for rate in rates or (a.rate,))
    }  # fmt: skip
    unreadable = [text for text in bench.unreadable if any(text.startswith(place) for place in places)]
    if not waiting and not unreadable:
        return ""
    pairs = f"{waiting} pair{'s wait' if waiting > 1 else ' waits'}" if waiting else "no pair waits"
    said = f"Seed {seed} of {' and '.join(a.name for a in lacking)} is missing, and {pairs} behind it"
    return f"{said}: {'; '.join(unreadable)}." if unreadable else f"{said}."


def _suspect(arm: _Arm, used: Sequence[Evidence], new: Sequence[Evidence], seed: int, rates: Sequence[float]) -> str:
    """Why an arm's runs of a seed cannot be taken beside those before it, or ""."""
    several = [found for rate in rates or (arm.rate,) if len(found := arm.all_at(seed, rate)) > 1]
    return (
        next((text for found in several if (text := admission.doubled(arm.name, found))), "")
        or admission.repeated(arm.name, used)
        or next((text for r in new if (text := admission.edited(r))), "")
    )


def _failed(runs: Mapping[str, Sequence[Evidence | None]]) -> str:
    for name, found in runs.items():
        for r in found:
            if r is not None and r.record["status"] == "failed" and r.record.get("sessions", 0) >= ATTEMPTS:
                why = (r.record.get("error") or "no reason kept").strip().splitlines()[-1]
                return f"Seed {r.record['seed']} of {name} failed after {r.record['sessions']} attempts: {why}"
    return ""


def _unfair(runs: Mapping[str, Sequence[Evidence]], control: str, equal: Mapping[str, float], m: Measure) -> str:
    """Why runs of one seed must not be compared, or ""."""
    base = runs[control]
    for name, own in runs.items():
        if name == control:
            continue
        for a, b in zip(own, base, strict=True):
            seed = a.record["seed"]
            for key, tolerance in equal.items():
                x, y = _held(a, key), _held(b, key)
                if x is not None and y is not None and abs(x - y) > tolerance * max(abs(x), abs(y)):
                    return (
                        f"{key} must be equal{f' within {100 * tolerance:g} %' if tolerance else ''}; {name} has "
                        f"{x:,.6g} and {control} {y:,.6g} (seed {seed})."
                    )
            if unlike := _measured_unlike(a, b, m):
                return f"{name} and {control} were measured unlike (seed {seed}): {unlike}."
            if not _same_order(a, b):
                return f"The runs of seed {seed} saw different data or another order: {name} and {control} are no pair."
    return ""


def _measured_unlike(a: Evidence, b: Evidence, m: Measure) -> str:
    """What a measure depends on beside the weights and in which two runs differ, or ""."""
    if m.kind in ("exact", "initial"):
        return ""
    x, y = ((r.record["config"].get("evaluation") or {}) for r in (a, b))
    found = {f"evaluation.{k}": (x.get(k), y.get(k)) for k in EVALUATED}
    if m.evaluation:
        one, other = a.asked(m.evaluation), b.asked(m.evaluation)
        if None in (one["weights"], other["weights"]):
            return ""  # not asked yet, which is said elsewhere
        found = {f"{m.evaluation}.{k}": (one.get(k), other.get(k)) for k in sorted(one.keys() | other.keys())}
    return next((f"{key} is {p} in one and {q} in the other" for key, (p, q) in found.items() if p != q), "")


def _held(run: Evidence, key: str) -> float | None:
    record = run.record
    if key == "tokens":
        return (record.get("budget") or {}).get("tokens")
    if key == "parameters":
        return record["summary"].get("parameters")
    tokens, flops = record["summary"].get("tokens"), record["cost"].get("flops")
    return flops / tokens if tokens and flops else None


def _same_order(a: Evidence, b: Evidence) -> bool:
    """Whether both consumed the same batches, up to the last evaluation that both reached."""
    ends = [r.record.get("proof", {}).get("data_order") for r in (a, b)]
    if None not in ends and a.record["summary"].get("tokens") == b.record["summary"].get("tokens"):
        return ends[0] == ends[1]
    try:
        chains = [dict(zip(r.column("evals", "step"), r.column("evals", "data_order"), strict=True)) for r in (a, b)]
    except (Missing, ConfigError):
        return False
    common = set(chains[0]) & set(chains[1])
    return bool(common) and chains[0][max(common)] == chains[1][max(common)]


def _add_pair(out: Found, m: Measure, part: Part, treatment: str, runs: Mapping[str, Sequence[Evidence]]) -> None:
    better = part.direction
    if part.other_end:
        _add_curve(out, m, part, runs)
        return
    t, c = runs[treatment], runs[part.control]
    if m.kind == "initial":
        lost = [not math.isfinite(m.of(side[0])) for side in (t, c)]
    else:
        lost = [any(r.diverged for r in side) and m.kind != "grid" for side in (t, c)]
    value, other = math.nan, math.nan
    if part.singles:
        cells = [runs[a][0] for a in (treatment, part.control, *part.singles)]
        scale: Callable[[float], float] = math.log if m.log else float
        full, base, *singles = [math.nan if r.diverged else scale(_finite(m, r, r)) for r in cells]
        d = float(effects.more_than_the_sum([full], [base], [singles], better)[0])  # type: ignore[arg-type]
        if dead := [a for a in runs if all(r.diverged for r in runs[a])]:
            out.mixed = f"Runs of {', '.join(dead)} diverged: a diverged cell is no interaction."
        value, other = (math.exp(x) if m.log else x for x in (full, base))
    elif m.kind == "pair":
        if any(lost):
            d = math.nan if all(lost) else (-math.inf if lost[0] else math.inf)
        else:
            d = float(m.of(t[0], c[0])) * (1 if better == m.better else -1)
            if not math.isfinite(d):
                raise Unusable(f"{t[0].name} and {c[0].name} have no finite {m.name}.")
    else:
        value, other = (
            math.nan if gone else _finite(m, side if m.kind == "grid" else side[0], side[0])
            for gone, side in zip(lost, (t, c), strict=True)
        )
        d = float(effects.signed_difference([value], [other], better, m.log, [lost[0]], [lost[1]])[0])  # type: ignore[arg-type]
    out.d.append(d)
    out.values[0].append(value)
    out.values[1].append(other)
    for side, gone in zip(out.diverged, lost, strict=True):
        side.append(gone)


def _add_curve(out: Found, m: Measure, part: Part, runs: Mapping[str, Sequence[Evidence]]) -> None:
    """The mean of the treatments against the better one of the two ends of the curve, both of this seed.

    The better end is chosen after the fact, which only makes the difference smaller: E min <= min E. So where the mean
    of these differences is above a margin, the treatments' mean is better than either end by it, and so is the best.
    """
    sign = 1 if part.direction == "lower" else -1
    lost = {a: runs[a][0].diverged for a in runs}
    x = {
        a: math.inf if lost[a] else sign * (math.log(v) if m.log else v)
        for a in runs for v in [1.0 if lost[a] else _finite(m, runs[a][0], runs[a][0])]
    }  # fmt: skip
    inner, end = float(np.mean([x[a] for a in part.treatment])), min(x[part.control], x[part.other_end])
    out.d.append(math.nan if math.isinf(inner) and math.isinf(end) else end - inner)
    for side, gone, value in zip((0, 1), (math.isinf(inner), math.isinf(end)), (inner, end), strict=True):
        out.values[side].append(math.nan if gone else math.exp(sign * value) if m.log else sign * value)
        out.diverged[side].append(gone)


def _finite(m: Measure, what: Any, run: Evidence) -> float:
    value = float(m.of(what))
    if not math.isfinite(value):
        raise Unusable(f"{run.name} finished without a finite {m.name}.")
    return float(f"{value:.12g}") if m.kind == "exact" else value


def _resolution(run: Evidence, m: Measure) -> list[str]:
    """How finely a measure that is read from the evaluations during training can tell."""
    try:
        count, apart = run.between_evaluations()
    except (Missing, ConfigError):
        return []
    where = f"{count} evaluations on validation text, {apart:,.0f} tokens apart"
    if m.kind == "pair" or m.name == "mean_val_loss":
        return [f"{m.name} is read from {where}: it tells nothing finer."]
    return [f"{m.name} is taken at the best of {where}."]


def _notes(out: Found, arms: Sequence[_Arm]) -> None:
    """What a reader should know: provenance that differs, initial weights that are not shared."""
    places: dict[str, list[dict[str, str]]] = {}
    for a in arms:
        for r in out.used.values():
            if r in a.runs:
                flat = {k: json.dumps(v, sort_keys=True) for k, v in (r.record.get("provenance") or {}).items()}
                places.setdefault(a.name, []).append(flat)
    keys = {k for rows in places.values() for row in rows for k in row} - set(NOT_PROVENANCE)
    differ = [k for k in sorted(keys) if len({frozenset(row.get(k) for row in rows) for rows in places.values()}) > 1]
    if differ:
        out.notes.append(f"Provenance differs between the arms: {', '.join(differ)}.")
    first = [next((r for r in out.used.values() if r in a.runs), None) for a in arms]
    for a, own in zip(arms[:-1], first[:-1], strict=True):
        other = next((x for x in arms[-1].runs if own and x.record["seed"] == own.record["seed"]), None)
        x, y = ((z.record.get("proof") or {}).get("initial_draws") or {} if z else {} for z in (own, other))
        if x and y:
            shared = sum(y.get(k) == v for k, v in x.items())
            if shared < max(len(x), len(y)):
                out.notes.append(
                    f"{a.name} and {arms[-1].name} share {shared} of {max(len(x), len(y))} initial draws of a seed."
                )


# --- entries of the ledger -------------------------------------------------------------------------------------------


def _entry(file: ClaimsFile, claim: ClaimText, form: str, bench: Bench, found: Sequence[Found], beside: Sequence[Found],
           verdict: Verdict | None, kept: dict[str, Any], tests: int) -> dict[str, Any]:  # fmt: skip
    f, primary, refused = claim.forms[form], claim.contrasts(form), _refusals(found)
    exact = measure_of(primary[0]).kind == "exact"
    if refused:
        word, reason = "inadmissible", refused[0]
    elif exact:
        word, reason = _exactly(primary[0], found[0])
    else:
        assert verdict is not None
        word, reason = verdict.verdict, verdict.reason
    waiting = [x.waiting for x in found if x.waiting]
    if word in OPEN and waiting:
        reason = waiting[0]
    detail = _never_trains(word, claim, found, form) or (verdict.detail if verdict else "")
    if exact and word == "refuted":
        detail = OPPOSITE
    if verdict and verdict.failed:
        reason = " ".join(
            f"Part {i + 1} fails, {_named(primary[i], found[i])}: {how}." for i, how in verdict.failed.items()
        )
    parts = [
        _shown(p, x, f, file.alpha, claim.test, verdict.parts[i] if verdict else None)
        for i, (p, x) in enumerate(zip(primary, found, strict=True))
    ]
    for p, x in zip(parts, found, strict=True):
        if word in UNDECIDED and verdict:
            p["missing"] = _missing(claim, f.N, p, x.d, verdict)
        else:
            p["pairs_to_margin"] = None  # nothing is missing where a verdict stands
    if verdict and word in DECIDED:
        for p, x, result in zip(parts, found, verdict.parts, strict=True):
            p["decided_at"] = deciding_look(result, word)
            after = [v for v in x.d[p["decided_at"] :] if math.isfinite(v)]
            p["after"] = float(np.mean(after)) if p["decided_at"] and after else None
    secondary = [
        _shown(p, x, f, file.alpha, claim.test) | ({"notes": [x.refusal]} if x.refusal else {})
        for p, x in zip(claim.beside(form), beside, strict=True)
    ]
    used = {place: run for x in (*found, *beside) for place, run in x.used.items()}
    judged_by = {p["test"] for p in parts} - {"t"}
    notes = list(dict.fromkeys([*waiting, *(n for x in found for n in x.notes)]))
    if word not in OPEN and any(p["pairs"] < 8 for p in parts) and word != "inadmissible" and not exact:
        notes.append("Below 8 pairs a verdict rests on normal differences.")
    notes += [TEST_WORDS[name] for name in sorted(judged_by)]
    if verdict and not refused and not exact and any(p["pairs"] >= FIRST for p in parts):
        notes += [*_all_looks(file.alpha, tests, verdict, word), *(t for p in parts if (t := _step_words(p, word)))]
        notes += [t for p, r in zip(parts, verdict.parts, strict=True) if (t := margin_words(p, r, len(parts) > 1))]
    regime = file.regime(claim, form)
    how, edited = registration.status(file, claim, form, kept)
    entry = {
        "name": claim.name,
        "statement": claim.statement,
        "sentence": "",
        "verdict": word,
        "detail": detail,
        "reason": reason,
        "regime": regime,
        "registration": how,
        "edited": edited,
        "N": f.N,
        "needs": claim.needs,
        "p_effect": verdict.p_effect if verdict else 1.0,
        "p_inside": verdict.p_inside if verdict else 1.0,
        "level_effect": verdict.level_effect if verdict else None,
        "level_inside": verdict.level_inside if verdict else None,
        "parts": parts,
        "secondary": secondary,
        "cost": _cost(used, bench, file, claim, form),
        "notes": notes,
    }
    entry["sentence"] = sentence(entry)
    return entry


def _named(part: Part, found: Found) -> str:
    return f"{found.treatment or '|'.join(part.treatment)} against {_control(part)}, {part.measure}"


def _never_trains(word: str, claim: ClaimText, found: Sequence[Found], form: str) -> str:
    """The control never trains: where a verdict rests on an arm all of whose runs diverged in every part."""
    side = {"supported": ("control", 1), "refuted": ("treatment", 0)}.get(word)
    if side is None or not all(f.diverged[side[1]] and all(f.diverged[side[1]]) for f in found):
        return ""
    initial = all(measure_of(p).kind == "initial" for p in claim.contrasts(form))
    return f"the {side[0]} {'has no finite value' if initial else 'never trains'}"


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 10 <= n % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def _all_looks(alpha: float, tests: int, verdict: Verdict, word: str) -> list[str]:
    """p with all looks counted, beside the level it needed."""
    inside = word == "no effect" or (word == "refuted" and verdict.p_inside <= verdict.level_inside)
    p, level = (verdict.p_inside, verdict.level_inside) if inside else (verdict.p_effect, verdict.level_effect)
    of = f" ({_ordinal(tests - round(alpha / level) + 1)} of {tests} by Holm)" if tests > 1 else ""
    what = "of an effect inside the margin " if inside else ""
    return [f"p {what}= {p:.2g} with all looks counted; {level:.2g} was needed{of}."]


def _step_words(p: Mapping[str, Any], word: str) -> str:
    """Why a 95 % interval that excludes the null value is no verdict: what Holm's step leaves of it."""
    shift = NULLS[p["null"]] * p["margin"]
    if word not in UNDECIDED or p["low"] <= shift <= p["high"] or not p["step"][0] <= shift <= p["step"][1]:
        return ""
    low, high = (_size(p, x) for x in p["step"])
    if p["direction"] == "lower" and not p["singles"]:
        low, high = high, low
    return f"At the level that the family leaves this claim, the interval of {_contrast(p)} is {low} to {high}."


def margin_words(p: Mapping[str, Any], result: PartResult, several: bool) -> str:
    """How the verdict on a contrast depends on its margin, at the levels of this ledger; "" where a run diverged."""
    if result.finished < result.pairs or result.pairs < FIRST:
        return ""
    low, high, inside = result.step_low, result.step_high, result.inside_from
    said = []
    if p["null"] == "margin" and low > 0:
        said.append(f"better by any margin up to {_margin(p, low)}")
    if p["null"] == "margin" and high > 0:
        said.append(f"not better by {_margin(p, high)} or more")
    if p["null"] == "-margin" and low < 0:
        said.append(f"not worse by margins from {_margin(p, -low)} on")
    if p["null"] == "0" and (low > 0 or high < 0) and p["margin"] < inside:
        said.append(f"an effect for every margin below {_margin(p, inside)}, and within it from there on")
    elif p["null"] != "-margin" and math.isfinite(inside):
        said.append(f"no effect for margins from {_margin(p, inside)} on")
    if not said:
        return ""
    return f"By margin{f', {_contrast(p)}, ' + p['measure'] if several else ''}: {'; '.join(said)}."


def _margin(p: Mapping[str, Any], value: float) -> str:
    """A margin in the unit that the claim names it in: percent of log ratios."""
    return f"{100 * math.expm1(value):.3g} %" if p["log"] else f"{value:.3g} {p['unit']}"


def _size(p: Mapping[str, Any], value: float) -> str:
    return _change(p, value) if math.isfinite(value) else "no end"


def _contrast(p: Mapping[str, Any]) -> str:
    return f"{p['treatment']} against {p['control']}"


def _exactly(part: Part, found: Found) -> tuple[str, str]:
    """The verdict on a measure without noise: no test, no n."""
    t, c = ([v for v in values if math.isfinite(v)] for values in found.values)
    if not t or not c:
        return "open", found.waiting or "No pair of finished runs yet."
    m = measure_of(part)
    try:
        return effects.compare_exactly(t, c, part.margin, part.direction, m.log).verdict, "Compared exactly."  # type: ignore[arg-type]
    except ValueError as error:
        return "inadmissible", str(error)


def _shown(
    part: Part, found: Found, f: Form, alpha: float, test: str, result: PartResult | None = None
) -> dict[str, Any]:
    m, n = measure_of(part), len(found.d)
    exact = m.kind == "exact" and len(set(found.d)) == 1  # skipped blocks make operations random
    if result is None and not exact:
        alone = _contrast_of(part, found, test)
        result = verdicts([Claim([alone], f.N)], 1, alpha)[0].parts[0]
    mean, low, high = (result.mean, result.low, result.high) if result else ((found.d[0] if exact else math.nan),) * 3
    level = nominal(0.05, f.N)
    rates = [
        [sum(s), n, *effects.rate_interval(sum(s), n, level)[1:]] if n else [0, 0, 0.0, 1.0] for s in found.diverged
    ]
    return {
        "treatment": found.treatment or "|".join(part.treatment),
        "control": _control(part),
        "singles": list(part.singles),
        "measure": m.name,
        "unit": m.unit,
        "log": m.log,
        "direction": part.direction,
        "margin": part.margin,
        "null": part.null,
        "rate_factor": part.rate_factor,
        "pairs": n,
        "mean": mean,
        "low": low,
        "high": high,
        "percent": _percent(part, m, mean, low, high),
        "step": [result.step_low, result.step_high] if result else [mean, mean],
        "treatment_mean": _mean(found.values[0]),
        "control_mean": _mean(found.values[1]),
        "finished": result.finished if result else n,
        "lost": result.lost if result else 0,
        "treatment_diverged": rates[0],
        "control_diverged": rates[1],
        "correlation": _try(lambda: list(effects.correlation(*found.values))),
        "pairs_to_margin": _try(lambda: list(pairs_to_margin(found.d, part.margin))) if not exact else None,
        "skew": _skew(found.d),
        "rank": result.rank if result else "not tested",
        "looks": [asdict(look) for look in result.looks] if result else [],
        "seeds": found.seeds,
        "d": found.d,
        "test": _contrast_of(part, found, test).test.name,
        "tuning_slack": "unknown" if math.isnan(found.slack) else found.slack,
    }


def _skew(d: Sequence[float]) -> list[float] | None:
    """Skew of the finite differences and its standard error under normal ones; None of fewer than FIRST."""
    finite = np.asarray(d, float)
    finite = finite[np.isfinite(finite)]
    found = float(skew(finite)) if len(finite) >= FIRST else math.nan
    return [found, skew_error(len(finite))] if math.isfinite(found) else None


def _missing(claim: ClaimText, N: int, part: Mapping[str, Any], d: Sequence[float],
             verdict: Verdict) -> dict[str, Any] | None:  # fmt: skip
    """The fewest pairs in all with which a verdict would come if mean and spread stay as they are, and which one.

    At the Holm steps that the claim stands at. None where a run diverged, before the first look, and where the mean
    lies on what it is to be told from.
    """
    if len(d) < FIRST or not np.isfinite(d).all() or part["test"] != "t":
        return None
    mean, margin, parts = float(np.mean(d)), part["margin"], len(verdict.parts)
    shift = NULLS[part["null"]] * margin
    ways = [(abs(mean - shift), verdict.level_effect / (parts if claim.needs == "any" else 1), shift)]
    if shift >= 0 and margin > abs(mean):
        level = verdict.level_inside / (parts if claim.needs == "all" else 1)
        ways.append((margin - abs(mean), 2 * level, math.copysign(margin, mean)))
    found = []
    for distance, level, other in ways:
        try:
            pairs = pairs_missing(d, distance, N, level) if distance > 0 else None
        except ValueError:
            continue
        if pairs:
            found.append((pairs, other))
    if not found:
        return None
    pairs, other = min(found, key=lambda x: x[0][0])
    return {"pairs": pairs, "from": _percent_of(part, other) if part["percent"] else other}


def _percent_of(part: Mapping[str, Any], value: float) -> float:
    """A log ratio in favor of the treatment as the change of the measure in percent."""
    return 100 * math.expm1(-value if part["direction"] == "lower" else value)


def _percent(part: Part, m: Measure, mean: float, low: float, high: float) -> list[float] | None:
    """Change of the measure from control to treatment in percent (lower is negative), of a log ratio."""
    if not m.log or math.isnan(mean) or part.singles:
        return None
    if part.direction == "lower":
        mean, low, high = -mean, -high, -low
    return [math.inf if x >= 700 else 100 * math.expm1(x) + 0.0 for x in (mean, low, high)]


def _mean(values: Sequence[float]) -> float:
    fine = [v for v in values if math.isfinite(v)]
    return float(np.mean(fine)) if fine else math.nan


def _try(of: Callable[[], list[float]]) -> list[float] | None:
    try:
        return of()
    except ValueError:
        return None


def _cost(
    used: Mapping[str, Evidence], bench: Bench, file: ClaimsFile, claim: ClaimText, form: str
) -> dict[str, float]:
    """Seconds, tokens and runs so far, those of tuning included; runs shared between claims count in each."""
    settings = set[str]()
    for part in (*claim.contrasts(form), *claim.beside(form)):
        for arm in arms_of(part) if claim.rate_matters(measure_of(part)) else ():
            for r in bench.runs_of(file.overrides(claim, part, form, arm)):
                tuning = read_tuning(bench.root, r.record["arm"]) if r.record.get("arm") else None
                settings |= set((tuning or {}).get("runs", ()))
    tuning_runs = {
        r.place: r for r in bench.evidence if r.folder.parent.name in settings and r.record.get("role") == "tuning"
    }
    every = [*({**tuning_runs, **used}).values()]
    return {
        "seconds": float(sum(r.record["cost"].get("seconds") or 0 for r in every)),
        "tokens": int(sum(r.record["summary"].get("tokens") or 0 for r in every)),
        "runs": len(every),
        "tuning_runs": len(tuning_runs),
    }


# --- words -----------------------------------------------------------------------------------------------------------


def effect_words(p: Mapping[str, Any]) -> str:
    """-0.4 % (95 % interval -0.9 to +0.1, 8 pairs), or in the measure's unit."""
    numbers = p["percent"] or [p["mean"], p["low"], p["high"]]
    unit = " %" if p["percent"] else " (log ratio)" if p["log"] else f" {p['unit']}"
    if math.isnan(numbers[0]):
        lost = [f"{p[side]} diverged in {p[f'{side}_diverged'][0]}" for side in ("treatment", "control")]
        return f"no finite difference in {p['pairs']} pairs ({', '.join(lost)})"
    if not p["percent"] and p["direction"] == "lower" and not p["singles"]:
        numbers = [-numbers[0], -numbers[2], -numbers[1]]
    mean, low, high = (f"{x + 0.0:+.3g}" for x in numbers)  # +0.0: no minus zero
    if p["rank"] == "not tested":
        return f"{mean}{unit} (exact)"
    interval = f"95 % interval {low} to {high}" if math.isfinite(numbers[1]) else _no_interval(p)
    return f"{mean}{unit} ({interval}, {_pairs(p)})"


def _no_interval(p: Mapping[str, Any]) -> str:
    return "the intervals of the looks have nothing in common" if math.isnan(p["low"]) else "no interval"


def _pairs(p: Mapping[str, Any]) -> str:
    """12 pairs; decided at pair 7, -0.23 % in the 5 pairs after it."""
    out = f"{p['pairs']} pairs" + (f", {p['finished']} of which finished" if p["finished"] < p["pairs"] else "")
    if not p.get("decided_at"):
        return out
    out += f"; decided at pair {p['decided_at']}"
    rest = p["pairs"] - p["decided_at"]
    if not rest:
        return out
    after = "no finite difference" if p["after"] is None else _change(p, p["after"])
    return f"{out}, {after} in the {f'{rest} pairs' if rest > 1 else 'pair'} after it"


def _change(p: Mapping[str, Any], value: float) -> str:
    """A difference in favor of the treatment as the change of the measure, as `effect_words` says it."""
    if p["measure"] in RATIOS:
        verb, noun, less, more = RATIOS[p["measure"]]
        change = math.expm1(min(value if p["direction"] == "lower" else -value, 700))
        return f"{100 * abs(change):.3g} % {less if change < 0 else more}"
    if p["percent"]:
        return f"{_percent_of(p, value) + 0.0:+.3g} %"
    sign = -1 if p["direction"] == "lower" and not p["singles"] else 1
    return f"{sign * value + 0.0:+.3g}{' (log ratio)' if p['log'] else ' ' + p['unit']}"


RATIOS = {  # measures of a pair that are ratios: verb, what of, and the words for less and more of it
    "speedup": ("needed", "tokens", "fewer", "more"),
    "speedup_flops": ("needed", "FLOPs", "fewer", "more"),
    "loss_at_equal_flops": ("had", "loss at equal FLOPs", "less", "more"),
}


def ratio_words(p: Mapping[str, Any]) -> str:
    """pre needed 0.4 % fewer tokens than post (95 % interval 1.2 % more to 2 % fewer, 8 pairs)."""
    verb, noun, less, more = RATIOS[p["measure"]]
    sign = -1 if p["direction"] == "higher" else 1  # of the log ratio treatment over control, for positive = as claimed
    mean, *ends = (math.expm1(min(sign * p[k], 700)) for k in ("mean", "low", "high"))

    def said(change: float) -> str:
        return f"{100 * abs(change):.3g} % {less if change < 0 else more}"

    same = all(x < 0 for x in (mean, *ends)) or all(x > 0 for x in (mean, *ends))
    shown = [f"{100 * abs(x):.3g}" if same else said(x) for x in ends]
    if same:
        shown = [min(shown, key=float), max(shown, key=float)]
    interval = f"95 % interval {shown[0]} to {shown[1]}" if math.isfinite(p["low"]) else _no_interval(p)
    return f"{p['treatment']} {verb} {said(mean)} {noun} than {p['control']} ({interval}, {_pairs(p)})"


def sentence(entry: Mapping[str, Any]) -> str:
    """The verdict as a sentence to repeat, with its regime."""
    word = entry["verdict"]
    if word in ("inadmissible", "open"):
        return f"{entry['regime']}: {word}. {entry['reason']}"
    said = []
    for p in entry["parts"]:
        verb = f"beyond the sum of {', '.join(p['singles'])} changed" if p["singles"] else "changed"
        if p["measure"] in RATIOS and math.isfinite(p["mean"]):
            said.append(ratio_words(p))
        elif math.isnan(p["mean"]):
            said.append(f"{p['treatment']} against {p['control']}, {p['measure']}: {effect_words(p)}")
        else:
            said.append(f"{p['treatment']} {verb} {p['measure']} against {p['control']} by {effect_words(p)}")
    out = f"{entry['regime']}, {'; '.join(said)}: {word}" + (f" ({entry['detail']})" if entry.get("detail") else "")
    missing = [(p, p["missing"]) for p in entry["parts"] if p.get("missing")]
    if word in UNDECIDED and missing:
        p, found = max(missing, key=lambda x: x[1]["pairs"][0])
        out += f"; {missing_words(p, found, entry['N'])}"
    return f"{out}. {entry['registration'][:1].upper()}{entry['registration'][1:]}."


def missing_words(p: Mapping[str, Any], found: Mapping[str, Any], N: int) -> str:
    """What is still missing until a verdict: pairs of this claim, or of a new one."""
    total, low, high = found["pairs"]
    sign = 1 if p["percent"] or p["direction"] == "higher" or p["singles"] else -1
    mean, other = (p["percent"][0] if p["percent"] else sign * p["mean"]), sign * found["from"]
    unit = "%" if p["percent"] else "(log ratio)" if p["log"] else p["unit"]
    tell = f"to tell {mean + 0.0:+.3g} from {f'{other:+.3g}' if other else 0} {unit}"
    if total <= N:
        more, least, most = (n - p["pairs"] for n in (total, low, high))
        pairs = "1 more pair" if more == 1 else f"{more:g} more pairs"
        return f"if mean and spread stay as they are, about {pairs} ({least:g} to {most:g}) are missing {tell}"
    if total <= MOST_PAIRS:
        return f"{tell} a new claim on new seeds would need about {total:g} pairs ({low:g} to {high:g})"
    return f"{tell} it would take more than the {MOST_PAIRS} pairs that a claim may have"


# --- files --------------------------------------------------------------------------------------


def judge_and_register(file: ClaimsFile, runs: Path, form: str) -> dict[str, Any]:
    """The ledger; the family is registered from now on."""
    found = judged(file, runs, form)
    registration.write(file, runs, found.registration)
    return found.ledger


def write_ledger(ledger: Mapping[str, Any], path: Path) -> None:
    """As strict JSON: what is not finite is "Infinity", "-Infinity" or "NaN"."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checked(path, _strict(ledger))
    except OSError as error:
        raise unwritable(path, error) from None


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
