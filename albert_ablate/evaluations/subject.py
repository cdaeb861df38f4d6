"""Input and output of an evaluation, and its base class. B sequences, T tokens, V vocabulary."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from albert_ablate.data.packed import BatchOrder, Packed, held_out_sample, take_blocks
from albert_ablate.model.token_model import TokenModel
from albert_ablate.streams import stream_seed

BATCH_TOKENS = 2048  # a constant, so that results depend on nothing but weights and text


@dataclass(frozen=True)
class Result:
    """Result of an evaluation: a table and summary metrics; numbers that are not finite are nan."""

    rows: list[dict[str, Any]]
    summary: dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A run's kept weights in evaluation mode (no dropout) and in 32 bits, and the text it was trained on.

    tokenizer: as configured. steps: optimizer steps behind these weights, for what has been seen of the text.
    """

    model: TokenModel
    packed: Packed
    tokenizer: Any
    order: BatchOrder
    context: int
    seed: int
    steps: int

    @property
    def counting(self) -> dict[str, str]:
        """For the settings of what counts bytes: they were once those of the whole text, which only for bytes, or
        where there are none, is the same. Results that were counted so are done anew."""
        ones = self.packed.sizes is not None and all(sizes.strides == (0,) for sizes in self.packed.sizes.values())
        return {} if ones else {"bytes": "of the sample"}

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    def sample(self, split: str, tokens: int) -> Tensor:
        """About `tokens` tokens of a split as blocks (B, T + 1), the same for every run on this text and context."""
        return self.blocks(getattr(self.packed, split), tokens, split)

    def blocks(self, array: np.ndarray, tokens: int, name: str) -> Tensor:
        """A fixed sample of about `tokens` tokens, as blocks of context + 1; shape (blocks, context + 1)."""
        blocks = held_out_sample(array, self.context, tokens, name)
        return torch.from_numpy(take_blocks(array, blocks, self.context))

    def draws(self, *name: object) -> np.random.Generator:
        """The stream `name` of the run's seed: arms of one seed share it."""
        return np.random.Generator(np.random.PCG64(stream_seed(self.seed, *name)))

    def batches(self, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows of all parts, as many at a time as make up BATCH_TOKENS, on the model's device."""
        per = max(1, BATCH_TOKENS // self.context)
        yield from zip(*(part.to(self.device).split(per) for part in parts), strict=True)

    @torch.no_grad()
    def logits(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits (B, T, V), targets (B, T)), batch by batch."""
        for x, y in self.batches(inputs, targets):
            yield self.model(x).float(), y

    def loss(self, rows: Tensor, inputs: Tensor | None = None, every: slice = slice(None)) -> float:
        """Mean cross-entropy of blocks (B, T + 1), nats per token; nan where it is not finite.

        inputs: what the model sees instead of the clean text. every: the positions that count.
        """
        total, count = 0.0, 0
        for logits, targets in self.logits(rows[:, :-1] if inputs is None else inputs, rows[:, 1:]):
            logits, targets = logits[:, every], targets[:, every]
            total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").double().item()
            count += targets.numel()
        return finite(total / count)


def finite(x: float) -> float:
    """x, or nan where it is infinite."""
    return x if np.isfinite(x) else np.nan


class Evaluation:
    """Base class of evaluations: the arguments are its settings; called with a subject it returns a result."""

    def settings(self, subject: Subject) -> dict[str, Any]:
        """What its result depends on besides the weights: a result with others is done anew."""
        return asdict(self)  # type: ignore[call-overload]

    def __call__(self, subject: Subject) -> Result:
        raise NotImplementedError
