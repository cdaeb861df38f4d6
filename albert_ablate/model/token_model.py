"""What training asks of a model besides its logits. The package's decoder and models of one's own answer alike."""

from typing import Any

import torch
from torch import Tensor, nn

from albert_ablate.model.dropout import Clock

Place = tuple[int, str]  # block from 0, and which part of it: "attention", "mlp", or "block" where it is one piece


class TokenModel(nn.Module):
    """`model(tokens)` gives logits, (B, T) integers -> (B, T, V).

    clock: step and micro-batch, from which dropout is seeded. context: tokens of a training sequence. initial_draws:
    hash of each parameter's initial draw, once `fill` was called.
    """

    clock: Clock
    context: int
    initial_draws: dict[str, str]
    blocks: Any  # its layers, in order

    def fill(self, seed: int, device: torch.device | str = "cpu") -> dict[str, str]:
        """Give every parameter its initial value, on `device`; gives the hash of each draw."""
        raise NotImplementedError

    @property
    def stack(self) -> list[Any]:
        """The blocks whose attention, MLP and placement are known; none where a model is not a `Decoder`."""
        return []

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters as clipping and diagnostics see them: those of blocks are named blocks.NUMBER.REST, those of
        the head and of the embedding head.REST and embedding.REST."""
        return list(self.named_parameters())

    def places(self) -> dict[str, Place]:
        """Where each parameter of the blocks belongs, by its name in `trained`."""
        raise NotImplementedError

    def rates(self) -> dict[Place, float]:
        """The dropout rate in force at each place of the blocks, in order; nan where it is not known."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """What a run's record says of the model."""
        raise NotImplementedError

    def multipliers(self, name: str) -> dict[str, float]:
        """Factors on the optimizer's lr, weight_decay and eps for the parameter `name`."""
        return {}

    def kinds(self) -> dict[str, str]:
        """What each parameter is, by name, where that cannot be told from its name and shape (optim/groups.py)."""
        return {}

    def after_step(self) -> None:
        """To be called after each step of the optimizer."""

    def recompute_blocks(self) -> None:
        """From now on the backward pass computes each block anew from its input."""
        raise NotImplementedError

    def compile_blocks(self) -> None:
        """From now on each block runs as torch.compile makes it."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError
