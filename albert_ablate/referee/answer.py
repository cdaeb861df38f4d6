"""The answer of `compare` and `gate`: exit code, JSON, one sentence, a text plot of the interval, Markdown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from albert_ablate.records.json_output import schema_id

ACCEPT, REJECT, INADMISSIBLE, NO_EFFECT, UNDECIDED = "ACCEPT", "REJECT", "INADMISSIBLE", "NO EFFECT", "UNDECIDED"
EXIT_CODES = {ACCEPT: 0, REJECT: 1, INADMISSIBLE: 2, NO_EFFECT: 3, UNDECIDED: 75}
BEST_FIRST = (
    ACCEPT,
    UNDECIDED,
    NO_EFFECT,
    REJECT,
    INADMISSIBLE,
)  # of several contrasts the first of these
WIDTH = 61


@dataclass(frozen=True)
class Contrast:
    """Result for one candidate against the baseline; effects are positive if the candidate is better."""

    baseline: str
    candidate: str
    decision: str
    reason: str
    metric: str = ""
    higher: bool = False
    relative: bool = False  # effects and margin are log ratios
    margin: float = 0.0
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    pairs: int = 0
    max_pairs: int = 0
    p: float = 1.0  # sequential, right whenever sampling stops
    level: float = 0.0  # what p is compared with
    baseline_diverged: int = 0
    candidate_diverged: int = 0
    next_seed: int | None = None  # of the next pair that would be run

    def change(self, effect: float) -> float:
        """An effect as a change of the metric: in percent where it is a log ratio, else in the metric's unit."""
        signed = effect if self.higher else -effect
        return 100 * math.expm1(signed) if self.relative else signed

    @property
    def unit(self) -> str:
        """Unit of `change`: %, or none."""
        return " %" if self.relative else ""

    def effect_text(self) -> str:
        """Describe the measured change with interval and pairs, without the decision."""
        diverged = ""
        if self.baseline_diverged or self.candidate_diverged:
            diverged = f"; diverged: {self.candidate_diverged} against {self.baseline_diverged} runs"
        pairs = f"{self.pairs} pair{'' if self.pairs == 1 else 's'}"
        if not math.isfinite(self.mean):
            return f"{self.candidate} against {self.baseline}: {pairs}{diverged}"
        ends = sorted((self.change(self.low), self.change(self.high)))
        interval = f"95 % interval {_number(ends[0])} to {_number(ends[1])}"
        if not all(map(math.isfinite, ends)):
            interval = "no interval yet"
        return (
            f"{self.candidate} changed {self.metric} by {_number(self.change(self.mean))}{self.unit} against "
            f"{self.baseline} ({interval}; {pairs}{diverged})"
        )

    def sentence(self) -> str:
        """The decision in a sentence, with the measured change and the reason."""
        if self.decision == INADMISSIBLE and not self.pairs:
            return f"{INADMISSIBLE}: {self.reason}"
        return f"{self.effect_text()}: {self.decision}. {self.reason}"

    def document(self) -> dict[str, Any]:
        """The contrast as JSON, see `schemas/answer.schema.json`."""

        def shown(f: Callable[[float], float]) -> dict[str, float | None]:
            ends = [f(self.low), f(self.high)]
            ends = sorted(ends) if all(map(math.isfinite, ends)) else ends
            return {"mean": _finite(f(self.mean)), "low": _finite(ends[0]), "high": _finite(ends[1])}

        return {
            "baseline": self.baseline, "candidate": self.candidate, "decision": self.decision, "reason": self.reason,
            "metric": self.metric, "better": "higher" if self.higher else "lower", "relative": self.relative,
            "margin": self.margin, "effect": shown(float), "change": shown(self.change), "pairs": self.pairs,
            "max_pairs": self.max_pairs, "p": self.p, "level": self.level,
            "diverged": {"baseline": self.baseline_diverged, "candidate": self.candidate_diverged},
            "next_seed": self.next_seed,
        }  # fmt: skip


