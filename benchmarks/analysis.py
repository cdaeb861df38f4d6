"""Loading runs: seconds a row and peak memory, beside TensorBoard's own reader and MLflow's client on the same numbers.

    python benchmarks/analysis.py [--runs 1000] [--steps 10000] [--compared 20] [--most 10000] [--repeat 3]

Makes finished runs with random histories below a temporary folder, `--compared` of them also as event files and as an
MLflow file store, and reads each in a process of its own, interleaved, `--repeat` times; medians. Ours is read at
`--compared` and at `--runs` runs; for growth, at ten times fewer too. A row is a step of a run with four numbers in all
three stores (ours has more columns, which are read as well). Peak memory is beside the size of the tables in memory.
Then what a run costs at a tenth of `--most` runs of 100 steps and at all of them, where records outweigh rows; and the
report of `--runs` and of `--most` runs, as the command that a user gives: the first one, the same again, and one to
another file, for which the reductions of the histories are kept; each with an empty cache folder of its own. Others'
readers need the extras tensorboard and mlflow. Nothing here is a test: machines are noisy, so CPU seconds stand beside.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

METRICS = ("loss", "lr", "grad_norm", "clipped")


def make(root: Path, runs: int, steps: int) -> None:
    """`runs` finished run folders, written as training writes them."""
    import numpy as np

    from albert_ablate.records import store
    from albert_ablate.records.history import SCHEMAS, History

    rng = np.random.default_rng(0)
    blank = {name: {f.name: "" if str(f.type) == "string" else math.nan for f in s} for name, s in SCHEMAS.items()}
    for i in range(runs):
        arm, seed = divmod(i, 10)
        who = {"arm": f"{arm:012x}", "setting": f"{arm:012x}", "identity": f"{i:012x}", "seed": seed}
        folder = root / who["setting"] / f"seed{seed}"
        folder.mkdir(parents=True)
        numbers, held = rng.random((steps, len(METRICS))).tolist(), (2 + rng.random(21)).tolist()
        at = [{"step": k, "tokens": k * 512, "seconds": k / 50, "flops": k * 1e9} for k in range(steps + 1)]
        rows = {
            "steps": [axes | dict(zip(METRICS, row, strict=True)) for axes, row in zip(at[1:], numbers, strict=True)],
            "evals": [
                axes | {"split": "validation", "loss": loss}
                for axes, loss in zip(at[:: max(1, steps // 20)], held, strict=False)
            ],
            "layers": [],
        }
        for name, values in rows.items():
            (folder / f"{name}.arrows").touch()
            history = History(folder, name, who["identity"])
            history.cut(0)
            for value in values:
                history.append(**blank[name] | value)
            history.finish()
            history.close()
            history.path.unlink()
        store.write(folder, {
            **who, "label": f"arm {arm}", "role": "confirmation", "status": "finished", "choices": {"norm": "pre_ln"},
            "error": None, "histories": None, "data": {"fingerprint": "0"},
            "config": {"seed": seed, "optimizer": {"lr": 1e-3}, "model": {"layers": 24}},
            "summary": {"val_loss": 2.0 + seed / 100, "tokens": steps * 512}, "cost": {"seconds": 1.0, "flops": 1e9},
            "proof": {"initial_draws": {f"blocks.{k}.weight": "0" * 16 for k in range(300)}},
        })  # fmt: skip


def copy_to_tensorboard(root: Path, to: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    from albert_ablate.analysis import load_runs

    for (arm, seed), rows in load_runs(root).steps.groupby(["arm", "seed"], observed=True):
        writer = EventFileWriter(str(to / f"{arm}-{seed}"), max_queue_size=100_000)
        for row in rows.itertuples():
            values = [Summary.Value(tag=m, simple_value=getattr(row, m)) for m in METRICS]
            writer.add_event(Event(wall_time=row.seconds, step=row.step, summary=Summary(value=values)))
        writer.close()


def copy_to_mlflow(root: Path, to: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from albert_ablate.analysis import load_runs

    client = MlflowClient(str(to))
    experiment = client.create_experiment("compared")
    for _, rows in load_runs(root).steps.groupby(["arm", "seed"], observed=True):
        run = client.create_run(experiment)
        metrics = [Metric(m, getattr(r, m), int(r.seconds * 1000), r.step) for r in rows.itertuples() for m in METRICS]
        for start in range(0, len(metrics), 1000):
            client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])
        client.set_terminated(run.info.run_id)


def read_ours(root: Path) -> list:
    from albert_ablate.analysis import load_runs

    runs = load_runs(root)
    return [runs.summary, runs.steps]


def read_tensorboard(root: Path) -> list:
    """Each metric of each run by TensorBoard's own reader, as one table of steps."""
    import pandas as pd
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tables = []
    for folder in sorted(root.iterdir()):
        found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        columns = {tag: [e.value for e in found.Scalars(tag)] for tag in METRICS}
        tables.append(pd.DataFrame(columns).assign(step=[e.step for e in found.Scalars(METRICS[0])], run=folder.name))
    return [pd.concat(tables)]


