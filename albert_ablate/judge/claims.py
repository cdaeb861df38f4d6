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
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from albert_ablate.analysis.registry import Measure, measure
from albert_ablate.config import ConfigError, nearest, read_yaml, study_file
from albert_ablate.stats.learning_rate import LEAST_RATES, log_step
from albert_ablate.stats.sequential import ALPHA, FIRST, FIRST_CORRECTED, MOST_PAIRS, TESTS

SCREEN_PAIRS, SCREEN_RATES, SCREEN_STEP = 12, 5, 3.16  # a few rates must reach far, or the best lies at their edge
EQUAL = {"tokens": 0.0, "parameters": 0.02, "flops": 0.05}
TUNED = ("optimizer.lr",)
FORMS = ("screen", "full")
UNPROVEN = {  # by runs of another trainer
    "data_order": "the order of the data",
    "tuning": "how their learning rates were chosen",
    "tokens": "how many tokens they were trained on",
}


@dataclass(frozen=True)
class Part:
    """One contrast: positive differences are what the claim says."""

    treatment: tuple[str, ...]  # arms; of several the one with the least loss on tuning seeds, or with other_end all
    control: str
    measure: str
    direction: str
    margin: float
    null: str = "0"
    rate_factor: float = 1.0  # times the tuned learning rate
    singles: tuple[str, ...] = ()  # arms with one factor each: treatment + (k - 1) control - singles is judged
    regime: str = ""  # another than the claim's
    other_end: str = ""  # an arm: the mean of all treatments is judged against the better one of control and this


@dataclass(frozen=True)
class Form:
    regime: str
    N: int
    rates: int = 7  # of tuning
    step: float = 2.0  # from one rate of tuning to the next
    grid: tuple[float, ...] = ()  # learning rates of measures over a grid
    measure: str = ""  # of the primary contrasts, where this form asks something cheaper than they do


@dataclass(frozen=True)
class ClaimText:
    name: str
    statement: str
    needs: str
    parts: tuple[Part, ...]
    secondary: tuple[Part, ...]
    forms: Mapping[str, Form]
    equal: Mapping[str, float] = field(default_factory=lambda: dict(EQUAL))
    tuned: tuple[str, ...] = TUNED
    seeds: tuple[int, ...] = ()
    test: str = "t"  # of `stats.sequential.TESTS`
    waives: tuple[str, ...] = ()  # of UNPROVEN: what runs of another trainer need not prove

    def contrasts(self, form: str) -> tuple[Part, ...]:
        """The primary contrasts of a form."""
        return tuple(self._asked(form, p) for p in self.parts)

    def secondary_contrasts(self, form: str) -> tuple[Part, ...]:
        """The secondary contrasts of a form: where it asks another measure, those that can be asked it too."""
        own = [self._asked(form, p) for p in self.secondary]
        if self.forms[form].measure:
            own = [p for p in dict.fromkeys(own) if p.measure == self.forms[form].measure]
        return tuple(p for p in own if p not in self.contrasts(form))

    def _asked(self, form: str, part: Part) -> Part:
        name = self.forms[form].measure
        return replace(part, measure=name) if name and _unlike(measure(part.measure), measure(name)) is None else part

    def rate_matters(self, measure: Measure) -> bool:
        """Whether an arm is judged at its tuned rate: not over a grid of rates, nor where no rate has acted yet."""
        return bool(self.tuned) and measure.kind not in ("grid", "exact", "initial")


