"""Conf folders of one's own: found by every way to name them, honoured by compose and by every command."""

import inspect
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from albert_ablate import cli, compose
from albert_ablate.config import ConfigError, check, checked_config, construct, keys_of, options, target_of
from albert_ablate.config.folders import CONF, folders_named, without_folders
from albert_ablate.config.untrusted import refuse_untrusted
from albert_ablate.judge.claims import read_claims
from albert_ablate.records.keys import Keys
from albert_ablate.report.methods import methods
from albert_ablate.studies.sweepfile import read_sweep

pytestmark = pytest.mark.usefixtures("no_folders_named")
ROOT = Path(__file__).parents[2]
MODULE = '''"""Placements."""
from albert_ablate.model.placements import PreLN, Site


class Halved(PreLN):
    """x + scale f(N(x)), half a branch by default (Nobody 2026)."""

    def __init__(self, site: Site, /, scale: float = 0.5):
        super().__init__(site)
        self.scale = scale

    def forward(self, x, f):
        return x + self.scale * f(self.norm(x))
'''
OPTION = "_target_: {module}.Halved\n_partial_: true\nscale: 0.5\n"


@pytest.fixture
def own(tmp_path, request):
    """A folder with conf/norm/halved.yaml and the module it names, whose name no other test has."""
    return made(tmp_path / "own", f"module_{abs(hash(request.node.nodeid))}")


def made(place, module, name="halved"):
    (place / "conf" / "norm").mkdir(parents=True)
    (place / f"{module}.py").write_text(MODULE)
    (place / "conf" / "norm" / f"{name}.yaml").write_text(OPTION.format(module=module))
    return place


