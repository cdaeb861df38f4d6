"""What a command costs beside its work, in processor time.

    python benchmarks/start.py [judge|plan|cold|next] [--repeat 3]

judge: the ledger of sweeps/claims.yaml over some 400 finished runs that it makes, the first time (no RUNS/.keys) and
again. plan: a grid of 5,000 runs, checked and priced (sweep --dry-run). cold: `run` of one step of `nano` beside
importing Lightning, alternating; whole, and until training begins (no step and no evaluation), where the exit is not
counted. next: the next run in a process that has trained: all before its first step and after its last, without
evaluations. Medians of --repeat; user and system time of each process and its children.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CLI = [sys.executable, "-m", "albert_ablate.cli"]
SEEDS, STEPS, EVALUATIONS = 12, 500, 20


def cpu(command: list[str], allowed: tuple[int, ...] = (0,)) -> float:
    """Processor seconds of a command."""
    before = os.times()
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    after = os.times()
    if done.returncode not in allowed:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def study(runs: Path, most: int) -> int:
    """Finished runs, records and histories as training writes them, of the arms that the claims' screens compare, with
    tuning files; gives how many."""
    import numpy as np

    from albert_ablate.config import checked_config, codes, keys_of, revisions, run_identity
    from albert_ablate.judge.claims import arms_of, measure_of, read_claims
    from albert_ablate.records import store
    from albert_ablate.records.tuning import write_tuning

    rng, file = np.random.default_rng(0), read_claims(ROOT / "sweeps" / "claims.yaml")
    wanted = dict[tuple[Any, ...], tuple[Any, ...]]()  # by overrides and rate: tuned, seeds
    for claim in file.claims:
        for part in claim.contrasts("screen"):
            form = claim.forms["screen"]
            tuned = claim.rate_matters(measure_of(part))
            for arm in arms_of(part):
                for rate in form.grid or (None,):
                    key = file.overrides(claim, part, "screen", arm), rate, part.rate_factor
                    wanted[key] = tuned, claim.seeds[: form.N]
    made = 0
    for (overrides, rate, factor), (tuned, seeds) in wanted.items():
        if any(o.startswith("task=") for o in overrides):
            continue
        cfg = checked_config(overrides)
        arm = keys_of(cfg).arm
        if tuned:
            tuning = {"rate": cfg.optimizer.lr, "edge": "", "trained": True, "tokens": 1, "curve": [], "slack": 0.0}
            write_tuning(runs, arm, tuning)
        lr = (rate or cfg.optimizer.lr) * factor
        cfg = checked_config([*overrides, f"optimizer.lr={lr}"])
        keys, about = keys_of(cfg), {"revisions": revisions(cfg), "code": codes(cfg)}
        level = 2 + float(rng.random()) / 10
        for seed in seeds:
            if made == most:
                return made
            folder = runs / keys.setting / f"seed{seed}"
            if folder.exists():
                continue
            folder.mkdir(parents=True)
            summary = _histories(folder, rng, level + rng.normal(0, 0.02), lr, int(cfg.model.layers))
            identity = run_identity(keys.setting, seed)
            proof = {"data_order": f"{seed}", "final_weights": identity, "initial_weights": identity}
            record = store.Record(
                status="finished", seed=seed, arm=arm, setting=keys.setting, identity=identity, role="confirmation",
                key={"arm": keys.arm, "setting": keys.setting}, choices=cfg.choices, config={**cfg, "seed": seed},
                budget={"tokens": cfg.budget.tokens}, data={"fingerprint": "x"}, summary=summary, proof=proof,
                cost={"flops": 1e9, "seconds": 10.0}, **about,
            )  # fmt: skip
            store.write(folder, record.with_defaults())
            made += 1
    return made


def _histories(folder: Path, rng: Any, level: float, lr: float, layers: int) -> dict[str, Any]:
    """Write histories of random numbers; gives a summary that fits them."""
    import numpy as np
    import pyarrow as pa

    def write(name: str, columns: dict[str, Any]) -> None:
        table = pa.table(columns)
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    def axes(step: Any) -> dict[str, Any]:
        return {"step": step, "tokens": step * 100, "seconds": step * 0.01, "flops": step * 1e6}

    step = np.arange(1, STEPS + 1)
    loss = level + 3 * np.exp(-step / 100) + rng.normal(0, 0.03, STEPS)
    norm = np.exp(rng.normal(0, 0.1, STEPS))
    columns = {"loss": loss, "lr": lr + 0 * loss, "grad_norm": norm, "grad_norm_clipped": norm, "clipped": 0 * loss}
    write("steps", axes(step) | columns)
    at = np.repeat(np.linspace(0, STEPS, EVALUATIONS + 1).astype(int), 3)
    noise = rng.normal(0, 0.01, len(at))
    held = level + 3 * np.exp(-at / 100) + np.tile([0, 0.1, 0.1], EVALUATIONS + 1) + noise
    split = ["train", "validation", "test"] * (EVALUATIONS + 1)
    write("evals", axes(at) | {"split": split, "loss": held, "bits_per_byte": held / math.log(2)})
    logged = np.arange(0, STEPS + 1, 25)
    rows = 2 * layers * len(logged)
    layer = np.tile(np.repeat(np.arange(layers), 2), len(logged))
    names = (
        "grad_norm",
        "weight_norm",
        "update_ratio",
        "input_rms",
        "residual_rms",
        "output_rms",
        "entropy",
        "max_logit",
    )
    write("layers", axes(np.repeat(logged, 2 * layers)) | {"layer": pa.array(layer, pa.int32())}
          | {"sublayer": np.tile(["attention", "mlp"], rows // 2)}
          | {name: np.exp(rng.normal(0, 0.1, rows)) for name in names})  # fmt: skip
    last = dict(zip(split[-3:], held[-3:].tolist(), strict=True))
    losses = {"train_loss": last["train"], "val_loss": last["validation"], "test_loss": last["test"]}
    settings = {"settings": {}, "weights": "last", "weights_hash": "x"}
    figures = {
        "corruption": ("masked_area", "noisy_area", "swapped_area"), "unit_ablation": ("rise_1", "rise_10", "rise_30"),
        "domains": ("wikipedia_fr", "wikipedia_es", "bible", "stdlib", "airports"),
    }  # fmt: skip
    found = {
        k: {"rows": [], "summary": {n: 1 + float(rng.random()) for n in v}, **settings} for k, v in figures.items()
    }
    (folder / "evaluations.json").write_text(json.dumps(found))
    return losses | {"gap": last["validation"] - last["train"], "initial_loss": 5.5, "tokens": STEPS * 100,
                     "parameters": 100_000, "flops_per_token": 1e4, "weight_norm": 1 + float(rng.random())}  # fmt: skip


def judge(folder: Path, repeat: int) -> None:
    made, first, again = study(folder / "runs", 349), [], []
    command = [*CLI, "judge", str(ROOT / "sweeps" / "claims.yaml"), "--runs", str(folder / "runs")]
    cpu(command, (0, 1))
    for _ in range(repeat):
        (folder / "runs" / ".keys").unlink(missing_ok=True)
        first.append(cpu(command, (0, 1)))
        again.append(cpu(command, (0, 1)))
    print(f"judge, 15 claims, {made} runs: the first time {_said(first)}; with RUNS/.keys {_said(again)}")


NANO = (
    "model=nano data=markov data.symbols=8 data.length=60_000 optimizer.lr=0.01 budget.tokens=512 evaluation.every=512 "
    "trainer=cpu trainer.threads=1"
).split()
UNTIL_TRAINING = """
import os, sys, time
from albert_ablate.training import language_recorder, main
language_recorder.LanguageRecorder.on_train_start = lambda *given: (print(time.process_time(), flush=True), os._exit(0))
main.command()
"""


def cold(folder: Path, repeat: int) -> None:
    found = dict[str, list[float]]()
    for i in range(-1, repeat):  # the first one packs the text
        run = [*NANO, f"paths.runs={folder / str(i)}"]
        command = [sys.executable, "-c", UNTIL_TRAINING, *run]
        begun = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=True)
        seconds = {
            "until training begins": float(begun.stdout.split()[-1]),
            "with a step and evaluations": cpu([sys.executable, "run.py", *run]),
            "import pytorch_lightning": cpu([sys.executable, "-c", "import pytorch_lightning"]),
        }
        for name, spent in seconds.items() if i >= 0 else ():
            found.setdefault(name, []).append(spent)
    lightning = found["import pytorch_lightning"]
    for name, spent in found.items():
        ratio = statistics.median(a / b for a, b in zip(spent, lightning, strict=True))
        print(f"{name}: {_said(spent)}, {ratio:.2f} times importing Lightning")


NEXT = """
import os, sys, time
import albert_ablate
from albert_ablate.studies.jobs import import_training
from albert_ablate.training.language_recorder import LanguageRecorder as Recorder
from albert_ablate.training.run import run
import_training(freeze=True)
clocks, marks = lambda: (time.process_time(), time.perf_counter()), {}
def marked(name):
    method = getattr(Recorder, name)
    def wrapped(self, *given, **named):
        marks[name, "begin"] = clocks()
        result = method(self, *given, **named)
        marks[name, "end"] = clocks()
        return result
    setattr(Recorder, name, wrapped)
