"""Small settings that tests share, and records and histories of runs as training writes them, without training."""

import json
from collections.abc import Mapping
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from albert_ablate.config import ConfigError, keys_of, revisions, run_identity
from albert_ablate.records import store

TINY = ["model=nano", "model.layers=3", "model.width=16", "model.context=12"]
SMALL = ["model=nano", "model.layers=2", "model.width=16", "model.context=16"]


def changed(record: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A record with parts replaced, by dotted key written with __: summary__val_loss=2.0."""
    content = json.loads(json.dumps(dict(record)))
    for key, value in changes.items():
        *path, last = key.split("__")
        node = content
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return content


def write_record(folder: Path, fields: Mapping[str, Any], **changes: Any) -> None:
    """The record that training would write, with every field of its format; the folder is made."""
    content = changed(fields, changes)
    folder.mkdir(parents=True, exist_ok=True)
    setting = content.get("setting") or folder.parent.name
    derived = {"setting": setting, "identity": run_identity(setting, content["seed"])}
    derived |= _about(json.dumps(content.get("config")))
    store.write(folder, store.Record(**(derived | content)).with_defaults())


@cache
def _about(config: str) -> dict[str, Any]:
    """What training derives from a configuration; nothing where it is not a whole one."""
    cfg = json.loads(config)
    try:
        keys = keys_of(cfg)
    except (ConfigError, TypeError, AttributeError):
        return {}
    return {"key": {"arm": keys.arm, "setting": keys.setting}, "revisions": revisions(cfg)}


def edit_record(folder: Path, **changes: Any) -> dict[str, Any]:
    """Replace parts of a record as a later session of its run would: its checksums are those of the new content."""
    content = changed(json.loads((folder / store.FILE).read_text()), changes)
    store.write(folder, content)
    return content


def write(folder: Path, name: str, columns: dict) -> None:
    table = pa.table(columns)
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def make_run(root, choices, seed=0, steps=300, layers=4, level=2.0, lost=None, full=True, lr=1e-3, role="confirmation"):
    """A finished run, or one that diverged after `lost` steps; full: with the columns of today's histories."""
    rng = np.random.default_rng(seed)
    n, setting = lost or steps, sha1(repr((choices, lr)).encode()).hexdigest()[:12]
    folder = root / setting / f"seed{seed}"
    folder.mkdir(parents=True)
    step = np.arange(1, n + 1)

    def axes(at):
        return {"step": at, "tokens": at * 100, "seconds": at * 0.01, "flops": at * 1e6}

    loss = level + 3 * np.exp(-step / 40) + rng.normal(0, 0.03, n) + 0.02 * seed
    loss[n // 2] += 1.5
    norm = np.exp(rng.normal(0, 0.1, n))
    if lost:
        loss[-2:], norm[-2:] = [1e6, np.nan], [np.inf, np.nan]
    steps_ = {**axes(step), "loss": loss, "lr": lr + 0 * loss, "grad_norm": norm, "clipped": 0 * loss}
    write(folder, "steps", steps_ | ({"grad_norm_clipped": np.minimum(norm, 1)} if full else {}))
    at = np.repeat(np.linspace(0, n, 6).astype(int), 2)
    held = np.where(at == 0, 5.5, level + 3 * np.exp(-at / 40)) + 0.02 * seed + np.tile([0, 0.1], 6)
    split = ["train", "validation"] * 6
    write(folder, "evals", {**axes(at), "split": split, "loss": held, "bits_per_byte": held / np.log(2)})
    logged = np.arange(0, n + 1, 10)
    g, layer = np.repeat(logged, 2 * layers), np.tile(np.repeat(np.arange(layers), 2), len(logged))
    sublayer = np.tile(["attention", "mlp"], layers * len(logged))
    one = np.ones(len(g))
    rows = {**axes(g), "layer": pa.array(layer, pa.int32()), "grad_norm": one / (1 + layer), "weight_norm": one}
    if full:
        rows |= {"sublayer": sublayer, "update_ratio": one * 1e-3, "residual_rms": one + layer, "output_rms": one}
        rows |= {"entropy": np.where(sublayer == "attention", 2.0, np.nan), "max_logit": one}
    write(folder, "layers", rows)
    val = float(held[-1])
    record = {
        "status": "diverged" if lost else "finished", "label": " ".join(choices.values()), "arm": setting,
        "setting": setting, "identity": f"{setting}{seed}", "seed": seed, "role": role, "choices": choices,
        "config": {"optimizer": {"lr": lr}, "model": {"layers": layers}},
        "summary": {"val_loss": val, "train_loss": val - 0.1, "gap": 0.1, "initial_loss": 5.5, "unigram_loss": 3.0,
                    "divergence": "non_finite" if lost else None, "tokens": n * 100},
        "cost": {"flops": n * 1e6, "seconds": n * 0.01 + seed}, "histories": None, "error": None,
        "progress": {"step": n, "steps": steps},
    }  # fmt: skip
    write_record(folder, record)
    curve = [{"kind": k, "rate": r, "loss": val + r, "rise": r} for k in ("masked", "noisy") for r in (0, 0.1, 0.3)]
    kept = {"settings": {}, "weights": "last", "weights_hash": "x"}
    if full and not lost:
        found = {"corruption": {"rows": curve, "summary": {"masked_area": 0.1, "noisy_area": "Infinity"}, **kept}}
        (folder / "evaluations.json").write_text(json.dumps(found))
    return folder
