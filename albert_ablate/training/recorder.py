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

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from albert_ablate.data.packed import Order, chain
from albert_ablate.optim.clipping import tensor_norms
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import SCHEMAS, History, NoHistory
from albert_ablate.streams import digest
from albert_ablate.training.checkpoint import load_checkpoint
from albert_ablate.training.console import Progress
from albert_ablate.training.cost import PeakMemory
from albert_ablate.training.divergence import Divergence, end_kind
from albert_ablate.training.evaluation import Evaluator
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.ranks import Ranks


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
        flops_per_step: float,
        ranks: Ranks,
    ):
        self.cfg, self.folder, self.record = cfg, folder, record
        self.evaluator, self.order, self.logger, self.progress = evaluator, order, logger, progress
        self.flops_per_step, self.ranks = flops_per_step, ranks
        self.tokens_per_step = cfg["data"]["batch"] * cfg["model"]["context"]
        self.steps = record["budget"]["steps"]
        # only the first rank writes; the others take part in what needs all
        self.histories = {name: History(folder.path, name) if ranks.first else NoHistory() for name in SCHEMAS}
        self.divergence = Divergence(self.steps)
        self.outcome: str | None = None
        self.signal: int | None = None
        self.kind: str | None = None  # of divergence
        self.memory = PeakMemory()
        # what a resumed run goes on from
        self.step = 0  # optimizer steps taken
        self.seconds = 0.0  # of training and evaluation, over all sessions
        self.training_seconds = 0.0
        self.order_hash = digest(record["data"]["fingerprint"].encode())
        self.best: dict[str, Any] = {"loss": math.inf, "step": -1}
        self.last: dict[str, dict[str, float]] = {}  # split -> its latest evaluation
        self.grad_norm: float | None = None  # of the latest step, before clipping
        self.lengths: dict[str, int] = dict.fromkeys(SCHEMAS, 0)

    # --- state -------------------------------------------------------------------------------------------------------

    KEPT = ("step", "seconds", "training_seconds", "order_hash", "best", "last", "grad_norm", "lengths")

    def state_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in self.KEPT}
        return {**kept, "divergence": [self.divergence.initial, self.divergence.above]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.KEPT:
            setattr(self, name, state[name])
        self.divergence.initial, self.divergence.above = state["divergence"]

    # --- hooks -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:  # type: ignore[override]
        for name, history in self.histories.items():
            history.cut(self.lengths[name])
        self._keep_best(trainer, module)
        self.listen()  # Lightning has just put its own SIGTERM handler first, which ends a run without a commit
        if self.ranks.first:
            self.logger.open(self.folder.path, self.record, {n: h.table() for n, h in self.histories.items()})
        self.committed = self.mark = time.perf_counter()  # waiting for a tracker's server is not the run's time
        self.progress.start(self.step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: LanguageModel, *args: Any) -> None:  # type: ignore[override]
        if not module.losses:  # not within a step's micro-batches
            self._boundary(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: LanguageModel, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.step:
            return
        loss, norm, clipped = torch.stack(
            [torch.stack(module.losses).mean(), module.grad_norm, module.clipped.to(module.grad_norm)]
        ).tolist()
        loss = self.ranks.mean(loss)
        module.losses.clear()
        self.order_hash = chain(self.order_hash, self.order.indices(self.step))
        self.step += 1
        self._clock(training=True)
        self.histories["steps"].append(**self._axes(), loss=loss, lr=module.lr, grad_norm=norm, clipped=clipped)
        self.grad_norm = norm
        every = self.cfg["diagnostics"]["every"]
        if every and (self.step % every == 0 or self.step == 1):
            self._layers(module)
        # with 16-mixed the loss scaler skips a step whose gradients overflow, which is its working
        scaled = self.cfg["trainer"]["precision"] == "16-mixed"
        self.kind = self.divergence.update(loss, 0.0 if scaled else norm)
        if self.kind:
            self._stop(trainer, module, "diverged")
        self.progress.update(self.step, loss)

    def on_train_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:  # type: ignore[override]
        if self.outcome != "stopped":
            with module.evaluated_weights():
                self._finish(trainer, module)

    # --- the boundary between two steps ------------------------------------------------------------------------------

    def _boundary(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if self.outcome:
            return
        evaluated = self._evaluate_if_due(trainer, module)
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
        """An evaluation before the first step, and where the tokens so far pass a multiple of evaluation.every."""
        if self._evaluated() or self.step and not self._passes(self.cfg["evaluation"]["every"]):
            return False
        self._evaluate(trainer, module)
        return True

    def _evaluated(self) -> bool:
        return bool(self.last) and self.last["validation"]["step"] == self.step

    def _passes(self, every: int) -> bool:
        tokens = self.step * self.tokens_per_step
        return tokens // every > (tokens - self.tokens_per_step) // every

    def _evaluate(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        for split in ("validation", "train"):
            self._evaluate_split(trainer, module, split, self.step, self.order_hash)
        loss = self.last["validation"]["loss"]
        if self.step == 0:
            self.divergence.initial = loss
        if loss < self.best["loss"]:
            self.best = {"loss": loss, "step": self.step, "data_order": self.order_hash}

    def _keep_best(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Save the weights if they are the best so far. Only once that is committed, so that best.ckpt never belongs to
        a step that a resumed run has yet to take."""
        if self.best["step"] == self.step:
            self._save_weights(trainer, module, "best")

    def _evaluate_split(
        self, trainer: pl.Trainer, module: LanguageModel, split: str, step: int, data_order: str
    ) -> None:
        self._clock()
        with module.evaluated_weights():
            result = self.evaluator.evaluate(module.model, split, trainer.precision_plugin.forward_context())
        self._clock()
        self.last[split] = {**result, "step": step}
        self.histories["evals"].append(**self._axes(step), split=split, data_order=data_order, **result)

    def _layers(self, module: LanguageModel) -> None:
        """A row per block: norms over its parameters, of the gradient before clipping and of the weights."""
        blocks: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for (name, p), norm in zip(module.graded, module.grad_norms, strict=True):
            if name.startswith("blocks."):
                blocks.setdefault(int(name.split(".")[1]), []).append((norm, p.detach()))
        for layer, pairs in blocks.items():
            norms, weights = zip(*pairs, strict=True)
            both = torch.stack([torch.stack(norms), torch.stack(tensor_norms(list(weights)))])
            grad_norm, weight_norm = torch.linalg.vector_norm(both, dim=1).tolist()
            rate = module.model.blocks[layer].rate_now
            self.histories["layers"].append(
                **self._axes(), layer=layer, grad_norm=grad_norm, weight_norm=weight_norm, dropout=rate
            )

    def _axes(self, step: int | None = None) -> dict[str, float]:
        step = self.step if step is None else step
        return {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "seconds": self.seconds,
            "flops": step * self.flops_per_step,
        }

    def _clock(self, training: bool = False) -> None:
        """Add the time since the last mark to the run's, and to that of training alone."""
        now = time.perf_counter()
        self.seconds += now - self.mark
        if training:
            self.training_seconds += now - self.mark
        self.mark = now

    def tokens_per_second(self) -> float | None:
        return self.step * self.tokens_per_step / self.training_seconds if self.training_seconds else None

    def _commit(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        rows = self._flush()
        # torch's gathering of an optimizer's sharded state takes a step first where there is none yet, so that Adam
        # would count one too many; and at step 0 there is nothing to go on from
        if self.step or not module.sharded:
            trainer.save_checkpoint(self.folder.checkpoints / "resume.ckpt")
        self._keep_best(trainer, module)
        self._write(trainer, "running", self.lengths)
        if self.ranks.first:
            self.logger.send(rows)
        self._clock()
        self.committed = time.perf_counter()

    def _flush(self) -> dict[str, list[Mapping]]:
        """Commit the histories; gives the rows that were new."""
        self.folder.check_lease()
        rows = {name: list(history.pending) for name, history in self.histories.items()}
        self.lengths = {name: history.commit() for name, history in self.histories.items()}
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
            _load(module, load_checkpoint(self.folder.checkpoints / "best.ckpt")["state_dict"])
            self._evaluate_split(trainer, module, "test", self.best["step"], self.best["data_order"])
        self.kind = self.kind or end_kind(self.last["validation"]["loss"], self.evaluator.packed.unigram)
        self.outcome = "diverged" if self.kind else "finished"
        rows = self._flush()
        for history in self.histories.values():
            history.finish()
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
                "training_seconds": self.training_seconds,
                "flops": self.flops_per_step * self.step,
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
        if rate is None or loss is None:
            return None
        return loss - rate * self.evaluator.packed.bytes_per_token["validation"]

    def close(self) -> None:
        self.progress.close()
        for history in self.histories.values():
            history.close()


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights, whole where ranks hold shards of them: then all ranks must ask."""
    return {name: _whole(value) for name, value in model.state_dict().items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _load(module: LanguageModel, weights: dict[str, Tensor]) -> None:
    if not module.sharded:
        module.model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module.model, dict[str, Any](weights), options=StateDictOptions(full_state_dict=True))


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of all parameters and buffers (running statistics), each in the order of their names."""
    named = [*sorted(model.named_parameters()), *sorted(model.named_buffers())]
    values = (_whole(p.detach()).cpu().reshape(-1) for _, p in named)
    return digest(*(v.view(torch.uint8).numpy().tobytes() for v in values))
