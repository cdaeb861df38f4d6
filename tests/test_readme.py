"""Commands of README.md and docs/: options exist, settings compose, files are there; slow: they run."""

import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from typer.main import get_command

from albert_ablate.cli import app
from albert_ablate.config import check, compose
from albert_ablate.studies.sweepfile import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)]
SHELL = "\n".join(content for kind, content in BLOCKS if not kind).replace("\\\n", " ")
STARTS = ("python", "albert-ablate", "srun", "torchrun", "wandb", "pip", "pytest")
COMMANDS = [
    part.strip()
    for line in SHELL.splitlines()
    if line.startswith(STARTS)
    for part in re.sub(r"\s#.*", "", line).split("&&")
]
TRAIN = [c for c in COMMANDS if "run.py" in c]
TOOL = [c for c in COMMANDS if c.startswith("albert-ablate")]


def composed(overrides):
    """The configurations that run.py's arguments stand for: the values of a grid one by one."""
    choices = []
    for parsed in OverridesParser.create().parse_overrides([o for o in overrides if o != "-m"]):
        values = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [None]
        choices.append([parsed.input_line if v is None else f"{parsed.get_key_element()}={v}" for v in values])
    return [check(compose(list(each))) for each in itertools.product(*choices)]


def test_the_readme_has_commands_of_every_kind():
    assert len(TRAIN) >= 15 and len(TOOL) >= 20 and {c.split()[0] for c in COMMANDS} == set(STARTS)


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """The files that commands of docs/ name as somebody's own."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    for file in ("llama.json", "FOLDER/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps({"model_type": "llama", "vocab_size": 300, **sizes}))
    (tmp_path / "FOLDER" / "model.safetensors").touch()  # is not read where a configuration is composed
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", TRAIN)
def test_settings_of_the_readme_compose(command, request):
    if "model=hf" in command:
        request.getfixturevalue("named_files")
    words = shlex.split(command)
    found = composed(words[words.index("run.py") + 1 :])
    levels = [word.partition("=")[2].count(",") + 1 for word in words if "[" not in word] if "-m" in words else []
    assert len(found) == math.prod(levels)


@pytest.mark.parametrize("command", TOOL)
def test_options_of_the_readme_are_known_and_its_files_there(command):
    name, *words = shlex.split(command)[1:]
    tool = get_command(app).commands[name]
    with tool.make_context(name, list(words)) as context:  # raises what the command would say of a wrong option
        given = context.params
    for path in [w for w in words if w.startswith("sweeps/")]:
        if name == "judge":
            known = {claim["name"] for claim in yaml.safe_load((ROOT / path).read_text())["claims"]}
            assert set(given["only"] or ()) <= known
        else:
            assert read_sweep(ROOT / path).settings()
    settings = [w for w in given.get("overrides") or () if not w.startswith("hydra")]  # whose launchers are extras
    if name in ("sweep", "tune", "calibrate", "status", "agent"):
        check(compose(settings))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip")])
def test_extras_of_the_readme_exist(command):
    asked = re.findall(r"\[([\w,]+)\]", command)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for each in asked for name in each.split(",")} <= set(extras)


@pytest.mark.parametrize("code", [content for kind, content in BLOCKS if kind == "python"])
def test_python_of_the_readme_names_what_exists(code):
    compile(code, "README.md", "exec")
    for line in re.findall(r"^from albert_ablate.*|^import albert_ablate.*", code, re.M):
        exec(line, {})
    for name in re.findall(r"\balbert_ablate\.(\w+)\(", code):
        import albert_ablate

        assert callable(getattr(albert_ablate, name))


SMALL = (
    "model=nano model.layers=2 model.width=16 model.context=16 budget.tokens=512 data=markov data.batch=4 "
    "trainer.threads=1 evaluation.tokens=64 evaluation.every=512"
).split()
ELSEWHERE = (
    "srun",
    "torchrun",
    "trainer=ddp",
    "trainer=fsdp",
    "task=",
    "logger=",
    "recipe=",
    "model=",
    "train_size",
    "data=",
)


@pytest.mark.slow
@pytest.mark.process
def test_commands_of_the_readme_run_on_a_small_model(tmp_path):
    """One after the other on one folder of runs, with settings added that make them small."""
    small = [*SMALL, f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]
    done = []
    for command in COMMANDS:
        words = shlex.split(command)
        local = [w for w in words if w in ("trainer=ddp_cpu", "logger=[wandb_offline,tensorboard]")]
        if "run.py" in words and (local or not any(a in command for a in ELSEWHERE)):
            words = [sys.executable, *words[words.index("run.py") :], *small]
        elif "--dry-run" in words and "judge" not in words:
            words = [sys.executable, "-m", "albert_ablate.cli", *words[1:], "--runs", f"{tmp_path}/runs"]
        elif words[:2] == ["albert-ablate", "evaluate"] and "runs" in words:
            words = [sys.executable, "-m", "albert_ablate.cli", "status", f"{tmp_path}/runs"]
        else:
            continue
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, (command, ended.stderr[-2000:])
        done.append(command)
    assert len(done) >= 7, done


def test_the_study_of_the_readme_is_a_sweep_file(tmp_path):
    (content,) = [content for kind, content in BLOCKS if kind == "yaml" and "parameters:" in content]
    (tmp_path / "study.yaml").write_text(content)
    assert len(read_sweep(tmp_path / "study.yaml").settings()) == 12  # three norms, four seeds


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target
