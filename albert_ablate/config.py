"""What a configuration may hold: types, ranges, checks across groups, and the identity of an arm, a setting and a run.

The schema is read off the code: root keys from the dataclass `Config`, the keys of a component (a node with
`_target_`) from the signature of its target. Parameters before a `/` are filled in by the code and cannot be configured.
Whatever a user can get wrong raises `ConfigError` with one sentence naming the key, its value and what is allowed.
"""

import difflib
import importlib
import inspect
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from albert_ablate.streams import digest


class ConfigError(ValueError):
    """A mistake of the user that can be seen before the first step: one sentence, exit code 2."""


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
            words.append(f"{'above' if self.open_low else 'at least'} {self.low:g}")
        if self.high < math.inf:
            words.append(f"{'below' if self.open_high else 'at most'} {self.high:g}")
        return " and ".join(words)


class Elsewhere:
    """Marks an argument that says where something lies, not what it is: it stays out of the identity."""


Count = Annotated[int, Range(1)]
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
    every: Whole = 10


@dataclass
class Evaluation:
    every: Count
    tokens: Count


@dataclass
class Trainer:
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Count | Literal["auto"] = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    threads: Count | None = None
    deterministic: bool = False


@dataclass
class Config:
    """The root of a configuration. `choices` names the option taken in each group; Hydra fills it in."""

    model: Component
    norm: Component
    norm_type: Component
    attention: Component
    dropout: Component
    optimizer: Component
    schedule: Component
    clip: Component
    loss: Component
    data: Component
    tokenizer: Component
    logger: Component
    trainer: Trainer
    evaluation: Evaluation
    budget: Budget
    paths: Paths
    checkpoint: Checkpoint
    diagnostics: Diagnostics
    seed: Annotated[int, Range(0, 2**62)] = 0
    force: bool = False
    debug: bool = False
    choices: dict | None = None


COMPONENTS = [f.name for f in fields(Config) if f.type is Component]
# What determines the weights. Evaluation, diagnostics, trainer, logger, paths, force and debug do not.
SIGNIFICANT = ["model", "norm", "norm_type", "attention", "dropout", "optimizer", "schedule", "clip", "loss", "data"]
SIGNIFICANT += ["tokenizer", "budget"]
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
        return f"a list whose items are {describe(inner[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def checked(value: Any, annotation: Any, key: str) -> Any:
    """`value` as the annotation wants it (1e6 becomes an int where one is asked for), or a ConfigError."""
    try:
        return _fit(value, annotation)
    except ValueError:
        shown = "null" if value is None else value
        raise ConfigError(f"{key}={shown} is not allowed: it must be {describe(annotation)}.") from None


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
        if not isinstance(value, list | tuple):
            raise ValueError
        if origin is tuple and Ellipsis not in args and len(value) != len(args):
            raise ValueError
        inner = args if origin is tuple and Ellipsis not in args else [args[0]] * len(value)
        return [_fit(v, a) for v, a in zip(value, inner, strict=True)]
    if annotation is bool or annotation is str or annotation is type(None):
        if not isinstance(value, annotation):
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


