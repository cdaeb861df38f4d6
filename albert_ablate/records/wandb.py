"""Weights & Biases as a mirror of the run folder: it is sent what the folder holds, never the other way round."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

# Seconds. wandb waits up to 90 at the start and for ever at the end; a run must not be held up by more than a minute.
START, END = 20, 30
AXES = ("tokens", "step", "seconds", "flops")
NOT_METRICS = {*AXES, "split", "layer", "data_order"}


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

    What the histories say about one step is one row of W&B's, numbered by the step. Rows are sent when they are
    committed, and a session begins by sending what the server has not got, so a killed run's curve has no row twice
    and no gap. Offline, a resumed run is written anew from its first row, since segments that share an id overwrite
    each other when synced. Trouble with W&B never ends a run: it is said once, offline takes over where it can.
    """

    def __init__(
        self, mode: Literal["online", "offline"] = "online", project: str = "albert_ablate", entity: str | None = None
    ):
        self.mode, self.project, self.entity = mode, project, entity
        self.run: Any = None
        self.next = 0  # number of the next row

    def open(self, folder: Path, record: Mapping, histories: Mapping[str, pa.Table]) -> None:
        rows = {name: table.to_pylist() for name, table in histories.items()}
        if self.mode == "online" and self._guard(self._open, folder, record, rows, "online"):
            return
        if self.mode == "online":
            _release()
        self._guard(self._open, folder, record, rows, "offline")

    def send(self, rows: Mapping[str, list[Mapping]]) -> None:
        if self.run is not None:
            self._guard(self._send, rows)

    def close(self, record: Mapping) -> None:
        if self.run is not None:
            self._guard(self._close, record)

    def _guard(self, act, *args) -> bool:
        """Whether `act` did its work. A tracker must not end a run, whatever it raises."""
        try:
            act(*args)
        except Exception as error:
            self.run = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"W&B failed and the run goes on ({reason[:300]}).", file=sys.stderr)
            return False
        return True

    def _open(self, folder: Path, record: Mapping, rows: Mapping[str, list[Mapping]], mode: str) -> None:
        # Set before wandb's own process starts: its log goes into the run folder; no telemetry, which delays the exit.
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        if mode == "online":
            mode = os.environ.get("WANDB_MODE", mode)
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            print("W&B: no key found, logging offline; `wandb sync` sends it later.", file=sys.stderr)
            mode = "offline"
        # earlier sessions' files: all they held is in the histories
        for session in [*folder.glob("wandb/run-*"), *folder.glob("wandb/offline-run-*")]:
            shutil.rmtree(session, ignore_errors=True)
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
            reinit="create_new",  # else a process's second run would be given its first, if that is still open
            settings=wandb.Settings(
                init_timeout=START,
                finish_timeout=END,
                silent=True,
                console="off",
                # the record holds the provenance, without names of hosts, users, paths and remotes
                disable_git=True,
                save_code=False,
                host="",
                program="run.py",
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        self.next = 0
        self._send(rows)

    def _send(self, rows: Mapping[str, list[Mapping]]) -> None:
        for row in _merged(rows, self.next):
            number = max(row["step"], self.next)  # an evaluation of earlier weights, at the end, has its own row
            self.next = number + 1
            if number >= self.run.starting_step:  # else the server has it from an earlier session
                self.run.log(row, step=number)

    def _close(self, record: Mapping) -> None:
        done = record["status"] in ("finished", "diverged")
        status = record["status"] if done or record["status"] == "stopped" else "failed"
        self.run.summary.update({"status": status, **{k: v for k, v in record["summary"].items() if v is not None}})
        if status == "stopped":
            self.run.mark_preempting()  # with an exit code that is not 0: to be gone on with
        code = 128 + record.get("signal", signal.SIGTERM) if status == "stopped" else 0 if done else 1
        self.run.finish(exit_code=code)
        self.run = None


def _release() -> None:
    """After an attempt that failed: wandb's own process would hold the run's id as long as it lives."""
    import wandb

    if wandb.run is None:  # a run of the user's own would end with it
        with contextlib.suppress(Exception):
            wandb.teardown()


def _merged(rows: Mapping[str, list[Mapping]], sent: int) -> list[dict]:
    """One row per step under W&B's metric paths: train/loss, layers/3/grad_norm, eval/validation/loss.

    In the order of the steps, those below `sent` last.
    """
    merged: dict[int, dict] = {}
    for name, new in rows.items():
        for row in new:
            prefix = {"steps": "train", "evals": f"eval/{row.get('split')}", "layers": f"layers/{row.get('layer')}"}
            values = {f"{prefix[name]}/{k}": v for k, v in row.items() if k not in NOT_METRICS and v is not None}
            merged[row["step"]] = {k: row[k] for k in AXES} | merged.get(row["step"], {}) | values
    return [merged[step] for step in sorted(merged, key=lambda step: (step < sent, step))]
