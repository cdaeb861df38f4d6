"""What programs use: the MCP server, the agent's skill and the GitHub Action, each by a client of its own."""

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from albert_ablate.cli import main
from albert_ablate.referee.mcp_server import server

ROOT = Path(__file__).parents[2]
PROGRAM = """import sys
seed = int(sys.argv[sys.argv.index("--seed") + 1])
print(f"METRIC loss={LEVEL - 0.5 * ('--wider' in sys.argv) + seed * 7919 % 101 / 10_000}")
"""
TRAIN = "python train.py --seed {seed}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(f"LEVEL = 2.0\n{PROGRAM}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def ask(target, questions):
    """The names of all tools, and answers, from a client of a server or of the command that starts one."""
    mcp = pytest.importorskip("mcp")
    async with mcp.Client(target) as client:
        listed = (await client.list_tools()).tools
        assert all(t.annotations.read_only_hint for t in listed)
        answers = [await client.call_tool(name, arguments) for name, arguments in questions]
    return {t.name for t in listed}, answers


def content(answer):
    return answer.structured_content.get("result", answer.structured_content)


@pytest.mark.slow
def test_an_agent_reads_sessions_and_methods_over_mcp(folder, capsys):
    pytest.importorskip("mcp")
    old, new = (f"echo METRIC loss=$(( ({{seed}} * 7919) % 97 + {level} ))" for level in (1000, 500))
    options = ["--metric", "loss", "--margin", "10%", "--baseline", old]
    assert main(["gate", "--session", "s", *options, "--candidate", new]) == 0
    capsys.readouterr()
    before = sorted((p, p.stat().st_mtime_ns) for p in (folder / "runs").rglob("*"))
    questions = [
        ("ledger", {"session": "s"}), ("ledger", {}), ("methods", {"kind": "norm"}), ("runs", {}),
        ("compare_result", {}), ("ledger", {"session": "../../x"}), ("compare_result", {"name": "gone"}),
    ]  # fmt: skip
    names, answers = asyncio.run(ask(server(folder / "runs"), questions))
    assert names == {"runs", "compare_result", "ledger", "methods"}
    session = content(answers[0])
    assert session["kept"] == new and [p["decision"] for p in session["proposals"]] == ["ACCEPT"]
    assert content(answers[1]) == {"sessions": ["s"]}
    assert "pre_ln" in {m["option"] for m in content(answers[2])}
    assert content(answers[3]) == [] and content(answers[4]) == {"comparisons": []}
    assert [a.is_error for a in answers] == [False] * 5 + [True] * 2
    assert "There is no comparison gone" in answers[6].content[0].text
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (folder / "runs").rglob("*"))


@pytest.mark.slow
@pytest.mark.process
def test_the_server_answers_over_standard_input_and_output(folder, capsys):
    stdio = pytest.importorskip("mcp.client.stdio")
    assert main(["compare", TRAIN, f"{TRAIN} --wider", "--metric", "loss", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "albert_ablate.cli", "mcp", "--runs", "runs"]
    started = stdio.StdioServerParameters(command=command[0], args=command[1:], cwd=folder)
    name = Path(answer["folder"]).name
    with open(folder / "log", "w") as log:
        target = stdio.stdio_client(started, errlog=log)
        _, (listed, kept) = asyncio.run(ask(target, [("compare_result", {}), ("compare_result", {"name": name})]))
    assert content(listed) == {"comparisons": [name]} and content(kept) == answer


@pytest.mark.slow
def test_the_commands_of_the_skill_do_what_it_says(folder, capsys):
    text = (ROOT / "skills/compare-changes/SKILL.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["name"] == "compare-changes" and 0 < len(head["description"]) < 1024 and len(text.splitlines()) < 70
    commands = re.findall(r"^albert-ablate (.+)$", text, re.MULTILINE)
    assert [c.split()[0] for c in commands] == ["compare", "gate"]
    for command in commands:
        assert main(shlex.split(command)) == 0
        assert json.loads(capsys.readouterr().out)["decision"] == "ACCEPT"


@pytest.mark.slow
@pytest.mark.parametrize("level, decision, code", [(1.5, "ACCEPT", 0), (2.5, "REJECT", 1)])
def test_the_action_judges_a_pull_request(folder, monkeypatch, level, decision, code):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "init", "-q"], check=True)
    for text in (f"LEVEL = 2.0\n{PROGRAM}", f"LEVEL = {level}\n{PROGRAM}"):
        (folder / "train.py").write_text(text)
        subprocess.run(["git", "add", "train.py"], check=True)
        subprocess.run(["git", *who, "commit", "-qm", "x"], check=True)
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = action["runs"]["steps"][-1]
    # as the runner fills in what is given, and the defaults of the rest outside a pull request
    given = {"command": TRAIN, "metric": "loss", "base": "HEAD~1", "candidate": "HEAD"}
    inputs = {k: given.get(k, v.get("default")) for k, v in action["inputs"].items()}
    env = {k: inputs[re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", v)[1]] for k, v in step["env"].items()}
    places = {k: str(folder / k.lower()) for k in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "RUNNER_TEMP")}
    (folder / "runner_temp").mkdir()
    (folder / "bin").mkdir()
    (folder / "bin/albert-ablate").write_text(f'#!/bin/sh\nexec {sys.executable} -m albert_ablate.cli "$@"\n')
    (folder / "bin/albert-ablate").chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    everything = {**os.environ, **env, **places, "PATH": path}
    bash = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
    done = subprocess.run(bash, cwd=folder, env=everything, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert f"decision={decision}\n" in (folder / "github_output").read_text()
    summary = (folder / "github_step_summary").read_text()
    assert summary.startswith(f"**{decision}**") and "| `git:HEAD` | `git:HEAD~1` | loss |" in summary
