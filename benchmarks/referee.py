"""What rules for keeping a change let through: simulated sessions of proposals, most of which do nothing.

    python benchmarks/referee.py [--sessions 1000] [--lengths 20 100]

A session is a stream of proposals, each compared with what was kept so far. A run's loss is its arm's mean plus noise
of spread 1, half of whose variance belongs to the seed and is shared by the arms of a pair (correlation .5, so that
the paired difference has spread 1 too). Rules:

- keep if lower: one run, always of the same seed; kept if its loss is below the best kept so far;
- 1 or 2 spreads: the same, if it is lower by so many spreads of the run, estimated from five runs of the baseline;
- Welch at .25: three seeds, one-sided Welch test against the three runs of what was kept, p < .25;
- ours: `albert_ablate.stats.online`, fresh seeds, stopped at the first look that decides, FWER and FDR at 5 %, a margin
  of a quarter of a spread, levels up to 2 % below theirs; runs include the eight of the A/A pass.

Proposals: nothing (no effect); small (one in five lowers the loss by half a spread); mixed (one in five by .5, 1 or 2
spreads). Noise: normal; skewed (exponential); heavy-tailed (t with 3 degrees of freedom); diverging (normal, and one
run in ten diverges in every arm). Any: share of sessions with a false accept. FDP: mean share of false accepts among
accepts. Power: share of real effects accepted, by size. Numbers, not a test.
"""

import argparse
import zlib
from collections.abc import Callable
from math import sqrt

import numpy as np

from albert_ablate.stats.online import decide_many, level_of, pairs_for

EFFECTS = {"nothing": (), "small": (0.5,), "mixed": (0.5, 1.0, 2.0)}
REAL = 0.2  # share of proposals with an effect
MARGIN = 0.25
NOISE_PASS = 8  # runs
DIVERGED = 0.1


