"""A folder of runs as a study: arms side by side, tables of their runs and of the differences per seed.

What the notebooks in analysis/ call. An arm is what is varied, at the learning rate it was run at; a grid, its runs
over rates. Tables describe: only `albert-ablate judge` judges claims that were named before.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis import measures
from albert_ablate.analysis.load import load_runs
from albert_ablate.analysis.registry import Evidence, Measure, Missing, Unusable, measure
from albert_ablate.analysis.tables import (  # noqa: F401 (means: the notebooks')
    baseline,
    mean_interval,
    means,
    seed_against_seed,
    settings_and_names,
    with_mean,
)
from albert_ablate.config import ConfigError
from albert_ablate.judge.run_store import RunStore
from albert_ablate.records.folder import DONE
from albert_ablate.report.contrasts import read_ledger
from albert_ablate.stats import effects
from albert_ablate.stats.sequential import ALPHA, PAIRS
from albert_ablate.stats.verdicts import Claim, Contrast, Verdict, verdicts

FOLDER = "ALBERT_ABLATE_RUNS"
COMPARED = ["treatment", "measure", "unit", "pairs", "finished", "mean", "low", "high", "correlation", "improvement"]
MAKE = "python run.py -m norm=pre_ln,post_ln seed=0,1,2,3"


@dataclass(frozen=True)
class Study:
    """arms: arm -> seed -> its run, seeds in rising order. grids: arm -> rate -> seed -> run. notes: what is not here.

    All of one text, number of tokens, depth and task, so that the arms may be compared.
    """

    root: Path
    arms: Mapping[str, Mapping[int, Evidence]]
    grids: Mapping[str, Mapping[float, Mapping[int, Evidence]]]
    notes: list[str] = field(default_factory=list)
    baseline: str = ""  # the arm that others are compared with where no other is named

    @property
    def names(self) -> list[str]:
        """Names of the arms."""
        return list(self.arms)

    def runs(self) -> Iterator[tuple[str, int, Evidence]]:
        """(arm, seed, run) of every run."""
        return ((arm, seed, run) for arm, seeds in self.arms.items() for seed, run in seeds.items())


def folder() -> Path:
    """The folder of runs: that of the environment variable ALBERT_ABLATE_RUNS, else ../runs or runs."""
    named = os.environ.get(FOLDER)
    runs_folder = next(
        (p for p in map(Path, [named] if named else ["../runs", "runs"]) if any(p.glob("*/seed*"))), None
    )
    if runs_folder is None:
        where = f"{FOLDER}={named} holds no runs" if named else "neither ../runs nor runs holds a run"
        raise ConfigError(f"There is nothing to show: {where}. Make some ({MAKE}), or set {FOLDER} to their folder.")
    return runs_folder


def read_study(root: Path, wanted: str | None = None) -> Study:
    """The runs below `root` that may be compared, of several such sets that with most finished runs.

    wanted: the arm to compare the others with; without one, that nearest to the defaults (`tables.baseline`)."""
    # how runs ended is not a choice that tells arms apart
    store, summary = RunStore(root), load_runs(root).summary.drop(columns="divergence", errors="ignore")
    notes = [f"{len(store.unreadable)} records cannot be read."] if store.unreadable else []
    done = [r for r in store.evidence if r.record["status"] in DONE and r.record.get("role") == "confirmation"]
    if not done:
        raise ConfigError("There is nothing to compare: no run other than tuning runs has finished or diverged.")
    common = Counter(_scope(r) for r in [r for r in done if not r.diverged] or done).most_common(1)[0][0]
    comparable = [r for r in done if _scope(r) == common]
    if others := len(store.evidence) - len(comparable):
        notes.append(f"{others} runs of other texts, budgets, depths, roles or states are left out.")
    grids: dict[str, dict[float, dict[int, Evidence]]] = {}
    for run in sorted(comparable, key=lambda r: (r.lr, r.record["seed"])):
        grids.setdefault(run.record["arm"], {}).setdefault(run.lr, {})[run.record["seed"]] = run
    main = {arm: max(rates, key=lambda rate: _merit(rates[rate])) for arm, rates in grids.items()}
    first = [next(iter(grids[arm][rate].values())) for arm, rate in main.items()]
    settings, names = settings_and_names(summary[summary["folder"].isin([str(r.folder) for r in first])])
    called = {arm: names[run.folder.parent.name] for arm, run in zip(main, first, strict=True)}
    order = sorted(called, key=called.__getitem__)
    return Study(
        root,
        {called[arm]: grids[arm][main[arm]] for arm in order},
        {called[arm]: grids[arm] for arm in order},
        notes,
        baseline(settings.rename(index=names), wanted),
    )


def _scope(run: Evidence) -> tuple[Any, ...]:
    """What runs must share to be compared: text and how much of it, tokens, depth, task."""
    record = run.record
    config, task = record["config"], (record.get("choices") or {}).get("task")
    text = (record.get("data") or {}).get("fingerprint"), json.dumps(config.get("data"), sort_keys=True)
    return *text, record["budget"]["tokens"], config["model"].get("layers"), task


def _merit(seeds: Mapping[int, Evidence]) -> tuple[int, float]:
    """The rate with most seeds is the arm's own; of several, that with the least mean validation loss."""
    losses = [np.inf if r.diverged else r.record["summary"].get("val_loss") or np.inf for r in seeds.values()]
    return len(seeds), -float(np.mean(losses))


