"""`albert-ablate report RUNS`: all runs below a folder, and what was judged of them, as one report.

An arm here is a setting, named by what it differs in from the others. Tuning runs appear in the tuning section only.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.load import Runs, load_runs
from albert_ablate.analysis.numbers import human, visible
from albert_ablate.analysis.tables import (
    baseline,
    differences_by,
    key_of,
    mean_interval,
    means,
    paired,
    percent,
    settings_and_names,
    with_mean,
)
from albert_ablate.config import ConfigError
from albert_ablate.records import store
from albert_ablate.records.checked import read_checked
from albert_ablate.records.evaluation_results import read_evaluations
from albert_ablate.records.history import read_history
from albert_ablate.report import charts
from albert_ablate.report.page import (
    ColorScale,
    Figure,
    Interval,
    Page,
    Section,
    Table,
    write_csv,
    write_html,
    write_markdown,
)
from albert_ablate.stats.effects import factorial_effects, rate_interval, rate_sensitivity
from albert_ablate.stats.sequential import FIRST

SCOPE = "Intervals speak about new seeds on this text, this tokenizer and these sizes; not about new text."
POINTS = 120_000  # of training curves on the whole page
SAME_COST = 0.01  # cost that differs by less is the same
CELLS = 240_000  # of heat maps on the whole page
MAPS = 24  # arms with heat maps
MAPPED_SEEDS = 5  # seeds of an arm in its heat map
MAPPED = ("grad_norm", "residual_rms", "update_ratio", "entropy")
PAIRS_OF_FACTORS = 6
LEVELS = 12  # of a factor; more are a search, not a factorial
FIGURES = {  # of the summary: as a table names them
    "train_loss": "train loss",
    "val_loss": "validation loss",
    "val_bits_per_byte": "bits per byte",
    "test_loss": "test loss",
    "gap": "gap",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "tokens_per_second": "tokens/s",
    "flops": "FLOPs",
    "parameters": "parameters",
    "initial_loss": "",  # not in the table
    "seconds": "",
    "model.layers": "",
    "optimizer.lr": "",
}


# --- material --------------------------------------------------------------------------------------------------------


@dataclass
class Material:
    """What the sections are made of. rows: confirmation runs that can be read, with `name`, the arm in words."""

    root: Path
    rows: pd.DataFrame
    unreadable: pd.DataFrame
    arms: charts.Arms  # the best first
    settings: pd.DataFrame  # arm x differing setting
    ledger: Mapping[str, Any] | None
    notes: list[str]
    remote: Mapping[str, Any]  # folder -> its histories, of runs that lie elsewhere
    mixed: Sequence[str] = ()  # of data, tokenizer, task, text: in what the runs' losses are of different things
    both: pd.DataFrame | None = None  # arm, run, seed, tokens, train, validation
    baseline: str = ""  # the arm that others are compared with

    @property
    def quality(self) -> tuple[str, str]:
        """The figure by which runs are compared, and its name on an axis: in bits per byte across different texts."""
        unit = "bits per byte" if self.mixed else "nats per token"
        return "val_bits_per_byte" if self.mixed else "val_loss", f"validation loss at the end ({unit})"

    @property
    def compared(self) -> tuple[str, str]:
        """The figure of which the leaderboard gives paired differences, and its name: the test loss where every
        finished run has one, else that of `quality`."""
        have = "test_loss" in self.finished and not self.mixed and self.finished["test_loss"].notna().all()
        name = {"val_loss": "validation loss", "val_bits_per_byte": "validation loss in bits per byte"}
        return ("test_loss", "test loss") if have else (self.quality[0], name[self.quality[0]])

    @property
    def initial(self) -> float | None:
        """The loss before training, which losses are drawn up to."""
        known = "initial_loss" in self.rows and not self.mixed
        return float(self.rows["initial_loss"].median()) if known else None

    def place(self, folder: str) -> str:
        """A run's folder below the root: a page to be mailed names no folder of its maker."""
        return visible(str(folder).removeprefix(f"{self.root}/"))

    @property
    def done(self) -> pd.DataFrame:
        return self.rows[self.rows["status"].isin(["finished", "diverged"])]

    @property
    def finished(self) -> pd.DataFrame:
        return self.rows[self.rows["status"] == "finished"]


def gather(root: Path, ledger: Path | None, wanted: str | None = None) -> Material:
    """The runs below `root`. wanted: the arm to compare the others with (`tables.baseline`)."""
    found = read_ledger(ledger or root / "ledger.json", needed=ledger is not None)
    runs: Runs = load_runs(root)
    summary = runs.summary
    readable = summary[summary["status"].notna()]
    if readable.empty:
        raise ConfigError(f"{root} holds no run that can be read: {summary['reason'].iloc[0]}.")
    notes = []
    rows = readable[readable["role"] == "confirmation"]
    if rows.empty:
        rows = readable
        notes.append("All runs here are of tuning or calibration: their results confirm nothing.")
    elif len(rows) < len(readable):
        n = len(readable) - len(rows)
        notes.append(f"{counted(n, 'run')} of tuning or calibration: at most in the section on learning rates.")
    settings, names = settings_and_names(rows)
    numbers = {c: rows[c].map(_figure) for c in FIGURES if c in rows}
    rows = rows.assign(name=rows["setting"].map(names), **numbers)
    mixed = differing_texts(rows)
    if mixed:
        notes.append(
            f"The runs differ in {' and '.join(mixed)}: their losses are of different things. What compares arms is in "
            "bits per byte here, and says how hard a text is as much as how good an arm is."
        )
    unreadable = summary[summary["status"].isna()]
    settings = settings.rename(index=names)
    m = Material(root, rows, unreadable, charts.Arms(()), settings, found, notes, runs.remote, mixed)
    m.baseline = baseline(settings, wanted)
    order = [m.baseline, *(a for a in settings.index if a != m.baseline)]  # its levels have the first color and dash
    m.arms = charts.styled(_best_first(m), settings.loc[order, factors(settings)])
    return m


def _best_first(m: Material) -> list[str]:
    """The arms by the mean loss of their finished runs; after them those without one, by name."""
    loss = m.finished.groupby("name")[m.quality[0]].mean() if m.quality[0] in m.finished else pd.Series(dtype=float)
    return sorted(m.settings.index, key=lambda a: (not math.isfinite(loss.get(a, math.nan)), loss.get(a, 0.0), a))


def factors(settings: pd.DataFrame) -> list[str]:
    """Settings of two levels or more in all arms, those with most levels first; of several that change together the
    first, since a setting that comes with a choice is no factor of its own."""
    keys = settings.map(key_of)
    levels = keys.nunique()
    varied = [c for c in settings if settings[c].notna().all() and 2 <= levels[c] <= LEVELS]
    distinct: dict[tuple, str] = {}
    for column in varied:
        distinct.setdefault(tuple(pd.factorize(keys[column])[0]), column)
    return sorted(distinct.values(), key=lambda c: -levels[c])


def differing_texts(rows: pd.DataFrame) -> list[str]:
    """In which of data, tokenizer, task and text the runs differ, so that their losses do not compare. Runs on parts of
    one text (data.train_size) are measured on the same validation text."""
    found = [c for c in ("data", "tokenizer", "task") if c in rows and rows[c].nunique(dropna=False) > 1]
    if found or "fingerprint" not in rows:
        return found
    size = rows["data.train_size"].map(key_of) if "data.train_size" in rows else pd.Series("", rows.index)
    return ["text"] if (rows.groupby(size)["fingerprint"].nunique() > 1).any() else []


