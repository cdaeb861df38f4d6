"""What benchmarks/gpu.py checks, where torch finds a GPU."""

import importlib.util
from pathlib import Path

import pytest
import replaying
import torch

from albert_ablate import compose
from albert_ablate.training import graph, module

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SPEC = importlib.util.spec_from_file_location("gpu", FILE)
assert SPEC is not None and SPEC.loader is not None
gpu = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu)


GPU = pytest.param(
    "gpu",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
        pytest.mark.filterwarnings("default"),  # libraries advise on what a card could do
    ],
)
# torch's compiler looks at .grad of tensors of its own
CPU = pytest.param("cpu", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore:The .grad attribute")])


@pytest.mark.process
@pytest.mark.parametrize("name", gpu.CHECKS)
@pytest.mark.parametrize("device", [GPU, CPU])
def test_a_gpu_does_what_a_cpu_does(name, device, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(gpu, "DEVICE", device)
    try:
        gpu.CHECKS[name](tmp_path)
    except gpu.Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
def test_what_needs_a_gpu_has_a_way_on_a_cpu(tmp_path, monkeypatch):
    """Their bodies, with the stand-in for CUDA graphs: what they would say on a GPU is not known."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "need_gpu", lambda: None)
    monkeypatch.setattr(gpu, "GRAPH", "trainer.graph=auto")  # true is refused here
    monkeypatch.setattr(gpu, "SPEED", 0.0)
    monkeypatch.setattr(graph, "recorded", replaying.recorded)
    monkeypatch.setattr(module, "uses_graph", lambda cfg: bool(cfg.trainer.graph))
    assert gpu.graph(tmp_path).startswith("validation losses 0.0e+00 apart, weights the same bit for bit")
    assert gpu.pace(tmp_path, "model=nano", gpu.GRAPH, steps=8) > 0
    monkeypatch.setattr(gpu, "pace", lambda runs, *more, steps: 2.0 if gpu.GRAPH in more else 1.0)
    said = "nano 1 tokens/s, graph 2.00, compile 1.00, both 2.00"
    assert gpu.graph_pace(tmp_path, ("nano",)) == said
    pytest.importorskip("x_transformers", reason="the extra reference")
    assert "of the fastest peer" in gpu.beside_peers(tmp_path, "mini", steps=4, rounds=1)


def test_first_steps_are_compared_by_their_moves(monkeypatch):
    """The part of a check that needs no GPU."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    moved, largest = gpu.one_step(compose([*gpu.NANO, "optimizer=sgd", "schedule=constant", "clip=none"]), "cpu")
    assert largest == max(float(m.abs().max()) for m in moved.values()) > 0


def test_the_file_is_headed_by_the_device(tmp_path, monkeypatch, capsys):
    def broken(runs):
        raise AssertionError("too far\napart")

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(gpu, "CHECKS", {"good": lambda runs: "as it should be", "bad": broken, "graph": gpu.graph})
    file = tmp_path / "gpu.md"
    monkeypatch.setattr("sys.argv", ["gpu.py", "-o", str(file), "--device", "cpu", "--only", "good", "bad", "graph"])
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    assert gpu.main() == 1
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# Checks on a CPU") and torch.__version__ in lines[0]
    assert [line.split(" | ")[1] for line in lines[4:]] == [
        "as it should be",
        "**failed**: AssertionError: too far apart",
        "skipped: it needs a GPU",
    ]
    assert "as it should be" in capsys.readouterr().out
