"""Claims judged by the rules of the first build and by today's, side by side, with what changed and why.

    python benchmarks/first_build.py CLAIMS.yaml RUNS [--form screen] [--commit 0c434bf]

The statistics of the first build are its own modules, read from git (so it needs a clone with its history): the
interval of the last look, the signed rank alone once a run diverged, and a family of its own for each form. Differences
are taken as it took them: without asking whether records contradict themselves, are copies, doubles or edited, whether
the arms were evaluated and tuned alike and whether a rate is that of its own curve. Its tuning slack lacked a factor
that is 2 on average: half is taken, and 0 where it is unknown. No record is changed.
"""

import argparse
import contextlib
import math
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from albert_ablate.judge import comparability, contrasts
from albert_ablate.judge.claims import measure_of, read_claims
from albert_ablate.judge.ledger import judged
from albert_ablate.judge.run_store import RunStore

MODULES = ("statistics", "verdicts")
TODAY, FIRST = "today", "first"


def first_build(commit: str) -> Any:
    """The first build's `verdicts`, as a module."""
    for name in MODULES:
        file = f"albert_ablate/analysis/{name}.py"
        done = subprocess.run(["git", "show", f"{commit}:{file}"], capture_output=True, text=True,
                              cwd=Path(__file__).parent)  # fmt: skip
        if done.returncode:
            sys.exit(f"git has no {commit}:{file}: this needs a clone with the project's history.")
        module = sys.modules[f"first_{name}"] = types.ModuleType(f"first_{name}")
        exec(compile(done.stdout.replace("albert_ablate.analysis.", "first_"), file, "exec"), module.__dict__)
    return sys.modules["first_verdicts"]


class EveryRun(RunStore):
    """All records, those that contradict themselves too."""

    def _admit(self) -> None:
        pass


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the checks of runs that the first build did not have."""

    def nothing(*given: Any) -> str:
        return ""

    checks = ((contrasts, "suspect"), (comparability, "_measured_unlike"), (comparability, "_refuse_unlike_tuning"),
              (comparability, "_not_of_its_curve"))  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, name in checks:
            stack.enter_context(mock.patch.object(module, name, nothing))
        yield


def halved(slack: float) -> float:
    """The slack that was printed: half of the expected loss above the optimum, which today is a 95 % bound (3.84)."""
    return slack / 3.84 / 2 if math.isfinite(slack) else 0.0


def of_first_build(file: Any, runs: Path, form: str, old: Any) -> dict[str, tuple[str, Any]]:
    """By claim its word, and its verdict where there is one."""
    store, asked, out = EveryRun(runs), {}, {}
    with unchecked():
        for claim in (c for c in file.claims if form in c.forms):
            parts = claim.contrasts(form)
            data = [contrasts.gather(file, claim, p, form, store) for p in parts]
            refused = [x.refusal for x in data if x.refusal]
            if refused or measure_of(parts[0]).kind == "exact" or any(p.other_end for p in parts):
                word = f"inadmissible: {refused[0]}" if refused else "not asked"
                out[claim.name] = word, None
                continue
            asked[claim.name] = old.Claim(
                [
                    old.Contrast(x.differences, p.margin, p.null, halved(x.slack), x.mixed_reason,
                                 measure_of(p).discrete)
                    for p, x in zip(parts, data, strict=True)
                ],
                claim.forms[form].N, claim.needs,
            )  # fmt: skip
    found = old.verdicts([*asked.values()], file.size, file.alpha)
    return out | {name: (v.verdict, v) for name, v in zip(asked, found, strict=True)}


def words(part: Any) -> str:
    """mean (low to high), pairs."""
    get = part.get if isinstance(part, dict) else lambda key: getattr(part, key)
    mean, low, high = (f"{get(k):+.3g}" for k in ("mean", "low", "high"))
    return f"{mean} ({low} to {high}), {get('pairs')} pairs"


def why(entry: dict[str, Any], word: str, verdict: Any, tests: int, size: int) -> list[str]:
    """What moved, and by which rule."""
    if verdict is None:
        return []
    out = []
    if entry["verdict"] == "inadmissible":
        return [f"refused now: {entry['reason']}"]
    for new, old in zip(entry["parts"], verdict.parts, strict=True):
        if new["pairs"] != old.pairs:
            out.append(f"{new['pairs']} pairs are admitted now, not {old.pairs}")
        elif math.isfinite(old.low) and (new["low"], new["high"]) != (old.low, old.high):
            holds = old.low <= 0 <= old.high and word in ("supported", "refuted")
            last = "; that of the last look held 0 beside a verdict" if holds else ""
            out.append(f"the interval is what those of all looks have in common{last}")
        if old.finished < old.pairs:
            out.append("Fisher's exact test stands beside the signed rank once a run diverged")
    if tests != size:
        out.append(f"{tests} tests share the level, not {size}: every form of a claim counts")
    if word != entry["verdict"] and not out:
        out.append(entry["reason"])
    return list(dict.fromkeys(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--form", choices=["screen", "full"], default="screen")
    parser.add_argument("--commit", default="0c434bf")
    a = parser.parse_args()
    file, old = read_claims(a.claims), first_build(a.commit)
    before, ledger = of_first_build(file, a.runs, a.form, old), judged(file, a.runs, a.form).ledger
    changed = 0
    for entry in ledger["claims"]:
        word, verdict = before[entry["name"]]
        changed += word.partition(":")[0] != entry["verdict"]
        print(f"{entry['name']}\n  first build  {word}")
        for part in verdict.parts if verdict else ():
            print(f"               {words(part)}")
        detail = f": {entry['detail']}" if entry["detail"] else ""
        print(f"  today        {entry['verdict']}{detail}; {entry['registration']}")
        for part in entry["parts"] if entry["verdict"] != "inadmissible" else ():
            print(f"               {words(part)}")
        for text in why(entry, word, verdict, ledger["family"]["tests"], file.size):
            print(f"  because      {text}")
    print(f"{changed} of {len(ledger['claims'])} verdicts differ.")
    for text in ledger["unreadable"]:
        print(f"not counted today: {text}")


if __name__ == "__main__":
    main()
