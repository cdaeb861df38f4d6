"""W&B's distributions: a parameter of a sweep, and its value at a cumulative probability."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from albert_ablate.streams import stream_seed

TAIL_PROBABILITY = 1e-6  # of the cumulative probability: the ends of a distribution


def _normal(u: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(u))


def _beta(u: float, a: float, b: float) -> float:
    from scipy.special import betaincinv

    return float(betaincinv(a, b, u))


def _between(u: float, low: float, high: float) -> float:
    return low + u * (high - low)


RANGE: dict[str, float | None] = {"min": None, "max": None}
NORMAL: dict[str, float | None] = {"mu": 0.0, "sigma": 1.0}
# W&B's distributions: their arguments with the defaults (None: required) and the value at which the cumulative
# probability is u. Each but the inverse ones has a form q_...: the value rounded to a multiple of q.
CONTINUOUS: dict[str, tuple[dict[str, float | None], Callable[..., float]]] = {
    "uniform": (RANGE, lambda u, min, max: _between(u, min, max)),
    "log_uniform": (RANGE, lambda u, min, max: math.exp(_between(u, min, max))),  # min and max are exponents
    "log_uniform_values": (RANGE, lambda u, min, max: math.exp(_between(u, math.log(min), math.log(max)))),
    "inv_log_uniform": (RANGE, lambda u, min, max: math.exp(-_between(1 - u, min, max))),
    "inv_log_uniform_values": (RANGE, lambda u, min, max: math.exp(_between(u, math.log(min), math.log(max)))),
    "normal": (NORMAL, lambda u, mu, sigma: mu + sigma * _normal(u)),
    "log_normal": (NORMAL, lambda u, mu, sigma: math.exp(mu + sigma * _normal(u))),
    "beta": ({"a": 1.0, "b": 1.0}, _beta),
}
QUANTIZED = {f"q_{name}": name for name in CONTINUOUS if not name.startswith("inv_")}


@dataclass(frozen=True)
class Parameter:
    """A key and what it may be: `values` (with `probabilities`, or equally likely), or a distribution's arguments."""

    name: str
    values: tuple = ()
    probabilities: tuple[float, ...] = ()
    distribution: str = ""
    arguments: Mapping[str, float] = field(default_factory=dict)

    def at(self, u: float) -> Any:
        """The value at which the cumulative probability is u, 0 < u < 1."""
        if self.values:
            shares = self.probabilities or [1 / len(self.values)] * len(self.values)
            passed = sum(u > total for total in itertools.accumulate(shares))
            return self.values[min(passed, len(self.values) - 1)]
        arguments = dict(self.arguments)
        if self.distribution == "int_uniform":
            low, high = int(arguments["min"]), int(arguments["max"])
            return min(high, low + math.floor(u * (high - low + 1)))
        q = arguments.pop("q", None)
        value = CONTINUOUS[QUANTIZED.get(self.distribution, self.distribution)][1](u, **arguments)
        if q is None:
            return value
        steps = round(value / q)
        return steps * q if isinstance(q, int) else float(f"{steps * q:.12g}")  # 0.3, not 0.30000000000000004

    def draw(self, index: int) -> Any:
        """The value of the sweep's run `index`: a function of the parameter as it is written, and of nothing else."""
        spec = [list(self.values), list(self.probabilities), self.distribution, dict(self.arguments)]
        seed = stream_seed(0, "sweep", self.name, json.dumps(spec), index)
        return self.at((seed + 0.5) / 2**63)
