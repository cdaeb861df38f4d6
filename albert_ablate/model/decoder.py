"""A decoder-only transformer for ablation. B batch, T tokens, D width, V vocabulary.

The trunk knows nothing of a particular placement, norm or dropout: it builds them from factories and asks them.
Parameters are made on the meta device and filled by name, so that none keeps an unseeded default.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from albert_ablate.config import Config, ConfigError, Count, Positive, Range, target_of
from albert_ablate.model.attention import CausalAttention
from albert_ablate.model.dropout import SKIPS, Clock, DropHead, Dropout, DropPath, DropToken, NoDropout, Skip, Uniform
from albert_ablate.model.placements import Placement, Site, Sublayer
from albert_ablate.model.sigma import SigmaLinear, verify_sigma
from albert_ablate.model.token_model import Place, TokenModel
from albert_ablate.streams import digest, stream_seed

Width = Annotated[int, Range(1, 1_000_000)]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Parts:
    """What a decoder is assembled from: factories for norm, placement and attention, dropout schedule, clock."""

    vocabulary: int
    norm: Callable[[int], nn.Module]
    placement: Callable[[Site], Placement]
    attention: Callable[..., CausalAttention]
    dropout: NoDropout | Uniform
    clock: Clock

    def dropout_site(self, kind: str, name: str, rate: float, make: type[Dropout] = Dropout) -> Any:
        """The dropout named `name`, of rate 0 where the schedule leaves out sites of this kind."""
        return make(rate if kind in self.dropout.sites else 0.0, name, self.clock)


class MLP(Sublayer):
    """W_down a(W_up x)."""

    roles = {"up": ("up",), "down": ("down",)}

    def __init__(self, width: int, hidden: int, activation: str, bias: bool):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.inner = hidden  # what enters the last matrix
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, around: Placement, dropout: Dropout) -> Tensor:
        return self.down(around.leaving(dropout(self.activation(around.hidden(self.up(x))))))


class GatedMLP(MLP):
    """W_down (a(W_gate x) * W_up x) (Shazeer 2020, 2002.05202): with silu SwiGLU, gelu GEGLU, relu ReGLU, sigmoid GLU,
    identity the bilinear one. Dropout acts on the product."""

    roles = {"up": ("up",), "gate": ("gate",), "down": ("down",)}

    def __init__(self, width: int, hidden: int, activation: str, bias: bool):
        super().__init__(width, hidden, activation, bias)
        self.gate = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor, around: Placement, dropout: Dropout) -> Tensor:
        h = self.activation(around.hidden(self.gate(x))) * around.linear(self.up(x))
        return self.down(around.leaving(dropout(h)))


def default_hidden(width: int, gated: bool) -> int:
    """4 D; gated, whose three matrices are to have as many parameters as those two, 8/3 D to the nearest multiple of
    8 (Shazeer 2020, 2002.05202, reduces the width by 2/3 for the same reason)."""
    return max(8, 8 * round(width / 3)) if gated else 4 * width


class Block(nn.Module):
    """Attention and MLP, each joined to the residual stream by its placement.

    recompute: keep nothing for the backward pass but the block's input (Chen et al. 2016, 1604.06174).
    """

    recompute = False

    def __init__(self, parts: Parts, attention: CausalAttention, mlp: MLP, width: int, layer: int, layers: int):
        super().__init__()
        self.attention, self.mlp = attention, mlp
        site = partial(Site, parts.norm, layer, layers, width=width, heads=attention.heads, vocabulary=parts.vocabulary)
        self.around_attention = parts.placement(site("attention", rows=attention.rows, inner=attention.inner))
        site = partial(site, "mlp", rows=mlp.rows, inner=mlp.inner, gated=isinstance(mlp, GatedMLP))
        self.around_mlp = parts.placement(site(sibling=self.around_attention))
        self.rate = parts.dropout.rate(layer, layers)
        drop = partial(parts.dropout_site, rate=self.rate)
        self.drop_weights = drop("attention", f"blocks.{layer}.attention.weights")
        self.drop_hidden = drop("hidden", f"blocks.{layer}.mlp.hidden")
        self.drop_attention = drop("residual", f"blocks.{layer}.attention.residual")
        self.drop_mlp = drop("residual", f"blocks.{layer}.mlp.residual")
        self.drop_heads = drop("head", f"blocks.{layer}.attention.heads", make=DropHead)
        self.path_attention = drop("drop_path", f"blocks.{layer}.attention.path", make=DropPath)
        self.path_mlp = drop("drop_path", f"blocks.{layer}.mlp.path", make=DropPath)
        skipped, rescale = set(SKIPS) & set(parts.dropout.sites), "stochastic_depth" in parts.dropout.sites
        self.skip = Skip(self.rate if skipped else 0.0, f"blocks.{layer}", parts.clock, rescale)

    def rate_now(self, sublayer: str) -> float:
        """The dropout rate in force in "attention" or "mlp" at the clock's step: 0 where no site is in it."""
        attention = (self.drop_weights, self.drop_heads, self.drop_attention, self.path_attention)
        layers = attention if sublayer == "attention" else (self.drop_hidden, self.drop_mlp, self.path_mlp)
        return max(site.rate for site in (*layers, self.skip)) * self.skip.clock.factor

    def forward(self, x: Any) -> Any:
        if self.skip.skips():
            return x
        if self.recompute and torch.is_grad_enabled():
            # the dropout sites seed themselves, so no generator's state has to be kept
            return checkpoint(self.through, x, use_reentrant=False, preserve_rng_state=False)
        return self.through(x)

    def through(self, x: Any) -> Any:
        """Forward pass without recomputation: the residual stream before the block to the one after it."""
        around = self.around_attention

        def attention_branch(h: Tensor) -> Tensor:
            mixed = self.attention(h, around, self.drop_weights, self.drop_heads)
            return self.skip(self.path_attention(self.drop_attention(mixed)))

        def mlp_branch(h: Tensor) -> Tensor:
            return self.skip(self.path_mlp(self.drop_mlp(self.mlp(h, self.around_mlp, self.drop_hidden))))

        return self.around_mlp(around(x, attention_branch), mlp_branch)

    @property
    def sublayers(self) -> list[tuple[str, Sublayer, Placement]]:
        """(name, module, placement) of attention and MLP."""
        return [("attention", self.attention, self.around_attention), ("mlp", self.mlp, self.around_mlp)]

    def matrices(self) -> Iterator[tuple[str, nn.Linear, dict[str, int], Placement]]:
        """(name, matrix, how many of its rows play each role, placement)."""
        for part, module, around in self.sublayers:
            for leaf, roles in module.roles.items():
                rows = dict(zip(roles, module.split(leaf), strict=True))
                yield f"{part}.{leaf}", getattr(module, leaf), rows, around


