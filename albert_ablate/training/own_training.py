"""A session with a LightningModule of one's own: its steps and evaluations under our order, optimizer and recorder."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from albert_ablate.config import Config, ConfigError, steps_of
from albert_ablate.data.packed import BatchOrder
from albert_ablate.model.build import assemble, build, initialized
from albert_ablate.model.named_draws import seeded_generators
from albert_ablate.model.own import OwnModel
from albert_ablate.optim.clipping import global_norm
from albert_ablate.records.signals import StopSignal
from albert_ablate.streams import stream_seed
from albert_ablate.trackers.base import joined
from albert_ablate.training.console import Progress
from albert_ablate.training.diagnostics import Weights, undisturbed
from albert_ablate.training.divergence import OwnDivergence
from albert_ablate.training.language_recorder import LanguageRecorder
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.own_data import ExampleData, OwnData, own_data, seed_all
from albert_ablate.training.own_evaluation import Logged, OwnEvaluator, loss_of, overrides
from albert_ablate.training.prepare import Job
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.session import Session
from albert_ablate.training.step_stats import StepStats
from albert_ablate.training.strategies import quiet_lightning
from albert_ablate.training.validation import Evaluator

# hooks of the user's module that are called when Lightning calls them of ours
FORWARDED = (
    *(
        "on_fit_end",
        "on_train_start",
        "on_train_end",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_before_backward",
    ),
    *("on_train_batch_end", "on_before_optimizer_step", "on_before_zero_grad", "transfer_batch_to_device"),
    *("on_before_batch_transfer", "on_after_batch_transfer"),
)


class OwnTraining(LanguageModel):
    """Trains a LightningModule of one's own, `model.own`, by its training_step.

    Before each micro-batch torch's, numpy's and Python's global generators begin at its stream, so that dropout is the
    same after a resume. An optimizer of its own is used as it gives it; else ours, with our schedule and clipping.
    """

    model: OwnModel

    @property
    def own(self) -> Any:
        """The user's LightningModule."""
        return self.model.own

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.own.trainer = self.trainer
        self.own.log, self.own.log_dict = _ignore, _ignore  # what it logs in training stands in no history
        self.own.on_fit_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return super().on_train_batch_start(batch, batch_idx) or self.own.on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        watch = self.watch
        step, micro = divmod(self.micro_batches, watch.accumulate)
        seed = stream_seed(self.cfg.seed, "dropout", "module", self.micro_batches)
        seed_all(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)
        self.micro_batches += 1
        if micro == 0:
            watch.begin(step, None, self.trainer.world_size, self.sharded)
        loss = loss_of(self.own.training_step(batch, batch_idx), f"{self.model.name}: training_step")
        watch.losses.append(loss.detach())
        watch.logit_mean_squares.append(loss.detach() * math.nan)
        watch.phases.mark("forward")
        return loss

    def on_after_backward(self) -> None:
        super().on_after_backward()
        self.own.on_after_backward()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if not overrides(self.own, "configure_gradient_clipping"):
            return super().configure_gradient_clipping(optimizer)
        watch = self.watch
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        with torch.no_grad():
            watch.grad_norm, _ = global_norm(gradients)
        self.own.configure_gradient_clipping(optimizer)
        with torch.no_grad():
            watch.grad_norm_clipped, _ = global_norm(gradients)
        watch.clipped = watch.grad_norm_clipped < watch.grad_norm
        watch.lr = optimizer.param_groups[0]["lr"]
        if watch.detailed:
            watch.weights = Weights(self.named, self.places)
            watch.weights.begin()

    def configure_optimizers(self):
        if not overrides(self.own, "configure_optimizers"):
            return super().configure_optimizers()
        self.named, self.places = self.model.trained(), self.model.places()
        found = self.own.configure_optimizers()
        optimizer, scheduler = _one_optimizer(found, self.model.name)
        known = {id(p) for _, p in self.named}
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError(f"{self.model.name}: its optimizer has parameters that are not the module's.")
        self.note_order(optimizer)
        return {"optimizer": optimizer, **({"lr_scheduler": scheduler} if scheduler else {})}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        self.own.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self.own.on_load_checkpoint(checkpoint)


def _forward(name: str) -> Any:
    def hook(self: OwnTraining, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.own, name)(*args, **kwargs)

    return hook


for _name in FORWARDED:
    setattr(OwnTraining, _name, _forward(_name))


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _one_optimizer(found: Any, name: str) -> tuple[torch.optim.Optimizer, dict[str, Any] | None]:
    """The optimizer of what configure_optimizers gave, and its schedule by step."""
    scheduler = None
    if isinstance(found, Mapping):
        found, scheduler = found.get("optimizer"), found.get("lr_scheduler")
    elif isinstance(found, list | tuple) and len(found) == 2 and isinstance(found[0], list | tuple):
        (found, *more), schedulers = found
        scheduler = schedulers[0] if schedulers and not more else None
        found = None if more or len(schedulers) > 1 else found
    elif isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    if not isinstance(found, torch.optim.Optimizer):
        raise ConfigError(f"{name}: configure_optimizers must return one optimizer, with at most one schedule.")
    if scheduler is None:
        return found, None
    if not isinstance(scheduler, Mapping) or scheduler.get("interval") != "step" or "monitor" in scheduler:
        raise ConfigError(
            f"{name}: its learning-rate schedule must count steps, since a run has no epochs: give lr_scheduler as "
            "{'scheduler': ..., 'interval': 'step'}."
        )
    return found, dict(scheduler)


