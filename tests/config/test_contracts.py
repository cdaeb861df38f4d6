"""One contract per kind, run on every option found in conf/: it builds, it trains, and each of its numbers counts.

A new option is picked up from disk. What an option cannot promise stands in EXCEPTIONS with its reason.
"""

import tempfile
from dataclasses import MISSING
from functools import cache
from pathlib import Path

import pytest
import yaml
from checkpoints import gpt2

from albert_ablate import compose
from albert_ablate.config import COMPONENTS, HYDRA_KEYS, check, conf_folder, identity, options, parameters_of
from albert_ablate.model.build import assemble
from albert_ablate.training import contracts

OPTIONS = options()
NAMES_OWN_CLASSES = ("task", "lightning")  # nothing of it stands in the package: tests/training/test_own_training.py
ALL = [(group, option) for group, names in OPTIONS.items() for option in names if (group, option) != NAMES_OWN_CLASSES]
# options that cannot be composed without a value only the user knows
NEEDS = {
    ("data", "text_files"): ["data.path=somewhere"],
    ("data", "hub"): ["data.name=somewhere"],
    ("tokenizer", "file"): ["tokenizer.path=somewhere"],
    ("optimizer", "schedule_free"): ["schedule=constant"],  # any other is refused
    ("norm", "ngpt"): ["attention=rotary", "optimizer.weight_decay=0"],  # it refuses the others
    ("norm", "mix_ln"): ["model.layers=4"],  # a quarter of two is none
    # too large to train in a test: their own shape at another size
    ("model", "gpt2_small"): ["model.layers=2", "model.width=48", "model.context=16"],
    ("model", "albert_agpt"): ["model.layers=2", "model.width=48", "model.context=16"],
    ("model", "pretrained"): [f"model.path={gpt2(Path(tempfile.mkdtemp()), context=16)}"],
    ("model", "hf"): [f"model.config={gpt2(Path(tempfile.mkdtemp()), context=16)}"],
    ("loss", "r_drop"): ["dropout=uniform"],
    **{("dropout_time", name): ["dropout=uniform"] for name in options()["dropout_time"]},
}
UNLISTED = {  # would do nothing there
    ("attention", "learned"): {"rotary_base", "rotary_factor", "rotary_bands", "qk_eps"},
    ("attention", "nope"): {"rotary_base", "rotary_factor", "rotary_bands", "qk_eps"},
    ("attention", "qk_norm"): {"rotary_base", "rotary_factor", "rotary_bands", "qk_clip"},
    ("attention", "rotary"): {"qk_eps"},
}
TRAINED = [pair for pair in ALL if pair[0] not in contracts.UNTRAINED]
AS_FILES_SAY = ("pretrained", "hf")  # whose shape stands in a file


def configuration(group, option, *more):
    return contracts.configuration(group, option, more, NEEDS.get((group, option), []))


@cache
def state_of(group, option, *more):
    """`state` of an option as it is, which several of its arguments are compared with."""
    return contracts.state(configuration(group, option, *more))


@pytest.mark.parametrize(("group", "option"), ALL)
def test_option_composes_and_its_arguments_bind(group, option):
    cfg = configuration(group, option)
    for key in COMPONENTS:
        node, known = cfg[key], parameters_of(cfg[key]["_target_"])
        assert set(node) - HYDRA_KEYS <= set(known)
        assert all(default is not MISSING or name in node for name, (_, default) in known.items())
    assert not contracts.unbound(cfg, group, option, UNLISTED.get((group, option), ()))


@pytest.mark.parametrize("option", [o for o in OPTIONS["model"] if o not in AS_FILES_SAY])
def test_model_is_built_on_the_meta_device_at_its_own_size(option):
    cfg = compose([f"model={option}"])
    model = assemble(check(cfg))
    assert len(model.blocks) == cfg.model.layers and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("group", "option"), TRAINED)
def test_option_trains_and_every_parameter_takes_part(group, option):
    assert not contracts.untrained(configuration(group, option))


