"""Training losses of logits (B, T, V) against targets (B, T), nats per token."""

import torch.nn.functional as F
from torch import Tensor

from albert_ablate.config import NonNegative


def cross_entropy(logits: Tensor, targets: Tensor, /, z_loss: NonNegative = 0.0) -> tuple[Tensor, Tensor]:
    """(objective, cross-entropy): mean of -log p(target), the objective with z_loss * mean(log^2 Z) added.

    log Z = logsumexp(logits); z_loss is 1e-4 in PaLM (Chowdhery et al. 2022, 2204.02311).
    """
    plain = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    if z_loss == 0:
        return plain, plain
    return plain + z_loss * logits.logsumexp(-1).square().mean(), plain