@dataclass(frozen=True)
class ClaimsFile:
    path: Path
    family: str
    size: int
    alpha: float
    arms: Mapping[str, tuple[str, ...]]
    regimes: Mapping[str, Mapping[str, Any]]
    claims: tuple[ClaimText, ...]
    named_forms: tuple[str, ...] = ()  # family.forms: those that share the family's level, where the file says so

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that share the family's level: those named, else all that its claims have."""
        return self.named_forms or tuple(f for f in FORMS if any(f in c.forms for c in self.claims))

    def overrides(self, claim: ClaimText, part: Part, form: str, arm: str) -> tuple[str, ...]:
        regime = part.regime or claim.forms[form].regime
        return (*self.regimes[regime]["overrides"], *self.arms[arm])

    def regime(self, claim: ClaimText, form: str, part: Part | None = None) -> str:
        return str(self.regimes[(part.regime if part else "") or claim.forms[form].regime]["text"])

    def hash(self, claim: ClaimText, form: str, named: bool = True) -> str:
        """Of what must not change once a run has been seen: contrasts, measures, margins, N, family, seeds, arms.

        named: with the forms that family.forms names.
        """
        parts = [
            {k: v for k, v in asdict(p).items() if k != "other_end" or v}
            | {"arms": {a: self.overrides(claim, p, form, a) for a in arms_of(p)}}
            for p in claim.contrasts(form)
        ]
        kept = {
            "parts": parts, "needs": claim.needs, "form": asdict(claim.forms[form]), "equal": dict(claim.equal),
            "tuned": claim.tuned, "seeds": claim.seeds,
            "family": [self.family, self.size, self.alpha, *([self.named_forms] if named and self.named_forms else [])],
        }  # fmt: skip
        if claim.test != "t":
            kept["test"] = claim.test
        if claim.waives:
            kept["waives"] = claim.waives
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def arms_of(part: Part) -> list[str]:
    return list(dict.fromkeys([*part.treatment, part.control, *part.singles, *filter(None, [part.other_end])]))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_claims(path: str | Path) -> ClaimsFile:
    """The claims in a file, or in the shipped one of this name; ConfigError for whatever is not allowed."""
    path = study_file(path)
    tree = read_yaml(path)
    try:
        return _file(path, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _file(path: Path, tree: Any) -> ClaimsFile:
    if isinstance(tree, Mapping) and "parameters" in tree and "claims" not in tree:
        raise ConfigError("this is a sweep file, not a file of claims: `albert-ablate sweep` takes it.")
    _keys("the file", tree, ("family", "arms", "regimes", "claims"), ("arms", "regimes", "claims"))
    arms = {str(k): _overrides(f"arms.{k}", v) for k, v in _mapping("arms", tree["arms"]).items()}
    regimes = {}
    for name, regime in _mapping("regimes", tree["regimes"]).items():
        _keys(f"regimes.{name}", regime, ("text", "overrides"), ("text", "overrides"))
        overrides = _overrides(f"regimes.{name}.overrides", regime["overrides"])
        if not isinstance(regime["text"], str):
            raise ConfigError(f"regimes.{name}.text={regime['text']} is not allowed: words to say the regime in.")
        regimes[str(name)] = {"text": regime["text"], "overrides": overrides}
    if not isinstance(tree["claims"], list) or not tree["claims"]:
        raise ConfigError("claims must be a list of one or more claims.")
    claims = tuple(_claim(c, arms, regimes) for c in tree["claims"])
    names = [c.name for c in claims]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ConfigError(f"the claim {twice[0]} stands twice.")
    family = tree.get("family") or {}
    _keys("family", family, ("name", "size", "alpha", "forms"), ())
    size, alpha = family.get("size", len(claims)), family.get("alpha", ALPHA)
    if isinstance(size, bool) or not isinstance(size, int) or size < len(claims):
        raise ConfigError(f"family.size={size} is not allowed: it must be at least the file's {len(claims)} claims.")
    if not isinstance(alpha, float) or not 0 < alpha <= 0.2:
        raise ConfigError(f"family.alpha={alpha} is not allowed: it must be a number above 0, at most 0.2.")
    forms = family.get("forms", [])
    if not isinstance(forms, list) or [f for f in forms if f not in FORMS] or len({*forms}) < len(forms):
        raise ConfigError(f"family.forms={forms} is not allowed: it is a list, of {' and '.join(FORMS)}.")
    return ClaimsFile(path, str(family.get("name", path.stem)), size, alpha, arms, regimes, claims, tuple(forms))


CLAIM_KEYS = ("name", "statement", "needs", "parts", "secondary", "screen", "full", "equal", "tuned", "seeds", "test",
              "waives")  # fmt: skip


def _claim(tree: Any, arms: Mapping, regimes: Mapping) -> ClaimText:
    where = f"claim {tree.get('name', '?')}" if isinstance(tree, Mapping) else "a claim"
    _keys(where, tree, CLAIM_KEYS, ("name", "statement", "parts"))
    name = str(tree["name"])
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"name={name} is not allowed: a claim's name has letters, digits, _ and -.")
    forms = {form: _form(f"{where}.{form}", tree[form], regimes, form) for form in FORMS if form in tree}
    if not forms:
        raise ConfigError(f"{where} needs screen or full, with its regime.")
    lists = {}
    for key in ("parts", "secondary"):
        found = tree.get(key) or []
        if not isinstance(found, list):
            raise ConfigError(f"{where}.{key} must be a list of contrasts.")
        lists[key] = tuple(_part(f"{where}.{key}[{i}]", p, arms, regimes) for i, p in enumerate(found))
    parts = lists["parts"]
    if not parts:
        raise ConfigError(f"{where}.parts must hold at least one contrast.")
    needs = tree.get("needs", "one")
    if needs not in ("one", "all", "any") or (needs == "one") != (len(parts) == 1):
        raise ConfigError(
            f"{where}: needs={needs} is not allowed with {len(parts)} parts: one for one, else all or any."
        )
    if len(parts) > 1 and any(measure(p.measure).kind == "exact" for p in parts):
        raise ConfigError(f"{where}: a measure without noise must be a claim's only part.")
    for form, f in forms.items():
        for p in parts if f.measure else ():
            if unlike := _unlike(measure(p.measure), measure(f.measure)):
                raise ConfigError(f"{where}.{form}: {unlike}")
        if not f.grid and any(measure(p.measure).kind == "grid" for p in (*parts, *lists["secondary"])):
            raise ConfigError(f"{where}.{form} needs grid, the learning rates that its measures run over.")
    equal = tree.get("equal", EQUAL)
    _keys(f"{where}.equal", equal, tuple(EQUAL), ())
    if not isinstance(tree.get("tuned", []), list):
        raise ConfigError(
            f"{where}: tuned={tree['tuned']} is not allowed: it is a list, of {', '.join(TUNED)} or empty."
        )
    tuned = tuple(tree.get("tuned", TUNED))
    if bad := [t for t in tuned if t not in TUNED]:
        raise ConfigError(f"{where}: tuned={bad[0]} is not allowed: only {', '.join(TUNED)} is tuned.")
    test = tree.get("test", "t")
    if test not in TESTS:
        raise ConfigError(f"{where}: test={test} is not allowed: it is one of {nearest(str(test), TESTS)}.")
    if test == "skew_corrected" and (few := [f.N for f in forms.values() if f.N < FIRST_CORRECTED]):
        raise ConfigError(f"{where}: test={test} needs N of {FIRST_CORRECTED} or more, got {few[0]}.")
    if test == "moderated" and not tuned:
        raise ConfigError(f"{where}: test={test} takes its spread from tuning runs: it needs tuned: [optimizer.lr].")
    waives = tree.get("waives", [])
    if not isinstance(waives, list) or [w for w in waives if w not in UNPROVEN]:
        raise ConfigError(f"{where}: waives={waives} is not allowed: it is a list, of {', '.join(UNPROVEN)}.")
    most = max(f.N for f in forms.values())
    seeds = tree.get("seeds", list(range(most)))
    whole = isinstance(seeds, list) and all(isinstance(s, int) and 0 <= s < 1_000_000 for s in seeds)
    if not whole or len(set(seeds)) < len(seeds) or len(seeds) < most:
        raise ConfigError(f"{where}.seeds must name {most} or more different seeds from 0 to 999,999, in order.")
    equal = {k: _number(f"{where}.equal.{k}", v) for k, v in equal.items()}
    return ClaimText(name, " ".join(str(tree["statement"]).split()), needs, parts, lists["secondary"], forms,
                     equal, tuned, tuple(seeds), test, tuple(waives))  # fmt: skip


