"""Stands in for CUDA graphs on a CPU: records the operations of a function and does them again on the same memory.

As with a CUDA graph, no Python of the function runs in a replay, numbers that it read from Python stay what they were,
and results lie where they lay. What a recording on a GPU refuses or draws differently is refused: random numbers,
values brought to the host, shapes that depend on values, tensors made of Python numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # draws where its rate is above 0
REFUSED_TAGS = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recording(TorchDispatchMode):
    """Notes every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.index.Tensor:
            refused = any(t is not None and t.dtype == torch.bool for t in args[1])
        elif func is ATTENTION:
            refused = any(args[3:4])
        else:
            refused = bool(REFUSED_TAGS & set(func.tags)) or func is torch.ops.aten.lift_fresh.default
        if refused:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        aliases = [r.alias_info for r in func._schema.returns]
        if all(a is not None and not a.is_write for a in aliases) and aliases:
            return out  # a view: it lies in the memory of what it is of
        fresh = results if all(a is None for a in aliases) else []  # else it has written into an argument
        self.operations.append((func, args, kwargs, fresh))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.operations:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(results, again[: len(results)], strict=True):
                if old.numel():
                    old.copy_(new)


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """In place of `albert_ablate.training.graph.recorded`."""
    work()  # as there: what is made once is made before
    recording = Recording()
    with recording:
        work()
    return recording.replay
