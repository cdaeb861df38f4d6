"""What commands print into a pipe: their result alone on stdout, as plain text or as one JSON document."""

import json
import subprocess
import sys

import pytest
from factories import make_run
from forking import arguments, write_text

from albert_ablate.cli import main

CLAIMS = """\
arms: {pre: [norm=pre_ln], post: [norm=post_ln]}
regimes: {asked: {text: small, overrides: [model=nano]}}
claims:
- name: c
  statement: s
  parts: [{treatment: pre, control: post, measure: test_loss, margin: 0.01}]
  full: {regime: asked, N: 8}
"""


@pytest.fixture
def call(folder, monkeypatch, capfd):
    """A command, called in the folder: its exit code, and what came out of the file descriptors 1 and 2."""
    monkeypatch.chdir(folder)

    def call(*command):
        code = main([*map(str, command)])
        said = capfd.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs of two arms and a file of claims on others."""
    folder = tmp_path_factory.mktemp("streams")
    for seed in (0, 1):
        for norm in ("pre_ln", "post_ln"):
            make_run(folder / "runs", {"norm": norm}, seed)
    (folder / "claims.yaml").write_text(CLAIMS)
    return folder


@pytest.mark.parametrize(
    "command, first",
    [
        (["status", "runs"], "arm "),
        (["report", "runs", "-o", "study.html"], "study.html\n"),
        (["methods", "norm"], "norm "),
        (["measures"], "measure "),
    ],
)
def test_a_pipe_gets_the_result_as_plain_text(command, first, call):
    code, out, err = call(*command)
    assert (code, err) == (0, "") and out.startswith(first) and "\x1b" not in out and "\r" not in out


def test_show_names_its_page_and_nothing_else(folder, call):
    (run,) = sorted((folder / "runs").glob("*/seed0"))[:1]
    code, out, err = call("show", run, "-o", "run.html")
    assert (code, out, err) == (0, "run.html\n", "")


@pytest.mark.parametrize(
    "command, schema",
    [
        (["status", "runs", "--json"], "status"),
        (["judge", "claims.yaml", "--form", "full", "--json"], "ledger"),
        (["methods", "norm", "--json"], "methods"),
        (["measures", "--json"], "measures"),
    ],
)
def test_json_in_a_pipe_is_one_document(command, schema, call):
    code, out, err = call(*command)
    assert code == 0 and json.loads(out)["schema"].startswith(f"albert_ablate.{schema}.v"), err
    assert "\x1b" not in err


@pytest.mark.process
def test_a_sweep_in_a_pipe_prints_its_lines_alone(tmp_path):
    text = write_text(tmp_path / "words.txt")
    given = [o for o in arguments(text, tmp_path, "budget.tokens=256") if not o.startswith("paths.runs")]
    (tmp_path / "study.yaml").write_text("method: grid\nparameters:\n  seed: {values: [0, 1]}\n")
    command = [sys.executable, "-m", "albert_ablate", "sweep", "study.yaml", "--runs", "runs", "--workers", "1", *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout and "\r" not in done.stdout
    assert lines[0] == "study.yaml: 2 runs, 0 done, 2 to do." and lines[-1] == "2 of 2 runs are done, 0 failed."
    assert len(lines) == 4 and all("validation loss" in line for line in lines[1:-1])
