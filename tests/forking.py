"""Runs in forked children: torch and Lightning are imported once, in the parent, which starts no threads."""

import contextlib
import itertools
import json
import os
import pickle
import random
import signal
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytorch_lightning  # noqa: F401  imported here, so that no child has to
import torch
import torchmetrics.text  # noqa: F401

from albert_ablate.config import checked_config, codes
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import SCHEMAS, read_history
from albert_ablate.records.naming import name_of
from albert_ablate.records.provenance import provenance
from albert_ablate.training.checkpoint import load_checkpoint
from albert_ablate.training.cost import training_flops
from albert_ablate.training.run import run

torch.set_num_threads(1)

NANO = (
    "model=nano model.layers=2 model.width=16 model.context=32 data=text_files data.batch=4 trainer=cpu "
    "trainer.threads=1 budget.tokens=4096 evaluation.tokens=512 evaluation.every=1300 checkpoint.seconds=0 "
    "diagnostics.every=4"
).split()


def write_text(path: Path, size: int = 60_000) -> Path:
    """Lines of made-up words, some far likelier than others, the same each time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(200)]
    lines: list[str] = []
    while sum(map(len, lines)) < size:
        lines.append(" ".join(rng.choices(words, weights, k=10)) + ".\n")
    path.write_text("".join(lines))
    return path


def arguments(text: Path, runs: Path, *overrides: str) -> list[str]:
    """A run of 32 small steps under `runs`, as the command takes it: each key once."""
    given = [*NANO, f"data.path={text}", f"paths.runs={runs}", f"paths.cache={text.parent}/cache", *overrides]
    return [f"{key}={value}" for key, value in dict(o.split("=", 1) for o in given).items()]


def nano(text: Path, runs: Path, *overrides: str) -> dict[str, Any]:
    return prepare(checked_config(arguments(text, runs, *overrides)))


def prepare(cfg: Mapping[str, Any]) -> Any:
    """The configuration. What a process finds out once for all its runs is found out here, no child has to."""
    with contextlib.suppress(Exception):  # for the run to say
        codes(cfg), name_of(cfg), provenance(), training_flops(cfg)
    return cfg


class Child:
    """`work` in a forked process."""

    def __init__(self, work: Callable[[], Any]):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(reader)
                os.fsync = lambda fd: None  # half the time of a small run; what a killed process wrote is there without
                with os.fdopen(writer, "wb") as pipe:
                    pickle.dump(_outcome(work), pipe)
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        self.pipe = os.fdopen(reader, "rb")

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[str, Any]:
        """("value", what work gave), ("error", what it raised), or ("killed", the signal)."""
        with self.pipe:
            sent = self.pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return "killed", os.WTERMSIG(status)
        return pickle.loads(sent) if sent else ("exited", os.WEXITSTATUS(status))


def _outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "value", work()
    except BaseException as error:
        traceback.print_exc()
        return "error", error


def forked(work: Callable[[], Any]) -> Any:
    """What `work` gives in a child of its own."""
    kind, value = Child(work).wait()
    if kind == "error":
        raise value
    assert kind == "value", f"the child was {kind} by {value}"
    return value


def train(cfg: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """The run to its end in a child; unlike `run`, with commits at evaluations alone, which halves its time."""
    return forked(lambda: run({**cfg, "checkpoint": {"seconds": 1000}}, verbose))


def outcome(folder: Path | str) -> dict[str, Any]:
    """All that a resume must not change: weights, rows but for wall-clock time (NaN as "nan"), summary and proof."""
    folder = Path(folder)
    record = RunFolder(folder).record()
    assert record is not None
    weights = {f.name: load_checkpoint(f) for f in sorted(folder.glob("checkpoints/*.ckpt"))}
    return {
        "status": record["status"],
        "weights": {
            name: {
                "step": w["step"],
                **{k: (v.shape, v.flatten().view(torch.uint8).numpy().tobytes()) for k, v in w["state_dict"].items()},
            }
            for name, w in weights.items()
        },
        "rows": {
            name: [{k: "nan" if v != v else v for k, v in row.items()} for row in rows(folder, name).to_pylist()]
            for name in SCHEMAS
        },
        "summary": record["summary"],
        "proof": record["proof"],
    }


def rows(folder: Path | str, name: str) -> pa.Table:
    """The committed rows of a history without their wall-clock time."""
    record = json.loads((Path(folder) / "record.json").read_text())
    return read_history(Path(folder), name, record["histories"]).drop_columns("seconds")


class Ambush:
    """Counts the moments at which a run touches the disk or evaluates, and acts at the chosen one."""

    def __init__(self, at: int, act: Callable[[], Any] = lambda: os.kill(os.getpid(), signal.SIGKILL)):
        self.at, self.act, self.seen = at, act, itertools.count(1)
        self.log: list[str] = []

    def set(self) -> None:
        import io

        from albert_ablate.records import atomic, history
        from albert_ablate.training.validation import Evaluator

        ambush = self

        class File(io.FileIO):
            def write(self, data):
                ambush.moment("write")
                return super().write(bytes(data)[: len(data) // 2 + 1])  # short writes are allowed: cut here

        history.io = type("io", (), {"FileIO": File})  # type: ignore[assignment]
        for module, name in ((os, "fsync"), (os, "replace"), (atomic.Path, "unlink"), (Evaluator, "batches")):
            self._wrap(module, name)

    def _wrap(self, owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.moment(name)
            return plain(*args, **kwargs)

        setattr(owner, name, wrapped)

    def moment(self, name: str) -> None:
        self.log.append(name)
        if next(self.seen) == self.at:
            self.act()


def killed_and_gone_on(cfg: dict[str, Any], at: int) -> dict[str, Any]:
    """Train a run that is killed at its moment `at` and gone on with by another process: its record."""
    frequent = {**cfg, "checkpoint": {"seconds": 0}}

    def killed() -> Any:
        Ambush(at).set()
        return run(frequent)

    assert Child(killed).wait()[0] == "killed"
    record = forked(lambda: run(frequent))
    assert record["sessions"] == 2 and record["resumed_at"] > 0
    return record


def launch_forked(launcher, overrides, initial_job_idx, workers=2):
    """As joblib's launcher with two workers, but forked, so that none imports anything: when one is killed the others
    are too, and no result comes back."""
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    waiting, live, results = list(enumerate(overrides)), {}, {}
    while waiting or live:
        while waiting and len(live) < workers:
            number, given = waiting.pop(0)
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(reader)
                    done = BasicLauncher._launch(launcher, [given], number)[0]
                    os.write(writer, pickle.dumps(done.return_value))
                finally:
                    os._exit(0)
            os.close(writer)
            live[pid] = number, reader
        pid, status = os.waitpid(-1, 0)
        number, reader = live.pop(pid)
        if os.WIFSIGNALED(status):
            for other in live:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            raise RuntimeError("a worker was killed")
        with os.fdopen(reader, "rb") as pipe:
            results[number] = pickle.load(pipe)
    return [Returned(results[i]) for i in range(len(overrides))]


class Returned:
    def __init__(self, value):
        self.return_value = value


def fork_workers():
    from hydra.core.plugins import Plugins

    Plugins.instance()  # which executes each plugin's module anew
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    if not hasattr(BasicLauncher, "_launch"):
        BasicLauncher._launch = BasicLauncher.launch
        BasicLauncher.launch = launch_forked
