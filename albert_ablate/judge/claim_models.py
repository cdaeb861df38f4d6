"""What a claims file may hold: every key with its type, its limits and what it is for. `read_claims` reads one."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from albert_ablate.analysis.registry import Measure, measure
from albert_ablate.config import ConfigError, nearest
from albert_ablate.config.validation import FileModel, KeyPath, Number, Whole, dotted
from albert_ablate.stats.learning_rate import LEAST_RATES, log_step
from albert_ablate.stats.sequential import ALPHA, FIRST, MOST_PAIRS
from albert_ablate.stats.student import FIRST_CORRECTED

SCREEN_PAIRS, SCREEN_RATES, SCREEN_STEP = 12, 5, 3.16  # a few rates must reach far, or the best lies at their edge
EQUAL = {"tokens": 0.0, "parameters": 0.02, "flops": 0.05}
FormName = Literal["screen", "full"]
FORMS: tuple[FormName, ...] = get_args(FormName)
LARGEST_LOG_MARGIN = math.log(2)
UNPROVEN = {  # by runs of another trainer
    "data_order": "the order of the data",
    "tuning": "how their learning rates were chosen",
    "tokens": "how many tokens they were trained on",
}


def _overrides(overrides: Any) -> Any:
    if not isinstance(overrides, list) or not all(isinstance(o, str) and "=" in o for o in overrides):
        raise ConfigError(f"it must be a list of key=value, got {overrides!r}.")
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if key in ("seed", "paths.runs"):
            raise ConfigError(f"{override} is not allowed: the judge chooses it.")
        if key.startswith("hydra"):  # a claims file may be a stranger's
            raise ConfigError(f"{override} is not allowed: a folder of options is named by --config-dir DIR.")
    return overrides


def _rates(grid: tuple[float, ...]) -> tuple[float, ...]:
    if grid and (len(grid) < 2 or list(grid) != sorted(set(grid)) or grid[0] <= 0):
        raise ValueError
    return grid


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError
    return number


def _different(seeds: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError
    return seeds


def _known_equal(equal: dict[str, float]) -> dict[str, float]:
    for key in equal:
        if key not in EQUAL:
            raise ConfigError(f"{key} is unknown: it holds {nearest(key, EQUAL)}.")
    return equal


def _claim_name(name: str) -> str:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError
    return name


_PAIRS = f"a whole number {FIRST} to {{}}; the most pairs of runs"
_RATES = f"an odd number of rates, at least {LEAST_RATES}; of the first stage of tuning"
_STEP = "2, or 3.16 for sqrt(10); the factor from one rate of tuning to the next"
Overrides = Annotated[tuple[str, ...], BeforeValidator(_overrides)]
MeasureName = Annotated[str, AfterValidator(lambda name: measure(name).name)]
Rates = Annotated[tuple[Number, ...], AfterValidator(_rates)]
Step = Annotated[Number, AfterValidator(lambda step: log_step(step, "step"))]
OneOrMore = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda names: names if isinstance(names, list) else [names],
        json_schema_input_type=str | Annotated[list[str], Field(min_length=1)],
    ),
    Field(min_length=1),
]


class Part(FileModel):
    """One contrast: positive differences are what the claim says."""

    treatment: OneOrMore = Field(
        description="an arm or a list of arms; of several the one with the least tuning loss, or with other_end all"
    )
    control: str = Field(description="an arm; what the treatment is compared with")
    measure: MeasureName = Field(description="a measure; see docs/measures.md")
    direction: Literal["lower", "higher"] = Field(
        default_factory=lambda part: measure(part["measure"]).better,
        description="lower or higher; which is better: the measure's own direction if left out",
    )
    margin: Number = Field(
        default_factory=lambda part: math.log(1.005) if measure(part["measure"]).log else math.nan,
        ge=0,
        description="0 or a number above 0; the least difference that counts, in log ratios (0.5 % if left out) or in "
        "the measure's unit",
    )
    null: Literal["0", "margin", "-margin"] = Field(
        "0",
        description="0, margin or -margin; what is tested: better, better by the margin, not worse by the margin",
    )
    rate_factor: Number = Field(
        1.0, gt=0, description="a number above 0; the arms are judged at so many times their tuned learning rate"
    )
    singles: tuple[str, ...] = Field(
        (), description="a list of arms; with one factor each: treatment + (k - 1) control - singles is judged"
    )
    regime: str = Field("", description="a regime; where it is another than the claim's")
    other_end: str = Field(
        "", description="an arm; the mean of all treatments is judged against the better one of control and this"
    )

    @model_validator(mode="before")
    @classmethod
    def _null(cls, tree: Any) -> Any:
        """YAML reads the word null as nothing, and 0 as a number; an empty value stands for the default."""
        if not isinstance(tree, Mapping):
            return tree
        tree = {"null" if key is None else key: value for key, value in tree.items()}
        tree |= {"null": "0"} if tree.get("null") == 0 and "null" in tree else {}
        return {k: v for k, v in tree.items() if k not in ("singles", "other_end", "regime") or v}

    @model_validator(mode="after")
    def _fits(self) -> "Part":
        m = measure(self.measure)
        if self.control in self.treatment:
            raise ConfigError(f"{self.control} is the control: it cannot be a treatment too.")
        if self.other_end and (self.other_end in (*self.treatment, self.control) or self.singles):
            raise ConfigError(
                f"other_end={self.other_end} is not allowed: an arm beside treatment and control, no singles."
            )
        if math.isnan(self.margin):  # not given
            raise ConfigError(f"needs margin, in {m.unit}: only log ratios have a default, 0.5 %.")
        if m.log and self.margin > LARGEST_LOG_MARGIN:
            raise ConfigError(
                f"margin={self.margin:g} is not allowed: of log ratios at most {LARGEST_LOG_MARGIN:.3g}, a factor of "
                "2, since any change would lie inside it."
            )
        if self.margin == 0 and self.null != "0":
            raise ConfigError("margin=0 is not allowed: a number above 0.")
        for key in ("singles", "other_end"):
            if getattr(self, key) and m.kind != "run":
                raise ConfigError(f"{key} needs a measure of one run, not {m.name}.")
        return self


class Form(FileModel):
    """A form of a claim: where and with how many pairs it is judged."""

    regime: str = Field(description="a regime; where the claim is asked")
    N: Whole = Field(20, ge=FIRST, le=MOST_PAIRS, description=_PAIRS.format(MOST_PAIRS))
    rates: Annotated[Whole, AfterValidator(_odd)] = Field(7, ge=LEAST_RATES, description=_RATES)
    step: Step = Field(2.0, description=_STEP)
    grid: Rates = Field(
        (),
        description="a list of learning rates, two or more positive ones in rising order; for measures over them",
    )
    measure: str = Field(
        "", description="a measure; of the primary contrasts, where this form asks something cheaper than they do"
    )


class ScreenForm(Form):
    """The small form of a claim."""

    N: Whole = Field(SCREEN_PAIRS, ge=FIRST, le=SCREEN_PAIRS, description=_PAIRS.format(SCREEN_PAIRS))
    rates: Annotated[Whole, AfterValidator(_odd)] = Field(SCREEN_RATES, ge=LEAST_RATES, description=_RATES)
    step: Step = Field(log_step(SCREEN_STEP, "step"), description=_STEP)


class ClaimText(FileModel):
    """A claim: a statement, the contrasts that it rests on, and how they are judged."""

    name: Annotated[str, AfterValidator(_claim_name)] = Field(
        description="a name of letters, digits, _ and -; in ledgers and for --only"
    )
    statement: Annotated[str, AfterValidator(lambda text: " ".join(text.split()))] = Field(
        description="text; the sentence that can be wrong"
    )
    needs: Literal["one", "all", "any"] = Field(
        "one", description="one, all or any; of the parts must hold: one where there is one"
    )
    parts: tuple[Part, ...] = Field(
        min_length=1, description="a list of one or more contrasts; the claim rests on them"
    )
    secondary: tuple[Part, ...] = Field((), description="a list of contrasts; shown without a verdict")
    screen: ScreenForm | None = Field(None, description="a form; the small one, for a laptop")
    full: Form | None = Field(None, description="a form; the large one")
    equal: Annotated[dict[str, Number], AfterValidator(_known_equal)] = Field(
        default_factory=lambda: dict(EQUAL),
        description="a number for each of tokens, parameters and flops; the share by which the arms may differ in it",
    )
    tuned: tuple[Literal["optimizer.lr"], ...] = Field(
        ("optimizer.lr",),
        description="a list, of optimizer.lr or empty, since only optimizer.lr is tuned; empty: at the arms' own rates",
    )
    test: Literal["t", "skew_corrected", "skew_bounded", "moderated"] = Field(
        "t", description="t, skew_corrected, skew_bounded or moderated; the paired test, see docs/verdicts.md"
    )
    waives: tuple[Literal["data_order", "tuning", "tokens"], ...] = Field(
        (), description=f"a list, of {', '.join(UNPROVEN)}; what runs of another trainer need not prove"
    )
    seeds: Annotated[tuple[Annotated[Whole, Field(ge=0, lt=1_000_000)], ...], AfterValidator(_different)] = Field(
        default_factory=lambda claim: tuple(range(max((f.N for f in map(claim.get, FORMS) if f), default=0))),
        description="a list of different seeds from 0 to 999,999, as many as pairs or more; in order, 0 to N - 1",
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, tree: Any) -> Any:
        return {k: v for k, v in tree.items() if k != "secondary" or v} if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _fits(self) -> "ClaimText":
        if not self.forms:
            raise ConfigError("needs screen or full, with its regime.")
        if (self.needs == "one") != (len(self.parts) == 1):
            raise ConfigError(
                f"needs={self.needs} is not allowed with {len(self.parts)} parts: one for one, else all or any."
            )
        if len(self.parts) > 1 and any(measure(p.measure).kind == "exact" for p in self.parts):
            raise ConfigError("a measure without noise must be a claim's only part.")
        if self.test.startswith("skew_") and (few := [f.N for f in self.forms.values() if f.N < FIRST_CORRECTED]):
            raise ConfigError(f"test={self.test} needs N of {FIRST_CORRECTED} or more, got {few[0]}.")
        if self.test == "moderated" and not self.tuned:
            raise ConfigError(f"test={self.test} takes its spread from tuning runs: it needs tuned: [optimizer.lr].")
        most = max(f.N for f in self.forms.values())
        if len(self.seeds) < most:
            raise ConfigError(f"seeds must name {most} or more different seeds from 0 to 999,999, in order.")
        for name, form in self.forms.items():
            unlike = [unlike_words(measure(p.measure), measure(form.measure)) for p in self.parts if form.measure]
            if any(unlike):
                raise ConfigError(f"{name}: {next(filter(None, unlike))}")
            if not form.grid and any(measure(p.measure).kind == "grid" for p in (*self.parts, *self.secondary)):
                raise ConfigError(f"{name} needs grid, the learning rates that its measures run over.")
        return self

    @property
    def forms(self) -> dict[str, Form]:
        """The forms that the claim has, by name."""
        return {name: form for name in FORMS if (form := getattr(self, name)) is not None}

    def contrasts(self, form: str) -> tuple[Part, ...]:
        """The primary contrasts of a form."""
        return tuple(self._asked(form, p) for p in self.parts)

    def secondary_contrasts(self, form: str) -> tuple[Part, ...]:
        """The secondary contrasts of a form: where it asks another measure, those that can be asked it too."""
        parts = [self._asked(form, p) for p in self.secondary]
        if self.forms[form].measure:
            parts = [p for p in dict.fromkeys(parts) if p.measure == self.forms[form].measure]
        return tuple(p for p in parts if p not in self.contrasts(form))

    def _asked(self, form: str, part: Part) -> Part:
        name = self.forms[form].measure
        same_unit = name and unlike_words(measure(part.measure), measure(name)) is None
        return part.model_copy(update={"measure": name}) if same_unit else part

    def rate_matters(self, measure: Measure) -> bool:
        """Whether an arm is judged at its tuned rate: not over a grid of rates, nor where no rate has acted yet."""
        return bool(self.tuned) and measure.kind not in ("grid", "exact", "initial")


def unlike_words(asked: Measure, instead: Measure) -> str | None:
    """Margin and direction are the contrast's, so another measure must be in their unit: why it is not, or None."""
    if (asked.unit, asked.better, asked.log) == (instead.unit, instead.better, instead.log):
        return None

    def scale(m: Measure) -> str:
        return f"{'log ratios of ' if m.log else ''}{m.unit}, {m.better} is better"

    return (
        f"measure={instead.name} is not allowed: it is judged in {scale(instead)}, "
        f"the contrast's {asked.name} in {scale(asked)}."
    )


