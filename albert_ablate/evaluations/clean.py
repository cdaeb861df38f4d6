"""Training, validation and test loss on a larger sample."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from albert_ablate.config import Count
from albert_ablate.data.packed import held_out_sample, take_blocks
from albert_ablate.evaluations.subject import Evaluation, Result, Subject


@dataclass(frozen=True)
class Clean(Evaluation):
    """gap = validation loss - training loss, both without dropout, nats per token.

    tokens: size of each split's fixed sample. The training loss is measured anew on training text. At equal training
    loss two arms are compared by `analysis.measures.gap_at_equal_training_loss`, from the history `evals`.
    """

    tokens: Count = 32_768

    def settings(self, subject: Subject) -> dict[str, Any]:
        return {**asdict(self), **subject.counting}

    def __call__(self, subject: Subject) -> Result:
        rows, losses = [], []
        for split in ("train", "validation", "test"):
            array = getattr(subject.packed, split)
            blocks = held_out_sample(array, subject.context, self.tokens, split)
            loss = subject.loss(torch.from_numpy(take_blocks(array, blocks, subject.context)))
            bits = loss / math.log(2) / subject.packed.bytes_per_target(split, blocks, subject.context)
            losses.append(loss)
            rows.append({"split": split, "loss": loss, "bits_per_byte": bits})
        train, validation, test = losses
        return Result(
            rows,
            {
                "train_loss": train,
                "val_loss": validation,
                "test_loss": test,
                "gap": validation - train,
                "test_gap": test - train,
            },
        )
