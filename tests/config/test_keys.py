"""Keys of arms and settings: equal exactly where two configurations lead to the same folder."""

import json
from functools import cache

import pytest
from checkpoints import gpt2
from omegaconf import OmegaConf

from albert_ablate.config import (
    COMPONENTS,
    HYDRA_KEYS,
    NUISANCE,
    ConfigError,
    check,
    checked_config,
    conf_folder,
    identity,
    keys_of,
    options,
    parameters_of,
    to_container,
)
from albert_ablate.records.keys import Keys

GIVEN = {"path": "t.txt", "name": "some/text"}  # arguments that only the user knows


@cache
def base():
    return checked_config(["model=nano", "model.layers=4", "budget.tokens=100_000"])


def node_of(group, option):
    """An option's node as its YAML has it, interpolations resolved."""
    node = OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{option}.yaml"))
    for over in node.pop("defaults", []):
        node = {**node_of(group, over), **node} if isinstance(over, str) and over != "_self_" else node
    node = {k: GIVEN.get(k, v) if v == "???" else v for k, v in node.items()}
    return OmegaConf.to_container(OmegaConf.create(to_container({**base(), group: node})), resolve=True)[group]


def variants(node):
    """A component as its YAML has it, its defaults left out, its defaults written out, and one number changed."""
    known = {k: d for k, (_, d) in parameters_of(node["_target_"]).items()}
    yield node
    yield {k: v for k, v in node.items() if k in HYDRA_KEYS or v != known[k]}
    yield {k: list(v) if isinstance(v, tuple) else v for k, v in known.items() if k not in node} | node
    for name, value in node.items():
        if isinstance(value, float) and 0 < value < 1:
            yield node | {name: value / 2}


def every_configuration():
    """Every option on disk but those that need a file, in a configuration that allows it: (group, option) and it."""
    cfg = {**base(), "dropout": node_of("dropout", "uniform")}
    for group in (g for g in COMPONENTS if g != "logger"):
        for option in options()[group]:
            if (group, option) not in (("model", "pretrained"), ("model", "hf")):
                for node in variants(node_of(group, option)):
                    yield (group, option), {**cfg, **ALLOWED_WITH.get(option, dict)(), group: node}


# options that the others refuse
ALLOWED_WITH = {
    "schedule_free": lambda: {"schedule": node_of("schedule", "constant")},
    "ngpt": lambda: {
        "attention": node_of("attention", "rotary"),
        "optimizer": {**base()["optimizer"], "weight_decay": 0.0},
    },
    "gpt2_small": lambda: {"budget": {"tokens": 1_000_000}},
    "albert_agpt": lambda: {"budget": {"tokens": 1_000_000}},
}


def as_recorded(cfg):
    """What a record of the run holds, one of an older release which did not write the defaults of younger arguments."""
    out = json.loads(json.dumps(cfg, default=dict))
    for group in COMPONENTS:
        known = parameters_of(out[group]["_target_"])
        kept = {k: v for k, v in out[group].items() if k in HYDRA_KEYS or v != known[k][1]}
        out[group] = kept
    return out


def test_keys_are_equal_exactly_where_folders_are(tmp_path):
    given = ["model=pretrained", f"model.path={gpt2(tmp_path / 'here')}", "budget.tokens=100_000"]
    other = ["model=pretrained", f"model.path={gpt2(tmp_path / 'other', layers=3)}", "budget.tokens=100_000"]
    found = [(("model", "pretrained"), checked_config(o)) for o in (given, [*given, "seed=3"], other)]
    hf = ["model=hf", f"model.config={tmp_path / 'here'}", "budget.tokens=100_000"]
    changes = ([], ["seed=3"], ["model.weights=loaded"], ["model.changes.n_layer=3"])
    found += [(("model", "hf"), checked_config([*hf, *more])) for more in changes]
    pairs, seen, same = set(), {("logger", o) for o in options()["logger"]}, 0
    for option, cfg in (*found, *every_configuration()):
        lies = [cfg[group].get(name) for group, name in (("data", "path"), ("data", "name"), ("tokenizer", "path"))]
        try:
            pair = keys_of(as_recorded(cfg)).setting, identity(cfg, str(lies)).setting
        except ConfigError:  # a value that does not go with the others
            continue
        same += pair in pairs
        pairs.add(pair)
        seen.add(option)
    assert seen == {(g, o) for g in COMPONENTS for o in options()[g]}
    assert len(pairs) > 150 < same
    assert len({key for key, _ in pairs}) == len(pairs) == len({folder for _, folder in pairs})


def test_the_learning_rate_and_the_seed_are_not_part_of_an_arm():
    other = check({**base(), "optimizer": {**base()["optimizer"], "lr": 0.5}, "seed": 7})
    a, b = keys_of(base()), keys_of(other)
    assert NUISANCE == ("optimizer.lr",) and a.arm == b.arm and a.setting != b.setting and a.run != b.run


@pytest.mark.parametrize("spelled", ["./t.txt", "x/../t.txt", "{here}/t.txt"])
def test_spellings_of_one_path_are_one_key(spelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def of(path):
        return keys_of(check({**base(), "data": node_of("data", "text_files") | {"path": path}}))

    assert of(spelled.format(here=tmp_path)) == of("t.txt") != of("u.txt")


def test_keys_of_an_older_or_foreign_configuration():
    old = {k: v for k, v in as_recorded(base()).items() if k not in ("dropout_time", "task")}  # before these groups
    assert keys_of(old) == keys_of(base())
    for broken in ({}, {**old, "norm": {"_target_": "albert_ablate.model.placements.Gone"}}, {**old, "model": None}):
        with pytest.raises(ConfigError):
            keys_of(broken)


def test_kept_keys_are_those_that_were_computed(tmp_path):
    overrides = ("model=nano", "budget.tokens=100_000", "norm=post_ln")
    record = {"config": as_recorded(base())}
    first = Keys(tmp_path)
    found = first.arm(overrides), first.of_records([record, {"config": {}}]), first.of_overrides([overrides, ["a=1"]])
    assert found[1:] == ([keys_of(base()), None], [found[0].keys, None])
    first.save()
    again = Keys(tmp_path)
    again.apart = None  # would be called
    assert (again.arm(overrides), again.of_records([record]), again.of_overrides([overrides])) == (
        found[0], found[1][:1], found[2][:1],
    )  # fmt: skip
    assert not again.fresh
    for damaged in ("", "x", (tmp_path / ".keys").read_text()[:-2]):
        (tmp_path / ".keys").write_text(damaged)
        assert not Keys(tmp_path).lines


def test_a_record_is_of_the_keys_that_it_holds(tmp_path):
    record = {"key": {"arm": "a", "setting": "b"}, "config": as_recorded(base())}
    assert [k.arm for k in Keys(tmp_path).of_records([record])] == ["a"]
