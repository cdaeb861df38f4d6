"""Models others have trained: a folder as Hugging Face writes it (config.json and weights) to a Decoder.

What a checkpoint's configuration says is mapped, known to change nothing, or refused. Field names are those of
transformers 5.
"""

import inspect
import json
import pickle
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from albert_ablate.config import (
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
# dropout is chosen by the arm, not by the checkpoint
SILENT |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"}


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

    def only(self, name: str, allowed: Any) -> None:
        """Refuse any value but `allowed`, which is also what an absent field means."""
        value = self.take(name, allowed)
        if value != allowed:
            self.refuse(name, value)

    def refuse(self, name: str, value: Any) -> None:
        raise ConfigError(f"{self.file} has {name}={value}, which this model cannot do.")

    def activation(self, name: str, default: str) -> str:
        value = self.take(name, default)
        if value not in ACTIVATIONS:
            self.refuse(name, value)
        return ACTIVATIONS[value]

    def rotary_base(self) -> float:
        """rope_theta, in its own field or, since transformers 5, in rope_parameters; scaled positions are refused."""
        self.only("rope_scaling", None)
        found = self.take("rope_parameters", {})
        if set(found) - {"rope_theta", "rope_type"} or found.get("rope_type", "default") != "default":
            self.refuse("rope_parameters", found)
        return float(found.get("rope_theta", self.take("rope_theta", 10_000.0)))

    def done(self) -> None:
        for name, value in self.content.items():
            if name not in self.known and value is not None and value is not False:
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
    return _of_openai(f, "PreLN", f.activation("activation_function", "gelu_new"), f.take("n_inner"))


def _openai_gpt(f: _Fields) -> Structure:
    activation = f.take("afn", "gelu")
    if activation == "gelu":  # what this family calls gelu is the tanh form
        activation = "gelu_new"
    if activation not in ACTIVATIONS:
        f.refuse("afn", activation)
    return _of_openai(f, "PostLN", ACTIVATIONS[activation], None)


def _of_openai(f: _Fields, placement: str, activation: str, hidden: int | None) -> Structure:
    width = f.need("n_embd")
    model = {
        "layers": f.need("n_layer"),
        "width": width,
        "heads": f.need("n_head"),
        "context": f.need("n_positions"),
        "hidden": hidden or 4 * width,
        "activation": activation,
        "tied": f.take("tie_word_embeddings", True),
        "bias": True,
        "embedding_scale": 1.0,
    }
    eps = f.take("layer_norm_epsilon", 1e-5)
    return _nodes(placement, "layer_norm", eps, {"positions": "learned"}, model, f.need("vocab_size"))


def _of_llama(f: _Fields, placement: str, norm_type: str, eps: float, tied: bool, **attention: Any) -> Structure:
    width, heads = f.need("hidden_size"), f.need("num_attention_heads")
    bias = f.take("attention_bias", False)
    if f.take("mlp_bias", False) != bias:
        raise ConfigError(f"{f.file} has attention_bias={bias} and another mlp_bias: this model has both or neither.")
    tied = f.take("tie_word_embeddings", tied)
    model = {
        "layers": f.need("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "context": f.need("max_position_embeddings"),
        "hidden": f.need("intermediate_size"),
        "activation": f.activation("hidden_activation", f.take("hidden_act", "silu")),
        "gated": True,
        "tied": tied,
        "bias": bias,
        "embedding_scale": 1.0,
    }
    attention |= {
        "positions": "rotary",
        "rotary_base": f.rotary_base(),
        "kv_heads": f.take("num_key_value_heads", heads),
        "head_width": f.take("head_dim", width // heads),
    }
    eps = f.take("rms_norm_eps", eps)
    return _nodes(placement, norm_type, eps, attention, model, f.need("vocab_size"))


def _llama(f: _Fields) -> Structure:
    return _of_llama(f, "PreLN", "rms_norm", 1e-6, tied=False)


def _olmo2(f: _Fields) -> Structure:
    nodes = _of_llama(f, "ReorderedLN", "rms_norm", 1e-5, tied=False, qk_norm="rms_whole")
    nodes["attention"]["qk_eps"] = nodes["norm_type"]["eps"]
    return nodes


def _gemma2(f: _Fields) -> Structure:
    f.only("use_bidirectional_attention", False)
    f.take("hidden_act")  # hidden_activation counts
    f.content = {"hidden_activation": "gelu_pytorch_tanh"} | {k: v for k, v in f.content.items() if v is not None}
    window, layers = f.take("sliding_window"), f.need("num_hidden_layers")
    pattern = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    f.only("layer_types", pattern)
    nodes = _of_llama(f, "SandwichLN", "zero_centred_rms_norm", 1e-6, tied=True)
    nodes["attention"] |= {
        "head_width": f.need("head_dim"),
        "softcap": f.take("attn_logit_softcapping"),
        "window": window,
        "full_every": 2 if window else None,
        "scale": f.take("query_pre_attn_scalar", 256) ** -0.5,
    }
    nodes["model"]["logit_softcap"] = f.take("final_logit_softcapping")
    nodes["model"]["embedding_scale"] = nodes["model"]["width"] ** 0.5
    return nodes


def _names_of_openai(w: Weights, layers: int, embedding: str, positions: str) -> Weights:
    w = {name.removeprefix("transformer."): tensor for name, tensor in w.items()}
    out = {"embedding.weight": w.pop(f"{embedding}.weight"), "positions.weight": w.pop(f"{positions}.weight")}
    for name, ours in (("ln_f.weight", "final_norm.weight"), ("ln_f.bias", "final_norm.bias")):
        if name in w:
            out[ours] = w.pop(name)
    parts = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.output", "mlp.c_fc": "mlp.up"}
    parts |= {"mlp.c_proj": "mlp.down", "ln_1": "around_attention.norm", "ln_2": "around_mlp.norm"}
    for layer in range(layers):
        for theirs, ours in parts.items():
            for leaf in ("weight", "bias"):
                tensor = w.pop(f"h.{layer}.{theirs}.{leaf}")
                # their matrices are stored with inputs along the rows
                out[f"blocks.{layer}.{ours}.{leaf}"] = tensor.T if tensor.ndim == 2 else tensor
        for mask in ("bias", "masked_bias"):  # the causal mask, which older files hold
            w.pop(f"h.{layer}.attn.{mask}", None)
    return out | w


def _names_of_llama(w: Weights, layers: int, norms: Mapping[str, str]) -> Weights:
    w = {name.removeprefix("model."): tensor for name, tensor in w.items()}
    out = {"embedding.weight": w.pop("embed_tokens.weight"), "final_norm.weight": w.pop("norm.weight")}
    parts = {"self_attn.o_proj": "attention.output", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up"}
    parts |= {"mlp.down_proj": "mlp.down", **norms}
    for layer in range(layers):
        home = f"layers.{layer}."
        for leaf in ("weight", "bias"):
            three = [w.pop(f"{home}self_attn.{p}_proj.{leaf}", None) for p in "qkv"]
            found = [t for t in three if t is not None]
            if len(found) == 3:
                out[f"blocks.{layer}.attention.qkv.{leaf}"] = torch.cat(found)
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

READERS: dict[str, tuple[Callable[[_Fields], Structure], Callable[[Weights, int], Weights]]] = {
    "gpt2": (_gpt2, lambda w, layers: _names_of_openai(w, layers, "wte", "wpe")),
    "openai-gpt": (_openai_gpt, lambda w, layers: _names_of_openai(w, layers, "tokens_embed", "positions_embed")),
    "llama": (_llama, lambda w, layers: _names_of_llama(w, layers, _PRE)),
    "olmo2": (_olmo2, lambda w, layers: _names_of_llama(w, layers, _REORDERED)),
    "gemma2": (_gemma2, lambda w, layers: _names_of_llama(w, layers, _SANDWICH)),
}


def structure(folder: str | Path) -> Structure:
    """What a checkpoint's config.json says, as configuration nodes: norm, norm_type, attention, model and, under
    tokenizer, the size of the vocabulary.

    Raises ConfigError with one sentence for a model_type or a field that would have to be left out.
    """
    file = Path(folder).expanduser() / "config.json"
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}.") from None
    kind = content.get("model_type")
    if kind not in READERS:
        raise ConfigError(
            f"{file} has model_type={kind}, which cannot be read: it must be one of {', '.join(READERS)}."
        )
    fields = _Fields(content, file)
    nodes = READERS[kind][0](fields)
    fields.done()
    return nodes


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold a checkpoint's weights: safetensors before pickles, one before several with an index."""
    folder = Path(folder).expanduser()
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            return [folder / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise ConfigError(f"{folder} holds no weights: it needs model.safetensors or pytorch_model.bin.")


def _read(file: Path) -> Weights:
    """Tensors of a file by name; a pickle is read for its tensors alone."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(f"{file} holds more than tensors, and a pickle's code is not run.") from None


@torch.no_grad()
def load_pretrained(folder: str | Path, seed: int = 0) -> Decoder:
    """A trained model from a folder in Hugging Face's layout: `model(tokens)` gives logits, (B, T) -> (B, T, V).

    model_type gpt2, openai-gpt, llama, olmo2 or gemma2; placement, norm, activation, heads, positions and constants are
    read from config.json, weights from model.safetensors or pytorch_model.bin, whole or in parts, to float32. Without
    dropout, in training mode; seed: of the model's clock. Raises ConfigError with one sentence for what is not covered.
    """
    nodes = structure(folder)
    with torch.device("meta"):
        parts = Parts(
            vocabulary=nodes["tokenizer"]["vocabulary"],
            **{
                part: construct({**nodes[key], "_partial_": True})
                for part, key in (("norm", "norm_type"), ("placement", "norm"), ("attention", "attention"))
            },
            dropout=NoDropout(),
            clock=Clock(seed),
        )
        model = construct({**nodes["model"], "_partial_": True})(parts)
    copy_weights(model, folder)
    return model


@torch.no_grad()
def copy_weights(model: Decoder, folder: str | Path) -> None:
    """Give a model of the checkpoint's structure, on any device, the checkpoint's weights."""
    kind = json.loads((Path(folder).expanduser() / "config.json").read_text())["model_type"]
    theirs: Weights = {}
    for file in weight_files(folder):
        theirs |= _read(file)
    renamed = READERS[kind][1](dict(theirs), len(model.blocks))
    head = renamed.pop("lm_head.weight", None)
    if head is not None and not model.tied:
        renamed["head.weight"] = head
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
    if any(p.is_meta for p in model.parameters()):
        model.fill(0)
    for name, parameter in model.named_parameters():
        parameter.copy_(renamed[name])


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


class Pretrained(Decoder):
    """A Decoder that begins with a checkpoint's weights instead of drawn ones.

    path: the folder, in Hugging Face's layout; weights: hash of its weights, part of who a run is; the rest as in
    Decoder. A context below the checkpoint's keeps the first of its learned positions.
    """

    def __init__(self, parts: Parts, /, path: Location, weights: str, **structure: Any):
        super().__init__(parts, **structure)
        self.path = path

    @staticmethod
    def verify(cfg: dict) -> None:
        Decoder.verify(cfg)
        theirs = structure(cfg["model"]["path"])["tokenizer"]["vocabulary"]
        ours = construct(cfg["tokenizer"]).vocabulary
        if ours != theirs:
            name = (cfg["choices"] or {}).get("tokenizer") or "this one"
            raise ConfigError(
                f"tokenizer={name} has {ours} tokens and the checkpoint in {cfg['model']['path']} {theirs}: take its "
                "own, tokenizer=file tokenizer.path=TOKENIZER.JSON."
            )

    @torch.no_grad()
    def fill(self, seed: int, device: torch.device | str = "cpu") -> dict[str, str]:
        """The checkpoint's weights on `device`; gives the hash of each."""
        super().fill(seed, device)
        copy_weights(self, self.path)
        return {name: digest(p.detach().cpu().numpy().tobytes()) for name, p in self.named_parameters()}


def _signature() -> inspect.Signature:
    own = [p for p in inspect.signature(Pretrained.__init__).parameters.values() if p.name not in ("self", "structure")]
    inherited = [p for p in inspect.signature(Decoder).parameters.values() if p.name != "parts"]
    return inspect.Signature([*own, *(p.replace(kind=p.KEYWORD_ONLY) for p in inherited)])


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
        if not path or path == "???":
            raise ConfigError("model.path is missing: model=pretrained needs a folder in Hugging Face's layout.")
        theirs, context = structure(path), nodes["model"].get("context")
        for key in sorted(asked):
            if key.startswith("model.") and key not in ("model.path", "model.context"):
                _refuse_other(key, nodes["model"].get(key.removeprefix("model.")), theirs["model"].get(key[6:]), path)
        for group in ("norm", "norm_type", "attention"):
            found = {**theirs[group], "_partial_": True}
            name = theirs["attention"]["positions"] if group == "attention" else _option(group, found["_target_"])
            if group in asked and _plain(nodes[group], group) != _plain(found, group):
                raise ConfigError(
                    f"{group}={nodes['choices'][group]} contradicts the checkpoint in {path}, which has "
                    f"{group}={name}{_given(found)}: leave it out."
                )
            nodes["choices"][group] = name
            for key in sorted(k for k in asked if k.startswith(f"{group}.")):
                name = key.removeprefix(f"{group}.")
                value = nodes[group].get(name)
                if name in theirs[group]:
                    _refuse_other(key, value, theirs[group][name], path)
                found[name] = value
            nodes[group] = found
        most = theirs["model"]["context"]
        if context is not None and (
            isinstance(context, bool) or not isinstance(context, int) or not 0 < context <= most
        ):
            raise ConfigError(f"model.context={context} is not allowed: the checkpoint in {path} has {most} positions.")
        nodes["model"] = {
            **theirs["model"],
            "_target_": f"{__name__}.{Pretrained.__name__}",
            "_partial_": True,
            "path": path,
            "weights": _weights_hash(*((str(f), f.stat().st_mtime_ns) for f in weight_files(path))),
            "context": context or most,
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


@cache
def _weights_hash(*files: tuple[str, int]) -> str:
    """Hash of the files' content; asked anew when one was written since."""
    return digest(*(Path(file).read_bytes() for file, _ in files))
