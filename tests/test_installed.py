"""The package without its checkout: what the wheel holds, and every command from an empty folder."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import albert_ablate
from albert_ablate import cli
from albert_ablate.config import ConfigError, conf_folder, study_file, sweeps_folder
from albert_ablate.judge.claims import read_claims
from albert_ablate.studies.sweepfile import read_sweep

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TINY = (
    "model=nano model.layers=2 model.width=16 model.context=16 data=markov data.symbols=8 data.length=20_000 "
    "budget.tokens=640 evaluation.every=320 evaluation.tokens=64 trainer=cpu trainer.threads=1"
).split()


def test_the_wheel_holds_what_is_found_beside_the_package():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f.name: f"albert_ablate/{f.name}" for f in (conf_folder(), sweeps_folder())}
    assert all((ROOT / folder).is_dir() for folder in included)


def test_versions_agree_and_types_are_marked(capsys):
    version = PROJECT["project"]["version"]
    assert albert_ablate.__version__ == version == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"albert-ablate {version}\n"
    assert (ROOT / "albert_ablate" / "py.typed").exists()


def test_a_shipped_file_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_sweep("smoke").path == ROOT / "sweeps" / "smoke.yaml"
    assert read_claims("albert_agpt").family == "albert_agpt"
    Path("smoke").write_text("mine")
    assert study_file("smoke") == Path("smoke")  # a file of this name comes first
    assert study_file("sweeps/none.yaml") == Path("sweeps/none.yaml")  # to be refused where it is read
    with pytest.raises(ConfigError, match="^smoek is not a file here, nor one that comes with the package: smoke, "):
        study_file("smoek")


@pytest.mark.parametrize("given", [["norm=pre_lm"], ["--help"], ["--seed", "3"], ["--cfg", "job", "seed=7"], ["x"]])
def test_albert_ablate_run_answers_as_run_py(given, capsys, monkeypatch):
    from run import main

    monkeypatch.setattr("sys.argv", ["run.py", *given])
    wanted = main(), capsys.readouterr()
    assert (cli.main(["run", *given]), capsys.readouterr()) == wanted and sys.argv == ["run.py", *given]


# --- the wheel itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`albert-ablate` of a wheel in an environment of its own, which takes all but this package from ours."""
    place = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip"]
    try:
        import hatchling  # noqa: F401

        isolation = ["--no-build-isolation"]
    except ImportError:
        isolation = []
    built = subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", *isolation, "-w", place, ROOT], capture_output=True, text=True
    )
    if built.returncode and not isolation:
        pytest.skip("the wheel cannot be built: hatchling is not installed, and pip cannot fetch it")
    assert built.returncode == 0, built.stderr
    (wheel,) = place.glob("*.whl")
    venv.create(place / "venv", with_pip=False)
    python = place / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    packages = next((place / "venv" / "lib").glob("python*/site-packages"))
    theirs = [p for p in map(Path, sys.path) if p.name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(map(str, theirs)))
    return wheel, place / "venv" / "bin"


@pytest.fixture
def call(installed, tmp_path):
    """A command of the wheel in an empty folder: what it prints; it must exit with `code`."""
    here = tmp_path / "empty"
    here.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}

    def call(*command, code=0, program="albert-ablate"):
        done = subprocess.run(
            [installed[1] / program, *command], cwd=here, env={**kept, "COLUMNS": "200"}, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    call.here = here
    return call


@pytest.mark.slow
def test_the_wheel_holds_options_studies_and_types(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    package = {f"albert_ablate/{f.relative_to(ROOT / 'albert_ablate')}" for f in (ROOT / "albert_ablate").rglob("*.*")}
    beside = {f"albert_ablate/{f.relative_to(ROOT)}" for d in ("conf", "sweeps") for f in (ROOT / d).rglob("*.yaml")}
    lacking = {f for f in package | beside if "__pycache__" not in f and ".ipynb_checkpoints" not in f} - names
    assert not lacking
    assert not [n for n in names if n.startswith("tests/")]


@pytest.mark.slow
def test_the_wheel_trains_sweeps_and_judges(call, installed):
    where = call("-c", "import albert_ablate; print(albert_ablate.__file__)", program="python")
    assert Path(where.strip()).is_relative_to(installed[1].parent)  # not the checkout
    assert call("-m", "albert_ablate", "--version", program="python").startswith("albert-ablate ")
    assert "norm=pre_lm is not an option" in call("run", "norm=pre_lm", code=2)
    assert not list(call.here.iterdir())
    assert "runs/" in call("run", *TINY, "norm=post_ln", "dropout=depth_decay")
    call("run", "-m", *TINY, "seed=0,1")
    assert len(list(call.here.glob("runs/*/seed*"))) == 3
    assert "norm=post_ln seed=1: pending" in call("sweep", "smoke", "--dry-run")
    assert "normalization_converges_faster" in call("judge", "albert_agpt", "--dry-run")
    assert "pre_ln" in call("methods", "norm")
    assert "finished" in call("status", "runs")


@pytest.mark.slow
def test_the_wheel_begins_a_folder_with_an_own_component(call):
    assert "albert-ablate sweep study.yaml --config-dir conf" in call("init")
    assert "ok " in (checked := call("check-component", "norm=half_branch", "--config-dir", "conf"))
    assert "FAILED" not in checked
    study = call.here / "study.yaml"
    study.write_text(study.read_text().replace("50_000", "1_024"))
    assert "8 of 8 runs are done, 0 failed" in call("sweep", "study.yaml", "--config-dir", "conf", "--workers", "1")
    assert "norm=half_branch" in call("status", "runs")
    assert "half_branches_are_better" in call("judge", "claims.yaml", "--config-dir", "conf", "--dry-run")
