"""Placements without normalization: x + f(x) and its kin."""

import torch
from torch import Tensor, nn

from albert_ablate.config import NonNegative
from albert_ablate.model.placements.base import LAST, Branch, Placement, Site


class NoNorm(Placement):
    """x + f(x), no normalization anywhere."""

    uses_norm = False
    final_norm = False

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return x + f(x)


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
        """Set the gate to 0: a block begins as the identity."""
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return x + self.gate * f(x)


class SkipInit(NoNorm):
    """x + a f(x), a = initial at first, one a for each sublayer, no normalization (De and Smith 2020, 2002.10444)."""

    def __init__(self, site: Site, /, initial: NonNegative = 0.0):
        super().__init__(site)
        self.initial = initial
        self.gate = nn.Parameter(torch.tensor(initial))

    def reset_parameters(self) -> None:
        """Set the gate to its initial value."""
        nn.init.constant_(self.gate, self.initial)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return torch.addcmul(x, f(x), self.gate)


class TFixup(NoNorm):
    """x + f(x), no normalization, made to train without warm-up (Huang et al. 2020, ICML).

    0.67 M^(-1/4) is a gain on the Xavier draw of value, output, up and down; query and key keep 1. That is the rule for
    a stack of self-attention and MLP (their encoder); the draws of the embedding, and of the learned positions
    that are added to it, are times (9M)^(-1/4).
    """

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.layers = site.layers

    def gain(self, role: str) -> float:
        return 1.0 if role in ("query", "key") else 0.67 * self.layers**-0.25

    def trunk_std(self, role: str, usual: float, rows: int, columns: int) -> float:
        return usual * (9 * self.layers) ** -0.25 if role in ("embedding", "positions") else usual


class Fixup(NoNorm):
    """x + s f(x + b), scalars s = 1 and b = 0 at first, no normalization (Zhang et al. 2019, 1901.09321).

    B = 2M branches: query, key and value are Xavier's times B^(-1/6), the MLP's first matrix times B^(-1/2) (a branch
    of m matrices: B^(-1/(2m-2))), last matrices and head 0. A scalar bias also stands before and after the activation
    and before the head, as in the authors' Transformer.
    """

    starts_from_zero = True

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.branches = 2 * site.layers
        self.scale = nn.Parameter(torch.ones(()))
        self.bias_in = nn.Parameter(torch.zeros(()))
        mlp = site.sublayer == "mlp"
        self.bias_hidden = nn.Parameter(torch.zeros(())) if mlp else None
        self.bias_leaving = nn.Parameter(torch.zeros(())) if mlp else None
        self.bias_end = nn.Parameter(torch.zeros(())) if self.last else None

    def reset_parameters(self) -> None:
        """Set biases to 0 and the scale to 1."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.scale)

    def gain(self, role: str) -> float:
        if role in LAST:
            return 0.0
        return self.branches ** (-1 / 6 if role in ("query", "key", "value") else -1 / 2)

    def trunk_std(self, role: str, usual: float, rows: int, columns: int) -> float:
        return 0.0 if role == "head" else usual

    def hidden(self, h: Tensor) -> Tensor:
        return h if self.bias_hidden is None else h + self.bias_hidden

    def leaving(self, h: Tensor) -> Tensor:
        return h if self.bias_leaving is None else h + self.bias_leaving

    def finish(self, x: Tensor, norm: nn.Module) -> Tensor:
        assert self.bias_end is not None
        return x + self.bias_end

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return torch.addcmul(x, f(x + self.bias_in), self.scale)
