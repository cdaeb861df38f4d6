"""Models of one's own: any nn.Module that gives logits, as training asks for it.

The protocol is in docs/own_models.md: a class or function makes the module from its arguments, `model(tokens)` gives
logits, or an object that holds them as `logits`; optionally `blocks` and `decay_groups()`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from albert_ablate.config import ConfigError, Count, Positive
from albert_ablate.model.dropout import Clock
from albert_ablate.model.named_draws import drawn, value_hash
from albert_ablate.model.token_model import Place, TokenModel
from albert_ablate.streams import stream_seed

KINDS = ("matrices", "embeddings", "head", "tied", "gains", "biases", "gates")  # of optim/groups.py
CHECKED_TOKENS = 8  # of the two sequences by which logits are checked


class ItsOwn:
    """Stands in a configuration for the norm, attention or dropout of a model of one's own, which has them inside."""

    uses_norm = False
    normalizes_embedding = False
    sites = ()


class ItsModule:
    """Stands for the model of a LightningModule of one's own. context: what an example counts in budget.tokens."""

    takes_parts = False

    def __init__(self, context: Count = 1):
        self.context = context


class ItsOptimizer:
    """Stands for the optimizer of a LightningModule of one's own. lr: its argument `lr`, 1 where it has none."""

    works_on_shards = False

    def __init__(self, groups: Any, fused: bool, /, lr: Positive = 1.0):
        self.lr = lr


