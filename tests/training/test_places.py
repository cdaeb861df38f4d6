"""Awkward places: full disks, read-only folders, folders that go away, odd names. One sentence or the right result, and
the right result when the same command is given again.

The disks are small tmpfs mounts, for which one must be root on Linux; elsewhere those tests are skipped.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import Child, arguments, nano, train, write_text

from run import main

pytestmark = pytest.mark.process

pytestmark = pytest.mark.slow


def command(given: list[str], out: Path, before=lambda: None) -> Child:
    """`python run.py` in a forked child, what it says in the file `out`."""

    def work() -> int:
        before()
        sys.stdout = sys.stderr = out.open("w", buffering=1)  # pytest's own would keep it from us
        sys.argv = ["run.py", *given]
        return main()

    return Child(work)


def said(out: Path) -> str:
    text = out.read_text(errors="replace")
    assert "Traceback" not in text, text
    return text


@contextlib.contextmanager
def disk(place: Path, size: str):
    """A file system of its own at `place`; None where none can be mounted."""
    place.mkdir(exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,{more}", str(place)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    return train(nano(text, tmp_path_factory.mktemp("plain") / "runs"))["proof"]["final_weights"]


def weights(runs: Path) -> list[str]:
    import json

    return [json.loads(f.read_text())["proof"]["final_weights"] for f in runs.glob("*/seed*/record.json")]


@pytest.mark.parametrize("kilobytes", [0, 4, 64, 200, 400, 800])
def test_a_full_disk_is_said_and_the_run_ends_right_later(kilobytes, text, undisturbed, tmp_path):
    with disk(tmp_path / "disk", "1m") as remount:
        runs, filler = tmp_path / "disk" / "runs", tmp_path / "disk" / "filler"
        filler.write_bytes(bytes((1024 - kilobytes) * 1024 - 8192 if kilobytes else 1024 * 1024))
        given = arguments(text, runs)
        kind, code = command(given, tmp_path / "out.txt").wait()
        sentence = said(tmp_path / "out.txt")
        assert (kind, code) in (("value", 0), ("value", 1), ("value", 2)), sentence
        if code:
            assert "space" in sentence or "room" in sentence, sentence
        remount("size=50m")
        assert command(given, tmp_path / "out.txt").wait() == ("value", 0), said(tmp_path / "out.txt")
        assert weights(runs) == [undisturbed]


def test_a_full_disk_for_the_token_cache_is_done_without(text, undisturbed, tmp_path):
    with disk(tmp_path / "disk", "64k"):
        given = [*arguments(text, tmp_path / "runs", f"paths.cache={tmp_path}/disk/cache")]
        assert command(given, tmp_path / "out.txt").wait() == ("value", 0), said(tmp_path / "out.txt")
        assert weights(tmp_path / "runs") == [undisturbed]


def test_a_read_only_disk_is_one_sentence_and_exit_code_2(text, undisturbed, tmp_path):
    with disk(tmp_path / "disk", "50m") as remount:
        given = arguments(text, tmp_path / "disk" / "runs")
        remount("ro")
        assert command(given, tmp_path / "out.txt").wait() == ("value", 2)
        assert "cannot be written to" in said(tmp_path / "out.txt")
        remount("rw")
        assert command(given, tmp_path / "out.txt").wait() == ("value", 0)
        assert weights(tmp_path / "disk" / "runs") == [undisturbed]


def test_a_run_folder_deleted_under_a_run_is_made_again(text, undisturbed, tmp_path):
    runs, given = tmp_path / "runs", arguments(text, tmp_path / "runs", "budget.tokens=40960")
    child = command(given, tmp_path / "out.txt")
    for _ in range(6000):
        if list(runs.glob("*/seed0/checkpoints/resume.ckpt")):
            break
        time.sleep(0.01)
    for folder in runs.glob("*"):
        if folder.name != "by-name":
            shutil.rmtree(folder, ignore_errors=True)
    kind, code = child.wait()
    sentence = said(tmp_path / "out.txt")
    assert kind == "value" and code in (0, 1, 2), sentence
    assert command(given, tmp_path / "out.txt").wait() == ("value", 0), said(tmp_path / "out.txt")
    plain = train(nano(text, tmp_path / "other", "budget.tokens=40960"))["proof"]["final_weights"]
    assert weights(runs) == [plain]


def test_linked_folders_and_names_in_other_scripts(text, undisturbed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    assert command(arguments(text, tmp_path / "runs"), tmp_path / "out.txt").wait() == ("value", 0)
    assert weights(tmp_path / "elsewhere") == [undisturbed]
    for name in ("with space", "it's", 'say "so"', "数据 данные", "a=b,c", "50% [x] (y) {z}", "$HOME", "#1;&|"):
        runs = tmp_path / name / "runs"
        quoted = str(runs).replace("\\", "\\\\").replace("'", "\\'")
        given = [g for g in arguments(text, tmp_path / "x") if not g.startswith("paths.runs=")]
        assert command([*given, f"paths.runs='{quoted}'"], tmp_path / "out.txt").wait() == ("value", 0), (
            name,
            said(tmp_path / "out.txt"),
        )
        assert weights(runs) == [undisturbed], name


def test_256_open_files_are_enough(text, undisturbed, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # noqa: E731
    given = arguments(text, tmp_path / "runs", "model.layers=2")
    assert command(given, tmp_path / "out.txt", limit).wait() == ("value", 0), said(tmp_path / "out.txt")
    assert weights(tmp_path / "runs") == [undisturbed]


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_on_one_run_train_it_once(processes, text, undisturbed, tmp_path):
    given = arguments(text, tmp_path / "runs")
    children = [command(given, tmp_path / f"out{i}.txt") for i in range(processes)]
    ends = [child.wait() for child in children]
    for i, (kind, code) in enumerate(ends):
        sentence = said(tmp_path / f"out{i}.txt")
        assert kind == "value" and (code == 0 or "is being trained by" in sentence), sentence
    assert ("value", 0) in ends and weights(tmp_path / "runs") == [undisturbed]


def test_a_clock_that_is_set_back_changes_nothing_but_times(text, undisturbed, tmp_path):
    real, calls = time.time, iter(range(10**9))

    def back() -> None:
        time.time = lambda: real() - 100 * next(calls)  # each look at it is earlier than the last

    given = arguments(text, tmp_path / "runs")
    assert command(given, tmp_path / "out.txt", back).wait() == ("value", 0), said(tmp_path / "out.txt")
    assert weights(tmp_path / "runs") == [undisturbed]


CLAIMS = """
arms: {pre: [norm=pre_ln], post: [norm=post_ln]}
regimes: {short: {text: at 2 layers, overrides: [model=nano]}}
claims:
  - name: first
    statement: Pre-norm is better.
    parts: [{treatment: pre, control: post, measure: test_loss}]
    tuned: []
    screen: {regime: short, N: 6}
