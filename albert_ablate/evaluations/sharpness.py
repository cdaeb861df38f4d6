"""Sharpness: largest Hessian eigenvalue of the training loss, and its rise under random weight perturbations."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from albert_ablate.config import Count, Positive
from albert_ablate.evaluations.subject import Evaluation, Result, Subject
from albert_ablate.streams import stream_seed


@dataclass(frozen=True)
class Sharpness(Evaluation):
    """eigenvalue = the largest of the Hessian H of the mean cross-entropy on training text over all parameters, by
    power iteration v <- H v / |H v| from a random start; its estimate v'Hv approaches from below.
    rise = mean over draws of loss(theta + radius * d) - loss(theta), d filter-normalized: Gaussian, each row of a
    matrix scaled to the length of the row of weights, nothing for vectors (Li et al. 2018, 1712.09913).

    Without dropout, and without the terms a training objective may add. H v is exact, by a second backward pass. Where
    the eigenvalue largest in size is negative, H is shifted by it and the iteration done again. It ends when the
    estimate changes by less than a share `tolerance`, or after `iterations`; the rows say how near it came, as
    residual = |Hv - eigenvalue v| / |eigenvalue|. tokens: size of the fixed sample of training text.
    """

    iterations: Count = 30
    tolerance: Positive = 0.01
    radius: Positive = 0.2
    draws: Count = 5
    tokens: Count = 1_024

    def __call__(self, subject: Subject) -> Result:
        model, rows = subject.model, subject.sample("train", self.tokens)
        parameters = list(model.named_parameters())
        start = torch.cat([normal(subject.seed, "start", name, p).flatten() for name, p in parameters])
        clean = subject.loss(rows)
        eigenvalue = (math.nan, 0, math.nan)
        if math.isfinite(clean):
            eigenvalue = largest_eigenvalue(
                lambda v: self._product(subject, rows, [p for _, p in parameters], v),
                start,
                self.iterations,
                self.tolerance,
            )
        table: list[dict[str, Any]] = [
            {"kind": "eigenvalue", "value": eigenvalue[0], "iterations": eigenvalue[1], "residual": eigenvalue[2]}
        ]
        for draw in range(self.draws):
            with perturbed(model, self.radius, subject.seed, draw):
                table.append({"kind": "perturbation", "draw": draw, "value": subject.loss(rows) - clean})
        rise = float(np.mean([row["value"] for row in table[1:]]))
        return Result(table, {"eigenvalue": eigenvalue[0], "rise": rise, "train_loss": clean})

    def _product(self, subject: Subject, rows: Tensor, parameters: list[nn.Parameter], v: Tensor) -> Tensor:
        """H v, a mean over batches."""
        total, count = torch.zeros_like(v), 0
        for x, y in subject.batches(rows[:, :-1], rows[:, 1:]):
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                loss = F.cross_entropy(subject.model(x).float().flatten(0, 1), y.flatten(), reduction="sum")
                total += hessian_product(loss, parameters, v)
            count += y.numel()
        return total / count


def hessian_product(loss: Tensor, parameters: list[nn.Parameter], v: Tensor) -> Tensor:
    """H v, flat, for a flat v: the gradient of (gradient of the loss) . v (Pearlmutter 1994)."""
    first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    along = torch.cat([g.flatten() for g in first]) @ v
    second = torch.autograd.grad(along, parameters, materialize_grads=True)
    return torch.cat([h.flatten() for h in second])


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float
) -> tuple[float, int, float]:
    """(largest eigenvalue of a symmetric matrix, iterations, residual), nan where something is not finite."""
    value, taken, residual = _power(product, start, iterations, tolerance, 0.0)
    if value < 0:  # the largest in size is negative: shifted by it, none is
        value, more, residual = _power(product, start, iterations, tolerance, -value)
        taken += more
    return value, taken, residual


def _power(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float, shift: float
) -> tuple[float, int, float]:
    """The same of the eigenvalue at which H + shift is largest in size."""
    v, value, residual = start / start.norm(), math.nan, math.nan
    for taken in range(1, iterations + 1):
        image = product(v)
        before, value = value, torch.dot(v, image).item()
        if not math.isfinite(value):
            return math.nan, taken, math.nan
        residual = (image - value * v).norm().item() / (abs(value) or 1.0)
        if abs(value - before) <= tolerance * abs(value):
            break
        image = image + shift * v
        v = image / image.norm().clamp(min=torch.finfo(image.dtype).tiny)
    return value, taken, residual


def normal(seed: int, draw: object, name: str, like: Tensor) -> Tensor:
    """Standard normal draws of stream `sharpness/<draw>/<parameter>`, made on the CPU, so that devices agree."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "sharpness", draw, name))
    return torch.randn(like.shape, generator=generator).to(like.device)


@contextmanager
def perturbed(model: nn.Module, radius: float, seed: int, draw: int) -> Iterator[None]:
    """Within it every matrix W is W + radius * D, |row of D| = |row of W|."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    originals = [p.detach().clone() for _, p in matrices]
    try:
        with torch.no_grad():
            for name, p in matrices:
                d = normal(seed, draw, name, p)
                p.add_(radius * d * (p.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True)))
        yield
    finally:
        with torch.no_grad():
            for (_, p), before in zip(matrices, originals, strict=True):
                p.copy_(before)