class OwnModel(TokenModel):
    """A module of one's own as training asks for it.

    make: gives the module, with weights drawn by torch's global generators, or loaded where `make.loads`; it may have a
    `shapes()`, which gives the module without loading. name: how the option is written. rows: how many logits a token
    has. Dropout and whatever else is random in a forward pass of training begins at the stream `dropout/model` of
    the micro-batch, so that a resumed run draws the same.
    """

    def __init__(self, make: Callable[[], nn.Module], name: str, rows: int, context: int, clock: Clock):
        super().__init__()
        self.make, self.name, self.rows, self.context, self.clock = make, name, rows, context, clock
        self.initial_draws = {}
        self.key = stream_seed(clock.seed, "dropout", "model")
        try:
            with torch.device("meta"):
                self.own = self._shapes()
        except ConfigError:
            raise
        except Exception:  # it does arithmetic with numbers that a meta tensor has not
            self.own = self._shapes()
        self.ready = False  # filled, and not trained yet

    def _made(self) -> nn.Module:
        return self._module(self.make())

    def _shapes(self) -> nn.Module:
        return self._module(getattr(self.make, "shapes", self.make)())

    def _module(self, made: Any) -> nn.Module:
        if not isinstance(made, nn.Module):
            raise ConfigError(f"{self.name} returns a {type(made).__name__}: it must return a torch.nn.Module.")
        return made

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            seed = self.key ^ self.clock.salt
            torch.default_generator.manual_seed(seed)
            if tokens.is_cuda:
                torch.cuda.default_generators[tokens.device.index].manual_seed(seed)
        out = self.own(tokens)
        return getattr(out, "logits", out)

    def fill(self, seed: int, device: torch.device | str = "cpu") -> dict[str, str]:
        if not self.ready:
            if getattr(self.make, "loads", False):
                self.own = self._made()
                self.initial_draws = {name: value_hash(p) for name, p in self.own.named_parameters()}
            else:
                self.own, self.initial_draws = drawn(self._made, seed)
        self.ready = False
        self.own.to(device)
        return self.initial_draws

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        return list(getattr(self.own, "blocks", ()))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        layer = {id(p): i for i, block in enumerate(self.blocks) for p in block.parameters()}
        kinds, names = self.kinds(), []
        for name, p in self.named_parameters():
            part = {"head": "head", "embeddings": "embedding", "tied": "embedding"}.get(kinds.get(name, ""), "own")
            part = f"blocks.{layer[id(p)]}" if id(p) in layer else part
            names.append((f"{part}.{name.removeprefix('own.')}", p))
        return names

    def places(self) -> dict[str, Place]:
        return {n: (int(n.split(".")[1]), "block") for n, _ in self.trained() if n.startswith("blocks.")}

    def rates(self) -> dict[Place, float]:
        return {(layer, "block"): math.nan for layer in range(len(self.blocks))}

    def described(self) -> dict[str, Any]:
        width = getattr(getattr(self.own, "config", None), "hidden_size", None)
        parameters = sum(p.numel() for p in self.parameters())
        return {"parameters": parameters, "layers": len(self.blocks) or None, "width": width, "mean_dropout": None}

    def kinds(self) -> dict[str, str]:
        """By name: what `decay_groups()` of the module says; an embedding's table; a head, which has as many rows as
        there are logits; the rest is told by name and shape."""
        tables = {id(m.weight): m for m in self.own.modules() if isinstance(m, nn.Embedding)}
        heads = {id(m.weight) for m in self.own.modules() if not isinstance(m, nn.Embedding) and self._is_head(m)}
        kinds = {}
        for name, p in self.named_parameters():
            if id(p) in tables:
                kinds[name] = "tied" if id(p) in heads else "embeddings"
            elif id(p) in heads:
                kinds[name] = "head"
        asked: dict[str, str] = getattr(self.own, "decay_groups", dict)()
        full_names = {name.removeprefix("own."): name for name, _ in self.named_parameters()}
        for name, kind in asked.items():
            if name not in full_names or kind not in KINDS:
                raise ConfigError(
                    f"decay_groups() of {self.name} says {name}: {kind}; it must name a parameter of the model and one "
                    f"of {', '.join(KINDS)}."
                )
        return kinds | {full_names[name]: kind for name, kind in asked.items()}

    def _is_head(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return isinstance(weight, nn.Parameter) and weight.ndim == 2 and len(weight) == self.rows

    def recompute_blocks(self) -> None:
        if not hasattr(self.own, "gradient_checkpointing_enable"):
            raise ConfigError(
                f"trainer.gradient_checkpointing=true is not allowed with {self.name}: its module has no "
                "gradient_checkpointing_enable()."
            )
        self.own.gradient_checkpointing_enable()  # type: ignore[operator]

    # --- as others see its weights: by the module's own names ---------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return super().state_dict(*args, **kwargs) if args or kwargs else self.own.state_dict()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.own.load_state_dict(state_dict, strict, assign)

    # --- before a run -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, seed: int) -> None:
        """Raise ConfigError with one sentence unless the filled model gives logits for tokens, each from what is before
        it alone."""
        self.fill(seed)
        self.ready = True
        training = self.own.training
        tokens = torch.arange(2 * min(self.context, CHECKED_TOKENS)).view(2, -1) % self.rows
        self.own.eval()
        try:
            logits = self(tokens)
            shape = (*tokens.shape, self.rows)
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            if given != shape or not logits.is_floating_point():
                raise ConfigError(
                    f"{self.name} returns {given} for {tokens.shape[0]} x {tokens.shape[1]} tokens: it must return "
                    f"logits of shape {shape}, a number for each of {self.rows} tokens."
                )
            other = tokens.clone()
            other[:, -1] = (other[:, -1] + 1) % self.rows
            if not torch.allclose(self(other)[:, :-1], logits[:, :-1], rtol=1e-3, atol=1e-4, equal_nan=True):
                raise ConfigError(
                    f"{self.name} is not causal: its logits for a token depend on tokens after it, which it is to "
                    "predict."
                )
        except ConfigError:
            raise
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ConfigError(f"{self.name} cannot be applied to tokens: {why}") from error
        finally:
            self.own.train(training)

    @torch.no_grad()
    def forward_flops(self) -> float:
        """Operations of one forward pass of a whole sequence, per token. Counted without values where the module can do
        without, else by a pass on the CPU."""
        try:
            with FakeTensorMode():
                return self._counted(self._shapes())
        except Exception:
            return self._counted(self._shapes())

    def _counted(self, module: nn.Module) -> float:
        tokens = torch.zeros(1, self.context, dtype=torch.long)
        # other kernels of attention are not counted, nor are grouped products
        grouped: Any = {torch.ops.aten._grouped_mm: _grouped_flops}
        with (
            FlopCounterMode(display=False, custom_mapping=grouped) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):  # other kernels are not counted
            module.eval()(tokens)
        return counter.get_total_flops() / self.context


def _grouped_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Of the experts' products, (M, K) and (E, K, N): each of M rows meets one expert."""
    return 2 * a[0] * a[1] * b[-1]
