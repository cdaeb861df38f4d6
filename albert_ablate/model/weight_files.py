"""The files of a checkpoint as Hugging Face writes it. Whatever is wrong with one is a ConfigError of one sentence."""

import json
import pickle
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from albert_ablate.config import ConfigError
from albert_ablate.streams import digest

NUMBERS = ("F64", "F32", "F16", "BF16")  # names of safetensors; others need a scale that this reader does not know


def read_json(file: Path) -> Mapping[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file} must hold an object, {{...}}, and holds a {type(content).__name__}.")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before pickles, one before several with an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.exists():
            continue
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, Mapping) or not parts or not all(isinstance(p, str) for p in parts.values()):
            raise ConfigError(f"{index} has no weight_map, which says which file holds which weight.")
        for part in sorted(set(parts.values())):
            if part != Path(part).name:
                raise ConfigError(f"{index} names {part}, which is not a file in its folder.")
            if not (folder / part).exists():
                raise ConfigError(f"{index} names {part}, which is not there: some of the weights are missing.")
        return [folder / part for part in sorted(set(parts.values()))]
    raise ConfigError(f"{folder} holds no weights: it needs model.safetensors or pytorch_model.bin.")


def weights_hash(files: Collection[Path]) -> str:
    """Hash of the files' content; asked anew when one was written since."""
    return _hash_of(*((str(file), file.stat().st_mtime_ns) for file in files))


@cache
def _hash_of(*files: tuple[str, int]) -> str:
    return digest(*(Path(file).read_bytes() for file, _ in files))


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of config.json and of the weights' files: what was read holds while these are the same."""
    facts = []
    for file in (folder / "config.json", *weight_files(folder)):
        try:
            about = file.stat()
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
        facts.append((str(file), about.st_mtime_ns, about.st_size))
    return tuple(facts)


def shapes(folder: Path) -> dict[str, Tensor]:
    """All weights by name without their values, on the meta device."""
    return _collected(_meta(file) for file in weight_files(folder))


def tensors(folder: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The weights by name, only those named if names are given."""
    return _collected(_values(file, names) for file in weight_files(folder))


def _collected(files: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for file in files:
        if twice := out.keys() & file.keys():
            raise ConfigError(f"The weight {min(twice)} is in two files of the checkpoint.")
        out |= file
    return out


def _meta(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return _pickled(file, "meta")
    out = {}
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is not a dictionary
            part = tensors.get_slice(name)
            if part.get_dtype() not in NUMBERS:
                raise ConfigError(
                    f"{file} holds {name} as {part.get_dtype()}: weights must be one of {', '.join(NUMBERS)}."
                )
            out[name] = torch.empty(part.get_shape(), device="meta")
    return out


def _values(file: Path, names: Collection[str] | None) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return {k: v for k, v in _pickled(file, "cpu").items() if names is None or k in names}
    with _opened(file) as tensors:
        return {k: tensors.get_tensor(k) for k in tensors.keys() if names is None or k in names}  # noqa: SIM118


def _opened(file: Path) -> Any:
    """A safetensors file whose header fits its size."""
    from safetensors import SafetensorError, safe_open

    _refuse_pointer(file)
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is cut off or not a safetensors file: {error}.") from None


def _pickled(file: Path, device: str) -> dict[str, Tensor]:
    """A pickle, read for its tensors alone."""
    _refuse_pointer(file)
    try:
        content = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever its readers meet in a spoilt file
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ConfigError(f"{file} holds more than tensors, and pickled code is never run.") from None
        raise ConfigError(f"{file} is cut off or not a file of weights: {type(error).__name__}.") from None
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"{file} must hold tensors by name and nothing else.")
    for name, tensor in content.items():
        if not tensor.is_floating_point() and tensor.ndim > 1 and not name.endswith("bias"):  # older files hold masks
            raise ConfigError(f"{file} holds {name} as {tensor.dtype}: weights must be floating-point numbers.")
    return dict(content)


def _refuse_pointer(file: Path) -> None:
    try:
        with open(file, "rb") as opened:
            start = opened.read(40)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    if start.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{file} is a pointer of Git LFS, not the weights themselves: git lfs pull fetches them.")
