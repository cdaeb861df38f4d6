"""What a configuration may hold: types, ranges, checks across groups, and the identity of an arm, a setting and a run.

The schema is read off the code: root keys from the dataclass `Config`, the keys of a component (a node with
`_target_`) from the signature of its target. Parameters before a `/` are filled in by the code, not configured.
Whatever a user can get wrong raises `ConfigError` with one sentence naming the key, its value and what is allowed.
"""

from albert_ablate.config.checking import check
from albert_ablate.config.components import (
    HYDRA_KEYS,
    component_arguments,
    component_with_defaults,
    conf_folder,
    construct,
    lacking,
    option_keys,
    options,
    parameters_of,
    target_of,
)
from albert_ablate.config.composing import compose, composition, each_once, given_twice, prepared, with_choices
from albert_ablate.config.errors import (
    ConfigError,
    as_config_error,
    file_trouble,
    nearest,
    quoted,
    read_yaml,
    unwritable,
)
from albert_ablate.config.identities import (
    NUISANCE,
    REVISIONS,
    SIGNIFICANT,
    Identity,
    corrections,
    identity,
    is_outdated,
    revisions,
    run_identity,
    significant,
)
from albert_ablate.config.rules import evaluations_of, steps_of
from albert_ablate.config.schema import COMPONENTS, NEUTRAL
from albert_ablate.config.types import (
    Component,
    Count,
    Elsewhere,
    Fraction,
    Location,
    NonNegative,
    Positive,
    Probability,
    Range,
    Whole,
    checked,
    describe,
)

__all__ = [  # fmt: skip
    "COMPONENTS",
    "Component",
    "ConfigError",
    "Count",
    "Elsewhere",
    "Fraction",
    "HYDRA_KEYS",
    "Identity",
    "Location",
    "NEUTRAL",
    "NUISANCE",
    "NonNegative",
    "Positive",
    "Probability",
    "REVISIONS",
    "Range",
    "SIGNIFICANT",
    "Whole",
    "as_config_error",
    "check",
    "checked",
    "component_arguments",
    "component_with_defaults",
    "compose",
    "composition",
    "conf_folder",
    "construct",
    "corrections",
    "describe",
    "each_once",
    "evaluations_of",
    "file_trouble",
    "given_twice",
    "identity",
    "is_outdated",
    "lacking",
    "nearest",
    "option_keys",
    "options",
    "parameters_of",
    "prepared",
    "quoted",
    "read_yaml",
    "revisions",
    "run_identity",
    "significant",
    "steps_of",
    "target_of",
    "unwritable",
    "with_choices",
]
