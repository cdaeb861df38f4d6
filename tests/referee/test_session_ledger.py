"""A session's ledger: edits are seen, kills leave it whole."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from albert_ablate.config import ConfigError
from albert_ablate.referee.ledger import InUse, Ledger

LOOP = """
import sys
from pathlib import Path
from albert_ablate.referee.ledger import Ledger
book = Ledger(Path(sys.argv[1]))
with book.lock():
    print("ready", flush=True)
    while True:
        book.add("run", value=len(book.entries), text="x" * 200)
"""


@pytest.fixture
def book(tmp_path):
    book = Ledger(tmp_path / "s")
    for value in (1.5, 2.5, 3.5):
        book.add("run", value=value)
    return book


def test_hashes_are_a_chain_that_can_be_worked_out_by_hand(book):
    previous = "0" * 64
    for n, line in enumerate(book.path.read_text().splitlines(), 1):
        entry = json.loads(line)
        text = f'{previous}\n{{"kind": "run", "line": {n}, "value": {n + 0.5}}}'
        previous = hashlib.sha256(text.encode()).hexdigest()
        assert entry == {"line": n, "kind": "run", "value": n + 0.5, "hash": previous}
    assert book.head.read_text().strip() == previous == book.hash


EDITS = {
    "a value": (lambda lines: [lines[0], lines[1].replace("2.5", "2.4"), lines[2]], "line 2 is not what was written"),
    "an order": (lambda lines: [lines[1], lines[0], lines[2]], "line 1 is not what was written"),
    "a line less": (lambda lines: [lines[0], lines[2]], "line 2 is not what was written"),
    "no end": (lambda lines: lines[:1], "does not end where its last entry was written"),
    "half a line": (lambda lines: [*lines[:2], lines[2][:20]], "line 3 cannot be read"),
    "a list": (lambda lines: ["[]", *lines], "line 1 cannot be read"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_seen(book, edit):
    change, said = EDITS[edit]
    text = "\n".join(change(book.path.read_text().splitlines())) + "\n"
    book.path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        Ledger(book.folder)
    assert book.path.read_text() == text


def test_a_missing_file_is_seen(book):
    text = book.path.read_text()
    book.path.unlink()
    with pytest.raises(ConfigError, match="is missing"):
        Ledger(book.folder)
    book.path.write_text(text)
    book.head.unlink()
    with pytest.raises(ConfigError, match="is missing"):
        Ledger(book.folder)


def test_a_kill_between_line_and_head_is_no_edit(book, monkeypatch):
    head = book.head.read_bytes()
    book.add("run", value=4.5)
    book.head.write_bytes(head)
    again = Ledger(book.folder)
    assert len(again.entries) == 4
    again.add("run", value=5.5)
    assert len(Ledger(book.folder).entries) == 5


def test_a_full_disk_leaves_the_ledger_as_it_was(book, monkeypatch):
    before = book.path.read_bytes()

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("albert_ablate.referee.ledger.replace_file", full)
        with pytest.raises(OSError):
            book.add("run", value=9.0)
    assert book.path.read_bytes() == before
    book.add("run", value=4.5)
    assert [e["value"] for e in Ledger(book.folder).entries] == [1.5, 2.5, 3.5, 4.5]


@pytest.mark.process
def test_a_killed_writer_leaves_a_whole_ledger_and_no_lock(tmp_path):
    last = 0
    for more in (1, 7):
        writer = subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        book = Ledger(tmp_path)
        with pytest.raises(InUse), book.lock():
            pass
        while not book.path.exists() or book.path.read_bytes().count(b"\n") < last + more:
            time.sleep(0.001)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        with book.lock():
            assert [e["value"] for e in book.entries] == list(range(len(book.entries)))
            assert len(book.entries) > last
            last = len(book.entries)
