"""Tables that report, show and the notebooks share: each figure is computed here once, for all of them.

Frames of plain values in, frames out; nothing is read from disk but the defaults of the configuration.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import pandas as pd

from albert_ablate.analysis.setting_names import key_of, setting_names
from albert_ablate.config import ConfigError, conf_folder
from albert_ablate.stats.effects import signed_difference
from albert_ablate.stats.sequential import paired_interval

SCALE_GROUPS = (
    "model",
    "budget",
    "data",
    "tokenizer",
    "task",
)  # groups that make runs larger, longer or of another text

# --- arms ------------------------------------------------------------------------------------------------------------


def settings_and_names(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """What settings differ in (a row each, by its hash), and a name for each (`setting_names`)."""
    one = rows.drop_duplicates("setting")
    columns, names = setting_names(one.to_dict("records"))
    return one.set_index("setting").loc[list(names), columns], names


@cache
def default_settings() -> Mapping[str, Any]:
    """The option of each group, and each setting by its dotted key, of a run to which no option is given."""
    import yaml

    folder, settings = conf_folder(), dict[str, Any]()
    tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    for entry in tree.pop("defaults", []):
        if isinstance(entry, Mapping):
            for group, option in entry.items():
                file = folder / str(group) / f"{option}.yaml"
                if file.is_file():
                    settings[str(group)] = option
                    values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
                    settings |= {f"{group}.{k}": v for k, v in values.items() if not str(k).startswith("_")}
    settings |= {
        f"{group}.{k}": v for group, values in tree.items() if isinstance(values, Mapping) for k, v in values.items()
    }
    return settings


def nearest_to_defaults(settings: pd.DataFrame) -> str:
    """The arm that differs from the defaults in the fewest groups, of several such in the fewest settings, of several
    such the first. Where arms differ in size (model, budget) or text, among those of the size and text that most arms
    have: an arm of another size is no baseline for them. settings: arm x differing setting."""
    defaults = default_settings()
    size = [c for c in settings if str(c).split(".")[0] in SCALE_GROUPS]
    of_arm = {arm: tuple(key_of(settings.at[arm, c]) for c in size) for arm in settings.index}
    count = Counter(of_arm.values())

    def distance(arm: str) -> tuple[int, int, int]:
        row = settings.loc[arm]
        apart = [c for c in settings if c in defaults and key_of(row[c]) != key_of(defaults[c])]
        return -count[of_arm[arm]], sum("." not in c for c in apart), sum("." in c for c in apart)

    return min(settings.index, key=distance)


def of_other_size(settings: pd.DataFrame, arm: str) -> tuple[list[str], list[str]]:
    """The arms whose model, budget or text is not that of `arm`, and the settings in which they differ from it."""
    size = [c for c in settings if str(c).split(".")[0] in SCALE_GROUPS]
    keys = settings[size].map(key_of)
    apart = keys.ne(keys.loc[arm], axis=1)
    return list(settings.index[apart.any(axis=1)]), [c for c in size if apart[c].any()]


def baseline(settings: pd.DataFrame, wanted: str | None = None) -> str:
    """The arm that others are compared with: the one called `wanted`, or the one arm whose name has all words of it;
    without one, `nearest_to_defaults`.

    Raises ConfigError where no arm, or more than one, is meant.
    """
    arms = list(settings.index)
    if wanted is None:
        return nearest_to_defaults(settings)
    if wanted in arms:
        return wanted
    meant = [a for a in arms if set(wanted.split()) and set(wanted.split()) <= set(a.split())]
    if len(meant) == 1:
        return meant[0]
    among = "; ".join(meant or arms)
    problem = f"could be {len(meant)} arms" if meant else "is not an arm"
    raise ConfigError(f"The baseline {wanted!r} {problem}: give one of {among}.")


# --- means -----------------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of the finite values: mean -+ t(0.975, n - 1) s / sqrt(n), from two values on.

    The ends are nan for one value and for equal ones; all three are nan where no value is finite.
    """
    x = np.asarray(values, float)
    x = x[np.isfinite(x)]
    try:
        return paired_interval(x)
    except ValueError:
        return float(x.mean()) if len(x) else math.nan, math.nan, math.nan


def means(table: pd.DataFrame, arms: Sequence[str] | None = None) -> pd.DataFrame:
    """arm, mean, low, high of a table of arm and value (`mean_interval`), of `arms` in their order if given."""
    values = {str(arm): arm_rows["value"].to_numpy(float) for arm, arm_rows in table.groupby("arm", sort=False)}
    order = list(values) if arms is None else [a for a in arms if a in values]
    rows = [dict(zip(("arm", "mean", "low", "high"), (arm, *mean_interval(values[arm])), strict=True)) for arm in order]
    return pd.DataFrame(rows, columns=["arm", "mean", "low", "high"])


