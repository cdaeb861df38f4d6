"""The error budget of a session, against the package online-fdr, hand-computed levels and simulation."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from albert_ablate.stats import online
from albert_ablate.stats.sequential import FIRST, critical, nominal
from albert_ablate.stats.verdicts import Claim, Contrast, verdicts

LORD_SHARES = 0.07720838  # Ramdas et al. 2017, section 3: gamma_j = c log(max(j, 2)) / (j exp(sqrt(log j)))


def published_share(j):
    return LORD_SHARES * np.log(max(j, 2)) / (j * np.exp(np.sqrt(np.log(j))))


@pytest.mark.parametrize("wealth", [0.025, 0.0499])
def test_lord_levels_are_those_of_online_fdr(wealth):
    package = pytest.importorskip("online_fdr.p_values.investing.lord.plus_plus").LordPlusPlus(
        alpha=0.05, wealth=wealth
    )
    rng = np.random.default_rng(0)
    accepted, levels = [], []
    for p in np.where(rng.random(200) < 0.3, 1e-6, rng.random(200)):
        levels.append(online.lord_level(accepted, 0.05, wealth, published_share))
        accepted.append(bool(package.test_one(p)))
        assert levels[-1] == pytest.approx(package.alpha, rel=1e-9)
        assert accepted[-1] == (p <= levels[-1])
    assert 40 < sum(accepted) < 100


def test_rejected_proposals_never_spend_more_than_the_budget():
    most = sum(map(online.share, range(1, 11))) * 0.05
    for pattern in product([False, True], repeat=10):
        spent = [online.spending_level(pattern[:n]) for n, accepted in enumerate(pattern) if not accepted]
        assert sum(spent) <= most + 1e-12 < 0.05


def test_an_accepted_proposal_gives_its_share_on():
    # shares by hand: .72, then .28 / zeta(1.6) = .1224972, and that over 2^1.6 = .0404090
    shares = [0.72, 0.1224972, 0.0404090]
    assert online.spending_level([]) == pytest.approx(0.05 * shares[0])
    assert online.spending_level([True, True]) == pytest.approx(0.05 * shares[0])
    assert online.spending_level([True, False]) == pytest.approx(0.05 * shares[1], rel=1e-5)
    assert online.spending_level([False, True, False]) == pytest.approx(0.05 * shares[2], rel=1e-5)


def test_shares_sum_to_one():
    J = 200_000
    rest = (1 - online.FIRST_SHARE) / 2.2857656 * J**-0.6 / 0.6  # the integral of what is left; zeta(1.6) = 2.2857656
    assert sum(map(online.share, range(1, J + 1))) + rest == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("effect, margin", [(0.0, 0.25), (0.8, 0.25), (0.0, 1.5), (-1.0, 0.1)])
@pytest.mark.parametrize("diverged", [0.0, 0.15])
def test_many_decisions_are_those_of_one_at_a_time(effect, margin, diverged):
    rng, N = np.random.default_rng(3), 14
    d = rng.standard_normal((10, N)) + effect
    d[rng.random(d.shape) < diverged] = np.inf
    d[rng.random(d.shape) < diverged] = -np.inf
    levels = np.where(np.arange(10) % 2, 0.035, 0.004)
    accepted, pairs = online.decide_many(d, margin, N, levels)
    for row, yes, n, level in zip(d, accepted, pairs, levels, strict=True):
        steps = [online.decide(row[:k], margin, N, level).outcome for k in range(1, N + 1)]
        first = next(k for k, word in enumerate(steps, 1) if word != "undecided")
        assert (first, steps[first - 1] == "accept") == (n, yes)


def test_at_the_judges_level_a_decision_is_the_judges():
    rng, words = np.random.default_rng(1), set()
    same = {"supported": "accept", "refuted": "reject", "inconclusive": "reject", "mixed": "reject"}
    for i in range(60):
        d = rng.standard_normal(12) * 0.6 + rng.choice([-1.0, 0.0, 0.2, 1.0])
        d[rng.random(12) < 0.02 * (i % 2)] = np.inf
        n = int(rng.integers(FIRST, 13))
        (judged,) = verdicts([Claim([Contrast(d[:n], 0.5)], 12)], 1)
        own = online.decide(d[:n], 0.5, 12, 0.025)
        words.add(judged.verdict)
        if np.isfinite(d[:n]).all() and "out of reach" not in f"{judged.reason} {own.reason}".lower():
            assert own.outcome == same.get(judged.verdict, judged.verdict)
            assert (own.mean, own.low, own.high) == (judged.parts[0].mean, judged.parts[0].low, judged.parts[0].high)
    assert words >= {"supported", "refuted", "no effect", "undecided"}


def test_a_candidate_that_diverges_more_is_not_accepted():
    d = [2.0, 2.1, 1.9, 2.2, 2.05, 1.95, 2.15, 1.85, 2.3, 2.4, 2.5, -np.inf]
    assert online.decide(d[:11], 0.1, 12, 0.035).outcome == "accept"
    assert online.decide([-np.inf, *d[:11]], 0.1, 12, 0.2).outcome == "reject"


@pytest.mark.parametrize("level", [0.035, 0.0066])
def test_a_proposal_that_does_nothing_passes_at_its_level(level):
    N = online.pairs_for(level)
    d = np.random.default_rng(5).standard_normal((20_000, N))
    accepted, _ = online.decide_many(d, 0.25, N, np.full(len(d), level))
    assert accepted.mean() < level + 3 * np.sqrt(level / len(d))
    assert accepted.mean() > 0.7 * level


@pytest.mark.parametrize("level", [0.035, 0.0022])
def test_planned_pairs_find_one_spread_in_eight_of_ten(level):
    N = online.pairs_for(level)
    d = np.random.default_rng(6).standard_normal((4000, N)) + 1
    assert online.decide_many(d, 0.25, N, np.full(len(d), level))[0].mean() == pytest.approx(0.8, abs=0.05)
    assert online.pairs_for(0.035) == 12


def test_chance_at_the_last_look_is_scipys_noncentral_t():
    """The chance that `pairs_for` compares, by another function of scipy's."""
    for level in (0.05, 0.01, 1e-3):
        N = online.pairs_for(level, 60)
        chances = [stats.nct.sf(critical(n, n, 2 * level), n - 1, math.sqrt(n)) for n in (N - 1, N)]
        assert chances[1] >= online.LAST_LOOK and (chances[0] < online.LAST_LOOK or N == online.FEWEST)


def test_the_noise_floor_is_the_half_width_at_the_last_pair():
    d = [0.1, -0.2, 0.3, -0.1]
    from scipy.stats import t

    assert nominal(0.1, 20) == pytest.approx(0.0201, rel=0.02)  # STATISTICS: Pocock for 10 % and 20 looks
    assert online.noise_floor(d, 20) == pytest.approx(t.isf(0.0201 / 2, 19) * np.std(d, ddof=1) / np.sqrt(20), rel=5e-3)
