"""Runs of other trainers as tables of `load_runs`."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from albert_ablate.analysis import load_runs
from albert_ablate.analysis.external.runs import home_folder, is_external
from albert_ablate.config import ConfigError
from tests.forking import forked

ROWS = [
    {"arm": "base", "seed": 1, "test_loss": 3.25, "optimizer": "adam"},
    {"arm": "base", "seed": 42, "test_loss": 3.5, "optimizer": "adam"},
    {"arm": "wide", "seed": 1, "test_loss": 3.0, "optimizer": "adam"},
    {"arm": "wide", "seed": 42, "test_loss": math.nan, "optimizer": "adam"},
]


def written(folder: Path, kind: str) -> Path:
    file, frame = folder / f"runs{kind}", pd.DataFrame(ROWS)
    if kind == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), file)  # pandas would write nan as an empty cell
    elif kind == ".csv":
        frame.to_csv(file, index=False, na_rep="nan")
    elif kind == ".tsv":
        frame.to_csv(file, index=False, na_rep="diverged", sep="\t")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_a_table_of_any_kind_gives_the_same_runs(tmp_path, kind):
    summary = load_runs(written(tmp_path, kind)).summary
    assert summary["label"].tolist() == ["base", "base", "wide", "wide"] and summary["seed"].tolist() == [1, 42, 1, 42]
    assert summary["status"].tolist() == ["finished"] * 3 + ["diverged"]
    assert summary["test_loss"].tolist()[:3] == [3.25, 3.5, 3.0] and math.isnan(summary["test_loss"].iloc[3])
    assert summary["arm"].nunique() == 2 and set(summary["role"]) == {"confirmation"}


def test_rows_over_steps_are_a_history_and_its_end(tmp_path):
    file = tmp_path / "long.csv"
    file.write_text(
        "arm,seed,step,tokens,val_loss,loss,test_loss\n"
        "a,0,0,0,5,,\na,0,10,640,4,4.5,\na,0,20,1280,3,3.5,3.25\n"
        "b,0,0,0,5,,\nb,0,10,640,nan,9,\n"
    )
    runs = load_runs(file)
    assert runs.summary["val_loss"].tolist()[0] == 3 and runs.summary["status"].tolist() == ["finished", "diverged"]
    held = runs.evals[runs.evals["split"] == "validation"]
    assert held["tokens"].tolist() == [0, 640, 1280, 0, 640] and held["loss"].tolist()[:3] == [5, 4, 3]
    assert runs.evals.loc[runs.evals["split"] == "test", "loss"].tolist() == [3.25]
    assert runs.steps["loss"].tolist() == [4.5, 3.5, 9] and runs.layers.empty


def test_a_mapping_says_what_the_columns_of_an_export_are(tmp_path):
    (tmp_path / "export.csv").write_text(
        "Name,State,opt.name,lr,rng,_step,eval/loss,final\n"
        "sunny-1,finished,adam,0.1,7,1000,2.5,2.25\nrainy-2,crashed,adam,0.1,8,500,3.5,\n"
    )
    mapping = tmp_path / "export.yaml"
    mapping.write_text(
        "source: export.csv\narm: [opt.name, lr]\nseed: rng\nstep: _step\ntokens_per_step: 64\nstatus: State\n"
        "metrics: {val_loss: eval/loss, test_loss: final}\nsettings: {optimizer: opt.name}\n"
    )
    runs = load_runs(mapping)
    one, other = runs.summary.to_dict("records")
    assert one["label"] == "name=adam lr=0.1" and one["optimizer"] == "adam" and one["tokens"] == 64_000
    assert (one["val_loss"], one["test_loss"], one["status"]) == (2.5, 2.25, "finished") and other["status"] == "failed"
    assert runs.evals["tokens"].tolist()[0] == 64_000


def test_a_project_of_another_trainer_on_wandb(tmp_path, monkeypatch):
    rows = [{"_step": 0, "val/loss": 4.0}, {"_step": 5, "val/loss": 3.0}, {"_step": 5, "train/loss": 2.9}]
    runs = [
        SimpleNamespace(id=f"r{seed}", name=f"run {seed}", state="finished", group="g", summary={"val/loss": 3.0},
                        config={"optim": {"name": name}, "seed": seed}, scan_history=lambda: rows)
        for name in ("adam", "muon") for seed in (0, 1)
    ]  # fmt: skip
    monkeypatch.setattr("albert_ablate.analysis.wandb_reader.server_runs", lambda address: runs)
    (tmp_path / "m.yaml").write_text(
        "source: wandb:team/theirs\narm: config.optim.name\nseed: config.seed\nstep: _step\ntokens_per_step: 10\n"
        "metrics: {val_loss: val/loss, train_loss: train/loss}\n"
    )
    found = load_runs(tmp_path / "m.yaml")
    assert found.summary["label"].tolist() == ["adam", "adam", "muon", "muon"]
    assert found.summary["val_loss"].tolist() == [3.0] * 4
    held = found.evals[(found.evals["split"] == "validation") & (found.evals["seed"] == 0)]
    assert held["tokens"].tolist() == [0, 50, 0, 50]


@pytest.mark.process
def test_event_files_of_tensorboard(tmp_path):
    def work() -> None:
        from torch.utils.tensorboard import SummaryWriter

        for arm, end in (("adam", 3.0), ("muon", 2.75)):
            writer = SummaryWriter(str(tmp_path / "logs" / f"{arm}_seed3"))
            for step, loss in ((0, 5.0), (10, 4.0), (20, end)):
                writer.add_scalar("val_loss", loss, step)
            writer.close()

    forked(work)
    runs = load_runs(tmp_path / "logs")
    assert runs.summary[["label", "seed", "val_loss"]].values.tolist() == [["adam", 3, 3.0], ["muon", 3, 2.75]]
    assert runs.evals["step"].tolist() == [0, 10, 20] * 2
    with pytest.raises(ConfigError, match="does not say arm and seed: call the folders ARM/seedN"):
        (tmp_path / "logs" / "adam_seed3").rename(tmp_path / "logs" / "adam")
        load_runs(tmp_path / "logs")


@pytest.mark.process
def test_runs_of_an_mlflow_store(tmp_path):
    store = f"sqlite:///{tmp_path}/runs.db"

    def work() -> None:
        from mlflow import MlflowClient

        client = MlflowClient(store)
        experiment = client.create_experiment("mine")
        for arm, loss in (("adam", 3.0), ("muon", 2.75)):
            run = client.create_run(experiment)
            client.log_param(run.info.run_id, "arm", arm)
            client.log_param(run.info.run_id, "seed", 5)
            for step, value in ((0, 5.0), (10, loss)):
                client.log_metric(run.info.run_id, "val_loss", value, step=step)
            client.set_terminated(run.info.run_id)
        runs = load_runs(f"mlflow:{store}/mine")
        rows = sorted(runs.summary[["label", "seed", "val_loss", "status"]].values.tolist())
        assert rows == [["adam", 5, 3.0, "finished"], ["muon", 5, 2.75, "finished"]]
        assert sorted(runs.evals["loss"]) == [2.75, 3.0, 5.0, 5.0]
        with pytest.raises(ConfigError, match="has no experiment yours: it has .*mine"):
            load_runs(f"mlflow:{store}/yours")

    forked(work)


BAD = {
    "no seed": ("arm,test_loss\na,1\n", "has no column seed: it has arm, test_loss"),
    "a seed of words": ("arm,seed,x\na,one,1\n", "line 2: the seed 'one' is not a whole number"),
    "half a seed": ("arm,seed,x\na,1.5,1\n", "line 2: the seed '1.5' is not a whole number"),
    "twice": ("arm,seed,x\na,1,1\nb,1,1\na,1,2\n", "line 4: a, seed 1 is given twice"),
    "backwards": ("arm,seed,step,x\na,1,10,1\na,1,5,1\n", "line 3: the step of a, seed 1 goes back from 10 to 5"),
    "a step of words": ("arm,seed,step,x\na,1,ten,1\n", "line 2: the step 'ten' is not a number"),
    "ragged": ("arm,seed,x\na,1\n", "line 2 has 2 cells, and there are 3 columns"),
    "no arm": ("arm,seed,x\n,1,1\n", "line 2 has no arm"),
    "a column twice": ("arm,seed,x,x\na,1,1,2\n", "has the column x twice"),
    "empty": ("", "has no column arm: it has no row"),
    "a status of its own": ("arm,seed,x,status\na,0,1,oom\n", "line 2: the status oom is not one of .*failed"),
    "no rows": ("arm,seed,x\n", "has no column arm"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_one_sentence(tmp_path, name):
    text, says = BAD[name]
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_runs(tmp_path / "runs.csv")


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ("arm: a", "source is missing"),
        ("source: t.csv\nsed: x", "sed is unknown: a mapping holds seed"),
        ("source: t.csv\nmetrics: [a]", "metrics=.* is not allowed"),
        ("source: t.csv\nmetrics: {x: y}", "has no column y, which is a metric: it has arm, seed, x"),
        ("source: t.csv\nstep: n", "has no column n, which is its step"),
        ("source: t.csv\nrun: '('", "run=.* is not a regular expression"),
        ("source: t.csv\ntokens_per_step: 0", "tokens_per_step=0 is not allowed"),
        ("source: gone.csv", "gone.csv cannot be read: No such file"),
        ("source: empty", "holds neither TensorBoard's event files nor an MLflow store"),
        ("claims: []", "this is a claims or sweep file"),
    ],
)
def test_a_bad_mapping_is_one_sentence(tmp_path, mapping, says):
    (tmp_path / "t.csv").write_text("arm,seed,x\na,0,1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.yaml").write_text(mapping)
    with pytest.raises(ConfigError, match=says):
        load_runs(tmp_path / "m.yaml")


def test_an_own_run_before_its_first_record_is_not_external(tmp_path):
    folder = tmp_path / "0123456789ab" / "seed0"
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "tensorboard" / "events.out.tfevents.1").touch()
    assert not is_external(tmp_path) and home_folder(tmp_path) == tmp_path
    assert "stopped before its first commit" in load_runs(tmp_path).summary["reason"].iloc[0]


def test_what_a_judge_writes_lies_beside_the_runs(tmp_path):
    assert home_folder(tmp_path / "runs.csv") == tmp_path / "runs.csv.judge"
    assert home_folder("wandb:team/theirs").parent == Path()
