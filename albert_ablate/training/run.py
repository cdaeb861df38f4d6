"""One run, from configuration to record: find it if it is done, else train it, resume it, or train it again."""

import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from albert_ablate.collector import preload
from albert_ablate.config import ConfigError, check, codes, evaluations_of, refuse_changed_code
from albert_ablate.config.secrets import masked
from albert_ablate.data.own_task import is_own_task
from albert_ablate.data.tasks import is_language, language_model
from albert_ablate.records.folder import DONE, RunFolder, plain
from albert_ablate.records.naming import link_by_name
from albert_ablate.records.record import continued_record, new_record
from albert_ablate.records.store import FILE, require
from albert_ablate.training.commits import last_commit
from albert_ablate.training.cost import memory_hint
from albert_ablate.training.errors import RunFailed
from albert_ablate.training.launch import is_first, launch
from albert_ablate.training.prepare import Job, check_machine, prepare
from albert_ablate.training.ranks import Ranks, is_rank, process_group, rank_of_environment
from albert_ablate.training.stack import Member

# Lightning takes a second to import and finding a done run needs none of it: what trains (fit.py, classify.py) is
# imported in functions.

# keys that the record of a run needs for another session
REQUIRED_FIELDS = (
    "seed", "sessions", "config.evaluation.tokens", "provenance.threads", "budget.steps", "data.fingerprint",
    "proof", "cost", "summary",
)  # fmt: skip


def run(cfg: Mapping, verbose: bool = False, member: Member | None = None) -> dict[str, Any]:
    """Train the run that `cfg` describes, or find it: gives its record, and its `folder`.

    A finished or diverged run is not trained again; a stopped, failed or orphaned one is resumed from its last commit,
    bit for bit. With force=true a done run is trained again beside its record, which then notes "reproduced" or
    "differs". Raises ConfigError for the user's mistakes, RunFailed where training broke. member: of a stack of runs
    (training/stack.py), where it is trained in one.
    """
    job = prepare(check(cfg), verbose)
    several = job.cfg.trainer.devices * job.cfg.trainer.num_nodes != 1
    if several and is_rank():
        record = _run_as_rank(check_machine(job))
    elif several:
        record = find(job) or launch(check_machine(job).cfg, verbose)
    else:
        record = find(job) or _unfinished_trunk(job) or train(check_machine(job), Ranks(), member)
    record = {"folder": str(job.folder.path.resolve()), **record}
    if evaluations_of(job.cfg) and is_language(job.cfg) and record["status"] in DONE and is_first(job.cfg):
        record["evaluations"] = _evaluated(job)
    return record


def find(job: Job) -> dict[str, Any] | None:
    """The record of a run that is done already and need not be trained; None otherwise, and with force=true."""
    record = job.folder.record()
    if record is None or record["status"] not in DONE or job.cfg.force:
        return None
    require(job.folder.path, record, "summary", "cost")
    refuse_changed_code(job.folder.path, record, job.cfg)
    job.folder.tidy()  # it may have been killed after the final record was written but before cleanup
    return {**record, "found": True}


def train(job: Job, ranks: Ranks, member: Member | None = None) -> dict[str, Any]:
    """Train the run in its folder while holding its lock; with force=true a done run is trained again beside itself."""
    preload("pytorch_lightning")
    from albert_ablate.training.fit import fit

    job.folder.create()
    with job.folder.lock():
        record = job.folder.record()  # another process may have finished it since
        if record is not None and record["status"] in DONE:
            return _reproduce(job, record, ranks) if job.cfg.force else {**record, "found": True}
        with _session(job, record, ranks, member) as (record, resume):
            return plain(fit(job, record, resume, ranks, member))


def _unfinished_trunk(job: Job) -> dict[str, Any] | None:
    """Train or find the language model that a classification run builds on: its record where it was stopped."""
    if is_language(job.cfg) or is_own_task(job.cfg):
        return None
    from albert_ablate.training.classify import trunk_of

    record = run(language_model(job.cfg), job.verbose)
    if record["status"] not in DONE:
        return record
    trunk_of(job.cfg, job.dataset)  # ConfigError where its weights are missing
    return None


def _evaluated(job: Job) -> dict[str, Any]:
    """Make the evaluations that are configured for the end of the run, of its saved weights."""
    from albert_ablate.evaluations.evaluate import evaluate_run

    cfg = job.cfg
    try:
        return evaluate_run(
            job.folder.path,
            evaluations_of(cfg),
            cfg.evaluation.weights,
            say=print if job.verbose else lambda text: None,
            cache=cfg.paths.cache,
        )
    except ConfigError:
        raise
    except Exception as error:
        raise RunFailed(
            f"The run is done, its evaluation failed: {type(error).__name__}: {error}. Its record: {job.folder.path}"
        ) from error


