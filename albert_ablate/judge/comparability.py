"""Why the runs of a contrast's arms cannot be compared: other data, other tuning, other budgets, missing seeds."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from albert_ablate.analysis.registry import Evidence, Measure, Missing
from albert_ablate.config import TEXT, ConfigError, unlike_code
from albert_ablate.judge import admission
from albert_ablate.judge.contrast_data import ContrastData
from albert_ablate.judge.run_store import ContrastArm, RunStore
from albert_ablate.records.folder import DONE
from albert_ablate.records.keys import Arm
from albert_ablate.records.store import last_line
from albert_ablate.records.tuning import RULE
from albert_ablate.stats.learning_rate import tuned_rate

EVALUATED = ("tokens", "every")  # of the evaluations during training: their sample, and how often they are

ATTEMPTS = 3

RULES = {  # what must be equal in how the arms were tuned, and its words
    "rule": "rule", "rates": "rates of the first stage", "step": "step", "objective": "objective", "seeds": "seeds",
    "tokens": "tokens",
}  # fmt: skip


def why_no_contrast(arms: Sequence[ContrastArm]) -> str:
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
                p, q = (evaluation.get(key) for evaluation in looked)
                return f"Evaluated differently: evaluation.{key} is {p} in {a.name} and {q} in {b.name}."
    return ""


def _text_of(arm: Arm) -> dict[str, Any]:
    """What an arm is trained on, by dotted key: the arms of a contrast must agree in it."""
    found = {f"{group}.{name}": value for group in TEXT for name, value in arm.cfg[group].items()}
    found.pop("task.module", None)  # of a task of one's own: what is trained, and not on what
    return found | dict(arm.text_locations)


def check_tuning(arms: Sequence[ContrastArm], out: ContrastData, advised: bool) -> None:
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
        elif why := _not_of_its_curve(a):
            out.refusal = out.refusal or why
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


def _not_of_its_curve(arm: ContrastArm) -> str:
    """Why the rate of a tuning file is not the one that follows from the file's own losses, or ""."""
    assert arm.tuning is not None
    if arm.tuning.get("rule") != RULE:
        return ""  # an older rule had another formula
    full = sorted((c for c in arm.tuning["curve"] if c["tokens"] == arm.tuning["tokens"]), key=lambda c: c["rate"])
    try:
        losses = np.array([[math.inf if x is None else x for x in c["losses"]] for c in full], float).T
        rate = tuned_rate([c["rate"] for c in full], losses, len(losses)).rate
    except ValueError:
        return ""  # fewer rates than the rule has
    if math.isclose(rate, arm.tuning["rate"], rel_tol=1e-3):  # written to four digits
        return ""
    return (
        f"The tuning file of {arm.name} says a learning rate of {arm.tuning['rate']:g}, and its own losses lead to "
        f"{rate:.4g}: the file was edited; `albert-ablate tune --force` chooses again."
    )


def _refuse_unlike_tuning(arms: Sequence[ContrastArm], out: ContrastData) -> None:
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


def check_text(arms: Sequence[ContrastArm], out: ContrastData) -> None:
    """Refuse arms whose runs were trained on different texts, by their fingerprints."""
    texts = {(r.record.get("data") or {}).get("fingerprint") for a in arms for r in a.runs}
    if len(texts) > 1:
        out.refusal = (
            "Mixed corpora or tokenizers: the arms' runs were trained on "
            f"{len(texts)} different texts, by their fingerprints."
        )


def held_up(
    arms: Sequence[ContrastArm], rates: Sequence[float], seeds: Sequence[int], seed: int, store: RunStore
) -> str:
    """What a missing seed holds up, and the record of it that cannot be read; "" where it is only the next one."""

    def lacks(arm: ContrastArm, at: int) -> bool:
        return any(
            (r := arm.run_of(at, rate)) is None or r.record["status"] not in DONE for rate in rates or (arm.rate,)
        )

    lacking = [a for a in arms if lacks(a, seed)]
    waiting = sum(not any(lacks(a, s) for a in arms) for s in seeds[seeds.index(seed) + 1 :])
    places = {
        f"{r.folder.parent.name}/seed{seed}/"
        for a in lacking for r in a.runs if any(math.isclose(r.lr, rate, rel_tol=1e-9) for rate in rates or (a.rate,))
    }  # fmt: skip
    unreadable = [text for text in store.unreadable if any(text.startswith(place) for place in places)]
    if not waiting and not unreadable:
        return ""
    pairs = f"{waiting} pair{'s wait' if waiting > 1 else ' waits'}" if waiting else "no pair waits"
    said = f"Seed {seed} of {' and '.join(a.name for a in lacking)} is missing, and {pairs} behind it"
    return f"{said}: {'; '.join(unreadable)}." if unreadable else f"{said}."


