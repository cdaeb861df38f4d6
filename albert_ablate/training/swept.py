"""Runs under a W&B sweep agent: tuned learning rate, and results sent to the server even if the run was found done."""

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config import check, with_choices
from albert_ablate.records.folder import Busy
from albert_ablate.records.tuning import LEARNING_RATE, read_tuning
from albert_ablate.trackers.base import joined
from albert_ablate.trackers.wandb import agent_run, mirror_found
from albert_ablate.training.launch import is_first
from albert_ablate.training.prepare import identified
from albert_ablate.training.run import run

POLL_SECONDS = 2.0  # seconds between looks at a run that somebody else is training


def composed(cfg: Any) -> Mapping:
    """Hydra's composition of this job with the options taken; under a W&B agent with the arm's tuned learning rate."""
    from hydra.core.hydra_config import HydraConfig

    about = HydraConfig.get()
    overrides = about.overrides.task
    return with_tuned_rate(with_choices(cfg, about.runtime.choices, overrides), overrides)


def with_tuned_rate(cfg: Mapping, overrides: Iterable[str]) -> Mapping:
    """Under a W&B agent use the learning rate that `albert-ablate tune` chose for this arm, as `albert-ablate sweep`
    does, unless one of the `overrides` sets it."""
    if agent_run() is None or any(o.lstrip("+").startswith(f"{LEARNING_RATE}=") for o in overrides):
        return cfg
    checked = check(cfg)
    tuning = read_tuning(Path(checked.paths.runs).expanduser(), identified(checked)[1].arm)
    return check({**checked, "optimizer": {**checked.optimizer, "lr": tuning["rate"]}}) if tuning else checked


def run_swept(cfg: Mapping, verbose: bool = False) -> dict[str, Any]:
    """`run`; under a W&B agent a run that is being trained elsewhere is waited for, and one that is found is sent."""
    if agent_run() is None:
        return run(cfg, verbose)
    waiting = False
    while True:
        try:
            record = run(cfg, verbose)
            break
        except Busy as error:
            if not waiting:
                print(f"{error} Waiting for its result.", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(POLL_SECONDS)
    if record.get("found") and is_first(cfg):
        from albert_ablate.model.build import build

        mirror_found(joined(build(cfg["logger"])), Path(record["folder"]), record)
    return record
