"""Recorder of text classification: linear probe, macro-F1 on validation and test documents, baselines."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from albert_ablate.data.tasks import Labelled
from albert_ablate.model.weights import load_checkpoint, weights_hash
from albert_ablate.training.baselines import baselines, probe_scores, scores
from albert_ablate.training.classifier import Classifier, Documents
from albert_ablate.training.recorder import Recorder
from albert_ablate.training.trained_module import TrainedModule

BATCH_TOKENS, LEAST_BATCH = 2048, 16  # of an evaluation, whose results depend on nothing but weights and documents
NO_SCORES = {"loss": math.nan, "macro_f1": math.nan, "accuracy": math.nan}


class ClassificationRecorder(Recorder):
    """Writes the run folder of a classification run. Losses are in nats per document.

    Diverged means not finite: the trunk's features, a step or the logits. Unlike in language modeling a loss above that
    of the first step does not count: a batch of 16 documents is too noisy for it, and such a run still has a macro-F1
    that says so, about that of always predicting the commonest class.

    labelled: the documents as text. documents: as tokens, by split. best: scores on validation, step, order of data and
    operations at the best macro-F1. probe: scores of the linear probe, None before it is fitted.
    """

    SAVED = {**Recorder.SAVED, "probe": "probe", "evaluated": "evaluated"}

    def __init__(self, labelled: Labelled, documents: Mapping[str, Documents], *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.labelled, self.documents, self.task = labelled, documents, self.cfg.task
        self.classes = len(labelled.classes)
        self.due = {round(self.steps * (k + 1) / self.task.evaluations) for k in range(self.task.evaluations)}
        self.probe: dict[str, float] | None = None
        self.evaluated = -1  # the step of the latest evaluation
        self.test: dict[str, float] = {}
        self.baselines: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: TrainedModule) -> None:  # type: ignore[override]
        super().on_train_start(trainer, module)
        self.write(trainer, "running", self.lengths)  # the probe may take minutes before the first commit

    def measure_if_due(self, trainer: pl.Trainer, module: TrainedModule) -> bool:
        """The probe of the frozen trunk before the first step, then `task.evaluations` evaluations."""
        is_first = self.probe is None
        if self.probe is None:
            self.probe = {} if self.task.mode == "finetune" else self._fit_probe(module.model)
        if not all(map(math.isfinite, self.probe.values())):
            self.kind = "non_finite"
            self.end(trainer, module, "diverged")
        elif not self.steps:
            self.end(trainer, module, "finished")
        return self._validate_if_due(module.model) or is_first

    def _validate_if_due(self, model: Any) -> bool:
        if not self.step or self.step not in self.due or self.step == self.evaluated:
            return False
        order_hash, flops = self.stats.order_hash, self.stats.flops
        result = self._evaluate(model, "validation", self.step, order_hash, flops)
        self.evaluated = self.step
        if result["macro_f1"] > self.best.get("macro_f1", -1.0):
            self.best = {**result, "step": self.step, "data_order": order_hash, "flops": flops}
        return True

    def measure_end(self, trainer: pl.Trainer, module: TrainedModule) -> str:
        """The test at the weights that were best on validation, which are the final ones, and the baselines."""
        if self.steps and not self.kind:
            self._validate_if_due(module.model)
            self.keep_best(trainer, module)
            if self.best["step"] < 0:
                self.kind = "non_finite"
            else:
                self._test(module.model)
        self.baselines = baselines(self.labelled, {split: d.read for split, d in self.documents.items()})
        return weights_hash(module.model)

    def _test(self, model: Any) -> None:
        if self.best["step"] < self.step:
            best = load_checkpoint(self.folder.checkpoints / "best.ckpt", self.record.get("identity"))
            model.load_state_dict(best["state_dict"])
        self.test = self._evaluate(model, "test", self.best["step"], self.best["data_order"], self.best["flops"])

    def _fit_probe(self, model: Any) -> dict[str, float]:
        """Test scores of logistic regression on the frozen trunk's features; nan where these are not finite."""
        features, classes = {}, {}
        for split in self.documents:
            batches = list(self._through(model, model.pooled, split))
            features[split] = torch.cat([z.double().cpu() for z, _ in batches]).numpy()
            classes[split] = torch.cat([c for _, c in batches]).tolist()
        probe = probe_scores(features, classes, self.classes)
        self.stats.phases.mark("evaluation")
        return probe

    def _evaluate(self, model: Any, split: str, step: int, data_order: str, flops: float) -> dict[str, float]:
        """loss, macro_f1 and accuracy on all documents of a split, which become a row of the history `evals`."""
        self.stats.phases.mark("records")
        batches = list(self._through(model, model, split))
        logits, classes = torch.cat([z.cpu() for z, _ in batches]), torch.cat([c for _, c in batches])
        result = dict(NO_SCORES)
        if logits.isfinite().all():
            macro_f1, accuracy = scores(logits.argmax(-1), classes, self.classes)
            result = {"loss": F.cross_entropy(logits, classes).item(), "macro_f1": macro_f1, "accuracy": accuracy}
        loss = result["loss"]
        self.histories["evals"].append(
            **self.stats.axes(step, flops),
            split=split,
            loss=loss,
            bits_per_byte=math.nan,
            perplexity=math.exp(loss) if not loss > 700 else math.inf,
            accuracy=result["accuracy"],
            data_order=data_order,
        )
        self.stats.phases.mark("evaluation")
        return result

    @torch.no_grad()
    def _through(
        self, model: Classifier, function: Callable[[Tensor, Tensor], Tensor], split: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`function` of all documents of a split in evaluation mode, batch by batch, with their classes."""
        training, device = model.training, next(model.parameters()).device
        size = max(LEAST_BATCH, BATCH_TOKENS // self.cfg.model.context)
        model.eval()
        for rows, lengths, classes in self.documents[split].batches(size):
            yield function(rows.to(device), lengths.to(device)), classes
        model.train(training)

    def summary(self) -> dict[str, Any]:
        """Scores of probe, fine-tuning and baselines on test documents; while it trains, those of validation so far."""
        out: dict[str, Any] = dict.fromkeys(("macro_f1", "accuracy", "probe_macro_f1", "probe_accuracy", "val_loss"))
        out |= {key: self.record["model"][key] for key in ("parameters", "mean_dropout")}
        out |= {**(self.probe or {}), **self.baselines}
        if self.steps:
            best = {**NO_SCORES, "step": None} if self.kind or self.best["step"] < 0 else self.best
            test = self.test or NO_SCORES
            out |= {"macro_f1": test["macro_f1"], "accuracy": test["accuracy"], "test_loss": test["loss"]}
            out |= {"val_loss": best["loss"], "val_macro_f1": best["macro_f1"]}
            out["best_step"] = self.best["step"] if self.best["step"] >= 0 else None
        return out | {"tokens": self.step * self.stats.tokens_per_step, "steps": self.step, "divergence": self.kind}
