"""Packed tokens: each split once as a memory-mapped array, cut into blocks, drawn in an order named by the seed.

A block i of context T holds tokens [iT, iT + T], the last one being only a target, so that every token but the first is
predicted exactly once. No torch here.
"""

import errno
import json
import math
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from albert_ablate.config import ConfigError
from albert_ablate.data.corpora import SPLITS, Corpus
from albert_ablate.data.tokenizers import Bytes
from albert_ablate.records.atomic import flush_to_disk
from albert_ablate.records.cache import cache_folder as cache_folder  # by which components find it here
from albert_ablate.streams import digest, stream_seed

PARTIAL = "partial-"  # begins the name of a folder that is being written
FORMAT = 3  # raised when the files of the cache change
# a cache that cannot be written, or that somebody has removed since
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}


@dataclass(frozen=True)
class Packed:
    """The token arrays of a corpus, (tokens,) each, and what is known about its text.

    sizes: by split, the bytes of text each token stands for, (tokens,); None where the tokenizer does not give the text
    back. fingerprint: hash of the tokens of all splits. bytes_per_token: of each split's text. unigram: nats per token
    of the validation tokens under the training tokens' frequencies (plus one), what a model that ignores context can
    reach. skipped: rows of the corpus that held no text. folder: where the arrays and the trained tokenizer lie; None
    where the cache could not be written, and all is in memory.
    """

    corpus: Corpus
    tokenizer: Any
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    sizes: Mapping[str, np.ndarray] | None
    vocabulary: int
    fingerprint: str
    bytes_per_token: dict[str, float]
    unigram: float
    skipped: int
    folder: Path | None
    trained: Any = None  # the codec, where it was not read from the folder

    @property
    def reversible(self) -> bool:
        """Whether the tokenizer gives the text back, so that bits per byte can be counted."""
        return self.sizes is not None

    @property
    def codec(self) -> Any:
        """What encodes and decodes: the tokenizer as it was trained on this text."""
        return self.trained or self.tokenizer.load(self.folder and self.folder / "tokenizer.json")

    def bytes_per_target(self, split: str, blocks: np.ndarray, context: int) -> float:
        """Bytes of text over tokens, of what is predicted in these blocks; nan where they cannot be counted."""
        if self.sizes is None:
            return math.nan
        return target_bytes(self.sizes[split], blocks, context) / (len(blocks) * context)

    def described(self, context: int) -> dict[str, Any]:
        """What a run's record says of its text; blocks: of `context` tokens, in the training split."""
        corpus = self.corpus  # not built anew: a hub dataset would ask the hub a second time
        return {
            "name": type(corpus).__name__,
            "fingerprint": self.fingerprint,
            "train_tokens": len(self.train),
            "bytes_per_token": self.bytes_per_token["train"],
            "reversible": self.reversible,
            "skipped": self.skipped,
            "entropy_rate": getattr(corpus, "entropy_rate", None),  # nats per byte, known for synthetic languages
            "revision": getattr(corpus, "commit", None),
            "blocks": block_count(self.train, context),
        }

    def keep(self, size: int | None) -> "Packed":
        """With the first `size` bytes of training text only (the documents are in hash order: a fair sample)."""
        if size is None:
            return self
        tokens = round(size / self.bytes_per_token["train"])
        if tokens > len(self.train):
            available = int(len(self.train) * self.bytes_per_token["train"])
            raise ConfigError(f"data.train_size={size} is more than the {available} bytes of training text there are.")
        return replace(self, train=self.train[:tokens])


class Damaged(Exception):
    """Raised for a cache that does not hold what was written to it."""


def pack(corpus: Corpus, tokenizer: Any, cache: Path) -> Packed:
    """Tokenize and pack a corpus, or read it from the cache if that holds it undamaged.

    If the cache cannot be written (full disk, read-only folder) the tokens are kept in memory.
    """
    rules = json.dumps([FORMAT, type(corpus).__name__, corpus.source(), tokenizer.name(), corpus.separator])
    folder = cache / "packed" / digest(rules.encode())
    try:
        return _open(corpus, tokenizer, folder)
    except FileNotFoundError:
        pass
    except (Damaged, OSError) as error:
        print(f"{folder} is damaged ({error}): the text is packed again.", file=sys.stderr)
    return _write(corpus, tokenizer, folder)


def _open(corpus: Corpus, tokenizer: Any, folder: Path) -> Packed:
    """What `folder` holds. FileNotFoundError where it is not there, Damaged or OSError where it cannot be used."""
    content = (folder / "facts.json").read_bytes()
    try:
        facts = json.loads(content)
        files, seal = facts.pop("files"), facts.pop("digest")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Damaged("facts.json cannot be read") from None
    if seal != _seal(facts, files, folder):
        raise Damaged("facts.json does not match its checksum")
    for name, expected in files.items():
        try:
            file_hash = _digest_of(folder / name)
        except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
            raise Damaged(f"{name} is missing or empty") from None
        if file_hash != expected:
            raise Damaged(f"{name} is not what was written")
    tokens = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
    sizes = {split: np.load(folder / f"{split}.sizes.npy", mmap_mode="r") for split in SPLITS if facts["sizes"]}
    return _packed(corpus, tokenizer, tokens, sizes or None, facts, folder)


