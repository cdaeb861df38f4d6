"""`albert-ablate tune`: the right rate of a known curve, as many runs for every arm, and a sweep that then uses it."""

import json
import math
from collections import Counter

import pytest
from forking import arguments, nano, write_text

from albert_ablate.cli import main
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.tuning import FIRST_SEED, read_tuning, write_tuning
from albert_ablate.studies.launch import Study
from albert_ablate.studies.tune import describe, loss_of
from albert_ablate.training.prepare import identified
from albert_ablate.training.swept import with_tuned_rate

OPTIMA = {"pre_ln": 3.1e-3, "post_ln": 1.3e-3, "none": math.inf}  # the rate at which each arm is best; none: never
STUCK = 3.5  # losses above are those of stuck runs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def trained(monkeypatch):
    """Runs whose loss is a parabola in the logarithm of the rate, in place of trained ones; gives those asked for."""
    asked = []

    def complete(self, planned):
        for p in planned:
            folder = RunFolder(p.folder)
            if folder.record() is None:
                asked.append(p)
                x = math.log(p.cfg["optimizer"]["lr"]) - math.log(OPTIMA[p.cfg["choices"]["norm"]])
                loss = 2.0 + 0.1 * x**2 + (p.seed - FIRST_SEED) / 7
                status = "finished" if math.isfinite(loss) else "diverged"
                folder.create()
                stuck = status == "finished" and loss > STUCK
                status, kind = ("diverged", "stuck") if stuck else (status, None)
                summary = {"val_loss": loss, "divergence": kind}
                folder.write({"status": status, "seed": p.seed, "summary": summary, "cost": {}})
        return {}

    monkeypatch.setattr(Study, "complete", complete)
    return asked


@pytest.fixture
def tune(text, tmp_path):
    def command(norms, *more, name="tune"):
        file = tmp_path / "study.yaml"
        file.write_text(
            f"method: grid\nparameters:\n  norm: {{values: [{norms}]}}\n  seed: {{values: [0, 1]}}\n"
            "command: [python, run.py, '${args_no_hyphens}']\n"
        )
        given = [o for o in arguments(text, tmp_path / "runs") if not o.startswith(("paths.runs", "optimizer.lr"))]
        return main([name, str(file), "--runs", str(tmp_path / "runs"), *given, *more])

    return command


def results(tmp_path):
    found = [json.loads(f.read_text()) for f in (tmp_path / "runs" / "tuning").glob("*.json")]
    return {f["arm"].removeprefix("norm="): f for f in found}  # an arm alone in its file is named by the file


def test_each_arm_gets_its_optimum_with_as_many_runs(tune, trained, tmp_path, capsys):
    assert tune("pre_ln, post_ln") == 0
    for norm, found in results(tmp_path).items():
        assert found["rate"] == pytest.approx(OPTIMA[norm], rel=1e-3) and found["edge"] is None and found["trained"]
        assert found["slack"] == pytest.approx(0, abs=1e-9)  # the seeds differ by a constant alone
        full = [c for c in found["curve"] if c["tokens"] == found["tokens"]]
        assert [len(c["losses"]) for c in full] == [3] * 3 and full[0]["seeds"] == [1000000, 1000001, 1000002]
        assert len(found["curve"]) == 7 + 3 and found["fitted"] and found["rule"] == "moving window"
    counted = Counter(p.cfg["choices"]["norm"] for p in trained)
    assert counted == {"pre_ln": 7 + 3 * 3, "post_ln": 7 + 3 * 3}
    assert min(p.seed for p in trained) == FIRST_SEED
    assert {p.cfg["budget"]["tokens"] for p in trained} == {4096, 1024}
    said = capsys.readouterr().out
    assert (
        "2 arms, 0 tuned, 2 to tune, each with 7 runs of 1/4 of the budget and 9 to 21 runs of the whole budget" in said
    )
    assert "the cost of 13.45 runs expected, of 22.75 at most" in said


def test_an_arm_is_tuned_once_and_another_grid_tunes_it_again(tune, trained, tmp_path, capsys):
    assert tune("pre_ln") == 0
    before = len(trained)
    assert tune("pre_ln, post_ln") == 0
    assert "2 arms, 1 tuned, 1 to tune" in capsys.readouterr().out
    assert len(trained) == 2 * before
    assert tune("pre_ln", "--rates", "5", "--step", "3.16") == 0
    found = results(tmp_path)["study"]
    assert found["rate"] == pytest.approx(OPTIMA["pre_ln"], rel=0.01) and found["step"] == pytest.approx(10**0.5)


def test_a_stopped_tuning_goes_on_and_repeats_nothing(tune, trained, tmp_path, monkeypatch):
    whole = Study.complete

    def stopped(self, planned):
        self.stopped = 15
        return whole(self, planned[:3])

    monkeypatch.setattr(Study, "complete", stopped)
    assert tune("pre_ln", "--rates", "5") == 143
    assert len(trained) == 3 and not (tmp_path / "runs" / "tuning").exists()
    monkeypatch.setattr(Study, "complete", whole)
    assert tune("pre_ln", "--rates", "5") == 0
    assert len(trained) == 5 + 3 * 3 and results(tmp_path)["study"]["rate"] == pytest.approx(3.1e-3, rel=1e-3)


