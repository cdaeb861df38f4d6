"""method=bayes with no server: Optuna proposes, W&B's distributions are the prior, nothing is lost or done twice."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from forking import arguments, forked, write_text

from albert_ablate.cli import main
from albert_ablate.config import ConfigError
from albert_ablate.studies.bayes import TrialLog, corners, propose, result_of, search_key
from albert_ablate.studies.launch import Study
from albert_ablate.studies.states import state
from albert_ablate.studies.sweepfile import read_sweep

pytest.importorskip("optuna", reason="method=bayes needs the extra bayes")

BASIC = "hydra/launcher=basic"
COMMAND = "command: [python, run.py, '${args_no_hyphens}']\n"
RATE = "  optimizer.lr: {distribution: log_uniform_values, min: 1.0e-5, max: 1.0}\n"


def bayes_file(tmp_path, parameters=RATE, cap=4, metric="{name: val_loss, goal: minimize}"):
    file = tmp_path / "bayes.yaml"
    file.write_text(f"method: bayes\nrun_cap: {cap}\nmetric: {metric}\nparameters:\n{parameters}{COMMAND}")
    return file


def searched(sweep, objective, trials=30, batch=1):
    """Trials and results of a search of a function of the setting."""
    done, results = [], []
    while len(done) < trials:
        new = propose(sweep, done, results, batch)
        done += new
        results += [objective(t["setting"]) for t in new]
    return done, results


def test_a_search_beats_chance_and_repeats_itself(tmp_path):
    sweep = read_sweep(bayes_file(tmp_path, RATE + "  norm: {values: [pre_ln, post_ln, deepnorm]}\n"))

    def bad(setting):  # the best rate is 3e-3, with deepnorm
        return (math.log10(setting["optimizer.lr"]) + 2.5) ** 2 + (setting["norm"] != "deepnorm")

    done, results = searched(sweep, bad, 40)
    assert searched(sweep, bad, 40) == (done, results)
    assert np.mean([t["setting"]["norm"] == "deepnorm" for t in done[20:]]) > 0.5
    # a draw by chance is within 0.1 of the best with probability (0.2 * sqrt(10)) / 5 / 3 = 0.042
    assert np.mean([r < 0.1 for r in results[20:]]) > 5 * 0.042 and min(results) < 0.01
    maximize = read_sweep(bayes_file(tmp_path, metric="{name: val_loss, goal: maximize}"))
    found, values = searched(maximize, lambda s: -((math.log10(s["optimizer.lr"]) + 2.5) ** 2), 30)
    assert max(values) > -0.02 and np.median(values[15:]) > -1


PRIORS = {
    "uniform": {"min": -1.0, "max": 3.0},
    "log_uniform": {"min": -5.0, "max": 2.0},
    "log_uniform_values": {"min": 1e-4, "max": 0.1},
    "inv_log_uniform": {"min": 2.0, "max": 6.0},
    "inv_log_uniform_values": {"min": 1e-4, "max": 0.1},
    "normal": {"mu": 2.0, "sigma": 0.5},
    "log_normal": {"mu": 0.3, "sigma": 0.5},
    "beta": {"a": 2.0, "b": 5.0},
    "q_uniform": {"min": 0.0, "max": 3.0, "q": 0.5},
    "q_normal": {"mu": 2.0, "sigma": 2.0, "q": 1.0},
    "int_uniform": {"min": 2, "max": 9},
}


def test_each_distribution_is_its_own_prior(tmp_path):
    """Without results the proposals follow the law, by scipy."""
    from scipy import stats

    lines = [f"  data.p{i}: {json.dumps({'distribution': d, **a})}\n" for i, (d, a) in enumerate(PRIORS.items())]
    lines.append("  data.named: {values: [a, b], probabilities: [0.9, 0.1]}\n")
    sweep = read_sweep(bayes_file(tmp_path, "".join(lines)))
    settings = [t["setting"] for t in propose(sweep, [], [], 300)]
    values = {d: [s[f"data.p{i}"] for s in settings] for i, d in enumerate(PRIORS)}
    laws = {
        "uniform": stats.uniform(-1, 4),
        "log_uniform": stats.loguniform(math.exp(-5), math.exp(2)),
        "log_uniform_values": stats.loguniform(1e-4, 0.1),
        "inv_log_uniform": stats.loguniform(math.exp(-6), math.exp(-2)),
        "inv_log_uniform_values": stats.loguniform(1e-4, 0.1),
        "normal": stats.norm(2, 0.5),
        "log_normal": stats.lognorm(0.5, scale=math.exp(0.3)),
        "beta": stats.beta(2, 5),
    }
    for name, law in laws.items():
        assert stats.kstest(values[name], law.cdf).pvalue > 1e-3, name
    assert set(values["int_uniform"]) == set(range(2, 10))
    assert all(isinstance(v, int) for v in values["int_uniform"])
    assert set(values["q_uniform"]) == {0, 0.5, 1, 1.5, 2, 2.5, 3}
    assert all(v == round(v) for v in values["q_normal"]) and np.mean(values["q_normal"]) == pytest.approx(2, abs=0.5)
    assert 0.02 < np.mean([s["data.named"] == "b" for s in settings]) < 0.2


def test_workers_get_different_proposals_and_none_twice(tmp_path):
    sweep = read_sweep(
        bayes_file(tmp_path, "  model.layers: {values: [2, 3, 4]}\n  model.tied: {values: [true, false]}\n")
    )
    done, _ = searched(sweep, lambda s: s["model.layers"], 6, batch=2)
    assert len({str(t["setting"]) for t in done}) == 6
    assert propose(sweep, done, [1.0] * 6, 2) == []  # there are no more
    rates = read_sweep(bayes_file(tmp_path))
    done, results = searched(rates, lambda s: (math.log10(s["optimizer.lr"]) + 2.5) ** 2, 20)
    four = [math.log10(t["setting"]["optimizer.lr"]) for t in propose(rates, done, results, 4)]
    assert min(abs(a - b) for i, a in enumerate(four) for b in four[:i]) > 0.01
    assert propose(rates, done, [None] * 20, 2)  # all of them failed


def test_the_key_is_what_is_searched(tmp_path):
    key = search_key(read_sweep(bayes_file(tmp_path)))
    assert search_key(read_sweep(bayes_file(tmp_path, cap=9)), ["trainer.threads=1", "logger=wandb"]) == key
    assert search_key(read_sweep(bayes_file(tmp_path)), ["model=nano"]) != key
    assert search_key(read_sweep(bayes_file(tmp_path, RATE.replace("1.0}", "0.5}")))) != key
    assert search_key(read_sweep(bayes_file(tmp_path, metric="{name: gap}"))) != key


def test_a_run_that_diverged_without_a_number_is_the_worst(tmp_path):
    low = read_sweep(bayes_file(tmp_path))
    high = read_sweep(bayes_file(tmp_path, metric="{name: val_loss, goal: maximize}"))
    lost, stuck = ({"status": "diverged", "summary": {"val_loss": v}} for v in (None, 3.2))
    assert (result_of(lost, low), result_of(lost, high), result_of(stuck, low)) == (math.inf, -math.inf, 3.2)
    assert result_of({"status": "failed", "summary": {"val_loss": 2.0}}, low) is None
    cliff = searched(low, lambda s: math.inf if s["optimizer.lr"] > 1e-3 else math.log(s["optimizer.lr"]), 40)[0]
    assert np.mean([t["setting"]["optimizer.lr"] > 1e-3 for t in cliff[20:]]) < 0.4  # 0.6 of the range lies beyond it


def test_the_ends_of_a_range_are_checked_before_training(tmp_path, capfd):
    sweep = read_sweep(bayes_file(tmp_path, "  dropout.mean: {min: 0.0, max: 1.5}\n  dropout: {value: uniform}\n"))
    assert {round(c["dropout.mean"], 3) for c in corners(sweep)} == {0.0, 0.75, 1.5}
    small = ["data=markov", "data.symbols=8", "data.length=60_000", BASIC]
    file = bayes_file(tmp_path, metric="{name: macro_f1, goal: maximize}")
    assert main(["sweep", str(file), *small]) == 2 and "macro_f1 is of task=classify" in capfd.readouterr().err
    assert main(["sweep", str(bayes_file(tmp_path, "  dropout.mean: {min: 0.0, max: 1.5}\n")), *small]) == 2
    assert "dropout.mean" in capfd.readouterr().err and [f.name for f in tmp_path.iterdir()] == ["bayes.yaml"]


PAIRS = "  model.width: {values: [48, 32]}\n  model.heads: {values: [2, 3]}\n"  # a width of 32 has no 3 heads


@pytest.mark.parametrize(
    ("parameters", "done", "code"),
    [(RATE + PAIRS, 6, 0), (PAIRS, 3, 1)],  # of the four pairs three are allowed
)
def test_a_trial_that_is_refused_does_not_count_and_is_replaced(parameters, done, code, tmp_path, capfd, monkeypatch):
    """Without training: a run that is planned is done at once, with a loss that draws the search to 3 heads."""
    heads = {}
    monkeypatch.setattr(Study, "complete", lambda self, planned: heads.update({p.folder: p for p in planned}) or {})

    def record(self, trial):
        if not trial["folder"]:
            return {"status": "refused"}
        loss = 4 - trial["setting"]["model.heads"] - trial["setting"]["model.width"] / 1000
        return {"status": "finished", "summary": {"val_loss": loss}}

    monkeypatch.setattr(TrialLog, "record", record)
    small = ["model=nano", "data=markov", "data.symbols=8", "data.length=60_000", BASIC]
    file = bayes_file(tmp_path, parameters, cap=6)
    for _ in range(2):  # the same command again ends alike
        assert main(["sweep", str(file), "--runs", str(tmp_path / "runs"), "--workers", "2", *small]) == code
        said = capfd.readouterr().out
        (notes,) = (tmp_path / "runs" / "bayes").glob("*/trials.json")
        trials = json.loads(notes.read_text())["trials"]
        refused = [t for t in trials if t["error"]]
        pairs = [(t["setting"]["model.width"], t["setting"]["model.heads"]) for t in refused]
        assert pairs and set(pairs) == {(32, 3)} and len(trials) - len(refused) == done
        assert f"{done} of 6 trials are done, 0 failed, {len(refused)} refused." in said


@pytest.mark.parametrize(
    ("parameters", "more", "words"),
    [
        ("  seed: {values: [0, 1]}\n", "", "look for the luckiest"),
        (RATE, "early_terminate: {type: hyperband}\n", "early_terminate is not supported"),
    ],
)
def test_what_bayes_cannot_honour_is_named(parameters, more, words, tmp_path):
    file = bayes_file(tmp_path, parameters)
    file.write_text(more + file.read_text())
    with pytest.raises(ConfigError, match=words):
        read_sweep(file)


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert main(["sweep", str(bayes_file(tmp_path)), "--runs", str(tmp_path / "runs"), BASIC]) == 2
    assert "pip install 'albert_ablate[bayes]'" in capfd.readouterr().err and not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.mark.process
@pytest.mark.slow
def test_a_stopped_search_ends_as_one_that_was_not(text, tmp_path, capfd):
    given = arguments(text, tmp_path / "runs", "budget.tokens=1024", "checkpoint.seconds=1000")
    given = [o for o in given if not o.startswith("paths.runs")]

    def sweep(where, cap, stop_at=None):
        def work():
            from albert_ablate.training.recorder import Recorder

            end = Recorder.on_train_batch_end

            def on_train_batch_end(self, *args):
                end(self, *args)
                begun = len([*(where / "runs").glob("*/seed0/record.json")])
                if begun == stop_at and self.step == 4:
                    os.kill(os.getpid(), signal.SIGTERM)

            Recorder.on_train_batch_end = on_train_batch_end
            where.mkdir(exist_ok=True)
            return main(
                [
                    "sweep",
                    str(bayes_file(where, RATE.replace("1.0e-5", "1.0e-3").replace("1.0}", "0.03}"), cap)),
                    "--runs",
                    str(where / "runs"),
                    "--workers",
                    "1",
                    BASIC,
                    *given,
                ]
            )

        return forked(work)

    def trials(where):
        sweep_ = read_sweep(where / "bayes.yaml")
        notes = TrialLog(where / "runs", search_key(sweep_, given)).read()
        return [(t["setting"], state(where / "runs" / t["folder"])["proof"]["final_weights"]) for t in notes]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sweep(whole, 2) == 0
    said = capfd.readouterr().out
    assert "2 of 2 trials are done, 0 failed" in said and "best of 2: optimizer.lr=" in said
    assert sweep(parts, 2, stop_at=2) == 143
    assert sweep(parts, 2) == 0
    assert trials(parts) == trials(whole)
    written = {f: f.stat().st_mtime_ns for f in (parts / "runs").glob("*/seed0/record.json")}
    (next((parts / "runs").glob("bayes/*")) / "trials.json").unlink()  # the records alone lead to the same trials
    assert sweep(parts, 2) == 0 and trials(parts) == trials(whole)
    assert written == {f: f.stat().st_mtime_ns for f in (parts / "runs").glob("*/seed0/record.json")}
    assert len(written) == 2
