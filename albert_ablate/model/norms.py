"""Norm types: a factory takes the width and gives a module. D width, B batch, T tokens; all act on (B, T, D).

g is a gain of D numbers, b a bias of D numbers, both trained where not said otherwise; eps keeps a division finite.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError, NonNegativeInt, Positive, Probability, traits

# --- of one token alone ----------------------------------------------------------------------------------------------


def layer_norm(width: int, /, eps: Positive = 1e-5, bias: bool = True, gain: bool = True) -> nn.LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + eps) * g + b over the last axis, g = 1, b = 0 (Ba et al. 2016, 1607.06450).

    bias=false, gain=false leave b, g out (OLMo 1, `OlmoLayerNorm` of transformers, has neither).
    """
    norm = nn.LayerNorm(width, eps=eps, elementwise_affine=bias or gain, bias=bias)
    if bias and not gain:  # not among torch's choices
        norm.register_parameter("weight", None)
        norm.elementwise_affine = False  # its reset_parameters looks at nothing else
    return norm


def rms_norm(width: int, /, eps: Positive = 1e-6, gain: bool = True) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + eps) * g over the last axis, g = 1 (Zhang and Sennrich 2019, 1910.07467)."""
    return nn.RMSNorm(width, eps=eps, elementwise_affine=gain)


class ZeroCentredRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + w) over the last axis, w = 0."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        """Set weights to 0, a gain of 1."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


def zero_centred_rms_norm(width: int, /, eps: Positive = 1e-6) -> ZeroCentredRMSNorm:
    """x / sqrt(mean(x^2) + eps) * (1 + w), w = 0, so that weight decay pulls the gain to 1 (Gemma 2: Gemma Team
    2024, 2408.00118)."""
    return ZeroCentredRMSNorm(width, eps)


class Unit(nn.Module):
    """scale * x / max(|x|, eps), |x| the length of x over the last axis; scale a constant or one trained number."""

    def __init__(self, scale: float, eps: float, trained: bool):
        super().__init__()
        self.initial, self.eps = scale, eps
        self.scale: Any = nn.Parameter(torch.tensor(scale)) if trained else scale

    def reset_parameters(self) -> None:
        """Set the scale to its initial value."""
        nn.init.constant_(self.scale, self.initial)

    def extra_repr(self) -> str:
        return f"scale={self.initial:g}, eps={self.eps:g}"

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x, dim=-1, eps=self.eps)


def scale_norm(width: int, /, eps: Positive = 1e-5) -> Unit:
    """g x / max(|x|, eps), g one trained number, sqrt(D) at first (Nguyen and Salazar 2019, 1910.05895)."""
    return Unit(math.sqrt(width), eps, trained=True)


def simple_rms_norm(width: int, /, eps: Positive = 1e-12) -> Unit:
    """sqrt(D) x / max(|x|, eps), without parameters (SimpleRMSNorm of TransNormerLLM: Qin et al. 2023, 2307.14995)."""
    return Unit(math.sqrt(width), eps, trained=False)


def l2_norm(width: int, /, eps: Positive = 1e-12) -> Unit:
    """x / max(|x|, eps), onto the unit sphere, without parameters (nGPT: Loshchilov et al. 2024, 2410.01131)."""
    return Unit(1.0, eps, trained=False)


class CRMSNorm(nn.Module):
    """x / sqrt((sum(x^2) + sum(x)^2) / (D + 1) + eps) * g over the last axis."""

    def __init__(self, width: int, eps: float, gain: bool):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width)) if gain else None

    def reset_parameters(self) -> None:
        """Set gains to 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"

    def forward(self, x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
        y = x * torch.rsqrt(square / (x.shape[-1] + 1) + self.eps)
        return y if self.weight is None else y * self.weight


def crms_norm(width: int, /, eps: Positive = 1e-8, gain: bool = True) -> CRMSNorm:
    """x / sqrt((sum(x^2) + sum(x)^2) / (D + 1) + eps) * g, g = 1 (Jiang et al. 2023, 2305.14858).

    The layer norm of the D + 1 numbers (x, -sum(x)), whose mean is 0, without the last of them.
    """
    return CRMSNorm(width, eps, gain)


class Squash(nn.Module):
    """f(alpha x + s) * g + b element by element; f, alpha and s say which. No statistic is taken."""

    def __init__(self, width: int, alpha: float, erf: bool):
        super().__init__()
        self.initial, self.erf = alpha, erf
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.shift = nn.Parameter(torch.zeros(())) if erf else None
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        """Set alpha to its initial value, gains to 1, shift and bias to 0."""
        nn.init.constant_(self.alpha, self.initial)
        nn.init.ones_(self.weight)
        for zero in (self.shift, self.bias):
            if zero is not None:
                nn.init.zeros_(zero)

    def extra_repr(self) -> str:
        return f"alpha={self.initial:g}"

    def forward(self, x: Tensor) -> Tensor:
        x = self.alpha * x
        return (torch.tanh(x) if self.shift is None else torch.erf(x + self.shift)) * self.weight + self.bias


def dyt(width: int, /, alpha: Positive = 0.5) -> Squash:
    """tanh(a x) * g + b, a one trained number, `alpha` at first, g = 1, b = 0 (DyT: Zhu et al. 2025, 2503.10622)."""
    return Squash(width, alpha, erf=False)


def derf(width: int, /, alpha: Positive = 0.5) -> Squash:
    """erf(a x + s) * g + b, a and s one trained number each, `alpha` and 0 at first, g = 1, b = 0 (Derf: Chen et al.
    2025, 2512.10938)."""
    return Squash(width, alpha, erf=True)


# --- of several tokens: what a token becomes in training depends on others -------------------------------------------


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization over batch and time; `past`: by the statistics of earlier micro-batches alone."""

    def __init__(self, width: int, eps: float, momentum: float, past: bool):
        super().__init__(width, eps=eps, momentum=momentum)
        self.past = past

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, past={self.past}"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if not (self.past and self.training):
            return super().forward(rows).view_as(x)
        assert self.running_mean is not None and self.running_var is not None
        before = self.running_mean.clone(), self.running_var.clone()  # autograd keeps these; the buffers move on
        with torch.no_grad():
            super().forward(rows)
        return F.batch_norm(rows, *before, self.weight, self.bias, False, 0.0, self.eps).view_as(x)


