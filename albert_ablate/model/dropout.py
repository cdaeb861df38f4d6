"""Dropout: what is dropped (`sites`), how the rate lies over depth (the group dropout) and over time (dropout_time).

l = 1..L block, u = (l - 1) / (L - 1) its depth, t in [0, 1] the share of the budget spent. Every shape is given by its
mean over the blocks, and every shape over time has a mean of 1 over the steps, so that arms are compared at an equal
mean over depth and time. Sites outside the blocks (embedding, token) take the mean.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError, Fraction, Positive, Probability, Range, steps_of, target_of
from albert_ablate.streams import stream_seed

Site = Literal[
    "embedding", "token", "attention", "head", "residual", "hidden", "drop_path", "stochastic_depth", "layer_drop"
]
SKIPS = ("stochastic_depth", "layer_drop")
Sites = tuple[Site, ...]
USUAL: Sites = ("embedding", "residual")
Spread = Annotated[float, Range(-1, 1)]

# --- over depth ------------------------------------------------------------------------------------------------------


class NoDropout:
    """p_l = 0."""

    mean = 0.0
    sites: Sequence[str] = ()

    def rate(self, layer: int, layers: int) -> float:
        """Rate of block `layer` of `layers`, counted from 0."""
        return 0.0


class Uniform:
    """p_l = mean (Srivastava et al. 2014).

    sites: what is dropped, each with a stream of masks of its own. Elements, rescaled by 1 / (1 - p): embedding (all
    that enters the first block), attention (weights after the softmax), hidden (the MLP's activations), residual (what
    a sublayer gives). Whole rows of the embedding table, for a micro-batch, rescaled by 1 / (1 - p): token. Whole
    heads of a sequence, rescaled by H / (heads kept): head (DropHead: Zhou et al. 2020, 2004.13342). What a sublayer
    gives for a sequence, rescaled by 1 / (1 - p): drop_path. Whole blocks for a micro-batch, on all devices alike,
    which are then not computed: stochastic_depth (Huang et al. 2016, 1603.09382: in evaluation what a sublayer gives is
    multiplied by 1 - p) and layer_drop (Fan et al. 2019, 1909.11556: no rescaling); nothing else saves work.
    """

    def __init__(self, mean: Probability = 0.1, sites: Sites = USUAL):
        self.mean, self.sites = mean, sites

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse rates that reach 1, and sites that exclude each other or do not fit the model."""
        node = cfg.dropout
        shape = target_of(node._target_)(**{k: v for k, v in node.items() if not k.startswith("_")})
        layers, steps, over_time = cfg.model.layers, steps_of(cfg), cfg.dropout_time
        kind = target_of(over_time._target_)
        time = kind(**{k: v for k, v in over_time.items() if not k.startswith("_")})
        in_blocks = set(shape.sites) - {"embedding", "token"}
        highest = max([shape.rate(layer, layers) for layer in range(layers)]) if in_blocks else shape.mean
        peak = highest * max((multiplier(time, step, steps) for step in range(steps)), default=1.0)
        if peak >= 1:
            raise ConfigError(
                f"dropout.mean={node.mean} asks for a rate of {peak:g} at the highest point of its shape over depth "
                "and time: it must be below 1."
            )
        if set(SKIPS) <= set(shape.sites):
            raise ConfigError(
                "dropout.sites holds stochastic_depth and layer_drop: both skip blocks, and differ only in evaluation; "
                "take one."
            )
        if "stochastic_depth" in shape.sites and kind is not Constant:
            raise ConfigError(
                "dropout_time is not allowed with stochastic_depth, whose evaluation needs one rate for the whole run: "
                "take layer_drop."
            )
        if cfg.trainer.strategy == "fsdp" and set(SKIPS) & set(shape.sites):
            raise ConfigError("dropout.sites with skipped blocks is not allowed with trainer.strategy=fsdp.")
        if cfg.model.heads == 1 and "head" in shape.sites:
            raise ConfigError("dropout.sites=[head] drops heads: model.heads=1 leaves none to attend.")

    def rate(self, layer: int, layers: int) -> float:
        """Rate of block `layer` of `layers`, counted from 0, as a mean over time."""
        return self.mean


