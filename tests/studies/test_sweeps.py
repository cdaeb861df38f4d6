"""Sweep files: W&B's format read without W&B, the shipped files, and what a sweep may decide."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from albert_ablate.cli import main as cli
from albert_ablate.config import ConfigError, compose, conf_folder, keys_of, option_keys, options, parameters_of, quoted
from albert_ablate.config.untrusted import as_settings, refuse_untrusted
from albert_ablate.records import keys as kept_keys
from albert_ablate.records.keys import Keys
from albert_ablate.studies.distributions import CONTINUOUS, QUANTIZED, Parameter
from albert_ablate.studies.planned_runs import plan_random
from albert_ablate.studies.status import arms
from albert_ablate.studies.sweep_settings import overrides_of, own_overrides, run_overrides, varied_labels
from albert_ablate.studies.sweepfile import ARGUMENTS, read_sweep, served_sweep
from albert_ablate.studies.wandb_agent.agent import _setting
from albert_ablate.training.main import without_lacking

FILES = sorted(f for f in (Path(__file__).parents[2] / "sweeps").glob("*.yaml") if f.stem != "claims")
COMMAND = 'command: ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]\n'


def write(tmp_path, text, command=COMMAND):
    file = tmp_path / "x.yaml"
    file.write_text(text + command)
    return file


def grid(**parameters):
    lines = [f"  {key.replace('__', '.')}: {spec}\n" for key, spec in parameters.items()]
    return "method: grid\nparameters:\n" + "".join(lines)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_value_of_a_shipped_sweep_composes(file):
    """Each value of each parameter, with the others at their first; each key is then one that `check` knows."""
    sweep = read_sweep(file)
    settings = sweep.settings()
    first = {p.name: p.values[0] for p in sweep.parameters}
    assert settings[0] == first and len(settings) == len({str(s) for s in settings}) >= 4
    tried = [first] + [first | {p.name: v} for p in sweep.parameters if p.name != "seed" for v in p.values[1:]]
    for setting in tried:
        cfg = compose([*sweep.fixed, *overrides_of(setting)])
        for key, value in setting.items():
            node = cfg.choices if key in cfg.choices else cfg
            for part in key.split("."):
                node = node[part]
            assert node == value, key


def test_the_sweeps_that_ship_are_those_that_are_promised():
    promised = {"norm_depth", "dropout_shape", "optimizer_clip", "lr_sensitivity", "albert_factorial", "smoke"}
    assert {f.stem for f in FILES} >= promised


def test_a_grid_is_the_product_with_seeds_outermost_and_a_cap(tmp_path):
    text = grid(norm="{values: [pre_ln, post_ln]}", seed="{values: [0, 1]}", model__layers="{value: 3}")
    expected = [["seed=0", "norm=pre_ln"], ["seed=0", "norm=post_ln"], ["seed=1", "norm=pre_ln"]]
    expected.append(["seed=1", "norm=post_ln"])
    found = [overrides_of(s) for s in read_sweep(write(tmp_path, text)).settings()]
    assert found == [[*e, "model.layers=3"] for e in expected]
    found = [overrides_of(s) for s in read_sweep(write(tmp_path, text + "run_cap: 3\n")).settings()]
    assert found == [[*e, "model.layers=3"] for e in expected[:3]]


def test_a_grid_of_a_range_has_wandbs_values_to_the_bit(tmp_path):
    """As wandb's own sweeps/grid_search.py: int_uniform with both ends, q_uniform by arange and without its end."""
    text = grid(seed="{min: 0, max: 3}", optimizer__lr="{distribution: q_uniform, min: 0.1, max: 0.5, q: 0.1}")
    seed, rate = read_sweep(write(tmp_path, text)).parameters
    assert seed.values == (0, 1, 2, 3) and rate.values == (0.1, 0.2, 0.30000000000000004, 0.4)
    text = grid(model__layers="{distribution: q_uniform, min: 2, max: 8, q: 2}")
    (layers,) = read_sweep(write(tmp_path, text)).parameters
    assert layers.values == (2, 4, 6) and all(isinstance(v, int) for v in layers.values)


