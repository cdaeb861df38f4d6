"""The losses of the run, on a larger sample."""

import math
from dataclasses import dataclass

from albert_ablate.config import Count
from albert_ablate.training.evaluations.subject import Evaluation, Result, Subject


@dataclass(frozen=True)
class Clean(Evaluation):
    """gap = validation loss - training loss, both without dropout, nats per token.

    tokens: size of each split's fixed sample. The training loss is measured anew on training text. At equal training
    loss two arms are compared by `analysis.measures.gap_at_equal_training_loss`, from the history `evals`.
    """

    tokens: Count = 32_768

    def __call__(self, subject: Subject) -> Result:
        rows, losses = [], []
        for split in ("train", "validation", "test"):
            loss = subject.loss(subject.sample(split, self.tokens))
            bits = loss / math.log(2) / subject.packed.bytes_per_token[split]
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
