"""--workers auto: which divisions of the cores are measured, and what becomes of the fastest."""

import multiprocessing

import pytest

from albert_ablate.cli import main
from albert_ablate.config import ConfigError
from albert_ablate.studies import packing
from albert_ablate.studies.launch import split_overrides
from albert_ablate.studies.sweepfile import read_sweep

FILE = """method: grid
parameters:
  model: {value: nano}
  norm: {values: [pre_ln, rezero]}
  seed: {values: [0, 1]}
"""


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(packing, "_chosen", None)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    "cores, expected",
    [
        (1, [(1, 1)]),
        (2, [(2, 1), (1, 2)]),
        (6, [(6, 1), (3, 2), (1, 6)]),
        (8, [(8, 1), (4, 2), (2, 4), (1, 8)]),
    ],
)
def test_candidates_go_from_processes_to_threads(cores, expected):
    assert packing.candidates(cores) == expected


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_other_workers_are_refused(text):
    with pytest.raises(ConfigError, match="a number from 1 on, or auto"):
        packing.read_workers(text)


def test_the_fastest_division_is_taken(file, monkeypatch):
    measured = []
    monkeypatch.setattr(packing.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(packing, "_measure", lambda run, options: measured.append(run) or [10.0, 30.0, 20.0])
    said: list[str] = []
    for _ in range(2):  # the second time it is known
        launcher, extra, workers = split_overrides(read_sweep(file), ["budget.tokens=5_000"], packing.AUTO, said.append)
    assert workers == 2 and extra == ["trainer.threads=2", "budget.tokens=5_000"]
    assert "hydra.launcher.n_jobs=2" in launcher
    assert [set(m) for m in measured] == [{"model=nano", "norm=pre_ln", "seed=0", "budget.tokens=5_000"}]
    assert len(said) == 1 and "takes 2 processes of 2 threads" in said[0]


@pytest.mark.parametrize("other", ["trainer.threads=2", "hydra/launcher=basic"])
def test_auto_refuses_what_decides_already(file, other, capsys):
    assert main(["sweep", str(file), other, "--workers", "auto", "--dry-run"]) == 2
    assert "--workers=auto contradicts" in capsys.readouterr().err


def test_without_auto_nothing_is_measured(file, monkeypatch):
    monkeypatch.setattr(packing, "_measure", None)
    assert split_overrides(read_sweep(file), [], 3)[1:] == (["trainer.threads=1"], 3)


def test_auto_of_commands_is_refused(capsys):
    assert main(["compare", "python a.py {seed}", "python b.py {seed}", "--metric", "x", "--workers", "auto"]) == 2
    assert "it measures the training of overrides" in capsys.readouterr().err


@pytest.mark.process
def test_real_steps_are_measured(monkeypatch):
    monkeypatch.setattr(packing, "MEASURE_SECONDS", 0.05)
    fork = multiprocessing.get_context("fork")  # the next test starts a process as --workers auto does
    monkeypatch.setattr(packing.multiprocessing, "get_context", lambda method: fork)
    speeds = packing._measure(["model=nano", "model.layers=1", "trainer=cpu"], [(2, 1), (1, 2)])
    assert len(speeds) == 2 and all(speed > 0 for speed in speeds)


@pytest.mark.process
def test_a_run_that_cannot_be_built_is_said():
    with pytest.raises(ConfigError, match="cannot measure this run: .*nromal"):
        packing._measure(["norm=nromal"], [(1, 1)])
