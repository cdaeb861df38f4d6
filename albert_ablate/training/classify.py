"""Text classification on a pretrained decoder: fine-tuning and a linear probe, next to baselines (baselines.py).

A task has no commits: one that is stopped begins again, and ends with the same numbers.
"""

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError, identity
from albert_ablate.data.corpora import SPLITS
from albert_ablate.data.packed import Order, Packed, cache_folder, chain
from albert_ablate.data.tasks import Labelled, language_model
from albert_ablate.model.build import build, build_model
from albert_ablate.model.decoder import Decoder, initial_draw, xavier
from albert_ablate.model.weights import load_checkpoint, weights_hash
from albert_ablate.optim.schedules import warmup_linear
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import SCHEMAS, History
from albert_ablate.records.signals import stops_handled
from albert_ablate.streams import digest
from albert_ablate.training.baselines import baselines, best_regression, named_scores, scores
from albert_ablate.training.console import Progress
from albert_ablate.training.cost import PeakMemory, flops_per_token

WARMUP, MAX_NORM = 0.1, 1.0  # of fine-tuning, for every arm
INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # scikit-learn's C, chosen on validation


def trunk_of(cfg: Config, packed: Packed) -> tuple[dict[str, Any], Path]:
    """The record of the language model that a task builds on, and its weights; ConfigError where they are missing."""
    who = identity(language_model(cfg), packed.fingerprint)
    folder = RunFolder(Path(cfg.paths.runs).expanduser() / who.setting / f"seed{cfg.seed}")
    record, weights = folder.record(), folder.checkpoints / f"{cfg.task.weights}.ckpt"
    if record is None or not weights.exists():
        raise ConfigError(
            f"{weights} is missing, and task=classify builds on it: take the other task.weights, or remove "
            f"{folder.path} to train that run again."
        )
    return record, weights


class Classifier(nn.Module):
    """Logits W z + b, (B, T) tokens and (B,) lengths -> (B, classes); z is the trunk's pooled features.

    W has Xavier's normal draw of stream `init/task.head.weight`, b is zero."""

    def __init__(self, trunk: Decoder, classes: int, pool: str, seed: int):
        super().__init__()
        self.trunk, self.pool = trunk, pool
        self.head = nn.Linear(trunk.width, classes)
        draw = initial_draw(seed, "task.head.weight", self.head.weight.shape)
        self.draw_hash = digest(draw.numpy().tobytes())
        with torch.no_grad():
            self.head.weight.copy_(draw * xavier(classes, trunk.width))
            self.head.bias.zero_()

    def pooled(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """z (B, D): the mean of the features over each document's tokens, or those of its last token.

        What fills a row up comes after its document, where a causal model does not look."""
        h = self.trunk.features(tokens)
        if self.pool == "last":
            return h[torch.arange(len(h), device=h.device), lengths - 1]
        there = torch.arange(h.shape[1], device=h.device) < lengths[:, None]
        return (h * there[:, :, None]).sum(1) / lengths[:, None]

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.pooled(tokens, lengths))


