"""Several processes that train one run together: who they are, how they are started, how they agree.

The first rank alone holds the run's lock and writes its folder; the others follow its plan. Every decision that one
process could take alone (a signal, a commit that is due) is shared at the boundary between two steps.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

from albert_ablate.config import ConfigError
from albert_ablate.config.secrets import masked
from albert_ablate.records.signals import stops_handled

GRACE = 15  # seconds the other ranks have to end by themselves once one has died


class Ranks:
    """The processes of this run, seen from one of them; a single process by itself where size is 1."""

    def __init__(self, rank: int = 0, local: int = 0, size: int = 1, node: int = 0):
        self.rank, self.local, self.size, self.node = rank, local, size, node
        self.first = rank == 0

    def share(self, value: Any = None) -> Any:
        """The first rank's `value`, on all of them."""
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
        """Until all are here."""
        self.largest([0])

    def strategy(self, name: str, skips: bool) -> Any:
        """Lightning's: DDP unless sharding was asked for. Sharded checkpoints are gathered into one file.

        skips: blocks may be left out of a micro-batch, and DDP must not wait for their gradients."""
        if self.size == 1:
            return "auto"
        if name == "fsdp":
            return ModelParallelStrategy(
                data_parallel_size=self.size, tensor_parallel_size=1, save_distributed_checkpoint=False
            )
        return DDPStrategy(find_unused_parameters=skips)

    def environment(self) -> LightningEnvironment:
        """What Lightning has to know: nothing is to be launched, whatever scheduler it would find."""
        return _Here(self)


class _Here(LightningEnvironment):
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


def is_rank() -> bool:
    """Whether torchrun, SLURM or `launch` has started this process as one of several."""
    return _from_launcher() or _from_slurm()


def _from_launcher() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _from_slurm() -> bool:
    return SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1


def place(devices: int, nodes: int) -> Ranks:
    """This process's rank, as the environment tells it."""
    size = devices * nodes
    if _from_launcher():
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local, by = int(os.environ.get("LOCAL_RANK", rank)), "the launcher's WORLD_SIZE"
    else:
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
def joined(ranks: Ranks) -> Iterator[None]:
    """The process group, for as long as the run takes."""
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


def launch(cfg: Mapping, verbose: bool) -> dict[str, Any]:
    """Start one process a rank on this machine, wait for them, and give what the first one gave.

    Ctrl-C and SIGTERM are handed on. The ranks' standard input is a lifeline: when it ends, this process has died, and
    they stop at the next boundary, resumable. When one rank dies the others are ended.
    """
    size, nodes = cfg["trainer"]["devices"], cfg["trainer"]["num_nodes"]
    if nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes} needs a launcher that starts the processes of every node: srun python run.py "
            f"... under SLURM, or torchrun --nnodes={nodes} --nproc-per-node={size} run.py ... on each."
        )
    with tempfile.TemporaryDirectory(prefix="albert_ablate_") as scratch:
        answer = Path(scratch) / "answer.json"
        order = json.dumps({"cfg": cfg, "verbose": verbose, "answer": str(answer)}).encode() + b"\n"
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
        # Our own folder is first on the path, so that the ranks run what this process runs
        shared["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        children = []
        try:
            for rank in range(size):
                child = subprocess.Popen(
                    [sys.executable, "-m", "albert_ablate.training.ranks"],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which hands it on once
                )
                children.append(child)
                assert child.stdin is not None
                child.stdin.write(order)
                child.stdin.flush()

            def hand_on(number: int, frame: Any) -> None:
                for child in children:
                    child.send_signal(number)

            with stops_handled(hand_on):
                _wait(children)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
        return _answer(answer, children)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait(children: list[subprocess.Popen]) -> None:
    """Until all have ended; once one has failed, the others get GRACE seconds, then SIGKILL."""
    deadline = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.poll() for child in children):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)


def _answer(file: Path, children: list[subprocess.Popen]) -> dict[str, Any]:
    from albert_ablate.training.run import RunFailed

    said = json.loads(file.read_text()) if file.exists() else {}
    if "mistake" in said:
        raise ConfigError(said["mistake"])
    died = [f"rank {i} ended with {_ending(c.returncode)}" for i, c in enumerate(children) if c.returncode]
    if "failure" in said:
        raise RunFailed("; ".join([said["failure"], *died[1:]]))
    if "record" not in said:
        raise RunFailed(f"The run failed: {'; '.join(died)}. The same command goes on from its last commit.")
    return said["record"]


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work() -> int:
    """One rank: its order comes as the first line of standard input, whose end means that the launcher has died."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_lifeline, daemon=True).start()
    from albert_ablate.training.run import RunFailed, run

    first = os.environ["RANK"] == "0"
    said: dict[str, Any]
    try:
        said = {"record": run(order["cfg"], order["verbose"] and first)}
    except ConfigError as error:
        said = {"mistake": str(error)}
    except RunFailed as error:
        said = {"failure": str(error)}
        if not first:
            print(masked(str(error)), file=sys.stderr)
    if first:
        Path(order["answer"]).write_text(json.dumps(said))
    return 0 if "record" in said else 1


def _lifeline() -> None:
    while os.read(0, 4096):  # not by sys.stdin, whose lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_work())
