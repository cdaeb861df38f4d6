"""`albert-ablate show RUN RUN_B`: two runs on common axes, and the second's difference to the first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis import thinning
from albert_ablate.analysis.load import runs_in
from albert_ablate.analysis.numbers import human, is_number
from albert_ablate.analysis.tables import settings_and_names
from albert_ablate.config import ConfigError
from albert_ablate.report import charts_curves, charts_run, charts_two_runs, style
from albert_ablate.report.material import differing_texts
from albert_ablate.report.page import ColorScale, Figure, Page, Section, Table
from albert_ablate.report.show import HEADLINE_METRICS, HEADLINES, MAX_POINTS, OneRun, known_metrics, outcome

DIFFERENCES = ("entropy", "max_logit")  # quantities that may be zero or less: the difference, not the ratio, is drawn


@dataclass(frozen=True)
class TwoRuns:
    """Two runs, what each is called, what their losses cannot be compared in (nothing, in most cases), and the settings
    they differ in."""

    runs: tuple[OneRun, OneRun]
    names: style.Arms
    mixed: list[str]
    settings: pd.DataFrame

    @property
    def paired(self) -> bool:
        """Whether both have trained on the same batches in the same order: one seed, one text, batches of one size."""
        one, other = (run.steps["tokens"].to_numpy(float) for run in self.runs)
        n = min(len(one), len(other))
        same_seed = self.runs[0].record["seed"] == self.runs[1].record["seed"]
        return same_seed and not self.mixed and bool(np.array_equal(one[:n], other[:n]))

    @property
    def loss(self) -> tuple[str, str]:
        """Column of the evaluations that is compared, and its unit."""
        return ("bits_per_byte", "bits per byte") if self.mixed else ("loss", self.runs[0].unit)

    def both(self, table: Callable[[OneRun], pd.DataFrame]) -> pd.DataFrame:
        """`table` of each run with its name in `arm`."""
        parts = [
            table(run).assign(arm=name, run=i) for i, (run, name) in enumerate(zip(self.runs, self.names, strict=True))
        ]
        return pd.concat([p for p in parts if len(p)] or parts, ignore_index=True)


def combine(one: OneRun, other: OneRun) -> TwoRuns:
    """Two runs to be drawn together. Raises ConfigError where they are one, or their losses are of different tasks."""
    if one.folder.resolve() == other.folder.resolve():
        raise ConfigError(f"{one.folder} is given twice: give two different runs, or one.")
    if one.decides or other.decides:
        both = "both classify" if one.decides and other.decides else "one of them classifies"
        raise ConfigError(f"Two runs cannot be drawn together if {both} documents: `show` draws each alone.")
    rows = runs_in([one.folder, other.folder]).summary
    settings, called = settings_and_names(rows)
    arms = [called[s] for s in rows["setting"]]
    seeds = [f"seed {seed}" for seed in rows["seed"]]
    if arms[0] == arms[1]:
        names = (
            seeds
            if seeds[0] != seeds[1]
            else [f"{s}, {run.folder}" for s, run in zip(seeds, (one, other), strict=True)]
        )
    else:
        names = arms if seeds[0] == seeds[1] else [f"{a}, {s}" for a, s in zip(arms, seeds, strict=True)]
    return TwoRuns((one, other), style.Arms(names), differing_texts(rows), settings.rename(index=called))


def losses(two: TwoRuns) -> dict[str, Figure]:
    """Loss of both, and the difference of the second to the first."""
    column, unit = two.loss
    held = two.both(
        lambda run: run.evals[run.evals["split"].isin(["train", "validation"])].rename(columns={column: "y"})
    )
    held = held[np.isfinite(held["y"].astype(float))][["arm", "tokens", "split", "y"]]
    initial = None if two.mixed else max(run.record["summary"].get("initial_loss") or 0 for run in two.runs) or None
    batches = two.both(lambda run: run.steps.iloc[thinning.thinned(run.steps["loss"], MAX_POINTS)])[
        ["arm", "tokens", "loss"]
    ]
    batches = batches.rename(columns={"loss": "y"}).iloc[: 0 if two.mixed else None]
    found = {}
    if len(held) or len(batches):
        note = "Lines with dots: validation; dashed: train, both in evaluation mode."
        note += "" if two.mixed else " Thin: each training batch."
        drawn = charts_two_runs.losses(batches, held, two.names, initial, unit)
        found["loss"] = Figure(f"Loss ({unit})", drawn, note, wide=True)
    table = difference(held, two.names)
    if table["tokens"].nunique() > 1:
        each = batch_difference(two) if two.paired else pd.DataFrame({"tokens": [], "percent": []})
        said = f"Validation loss of {two.names[1]} against {two.names[0]} at equal tokens, in percent: minus is better."
        said += " Gray: of each training batch, which both runs saw alike." if len(each) else ""
        last = table.iloc[-1]
        found["difference"] = Figure(
            f"Difference: {two.names[1]} against {two.names[0]} (%)",
            charts_two_runs.difference(table, each),
            said,
            wide=True,
            data=f"{human(last['percent'], 3, sign=True)} % at {human(last['tokens'])} tokens.",
        )
    return found


def difference(held: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """tokens, percent: the change of the second run's validation loss against the first's, where both have one."""
    validation = held[held["split"] == "validation"].drop_duplicates(["arm", "tokens"], keep="last")
    one, other = (validation[validation["arm"] == name] for name in names)
    both = one.merge(other, on="tokens", suffixes=("", "_other")).sort_values("tokens")
    return both[["tokens"]].assign(percent=100 * (both["y_other"] / both["y"] - 1))


def batch_difference(two: TwoRuns) -> pd.DataFrame:
    """tokens, percent of each batch, thinned; both runs saw the same batches."""
    one, other = (run.steps.drop_duplicates("tokens")[["tokens", "loss"]] for run in two.runs)
    both = one.merge(other, on="tokens", suffixes=("", "_other"))
    percent = 100 * (both["loss_other"] / both["loss"] - 1)
    return both[["tokens"]].assign(percent=percent).iloc[thinning.thinned(percent, MAX_POINTS)]


def over_training(two: TwoRuns) -> dict[str, Figure]:
    """Gradient norm, learning rate and more of both."""
    found = {}
    for column, title, log in (
        ("grad_norm", "Gradient norm before clipping", True),
        ("lr", "Learning rate", False),
        ("noise_scale", "Gradient noise scale (tokens)", True),
        ("logit_rms", "RMS of the output logits", False),
    ):
        table = two.both(partial(_thin, column=column, log=log))
        if table["arm"].nunique() == 2:
            found[column] = Figure(title, charts_two_runs.lines_of(table, column, two.names, log))
    return found


def _thin(run: OneRun, column: str, log: bool) -> pd.DataFrame:
    steps = run.steps
    if column not in steps:
        return pd.DataFrame({"tokens": [], column: []})
    kept = steps[steps[column] > 0] if log else steps[steps[column].notna()]
    return kept.iloc[thinning.thinned(kept[column], MAX_POINTS)][["tokens", column]]


def depth(two: TwoRuns) -> Section:
    """Of each quantity that both have: its profile over the blocks at the end, the maps of both on one scale, and the
    map of their ratio or difference where they have the same blocks."""
    section = Section("Depth by tokens", scales={})
    for quantity, title in thinning.QUANTITIES.items():
        cells = [
            thinning.depth_map(run.layers, quantity, until=float(run.steps["tokens"].iloc[-1])) for run in two.runs
        ]
        if any(c.empty for c in cells):
            continue
        domain = charts_run.color_range(np.r_[cells[0]["value"], cells[1]["value"]])
        section.scales[title] = ColorScale(*charts_run.color_scale(domain, quantity))
        ends = pd.concat(
            c[c["tokens"] == c["tokens"].max()].assign(arm=name) for c, name in zip(cells, two.names, strict=True)
        ).rename(columns={"layer": "block"})
        profile = charts_curves.depth_profile(
            ends[["arm", "block", "value"]], two.names, title, quantity not in charts_run.LINEAR_QUANTITIES
        )
        section.figures.append(Figure(f"{title}, by block at the end", profile, group=title, wide=True))
        blocks, until = max(c["layer"].max() for c in cells), max(c["end"].max() for c in cells)
        for c, name in zip(cells, two.names, strict=True):
            drawn = charts_run.heat_map(c, quantity, domain, depth=int(blocks), until=float(until), legend=False)
            section.figures.append(Figure(name, drawn, group=title))
        change = change_of_maps(cells[0], cells[1], ratio=quantity not in DIFFERENCES)
        if len(change):
            what = "difference" if quantity in DIFFERENCES else "ratio"
            drawn = charts_two_runs.change_map(change, what, int(blocks), float(until))
            section.figures.append(Figure(f"{what.capitalize()}: {two.names[1]} to {two.names[0]}", drawn, group=title))
    if section.figures:
        section.text.append(
            "Block 1 is next to the input. Both maps of a quantity have the one scale below; a ratio above 1 (orange) "
            "means that the second run's value is larger."
        )
    else:
        section.missing.append("Their histories share no quantity by layer (diagnostics.every=10 writes them).")
    return section


def change_of_maps(one: pd.DataFrame, other: pd.DataFrame, ratio: bool) -> pd.DataFrame:
    """tokens, end, layer, value: the second map over the first, or less it, in the cells that both have."""
    both = one.merge(other[["tokens", "layer", "value"]], on=["tokens", "layer"], suffixes=("", "_other"))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = both["value_other"] / both["value"] if ratio else both["value_other"] - both["value"]
    both = both.assign(value=value)[["tokens", "end", "layer", "value"]]
    return both[np.isfinite(both["value"]) & ((both["value"] > 0) | (not ratio))]


def metrics_table(two: TwoRuns) -> Table:
    """figure, the value of each run, and the second's difference to the first."""
    one, other = map(known_metrics, two.runs)
    rows = []
    for key in dict.fromkeys([*one, *other]):
        title = (one.get(key) or other[key])[0]
        a, b = (known[key][1] if key in known else None for known in (one, other))
        numbers = is_number(a) and is_number(b)
        rows.append((title, a, b, float(b) - float(a) if numbers else None))  # type: ignore[arg-type]
    return Table("metrics", pd.DataFrame(rows, columns=["metric", *two.names, "difference"], dtype=object))


