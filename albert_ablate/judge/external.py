"""Runs of another trainer (`analysis/external`) as evidence, and what they cannot prove.

An arm of a claims file is then a list of conditions on the columns of these runs, `[arm=muon]` or `[optimizer=muon,
lr=0.001]`, in the place of overrides. Nothing says in which order such a run saw its data, how its learning rate was
chosen, and often not on how many tokens it was trained: a claim has to waive each of these by name, and its entry in
the ledger says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from albert_ablate.analysis.external.cells import number
from albert_ablate.analysis.external.runs import external_rows, home_folder, is_external
from albert_ablate.analysis.registry import Evidence, Missing, Unusable
from albert_ablate.config import ConfigError, nearest
from albert_ablate.judge.claim_models import UNPROVEN
from albert_ablate.judge.claims import ClaimsFile, ClaimText, Part, arms_of, measure_of
from albert_ablate.judge.comparability import unequal
from albert_ablate.judge.contrast_data import ContrastData, Job
from albert_ablate.judge.contrasts import add_pair, gather
from albert_ablate.judge.run_store import RunStore
from albert_ablate.judge.words import joined
from albert_ablate.records.folder import DONE
from albert_ablate.records.history import values_of


@dataclass(frozen=True)
class ExternalRun(Evidence):
    """A run of another trainer. columns: what its source says of it. read: its histories."""

    columns: Mapping[str, Any]
    read: Callable[[str], pa.Table]

    @property
    def lr(self) -> float:
        """Raises Unusable: nobody knows how another trainer chose it."""
        raise Unusable(f"{self.name} has no tuned learning rate: it was made by another trainer.")

    def summary_metric(self, name: str) -> float:
        """A figure at the end of the run, from its column. Raises Unusable where there is none."""
        if self.columns.get(name) is None:
            raise Unusable(f"{self.name} has no {name}.")
        return float(self.columns[name])

    def evaluation(self, name: str, metric: str) -> float:
        """Raises Unusable: such a run cannot be evaluated."""
        raise Unusable(f"{self.name} has no {name}.{metric}: it was made by another trainer.")

    def column(self, history: str, name: str) -> Any:
        """A column of a history. Raises Unusable where the source has none."""
        table = self.read(history)
        values = values_of(table[name]) if name in table.column_names else np.empty(0)
        if not len(values) or values.dtype.kind == "f" and np.isnan(values).all():
            raise Unusable(f"{self.name} has no {name} over its training.")
        return values


class ExternalStore(RunStore):
    """The runs of a source, by conditions on their columns."""

    def __init__(self, source: Path | str):
        self.source = source
        super().__init__(home_folder(source))

    def update(self) -> None:
        """Read the source anew."""
        self.evidence, self.unreadable, self.outdated = [], [], []
        for row, read in external_rows(self.source):
            record = {
                "seed": row["seed"], "status": row["status"], "summary": row, "config": {}, "cost": {},
                "budget": {"tokens": row["tokens"]} if row.get("tokens") is not None else {},
            }  # fmt: skip
            place = Path(quote(row["label"], safe=" =,")) / f"seed{row['seed']}"  # no two arms have one name
            self.evidence.append(ExternalRun(place, record, row, read))

    def runs_of(self, overrides: Sequence[str], outdated: bool = False) -> list[Evidence]:
        """The runs whose columns have these values; ConfigError where no run has such a column or value."""
        kept = [] if outdated else list(self.evidence)
        for condition in overrides:
            name, _, value = condition.lstrip("+").partition("=")
            key = "label" if name == "arm" else name
            cells = [c for r in self.evidence if (c := r.columns.get(key)) is not None]  # type: ignore[attr-defined]
            if not cells:
                raise ConfigError(f"{self.source} has no column {name}, which {condition} asks for.")
            if not any(_is(cell, value) for cell in cells):
                raise ConfigError(f"{self.source} has no {name} {value}: it has {nearest(value, {*map(str, cells)})}.")
            kept = [r for r in kept if _is(r.columns.get(key), value)]  # type: ignore[attr-defined]
        return kept

    def seeds_of(self, seeds: Sequence[int], arms: Sequence[Sequence[str]]) -> Sequence[int]:
        """The claim's seeds where it names them, and else those of the runs in rising order."""
        if tuple(seeds) != tuple(range(len(seeds))):
            return seeds
        return sorted({r.record["seed"] for arm in arms for r in self.runs_of(arm)})