class OwnRecorder(LanguageRecorder):
    """The recorder of a task of one's own: what its module logged in evaluations stands in the summary by name."""

    evaluator: Any

    def __init__(self, evaluator: OwnEvaluator, *args: Any):
        super().__init__(cast(Evaluator, evaluator), *args)
        self.divergence = OwnDivergence(self.steps)

    SAVED = {**LanguageRecorder.SAVED, "metrics": "metrics"}

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of the last evaluations, by split."""
        return self.evaluator.metrics

    @metrics.setter
    def metrics(self, found: dict[str, dict[str, float]]) -> None:
        self.evaluator.metrics = found

    def summary(self) -> dict[str, Any]:
        found = super().summary()
        for key in ("unigram_loss", "below_unigram", "val_bits_per_byte", "val_perplexity", "val_accuracy"):
            found[key] = None
        found["test_bits_per_byte"] = None
        if not self.evaluator.data.loaders["test"]:
            found["test_loss"] = found["test_loss_last"] = None
        logged = self.metrics.get("validation", {}) | self.metrics.get("test", {})
        return {name: value for name, value in logged.items() if name not in found} | found


def own_session(job: Job, record: dict[str, Any], ranks: Ranks, stop: StopSignal) -> Session:
    """The session of a run with a LightningModule of one's own; fills in what the record says before its first step."""
    cfg, data = job.cfg, job.dataset
    assert isinstance(data, OwnData)
    model = initialized(assemble(cfg) if job.model is None else job.model, cfg)
    loader = data.loaders["train"]
    assert loader is not None
    batch, context, steps = cfg.data.batch, cfg.model.context, steps_of(cfg)
    order = BatchOrder(len(loader.dataset), batch, cfg.seed)  # type: ignore[arg-type]
    flops = step_flops(cfg, model)
    record["budget"]["flops"] = flops * batch * context * steps
    record["proof"]["initial_draws"] = model.initial_draws
    record["model"] = model.described()
    module = OwnTraining(model, cfg, steps)
    recorder = OwnRecorder(
        OwnEvaluator(data, cfg),
        cfg,
        job.folder,
        record,
        StepStats(order, data.fingerprint, batch * context, (flops, []), cfg.data.accumulate, ranks),
        joined(build(cfg.logger)),
        Progress(steps, batch * context, shown=job.verbose),
        ranks,
        stop,
    )
    examples = ExampleData(loader, order, cfg.data.accumulate, record["resumed_at"])
    return Session(module, recorder, examples, cfg.data.accumulate, False, partial(_unknown))


def _unknown() -> None:
    return None


def step_flops(cfg: Config, model: OwnModel | None = None) -> float:
    """Operations of training per token: three times those of training_step's forward pass, counted on one batch."""
    own, data = cast(OwnModel, assemble(cfg)) if model is None else model, own_data(cfg)
    if model is None:
        own.fill(cfg.seed)
    with _attached(own), FlopCounterMode(display=False) as counter, torch.no_grad():
        batch, size = next(data.sample("train", cfg.data.batch, cfg.data.batch))
        cast(Any, own.own).training_step(batch, 0)
    return 3 * counter.get_total_flops() / (size * cfg.model.context)


@contextmanager
def _attached(model: OwnModel) -> Iterator[nn.Module]:
    """Within it the module has a Trainer, and what it does to itself and to the generators is put back."""
    own: Any = model.own
    quiet_lightning()
    with undisturbed(model), seeded_generators(0, "check"), Logged().by(own):
        own.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        try:
            yield own
        finally:
            own.trainer = None


def check_module(model: OwnModel, data: OwnData, cfg: Config) -> None:
    """Raise ConfigError with one sentence unless the module trains and evaluates on its first batches."""
    name = model.name
    model.fill(cfg.seed)
    own: Any = model.own
    for method in ("training_step", "validation_step"):
        if not hasattr(own, method) or not overrides(own, method):
            raise ConfigError(f"{name}: its module has no {method}.")
    if not getattr(own, "automatic_optimization", True):
        raise ConfigError(f"{name}: a module that optimizes by itself (automatic_optimization=False) is not supported.")
    batch, _ = next(data.sample("train", cfg.data.batch, cfg.data.batch))
    try:
        with _attached(model):
            loss = loss_of(own.training_step(batch, 0), f"{name}: training_step")
            if not loss.requires_grad:
                raise ConfigError(f"{name}: the loss of training_step depends on no parameter that is trained.")
            if overrides(own, "configure_optimizers"):
                _one_optimizer(own.configure_optimizers(), name)
            few = OwnEvaluator(data, cfg)
            few.size = cfg.data.batch
            few.evaluate(model, "validation", seeded_generators(0, "check"))
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{name} fails on its first batch: {why}") from error
