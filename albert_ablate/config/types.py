"""The types of configuration values: ranges, and the conversion of a value to the type that its key asks for."""

import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from albert_ablate.config.errors import ConfigError, shown


@dataclass(frozen=True)
class Range:
    """Allowed numbers: low <= x <= high, or < where the side is open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, x: float) -> bool:
        """Whether x lies in the range."""
        above = x > self.low if self.open_low else x >= self.low
        return above and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        words = []
        if self.low > -math.inf:
            words.append(f"{'above' if self.open_low else 'at least'} {_written(self.low)}")
        if self.high < math.inf:
            words.append(f"{'below' if self.open_high else 'at most'} {_written(self.high)}")
        return " and ".join(words)


def _written(x: float) -> str:
    return f"{x:_}" if isinstance(x, int) and x <= 10**6 else f"{x:g}"


class NotIdentity:
    """Marks an argument that says where something lies, not what it is: it stays out of the identity."""


Count = Annotated[int, Range(1, 10**15)]
NonNegativeInt = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Probability = Annotated[float, Range(0, 1, open_high=True)]
Location = Annotated[str, NotIdentity]


class Component(Mapping[str, Any]):
    """A checked node with a `_target_`, whose signature is its schema; or several such nodes, each under its name.

    Read-only; every argument is an attribute too: `cfg.model.width` is `cfg["model"]["width"]`. One that has the name
    of a mapping's method (items, keys, values, get) is read with brackets.
    """

    __slots__ = ("_nodes",)

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_nodes", dict(nodes))

    def __getitem__(self, key: str) -> Any:
        return self._nodes[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return self._nodes[name]
        except KeyError:
            raise AttributeError(f"{self._nodes.get('_target_', 'this component')} has no {name}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a checked configuration is read-only: {name} cannot be set")

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"Component({self._nodes})"

    def __reduce__(self) -> tuple:
        return Component, (self._nodes,)


def to_container(value: Any) -> Any:
    """`value` with dictionaries and lists in place of other mappings and of tuples, for JSON and YAML."""
    if isinstance(value, Mapping):
        return {key: to_container(one) for key, one in value.items()}
    return [to_container(one) for one in value] if isinstance(value, list | tuple) else value


def describe(annotation: Any) -> str:
    """Describe in words what values an annotation allows."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limit = next((str(a) for a in args[1:] if isinstance(a, Range)), "")
        return f"{describe(args[0])} {limit}".strip()
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin in (list, tuple):
        inner = [a for a in args if a is not Ellipsis]
        if origin is tuple and Ellipsis not in args:
            return f"a list of {len(args)} values, each {describe(inner[0])}"
        twice = ", none twice" if typing.get_origin(inner[0]) is Literal else ""
        return f"a list of one or more, each {describe(inner[0])}{twice}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def checked(value: Any, annotation: Any, key: str) -> Any:
    """Convert a value to the type of an annotation (1e6 to an int if one is required), or raise ConfigError."""
    try:
        return _fit(value, annotation)
    except ValueError:
        raise ConfigError(f"{key}={shown(value)} is not allowed: it must be {describe(annotation)}.") from None


def _fit(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty):
        return value
    if origin is Annotated:
        value = _fit(value, args[0])
        if any(isinstance(a, Range) and not a.holds(value) for a in args[1:]):
            raise ValueError
        return value
    if origin in (Union, types.UnionType):
        for arm in args:
            try:
                return _fit(value, arm)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise ValueError
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple) or not value:
            raise ValueError
        if origin is tuple and Ellipsis not in args and len(value) != len(args):
            raise ValueError
        inner = args if origin is tuple and Ellipsis not in args else [args[0]] * len(value)
        if typing.get_origin(args[0]) is Literal and any(v in value[:i] for i, v in enumerate(value)):
            raise ValueError
        return [_fit(v, a) for v, a in zip(value, inner, strict=True)]
    if annotation is bool or annotation is str or annotation is type(None):
        if annotation is str and type(value) is int:  # a folder may be named 2024
            value = str(value)
        if not isinstance(value, annotation) or value == "":
            raise ValueError
        return value
    if annotation in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if annotation is int and value != int(value):
            raise ValueError
        return annotation(value)
    if annotation is dict:
        if not isinstance(value, Mapping):
            raise ValueError
        return dict(value)
    return value  # a class of somebody else's may ask for types that YAML does not have: it checks them itself
