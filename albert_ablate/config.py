"""What a configuration may hold: types, ranges, checks across groups, and the identity of an arm, a setting and a run.

The schema is read off the code: root keys from the dataclass `Config`, the keys of a component (a node with
`_target_`) from the signature of its target. Parameters before a `/` are filled in by the code, not configured.
Whatever a user can get wrong raises `ConfigError` with one sentence naming the key, its value and what is allowed.
"""

import difflib
import errno
import importlib
import inspect
import json
import math
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from albert_ablate.streams import digest


class ConfigError(ValueError):
    """A mistake of the user that can be seen before the first step: one sentence, exit code 2."""


# what a machine has run out of (exit code 1), and what its user may not write or has named wrongly (exit code 2)
EXHAUSTED = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE") if hasattr(errno, name)
)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


def unwritable(place: Any, error: OSError) -> Exception:
    """One sentence on a file or folder that cannot be written: a RuntimeError (exit code 1) where the disk is full."""
    kind = RuntimeError if error.errno in EXHAUSTED else ConfigError
    return kind(f"{place} cannot be written: {error.strerror or ' '.join(str(error).split()) or type(error).__name__}.")


def file_trouble(error: OSError) -> tuple[str, int] | None:
    """The sentence and the exit code for an error of a disk that no command foresaw; None for any other error."""
    if error.errno not in (*EXHAUSTED, *FORBIDDEN):
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror or error}.", 1 if error.errno in EXHAUSTED else 2


def read_yaml(path: Path, loader: Any = None) -> Any:
    """What a YAML file holds. Raises ConfigError with the line and the column of what is wrong."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), loader or yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: byte {error.start} is not UTF-8 text.") from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read as YAML: it is nested too deep.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML: {where}{why}.") from None


@dataclass(frozen=True)
class Range:
    """Allowed numbers: low <= x <= high, or < where the side is open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        return above and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        words = []
        if self.low > -math.inf:
            words.append(f"{'above' if self.open_low else 'at least'} {_written(self.low)}")
        if self.high < math.inf:
            words.append(f"{'below' if self.open_high else 'at most'} {_written(self.high)}")
        return " and ".join(words)


def _written(x: float) -> str:
    return f"{x:_}" if isinstance(x, int) and x <= 10**6 else f"{x:g}"


class Elsewhere:
    """Marks an argument that says where something lies, not what it is: it stays out of the identity."""


