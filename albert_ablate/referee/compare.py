"""Is B better than A? One family of contrasts against the first side, decided by the judge's own test and Holm."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from albert_ablate.analysis.external.runs import external_rows
from albert_ablate.config import ConfigError, nearest
from albert_ablate.referee.answer import ACCEPT, INADMISSIBLE, NO_EFFECT, REJECT, UNDECIDED, Answer, Contrast
from albert_ablate.referee.ledger import Ledger
from albert_ablate.referee.runners import Commands, Stopped, margin_refusal, write_claim
from albert_ablate.referee.sides import (
    Crash,
    Inadmissible,
    Scale,
    Side,
    Worktrees,
    clock,
    read_margin,
    read_side,
    refuse_same,
)
from albert_ablate.stats.sequential import ALPHA, FIRST, MOST_PAIRS, critical
from albert_ablate.stats.verdicts import Claim, Verdict, verdicts
from albert_ablate.stats.verdicts import Contrast as Differences

DECISIONS = {
    "supported": ACCEPT, "refuted": REJECT, "no effect": NO_EFFECT, "mixed": REJECT, "inadmissible": INADMISSIBLE,
}  # fmt: skip
OPEN = ("open", "undecided")


@dataclass(frozen=True)
class Question:
    """A comparison to make: sides, metric, margin and all else that the answer depends on."""

    sides: tuple[str, ...]
    metric: str = "test_loss"
    margin: str = "0.5%"
    higher: bool = False
    max_pairs: int = 20
    common: tuple[str, ...] = ()
    command: str = ""
    tune: bool = False
    equal: tuple[str, ...] = ("tokens", "parameters", "flops")
    crash_is_outcome: bool = False


@dataclass
class Execution:
    """How a comparison is run: folders, limits, output; and what it has spent so far."""

    runs: Path
    say: Callable[[str], None]
    watch: Callable[[Sequence[Contrast]], None] = lambda contrasts: None  # the contrasts after each pair
    repository: Path = Path()
    limit: float = math.inf
    budget: float = math.inf
    workers: int = 1
    stack: int = 1  # runs that are trained as one, at most
    begun: float = field(default_factory=clock)
    runs_done: int = 0

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget is used up."""
        return clock() - self.begun > self.budget


def compare(question: Question, execution: Execution) -> Answer:
    """Compare candidates with a baseline: run pairs until the sequential test decides, or until limits are reached."""
    if len(question.sides) < 2:
        raise Inadmissible("A comparison needs two sides or more: the first is the baseline of the others.")
    if not FIRST <= question.max_pairs <= MOST_PAIRS:
        raise Inadmissible(f"--max-pairs={question.max_pairs} is not allowed: from {FIRST} to {MOST_PAIRS}.")
    scale = read_margin(question.margin, question.higher)
    sides = [read_side(x, question.common, question.command, execution.repository) for x in question.sides]
    if len({s.kind for s in sides}) > 1:
        raise Inadmissible(f"{sides[0].text} ({sides[0].kind}) and the other sides are not of one kind.")
    for i, a in enumerate(sides):
        for b in sides[i + 1 :]:
            refuse_same(a, b, execution.repository)
    kept = [*(s.identity for s in sides), question.metric, scale, question.max_pairs, question.tune, question.equal]
    if question.crash_is_outcome and sides[0].kind != "overrides":
        kept.append("crash_is_outcome")  # only where it is asked for, so that other folders keep their names
    name = hashlib.sha256(json.dumps(kept, default=str).encode()).hexdigest()[:12]
    folder = execution.runs / "compare" / name
    if sides[0].kind == "overrides":
        return _trained(question, scale, sides, folder, execution)
    return _commanded(question, scale, sides, folder, execution)


# --- overrides: a claims file and the judge --------------------------------------------------------------------------


