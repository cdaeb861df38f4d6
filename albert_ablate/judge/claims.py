"""A claims file: arms, regimes and the sentences that can be wrong (sweeps/claims.yaml is the example).

    family: {name: mine, size: 2}             # named before any run; a claim not run counts too, and each of its forms
    arms: {pre: [norm=pre_ln], post: [norm=post_ln]}
    regimes:
      short: {text: at 12 layers, overrides: [model.layers=12, budget.tokens=100_000]}
    claims:
      - name: pre_is_better
        statement: Pre-norm reaches a lower test loss than post-norm.
        parts: [{treatment: pre, control: post, measure: test_loss}]
        screen: {regime: short, N: 12}

Arms are composed and checked when a ledger is made or a price is asked for (records/keys.py).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert_ablate.analysis.registry import Measure, measure
from albert_ablate.config import ConfigError, read_yaml, study_file
from albert_ablate.config.validation import read_model
from albert_ablate.judge.claim_models import FORMS, ClaimsTree, ClaimText, Part, Regime, place_words


@dataclass(frozen=True)
class ClaimsFile:
    """The claims of a file as they are judged."""

    path: Path
    family: str
    size: int
    alpha: float
    arms: Mapping[str, tuple[str, ...]]
    regimes: Mapping[str, Regime]
    claims: Sequence[ClaimText]
    named_forms: tuple[str, ...] = ()  # family.forms: those that share the family's level, where the file says so

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that share the family's level: those named, else all that its claims have."""
        return self.named_forms or tuple(f for f in FORMS if any(f in c.forms for c in self.claims))

    def overrides(self, claim: ClaimText, part: Part, form: str, arm: str) -> tuple[str, ...]:
        """The overrides of an arm in the regime of a contrast."""
        return (*self._regime(claim, form, part).overrides, *self.arms[arm])

    def regime(self, claim: ClaimText, form: str, part: Part | None = None) -> str:
        """The regime in words."""
        return self._regime(claim, form, part).text

    def _regime(self, claim: ClaimText, form: str, part: Part | None) -> Regime:
        return self.regimes[(part.regime if part else "") or claim.forms[form].regime]

    def hash(self, claim: ClaimText, form: str, named: bool = True) -> str:
        """Of what must not change once a run has been seen: contrasts, measures, margins, N, family, seeds, arms.

        named: with the forms that family.forms names.
        """
        parts = [
            {k: v for k, v in p.model_dump().items() if k != "other_end" or v}
            | {"arms": {a: self.overrides(claim, p, form, a) for a in arms_of(p)}}
            for p in claim.contrasts(form)
        ]
        content: dict[str, Any] = {
            "parts": parts, "needs": claim.needs, "form": claim.forms[form].model_dump(), "equal": claim.equal,
            "tuned": claim.tuned, "seeds": claim.seeds,
            "family": [self.family, self.size, self.alpha, *([self.named_forms] if named and self.named_forms else [])],
        }  # fmt: skip
        # what came later is left out at its default, so that older registrations hold
        content |= {"test": claim.test} if claim.test != "t" else {}
        content |= {"waives": claim.waives} if claim.waives else {}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def arms_of(part: Part) -> list[str]:
    """The arms of a contrast, each once."""
    return list(dict.fromkeys([*part.treatment, part.control, *part.singles, *filter(None, [part.other_end])]))


def measure_of(part: Part) -> Measure:
    """What is measured in a contrast."""
    return measure(part.measure)


def read_claims(path: str | Path) -> ClaimsFile:
    """The claims in a file, or in the shipped one of this name; ConfigError for whatever is not allowed."""
    path = study_file(path)
    tree = read_yaml(path)
    try:
        if isinstance(tree, Mapping) and "parameters" in tree and "claims" not in tree:
            raise ConfigError("this is a sweep file, not a file of claims: `albert-ablate sweep` takes it.")
        read = read_model(ClaimsTree, tree, lambda place: place_words(tree, place))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    family = read.family
    return ClaimsFile(
        path, family.name or path.stem, family.size or len(read.claims), family.alpha, read.arms, read.regimes,
        read.claims, family.forms,
    )  # fmt: skip


def claims_schema() -> dict[str, Any]:
    """The JSON schema of a claims file."""
    return ClaimsTree.model_json_schema()
