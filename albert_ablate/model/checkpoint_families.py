"""What the families of checkpoints are as configuration nodes of a Decoder. Field names are those of transformers 5."""

from collections.abc import Callable
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.model.checkpoint_fields import ACTIVATIONS, ConfigFields
from albert_ablate.model.checkpoint_names import (
    PRE,
    QWEN3,
    REORDERED,
    SANDWICH,
    Weights,
    names_of_gpt_neox,
    names_of_llama,
    names_of_openai,
    names_of_phi3,
)

Structure = dict[str, dict[str, Any]]


def _nodes(placement: str, norm_type: str, eps: float, attention: dict, model: dict, vocabulary: int) -> Structure:
    home = "albert_ablate.model"
    return {
        "norm": {"_target_": f"{home}.placements.{placement}"},
        "norm_type": {"_target_": f"{home}.norms.{norm_type}", "eps": eps},
        "attention": {"_target_": f"{home}.attention.CausalAttention", **attention},
        "model": {"_target_": f"{home}.decoder.Decoder", **model},
        "tokenizer": {"vocabulary": vocabulary},
    }


def _gpt2(f: ConfigFields) -> Structure:
    f.only("scale_attn_weights", True)
    f.only("scale_attn_by_inverse_layer_idx", False)
    f.only("add_cross_attention", False)
    f.take("reorder_and_upcast_attn")  # the same numbers in float32
    hidden = f.count("n_inner") if f.take("n_inner") is not None else None
    return _of_openai(f, "PreLN", f.activation("activation_function", "gelu_new"), hidden)


def _openai_gpt(f: ConfigFields) -> Structure:
    activation = f.take("afn", "gelu")
    if activation == "gelu":  # what this family calls gelu is the tanh form
        activation = "gelu_new"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        f.refuse("afn", activation)
    return _of_openai(f, "PostLN", ACTIVATIONS[activation], None)


def _of_openai(f: ConfigFields, placement: str, activation: str, hidden: int | None) -> Structure:
    width = f.count("n_embd")
    model = {
        "layers": f.count("n_layer"),
        "width": width,
        "heads": f.count("n_head"),
        "context": f.count("n_positions"),
        "hidden": hidden or 4 * width,
        "activation": activation,
        "tied": f.flag("tie_word_embeddings", True),
        "bias": True,
        "embedding_scale": 1.0,
    }
    eps = f.number("layer_norm_epsilon", 1e-5)
    return _nodes(placement, "layer_norm", eps, {"positions": "learned"}, model, f.count("vocab_size"))


