"""`--stack`: which runs of a study are trained as one stack, and why the others are trained alone."""

import json
import math
from collections.abc import Container, Sequence

from albert_ablate.config import Config, construct, trait
from albert_ablate.studies.packing import read_count
from albert_ablate.studies.planned_runs import Planned

OFF = 1  # runs at a time
SHAPES = ("model", "norm", "norm_type", "attention", "data", "tokenizer")  # and the number of passes of the loss


def read_stack(text: str) -> int:
    """The number of runs that --stack asks for."""
    return read_count("--stack", text, 2, "off", OFF)


def alone_because(cfg: Config) -> str | None:
    """Why a run is trained alone whatever --stack says; None where it may be trained in a stack."""
    import torch

    from albert_ablate.data.tasks import is_language
    from albert_ablate.model.build import assemble
    from albert_ablate.model.stacked import VECTOR, unstackable

    trainer, data = cfg.trainer, cfg.data
    if not is_language(cfg):
        return "a task other than lm"
    reasons = {
        "more than one device": trainer.devices * trainer.num_nodes != 1,
        "a device other than a CPU, where it has not been tried": trainer.accelerator != "cpu"
        and (torch.cuda.is_available() or torch.backends.mps.is_available()),
        "trainer.threads other than 1, where how a step rounds depends on its size": trainer.threads != 1,
        f"trainer.precision={trainer.precision}": trainer.precision != "32-true",
        "trainer.compile=true": trainer.compile,
        "trainer.graph=true": trainer.graph is True,
        "force=true": cfg.force,
        f"micro-batches whose tokens are no multiple of {VECTOR}": data.batch
        // data.accumulate
        * cfg.model.context
        % VECTOR
        != 0,
        "an optimizer that samples predictions": trait(cfg.optimizer, "samples_predictions"),
        "a tracker, which follows one run of a process": cfg.logger.get("_target_", "").rpartition(".")[2]
        != "NoLogger",
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or unstackable(assemble(cfg))


class Stacking:
    """Puts runs together to stacks of up to `size`, so that each of `workers` has one. What a configuration allows is
    worked out once for all runs with the same shapes."""

    def __init__(self, size: int, workers: int):
        self.size, self.workers = size, workers
        self._reasons: dict[str, str | None] = {}

    def reason(self, cfg: Config) -> str | None:
        """`alone_because`, of all runs that differ in seed, optimizer, schedule or clipping alone at once."""
        parts = (*SHAPES, "dropout", "dropout_time", "loss", "logger", "trainer", "task", "force", "optimizer")
        known = {**{part: cfg[part] for part in parts}, "optimizer": cfg.optimizer["_target_"]}
        key = json.dumps(known, sort_keys=True, default=dict)
        if key not in self._reasons:
            self._reasons[key] = alone_because(cfg)
        return self._reasons[key]

    def groups(self, batch: Sequence[Planned], alone: Container[Planned] = ()) -> list[list[int]]:
        """The numbers of the runs in `batch`, those of a stack together; alone: runs not to be put in one."""
        by_shape: dict[str, list[int]] = {}
        for number, planned in enumerate(batch):
            single = self.size == OFF or planned in alone or self.reason(planned.cfg) is not None
            by_shape.setdefault(str(number) if single else _shape(planned.cfg), []).append(number)
        found = []
        for numbers in by_shape.values():
            stacks = math.ceil(len(numbers) / min(self.size, math.ceil(len(numbers) / self.workers)))
            found += [numbers[len(numbers) * i // stacks : len(numbers) * (i + 1) // stacks] for i in range(stacks)]
        return sorted(found)


def _shape(cfg: Config) -> str:
    """Equal for runs that can be in one stack."""
    from albert_ablate.model.loss import passes

    return json.dumps([*(cfg[part] for part in SHAPES), passes(construct(cfg.loss))], sort_keys=True, default=dict)
