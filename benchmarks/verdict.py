"""Cost per verdict: pairs and runs until the judge decides, beside fixed designs and Welch's test on unpaired seeds.

    python benchmarks/verdict.py [--studies 20000] [--pairs 50]
    python benchmarks/verdict.py --runs FOLDER [--measure test_loss] [--orders 2000]

Simulated normal differences with effects in units of the paired spread, at correlations between the runs of a pair:

- power and mean pairs of one claim of at most N pairs, stopped at its first deciding look;
- pairs of the fixed design that knew the effect (80 % power), and Wald's bound at 80 % with unknown spread;
- runs, as a share of those of Welch's test at the same level and power (95 or 80 % where ours has as much, else ours),
  which sees the same effect as d sqrt(2 (1 - rho)) standard deviations of a run; in brackets with the tuning of both
  arms on both sides;
- the same inside a ledger of 15 claims under Holm (5 null, 3 at 0.5, 4 at 1, 2 at 2, 1 at 3), each stopping alone,
  against Welch's test at Holm's first step, .05 / 15, which is what a fixed design would plan for; and the bill of the
  whole ledger, whose treatments share one control and whose arms are tuned once.

With --runs the same on real records, whose arms are the settings of one text, budget and depth that have eight finished
seeds in common: their paired spread and correlation; pairs until the judge's first look that decides, over random
orders of the seeds, and how often it does; and the runs an arm that Welch's test needs for as much power if what was
observed is the truth. Numbers, not a test.
"""

import argparse
import itertools
import sys
from math import log, sqrt

import numpy as np

from albert_ablate.stats.learning_rate import tuning_price

EFFECTS, CORRELATIONS = (0.5, 1.0, 2.0, 3.0), (0.0, 0.5, 0.8, 0.9)
TUNING = 2 * tuning_price(7).expected  # runs of `albert-ablate tune` for two arms, in full budgets
HEAD = "".join(f"  rho {c:g}" + " " * 12 for c in CORRELATIONS)
FEWEST = 8  # seeds in common
FAMILY = (0.0,) * 5 + (0.5,) * 3 + (1.0,) * 4 + (2.0,) * 2 + (3.0,)


def looks(d: np.ndarray) -> np.ndarray:
    """Nominal p at each look, (studies, looks)."""
    from albert_ablate.stats.sequential import FIRST, p_effect

    return np.stack([p_effect(d[:, :n]) for n in range(FIRST, d.shape[1] + 1)], -1)


def alone(rng: np.random.Generator, studies: int, effect: float, N: int) -> tuple[float, float]:
    """Power and mean pairs of one claim at 5 %."""
    from albert_ablate.stats.sequential import ALPHA, FIRST, nominal

    found = looks(rng.standard_normal((studies, N)) + effect) <= nominal(ALPHA, N)
    return found.any(1).mean(), np.where(found.any(1), found.argmax(1) + FIRST, N).mean()


def ledger(rng: np.random.Generator, ledgers: int, N: int,
           margin: float = 0.0) -> tuple[dict[float, tuple[float, float]], float]:  # fmt: skip
    """Power and mean pairs by effect inside a family under Holm, each claim stopping when it is rejected; mean runs.

    A ledger's runs are those of the treatments and of one control, which runs as long as the longest of them.

    A positive margin: or when Holm finds "no effect", its 90 % interval inside the margin.
    """
    from albert_ablate.stats.sequential import FIRST, holm, overall, p_inside

    d = [rng.standard_normal((ledgers, N)) + effect for effect in FAMILY]
    p = overall(np.minimum.accumulate(np.stack([looks(x) for x in d], 1), axis=-1), N)  # (ledgers, claims, looks)
    inside = np.ones_like(p)
    if margin:
        each = [[p_inside(x[:, :n], margin) for n in range(FIRST, N + 1)] for x in d]
        inside = overall(np.minimum.accumulate(np.moveaxis(np.array(each), 2, 0), axis=-1), N) / 2
    pairs, found, ended = np.full(p.shape[:2], N), np.zeros(p.shape[:2], bool), np.zeros(p.shape[:2], bool)
    for i, k in itertools.product(range(ledgers), range(p.shape[2])):
        effect, nothing = (np.array(holm(x[i, :, k], len(FAMILY))[0]) for x in (p, inside))
        new = (effect | nothing) & ~ended[i]
        pairs[i, new], found[i], ended[i] = k + FIRST, found[i] | (new & effect & ~nothing), ended[i] | new
    effects = np.array(FAMILY)
    by = {e: (found[:, effects == e].mean(), pairs[:, effects == e].mean()) for e in sorted(set(FAMILY))}
    return by, float((pairs.sum(1) + pairs.max(1)).mean())