# --- runs ------------------------------------------------------------------------------------------------------------


def outcomes(study: Study) -> pd.DataFrame:
    """A row an arm: learning rate, seeds, how many diverged and of which kind, their share with its exact interval."""
    rows = []
    for arm, seeds in study.arms.items():
        lost = [r for r in seeds.values() if r.diverged]
        share, low, high = effects.rate_interval(len(lost), len(seeds))
        kinds = Counter(str(r.record["summary"].get("divergence")) for r in lost)
        rows.append(
            {
                "arm": arm,
                "rate": next(iter(seeds.values())).lr,
                "seeds": len(seeds),
                "diverged": len(lost),
                "share": share,
                "low": low,
                "high": high,
                "kinds": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
            }
        )
    return pd.DataFrame(rows)


def values(study: Study, names: Sequence[str]) -> pd.DataFrame:
    """arm, seed, measure, value of every measure of one run; a diverged run has the worst value, +-inf."""
    rows = []
    for name in names:
        m = measure(name)
        for arm, seed, run in study.runs():
            value = _value(m, run)
            if value is not None:
                rows.append({"arm": arm, "seed": seed, "measure": name, "value": value})
    return pd.DataFrame(rows, columns=["arm", "seed", "measure", "value"])


def describe(study: Study, names: Sequence[str]) -> pd.DataFrame:
    """A row an arm and measure: runs, mean and spread of those that finished, interquartile mean of all."""
    rows = []
    for (name, arm), own in values(study, names).groupby(["measure", "arm"], sort=False):
        x = own["value"].to_numpy(float)
        fine = x[np.isfinite(x)]
        spread = float(fine.std(ddof=1)) if len(fine) > 1 else np.nan
        row = {"measure": name, "arm": arm, "runs": len(x), "mean": fine.mean() if len(fine) else np.nan}
        rows.append(row | {"spread": spread, "interquartile mean": effects.interquartile_mean(x)})
    return pd.DataFrame(rows, columns=["measure", "arm", "runs", "mean", "spread", "interquartile mean"])


def _value(m: Measure, run: Evidence) -> float | None:
    if run.diverged:
        return np.inf if m.better == "lower" else -np.inf
    try:
        value = float(m.of(run))
    except (Missing, Unusable, ValueError):
        return None
    return value if np.isfinite(value) else None


def curves(study: Study, split: str = "validation", x: str = "tokens") -> pd.DataFrame:
    """arm, run, seed, tokens (or `x` in its place), loss, and over an arm's seeds mean, low and high
    (`tables.with_mean`)."""
    parts = []
    for i, (arm, seed, run) in enumerate(study.runs()):
        at, loss = run.curve(split, x=x)
        parts.append(pd.DataFrame({"arm": arm, "run": i, "seed": seed, "tokens": at, "loss": loss}))
    return with_mean(pd.concat(parts))


