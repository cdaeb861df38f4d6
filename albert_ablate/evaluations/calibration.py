"""Calibration: how far the model's confidence is from its accuracy."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from albert_ablate.config import Count, Range
from albert_ablate.evaluations.subject import Evaluation, Result, Subject


@dataclass(frozen=True)
class Calibration(Evaluation):
    """error = sum_b n_b / n |accuracy_b - confidence_b|: expected calibration error over equal bins b of the confidence
    max_v p(v), each token a prediction (torchmetrics' MulticlassCalibrationError, norm l1).

    overconfidence: mean confidence - accuracy. bins: how many. tokens: size of the fixed sample of validation text.
    """

    bins: Annotated[int, Range(1, 10_000)] = 15
    tokens: Count = 8_192

    def __call__(self, subject: Subject) -> Result:
        from torchmetrics.classification import MulticlassCalibrationError

        rows = subject.sample("validation", self.tokens)
        # unchecked: a checkpoint's head may know more tokens than the tokenizer has
        metric = MulticlassCalibrationError(subject.packed.vocabulary, n_bins=self.bins, norm="l1", validate_args=False)
        confidences, hits = [], []
        for logits, targets in subject.logits(rows[:, :-1], rows[:, 1:]):
            p = logits.softmax(-1).flatten(0, 1).cpu()
            if not p.isfinite().all():
                return Result([], dict.fromkeys(("error", "overconfidence", "confidence", "accuracy"), np.nan))
            metric.update(p, targets.flatten().cpu())
            highest, first = p.max(-1)
            confidences.append(highest)
            hits.append(first == targets.flatten().cpu())
        confidence, hit = torch.cat(confidences).double().numpy(), torch.cat(hits).double().numpy()
        summary = {
            "error": metric.compute().item(),
            "overconfidence": float(confidence.mean() - hit.mean()),
            "confidence": float(confidence.mean()),
            "accuracy": float(hit.mean()),
        }
        return Result(reliability(confidence, hit, self.bins), summary)


def reliability(confidence: np.ndarray, hit: np.ndarray, bins: int) -> list[dict[str, float]]:
    """A row per bin that holds something: its upper edge, share of tokens, mean confidence, accuracy."""
    which = np.ceil(confidence * bins).clip(1, bins).astype(int)
    return [
        {
            "up_to": b / bins,
            "share": float((which == b).mean()),
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(hit[which == b].mean()),
        }
        for b in range(1, bins + 1)
        if (which == b).any()
    ]
