"""Measures by name: what a claim may ask of runs, and how two arms' runs become one signed number per seed.

A measure of one run is a function Evidence -> number; an initial one speaks of the weights before the first step, and
how the run ended is nothing to it; of a grid, of a seed's runs over learning rates; of a pair, of both arms' runs of a
seed, already signed in favor of the treatment. `Missing` says what a run lacks and which command
adds it. Unit, direction and scale (log ratio or difference) stand beside each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from albert_ablate.analysis import measures
from albert_ablate.config import ConfigError, nearest, options
from albert_ablate.records.evaluation_results import read_evaluations
from albert_ablate.records.history import read_history, values_of


class Missing(ValueError):
    """Raised when a run lacks what a measure needs: one sentence, with the command that adds it."""


class Unusable(ValueError):
    """Raised when a finished run has no finite value of a measure: one sentence; no command can add it."""


@dataclass(frozen=True)
class Evidence:
    """One run as measures see it: its record, and its histories and evaluations, read when first needed."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether the run diverged, which counts as its outcome."""
        return self.record["status"] == "diverged"

    @property
    def lr(self) -> float:
        """Learning rate of the run."""
        return float(self.record["config"]["optimizer"]["lr"])

    def summary_metric(self, name: str) -> float:
        """A number of the record's summary."""
        value = self.record["summary"].get(name)
        if value is None:
            raise Unusable(f"{self.name} finished without a finite {name}.")
        return float(value)

    def evaluation(self, name: str, metric: str) -> float:
        """A figure of `evaluations.json`."""
        value = self._evaluations.get(name, {}).get("summary", {}).get(metric)
        if value is None:
            raise Missing(f"{self.name} has no {name}.{metric}: albert-ablate evaluate {self.relative_folder} {name}")
        return float(value)

    def evaluation_settings(self, name: str) -> dict[str, Any]:
        """Of which weights and with which settings an evaluation was made."""
        entry = self._evaluations.get(name, {})
        return {"weights": entry.get("weights"), **(entry.get("settings") or {})}

    def between_evaluations(self) -> tuple[int, float]:
        """How many evaluations on validation text a run has after its start, and the tokens between two of them."""
        tokens = self.curve("validation")[0]
        return len(tokens[tokens > 0]), float(np.median(np.diff(tokens))) if len(tokens) > 1 else math.nan

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of an evaluation; none where it was not asked for."""
        return self._evaluations.get(name, {}).get("rows", [])

    def column(self, history: str, name: str) -> Any:
        """A column of a history; Missing where the run did not write it."""
        cache = self.__dict__.setdefault("_columns", {})
        if (history, name) not in cache:
            cache[history, name] = self._column(history, name)
        return cache[history, name]

    def _column(self, history: str, name: str) -> Any:
        table = self._history(history)
        if name not in table.column_names or not len(table):
            raise Missing(
                f"{self.name} has no column {name} in its {history}: it needs a run with diagnostics.every>0."
            )
        return values_of(table[name])

    @property
    def name(self) -> str:
        """Name of the run in sentences: Run SETTING/seedN."""
        return f"Run {self.relative_folder}"

    @property
    def relative_folder(self) -> str:
        """The run folder below the folder of runs: SETTING/seedN."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @cached_property
    def _evaluations(self) -> dict[str, dict[str, Any]]:
        return read_evaluations(self.folder, self.record.get("identity"))

    def _history(self, name: str) -> Any:
        cache = self.__dict__.setdefault("_histories", {})
        if name not in cache:
            try:
                cache[name] = read_history(self.folder, name, self.record["histories"], self.record.get("identity"))
            except (FileNotFoundError, KeyError) as error:
                raise Missing(f"{self.name} has no readable {name}: {error}.") from None
            except (OSError, ValueError) as error:  # pyarrow has both for a file that the disk has spoilt
                raise Unusable(f"{self.name} cannot be used: {error}.") from None
        return cache[name]

    def curve(self, split: str, y: str = "loss", x: str = "tokens") -> tuple[Any, Any]:
        """The evaluations of one split, over tokens."""
        rows = self.column("evals", "split") == split
        if not rows.any():
            raise Missing(f"{self.name} has no evaluation of {split}.")
        return self.column("evals", x)[rows].astype(float), self.column("evals", y)[rows].astype(float)

    def layers(self, name: str, initial: bool = False) -> np.ndarray:
        """(logged steps, places in depth) of a column of `layers`: of step 0, or of all steps after it.

        A row's sublayers stand side by side, in the order of depth.
        """
        step, values = self.column("layers", "step"), self.column("layers", name).astype(float)
        rows = (step == 0) if initial else (step > 0)
        if not rows.any() or np.isnan(values[rows]).all():
            when = "at initialization" if initial else "while it trains"
            raise Missing(f"{self.name} has no {name} by layer {when}: it needs a run with diagnostics.every>0.")
        steps = np.unique(step[rows])
        return values[rows].reshape(len(steps), -1)

    def norms(self, name: str, initial: bool = False) -> np.ndarray:
        """(logged steps, blocks): root of the sum of squares over a block's rows."""
        table = self.layers(name, initial)
        blocks = len(np.unique(self.column("layers", "layer")))
        return np.sqrt(np.nansum(table.reshape(len(table), blocks, -1) ** 2, axis=-1))