def test_a_text_of_any_characters_arrives_unchanged(tmp_path):
    """Of one's own file; from a server texts are no paths."""
    texts = ["/a b/it's {here}, $x.txt", "ü\\'[1]", "C:\\x\\", "choice(a,b)", "a=b"]
    text = grid(data="{value: text_files}", data__path=f"{{values: {json.dumps(texts)}}}")
    settings = read_sweep(write(tmp_path, text)).settings()
    assert [compose(overrides_of(s)).data.path for s in settings] == texts
    folder = tmp_path / "it's {a} folder, ü"
    assert compose([f"paths.runs={quoted(str(folder))}"]).paths.runs == str(folder)


def test_values_are_written_as_the_command_reads_them(tmp_path):
    text = grid(
        optimizer__lr="{values: [1e-3, 2.0e-3, '5E-4']}",
        model__tied="{value: true}",
        dropout__sites="{value: [embedding, residual]}",
    )
    sweep = read_sweep(write(tmp_path, text))
    assert [s["optimizer.lr"] for s in sweep.settings()] == [0.001, 0.002, 0.0005]
    assert overrides_of(sweep.settings()[0]) == [
        "optimizer.lr=0.001",
        "model.tied=true",
        "dropout.sites=[embedding,residual]",
    ]
    cfg = compose([*overrides_of(sweep.settings()[0]), "dropout=uniform"])
    assert cfg.optimizer.lr == 0.001 and cfg.model.tied is True and cfg.dropout.sites == ["embedding", "residual"]


def test_what_the_command_fixes_holds_for_every_run(tmp_path):
    command = "command: [python, run.py, model=nano, data=markov, '${args_no_hyphens}']\n"
    assert read_sweep(write(tmp_path, grid(seed="{values: [0, 1]}"), command)).fixed == ("model=nano", "data=markov")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "program: path/to/run.py\n",
        "command: ['${env}', '${interpreter}', '${program}', '${args}']\n",
        "command: [uv, run, --no-sync, /opt/python3.12, ./run.py, '${args_override_hydra}']\n",
        "command: ['${envvar:PYTHON}', run.py, '${args_append_hydra}']\n",
    ],
)
def test_any_interpreter_or_no_command_is_accepted(command, tmp_path):
    sweep = read_sweep(write(tmp_path, grid(seed="{values: [0, 1]}"), command))
    assert sweep.fixed == () and sweep.settings() == [{"seed": 0}, {"seed": 1}]


def test_null_and_nested_parameters_are_read_as_w_and_b_has_them(tmp_path):
    text = grid(optimizer="{parameters: {lr: {values: [1.0e-3, 2.0e-3]}, eps: {value: 1.0e-8}}}")
    found = read_sweep(write(tmp_path, text + "  data.train_size: {values: [null, 9000]}\n")).settings()
    same = [
        {"optimizer.lr": lr, "optimizer.eps": 1e-8, "data.train_size": n} for lr in (1e-3, 2e-3) for n in (None, 9000)
    ]
    assert found == same
    cfg = compose(overrides_of(found[0]))
    assert cfg.data.train_size is None and cfg.optimizer.lr == 1e-3
    served = served_sweep(
        "e/p/s", {"method": "grid", "parameters": {"optimizer": {"parameters": {"lr": {"value": 1}}}}}
    )
    assert served.settings() == [{"optimizer.lr": 1}]
    assert _setting({"optimizer": {"value": {"lr": 0.1, "eps": None}}}) == {"optimizer.lr": 0.1, "optimizer.eps": None}


