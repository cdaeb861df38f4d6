"""Models of the files that users write, on pydantic, and one sentence for what it finds wrong in them.

Pydantic takes a sixth of a second to import, so this module is imported only where such a file is read. A field's
description says what it may be and, after a semicolon, what it is for: a wrong value is answered with the first half,
and the tables of the documentation show both.
"""

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from albert_ablate.config.errors import ConfigError, nearest

KeyPath = tuple[int | str, ...]  # keys and positions from the root of a file to a value
Model = typing.TypeVar("Model", bound="FileModel")


class FileModel(BaseModel):
    """A mapping in a file: every key is known, and nothing is changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError
    return value


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]  # or text of one: YAML reads 1e-3 so
Whole = Annotated[int, Field(strict=True)]


def read_model(model: type[Model], tree: Any, named: Callable[[KeyPath], str]) -> Model:
    """The model that a file's tree is of. Raises ConfigError with one sentence about the first mistake.

    named: the words for a place in the file that holds a mapping, "claim pre_is_better.screen".
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # a word that is unknown is often the one that is missing elsewhere
        found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")[0]
        raise ConfigError(_sentence(model, tree, found, named)) from None


def _sentence(model: type[FileModel], tree: Any, error: Mapping[str, Any], named: Callable[[KeyPath], str]) -> str:
    place, kind, value = error["loc"], error["type"], error["input"]
    about = _annotation(model, place)
    if kind == "missing":
        return f"{named(place[:-1])}: {place[-1]} is missing."
    if kind == "extra_forbidden":
        return f"{named(place[:-1])}: {place[-1]} is unknown: it holds {_near(place[-1], _keys(model, place[:-1]))}."
    own = (error.get("ctx") or {}).get("error")
    if isinstance(own, ConfigError) and not place:
        return str(own)
    if _is_model(about):
        holds = f"holds {', '.join(about.model_fields)}, not {value!r}."
        return f"{named(place)}: {own}" if isinstance(own, ConfigError) else f"{named(place)} {holds}"
    if isinstance(own, ConfigError):  # of the value itself, which it names
        return f"{named(place[:-1] if str(own).startswith(f'{place[-1]}=') else place)}: {own}"
    while place and isinstance(place[-1], int) and not _is_model(_annotation(model, place[:-1])):
        place = place[:-1]  # an entry of a list: the list is shown
    if kind == "literal_error" and typing.get_origin(about) is Literal and place == error["loc"]:
        allowed = f"it is one of {_near(value, typing.get_args(about))}"
    else:
        allowed = f"it is {_limits(model, place)}"
    return f"{named(place)}={_shown(_at(tree, place))} is not allowed: {allowed}."


def _annotation(model: Any, place: KeyPath) -> Any:
    """The annotation of a place, without `| None`."""
    about: Any = model
    for step in place:
        if _is_model(about):
            about = about.model_fields[step].annotation if step in about.model_fields else Any
        else:
            arguments = typing.get_args(about) or (Any,)
            about = arguments[-1] if typing.get_origin(about) is dict else arguments[0]
        about = typing.get_args(about)[0] if typing.get_origin(about) is Annotated else about
        if typing.get_origin(about) in (Union, types.UnionType):
            about = next(a for a in typing.get_args(about) if a is not types.NoneType)
    return about


def _is_model(about: Any) -> bool:
    return isinstance(about, type) and issubclass(about, BaseModel)


def _keys(model: type[FileModel], place: KeyPath) -> list[str]:
    return list(_annotation(model, place).model_fields)


def _limits(model: type[FileModel], place: KeyPath) -> str:
    """What the field that holds a place may be: its description up to the first semicolon."""
    for end in range(len(place), 0, -1):
        owner = _annotation(model, place[: end - 1])
        if _is_model(owner) and place[end - 1] in owner.model_fields:
            return owner.model_fields[place[end - 1]].description.partition(";")[0]
    raise KeyError(place)


def _at(tree: Any, place: KeyPath) -> Any:
    for step in place:
        tree = tree[step]
    return tree


def _near(word: Any, allowed: Iterable[Any]) -> str:
    return nearest(str(word), map(str, allowed))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def dotted(place: KeyPath) -> str:
    """claims[0].parts, as a place is written."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
