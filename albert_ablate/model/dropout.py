"""Dropout: how the rate lies over depth, and the site that draws the mask.

l = 1..L block, u = (l - 1) / (L - 1) its depth. Every schedule is given by its mean over the blocks and its shape, so
that schedules are compared at an equal mean. Sites outside the blocks (the embedding) take the mean.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from albert_ablate.config import ConfigError, Probability, Range
from albert_ablate.streams import stream_seed

Site = Literal["embedding", "attention", "residual", "hidden"]


class NoDropout:
    """p_l = 0."""

    mean = 0.0
    sites: Sequence[str] = ()

    def rate(self, depth: float) -> float:
        """Rate at depth u in [0, 1]."""
        return 0.0


class Uniform:
    """p_l = mean (Srivastava et al. 2014)."""

    def __init__(self, mean: Probability = 0.1, sites: tuple[Site, ...] = ("embedding", "residual")):
        self.mean, self.sites = mean, sites

    def rate(self, depth: float) -> float:
        return self.mean


class DepthDecay(Uniform):
    """p_l = mean (1 + spread (1 - 2u)): linear, higher in shallow blocks, as in the AlbertAGPT article.

    spread = 1 goes from twice the mean to 0; the mean over blocks is `mean` exactly.
    """

    direction = 1.0

    def __init__(
        self,
        mean: Probability = 0.1,
        spread: Annotated[float, Range(0, 1)] = 1.0,
        sites: tuple[Site, ...] = ("embedding", "residual"),
    ):
        super().__init__(mean, sites)
        self.spread = spread

    @staticmethod
    def verify(cfg: dict) -> None:
        mean, spread = cfg["dropout"]["mean"], cfg["dropout"]["spread"]
        if mean * (1 + spread) >= 1:
            raise ConfigError(
                f"dropout.mean={mean} with dropout.spread={spread} asks for a rate of {mean * (1 + spread):g} at one "
                "end: mean * (1 + spread) must be below 1."
            )

    def rate(self, depth: float) -> float:
        return self.mean * (1 + self.direction * self.spread * (1 - 2 * depth))


class DepthGrowth(DepthDecay):
    """p_l = mean (1 - spread (1 - 2u)): linear, higher in deep blocks, the reverse of DepthDecay."""

    direction = -1.0


class Clock:
    """What the dropout sites of a model need to know of the moment: the seed, the micro-batch and the rank.

    The training step advances it; a resumed run sets it, and no generator state has to be kept.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.set(0, 0)

    def set(self, micro_batch: int, rank: int) -> None:
        self.salt = stream_seed(self.seed, "micro-batch", micro_batch, rank)


class Dropout(nn.Module):
    """x * mask / (1 - rate), mask ~ Bernoulli(1 - rate), in training; x in evaluation.

    The mask keeps an element where a uniform draw of the stream `dropout/<site>` is at least the rate: masks of one
    seed are nested across rates, and no site moves another site's draws.
    """

    def __init__(self, rate: float, site: str, clock: Clock):
        super().__init__()
        self.rate, self.clock = rate, clock
        self.key = stream_seed(clock.seed, "dropout", site)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"

    def seed_generator(self, device: torch.device) -> None:
        """Put torch's default generator of `device` at this site's place in its stream (torch.manual_seed is 100 times
        slower, since it seeds every device)."""
        seed = self.key ^ self.clock.salt
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        elif device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        elif device.type != "meta":
            torch.manual_seed(seed)

    def attention_rate(self, device: torch.device) -> float:
        """The rate to hand to scaled_dot_product_attention, which draws the mask itself and ignores eval mode."""
        if not self.training or self.rate == 0:
            return 0.0
        self.seed_generator(device)
        return self.rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        self.seed_generator(x.device)
        # float32 draws whatever the precision: bfloat16 has too few digits for a rate
        mask = torch.rand(x.shape, device=x.device).ge_(self.rate).mul_(1 / (1 - self.rate))
        return x * mask.to(x.dtype)