# (group, number) or (group, option, number): what makes the number count, where the tiny arm alone would not show it
CIRCUMSTANCES = {
    ("clip", "max_norm"): ["clip.max_norm=0.01"],
    ("clip", "max_value"): ["clip.max_value=0.001"],
    ("clip", "eps"): ["clip.eps=0.5"],
    ("schedule", "warmup"): ["schedule.warmup=0.4"],
    ("norm_type", "eps"): ["norm_type.eps=10"],  # some bound a length by it, here about 4
    ("attention", "rotary_base"): ["attention.rotary_base=100"],
    ("attention", "rotary_bands"): ["attention.rotary_factor=4"],
    ("attention", "qk_eps"): ["attention.qk_eps=0.5"],
    ("attention", "full_every"): ["attention.window=4"],
    ("optimizer", "eps"): ["optimizer.eps=1e-3"],
    ("schedule", "decay"): ["schedule.decay=0.4"],
    ("optimizer", "decay"): ["optimizer.weight_decay=0.1"],
    ("optimizer", "d"): ["optimizer.d=2"],
    ("optimizer", "frequency"): ["optimizer.frequency=1"],
    ("optimizer", "max_dim"): ["optimizer.max_dim=47"],
    ("optimizer", "rho"): ["optimizer.rho=1e4"],
    ("optimizer", "sophia", "interval"): ["optimizer.rho=1e4", "optimizer.interval=1"],
    ("optimizer", "interval"): ["optimizer.interval=3", "optimizer.warmup=1", "optimizer.grace=1"],
    ("optimizer", "warmup"): ["optimizer.interval=4", "optimizer.warmup=1", "optimizer.grace=1"],
    ("optimizer", "threshold"): ["optimizer.threshold=0.1", "optimizer.grace=2"],
    ("optimizer", "grace"): ["optimizer.threshold=0.1", "optimizer.grace=2"],
    ("clip", "history"): ["clip.history=2"],
    ("clip", "unit"): ["clip.max_norm=0.1"],
    ("clip", "zclip", "alpha"): ["clip.warmup=2", "clip.threshold=0.1", "clip.max_norm=100"],
    ("clip", "zclip", "threshold"): ["clip.warmup=2", "clip.threshold=0.1", "clip.max_norm=100"],
    ("clip", "zclip", "warmup"): ["clip.warmup=2", "clip.threshold=0.1", "clip.max_norm=100"],
    ("clip", "adagc", "warmup"): ["clip.warmup=3"],
    ("clip", "relative"): ["clip.warmup=2"],
    ("clip", "absolute"): ["clip.absolute=0.1"],
    ("clip", "beta"): ["clip.warmup=2"],
    ("clip", "sigma"): ["clip.after=3", "clip.window=3", "clip.sigma=2"],
    ("clip", "window"): ["clip.after=3", "clip.window=2", "clip.sigma=1"],
    ("clip", "after"): ["clip.after=3", "clip.window=4", "clip.sigma=0.5"],
    ("norm", "share"): ["norm.share=0.5"],
    ("dropout_time", "until"): ["dropout_time.until=0.8"],
    ("dropout_time", "shape"): ["dropout_time.until=0.8"],
    ("dropout", "spread"): ["model.layers=4"],
    ("dropout", "share"): ["model.layers=4"],
}


# arguments that are null by default: a value to try
NULLS = {
    "attention": {"kv_heads": 1, "head_width": 12, "qk_norm": "rms_head", "softcap": 0.5, "window": 4, "full_every": 2}
    | {"scale": 0.1, "qk_clip": 0.01, "rotary_bands": [0.5, 2.0, 16]},
    "model": {"embedding_scale": 2.0, "logit_softcap": 1.0},
}


def arguments():
    """(group, option, argument), one option for each target: its other YAMLs differ in values alone."""
    seen = set()
    for group, option in TRAINED:
        if group == "recipe" or option in AS_FILES_SAY:  # tests/training/test_go_on.py, tests/model/test_hf.py
            continue
        target = yaml.safe_load((conf_folder() / group / f"{option}.yaml").read_text())["_target_"]
        for name in parameters_of(target):
            if (target, name) not in seen and name not in UNLISTED.get((group, option), set()):
                seen.add((target, name))
                yield group, option, name


NUMBERED = list(arguments())


@pytest.mark.parametrize(("group", "option", "name"), NUMBERED)
def test_every_argument_of_an_option_changes_something(group, option, name):
    circumstances = CIRCUMSTANCES.get((group, option, name), CIRCUMSTANCES.get((group, name), []))
    cfg = configuration(group, option, *circumstances)
    value = cfg[group].get(name, parameters_of(cfg[group]["_target_"])[name][1])
    if name == "positions":
        tried = "rotary" if value == "learned" else "learned"
    elif name == "activation":
        tried = "relu"
    elif name == "initial":
        tried = 0.05
    elif name == "hidden":
        tried = 24
    elif name == "betas":
        tried = [0.8, 0.99]
    elif name in NULLS.get(group, {}):
        tried = NULLS[group][name]
    elif name == "sites":
        tried = ["hidden", "attention"]
    elif (group, name) == ("optimizer", "decay"):
        tried = ["matrices"]
    elif name == "unit":
        tried = "block"
    elif name == "scale":
        tried = "original"
    elif (group, name) == ("optimizer", "mean"):
        tried = "all"
    elif name == "shape":
        tried = "linear" if value != "linear" else "cosine"
    else:
        tried = contracts.another(value, None, even=(group, name) in (("model", "width"), ("model", "heads")))
    assert tried is not None, f"no way to perturb {group}.{name}={value}: add one"
    assert not contracts.ineffective(cfg, group, name, tried, state_of(group, option, *circumstances))


def test_the_seed_changes_the_run_and_not_the_setting():
    a, b = configuration("norm", "pre_ln"), configuration("norm", "pre_ln", "seed=1")
    assert identity(a, "t").setting == identity(b, "t").setting and identity(a, "t").run != identity(b, "t").run
    assert not contracts.unseeded(a)


MEASURED = [(pair, ()) for pair in TRAINED] + [
    (("attention", "learned"), more)
    for more in (("attention.qk_clip=1",), ("attention.qk_clip=1", "data.accumulate=2"), ("model.sigma_reparam=true",))
]


@pytest.mark.parametrize("pair, more", MEASURED, ids=lambda x: "-".join(x) or "plain")
def test_a_measuring_pass_leaves_nothing_in_model_or_optimizer(pair, more):
    assert not contracts.measuring_leaves(configuration(*pair, *more))
