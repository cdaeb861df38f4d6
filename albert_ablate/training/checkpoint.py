"""Atomic checkpoint files that hold nothing but tensors and plain values."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from albert_ablate.model.weights import load_checkpoint
from albert_ablate.records.atomic import replace_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint reader and writer: temporary file, fsync, rename; loads without unpickling anything.

    run: identity of the run, stored in each checkpoint, so that another run's is not loaded by mistake."""

    def __init__(self, run: str = ""):
        super().__init__()
        self.run = run

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            replace_file(Path(path), lambda file: torch.save({**checkpoint, "run": self.run}, file))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, behind what torch's zip writer makes of it
                raise error.__context__ from None
            raise

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(Path(path), self.run)
