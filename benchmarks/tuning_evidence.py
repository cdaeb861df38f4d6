"""Tuning runs that are evidence at the same time, against tuning on seeds of their own: errors and runs, simulated.

    python benchmarks/tuning_evidence.py [--studies 4000] [--pairs 20]

Losses are c (x - optimum)^2 over learning rates x in steps of the grid, plus noise of standard deviation 1 after what
the runs of a seed share in both arms; of its variance the share `common` is the same at all rates of a seed and arm.
Optima lie uniformly within 1.5 steps of the middle of seven rates; at a quarter of the budget, where each arm is run
once at each rate, they lie .3 steps higher. Effects are in spreads of a pair's difference at the tuned rates. Rules:

present     three tuning seeds at three rates, more while the best mean is an end (stats/learning_rate.py); the vertex
            of the parabola through the best three means; then pairs on fresh seeds at the two rates
first three the same, and the tuning seeds are the first three pairs too: their loss at the vertex, read off the
            parabola through the seed's own three losses
each seed   every seed runs the three rates in both arms; its number is the difference of the two parabolas at the
            vertices of the mean curves so far
own minima  the same with the minimum of the seed's own parabola, at most half a step from the best of the three

Runs are those of both arms, a quarter-budget run counting for a quarter. Each rule looks from its fourth number on,
with the same level at each look. Numbers, not a test.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from albert_ablate.stats.sequential import ALPHA, FIRST, nominal, p_effect

REACH, SEEDS, MOVES = 7, 3, 4  # places left and right of the middle, tuning seeds, moves of the window
MIDDLE = REACH
CURVES = ((0.25, 0.25), (1.0, 1.0), (4.0, 4.0), (0.25, 4.0), (1.0, 4.0))
COMMON = (0.0, 0.5, 0.9)
EFFECTS = (0.0, 1.0, 2.0, 3.0)
RULES = ("present", "first three", "each seed", "own minima")


class Arm:
    """Studies of one arm: losses by study, seed and place; what a rule may look at and what it costs."""

    def __init__(self, rng: np.random.Generator, studies: int, pairs: int, curve: float, common: float, level: float):
        self.rng, self.curve, self.level = rng, curve, level
        self.optimum = rng.uniform(-1.5, 1.5, studies)
        places = np.arange(-REACH, REACH + 1)
        quarter = curve * (places[REACH - 3 : REACH + 4] - self.optimum[:, None] - 0.3) ** 2
        quarter = quarter + rng.standard_normal(quarter.shape)
        self.best = quarter.argmin(1) + REACH - 3
        shared = np.sqrt(common) * rng.standard_normal((studies, pairs + SEEDS, 1))
        own = np.sqrt(1 - common) * rng.standard_normal((studies, pairs + SEEDS, len(places)))
        self.losses = level + curve * (places - self.optimum[:, None, None]) ** 2 + shared + own
        self.shared, self.own = shared[..., 0], np.sqrt(1 - common)

    def tune(self) -> np.ndarray:
        """Places of the tuning window's ends, by study: moved while the best mean is an end."""
        means, rows = self.losses[:, :SEEDS].mean(1), np.arange(len(self.best))
        low, high = self.best - 1, self.best + 1
        for _ in range(MOVES):
            inside = (np.arange(means.shape[1]) >= low[:, None]) & (np.arange(means.shape[1]) <= high[:, None])
            best = np.where(inside, means, np.inf).argmin(1)
            low = np.where((best == low) & (low > 0), low - 1, low)
            high = np.where((best == high) & (high < 2 * REACH), high + 1, high)
        inside = (np.arange(means.shape[1]) >= low[:, None]) & (np.arange(means.shape[1]) <= high[:, None])
        self.middle = np.clip(np.where(inside, means, np.inf).argmin(1), low + 1, high - 1)
        self.window = self.losses[rows[:, None, None], np.arange(self.losses.shape[1])[:, None],
                                  (self.middle[:, None] + np.arange(-1, 2))[:, None, :]]  # fmt: skip
        return high - low + 1

    def at(self, vertex: np.ndarray, seeds: slice) -> np.ndarray:
        """Losses of runs at the vertex itself, on seeds that were not used for tuning."""
        place = self.middle - MIDDLE + vertex
        excess = self.level + self.curve * (place - self.optimum) ** 2
        shared = self.shared[:, seeds]
        return excess[:, None] + shared + self.own * self.rng.standard_normal(shared.shape)


