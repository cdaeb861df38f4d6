"""Logistic regression by scikit-learn: the linear probe of a frozen trunk, and the baselines of text classification.

Scores are macro-F1 and accuracy on test documents.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from albert_ablate.config import ConfigError
from albert_ablate.data.tasks import Labelled

# scikit-learn's C, the inverse of the penalty; chosen on validation
BASELINE_PENALTIES = (1.0, 10.0, 100.0)
PROBE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


def require_scikit_learn() -> None:
    """Raise ConfigError if scikit-learn, which fits baselines and probe, is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        raise ConfigError("task=classify needs scikit-learn: pip install 'albert_ablate[classify]'.") from None


def scores(predicted: Sequence[int] | Tensor, classes: Sequence[int] | Tensor, count: int) -> tuple[float, float]:
    """(macro-F1, accuracy): the mean over the `count` classes of 2 TP / (2 TP + FP + FN), and the share that is right.

    A class that neither occurs nor is predicted is left out of the mean."""
    p, c = torch.as_tensor(predicted), torch.as_tensor(classes)
    return (
        MulticlassF1Score(count, average="macro")(p, c).item(),
        MulticlassAccuracy(count, average="micro")(p, c).item(),
    )


def best_regression(x: dict[str, Any], y: dict[str, list[int]], classes: int, penalties: Sequence[float]) -> list[int]:
    """Test predictions of multinomial logistic regression; its penalty is the one best on validation (macro-F1)."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    candidates: list[tuple[float, list[int]]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that stopped early competes all the same
        for c in penalties:
            model = LogisticRegression(C=c, max_iter=300).fit(x["train"], y["train"])
            on_validation, _ = scores(model.predict(x["validation"]), y["validation"], classes)
            candidates.append((on_validation, model.predict(x["test"]).tolist()))
    return max(candidates, key=lambda pair: pair[0])[1]  # the strongest penalty of equals


def probe_scores(features: Mapping[str, np.ndarray], classes: dict[str, list[int]], count: int) -> dict[str, float]:
    """Linear probe: test scores of logistic regression on features (N, D), by split, standardized by those of the
    training documents; nan where a feature is not finite."""
    if not all(np.isfinite(z).all() for z in features.values()):
        return named_scores("probe_", math.nan, math.nan)
    mean, deviation = features["train"].mean(0), features["train"].std(0)
    standardized = {split: (z - mean) / np.where(deviation > 0, deviation, 1.0) for split, z in features.items()}
    predicted = best_regression(standardized, classes, count, PROBE_PENALTIES)
    return named_scores("probe_", *scores(predicted, classes["test"], count))


def baselines(labelled: Labelled, seen: Mapping[str, list[str]]) -> dict[str, float]:
    """Test scores of what needs no language model: the commonest class for all; tf-idf of words with logistic
    regression, on whole documents, and (`_seen`) on what the model reads of them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    y, classes = labelled.numbers, len(labelled.classes)
    commonest = Counter(y["train"]).most_common(1)[0][0]
    out = dict(named_scores("baseline_majority_", *scores([commonest] * len(y["test"]), y["test"], classes)))
    for name, texts in (("baseline_tfidf_", labelled.texts), ("baseline_tfidf_seen_", seen)):
        words = TfidfVectorizer(sublinear_tf=True)
        try:
            x = {"train": words.fit_transform(texts["train"])}
        except ValueError:
            raise ConfigError("The documents hold no words: the tf-idf baseline has nothing to count.") from None
        x |= {split: words.transform(texts[split]) for split in ("validation", "test")}
        out |= named_scores(name, *scores(best_regression(x, y, classes, BASELINE_PENALTIES), y["test"], classes))
    return out


def named_scores(prefix: str, macro_f1: float, accuracy: float) -> dict[str, float]:
    """Both scores under the names that they have in the summary."""
    return {f"{prefix}macro_f1": macro_f1, f"{prefix}accuracy": accuracy}
