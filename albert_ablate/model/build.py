"""From a configuration to a model."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from albert_ablate.config import Config, ConfigError, check, construct, target_of
from albert_ablate.data.own_task import is_own_task, module_node
from albert_ablate.model.decoder import Parts
from albert_ablate.model.dropout import Clock
from albert_ablate.model.own import OwnModel
from albert_ablate.model.token_model import TokenModel


def build(node: Mapping, *args):
    """The component a node describes; lists and dictionaries in it stay plain. A `_partial_` is called with `args`.

    Of several options of one group (logger=[a,b]) a dictionary, by name.
    """
    if "_target_" not in node:
        return {name: build(part, *args) for name, part in node.items()}
    component = construct(node)
    return component(*args) if node.get("_partial_") else component


def assemble(cfg: Config) -> TokenModel:
    """The model of a checked configuration on the meta device: shapes without values."""
    if is_own_task(cfg):
        make = partial(construct, module_node(cfg))
        return OwnModel(make, f"task={cfg.option('task')}", 0, cfg.model.context, Clock(cfg.seed))
    target = target_of(cfg.model._target_)
    if not getattr(target, "takes_parts", False):
        return _own_model(cfg, target)
    with torch.device("meta"):
        parts = Parts(
            vocabulary=build(cfg.tokenizer).vocabulary,
            norm=construct(cfg.norm_type),
            placement=construct(cfg.norm),
            attention=construct(cfg.attention),
            dropout=build(cfg.dropout),
            clock=Clock(cfg.seed, build(cfg.dropout_time)),
        )
        return build(cfg.model, parts)


def _own_model(cfg: Config, target: Any) -> OwnModel:
    """A model of one's own: what its class gives for the number of tokens and its arguments."""
    vocabulary = build(cfg.tokenizer).vocabulary
    make: Any = partial(build, {**cfg.model, "_partial_": True}, vocabulary)
    if hasattr(target, "shapes"):
        make = make()
    return OwnModel(
        make, f"model={cfg.option('model')}", getattr(make, "rows", vocabulary), cfg.model.context, Clock(cfg.seed)
    )


def build_model(cfg: Mapping, device: torch.device | str = "cpu") -> Any:
    """The model of a configuration with its initial weights: `model(tokens)` gives logits, (B, T) -> (B, T, V).

    Raises ConfigError with one sentence where the configuration is not allowed.
    """
    checked = check(cfg)
    return initialized(assemble(checked), checked, device)


def initialized(model: TokenModel, cfg: Config, device: torch.device | str = "cpu") -> Any:
    """An assembled model of a checked configuration, moved from the meta device to `device` with its initial weights;
    gradient checkpointing and torch.compile are set up."""
    model.initial_draws = model.fill(cfg.seed, device)
    if cfg.trainer.gradient_checkpointing:
        model.recompute_blocks()
    if cfg.trainer.compile:
        model.compile_blocks()
    return model


def verify_compiler(device: torch.device | str) -> None:
    """ConfigError where torch.compile finds nothing to compile with for `device`."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if torch.device(device).type == "cuda":
        if not has_triton():
            raise ConfigError("trainer.compile=true is not allowed here: it needs the package triton.")
        return
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        raise ConfigError("trainer.compile=true is not allowed here: it needs a C++ compiler such as g++.") from None
