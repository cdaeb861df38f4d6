"""What all tests share: one thread, a cache of their own, what the marks `slow` and `process` mean."""

import gc
import os
import shutil
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not there in a forked child, which would wait for them
gc.disable()  # until all tests are collected: what they import stays


def pytest_collection_finish(session):
    """Garbage is looked for less often, and not among what was imported: a twentieth of the time went into that."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_collection_modifyitems(config, items):
    """Slow tests run only where -m names them, also with -m "not process"."""
    if "slow" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def no_process_unless_marked(request, monkeypatch):
    """A test that starts another Python or forks carries the mark `process`."""
    if request.node.get_closest_marker("process"):
        return
    start = subprocess.Popen.__init__

    def forbidden(*args, **kwargs):
        pytest.fail("this test starts a process: mark it @pytest.mark.process")

    def started(self, args, *more, **kwargs):
        own = isinstance(args, (list, tuple)) and sys.executable in map(str, args)
        return (forbidden if own else start)(self, args, *more, **kwargs)

    monkeypatch.setattr(os, "fork", forbidden)
    monkeypatch.setattr(subprocess.Popen, "__init__", started)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Packed tokens go to a folder of this session, not to the user's cache; nothing waits for the disk."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.fsync = lambda fd: None  # what a killed process has written is there without; a power cut is not tested


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of made-up words."""
    from forking import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def untracked(text, tmp_path_factory):
    """The run of the tests of trackers without one: its record. It is read, never written to."""
    from forking import forked
    from tracked import configured

    from albert_ablate.training.run import run

    trackers = {"wandb", "mlflow", "tensorboard"}
    earlier = trackers & set(sys.modules)
    cfg = configured(text, tmp_path_factory.mktemp("untracked"), "none")
    record, imported = forked(lambda: (run(cfg), trackers & set(sys.modules)))
    assert imported == earlier, "a run without a tracker has imported one"
    return record


@pytest.fixture
def elsewhere(tmp_path):
    """Home and working folder of a child, both to stay empty."""
    (tmp_path / "elsewhere" / "home").mkdir(parents=True)
    (tmp_path / "elsewhere" / "cwd").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield opened
        opened.close()