Count = Annotated[int, Range(1, 10**15)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Probability = Annotated[float, Range(0, 1, open_high=True)]
Location = Annotated[str, Elsewhere]
Component = Mapping  # a node with `_target_`; its schema is that target's signature


@dataclass
class Budget:
    tokens: Count


@dataclass
class Paths:
    runs: str
    cache: str | None = None


@dataclass
class Checkpoint:
    seconds: NonNegative = 30.0


@dataclass
class Diagnostics:
    every: Whole | None = None  # steps; null: about 40 times over the budget


@dataclass
class Evaluation:
    """Besides these it holds, each under its name, the components that are done at the end of the run."""

    every: Count | None = None  # tokens; null: 20 times over the budget
    tokens: Count = 8_192
    weights: Literal["last", "best"] = "last"  # those that the evaluations at the end are of


@dataclass
class Trainer:
    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: Literal[-1] | Annotated[int, Range(1, 1024)] = 1  # of each node; -1: all its GPUs
    num_nodes: Annotated[int, Range(1, 10_000)] = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    threads: Annotated[int, Range(1, 1024)] | None = None
    deterministic: bool = False
    gradient_checkpointing: bool = False  # the same numbers in less memory
    compile: bool = False  # rounds differently, so it is another setting


@dataclass
class Config:
    """The root of a configuration. `choices` names the option taken in each group; Hydra fills it in."""

    model: Component
    norm: Component
    norm_type: Component
    attention: Component
    dropout: Component
    dropout_time: Component
    optimizer: Component
    schedule: Component
    clip: Component
    loss: Component
    data: Component
    tokenizer: Component
    task: Component
    logger: Component
    trainer: Trainer
    evaluation: Evaluation
    budget: Budget
    paths: Paths
    checkpoint: Checkpoint
    diagnostics: Diagnostics
    seed: Annotated[int, Range(0, 10**18)] = 0
    force: bool = False
    debug: bool = False
    choices: dict | None = None


COMPONENTS = [f.name for f in fields(Config) if f.type is Component]
# What determines the weights. Evaluation, diagnostics, trainer, logger, paths, force and debug do not.
SIGNIFICANT = [
    "model",
    "norm",
    "norm_type",
    "attention",
    "dropout",
    "dropout_time",
    "optimizer",
    "schedule",
    "clip",
    "loss",
    "data",
]
SIGNIFICANT += ["tokenizer", "task", "budget"]
# what a group that came later does where it does nothing: left out, so that runs from before it are found
NEUTRAL = {
    "dropout_time": "albert_ablate.model.dropout.Constant",
    "task": "albert_ablate.data.tasks.LanguageModeling",
}


@dataclass(frozen=True)
class Revision:
    """A component's arithmetic was corrected after runs had been made with it.

    number: of the revision now; 1, the number of all others, is never written. what: the correction, in words.
    concerns: whether it changes the weights of a configuration, which may be composed, checked or a record's.
    """

    number: int
    what: str
    concerns: typing.Callable[[Mapping], bool] = lambda cfg: True


def _scales_decay(cfg: Mapping) -> bool:
    """Whether weights decay and the placement has a multiplier on that."""
    norm, scaled = cfg["norm"], str(cfg["norm"].get("_target_")).endswith(".CompleteP")
    other_width = scaled and cfg["model"].get("width") != norm.get("base_width", 32)
    return bool(other_width and cfg["optimizer"].get("weight_decay", 1))


def _zero_gradients_at_first(cfg: Mapping) -> bool:
    """Whether matrices have a gradient of 0 until a gate or a last matrix has left 0."""
    name = str(cfg["norm"].get("_target_")).rpartition(".")[2]
    return name in ("ReZero", "Fixup") or name == "SkipInit" and not cfg["norm"].get("initial", 0.0)


# The number is part of the identity of the settings that it concerns, so that a run made before the correction is never
# taken for one made after it; all other settings keep their names.
REVISIONS = {
    "albert_ablate.model.placements.TFixup": Revision(
        2,
        "learned positions are drawn as small as the embedding",
        lambda cfg: cfg["attention"].get("positions") == "learned",
    ),
    "albert_ablate.optim.clipping.AdaGC": Revision(
        2, "a tensor whose gradient is 0 in the warm-up is not cut to 0 afterwards", _zero_gradients_at_first
    ),
    "albert_ablate.optim.clipping.SkipStep": Revision(2, "unusually low values are not a reason to skip"),
    "albert_ablate.optim.clipping.ZClip": Revision(2, "a gradient that is not clipped keeps its size"),
    "albert_ablate.optim.optimizers.cautious": Revision(2, "the mean of the mask is over entries with a gradient"),
    "albert_ablate.optim.optimizers.independent_adamw": Revision(
        2, "the decay does not depend on the multipliers of the placement", _scales_decay
    ),
    "albert_ablate.optim.optimizers.spam": Revision(
        2, "the warm-up begins a step later and nothing is cut where the second moment is 0"
    ),
}
SEVERAL = ("logger",)  # groups of which several options may be taken at once
NUISANCE = ("optimizer.lr",)
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}


def nearest(word: str, allowed: typing.Iterable[str]) -> str:
    """The allowed words, those most like `word` first."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    return ", ".join(close + [w for w in allowed if w not in close])


def describe(annotation: Any) -> str:
    """What an annotation allows, in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limit = next((str(a) for a in args[1:] if isinstance(a, Range)), "")
        return f"{describe(args[0])} {limit}".strip()
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin in (list, tuple):
        inner = [a for a in args if a is not Ellipsis]
        if origin is tuple and Ellipsis not in args:
            return f"a list of {len(args)} values, each {describe(inner[0])}"
        twice = ", none twice" if typing.get_origin(inner[0]) is Literal else ""
        return f"a list of one or more, each {describe(inner[0])}{twice}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def checked(value: Any, annotation: Any, key: str) -> Any:
    """`value` as the annotation wants it (1e6 becomes an int where one is asked for), or a ConfigError."""
    try:
        return _fit(value, annotation)
    except ValueError:
        raise ConfigError(f"{key}={_shown(value)} is not allowed: it must be {describe(annotation)}.") from None


