"""Placements with the norm before the sublayer, on a stream that is not normalized: x + f(N(x)) and its kin."""

import math
import warnings
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError, Count, Positive, Range, trait
from albert_ablate.model.placements.base import LAST, Branch, Placement, Site


class PreLN(Placement):
    """x + f(N(x)), with a final norm (Baevski and Auli 2018, 1809.10853; Xiong et al. 2020, 2002.04745)."""

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm = site.norm(site.width)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return x + f(self.norm(x))


class SandwichLN(Placement):
    """x + N_out(f(N_in(x))), with a final norm (CogView: Ding et al. 2021, 2105.13290)."""

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm_in = site.norm(site.width)
        self.norm_out = site.norm(site.width)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return x + self.norm_out(f(self.norm_in(x)))


class PeriLN(SandwichLN):
    """x + N_out(f(N_in(x))), with a norm on the embedding and a final norm (Kim et al. 2025, 2502.02732).

    The paper calls the norm on the embedding optional; norm=sandwich_ln is the same placement without it.
    """

    embedding_norm = True
    normalizes_embedding = True


class ReorderedLN(Placement):
    """x + N(f(x)), with a final norm (OLMo 2: Team OLMo 2024, 2501.00656; Liu et al. 2021, 2111.09883).

    The paper pairs it with QK-norm and says that neither works alone: without it a warning is given.
    """

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm = site.norm(site.width)

    @staticmethod
    def verify(cfg: Config) -> None:
        """Warn where QK-norm is missing."""
        if cfg.attention.get("qk_norm") in (None, False, "none"):
            warnings.warn("norm=reordered_ln is published with QK-norm, without it deep models explode.", stacklevel=1)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return x + self.norm(f(x))


class GPT2(PreLN):
    """x + f(N(x)), with a final norm and GPT-2's draws (Radford et al. 2019).

    Every matrix and table is drawn with standard deviation `std`, the last matrix of each sublayer with std / sqrt(2M),
    which keeps the variance of the stream from growing with depth. A tied embedding is not scaled on entry.
    """

    scales_tied = False

    def __init__(self, site: Site, /, std: Positive = 0.02):
        super().__init__(site)
        self.width_of_draw, self.share = std, (2 * site.layers) ** -0.5

    def std(self, role: str, usual: float, rows: int, columns: int) -> float:
        return self.width_of_draw * (self.share if role in LAST else 1)

    def trunk_std(self, role: str, usual: float, rows: int, columns: int) -> float:
        return self.width_of_draw


class LNScaling(PreLN):
    """x + f(N(x) / sqrt(l)), l = 1..M the block, with a final norm (Sun et al. 2025, 2502.05795, equation 12)."""

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.scale = (site.layer + 1) ** -0.5

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return x + f(self.norm(x) * self.scale)


class LayerScale(PreLN):
    """x + diag(g) f(N(x)), g = initial at first, with a final norm (CaiT: Touvron et al. 2021, 2103.17239).

    initial: where null the paper's, by depth: 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond.
    """

    def __init__(self, site: Site, /, initial: Positive | None = None):
        super().__init__(site)
        by_depth = 0.1 if site.layers <= 18 else 1e-5 if site.layers <= 24 else 1e-6
        self.initial = by_depth if initial is None else initial
        self.scale = nn.Parameter(torch.full((site.width,), self.initial))

    def reset_parameters(self) -> None:
        """Set the scales to their initial value."""
        nn.init.constant_(self.scale, self.initial)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return torch.addcmul(x, f(self.norm(x)), self.scale)


class SubLN(PreLN):
    """x + W N'(h(N(x))), h the sublayer up to its last matrix W, with a final norm (Magneto: Wang et al. 2022,
    2210.06423, decoder-only).

    sqrt(ln 2M) is a gain on the Xavier draw of value, output, up and down; query and key keep 1.
    """

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm_inner = site.norm(site.inner)
        self.gamma = math.log(2 * site.layers) ** 0.5

    def gain(self, role: str) -> float:
        return 1.0 if role in ("query", "key") else self.gamma

    def leaving(self, h: Tensor) -> Tensor:
        return self.norm_inner(h)


