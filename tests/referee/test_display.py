"""`compare` on a terminal: lines, a panel below them, and what worker processes print above it."""

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console
from terminals import on_pty

from albert_ablate.referee.answer import ACCEPT, UNDECIDED, Contrast, picture
from albert_ablate.referee.display import Terminal, panel, styled

SIDES = ["echo METRIC loss=$(( ({seed} * 7919) % 97 + 1000 ))", "echo METRIC loss=$(( ({seed} * 7919) % 97 + 500 ))"]
COMPARE = [sys.executable, "-m", "albert_ablate.cli", "compare", *SIDES, "--metric", "loss", "--margin", "10%"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def contrast(**more):
    kept = {"metric": "loss", "margin": 0.02, "mean": 0.05, "low": 0.03, "high": 0.07, "pairs": 4, "max_pairs": 20}
    return Contrast("old", "new", more.pop("decision", UNDECIDED), "Why.", **(kept | more))


@pytest.mark.process
def test_a_terminal_shows_lines_and_a_panel_a_pipe_only_lines(tmp_path):
    seen, code = on_pty(COMPARE, cwd=tmp_path)
    piped = subprocess.run([*COMPARE, "--runs", "other"], cwd=tmp_path, capture_output=True, text=True)
    assert code == piped.returncode == 0
    assert "\x1b" not in piped.stdout and piped.stdout.count(": pair ") == 4
    assert "\x1b[?25l" in seen and seen.rindex("\x1b[?25h") > seen.rindex(": pair ")  # the cursor is shown again
    assert "\x1b[1A\x1b[2K" in seen  # the panel is drawn again in its place
    plain = ESCAPE.sub("", seen)
    assert plain.count(": pair 4 of at most 20") == 1 and plain.count("1 of at most 20 pairs") >= 1
    # what stays at the end is what a pipe gets, but for the time
    ends = [[line.rstrip() for line in text.replace("\r", "").splitlines()[-4:]] for text in (plain, piped.stdout)]
    assert ends[0][0].endswith(ends[1][0].strip()) and ends[0][1] == ends[1][1] and ends[0][3] == ends[1][3]


@pytest.mark.process
@pytest.mark.parametrize("terminal_error", [True, False])
def test_what_other_processes_print_goes_above_the_panel(capfd, monkeypatch, terminal_error):
    monkeypatch.setattr(os, "isatty", lambda fd: terminal_error)
    written = io.StringIO()
    with Terminal(Console(file=written, force_terminal=True, width=80)) as terminal:
        terminal.watch([contrast()])
        subprocess.run([sys.executable, "-c", "import sys; print('from a worker'); print('oops', file=sys.stderr)"])
        terminal.say("pair 5")
    print("afterwards")
    said = capfd.readouterr()
    assert said.out == "afterwards\n" and said.err == ("" if terminal_error else "oops\n")  # 2> stays what it was
    plain = ESCAPE.sub("", written.getvalue())
    assert all(plain.count(f"{text}\n") == 1 for text in ("from a worker", "pair 5"))
    assert plain.count("oops\n") == terminal_error


def test_an_error_leaves_the_terminal_as_it_was(capfd):
    written = io.StringIO()
    with pytest.raises(ZeroDivisionError), Terminal(Console(file=written, force_terminal=True)):
        os.write(1, b"lost in the pipe?\n")
        raise ZeroDivisionError
    print("afterwards")
    assert capfd.readouterr().out == "afterwards\n"
    assert "lost in the pipe?" in written.getvalue() and written.getvalue().count("\x1b[?25h") == 1


def test_the_panel_has_pairs_and_picture_of_each_contrast():
    console = Console(file=io.StringIO(), width=120)
    console.print(panel([contrast(), contrast(decision=ACCEPT, pairs=7)]))
    text = console.file.getvalue()
    assert "new against old: 4 of at most 20 pairs\n" in text and "7 of at most 20 pairs, ACCEPT\n" in text
    assert all(line.rstrip() in text for line in picture(contrast()))
    console.print(panel([contrast(mean=float("nan"), pairs=1)]))
    assert "the interval comes with the second pair" in console.file.getvalue()


def test_margin_interval_and_decision_have_colors():
    margin, interval = map(styled, picture(contrast()))
    (green,), (cyan,) = margin.spans, interval.spans
    assert green.style == "green" and margin.plain[green.start : green.end].strip().strip("=") == "0"
    assert "cyan" in cyan.style and re.fullmatch(r"\[-*o-*\]", interval.plain[cyan.start : cyan.end])
    sentence = styled("b changed norm=x [1]: NO EFFECT. Why.")
    assert [sentence.plain[s.start : s.end] for s in sentence.spans] == ["NO EFFECT"]