Kind = Literal["run", "initial", "grid", "pair", "exact"]


@dataclass(frozen=True)
class Measure:
    """A measure by name: the function that computes it from runs, its unit, direction, and how it is judged."""

    name: str
    of: Callable[..., float]
    unit: str
    better: Literal["lower", "higher"] = "lower"
    log: bool = False  # judged as a log ratio
    kind: Kind = "run"
    evaluation: str = ""  # the evaluation after training that it needs
    loss: bool = False  # in nats, as the tuning slack is
    looks: bool = False  # read from the evaluations during training, and no finer than they lie apart
    discrete: bool = False  # few values, so that differences may all be equal: `statistics.p_effect`

    @property
    def description(self) -> str:
        """What the measure is, in one line: the docstring of its function, else its name."""
        return (self.of.__doc__ or "").strip().splitlines()[0] if self.of.__doc__ else self.name


MEASURES: dict[str, Measure] = {}


TEXTS = {  # of measures that are a figure of a record or of an evaluation
    "test_loss": "Loss on test text of the weights that were best on validation text.",
    "val_loss": "Loss on validation text at the end of training.",
    "best_val_loss": "Least loss on validation text at an evaluation during training.",
    "train_loss": "Loss without dropout on a fixed sample of training text at the end.",
    "test_loss_last": "Loss on test text of the last weights.",
    "test_bits_per_byte": "Loss on test text of the best weights, in bits per byte of the text.",
    "val_bits_per_byte": "Loss on validation text at the end, in bits per byte of the text.",
    "gap": "Validation minus training loss at the end, in nats.",
    "parameters": "Number of trained parameters.",
    "corruption_masked": "Mean rise of the loss over rates of missing tokens.",
    "corruption_noisy": "Mean rise of the loss over rates of wrong tokens.",
    "corruption_swapped": "Mean rise of the loss over rates of swapped neighboring tokens.",
    "sharpness": "Largest eigenvalue of the Hessian of the loss.",
    "sharpness_rise": "Rise of the loss under random perturbation of the weights.",
    "rank_first": "Effective rank of the residual stream after the first block.",
    "rank_middle": "Effective rank of the residual stream after the middle block.",
    "rank_last": "Effective rank of the residual stream after the last block.",
    "calibration": "Expected calibration error of the next token's probability.",
    "memorization": "Share of training prefixes continued verbatim, less that of validation prefixes.",
    "macro_f1": "Macro-averaged F1 of the fine-tuned classifier on test documents.",
    "probe_macro_f1": "Macro-averaged F1 of the linear probe on test documents.",
    "accuracy": "Accuracy of the fine-tuned classifier on test documents.",
}


