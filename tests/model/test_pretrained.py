"""Checkpoints of thirteen families, made here with random weights by transformers, against transformers' own models."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from albert_ablate import build_model, compose
from albert_ablate.config import ConfigError
from albert_ablate.model.pretrained import load_pretrained

transformers = pytest.importorskip("transformers", reason="the reference models are those of transformers")
transformers.logging.set_verbosity_error()
logging.getLogger("transformers").setLevel(logging.ERROR)

OPENAI = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 12, "embd_pdrop": 0.0}
OPENAI |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
LLAMA = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "pad_token_id": None}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 12, "initializer_range": 0.3}
LLAMA |= {"bos_token_id": None, "eos_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
WHOLE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
FAMILIES = {
    "gpt2": ("GPT2", {**OPENAI, "initializer_range": 0.3}),
    "gpt2 relu": ("GPT2", {**OPENAI, "activation_function": "relu", "n_inner": 20, "layer_norm_epsilon": 1e-2}),
    "openai-gpt": ("OpenAIGPT", {**OPENAI, "initializer_range": 0.3}),
    "llama": ("Llama", {**LLAMA, "rms_norm_eps": 1e-3}),
    "llama biased, tied": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama wide heads": ("Llama", {**LLAMA, "head_dim": 6}),
    "llama linear": ("Llama", {**LLAMA, "head_dim": 8, "rope_parameters": {
        "rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}}),
    "llama 3.1": ("Llama", {**LLAMA, "head_dim": 8, "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 50.0, "low_freq_factor": 0.25, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8}}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 4, "rms_norm_eps": 1e-3}),
    "mistral without a window": ("Mistral", {**LLAMA, "sliding_window": None, "head_dim": 6}),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 6, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}),
    "smollm3 rotary throughout": ("SmolLM3", {**LLAMA, "no_rope_layers": [1, 1, 1], "rms_norm_eps": 1e-3}),
    "phi3": ("Phi3", {**LLAMA, "rms_norm_eps": 1e-3}),
    "phi3 with a window": ("Phi3", {**LLAMA, "sliding_window": 4, "tie_word_embeddings": True}),
    "stablelm turned whole": ("StableLm", {**LLAMA, "layer_norm_eps": 1e-2, "rope_parameters": WHOLE}),
    "gpt_neox one after the other": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "layer_norm_eps": 1e-2,
                                                 "rope_parameters": WHOLE}),
    "gpt_neox tied": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "rope_parameters": WHOLE,
                                  "hidden_act": "gelu_new", "tie_word_embeddings": True}),
    "gemma": ("Gemma", {**LLAMA, "head_dim": 6, "rms_norm_eps": 1e-3}),
    "gemma relu": ("Gemma", {**LLAMA, "head_dim": 4, "hidden_act": "relu", "tie_word_embeddings": False}),
    "olmo": ("Olmo", LLAMA),
    "olmo2": ("Olmo2", {**LLAMA, "rms_norm_eps": 1e-3}),
    "gemma2": ("Gemma2", {**LLAMA, "head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 9,
                          "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gemma2 uncapped": ("Gemma2", {**LLAMA, "head_dim": 4, "sliding_window": 5, "attn_logit_softcapping": None,
                                   "final_logit_softcapping": None}),
}  # fmt: skip
HEAD = {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}


def reference(name, **more):
    """A model of transformers whose every parameter is random, norms too."""
    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**settings, **more})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, HEAD.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def tokens():
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))


def loss(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_model_has_transformers_logits_and_gradients(name, tmp_path):
    theirs = reference(name).train()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).train()
    logits = theirs(tokens()).logits
    torch.testing.assert_close(ours(tokens()), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours(tokens()), ours.eval()(tokens()))
    ours.train()
    assert logits.std() > 0.1
    loss(logits).backward()
    loss(ours(tokens())).backward()
    their_norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in theirs.parameters()]))
    our_norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in ours.parameters()]))
    torch.testing.assert_close(our_norm, their_norm, rtol=1e-3, atol=1e-5)
    their_embedding = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours.embedding.weight.grad, their_embedding, rtol=1e-3, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("shape", ["pickle", "shards"])
def test_weights_are_read_from_a_pickle_and_from_several_files(shape, tmp_path):
    theirs = reference("llama")
    if shape == "pickle":
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        theirs.save_pretrained(tmp_path, max_shard_size="4KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama biased, tied"])
def test_a_head_called_tied_is_read_as_transformers_does(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(again.lm_head.weight, head)
    ours = load_pretrained(tmp_path).eval()
    torch.testing.assert_close(ours(tokens()), again(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours(tokens()), theirs.eval()(tokens()).logits, atol=1)


def test_a_pickle_that_would_run_code_is_not_read(tmp_path):
    reference("llama").config.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="holds more than tensors"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "model_type", "mamba"),
        ("llama", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "hidden_act", "mish"),
        ("llama", "attention_bias", True),
        ("llama", "quantization_config", {"bits": 4}),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gemma2", "layer_types", ["full_attention"] * 3),
        ("openai-gpt", "afn", "mish"),
        ("mistral", "attention_bias", True),
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("gemma", "hidden_activation", "gelu"),
        ("olmo", "clip_qkv", 8.0),
        ("smollm3 rotary throughout", "no_rope_layers", [1, 0, 1]),
        ("phi3", "rope_parameters", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        ("phi3", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.75}),
        ("stablelm turned whole", "use_qkv_bias", True),
        ("stablelm turned whole", "qk_layernorm", True),
        ("stablelm turned whole", "use_parallel_residual", True),
        ("gpt_neox one after the other", "use_parallel_residual", True),
        ("gpt_neox one after the other", "attention_bias", False),
        ("olmo", "rope_parameters", {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_named(name, field, value, tmp_path):
    reference(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    named = "partial_rotary_factor" if "partial_rotary_factor" in str(value) else field
    with pytest.raises(ConfigError, match=named) as said:
        load_pretrained(tmp_path)
    assert str(said.value).count(". ") == 0


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_positions_of_older_releases_are_the_same(kind, tmp_path):
    name = {"linear": "llama linear", "llama3": "llama 3.1"}[kind]
    reference(name).save_pretrained(tmp_path)
    expected = load_pretrained(tmp_path).eval()(tokens())
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    scaling = content.pop("rope_parameters")
    content["rope_theta"] = scaling.pop("rope_theta")
    if kind == "linear":
        scaling = {"type": "linear", "factor": scaling["factor"]}
    file.write_text(json.dumps({**content, "rope_scaling": scaling}))
    assert torch.equal(load_pretrained(tmp_path).eval()(tokens()), expected)
    file.write_text(json.dumps(content))
    assert not torch.allclose(load_pretrained(tmp_path).eval()(tokens()), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["mistral", "gemma", "olmo", "phi3", "gpt_neox tied", "stablelm turned whole"])
def test_shards_and_half_precision_of_other_families(name, tmp_path):
    theirs = reference(name).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = type(theirs).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    expected = again.eval()(tokens()).logits
    torch.testing.assert_close(load_pretrained(tmp_path).eval()(tokens()), expected, rtol=1e-4, atol=1e-4)


def test_a_context_within_the_window_needs_no_window(tmp_path):
    reference("mistral").save_pretrained(tmp_path)
    words = [
        "model=pretrained",
        f"model.path={tmp_path}",
        "tokenizer=file",
        f"tokenizer.path={made_tokenizer(tmp_path)}",
    ]
    assert compose(words).attention.window == 4
    short = compose([*words, "model.context=4"])
    assert short.attention.window is None
    ours = build_model(short).eval()
    torch.testing.assert_close(ours(tokens()[:, :4]), load_pretrained(tmp_path).eval()(tokens()[:, :4]))


def made_tokenizer(folder):
    """A tokenizer.json of forty words."""
    words = {f"w{k}": k for k in range(40)}
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    content |= {"pre_tokenizer": {"type": "Whitespace"}, "normalizer": None, "post_processor": None, "decoder": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("Qwen2", "a bias"),
        ("Phi", "partial_rotary_factor"),
        ("Gemma3Text", "rope_local_base_freq"),
    ],
)
def test_a_family_of_another_structure_is_refused_with_why(family, setting, tmp_path):
    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"which this model cannot represent: .*{setting}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["GPTNeoX", "StableLm"])
def test_positions_that_turn_a_part_of_a_head_are_refused(family, tmp_path):
    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)  # as the published ones are
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    del content["rope_parameters"]  # of older releases
    for more, named in (({}, "partial_rotary_factor=0.25"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor")):
        file.write_text(json.dumps(content | more))
        with pytest.raises(ConfigError, match=named):
            load_pretrained(tmp_path)
    if family == "GPTNeoX":
        file.write_text(json.dumps(content | {"rotary_pct": 0.25, "rotary_emb_base": 10_000}))
        with pytest.raises(ConfigError, match="rotary_pct=0.25"):
            load_pretrained(tmp_path)


def test_gpt_neox_of_older_releases_is_the_same(tmp_path):
    reference("gpt_neox one after the other").save_pretrained(tmp_path)
    expected = load_pretrained(tmp_path).eval()(tokens())
    file, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    content = json.loads(file.read_text())
    del content["rope_parameters"]
    file.write_text(json.dumps(content | {"rotary_pct": 1.0, "rotary_emb_base": 500}))
    held = load_file(weights)
    now, other = sorted(("embed_out.weight", "lm_head.weight"), key=held.__contains__, reverse=True)
    held[other] = held.pop(now)  # releases have saved it under either name
    save_file(held, weights, metadata={"format": "pt"})
    assert torch.equal(load_pretrained(tmp_path).eval()(tokens()), expected)


def test_weights_that_do_not_fit_or_are_missing_are_refused(tmp_path):
    reference("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "intermediate_size": 32}))
    with pytest.raises(ConfigError, match="blocks.0.mlp.down.weight is 16 x 24 instead of 16 x 32"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        load_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        load_pretrained(tmp_path)
