"""Counters and running statistics over optimizer steps, saved in checkpoints so that a resumed run continues them."""

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from albert_ablate.data.packed import BatchOrder, chain
from albert_ablate.model.token_model import TokenModel
from albert_ablate.records.history import SCHEMAS
from albert_ablate.streams import digest
from albert_ablate.training.cost import Phases
from albert_ablate.training.diagnostics import noise_parts
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.step_watch import StepWatch
from albert_ablate.training.trained_module import TrainedModule

NOISE_DECAY = 0.9  # of the means of the gradient noise scale's two parts, at each step at which they are measured
LAYER_COLUMNS = [f.name for f in SCHEMAS["layers"] if pa.types.is_floating(f.type)]


class StepStats:
    """Turns the measurements of a step (`StepWatch`) into the rows of the histories `steps` and `layers`.

    step: optimizer steps taken. order_hash: hash of the training text and of all batches drawn from it. grad_norm: of
    the latest step, before clipping. flops_left_out: operations of blocks that dropout skipped. noise: means of the two
    parts of the gradient noise scale. phases: seconds over all sessions.

    fingerprint: of the training text. flops: per token, all and of each block (`training_flops`).
    """

    SAVED = ("step", "order_hash", "grad_norm", "flops_left_out", "noise")

    def __init__(
        self,
        order: BatchOrder,
        fingerprint: str,
        tokens_per_step: int,
        flops: tuple[float, list[float]],
        accumulate: int,
        ranks: Ranks,
    ):
        self.order, self.tokens_per_step, self.ranks = order, tokens_per_step, ranks
        whole, blocks = flops
        self.flops_per_step = whole * tokens_per_step  # with nothing left out
        self.flops_of_block = [flops * tokens_per_step / accumulate for flops in blocks]  # in a micro-batch
        self.step = 0
        self.order_hash = digest(fingerprint.encode())
        self.grad_norm: float | None = None
        self.flops_left_out = 0.0
        self.noise: list[float] | None = None
        self.phases = Phases()

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs."""
        return {**{name: getattr(self, name) for name in self.SAVED}, "phases": dict(self.phases.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; what an older checkpoint lacks keeps its initial value."""
        for name in self.SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))  # older checkpoints have fewer
        self.phases.seconds |= state.get("phases", {"evaluation": state.get("seconds", 0.0)})

    def count_skipped(self, model: TokenModel) -> None:
        """Count the operations of the blocks that dropout has left out of this micro-batch."""
        for block, flops in zip(model.stack, self.flops_of_block, strict=True):
            if block.skip.rate and block.skip.skips():
                self.flops_left_out += flops

    def count_step(self, watch: StepWatch, sharded: bool) -> dict[str, float]:
        """Count one optimizer step; returns its row of the history `steps`."""
        # one transfer from the device for all numbers of the step: each would wait for the GPU
        loss, norm, clipped, after, squares = torch.stack(
            [
                torch.stack(watch.losses).mean(),
                watch.grad_norm,
                watch.clipped.to(watch.grad_norm),
                watch.grad_norm_clipped,
                torch.stack(watch.logit_mean_squares).mean().to(watch.grad_norm),
            ]
        ).tolist()
        small = None if watch.gns_grad_sq is None else watch.gns_grad_sq.item()
        loss, squares, small_mean = self.ranks.means([loss, squares, small or 0.0])
        watch.end()
        self.order_hash = chain(self.order_hash, self.order.indices(self.step))
        self.step += 1
        self.grad_norm = norm
        self.phases.mark("optimizer")
        return {
            **self.axes(),
            "loss": loss,
            "lr": watch.lr,
            "grad_norm": norm,
            "clipped": clipped,
            "grad_norm_clipped": after,
            "noise_scale": math.nan if small is None else self._noise_scale(watch, sharded, small_mean, norm * norm),
            "logit_rms": math.sqrt(squares),
        }

    def layer_rows(self, module: TrainedModule, clipped: float) -> Iterator[dict[str, Any]]:
        """Rows of the history `layers` for a detailed step: one for each block and sublayer.

        The first step is measured at the initial weights, so its rows are those of step 0 too. clipped: share of the
        gradient tensors that were clipped in this step."""
        watch = module.watch
        assert watch.weights is not None
        inside, weights = watch.probe.metrics(), watch.weights.metrics(clipped, module.clip_factor)
        logged = watch.every and self.step % watch.every == 0
        for step in [0] * (self.step == 1) + [self.step] * bool(logged):
            axes = self.axes(step, None if step else 0.0)
            for place, rate in module.decoder.rates().items():
                values = weights.get(place, {}) | inside.get(place, {})
                values["dropout"] = rate
                if step == 0:
                    values["update_ratio"] = math.nan
                columns = {name: values.get(name, math.nan) for name in LAYER_COLUMNS if name not in axes}
                yield {**axes, "layer": place[0], "sublayer": place[1], **columns}

    def _noise_scale(self, watch: StepWatch, sharded: bool, small: float, large: float) -> float:
        """Gradient noise scale in tokens, from exponential moving averages of its two parts (NOISE_DECAY).

        small, large: squared gradient norms of a part of the batch and of the whole batch."""
        ranks = 1 if sharded else self.ranks.size  # shards hold sums over the ranks already
        parts = noise_parts(small, large, watch.gns_fraction * self.tokens_per_step / ranks, self.tokens_per_step)
        if all(map(math.isfinite, parts)):
            before = self.noise or list(parts)
            self.noise = [
                NOISE_DECAY * mean + (1 - NOISE_DECAY) * part for mean, part in zip(before, parts, strict=True)
            ]
        if self.noise is None or self.noise[1] <= 0:
            return math.nan
        return self.noise[0] / self.noise[1]

    @property
    def flops(self) -> float:
        """Floating-point operations of training so far."""
        return self.step * self.flops_per_step - self.flops_left_out

    def axes(self, step: int | None = None, flops: float | None = None) -> dict[str, float]:
        """The x axes of a history's row: step, tokens, seconds, flops; by default of the current step."""
        step = self.step if step is None else step
        return {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "seconds": self.phases.total,
            "flops": self.flops if flops is None else flops,
        }

    def cost(self) -> dict[str, Any]:
        """The `cost` of the record except memory."""
        training = self.phases.training
        return {
            "seconds": self.phases.total,
            "training_seconds": training,
            "phases": dict(self.phases.seconds),
            "flops": self.flops,
            "tokens_per_second": self.step * self.tokens_per_step / training if training else None,
        }
