"""Tokenizers: text to token numbers. No torch here."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bytes:
    """Every byte of the UTF-8 text is a token: 256 of them, nothing to train, bits per byte without conversion."""

    vocabulary = 256

    def name(self) -> str:
        return "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, tokens) -> str:
        return bytes(int(t) for t in tokens).decode(errors="replace")
