"""Mistakes of a user, as one sentence each, and the files that cannot be read or written."""

import difflib
import errno
import re
import reprlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A mistake of the user that can be seen before the first step: one sentence, exit code 2."""


# what a machine has run out of (exit code 1), and what its user may not write or has named wrongly (exit code 2)
EXHAUSTED = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE") if hasattr(errno, name)
)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


def unwritable(place: Any, error: OSError) -> Exception:
    """One sentence on a file or folder that cannot be written: a RuntimeError (exit code 1) where the disk is full."""
    kind = RuntimeError if error.errno in EXHAUSTED else ConfigError
    return kind(f"{place} cannot be written: {error.strerror or ' '.join(str(error).split()) or type(error).__name__}.")


def file_trouble(error: OSError) -> tuple[str, int] | None:
    """The sentence and the exit code for an error of a disk that no command foresaw; None for any other error."""
    if error.errno not in (*EXHAUSTED, *FORBIDDEN):
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror or error}.", 1 if error.errno in EXHAUSTED else 2


def read_yaml(path: Path, loader: Any = None) -> Any:
    """What a YAML file holds. Raises ConfigError with the line and the column of what is wrong."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), loader or yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: byte {error.start} is not UTF-8 text.") from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read as YAML: it is nested too deep.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML: {where}{why}.") from None


def nearest(word: str, allowed: typing.Iterable[str]) -> str:
    """The allowed words, those most like `word` first."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    return ", ".join(close + [w for w in allowed if w not in close])


def shown(value: Any) -> str:
    """A value as a person would write it, cut where it is long: it may come from a stranger."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return _LIMITED.repr(value) if isinstance(value, Mapping | list | tuple) else shortened(str(value))


_LIMITED = reprlib.Repr()
_LIMITED.maxlevel, _LIMITED.maxdict, _LIMITED.maxlist, _LIMITED.maxtuple, _LIMITED.maxstring = 3, 12, 12, 12, 200


def shortened(text: str, most: int = 500) -> str:
    """Cut a text for a message to `most` characters."""
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: typing.Iterable[str]) -> str:
    """Names for a message, sorted and separated by commas."""
    return ", ".join(sorted(names))


def as_config_error(error: Exception) -> ConfigError:
    """One sentence for what Hydra or OmegaConf has to say about a configuration; any other error is raised as it is."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    theirs = (ConfigError, HydraException, OmegaConfBaseException)
    while isinstance(error.__cause__, theirs) and not isinstance(error, ConfigError):
        error = typing.cast(Exception, error.__cause__)
    if isinstance(error, ConfigError):
        return error
    if not isinstance(error, theirs):
        raise error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        why = next((x for x in lines if not x.startswith(("Error parsing", "See https"))), "").rstrip(".")
        if "NoViableAlt" in why or "mismatched input '='" in why:
            key, equals, value = error.override.removeprefix("++").partition("=")
            example = f"{key}={quoted(value)}" if equals and "'" not in value else "key='value'"
            why = f'a value with special characters needs quotes of its own, "{example}"'
        return ConfigError(f"'{error.override.removeprefix('++')}' cannot be read as key=value: {why}.")
    missing = re.match(r"In '.*': Could not find 'hydra/(launcher|sweeper)/(.*)'", lines[0]) if lines else None
    if missing:
        kind, name = missing.groups()
        available = sorted(lines[lines.index(f"Available options in 'hydra/{kind}':") + 1 :])
        available = [x for x in available if ":" not in x and " " not in x]
        extra = next((x for x in ("ray", "submitit") if name.startswith(x)), None)
        install = f"; pip install 'albert_ablate[{extra}]' adds {name}" if extra else ""
        return ConfigError(f"hydra/{kind}={name} does not exist: it must be one of {', '.join(available)}{install}.")
    if lines and lines[0].startswith("Ambiguous value for argument"):
        several = lines[0].split("'")[1].removeprefix("++")
        return ConfigError(f"{several} are several values: add -m to train one after the other.")
    return ConfigError(" ".join(lines).replace("'++", "'").rstrip(".") + ".")


def quoted(text: str) -> str:
    """A text as the value of an override, whatever characters it has."""
    text = re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", r"\'")  # backslashes count before a quote alone
    return f"'{text}'"
