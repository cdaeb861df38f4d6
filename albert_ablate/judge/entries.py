"""The entry of a claim in the ledger: its verdict, the numbers of its contrasts, its cost and its notes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from albert_ablate.analysis.registry import Evidence, Measure
from albert_ablate.judge import registration
from albert_ablate.judge.claim_models import Form
from albert_ablate.judge.claims import ClaimsFile, ClaimText, Part, arms_of, measure_of
from albert_ablate.judge.contrast_data import ContrastData, finite_mean
from albert_ablate.judge.run_store import RunStore
from albert_ablate.judge.words import (
    DECIDED,
    OPEN,
    TEST_WORDS,
    UNDECIDED,
    control_words,
    looks_words,
    margin_words,
    part_words,
    percent_of,
    sentence,
    step_words,
)
from albert_ablate.records.tuning import read_tuning
from albert_ablate.stats import effects
from albert_ablate.stats.learning_rate import pairs_missing, pairs_to_margin
from albert_ablate.stats.sequential import FIRST, Test, nominal
from albert_ablate.stats.student import skew, skew_error
from albert_ablate.stats.verdicts import NULLS, OPPOSITE, Claim, Contrast, PartResult, Verdict, deciding_look, verdicts


def entry_of(
    file: ClaimsFile,
    claim: ClaimText,
    form: str,
    store: RunStore,
    primary_data: Sequence[ContrastData],
    secondary_data: Sequence[ContrastData],
    verdict: Verdict | None,
    family: dict[str, Any],
    tests: int,
) -> dict[str, Any]:
    """A claim's entry in the ledger.

    verdict: of its primary contrasts, None where they are not tested. tests: how many the family has.
    """
    f, primary, refused = claim.forms[form], claim.contrasts(form), refusals(primary_data)
    exact = measure_of(primary[0]).kind == "exact"
    if refused:
        word, reason = "inadmissible", refused[0]
    elif exact:
        word, reason = _exactly(primary[0], primary_data[0])
    else:
        assert verdict is not None
        word, reason = verdict.verdict, verdict.reason
    waiting = [x.pending_reason for x in primary_data if x.pending_reason]
    if word in OPEN and waiting:
        reason = waiting[0]
    detail = _never_trains(word, claim, primary_data, form) or (verdict.detail if verdict else "")
    if exact and word == "refuted":
        detail = OPPOSITE
    if verdict and verdict.failed:
        reason = " ".join(
            f"Part {i + 1} fails, {part_words(primary[i], primary_data[i])}: {how}."
            for i, how in verdict.failed.items()
        )
    parts = [
        _shown(p, x, f, file.alpha, claim.test, verdict.parts[i] if verdict else None)
        for i, (p, x) in enumerate(zip(primary, primary_data, strict=True))
    ]
    for p, x in zip(parts, primary_data, strict=True):
        if word in UNDECIDED and verdict:
            p["missing"] = _missing(claim, f.N, p, x.differences, verdict)
        else:
            p["pairs_to_margin"] = None  # nothing is missing where a verdict stands
    if verdict and word in DECIDED:
        for p, x, result in zip(parts, primary_data, verdict.parts, strict=True):
            p["decided_at"] = deciding_look(result, word)
            after = [v for v in x.differences[p["decided_at"] :] if math.isfinite(v)]
            p["after"] = float(np.mean(after)) if p["decided_at"] and after else None
    secondary = [
        _shown(p, x, f, file.alpha, claim.test) | ({"notes": [x.refusal]} if x.refusal else {})
        for p, x in zip(claim.secondary_contrasts(form), secondary_data, strict=True)
    ]
    used = {place: run for x in (*primary_data, *secondary_data) for place, run in x.used.items()}
    judged_by = {p["test"] for p in parts} - {"t"}
    notes = list(dict.fromkeys([*waiting, *(n for x in primary_data for n in x.notes)]))
    if word not in OPEN and any(p["pairs"] < 8 for p in parts) and word != "inadmissible" and not exact:
        notes.append("Below 8 pairs a verdict rests on normal differences.")
    notes += [TEST_WORDS[name] for name in sorted(judged_by)]
    if verdict and not refused and not exact and any(p["pairs"] >= FIRST for p in parts):
        notes += [*looks_words(file.alpha, tests, verdict, word), *(t for p in parts if (t := step_words(p, word)))]
        notes += [t for p, r in zip(parts, verdict.parts, strict=True) if (t := margin_words(p, r, len(parts) > 1))]
    rate_acts = any(measure_of(p).kind not in ("grid", "exact", "initial") for p in primary)
    regime = file.regime(claim, form)
    how, edited = registration.status(file, claim, form, family)
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
        "tuned": bool(claim.tuned) if rate_acts else None,
        "rates": {job.arm: job.rate for x in primary_data for job in x.trained.values() if job.rate},
        "p_effect": verdict.p_effect if verdict else 1.0,
        "p_inside": verdict.p_inside if verdict else 1.0,
        "level_effect": verdict.level_effect if verdict else None,
        "level_inside": verdict.level_inside if verdict else None,
        "parts": parts,
        "secondary": secondary,
        "cost": _cost(used, store, file, claim, form),
        "notes": notes,
    }
    entry["sentence"] = sentence(entry)
    return entry


def tested_contrasts(parts: Sequence[Part], data: Sequence[ContrastData], test: str) -> list[Contrast]:
    """The contrasts of a claim as its sequential test takes them."""
    return [tested_contrast(p, x, test) for p, x in zip(parts, data, strict=True)]


def tested_contrast(part: Part, data: ContrastData, test: str) -> Contrast:
    """A contrast as its sequential test takes it: by t where the measure or missing tuning runs allow nothing else."""
    discrete = measure_of(part).discrete
    if discrete or (test == "moderated" and not data.prior):
        test = "t"
    chosen = Test(test, data.prior if test == "moderated" else 0.0)
    return Contrast(data.differences, part.margin, part.null, data.slack, data.mixed_reason, chosen, discrete)


def refusals(data: Sequence[ContrastData]) -> list[str]:
    """Why contrasts cannot be judged."""
    return [x.refusal for x in data if x.refusal]


def _never_trains(word: str, claim: ClaimText, data: Sequence[ContrastData], form: str) -> str:
    """The control never trains: where a verdict rests on an arm all of whose runs diverged in every part."""
    side = {"supported": ("control", 1), "refuted": ("treatment", 0)}.get(word)
    if side is None or not all(x.diverged[side[1]] and all(x.diverged[side[1]]) for x in data):
        return ""
    initial = all(measure_of(p).kind == "initial" for p in claim.contrasts(form))
    return f"the {side[0]} {'has no finite value' if initial else 'never trains'}"


def _exactly(part: Part, data: ContrastData) -> tuple[str, str]:
    """The verdict on a measure without noise: no test, no n."""
    t, c = ([v for v in values if math.isfinite(v)] for values in data.values)
    if not t or not c:
        return "open", data.pending_reason or "No pair of finished runs yet."
    m = measure_of(part)
    try:
        return effects.compare_exactly(t, c, part.margin, part.direction, m.log).verdict, "Compared exactly."  # type: ignore[arg-type]
    except ValueError as error:
        return "inadmissible", str(error)


def _shown(
    part: Part, data: ContrastData, f: Form, alpha: float, test: str, result: PartResult | None = None
) -> dict[str, Any]:
    m, n = measure_of(part), len(data.differences)
    exact = m.kind == "exact" and len(set(data.differences)) == 1  # skipped blocks make operations random
    if result is None and not exact:
        alone = tested_contrast(part, data, test)
        result = verdicts([Claim([alone], f.N)], 1, alpha)[0].parts[0]
    mean, low, high = (
        (result.mean, result.low, result.high) if result else ((data.differences[0] if exact else math.nan),) * 3
    )
    level = nominal(0.05, f.N)
    rates = [
        [sum(s), n, *effects.rate_interval(sum(s), n, level)[1:]] if n else [0, 0, 0.0, 1.0] for s in data.diverged
    ]
    return {
        "treatment": data.treatment or "|".join(part.treatment),
        "control": control_words(part),
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
        "treatment_mean": finite_mean(data.values[0]),
        "control_mean": finite_mean(data.values[1]),
        "finished": result.finished if result else n,
        "lost": result.lost if result else 0,
        "treatment_diverged": rates[0],
        "control_diverged": rates[1],
        "correlation": _try(lambda: list(effects.correlation(*data.values))),
        "pairs_to_margin": _try(lambda: list(pairs_to_margin(data.differences, part.margin))) if not exact else None,
        "skew": _skew(data.differences),
        "rank": result.rank if result else "not tested",
        "looks": [asdict(look) for look in result.looks] if result else [],
        "seeds": data.seeds,
        "d": data.differences,
        "test": tested_contrast(part, data, test).test.name,
        "tuning_slack": "unknown" if math.isnan(data.slack) else data.slack,
    }


def _skew(differences: Sequence[float]) -> list[float] | None:
    """Skew of the finite differences and its standard error under normal ones; None of fewer than FIRST."""
    finite = np.asarray(differences, float)
    finite = finite[np.isfinite(finite)]
    size = float(skew(finite)) if len(finite) >= FIRST else math.nan
    return [size, skew_error(len(finite))] if math.isfinite(size) else None


def _missing(claim: ClaimText, N: int, part: Mapping[str, Any], differences: Sequence[float],
             verdict: Verdict) -> dict[str, Any] | None:  # fmt: skip
    """The fewest pairs in all with which a verdict would come if mean and spread stay as they are, and which one.

    At the Holm steps that the claim stands at. None where a run diverged, before the first look, and where the mean
    lies on what it is to be told from.
    """
    if len(differences) < FIRST or not np.isfinite(differences).all() or part["test"] != "t":
        return None
    mean, margin, parts = float(np.mean(differences)), part["margin"], len(verdict.parts)
    shift = NULLS[part["null"]] * margin
    ways = [(abs(mean - shift), verdict.level_effect / (parts if claim.needs == "any" else 1), shift)]
    if shift >= 0 and margin > abs(mean):
        level = verdict.level_inside / (parts if claim.needs == "all" else 1)
        ways.append((margin - abs(mean), 2 * level, math.copysign(margin, mean)))
    reachable = []
    for distance, level, other in ways:
        try:
            pairs = pairs_missing(differences, distance, N, level) if distance > 0 else None
        except ValueError:
            continue
        if pairs:
            reachable.append((pairs, other))
    if not reachable:
        return None
    pairs, other = min(reachable, key=lambda x: x[0][0])
    return {"pairs": pairs, "from": percent_of(part, other) if part["percent"] else other}


def _percent(part: Part, m: Measure, mean: float, low: float, high: float) -> list[float] | None:
    """Change of the measure from control to treatment in percent (lower is negative), of a log ratio."""
    if not m.log or math.isnan(mean) or part.singles:
        return None
    if part.direction == "lower":
        mean, low, high = -mean, -high, -low
    return [math.inf if x >= 700 else 100 * math.expm1(x) + 0.0 for x in (mean, low, high)]


def _try(of: Callable[[], list[float]]) -> list[float] | None:
    try:
        return of()
    except ValueError:
        return None


def _cost(
    used: Mapping[str, Evidence], store: RunStore, file: ClaimsFile, claim: ClaimText, form: str
) -> dict[str, float]:
    """Seconds, tokens and runs so far, those of tuning included; runs shared between claims count in each."""
    settings = set[str]()
    for part in (*claim.contrasts(form), *claim.secondary_contrasts(form)):
        for arm in arms_of(part) if claim.rate_matters(measure_of(part)) else ():
            for r in store.runs_of(file.overrides(claim, part, form, arm)):
                tuning = read_tuning(store.root, r.record["arm"]) if r.record.get("arm") else None
                settings |= set((tuning or {}).get("runs", ()))
    tuning_runs = {
        r.relative_folder: r
        for r in store.evidence
        if r.folder.parent.name in settings and r.record.get("role") == "tuning"
    }
    every = [*({**tuning_runs, **used}).values()]
    return {
        "seconds": float(sum(r.record["cost"].get("seconds") or 0 for r in every)),
        "tokens": int(sum(r.record["summary"].get("tokens") or 0 for r in every)),
        "runs": len(every),
        "tuning_runs": len(tuning_runs),
    }
