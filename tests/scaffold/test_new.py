"""`albert-ablate new` and `check-component`: what is written holds to its contract, and what does not is said."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from albert_ablate import cli
from albert_ablate.config import folders_named
from albert_ablate.config.folders import CONF
from albert_ablate.scaffold.new import GROUPS


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder; nothing named before, and nothing left behind."""
    monkeypatch.delenv(CONF, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.pop(CONF, None)


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("group", GROUPS)
def test_what_new_writes_passes_its_own_test(group, tmp_path, capsys):
    name = f"written_{group}"
    assert cli.main(["new", group, name, "--dir", "study"]) == 0
    *files, check, run = capsys.readouterr().out.splitlines()
    assert files == [f"study/{name}.py", f"study/conf/{group}/{name}.yaml", f"study/test_{name}.py"]
    assert sorted(map(str, Path("study").rglob("*.*"))) == sorted(files)
    test = loaded(tmp_path / "study" / f"test_{name}.py")
    with folders_named(["study/conf"]):
        test.test_the_formula()
        if group == "schedule":  # the checks of the command, written alike for every group
            test.test_the_contract()
    assert cli.main(check.split()[1:3] + ["--config-dir", "study/conf"]) == 0
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(states) == {"ok"} and len(states) >= 5
    assert cli.main([*run.split()[1:], "--cfg", "job", "--package", group]) == 0
    assert f"_target_: written_{group}" in capsys.readouterr().out


MISTAKES = [
    (["new", "nrm", "mine"], "nrm is not allowed here: new writes one of norm, "),
    (["new", "data", "mine"], "data is not allowed here: new writes one of "),
    (["new", "norm", "pre_ln"], "norm=pre_ln exists already: choose another name."),
    (["new", "norm", "Mine"], "Mine is not allowed as a name: small letters, digits and _"),
    (["new", "norm", "a-b"], "a-b is not allowed as a name"),
    (["new", "norm", "class"], "class is not allowed as a name"),
    (["new", "norm", "json"], "json is the name of an installed module"),
    (["new", "norm", "torch"], "torch is the name of an installed module"),
    (["check-component", "norm"], "A component is written GROUP=OPTION"),
    (["check-component", "nrm=mine"], "nrm is not a group of options: it is one of norm, "),
    (["check-component", "norm=mine"], "norm=mine is not an option: norm is one of "),
    (["check-component", "norm=pre_ln", "--try", "scale"], "settings key=value"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_nothing_is_written(arguments, words, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and words in err and err.count("\n") == 1 and not list(Path().iterdir())


def test_no_file_is_written_over(capsys):
    Path("test_mine_again.py").write_text("kept")
    assert cli.main(["new", "norm", "mine_again"]) == 2
    assert capsys.readouterr().err == "test_mine_again.py exists already: nothing was written.\n"
    assert [p.name for p in Path().iterdir()] == ["test_mine_again.py"]


HEAD = """import torch
from torch import nn
from albert_ablate.model.placements import PreLN, Site
drawn = torch.Generator()


class Broken(PreLN):
    def __init__(self, site: Site, /, scale: float = 0.5, word: str = "x"):
        super().__init__(site)
        self.scale = scale
"""
BROKEN = {
    "an argument without effect": (
        "        return x + f(self.norm(x))",
        "norm.scale counts (0.5 -> 0.25): norm.scale=0.5 -> 0.25 changes nothing.",
    ),
    "an argument that is not listed": ("        return x + f(self.norm(x))", "its YAML does not list word."),
    "numbers of its own": (
        "        return x + self.scale * f(self.norm(x)) * (1 + 0.1 * torch.rand(1, generator=drawn))",
        "follows its seed: trained twice from one seed, the numbers differ",
    ),
    "a parameter without gradient": ("        return x.detach() * self.scale", "every parameter takes part: "),
    "an error": ("        return x + missing", "NameError: name 'missing' is not defined."),
    "numbers that are not finite": ("        return x + f(self.norm(x)) * torch.inf", "is not finite within 3 steps."),
    "a value that none can guess": (
        "        return x + self.scale * f(x)",
        "not checked  norm.word counts; give it another value to try: --try word=VALUE",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_hold_is_said(name, capsys):
    body, words = BROKEN[name]
    module = f"broken_{list(BROKEN).index(name)}"
    Path("conf/norm").mkdir(parents=True)
    Path(f"{module}.py").write_text(f"{HEAD}\n    def forward(self, x, f):\n{body}\n")
    Path("conf/norm/broken.yaml").write_text(f"_target_: {module}.Broken\n_partial_: true\nscale: 0.5\n")
    assert cli.main(["check-component", "norm=broken", "--config-dir", "conf"]) == 1
    out = capsys.readouterr().out
    assert words in out and out.splitlines()[-1].startswith("norm=broken fails ")


def test_values_to_try_and_settings_may_be_given(capsys):
    given = ["check-component", "clip=norm", "model.layers=3", "clip.max_norm=0.01", "--try", "max_norm=0.001"]
    assert cli.main(given) == 0
    assert "clip.max_norm counts (0.01 -> 0.001)" in capsys.readouterr().out
