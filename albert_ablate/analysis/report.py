"""`albert-ablate report RUNS`: all runs below a folder, and what was judged of them, as one report.

An arm here is a setting, named by what it differs in from the others. Tuning runs appear in the tuning section only.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis import charts
from albert_ablate.analysis.effects import factorial_effects, rate_interval
from albert_ablate.analysis.load import Runs, load_runs
from albert_ablate.analysis.page import Figure, Page, Section, Table, write_csv, write_html, write_markdown, written
from albert_ablate.config import ConfigError
from albert_ablate.records.history import read_history

SCOPE = "Intervals speak about new seeds on this text, this tokenizer and these sizes; not about new text."
POINTS = 120_000  # of training curves on the whole page
CELLS = 240_000  # of heat maps on the whole page
MAPS = 24  # arms with heat maps
MAPPED_SEEDS = 5  # seeds of an arm in its heat map
MAPPED = ("grad_norm", "residual_rms", "update_ratio", "entropy")
PAIRS_OF_FACTORS = 6
LEVELS = 6
WITHOUT_EFFECT = (
    "trainer",
    "logger",
    "evaluation",
    "paths",
    "checkpoint",
    "diagnostics",
    "recipe",
    "seed",
    "force",
    "debug",
)
OWN = ("folder", "status", "reason", "label", "arm", "setting", "identity", "seed", "role")


# --- material --------------------------------------------------------------------------------------------------------


@dataclass
class Material:
    """What the sections are made of. rows: confirmation runs that can be read, with `name`, the arm in words."""

    root: Path
    rows: pd.DataFrame
    unreadable: pd.DataFrame
    arms: list[str]
    settings: pd.DataFrame  # arm x differing setting
    ledger: Mapping[str, Any] | None
    notes: list[str]
    remote: Mapping[str, Any]  # folder -> its histories, of runs that lie elsewhere
    both: pd.DataFrame | None = None  # arm, run, seed, tokens, train, validation

    @property
    def done(self) -> pd.DataFrame:
        return self.rows[self.rows["status"].isin(["finished", "diverged"])]

    @property
    def finished(self) -> pd.DataFrame:
        return self.rows[self.rows["status"] == "finished"]


def gather(root: Path, ledger: Path | None) -> Material:
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
        notes.append(
            f"{len(readable) - len(rows)} runs of tuning or calibration appear in the section on learning rates only."
        )
    settings, names = differences(rows)
    rows = rows.assign(name=rows["setting"].map(names))
    data = [column for column in ("data", "tokenizer") if column in rows and rows[column].nunique(dropna=False) > 1]
    if data:
        what = " and ".join(data)
        notes.append(f"The runs differ in {what}: losses in nats per token compare only where these are the same.")
    arms = list(dict.fromkeys(names[s] for s in settings.index))
    return Material(
        root, rows, summary[summary["status"].isna()], arms, settings.rename(index=names), found, notes, runs.remote
    )


def differences(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """What settings differ in (a row each, by its hash), and a name for each: its choices, and what else is needed to
    tell it from the settings of the same choices."""
    one = rows.drop_duplicates("setting").set_index("setting")
    groups = [c for c in one if c not in OWN and "." not in str(c) and c not in WITHOUT_EFFECT and _is_choice(one[c])]
    dotted = [c for c in one if "." in str(c) and str(c).split(".")[0] not in WITHOUT_EFFECT]
    groups, dotted = ([c for c in columns if one[c].map(_key).nunique() > 1] for columns in (groups, dotted))
    names = {s: " ".join(f"{c}={one.at[s, c]}" for c in groups if isinstance(one.at[s, c], str)) for s in one.index}
    for column in dotted:
        alike: dict[str, set[str]] = {}
        for s, name in names.items():
            alike.setdefault(name, set()).add(_key(one.at[s, column]))
        for s, name in names.items():
            if len(alike[name]) > 1:
                names[s] = f"{name} {column}={written(one.at[s, column])}".strip()
    taken: dict[str, int] = {}
    for s in names:
        name = names[s] or str(one.at[s, "label"])
        taken[name] = taken.get(name, 0) + 1  # settings may differ in nothing that is named, such as the text itself
        names[s] = f"{name} ({s[:6]})" if taken[name] > 1 else name
    order = sorted(names, key=lambda s: names[s])
    return one.loc[order, [*groups, *dotted]], {s: names[s] for s in order}


def _is_choice(column: pd.Series) -> bool:
    return all(isinstance(v, str) or v is None or v != v for v in column)


def _key(value: Any) -> str:
    return json.dumps(value, default=str)


def read_ledger(file: Path, needed: bool) -> Mapping[str, Any] | None:
    """The ledger, None where there is none and none was asked for."""
    try:
        found = json.loads(file.read_text())
        if not isinstance(found["claims"], list):
            raise ValueError("its claims are no list")
        for claim in found["claims"]:
            claim["verdict"], claim["name"], claim["parts"]
        return found
    except FileNotFoundError:
        if needed:
            raise ConfigError(f"There is no ledger {file}: albert-ablate judge writes it.") from None
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is no ledger ({type(error).__name__}: {error}); albert-ablate judge writes one."
        ) from None


def number(value: Any) -> float:
    """A ledger's number: strict JSON has no word for infinite ones, so they are texts."""
    return math.nan if value is None else float(value)