def _form(where: str, tree: Any, regimes: Mapping, form: str) -> Form:
    _keys(where, tree, ("regime", "N", "rates", "step", "grid", "measure"), ("regime",))
    if tree["regime"] not in regimes:
        raise ConfigError(
            f"{where}: regime={tree['regime']} is unknown: it is one of {_near(tree['regime'], regimes)}."
        )
    default = (SCREEN_PAIRS, SCREEN_RATES, SCREEN_STEP) if form == "screen" else (20, 7, 2.0)
    N, rates = tree.get("N", default[0]), tree.get("rates", default[1])
    step = log_step(_number(f"{where}.step", tree.get("step", default[2])), f"{where}: step")
    most = SCREEN_PAIRS if form == "screen" else MOST_PAIRS
    if isinstance(N, bool) or not isinstance(N, int) or not FIRST <= N <= most:
        raise ConfigError(f"{where}: N={N} is not allowed: at most so many pairs, a whole number {FIRST} to {most}.")
    if isinstance(rates, bool) or not isinstance(rates, int) or rates < LEAST_RATES or rates % 2 == 0:
        raise ConfigError(f"{where}: rates={rates} is not allowed: an odd number of rates, at least {LEAST_RATES}.")
    if not isinstance(tree.get("grid", []), list):
        raise ConfigError(f"{where}: grid={tree['grid']} is not allowed: it is a list of learning rates.")
    grid = tuple(_number(f"{where}.grid", r) for r in tree.get("grid", ()))
    if grid and (len(grid) < 2 or list(grid) != sorted(set(grid)) or grid[0] <= 0):
        raise ConfigError(f"{where}: grid={list(grid)} is not allowed: two or more positive rates in rising order.")
    return Form(tree["regime"], N, rates, step, grid, str(tree.get("measure", "")))


def _scale(m: Measure) -> str:
    return f"{'log ratios of ' if m.log else ''}{m.unit}, {m.better} is better"


