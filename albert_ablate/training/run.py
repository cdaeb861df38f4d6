"""One run, from configuration to record: find it if it is done, else train it, go on with it, or train it again."""

import logging
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from albert_ablate.config import (
    ConfigError,
    Identity,
    as_config_error,
    check,
    evaluations_of,
    identity,
    revisions,
    steps_of,
)
from albert_ablate.config.secrets import masked
from albert_ablate.data.packed import Order, Packed, block_count, cache_folder, pack
from albert_ablate.data.tasks import fingerprint, is_language, language_model
from albert_ablate.records.folder import DONE, RunFolder, plain
from albert_ablate.records.naming import link_by_name, name_of
from albert_ablate.records.provenance import provenance
from albert_ablate.records.store import FILE, require
from albert_ablate.records.tuning import role
from albert_ablate.trackers.base import joined

# of the record of a run that goes on
NEEDED = ("seed", "sessions", "config.evaluation.tokens", "provenance.threads", "budget.steps", "data.fingerprint",
          "proof", "cost", "summary")  # fmt: skip


class RunFailed(RuntimeError):
    """The run broke after its first step was in sight; its record holds the traceback."""


def run(cfg: Mapping, verbose: bool = False) -> dict[str, Any]:
    """Train the run that `cfg` describes, or find it: gives its record, and its `folder`.

    A finished or diverged run is not redone; a stopped, failed or orphaned one goes on from its last commit, bit for
    bit. With force=true a done run is trained again beside its record, which then notes "reproduced" or "differs".
    Raises ConfigError for the user's mistakes, RunFailed where training broke.
    """
    cfg = check(cfg)
    if not is_language(cfg):
        from albert_ablate.training.classify import require_scikit_learn

        require_scikit_learn()
    packed, who = _prepare(cfg)
    folder = RunFolder(Path(cfg["paths"]["runs"]).expanduser() / who.setting / f"seed{cfg['seed']}")
    several = cfg["trainer"]["devices"] * cfg["trainer"]["num_nodes"] != 1
    record = (_together if several else _alone)(cfg, packed, who, folder, verbose)
    record = {"folder": str(folder.path.resolve()), **record}
    if evaluations_of(cfg) and is_language(cfg) and record["status"] in DONE and is_first(cfg):
        record["evaluations"] = _evaluated(cfg, folder, verbose)
    return record


def _evaluated(cfg: dict, folder: RunFolder, verbose: bool) -> dict[str, Any]:
    """What is asked for at the end of the run, of its kept weights."""
    from albert_ablate.evaluations.evaluate import evaluate_run

    try:
        return evaluate_run(
            folder.path,
            evaluations_of(cfg),
            cfg["evaluation"]["weights"],
            say=print if verbose else lambda text: None,
            cache=cfg["paths"]["cache"],
        )
    except ConfigError:
        raise
    except Exception as error:
        raise RunFailed(
            f"The run is done, its evaluation failed: {type(error).__name__}: {error}. Its record: {folder.path}"
        ) from error


def is_first(cfg: Mapping) -> bool:
    """Whether this process speaks for its run: alone, or as the first of the ranks that torchrun or SLURM started."""
    ours = cfg["trainer"]["devices"] * cfg["trainer"]["num_nodes"] != 1
    return not ours or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _alone(cfg: dict, packed: Packed, who: Any, folder: RunFolder, verbose: bool) -> dict[str, Any]:
    """As a single process."""
    from albert_ablate.training.ranks import Ranks

    if found := _found(cfg, folder):
        return found
    if not is_language(cfg):
        from albert_ablate.training.classify import trunk_of

        trunk = run(language_model(cfg), verbose)
        if trunk["status"] not in DONE:
            return trunk
        trunk_of(cfg, packed)
    return _train_or_find(_check_machine(cfg), packed, who, folder, Ranks(), verbose)