def _of_llama(
    f: ConfigFields, placement: str, norm_type: str, eps: float, tied: bool, turned: float = 1.0, **attention: Any
) -> Structure:
    width, heads = f.count("hidden_size"), f.count("num_attention_heads")
    bias = f.flag("attention_bias", False)
    if f.flag("mlp_bias", False) != bias:
        raise ConfigError(f"{f.file} has attention_bias={bias} and another mlp_bias: this model has both or neither.")
    tied = f.flag("tie_word_embeddings", tied)
    model = {
        "layers": f.count("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "context": f.count("max_position_embeddings"),
        "hidden": f.count("intermediate_size"),
        "activation": f.activation("hidden_activation", f.take("hidden_act", "silu")),
        "gated": True,
        "tied": tied,
        "bias": bias,
        "embedding_scale": 1.0,
    }
    attention |= {
        "positions": "rotary",
        **f.rotary(turned),
        "kv_heads": f.count("num_key_value_heads", heads),
        "head_width": f.count("head_dim", width // heads or None),
    }
    eps = f.number("layer_norm_eps" if norm_type == "layer_norm" else "rms_norm_eps", eps)
    return _nodes(placement, norm_type, eps, attention, model, f.count("vocab_size"))


def _llama(f: ConfigFields) -> Structure:
    return _of_llama(f, "PreLN", "rms_norm", 1e-6, tied=False)


def _full_attention(f: ConfigFields) -> None:
    """Refuse layers that do not see all that is before them."""
    f.only("layer_types", ["full_attention"] * f.count("num_hidden_layers"))


def _mistral(f: ConfigFields) -> Structure:
    f.need("num_key_value_heads")  # whose absence would mean 8, whatever the number of heads
    # absent it is transformers' 4096, null is none
    window = f.count("sliding_window", 4096) if f.content.get("sliding_window", 4096) is not None else None
    nodes = _of_llama(f, "PreLN", "rms_norm", 1e-6, tied=False)
    nodes["attention"]["window"] = window
    return nodes


def _qwen3(f: ConfigFields) -> Structure:
    f.only("use_sliding_window", False)
    f.take("sliding_window")  # which counts with that alone, as do the layers it is for
    f.take("max_window_layers")
    _full_attention(f)
    for name in ("num_key_value_heads", "head_dim"):  # whose absence would mean 32 and 128
        f.need(name)
    nodes = _of_llama(f, "PreLN", "rms_norm", 1e-6, tied=False, qk_norm="rms_head")
    nodes["attention"]["qk_eps"] = nodes["norm_type"]["eps"]
    return nodes


def _smollm3(f: ConfigFields) -> Structure:
    f.only("use_sliding_window", False)
    f.take("sliding_window")  # which counts with that alone
    f.take("no_rope_layer_interval")  # by which the next was made
    f.need("no_rope_layers")  # whose absence would mean that each fourth layer has no positions
    f.only("no_rope_layers", [1] * f.count("num_hidden_layers"))
    _full_attention(f)
    f.need("num_key_value_heads")  # whose absence would mean 4
    return _of_llama(f, "PreLN", "rms_norm", 1e-6, tied=True)


def _phi3(f: ConfigFields) -> Structure:
    f.take("original_max_position_embeddings")  # which counts where positions are scaled by it: that is refused
    window = f.count("sliding_window") if f.take("sliding_window") is not None else None
    nodes = _of_llama(f, "PreLN", "rms_norm", 1e-5, tied=False)
    nodes["attention"]["window"] = window
    return nodes


def _stablelm(f: ConfigFields) -> Structure:
    for name in ("use_qkv_bias", "qk_layernorm", "use_parallel_residual"):
        f.only(name, False)
    f.need("num_key_value_heads")  # whose absence would mean 32
    return _of_llama(f, "PreLN", "layer_norm", 1e-5, tied=False, turned=0.25)


def _gpt_neox(f: ConfigFields) -> Structure:
    f.only("attention_bias", True)
    f.take("rotary_emb_base")
    f.content = {"rope_theta": f.content.get("rotary_emb_base"), **f.content}
    f.take("classifier_dropout")
    positions = {"positions": "rotary", **f.rotary(turned=0.25)}
    if f.flag("use_parallel_residual", True):
        f.refuse("use_parallel_residual", True)
    model = {
        "layers": f.count("num_hidden_layers"),
        "width": f.count("hidden_size"),
        "heads": f.count("num_attention_heads"),
        "context": f.count("max_position_embeddings"),
        "hidden": f.count("intermediate_size"),
        "activation": f.activation("hidden_act", "gelu"),
        "tied": f.flag("tie_word_embeddings", False),
        "bias": True,
        "embedding_scale": 1.0,
    }
    eps = f.number("layer_norm_eps", 1e-5)
    return _nodes("PreLN", "layer_norm", eps, positions, model, f.count("vocab_size"))


def _gemma(f: ConfigFields) -> Structure:
    f.only("use_bidirectional_attention", False)
    f.content = {"hidden_act": "gelu_pytorch_tanh"} | {k: v for k, v in f.content.items() if v is not None}
    if "hidden_activation" in f.content:  # of older releases, where it counted
        f.only("hidden_activation", f.take("hidden_act"))
    for name in ("num_key_value_heads", "head_dim"):  # whose absence would mean 16 and 256
        f.need(name)
    nodes = _of_llama(f, "PreLN", "zero_centred_rms_norm", 1e-6, tied=True)
    nodes["model"]["embedding_scale"] = nodes["model"]["width"] ** 0.5
    return nodes


def _olmo(f: ConfigFields) -> Structure:
    f.only("clip_qkv", None)
    nodes = _of_llama(f, "PreLN", "layer_norm", 1e-5, tied=False)
    nodes["norm_type"] |= {"eps": 1e-5, "bias": False, "gain": False}  # the eps is not in the configuration
    return nodes


def _olmo2(f: ConfigFields) -> Structure:
    nodes = _of_llama(f, "ReorderedLN", "rms_norm", 1e-5, tied=False, qk_norm="rms_whole")
    nodes["attention"]["qk_eps"] = nodes["norm_type"]["eps"]
    return nodes


def _gemma2(f: ConfigFields) -> Structure:
    f.only("use_bidirectional_attention", False)
    f.take("hidden_act")  # hidden_activation counts
    f.content = {"hidden_activation": "gelu_pytorch_tanh"} | {k: v for k, v in f.content.items() if v is not None}
    window = f.count("sliding_window") if f.take("sliding_window") is not None else None
    layers = f.count("num_hidden_layers")
    pattern = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    f.only("layer_types", pattern)
    nodes = _of_llama(f, "SandwichLN", "zero_centred_rms_norm", 1e-6, tied=True)
    nodes["attention"] |= {
        "head_width": f.count("head_dim"),
        "softcap": f.number("attn_logit_softcapping", 50.0) if f.take("attn_logit_softcapping") else None,
        "window": window,
        "full_every": 2 if window else None,
        "scale": f.number("query_pre_attn_scalar", 256) ** -0.5,
    }
    nodes["model"]["logit_softcap"] = (
        f.number("final_logit_softcapping", 30.0) if f.take("final_logit_softcapping") else None
    )
    nodes["model"]["embedding_scale"] = nodes["model"]["width"] ** 0.5
    return nodes


# what of a family's structure stands in the way, so that no choice of numbers could help
UNLIKE = {
    "qwen2": "its queries, keys and values have a bias and its other matrices have none (model.bias is for all)",
    "phi": "rotary positions turn a part of each head (partial_rotary_factor), and its head has a bias",
    "gemma3_text": "its two kinds of layers have rotary positions of different bases (rope_local_base_freq)",
    "gemma3": "it reads images, and its two kinds of layers have rotary positions of different bases",
    "granite": "its branches and logits have multipliers (residual_multiplier, logits_scaling)",
    "gpt_neo": "its queries, keys and values have no bias and its other matrices have one (model.bias is for all)",
    "mixtral": "its MLP is a mixture of experts (num_local_experts)",
}
READERS: dict[str, tuple[Callable[[ConfigFields], Structure], Callable[[Weights, int, int], Weights]]] = {
    "gpt2": (_gpt2, lambda w, layers, heads: names_of_openai(w, layers, "wte", "wpe")),
    "openai-gpt": (_openai_gpt, lambda w, layers, heads: names_of_openai(w, layers, "tokens_embed", "positions_embed")),
    "llama": (_llama, lambda w, layers, heads: names_of_llama(w, layers, PRE)),
    "mistral": (_mistral, lambda w, layers, heads: names_of_llama(w, layers, PRE)),
    "qwen3": (_qwen3, lambda w, layers, heads: names_of_llama(w, layers, QWEN3)),
    "gemma": (_gemma, lambda w, layers, heads: names_of_llama(w, layers, PRE)),
    "olmo": (_olmo, lambda w, layers, heads: names_of_llama(w, layers, {})),
    "olmo2": (_olmo2, lambda w, layers, heads: names_of_llama(w, layers, REORDERED)),
    "gemma2": (_gemma2, lambda w, layers, heads: names_of_llama(w, layers, SANDWICH)),
    "smollm3": (_smollm3, lambda w, layers, heads: names_of_llama(w, layers, PRE)),
    "phi3": (_phi3, lambda w, layers, heads: names_of_phi3(w, layers)),
    "stablelm": (_stablelm, lambda w, layers, heads: names_of_llama(w, layers, PRE)),
    "gpt_neox": (_gpt_neox, names_of_gpt_neox),
}  # by model_type: what config.json says, and the weights under our names, given layers and heads