def _unlike(asked: Measure, instead: Measure) -> str | None:
    """Margin and direction are the contrast's, so another measure must be in their unit."""
    if (asked.unit, asked.better, asked.log) == (instead.unit, instead.better, instead.log):
        return None
    return (
        f"measure={instead.name} is not allowed: it is judged in {_scale(instead)}, "
        f"the contrast's {asked.name} in {_scale(asked)}."
    )


PART_KEYS = ("treatment", "control", "measure", "direction", "margin", "null", "rate_factor", "singles", "regime",
             "other_end")  # fmt: skip


def _part(where: str, tree: Any, arms: Mapping, regimes: Mapping) -> Part:
    if isinstance(tree, Mapping):
        tree = {"null" if key is None else key: value for key, value in tree.items()}  # YAML reads the word as nothing
    _keys(where, tree, PART_KEYS, ("treatment", "control", "measure"))
    several = tree["treatment"] if isinstance(tree["treatment"], list) else [tree["treatment"]]
    singles = tree.get("singles") or []
    end = [tree["other_end"]] if tree.get("other_end") else []
    for role, names in (
        ("treatment", several),
        ("control", [tree["control"]]),
        ("singles", singles),
        ("other_end", end),
    ):
        for arm in names:
            if arm not in arms:
                raise ConfigError(f"{where}: {role}={arm} is unknown: an arm is one of {_near(arm, arms)}.")
    if tree["control"] in several:
        raise ConfigError(f"{where}: {tree['control']} is the control: it cannot be a treatment too.")
    if end and (end[0] in (*several, tree["control"]) or singles):
        raise ConfigError(
            f"{where}: other_end={end[0]} is not allowed: an arm beside treatment and control, no singles."
        )
    m = measure(str(tree["measure"]))
    direction = tree.get("direction", m.better)
    if direction not in ("lower", "higher"):
        raise ConfigError(f"{where}: direction={direction} is not allowed: it is lower or higher.")
    if "margin" not in tree and not m.log:
        raise ConfigError(f"{where} needs margin, in {m.unit}: only log ratios have a default, 0.5 %.")
    margin = _number(f"{where}.margin", tree.get("margin", math.log(1.005)))
    null = str(tree.get("null", "0"))
    if null not in ("0", "margin", "-margin"):
        raise ConfigError(f"{where}: null={null} is not allowed: it is one of 0, margin, -margin.")
    if margin < 0 or not math.isfinite(margin) or (margin == 0 and null != "0"):
        raise ConfigError(f"{where}: margin={margin:g} is not allowed: a number above 0.")
    for key in (k for k, given in (("singles", singles), ("other_end", end)) if given and m.kind != "run"):
        raise ConfigError(f"{where}: {key} needs a measure of one run, not {m.name}.")
    regime = str(tree.get("regime", ""))
    if regime and regime not in regimes:
        raise ConfigError(f"{where}: regime={regime} is unknown: it is one of {_near(regime, regimes)}.")
    factor = _number(f"{where}.rate_factor", tree.get("rate_factor", 1.0))
    if not 0 < factor < math.inf:
        raise ConfigError(f"{where}: rate_factor={factor:g} is not allowed: a number above 0.")
    return Part(tuple(several), tree["control"], m.name, direction, margin, null, factor, tuple(singles), regime, *end)


def _near(word: Any, allowed: Mapping) -> str:
    return nearest(str(word), list(allowed))


def _mapping(where: str, tree: Any) -> Mapping:
    if not isinstance(tree, Mapping) or not tree:
        raise ConfigError(f"{where} must hold names and what they stand for.")
    return tree


def _keys(where: str, tree: Any, allowed: Sequence[str], needed: Sequence[str]) -> None:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where} holds {', '.join(allowed)}, not {tree!r}.")
    for key in tree:
        if key not in allowed:
            raise ConfigError(f"{where}: {key} is unknown: it holds {nearest(str(key), allowed)}.")
    for key in needed:
        if key not in tree:
            raise ConfigError(f"{where}: {key} is missing.")


def _overrides(where: str, found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(o, str) and "=" in o for o in found):
        raise ConfigError(f"{where} must be a list of key=value, got {found!r}.")
    for o in found:
        if o.lstrip("+").partition("=")[0] in ("seed", "paths.runs"):
            raise ConfigError(f"{where}: {o} is not allowed: the judge chooses it.")
        if o.lstrip("+").partition("=")[0].startswith("hydra"):  # a claims file may be a stranger's
            raise ConfigError(f"{where}: {o} is not allowed: a folder of options is named by --config-dir DIR.")
    return tuple(found)


def _number(where: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}={value} is not allowed: it must be a number.") from None


def measure_of(part: Part) -> Measure:
    return measure(part.measure)
