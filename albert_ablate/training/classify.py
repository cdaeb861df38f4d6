"""A session of text classification on a pretrained decoder, from the job: fine-tuning, linear probe, baselines."""

from pathlib import Path
from typing import Any

from albert_ablate.config import Config, ConfigError, identity
from albert_ablate.data.corpora import SPLITS
from albert_ablate.data.packed import BatchOrder, Packed, cache_folder
from albert_ablate.data.tasks import Labelled, language_model
from albert_ablate.model.build import assemble, build, initialized
from albert_ablate.model.decoder import Decoder
from albert_ablate.model.weights import load_checkpoint, weights_hash
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.signals import StopSignal
from albert_ablate.trackers.base import joined
from albert_ablate.training.classification_recorder import ClassificationRecorder
from albert_ablate.training.classifier import (
    ClassificationModule,
    Classifier,
    DocumentBatches,
    DocumentData,
    Documents,
)
from albert_ablate.training.console import Progress
from albert_ablate.training.cost import expected_flops, training_flops
from albert_ablate.training.prepare import Job
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.session import Session
from albert_ablate.training.step_stats import StepStats


def trunk_of(cfg: Config, packed: Packed) -> tuple[dict[str, Any], Path]:
    """The record of the language model that a task builds on, and its weights; ConfigError where they are missing."""
    run_id = identity(language_model(cfg), packed.fingerprint)
    folder = RunFolder(Path(cfg.paths.runs).expanduser() / run_id.setting / f"seed{cfg.seed}")
    record, weights = folder.record(), folder.checkpoints / f"{cfg.task.weights}.ckpt"
    if record is None or not weights.exists():
        raise ConfigError(
            f"{weights} is missing, and task=classify builds on it: take the other task.weights, or remove "
            f"{folder.path} to train that run again."
        )
    return record, weights


def classification_session(job: Job, record: dict[str, Any], ranks: Ranks, stop: StopSignal) -> Session:
    """The session of a run with task=classify, whose trunk is trained; fills in what the record says of trunk and
    documents before the first step."""
    cfg, task = job.cfg, job.cfg.task
    labelled = _labelled(cfg)
    documents = {split: Documents(labelled, split, job.dataset.codec, cfg.model.context) for split in SPLITS}
    shapes = assemble(cfg) if job.model is None else job.model
    flops = training_flops(language_model(cfg), shapes)
    trunk = _load_trunk(job, record, initialized(shapes, cfg))
    model = Classifier(trunk, len(labelled.classes), task.pool, cfg.seed)
    order = BatchOrder(len(documents["train"].rows), task.batch, cfg.seed)
    steps = 0 if task.mode == "probe" else task.documents // task.batch
    per_step = task.batch * cfg.model.context  # tokens, as if every document filled the context
    record["budget"] = {
        "tokens": steps * per_step,
        "steps": steps,
        "passes": steps * task.batch / len(documents["train"].rows),
        "flops": expected_flops(flops, trunk) * per_step * steps,
    }
    record["data"] |= {
        "task": task.data,
        "labels": labelled.fingerprint,
        "classes": labelled.classes,
        "documents": {split: len(labelled.texts[split]) for split in SPLITS},
        "dropped": labelled.dropped,
    }
    record["proof"]["initial_draws"] = {**trunk.initial_draws, "task.head.weight": model.draw_hash}
    recorder = ClassificationRecorder(
        labelled,
        documents,
        cfg,
        job.folder,
        record,
        StepStats(order, record["data"]["fingerprint"], per_step, flops, 1, ranks),
        joined(build(cfg.logger)),
        Progress(steps, task.batch, shown=job.verbose, unit="doc"),
        ranks,
        stop,
    )
    return Session(
        ClassificationModule(model, cfg, steps),
        recorder,
        DocumentData(DocumentBatches(documents["train"], order, record["resumed_at"])),
        accumulate=1,
        skips_blocks=False,  # asked for with several devices only, which a task does not take
        estimate=lambda: None,
    )


def _labelled(cfg: Config) -> Labelled:
    task = build(cfg.task)
    return task.kept(task.rows(cache_folder(cfg.paths.cache)))


def _load_trunk(job: Job, record: dict[str, Any], model: Decoder) -> Decoder:
    """`model` with the weights of the language model's run, which the record names."""
    source, weights = trunk_of(job.cfg, job.dataset)
    checkpoint = load_checkpoint(weights, source.get("identity"))
    model.load_state_dict(checkpoint["state_dict"])
    record["model"] = source["model"]
    record["trunk"] = {
        "identity": source["identity"],
        "folder": f"{source['setting']}/seed{source['seed']}",
        "status": source["status"],
        "weights": job.cfg.task.weights,
        "step": checkpoint["step"],
        "weights_hash": weights_hash(model),
        "val_loss": source["summary"].get("val_loss"),
    }
    return model