def _reproduce(job: Job, record: dict, ranks: Ranks) -> dict[str, Any]:
    """Train a done run again in reproduction/ and note in its record whether the final weights are the same."""
    preload("pytorch_lightning")
    from albert_ablate.training.fit import fit

    threads = job.cfg.trainer.threads or record["provenance"]["threads"]
    cfg = replace(job.cfg, trainer=replace(job.cfg.trainer, threads=threads))
    again = replace(job, cfg=cfg, folder=RunFolder(job.folder.path / "reproduction"))
    earlier = again.folder.record()
    if earlier is not None and earlier["status"] in DONE:
        shutil.rmtree(again.folder.path)
        earlier = None
    again.folder.create()
    with _session(again, earlier, ranks) as (fresh, resume):
        fresh = plain(fit(again, fresh, resume, ranks))
    if fresh["status"] not in DONE:
        return fresh
    same = fresh["proof"]["final_weights"] == record["proof"]["final_weights"]
    note = {
        "verdict": "reproduced" if same else "differs",
        "final_weights": fresh["proof"]["final_weights"],
        "val_loss": fresh["summary"]["val_loss"],
        "seconds": fresh["cost"]["seconds"],
        "provenance": fresh["provenance"],
        "code": codes(cfg),
    }
    record["reproductions"] = [*record.get("reproductions", []), note]
    job.folder.write(record)
    return {**record, "reproduction": note["verdict"]}


@contextmanager
def _session(
    job: Job, record: dict | None, ranks: Ranks, member: Member | None = None
) -> Iterator[tuple[dict, Path | None]]:
    """One session of training, from the last commit or from the start: gives the record and the checkpoint to resume.

    record: of the session before, None for the first. An error inside becomes RunFailed, its traceback in the record.
    """
    cfg, folder = job.cfg, job.folder
    resume, step = last_commit(folder, record.get("identity")) if record is not None else (None, 0)
    if resume is not None and record is not None:
        refuse_changed_code(folder.path, record, cfg, begun=True)
    if resume is None or record is None:
        folder.clear()
        record = None
    else:
        require(folder.path, record, *REQUIRED_FIELDS)
    cores = max(1, (os.cpu_count() or 1) * cfg.trainer.num_nodes // ranks.size)  # of each rank
    threads = record["provenance"]["threads"] if record else cfg.trainer.threads or cores
    torch.set_num_threads(threads)
    fresh = new_record(cfg, job.run_id, job.dataset.described(cfg.model.context), threads, ranks.size)
    if member is not None:
        fresh["provenance"]["stacked"] = member.count
    record = continued_record(record, fresh) if record else fresh
    record["sessions"] += 1
    record["resumed_at"] = step
    link_by_name(folder.path, record)
    paths = {"folder": str(folder.path), "resume": None if resume is None else str(resume)}
    ranks.share({"plan": {"cfg": cfg, "record": record, **paths}})
    try:
        yield record, resume
    except ConfigError:
        raise
    except Exception as error:
        record = folder.record() or record
        record |= {"status": "failed", "updated": time.time(), "error": "".join(traceback.format_exception(error))}
        try:
            folder.write(record)
        except OSError:
            pass  # the disk may be what failed
        where = f" Its record: {folder.path}" if (folder.path / FILE).exists() else ""
        hint = memory_hint(error, cfg) if is_language(cfg) else ""
        raise RunFailed(f"The run failed: {type(error).__name__}: {error}.{hint}{where}") from error


# --- several devices -------------------------------------------------------------------------------------------------


def _run_as_rank(job: Job) -> dict[str, Any]:
    """As one of several processes that a launcher has started: rank 0 finds or trains, the others follow it."""
    ranks = rank_of_environment(job.cfg.trainer.devices, job.cfg.trainer.num_nodes)
    with process_group(ranks):
        if not ranks.first:
            return _follow(job, ranks)
        try:
            record = find(job) or train(job, ranks)
        except ConfigError as error:
            ranks.share({"mistake": str(error)})
            raise
        ranks.share({"record": record})
        return record


def _follow(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Any rank but the first: train what rank 0's plans say until it shares its record, or a ConfigError."""
    preload("pytorch_lightning")
    from albert_ablate.training.fit import fit

    while True:
        kind, content = next(iter(ranks.share().items()))
        if kind == "record":
            return content
        if kind == "mistake":
            raise ConfigError(content)
        torch.set_num_threads(content["record"]["provenance"]["threads"])
        resume = None if content["resume"] is None else Path(content["resume"])
        planned = replace(job, cfg=content["cfg"], folder=RunFolder(Path(content["folder"])), verbose=False)
        try:
            fit(planned, content["record"], resume, ranks)
        except ConfigError:
            continue  # rank 0 raises the same error and reports it
        except Exception as error:
            print(masked(traceback.format_exc()), file=sys.stderr)
            raise RunFailed(f"Rank {ranks.rank} failed: {type(error).__name__}: {error}.") from error