class DepthDecay(Uniform):
    """p_l = mean (1 + spread (1 - 2u)): linear, higher in shallow blocks, as in the AlbertAGPT article.

    spread = 1 goes from twice the mean to 0; the mean over blocks is `mean` exactly.
    """

    direction = 1.0

    def __init__(
        self,
        mean: Probability = 0.1,
        spread: Fraction = 1.0,
        sites: Sites = USUAL,
    ):
        super().__init__(mean, sites)
        self.spread = spread

    def rate(self, layer: int, layers: int) -> float:
        depth = layer / (layers - 1) if layers > 1 else 0.5
        return self.mean * (1 + self.direction * self.spread * (1 - 2 * depth))


class DepthGrowth(DepthDecay):
    """p_l = mean (1 - spread (1 - 2u)): linear, higher in deep blocks, the reverse of DepthDecay.

    spread = 1 goes from 0 at the first block to p_L = 2 mean, as drop path does in timm and torchscale.
    """

    direction = -1.0


class Weighted(Uniform):
    """p_l = mean w_l / (mean of w over the blocks): the base of shapes given by weights w_l >= 0."""

    def weight(self, layer: int, layers: int) -> float:
        """w of block `layer` of `layers`, counted from 0; there are at least two."""
        raise NotImplementedError

    def rate(self, layer: int, layers: int) -> float:
        if layers == 1:
            return self.mean
        weights = [self.weight(i, layers) for i in range(layers)]
        return self.mean * weights[layer] * layers / math.fsum(weights)


class Cosine(Weighted):
    """w_l = 1 + spread cos(pi u): half a cosine from shallow to deep; a spread below 0 turns it over."""

    def __init__(self, mean: Probability = 0.1, spread: Spread = 1.0, sites: Sites = USUAL):
        super().__init__(mean, sites)
        self.spread = spread

    def weight(self, layer: int, layers: int) -> float:
        return 1 + self.spread * math.cos(math.pi * layer / (layers - 1))


class Geometric(Weighted):
    """w_l = ratio^u: the last block's rate is `ratio` times the first one's, each step a constant factor."""

    def __init__(self, mean: Probability = 0.1, ratio: Positive = 0.1, sites: Sites = USUAL):
        super().__init__(mean, sites)
        self.ratio = ratio

    def weight(self, layer: int, layers: int) -> float:
        return self.ratio ** (layer / (layers - 1))


class Step(Weighted):
    """w_l = 1 for the first `share` of the blocks (at least one, at most L - 1), `low` for the others."""

    def __init__(
        self,
        mean: Probability = 0.1,
        share: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.5,
        low: Probability = 0.0,
        sites: Sites = USUAL,
    ):
        super().__init__(mean, sites)
        self.share, self.low = share, low

    def weight(self, layer: int, layers: int) -> float:
        return 1.0 if layer < min(max(round(self.share * layers), 1), layers - 1) else self.low


class Triangle(Weighted):
    """w_l = 1 + spread (1 - 2 |2v - 1|), v = (l - 1/2) / L: up to the middle block and down; below 0 down and up."""

    def __init__(self, mean: Probability = 0.1, spread: Spread = 1.0, sites: Sites = USUAL):
        super().__init__(mean, sites)
        self.spread = spread

    def weight(self, layer: int, layers: int) -> float:
        return 1 + self.spread * (1 - 2 * abs((2 * layer + 1) / layers - 1))


class Huang(Weighted):
    """w_l = l / L: linear from p_L / L at the first block to p_L = mean 2L / (L + 1) at the last (stochastic depth:
    Huang et al. 2016, 1603.09382)."""

    def weight(self, layer: int, layers: int) -> float:
        return (layer + 1) / layers


class LayerSkip(Weighted):
    """w_l = 2^u - 1: from 0 at the first block, exponentially (LayerSkip: Elhoushi et al. 2024, 2404.16710)."""

    def weight(self, layer: int, layers: int) -> float:
        return 2 ** (layer / (layers - 1)) - 1


# --- over time -------------------------------------------------------------------------------------------------------