def _figure(value: Any) -> float:
    """The number, nan for what is none."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def read_ledger(file: Path, needed: bool) -> Mapping[str, Any] | None:
    """The ledger, None where there is none and none was asked for."""
    try:
        found = read_checked(file)
        if not isinstance(found["claims"], list):
            raise ValueError("its claims are no list")
        for claim in found["claims"]:
            claim["verdict"], claim["name"]
            for part in (*claim["parts"], *(claim.get("secondary") or ())):
                _contrast(part), _part(part, ""), [number(look.get("p")) for look in part.get("looks") or ()]
        return found
    except (FileNotFoundError, NotADirectoryError):
        if needed:
            raise ConfigError(f"There is no ledger {file}: albert-ablate judge writes it.") from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise ConfigError(f"{file} is not a ledger that can be used ({why}): albert-ablate judge writes one.") from None


def number(value: Any) -> float:
    """A ledger's number: strict JSON has no word for infinite ones, so they are texts."""
    return math.nan if value is None else float(value)


# --- the ledger ------------------------------------------------------------------------------------------------------


def ledger_section(m: Material) -> Section:
    section = Section("Claims")
    if m.ledger is None:
        section.missing.append(
            f"Nothing is judged yet: albert-ablate judge sweeps/claims.yaml --runs {m.root.name or '.'} writes the "
            "ledger."
        )
        return section
    family = m.ledger.get("family") or {}
    section.text.append(
        f"{counted(len(m.ledger['claims']), 'claim')} of {m.ledger.get('claims_file', 'a claims file')}, in a family "
        f"of {human(family.get('size'))}, judged together at {human(family.get('alpha'))} (Holm)."
    )
    section.text.append(
        "In the drawings what the claim says lies to the right of the dashed zero, the margin is shaded, and the line "
        "is the interval that was judged."
    )
    rows, looks = list[dict[str, Any]](), list[dict[str, Any]]()
    for claim in m.ledger["claims"]:
        parts = parts_of(claim)
        own = [{"claim": claim["name"], "verdict": claim["verdict"], **_part(p, kind)} for p, kind in parts]
        seen = [
            {"claim": claim["name"], "contrast": _contrast(p), "measure": p.get("measure")}
            | {k: number(look.get(k)) for k in ("pairs", "statistic", "p", "boundary")}
            for p, _ in parts
            for look in p.get("looks") or []
        ]
        rows, looks = rows + own, looks + seen
        title = f"Contrasts of {claim['name']}"
        tables = [Table("parts", pd.DataFrame(), title, folded=True, shown=_shown(own))] if own else []
        if seen:
            shown = pd.DataFrame(seen).drop(columns="claim")
            tables.append(Table("looks", shown, f"Every look of {claim['name']}, with its boundary", folded=True))
        sentence = str(claim.get("sentence") or "")
        notes = [str(claim.get("reason") or ""), *map(str, claim.get("notes") or []), _spent(claim.get("cost") or {})]
        notes = [n for n in dict.fromkeys(notes) if n and n not in sentence]
        if claim.get("edited"):
            how = claim.get("registration") or "edited after its first judged pair"
            notes.insert(0, f"This claim is not pre-registered: {how}.")
        section.cards.append(
            {
                "verdict": str(claim["verdict"]),
                "name": str(claim["name"]),
                "statement": str(claim.get("statement") or ""),
                "sentence": sentence[:1].upper() + sentence[1:],
                "notes": notes,
                "tables": tables,
                "drawings": [d for p in claim["parts"] if (d := interval_of(p)) is not None],
                "figures": [f for p in claim["parts"] if (f := looks_figure(claim, p)) is not None],
            }
        )
    if rows:
        section.tables.append(Table("ledger", pd.DataFrame(rows), "All contrasts", folded=True, shown=_shown(rows)))
    if looks:
        section.tables.append(Table("looks", pd.DataFrame(looks), "All looks", folded=True))
    return section


def interval_of(p: Mapping) -> Interval | None:
    """The interval and the margin of a contrast, to be drawn."""
    mean, low, high = _three([p.get(k) for k in ("mean", "low", "high")])
    margin = number(p.get("margin"))
    if not math.isfinite(mean):
        return None
    size = (
        f"{human(100 * math.expm1(margin), 3)} %" if p.get("percent") else f"{human(margin, 3)} {p.get('unit') or ''}"
    )
    words = f"{_contrast(p)}: {effect_text(p)}; margin ±{size.strip()}"
    return Interval(mean, low, high, margin, words, f"margin ±{size.strip()}")


def looks_figure(claim: Mapping, p: Mapping) -> Figure | None:
    """Every look at a contrast with its boundary, to the planned number of pairs."""
    seen = [look for look in p.get("looks") or [] if look.get("test", "t") == "t"]
    kept = ("pairs", "statistic", "boundary", "p")
    steps = pd.DataFrame([{k: number(look.get(k)) for k in kept} for look in seen], columns=kept, dtype=float)
    steps = steps[np.isfinite(steps["statistic"])]
    if steps.empty:
        return None
    planned = max(int(number(claim.get("N") or 0)), int(steps["pairs"].max()))
    ahead = boundaries(steps, planned)
    last = steps.iloc[-1]
    said = f"After {human(last['pairs'])} of {planned} pairs the statistic is {human(last['statistic'], 3)}"
    known = math.isfinite(last["boundary"])
    return Figure(
        f"Looks: {_contrast(p)}, {p.get('measure')}",
        charts.looks_of_contrast(steps, ahead, planned),
        f"To the planned {planned} pairs; outside the shaded band an effect is found.",
        data=f"{said}, its boundary {human(last['boundary'], 3)}." if known else f"{said}.",
    )


def boundaries(steps: pd.DataFrame, planned: int) -> pd.DataFrame:
    """pairs, boundary, below: of all looks to the planned one, at the level of the last look, which is the same at all:
    |t| must exceed t(1 - a/2, n - 1). Empty where the last look has no finite boundary."""
    from scipy.special import stdtr, stdtrit

    pairs, boundary = (float(steps[k].iloc[-1]) for k in ("pairs", "boundary"))
    if not (math.isfinite(boundary) and boundary > 0 and pairs > 1):
        return pd.DataFrame({"pairs": [], "boundary": [], "below": []})
    level = 2 * float(stdtr(pairs - 1, -boundary))
    n = np.arange(FIRST, planned + 1)
    at = -stdtrit(n - 1, level / 2)
    return pd.DataFrame({"pairs": n, "boundary": at, "below": -at})


def parts_of(claim: Mapping) -> list[tuple[Mapping, str]]:
    """The contrasts of a claim, each primary or secondary."""
    return [*((p, "primary") for p in claim["parts"]), *((p, "secondary") for p in claim.get("secondary") or [])]


def _contrast(part: Mapping) -> str:
    return f"{part['treatment']} against {part['control']}"


def _spent(cost: Mapping) -> str:
    """So far 8 runs (2 of them of tuning), 1,000 tokens, 12 s."""
    runs, tuning = (int(number(cost.get(k) or 0)) for k in ("runs", "tuning_runs"))
    if not runs:
        return ""
    of = f" ({tuning:,} of them of tuning)" if tuning else ""
    tokens, seconds = (number(cost.get(k) or 0) for k in ("tokens", "seconds"))
    return f"So far {counted(runs, 'run')}{of}, {tokens:,.0f} tokens, {seconds:,.0f} s."


