"""What training costs: FLOPs, seconds by phase, memory."""

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from albert_ablate.config import Config, check, construct, trait
from albert_ablate.data.own_task import is_own_task
from albert_ablate.model.build import assemble
from albert_ablate.model.loss import objective, passes
from albert_ablate.model.own import OwnModel
from albert_ablate.model.token_model import TokenModel
from albert_ablate.optim.optimizers import extra_backward

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NO_MEMORY = "DefaultCPUAllocator: "  # what torch says on a CPU; on a GPU it has an error of its own
COST_GROUPS = ("model", "norm", "norm_type", "attention", "dropout", "dropout_time", "tokenizer", "loss")  # what costs


def flops_per_token(cfg: Mapping) -> float:
    """Training operations per token, those of blocks that dropout leaves out subtracted as often as it is expected to.

    Three times the forward pass of one full sequence, counted on the meta device: the backward pass takes two products
    for each of the forward pass (Kaplan et al. 2020, 2001.08361). Causal masking is not counted as a saving. A loss
    that wants two passes doubles them. An optimizer's further backward passes count.
    """
    checked = check(cfg)
    model = assemble(checked)
    return expected_flops(training_flops(checked, model), model)


def expected_flops(flops: tuple[float, list[float]], model: TokenModel) -> float:
    """`training_flops` less those of each block times the rate at which dropout leaves it out."""
    whole, blocks = flops
    return whole - sum(flops * block.skip.rate for flops, block in zip(blocks, model.stack, strict=True))


def training_flops(cfg: Mapping, model: TokenModel | None = None) -> tuple[float, list[float]]:
    """Training operations per token with nothing left out: all, and those of each block.

    model: that of `cfg` on the meta device, where it is there already."""
    checked = check(cfg)
    if is_own_task(checked):
        from albert_ablate.training.own_training import step_flops  # which imports this

        return step_flops(checked), []
    key = json.dumps({key: checked[key] for key in COST_GROUPS}, sort_keys=True, default=dict)
    if key not in _counted:
        while len(_counted) >= COUNTS_KEPT:
            del _counted[next(iter(_counted))]
        _counted[key] = _forward_flops(assemble(checked) if model is None else model, checked.model.context)
    forward, blocks = _counted[key]
    times = passes(construct(checked.loss)) * (3 + 2 * extra_backward(checked.optimizer))
    return times * forward, [times * flops for flops in blocks]


# a count takes a tenth of a second and more, and a warm worker trains one model many times
_counted: dict[str, tuple[float, tuple[float, ...]]] = {}
COUNTS_KEPT = 64


@torch.no_grad()
def _forward_flops(model: TokenModel, context: int) -> tuple[float, tuple[float, ...]]:
    """Operations per token of a forward pass of `model`, on the meta device: all, and those of each block that dropout
    may leave out."""
    if isinstance(model, OwnModel):
        return model.forward_flops(), ()
    training, name = model.training, type(model).__name__
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, context, dtype=torch.long, device="meta"))
    model.train(training)
    by_module = counter.get_flop_counts()
    blocks = [sum(by_module.get(f"{name}.blocks.{layer}", {}).values()) for layer in range(len(model.stack))]
    return counter.get_total_flops() / context, tuple(flops / context for flops in blocks)


class Phases:
    """Seconds of a run by what they went to; each moment belongs to one, so that they add up to the whole.

    data: fetching batches, with Lightning's loop. forward, backward: of all micro-batches. optimizer: clipping, the
    step and what follows it. diagnostics: what diagnostics.every asks for. evaluation. records: histories, checkpoints,
    trackers. Measured on the host: a GPU works on behind it, and its step is waited for in `optimizer`.
    """

    TRAINING = ("data", "forward", "backward", "optimizer", "diagnostics")

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*self.TRAINING, "evaluation", "records"), 0.0)
        self.start()

    def start(self) -> None:
        """Start the clock: time before this call counts to no phase."""
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Count the time since the last mark to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now

    def skip(self, seconds: float) -> None:
        """Let so much of the time since the last mark count to no phase."""
        self.last += seconds

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count seconds under another phase."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    @property
    def training(self) -> float:
        """Seconds of training, without evaluations and records."""
        return sum(self.seconds[phase] for phase in self.TRAINING)