"""


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A folder of one finished run."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    train(nano(text, runs))
    return runs


def asked(command_line: str, runs: Path, out: Path) -> tuple[str, int]:
    """(what it says, exit code) of an `albert-ablate` command in a forked child."""

    def work() -> int:
        from albert_ablate.cli import main as cli_main

        os.environ["WANDB_MODE"] = "offline"
        sys.stdout = sys.stderr = out.open("w", buffering=1)
        (run,) = runs.glob("*/seed0")
        return cli_main([w.format(runs=runs, run=run, place=runs.parent) for w in command_line.split()])

    kind, code = Child(work).wait()
    assert kind == "value", (kind, code)
    return said(out), code


WRITING = {
    "evaluate": "evaluate {run} clean",
    "sync": "sync {runs} --to tensorboard",
    "report": "report {runs} --format csv -o {place}/tables",
    "judge": "judge {place}/claims.yaml --runs {runs}",
    "show": "show {run} -o {place}/run.html",
}


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_commands_on_full_and_read_only_disks(state, name, finished, tmp_path):
    if name in ("report", "show"):
        pytest.importorskip("altair", reason="pip install 'albert_ablate[plot]'")
    if name == "sync":
        pytest.importorskip("tensorboard", reason="pip install 'albert_ablate[tensorboard]'")
    out = tmp_path / "out.txt"
    with disk(tmp_path / "disk", "4m") as remount:
        place = tmp_path / "disk"
        shutil.copytree(finished, place / "runs", symlinks=True)
        (place / "claims.yaml").write_text(CLAIMS)
        if state == "full":
            with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        else:
            remount("ro")
        sentence, code = asked(WRITING[name], place / "runs", out)
        last = sentence.strip().splitlines()[-1]
        assert code == (1 if state == "full" else 2), sentence
        words = ("No space left",) if state == "full" else ("Read-only file system", "you may not write there")
        assert any(w in last for w in words) and "None" not in last, sentence
        remount("rw" if state == "read-only" else "size=50m")
        sentence, code = asked(WRITING[name], place / "runs", out)
        assert code == 0, sentence
