"""Optimizers: parameter groups in, a torch optimizer out. g gradient, w weight, lr learning rate, wd decay.

m, v are Adam's moments, m_hat and v_hat their unbiased forms, u an update's direction. Every optimizer takes `decay`,
the kinds of parameters that decay (groups.py); gates never do. The arithmetic is torch's, then pytorch_optimizer's
(extra `optim`); what neither has as published is in adaptive.py, which says why.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch

from albert_ablate.config import Config, ConfigError, Count, NonNegative, Positive, Probability, Range, trait, traits
from albert_ablate.optim import adaptive
from albert_ablate.optim.groups import DECAYED, Kinds, assert_covers, decay_groups, torch_param_groups, verify_decay

__all__ = ["assert_covers", "decay_groups"]
Betas = tuple[Probability, Probability]


@traits(works_on_shards=True, adam_sized_steps=False)
def sgd(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    momentum: Probability = 0.9,
    weight_decay: NonNegative = 0.0,
    decay: Kinds = DECAYED,
) -> torch.optim.SGD:
    """b <- momentum b + g + wd w; w <- w - lr b."""
    return torch.optim.SGD(torch_param_groups(groups, decay, lr, weight_decay), lr=lr, momentum=momentum, fused=fused)


@traits(works_on_shards=True)
def adam(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
    decay: Kinds = DECAYED,
) -> torch.optim.Adam:
    """Adam with coupled L2: g <- g + wd w before the moments (Kingma and Ba 2014, 1412.6980)."""
    return torch.optim.Adam(torch_param_groups(groups, decay, lr, weight_decay, eps), betas=_pair(betas), fused=fused)


@traits(works_on_shards=True)
def adamw(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.1,
    decay: Kinds = DECAYED,
) -> torch.optim.AdamW:
    """w <- w (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps) (Loshchilov and Hutter 2017, 1711.05101)."""
    return torch.optim.AdamW(torch_param_groups(groups, decay, lr, weight_decay, eps), betas=_pair(betas), fused=fused)


def independent_adamw(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 1e-4,
    decay: Kinds = DECAYED,
) -> torch.optim.AdamW:
    """w <- w - s (lr u + wd w), u AdamW's and s the schedule: the decay does not know the peak rate.

    Wortsman et al. 2023, 2309.14322. It is torch's AdamW at a decay of wd / lr, lr that of the parameter's group, so
    that every parameter that decays does so by wd a step, whatever multiplier a placement has on its learning rate.
    """
    prepared = torch_param_groups(groups, decay, lr, weight_decay, eps)
    for group in prepared:  # a placement's multipliers, which balance each other in lr wd, are of no concern here
        group["weight_decay"] = weight_decay / group["lr"] if group["weight_decay"] else 0.0
    return torch.optim.AdamW(prepared, betas=_pair(betas), fused=fused)


def nadam(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.95),
    eps: Positive = 1e-8,
    momentum_decay: NonNegative = 4e-3,
    weight_decay: NonNegative = 0.1,
    decay: Kinds = DECAYED,
) -> torch.optim.NAdam:
    """w <- w (1 - lr wd) - lr (k' m / (1 - prod k prod k') + (1 - k) g / (1 - prod k)) / (sqrt(v_hat) + eps).

    k = b1 (1 - 0.96^(t momentum_decay) / 2) at step t, k' the same at t + 1 (Dozat 2016, "Incorporating Nesterov
    momentum into Adam"; the decay is decoupled).
    """
    return torch.optim.NAdam(
        torch_param_groups(groups, decay, lr, weight_decay, eps),
        betas=_pair(betas),
        momentum_decay=momentum_decay,
        decoupled_weight_decay=True,
    )


def lion(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.99),
    weight_decay: NonNegative = 1.0,
    decay: Kinds = DECAYED,
) -> Any:
    """w <- w (1 - lr wd) - lr sign(b1 m + (1 - b1) g); then m <- b2 m + (1 - b2) g (Chen et al. 2023, 2302.06675)."""
    return _resting(_library("lion").Lion)(
        torch_param_groups(groups, decay, lr, weight_decay), lr=lr, betas=_pair(betas)
    )


@traits(adam_sized_steps=False)
def adafactor(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    beta2_decay: Annotated[float, Range(-10, 0, open_high=True)] = -0.8,
    eps: Positive = 1e-3,
    d: Annotated[float, Range(1)] = 1.0,
    weight_decay: NonNegative = 0.0,
    decay: Kinds = DECAYED,
) -> torch.optim.Adafactor:
    """u = g / sqrt(v); w <- w (1 - lr wd) - r max(eps, RMS(w)) u / max(1, RMS(u) / d), r = min(lr, 1 / sqrt(t)).

    v is a mean of g^2 that forgets by 1 - t^beta2_decay, of a matrix kept as the product of its row and column sums;
    no momentum (Shazeer and Stern 2018, 1804.04235; torch's). A placement's multiplier on eps does not apply: this eps
    is the smallest size of a weight that counts.
    """
    prepared = torch_param_groups(groups, decay, lr, weight_decay)
    return torch.optim.Adafactor(prepared, lr=lr, beta2_decay=beta2_decay, eps=(None, eps), d=d)


@traits(adam_sized_steps=False)
def lamb(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.999),
    eps: Positive = 1e-6,
    weight_decay: NonNegative = 0.1,
    decay: Kinds = DECAYED,
) -> adaptive.Lamb:
    """w <- w - lr u ||w|| / ||u|| by tensor, u = m_hat / (sqrt(v_hat) + eps) + wd w (You et al. 2019, 1904.00962)."""
    return adaptive.Lamb(torch_param_groups(groups, decay, lr, weight_decay, eps), betas=_pair(betas))


def soap(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.95, 0.95),
    eps: Positive = 1e-8,
    frequency: Count = 10,
    max_dim: Count = 10_000,
    weight_decay: NonNegative = 0.01,
    decay: Kinds = DECAYED,
) -> Any:
    """Adam in the eigenbases of L <- b2 L + (1 - b2) G G^T and R <- b2 R + (1 - b2) G^T G, G a matrix's gradient.

    w <- w - lr QL (m' / (sqrt(v) + eps)) QR^T, unbiased, m' = QL^T m QR, v the mean of (QL^T G QR)^2; then
    w <- w (1 - lr wd). The bases are refreshed every `frequency` steps by one power iteration and QR; the first
    gradient only makes them. Sides longer than max_dim, and vectors, are not rotated (Vyas et al. 2024, 2409.11321).
    Steps are counted by group, so a layer skipped at first is corrected for steps it did not take.
    """
    return _resting(_library("soap").SOAP)(
        torch_param_groups(groups, decay, lr, weight_decay, eps),
        betas=_pair(betas),
        precondition_frequency=frequency,
        max_precondition_dim=max_dim,
    )


@traits(adam_sized_steps=False)
def muon(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    momentum: Probability = 0.95,
    nesterov: bool = True,
    iterations: Annotated[int, Range(1, 99)] = 5,
    scale: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
    split: bool = True,
    adamw_lr: Positive = 1.0,
    betas: Betas = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.1,
    decay: Kinds = DECAYED,
) -> adaptive.MuonAdamW:
    """w <- w (1 - lr wd) - lr s NS(momentum B + (1 - momentum) g), B the mean of g: the blocks' matrices, by torch's.

    NS: `iterations` of Newton and Schulz towards the nearest orthogonal matrix, in bfloat16. s for an A x C matrix:
    original sqrt(max(1, A / C)) (Jordan et al. 2024, kellerjordan.github.io/posts/muon), match_rms_adamw
    0.2 sqrt(max(A, C)), with which AdamW's rate and decay fit (Liu et al. 2025, 2502.16982). split: queries, keys and
    values are three matrices, not one. All other parameters take AdamW's step at a rate of adamw_lr * lr, with betas
    and eps.
    """
    groups = [g if isinstance(g, dict) else {"params": [g], "parts": int(g.ndim == 2)} for g in groups]
    matrices: list[dict] = []
    kinds = {str(g["parts"]): g["parts"] for g in groups if g["parts"]}
    for _, parts in sorted(kinds.items()):
        alike = [g for g in groups if g["parts"] == parts]
        for group in torch_param_groups(alike, DECAYED if "matrices" in decay else (), lr, weight_decay):
            matrices.append({**group, "parts": parts if split else 1})
    others = torch_param_groups([g for g in groups if not g["parts"]], decay, adamw_lr * lr, weight_decay, eps)
    muon_settings: dict[str, Any] = {
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_steps": iterations,
        "adjust_lr_fn": scale,
    }
    return adaptive.MuonAdamW(
        torch.optim.Muon(matrices, **muon_settings) if matrices else None,
        torch.optim.AdamW(others, betas=_pair(betas), fused=fused) if others else None,
    )


@traits(averages_weights=True)
def schedule_free(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: tuple[Annotated[float, Range(0, 1, open_low=True, open_high=True)], Probability] = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.1,
    decay: Kinds = DECAYED,
) -> adaptive.ScheduleFreeAdamW:
    """AdamW whose averaged weights are evaluated, in place of a decay of the rate (Defazio et al. 2024, 2405.15682)."""
    return adaptive.ScheduleFreeAdamW(torch_param_groups(groups, decay, lr, weight_decay, eps), betas=_pair(betas))


def cautious(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.95),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.1,
    decay: Kinds = DECAYED,
    mean: Literal["gradient", "all"] = "gradient",
) -> adaptive.CautiousAdamW:
    """AdamW without the coordinates of u whose sign is not g's (Liang et al. 2024, 2411.16085).

    mean: over which entries the share that is kept is taken, those with a gradient, or all as in the authors' code.
    """
    return adaptive.CautiousAdamW(
        torch_param_groups(groups, decay, lr, weight_decay, eps), betas=_pair(betas), mean=mean
    )


def stable_adamw(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.99),
    eps: Positive = 1e-6,
    weight_decay: NonNegative = 0.01,
    decay: Kinds = DECAYED,
) -> adaptive.StableAdamW:
    """AdamW at a rate of lr / max(1, RMS(g / sqrt(v_hat))) by tensor (Wortsman et al. 2023, 2304.13013)."""
    return adaptive.StableAdamW(torch_param_groups(groups, decay, lr, weight_decay, eps), betas=_pair(betas))


def spam(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.9, 0.999),
    eps: Positive = 1e-6,
    threshold: Positive = 5000.0,
    interval: Count = 500,
    warmup: Count = 150,
    grace: Count = 20,
    weight_decay: NonNegative = 0.0,
    decay: Kinds = DECAYED,
) -> adaptive.Spam:
    """Adam with spikes g^2 > threshold v cut, moments reset every `interval` steps and the rate warmed up again
    (Huang et al. 2025, 2501.06842)."""
    return adaptive.Spam(
        torch_param_groups(groups, decay, lr, weight_decay, eps),
        betas=_pair(betas),
        threshold=threshold,
        interval=interval,
        warmup=warmup,
        grace=grace,
    )


@traits(samples_predictions=True)
def sophia(
    groups: Iterable,
    fused: bool,
    /,
    lr: Positive,
    betas: Betas = (0.965, 0.99),
    rho: Positive = 0.05,
    interval: Count = 10,
    weight_decay: NonNegative = 0.2,
    decay: Kinds = DECAYED,
) -> adaptive.SophiaG:
    """w <- w (1 - lr wd) - lr clip(m / (rho h), -1, 1), m the mean of g, h of n s^2, s the gradient against n labels
    drawn from the model's predictions, every `interval` steps (Sophia-G: Liu et al. 2023, 2305.14342).

    Such a step takes a second backward pass. A placement's multiplier on eps does not apply: there is none.
    """
    return adaptive.SophiaG(
        torch_param_groups(groups, decay, lr, weight_decay), betas=_pair(betas), rho=rho, interval=interval
    )


def extra_backward(node: Mapping) -> float:
    """Backward passes a step takes beside its own, as a mean, by the optimizer of this node."""
    return 1 / node["interval"] if trait(node, "samples_predictions") else 0.0


def _pair(betas: Iterable[float]) -> tuple[float, float]:
    first, second = betas
    return first, second


def _library(module: str) -> Any:
    """A module of pytorch_optimizer, imported where it is used only."""
    import importlib

    try:
        return importlib.import_module(f"pytorch_optimizer.optimizer.{module}")
    except ImportError:
        raise ConfigError(
            f"optimizer={module} needs pytorch_optimizer, which is not installed: pip install 'albert_ablate[optim]'."
        ) from None


def _resting(kind: type) -> type:
    """`kind`, but that a step without any gradient moves nothing: the library's counters would go on."""

    class Resting(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable | None = None, **more: Any) -> Any:
            loss = adaptive.called(closure)
            if any(p.grad is not None for group in self.param_groups for p in group["params"]):
                super().step(**more)
            return loss

    Resting.__name__ = Resting.__qualname__ = kind.__name__
    return Resting


def _verify_spam(cfg: Config) -> None:
    verify_decay(cfg)
    node = cfg.optimizer
    for name, why in (("grace", "no gradient would ever be cut"), ("warmup", "it would never end")):
        if node[name] >= node.interval:
            raise ConfigError(f"optimizer.{name}={node[name]} is not below optimizer.interval={node.interval}: {why}.")


def _verify_schedule_free(cfg: Config) -> None:
    verify_decay(cfg)
    shape = cfg.schedule._target_.rpartition(".")[2]
    if shape != "constant":
        raise ConfigError(
            f"schedule={shape} contradicts optimizer=schedule_free, whose averaging takes the place of a decay: "
            "take schedule=constant."
        )


def _verify_sophia(cfg: Config) -> None:
    verify_decay(cfg)
    trainer = cfg.trainer
    contradictions = {
        "loss=r_drop, whose two passes are no independent predictions": trait(cfg.loss, "passes", 1) > 1,
        "norm_type=power_norm, whose backward pass would count twice": trait(cfg.norm_type, "remembers_gradients"),
        "trainer.precision=16-mixed: its second backward pass has no loss scale": trainer.precision == "16-mixed",
        "trainer.compile=true, which allows one backward pass": trainer.compile,
    }
    for what, there in contradictions.items():
        if there:
            raise ConfigError(f"optimizer=sophia is not allowed with {what}.")


_FACTORIES: list[Any] = [sgd, adam, adamw, independent_adamw, nadam, lion, adafactor, lamb, soap, muon]
for _factory in [*_FACTORIES, cautious, stable_adamw]:
    _factory.verify = verify_decay
spam.verify = _verify_spam  # type: ignore[attr-defined]
sophia.verify = _verify_sophia  # type: ignore[attr-defined]
schedule_free.verify = _verify_schedule_free  # type: ignore[attr-defined]