# --- the ledger ------------------------------------------------------------------------------------------------------


def ledger_section(m: Material) -> Section:
    section = Section("Ledger")
    if m.ledger is None:
        section.missing.append(
            f"Nothing is judged yet: albert-ablate judge sweeps/claims.yaml --runs {m.root} writes the ledger."
        )
        return section
    family = m.ledger.get("family") or {}
    section.text.append(
        f"{len(m.ledger['claims'])} claims of {m.ledger.get('claims_file', 'a claims file')}, in a family of "
        f"{written(family.get('size'))}, judged together at {written(family.get('alpha'))} (Holm)."
    )
    rows, looks = [], []
    for claim in m.ledger["claims"]:
        notes = [claim.get("reason") or "", *map(str, claim.get("notes") or [])]
        if claim.get("edited"):
            notes.insert(0, "This claim was edited after its first run: it is not pre-registered.")
        if spent := claim.get("cost"):
            notes.append("So far: " + ", ".join(f"{written(v)} {k}" for k, v in spent.items() if v is not None) + ".")
        parts = [*((p, "primary") for p in claim["parts"]), *((p, "secondary") for p in claim.get("secondary") or [])]
        table = pd.DataFrame([_part(p, kind) for p, kind in parts])
        own = [
            {
                "claim": claim["name"],
                "contrast": _contrast(p),
                **{k: number(look.get(k)) for k in ("pairs", "statistic", "p", "boundary")},
            }
            for p, _ in parts
            for look in p.get("looks") or []
        ]
        looks += own
        rows += [{"claim": claim["name"], "verdict": claim["verdict"], **row} for row in table.to_dict("records")]
        tables = [Table("parts", table, "Contrasts", folded=True)] if len(table) else []
        if own:
            tables.append(
                Table(
                    "looks",
                    pd.DataFrame(own).drop(columns="claim"),
                    "Every look, with the boundary it met",
                    folded=True,
                )
            )
        section.cards.append(
            {
                "verdict": str(claim["verdict"]),
                "name": str(claim["name"]),
                "statement": str(claim.get("statement") or ""),
                "sentence": str(claim.get("sentence") or ""),
                "notes": [n for n in notes if n],
                "tables": tables,
            }
        )
    if rows:
        section.tables.append(Table("ledger", pd.DataFrame(rows), "All contrasts", folded=True))
    if looks:
        section.tables.append(Table("looks", pd.DataFrame(looks), "All looks", folded=True))
    return section


def _contrast(part: Mapping) -> str:
    return f"{part['treatment']} against {part['control']}"


def _part(p: Mapping, kind: str) -> dict[str, Any]:
    return {
        "contrast": _contrast(p),
        "kind": kind,
        "measure": p.get("measure"),
        "effect": effect_text(p),
        "margin": number(p.get("margin")),
        "pairs": p.get("pairs"),
        "treatment diverged": _rate(p.get("treatment_diverged")),
        "control diverged": _rate(p.get("control_diverged")),
        "correlation": _triple(p.get("correlation")),
        "pairs to the margin": _triple(p.get("pairs_to_margin")),
        "signed rank": p.get("rank"),
    }


