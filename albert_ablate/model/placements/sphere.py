"""nGPT: stream and weights on the unit sphere."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError, Positive, trait
from albert_ablate.model.placements.base import LAST, Branch, Placement, Site, Sublayer, refuse_qk_norm

if TYPE_CHECKING:
    from albert_ablate.model.decoder import Decoder


class NGPT(Placement):
    """U(x + |a| (U(f(x)) - x)), U(z) = z / |z|: the stream stays on the unit sphere (Loshchilov et al. 2024,
    2410.01131).

    After each step every row of a matrix that reads the stream and every column of one that writes to it has length 1.
    Queries and keys are s_qk U(.), the softmax scale is sqrt(d), logits s_z; what enters the activation is s_u sqrt(D),
    and in a gated MLP (the paper's) what is multiplied with what leaves it is s_v sqrt(D). A trained vector holds each
    of a (alpha at first), s_qk, s_u, s_v and s_z (1 at first); a, s_qk and s_z are stored at 1 / sqrt(D), which sets
    how fast Adam moves them. The paper has rotary positions, no warm-up and no weight decay.
    """

    uses_norm = False  # its own
    normalizes_embedding = True
    rewrites_weights = True
    final_norm = False
    scales_tied = False

    def __init__(self, site: Site, /, alpha: Positive = 0.05):
        super().__init__(site)
        self.stored, attends = site.width**-0.5, site.sublayer == "attention"
        self.alpha_scale = alpha / self.stored
        self.alpha = nn.Parameter(torch.empty(site.width))
        self.s_qk = nn.Parameter(torch.empty(site.width)) if attends else None
        self.s_u = None if attends else nn.Parameter(torch.empty(site.rows))
        self.s_v = nn.Parameter(torch.empty(site.rows)) if site.gated else None
        self.s_z = nn.Parameter(torch.empty(site.vocabulary)) if self.last else None
        self.head_count = site.heads

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse what leaves the unit sphere: averaged weights, weight decay, learned positions, split matrices."""
        refuse_qk_norm(cfg)
        decay, positions = cfg.optimizer.get("weight_decay"), cfg.attention.positions
        if trait(cfg.optimizer, "averages_weights"):
            raise ConfigError(
                "optimizer=schedule_free contradicts norm=ngpt: the average of weights of length 1 is shorter than 1."
            )
        if cfg.trainer.strategy == "fsdp":
            raise ConfigError("norm=ngpt needs whole matrices, which trainer.strategy=fsdp splits: take trainer=ddp.")
        if decay:
            raise ConfigError(
                f"optimizer.weight_decay={decay} contradicts norm=ngpt, which fixes the weights' norms: set 0."
            )
        if positions == "learned":
            raise ConfigError(
                "norm=ngpt keeps the residual stream on a sphere, which learned positions leave: set attention=rotary."
            )

    def reset_parameters(self) -> None:
        """Set the scales to their stored initial values."""
        for parameter in self.parameters(recurse=False):
            nn.init.constant_(parameter, self.stored)
        for scale in (self.s_u, self.s_v):
            if scale is not None:
                nn.init.ones_(scale)

    def begin(self, x: Tensor) -> Tensor:
        return unit(x)  # changes nothing but what dropout or a sum has moved

    def finish(self, x: Tensor, norm: nn.Module) -> Tensor:
        return x

    def logits(self, z: Tensor) -> Tensor:
        return z * (self.s_z / self.stored)

    def softmax_scale(self, head_width: int) -> float:
        return head_width**0.5

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = (self.s_qk / self.stored).view(self.head_count, 1, -1)
        return unit(q) * s.square(), unit(k), v  # (s q)(s k) = (s^2 q) k

    def hidden(self, h: Tensor) -> Tensor:
        return h if self.s_u is None else h * (self.s_u / self.stored)

    def linear(self, h: Tensor) -> Tensor:
        return h if self.s_v is None else h * (self.s_v / self.stored)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return unit(torch.lerp(x, unit(f(x)), (self.alpha * self.alpha_scale).abs()))

    def after_step(self, sublayer: Sublayer, model: "Decoder") -> None:
        for leaf, roles in sublayer.roles.items():
            weight = getattr(sublayer, leaf).weight
            weight.copy_(unit(weight, 0 if roles[0] in LAST else 1))
        if self.first:
            model.embedding.weight.copy_(unit(model.embedding.weight))
        if self.last:
            model.head.weight.copy_(unit(model.head.weight))


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x over its Euclidean length along `dim`, 0 where it is 0; half the time of F.normalize."""
    return x * x.square().sum(dim, keepdim=True).add(1e-24).rsqrt()
