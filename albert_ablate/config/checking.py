"""The check of a configuration against its schema, the signatures of its components and the rules between them."""

import typing
from collections.abc import Mapping
from dataclasses import MISSING, replace
from functools import cache
from typing import Any, TypeVar

from albert_ablate.config.components import component_with_defaults
from albert_ablate.config.errors import ConfigError, listed, nearest, shown
from albert_ablate.config.folders import options
from albert_ablate.config.rules import check_together
from albert_ablate.config.schema import DEFAULT_TARGETS, MULTI_CHOICE_GROUPS, Config, Evaluation, Section
from albert_ablate.config.types import Component, checked, describe


def _check_several(nodes: Mapping, key: str) -> Component:
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
    return Component(out)


def _check_part(node: Any, key: str, name: str) -> Component:
    """An evaluation to be done at the end: evaluation=NAME puts it there."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key}={shown(node)} would do nothing: evaluation={name} asks for that evaluation.")
    return component_with_defaults(node, key, None)


S = TypeVar("S", bound=Section)


@cache
def _hints(schema: type[Section]) -> dict[str, Any]:
    hints = typing.get_type_hints(schema, include_extras=True)
    return {key: hints[key] for key in schema.keys_of()}


def _check_section(node: Any, schema: type[S], key: str, choices: Mapping) -> S:
    hints = _hints(schema)
    prefix = f"{key}." if key else ""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}={shown(node)} is not allowed: it holds {', '.join(prefix + h for h in hints)}.")
    out: dict[str, Any] = {}
    asked: dict[str, Component] = {}
    for name, value in node.items():
        if name in hints:
            continue
        if schema is Evaluation and name in options()["evaluation"]:
            asked[name] = _check_part(value, f"{prefix}{name}", name)
        else:
            close = [prefix + n for n in nearest(str(name), hints).split(", ")[:5]]
            raise ConfigError(f"{prefix}{name}={shown(value)} is unknown: the nearest keys are {', '.join(close)}.")
    for name, annotation in hints.items():
        dotted, value = f"{prefix}{name}", node.get(name, getattr(schema, name, MISSING))
        if value is MISSING or value == "???":
            group = options().get(name) if not key else None
            must = f"one of {listed(group)}" if group else describe(annotation)
            raise ConfigError(f"{dotted} is missing: it must be {must}.")
        if (
            annotation is Component
            and name in MULTI_CHOICE_GROUPS
            and isinstance(value, Mapping)
            and "_target_" not in value
        ):
            out[name] = _check_several(value, name)
        elif annotation is Component:
            out[name] = component_with_defaults(value, dotted, choices.get(name))
        elif isinstance(annotation, type) and issubclass(annotation, Section):
            out[name] = _check_section(value, annotation, dotted, choices)
        else:
            out[name] = checked(value, annotation, dotted)
    return schema(**out, **({"parts": asked} if asked else {}))


def check(cfg: Mapping) -> Config:
    """The configuration with every value of the type its key asks for, read-only: `cfg.budget.tokens`.

    Raises ConfigError for an unknown key, a value of the wrong type or out of range, and for a contradiction between
    groups. A checked configuration is given back as it is.
    """
    if isinstance(cfg, Config):
        return cfg
    cfg = resolved(cfg)
    choices = cfg.get("choices")
    nodes = {k: v for k, v in cfg.items() if k != "hydra"}
    for key, target in DEFAULT_TARGETS.items():  # a configuration from before there was the group
        nodes.setdefault(key, {"_target_": target})
    out = _check_section(nodes, Config, "", choices if isinstance(choices, Mapping) else {})
    check_together(out)
    return out


def resolved(cfg: Mapping) -> Mapping:
    """A configuration as OmegaConf has it, as a dictionary, its interpolations resolved; any other as it is."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(cfg, DictConfig):
        return cfg
    try:
        return typing.cast(dict, OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be resolved: {str(error).splitlines()[0]}.") from None


def with_seed(cfg: Config, seed: Any) -> Config:
    """A checked configuration with another seed. Nothing else depends on it, so nothing else is checked again."""
    return replace(cfg, seed=checked(seed, _hints(Config)["seed"], "seed"))