def effect_text(p: Mapping) -> str:
    """-0.4 % (-0.9 to +0.1), or in the measure's unit."""
    if p.get("percent"):
        mean, low, high = map(number, p["percent"])
        unit = " %"
    else:
        mean, low, high = (number(p.get(k)) for k in ("mean", "low", "high"))
        unit = f" {p['unit']}" if p.get("unit") else ""
    if math.isnan(mean):
        return "no finite pair"
    if math.isnan(low):
        return f"{mean:+.3g}{unit}".replace("-", "−")
    return f"{mean:+.3g}{unit} ({low:+.3g} to {high:+.3g})".replace("-", "−").replace("inf", "∞")


def _rate(found: Sequence | None) -> str | None:
    if not found:
        return None
    k, n, low, high = map(number, found)
    return f"{k:g} of {n:g} ({low:.0%} to {high:.0%})"


def _triple(found: Sequence | None) -> str | None:
    if not found:
        return None
    mean, low, high = map(number, found)
    return f"{written(float(f'{mean:.3g}'))} ({written(float(f'{low:.3g}'))} to {written(float(f'{high:.3g}'))})"


def effects_section(m: Material) -> Section:
    section = Section("Effects")
    rows = []
    without = []
    for claim in (m.ledger or {}).get("claims", []):
        parts = [*((p, "primary") for p in claim["parts"]), *((p, "secondary") for p in claim.get("secondary") or [])]
        for p, kind in parts:
            margin, mean = number(p.get("margin")), number(p.get("mean"))
            if not (margin > 0 and math.isfinite(mean)):
                without.append(f"{claim['name']}: {_contrast(p)}")
                continue
            low, high = number(p.get("low")), number(p.get("high"))
            rows.append(
                {
                    "row": f"{claim['name']}: {_contrast(p)}" if len(parts) > 1 else str(claim["name"]),
                    "mean": mean / margin,
                    "low": (mean if math.isnan(low) else low) / margin,
                    "high": (mean if math.isnan(high) else high) / margin,
                    "text": effect_text(p),
                    "verdict": claim["verdict"],
                    "kind": kind,
                }
            )
    if rows:
        section.figures.append(
            Figure(
                "Effects in multiples of their margins",
                charts.forest(pd.DataFrame(rows)),
                "Right of zero is what the claim says. Shaded: inside the margin. Filled: primary contrasts, with the "
                "interval that was judged; hollow: "
                "secondary ones, which carry no verdict.",
                wide=True,
            )
        )
    else:
        section.missing.append("Effects with their intervals come from a ledger that has pairs.")
    if without:
        section.text.append(f"Without a finite mean or a margin to be drawn by: {'; '.join(without)}.")
    return section


# --- curves ----------------------------------------------------------------------------------------------------------


def read(m: Material, row: Any, name: str, columns: Sequence[str]) -> pd.DataFrame | None:
    """Those of the columns that the run's history has; None where it cannot be read."""
    try:
        if row.folder in m.remote:
            table = m.remote[row.folder](name)
        else:
            record = json.loads((Path(row.folder) / "record.json").read_text())
            table = read_history(Path(row.folder), name, record["histories"])
        return table.select([c for c in columns if c in table.column_names]).to_pandas()
    except (OSError, ValueError, KeyError):
        return None


