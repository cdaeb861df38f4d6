"""Start one process per device of this machine for a distributed run, and wait for them. No torch here.

The module that each process runs is named as a string, RANK_MAIN, so that this file does not import what it starts.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.records.signals import stops_handled
from albert_ablate.training.errors import RunFailed

RANK_MAIN = "albert_ablate.training.rank_main"
GRACE_SECONDS = 15  # time that the other ranks have to end by themselves once one has died


def is_first(cfg: Mapping) -> bool:
    """Whether this process prints for its run: a single process, or rank 0 of those that torchrun or SLURM started."""
    several = cfg["trainer"]["devices"] * cfg["trainer"]["num_nodes"] != 1
    return not several or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def launch(cfg: Mapping, verbose: bool) -> dict[str, Any]:
    """Start one process per rank on this machine, wait for all, and return the record that rank 0 answers.

    Ctrl-C and SIGTERM are passed on to the ranks. Their standard input is a pipe from this process: if this process
    dies the pipe ends, and they stop at the next boundary between steps, resumable. If one rank dies the others are
    ended, since they would wait for it in the next collective operation.
    """
    size, nodes = cfg["trainer"]["devices"], cfg["trainer"]["num_nodes"]
    if nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes} needs a launcher that starts the processes of every node: srun python run.py "
            f"... under SLURM, or torchrun --nnodes={nodes} --nproc-per-node={size} run.py ... on each."
        )
    with tempfile.TemporaryDirectory(prefix="albert_ablate_") as scratch:
        answer = Path(scratch) / "answer.json"
        task = json.dumps({"cfg": cfg, "verbose": verbose, "answer": str(answer)}, default=dict).encode() + b"\n"
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
        # this package's folder comes first on the path, so that the ranks run the code that this process runs
        shared["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        children: list[subprocess.Popen] = []
        try:
            for rank in range(size):
                child = subprocess.Popen(
                    [sys.executable, "-m", RANK_MAIN],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,  # kept open: its end tells the rank that this process has died
                    stdout=None if rank == 0 else subprocess.DEVNULL,  # one banner and one progress bar, not several
                    start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on once
                )
                children.append(child)
                assert child.stdin is not None
                # by the pipe and not as an argument: a configuration may hold a password, and arguments are public
                child.stdin.write(task)
                child.stdin.flush()

            def pass_on(number: int, frame: Any) -> None:
                for child in children:
                    child.send_signal(number)

            with stops_handled(pass_on):
                _wait(children)
        finally:
            # whatever was raised here, no rank may outlive this call: it would hold the run's lock
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
        return _record_of(answer, children)


def _free_port() -> int:
    # free now; another process may take it before rank 0 listens there, and then the run fails and can be repeated
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait(children: list[subprocess.Popen]) -> None:
    """Wait until all have ended; once one has failed, the others get GRACE_SECONDS, then SIGKILL."""
    deadline = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.poll() for child in children):  # an exit code that is neither None nor 0
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)


def _record_of(answer: Path, children: list[subprocess.Popen]) -> dict[str, Any]:
    """The record in rank 0's answer file; raises the error that it holds instead, or RunFailed if a rank died."""
    answered = json.loads(answer.read_text()) if answer.exists() else {}
    if "mistake" in answered:
        raise ConfigError(answered["mistake"])
    # a rank that fails takes the others with it, so rank 0's answer, if there is one, may only be the consequence
    died = [f"rank {i} ended with {_ending(c.returncode)}" for i, c in enumerate(children) if c.returncode]
    if "failure" in answered:
        raise RunFailed("; ".join([answered["failure"], *died[1:]]))
    if "record" not in answered:
        raise RunFailed(f"The run failed: {'; '.join(died)}. The same command continues from its last commit.")
    return answered["record"]


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
