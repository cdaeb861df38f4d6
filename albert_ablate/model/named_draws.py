"""Initial draws from named streams for a module that draws its own: arms share what they have in common."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from albert_ablate.streams import digest, stream_seed


@contextmanager
def seeded_generators(seed: int, *name: object) -> Iterator[None]:
    """Within it torch's, numpy's and Python's global generators begin at the stream `name`; they are put back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        start = stream_seed(seed, *name)
        torch.manual_seed(start)
        np.random.seed(start % 2**32)
        random.seed(start)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Draws(TorchDispatchMode):
    """Notes the tensor that each random operation fills, or, with `names`, begins each at its own stream."""

    def __init__(self, seed: int, names: list[str] | None = None):
        super().__init__()
        self.seed, self.names, self.filled = seed, names, list[Tensor]()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        if self.names is not None:
            k = sum(self.counts.values())
            name = self.names[k] if k < len(self.names) else "unnamed"
            again = self.counts[name] = self.counts.get(name, 0) + 1
            torch.default_generator.manual_seed(stream_seed(self.seed, "init", name, again))
        out = func(*args, **(kwargs or {}))
        if self.names is None:
            self.filled.append(out if isinstance(out, Tensor) else out[0])
        return out


def drawn(make: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, dict[str, str]]:
    """The module that `make` gives, whose every random operation on a parameter begins at the stream `init/<its name>`;
    and the hash of each parameter that was drawn so.

    It is made twice: names are known only once the module is there. Draws that end in no parameter, such as those of an
    orthogonal matrix before its decomposition, have streams by their shape and their order among those.
    """
    with seeded_generators(seed, "init"):
        with _Draws(seed) as first:
            module = make()
        owner = {p.untyped_storage()._cdata: name for name, p in module.named_parameters()}
        names = [owner.get(t.untyped_storage()._cdata) or f"shape {tuple(t.shape)}" for t in first.filled]
        del module, first
    with seeded_generators(seed, "init"), _Draws(seed, names):
        module = make()
    parameters = dict(module.named_parameters())
    return module, {n: value_hash(parameters[n]) for n in dict.fromkeys(names) if n in parameters}


def value_hash(tensor: Tensor) -> str:
    """Hash of a tensor's values."""
    return digest(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
