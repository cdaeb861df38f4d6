"""Claims and records in, a ledger out: what may be compared, the differences per seed, the verdicts of STATISTICS.md.

The same claims and records give the same ledger, byte for byte: nothing in it depends on when or where it was made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert_ablate.analysis.external.runs import home_folder
from albert_ablate.collector import without_collector
from albert_ablate.config import ConfigError, nearest, unwritable
from albert_ablate.judge import registration
from albert_ablate.judge.claims import FORMS, ClaimsFile, ClaimText, arms_of, measure_of
from albert_ablate.judge.contrast_data import ContrastData
from albert_ablate.judge.entries import entry_of, refusals, tested_contrasts
from albert_ablate.judge.external import gather_any, open_store
from albert_ablate.judge.run_store import RunStore
from albert_ablate.records.checked import write_checked
from albert_ablate.records.folder import DONE
from albert_ablate.records.json_output import nonfinite_as_text, schema_id
from albert_ablate.stats.verdicts import Claim, verdicts


def judge(file: ClaimsFile, runs: Path, form: str = "screen") -> dict[str, Any]:
    """The ledger of a claims file from the records below `runs`."""
    return judged(file, runs, form).ledger


def judge_and_register(file: ClaimsFile, runs: Path, form: str) -> dict[str, Any]:
    """The ledger; the family is registered from now on."""
    now = judged(file, runs, form)
    registration.write(file, home_folder(runs), now.registration)
    return now.ledger


@dataclass(frozen=True)
class Judged:
    """A ledger; the data of each claim's primary and secondary contrasts; the family's registration from now on."""

    ledger: dict[str, Any]
    primary: dict[str, list[ContrastData]]
    secondary: dict[str, list[ContrastData]]
    registration: dict[str, Any]


@without_collector()
def judged(file: ClaimsFile, runs: Path, form: str, store: RunStore | None = None) -> Judged:
    """All claims of a form, together with those of another form that has been looked at: both share the level.

    store: of the same runs, read before.
    """
    store = store or open_store(runs)
    chosen = [c for c in file.claims if form in c.forms]
    if not chosen:
        raise ConfigError(f"{file.path} has no claim with the form {form}.")
    family = registration.registered(file, store.root, form, lambda claim, form: _runs_there(file, claim, form, store))
    store.seen = {(c.name, f) for c in file.claims for f in c.forms if registration.is_seen(family, c.name, f)}
    asked: dict[tuple[str, str], Claim] = {}
    data = dict[tuple[str, str], list[ContrastData]]()
    for f in [form, *(f for f in family["looked"] if f != form)]:
        for c in (c for c in file.claims if f in c.forms):
            parts = c.contrasts(f)
            contrasts = data[f, c.name] = [gather_any(file, c, p, f, store) for p in parts]
            if not refusals(contrasts) and measure_of(parts[0]).kind != "exact":
                asked[f, c.name] = Claim(tested_contrasts(parts, contrasts, c.test), c.forms[f].N, c.needs)  # type: ignore[arg-type]
            if any(x.seeds for x in contrasts):
                family["claims"][c.name]["forms"][f]["seen"] = True
    primary = {c.name: data[form, c.name] for c in chosen}
    secondary = {c.name: [gather_any(file, c, p, form, store) for p in c.secondary_contrasts(form)] for c in chosen}
    forms = [f for f in FORMS if f in family["forms"] or f in family["looked"]]  # `form` is looked at from now on
    tests = file.size * len(forms)
    decided = dict(zip(asked, verdicts([*asked.values()], tests, file.alpha), strict=True))
    entries = [
        entry_of(file, c, form, store, primary[c.name], secondary[c.name], decided.get((form, c.name)), family, tests)
        for c in chosen
    ]
    store.keys.save()
    refused = [f"{e['name']}: {e['reason']}" for e in entries if e["verdict"] == "inadmissible"]
    gone = registration.gone(file, family)
    ledger = {
        "version": 1,
        "claims_file": file.path.name,
        "form": form,
        "family": {"name": file.family, "size": file.size, "alpha": file.alpha, "forms": forms, "tests": tests},
        "claims": entries,
        "refusals": [*store.unreadable, *refused, *gone],
        "unreadable": store.unreadable,
        "gone": gone,
    }
    return Judged(ledger, primary, secondary, family)


def _runs_there(file: ClaimsFile, claim: ClaimText, form: str, store: RunStore) -> registration.RunCounts:
    """How many of a claim's runs are done, at whatever learning rate."""
    done, wanted, pairs = dict[tuple[str, ...], set[int]](), set[tuple[tuple[str, ...], int]](), 0
    for part in claim.contrasts(form):
        sides = [file.overrides(claim, part, form, a) for a in arms_of(part)]
        seeds = store.seeds_of(claim.seeds, sides)[: claim.forms[form].N]
        for side in sides:
            if side not in done:
                ended = [r for r in store.runs_of(side) if r.record["status"] in DONE] if store.evidence else []
                done[side] = {r.record["seed"] for r in ended}
        wanted |= {(side, s) for side in sides for s in seeds}
        pairs += sum(all(s in done[side] for side in sides) for s in seeds)
    return registration.RunCounts(sum(s in done[side] for side, s in wanted), len(wanted), pairs)


def refuse_unknown(file: ClaimsFile, only: Sequence[str]) -> None:
    """Raise ConfigError for a name in `only` that no claim of the file has."""
    names = [c.name for c in file.claims]
    if bad := [n for n in only if n not in names]:
        raise ConfigError(f"{file.path} has no claim {bad[0]}: it has {nearest(bad[0], names)}.")


def write_ledger(ledger: Mapping[str, Any], path: Path) -> None:
    """As strict JSON: what is not finite is "Infinity", "-Infinity" or "NaN"."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checked(path, {"schema": schema_id("ledger"), **nonfinite_as_text(ledger)})
    except OSError as error:
        raise unwritable(path, error) from None
