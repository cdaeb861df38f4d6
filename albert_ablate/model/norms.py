"""Norm types: a factory takes the width and gives a module. D width, B batch, T tokens; all act on (B, T, D)."""

from torch import nn

from albert_ablate.config import Positive


def layer_norm(width: int, /, eps: Positive = 1e-5, bias: bool = True) -> nn.LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + eps) * g + b over the last axis, g = 1, b = 0 (Ba et al. 2016, 1607.06450)."""
    return nn.LayerNorm(width, eps=eps, bias=bias)


def rms_norm(width: int, /, eps: Positive = 1e-6) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + eps) * g over the last axis, g = 1 (Zhang and Sennrich 2019, 1910.07467)."""
    return nn.RMSNorm(width, eps=eps)
