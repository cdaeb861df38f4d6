"""W&B sweep files read without W&B: one file, the same settings under `wandb agent` and under `albert-ablate sweep`."""

import contextlib
import itertools
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albert_ablate.config import (
    ConfigError,
    each_once,
    given_twice,
    lacking,
    nearest,
    options,
    quoted,
    read_yaml,
    study_file,
)
from albert_ablate.config.untrusted import WORD, refuse_untrusted
from albert_ablate.streams import stream_seed

KEYS = ("method", "parameters", "metric", "run_cap", "command", "program", "name", "description", "project", "entity")
METHODS = ("grid", "random", "bayes")
PROGRAM = "run.py"
# where a command takes a run's values, in the forms that run.py reads under `wandb agent`
ARGUMENTS = ("${args}", "${args_no_hyphens}", "${args_append_hydra}", "${args_override_hydra}")
REFUSALS = 50  # draws or proposals in a row that are refused, before no more are tried
TAIL_PROBABILITY = 1e-6  # of the cumulative probability: the ends of a distribution
MAX_GRID_VALUES = 10_000  # values of one parameter of a grid
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def _normal(u: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(u))


def _beta(u: float, a: float, b: float) -> float:
    from scipy.special import betaincinv

    return float(betaincinv(a, b, u))


def _between(u: float, low: float, high: float) -> float:
    return low + u * (high - low)


RANGE: dict[str, float | None] = {"min": None, "max": None}
NORMAL: dict[str, float | None] = {"mu": 0.0, "sigma": 1.0}
# W&B's distributions: their arguments with the defaults (None: required) and the value at which the cumulative
# probability is u. Each but the inverse ones has a form q_...: the value rounded to a multiple of q.
CONTINUOUS: dict[str, tuple[dict[str, float | None], Callable[..., float]]] = {
    "uniform": (RANGE, lambda u, min, max: _between(u, min, max)),
    "log_uniform": (RANGE, lambda u, min, max: math.exp(_between(u, min, max))),  # min and max are exponents
    "log_uniform_values": (RANGE, lambda u, min, max: math.exp(_between(u, math.log(min), math.log(max)))),
    "inv_log_uniform": (RANGE, lambda u, min, max: math.exp(-_between(1 - u, min, max))),
    "inv_log_uniform_values": (RANGE, lambda u, min, max: math.exp(_between(u, math.log(min), math.log(max)))),
    "normal": (NORMAL, lambda u, mu, sigma: mu + sigma * _normal(u)),
    "log_normal": (NORMAL, lambda u, mu, sigma: math.exp(mu + sigma * _normal(u))),
    "beta": ({"a": 1.0, "b": 1.0}, _beta),
}
QUANTIZED = {f"q_{name}": name for name in CONTINUOUS if not name.startswith("inv_")}


@dataclass(frozen=True)
class Parameter:
    """A key and what it may be: `values` (with `probabilities`, or equally likely), or a distribution's arguments."""

    name: str
    values: tuple = ()
    probabilities: tuple[float, ...] = ()
    distribution: str = ""
    arguments: Mapping[str, float] = field(default_factory=dict)

    def at(self, u: float) -> Any:
        """The value at which the cumulative probability is u, 0 < u < 1."""
        if self.values:
            shares = self.probabilities or [1 / len(self.values)] * len(self.values)
            passed = sum(u > total for total in itertools.accumulate(shares))
            return self.values[min(passed, len(self.values) - 1)]
        arguments = dict(self.arguments)
        if self.distribution == "int_uniform":
            low, high = int(arguments["min"]), int(arguments["max"])
            return min(high, low + math.floor(u * (high - low + 1)))
        q = arguments.pop("q", None)
        value = CONTINUOUS[QUANTIZED.get(self.distribution, self.distribution)][1](u, **arguments)
        if q is None:
            return value
        steps = round(value / q)
        return steps * q if isinstance(q, int) else float(f"{steps * q:.12g}")  # 0.3, not 0.30000000000000004

    def draw(self, index: int) -> Any:
        """The value of the sweep's run `index`: a function of the parameter as it is written, and of nothing else."""
        spec = [list(self.values), list(self.probabilities), self.distribution, dict(self.arguments)]
        seed = stream_seed(0, "sweep", self.name, json.dumps(spec), index)
        return self.at((seed + 0.5) / 2**63)


