"""A small GPT-2 checkpoint in Hugging Face's layout, made without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def gpt2(
    folder: Path, vocabulary: int = 256, width: int = 16, layers: int = 2, heads: int = 2, context: int = 32
) -> Path:
    """Random weights, norms too; gives the folder."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.2 * torch.randn(shape, generator=generator)

    weights = {"wte.weight": draw(vocabulary, width), "wpe.weight": draw(context, width)}
    for norm in ["ln_f", *(f"h.{k}.ln_{i}" for k in range(layers) for i in (1, 2))]:
        weights |= {f"{norm}.weight": draw(width, mean=1.0), f"{norm}.bias": draw(width)}
    shapes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    shapes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    for k in range(layers):
        for name, shape in shapes.items():
            weights |= {f"h.{k}.{name}.weight": draw(*shape), f"h.{k}.{name}.bias": draw(shape[1])}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    content = {"model_type": "gpt2", "vocab_size": vocabulary, "n_embd": width, "n_layer": layers, "n_head": heads}
    (folder / "config.json").write_text(json.dumps(content | {"n_positions": context}))
    return folder
