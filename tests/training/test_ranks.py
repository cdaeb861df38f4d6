"""Several ranks train one run as one process would: the same losses and data, resumable whoever dies."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forking import Child, arguments, nano, outcome, rows, train, write_text

from albert_ablate import compose
from albert_ablate.config import ConfigError, checked_config
from albert_ablate.records.folder import RunFolder
from albert_ablate.training import launch, rank_main
from albert_ablate.training.checkpoint import load_checkpoint
from albert_ablate.training.errors import RunFailed
from albert_ablate.training.launch import is_first
from albert_ablate.training.ranks import Ranks, is_rank, rank_of_environment
from albert_ablate.training.recorder import Recorder
from albert_ablate.training.run import run

ROOT = Path(__file__).parents[2]
DDP = ("trainer=ddp_cpu", "budget.tokens=2048")  # 16 steps
FSDP = (*DDP, "trainer.strategy=fsdp")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(cfg, rank, port, at=None, act=None):
    """The run as one of two ranks, as torchrun starts it; `act` happens to this one once step `at` is taken."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    plain = Recorder.on_train_batch_end

    def watched(self, trainer, module, *args):
        plain(self, trainer, module, *args)
        if self.step == at:
            act()

    Recorder.on_train_batch_end = watched
    return run(cfg)


def together(cfg, at=None, act=None, struck=1):
    """What became of both ranks; `act` strikes one of them after step `at`."""
    port = free_port()
    children = [Child(lambda r=r: as_rank(cfg, r, port, at if r == struck else None, act)) for r in range(2)]
    return [child.wait() for child in children]


SGD = ("norm=deepnorm", "optimizer=sgd", "optimizer.lr=0.1", "clip.max_norm=0.5")
SOPHIA = ("data.accumulate=2", "clip=norm", "optimizer=sophia", "optimizer.interval=3", "optimizer.rho=1e3")


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """Once of each setting: what a single process gives."""
    return cache(lambda more: train(nano(text, tmp_path_factory.mktemp("one"), "budget.tokens=2048", *more)))


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    """The configuration and what both ranks gave of a run that a signal to the second one stopped after step 9."""
    cfg = nano(text, tmp_path_factory.mktemp("stopped"), *DDP)
    return cfg, together(cfg, 9, terminate)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        pytest.param(DDP, ("data.accumulate=2",), id="ddp-accumulate"),
        pytest.param(FSDP, ("data.accumulate=2",), id="fsdp-accumulate"),
        pytest.param(DDP, SGD, id="ddp-sgd", marks=pytest.mark.slow),
        pytest.param(FSDP, SGD, id="fsdp-sgd", marks=pytest.mark.slow),
        pytest.param(DDP, SOPHIA, id="ddp-sophia", marks=pytest.mark.slow),  # whose labels know nothing of ranks
    ],
)
def test_two_ranks_give_the_losses_of_one_process(alone, text, tmp_path, kind, more):
    one = alone(more)
    results = together(nano(text, tmp_path / "two", *more, *kind))
    assert [k for k, _ in results] == ["value", "value"]
    two = results[0][1]
    assert two["identity"] == one["identity"] and two["provenance"]["ranks"] == 2
    assert {k: two["proof"][k] for k in ("data_order", "initial_draws")} == {
        k: one["proof"][k] for k in ("data_order", "initial_draws")
    }
    for name, columns in {
        "steps": ["loss", "lr", "grad_norm", "clipped", "grad_norm_clipped", "logit_rms"],
        "evals": ["loss", "perplexity", "accuracy"],
        "layers": ["grad_norm", "weight_norm", "update_ratio", "clipped", "clip_ratio"],
    }.items():
        ours, theirs = rows(two["folder"], name), rows(one["folder"], name)
        assert ours.num_rows == theirs.num_rows > 0
        for column in columns:
            assert ours[column].to_pylist() == pytest.approx(
                theirs[column].to_pylist(), abs=1e-5, rel=1e-5, nan_ok=True
            ), column


