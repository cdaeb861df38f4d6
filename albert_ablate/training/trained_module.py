"""Base class of the LightningModules: what the recorder needs of a model in training, whatever its task."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from albert_ablate.config import Config, ConfigError
from albert_ablate.model.token_model import TokenModel
from albert_ablate.training.step_watch import StepWatch


class TrainedModule(pl.LightningModule):
    """A model in training whose steps a Recorder writes down.

    model: its weights are trained and kept. steps: of the budget. watch: what is measured of the step under way.
    micro_batches: seen so far, which names the dropout masks. stop_requested: by the recorder, to take no further step.
    sharded: the weights are split over the ranks.
    """

    def __init__(self, model: nn.Module, decoder: TokenModel, cfg: Config, steps: int, sharded: bool = False):
        super().__init__()
        self.model, self.cfg, self.steps, self.sharded = model, cfg, steps, sharded
        self.watch = StepWatch(decoder, cfg, steps)
        self.micro_batches = 0
        self.stop_requested = False
        self.named: list[tuple[str, nn.Parameter]] = []
        self.order: list[str] | None = None  # of the parameters in the optimizer, and in the one that was saved
        self.saved_order: list[str] | None = None
        self.evaluating = False  # the model holds the weights to evaluate

    @property
    def decoder(self) -> TokenModel:
        """The decoder in `model`, or `model` itself."""
        raise NotImplementedError

    @property
    def clip_factor(self) -> float | None:
        """By which clipping has multiplied all gradients of this step; None where it is not one for all."""
        return None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.stop_requested else None

    def note_order(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember in which order the optimizer holds the parameters; ConfigError where a checkpoint has another."""
        names = {id(p): name for name, p in self.named}
        self.order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self._check_order()

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Within it the model holds the weights to evaluate and to keep: the optimizer's averages, if it makes any."""
        averaged = getattr(self.trainer.optimizers[0], "averaged", nullcontext)
        if self.evaluating:
            averaged = nullcontext
        before, self.evaluating = self.evaluating, True
        try:
            with averaged():
                yield
        finally:
            self.evaluating = before

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["micro_batches"] = self.micro_batches
        checkpoint["order"] = self.order

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.micro_batches = checkpoint["micro_batches"]
        self.saved_order = checkpoint.get("order", [])
        self._check_order()

    def _check_order(self) -> None:
        """torch hands an optimizer's state out by position, whatever the shapes: in another order it would corrupt."""
        if self.order is not None and self.saved_order is not None and self.order != self.saved_order:
            raise ConfigError(
                "This run was started by another version of albert_ablate, whose checkpoint cannot be resumed: "
                f"remove {self.trainer.default_root_dir} to train it again."
            )