class Documents:
    """The documents of a split as tokens: rows (N, T) filled up with zeros, lengths (N,), classes (N,)."""

    def __init__(self, labelled: Labelled, split: str, codec: Any, context: int, device: torch.device):
        kept = [codec.encode(text)[:context].astype(np.int64) for text in labelled.texts[split]]
        # what the tokenizer has no token for is read as its first one: a mean over nothing is not a number
        self.lengths = torch.tensor([max(1, len(row)) for row in kept])
        self.rows = torch.zeros(len(kept), context, dtype=torch.long)
        for row, tokens in zip(self.rows, kept, strict=True):
            row[: len(tokens)] = torch.from_numpy(tokens)
        self.classes = torch.tensor(labelled.numbers[split])
        self.seen = [codec.decode(tokens) for tokens in kept]  # what the model reads of each
        self.device = device

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        lengths = self.lengths[chosen]
        batch = self.rows[chosen, : int(lengths.max())], lengths, self.classes[chosen]
        return batch[0].to(self.device), batch[1].to(self.device), batch[2].to(self.device)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All of them, those of like length together."""
        for indices in torch.argsort(self.lengths, stable=True).split(size):
            yield self.take(indices.numpy())


class Stopped(Exception):
    """A signal came: nothing of a fine-tuning is kept, it begins again, with the same numbers."""


def fit(
    cfg: Config, packed: Packed, folder: RunFolder, record: dict, resume: Path | None, ranks: Any, verbose: bool
) -> dict[str, Any]:
    """The run of a task in `folder`, whose lock is held, on top of the trunk that lies beside it: its record."""
    signals: list[int] = []
    task = ClassificationRun(cfg, packed, folder, record, signals, verbose)
    try:
        with stops_handled(lambda number, frame: signals.append(number)):
            task.begin()
            task.all()
    except Stopped:
        task.write("stopped")
        record["signal"] = signals[0]
        folder.write(record)
    finally:
        task.close()
    return record


class ClassificationRun:
    """Probe, fine-tuning and baselines of one task, with the run folder they are written to."""

    def __init__(self, cfg: Config, packed: Packed, folder: RunFolder, record: dict, signals: list[int], verbose: bool):
        self.cfg, self.task, self.folder, self.record = cfg, cfg.task, folder, record
        self.signals, self.verbose = signals, verbose
        self.memory, self.began = PeakMemory(), time.perf_counter()
        self.steps = 0 if self.task.mode == "probe" else self.task.documents // self.task.batch
        self.step, self.training_seconds = 0, 0.0
        self.diverged: str | None = None  # the kind of it
        self.summary: dict[str, Any] = {}
        self.device = torch.device(_device(cfg.trainer.accelerator))
        task = build(self.task)
        self.labelled = task.kept(task.rows(cache_folder(cfg.paths.cache)))
        self.classes = len(self.labelled.classes)
        self.packed, self.context = packed, cfg.model.context
        self.documents = {s: Documents(self.labelled, s, packed.codec, self.context, self.device) for s in SPLITS}
        self.flops_per_step = flops_per_token(language_model(cfg)) * self.task.batch * self.context
        self.order = Order(len(self.documents["train"].rows), self.task.batch, cfg.seed)
        self.order_hash = digest(record["data"]["fingerprint"].encode())
        self.histories = {name: History(folder.path, name, record.get("identity") or "") for name in SCHEMAS}
        self.progress = Progress(self.steps, self.task.batch, shown=verbose, unit="doc")

    def begin(self) -> None:
        """The trunk, and what the record says before the first step."""
        source, weights = trunk_of(self.cfg, self.packed)
        self.folder.write_config(self.cfg)
        for history in self.histories.values():
            history.cut(0)
        model = build_model(language_model(self.cfg), self.device)
        kept = load_checkpoint(weights, source.get("identity"))
        model.load_state_dict(kept["state_dict"])
        self.model = Classifier(model, self.classes, self.task.pool, self.cfg.seed).to(self.device)
        record, documents = self.record, self.documents["train"]
        record["trunk"] = {
            "identity": source["identity"],
            "folder": f"{source['setting']}/seed{source['seed']}",
            "status": source["status"],
            "weights": self.task.weights,
            "step": kept["step"],
            "weights_hash": weights_hash(model),
            "val_loss": source["summary"].get("val_loss"),
        }
        record["budget"] = {
            "tokens": self.steps * self.task.batch * self.context,
            "steps": self.steps,
            "passes": self.steps * self.task.batch / len(documents.rows),
            "flops": self.flops_per_step * self.steps,
        }
        record["data"] |= {
            "task": self.task.data,
            "labels": self.labelled.fingerprint,
            "classes": self.labelled.classes,
            "documents": {split: len(self.labelled.texts[split]) for split in SPLITS},
            "dropped": self.labelled.dropped,
        }
        record["proof"]["initial_draws"] = {**model.initial_draws, "task.head.weight": self.model.draw_hash}
        record["model"] = source["model"]
        self.summary |= {"parameters": source["model"]["parameters"], "mean_dropout": source["model"]["mean_dropout"]}
        self.write("running")
        if self.verbose:
            print(f"{record['label']}, seed {record['seed']}")
            print(f"  trunk   {record['trunk']['folder']}, {source['status']}, weights of step {kept['step']}")
            held = ", ".join(f"{n} {split}" for split, n in record["data"]["documents"].items())
            print(f"  data    {self.classes} classes; documents: {held}", flush=True)

    def all(self) -> None:
        if self.task.mode != "finetune":
            self._probe()
        if self.task.mode != "probe":
            self._finetune()
        self._heed()
        self.summary |= baselines(self.labelled, {s: d.seen for s, d in self.documents.items()})
        self.record["proof"] |= {"data_order": self.order_hash, "final_weights": weights_hash(self.model)}
        for history in self.histories.values():
            history.finish()
        self.write("diverged" if self.diverged else "finished")
        self.folder.tidy()

    def _heed(self) -> None:
        if self.signals:
            raise Stopped

    def _probe(self) -> None:
        """Logistic regression on the frozen trunk's features, standardized by those of the training documents."""
        features, classes = {}, {}
        for split, documents in self.documents.items():
            found = [(z.double().cpu(), c.cpu()) for z, c in self._through(documents, self.model.pooled)]
            features[split] = torch.cat([z for z, _ in found]).numpy()
            classes[split] = torch.cat([c for _, c in found]).tolist()
        if not all(np.isfinite(z).all() for z in features.values()):
            self.diverged = "non_finite"
            self.summary |= {"probe_macro_f1": math.nan, "probe_accuracy": math.nan}
            return
        mean, deviation = features["train"].mean(0), features["train"].std(0)
        features = {split: (z - mean) / np.where(deviation > 0, deviation, 1.0) for split, z in features.items()}
        predicted = best_regression(features, classes, self.classes, INVERSE_PENALTIES)
        self.summary |= named_scores("probe_", *scores(predicted, classes["test"], self.classes))

    @torch.no_grad()
    def _through(self, documents: Documents, function: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """`function` of all documents in evaluation mode, batch by batch, with their classes."""
        training = self.model.training
        self.model.eval()
        for rows, lengths, classes in documents.batches(max(16, 2048 // self.context)):
            self._heed()
            yield function(rows, lengths), classes
        self.model.train(training)

    def _evaluate(self, split: str) -> dict[str, float]:
        found = list(self._through(self.documents[split], self.model))
        logits, classes = torch.cat([z for z, _ in found]), torch.cat([c for _, c in found])
        if not logits.isfinite().all():
            return {"loss": math.nan, "macro_f1": math.nan, "accuracy": math.nan}
        macro_f1, accuracy = scores(logits.argmax(-1).cpu(), classes.cpu(), self.classes)
        result = {"loss": F.cross_entropy(logits, classes).item(), "macro_f1": macro_f1, "accuracy": accuracy}
        self._row("evals", split=split, data_order=self.order_hash, perplexity=math.exp(result["loss"]), **result)
        return result

    def _finetune(self) -> None:
        """All parameters, by AdamW with linear warm-up and decay; the weights best on validation count."""
        model, task = self.model.train(), self.task
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=task.lr, weight_decay=task.weight_decay)
        due = {round(self.steps * (k + 1) / task.evaluations) for k in range(task.evaluations)}
        best: dict[str, Any] = {"macro_f1": -1.0}
        self.progress.start(0)
        while self.step < self.steps and not self.diverged:
            self._heed()
            started = time.perf_counter()
            loss, norm = self._train_step(optimizer, parameters)
            self.training_seconds += time.perf_counter() - started
            self.step += 1
            self._row("steps", loss=loss, lr=optimizer.param_groups[0]["lr"], grad_norm=norm, clipped=norm > MAX_NORM)
            self.progress.update(self.step, loss)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.diverged = "non_finite"
            elif self.step in due:
                found = self._evaluate("validation")
                if found["macro_f1"] > best["macro_f1"]:
                    best = {**found, "step": self.step, "weights": copy.deepcopy(model.state_dict())}
        self.progress.close()
        if not self.diverged:
            model.load_state_dict(best["weights"])
        test = dict.fromkeys(("loss", "macro_f1", "accuracy"), math.nan) if self.diverged else self._evaluate("test")
        self.summary |= {
            "macro_f1": test["macro_f1"],
            "accuracy": test["accuracy"],
            "test_loss": test["loss"],
            "val_loss": best.get("loss", math.nan) if not self.diverged else math.nan,  # nats per document
            "val_macro_f1": best["macro_f1"] if not self.diverged else math.nan,
            "best_step": best.get("step"),
        }

    def _train_step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> tuple[float, float]:
        """(loss in nats per document, gradient norm before clipping) of the next batch."""
        indices = self.order.indices(self.step)
        self.order_hash = chain(self.order_hash, indices)
        rows, lengths, classes = self.documents["train"].take(indices)
        self.model.trunk.clock.set(self.step, 0, self.step, self.steps)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(rows, lengths), classes)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM).item()
        for group in optimizer.param_groups:
            group["lr"] = self.task.lr * warmup_linear((self.step + 0.5) / self.steps, warmup=WARMUP)
        if math.isfinite(norm):
            optimizer.step()
            self.model.trunk.after_step()
        return loss.item(), norm

    def _row(self, history: str, **values: Any) -> None:
        """A row of a history; what it does not say is nan."""
        axes = {
            "step": self.step,
            "tokens": self.step * self.task.batch * self.context,
            "seconds": time.perf_counter() - self.began,
            "flops": self.step * self.flops_per_step,
        }
        known = {**axes, **values}
        self.histories[history].append(**{f.name: known.get(f.name, math.nan) for f in SCHEMAS[history]})

    def write(self, status: str) -> None:
        """The record as of now."""
        empty = dict.fromkeys(("macro_f1", "accuracy", "probe_macro_f1", "probe_accuracy", "val_loss"))
        tokens = self.step * self.task.batch * self.context
        rate = tokens / self.training_seconds if self.training_seconds else None
        self.record |= {
            "status": status,
            "updated": time.time(),
            "progress": {"step": self.step, "steps": self.steps},
            "histories": {} if status in ("running", "stopped") else None,
            "summary": {**empty, **self.summary, "tokens": tokens, "steps": self.step, "divergence": self.diverged},
            "cost": {
                "seconds": time.perf_counter() - self.began,
                "training_seconds": self.training_seconds,
                "flops": self.step * self.flops_per_step,
                "peak_memory_bytes": self.memory.read(self.device),
                "tokens_per_second": rate,
            },
        }
        self.folder.write(self.record)

    def close(self) -> None:
        self.progress.close()
        for history in self.histories.values():
            history.close()


def _device(accelerator: str) -> str:
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return "cuda"
    return "mps" if accelerator == "mps" else "cpu"
