"""The check of a configuration against its schema, the signatures of its components and the rules between them."""

import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from albert_ablate.config.components import component_with_defaults, options
from albert_ablate.config.errors import ConfigError, listed, nearest, shown
from albert_ablate.config.rules import check_together
from albert_ablate.config.schema import NEUTRAL, SEVERAL, Config, Evaluation
from albert_ablate.config.types import Component, checked, describe


def _check_several(nodes: Mapping, key: str) -> dict:
    """Several options of one group, each under its own name: logger=[wandb_offline,tensorboard]."""
    taken = [name for name, node in nodes.items() if isinstance(node, Mapping) and "_target_" in node]
    if not taken:
        raise ConfigError(f"{key} is empty: it must name one or more of {listed(options()[key])}.")
    for name, node in nodes.items():
        if name not in taken:
            raise ConfigError(
                f"{key}.{name}={shown(node)} is not allowed: with {key}=[{','.join(taken)}] a setting names its "
                f"{key}, {' or '.join(f'{key}.{t}.NAME' for t in taken)}."
            )
    out = {name: component_with_defaults(nodes[name], f"{key}.{name}", None) for name in taken}
    targets = [node["_target_"] for node in out.values()]
    if len(set(targets)) < len(targets):
        raise ConfigError(f"{key}=[{','.join(taken)}] is not allowed: two of them are one tracker, take one.")
    return out


def _check_part(node: Any, key: str, name: str) -> dict:
    """An evaluation to be done at the end: evaluation=NAME puts it there."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key}={shown(node)} would do nothing: evaluation={name} asks for that evaluation.")
    return component_with_defaults(node, key, None)


def _check_section(node: Any, schema: type, key: str, choices: Mapping) -> dict:
    hints = typing.get_type_hints(schema, include_extras=True)
    prefix = f"{key}." if key else ""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}={shown(node)} is not allowed: it holds {', '.join(prefix + h for h in hints)}.")
    parts = options()["evaluation"] if schema is Evaluation else []
    out: dict[str, Any] = {}
    for name, value in node.items():
        if name in parts:
            out[name] = _check_part(value, f"{prefix}{name}", name)
        elif name not in hints:
            close = [prefix + n for n in nearest(str(name), hints).split(", ")[:5]]
            raise ConfigError(f"{prefix}{name}={shown(value)} is unknown: the nearest keys are {', '.join(close)}.")
    for f in fields(schema):
        dotted, annotation = f"{prefix}{f.name}", hints[f.name]
        value = node.get(f.name, f.default)
        if value is MISSING or value == "???":
            group = options().get(f.name) if not key else None
            must = f"one of {listed(group)}" if group else describe(annotation)
            raise ConfigError(f"{dotted} is missing: it must be {must}.")
        if annotation is Component and f.name in SEVERAL and isinstance(value, Mapping) and "_target_" not in value:
            out[f.name] = _check_several(value, f.name)
        elif annotation is Component:
            out[f.name] = component_with_defaults(value, dotted, choices.get(f.name))
        elif isinstance(annotation, type) and is_dataclass(annotation):
            out[f.name] = _check_section(value, typing.cast(type, annotation), dotted, choices)
        else:
            out[f.name] = checked(value, annotation, dotted)
    return out


def check(cfg: Mapping) -> dict:
    """The configuration as a plain dictionary with every value of the type its key asks for.

    Raises ConfigError for an unknown key, a value of the wrong type or out of range, and for a contradiction between
    groups. Checking a checked configuration changes nothing.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(cfg, DictConfig):
        try:
            cfg = typing.cast(dict, OmegaConf.to_container(cfg, resolve=True))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key} cannot be resolved: {str(error).splitlines()[0]}.") from None
    choices = cfg.get("choices")
    nodes = {k: v for k, v in cfg.items() if k != "hydra"}
    for key, target in NEUTRAL.items():  # a configuration from before there was the group
        nodes.setdefault(key, {"_target_": target})
    out = _check_section(nodes, Config, "", choices if isinstance(choices, Mapping) else {})
    check_together(out)
    return out