def _trained(q: Question, scale: Scale, sides: Sequence[Side], folder: Path, execution: Execution) -> Answer:
    from albert_ablate.analysis.registry import measure
    from albert_ablate.judge.claims import read_claims
    from albert_ablate.judge.ledger import judged
    from albert_ablate.studies.judge_run import SKIPPED, Budget, PairRunner

    m = measure(q.metric)
    if why := margin_refusal(m, q.margin, scale.relative):
        raise Inadmissible(why)
    path = folder / "claims.yaml"
    named = {f"compare-{folder.name}-{i}": side for i, side in enumerate(sides[1:], 1)}
    if not path.exists():
        write_claim(path, sides[0], named, q.common, q.metric, scale.margin, q.max_pairs, 0, q.equal, q.tune)
    file = read_claims(path)
    said = list[str]()

    def heard(text: str) -> None:
        said.append(text)
        if q.tune or SKIPPED in text or "tuning" in text:
            execution.say(text)

    runner = PairRunner(file, execution.runs, "full", (), False, execution.workers, Budget(), heard, execution.stack)
    before = runner.done()
    shown: dict[str, int] = {}
    recorded = True
    while True:
        now = judged(file, execution.runs, "full")
        ledger, found = now.ledger, now.primary
        contrasts = [
            _judged_contrast(e, sides[0], named[e["name"]], q, scale, m.better == "higher", found[e["name"]][0])
            for e in ledger["claims"]
        ]
        for c, e in zip(contrasts, ledger["claims"], strict=True):
            if e["parts"][0]["pairs"] > shown.get(e["name"], 0) and not recorded:
                execution.say(_pair_line(c, found[e["name"]][0].values, e["parts"][0]["looks"]))
            shown[e["name"]] = e["parts"][0]["pairs"]
        execution.watch(contrasts)
        following = None if execution.out_of_time else runner.next()
        if following is None:
            break
        recorded = False
        if code := runner.do(*following):
            raise Stopped(code - 128)
    execution.runs_done = runner.done() - before  # those of tuning too
    if broken := [c for c in contrasts if c.decision == UNDECIDED and not execution.out_of_time]:
        why = next((t for t in reversed(said) if SKIPPED in t), "")
        if why:
            contrasts = [replace(c, decision=INADMISSIBLE, reason=why) if c in broken else c for c in contrasts]
    notes = [] if q.tune else ["At the learning rates that were given: --tune tunes both sides alike."]
    notes += [n for e in ledger["claims"] for n in e["notes"] if "differs" in n or "correct" in n]
    spent = 0.0 if recorded else clock() - execution.begun
    return Answer("compare", contrasts, str(folder), execution.runs_done, spent, recorded, list(dict.fromkeys(notes)))


def _judged_contrast(
    e: Mapping[str, Any], a: Side, b: Side, q: Question, scale: Scale, higher: bool, found: Any
) -> Contrast:
    part, word = e["parts"][0], e["verdict"]
    decision = DECISIONS.get(word, UNDECIDED)
    missing = sorted({j.seed for j in found.jobs})
    return Contrast(
        a.text, b.text, decision, _reason(word, e["reason"]), q.metric, higher, scale.relative, scale.margin,
        float(part["mean"]), float(part["low"]), float(part["high"]), part["pairs"], q.max_pairs,
        float(e["p_effect"]), ALPHA, int(part["control_diverged"][0]), int(part["treatment_diverged"][0]),
        missing[0] if missing and word in OPEN else None,
    )  # fmt: skip


def _reason(word: str, reason: str) -> str:
    if word == "supported":
        return "The candidate is better."
    if word == "refuted":
        return "The candidate is worse."
    if word == "inconclusive":
        return f"{reason} Asked again, this stays the answer; another --max-pairs is another question."
    return reason


def _pair_line(c: Contrast, values: Any, looks: Sequence[Mapping[str, Any]]) -> str:
    """Progress line after a pair: its values, the change so far with its interval, statistic and boundary."""
    out = f"{c.candidate}: pair {c.pairs} of at most {c.max_pairs}"
    if values and values[0]:
        out += f": {values[0][-1]:.5g} against {values[1][-1]:.5g}"
    if math.isfinite(c.mean):
        out += f"; {c.metric} {c.change(c.mean):+.3g}{c.unit}"
    ends = [c.change(x) for x in (c.low, c.high)]
    if all(map(math.isfinite, ends)):
        out += f" ({min(ends):+.3g} to {max(ends):+.3g})"
    if looks:
        last = looks[-1]
        out += f"; {last['test']} {last['statistic']:.2f}, decides at {last['boundary']:.2f}"
    return out


