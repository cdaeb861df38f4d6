"""Memorization: share of training prefixes that the model continues verbatim."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from albert_ablate.config import Config, ConfigError, Count
from albert_ablate.data.packed import block_count, take_blocks
from albert_ablate.evaluations.subject import Evaluation, Result, Subject


@dataclass(frozen=True)
class Memorization(Evaluation):
    """share of prefixes p, |p| = `prefix`, whose greedy continuation is the text's own next `continuation` tokens
    (extractable with k tokens of context: Carlini et al. 2022, 2202.07646, definition 3.1). null: 32, or half the
    context where that is less.

    train: of blocks the run has been trained on, from their start. validation: of as many of validation text, which
    cannot have been memorized: easy text. excess = train - validation. train_length, validation_length: tokens
    continued verbatim, on average.
    A greedy continuation is verbatim as long as each token of the text is ranked first given the text before it, so
    that one pass over the text gives what decoding token by token would. prefixes: how many of each, at most.
    """

    prefix: Count | None = None
    continuation: Count | None = None
    prefixes: Count = 512

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse a prefix and continuation longer than a block."""
        node, context = cfg.evaluation.parts["memorization"], cfg.model.context
        prefix, continuation = (node[key] or usual(context) for key in ("prefix", "continuation"))
        if prefix + continuation > context + 1:
            raise ConfigError(
                f"evaluation.memorization.prefix={prefix} and continuation={continuation} do not fit: a block of "
                f"model.context={context} holds {context + 1} tokens."
            )

    def settings(self, subject: Subject) -> dict[str, Any]:
        prefix, continuation = self._lengths(subject)
        return {"prefix": prefix, "continuation": continuation, "prefixes": self.prefixes}

    def _lengths(self, subject: Subject) -> tuple[int, int]:
        return self.prefix or usual(subject.context), self.continuation or usual(subject.context)

    def __call__(self, subject: Subject) -> Result:
        rows: list[dict[str, Any]] = []
        summary: dict[str, float] = {}
        prefix, continuation = self._lengths(subject)
        for split in ("train", "validation"):
            runs = self._runs(subject, self._blocks(subject, split)[:, : prefix + continuation], prefix)
            for length in range(1, continuation + 1):
                share = np.nan if runs is None else float((runs >= length).mean())
                rows.append({"split": split, "length": length, "share": share})
            summary[split] = rows[-1]["share"]
            summary[f"{split}_length"] = np.nan if runs is None else float(runs.mean())
        summary["excess"] = summary["train"] - summary["validation"]
        return Result(rows, summary)

    def _blocks(self, subject: Subject, split: str) -> Tensor:
        """(prefixes, T + 1) tokens."""
        array = getattr(subject.packed, split)
        blocks = np.arange(block_count(array, subject.context))
        if split == "train":
            batches = min(subject.steps, -(-subject.order.blocks // subject.order.batch))  # of the first pass
            blocks = np.unique(np.concatenate([subject.order.indices(step) for step in range(batches)] or [blocks[:0]]))
        blocks = subject.draws("memorization", split).permutation(blocks)[: self.prefixes]
        return torch.from_numpy(take_blocks(array, np.sort(blocks), subject.context))

    def _runs(self, subject: Subject, rows: Tensor, prefix: int) -> np.ndarray | None:
        """How many tokens of each continuation come out verbatim; None where nothing was seen or is finite."""
        hits = []
        for logits, targets in subject.logits(rows[:, :-1], rows[:, 1:]):
            if not logits.isfinite().all():
                return None
            first = logits[:, prefix - 1 :].argmax(-1) == targets[:, prefix - 1 :]
            hits.append(first.long().cumprod(1).sum(1).cpu())
        return torch.cat(hits).numpy() if hits and len(rows) else None


def usual(context: int) -> int:
    """Default length of prefix and continuation: 32 tokens, at most half of the context."""
    return max(1, min(32, context // 2))
