"""Optimizers on Adam's moments that neither torch nor pytorch_optimizer has as published, and Muon with AdamW.

g gradient, w weight, lr learning rate, wd decay; m, v moments of decay rates b1, b2, m_hat and v_hat their unbiased
forms after the t steps that this parameter took; u the direction. A step without any gradient moves nothing, counters
included: that is how a clipping rule says that no step is to be taken.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer


def called(closure: Callable | None) -> Any:
    """The closure's loss, gradients made on the way; None where there is no closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Adaptive(Optimizer):
    """The loop over groups and Adam's moments, vectorized over a group's tensors.

    A group's `taken` counts steps of the optimizer, a parameter's `step` those in which it had a gradient, so that a
    layer that was skipped is corrected for the steps it took and no others.
    """

    def __init__(self, groups: Iterable, **defaults: Any):
        super().__init__(groups, {**defaults, "taken": 0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:  # type: ignore[override]
        loss = called(closure)
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss
        for group in self.param_groups:
            group["taken"] += 1
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            self.begin(group, params)
            if params:
                self.update(group, params, [p.grad for p in params if p.grad is not None])
        return loss

    def begin(self, group: dict, params: list[Tensor]) -> None:
        """Before the step of a group: make the state of parameters that have none."""
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
            self.state[p]["step"] += 1

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        """Change the weights."""
        raise NotImplementedError

    def of(self, params: list[Tensor], name: str) -> list:
        """One entry of the state of each parameter."""
        return [self.state[p][name] for p in params]

    def direction(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> tuple[list, list]:
        """Advance m and v; (m_hat / (sqrt(v_hat) + eps), v_hat)."""
        b1, b2 = group["betas"]
        m, v, t = self.of(params, "m"), self.of(params, "v"), self.of(params, "step")
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - b2)
        v_hat = torch._foreach_div(v, [1 - b2**k for k in t])
        below = torch._foreach_sqrt(v_hat)
        torch._foreach_add_(below, group["eps"])
        u = torch._foreach_div(m, [1 - b1**k for k in t])
        torch._foreach_div_(u, below)
        return list(u), list(v_hat)


class CautiousAdamW(Adaptive):
    """u <- u 1[u g > 0] / max(mean 1[u g > 0], 1e-3); w <- w (1 - lr wd) - lr u, u AdamW's (Liang et al. 2024,
    2411.16085; the mean is one tensor's).

    mean=gradient takes the mean over the entries that have a gradient; mean=all, over all, is the authors' code. They
    differ in an embedding, most of whose rows have none in a small batch: counted as disagreeing, those multiply the
    step of the others. pytorch_optimizer scales by n / (agreeing + 1) instead, which halves every step of a scalar.
    """

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        u, _ = self.direction(group, params, grads)
        agree = [(a * b > 0).to(a.dtype) for a, b in zip(u, grads, strict=True)]
        torch._foreach_mul_(u, agree)
        if group["mean"] == "all":
            shares = [mask.mean() for mask in agree]
        else:
            shares = [mask.sum() / g.count_nonzero().clamp(min=1) for mask, g in zip(agree, grads, strict=True)]
        torch._foreach_div_(u, [share.clamp(min=1e-3) for share in shares])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, u, alpha=-group["lr"])


class StableAdamW(Adaptive):
    """r <- lr / max(1, sqrt(mean(g^2 / max(v_hat, eps^2)))); w <- w (1 - r wd) - r m_hat / (sqrt(v_hat) + eps).

    The mean is over one tensor (Wortsman et al. 2023, 2304.13013). pytorch_optimizer takes the same steps while every
    parameter has a gradient; it counts them by group, so a layer skipped at first is corrected for steps it never took.
    """

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        u, v_hat = self.direction(group, params, grads)
        squares = torch._foreach_mul(grads, grads)
        torch._foreach_div_(squares, torch._foreach_clamp_min(v_hat, group["eps"] ** 2))
        rates = [group["lr"] / s.mean().sqrt().clamp(min=1) for s in squares]
        torch._foreach_mul_(params, [1 - r * group["weight_decay"] for r in rates])
        torch._foreach_mul_(u, rates)
        torch._foreach_sub_(params, u)


class Lamb(Adaptive):
    """u <- m_hat / (sqrt(v_hat) + eps) + wd w; w <- w - lr u ||w|| / ||u|| by tensor (You et al. 2019, 1904.00962).

    The ratio is 1 where either norm is 0, and for tensors of fewer than two dimensions, as timm has it for those
    without decay. pytorch_optimizer leaves out the bias correction of the paper's algorithm 2 and cuts ||w|| at 10,
    which an embedding exceeds.
    """

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        u, _ = self.direction(group, params, grads)
        if group["weight_decay"]:
            torch._foreach_add_(u, params, alpha=group["weight_decay"])
        norms = zip(torch._foreach_norm(params), torch._foreach_norm(u), params, strict=True)
        ratios = [
            torch.where((a > 0) & (b > 0), a / b, 1.0) if p.ndim >= 2 else torch.ones_like(a) for a, b, p in norms
        ]
        torch._foreach_mul_(u, ratios)
        torch._foreach_add_(params, u, alpha=-group["lr"])


class Spam(Adaptive):
    """g <- sign(g) sqrt(threshold v) where g^2 > threshold v; then Adam, whose moments are set to 0 every `interval`
    steps; then w <- w (1 - lr wd) (Huang et al. 2025, 2501.06842).

    k steps after a reset the rate is multiplied by 1 - 0.99 (1 + cos(pi k / (warmup + 1))) / 2 for k < warmup, as in
    the authors' code. No gradient is cut in the first `grace` steps after a reset, when v knows too little. Steps k
    count from the last reset, a reset takes place at optimizer steps interval, 2 interval, ...; the bias corrections go
    on counting.

    Where v is 0 nothing is cut. The authors cut there to 0, so that a row of an embedding whose token did not occur in
    the first `grace` steps would never move. pytorch_optimizer's warm-up is one step ahead of the authors', and its
    state dict leaves out the position in it.
    """

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        since = group["taken"] % group["interval"]
        m, v = self.of(params, "m"), self.of(params, "v")
        if since == 0:
            torch._foreach_zero_(m)
            torch._foreach_zero_(v)
        if since >= group["grace"]:
            cuts = torch._foreach_sqrt(torch._foreach_mul(v, group["threshold"]))
            limits = [torch.where(cut > 0, cut, math.inf) for cut in cuts]
            grads = [g.clamp(-limit, limit) for g, limit in zip(grads, limits, strict=True)]
        warming = group["taken"] >= group["interval"] and since < group["warmup"]
        death = 0.99 * (1 + math.cos(math.pi * since / (group["warmup"] + 1))) / 2 if warming else 0.0
        self._adam(group, params, grads, m, v, group["lr"] * (1 - death))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

    def _adam(self, group: dict, params: list, grads: list, m: list, v: list, rate: float) -> None:
        """As in the authors' code, eps is added to the square root of the biased v."""
        b1, b2 = group["betas"]
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - b2)
        below = torch._foreach_sqrt(v)
        torch._foreach_add_(below, group["eps"])
        u = torch._foreach_div(m, below)
        t = self.of(params, "step")
        torch._foreach_mul_(u, [-rate * math.sqrt(1 - b2**k) / (1 - b1**k) for k in t])
        torch._foreach_add_(params, u)


