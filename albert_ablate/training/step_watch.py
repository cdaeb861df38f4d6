"""What is measured during one optimizer step: the hooks of the module write it, the recorder reads it.

Order of the hooks in one step, as Lightning calls them. Steps 1 to 5 come once for each of its micro-batches.

     1  Recorder.on_train_batch_start         before the first micro-batch: evaluate, commit, stop where it is time
     2  LanguageModel.on_train_batch_start    ends training where the recorder has asked for it
     3  LanguageModel.optimizer_step          for the last micro-batch alone, around 4 to 7; then the placement's own
                                              change of the weights, and how far they moved
     4  LanguageModel.training_step           dropout's clock, forward pass, loss; predictions for the curvature
     5  LanguageModel.on_after_backward       gradient of a part of the batch, for the gradient noise scale
     6  LanguageModel.configure_gradient_clipping   gradient norm, clipping, norms by block
     7  optimizer.step, then the learning rate of the next step
     8  Recorder.on_train_batch_end           row of the step and of its blocks, once the last micro-batch is done
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from albert_ablate.config import Config
from albert_ablate.model.token_model import TokenModel
from albert_ablate.training.cost import Phases
from albert_ablate.training.diagnostics import Probe, Weights, interval

GNS_PART = 8  # an eighth of a batch that comes in one piece is the small batch of the gradient noise scale


def mean_square(logits: Tensor) -> Tensor:
    """Mean of the squares of all logits, without history."""
    with torch.no_grad():
        wide = torch.float32 if logits.dtype in (torch.bfloat16, torch.float16) else logits.dtype
        return torch.linalg.vector_norm(logits, dtype=wide).square() / logits.numel()


class StepWatch:
    """Measurements of the step under way; `begin` starts those of the next.

    losses, logit_mean_squares: of each micro-batch so far. grad_norm, grad_norm_clipped: of all gradients, before and
    after clipping. clipped: what the clipping rule gave, the share it clipped. lr: of this step. phases: seconds by
    what they went to. detailed: this step is measured by block and sublayer, `probe` its forward pass and `weights`
    its parameters; one step in `every` is (0: the first alone).

    For the gradient noise scale (GNS): gns_rows are the sequences whose gradient is taken apart, None where it is that
    of the first micro-batch or none; gns_fraction their share of this rank's batch; gns_grad_sq the squared norm of
    that gradient, None where this step has none.
    """

    def __init__(self, model: TokenModel, cfg: Config, steps: int):
        self.losses: list[Tensor] = []
        self.logit_mean_squares: list[Tensor] = []
        self.grad_norm = self.grad_norm_clipped = self.clipped = torch.zeros(())
        self.lr = 0.0
        self.phases = Phases()
        self.every = interval(cfg.diagnostics.every, steps)
        self.detailed = False
        self.probe = Probe(model, cfg.model.get("activation"))
        self.weights: Weights | None = None
        self.gns_rows: Tensor | None = None
        self.gns_fraction = 1.0
        self.gns_grad_sq: Tensor | None = None
        self.accumulate = cfg.data.accumulate
        self.compiled = cfg.trainer.compile

    def begin(self, step: int, batch: Tensor | None, ranks: int, sharded: bool) -> None:
        """Before the first micro-batch, `batch`, of optimizer step `step` from 0; None where it is not of sequences."""
        self.detailed = step == 0 or bool(self.every) and (step + 1) % self.every == 0
        self.gns_rows, self.gns_grad_sq = None, None
        if self.accumulate > 1:
            self.gns_fraction = 1 / self.accumulate
        elif batch is not None and (step == 0 or self.detailed and (step + 1) % (2 * self.every) == 0):
            # the part's gradient costs a pass of its own: it is taken on every other detailed step. Of sharded weights
            # such a pass cannot be taken, and one sequence has no part
            rows = batch[: max(1, len(batch) // GNS_PART)]
            if not sharded and len(rows) < len(batch) * ranks:
                self.gns_rows, self.gns_fraction = rows, len(rows) / len(batch)

    def measured_forward(self, batch: Tensor) -> AbstractContextManager:
        """Around the forward pass of a detailed step's first micro-batch."""
        if not self.compiled:
            return self.probe.watching()
        self.probe.measure_separately(batch[:, :-1])  # nothing can look into compiled blocks: a pass of its own
        return nullcontext()

    def end(self) -> None:
        """Once the step is recorded: drop what is kept by micro-batch."""
        self.losses.clear()
        self.logit_mean_squares.clear()