def ends(study: Study) -> pd.DataFrame:
    """arm, run, seed, tokens, loss, divergence of the diverged runs: where `charts.loss_curves` sets a cross."""
    rows = [
        {"arm": arm, "run": i, "seed": seed, "tokens": float(run.column("steps", "tokens")[-1]), "loss": np.nan,
         "divergence": run.record["summary"].get("divergence")}
        for i, (arm, seed, run) in enumerate(study.runs()) if run.diverged
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["arm", "run", "seed", "tokens", "loss", "divergence"])


def train_and_validation(study: Study) -> pd.DataFrame:
    """arm, run, seed, tokens, train, validation: both losses of each evaluation."""
    keys = ["arm", "run", "seed", "tokens"]
    train, validation = (curves(study, split)[[*keys, "loss"]] for split in ("train", "validation"))
    return train.rename(columns={"loss": "train"}).merge(validation.rename(columns={"loss": "validation"}), on=keys)


def by_depth(study: Study, quantity: str) -> pd.DataFrame:
    """arm, run, seed, block (from 1), when (initialization, end), value: norms over a block, else its last sublayer.

    The end is the last logged step. Runs that lack the quantity are left out.
    """
    parts = []
    for i, (arm, seed, run) in enumerate(study.runs()):
        for when, initial in (("initialization", True), ("end", False)):
            try:
                sizes = run.norms(quantity, initial)[-1] if quantity.endswith("norm") else _last(run, quantity, initial)
            except (Missing, Unusable):
                continue
            blocks = np.arange(1, len(sizes) + 1)
            parts.append(
                pd.DataFrame({"arm": arm, "run": i, "seed": seed, "block": blocks, "when": when, "value": sizes})
            )
    columns = ["arm", "run", "seed", "block", "when", "value"]
    return pd.concat(parts) if parts else pd.DataFrame(columns=columns)


def _last(run: Evidence, quantity: str, initial: bool) -> np.ndarray:
    sublayers_last = run.layers(quantity, initial)[-1]
    blocks = len(np.unique(run.column("layers", "layer")))
    sublayers = sublayers_last.reshape(blocks, -1)
    return np.array([row[~np.isnan(row)][-1] if (~np.isnan(row)).any() else np.nan for row in sublayers])


def evaluated(study: Study, name: str) -> pd.DataFrame:
    """The rows of an evaluation of every run, with arm, run and seed; empty where nothing was evaluated."""
    parts = [
        pd.DataFrame(rows).assign(arm=arm, run=i, seed=seed)
        for i, (arm, seed, run) in enumerate(study.runs())
        if (rows := run.rows(name))
    ]
    return pd.concat(parts) if parts else pd.DataFrame(columns=["arm", "run", "seed"])


def rises(study: Study, kind: str = "masked") -> pd.DataFrame:
    """arm, run, seed, rate, rise, mean: loss over the corruption rate above the clean loss; mean over the seeds."""
    rows = evaluated(study, "corruption")
    if rows.empty:
        return pd.DataFrame(columns=["arm", "run", "seed", "rate", "rise", "mean"])
    rows = rows.loc[rows["kind"] == kind, ["arm", "run", "seed", "rate", "rise"]]
    return rows.assign(mean=rows.groupby(["arm", "rate"])["rise"].transform("mean"))


def rates(study: Study) -> pd.DataFrame:
    """arm, rate, seed, loss, diverged over the grids of arms that were run at two learning rates or more."""
    rows = [
        {"arm": arm, "rate": rate, "seed": seed, "loss": np.nan if run.diverged else run.summary_metric("val_loss"),
         "diverged": run.diverged}
        for arm, grid in study.grids.items() if len(grid) > 1
        for rate, seeds in grid.items() for seed, run in seeds.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["arm", "rate", "seed", "loss", "diverged"])


# --- pairs -----------------------------------------------------------------------------------------------------------


def differences(study: Study, names: Sequence[str], control: str | None = None) -> pd.DataFrame:
    """treatment, seed, measure, d: one signed number per seed, positive in favor of the treatment.

    control: the study's baseline where none is given; another one changes the signs, and nothing else. +-inf
    where one of the two diverged, nan where both did. Measures over the learning rate take the seeds that have all of
    both arms' rates.
    """
    control = _known(study, control)
    rows = []
    for name in names:
        m = measure(name)
        for arm in study.names:
            if arm == control:
                continue
            for seed, d in _paired(study, m, arm, control).items():
                rows.append({"treatment": arm, "seed": seed, "measure": name, "d": d})
    return pd.DataFrame(rows, columns=["treatment", "seed", "measure", "d"])


