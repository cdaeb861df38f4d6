"""Gradient clipping: rules that change the gradients in place before the optimizer's step. g gradient, w weight.

A rule is called with named parameters, the gradients' global norm before clipping and the step's training loss, and
gives the share clipped: of steps (0 or 1) for a global rule, of units or elements for a finer one. A rule that wants no
step to be taken sets every gradient to None, at which no optimizer of ours moves anything. What a rule remembers goes
into the checkpoint by `state_dict`. Norms that are not finite are never remembered.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from albert_ablate.config import Count, Fraction, Positive, Probability, Range

Named = Sequence[tuple[str, nn.Parameter]]


class Clip:
    """What every rule can do. `remembered`: the attributes that a resumed run needs. `uses_loss`: it reads the loss.

    common: the one factor that the latest call put on all gradients; None where each has its own. Then `found` says of
    each parameter how many of its units were clipped, and how many it has, if the call was `watched`.
    """

    remembered: tuple[str, ...] = ()
    uses_loss = False
    works_on_shards = False  # traits, see config.traits
    skips_steps = False
    common: Tensor | None = None
    watched = False
    found: dict[str, tuple[Tensor, int]] = {}

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs, by attribute."""
        return {name: getattr(self, name) for name in self.remembered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in self.remembered:
            setattr(self, name, state[name])


class NoClip(Clip):
    """g <- g."""

    works_on_shards = True

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        self.common = torch.ones_like(norm)
        return torch.zeros(())


class ClipNorm(Clip):
    """g <- g min(1, max_norm / (||g|| + 1e-6)), one norm over all parameters (Pascanu et al. 2012, 1211.5063)."""

    works_on_shards = True

    def __init__(self, max_norm: Positive = 1.0):
        self.max_norm = max_norm

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        self.common = clip_to(self.max_norm, named, norm)
        return norm > self.max_norm


class ClipValue(Clip):
    """g <- clamp(g, -max_value, max_value), element by element."""

    def __init__(self, max_value: Positive = 0.1):
        self.max_value = max_value

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        names, grads = _with_gradient(named)
        if self.watched:
            counts = [(g.abs() > self.max_value).sum() for g in grads]
            self.found = {n: (c, g.numel()) for n, c, g in zip(names, counts, grads, strict=True)}
        # most tensors hold no such element, and finding those that do is one operation
        beyond = torch.stack(torch._foreach_norm(grads, math.inf)) > self.max_value
        over = [g for g, some in zip(grads, beyond.tolist(), strict=True) if some]
        if not over:
            return norm.new_zeros(())
        clipped = torch.stack([(g.abs() > self.max_value).sum() for g in over]).sum()
        torch._foreach_clamp_min_(over, -self.max_value)
        torch._foreach_clamp_max_(over, self.max_value)
        return clipped / sum(g.numel() for g in grads)


class AdaptiveClip(Clip):
    """g_i <- g_i min(1, factor max(||w_i||, eps) / ||g_i||) per unit i (Brock et al. 2021, 2102.06171).

    A unit is an output row of a matrix, its norms taken over the other axes; a vector or scalar is one unit. The head
    is left alone, as in the paper's experiments. Tensors of one shape are stacked, so that a deep model costs a few
    large operations instead of hundreds of small ones.
    """

    def __init__(self, factor: Positive = 0.01, eps: Positive = 1e-3):
        self.factor, self.eps = factor, eps

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        shapes: dict[torch.Size, list[tuple[str, Tensor, Tensor]]] = defaultdict(list)
        for name, p in named:
            if p.grad is not None and not name.startswith("head."):
                shapes[p.shape].append((name, p, p.grad))
        clipped, units = [], 0
        counts_by_name: dict[str, tuple[Tensor, int]] = {}
        for alike in shapes.values():
            names, weights, grads = map(list, zip(*alike, strict=True))
            scale = self.factor * unit_norms(weights).clamp_(min=self.eps) / unit_norms(grads).clamp_(min=1e-6)
            clipped.append((scale < 1).sum())
            units += scale.numel()
            if self.watched:
                counts = (scale < 1).reshape(len(names), -1).sum(1)
                counts_by_name |= {n: (c, scale[0].numel()) for n, c in zip(names, counts, strict=True)}
            torch._foreach_mul_(grads, scale.clamp_(max=1).unbind())
        self.found = counts_by_name
        return torch.stack(clipped).sum() / units


class ClipPerLayer(Clip):
    """g_i <- g_i min(1, max_norm / (||g_i|| + 1e-6)), each tensor or each block by itself.

    unit: tensor, or block, where all parameters of a block are one unit, as are those of each part of the trunk.
    """

    def __init__(self, max_norm: Positive = 1.0, unit: Literal["tensor", "block"] = "tensor"):
        self.max_norm, self.unit = max_norm, unit

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        names, grads = _with_gradient(named)
        norms = torch.stack(torch._foreach_norm(grads))
        if self.unit == "tensor":
            self.found = {n: (c, 1) for n, c in zip(names, norms > self.max_norm, strict=True)} if self.watched else {}
            torch._foreach_mul_(grads, (self.max_norm / (norms + 1e-6)).clamp_(max=1).unbind())
            return (norms > self.max_norm).float().mean()
        units: dict[str, int] = {}
        parts = [".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1]) for name in names]
        index = torch.tensor([units.setdefault(part, len(units)) for part in parts], device=norms.device)
        together = norms.new_zeros(len(units)).index_add_(0, index, norms.square()).sqrt_()
        over = (together > self.max_norm)[index]
        self.found = {n: (c, 1) for n, c in zip(names, over, strict=True)} if self.watched else {}
        torch._foreach_mul_(grads, (self.max_norm / (together + 1e-6)).clamp_(max=1)[index].unbind())
        return (together > self.max_norm).float().mean()


class AutoClip(Clip):
    """g <- g min(1, c / (||g|| + 1e-6)), c the `quantile` of the norms so far, this one too.

    history: how many of the latest norms count; the paper's code keeps all (Seetharaman et al. 2020, 2007.14469).
    """

    remembered = ("norms",)

    def __init__(self, quantile: Fraction = 0.1, history: Count = 1000):
        self.quantile, self.history = quantile, history
        self.norms: list[float] = []

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        size, self.common = norm.item(), torch.ones_like(norm)
        if not math.isfinite(size):
            return torch.zeros(())
        self.norms = [*self.norms[1 - self.history :], size] if self.history > 1 else [size]
        threshold = torch.tensor(self.norms, dtype=torch.float64).quantile(self.quantile).item()
        self.common = clip_to(threshold, named, norm)
        return norm > threshold


class ZClip(Clip):
    """g <- g c / (||g|| + 1e-6) where ||g|| > c, c = max_norm, or mu + threshold^2 sigma / z if less and z > threshold.

    z = (||g|| - mu) / (sigma + 1e-6), mu and sigma^2 means of the norms, after clipping by z, that forget by alpha; in
    the first `warmup` steps max_norm alone clips, and they start from that time's mean and variance (Kumar et al. 2025,
    2504.02507, with max_norm as in the authors' package zclip 1.0.0).
    """

    remembered = ("norms", "mean", "variance")

    def __init__(
        self,
        alpha: Probability = 0.97,
        threshold: Positive = 2.5,
        max_norm: Positive = 1.0,
        warmup: Annotated[int, Range(2)] = 25,
    ):
        self.alpha, self.threshold, self.max_norm, self.warmup = alpha, threshold, max_norm, warmup
        self.norms: list[float] = []  # of the warmup
        self.mean = self.variance = 0.0

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        size, self.common = norm.item(), torch.ones_like(norm)
        if not math.isfinite(size):
            return torch.zeros(())
        limit = min(self._limit(size), self.max_norm)
        if size > limit:
            self.common = clip_to(limit, named, norm)
        return norm > limit

    def _limit(self, size: float) -> float:
        """What z allows a gradient of this size, and the moments after it."""
        if len(self.norms) < self.warmup:
            self.norms = [*self.norms, size]
            self.mean = sum(self.norms) / len(self.norms)
            self.variance = sum((x - self.mean) ** 2 for x in self.norms) / len(self.norms)
            return size
        deviation = math.sqrt(self.variance)
        z = (size - self.mean) / (deviation + 1e-6)
        if z > self.threshold:
            size = self.mean + self.threshold * deviation / (z / self.threshold)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * size
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (size - self.mean) ** 2
        return size


class AdaGC(Clip):
    """g_i <- h g_i, h = min(1, relative gamma_i / ||g_i||), by tensor; gamma_i <- beta gamma_i + (1 - beta) ||h g_i||.

    Before step `warmup` h = min(1, absolute / ||g||), one norm over all, and gamma_i is the least ||h g_i|| above 0 so
    far (Wang et al. 2025, 2502.11034).
    """

    remembered = ("steps", "gamma")

    def __init__(
        self, relative: Positive = 1.05, absolute: Positive = 1.0, beta: Probability = 0.98, warmup: Count = 100
    ):
        self.relative, self.absolute, self.beta, self.warmup = relative, absolute, beta, warmup
        self.steps = 0
        self.gamma: Tensor | None = None  # by parameter, in the order of their names; not a number until seen

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        self.found = {}
        if not norm.isfinite():
            return torch.zeros(())
        self.steps += 1
        if self.gamma is None:
            self.gamma = norm.new_full((len(named),), torch.nan)
        self.gamma = self.gamma.to(norm.device)
        seen = torch.tensor([i for i, (_, p) in enumerate(named) if p.grad is not None], device=norm.device)
        names, grads = _with_gradient(named)
        norms, gamma = torch.stack(torch._foreach_norm(grads)), self.gamma[seen]
        alone = self.relative * gamma.clamp(min=1e-8) / norms.clamp(min=1e-8)
        young = gamma.isnan() | (self.steps < self.warmup)
        scale = torch.where(young, self.absolute / (norm + 1e-8), alone).clamp_(max=1)
        if self.watched:
            self.found = {n: (c, 1) for n, c in zip(names, scale < 1, strict=True)}
        torch._foreach_mul_(grads, scale.unbind())
        scaled = scale * norms
        # a norm of 0, as ReZero's matrices have until their gate has moved, would cut them to nothing ever after
        least = torch.fmin(gamma, torch.where(scaled > 0, scaled, torch.nan))
        self.gamma[seen] = torch.where(young, least, gamma.lerp(scaled, 1 - self.beta))
        return (scale < 1).float().mean()


class SkipStep(Clip):
    """No step where x - mean > sigma std for x the loss or ||g||, over the `window` steps before, skipped ones too.

    Only unusually high values count: a low loss or a small gradient is no spike. Never before step `after`; OLMo-core,
    whose rule it is (SkipStepOptimizer), has max(20, window / 2) for it.
    """

    remembered = ("norms", "losses")
    uses_loss = True
    skips_steps = True

    def __init__(self, sigma: Positive = 6.0, window: Annotated[int, Range(2)] = 128, after: Count = 64):
        self.sigma, self.window, self.after = sigma, window, after
        self.norms: list[float] = []
        self.losses: list[float] = []

    def __call__(self, named: Named, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        skipped = self._unusual(self.norms, norm.item())
        if loss is not None:
            skipped |= self._unusual(self.losses, loss.item())
        if skipped:
            for _, p in named:
                p.grad = None
        self.common = torch.full_like(norm, float(not skipped))
        return torch.tensor(float(skipped))

    def _unusual(self, history: list[float], x: float) -> bool:
        """Whether x is, by the history before it; then x belongs to it."""
        if not math.isfinite(x):
            return True
        before = torch.tensor(history[-self.window :], dtype=torch.float64)
        history[:] = [*history[-self.window :], x]
        if len(history) < self.after or len(before) < 2:
            return False
        std, mean = torch.std_mean(before)
        return x - mean.item() > self.sigma * std.item()


def clip_to(limit: float, named: Named, norm: Tensor) -> Tensor:
    """g <- c g, c = min(1, limit / (||g|| + 1e-6)); gives c."""
    nn.utils.clip_grads_with_norm_([p for _, p in named], limit, norm)
    return (limit / (norm + 1e-6)).clamp(max=1)


def _with_gradient(named: Named) -> tuple[list[str], list[Tensor]]:
    """Names and gradients of the parameters that have one."""
    pairs = [(name, p.grad) for name, p in named if p.grad is not None]
    return [name for name, _ in pairs], [grad for _, grad in pairs]


def unit_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of the units of n tensors of one shape, a unit being an output row, or a whole vector or scalar.

    (n, out, 1, ...) for matrices, (n, 1) for vectors, (n,) for scalars.
    """
    stacked = torch.stack(list(tensors)).detach()
    if stacked.ndim < 3:
        return stacked.norm(dim=1, keepdim=True) if stacked.ndim == 2 else stacked.abs()
    return torch.linalg.vector_norm(stacked, dim=tuple(range(2, stacked.ndim)), keepdim=True)


def global_norm(gradients: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(norm over all, norm of each), the first from the second."""
    each = tensor_norms(gradients)
    return torch.linalg.vector_norm(torch.stack(each)), each


def tensor_norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The norm of each tensor; of the whole one, where ranks hold shards (then all ranks must ask)."""
    sharded = [t for t in tensors if hasattr(t, "to_local")]
    if not sharded:
        return torch._foreach_norm(tensors)
    squares = torch.stack(torch._foreach_norm([t.to_local() for t in sharded])).square()
    torch.distributed.all_reduce(squares)
    return squares.sqrt().unbind()