def curves_section(m: Material) -> Section:
    section = Section("Loss curves")
    evals, batches, ends, lost = [], [], [], []
    points = max(30, min(400, POINTS // max(1, len(m.rows))))
    for i, row in enumerate(m.rows.itertuples(index=False)):
        own = {"arm": row.name, "run": i, "seed": int(row.seed)}
        held = read(m, row, "evals", ("tokens", "split", "loss", "bits_per_byte"))
        steps = read(m, row, "steps", ("tokens", "loss"))
        if held is None or steps is None:
            lost.append(row.folder)
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
        section.text.append(
            f"Histories of {len(lost)} runs cannot be read: {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}."
        )
    if not evals or not sum(map(len, evals)):
        section.missing.append("No run has committed an evaluation yet.")
        return section
    initial = m.rows["initial_loss"].median() if "initial_loss" in m.rows else None
    held = pd.concat(evals)
    mixed = any(c in m.rows and m.rows[c].nunique(dropna=False) > 1 for c in ("data", "tokenizer"))
    validation = held[held["split"] == "validation"].drop(columns="split")
    unit = "nats per token"
    if mixed:
        validation["loss"], unit = validation["bits_per_byte"], "bits per byte"
    validation = _with_range(validation.drop(columns="bits_per_byte"))
    over = pd.DataFrame(ends or [], columns=["arm", "run", "seed", "tokens", "loss", "divergence"])
    if mixed:  # batch losses are in nats only
        over = over.iloc[:0]
    note = "Thin: each run; thick: the mean over an arm's seeds; band: their range. Crosses: diverged runs."
    start = None if mixed else initial
    section.figures.append(Figure("Validation loss", charts.loss_curves(validation, over, m.arms, unit, start), note))
    late = validation[validation["tokens"] >= validation["tokens"].max() / 2]
    if late["tokens"].nunique() > 1:
        ended = over[over["tokens"] >= late["tokens"].min()]
        drawn = charts.loss_curves(late, ended, m.arms, unit, None)
        section.figures.append(
            Figure("Validation loss, second half", drawn, "The same. Shift and wheel zoom in, double click zooms out.")
        )
    training = pd.concat(batches)
    if len(training) and not mixed:
        section.figures.append(
            Figure(
                "Training loss of each batch",
                charts.batch_curves(training, m.arms, initial),
                "Thinned to the least and greatest loss of each stretch: a spike stays.",
                wide=True,
            )
        )
    pair = held.pivot_table(index=["arm", "run", "seed", "tokens"], columns="split", values="loss").reset_index()
    m.both = pair.dropna() if {"train", "validation"} <= {*pair} else None
    return section


def _with_range(validation: pd.DataFrame) -> pd.DataFrame:
    """mean, low, high over the seeds that have a finite loss at these tokens."""
    finite = validation[np.isfinite(validation["loss"])]
    over = finite.groupby(["arm", "tokens"])["loss"].agg(["mean", "min", "max"]).reset_index()
    return finite.merge(over.rename(columns={"min": "low", "max": "high"}), on=["arm", "tokens"])


# --- learning rates --------------------------------------------------------------------------------------------------


def rates_section(m: Material) -> Section:
    section = Section("Learning rates")
    points, tuned = [], []
    for file in sorted((m.root / "tuning").glob("*.json")):
        try:
            found = json.loads(file.read_text())
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
                            str(found["arm"]),
                            float(at["rate"]),
                            int(seed),
                            math.nan if loss is None else number(loss),
                            int(at.get("tokens") or 0),
                        )
                    )
            tuned.append({k: found.get(k) for k in ("arm", "rate", "edge", "slack", "tokens", "objective", "trained")})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            section.text.append(f"{file.name} is left out: it is no tuning result ({type(error).__name__}).")
    if points:
        table = pd.DataFrame(points, columns=["arm", "rate", "seed", "loss", "tokens"])
        table = table[table["tokens"] == table.groupby("arm")["tokens"].transform("max")]
        _draw_rates(section, m, table, "Tuning: validation loss over the learning rate")
        section.tables.append(
            Table(
                "tuned_rates",
                pd.DataFrame(tuned),
                "Tuned rates",
                "edge: the best rate ends the grid. slack: expected loss above the optimum, nats.",
            )
        )
    if (grid := _grid(m)) is not None:
        _draw_rates(section, m, grid, "Learning-rate sensitivity")
    if not section.figures:
        section.missing.append(
            f"albert-ablate tune writes {m.root}/tuning; runs at three rates or more, else alike, are drawn too."
        )
    return section


def _seeds(seeds: Any, n: int) -> Sequence:
    return seeds if isinstance(seeds, Sequence) and len(seeds) == n else range(n)


def _grid(m: Material) -> pd.DataFrame | None:
    """Runs that differ in the learning rate alone, at least three rates of an arm."""
    if "optimizer.lr" not in m.settings:
        return None
    others = [c for c in m.settings if c != "optimizer.lr"]
    named = m.done.merge(
        m.settings[others].map(_key).agg(" ".join, axis=1).rename("else_"), left_on="name", right_index=True
    )
    kept = []
    for _, rows in named.groupby("else_"):
        if rows["optimizer.lr"].nunique() >= 3:
            name = " ".join(w for w in str(rows["name"].iloc[0]).split() if not w.startswith("optimizer.lr="))
            kept.append(rows.assign(arm=name or "all"))
    if not kept:
        return None
    rows = pd.concat(kept)
    loss = rows["val_loss"].where(rows["status"] == "finished")
    return pd.DataFrame(
        {
            "arm": rows["arm"],
            "rate": rows["optimizer.lr"].astype(float),
            "seed": rows["seed"].astype(int),
            "loss": loss.astype(float),
        }
    )


