"""Hydra's launchers carry a sweep: a Ray cluster that loses a node, submitit, joblib with its workers killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import arguments, forked, nano, write_text

from albert_ablate.studies.states import state
from albert_ablate.training.run import run

pytestmark = [pytest.mark.process, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
DONE = ("finished", "diverged")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def start(text, tmp_path):
    """`albert-ablate sweep` over two placements and `seeds`, as a command of its own."""
    (tmp_path / "study.yaml").write_text(
        "method: grid\nparameters:\n  norm: {values: [pre_ln, post_ln]}\n  seed: {values: [0, 1, 2]}\n"
        "command: [python, run.py, '${args_no_hyphens}']\n"
    )

    def begin(*overrides: str, runs: str = "runs") -> subprocess.Popen:
        given = [o for o in arguments(text, tmp_path, *overrides) if not o.startswith("paths.runs")]
        given = [o for o in given if not o.startswith("trainer.threads") or o in overrides]
        command = [sys.executable, "-m", "albert_ablate.cli", "sweep", str(tmp_path / "study.yaml")]
        command += ["--runs", str(tmp_path / runs), *([] if launched(overrides) else ["--workers", "2"]), *given]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    return begin


def launched(overrides) -> bool:
    return any(o.startswith("hydra/launcher") for o in overrides)


class Watch:
    """Looks at the runs while a command goes on: how many have ended; one that has ended stays as it is."""

    def __init__(self, root: Path):
        self.root, self.ended = root, {}

    def look(self) -> list[str]:
        found = []
        for folder in self.root.glob("*/seed*"):
            kind = state(folder)["status"]
            if kind in DONE:
                content = (folder / "record.json").read_bytes()
                assert self.ended.setdefault(folder, content) == content
            found.append(kind)
        return found

    def until(self, process: subprocess.Popen, true) -> None:
        while process.poll() is None and not true(self.look()):
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]


def results(root: Path) -> dict[str, tuple]:
    """Run -> what it ended with."""
    found = {}
    for folder in sorted(root.glob("*/seed*")):
        record = json.loads((folder / "record.json").read_text())
        found[str(folder.relative_to(root))] = (record["status"], record["proof"]["final_weights"])
    return found


def equal_to_runs_alone(text: Path, tmp_path: Path, *overrides: str) -> None:
    """The six runs of the sweep, each as run.py trains it."""

    def alone():
        for norm in ("pre_ln", "post_ln"):
            for seed in range(3):
                run(nano(text, tmp_path / "alone", *overrides, f"norm={norm}", f"seed={seed}"))

    forked(alone)
    assert len(results(tmp_path / "alone")) == 6
    assert results(tmp_path / "runs") == results(tmp_path / "alone")


LONG = "budget.tokens=12_800", "evaluation.every=6_000", "checkpoint.seconds=0.1"


def test_a_ray_cluster_that_loses_a_node_ends_every_run_once(text, start, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="pip install 'albert_ablate[ray]'")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="pip install 'albert_ablate[ray]'")
    with cluster(monkeypatch) as (address, kill_a_node):
        sweep = start(*LONG, "hydra/launcher=ray", f"hydra.launcher.ray.init.address='{address}'")
        watch = Watch(tmp_path / "runs")
        watch.until(sweep, lambda kinds: kinds.count("running") == 2 and len(watch.ended) >= 1)
        kill_a_node()
        watch.until(sweep, lambda kinds: "orphaned" in kinds)  # one run lost its process
        while sweep.poll() is None:
            watch.look()
            time.sleep(0.1)
        said = sweep.communicate()[0]
    assert sweep.returncode == 0, said
    assert len(watch.ended) == 6
    equal_to_runs_alone(text, tmp_path, *LONG)
    sessions = [state(folder)["sessions"] for folder in watch.ended]
    assert sorted(sessions)[:5] == [1] * 5 and max(sessions) == 2  # that one alone was begun twice


@contextlib.contextmanager
def cluster(monkeypatch):
    """Two nodes of Ray with one processor each: the address, and what kills the second."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the nodes' workers
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        yield nodes.address, lambda: nodes.remove_node(second, allow_graceful=False)
    finally:
        nodes.shutdown()


def test_submitit_carries_a_sweep(text, start, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'albert_ablate[submitit]'")
    sweep = start("budget.tokens=2048", "hydra/launcher=submitit_local")
    said = sweep.communicate()[0]
    assert sweep.returncode == 0 and "6 of 6 runs are done" in said, said
    equal_to_runs_alone(text, tmp_path, "budget.tokens=2048")


def test_several_processes_train_each_run_of_a_sweep(text, start, tmp_path):
    sweep = start("budget.tokens=2048", "trainer=ddp_cpu", "trainer.devices=2", "hydra.launcher.n_jobs=1")
    said = sweep.communicate()[0]
    assert sweep.returncode == 0 and "6 of 6 runs are done" in said, said
    records = [state(folder) for folder in (tmp_path / "runs").glob("*/seed*")]
    assert [r["provenance"]["ranks"] for r in records] == [2] * 6


def test_joblibs_workers_and_the_command_may_be_killed(text, start, tmp_path):
    """As tests/studies/test_kills.py, of the workers that a user has."""
    watch = Watch(tmp_path / "runs")
    sweep = start(*LONG)
    for ended in (0, 2):
        watch.until(sweep, lambda kinds, n=ended: kinds.count("running") and len(watch.ended) >= n)
        os.kill(trainer(tmp_path / "runs"), signal.SIGKILL)
        watch.until(sweep, lambda kinds: "orphaned" in kinds)
    watch.until(sweep, lambda kinds: kinds.count("running") and len(watch.ended) >= 4)
    worker = trainer(tmp_path / "runs")
    sweep.kill()
    sweep.wait()
    again = start(*LONG)
    while again.poll() is None:
        watch.look()
        time.sleep(0.1)
    assert again.returncode == 0
    assert not Path(f"/proc/{worker}").exists()  # it has ended its run, and itself
    equal_to_runs_alone(text, tmp_path, *LONG)


def trainer(runs: Path) -> int:
    """A process that trains a run."""
    for folder in runs.glob("*/seed*"):
        if state(folder)["status"] == "running":
            return int((folder / "lock").read_text().split()[1])
    raise AssertionError("no run is being trained")
