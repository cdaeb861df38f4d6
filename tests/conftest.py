"""What all tests share: one thread, and a cache of their own."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Packed tokens go to a folder of this session, not to the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of made-up words."""
    from forking import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def untracked(text, tmp_path_factory):
    """The run of the tests of trackers without one: its record. It is read, never written to."""
    import sys

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
