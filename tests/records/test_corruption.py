"""What a damaged or foreign record does to every command: a row with its reason, one sentence, never a traceback."""

import copy
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch

from albert_ablate import load_runs, run
from albert_ablate.cli import main
from albert_ablate.config import ConfigError, checked_config
from albert_ablate.judge.ledger import write_ledger
from albert_ablate.model.weights import load_checkpoint
from albert_ablate.records import store
from albert_ablate.records.checked import checksum, write_checked
from albert_ablate.records.evaluation_results import read_evaluations, write_evaluations
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import DamagedHistory, read_history
from albert_ablate.records.tuning import read_tuning, write_tuning
from albert_ablate.report.contrasts import read_ledger
from albert_ablate.trackers.sync import _notes

TINY = ["model=nano", "model.layers=1", "model.width=16", "model.context=16", "data=markov", "data.length=20_000",
        "budget.tokens=2_000", "evaluation.every=1_000", "evaluation.tokens=256", "trainer.threads=1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run's folder."""
    root = tmp_path_factory.mktemp("whole")
    return Path(run(checked_config([*TINY, f"paths.runs={root}"]))["folder"])


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
    claims = Path(__file__).parents[2] / "sweeps" / "claims.yaml"
    assert main(["judge", str(claims), "--runs", str(root), "--ledger", str(tmp_path / "l.json")]) == 0
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
            assert run(checked_config([*TINY, f"paths.runs={tmp_path}"]))["status"] in store.DONE, name
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

    monkeypatch.setattr(states, "INDEX_WRITE_THRESHOLD", 1)
    shutil.copytree(whole, tmp_path / whole.parent.name / "seed0", ignore=shutil.ignore_patterns("checkpoints"))
    wanted, index = states.states(tmp_path), tmp_path / states.INDEX
    good = index.read_bytes()
    assert states.states(tmp_path) == wanted
    at = good.index(b'"val_loss": ') + 14
    for bad in (b"", bytes(99), good[:-50], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], b"\xff" * 50):
        index.write_bytes(bad)
        assert states.states(tmp_path) == wanted
        assert index.read_bytes() == good


# --- files with a checksum beside the record -------------------------------------------------------------------------

ENTRY = {"rows": [{"x": 1.5}], "summary": {"area": 0.25}, "settings": {}, "weights": "last", "weights_hash": "ab"}
CLAIM = {"name": "one", "verdict": "supported", "sentence": "It is so.", "parts": []}
FILES = {  # name -> (written by, read by)
    "evaluations.json": (
        lambda f: write_evaluations(f, {"units": ENTRY}, "mine"),
        lambda f: read_evaluations(f, "mine"),
    ),
    "tuning/arm.json": (lambda f: write_tuning(f, "arm", {"rate": 0.01, "curve": []}), lambda f: read_tuning(f, "arm")),
    "ledger.json": (
        lambda f: write_ledger({"claims": [CLAIM], "form": "screen"}, f / "ledger.json"),
        lambda f: read_ledger(f / "ledger.json", needed=True),
    ),
    "synced.json": (
        lambda f: write_checked(f / "synced.json", {"TensorBoard": 1.5}, "mine"),
        lambda f: _notes(f, "mine"),
    ),
}


def same_but_for_new_keys(found: dict, wanted: dict) -> bool:
    """A bit in the name of the checksum's own key makes it a key that nobody reads."""
    return {k: v for k, v in found.items() if k in wanted} == wanted


@pytest.mark.parametrize("name", FILES)
def test_a_bit_turned_anywhere_is_seen_or_harmless(name, tmp_path):
    writes, reads = FILES[name]
    writes(tmp_path)
    file, wanted, refused = tmp_path / name, reads(tmp_path), 0
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        try:
            assert same_but_for_new_keys(reads(tmp_path), wanted), at
        except ConfigError as error:
            assert "\n" not in str(error) and file.name in str(error)
            refused += 1
    assert refused > len(whole) / 2


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_zeroed_or_of_another_run_is_refused(name, tmp_path):
    writes, reads = FILES[name]
    writes(tmp_path)
    file = tmp_path / name
    whole = file.read_bytes()
    half = len(whole) // 2
    others = {**json.loads(whole), "of": "another"}
    others["checksum"] = checksum({k: v for k, v in others.items() if k != "checksum"})
    for content in (b"", whole[:half], whole[:half] + bytes(len(whole) - half), json.dumps(others).encode()):
        if name == "ledger.json" and content.startswith(b"{") and content.endswith(b"}"):
            continue  # belongs to no single run
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=file.name):
            reads(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_release_without_checksums_is_read(name, tmp_path):
    writes, reads = FILES[name]
    writes(tmp_path)
    wanted, file = reads(tmp_path), tmp_path / name
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in ("checksum", "of")}))
    assert reads(tmp_path) == wanted


def test_checkpoints_and_histories_of_another_run_are_refused(whole, tmp_path, capsys):
    identity = store.read(whole).identity
    shutil.copytree(whole, tmp_path / "runs" / whole.parent.name / "seed0")
    folder = tmp_path / "runs" / whole.parent.name / "seed0"
    other = tmp_path / "other.ckpt"
    torch.save({**load_checkpoint(whole / "checkpoints" / "best.ckpt", identity), "run": "f" * 12}, other)
    shutil.copy(other, folder / "checkpoints" / "best.ckpt")
    assert main(["generate", str(folder), "--tokens", "2"]) == 2
    assert "that of another run, ffffffffffff" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "units", "--weights", "best"]) == 2
    assert "that of another run, ffffffffffff" in capsys.readouterr().err
    with pytest.raises(DamagedHistory, match="evals.arrow is that of another run"):
        read_history(whole, "evals", None, "f" * 12)
    assert len(read_history(whole, "evals", None, identity)) == len(read_history(whole, "evals", None))


def test_histories_and_checkpoints_without_an_identity_are_read(whole, tmp_path):
    """As earlier releases wrote them."""
    content = load_checkpoint(whole / "checkpoints" / "last.ckpt")
    torch.save({k: v for k, v in content.items() if k != "run"}, tmp_path / "x.ckpt")
    assert load_checkpoint(tmp_path / "x.ckpt", "f" * 12)["step"] == content["step"]
    table = read_history(whole, "steps", None)
    with pa.ipc.new_file(tmp_path / "steps.arrow", table.schema) as file:
        file.write_table(table)
    assert read_history(tmp_path, "steps", None, "f" * 12).to_pandas().equals(table.to_pandas())


@pytest.mark.slow
@pytest.mark.process
def test_no_damage_to_any_file_changes_a_number_in_silence(tmp_path):
    """Every file of a study, the token cache, tuning, ledger and index against every command that reads it."""
    import importlib.util

    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("attacks", root / "benchmarks" / "attacks.py")
    attacks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(attacks)
    lines: list[str] = []
    counts = attacks.attack(root, list(attacks.TARGETS), lines.append)
    assert counts["said"] > 200 and counts["silent"] == counts["traceback"] == 0, "\n".join(lines)
    assert not [line for line in lines if "is not there" in line]
