"""One run, from configuration to record: find it if it is done, else train it, go on with it, or train it again."""

import logging
import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError, as_config_error, check, identity, steps_of
from albert_ablate.data.packed import Order, Packed, block_count, cache_folder, pack
from albert_ablate.records.atomic import replace_file
from albert_ablate.records.folder import DONE, RunFolder, plain
from albert_ablate.records.provenance import provenance


class RunFailed(RuntimeError):
    """The run broke after its first step was in sight; its record holds the traceback."""


def run(cfg: Mapping, verbose: bool = False) -> dict[str, Any]:
    """Train the run that `cfg` describes, or find it: gives its record, and its `folder`.

    A finished or diverged run is not redone; a stopped, failed or orphaned one goes on from its last commit, bit for
    bit. With force=true a done run is trained again beside its record, which then notes "reproduced" or "differs".
    Raises ConfigError for the user's mistakes, RunFailed where training broke.
    """
    cfg = check(cfg)
    packed, who = _prepare(cfg)
    folder = RunFolder(Path(cfg["paths"]["runs"]).expanduser() / who.setting / f"seed{cfg['seed']}")
    return {**_find_or_train(cfg, packed, who, folder, verbose), "folder": str(folder.path.resolve())}


def _find_or_train(cfg: dict, packed: Packed, who: Any, folder: RunFolder, verbose: bool) -> dict[str, Any]:
    record = folder.record()
    if record is not None and record["status"] in DONE and not cfg["force"]:
        folder.tidy()  # it may have been killed between its last word and this
        return {**record, "found": True}
    _check_machine(cfg)
    folder.create()
    with folder.lock():
        record = folder.record()  # another process may have finished it since
        if record is None or record["status"] not in DONE:
            return _train(cfg, packed, who, folder, record, verbose)
        if not cfg["force"]:
            return {**record, "found": True}
        return _reproduce(cfg, packed, who, folder, record, verbose)


def _check_machine(cfg: dict) -> None:
    """What only building shows to be the user's mistake, seen before there is a folder."""
    import torch

    from albert_ablate.model.build import assemble

    if cfg["trainer"]["accelerator"] == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu is not allowed here: torch finds no GPU; take trainer=cpu or auto.")
    if cfg["trainer"]["precision"] == "16-mixed" and not torch.cuda.is_available():
        raise ConfigError("trainer.precision=16-mixed is not allowed here: it needs a GPU, on a CPU take bf16-mixed.")
    try:
        assemble(cfg)
    except Exception as error:
        raise as_config_error(error) from None


def _prepare(cfg: dict) -> tuple[Packed, Any]:
    """The text and the identity: what can be known before the first step."""
    from albert_ablate.model.build import build

    packed = pack(build(cfg["data"]), build(cfg["tokenizer"]), cache_folder(cfg["paths"]["cache"]))
    who = identity(cfg, packed.fingerprint)
    packed = packed.keep(cfg["data"].get("train_size"))
    context = cfg["model"]["context"]
    for split in ("train", "validation", "test"):
        if not block_count(getattr(packed, split), context):
            raise ConfigError(
                f"model.context={context} is too long for the text: its {split} split holds "
                f"{len(getattr(packed, split))} tokens, one more than the context is needed."
            )
    return packed, who