def _fit(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty):
        return value
    if origin is Annotated:
        value = _fit(value, args[0])
        if any(isinstance(a, Range) and not a.holds(value) for a in args[1:]):
            raise ValueError
        return value
    if origin in (Union, types.UnionType):
        for arm in args:
            try:
                return _fit(value, arm)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise ValueError
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple) or not value:
            raise ValueError
        if origin is tuple and Ellipsis not in args and len(value) != len(args):
            raise ValueError
        inner = args if origin is tuple and Ellipsis not in args else [args[0]] * len(value)
        if typing.get_origin(args[0]) is Literal and any(v in value[:i] for i, v in enumerate(value)):
            raise ValueError
        return [_fit(v, a) for v, a in zip(value, inner, strict=True)]
    if annotation is bool or annotation is str or annotation is type(None):
        if annotation is str and type(value) is int:  # a folder may be named 2024
            value = str(value)
        if not isinstance(value, annotation) or value == "":
            raise ValueError
        return value
    if annotation in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if annotation is int and value != int(value):
            raise ValueError
        return annotation(value)
    if annotation is dict:
        if not isinstance(value, Mapping):
            raise ValueError
        return dict(value)
    raise TypeError(f"the schema has no rule for {annotation}")


# of options of earlier releases, which records name
FORMER_TARGETS: tuple[str, ...] = ("albert_ablate.records.wandb.NoLogger",)
FORMER_TARGETS += ("albert_ablate.model.pretrained.Pretrained",)  # what model=pretrained is replaced by
TRUST = "ALBERT_ABLATE_TRUST"  # environment variable: modules or names of plug-ins, with commas between them


def target_of(path: str) -> Any:
    """The class or function that a `_target_` names: of a shipped option, or of a plug-in that the user has named.

    Nothing else is imported, wherever the configuration comes from: a run folder or a sweep file may be a stranger's.
    Plug-ins are named on this machine, ALBERT_ABLATE_TRUST=my_norms,other.package.Class; a module stands for what is
    defined in it and in the modules below it, not for what it imports. Raises ConfigError.
    """
    if path in FORMER_TARGETS or _shipped(path):
        return _imported(path)
    named = _trusted()
    if not _below(path, named):
        raise ConfigError(
            f"_target_={_short(path)} is not a component of this package: to use a plug-in of your own, set "
            f"{TRUST} to its module, and only to modules whose code you trust."
        )
    target = _imported(path)
    home = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}"
    if path not in named and not _below(home, named):
        raise ConfigError(
            f"_target_={_short(path)} is defined as {_short(home)}, which {TRUST}={','.join(named)} does not name."
        )
    return target


def _trusted() -> tuple[str, ...]:
    return tuple(name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip())


def _below(path: str, named: typing.Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in named)


def _shipped(path: str) -> bool:
    """Whether an option in conf/ has this `_target_`."""
    if path not in _shipped_targets():
        _shipped_targets.cache_clear()  # the option may be new
    return path in _shipped_targets()


@cache
def _shipped_targets() -> frozenset[str]:
    texts = [file.read_text() for file in conf_folder().glob("*/*.yaml")]
    return frozenset(found for text in texts for found in re.findall(r"^\s*_target_:\s*([\w.]+)", text, re.MULTILINE))


@cache
def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ConfigError:
        raise
    except Exception as error:  # a plug-in may break in any way
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise ConfigError(f"_target_={path} cannot be imported: {_short(reason)}.") from None


def construct(node: Mapping) -> Any:
    """The component that a checked node describes: its target called with its arguments, or, with `_partial_`, bound to
    them. Arguments with a `_target_` of their own are built first.

    Unlike Hydra's `instantiate` it reads no `_args_`, resolves no interpolation (`${oc.env:KEY}`) and imports nothing
    but what `target_of` allows. Raises ConfigError with one sentence for whatever the target raises.
    """
    target = target_of(node["_target_"])
    nested = node.get("_recursive_", True)
    arguments = {str(k): _constructed(v) if nested else v for k, v in node.items() if k not in HYDRA_KEYS}
    if node.get("_partial_"):
        return partial(target, **arguments)
    try:
        return target(**arguments)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(
            f"{node['_target_']} cannot be built: {_short(f'{type(error).__name__}: {error}')}."
        ) from error


def _constructed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return construct(value) if "_target_" in value else {k: _constructed(v) for k, v in value.items()}
    return [_constructed(v) for v in value] if isinstance(value, list | tuple) else value


def parameters_of(path: str) -> dict[str, tuple[Any, Any]]:
    """The configurable arguments of a target: name -> (annotation, default). `MISSING` marks a required one."""
    return _parameters(target_of(path))


@cache
def _parameters(target: Any) -> dict[str, tuple[Any, Any]]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(target)
    owner = target.__init__ if inspect.isclass(target) and not is_dataclass(target) else target
    hints = typing.get_type_hints(owner, include_extras=True)
    return {
        p.name: (hints.get(p.name, Any), MISSING if p.default is inspect.Parameter.empty else p.default)
        for p in signature.parameters.values()
        if p.kind in kinds
    }