def vertex_of(y: np.ndarray) -> np.ndarray:
    """Of the parabola through y at -1, 0, 1, at most half a step from the least of the three."""
    left, middle, right = y[..., 0], y[..., 1], y[..., 2]
    bend = left - 2 * middle + right
    least = y.argmin(-1) - 1.0
    free = np.where(bend > 0, (left - right) / np.where(bend > 0, 2 * bend, 1.0), least)
    return np.clip(free, least - 0.5, least + 0.5).clip(-1, 1)


def value_at(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of that parabola at x."""
    weights = np.stack([x * (x - 1) / 2, 1 - x**2, x * (x + 1) / 2], -1)
    return (y * weights).sum(-1)


def study(rng: np.random.Generator, studies: int, pairs: int, curves: Sequence[float], common: float,
          effect: float) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """By rule: share of studies that find something, in the wrong direction or without an effect; mean runs."""
    treatment = Arm(rng, studies, pairs, curves[0], common, -effect * np.sqrt(2))
    control = Arm(rng, studies, pairs, curves[1], common, 0.0)
    # as many rates for both arms
    rates = np.maximum(treatment.tune(), control.tune())
    quarter, first = 2 * 7 / 4, 2 * SEEDS * rates
    arms = (control, treatment)
    vertices = [vertex_of(a.window[:, :SEEDS].mean(1)) for a in arms]
    fresh = [a.at(v, slice(SEEDS, None)) for a, v in zip(arms, vertices, strict=True)]
    d = fresh[0] - fresh[1]
    there = [value_at(a.window[:, :SEEDS], v[:, None]) for a, v in zip(arms, vertices, strict=True)]
    own = [value_at(a.window, vertex_of(a.window)) for a in arms]
    numbers = {
        "present": lambda n: d[:, :n],
        "first three": lambda n: np.hstack([there[0] - there[1], d])[:, :n],
        "each seed": lambda n: np.subtract(
            *(value_at(a.window[:, :n], vertex_of(a.window[:, :n].mean(1))[:, None]) for a in arms)
        ),
        "own minima": lambda n: (own[0] - own[1])[:, :n],
    }
    out = {}
    for rule, of in numbers.items():
        x = {n: of(n) for n in range(FIRST, pairs + 1)}
        hit = np.stack([p_effect(x[n]) for n in x], -1) <= nominal(ALPHA, pairs)
        up = np.stack([x[n].mean(1) > 0 for n in x], -1)
        found, look = hit.any(1), hit.argmax(1)
        wrong = found & ~up[np.arange(studies), look] if effect else found
        n = np.where(found, look + FIRST, pairs)
        runs = {
            "present": quarter + first + 2 * n,
            "first three": quarter + first + 2 * (n - SEEDS),
        }.get(rule, quarter + first + 6 * (n - SEEDS))
        out[rule] = float(found.mean()), float(wrong.mean()), float(runs.mean())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=20)
    a = parser.parse_args()
    print(f"{a.studies} studies a cell, N = {a.pairs}; false verdicts without an effect, then power and mean runs")
    print(f"{'c of the arms, common':<24}{'rule':<13}{'null':>7}" + "".join(f"{f'd = {e:g}':>15}" for e in EFFECTS[1:]))
    for curves in CURVES:
        for common in COMMON:
            rng = np.random.default_rng(0)
            cells = {e: study(rng, a.studies, a.pairs, curves, common, e) for e in EFFECTS}
            for rule in RULES:
                head = f"{curves[0]:g}, {curves[1]:g}; {common:g}" if rule == RULES[0] else ""
                line = "".join(f"{cells[e][rule][0]:>8.2f}{cells[e][rule][2]:>7.1f}" for e in EFFECTS[1:])
                print(f"{head:<24}{rule:<13}{100 * cells[0.0][rule][1]:>6.1f}%{line}", flush=True)


if __name__ == "__main__":
    main()
