"""Tokenizers: text to token numbers. No torch here.

A tokenizer is a frozen dataclass; its fields are its configuration. `fit` sees the training documents only and gives a
codec, which encodes and decodes; `vocabulary` is known before.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from albert_ablate.config import ConfigError, Location, Range


@dataclass(frozen=True)
class Bytes:
    """Every byte of the UTF-8 text is a token: 256 of them, nothing to train, bits per byte without conversion."""

    vocabulary = 256

    def name(self) -> str:
        return "bytes"

    def fit(self, documents: Sequence[str]) -> "Bytes":
        return self

    def load(self, file: Path) -> "Bytes":
        return self

    def save(self, file: Path) -> None: ...

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(int(t) for t in tokens).decode(errors="replace")


class Codec:
    """A trained tokenizer of the `tokenizers` library."""

    def __init__(self, model: Any):
        self.model = model

    def save(self, file: Path) -> None:
        file.write_text(self.model.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, line by line: one long string takes several times as long."""
        encoded = self.model.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
        kind = np.uint16 if self.model.get_vocab_size() <= 2**16 else np.uint32
        return np.fromiter((t for line in encoded for t in line.ids), dtype=kind)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.model.decode([int(t) for t in tokens], skip_special_tokens=False)


@dataclass(frozen=True)
class BytePairs:
    """Byte-level byte-pair encoding with `vocabulary` tokens (Sennrich et al. 2015, 1508.07909; Radford et al. 2019).

    Trained on the training documents only and kept with the packed tokens. A text too small for the vocabulary leaves
    some of its numbers unused.
    """

    vocabulary: Annotated[int, Range(257, 1_000_000)] = 4096

    def name(self) -> str:
        return f"byte pairs {self.vocabulary}"

    def fit(self, documents: Sequence[str]) -> Codec:
        from tokenizers import ByteLevelBPETokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        made = ByteLevelBPETokenizer()
        made.train_from_iterator(documents, vocab_size=self.vocabulary, min_frequency=2, show_progress=False)
        return Codec(made._tokenizer)

    def load(self, file: Path) -> Codec:
        from tokenizers import Tokenizer

        return Codec(Tokenizer.from_file(str(file)))


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer made elsewhere: a tokenizer.json of the `tokenizers` library."""

    path: Location

    @cached_property
    def _content(self) -> str:
        try:
            return Path(self.path).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"tokenizer.path={self.path} cannot be read: {why}.") from None

    @cached_property
    def _codec(self) -> Codec:
        from tokenizers import Tokenizer

        try:
            return Codec(Tokenizer.from_str(self._content))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"tokenizer.path={self.path} is no tokenizer.json: {error}.") from None

    @property
    def vocabulary(self) -> int:
        return self._codec.model.get_vocab_size()

    def name(self) -> str:
        return sha256(self._content.encode()).hexdigest()

    def fit(self, documents: Sequence[str]) -> Codec:
        return self._codec

    def load(self, file: Path) -> Codec:
        return self._codec
