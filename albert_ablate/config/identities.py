"""Which run a configuration asks for: the hashes of its arm, its setting and its run."""

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from albert_ablate.config.checking import check
from albert_ablate.config.components import component_arguments
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
