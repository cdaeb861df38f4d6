"""What a sweep server may decide. Its values are data: they choose among options and set numbers."""

import re
from collections.abc import Iterable
from pathlib import Path

from albert_ablate.config import ConfigError

# Keys that say where files lie, where results go, and what is done with them are the user's own.
OWN = ("paths", "logger", "force", "debug", "choices", "hydra")
PLACES = ("path", "pattern")  # data.path, tokenizer.path: any file of the machine
KEY = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
WORD = r"[A-Za-z0-9_.+\- ]*"
ITEM = rf"(?:{WORD}|'{WORD}'|\"{WORD}\")"
VALUE = re.compile(rf"{ITEM}|\[{ITEM}(?:, ?{ITEM})*\]")  # with a space: a list as `wandb agent` writes it
HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")


def refuse_untrusted(arguments: Iterable[str]) -> None:
    """Raise ConfigError unless every argument is `key=value` that chooses an option or sets a number.

    Refused: flags, `_target_` and its like, dictionaries, interpolations (`${oc.env:KEY}`), Hydra's functions, paths,
    and the keys that belong to the user: paths, logger.*, force, debug, hydra.
    """
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise ConfigError(f"'{argument}' may not come from a sweep: its values are written key=value.")
        parts = key.split(".")
        if (parts[0] in OWN and key != "logger") or parts[-1] in PLACES:
            raise ConfigError(f"{argument} may not come from a sweep: {key} is the user's own.")
        if key == "data.name":  # on the hub, not a folder of this machine
            fits = bool(HUB_NAME.fullmatch(value)) and not Path(value).exists()
        else:
            fits = bool(VALUE.fullmatch(value))
        if not fits or ".." in value:
            raise ConfigError(f"{argument} may not come from a sweep: it may choose among options and set numbers.")


def told(arguments: list[str]) -> list[str]:
    """The arguments of a sweep's run, which goes to W&B unless they name another logger: the server waits for it."""
    return arguments if any(a.startswith("logger=") for a in arguments) else [*arguments, "logger=wandb"]