def _is(cell: Any, value: str) -> bool:
    """Whether a cell holds this value, as text or as a number."""
    known, wanted = number(cell), number(value)
    return str(cell) == value or known is not None and known == wanted


def open_store(runs: Path) -> RunStore:
    """The runs that a path names, of this project or of another trainer."""
    return ExternalStore(runs) if is_external(runs) else RunStore(runs)


def gather_any(file: ClaimsFile, claim: ClaimText, part: Part, form: str, store: RunStore) -> ContrastData:
    """What the runs of a store say about a contrast (`contrasts.gather`)."""
    if isinstance(store, ExternalStore):
        return gather_external(file, claim, part, form, store)
    return gather(file, claim, part, form, store)


def gather_external(file: ClaimsFile, claim: ClaimText, part: Part, form: str, store: ExternalStore) -> ContrastData:
    """The differences of a contrast between runs of another trainer over the gapless prefix of its seeds."""
    out, m = ContrastData(), measure_of(part)
    arms = {a: file.overrides(claim, part, form, a) for a in arms_of(part)}
    runs = {a: store.runs_of(conditions) for a, conditions in arms.items()}
    out.treatment = part.treatment[0] if len(part.treatment) == 1 else f"the mean of {joined(part.treatment)}"
    by_seed = {a: {r.record["seed"]: r for r in several} for a, several in runs.items()}
    unproven = [*UNPROVEN]
    if all(r.record["budget"] for several in runs.values() for r in several):
        unproven.remove("tokens")
    out.refusal = _refusal(claim, part, runs, unproven)
    if out.refusal:
        return out
    seeds = store.seeds_of(claim.seeds, [*arms.values()])
    for i, seed in enumerate(seeds[: claim.forms[form].N]):
        lacking = [a for a in runs if seed not in by_seed[a] or by_seed[a][seed].record["status"] not in DONE]
        if lacking:
            waiting = sum(all(s in known for known in by_seed.values()) for s in seeds[i + 1 :])
            out.pending_reason = f"Seed {seed} of {joined(lacking)} is missing" + (
                f", and {waiting} pair{'s wait' if waiting > 1 else ' waits'} behind it." if waiting else "."
            )
            out.jobs = [Job(a, arms[a], None, seed) for a in lacking]
            break
        pair = {a: [known[seed]] for a, known in by_seed.items()}
        base = pair[part.control][0]
        unlike = [unequal(r, base, a, part.control, claim.equal) for a, (r,) in pair.items() if a != part.control]
        if why := next(filter(None, unlike), ""):
            out.refusal = why
            break
        try:
            add_pair(out, m, part, out.treatment, pair)
        except (Missing, Unusable, ValueError) as sentence:
            out.refusal = str(sentence)
            break
        out.seeds.append(seed)
        out.used |= {r.relative_folder: r for several in pair.values() for r in several}
    said = joined([UNPROVEN[u] for u in unproven])
    out.notes.append(f"Not proven by these runs of another trainer, and waived by the claim: {said}.")
    return out


def _refusal(claim: ClaimText, part: Part, runs: Mapping[str, Sequence[Evidence]], unproven: Sequence[str]) -> str:
    """Why runs of another trainer cannot answer a contrast, or ""."""
    m = measure_of(part)
    if m.kind not in ("run", "pair") or m.evaluation or part.rate_factor != 1.0:
        return f"{m.name} needs runs of this project: those of another trainer have losses, curves and their columns."
    if len(part.treatment) > 1 and not part.other_end:
        return f"Of {', '.join(part.treatment)} a level is chosen on tuning seeds, which these runs do not have."
    for name, several in runs.items():
        seeds = [r.record["seed"] for r in several]
        if twice := [s for s in seeds if seeds.count(s) > 1]:
            return f"{name} has seed {twice[0]} more than once: its conditions hold for several arms of the source."
    if set(r.relative_folder for r in runs[part.control]) & {
        r.relative_folder for a in part.treatment for r in runs[a]
    }:
        return f"{part.treatment[0]} and {part.control} are the same runs: nothing differs."
    if missing := [u for u in unproven if u not in claim.waives]:
        said = joined([UNPROVEN[u] for u in missing])
        return (
            f"These runs of another trainer do not prove {said}: with waives: [{', '.join(missing)}] in the claim they "
            "are judged all the same, and the ledger says it."
        )
    return ""
