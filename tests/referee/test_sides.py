"""Sides of a comparison: what is refused, with which sentence, and what git and commands do to the user's files."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from albert_ablate.cli import main
from albert_ablate.referee.sides import Crash, Inadmissible, read_margin, read_side, refuse_same, run_command


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits, main and its better branch; the program prints its level plus a number that hangs on the seed."""
    program = 'import sys; s = int(sys.argv[1]); print(f"METRIC loss={LEVEL + (s * 7919 % 101) / 1000}")\n'
    git(tmp_path, "init", "-q", "-b", "main")
    for branch, level in (("main", 2.0), ("better", 1.5)):
        if branch != "main":
            git(tmp_path, "checkout", "-q", "-b", branch)
        (tmp_path / "train.py").write_text(f"LEVEL = {level}\nSEED = 0\n{program}")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", branch)
    git(tmp_path, "checkout", "-q", "main")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = "python train.py {seed}"


@pytest.mark.process
def test_refs_are_compared_in_worktrees_of_their_own(repository, capsys):
    (repository / "notes.txt").write_text("mine")  # untracked: no change of the commit
    code = main(["compare", "--refs", "main", "better", "--command", TRAIN, "--runs", "out", "--json"])
    answer = json.loads(capsys.readouterr().out)
    (contrast,) = answer["contrasts"]
    # by hand: equal noise in both, so that log ratios differ by the level only, about log(2.05 / 1.55)
    assert (code, contrast["decision"]) == (0, "ACCEPT")
    assert contrast["change"]["mean"] == pytest.approx(100 * (1.55 / 2.05 - 1), abs=0.3)
    assert git(repository, "status", "--porcelain").split() == ["??", "notes.txt", "??", "out/"]
    assert git(repository, "rev-parse", "--abbrev-ref", "HEAD").strip() == "main"
    assert (repository / "train.py").read_text().startswith("LEVEL = 2.0")


BAD_SIDES = {
    "nothing": "is not allowed as a side",
    "": "is not allowed as a side",
    "norm=pre_ln seed=3": "seed=3 is not allowed in a side",
    "norm=nothing": "nothing",
    "git:better --x": "has no such ref",
    "git:gone": "has no such ref",
    "git:-n": "has no such ref",
}


@pytest.mark.parametrize("text", BAD_SIDES)
def test_a_side_that_is_none_is_refused(repository, capsys, text):
    code = main(["compare", "git:main" if text[:3] == "git" else "norm=pre_ln", text, "--command", TRAIN])
    said = capsys.readouterr()
    assert code == 2 and BAD_SIDES[text] in said.err and said.err.count("\n") == 1
    assert not (repository / "runs").exists()


def test_a_dirty_tree_is_refused(repository, capsys):
    (repository / "train.py").write_text("print('METRIC loss=1')")
    code = main(["compare", "git:main", "git:better", "--command", TRAIN])
    assert code == 2 and "the working tree has changes" in capsys.readouterr().err
    assert not (repository / "runs").exists()
    # another commit than the one checked out is what it says
    assert read_side("git:better", command=TRAIN).kind == "git"


def test_a_commit_that_changes_a_seed_only_is_refused(repository):
    text = (repository / "train.py").read_text()
    (repository / "train.py").write_text(text.replace("SEED = 0", "SEED = 1"))
    git(repository, "commit", "-qam", "seed")
    a, b = (read_side(f"git:{ref}", command=TRAIN) for ref in ("main~1", "main"))
    with pytest.raises(Inadmissible, match="a changed seed is not a change"):
        refuse_same(a, b)
    refuse_same(a, read_side("git:better", command=TRAIN))


def test_a_git_side_needs_a_command(repository, capsys):
    assert main(["compare", "git:main", "git:better"]) == 2
    assert "needs --command" in capsys.readouterr().err


def command(text):
    return read_side(text + " # {seed}")


BAD_METRICS = {
    "echo nothing": "printed no line METRIC loss=value",
    "echo METRIC other=1": "it gave other",
    "echo METRIC loss=1; echo METRIC loss=2": "2 times: give it once",
    "echo METRIC loss=low": "loss=low, which is not a number",
    "echo METRIC loss=": "loss=, which is not a number",
    'echo "{\\"loss\\": true}" > {json}': "loss=True, which is not a number",
    'echo "[1]" > {json}': "not a JSON mapping",
    'echo "{" > {json}': "not a JSON mapping",
    'echo METRIC loss=1; echo "{\\"loss\\": 2}" > {json}': "2 times: give it once",
    'echo "{\\"loss\\": 1, \\"loss\\": 2}" > {json}': "2 times: give it once",
}


@pytest.mark.parametrize("text", BAD_METRICS)
def test_a_metric_that_cannot_be_read_is_refused(tmp_path, text):
    with pytest.raises(Inadmissible) as error:
        run_command(command(text), 0, "loss", 10, tmp_path)
    assert BAD_METRICS[text] in str(error.value)


def test_metrics_are_read_from_output_or_json(tmp_path):
    assert run_command(command("echo METRIC loss=2.5e-1"), 0, "loss", 10, tmp_path) == ("loss", 0.25)
    assert run_command(command("echo METRIC loss=2; echo METRIC acc=3"), 0, "acc", 10, tmp_path) == ("acc", 3.0)
    assert run_command(command('echo "{\\"loss\\": 3}" > {json}'), 0, "", 10, tmp_path) == ("loss", 3.0)
    assert run_command(read_side("echo METRIC loss={seed}"), 41, "", 10, tmp_path) == ("loss", 41.0)
    with pytest.raises(Inadmissible, match="several metrics"):
        run_command(command("echo METRIC a=1; echo METRIC b=2"), 0, "", 10, tmp_path)


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_command_that_fails_or_hangs_is_a_crash(tmp_path):
    with pytest.raises(Crash, match="exit code 3: out of memory"):
        run_command(command("echo starting; echo out of memory >&2; exit 3"), 0, "loss", 10, tmp_path)
    with pytest.raises(Crash, match="exceeded its limit of 0.5 s"):
        run_command(command("sleep 600 & echo $! > child; sleep 600"), 0, "loss", 0.5, tmp_path)
    child = int((tmp_path / "child").read_text())
    while is_alive(child):  # what it started is ended too
        time.sleep(0.01)


@pytest.mark.parametrize("text", ["0", "-1", "x", "%", "nan", "inf%", "0%"])
def test_a_margin_is_a_number_above_zero(text):
    with pytest.raises(Inadmissible, match="margin"):
        read_margin(text)


def test_differences_are_log_ratios_or_in_the_unit():
    inf = float("inf")
    assert read_margin("1%").difference(2.0, 1.0) == pytest.approx(0.6931472)
    assert read_margin("1%", higher=True).difference(2.0, 1.0) == pytest.approx(-0.6931472)
    assert read_margin("0.1").difference(2.0, -1.0) == 3.0
    assert (read_margin("0.1").difference(inf, 1.0), read_margin("0.1").difference(1.0, inf)) == (inf, -inf)
    with pytest.raises(Inadmissible, match="values above 0"):
        read_margin("1%").difference(0.0, 1.0)