@dataclass
class Answer:
    """Result of a command: its contrasts, the runs and seconds spent."""

    command: str  # compare, gate
    contrasts: Sequence[Contrast]
    folder: str = ""
    runs: int = 0  # spent by this answer
    seconds: float = 0.0
    recorded: bool = False  # from records, without a new run
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)  # of a session

    @property
    def decision(self) -> str:
        """The best decision among the candidates."""
        return min((c.decision for c in self.contrasts), key=BEST_FIRST.index)

    @property
    def exit_code(self) -> int:
        """Exit code of the decision."""
        return EXIT_CODES[self.decision]

    def sentence(self) -> str:
        """The sentences of all contrasts."""
        return " ".join(c.sentence() for c in self.contrasts)

    def document(self) -> dict[str, Any]:
        """The answer as a JSON document, see `schemas/answer.schema.json`."""
        return {
            "schema": schema_id("answer"), "command": self.command, "decision": self.decision,
            "exit_code": self.exit_code, "sentence": self.sentence(),
            "contrasts": [c.document() for c in self.contrasts], "folder": self.folder, "runs": self.runs,
            "seconds": round(self.seconds, 1), "recorded": self.recorded, "notes": self.notes, **self.more,
        }  # fmt: skip

    def markdown(self) -> str:
        """A table for a pull request."""
        rows = [
            f"**{self.decision}**: {self.sentence()}", "",
            "| candidate | baseline | metric | change | 95 % interval | pairs | decision |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for c in self.contrasts:
            x = c.document()["change"]
            ends = "" if x["low"] is None else f"{_number(x['low'])} to {_number(x['high'])}"
            mean = "" if x["mean"] is None else f"{_number(x['mean'])}{c.unit}"
            cells = [f"`{c.candidate}`", f"`{c.baseline}`", c.metric, mean, ends, f"{c.pairs} of {c.max_pairs}"]
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} | {c.decision} |")
        return "\n".join([*rows, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def show(self, say: Callable[[str], None]) -> None:
        """Print the answer: a text plot of each interval, what was spent, and one summarizing sentence."""
        for c in self.contrasts:
            for line in picture(c):
                say(line)
        for note in self.notes:
            say(note)
        spent = "from records, nothing was run" if self.recorded else f"{self.runs} runs, {self.seconds:,.0f} s"
        say(f"{spent}{f'; {self.folder}' if self.folder else ''}")
        say(self.sentence())


def inadmissible(command: str, reason: str, baseline: str = "", candidate: str = "") -> Answer:
    """The answer to a question that is refused: INADMISSIBLE, with the reason."""
    return Answer(command, [Contrast(baseline, candidate, INADMISSIBLE, reason)])


def picture(c: Contrast) -> list[str]:
    """Text plot of the interval of the change against the margin: `=` the margin around zero, `o` the mean."""
    ends = [c.change(x) for x in (c.low, c.high, c.mean, c.margin, -c.margin)]
    if not all(map(math.isfinite, ends)):
        return []
    low, high = sorted(ends[:2])
    reach = 1.1 * max(map(abs, ends)) or 1.0

    def at(x: float) -> int:
        return min(WIDTH - 1, max(0, round((x / reach + 1) / 2 * (WIDTH - 1))))

    zone = [" "] * WIDTH
    for i in range(at(min(ends[3:])), at(max(ends[3:])) + 1):
        zone[i] = "="
    zone[at(0)] = "0"
    line = [" "] * WIDTH
    for i in range(at(low), at(high) + 1):
        line[i] = "-"
    line[at(low)], line[at(high)] = "[", "]"
    line[at(ends[2])] = "o"
    better = "better" if c.higher else "worse"
    return [
        f"  {''.join(zone)}  = margin, {_number(max(map(abs, ends[3:])), '')}{c.unit}",
        f"  {''.join(line)}  change of {c.metric}; to the right is {better}",
    ]


def _number(x: float, sign: str = "+") -> str:
    return f"{x:{sign}.3g}"


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