def speedups_over_control(study: Study, control: str | None = None) -> pd.DataFrame:
    """arm, seed, value: `measures.speedup_over_control` in tokens, where both finished. To be drawn, never judged."""
    control = _known(study, control)
    finished = {seed: run.curve("validation") for seed, run in study.arms[control].items() if not run.diverged}
    rows = [
        {"arm": arm, "seed": seed, "value": measures.speedup_over_control(run.curve("validation"), finished[seed])}
        for arm, seed, run in study.runs() if arm != control and seed in finished and not run.diverged
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["arm", "seed", "value"])


def _known(study: Study, control: str | None) -> str:
    if len(study.arms) < 2:
        raise ConfigError(f"A comparison needs two arms; there is only {', '.join(study.arms)}.")
    if control is not None and control not in study.arms:
        raise ConfigError(f"control={control} is unknown: the arms are {', '.join(study.arms)}.")
    return control or study.baseline or study.names[0]


def _paired(study: Study, m: Measure, treatment: str, control: str) -> dict[int, float]:
    if m.kind == "grid":
        t, c = _whole_grids(study, treatment, control)
    else:
        t, c = ({seed: [run] for seed, run in study.arms[arm].items()} for arm in (treatment, control))
    by_arm = {}
    for seed in sorted(set(t) & set(c)):
        try:
            by_arm[seed] = _difference(m, t[seed], c[seed])
        except (Missing, Unusable, ValueError):  # a run lacks the measure
            continue
    return by_arm


def _whole_grids(study: Study, *arms: str) -> list[dict[int, list[Evidence]]]:
    """Per arm seed -> its runs over the rates that the arms share, of the seeds that have them all."""
    grids = [study.grids[arm] for arm in arms]
    shared = sorted(set.intersection(*map(set, grids)))
    if len(shared) < 2:
        return [{} for _ in arms]
    seeds = set.intersection(*(set(grid[rate]) for grid in grids for rate in shared))
    return [{seed: [grid[rate][seed] for rate in shared] for seed in seeds} for grid in grids]


def _difference(m: Measure, treatment: Sequence[Evidence], control: Sequence[Evidence]) -> float:
    """The signed number of one seed: of one run an arm, or of its grid of rates."""
    gone = [m.kind != "grid" and side[0].diverged for side in (treatment, control)]
    if m.kind == "pair" and not any(gone):
        if not np.isfinite(d := float(m.of(treatment[0], control[0]))):
            raise Unusable(f"{treatment[0].name} and {control[0].name} have no finite {m.name}.")
        return d
    t, c = (
        np.nan if lost else 0.0 if any(gone) else float(m.of(side if m.kind == "grid" else side[0]))
        for side, lost in zip((treatment, control), gone, strict=True)
    )
    log = m.log and not any(gone)
    return float(effects.signed_difference([t], [c], m.better, log, gone[:1], gone[1:])[0])


def compare(study: Study, names: Sequence[str], control: str | None = None) -> pd.DataFrame:
    """A row a treatment and measure: pairs, mean difference with the 95 % t interval over the seeds that both finished.

    correlation: of the pairs. improvement: probability that a run of the treatment beats one of the control (arXiv
    2108.13264). A description of all pairs there are, not a verdict: for a fixed number of pairs, of one comparison.
    """
    control = _known(study, control)
    table, rows = differences(study, names, control), []
    single = values(study, [n for n in names if measure(n).kind == "run"])
    for (arm, name), own in table.groupby(["treatment", "measure"], sort=False):
        m, d = measure(str(name)), own["d"].to_numpy(float)
        mean, low, high = mean_interval(d)
        both = single[single["measure"] == name].pivot(index="seed", columns="arm", values="value")
        row = {"treatment": arm, "measure": name, "unit": "log ratio" if m.log else m.unit, "pairs": len(d)}
        row |= {"finished": int(np.isfinite(d).sum()), "mean": mean, "low": low, "high": high}
        row |= {"correlation": np.nan, "improvement": np.nan}
        if {arm, control} <= {*both}:
            t, c = both[arm].dropna(), both[control].dropna()
            row["improvement"] = effects.probability_of_improvement(t, c, m.better)
            with suppress(ValueError):  # fewer than four pairs, or values that do not vary
                row["correlation"] = effects.correlation(both[arm], both[control])[0]
        rows.append(row)
    return pd.DataFrame(rows, columns=COMPARED)