class Regime(FileModel):
    """Where claims are asked: a size and a text."""

    text: str = Field(description="text; the regime in words")
    overrides: Overrides = Field(description="a list of key=value; all arms share them")


class Family(FileModel):
    """The claims that share one error budget, named before any run."""

    name: str | None = Field(None, description="text; the family's name, that of the file if left out")
    size: Whole | None = Field(
        None, description="a whole number, at least as many as the file has claims; a claim that is not run counts too"
    )
    alpha: Annotated[float, Field(strict=True, gt=0, le=0.2)] = Field(
        ALPHA, description="a number above 0, at most 0.2; the chance of any false verdict in the family"
    )
    forms: Annotated[tuple[FormName, ...], AfterValidator(_different)] = Field(
        (), description="a list, of screen and full; the forms that share the error, all that claims have if left out"
    )


class ClaimsTree(FileModel):
    """A claims file."""

    family: Family = Field(
        default_factory=lambda: Family.model_validate({}),
        description="a mapping; the claims that share one error, named before any run",
    )
    arms: dict[str, Overrides] = Field(
        min_length=1, description="a mapping of names to lists of key=value; what is compared"
    )
    regimes: dict[str, Regime] = Field(min_length=1, description="a mapping of names to regimes; where it is compared")
    claims: tuple[ClaimText, ...] = Field(
        min_length=1, description="a list of one or more claims; the sentences that can be wrong"
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, tree: Any) -> Any:
        return {k: v for k, v in tree.items() if k != "family" or v} if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _fits(self) -> "ClaimsTree":
        names = [c.name for c in self.claims]
        if twice := [n for n in names if names.count(n) > 1]:
            raise ConfigError(f"the claim {twice[0]} is given twice.")
        if self.family.size is not None and self.family.size < len(names):
            raise ConfigError(
                f"family.size={self.family.size} is not allowed: it must be at least the file's {len(names)} claims."
            )
        for claim in self.claims:
            for form_name, form in claim.forms.items():
                _refuse_unknown(f"claim {claim.name}.{form_name}", "regime", form.regime, "it", self.regimes)
            for key in ("parts", "secondary"):
                for i, part in enumerate(getattr(claim, key)):
                    self._refuse_names(f"claim {claim.name}.{key}[{i}]", part)
        return self

    def _refuse_names(self, where: str, part: Part) -> None:
        roles = [("treatment", part.treatment), ("control", [part.control]), ("singles", part.singles)]
        for role, names in [*roles, ("other_end", filter(None, [part.other_end]))]:
            for arm in names:
                _refuse_unknown(where, role, arm, "an arm", self.arms)
        if part.regime:
            _refuse_unknown(where, "regime", part.regime, "it", self.regimes)


def _refuse_unknown(where: str, key: str, name: str, what: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise ConfigError(f"{where}: {key}={name} is unknown: {what} is one of {nearest(name, known)}.")


def place_words(tree: Any, place: KeyPath) -> str:
    """A place in a claims file in words: claim pre_is_better.parts[0]."""
    if not place:
        return "the file"
    if place[0] != "claims" or len(place) < 2:
        return dotted(place)
    claim = tree["claims"][place[1]]
    name = f"claim {claim.get('name', '?')}" if isinstance(claim, Mapping) else "a claim"
    return name + (f".{dotted(place[2:])}" if place[2:] else "")