@dataclass(frozen=True)
class Sweep:
    """A sweep file. `fixed` are the overrides its command gives to every run."""

    path: Path
    method: str
    parameters: tuple[Parameter, ...]
    fixed: tuple[str, ...] = ()
    run_cap: int | None = None
    metric: str | None = None
    maximize: bool = False

    @property
    def varied(self) -> list[str]:
        """The keys that have more than one value."""
        return [p.name for p in self.parameters if len(p.values) != 1]

    def settings(self) -> list[dict[str, Any]]:
        """The values of each run, seeds outermost: the first seed of all arms comes before the second of any.

        Of a grid the product; random: `run_cap` draws, of which a larger run_cap keeps the first and adds to them.
        """
        if self.method == "bayes":
            raise ConfigError(
                f"{self.path}: method=bayes finds its settings as it goes: `albert-ablate sweep` trains it."
            )
        if self.method == "random":
            assert self.run_cap is not None
            return [self.draw(i) for i in range(self.run_cap)]
        return self._grid()[0][: self.run_cap]

    def draw(self, index: int) -> dict[str, Any]:
        """The setting of a random sweep's run `index`."""
        return self.folded({p.name: p.draw(index) for p in self.parameters})

    @property
    def repeated(self) -> int:
        """How many combinations of a grid are settings that another combination gives already."""
        return self._grid()[1] if self.method == "grid" else 0

    def _grid(self) -> tuple[list[dict[str, Any]], int]:
        """The settings that differ, and how many combinations do not."""
        order = sorted(self.parameters, key=lambda p: p.name != "seed")
        names = [p.name for p in order]
        found: dict[str, dict[str, Any]] = {}
        combinations = 0
        for combinations, values in enumerate(itertools.product(*[p.values for p in order]), 1):  # noqa: B007
            setting = self.folded(dict(zip(names, values, strict=True)))
            found.setdefault(json.dumps(setting, sort_keys=True), setting)
        return [*found.values()], combinations - len(found)

    def folded(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """A setting without the keys that its option lacks and another option of the sweep has.

        In a grid of dropout over none and uniform and of dropout.mean, dropout=none has no mean.
        """
        listed = {p.name: p.values for p in self.parameters}

        def others(group: str) -> Sequence[Any]:
            return listed.get(group, ())

        return {key: value for key, value in setting.items() if not lacking(key, setting, others)}


def written(value: Any) -> str:
    """A value as an override holds it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    return quoted(value) if isinstance(value, str) and not WORD.fullmatch(value) else str(value)


def overrides_of(setting: Mapping[str, Any]) -> list[str]:
    """Values by key as `key=value`."""
    return [f"{key}={written(value)}" for key, value in setting.items()]


def read_sweep(path: str | Path) -> Sweep:
    """The sweep in a W&B sweep file, or in the shipped one of this name.

    Raises ConfigError for what cannot be honoured, naming its key.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Of a key that stands twice YAML would take the last, and leave out the first without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise ConfigError(f"{path}: {twice[0]} stands twice.")
            return super().construct_mapping(node, deep)

    path = study_file(path)
    tree = read_yaml(path, Loader)
    try:
        return _sweep(path, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def served_sweep(name: str, tree: Any) -> Sweep:
    """The sweep that a server keeps under this name. What the server does itself may be in it: stopping early, ending.

    Raises ConfigError for what a server may not decide.
    """
    theirs = ("early_terminate", "metric", "run_cap", "settings", "controller", "scheduler")
    tree = {k: v for k, v in tree.items() if k not in theirs} if isinstance(tree, Mapping) else tree
    try:
        found = _sweep(Path(name), tree, served=True)
        refuse_untrusted(found.fixed)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return found


def _sweep(path: Path, tree: Any, served: bool = False) -> Sweep:
    if isinstance(tree, Mapping) and "claims" in tree and "parameters" not in tree:
        raise ConfigError("this is a file of claims, not a sweep file: `albert-ablate judge` takes it.")
    if not isinstance(tree, Mapping) or not isinstance(tree.get("parameters"), Mapping) or not tree["parameters"]:
        raise ConfigError("a sweep file holds method and parameters.")
    for key in tree:
        if key == "early_terminate":
            raise ConfigError("early_terminate cannot be honoured: leave it out; every run of an arm gets its budget.")
        if key not in KEYS:
            raise ConfigError(f"{key} cannot be honoured: a sweep file holds {nearest(str(key), KEYS)}.")
    method = tree.get("method")
    if method not in METHODS:
        raise ConfigError(f"method={method} is not allowed: it must be one of {', '.join(METHODS)}.")
    cap = tree.get("run_cap")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise ConfigError(f"run_cap={cap} is not allowed: it must be a whole number at least 1.")
    if cap is None and method != "grid" and not served:
        raise ConfigError(f"run_cap is missing: method={method} would never end.")
    parameters = tuple(_parameter(name, spec) for name, spec in dict(_flat(tree["parameters"])).items())
    if method == "grid":
        parameters = tuple(map(_all_values, parameters))
    metric, maximize = (None, False) if served else _metric(tree.get("metric"), method)
    if method == "bayes" and not served and any(p.name == "seed" and len(p.values) != 1 for p in parameters):
        raise ConfigError("seed has several values: method=bayes would look for the luckiest; give it one value.")
    fixed = _command(tree)
    if not served:
        refuse_places(fixed, "command")
    known = options()
    for p in parameters:
        for value in p.values if p.name in known and p.name not in ("logger", "evaluation") else ():
            if value not in known[p.name]:
                near = nearest(str(value), known[p.name])
                raise ConfigError(f"{p.name}={written(value)} is not an option: {p.name} is one of {near}.")
        if twice := [o for o in fixed if o.partition("=")[0] == p.name]:
            raise ConfigError(f"{p.name} stands in the parameters and in the command ({twice[0]}): leave one out.")
        for value in p.values or (p.at(0.5),):
            refuse_untrusted([f"{p.name}={written(value)}"], own_file=not served)
    return Sweep(path, method, parameters, fixed, cap, metric, maximize)


def _flat(parameters: Mapping, above: str = "") -> Iterator[tuple[str, Any]]:
    """Parameters by their dotted key: `optimizer: {parameters: {lr: ...}}`, W&B's nesting, is `optimizer.lr: ...`."""
    seen = set[str]()
    for key, spec in parameters.items():
        name = f"{above}{key}"
        nested = isinstance(spec, Mapping) and "parameters" in spec
        if nested and (len(spec) > 1 or not isinstance(spec["parameters"], Mapping) or not spec["parameters"]):
            raise ConfigError(f"{name}.parameters must hold keys and their values, and nothing may stand beside it.")
        for dotted, inner in _flat(spec["parameters"], f"{name}.") if nested else [(name, spec)]:
            if dotted in seen:
                raise ConfigError(f"{dotted} stands twice.")
            seen.add(dotted)
            yield dotted, inner


def _parameter(name: str, spec: Any) -> Parameter:
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{name} holds value, values or a distribution, not {reprlib.repr(spec)}.")
    given = dict(spec)
    distribution = given.pop("distribution", None)
    if "value" in given or "values" in given:
        return _listed(name, given, distribution)
    if distribution is None:
        whole = all(isinstance(given.get(k), int) for k in ("min", "max"))
        distribution = "int_uniform" if whole else "uniform"
    elif distribution == "int_uniform" and not all(isinstance(given.get(k), int) for k in ("min", "max")):
        raise ConfigError(f"{name}: int_uniform needs whole numbers as min and max.")
    takes = _arguments(name, distribution)
    for key, value in given.items():
        if key not in takes:
            raise ConfigError(f"{name}.{key} is unknown: {distribution} takes {', '.join(takes)}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            hint = "; YAML reads a number without a point as text, write 1.0e-3" if isinstance(value, str) else ""
            raise ConfigError(f"{name}: {key}={value} is not allowed: it must be a number{hint}.")
    arguments: dict[str, Any] = {key: given.get(key, default) for key, default in takes.items()}
    if missing := [key for key, value in arguments.items() if value is None]:
        raise ConfigError(f"{name}: {distribution} needs {' and '.join(missing)}.")
    _check_arguments(name, distribution, arguments)
    found = Parameter(name, distribution=distribution, arguments=arguments)
    with contextlib.suppress(OverflowError):
        if all(math.isfinite(found.at(u)) for u in (TAIL_PROBABILITY, 1 - TAIL_PROBABILITY)):
            return found
    raise ConfigError(f"{name}: {distribution} of {arguments} has values that no number can hold.")


def _all_values(parameter: Parameter) -> Parameter:
    """As W&B's grid takes it: int_uniform and q_uniform stand for all their values, of q_uniform without the end."""
    name, given = parameter.name, parameter.arguments
    if parameter.values:
        if parameter.probabilities:
            raise ConfigError(f"{name}: probabilities would do nothing: method=grid takes every value.")
        return parameter
    if parameter.distribution not in ("int_uniform", "q_uniform"):
        raise ConfigError(f"{name} has a distribution: method=grid needs value, values, int_uniform or q_uniform.")
    step = given.get("q", 1)
    if (given["max"] - given["min"]) / step > MAX_GRID_VALUES:
        raise ConfigError(f"{name} has more than {MAX_GRID_VALUES:,} values, which no grid goes through.")
    import numpy as np

    end = given["max"] + 1 if parameter.distribution == "int_uniform" else given["max"]
    return Parameter(name, tuple(np.arange(given["min"], end, step).tolist()))  # to the last bit as W&B has them


def _arguments(name: str, distribution: Any) -> dict[str, float | None]:
    """The arguments a distribution takes, with their defaults."""
    if distribution == "int_uniform":
        return dict(RANGE)
    base = QUANTIZED.get(distribution, distribution)
    if base not in CONTINUOUS:
        known = ["constant", "categorical", "categorical_w_probabilities", "int_uniform", *CONTINUOUS, *QUANTIZED]
        raise ConfigError(f"{name}: distribution={distribution} is unknown: it is one of {', '.join(known)}.")
    return CONTINUOUS[base][0] | ({"q": 1.0} if distribution in QUANTIZED else {})


def _check_arguments(name: str, distribution: str, arguments: Mapping[str, Any]) -> None:
    low, high = arguments.get("min"), arguments.get("max")
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"{name}: min={low} must be below max={high}.")
    if low is not None and distribution.endswith("_values") and low <= 0:
        raise ConfigError(f"{name}: min={low} is not allowed: {distribution} needs it above 0.")
    for key in ("sigma", "q", "a", "b"):
        if arguments.get(key, 1) <= 0:
            raise ConfigError(f"{name}: {key}={arguments[key]} is not allowed: it must be above 0.")


def _listed(name: str, given: dict, distribution: str | None) -> Parameter:
    kinds = {"value": ("constant",), "values": ("categorical", "categorical_w_probabilities")}
    key = "value" if "value" in given else "values"
    found = given.pop(key)
    weights = given.pop("probabilities", None) if key == "values" else None
    if given:
        raise ConfigError(f"{name}.{next(iter(given))} is unknown beside {key}.")
    if distribution is not None and distribution not in kinds[key]:
        raise ConfigError(f"{name}: distribution={distribution} takes no {key}.")
    values = found if key == "values" else [found]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name}: values={reprlib.repr(values)} is not allowed: it must be a list of one or more.")
    values = [_value(name, v) for v in values]
    if len({json.dumps(v) for v in values}) < len(values):
        raise ConfigError(f"{name}: a value stands twice in {reprlib.repr(found)}.")
    if weights is not None and (
        not isinstance(weights, list)
        or len(weights) != len(values)
        or not all(isinstance(w, int | float) and not isinstance(w, bool) and w >= 0 for w in weights)
        or not math.isclose(sum(weights), 1, rel_tol=1e-6)
    ):
        raise ConfigError(f"{name}: probabilities={weights} is not allowed: one for each value, and their sum 1.")
    return Parameter(name, tuple(values), tuple(weights or ()))


def _value(name: str, value: Any, inner: bool = False) -> Any:
    """A listed value; 1e-3, which YAML reads as text, is the number that the command would read.

    "None" is null: `wandb agent` writes null so.
    """
    if isinstance(value, list) and not inner:
        return [_value(name, v, inner=True) for v in value]
    if value in (None, "None") and not inner:
        return None
    if value is None or isinstance(value, Mapping):
        raise ConfigError(
            f"{name}={'null' if value is None else reprlib.repr(value)} is not allowed: an agent would hand over "
            f"Python's {reprlib.repr(value)}; vary the option, or its dotted keys."
        )
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(f"{name}={reprlib.repr(value)} is not allowed: it must be a number, text, or a list of them.")
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


DECISIONS = ("val_macro_f1", "macro_f1", "accuracy", "probe_macro_f1", "probe_accuracy")  # of task=classify
LOSSES = ("val_loss", "best_val_loss", "val_bits_per_byte", "val_perplexity", "train_loss", "gap", "test_loss")
METRICS = (*LOSSES, *DECISIONS)


def _metric(metric: Any, method: str) -> tuple[str | None, bool]:
    if metric is None:
        if method == "bayes":
            raise ConfigError("metric is missing: method=bayes needs a name and a goal.")
        return None, False
    if not isinstance(metric, Mapping) or metric.get("name") not in METRICS:
        raise ConfigError(f"metric={metric} is not allowed: its name must be one of {', '.join(METRICS)}.")
    for key in metric:
        if key not in ("name", "goal"):
            raise ConfigError(f"metric.{key} cannot be honoured: a metric has a name and a goal.")
    goal = metric.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise ConfigError(f"metric.goal={goal} is not allowed: it must be minimize or maximize.")
    return metric["name"], goal == "maximize"


def _command(tree: Mapping) -> tuple[str, ...]:
    """The overrides that a command gives to every run: `key=value` after the program.

    Without a server no command is run, so any interpreter may stand before the program, or no command at all.
    """
    program = str(tree.get("program", PROGRAM))
    if Path(program).name != PROGRAM:
        raise ConfigError(f"program={program} is not allowed: it must be {PROGRAM}.")
    command = tree.get("command")
    if command is None:
        return ()
    words = [str(word) for word in command] if isinstance(command, list) else []
    place = next((i for i, w in enumerate(words) if w == "${program}" or Path(w).name == PROGRAM), None)
    if place is None or not set(ARGUMENTS) & set(words[place + 1 :]):
        raise ConfigError(
            f"command={reprlib.repr(command)} is not allowed: it must be a list with {PROGRAM} or ${{program}} and "
            f"after it one of {', '.join(ARGUMENTS)}, or be left out."
        )
    for word in words[:place]:
        if "=" in word and not word.startswith("-"):
            raise ConfigError(
                f"command: {word} before the program cannot be honoured: without a server no command is run; set the "
                "variable where `albert-ablate sweep` is called."
            )
    fixed = [w for w in words[place + 1 :] if w not in ARGUMENTS]
    for word in fixed:
        if "${" in word or "=" not in word or word.startswith("-"):
            raise ConfigError(
                f"command: {word} cannot be honoured: after the program stand key=value and {' or '.join(ARGUMENTS)}."
            )
    fixed = [w.lstrip("+") for w in fixed]
    if twice := given_twice(fixed):
        raise ConfigError(f"command: {twice[0]} stands twice.")
    return tuple(fixed)


def refuse_places(overrides: Iterable[str], where: str) -> None:
    """Raise ConfigError for an override that says where the runs lie, which `--runs` does."""
    for override in overrides:
        if override.lstrip("+").partition("=")[0] in ("paths.runs", "paths"):
            raise ConfigError(f"{where}: {override} cannot be honoured: the folder of the runs is given by --runs.")


def own_overrides(overrides: Iterable[str]) -> list[str]:
    """Overrides of a command line, each key once: of one given twice the last counts, which is said.

    Raises ConfigError for one that says where the runs lie.
    """
    overrides = list(overrides)
    refuse_places(overrides, "command line")
    return each_once(overrides)


def asked(sweep: Sweep, setting: Mapping[str, Any], more: Iterable[str] = ()) -> dict[str, str]:
    """The overrides of a setting's run, by key: the file's, the setting's, and `more`, of which the last counts."""
    by_key = {o.partition("=")[0].lstrip("+"): o for o in [*sweep.fixed, *overrides_of(setting), *more]}
    kept = sweep.folded({key: o.partition("=")[2] for key, o in by_key.items()})
    return {key: by_key[key] for key in kept}


# groups and keys that do not determine the weights
ASIDE = ("seed", "paths", "logger", "evaluation", "diagnostics", "checkpoint", "force", "debug")


def of_arm(overrides: Mapping[str, str]) -> tuple[str, ...]:
    """Those of a run's overrides by key that may make its arm or its learning rate."""
    return tuple(o for k, o in overrides.items() if k.partition(".")[0] not in ASIDE and k != "trainer.threads")


def varied_labels(sweep: Sweep, settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A name for the arm of each setting: what varies between them, the seed left out."""
    keys = [key for key in sweep.varied if key != "seed"]
    for setting in settings:
        has = {k: setting[k] for k in keys if k in setting}
        shown = [f"{k}={f'{v:g}' if isinstance(v, float) else written(v)}" for k, v in has.items()]
        yield " ".join(shown) or sweep.path.stem