@pytest.mark.process
@pytest.mark.parametrize("kind", [pytest.param(DDP, id="ddp"), pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_other_and_the_run_resumes(text, tmp_path, kind):
    """The second rank dies, and in the next session the first one."""
    more = ("dropout=uniform", "dropout.mean=0.2", *kind)
    whole = together(nano(text, tmp_path / "whole", *more))[0][1]
    cfg = nano(text, tmp_path / "cut", *more)
    (first, error), (second, number) = together(cfg, 7, kill)
    assert (second, number) == ("killed", signal.SIGKILL) and first == "error" and isinstance(error, RunFailed)
    folder = next((tmp_path / "cut").glob("*/seed0"))
    record = RunFolder(folder).record()
    assert record["status"] == "failed" and "Error" in record["error"] and record["progress"]["step"] <= 7
    assert [kind for kind, _ in together(cfg, 13, kill, struck=0)] == ["killed", "error"]
    done = together(cfg)[0][1]
    assert done["sessions"] == 3 and done["resumed_at"] == 12
    assert outcome(folder) == outcome(whole["folder"])


@pytest.mark.process
def test_a_signal_to_any_rank_stops_all_at_one_boundary(stopped):
    _, results = stopped
    assert [kind for kind, _ in results] == ["value", "value"]
    record = results[0][1]
    assert record["status"] == "stopped" and record["signal"] == signal.SIGTERM and record["progress"]["step"] == 9


@pytest.mark.process
def test_all_ranks_tell_of_an_unusable_checkpoint(stopped, tmp_path):
    cfg, _ = stopped
    shutil.copytree(cfg["paths"]["runs"], tmp_path, dirs_exist_ok=True, symlinks=True)
    file = next(tmp_path.glob("*/seed0/checkpoints/resume.ckpt"))
    kept = load_checkpoint(file)
    torch.save({**kept, "order": kept["order"][::-1]}, file)
    results = together({**cfg, "paths": {**cfg["paths"], "runs": str(tmp_path)}})
    assert [kind for kind, _ in results] == ["error", "error"]
    assert all(isinstance(e, ConfigError) and "another version" in str(e) for _, e in results)


@pytest.mark.process
def test_a_done_run_is_found_and_a_mistake_is_told_by_all_ranks(stopped):
    cfg, _ = stopped
    first = together(cfg)[0][1]
    assert first["resumed_at"] == 9 and first["status"] != "stopped"
    again = together(cfg)
    assert [value["found"] for _, value in again] == [True, True]
    assert run({**cfg, "trainer": {**cfg["trainer"], "devices": 1}})["found"], "the trainer is not part of identity"
    with RunFolder(Path(first["folder"])).lock():
        busy = together({**cfg, "force": True})
    assert [kind for kind, _ in busy] == ["error", "error"]
    assert all(isinstance(e, ConfigError) and "is being trained by" in str(e) for _, e in busy)


def command(*args):
    return subprocess.Popen(
        [sys.executable, "run.py", *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children_of(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def progress(runs, step, running=lambda: True):
    """Wait until the run has committed `step`."""
    deadline = time.monotonic() + 120
    while running() and time.monotonic() < deadline:
        for folder in runs.glob("*/seed0"):
            record = RunFolder(folder).record()
            if record and record.get("progress", {}).get("step", 0) >= step:
                return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


class Forked:
    """A rank as `launch` starts it, but forked from this process, so that it imports nothing anew."""

    def __init__(self, command, env, stdin, stdout, start_new_session):
        assert command[1:] == ["-m", launch.RANK_MAIN] == ["-m", rank_main.__name__] and start_new_session
        reader, writer = os.pipe()
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.close(writer)
                os.dup2(reader, 0)
                sys.stdin = open(0)
                os.environ.update(env)
                code = rank_main.main()
            finally:
                os._exit(code)
        os.close(reader)
        self.stdin = os.fdopen(writer, "wb")

    def poll(self, options=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        return self.poll(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_launcher_starts_its_ranks_and_hands_signals_on(text, tmp_path):
    cfg = nano(text, tmp_path, *DDP, "budget.tokens=400_000", "evaluation.every=1_000_000")

    def launched():
        launch.subprocess = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
        return run(cfg)

    for victim, step in (("a rank", 3), ("none", 8)):
        launcher = Child(launched)
        progress(tmp_path, step)
        children = children_of(launcher.pid)
        assert len(children) == 2
        if victim == "a rank":
            os.kill(children[1], signal.SIGKILL)
            kind, error = launcher.wait()
            assert kind == "error" and isinstance(error, RunFailed) and "rank 1 ended with SIGKILL" in str(error)
        else:
            launcher.kill(signal.SIGTERM)
            kind, record = launcher.wait()
            assert (kind, record["status"], record["signal"]) == ("value", "stopped", signal.SIGTERM)
            assert record["sessions"] == 2 and record["resumed_at"] >= 3
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_the_command_leaves_nobody_behind(text, tmp_path, victim):
    long = arguments(text, tmp_path / "runs", *DDP, "budget.tokens=400_000", "evaluation.every=1_000_000")
    process = command(*long)
    progress(tmp_path / "runs", 3, lambda: process.poll() is None)
    ranks = children_of(process.pid)
    os.kill(ranks[1] if victim == "a rank" else process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    if victim == "a rank":
        assert process.returncode == 1 and "rank 1 ended with SIGKILL" in err
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.1)
    process = command(*long)
    progress(tmp_path / "runs", 10, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "resumes from step" in out


# --- what cannot run here is composed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["trainer=ddp_cpu", "trainer.devices=3"],
            "data.batch=8 is not divisible into data.accumulate=1 micro-batches",
        ),
        (["trainer=fsdp", "clip=agc"], "clip=agc needs whole matrices, which trainer.strategy=fsdp splits"),
        (["trainer=fsdp", "model.shared=true"], "model.shared=true is not allowed with trainer.strategy=fsdp"),
        (["trainer.devices=0"], "trainer.devices=0 is not allowed: it must be -1 or a whole number at least 1"),
        (["trainer.strategy=deepspeed"], "must be auto or ddp or fsdp"),
    ],
)
def test_a_set_up_that_cannot_be_is_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        checked_config(given)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["trainer=ddp"], "torch finds no GPU"),
        (["trainer=fsdp"], "torch finds no GPU"),
        (["trainer=mps"], "torch finds no Apple GPU"),
        (["trainer.devices=-1", "trainer.accelerator=cpu"], "means all GPUs"),
        (["trainer=ddp_cpu", "trainer.num_nodes=2"], "srun python run.py"),
        (["trainer=ddp_cpu", "trainer.strategy=fsdp", "norm=rezero"], "single numbers"),
    ],
)
def test_a_missing_device_is_refused_before_there_is_a_folder(text, tmp_path, given, sentence):
    cfg = checked_config(arguments(text, tmp_path / "runs", *given))
    with pytest.raises(ConfigError, match=sentence):
        run(cfg)
    assert not list((tmp_path / "runs").glob("*/*"))


def test_slurm_and_torchrun_say_which_rank_this_is(monkeypatch):
    assert not is_rank()
    cfg = compose(["trainer=ddp_cpu", "trainer.num_nodes=2"])
    slurm = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    slurm |= {
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "node[07-08]",
        "SLURM_JOB_ID": "4711",
        "SLURM_NODEID": "1",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert is_rank() and not is_first(cfg) and is_first(compose([]))
    ranks = rank_of_environment(2, 2)
    assert (ranks.rank, ranks.local, ranks.size, ranks.node, ranks.first) == (3, 1, 4, 1, False)
    assert os.environ["MASTER_ADDR"] == "node07" and int(os.environ["MASTER_PORT"]) > 1024
    with pytest.raises(ConfigError, match="is 2, but SLURM's --ntasks is 4"):
        rank_of_environment(2, 1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)  # torchrun within a SLURM job
    assert rank_of_environment(2, 1).first and is_first(cfg)


def test_strategies_are_lightnings_own():
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    from albert_ablate.training.strategies import strategy_of

    assert strategy_of(Ranks(), "ddp", False) == "auto"
    assert isinstance(strategy_of(Ranks(1, 1, 8), "ddp", True), DDPStrategy)
    sharded = strategy_of(Ranks(1, 1, 8), "fsdp", False)
    assert isinstance(sharded, ModelParallelStrategy) and not sharded._save_distributed_checkpoint
