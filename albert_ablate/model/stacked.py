"""Several decoders of equal shapes as one: a forward pass for all of them, with the numbers of each alone, bit for bit.

K models, B sequences of T tokens each. Activations of all models lie in one tensor, model after model, (K B, T, D), so
that whatever holds no parameter and draws nothing (attention, activations, sums) is computed once. What does is
computed with each model's own parameters and masks. On a CPU with one thread nothing rounds differently: products and
reductions are taken by model, and elementwise operations do not depend on how many elements there are, as long as those
of one model fill whole vectors (VECTOR).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_ablate.model.attention import CausalAttention, CosineGain
from albert_ablate.model.decoder import Block, Decoder, Positions
from albert_ablate.model.dropout import Dropout, DropToken, Skip, draw_dtype
from albert_ablate.model.norms import BatchNorm, CRMSNorm, Squash, Unit, ZeroCentredRMSNorm
from albert_ablate.model.placements import AdminProfiled, Fixup, LayerScale, Placement, ReZero, SkipInit
from albert_ablate.model.sigma import SigmaLinear

VECTOR = 64  # elements: a multiple of what the widest loop of a CPU takes at once
# parameters of placements that are added to or multiplied with a tensor (B, T, width) or, those of the MLP's hidden
# units, (B, T, hidden)
OF_WIDTH = {ReZero: ["gate"], SkipInit: ["gate"], LayerScale: ["scale"], AdminProfiled: ["omega"],
            Fixup: ["scale", "bias_in", "bias_end", "bias_hidden", "bias_leaving"]}  # fmt: skip
OF_HIDDEN = ("bias_hidden", "bias_leaving")
ELEMENTWISE = (CRMSNorm, Unit, Squash, CosineGain)  # all of whose parameters are
# called for each model: torch adds up the gradients that an input gets in the order of its uses, and these use theirs
# once; a module that uses it twice would have the same sum in another order
BY_MODEL = (nn.Embedding, Positions, nn.LayerNorm, BatchNorm, SigmaLinear)


def unstackable(model: nn.Module) -> str | None:
    """What in a model cannot be computed for several at once; None where nothing is."""
    if type(model) is not Decoder:
        return "a pretrained model, or one of one's own"
    for block in model.stack:
        if type(block.attention) is not CausalAttention:
            return "an attention of one's own"
        if block.skip.rate:
            return "dropout.sites that skip blocks"
    for module in model.modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, Placement):
            if not type(module).__module__.startswith("albert_ablate."):
                return "a placement of one's own"
            if not set(own) <= set(OF_WIDTH.get(type(module), ())):
                return "a placement whose parameters scale heads or hidden units"
        elif own and type(module) not in _REPLACED:
            return "a norm of one's own, or one that keeps a mean of its gradients"
    return None


class StackedDecoder:
    """`stacked(tokens)` gives the logits of all models, (K B, T) integers -> (K B, T, V), model after model.

    The models keep their parameters: gradients arrive there, and what changes them is seen. Their dropout sites draw
    their masks, so each model's clock has to be set. In training mode alone.
    """

    def __init__(self, models: Sequence[Decoder]):
        first = models[0]
        shared: dict[int, Any] = {id(t): t for t in (*first.parameters(), *first.buffers())}
        self.model: Decoder = copy.deepcopy(first, {**shared, id(first.clock): first.clock})
        self.count = len(models)
        self.broadcast: list[tuple[Placement, str, list[nn.Parameter], int]] = []
        self._replace(self.model, models)
        for layer, block in enumerate(self.model.stack):
            _attend_by_model(block, [model.stack[layer] for model in models])

    def _replace(self, module: nn.Module, twins: Sequence[nn.Module]) -> None:
        """Replace the modules in `module` that hold parameters or draw; twins: the module itself in each model."""
        if isinstance(module, Placement):
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                size = self.model.stack[0].mlp.inner if name in OF_HIDDEN else self.model.width
                self.broadcast.append((module, name, [getattr(twin, name) for twin in twins], size))
                del module._parameters[name]
        for name, child in list(module.named_children()):
            same = [getattr(twin, name) for twin in twins]
            make = _replacement(same)
            if make is None:
                self._replace(child, same)
            else:
                setattr(module, name, make(same))

    def __call__(self, tokens: Tensor) -> Tensor:
        for placement, name, parameters, size in self.broadcast:
            vars(placement)[name] = _broadcast((*tokens.shape, size), parameters)
        return self.model(tokens)


def _replacement(twins: Sequence[nn.Module]) -> Callable[[Sequence[Any]], nn.Module] | None:
    """What takes the place of a module of which `twins` is that of each model; None: what is inside it is replaced."""
    first = twins[0]
    if isinstance(first, Dropout):
        if isinstance(first, Skip) or not any(cast(Dropout, twin).rate for twin in twins):
            return None  # it does nothing
        return _Dropout if type(first) is Dropout else _DropToken if isinstance(first, DropToken) else _ByModel
    return _REPLACED.get(type(first)) if [*first.parameters(recurse=False)] else None


def _attend_by_model(block: Block, twins: Sequence[Block]) -> None:
    """Have each model draw the masks of its attention weights, and watch its largest logits."""
    attentions = [twin.attention for twin in twins]

    def mix(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: Dropout) -> Tensor:
        parts = zip(attentions, twins, *(z.chunk(len(twins)) for z in (q, k, v)), strict=True)
        return torch.cat([a.mix(*qkv, scale, twin.drop_weights) for a, twin, *qkv in parts])

    def watch(q: Tensor, k: Tensor, scale: float) -> None:
        for attention, of_q, of_k in zip(attentions, q.chunk(len(twins)), k.chunk(len(twins)), strict=True):
            attention._watch(of_q, of_k, scale)

    if any(twin.drop_weights.rate for twin in twins):
        block.attention.mix = mix  # type: ignore[method-assign]
    block.attention._watch = watch  # type: ignore[method-assign]


class _ByModel(nn.Module):
    """Any module, called for each model with its part of the first axis."""

    def __init__(self, twins: Sequence[Any]):
        super().__init__()
        vars(self)["twins"] = list(twins)  # not registered: their parameters are not this module's

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["twins"][0], name)  # the shapes, which are the same in all

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([twin(part) for twin, part in zip(self.twins, x.chunk(len(self.twins)), strict=True)])


class _Elementwise(_ByModel):
    """A norm whose parameters act on each element alone: computed once, with each model's parameters."""

    def __init__(self, twins: Sequence[nn.Module]):
        super().__init__(twins)
        vars(self)["norm"] = norm = copy.deepcopy(twins[0])
        vars(self)["names"] = [name for name, _ in norm.named_parameters()]
        for name in self.names:
            del norm._parameters[name]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            vars(self.norm)[name] = _broadcast(x.shape, [getattr(twin, name) for twin in self.twins])
        return cast(Tensor, self.norm(x))