def component_with_defaults(node: Any, key: str, choice: str | None = None) -> dict:
    """The node of a component with the defaults of its target's signature filled in, every value of its type."""
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}={_shown(node)} is not allowed: it must be one of {_listed(options()[key])}.")
    option = f"{key}={choice}" if choice else f"this {key}"
    known = parameters_of(node["_target_"])
    for name, value in node.items():
        if name not in known and name not in HYDRA_KEYS:
            takes = f"{option} takes {nearest(str(name), known) if known else 'no numbers'}"
            others = [o for o in _options_with(key, str(name)) if o != choice]
            there = f"; it belongs to {key}={' or '.join(others)}" if others else ""
            raise ConfigError(f"{key}.{name}={_shown(value)} is unknown: {takes}{there}.")
    out = {name: value for name, value in node.items() if name in HYDRA_KEYS}
    for name, (annotation, default) in known.items():
        value = node.get(name, default)
        if value is MISSING or value == "???":
            raise ConfigError(f"{key}.{name} is missing: {option} needs {describe(annotation)}.")
        out[name] = checked(value, annotation, f"{key}.{name}")
    return out


def _check_several(nodes: Mapping, key: str) -> dict:
    """Several options of one group, each under its own name: logger=[wandb_offline,tensorboard]."""
    taken = [name for name, node in nodes.items() if isinstance(node, Mapping) and "_target_" in node]
    if not taken:
        raise ConfigError(f"{key} is empty: it must name one or more of {_listed(options()[key])}.")
    for name, node in nodes.items():
        if name not in taken:
            raise ConfigError(
                f"{key}.{name}={_shown(node)} is not allowed: with {key}=[{','.join(taken)}] a setting names its "
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
        raise ConfigError(f"{key}={_shown(node)} would do nothing: evaluation={name} asks for that evaluation.")
    return component_with_defaults(node, key, None)


def _check_section(node: Any, schema: type, key: str, choices: Mapping) -> dict:
    hints = typing.get_type_hints(schema, include_extras=True)
    prefix = f"{key}." if key else ""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}={_shown(node)} is not allowed: it holds {', '.join(prefix + h for h in hints)}.")
    parts = options()["evaluation"] if schema is Evaluation else []
    out: dict[str, Any] = {}
    for name, value in node.items():
        if name in parts:
            out[name] = _check_part(value, f"{prefix}{name}", name)
        elif name not in hints:
            close = [prefix + n for n in nearest(str(name), hints).split(", ")[:5]]
            raise ConfigError(f"{prefix}{name}={_shown(value)} is unknown: the nearest keys are {', '.join(close)}.")
    for f in fields(schema):
        dotted, annotation = f"{prefix}{f.name}", hints[f.name]
        value = node.get(f.name, f.default)
        if value is MISSING or value == "???":
            group = options().get(f.name) if not key else None
            must = f"one of {_listed(group)}" if group else describe(annotation)
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


