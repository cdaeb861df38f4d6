"""W&B sweep files read without W&B: one file, the same settings under `wandb agent` and under `albert-ablate sweep`."""

import contextlib
import json
import math
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError, given_twice, nearest, options, read_yaml, study_file
from albert_ablate.config.untrusted import refuse_untrusted
from albert_ablate.studies.distributions import CONTINUOUS, QUANTIZED, RANGE, TAIL_PROBABILITY, Parameter
from albert_ablate.studies.sweep_settings import Sweep, refuse_places, written

KEYS = ("method", "parameters", "metric", "run_cap", "command", "program", "name", "description", "project", "entity")
METHODS = ("grid", "random", "bayes")
PROGRAM = "run.py"
# where a command takes a run's values, in the forms that run.py reads under `wandb agent`
ARGUMENTS = ("${args}", "${args_no_hyphens}", "${args_append_hydra}", "${args_override_hydra}")
MAX_GRID_VALUES = 10_000  # values of one parameter of a grid
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def read_sweep(path: str | Path) -> Sweep:
    """The sweep in a W&B sweep file, or in the shipped one of this name.

    Raises ConfigError for what is not supported, naming its key.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Of a key that stands twice YAML would take the last, and leave out the first without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise ConfigError(f"{path}: {twice[0]} is given twice.")
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
        sweep = _sweep(Path(name), tree, served=True)
        refuse_untrusted(sweep.fixed)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return sweep


def _sweep(path: Path, tree: Any, served: bool = False) -> Sweep:
    if isinstance(tree, Mapping) and "claims" in tree and "parameters" not in tree:
        raise ConfigError("this is a file of claims, not a sweep file: `albert-ablate judge` takes it.")
    if not isinstance(tree, Mapping) or not isinstance(tree.get("parameters"), Mapping) or not tree["parameters"]:
        raise ConfigError("a sweep file holds method and parameters.")
    for key in tree:
        if key == "early_terminate":
            raise ConfigError("early_terminate is not supported: remove it; every run of an arm gets its whole budget.")
        if key not in KEYS:
            raise ConfigError(f"{key} is not supported: a sweep file holds {nearest(str(key), KEYS)}.")
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
            raise ConfigError(f"{p.name} is set in the parameters and in the command ({twice[0]}): leave one out.")
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
                raise ConfigError(f"{dotted} is given twice.")
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
        if not _is_number(value):
            hint = "; YAML reads a number without a point as text, write 1.0e-3" if isinstance(value, str) else ""
            raise ConfigError(f"{name}: {key}={value} is not allowed: it must be a number{hint}.")
    arguments: dict[str, Any] = {key: given.get(key, default) for key, default in takes.items()}
    if missing := [key for key, value in arguments.items() if value is None]:
        raise ConfigError(f"{name}: {distribution} needs {' and '.join(missing)}.")
    _check_arguments(name, distribution, arguments)
    parameter = Parameter(name, distribution=distribution, arguments=arguments)
    with contextlib.suppress(OverflowError):
        if all(math.isfinite(parameter.at(u)) for u in (TAIL_PROBABILITY, 1 - TAIL_PROBABILITY)):
            return parameter
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
    base = QUANTIZED.get(str(distribution), str(distribution))
    if base not in CONTINUOUS:
        known = ["constant", "categorical", "categorical_w_probabilities", "int_uniform", *CONTINUOUS, *QUANTIZED]
        raise ConfigError(f"{name}: distribution={distribution} is unknown: it is one of {', '.join(known)}.")
    return CONTINUOUS[base][0] | ({"q": 1.0} if distribution in QUANTIZED else {})


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; a whole one may be too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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
    listed = given.pop(key)
    weights = given.pop("probabilities", None) if key == "values" else None
    if given:
        raise ConfigError(f"{name}.{next(iter(given))} is unknown beside {key}.")
    if distribution is not None and distribution not in kinds[key]:
        raise ConfigError(f"{name}: distribution={distribution} takes no {key}.")
    values = listed if key == "values" else [listed]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name}: values={reprlib.repr(values)} is not allowed: it must be a list of one or more.")
    values = [_value(name, v) for v in values]
    if len({json.dumps(v) for v in values}) < len(values):
        raise ConfigError(f"{name}: a value is repeated in {reprlib.repr(listed)}.")
    if weights is not None and (
        not isinstance(weights, list)
        or len(weights) != len(values)
        or not all(_is_number(w) and w >= 0 for w in weights)
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


CLASSIFICATION_METRICS = (
    "val_macro_f1",
    "macro_f1",
    "accuracy",
    "probe_macro_f1",
    "probe_accuracy",
)  # of task=classify
LOSSES = ("val_loss", "best_val_loss", "val_bits_per_byte", "val_perplexity", "train_loss", "gap", "test_loss")
METRICS = (*LOSSES, *CLASSIFICATION_METRICS)


def _metric(metric: Any, method: str) -> tuple[str | None, bool]:
    if metric is None:
        if method == "bayes":
            raise ConfigError("metric is missing: method=bayes needs a name and a goal.")
        return None, False
    if not isinstance(metric, Mapping) or metric.get("name") not in METRICS:
        raise ConfigError(f"metric={metric} is not allowed: its name must be one of {', '.join(METRICS)}.")
    for key in metric:
        if key not in ("name", "goal"):
            raise ConfigError(f"metric.{key} is not supported: a metric has a name and a goal.")
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
                f"command: {word} before the program is not supported: without a server no command is run; set the "
                "variable where `albert-ablate sweep` is called."
            )
    fixed = [w for w in words[place + 1 :] if w not in ARGUMENTS]
    for word in fixed:
        if "${" in word or "=" not in word or word.startswith("-"):
            raise ConfigError(
                f"command: {word} is not supported: after the program stand key=value and {' or '.join(ARGUMENTS)}."
            )
    fixed = [w.lstrip("+") for w in fixed]
    if twice := given_twice(fixed):
        raise ConfigError(f"command: {twice[0]} is given twice.")
    return tuple(fixed)
