"""Evaluation during training: loss, bits per byte, perplexity and accuracy on a fixed sample of each split."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from albert_ablate.data.packed import Packed, held_out_sample, take_blocks
from albert_ablate.training.ranks import Ranks

DEFAULT_EVALUATIONS = 20  # evaluations over the budget, where evaluation.every is null
BATCH_TOKENS = 2048  # a constant, so that results depend on nothing but weights and text


def due(step: int, steps: int, tokens_per_step: int, every: int | None) -> bool:
    """Whether to evaluate after `step` (from 1): the tokens so far pass a multiple of `every`, which is a twentieth of
    the budget where it is None."""
    if every is None:
        return DEFAULT_EVALUATIONS * step // steps > DEFAULT_EVALUATIONS * (step - 1) // steps
    return step * tokens_per_step // every > (step - 1) * tokens_per_step // every


class Evaluator:
    """Evaluates a model on the same blocks of each split every time, so that evaluations differ by weights alone."""

    def __init__(self, packed: Packed, context: int, tokens: int, ranks: Ranks):
        self.packed, self.context, self.ranks = packed, context, ranks
        self.sample = {
            split: held_out_sample(getattr(packed, split), context, tokens, split)
            for split in ("train", "validation", "test")
        }
        self.bytes_per_token = {
            split: packed.bytes_per_target(split, blocks, context) for split, blocks in self.sample.items()
        }

    def batches(self, split: str) -> Iterator[tuple[np.ndarray, bool]]:
        """This rank's batches and whether each counts.

        All ranks have equally many, since sharded weights need every rank in each forward pass: a rank without blocks
        of its own runs one that does not count."""
        per, sample = max(1, BATCH_TOKENS // self.context), self.sample[split]
        for start in range(0, len(sample), per * self.ranks.size):
            blocks = sample[start : start + per * self.ranks.size]
            share = math.ceil(len(blocks) / self.ranks.size)
            mine = blocks[self.ranks.rank * share :][:share]
            yield (
                take_blocks(getattr(self.packed, split), mine if len(mine) else blocks[:1], self.context),
                len(mine) > 0,
            )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str, precision: AbstractContextManager) -> dict[str, float]:
        """Evaluate a model on one split: loss, bits_per_byte, perplexity, accuracy; nan where a logit is not finite.

        loss: nats per token. bits_per_byte: loss / ln 2 / bytes per token, those of the sample's own targets; nan if
        the tokenizer cannot reproduce the text. accuracy: share of targets that are ranked first."""
        device = next(model.parameters()).device
        loss, perplexity = MeanMetric().to(device), Perplexity().to(device)
        # unchecked: a checkpoint's head may know more tokens than the tokenizer has, and one of them may rank first
        accuracy = MulticlassAccuracy(self.packed.vocabulary, average="micro", validate_args=False).to(device)
        training, finite = model.training, True
        model.eval()
        with precision:
            for rows, counts in self.batches(split):
                tokens = torch.from_numpy(rows).to(device)
                logits, targets = model(tokens[:, :-1]).float(), tokens[:, 1:]
                finite &= bool(logits.isfinite().all())
                if not finite and self.ranks.size == 1:  # else the other ranks' layers would wait for this one's
                    break
                if not counts:
                    continue
                loss.update(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), targets.numel())
                perplexity.update(logits, targets)
                accuracy.update(logits.argmax(-1).flatten(), targets.flatten())
        model.train(training)
        if self.ranks.largest([not finite])[0]:
            return {"loss": math.nan, "bits_per_byte": math.nan, "perplexity": math.nan, "accuracy": math.nan}
        nats = loss.compute().item()
        return {
            "loss": nats,
            "bits_per_byte": nats / math.log(2) / self.bytes_per_token[split],
            "perplexity": perplexity.compute().item(),
            "accuracy": accuracy.compute().item(),
        }
