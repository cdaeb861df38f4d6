"""Does everything that a GPU takes part in do there what it does on a CPU? One command, one Markdown file.

    python benchmarks/gpu.py [-o gpu.md] [--limit 540] [--only CHECK ...]

Each check trains small runs on the GPU and compares them with the CPU or with each other; `pytest -m gpu` runs the same
ones. Without a GPU those that need none run on the CPU, and the file says what was skipped. After --limit seconds no
further check begins. Prepared, and not yet run on a GPU: so far only its way on a CPU has been tried.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
NANO = ("model=nano", "norm=pre_ln", "budget.tokens=20_000", "evaluation.every=10_000", "trainer.threads=1")
LOSS_TOLERANCE = 1e-3  # relative, of a validation loss after 40 steps in 32 bits
STEP_TOLERANCE = 1e-3  # median difference of a weight's change in one step, over the largest change
LOW_PRECISION = 0.03  # relative, of a validation loss in 16 bits


class Skipped(Exception):
    """This machine cannot do the check, with the reason."""


def here() -> str:
    return "gpu" if torch.cuda.is_available() else "cpu"


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise Skipped("torch finds no GPU")


def trained(runs: Path, *overrides: str, device: str | None = None) -> dict[str, Any]:
    """The record of a run that finished."""
    from albert_ablate import compose, run

    record = run(compose([*NANO, f"trainer={device or here()}", f"paths.runs={runs}", *overrides]))
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


def resume(runs: Path) -> str:
    """Killed by SIGKILL after a commit and begun again: the weights of a run that was left alone."""
    more = ("trainer.deterministic=true", "dropout=uniform", "budget.tokens=60_000")
    whole = trained(runs / "whole", *more)
    command = [sys.executable, "run.py", *NANO, f"trainer={here()}", *more, f"paths.runs={runs / 'killed'}"]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    commits = set[int]()  # the first is of step 0
    while process.poll() is None and len(commits) < 2:
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
    return f"{found / 2**30:.2f} GiB, {found / expected:.2f} of the estimate"


def diagnostics(runs: Path) -> str:
    phases = trained(runs, "model=mini", "budget.tokens=60_000")["cost"]["phases"]
    whole = sum(phases[p] for p in ("data", "forward", "backward", "optimizer", "diagnostics"))
    return f"{phases['diagnostics'] / whole:.1%} of the training time"


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
        if torch.cuda.is_available():
            other, _ = one_step(cfg, "cuda")
            # the median: an optimizer that takes signs turns round what was near 0
            differences = torch.cat([(moved[n] - other[n]).abs().flatten() for n in moved])
            distance = float(differences.median()) / largest if largest else 0.0
            worst = max(worst, (arm, distance), key=lambda w: w[1])
            assert distance <= STEP_TOLERANCE, f"{arm}: weights move {distance:.1e} of the largest move apart"
    if not torch.cuda.is_available():
        return f"{len(arms)} first steps are finite on the CPU; none was compared, torch finds no GPU"
    return f"{len(arms)} first steps, at most {worst[1]:.1e} of the largest move apart ({worst[0]})"


def one_device(strategy: str) -> Callable[[Path], str]:
    def check(runs: Path) -> str:
        need_gpu()
        command = [sys.executable, "run.py", *NANO, f"trainer={strategy}", "trainer.devices=1", f"paths.runs={runs}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (file,) = runs.glob("*/seed0/record.json")
        return close(json.loads(file.read_text()), trained(runs / "alone"), LOSS_TOLERANCE)

    return check


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
    "ddp, one device": one_device("ddp"),
    "fsdp, one device": one_device("fsdp"),
    "generation": generation,
}


def machine() -> str:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{card}; torch {torch.__version__}, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which no check begins")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS], metavar="CHECK")
    given = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what trainer.deterministic asks of cuBLAS
    begun, lines, broken = time.perf_counter(), [f"# Checks on {machine()}", "", "| check | result | s |"], 0
    lines.append("| --- | --- | --- |")
    for name in given.only:
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