def _add(name: str, of: Callable[..., float], unit: str, **more: Any) -> None:
    if name in TEXTS:
        of.__doc__ = TEXTS[name]
    MEASURES[name] = Measure(name, of, unit, **more)


def _summary(name: str) -> Callable[[Evidence], float]:
    return lambda run: run.summary_metric(name)


def _evaluated(name: str, figure: str) -> Callable[[Evidence], float]:
    return lambda run: run.evaluation(name, figure)


def gap_at_best(run: Evidence) -> float:
    """Validation minus training loss at the evaluation with the least validation loss, in nats."""
    (at, validation), (at_train, train) = run.curve("validation"), run.curve("train")
    best = at[np.nanargmin(validation)]
    if best not in at_train:
        raise Missing(f"{run.name} has no training loss at its best evaluation.")
    return float(np.nanmin(validation) - train[at_train == best][0])


def gap_at_equal_training_loss(treatment: Evidence, control: Evidence) -> float:
    """Control's minus treatment's validation loss where each first has the worse final training loss, in nats."""
    t, c = ((run.curve("train")[1], run.curve("validation")[1]) for run in (treatment, control))
    return measures.gap_at_equal_training_loss(t, c)


def speedup(treatment: Evidence, control: Evidence) -> float:
    """ln(tokens of the control / tokens of the treatment) to the worse of their two final validation losses."""
    return measures.speedup(treatment.curve("validation"), control.curve("validation"))


def speedup_flops(treatment: Evidence, control: Evidence) -> float:
    """ln(FLOPs of the control / FLOPs of the treatment) to the worse of their two final validation losses."""
    return measures.speedup(*(run.curve("validation", x="flops") for run in (treatment, control)))


def loss_at_equal_flops(treatment: Evidence, control: Evidence) -> float:
    """ln(validation loss of the control / of the treatment) at the smaller of their final FLOPs."""
    return measures.loss_at_equal_budget(*(run.curve("validation", x="flops") for run in (treatment, control)))


def mean_val_loss(run: Evidence) -> float:
    """Area under the validation loss over tokens, over its length, in nats."""
    return measures.mean_loss(run.curve("validation"))


def residual_spread(run: Evidence) -> float:
    """Standard deviation over depth of ln RMS of the residual stream, averaged over logged steps."""
    return measures.spread_over_depth(run.layers("residual_rms"))


def input_spread(run: Evidence) -> float:
    """Standard deviation over depth of ln RMS of what the sublayers receive, averaged over logged steps."""
    return measures.spread_over_depth(run.layers("input_rms"))


def residual_drift(run: Evidence) -> float:
    """Standard deviation over logged batches of ln RMS of the residual stream, averaged over depth."""
    return measures.spread_over_depth(run.layers("residual_rms").T)


def activation_growth(run: Evidence) -> float:
    """|ln(RMS of the residual stream behind the last sublayer / behind the first)| per block, median over steps."""
    ends = run.layers("residual_rms")[:, [0, -1]]
    ends = ends[~np.isnan(ends).any(axis=1)]  # steps in which dropout skipped neither block
    if not len(ends):
        raise Unusable(f"{run.name} has no logged step with the residual stream at both of its ends.")
    blocks = len(np.unique(run.column("layers", "layer")))
    return float(np.median([abs(measures.growth_exponent(first, last, blocks)) for first, last in ends]))


def entropy_floor(run: Evidence) -> float:
    """Least attention entropy over blocks and logged steps, in nats: 0 is collapse."""
    return measures.entropy_floor(run.layers("entropy"))


def largest_logit(run: Evidence) -> float:
    """Largest attention logit over blocks and logged steps."""
    return measures.largest_logit(run.layers("max_logit"))


