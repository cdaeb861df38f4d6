"""Models others have trained: a folder as Hugging Face writes it (config.json and weights) to a Decoder.

What a checkpoint's configuration says is mapped, known to change nothing, or refused. Field names are those of
transformers 5.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from albert_ablate.config import (
    Config,
    ConfigError,
    Count,
    Location,
    component_arguments,
    component_with_defaults,
    conf_folder,
    construct,
)
from albert_ablate.model.decoder import Decoder, Parts
from albert_ablate.model.dropout import Clock, NoDropout
from albert_ablate.model.weight_files import read_json, shapes, stamp, tensors, weight_files, weights_hash
from albert_ablate.streams import digest

Structure = dict[str, dict[str, Any]]
Weights = dict[str, Tensor]

# gelu_new and gelu_pytorch_tanh are one formula
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
ACTIVATIONS |= {"relu2": "relu2", "silu": "silu", "swish": "silu"}
# about the file, the tokens, generation, another head or how training began: no effect on the logits
SILENT = {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"}
SILENT |= {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "task_specific_params", "id2label"}
SILENT |= {"label2id", "gradient_checkpointing", "n_ctx", "n_special", "predict_special_tokens", "output_past"}
SILENT |= {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
SILENT |= {"pretraining_tp", "cache_implementation", "return_dict", "is_llama_config", "max_sequence_length"}
SILENT |= {"transformers.js_config", "auto_map", "tokenizer_class", "problem_type", "finetuning_task", "torchscript"}
SILENT |= {"output_attentions", "output_hidden_states", "unsloth_version", "unsloth_fixed", "chunk_size_feed_forward"}
SILENT |= {"_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "attn_implementation", "prefix"}
SILENT |= {
    "sep_token_id",
    "decoder_start_token_id",
    "vocab_type",
    "language",
    "license",
    "ignore_index",
    "tf_legacy_loss",
}
# how text is generated, which older releases of transformers wrote here
SILENT |= {"max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping", "num_beams"}
SILENT |= {
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "bad_words_ids",
}
SILENT |= {"repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"}
SILENT |= {"num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "suppress_tokens"}
SILENT |= {"forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "begin_suppress_tokens"}
# dropout is chosen by the arm, not by the checkpoint
SILENT |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout", "dropout"}


class _Fields:
    """A config.json that notes what has been read, so that what nobody has read can be refused."""

    def __init__(self, content: Mapping, file: Path):
        self.content, self.file, self.known = content, file, set(SILENT)

    def take(self, name: str, default: Any = None) -> Any:
        """The field, `default` where it is absent or null."""
        self.known.add(name)
        value = self.content.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.take(name)
        if value is None:
            raise ConfigError(f"{self.file} names no {name}.")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; it must be there where there is no default."""
        value = self.need(name) if default is None else self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 10**9:
            raise ConfigError(f"{self.file} has {name}={value}: it must be a whole number from 1.")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{self.file} has {name}={value}: it must be a number above 0.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.file} has {name}={value}: it must be true or false.")
        return value

    def only(self, name: str, allowed: Any) -> None:
        """Refuse any value but `allowed`, which is also what an absent field means."""
        value = self.take(name, allowed)
        if value != allowed:
            self.refuse(name, value)

    def refuse(self, name: str, value: Any) -> None:
        raise ConfigError(f"{self.file} has {name}={value}, which this model cannot do.")

    def activation(self, name: str, default: str) -> str:
        value = self.take(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.refuse(name, value)
        return ACTIVATIONS[value]

    def rotary(self) -> dict[str, Any]:
        """Arguments of the attention for rotary positions.

        rope_theta stands in its own field or, since transformers 5, in rope_parameters, where the scaling stands that
        was rope_scaling: linear and llama3 are known, others refused.
        """
        name = "rope_parameters" if self.content.get("rope_parameters") is not None else "rope_scaling"
        for other in ("rope_parameters", "rope_scaling"):
            self.take(other)
        written = self.take(name, {})
        if not isinstance(written, Mapping):
            self.refuse(name, written)
        inner = _Fields({"rope_theta": self.take("rope_theta"), **written}, self.file)
        kind = inner.take("rope_type", inner.take("type", "default"))
        inner.known.add("type")
        out: dict[str, Any] = {"rotary_base": inner.number("rope_theta", 10_000.0)}
        inner.only("partial_rotary_factor", 1.0)
        if kind in ("linear", "llama3"):
            inner.need("factor")
            out["rotary_factor"] = inner.number("factor", 1.0)
            inner.take("original_max_position_embeddings")
        if kind == "llama3":
            for band in ("low_freq_factor", "high_freq_factor"):
                inner.need(band)
            low, high = inner.number("low_freq_factor", 1.0), inner.number("high_freq_factor", 4.0)
            if low >= high or out["rotary_factor"] == 1:
                self.refuse(name, written)
            out["rotary_bands"] = [low, high, inner.count("original_max_position_embeddings")]
        if kind not in ("default", "linear", "llama3") or any(k not in inner.known for k in written):
            self.refuse(name, written)
        return out

    def done(self) -> None:
        for name, value in self.content.items():
            if name not in self.known and value not in (None, False, {}, []):
                self.refuse(name, value)


def _nodes(placement: str, norm_type: str, eps: float, attention: dict, model: dict, vocabulary: int) -> Structure:
    home = "albert_ablate.model"
    return {
        "norm": {"_target_": f"{home}.placements.{placement}"},
        "norm_type": {"_target_": f"{home}.norms.{norm_type}", "eps": eps},
        "attention": {"_target_": f"{home}.attention.CausalAttention", **attention},
        "model": {"_target_": f"{home}.decoder.Decoder", **model},
        "tokenizer": {"vocabulary": vocabulary},
    }


def _gpt2(f: _Fields) -> Structure:
    f.only("scale_attn_weights", True)
    f.only("scale_attn_by_inverse_layer_idx", False)
    f.only("add_cross_attention", False)
    f.take("reorder_and_upcast_attn")  # the same numbers in float32
    hidden = f.count("n_inner") if f.take("n_inner") is not None else None
    return _of_openai(f, "PreLN", f.activation("activation_function", "gelu_new"), hidden)


def _openai_gpt(f: _Fields) -> Structure:
    activation = f.take("afn", "gelu")
    if activation == "gelu":  # what this family calls gelu is the tanh form
        activation = "gelu_new"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        f.refuse("afn", activation)
    return _of_openai(f, "PostLN", ACTIVATIONS[activation], None)


def _of_openai(f: _Fields, placement: str, activation: str, hidden: int | None) -> Structure:
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


def _of_llama(f: _Fields, placement: str, norm_type: str, eps: float, tied: bool, **attention: Any) -> Structure:
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
        **f.rotary(),
        "kv_heads": f.count("num_key_value_heads", heads),
        "head_width": f.count("head_dim", width // heads or None),
    }
    eps = f.number("rms_norm_eps", eps)
    return _nodes(placement, norm_type, eps, attention, model, f.count("vocab_size"))


def _llama(f: _Fields) -> Structure:
    return _of_llama(f, "PreLN", "rms_norm", 1e-6, tied=False)


def _full_attention(f: _Fields) -> None:
    """Refuse layers that do not see all that is before them."""
    f.only("layer_types", ["full_attention"] * f.count("num_hidden_layers"))


def _mistral(f: _Fields) -> Structure:
    f.need("num_key_value_heads")  # whose absence would mean 8, whatever the number of heads
    # absent it is transformers' 4096, null is none
    window = f.count("sliding_window", 4096) if f.content.get("sliding_window", 4096) is not None else None
    nodes = _of_llama(f, "PreLN", "rms_norm", 1e-6, tied=False)
    nodes["attention"]["window"] = window
    return nodes


def _qwen3(f: _Fields) -> Structure:
    f.only("use_sliding_window", False)
    f.take("sliding_window")  # which counts with that alone, as do the layers it is for
    f.take("max_window_layers")
    _full_attention(f)
    for name in ("num_key_value_heads", "head_dim"):  # whose absence would mean 32 and 128
        f.need(name)
    nodes = _of_llama(f, "PreLN", "rms_norm", 1e-6, tied=False, qk_norm="rms_head")
    nodes["attention"]["qk_eps"] = nodes["norm_type"]["eps"]
    return nodes


def _gemma(f: _Fields) -> Structure:
    f.only("use_bidirectional_attention", False)
    f.content = {"hidden_act": "gelu_pytorch_tanh"} | {k: v for k, v in f.content.items() if v is not None}
    if "hidden_activation" in f.content:  # of older releases, where it counted
        f.only("hidden_activation", f.take("hidden_act"))
    for name in ("num_key_value_heads", "head_dim"):  # whose absence would mean 16 and 256
        f.need(name)
    nodes = _of_llama(f, "PreLN", "zero_centred_rms_norm", 1e-6, tied=True)
    nodes["model"]["embedding_scale"] = nodes["model"]["width"] ** 0.5
    return nodes


def _olmo(f: _Fields) -> Structure:
    f.only("clip_qkv", None)
    nodes = _of_llama(f, "PreLN", "layer_norm", 1e-5, tied=False)
    nodes["norm_type"] |= {"eps": 1e-5, "bias": False, "gain": False}  # the eps is not in the configuration
    return nodes


def _olmo2(f: _Fields) -> Structure:
    nodes = _of_llama(f, "ReorderedLN", "rms_norm", 1e-5, tied=False, qk_norm="rms_whole")
    nodes["attention"]["qk_eps"] = nodes["norm_type"]["eps"]
    return nodes


def _gemma2(f: _Fields) -> Structure:
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


def _names_of_openai(w: Weights, layers: int, embedding: str, positions: str) -> Weights:
    w = {name.removeprefix("transformer."): tensor for name, tensor in w.items()}
    ends = {f"{embedding}.weight": "embedding.weight", f"{positions}.weight": "positions.weight"}
    ends |= {"ln_f.weight": "final_norm.weight", "ln_f.bias": "final_norm.bias"}
    out = {ours: w.pop(name) for name, ours in ends.items() if name in w}
    parts = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.output", "mlp.c_fc": "mlp.up"}
    parts |= {"mlp.c_proj": "mlp.down", "ln_1": "around_attention.norm", "ln_2": "around_mlp.norm"}
    for layer in range(layers):
        for theirs, ours in parts.items():
            for leaf in ("weight", "bias"):
                tensor = w.pop(f"h.{layer}.{theirs}.{leaf}", None)
                if tensor is None:
                    continue
                # their matrices are stored with inputs along the rows
                out[f"blocks.{layer}.{ours}.{leaf}"] = tensor.T if tensor.ndim == 2 else tensor
        for mask in ("bias", "masked_bias"):  # the causal mask, which older files hold
            w.pop(f"h.{layer}.attn.{mask}", None)
    return out | w


def _names_of_llama(w: Weights, layers: int, norms: Mapping[str, str]) -> Weights:
    w = {name.removeprefix("model."): tensor for name, tensor in w.items()}
    ends = {"embed_tokens.weight": "embedding.weight", "norm.weight": "final_norm.weight"}
    out = {ours: w.pop(name) for name, ours in ends.items() if name in w}
    parts = {"self_attn.o_proj": "attention.output", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up"}
    parts |= {"mlp.down_proj": "mlp.down", **norms}
    for layer in range(layers):
        home = f"layers.{layer}."
        for leaf in ("weight", "bias"):
            three = [w.pop(f"{home}self_attn.{p}_proj.{leaf}", None) for p in "qkv"]
            present = [t for t in three if t is not None]
            if len(present) == 3:
                out[f"blocks.{layer}.attention.qkv.{leaf}"] = torch.cat(present)
        for theirs, ours in parts.items():
            for leaf in ("weight", "bias"):
                if f"{home}{theirs}.{leaf}" in w:
                    out[f"blocks.{layer}.{ours}.{leaf}"] = w.pop(f"{home}{theirs}.{leaf}")
        w.pop(f"{home}self_attn.rotary_emb.inv_freq", None)  # computed from the base
    return out | w


_PRE = {"input_layernorm": "around_attention.norm", "post_attention_layernorm": "around_mlp.norm"}
_REORDERED = {"post_attention_layernorm": "around_attention.norm", "post_feedforward_layernorm": "around_mlp.norm"}
_REORDERED |= {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}
_SANDWICH = {"input_layernorm": "around_attention.norm_in", "post_attention_layernorm": "around_attention.norm_out"}
_SANDWICH |= {"pre_feedforward_layernorm": "around_mlp.norm_in", "post_feedforward_layernorm": "around_mlp.norm_out"}

_QWEN3 = {**_PRE, "self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}

# what of a family's structure stands in the way, so that no choice of numbers could help
UNLIKE = {
    "qwen2": "its queries, keys and values have a bias and its other matrices have none (model.bias is for all)",
    "gpt_neox": "rotary positions turn a part of each head (rotary_pct), and its parallel block has two norms",
    "stablelm": "rotary positions turn a part of each head (partial_rotary_factor)",
    "phi": "rotary positions turn a part of each head (partial_rotary_factor), and its head has a bias",
    "gemma3_text": "its two kinds of layers have rotary positions of different bases (rope_local_base_freq)",
    "gemma3": "it reads images, and its two kinds of layers have rotary positions of different bases",
    "granite": "its branches and logits have multipliers (residual_multiplier, logits_scaling)",
    "gpt_neo": "its queries, keys and values have no bias and its other matrices have one (model.bias is for all)",
    "mixtral": "its MLP is a mixture of experts (num_local_experts)",
}
EMBEDDINGS = ("wte", "tokens_embed", "embed_tokens")  # what the families call it
READERS: dict[str, tuple[Callable[[_Fields], Structure], Callable[[Weights, int], Weights]]] = {
    "gpt2": (_gpt2, lambda w, layers: _names_of_openai(w, layers, "wte", "wpe")),
    "openai-gpt": (_openai_gpt, lambda w, layers: _names_of_openai(w, layers, "tokens_embed", "positions_embed")),
    "llama": (_llama, lambda w, layers: _names_of_llama(w, layers, _PRE)),
    "mistral": (_mistral, lambda w, layers: _names_of_llama(w, layers, _PRE)),
    "qwen3": (_qwen3, lambda w, layers: _names_of_llama(w, layers, _QWEN3)),
    "gemma": (_gemma, lambda w, layers: _names_of_llama(w, layers, _PRE)),
    "olmo": (_olmo, lambda w, layers: _names_of_llama(w, layers, {})),
    "olmo2": (_olmo2, lambda w, layers: _names_of_llama(w, layers, _REORDERED)),
    "gemma2": (_gemma2, lambda w, layers: _names_of_llama(w, layers, _SANDWICH)),
}


def structure(folder: str | Path) -> Structure:
    """What a checkpoint says, as configuration nodes: norm, norm_type, attention, model and, under tokenizer, how many
    rows its embedding has.

    All but one thing stands in config.json: where that says that the head is the embedding and the weights hold another
    head, they are two matrices, as transformers reads it. Raises ConfigError with one sentence for a model_type or a
    field that would have to be left out, and for weights that are not all there or do not fit.
    """
    folder = Path(folder).expanduser()
    nodes = _of_config(folder)[0]
    nodes["model"]["tied"] = _is_tied(folder, stamp(folder))
    return nodes


def _of_config(folder: Path) -> tuple[Structure, str]:
    """What config.json says, and its model_type."""
    file = folder / "config.json"
    content = read_json(file)
    kind = content.get("model_type")
    if isinstance(kind, str) and kind in UNLIKE:
        raise ConfigError(f"{file} has model_type={kind}, which this model cannot be: {UNLIKE[kind]}.")
    if not isinstance(kind, str) or kind not in READERS:
        raise ConfigError(
            f"{file} has model_type={kind}, which cannot be read: it must be one of {', '.join(READERS)}."
        )
    fields = _Fields(content, file)
    nodes = READERS[kind][0](fields)
    fields.done()
    _check_heads(nodes, file)
    return nodes, kind


@lru_cache(16)
def _is_tied(folder: Path, read: tuple) -> bool:
    """Whether the head is the embedding, of files as they were when they were `read`; all weights are there and fit."""
    nodes, kind = _of_config(folder)
    held = shapes(folder)
    nodes["model"]["tied"] = nodes["model"]["tied"] and not _has_another_head(folder, held)
    _fitted(_decoder(nodes, NoDropout(), 0), kind, held, folder)
    return nodes["model"]["tied"]


def _check_heads(nodes: Structure, file: Path) -> None:
    """Refuse what config.json may say and no model can be."""
    model, attention = nodes["model"], nodes["attention"]
    width, heads = model["width"], model["heads"]
    if attention.get("head_width") is None and width % heads:
        raise ConfigError(f"{file} has a width of {width}, which its {heads} heads do not divide.")
    if heads % (attention.get("kv_heads") or heads):
        raise ConfigError(f"{file} has num_key_value_heads={attention['kv_heads']}, which do not divide {heads} heads.")
    if attention["positions"] == "rotary" and (attention.get("head_width") or width // heads) % 2:
        raise ConfigError(f"{file} has heads of {attention['head_width']} dimensions, which rotary positions pair.")


def _has_another_head(folder: Path, held: Mapping[str, Tensor]) -> bool:
    embeddings = [name for name in held if name.split(".")[-2:-1] in ([e] for e in EMBEDDINGS)]
    if "lm_head.weight" not in held or len(embeddings) != 1:
        return False
    weights = tensors(folder, {"lm_head.weight", *embeddings})
    return not torch.equal(weights["lm_head.weight"], weights[embeddings[0]])


def _decoder(nodes: Structure, dropout: NoDropout, seed: int) -> Decoder:
    """The model of a structure on the meta device."""
    with torch.device("meta"):
        parts = Parts(
            vocabulary=nodes["tokenizer"]["vocabulary"],
            **{
                part: construct({**nodes[key], "_partial_": True})
                for part, key in (("norm", "norm_type"), ("placement", "norm"), ("attention", "attention"))
            },
            dropout=dropout,
            clock=Clock(seed),
        )
        return construct({**nodes["model"], "_partial_": True})(parts)


@torch.no_grad()
def load_pretrained(folder: str | Path, seed: int = 0) -> Decoder:
    """A trained model from a folder in Hugging Face's layout: `model(tokens)` gives logits, (B, T) -> (B, T, V).

    model_type one of READERS; placement, norm, activation, heads, positions and constants are read from config.json,
    weights from model.safetensors or pytorch_model.bin, whole or in parts, to float32. Without dropout, in training
    mode; seed: of the model's clock. Raises ConfigError with one sentence for what is not covered.
    """
    model = _decoder(structure(folder), NoDropout(), seed)
    copy_weights(model, folder)
    return model


@torch.no_grad()
def copy_weights(model: Decoder, folder: str | Path) -> None:
    """Give a model of the checkpoint's structure, on any device, the checkpoint's weights."""
    folder = Path(folder).expanduser()
    kind = read_json(folder / "config.json")["model_type"]
    renamed = _fitted(model, kind, tensors(folder), folder)
    if any(p.is_meta for p in model.parameters()):
        model.fill(0)
    for name, parameter in model.named_parameters():
        parameter.copy_(renamed[name])


def _fitted(model: Decoder, kind: str, theirs: Weights, folder: Path) -> Weights:
    """A checkpoint's weights under our names, each of the shape that the model has."""
    renamed = READERS[kind][1](dict(theirs), len(model.blocks))
    head = renamed.pop("lm_head.weight", None)
    if head is not None and not model.tied:
        renamed["head.weight"] = head
    elif head is not None:
        renamed.setdefault("embedding.weight", head)  # some files hold the one matrix under this name
    if model.positions is not None and "positions.weight" in renamed:
        renamed["positions.weight"] = renamed["positions.weight"][: model.context]
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    given = {name: tensor.shape for name, tensor in renamed.items()}
    if expected != given:
        odd = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        raise ConfigError(
            f"The weights in {folder} do not fit its config.json: {odd[0]} is {_shape(given.get(odd[0]))} "
            f"instead of {_shape(expected.get(odd[0]))}."
        )
    return renamed


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


class Pretrained(Decoder):
    """A Decoder that begins with a checkpoint's weights instead of drawn ones.

    path: the folder, in Hugging Face's layout; weights: hash of its weights, part of who a run is; the rest as in
    Decoder. A context below the checkpoint's keeps the first of its learned positions. An embedding with more rows than
    the tokenizer has tokens keeps them, and the head its numbers for them, as in the model that it is.
    """

    def __init__(self, parts: Parts, /, path: Location, weights: str, **structure: Any):
        super().__init__(replace(parts, vocabulary=_rows_of(path)), **structure)
        self.path = path

    @staticmethod
    def verify(cfg: Config) -> None:
        Decoder.verify(cfg)
        theirs = _rows_of(cfg.model.path)
        ours = construct(cfg.tokenizer).vocabulary
        if ours > theirs:
            name = (cfg.choices or {}).get("tokenizer") or "this one"
            raise ConfigError(
                f"tokenizer={name} has {ours} tokens and the checkpoint in {cfg.model.path} only {theirs}: take "
                "its own, tokenizer=file tokenizer.path=TOKENIZER.JSON."
            )

    @torch.no_grad()
    def fill(self, seed: int, device: torch.device | str = "cpu") -> dict[str, str]:
        """The checkpoint's weights on `device`; gives the hash of each."""
        super().fill(seed, device)
        copy_weights(self, self.path)
        return {name: digest(p.detach().cpu().numpy().tobytes()) for name, p in self.named_parameters()}


def _rows_of(path: str) -> int:
    """How many tokens the checkpoint's embedding has a row for."""
    return structure(path)["tokenizer"]["vocabulary"]


def _signature() -> inspect.Signature:
    parameters = [
        p for p in inspect.signature(Pretrained.__init__).parameters.values() if p.name not in ("self", "structure")
    ]
    inherited = [p for p in inspect.signature(Decoder).parameters.values() if p.name != "parts"]
    return inspect.Signature([*parameters, *(p.replace(kind=p.KEYWORD_ONLY) for p in inherited)])


# what a configuration may hold is read from signatures
Pretrained.__init__.__annotations__ |= {k: v for k, v in Decoder.__init__.__annotations__.items() if k != "parts"}
Pretrained.__signature__ = _signature()  # type: ignore[attr-defined]


class Checkpoint:
    """`model=pretrained model.path=FOLDER`: stands in a composed configuration for what the checkpoint says.

    context: tokens of a training sequence, null as many as the checkpoint was made for.
    """

    def __init__(self, path: Location, context: Count | None = None):
        raise NotImplementedError("it is replaced by what it stands for")

    @staticmethod
    def expand(nodes: dict[str, Any], asked: Collection[str]) -> None:
        """Put the checkpoint's model, norm, norm_type and attention into `nodes`.

        asked: the keys that the user set. What was asked for and is not the checkpoint's is refused; what the
        checkpoint leaves open, such as attention.qk_clip, may be asked for.
        """
        path = nodes["model"].get("path")
        if path is None or path in ("", "???"):
            raise ConfigError("model.path is missing: model=pretrained needs a folder in Hugging Face's layout.")
        if not isinstance(path, str | int):
            raise ConfigError(f"model.path={path} is not allowed: it must be text.")
        path = str(path)
        theirs, context = structure(path), nodes["model"].get("context")
        for key in sorted(asked):
            if key.startswith("model.") and key not in ("model.path", "model.context"):
                _refuse_other(key, nodes["model"].get(key.removeprefix("model.")), theirs["model"].get(key[6:]), path)
        for group in ("norm", "norm_type", "attention"):
            node = {**theirs[group], "_partial_": True}
            name = theirs["attention"]["positions"] if group == "attention" else _option(group, node["_target_"])
            if group in asked and _plain(nodes[group], group) != _plain(node, group):
                raise ConfigError(
                    f"{group}={nodes['choices'][group]} contradicts the checkpoint in {path}, which has "
                    f"{group}={name}{_given(node)}: leave it out."
                )
            nodes["choices"][group] = name
            for key in sorted(k for k in asked if k.startswith(f"{group}.")):
                name = key.removeprefix(f"{group}.")
                value = nodes[group].get(name)
                if name in theirs[group]:
                    _refuse_other(key, value, theirs[group][name], path)
                node[name] = value
            nodes[group] = node
        largest_context = theirs["model"]["context"]
        if context is not None and (
            isinstance(context, bool) or not isinstance(context, int) or not 0 < context <= largest_context
        ):
            raise ConfigError(
                f"model.context={context} is not allowed: the checkpoint in {path} has {largest_context} positions."
            )
        window = nodes["attention"].get("window")
        if window is not None and "attention.window" not in asked and window >= (context or largest_context):
            nodes["attention"] |= {"window": None, "full_every": None}  # a shorter context lies within it
        nodes["model"] = {
            **theirs["model"],
            "_target_": f"{__name__}.{Pretrained.__name__}",
            "_partial_": True,
            "path": path,
            "weights": weights_hash(weight_files(Path(path).expanduser())),
            "context": context or largest_context,
        }


def _refuse_other(key: str, value: Any, theirs: Any, path: str) -> None:
    if value != theirs:
        has = "does not have it" if theirs is None else f"has {theirs}"
        raise ConfigError(f"{key}={value} contradicts the checkpoint in {path}, which {has}: leave it out.")


def _plain(node: Mapping, group: str) -> tuple[str, dict]:
    """A component without what its signature says anyway."""
    return node["_target_"], component_arguments(component_with_defaults(node, group))


def _option(group: str, target: str) -> str:
    """The option with this target."""
    folder = conf_folder() / group
    return next(f.stem for f in sorted(folder.glob("*.yaml")) if f"_target_: {target}" in f.read_text().splitlines())


def _given(node: Mapping) -> str:
    """The numbers of a node, in brackets."""
    numbers = ", ".join(f"{k}={v}" for k, v in component_arguments(node).items())
    return f" ({numbers})" if numbers else ""