def _part(p: Mapping, kind: str) -> dict[str, Any]:
    """A contrast in columns. mean, low, high: the effect as it was judged, positive where it is what the claim says."""
    row: dict[str, Any] = {k: p.get(k) for k in ("treatment", "control", "measure", "unit", "direction")}
    row |= {"kind": kind} | {k: number(p.get(k)) for k in ("mean", "low", "high", "margin")}
    row |= dict(zip(("percent", "percent_low", "percent_high"), _three(p.get("percent")), strict=True))
    row["pairs"] = int(number(p.get("pairs") or 0))
    for side in ("treatment", "control"):
        lost, _, low, high = map(number, p.get(f"{side}_diverged") or (None,) * 4)
        row |= {f"{side}_diverged": lost, f"{side}_diverged_low": low, f"{side}_diverged_high": high}
    for name in ("correlation", "pairs_to_margin"):
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), _three(p.get(name)), strict=True))
    return row | {"signed_rank": p.get("rank"), "effect": effect_text(p)}


def interval_text(mean: float, low: float, high: float, unit: str = "") -> str:
    """+1.48 % (+0.99 to +1.96); without its ends where there are none."""
    said = f"{human(mean, 3, sign=True)}{unit}"
    return said if math.isnan(low) else f"{said} ({human(low, 3, sign=True)} to {human(high, 3, sign=True)})"


def _three(found: Sequence | None) -> tuple[float, float, float]:
    mean, low, high = map(number, found or (None,) * 3)
    return mean, low, high


