"""model=hf: causal language models of transformers, built from a configuration."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import gpt2
from forking import killed_and_gone_on, outcome, train, write_text
from safetensors.torch import load_file, save_file

from albert_ablate import build_model, compose
from albert_ablate.config import ConfigError, check, checked_config, identity
from albert_ablate.config.untrusted import refuse_untrusted
from albert_ablate.model.build import assemble, initialized
from albert_ablate.optim.groups import decay_groups
from albert_ablate.training.cost import flops_per_token
from albert_ablate.training.run import run

transformers = pytest.importorskip("transformers", reason="pip install 'albert_ablate[hf]'")

GPT2 = {"model_type": "gpt2", "vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "pad_token_id": 31_999,
}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
FAMILIES = ["llama", "qwen2", "gemma2", "gpt_neox", "phi", "stablelm", "mamba", "opt", "bloom", "mixtral"]


@pytest.fixture
def file(tmp_path):
    def written(content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tmp_path / "config.json"

    return written


def hf(path, *more):
    return compose(["model=hf", f"model.config={path}", *more])


def tokens(context=16):
    return torch.randint(0, 256, (2, context), generator=torch.Generator().manual_seed(0))


def test_loaded_weights_give_transformers_logits(tmp_path):
    folder = gpt2(tmp_path / "gpt2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = build_model(hf(folder, "model.weights=loaded")).eval()
    assert torch.equal(ours(tokens()), theirs(tokens()).logits)
    assert set(ours.initial_draws) == {n for n, _ in theirs.named_parameters()}
    alike = build_model(checked_config(["model=pretrained", f"model.path={folder}"])).eval()
    torch.testing.assert_close(ours(tokens()), alike(tokens()), rtol=1e-4, atol=1e-4)


def test_operations_and_kinds_are_those_of_our_own_gpt2(file, tmp_path):
    folder = gpt2(tmp_path / "gpt2")
    theirs, ours = hf(folder), compose(["model=pretrained", f"model.path={folder}"])
    assert flops_per_token(theirs) == flops_per_token(ours)
    sizes = []
    for cfg in (theirs, ours):
        groups = decay_groups(assemble(check(cfg)))
        sizes.append({k: sum(p.numel() for g in groups if g["kind"] == k for p in g["params"]) for k in
                      ("matrices", "embeddings", "head", "tied", "gains", "biases", "gates")})  # fmt: skip
    assert sizes[0] == sizes[1] and sizes[0]["tied"] == 256 * 16


def test_an_untied_head_is_a_head(file):
    model = build_model(hf(file({**LLAMA, "tie_word_embeddings": False})))
    groups = {g["kind"]: g["params"] for g in decay_groups(model)}
    assert [p.shape for p in groups["head"]] == [p.shape for p in groups["embeddings"]] == [(256, 32)]
    with pytest.raises(ConfigError, match="optimizer.decay=.* is not allowed: embeddings and head of this model"):
        run(hf(file({**LLAMA, "tie_word_embeddings": True}), "optimizer.decay=[matrices,head]", "budget.steps=1"))


def test_random_weights_have_the_tokenizers_vocabulary(file):
    model = build_model(hf(file(LLAMA)))
    assert model(tokens()).shape == (2, 16, 256) and model.own.config.pad_token_id is None


def test_loaded_weights_keep_their_vocabulary_if_it_is_enough(tmp_path):
    large = gpt2(tmp_path / "large", vocabulary=300)
    model = initialized(assemble(check(hf(large, "model.weights=loaded"))), check(hf(large, "model.weights=loaded")))
    assert model(tokens()).shape[-1] == 300
    small = gpt2(tmp_path / "small", vocabulary=100)
    with pytest.raises(ConfigError, match="The tokenizer has 256 tokens and the weights in .* only 100"):
        assemble(check(hf(small, "model.weights=loaded")))


def test_arms_share_the_draws_of_what_they_share(file):
    plain = build_model(hf(file(LLAMA))).initial_draws
    deeper = build_model(hf(file(LLAMA), "model.changes.num_hidden_layers=3")).initial_draws
    wider = build_model(hf(file(LLAMA), "model.changes.intermediate_size=64")).initial_draws
    assert all(deeper[name] == value for name, value in plain.items()) and len(deeper) > len(plain)
    assert {n for n, v in plain.items() if wider[n] != v} == {n for n in plain if ".mlp." in n}
    std = build_model(hf(file(LLAMA))).own.model.layers[0].mlp.up_proj.weight.std().item()
    assert std == pytest.approx(0.02, rel=0.1)  # transformers' initializer_range


def test_who_a_run_is_depends_on_content_not_on_place(file, tmp_path):
    here = identity(hf(gpt2(tmp_path / "a"), "model.weights=loaded"), "x")
    there = gpt2(tmp_path / "b")
    assert identity(hf(there, "model.weights=loaded"), "x") == here
    content = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**content, "transformers_version": "4.0.0"}))
    assert identity(hf(there / "config.json", "model.weights=loaded"), "x") == here
    weights = load_file(there / "model.safetensors")
    save_file({k: v + (k == "wte.weight") for k, v in weights.items()}, there / "model.safetensors")
    assert identity(hf(there, "model.weights=loaded"), "x").setting != here.setting
    changed = identity(hf(tmp_path / "a", "model.changes.n_layer=3"), "x")
    (there / "config.json").write_text(json.dumps({**content, "n_layer": 3}))
    assert identity(hf(there), "x") == changed != identity(hf(tmp_path / "a"), "x")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_built_checked_and_counted(family, file):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 16, "ffn_dim": 48, "word_embed_proj_dim": 32}
    cfg = check(hf(file({"model_type": family, **sizes}), "model.context=16"))
    model = assemble(cfg)
    model.check(0)
    assert len(model.blocks) == 2 and {layer for layer, _ in model.places().values()} == {0, 1}
    # at least a product and a sum for each weight that is no embedding, three times
    used = sum(p.numel() for p in {id(p): p for b in model.blocks for p in b.parameters() if p.ndim == 2}.values())
    assert flops_per_token(cfg) >= 6 * used


def test_of_experts_those_that_are_asked_count(file):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 16, "model_type": "mixtral"}
    one, two = (flops_per_token(hf(file({**sizes, "num_experts_per_tok": k}))) for k in (1, 2))
    assert two - one == 3 * 2 * 3 * 32 * 48  # an expert's three matrices


@pytest.mark.process
def test_a_run_is_trained_found_and_the_same_after_a_stop(file, tmp_path):
    text = write_text(tmp_path / "text.txt")
    words = ["data=text_files", f"data.path={text}", "data.batch=4", "trainer=cpu", "trainer.threads=1"]
    words += [f"paths.cache={tmp_path / 'cache'}", "evaluation.tokens=256", "budget.steps=16", "evaluation.every=256"]
    config = file(GPT2)  # whose dropout is 0.1

    def cfg(runs):
        return check(hf(config, *words, f"paths.runs={tmp_path / runs}"))

    whole = train(cfg("whole"))
    cut = killed_and_gone_on(cfg("cut"), at=150)
    assert outcome(cut["folder"]) == outcome(whole["folder"])
    assert "model.config=config.json" in whole["name"] and "norm" not in whole["choices"]
    Path(config).unlink()  # the record holds all that is needed to build it again
    from albert_ablate.training.generate import load_kept

    assert load_kept(Path(whole["folder"]), "best")[1](tokens()).shape == (2, 16, 256)


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        ({}, [], "model_type=None"),
        ({"model_type": "nosuch"}, [], "model_type=nosuch"),
        ({"model_type": "t5", "d_model": 8}, ["model.context=8"], "not a causal language model"),
        ({**GPT2, "n_head": 3}, ["budget.steps=1"], "divisible"),
        (GPT2, ["model.context=17"], "model.context=17 is not allowed: .* has 16 positions"),
        (GPT2, ["model.changes.n_layerz=3"], "model.changes.n_layerz is unknown: GPT2Config has no such field"),
        (GPT2, ["model.layers=3"], "a field of the file is model.changes.layers"),
        (GPT2, ["model.weights=loaded"], "holds no weights"),
        (GPT2, ["norm=pre_ln"], "norm=pre_ln is not allowed with model=hf"),
        ({"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}, [], "not causal"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(content, more, says, file, tmp_path):
    with pytest.raises(ConfigError, match=says) as said:
        run(hf(file(content), f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", *more))
    assert "\n" not in str(said.value) and not (tmp_path / "runs").exists()


def test_a_sweep_server_may_not_name_a_file():
    refuse_untrusted(["model=hf", "model.changes.hidden_act=relu"])
    with pytest.raises(ConfigError, match="model.config is set by the user"):
        refuse_untrusted(["model.config=somewhere"])
    refuse_untrusted(["model.config=somewhere"], own_file=True)
