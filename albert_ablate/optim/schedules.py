"""Learning-rate schedules: multipliers s(t) of the peak rate, t in [0, 1] the share of the budget spent.

w warmup, a fraction of the budget in which s rises linearly from 0 to 1. Step k of n is taken at t = (k + 1/2) / n, so
that neither the first nor the last step has a rate of zero.
"""

import math
from typing import Annotated, Literal

from albert_ablate.config import Config, ConfigError, Fraction, Range


def constant(t: float, /, warmup: Fraction = 0.0) -> float:
    """min(t / w, 1)."""
    return t / warmup if t < warmup else 1.0


def warmup_cosine(t: float, /, warmup: Fraction = 0.05, final: Fraction = 0.1) -> float:
    """t / w, then final + (1 - final) (1 + cos(pi (t - w) / (1 - w))) / 2 (Loshchilov and Hutter 2016, 1608.03983)."""
    if t < warmup or warmup == 1:
        return t / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup))) / 2


def warmup_linear(t: float, /, warmup: Fraction = 0.05, final: Fraction = 0.0) -> float:
    """t / w, then 1 - (1 - final) (t - w) / (1 - w); to zero by default (Bergsma et al. 2025, 2502.15938)."""
    if t < warmup or warmup == 1:
        return t / warmup
    return 1 - (1 - final) * (t - warmup) / (1 - warmup)


def inverse_sqrt(t: float, /, warmup: Annotated[float, Range(0, 1, open_low=True)] = 0.05) -> float:
    """t / w, then sqrt(w / t): min(t^-1/2, t w^-3/2) of Vaswani et al. 2017, 1706.03762, times sqrt(w)."""
    return min((warmup / t) ** 0.5, t / warmup) if t else 0.0


def wsd(
    t: float,
    /,
    warmup: Fraction = 0.05,
    decay: Fraction = 0.2,
    shape: Literal["linear", "cosine", "sqrt", "square"] = "sqrt",
) -> float:
    """t / w, then 1, then over the last `decay`, u its progress: 1 - u, (1 + cos(pi u)) / 2, 1 - sqrt(u) or 1 - u^2.

    Warmup, stable, decay (Hu et al. 2024, 2404.06395; shapes: Haegele et al. 2024, 2405.18392).
    """
    if t < warmup:
        return t / warmup
    u = max(0.0, (t - (1 - decay)) / decay) if decay else 0.0
    return {"linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2, "sqrt": 1 - math.sqrt(u), "square": 1 - u * u}[
        shape
    ]


def _verify_wsd(cfg: Config) -> None:
    warmup, decay = cfg.schedule.warmup, cfg.schedule.decay
    if warmup + decay > 1:
        raise ConfigError(f"schedule.warmup={warmup} and schedule.decay={decay} are more than the whole budget.")


wsd.verify = _verify_wsd  # type: ignore[attr-defined]
