"""Cost per verdict: pairs and runs until the judge decides, beside fixed designs and Welch's test on unpaired seeds.

    python benchmarks/verdict.py [--studies 20000] [--pairs 50] [--runs FOLDER --measure test_loss]

Simulated normal differences with effects in units of the paired spread, at correlations between the runs of a pair:

- power and mean pairs of one claim of at most N pairs, stopped at its first deciding look;
- pairs of the fixed design that knew the effect (80 % power), and Wald's bound at 80 % with unknown spread;
- runs, as a share of those of Welch's test at the same power (80 % where ours has less than 95 %, else 95 %), which
  sees the same effect as d sqrt(2 (1 - rho)) standard deviations of a run; and the same with tuning on both sides;
- the same inside a ledger of 15 claims under Holm (5 null, 3 at 0.5, 4 at 1, 2 at 2, 1 at 3), each stopping alone.

With --runs the spread, the correlation over seeds and the saving are those of real records: each pair of settings with
at least eight seeds in common. Numbers, not a test.
"""

import argparse
import itertools
import sys
from math import ceil, log, sqrt

import numpy as np

EFFECTS, CORRELATIONS = (0.5, 1.0, 2.0, 3.0), (0.0, 0.5, 0.8, 0.9)
TUNING = 2 * 13.75  # runs of `albert-ablate tune` for two arms, in full budgets
FAMILY = (0.0,) * 5 + (0.5,) * 3 + (1.0,) * 4 + (2.0,) * 2 + (3.0,)


def looks(rng: np.random.Generator, studies: int, effect: float, N: int) -> np.ndarray:
    """Nominal p at each look, (studies, looks)."""
    from albert_ablate.analysis.statistics import FIRST, p_effect

    d = rng.standard_normal((studies, N)) + effect
    return np.stack([p_effect(d[:, :n]) for n in range(FIRST, N + 1)], -1)


def alone(rng: np.random.Generator, studies: int, effect: float, N: int) -> tuple[float, float]:
    """Power and mean pairs of one claim at 5 %."""
    from albert_ablate.analysis.statistics import ALPHA, FIRST, nominal

    found = looks(rng, studies, effect, N) <= nominal(ALPHA, N)
    return found.any(1).mean(), np.where(found.any(1), found.argmax(1) + FIRST, N).mean()


def ledger(rng: np.random.Generator, ledgers: int, N: int) -> dict[float, tuple[float, float]]:
    """Power and mean pairs by effect inside a family under Holm, each claim stopping when it is rejected."""
    from albert_ablate.analysis.statistics import FIRST, holm, overall

    p = np.stack([looks(rng, ledgers, effect, N) for effect in FAMILY], 1)  # (ledgers, claims, looks)
    p = overall(np.minimum.accumulate(p, axis=-1), N)
    pairs, found = np.full(p.shape[:2], N), np.zeros(p.shape[:2], bool)
    for i, k in itertools.product(range(ledgers), range(p.shape[2])):
        new = np.array(holm(p[i, :, k], len(FAMILY))[0]) & ~found[i]
        pairs[i, new], found[i] = k + FIRST, found[i] | new
    effects = np.array(FAMILY)
    return {e: (found[:, effects == e].mean(), pairs[:, effects == e].mean()) for e in sorted(set(FAMILY))}


def fixed_pairs(effect: float, power: float) -> int:
    """Pairs of a paired t test that knew the effect."""
    return next(n for n in itertools.count(2) if _power(effect * sqrt(n), n - 1) >= power)


def welch_runs(effect: float, correlation: float, power: float) -> int:
    """Runs per arm of Welch's test with equal variances for an effect in units of the paired spread."""
    size = effect * sqrt(2 * (1 - correlation))
    return next(n for n in itertools.count(2) if _power(size * sqrt(n / 2), 2 * n - 2) >= power)


