"""task=lightning: a LightningModule and a LightningDataModule of one's own, trained as every run is."""

import json
from pathlib import Path

import own_task
import pytest
import torch
from forking import killed_and_gone_on, outcome, train

from albert_ablate import compose
from albert_ablate.config import ConfigError, checked_config, folders_named, identity
from albert_ablate.records.history import read_history
from albert_ablate.training.own_data import own_data
from albert_ablate.training.prepare import identified
from albert_ablate.training.run import run

WORDS = ["data.batch=8", "budget.steps=24", "evaluation.every=32", "trainer=cpu", "trainer.threads=1"]


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    monkeypatch.setenv("ALBERT_ABLATE_TRUST", "own_task")


def own(module, *more, data="Points"):
    """The configuration that trains a module of tests/own_task.py."""
    words = ["task=lightning", f"task.module._target_=own_task.{module}", f"task.data._target_=own_task.{data}"]
    return checked_config([*words, *WORDS, *more])


def rows(record, name):
    return read_history(Path(record["folder"]), name, record["histories"]).to_pylist()


@pytest.mark.process
@pytest.mark.parametrize("module", ["Curve", "CurveWithAdam"])
def test_a_killed_run_ends_as_one_that_was_left_alone(module, tmp_path):
    def cfg(runs):
        return own(module, f"paths.runs={tmp_path / runs}", "task.data.noisy=true", "data.accumulate=2")

    whole = train(cfg("whole"))
    cut = killed_and_gone_on(cfg("cut"), at=200)
    assert outcome(cut["folder"]) == outcome(whole["folder"])
    assert run(cfg("whole"))["found"] and whole["status"] == "finished"


@pytest.mark.process
def test_its_first_step_is_the_one_that_torch_takes(tmp_path):
    cfg = own("CurveWithAdam", f"paths.runs={tmp_path}", "task.module.dropout=0.0", "optimizer.lr=0.03")
    record = train(cfg)
    from albert_ablate.data.packed import BatchOrder
    from albert_ablate.model.named_draws import drawn

    module, hashes = drawn(lambda: own_task.CurveWithAdam(dropout=0.0, lr=0.03), 0)
    examples = own_data(cfg).loaders["train"].dataset
    losses, optimizer = [], torch.optim.Adam(module.parameters(), lr=0.03)
    for step in range(24):
        batch = [
            torch.stack(part) for part in zip(*(examples[i] for i in BatchOrder(160, 8, 0).indices(step)), strict=True)
        ]
        loss = module.error(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.95
        losses.append(loss.item())
    history = rows(record, "steps")
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-5)
    assert [row["lr"] for row in history] == pytest.approx([0.03 * 0.95**k for k in range(24)])
    assert record["proof"]["initial_draws"] == hashes and record["budget"]["steps"] == 24
    with torch.no_grad():
        data = own_data(cfg).loaders["validation"].dataset
        errors = [module.error([part[None] for part in data[i]]).item() for i in range(20)]
    assert record["summary"]["val_loss"] == pytest.approx(sum(errors) / 20, rel=1e-4)
    assert record["summary"]["val_root"] > 0 and record["summary"]["unigram_loss"] is None


@pytest.mark.process
def test_arms_of_a_seed_are_pairs(tmp_path):
    plain, normed, other = (
        train(own("Curve", f"paths.runs={tmp_path}", *more))
        for more in ([], ["task.module.norm=true"], ["task.module.norm=true", "seed=1"])
    )
    assert plain["proof"]["data_order"] == normed["proof"]["data_order"] != other["proof"]["data_order"]
    assert plain["proof"]["initial_draws"] == normed["proof"]["initial_draws"]
    assert not set(other["proof"]["initial_draws"].values()) & set(plain["proof"]["initial_draws"].values())
    assert normed["name"].count("task.module.norm=true") == 1 and plain["setting"] != normed["setting"]
    assert "norm" not in plain["choices"] and plain["choices"]["optimizer"] == "adamw"


def test_identity_depends_on_arguments_and_examples():
    def who(*more):
        return identified(own("CurveWithAdam", *more))[1]

    plain = who()
    assert who("task.module.width=8") == plain  # the default
    assert who("task.module.width=9").arm != plain.arm
    assert who("optimizer.lr=0.5").arm == plain.arm and who("optimizer.lr=0.5").setting != plain.setting
    assert who("task.module.lr=0.5") == who("optimizer.lr=0.5")
    assert who("task.data.examples=210").arm != plain.arm
    cfg = own("Curve")
    assert identity(cfg, own_data(cfg).fingerprint) == identified(cfg)[1]


