"""model=pretrained: a run that goes on from a checkpoint."""

import json

import pytest
import torch
import torch.nn.functional as F
from checkpoints import gpt2
from safetensors.torch import load_file, save_file

from albert_ablate import build_model, compose, run
from albert_ablate.config import ConfigError, identity
from albert_ablate.data.packed import take_blocks
from albert_ablate.model.pretrained import load_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gpt2(tmp_path_factory.mktemp("checkpoint"))


def composed(folder, *more):
    return compose(["model=pretrained", f"model.path={folder}", *more])


def test_structure_and_weights_are_the_checkpoints(folder):
    cfg = composed(folder, "seed=3", "dropout=uniform")
    assert cfg.model.layers == 2 and cfg.model.context == 32 and cfg.model.tied and cfg.choices.attention == "learned"
    ours, theirs = build_model(cfg).eval(), load_pretrained(folder).eval()
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(tokens), theirs(tokens))
    assert ours.initial_draws == build_model(composed(folder, "seed=4")).initial_draws  # of the weights themselves
    short = build_model(composed(folder, "model.context=8")).eval()
    assert torch.equal(short(tokens[:, :8]), theirs(tokens[:, :8])) and short.positions.num_embeddings == 8


def test_a_run_begins_at_the_checkpoints_own_loss_and_learns(folder, tmp_path):
    cfg = composed(
        folder, "data=markov", "data.length=20_000", "data.batch=4", "budget.tokens=4096", "evaluation.every=4096",
        "evaluation.tokens=256", "trainer.threads=1", "optimizer.lr=0.003", f"paths.runs={tmp_path / 'runs'}",
        f"paths.cache={tmp_path / 'cache'}",
    )  # fmt: skip
    from albert_ablate.data.packed import held_out_sample, pack
    from albert_ablate.model.build import build

    record = run(cfg)
    packed = pack(build(cfg["data"]), build(cfg["tokenizer"]), tmp_path / "cache")
    blocks = held_out_sample(packed.validation, 32, 256, "validation")
    rows = torch.from_numpy(take_blocks(packed.validation, blocks, 32))
    with torch.no_grad():
        logits = load_pretrained(folder).eval()(rows[:, :-1])
    own = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert record["summary"]["initial_loss"] == pytest.approx(own, abs=1e-5)
    assert record["summary"]["val_loss"] < own - 0.1 and record["status"] in ("finished", "diverged")
    assert record["choices"]["norm"] == "pre_ln" and run(cfg)["found"]


def test_other_weights_are_another_run_and_another_place_is_not(folder, tmp_path):
    moved = gpt2(tmp_path / "elsewhere")
    assert identity(composed(folder), "x") == identity(composed(moved), "x")
    weights = load_file(moved / "model.safetensors")
    save_file({k: v + (k == "wte.weight") for k, v in weights.items()}, moved / "model.safetensors")
    assert identity(composed(folder), "x").setting != identity(composed(moved), "x").setting


@pytest.mark.parametrize(
    "more",
    [["norm=pre_ln"], ["norm_type=layer_norm"], ["attention=learned"], ["attention.qk_clip=50"], ["model.layers=2"]],
)
def test_what_the_checkpoint_has_or_leaves_open_may_be_asked_for(folder, more):
    assert composed(folder, *more).choices.norm == "pre_ln"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["norm=post_ln"], "norm=post_ln contradicts the checkpoint .* which has norm=pre_ln"),
        (["norm_type=rms_norm"], "which has norm_type=layer_norm"),
        (["norm_type.eps=0.1"], "norm_type.eps=0.1 contradicts"),
        (["attention=rotary"], "which has attention=learned"),
        (["model.layers=3"], "model.layers=3 contradicts"),
        (["model.context=33"], "model.context=33 is not allowed"),
        (["tokenizer=bpe"], "tokenizer=bpe has 4096 tokens"),
    ],
)
def test_what_contradicts_the_checkpoint_is_one_sentence(folder, more, says):
    with pytest.raises(ConfigError, match=says) as found:
        composed(folder, *more)
    assert "\n" not in str(found.value)


def test_no_folder_and_one_without_a_checkpoint_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="model.path is missing"):
        compose(["model=pretrained"])
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        composed(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="model_type=bert"):
        composed(tmp_path)
