"""Weights & Biases as a mirror of the run folder: it is sent what the folder holds, never the other way round."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa


class NoLogger:
    """The run folder alone."""

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        """Begin, with the histories a resumed run already has."""

    def send(self, rows: Mapping[str, list[Mapping]]) -> None:
        """Rows that have just been committed, by history."""

    def close(self, record: Mapping) -> None:
        """The session's end, whatever the run's status."""


class Wandb(NoLogger):
    """A W&B run whose id is the run's identity and whose group is its arm; tokens are the step metric.

    Rows are sent when they are committed, from the history, so a killed run's curve has no row twice. Offline, a
    resumed run is written anew from its first row, since segments that share an id overwrite each other when synced.
    Trouble with W&B never ends a run: it is said once and the run goes on.
    """

    def __init__(
        self, mode: Literal["online", "offline"] = "online", project: str = "albert_ablate", entity: str | None = None
    ):
        self.mode, self.project, self.entity = mode, project, entity
        self.run: Any = None
        self.sent: dict[str, int] = {}

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        self._guard(self._open, folder, record, histories)

    def send(self, rows: Mapping[str, list[Mapping]]) -> None:
        if self.run is not None:
            self._guard(self._send, rows)

    def close(self, record: Mapping) -> None:
        if self.run is not None:
            self._guard(self._close, record)

    def _guard(self, act, *args) -> None:
        try:
            act(*args)
        except Exception as error:  # a tracker must not end a run, whatever it raises
            self.run = None
            print(f"W&B is left out from here on ({type(error).__name__}: {error}); the run goes on.", file=sys.stderr)

    def _open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        import wandb

        mode = self.mode
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            print("W&B: no key found, logging offline; `wandb sync` sends it later.", file=sys.stderr)
            mode = "offline"
        mode = os.environ.get("WANDB_MODE", mode)
        if mode == "offline":
            for segment in folder.glob("wandb/offline-run-*"):
                shutil.rmtree(segment, ignore_errors=True)
        self.run = wandb.init(
            id=record["identity"],
            project=self.project,
            entity=self.entity,
            group=record["arm"],
            name=record["label"],
            config={**record["config"], "arm": record["arm"], "setting": record["setting"]},
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, init_timeout=30),
        )
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        already = dict(self.run.summary.get("rows_sent") or {}) if self.run.resumed else {}
        self.sent = {name: int(already.get(name, 0)) for name in histories}
        self._send({name: table.slice(self.sent[name]).to_pylist() for name, table in histories.items()})

    def _send(self, rows: Mapping[str, list[Mapping]]) -> None:
        for name, new in rows.items():
            for row in new:
                self.run.log(_flat(name, row))
            self.sent[name] += len(new)
        self.run.summary["rows_sent"] = dict(self.sent)

    def _close(self, record: Mapping) -> None:
        status = record["status"]
        self.run.summary.update({"status": status, **{k: v for k, v in record["summary"].items() if v is not None}})
        self.run.finish(exit_code=1 if status == "failed" else 0)
        self.run = None


def _flat(name: str, row: Mapping) -> dict:
    """A history's row under W&B's metric paths: train/loss, val/loss, layers/3/grad_norm."""
    axes = {k: row[k] for k in ("tokens", "step", "seconds", "flops")}
    prefix = {"steps": "train", "evals": row.get("split"), "layers": f"layers/{row.get('layer')}"}[name]
    skip = {*axes, "split", "layer", "data_order"}
    return {**axes, **{f"{prefix}/{k}": v for k, v in row.items() if k not in skip and v is not None}}
