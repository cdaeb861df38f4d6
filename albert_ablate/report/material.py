"""What the sections of a report are made of: the runs below a folder, their arms, the ledger."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.external.runs import home_folder
from albert_ablate.analysis.load import Runs, load_runs
from albert_ablate.analysis.numbers import human, visible
from albert_ablate.analysis.setting_names import key_of
from albert_ablate.analysis.tables import baseline, paired, settings_and_names
from albert_ablate.config import ConfigError
from albert_ablate.report import style
from albert_ablate.report.contrasts import read_ledger
from albert_ablate.report.histories import Histories, read_histories, run_stamp
from albert_ablate.report.page import Section
from albert_ablate.report.section_cache import SectionCache

MAX_LEVELS = 12  # of a factor; more are a search, not a factorial


COLUMN_TITLES = {  # of the summary: as a table names them
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


@dataclass
class Material:
    """What the sections are made of. rows: confirmation runs that can be read, with `name`, the arm in words."""

    root: Path
    rows: pd.DataFrame
    unreadable: pd.DataFrame
    arms: style.Arms  # the best first
    settings: pd.DataFrame  # arm x differing setting
    ledger: Mapping[str, Any] | None
    notes: list[str]
    remote: Mapping[str, Any]  # folder -> its histories, of runs that lie elsewhere
    mixed: Sequence[str] = ()  # of data, tokenizer, task, text: in what the runs' losses are of different things
    baseline: str = ""  # the arm that others are compared with
    cache: SectionCache = field(default_factory=partial(SectionCache, keeps=False))

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

    @cached_property
    def histories(self) -> Histories:
        """The curves of `rows`, by the number of the row."""
        return read_histories(self.root, self.rows, self.remote)

    def of_runs(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table of runs by number with the arm and seed of each row's run."""
        run = table["run"].to_numpy()
        own = {"arm": self.rows["name"].to_numpy()[run], "seed": self.rows["seed"].to_numpy(int)[run]}
        return table.assign(**own)

    @cached_property
    def stamps(self) -> dict[str, str]:
        """Folder of a run -> the state of its files."""
        return {folder: run_stamp(folder) for folder in self.rows["folder"]}

    @property
    def appearance(self) -> tuple[Any, ...]:
        """Equal as long as arms have the same colors, and comparisons the same baseline and unit."""
        return (*sorted(zip(self.arms, self.arms.colors, self.arms.dashes, strict=True)), self.baseline, *self.mixed)

    @cached_property
    def paired_losses(self) -> pd.DataFrame:
        """arm, seed, d: the log ratio of the compared loss of runs of one seed (`tables.paired`)."""
        if self.compared[0] not in self.done:
            return pd.DataFrame(columns=["arm", "seed", "d"])
        return paired(self.compared_runs, self.baseline)

    @cached_property
    def compared_runs(self) -> pd.DataFrame:
        """arm, seed, value (the compared loss), diverged of the runs that are done."""
        done = self.done
        runs = pd.DataFrame({"arm": done["name"], "seed": done["seed"].astype(int), "value": done[self.compared[0]]})
        return runs.assign(diverged=(done["status"] == "diverged").to_numpy())

    @cached_property
    def done(self) -> pd.DataFrame:
        """Runs that finished or diverged."""
        return self.rows[self.rows["status"].isin(["finished", "diverged"])]

    @cached_property
    def finished(self) -> pd.DataFrame:
        """Runs that finished."""
        return self.rows[self.rows["status"] == "finished"]


def gather(root: Path, ledger: Path | None, wanted: str | None = None, cache: SectionCache | None = None) -> Material:
    """Read the runs below `root`. wanted: arm to compare others with (`tables.baseline`). cache: of the last update."""
    found = read_ledger(ledger or home_folder(root) / "ledger.json", needed=ledger is not None)
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
    numbers = {c: rows[c].map(number_or_nan) for c in COLUMN_TITLES if c in rows}
    rows = rows.assign(name=rows["setting"].map(names), **numbers)
    mixed = differing_texts(rows)
    if mixed:
        notes.append(
            f"The runs differ in {' and '.join(mixed)}: their losses are of different things. What compares arms is in "
            "bits per byte here, and says how hard a text is as much as how good an arm is."
        )
    unreadable = summary[summary["status"].isna()]
    settings = settings.rename(index=names)
    m = Material(root, rows, unreadable, style.Arms(()), settings, found, notes, runs.remote, mixed)
    m.cache = cache or m.cache
    m.baseline = baseline(settings, wanted)
    order = [m.baseline, *(a for a in settings.index if a != m.baseline)]  # its levels have the first color and dash
    m.arms = style.styled(_best_first(m), settings.loc[order, factors(settings)])
    return m


def _best_first(m: Material) -> list[str]:
    """The arms by the mean loss of their finished runs; after them those without one, by name."""
    loss = m.finished.groupby("name")[m.quality[0]].mean() if m.quality[0] in m.finished else pd.Series(dtype=float)
    return sorted(m.settings.index, key=lambda a: (not math.isfinite(loss.get(a, math.nan)), loss.get(a, 0.0), a))


def factors(settings: pd.DataFrame) -> list[str]:
    """Settings of two levels or more in all arms, those with most levels first; of several that change together the
    first, since a setting that comes with a choice is not a factor of its own."""
    keys = settings.map(key_of)
    levels = keys.nunique()
    varied = [c for c in settings if settings[c].notna().all() and 2 <= levels[c] <= MAX_LEVELS]
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


def number_or_nan(value: Any) -> float:
    """The number, nan for what is none."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def counted(n: int, what: str) -> str:
    """A number with its noun in singular or plural: 1 run, 2 runs."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def warn(section: Section, sentence: str) -> None:
    """Say on the page and on the terminal what is left out: tables as CSV have no place for it."""
    section.text.append(sentence)
    section.warnings.append(sentence)
    print(sentence, file=sys.stderr)


def relative_spread(values: pd.Series) -> float:
    """(greatest - least) / greatest of the positive values; 0 without two of them."""
    x = values[values > 0].to_numpy(float)
    return float((x.max() - x.min()) / x.max()) if len(x) > 1 else 0.0


def extremes(means_: pd.DataFrame, column: str, unit: str = "") -> str:
    """One sentence: the least and the greatest of a column of arms."""
    fine = means_[np.isfinite(means_[column])]
    if fine.empty:
        return ""
    low, high = fine.loc[fine[column].idxmin()], fine.loc[fine[column].idxmax()]
    said = f"Least: {low['arm']}, {human(low[column])}{unit}"
    return f"{said}." if len(fine) == 1 else f"{said}; greatest: {high['arm']}, {human(high[column])}{unit}."
