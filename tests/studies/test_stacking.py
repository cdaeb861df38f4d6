"""--stack: which runs are trained as one, why the others are not, and a sweep with stacks from end to end."""

import os
import signal
from pathlib import Path

import pytest
from forking import Child, arguments, fork_workers, forked, outcome, write_text
from hydra.core.plugins import Plugins

from albert_ablate.cli import main
from albert_ablate.config import ConfigError, checked_config, compose
from albert_ablate.records.folder import RunFolder
from albert_ablate.studies.planned_runs import plan
from albert_ablate.studies.stacking import Stacking, alone_because, read_stack
from albert_ablate.studies.sweepfile import read_sweep
from albert_ablate.training.cost import training_flops

BASIC = "hydra/launcher=basic"
STACKED = ["norm=pre_ln", "--stack", "6", "--workers", "1"]
PLAIN = ["model=nano", "trainer=cpu", "trainer.threads=1"]
STUDY = """
method: grid
parameters:
  norm: {values: [pre_ln, ngpt]}
  attention: {value: rotary}
  optimizer.weight_decay: {value: 0}
  optimizer.lr: {values: [0.01, 0.03]}
  seed: {values: [0, 1, 2]}
command: [python, run.py, '${args_no_hyphens}']
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "words.txt")
    asked = arguments(text, text.parent, "budget.tokens=2048", "checkpoint.seconds=1000")
    Plugins.instance()
    for norm in ("pre_ln", "ngpt"):
        training_flops(compose(["attention=rotary", "optimizer.weight_decay=0", f"norm={norm}", *asked]))
    return [o for o in asked if not o.startswith("paths.runs")]


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    return file


def command(file, runs, *more, before=lambda: None):
    def work():
        before()
        return main(["sweep", str(file), "--runs", str(runs), *more])

    return work


def outcomes(runs: Path):
    """Those of the finished runs, by folder."""
    records = {folder: RunFolder(folder).record() or {} for folder in runs.glob("*/seed*")}
    done = [folder for folder, record in records.items() if record["status"] == "finished"]
    return {str(folder.relative_to(runs)): outcome(folder) for folder in done}


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """The outcomes of the study's runs, each trained alone."""
    file = tmp_path_factory.mktemp("study") / "study.yaml"
    file.write_text(STUDY)
    assert forked(command(file, file.parent / "runs", BASIC, *given)) == 0
    return outcomes(file.parent / "runs")


@pytest.mark.parametrize(
    "more, reason",
    [
        (["trainer.threads=2"], "trainer.threads other than 1"),
        (["trainer.precision=bf16-mixed"], "trainer.precision=bf16-mixed"),
        (["trainer.compile=true"], "trainer.compile=true"),
        (["trainer=auto", "trainer.graph=true", "trainer.threads=1"], "trainer.graph=true"),
        (["trainer.devices=2", "trainer.strategy=ddp"], "more than one device"),
        (["force=true"], "force=true"),
        (["data.batch=3", "model.context=50"], "multiple of 64"),
        (["optimizer=sophia"], "samples predictions"),
        (["logger=tensorboard"], "a tracker"),
        (["norm=normformer"], "a placement whose parameters"),
        (["dropout=uniform", "dropout.sites=[layer_drop]"], "skip blocks"),
    ],
)
def test_each_reason_to_train_alone_is_a_sentence(more, reason):
    assert reason in alone_because(checked_config([*PLAIN, *more]))


def test_what_is_each_runs_own_does_not_part_them(study, given, tmp_path):
    sweep = read_sweep(study)
    planned = plan(sweep, sweep.settings(), tmp_path, given)
    groups = Stacking(4, workers=1).groups(planned)
    names = [[planned[i].name for i in numbers] for numbers in groups]
    assert sorted(map(len, names)) == [1] * 6 + [3, 3]  # ngpt's six alone, the six of pre_ln as two stacks
    assert all("norm=pre_ln" in name for numbers in names if len(numbers) == 3 for name in numbers)
    assert sorted(i for numbers in groups for i in numbers) == list(range(12))
    assert sorted(map(len, Stacking(8, workers=2).groups(planned))) == [1] * 6 + [3, 3]  # one for each worker
    assert len(Stacking(8, workers=1).groups(planned, alone=set(planned[:1]))) == 8
    assert Stacking(read_stack("off"), workers=1).groups(planned) == [[i] for i in range(12)]


def test_stack_is_a_number_or_off():
    assert read_stack("8") == 8 and read_stack("off") == 1
    for wrong in ("1", "0", "many"):
        with pytest.raises(ConfigError, match=f"--stack={wrong} is not allowed: a number from 2 on, or off."):
            read_stack(wrong)


@pytest.mark.process
def test_a_sweep_with_stacks_is_the_sweep_without(study, given, tmp_path, alone, capfd):
    assert forked(command(study, tmp_path / "runs", BASIC, *given, *STACKED[1:])) == 0
    said = capfd.readouterr().out
    assert "6 runs are trained alone, which cannot be stacked: a placement whose parameters scale heads" in said
    assert said.count("finished, validation loss") == 12 and "12 of 12 runs are done, 0 failed." in said
    assert outcomes(tmp_path / "runs") == alone
    records = [RunFolder(f).record() for f in sorted((tmp_path / "runs").glob("*/seed*"))]
    assert sorted(r["provenance"].get("stacked", 1) for r in records if r) == [1] * 6 + [6] * 6


@pytest.mark.process
def test_a_killed_worker_costs_each_run_of_its_stack_one_attempt(study, given, tmp_path, alone, capfd):
    """One of the runs kills its worker each time: the others, tried alone after that, are what they are alone."""

    def deadly():
        from albert_ablate.training.module import LanguageModel

        fork_workers()
        plain = LanguageModel.training_step

        def deadly_step(self, batch, batch_idx):
            if self.cfg.seed == 1 and self.cfg.optimizer.lr == 0.03 and self.micro_batches == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, batch, batch_idx)

        LanguageModel.training_step = deadly_step

    runs = tmp_path / "runs"
    assert forked(command(study, runs, BASIC, *given, *STACKED, before=deadly)) == 1
    said = capfd.readouterr().out
    assert "5 of 6 runs are done, 1 failed." in said and "Its process was killed" in said
    found = outcomes(runs)
    assert len(found) == 5 and all(alone[name] == end for name, end in found.items())


@pytest.mark.process
def test_a_stopped_sweep_with_stacks_goes_on(study, given, tmp_path, alone):
    runs = tmp_path / "runs"

    def stopping():
        from albert_ablate.training.module import LanguageModel

        plain = LanguageModel.training_step

        def stopped(self, batch, batch_idx):
            if self.cfg.seed == 1 and self.micro_batches == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(self, batch, batch_idx)

        LanguageModel.training_step = stopped

    assert Child(command(study, runs, BASIC, *given, *STACKED, before=stopping)).wait() == (
        "value",
        143,
    )
    stopped = [RunFolder(f).record() for f in runs.glob("*/seed*")]
    assert [r and r["status"] for r in stopped] == ["stopped"] * 6
    assert forked(command(study, runs, BASIC, *given, *STACKED)) == 0
    found = outcomes(runs)
    assert len(found) == 6 and all(alone[name] == end for name, end in found.items())
