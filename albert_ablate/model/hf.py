"""Any causal language model of Hugging Face's transformers, built from its configuration: `model=hf`."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from albert_ablate.config import HYDRA_KEYS, ConfigError, Count, Location, NotIdentity, parameters_of
from albert_ablate.config.errors import shortened, shown
from albert_ablate.model.weight_files import read_json, weight_files, weights_hash

Weights = Literal["random", "loaded"]
# of a config.json: where it came from, how it was saved, and code of its own, which is not run
LEFT_OUT = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map")


class Configured:
    """`model=hf model.config=FILE_OR_FOLDER`: stands in a composed configuration for what the file says.

    config: a config.json or its folder. weights: random, drawn as transformers draws them, each parameter from its own
    stream; the vocabulary is then the tokenizer's. loaded: those of the folder. context: tokens of a training sequence,
    null as many as the model has positions. changes: fields that are to be other than in the file.
    """

    takes_parts = False

    def __init__(self, config: Location, weights: Weights = "random", context: Count | None = None, changes: dict = {}):  # noqa: B006
        raise NotImplementedError("it is replaced by what it stands for")

    @staticmethod
    def expand(nodes: dict[str, Any], asked: Collection[str]) -> None:
        """Put what the file says into `nodes`, so that who a run is does not depend on where the file lies."""
        node = nodes["model"]
        if not node.get("config") or node["config"] == "???":
            raise ConfigError("model.config is missing: model=hf needs a config.json of Hugging Face, or its folder.")
        for name in node.keys() - parameters_of(f"{__name__}.{Configured.__name__}") - HYDRA_KEYS:
            raise ConfigError(
                f"model.{name}={shown(node[name])} is unknown: model=hf takes config, weights, context and changes; a "
                f"field of the file is model.changes.{name}."
            )
        path = Path(str(node["config"])).expanduser()
        folder, changes = path if path.is_dir() else path.parent, node.get("changes") or {}
        content = read_json(folder / "config.json" if path.is_dir() else path)
        structure = {k: v for k, v in content.items() if k not in LEFT_OUT} | _merged(content, changes)
        base = configuration({k: v for k, v in structure.items() if k not in changes})
        for name in changes:
            if not hasattr(base, name):
                raise ConfigError(f"model.changes.{name} is unknown: {type(base).__name__} has no such field.")
        largest_context = getattr(configuration(structure).get_text_config(), "max_position_embeddings", None)
        context = node.get("context") or largest_context
        if context is None:
            raise ConfigError(f"model.context is missing: {path} does not say how many positions the model has.")
        if isinstance(largest_context, int) and isinstance(context, int) and context > largest_context:
            raise ConfigError(f"model.context={context} is not allowed: {path} has {largest_context} positions.")
        files = weight_files(folder) if node.get("weights") == "loaded" else []
        nodes["model"] = {
            "_target_": f"{__name__}.{HuggingFace.__name__}",
            "_partial_": True,
            **{k: node[k] for k in node if not k.startswith("_")},
            "config": str(path),
            "context": context,
            "structure": structure,
            "checksum": weights_hash(files) if files else None,
        }


def _merged(content: Mapping, changes: Mapping) -> dict[str, Any]:
    """The changes, those within a field that is an object merged into it."""
    both = {k: (content.get(k), v) for k, v in changes.items()}
    return {k: {**a, **b} if isinstance(a, Mapping) and isinstance(b, Mapping) else b for k, (a, b) in both.items()}


def configuration(structure: Mapping[str, Any]) -> Any:
    """transformers' configuration of these fields. ConfigError where it has no such model, or refuses a field."""
    transformers = library()
    kind = structure.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(f"model.config has model_type={kind}, which transformers {transformers.__version__} has not.")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(dict(structure), default=dict)))
    except Exception as error:  # its checks raise kinds of their own
        raise ConfigError(
            f"model.config is refused by transformers: {shortened(' '.join(str(error).split()))}"
        ) from None


def library() -> Any:
    """transformers, without its advice."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("model=hf needs transformers: pip install 'albert_ablate[hf]'.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class HuggingFace:
    """Makes the model that config, weights, context and changes of `Configured` stand for.

    structure: what the file says, changes included. checksum: of the weights' files. With weights=loaded an embedding
    with more rows than the tokenizer has tokens keeps them; one with fewer is refused.
    """

    takes_parts = False
    library = "transformers"  # whose release stands in the run's provenance

    def __init__(
        self,
        vocabulary: int,
        /,
        config: Location,
        context: Count,
        structure: dict,
        checksum: str | None,
        weights: Weights = "random",
        changes: Annotated[dict, NotIdentity] = {},  # noqa: B006
    ):
        self.folder, self.weights = Path(config).expanduser(), weights
        self.config = configuration(structure)
        text = self.config.get_text_config()
        if weights == "random" and text.vocab_size != vocabulary:
            for part in (text, self.config):
                part.vocab_size = vocabulary
                for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                    setattr(part, name, None)  # numbers of another vocabulary
        if text.vocab_size < vocabulary:
            raise ConfigError(
                f"The tokenizer has {vocabulary} tokens and the weights in {config} only {text.vocab_size}: use their "
                "own, tokenizer=file tokenizer.path=TOKENIZER.JSON."
            )
        self.rows, self.loads, self.config.use_cache = text.vocab_size, weights == "loaded", False

    def shapes(self) -> nn.Module:
        """The model of transformers, randomly initialized; ConfigError unless it is a causal language model."""
        auto = library().AutoModelForCausalLM
        if type(self.config) not in auto._model_mapping:
            raise ConfigError(
                f"model.config has model_type={self.config.model_type}, which is not a causal language model."
            )
        try:
            model = auto.from_config(self.config, dtype=torch.float32)
        except Exception as error:  # its models raise kinds of their own
            raise ConfigError(f"model.config cannot be built: {shortened(' '.join(str(error).split()))}.") from None
        return self._with_blocks(model)

    def _with_blocks(self, model: Any) -> nn.Module:
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
        model.blocks = list(next(lists, ()))  # a plain list: they are in the module already
        return model

    def __call__(self) -> nn.Module:
        if self.weights == "random":
            return self.shapes()
        folder = self.folder if self.folder.is_dir() else self.folder.parent
        load = library().AutoModelForCausalLM.from_pretrained
        model, about = load(
            folder, config=self.config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if about.get(what):
                name = sorted(map(str, about[what]))[0]
                raise ConfigError(f"The weights in {folder} do not fit its config.json: {name} is {what[:-5]}.")
        return self._with_blocks(model)
