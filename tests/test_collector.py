"""Libraries are imported without the garbage collector and never scanned by it."""

import gc
import sys

import pytest

from albert_ablate.collector import preload


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes a module and gives its name; it is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "large_library.py").write_text(f"import gc\n{source}\nscanned = gc.isenabled()\n")
        return "large_library"

    yield write
    sys.modules.pop("large_library", None)
    gc.unfreeze()


def test_a_library_is_imported_and_kept_without_the_collector(library):
    name, before = library("made = [[] for _ in range(1000)]"), gc.get_freeze_count()
    preload(name)
    assert not sys.modules[name].scanned and gc.isenabled()
    assert gc.get_freeze_count() > before + 1000
    gc.unfreeze()
    preload(name)  # it is there
    assert gc.get_freeze_count() == 0


def test_the_collector_is_on_again_after_a_library_that_breaks(library):
    with pytest.raises(ZeroDivisionError):
        preload(library("1 / 0"))
    assert gc.isenabled()
