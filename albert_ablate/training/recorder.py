"""The one callback: rows, evaluations, divergence, commits and stopping, all at the boundary between two steps.

At a boundary every counter of Lightning's agrees with every one of ours, so whatever is committed there can be resumed
exactly: histories are flushed and fsynced, their lengths go into the checkpoint, the checkpoint is replaced, the record
follows. What was written after the last commit is cut off on resume.
"""

import math
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pytorch_lightning as pl
import torch
from torch import Tensor

from albert_ablate.data.packed import Order, chain
from albert_ablate.model.weights import load_checkpoint, weights_hash, weights_of
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import SCHEMAS, History, NoHistory
from albert_ablate.streams import digest
from albert_ablate.training.console import Progress
from albert_ablate.training.cost import PeakMemory, Phases
from albert_ablate.training.diagnostics import noise_parts
from albert_ablate.training.divergence import Divergence, below_unigram, end_kind, midway
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.validation import Evaluator, due

NOISE_KEPT = 0.9  # of the means of the gradient noise scale's parts, at each step at which they are measured


class Recorder(pl.Callback):
    """Keeps the run folder. `outcome` is None while training, then finished, diverged or stopped."""

    def __init__(
        self,
        cfg: Mapping,
        folder: RunFolder,
        record: dict[str, Any],
        evaluator: Evaluator,
        order: Order,
        logger: Any,
        progress: Progress,
        flops: tuple[float, list[float]],
        ranks: Ranks,
    ):
        self.cfg, self.folder, self.record = cfg, folder, record
        self.evaluator, self.order, self.logger, self.progress = evaluator, order, logger, progress
        self.ranks = ranks
        self.tokens_per_step = cfg["data"]["batch"] * cfg["model"]["context"]
        whole, blocks = flops
        accumulate = cfg["data"].get("accumulate", 1)
        self.flops_per_step = whole * self.tokens_per_step  # with nothing left out
        self.flops_of_block = [flops * self.tokens_per_step / accumulate for flops in blocks]  # in a micro-batch
        self.steps = record["budget"]["steps"]
        # only the first rank writes; the others take part in what needs all
        run = record.get("identity") or ""
        self.histories = {name: History(folder.path, name, run) if ranks.first else NoHistory() for name in SCHEMAS}
        self.divergence = Divergence(self.steps)
        self.outcome: str | None = None
        self.signal: int | None = None
        self.kind: str | None = None  # of divergence
        self.below_unigram: bool | None = None  # known at the end
        self.memory = PeakMemory()
        # what a resumed run goes on from
        self.step = 0  # optimizer steps taken
        self.phases = Phases()  # over all sessions
        self.flops_left_out = 0.0  # of blocks that were skipped
        self.noise: list[float] | None = None  # means of the gradient noise scale's two parts
        self.order_hash = digest(record["data"]["fingerprint"].encode())
        self.best: dict[str, Any] = {"loss": math.inf, "step": -1}
        self.last: dict[str, dict[str, float]] = {}  # split -> its latest evaluation
        self.halfway: dict[int, float] = {}  # step -> loss of the training sample, at `midway`
        self.grad_norm: float | None = None  # of the latest step, before clipping
        self.lengths: dict[str, int] = dict.fromkeys(SCHEMAS, 0)
        self.digests: dict[str, str] = {}  # of the histories' committed bytes

    # --- state -------------------------------------------------------------------------------------------------------

    KEPT = (
        "step",
        "order_hash",
        "best",
        "last",
        "halfway",
        "grad_norm",
        "lengths",
        "flops_left_out",
        "noise",
        "digests",
    )

    def state_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in self.KEPT}
        return {
            **kept,
            "phases": dict(self.phases.seconds),
            "divergence": [self.divergence.initial, self.divergence.above],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.KEPT:
            setattr(self, name, state.get(name, getattr(self, name)))  # older checkpoints have fewer
        self.phases.seconds |= state.get("phases", {"evaluation": state.get("seconds", 0.0)})
        self.divergence.initial, self.divergence.above = state["divergence"]

    # --- hooks -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:  # type: ignore[override]
        for name, history in self.histories.items():
            history.cut(self.lengths[name])
        if self.best["step"] == self.step:  # it may have been killed between the two
            self._save_weights(trainer, module, "best")
        self.listen()  # Lightning has just put its own SIGTERM handler first, which ends a run without a commit
        if self.ranks.first:
            self.logger.open(self.folder.path, self.record, {n: h.table() for n, h in self.histories.items()})
        module.phases = self.phases
        self.phases.start()  # waiting for a tracker's server is not the run's time
        self.committed = time.perf_counter()
        self.progress.start(self.step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: LanguageModel, *args: Any) -> None:  # type: ignore[override]
        self.phases.mark("data")
        if not module.losses:  # not within a step's micro-batches
            self._boundary(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: LanguageModel, *args: Any) -> None:  # type: ignore[override]
        self._count_skipped(module)
        if trainer.global_step == self.step:
            return
        loss, norm, clipped, after, squares = torch.stack(
            [
                torch.stack(module.losses).mean(),
                module.grad_norm,
                module.clipped.to(module.grad_norm),
                module.grad_norm_clipped,
                torch.stack(module.logit_squares).mean().to(module.grad_norm),
            ]
        ).tolist()
        small = None if module.small is None else module.small.item()
        loss, squares, small = self.ranks.means([loss, squares, small or 0.0])
        module.losses.clear()
        module.logit_squares.clear()
        self.order_hash = chain(self.order_hash, self.order.indices(self.step))
        self.step += 1
        self.phases.mark("optimizer")
        self.histories["steps"].append(
            **self._axes(),
            loss=loss,
            lr=module.lr,
            grad_norm=norm,
            clipped=clipped,
            grad_norm_clipped=after,
            noise_scale=math.nan if module.small is None else self._noise_scale(module, small, norm * norm),
            logit_rms=math.sqrt(squares),
        )
        self.grad_norm = norm
        if module.watched:
            self._layers(module, clipped)
            self.phases.mark("diagnostics")
        # with 16-mixed the loss scaler skips a step whose gradients overflow, which is its working
        scaled = self.cfg["trainer"]["precision"] == "16-mixed"
        self.kind = self.divergence.update(loss, 0.0 if scaled else norm)
        if self.kind:
            self._stop(trainer, module, "diverged")
        self.progress.update(self.step, loss)
        self.phases.mark("records")

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
            known = self.last["train"] if self._evaluated() else self._measure(trainer, module, "train")
            self.halfway[self.step] = known["loss"]
        due = time.perf_counter() - self.committed >= self.cfg["checkpoint"]["seconds"]
        signalled, due = self.ranks.largest([self.signal or 0, due])
        if signalled:
            self.signal = signalled
            self._stop(trainer, module, "stopped")
        if evaluated or signalled or due:
            self._commit(trainer, module)

    def listen(self) -> dict[int, Any]:
        """Take over Ctrl-C and SIGTERM; gives the handlers before. Only the main thread can, and owns its signals."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)  # Lightning turns a KeyboardInterrupt into exit code 1
        self.signal = number

    def _stop(self, trainer: pl.Trainer, module: LanguageModel, outcome: str) -> None:
        self.outcome = outcome
        module.halt = trainer.should_stop = True

    def _evaluate_if_due(self, trainer: pl.Trainer, module: LanguageModel) -> bool:
        """An evaluation before the first step, and where `due` says."""
        every = self.cfg["evaluation"]["every"]
        if self._evaluated() or self.step and not due(self.step, self.steps, self.tokens_per_step, every):
            return False
        self._evaluate(trainer, module)
        return True

    def _evaluated(self) -> bool:
        return bool(self.last) and self.last["validation"]["step"] == self.step

    def _evaluate(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        for split in ("validation", "train"):
            self._evaluate_split(trainer, module, split, self.step, self.order_hash)
        loss = self.last["validation"]["loss"]
        if self.step == 0:
            self.divergence.initial = loss
        if loss < self.best["loss"]:
            self.best = {"loss": loss, "step": self.step, "data_order": self.order_hash, "flops": self.flops}

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

    def _evaluate_split(
        self,
        trainer: pl.Trainer,
        module: LanguageModel,
        split: str,
        step: int,
        data_order: str,
        flops: float | None = None,
    ) -> None:
        result = self._measure(trainer, module, split)
        self.last[split] = {**result, "step": step}
        self.histories["evals"].append(**self._axes(step, flops), split=split, data_order=data_order, **result)

    def _measure(self, trainer: pl.Trainer, module: LanguageModel, split: str) -> dict[str, float]:
        self.phases.mark("records")
        with module.evaluated_weights():
            result = self.evaluator.evaluate(module.model, split, trainer.precision_plugin.forward_context())
        self.phases.mark("evaluation")
        return result

    def _layers(self, module: LanguageModel, clipped: float) -> None:
        """The rows of a watched step; the first one's are those of step 0 too, as it begins at the initial weights."""
        assert module.weights is not None
        factor = None if module.clip.common is None else float(module.clip.common)
        inside, weights = module.probe.figures(), module.weights.figures(clipped, factor)
        columns = [f.name for f in SCHEMAS["layers"] if pa.types.is_floating(f.type)]
        logged = module.every and self.step % module.every == 0
        for step in [0] * (self.step == 1) + [self.step] * bool(logged):
            axes = self._axes(step, None if step else 0.0)
            for layer, block in enumerate(module.model.stack):
                for sublayer in ("attention", "mlp"):
                    found = weights.get((layer, sublayer), {}) | inside.get((layer, sublayer), {})
                    found["dropout"] = block.rate_now(sublayer)
                    if step == 0:
                        found["update_ratio"] = math.nan
                    figures = {name: found.get(name, math.nan) for name in columns if name not in axes}
                    self.histories["layers"].append(**axes, layer=layer, sublayer=sublayer, **figures)

    def _noise_scale(self, module: LanguageModel, small: float, large: float) -> float:
        """The gradient noise scale in tokens, from means over the steps so far that forget by a tenth a step."""
        ranks = 1 if module.sharded else self.ranks.size  # shards hold sums over the ranks already
        parts = noise_parts(small, large, module.part * self.tokens_per_step / ranks, self.tokens_per_step)
        if all(map(math.isfinite, parts)):
            before = self.noise or list(parts)
            self.noise = [NOISE_KEPT * mean + (1 - NOISE_KEPT) * part for mean, part in zip(before, parts, strict=True)]
        if self.noise is None or self.noise[1] <= 0:
            return math.nan
        return self.noise[0] / self.noise[1]

    def _count_skipped(self, module: LanguageModel) -> None:
        """Operations of the blocks that dropout has left out of this micro-batch."""
        for block, flops in zip(module.model.stack, self.flops_of_block, strict=True):
            if block.skip.rate and block.skip.skips():
                self.flops_left_out += flops

    @property
    def flops(self) -> float:
        """Of training so far."""
        return self.step * self.flops_per_step - self.flops_left_out

    @property
    def seconds(self) -> float:
        """Of training, evaluation and records, over all sessions."""
        return self.phases.total

    def _axes(self, step: int | None = None, flops: float | None = None) -> dict[str, float]:
        step = self.step if step is None else step
        return {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "seconds": self.seconds,
            "flops": self.flops if flops is None else flops,
        }

    def tokens_per_second(self) -> float | None:
        seconds = self.phases.training
        return self.step * self.tokens_per_step / seconds if seconds else None

    def _commit(self, trainer: pl.Trainer, module: LanguageModel) -> None:
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
        self.phases.mark("records")
        self.committed = time.perf_counter()

    def _flush(self) -> dict[str, list[Mapping]]:
        """Commit the histories; gives the rows that were new."""
        self.folder.check_lease()
        rows = {name: list(history.pending) for name, history in self.histories.items()}
        self.lengths = {name: history.commit() for name, history in self.histories.items()}
        self.digests = {name: history.digest for name, history in self.histories.items()}
        return rows

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if not self._evaluated():
            self._evaluate(trainer, module)
        self._keep_best(trainer, module)
        self._save_weights(trainer, module, "last")
        final_weights = weights_hash(module.model)
        self._evaluate_split(trainer, module, "test", self.step, self.order_hash)
        self.last["test_last"] = self.last["test"]
        if 0 <= self.best["step"] < self.step:
            self.ranks.wait()  # for the first one to have written it
            best = load_checkpoint(self.folder.checkpoints / "best.ckpt", self.record.get("identity"))
            _load(module, best["state_dict"])
            at = self.best["step"], self.best["data_order"]
            self._evaluate_split(trainer, module, "test", *at, self.best.get("flops"))
        rows = self._flush()
        ends = self.last["train"]["loss"], self.last["validation"]["loss"], self.evaluator.packed.unigram
        self.kind = self.kind or end_kind([self.halfway[step] for step in sorted(self.halfway)], *ends)
        self.below_unigram = below_unigram(*ends)
        self.outcome = "diverged" if self.kind else "finished"
        for history in self.histories.values():
            history.finish()
        self.phases.mark("records")
        self.record["proof"] |= {"data_order": self.order_hash, "final_weights": final_weights}
        self._write(trainer, self.outcome, None)
        if self.ranks.first:
            self.logger.send(rows)

    def _save_weights(self, trainer: pl.Trainer, module: LanguageModel, name: str) -> None:
        with module.evaluated_weights():
            content = {"state_dict": weights_of(module.model), "step": self.step}
        if self.ranks.first:
            self.folder.check_lease()
            trainer.strategy.checkpoint_io.save_checkpoint(content, self.folder.checkpoints / f"{name}.ckpt")

    def _write(self, trainer: pl.Trainer, status: str, lengths: Mapping[str, int] | None) -> None:
        """The record as of now; `lengths` are the committed lengths of the histories, None once they are finished."""
        peak = max(self.memory.read(trainer.strategy.root_device), self.record["cost"].get("peak_memory_bytes", 0))
        self.record |= {
            "status": status,
            "updated": time.time(),
            "progress": {"step": self.step, "steps": self.steps},
            "histories": lengths,
            "summary": self.summary(),
            "cost": {
                "seconds": self.seconds,
                "training_seconds": self.phases.training,
                "phases": dict(self.phases.seconds),
                "flops": self.flops,
                "peak_memory_bytes": peak,
                "tokens_per_second": self.tokens_per_second(),
            },
        }
        if self.ranks.first:
            self.folder.write(self.record)

    def summary(self) -> dict[str, Any]:
        """The figures of the run so far. Losses in nats per token; train_loss is measured in evaluation mode."""
        train, validation = self.last.get("train", {}), self.last.get("validation", {})
        best, test, test_last = self.best, self.last.get("test", {}), self.last.get("test_last", {})
        return {
            "train_loss": train.get("loss"),
            "val_loss": validation.get("loss"),
            "val_bits_per_byte": validation.get("bits_per_byte"),
            "val_perplexity": validation.get("perplexity"),
            "val_accuracy": validation.get("accuracy"),
            "gap": validation["loss"] - train["loss"] if train and validation else None,
            "best_val_loss": best["loss"],
            "best_tokens": best["step"] * self.tokens_per_step if best["step"] >= 0 else None,
            "test_loss": test.get("loss"),  # at the weights that were best on validation
            "test_bits_per_byte": test.get("bits_per_byte"),
            "test_loss_last": test_last.get("loss"),
            "initial_loss": self.divergence.initial,
            "unigram_loss": self.evaluator.packed.unigram,
            "below_unigram": self.below_unigram,
            "excess_loss": self._excess(validation.get("loss")),  # over the entropy rate, where that is known
            "grad_norm": self.grad_norm,
            "tokens": self.step * self.tokens_per_step,
            "steps": self.step,
            "passes": self.step * self.order.batch / self.order.blocks,
            "divergence": self.kind,
            "parameters": self.record["model"]["parameters"],
            "mean_dropout": self.record["model"]["mean_dropout"],
        }

    def _excess(self, loss: float | None) -> float | None:
        rate = self.record["data"].get("entropy_rate")
        if rate is None or loss is None or not self.evaluator.packed.reversible:
            return None
        return loss - rate * self.evaluator.bytes_per_token["validation"]

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