class Constant:
    """m(t) = 1: the factor on every rate at share t of the budget, given by its integral M(t), M(0) = 0, M(1) = 1."""

    def spent(self, t: float) -> float:
        """M(t)."""
        return t


class Varying(Constant):
    """The base of shapes over time that are not constant."""

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse a schedule of dropout where nothing is dropped."""
        if target_of(cfg.dropout._target_) is NoDropout:
            name = cfg.option("dropout_time")
            raise ConfigError(f"dropout_time={name} would do nothing: dropout=none drops nothing.")


Part = Annotated[float, Range(0, 1, open_low=True)]


class Early(Varying):
    """m(t) = 1 / until for t < until, then 0; linear: (2 / until) (1 - t / until) (Liu et al. 2023, 2303.01500)."""

    def __init__(self, until: Part = 0.2, shape: Literal["constant", "linear"] = "constant"):
        self.until, self.shape = until, shape

    def spent(self, t: float) -> float:
        s = min(t / self.until, 1.0)
        return s if self.shape == "constant" else s * (2 - s)


class Late(Varying):
    """m(t) = 0 for t < after, then 1 / (1 - after) (Liu et al. 2023, 2303.01500)."""

    def __init__(self, after: Probability = 0.2):
        self.after = after

    def spent(self, t: float) -> float:
        return max(t - self.after, 0.0) / (1 - self.after)


class Linear(Varying):
    """m(t) = 1 + spread (2t - 1): rises from 1 - spread to 1 + spread; falls where spread is below 0."""

    def __init__(self, spread: Spread = 1.0):
        self.spread = spread

    def spent(self, t: float) -> float:
        return t + self.spread * (t * t - t)


class Curriculum(Varying):
    """m(t) ~ 1 - exp(-gamma t), scaled to a mean of 1: from 0 up to a plateau (Morerio et al. 2017, 1703.06229)."""

    def __init__(self, gamma: Positive = 10.0):
        self.gamma = gamma

    def spent(self, t: float) -> float:
        def integral(s: float) -> float:
            return s + math.expm1(-self.gamma * s) / self.gamma

        return integral(t) / integral(1.0)


class Exponential(Varying):
    """m(t) ~ 2^t - 1, scaled to a mean of 1 (LayerSkip from scratch: Elhoushi et al. 2024, 2404.16710)."""

    def spent(self, t: float) -> float:
        return ((2**t - 1) / math.log(2) - t) / (1 / math.log(2) - 1)


def multiplier(time: Constant, step: int, steps: int) -> float:
    """Factor on every rate in step `step` of `steps`, from 0: the mean of m over it; their mean over steps is 1."""
    if type(time) is Constant:
        return 1.0
    return steps * (time.spent((step + 1) / steps) - time.spent(step / steps))


# --- masks -----------------------------------------------------------------------------------------------------------


def draw_dtype() -> torch.dtype:
    """The type of uniform draws: torch's default, which trainer.precision sets in training, but float32 at least.

    bfloat16 has too few digits for a rate: of draws of that type a share of 0.003 lies below 0.001."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class Clock:
    """Training progress that dropout masks are seeded from: run seed, micro-batch, rank and step.

    The training step sets it before each micro-batch, so a resumed run draws the same masks without saved generator
    states. factor: multiplier of every rate, by the schedule over time; 1 if no step was given.
    """

    def __init__(self, seed: int, time: Constant | None = None):
        self.seed, self.time = seed, time or Constant()
        self.set(0, 0)

    def set(self, micro_batch: int, rank: int, step: int = 0, steps: int = 0) -> None:
        """Move to a micro-batch (counted over the whole run) of optimizer step `step` of `steps`."""
        # hashed once per micro-batch and combined with each site's key by xor, so that no site has to hash anything
        self.salt = stream_seed(self.seed, "micro-batch", micro_batch, rank)
        self.micro_batch = micro_batch
        self.factor = multiplier(self.time, step, steps) if steps else 1.0


