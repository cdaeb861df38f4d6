"""Per-layer diagnostics of one training step: forward pass, gradients and weight updates by block and sublayer.

B batch, T tokens, D width, H heads. Only on logged steps (diagnostics.every).

Everything is read and nothing is written, so that a run's numbers are the same, bit for bit, with and without; on the
other steps nothing is installed. One forward pass is looked at: that of the first micro-batch of the step, on the first
rank its part. Of a row's columns

    input_rms, output_rms     sqrt(mean x^2) of what the sublayer's function receives (behind a norm, where the
    output_mean               placement has one before it) and gives (before dropout on it); mean x
    residual_rms, _mean       of the stream after the sublayer; of the first tensor where a placement carries several
    entropy                   -sum_j A_ij ln A_ij of attention weights, nats, mean over heads and positions i (Zhai et
                              al. 2023, 2303.06296); ln(T!) / T for a uniform causal A. No dropout on A
    max_logit                 largest q_i k_j * scale that the mask lets through, before a soft cap. Both from the first
                              ATTENTION_SEQUENCES sequences
    dead                      share of the MLP's hidden units with |a(z)| < 1e-6 for every token, a the activation
    saturated                 share of those with a slope |a'(z)| < 1e-3 for every token, in a tail of a (`FLAT`): the
                              unit passes no gradient (saturation as in Glorot and Bengio 2010); nan for identity
    grad_norm, weight_norm    Euclidean, over the parameters of the sublayer and of the placement around it; before
                              clipping, and before the step
    update_ratio              norm of the change of these parameters by the step, decay and renormalization included,
                              over weight_norm; nan at step 0
    clipped, clip_ratio       share of units (of the rule: steps, rows, tensors, elements) clipped; gradient norm after
                              clipping over before, 1 where there is none
    dropout                   the rate in force, 0 where no site of dropout.sites is in the sublayer

Parameters that blocks share count where they are named first, and are nan elsewhere; so is all that a block which was
left out of the micro-batch would have. A block of a model of one's own is one place, "block": of its activations it has
residual_rms and residual_mean, those of what it gives.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from albert_ablate.model.dropout import Dropout
from albert_ablate.model.token_model import Place, TokenModel
from albert_ablate.optim.clipping import Clip, tensor_norms

DEFAULT_LOGGED_STEPS = 40  # that a run is looked at, about, where diagnostics.every is null
ATTENTION_SEQUENCES = 2  # whose attention weights are computed
DEAD_UNIT_THRESHOLD = 1e-6
FLAT = {  # (edge, both sides): |a'(z)| < 1e-3 where z < edge, or where |z| > |edge|
    "relu": (0.0, False),
    "relu2": (5e-4, False),
    "gelu": (-3.8104, False),
    "gelu_tanh": (-3.7374, False),
    "silu": (-8.9851, False),
    "sigmoid": (-6.9058, True),
}
MASKED_LOGIT = -1e30  # added to logits behind the mask; finite, so that nothing times 0 is nan
Metrics = dict[str, float]


def interval(every: int | None, steps: int) -> int:
    """Steps between logged ones, 0 for none: diagnostics.every, or a fortieth of the budget where that is None."""
    return max(1, round(steps / DEFAULT_LOGGED_STEPS)) if every is None else every


class Probe:
    """Measures forward passes of `model`, whose MLPs have this activation (None: not known). seconds: what the last one
    took."""

    def __init__(self, model: TokenModel, activation: str | None):
        self.model, self.flat = model, FLAT.get(activation or "")
        self.seconds = 0.0
        self.measured: list[tuple[Place, str, float, Tensor]] = []  # factor and value of each figure
        self._masks: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The forward pass within it is measured; a backward pass that recomputes blocks has to be outside."""
        self.seconds, self.measured, handles, undo = 0.0, [], [], []
        began = time.perf_counter()
        if not self.model.stack:
            for layer, block in enumerate(self.model.blocks):
                handles.append(block.register_forward_hook(partial(self._stream, (layer, "block"))))
        for layer, block in enumerate(self.model.stack):
            for name, module, around in block.sublayers:
                place = (layer, name)
                handles.append(module.register_forward_pre_hook(partial(self._input, place)))
                handles.append(module.register_forward_hook(partial(self._output, place)))
                handles.append(around.register_forward_hook(partial(self._stream, place)))
            mix, activation = block.attention.mix, block.mlp.activation
            undo.append(_set(block.attention, "mix", partial(self._mix, (layer, "attention"), block.attention, mix)))
            undo.append(_set(block.mlp, "activation", partial(self._activation, (layer, "mlp"), activation)))
        self.seconds += time.perf_counter() - began
        try:
            yield
        finally:
            began = time.perf_counter()
            for handle in handles:
                handle.remove()
            for restore in undo:
                restore()
            self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def measure_separately(self, tokens: Tensor) -> None:
        """Measure a pass of its own, for compiled blocks, into which nothing can look."""
        began = time.perf_counter()
        with undisturbed(self.model), self.watching():
            self.model(tokens)
        self.seconds = time.perf_counter() - began

    def metrics(self) -> dict[Place, Metrics]:
        """What the last forward pass showed."""
        if not self.measured:
            return {}
        values = torch.stack([value.to(self.measured[0][3].dtype) for *_, value in self.measured]).tolist()
        metrics: dict[Place, Metrics] = {}
        for (place, column, factor, _), value in zip(self.measured, values, strict=True):
            metrics.setdefault(place, {})[column] = factor * value + 0.0  # no -0.0
        for columns in metrics.values():
            # what compares false with everything is not alive for that
            if not math.isfinite(columns.get("input_rms", 0.0)):
                columns |= {column: math.nan for column in ("dead", "saturated") if column in columns}
        self.measured = []
        return metrics

    # --- called from inside the forward pass -------------------------------------------------------------------------

    def _input(self, place: Place, module: nn.Module, inputs: tuple) -> None:
        began = time.perf_counter()
        self._rms(place, "input_rms", inputs[0])
        self.seconds += time.perf_counter() - began

    def _output(self, place: Place, module: nn.Module, inputs: tuple, out: Tensor) -> None:
        began = time.perf_counter()
        self._rms(place, "output_rms", out)
        self._mean(place, "output_mean", out)
        self.seconds += time.perf_counter() - began

    def _stream(self, place: Place, module: nn.Module, inputs: tuple, stream: Any) -> None:
        began = time.perf_counter()
        x = stream if isinstance(stream, Tensor) else stream[0]
        if not isinstance(x, Tensor):  # of a model of one's own, whose blocks give what they like
            return
        self._rms(place, "residual_rms", x)
        self._mean(place, "residual_mean", x)
        self.seconds += time.perf_counter() - began

    def _mix(
        self, place: Place, attention: Any, mix: Callable, q: Tensor, k: Tensor, v: Tensor, scale: float, drop: Dropout
    ) -> Tensor:
        began = time.perf_counter()
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            self._attention(place, attention, q[:ATTENTION_SEQUENCES], k[:ATTENTION_SEQUENCES], scale)
        self.seconds += time.perf_counter() - began
        return mix(q, k, v, scale, drop)

    def _activation(self, place: Place, activation: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        a = activation(z)
        began = time.perf_counter()
        with torch.no_grad():
            self._units(place, z, a)
        self.seconds += time.perf_counter() - began
        return a

    def _rms(self, place: Place, column: str, x: Tensor) -> None:
        x = _plain(x)
        norm = torch.linalg.vector_norm(x)
        if x.device.type == "cpu" and math.isinf(norm.item()):  # squares beyond float32; elsewhere asking would wait
            norm = torch.linalg.vector_norm(x, dtype=torch.float64)
        self._keep(place, column, norm, x.numel() ** -0.5)

    def _mean(self, place: Place, column: str, x: Tensor) -> None:
        self._keep(place, column, _plain(x).mean())

    def _attention(self, place: Place, attention: Any, q: Tensor, k: Tensor, scale: float) -> None:
        T = q.shape[2]
        q, k = (_plain(z).flatten(0, 1) for z in (q, k))
        mask = self._mask(T, min(T, attention.window or T), q)
        logits = torch.baddbmm(mask.expand(len(q), T, T), q, k.transpose(1, 2), alpha=scale)
        peak = logits.amax(-1, keepdim=True)
        self._keep(place, "max_logit", peak.amax())
        if attention.softcap is not None:
            logits = attention.softcap * torch.tanh(logits / attention.softcap) + mask
            peak = logits.amax(-1, keepdim=True)
        weights = logits.softmax(-1)
        # ln sum_j exp(s_j - max) = -ln(largest weight), and the entropy is that less the mean of s_j - max
        below = torch.dot(weights.flatten(), logits.sub_(peak).flatten())
        self._keep(place, "entropy", -(weights.amax(-1).log().sum() + below), 1 / peak.numel())

    def _units(self, place: Place, z: Tensor, a: Tensor) -> None:
        z, a = (_plain(x).flatten(0, 1) for x in (z, a))
        share = 1 / a.shape[1]
        dead = (a.amax(0) < DEAD_UNIT_THRESHOLD) & (a.amin(0) > -DEAD_UNIT_THRESHOLD)
        self._keep(place, "dead", dead.sum(), share)
        if self.flat is not None:
            edge, both = self.flat
            flat = z.abs().amin(0) > -edge if both else z.amax(0) < edge
            self._keep(place, "saturated", flat.sum(), share)

    def _keep(self, place: Place, column: str, value: Tensor, factor: float = 1.0) -> None:
        self.measured.append((place, column, factor, value))

    def _mask(self, T: int, window: int, like: Tensor) -> Tensor:
        """0 where a token sees another, else MASKED_LOGIT, (T, T)."""
        mask = self._masks.get((T, window))
        if mask is None or mask.device != like.device or mask.dtype != like.dtype:
            seen = torch.ones(T, T, dtype=torch.bool, device=like.device).tril_().triu_(1 - window)
            mask = torch.zeros(T, T, device=like.device, dtype=like.dtype).masked_fill_(~seen, MASKED_LOGIT)
            self._masks[T, window] = mask
        return mask


@contextmanager
def undisturbed(model: TokenModel) -> Iterator[None]:
    """Within it `model` takes passes of its own, by the blocks' plain code and with the masks of the moment. What they
    leave in it is put back: running statistics, attributes of any module (QK-clip's largest logits), and torch's
    generators, which dropout seeds. Gradients are the caller's."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    for block in model.stack:
        block.__dict__.pop("through", None)  # compiled
    try:
        with torch.random.fork_rng(_device_numbers(model)):
            yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        with torch.no_grad():
            for buffer, saved in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(saved)


def _device_numbers(model: nn.Module) -> list[int]:
    """The GPUs that hold parameters of `model`."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _plain(x: Tensor) -> Tensor:
    """Without history, and with digits enough to be summed."""
    x = x.detach()
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _set(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of this object alone; gives what puts back the one before."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    return partial(delattr, owner, name) if before is None else partial(setattr, owner, name, before)


class Weights:
    """The parameters of the blocks over one step: their norms, how far they move, what clipping does to them.

    named: all parameters, by name, as the clipping rule gets them. places: where those of the blocks belong.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], places: Mapping[str, Place]):
        self.named = [(name, p) for name, p in named if name in places]
        self.place_of = places
        self.before: list[Tensor] = []
        self.norms: dict[str, dict[str, Tensor]] = {}  # figure -> parameter -> norm
        self.clipped: Mapping[str, tuple[Any, int]] = {}  # parameter -> units clipped, of how many

    @torch.no_grad()
    def begin(self) -> None:
        """Before the step: keep a copy."""
        tensors = [p.detach() for _, p in self.named]
        self.before = [t.clone() for t in tensors]
        self.norms = {"weight": self._by_name(tensors)}

    @torch.no_grad()
    def end(self) -> None:
        """After it."""
        if self.named:
            torch._foreach_sub_(self.before, [p.detach() for _, p in self.named])
        self.norms["change"] = self._by_name(self.before)
        self.before = []

    def _by_name(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        norms = tensor_norms(tensors) if tensors else ()  # a model of one's own may name no blocks
        return dict(zip((name for name, _ in self.named), norms, strict=True))

    def gradients(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor] | None, clip: Clip) -> None:
        """Norms of the step's gradients before clipping and, where the rule has no one factor, after it."""
        self.norms |= {"grad": dict(before), "after": dict(after or {})}
        self.clipped = {} if clip.common is not None else dict(clip.found)

    def metrics(self, clipped: float, factor: float | None) -> dict[Place, Metrics]:
        """Of each sublayer; `clipped` and `factor` are those of a rule that treats all gradients alike, else None."""
        squares: dict[str, dict[Place, float]] = {}
        for kind, norms in self.norms.items():
            sums: dict[Place, float] = {}
            for name, norm in zip(norms, torch.stack(list(norms.values())).tolist() if norms else (), strict=True):
                if name in self.place_of:
                    sums[self.place_of[name]] = sums.get(self.place_of[name], 0.0) + norm * norm
            squares[kind] = sums
        units: dict[Place, tuple[float, int]] = {}
        if self.clipped:
            counts = torch.stack([torch.as_tensor(count) for count, _ in self.clipped.values()]).tolist()
            for (name, (_, size)), count in zip(self.clipped.items(), counts, strict=True):
                if name in self.place_of:
                    one, many = units.get(self.place_of[name], (0.0, 0))
                    units[self.place_of[name]] = one + count, many + size
        metrics: dict[Place, Metrics] = {}
        for place, weight in squares["weight"].items():
            weight = math.sqrt(weight)
            values = {"weight_norm": weight}
            if "change" in squares:
                values["update_ratio"] = math.sqrt(squares["change"][place]) / weight if weight else math.nan
            if place in squares.get("grad", {}):
                norm = values["grad_norm"] = math.sqrt(squares["grad"][place])
                if factor is not None:
                    values |= {"clipped": clipped, "clip_ratio": factor}
                else:
                    after = math.sqrt(squares["after"][place])
                    values["clip_ratio"] = after / norm if norm else 1.0
                    one, many = units.get(place, (0.0, 0))
                    values["clipped"] = one / many if many else 0.0
            metrics[place] = values
        return metrics


def noise_parts(small: float, large: float, b: float, B: float) -> tuple[float, float]:
    """Unbiased estimates of tr(Sigma) and |G|^2 from squared norms of gradients of batches of b < B tokens:

    S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B), |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b) (McCandlish et al. 2018,
    1812.06162, appendix A.1). The noise scale is S / |G|^2, a ratio of means over steps, not a mean of ratios.
    """
    return (small - large) / (1 / b - 1 / B), (B * large - b * small) / (B - b)