def _together(cfg: dict, packed: Packed, who: Any, folder: RunFolder, verbose: bool) -> dict[str, Any]:
    """On several devices: as one rank of those that somebody has started, else by starting them."""
    from albert_ablate.training.ranks import is_rank, joined, launch, place

    if not is_rank():
        return _found(cfg, folder) or launch(_check_machine(cfg), verbose)
    cfg = _check_machine(cfg)
    ranks = place(cfg["trainer"]["devices"], cfg["trainer"]["num_nodes"])
    with joined(ranks):
        if not ranks.first:
            return _follow(packed, ranks)
        try:
            record = _found(cfg, folder) or _train_or_find(cfg, packed, who, folder, ranks, verbose)
        except ConfigError as error:
            ranks.share({"mistake": str(error)})
            raise
        ranks.share({"record": record})
        return record


def _follow(packed: Packed, ranks: Any) -> dict[str, Any]:
    """Any rank but the first: do as it says until it gives its record, or a ConfigError."""
    import torch

    while True:
        kind, what = next(iter(ranks.share().items()))
        if kind == "record":
            return what
        if kind == "mistake":
            raise ConfigError(what)
        torch.set_num_threads(what["record"]["provenance"]["threads"])
        resume = None if what["resume"] is None else Path(what["resume"])
        try:
            _fit(what["cfg"], packed, RunFolder(Path(what["folder"])), what["record"], resume, ranks, False)
        except ConfigError:
            continue  # the first rank has met it too, and says so
        except Exception as error:
            traceback.print_exc()
            raise RunFailed(f"Rank {ranks.rank} failed: {type(error).__name__}: {error}.") from error


def _found(cfg: dict, folder: RunFolder) -> dict[str, Any] | None:
    """The record of a run that need not be trained."""
    record = folder.record()
    if record is None or record["status"] not in DONE or cfg["force"]:
        return None
    require(folder.path, record, "summary", "cost")
    folder.tidy()  # it may have been killed between its last word and this
    return {**record, "found": True}


def _train_or_find(cfg: dict, packed: Packed, who: Any, folder: RunFolder, ranks: Any, verbose: bool) -> dict[str, Any]:
    folder.create()
    with folder.lock():
        record = folder.record()  # another process may have finished it since
        if record is None or record["status"] not in DONE:
            return _train(cfg, packed, who, folder, record, ranks, verbose)
        if not cfg["force"]:
            return {**record, "found": True}
        return _reproduce(cfg, packed, who, folder, record, ranks, verbose)


