"""Identities of configurations: hashes that name the arm, the setting and the run."""

import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from albert_ablate.config.checking import check
from albert_ablate.config.code import code_by_group, own_code
from albert_ablate.config.components import component_arguments, component_with_defaults, is_place, parameters_of
from albert_ablate.config.errors import ConfigError
from albert_ablate.config.rules import normalizes
from albert_ablate.config.schema import COMPONENTS, DEFAULT_TARGETS
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


def _bfloat16_draws(cfg: Mapping) -> bool:
    """Whether uniform draws in training were bfloat16."""
    return bool((cfg.get("trainer") or {}).get("precision") == "bf16-true")


DROPOUTS = ("Cosine", "DepthDecay", "DepthGrowth", "Geometric", "Huang", "LayerSkip", "Step", "Triangle", "Uniform")
# The number is part of the identity of the settings that it concerns, so that a run made before the correction is never
# taken for one made after it; all other settings keep their names.
REVISIONS = {
    **{
        f"albert_ablate.model.dropout.{name}": Revision(
            2, "masks are drawn as float32: as bfloat16 a rate of 0.001 dropped 0.003", _bfloat16_draws
        )
        for name in DROPOUTS
    },
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
    "albert_ablate.optim.optimizers.sophia": Revision(
        2, "labels are drawn by float32 numbers: by bfloat16 ones 256 were possible", _bfloat16_draws
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
    """Whether a run was made by components that were corrected since then, so that it is no evidence about these."""
    return bool(corrections(record))


def corrections(record: Mapping) -> list[str]:
    """Corrections, in words, to a run's components since it was made."""
    config, noted = record.get("config"), record.get("revisions") or {}
    if not isinstance(config, Mapping) or not isinstance(noted, Mapping):
        return []
    try:
        now = _revised(config)
    except (KeyError, AttributeError, TypeError):  # not a configuration of ours
        return []
    changed = [key for key in now.keys() | noted.keys() if noted.get(key, 1) != (now[key].number if key in now else 1)]
    return [f"{key}: {now[key].what if key in now else 'made by another release'}" for key in sorted(changed)]


def codes(cfg: Mapping) -> dict[str, str]:
    """The hash of the source of each component that determines the weights, by group (config/code.py)."""
    return code_by_group(cfg, SIGNIFICANT)


def changed_code(record: Mapping, cfg: Mapping) -> list[str]:
    """The groups whose component had another source when a run was made than it has now; nothing of older records,
    which do not say."""
    noted = record.get("code") or {}
    now = codes(cfg) if noted else {}
    return [group for group in now if group in noted and now[group] not in _codes_of(record, group)]


def unlike_code(a: Mapping, b: Mapping) -> list[str]:
    """The groups in which two records name one component and were made by different source of it."""
    found = list[str]()
    if a.get("code") == b.get("code"):
        return found
    for group in a.get("code") or {}:
        targets = [((r.get("config") or {}).get(group) or {}).get("_target_") for r in (a, b)]
        if targets[0] == targets[1] and not _codes_of(a, group) & (known := _codes_of(b, group)) and known:
            found.append(group)
    return found


def _codes_of(record: Mapping, group: str) -> set[str]:
    """The sources by which a run was made, or made again with the same weights."""
    again = [r for r in record.get("reproductions") or () if r.get("verdict") == "reproduced"]
    return {code[group] for r in (record, *again) if group in (code := r.get("code") or {})}


def refuse_changed_own_code(place: Any, record: Mapping) -> None:
    """ConfigError where the weights of a run were trained by other source of somebody's own component than is there."""
    cfg = record["config"]
    for group in changed_code(record, cfg):
        if own_code(cfg[group]):
            raise ConfigError(
                f"{place} was made by other code, the source of {group} ({cfg[group]['_target_']}) has changed since: "
                "its weights belong to the code as it was."
            )


def refuse_changed_code(place: Any, record: Mapping, cfg: Mapping, begun: bool = False) -> None:
    """ConfigError where a run was made, or begun, by other code than would make it now, unless accept_code=true."""
    groups = [] if cfg["accept_code"] else changed_code(record, cfg)
    if groups:
        choices = cfg.get("choices") or {}
        named = " and ".join(f"{g}={choices[g]}" if choices.get(g) else g for g in groups)
        how = "begun" if begun else "made"
        ways = ["accept_code=true takes it as it is", "paths.runs=DIR begins anew"]
        ways = ways if begun else ["force=true trains it again beside it", *ways]
        raise ConfigError(
            f"{place} was {how} by other code, the source of {named} has changed since: {', '.join(ways)}."
        )


def significant(cfg: Mapping, fingerprint: str) -> dict:
    """All that determines the weights besides the seed, as a plain dictionary. `fingerprint` stands for the text."""
    return _significant(check(cfg), fingerprint)


def _significant(cfg: Mapping, fingerprint: str, with_code: bool = True) -> dict:
    out: dict[str, Any] = {}
    for key in SIGNIFICANT:
        node = cfg[key]
        if key in DEFAULT_TARGETS and node["_target_"] == DEFAULT_TARGETS[key]:
            continue
        out[key] = {"_target_": node["_target_"], **component_arguments(node)} if key in COMPONENTS else dict(node)
        if with_code and (own := own_code(node)):
            out[key]["code"] = own
    for key, revision in revisions(cfg).items():
        out[key]["revision"] = revision
    if not normalizes(cfg):
        del out["norm_type"]
    if cfg["trainer"]["precision"] != "32-true":
        out["precision"] = cfg["trainer"]["precision"]
    if cfg["trainer"]["compile"]:
        out["compile"] = True
    if cfg["trainer"]["graph"]:
        out["graph"] = cfg["trainer"]["graph"]
    out["fingerprint"] = fingerprint
    return out


@dataclass(frozen=True)
class Identity:
    """Hashes that name an arm (no seed, no learning rate), a setting (no seed; the folder) and a run."""

    arm: str
    setting: str
    run: str


def identity(cfg: Mapping, fingerprint: str) -> Identity:
    """Identity of a run. Equal for configurations that lead to the same weights."""
    return _identity(significant(cfg, fingerprint), cfg["seed"])


def keys_of(cfg: Mapping, with_code: bool = True) -> Identity:
    """`identity` without the text: from the configuration alone, so that records and arms are matched without data.

    cfg: checked, or a record's `config`, which an older release may have written: arguments it lacks have their
    defaults. In place of the text's fingerprint stands where the text lies (`text_locations`), so that on one text two
    configurations have equal keys exactly where they have the same folder. with_code=False leaves out the source of
    somebody's own components; nothing else is read from a disk. Raises
    ConfigError for what is not a configuration of this release. Imports the components, and with them torch.
    """
    whole = dict(cfg) | {
        "trainer": {"precision": "32-true", "compile": False, "graph": False, **(cfg.get("trainer") or {})}
    }
    for key, target in DEFAULT_TARGETS.items():  # a configuration from before there was the group
        whole.setdefault(key, {"_target_": target})
    if missing := [key for key in SIGNIFICANT if not isinstance(whole.get(key), Mapping)]:
        raise ConfigError(f"{missing[0]} is missing.")
    for key in SIGNIFICANT:
        if key in COMPONENTS:
            whole[key] = component_with_defaults(whole[key], key)
    text = json.dumps(text_locations(whole), sort_keys=True)
    return _identity(_significant(whole, text, with_code), whole.get("seed", 0))


def text_locations(cfg: Mapping) -> dict[str, Any]:
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
    """Identity of the run of a setting and a seed."""
    return _hash({"setting": setting, "seed": seed})


def _hash(parts: Mapping) -> str:
    return digest(json.dumps(parts, sort_keys=True).encode(), size=6)