def _shown(value: Any) -> str:
    """A value as a person would write it, cut where it is long: it may come from a stranger."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return _LIMITED.repr(value) if isinstance(value, Mapping | list | tuple) else _short(str(value))


_LIMITED = reprlib.Repr()
_LIMITED.maxlevel, _LIMITED.maxdict, _LIMITED.maxlist, _LIMITED.maxtuple, _LIMITED.maxstring = 3, 12, 12, 12, 200


def _short(text: str, most: int = 500) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _listed(names: typing.Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _options_with(group: str, name: str) -> list[str]:
    """The options of a group whose YAML sets `name`."""
    files = sorted((conf_folder() / group).glob("*.yaml"))
    return [f.stem for f in files if any(line.startswith(f"{name}:") for line in f.read_text().splitlines())]


@cache
def option_keys(group: str) -> dict[str, frozenset[str]]:
    """The keys that each option of a group takes: those in its file and in the files of the same `_target_`.

    Without importing the targets. Empty for a group whose options are not all components.
    """
    import yaml

    files = sorted((conf_folder() / group).glob("*.yaml"))
    nodes = {f.stem: yaml.safe_load(f.read_text()) or {} for f in files}
    if not all("_target_" in node for node in nodes.values()):
        return {}
    targets: dict[str, set[str]] = {}
    for node in nodes.values():
        targets.setdefault(node["_target_"], set()).update(node)
    return {name: frozenset(targets[node["_target_"]] - HYDRA_KEYS) for name, node in nodes.items()}


def lacking(key: str, taken: Mapping[str, Any], others: typing.Callable[[str], typing.Iterable[Any]]) -> bool:
    """Whether the option taken in a key's group lacks this key, which one of the group's `others` has.

    `taken`: values by key; `others`: the options of a group that count. dropout=none lacks dropout.mean.
    """
    group, dot, name = key.partition(".")
    if not dot or group not in taken or group not in options():
        return False
    known, name = option_keys(group), name.partition(".")[0]
    own = known.get(str(taken[group]))
    return own is not None and name not in own and any(name in known.get(str(o), ()) for o in others(group))


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
    _check_together(out)
    return out


def _check_together(cfg: dict) -> None:
    """Contradictions between keys and between groups."""
    model, data, steps = cfg["model"], cfg["data"], steps_of(cfg)
    head_width = cfg["attention"].get("head_width")
    if head_width is None and model["width"] % model["heads"]:
        raise ConfigError(f"model.width={model['width']} is not divisible by model.heads={model['heads']}.")
    if cfg["attention"]["positions"] == "rotary" and (head_width or model["width"] // model["heads"]) % 2:
        cause = f"model.width={model['width']} over model.heads={model['heads']} leaves an odd number per head"
        if head_width is not None:
            cause = f"attention.head_width={head_width} is odd"
        raise ConfigError(f"attention.positions=rotary turns pairs of dimensions: {cause}.")
    if data["batch"] % data["accumulate"]:
        raise ConfigError(f"data.batch={data['batch']} is not divisible by data.accumulate={data['accumulate']}.")
    trainer = cfg["trainer"]
    ranks = trainer["devices"] * trainer["num_nodes"]
    if ranks > 1 and data["batch"] % (data["accumulate"] * ranks):
        raise ConfigError(
            f"data.batch={data['batch']} is not divisible into data.accumulate={data['accumulate']} micro-batches on "
            f"{ranks} devices."
        )
    if trainer["strategy"] == "fsdp":
        _check_sharded(cfg)
    if trainer["precision"] == "16-mixed" and trainer["accelerator"] == "cpu":  # Lightning would take bf16-mixed
        raise ConfigError("trainer.precision=16-mixed needs a GPU: on trainer=cpu take bf16-mixed.")
    if steps < 1:
        raise ConfigError(
            f"budget.tokens={cfg['budget']['tokens']} is less than one batch of data.batch={data['batch']} sequences "
            f"of model.context={model['context']} tokens."
        )
    norm_type = cfg["norm_type"]
    if not _normalizes(cfg):
        kind, changed = norm_type["_target_"].rpartition(".")[2], component_arguments(norm_type)
        idle = (
            [f"norm_type.{k}={_shown(v)}" for k, v in changed.items()]
            if kind == "layer_norm"
            else [f"norm_type={kind}"]
        )
        if idle:
            norm = (cfg["choices"] or {}).get("norm") or target_of(cfg["norm"]["_target_"]).__name__
            raise ConfigError(f"{idle[0]} would do nothing: norm={norm} takes no norm type; leave it out.")
    for key in COMPONENTS:
        verify = "_target_" in cfg[key] and getattr(target_of(cfg[key]["_target_"]), "verify", None)
        if verify:
            verify(cfg)
    parts = evaluations_of(cfg)
    for node in parts.values():
        if verify := getattr(target_of(node["_target_"]), "verify", None):
            verify(cfg)
    if cfg["evaluation"]["weights"] != "last" and not parts:
        raise ConfigError("evaluation.weights=best would do nothing: no evaluation at the end is asked for.")


def evaluations_of(cfg: Mapping) -> dict[str, dict]:
    """The evaluations asked for at the end of the run, by name."""
    return {name: dict(node) for name, node in cfg["evaluation"].items() if isinstance(node, Mapping)}


# what works on the shards of a matrix as on the whole; the rest is refused with fsdp until shown equal on GPUs
SHARDED = {"optimizer": ("adamw", "adam", "sgd"), "clip": ("ClipNorm", "NoClip")}


def _check_sharded(cfg: dict) -> None:
    for key, allowed in SHARDED.items():
        kind = cfg[key]["_target_"].rpartition(".")[2]
        if kind not in allowed:
            names = {"ClipNorm": "norm", "NoClip": "none"}
            raise ConfigError(
                f"{key}={(cfg['choices'] or {}).get(key) or kind} needs whole matrices, which trainer.strategy=fsdp "
                f"splits: take {key}={' or '.join(names.get(a, a) for a in allowed)}, or trainer=ddp."
            )
    if cfg["model"].get("shared"):
        raise ConfigError("model.shared=true is not allowed with trainer.strategy=fsdp, which splits block by block.")
    if cfg["trainer"]["compile"]:
        raise ConfigError(
            "trainer.compile=true is not allowed with trainer.strategy=fsdp: it has not been tried there."
        )


def steps_of(cfg: Mapping) -> int:
    """Optimizer steps that fit into the budget: budget.tokens // (data.batch * model.context)."""
    return cfg["budget"]["tokens"] // (cfg["data"]["batch"] * cfg["model"]["context"])


