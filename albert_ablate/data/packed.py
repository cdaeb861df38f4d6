"""Packed tokens: each split once as a memory-mapped array, cut into blocks, drawn in an order named by the seed.

A block i of context T holds tokens [iT, iT + T], the last one being only a target, so that every token but the first is
predicted exactly once. No torch here.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from albert_ablate.config import ConfigError
from albert_ablate.data.corpora import SPLITS, Corpus
from albert_ablate.streams import digest, stream_seed

FORMAT = 2  # raised when the files of the cache change


@dataclass(frozen=True)
class Packed:
    """The token arrays of a corpus, (tokens,) each, and what is known about its text.

    fingerprint: hash of the tokens of all splits. bytes_per_token: of each split's text. unigram: nats per token of the
    validation tokens under the training tokens' frequencies (plus one), what a model that ignores context can reach.
    folder: where the arrays and the trained tokenizer lie.
    """

    corpus: Corpus
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    vocabulary: int
    fingerprint: str
    bytes_per_token: dict[str, float]
    unigram: float
    folder: Path

    def keep(self, size: int | None) -> "Packed":
        """With the first `size` bytes of training text only (the documents are in hash order: a fair sample)."""
        if size is None:
            return self
        tokens = round(size / self.bytes_per_token["train"])
        if tokens > len(self.train):
            most = int(len(self.train) * self.bytes_per_token["train"])
            raise ConfigError(f"data.train_size={size} is more than the {most} bytes of training text there are.")
        return Packed(**{**self.__dict__, "train": self.train[:tokens]})


def cache_folder(configured: str | None) -> Path:
    """paths.cache, or the user's cache folder."""
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "albert_ablate"


def pack(corpus: Corpus, tokenizer, cache: Path) -> Packed:
    """The packed corpus, from the cache where it is there. Files appear whole or not at all."""
    rules = json.dumps([FORMAT, type(corpus).__name__, corpus.source(), tokenizer.name(), corpus.separator])
    folder = cache / "packed" / digest(rules.encode())
    if not (folder / "facts.json").exists():
        _write(corpus, tokenizer, folder)
    facts = json.loads((folder / "facts.json").read_text())
    arrays = {s: np.load(folder / f"{s}.npy", mmap_mode="r") for s in SPLITS}
    return Packed(corpus=corpus, **arrays, **facts, folder=folder)


def _write(corpus: Corpus, tokenizer, folder: Path) -> None:
    documents = corpus.split()
    codec = tokenizer.fit(documents["train"])
    texts = {split: corpus.separator.join(found) for split, found in documents.items()}
    tokens = {split: codec.encode(text) for split, text in texts.items()}
    for split in SPLITS:
        if len(tokens[split]) < 2:
            raise ConfigError(
                f"The text of data={type(corpus).__name__} is too short: its {split} split holds {len(tokens[split])} "
                "tokens, at least 2 are needed."
            )
    facts = {
        "vocabulary": tokenizer.vocabulary,
        "fingerprint": digest(*(np.ascontiguousarray(tokens[s]).tobytes() for s in SPLITS)),
        "bytes_per_token": {s: len(texts[s].encode()) / len(tokens[s]) for s in SPLITS},
        "unigram": unigram_loss(tokens["train"], tokens["validation"], tokenizer.vocabulary),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            for split in SPLITS:
                np.save(Path(scratch) / f"{split}.npy", tokens[split])
            codec.save(Path(scratch) / "tokenizer.json")
            folder.mkdir(exist_ok=True)
            if (Path(scratch) / "tokenizer.json").exists():
                os.replace(Path(scratch) / "tokenizer.json", folder / "tokenizer.json")
            for split in SPLITS:
                os.replace(Path(scratch) / f"{split}.npy", folder / f"{split}.npy")
            (Path(scratch) / "facts.json").write_text(json.dumps(facts))
            os.replace(Path(scratch) / "facts.json", folder / "facts.json")  # last: it says that the rest is there
    except OSError as error:
        raise ConfigError(f"paths.cache={folder.parent.parent} cannot be written: {error.strerror}.") from None


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Cross-entropy, nats per token, of `held_out` under the add-one frequencies of `train`."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


@dataclass(frozen=True)
class Order:
    """Which blocks make up batch `step`: endless passes over all blocks, each pass in a fresh order.

    Pass p is the permutation drawn from stream `data/order/<p>` of the seed; it depends on nothing else, so arms of one
    seed see the same batches. A batch may straddle two passes.
    """

    blocks: int
    batch: int
    seed: int

    def indices(self, step: int) -> np.ndarray:
        """Block numbers of batch `step`, shape (batch,)."""
        taken: list[np.ndarray] = []
        at, left = step * self.batch, self.batch
        while left:
            number, start = divmod(at, self.blocks)
            taken.append(_permutation(self.seed, number, self.blocks)[start : start + left])
            at, left = at + len(taken[-1]), left - len(taken[-1])
        return np.concatenate(taken)


@lru_cache(maxsize=4)
def _permutation(seed: int, number: int, blocks: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(stream_seed(seed, "data/order", number))).permutation(blocks)


def block_count(tokens: np.ndarray, context: int) -> int:
    return (len(tokens) - 1) // context


def take_blocks(tokens: np.ndarray, indices: np.ndarray, context: int) -> np.ndarray:
    """Blocks as an int64 array of shape (len(indices), context + 1)."""
    tokens = np.asarray(tokens)  # a view: indexing a memmap itself is several times slower
    return tokens[np.asarray(indices)[:, None] * context + np.arange(context + 1)].astype(np.int64)


def held_out_sample(tokens: np.ndarray, context: int, size: int, name: str) -> np.ndarray:
    """A fixed sample of about `size` tokens, the same for every run: block numbers from stream `evaluation/<name>`."""
    blocks = block_count(tokens, context)
    order = np.random.Generator(np.random.PCG64(stream_seed(0, "evaluation", name))).permutation(blocks)
    return np.sort(order[: max(1, size // context)])


def chain(previous: str, indices: np.ndarray) -> str:
    """Proof of data order: hash of the hash so far and the block numbers of one batch."""
    return digest(bytes.fromhex(previous), indices.astype("<i8").tobytes())