class Positions(nn.Embedding):
    """Learned positions: a table with a row for each token of the context."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) + the table's first T rows."""
        return x + self.weight[: x.shape[1]]


class Decoder(TokenModel):
    """Token embedding, blocks, head; `model(tokens)` gives logits, (B, T) integers -> (B, T, V).

    hidden: width of the MLP; null: `default_hidden`. gated: `GatedMLP`. tied: the head is the embedding, which then has
    standard deviation 1/sqrt(D) and is scaled by sqrt(D) on entry (Vaswani et al. 2017, 1706.03762, section 3.4).
    shared: all blocks use the first one's parameters (ALBERT: Lan et al. 2019, 1909.11942). bias: in the matrices of
    the blocks. embedding_scale: factor on the embedding on entry; null: sqrt(D) if tied, else 1. embedding_norm: a norm
    on the embedding, positions added, with any placement (BLOOM: Le Scao et al. 2022, 2211.05100). logit_softcap:
    logits become cap * tanh(logits / cap), in training and evaluation (Gemma 2: 2408.00118); null: they stay.
    sigma_reparam: the matrices of the blocks are `SigmaLinear`.

    Initial draws are normal, of unit variance, one stream per parameter name, times: Xavier's sqrt(2 / (in + out)) and
    the placement's gain for block matrices, Xavier for the head, 1 for the embedding, 0.5 for learned positions.
    """

    takes_parts = True

    def __init__(
        self,
        parts: Parts,
        /,
        layers: Annotated[int, Range(1, 10_000)],
        width: Width,
        heads: Width,
        context: Count,
        hidden: Width | None = None,
        activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "sigmoid", "identity"] = "gelu",
        gated: bool = False,
        tied: bool = False,
        shared: bool = False,
        bias: bool = False,
        embedding_scale: Positive | None = None,
        embedding_norm: bool = False,
        logit_softcap: Positive | None = None,
        sigma_reparam: bool = False,
    ):
        super().__init__()
        self.initial_draws: dict[str, str] = {}  # parameter -> hash of its draw, once filled
        self.width, self.context, self.tied, self.clock = width, context, tied, parts.clock
        self.logit_softcap = logit_softcap
        mlp = GatedMLP if gated else MLP
        self.embedding = nn.Embedding(parts.vocabulary, width)
        self.blocks = nn.ModuleList(
            Block(
                parts,
                parts.attention(width, heads, context, bias, layer),
                mlp(width, hidden or default_hidden(width, gated), activation, bias),
                width,
                layer,
                layers,
            )
            for layer in range(layers)
        )
        self.embedding_scale = embedding_scale or (width**0.5 if tied and self.first.scales_tied else 1.0)
        positions = getattr(self.blocks[0].attention, "positions", None)
        self.positions = Positions(context, width) if positions == "learned" else None
        self.drop_tokens = parts.dropout_site("token", "embedding.rows", parts.dropout.mean, DropToken)
        self.drop_embedding = parts.dropout_site("embedding", "embedding", parts.dropout.mean)
        self.embedding_norm = parts.norm(width) if embedding_norm or self.first.embedding_norm else nn.Identity()
        self.final_norm = parts.norm(width) if self.last.final_norm else nn.Identity()
        self.head = nn.Linear(width, parts.vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        if sigma_reparam:
            for each in self.stack:
                for name, matrix, rows, _ in each.matrices():
                    part, leaf = name.split(".")
                    setattr(getattr(each, part), leaf, SigmaLinear(matrix, [*rows.values()]))
        if shared:
            for block in self.blocks[1:]:
                for name, parameter in self.blocks[0].named_parameters(remove_duplicate=False):
                    _set_parameter(block, name, parameter)

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse widths that heads do not divide, and settings without effect on this placement."""
        _verify_heads(cfg)
        placement = target_of(cfg.norm._target_)
        if cfg.model.embedding_norm and placement.normalizes_embedding:
            name = cfg.option("norm")
            raise ConfigError(
                f"model.embedding_norm=true would do nothing: norm={name} normalizes the embedding itself."
            )
        if cfg.model.sigma_reparam:
            verify_sigma(cfg)

    @property
    def stack(self) -> list[Block]:
        """The blocks, typed."""
        return cast(list[Block], list(self.blocks))

    @property
    def reparametrized(self) -> list[SigmaLinear]:
        """The matrices under sigma reparametrization."""
        return [module for module in self.modules() if isinstance(module, SigmaLinear)]

    @property
    def first(self) -> Placement:
        """The placement the stream meets first."""
        return self.stack[0].around_attention

    @property
    def last(self) -> Placement:
        """The placement the stream leaves through."""
        return self.stack[-1].around_mlp

    def features(self, tokens: Tensor) -> Tensor:
        """What enters the head: (B, T) integers -> (B, T, D), final norm included."""
        x = self.drop_tokens.rows(self.embedding(tokens), tokens, self.embedding.num_embeddings)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        if self.positions is not None:
            x = self.positions(x)
        stream = self.first.begin(self.drop_embedding(self.embedding_norm(x)))
        for block in self.blocks:
            stream = block(stream)
        return self.last.finish(stream, self.final_norm)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.last.logits(self.head(self.features(tokens)))
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def recompute_blocks(self) -> None:
        """From now on the backward pass computes each block anew from its input: the same numbers in less memory."""
        for block in self.stack:
            block.recompute = True

    def compile_blocks(self) -> None:
        """From now on each block runs as torch.compile makes it, which rounds differently.

        What draws stays outside: the compiler's generator would draw other masks.
        """
        import torch._dynamo

        # the blocks share their code, and each may hold other numbers (a rate, a scale that depends on depth)
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 4 * len(self.blocks))
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 16 * len(self.blocks))
        for block in self.stack:
            for site in (m for m in block.modules() if isinstance(m, Dropout) and m.rate):
                site.forward = torch.compiler.disable(site.forward)  # type: ignore[method-assign]
            # here, and no decorator there: that would import the compiler, over a second, with every model
            block.attention._watch = torch.compiler.disable(block.attention._watch)  # type: ignore[method-assign]
            if block.drop_weights.rate:
                block.attention.mix = torch.compiler.disable(block.attention.mix)  # type: ignore[method-assign]
            block.through = torch.compile(block.through)  # type: ignore[method-assign]

    def places(self) -> dict[str, Place]:
        named = (name.split(".") for name, _ in self.named_parameters() if name.startswith("blocks."))
        return {".".join(p): (int(p[1]), "mlp" if p[2].endswith("mlp") else "attention") for p in named}

    def rates(self) -> dict[Place, float]:
        parts = ("attention", "mlp")
        return {(layer, part): block.rate_now(part) for layer, block in enumerate(self.stack) for part in parts}

    def described(self) -> dict[str, Any]:
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "layers": len(self.stack),
            "width": self.width,
            "mean_dropout": sum(block.rate for block in self.stack) / len(self.stack),
        }

    def multipliers(self, name: str) -> dict[str, float]:
        """Factors on the optimizer's lr, weight_decay and eps for the parameter `name`: its placement's word."""
        part = name.split(".")[0]
        if part != "blocks":
            return (self.last if part in ("head", "final_norm") else self.first).multipliers(part)
        block = self.stack[int(name.split(".")[1])]
        for matrix, _, (role, *_), around in block.matrices():
            if name.endswith(f".{matrix}.weight"):
                return around.multipliers(role)
        return (block.around_mlp if "mlp" in name else block.around_attention).multipliers("norm")

    @torch.no_grad()
    def after_step(self) -> None:
        """To be called after each step of the optimizer: what a placement or QK-clip does to the weights then."""
        for linear in self.reparametrized:
            linear.iterate()
        for block in self.stack:
            block.attention.clip_logits()
            for _, module, around in block.sublayers:
                around.after_step(module, self)

    def initial_scales(self) -> dict[str, list[tuple[float, int]]]:
        """(standard deviation, how many rows have it) of each drawn parameter, by name, from the first row on."""
        scales = {"embedding.weight": [self._std("embedding", self.first, self.width**-0.5 if self.tied else 1.0)]}
        if self.positions is not None:
            scales["positions.weight"] = [self._std("positions", self.first, 0.5)]
        if not self.tied:
            scales["head.weight"] = [self._std("head", self.last, xavier(*self.head.weight.shape))]
        for layer, block in enumerate(self.stack):
            for name, matrix, roles, around in block.matrices():
                columns = matrix.weight.shape[1]
                scales[f"blocks.{layer}.{name}.weight"] = [
                    (around.std(role, xavier(rows, columns), rows, columns), rows) for role, rows in roles.items()
                ]
        return scales

    def _std(self, role: str, around: Placement, usual: float) -> tuple[float, int]:
        rows, columns = getattr(self, role).weight.shape
        return around.trunk_std(role, usual, rows, columns), rows

    @torch.no_grad()
    def fill(self, seed: int, device: torch.device | str = "cpu") -> dict[str, str]:
        """Move from the meta device and fill every parameter by name; gives the hash of each initial draw."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        self.to_empty(device=device)
        for first, *others in names.values():  # to_empty forgets which parameters are one
            for name in others:
                _set_parameter(self, name, self.get_parameter(first))
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        for module in self.modules():
            parameters = list(module.parameters(recurse=False))
            if parameters and all(p.ndim < 2 for p in parameters) and hasattr(module, "reset_parameters"):
                cast(Callable[[], None], module.reset_parameters)()
        draws, scales = {}, self.initial_scales()
        for name, parameter in self.named_parameters():
            if name in scales:
                draw = initial_draw(seed, name, parameter.shape)
                draws[name] = digest(draw.numpy().tobytes())
                stds, rows = zip(*scales[name], strict=True)
                scale = torch.tensor(stds).repeat_interleave(torch.tensor(rows))
                parameter.copy_(draw * scale[:, None])
            elif name.endswith(".bias") and parameter.isnan().all():
                parameter.zero_()
        for linear in self.reparametrized:
            linear.settle()
        for name, parameter in self.named_parameters():
            assert not parameter.isnan().any(), f"{name} was left unfilled"
        for name, buffer in self.named_buffers():
            assert not buffer.isnan().any(), f"{name} was left unfilled"
        for block in self.stack:
            for _, _, around in block.sublayers:
                around.prepare(self)
        self.after_step()
        return draws


def _verify_heads(cfg: Config) -> None:
    model, attention = cfg.model, cfg.attention
    head_width = attention.get("head_width")  # a plug-in may have none
    if head_width is None and model.width % model.heads:
        raise ConfigError(f"model.width={model.width} is not divisible by model.heads={model.heads}.")
    if attention.positions == "rotary" and (head_width or model.width // model.heads) % 2:
        cause = f"model.width={model.width} over model.heads={model.heads} leaves an odd number per head"
        if head_width is not None:
            cause = f"attention.head_width={head_width} is odd"
        raise ConfigError(f"attention.positions=rotary turns pairs of dimensions: {cause}.")


def initial_draw(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Standard normal draws of stream `init/<name>`, always made on the CPU, so that devices agree."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "init", name))
    return torch.randn(shape, generator=generator)


def xavier(rows: int, columns: int) -> float:
    """Glorot's normal standard deviation sqrt(2 / (fan in + fan out)) (Glorot and Bengio 2010)."""
    return (2 / (rows + columns)) ** 0.5


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path).register_parameter(leaf, parameter)