def _packed(
    corpus: Corpus,
    tokenizer: Any,
    tokens: Mapping[str, np.ndarray],
    sizes: Mapping[str, np.ndarray] | None,
    facts: Mapping[str, Any],
    folder: Path | None,
    trained: Any = None,
) -> Packed:
    if type(tokenizer) is Bytes:  # not kept: each token is a byte
        sizes = {split: np.broadcast_to(np.uint8(1), array.shape) for split, array in tokens.items()}
    fields: dict[str, Any] = {name: value for name, value in facts.items() if name != "sizes"} | dict(tokens)
    return Packed(corpus=corpus, tokenizer=tokenizer, sizes=sizes, **fields, folder=folder, trained=trained)


def _write(corpus: Corpus, tokenizer: Any, folder: Path) -> Packed:
    """The corpus packed from its text, and kept in `folder` if there is room."""
    documents = corpus.split()
    codec = tokenizer.fit(documents["train"])
    encoded = {split: codec.encode_documents(part, corpus.separator) for split, part in documents.items()}
    tokens = {split: part.tokens for split, part in encoded.items()}
    for split in SPLITS:
        if len(tokens[split]) < 2:
            raise ConfigError(
                f"The text of data={type(corpus).__name__} is too short: its {split} split holds {len(tokens[split])} "
                "tokens, at least 2 are needed."
            )
    counted = {split: part.sizes for split, part in encoded.items() if part.sizes is not None}
    sizes = counted if len(counted) == len(SPLITS) else None
    # numbers that are no token's make a larger model of the same tokens: another setting
    larger = [f"vocabulary {tokenizer.vocabulary}".encode()] if codec.gaps else []
    length = {split: len(corpus.separator.join(part).encode()) for split, part in documents.items()}
    facts = {
        "vocabulary": tokenizer.vocabulary,
        "fingerprint": digest(*(np.ascontiguousarray(tokens[s]).tobytes() for s in SPLITS), *larger),
        "bytes_per_token": {s: length[s] / len(tokens[s]) for s in SPLITS},
        "unigram": unigram_loss(tokens["train"], tokens["validation"], tokenizer.vocabulary),
        "skipped": corpus.skipped,
        "sizes": sizes is not None and type(tokenizer) is not Bytes,
    }
    arrays = {f"{split}.npy": part for split, part in tokens.items()}
    if sizes is not None and facts["sizes"]:
        arrays |= {f"{split}.sizes.npy": part for split, part in sizes.items()}
    try:
        _keep(arrays, codec, facts, folder)
        return _open(corpus, tokenizer, folder)
    except (OSError, Damaged) as error:
        why = getattr(error, "strerror", None) or str(error)
        # numpy has no error number for a disk that fills up while it writes
        if isinstance(error, OSError) and error.errno is not None and error.errno not in NO_ROOM:
            raise ConfigError(f"paths.cache={folder.parent.parent} cannot be written: {why}.") from None
        print(f"paths.cache={folder.parent.parent} is not used ({why}): the text is kept in memory.", file=sys.stderr)
        return _packed(corpus, tokenizer, tokens, sizes, facts, None, codec)


def _keep(arrays: Mapping[str, np.ndarray], codec: Any, facts: Mapping[str, Any], folder: Path) -> None:
    """Write `folder`, each file whole and on the disk before it appears; of several writers the last one counts."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{PARTIAL}*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=PARTIAL) as name:
        scratch = Path(name)
        for file, array in arrays.items():
            np.save(scratch / file, array)
        codec.save(scratch / "tokenizer.json")
        files = {file.name: _digest_of(file) for file in sorted(scratch.iterdir())}
        content = {**facts, "files": files, "digest": _seal(facts, files, folder)}
        (scratch / "facts.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in [*files, "facts.json"]:  # last: it says that the rest is there
            flush_to_disk(scratch / file)
            os.replace(scratch / file, folder / file)
    flush_to_disk(folder)
    flush_to_disk(folder.parent)


def _seal(facts: Any, files: Any, folder: Path) -> str:
    """Hash of what facts.json says and of the text and tokenizer, by the folder's name, that it says it of."""
    return digest(json.dumps([folder.name, facts, files], sort_keys=True).encode())


def _digest_of(file: Path) -> str:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return blake2b(content, digest_size=16).hexdigest()


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Cross-entropy, nats per token, of `held_out` under the add-one frequencies of `train`."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


@dataclass(frozen=True)
class BatchOrder:
    """Order of training data: which blocks make up the batch of each step, in endless passes, each freshly shuffled.

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
    """Number of blocks of `context` tokens in a token array; each needs one more token as its last target."""
    return (len(tokens) - 1) // context


def take_blocks(tokens: np.ndarray, indices: np.ndarray, context: int) -> np.ndarray:
    """Blocks as an int64 array of shape (len(indices), context + 1)."""
    tokens = np.asarray(tokens)  # a view: indexing a memmap itself is several times slower
    return tokens[np.asarray(indices)[:, None] * context + np.arange(context + 1)].astype(np.int64)


def target_bytes(sizes: np.ndarray, blocks: np.ndarray, context: int) -> int:
    """Bytes of text that the targets of these blocks stand for: all tokens of a block but its first."""
    return int(take_blocks(sizes, blocks, context)[:, 1:].sum())


def held_out_sample(tokens: np.ndarray, context: int, size: int, name: str) -> np.ndarray:
    """A fixed sample of about `size` tokens, the same for every run: block numbers from stream `evaluation/<name>`."""
    blocks = block_count(tokens, context)
    order = np.random.Generator(np.random.PCG64(stream_seed(0, "evaluation", name))).permutation(blocks)
    return np.sort(order[: max(1, size // context)])


def chain(previous: str, indices: np.ndarray) -> str:
    """Proof of data order: hash of the hash so far and the block numbers of one batch."""
    return digest(bytes.fromhex(previous), indices.astype("<i8").tobytes())