def full_rates(found):
    return sorted(c["rate"] for c in found["curve"] if c["tokens"] == found["tokens"])


def test_a_window_moves_and_arms_get_equally_many_runs(tune, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMA, "post_ln", 0.04)  # the grid around .002 ends at .008
    assert tune("pre_ln, post_ln", "--rates", "5") == 0
    found = results(tmp_path)
    assert full_rates(found["post_ln"]) == [0.004, 0.008, 0.016, 0.032, 0.064]
    assert found["post_ln"]["edge"] is None and found["post_ln"]["rate"] == pytest.approx(0.04, rel=1e-3)
    assert full_rates(found["pre_ln"]) == [0.001, 0.002, 0.004, 0.008, 0.016]  # two more beside its window
    assert found["pre_ln"]["rate"] == pytest.approx(OPTIMA["pre_ln"], rel=1e-3)
    counted = Counter(p.cfg["choices"]["norm"] for p in trained if p.cfg["budget"]["tokens"] == 4096)
    assert counted == {"pre_ln": 15, "post_ln": 15}


def test_a_tuned_arm_gets_rates_when_a_later_window_moves(tune, trained, tmp_path, capsys):
    assert tune("pre_ln", "--rates", "5") == 0
    OPTIMA["post_ln"], kept = 0.04, OPTIMA["post_ln"]
    try:
        before = len(trained)
        assert tune("pre_ln, post_ln", "--rates", "5") == 0
    finally:
        OPTIMA["post_ln"] = kept
    files = [json.loads(f.read_text()) for f in (tmp_path / "runs" / "tuning").glob("*.json")]
    assert [len(full_rates(f)) for f in files] == [5, 5] and len(trained) == before + 5 + 15 + 6
    capsys.readouterr()
    assert tune("pre_ln, post_ln", "--rates", "5") == 0
    assert "2 arms, 2 tuned, 0 to tune" in capsys.readouterr().out and len(trained) == before + 5 + 15 + 6


def test_a_best_rate_at_an_end_after_four_moves_is_flagged(tune, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(OPTIMA, "pre_ln", 1.0)
    assert tune("pre_ln", "--rates", "5") == 0
    found = results(tmp_path)["study"]
    assert found["edge"] == "high" and found["rate"] == full_rates(found)[-1] == 0.256
    assert "the best learning rate is the highest that was run after 4 moves of the window" in capsys.readouterr().out


def test_an_arm_that_no_rate_trains_is_said_to_be_one(tune, trained, tmp_path, capsys, monkeypatch):
    assert tune("none", "--rates", "5") == 0
    found = results(tmp_path)["study"]
    assert not found["trained"] and found["rate"] == min(c["rate"] for c in found["curve"])
    assert "no learning rate trains it" in capsys.readouterr().out
    monkeypatch.setattr("test_tune.STUCK", 0.0)  # every run of the other is stuck, with a finite loss
    assert tune("pre_ln", "--rates", "5") == 0
    said = capsys.readouterr().out
    assert "no learning rate trains it" in said and "(3 of 3 diverged)" in said


def test_stuck_and_exploded_tuning_runs_have_their_losses():
    def record(kind, status="diverged", **summary):
        return {"status": status, "summary": {"divergence": kind} | summary}

    assert loss_of(record("stuck", val_loss=1.62, best_val_loss=1.6), "best_val_loss") == 1.6
    assert loss_of(record(None, "finished", val_loss=1.62, best_val_loss=1.6), "val_loss") == 1.62
    assert loss_of(record("above_initial", val_loss=6.1, best_val_loss=1.2), "best_val_loss") == 6.1
    assert loss_of(record("non_finite", val_loss=1.3, best_val_loss=1.2), "best_val_loss") == math.inf
    assert loss_of(record("stuck", val_loss=None), "val_loss") == math.inf


def test_a_rate_without_a_parabola_is_said_to_be_one(tune, trained, tmp_path, capsys, monkeypatch):
    whole = Study.complete

    def cliff(self, planned):
        """Rates above the best are not finite, and the two below it have no bend."""
        whole(self, planned)
        for p in planned:
            folder, lr = RunFolder(p.folder), p.cfg["optimizer"]["lr"]
            record = folder.record()
            if lr != 0.002:
                loss = {0.001: 3.0, 0.0005: 3.1}.get(lr, math.inf if lr > 0.002 else 4.0)
                folder.write(record | {"summary": {"val_loss": loss}, "status": "finished"})
        return {}

    monkeypatch.setattr(Study, "complete", cliff)
    assert tune("pre_ln", "--rates", "5") == 0
    found = results(tmp_path)["study"]
    assert (found["rate"], found["fitted"], found["slack"]) == (0.002, False, None)
    assert (
        "slack unknown); no parabola was fitted, this is the best learning rate that was run" in capsys.readouterr().out
    )


def test_an_older_file_is_read_and_tuned_anew_from_the_same_runs(tune, trained, tmp_path):
    assert tune("pre_ln", "--rates", "5") == 0
    (file,) = (tmp_path / "runs" / "tuning").iterdir()
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("rule", "fitted", "checksum", "of")}
    for cell in old["curve"]:
        del cell["diverged"]
    file.write_text(json.dumps(old | {"rate": 0.007}))
    assert read_tuning(tmp_path / "runs", file.stem)["rate"] == 0.007
    assert "0.007" in describe("pre", old | {"rate": 0.007})
    before = len(trained)
    assert tune("pre_ln", "--rates", "5") == 0
    assert results(tmp_path)["study"]["rate"] == pytest.approx(3.1e-3, rel=1e-3) and len(trained) == before


