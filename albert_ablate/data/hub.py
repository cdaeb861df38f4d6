"""Any Hugging Face dataset: from the hub, or from a folder on disk. No torch here."""

import bz2
import contextlib
import csv
import glob
import gzip
import json
import logging
import lzma
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from albert_ablate.config import ConfigError, Count, Location
from albert_ablate.data.corpora import Corpus

COMMIT = re.compile(r"[0-9a-f]{40}")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}


@dataclass(frozen=True, kw_only=True)
class HubDataset(Corpus):
    """Rows of a dataset, a document each: `field` of split `part` of `name`, until `size` bytes are read.

    name: a dataset on the hub ("wikitext"), a folder of Parquet, JSON or CSV files or one such file, or a folder
    written by `save_to_disk`. Rows without text are left out and counted.
    streaming reads only what is kept. revision: a commit, branch or tag; the commit it stands for goes into the record.
    What counts for a run's identity is the text itself, not where it came from.
    """

    name: Location
    config: Location | None = None
    field: Location = "text"
    part: Location = "train"
    revision: Location | None = None
    streaming: bool = True
    size: Count = 20_000_000

    LICENSE: ClassVar[str] = "that of the dataset, on its card"
    ORIGIN: ClassVar[str] = "data.name: a dataset on the Hugging Face hub, or a folder"

    @property
    def local(self) -> bool:
        """Whether `name` is a file or folder on this machine."""
        return Path(self.name).expanduser().exists()

    @cached_property
    def commit(self) -> str | None:
        """The commit read: `revision` where it is one, else what the hub says it stands for; None for a folder."""
        if self.local:
            return None
        if self.revision and COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.name, revision=self.revision, timeout=20).sha
        except Exception as error:  # the client has a dozen kinds for "not there" and "not reached"
            raise ConfigError(
                f"data.name={self.name} is neither a folder nor a dataset that the hub has: {first_line(error)}."
            ) from None

    def source(self) -> str:
        parts: list[object] = [self.name, self.config, self.field, self.part, self.size, self.commit]
        if self.local:
            root = Path(self.name).expanduser()
            files = sorted(f for f in ([root] if root.is_file() else root.rglob("*")) if f.is_file())
            parts += [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return repr(parts)

    def documents(self) -> list[str]:
        texts, read, empty = list[str](), 0, 0
        for number, text in enumerate(self._rows(), start=1):
            if text is not None and not isinstance(text, str):
                raise ConfigError(
                    f"data.field={self.field} of {self.name} holds {type(text).__name__}, not text, in row {number}."
                )
            if text is None or not text.strip():
                empty += 1
                continue
            texts.append(text)
            read += len(text.encode())
            if read >= self.size:
                break
        if not texts:
            raise ConfigError(f"data.name={self.name} holds no text in field {self.field} of its part {self.part}.")
        if empty:
            print(f"data.name={self.name}: rows without text, left out: {empty}.", file=sys.stderr)
        self.__dict__["skipped"] = empty
        return texts

    def _rows(self) -> Iterator[object]:
        """The field of each row, whatever it holds."""
        import datasets

        datasets.disable_progress_bars()
        self._check_types()
        try:
            with _quiet():
                for number, row in enumerate(self._open()):
                    if not number and self.field not in row:
                        fields = ", ".join(row)
                        raise ConfigError(f"data.field={self.field} is not in {self.name}: its fields are {fields}.")
                    yield row[self.field]
        except ConfigError:
            raise
        except Exception as error:  # each format has its own, and `datasets` wraps some of them
            raise ConfigError(f"data.name={self.name} cannot be read: {self._reason(error)}.") from None

    def _open(self) -> Iterable[Mapping[str, object]]:
        import datasets

        root = Path(self.name).expanduser()
        if self.local and self.revision:
            raise ConfigError(
                f"data.revision={self.revision} would do nothing: data.name={self.name} is on this machine."
            )
        if self._was_saved:
            return self._saved(root)
        if not self.local and self.name in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", {}):
            # which would read whatever files of its kind lie in the working folder
            raise ConfigError(
                f"data.name={self.name} names a file format, not a dataset: name the folder of the files."
            )
        return datasets.load_dataset(**self._source(), split=self.part, revision=self.commit, streaming=self.streaming)

    def _source(self) -> dict[str, Any]:
        """What `datasets` is to load. A folder by its full path: a short name could also be one of its own readers."""
        if not self.local:
            return {"path": self.name, "name": self.config}
        root = Path(self.name).expanduser().absolute()
        if root.is_dir():
            return {"path": str(root), "name": self.config}
        suffix = next((s for s in reversed(root.suffixes) if s not in COMPRESSED), "")
        if suffix not in READERS:
            raise ConfigError(f"data.name={self.name} is not allowed: a file must end in {', '.join(READERS)}.")
        return {"path": READERS[suffix], "name": self.config, "data_files": {"train": glob.escape(str(root))}}

    def _saved(self, root: Path) -> Iterable[Mapping[str, object]]:
        """What `save_to_disk` has written."""
        import datasets

        if self.config:
            raise ConfigError(f"data.config={self.config} would do nothing: {self.name} was written by save_to_disk.")
        dataset = datasets.load_from_disk(str(root))
        if isinstance(dataset, datasets.DatasetDict):
            if self.part not in dataset:
                raise ConfigError(f"data.part={self.part} is not in {self.name}: it has {', '.join(dataset)}.")
            return dataset[self.part]
        if self.part not in ("train", str(dataset.split)):
            raise ConfigError(
                f"data.part={self.part} is not allowed: {self.name} was saved without parts; leave it out."
            )
        return dataset

    def _check_types(self) -> None:
        """Refuse numbers and objects in files of ours, which `datasets` would turn into text after the first file."""
        if not self.local or self._was_saved:
            return
        try:
            wrong_type = other_type_in(self._files(), self.field, self.size)
        except Exception:  # what else is wrong with them is said where they are read
            return
        if wrong_type:
            raise ConfigError(f"data.name={self.name} cannot be read: {wrong_type}.")

    @property
    def _was_saved(self) -> bool:
        root = Path(self.name).expanduser()
        return (root / "state.json").exists() or (root / "dataset_dict.json").exists()

    def _reason(self, error: BaseException) -> str:
        """Which file and row cannot be read, where that can be found out; else the library's own word."""
        while error.__cause__ is not None:
            error = error.__cause__
        if isinstance(error, StopIteration):
            return "its files hold no rows"
        fault = None
        if self.local:
            with contextlib.suppress(Exception):
                fault = fault_in(self._files(), self.field)
        return fault or first_line(error)

    def _files(self) -> list[Path]:
        """The files of the part that is read."""
        import datasets

        builder = datasets.load_dataset_builder(**self._source())
        return [Path(f) for f in builder.config.data_files[self.part]]


def fault_in(files: Sequence[Path], field: str) -> str | None:
    """The first file and row that cannot be read or has other fields than the first file; None: nothing was found."""
    first: dict[str, None] | None = None
    for file in files:
        columns, number = dict[str, None](), 0
        try:
            for row in _read(file):
                number += 1
                if not isinstance(row, Mapping):
                    return f"{file}, row {number}: it is not an object with fields"
                if first is not None and not set(row) <= set(first) or field not in [*columns, *row]:
                    return f"{file}, row {number}: its fields are {', '.join(row)}, not {', '.join(first or [field])}"
                str(row.get(field)).encode()
                columns |= dict.fromkeys(row)
        except UnicodeEncodeError:
            return f"{file}, row {number}: it holds half a surrogate pair, which is not text"
        except Exception as error:  # each format has its own
            return f"{file}, row {number + 1}: {first_line(error)}"
        first = first or columns
    return None


def other_type_in(files: Sequence[Path], field: str, size: int) -> str | None:
    """The first row of JSON, or file of Parquet, whose field is neither text nor null, in the first `size` bytes."""
    import pyarrow
    import pyarrow.parquet

    read = 0
    for file in files:
        if ".parquet" in file.suffixes:
            kind = pyarrow.parquet.read_schema(file).field(field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not any(is_text(kind) for is_text in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
                return f"{file}: its field {field} holds {kind}, not text"
        elif {".json", ".jsonl"} & set(file.suffixes):
            for number, row in enumerate(_read(file), start=1):
                value = row.get(field)
                if value is not None and not isinstance(value, str):
                    return f"{file}, row {number}: its field {field} holds {type(value).__name__}, not text"
                read += len(value or "")
                if read >= size:
                    return None
    return None


def _read(file: Path) -> Iterator[Any]:
    """The rows of a file of objects, comma-separated values or Parquet, each as soon as it is read."""
    if ".parquet" in file.suffixes:
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
        return
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix, open)
    with opened(file, "rb") as content:
        lines = (line.decode("utf-8-sig") for line in content)  # one by one: a fault is then in the row being read
        if ".csv" in file.suffixes:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            for values in reader:
                if len(values) != len(header) and values:
                    raise ValueError(f"it has {len(values)} values, the first line {len(header)}")
                yield dict(zip(header, values, strict=False))
        elif ".txt" in file.suffixes:
            yield from ({"text": line} for line in lines)
        elif ".json" in file.suffixes and (text := "".join(lines)).lstrip().startswith("["):
            yield from json.loads(text)
        elif ".jsonl" in file.suffixes:
            yield from (json.loads(line) for line in lines if line.strip())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What `datasets` logs of a file it cannot read is said by us, in one sentence."""
    log = logging.getLogger("datasets")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


def first_line(error: BaseException) -> str:
    """First line of an error's message without its period, or the error's type if it has none."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