# --- commands and refs: a ledger -------------------------------------------------------------------------------------


def _commanded(q: Question, scale: Scale, sides: Sequence[Side], folder: Path, execution: Execution) -> Answer:
    ledger = Ledger(folder)
    with ledger.lock():
        if not ledger.entries:
            ledger.add(
                "claim", version=1, sides=[s.as_json() for s in sides], metric=q.metric, margin=q.margin,
                higher=q.higher, max_pairs=q.max_pairs, family=len(sides) - 1, crash_is_outcome=q.crash_is_outcome,
                statement=[f"{s.text} is better than {sides[0].text}." for s in sides[1:]],
            )  # fmt: skip
        trees = Worktrees(execution.repository, folder / "worktrees")
        runner = Commands(q.metric, execution.limit, q.crash_is_outcome, trees, execution.workers)
        return _run_commands(q, scale, sides, ledger, runner, execution)


def _run_commands(
    q: Question, scale: Scale, sides: Sequence[Side], ledger: Ledger, runner: Commands, execution: Execution
) -> Answer:
    names = [str(i) for i in range(len(sides))]

    def values() -> dict[str, dict[int, float]]:
        out: dict[str, dict[int, float]] = {n: {} for n in names}
        for e in ledger.entries_of("run"):
            out[e["role"]][e["seed"]] = math.inf if e["value"] is None else e["value"]
        return out

    def answer(contrasts: Sequence[Contrast], recorded: bool) -> Answer:
        spent = 0.0 if recorded else clock() - execution.begun
        return Answer("compare", contrasts, str(ledger.folder), execution.runs_done, spent, recorded)

    recorded = True
    while True:
        metric = q.metric or next((e["metric"] for e in ledger.entries_of("run")), "")
        texts, seeds = [s.text for s in sides], range(q.max_pairs)
        contrasts = judge_values(values(), names, texts, scale, q.max_pairs, metric, seeds)
        open_ = [i for i, c in enumerate(contrasts, 1) if c.next_seed is not None]
        if not open_ or execution.out_of_time:
            return answer(contrasts, recorded)
        seed = min(c.next_seed for c in contrasts if c.next_seed is not None)
        asked = [n for n in names if n == "0" or int(n) in open_ and contrasts[int(n) - 1].next_seed == seed]
        roles = [n for n in (asked if seed % 2 == 0 else asked[::-1]) if seed not in values()[n]]
        try:
            for o in runner.run_pair(dict(zip(names, sides, strict=True)), [seed], 0, roles, ledger.folder):
                execution.runs_done += 1
                value = o.value if math.isfinite(o.value) else None
                ledger.add("run", role=o.role, seed=seed, metric=o.metric, value=value, seconds=round(o.seconds, 3))
        except Crash as error:
            text = sides[int(error.args[1])].text if len(error.args) > 1 else "A run"
            ledger.add("crash", role=error.args[1] if len(error.args) > 1 else "", seed=seed, reason=str(error.args[0]))
            why = f"{text} failed with seed {seed}: {error.args[0]}. Asked again, it is tried again."
            return answer([replace(c, decision=INADMISSIBLE, reason=why) if i in open_ else c
                           for i, c in enumerate(contrasts, 1)], False)  # fmt: skip
        recorded = False
        values_by_side = values()
        metric = q.metric or next(e["metric"] for e in ledger.entries_of("run"))
        contrasts = judge_values(values_by_side, names, texts, scale, q.max_pairs, metric, seeds)
        execution.watch(contrasts)
        for c, n in zip(contrasts, names[1:], strict=True):
            if n in asked:
                d = _differences(values_by_side, n, scale, seeds)[0]
                execution.say(_pair_line(c, ([values_by_side[n][seed]], [values_by_side["0"][seed]]), _last_look(d, c)))


def _last_look(d: Sequence[float], c: Contrast) -> list[dict[str, Any]]:
    x = np.asarray(d, float)
    if len(x) < FIRST or not np.isfinite(x).all() or not x.std():
        return []
    t = float(x.mean() / (x.std(ddof=1) / math.sqrt(len(x))))
    return [{"test": "t", "statistic": t, "boundary": critical(len(x), c.max_pairs, c.level or ALPHA)}]


