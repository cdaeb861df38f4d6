"""The weights of each family of checkpoints under the names that a Decoder has for them."""

from collections.abc import Mapping

import torch
from torch import Tensor

Weights = dict[str, Tensor]

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("wte", "tokens_embed", "embed_tokens", "embed_in")  # what the families call it


def names_of_openai(w: Weights, layers: int, embedding: str, positions: str) -> Weights:
    """Rename the weights of a GPT-2 checkpoint to those of `Decoder`; its matrices are stored transposed."""
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


def names_of_llama(w: Weights, layers: int, norms: Mapping[str, str]) -> Weights:
    """Rename the weights of a Llama-like checkpoint to those of `Decoder`, and stack queries, keys and values."""
    w = {name.removeprefix("model."): tensor for name, tensor in w.items()}
    ends = {"embed_tokens.weight": "embedding.weight", "norm.weight": "final_norm.weight"}
    ends |= {"norm.bias": "final_norm.bias"}
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


PRE = {"input_layernorm": "around_attention.norm", "post_attention_layernorm": "around_mlp.norm"}
REORDERED = {"post_attention_layernorm": "around_attention.norm", "post_feedforward_layernorm": "around_mlp.norm"}
REORDERED |= {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}
SANDWICH = {"input_layernorm": "around_attention.norm_in", "post_attention_layernorm": "around_attention.norm_out"}
SANDWICH |= {"pre_feedforward_layernorm": "around_mlp.norm_in", "post_feedforward_layernorm": "around_mlp.norm_out"}

QWEN3 = {**PRE, "self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}


def names_of_phi3(w: Weights, layers: int) -> Weights:
    """As Llama's, with queries, keys and values in one matrix, and gate and up in another."""
    for layer in range(layers):
        home = f"model.layers.{layer}."
        both = w.pop(f"{home}mlp.gate_up_proj.weight", None)
        if both is not None:
            w[f"{home}mlp.gate_proj.weight"], w[f"{home}mlp.up_proj.weight"] = both.chunk(2)
    renamed = names_of_llama(w, layers, PRE)
    for layer in range(layers):
        whole = renamed.pop(f"layers.{layer}.self_attn.qkv_proj.weight", None)
        if whole is not None:
            renamed[f"blocks.{layer}.attention.qkv.weight"] = whole
    return renamed


NEOX = {"attention.dense": "attention.output", "mlp.dense_h_to_4h": "mlp.up", "mlp.dense_4h_to_h": "mlp.down"}
NEOX |= {**PRE, "attention.query_key_value": "attention.qkv"}


def names_of_gpt_neox(w: Weights, layers: int, heads: int) -> Weights:
    """Of queries, keys and values theirs has each head's three together, ours all heads' queries first."""
    w = {name.removeprefix("gpt_neox."): tensor for name, tensor in w.items()}
    ends = {"embed_in.weight": "embedding.weight", **dict.fromkeys(HEADS, "lm_head.weight")}
    ends |= {f"final_layer_norm.{leaf}": f"final_norm.{leaf}" for leaf in ("weight", "bias")}
    out = {ours: w.pop(name) for name, ours in ends.items() if name in w}
    for layer in range(layers):
        for theirs, ours in NEOX.items():
            for leaf in ("weight", "bias"):
                tensor = w.pop(f"layers.{layer}.{theirs}.{leaf}", None)
                if tensor is None:
                    continue
                if ours == "attention.qkv" and len(tensor) % (3 * heads) == 0:
                    tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
                out[f"blocks.{layer}.{ours}.{leaf}"] = tensor
        for kept in ("bias", "masked_bias", "rotary_emb.inv_freq"):  # the causal mask and angles, in older files
            w.pop(f"layers.{layer}.attention.{kept}", None)
    return out | w
