"""How far pairs of a contrast scatter, as far as anything here knows, and what a claim with such a spread takes."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from albert_ablate.analysis.registry import Measure
from albert_ablate.config import ConfigError
from albert_ablate.judge.claims import ClaimsFile, ClaimText, Part, measure_of
from albert_ablate.judge.contrasts import gather, tuning_variance
from albert_ablate.judge.run_store import RunStore
from albert_ablate.stats.sequential import FIRST, nominal, p_effect

SIMULATED_STUDIES = 4000  # simulated, of one effect
FEWEST_PAIRS = 4  # of which a spread is taken


@cache
def expected(effects: tuple[float, ...], N: int, level: float, needs: str = "one") -> tuple[float, float]:
    """Mean pairs and power of a claim alone at `level`, by simulation of independent contrasts.

    effects: of each contrast, in spreads of a pair. needs: one, all or any of them, as the claim does.
    """
    rng, k = np.random.default_rng(0), len(effects)
    each = nominal(level / (k if needs == "any" else 1), N)
    x = [rng.standard_normal((SIMULATED_STUDIES, N)) + abs(effect) for effect in effects]
    p = np.stack([[p_effect(own[:, :n]) for n in range(FIRST, N + 1)] for own in x])  # contrast, look, study
    p = np.minimum.accumulate(p, axis=1)
    rejected = (p <= each).all(0) if needs == "all" else (p <= each).any(0)
    pairs = np.where(rejected.any(0), rejected.argmax(0) + FIRST, N)
    return float(pairs.mean()), float(rejected.any(0).mean())


def spread_of(
    file: ClaimsFile, claim: ClaimText, part: Part, form: str, store: RunStore, given: float = 0.0
) -> tuple[float, str]:
    """Standard deviation of a pair's difference and where it is from; 0 where nobody knows.

    What is given, else of the pairs that are there, of a calibration, of tuning runs.
    """
    if given:
        return given, "given"
    differences = np.asarray(gather(file, claim, part, form, store).differences, float)
    differences = differences[np.isfinite(differences)]
    if len(differences) >= FEWEST_PAIRS and np.ptp(differences) > 0:
        return float(differences.std(ddof=1)), f"of {len(differences)} pairs that are there"
    s, source = _calibrated(file, claim, part, form, store)
    return (s, source) if s else (math.sqrt(tuning_variance(file, claim, part, form, store)), "of tuning runs")


def _calibrated(file: ClaimsFile, claim: ClaimText, part: Part, form: str, store: RunStore) -> tuple[float, str]:
    """As `albert-ablate calibrate` found it for these two arms in either order, else for one of them unpaired."""
    m = measure_of(part)
    if not m.log or part.singles or len(part.treatment) > 1 or part.rate_factor != 1:
        return 0.0, ""
    arms = [store.arm(file.overrides(claim, part, form, a)).keys.arm for a in (part.treatment[0], part.control)]
    alone = (0.0, "")
    for path in sorted((store.root / "calibration").glob("*.json")):
        content = _read(path, m)
        if content is None:
            continue
        labels = {key: label for label, key in content["keys"].items()}
        own = [labels.get(key, "") for key in arms]
        if content["control"] not in own:
            continue
        other = own[1 - own.index(content["control"])]
        entry = content["treatments"].get(other, {})
        if "spread" in entry:
            return float(entry["spread"][0]), f"of {entry['finished']} pairs of a calibration"
        alone = float(content["unpaired_spread"]), f"of {content['runs']} calibration runs of one arm, unpaired"
    return alone


def _read(path: Path, m: Measure) -> Mapping[str, Any] | None:
    """A calibration of this measure that says which arms it is of; None for another, or one of an older release."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["measure"] != m.name or "keys" not in content:
            return None
        numbers = [
            content["unpaired_spread"],
            *(e["spread"][0] for e in content["treatments"].values() if "spread" in e),
        ]
        if not all(math.isfinite(x) and x > 0 for x in numbers) or content["control"] not in content["keys"]:
            raise ValueError("a spread is not a number above 0")
        return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise ConfigError(f"{path} cannot be read ({why}): remove it, or calibrate again.") from None
