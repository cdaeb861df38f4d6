"""Train one session of a run: model, module, recorder and Lightning's Trainer, then `Trainer.fit`."""

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from albert_ablate.config import steps_of
from albert_ablate.data.packed import Order, Packed, block_count, take_blocks
from albert_ablate.data.tasks import is_language
from albert_ablate.model.build import assemble, build, initialized
from albert_ablate.model.loss import objective
from albert_ablate.records.signals import StopSignal
from albert_ablate.trackers.base import joined
from albert_ablate.training.checkpoint import AtomicCheckpointIO
from albert_ablate.training.console import Progress, banner
from albert_ablate.training.cost import expected_flops, training_flops
from albert_ablate.training.diagnostics import undisturbed
from albert_ablate.training.module import Blocks, LanguageModel, TextData
from albert_ablate.training.prepare import Job
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.recorder import Recorder
from albert_ablate.training.strategies import StartedRanks, strategy_of
from albert_ablate.training.validation import Evaluator


def fit(job: Job, record: dict[str, Any], resume: Path | None, ranks: Ranks) -> dict[str, Any]:
    """Train from the checkpoint `resume`, or from the start, until the run is done or stopped: gives its record.

    The lock of job.folder is held. record: as `run` begins the session; it is filled in and written at each commit.
    """
    cfg, dataset, folder = job.cfg, job.dataset, job.folder
    if not is_language(cfg):
        from albert_ablate.training import classify

        return classify.fit(cfg, dataset, folder, record, resume, ranks, job.verbose)
    shapes = assemble(cfg) if job.model is None else job.model
    flops = training_flops(cfg, shapes)
    model, context, batch = initialized(shapes, cfg), cfg.model.context, cfg.data.batch
    order = Order(block_count(dataset.train, context), batch, cfg.seed)
    start, steps = record["resumed_at"], steps_of(cfg)
    record["budget"]["flops"] = expected_flops(flops, model) * batch * context * steps
    record["proof"]["initial_draws"] = model.initial_draws
    record["model"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(model.blocks),
        "width": cfg.model.width,
        "mean_dropout": sum(block.rate for block in model.stack) / len(model.blocks),
    }
    if ranks.first:
        folder.write_config(cfg)
    module = LanguageModel(model, cfg, steps, sharded=ranks.size > 1 and cfg.trainer.strategy == "fsdp")
    stop = StopSignal()
    recorder = Recorder(
        cfg,
        folder,
        record,
        Evaluator(dataset, context, cfg.evaluation.tokens, ranks),
        order,
        joined(build(cfg.logger)),
        Progress(steps, batch * context, shown=job.verbose),
        flops,
        ranks,
        stop,
    )
    if not dataset.reversible and ranks.first:
        print("The tokenizer does not give the text back: bits per byte are left out.", file=sys.stderr)
    _quiet()
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=strategy_of(ranks, cfg.trainer.strategy, any(block.skip.rate for block in model.stack)),
        precision=cfg.trainer.precision,
        deterministic=cfg.trainer.deterministic,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=cfg.data.accumulate,
        callbacks=[recorder],
        plugins=[AtomicCheckpointIO(record.get("identity") or ""), StartedRanks(ranks)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=str(folder.path),
    )
    if not module.sharded:  # Lightning would load a checkpoint into the model first, and convert it then
        trainer.precision_plugin.convert_module(module)
    if job.verbose:
        print(banner(record, estimated_seconds(module, dataset, order, context, steps - start)), flush=True)
    data = TextData(Blocks(dataset, order, context, cfg.data.accumulate, start, ranks.rank, ranks.size))
    try:
        with stop.heeded():
            trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
        if not ranks.first:
            pass
        elif recorder.outcome == "stopped":
            record |= {"status": "stopped", "signal": stop.number}
            folder.write(record)
        else:
            folder.tidy()
    finally:
        recorder.close()
        if ranks.first:
            recorder.logger.close(record)
    return record


def estimated_seconds(module: Any, dataset: Packed, order: Order, context: int, steps: int) -> float | None:
    """Seconds the steps left will take on this CPU, from two steps' forward and backward; None on another device.

    Leaves nothing in the model."""
    if module.cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        return None
    rows = torch.from_numpy(take_blocks(dataset.train, order.indices(0), context))
    times = []
    with undisturbed(module.model):
        for _ in range(2):
            began = time.perf_counter()
            for micro in rows.chunk(module.cfg.data.accumulate):
                objective(module.loss, module.model, micro)[0].backward()
            times.append(time.perf_counter() - began)
    module.zero_grad(set_to_none=True)
    return min(times) * steps


def _quiet() -> None:
    """Silence Lightning's remarks on workers, logging and devices, which do not apply to this set-up."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
