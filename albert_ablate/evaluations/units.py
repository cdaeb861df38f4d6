"""Unit ablation: rise of the loss when a share of the MLPs' hidden units is set to zero."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from albert_ablate.config import Config, ConfigError, Count, Fraction
from albert_ablate.evaluations.subject import Evaluation, Result, Subject
from albert_ablate.model.decoder import Decoder


@dataclass(frozen=True)
class Units(Evaluation):
    """rise = loss with a share of the hidden units of every MLP set to zero - loss, nats per token: cumulative ablation
    (Morcos et al. 2018, 1803.06959), here of random units.

    A unit is what leaves the activation (gated: the product), before any norm there. No rescaling. In each layer the
    same share, rounded; units are ranked by one draw per layer, so that those of a share are among those of every
    larger one, and arms of one seed lose the same. shares: of the units. draws: random choices averaged. split, tokens:
    text and size of the fixed sample. Training text by default: of a model that overfits, zeroing units lowers the loss
    on validation text. The figure of a share of 0.1 is rise_10.
    """

    looks_inside = True

    shares: tuple[Fraction, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
    draws: Count = 3
    split: Literal["train", "validation"] = "train"
    tokens: Count = 4_096

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse shares of 0 and shares given twice."""
        shares = cfg.evaluation.parts["units"].shares
        if len(set(shares)) < len(shares) or 0 in shares:
            raise ConfigError(
                f"evaluation.units.shares={shares} is not allowed: each must be above 0 and be given once."
            )

    def __call__(self, subject: Subject) -> Result:
        rows = subject.sample(self.split, self.tokens)
        clean = subject.loss(rows)
        table: list[dict[str, Any]] = []
        for share in self.shares:
            for draw in range(self.draws):
                with zeroed_units(cast(Decoder, subject.model), self._units(subject, share, draw)):
                    loss = subject.loss(rows)
                table.append({"share": share, "draw": draw, "loss": loss, "rise": loss - clean})
        rises = {
            share: float(np.mean([row["rise"] for row in table if row["share"] == share])) for share in self.shares
        }
        return Result(table, {f"rise_{100 * share:g}": rise for share, rise in rises.items()} | {"clean_loss": clean})

    def _units(self, subject: Subject, share: float, draw: int) -> list[np.ndarray]:
        """Numbers of the units that each layer loses."""
        widths = [block.mlp.inner for block in subject.model.stack]
        orders = (subject.draws("units", draw, layer).permutation(width) for layer, width in enumerate(widths))
        return [order[: round(share * len(order))] for order in orders]


@contextmanager
def zeroed_units(model: Decoder, units: Sequence[np.ndarray]) -> Iterator[None]:
    """Within it, these units of each layer's MLP give zero."""
    mlps = [block.mlp for block in model.stack]
    before = [mlp.activation for mlp in mlps]
    for mlp, layer_units in zip(mlps, units, strict=True):
        keep = torch.ones(mlp.inner, device=mlp.down.weight.device)
        keep[torch.from_numpy(layer_units)] = 0
        mlp.activation = _times(mlp.activation, keep)
    try:
        yield
    finally:
        for mlp, activation in zip(mlps, before, strict=True):
            mlp.activation = activation


def _times(activation: Any, keep: Tensor) -> Any:
    return lambda x: activation(x) * keep