def component_arguments(node: Mapping) -> dict:
    """A component's own arguments, those equal to their signature's default and those of place left out."""
    known = parameters_of(node["_target_"])
    out = {}
    for name, value in node.items():
        if name in HYDRA_KEYS:
            continue
        annotation, default = known[name]
        if any(a is Elsewhere for a in typing.get_args(annotation)[1:]):
            continue
        if default is MISSING or value != (list(default) if isinstance(default, tuple) else default):
            out[name] = value
    return out


def _normalizes(cfg: Mapping) -> bool:
    """Whether norm_type counts: the placement, or the embedding, is normalized by it."""
    placement = target_of(cfg["norm"]["_target_"])
    return getattr(placement, "uses_norm", True) or bool(cfg["model"].get("embedding_norm"))


def revisions(cfg: Mapping) -> dict[str, int]:
    """The revision of each component of a configuration that has more than one, by group.

    `cfg` may be composed, checked, or a record's. No component is imported.
    """
    return {group: revision.number for group, revision in _revised(cfg).items()}


def _revised(cfg: Mapping) -> dict[str, Revision]:
    targets = {key: str(cfg[key].get("_target_")) for key in SIGNIFICANT if isinstance(cfg.get(key), Mapping)}
    found = {key: REVISIONS[target] for key, target in targets.items() if target in REVISIONS}
    return {key: revision for key, revision in found.items() if revision.concerns(cfg)}


def is_outdated(record: Mapping) -> bool:
    """Whether a run was made by components that have been corrected since: it is not evidence about today's."""
    return bool(corrections(record))


def corrections(record: Mapping) -> list[str]:
    """What has been corrected, in words, in the components that a run was made by since it was made."""
    config, noted = record.get("config"), record.get("revisions") or {}
    if not isinstance(config, Mapping) or not isinstance(noted, Mapping):
        return []
    try:
        now = _revised(config)
    except (KeyError, AttributeError, TypeError):  # not a configuration of ours
        return []
    changed = [key for key in now.keys() | noted.keys() if noted.get(key, 1) != (now[key].number if key in now else 1)]
    return [f"{key}: {now[key].what if key in now else 'made by another release'}" for key in sorted(changed)]


def significant(cfg: Mapping, fingerprint: str) -> dict:
    """All that determines the weights besides the seed, as a plain dictionary. `fingerprint` stands for the text."""
    cfg = check(cfg)
    out: dict[str, Any] = {}
    for key in SIGNIFICANT:
        node = cfg[key]
        if key in NEUTRAL and node["_target_"] == NEUTRAL[key]:
            continue
        out[key] = {"_target_": node["_target_"], **component_arguments(node)} if key in COMPONENTS else dict(node)
    for key, revision in revisions(cfg).items():
        out[key]["revision"] = revision
    if not _normalizes(cfg):
        del out["norm_type"]
    if cfg["trainer"]["precision"] != "32-true":
        out["precision"] = cfg["trainer"]["precision"]
    if cfg["trainer"]["compile"]:
        out["compile"] = True
    out["fingerprint"] = fingerprint
    return out


@dataclass(frozen=True)
class Identity:
    """Hashes that name an arm (no seed, no learning rate), a setting (no seed; the folder) and a run."""

    arm: str
    setting: str
    run: str


def identity(cfg: Mapping, fingerprint: str) -> Identity:
    """Who a run is. Equal for configurations that lead to the same weights."""
    parts = significant(cfg, fingerprint)
    setting = _hash(parts)
    for dotted in NUISANCE:
        group, name = dotted.split(".")
        parts[group] = {k: v for k, v in parts[group].items() if k != name}
    return Identity(arm=_hash(parts), setting=setting, run=run_identity(setting, cfg["seed"]))


def run_identity(setting: str, seed: int) -> str:
    """The name of the run of a setting and a seed."""
    return _hash({"setting": setting, "seed": seed})


def _hash(parts: Mapping) -> str:
    return digest(json.dumps(parts, sort_keys=True).encode(), size=6)


