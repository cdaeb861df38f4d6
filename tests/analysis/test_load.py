"""Records into tables."""

import json
import shutil

import pandas as pd
import pytest
from factories import SMALL

from albert_ablate import load_runs, run
from albert_ablate.config import ConfigError, checked_config


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loaded")
    tiny = [*SMALL, "data=markov", "data.length=20_000"]
    tiny += ["budget.tokens=2_000", "evaluation.every=1_000", "evaluation.tokens=256", "trainer.threads=1"]
    for norm in ("pre_ln", "post_ln"):
        for seed in (0, 1):
            run(checked_config([*tiny, f"norm={norm}", f"seed={seed}", f"paths.runs={root}"]))
    torn = root / "0123456789ab" / "seed0"
    torn.mkdir(parents=True)
    (torn / "record.json").write_text('{"status": "fini')
    (root / "0123456789ab" / "seed1").mkdir()
    return root


def test_every_run_is_a_row_of_factors_settings_metrics_cost(runs_folder):
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
        (lambda root: load_runs(root / "nowhere"), "nowhere does not exist"),
        (lambda root: load_runs(root / "0123456789ab" / "seed1"), "holds no runs|does not exist"),
        (lambda root: load_runs(root).where(nrom="pre_ln"), "no column nrom"),
        (lambda root: load_runs(root).history("steps", ["lss"]), "no column lss"),
        (lambda root: load_runs(root).history("stps"), "no history stps"),
    ],
)
def test_mistakes_get_one_sentence(runs_folder, act, says):
    with pytest.raises(ConfigError, match=says):
        act(runs_folder)


# --- what others, older releases and broken disks leave behind --------------------------------------------------------


@pytest.fixture
def copied(runs_folder, tmp_path):
    """copied(name, change=..., content=...): one run more, its record changed or replaced by these bytes."""
    (whole,) = [
        f for f in runs_folder.glob("*/seed0/steps.arrow") if "pre_ln" in (f.parent / "record.json").read_text()
    ]
    root = tmp_path / "runs"

    def copy(name, change=None, content=None):
        folder = root / name / "seed0"
        shutil.copytree(whole.parent, folder, ignore=shutil.ignore_patterns("checkpoints"))
        record = json.loads((folder / "record.json").read_text()) | {"setting": name}
        if change:
            change(record)
        (folder / "record.json").write_bytes(json.dumps(record).encode() if content is None else content)
        return folder

    copy("whole")
    copy.root = root
    return copy


def reason(copied, name):
    summary = load_runs(copied.root).summary.set_index("folder")
    return summary.loc[str(copied.root / name / "seed0")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"\0" * 99, "cannot be read"),
        (b'{"status": "\xff"}', "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b"[1]", "it is not a JSON object"),
        (b'{"seed": 0}', "it has no status"),
        (b'{"status": "finished", "seed": "0"}', "its seed is '0'"),
        (b'{"status": "finished", "seed": 0, "choices": ["x"]}', "its choices is a list"),
        (b'{"status": "finished", "seed": 0, "error": {"a": 1}}', "its error is a dict"),
        (b'{"status": "archived", "seed": 0}', "a newer release"),
    ],
    ids=range(10),
)
def test_a_record_of_any_content_is_a_row_with_its_reason(copied, content, says):
    copied("bad", content=content)
    row = reason(copied, "bad")
    assert pd.isna(row["status"]) and says in row["reason"]
    assert len(load_runs(copied.root).steps) == 15


def test_a_record_without_what_came_later_is_read(copied):
    wanted = ("label", "arm", "setting", "identity", "role", "choices", "config", "summary", "cost", "error")
    copied("old", change=lambda r: [r.pop(k) for k in (*wanted, "histories")])
    copied("new", change=lambda r: r.update(version=9, choices={"status": "x", "norm": "pre_ln"}, more={"a": [1]}))
    row = reason(copied, "old")
    assert row["status"] == "finished" and row["setting"] == row["arm"] == "old" and row["role"] == "confirmation"
    assert reason(copied, "new")["status"] == "finished"
    assert len(load_runs(copied.root).steps) == 3 * 15


def test_damaged_histories_are_named_and_left_out(copied):
    def overwritten(name, change):
        file = copied(name) / "steps.arrow"
        file.write_bytes(change(file.read_bytes()))

    overwritten("cut", lambda b: b[: len(b) // 2])
    overwritten("zero", lambda b: bytes(len(b)))
    rows = bytes(range(1, 16))  # of the column step: 8 bytes a number
    at = lambda b: b.index(b"".join(bytes([n]) + bytes(7) for n in rows))  # noqa: E731
    overwritten("lost", lambda b: b[: at(b)] + bytes(64) + b[at(b) + 64 :])
    (copied("gone") / "steps.arrow").unlink()
    runs = load_runs(copied.root)
    found = {f.split("/")[-2]: r for f, r in zip(runs.summary["folder"], runs.summary["reason"], strict=True)}
    assert found["cut"] == found["zero"] == "steps.arrow is cut off" and found["gone"] == "steps.arrow is missing"
    with pytest.warns(UserWarning, match="The steps of 4 runs cannot be read") as said:
        assert set(runs.steps["setting"]) == {"whole"}
    assert str(copied.root / "lost") in str(said[0].message) or len(said) == 1
    assert set(runs.evals["setting"]) == {
        "whole",
        "cut",
        "zero",
        "lost",
        "gone",
    }  # its other histories are as they were
    (copied("odd") / "evaluations.json").write_text("[1")
    assert "evaluations.json cannot be read" in reason(copied, "odd")["reason"]


def test_links_are_followed_and_broken_ones_listed(copied):
    for name, target in (("linked", copied.root / "whole"), ("broken", copied.root / "nowhere")):
        (copied.root / name).mkdir()
        (copied.root / name / "seed0").symlink_to(target / "seed0")
    (copied.root / "loop").symlink_to(copied.root)
    assert reason(copied, "linked")["status"] == "finished"
    assert reason(copied, "broken")["reason"] == "it is a link to nowhere"


def test_no_run_gives_the_columns_that_were_asked_for(runs_folder):
    runs = load_runs(runs_folder)
    none = runs.where(seed=[])
    assert list(none.history("steps", ["loss"])) == ["arm", "setting", "seed", "loss"] and none.spikes().empty
    assert len(runs.where(seed=range(2)).summary) == 4 and len(runs.where(norm=("pre_ln",)).summary) == 2