class _RMSNorm(_ByModel):
    def forward(self, x: Tensor) -> Tensor:
        gain = _broadcast(x.shape, [twin.weight for twin in self.twins])
        y = F.rms_norm(x, self.twins[0].weight.shape, None, self.twins[0].eps)
        return y * (1 + gain if isinstance(self.twins[0], ZeroCentredRMSNorm) else gain)


class _DropToken(_ByModel):
    def rows(self, x: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
        parts = zip(self.twins, x.chunk(len(self.twins)), tokens.chunk(len(self.twins)), strict=True)
        return torch.cat([twin.rows(*part, vocabulary) for twin, *part in parts])


class _Dropout(_ByModel):
    """`Dropout` whose masks are drawn into one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        rates = [twin.now for twin in self.twins]
        if not any(rates):
            return x
        masks = torch.empty(x.shape, dtype=draw_dtype(), device=x.device)
        for twin, rate, mask in zip(self.twins, rates, masks.chunk(len(rates)), strict=True):
            if rate:
                twin.fill_mask(mask, rate)
            else:
                mask.fill_(1.0)
        return x * masks.to(x.dtype)


class _Linear(_ByModel):
    """x W^T + b with each model's W and b."""

    def forward(self, x: Tensor) -> Tensor:
        biases = [twin.bias for twin in self.twins] if self.twins[0].bias is not None else []
        weights = [twin.weight for twin in self.twins]
        return cast(Tensor, _Products.apply(len(weights), x, *weights, *biases))


class _Products(torch.autograd.Function):
    """x W^T + b by model, with the calls that torch makes for one, all of them in one node of the graph."""

    @staticmethod
    def forward(ctx: Any, count: int, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        rows = x.reshape(count, -1, x.shape[-1])
        y = x.new_empty(*rows.shape[:2], len(weights[0]))
        if biases:
            for row, weight, bias, out in zip(rows, weights, biases, y, strict=True):
                torch.addmm(bias, row, weight.t(), out=out)
        else:
            for row, weight, out in zip(rows, weights, y, strict=True):
                torch.mm(row, weight.t(), out=out)
        ctx.save_for_backward(rows, *weights)
        ctx.shape, ctx.biased = x.shape, bool(biases)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, *weights = ctx.saved_tensors
        g = gradients[0].reshape(*rows.shape[:2], -1)
        of_x = torch.empty_like(rows)
        for part, weight, out in zip(g, weights, of_x, strict=True):
            torch.mm(part, weight, out=out)
        of_weights = [part.t().mm(row) for part, row in zip(g, rows, strict=True)]
        of_biases = [part.sum(0) for part in g] if ctx.biased else []
        return None, of_x.view(ctx.shape), *of_weights, *of_biases


def _broadcast(shape: Sequence[int], parameters: Sequence[Tensor]) -> Tensor:
    """The parameter of each model, a vector or a number, as one tensor (K B, ..., D) that takes no memory."""
    return cast(Tensor, _Broadcast.apply(shape, *parameters))


class _Broadcast(torch.autograd.Function):
    """Its gradient has the whole shape, and is summed by model, as it is for one."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], *parameters: Tensor) -> Tensor:
        ctx.shape, ctx.count = parameters[0].shape, len(parameters)
        each = torch.stack(parameters).view(ctx.count, *[1] * (len(shape) - 2), -1)
        return each.repeat_interleave(shape[0] // ctx.count, 0).expand(*shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *(part.sum_to_size(ctx.shape) for part in gradients[0].chunk(ctx.count))


_REPLACED: dict[type, Callable[[Sequence[Any]], nn.Module]] = {
    nn.Linear: _Linear,
    nn.RMSNorm: _RMSNorm,
    ZeroCentredRMSNorm: _RMSNorm,
    **dict.fromkeys(ELEMENTWISE, _Elementwise),
    **dict.fromkeys(BY_MODEL, _ByModel),
}
