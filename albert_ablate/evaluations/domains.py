"""Domain transfer: bits per byte on other corpora."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import yaml

from albert_ablate.config import Config, ConfigError, Count, nearest, option_files, target_of
from albert_ablate.data.corpora import Corpus
from albert_ablate.data.packed import block_count, held_out_sample, take_blocks, target_bytes
from albert_ablate.data.synthetic import Synthetic
from albert_ablate.evaluations.subject import Evaluation, Result, Subject

IRREVERSIBLE = "the tokenizer does not give its text back, so that bits per byte cannot be counted."


@dataclass(frozen=True)
class Domains(Evaluation):
    """bits per byte = sum of -log2 p(token) / sum of bytes, over the same tokens: a sample of the held-out text of the
    other installed corpora.

    The run's own tokenizer encodes them; bits per byte, unlike nats per token, compare across texts and tokenizers.
    Synthetic languages are left out, and texts that only the user can name. A corpus whose package is missing is a row
    that says so, and stands in the settings: once it is installed the evaluation is done anew. The run's own corpus is
    a row for comparison, no figure. tokens: size of each sample, the same for every run. split: from which it is drawn.
    corpora: options of `data`; null: all.
    """

    tokens: Count = 8_192
    split: Literal["validation", "test"] = "test"
    corpora: tuple[str, ...] | None = None

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse corpora that do not exist."""
        available = _installable()
        for name in cfg.evaluation.parts["domains"].corpora or ():
            if name not in available:
                raise ConfigError(
                    f"evaluation.domains.corpora={name} is not a corpus: it is one of {nearest(name, available)}."
                )

    def settings(self, subject: Subject) -> dict[str, Any]:
        corpora = dict(self._found(subject.packed.corpus))
        missing = {name: corpus for name, corpus in corpora.items() if isinstance(corpus, str)}
        return {**asdict(self), **subject.counting, "corpora": sorted(set(corpora) - set(missing)), "missing": missing}

    def __call__(self, subject: Subject) -> Result:
        rows, summary = [], {}
        for name, corpus in self._found(subject.packed.corpus):
            if isinstance(corpus, str):
                rows.append({"corpus": name, "own": False, "loss": None, "bits_per_byte": None, "missing": corpus})
                continue
            encoded = subject.packed.codec.encode_documents(corpus.split()[self.split], corpus.separator)
            tokens = encoded.tokens
            if not block_count(tokens, subject.context):
                raise ConfigError(
                    f"data={name} is too short for model.context={subject.context}: its {self.split} split holds "
                    f"{len(tokens)} tokens."
                )
            blocks = held_out_sample(tokens, subject.context, self.tokens, f"domains/{name}")
            loss = subject.loss(torch.from_numpy(take_blocks(tokens, blocks, subject.context)))
            is_training_text, bits = _same(corpus, subject.packed.corpus), None
            if encoded.sizes is not None:
                size = target_bytes(encoded.sizes, blocks, subject.context)
                bits = loss / math.log(2) * len(blocks) * subject.context / size
            missing = IRREVERSIBLE if bits is None else None
            rows.append(
                {"corpus": name, "own": is_training_text, "loss": loss, "bits_per_byte": bits, "missing": missing}
            )
            if not is_training_text and bits is not None:
                summary[name] = bits
        return Result(rows, summary)

    def _found(self, training_corpus: Corpus) -> Iterator[tuple[str, Corpus | str]]:
        """Each corpus by its option's name, or the sentence why it cannot be read."""
        for name, node in _installable().items():
            if self.corpora is None or name in self.corpora:
                corpus = target_of(node["_target_"])(**{k: v for k, v in node.items() if not k.startswith("_")})
                try:
                    corpus.source()
                    yield name, corpus
                except ConfigError as error:
                    yield name, str(error)


def _installable() -> dict[str, dict[str, Any]]:
    """The options of `data` that hold a text of their own, with their configuration."""
    nodes = {name: yaml.safe_load(file.read_text()) for name, file in sorted(option_files()["data"].items())}
    return {
        name: node
        for name, node in nodes.items()
        if "???" not in node.values() and not issubclass(target_of(node["_target_"]), Synthetic)
    }


def _same(a: Corpus, b: Corpus) -> bool:
    return type(a) is type(b) and a.source() == b.source()
