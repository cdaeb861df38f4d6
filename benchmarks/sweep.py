"""What a sweep costs beside its training: warm workers against a process a run, the share of scheduling, a worker's
memory over many runs, and how long `status` and the resume scan take over many run folders.

    python benchmarks/sweep.py [throughput|overhead|memory|scan] [--runs 64] [--sample 6] [--model nano]

Ratios are taken side by side: a sweep and a sample of single processes alternate. CPU seconds are given where other
work on the machine would tell in the wall clock.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTING = (
    "model={model} data=markov data.symbols=8 data.length=60_000 optimizer.lr=0.01 budget.tokens={tokens} "
    "evaluation.every={tokens} trainer=cpu trainer.threads=1"
)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def sweep_file(folder: Path, tokens: int, seeds: int, model: str = "nano") -> tuple[Path, list[str]]:
    fixed = SETTING.format(model=model, tokens=tokens).split()
    file = folder / f"study_{tokens}_{seeds}.yaml"
    file.write_text(
        f"method: grid\nparameters:\n  seed: {{values: {list(range(seeds))}}}\n"
        f"command: {json.dumps(['python', 'run.py', *fixed, '${args_no_hyphens}'])}\n"
    )
    return file, fixed


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=ENV, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def sweep(file: Path, runs: Path, workers: int = 2) -> float:
    command = [sys.executable, "-m", "albert_ablate.cli", "sweep", str(file), "--runs", str(runs)]
    return timed([*command, "--workers", str(workers)])


def two_processes(fixed: list[str], runs: Path, seed: int) -> float:
    """Seconds that two single runs take, started together."""
    command = [sys.executable, "run.py", *fixed, f"paths.runs={runs}"]
    began = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    both = [subprocess.Popen([*command, f"seed={s}"], cwd=ROOT, env=ENV, **quiet) for s in (seed, seed + 1)]
    assert not any(p.wait() for p in both)
    return time.perf_counter() - began


def throughput(folder: Path, count: int, sample: int, model: str) -> None:
    """The study in two halves, a sample of pairs of single processes before, between and after them."""
    pairs: list[float] = []
    whole = 0.0
    for half in range(2):
        file, fixed = sweep_file(folder, 20_000, count // 2, model)
        for _ in range(sample // 2):
            pairs.append(two_processes(fixed, folder / "alone", 2 * len(pairs)))
        whole += sweep(file, folder / f"half{half}")
    warm, alone = count / whole * 3600, 2 / statistics.median(pairs) * 3600
    print(f"{count} {model} runs of 20,000 tokens, runs an hour:")
    print(f"  sweep {warm:,.0f} (two sweeps of {count // 2}, start included),")
    print(f"  a process a run {alone:,.0f} (median of {len(pairs)} pairs): ratio {warm / alone:.1f}")


def overhead(folder: Path, tokens: int) -> None:
    """All but training and evaluation: two sweeps on one worker, of 1 and of 4 runs; their difference has no start."""
    found = {}
    for count in (1, 4):
        runs = folder / f"overhead{count}"
        wall = sweep(sweep_file(folder, tokens, count)[0], runs, workers=1)
        inside = [json.loads(f.read_text())["cost"]["seconds"] for f in runs.glob("*/seed*/record.json")]
        found[count] = wall - sum(inside), statistics.mean(inside)
    each = (found[4][0] - found[1][0]) / 3
    start, run = found[1][0] - each, found[4][1]
    print(f"runs of {run:.1f} s: {each:.2f} s of scheduling a run, {each / (each + 30):.1%} of a run of 30 s;")
    print(f"  {start:.1f} s once for the command and its worker")


def memory(folder: Path, count: int) -> None:
    """Resident memory of one process after each tenth of many runs."""
    code = (
        "import sys, gc, albert_ablate, pytorch_lightning\n"
        "from albert_ablate.training.run import run\n"
        "for seed in range(int(sys.argv[1])):\n"
        "    run(albert_ablate.compose([*sys.argv[2:], f'seed={seed}']))\n"
        "    if seed % (int(sys.argv[1]) // 10) == int(sys.argv[1]) // 10 - 1:\n"
        "        pages = int(open('/proc/self/statm').read().split()[1])\n"
        "        print(pages * 4096 // 1_000_000, flush=True)\n"
    )
    fixed = SETTING.format(model="nano", tokens=2048).split()
    command = [sys.executable, "-c", code, str(count), *fixed, f"paths.runs={folder / 'memory'}"]
    out = subprocess.run(command, cwd=ROOT, env=ENV, check=True, capture_output=True, text=True).stdout
    print(f"resident MB of a worker after each tenth of {count} runs: {', '.join(out.split())}")


def scan(folder: Path, count: int) -> None:
    """`status` without and with its index, and the resume scan, over copies of one record."""
    run = sweep_file(folder, 2048, 1)[1]
    subprocess.run([sys.executable, "run.py", *run, f"paths.runs={folder / 'one'}"], cwd=ROOT, env=ENV, check=True)
    text = next((folder / "one").glob("*/seed0/record.json")).read_text()
    many = folder / "many"
    for i in range(count):
        to = many / f"{i // 10:012x}" / f"seed{i % 10}"
        to.mkdir(parents=True)
        (to / "record.json").write_text(text)
    code = (
        "import sys, time, pathlib\n"
        "from albert_ablate.studies.states import has_ended, run_folders\n"
        "root = pathlib.Path(sys.argv[1]); began = time.perf_counter(), time.process_time()\n"
        "assert all(has_ended(f) for f in run_folders(root))\n"
        "print(f'{time.perf_counter() - began[0]:.2f} s, {time.process_time() - began[1]:.2f} s of CPU')\n"
    )
    for name in ("status, the first time", "status", "status"):
        before = os.times()
        wall = timed([sys.executable, "-m", "albert_ablate.cli", "status", str(many)])
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        print(f"{name}, {count:,} run folders: {wall:.2f} s, {cpu:.2f} s of CPU")
    done = subprocess.run([sys.executable, "-c", code, str(many)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    print(f"resume scan, {count:,} run folders: {done.stdout.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["throughput", "overhead", "memory", "scan"])
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--sample", type=int, default=6, help="pairs of single processes")
    parser.add_argument("--model", default="nano", help="of the throughput")
    parser.add_argument("--tokens", type=int, default=400_000, help="of a long run")
    parser.add_argument("--memory", type=int, default=400)
    parser.add_argument("--folders", type=int, default=10_000)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        for what in given.what:
            if what == "throughput":
                throughput(folder, given.runs, given.sample, given.model)
            elif what == "overhead":
                overhead(folder, given.tokens)
            elif what == "memory":
                memory(folder, given.memory)
            else:
                scan(folder, given.folders)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