for name in ("on_train_start", "on_train_end", "measure_end"):
    marked(name)
for seed in range(int(sys.argv[1]) + 1):
    begin = clocks()
    run(albert_ablate.compose([*sys.argv[2:], f"seed={seed}"]))
    end, at = clocks(), marks
    for i in range(2) if seed else ():
        before = at["on_train_start", "end"][i] - begin[i]
        after = end[i] - at["on_train_end", "begin"][i]
        print(before + after - at["measure_end", "end"][i] + at["measure_end", "begin"][i])
"""


def next_run(folder: Path, repeat: int) -> None:
    run = [*NANO, "budget.tokens=10_240", "evaluation.every=10_240", f"paths.runs={folder / 'next'}"]
    command = [sys.executable, "-c", NEXT, str(3 * repeat), *run]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=True)
    found = [float(line) for line in done.stdout.splitlines() if line[:1].isdigit()]
    print(f"the next run in one process: {_said(found[::2])}; {statistics.median(found[1::2]):.2f} s on the clock")


def plan(folder: Path, repeat: int) -> None:
    file = folder / "grid.yaml"
    file.write_text(
        "method: grid\nparameters:\n  norm: {values: [pre_ln, post_ln, rezero, deepnorm, none]}\n"
        "  dropout: {values: [none, uniform]}\n  clip: {values: [none, norm, agc, zclip, adagc]}\n"
        f"  optimizer.lr: {{values: [0.001, 0.003, 0.01, 0.03]}}\n  seed: {{values: {list(range(25))}}}\n"
        f"command: {json.dumps(['python', 'run.py', 'model=nano', '${args_no_hyphens}'])}\n"
    )
    command = [*CLI, "sweep", str(file), "--dry-run", "--runs"]
    spent = [cpu([*command, str(folder / f"planned{i}")]) for i in range(repeat)]
    print(f"a grid of 5,000 runs (200 arms): {_said(spent)}")


def _said(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s of CPU ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["judge", "plan", "cold", "next"])
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        for what in given.what:
            {"judge": judge, "plan": plan, "cold": cold, "next": next_run}[what](folder, given.repeat)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
