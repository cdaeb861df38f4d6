"""Tokenizers: text to token numbers. No torch here.

A tokenizer is a frozen dataclass; its fields are its configuration. `fit` sees the training documents only and gives a
codec, which encodes and decodes; `vocabulary` is known before.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from albert_ablate.config import ConfigError, Location, Range

LARGEST_VOCABULARY = 1_000_000
DOCUMENTS_PER_BATCH = 256  # documents encoded at a time: the library keeps several times a document's size about each


@dataclass(frozen=True)
class Encoded:
    """Tokens of documents with a separator between them, (n,), and the bytes of text that each stands for, (n,).

    sizes is None where the tokenizer does not give the text back: its tokens then stand for no certain bytes.
    """

    tokens: np.ndarray
    sizes: np.ndarray | None


@dataclass(frozen=True)
class Bytes:
    """Every byte of the UTF-8 text is a token: 256 of them, nothing to train, bits per byte without conversion."""

    vocabulary = 256
    gaps = False

    def name(self) -> str:
        """Name in the record and in the key of the token cache."""
        return "bytes"

    def fit(self, documents: Sequence[str]) -> "Bytes":
        """Itself: bytes need no training."""
        return self

    def load(self, file: Path) -> "Bytes":
        """Itself: there is nothing to read."""
        return self

    def save(self, file: Path) -> None:
        """Write nothing: there is nothing to keep."""

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes of a text."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def encode_documents(self, documents: Sequence[str], separator: str) -> Encoded:
        """Tokens of documents joined by the separator, each of which stands for one byte."""
        tokens = self.encode(separator.join(documents))
        return Encoded(tokens, np.broadcast_to(np.uint8(1), tokens.shape))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the bytes; invalid UTF-8 becomes U+FFFD."""
        return bytes(int(t) for t in tokens).decode(errors="replace")


class Codec:
    """A trained tokenizer of the `tokenizers` library, without the padding and truncation that may be stored in it."""

    def __init__(self, model: Any):
        model.no_padding()
        model.no_truncation()
        self.model = model
        numbers = model.get_vocab().values()
        self.vocabulary = max(numbers, default=-1) + 1
        self.gaps = self.vocabulary > len(set(numbers))  # numbers below the highest that are no token's
        self.kind = np.dtype(np.uint16 if self.vocabulary <= 2**16 else np.uint32)

    def save(self, file: Path) -> None:
        """Write the tokenizer as tokenizer.json."""
        file.write_text(self.model.to_str(), encoding="utf-8")

    def encode(self, text: str) -> np.ndarray:
        """The library's own tokens of the whole text, without special tokens."""
        return np.array(next(self._encodings([text])).ids, dtype=self.kind)

    def encode_documents(self, documents: Sequence[str], separator: str) -> Encoded:
        """The tokens of each document as `encode` gives them, and between two documents those of the separator."""
        between, between_sizes = self._encode_separator(separator)
        tokens, sizes = list[np.ndarray](), list[np.ndarray]()
        reversible = True
        for document, encoding in zip(documents, self._encodings(documents), strict=True):
            if tokens:
                tokens.append(between)
                sizes.append(between_sizes)
            tokens.append(np.array(encoding.ids, dtype=self.kind))
            document_sizes = self._sizes(document, encoding, tokens[-1]) if reversible else None
            if document_sizes is None:
                reversible = False
            else:
                sizes.append(document_sizes)
        if not tokens:
            return Encoded(np.zeros(0, self.kind), np.zeros(0, np.uint8))
        return Encoded(np.concatenate(tokens), _narrow(np.concatenate(sizes)) if reversible else None)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of the tokens, special tokens included."""
        return self.model.decode([int(t) for t in tokens], skip_special_tokens=False)

    def _encodings(self, documents: Sequence[str]) -> Iterator[Any]:
        encode = self.model.encode_batch if self._bytes_of_token is None else self.model.encode_batch_fast
        for start in range(0, len(documents), DOCUMENTS_PER_BATCH):
            try:
                yield from encode(list(documents[start : start + DOCUMENTS_PER_BATCH]), add_special_tokens=False)
            except Exception as error:  # the library raises plain Exception
                raise ConfigError(f"The tokenizer cannot encode the text: {str(error).rstrip('.')}.") from None

    def _encode_separator(self, separator: str) -> tuple[np.ndarray, np.ndarray]:
        """Its tokens as they follow a text: without what the tokenizer puts before the first word of a text."""
        before, both = self.encode("x"), self.encode(f"x{separator}")
        follows = len(both) >= len(before) and (both[: len(before)] == before).all()
        tokens = both[len(before) :] if follows else self.encode(separator)
        sizes = np.zeros(len(tokens), dtype=np.int64)
        sizes[:1] = len(separator.encode())
        return tokens, _spread(sizes)

    def _sizes(self, document: str, encoding: Any, tokens: np.ndarray) -> np.ndarray | None:
        """Bytes of the document that each of its tokens stands for; None where they do not give it back.

        A space that the tokenizer puts before a text is allowed: it stands for no byte.
        """
        decoded = self.decode(tokens)
        if decoded not in (document, f" {document}"):
            return None
        length = len(document.encode())
        if self._bytes_of_token is not None:
            sizes = self._bytes_of_token[tokens]
            if len(sizes):
                sizes[0] -= len(decoded) - len(document)
            return sizes if sizes.sum() == length else None
        return _spread(_from_offsets(document, encoding.offsets))

    @cached_property
    def _bytes_of_token(self) -> np.ndarray | None:
        """Bytes of each token of a byte-level vocabulary, (vocabulary,); None for others."""
        if type(self.model.decoder).__name__ != "ByteLevel":
            return None
        sizes = np.zeros(self.vocabulary, dtype=np.int64)
        for token, number in self.model.get_vocab().items():
            sizes[number] = len(token)  # its alphabet has a character for each byte
        for number, token in self.model.get_added_tokens_decoder().items():
            sizes[number] = len(token.content.encode())
        return sizes


def _from_offsets(document: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes from the end of each token's predecessor to its own end; what follows the last token counts to it."""
    ends = np.maximum.accumulate([0, *(end for _, end in offsets)])
    if len(ends) > 1:
        ends[-1] = len(document)
    points = np.frombuffer(document.encode("utf-32-le"), dtype=np.uint32)
    before = np.r_[0, np.cumsum(1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF))]  # bytes before a character
    return np.diff(before[ends])