def read_mlflow(root: Path) -> list:
    """Each metric of each run through MLflow's client, as one table of steps."""
    import pandas as pd
    from mlflow import MlflowClient

    client, tables = MlflowClient(str(root)), []
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=5000):
        series = {m: client.get_metric_history(run.info.run_id, m) for m in METRICS}
        columns = {m: [v.value for v in values] for m, values in series.items()}
        steps = [v.step for v in series[METRICS[0]]]
        tables.append(pd.DataFrame(columns).assign(step=steps, run=run.info.run_id))
    return [pd.concat(tables)]


READERS = {"ours": read_ours, "tensorboard": read_tensorboard, "mlflow": read_mlflow}


def memory(line: str) -> float:
    """Megabytes, from Linux: ru_maxrss would begin with the size of the process that started this one."""
    (said,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(line)]
    return int(said.split()[1]) * 1024 / 1e6


def once(reader: str, root: Path) -> dict[str, float]:
    """Seconds, rows, megabytes of the tables and peak memory of one reading; imports are done before."""
    import time

    import pandas  # noqa: F401
    import pyarrow  # noqa: F401

    if reader == "mlflow":
        import mlflow  # noqa: F401
    if reader == "tensorboard":
        import tensorboard.backend.event_processing.event_accumulator  # noqa: F401
    before = memory("VmRSS")
    began, busy = time.perf_counter(), time.process_time()
    tables = READERS[reader](root)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    peak = memory("VmHWM")
    size = sum(int(t.memory_usage(deep=True).sum()) for t in tables) / 1e6
    return {"seconds": seconds, "cpu": busy, "rows": len(tables[-1]), "tables": size, "peak": peak - before}


def apart(reader: str, root: Path) -> dict[str, float]:
    environment = os.environ | {"MLFLOW_ALLOW_FILE_STORE": "true", "TF_CPP_MIN_LOG_LEVEL": "3"}
    said = subprocess.run(
        [sys.executable, __file__, "--once", reader, str(root)], env=environment, capture_output=True, text=True
    )
    if said.returncode:
        raise RuntimeError(said.stderr)
    return json.loads(said.stdout.splitlines()[-1])


def report(root: Path, to: Path, cache: Path) -> tuple[float, float, float]:
    """Seconds and CPU seconds of `albert-ablate report`, and the page's megabytes."""
    import resource
    import time

    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "albert_ablate.cli", "report", str(root), "-o", str(to)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, busy, to.stat().st_size / 1e6


def time_reports(root: Path, desk: Path) -> None:
    first = None
    for again, file in (("first", "page"), ("the same again", "page"), ("to another file", "other")):
        seconds, busy, size = report(root, desk / f"{root.name}-{file}.html", desk / f"cache-{root.name}")
        first = first or busy
        took = f"{seconds:.1f} s, {busy:.1f} s of CPU ({busy / first:.2f} of the first)"
        print(f"report of {root.name}, {again}: {took}, {size:.1f} MB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--compared", type=int, default=20)
    parser.add_argument("--most", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--once", nargs=2, metavar=("READER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options.once[0], Path(options.once[1]))))
        return 0
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    with tempfile.TemporaryDirectory() as scratch:
        desk = Path(scratch)
        sizes = sorted({options.compared, max(10, options.runs // 10), options.runs})
        for size in sizes:
            make(desk / f"ours-{size}", size, options.steps)
        few = desk / f"ours-{options.compared}"
        copy_to_tensorboard(few, desk / "tensorboard")
        copy_to_mlflow(few, desk / "mlflow")
        wanted = {f"ours, {size} runs": ("ours", desk / f"ours-{size}") for size in sizes}
        wanted |= {f"{name}, {options.compared} runs": (name, desk / name) for name in ("tensorboard", "mlflow")}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
        for _ in range(options.repeat):
            for name, (reader, root) in wanted.items():
                found[name].append(apart(reader, root))
        base = None
        print(f"{'':24} {'rows':>12} {'seconds':>9} {'CPU s':>7} {'us / row':>9} {'ratio':>7} {'peak / tables':>14}")
        for name, each in found.items():
            middle = {k: statistics.median(e[k] for e in each) for k in each[0]}
            per = middle["seconds"] / middle["rows"] * 1e6
            base = base or per
            print(
                f"{name:24} {middle['rows']:12,.0f} {middle['seconds']:9.2f} {middle['cpu']:7.2f} {per:9.3f} "
                f"{per / base:7.1f} {middle['peak'] / middle['tables']:14.2f}",
                flush=True,
            )
        time_reports(desk / f"ours-{options.runs}", desk)
        for many in (options.most // 10, options.most):
            make(desk / f"many-{many}", many, 100)
            found_ = [apart("ours", desk / f"many-{many}") for _ in range(options.repeat)]
            seconds, busy = (statistics.median(e[k] for e in found_) / many * 1000 for k in ("seconds", "cpu"))
            print(f"{many:,} runs of 100 steps: {seconds:.2f} ms a run, {busy:.2f} ms of CPU", flush=True)
        time_reports(desk / f"many-{options.most}", desk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