def conf_folder() -> Path:
    """The folder of configuration groups: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    return next(p for p in (package / "conf", package.parent / "conf") if p.is_dir())


def options() -> dict[str, list[str]]:
    """Configuration groups and the options in each, from the folder listing of conf/."""
    folders = sorted(p for p in conf_folder().iterdir() if p.is_dir())
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in folders}


def compose(overrides: typing.Sequence[str] = ()) -> Any:
    """The configuration that `python run.py <overrides>` would train: `compose(["norm=pre_ln", "seed=1"])`.

    Raises ConfigError with one sentence for whatever is not allowed.
    """
    from omegaconf import OmegaConf

    overrides = prepared(overrides)
    cfg, choices = composition(overrides)
    return OmegaConf.create(check(with_choices(cfg, choices, overrides)))


def composition(overrides: typing.Sequence[str]) -> tuple[Any, dict[str, str]]:
    """What `prepared` overrides compose to, interpolations not resolved and nothing checked; the option taken by group.

    Hydra reads some thirty files for each composition. Values (++key=value) count after all options, so options are
    composed once, and values set on a copy in the way Hydra sets them; what it would refuse is left to it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    values = [o for o in overrides if o.startswith("++") and not o.startswith("++hydra")]
    files = tuple((str(f), f.stat().st_mtime_ns) for f in sorted(conf_folder().rglob("*.yaml")))
    try:
        parsed = OverridesParser.create().parse_overrides(values)
        # what takes a key away again, after it was set, counts in the order it was written
        taken = any(o.startswith("~") and o[1:].partition("=")[0] not in options() for o in overrides)
        if taken or any(o.is_sweep_override() or o.package is not None for o in parsed):
            parsed, values = [], []
    except HydraException:
        parsed, values = [], []
    try:
        kept, choices = _by_hydra(tuple(o for o in overrides if o not in values), files)
        cfg = kept.copy()
        for override in parsed:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=True)
    except Exception as error:
        raise as_config_error(error) from None
    return cfg, dict(choices)