def _shown(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Contrasts as a reader wants them: an effect, a rate and a correlation with their intervals in one cell each."""

    def rate(row: Mapping, side: str) -> str | None:
        lost, low, high = (row[f"{side}_diverged{end}"] for end in ("", "_low", "_high"))
        return None if math.isnan(lost) else f"{lost:g} of {row['pairs']} ({_percent(low)} to {_percent(high)})"

    def triple(row: Mapping, name: str) -> str | None:
        mean, low, high = (human(row[f"{name}{end}"], 3) for end in ("", "_low", "_high"))
        return None if math.isnan(row[name]) else f"{mean} ({low} to {high})"

    return pd.DataFrame(
        [
            {k: row[k] for k in ("claim", "verdict") if k in row and len({r["claim"] for r in rows}) > 1}
            | {"contrast": f"{row['treatment']} against {row['control']}"}
            | {k: row[k] for k in ("kind", "measure", "effect", "margin", "pairs")}
            | {f"{side} diverged": rate(row, side) for side in ("treatment", "control")}
            | {"correlation": triple(row, "correlation"), "pairs to the margin": triple(row, "pairs_to_margin")}
            | {"signed rank": row["signed_rank"]}
            for row in rows
        ]
    )


def _percent(share: float) -> str:
    """0.6 % and 80.6 %, but 0 % and 100 %."""
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def effect_text(p: Mapping) -> str:
    """-0.4 % (-0.9 to +0.1): the change of the measure from control to treatment, in percent or in its unit."""
    mean, low, high = _three(p.get("percent") or [p.get(k) for k in ("mean", "low", "high")])
    unit = " %" if p.get("percent") else f" {p['unit']}" if p.get("unit") else ""
    if p.get("log") and not p.get("percent"):  # beyond the sum of the parts: on the scale of logarithms
        unit = " (log ratio)"
    if not p.get("percent") and p.get("direction") == "lower" and not p.get("singles"):
        mean, low, high = -mean, -high, -low
    if math.isnan(mean):
        return "no finite pair"
    if p.get("rank") == "not tested":
        return f"{human(mean, 3, sign=True)}{unit} (exact)"
    return interval_text(mean, low, high, unit)


def effects_section(m: Material) -> Section:
    section = Section("Effects")
    rows, without, refused, taken = [], [], [], dict[str, int]()
    for claim in (m.ledger or {}).get("claims", []):
        parts = parts_of(claim)
        if claim["verdict"] == "inadmissible":
            refused.append(str(claim["name"]))
            continue
        for p, kind in parts:
            margin, (mean, low, high) = number(p.get("margin")), _three([p.get(k) for k in ("mean", "low", "high")])
            name = str(claim["name"]) + (f": {_contrast(p)}, {p.get('measure')}" if len(parts) > 1 else "")
            taken[name] = taken.get(name, 0) + 1
            name += f" ({taken[name]})" if taken[name] > 1 else ""
            if not (margin > 0 and math.isfinite(mean)):
                without.append(name)
                continue
            ends = [mean if math.isnan(x) else x for x in (low, high)]
            own = {"row": name, "mean": mean / margin, "low": ends[0] / margin, "high": ends[1] / margin}
            rows.append(own | {"text": effect_text(p), "verdict": claim["verdict"], "kind": kind})
    if rows:
        section.figures.append(
            Figure(
                "Effects in multiples of their margins",
                charts.forest(pd.DataFrame(rows)),
                "Right of zero is what the claim says. Shaded: inside the margin. Filled: primary contrasts, with the "
                "interval that was judged; hollow: secondary ones, which carry no verdict. In words: how the measure "
                "changes from control to treatment, so that a loss that falls has a minus.",
                wide=True,
            )
        )
    else:
        section.missing.append("Effects with their intervals come from a ledger that has pairs.")
    if refused:
        section.text.append(f"Inadmissible, and so not drawn: {', '.join(refused)}.")
    if without:
        section.text.append(f"Without a finite mean, or a margin to be drawn by: {'; '.join(without)}.")
    return section


# --- who leads ------------------------------------------------------------------------------------------------------


def leaderboard(m: Material) -> pd.DataFrame:
    """A row an arm, the best first: runs and how many diverged, mean and standard deviation of the losses of finished
    runs, and the paired difference to the baseline in percent with its 95 % t interval (minus: better)."""
    quality, compared = m.quality[0], m.compared[0]
    d = _paired(m).groupby("arm")["d"]
    pairs = {arm: x.to_numpy(float) for arm, x in d}
    rows = []
    done, finished = (dict(list(t.groupby("name"))) for t in (m.done, m.finished))
    for arm in m.arms:
        own, fine = done.get(arm, m.done.iloc[:0]), finished.get(arm, m.finished.iloc[:0])
        row: dict[str, Any] = {"arm": arm, "seeds": len(own), "diverged": len(own) - len(fine)}
        for column in dict.fromkeys((quality, compared)):
            x = fine[column].dropna().to_numpy(float) if column in fine else np.empty(0)
            row |= {column: x.mean() if len(x) else math.nan, f"{column}_sd": x.std(ddof=1) if len(x) > 1 else math.nan}
        x = pairs.get(arm, np.empty(0))
        mean, low, high = mean_interval(x)
        row |= {"difference": percent(mean), "low": percent(high), "high": percent(low)}
        row |= {"pairs": len(x), "finished_pairs": int(np.isfinite(x).sum()), "better": int((x > 0).sum())}
        for column in ("flops", "parameters"):
            row[column] = float(fine[column].mean()) if column in fine and len(fine) else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _paired(m: Material) -> pd.DataFrame:
    """arm, seed, d: the log ratio of the compared loss of runs of one seed (`tables.paired`)."""
    column = m.compared[0]
    if column not in m.done:
        return pd.DataFrame(columns=["arm", "seed", "d"])
    runs = pd.DataFrame({"arm": m.done["name"], "seed": m.done["seed"].astype(int), "value": m.done[column]})
    return paired(runs.assign(diverged=(m.done["status"] == "diverged").to_numpy()), m.baseline)


def leaderboard_section(m: Material) -> Section:
    section = Section("Leaderboard")
    if m.done.empty:
        section.missing.append("No run has finished or diverged yet.")
        return section
    table, quality, called = leaderboard(m), m.quality[0], m.compared[1]
    section.tables.append(_leaderboard_table(m, table))
    others = table[table["arm"] != m.baseline]
    compared, intervals = int((others["pairs"] > 0).sum()), int((others["finished_pairs"] > 1).sum())
    if compared:
        section.text.append(
            f"Exploratory: {counted(compared, 'comparison')} with the baseline, {m.baseline} (--baseline ARM names "
            "another), each with a 95 % t interval of its own and without a verdict."
        )
    if intervals > 1:
        section.text.append(
            f"Were all arms equal, about {human(0.05 * intervals, 2)} of these {intervals} intervals would exclude "
            "zero by chance."
        )
    finished = m.finished
    if quality in finished and finished[quality].notna().any():
        values = finished[["name", "seed", quality]].set_axis(["arm", "seed", "value"], axis=1).dropna()
        values = values.astype({"value": float, "seed": int})
        over = means(values, m.arms)
        section.figures.append(
            Figure(
                f"{m.quality[1][:1].upper()}{m.quality[1][1:]}, each seed",
                charts.strip(values, over, m.arms, m.quality[1]),
                "Dots: finished runs; bar: their mean; line: its 95 % t interval, from two seeds on.",
                data=_best(over, "mean"),
            )
        )
    d = _paired(m)
    d = d[np.isfinite(d["d"].astype(float))]
    if len(d):
        values = pd.DataFrame({"arm": d["arm"], "seed": d["seed"].astype(int), "value": percent(d["d"])})
        # the interval is that of the leaderboard: of the log ratios, then in percent
        over = (
            table[["arm", "difference", "low", "high"]]
            .set_axis(["arm", "mean", "low", "high"], axis=1)
            .dropna(subset="mean")
        )
        section.figures.append(
            Figure(
                f"Paired difference to {m.baseline}, each seed",
                charts.strip(values, over, m.arms, f"{called} against the baseline (%), left is better", zero=True),
                "Dots: the difference of two runs of one seed; bar: the mean; line: its 95 % t interval.",
                data=_best(over, "mean", " %"),
            )
        )
    return section


def _leaderboard_table(m: Material, table: pd.DataFrame) -> Table:
    """The leaderboard with mean and spread, difference and interval in one cell each."""
    (compared, called), quality = m.compared, m.quality[0]

    def spread(column: str) -> list[str]:
        size = table[column].abs().max()
        decimals = max(0, 3 - math.floor(math.log10(size))) if size > 0 and math.isfinite(size) else 4
        return [
            "–" if math.isnan(x) else f"{x:.{decimals}f}" + ("" if math.isnan(sd) else f" ± {sd:.{decimals}f}")
            for x, sd in zip(table[column], table[f"{column}_sd"], strict=True)
        ]

    shown = pd.DataFrame({"arm": [f"{a} (baseline)" if a == m.baseline else a for a in table["arm"]]})
    by = {}
    names = {"val_loss": "validation loss", "test_loss": "test loss", "val_bits_per_byte": "bits per byte"}
    for column in dict.fromkeys((quality, compared)):
        shown[names[column]] = spread(column)
        by[names[column]] = column
    difference = f"{called}: paired difference to the baseline"
    shown[difference] = ["–" if row.arm == m.baseline else _change(row) for row in table.itertuples()]
    by[difference] = "difference"
    shown["better on"] = [f"{row.better} of {row.pairs} seeds" if row.pairs else "–" for row in table.itertuples()]
    by["better on"] = "better"
    shown["seeds"] = table["seeds"]
    shown["diverged"] = table["diverged"]
    for column, title in (("flops", "FLOPs"), ("parameters", "parameters")):
        if _spread(table[column]) > SAME_COST:
            shown[title] = [human(x, 3) for x in table[column]]
            by[title] = column
    note = (
        "± is the standard deviation over the finished seeds. A difference is of two runs of one seed, as a change in "
        "percent: minus is better. A pair of which one run diverged counts in “better on”, not in the mean."
    )
    title = f"{counted(len(table), 'arm')}, the least validation loss first"
    return Table("leaderboard", table, title, note, shown=shown, by=by, first=True)


def _change(row: Any) -> str:
    """−1.76 % (−3.93 to +0.42), of a row of the leaderboard."""
    if not row.pairs:
        return "–"
    if math.isnan(row.difference):
        return "no pair finished"
    ends = "" if math.isnan(row.low) else f" ({row.low:+.2f} to {row.high:+.2f})"
    return f"{row.difference:+.2f} %{ends}".replace("-", "−")


# --- curves ----------------------------------------------------------------------------------------------------------


def read(m: Material, row: Any, name: str, columns: Sequence[str]) -> pd.DataFrame | None:
    """Those of the columns that the run's history has; None where it cannot be read."""
    try:
        if row.folder in m.remote:
            table = m.remote[row.folder](name)
        else:
            record = store.read(row.folder)
            if isinstance(record, store.Unreadable):
                return None
            table = read_history(Path(row.folder), name, record.histories, record.identity)
        return table.select([c for c in columns if c in table.column_names]).to_pandas()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def curves_section(m: Material) -> Section:
    section = Section("Loss curves", zoom=True)
    evals, batches, ends, lost = [], [], [], []
    points = max(30, min(400, POINTS // max(1, len(m.rows))))
    for i, row in enumerate(m.rows.itertuples(index=False)):
        own = {"arm": row.name, "run": i, "seed": int(row.seed)}
        held = read(m, row, "evals", ("tokens", "split", "loss", "bits_per_byte"))
        steps = read(m, row, "steps", ("tokens", "loss"))
        if held is None or steps is None:
            lost.append(m.place(row.folder))
            continue
        held = held[held["split"].isin(["train", "validation"])]
        evals.append(held.assign(**own))
        kept = steps.iloc[charts.thinned(steps["loss"], points)]
        batches.append(kept.assign(**own))
        if row.status == "diverged":
            at = held[(held["split"] == "validation") & np.isfinite(held["loss"])].tail(1)
            tokens = steps["tokens"].iloc[-1] if len(steps) else 0
            loss = kept["loss"].iloc[-1] if len(kept) else (at["loss"].iloc[-1] if len(at) else np.nan)
            kind = getattr(row, "divergence", None)
            ends.append({**own, "tokens": tokens, "loss": loss, "divergence": kind})
    if lost:
        _warn(
            section,
            f"Histories of {counted(len(lost), 'run')} cannot be read: {', '.join(lost[:5])}"
            f"{' …' if len(lost) > 5 else ''}.",
        )
    if not evals or not sum(map(len, evals)):
        section.missing.append("No run has committed an evaluation yet.")
        return section
    held = pd.concat(evals)
    validation = held[held["split"] == "validation"].drop(columns="split")
    unit = "nats per token"
    if m.mixed:
        validation["loss"], unit = validation["bits_per_byte"], "bits per byte"
    validation = with_mean(validation.drop(columns="bits_per_byte"))
    if validation.empty:
        section.missing.append("No run has a finite validation loss.")
        return section
    over = pd.DataFrame(ends or [], columns=["arm", "run", "seed", "tokens", "loss", "divergence"])
    if m.mixed:  # batch losses are in nats only
        over = over.iloc[:0]
    note = (
        "Thin: each run; thick: the mean over an arm's seeds; band: their range. Crosses: diverged runs; from there on "
        "mean and range are those of the others."
    )
    drawn = charts.loss_curves(validation, over, m.arms, unit, m.initial)
    last = over_ends(validation)
    section.figures.append(Figure(f"Validation loss ({unit})", drawn, note, data=_best(last, "mean")))
    _draw_differences(section, m, validation)
    _draw_levels(section, m, validation, unit)
    late = validation[validation["tokens"] >= validation["tokens"].max() / 2]
    if late["tokens"].nunique() > 1:
        ended = over[over["tokens"] >= late["tokens"].min()]
        drawn = charts.loss_curves(late, ended, m.arms, unit, None)
        section.figures.append(
            Figure(
                f"Validation loss, second half ({unit})",
                drawn,
                "The same, from half of the tokens on.",
            )
        )
    training = pd.concat(batches)
    if len(training) and not m.mixed:
        section.figures.append(
            Figure(
                "Training loss of each batch (nats per token)",
                charts.batch_curves(training, m.arms, m.initial),
                "Thinned to the least and greatest loss of each stretch: a spike stays.",
                wide=True,
            )
        )
    pair = held.pivot_table(index=["arm", "run", "seed", "tokens"], columns="split", values="loss").reset_index()
    m.both = pair.dropna() if {"train", "validation"} <= {*pair} else None
    return section


def over_ends(validation: pd.DataFrame) -> pd.DataFrame:
    """arm, mean: of each arm at the last tokens at which it has a mean."""
    known = validation.dropna(subset="mean").sort_values("tokens")
    return known.groupby("arm")["mean"].last().reset_index()


def _draw_differences(section: Section, m: Material, validation: pd.DataFrame) -> None:
    table = differences_by(validation, m.baseline, "tokens")
    if table["tokens"].nunique() < 2:
        return
    end = table[table["tokens"] == table["tokens"].max()]
    note = (
        f"Change of the validation loss against {m.baseline} at equal tokens, in percent, over the seeds that both "
        "have; band: 95 % t interval at each point alone, brighter where the pointer rests."
    )
    drawn = charts.differences_over_tokens(table, m.arms, "validation loss against the baseline (%)")
    section.figures.append(
        Figure("Paired difference to the baseline over tokens", drawn, note, data=_best(end, "mean", " %"))
    )


def _draw_levels(section: Section, m: Material, validation: pd.DataFrame, unit: str) -> None:
    """One small chart for each level of the first factor, the other arms in gray."""
    found = factors(m.settings)
    if len(found) < 2 or len(m.arms) < 5:
        return
    curves = validation.dropna(subset="mean").drop_duplicates(["arm", "tokens"])[["arm", "tokens", "mean"]]
    late = curves[curves["tokens"] >= curves["tokens"].max() / 3]
    fine = late["mean"] if len(late) else curves["mean"]
    span = charts.loss_range(fine[fine <= fine.quantile(0.95) * 1.2], None)
    section.text.append(
        f"Small charts: the mean {'bits per byte' if m.mixed else 'validation loss'} of each level of {found[0]} in "
        "color, of all other arms in gray."
    )
    for _, arms in m.settings.groupby(m.settings[found[0]].map(key_of), sort=False):
        own = curves[curves["arm"].isin(arms.index)]
        if len(own):
            name = f"{found[0]}={human(arms[found[0]].iloc[0])}"
            drawn = charts.one_level(curves, own, m.arms, span, unit)
            section.figures.append(Figure(name, drawn, small=True, data=_best(over_ends(own), "mean")))


# --- learning rates --------------------------------------------------------------------------------------------------


def _warn(section: Section, sentence: str) -> None:
    """Say on the page and on the terminal what is left out: tables as CSV have no place for it."""
    section.text.append(sentence)
    print(sentence, file=sys.stderr)


def rates_section(m: Material) -> Section:
    section = Section("Learning rates")
    points, tuned, names = [], [], _names_of_arms(m)
    for file in sorted((m.root / "tuning").glob("*.json")):
        try:
            found = read_checked(file, file.stem)
            arm = names.get(file.stem, visible(found["arm"]))
            for at in found["curve"]:
                losses, seeds = at["losses"], at.get("seeds") or []
                values = (
                    losses.items()
                    if isinstance(losses, Mapping)
                    else zip(_seeds(seeds, len(losses)), losses, strict=False)
                )
                for seed, loss in values:
                    points.append(
                        (
                            arm,
                            float(at["rate"]),
                            int(seed),
                            math.nan if loss is None else number(loss),
                            int(at.get("tokens") or 0),
                        )
                    )
            kept = {k: found.get(k) for k in ("rate", "edge", "slack", "tokens", "objective", "trained")}
            tuned.append({"arm": arm} | kept)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
            _warn(section, f"tuning/{file.name} is left out, it cannot be used ({why}).")
    if points:
        table = pd.DataFrame(points, columns=["arm", "rate", "seed", "loss", "tokens"])
        table = table[table["tokens"] == table.groupby("arm")["tokens"].transform("max")]
        about = "tuning_rates", "Tuning: validation loss over the learning rate", "Tuning runs by learning rate"
        axis = "validation loss at the end (nats per token)"
        _draw_rates(section, m, table.drop(columns="tokens"), *about, axis, pd.DataFrame(tuned))
        note = (
            "edge: the side on which the best rate is the last that was run, after four moves of the window. slack: "
            "expected loss above the optimum, in nats per token; empty where it is unknown. Tuning runs choose the "
            "rate and are never evidence."
        )
        section.tables.append(Table("tuned_rates", pd.DataFrame(tuned), "Tuned rates", note))
    if (grid := _grid(m)) is not None:
        about = "rates", "Learning-rate sensitivity", "Runs by learning rate"
        _draw_rates(section, m, grid.drop(columns="initial"), *about, m.quality[1])
        if not m.mixed and len(found := _sensitivity(grid)):
            note = (
                "Mean over the rates of min(loss, initial loss) minus the seed's least loss, in nats per token, with a "
                "95 % t interval from two seeds on; seeds that have every rate (Wortsman et al. 2023, 2309.14322)."
            )
            section.tables.append(Table("sensitivity", found, "Sensitivity to the learning rate", note))
    if not section.figures:
        section.missing.append(
            f"Learning-rate curves come from albert-ablate tune, which writes {m.root.name or '.'}/tuning, and from "
            "runs at three rates or more that are else alike."
        )
    return section


def _names_of_arms(m: Material) -> dict[str, str]:
    """An arm's id -> its name here, where it has one setting alone."""
    one = m.rows.groupby("arm")["name"].agg(["nunique", "first"])
    return one.loc[one["nunique"] == 1, "first"].to_dict()


def _seeds(seeds: Any, n: int) -> Sequence:
    return seeds if isinstance(seeds, Sequence) and len(seeds) == n else range(n)


def _grid(m: Material) -> pd.DataFrame | None:
    """Runs that differ in the learning rate alone, at least three rates of an arm."""
    if "optimizer.lr" not in m.settings:
        return None
    others = [c for c in m.settings if c != "optimizer.lr"]
    named = m.done.merge(
        m.settings[others].map(key_of).agg(" ".join, axis=1).rename("else_"), left_on="name", right_index=True
    )
    kept = []
    for _, rows in named.groupby("else_"):
        if rows["optimizer.lr"].nunique() >= 3:
            name = " ".join(w for w in str(rows["name"].iloc[0]).split() if not w.startswith("optimizer.lr="))
            kept.append(rows.assign(arm=name or "all"))
    if not kept:
        return None
    rows = pd.concat(kept)
    columns = {"rate": "optimizer.lr", "seed": "seed", "loss": m.quality[0], "initial": "initial_loss"}
    found = {to: rows[c] if c in rows else math.nan for to, c in columns.items()}
    grid = pd.DataFrame({"arm": rows["arm"]} | found).astype({"rate": float, "seed": int, "loss": float})
    return grid.assign(loss=grid["loss"].where(rows["status"] == "finished"))


def _sensitivity(grid: pd.DataFrame) -> pd.DataFrame:
    """arm, rates, seeds, mean, low, high of the sensitivity of the seeds that have every rate of their arm."""
    out = []
    for arm, own in grid.groupby("arm", sort=False):
        losses = own.pivot_table(index="seed", columns="rate", values="loss", dropna=False)
        every = own.groupby("seed")["rate"].nunique() == own["rate"].nunique()
        initial = own.groupby("seed")["initial"].max()
        seeds = [s for s in losses.index if every[s] and math.isfinite(initial[s])]
        if seeds:
            each = rate_sensitivity(losses.loc[seeds].to_numpy(), initial[seeds].to_numpy())
            found = means(pd.DataFrame({"arm": arm, "value": each}), [str(arm)])
            out.append({"arm": arm, "rates": losses.shape[1], "seeds": len(seeds)} | found.iloc[0, 1:].to_dict())
    return pd.DataFrame(out)


def _draw_rates(
    section: Section,
    m: Material,
    table: pd.DataFrame,
    name: str,
    title: str,
    rows: str,
    axis: str,
    tuned: pd.DataFrame | None = None,
) -> None:
    arms = list(dict.fromkeys(table["arm"]))
    known = set(arms) <= set(m.arms)
    over = table.groupby(["arm", "rate"])["loss"].agg(lambda x: x.mean(skipna=False)).rename("mean").reset_index()
    points = table.assign(diverged=~np.isfinite(table["loss"]), outcome="diverged")
    chosen = None if tuned is None else _chosen(over, tuned)
    chart = charts.sensitivity(points, over, m.arms if known else arms, m.initial, axis, known, chosen)
    note = "Dots: runs; the line: their mean, where no seed diverged; crosses at the top: diverged runs."
    if chosen is not None and len(chosen):
        note += " Ring: the chosen rate; the bar below it is its slack, the expected loss above the optimum."
    if not known:  # they have colors of their own
        note += " Arms are settings without their learning rate here, which the filter does not know."
    section.figures.append(Figure(title, chart, note, wide=True))
    section.tables.append(Table(name, table, rows, folded=True))


def _chosen(over: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """arm, rate, mean, best of the tuned rates: the mean of the runs nearest to the rate, and that less the slack."""
    rows = []
    for arm, rate, slack in tuned[["arm", "rate", "slack"]].itertuples(index=False):
        own = over[(over["arm"] == arm) & np.isfinite(over["mean"])]
        rate = number(rate)
        if len(own) and rate > 0:
            near = own.loc[(np.log(own["rate"]) - math.log(rate)).abs().idxmin()]
            spare = number(slack)
            best = near["mean"] - (spare if math.isfinite(spare) else 0.0)
            rows.append({"arm": arm, "rate": rate, "mean": near["mean"], "best": best})
    return pd.DataFrame(rows, columns=["arm", "rate", "mean", "best"])


# --- stability -------------------------------------------------------------------------------------------------------


def divergence_section(m: Material) -> Section:
    rows, shown = [], []
    runs = dict(list(m.rows.filter(["name", "status", "divergence"]).groupby("name")))
    for arm in m.arms:
        own = runs[arm]
        done = own[own["status"].isin(["finished", "diverged"])]
        lost = done[done["status"] == "diverged"]
        share, low, high = rate_interval(len(lost), len(done)) if len(done) else (math.nan,) * 3
        kinds = lost["divergence"].dropna().value_counts().to_dict() if "divergence" in lost else {}
        others = own[~own.index.isin(done.index)]["status"].value_counts().to_dict()
        counts = {"arm": arm, "seeds": len(done), "diverged": len(lost)}
        rows.append(counts | {"share": share, "low": low, "high": high} | {**kinds, **others})
        text = None if math.isnan(share) else f"{_percent(share)} ({_percent(low)} to {_percent(high)})"
        said = {
            k: ", ".join(f"{n} {w.replace('_', ' ')}" for w, n in found.items()) or None
            for k, found in (("how", kinds), ("not done", others))
        }
        shown.append(counts | {"share that diverged": text} | said)
    table = pd.DataFrame(rows)
    whole = [c for c in table if c not in ("arm", "share", "low", "high")]
    table[whole] = table[whole].fillna(0).astype(int)
    note = (
        "Seeds: finished or diverged; share: with its exact 95 % interval (Clopper and Pearson 1934). Diverged runs "
        "are never dropped."
    )
    return Section("Divergence", tables=[Table("divergence", table, note=note, shown=pd.DataFrame(shown))])


def depth_section(m: Material) -> Section:
    """Heat maps by arm: the median over up to five seeds of what each showed."""
    section = Section("Depth by tokens", scales={})
    chosen = m.arms[:MAPS]
    layers = m.rows["model.layers"].max() if "model.layers" in m.rows else 12
    layers = 12 if pd.isna(layers) else int(layers)
    columns = max(8, min(48, CELLS // max(1, len(chosen) * len(MAPPED) * layers)))
    wanted = ("step", "tokens", "layer", "sublayer", "weight_norm", *MAPPED)
    cells: dict[str, dict[str, pd.DataFrame]] = {q: {} for q in MAPPED}
    for arm in chosen:
        own = [
            read(m, row, "layers", wanted)
            for row in m.rows[m.rows["name"] == arm].head(MAPPED_SEEDS).itertuples(index=False)
        ]
        for quantity in MAPPED:
            found = [charts.depth_map(layer, quantity, columns) for layer in own if layer is not None]
            found = [f for f in found if len(f)]
            if found:
                longest = max(found, key=lambda f: f["tokens"].nunique())
                alike = [f for f in found if {*f["tokens"]} <= {*longest["tokens"]}]
                over = pd.concat(alike).groupby(["tokens", "layer"])
                ends = longest.drop_duplicates("tokens")[["tokens", "end"]]
                cells[quantity][arm] = over["value"].median().reset_index().merge(ends, on="tokens")
    for quantity, title in charts.QUANTITIES.items():
        if quantity not in MAPPED or not cells[quantity]:
            continue
        domain = charts.color_range(np.concatenate([c["value"].to_numpy() for c in cells[quantity].values()]))
        section.scales[title] = ColorScale(*charts.color_scale(domain, quantity))
        ends = pd.concat(
            c[c["tokens"] == c["tokens"].max()].assign(arm=arm) for arm, c in cells[quantity].items()
        ).rename(columns={"layer": "block"})
        profile = charts.depth_profile(ends[["arm", "block", "value"]], m.arms, title, quantity not in charts.LINEAR)
        name = f"{title}, by block at the end"
        section.figures.append(Figure(name, profile, "Median over up to five seeds.", group=title, wide=True))
        section.figures += [
            Figure(
                arm,
                charts.heat_map(c, quantity, domain, legend=False).properties(height=120),
                arm=arm,
                group=title,
                small=True,
                data=f"{title} by block and tokens, {human(c['value'].min(), 3)} to {human(c['value'].max(), 3)}.",
            )
            for arm, c in cells[quantity].items()
        ]
    if section.figures:
        section.text.append(
            "Colors mean the same in all arms, from the 1st to the 98th percentile. Of several logged steps in a "
            "column the worst is shown; over seeds (five at most) the median. Gray: no finite value."
        )
        if len(m.arms) > MAPS:
            section.text.append(f"Drawn for the first {MAPS} of {len(m.arms)} arms.")
    absent = [t for q, t in charts.QUANTITIES.items() if q in MAPPED and not cells[q]]
    if absent:
        section.missing.append(f"Not in these runs' histories (diagnostics.every=10 writes it): {'; '.join(absent)}.")
    return section


# --- generalization --------------------------------------------------------------------------------------------------


def generalization_section(m: Material) -> Section:
    section = Section("Generalization")
    table = m.finished
    if "gap" in table and table["gap"].notna().any():
        values = table[["name", "seed", "gap"]].set_axis(["arm", "seed", "value"], axis=1).dropna()
        values = values.astype({"value": float, "seed": int})
        section.figures.append(
            Figure(
                "Gap: validation minus training loss at the end (nats per token)",
                charts.strip(values, means(values, m.arms), m.arms, "gap (nats per token)", zero=True),
                "Dots: runs; bar: mean; line: 95 % t interval from two seeds on. Both losses without dropout.",
            )
        )
    if m.both is not None and len(m.both):
        section.figures.append(
            Figure(
                "Validation over training loss",
                charts.train_and_validation(m.both, m.arms, m.initial),
                "At equal training loss the lower curve generalizes better; on the dashed line both are equal.",
            )
        )
    curves: dict[str, list[dict[str, Any]]] = {"corruption": [], "units": []}
    evaluated = []
    for i, row in enumerate(m.rows.itertuples(index=False)):
        try:
            found = read_evaluations(Path(row.folder), row.identity)
        except ConfigError as error:
            _warn(section, str(error))
            continue
        own = {"arm": row.name, "seed": int(row.seed), "run": i}
        for name, kept in found.items():
            evaluated += [own | {"figure": f"{name}.{figure}", "value": v} for figure, v in kept["summary"].items()]
            if name in curves:
                curves[name] += [own | at for at in kept["rows"]]
    for name, title in (("corruption", "tokens"), ("units", "hidden units")):
        _rises(section, m, pd.DataFrame(curves[name]), name, title)
    if evaluated:
        over = pd.DataFrame(evaluated).groupby(["figure", "arm"], sort=False)["value"]
        wide = over.agg(lambda x: pd.to_numeric(x, errors="coerce").mean()).unstack("arm")
        wide = wide[[a for a in m.arms if a in wide]]
        wide = wide if wide.shape[1] <= 6 else wide.T  # the longer side goes down
        title = "Evaluations after training, means over seeds"
        note = (
            "Losses, rises of the loss and areas in nats per token, domains in bits per byte, calibration and "
            "memorization as shares. Of arms that were evaluated."
        )
        section.tables.append(Table("evaluations", wide.reset_index(), title, note, folded=len(wide) > 16))
    if not curves["corruption"]:
        section.missing.append(
            "Loss under missing and noisy tokens: albert-ablate evaluate RUN corruption measures it."
        )
    return section


def _rises(section: Section, m: Material, rows: pd.DataFrame, name: str, title: str) -> None:
    """Charts of the rise of the loss over the share of what is taken away, one a kind."""
    if rows.empty:
        return
    rows = rows.rename(columns={"share": "rate"})
    if not {"rate", "rise"} <= {*rows}:
        section.missing.append(f"The rows of the evaluation {name} have no rise over a rate, and are not drawn.")
        return
    rows["kind"] = rows["kind"] if "kind" in rows else "zeroed"
    over = rows.groupby(["kind", "arm", "run", "seed", "rate"], sort=False)["rise"].mean().reset_index()
    over["mean"] = over.groupby(["kind", "arm", "rate"])["rise"].transform("mean")
    for kind, own in over.groupby("kind", sort=False):
        chart = charts.corruption(own, m.arms, f"share of {kind} {title}")
        note = (
            "Rise above the loss on clean text." if name == "corruption" else "Rise above the loss of the whole model."
        )
        section.figures.append(Figure(f"Loss under {kind} {title}", chart, note))


# --- factors, cost, configurations -----------------------------------------------------------------------------------


def factorial_section(m: Material) -> Section:
    section = Section("Interactions")
    quality, axis = m.quality
    effects, partly = [], []
    for one, other in combinations(factors(m.settings), 2):
        if len(section.figures) == PAIRS_OF_FACTORS:
            section.text.append(f"Drawn are the first {PAIRS_OF_FACTORS} pairs of factors.")
            break
        points, others = _crossed(m, one, other)
        if points.empty:
            partly += [f"{one} and {other}"] if _crosses(m.settings, one, other) else []
            continue
        cells = points.groupby(["x", "level"])["value"].mean().rename("mean").reset_index()
        over = f", over the {others} combinations of the other settings that have all cells" if others > 1 else ""
        section.figures.append(
            Figure(
                f"{one} and {other}",
                charts.interaction(cells, points, one, other, axis),
                f"Parallel lines: the effects add up. Lines: means of the finished runs{over}; marks: each of them.",
            )
        )
        if len(cells) == 4:
            effects += _contrasts(m, points, one, other)
    if effects:
        section.tables.append(
            Table(
                "interactions",
                pd.DataFrame(effects),
                f"Effects on the {axis}",
                "A contrast per seed that has all four cells, with a 95 % t interval; a description, no verdict. "
                "The interaction: the first factor's effect at the second's second level minus that at its first.",
            )
        )
    if partly:
        section.missing.append(f"Crossed, but with a cell in which no run finished: {'; '.join(partly)}.")
    if not section.figures and not partly:
        section.missing.append(
            "Interactions need finished runs of arms that cross the levels of two settings, as a factorial sweep has."
        )
    return section


def _crosses(settings: pd.DataFrame, one: str, other: str) -> bool:
    """Whether there is an arm for every level of the one with every level of the other."""
    keys = settings[[one, other]].map(key_of)
    return len(keys.drop_duplicates()) == keys[one].nunique() * keys[other].nunique()


def _crossed(m: Material, one: str, other: str) -> tuple[pd.DataFrame, int]:
    """x (level of one), level (of other), seed, rest, value of the finished runs in combinations of the other settings
    (rest) that have every cell of the two, and how many such combinations there are: elsewhere a cell's mean would be
    one of other settings too."""
    quality = m.quality[0]
    if quality not in m.finished:
        return pd.DataFrame(), 0
    keys = m.settings.map(key_of)
    cell = keys[one] + keys[other]
    rest = [c for c in keys if c not in (one, other) and keys.groupby(cell)[c].nunique().gt(1).any()]
    keys = keys.assign(rest=keys[rest].agg(" ".join, axis=1) if rest else "", cell=cell)
    wanted = m.settings[one].map(key_of).nunique() * m.settings[other].map(key_of).nunique()
    rows = m.finished[["name", "seed", quality]].merge(keys[["rest", "cell"]], left_on="name", right_index=True)
    rows = rows.merge(m.settings[[one, other]].map(human), left_on="name", right_index=True)
    whole = rows.groupby("rest")["cell"].transform("nunique") == wanted
    points = rows[whole].rename(columns={one: "x", other: "level", quality: "value"}).astype({"seed": int})
    return points[["name", "x", "level", "seed", "rest", "value"]].astype({"value": float}), points["rest"].nunique()


def _contrasts(m: Material, points: pd.DataFrame, one: str, other: str) -> list[dict[str, Any]]:
    levels = [sorted({*points[c]}) for c in ("x", "level")]
    wide = points.pivot_table(index=["seed", "rest"], columns=["x", "level"], values="value").dropna()
    per = points["rest"].nunique()
    mean = wide.groupby("seed").mean()[wide.groupby("seed").size() == per]  # a seed counts with all its cells
    cells = [[[row[a, b] for b in levels[1]] for a in levels[0]] for _, row in mean.iterrows()]
    if len(cells) < 3:
        return []
    out = []
    for names, d in factorial_effects(np.array(cells, float), (one, other)).items():
        mean, low, high = mean_interval(d)
        words = [f"{n}: {levels[(one, other).index(n)][1]} minus {levels[(one, other).index(n)][0]}" for n in names]
        what = " x ".join(names) if len(names) > 1 else words[0]
        out.append({"effect": what, "seeds": len(d), "mean": mean, "low": low, "high": high})
    return out


def cost_section(m: Material) -> Section:
    section = Section("Cost and quality")
    rows, (quality, axis) = m.finished, m.quality
    if {"flops", quality} <= {*rows} and _spread(rows["flops"]) > SAME_COST:
        points = rows[["name", "seed", quality, "flops"]].set_axis(["arm", "seed", "loss", "flops"], axis=1).dropna()
        points = points[points["flops"] > 0].astype({"loss": float, "flops": float, "seed": int})
        if len(points):
            means_ = points.groupby("arm")[["loss", "flops"]].mean().reset_index()
            note = "Small: runs; large: the mean of an arm; dashed: no arm is better and cheaper. FLOPs are counted."
            drawn = charts.cost(points, means_, m.arms, "flops", "training FLOPs", axis)
            section.figures.append(Figure("Loss over training FLOPs", drawn, note, data=_best(means_, "loss")))
    elif "flops" in rows and rows["flops"].notna().any():
        section.text.append(f"All finished runs cost the same: {human(rows['flops'].mean(), 3)} training FLOPs.")
    kept = {k: v for k, v in FIGURES.items() if v and k in rows and rows[k].notna().any()}
    if kept:
        numbers = rows[[*kept]].assign(arm=rows["name"])
        table = numbers.groupby("arm").mean().rename(columns=kept)
        table.insert(0, "finished", numbers.groupby("arm").size())
        order = [a for a in m.arms if a in table.index]
        section.tables.append(
            Table(
                "arms",
                table.loc[order].reset_index(),
                "Means over the finished seeds of each arm",
                "Losses and gap in nats per token. Seeds that diverged are not in these means.",
            )
        )
    if not section.figures and not section.tables:
        section.missing.append("Cost and quality are those of finished runs, and no run has finished.")
    return section


def _spread(values: pd.Series) -> float:
    """(greatest - least) / greatest of the positive values; 0 without two of them."""
    x = values[values > 0].to_numpy(float)
    return float((x.max() - x.min()) / x.max()) if len(x) > 1 else 0.0


def _best(means_: pd.DataFrame, column: str, unit: str = "") -> str:
    """One sentence: the least and the greatest of a column of arms."""
    fine = means_[np.isfinite(means_[column])]
    if fine.empty:
        return ""
    low, high = fine.loc[fine[column].idxmin()], fine.loc[fine[column].idxmax()]
    said = f"Least: {low['arm']}, {human(low[column])}{unit}"
    return f"{said}." if len(fine) == 1 else f"{said}; greatest: {high['arm']}, {human(high[column])}{unit}."


def settings_section(m: Material) -> Section:
    section = Section("Configurations")
    if m.settings.shape[1]:
        table = m.settings.rename_axis("arm").reset_index()
        section.tables.append(Table("configurations", table, "What the arms differ in; all else is the same"))
    else:
        section.missing.append("There is one arm only: nothing to compare its configuration with.")
    listed = [
        c
        for c in (
            "name",
            "seed",
            "status",
            "val_loss",
            "train_loss",
            "test_loss",
            "tokens",
            "seconds",
            "divergence",
            "reason",
            "setting",
            "folder",
        )
        if c in m.rows and m.rows[c].notna().any()
    ]
    rows = m.rows[listed].rename(columns={"name": "arm"}).sort_values(["arm", "seed"])
    rows["folder"] = rows["folder"].map(m.place)
    section.tables.append(Table("runs", rows, f"All {counted(len(rows), 'run')}", folded=True))
    return section


METHODS = """\
The unit is the run: differences are paired by seed, in the named order of seeds, without gaps. A claim is looked at
after every pair from the fourth on, with a paired t test at a level that keeps the chance of an error at 5 % over all
looks; Holm keeps it over the family, whose size was named before.

A pair with one diverged run counts as an infinite difference: from the first such pair on the exact signed rank
decides. No effect means that the sequential 90 % interval lies inside the margin, which was named before; inconclusive
means that the pairs do not tell. Means of a claim that stopped early run high.

Refused: bootstrap intervals under 20 runs, standardized effects of stopped claims, a test that cannot reach its level,
arms that differ in data, data order or what the claim holds equal, and a learning rate at the end of its grid.

Curves, bands and heat maps describe; only the ledger judges. Losses are in nats per token, measured without dropout,
unless said otherwise."""


def methods_section(m: Material) -> Section:
    section = Section("Methods and refusals", [SCOPE, *(" ".join(p.split()) for p in METHODS.split("\n\n"))])
    if m.ledger and m.ledger.get("refusals"):
        section.text.append("Refused in this ledger:")
        section.text += [_sentence(r) for r in m.ledger["refusals"]]
    if len(m.unreadable):
        table = m.unreadable[["folder", "reason"]].assign(folder=m.unreadable["folder"].map(m.place))
        section.tables.append(Table("unreadable", table, f"{counted(len(table), 'run')} that cannot be read"))
    return section


def _sentence(refusal: Any) -> str:
    return ": ".join(str(v) for v in refusal.values()) if isinstance(refusal, Mapping) else str(refusal)


# --- out -------------------------------------------------------------------------------------------------------------


def make(root: Path, ledger: Path | None = None, baseline: str | None = None) -> Page:
    """The report on the runs below `root`: claims first where there are any, else the leaderboard."""
    m = gather(root, ledger, baseline)
    claims = [ledger_section(m), effects_section(m)]
    leaders = leaderboard_section(m)
    curves = curves_section(m)  # before generalization, which draws what it read
    sections = [
        *([claims[0], leaders, claims[1]] if m.ledger else [leaders]),
        curves,
        rates_section(m),
        divergence_section(m),
        depth_section(m),
        generalization_section(m),
        factorial_section(m),
        cost_section(m),
        settings_section(m),
        *([] if m.ledger else claims[:1]),
        methods_section(m),
    ]
    states = m.rows["status"].value_counts().to_dict()
    said = ", ".join(f"{n:,} {s}" for s, n in states.items())
    bad = f"; {len(m.unreadable):,} more cannot be read" if len(m.unreadable) else ""
    counts = f"{counted(len(m.arms), 'arm')}, {counted(len(m.rows), 'run')} ({said}{bad})."
    return Page(f"Report on {m.root.resolve().name}", " ".join([counts, *m.notes, SCOPE]), sections, m.arms)


def write(
    root: Path, output: Path | None, kind: str, ledger: Path | None = None, baseline: str | None = None
) -> list[Path]:
    """Write the report; gives the files."""
    output = output or Path({"html": "report.html", "md": "report.md", "csv": "report"}[kind])
    if kind != "csv":
        charts.require()
    charts.writable(output, () if kind == "csv" else (f".{kind}",))
    page = make(root, ledger, baseline)
    return {"html": write_html, "md": write_markdown, "csv": write_csv}[kind](page, output)
