"""A model of one's own: a module that gives logits, trained as the package's are."""

from pathlib import Path

import own_models
import pytest
import torch
from forking import killed_and_gone_on, outcome, train, write_text

from albert_ablate import build_model, compose
from albert_ablate.config import ConfigError, check
from albert_ablate.model.named_draws import drawn
from albert_ablate.optim.groups import decay_groups
from albert_ablate.records.history import read_history
from albert_ablate.training.cost import flops_per_token
from albert_ablate.training.run import run


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    monkeypatch.setenv("ALBERT_ABLATE_TRUST", "own_models")


def own(name, *more):
    """The configuration of a model of tests/own_models.py."""
    return compose(["~model", f"+model._target_=own_models.{name}", *more])


def test_logits_are_those_of_the_module_with_its_weights():
    model = build_model(own("Mixer", "+model.width=8"))
    alone = own_models.Mixer(256, width=8)
    alone.load_state_dict(model.state_dict())  # by the module's own names
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(tokens), alone.eval()(tokens).logits)


def test_draws_depend_on_seed_and_name_alone():
    with_norm, without = build_model(own("Mixer", "+model.norm=true")), build_model(own("Mixer"))
    deeper, other = build_model(own("Mixer", "+model.layers=3")), build_model(own("Mixer", "seed=1"))
    ours = without.initial_draws
    assert ours.keys() == {"table.weight", "scale", "out.weight", "out.bias"} | {
        f"blocks.{k}.0.{part}" for k in range(2) for part in ("weight", "bias")
    }
    assert all(deeper.initial_draws[name] == value for name, value in ours.items())
    assert not set(other.initial_draws.values()) & set(ours.values())
    # a norm before the matrix moves its name from blocks.0.0 to blocks.0.1
    shared = {n for n, v in with_norm.initial_draws.items() if ours.get(n) == v}
    assert shared == {"table.weight", "scale", "out.weight", "out.bias"}


def test_torchs_generator_is_left_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    module, hashes = drawn(lambda: torch.nn.Linear(3, 3), 0)
    assert torch.equal(before, torch.get_rng_state()) and set(hashes) == {"weight", "bias"}
    bound = 1 / 3**0.5  # torch's own rule for a Linear: uniform, |x| < 1/sqrt(in)
    assert module.weight.abs().max() < bound and len(module.weight.unique()) == 9


def test_what_decays_is_told_by_module_and_shape():
    model = build_model(own("Mixer", "+model.norm=true"))
    named = {id(p): n for n, p in model.named_parameters()}
    kinds = {named[id(p)].removeprefix("own."): g["kind"] for g in decay_groups(model) for p in g["params"]}
    assert kinds["table.weight"] == "embeddings" and kinds["out.weight"] == "head" and kinds["scale"] == "gates"
    assert kinds["blocks.0.0.weight"] == "gains" and kinds["blocks.0.1.weight"] == "matrices"
    assert kinds["blocks.1.0.bias"] == kinds["out.bias"] == "biases"
    grouped = build_model(own("Grouped"))
    scale = grouped.own.scale
    assert next(g["kind"] for g in decay_groups(grouped) if any(p is scale for p in g["params"])) == "matrices"


def test_flops_are_three_forward_passes():
    cfg = own("Mixer", "+model.width=8")
    forward = 2 * (2 * 8 * 8 + 8 * 256)  # two matrices and the head, a product and a sum each
    assert flops_per_token(cfg) == 3 * forward


@pytest.mark.process
def test_a_run_is_resumed_bit_for_bit(tmp_path):
    text = write_text(tmp_path / "text.txt")

    def cfg(runs):
        words = [f"data.path={text}", f"paths.runs={tmp_path / runs}", f"paths.cache={tmp_path / 'cache'}"]
        words += ["data=text_files", "data.batch=4", "trainer=cpu", "trainer.threads=1", "evaluation.tokens=256"]
        return check(own("Mixer", *words, "budget.steps=24", "evaluation.every=256", "diagnostics.every=4"))

    whole = train(cfg("whole"))
    cut = killed_and_gone_on(cfg("cut"), at=200)
    assert outcome(cut["folder"]) == outcome(whole["folder"])
    assert whole["budget"]["steps"] == 24 and whole["model"]["layers"] == 2 and whole["model"]["mean_dropout"] is None
    rows = read_history(Path(whole["folder"]), "layers", whole["histories"]).to_pylist()
    assert {(r["layer"], r["sublayer"]) for r in rows} == {(0, "block"), (1, "block")}
    assert all(r["residual_rms"] > 0 and r["weight_norm"] > 0 and r["grad_norm"] > 0 for r in rows)


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("Narrow", [], r"returns \(2, 8, 255\) for 2 x 8 tokens: it must return logits of shape \(2, 8, 256\)"),
        ("Foresighted", [], "is not causal"),
        ("number", [], "returns a int: it must return a torch.nn.Module"),
        ("Mixer", ["trainer.gradient_checkpointing=true"], "has no gradient_checkpointing_enable"),
    ],
)
def test_a_wrong_model_is_one_sentence_and_no_folder(name, more, says, tmp_path):
    text = write_text(tmp_path / "text.txt")
    words = ["data=text_files", f"data.path={text}", f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'c'}"]
    with pytest.raises(ConfigError, match=says) as said:
        run(own(name, *words, "budget.tokens=4096", *more))
    assert "\n" not in str(said.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["norm=post_ln"], "norm=post_ln is not allowed with model=Mixer, which says itself where its norms stand"),
        (["norm_type=rms_norm"], "norm_type=rms_norm is not allowed"),
        (["attention=rotary"], "attention=rotary is not allowed"),
        (["attention.qk_clip=5"], "attention.qk_clip=5 is not allowed"),
        (["dropout=depth_decay"], "dropout=depth_decay is not allowed"),
        (["dropout_time=linear"], "dropout_time=linear is not allowed"),
        (["recipe=albert_agpt"], "is not allowed"),
        (["evaluation=units"], "evaluation=units is not allowed with model=Mixer"),
        (["trainer.compile=true"], "trainer.compile=true is not allowed"),
        (["trainer=auto", "trainer.graph=true"], "trainer.graph=true is not allowed with model=Mixer"),
        (["trainer=fsdp"], "trainer.strategy=fsdp is not allowed"),
        (["task=classify"], "task=classify is not allowed"),
        (["budget.steps=3", "budget.tokens=100"], "two budgets"),
        (["budget.steps=0.5"], "must be a whole number"),
    ],
)
def test_what_it_has_inside_cannot_be_chosen(more, says):
    with pytest.raises(ConfigError, match=says) as said:
        own("Mixer", *more)
    assert "\n" not in str(said.value)
