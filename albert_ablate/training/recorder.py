"""The one callback: evaluations, divergence, commits and stopping, all at the boundary between two steps.

At a boundary every counter of Lightning's agrees with every one of ours, so whatever is committed there can be resumed
exactly: histories are flushed and fsynced, their lengths go into the checkpoint, the checkpoint is replaced, the record
follows. What was written after the last commit is cut off on resume.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from albert_ablate.config import Config
from albert_ablate.data.packed import Order
from albert_ablate.model.weights import load_checkpoint, weights_hash, weights_of
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import SCHEMAS, History, NoHistory
from albert_ablate.records.signals import StopSignal
from albert_ablate.training.console import Progress
from albert_ablate.training.cost import PeakMemory
from albert_ablate.training.divergence import Divergence, below_unigram, end_kind, midway
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.step_stats import StepStats
from albert_ablate.training.summary import summary
from albert_ablate.training.validation import Evaluator, due


class Recorder(pl.Callback):
    """Keeps the run folder. `outcome` is None while training, then finished, diverged or stopped.

    stop: the signal to stop, if one has come. stats: the steps taken. best: loss, step, order of data and operations at
    the best validation loss. latest: the latest evaluation of each split. halfway: losses of the training sample at
    `midway`, by step. lengths, digests: of the committed histories.
    """

    def __init__(
        self,
        cfg: Config,
        folder: RunFolder,
        record: dict[str, Any],
        evaluator: Evaluator,
        order: Order,
        logger: Any,
        progress: Progress,
        flops: tuple[float, list[float]],
        ranks: Ranks,
        stop: StopSignal,
    ):
        self.cfg, self.folder, self.record = cfg, folder, record
        self.evaluator, self.order, self.logger, self.progress = evaluator, order, logger, progress
        self.ranks, self.stop = ranks, stop
        self.steps = record["budget"]["steps"]
        tokens_per_step = cfg.data.batch * cfg.model.context
        accumulate = cfg.data.accumulate
        self.stats = StepStats(order, record["data"]["fingerprint"], tokens_per_step, flops, accumulate, ranks)
        # only rank 0 writes; the others take part in what needs all
        run = record.get("identity") or ""
        self.histories = {name: History(folder.path, name, run) if ranks.first else NoHistory() for name in SCHEMAS}
        self.divergence = Divergence(self.steps)
        self.outcome: str | None = None
        self.kind: str | None = None  # of divergence
        self.below_unigram: bool | None = None  # known at the end
        self.memory = PeakMemory()
        self.best: dict[str, Any] = {"loss": math.inf, "step": -1}
        self.latest: dict[str, dict[str, float]] = {}
        self.halfway: dict[int, float] = {}
        self.lengths: dict[str, int] = dict.fromkeys(SCHEMAS, 0)
        self.digests: dict[str, str] = {}

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.stats.step

    # --- state in the checkpoint -------------------------------------------------------------------------------------

    SAVED = {"best": "best", "last": "latest", "halfway": "halfway", "lengths": "lengths", "digests": "digests"}

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

    def on_train_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:  # type: ignore[override]
        for name, history in self.histories.items():
            history.cut(self.lengths[name])
        if self.best["step"] == self.step:  # it may have been killed between the two
            self._save_weights(trainer, module, "best")
        self.stop.listen()  # Lightning has just put its own SIGTERM handler first, which ends a run without a commit
        if self.ranks.first:
            self.logger.open(self.folder.path, self.record, {n: h.table() for n, h in self.histories.items()})
        module.watch.phases = self.stats.phases
        self.stats.phases.start()  # waiting for a tracker's server is not the run's time
        self.committed = time.perf_counter()
        self.progress.start(self.step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: LanguageModel, *args: Any) -> None:  # type: ignore[override]
        self.stats.phases.mark("data")
        if not module.watch.losses:  # not within a step's micro-batches
            self._boundary(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: LanguageModel, *args: Any) -> None:  # type: ignore[override]
        self.stats.count_skipped(module.model)
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
            self._end(trainer, module, "diverged")
        self.progress.update(self.step, row["loss"])
        self.stats.phases.mark("records")

    def on_train_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:  # type: ignore[override]
        if self.outcome != "stopped":
            with module.evaluated_weights():
                self._finish(trainer, module)

    # --- the boundary between two steps ------------------------------------------------------------------------------

    def _boundary(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if self.outcome:
            return
        evaluated = self._evaluate_if_due(trainer, module)
        if self.step in midway(self.steps):
            train = self.latest["train"] if self._is_evaluated() else self._measure(trainer, module, "train")
            self.halfway[self.step] = train["loss"]
        overdue = time.perf_counter() - self.committed >= self.cfg.checkpoint.seconds
        # all ranks must do the same: a signal to one stops all, and one clock decides for all
        signalled, due = self.ranks.largest([self.stop.number or 0, overdue])
        if signalled:
            self.stop.number = signalled
            self._end(trainer, module, "stopped")
        if evaluated or signalled or due:
            self._commit(trainer, module)

    def _end(self, trainer: pl.Trainer, module: LanguageModel, outcome: str) -> None:
        """Take no further step."""
        self.outcome = outcome
        module.stop_requested = trainer.should_stop = True

    def _evaluate_if_due(self, trainer: pl.Trainer, module: LanguageModel) -> bool:
        """Evaluate before the first step, and where `due` says."""
        every = self.cfg.evaluation.every
        if self._is_evaluated() or self.step and not due(self.step, self.steps, self.stats.tokens_per_step, every):
            return False
        self._evaluate(trainer, module)
        return True

    def _is_evaluated(self) -> bool:
        return bool(self.latest) and self.latest["validation"]["step"] == self.step

    def _evaluate(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        order_hash = self.stats.order_hash
        for split in ("validation", "train"):
            self._evaluate_split(trainer, module, split, self.step, order_hash)
        loss = self.latest["validation"]["loss"]
        if self.step == 0:
            self.divergence.initial = loss
        if loss < self.best["loss"]:
            self.best = {"loss": loss, "step": self.step, "data_order": order_hash, "flops": self.stats.flops}

    def _evaluate_split(
        self,
        trainer: pl.Trainer,
        module: LanguageModel,
        split: str,
        step: int,
        data_order: str,
        flops: float | None = None,
    ) -> None:
        """Evaluate the weights of `step`, and add the row to the history."""
        result = self._measure(trainer, module, split)
        self.latest[split] = {**result, "step": step}
        self.histories["evals"].append(**self.stats.axes(step, flops), split=split, data_order=data_order, **result)

    def _measure(self, trainer: pl.Trainer, module: LanguageModel, split: str) -> dict[str, float]:
        self.stats.phases.mark("records")
        with module.evaluated_weights():
            result = self.evaluator.evaluate(module.model, split, trainer.precision_plugin.forward_context())
        self.stats.phases.mark("evaluation")
        return result

    # --- commit ------------------------------------------------------------------------------------------------------

    def _commit(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Histories, then the checkpoint that holds their lengths, then the record: a kill between any two of these
        leaves the commit before, or this one."""
        rows = self._flush()
        # torch's gathering of an optimizer's sharded state takes a step first where there is none yet, so that Adam
        # would count one too many; and at step 0 there is nothing to go on from
        if self.step or not module.sharded:
            self._set_aside("resume")
            trainer.save_checkpoint(self.folder.checkpoints / "resume.ckpt")
        self._keep_best(trainer, module)
        self._write(trainer, "running", self.lengths)
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

    def _keep_best(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Save the weights if they are the best so far. Only once that is committed, so that best.ckpt never belongs to
        a step that a resumed run has yet to take."""
        if self.best["step"] == self.step:
            self._set_aside("best")
            self._save_weights(trainer, module, "best")

    def _set_aside(self, name: str) -> None:
        """Keep the checkpoint before the one that is to be written."""
        if self.ranks.first:
            self.folder.set_aside(name)

    def _save_weights(self, trainer: pl.Trainer, module: LanguageModel, name: str) -> None:
        with module.evaluated_weights():
            content = {"state_dict": weights_of(module.model), "step": self.step}
        if self.ranks.first:
            self.folder.check_lease()
            trainer.strategy.checkpoint_io.save_checkpoint(content, self.folder.checkpoints / f"{name}.ckpt")

    def _write(self, trainer: pl.Trainer, status: str, lengths: Mapping[str, int] | None) -> None:
        """The record as of now; `lengths` are the committed lengths of the histories, None once they are finished."""
        peak = max(self.memory.read(trainer.strategy.root_device), self.record["cost"].get("peak_memory_bytes", 0))
        cost = self.stats.cost()
        rate = cost.pop("tokens_per_second")
        self.record |= {
            "status": status,
            "updated": time.time(),
            "progress": {"step": self.step, "steps": self.steps},
            "histories": lengths,
            "summary": self._summary(),
            "cost": {**cost, "peak_memory_bytes": peak, "tokens_per_second": rate},
        }
        if self.ranks.first:
            self.folder.write(self.record)

    def _summary(self) -> dict[str, Any]:
        entropy_rate = self.record["data"].get("entropy_rate")  # nats per byte
        if entropy_rate is not None:
            reversible = self.evaluator.packed.reversible  # else bytes cannot be counted
            entropy_rate = entropy_rate * self.evaluator.bytes_per_token["validation"] if reversible else None
        return summary(
            self.latest,
            self.best,
            self.step,
            self.stats.tokens_per_step,
            passes=self.step * self.order.batch / self.order.blocks,
            initial_loss=self.divergence.initial,
            unigram_loss=self.evaluator.packed.unigram,
            below_unigram=self.below_unigram,
            entropy=entropy_rate,
            grad_norm=self.stats.grad_norm,
            divergence=self.kind,
            model=self.record["model"],
        )

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Last evaluations, the test at the last and at the best weights, the verdict on divergence, the record."""
        if not self._is_evaluated():
            self._evaluate(trainer, module)
        self._keep_best(trainer, module)
        self._save_weights(trainer, module, "last")
        final_weights, order_hash = weights_hash(module.model), self.stats.order_hash
        self._evaluate_split(trainer, module, "test", self.step, order_hash)
        self.latest["test_last"] = self.latest["test"]
        if 0 <= self.best["step"] < self.step:
            self.ranks.wait()  # for rank 0 to have written it
            best = load_checkpoint(self.folder.checkpoints / "best.ckpt", self.record.get("identity"))
            _load(module, best["state_dict"])
            at = self.best["step"], self.best["data_order"]
            self._evaluate_split(trainer, module, "test", *at, self.best.get("flops"))
        rows = self._flush()
        ends = self.latest["train"]["loss"], self.latest["validation"]["loss"], self.evaluator.packed.unigram
        self.kind = self.kind or end_kind([self.halfway[step] for step in sorted(self.halfway)], *ends)
        self.below_unigram = below_unigram(*ends)
        self.outcome = "diverged" if self.kind else "finished"
        for history in self.histories.values():
            history.finish()
        self.stats.phases.mark("records")
        self.record["proof"] |= {"data_order": order_hash, "final_weights": final_weights}
        self._write(trainer, self.outcome, None)
        if self.ranks.first:
            self.logger.send(rows)

    def close(self) -> None:
        self.progress.close()
        for history in self.histories.values():
            history.close()


def _load(module: LanguageModel, weights: dict[str, Tensor]) -> None:
    if not module.sharded:
        module.model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module.model, dict[str, Any](weights), options=StateDictOptions(full_state_dict=True))
