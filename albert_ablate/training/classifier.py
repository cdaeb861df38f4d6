"""Text classification on a decoder: documents as tokens, the head on pooled features, and their LightningModule."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from albert_ablate.config import Config
from albert_ablate.data.packed import BatchOrder
from albert_ablate.data.tasks import Labelled
from albert_ablate.model.decoder import Decoder, initial_draw, xavier
from albert_ablate.optim.schedules import warmup_linear
from albert_ablate.streams import digest
from albert_ablate.training.trained_module import TrainedModule

WARMUP, MAX_NORM = 0.1, 1.0  # of fine-tuning, for every arm: share of the steps, and gradient norm


class Classifier(nn.Module):
    """Logits W z + b, (B, T) tokens and (B,) lengths -> (B, classes); z is the trunk's pooled features.

    W has Xavier's normal draw of stream `init/task.head.weight`, b is zero."""

    def __init__(self, trunk: Decoder, classes: int, pool: str, seed: int):
        super().__init__()
        self.trunk, self.pool = trunk, pool
        self.head = nn.Linear(trunk.width, classes)
        draw = initial_draw(seed, "task.head.weight", self.head.weight.shape)
        self.draw_hash = digest(draw.numpy().tobytes())
        with torch.no_grad():
            self.head.weight.copy_(draw * xavier(classes, trunk.width))
            self.head.bias.zero_()

    def pooled(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """z (B, D): the mean of the features over each document's tokens, or those of its last token.

        Padding comes after its document, where a causal model does not look."""
        h = self.trunk.features(tokens)
        if self.pool == "last":
            return h[torch.arange(len(h), device=h.device), lengths - 1]
        inside = torch.arange(h.shape[1], device=h.device) < lengths[:, None]
        return (h * inside[:, :, None]).sum(1) / lengths[:, None]

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.pooled(tokens, lengths))


class Documents:
    """The documents of a split as tokens: rows (N, T) padded with zeros, lengths (N,), classes (N,).

    read: of each document the text that the model reads, its first `context` tokens.
    """

    def __init__(self, labelled: Labelled, split: str, codec: Any, context: int):
        encoded = [codec.encode(text)[:context].astype(np.int64) for text in labelled.texts[split]]
        # what the tokenizer has no token for is read as its first one: a mean over nothing is not a number
        self.lengths = torch.tensor([max(1, len(tokens)) for tokens in encoded])
        self.rows = torch.zeros(len(encoded), context, dtype=torch.long)
        for row, tokens in zip(self.rows, encoded, strict=True):
            row[: len(tokens)] = torch.from_numpy(tokens)
        self.classes = torch.tensor(labelled.numbers[split])
        self.read = [codec.decode(tokens) for tokens in encoded]

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, lengths, classes) of some documents, the rows cut to the longest of them."""
        chosen = torch.as_tensor(indices)
        lengths = self.lengths[chosen]
        return self.rows[chosen, : int(lengths.max())], lengths, self.classes[chosen]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All of them, those of like length together."""
        for indices in torch.argsort(self.lengths, stable=True).split(size):
            yield self.take(indices.numpy())


class ClassificationModule(TrainedModule):
    """Fine-tuning: cross-entropy of the class, all parameters by AdamW with linear warm-up and decay, clipped by norm.

    One optimizer step is one batch of documents. A step whose gradient is not finite changes no weight."""

    model: Classifier

    def __init__(self, model: Classifier, cfg: Config, steps: int):
        super().__init__(model, model.trunk, cfg, steps)

    @property
    def decoder(self) -> Decoder:
        return self.model.trunk

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, lengths, classes = batch
        self.decoder.clock.set(self.micro_batches, 0, self.micro_batches, self.steps)
        self.micro_batches += 1
        logits = self.model(rows, lengths)
        loss = F.cross_entropy(logits, classes)
        self.watch.losses.append(loss.detach())
        self.watch.logit_mean_squares.append(logits.detach().square().mean())
        self.watch.phases.mark("forward")
        return loss

    def on_after_backward(self) -> None:
        self.watch.phases.mark("backward")

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        watch, parameters = self.watch, [p for _, p in self.named]
        watch.grad_norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        watch.clipped = watch.grad_norm > MAX_NORM
        watch.grad_norm_clipped = watch.grad_norm.clamp(max=MAX_NORM)
        watch.lr = optimizer.param_groups[0]["lr"]
        if not math.isfinite(watch.grad_norm.item()):
            for p in parameters:
                p.grad = None

    def configure_optimizers(self):
        self.named = list(self.model.named_parameters())
        task = self.cfg.task
        optimizer = torch.optim.AdamW([p for _, p in self.named], lr=task.lr, weight_decay=task.weight_decay)
        self.note_order(optimizer)
        steps = max(1, self.steps)
        scheduler = LambdaLR(optimizer, lambda step: warmup_linear(min((step + 0.5) / steps, 1.0), warmup=WARMUP))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **more: Any) -> None:
        super().optimizer_step(*args, **more)
        if any(p.grad is not None for _, p in self.named):
            self.decoder.after_step()


class DocumentBatches(IterableDataset):
    """The batches of documents from step `start` on, without end, as `Blocks` are: see there why."""

    def __init__(self, documents: Documents, order: BatchOrder, start: int):
        self.documents, self.order, self.start = documents, order, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for step in itertools.count(self.start):
            yield self.documents.take(self.order.indices(step))


class DocumentData(pl.LightningDataModule):
    """The training documents as Lightning wants them. Evaluation reads all documents of its split by itself."""

    def __init__(self, batches: DocumentBatches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, pin_memory=torch.cuda.is_available())
