"""Prepare a run before its first step: text, identity, folder, and whether this machine can train it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from albert_ablate.config import Config, ConfigError, Identity, as_config_error, check, identity
from albert_ablate.data.own_task import is_own_task
from albert_ablate.data.packed import block_count, cache_folder, pack
from albert_ablate.data.tasks import fingerprint, is_language
from albert_ablate.model.build import assemble, build, verify_compiler
from albert_ablate.model.own import OwnModel
from albert_ablate.model.token_model import TokenModel
from albert_ablate.optim.groups import decay_groups
from albert_ablate.records.folder import RunFolder


@dataclass(frozen=True)
class Job:
    """A run to find or train.

    cfg: checked. dataset: its packed text (Packed), or the data of its own data module (OwnData). model: on the meta
    device, shapes without values; None until `check_machine`, which builds it. verbose: print banner and progress.
    """

    cfg: Config
    dataset: Any
    run_id: Identity
    folder: RunFolder
    verbose: bool = False
    model: TokenModel | None = None


def prepare(cfg: Config, verbose: bool = False) -> Job:
    """Prepare the job of a checked configuration. Raises ConfigError if text or labels cannot be read."""
    if is_own_task(cfg):
        data, run_id = identified(cfg)
        return Job(cfg, data, run_id, _folder(cfg, run_id), verbose)
    if not is_language(cfg):
        from albert_ablate.training.baselines import require_scikit_learn  # loads torchmetrics, too

        require_scikit_learn()
    dataset, run_id = identified(cfg)
    if not is_language(cfg):
        task = build(cfg.task)
        task.kept(task.rows(cache_folder(cfg.paths.cache)))  # what is wrong with it is reported before training
    dataset = dataset.keep(cfg.data.get("train_size"))
    context = cfg.model.context
    for split in ("train", "validation", "test"):
        if not block_count(getattr(dataset, split), context):
            size = cfg.data.get("train_size") if split == "train" else None
            cut = f" at data.train_size={size}" if size else ""
            raise ConfigError(
                f"model.context={context} is too long for the text: its {split} split holds "
                f"{len(getattr(dataset, split))} tokens{cut}, one more than the context is needed."
            )
    return Job(cfg, dataset, run_id, _folder(cfg, run_id), verbose)


def _folder(cfg: Config, run_id: Identity) -> RunFolder:
    return RunFolder(Path(cfg.paths.runs).expanduser() / run_id.setting / f"seed{cfg.seed}")


def identified(cfg: Config) -> tuple[Any, Identity]:
    """Pack the text of a checked configuration, or set up its own data module, and compute the identity of its run,
    which depends on them."""
    if is_own_task(cfg):
        from albert_ablate.training.own_data import own_data

        data = own_data(cfg)
        return data, identity(cfg, data.fingerprint)
    cache = cache_folder(cfg.paths.cache)
    dataset = pack(build(cfg.data), build(cfg.tokenizer), cache)
    return dataset, identity(cfg, fingerprint(cfg, build, dataset.fingerprint, cache))


def check_machine(job: Job) -> Job:
    """Build the job's model on the meta device and check that this machine can train it.

    Replaces trainer.devices=-1 by the number of GPUs. Raises ConfigError for mistakes that only this machine or
    building the components shows, before a run folder is made.
    """
    cfg = job.cfg
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu is not allowed here: torch finds no GPU; take trainer=cpu or auto.")
    if cfg.trainer.precision == "16-mixed" and not torch.cuda.is_available():
        raise ConfigError("trainer.precision=16-mixed is not allowed here: it needs a GPU, on a CPU take bf16-mixed.")
    if cfg.trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("trainer.accelerator=mps is not allowed here: torch finds no Apple GPU.")
    cfg = _with_devices(cfg, torch.cuda.device_count() if cfg.trainer.accelerator in ("auto", "gpu") else 0)
    if cfg.trainer.graph is True and not torch.cuda.is_available():
        raise ConfigError("trainer.graph=true is not allowed here: torch finds no CUDA GPU; take auto or false.")
    if cfg.trainer.compile:
        verify_compiler("cuda" if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        model = assemble(cfg)
        if is_own_task(cfg):
            from albert_ablate.training.own_training import check_module

            check_module(cast(OwnModel, model), job.dataset, cfg)
        elif isinstance(model, OwnModel):
            model.check(cfg.seed)
            if cfg.trainer.gradient_checkpointing:
                model.recompute_blocks()
        build(cfg.optimizer, decay_groups(model), False)
        build(cfg.logger)  # its package may not be installed
    except Exception as error:
        raise as_config_error(error) from None
    if cfg.trainer.strategy == "fsdp" and any(p.ndim == 0 for p in model.parameters()):
        raise ConfigError("This model has parameters that are single numbers, which trainer.strategy=fsdp can't split.")
    return replace(job, cfg=cfg, model=model)


def _with_devices(cfg: Config, gpus: int) -> Config:
    wanted = cfg.trainer.devices
    if wanted == -1:
        if not gpus:
            raise ConfigError("trainer.devices=-1 means all GPUs, and there is none that trainer.accelerator allows.")
        return check({**cfg, "trainer": {**cfg.trainer, "devices": gpus}})
    available = gpus or (1 if cfg.trainer.accelerator == "mps" else wanted)
    if wanted > available:
        raise ConfigError(f"trainer.devices={wanted} is not allowed here: this machine has {available}.")
    return cfg
