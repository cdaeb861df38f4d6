"""A lease instead of a lock, where the file system has none: fcntl is made to fail as it does there."""

import errno
import fcntl
import os
import time

import pytest
from forking import Child, forked, nano, outcome, train, write_text

from albert_ablate.records import lease
from albert_ablate.records.folder import Busy, RunFolder
from albert_ablate.studies.states import is_held
from albert_ablate.training.run import run

pytestmark = pytest.mark.process


def refuse_locks(monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)
    monkeypatch.setattr(fcntl, "fcntl", fail)


@pytest.fixture
def lockless(monkeypatch):
    refuse_locks(monkeypatch, errno.ENOLCK)
    for name, seconds in (("BEAT", 0.05), ("EXPIRY", 0.6), ("SETTLE_SECONDS", 0.15)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "abc" / "seed0")
    folder.create()
    return folder


def held(folder, seconds, beat=True):
    """A process that holds the folder, once it does."""
    reader, writer = os.pipe()

    def hold():
        if not beat:
            lease.Lease._beat = lambda self: None
        with folder.lock():
            os.write(writer, b"x")
            time.sleep(seconds)
            folder.check_lease()

    child = Child(hold)
    os.read(reader, 1)
    return child


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_lease_is_taken_where_there_are_no_locks(number, folder, monkeypatch):
    refuse_locks(monkeypatch, number)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0)
    with folder.lock():
        assert folder.lease is not None


def test_a_lease_is_held_while_its_owner_lives_and_no_longer(lockless, folder):
    owner = held(folder, 60)
    time.sleep(0.8)  # longer than a lease without a sign of life
    assert is_held(folder.path)
    with pytest.raises(Busy, match=f"trained by process {owner.pid} on "), folder.lock():
        pass
    owner.kill()
    owner.wait()
    assert is_held(folder.path)  # nobody can know yet
    time.sleep(0.7)
    assert not is_held(folder.path)
    with folder.lock():
        assert folder.lease is not None and is_held(folder.path)
    assert not is_held(folder.path) and not list(folder.path.glob("*lease*"))


def test_of_several_that_find_a_folder_free_one_has_it(lockless, folder, tmp_path):
    refused = tmp_path / "refused"
    refused.mkdir()

    def contend():
        try:
            with folder.lock():
                until = time.monotonic() + 60
                while len([*refused.iterdir()]) < 4 and time.monotonic() < until:  # a slow one must not come too late
                    time.sleep(0.05)
                folder.check_lease()
                return True
        except Busy:
            (refused / str(os.getpid())).touch()
            return False

    children = [Child(contend) for _ in range(5)]
    assert sorted(child.wait()[1] for child in children) == [False] * 4 + [True]


def test_an_owner_that_stood_still_for_too_long_commits_nothing(lockless, folder):
    sleeper = held(folder, 1.2, beat=False)
    time.sleep(0.7)
    with folder.lock():
        folder.write({"status": "running"})
        kind, error = sleeper.wait()
        assert kind == "error" and isinstance(error, Busy) and "has been taken over by process" in str(error)
        folder.check_lease()  # that one has not taken it along
    with pytest.raises(Busy), folder.lock():
        (folder.path / "lease").write_text("another\nprocess 1 on moon\n")
        folder.write({"status": "finished"})
    assert (folder.record() or {})["status"] == "running"


def test_a_run_whose_lease_is_lost_stops(lockless, tmp_path):
    text = write_text(tmp_path / "words.txt")
    cfg = nano(text, tmp_path / "runs", "budget.tokens=2048")
    expected = outcome(train(nano(text, tmp_path / "whole", "budget.tokens=2048"))["folder"])

    def robbed():
        from albert_ablate.training.recorder import Recorder

        end = Recorder.on_train_batch_end

        def on_train_batch_end(self, *args):
            end(self, *args)
            if self.step == 7:
                (self.folder.path / "lease").write_text("another\nprocess 1 on moon\n")

        Recorder.on_train_batch_end = on_train_batch_end
        with pytest.raises(Busy, match="taken over by process 1 on moon"):
            run(cfg)

    forked(robbed)
    folder = next((tmp_path / "runs").glob("*/seed0"))
    assert RunFolder(folder).record()["status"] == "running" and RunFolder(folder).record()["progress"]["step"] == 6
    time.sleep(0.7)
    assert outcome(train(cfg)["folder"]) == expected
