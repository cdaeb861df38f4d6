"""Records into tables."""

import json

import pytest

from albert_ablate import compose, load_runs, run
from albert_ablate.config import ConfigError


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loaded")
    tiny = ["model=nano", "model.layers=2", "model.width=16", "model.context=16", "data=markov", "data.length=20_000"]
    tiny += ["budget.tokens=2_000", "evaluation.every=1_000", "evaluation.tokens=256", "trainer.threads=1"]
    for norm in ("pre_ln", "post_ln"):
        for seed in (0, 1):
            run(compose([*tiny, f"norm={norm}", f"seed={seed}", f"paths.runs={root}"]))
    torn = root / "0123456789ab" / "seed0"
    torn.mkdir(parents=True)
    (torn / "record.json").write_text('{"status": "fini')
    (root / "0123456789ab" / "seed1").mkdir()
    return root


def test_every_run_is_a_row_with_its_factors_settings_metrics_and_cost(runs_folder):
    summary = load_runs(runs_folder).summary
    good = summary[summary["status"].notna()]
    assert len(good) == 4 and set(good["norm"]) == {"pre_ln", "post_ln"} and sorted(good["seed"]) == [0, 0, 1, 1]
    assert (good["model.layers"] == 2).all() and (good["optimizer.lr"] == 2e-3).all()
    assert good[["val_loss", "train_loss", "gap", "seconds", "flops", "excess_loss"]].notna().all(axis=None)
    record = json.loads(
        (runs_folder / good.iloc[0]["setting"] / f"seed{good.iloc[0]['seed']}" / "record.json").read_text()
    )
    assert good.iloc[0]["val_loss"] == record["summary"]["val_loss"]


def test_what_cannot_be_read_is_listed_with_its_reason(runs_folder):
    summary = load_runs(runs_folder).summary
    reasons = summary[summary["status"].isna()]["reason"].tolist()
    assert len(reasons) == 2 and "cannot be read" in reasons[0] and "no record.json" in reasons[1]


def test_histories_carry_the_run_and_agree_with_the_summary(runs_folder):
    runs = load_runs(runs_folder)
    assert len(runs.steps) == 4 * 15 and set(runs.steps["seed"]) == {0, 1}
    one = runs.where(norm="pre_ln", seed=0)
    last = one.evals[one.evals["split"] == "validation"].iloc[-1]
    assert last["loss"] == one.summary.iloc[0]["val_loss"]
    assert list(one.history("steps", ["step", "loss"])) == ["arm", "setting", "seed", "step", "loss"]
    assert set(one.layers["layer"]) == {0, 1}


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda root: load_runs(root / "nowhere"), "no folder of runs"),
        (lambda root: load_runs(root / "0123456789ab" / "seed1"), "holds no run"),
        (lambda root: load_runs(root).where(nrom="pre_ln"), "no column nrom"),
        (lambda root: load_runs(root).history("steps", ["lss"]), "no column lss"),
        (lambda root: load_runs(root).history("stps"), "no history stps"),
    ],
)
def test_mistakes_get_one_sentence(runs_folder, act, says):
    with pytest.raises(ConfigError, match=says):
        act(runs_folder)