class Dropout(nn.Module):
    """x * mask / (1 - rate), mask ~ Bernoulli(1 - rate), in training; x in evaluation.

    The mask keeps an element where a uniform draw of the stream `dropout/<site>` is at least the rate: masks of one
    seed are nested across rates, and no site changes another site's draws. rate: its mean over time.
    """

    def __init__(self, rate: float, site: str, clock: Clock):
        super().__init__()
        self.rate, self.clock = rate, clock
        self.key = stream_seed(clock.seed, "dropout", site)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"

    @property
    def now(self) -> float:
        """The dropout rate at the current step: 0 in evaluation."""
        return self.rate * self.clock.factor if self.training else 0.0

    def seed_generator(self, device: torch.device) -> None:
        """Seed torch's default generator of `device` for this site and micro-batch.

        Not by torch.manual_seed, which is 100 times slower: it seeds every device."""
        # nothing restores the generator afterwards: whatever draws next seeds it first, too
        seed = self.key ^ self.clock.salt
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        elif device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        elif device.type != "meta":
            torch.manual_seed(seed)

    def attention_rate(self, device: torch.device) -> float:
        """The rate to hand to scaled_dot_product_attention, which draws the mask itself and ignores eval mode."""
        rate = self.now
        if rate:  # at 0 the kernel draws nothing
            self.seed_generator(device)
        return rate

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the mask, which is broadcast to x."""
        return tuple(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        rate = self.now
        return x if rate == 0 else x * self.mask(self.shape(x), x, rate)

    def mask(self, shape: tuple[int, ...], like: Tensor, rate: float) -> Tensor:
        """Draw a mask: 0 with probability `rate`, else 1 / (1 - rate)."""
        return self.fill_mask(torch.empty(shape, dtype=draw_dtype(), device=like.device), rate).to(like.dtype)

    def fill_mask(self, mask: Tensor, rate: float) -> Tensor:
        """Draw a mask into a tensor of `draw_dtype`; in place, since masks are as large as activations."""
        self.seed_generator(mask.device)
        return mask.uniform_().ge_(rate).mul_(1 / (1 - rate))


class DropPath(Dropout):
    """Dropout of all that x (B, T, D) holds of a sequence, rescaled by 1 / (1 - rate)."""

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return (len(x), 1, 1)


class DropToken(Dropout):
    """Dropout of rows of the embedding table, wherever their tokens stand, rescaled by 1 / (1 - rate)."""

    def rows(self, x: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
        """Drop embeddings x (B, T, D) by their `tokens` (B, T)."""
        rate = self.now
        # one draw per row of the table, so that a token is dropped at all its positions or at none
        return x if rate == 0 else x * self.mask((vocabulary, 1), x, rate)[tokens]


class DropHead(Dropout):
    """Dropout of heads: x (B, H, T, d) times mask H / (heads kept of the sequence), 0 where none is kept."""

    def forward(self, x: Tensor) -> Tensor:
        rate = self.now
        if rate == 0:
            return x
        # by the number of heads that were kept, not by 1 / (1 - rate), as DropHead does it
        keep = self.mask((*x.shape[:2], 1, 1), x, rate).ne(0).to(x.dtype)
        return x * (keep * (x.shape[1] / keep.sum(1, keepdim=True).clamp(min=1)))


class Skip(Dropout):
    """Stochastic depth: whether a block is skipped in this micro-batch, by a draw that all ranks share.

    The parameters of a block that is left out of a whole step have no gradient, so that no optimizer moves them: their
    weights do not decay in that step either.
    """

    def __init__(self, rate: float, site: str, clock: Clock, rescale: bool):
        super().__init__(rate, site, clock)
        self.rescale = rescale

    def skips(self) -> bool:
        """Whether the block is skipped in the current micro-batch."""
        rate = self.now
        # on the CPU and without the rank in the name: all ranks must skip alike, and no GPU has to be waited for
        return rate > 0 and stream_seed(self.key, "skip", self.clock.micro_batch) < rate * 2**63

    def forward(self, x: Tensor) -> Tensor:
        """Output of a sublayer; in evaluation times the share of micro-batches in which it took part, if `rescale`."""
        return x * (1 - self.rate) if self.rescale and not self.training and self.rate else x