def _check_machine(cfg: dict) -> dict:
    """What only this machine and building show to be the user's mistake, seen before there is a folder.

    Gives the configuration with trainer.devices=-1 replaced by the number of GPUs.
    """
    import torch

    from albert_ablate.model.build import assemble, build, verify_compiler
    from albert_ablate.optim.groups import decay_groups

    if cfg["trainer"]["accelerator"] == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu is not allowed here: torch finds no GPU; take trainer=cpu or auto.")
    if cfg["trainer"]["precision"] == "16-mixed" and not torch.cuda.is_available():
        raise ConfigError("trainer.precision=16-mixed is not allowed here: it needs a GPU, on a CPU take bf16-mixed.")
    if cfg["trainer"]["accelerator"] == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("trainer.accelerator=mps is not allowed here: torch finds no Apple GPU.")
    cfg = _with_devices(cfg, torch.cuda.device_count() if cfg["trainer"]["accelerator"] in ("auto", "gpu") else 0)
    if cfg["trainer"]["compile"]:
        verify_compiler("cuda" if cfg["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        model = assemble(cfg)
        build(cfg["optimizer"], decay_groups(model), False)
        build(cfg["logger"])  # its package may not be installed
    except Exception as error:
        raise as_config_error(error) from None
    if cfg["trainer"]["strategy"] == "fsdp" and any(p.ndim == 0 for p in model.parameters()):
        raise ConfigError("This model has parameters that are single numbers, which trainer.strategy=fsdp can't split.")
    return cfg


def _with_devices(cfg: dict, gpus: int) -> dict:
    wanted = cfg["trainer"]["devices"]
    if wanted == -1:
        if not gpus:
            raise ConfigError("trainer.devices=-1 means all GPUs, and there is none that trainer.accelerator allows.")
        return check({**cfg, "trainer": {**cfg["trainer"], "devices": gpus}})
    most = gpus or (1 if cfg["trainer"]["accelerator"] == "mps" else wanted)
    if wanted > most:
        raise ConfigError(f"trainer.devices={wanted} is not allowed here: this machine has {most}.")
    return cfg


def identified(cfg: dict) -> tuple[Packed, Identity]:
    """The text, and who the run is."""
    from albert_ablate.model.build import build

    cache = cache_folder(cfg["paths"]["cache"])
    packed = pack(build(cfg["data"]), build(cfg["tokenizer"]), cache)
    return packed, identity(cfg, fingerprint(cfg, build, packed.fingerprint, cache))


def _prepare(cfg: dict) -> tuple[Packed, Identity]:
    """The text and the identity: what can be known before the first step."""
    from albert_ablate.model.build import build

    packed, who = identified(cfg)
    if not is_language(cfg):
        task = build(cfg["task"])
        task.kept(task.rows(cache_folder(cfg["paths"]["cache"])))  # what is wrong with it is said before any work
    packed = packed.keep(cfg["data"].get("train_size"))
    context = cfg["model"]["context"]
    for split in ("train", "validation", "test"):
        if not block_count(getattr(packed, split), context):
            size = cfg["data"].get("train_size") if split == "train" else None
            kept = f" at data.train_size={size}" if size else ""
            raise ConfigError(
                f"model.context={context} is too long for the text: its {split} split holds "
                f"{len(getattr(packed, split))} tokens{kept}, one more than the context is needed."
            )
    return packed, who


def _reproduce(
    cfg: dict, packed: Packed, who: Any, folder: RunFolder, record: dict, ranks: Any, verbose: bool
) -> dict[str, Any]:
    threads = cfg["trainer"]["threads"] or record["provenance"]["threads"]
    cfg = {**cfg, "trainer": {**cfg["trainer"], "threads": threads}}
    again = RunFolder(folder.path / "reproduction")
    kept = again.record()
    if kept is not None and kept["status"] in DONE:
        shutil.rmtree(again.path)
        kept = None
    again.create()
    fresh = _train(cfg, packed, who, again, kept, ranks, verbose)
    if fresh["status"] not in DONE:
        return fresh
    same = fresh["proof"]["final_weights"] == record["proof"]["final_weights"]
    note = {
        "verdict": "reproduced" if same else "differs",
        "final_weights": fresh["proof"]["final_weights"],
        "val_loss": fresh["summary"]["val_loss"],
        "seconds": fresh["cost"]["seconds"],
        "provenance": fresh["provenance"],
    }
    record["reproductions"] = [*record.get("reproductions", []), note]
    folder.write(record)
    return {**record, "reproduction": note["verdict"]}


def _train(
    cfg: dict, packed: Packed, who: Any, folder: RunFolder, record: dict | None, ranks: Any, verbose: bool
) -> dict[str, Any]:
    """Train in `folder`, whose lock is held, from its last commit or from the start."""
    import torch

    from albert_ablate.training.commits import last_commit

    resume, step = last_commit(folder, record.get("identity")) if record is not None else (None, 0)
    if resume is None or record is None:
        folder.clear()
        record = None
    else:
        require(folder.path, record, *NEEDED)
    cores = max(1, (os.cpu_count() or 1) * cfg["trainer"]["num_nodes"] // ranks.size)  # of each rank
    threads = record["provenance"]["threads"] if record else cfg["trainer"]["threads"] or cores
    torch.set_num_threads(threads)
    fresh = _new_record(cfg, packed, who, threads, ranks.size)
    record = _continued(record, fresh) if record else fresh
    record["sessions"] += 1
    record["resumed_at"] = step
    link_by_name(folder.path, record)
    where = {"folder": str(folder.path), "resume": None if resume is None else str(resume)}
    ranks.share({"plan": {"cfg": cfg, "record": record, **where}})
    try:
        return plain(_work(cfg)(cfg, packed, folder, record, resume, ranks, verbose))
    except ConfigError:
        raise
    except Exception as error:
        record = folder.record() or record
        record |= {"status": "failed", "updated": time.time(), "error": "".join(traceback.format_exception(error))}
        try:
            folder.write(record)
        except OSError:
            pass  # the disk may be what failed
        kept = f" Its record: {folder.path}" if (folder.path / FILE).exists() else ""
        raise RunFailed(f"The run failed: {type(error).__name__}: {error}.{kept}") from error


def _work(cfg: dict) -> Callable[..., dict[str, Any]]:
    """What the run does in its folder."""
    if is_language(cfg):
        return _fit
    from albert_ablate.training.classify import fit

    return fit


def _continued(record: dict, fresh: dict) -> dict[str, Any]:
    """The record of an unfinished run as its next session begins: how it is watched may have changed since."""
    old, new = record["config"]["evaluation"]["tokens"], fresh["config"]["evaluation"]["tokens"]
    if old != new:
        raise ConfigError(
            f"evaluation.tokens={new} is not allowed: this run was begun with {old}, and its evaluations are compared."
        )
    if record["provenance"] != fresh["provenance"]:
        record["resumed_under"] = fresh["provenance"]
    now = {key: fresh[key] for key in ("status", "error", "signal", "config", "choices")}
    return fresh | record | now


def _fit(
    cfg: dict, packed: Packed, folder: RunFolder, record: dict, resume: Path | None, ranks: Any, verbose: bool
) -> dict[str, Any]:
    import pytorch_lightning as pl

    from albert_ablate.model.build import build, build_model
    from albert_ablate.training.checkpoint import AtomicCheckpointIO
    from albert_ablate.training.console import Progress, banner
    from albert_ablate.training.cost import flops_per_token, training_flops
    from albert_ablate.training.module import Blocks, LanguageModel, TextData
    from albert_ablate.training.recorder import Recorder
    from albert_ablate.training.validation import Evaluator

    model, context, batch = build_model(cfg), cfg["model"]["context"], cfg["data"]["batch"]
    order = Order(block_count(packed.train, context), batch, cfg["seed"])
    start, steps = record["resumed_at"], steps_of(cfg)
    record["budget"]["flops"] = flops_per_token(cfg) * batch * context * steps
    record["proof"]["initial_draws"] = model.initial_draws
    record["model"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(model.blocks),
        "width": cfg["model"]["width"],
        "mean_dropout": sum(block.rate for block in model.stack) / len(model.blocks),
    }
    if ranks.first:
        folder.write_config(cfg)
    module = LanguageModel(model, cfg, steps, sharded=ranks.size > 1 and cfg["trainer"]["strategy"] == "fsdp")
    progress = Progress(steps, batch * context, shown=verbose)
    recorder = Recorder(
        cfg,
        folder,
        record,
        Evaluator(packed, context, cfg["evaluation"]["tokens"], ranks),
        order,
        joined(build(cfg["logger"])),
        progress,
        training_flops(cfg),
        ranks,
    )
    if not packed.reversible and ranks.first:
        print("The tokenizer does not give the text back: bits per byte are left out.", file=sys.stderr)
    _quiet()
    trainer = pl.Trainer(
        accelerator=cfg["trainer"]["accelerator"],
        devices=cfg["trainer"]["devices"],
        num_nodes=cfg["trainer"]["num_nodes"],
        strategy=ranks.strategy(cfg["trainer"]["strategy"], any(block.skip.rate for block in model.stack)),
        precision=cfg["trainer"]["precision"],
        deterministic=cfg["trainer"]["deterministic"],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=cfg["data"].get("accumulate", 1),
        callbacks=[recorder],
        plugins=[AtomicCheckpointIO(record.get("identity") or ""), ranks.environment()],
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
    if verbose:
        print(banner(record, _estimate(module, packed, order, context, steps - start)), flush=True)
    data = TextData(Blocks(packed, order, context, cfg["data"].get("accumulate", 1), start, ranks.rank, ranks.size))
    try:
        with _signals(recorder):
            trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
        if not ranks.first:
            pass
        elif recorder.outcome == "stopped":
            record |= {"status": "stopped", "signal": recorder.signal}
            folder.write(record)
        else:
            folder.tidy()
    finally:
        recorder.close()
        if ranks.first:
            recorder.logger.close(record)
    return record


def _new_record(cfg: dict, packed: Packed, who: Any, threads: int, ranks: int) -> dict[str, Any]:
    steps, per_step = steps_of(cfg), cfg["data"]["batch"] * cfg["model"]["context"]
    corpus = packed.corpus  # not built anew: a hub dataset would ask the hub a second time
    return {
        "status": "running",
        "label": label(cfg),
        "name": name_of(cfg),
        "arm": who.arm,
        "setting": who.setting,
        "identity": who.run,
        "seed": cfg["seed"],
        "role": role(cfg["seed"]),
        "choices": cfg["choices"],
        "revisions": revisions(cfg),
        "config": masked({k: v for k, v in cfg.items() if k not in ("paths", "choices", "force", "debug")}),
        "budget": {
            "tokens": steps * per_step,
            "steps": steps,
            "passes": steps * cfg["data"]["batch"] / block_count(packed.train, cfg["model"]["context"]),
        },
        "data": {
            "name": type(corpus).__name__,
            "fingerprint": packed.fingerprint,
            "train_tokens": len(packed.train),
            "bytes_per_token": packed.bytes_per_token["train"],
            "reversible": packed.reversible,  # whether the tokenizer gives the text back
            "skipped": packed.skipped,  # rows without text
            "entropy_rate": getattr(corpus, "entropy_rate", None),  # nats per byte, known for synthetic languages
            "revision": getattr(corpus, "commit", None),
        },
        "summary": {},
        "proof": {},
        "provenance": {**provenance(), "threads": threads, "ranks": ranks, "precision": cfg["trainer"]["precision"]},
        "cost": {},
        "histories": {},
        "error": None,
        "signal": None,
        "sessions": 0,
        "created": time.time(),
    }


def label(cfg: Mapping) -> str:
    """A name for people: the options taken in the groups that make an arm."""
    choices = cfg.get("choices") or {}
    groups = ("recipe", "model", "norm", "dropout", "optimizer", "clip", "data")
    name = " ".join(f"{g}={choices[g]}" for g in groups if choices.get(g)) or "run"
    return name if is_language(cfg) else f"{name} task={cfg['task']['data']}"


def _estimate(module: Any, packed: Packed, order: Order, context: int, steps: int) -> float | None:
    """Seconds the steps left will take on this CPU, from two steps' forward and backward; None on another device.

    Leaves nothing in the model."""
    import torch

    from albert_ablate.data.packed import take_blocks
    from albert_ablate.model.loss import objective
    from albert_ablate.training.diagnostics import undisturbed

    if module.cfg["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available():
        return None
    rows = torch.from_numpy(take_blocks(packed.train, order.indices(0), context))
    times = []
    with undisturbed(module.model):
        for _ in range(2):
            began = time.perf_counter()
            for micro in rows.chunk(module.cfg["data"].get("accumulate", 1)):
                objective(module.loss, module.model, micro)[0].backward()
            times.append(time.perf_counter() - began)
    module.zero_grad(set_to_none=True)
    return min(times) * steps


def _quiet() -> None:
    """Lightning's remarks on workers, logging and devices say nothing about our set-up."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")


@contextmanager
def _signals(recorder: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the run at the next boundary, committed and resumable; a second one stops it at once."""
    before = recorder.listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
