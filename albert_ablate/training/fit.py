"""Train one session of a run: the parts that its task consists of, Lightning's Trainer, then `Trainer.fit`."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from albert_ablate.data.own_task import is_own_task
from albert_ablate.data.tasks import is_language
from albert_ablate.records.signals import StopSignal
from albert_ablate.training.checkpoint import AtomicCheckpointIO
from albert_ablate.training.console import banner
from albert_ablate.training.language import language_session
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.prepare import Job
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.session import Session
from albert_ablate.training.stack import Member
from albert_ablate.training.strategies import StartedRanks, quiet_lightning, strategy_of


def fit(
    job: Job, record: dict[str, Any], resume: Path | None, ranks: Ranks, member: Member | None = None
) -> dict[str, Any]:
    """Train from the checkpoint `resume`, or from the start, until the run is done or stopped: gives its record.

    The lock of job.folder is held. record: as `run` begins the session; it is filled in and written at each commit.
    member: of a stack of runs, where it is trained in one.
    """
    folder, stop = job.folder, StopSignal() if member is None else member.stop
    session = _session(job, record, ranks, stop)
    if member is not None:
        assert isinstance(session.module, LanguageModel)
        session.module.member = member
    if ranks.first:
        folder.write_config(job.cfg)
    quiet_lightning()
    trainer = _trainer(job, record, session, ranks)
    if not session.module.sharded:  # Lightning would load a checkpoint into the model first, and convert it then
        trainer.precision_plugin.convert_module(session.module)
    if job.verbose:
        print(banner(record, session.estimate()), flush=True)
    recorder = session.recorder
    try:
        with stop.heeded():
            trainer.fit(session.module, datamodule=session.data, ckpt_path=None if resume is None else str(resume))
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


def _session(job: Job, record: dict[str, Any], ranks: Ranks, stop: StopSignal) -> Session:
    if is_language(job.cfg):
        return language_session(job, record, ranks, stop)
    if is_own_task(job.cfg):
        from albert_ablate.training.own_training import own_session

        return own_session(job, record, ranks, stop)
    from albert_ablate.training.classify import classification_session  # which loads torchmetrics' classification

    return classification_session(job, record, ranks, stop)


def _trainer(job: Job, record: dict[str, Any], session: Session, ranks: Ranks) -> pl.Trainer:
    """Lightning's Trainer with everything off that the recorder does: logging, checkpoints, progress."""
    cfg = job.cfg
    return pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=strategy_of(ranks, cfg.trainer.strategy, session.skips_blocks),
        precision=cfg.trainer.precision,
        deterministic=cfg.trainer.deterministic,
        # a probe alone has no step; Lightning calls no hook where max_steps is 0, and the recorder ends it before one
        max_steps=max(1, record["budget"]["steps"]),
        max_epochs=-1,
        accumulate_grad_batches=session.accumulate,
        callbacks=[session.recorder],
        plugins=[AtomicCheckpointIO(record.get("identity") or ""), StartedRanks(ranks)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=str(job.folder.path),
    )
