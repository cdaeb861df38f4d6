"""The `summary` of a run's record: final and best losses, tokens, divergence."""

from collections.abc import Mapping
from typing import Any


def summary(
    evaluations: Mapping[str, Mapping[str, float]],
    best: Mapping[str, Any],
    step: int,
    tokens_per_step: int,
    *,
    passes: float,
    initial_loss: float,
    unigram_loss: float,
    below_unigram: bool | None,
    entropy: float | None,
    grad_norm: float | None,
    divergence: str | None,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Losses in nats per token; train_loss is measured in evaluation mode, on a fixed sample.

    evaluations: the latest of each split: train, validation, test, and test_last (at the last weights). best: loss and
    step of the best validation loss; step -1 before there is one. passes: over the training text. entropy: of the
    validation text in nats per token, None where it is unknown. model: the record's part of that name.
    """
    train, validation = evaluations.get("train", {}), evaluations.get("validation", {})
    test, test_last = evaluations.get("test", {}), evaluations.get("test_last", {})
    loss = validation.get("loss")
    return {
        "train_loss": train.get("loss"),
        "val_loss": loss,
        "val_bits_per_byte": validation.get("bits_per_byte"),
        "val_perplexity": validation.get("perplexity"),
        "val_accuracy": validation.get("accuracy"),
        "gap": validation["loss"] - train["loss"] if train and validation else None,
        "best_val_loss": best["loss"],
        "best_tokens": best["step"] * tokens_per_step if best["step"] >= 0 else None,
        "test_loss": test.get("loss"),  # at the weights that were best on validation
        "test_bits_per_byte": test.get("bits_per_byte"),
        "test_loss_last": test_last.get("loss"),
        "initial_loss": initial_loss,
        "unigram_loss": unigram_loss,
        "below_unigram": below_unigram,
        "excess_loss": None if entropy is None or loss is None else loss - entropy,
        "grad_norm": grad_norm,
        "tokens": step * tokens_per_step,
        "steps": step,
        "passes": passes,
        "divergence": divergence,
        "parameters": model["parameters"],
        "mean_dropout": model["mean_dropout"],
    }
