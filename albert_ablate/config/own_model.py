"""A model of one's own has its norm, attention and dropout inside: the groups that choose them do not apply to it."""

from collections.abc import Collection, Mapping
from typing import Any

from albert_ablate.config.components import component_with_defaults, trait
from albert_ablate.config.errors import ConfigError, shown
from albert_ablate.config.schema import DEFAULT_TARGETS, Config
from albert_ablate.config.types import Count, checked

ITS_OWN = "albert_ablate.model.own.ItsOwn"  # stands where another model has a part that is chosen
PARTS = {
    "norm": "where its norms stand",
    "norm_type": "which norm it has",
    "attention": "how it attends",
    "dropout": "where it drops out",
    "dropout_time": "when it drops out",
}


def set_aside_parts(nodes: dict[str, Any], asked: Collection[str]) -> None:
    """Put `ITS_OWN` in place of the parts that a composed model of one's own has inside; ConfigError for one that was
    asked for."""
    name = nodes["choices"].get("model") or nodes["model"]["_target_"].rpartition(".")[2]
    refuse_asked(nodes, asked, PARTS, f"model={name}, which says itself")
    for group in PARTS:
        nodes["choices"].pop(group, None)
        if group in ("norm", "attention", "dropout"):  # what the others choose comes to nothing with these
            nodes[group] = {"_target_": ITS_OWN, "_partial_": True}


def refuse_asked(nodes: dict[str, Any], asked: Collection[str], groups: Mapping[str, str], owner: str) -> None:
    """ConfigError where one of these groups, or a number in one, was asked for. groups: what `owner` says itself."""
    for key in sorted(asked):
        group = key.partition(".")[0]
        if group in groups:
            value = nodes["choices"].get(key) if key == group else _value(nodes, key)
            raise ConfigError(f"{key}={shown(value)} is not allowed with {owner} {groups[group]}: leave it out.")
    if (recipe := nodes["choices"].get("recipe")) and "norm" in groups:
        raise ConfigError(f"recipe={recipe} is not allowed with {owner} {groups['norm']}: leave it out.")


def _value(nodes: Mapping, key: str) -> Any:
    for part in key.split("."):
        nodes = nodes.get(part) if isinstance(nodes, Mapping) else None  # type: ignore[assignment]
    return nodes


def check_own_model(cfg: Config) -> None:
    """What a model of one's own cannot be asked for, each refused by name."""
    name = cfg.option("model")
    if "context" not in cfg.model:
        raise ConfigError(f"model={name} needs an argument context: the number of tokens of a training sequence.")
    for group in ("norm", "attention", "dropout"):
        if cfg[group]["_target_"] != ITS_OWN:
            raise ConfigError(
                f"{group}={cfg.option(group)} is not allowed with model={name}, which says itself {PARTS[group]}."
            )
    if cfg.task._target_ != DEFAULT_TARGETS["task"]:
        raise ConfigError(f"task={cfg.option('task')} is not allowed with model={name}: it needs features, not logits.")
    if cfg.trainer.compile:
        raise ConfigError(f"trainer.compile=true is not allowed with model={name}: compile it where it is made.")
    if cfg.trainer.strategy == "fsdp":
        raise ConfigError(f"trainer.strategy=fsdp is not allowed with model={name}: take trainer=ddp.")
    for part, node in cfg.evaluation.parts.items():
        if trait(node, "looks_inside"):
            raise ConfigError(
                f"evaluation={part} is not allowed with model={name}: it inspects the blocks of the shipped model."
            )


def steps_to_tokens(nodes: dict[str, Any], asked: Collection[str]) -> None:
    """Put budget.tokens in place of budget.steps, the number of optimizer steps."""
    steps = nodes["budget"].pop("steps")
    if "budget.tokens" in asked:
        raise ConfigError(f"budget.steps={shown(steps)} and budget.tokens are two budgets: give one of them.")
    steps = checked(steps, Count, "budget.steps")
    batch, context = (
        component_with_defaults(nodes[group], group, nodes["choices"].get(group)).get(name, 1)
        for group, name in (("data", "batch"), ("model", "context"))
    )
    nodes["budget"]["tokens"] = steps * batch * context