def standard(rng: np.random.Generator, noise: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws of mean 0 and spread 1."""
    if noise == "skewed":
        return rng.exponential(size=shape) - 1
    if noise == "heavy-tailed":
        return rng.standard_t(3, shape) / sqrt(3)
    return rng.standard_normal(shape)


def own_noise(rng: np.random.Generator, noise: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a run has beside its seed's share: spread sqrt(1/2); inf where it diverged."""
    x = standard(rng, noise, shape) / sqrt(2)
    return np.where(rng.random(shape) < DIVERGED, np.inf, x) if noise == "diverging" else x


def differences(rng: np.random.Generator, noise: str, effect: np.ndarray, N: int) -> np.ndarray:
    """Baseline minus candidate on N seeds of their own; the seed's share cancels. Positive: the candidate is better."""
    shape = (len(effect), N)
    with np.errstate(invalid="ignore"):  # both diverged: nan, which says nothing
        return effect[:, None] + own_noise(rng, noise, shape) - own_noise(rng, noise, shape)


Session = tuple[np.ndarray, np.ndarray]  # accepted (sessions, proposals), runs (sessions,)


def one_run(spreads: float) -> Callable[..., Session]:
    """Keep if lower than the best so far by so many spreads."""

    def rule(rng: np.random.Generator, noise: str, effects: np.ndarray) -> Session:
        sessions, length = effects.shape
        accepted = np.zeros(effects.shape, bool)
        mean, needed, runs = np.zeros(sessions), np.zeros(sessions), np.full(sessions, length + 1)
        best = own_noise(rng, noise, (sessions,))
        if spreads:
            first = standard(rng, noise, (sessions, 5)) / sqrt(2) + own_noise(rng, noise, (sessions, 5))
            finite = np.where(np.isfinite(first), first, np.nan)
            needed, runs = spreads * np.nanstd(finite, axis=1, ddof=1), runs + 4
        for t in range(length):
            value = mean - effects[:, t] + own_noise(rng, noise, (sessions,))
            keep = value < best - needed
            accepted[:, t], best = keep, np.where(keep, value, best)
            mean = np.where(keep, mean - effects[:, t], mean)
        return accepted, runs

    return rule


def welch(rng: np.random.Generator, noise: str, effects: np.ndarray) -> Session:
    """Three seeds an arm, kept at p < .25."""
    from scipy.stats import ttest_ind

    sessions, length = effects.shape
    seeds = standard(rng, noise, (sessions, 3)) / sqrt(2)
    accepted, mean = np.zeros(effects.shape, bool), np.zeros(sessions)
    base = seeds + own_noise(rng, noise, (sessions, 3))
    for t in range(length):
        values = (mean - effects[:, t])[:, None] + seeds + own_noise(rng, noise, (sessions, 3))
        usable = np.isfinite(values).all(1) & np.isfinite(base).all(1)
        p = np.ones(sessions)
        p[usable] = ttest_ind(values[usable], base[usable], axis=1, equal_var=False, alternative="less").pvalue
        keep = p < 0.25
        keep |= np.isfinite(values).all(1) & ~np.isfinite(base).all(1)  # the baseline diverged, the candidate did not
        accepted[:, t], base = keep, np.where(keep[:, None], values, base)
        mean = np.where(keep, mean - effects[:, t], mean)
    return accepted, np.full(sessions, 3 * (length + 1))


def ours(control: str) -> Callable[..., Session]:
    def rule(rng: np.random.Generator, noise: str, effects: np.ndarray) -> Session:
        sessions, length = effects.shape
        accepted, runs = np.zeros(effects.shape, bool), np.full(sessions, NOISE_PASS)
        for t in range(length):
            past, which = np.unique(accepted[:, :t], axis=0, return_inverse=True)
            levels = np.array([level_of(control, list(row)) for row in past])[which.reshape(-1)]
            levels = 10 ** (np.floor(100 * np.log10(levels)) / 100)  # up to 2 % lower, so that few differ
            most = np.array([pairs_for(x) for x in levels])
            for N in np.unique(most):
                rows = np.flatnonzero(most == N)
                d = differences(rng, noise, effects[rows, t], int(N))
                accepted[rows, t], pairs = decide_many(d, MARGIN, int(N), levels[rows])
                runs[rows] += 2 * pairs
        return accepted, runs

    return rule


RULES: dict[str, Callable[..., Session]] = {
    "keep if lower": one_run(0),
    "1 spread": one_run(1),
    "2 spreads": one_run(2),
    "Welch at .25": welch,
    "ours, FWER": ours("fwer"),
    "ours, FDR": ours("fdr"),
}


def session(rule: str, noise: str, kind: str, length: int, sessions: int) -> dict[str, float]:
    """Figures of one cell of the table; the same proposals for every rule."""
    rng = np.random.default_rng(zlib.crc32(f"{noise} {kind} {length}".encode()))
    effects = np.zeros((sessions, length))
    if EFFECTS[kind]:
        real = rng.random(effects.shape) < REAL
        effects[real] = rng.choice(EFFECTS[kind], real.sum())
    accepted, runs = RULES[rule](rng, noise, effects)
    false = (accepted & (effects == 0)).sum(1)
    out = {
        "any": float((false > 0).mean()), "fdp": float((false / np.maximum(accepted.sum(1), 1)).mean()),
        "false": float(false.mean()), "runs": float(runs.mean()),
    }  # fmt: skip
    for size in EFFECTS[kind]:
        out[f"power {size:g}"] = float(accepted[effects == size].mean())
    return out


def first_proposal(noise: str, sessions: int) -> tuple[float, int]:
    """Chance that the first proposal of a session, better by one spread, is accepted; most pairs it may take."""
    level = level_of("fwer", [])
    N = pairs_for(level)
    d = differences(np.random.default_rng(1), noise, np.ones(sessions), N)
    return float(decide_many(d, MARGIN, N, np.full(sessions, level))[0].mean()), N


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--noises", nargs="+", default=["normal", "skewed", "heavy-tailed", "diverging"])
    parser.add_argument("--kinds", nargs="+", default=[*EFFECTS], choices=[*EFFECTS])
    parser.add_argument("--rules", nargs="+", default=[*RULES], choices=[*RULES])
    options = parser.parse_args()
    for noise in options.noises:
        power, N = first_proposal(noise, 20 * options.sessions)
        print(f"\n{noise}: a first proposal better by one spread is accepted within {N} pairs in {power:.3f}\n")
        print("| proposals | rule | any false accept | FDP | power .5 / 1 / 2 | runs |\n|---|---|---|---|---|---|")
        for length in options.lengths:
            for kind in options.kinds:
                for rule in options.rules:
                    x = session(rule, noise, kind, length, options.sessions)
                    power_text = " / ".join(f"{x[f'power {s:g}']:.2f}" for s in EFFECTS[kind]) or "-"
                    print(f"| {length}, {kind} | {rule} | {x['any']:.3f} | {x['fdp']:.3f} | {power_text} | "
                          f"{x['runs']:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
