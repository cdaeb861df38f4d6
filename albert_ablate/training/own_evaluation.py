"""Evaluation of a LightningModule of one's own by its validation_step and test_step, on fixed samples."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from albert_ablate.config import Config, ConfigError
from albert_ablate.model.named_draws import seeded_generators
from albert_ablate.model.own import OwnModel
from albert_ablate.training.own_data import OwnData


def overrides(module: Any, method: str) -> bool:
    """Whether a module's class has a method of its own besides Lightning's."""
    first = next(c for c in type(module).__mro__ if method in vars(c))
    return not first.__module__.startswith(("pytorch_lightning", "lightning."))


def loss_of(out: Any, name: str) -> Tensor:
    """The loss in what a step gave: itself, or a mapping's entry of that name."""
    loss = out.get("loss") if isinstance(out, Mapping) else out
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(f"{name} returns a {type(loss).__name__}: it must return its loss, a tensor of one number.")
    return loss.reshape(())


class OwnEvaluator:
    """Evaluates by the module's own validation_step, the test by its test_step where it has one.

    metrics: by split, the latest means of what the module logged, by its name.
    """

    packed = SimpleNamespace(unigram=math.inf, reversible=False)

    def __init__(self, data: OwnData, cfg: Config):
        self.data, self.batch, self.size = data, cfg.data.batch, max(1, cfg.evaluation.tokens // cfg.model.context)
        self.metrics: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def evaluate(self, model: OwnModel, split: str, precision: AbstractContextManager) -> dict[str, float]:
        """loss: the mean over examples of what the step gives, or logs as val_loss or test_loss; the rest nan."""
        own: Any = model.own
        training = model.training
        prefix = "test" if split == "test" and overrides(own, "test_step") else "validation"
        step, logged = getattr(own, f"{prefix}_step"), Logged()
        device = next(model.parameters()).device
        total, count = 0.0, 0
        model.eval()
        with precision, logged.by(own), seeded_generators(0, "evaluation", split):
            getattr(own, f"on_{prefix}_epoch_start")()
            for index, (batch, size) in enumerate(self.data.sample(split, self.size, self.batch)):
                logged.size = size
                out = step(own.transfer_batch_to_device(batch, device, 0), index)
                loss = logged.last.get("test_loss" if prefix == "test" else "val_loss") if out is None else out
                total += loss_of(loss, f"{model.name}: {prefix}_step").item() * size
                count += size
            getattr(own, f"on_{prefix}_epoch_end")()
        model.train(training)
        self.metrics[split] = logged.means()
        mean = total / count if count else math.nan
        return {"loss": mean, "bits_per_byte": math.nan, "perplexity": math.nan, "accuracy": math.nan}


class Logged:
    """What a module logs by `self.log`, as means over examples; a metric of torchmetrics is computed at the end."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.objects: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.size = 1

    @contextmanager
    def by(self, own: Any) -> Iterator[None]:
        """Collect what `own` logs by self.log while the context is open."""
        before = own.__dict__.get("log"), own.__dict__.get("log_dict")
        own.log = self.log
        own.log_dict = self.log_dict
        try:
            yield
        finally:
            for name, kept in zip(("log", "log_dict"), before, strict=True):
                own.__dict__.pop(name) if kept is None else setattr(own, name, kept)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Replacement of self.log: sums numbers by batch size, keeps torchmetrics objects."""
        self.last[name] = value
        if hasattr(value, "compute"):
            self.objects[name] = value
            return
        total, count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = total + float(torch.as_tensor(value).detach()) * self.size, count + self.size

    def log_dict(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Replacement of self.log_dict."""
        for name, value in values.items():
            self.log(name, value)

    def means(self) -> dict[str, float]:
        """Means over the batches; torchmetrics objects are computed and reset."""
        found = {name: total / count for name, (total, count) in self.sums.items()}
        for name, metric in self.objects.items():
            found[name] = float(metric.compute())
            metric.reset()
        return found