def said(capsys, *arguments):
    """The one sentence that a command says, with exit code 2, and writes nothing."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert cli.main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.endswith(".\n"), err
    assert sorted(Path().rglob("*")) == before
    return err.strip()


WAYS = ["argument", "environment", "searchpath", "file", "package", "entry point"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_a_folder_adds_its_options(way, own, tmp_path, monkeypatch):
    conf, overrides, given = own / "conf", ["norm=halved", "model=nano"], {}
    if way == "argument":
        given = {"config_dir": conf}
    elif way == "environment":
        other = made(tmp_path / "other", "module_other", "also_halved")
        monkeypatch.setenv(CONF, os.pathsep.join([str(other / "conf"), str(conf)]))
        assert {"halved", "also_halved"} < set(options()["norm"])
    elif way == "searchpath":
        overrides.append(f"hydra.searchpath=[{conf}]")
    elif way == "file":
        overrides.append(f"hydra.searchpath=['file://{conf}']")
    else:
        (own / "__init__.py").touch()
        module = next(own.glob("module_*.py"))
        (conf / "norm" / "halved.yaml").write_text(OPTION.format(module=f"own.{module.stem}"))
        monkeypatch.syspath_prepend(str(tmp_path))
        if way == "package":
            overrides.append("hydra.searchpath=[pkg://own.conf]")
        else:
            about = tmp_path / "own-1.0.dist-info"
            about.mkdir()
            (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
            (about / "entry_points.txt").write_text("[albert_ablate.conf]\nmine = own.conf\n")
    cfg = compose(overrides, **given)
    assert cfg.choices.norm == "halved" and cfg.norm.scale == 0.5
    assert construct(check(cfg).norm).func.__name__ == "Halved"
    assert keys_of(check(cfg)).arm != keys_of(checked_config(["model=nano"])).arm


def test_the_packages_own_options_are_as_they_were(own):
    before = compose(["norm=rezero"])
    with folders_named([own / "conf"]):
        assert compose(["norm=rezero"]) == before
        assert keys_of(checked_config(["norm=rezero"])) == keys_of(check(before))
    assert "halved" not in options()["norm"] and CONF not in os.environ


def test_an_option_that_is_added_or_removed_counts_at_once(own):
    with folders_named([own / "conf"]):
        folder = own / "conf" / "norm"
        for name in ("later", "latest"):
            assert name not in options()["norm"]
            (folder / f"{name}.yaml").write_text((folder / "halved.yaml").read_text())
            assert name in options()["norm"]
        os.utime(folder, (1, 1))  # as if nothing had changed for long
        assert "later" in options()["norm"]
        (folder / "later.yaml").unlink()
        assert "later" not in options()["norm"]


def test_every_command_takes_the_option():
    for name, command in get_command(cli.app).commands.items():
        if name != "run":  # whose flags are Hydra's
            assert "--config-dir" in [o for p in command.params for o in p.opts], name


def test_a_command_knows_the_folder_and_forgets_it(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    conf = str(own / "conf")
    study = {"method": "grid", "parameters": {"norm": {"values": ["halved", "pre_ln"]}, "seed": {"values": [0]}}}
    small = {"model": "nano", "data": "markov", "data.length": 20_000, "budget.tokens": 1024}
    study["parameters"] |= {key: {"value": value} for key, value in small.items()}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    for more in (["--config-dir", conf], [f"--config-dir={conf}"], [f"hydra.searchpath=[{conf}]"]):
        assert cli.main(["sweep", "study.yaml", "--dry-run", *more, f"paths.cache={tmp_path}"]) == 0
        assert "norm=halved" in capsys.readouterr().out
    assert "norm=halved is not an option" in said(capsys, "sweep", "study.yaml", "--dry-run")


def test_compare_takes_the_folder_in_every_form(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    conf, sides = f"{own}/conf", ["norm=halved", "norm=pre_ln"]
    asked = []

    def answer(question, work):
        asked.append((question.sides, question.common, "halved" in options()["norm"]))
        raise ConfigError("Enough.")

    monkeypatch.setattr("albert_ablate.referee.compare.compare", answer)
    searched = f"hydra.searchpath=[{conf}]"
    for more in ([*sides, "--config-dir", conf], [f"norm=halved {searched}", "norm=pre_ln"]):
        assert cli.main(["compare", *more, "--common", "model=nano"]) == 2
    assert cli.main(["compare", *sides, "--common", f"model=nano {searched}"]) == 2
    assert asked == [(("norm=halved", "norm=pre_ln"), ("model=nano",), True)] * 3


def test_a_run_takes_the_folder_as_hydra_spells_it(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given in (["--config-dir", "own/conf"], ["-cd", "own/conf"], ["hydra.searchpath=[own/conf]"]):
        assert cli.main(["run", *given, "norm=halved", "--cfg", "job", "--package", "norm"]) == 0
        assert "scale: 0.5" in capsys.readouterr().out
        assert cli.main(["run", *given, "--help"]) == 0
        assert f"Of your own: norm=halved ({tmp_path}/own/conf)" in capsys.readouterr().out
    assert "norm=halved is not an option" in said(capsys, "run", "norm=halved")


def test_methods_say_where_an_option_comes_from(own, capsys):
    assert cli.main(["methods", "norm", "--json", "--config-dir", str(own / "conf")]) == 0
    found = {m["option"]: m for m in json.loads(capsys.readouterr().out)["methods"]}
    assert found["halved"]["formula"] == "x + scale f(N(x)), half a branch by default"
    assert found["halved"]["sources"] == [{"authors": "Nobody", "year": "2026", "arxiv": None}]
    assert found["halved"]["file"] == str(own / "conf" / "norm" / "halved.yaml")
    assert found["pre_ln"]["file"] is None
    with folders_named([own / "conf"]):
        assert {m.option for m in methods("norm")} == set(found)
    assert next(own.glob("module_*.py")).stem not in sys.modules  # read, not run


def test_kept_keys_count_only_for_the_code_they_are_of(own, tmp_path):
    (tmp_path / "runs").mkdir()
    overrides = [["norm=halved", "model=nano"]]
    with folders_named([own / "conf"]):
        kept = Keys(tmp_path / "runs")
        (first,) = kept.of_overrides(overrides)
        kept.save()
        assert first and Keys(tmp_path / "runs").lines
        module = next(own.glob("module_*.py"))
        module.write_text(module.read_text() + "\n\nMORE = 1\n")
        assert not Keys(tmp_path / "runs").lines
    assert not Keys(tmp_path / "runs").lines


def test_a_target_counts_only_while_its_folder_is_named(own):
    node = yaml.safe_load((own / "conf" / "norm" / "halved.yaml").read_text())
    with pytest.raises(ConfigError, match="is not a component of this package: for one of your own name its conf"):
        target_of(node["_target_"])
    with folders_named([own / "conf"]):
        assert inspect.isclass(target_of(node["_target_"]))
        module = node["_target_"].rpartition(".")[0]
        with pytest.raises(ConfigError, match="is not a component of this package"):  # no option names it
            target_of(f"{module}.PreLN")
        with pytest.raises(ConfigError, match="is not a component"):
            compose([f"clip._target_={module}.PreLN"])
    with pytest.raises(ConfigError, match="is not a component"):
        target_of(node["_target_"])


def test_a_server_may_choose_an_option_and_name_no_folder(own, monkeypatch, capsys):
    refuse_untrusted(["norm=halved"])
    for given in (f"hydra.searchpath=[{own}/conf]", f"--config-dir={own}/conf", "norm._target_=os.system"):
        with pytest.raises(ConfigError):
            refuse_untrusted([given])
    monkeypatch.setenv("WANDB_SWEEP_ID", "a-sweep")
    for given in (f"--config-dir={own}/conf", f"hydra.searchpath=[{own}/conf]"):
        assert "is not allowed from a sweep" in said(capsys, "run", "norm=halved", given)
    own_file = own / "study.yaml"
    own_file.write_text("method: grid\nparameters:\n  norm: {values: [halved, pre_ln]}\n  seed: {value: 0}\n")
    with folders_named([own / "conf"]):
        assert [s["norm"] for s in read_sweep(own_file).settings()] == ["halved", "pre_ln"]


def test_a_claims_file_names_no_folder(own, tmp_path):
    tree = yaml.safe_load((ROOT / "sweeps" / "claims.yaml").read_text())
    next(iter(tree["arms"].values())).append(f"hydra.searchpath=[{own}/conf]")
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="is not allowed: a folder of options is named by --config-dir DIR"):
        read_claims(tmp_path / "claims.yaml")


def test_the_search_path_is_read_as_hydra_reads_it():
    given = ["seed=1", "--config-dir", "a", "-cd=b", "hydra.searchpath=[c,file:///d]", "+hydra.searchpath='e f'"]
    assert without_folders(given) == (["seed=1"], ["a", "b", "c", "/d", "e f"])


BAD = [
    (["--config-dir", "nowhere"], "--config-dir=nowhere is not a folder."),
    (["hydra.searchpath=[nowhere]"], "--config-dir=nowhere is not a folder."),
    (["hydra.searchpath=[pkg://no.such.package]"], "there is no package no.such.package."),
    (["hydra.searchpath=[http://x]"], "a place is DIR, file://DIR or pkg://PACKAGE."),
    (["hydra.searchpath=3"], "hydra.searchpath=3 is not allowed: it holds folders, hydra.searchpath=[DIR]."),
    (["--config-dir"], "--config-dir needs a folder: --config-dir DIR."),
]


@pytest.mark.parametrize(("given", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_a_folder_that_is_not_there_is_one_sentence(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in said(capsys, "run", *given)
    monkeypatch.setenv(CONF, "/no/such/folder")
    assert said(capsys, "methods") == f"{CONF}=/no/such/folder is not a folder."


OPTIONS = {
    "a class that is not there": ("_target_: MODULE.Halfed\n", "MODULE.Halfed cannot be imported: "),
    "a module that is not there": ("_target_: no_such_module.X\n", "no_such_module.X cannot be imported: No module"),
    "no class": ("scale: 0.5\n", "halved.yaml does not name a class: it needs a line _target_: module.Class."),
    "nothing": ("", "halved.yaml is not an option: it holds key: value lines."),
    "no YAML": ("a: b: c\n", "halved.yaml cannot be read as YAML: line 1, column 5: "),
    "an argument it lacks": (OPTION + "more: 1\n", "norm.more=1 is unknown: norm=halved takes scale"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option_is_one_sentence_in_every_command(name, own, monkeypatch, capsys):
    content, words = OPTIONS[name]
    module = next(own.glob("module_*.py")).stem
    content, words = content.replace("{module}", "MODULE").replace("MODULE", module), words.replace("MODULE", module)
    (own / "conf" / "norm" / "halved.yaml").write_text(content)
    monkeypatch.chdir(own)
    Path("study.yaml").write_text("method: grid\nparameters:\n  norm: {values: [halved]}\n")
    small = ["model=nano", "data=markov", "data.length=20_000"]
    assert words in said(capsys, "run", "--config-dir", "conf", "norm=halved", *small)
    assert words in said(capsys, "sweep", "study.yaml", "--config-dir", "conf", *small)
    assert words in said(capsys, "compare", "norm=halved", "norm=pre_ln", "--config-dir", "conf")


BROKEN = {
    "1 / 0\n": "division by zero (MODULE.py, line 1).",
    "def f(:\n": "invalid syntax (MODULE.py, line 1).",
    "import sys\nsys.exit(3)\n": "cannot be imported: 3 (MODULE.py, line 2).",
    "import no_such_module\n": "No module named 'no_such_module' (MODULE.py, line 1).",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_module_that_breaks_is_one_sentence_with_its_line(content, own, monkeypatch, capsys):
    module = next(own.glob("module_*.py"))
    module.write_text(content)
    monkeypatch.chdir(own)
    words = said(capsys, "run", "--config-dir", "conf", "norm=halved")
    assert words.startswith(f"{own}/conf/norm/halved.yaml: _target_={module.stem}.Halved cannot be imported: ")
    assert words.endswith(BROKEN[content].replace("MODULE", module.stem))
    assert "Traceback" not in words and cli.main(["run", "--config-dir", "conf", "--help"]) == 0  # others can be had


def test_two_options_of_one_name_are_refused(own, tmp_path, monkeypatch, capsys):
    other = made(tmp_path / "other", "module_second")
    monkeypatch.setenv(CONF, os.pathsep.join([str(own / "conf"), str(other / "conf")]))
    both = f"norm=halved is defined in two folders, {own}/conf/norm and {other}/conf/norm: give one of the two files"
    for command in (["methods"], ["run", "norm=pre_ln"], ["compare", "norm=pre_ln", "norm=rezero"]):
        assert both in said(capsys, *command)
    monkeypatch.setenv(CONF, f"{own}/conf")
    (own / "conf" / "norm" / "halved.yaml").rename(own / "conf" / "norm" / "pre_ln.yaml")
    assert f"norm=pre_ln is defined in two folders, {ROOT}/conf/norm and {own}/conf/norm" in said(capsys, "run")


def test_a_folder_that_is_no_group_is_refused(own, monkeypatch, capsys):
    (own / "conf" / "norm").rename(own / "conf" / "norms")
    monkeypatch.setenv(CONF, f"{own}/conf")
    assert said(capsys, "methods").startswith(f"{own}/conf/norms holds options of no group: the nearest are norm, ")


def test_a_folder_named_twice_counts_once(own, monkeypatch):
    monkeypatch.setenv(CONF, os.pathsep.join([f"{own}/conf", f"{own}/conf/", f"{own}/../own/conf"]))
    assert "halved" in options()["norm"] and compose(["norm=halved"]).norm.scale == 0.5
