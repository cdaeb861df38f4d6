"""Placements with a norm on the stream itself: N(x + f(x)) and its kin."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError, Fraction
from albert_ablate.model.placements.base import LAST, Branch, Placement, Site, refuse_qk_norm
from albert_ablate.streams import stream_seed

if TYPE_CHECKING:
    from albert_ablate.model.decoder import Decoder


class PostLN(Placement):
    """N(x + f(x)), no final norm (Vaswani et al. 2017, 1706.03762)."""

    final_norm = False

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm = site.norm(site.width)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return self.norm(x + f(x))


class DeepNorm(Placement):
    """N(alpha x + f(x)), alpha = (2M)^(1/4), no final norm (Wang et al. 2022, 2203.00555, decoder-only).

    beta = (8M)^(-1/4) is a gain on the Xavier draw of value, output, up and down; query and key keep 1. The two fix the
    size of an update: 2M * 2 beta^2 / alpha^2 = 1.
    """

    final_norm = False

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm = site.norm(site.width)
        self.alpha = (2 * site.layers) ** 0.25
        self.beta = (8 * site.layers) ** -0.25

    def gain(self, role: str) -> float:
        return 1.0 if role in ("query", "key") else self.beta

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return self.norm(torch.add(f(x), x, alpha=self.alpha))


class Admin(PostLN):
    """N(w x + f(x)), w = sqrt((n + 1) / ln(n + 1) - 1), n = 2M, no final norm (Liu et al. 2020, 2004.08249).

    The closed form and the constant w are those of the authors' package admin-torch.
    """

    def __init__(self, site: Site, /):
        super().__init__(site)
        n = 2 * site.layers
        self.omega = ((n + 1) / math.log(n + 1) - 1) ** 0.5

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return self.norm(torch.add(f(x), x, alpha=self.omega))


class AdminProfiled(PostLN):
    """N(w_i x + f_i(x)), i = 1..2M: w_1 = 1, w_(i+1)^2 = Var[w_i x] + Var[f_i(x)], no final norm (Liu et al. 2020,
    2004.08249; the authors' first code).

    w_i is a trained vector. The variances are those of one pass over tokens drawn uniformly, stream `admin`, without
    dropout.
    """

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.omega = nn.Parameter(torch.ones(site.width))
        self.profile: list[Tensor] | None = None

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse shared blocks, whose scales would differ."""
        if cfg.model.shared:
            raise ConfigError(
                "model.shared=true contradicts norm=admin_profiled, which measures a scale for each block."
            )

    def reset_parameters(self) -> None:
        """Set omega to 1; profiling then replaces it."""
        nn.init.ones_(self.omega)

    @torch.no_grad()
    def prepare(self, model: "Decoder") -> None:
        if not self.first:
            return
        placements = [p for p in model.modules() if isinstance(p, AdminProfiled)]
        vocabulary, profile = model.embedding.num_embeddings, [torch.ones(())]
        generator = torch.Generator().manual_seed(stream_seed(model.clock.seed, "admin"))
        tokens = torch.randint(vocabulary, (8, model.context), generator=generator).to(self.omega.device)
        for p in placements:
            p.profile = profile
        training = model.training
        model.eval()(tokens)
        model.train(training)
        for p in placements:
            p.profile = None

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        y = f(x)
        if self.profile is not None:
            self.omega.fill_(self.profile[-1])
            self.profile.append(((x * self.omega).var(correction=0) + y.var(correction=0)).sqrt())
        return self.norm(torch.addcmul(y, x, self.omega))


class ResiDual(PostLN):
    """x <- N(x + f(x)), r <- r + f(x), r = x at first; x + N(r) enters the head (Xie et al. 2023, 2304.14802).

    The stream is (x, r); the norm of r is the final norm.
    """

    final_norm = True

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def forward(self, x: Any, f: Branch) -> Any:
        x, r = x
        y = f(x)
        return self.norm(x + y), r + y

    def finish(self, x: Any, norm: nn.Module) -> Tensor:
        x, r = x
        return x + norm(r)


class MixLN(PostLN):
    """N(x + f(x)) in the first floor(share * M) blocks, x + f(N(x)) in the others, with a final norm (Li et al. 2024,
    2412.13795)."""

    final_norm = True

    def __init__(self, site: Site, /, share: Fraction = 0.25):
        super().__init__(site)
        self.post = site.layer < _blocks(share, site.layers)

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse a share that leaves all blocks alike."""
        share, layers = cfg.norm.share, cfg.model.layers
        if not 0 < _blocks(share, layers) < layers:
            raise ConfigError(
                f"norm.share={share} of model.layers={layers} mixes nothing: it must leave at least one block with the "
                "norm after the sum and one with the norm before the sublayer."
            )

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        return self.norm(x + f(x)) if self.post else x + f(self.norm(x))


class HybridNorm(Placement):
    """y = x + attention(x) with norms on each head's query, key and value, then N(y) + mlp(N(y)), with a final norm
    (Zhuo et al. 2025, 2503.04598).

    star: the first block is y = x + attention(N(x)), y + mlp(N(y)) instead. The last matrices are drawn with
    1 / sqrt(2M) (Megatron's draw).
    """

    def __init__(self, site: Site, /, star: bool = False):
        super().__init__(site)
        before = star and site.layer == 0
        self.before, self.share = before, (2 * site.layers) ** -0.5
        self.attends = site.sublayer == "attention"
        self.norm = site.norm(site.width) if before or not self.attends else None
        if self.attends:
            self.norms = nn.ModuleList(site.norm(site.width // site.heads) for _ in range(3))

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse QK-norm, which the placement brings, and a special first block among shared ones."""
        refuse_qk_norm(cfg)
        if cfg["norm"].get("star") and cfg["model"]["shared"] and cfg["model"]["layers"] > 1:
            raise ConfigError(
                "model.shared=true contradicts norm.star=true, whose first block has a norm that the others have not."
            )

    def gain(self, role: str) -> float:
        return self.share if role in LAST else 1.0

    def projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_query, of_key, of_value = self.norms
        return of_query(q), of_key(k), of_value(v)

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        if self.norm is None:
            return x + f(x)
        normed = self.norm(x)
        return (x if self.before else normed) + f(normed)


class Keel(Placement):
    """N(2M x + f(N'(x))), no final norm (Chen and Wei 2026, 2601.19895).

    In the first block attention is x + f(N'(x)) and the MLP N(x + f(N'(x))). The paper's norms have a gain and no bias:
    take norm_type=rms_norm for them. M counts blocks, so that 2M is the number of sublayers, the paper's alpha.
    """

    final_norm = False

    def __init__(self, site: Site, /):
        super().__init__(site)
        self.norm_in = site.norm(site.width)
        self.norm_out = None if self.first else site.norm(site.width)
        self.alpha = 2 * site.layers if site.layer else 1

    def forward(self, x: Tensor, f: Branch) -> Tensor:
        y = torch.add(f(self.norm_in(x)), x, alpha=self.alpha)
        return y if self.norm_out is None else self.norm_out(y)


def _blocks(share: float, layers: int) -> int:
    return math.floor(share * layers + 1e-9)  # 0.29 * 100 is 28.999999999999996
