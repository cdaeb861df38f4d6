"""One run: found, gone on with, done again, failed, diverged; what watches it changes nothing."""

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import Ambush, Child, forked, nano, outcome, rows, train, write_text

from albert_ablate.config import ConfigError, checked_config
from albert_ablate.model.weights import weights_hash
from albert_ablate.records.folder import Busy, RunFolder
from albert_ablate.records.history import SCHEMAS, read_history
from albert_ablate.training.checkpoint import load_checkpoint
from albert_ablate.training.console import show_result
from albert_ablate.training.cost import memory, memory_hint
from albert_ablate.training.diagnostics import interval
from albert_ablate.training.divergence import Divergence, end_kind, midway
from albert_ablate.training.errors import RunFailed
from albert_ablate.training.recorder import Recorder
from albert_ablate.training.run import run
from albert_ablate.training.validation import due

GOOD = ["optimizer.lr=0.05", "budget.tokens=3840"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A root shared by the tests that only read a finished run."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def done(text, runs) -> dict:
    os.environ["SOME_API_KEY"] = "sentinel-of-the-environment"
    try:
        return train(nano(text, runs, *GOOD))
    finally:
        del os.environ["SOME_API_KEY"]


def snapshot(folder: Path | str) -> dict[str, tuple[int, bytes]]:
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in Path(folder).rglob("*") if f.is_file()}


def losses(record: dict) -> list[dict]:
    """All that a step's row says of training; the noise scale is measured at logged steps alone."""
    return rows(record["folder"], "steps").drop_columns("noise_scale").to_pylist()


