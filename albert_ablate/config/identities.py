"""Which run a configuration asks for: the hashes of its arm, its setting and its run."""

import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from albert_ablate.config.checking import check
from albert_ablate.config.components import component_arguments, component_with_defaults, is_place, parameters_of
from albert_ablate.config.errors import ConfigError
from albert_ablate.config.rules import normalizes
from albert_ablate.config.schema import COMPONENTS, NEUTRAL
from albert_ablate.streams import digest

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
TEXT = ("data", "tokenizer", "task")  # what is read in training


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
NUISANCE = ("optimizer.lr",)


def revisions(cfg: Mapping) -> dict[str, int]:
    """The revision of each component of a configuration that has more than one, by group.

    `cfg` may be composed, checked, or a record's. No component is imported.
    """
    return {group: revision.number for group, revision in _revised(cfg).items()}


def _revised(cfg: Mapping) -> dict[str, Revision]:
    targets = {key: str(cfg[key].get("_target_")) for key in SIGNIFICANT if isinstance(cfg.get(key), Mapping)}
    revised = {key: REVISIONS[target] for key, target in targets.items() if target in REVISIONS}
    return {key: revision for key, revision in revised.items() if revision.concerns(cfg)}


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
    return _significant(check(cfg), fingerprint)


def _significant(cfg: Mapping, fingerprint: str) -> dict:
    out: dict[str, Any] = {}
    for key in SIGNIFICANT:
        node = cfg[key]
        if key in NEUTRAL and node["_target_"] == NEUTRAL[key]:
            continue
        out[key] = {"_target_": node["_target_"], **component_arguments(node)} if key in COMPONENTS else dict(node)
    for key, revision in revisions(cfg).items():
        out[key]["revision"] = revision
    if not normalizes(cfg):
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
    return _identity(significant(cfg, fingerprint), cfg["seed"])


def keys_of(cfg: Mapping) -> Identity:
    """`identity` without the text: from the configuration alone, so that records and arms are matched without data.

    cfg: checked, or a record's `config`, which an older release may have written: arguments it lacks have their
    defaults. In place of the text's fingerprint stands where the text lies (`places`), so that on one text two
    configurations have equal keys exactly where they have the same folder. Nothing is read from a disk. Raises
    ConfigError for what is not a configuration of this release. Imports the components, and with them torch.
    """
    whole = dict(cfg) | {"trainer": {"precision": "32-true", "compile": False, **(cfg.get("trainer") or {})}}
    for key, target in NEUTRAL.items():  # a configuration from before there was the group
        whole.setdefault(key, {"_target_": target})
    if missing := [key for key in SIGNIFICANT if not isinstance(whole.get(key), Mapping)]:
        raise ConfigError(f"{missing[0]} is missing.")
    for key in SIGNIFICANT:
        if key in COMPONENTS:
            whole[key] = component_with_defaults(whole[key], key)
    return _identity(_significant(whole, json.dumps(places(whole), sort_keys=True)), whole.get("seed", 0))


def places(cfg: Mapping) -> dict[str, Any]:
    """Where a checked configuration's text, tokenizer and labels lie, by dotted key; defaults are left out.

    Spellings of one path are one: t.txt, ./t.txt and the absolute path of t.txt in the working directory.
    """
    locations = {}
    for key in TEXT:
        for name, (annotation, default) in parameters_of(cfg[key]["_target_"]).items():
            value = cfg[key].get(name, default)
            if is_place(annotation) and value != default:
                locations[f"{key}.{name}"] = _plain_path(value) if name == "path" else value
    return locations


def _plain_path(path: str) -> str:
    """Relative to the working directory where it lies below it."""
    path, here = os.path.normpath(os.path.expanduser(path)), os.getcwd()
    return os.path.relpath(path, here) if path.startswith(f"{here}{os.sep}") else path


def _identity(parts: dict[str, Any], seed: int) -> Identity:
    setting = _hash(parts)
    for dotted in NUISANCE:
        group, name = dotted.split(".")
        parts[group] = {k: v for k, v in parts[group].items() if k != name}
    return Identity(arm=_hash(parts), setting=setting, run=run_identity(setting, seed))


def run_identity(setting: str, seed: int) -> str:
    """The name of the run of a setting and a seed."""
    return _hash({"setting": setting, "seed": seed})


def _hash(parts: Mapping) -> str:
    return digest(json.dumps(parts, sort_keys=True).encode(), size=6)
