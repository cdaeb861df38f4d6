"""Create the record of a new run, and continue that of an unfinished one in a later session."""

import time
from collections.abc import Mapping
from typing import Any

from albert_ablate.config import (
    DEFAULT_TARGETS,
    Config,
    ConfigError,
    Identity,
    codes,
    keys_of,
    revisions,
    steps_of,
    trait,
)
from albert_ablate.config.secrets import masked
from albert_ablate.records.naming import name_of
from albert_ablate.records.provenance import provenance
from albert_ablate.records.tuning import role

REQUEST_KEYS = (
    "paths",
    "choices",
    "force",
    "accept_code",
    "debug",
)  # keys that say how a run was asked for, not what it is


def new_record(cfg: Config, run_id: Identity, text: Mapping, threads: int, ranks: int) -> dict[str, Any]:
    """The record of a run that starts.

    cfg: checked. text: what `Packed.described` says of its text, with the number of training `blocks`.
    """
    steps, per_step = steps_of(cfg), cfg.data.batch * cfg.model.context
    key, plain = keys_of(cfg), keys_of(cfg, with_code=False)
    kept = {"arm": key.arm, "setting": key.setting} | ({"plain": plain.arm} if plain.arm != key.arm else {})
    return {
        "status": "running",
        "label": label(cfg),
        "name": name_of(cfg),
        "arm": run_id.arm,
        "setting": run_id.setting,
        "identity": run_id.run,
        "key": kept,
        "seed": cfg.seed,
        "role": role(cfg.seed),
        "choices": cfg.choices,
        "revisions": revisions(cfg),
        "code": codes(cfg),
        "config": masked({k: v for k, v in cfg.items() if k not in REQUEST_KEYS}),
        "budget": {
            "tokens": steps * per_step,
            "steps": steps,
            "passes": steps * cfg.data.batch / text["blocks"],
        },
        "data": {k: v for k, v in text.items() if k != "blocks"},
        "summary": {},
        "proof": {},
        "provenance": {
            **provenance(trait(cfg.model, "library", None)),
            "threads": threads,
            "ranks": ranks,
            "precision": cfg.trainer.precision,
        },
        "cost": {},
        "histories": {},
        "error": None,
        "signal": None,
        "sessions": 0,
        "created": time.time(),
    }


def continued_record(record: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The record of an unfinished run for its next session.

    fresh: its new record under the current configuration, whose evaluation and diagnostics settings apply from now on.
    """
    old, new = record["config"]["evaluation"]["tokens"], fresh["config"]["evaluation"]["tokens"]
    if old != new:
        raise ConfigError(
            f"evaluation.tokens={new} is not allowed: this run began with {old}, and its evaluations must compare."
        )
    if record["provenance"] != fresh["provenance"]:
        record["resumed_under"] = fresh["provenance"]
    if record.get("code") and record["code"] != fresh["code"]:
        record["resumed_by_code"] = fresh["code"]
    now = {key: fresh[key] for key in ("status", "error", "signal", "config", "choices")}
    return fresh | record | now


def label(cfg: Config) -> str:
    """Title of a run: the options taken in the groups that make an arm."""
    choices = cfg.get("choices") or {}
    groups = ("recipe", "model", "norm", "dropout", "optimizer", "clip", "data")
    name = " ".join(f"{g}={choices[g]}" for g in groups if choices.get(g)) or "run"
    return name if cfg.task._target_ == DEFAULT_TARGETS["task"] else f"{name} task={_task(cfg)}"


def _task(cfg: Config) -> str:
    return cfg.task.data if isinstance(cfg.task.data, str) else cfg.option("task")