def memory(cfg: Config) -> dict[str, int]:
    """Estimate the memory of training an arm on one device at float32, in bytes: weights, gradients, moments (Adam's
    two), and activations that autograd saves for one micro-batch, logits included; counted on the meta device.

    The attention weights, B x H x T x T, count where attention.softcap asks for them; else they are taken to stay in
    the kernel, as with flash attention (Dao et al. 2022, 2205.14135) without dropout on them.
    trainer.gradient_checkpointing keeps the stream before each block and one block's activations.
    """
    model = assemble(cfg).train()
    batch, context = cfg.data.batch // cfg.data.accumulate, cfg.model.context
    weights = 4 * sum(p.numel() for p in model.parameters())
    saved = _SavedTensors(model)
    tokens = torch.zeros(batch, context + 1, dtype=torch.long, device="meta")
    with _Flash(), torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        objective(construct(cfg.loss), model, tokens)
    activations = sum(saved.bytes.values())
    if cfg.trainer.gradient_checkpointing:
        blocks = [saved.bytes[layer] for layer in range(len(model.blocks))]
        activations += len(blocks) * saved.stream + max(blocks) - sum(blocks)
    return {"weights": weights, "gradients": weights, "moments": 2 * weights, "activations": activations}


def memory_hint(error: Exception, cfg: Config) -> str:
    """After an error of a language model's training: what memory it takes by the estimate and how to lower it, one
    sentence; "" where memory was not what it lacked."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and NO_MEMORY not in str(error):
        return ""
    if not trait(cfg.model, "takes_parts"):  # what a model of one's own saves cannot be counted without memory
        return " A larger data.accumulate (smaller micro-batches) takes less memory."
    parts = {name: f"{size / 2**30:.3g}" for name, size in memory(cfg).items()}
    ways = ["a larger data.accumulate (smaller micro-batches)"]
    if not cfg.trainer.gradient_checkpointing:
        ways.append("trainer.gradient_checkpointing=true")
    return (
        f" By the estimate a device needs {parts['weights']} GiB for weights, as much for gradients, "
        f"{parts['moments']} for Adam's moments and {parts['activations']} for activations at float32: "
        f"{' or '.join(ways)} lowers the last."
    )


class _Flash(TorchFunctionMode):
    """Makes attention on the meta device save what a flash kernel saves; torch would decompose it otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _FlashShapes.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _FlashShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, _ = q.shape
        mixed = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mixed, q.new_empty(B, H, T))  # the last: log-sum-exp of each row
        return mixed


class _SavedTensors:
    """Bytes of the tensors that autograd saves, without weights, by the block (-1: outside) that saved them first."""

    def __init__(self, model: TokenModel):
        self.layer, self.stream = -1, 0
        self.bytes = dict.fromkeys(range(-1, len(model.blocks)), 0)
        self.known: dict[int, Tensor] = {
            p.untyped_storage()._cdata: p for p in model.parameters()
        }  # alive, so that no address recurs
        for layer, block in enumerate(model.stack):
            block.register_forward_pre_hook(lambda block, given, layer=layer: self._enter(layer, given[0]))
            block.register_forward_hook(lambda *_: self._enter(-1, None))

    def _enter(self, layer: int, stream: Any) -> None:
        self.layer = layer
        if stream is not None:
            self.stream = sum(t.nbytes for t in (stream if isinstance(stream, tuple) else (stream,)))

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = tensor
            self.bytes[self.layer] += storage.nbytes()
        return tensor


class PeakMemory:
    """Peak memory in bytes since it was made: the device's where there is one, else the process's resident set."""

    def __init__(self) -> None:
        try:
            CLEAR.write_text("5")  # Linux: reset the high-water mark, so that a warm worker's next run starts anew
        except OSError:
            pass

    def read(self, device: torch.device) -> int:
        """Peak memory in bytes: of the GPU, else of this process."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        try:
            line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