def test_the_price_has_an_expected_and_a_worst_case(tune, trained, capsys):
    assert tune("pre_ln", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "the cost of 13.45 runs expected, of 22.75 at most" in said and "At most:" in said and not trained


def test_a_sweep_takes_the_tuned_rate_unless_told_otherwise(tune, trained, tmp_path, capsys):
    assert tune("pre_ln") == 0
    capsys.readouterr()
    assert tune("pre_ln, post_ln", "--dry-run", name="sweep") == 0
    said = capsys.readouterr().out
    assert "norm=pre_ln: optimizer.lr=0.0031, tuned" in said and "norm=post_ln: not tuned" in said
    trained.clear()
    assert tune("pre_ln", name="sweep") == 0
    assert [p.cfg["optimizer"]["lr"] for p in trained] == [pytest.approx(3.1e-3, rel=1e-3)] * 2
    (file,) = (tmp_path / "runs" / "tuning").iterdir()
    assert {p.arm for p in trained} == {file.stem}  # the arm that was tuned, rate and seed apart
    trained.clear()
    assert tune("pre_ln", "--untuned", name="sweep") == 0
    assert tune("pre_ln", "optimizer.lr=0.01", name="sweep") == 0
    assert [p.cfg["optimizer"]["lr"] for p in trained] == [2e-3] * 2 + [0.01] * 2


def test_under_a_w_and_b_agent_a_run_takes_the_tuned_rate_too(text, tmp_path, monkeypatch):
    cfg = nano(text, tmp_path)
    write_tuning(tmp_path, identified(cfg)[1].arm, {"rate": 0.0123})
    assert with_tuned_rate(cfg, []) is cfg  # a run by hand is what its command says
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "def")
    assert with_tuned_rate(cfg, ["seed=1"])["optimizer"] == {**cfg["optimizer"], "lr": 0.0123}
    assert with_tuned_rate(cfg, ["++optimizer.lr=0.1"]) is cfg
    other = nano(text, tmp_path, "norm=post_ln")
    assert with_tuned_rate(other, []) == other
    assert not [f for f in (tmp_path / "tuning").iterdir() if f.suffix != ".json"]


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["optimizer.lr=0.1"], "optimizer.lr=0.1 is not allowed"),
        (["seed=3"], "seed=3 is not allowed"),
        (["--rates", "6"], "--rates=6 is not allowed: it must be odd"),
        (["--seeds", "1"], "--seeds=1 is not allowed"),
        (["--step", "5"], "--step=5 is not allowed"),
        (["budget.tokens=300"], "budget"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(tune, trained, capsys, more, sentence):
    assert tune("pre_ln", *more) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "is given twice on the command line" not in line]
    assert len(said) == 1 and sentence in said[0] and not trained


def test_a_failed_run_leaves_only_its_arm_untuned(tune, trained, tmp_path, capsys, monkeypatch):
    fine = Study.complete

    def complete(self, planned):
        bad = [p for p in planned if p.cfg["choices"]["norm"] == "post_ln"]
        fine(self, [p for p in planned if p not in bad])
        return {p: "MemoryError: no room" for p in bad}

    monkeypatch.setattr(Study, "complete", complete)
    assert tune("pre_ln, post_ln", "--rates", "5") == 1
    assert "norm=post_ln: not tuned" in (said := capsys.readouterr().out) and "no room" in said
    assert [*results(tmp_path)] == ["pre_ln"]


@pytest.mark.slow
def test_a_torn_file_is_named(tune, trained, tmp_path, capsys):
    assert tune("pre_ln", "--rates", "5") == 0
    (file,) = (tmp_path / "runs" / "tuning").iterdir()
    file.write_text(file.read_text()[:40])
    assert tune("pre_ln", name="sweep") == 2
    assert str(file) in capsys.readouterr().err
    with pytest.raises(ValueError, match="remove it"):
        read_tuning(tmp_path / "runs", file.stem)


@pytest.mark.slow
def test_real_arms_are_tuned_and_trained(tune, tmp_path):
    assert tune("pre_ln, post_ln", "budget.tokens=2048", "--rates", "5", "--workers", "2") == 0
    assert len(results(tmp_path)) == 2 and len(list((tmp_path / "runs").glob("*/seed1000000"))) >= 2 * (5 + 3)
