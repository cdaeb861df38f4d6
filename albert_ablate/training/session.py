"""The parts of one training session, whatever the task: language.py and classify.py put them together, fit.py runs."""

from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl

from albert_ablate.training.recorder import Recorder
from albert_ablate.training.trained_module import TrainedModule


@dataclass(frozen=True)
class Session:
    """The parts that `fit` hands to Lightning.

    accumulate: micro-batches an optimizer step. skips_blocks: dropout may leave whole blocks out. estimate: seconds
    that the steps left will take, None where they cannot be told; called only where somebody reads it.
    """

    module: TrainedModule
    recorder: Recorder
    data: pl.LightningDataModule
    accumulate: int
    skips_blocks: bool
    estimate: Callable[[], float | None]