def suspect(
    arm: ContrastArm, used: Sequence[Evidence], new: Sequence[Evidence], seed: int, rates: Sequence[float]
) -> str:
    """Why an arm's runs of a seed cannot be taken together with those before it, or ""."""
    doubles = [records for rate in rates or (arm.rate,) if len(records := arm.records_of(seed, rate)) > 1]
    return (
        next((text for records in doubles if (text := admission.doubled(arm.name, records))), "")
        or admission.repeated(arm.name, used)
        or next((text for r in new if (text := admission.edited(r))), "")
    )


def other_code(arm: str, runs: Sequence[Evidence]) -> str:
    """Why runs of several seeds of one arm are not of one arm: a component's source was changed between them; or ""."""
    for run in runs[1:]:
        if groups := unlike_code(runs[0].record, run.record):
            taken = run.record.get("choices") or {}
            named = " and ".join(f"{g}={taken[g]}" if taken.get(g) else g for g in groups)
            seeds = f"seeds {runs[0].record['seed']} and {run.record['seed']} of {arm}"
            return (
                f"The code of {named} changed between {seeds}: train them by one code, into another folder or with "
                "force=true."
            )
    return ""


def failed(runs: Mapping[str, Sequence[Evidence | None]]) -> str:
    """Why a seed cannot be had, or "": a run of it failed in all its attempts."""
    for name, several in runs.items():
        for r in several:
            if r is not None and r.record["status"] == "failed" and r.record.get("sessions", 0) >= ATTEMPTS:
                why = last_line(r.record.get("error")) or "no error was recorded"
                return f"Seed {r.record['seed']} of {name} failed after {r.record['sessions']} attempts: {why}"
    return ""


def unfair(runs: Mapping[str, Sequence[Evidence]], control: str, equal: Mapping[str, float], m: Measure) -> str:
    """Why runs of one seed must not be compared, or ""."""
    base = runs[control]
    for name, several in runs.items():
        if name == control:
            continue
        for a, b in zip(several, base, strict=True):
            seed = a.record["seed"]
            if why := unequal(a, b, name, control, equal):
                return why
            if unlike := _measured_unlike(a, b, m):
                return f"{name} and {control} were evaluated differently (seed {seed}): {unlike}."
            if not _same_order(a, b):
                return (
                    f"The runs of seed {seed} saw different data or another order: {name} and {control} are not a pair."
                )
    return ""


def unequal(a: Evidence, b: Evidence, name: str, control: str, equal: Mapping[str, float]) -> str:
    """What two runs must have equal and have not, within the claim's tolerances, or ""."""
    for key, tolerance in equal.items():
        x, y = _held(a, key), _held(b, key)
        if x is not None and y is not None and abs(x - y) > tolerance * max(abs(x), abs(y)):
            return (
                f"{key} must be equal{f' within {100 * tolerance:g} %' if tolerance else ''}; {name} has "
                f"{x:,.6g} and {control} {y:,.6g} (seed {a.record['seed']})."
            )
    return ""


def _measured_unlike(a: Evidence, b: Evidence, m: Measure) -> str:
    """What a measure depends on besides the weights and in which two runs differ, or ""."""
    if m.kind in ("exact", "initial"):
        return ""
    x, y = ((r.record["config"].get("evaluation") or {}) for r in (a, b))
    compared = {f"evaluation.{k}": (x.get(k), y.get(k)) for k in EVALUATED}
    if m.evaluation:
        one, other = a.evaluation_settings(m.evaluation), b.evaluation_settings(m.evaluation)
        if None in (one["weights"], other["weights"]):
            return ""  # not asked yet, which is said elsewhere
        compared = {f"{m.evaluation}.{k}": (one.get(k), other.get(k)) for k in sorted(one.keys() | other.keys())}
    return next((f"{key} is {p} in one and {q} in the other" for key, (p, q) in compared.items() if p != q), "")


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
