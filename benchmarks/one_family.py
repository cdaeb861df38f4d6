"""One family of 15 claims: shared control runs, and claims in the order of their price, against Holm in step.

    python benchmarks/one_family.py [--families 4000] [--pairs 20]

Five claims each at the prices 1, 4 and 16 a run, their effects drawn from (5 null, 3 at .5, 4 at 1, 2 at 2, 1 at 3
spreads of a pair's difference) in random order. The claims of one price have one control; with "shared" it is run once
for all five, so that their differences correlate by .5, and with "own" once for each. Every claim stops when it is
decided or has all its pairs. Rules, each at 5 % for the whole family:

Holm, in step      every undecided claim gets its next pair, then Holm (the judge)
Holm, by price     the cheapest undecided claim is run to its end, then the next; Holm
fallback, by price the same order; a claim has .05/15, and the level of the one before it where that was found (Wiens
                   & Dmitrienko 2005)
fixed order        the same order, each claim at .05 until the first that is not found (Maurer et al. 1995)

Numbers, not a test.
"""

import argparse

import numpy as np

from albert_ablate.stats.sequential import ALPHA, FIRST, holm, overall, p_effect

EFFECTS = np.array([0.0] * 5 + [0.5] * 3 + [1.0] * 4 + [2.0] * 2 + [3.0])
PRICES = np.repeat([1.0, 4.0, 16.0], 5)
RULES = ("Holm, in step", "Holm, by price", "fallback, by price", "fixed order, by price")


def sequential_p(rng: np.random.Generator, effects: np.ndarray, pairs: int, shared: bool) -> np.ndarray:
    """Running p of each family, claim and look; a difference has spread 1."""
    families, claims = effects.shape
    treatment = rng.standard_normal((families, claims, pairs)) / np.sqrt(2)
    if shared:
        control = np.repeat(rng.standard_normal((families, 3, pairs)), 5, axis=1) / np.sqrt(2)
    else:
        control = rng.standard_normal((families, claims, pairs)) / np.sqrt(2)
    d = (effects[..., None] + control - treatment).reshape(-1, pairs)
    p = np.stack([p_effect(d[:, :n]) for n in range(FIRST, pairs + 1)], -1)
    return overall(np.minimum.accumulate(p, -1), pairs).reshape(families, claims, -1)


def first_at(p: np.ndarray, level: float) -> int | None:
    """Pairs at the first look at which a running p is at most `level`."""
    return int(np.argmax(p <= level)) + FIRST if p[-1] <= level else None


def in_step(p: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Which claims of one family are found, and their pairs."""
    found, n = np.zeros(len(p), bool), np.full(len(p), pairs)
    for k in range(p.shape[1]):
        new = np.array(holm(p[:, k], len(p))[0]) & ~found
        found, n = found | new, np.where(new, k + FIRST, n)
    return found, n


def holm_by_price(p: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    m, last = len(p), np.ones(len(p))
    found, n = np.zeros(m, bool), np.full(m, pairs)
    for i in range(m):  # in the order of price, which is that of the claims
        for k in range(p.shape[1]):
            last[i] = p[i, k]
            now = np.array(holm(last, m)[0])
            found |= now  # a rejection may decide a cheaper claim that had all its pairs
            if found[i]:
                n[i] = k + FIRST
                break
    return found, n


def fallback(p: np.ndarray, pairs: int, fixed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    m, carried = len(p), ALPHA if fixed else 0.0
    found, n = np.zeros(m, bool), np.full(m, pairs)
    for i in range(m):
        level = carried + (0.0 if fixed else ALPHA / m)
        at = first_at(p[i], level) if level else None
        found[i], n[i] = at is not None, at or (pairs if level else 0)
        carried = level if found[i] else 0.0
    return found, n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=20)
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    mixed = np.stack([rng.permutation(EFFECTS) for _ in range(a.families)])
    print(f"{a.families} families, N = {a.pairs}; cost: runs times their price, of treatments and controls")
    print(f"{'control, rule':<31}{'any false':>20}{'found at .5 / 1 / 2 / 3':>25}{'runs':>7}{'cost':>8}")
    print(f"{'':<31}{'all null':>10}{'mixed':>10}")
    for shared in (False, True):
        p, null = (sequential_p(rng, e, a.pairs, shared) for e in (mixed, np.zeros_like(mixed)))
        for rule in RULES:
            decide = {
                RULES[0]: in_step, RULES[1]: holm_by_price, RULES[2]: fallback,
                RULES[3]: lambda p, pairs: fallback(p, pairs, fixed=True),
            }[rule]  # fmt: skip
            found, n = map(np.array, zip(*(decide(x, a.pairs) for x in p), strict=True))
            false = np.mean([decide(x, a.pairs)[0].any() for x in null])
            power = [found[mixed == e].mean() for e in (0.5, 1.0, 2.0, 3.0)]
            blocks = n.reshape(len(n), 3, 5)
            controls = blocks.max(-1) if shared else blocks.sum(-1)
            runs = n.sum(1) + controls.sum(1)
            cost = (n * PRICES).sum(1) + (controls * PRICES[::5]).sum(1)
            mistakes = (found & (mixed == 0)).any(1).mean()
            head = f"{'shared' if shared else 'own':<8}{rule:<23}{false:>10.3f}{mistakes:>10.3f}"
            print(
                f"{head}{' / '.join(f'{x:.2f}' for x in power):>25}{runs.mean():>7.0f}{cost.mean():>8.0f}", flush=True
            )


if __name__ == "__main__":
    main()
