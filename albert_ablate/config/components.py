"""Components: nodes of the configuration with a `_target_`. Which targets may be imported, what arguments they take."""

import importlib
import inspect
import os
import re
import traceback
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from albert_ablate.collector import without_collector
from albert_ablate.config.code import code_of, is_own
from albert_ablate.config.errors import ConfigError, listed, nearest, read_yaml, shortened, shown
from albert_ablate.config.folders import (
    CONF,
    conf_folder,
    extend_path,
    option_file,
    option_files,
    options,
    own_option_files,
)
from albert_ablate.config.types import Component, NotIdentity, checked, describe

Target = TypeVar("Target")

HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}
# what stands in no YAML: options of earlier releases, which records name, and what an option is replaced by
FORMER_TARGETS = (
    "albert_ablate.trackers.wandb.NoLogger",
    "albert_ablate.model.pretrained.Pretrained",
    "albert_ablate.model.hf.HuggingFace",
    "albert_ablate.model.own.ItsOwn",
    "albert_ablate.model.own.ItsModule",
    "albert_ablate.model.own.ItsOptimizer",
    "albert_ablate.data.own_task.Examples",
)
MOVED = {
    "albert_ablate.records.tracker.": "albert_ablate.trackers.base.",
    "albert_ablate.records.wandb.": "albert_ablate.trackers.wandb.",
    "albert_ablate.records.tensorboard.": "albert_ablate.trackers.tensorboard.",
    "albert_ablate.records.mlflow.": "albert_ablate.trackers.mlflow.",
    "albert_ablate.training.evaluations.": "albert_ablate.evaluations.",
}
GROUPS_WITHOUT_CLASS = ("recipe", "trainer")  # whose options are values
TRUST = "ALBERT_ABLATE_TRUST"  # environment variable: modules or names of plug-ins, with commas between them