def _differences(
    values: Mapping[str, Mapping[int, float]], name: str, scale: Scale, seeds: Sequence[int]
) -> tuple[list[float], int | None, int]:
    """Differences of seeds in order up to the first that lacks a run; that seed, and how many pairs wait behind it."""
    base, candidate, d = values["0"], values[name], list[float]()
    for i, seed in enumerate(seeds):
        if seed not in base or seed not in candidate:
            return d, seed, sum(s in base and s in candidate for s in seeds[i + 1 :])
        d.append(scale.difference(base[seed], candidate[seed]))
    return d, None, 0


def judge_values(
    values: Mapping[str, Mapping[int, float]], names: Sequence[str], texts: Sequence[str], scale: Scale, N: int,
    metric: str, seeds: Sequence[int],
) -> list[Contrast]:  # fmt: skip
    """Contrasts of sides "1", "2", ... against "0" from their values by seed, one family."""
    differences = [_differences(values, n, scale, list(seeds)[:N]) for n in names[1:]]
    judged: list[Verdict] = verdicts(
        [Claim([Differences(d, scale.margin)], N) for d, _, _ in differences], len(differences)
    )
    out = []
    for v, text, (d, following, waiting) in zip(judged, texts[1:], differences, strict=True):
        part, x = v.parts[0], np.asarray(d, float)
        decision = DECISIONS.get(v.verdict, UNDECIDED)
        reason = _reason(v.verdict, v.reason)
        more = v.verdict in OPEN and following is not None
        if more and waiting:
            reason = f"{waiting} pairs wait behind seed {following}, which one side lacks: run it next."
        both = int(np.isnan(x).sum())
        out.append(Contrast(
            texts[0], text, decision, reason, metric, scale.higher, scale.relative, scale.margin, float(part.mean),
            float(part.low), float(part.high), part.pairs, N, v.p_effect, v.level_effect,
            int((x == math.inf).sum()) + both, int((x == -math.inf).sum()) + both, following if more else None,
        ))  # fmt: skip
    return out


# --- a table that is there ------------------------------------------------------------------------------------------


def compare_table(path: Path, question: Question) -> Answer:
    """What a table, or what a mapping of columns leads to (`analysis/external`), says: arms, seeds and the metric; and
    which pair to run next."""
    q, scale = question, read_margin(question.margin, question.higher)
    try:
        rows = [row for row, _ in external_rows(path, q.metric)]
    except ConfigError as error:
        raise Inadmissible(str(error)) from None
    arms = list(dict.fromkeys(r["label"] for r in rows))
    texts = list(q.sides) or arms
    if len(texts) < 2:
        raise Inadmissible(f"{path} has one arm only ({arms[0]}): a comparison needs two.")
    if unknown := [t for t in texts if t not in arms]:
        raise Inadmissible(f"{path} has no arm {unknown[0]}: it has {nearest(unknown[0], arms)}.")
    values: dict[str, dict[int, float]] = {str(i): {} for i in range(len(texts))}
    for row in rows:
        if row["label"] in texts and (row["status"] == "diverged" or row["status"] == "finished" and q.metric in row):
            value = math.inf if row["status"] == "diverged" else float(row[q.metric])
            values[str(texts.index(row["label"]))][row["seed"]] = value
    if not any(values.values()):
        raise Inadmissible(f"{path} has no run of {' or '.join(texts)} with a value of {q.metric}.")
    known = sorted({s for own in values.values() for s in own})
    seeds = [*known, *range(known[-1] + 1, known[-1] + 1 + q.max_pairs)]
    contrasts = judge_values(values, [*values], texts, scale, q.max_pairs, q.metric, seeds)
    open_ = [c for c in contrasts if c.next_seed is not None]
    notes = [f"Run next: seed {c.next_seed} of {c.baseline} and {c.candidate}." for c in open_]
    notes.append("Exploratory: the table was there before the question.")
    return Answer("compare", contrasts, str(path), recorded=True, notes=notes)
