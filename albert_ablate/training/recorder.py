"""Lightning callback that writes the run folder: histories, checkpoints, record, divergence and stopping.

Everything happens at the boundary between two optimizer steps, where Lightning's counters and ours agree, so that what
is committed there can be resumed exactly. A commit has four parts in a fixed order: flush and fsync the histories, put
their lengths into the checkpoint, replace the checkpoint, replace the record. Rows written after the last commit are
cut off on resume.
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
    """Writes histories, checkpoints and the record of one run; base class of the recorders of both tasks.

    A subclass measures what its task needs: `measure_if_due` at a boundary, `measure_end` after training, and `summary`
    for the record.

    outcome: None while training, then finished, diverged or stopped. stop: the signal to stop, if one has arrived.
    stats: the steps taken. best: what was measured at the best weights on validation, with their `step` (-1 before
    there is one). lengths, digests: of the committed histories. kind: of divergence, None if it has not diverged.
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
        # only rank 0 writes files; the other ranks still take part in evaluations and gathers, which need all of them
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

    # --- what a subclass measures ------------------------------------------------------------------------------------

    def measure_if_due(self, trainer: pl.Trainer, module: TrainedModule) -> bool:
        """Measure what is due at this boundary; returns whether to commit afterwards. May stop training by `end`."""
        raise NotImplementedError

    def measure_end(self, trainer: pl.Trainer, module: TrainedModule) -> str:
        """Final measurements after training; sets `kind` and returns the hash of the final weights."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """The `summary` of the record with what has been measured so far."""
        raise NotImplementedError

    # --- state in the checkpoint -------------------------------------------------------------------------------------

    SAVED = {"best": "best", "lengths": "lengths", "digests": "digests"}  # key in the checkpoint -> attribute

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: the same for every subclass, since commits.py reads it."""
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
            setattr(self, name, state.get(key, getattr(self, name)))  # checkpoints of older releases lack some
        self.divergence.initial, self.divergence.above = state["divergence"]

    # --- hooks: their order in a step is written in step_watch.py ----------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, module: TrainedModule) -> None:  # type: ignore[override]
        # rows behind the committed lengths belong to steps that will be taken again
        for name, history in self.histories.items():
            history.cut(self.lengths[name])
        if self.best["step"] == self.step:  # it may have been killed between the checkpoint and best.ckpt
            self.save_weights(trainer, module, "best")
        # Lightning has just installed its own SIGTERM handler, which would end the run without a commit
        self.stop.listen()
        if self.ranks.first:
            self.logger.open(self.folder.path, self.record, {n: h.table() for n, h in self.histories.items()})
        module.watch.phases = self.stats.phases
        self.stats.phases.start()  # only now: waiting for a tracker's server does not count as the run's time
        self.committed = time.perf_counter()
        self.progress.start(self.step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: TrainedModule, *args: Any) -> None:  # type: ignore[override]
        self.stats.phases.mark("data")
        if not module.watch.losses:  # the first micro-batch of a step: between micro-batches nothing can be resumed
            self._boundary(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainedModule, *args: Any) -> None:  # type: ignore[override]
        self.stats.count_skipped(module.decoder)
        if trainer.global_step == self.step:  # more micro-batches of this step follow
            return
        row = self.stats.count_step(module.watch, module.sharded)
        self.histories["steps"].append(**row)
        if module.watch.detailed:
            for layer_row in self.stats.layer_rows(module, row["clipped"]):
                self.histories["layers"].append(**layer_row)
            self.stats.phases.mark("diagnostics")
        # with 16-mixed an overflow of the gradients is normal: the loss scaler skips that step and lowers its scale
        scaled = self.cfg.trainer.precision == "16-mixed"
        self.kind = self.divergence.update(row["loss"], 0.0 if scaled else row["grad_norm"])
        if self.kind:
            self.end(trainer, module, "diverged")
        self.progress.update(self.step, row["loss"])
        self.stats.phases.mark("records")

    def on_train_end(self, trainer: pl.Trainer, module: TrainedModule) -> None:  # type: ignore[override]
        if self.outcome != "stopped":  # a stopped run is left as its last commit has it
            with module.evaluated_weights():
                self._finish(trainer, module)

    # --- the boundary between two steps ------------------------------------------------------------------------------

    def _boundary(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        if self.outcome:
            return
        measured = self.measure_if_due(trainer, module)
        overdue = time.perf_counter() - self.committed >= self.cfg.checkpoint.seconds
        # all ranks must decide alike, or they would wait for each other forever: a signal to one stops all, and the
        # commit is due as soon as it is on one rank's clock
        signalled, due = self.ranks.largest([self.stop.number or 0, overdue])
        if signalled:
            self.stop.number = signalled
            self.end(trainer, module, "stopped")
        if measured or signalled or due:
            self._commit(trainer, module)

    def end(self, trainer: pl.Trainer, module: TrainedModule, outcome: str) -> None:
        """Stop training before the next step, with this outcome."""
        self.outcome = outcome
        module.stop_requested = trainer.should_stop = True

    # --- commit ------------------------------------------------------------------------------------------------------

    def _commit(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        """Commit: histories, then the checkpoint with their lengths, then the record.

        A kill between any two of these leaves either the commit before or this one."""
        rows = self._flush()
        # Gathering a sharded optimizer's state before its first step makes torch take an empty one, after which Adam's
        # step count is one too high; and at step 0 there is nothing to resume.
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
        """Write and fsync the pending rows of all histories; returns these rows by history."""
        self.folder.check_lease()
        rows = {name: list(history.pending) for name, history in self.histories.items()}
        self.lengths = {name: history.commit() for name, history in self.histories.items()}
        self.digests = {name: history.digest for name, history in self.histories.items()}
        return rows

    def keep_best(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        """Save best.ckpt if the current weights are the best so far.

        Only after the commit, so that best.ckpt never belongs to a step that a resumed run has yet to take."""
        if self.best["step"] == self.step:
            self._set_aside("best")
            self.save_weights(trainer, module, "best")

    def _set_aside(self, name: str) -> None:
        """Keep the earlier checkpoint as NAME.previous.ckpt: if the new one gets damaged, the run resumes from it."""
        if self.ranks.first:
            self.folder.set_aside(name)

    def save_weights(self, trainer: pl.Trainer, module: TrainedModule, name: str) -> None:
        """Save the weights that are evaluated, with their step, as checkpoints/NAME.ckpt."""
        with module.evaluated_weights():
            content = {"state_dict": weights_of(module.model), "step": self.step}
        if self.ranks.first:
            self.folder.check_lease()
            trainer.strategy.checkpoint_io.save_checkpoint(content, self.folder.checkpoints / f"{name}.ckpt")

    def write(self, trainer: pl.Trainer, status: str, lengths: Mapping[str, int] | None) -> None:
        """Replace record.json; `lengths` are the committed lengths of the histories, None once they are finished."""
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
        """After training: final measurements, finished histories, and the record with the outcome."""
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