def _spread(sizes: np.ndarray) -> np.ndarray:
    """Tokens that end within one character share its bytes: the first of them had all."""
    group = np.cumsum(sizes > 0)
    count, total = np.bincount(group), np.bincount(group, weights=sizes).astype(np.int64)
    place = np.arange(len(sizes)) - np.searchsorted(group, group)
    return total[group] // count[group] + (place < total[group] % count[group])


def _narrow(sizes: np.ndarray) -> np.ndarray:
    return sizes.astype(np.min_scalar_type(int(sizes.max(initial=0))))


@dataclass(frozen=True)
class BytePairs:
    """Byte-level byte-pair encoding with `vocabulary` tokens (Sennrich et al. 2015, 1508.07909; Radford et al. 2019).

    Trained on the training documents only and kept with the packed tokens. A text too small for the vocabulary leaves
    some of its numbers unused.
    """

    vocabulary: Annotated[int, Range(257, 1_000_000)] = 4096

    def name(self) -> str:
        """Name in the record and in the key of the token cache."""
        return f"byte pairs {self.vocabulary}"

    def fit(self, documents: Sequence[str]) -> Codec:
        """Train byte-level BPE on the documents; pairs that occur once are not merged."""
        from tokenizers import ByteLevelBPETokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        trainer = ByteLevelBPETokenizer()
        trainer.train_from_iterator(documents, vocab_size=self.vocabulary, min_frequency=2, show_progress=False)
        return Codec(trainer._tokenizer)

    def load(self, file: Path) -> Codec:
        """Read a tokenizer that `Codec.save` wrote."""
        from tokenizers import Tokenizer

        return Codec(Tokenizer.from_file(str(file)))


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer made elsewhere: a tokenizer.json of the `tokenizers` library."""

    path: Location

    @cached_property
    def _content(self) -> str:
        try:
            return Path(self.path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"tokenizer.path={self.path} cannot be read: {why}.") from None

    @cached_property
    def _codec(self) -> Codec:
        from tokenizers import Tokenizer

        try:
            codec = Codec(Tokenizer.from_str(self._content))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"tokenizer.path={self.path} is not a tokenizer.json: {error}.") from None
        if not 0 < codec.vocabulary <= LARGEST_VOCABULARY:
            raise ConfigError(
                f"tokenizer.path={self.path} needs a vocabulary of {codec.vocabulary} tokens, its highest number + 1: "
                f"1 to {LARGEST_VOCABULARY} are allowed."
            )
        return codec

    @property
    def vocabulary(self) -> int:
        """The highest token number + 1: numbers may be missing in between."""
        return self._codec.vocabulary

    def name(self) -> str:
        """SHA-256 of the file, which names it in the record and in the key of the token cache."""
        return sha256(self._content.encode()).hexdigest()

    def fit(self, documents: Sequence[str]) -> Codec:
        """The tokenizer of the file, whatever the documents."""
        return self._codec

    def load(self, file: Path) -> Codec:
        """The tokenizer of the file, not the cached copy."""
        return self._codec
