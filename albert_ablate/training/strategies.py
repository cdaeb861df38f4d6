"""Lightning's strategy and cluster environment for processes that are already started (see ranks.py)."""

import logging
import warnings
from typing import Any

from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

from albert_ablate.training.ranks import Ranks


def strategy_of(ranks: Ranks, name: str, skips_blocks: bool) -> Any:
    """Lightning's strategy: DDP, or with name "fsdp" sharding, whose checkpoints are gathered into one file.

    skips_blocks: dropout may leave blocks out of a micro-batch, and DDP must not wait for their gradients."""
    if ranks.size == 1:
        return "auto"
    if name == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=ranks.size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy(find_unused_parameters=skips_blocks)


class StartedRanks(LightningEnvironment):
    """Tells Lightning which rank this process is, and to start none, whatever scheduler it would detect."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self.ranks.size

    def global_rank(self) -> int:
        return self.ranks.rank

    def local_rank(self) -> int:
        return self.ranks.local

    def node_rank(self) -> int:
        return self.ranks.node


def quiet_lightning() -> None:
    """Silence Lightning's remarks on workers, logging and devices, which do not apply to this set-up."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