class SophiaG(Adaptive):
    """w <- w (1 - lr wd) - lr clip(m / max(rho h, 1e-15), -1, 1), m a mean of g that forgets by b1, h a curvature (Liu
    et al. 2023, 2305.14342, algorithm 3).

    In steps 1, 1 + interval, ... h <- b2 h + (1 - b2) n s^2 comes first: s is the gradient of the mean cross-entropy of
    the batch's n predictions against labels drawn from those predictions, n s^2 an unbiased estimate of the diagonal of
    the Gauss-Newton matrix (algorithm 2, Gauss-Newton-Bartlett). m and h begin at 0 and are not corrected for it: where
    rho h is small the step is lr sign(m). `sample` takes in the predictions of a micro-batch.

    pytorch_optimizer has the other estimator, Hutchinson's, on second derivatives that fused attention does not have,
    with draws from torch's global generator. The authors' code makes its first estimate after `interval` steps and
    clips s to a norm of 1.
    """

    samples_predictions = True

    def __init__(self, groups: Iterable, **defaults: Any):
        super().__init__(groups, **defaults)
        self.sums: dict[Tensor, Tensor] = {}  # n s, of the predictions taken in since the last step
        self.count = 0

    @property
    def due(self) -> bool:
        """Whether the next step wants predictions."""
        group = self.param_groups[0]
        return group["taken"] % group["interval"] == 0

    def sample(self, logits: Tensor, uniform: Tensor) -> None:
        """Takes in logits (B, T, V), whose graph is kept; numbers (B, T), uniform in [0, 1), draw the labels.

        A label is the first whose cumulative probability is above its number, so that equal numbers and like
        predictions give like labels.
        """
        with torch.no_grad():
            edges = logits.float().softmax(-1).cumsum(-1)
            below = uniform.to(edges.device)[..., None] * edges[..., -1:]
            labels = torch.searchsorted(edges, below, right=True).clamp_(max=logits.shape[-1] - 1)
        with torch.enable_grad():
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        params = [p for group in self.param_groups for p in group["params"]]
        gradients = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        for p, g in zip(params, gradients, strict=True):
            if g is not None:
                self.sums[p] = self.sums[p] + g if p in self.sums else g
        self.count += labels.numel()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        self.sums, self.count = {}, 0
        return loss

    def begin(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(m=torch.zeros_like(p), h=torch.zeros_like(p))

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        (b1, b2), m, h = group["betas"], self.of(params, "m"), self.of(params, "h")
        for p in params:
            if p in self.sums:
                total, n = self.sums[p], self.count
                if torch.distributed.is_initialized():
                    torch.distributed.all_reduce(total)
                    n *= torch.distributed.get_world_size()
                self.state[p]["h"].lerp_(total.square() / n, 1 - b2)
        torch._foreach_lerp_(m, grads, 1 - b1)
        below = torch._foreach_mul(h, group["rho"])
        torch._foreach_clamp_min_(below, 1e-15)
        u = torch._foreach_div(m, below)
        torch._foreach_clamp_min_(u, -1)
        torch._foreach_clamp_max_(u, 1)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, u, alpha=-group["lr"])


