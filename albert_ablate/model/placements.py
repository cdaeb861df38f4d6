"""Residual placements: where the norm sits around a sublayer f. x residual stream (B, T, D), N norm, M blocks.

A placement is a module for one sublayer of one block. It owns its consequences: whether the trunk ends in a norm,
whether the embedding is normalized, and the gain on the Xavier draw of each of its sublayer's matrices, by role:
query, key, value, output (attention); up, down (MLP). A block has two sublayers, so a model has 2M.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Sublayer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """Where a placement stands: `layer` of `layers` blocks from 0, around "attention" or "mlp".

    norm makes a new norm of the model's width. sibling is the placement around the same block's attention, for the MLP.
    """

    norm: Callable[[], nn.Module]
    layer: int
    layers: int
    sublayer: str
    sibling: "Placement | None" = None


class Placement(nn.Module):
    """x + f(x) and what belongs to it; the base of every placement."""

    uses_norm = True
    final_norm = True
    embedding_norm = False

    def __init__(self, site: Site, /):
        super().__init__()

    def gain(self, role: str) -> float:
        """Factor on the Xavier standard deviation of the matrix that plays `role` in this sublayer."""
        return 1.0

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        raise NotImplementedError


class NoNorm(Placement):
    """x + f(x), no normalization anywhere."""

    uses_norm = False
    final_norm = False

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        return x + f(x)


class PreLN(Placement):
    """x + f(N(x)), with a final norm (Baevski and Auli 2018, 1809.10853; Xiong et al. 2020, 2002.04745)."""

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm = site.norm()

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        return x + f(self.norm(x))


class PostLN(Placement):
    """N(x + f(x)), no final norm (Vaswani et al. 2017, 1706.03762)."""

    final_norm = False

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm = site.norm()

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        return self.norm(x + f(x))


class SandwichLN(Placement):
    """x + N_out(f(N_in(x))), with a final norm (CogView: Ding et al. 2021, 2105.13290)."""

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm_in = site.norm()
        self.norm_out = site.norm()

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        return x + self.norm_out(f(self.norm_in(x)))


class PeriLN(SandwichLN):
    """x + N_out(f(N_in(x))), with a norm on the embedding and a final norm (Kim et al. 2025, 2502.02732)."""

    embedding_norm = True


class DeepNorm(Placement):
    """N(alpha x + f(x)), alpha = (2M)^(1/4), no final norm (Wang et al. 2022, 2203.00555, decoder-only).

    beta = (8M)^(-1/4) is a gain on the Xavier draw of value, output, up and down; query and key keep 1. The two fix the
    size of an update: 2M * 2 beta^2 / alpha^2 = 1.
    """

    final_norm = False

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm = site.norm()
        self.alpha = (2 * site.layers) ** 0.25
        self.beta = (8 * site.layers) ** -0.25

    def gain(self, role: str) -> float:
        return 1.0 if role in ("query", "key") else self.beta

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        return self.norm(torch.add(f(x), x, alpha=self.alpha))


class ReZero(Placement):
    """x + a f(x), a = 0 at first, no normalization (Bachlechner et al. 2020, 2003.04887).

    One scalar a per block, shared by its two sublayers, as in the authors' code.
    """

    uses_norm = False
    final_norm = False

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.gate: nn.Parameter
        if isinstance(site.sibling, ReZero):
            self.gate = site.sibling.gate
        else:
            self.gate = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        return x + self.gate * f(x)