def test_the_arguments_of_each_of_wandbs_forms_are_read_alike():
    """The forms are written by wandb itself."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    values = {"norm": "pre_ln", "optimizer": {"lr": 0.001, "nested": {"a": True}}, "data.train_size": None}
    args = {key: {"value": value} for key, value in values.items()}
    written = utils.create_sweep_command_args({"args": args})
    expected = ["norm=pre_ln", "optimizer.lr=0.001", "optimizer.nested.a=True", "data.train_size=null"]
    for macro in ARGUMENTS:
        assert as_settings(written[macro[2:-1]]) == expected, macro
    refuse_untrusted(expected)
    for hostile in ("--config-dir=x", "a={'b': {'_target_': 'os.system'}}", "a={1: 2}", "a=" + "{" * 900, "--multirun"):
        with pytest.raises(ConfigError, match="is not allowed from a sweep"):
            refuse_untrusted(as_settings([hostile]))


def test_a_number_of_some_options_folds_equal_combinations(tmp_path):
    text = grid(
        dropout="{values: [none, uniform, huang]}", dropout__mean="{values: [0.1, 0.2]}", seed="{values: [0, 1]}"
    )
    sweep = read_sweep(write(tmp_path, text))
    one = [{"dropout": "none"}, *({"dropout": d, "dropout.mean": m} for d in ("uniform", "huang") for m in (0.1, 0.2))]
    expected = [{"seed": seed, **setting} for seed in (0, 1) for setting in one]
    assert sweep.settings() == expected and sweep.repeated == 2
    assert [*varied_labels(sweep, expected[:2])] == ["dropout=none", "dropout=uniform dropout.mean=0.1"]
    for setting in expected[:5]:
        compose(overrides_of(setting))
    assert len(read_sweep(write(tmp_path, text + "run_cap: 7\n")).settings()) == 7
    alone = grid(dropout="{value: none}", dropout__mean="{values: [0.1, 0.2]}")  # no option of the file has it
    assert len(read_sweep(write(tmp_path, alone)).settings()) == 2
    assert without_lacking(["dropout=none", "dropout.mean=0.1", "seed=1"]) == ["dropout=none", "seed=1"]
    assert without_lacking(["dropout=uniform", "dropout.mean=0.1"]) == ["dropout=uniform", "dropout.mean=0.1"]


def test_the_keys_of_an_option_are_those_that_its_target_takes():
    """No key is left out of a run that would count there: by the signatures."""
    for group in options():
        known = option_keys(group)
        named = set().union(*known.values())
        for name, keys in known.items():
            node = yaml.safe_load((conf_folder() / group / f"{name}.yaml").read_text())
            assert keys == named & parameters_of(node["_target_"]).keys(), (group, name)


def test_a_key_given_twice_is_said_and_the_last_counts(tmp_path, capsys):
    assert own_overrides(["seed=1", "+model=nano", "seed=2", "model=nano"]) == ["seed=2", "model=nano"]
    assert capsys.readouterr().err.splitlines() == [
        "seed is given twice on the command line: seed=2 counts.",
        "model is given twice on the command line: model=nano counts.",
    ]
    with pytest.raises(ConfigError, match="paths.runs=x is not allowed: name the folder of runs by --runs"):
        own_overrides(["++paths.runs=x"])


RANDOM = (
    "method: random\nrun_cap: {cap}\nparameters:\n"
    "  optimizer.lr: {{distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}}\n"
)


def test_random_draws_are_the_same_each_time_and_more_only_add(tmp_path):
    few = read_sweep(write(tmp_path, RANDOM.format(cap=5))).settings()
    more = read_sweep(write(tmp_path, RANDOM.format(cap=9) + "  seed: {values: [0, 1, 2]}\n")).settings()
    assert [s["optimizer.lr"] for s in more[:5]] == [s["optimizer.lr"] for s in few]
    assert len({s["optimizer.lr"] for s in more}) == 9
    many = [s["optimizer.lr"] for s in read_sweep(write(tmp_path, RANDOM.format(cap=2000))).settings()]
    assert 1e-4 < min(many) and max(many) < 1e-2
    assert np.quantile(np.log10(many), [0.25, 0.5, 0.75]) == pytest.approx([-3.5, -3, -2.5], abs=0.07)


LAWS = [  # distribution, arguments, the law by scipy: its name and arguments, and what is done to its value
    ("uniform", {"min": -1.0, "max": 3.0}, ("uniform", (-1, 4)), lambda x: x),
    ("log_uniform", {"min": -5.0, "max": 2.0}, ("uniform", (-5, 7)), np.exp),
    ("log_uniform_values", {"min": 1e-4, "max": 0.1}, ("loguniform", (1e-4, 0.1)), lambda x: x),
    ("inv_log_uniform", {"min": 2.0, "max": 6.0}, ("loguniform", (np.exp(-6), np.exp(-2))), lambda x: x),
    ("inv_log_uniform_values", {"min": 1e-4, "max": 0.1}, ("loguniform", (1e-4, 0.1)), lambda x: x),
    ("normal", {"mu": 2.0, "sigma": 0.5}, ("norm", (2, 0.5)), lambda x: x),
    ("log_normal", {"mu": 0.3, "sigma": 0.5}, ("norm", (0.3, 0.5)), np.exp),
    ("beta", {"a": 2.0, "b": 5.0}, ("beta", (2, 5)), lambda x: x),
]


@pytest.mark.parametrize(("name", "arguments", "law", "then"), LAWS, ids=[law[0] for law in LAWS])
def test_a_distribution_is_the_law_it_is_named_for(name, arguments, law, then):
    from scipy import stats

    for u in (0.01, 0.3, 0.5, 0.77, 0.999):
        x = then(getattr(stats, law[0]).ppf(u, *law[1]))
        assert Parameter("p", distribution=name, arguments=arguments).at(u) == pytest.approx(x)
        if f"q_{name}" in QUANTIZED:
            for q in (1, 0.1):
                value = Parameter("p", distribution=f"q_{name}", arguments=arguments | {"q": q}).at(u)
                assert value == pytest.approx(round(x / q) * q) and isinstance(value, type(q))
    assert {law[0] for law in LAWS} == set(CONTINUOUS)


def test_whole_numbers_and_weighted_values_have_their_shares():
    u = (np.arange(1000) + 0.5) / 1000
    whole = [Parameter("p", distribution="int_uniform", arguments={"min": 2, "max": 5}).at(x) for x in u]
    assert [whole.count(n) for n in (2, 3, 4, 5)] == [250] * 4 and len(whole) == 1000
    named = [Parameter("p", values=("a", "b", "c"), probabilities=(0.5, 0.2, 0.3)).at(x) for x in u]
    assert [named.count(n) for n in "abc"] == [500, 200, 300]
    assert [Parameter("p", values=(1, 2)).at(x) for x in (0.1, 0.4, 0.6, 0.9)] == [1, 1, 2, 2]


def test_values_without_a_distribution_are_w_and_bs_own_choice(tmp_path):
    text = "method: random\nrun_cap: 3\nparameters:\n"
    text += "  model.layers: {min: 2, max: 4}\n  dropout.mean: {min: 0.1, max: 1}\n"
    layers, mean = read_sweep(write(tmp_path, text)).parameters
    assert (layers.distribution, mean.distribution) == ("int_uniform", "uniform")


REFUSED = [
    (grid(seed="{values: [0]}") + "early_terminate: {type: hyperband}\n", "early_terminate is not supported"),
    (grid(seed="{values: [0]}") + "controller: {type: local}\n", "controller is not supported"),
    (grid(seed="{values: [0]}") + "metric: {name: val_loss, target: 2}\n", "metric.target is not supported"),
    (grid(seed="{values: [0]}") + "metric: {name: loss}\n", "its name must be one of val_loss"),
    (grid(seed="{values: [0]}") + "run_cap: 0\n", "run_cap=0 is not allowed"),
    ("method: hyperband\nparameters:\n  seed: {value: 0}\n", "method=hyperband is not allowed"),
    ("method: random\nparameters:\n  seed: {values: [0, 1]}\n", "run_cap is missing"),
    ("method: bayes\nrun_cap: 3\nparameters:\n  seed: {values: [0, 1]}\n", "metric is missing"),
    (grid(optimizer="{parameters: {lr: {value: 1}}, value: 1}"), "optimizer.parameters must hold keys"),
    (grid(optimizer="{parameters: {lr: {value: 1}}}", optimizer__lr="{value: 1}"), "optimizer.lr is given twice"),
    (grid(norm="{values: [pre_ln, pre_lm]}"), "norm=pre_lm is not an option: norm is one of pre_ln"),
    (grid(model__width="{min: 0.0, max: 3.0}"), "model.width has a distribution: method=grid needs value, values, int"),
    (grid(seed="{min: 0, max: 1000000000000}"), "seed has more than 10,000 values"),
    (grid(seed="{values: [0, 1], probabilities: [0.5, 0.5]}"), "seed: probabilities would do nothing"),
    (grid(optimizer__lr="{distribution: log_normal, mu: 1000}").replace("grid", "random\nrun_cap: 2"), "no number can"),
    (grid(seed="{values: [0]}") + "  seed: {values: [1]}\n", "seed is given twice"),
    (grid(seed="{value: 2024-01-01}"), "seed=datetime.date(2024, 1, 1) is not allowed: it must be a number, text, or"),
    (grid(dropout__sites="{value: [[residual]]}"), "dropout.sites=['residual'] is not allowed"),
    (grid(dropout__sites="{value: [null]}"), "dropout.sites=null is not allowed"),
    (grid(optimizer__lr="{min: 1e-4, max: 1.0e-2}"), "min=1e-4 is not allowed: it must be a number; YAML reads"),
    (grid(optimizer__lr="{distribution: log_uniform_values, min: 0.0, max: 1.0}"), "log_uniform_values needs it above"),
    (grid(optimizer__lr="{distribution: loguniform, min: 0.0, max: 1.0}"), "distribution=loguniform is unknown"),
    (grid(optimizer__lr="{distribution: [uniform], min: 0.0}"), "distribution=['uniform'] is unknown"),
    (grid(optimizer__lr=f"{{min: 0.0, max: 1{'0' * 400}}}"), "is not allowed: it must be a number."),
    (
        grid(norm=f"{{values: [pre_ln, post_ln], probabilities: [0, 1{'0' * 400}]}}"),
        "one for each value, and their sum 1",
    ),
    (grid(optimizer__lr="{distribution: uniform, min: 2.0, max: 1.0}"), "min=2.0 must be below max=1.0"),
    (grid(optimizer__lr="{distribution: uniform, min: 2.0}"), "uniform needs max"),
    (grid(optimizer__lr="{distribution: normal, mean: 2.0}"), "optimizer.lr.mean is unknown: normal takes mu, sigma"),
    (grid(optimizer__lr="{distribution: normal, sigma: 0}"), "sigma=0 is not allowed"),
    (grid(norm="{values: [pre_ln, post_ln], probabilities: [0.5, 0.6]}"), "their sum 1"),
    (grid(norm="{values: [pre_ln, pre_ln]}"), "a value is repeated"),
    (grid(norm="{values: pre_ln}"), "must be a list"),
    (grid(norm="{values: [pre_ln, post_ln], probabilities: [true, false]}"), "their sum 1"),
    (grid(data__name=f"{{value: {'x' * 2000}}}"), "... is not allowed from a sweep"),
    (grid(norm="pre_ln"), "norm holds value, values or a distribution"),
    (grid(norm___target_="{value: os.system}"), "is not allowed from a sweep"),
    (grid(paths__runs="{value: elsewhere}"), "paths.runs is set by the user"),
    (grid(seed="{value: '${oc.env:HOME}'}"), "is not allowed from a sweep"),
    ("- a\n", "holds method and parameters"),
    ("a: [\n", "cannot be read as YAML: line 2, column 1: "),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(text, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_sweep(write(tmp_path, text, COMMAND if text[0] not in "-a" else ""))
    assert words in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("command: [python, run.py, '${args_json}']\n", "one of ${args}, ${args_no_hyphens}"),
        ("command: [python, run.py, '${args_no_equals}']\n", "one of ${args}, ${args_no_hyphens}"),
        (
            "command: [python, run.py, '${args}', '${args_no_boolean_flags}']\n",
            "command: ${args_no_boolean_flags} is not supported",
        ),
        ("command: [python, run.py]\n", "after it one of ${args}"),
        ("command: [python, my_run.py, '${args}']\n", "it must be a list with run.py or ${program}"),
        ("command: python run.py\n", "it must be a list with run.py"),
        (
            "command: ['${env}', CUDA_VISIBLE_DEVICES=0, python, run.py, '${args}']\n",
            "CUDA_VISIBLE_DEVICES=0 before the",
        ),
        ("command: [python, run.py, paths.runs=x, '${args}']\n", "paths.runs=x is not allowed: name the folder of"),
        ("command: [python, run.py, model=nano, '${args}', +model=deep_12]\n", "command: model is given twice"),
        ("program: my_run.py\n", "program=my_run.py is not allowed"),
        ("command: [python, run.py, -m, '${args_no_hyphens}']\n", "command: -m is not supported"),
        ("command: [python, run.py, '${envvar:X}', '${args_no_hyphens}']\n", "command: ${envvar:X} is not supported"),
        ("program: train.py\n" + COMMAND, "program=train.py is not allowed"),
        ("command: [run.py, '${args_no_hyphens}', seed=5]\n", "seed is set in the parameters and in the command"),
    ],
)
def test_a_command_that_run_py_would_not_understand_is_refused(command, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_sweep(write(tmp_path, grid(seed="{value: 0}"), command))
    assert words in str(error.value)


def test_a_file_that_is_not_there_is_said():
    with pytest.raises(ConfigError, match="/nowhere/x.yaml cannot be read: No such file"):
        read_sweep("/nowhere/x.yaml")


ALLOWED = "seed=3 norm=pre_ln optimizer.lr=1e-3 optimizer.betas=[0.9,0.95] model.tied=True logger=wandb data=hub"
ALLOWED += " data.name=wikimedia/wikipedia optimizer.weight_decay=-1 budget.tokens=1_000 dropout.sites=['embedding']"
DENIED = [
    "norm._target_=os.system",
    "_target_=os.system",
    "norm={_target_:os.system}",
    "seed=${oc.env:SECRET}",
    "label=$HOME",
    "paths.runs=x",
    "paths={runs:x}",
    "data.path=words.txt",
    "tokenizer.path=x",
    "data.name=/etc",
    "data.name=../secret",
    "data.name=~/x",
    "data.name=./x",
    "logger.entity=somebody",
    "force=true",
    "debug=true",
    "hydra.run.dir=x",
    "hydra/launcher=joblib",
    "+norm=pre_ln",
    "~norm",
    "-m",
    "--config-dir=x",
    "norm=choice(pre_ln,post_ln)",
    "seed=0,1",
    "norm=pre_ln\nseed=1",
    "dropout.sites=[" + ", " * 400 + "!",  # no time is lost on it
    "dropout.sites=[a,[b]]",
    "dropout.sites=[a,'b]",
    "norm=" + "x" * 5000,
    "data.name=" + "x" * 500,
    "seed=0\n",
    "norm",
]


@pytest.mark.parametrize("argument", DENIED)
def test_a_server_may_choose_options_and_set_numbers_and_no_more(argument):
    refuse_untrusted(ALLOWED.split())
    with pytest.raises(ConfigError, match="is not allowed from a sweep"):
        refuse_untrusted(["seed=0", argument])


def test_a_folder_of_this_machine_is_no_dataset_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "private").mkdir()
    refuse_untrusted(["data.name=private"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        refuse_untrusted(["data.name=private"])


def test_run_py_refuses_what_a_sweep_server_may_not_decide(tmp_path, monkeypatch, capsys):
    from run import main

    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setattr(sys, "argv", ["run.py", "norm=pre_ln", f"paths.runs={tmp_path}/x"])
    assert main() == 2
    assert "paths.runs is set by the user" in capsys.readouterr().err and not list(tmp_path.iterdir())


SMALL = ["model=nano", "data=markov", "data.symbols=8", "data.length=60_000"]


def test_a_random_draw_that_is_refused_is_replaced_by_the_next(tmp_path, monkeypatch):
    """A width of 32 has no 3 heads: every other draw is a run, and later draws complete the number."""
    text = (
        "method: random\nrun_cap: 8\nparameters:\n  model.width: {values: [32, 48]}\n  model.heads: {values: [2, 3]}\n"
    )
    sweep = read_sweep(write(tmp_path, text + "  seed: {min: 0, max: 1000000}\n"))
    draws = [sweep.draw(i) for i in range(40)]
    allowed = [d for d in draws if (d["model.width"], d["model.heads"]) != (32, 3)][:8]
    kept = Keys(tmp_path)
    planned, refused, missing = plan_random(sweep, tmp_path, SMALL, keys=kept)
    found = [(p.cfg["model"]["width"], p.cfg["model"]["heads"], p.seed) for p in planned]
    assert found == [(d["model.width"], d["model.heads"], d["seed"]) for d in allowed] and missing == 0
    assert len(refused) == draws.index(allowed[-1]) - 7 > 0 and "model.heads=3" in refused[0]
    kept.save()  # the table of `status` has the same runs, without composing any
    monkeypatch.setattr(kept_keys, "_computed", None)
    key = keys_of(planned[2].cfg)
    done = {"status": "finished", "folder": str(planned[2].folder), "key": {"arm": key.arm, "setting": key.setting}}
    table = arms([done], tmp_path, sweep, SMALL)
    assert {(name, seed) for name, row in table.items() for seed in row} == {(p.label, p.seed) for p in planned}
    assert [name for name, row in table.items() if row.get(planned[2].seed) == done] == [planned[2].label]


def test_a_random_sweep_without_allowed_values_says_why(tmp_path, capsys):
    text = "method: random\nrun_cap: 2\nparameters:\n  model.width: {value: 32}\n  model.heads: {values: [3, 5]}\n"
    assert cli(["sweep", str(write(tmp_path, text)), *SMALL, "--runs", str(tmp_path / "runs")]) == 2
    assert "model.heads" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_group_of_which_no_option_is_taken_has_no_choice():
    """conf/config.yaml has `recipe: null`: a run of a sweep is not named after a recipe "None"."""
    assert compose(["model=nano"]).choices.get("recipe") is None
    assert compose(["recipe=albert_agpt"]).choices.recipe == "albert_agpt"


def test_of_two_budgets_the_later_one_counts(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("program: run.py\nmethod: grid\nparameters: {budget.steps: {value: 40}, seed: {values: [0]}}\n")
    sweep = read_sweep(file)
    (setting,) = sweep.settings()
    assert "budget.steps" in run_overrides(sweep, setting) and "budget.tokens" not in run_overrides(sweep, setting)
    assert run_overrides(sweep, setting, ["budget.tokens=320"])["budget.tokens"] == "budget.tokens=320"
    assert "budget.steps" not in run_overrides(sweep, setting, ["budget.tokens=320"])
