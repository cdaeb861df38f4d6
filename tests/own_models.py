"""Models of one's own, as tests hand them to training: named by ALBERT_ABLATE_TRUST=own_models."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from albert_ablate.config import Count


class Mixer(nn.Module):
    """Means of the tokens so far, mixed by `layers` matrices; a logit for each of `vocabulary` tokens."""

    def __init__(
        self, vocabulary: int, /, context: Count = 16, width: Count = 12, layers: Count = 2, norm: bool = False
    ):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.scale = nn.Parameter(torch.rand(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(*([nn.LayerNorm(width)] if norm else []), nn.Linear(width, width), nn.Dropout(0.1), nn.GELU())
            for _ in range(layers)
        )
        self.out = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Any:
        x = self.table(tokens) * self.scale
        x = x.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        for block in self.blocks:
            x = x + block(x)
        return SimpleNamespace(logits=self.out(x))


class Narrow(Mixer):
    """With a logit too few."""

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens).logits[..., 1:]


class Foresighted(Mixer):
    """Sees what comes after."""

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens.flip(1)).logits.flip(1)


class Grouped(Mixer):
    """Says itself what its scale is."""

    def decay_groups(self) -> dict[str, str]:
        return {"scale": "matrices"}


def number(vocabulary: int, /, context: Count = 16) -> int:
    """No module at all."""
    return vocabulary
