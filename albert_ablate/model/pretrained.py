"""Models others have trained: a folder as Hugging Face writes it (config.json and weights) to a Decoder.

What a checkpoint's configuration says is mapped, known to change nothing, or refused (checkpoint_fields.py,
checkpoint_families.py); its weights are renamed (checkpoint_names.py); its files are read by weight_files.py.
"""

import inspect
from collections.abc import Collection, Mapping
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
from albert_ablate.model.checkpoint_families import READERS, UNLIKE, Structure
from albert_ablate.model.checkpoint_fields import ConfigFields
from albert_ablate.model.checkpoint_names import EMBEDDINGS, HEADS, Weights
from albert_ablate.model.decoder import Decoder, Parts
from albert_ablate.model.dropout import Clock, NoDropout
from albert_ablate.model.weight_files import read_json, shapes, stamp, tensors, weight_files, weights_hash
from albert_ablate.streams import digest


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
        raise ConfigError(f"{file} has model_type={kind}, which this model cannot represent: {UNLIKE[kind]}.")
    if not isinstance(kind, str) or kind not in READERS:
        raise ConfigError(
            f"{file} has model_type={kind}, which cannot be read: it must be one of {', '.join(READERS)}."
        )
    fields = ConfigFields(content, file)
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
    heads = [name for name in HEADS if name in held]
    if len(heads) != 1 or len(embeddings) != 1:
        return False
    weights = tensors(folder, {*heads, *embeddings})
    return not torch.equal(weights[heads[0]], weights[embeddings[0]])


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
    renamed = READERS[kind][1](dict(theirs), len(model.blocks), model.stack[0].attention.heads)
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
                f"tokenizer={name} has {ours} tokens and the checkpoint in {cfg.model.path} only {theirs}: use "
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