class ScheduleFreeAdamW(Adaptive):
    """d = g / (sqrt(v_hat) + eps) + wd y; z <- z - lr d; x <- (1 - c) x + c z; y <- (1 - b1) z + b1 x.

    The gradient is taken at y; x, the average, is what is evaluated and saved. c = r^2 / (sum of r^2 so far), r the
    largest rate so far (Defazio et al. 2024, 2405.15682, and the authors' package schedulefree 1.4.1).

    The parameters hold y; `averaged` shows x for a while and puts y back bit for bit. The authors' train() and eval()
    interpolate there and back, which rounds: how often a run is evaluated would then change its weights.
    """

    def begin(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(v=torch.zeros_like(p), z=p.detach().clone())
        group["peak"] = max(group.get("peak", 0.0), group["lr"])
        group["total"] = group.get("total", 0.0) + group["peak"] ** 2

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        v, z = self.of(params, "v"), self.of(params, "z")
        c = group["peak"] ** 2 / group["total"] if group["total"] else 0.0
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - b2)
        below = torch._foreach_div(v, 1 - b2 ** group["taken"])
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, group["eps"])
        d = torch._foreach_div(grads, below)
        if group["weight_decay"]:
            torch._foreach_add_(d, params, alpha=group["weight_decay"])
        torch._foreach_lerp_(params, z, c)  # y, without making x: y - b1 c (x - z) - lr (1 - b1 (1 - c)) d
        torch._foreach_add_(params, d, alpha=lr * (b1 * (1 - c) - 1))
        torch._foreach_add_(z, d, alpha=-lr)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters hold x."""
        originals = []
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        originals.append((p, p.detach().clone()))
                        p.lerp_(self.state[p]["z"], 1 - 1 / group["betas"][0])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, y in originals:
                    p.copy_(y)


class MuonAdamW(Optimizer):
    """torch.optim.Muon for the blocks' matrices, torch.optim.AdamW for all else, as one optimizer.

    State and groups are this optimizer's; at each step they are lent to the two, which own nothing. A state dict, a
    schedule and the one gradient norm therefore cover both. A group whose `parts` is above 1, or a list of numbers of
    rows, stacks so many matrices: each is given to Muon as a view, with its rows of gradient and momentum.
    """

    def __init__(self, muon: torch.optim.Muon | None, adamw: torch.optim.AdamW | None):
        self.lent: Sequence[Optimizer] = [o for o in (muon, adamw) if o is not None]
        super().__init__([group for o in self.lent for group in o.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:  # type: ignore[override]
        loss = called(closure)
        for part in self.lent:
            mine = isinstance(part, torch.optim.Muon)
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if ("ns_steps" in g) == mine]
            if mine:
                self._lend_parts(part)
            part.step()
        return loss

    def _lend_parts(self, muon: Optimizer) -> None:
        views, state = [], {}
        for group in muon.param_groups:
            params = []
            for p in group["params"]:
                if p.grad is None or group["parts"] == 1:
                    params.append(p)
                    if p.grad is not None:
                        state[p] = self.state[p]
                    continue
                state_of_p = self.state[p]
                if not state_of_p:
                    state_of_p["momentum_buffer"] = torch.zeros_like(p)
                rows = [len(p) // parts] * parts if isinstance(parts := group["parts"], int) else parts
                pieces = (x.split(rows) for x in (p.detach(), p.grad, state_of_p["momentum_buffer"]))
                for piece, gradient, momentum in zip(*pieces, strict=True):
                    piece.grad = gradient
                    state[piece] = {"momentum_buffer": momentum}
                    params.append(piece)
            views.append({**group, "params": params})
        muon.param_groups, muon.state = views, state  # type: ignore[assignment]
