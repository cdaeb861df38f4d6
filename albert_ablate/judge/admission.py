"""Which records are evidence: what a slip, a copy or an edit by hand leaves behind is refused, each with a sentence.

Not a proof against forgery: whoever writes every file of a run anew passes. What is compared is what the run itself
wrote in two places.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from albert_ablate.analysis.registry import Evidence, Missing, Unusable
from albert_ablate.config import ConfigError, run_identity
from albert_ablate.records.tuning import role

LOSSES = {"val_loss": "validation", "train_loss": "train", "test_loss": "test"}  # of the summary, by split


def refusal(folder: Path, record: Mapping[str, Any]) -> str:
    """Why a record is not evidence by itself, or ""; what an older record does not hold is not asked for."""
    seed, setting = record["seed"], record.get("setting", folder.parent.name)
    if (folder.parent.name, folder.name) != (setting, f"seed{seed}"):
        return f"it lies in {folder.parent.name}/{folder.name} and says that it is {setting}/seed{seed}"
    if record.get("identity", wanted := run_identity(setting, seed)) != wanted:
        return f"its identity is {record['identity']}, and that of {setting} with seed {seed} is {wanted}"
    if record.get("role", role(seed)) != role(seed):
        return f"its role is {record['role']}, and seed {seed} is one of {role(seed)}"
    if any(again.get("verdict") == "differs" for again in record.get("reproductions") or ()):
        return "retraining it gave other weights"
    return ""


def edited(run: Evidence) -> str:
    """Why the losses of a run's summary are not those that its history of evaluations ends with, or "".

    Asked of language models whose evaluations can be read.
    """
    if "task" in (run.record.get("choices") or {}) and run.record["choices"]["task"] != "lm":
        return ""
    for name, split in LOSSES.items():
        said = run.record["summary"].get(name)
        try:
            last = float(run.curve(split)[1][-1])
        except Unusable as damaged:
            return str(damaged)
        except (Missing, ConfigError):
            continue
        if said is not None and math.isfinite(last) and not math.isclose(float(said), last, rel_tol=1e-9):
            return f"{run.name} has a {name} of {said:.6g} in its summary and of {last:.6g} in its evaluations."
    return ""


def repeated(arm: str, runs: Iterable[Evidence]) -> str:
    """Why runs of several seeds of one arm are copies of each other, or ""."""
    seen: dict[tuple[str, str], Evidence] = {}
    for run in runs:
        proof = run.record.get("proof") or {}
        marks = {"order of data": proof.get("data_order") if run.record["summary"].get("tokens") else None}
        if run.record["status"] == "finished":  # weights that are not finite are all alike
            marks["final weights"] = proof.get("final_weights")
        for what, mark in marks.items():
            if not mark:
                continue
            other = seen.setdefault((what, mark), run)
            if other.record["seed"] != run.record["seed"]:
                seeds = f"{other.record['seed']} and {run.record['seed']}"
                return f"Seeds {seeds} of {arm} have the same {what}: one of them is a copy."
    return ""


def doubled(arm: str, runs: Sequence[Evidence]) -> str:
    """Why several records of one arm, seed and rate leave it open which counts, or ""; equal ones do not."""
    results = [
        (r.record["status"], r.record["summary"], (r.record.get("proof") or {}).get("final_weights")) for r in runs
    ]
    if all(x == results[0] for x in results):
        return ""
    places = " and ".join(r.relative_folder for r in runs)
    return f"Seed {runs[0].record['seed']} of {arm} has {len(runs)} records that differ: {places}. Remove all but one."
