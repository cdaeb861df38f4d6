"""Rules that concern several keys or groups at once, and what follows from several keys."""

from collections.abc import Mapping

from albert_ablate.config.code import own_code
from albert_ablate.config.components import component_arguments, target_of, trait
from albert_ablate.config.errors import ConfigError, read_yaml, shown
from albert_ablate.config.folders import option_files
from albert_ablate.config.own_model import check_own_model
from albert_ablate.config.schema import COMPONENTS, DEFAULT_TARGETS, Config


def check_together(cfg: Config) -> None:
    """Refuse contradictions between keys and between groups."""
    model, data, steps = cfg.model, cfg.data, steps_of(cfg)
    if data.batch % data.accumulate:
        raise ConfigError(f"data.batch={data.batch} is not divisible by data.accumulate={data.accumulate}.")
    trainer = cfg.trainer
    ranks = trainer.devices * trainer.num_nodes
    if ranks > 1 and data.batch % (data.accumulate * ranks):
        raise ConfigError(
            f"data.batch={data.batch} is not divisible into data.accumulate={data.accumulate} micro-batches on "
            f"{ranks} devices."
        )
    if not trait(cfg.model, "takes_parts") and not trait(cfg.task, "own_module"):
        check_own_model(cfg)
    if trainer.strategy == "fsdp":
        _check_sharded(cfg)
    if trainer.precision == "16-mixed" and trainer.accelerator == "cpu":  # Lightning would take bf16-mixed
        raise ConfigError("trainer.precision=16-mixed needs a GPU: on trainer=cpu take bf16-mixed.")
    if trainer.graph is True and (obstacle := graph_obstacle(cfg)):
        raise ConfigError(f"trainer.graph=true is not allowed with {obstacle}.")
    if steps < 1:
        raise ConfigError(
            f"budget.tokens={cfg.budget.tokens} is less than one batch of data.batch={data.batch} sequences "
            f"of model.context={model.context} tokens."
        )
    norm_type = cfg.norm_type
    if not normalizes(cfg):
        kind, changed = norm_type._target_.rpartition(".")[2], component_arguments(norm_type)
        idle = (
            [f"norm_type.{k}={shown(v)}" for k, v in changed.items()] if kind == "layer_norm" else [f"norm_type={kind}"]
        )
        if idle:
            raise ConfigError(
                f"{idle[0]} would do nothing: norm={cfg.option('norm')} takes no norm type; leave it out."
            )
    for key in COMPONENTS:
        verify = "_target_" in cfg[key] and getattr(target_of(cfg[key]["_target_"]), "verify", None)
        if verify:
            verify(cfg)
    parts = cfg.evaluation.parts
    for node in parts.values():
        if verify := getattr(target_of(node._target_), "verify", None):
            verify(cfg)
    if cfg.evaluation.weights != "last" and not parts:
        raise ConfigError("evaluation.weights=best would do nothing: no evaluation at the end is configured.")


def evaluations_of(cfg: Mapping) -> dict[str, dict]:
    """The evaluations configured for the end of the run, by name."""
    return {name: dict(node) for name, node in cfg["evaluation"].items() if isinstance(node, Mapping)}


def graph_obstacle(cfg: Config) -> str | None:
    """What keeps an arm's steps from being CUDA graphs, in words; None where nothing does."""
    trainer, sites = cfg.trainer, set(cfg.dropout.get("sites", ()))
    own = [g for g in ("model", "norm", "norm_type", "attention", "dropout", "loss") if own_code(cfg[g])]
    obstacles = {
        f"trainer.accelerator={trainer.accelerator}: it needs a CUDA GPU": trainer.accelerator in ("cpu", "mps"),
        "several devices: it has not been tried there": trainer.devices * trainer.num_nodes != 1,
        "trainer.precision=16-mixed, whose loss scale changes": trainer.precision == "16-mixed",
        f"task={cfg.option('task')}: it is for language models": cfg.task._target_ != DEFAULT_TARGETS["task"],
        f"model={cfg.option('model')}, whose own code may do what cannot be replayed": not trait(
            cfg.model, "takes_parts"
        ),
        f"{' and '.join(own)} of your own code, which may do what cannot be replayed": bool(own),
        "dropout.sites=[attention], whose masks torch's kernel draws": "attention" in sites,
        "skipped blocks, which change what a step computes": bool(sites & {"stochastic_depth", "layer_drop"}),
        "attention.qk_clip, which keeps the largest logits of a step": cfg.attention.get("qk_clip") is not None,
        f"norm_type={cfg.option('norm_type')}, which keeps statistics": trait(cfg.norm_type, "keeps_statistics"),
        f"optimizer={cfg.option('optimizer')}, which asks for the logits": trait(cfg.optimizer, "samples_predictions"),
    }
    return next((words for words, there in obstacles.items() if there), None)


def _check_sharded(cfg: Config) -> None:
    """What is not known to work on shards is refused with fsdp, until it is shown equal on GPUs."""
    for key in ("optimizer", "clip"):
        if not trait(cfg[key], "works_on_shards"):
            raise ConfigError(
                f"{key}={cfg.option(key)} needs whole matrices, which trainer.strategy=fsdp "
                f"splits: take {key}={' or '.join(_options_on_shards(key))}, or trainer=ddp."
            )
    if cfg.model.get("shared"):
        raise ConfigError("model.shared=true is not allowed with trainer.strategy=fsdp, which splits block by block.")
    if cfg.trainer.compile:
        raise ConfigError(
            "trainer.compile=true is not allowed with trainer.strategy=fsdp: the combination is untested."
        )


def _options_on_shards(group: str) -> list[str]:
    nodes = {name: read_yaml(file) for name, file in sorted(option_files()[group].items())}
    return [name for name, node in nodes.items() if "_target_" in node and trait(node, "works_on_shards")]


def steps_of(cfg: Config) -> int:
    """Optimizer steps that fit into the budget: budget.tokens // (data.batch * model.context)."""
    return cfg.budget.tokens // (cfg.data.batch * cfg.model.context)


def normalizes(cfg: Mapping) -> bool:
    """Whether norm_type counts: the placement, or the embedding, is normalized by it. `cfg` may be a record's."""
    placement = target_of(cfg["norm"]["_target_"])
    return getattr(placement, "uses_norm", True) or bool(cfg["model"].get("embedding_norm"))