def test_data_without_a_test_split_leave_the_test_out(tmp_path):
    assert own_data(own("Curve", data="Untested")).loaders["test"] is None


@pytest.mark.parametrize(
    ("module", "more", "says"),
    [
        ("Curve", ["trainer=auto", "trainer.graph=true"], "trainer.graph=true is not allowed with task=lightning"),
        ("Curve", ["norm=pre_ln"], "norm=pre_ln is not allowed with task=lightning, whose module says itself where"),
        ("Curve", ["model=nano"], "model=nano is not allowed with task=lightning"),
        ("Curve", ["model.width=8"], "model.width=8 is not allowed"),
        ("Curve", ["dropout.mean=0.1"], "dropout.mean=0.1 is not allowed"),
        ("Curve", ["data=bible"], "data=bible is not allowed"),
        ("Curve", ["loss.z_loss=0.1"], "loss.z_loss=0.1 is not allowed"),
        ("Curve", ["evaluation=clean"], "evaluation=clean is not allowed"),
        ("Curve", ["trainer.devices=2"], "runs on one device"),
        ("Curve", ["task.module.widht=3"], "task.module.widht=3 is unknown: .* takes .*width"),
        ("CurveWithAdam", ["optimizer=sgd"], "optimizer=sgd is not allowed .* how it is optimized"),
        ("CurveWithAdam", ["clip=none"], "clip=none is not allowed .* how it is clipped"),
        ("ByEpoch", [], "its learning-rate schedule must count steps"),
        ("Two", [], "must return one optimizer"),
        ("Manual", [], "optimizes by itself"),
        ("Lossless", [], "training_step returns a NoneType: it must return its loss"),
        ("Unvalidated", [], "has no validation_step"),
        ("Broken", [], "fails on its first batch: "),
        ("Missing", [], "cannot be imported"),
    ],
)
def test_a_wrong_module_is_one_sentence_and_no_folder(module, more, says, tmp_path):
    with pytest.raises(ConfigError, match=says) as said:
        run(own(module, f"paths.runs={tmp_path / 'runs'}", *more))
    assert "\n" not in str(said.value) and not (tmp_path / "runs").exists()


def test_data_that_cannot_be_paired_are_one_sentence():
    with pytest.raises(ConfigError, match="dataset without a length: its order cannot be drawn"):
        own_data(own("Curve", data="Streamed"))
    with pytest.raises(ConfigError, match="task.data._target_ is missing"):
        compose(["task=lightning", "task.module._target_=own_task.Curve"])


@pytest.mark.process
def test_it_is_swept_and_judged(tmp_path, monkeypatch, capsys):
    from albert_ablate import cli

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf" / "task"
    folder.mkdir(parents=True)
    (folder / "curve.yaml").write_text(
        "_target_: albert_ablate.data.own_task.Lightning\nmodule:\n  _target_: own_task.Curve\n  dropout: 0.0\n"
        "data:\n  _target_: own_task.Points\n"
    )
    common = ["task=curve", "data.batch=32", "budget.steps=60", "evaluation.every=960", "optimizer.lr=0.02"]
    common += ["trainer=cpu", "trainer.threads=1"]
    arms = {"plain": ["task.module.dropout=0.0"], "dropped": ["task.module.dropout=0.5"]}
    claim = {"name": "dropout_hurts", "statement": "A small net fits better without dropout.", "tuned": []}
    claim |= {"parts": [{"treatment": "plain", "control": "dropped", "measure": "val_loss"}]}
    claim |= {"screen": {"regime": "short", "N": 4}}
    family = {"family": {"name": "own", "size": 1}, "arms": arms, "claims": [claim]}
    family |= {"regimes": {"short": {"text": "in 60 steps", "overrides": common}}}
    Path("claims.yaml").write_text(json.dumps(family))
    monkeypatch.delenv("ALBERT_ABLATE_TRUST")
    with folders_named([Path("conf")]):
        for arm in arms.values():
            for seed in range(4):
                train(checked_config([*common, *arm, f"seed={seed}"]))
    assert cli.main(["judge", "claims.yaml", "--runs", "runs", "--config-dir", "conf"]) == 0
    said = capsys.readouterr().out
    assert "4 pairs" in said and "INADMISSIBLE" not in said, said
