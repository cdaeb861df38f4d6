"""Recorder of language modeling: losses on fixed samples of each split, best weights, and whether the run got stuck."""

import math
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from albert_ablate.model.weights import load_checkpoint, weights_hash
from albert_ablate.training.divergence import below_unigram, end_kind, midway
from albert_ablate.training.recorder import Recorder
from albert_ablate.training.summary import summary
from albert_ablate.training.trained_module import TrainedModule
from albert_ablate.training.validation import Evaluator, due


class LanguageRecorder(Recorder):
    """Writes the run folder of a language model.

    best: loss, step, order of data and operations at the best validation loss. latest: the latest evaluation of each
    split. halfway: losses of the training sample at `midway`, by step. below_unigram: known at the end.
    """

    SAVED = {**Recorder.SAVED, "last": "latest", "halfway": "halfway"}

    def __init__(self, evaluator: Evaluator, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self.best = {"loss": math.inf, "step": -1}
        self.latest: dict[str, dict[str, float]] = {}
        self.halfway: dict[int, float] = {}
        self.below_unigram: bool | None = None

    def measure_if_due(self, trainer: pl.Trainer, module: TrainedModule) -> bool:
        """Evaluate before the first step, and where `due` says; the training sample at `midway`, too."""
        evaluated = self._is_evaluation_due()
        if evaluated:
            self._evaluate(trainer, module)
        if self.step in midway(self.steps):
            train = self.latest["train"] if self._is_evaluated() else self._measure(trainer, module, "train")
            self.halfway[self.step] = train["loss"]
        return evaluated

    def _is_evaluation_due(self) -> bool:
        every = self.cfg.evaluation.every
        is_due = self.step == 0 or due(self.step, self.steps, self.stats.tokens_per_step, every)
        return is_due and not self._is_evaluated()

    def _is_evaluated(self) -> bool:
        return bool(self.latest) and self.latest["validation"]["step"] == self.step

    def _evaluate(self, trainer: pl.Trainer, module: TrainedModule) -> None:
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
        module: TrainedModule,
        split: str,
        step: int,
        data_order: str,
        flops: float | None = None,
    ) -> None:
        """Evaluate the weights of `step`, and add the row to the history."""
        result = self._measure(trainer, module, split)
        self.latest[split] = {**result, "step": step}
        self.histories["evals"].append(**self.stats.axes(step, flops), split=split, data_order=data_order, **result)

    def _measure(self, trainer: pl.Trainer, module: TrainedModule, split: str) -> dict[str, float]:
        self.stats.phases.mark("records")
        with module.evaluated_weights():
            result = self.evaluator.evaluate(module.model, split, trainer.precision_plugin.forward_context())
        self.stats.phases.mark("evaluation")
        return result

    def measure_end(self, trainer: pl.Trainer, module: TrainedModule) -> str:
        """Evaluate the last weights, test the last and the best ones, and decide whether the run is stuck."""
        if not self._is_evaluated():
            self._evaluate(trainer, module)
        self.keep_best(trainer, module)
        self.save_weights(trainer, module, "last")
        final_weights = weights_hash(module.model)
        self._evaluate_split(trainer, module, "test", self.step, self.stats.order_hash)
        self.latest["test_last"] = self.latest["test"]
        if 0 <= self.best["step"] < self.step:
            self.ranks.wait()  # for rank 0 to have written it
            best = load_checkpoint(self.folder.checkpoints / "best.ckpt", self.record.get("identity"))
            _load(module, best["state_dict"])
            at = self.best["step"], self.best["data_order"]
            self._evaluate_split(trainer, module, "test", *at, self.best.get("flops"))
        ends = self.latest["train"]["loss"], self.latest["validation"]["loss"], self.evaluator.packed.unigram
        self.kind = self.kind or end_kind([self.halfway[step] for step in sorted(self.halfway)], *ends)
        self.below_unigram = below_unigram(*ends)
        return final_weights

    def summary(self) -> dict[str, Any]:
        """Losses in nats per token (training/summary.py)."""
        entropy_rate = self.record["data"].get("entropy_rate")  # nats per byte
        if entropy_rate is not None:
            reversible = self.evaluator.packed.reversible  # else bytes cannot be counted
            entropy_rate = entropy_rate * self.evaluator.bytes_per_token["validation"] if reversible else None
        order = self.stats.order
        return summary(
            self.latest,
            self.best,
            self.step,
            self.stats.tokens_per_step,
            passes=self.step * order.batch / order.blocks,
            initial_loss=self.divergence.initial,
            unigram_loss=self.evaluator.packed.unigram,
            below_unigram=self.below_unigram,
            entropy=entropy_rate,
            grad_norm=self.stats.grad_norm,
            divergence=self.kind,
            model=self.record["model"],
        )


def _load(module: TrainedModule, weights: dict[str, Tensor]) -> None:
    if not module.sharded:
        module.model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module.model, dict[str, Any](weights), options=StateDictOptions(full_state_dict=True))
