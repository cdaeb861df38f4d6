"""Overrides in, a configuration out, by Hydra's rules."""

import pickle
import re
import sys
import typing
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from albert_ablate.config.checking import check, resolved
from albert_ablate.config.components import own_option, target_of
from albert_ablate.config.errors import ConfigError, as_config_error, nearest, quoted
from albert_ablate.config.folders import (
    SEARCHPATH,
    conf_folder,
    conf_stamps,
    name_folders,
    options,
    own_folders,
    without_folders,
)
from albert_ablate.config.own_model import set_aside_parts, steps_to_tokens
from albert_ablate.config.rules import evaluations_of
from albert_ablate.config.schema import MULTI_CHOICE_GROUPS, Config
from albert_ablate.config.secrets import masked
from albert_ablate.config.types import to_container


def compose(overrides: typing.Sequence[str] = (), config_dir: str | Path | None = None) -> Any:
    """The configuration that `python run.py <overrides>` would train: `compose(["norm=pre_ln", "seed=1"])`.

    config_dir: a conf folder of your own, whose options count from then on in this process and those it starts; so do
    those that ALBERT_ABLATE_CONF, a `hydra.searchpath=[...]` among the overrides, and installed plug-ins name. Raises
    ConfigError with one sentence for whatever is not allowed.
    """
    from omegaconf import OmegaConf

    return OmegaConf.create(to_container(checked_config(overrides, config_dir)))


def checked_config(overrides: typing.Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """`check(compose(overrides, config_dir))`, checked once and never made an OmegaConf tree again."""
    overrides, folders = without_folders(overrides)
    name_folders([*([] if config_dir is None else [config_dir]), *folders])
    overrides = prepared(overrides)
    cfg, choices = composition(overrides)
    return check(with_choices(cfg, choices, overrides))


def composition(overrides: typing.Sequence[str]) -> tuple[Any, dict[str, str]]:
    """What `prepared` overrides compose to, interpolations not resolved and nothing checked; the option taken by group.

    Hydra reads some thirty files for each composition, which takes a tenth of a second. An option whose file holds only
    its own keys (group=option) replaces the node of its group, and values (++key=value) count after all options. So
    Hydra composes the rest of the overrides once; options and values are set on a copy in the way Hydra sets them. What
    it would refuse is left to it.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    values = [o for o in overrides if o.startswith("++") and not o.startswith("++hydra")]
    stamps = conf_stamps()
    try:
        parsed = [_parsed(o) for o in values]
        # what takes a key away again, after it was set, counts in the order it was written
        taken = any(o.startswith("~") and o[1:].partition("=")[0] not in options() for o in overrides)
        if taken or any(o.is_sweep_override() or o.package is not None for o in parsed):
            parsed, values = [], []
    except HydraException:
        parsed, values = [], []
    try:
        others = tuple(o for o in overrides if o not in values)
        taken_options = _plain_options(others, stamps)
        cfg, choices = pickle.loads(_by_hydra(tuple(o for o in others if o not in taken_options), stamps))
        for group, option in (o.split("=") for o in taken_options):
            cfg[group] = _option(group, option, stamps)
            choices[group] = option
        for override in parsed:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=True)
    except Exception as error:
        raise as_config_error(error) from None
    return cfg, choices


@lru_cache(1024)
def _parsed(override: str) -> Any:
    """An override as Hydra reads it. Of many arms most overrides are the same, and a grammar reads them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override)


def _plain_options(overrides: tuple[str, ...], files: tuple) -> list[str]:
    """Those overrides, group=option, that do no more than replace the node of their group."""
    if any(o.startswith("recipe=") for o in overrides):  # it takes options of other groups
        return []
    groups = [re.split("[@=]", o.lstrip("+~"))[0] for o in overrides]
    available = options()
    plain = []
    for override, group in zip(overrides, groups, strict=True):
        key, _, option = override.partition("=")
        if key == group and key in available and groups.count(group) == 1 and _option(key, option, files) is not None:
            plain.append(override)
    return plain


@lru_cache(256)
def _option(group: str, option: str, files: tuple) -> Any:
    """The node that an option's file holds; None where there is no such file or Hydra makes more of it."""
    from omegaconf import OmegaConf

    file = conf_folder() / group / f"{option}.yaml"
    if str(file) not in {name for name, _ in files}:
        return None
    text = file.read_text(encoding="utf-8")
    return None if re.search(r"^defaults:|@package|\$\{", text, re.MULTILINE) else OmegaConf.create(text)


@lru_cache(256)
def _by_hydra(overrides: tuple[str, ...], files: tuple) -> bytes:
    """Composed by Hydra from these `files` of conf/: the configuration and the option taken by group, pickled, since a
    copy is read from that four times as fast as OmegaConf makes one."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = hydra.compose("config", overrides=[*overrides, *search()], return_hydra_config=True)
    # a group of which no option is taken has no choice
    choices = {str(k): str(v) for k, v in cfg.hydra.runtime.choices.items() if v is not None}
    return pickle.dumps((OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"]), choices))


def search() -> list[str]:
    """The override by which Hydra looks into conf folders besides the package's own, if there are any."""
    places = [quoted(f"file://{folder}") for folder in own_folders()]
    return [f"{SEARCHPATH}=[{','.join(places)}]"] if places else []