def with_mean(curves: pd.DataFrame) -> pd.DataFrame:
    """arm, run, tokens, loss and more -> the rows of finite loss with mean, low (least) and high (greatest) over an
    arm's seeds, at tokens where most of the seeds that came so far have a finite loss; nan elsewhere: where one run
    alone was evaluated, as at its end, the mean would jump to it."""
    finite = curves[np.isfinite(curves["loss"])]
    over = finite.groupby(["arm", "tokens"])["loss"].agg(["count", "mean", "min", "max"]).reset_index()
    ends = finite.groupby(["arm", "run"])["tokens"].max().groupby(level="arm")
    reached = {arm: np.sort(x.to_numpy()) for arm, x in ends}
    came = [len(reached[a]) - np.searchsorted(reached[a], t) for a, t in zip(over["arm"], over["tokens"], strict=True)]
    over.loc[2 * over["count"] <= np.array(came, int), ["mean", "min", "max"]] = np.nan
    over = over.rename(columns={"min": "low", "max": "high"}).drop(columns="count")
    return finite.merge(over, on=["arm", "tokens"])


# --- pairs -----------------------------------------------------------------------------------------------------------


def paired(
    runs: pd.DataFrame, control: str, better: Literal["lower", "higher"] = "lower", log: bool = True
) -> pd.DataFrame:
    """arm, seed, d of every arm but the control: `effects.signed_difference` of the runs of one seed, positive in favor
    of the arm; +-inf where one of the two diverged, nan where both did.

    runs: arm, seed, value, diverged. Finished runs without a finite value are left out.
    """
    runs = runs[runs["diverged"] | np.isfinite(runs["value"])]
    runs = runs.drop_duplicates(["arm", "seed"])
    is_control = runs["arm"] == control
    order = {arm: i for i, arm in enumerate(runs["arm"].unique())}
    both = runs[~is_control].merge(runs[is_control], on="seed", suffixes=("", "_control"))
    both = both.sort_values(["arm", "seed"], key=lambda c: c.map(order) if c.name == "arm" else c, ignore_index=True)
    diverged = both["diverged"], both["diverged_control"]
    return both[["arm", "seed"]].assign(
        d=signed_difference(both["value"], both["value_control"], better, log, *diverged)
    )


def percent(d: Any) -> Any:
    """What a log ratio d in favor of the treatment says of a measure that is better when lower: its change in percent,
    100 (exp(-d) - 1). Of an interval the ends change places."""
    return 100 * np.expm1(-np.asarray(d, float))[()]


def all_paired(runs: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """arm, control, pairs, mean, low, high of every ordered pair of arms: the change of the arm's value against the
    control's at equal seed in percent, with its 95 % t interval. runs: as for `paired`, lower values being better."""
    rows = []
    for control in arms:
        for arm, differences in paired(runs, control).groupby("arm")["d"]:
            d = differences.to_numpy(float)
            mean, low, high = mean_interval(d)
            row = {"arm": arm, "control": control, "pairs": int(np.isfinite(d).sum())}
            rows.append(row | {"mean": percent(mean), "low": percent(high), "high": percent(low)})
    table = pd.DataFrame(rows, columns=["arm", "control", "pairs", "mean", "low", "high"])
    return table[np.isfinite(table["mean"].astype(float))].reset_index(drop=True)


def seed_against_seed(values: pd.DataFrame, control: str) -> pd.DataFrame:
    """arm, seed, control, value: each arm's run beside the control's of the same seed, less the means of these two over
    the seeds that both have. values: arm, seed, value, all finite."""
    control_values = values.loc[values["arm"] == control, ["seed", "value"]].rename(columns={"value": "control"})
    both = values[values["arm"] != control].merge(control_values, on="seed")[["arm", "seed", "control", "value"]]
    both[["control", "value"]] -= both.groupby("arm")[["control", "value"]].transform("mean")
    return both


def differences_by(curves: pd.DataFrame, control: str, x: str) -> pd.DataFrame:
    """arm, `x`, pairs, mean, low, high: the change of the loss against the control at equal `x` and seed in percent, of
    the log ratio, with its 95 % t interval (that of `mean_interval`). curves: arm, seed, `x`, loss."""
    from scipy.special import stdtrit

    keys = ["seed", x]
    control_losses = curves.loc[curves["arm"] == control, [*keys, "loss"]].drop_duplicates(keys)
    both = curves.loc[curves["arm"] != control, ["arm", *keys, "loss"]].merge(
        control_losses, on=keys, suffixes=("", "_control")
    )
    both = both[(both["loss"] > 0) & (both["loss_control"] > 0)]
    both["d"] = np.log(both["loss_control"]) - np.log(both["loss"])
    over = both.groupby(["arm", x])["d"].agg(["count", "mean", "std"]).reset_index()
    n = over["count"].to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        half = np.where(
            (n > 1) & (over["std"] > 0), stdtrit(np.maximum(n - 1, 1), 0.975) * over["std"] / np.sqrt(n), np.nan
        )
    ends = {"mean": percent(over["mean"]), "low": percent(over["mean"] + half), "high": percent(over["mean"] - half)}
    return pd.DataFrame({"arm": over["arm"], x: over[x], "pairs": n, **ends})