def _power(shift: float, freedom: int) -> float:
    from scipy.stats import nct, t

    critical = t.ppf(0.975, freedom)
    return float(nct.sf(critical, freedom, shift) + nct.cdf(-critical, freedom, shift))


def wald(effect: float) -> float:
    """Expected pairs of the best sequential test, spread unknown, 80 % power: J / (ln(1 + d^2) / 2)."""
    a, b = 0.025, 0.2
    information = (1 - b) * log((1 - b) / a) + b * log(b / (1 - a))
    return information / (0.5 * log(1 + effect**2))


def simulated(studies: int, N: int) -> None:
    rng = np.random.default_rng(0)
    print(f"One claim, N = {N}, {studies:,} simulated studies\n")
    head = "".join(f"  rho {c:g}" + " " * 10 for c in CORRELATIONS)
    print(f"{'effect':>6} {'power':>6} {'pairs':>6} {'fixed':>6} {'Wald':>6}   runs / Welch's (with tuning):{head}")
    for effect in EFFECTS:
        power, pairs = alone(rng, studies, effect, N)
        level = 0.95 if power >= 0.95 else 0.80
        cells = []
        for c in CORRELATIONS:
            welch = welch_runs(effect, c, level)
            cells.append(f"{pairs / welch:5.2f} ({(2 * pairs + TUNING) / (2 * welch + TUNING):4.2f}) of {welch:<4d}")
        print(
            f"{effect:6.1f} {power:6.2f} {pairs:6.1f} {fixed_pairs(effect, 0.8):6d} {wald(effect):6.1f}   "
            + "  ".join(cells)
        )
    few = max(200, studies // 20)
    print(f"\nA ledger of {len(FAMILY)} under Holm, N = {N}, {few:,} ledgers\n")
    print(f"{'effect':>6} {'power':>6} {'pairs':>6} {'times one claim alone':>22}")
    for effect, (power, pairs) in ledger(rng, few, N).items():
        ratio = f"{pairs / alone(rng, studies, effect, N)[1]:.2f}" if effect else ""
        print(f"{effect:6.1f} {power:6.2f} {pairs:6.1f} {ratio:>22}")


def recorded(folder: str, measure: str) -> int:
    from albert_ablate.analysis import load_runs
    from albert_ablate.analysis.effects import correlation

    summary = load_runs(folder).summary
    done = summary[summary["status"].eq("finished") & summary["role"].eq("confirmation")]
    if measure not in done:
        print(f"No run below {folder} has {measure}.", file=sys.stderr)
        return 2
    arms = {k: g.set_index("seed")[measure].astype(float) for k, g in done.groupby("setting")}
    names = {k: f"{g['label'].iloc[0]} ({k[:6]})" for k, g in done.groupby("setting")}
    shown = 0
    for a, b in itertools.combinations(arms, 2):
        x, y = np.log(arms[a]), np.log(arms[b])
        seeds = x.index.intersection(y.index)
        if len(seeds) < 8:
            continue
        shown += 1
        x, y = x[seeds].to_numpy(), y[seeds].to_numpy()
        r, low, high = correlation(x, y)
        paired, apart = np.var(x - y, ddof=1), np.var(x, ddof=1) + np.var(y, ddof=1)
        print(
            f"{names[a]} and {names[b]}: {len(seeds)} pairs, spread {100 * sqrt(paired):.2f} % paired, correlation "
            f"{r:.2f} [{low:.2f}, {high:.2f}], variance unpaired / paired {apart / paired:.1f}, pairs for a half-width "
            f"of half a percent about {ceil((2 * sqrt(paired) / log(1.005)) ** 2)}"
        )
    if not shown:
        print(f"No two settings below {folder} have eight finished seeds in common.", file=sys.stderr)
    return 0 if shown else 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--runs")
    parser.add_argument("--measure", default="test_loss")
    options = parser.parse_args()
    if options.runs:
        return recorded(options.runs, options.measure)
    simulated(options.studies, options.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
