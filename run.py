"""Train one arm: `python run.py norm=pre_ln dropout=depth_decay`. `python run.py --help` lists what can be chosen."""

import sys
from typing import Any


def train(cfg: Any) -> tuple[int, float | None]:
    """One job, as Hydra composed it: its exit code and its objective, the validation loss in nats per token."""
    # imported here, so that --help and mistaken arguments are answered without torch
    from albert_ablate.trackers.wandb import agent_run
    from albert_ablate.training.console import exit_code, show_record
    from albert_ablate.training.launch import is_first
    from albert_ablate.training.run import run
    from albert_ablate.training.swept import composed, run_swept

    cfg = composed(cfg)  # compose: the options taken; under a W&B agent the learning rate tuned for the arm
    first = is_first(cfg)  # of the processes of a distributed run rank 0 alone prints
    record = (run_swept if agent_run() else run)(cfg, verbose=first)  # identify, find or train, record
    if first:
        show_record(record)
    return exit_code(record) if first else 0, record["summary"]["val_loss"]


def main() -> int:
    from albert_ablate.training.main import command

    return command(train)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before there is anything to stop
        sys.exit(130)
