"""The command `albert-ablate`, and `methods`: the list of what can be varied equals what is on disk."""

import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from published import published
from typer.main import get_command

from albert_ablate import cli
from albert_ablate.analysis.registry import MEASURES
from albert_ablate.cli_help import EXAMPLES, panel_of
from albert_ablate.config import ConfigError, options, target_of, unwritable
from albert_ablate.judge import ledger as judge
from albert_ablate.records import checked
from albert_ablate.records.json_output import NO_BARS
from albert_ablate.report import files
from albert_ablate.report import methods as listed
from albert_ablate.report.methods import attribute, docstring, formula_of, methods, sources_of

ROOT = Path(__file__).parent.parent
ALL = methods()
HEAVY = "{'torch', 'hydra', 'omegaconf', 'pytorch_lightning', 'numpy', 'pandas', 'wandb', 'pyarrow'}"


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["sync", "--help"]])
def test_help_and_the_list_of_methods_load_nothing_heavy(arguments):
    script = f"import sys; from albert_ablate.cli import main; code = main({arguments}); print('HEAVY', code, "
    script += f"sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "HEAVY 0 []" and not done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["synk"], "No such command 'synk'"),
        (["sync"], "runs does not exist."),
        (["sync", "."], ". holds no runs: runs lie in ./<setting>/seed<N>/."),
        *(
            ([name, "nowhere"], "nowhere does not exist")
            for name in ("status", "report", "show", "evaluate", "generate")
        ),
        (["judge", "albert_agpt", "--runs", "nowhere"], "nowhere does not exist: --run trains them"),
        (["status", "one"], "one is one run, not a folder of runs: `albert-ablate show` draws it"),
        (["methods", "--jsn"], "No such option"),
        (["methods", "nrm"], "nrm is not a group of options: there are norm"),
        (["methods", "norm", "--plot", "x.png"], "--plot draws dropout and norm"),
        (["methods", "--plot", "x.jpg"], "its name must end in .png, .svg or .html"),
        (["methods", "--plot", "nowhere/x.png"], "there is no folder nowhere"),
        (["judge", "sweep.yaml"], "this is a sweep file, not a file of claims: `albert-ablate sweep` takes it"),
        (["sweep", "claims.yaml"], "this is a file of claims, not a sweep file: `albert-ablate judge` takes it"),
        (["status", "runs", "--sweep", "claims.yaml"], "`albert-ablate judge` takes it"),
        (["sweep", "torn.yaml"], "torn.yaml cannot be read as YAML: line 3, column 7: "),
        (["judge", "torn.yaml"], "torn.yaml cannot be read as YAML: line 3, column 7: "),
        (["sweep", "latin.yaml"], "latin.yaml cannot be read: byte 3 is not UTF-8 text"),
        (["sweep", "sweep.yaml", "hydra/launcher=jobl"], "hydra/launcher=jobl does not exist: it must be one of basic"),
        (["sweep", "sweep.yaml", "hydra.launcher.nothing=1"], "Key 'nothing' not in"),
        *(
            (
                [name, file, "--runs", "x/${oc.env:HOME}"],
                "x/${oc.env:HOME} is not allowed as the folder of runs: a folder's name may",
            )
            for name, file in [("sweep", "sweep.yaml"), ("tune", "sweep.yaml"), ("calibrate", "sweep.yaml")]
            + [("agent", "e/p/s"), ("judge", "claims.yaml")]
        ),
        *(([name, "x" * 5000], "File name too long") for name in ("status", "sync", "evaluate", "show", "report")),
        (["report", "one"], "one is one run, not a folder of runs: `albert-ablate show` draws it"),
        (["show", "."], "a run in it is one, and `albert-ablate report` takes all of them"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text("method: grid\nparameters:\n  seed: {value: 0}\n")
    (tmp_path / "claims.yaml").write_text("arms: {}\nregimes: {}\nclaims: {}\n")
    (tmp_path / "torn.yaml").write_text("method: grid\na:\n  b: c: d\n")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4\n")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "record.json").write_text("null")
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and "\n" not in said and said.endswith((".", "?"))


def test_a_later_failure_is_one_sentence_and_exit_code_1(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("The server is gone.")

    monkeypatch.setattr(listed, "show_methods", broken)
    assert cli.main(["methods"]) == 1 and capsys.readouterr().err == "The server is gone.\n"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 1), (errno.EMFILE, 1), (errno.EROFS, 2), (errno.EACCES, 2)]
)
def test_a_full_or_read_only_disk_is_one_sentence(number, code, monkeypatch, capsys, tmp_path):
    """Exit code 1 where the machine has no room, 2 where the place is the user's mistake; in every command."""
    why = os.strerror(number)

    def broken(*args):
        raise OSError(number, why, "runs/x")

    monkeypatch.setattr(listed, "show_methods", broken)
    assert cli.main(["methods"]) == code and capsys.readouterr().err == f"runs/x: {why}.\n"
    for module, write in (
        (checked, lambda: judge.write_ledger({}, tmp_path / "x")),
        (files, lambda: files.replace("x", b"")),
    ):
        monkeypatch.setattr(module, "replace_file", broken)
        with pytest.raises(RuntimeError if code == 1 else ConfigError, match=f"cannot be written: {why}"):
            write()
    assert str(unwritable("x", OSError("no reason"))) == "x cannot be written: no reason."


