"""A study killed again and again: workers, the command, all at once."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from forking import Child, arguments, fork_workers, write_text

from albert_ablate.cli import main
from albert_ablate.config import checked_config
from albert_ablate.studies.states import state
from albert_ablate.training.cost import training_flops

pytestmark = pytest.mark.process

RUNS = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def command(file: Path, runs: Path, given: list[str], before=lambda: None) -> Child:
    def work():
        os.setsid()
        before()
        return main(["sweep", str(file), "--runs", str(runs), "hydra/launcher=basic", "trainer.threads=1", *given])

    return Child(work)


def study(tmp_path: Path, seeds: int) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(
        "method: grid\nparameters:\n  norm: {values: [pre_ln, post_ln, rezero, sandwich_ln]}\n"
        f"  dropout: {{values: [none, uniform]}}\n  seed: {{values: {list(range(seeds))}}}\n"
        "command: [python, run.py, dropout_time=constant, '${args_no_hyphens}']\n"
    )
    return file


def weights(runs: Path) -> dict[str, str]:
    """Run -> hash of its final weights, of all folders that there are."""
    found = {}
    for folder in sorted(runs.glob("*/seed*")):
        record = json.loads((folder / "record.json").read_text())
        assert record["status"] in ("finished", "diverged") and not list(folder.glob("*.arrows")), folder
        found[str(folder.relative_to(runs))] = record["proof"]["final_weights"]
    return found


def children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def slay(*pids: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.slow
def test_a_study_killed_200_times_ends_as_one_that_never_was(text, tmp_path, capfd):
    fork_workers()
    given = arguments(text, tmp_path / "x", "checkpoint.seconds=0", "evaluation.every=2000")
    given = [o for o in given if not o.startswith("paths.runs")]
    for norm in ("pre_ln", "post_ln", "rezero", "sandwich_ln"):  # so that kills hit training, not what leads to it
        for dropout in ("none", "uniform"):
            training_flops(checked_config([*given, f"norm={norm}", f"dropout={dropout}", "dropout_time=constant"]))
    file, rng, runs = study(tmp_path, 3), random.Random(0), tmp_path / "runs"
    assert command(file, tmp_path / "whole", given).wait() == ("value", 0)
    whole = weights(tmp_path / "whole")
    assert len(whole) == RUNS and len(set(whole.values())) == RUNS
    kills, commands, began = dict.fromkeys(("worker", "command", "everything"), 0), 0, time.monotonic()
    ended: dict[Path, bytes] = {}  # a run that is done stays as it is
    patience = 0.2
    running: Child | None = None
    orphans: list[int] = []  # workers that have outlived their command
    while sum(kills.values()) < 200:
        if running is None:
            running = command(file, runs, given)
            commands += 1
        time.sleep(rng.uniform(0, patience))
        for folder in runs.glob("*/seed*"):
            record = state(folder)
            if record["status"] in ("finished", "diverged"):
                content = (folder / "record.json").read_bytes()
                assert ended.setdefault(folder, content) == content
        orphans = [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
        workers = children(running.pid) + orphans
        if not workers:
            if os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                assert running.wait()[0] == "value"
                running = None
                assert len(ended) < RUNS, f"done after {kills}"
            continue
        # as the machine is fast or slow: the study is to be nearly through when the kills are
        patience *= 1.1 if len(ended) / RUNS < sum(kills.values()) / 300 else 0.8
        what = rng.choices(("worker", "command", "everything"), (6, 1, 1))[0]
        kills[what] += 1
        slay(*{"worker": [rng.choice(workers)], "command": [running.pid], "everything": [running.pid, *workers]}[what])
        if what != "worker":
            running.pipe.close()  # whose other end a worker may hold that has outlived the command
            os.waitpid(running.pid, 0)
            orphans, running = workers, None
    seconds, done = time.monotonic() - began, len(ended)
    if running is not None:
        running.wait()
    while command(file, runs, given).wait() != ("value", 0):
        assert commands < 1000
        commands += 1
    assert weights(runs) == whole
    assert not (runs / ".launches").exists() or not list((runs / ".launches").iterdir())
    sessions = sum(json.loads((runs / run / "record.json").read_text())["sessions"] for run in whole)
    assert sessions >= RUNS + 10  # many were hit after a commit and went on from it
    with capfd.disabled():
        said = f"{kills} in {seconds:.0f} s, {done} of {RUNS} runs done then; {commands} commands, {sessions} sessions"
        print(f"\n{said}")
