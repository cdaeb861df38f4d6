"""Optimizers: parameter groups in, a torch optimizer out. g gradient, w weight, lr learning rate, wd decay.

The arithmetic is torch's, in its fused form, which for many small tensors is several times faster than a loop.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from albert_ablate.config import NonNegative, Positive, Probability

Betas = tuple[Probability, Probability]


def sgd(
    groups: Iterable, fused: bool, /, lr: Positive, momentum: Probability = 0.9, weight_decay: NonNegative = 0.0
) -> torch.optim.SGD:
    """b <- momentum b + g + wd w; w <- w - lr b."""
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)


def adam(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Adam:
    """Adam with coupled L2: g <- g + wd w before the moments (Kingma and Ba 2014, 1412.6980)."""
    return torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused)


def adamw(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.1,
) -> torch.optim.AdamW:
    """w <- w (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps) (Loshchilov and Hutter 2017, 1711.05101)."""
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused)


def decay_groups(model: nn.Module) -> list[dict]:
    """Matrices and embeddings decay; gains, biases and gates (fewer than two dimensions) do not."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups: list[dict] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def assert_covers(optimizer: Optimizer, model: nn.Module) -> None:
    """Every parameter of the model stands in exactly one group."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters())), "a parameter is in no group, or in two"
