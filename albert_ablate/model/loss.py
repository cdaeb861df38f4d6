"""Training losses of logits (B, T, V) against targets (B, T), nats per token."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from albert_ablate.config import Config, ConfigError, NonNegative, Positive, trait, traits


def cross_entropy(logits: Tensor, targets: Tensor, /, z_loss: NonNegative = 0.0) -> tuple[Tensor, Tensor]:
    """(objective, cross-entropy): mean of -log p(target), the objective with z_loss * mean(log^2 Z) added.

    log Z = logsumexp(logits); z_loss is 1e-4 in PaLM (Chowdhery et al. 2022, 2204.02311).
    """
    plain = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    if z_loss == 0:
        return plain, plain
    return plain + z_loss * logits.logsumexp(-1).square().mean(), plain


@traits(passes=2)
def r_drop(logits: Tensor, targets: Tensor, /, alpha: Positive = 1.0) -> tuple[Tensor, Tensor]:
    """(objective, cross-entropy): (CE(p) + CE(q)) / 2 + alpha (KL(p || q) + KL(q || p)) / 2, means over tokens, p and
    q the model's two predictions under different dropout masks (R-Drop: Liang et al. 2021, 2106.14448).

    logits: (2B, T, V), those of p, then those of q, from one pass over the sequences twice: it costs two passes.
    """
    log_p, log_q = (half.flatten(0, -2).log_softmax(-1) for half in logits.chunk(2))
    plain = (F.nll_loss(log_p, targets.flatten()) + F.nll_loss(log_q, targets.flatten())) / 2
    both = (log_p.exp() - log_q.exp()) * (log_p - log_q)  # summed over V: KL(p || q) + KL(q || p)
    return plain + alpha / 2 * both.sum(-1).mean(), plain


def _verify_r_drop(cfg: Config) -> None:
    if not trait(cfg.model, "takes_parts"):
        return  # what it drops is its own
    sites = set(cfg.dropout.get("sites", ()))
    if not sites or not cfg.dropout.mean:
        raise ConfigError("loss=r_drop would do nothing: it compares two dropout masks, and nothing is dropped.")
    if sites <= {"token", "stochastic_depth", "layer_drop"}:
        raise ConfigError(
            f"loss=r_drop would do nothing: dropout.sites=[{', '.join(sorted(sites))}] drops the same in both passes."
        )


r_drop.verify = _verify_r_drop  # type: ignore[attr-defined]


def passes(loss: Callable) -> int:
    """How often the loss wants each sequence to pass through the model."""
    return getattr(getattr(loss, "func", loss), "passes", 1)


def objective(loss: Callable, model: Callable[[Tensor], Tensor], rows: Tensor) -> Any:
    """(objective, cross-entropy) of rows (B, T + 1): all but the last token in, all but the first as targets."""
    inputs, times = rows[:, :-1], passes(loss)
    return loss(model(inputs.repeat(times, 1) if times > 1 else inputs), rows[:, 1:])
