"""The one callback: measurements, divergence, commits and stopping, all at the boundary between two steps.

At a boundary every counter of Lightning's agrees with every one of ours, so whatever is committed there can be resumed
exactly: histories are flushed and fsynced, their lengths go into the checkpoint, the checkpoint is replaced, the record
follows. What was written after the last commit is cut off on resume.
"""

import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from albert_ablate.config import Config
from albert_ablate.model.weights import weights_of
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import SCHEMAS, History, NoHistory
from albert_ablate.records.signals import StopSignal
from albert_ablate.training.console import Progress
from albert_ablate.training.cost import PeakMemory
from albert_ablate.training.divergence import Divergence
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.step_stats import StepStats
from albert_ablate.training.trained_module import TrainedModule


class Recorder(pl.Callback):
    """Keeps the run folder. `outcome` is None while training, then finished, diverged or stopped.

    A subclass measures what its task asks for: `measure_if_due` at a boundary, `measure_end` when training is over,
    and `summary` of all that so far.

    stop: the signal to stop, if one has come. stats: the steps taken. best: what was measured at the step whose
    weights were best on validation, and its `step`, -1 before there is one. lengths, digests: of the committed
    histories. kind: of divergence, None where there is none.
    """

    def __init__(
        self,
        cfg: Config,
        folder: RunFolder,
        record: dict[str, Any],
        stats: StepStats,
        logger: Any,
        progress: Progress,
        ranks: Ranks,
        stop: StopSignal,
    ):
        self.cfg, self.folder, self.record, self.stats = cfg, folder, record, stats
        self.logger, self.progress, self.ranks, self.stop = logger, progress, ranks, stop
        self.steps = record["budget"]["steps"]
        # only rank 0 writes; the others take part in what needs all
        run = record.get("identity") or ""
        self.histories = {name: History(folder.path, name, run) if ranks.first else NoHistory() for name in SCHEMAS}
        self.divergence = Divergence(self.steps)
        self.outcome: str | None = None
        self.kind: str | None = None
        self.memory = PeakMemory()
        self.best: dict[str, Any] = {"step": -1}
        self.lengths: dict[str, int] = dict.fromkeys(SCHEMAS, 0)
        self.digests: dict[str, str] = {}

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.stats.step

    # --- what a task adds --------------------------------------------------------------------------------------------

    def measure_if_due(self, trainer: pl.Trainer, module: TrainedModule) -> bool:
        """Measure what is due between two steps; whether a commit is to follow. May end the run by `end`."""
        raise NotImplementedError

    def measure_end(self, trainer: pl.Trainer, module: TrainedModule) -> str:
        """The last measurements, once training is over; sets `kind`, and gives the hash of the final weights."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """The part `summary` of the record, as of now."""
        raise NotImplementedError

    # --- state in the checkpoint -------------------------------------------------------------------------------------

    SAVED = {"best": "best", "lengths": "lengths", "digests": "digests"}  # attributes by their key

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state, whatever the task: commits.py reads it there."""
        return "Recorder"

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.stats.state_dict(),
            **{key: getattr(self, name) for key, name in self.SAVED.items()},
            "divergence": [self.divergence.initial, self.divergence.above],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stats.load_state_dict(state)
        for key, name in self.SAVED.items():
            setattr(self, name, state.get(key, getattr(self, name)))  # older checkpoints have fewer
        self.divergence.initial, self.divergence.above = state["divergence"]

    # --- hooks: their order in a step is written in step_watch.py ----------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, module: TrainedModule) -> None:  # type: ignore[override]
        for name, history in self.histories.items():
            history.cut(self.lengths[name])
        if self.best["step"] == self.step:  # it may have been killed between the two
            self.save_weights(trainer, module, "best")
        self.stop.listen()  # Lightning has just put its own SIGTERM handler first, which ends a run without a commit
        if self.ranks.first:
            self.logger.open(self.folder.path, self.record, {n: h.table() for n, h in self.histories.items()})
        module.watch.phases = self.stats.phases
        self.stats.phases.start()  # waiting for a tracker's server is not the run's time
        self.committed = time.perf_counter()
        self.progress.start(self.step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: TrainedModule, *args: Any) -> None:  # type: ignore[override]
        self.stats.phases.mark("data")
        if not module.watch.losses:  # not within a step's micro-batches
            self._boundary(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainedModule, *args: Any) -> None:  # type: ignore[override]
        self.stats.count_skipped(module.decoder)
        if trainer.global_step == self.step:
            return
        row = self.stats.take(module.watch, module.sharded)
        self.histories["steps"].append(**row)
        if module.watch.detailed:
            for layer_row in self.stats.layer_rows(module, row["clipped"]):
                self.histories["layers"].append(**layer_row)
            self.stats.phases.mark("diagnostics")
        # with 16-mixed the loss scaler skips a step whose gradients overflow, which is how it works
        scaled = self.cfg.trainer.precision == "16-mixed"
        self.kind = self.divergence.update(row["loss"], 0.0 if scaled else row["grad_norm"])
        if self.kind:
            self.end(trainer, module, "diverged")
        self.progress.update(self.step, row["loss"])
        self.stats.phases.mark("records")

    def on_train_end(self, trainer: pl.Trainer, module: TrainedModule) -> None:  # type: ignore[override]
        if self.outcome != "stopped":
            with module.evaluated_weights():
                self._finish(trainer, module)

    # --- the boundary between two steps ------------------------------------------------------------------------------

    def _boundary(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        if self.outcome:
            return
        measured = self.measure_if_due(trainer, module)
        overdue = time.perf_counter() - self.committed >= self.cfg.checkpoint.seconds
        # all ranks must do the same: a signal to one stops all, and one clock decides for all
        signalled, due = self.ranks.largest([self.stop.number or 0, overdue])
        if signalled:
            self.stop.number = signalled
            self.end(trainer, module, "stopped")
        if measured or signalled or due:
            self._commit(trainer, module)

    def end(self, trainer: pl.Trainer, module: TrainedModule, outcome: str) -> None:
        """Take no further step."""
        self.outcome = outcome
        module.stop_requested = trainer.should_stop = True

    # --- commit ------------------------------------------------------------------------------------------------------

    def _commit(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        """Histories, then the checkpoint that holds their lengths, then the record: a kill between any two of these
        leaves the commit before, or this one."""
        rows = self._flush()
        # torch's gathering of an optimizer's sharded state takes a step first where there is none yet, so that Adam
        # would count one too many; and at step 0 there is nothing to go on from
        if self.step or not module.sharded:
            self._set_aside("resume")
            trainer.save_checkpoint(self.folder.checkpoints / "resume.ckpt")
        self.keep_best(trainer, module)
        self.write(trainer, "running", self.lengths)
        if self.ranks.first:
            self.logger.send(rows)
        self.stats.phases.mark("records")
        self.committed = time.perf_counter()

    def _flush(self) -> dict[str, list[Mapping]]:
        """Commit the histories; gives the rows that were new."""
        self.folder.check_lease()
        rows = {name: list(history.pending) for name, history in self.histories.items()}
        self.lengths = {name: history.commit() for name, history in self.histories.items()}
        self.digests = {name: history.digest for name, history in self.histories.items()}
        return rows

    def keep_best(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        """Save the weights if they are the best so far. Only once that is committed, so that best.ckpt never belongs to
        a step that a resumed run has yet to take."""
        if self.best["step"] == self.step:
            self._set_aside("best")
            self.save_weights(trainer, module, "best")

    def _set_aside(self, name: str) -> None:
        """Keep the checkpoint before the one that is to be written."""
        if self.ranks.first:
            self.folder.set_aside(name)

    def save_weights(self, trainer: pl.Trainer, module: TrainedModule, name: str) -> None:
        """The weights to evaluate, and their step, as checkpoints/NAME.ckpt."""
        with module.evaluated_weights():
            content = {"state_dict": weights_of(module.model), "step": self.step}
        if self.ranks.first:
            self.folder.check_lease()
            trainer.strategy.checkpoint_io.save_checkpoint(content, self.folder.checkpoints / f"{name}.ckpt")

    def write(self, trainer: pl.Trainer, status: str, lengths: Mapping[str, int] | None) -> None:
        """The record as of now; `lengths` are the committed lengths of the histories, None once they are finished."""
        peak = max(self.memory.read(trainer.strategy.root_device), self.record["cost"].get("peak_memory_bytes", 0))
        cost = self.stats.cost()
        tokens_per_second = cost.pop("tokens_per_second")
        self.record |= {
            "status": status,
            "updated": time.time(),
            "progress": {"step": self.step, "steps": self.steps},
            "histories": lengths,
            "summary": self.summary(),
            "cost": {**cost, "peak_memory_bytes": peak, "tokens_per_second": tokens_per_second},
        }
        if self.ranks.first:
            self.folder.write(self.record)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        """The last measurements, the outcome, finished histories, and the record."""
        final_weights = self.measure_end(trainer, module)
        rows = self._flush()
        self.outcome = "diverged" if self.kind else "finished"
        for history in self.histories.values():
            history.finish()
        self.stats.phases.mark("records")
        self.record["proof"] |= {"data_order": self.stats.order_hash, "final_weights": final_weights}
        self.write(trainer, self.outcome, None)
        if self.ranks.first:
            self.logger.send(rows)

    def close(self) -> None:
        """Close progress bar and histories, whatever the outcome."""
        self.progress.close()
        for history in self.histories.values():
            history.close()
