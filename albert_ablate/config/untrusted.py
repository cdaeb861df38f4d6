"""Check values from a sweep server, which is not trusted: they may only choose options and set numbers."""

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config.errors import ConfigError

# Keys that say where files lie, where results go, and what is done with them are the user's own.
USER_KEYS = ("paths", "logger", "force", "accept_code", "debug", "choices", "hydra")
PATH_KEYS = ("path", "pattern")  # data.path, tokenizer.path: any file of the machine
PLACE_KEYS = ("model.config",)
KEY = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
SAFE_VALUE = re.compile(r"[A-Za-z0-9_.+\- ]*")
MAX_CHARACTERS = 1000  # characters of key=value
MAX_DEPTH = 5  # levels of a nested group
HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.\-]{0,95})?")


def refuse_untrusted(arguments: Iterable[str], own_file: bool = False) -> None:
    """Raise ConfigError unless every argument is `key=value` that chooses an option or sets a number.

    Refused: flags, `_target_` and its like, dictionaries, interpolations (`${oc.env:KEY}`), Hydra's functions, paths,
    and the keys that belong to the user: paths, logger.*, force, debug, hydra. A file that is the user's own may say
    where texts lie, and hold any text but an interpolation.
    """
    for argument in arguments:
        key, equals, value = argument.partition("=")
        shown = argument if len(argument) <= MAX_CHARACTERS else f"{argument[:60]}..."
        if not equals or not KEY.fullmatch(key):
            raise ConfigError(f"'{shown}' is not allowed from a sweep: its values must be key=value.")
        parts = key.split(".")
        place = parts[-1] in PATH_KEYS or key in PLACE_KEYS
        if (parts[0] in USER_KEYS and key != "logger") or (place and not own_file):
            raise ConfigError(f"{shown} is not allowed from a sweep: {key} is set by the user.")
        if own_file:
            fits = "${" not in value
        elif key == "data.name":  # on the hub, not a folder of this machine
            fits = bool(HUB_NAME.fullmatch(value)) and not Path(value).exists()
        else:
            fits = _chooses(value)
        if not fits or (".." in value and not own_file) or len(argument) > MAX_CHARACTERS:
            raise ConfigError(f"{shown} is not allowed from a sweep: it may only select options and set numbers.")


def flattened(values: Mapping, above: str = "", depth: int = 0) -> dict[str, Any]:
    """Values by dotted key: {"optimizer": {"lr": 0.1}}, as W&B hands over a nested group, is {"optimizer.lr": 0.1}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value and depth < MAX_DEPTH
        out |= flattened(value, f"{above}{key}.", depth + 1) if nested else {f"{above}{key}": value}
    return out


def as_settings(arguments: Iterable[str]) -> list[str]:
    """The arguments that `wandb agent` writes, in whichever of its forms, as key=value.

    ${args} writes --key=value, ${args_append_hydra} +key=value, ${args_override_hydra} ++key=value; null is None
    there, and a nested group a Python dictionary. What is none of these stays as it is.
    """
    out = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals:
            name = re.sub(r"^(--|\+\+?)", "", name)
            values = flattened({name: _literal(value)})
            out += [f"{k}={'null' if v is None else v}" for k, v in values.items()]
        else:
            out.append(argument)
    return out


def _literal(value: str) -> Any:
    """Python's None and a dictionary read; any other text as it stands."""
    if value == "None":
        return None
    if value.startswith("{") and len(value) <= MAX_CHARACTERS:
        try:
            literal = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        return literal if isinstance(literal, dict) else value
    return value


def _chooses(value: str) -> bool:
    """Whether a value is a word or a number, quoted or not, or a flat list of them, as `wandb agent` writes it."""
    # no pattern for the whole list: a hostile one would keep it at backtracking for ever
    items = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
    items = [item.strip(" ") for item in items]
    return all(SAFE_VALUE.fullmatch(i[1:-1] if len(i) > 1 and i[0] == i[-1] and i[0] in "'\"" else i) for i in items)


def with_wandb_logger(arguments: list[str]) -> list[str]:
    """The arguments of a sweep's run, which goes to W&B unless they name another logger: the server waits for it."""
    return arguments if any(a.startswith("logger=") for a in arguments) else [*arguments, "logger=wandb"]