@cache
def target_of(path: str) -> Any:
    """The class or function a `_target_` names."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_={path} cannot be imported: {error}.") from None


@cache
def parameters_of(path: str) -> dict[str, tuple[Any, Any]]:
    """The configurable arguments of a target: name -> (annotation, default). `MISSING` marks a required one."""
    target = target_of(path)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(target)
    owner = target.__init__ if inspect.isclass(target) and not is_dataclass(target) else target
    hints = typing.get_type_hints(owner, include_extras=True)
    return {
        p.name: (hints.get(p.name, Any), MISSING if p.default is inspect.Parameter.empty else p.default)
        for p in signature.parameters.values()
        if p.kind in kinds
    }


def _check_component(node: Any, key: str) -> dict:
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key}={node} is not allowed: it must be one of the options in conf/{key}/.")
    known = parameters_of(node["_target_"])
    out = {}
    for name, value in node.items():
        if name in HYDRA_KEYS:
            out[name] = value
        elif name not in known:
            what = nearest(name, known) or "nothing, it takes no options"
            raise ConfigError(f"{key}.{name}={value} is unknown: this option of {key} takes {what}.")
        else:
            out[name] = checked(value, known[name][0], f"{key}.{name}")
    for name, (annotation, default) in known.items():
        if default is MISSING and name not in out:
            raise ConfigError(f"{key}.{name} is missing: it must be {describe(annotation)}.")
    return out


def _check_section(node: Any, schema: type, key: str) -> dict:
    hints = typing.get_type_hints(schema, include_extras=True)
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key or 'the configuration'}={node} is not allowed: it holds {', '.join(hints)}.")
    for name in node:
        if name not in hints:
            dotted = f"{key}.{name}" if key else str(name)
            raise ConfigError(f"{dotted}={node[name]} is unknown: the nearest keys are {nearest(str(name), hints)}.")
    out = {}
    for f in fields(schema):
        dotted, annotation = f"{key}.{f.name}" if key else f.name, hints[f.name]
        if f.name not in node:
            if f.default is MISSING:
                raise ConfigError(f"{dotted} is missing.")
            out[f.name] = f.default
        elif annotation is Component:
            out[f.name] = _check_component(node[f.name], dotted)
        elif is_dataclass(annotation):
            out[f.name] = _check_section(node[f.name], annotation, dotted)
        else:
            out[f.name] = checked(node[f.name], annotation, dotted)
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
            cfg = typing.cast(dict, OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}.") from None
    out = _check_section({k: v for k, v in cfg.items() if k != "hydra"}, Config, "")
    _check_together(out)
    return out


def _check_together(cfg: dict) -> None:
    """Contradictions between keys and between groups."""
    model, data, steps = cfg["model"], cfg["data"], steps_of(cfg)
    if model["width"] % model["heads"]:
        raise ConfigError(f"model.width={model['width']} is not divisible by model.heads={model['heads']}.")
    if cfg["attention"].get("positions") == "rotary" and (model["width"] // model["heads"]) % 2:
        raise ConfigError(
            f"attention.positions=rotary turns pairs of dimensions: model.width={model['width']} over "
            f"model.heads={model['heads']} leaves an odd number per head."
        )
    accumulate = data.get("accumulate", 1)
    if data["batch"] % accumulate:
        raise ConfigError(f"data.batch={data['batch']} is not divisible by data.accumulate={accumulate}.")
    if steps < 1:
        raise ConfigError(
            f"budget.tokens={cfg['budget']['tokens']} is less than one batch of data.batch={data['batch']} sequences "
            f"of model.context={model['context']} tokens."
        )
    placement = target_of(cfg["norm"]["_target_"])
    norm_type = cfg["norm_type"]
    kind, changed = norm_type["_target_"].rpartition(".")[2], component_arguments(norm_type)
    if not getattr(placement, "uses_norm", True) and (kind != "layer_norm" or changed):
        raise ConfigError(
            f"norm_type={kind} {changed or ''}would do nothing: norm={placement.__name__} uses no normalization; "
            "leave norm_type at layer_norm."
        )
    for key in COMPONENTS:
        verify = getattr(target_of(cfg[key]["_target_"]), "verify", None)
        if verify:
            verify(cfg)


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


def significant(cfg: Mapping, fingerprint: str) -> dict:
    """All that determines the weights besides the seed, as a plain dictionary. `fingerprint` stands for the text."""
    cfg = check(cfg)
    out: dict[str, Any] = {}
    for key in SIGNIFICANT:
        node = cfg[key]
        out[key] = {"_target_": node["_target_"], **component_arguments(node)} if key in COMPONENTS else dict(node)
    if not getattr(target_of(cfg["norm"]["_target_"]), "uses_norm", True):
        del out["norm_type"]
    if cfg["trainer"]["precision"] != "32-true":
        out["precision"] = cfg["trainer"]["precision"]
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
    return Identity(arm=_hash(parts), setting=setting, run=_hash({"setting": setting, "seed": cfg["seed"]}))


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
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    try:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    except Exception as error:
        raise as_config_error(error, overrides) from None
    return OmegaConf.create(check(with_choices(cfg, cfg.hydra.runtime.choices)))


def with_choices(cfg: Any, choices: Mapping) -> Any:
    """A copy of a composed configuration without its `hydra` node, the options taken noted in `choices`."""
    from omegaconf import OmegaConf, open_dict

    groups = options()
    taken = {k: v for k, v in choices.items() if k in groups}
    cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    with open_dict(cfg):
        cfg.choices = taken
    return cfg


def as_config_error(error: Exception, overrides: typing.Sequence[str] = ()) -> ConfigError:
    """One sentence for what Hydra or OmegaConf has to say about an override; any other error is raised as it is."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    while error.__cause__ is not None and not isinstance(error, ConfigError | MissingConfigException):
        if isinstance(error.__cause__, HydraException | OmegaConfBaseException | ConfigError):
            error = error.__cause__  # type: ignore[assignment]
        else:
            break
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, OverrideParseException):
        return ConfigError(f"'{error.override}' cannot be read as key=value: {str(error).splitlines()[0]}.")
    if not isinstance(error, HydraException | OmegaConfBaseException):
        raise error
    groups = options()
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in groups and "," not in value and value not in ("null", "") and value not in groups[key]:
            return ConfigError(f"{key}={value} is not an option: {key} is one of {nearest(value, groups[key])}.")
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith(("+", "~", "hydra")):
            continue
        known = known_keys(overrides)
        if key not in known:
            return ConfigError(f"{override} is unknown: the nearest keys are {_few_nearest(key, known)}.")
    return ConfigError(" ".join(str(error).split()).rstrip(".") + ".")


def known_keys(overrides: typing.Sequence[str]) -> set[str]:
    """All dotted keys of the configuration with the group choices among `overrides`."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    groups = options()
    picks = [
        o for o in overrides if o.partition("=")[0] in groups and o.partition("=")[2] in groups[o.partition("=")[0]]
    ]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        tree = OmegaConf.to_container(hydra.compose("config", overrides=picks), resolve=False)
    return set(groups) | set(_dotted(typing.cast(dict, tree)))


def _dotted(tree: Mapping, prefix: str = "") -> typing.Iterator[str]:
    for name, value in tree.items():
        if name in HYDRA_KEYS:
            continue
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")


def _few_nearest(key: str, known: set[str]) -> str:
    return ", ".join(nearest(key, known).split(", ")[:5])
