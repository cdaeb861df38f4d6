"""The ranks (processes) of a distributed run: which one this is, collective operations, the process group.

Rank 0 alone holds the run's lock and writes its folder; the others follow its plan. Every decision that one process
could take alone (a signal, a commit that is due) is shared at the boundary between two steps.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from albert_ablate.config import ConfigError


class Ranks:
    """The processes of this run, seen from one of them; size 1: a single process without a process group.

    rank: global, from 0. local: among the processes of this machine. node: number of this machine. first: rank 0.
    """

    def __init__(self, rank: int = 0, local: int = 0, size: int = 1, node: int = 0):
        self.rank, self.local, self.size, self.node = rank, local, size, node
        self.first = rank == 0

    def share(self, value: Any = None) -> Any:
        """Broadcast: rank 0's `value`, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def largest(self, values: Sequence[int]) -> list[int]:
        """Element by element, the largest over the ranks."""
        if self.size == 1:
            return list(values)
        both = torch.tensor(values)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return both.tolist()

    def means(self, values: Sequence[float]) -> list[float]:
        """Element by element, the mean over the ranks, the same bits on each."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def wait(self) -> None:
        """Barrier: return once all ranks are here."""
        self.largest([0])


def is_rank() -> bool:
    """Whether torchrun, SLURM or `launch` has started this process as one of several."""
    return _from_launcher() or _from_slurm()


def _from_launcher() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _from_slurm() -> bool:
    # imported here: a process that only starts ranks, or finds a done run, needs no Lightning
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    return SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1


def rank_of_environment(devices: int, nodes: int) -> Ranks:
    """This process's rank, from the environment variables of torchrun, `launch` or SLURM.

    devices: per node. Raises ConfigError where devices x nodes is not the number of processes that were started.
    """
    size = devices * nodes
    if _from_launcher():
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local, by = int(os.environ.get("LOCAL_RANK", rank)), "the launcher's WORLD_SIZE"
    else:
        from pytorch_lightning.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
        rank, world, local, by = slurm.global_rank(), slurm.world_size(), slurm.local_rank(), "SLURM's --ntasks"
        os.environ.setdefault("MASTER_ADDR", slurm.main_address)
        os.environ.setdefault("MASTER_PORT", str(slurm.main_port))
    if world != size:
        raise ConfigError(
            f"trainer.devices times trainer.num_nodes is {size}, but {by} is {world}: they must be the same."
        )
    return Ranks(rank, local, world, rank // devices)


@contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
    """Initialize torch's process group for the duration of the run; does nothing for a single process."""
    if ranks.size == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.size)
    try:
        yield
    finally:
        dist.destroy_process_group()
