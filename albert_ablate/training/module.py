"""The LightningModule of language modeling and its data. One optimizer step is `accumulate` micro-batches.

The order in which Lightning calls its hooks and the recorder's in one step is written in step_watch.py.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from albert_ablate.config import Config, ConfigError, construct
from albert_ablate.data.packed import BatchOrder, Packed, take_blocks
from albert_ablate.model.build import build
from albert_ablate.model.dropout import draw_dtype
from albert_ablate.model.loss import objective
from albert_ablate.model.token_model import TokenModel
from albert_ablate.optim.clipping import global_norm
from albert_ablate.optim.groups import assert_covers, decay_groups
from albert_ablate.streams import stream_seed
from albert_ablate.training.diagnostics import Weights, undisturbed
from albert_ablate.training.graph import GraphedPass, uses_graph
from albert_ablate.training.stack import Member
from albert_ablate.training.step_watch import mean_square
from albert_ablate.training.trained_module import TrainedModule


class LanguageModel(TrainedModule):
    """Next-token prediction: forward, loss, clipping and optimizer of one arm."""

    model: TokenModel

    def __init__(self, model: TokenModel, cfg: Config, steps: int, sharded: bool = False):
        super().__init__(model, model, cfg, steps, sharded)
        self.loss: Callable = construct(cfg.loss)
        self.clip = build(cfg.clip)
        self.uses_graph = uses_graph(cfg)
        self.graph: GraphedPass | None = None  # once it was recorded
        self.curvature: Any = None  # the optimizer, where it has the trait samples_predictions
        self.predictions: Tensor | None = None  # logits of this micro-batch, where it does
        self.member: Member | None = None  # where it is trained in a stack of runs

    @property
    def decoder(self) -> TokenModel:
        return self.model

    @property
    def clip_factor(self) -> float | None:
        return None if self.clip.common is None else float(self.clip.common)

    def configure_model(self) -> None:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for part in [*self.model.blocks, self.model]:
                fully_shard(part, mesh=mesh)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def on_fit_start(self) -> None:
        if self.trainer.gradient_clip_val is not None:
            raise ConfigError(
                f"gradient_clip_val={self.trainer.gradient_clip_val} on the Trainer would be ignored: "
                "clipping is chosen by clip=."
            )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        watch = self.watch
        step, micro = divmod(self.micro_batches, watch.accumulate)
        self.model.clock.set(self.micro_batches, self.global_rank, step, self.steps)
        self.micro_batches += 1
        if micro == 0:
            watch.begin(step, batch, self.trainer.world_size, self.sharded)
        if self.uses_graph and not watch.detailed:
            return self._replayed(batch)
        measured = watch.detailed and micro == 0
        with watch.measured_forward(batch) if measured else nullcontext():
            total, plain = objective(self.loss, self._logits, batch)
        watch.losses.append(plain.detach())
        watch.phases.mark("forward")
        if measured:
            watch.phases.move("forward", "diagnostics", watch.probe.seconds)
        if self.curvature is not None and self.predictions is not None:
            self._sample_labels(self.curvature, self.predictions)
            self.predictions = None
            watch.phases.mark("optimizer")
        return total

    def _replayed(self, batch: Tensor) -> Tensor:
        """Forward and backward pass by the graph: its loss, without history."""
        watch = self.watch
        if self.graph is None:
            self.graph = GraphedPass(self.model, self.loss, batch, watch.accumulate)
        loss, squares = self.graph(batch)
        watch.losses.append(loss)
        watch.logit_mean_squares.append(squares)
        watch.phases.mark("forward")
        return loss

    def backward(self, loss: Tensor, *args: Any, **more: Any) -> None:
        if not loss.requires_grad:  # of `_replayed`
            assert self.graph is not None
            self.graph.hand_over(first=len(self.watch.losses) == 1)
        elif self.member is None or self.watch.detailed:
            super().backward(loss, *args, **more)
        else:
            self.member.backward(loss, self.watch.phases)

    def _logits(self, tokens: Tensor) -> Tensor:
        if self.member is None or self.watch.detailed:  # what a detailed step looks into is this model's own pass
            logits = self.model(tokens)
        else:
            logits = self.member.forward(self.model, tokens, self.watch.phases)
        self.watch.logit_mean_squares.append(mean_square(logits))
        if self.curvature is not None and self.curvature.due:
            self.predictions = logits
        return logits

    def _sample_labels(self, optimizer: Any, logits: Tensor) -> None:
        """Pass logits to an optimizer that samples labels from them (Sophia), with the uniform numbers for sampling.

        A rank gets the numbers that a single process would use for the same sequences."""
        generator = torch.Generator().manual_seed(stream_seed(self.cfg.seed, "labels", self.model.clock.micro_batch))
        (rows, length), ranks = logits.shape[:2], self.trainer.world_size
        uniform = torch.rand(rows * ranks, length, generator=generator, dtype=draw_dtype())
        optimizer.sample(logits, uniform.chunk(ranks)[self.global_rank])

    def on_after_backward(self) -> None:
        watch = self.watch
        watch.phases.mark("backward")
        scaled = self.cfg.trainer.precision == "16-mixed"  # the gradients still are, by the loss scale
        if not watch.detailed or scaled:
            return
        gradients: list[Tensor | None] = []
        if watch.accumulate > 1 and self.micro_batches % watch.accumulate == 1:
            gradients = [p.grad for _, p in self.named]
        elif watch.gns_rows is not None:
            with undisturbed(self.model):
                with self.trainer.precision_plugin.forward_context():
                    total, _ = objective(self.loss, self.model, watch.gns_rows)
                gradients = list(torch.autograd.grad(total, [p for _, p in self.named], allow_unused=True))
        if gradients:
            norm, _ = global_norm([g for g in gradients if g is not None])
            watch.gns_grad_sq = (watch.accumulate * norm).square()
        watch.phases.mark("diagnostics")

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        watch = self.watch
        with torch.no_grad():
            graded = [(name, p.grad) for name, p in self.named if p.grad is not None]
            names, gradients = [name for name, _ in graded], [gradient for _, gradient in graded]
            watch.grad_norm, before = global_norm(gradients)
            loss = None
            if self.clip.uses_loss:  # the mean over processes, which must all decide alike
                loss = self.trainer.strategy.reduce(torch.stack(watch.losses).mean(), reduce_op="mean")
            self.clip.watched = watch.detailed
            watch.clipped = self.clip(self.named, watch.grad_norm, loss)
            if self.clip.common is not None:  # one factor for all: no second norm is needed
                after = None
                watch.grad_norm_clipped = watch.grad_norm * self.clip.common
            else:
                watch.grad_norm_clipped, after = global_norm(gradients)
            if watch.detailed:
                watch.phases.mark("optimizer")
                watch.weights = Weights(self.named, self.places)
                watch.weights.begin()
                ends = None if after is None else dict(zip(names, after, strict=True))
                watch.weights.gradients(dict(zip(names, before, strict=True)), ends, self.clip)
                watch.phases.mark("diagnostics")
        watch.lr = optimizer.param_groups[0]["lr"]

    def configure_optimizers(self):
        self.named = self.model.trained()  # by now those that fully_shard has put in place
        self.places = self.model.places()
        # with 16-mixed the fused step would undo the loss scale itself, after our clipping; torch has no
        # fused sgd for sharded weights
        fused = self.cfg.trainer.precision != "16-mixed" and not self.sharded
        optimizer = build(self.cfg.optimizer, decay_groups(self.model), fused)
        assert_covers(optimizer, self.model)
        self.curvature = optimizer if getattr(optimizer, "samples_predictions", False) else None
        self.note_order(optimizer)
        shape = construct(self.cfg.schedule)
        scheduler = LambdaLR(optimizer, lambda step: shape(min((step + 0.5) / self.steps, 1.0)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **more: Any) -> None:
        super().optimizer_step(*args, **more)
        if any(p.grad is not None for _, p in self.named):  # else the clipping rule wanted no step
            self.model.after_step()
        if self.watch.detailed and self.watch.weights is not None:
            self.watch.phases.mark("optimizer")
            self.watch.weights.end()
            self.watch.phases.mark("diagnostics")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["clip"] = self.clip.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.clip.load_state_dict(checkpoint.get("clip", {}))
        super().on_load_checkpoint(checkpoint)


class Blocks(IterableDataset):
    """Training data: this rank's share of every micro-batch from step `start` on, (sequences, context + 1) integers.

    The order of batches does not depend on the number of ranks, so that runs on one and on several devices pair.
    Endless, because with a loader that ends with the budget Lightning would replay data after a resume.
    """

    def __init__(
        self,
        packed: Packed,
        order: BatchOrder,
        context: int,
        accumulate: int,
        start: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.packed, self.order, self.context, self.accumulate, self.start = packed, order, context, accumulate, start
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[Tensor]:
        for step in itertools.count(self.start):
            rows = torch.from_numpy(take_blocks(self.packed.train, self.order.indices(step), self.context))
            for micro in rows.chunk(self.accumulate):
                yield micro.chunk(self.ranks)[self.rank]


class TextData(pl.LightningDataModule):
    """Lightning's data module of the training text. Evaluation reads fixed samples instead (validation.py)."""

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.blocks = blocks

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.blocks, batch_size=None, pin_memory=torch.cuda.is_available())
