"""Sigma reparametrization of linear maps."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError, trait


class SigmaLinear(nn.Linear):
    """y = (gamma / sigma(W)) W x + b, sigma(W) = v^T W u the largest singular value (Zhai et al. 2023, 2303.06296).

    gamma is trained. u and v, unit vectors that carry no gradient, are one step of power iteration ahead after every
    step of the optimizer: v = W u / |W u|, u = W^T v / |W^T v|. Of a matrix that stacks several (queries, keys,
    values) each has its own gamma, u and v; `rows` are their numbers of rows. At the start u and v are the leading
    singular vectors and gamma is sigma(W), so that the map is that of the plain matrix (as in apple/ml-sigma-reparam).

    Holds the weight and bias of `plain`. sigma is computed in the weight's own precision.
    """

    u: Tensor
    v: Tensor

    def __init__(self, plain: nn.Linear, rows: Sequence[int]):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rows = plain.in_features, plain.out_features, list(rows)
        self.weight, self.bias = plain.weight, plain.bias
        like: dict[str, Any] = {"device": plain.weight.device, "dtype": plain.weight.dtype}
        self.gamma = nn.Parameter(torch.empty(len(self.rows), **like))
        self.register_buffer("u", torch.empty(len(self.rows), self.in_features, **like))
        self.register_buffer("v", torch.empty(self.out_features, **like))

    def sigma(self) -> Tensor:
        """The largest singular value of each of the stacked matrices as u and v see it; gradients pass through W."""
        # the meta device, on which operations are counted, knows no autocast
        device = "cpu" if self.weight.is_meta else self.weight.device.type
        with torch.autocast(device, enabled=False):
            parts = zip(self._parts(self.v), self._parts(self.weight), self.u, strict=True)
            return torch.stack([torch.dot(v, w @ u) for v, w, u in parts])

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.gamma / self.sigma()).unbind()
        parts = zip(factors, self._parts(self.weight), strict=True)
        return F.linear(x, torch.cat([factor * w for factor, w in parts]), self.bias)

    @torch.no_grad()
    def settle(self) -> None:
        """u, v and gamma of the weight as it is."""
        for k, (w, v) in enumerate(zip(self._parts(self.weight), self._parts(self.v), strict=True)):
            left, values, right = torch.linalg.svd(w.float(), full_matrices=False)
            if not values[0] > 0:
                raise ConfigError(
                    "model.sigma_reparam=true is not allowed with this norm, which begins with a matrix of zeros."
                )
            v.copy_(left[:, 0])
            self.u[k].copy_(right[0])
            self.gamma[k] = values[0]

    @torch.no_grad()
    def iterate(self) -> None:
        """One step of power iteration, after each step of the optimizer."""
        for k, (w, v) in enumerate(zip(self._parts(self.weight), self._parts(self.v), strict=True)):
            v.copy_(F.normalize(w @ self.u[k], dim=0))
            self.u[k].copy_(F.normalize(w.T @ v, dim=0))

    def _parts(self, stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.split(self.rows)


def verify_sigma(cfg: Config) -> None:
    """Refuses what changes the matrices behind the back of u and v, or begins with a matrix of zeros."""
    contradictions = {
        "norm=ngpt, whose matrices have unit rows": trait(cfg.norm, "rewrites_weights"),
        "norm=fixup, which begins with matrices of zeros": trait(cfg.norm, "starts_from_zero"),
        "attention.qk_clip, which scales rows": cfg.attention.qk_clip is not None,
        "optimizer=schedule_free, whose averaged weights have other singular vectors": trait(
            cfg.optimizer, "averages_weights"
        ),
        "trainer.strategy=fsdp, which splits the matrices": cfg.trainer.strategy == "fsdp",
    }
    for what, there in contradictions.items():
        if there:
            raise ConfigError(f"model.sigma_reparam=true is not allowed with {what}.")
