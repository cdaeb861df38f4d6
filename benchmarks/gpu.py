"""Does everything that a GPU takes part in do there what it does on a CPU? One command, one Markdown file.

    python benchmarks/gpu.py [-o gpu.md] [--device gpu|cpu] [--quick] [--limit 540] [--only CHECK ...]

Each check trains small runs on the device and compares them with the CPU or with each other; `pytest -m gpu` runs the
same ones. --device is the GPU where torch finds one; on a CPU the checks that need a GPU are skipped, and the file says
so. --quick leaves out what compiles or measures speed. After --limit seconds no further check begins. Prepared, and not
yet run on a GPU: so far only its way on a CPU has been tried.
"""

import argparse
import copy
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parent.parent
NANO = ("model=nano", "norm=pre_ln", "budget.tokens=20_000", "evaluation.every=10_000", "trainer.threads=1")
LOSS_TOLERANCE = 1e-3  # relative, of a validation loss after 40 steps in 32 bits
STEP_TOLERANCE = 1e-3  # median difference of a weight's change in one step, over the largest change
LOW_PRECISION = 0.03  # relative, of a validation loss in 16 bits
GRAPH_TOLERANCE = 1e-5  # relative, of a validation loss by replayed steps
MEMORY_FACTOR = 2  # the estimate, or what was taken, is at most so many times the other
GRAPH = "trainer.graph=true"
SPEED = 0.95  # of the fastest peer's tokens a second
DEVICE = "gpu" if torch.cuda.is_available() else "cpu"  # main sets it


class Skipped(Exception):
    """This machine cannot do the check, with the reason."""


def need_gpu() -> None:
    if DEVICE != "gpu":
        raise Skipped("it needs a GPU")


