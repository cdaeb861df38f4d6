"""A model's weights: whole, hashed, and read from a checkpoint. Lightning is not imported here."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from albert_ablate.streams import digest


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents on the CPU; refuses anything that would have to be unpickled."""
    return torch.load(path, map_location="cpu", weights_only=True)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights, whole where ranks hold shards of them: then all ranks must ask."""
    return {name: _whole(value) for name, value in model.state_dict().items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_hash(model: nn.Module) -> str:
    """Hash of all parameters and buffers (running statistics), each in the order of their names."""
    named = [*sorted(model.named_parameters()), *sorted(model.named_buffers())]
    values = (_whole(p.detach()).cpu().reshape(-1) for _, p in named)
    return digest(*(v.view(torch.uint8).numpy().tobytes() for v in values))
