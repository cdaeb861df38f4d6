"""Readable names of runs: what differs from the defaults, instead of a hash. Reads YAML only: no Hydra, no torch."""

import contextlib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from albert_ablate.config import HYDRA_KEYS, SIGNIFICANT, conf_folder, option_file

BY_NAME = "by-name"  # a folder of links beside the settings' folders
MAX_NAME_LENGTH = 150  # characters of a link's name


def name_of(cfg: Mapping[str, Any]) -> str:
    """Name of a configuration: its non-default overrides as on the command line; "defaults" if there are none.

    cfg: a checked configuration. Options first (norm=post_ln), then values that differ from those in the option's YAML
    (model.layers=12). The seed and keys that do not affect the weights are left out.
    """
    choices = {k: str(v) for k, v in (cfg.get("choices") or {}).items() if v not in (None, "None", "null")}
    usual = _default_choices()
    recipe = choices.get("recipe")
    if recipe:
        usual = {**usual, "recipe": "", **_recipe_choices(recipe)}
    parts = [
        f"{group}={choices[group]}"
        for group in ("recipe", *SIGNIFICANT)
        if group in choices and choices[group] != usual.get(group)
    ]
    for group in SIGNIFICANT:
        node = cfg.get(group)
        if not isinstance(node, Mapping) or choices.get("model") == group == "pretrained":
            continue
        written = _option(group, choices.get(group))
        for key, value in node.items():
            default = written.get(key, _MISSING)
            if key in HYDRA_KEYS or isinstance(default, str) and "${" in default:
                continue
            if default is _MISSING:  # an argument that the YAML leaves to the signature
                default = _signature_default(str(node.get("_target_", "")), key)
            if isinstance(value, Mapping) and isinstance(default, Mapping):
                parts += [
                    f"{group}.{key}.{k}={_text(v)}" for k, v in value.items() if not same_value(default.get(k), v)
                ]
            elif default is not _MISSING and not same_value(default, value):
                parts.append(f"{group}.{key}={_text(value)}")
    return " ".join(parts) or "defaults"


def display_name(record: Mapping[str, Any]) -> str:
    """Name of a run with its seed; records of releases without names have a label instead."""
    return f"{record.get('name') or record.get('label') or '?'} seed={record.get('seed', '?')}"


def link_by_name(folder: Path, record: Mapping[str, Any]) -> None:
    """Link RUNS/by-name/<name> <seed> to RUNS/<setting>/seed<N>, also for `tensorboard --logdir RUNS/by-name`.

    Nothing depends on the link: where none can be made this does nothing. A name that another setting already has gets
    the setting's hash at its end.
    """
    setting = folder.parent.name
    name = re.sub(r"[^\w=.,+-]+", "_", display_name(record).replace(" ", ","))[:MAX_NAME_LENGTH]
    target = os.path.join(os.pardir, setting, folder.name)
    place = folder.parent.parent / BY_NAME
    with contextlib.suppress(OSError):
        place.mkdir(exist_ok=True)
        for candidate in (name, f"{name},{setting}"):
            link = place / candidate
            try:
                link.symlink_to(target)
                return
            except FileExistsError:
                if link.is_symlink() and (os.readlink(link) == target or not link.exists()):
                    if os.readlink(link) != target:  # it points to a folder that is gone
                        scratch = place / f".{candidate}.{os.getpid()}"
                        scratch.symlink_to(target)
                        os.replace(scratch, link)
                    return


_MISSING: Any = object()


@lru_cache
def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _default_choices() -> dict[str, str]:
    entries = _yaml(conf_folder() / "config.yaml").get("defaults") or []
    return {str(k): str(v) for entry in entries if isinstance(entry, dict) for k, v in entry.items()}


def _recipe_choices(recipe: str) -> dict[str, str]:
    entries = _yaml(option_file("recipe", recipe)).get("defaults") or []
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {str(k).removeprefix("override ").strip("/ "): str(v) for k, v in pairs}


def _option(group: str, choice: str | None) -> dict[str, Any]:
    """The values in an option's YAML, or for a section of config.yaml those there."""
    if choice is None:
        return _yaml(conf_folder() / "config.yaml").get(group) or {}
    values = dict(_yaml(option_file(group, choice)))
    for base in values.pop("defaults", None) or []:  # an option that builds on another of its group
        if isinstance(base, str) and base != "_self_":
            values = {**_option(group, base), **values}
    return values


def _signature_default(target: str, name: str) -> Any:
    from dataclasses import MISSING

    from albert_ablate.config import ConfigError, parameters_of

    with contextlib.suppress(ConfigError):
        default = parameters_of(target).get(name, (None, MISSING))[1] if target else MISSING
        return _MISSING if default is MISSING else default
    return _MISSING


def same_value(a: Any, b: Any) -> bool:
    """Whether two values mean the same though written differently: 1, 1.0 and "1"; a list and a tuple."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    try:
        return a == b or not isinstance(a, bool) and not isinstance(b, bool) and float(a) == float(b)
    except (TypeError, ValueError):
        return False


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return Path(text).name if os.sep in text else text
