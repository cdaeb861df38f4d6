"""Which columns of somebody else's runs hold the arm, the seed and the metrics.

    source: wandb:team/project         # or a table, a folder of TensorBoard's event files, or mlflow:URI/EXPERIMENT
    arm: [optimizer, config.lr]        # one column, or several that make up an arm together
    seed: config.seed
    metrics: {val_loss: eval/loss, test_loss: test/loss}    # name here: column there
    step: _step
    tokens: tokens_seen                # or tokens_per_step: 65_536
    status: state                      # finished, running, failed, crashed, killed, stopped or diverged
    settings: {lr: config.lr}          # settings to show beside an arm
    run: (?P<arm>.+)-(?P<seed>\\d+)     # takes columns out of a run's name

Only `source` is needed where the columns are called arm and seed. Names of metrics that this project knows (val_loss,
train_loss, test_loss, ...) have its unit; others are declared where a claim asks for them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError, nearest, read_yaml
from albert_ablate.config.errors import shown

# "gpt2-muon_seed3", "adam/seed=3", "adam/3": how folders of seeds are usually called
RUN_NAME = r"(?P<arm>.+?)(?:[-_/. ]*seed[-_=]?|[-_/])(?P<seed>\d+)(?:/.*)?"
TABLES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
MAPPINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Columns:
    """Where in a source's columns everything stands; see this file's head."""

    source: str
    arm: tuple[str, ...] = ("arm",)
    seed: str = "seed"
    metrics: Mapping[str, str] | None = None  # None: every column of numbers is a metric
    step: str = "step"
    tokens: str = "tokens"
    tokens_per_step: float | None = None
    status: str = "status"
    settings: Mapping[str, str] = field(default_factory=dict)
    run: str = RUN_NAME
    folder: Path = Path()  # in which relative sources lie
    given: frozenset[str] = frozenset()  # keys that the file has: their columns must be there


def read_mapping(path: Path) -> Columns:
    """The mapping in a YAML file; ConfigError in one sentence for what is not allowed."""
    tree = read_yaml(path)
    try:
        return _columns(tree, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _columns(tree: Any, folder: Path) -> Columns:
    allowed = [f for f in Columns.__dataclass_fields__ if f not in ("folder", "given")]
    if not isinstance(tree, Mapping):
        raise ConfigError(f"a mapping holds {', '.join(allowed)}, not {shown(tree)}.")
    if "claims" in tree or "parameters" in tree:
        raise ConfigError("this is a claims or sweep file, not a mapping of another trainer's runs.")
    for key in tree:
        if key not in allowed:
            raise ConfigError(f"{key} is unknown: a mapping holds {nearest(str(key), allowed)}.")
    if not isinstance(tree.get("source"), str):
        raise ConfigError("source is missing: a table, a folder, wandb:team/project or mlflow:URI/EXPERIMENT.")
    columns: dict[str, Any] = {**tree}
    columns["arm"] = tuple([tree["arm"]] if isinstance(tree.get("arm"), str) else tree.get("arm", ("arm",)))
    for key in ("seed", "step", "tokens", "status", "run"):
        if key in tree and not isinstance(tree[key], str):
            raise ConfigError(f"{key}={shown(tree[key])} is not allowed: it is the name of a column.")
    if not columns["arm"] or not all(isinstance(a, str) for a in columns["arm"]):
        raise ConfigError(f"arm={shown(tree['arm'])} is not allowed: a column, or a list of columns.")
    for key in ("metrics", "settings"):
        group = tree.get(key, {})
        if not isinstance(group, Mapping) or not all(isinstance(x, str) for pair in group.items() for x in pair):
            raise ConfigError(f"{key}={shown(group)} is not allowed: names here, and the columns they stand for.")
    size = tree.get("tokens_per_step")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | float) or not size > 0):
        raise ConfigError(f"tokens_per_step={shown(size)} is not allowed: a number above 0.")
    try:
        re.compile(columns.get("run", RUN_NAME))
    except re.error as error:
        raise ConfigError(f"run={columns['run']} is not a regular expression: {error}.") from None
    return Columns(**columns, folder=folder, given=frozenset(tree))
