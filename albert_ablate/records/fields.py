"""The types of a record's fields: `check_fields` raises Wrong, half a sentence, where one is not of its type."""

import math
from collections.abc import Callable, Mapping
from typing import Any

STATES = ("running", "finished", "diverged", "failed", "stopped")
INT64_LIMIT = 2**63  # numbers beyond it do not fit a table's columns


class Wrong(ValueError):
    """Raised for an invalid record: what is wrong, as half a sentence."""


def check_fields(content: Mapping[str, Any]) -> None:
    """Check the types of a record's fields; raises Wrong for the first that is of another type."""
    for key, check in _FIELDS.items():
        if key in content and (content[key] is not None or key in _NEVER_NULL):
            check(key, content[key])


def shown_value(value: Any) -> str:
    """A value as an error shows it, cut after 57 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(key: str, value: Any) -> Wrong:
    return Wrong(f"its {key} is null" if value is None else f"its {key} is a {type(value).__name__}")


def _status(key: str, value: Any) -> None:
    if not isinstance(value, str) or value not in STATES:
        raise Wrong(
            f"its status {shown_value(value)} is not one of {', '.join(STATES)}; a newer release may have written it"
        )


def _seed(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < INT64_LIMIT:
        raise Wrong(f"its seed is {shown_value(value)}")


def _text(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(key, value)


def _number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(key, value)
    if abs(value) >= INT64_LIMIT if isinstance(value, int) else not math.isfinite(value):
        raise Wrong(f"its {key} is too large a number")


def _count(key: str, value: Any) -> None:
    _number(key, value)
    if value < 0 or value != int(value):
        raise Wrong(f"its {key} is {shown_value(value)}, and counts are whole and not negative")


def _amount(key: str, value: Any) -> None:
    _number(key, value)
    if value < 0:
        raise Wrong(f"its {key} is {shown_value(value)}, and it cannot be negative")


def _figure(key: str, value: Any) -> None:
    """A figure: a number, a word, or nothing."""
    if value is not None and not isinstance(value, str | bool):
        _number(key, value)


def _result(key: str, value: Any) -> None:
    """A figure of the summary: a number, or whether something is so."""
    if not isinstance(value, bool):
        _number(key, value)


def _choice(key: str, value: Any) -> None:
    for one in value if isinstance(value, list) else [value]:
        _figure(key, one)


def _any(key: str, value: Any) -> None:
    """Whatever JSON can hold, with numbers that a table can hold."""
    if isinstance(value, dict):
        for name, one in value.items():
            _any(f"{key}.{name}", one)
    elif isinstance(value, list):
        for one in value:
            _any(key, one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _number(key, value)


Check = Callable[[str, Any], None]


def _object(others: Check, **own: Check) -> Check:
    """An object, whose values are each checked; null is always allowed in it."""

    def check(key: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _wrong(key, value)
        for name, one in value.items():
            if one is not None:
                own.get(name, others)(f"{key}.{name}", one)

    return check


def _groups(key: str, value: Any) -> None:
    """A configuration: an object of objects."""
    if not isinstance(value, dict):
        raise _wrong(key, value)
    for name, one in value.items():
        if name == "optimizer" and isinstance(one, dict) and one.get("lr") is not None:
            _number("config.optimizer.lr", one["lr"])
            if one["lr"] <= 0:
                raise Wrong(f"its config.optimizer.lr is {shown_value(one['lr'])}, and rates are above 0")
        if name in _GROUPS and one is not None and not isinstance(one, dict):
            raise _wrong(f"config.{name}", one)
        _any(f"config.{name}", one)


def _progress(key: str, value: Any) -> None:
    _object(_count)(key, value)
    if value.keys() >= {"step", "steps"} and None not in value.values() and 0 < value["steps"] >= value["step"]:
        return
    raise Wrong(f"its progress is {shown_value(value)}")


_GROUPS = {"model", "norm", "norm_type", "attention", "dropout", "dropout_time", "optimizer", "schedule", "clip",
           "loss", "data", "tokenizer", "task", "trainer", "evaluation", "budget", "checkpoint",
           "diagnostics"}  # fmt: skip
_FIELDS: dict[str, Check] = {
    "status": _status,
    "seed": _seed,
    **dict.fromkeys(("name", "label", "arm", "setting", "identity", "role", "error"), _text),
    "key": _object(_text),
    "choices": _object(_choice),
    "config": _groups,
    "revisions": _object(_count),
    "code": _object(_text),
    "budget": _object(_amount),
    "data": _object(_any, fingerprint=_text, name=_text, task=_text, entropy_rate=_number),
    "model": _object(_figure),
    "summary": _object(_result, divergence=_text, tokens=_amount, steps=_amount, parameters=_amount),
    "proof": _object(_any, initial_draws=_object(_text), data_order=_text, final_weights=_text),
    "provenance": _object(_any, threads=_count),
    "cost": _object(_amount, phases=_object(_amount)),
    "histories": _object(_count),
    "progress": _progress,
    "sessions": _count,
    "signal": _count,
    **dict.fromkeys(("created", "updated"), _number),
    "trunk": _object(_any, folder=_text),
}
_NEVER_NULL = ("status", "seed")