def _draw_rates(section: Section, m: Material, table: pd.DataFrame, title: str) -> None:
    arms = list(dict.fromkeys(table["arm"]))
    if not set(arms) <= set(m.arms):  # arms of a grid are settings without their rate: colors of their own
        section.text.append(
            "Arms on this chart are settings without their learning rate; the filter does not know them."
        )
    else:
        arms = m.arms
    means = table.groupby(["arm", "rate"])["loss"].agg(lambda x: x.mean(skipna=False)).rename("mean").reset_index()
    points = table.assign(diverged=~np.isfinite(table["loss"]), outcome="diverged")
    initial = m.rows["initial_loss"].median() if "initial_loss" in m.rows else None
    chart = charts.sensitivity(points, means, arms, initial)
    note = "Dots: runs; the line: their mean, where no seed diverged; crosses at the top: diverged runs."
    section.figures.append(Figure(title, chart, note, wide=True))
    section.tables.append(Table("rates", table, "Runs by learning rate", folded=True))


# --- stability -------------------------------------------------------------------------------------------------------


def divergence_section(m: Material) -> Section:
    rows = []
    for arm in m.arms:
        own = m.rows[m.rows["name"] == arm]
        done = own[own["status"].isin(["finished", "diverged"])]
        lost = done[done["status"] == "diverged"]
        share, low, high = rate_interval(len(lost), len(done)) if len(done) else (math.nan,) * 3
        kinds = lost["divergence"].value_counts().to_dict() if "divergence" in lost else {}
        others = own[~own.index.isin(done.index)]["status"].value_counts().to_dict()
        rows.append(
            {
                "arm": arm,
                "seeds": len(done),
                "diverged": len(lost),
                "share": None if math.isnan(share) else f"{share:.0%} ({low:.1%} to {high:.1%})",
                "kinds": ", ".join(f"{n} {k}" for k, n in kinds.items()) or None,
                "not done": ", ".join(f"{n} {k}" for k, n in others.items()) or None,
            }
        )
    note = "share: with its exact 95 % interval (Clopper and Pearson 1934). Diverged runs are never dropped."
    return Section("Divergence", tables=[Table("divergence", pd.DataFrame(rows), note=note)])