def trained(runs: Path, *overrides: str, device: str | None = None) -> dict[str, Any]:
    """The record of a run that finished; of two values for a key the last counts."""
    from albert_ablate import compose, run

    given = dict(o.split("=", 1) for o in (*NANO, f"trainer={device or DEVICE}", f"paths.runs={runs}", *overrides))
    record = run(compose([f"{key}={value}" for key, value in given.items()]))
    assert record["status"] == "finished", f"{overrides} ended {record['status']}"
    return record


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Relative distance of two validation losses."""
    return abs(a["summary"]["val_loss"] / b["summary"]["val_loss"] - 1)


def close(a: dict[str, Any], b: dict[str, Any], most: float) -> str:
    found = apart(a, b)
    assert found <= most, f"validation losses are {found:.1e} apart, {most:g} is allowed"
    return f"validation losses {found:.1e} apart"


def losses(runs: Path) -> str:
    need_gpu()
    rate = ("dropout=none",)  # masks are drawn by the device's own generator
    return close(trained(runs / "gpu", *rate, device="gpu"), trained(runs / "cpu", *rate, device="cpu"), LOSS_TOLERANCE)


def resume(runs: Path, *further: str) -> str:
    """Killed by SIGKILL after a commit and begun again: the weights of a run that was left alone."""
    more = ("trainer.deterministic=true", "dropout=uniform", *further, "budget.tokens=40_000")
    whole = trained(runs / "whole", *more)
    command = [
        sys.executable,
        "run.py",
        *NANO,
        f"trainer={DEVICE}",
        *more,
        f"paths.runs={runs / 'killed'}",
        "checkpoint.seconds=0",
    ]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    commits = set[int]()  # the first is of step 0, later ones follow each step
    while process.poll() is None and len(commits) < 6:
        commits |= {f.stat().st_mtime_ns for f in (runs / "killed").glob("*/seed0/checkpoints/resume.ckpt")}
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = trained(runs / "killed", *more)
    assert again["resumed_at"], "it began anew"
    assert again["sessions"] == 2, f"{again['sessions']} sessions, not 2"
    assert again["proof"]["final_weights"] == whole["proof"]["final_weights"], "the weights differ"
    return f"same weights, resumed at step {again['resumed_at']}"


def bfloat16(runs: Path) -> str:
    return close(trained(runs, "trainer.precision=bf16-mixed"), trained(runs), LOW_PRECISION)


def resume_graph(runs: Path) -> str:
    need_gpu()
    return resume(runs, GRAPH)


def graph(runs: Path) -> str:
    """Replayed steps against ordinary ones: dropout at a rate that changes, several micro-batches, clipping."""
    need_gpu()
    more = ("dropout=depth_decay", "dropout_time=linear", "data.accumulate=2", "diagnostics.every=10")
    replayed, eager = (trained(runs, *more, kind) for kind in (GRAPH, "trainer.graph=false"))
    same = replayed["proof"]["final_weights"] == eager["proof"]["final_weights"]
    found = close(replayed, eager, GRAPH_TOLERANCE)
    in_bf16 = [trained(runs, *more, "trainer.precision=bf16-mixed", kind) for kind in (GRAPH, "trainer.graph=false")]
    return (
        f"{found}, weights {'the same' if same else 'not the same'} bit for bit; bf16: {close(*in_bf16, LOW_PRECISION)}"
    )


def pace(runs: Path, *overrides: str, steps: int = 60) -> float:
    """Tokens a second of a run without its first quarter, diagnostics and records included."""
    from albert_ablate import compose
    from albert_ablate.records.history import read_history

    cfg = compose([*NANO[1:2], *overrides])
    few = ("evaluation.tokens=1024", "evaluation.every=1_000_000_000", "checkpoint.seconds=1_000")
    budget = f"budget.tokens={steps * cfg.data.batch * cfg.model.context}"
    record = trained(runs, *overrides, *few, budget)
    rows = read_history(Path(record["folder"]), "steps", None).to_pydict()
    tokens, seconds = (rows[axis][-1] - rows[axis][steps // 4] for axis in ("tokens", "seconds"))
    return tokens / seconds


def graph_pace(runs: Path, models: tuple[str, ...] = ("nano", "mini", "deep_96"), steps: int = 60) -> str:
    """Tokens a second with graphs, compiled, and both, over those of neither; three runs of each, in turns."""
    need_gpu()
    kinds = {"graph": [GRAPH], "compile": ["trainer.compile=true"]}
    kinds["both"] = [*kinds["graph"], *kinds["compile"]]
    found = []
    for model in models:
        paces: dict[str, list[float]] = {}
        for turn in range(3):
            for kind, more in {"neither": [], **kinds}.items():
                each = (f"model={model}", *more, f"seed={turn}")
                paces.setdefault(kind, []).append(pace(runs / model, *each, steps=steps))
        middle = {kind: statistics.median(values) for kind, values in paces.items()}
        times = ", ".join(f"{kind} {middle[kind] / middle['neither']:.2f}" for kind in kinds)
        found.append(f"{model} {middle['neither']:,.0f} tokens/s, {times}")
    return "; ".join(found)


def beside_peers(runs: Path, model: str = "gpt2_small", steps: int = 100, rounds: int = 8) -> str:
    """A whole run in bf16, diagnostics included, against bare steps of others' models of its shape (peers.py)."""
    need_gpu()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from peers import measure
    finally:
        sys.path.pop(0)
    more = (f"model={model}", "data.batch=8", "dropout=none", "trainer.precision=bf16-mixed", "diagnostics.every=25")
    device = "cuda" if DEVICE == "gpu" else "cpu"
    heads = torch.randn(8, 12, 1024, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where attention of this shape cannot be a flash kernel
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    ours = pace(runs, *more, steps=steps)
    peers = measure(model, rounds, 8, None, device, "bf16")
    fastest = max((name for name in peers if name not in ("ours", "products")), key=lambda n: peers[n]["tokens/s"])
    share = ours / peers[fastest]["tokens/s"]
    found = f"{ours:,.0f} tokens/s, {share:.2f} of the fastest peer ({fastest})"
    assert share >= SPEED, found
    return found


def float16(runs: Path) -> str:
    need_gpu()
    return close(trained(runs, "trainer.precision=16-mixed"), trained(runs), LOW_PRECISION)


def compiled(runs: Path) -> str:
    from albert_ablate.config import ConfigError

    try:
        return close(trained(runs, "trainer.compile=true"), trained(runs), LOSS_TOLERANCE)
    except ConfigError as error:
        raise Skipped(str(error)) from None


def checkpointing(runs: Path) -> str:
    a, b = trained(runs, "trainer.gradient_checkpointing=true"), trained(runs / "kept")
    return close(a, b, LOSS_TOLERANCE)


def memory(runs: Path) -> str:
    """Peak memory of a GPU against the estimate; at a size where its parts outweigh torch's own."""
    need_gpu()
    from albert_ablate import compose
    from albert_ablate.training.cost import memory as estimate

    size = ("model=mini", "model.width=512", "model.heads=8", "data.batch=32")
    expected = sum(estimate(compose([*NANO, *size])).values())
    found = trained(runs, *size, "diagnostics.every=0")["cost"]["peak_memory_bytes"]
    taken = f"{found / 2**30:.2f} GiB, {found / expected:.2f} of the estimate"
    assert 1 / MEMORY_FACTOR <= found / expected <= MEMORY_FACTOR, taken
    return taken


def diagnostics(runs: Path) -> str:
    phases = trained(runs, "model=mini", "budget.tokens=60_000", "diagnostics.every=25")["cost"]["phases"]
    whole = sum(phases[p] for p in ("data", "forward", "backward", "optimizer", "diagnostics"))
    return f"{phases['diagnostics'] / whole:.1%} of the training time, one step in 25 being measured"


def one_step(cfg: Any, device: str) -> tuple[dict[str, torch.Tensor], float]:
    """What each weight moved by in the arm's first step on `device`, and the largest of it."""
    from albert_ablate import build_model
    from albert_ablate.config import construct
    from albert_ablate.model.build import build
    from albert_ablate.model.loss import objective
    from albert_ablate.optim.clipping import global_norm
    from albert_ablate.optim.groups import decay_groups

    model = build_model(cfg).train().to(device)
    before = copy.deepcopy(model.state_dict())
    optimizer, clip = build(cfg.optimizer, decay_groups(model), True), build(cfg.clip)
    named, given = list(model.named_parameters()), []
    model.register_forward_hook(lambda module, inputs, output: given.append(output))
    rows = torch.randint(256, (4, cfg.model.context + 1), generator=torch.Generator().manual_seed(0)).to(device)
    total, plain = objective(construct(cfg.loss), model, rows)
    if getattr(optimizer, "due", False):
        uniform = torch.rand(rows[:, 1:].shape, generator=torch.Generator().manual_seed(0))
        optimizer.sample(given[-1], uniform)
    total.backward()
    with torch.no_grad():
        clip(named, global_norm([p.grad for _, p in named])[0], plain.detach())
    optimizer.step()
    moved = {name: (p.detach() - before[name]).cpu() for name, p in named}
    return moved, max(float(m.abs().max()) for m in moved.values())


def optimizers_and_clips(runs: Path) -> str:
    """The first step of every optimizer and every clipping rule: the same on both devices, or on the CPU finite."""
    from albert_ablate import compose
    from albert_ablate.config.folders import options

    worst, arms = ("", 0.0), [f"{group}={name}" for group in ("optimizer", "clip") for name in options()[group]]
    for arm in arms:
        cfg = compose([*NANO, arm, "schedule=constant"])  # which every optimizer allows
        moved, largest = one_step(cfg, "cpu")
        assert all(m.isfinite().all() for m in moved.values()), f"{arm}: a weight is not finite"
        if DEVICE == "gpu":
            other, _ = one_step(cfg, "cuda")
            # the median: an optimizer that takes signs turns round what was near 0
            differences = torch.cat([(moved[n] - other[n]).abs().flatten() for n in moved])
            distance = float(differences.median()) / largest if largest else 0.0
            worst = max(worst, (arm, distance), key=lambda w: w[1])
            assert distance <= STEP_TOLERANCE, f"{arm}: weights move {distance:.1e} of the largest move apart"
    if DEVICE != "gpu":
        return f"{len(arms)} first steps are finite on the CPU; a GPU was not compared with it"
    return f"{len(arms)} first steps, at most {worst[1]:.1e} of the largest move apart ({worst[0]})"


def one_rank(strategy: str, runs: Path) -> str:
    """Lightning's strategy for several devices with one of them: `run` itself takes none for a single device."""
    import torch.distributed as dist
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    from albert_ablate.training import fit, language

    sharded = strategy == "fsdp"
    made = (
        ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
        if sharded
        else DDPStrategy()
    )
    module = language.LanguageModel
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if DEVICE == "gpu" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        with (
            patch.object(fit, "strategy_of", lambda *_: made),
            patch.object(language, "LanguageModel", lambda model, cfg, steps, **_: module(model, cfg, steps, sharded)),
        ):
            record = trained(runs / strategy, "clip=norm")
    finally:
        dist.destroy_process_group()
    return close(record, trained(runs / "alone", "clip=norm"), LOSS_TOLERANCE)


def generation(runs: Path) -> str:
    """The same text twice from a run that was trained here."""
    folder = trained(runs)["folder"]
    command = [sys.executable, "-m", "albert_ablate.cli", "generate", str(folder), "--tokens", "40"]
    texts = [subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout for _ in range(2)]
    assert texts[0] == texts[1] and texts[0], "another text the second time"
    return "the same 40 tokens twice"


CHECKS: dict[str, Callable[[Path], str]] = {
    "losses, CPU against GPU": losses,
    "exact resume after SIGKILL": resume,
    "bf16-mixed": bfloat16,
    "16-mixed": float16,
    "compile": compiled,
    "gradient checkpointing": checkpointing,
    "memory against the estimate": memory,
    "share of the diagnostics": diagnostics,
    "optimizers and clips": optimizers_and_clips,
    "ddp, one device": partial(one_rank, "ddp"),
    "fsdp, one device": partial(one_rank, "fsdp"),
    "generation": generation,
    "graph": graph,
    "exact resume after SIGKILL, graph": resume_graph,
    "GPT-2 small in bf16 beside peers": beside_peers,
    "speed with graph and compile": graph_pace,
}
LONG = ("compile", "share of the diagnostics", "GPT-2 small in bf16 beside peers", "speed with graph and compile")


def machine() -> str:
    card = torch.cuda.get_device_name() if DEVICE == "gpu" else f"a CPU ({platform.machine()}, {os.cpu_count()} cores)"
    return f"{card}; torch {torch.__version__}, Python {platform.python_version()}"


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--device", choices=("gpu", "cpu"), default=DEVICE)
    parser.add_argument("--quick", action="store_true", help="leave out what compiles or measures speed")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which no check begins")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS], metavar="CHECK")
    given = parser.parse_args()
    if given.device == "gpu" and not torch.cuda.is_available():
        parser.error("--device gpu: torch finds no GPU")
    DEVICE = given.device
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what trainer.deterministic asks of cuBLAS
    begun, lines, broken = time.perf_counter(), [f"# Checks on {machine()}", "", "| check | result | s |"], 0
    lines.append("| --- | --- | --- |")
    for name in (n for n in given.only if not (given.quick and n in LONG)):
        at, folder = time.perf_counter(), Path(tempfile.mkdtemp())
        try:
            if at - begun > given.limit:
                raise Skipped(f"{given.limit:g} s had passed")
            found = CHECKS[name](folder)
        except Skipped as reason:
            found = f"skipped: {reason}"
        except Exception as error:
            broken += 1
            found = f"**failed**: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        lines.append(f"| {name} | {found} | {time.perf_counter() - at:.1f} |")
        print(lines[-1], flush=True)
        given.output.write_text("\n".join(lines) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