def fixed_pairs(effect: float, power: float) -> int:
    """Pairs of a paired t test that knew the effect."""
    return next(n for n in itertools.count(2) if _power(effect * sqrt(n), n - 1) >= power)


def welch_runs(effect: float, correlation: float, power: float, level: float = 0.05) -> int:
    """Runs per arm of Welch's test with equal variances for an effect in units of the paired spread."""
    size = effect * sqrt(2 * (1 - correlation))
    low, high = 2, 4
    while _power(size * sqrt(high / 2), 2 * high - 2, level) < power:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        enough = _power(size * sqrt(middle / 2), 2 * middle - 2, level) >= power
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def _power(shift: float, freedom: int, level: float = 0.05) -> float:
    from scipy.stats import nct, t

    critical = t.isf(level / 2, freedom)
    return float(nct.sf(critical, freedom, shift) + nct.cdf(-critical, freedom, shift))


def wald(effect: float) -> float:
    """Expected pairs of the best sequential test, spread unknown, 80 % power: J / (ln(1 + d^2) / 2)."""
    a, b = 0.025, 0.2
    information = (1 - b) * log((1 - b) / a) + b * log(b / (1 - a))
    return information / (0.5 * log(1 + effect**2))


def simulated(studies: int, N: int) -> None:
    rng = np.random.default_rng(0)
    print(f"One claim, N = {N}, {studies:,} simulated studies\n")
    print(f"{'effect':>6} {'power':>6} {'pairs':>6} {'fixed':>6} {'Wald':>6}   runs / Welch's (with tuning) of:{HEAD}")
    single = {effect: alone(rng, studies, effect, N) for effect in EFFECTS}
    for effect, (power, pairs) in single.items():
        print(
            f"{effect:6.1f} {power:6.2f} {pairs:6.1f} {fixed_pairs(effect, 0.8):6d} {wald(effect):6.1f}   "
            + against_welch(effect, power, pairs, 0.05)
        )
    few, level = max(200, studies // 20), 0.05 / len(FAMILY)
    found, runs = ledger(rng, few, N)
    print(f"\nA ledger of {len(FAMILY)} under Holm, N = {N}, {few:,} ledgers\n")
    print(f"{'effect':>6} {'power':>6} {'pairs':>6} {'/ alone':>13}   runs / Welch's (with tuning) of:{HEAD}")
    for effect, (power, pairs) in found.items():
        if effect:
            times = f"{pairs / single[effect][1]:.2f}"
            print(f"{effect:6.1f} {power:6.2f} {pairs:6.1f} {times:>13}   {against_welch(effect, power, pairs, level)}")
        else:
            print(f"{effect:6.1f} {power:6.3f} {pairs:6.1f}")
    bill(runs, level)
    found, runs = ledger(rng, few, N, margin=1.0)
    print("With a margin of one spread, inside which a claim ends as no effect, mean pairs by effect:", end=" ")
    print(", ".join(f"{effect:g}: {pairs:.1f}" for effect, (_, pairs) in found.items()))
    bill(runs, level)


def against_welch(effect: float, power: float, pairs: float, level: float) -> str:
    cells = []
    for c in CORRELATIONS:
        welch = welch_runs(effect, c, equal_power(power), level)
        cells.append(f"{pairs / welch:5.2f} ({(2 * pairs + TUNING) / (2 * welch + TUNING):4.2f}) of {welch:<4d}")
    return "  ".join(cells)


def equal_power(power: float) -> float:
    """The power of the design beside ours: a usual one that ours reaches, else ours."""
    return next((usual for usual in (0.95, 0.80) if power >= usual), power)


def bill(ours: float, level: float) -> None:
    """Runs of the whole ledger and of 16 tunings, beside those of Welch's test.

    That plans for an effect of 1 at 95 % in every claim, since it cannot know, and shares its control too.
    """
    tuning = TUNING / 2 * (len(FAMILY) + 1)
    print(f"\nRuns of the ledger, one control shared: {ours:.0f}, with tuning {ours + tuning:.0f}.", end=" ")
    for c in CORRELATIONS:
        welch = welch_runs(1.0, c, 0.95, level) * (len(FAMILY) + 1)
        print(f"Welch's at {c:g}: {welch} ({ours / welch:.2f}; {(ours + tuning) / (welch + tuning):.2f}).", end=" ")
    print()


# --- real records ----------------------------------------------------------------------------------------------------


def recorded(folder: str, measure: str, orders: int) -> int:
    from albert_ablate.analysis import load_runs
    from albert_ablate.config import ConfigError

    try:
        summary = load_runs(folder).summary
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    done = summary[summary["status"].eq("finished") & summary["role"].eq("confirmation")]
    if measure not in done or not (done[measure] > 0).any():
        print(f"No finished run below {folder} has a positive {measure}.", file=sys.stderr)
        return 2
    names = {k: g["label"].iloc[0] for k, g in done.groupby("setting")}
    same = [c for c in done if c.startswith("data.") or c in ("data", "budget.tokens", "model.layers", "task")]
    shown = 0
    for _, group in done.groupby(same, dropna=False):  # of one text, budget and depth
        arms = {k: g.set_index("seed")[measure].astype(float) for k, g in group.groupby("setting")}
        for a, b in itertools.combinations(arms, 2):
            seeds = sorted(set(arms[a].index) & set(arms[b].index))
            if len(seeds) >= FEWEST:
                shown += 1
                print(f"{apart(names[a], names[b])} ({a[:6]}, {b[:6]})")
                print("   " + saved(*(np.log(arms[k].loc[seeds].to_numpy()) for k in (a, b)), orders=orders))
    if not shown:
        print(f"No two settings below {folder} have {FEWEST} finished seeds in common.", file=sys.stderr)
    return 0 if shown else 2


def apart(one: str, other: str) -> str:
    """What two labels differ in."""
    x, y = ([w for w in label.split() if w not in set(rest.split())] for label, rest in ((one, other), (other, one)))
    return f"{' '.join(x) or one} against {' '.join(y) or other}"


def saved(x: np.ndarray, y: np.ndarray, orders: int) -> str:
    """What pairing and stopping save on one pair of arms; x, y logarithms of a measure by seed."""
    from albert_ablate.stats.effects import correlation
    from albert_ablate.stats.learning_rate import pairs_to_margin
    from albert_ablate.stats.sequential import ALPHA, FIRST, PAIRS, nominal, p_effect

    d, n = y - x, len(x)
    spread = float(d.std(ddof=1))
    r, low, high = correlation(x, y)
    ratio = (np.var(x, ddof=1) + np.var(y, ddof=1)) / spread**2
    N = min(n, PAIRS)
    drawn = np.random.default_rng(0).permuted(np.tile(d, (orders, 1)), axis=1)
    found = np.stack([p_effect(drawn[:, :k]) for k in range(FIRST, N + 1)], -1) <= nominal(ALPHA, N)
    power = float(found.any(1).mean())
    pairs = float(np.where(found.any(1), found.argmax(1) + FIRST, N).mean())
    said = f"{n} seeds, effect {100 * d.mean():+.2f} %, paired spread {100 * spread:.2f} %, correlation {r:.2f} "
    said += f"[{low:.2f}, {high:.2f}], variance unpaired / paired {ratio:.1f}, "
    said += f"the margin of half a percent at {pairs_to_margin(d, log(1.005))[0]:g} pairs; "
    said += f"decided in {100 * power:.0f} % of orders within {N}, {pairs:.1f} pairs on average"
    if power >= 0.5:
        welch = welch_runs(abs(float(d.mean())) / spread, 1 - 1 / ratio, min(power, 0.95))
        said += f"; Welch's test {welch} runs an arm: {pairs / welch:.2f}"
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--runs")
    parser.add_argument("--measure", default="test_loss")
    parser.add_argument("--orders", type=int, default=2000)
    options = parser.parse_args()
    if not 4 <= options.pairs <= 60 or min(options.studies, options.orders) < 1:
        parser.error("--pairs must lie between 4 and 60, and there must be at least one study and one order.")
    if options.runs:
        return recorded(options.runs, options.measure, options.orders)
    simulated(options.studies, options.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
