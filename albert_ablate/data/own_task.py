"""A task of one's own: a LightningModule and a LightningDataModule, named by the configuration. No torch here."""

from collections.abc import Collection, Mapping
from typing import Any

from albert_ablate.config import (
    Component,
    Config,
    ConfigError,
    Count,
    component_arguments,
    component_with_defaults,
    target_of,
)
from albert_ablate.config.own_model import ITS_OWN, PARTS, refuse_asked

BYTE = {"_target_": "albert_ablate.data.tokenizers.Bytes"}
OPTIMIZER = {"optimizer": "how it is optimized", "schedule": "how it is optimized", "clip": "how it is clipped"}
OTHERS = {"model": "what it trains", "loss": "what its loss is", "tokenizer": "what it reads", "data": "what it reads"}
KEPT = ("data.batch", "data.accumulate")


class Examples:
    """The examples of a data module of one's own: `batch` of them make an optimizer step, in `accumulate` parts."""

    separator = ""

    def __init__(self, batch: Count = 8, accumulate: Count = 1):
        self.batch, self.accumulate = batch, accumulate


class Lightning:
    """Trains a LightningModule on the examples of a LightningDataModule, both of one's own.

    module, data: each a `_target_` and its arguments. tokens: what an example counts in budget.tokens. A module without
    configure_optimizers is trained by optimizer, schedule and clip; one that has it gets optimizer.lr as its argument
    `lr`, if it takes one.
    """

    own_module = True

    def __init__(self, module: dict, data: dict, tokens: Count = 1):
        self.module, self.data, self.tokens = module, data, tokens

    @staticmethod
    def expand(nodes: dict[str, Any], asked: Collection[str]) -> None:
        """Put aside the groups that do not apply; ConfigError where one was asked for."""
        task, name = nodes["task"], nodes["choices"].get("task") or "lightning"
        for key, what in (("module", "LightningModule"), ("data", "LightningDataModule")):
            node = task.get(key)
            if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
                raise ConfigError(f"task.{key}._target_ is missing: task={name} needs a {what}, as module.Class.")
            whole = component_with_defaults(node, f"task.{key}")
            task[key] = {"_target_": node["_target_"], **component_arguments(whole)}
        owner = f"task={name}, whose module says itself"
        refuse_asked(nodes, [key for key in asked if key not in KEPT], PARTS | OTHERS, owner)
        for group in PARTS | OTHERS:
            nodes["choices"].pop(group, None)
        for group in ("norm", "attention", "dropout", "loss"):
            nodes[group] = {"_target_": ITS_OWN, "_partial_": True}
        counts = {key: nodes["data"][key] for key in ("batch", "accumulate") if key in nodes["data"]}
        nodes["data"] = {"_target_": f"{__name__}.{Examples.__name__}", **counts}
        nodes["model"] = {"_target_": "albert_ablate.model.own.ItsModule", "context": task.get("tokens", 1)}
        nodes["tokenizer"] = BYTE
        if _configures_optimizers(target_of(task["module"]["_target_"])):
            _take_rate(nodes, asked, owner)

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse several devices, compilation, checkpointing and evaluations of language models."""
        name = cfg.option("task")
        if cfg.trainer.devices != 1 or cfg.trainer.num_nodes != 1:
            raise ConfigError(f"task={name} runs on one device: trainer.devices=1 trainer.num_nodes=1.")
        if cfg.trainer.compile or cfg.trainer.gradient_checkpointing:
            raise ConfigError(
                f"trainer.compile=true and trainer.gradient_checkpointing=true are not allowed with task={name}: its "
                "module can do either itself."
            )
        for part in cfg.evaluation.parts:
            raise ConfigError(f"evaluation={part} is not allowed with task={name}: it needs a language model.")


def is_own_task(cfg: Mapping) -> bool:
    """Whether a checked configuration trains a LightningModule of one's own."""
    return cfg["task"]["_target_"] == f"{__name__}.{Lightning.__name__}"


def module_node(cfg: Config) -> Component:
    """The LightningModule's node, with the run's learning rate where it takes one."""
    node = dict(cfg.task["module"])
    own = cfg.optimizer._target_.endswith(".ItsOptimizer")
    takes = "lr" in component_with_defaults(node, "task.module")
    return Component({**node, "lr": cfg.optimizer.lr} if own and takes else node)


def _configures_optimizers(module: Any) -> bool:
    """Whether a class has a configure_optimizers besides Lightning's empty one."""
    first = next((c for c in getattr(module, "__mro__", ()) if "configure_optimizers" in vars(c)), None)
    return first is not None and first.__name__ != "LightningModule"


def _take_rate(nodes: dict[str, Any], asked: Collection[str], owner: str) -> None:
    """The module's own optimizer in place of ours: its argument `lr` becomes optimizer.lr, which tuning varies."""
    module = nodes["task"]["module"]
    whole = component_with_defaults(module, "task.module")
    refuse_asked(nodes, [k for k in asked if k != "optimizer.lr" or "lr" not in whole], OPTIMIZER, owner)
    rate = nodes["optimizer"]["lr"] if "optimizer.lr" in asked else whole.get("lr", 1.0)
    module.pop("lr", None)
    for group in OPTIMIZER:
        nodes["choices"].pop(group, None)
    nodes["optimizer"] = {"_target_": "albert_ablate.model.own.ItsOptimizer", "_partial_": True, "lr": rate}
    nodes["schedule"] = {"_target_": ITS_OWN, "_partial_": True}
    nodes["clip"] = {"_target_": "albert_ablate.optim.clipping.NoClip"}