def given_twice(overrides: typing.Iterable[str]) -> list[str]:
    """The keys that several overrides set."""
    keys = [o.lstrip("+").partition("=")[0] for o in overrides if "=" in o]
    return [key for key in dict.fromkeys(keys) if keys.count(key) > 1]


def each_once(overrides: typing.Sequence[str]) -> list[str]:
    """Overrides of a command line, each key once: of one given twice the last counts, which is said on stderr."""
    unique = list(overrides)
    for key in given_twice(overrides):
        *others, last = [o for o in overrides if "=" in o and o.lstrip("+").partition("=")[0] == key]
        print(f"{key} is given twice on the command line: {masked(last)} counts.", file=sys.stderr)
        for other in others:
            unique.remove(other)
    return unique


def prepared(overrides: typing.Iterable[str]) -> list[str]:
    """Overrides as Hydra is to see them: `key=value` as `++key=value`, so that keys are judged by `check`, not by it.

    A choice in a group stays as it is, and is refused where the group has no such option.
    """
    groups, out = options(), list[str]()
    for override in overrides:
        plain = override.lstrip("+")
        key, equals, value = plain.partition("=")
        if equals and key in MULTI_CHOICE_GROUPS:
            out = [o for o in out if re.split("[@=]", o.lstrip("+~"))[0] != key]  # the last one counts
        if equals and key in MULTI_CHOICE_GROUPS and value.startswith("["):
            out += _several(key, value, groups[key])
        elif equals and key in groups:
            value = value.strip("[]") if key == "evaluation" else value  # Hydra takes a list and merges its options
            for choice in [] if "(" in value else value.split(","):  # choice(), glob(): Hydra's own
                if choice.strip(" '\"") not in groups[key]:
                    near = nearest(choice, groups[key])
                    raise ConfigError(f"{key}={choice} is not an option: {key} is one of {near}.")
                own_option(key, choice.strip(" '\""))
            out.append(plain)
        elif equals and key.isascii() and key.replace(".", "_").isidentifier() and not key.startswith("hydra."):
            home = value.startswith("~/") and "'" not in value  # the shell leaves it, Hydra cannot read it unquoted
            out.append(f"++{key}='{value}'" if home else f"++{plain}")
        else:
            out.append(override)
    return out


def _several(key: str, value: str, names: list[str]) -> list[str]:
    """`logger=[a,b]` as Hydra is to see it: each option under its own name, in place of the one the defaults take."""
    taken = [choice.strip(" '\"") for choice in value[1:-1].split(",") if choice.strip()]
    if not value.endswith("]") or any("[" in choice or "]" in choice for choice in taken):
        raise ConfigError(f"{key}={value} is not allowed: several at once are written {key}=[a,b], one list a command.")
    for choice in taken:
        if choice not in names:
            raise ConfigError(f"{key}={choice} is not an option: {key} is one of {nearest(choice, names)}.")
        own_option(key, choice)
    if not taken or len(set(taken)) < len(taken) or len(taken) > 1 and "none" in taken:
        raise ConfigError(f"{key}={value} is not allowed: a list names one or more options, each once, and not none.")
    return [f"{key}={taken[0]}"] if len(taken) == 1 else [f"~{key}", *(f"+{key}@{key}.{t}={t}" for t in taken)]


def with_choices(cfg: Any, choices: Mapping, overrides: typing.Iterable[str] = ()) -> dict[str, Any]:
    """A composed configuration as a dictionary without its `hydra` node, interpolations resolved, the options taken
    noted in `choices`.

    overrides: those it was composed with. A model that stands for a checkpoint is replaced by what it says, and
    budget.steps by as many tokens.
    """
    from omegaconf import OmegaConf

    if cfg.get("choices") is not None:
        raise ConfigError(
            f"choices={cfg.choices} is not allowed: it is set automatically; choose an option by group=option."
        )
    groups = options()
    cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]) if "hydra" in cfg else cfg
    nodes = dict(resolved(cfg))
    taken = {k: v for k, v in choices.items() if k in groups}
    for key in MULTI_CHOICE_GROUPS:
        if several := [v for k, v in choices.items() if k.startswith(f"{key}@")]:
            taken[key] = f"[{','.join(several)}]"
    if "evaluation" not in taken and "evaluation" in nodes:  # a list of them
        taken["evaluation"] = f"[{','.join(evaluations_of(nodes))}]"
    nodes["choices"] = taken
    model = nodes.get("model")
    if not isinstance(model, Mapping) or "_target_" not in model:
        return nodes
    target, task = target_of(model["_target_"]), nodes.get("task")
    own = isinstance(task, Mapping) and "_target_" in task and getattr(target_of(task["_target_"]), "own_module", False)
    asked = {o.lstrip("+~").partition("=")[0].partition("@")[0] for o in overrides}
    if own:
        target_of(nodes["task"]["_target_"]).expand(nodes, asked)
    elif hasattr(target, "expand"):
        target.expand(nodes, asked)
    if not own and not getattr(target_of(nodes["model"]["_target_"]), "takes_parts", False):
        set_aside_parts(nodes, asked)
    if isinstance(nodes.get("budget"), Mapping) and "steps" in nodes["budget"]:
        steps_to_tokens(nodes, asked)
    return nodes