class NormFormer(PreLN):
    """x + N'(W concat(c_i head_i(N(x)))) for attention, g x + W N'(a(U N(x))) for the MLP, with a final norm
    (Shleifer et al. 2021, 2110.09456).

    c is a scale per head, 1 at first; g, 1 at first, is there where residual_scale is set.
    """

    def __init__(self, site: Site, /, residual_scale: bool = False):
        super().__init__(site)
        self.heads_scale = self.residual_scale = None
        if site.sublayer == "attention":
            self.norm_out = site.norm(site.width)
            self.heads_scale = nn.Parameter(torch.ones(site.heads))
        else:
            self.norm_inner = site.norm(site.inner)
            self.residual_scale = nn.Parameter(torch.ones(site.width)) if residual_scale else None

    def reset_parameters(self) -> None:
        """Set all scales to 1."""
        for parameter in self.parameters(recurse=False):
            nn.init.ones_(parameter)

    def leaving(self, h: Tensor) -> Tensor:
        if self.heads_scale is None:
            return self.norm_inner(h)
        return (h.unflatten(-1, (len(self.heads_scale), -1)) * self.heads_scale[:, None]).flatten(-2)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        if self.heads_scale is not None:
            return x + self.norm_out(f(self.norm(x)))
        y = f(self.norm(x))
        return x + y if self.residual_scale is None else torch.addcmul(y, x, self.residual_scale)


class Parallel(Placement):
    """x + attention(N(x)) + mlp(N(x)), one norm for both, with a final norm (GPT-J: Wang and Komatsuzaki 2021; PaLM:
    Chowdhery et al. 2022, 2204.02311).

    Inside a block the stream is (x + attention(N(x)), N(x)).
    """

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm = site.norm(site.width) if site.sublayer == "attention" else None

    def forward(self, x: Any, f: Branch) -> Any:
        if self.norm is not None:
            normed = self.norm(x)
            return x + f(normed), normed
        x, normed = x
        return x + f(normed)


class CompleteP(PreLN):
    """x + m_L^(-a) f(N(x)), with a final norm: learning rates found at a base size hold at another width and depth.

    m_N = width / base_width, m_L = M / base_layers; a = 1 is CompleteP (Dey et al. 2025, 2505.01618), a = 1/2 depth-muP
    (Yang et al. 2023, 2310.02244). Softmax scale 1 / d; logits / m_N, the head drawn as at the base width. For AdamW
    and its kin (with others a warning is given):

    ============================  ===================  ============  ===================
    parameters                    lr                   weight_decay  eps
    matrices of the blocks        m_N^-1 m_L^(a-1)     m_N           m_N^-1 m_L^-a
    gains and biases there        m_L^(a-1)            1             m_N^-1 m_L^-a
    embedding, head, final norm   1                    1             m_N^-1
    ============================  ===================  ============  ===================
    """

    def __init__(
        self,
        site: Site,
        /,
        exponent: Annotated[float, Range(0.5, 1)] = 1.0,
        base_width: Count = 32,
        base_layers: Count = 4,
    ):
        super().__init__(site)
        self.exponent, self.base_width = exponent, base_width
        self.wider, self.deeper = site.width / base_width, site.layers / base_layers
        self.scale = self.deeper**-exponent

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse tied embeddings; warn where an optimizer's steps are not sized as Adam's."""
        if cfg.model.tied:
            raise ConfigError(
                f"model.tied=true contradicts norm={cfg.option('norm')}, which scales embedding and head apart: "
                "leave it out."
            )
        if not trait(cfg.optimizer, "adam_sized_steps", True):
            optimizer = cfg.optimizer._target_.rpartition(".")[2]
            warnings.warn(
                f"norm={cfg.option('norm')} scales learning rates as Adam's steps need it; those of "
                f"optimizer={optimizer} have another size.",
                stacklevel=1,
            )

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return torch.add(x, f(self.norm(x)), alpha=self.scale)

    def softmax_scale(self, head_width: int) -> float:
        return 1 / head_width

    def trunk_std(self, role: str, usual: float, rows: int, columns: int) -> float:
        return (2 / (rows + self.base_width)) ** 0.5 if role == "head" else usual

    def finish(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) / self.wider

    def multipliers(self, role: str) -> dict[str, float]:
        if role in ("embedding", "positions", "head", "embedding_norm", "final_norm"):
            return {"eps": 1 / self.wider}
        there = {"lr": self.deeper ** (self.exponent - 1), "eps": self.scale / self.wider}
        return there if role == "norm" else {**there, "lr": there["lr"] / self.wider, "weight_decay": self.wider}
