"""Evaluate the saved weights of a run; evaluations that were made before with the same settings are not repeated."""

import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from albert_ablate.config import Config, ConfigError, check, evaluations_of, refuse_changed_own_code, steps_of
from albert_ablate.data.packed import BatchOrder, Packed, block_count, cache_folder, pack
from albert_ablate.evaluations.subject import Subject
from albert_ablate.model.build import build, build_model
from albert_ablate.model.weights import load_checkpoint, weights_hash
from albert_ablate.records.evaluation_results import read_evaluations, write_evaluations
from albert_ablate.records.folder import DONE, RunFolder
from albert_ablate.records.store import require

Weights = Literal["last", "best"]
Say = Callable[[str], None]


def evaluate_run(
    path: Path,
    nodes: Mapping[str, Mapping],
    weights: Weights,
    force: bool = False,
    say: Say = lambda text: None,
    cache: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Make the missing evaluations of the run in the folder `path`; returns the results of all that were asked for.

    nodes: evaluations by name. One is not repeated if it was made of the same weights with the same settings. Each
    result is saved as soon as it is there. cache: as paths.cache. Raises ConfigError for an unfinished run, a missing
    checkpoint and other obstacles.
    """
    folder = RunFolder(path)
    record = folder.record()
    if record is None or record["status"] not in DONE:
        state = record["status"] if record else "no run"
        raise ConfigError(f"{path} is {state}, not evaluated: only a finished or diverged run is.")
    require(path, record, "config.evaluation", "choices", "provenance.threads", "data.fingerprint")
    if "trunk" in record:
        raise ConfigError(
            f"{path} is a classification run, and evaluations need a language model: take its trunk, "
            f"{record['trunk']['folder']}."
        )
    if not nodes:
        return {}
    with folder.lock():
        run = record.get("identity")
        entries = read_evaluations(path, run)
        cfg = _configuration(record, nodes, cache)
        refuse_changed_own_code(path, record)  # after the check, which refuses a stranger
        nodes = evaluations_of(cfg)
        subject = load_subject(folder, record, cfg, weights)
        named = weights_hash(subject.model)
        for name, node in nodes.items():
            evaluation = build(node)
            settings = evaluation.settings(subject)
            wanted = {"settings": _listed(settings), "weights": weights, "weights_hash": named}
            if not force and {key: entries.get(name, {}).get(key) for key in wanted} == wanted:
                continue
            say(f"{name} ...")
            began = time.perf_counter()
            result = evaluation(subject)
            entry = {"rows": result.rows, "summary": result.summary, **wanted}
            entries[name] = {**entry, "seconds": time.perf_counter() - began}
            write_evaluations(path, entries, run)
    return {name: entries[name] for name in nodes}


def load_subject(folder: RunFolder, record: Mapping, cfg: Config, weights: Weights) -> Subject:
    """Load what evaluations need: the run's model with its saved weights, and its text."""
    torch.set_num_threads(record["provenance"]["threads"])
    content = _checkpoint(folder.checkpoints / f"{weights}.ckpt", weights, record.get("identity"))
    plainly = replace(cfg, trainer=replace(cfg.trainer, compile=False, gradient_checkpointing=False))
    on_cpu = cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    model = build_model(plainly, "cpu" if on_cpu else "cuda")
    try:
        model.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise ConfigError(
            f"{folder.checkpoints / weights}.ckpt does not fit the model of its record: {str(error).splitlines()[0]}"
        ) from None
    packed, tokenizer = _text(record, cfg)
    context = cfg.model.context
    return Subject(
        model=model.eval(),
        packed=packed,
        tokenizer=tokenizer,
        order=BatchOrder(block_count(packed.train, context), cfg.data.batch, cfg.seed),
        context=context,
        seed=cfg.seed,
        steps=min(content["step"], steps_of(cfg)),
    )


def _configuration(record: Mapping, nodes: Mapping[str, Mapping], cache: str | None) -> Config:
    """The run's own configuration, with these evaluations."""
    plain_settings = {
        name: value for name, value in record["config"]["evaluation"].items() if not isinstance(value, Mapping)
    }
    here = {"paths": {"runs": "runs", "cache": cache}, "choices": record["choices"]}
    return check({**record["config"], **here, "evaluation": {**plain_settings, **nodes}})


def _text(record: Mapping, cfg: Config) -> tuple[Packed, Any]:
    tokenizer = build(cfg.tokenizer)
    packed = pack(build(cfg.data), tokenizer, cache_folder(cfg.paths.cache))
    if packed.fingerprint != record["data"]["fingerprint"]:
        name = (record["choices"] or {}).get("data", record["data"]["name"])
        raise ConfigError(f"The text of data={name} is no longer the one that this run was trained on.")
    return packed.keep(cfg.data.get("train_size")), tokenizer


def _checkpoint(path: Path, weights: Weights, run: str | None) -> dict[str, Any]:
    try:
        return load_checkpoint(path, run)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: take the other weights, or remove {path.parent.parent} to train the run again."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{path} cannot be read, {why}: take the other weights, or remove {path.parent.parent} to train it again."
        ) from None


def _listed(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, Mapping):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value
