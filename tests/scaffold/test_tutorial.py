"""The folder that `init` writes and the commands of docs/own_components.md: all of it runs, outside the checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from albert_ablate import cli
from albert_ablate.config import checked_config, folders_named
from albert_ablate.config.folders import CONF
from albert_ablate.judge.claims import read_claims
from albert_ablate.studies.sweepfile import read_sweep

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_components.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
SHELL = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.delenv(CONF, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "my_study"]) == 0
    yield tmp_path / "my_study"
    os.environ.pop(CONF, None)
    sys.modules.pop("half_branch", None)


def test_the_files_of_init_fit_together(written, capsys):
    claims = read_claims(written / "claims.yaml")
    with folders_named([written / "conf"]):
        assert read_sweep(written / "study.yaml").varied == ["norm", "seed"]
        settings = read_sweep(written / "study.yaml").settings()
        assert [s["seed"] for s in settings] == [0, 0, 1, 1, 2, 2, 3, 3]
        (claim,) = claims.claims
        for arm in claims.arms:
            cfg = checked_config(claims.overrides(claim, claim.parts[0], "screen", arm))
            assert cfg.budget.tokens == settings[0]["budget.tokens"] and cfg.choices["model"] == settings[0]["model"]
            assert cfg.choices["norm"] in [s["norm"] for s in settings]
    notebook = nbformat.read(written / "study.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or compile(cell.source, "cell", "exec")
    assert cli.main(["init", "my_study"]) == 2
    assert capsys.readouterr().err == "norm=half_branch exists already: choose another name.\n"
    Path("other").mkdir()
    Path("other/README.md").write_text("mine")
    assert cli.main(["init", "other"]) == 2 and [f.name for f in Path("other").iterdir()] == ["README.md"]


def test_the_page_shows_what_init_writes(written):
    (code,) = [block for kind, block in BLOCKS if kind == "python" and "half_branch.py" in block]
    assert (
        code.split("\n\n\n", 1)[1].replace("(self, x, f)", "(self, x: Tensor, f: Branch) -> Tensor")
        in (written / "half_branch.py").read_text()
    )
    (option,) = [block for kind, block in BLOCKS if kind == "yaml"]
    assert yaml.safe_load(option) == yaml.safe_load((written / "conf" / "norm" / "half_branch.yaml").read_text())
    commands = [line for line in (written / "README.md").read_text().splitlines() if line.startswith("albert-ablate")]
    assert set(commands) <= set(SHELL)


def shell(line, here, code=0):
    """A line as a shell in `here` runs it, outside the checkout: what it prints."""
    bin_ = Path(sys.executable).parent
    kept = {k: v for k, v in os.environ.items() if k not in (CONF, "PYTHONPATH")}
    environment = {**kept, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run(line, shell=True, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == code, (line, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.process
def test_an_own_norm_is_trained_swept_judged_and_edited(tmp_path):
    """The acceptance: the page's commands one after the other, at a smaller budget, and then an edit of the class."""
    here, said = tmp_path, {}
    for line in SHELL:
        if line.startswith("cd "):
            here = here / line.split()[1]
            for file in ("study.yaml", "claims.yaml"):
                text = (here / file).read_text()
                assert "50_000" in text
                (here / file).write_text(text.replace("50_000", "2_048"))
            continue
        said[line] = shell(line.replace("50_000", "2_048"), here)
    assert "FAILED" not in "".join(said.values())
    records = [json.loads(f.read_text()) for f in here.glob("runs/*/seed*/record.json")]
    assert sorted((r["choices"]["norm"], r["seed"]) for r in records) == [
        (norm, seed) for norm in ("half_branch", "pre_ln") for seed in range(4)
    ]
    assert "8 runs: 8 finished" in said["albert-ablate status runs"]
    judge = "albert-ablate judge claims.yaml --config-dir conf"
    assert re.search(r"changed test_loss|test_loss", said[judge])
    assert json.loads((here / "runs" / "ledger.json").read_text())["claims"][0]["parts"][0]["pairs"] == 4
    assert "passed" in shell(f"{sys.executable} -m pytest -q -p no:cacheprovider test_half_branch.py", here)
    shell(f"{sys.executable} -c 'from nbclient.cli import main; main()' study.ipynb", here)

    edited = (here / "half_branch.py").read_text().replace("x + self.scale", "x - self.scale")
    (here / "half_branch.py").write_text(edited)
    assert "do not count, because its own code has changed since: 4" in shell(judge, here)
    assert "8 runs, 4 done, 4 to do" in shell("albert-ablate sweep study.yaml --config-dir conf", here)
    assert len([*here.glob("runs/*/seed*/record.json")]) == 12
    ranks = "albert-ablate run norm=half_branch trainer=ddp_cpu model=nano budget.tokens=2_048 data=markov seed=7"
    assert "runs/" in shell(f"ALBERT_ABLATE_CONF=conf {ranks}", here)  # each rank is a process of its own
    assert "norm=half_branch is not an option" in shell(ranks, here, code=2)
