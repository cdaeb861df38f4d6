"""What a damaged or foreign record does to every command: a row with its reason, one sentence, never a traceback."""

import copy
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from albert_ablate import compose, load_runs, run
from albert_ablate.cli import main
from albert_ablate.config import ConfigError
from albert_ablate.records import store
from albert_ablate.records.folder import RunFolder

TINY = ["model=nano", "model.layers=1", "model.width=16", "model.context=16", "data=markov", "data.length=20_000",
        "budget.tokens=2_000", "evaluation.every=1_000", "evaluation.tokens=256", "trainer.threads=1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run's folder."""
    root = tmp_path_factory.mktemp("whole")
    return Path(run(compose([*TINY, f"paths.runs={root}"]))["folder"])


def changed(record: dict, path: str, value) -> bytes:
    found = node = copy.deepcopy(record)
    *parents, last = path.split(".")
    for name in parents:
        node = node[name]
    node.pop(last) if value == "missing" else node.__setitem__(last, value)
    found.pop("checksums", None)  # so that the fields are looked at
    return json.dumps(found).encode()


def mutations(record: dict) -> dict[str, bytes]:
    """Record files by what was done to them."""
    out = {}
    deep = "config.optimizer config.optimizer.lr config.model summary.val_loss summary.tokens data.fingerprint "
    deep += "cost.seconds proof.initial_draws proof.data_order progress.steps provenance.threads"
    for path in (*record, *deep.split()):
        if path != "checksums":
            for name, value in {"missing": "missing", "null": None, "list": [[[1]]], "text": "x", "number": -1}.items():
                out[f"{path} {name}"] = changed(record, path, value)
    for path in ("summary.val_loss", "cost.seconds", "config.optimizer.lr", "seed", "budget.tokens"):
        out[f"{path} huge"] = changed(record, path, 10**400)
        out[f"{path} nan"] = changed(record, path, float("nan"))
        out[f"{path} nested"] = changed(record, path, {"a": {"b": [{}]}})
    text = json.dumps(record)
    out |= {"empty": b"", "zeros": bytes(500), "cut": text[: len(text) // 2].encode(), "list": b"[]", "null": b"null"}
    out |= {"utf-16": text.encode("utf-16"), "latin": b'{"label": "\xe9"}', "deep": b"[" * 100_000}
    out |= {"infinite": text.replace('"seed": 0', '"seed": 1e999', 1).encode()}
    return out


@pytest.fixture(scope="module")
def mutated(whole, tmp_path_factory):
    """A folder of runs, one a mutation and a whole one; the mutation of each."""
    root, names = tmp_path_factory.mktemp("mutated"), {}
    record = json.loads((whole / "record.json").read_text())
    shutil.copytree(whole, root / whole.parent.name / "seed0")
    for i, (name, content) in enumerate(mutations(record).items()):
        folder = root / f"m{i}" / "seed0"
        folder.mkdir(parents=True)
        for file in whole.glob("*.arrow"):
            os.link(file, folder / file.name)
        (folder / "record.json").write_bytes(content)
        names[str(folder)] = name
    for name, make in (("folder", lambda f: f.mkdir()), ("loop", lambda f: f.symlink_to(f)), ("pipe", os.mkfifo)):
        folder = root / f"z{name}" / "seed0"
        folder.mkdir(parents=True)
        make(folder / "record.json")
        names[str(folder)] = name
    return root, names


def test_a_table_has_a_row_for_every_malformed_record(mutated, capsys):
    root, names = mutated
    summary = load_runs(root).summary.set_index("folder")
    assert len(summary) == len(names) + 1 > 130
    unreadable = summary[summary["status"].isna()]
    assert len(unreadable) > 80 and unreadable["reason"].str.startswith("record.json cannot be read: ").all()
    assert main(["status", str(root)]) == 0
    said = capsys.readouterr().out
    assert f"{len(names) + 1} runs" in said and f"{len(unreadable)} unreadable" in said


@pytest.mark.slow
def test_judge_names_every_malformed_record(mutated, capsys, tmp_path):
    root, _ = mutated
    claims = Path(__file__).parent.parent / "sweeps" / "claims.yaml"
    assert main(["judge", str(claims), "--runs", str(root), "--json", str(tmp_path / "l.json")]) == 0
    refusals = json.loads((tmp_path / "l.json").read_text())["refusals"]
    unreadable = load_runs(root).summary["status"].isna().sum()
    assert sum("record.json cannot be read" in r for r in refusals) >= unreadable


@pytest.mark.slow
def test_report_of_malformed_records(mutated, tmp_path):
    pytest.importorskip("altair", reason="pip install 'albert_ablate[plot]'")
    assert main(["report", str(mutated[0]), "-o", str(tmp_path / "r.html")]) == 0


@pytest.mark.slow
def test_show_of_malformed_records_draws_or_says_why(mutated, tmp_path, capsys):
    pytest.importorskip("altair", reason="pip install 'albert_ablate[plot]'")
    for folder, name in mutated[1].items():
        code = main(["show", folder, "-o", str(tmp_path / "x.html")])
        said = capsys.readouterr().err.strip()
        assert code == 0 or code == 2 and len(said.splitlines()) == 1, (name, said)


@pytest.mark.slow
def test_run_finds_goes_on_or_says_why(whole, tmp_path, capsys):
    record = json.loads((whole / "record.json").read_text())
    for name, content in mutations(record).items():
        folder = tmp_path / whole.parent.name / "seed0"
        shutil.copytree(whole, folder)
        (folder / "record.json").write_bytes(content)
        try:
            assert run(compose([*TINY, f"paths.runs={tmp_path}"]))["status"] in store.DONE, name
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1 and "record.json" in str(error), name
        shutil.rmtree(folder)


# --- what no type shows ----------------------------------------------------------------------------------------------


def flipped(whole: Path, tmp_path: Path, find: bytes) -> Path:
    """A copy of the run whose record has one bit turned just after `find`."""
    folder = tmp_path / whole.parent.name / "seed0"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoints"))
    raw = bytearray((folder / "record.json").read_bytes())
    raw[raw.index(find) + len(find) + 3] ^= 1
    (folder / "record.json").write_bytes(raw)
    return folder


@pytest.mark.parametrize("part, key", [("summary", "val_loss"), ("summary", "test_loss"), ("cost", "training_seconds"),
                                       ("data", "fingerprint"), ("proof", "data_order")])  # fmt: skip
def test_a_bit_turned_in_a_result_is_seen(whole, tmp_path, part, key):
    folder = flipped(whole, tmp_path, f'"{key}": '.encode())
    found = store.read(folder)
    assert isinstance(found, store.Unreadable) and f"its {part} does not match its checksum" in found.reason
    assert not store.has_ended(folder)
    assert pd.isna(load_runs(tmp_path).summary["status"].iloc[0])
    with pytest.raises(ConfigError, match="does not match its checksum"):
        RunFolder(folder).record()


def test_a_bit_turned_elsewhere_is_noted(whole, tmp_path):
    folder = flipped(whole, tmp_path, b'"label": "')
    found = store.read(folder)
    assert isinstance(found, store.Record) and "changed after the run wrote it" in found.note
    assert "changed after" in load_runs(tmp_path).summary["reason"].iloc[0]


def test_white_space_is_no_damage(whole, tmp_path):
    folder = tmp_path / "seed0"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(json.loads((whole / "record.json").read_text())))
    assert store.read(folder).note is None


def test_older_and_newer_formats(whole, tmp_path):
    record = json.loads((whole / "record.json").read_text())
    assert record["format"] == store.FORMAT
    del record["format"], record["checksums"]
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert store.read(tmp_path).format == 1
    (tmp_path / "record.json").write_text(json.dumps(record | {"format": 99}))
    assert "its format is version 99" in store.read(tmp_path).reason
    with pytest.raises(ConfigError, match="version 99"):
        RunFolder(tmp_path).record()


def test_the_record_of_another_run_is_refused(whole, tmp_path):
    for setting, seed in ((whole.parent.name, "seed1"), ("0123456789ab", "seed0")):
        folder = tmp_path / setting / seed
        folder.mkdir(parents=True)
        shutil.copy(whole / "record.json", folder)
        assert "it is the record of another run" in store.read(folder).reason
    (tmp_path / "kept").mkdir()  # a run that was moved
    shutil.copy(whole / "record.json", tmp_path / "kept")
    assert isinstance(store.read(tmp_path / "kept"), store.Record)


def test_a_damaged_status_index_is_made_anew(whole, tmp_path, monkeypatch):
    from albert_ablate.studies import states

    monkeypatch.setattr(states, "WORTH_WRITING", 1)
    shutil.copytree(whole, tmp_path / whole.parent.name / "seed0", ignore=shutil.ignore_patterns("checkpoints"))
    wanted, index = states.states(tmp_path), tmp_path / states.INDEX
    good = index.read_bytes()
    assert states.states(tmp_path) == wanted
    at = good.index(b'"val_loss": ') + 14
    for bad in (b"", bytes(99), good[:-50], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], b"\xff" * 50):
        index.write_bytes(bad)
        assert states.states(tmp_path) == wanted
        assert index.read_bytes() == good