def _reproduce(cfg: dict, packed: Packed, who: Any, folder: RunFolder, record: dict, verbose: bool) -> dict[str, Any]:
    threads = cfg["trainer"]["threads"] or record["provenance"]["threads"]
    cfg = {**cfg, "trainer": {**cfg["trainer"], "threads": threads}}
    again = RunFolder(folder.path / "reproduction")
    kept = again.record()
    if kept is not None and kept["status"] in DONE:
        shutil.rmtree(again.path)
        kept = None
    again.create()
    fresh = _train(cfg, packed, who, again, kept, verbose)
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
    cfg: dict, packed: Packed, who: Any, folder: RunFolder, record: dict | None, verbose: bool
) -> dict[str, Any]:
    """Train in `folder`, whose lock is held, from its last commit or from the start."""
    import torch

    from albert_ablate.training.checkpoint import load_checkpoint

    committed = folder.checkpoints / "resume.ckpt"
    resume = committed if record is not None and committed.exists() else None
    if resume is None:
        folder.clear()
        record = None
    threads = record["provenance"]["threads"] if record else cfg["trainer"]["threads"] or os.cpu_count() or 1
    torch.set_num_threads(threads)
    fresh = _new_record(cfg, packed, who, threads)
    record = _continued(record, fresh) if record else fresh
    record["sessions"] += 1
    record["resumed_at"] = load_checkpoint(resume)["global_step"] if resume else 0
    try:
        return plain(_fit(cfg, packed, folder, record, resume, verbose))
    except ConfigError:
        raise
    except Exception as error:
        record = folder.record() or record
        record |= {"status": "failed", "updated": time.time(), "error": "".join(traceback.format_exception(error))}
        try:
            folder.write(record)
        except OSError:
            pass  # the disk may be what failed
        raise RunFailed(f"The run failed: {type(error).__name__}: {error}. Its record: {folder.path}") from error


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
    cfg: dict, packed: Packed, folder: RunFolder, record: dict, resume: Path | None, verbose: bool
) -> dict[str, Any]:
    import pytorch_lightning as pl
    import yaml

    from albert_ablate.model.build import build, build_model
    from albert_ablate.training.checkpoint import AtomicCheckpointIO
    from albert_ablate.training.console import Progress, banner
    from albert_ablate.training.cost import flops_per_token
    from albert_ablate.training.evaluation import Evaluator
    from albert_ablate.training.module import Blocks, LanguageModel, TextData
    from albert_ablate.training.recorder import Recorder

    model, context, batch = build_model(cfg), cfg["model"]["context"], cfg["data"]["batch"]
    order = Order(block_count(packed.train, context), batch, cfg["seed"])
    start, steps = record["resumed_at"], steps_of(cfg)
    flops = flops_per_token(cfg) * batch * context
    record["budget"]["flops"] = flops * steps
    record["proof"]["initial_draws"] = model.initial_draws
    record["model"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(model.blocks),
        "width": cfg["model"]["width"],
        "mean_dropout": sum(block.rate for block in model.stack) / len(model.blocks),
    }
    replace_file(folder.path / "config.yaml", yaml.safe_dump(cfg, sort_keys=False).encode())
    module = LanguageModel(model, cfg, steps)
    progress = Progress(steps, batch * context, shown=verbose)
    recorder = Recorder(
        cfg,
        folder,
        record,
        Evaluator(packed, context, cfg["evaluation"]["tokens"]),
        order,
        build(cfg["logger"]),
        progress,
        flops,
    )
    if verbose:
        print(banner(record, _estimate(module, packed, order, context, steps - start)), flush=True)
    _quiet()
    trainer = pl.Trainer(
        accelerator=cfg["trainer"]["accelerator"],
        devices=cfg["trainer"]["devices"],
        precision=cfg["trainer"]["precision"],
        deterministic=cfg["trainer"]["deterministic"],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=cfg["data"].get("accumulate", 1),
        callbacks=[recorder],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=str(folder.path),
    )
    data = TextData(Blocks(packed, order, context, cfg["data"].get("accumulate", 1), start))
    try:
        with _signals(recorder):
            trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
        if recorder.outcome == "stopped":
            record |= {"status": "stopped", "signal": recorder.signal}
            folder.write(record)
        else:
            folder.tidy()
    finally:
        recorder.close()
        recorder.logger.close(record)
    return record


def _new_record(cfg: dict, packed: Packed, who: Any, threads: int) -> dict[str, Any]:
    steps, per_step = steps_of(cfg), cfg["data"]["batch"] * cfg["model"]["context"]
    corpus = packed.corpus  # not built anew: a hub dataset would ask the hub a second time
    return {
        "status": "running",
        "label": label(cfg),
        "arm": who.arm,
        "setting": who.setting,
        "identity": who.run,
        "seed": cfg["seed"],
        "role": "tuning" if cfg["seed"] >= TUNING_SEEDS else "confirmation",
        "choices": cfg["choices"],
        "config": {k: v for k, v in cfg.items() if k not in ("paths", "choices", "force", "debug")},
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
            "entropy_rate": getattr(corpus, "entropy_rate", None),  # nats per byte, known for synthetic languages
            "revision": getattr(corpus, "commit", None),
        },
        "summary": {},
        "proof": {},
        "provenance": {**provenance(), "threads": threads, "precision": cfg["trainer"]["precision"]},
        "cost": {},
        "histories": {},
        "error": None,
        "signal": None,
        "sessions": 0,
        "created": time.time(),
    }


TUNING_SEEDS = 1_000_000


def label(cfg: Mapping) -> str:
    """A name for people: the options taken in the groups that make an arm."""
    choices = cfg.get("choices") or {}
    groups = ("recipe", "model", "norm", "dropout", "optimizer", "clip", "data")
    return " ".join(f"{g}={choices[g]}" for g in groups if choices.get(g)) or "run"


def _estimate(module: Any, packed: Packed, order: Order, context: int, steps: int) -> float | None:
    """Seconds the steps left will take on this CPU, from two steps' forward and backward; None on another device."""
    import torch

    from albert_ablate.data.packed import take_blocks

    if module.cfg["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available():
        return None
    rows = torch.from_numpy(take_blocks(packed.train, order.indices(0), context))
    times = []
    for _ in range(2):
        began = time.perf_counter()
        for micro in rows.chunk(module.cfg["data"].get("accumulate", 1)):
            module.loss(module.model(micro[:, :-1]), micro[:, 1:])[0].backward()
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
