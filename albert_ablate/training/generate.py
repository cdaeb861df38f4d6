"""`albert-ablate generate`: sample text from a trained run. Lightning is not imported here."""

import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from albert_ablate.config import DEFAULT_TARGETS, Config, ConfigError, refuse_changed_own_code, target_of
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.store import not_a_run, require


def generate(
    run: Annotated[Path, typer.Argument(help="A run folder: runs/SETTING/seedN.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to continue; empty: begin a new document.")] = "",
    tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of tokens to generate.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="Divisor of the logits; 0 takes the most likely token.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Sample from the most likely tokens whose probabilities sum to this (nucleus)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling: the same seed gives the same text.")] = 0,
    weights: Annotated[
        Literal["last", "best"],
        typer.Option(help="Saved weights to use: of the last step, or of the best validation loss."),
    ] = "best",
) -> None:
    """Sample a continuation of a prompt from a trained run, printed token by token."""
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ConfigError("--top-k and --top-p would do nothing: --temperature 0 takes the likeliest token.")
    if temperature == float("inf"):
        raise ConfigError(f"--temperature {temperature} is not allowed: it must be a number.")
    if top_p == 0:
        raise ConfigError("--top-p 0 is not allowed: it must be above 0; --temperature 0 takes the likeliest token.")
    pieces = continuation(run, prompt, tokens, temperature, top_k, top_p, seed, weights)
    for piece in pieces:
        sys.stdout.write(_printable(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")


def continuation(
    run: Path,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    weights: str = "best",
) -> Iterator[str]:
    """Sample from a run's model: yields the prompt, then what the model adds, in pieces of whole characters.

    Token t is drawn by the t-th number of stream `generate` of `seed`, from the logits divided by `temperature`, of
    which the `top_k` largest and then the nucleus `top_p` stay. The model sees the last `model.context` tokens.
    """
    import numpy as np

    from albert_ablate.model.build import build
    from albert_ablate.streams import stream_seed

    cfg, model = load_kept(run, weights)
    codec = _codec(cfg, run)
    begin = prompt or target_of(cfg.data._target_).separator
    if not begin:
        raise ConfigError(
            "--prompt is empty, and the text of this run has no separator between documents to begin with."
        )
    try:
        given = [int(t) for t in codec.encode(begin)]
    except UnicodeEncodeError:
        raise ConfigError("--prompt is not UTF-8 text.") from None
    if not given:
        raise ConfigError(f"--prompt {begin!r} holds no token of this run's tokenizer.")
    random = np.random.Generator(np.random.PCG64(stream_seed(seed, "generate")))
    vocabulary = build(cfg.tokenizer).vocabulary
    steps = _draws(model, given, cfg.model.context, vocabulary, tokens, temperature, top_k, top_p, random)
    first = next(steps)  # before anything is printed, since it raises if the weights are not finite
    if prompt:
        yield prompt
    yield from pieces(codec, given if prompt else [], first, steps)


def _draws(
    model: Any,
    given: list[int],
    context: int,
    known: int,
    tokens: int,
    temperature: float,
    k: int | None,
    p: float | None,
    random: Any,
) -> Iterator[int]:
    import torch

    from albert_ablate.model import sampling

    seen = list(given)
    with torch.inference_mode():
        for _ in range(tokens):
            # a checkpoint's head may know more tokens than the tokenizer has
            logits = model(torch.tensor([seen[-context:]]))[0, -1, :known].float()
            if not logits.isfinite().all():
                raise ConfigError("The weights of this run give logits that are not finite: it has diverged.")
            logits = sampling.tempered(logits, temperature)
            logits = logits if k is None else sampling.top_k(logits, k)
            logits = logits if p is None else sampling.top_p(logits, p)
            seen.append(sampling.draw(logits, random.random()))
            yield seen[-1]


def pieces(codec: Any, given: list[int], first: int, rest: Iterator[int]) -> Iterator[str]:
    """Decode tokens incrementally: what each adds to the text so far, held back while a character is incomplete."""
    tokens, printed = list(given), len(codec.decode(given))
    for token in _chained(first, rest):
        tokens.append(token)
        text = codec.decode(tokens)
        sure = text[:-1] if text.endswith("\ufffd") else text
        if len(sure) > printed:
            yield sure[printed:]
            printed = len(sure)
    if len(text) > printed:
        yield text[printed:]


def _chained(first: int, rest: Iterator[int]) -> Iterator[int]:
    yield first
    yield from rest


def _printable(text: str) -> str:
    """`text` with control characters replaced, which a terminal would obey."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def load_kept(run: Path, weights: str) -> tuple[Config, Any]:
    """Load a run's model for inference: (configuration, model in evaluation mode with its best or last weights)."""
    import torch

    from albert_ablate.config import check
    from albert_ablate.model.build import build_model
    from albert_ablate.model.weights import load_checkpoint

    record = _record(run)
    file = run / "checkpoints" / f"{weights}.ckpt"
    if not file.is_file():
        raise ConfigError(f"{file} is missing: --weights {'last' if weights == 'best' else 'best'} may be there.")
    here = {"paths": {"runs": "runs", "cache": None}, "choices": record.get("choices") or {}}
    cfg = check({**record["config"], **here})
    plain = {"compile": False, "graph": False, "gradient_checkpointing": False}
    cfg = check({**cfg, "trainer": {**cfg.trainer, **plain}})
    refuse_changed_own_code(run, record)
    model = build_model(cfg)
    try:
        model.load_state_dict(load_checkpoint(file, record.get("identity"))["state_dict"])
    except Exception as error:  # a torn file, another file, weights of another shape: torch has many kinds
        why = str(error).strip().splitlines()[0].rstrip(".:")
        raise ConfigError(f"{file} cannot be read: {why}.") from None
    torch.set_num_threads(record["provenance"]["threads"])
    return cfg, model.eval()


def _record(run: Path) -> Mapping[str, Any]:
    record = RunFolder(run).record()
    if record is None:
        raise not_a_run(run)
    if record["status"] not in ("finished", "diverged"):
        raise ConfigError(f"{run} is {record['status']}, not finished: repeat its command to resume it.")
    require(run, record, "config", "provenance.threads", "data.fingerprint")
    if record["config"].get("task", {}).get("_target_", DEFAULT_TARGETS["task"]) != DEFAULT_TARGETS["task"]:
        trunk = record.get("trunk") or {}
        instead = f": take its trunk, {trunk['folder']}." if trunk.get("folder") else "."
        raise ConfigError(f"{run} is a run of another task, and generate needs a language model{instead}")
    return record


def _codec(cfg: Config, run: Path) -> Any:
    """The tokenizer as it was trained: from the packed text, which is packed again if the cache has lost it."""
    from albert_ablate.data.packed import cache_folder, pack
    from albert_ablate.model.build import build

    tokenizer = build(cfg.tokenizer)
    if hasattr(tokenizer, "encode"):  # bytes: nothing was trained
        return tokenizer
    packed = pack(build(cfg.data), tokenizer, cache_folder(cfg.paths.cache))
    expected = RunFolder(run).record()["data"]["fingerprint"]  # type: ignore[index]
    if packed.fingerprint != expected:
        raise ConfigError(f"The text of {run} has changed since: its tokenizer cannot be rebuilt.")
    return packed.codec
