"""The progress bar of a study, and the validation loss drawn in a line of text."""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest
from factories import write_record
from forking import arguments, fork_workers, forked, write_text
from terminals import forked_on_pty, lines_shown, on_pty

from albert_ablate.cli import main
from albert_ablate.records.json_output import NO_BARS
from albert_ablate.studies import progress
from albert_ablate.studies.progress import Bar
from albert_ablate.studies.sparklines import sparkline

SWEEP = "method: grid\nparameters:\n  norm: {values: [pre_ln, post_ln]}\n  seed: {values: [0, 1]}\n"


class Cfg(SimpleNamespace):
    def __getitem__(self, key):
        return getattr(self, key)


def planned(root, tokens, layers):
    """Runs as a sweep plans them, of which a bar needs the folder and what they cost."""
    return [
        SimpleNamespace(
            folder=root / f"{i:012x}" / "seed0", cfg=Cfg(budget=SimpleNamespace(tokens=n), model={"layers": depth})
        )
        for i, (n, depth) in enumerate(zip(tokens, layers, strict=True))
    ]


def write(run, status, step, updated):
    fields = {"status": status, "seed": 0, "label": "x", "progress": {"step": step, "steps": 10}, "updated": updated}
    write_record(run.folder, fields, error="lost" if status == "failed" else None)


def test_the_bar_counts_runs_and_gives_the_time_left(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress, "is_drawn", lambda: False)  # no thread: the test looks itself
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: now[0]))
    runs = planned(tmp_path, [100, 100, 100, 200, 100], [1, 1, 1, 2, 1])  # work 100, 100, 100, 400, 100
    write(runs[0], "finished", 10, 900.0)
    write(runs[1], "failed", 5, 900.0)  # of an earlier command: is tried again
    training = {runs[3].folder}
    bar = Bar(runs, lambda: training)
    bar.look()
    bar.before = 100 + 50
    assert "1 of 5 runs done, 1 running" in bar.line(100) and "failed" not in bar.line(100)
    assert " left" not in bar.line(100)  # nothing was done yet
    now[0] = 1030.0
    write(runs[3], "running", 5, 1020.0)
    write(runs[2], "failed", 0, 1025.0)
    bar.look()
    line = bar.line(100)
    # done: 100 + 50 + 200 of 800. Since the command began 200 in 30 s; left 800 - 350 - 100 of the failed run
    assert line.startswith(" 44% ") and len(line) <= 100
    assert line.endswith("1 of 5 runs done, 1 running, 1 failed, about 52 s left")
    assert len(bar.line(60)) <= 60


@pytest.mark.process
@pytest.mark.parametrize(
    "environment, terminal, drawn",
    [({}, True, True), ({NO_BARS: "1"}, True, False), ({"TERM": "dumb"}, True, False), ({}, False, False)],
)
def test_a_bar_is_drawn_on_terminals_alone(environment, terminal, drawn, tmp_path):
    code = "import sys; from albert_ablate.studies.progress import is_drawn, print_line; print_line(str(is_drawn()))"
    command = [sys.executable, "-c", code]
    if terminal:
        text, _ = on_pty(command, env={NO_BARS: "", **environment})
        assert text == ("True\x1b[K\r\n" if drawn else "False\r\n")
    else:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout == "False\n"


@pytest.mark.process
@pytest.mark.parametrize("workers", ["forked", pytest.param("joblib", marks=pytest.mark.slow)])
def test_lines_of_runs_stand_above_the_bar(workers, tmp_path, capfd):
    text = write_text(tmp_path / "words.txt")
    given = [o for o in arguments(text, tmp_path, "budget.tokens=1024") if not o.startswith("paths.runs")]
    file = tmp_path / "study.yaml"
    file.write_text(SWEEP)
    command = ["sweep", str(file), "--runs", str(tmp_path / "runs"), *given]

    def sweep():
        fork_workers()
        return main([*command, "hydra/launcher=basic"])

    if workers == "forked":
        written, code = forked_on_pty(sweep, columns=100, env={NO_BARS: ""})
    else:
        real = [sys.executable, "-m", "albert_ablate", *command, "--workers", "2"]
        written, code = on_pty(real, columns=100, env={NO_BARS: ""})
    assert code == 0 and re.search(r"\d of 4 runs done", written)  # how many, depends on how fast they are
    shown = [line for line in lines_shown(written) if line]
    assert sum("validation loss" in line for line in shown) == 4
    assert not any("runs done" in line or "\x1b" in line for line in shown)  # nothing of the bar stays
    assert any(line == "4 of 4 runs are done, 0 failed." for line in shown)
    capfd.readouterr()
    assert forked(sweep) == 0
    again = capfd.readouterr()
    assert again.err == "" and "4 done, 0 to do" in again.out and "\x1b" not in again.out


def test_a_sparkline_has_a_level_for_each_value():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.5, 3.0, 2.0, 2.0]) == "█▃▁▁"  # (3 - 2) / 3.5 of 7 steps is 2
    assert sparkline([3.0, math.nan, 2.0, math.inf]) == "██▁█"
    assert sparkline([2.0, 2.0]) == "▁▁" and sparkline([math.nan, math.nan]) == "██"
    assert sparkline([2.0]) == sparkline([]) == ""
    long = sparkline(range(1000))
    assert len(long) == 15 and (long[0], long[-1]) == ("▁", "█") and list(long) == sorted(long)


def evaluated(folder, losses, **fields):
    """A done run with its history of evaluations; losses: validation loss of each."""
    write_record(folder, {"status": "finished", "label": "norm=x", "summary": {"val_loss": losses[-1]}, **fields})
    rows = [(i, split, loss) for i, loss in enumerate(losses) for split, loss in (("train", 9.0), ("validation", loss))]
    columns = {"step": [i for i, *_ in rows], "split": [s for _, s, _ in rows], "loss": [x for *_, x in rows]}
    table = pa.table(columns)
    with pa.ipc.new_file(str(folder / "evals.arrow"), table.schema) as file:
        file.write_table(table)


@pytest.mark.process
def test_status_draws_the_loss_where_there_is_room(tmp_path):
    evaluated(tmp_path / ("a" * 12) / "seed0", [5.5, 3.0, 2.0, 2.0], seed=0)
    command = [sys.executable, "-m", "albert_ablate", "status", str(tmp_path)]
    wide, _ = on_pty(command, columns=100)
    narrow, _ = on_pty(command, columns=40)
    assert "validation loss" in wide and "█▃▁▁" in wide
    assert "validation loss" not in narrow and "█" not in narrow and "finished" in narrow
    for more in ([], ["--json"]):
        piped = subprocess.run([*command, *more], capture_output=True, text=True)
        assert piped.returncode == 0 and "finished" in piped.stdout and "█" not in piped.stdout