def test_the_list_is_what_is_on_disk():
    found: dict[str, list[str]] = {}
    for m in ALL:
        found.setdefault(m.kind, []).append(m.option)
    assert found == options()


def test_the_table_of_options_is_what_is_on_disk():
    section = (ROOT / "docs" / "options.md").read_text().split("\n## ")[0]
    found: dict[str, list[str]] = {}
    group = ""
    for line in section.splitlines():
        cells = [c.strip() for c in line.strip("| ").split(" | ")] if line.startswith("|") else []
        if line.startswith("| |"):  # goes on with the group above
            cells = [group, *[c.strip() for c in line[3:].strip("| ").split(" | ")]]
        if len(cells) >= 2 and "`" in cells[1]:
            group = cells[0].strip("`")
            found.setdefault(group, []).extend(re.findall(r"`([^`]+)`", cells[1]))
    wanted = {k: v for k, v in options().items() if k not in ("evaluation", "loss") or k in found}
    assert {k: sorted(v) for k, v in found.items()} == wanted


@pytest.mark.parametrize(
    "m", [m for m in ALL if m.kind not in ("trainer", "evaluation", "recipe")], ids=lambda m: m.option
)
def test_each_option_has_its_formula_read_without_importing_it(m):
    assert m.formula and "\n" not in m.formula and len(m.formula) < 400


@pytest.mark.parametrize("m", methods("data"), ids=lambda m: m.option)
def test_each_corpus_says_its_license_and_where_it_comes_from(m):
    import yaml

    assert m.license and m.origin
    target = target_of(yaml.safe_load((ROOT / "conf" / "data" / f"{m.option}.yaml").read_text())["_target_"])
    assert (m.license, m.origin) == (target.LICENSE, target.ORIGIN)  # what was read is what the class has
    package = getattr(target, "PACKAGE", None)
    assert package is None or m.origin.endswith(package)


def test_docstrings_read_are_those_python_has():
    import inspect

    import yaml

    for m in ALL:
        node = yaml.safe_load((ROOT / "conf" / m.kind / f"{m.option}.yaml").read_text())
        if "_target_" in node and node["_target_"].startswith("albert_ablate."):
            assert docstring(node["_target_"]) == inspect.getdoc(target_of(node["_target_"])), m.option
    assert attribute("albert_ablate.data.synthetic.Markov", "LICENSE")  # of a base class
    assert attribute("albert_ablate.data.synthetic.Markov", "NOTHING") is None and docstring("torch.nn.Linear") == ""


def test_formula_and_sources_are_told_apart():
    text = """N(alpha x + f(x)), alpha = (2M)^(1/4), no final norm (Wang et al. 2022, 2203.00555).

    In 2021 as Baevski and Auli 2018, 1809.10853, and Shannon 1948 had it (Gemma 2: Gemma Team 2024, 2408.00118; BLOOM:
    Le Scao et al. 2022).
    """
    assert formula_of(text) == "N(alpha x + f(x)), alpha = (2M)^(1/4), no final norm"
    assert [tuple(s.values()) for s in sources_of(text)] == [
        ("Wang et al.", "2022", "2203.00555"),
        ("Baevski and Auli", "2018", "1809.10853"),
        ("Shannon", "1948", None),
        ("Gemma Team", "2024", "2408.00118"),
        ("Le Scao et al.", "2022", None),
    ]


def test_methods_as_json_and_as_a_table(capsys):
    assert cli.main(["methods", "norm", "--json"]) == 0
    found = {m["option"]: m for m in published(capsys.readouterr().out, "methods")["methods"]}
    assert found["pre_ln"]["formula"] == "x + f(N(x)), with a final norm"
    assert {"authors": "Xiong et al.", "year": "2020", "arxiv": "2002.04745"} in found["pre_ln"]["sources"]
    assert cli.main(["methods", "--json"]) == 0
    everything = published(capsys.readouterr().out, "methods")["methods"]
    assert {m["kind"] for m in everything} == set(options())
    assert cli.main(["methods", "clip"]) == 0
    table = capsys.readouterr().out
    assert "max_norm=1.0" in table and "Brock et al. 2021, 2102.06171" in table and "layer_norm" not in table
    assert cli.main(["methods", "optimizer"]) == 0
    assert "betas=[0.9,0.95]" in (table := capsys.readouterr().out) and '"' not in table  # as the command line takes it
    calibration = next(m for m in methods("evaluation") if m.option == "calibration")
    assert "sum_b n_b / n" in calibration.formula and calibration.defaults == {"bins": 15, "tokens": 8192}


