"""A session of proposals whose error budget is spent online; its state is its ledger, and nothing else.

Kinds of entries: session (what is fixed for good), run (one run's value), noise (the A/A pass), proposal (before its
first run), level (before its first value is seen), crash, verdict.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from albert_ablate.referee.answer import ACCEPT, INADMISSIBLE, NO_EFFECT, REJECT, UNDECIDED, Answer, Contrast
from albert_ablate.referee.ledger import Ledger
from albert_ablate.referee.runners import Commands, Outcome, Runner, Training, measure_refusal, write_claim
from albert_ablate.referee.session_settings import CallOptions, Settings
from albert_ablate.referee.sides import (
    Crash,
    Inadmissible,
    Scale,
    Side,
    Worktrees,
    clock,
    evaluator_hash,
    read_margin,
    read_side,
    refuse_same,
)
from albert_ablate.stats.online import MOST, Decision, decide, level_of, noise_floor, pairs_for
from albert_ablate.stats.sequential import ALPHA, FIRST, MOST_PAIRS

NOISE_PAIRS = 4
BLOCK, BLOCKS, FIRST_SEED = 100, 9_980, 1_000  # seeds of a proposal, so that none has another's or a user's own
WORDS = {"accept": ACCEPT, "reject": REJECT, "no effect": NO_EFFECT, "undecided": UNDECIDED}
ROLES = ("baseline", "candidate")


class Session:
    """One call of `albert-ablate gate`. The ledger is held while it lasts."""

    def __init__(self, ledger: Ledger, options: CallOptions, settings: Settings, say: Callable[[str], None]):
        self.ledger, self.options, self.say = ledger, options, say
        self.settings, self.runs_done, self.begun = settings, 0, clock()
        self.scale: Scale = read_margin(settings.margin, settings.higher)

    # --- what the ledger says ---

    @property
    def opening(self) -> dict[str, Any] | None:
        """The first entry of the ledger, which holds settings and baseline; None in a new session."""
        return self.ledger.entries[0] if self.ledger.entries else None

    def verdict_of(self, number: int) -> dict[str, Any] | None:
        """The verdict on a proposal, None if there is none yet."""
        return next((v for v in self.ledger.entries_of("verdict") if v["proposal"] == number), None)

    def history(self) -> list[bool]:
        """Whether each proposal that spent of the budget was accepted, in the order in which levels were given."""
        accepted = {v["proposal"] for v in self.ledger.entries_of("verdict") if v["decision"] == ACCEPT}
        return [e["proposal"] in accepted for e in self.ledger.entries_of("level") if not e["confirmation"]]

    def baseline(self) -> tuple[Mapping[str, Any], int]:
        """The current baseline, and the number of the accepted proposal that it is from (0: the first baseline)."""
        side, number = (self.opening or {})["baseline"], 0
        for v in self.ledger.entries_of("verdict"):
            p = self.proposal(v["proposal"])
            if v["decision"] == ACCEPT and not p["confirmation"]:
                side, number = p["candidate"], p["proposal"]
        return side, number

    def proposal(self, number: int) -> dict[str, Any]:
        """The proposal's entry in the ledger."""
        return next(p for p in self.ledger.entries_of("proposal") if p["proposal"] == number)

    def seeds(self, number: int) -> list[int]:
        """Seeds of a proposal: a block chosen by the session's name and the proposal's number."""
        offset = int(hashlib.sha256(self.options.folder.name.encode()).hexdigest(), 16)
        first = FIRST_SEED + BLOCK * ((offset + number) % BLOCKS)
        return list(range(first, first + BLOCK))

    def values(self, number: int, seed: int) -> dict[str, float]:
        """Recorded values of a seed by role, baseline and candidate; inf for a run that diverged."""
        return {
            e["role"]: math.inf if e["value"] is None else e["value"]
            for e in self.ledger.entries_of("run")
            if e["proposal"] == number and e["seed"] == seed
        }

    def differences(self, number: int) -> list[float]:
        """Differences of the pairs in order, up to the first for which a run is missing."""
        out = []
        for seed in self.seeds(number):
            values = self.values(number, seed)
            if len(values) < 2:
                break
            out.append(self.scale.difference(values["baseline"], values["candidate"]))
        return out

    # --- asking ---

    def side(self, text: str, extra: str = "") -> Side:
        """Parse a side; `extra` are overrides or arguments that are added to it."""
        more = tuple(extra.split()) if extra else ()
        command = f"{self.settings.command} {extra}".strip() if text.startswith("git:") else ""
        if "{seed}" in text and extra:
            text = f"{text} {extra}"
        return read_side(text, self.settings.common + more, command, self.options.repository)

    def kept_side(self, recorded: Mapping[str, Any], extra: str = "") -> Side:
        """The side that the ledger recorded; a git ref as the commit that it was then."""
        side = self.side(f"git:{recorded['commit']}" if recorded.get("commit") else recorded["text"], extra)
        return Side(**{**asdict(side), "text": recorded["text"]})

    def check(self, baseline: str, candidate: str, confirm: str = "") -> tuple[Side, Side]:
        """The two sides of a question; Inadmissible where it is refused. Writes nothing."""
        new = self.side(candidate)
        if self.opening is None:
            if not baseline:
                raise Inadmissible("A new session needs --baseline: what proposals are compared with.")
            if confirm:
                raise Inadmissible("--confirm asks an accepted change again, and this session has accepted none.")
            old = self.side(baseline)
        else:
            baseline_kept, number = self.baseline()
            old = self.kept_side(baseline_kept)
            if baseline and self.side(baseline).identity != old.identity:
                since = f", accepted as proposal {number}" if number else ""
                raise Inadmissible(f"This session's baseline is {old.text}{since}: compare with that.")
        self.check_kinds(old, new)
        if not confirm:
            refuse_same(old, new, self.options.repository)
        self.check_evaluator(old, new)
        return old, new

    def ask(self, baseline: str, candidate: str, confirm: str = "") -> Answer:
        """Inadmissible where the question is refused: before anything is written, but for what runs have shown."""
        if self.opening is not None:
            self.check_settings()
            if recorded := self.recorded(self.side(candidate), confirm):
                return recorded
        old, new = self.check(baseline, candidate, confirm)
        if self.opening is None:
            evaluator = evaluator_hash(self.settings.evaluator, old, self.options.repository)
            self.ledger.add(
                "session", version=1, name=self.options.folder.name, settings=self.settings.as_json(),
                baseline=old.as_json(), evaluator=evaluator,
            )  # fmt: skip
        refusal = self.noise_pass(old)
        if refusal is None:
            reason = "The time ran out during the A/A pass: ask again to continue."
            return self.answer(Contrast(old.text, new.text, UNDECIDED, reason), None)
        if refusal:
            return self.answer(Contrast(old.text, new.text, INADMISSIBLE, refusal), None)
        return self.judge(old, new, confirm)

    def check_kinds(self, old: Side, new: Side) -> None:
        """Refuse sides of different kinds, and a metric or margin that runs do not have."""
        if old.kind != new.kind:
            raise Inadmissible(
                f"{old.text} is a {old.kind} side and {new.text} a {new.kind} side: both must be of one kind."
            )
        if new.kind == "overrides" and (
            why := measure_refusal(self.settings.metric or "test_loss", self.settings.margin, self.scale.relative)
        ):
            raise Inadmissible(why)

    def check_settings(self) -> None:
        """Refuse settings other than those the session began with."""
        assert self.opening is not None
        fixed, asked = self.opening["settings"], self.settings.as_json()
        if unlike := [k for k in fixed if fixed[k] != asked.get(k)]:
            k = unlike[0]
            raise Inadmissible(
                f"This session was begun with {k}={_shown(fixed[k])} and keeps it: --{k.replace('_', '-')} cannot be "
                f"{_shown(asked.get(k))} now."
            )

    def check_evaluator(self, *sides: Side) -> None:
        """Refuse sides whose measuring code is not that of the session."""
        recorded = self.opening["evaluator"] if self.opening else None
        for side in sides:
            current = evaluator_hash(self.settings.evaluator, side, self.options.repository)
            recorded = recorded or current
            if current != recorded:
                files = ", ".join(self.settings.evaluator) or "the code of albert_ablate"
                raise Inadmissible(f"{side.text}: what measures ({files}) has changed since the session began.")

    def recorded(self, new: Side, confirm: str) -> Answer | None:
        """The answer to a proposal that was judged before against what is kept now, or that made it so."""
        kept, number = self.baseline()
        new = self.side(new.text, confirm) if confirm else new
        for p in reversed(self.ledger.entries_of("proposal")):
            v = self.verdict_of(p["proposal"])
            same = p["candidate"]["identity"] == new.identity and p["confirmation"] == confirm
            current = p["baseline"]["identity"] == kept["identity"] or p["proposal"] == number or p["confirmation"]
            if v and same and current:
                return self.answer(self.contrast(p, v), p, recorded=True)
        return None

    # --- runs ---

    def runner(self, kind: str) -> Runner:
        """What runs sides of this kind."""
        if kind == "overrides":
            return Training(self.options.runs, self.metric or "test_loss", self.options.workers, lambda text: None)
        trees = Worktrees(self.options.repository, self.options.folder / "worktrees")
        return Commands(self.metric, self.options.limit, self.settings.crash_is_outcome, trees, self.options.workers)

    @property
    def metric(self) -> str:
        """Name of the metric: the one that was asked for, or the one that the first run printed."""
        return self.settings.metric or next((e["metric"] for e in self.ledger.entries_of("run") if e["metric"]), "")

    def write_outcome(self, number: int, seed: int, o: Outcome) -> None:
        """Write the outcome of a run to the ledger."""
        value = o.value if math.isfinite(o.value) else None
        self.runs_done += 1
        self.ledger.add(
            "run", proposal=number, role=o.role, seed=seed, metric=o.metric, value=value, seconds=round(o.seconds, 3)
        )

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget of this call is used up."""
        return clock() - self.begun > self.options.budget

    def noise_pass(self, side: Side) -> str | None:
        """A/A pass: the baseline against itself on other seeds, once per session.

        Returns the reason why no proposal can be judged, "" if there is none, None if time is up."""
        if done := self.ledger.entries_of("noise"):
            return done[0]["refusal"]
        seeds, N = self.seeds(0), self.settings.max_pairs or MOST
        for i in range(NOISE_PAIRS):
            both = list(zip(ROLES, seeds[2 * i : 2 * i + 2], strict=True))
            for role, seed in both if i % 2 == 0 else both[::-1]:
                if not self.values(0, seed):
                    if self.out_of_time:
                        return None
                    try:
                        self.write_outcome(0, seed, self.runner(side.kind).run_one(side, seed, role))
                    except Crash as error:
                        raise Inadmissible(f"The baseline failed with seed {seed}: {error.args[0]}.") from None
        finals = [next(iter(self.values(0, s).values())) for s in seeds[: 2 * NOISE_PAIRS]]
        d = [self.scale.difference(a, b) for a, b in zip(finals[::2], finals[1::2], strict=True)]
        refusal, floor = "", noise_floor(d, N)
        if not all(map(math.isfinite, finals)):
            refusal = f"{sum(not math.isfinite(x) for x in finals)} of {len(finals)} runs of the baseline diverged."
        elif len(set(finals)) == 1:
            refusal = f"All {len(finals)} runs of the baseline gave {finals[0]:g}: the seed changes nothing."
        elif floor > self.scale.margin:
            shown = (lambda x: f"{100 * math.expm1(x):.2g} %") if self.scale.relative else (lambda x: f"{x:.3g}")
            refusal = (
                f"The noise floor of the baseline against itself, {shown(floor)} at {N} pairs, exceeds the margin "
                f"of {shown(self.scale.margin)}: begin a session with a larger --margin, or with less noise."
            )
        self.ledger.add("noise", floor=floor if math.isfinite(floor) else None, pairs=len(d), refusal=refusal)
        self.say(refusal or f"A/A pass: {len(finals)} runs of the baseline, noise floor {floor:.3g}.")
        return refusal

    def judge(self, old: Side, new: Side, confirm: str) -> Answer:
        """Run pairs of a proposal until it is decided or time is up."""
        if confirm:
            accepted = [
                p for p in self.ledger.entries_of("proposal")
                if p["candidate"]["identity"] == new.identity and not p["confirmation"]
                and (self.verdict_of(p["proposal"]) or {}).get("decision") == ACCEPT
            ]  # fmt: skip
            if not accepted:
                raise Inadmissible(f"--confirm asks an accepted change again, and {new.text} was not accepted here.")
            old, new = self.kept_side(accepted[-1]["baseline"], confirm), self.side(new.text, confirm)
        proposal = self.propose(old, new, confirm)
        number, seeds, runner = proposal["proposal"], self.seeds(proposal["proposal"]), self.runner(new.kind)
        sides = {"baseline": old, "candidate": new}
        self.check_runs(number, new.kind)
        while True:
            d, level = self.differences(number), self.level(number)
            if level:
                decision = decide(d, self.scale.margin, level["max_pairs"], level["level"])
                if decision.outcome != "undecided":
                    break
            if self.out_of_time:
                decision = decision if level else decide([], self.scale.margin, FIRST, self.next_level(confirm))
                return self.answer(self.contrast(proposal, self.decision_entry(decision, d)), proposal)
            seed, at = seeds[len(d)], len(d)
            order = ROLES if at % 2 == 0 else ROLES[::-1]
            missing = [r for r in order if r not in self.values(number, seed)]
            try:
                found = runner.run_pair(sides, seeds, at, missing, self.claim(number))
                if at == 0:  # whole before its level is given: a candidate that never runs spends nothing
                    found = iter(list(found))
                for outcome in found:
                    if self.level(number) is None:
                        self.give_level(number, confirm)
                    self.write_outcome(number, seed, outcome)
            except Crash as error:
                return self.crashed(proposal, seed, error)
            self.say_pair(number, at)
        verdict = self.ledger.add("verdict", proposal=number, **self.decision_entry(decision, d))
        return self.answer(self.contrast(proposal, verdict), proposal)

    def propose(self, old: Side, new: Side, confirm: str) -> dict[str, Any]:
        """The open proposal of these sides, or a new one, written down before its first run."""
        for p in self.ledger.entries_of("proposal"):
            same = (p["candidate"]["identity"], p["baseline"]["identity"]) == (new.identity, old.identity)
            if same and p["confirmation"] == confirm and not self.verdict_of(p["proposal"]):
                return p
        number = len(self.ledger.entries_of("proposal")) + 1
        if new.kind == "overrides":
            common = self.settings.common + tuple(confirm.split())
            seeds = self.seeds(number)
            write_claim(
                self.claim(number), old, {"candidate": new}, common, self.metric or "test_loss", self.scale.margin,
                min(MOST_PAIRS, len(seeds)), seeds[0], self.settings.equal, tune=False,
            )  # fmt: skip
        return self.ledger.add(
            "proposal", proposal=number, baseline=old.as_json(), candidate=new.as_json(), confirmation=confirm,
            first_seed=self.seeds(number)[0],
        )  # fmt: skip

    def claim(self, number: int) -> Path:
        """The claims file of a proposal that compares overrides."""
        return self.options.folder / f"proposal{number}.yaml"

    def check_runs(self, number: int, kind: str) -> None:
        """Refuse to go on where runs of overrides that the ledger names are gone."""
        if kind != "overrides":
            return
        from albert_ablate.judge.claims import read_claims
        from albert_ablate.judge.contrasts import gather
        from albert_ablate.judge.run_store import RunStore

        file = read_claims(self.claim(number))
        data = gather(file, file.claims[0], file.claims[0].contrasts("full")[0], "full", RunStore(self.options.runs))
        if len(data.differences) < (recorded := len(self.differences(number))):
            raise Inadmissible(
                f"Runs of the baseline or the candidate that the ledger names are gone from {self.options.runs}: "
                f"{data.refusal or data.pending_reason or f'{len(data.differences)} of {recorded} pairs are there'}"
            )

    def next_level(self, confirm: str) -> float:
        """Significance level of the next proposal; a confirmation has ALPHA / 2 of its own."""
        return ALPHA / 2 if confirm else level_of(self.settings.control, self.history(), self.settings.alpha)

    def level(self, number: int) -> dict[str, Any] | None:
        """The entry that gave a proposal its significance level, None before its first run."""
        return next((e for e in self.ledger.entries_of("level") if e["proposal"] == number), None)

    def give_level(self, number: int, confirm: str) -> None:
        """Write down the significance level and the number of pairs of a proposal."""
        level = self.next_level(confirm)
        max_pairs = self.settings.max_pairs or pairs_for(level)
        self.ledger.add("level", proposal=number, level=level, max_pairs=max_pairs, confirmation=bool(confirm))

    def crashed(self, proposal: Mapping[str, Any], seed: int, error: Crash) -> Answer:
        """Record a failed run: nothing is decided, and asking again tries again."""
        number, role = proposal["proposal"], error.args[1] if len(error.args) > 1 else "a run"
        self.ledger.add("crash", proposal=number, role=role, seed=seed, reason=str(error.args[0]))
        reason = (
            f"{'The ' if role in ROLES else ''}{role} failed with seed {seed}: {error.args[0]}. Asked again, it is "
        )
        contrast = Contrast(
            proposal["baseline"]["text"], proposal["candidate"]["text"], INADMISSIBLE, f"{reason}tried again."
        )
        return self.answer(contrast, proposal)

    # --- saying ---

    def say_pair(self, number: int, at: int) -> None:
        """Print the values of a pair and the test so far."""
        level = self.level(number)
        assert level is not None
        d, found = self.differences(number), self.values(number, self.seeds(number)[at])
        x = decide(d, self.scale.margin, level["max_pairs"], level["level"])
        c = self.contrast(self.proposal(number), self.decision_entry(x, d))
        values = ", ".join(f"{r} {found[r]:.5g}" if math.isfinite(found[r]) else f"{r} diverged" for r in ROLES)
        seen = ""
        if math.isfinite(x.mean):
            t = (
                f"; t = {x.statistic:.2f}, accepted at {x.boundary:.2f}"
                if math.isfinite(x.statistic) and len(d) >= FIRST
                else ""
            )
            seen = f"; {self.metric} {c.change(x.mean):+.3g}{c.unit}{t}"
        self.say(f"pair {len(d)} of at most {level['max_pairs']}: {values}{seen}")

    def decision_entry(self, x: Decision, d: list[float]) -> dict[str, Any]:
        """A decision as the ledger stores it."""
        diverged = [sum(v == -math.inf for v in d), sum(v == math.inf for v in d), sum(math.isnan(v) for v in d)]
        interval = {k: v if math.isfinite(v) else None for k, v in (("mean", x.mean), ("low", x.low), ("high", x.high))}
        return {
            "decision": WORDS[x.outcome], "reason": x.reason, "pairs": x.pairs, **interval, "p": x.p, "level": x.level,
            "candidate_diverged": diverged[0] + diverged[2], "baseline_diverged": diverged[1] + diverged[2],
        }  # fmt: skip

    def contrast(self, proposal: Mapping[str, Any], v: Mapping[str, Any]) -> Contrast:
        """A recorded decision as a Contrast."""
        level = self.level(proposal["proposal"])
        mean, low, high = (math.nan if v[k] is None else v[k] for k in ("mean", "low", "high"))
        return Contrast(
            proposal["baseline"]["text"], proposal["candidate"]["text"], v["decision"], v["reason"], self.metric,
            self.scale.higher, self.scale.relative, self.scale.margin, mean, low, high, v["pairs"],
            level["max_pairs"] if level else 0, v["p"], v["level"], v["baseline_diverged"], v["candidate_diverged"],
            self.seeds(proposal["proposal"])[v["pairs"]] if v["decision"] == UNDECIDED else None,
        )  # fmt: skip

    def answer(self, contrast: Contrast, proposal: Mapping[str, Any] | None, recorded: bool = False) -> Answer:
        """An Answer with what belongs to a session: its name, the proposal, the ledger's hash."""
        more = {
            "session": self.options.folder.name, "proposal": proposal["proposal"] if proposal else None,
            "confirmation": (proposal["confirmation"] or None) if proposal else None,
            "control": self.settings.control, "ledger_hash": self.ledger.hash,
        }  # fmt: skip
        seconds = 0.0 if recorded else clock() - self.begun
        return Answer("gate", [contrast], str(self.options.folder), self.runs_done, seconds, recorded, more=more)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