# --- a finished run --------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_finished_run_leaves_what_the_design_lists(done):
    folder = Path(done["folder"])
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    histories = {f"{name}.arrow" for name in SCHEMAS}
    weights = {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert files == {"config.yaml", "record.json", "lock", *histories, *weights}
    for name in ("best", "last"):
        content = load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")
        assert set(content) == {"state_dict", "step", "run"} and content["run"] == done["identity"]
    record = json.loads((folder / "record.json").read_text(), parse_constant=pytest.fail)
    keys = "status arm setting seed identity summary proof provenance cost error"
    assert set(keys.split()) <= set(record)
    assert {"train_loss", "val_loss", "val_bits_per_byte", "gap", "tokens"} <= set(record["summary"])
    assert {"data_order", "initial_draws", "final_weights"} == set(record["proof"])
    assert {"seconds", "flops", "peak_memory_bytes", "tokens_per_second"} <= set(record["cost"])
    assert record["status"] == "finished" and record["error"] is None
    assert record == {k: v for k, v in done.items() if k != "folder"}
    assert folder.parts[-2:] == (record["setting"], "seed0")


@pytest.mark.process
def test_histories_hold_a_row_a_step_an_evaluation_and_a_layer(done):
    steps, evals, layers = (rows(done["folder"], name).to_pylist() for name in ("steps", "evals", "layers"))
    assert [r["step"] for r in steps] == list(range(1, 31))
    assert [r["tokens"] for r in steps] == [128 * k for k in range(1, 31)]
    # every 1300 tokens: at the first steps beyond 1300, 2600; and before the first, and at the end
    assert [r["step"] for r in evals if r["split"] == "validation"] == [0, 11, 21, 30]
    assert [r["step"] for r in evals if r["split"] == "train"] == [0, 11, 21, 30]
    places = [(k, i, which) for k in range(0, 31, 4) for i in (0, 1) for which in ("attention", "mlp")]
    assert [(r["step"], r["layer"], r["sublayer"]) for r in layers] == places
    assert all(r["loss"] > 0 and r["grad_norm"] > 0 and r["lr"] > 0 for r in steps)
    assert done["summary"]["val_loss"] == [r["loss"] for r in evals if r["split"] == "validation"][-1]


@pytest.mark.process
def test_nothing_of_the_environment_is_in_any_file(done):
    for name, (_, content) in snapshot(done["folder"]).items():
        assert b"sentinel-of-the-environment" not in content, name


@pytest.mark.process
def test_a_done_run_is_found_without_lightning(done, text, runs):
    before = snapshot(done["folder"])

    def again() -> dict:
        for name in [n for n in sys.modules if n.split(".")[0] in ("pytorch_lightning", "torchmetrics")]:
            sys.modules[name] = None  # type: ignore[assignment]  importing it raises
        return run(nano(text, runs, *GOOD, "evaluation.every=700", "logger=wandb_offline", "debug=true"))

    record = forked(again)
    assert record["found"] and {k: v for k, v in record.items() if k != "found"} == done
    assert snapshot(done["folder"]) == before


@pytest.mark.process
def test_finding_a_run_removes_leftovers_of_a_late_kill(done, text, runs):
    left = Path(done["folder"]) / "checkpoints" / "resume.ckpt"
    left.touch()
    assert train(nano(text, runs, *GOOD))["found"]
    assert not left.exists()


# --- bit-identical ---------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_one_configuration_in_two_folders_gives_equal_bits(done, text, tmp_path):
    assert outcome(train(nano(text, tmp_path, *GOOD))["folder"]) == outcome(done["folder"])


DROPOUT = [*GOOD, "dropout=uniform", "dropout.sites=[embedding,attention,residual,hidden]"]


@pytest.fixture(scope="module")
def unwatched(text, tmp_path_factory) -> dict:
    rarely = ("evaluation.every=1_000_000", "diagnostics.every=0")
    return train(nano(text, tmp_path_factory.mktemp("unwatched"), *DROPOUT, *rarely))


@pytest.mark.process
@pytest.mark.parametrize("watching", ["evaluation.every=1 evaluation.tokens=2048", "diagnostics.every=1"])
def test_watching_a_run_does_not_disturb_it(watching, unwatched, text, tmp_path):
    watched = forked(lambda: run(nano(text, tmp_path, *DROPOUT, *watching.split()), verbose=True))
    assert losses(watched) == losses(unwatched)
    assert watched["proof"] == unwatched["proof"]
    assert watched["identity"] == unwatched["identity"]


@pytest.mark.process
def test_evaluations_are_on_a_fixed_sample(text, tmp_path):
    """With a learning rate too small to change a float, all evaluations agree."""
    record = train(nano(text, tmp_path, "optimizer.lr=1e-30", "budget.tokens=3840", "evaluation.every=500"))
    evals = rows(record["folder"], "evals").to_pylist()
    for split in ("train", "validation"):
        assert len({(r["loss"], r["accuracy"]) for r in evals if r["split"] == split}) == 1
    steps = losses(record)
    assert len({r["loss"] for r in steps}) == len(steps)  # whereas each batch is another


# --- once more -------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_force_trains_again_and_notes_whether_it_agrees(text, tmp_path):
    again = nano(text, tmp_path, *GOOD, "force=true")
    first = train(nano(text, tmp_path, *GOOD))
    before = outcome(first["folder"])
    assert train(again)["reproduction"] == "reproduced"
    folder = RunFolder(Path(first["folder"]))
    record = folder.record()
    folder.write({**record, "proof": {**record["proof"], "final_weights": "0" * 32}})
    kind, _ = Child(lambda: ambush(again, 300)).wait()
    assert kind == "killed"
    stopped = forked(lambda: ambush(again, 200, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped["status"] == "stopped"
    assert train(nano(text, tmp_path, *GOOD))["found"], "an interrupted repetition leaves the run done"
    last = train(again)
    assert last["reproduction"] == "differs"
    assert [note["verdict"] for note in last["reproductions"]] == ["reproduced", "differs"]
    assert RunFolder(folder.path / "reproduction").record()["sessions"] == 3
    after = outcome(first["folder"])
    assert after["weights"] == before["weights"] and after["rows"] == before["rows"]


def ambush(cfg: dict, at: int, act=lambda: os.kill(os.getpid(), signal.SIGKILL)) -> dict:
    Ambush(at, act).set()
    return run(cfg)


# --- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_of_two_processes_one_trains(text, tmp_path):
    cfg = nano(text, tmp_path, *GOOD)
    waiting, woken = os.pipe()
    told, telling = os.pipe()

    def hold():
        os.write(telling, b"x")
        os.read(waiting, 1)

    first = Child(lambda: ambush(cfg, 300, hold))
    os.read(told, 1)
    folder = next(tmp_path.glob("*/seed0"))
    before = snapshot(folder)
    kind, error = Child(lambda: run(cfg)).wait()
    assert kind == "error" and isinstance(error, Busy) and isinstance(error, ConfigError)
    assert f"process {first.pid} on" in str(error) and "\n" not in str(error)
    assert snapshot(folder) == before
    os.write(woken, b"x")
    kind, record = first.wait()
    assert kind == "value" and record["status"] == "finished" and record["sessions"] == 1


# --- failures --------------------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.process
@pytest.mark.parametrize("moment", ["fsync", "replace", "write"])
def test_a_full_disk_fails_the_run_which_then_goes_on(moment, done, text, tmp_path, capfd):
    cfg = nano(text, tmp_path, *GOOD)

    def work():
        watch = Ambush(-1)
        watch.set()
        count = iter(range(10**9))
        at = {"fsync": 60, "replace": 20, "write": 120}[moment]
        watch.moment = lambda name: full() if name == moment and next(count) == at else None  # type: ignore
        run(cfg)

    kind, error = Child(work).wait()
    assert kind == "error" and isinstance(error, RunFailed)
    assert "No space left" in str(error) and "\n" not in str(error)
    folder = RunFolder(next(tmp_path.glob("*/seed0")))
    record = folder.record()
    assert record["status"] == "failed" and "OSError: [Errno 28] No space left on device" in record["error"]
    again = train(cfg)
    assert again["error"] is None and again["sessions"] == 2
    assert outcome(folder.path) == outcome(done["folder"])


@pytest.mark.process
def test_a_disk_full_for_good_leaves_the_last_commit(done, text, tmp_path):
    """A real limit on the size of files, lifted again."""
    cfg = nano(text, tmp_path, *GOOD)

    def work():
        def limit(size: int):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        try:
            ambush(cfg, 300, lambda: limit(2000))
        finally:
            limit(resource.RLIM_INFINITY)  # stdout may be a file too

    kind, error = Child(work).wait()
    assert kind == "error" and isinstance(error, RunFailed)
    record = RunFolder(next(tmp_path.glob("*/seed0"))).record()
    assert record["status"] == "running" and record["progress"]["step"] > 0
    assert outcome(train(cfg)["folder"]) == outcome(done["folder"])


@pytest.mark.process
def test_an_error_in_training_is_kept_and_the_run_goes_on(done, text, tmp_path):
    from albert_ablate.training.module import LanguageModel

    cfg = nano(text, tmp_path, *GOOD)

    def broken(at: int):
        step = LanguageModel.training_step

        def training_step(self, batch, index):
            if self.micro_batches == at:
                raise ZeroDivisionError("of all things")
            return step(self, batch, index)

        LanguageModel.training_step = training_step
        run(cfg)

    for at, reached in ((20, 20), (0, 0)):  # the second time from step 20 on, so that nothing breaks
        kind, value = Child(lambda at=at: broken(at)).wait()
        if at:
            assert kind == "error" and str(value).startswith("The run failed: ZeroDivisionError: of all things.")
            record = RunFolder(next(tmp_path.glob("*/seed0"))).record()
            assert record["status"] == "failed" and record["progress"]["step"] == reached
            assert "training_step" in record["error"] and "ZeroDivisionError" in record["error"]
        else:
            assert kind == "value"
    assert outcome(next(tmp_path.glob("*/seed0"))) == outcome(done["folder"])


@pytest.mark.process
def test_an_error_before_the_first_commit_starts_clean_again(done, text, tmp_path):
    cfg = nano(text, tmp_path, *GOOD)

    def broken():
        from albert_ablate.training.validation import Evaluator

        def evaluate(self, model, split, precision):
            raise RuntimeError("no sample")

        Evaluator.evaluate = evaluate
        run(cfg)

    kind, error = Child(broken).wait()
    assert kind == "error" and isinstance(error, RunFailed)
    folder = next(tmp_path.glob("*/seed0"))
    record = RunFolder(folder).record()
    assert record["status"] == "failed" and "no sample" in record["error"]
    assert read_history(folder, "steps", record["histories"]).num_rows == 0
    (folder / "steps.arrows").write_bytes(b"rubbish")
    assert train(cfg)["sessions"] == 1
    assert outcome(folder) == outcome(done["folder"])


@pytest.mark.process
def test_a_corrupt_record_is_refused_in_one_sentence(text, tmp_path):
    cfg = nano(text, tmp_path, *GOOD)
    assert Child(lambda: ambush(cfg, 200)).wait()[0] == "killed"
    file = next(tmp_path.glob("*/seed0/record.json"))
    file.write_text(file.read_text()[:100])
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="record.json cannot be read"):
        train(cfg)
    assert snapshot(tmp_path) == before


@pytest.mark.process
@pytest.mark.parametrize("mistake", ["trainer=gpu", "dropout=depth_decay dropout.mean=0.6"])
def test_a_mistake_that_only_building_shows_leaves_no_folder(mistake, text, tmp_path):
    if mistake == "trainer=gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError):
        train(nano(text, tmp_path, *GOOD, *mistake.split()))
    assert list(tmp_path.rglob("*")) == []


# --- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize(
    "kind, overrides",
    [
        ("non_finite", ["optimizer=sgd", "optimizer.lr=1e30", "clip=none", "norm=none"]),
        ("above_initial", ["optimizer=sgd", "optimizer.lr=1", "clip=none", "schedule=constant"]),
        ("stuck", ["optimizer.lr=1e-6", "budget.tokens=10240"]),
    ],
)
def test_divergence_is_an_outcome_with_its_kind(kind, overrides, text, tmp_path, capsys):
    cfg = nano(text, tmp_path, "budget.tokens=5120", *overrides)
    record = train(cfg)
    summary, folder = record["summary"], Path(record["folder"])
    assert record["status"] == "diverged" and summary["divergence"] == kind
    steps = losses(record)
    assert [r["step"] for r in steps] == list(range(1, summary["steps"] + 1))
    if kind == "non_finite":
        assert summary["steps"] < 40 and summary["val_loss"] is summary["gap"] is summary["val_perplexity"] is None
        assert summary["test_loss"] > 0 and summary["best_val_loss"] > 0  # of the best weights, which are finite
    if kind == "above_initial":
        above = [r["loss"] > 1.02 * summary["initial_loss"] for r in steps]
        assert above[-5:] == [True] * 5  # at least 5 steps, more than 10 % of 40
        assert not any(all(above[i : i + 5]) for i in range(len(above) - 5))
    if kind == "stuck":
        assert summary["steps"] == 80 and summary["val_loss"] > 0.98 * summary["unigram_loss"]
    best = load_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert all(value.isfinite().all() for value in best["state_dict"].values())
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["step"] == summary["steps"]
    json.loads((folder / "record.json").read_text(), parse_constant=pytest.fail)
    found = train(cfg)
    assert found.pop("found") and found == record
    show_result(record)
    table = capsys.readouterr().out
    assert f"diverged ({kind})" in table and "nan" not in table and "inf" not in table.replace("not finite", "")
    assert ("not finite" in table) == (kind == "non_finite")


@pytest.mark.process
@pytest.mark.parametrize("given", ["optimizer=sgd optimizer.lr=300 clip=none", "optimizer.lr=1e-6 budget.tokens=10240"])
def test_a_diverged_run_is_killed_and_resumed(given, text, tmp_path):
    overrides = ["schedule=constant", "budget.tokens=5120", *given.split()]
    expected = outcome(train(nano(text, tmp_path / "whole", *overrides))["folder"])
    assert expected["status"] == "diverged"
    cfg = nano(text, tmp_path / "parts", *overrides)
    assert Child(lambda: ambush(cfg, 800 if "10240" in given else 110)).wait()[0] == "killed"
    assert outcome(train(cfg)["folder"]) == expected


def test_divergence_needs_a_tenth_of_the_budget_or_five_steps():
    for steps, tenth in ((1, 5), (10, 5), (31, 5), (50, 5), (51, 6), (70, 7), (1000, 100)):
        watch = Divergence(steps)
        watch.initial = 5.0
        assert [watch.update(5.09, 1.0) for _ in range(steps)] == [None] * steps  # the noise of a batch
        assert [watch.update(6.0, 1.0) for _ in range(tenth)] == [None] * (tenth - 1) + ["above_initial"]
    watch = Divergence(20)
    watch.initial = 5.0
    assert [watch.update(loss, 1.0) for loss in (6, 6, 6, 6, 5, 6, 6, 6, 6, 6)] == [None] * 9 + ["above_initial"]
    assert watch.update(float("nan"), 1.0) == watch.update(1.0, float("inf")) == "non_finite"


FLAT = [2.01, 2.0]  # lies at the unigram loss


def test_the_end_is_two_percent_below_the_unigram_model():
    assert end_kind(FLAT, 0.01, 9.1, 2.0) is None  # learned by heart, which is no instability
    assert [end_kind(FLAT, 2.0, loss, 2.0) for loss in (1.9, 1.96, 1.961, 2.5, float("nan"), float("inf"))] == [
        None,
        None,
        "stuck",
        "stuck",
        "non_finite",
        "non_finite",
    ]


def test_a_run_is_stuck_only_where_it_has_stopped_falling():
    """Unigram loss 2: one falls that gains 0.04 over its second half, 0.004 of that in the last quarter."""
    ends = {(2.135, 2.11): "stuck", (2.145, 2.11): None, (2.145, 2.103): "stuck", (4.0, 2.09): "stuck"}
    assert {losses: end_kind(losses, 2.1, 2.1, 2.0) for losses in ends} == ends
    assert end_kind([], 2.1, 2.1, 2.0) is None
    assert midway(79) == () and midway(80) == (40, 60) and midway(97) == (49, 73)


@pytest.mark.process
def test_batch_noise_does_not_decide_whether_a_run_is_stuck(text, tmp_path, monkeypatch):
    """A rate of 1e-6 moves nothing, and the batches seem to fall, as by chance in a seed of post_ln at 96 layers."""
    plain = Recorder.on_train_batch_end

    def easier(self, trainer, module, *args):
        module.watch.losses[:] = [loss - 0.01 * self.step for loss in module.watch.losses]
        plain(self, trainer, module, *args)

    monkeypatch.setattr(Recorder, "on_train_batch_end", easier)
    record = train(nano(text, tmp_path, "optimizer.lr=1e-6", "budget.tokens=10240"))
    seen = [r["loss"] for r in losses(record)]
    assert sum(seen[40:60]) - sum(seen[60:]) > 20 * 0.02 * record["summary"]["unigram_loss"]
    assert record["summary"]["divergence"] == "stuck"


@pytest.mark.process
@pytest.mark.parametrize("norm", ["pre_ln", "none"])
def test_a_short_run_is_finished_and_says_that_it_was_too_short(norm, tmp_path, capsys):
    given = f"model=nano norm={norm} budget.tokens=16_000 trainer=cpu trainer.threads=1 evaluation.tokens=512"
    record = train(checked_config([*given.split(), f"paths.runs={tmp_path}", "evaluation.every=16_000"]))
    assert record["status"] == "finished" and record["summary"]["divergence"] is None
    assert record["summary"]["below_unigram"] is False
    show_result(record)
    assert "finished, too short to beat the unigram model" in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.slow
def test_post_ln_of_96_layers_is_stuck(tmp_path):
    deep = "model=deep_96 norm=post_ln budget.tokens=50_000"  # with seed 1 the batches seem to fall
    for given, kind in ((deep, "stuck"), (f"{deep} seed=1", "stuck"), ("model=nano norm=none", None)):
        record = train(checked_config([*given.split(), "trainer=cpu", "trainer.threads=1", f"paths.runs={tmp_path}"]))
        assert record["summary"]["divergence"] == kind
        assert record["summary"]["below_unigram"] is (kind is None)


@pytest.mark.process
def test_evaluations_and_layer_rows_over_any_budget(text, tmp_path):
    for steps, times in ((1, 1), (7, 7), (20, 20), (97, 20), (10_000, 20)):
        at = [s for s in range(1, steps + 1) if due(s, steps, 512, None)]
        assert len(at) == times and at[-1] == steps
    assert [s for s in range(1, 9) if due(s, 8, 512, 1000)] == [2, 4, 6, 8]  # as evaluation.every=1000 always did
    assert [interval(None, s) for s in (1, 40, 80, 4000)] == [1, 1, 2, 100] and interval(0, 80) == 0
    every = ("evaluation.every=null", "diagnostics.every=null")
    cfg = nano(text, tmp_path, "budget.tokens=5120", "optimizer.lr=0.03", *every)
    record = train(cfg)
    evals = {r["step"] for r in rows(record["folder"], "evals").to_pylist()}
    assert evals == {0, *range(2, 41, 2)}
    assert {r["step"] for r in rows(record["folder"], "layers").to_pylist()} == set(range(41))


# --- proof and memory ------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_the_weights_hash_is_that_of_the_last_checkpoint(done, text, runs):
    from albert_ablate.model.build import build_model

    def rebuilt() -> str:
        model = build_model(nano(text, runs, *GOOD))
        model.load_state_dict(load_checkpoint(Path(done["folder"]) / "checkpoints" / "last.ckpt")["state_dict"])
        first = weights_hash(model)
        with torch.no_grad():
            value = next(model.parameters()).view(-1)
            value[0] = torch.nextafter(value[0], torch.tensor(9.0))
        assert weights_hash(model) != first
        return first

    assert forked(rebuilt) == done["proof"]["final_weights"]


@pytest.mark.process
@pytest.mark.slow
def test_memory_and_time_a_step_do_not_grow(text, tmp_path):
    def work() -> tuple[list[int], dict]:

        used, begin = [], Recorder._commit

        def commit(self, *args):
            begin(self, *args)
            assert not any(history.pending for history in self.histories.values())
            used.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

        Recorder._commit = commit
        overrides = ("budget.tokens=640_000", "checkpoint.seconds=0.3", "evaluation.every=1_000_000")
        return used, run(nano(text, tmp_path, "optimizer.lr=0.01", *overrides))

    used, record = forked(work)
    assert max(used) - used[len(used) // 5] < 8e6, used
    seconds = read_history(Path(record["folder"]), "steps", None)["seconds"].to_numpy()
    first, last = (np.quantile(np.diff(part), 0.1) for part in (seconds[:1000], seconds[-1000:]))
    assert last < 1.3 * first, (first, last)  # of the quickest steps, which other work on the machine leaves alone


@pytest.mark.process
def test_a_lack_of_memory_is_answered_with_the_estimate(text, tmp_path):
    """torch's own allocator refuses a tensor of 4 PB in the first step."""

    def work():
        from albert_ablate.training.module import LanguageModel

        LanguageModel.training_step = lambda *args: torch.empty(10**15)
        run(nano(text, tmp_path))

    kind, error = Child(work).wait()
    assert kind == "error" and isinstance(error, RunFailed)
    parts = memory(nano(text, tmp_path))
    expected = f"{parts['weights'] / 2**30:.3g} GiB for weights, as much for gradients"
    assert expected in str(error) and "trainer.gradient_checkpointing=true lowers the last" in str(error)
    assert memory_hint(RuntimeError("shapes differ"), nano(text, tmp_path)) == ""
