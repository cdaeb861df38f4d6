"""Any Hugging Face dataset: from the hub, or from a folder on disk. No torch here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from albert_ablate.config import ConfigError, Count, Location
from albert_ablate.data.corpora import Corpus

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class HubDataset(Corpus):
    """Rows of a dataset, a document each: `field` of split `part` of `name`, until `size` bytes are read.

    name: a dataset on the hub ("wikitext"), a folder of parquet, JSON or CSV files, or one written by `save_to_disk`.
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
                f"data.name={self.name} is neither a folder nor a dataset the hub shows: {_first_line(error)}."
            ) from None

    def source(self) -> str:
        what: list[object] = [self.name, self.config, self.field, self.part, self.size, self.commit]
        if self.local:
            root = Path(self.name).expanduser()
            files = sorted(f for f in ([root] if root.is_file() else root.rglob("*")) if f.is_file())
            what += [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return repr(what)

    def documents(self) -> list[str]:
        kept, read = [], 0
        for text in self._rows():
            if not isinstance(text, str):
                raise ConfigError(f"data.field={self.field} of {self.name} holds {type(text).__name__}, not text.")
            if text.strip():
                kept.append(text)
                read += len(text.encode())
            if read >= self.size:
                break
        if not kept:
            raise ConfigError(f"data.name={self.name} holds no text in field {self.field} of its part {self.part}.")
        return kept

    def _rows(self) -> Iterator[object]:
        import datasets

        datasets.disable_progress_bars()
        try:
            rows = iter(self._open())
            first = next(rows, None)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"data.name={self.name} cannot be read: {_first_line(error)}.") from None
        if first is None:
            return
        if self.field not in first:
            raise ConfigError(f"data.field={self.field} is not in {self.name}: its fields are {', '.join(first)}.")
        yield first[self.field]
        for row in rows:
            yield row[self.field]

    def _open(self):
        import datasets

        root = Path(self.name).expanduser()
        if (root / "state.json").exists() or (root / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(root))
            if isinstance(found, datasets.DatasetDict):
                if self.part not in found:
                    raise ConfigError(f"data.part={self.part} is not in {self.name}: it has {', '.join(found)}.")
                found = found[self.part]
            return found
        if not self.local and self.name in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", {}):
            # which would read whatever files of its kind lie in the working folder
            raise ConfigError(f"data.name={self.name} is a way to read files, no dataset: give the folder they lie in.")
        name = str(root) if self.local else self.name
        return datasets.load_dataset(name, self.config, split=self.part, revision=self.commit, streaming=self.streaming)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
