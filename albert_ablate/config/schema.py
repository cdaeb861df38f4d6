"""The keys of a configuration: one dataclass a section. `check` makes them; they are read-only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from albert_ablate.config.types import Component, Count, NonNegative, NonNegativeInt, Range


class Section(Mapping[str, Any]):
    """Keys as attributes, `cfg.budget.tokens`, and as a mapping, as YAML and records have them."""

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys_of():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of())

    def __len__(self) -> int:
        return len(self.keys_of())

    @classmethod
    def keys_of(cls) -> tuple[str, ...]:
        """The keys that it always has."""
        return tuple(cls.__annotations__)


@dataclass(frozen=True, eq=False)
class Budget(Section):
    """Training budget in tokens."""

    tokens: Count


@dataclass(frozen=True, eq=False)
class Paths(Section):
    """Folders of runs and of cached files."""

    runs: str
    cache: str | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint(Section):
    """How often a run commits: seconds between commits, beside those at evaluations."""

    seconds: NonNegative = 30.0


@dataclass(frozen=True, eq=False)
class Diagnostics(Section):
    """How often a step is measured layer by layer."""

    every: NonNegativeInt | None = None  # steps; null: about 40 times over the budget


@dataclass(frozen=True, eq=False)
class Evaluation(Section):
    """As a mapping it holds `parts` too, each under its name."""

    every: Count | None = None  # tokens; null: 20 times over the budget
    tokens: Count = 8_192
    weights: Literal["last", "best"] = "last"  # those that the evaluations at the end are of
    parts: Mapping[str, Component] = field(default_factory=dict)  # what is evaluated at the end of the run, by name

    def __getitem__(self, key: str) -> Any:
        return self.parts[key] if key in self.parts else super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        yield from (*self.parts, *self.keys_of())

    def __len__(self) -> int:
        return len(self.parts) + len(self.keys_of())

    @classmethod
    def keys_of(cls) -> tuple[str, ...]:
        return tuple(key for key in cls.__annotations__ if key != "parts")


@dataclass(frozen=True, eq=False)
class Trainer(Section):
    """Hardware and numerics: accelerator, devices, strategy, precision, threads, compilation."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: Literal[-1] | Annotated[int, Range(1, 1024)] = 1  # of each node; -1: all its GPUs
    num_nodes: Annotated[int, Range(1, 10_000)] = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    threads: Annotated[int, Range(1, 1024)] | None = None
    deterministic: bool = False
    gradient_checkpointing: bool = False  # the same numbers in less memory
    compile: bool = False  # rounds differently, so it is another setting
    graph: bool | Literal["auto"] = False  # steps as CUDA graphs; another setting, too, unless false


@dataclass(frozen=True, eq=False)
class Config(Section):
    """The root of a configuration. `choices` names the option taken in each group; Hydra fills it in."""

    model: Component
    norm: Component
    norm_type: Component
    attention: Component
    dropout: Component
    dropout_time: Component
    optimizer: Component
    schedule: Component
    clip: Component
    loss: Component
    data: Component
    tokenizer: Component
    task: Component
    logger: Component
    trainer: Trainer
    evaluation: Evaluation
    budget: Budget
    paths: Paths
    checkpoint: Checkpoint
    diagnostics: Diagnostics
    seed: Annotated[int, Range(0, 10**18)] = 0
    force: bool = False
    accept_code: bool = False
    debug: bool = False
    choices: dict | None = None

    def option(self, group: str) -> str:
        """The option taken in a group; where none is noted, the name of its class or function."""
        return (self.choices or {}).get(group) or self[group]["_target_"].rpartition(".")[2]


COMPONENTS = [f.name for f in fields(Config) if f.type is Component]
# what a group that came later does where it does nothing: left out, so that runs from before it are found
DEFAULT_TARGETS = {
    "dropout_time": "albert_ablate.model.dropout.Constant",
    "task": "albert_ablate.data.tasks.LanguageModeling",
}
MULTI_CHOICE_GROUPS = ("logger",)  # groups of which several options may be taken at once