@pytest.fixture(scope="module")
def few():
    """Profiles of a few options on a small scale."""
    from albert_ablate.report import profiles

    with pytest.MonkeyPatch.context() as patch:
        known = options()
        patch.setattr(profiles, "options", lambda: {**known, "norm": ["none", "post_ln", "pre_ln", "rezero"]})
        patch.setattr(profiles, "LAYERS", 12)
        return profiles.dropouts(), profiles.placements()


def test_profiles_show_what_the_papers_say(few):
    (dropout, left), (norm, out) = few
    assert not left and not out
    depth = dropout[dropout["over"] == "depth"].groupby("option")["value"]
    assert depth.mean()["depth_decay"] == pytest.approx(0.1) == depth.mean()["uniform"]
    assert depth.first()["depth_decay"] == pytest.approx(0.2) and depth.last()["depth_decay"] == pytest.approx(0)
    variance = norm[norm["over"] == "variance"].set_index(["option", "x"])["value"]
    assert variance["post_ln"].to_numpy() == pytest.approx(1, rel=0.01)  # it is what a norm has just made
    assert variance["rezero"].std() == pytest.approx(0, abs=1e-12)  # a = 0: each block is the identity
    assert 3 < variance["pre_ln", 12] / variance["pre_ln", 1] < 12  # grows like the number of branches added
    assert variance["none", 12] > 1e4
    gradient = norm[norm["over"] == "gradient"].set_index(["option", "x"])["value"]
    assert gradient["pre_ln", 1] > gradient["pre_ln", 12] > 0


@pytest.mark.parametrize("kind", ["svg", pytest.param("png", marks=pytest.mark.slow)])
def test_the_picture_is_drawn(few, tmp_path, kind, monkeypatch):
    pytest.importorskip("vl_convert", reason="pip install 'albert_ablate[plot]'")
    from albert_ablate.report import profiles

    monkeypatch.setattr(profiles, "dropouts", lambda: few[0])
    monkeypatch.setattr(profiles, "placements", lambda: few[1])
    assert profiles.draw(tmp_path / f"x.{kind}") == []
    content = (tmp_path / f"x.{kind}").read_bytes()
    assert content.startswith(b"\x89PNG") if kind == "png" else b"depth_decay" in content and b"post_ln" in content


def test_measures_are_listed_as_the_registry_has_them(capsys):
    assert cli.main(["measures", "--json"]) == 0
    found = {m["name"]: m for m in published(capsys.readouterr().out, "measures")["measures"]}
    assert set(found) == set(MEASURES)
    assert [m["name"] for m in found.values() if not m["text"]] == []
    assert found["accuracy"]["better"] == "higher" and found["sharpness"]["evaluation"] == "sharpness"
    assert cli.main(["measures", "gradient"]) == 0
    shown = capsys.readouterr().out
    assert "grad_norm" in shown and "test_loss" not in shown
    assert cli.main(["measures", "bleu"]) == 2 and "No measure has 'bleu'" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted({*get_command(cli.app).commands}))
def test_help_has_a_group_and_two_examples_that_parse(name, capsys):
    assert panel_of(name) != "Commands" and name in EXAMPLES
    examples, following = EXAMPLES[name]
    assert len(examples) == 2 and following.endswith(".")
    for line in examples:
        _, command, *words = shlex.split(line)
        assert command == name
        if name != "run":  # whose arguments are Hydra's
            get_command(cli.app).commands[name].make_context(name, words).close()
    if name != "run":
        assert cli.main([name, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert all(" ".join(line.split()[:3]) in shown for line in examples)


@pytest.mark.process
def test_quiet_prints_nothing_but_errors(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv(NO_BARS, "")
    (tmp_path / "runs").mkdir()
    assert cli.main(["sweep", "smoke", "--dry-run", "-q", "--runs", str(tmp_path / "runs")]) == 0
    assert capfd.readouterr().out == ""
    assert cli.main(["sweep", str(tmp_path / "gone.yaml"), "-q"]) == 2
    assert "gone.yaml cannot be read" in capfd.readouterr().err