def depth_imbalance_init(run: Evidence) -> float:
    """|ln(first block's gradient norm / last block's)| at initialization, before clipping; infinite if either is."""
    if not np.isfinite(run.column("layers", "grad_norm")[run.column("layers", "step") == 0]).all():
        return math.inf
    return measures.depth_imbalance(run.norms("grad_norm", initial=True)[0])


def depth_imbalance(run: Evidence) -> float:
    """|ln(first block's gradient norm / last block's)|, median over the logged steps, before clipping."""
    return float(np.median([measures.depth_imbalance(norms) for norms in run.norms("grad_norm")]))


def grad_norm(run: Evidence) -> float:
    """Global gradient norm before clipping, median over the steps."""
    return float(np.nanmedian(run.column("steps", "grad_norm")))


def spike_score(run: Evidence) -> float:
    """Share of losses 7 standard deviations off the window before (a tenth of the run, 20 to 1000 steps)."""
    return _spike_score(run.column("steps", "loss"))


def grad_spike_score(run: Evidence) -> float:
    """Share of ln(gradient norm) 7 standard deviations off the window before, which is that of `spike_score`."""
    return _spike_score(measures.log_of_positive(run.column("steps", "grad_norm")))


def _spike_score(values: Any) -> float:
    return measures.spike_score(values, window=measures.spike_window(len(values)))


def roughness(run: Evidence) -> float:
    """Root mean square of the change of the training loss from step to step, in nats."""
    return measures.roughness(run.column("steps", "loss"))


def largest_update_ratio(run: Evidence) -> float:
    """Largest ratio of a step's change to the weights' norm, over layers and logged steps."""
    return measures.largest_update(run.layers("update_ratio"))


def weight_norm(run: Evidence) -> float:
    """Norm of all blocks' weights at the last logged step."""
    return float(np.sqrt(np.nansum(run.norms("weight_norm")[-1] ** 2)))


def flops_per_token(run: Evidence) -> float:
    """Training operations per token."""
    return float(run.record["cost"]["flops"]) / run.summary_metric("tokens")


def rate_sensitivity(runs: Sequence[Evidence]) -> float:
    """Mean over the rate grid of min(loss, initial loss) minus the seed's least, in nats."""
    from albert_ablate.stats.effects import rate_sensitivity as of

    losses = [math.inf if run.diverged else run.summary_metric("val_loss") for run in runs]
    return float(of([losses], max(run.summary_metric("initial_loss") for run in runs))[0])


def largest_stable_rate(runs: Sequence[Evidence]) -> float:
    """Log to base 2 of the largest rate that, like all below it, trains; a grid step below the grid if none does."""
    rates = [run.lr for run in runs]
    stable = measures.largest_stable_rate(rates, [run.diverged for run in runs])
    return math.log2(stable or min(rates) ** 2 / sorted(rates)[1])


def diverging_share(runs: Sequence[Evidence]) -> float:
    """Share of the rate grid that diverges."""
    return float(np.mean([run.diverged for run in runs]))


for _name, _text in (("test_loss", "nats"), ("val_loss", "nats"), ("best_val_loss", "nats"), ("train_loss", "nats"),
                     ("test_loss_last", "nats"), ("test_bits_per_byte", "bits per byte"),
                     ("val_bits_per_byte", "bits per byte")):  # fmt: skip
    _add(_name, _summary(_name), _text, log=True, loss=_text == "nats",
         looks=_name in ("test_loss", "best_val_loss", "test_bits_per_byte"))  # fmt: skip
_add("gap", _summary("gap"), "nats")
_add("gap_at_best", gap_at_best, "nats", looks=True)
_add("gap_at_equal_training_loss", gap_at_equal_training_loss, "nats", kind="pair", looks=True)
_add("speedup", speedup, "log ratio of tokens", better="higher", kind="pair", log=True,
     looks=True)  # fmt: skip
_add("speedup_flops", speedup_flops, "log ratio of FLOPs", better="higher", kind="pair", log=True,
     looks=True)  # fmt: skip
