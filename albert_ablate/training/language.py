"""A session of language modeling: model, module, recorder and training text, from the job."""

import sys
import time
from functools import partial
from typing import Any

import torch

from albert_ablate.config import steps_of
from albert_ablate.data.packed import BatchOrder, Packed, block_count, take_blocks
from albert_ablate.model.build import assemble, build, initialized
from albert_ablate.model.loss import objective
from albert_ablate.records.signals import StopSignal
from albert_ablate.trackers.base import joined
from albert_ablate.training.console import Progress
from albert_ablate.training.cost import expected_flops, training_flops
from albert_ablate.training.diagnostics import undisturbed
from albert_ablate.training.language_recorder import LanguageRecorder
from albert_ablate.training.module import Blocks, LanguageModel, TextData
from albert_ablate.training.prepare import Job
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.session import Session
from albert_ablate.training.step_stats import StepStats
from albert_ablate.training.validation import Evaluator


def language_session(job: Job, record: dict[str, Any], ranks: Ranks, stop: StopSignal) -> Session:
    """The session of a run with task=lm; fills in what the record says of the model before its first step."""
    cfg, dataset = job.cfg, job.dataset
    shapes = assemble(cfg) if job.model is None else job.model
    flops = training_flops(cfg, shapes)
    model, context, batch = initialized(shapes, cfg), cfg.model.context, cfg.data.batch
    order = BatchOrder(block_count(dataset.train, context), batch, cfg.seed)
    start, steps, per_step = record["resumed_at"], steps_of(cfg), batch * context
    record["budget"]["flops"] = expected_flops(flops, model) * per_step * steps
    record["proof"]["initial_draws"] = model.initial_draws
    record["model"] = model.described()
    if not dataset.reversible and ranks.first:
        print("The tokenizer does not reproduce the text: bits per byte are not reported.", file=sys.stderr)
    module = LanguageModel(model, cfg, steps, sharded=ranks.size > 1 and cfg.trainer.strategy == "fsdp")
    recorder = LanguageRecorder(
        Evaluator(dataset, context, cfg.evaluation.tokens, ranks),
        cfg,
        job.folder,
        record,
        StepStats(order, record["data"]["fingerprint"], per_step, flops, cfg.data.accumulate, ranks),
        joined(build(cfg.logger)),
        Progress(steps, per_step, shown=job.verbose),
        ranks,
        stop,
    )
    return Session(
        module,
        recorder,
        TextData(Blocks(dataset, order, context, cfg.data.accumulate, start, ranks.rank, ranks.size)),
        accumulate=cfg.data.accumulate,
        skips_blocks=any(block.skip.rate for block in model.stack),
        estimate=partial(estimated_seconds, module, dataset, order, context, steps - start),
    )


def estimated_seconds(
    module: LanguageModel, dataset: Packed, order: BatchOrder, context: int, steps: int
) -> float | None:
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
