"""The keys of a configuration: one dataclass a section."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from albert_ablate.config.types import Component, Count, NonNegative, Range, Whole


@dataclass
class Budget:
    tokens: Count


@dataclass
class Paths:
    runs: str
    cache: str | None = None


@dataclass
class Checkpoint:
    seconds: NonNegative = 30.0


@dataclass
class Diagnostics:
    every: Whole | None = None  # steps; null: about 40 times over the budget


@dataclass
class Evaluation:
    """Besides these it holds, each under its name, the components that are done at the end of the run."""

    every: Count | None = None  # tokens; null: 20 times over the budget
    tokens: Count = 8_192
    weights: Literal["last", "best"] = "last"  # those that the evaluations at the end are of


@dataclass
class Trainer:
    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: Literal[-1] | Annotated[int, Range(1, 1024)] = 1  # of each node; -1: all its GPUs
    num_nodes: Annotated[int, Range(1, 10_000)] = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    threads: Annotated[int, Range(1, 1024)] | None = None
    deterministic: bool = False
    gradient_checkpointing: bool = False  # the same numbers in less memory
    compile: bool = False  # rounds differently, so it is another setting


@dataclass
class Config:
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
    debug: bool = False
    choices: dict | None = None


COMPONENTS = [f.name for f in fields(Config) if f.type is Component]
# what a group that came later does where it does nothing: left out, so that runs from before it are found
NEUTRAL = {
    "dropout_time": "albert_ablate.model.dropout.Constant",
    "task": "albert_ablate.data.tasks.LanguageModeling",
}
SEVERAL = ("logger",)  # groups of which several options may be taken at once
