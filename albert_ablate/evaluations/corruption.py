"""Robustness: loss when some input tokens are missing, replaced or swapped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from albert_ablate.config import Config, ConfigError, Count, Fraction
from albert_ablate.evaluations.subject import Evaluation, Result, Subject, finite
from albert_ablate.model.decoder import Decoder

KINDS = ("masked", "noisy", "swapped")


@dataclass(frozen=True)
class Corruption(Evaluation):
    """area = integral over the rate r of (loss(r) - loss(0)) / largest rate, nats per token: the mean rise of the loss.

    A token of the input is corrupted where a uniform draw is below r: one draw for all rates, so that what is corrupted
    at a rate is corrupted at all higher ones. The targets stay clean.
    masked: missing. A byte vocabulary has no mask token; the token's embedding is zero, before positions are added and
    anything is normalized: the place is there and attended to, and says nothing of its token.
    noisy: replaced by another token, drawn uniformly from those that the training text holds.
    swapped: tokens 2i and 2i + 1 change places, with probability r. Only the positions 2i + 1 count, at all rates: the
    position 2i would see its own target.
    rates: from 0, rising. tokens: size of the fixed sample of validation text.
    """

    looks_inside = True

    rates: tuple[Fraction, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
    tokens: Count = 8_192

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse rates that do not rise from 0, and a context without neighbors to swap."""
        rates = cfg.evaluation.parts["corruption"].rates
        if rates[0] != 0 or len(rates) < 2 or any(b <= a for a, b in zip(rates, rates[1:], strict=False)):
            raise ConfigError(
                f"evaluation.corruption.rates={rates} is not allowed: they start at 0 and rise from there."
            )
        if cfg.model.context < 2:
            raise ConfigError("evaluation=corruption needs a model.context of at least 2: it swaps neighbors.")

    def __call__(self, subject: Subject) -> Result:
        rows = subject.sample("validation", self.tokens)
        table: list[dict[str, Any]] = []
        summary = {}
        for kind in KINDS:
            losses = [self._loss(subject, rows, kind, rate) for rate in self.rates]
            table += [
                {"kind": kind, "rate": rate, "loss": loss, "rise": loss - losses[0]}
                for rate, loss in zip(self.rates, losses, strict=True)
            ]
            summary[f"{kind}_area"] = area(self.rates, losses)
            if kind == "masked":
                summary["clean_loss"] = losses[0]
        return Result(table, summary)

    def _loss(self, subject: Subject, rows: Tensor, kind: str, rate: float) -> float:
        inputs = rows[:, :-1].numpy()
        drawn = subject.draws("corruption", kind).random(inputs.shape)
        if kind == "masked":
            with zeroed_embedding(subject, torch.from_numpy(drawn < rate)):
                return subject.loss(rows)
        if kind == "noisy":
            noise = subject.draws("corruption", kind, "tokens").random(inputs.shape)
            seen = np.flatnonzero(np.bincount(subject.packed.train))
            return subject.loss(rows, torch.from_numpy(substituted(inputs, drawn < rate, noise, seen)))
        return subject.loss(rows, torch.from_numpy(swapped(inputs, drawn < rate)), every=slice(1, None, 2))


def area(rates: tuple[float, ...], losses: list[float]) -> float:
    """Mean rise of the loss over the corruption rates: area under the rise by trapezoids, over the largest rate."""
    rise = np.asarray(losses) - losses[0]
    return finite(float(np.trapezoid(rise, rates) / rates[-1]))


def substituted(inputs: np.ndarray, where: np.ndarray, noise: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Other tokens `where` it is true: the one of `seen` (sorted) that the draw of [0, 1) points at, never the same."""
    at = np.searchsorted(seen, inputs).clip(max=len(seen) - 1)
    among = seen[at] == inputs  # else any of `seen` is another token
    chosen = (noise * np.maximum(len(seen) - among, 1)).astype(np.int64)
    chosen = chosen + (among & (chosen >= at))
    return np.where(where, seen[chosen.clip(max=len(seen) - 1)], inputs).astype(np.int64)


def swapped(inputs: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Columns 2i and 2i + 1 exchanged in the rows where `where` is true at 2i."""
    out, even = inputs.copy(), inputs.shape[1] // 2 * 2
    chosen = where[:, :even:2]
    out[:, :even:2] = np.where(chosen, inputs[:, 1:even:2], inputs[:, :even:2])
    out[:, 1:even:2] = np.where(chosen, inputs[:, :even:2], inputs[:, 1:even:2])
    return out


@contextmanager
def zeroed_embedding(subject: Subject, mask: Tensor) -> Iterator[None]:
    """Within it, what the embedding gives is zero where the mask (B, T) is true; rows go through in their order."""
    parts = (part for (part,) in subject.batches(mask))
    handle = cast(Decoder, subject.model).embedding.register_forward_hook(
        lambda module, args, out: out.masked_fill(next(parts)[..., None], 0.0)
    )
    try:
        yield
    finally:
        handle.remove()
