"""Reading of a checkpoint's config.json: what is mapped, known to change nothing, or refused."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError

# gelu_new and gelu_pytorch_tanh are one formula
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
ACTIVATIONS |= {"relu2": "relu2", "silu": "silu", "swish": "silu"}
# about the file, the tokens, generation, another head or how training began: no effect on the logits
SILENT = {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"}
SILENT |= {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "task_specific_params", "id2label"}
SILENT |= {"label2id", "gradient_checkpointing", "n_ctx", "n_special", "predict_special_tokens", "output_past"}
SILENT |= {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
SILENT |= {"pretraining_tp", "cache_implementation", "return_dict", "is_llama_config", "max_sequence_length"}
SILENT |= {"transformers.js_config", "auto_map", "tokenizer_class", "problem_type", "finetuning_task", "torchscript"}
SILENT |= {"output_attentions", "output_hidden_states", "unsloth_version", "unsloth_fixed", "chunk_size_feed_forward"}
SILENT |= {"_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "attn_implementation", "prefix"}
SILENT |= {
    "sep_token_id",
    "decoder_start_token_id",
    "vocab_type",
    "language",
    "license",
    "ignore_index",
    "tf_legacy_loss",
}
# how text is generated, which older releases of transformers wrote here
SILENT |= {"max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping", "num_beams"}
SILENT |= {
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "bad_words_ids",
}
SILENT |= {"repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"}
SILENT |= {"num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "suppress_tokens"}
SILENT |= {"forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "begin_suppress_tokens"}
# dropout is chosen by the arm, not by the checkpoint
SILENT |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout", "dropout"}


class ConfigFields:
    """A config.json that notes what has been read, so that what nobody has read can be refused."""

    def __init__(self, content: Mapping, file: Path):
        self.content, self.file, self.known = content, file, set(SILENT)

    def take(self, name: str, default: Any = None) -> Any:
        """The field, `default` where it is absent or null."""
        self.known.add(name)
        value = self.content.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """The field's value; ConfigError if it is missing."""
        value = self.take(name)
        if value is None:
            raise ConfigError(f"{self.file} names no {name}.")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; it must be there where there is no default."""
        value = self.need(name) if default is None else self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 10**9:
            raise ConfigError(f"{self.file} has {name}={value}: it must be a whole number from 1.")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{self.file} has {name}={value}: it must be a number above 0.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.file} has {name}={value}: it must be true or false.")
        return value

    def only(self, name: str, allowed: Any) -> None:
        """Refuse any value but `allowed`, which is also what an absent field means."""
        value = self.take(name, allowed)
        if value != allowed:
            self.refuse(name, value)

    def refuse(self, name: str, value: Any) -> None:
        """Raise ConfigError: the model does not support this value."""
        raise ConfigError(f"{self.file} has {name}={value}, which this model does not support.")

    def activation(self, name: str, default: str) -> str:
        """Our name of the activation function that the field names."""
        value = self.take(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.refuse(name, value)
        return ACTIVATIONS[value]

    def rotary(self, turned: float = 1.0) -> dict[str, Any]:
        """Arguments of the attention for rotary positions. turned: the share of each head that they turn where the file
        does not say it; only all of it is known.

        rope_theta stands in its own field or, since transformers 5, in rope_parameters, where the scaling stands that
        was rope_scaling: linear and llama3 are known, others refused.
        """
        name = "rope_parameters" if self.content.get("rope_parameters") is not None else "rope_scaling"
        for other in ("rope_parameters", "rope_scaling"):
            self.take(other)
        written = self.take(name, {})
        if not isinstance(written, Mapping):
            self.refuse(name, written)
        inner = ConfigFields({"rope_theta": self.take("rope_theta"), **written}, self.file)
        kind = inner.take("rope_type", inner.take("type", "default"))
        inner.known.add("type")
        out: dict[str, Any] = {"rotary_base": inner.number("rope_theta", 10_000.0)}
        places = (("partial_rotary_factor", inner), ("partial_rotary_factor", self), ("rotary_pct", self))
        given = {part: value for part, where in places if (value := where.take(part)) is not None}
        for part, value in (given or {"partial_rotary_factor": turned}).items():
            if value != 1:
                self.refuse(part, value)
        if kind in ("linear", "llama3"):
            inner.need("factor")
            out["rotary_factor"] = inner.number("factor", 1.0)
            inner.take("original_max_position_embeddings")
        if kind == "llama3":
            for band in ("low_freq_factor", "high_freq_factor"):
                inner.need(band)
            low, high = inner.number("low_freq_factor", 1.0), inner.number("high_freq_factor", 4.0)
            if low >= high or out["rotary_factor"] == 1:
                self.refuse(name, written)
            out["rotary_bands"] = [low, high, inner.count("original_max_position_embeddings")]
        if kind not in ("default", "linear", "llama3") or any(k not in inner.known for k in written):
            self.refuse(name, written)
        return out

    def done(self) -> None:
        """Refuse fields that were not read and are set to something."""
        for name, value in self.content.items():
            if name not in self.known and value not in (None, False, {}, []):
                self.refuse(name, value)