def judged(study: Study, name: str, margin: float, N: int = PAIRS, control: str | None = None) -> dict[str, Verdict]:
    """A verdict for each arm against the control on one measure, together a family: how the judge comes to a word.

    The pairs are the gapless prefix of the control's seeds. A claim that was not named before its runs is explored, not
    confirmed.
    """
    control = _known(study, control)
    others = [arm for arm in study.names if arm != control]
    m, claims = measure(name), []
    for arm in others:
        d = _paired(study, m, arm, control)
        pairs = [d[seed] for seed in effects.prefix(list(study.arms[control]), d)]
        claims.append(Claim([Contrast(pairs, margin, discrete=m.discrete)], N))
    return dict(zip(others, verdicts(claims, len(claims), ALPHA), strict=True))


def verdict_table(verdicts: Mapping[str, Verdict]) -> pd.DataFrame:
    """A row an arm: the word, the repeated interval, the two p-values with the Holm levels they were compared with."""
    rows = []
    for arm, v in verdicts.items():
        part = v.parts[0]
        row = {"arm": arm, "verdict": v.verdict, "pairs": part.pairs, "mean": part.mean, "low": part.low}
        row |= {"high": part.high, "p effect": v.p_effect, "level": v.level_effect, "p no effect": v.p_inside}
        rows.append(row | {"signed rank": part.rank, "reason": v.reason})
    return pd.DataFrame(rows)


def forest_rows(verdicts: Mapping[str, Verdict], margin: float) -> pd.DataFrame:
    """What `charts.forest` draws of the verdicts: effects in multiples of the margin."""
    table = verdict_table(verdicts)
    ends = table[["mean", "low", "high"]] / margin
    text = [f"{m:+.3g} ({low:+.3g} to {high:+.3g})" for m, low, high in table[["mean", "low", "high"]].to_numpy(float)]
    return ends.assign(row=table["arm"], text=text, verdict=table["verdict"], kind="primary")


def look_table(verdicts: Mapping[str, Verdict]) -> pd.DataFrame:
    """Every look at every arm: pairs, test, statistic, boundary, nominal p."""
    rows = [{"arm": arm, **vars(look)} for arm, v in verdicts.items() for look in v.parts[0].looks]
    return pd.DataFrame(rows, columns=["arm", "pairs", "test", "statistic", "boundary", "p"])


def beside(study: Study, name: str, control: str | None = None) -> pd.DataFrame:
    """arm, seed, control, value: each arm's run beside the control's of the same seed, less the means of these two.

    Of the seeds where both finished.
    """
    control = _known(study, control)
    table = values(study, [name])
    table = table[np.isfinite(table["value"])]
    return seed_against_seed(table, control)


def ledger(root: Path) -> pd.DataFrame:
    """name, verdict, sentence of every claim in the folder's ledger; empty where nothing has been judged."""
    content = read_ledger(root / "ledger.json", needed=False)
    claims = content["claims"] if content else []
    return pd.DataFrame([{k: c.get(k) for k in ("name", "verdict", "sentence")} for c in claims],
                        columns=["name", "verdict", "sentence"])  # fmt: skip


def cost(study: Study, verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """Runs, tokens and seconds a decided verdict, over the runs of the study's arms."""
    words = [v.verdict for v in verdicts.values()]
    records = [run.record for *_, run in study.runs()]
    spent = {
        "runs": [1.0] * len(records),
        "tokens": [float(r["summary"].get("tokens") or 0) for r in records],
        "seconds": [float(r["cost"].get("seconds") or 0) for r in records],
    }
    return {unit: measures.cost_per_verdict(each, words) for unit, each in spent.items()}
