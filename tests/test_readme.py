"""Commands of README.md and docs/: options exist, settings compose, files are there; slow: they run."""

import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tokenizers
import yaml
from forking import write_text
from hydra.core.override_parser.overrides_parser import OverridesParser
from typer.main import get_command

from albert_ablate.cli import app
from albert_ablate.config import checked_config
from albert_ablate.judge.claims import read_claims
from albert_ablate.studies.sweepfile import read_sweep

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import outputs  # noqa: E402

PAGES = outputs.PAGES
BLOCKS = [(kind, content) for page in PAGES for kind, content, *_ in outputs.blocks(page.read_text())]
STARTS = ("python", "albert-ablate", "srun", "torchrun", "wandb", "pip", "pytest")


def commands(page):
    """Each command of a page with its place: the page and the line on which its block begins."""
    text = page.read_text()
    for kind, content, start, _ in outputs.blocks(text):
        lines = content.replace("\\\n", " ").splitlines() if not kind else []
        for line in lines:
            if line.startswith(STARTS):
                for part in re.sub(r"\s#.*", "", line).split("&&"):
                    yield f"{page.stem}-{text[:start].count(chr(10)) + 1}", part.strip()


PLACED = [placed for page in PAGES for placed in commands(page)]
COMMANDS = [command for _, command in PLACED]
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
TRAIN = [c for c in COMMANDS if "run.py" in c and "nrom=" not in c]  # the tutorial shows what that mistake is answered
TOOL = [c for c in COMMANDS if c.startswith("albert-ablate")]


def composed(overrides):
    """The configurations that run.py's arguments stand for: the values of a grid one by one."""
    choices = []
    for parsed in OverridesParser.create().parse_overrides([o for o in overrides if o != "-m"]):
        values = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [None]
        choices.append([parsed.input_line if v is None else f"{parsed.get_key_element()}={v}" for v in values])
    return [checked_config(list(each)) for each in itertools.product(*choices)]


def test_the_readme_has_commands_of_every_kind():
    assert len(TRAIN) >= 15 and len(TOOL) >= 20 and {c.split()[0] for c in COMMANDS} == set(STARTS)


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """The files that commands of docs/ name as somebody's own."""
    for file in ("llama.json", "FOLDER/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps({"model_type": "llama", "vocab_size": 300, **LLAMA}))
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
        checked_config(settings)


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
ELSEWHERE = (  # GPUs and other machines, servers, the hub, and files that take long to make
    *("srun", "torchrun", "trainer=ddp ", "trainer=fsdp", "logger=wandb ", "logger=mlflow", "logger=trackio"),
    *("=NAME", "=SAVED", "data.field=", "model.weights=loaded", "model=pretrained", "task="),
)


def small(command):
    """A command with settings that make it small, None where it needs what is not here."""
    words = shlex.split(command)
    if any(word in f"{command} " for word in ELSEWHERE):
        return None
    if "--dry-run" in words and "judge" not in words:
        return [sys.executable, "-m", "albert_ablate.cli", *words[1:]]
    if "run.py" not in words:
        return None
    settings, taken = words[words.index("run.py") + 1 :], {w.partition("=")[0] for w in words}
    added = [w for w in SMALL if w.partition("=")[0] not in taken & {"data", "model"}]
    if "model=hf" in words:
        added = [w for w in added if not w.startswith("model.")] + ["model.context=16"]
    if "tokenizer=bpe" in words:  # symbols without a space are one word, whose pairs take minutes
        added = [w for w in added if w != "data=markov"] + ["data=text_files", "data.path=my.txt"]
    if "budget.steps" in taken:
        added = [w for w in added if not w.startswith("budget.")] + ["budget.steps=8"]
    if "data.train_size" in taken:
        added.append("data.train_size=2000")
    given = {w.partition("=")[0]: w for w in [*settings, *added, "paths.cache=cache"]}  # what is added counts
    return [sys.executable, str(ROOT / "run.py"), *given.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the commands name."""
    place = tmp_path_factory.mktemp("commands")
    (place / "sweeps").symlink_to(ROOT / "sweeps")
    (place / "FOLDER").mkdir()
    text = write_text(place / "my.txt").read_text()
    (place / "FOLDER" / "one.md").write_text(text)
    rows = [json.dumps({"text": text[i : i + 500]}) for i in range(0, len(text), 500)]
    (place / "my.jsonl").write_text("\n".join(rows))
    (place / "llama.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, **LLAMA}))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.save(str(place / "tokenizer.json"))
    return place


def local_commands():
    """Commands that run here and whose output no page shows (tests/test_outputs.py runs those), each once."""
    shown = "".join(block for page in PAGES for block, *_ in outputs.shown(page.read_text()))
    found = {command: place for place, command in PLACED if command not in shown and small(command)}
    return [pytest.param(command, id=place) for command, place in found.items()]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("command", local_commands())
def test_commands_of_the_pages_run_on_a_small_model(command, folder):
    """In one folder; `-k options` runs those of docs/options.md alone."""
    env = os.environ | outputs.QUIET | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(small(command), cwd=folder, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize("content", [content for kind, content in BLOCKS if kind == "yaml"])
def test_studies_and_claims_of_the_pages_can_be_read(content, tmp_path):
    (tmp_path / "file.yaml").write_text(content)
    if "\nparameters:" in content:
        assert len(read_sweep(tmp_path / "file.yaml").settings()) >= 8
    elif "\nclaims:" in content:
        assert read_claims(tmp_path / "file.yaml").claims
    else:
        assert yaml.safe_load(content)


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