@traits(keeps_statistics=True)
def batch_norm(width: int, /, eps: Positive = 1e-5, momentum: Probability = 0.1, causal: bool = False) -> BatchNorm:
    """(x - mean) / sqrt(var + eps) * g + b, mean and var of each feature over batch and time (Ioffe and Szegedy 2015,
    1502.03167).

    In training they are those of the micro-batch: a token then sees later tokens and other sequences, a LEAK that
    evaluation, which takes running averages (weight of the newest: `momentum`), does not have; a low training loss may
    be due to it. causal: the running averages before this micro-batch in training too; nothing leaks, and gradients
    do not flow through the statistics. The averages begin at 0 and 1.
    """
    return BatchNorm(width, eps, momentum, causal)


class PowerNorm(nn.Module):
    """See `power_norm`. phi: running quadratic mean; drift: the backward pass's running mean; seen: micro-batches."""

    phi: Tensor
    drift: Tensor
    seen: Tensor

    def __init__(self, width: int, eps: float, forward: float, backward: float, warmup: int):
        super().__init__()
        self.eps, self.rates, self.warmup = eps, (forward, backward), warmup
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("phi", torch.ones(width))
        self.register_buffer("drift", torch.zeros(width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def reset_parameters(self) -> None:
        """Set gains and running statistics to their initial values."""
        for one in (self.weight, self.phi):
            nn.init.ones_(one)
        for zero in (self.bias, self.drift, self.seen):
            nn.init.zeros_(zero)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, rates={self.rates}, warmup={self.warmup}"

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        if not self.training:
            return x * torch.rsqrt(self.phi + self.eps) * self.weight + self.bias
        rate = self.rates[0]
        with torch.no_grad():
            self.seen += 1
            square = x.square().flatten(0, -2).mean(0)
            used = square if self.seen <= self.warmup else self.phi.clone()
            if self.seen < self.warmup:
                self.phi += (square - self.phi) / self.seen
            self.phi.lerp_(square, 1 - rate)
        return _Power.apply(x, used, square, self.drift, self.eps, self.rates[1]) * self.weight + self.bias


class _Power(torch.autograd.Function):
    """x / sqrt(used + eps), with PowerNorm's approximate backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, used: Tensor, square: Tensor, drift: Tensor, eps: float, rate: float) -> Tensor:
        z = x * torch.rsqrt(used + eps)
        ctx.save_for_backward(z, square)
        ctx.drift, ctx.eps, ctx.rate = drift, eps, rate  # drift changes in the backward pass, so it is not saved
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, square = ctx.saved_tensors
        g = gradients[0] - (1 - ctx.rate) * ctx.drift * z
        ctx.drift += (g * z).flatten(0, -2).mean(0)
        return g * torch.rsqrt(square + ctx.eps), None, None, None, None, None


@traits(keeps_statistics=True, remembers_gradients=True)
def power_norm(
    width: int,
    /,
    eps: Positive = 1e-5,
    forward_rate: Probability = 0.9,
    backward_rate: Probability = 0.9,
    warmup: NonNegativeInt = 0,
) -> PowerNorm:
    """x / rms(x) / sqrt(phi + eps) * g + b, phi the running mean of each feature's square over batch and time, 1 at
    first: phi <- forward_rate phi + (1 - forward_rate) mean(x^2) (Shen et al. 2020, 2003.07845, and their code).

    The backward pass is approximate: with d the gradient at z = x / sqrt(phi + eps) and nu a running mean that begins
    at 0, d' = d - (1 - backward_rate) nu z, the gradient at x is d' / sqrt(mean(x^2) + eps) and nu <- nu + mean(d' z).

    warmup: for so many micro-batches of training the micro-batch's own mean(x^2) takes the place of phi: a token then
    sees later tokens and other sequences, a LEAK. After it, and with 0, nothing leaks. (Theirs: 10,000.)
    """
    return PowerNorm(width, eps, forward_rate, backward_rate, warmup)


def _verify_running(cfg: Config) -> None:
    name = cfg.option("norm_type")
    trainer = cfg.trainer
    if trainer.devices != 1 or trainer.num_nodes != 1:
        raise ConfigError(
            f"norm_type={name} is not allowed with trainer.devices={trainer.devices}: its statistics would "
            "differ between devices."
        )
    if trainer.gradient_checkpointing:
        raise ConfigError(
            f"norm_type={name} is not allowed with trainer.gradient_checkpointing=true: a recomputed block would "
            "count its tokens twice."
        )


batch_norm.verify = power_norm.verify = _verify_running  # type: ignore[attr-defined]