def page(two: TwoRuns) -> Page:
    """The page of two runs: outcomes, their losses and difference, maps over depth, a table of metrics."""
    drawn, table = losses(two), metrics_table(two)
    one, other = map(known_metrics, two.runs)
    first = [key for key in HEADLINE_METRICS if key in one and key in other][:HEADLINES]
    facts = [(one[k][0], f"{human(one[k][1])} | {human(other[k][1])}") for k in first]
    about = Section("Outcome", facts=facts, figures=[*drawn.values()])
    about.text += [f"{name}: {outcome(run.record)}" for name, run in zip(two.names, two.runs, strict=True)]
    if two.mixed:
        about.text.append(f"The runs differ in {' and '.join(two.mixed)}: their losses are compared in bits per byte.")
    if not two.paired:
        about.text.append(
            "They have not seen the same batches in the same order (another seed, text or batch): their difference is "
            "one of chance too."
        )
    sections = [about, depth(two), Section("Over training", figures=[*over_training(two).values()])]
    sections.append(Section("All metrics", tables=[table]))
    if two.settings.shape[1]:
        settings = two.settings.T.rename_axis("setting").reset_index()
        sections.append(Section("What they differ in", tables=[Table("settings", settings)]))
    said = " and ".join(f"{run.folder.parent.name}/{run.folder.name}" for run in two.runs)
    return Page(
        f"{two.names[0]} and {two.names[1]}", f"{said}: two runs, drawn beside each other.", sections, two.names, False
    )


def poster(two: TwoRuns) -> Any:
    """Losses, difference and what is over training in one picture."""
    import altair as alt

    wide = [f.chart.properties(title=f.title, width=700, height=240) for f in losses(two).values()]
    small = [f.chart.properties(title=f.title, width=300, height=150) for f in over_training(two).values()]
    grid = alt.vconcat(*wide, alt.concat(*small, columns=2), spacing=26) if small else alt.vconcat(*wide, spacing=26)
    title = alt.Title(f"{two.names[0]} and {two.names[1]}", fontSize=15, offset=14)
    return grid.resolve_scale(color="independent", strokeDash="independent").properties(title=title, padding=12)
