"""The command `run.py`: exit codes, one sentence on stderr for each mistake, nothing left behind."""

import errno
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from albert_ablate.config import options
from run import main

RUN = Path(__file__).parent.parent / "run.py"
TINY = (
    "model=nano model.layers=2 model.width=16 model.context=16 budget.tokens=512 data=text_files data.batch=4 "
    "trainer=cpu trainer.threads=1 evaluation.tokens=64 evaluation.every=512"
).split()


@pytest.fixture
def tiny(tmp_path):
    """Overrides of a run of eight steps whose every file lies under tmp_path."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i * i} of a text about nothing\n" for i in range(2000)))
    return [*TINY, f"data.path={text}", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """`python run.py ...` in this process, from an empty folder: (exit code, stdout, stderr)."""
    from hydra.core.global_hydra import GlobalHydra

    here = tmp_path / "here"
    scratch = tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        code = main()
        out = capsys.readouterr()
        assert sys.argv == ["run.py", *arguments]
        assert not list(here.iterdir()) and not list(scratch.glob("albert*"))
        return code, out.out, out.err

    return call


def test_a_run_is_checked_once_and_its_model_built_once(command, tiny, monkeypatch):
    from albert_ablate.config import checking
    from albert_ablate.model.decoder import Decoder

    calls = []
    for owner, name in ((checking, "check_together"), (Decoder, "__init__")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), calls))
    assert command(*tiny)[0] == 0
    assert sorted(calls) == ["__init__", "check_together"]


def counted(function, calls):
    @functools.wraps(function)
    def call(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


MISTAKES = [
    ("norm=pre_lm", "norm=pre_lm is not an option: norm is one of pre_ln, "),
    ("nrom=pre_ln", "nrom=pre_ln is unknown: the nearest keys are norm, "),
    ("+nrom=pre_ln", "nrom=pre_ln is unknown: the nearest keys are norm, "),
    ("model.layres=3", "model.layres=3 is unknown: model=mini takes layers, "),
    ("+model.foo=1", "model.foo=1 is unknown: model=mini takes "),
    ("+trainer.gradient_clip_val=1", "trainer.gradient_clip_val=1 is unknown"),
    ("seed=abc", "seed=abc is not allowed: it must be a whole number"),
    ("optimizer.lr=nan", "optimizer.lr=nan is not allowed: it must be a number above 0"),
    ("optimizer.lr=", "optimizer.lr= is not allowed: it must be a number above 0"),
    ("dropout=uniform dropout.mean=1.2", "dropout.mean=1.2 is not allowed: it must be a number at least 0 and below 1"),
    ("dropout=none dropout.mean=0.1", "dropout.mean=0.1 is unknown: dropout=none takes no numbers"),
    ("norm=none norm_type=rms_norm", "norm_type=rms_norm would do nothing"),
    ("model.heads=3", "model.width=64 is not divisible by model.heads=3"),
    ("budget.tokens=-1", "budget.tokens=-1 is not allowed"),
    ("data=text_files", "data.path is missing"),
    ("data=text_files data.path=/nowhere", "data.path=/nowhere does not exist"),
    ("norm=pre_ln,post_ln", "norm=pre_ln,post_ln are several values: add -m"),
    ("seed=0,1", "seed=0,1 are several values: add -m"),
    ("seed=0 -m norm=pre_ln,pre_lm", "norm=pre_lm is not an option"),
    ("norm=[", "norm=[ is not an option"),
    ("seed=[", "'seed=[' cannot be read as key=value"),
    ("=3", "'=3' cannot be read as key=value"),
    ("foo", "'foo' cannot be read as key=value"),
    ("seed 3", "'seed' cannot be read as key=value"),
    ("--norm=post_ln", "--norm=post_ln is unknown: settings are written without dashes, norm=post_ln"),
    ("--seed 3", "--seed is unknown: settings are written without dashes"),
    ("~norm", "norm is missing"),
    ("seed=${foo}", "seed cannot be resolved: Interpolation key 'foo' not found"),
    ("--config-name=x", "Cannot find primary config 'x'"),
    ("trainer=cpu trainer.precision=16-mixed", "trainer.precision=16-mixed needs a GPU"),
    ("hydra.foo=1", "'foo'"),
    ("-m seed=0 hydra/launcher=jobl", "hydra/launcher=jobl does not exist: it must be one of basic, "),
    ("-m seed=0 hydra/launcher=raylike", "pip install 'albert_ablate[ray]' adds raylike"),
    ("-m seed=0 hydra/sweeper=x", "hydra/sweeper=x does not exist: it must be one of basic"),
    ("--experimental-rerun x.pickle", "--experimental-rerun is not allowed: repeat the command of a run"),
    ("-m +hydra.sweeper.params={seed:1}", "the values of a grid are written -m seed=0,1"),
    ("data=text_files data.path=/a=b.txt", "quotes of its own, \"data.path='/a=b.txt'\""),
    ("--cfg nothing", "argument --cfg/-c: invalid choice: 'nothing'"),
    ("--resolve", "Hydra: The --resolve flag can only be used"),
    ("hydra.run.dir=/proc/x", "Hydra: [Errno 2] No such file or directory: '/proc/x'"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[a for a, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, words, command, tmp_path):
    code, out, err = command(*arguments.split(), f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache")
    assert (code, out) == (2, "") and words in err
    assert err.count("\n") == 1 and err.endswith(".\n")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_completion_for_a_shell_is_handed_on_in_hydras_own_words(command):
    code, out, err = command("-sc", "install=bash")
    assert (code, err) == (0, "") and "complete -o nospace -o default -F hydra_bash_completion" in out


def test_a_key_given_twice_is_said(command):
    code, out, err = command("--cfg", "job", "seed=1", "seed=2")
    assert code == 0 and "seed: 2" in out and err == "seed is given twice on the command line: seed=2 counts.\n"


def test_a_configuration_is_shown_without_its_passwords(command):
    code, out, _ = command("--cfg", "job", "logger=mlflow", "logger.uri=http://me:pass-word-1@host:5000")
    assert code == 0 and "uri: http://me:***@host:5000" in out and "seed: 0" in out and "pass-word-1" not in out


def test_a_run_without_a_record_names_none(command, tiny, monkeypatch):
    def full(self, record):
        raise OSError(errno.ENOSPC, "No space left on device", "record.json")

    monkeypatch.setattr("albert_ablate.records.folder.RunFolder.write", full)
    code, _, err = command(*tiny)
    assert code == 1 and "No space left on device" in err and "Its record" not in err and "Traceback" not in err


def test_debug_shows_the_traceback_before_the_sentence(command):
    code, _, err = command("nrom=pre_ln", "debug=true")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("nrom=pre_ln is unknown")


def test_one_bad_seed_does_not_stop_the_others(command, tiny, tmp_path):
    code, out, err = command(*tiny, "-m", "seed=abc,0,-1,3")
    assert code == 2
    assert "seed=abc is not allowed" in err and "seed=-1 is not allowed" in err and "Traceback" not in err
    assert sorted(p.name for p in (tmp_path / "runs").glob("*/seed[0-9]")) == ["seed0", "seed3"]
    assert [line for line in out.splitlines() if line.startswith(str(tmp_path))] == [
        str(p) for p in sorted((tmp_path / "runs").glob("*/seed[0-9]"))
    ]


def test_a_grid_may_be_asked_for_by_hydras_mode(command):
    code, _, err = command("hydra.mode=MULTIRUN", "seed=abc,-1")
    assert code == 2 and "seed=abc is not allowed" in err and "seed=-1 is not allowed" in err


def test_a_done_run_is_found_and_a_forced_one_compared(command, tiny, monkeypatch):
    code, first, _ = command(*tiny)
    assert code == 0 and "validation loss" in first
    with monkeypatch.context() as patch:
        patch.setattr("albert_ablate.training.fit.fit", None)  # training it would raise
        code, second, _ = command(*tiny)
    assert code == 0 and "seed 0: this run is done" in second
    assert first.splitlines()[-1] == second.splitlines()[-1]
    code, third, _ = command(*tiny, "force=true")
    assert code == 0 and "Trained again: reproduced." in third


@pytest.mark.process
def test_help_is_read_from_the_folder_and_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['run.py', '--help']; from run import main; code = main();"
        "assert code == 0; heavy = {'torch', 'hydra', 'omegaconf', 'pytorch_lightning', 'numpy', 'pandas'};"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []" and not done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  ")}
    for group, names in options().items():
        assert sorted(lines[group]) == names
    assert (lines["norm"][0], lines["model"][0], lines["dropout"][0]) == ("pre_ln", "mini", "none")
    assert "python run.py norm=pre_ln dropout=depth_decay" in done.stdout and " -m " in done.stdout


@pytest.mark.process
def test_a_grid_from_the_shell_trains_every_arm_and_seed(tiny, tmp_path):
    here, scratch = tmp_path / "cwd", tmp_path / "tmp"
    here.mkdir()
    scratch.mkdir()
    given = [*(o for o in tiny if not o.startswith("budget")), "budget.tokens=128"]
    done = subprocess.run(
        [sys.executable, str(RUN), "-m", "norm=pre_ln,post_ln", "seed=0,1", *given],
        cwd=here,
        env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(here.iterdir()) and not list(scratch.iterdir())
    folders = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(tmp_path / "runs"))]
    assert [f.name for f in folders] == ["seed0", "seed1"] * 2
    assert len({f.parent for f in folders}) == 2 and all((f / "record.json").exists() for f in folders)


def test_a_notebook_can_do_it_from_any_folder(tiny, tmp_path, monkeypatch):
    import torch

    from albert_ablate import build_model, compose, run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--weird", "seed=5"])
    cfg = compose([*tiny, "seed=0", "seed=3", "paths.runs=mine"])
    assert cfg.seed == 3 and cfg.choices.norm == "pre_ln"
    assert build_model(cfg)(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 256)
    record = run(cfg)
    assert record["status"] in ("finished", "diverged") and Path(record["folder"]).is_relative_to(tmp_path / "mine")
    assert run(cfg)["found"]