@lru_cache(256)
def _by_hydra(overrides: tuple[str, ...], files: tuple) -> tuple[Any, dict[str, str]]:
    """Composed by Hydra from these `files` of conf/."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    # a group of which no option is taken has no choice
    choices = {str(k): str(v) for k, v in cfg.hydra.runtime.choices.items() if v is not None}
    return OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"]), choices


def given_twice(overrides: typing.Iterable[str]) -> list[str]:
    """The keys that several overrides set."""
    keys = [o.lstrip("+").partition("=")[0] for o in overrides if "=" in o]
    return [key for key in dict.fromkeys(keys) if keys.count(key) > 1]


def each_once(overrides: typing.Sequence[str]) -> list[str]:
    """Overrides of a command line, each key once: of one given twice the last counts, which is said on stderr."""
    from albert_ablate.records.secrets import masked

    kept = list(overrides)
    for key in given_twice(overrides):
        *others, last = [o for o in overrides if "=" in o and o.lstrip("+").partition("=")[0] == key]
        print(f"{key} stands twice on the command line: {masked(last)} counts.", file=sys.stderr)
        for other in others:
            kept.remove(other)
    return kept


def prepared(overrides: typing.Iterable[str]) -> list[str]:
    """Overrides as Hydra is to see them: `key=value` as `++key=value`, so that keys are judged by `check`, not by it.

    A choice in a group stays as it is, and is refused where the group has no such option.
    """
    groups, out = options(), list[str]()
    for override in overrides:
        plain = override.lstrip("+")
        key, equals, value = plain.partition("=")
        if equals and key in SEVERAL:
            out = [o for o in out if re.split("[@=]", o.lstrip("+~"))[0] != key]  # the last one counts
        if equals and key in SEVERAL and value.startswith("["):
            out += _several(key, value, groups[key])
        elif equals and key in groups:
            value = value.strip("[]") if key == "evaluation" else value  # Hydra takes a list and merges its options
            for choice in [] if "(" in value else value.split(","):  # choice(), glob(): Hydra's own
                if choice.strip(" '\"") not in groups[key]:
                    near = nearest(choice, groups[key])
                    raise ConfigError(f"{key}={choice} is not an option: {key} is one of {near}.")
            out.append(plain)
        elif equals and key.isascii() and key.replace(".", "_").isidentifier() and not key.startswith("hydra."):
            home = value.startswith("~/") and "'" not in value  # the shell leaves it, Hydra cannot read it unquoted
            out.append(f"++{key}='{value}'" if home else f"++{plain}")
        else:
            out.append(override)
    return out


def quoted(text: str) -> str:
    """A text as the value of an override, whatever characters it has."""
    text = re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", r"\'")  # backslashes count before a quote alone
    return f"'{text}'"


def _several(key: str, value: str, names: list[str]) -> list[str]:
    """`logger=[a,b]` as Hydra is to see it: each option under its own name, in place of the one the defaults take."""
    taken = [choice.strip(" '\"") for choice in value[1:-1].split(",") if choice.strip()]
    if not value.endswith("]") or any("[" in choice or "]" in choice for choice in taken):
        raise ConfigError(f"{key}={value} is not allowed: several at once are written {key}=[a,b], one list a command.")
    for choice in taken:
        if choice not in names:
            raise ConfigError(f"{key}={choice} is not an option: {key} is one of {nearest(choice, names)}.")
    if not taken or len(set(taken)) < len(taken) or len(taken) > 1 and "none" in taken:
        raise ConfigError(f"{key}={value} is not allowed: a list names one or more options, each once, and not none.")
    return [f"{key}={taken[0]}"] if len(taken) == 1 else [f"~{key}", *(f"+{key}@{key}.{t}={t}" for t in taken)]


def with_choices(cfg: Any, choices: Mapping, overrides: typing.Iterable[str] = ()) -> Any:
    """A copy of a composed configuration without its `hydra` node, the options taken noted in `choices`.

    overrides: those it was composed with. A model that stands for a checkpoint is replaced by what it says.
    """
    from omegaconf import OmegaConf, open_dict

    if cfg.get("choices") is not None:
        raise ConfigError(f"choices={cfg.choices} is not allowed: it is filled in, an option is taken by group=option.")
    groups = options()
    cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    with open_dict(cfg):
        cfg.choices = {k: v for k, v in choices.items() if k in groups}
        for key in SEVERAL:
            if several := [v for k, v in choices.items() if k.startswith(f"{key}@")]:
                cfg.choices[key] = f"[{','.join(several)}]"
        if "evaluation" not in cfg.choices and "evaluation" in cfg:  # a list of them
            cfg.choices.evaluation = f"[{','.join(evaluations_of(cfg))}]"
    model = cfg.get("model")
    if model is None or "_target_" not in model or not hasattr(target_of(model._target_), "expand"):
        return cfg
    nodes = typing.cast(dict, OmegaConf.to_container(cfg, resolve=True))
    asked = {o.lstrip("+~").partition("=")[0].partition("@")[0] for o in overrides}
    target_of(nodes["model"]["_target_"]).expand(nodes, asked)
    return OmegaConf.create(nodes)


def as_config_error(error: Exception) -> ConfigError:
    """One sentence for what Hydra or OmegaConf has to say about a configuration; any other error is raised as it is."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    theirs = (ConfigError, HydraException, OmegaConfBaseException)
    while isinstance(error.__cause__, theirs) and not isinstance(error, ConfigError):
        error = typing.cast(Exception, error.__cause__)
    if isinstance(error, ConfigError):
        return error
    if not isinstance(error, theirs):
        raise error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        why = next((x for x in lines if not x.startswith(("Error parsing", "See https"))), "").rstrip(".")
        if "NoViableAlt" in why or "mismatched input '='" in why:
            key, equals, value = error.override.removeprefix("++").partition("=")
            example = f"{key}={quoted(value)}" if equals and "'" not in value else "key='value'"
            why = f'a value with special characters needs quotes of its own, "{example}"'
        return ConfigError(f"'{error.override.removeprefix('++')}' cannot be read as key=value: {why}.")
    missing = re.match(r"In '.*': Could not find 'hydra/(launcher|sweeper)/(.*)'", lines[0]) if lines else None
    if missing:
        kind, name = missing.groups()
        there = sorted(lines[lines.index(f"Available options in 'hydra/{kind}':") + 1 :])
        there = [x for x in there if ":" not in x and " " not in x]
        extra = next((x for x in ("ray", "submitit") if name.startswith(x)), None)
        install = f"; pip install 'albert_ablate[{extra}]' adds {name}" if extra else ""
        return ConfigError(f"hydra/{kind}={name} is not there: it must be one of {', '.join(there)}{install}.")
    if lines and lines[0].startswith("Ambiguous value for argument"):
        several = lines[0].split("'")[1].removeprefix("++")
        return ConfigError(f"{several} are several values: add -m to train one after the other.")
    return ConfigError(" ".join(lines).replace("'++", "'").rstrip(".") + ".")