def target_of(path: str) -> Any:
    """The class or function that a `_target_` names: of a shipped option, or of a plug-in that the user has named.

    Nothing else is imported, wherever the configuration comes from: a run folder or a sweep file may be a stranger's.
    Plug-ins are named on this machine: by a conf folder (--config-dir, ALBERT_ABLATE_CONF, an installed plug-in), whose
    YAML files name their targets, or by ALBERT_ABLATE_TRUST=my_norms,other.package.Class; there a module stands for
    what is defined in it and in the modules below it, not for what it imports. Raises ConfigError.
    """
    path = next((new + path.removeprefix(old) for old, new in MOVED.items() if path.startswith(old)), path)
    if path in FORMER_TARGETS or _shipped(path):
        return _imported(path)
    extend_path()
    if path in own_targets():
        return _imported(path)
    named = _trusted()
    if not _below(path, named):
        raise ConfigError(
            f"_target_={shortened(path)} is not a component of this package: for one of your own name its conf folder "
            f"(--config-dir DIR, {CONF}=DIR) or set {TRUST} to its module, and only where you trust the code."
        )
    target = _imported(path)
    home = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}"
    if path not in named and not _below(home, named):
        raise ConfigError(
            f"_target_={shortened(path)} is defined as {shortened(home)}, which "
            f"{TRUST}={','.join(named)} does not name."
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
    return frozenset(target for file in conf_folder().glob("*/*.yaml") for target in _targets_in(file))


def own_targets() -> dict[str, Path]:
    """The `_target_`s that the options of conf folders besides the package's own name, each with its YAML file."""
    return {target: file for file in own_option_files() for target in _read_targets(file, file.stat().st_mtime_ns)}


@cache
def _read_targets(file: Path, changed: int) -> list[str]:
    return _targets_in(file)


def _targets_in(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8", errors="replace")
    return re.findall(r"^\s*_target_:\s*['\"]?([\w.]+)", text, re.MULTILINE)


@cache
def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        with without_collector():  # torch may be loaded with it
            found = getattr(importlib.import_module(module), name)
        if is_own(path):
            code_of(path)  # as it is now, should it be edited while this process lives
        return found
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a plug-in may break in any way
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise ConfigError(f"_target_={path} cannot be imported: {shortened(reason)}{_line_of(error)}.") from None


def _line_of(error: BaseException) -> str:
    """Where a plug-in broke, in brackets: the last line of it that was run. A syntax error says so itself."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith("<frozen")]
    frames = [f for f in frames if Path(f.filename).parent.name != "importlib"]
    if isinstance(error, SyntaxError) or not frames:
        return ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


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
            f"{node['_target_']} cannot be built: {shortened(f'{type(error).__name__}: {error}')}."
        ) from error


def traits(**declared: Any) -> Callable[[Target], Target]:
    """Decorator: declare traits of a component that is a function; a class has them as class attributes.

    Rules between components ask for traits and never for names, so that a new component only declares its own:

    averages_weights        optimizer: what is evaluated are averages of the weights it trains
    samples_predictions     optimizer: draws labels from the model's predictions, by a second backward pass
    adam_sized_steps        optimizer: False where its steps are not of the size of Adam's
    works_on_shards         optimizer, clip: gives on shards of a matrix what it gives on the whole
    skips_steps             clip: may leave a step out
    passes                  loss: how often each sequence passes through the model
    keeps_statistics        norm type: each forward pass in training changes what it remembers
    remembers_gradients     norm type: its backward pass changes what it remembers
    rewrites_weights        placement: changes matrices after each step
    starts_from_zero        placement: some matrices are zero at first
    normalizes_embedding    placement: what enters the first block is normalized by it
    takes_parts             model: is built of the norm, attention and dropout that are chosen; False: it has its own
    library                 model: the distribution that makes it, whose release a record notes
    own_module              task: trains a LightningModule of one's own
    looks_inside            evaluation: needs a model that is built of such parts
    """

    def declare(target: Target) -> Target:
        for name, value in declared.items():
            setattr(target, name, value)
        return target

    return declare


def trait(node: Mapping, name: str, default: Any = False) -> Any:
    """A trait of the component that a node describes, see `traits`."""
    return getattr(target_of(node["_target_"]), name, default)


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


def component_with_defaults(node: Any, key: str, choice: str | None = None) -> Component:
    """The node of a component with the defaults of its target's signature filled in, every value of its type."""
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}={shown(node)} is not allowed: it must be one of {listed(options()[key])}.")
    option = f"{key}={choice}" if choice else f"this {key}"
    parameters = parameters_of(node["_target_"])
    for name, value in node.items():
        if name not in parameters and name not in HYDRA_KEYS:
            takes = f"{option} takes {nearest(str(name), parameters) if parameters else 'no numbers'}"
            others = [o for o in _options_with(key, str(name)) if o != choice]
            hint = f"; it belongs to {key}={' or '.join(others)}" if others else ""
            raise ConfigError(f"{key}.{name}={shown(value)} is unknown: {takes}{hint}.")
    out = {name: value for name, value in node.items() if name in HYDRA_KEYS}
    for name, (annotation, default) in parameters.items():
        value = node.get(name, default)
        if value is MISSING or value == "???":
            raise ConfigError(f"{key}.{name} is missing: {option} needs {describe(annotation)}.")
        try:
            out[name] = checked(value, annotation, f"{key}.{name}")
        except ConfigError:
            if name in node:
                raise
            out[name] = value  # the default of somebody else's class, such as an empty text
    return Component(out)


def _options_with(group: str, name: str) -> list[str]:
    """The options of a group whose YAML sets `name`."""
    files = option_files().get(group, {})
    return [o for o in sorted(files) if any(line.startswith(f"{name}:") for line in files[o].read_text().splitlines())]


def option_keys(group: str) -> dict[str, frozenset[str]]:
    """The keys that each option of a group takes: those in its file and in the files of the same `_target_`.

    Without importing the targets. Empty for a group whose options are not all components.
    """
    files = option_files()[group]
    return _keys_in(tuple((name, files[name], files[name].stat().st_mtime_ns) for name in sorted(files)))


@cache
def _keys_in(files: tuple[tuple[str, Path, int], ...]) -> dict[str, frozenset[str]]:
    nodes = {name: read_yaml(file) or {} for name, file, _ in files}
    if not all(isinstance(node, dict) and "_target_" in node for node in nodes.values()):
        return {}
    targets: dict[str, set[str]] = {}
    for node in nodes.values():
        targets.setdefault(node["_target_"], set()).update(node)
    return {name: frozenset(targets[node["_target_"]] - HYDRA_KEYS) for name, node in nodes.items()}


def own_option(group: str, name: str) -> None:
    """ConfigError where the YAML of an option of one's own cannot be read, or names no class that can be imported."""
    own = own_option_files()
    if not own or (file := option_file(group, name)) not in own:
        return
    node = read_yaml(file)
    if not isinstance(node, dict):
        raise ConfigError(f"{file} is not an option: it holds key: value lines.")
    if group in GROUPS_WITHOUT_CLASS or "defaults" in node:
        return
    part = node.get(name) if group == "evaluation" else node
    target = part.get("_target_") if isinstance(part, dict) else None
    if not isinstance(target, str):
        where = f"{name}: " if group == "evaluation" else ""
        raise ConfigError(f"{file} does not name a class: it needs a line {where}_target_: module.Class.")
    try:
        target_of(target)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def lacking(key: str, taken: Mapping[str, Any], others: typing.Callable[[str], typing.Iterable[Any]]) -> bool:
    """Whether the option taken in a key's group lacks this key, which one of the group's `others` has.

    `taken`: values by key; `others`: the options of a group that count. dropout=none lacks dropout.mean.
    """
    group, dot, name = key.partition(".")
    if not dot or group not in taken or group not in options():
        return False
    keys_of_options, name = option_keys(group), name.partition(".")[0]
    option_own = keys_of_options.get(str(taken[group]))
    return (
        option_own is not None
        and name not in option_own
        and any(name in keys_of_options.get(str(o), ()) for o in others(group))
    )


def component_arguments(node: Mapping) -> dict:
    """A component's own arguments, those equal to their signature's default and those of place left out."""
    parameters = parameters_of(node["_target_"])
    out = {}
    for name, value in node.items():
        if name in HYDRA_KEYS:
            continue
        annotation, default = parameters[name]
        if is_place(annotation):
            continue
        if default is MISSING or value != (list(default) if isinstance(default, tuple) else default):
            out[name] = value
    return out


def is_place(annotation: Any) -> bool:
    """Whether an argument says where something lies, not what it is."""
    return any(a is NotIdentity for a in typing.get_args(annotation)[1:])