def depth_section(m: Material) -> Section:
    """Heat maps by arm: the median over up to five seeds of what each showed."""
    section = Section("Depth by tokens")
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
        section.figures += [
            Figure(arm, charts.heat_map(c, quantity, domain), arm=arm, group=title)
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
                "Gap: validation - training loss at the end (nats per token)",
                charts.strip(values, _means(values, m.arms), m.arms, "gap (nats per token)", zero=True),
                "Dots: runs; bar: mean; line: 95 % t interval from three seeds on. Both losses without dropout.",
            )
        )
    if m.both is not None and len(m.both):
        initial = m.rows["initial_loss"].median() if "initial_loss" in m.rows else None
        section.figures.append(
            Figure(
                "Validation over training loss",
                charts.train_and_validation(m.both, m.arms, initial),
                "At equal training loss the lower curve generalizes better; on the dashed line both are equal.",
            )
        )
    curves: dict[str, list[dict[str, Any]]] = {"corruption": [], "units": []}
    evaluated = []
    for row in m.rows.itertuples(index=False):
        try:
            found = evaluations(Path(row.folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            section.text.append(f"{row.folder}/evaluations.json cannot be read ({type(error).__name__}).")
            continue
        own = {"arm": row.name, "seed": int(row.seed), "run": row.folder}
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
        section.tables.append(Table("evaluations", wide.reset_index(), title, folded=len(wide) > 16))
    if not curves["corruption"]:
        section.missing.append(
            "Loss under missing and noisy tokens: albert-ablate evaluate RUN corruption measures it."
        )
    return section


def evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """rows and summary of what was evaluated of a run, by name; empty where nothing was."""
    file = folder / "evaluations.json"
    if not file.exists():
        return {}
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

    def plain(row: Mapping) -> dict[str, Any]:
        return {k: words.get(v, v) if isinstance(v, str) else v for k, v in row.items()}

    found = json.loads(file.read_text())
    return {
        name: {"rows": [plain(r) for r in kept["rows"]], "summary": plain(kept["summary"])}
        for name, kept in found.items()
    }


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
        chart = charts.corruption(own.assign(run=pd.factorize(own["run"])[0]), m.arms, f"share of {kind} {title}")
        note = (
            "Rise above the loss on clean text." if name == "corruption" else "Rise above the loss of the whole model."
        )
        section.figures.append(Figure(f"Loss under {kind} {title}", chart, note))


def _means(values: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Mean by arm with the 95 % t interval, from three seeds on."""
    from scipy.special import stdtrit

    out = []
    for arm in arms:
        x = values.loc[values["arm"] == arm, "value"].to_numpy(float)
        if len(x):
            half = float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / len(x) ** 0.5) if len(x) > 2 else math.nan
            out.append({"arm": arm, "mean": x.mean(), "low": x.mean() - half, "high": x.mean() + half})
    return pd.DataFrame(out)


# --- factors, cost, configurations -----------------------------------------------------------------------------------


def factorial_section(m: Material) -> Section:
    section = Section("Interactions")
    varied = [c for c in m.settings if m.settings[c].notna().all() and 2 <= m.settings[c].map(_key).nunique() <= LEVELS]
    distinct: dict[tuple, str] = {}
    for column in varied:  # a setting that comes with a choice is no factor of its own
        distinct.setdefault(tuple(pd.factorize(m.settings[column].map(_key))[0]), column)
    factors = [*distinct.values()]
    rows = (
        m.finished.merge(m.settings[factors], left_on="name", right_index=True, suffixes=("", "_"))
        if factors
        else m.finished
    )
    effects = []
    for one, other in combinations(factors, 2):
        if len(section.figures) == PAIRS_OF_FACTORS:
            section.text.append(f"Drawn are the first {PAIRS_OF_FACTORS} pairs of factors.")
            break
        crossed = rows.groupby([rows[one].map(written), rows[other].map(written)])["val_loss"].mean()
        wanted = m.settings[one].nunique() * m.settings[other].nunique()
        if len(crossed) < wanted or wanted < 4:
            continue
        points = pd.DataFrame(
            {
                "x": rows[one].map(written),
                "level": rows[other].map(written),
                "seed": rows["seed"].astype(int),
                "value": rows["val_loss"].astype(float),
            }
        )
        cells = points.groupby(["x", "level"])["value"].mean().rename("mean").reset_index()
        section.figures.append(
            Figure(
                f"{one} and {other}",
                charts.interaction(cells, points, one, other),
                "Parallel lines: the effects add up. Mean over all other settings, and each finished run.",
            )
        )
        if wanted == 4:
            effects += _contrasts(m, rows, one, other)
    if effects:
        section.tables.append(
            Table(
                "interactions",
                pd.DataFrame(effects),
                "Effects on the validation loss (nats per token)",
                "A contrast per seed that has all four cells, with a 95 % t interval; a description, no verdict. "
                "The interaction: the first factor's effect at the second's second level minus that at its first.",
            )
        )
    if not section.figures:
        section.missing.append(
            "Interactions need arms that cross the levels of two settings, as a factorial sweep does."
        )
    return section


def _contrasts(m: Material, rows: pd.DataFrame, one: str, other: str) -> list[dict[str, Any]]:
    levels = [sorted({*rows[c].map(written)}) for c in (one, other)]
    mean = rows.groupby([rows["seed"], rows[one].map(written), rows[other].map(written)])["val_loss"].mean()
    lost = m.rows[m.rows["status"] == "diverged"]["seed"].unique()
    cells = []
    for seed in sorted(set(rows["seed"]) - set(lost)):
        try:
            cells.append([[mean[seed, a, b] for b in levels[1]] for a in levels[0]])
        except KeyError:
            continue
    if len(cells) < 3:
        return []
    out = []
    for names, d in factorial_effects(np.array(cells, float), (one, other)).items():
        means = _means(pd.DataFrame({"arm": "x", "value": d}), ["x"]).iloc[0]
        words = [f"{n}: {levels[(one, other).index(n)][1]} minus {levels[(one, other).index(n)][0]}" for n in names]
        what = " x ".join(names) if len(names) > 1 else words[0]
        out.append({"effect": what, "seeds": len(d), "mean": means["mean"], "low": means["low"], "high": means["high"]})
    return out


def cost_section(m: Material) -> Section:
    section = Section("Cost and quality")
    columns = (
        ("flops", "training FLOPs", "Counted from the model."),
        ("seconds", "seconds", "As they fell, whatever else the machine did: no comparison of speed."),
    )
    rows = m.finished
    for column, title, note in columns:
        if column in rows and (pd.to_numeric(rows[column], errors="coerce") > 0).any():
            points = (
                rows[["name", "seed", "val_loss", column]].set_axis(["arm", "seed", "loss", column], axis=1).dropna()
            )
            points = points.astype({"loss": float, column: float, "seed": int})
            section.figures.append(
                Figure(f"Loss over {title}", charts.cost(points[points[column] > 0], m.arms, column, title), note)
            )
    wanted = {
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
    }
    kept = {k: v for k, v in wanted.items() if k in rows and rows[k].notna().any()}
    if kept:
        numbers = rows[[*kept]].apply(pd.to_numeric, errors="coerce").assign(arm=rows["name"])
        table = numbers.groupby("arm").mean().rename(columns=kept)
        table.insert(0, "finished", numbers.groupby("arm").size())
        order = [a for a in m.arms if a in table.index]
        section.tables.append(
            Table("arms", table.loc[order].reset_index(), "Means over the finished seeds of each arm")
        )
    return section


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
            "setting",
            "folder",
        )
        if c in m.rows
    ]
    rows = m.rows[listed].rename(columns={"name": "arm"}).sort_values(["arm", "seed"])
    rows["folder"] = [str(f).removeprefix(f"{m.root}/") for f in rows["folder"]]
    section.tables.append(Table("runs", rows, f"All {len(rows)} runs", folded=True))
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
    section.text += m.notes
    if m.ledger and m.ledger.get("refusals"):
        section.text.append("Refused in this ledger:")
        section.text += [_sentence(r) for r in m.ledger["refusals"]]
    if len(m.unreadable):
        table = m.unreadable[["folder", "reason"]]
        section.tables.append(Table("unreadable", table, f"{len(table)} runs that cannot be read"))
    return section


def _sentence(refusal: Any) -> str:
    return ": ".join(str(v) for v in refusal.values()) if isinstance(refusal, Mapping) else str(refusal)


# --- out -------------------------------------------------------------------------------------------------------------


def make(root: Path, ledger: Path | None = None) -> Page:
    """The report on the runs below `root`."""
    m = gather(root, ledger)
    ledger_, effects_ = ledger_section(m), effects_section(m)
    curves = curves_section(m)  # before generalization, which draws what it read
    sections = [
        ledger_,
        effects_,
        curves,
        rates_section(m),
        divergence_section(m),
        depth_section(m),
        generalization_section(m),
        factorial_section(m),
        cost_section(m),
        settings_section(m),
        methods_section(m),
    ]
    states = m.rows["status"].value_counts().to_dict()
    said = ", ".join(f"{n} {s}" for s, n in states.items())
    subtitle = f"{len(m.arms)} arms, {len(m.rows)} runs ({said}). {SCOPE}"
    return Page(f"Report on {m.root.resolve().name}", subtitle, sections, m.arms)


def write(root: Path, output: Path | None, kind: str, ledger: Path | None = None) -> list[Path]:
    """Write the report; gives the files."""
    output = output or Path({"html": "report.html", "md": "report.md", "csv": "report"}[kind])
    if kind != "csv":
        charts.require()
        charts.writable(output, (f".{kind}",))
    elif not output.absolute().parent.is_dir():
        raise ConfigError(f"{output} cannot be written: there is no folder {output.parent}.")
    page = make(root, ledger)
    return {"html": write_html, "md": write_markdown, "csv": write_csv}[kind](page, output)