_add("loss_at_equal_flops", loss_at_equal_flops, "log ratio of losses", better="higher", kind="pair", log=True,
     looks=True)  # fmt: skip
_add("mean_val_loss", mean_val_loss, "nats", log=True, loss=True, looks=True)
_add("rate_sensitivity", rate_sensitivity, "nats", kind="grid")
_add("largest_stable_rate", largest_stable_rate, "doublings", better="higher", kind="grid", discrete=True)
_add("diverging_share", diverging_share, "share", kind="grid", discrete=True)
_add("residual_spread", residual_spread, "ln RMS")
_add("input_spread", input_spread, "ln RMS")
_add("residual_drift", residual_drift, "ln RMS")
_add("activation_growth", activation_growth, "ln RMS per block")
_add("entropy_floor", entropy_floor, "nats", better="higher")
_add("largest_logit", largest_logit, "logit")
_add("depth_imbalance_init", depth_imbalance_init, "log ratio", kind="initial")
_add("depth_imbalance", depth_imbalance, "log ratio")
_add("grad_norm", grad_norm, "norm", log=True)
_add("spike_score", spike_score, "share of steps", discrete=True)
_add("grad_spike_score", grad_spike_score, "share of steps", discrete=True)
_add("roughness", roughness, "nats", log=True)
_add("largest_update_ratio", largest_update_ratio, "ratio", log=True)
_add("weight_norm", weight_norm, "norm", log=True)
_add("flops_per_token", flops_per_token, "FLOPs per token", log=True, kind="exact")
_add("parameters", _summary("parameters"), "parameters", log=True, kind="exact")
for _kind in ("masked", "noisy", "swapped"):
    _add(f"corruption_{_kind}", _evaluated("corruption", f"{_kind}_area"), "nats", evaluation="corruption")
for _share in (1, 2, 5, 10, 20, 30):
    TEXTS[f"unit_ablation_{_share}"] = f"Rise of the loss with {_share} % of the hidden units at zero."
    _add(f"unit_ablation_{_share}", _evaluated("units", f"rise_{_share}"), "nats", evaluation="units")
_add("sharpness", _evaluated("sharpness", "eigenvalue"), "eigenvalue", log=True, evaluation="sharpness")
_add("sharpness_rise", _evaluated("sharpness", "rise"), "nats", evaluation="sharpness")
for _where in ("first", "middle", "last"):
    _add(f"rank_{_where}", _evaluated("representation", f"rank_{_where}"), "dimensions", better="higher", log=True,
         evaluation="representation")  # fmt: skip
_add("calibration", _evaluated("calibration", "error"), "share", evaluation="calibration")
_add("memorization", _evaluated("memorization", "excess"), "share", evaluation="memorization", discrete=True)
for _name in ("macro_f1", "probe_macro_f1", "accuracy"):
    _add(_name, _summary(_name), "share", better="higher")


def measure(name: str) -> Measure:
    """The measure called `name`; domains.<corpus> is bits per byte on any other corpus; column.<name> is a column of
    runs of another trainer as it stands, ratio.<name> the same judged as a log ratio."""
    kind, _, metric = name.partition(".")
    if kind in ("column", "ratio") and metric:
        return Measure(name, _summary(metric), metric, log=kind == "ratio")
    if name.startswith("domains."):
        corpus = name.partition(".")[2]
        if corpus not in (corpora := options()["data"]):
            raise ConfigError(f"measure={name} is unknown: a corpus is one of {nearest(corpus, corpora)}.")
        return Measure(name, _evaluated("domains", corpus), "bits per byte", log=True, evaluation="domains")
    if name not in MEASURES:
        near = nearest(name, [*MEASURES, "domains.<corpus>", "column.<name>", "ratio.<name>"])
        raise ConfigError(f"measure={name} is unknown: it is one of {near}.")
    return MEASURES[name]
