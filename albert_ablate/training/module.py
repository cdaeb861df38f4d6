"""The LightningModule and its data: one optimizer step is `accumulate` micro-batches."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from albert_ablate.config import ConfigError, construct
from albert_ablate.data.packed import Order, Packed, take_blocks
from albert_ablate.model.build import build
from albert_ablate.model.decoder import Decoder
from albert_ablate.model.loss import objective
from albert_ablate.optim.adaptive import SophiaG
from albert_ablate.optim.clipping import global_norm
from albert_ablate.optim.groups import assert_covers, decay_groups
from albert_ablate.streams import stream_seed
from albert_ablate.training.cost import Phases
from albert_ablate.training.diagnostics import Probe, Weights, interval, undisturbed


class LanguageModel(pl.LightningModule):
    """Next-token prediction: forward, loss, clipping and optimizer of one arm."""

    def __init__(self, model: Decoder, cfg: Mapping, steps: int, sharded: bool = False):
        super().__init__()
        self.model, self.cfg, self.steps, self.sharded = model, cfg, steps, sharded
        self.loss: Callable = construct(cfg["loss"])
        self.clip = build(cfg["clip"])
        self.micro_batches = 0  # seen so far: names the dropout masks
        self.order: list[str] | None = None  # of the parameters in the optimizer, and in the one that was saved
        self.saved_order: list[str] | None = None
        self.evaluating = False  # the model holds the weights to evaluate
        self.halt = False  # set by the recorder: take no further step
        self.losses: list[Tensor] = []  # of the micro-batches of this step
        self.logit_squares: list[Tensor] = []  # means of the squared logits, likewise
        self.grad_norm = self.grad_norm_clipped = self.clipped = torch.zeros(())
        self.lr = 0.0  # of this step
        self.sophia: SophiaG | None = None  # the optimizer, where it is one that asks for predictions
        self.predictions: Tensor | None = None  # logits of this micro-batch, where it does
        self.phases = Phases()
        self.every = interval(cfg["diagnostics"]["every"], steps)  # steps between those that are logged from inside
        self.watched = False  # this step is
        self.probe = Probe(model, cfg["model"]["activation"])
        self.weights: Weights | None = None  # of the blocks, over a watched step
        self.rows: Tensor | None = None  # of the batch, whose gradient is wanted apart
        self.part = 1.0  # the share of this rank's batch whose gradient is taken apart
        self.small: Tensor | None = None  # its squared norm

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

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        return -1 if self.halt else None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        accumulate = self.cfg["data"].get("accumulate", 1)
        step, micro = divmod(self.micro_batches, accumulate)
        self.model.clock.set(self.micro_batches, self.global_rank, step, self.steps)
        self.micro_batches += 1
        if micro == 0:
            self.watched = step == 0 or bool(self.every) and (step + 1) % self.every == 0
            self.small, self.rows = None, None
            if accumulate > 1:
                self.part = 1 / accumulate
            elif step == 0 or self.watched and (step + 1) % (2 * self.every) == 0:
                self._set_apart(batch)
        watching: Any = nullcontext()
        if self.watched and micro == 0:
            if self.cfg["trainer"]["compile"]:
                self.probe.beside(batch[:, :-1])
            else:
                watching = self.probe.watching()
        with watching:
            total, plain = objective(self.loss, self._logits, batch)
        self.losses.append(plain.detach())
        self.phases.mark("forward")
        if self.watched and micro == 0:
            self.phases.move("forward", "diagnostics", self.probe.seconds)
        if self.sophia is not None and self.predictions is not None:
            self._sample(self.sophia, self.predictions)
            self.predictions = None
            self.phases.mark("optimizer")
        return total

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens)
        with torch.no_grad():
            wide = torch.float32 if logits.dtype in (torch.bfloat16, torch.float16) else logits.dtype
            self.logit_squares.append(torch.linalg.vector_norm(logits, dtype=wide).square() / logits.numel())
        if self.sophia is not None and self.sophia.due:
            self.predictions = logits
        return logits

    def _sample(self, optimizer: SophiaG, logits: Tensor) -> None:
        """The numbers that draw this rank's labels: those that one process would have for the same sequences."""
        generator = torch.Generator().manual_seed(stream_seed(self.cfg["seed"], "labels", self.model.clock.micro_batch))
        (rows, length), ranks = logits.shape[:2], self.trainer.world_size
        uniform = torch.rand(rows * ranks, length, generator=generator)
        optimizer.sample(logits, uniform.chunk(ranks)[self.global_rank])

    def on_after_backward(self) -> None:
        self.phases.mark("backward")
        accumulate = self.cfg["data"].get("accumulate", 1)
        scaled = self.cfg["trainer"]["precision"] == "16-mixed"  # the gradients still are
        if not self.watched or scaled:
            return
        gradients: list[Tensor | None] = []
        if accumulate > 1 and self.micro_batches % accumulate == 1:
            gradients = [p.grad for _, p in self.named]
        elif self.rows is not None:
            with undisturbed(self.model):
                with self.trainer.precision_plugin.forward_context():
                    total, _ = objective(self.loss, self.model, self.rows)
                gradients = list(torch.autograd.grad(total, [p for _, p in self.named], allow_unused=True))
        if gradients:
            norm, _ = global_norm([g for g in gradients if g is not None])
            self.small = (accumulate * norm).square()
        self.phases.mark("diagnostics")

    def _set_apart(self, batch: Tensor) -> None:
        """An eighth of a batch that comes in one piece, for the gradient noise scale: its gradient costs a pass of its
        own, so that it is taken on every other logged step. Shards of weights cannot be asked for one."""
        rows = batch[: max(1, len(batch) // 8)]
        if not self.sharded and len(rows) < len(batch) * self.trainer.world_size:
            self.rows, self.part = rows, len(rows) / len(batch)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        with torch.no_grad():
            graded = [(name, p.grad) for name, p in self.named if p.grad is not None]
            names, gradients = [name for name, _ in graded], [gradient for _, gradient in graded]
            self.grad_norm, before = global_norm(gradients)
            loss = None
            if self.clip.uses_loss:  # the mean over processes, which must all decide alike
                loss = self.trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean")
            self.clip.watched = self.watched
            self.clipped = self.clip(self.named, self.grad_norm, loss)
            if self.clip.common is not None:
                after = None
                self.grad_norm_clipped = self.grad_norm * self.clip.common
            else:
                self.grad_norm_clipped, after = global_norm(gradients)
            if self.watched:
                self.phases.mark("optimizer")
                self.weights = Weights(self.named)
                self.weights.begin()
                ends = None if after is None else dict(zip(names, after, strict=True))
                self.weights.gradients(dict(zip(names, before, strict=True)), ends, self.clip)
                self.phases.mark("diagnostics")
        self.lr = optimizer.param_groups[0]["lr"]

    def configure_optimizers(self):
        self.named = list(self.model.named_parameters())  # by now those that fully_shard has put in place
        # with 16-mixed the fused step would undo the loss scale itself, after our clipping; torch has no
        # fused sgd for sharded weights
        fused = self.cfg["trainer"]["precision"] != "16-mixed" and not self.sharded
        optimizer = build(self.cfg["optimizer"], decay_groups(self.model), fused)
        assert_covers(optimizer, self.model)
        self.sophia = optimizer if isinstance(optimizer, SophiaG) else None
        names = {id(p): name for name, p in self.named}
        self.order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self._check_order()
        shape = construct(self.cfg["schedule"])
        scheduler = LambdaLR(optimizer, lambda step: shape(min((step + 0.5) / self.steps, 1.0)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **more: Any) -> None:
        super().optimizer_step(*args, **more)
        if any(p.grad is not None for _, p in self.named):  # else the clipping rule wanted no step
            self.model.after_step()
        if self.watched and self.weights is not None:
            self.phases.mark("optimizer")
            self.weights.end()
            self.phases.mark("diagnostics")

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
        checkpoint["clip"] = self.clip.state_dict()
        checkpoint["order"] = self.order

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.micro_batches = checkpoint["micro_batches"]
        self.clip.load_state_dict(checkpoint.get("clip", {}))
        self.saved_order = checkpoint.get("order", [])
        self._check_order()

    def _check_order(self) -> None:
        """torch hands an optimizer's state out by position, whatever the shapes: in another order it would corrupt."""
        if self.order is not None and self.saved_order is not None and self.order != self.saved_order:
            raise ConfigError(
                "This run was begun by another version of albert_ablate, whose checkpoint this one cannot go on from: "
                f"remove {self.trainer.default_root_dir} to train it anew."
            )


class Blocks(IterableDataset):
    """This rank's part of the micro-batches of the training text from step `start` on, without end: (sequences,
    context + 1) integers. The order knows nothing of ranks, so that runs pair across set-ups.

    Endless, because a loader that ends with the budget makes Lightning replay data after a resume.
    """

    def __init__(
        self, packed: Packed, order: Order, context: int, accumulate: int, start: int, rank: int = 0, ranks: int = 1
    ):
        self.packed, self.order, self.context, self.accumulate, self.start = packed, order, context, accumulate, start
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[Tensor]:
        for step in itertools.count(self.start):
            rows = torch.from_numpy(take_blocks(self.packed.train, self.order.indices(step), self.context))
            for micro in rows.chunk(self.accumulate):
                yield micro.chunk(self.ranks)[self.rank]


class TextData(pl.LightningDataModule):
    """The training stream as Lightning wants it. Evaluation has its own fixed samples (evaluation.py)."""

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.blocks = blocks

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.blocks, batch_size=None, pin_memory=torch.cuda.is_available())
