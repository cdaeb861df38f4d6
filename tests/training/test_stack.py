"""Runs trained as one stack: each leaves the folder that it would leave alone, whatever the others do."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forking import Ambush, Child, forked, nano, outcome, train

from albert_ablate import build_model, compose
from albert_ablate.model.stacked import StackedDecoder
from albert_ablate.training.cost import Phases
from albert_ablate.training.errors import RunFailed
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.run import run
from albert_ablate.training.stack import together

# runs of one shape that differ in all that is each run's own
RUNS = [
    ["seed=0", "dropout=depth_decay"],
    ["seed=1", "dropout=uniform", "dropout.mean=0.3", "optimizer.lr=0.02", "optimizer.weight_decay=0.5"],
    ["seed=2", "optimizer=sgd", "schedule=constant", "clip=agc", "diagnostics.every=3"],
    ["seed=3", "optimizer=schedule_free", "schedule=constant", "clip=norm", "clip.max_norm=0.1", "budget.tokens=2560"],
]


def planned(text, runs: Path, arms=RUNS):
    return [nano(text, runs, *arm) for arm in arms]


def attempt(cfg, member):
    try:
        return run(cfg, member=member)
    except RunFailed as error:
        return {"status": "failed", "error": str(error)}


def stacked(cfgs):
    """The records of runs that are trained as one, in this process."""
    return together([partial(attempt, cfg) for cfg in cfgs])


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The outcome of each of RUNS, trained alone."""
    return [outcome(train(cfg)["folder"]) for cfg in planned(text, tmp_path_factory.mktemp("alone"))]


@pytest.mark.process
def test_each_run_is_what_it_is_alone(text, tmp_path, alone):
    records = forked(lambda: stacked(planned(text, tmp_path)))
    assert [outcome(record["folder"]) for record in records] == alone
    assert [record["provenance"]["stacked"] for record in records] == [4] * 4


@pytest.mark.process
def test_all_but_detailed_steps_are_shared(text, tmp_path):
    def work():
        shared, plain = [], StackedDecoder.__call__

        def counted(self, tokens):
            shared.append(len(tokens) // 4)
            return plain(self, tokens)

        StackedDecoder.__call__ = counted
        stacked(planned(text, tmp_path))
        return shared

    # of 32 steps 9 are detailed, of the third run's 11, of the last one's 20 steps 6
    assert forked(work) == [4] * 14 + [3] * 7 + [2] * 2


@pytest.mark.process
def test_a_run_that_diverges_leaves_the_others(text, tmp_path, alone):
    arms = [RUNS[0], [*RUNS[1], "optimizer=sgd", "optimizer.lr=1e30", "optimizer.weight_decay=0"], RUNS[2]]
    records = forked(lambda: stacked(planned(text, tmp_path, arms)))
    assert [record["status"] for record in records] == ["finished", "diverged", "finished"]
    assert [outcome(records[i]["folder"]) for i in (0, 2)] == [alone[0], alone[2]]


@pytest.mark.process
def test_a_run_that_breaks_leaves_the_others(text, tmp_path, alone):
    """In the middle of a step, when its forward pass is done and the others wait for its backward pass."""

    def work():
        plain = LanguageModel.training_step

        def broken(self, batch, batch_idx):
            total = plain(self, batch, batch_idx)
            if self.cfg.seed == 1 and self.micro_batches == 7:
                raise ValueError("out of luck")
            return total

        LanguageModel.training_step = broken
        return stacked(planned(text, tmp_path))

    records = forked(work)
    assert records[1]["status"] == "failed" and "out of luck" in records[1]["error"]
    assert [outcome(records[i]["folder"]) for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]


@pytest.mark.process
@pytest.mark.parametrize("at", [150, 400])
def test_a_killed_stack_goes_on(text, tmp_path, alone, at):
    cfgs = [{**cfg, "checkpoint": {"seconds": 0}} for cfg in planned(text, tmp_path)]

    def killed():
        Ambush(at).set()
        return stacked(cfgs)

    assert Child(killed).wait()[0] == "killed"
    # one of them alone, the others as a stack of three
    first = forked(lambda: run(cfgs[0]))
    others = forked(lambda: stacked(cfgs[1:]))
    assert [outcome(record["folder"]) for record in (first, *others)] == alone
    assert any(record["resumed_at"] for record in (first, *others))


@pytest.mark.process
def test_a_signal_stops_all_at_a_step_and_they_go_on(text, tmp_path, alone):
    cfgs = planned(text, tmp_path)

    def stopped():
        plain, sent = LanguageModel.training_step, []

        def signalled(self, batch, batch_idx):
            if self.micro_batches == 9 and not sent:
                sent.append(os.kill(os.getpid(), signal.SIGTERM))
                time.sleep(0.1)  # a thread cannot take a signal: the main thread does
            return plain(self, batch, batch_idx)

        LanguageModel.training_step = signalled
        return stacked(cfgs)

    records = forked(stopped)
    assert [(record["status"], record["signal"]) for record in records] == [("stopped", signal.SIGTERM)] * 4
    assert all(0 < record["progress"]["step"] < 20 for record in records)
    assert [outcome(record["folder"]) for record in forked(lambda: stacked(cfgs))] == alone


def test_seconds_are_shared_out():
    """Time at which a run waits belongs to nobody, what is computed for all to each in equal parts."""
    models = [build_model(compose(["model=nano", "model.layers=1", f"seed={seed}"])).train() for seed in range(3)]

    def task(model, member):
        phases, began = Phases(), time.perf_counter()
        time.sleep(0.05)
        logits = member.forward(model, torch.zeros(4, 64, dtype=torch.long), phases)
        phases.mark("forward")
        member.backward(logits.sum(), phases)
        phases.mark("backward")
        return phases.total, began, time.perf_counter()

    seconds, began, ended = zip(*together([partial(task, model) for model in models]), strict=True)
    assert sum(seconds) <= max(ended) - min(began)
