"""The examples of a LightningDataModule of one's own: an order drawn from the seed, fixed samples to evaluate on."""

import itertools
import json
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from albert_ablate.config import Config, ConfigError, construct
from albert_ablate.data.packed import BatchOrder
from albert_ablate.model.named_draws import seeded_generators
from albert_ablate.streams import digest, stream_seed

HASHED_EXAMPLES = 256  # examples of each split that the fingerprint is of, evenly spread
LOADERS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}


@dataclass(frozen=True)
class OwnData:
    """What a data module gives: by split its loader, the test's None where it has none. fingerprint: of how many
    examples there are in each split and of 256 of each."""

    name: str
    loaders: Mapping[str, DataLoader | None]
    fingerprint: str

    def described(self, context: int) -> dict[str, Any]:
        """What a run's record says of its data; blocks: examples of the training split."""
        train = len(self.loaders["train"].dataset)  # type: ignore[union-attr,arg-type]
        about = {"name": self.name, "fingerprint": self.fingerprint, "train_tokens": train * context}
        return about | {"reversible": False, "blocks": train}

    def sample(self, split: str, size: int, batch: int) -> Iterator[tuple[Any, int]]:
        """The same `size` examples of a split each time, in batches: (batch, how many)."""
        loader = self.loaders[split]
        if loader is None:
            return
        count = len(loader.dataset)  # type: ignore[arg-type]
        order = np.random.Generator(np.random.PCG64(stream_seed(0, "evaluation", split))).permutation(count)
        chosen = np.sort(order[: max(1, size)]).tolist()
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            yield loader.collate_fn([loader.dataset[i] for i in part]), len(part)


def own_data(cfg: Config) -> OwnData:
    """The data of a checked configuration with a task of one's own. ConfigError where they cannot be had."""
    return _made(json.dumps(cfg.task["data"], sort_keys=True), cfg.option("task"))


@lru_cache(4)
def _made(node: str, task: str) -> OwnData:
    name = f"task={task}"
    try:
        with seeded_generators(0, "data", "setup"):  # of every seed alike: it may split what it has
            module = construct(json.loads(node))
            module.prepare_data()
            loaders: dict[str, Any] = {}
            for split, method in LOADERS.items():
                module.setup("test" if split == "test" else "fit")
                loaders[split] = _loader(module, method, f"{name}: {method}()", optional=split == "test")
            content = [_content(loader.dataset) for loader in loaders.values() if loader is not None]
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{name} cannot have its data: {why}") from error
    return OwnData(type(module).__name__, loaders, digest(*content))


def _loader(module: Any, method: str, name: str, optional: bool) -> DataLoader | None:
    make = getattr(type(module), method, None)
    if optional and (make is None or make.__qualname__.startswith(("DataHooks", "LightningDataModule"))):
        return None
    loader = getattr(module, method)()
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        raise ConfigError(f"{name} returns a {type(loader).__name__}: it must return a DataLoader with a batch size.")
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ConfigError(
            f"{name} has a dataset without a length: its order cannot be drawn, it needs __getitem__ and __len__."
        )
    if not len(loader.dataset):
        raise ConfigError(f"{name} has no example.")
    return loader


def _content(dataset: Any) -> bytes:
    count = len(dataset)
    chosen = sorted({int(i) for i in np.linspace(0, count - 1, min(count, HASHED_EXAMPLES))})
    return digest(str(count).encode(), *(_bytes_of(dataset[i]) for i in chosen)).encode()


def _bytes_of(example: Any) -> bytes:
    """What an example holds, as bytes that do not depend on where it lies."""
    if isinstance(example, Tensor):
        example = example.detach().cpu().numpy()
    if isinstance(example, np.ndarray):
        return f"{example.dtype}{example.shape}".encode() + np.ascontiguousarray(example).tobytes()
    if isinstance(example, Mapping):
        return b"{" + b",".join(str(k).encode() + b":" + _bytes_of(v) for k, v in example.items()) + b"}"
    if isinstance(example, list | tuple):
        return b"[" + b",".join(map(_bytes_of, example)) + b"]"
    if isinstance(example, str | bytes | int | float | bool | None):
        return repr(example).encode()
    return pickle.dumps(example)


class SeededExamples(Dataset):
    """A dataset whose every example is made with generators at the stream of its step and number, so that what is
    random in it is the same for all arms of a seed and after a resume."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        seed_all(stream_seed(self.seed, "data", "example", *place))
        return self.dataset[place[1]]


class DrawnOrder(Sampler):
    """(step, number) of the examples of each micro-batch from step `start` on, without end."""

    def __init__(self, order: BatchOrder, accumulate: int, start: int):
        self.order, self.accumulate, self.start = order, accumulate, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in itertools.count(self.start):
            for part in np.split(self.order.indices(step), self.accumulate):
                yield [(step, int(i)) for i in part]


class ExampleData(pl.LightningDataModule):
    """The training examples as Lightning wants them."""

    def __init__(self, loader: DataLoader, order: BatchOrder, accumulate: int, start: int):
        super().__init__()
        self.loader, self.drawn = loader, DrawnOrder(order, accumulate, start)
        self.examples = SeededExamples(loader.dataset, order.seed)

    def train_dataloader(self) -> DataLoader:
        collate: Callable = self.loader.collate_fn
        workers = self.loader.num_workers
        return DataLoader(self.examples, batch_sampler=self.drawn, collate_fn=collate, num_workers=workers)


def seed_all(seed: int) -> None:
    """Begin torch's generator of the CPU, numpy's and Python's global ones."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
