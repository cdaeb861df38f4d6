"""A model's weights: whole, hashed, and read from a checkpoint. Lightning is not imported here."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from albert_ablate.streams import digest


class Damaged(ValueError):
    """A file that was changed after it was written."""


def load_checkpoint(path: Path, run: str | None = None) -> dict[str, Any]:
    """A checkpoint's contents on the CPU; refuses anything that would have to be unpickled. run: the identity of the
    run whose it must be; older releases did not write whose a checkpoint is.

    torch writes a zip file with a CRC-32 of every tensor, and does not look at it when it reads: this does. Raises
    Damaged where one differs, where the file is not whole, and where it belongs to another run.
    """
    try:
        with zipfile.ZipFile(path) as content:
            spoilt = content.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile has many for a header that was overwritten
        raise Damaged(f"it is damaged: {str(error).rstrip('.') or type(error).__name__}") from None
    if spoilt is not None:
        raise Damaged(f"it is damaged: {spoilt} does not match its checksum")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    whose = checkpoint.get("run") if isinstance(checkpoint, dict) else None
    if run and whose and whose != run:
        raise Damaged(f"it is that of another run, {whose}")
    return checkpoint


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
