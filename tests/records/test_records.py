"""The run folder: histories cut anywhere, records whole or absent, one writer at a time."""

import io
import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from forking import Child, forked
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_ablate.config import ConfigError
from albert_ablate.records import store
from albert_ablate.records.atomic import replace_file
from albert_ablate.records.folder import Busy, RunFolder
from albert_ablate.records.history import BATCH_ROWS, SCHEMAS, History, read_history, values_of

# --- histories -------------------------------------------------------------------------------------------------------


def row(step: int) -> dict:
    axes = {"step": step, "tokens": 10 * step, "seconds": 0.5, "flops": 1e9}
    figures = {"loss": 1 / (step + 1), "lr": 0.1, "grad_norm": float(step), "clipped": 0.0}
    return {**axes, **figures, "grad_norm_clipped": float(step), "noise_scale": 3.0, "logit_rms": 0.5}


def opened(folder: Path, length: int = 0) -> History:
    history = History(folder, "steps")
    history.cut(length)
    return history


@given(st.lists(st.integers(0, 450), max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_behind_the_committed_length_are_ignored(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("history")
    history, steps, lengths = opened(folder), 0, []
    for size in sizes:
        for _ in range(size):
            history.append(**row(steps))
            steps += 1
        lengths.append((history.commit(), steps))
        assert history.pending == []
    history.close()
    if not lengths:
        return
    committed, kept = data.draw(st.sampled_from(lengths))
    stream = folder / "steps.arrows"
    whole = stream.read_bytes()
    end = data.draw(st.integers(committed, len(whole)))
    stream.write_bytes(whole[:end] + data.draw(st.sampled_from([b"", b"\0" * 5000, b"\xff" * 64])))
    assert read_history(folder, "steps", {"steps": committed})["step"].to_pylist() == list(range(kept))
    again = opened(folder, committed)
    assert again.table()["step"].to_pylist() == list(range(kept))
    again.append(**row(kept))
    again.finish()
    again.close()
    assert read_history(folder, "steps", None)["step"].to_pylist() == list(range(kept + 1))


def test_a_finished_history_is_its_stream_in_one_batch(tmp_path):
    history = opened(tmp_path)
    for step in range(3 * BATCH_ROWS + 7):
        history.append(**row(step))
        if step % 100 == 0:
            history.commit()
    length = history.commit()
    history.finish()
    history.close()
    stream, finished = (read_history(tmp_path, "steps", lengths) for lengths in ({"steps": length}, None))
    assert finished.equals(stream)
    with pa.memory_map(str(tmp_path / "steps.arrow")) as source:
        assert pa.ipc.open_file(source).num_record_batches == 1


def test_values_of_a_column_are_those_that_arrow_gives():
    parts = [pa.array([1.0, 2.0, math.nan]), pa.array([], pa.float64()), pa.array([3.0, 4.0, 5.0]).slice(1)]
    columns = [pa.chunked_array(parts), pa.chunked_array([pa.array([1, 2, 3], pa.int32()).slice(1, 1)])]
    columns += [pa.chunked_array([pa.array(values)]) for values in ([1, None, 3], ["a", None], [True, False])]
    columns.append(pa.chunked_array([], pa.int64()))
    for column in columns:
        values, usual = values_of(column), column.to_numpy()
        assert values.dtype == usual.dtype
        np.testing.assert_array_equal(values, usual)


def test_a_history_without_rows_can_be_finished_and_read(tmp_path):
    history = opened(tmp_path)
    history.finish()
    history.close()
    assert read_history(tmp_path, "steps", None).num_rows == 0
    assert read_history(tmp_path, "evals", {}).num_rows == 0


def test_a_reader_sees_committed_rows_of_a_live_run(tmp_path):
    history = opened(tmp_path)
    history.append(**row(0))
    lengths = {"steps": history.commit()}
    history.append(**row(1))
    history.commit()
    assert read_history(tmp_path, "steps", lengths).num_rows == 1
    history.finish()
    history.close()
    (tmp_path / "steps.arrows").unlink()
    assert read_history(tmp_path, "steps", lengths).num_rows == 2


def test_short_writes_leave_nothing_out(tmp_path, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:7])

    monkeypatch.setattr("albert_ablate.records.history.io.FileIO", Short)
    history = opened(tmp_path)
    history.append(**row(0))
    assert read_history(tmp_path, "steps", {"steps": history.commit()})["loss"].to_pylist() == [1.0]


def test_a_history_shorter_than_what_was_committed_is_refused(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(OSError, match="shorter than what was committed"):
        opened(tmp_path, 10_000)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch, broken):
    file = tmp_path / "record.json"
    replace_file(file, b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space"):
        replace_file(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["record.json"]


@pytest.mark.process
def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    def half(file):
        file.write(b"half")
        os._exit(9)

    assert Child(lambda: replace_file(tmp_path / "record.json", half)).wait() == ("exited", 9)
    assert os.listdir(tmp_path) == [".record.json.tmp"]
    replace_file(tmp_path / "record.json", b"whole")
    assert os.listdir(tmp_path) == ["record.json"]


# --- the record ------------------------------------------------------------------------------------------------------


def test_a_record_is_json_without_nan(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write(
        {"status": "diverged", "summary": {"loss": math.nan, "best": math.inf, "n": 1}, "pair": (1.5, -math.inf)}
    )
    text = (tmp_path / "record.json").read_text()
    strict = json.loads(text, parse_constant=pytest.fail)
    assert strict["summary"] == {"loss": None, "best": None, "n": 1} and strict["pair"] == [1.5, None]


@pytest.mark.parametrize("text", ["", '{"status": "runn', "[]", "null", "3", '{"summary": {}}', "\x00" * 100])
def test_a_corrupt_record_gives_one_sentence(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path).record()
    assert "record.json cannot be read" in str(caught.value) and "\n" not in str(caught.value)


def test_clearing_and_tidying_remove_what_they_say(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create()
    unfinished = ["steps.arrows", "checkpoints/resume.ckpt", "checkpoints/.best.ckpt.tmp"]
    lasting = ["record.json", "steps.arrow", "checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    others = ["config.yaml", "lock"]
    for name in [*unfinished, *lasting, *others]:
        (tmp_path / name).touch()

    def left() -> set[str]:
        return {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}

    folder.tidy()
    assert left() == {*lasting, *others}
    folder.clear()
    assert left() == {*others}


# --- the lock --------------------------------------------------------------------------------------------------------


def locked(folder: RunFolder) -> bool:
    try:
        with folder.lock():
            return False
    except Busy as error:
        assert "\n" not in str(error)
        return True


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "setting" / "seed0")
    folder.create()
    return folder


@pytest.mark.process
def test_another_process_is_kept_out_and_told_by_whom(folder):
    def attempt() -> str:
        with pytest.raises(Busy) as caught, folder.lock():
            pass
        return str(caught.value)

    with folder.lock():
        message = forked(attempt)
        assert f"process {os.getpid()} on " in message
        assert forked(lambda: locked(folder)), "a failed attempt of another process must not free the lock"
    assert not forked(lambda: locked(folder))


@pytest.mark.process
def test_another_thread_is_kept_out_and_frees_nothing(folder):
    answers = []
    with folder.lock():
        thread = threading.Thread(target=lambda: answers.append(locked(folder)))
        thread.start()
        thread.join()
        assert answers == [True]
        assert forked(lambda: locked(folder))
    assert not locked(folder)


def test_of_many_threads_one_gets_in(folder):
    inside, most, done = [], [], []

    def work():
        for _ in range(100):
            try:
                with folder.lock():
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except Busy:
                pass
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4 and set(most) == {1}


@pytest.mark.process
def test_the_kernel_frees_a_dead_process_s_lock(folder):
    reader, writer = os.pipe()

    def hold():
        with folder.lock():
            os.write(writer, b"x")
            threading.Event().wait()

    child = Child(hold)
    os.read(reader, 1)
    assert locked(folder)
    child.kill()
    child.wait()
    assert not locked(folder)


@pytest.mark.process
def test_a_fork_of_the_holder_does_not_hold_the_lock(folder):
    go, gone = os.pipe()

    def later() -> tuple[bool, bool]:
        before = locked(folder)
        os.read(go, 1)
        return before, locked(folder)

    with folder.lock():
        child = Child(later)
        assert forked(lambda: locked(folder))
    # the child, which was made inside, keeps the lock from nobody
    assert not locked(folder)
    os.write(gone, b"x")
    kind, (_, after) = child.wait()
    assert kind == "value" and not after


@pytest.mark.process
def test_a_folder_in_use_is_left_as_it_is_by_the_next_one(folder):
    with folder.lock():
        before = {f: f.stat().st_mtime_ns for f in [folder.path, *folder.path.rglob("*")]}
        forked(folder.create)
        assert forked(lambda: locked(folder))
        assert {f: f.stat().st_mtime_ns for f in [folder.path, *folder.path.rglob("*")]} == before


def test_a_folder_that_cannot_be_made_gives_one_sentence(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"^paths\.runs=.*/runs cannot be written to: Not a directory\.$"):
        RunFolder(tmp_path / "runs" / "setting" / "seed0").create()


# --- a folder from somebody else -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lock", "checkpoints", "wandb", "tensorboard", "steps.arrows"])
def test_a_run_is_refused_where_it_would_write_through_a_link(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    folder = tmp_path / "setting" / "seed0"
    folder.mkdir(parents=True)
    (folder / name).symlink_to(outside if name in ("checkpoints", "wandb", "tensorboard") else outside / "file")
    with pytest.raises(ConfigError, match=f"{name} is a link"):
        RunFolder(folder).create()
    with pytest.raises(ConfigError, match=f"{name} is a link"), RunFolder(folder).lock():
        pass
    assert (outside / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["record.json", ".record.json.tmp"])
def test_replacing_a_file_replaces_a_link_not_its_target(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    (tmp_path / name).symlink_to(outside)
    replace_file(tmp_path / "record.json", b"new")
    assert outside.read_text() == "kept" and (tmp_path / "record.json").read_text() == "new"
    assert not (tmp_path / "record.json").is_symlink() and not (tmp_path / ".record.json.tmp").exists()


def test_a_history_is_not_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"kept")
    (tmp_path / "steps.arrows").symlink_to(outside)
    with pytest.raises(OSError):
        History(tmp_path, "steps").cut(0)
    assert outside.read_bytes() == b"kept"


def test_a_finished_history_knows_its_rows(tmp_path):
    """A bit of a loss is turned in the file: refused. A file without a digest, as of older releases, is read."""
    import numpy as np

    history = History(tmp_path, "steps")
    history.cut(0)
    for step in range(5):
        history.append(**{name: float(step) for name in history.schema.names} | {"loss": 0.123456789})
    history.finish()
    history.close()
    file = tmp_path / "steps.arrow"
    assert read_history(tmp_path, "steps", None)["loss"].to_pylist() == [0.123456789] * 5
    whole = file.read_bytes()
    at = whole.index(np.float64(0.123456789).tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="steps.arrow is damaged"):
        read_history(tmp_path, "steps", None)
    file.write_bytes(whole)
    rows = read_history(tmp_path, "steps", None).to_pylist()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMAS["steps"]) as writer:
        writer.write_table(pa.Table.from_pylist(rows, SCHEMAS["steps"]))
    assert read_history(tmp_path, "steps", None).to_pylist() == rows


@pytest.mark.parametrize("change", [{}, {"cost": None}, {"status": "running", "label": 'a,\n "seed": 1'}, {"seed": 4}])
def test_fields_are_those_of_the_whole_record(change, tmp_path):
    """Read from the text of an intact file, and with every check from a file that somebody touched."""
    nested = {"val_loss": 2.5, "divergence": 'x",\n "status": "failed'}
    record = {"status": "finished", "seed": 3, "summary": nested, "proof": {"initial_draws": {"w": "ab"}}}
    folder = tmp_path / "abc" / "seed3"
    folder.mkdir(parents=True)
    store.write(folder, record | change)
    names = ("status", "summary", "label", "cost", "progress", "sessions", "key")
    for _ in range(2):
        whole, found = store.read(folder), store.read_fields(folder, names)
        if isinstance(whole, store.Unreadable):
            assert found == whole and change == {"seed": 4}  # of another run
        else:
            assert found == {name: getattr(whole, name) for name in names}
        (folder / "record.json").write_text((folder / "record.json").read_text() + "\n ")
