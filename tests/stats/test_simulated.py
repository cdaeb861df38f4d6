"""The judge's error rates, power and coverage by simulation, beside the figures of STATISTICS.md.

Quick forms run thousands of studies; those marked slow run the specification's own number of repetitions or the whole
ledger, study by study. Tolerances are four standard errors of both simulations plus the specification's rounding.
"""

from importlib.util import module_from_spec, spec_from_file_location
from math import inf, nan, sqrt
from pathlib import Path

import numpy as np
import pytest

from albert_ablate.stats import sequential as s
from albert_ablate.stats.learning_rate import false_positive_rate, tuned_rate
from albert_ablate.stats.verdicts import Claim, Contrast, verdicts, within_reach

MANY = 6000


def close(share, expected, studies, rounding=0.005):
    return abs(share - expected) <= 4 * sqrt(max(expected * (1 - expected), 0.25 / studies) / studies) + rounding


def nominal_p(d):
    """p at every look, shape (studies, looks)."""
    return np.stack([s.p_effect(d[:, :n]) for n in range(s.FIRST, d.shape[1] + 1)], -1)


def stop(d, level=0.05):
    """(found, pairs used) of each study: it stops at the first look that rejects, or at N."""
    found = nominal_p(d) <= s.nominal(level, d.shape[1])
    return found.any(1), np.where(found.any(1), found.argmax(1) + s.FIRST, d.shape[1])


def arms(rng, studies, N, bad, effect=0.0, chances=(0.0, 0.0)):
    """Control minus treatment with run noise .71 sd; with the chances (treatment, control) a run has the loss `bad`."""
    t, c = rng.standard_normal((2, studies, N)) * sqrt(0.5)
    c = c + effect
    t_bad, c_bad = (rng.random((studies, N)) < chance for chance in chances)
    t, c = np.where(t_bad, bad, t), np.where(c_bad, bad, c)
    both = t_bad & c_bad
    if np.isinf(bad):
        return np.where(both, nan, np.where(both, 0, c) - np.where(both, 0, t))
    return c - t


# --- false positives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [5, 12, 20, 40])
def test_peeking_at_every_pair_keeps_five_percent(N):
    found, _ = stop(np.random.default_rng(N).standard_normal((MANY, N)))
    assert close(found.mean(), 0.05, MANY, rounding=0.001)


def test_peeking_with_the_naive_level_does_not():
    p = nominal_p(np.random.default_rng(0).standard_normal((MANY, 20)))
    assert (p <= 0.05).any(1).mean() > 0.15


def tuning_spread(rng, studies, share):
    """Variance of paired differences of three seeds at three rates, of whose noise a seed has a share in common."""
    own = rng.standard_normal((studies, 3, 3)) * sqrt(1 - share)
    return (own + rng.standard_normal((studies, 3, 1)) * sqrt(share)).var(1, ddof=1).mean(-1)


def moderated(rng, studies, N, share, effect=0.0, level=0.05):
    """(found, pairs used) of each study by the moderated t, each with a prior of its own."""
    from scipy.special import stdtr

    prior, d = tuning_spread(rng, studies, share), rng.standard_normal((studies, N)) + effect
    a, found = s.nominal(level, N, s.Test("moderated", 1.0)), []
    for n in range(3, N + 1):
        x = d[:, :n]
        se = np.sqrt((3 * prior + (n - 1) * x.var(1, ddof=1)) / (n + 2) / n)
        found.append(2 * stdtr(n + 2, -abs(x.mean(1)) / se) <= a)
    found = np.stack(found, -1)
    return found.any(1), np.where(found.any(1), found.argmax(1) + 3, N)


@pytest.mark.parametrize("N, share, expected", [(12, 0.9, 0.05), (25, 0.9, 0.05), (20, 0.5, 0.0408), (20, 0.0, 0.037)])
def test_the_moderated_t_keeps_its_level(N, share, expected):
    found, _ = moderated(np.random.default_rng(N), 20_000, N, share)
    assert close(found.mean(), expected, 20_000, rounding=0.001)


@pytest.mark.parametrize("effect, pairs", [(1.0, 10.2), (2.0, 4.8), (3.0, 3.6)])
def test_the_moderated_t_needs_fewer_pairs(effect, pairs):
    found, used = moderated(np.random.default_rng(0), 4000, 20, 0.5, effect)
    assert used.mean() <= pairs < stop(np.random.default_rng(0).standard_normal((4000, 20)) + effect)[1].mean()


def test_two_tests_that_must_agree_keep_the_level_at_skew_two():
    d = np.random.default_rng(0).exponential(size=(20_000, 20)) - 1
    test = s.Test("skew_corrected")
    p = np.stack([s.p_effect(d[:, :n], test=test) for n in range(8, 21)], -1)
    assert close((p <= s.nominal(0.05, 20)).any(1).mean(), 0.045, 20_000, rounding=0.002)
    assert stop(d[:4000])[0].mean() > 0.14  # today's t test alone


def test_the_bounded_skew_keeps_five_percent_of_a_family():
    d = np.random.default_rng(0).exponential(size=(20_000, 20)) - 1
    level, family = s.nominal(0.05 / 15, 20), {}
    for name, studies in (("skew_corrected", 10_000), ("skew_bounded", 20_000)):
        p = np.stack([s.p_effect(d[:studies, :n], test=s.Test(name)) for n in range(8, 21)], -1)
        family[name] = 1 - (1 - (p <= level).any(1).mean()) ** 15  # 15 independent claims
    assert family["skew_bounded"] <= 0.05 < 0.1 < family["skew_corrected"]
    effect = np.random.default_rng(1).standard_normal((4000, 20)) + 1
    p = np.stack([s.p_effect(effect[:, :n], test=s.Test("skew_bounded")) for n in range(8, 21)], -1)
    assert close((p <= s.nominal(0.05, 20)).any(1).mean(), 0.825, 4000, rounding=0.005)


def test_heavy_tails_are_conservative():
    rng = np.random.default_rng(1)
    assert close(stop(rng.standard_t(3, (MANY, 20)))[0].mean(), 0.034, MANY)
    assert close(stop(rng.standard_cauchy((MANY, 20)))[0].mean(), 0.01, MANY)


@pytest.mark.parametrize("chance", [0.05, 0.1, 0.3])
def test_stuck_runs_in_both_arms_keep_five_percent(chance):
    d = arms(np.random.default_rng(2), MANY, 20, bad=10.0, chances=(chance, chance))
    assert stop(d)[0].mean() <= 0.05 + 4 * sqrt(0.05 * 0.95 / MANY)


@pytest.mark.parametrize("N, zeros, expected", [(8, 0.25, 0.0746), (8, 0.75, 0.0036), (20, 0.0, 0.0621)])
def test_discrete_differences_err_a_little_more_often(N, zeros, expected):
    rng = np.random.default_rng(21)
    d = rng.choice([-1.0, 1.0], size=(MANY, N)) * (rng.random((MANY, N)) >= zeros)
    looks = [d[:, :n] for n in range(s.FIRST, N + 1)]
    plain, discrete = (np.min([s.p_effect(x, kind) for x in looks], axis=0) for kind in (False, True))
    a = s.nominal(0.05, N)
    assert close((discrete <= a).mean(), expected, MANY, rounding=0.001)
    assert (discrete <= a).mean() <= (plain <= a).mean() + 0.005


@pytest.mark.parametrize("chance", [0.1, 0.3])
def test_diverged_runs_in_both_arms_keep_five_percent(chance):
    d = arms(np.random.default_rng(3), 4000, 20, bad=inf, chances=(chance, chance))
    assert np.isinf(d).any(1).mean() > 0.9
    assert stop(d)[0].mean() <= 0.05 + 4 * sqrt(0.05 * 0.95 / 4000)


@pytest.mark.parametrize("N", [8, 20, 40])
def test_signed_rank_alone_keeps_the_level_of_the_same_formula(N):
    d = np.random.default_rng(4).standard_normal((2000, N))
    p = np.min([s.signed_rank(d[:, :n]) for n in range(s.FIRST, N + 1)], axis=0)
    assert (s.overall(p, N) <= 0.05).mean() <= 0.05


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_family_of_fifteen_is_kept_by_holm_under_any_stopping(shared):
    """Each claim stops by its own whim; a reader who peeks at the best moment of each gains nothing either."""
    rng, ledgers, N, m = np.random.default_rng(5), 1000, 20, 15
    noise = rng.standard_normal((ledgers, m, N)) * sqrt(1 - shared) + rng.standard_normal((ledgers, 1, N)) * sqrt(
        shared
    )
    p = nominal_p(noise.reshape(-1, N))
    running = s.overall(np.minimum.accumulate(p, axis=1), N).reshape(ledgers, m, -1)
    whim = rng.integers(running.shape[-1], size=(ledgers, m, 1))
    stopped = np.take_along_axis(running, whim, -1)[..., 0]
    best = running.min(-1)
    for each in (stopped, best):
        wrong = np.mean([any(s.holm(x, m)[0]) for x in each])
        assert wrong <= 0.05 + 4 * sqrt(0.05 * 0.95 / ledgers)
    assert all(set(np.flatnonzero(s.holm(x, m)[0])) <= set(np.flatnonzero(s.holm(y, m)[0]))
               for x, y in zip(stopped, best, strict=True))  # fmt: skip


def test_true_effects_beside_do_not_raise_the_familys_error():
    rng, ledgers, m = np.random.default_rng(6), 1500, 15
    d = rng.standard_normal((ledgers, m, 20)) + np.r_[np.zeros(12), 1, 2, 3][:, None]
    p = s.overall(nominal_p(d.reshape(-1, 20)).min(1), 20).reshape(ledgers, m)
    assert close(np.mean([any(s.holm(x, m)[0][:12]) for x in p]), 0.046, ledgers)


# --- power and cost --------------------------------------------------------------------------------------------------

POWER = {(20, 0.5): (0.40, 16.9), (20, 1): (0.95, 10.5), (20, 2): (1.00, 5.6), (20, 3): (1.00, 4.6),
         (40, 0.5): (0.71, 26.9), (40, 1): (1.00, 11.7), (40, 2): (1.00, 6.0), (40, 3): (1.00, 4.8),
         (50, 0.5): (0.82, 29.7), (50, 1): (1.00, 11.9), (50, 2): (1.00, 6.1), (50, 3): (1.00, 4.8)}  # fmt: skip


@pytest.mark.parametrize("N, effect", POWER)
def test_power_and_mean_pairs_are_those_of_the_table(N, effect):
    studies = 4000
    found, pairs = stop(np.random.default_rng(7).standard_normal((studies, N)) + effect)
    power, mean = POWER[N, effect]
    assert close(found.mean(), power, studies)
    assert abs(pairs.mean() - mean) <= 4 * pairs.std() / sqrt(studies) + 0.05


INSIDE = {(20, 0.5): (0.08, 19.1), (20, 0.75): (0.66, 15.7), (20, 1): (0.93, 11.3), (20, 1.5): (0.99, 6.9),
          (20, 2): (1.00, 5.4), (40, 0.5): (0.56, None), (40, 0.75): (0.94, None), (40, 1): (0.97, None)}  # fmt: skip


@pytest.mark.parametrize("N, margin", INSIDE)
def test_no_effect_is_found_as_often_as_the_table_says(N, margin):
    """The study also stops, undecided about "no effect", where it rejects 0 first: .97 and not 1.00 at N = 40."""
    studies, (share, mean) = 4000, INSIDE[N, margin]
    d = np.random.default_rng(8).standard_normal((studies, N))
    looks = range(s.FIRST, N + 1)
    inside = np.stack([s.p_inside(d[:, :n], margin) for n in looks], -1) <= s.nominal(0.10, N)
    either = inside | (nominal_p(d) <= s.nominal(0.05, N))
    first = np.where(either.any(1), either.argmax(1), N - s.FIRST)
    assert close(np.take_along_axis(inside, first[:, None], 1).mean(), share, studies)
    if mean:
        assert abs(first.mean() + s.FIRST - mean) <= 4 * first.std() / sqrt(studies) + 0.05


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_an_effect_at_the_margin_is_seldom_called_no_effect(margin):
    d = np.random.default_rng(9).standard_normal((4000, 20)) + margin
    assert (s.sequential(d, margin, 20).inside <= 0.05).mean() <= 0.05 + 4 * sqrt(0.05 * 0.95 / 4000)
    inside = np.stack([s.p_inside(d[:, :n], margin) for n in range(s.FIRST, 21)], -1) <= s.nominal(0.10, 20)
    earlier_effect = np.maximum.accumulate(nominal_p(d) <= s.nominal(0.05, 20), axis=1)
    assert (inside & ~earlier_effect).any(1).mean() <= 0.039 + 4 * sqrt(0.039 * 0.961 / 4000)


DIVERGENCE = {(0.0, 0.1): (0.97, 10.7), (0.0, 0.3): (0.99, 10.1), (0.1, 0.1): (0.50, None), (0.1, 0.0): (0.36, None)}


@pytest.mark.parametrize("chances", DIVERGENCE)
def test_power_with_diverging_runs_is_that_of_the_table(chances):
    studies, (power, mean) = 2500, DIVERGENCE[chances]
    d = arms(np.random.default_rng(10), studies, 20, inf, effect=1.0, chances=chances)
    found, pairs = stop(d)
    direction = s.sequential(d, 0.0, 20).sign
    lost = np.array([np.sum(np.sign(x[:n][np.isinf(x[:n])])) for x, n in zip(d, pairs, strict=True)])
    assert close((found & (direction > 0) & (lost >= 0)).mean(), power, studies)
    if mean:
        assert abs(pairs.mean() - mean) <= 4 * pairs.std() / sqrt(studies) + 0.05


def test_clamping_a_diverged_control_would_cost_the_verdict():
    rng = np.random.default_rng(11)
    d = arms(rng, 2000, 20, inf, effect=1.0, chances=(0.0, 0.1))
    clamped = np.where(np.isinf(d), 15.0, d)
    assert stop(clamped)[0].mean() < 0.5 < 0.9 < stop(d)[0].mean()


def benchmark():
    spec = spec_from_file_location("verdict", Path(__file__).parents[2] / "benchmarks" / "verdict.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_designs_are_those_of_the_specification():
    b = benchmark()
    assert [b.fixed_pairs(d, 0.8) for d in b.EFFECTS] == [34, 10, 5, 4]
    assert [round(b.wald(d), 1) for d in b.EFFECTS] == [22.0, 7.1, 3.1, 2.1]
    assert [[b.welch_runs(d, c, 0.8) for d in b.EFFECTS] for c in b.CORRELATIONS] == [
        [33, 9, 4, 3], [64, 17, 6, 4], [158, 41, 11, 6], [315, 80, 21, 10]]  # fmt: skip
    assert [b.welch_runs(1.0, c, 0.95) for c in b.CORRELATIONS] == [15, 27, 66, 131]
    assert (b.equal_power(1.0), b.equal_power(0.82), b.equal_power(0.6)) == (0.95, 0.80, 0.6)


def test_saving_on_records_is_that_of_their_own_correlation():
    b, rng = benchmark(), np.random.default_rng(22)
    shared, own = rng.standard_normal(20) * 0.02, rng.standard_normal((2, 20)) * 0.005
    x, y = shared + own[0], shared + own[1] - 0.01
    said, d = b.saved(x, y, orders=300), y - x
    assert said.startswith(f"20 seeds, effect {100 * d.mean():+.2f} %") and "decided in 100 %" in said
    unpaired = abs(d.mean()) / np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    runs = int(said.split(" runs an arm")[0].split()[-1])
    assert (
        b._power(unpaired * sqrt(runs / 2), 2 * runs - 2)
        >= 0.95
        > b._power(unpaired * sqrt((runs - 1) / 2), 2 * runs - 4)
    )
    assert float(said.split(": ")[-1]) < 0.3  # of the runs of a test that does not pair
    said = b.saved(own[0], own[1], orders=300)
    assert "Welch" not in said  # no effect to be found


# --- estimates at stopping -------------------------------------------------------------------------------------------

STOPPED = {0.25: (0.985, None, None), 0.5: (0.989, 0.07, 0.35), 1: (0.990, 0.10, 0.13), 2: (0.990, 0.05, 0.05)}


@pytest.mark.parametrize("effect", STOPPED)
def test_repeated_interval_covers_and_early_means_run_high(effect):
    d = np.random.default_rng(12).standard_normal((4000, 20)) + effect
    found, pairs = stop(d)
    mean, low, high = np.array([s.interval(x[:n], 20) for x, n in zip(d, pairs, strict=True)]).T
    coverage, bias, given_a_verdict = STOPPED[effect]
    assert close(np.mean((low <= effect) & (effect <= high)), coverage, 4000, rounding=0.001)
    if bias:
        for of, expected in ((mean, bias), (mean[found], given_a_verdict)):
            assert abs(of.mean() - effect - expected) <= 4 * of.std() / sqrt(len(of)) + 0.005


@pytest.mark.parametrize("N, narrower, studies", [(12, 0.06, 1500), (60, 0.10, 400)])
def test_the_running_interval_covers_and_is_narrower(N, narrower, studies):
    """JUDGE-2, section 1.4: coverage .947 to .952, narrower by 6 % at N = 12 and 10 % at 60."""
    d = np.random.default_rng(13).standard_normal((studies, N))
    _, low, high = np.array([s.running_interval(x, N) for x in d]).T
    last = np.array([np.diff(s.interval(x, N)[1:])[0] for x in d])
    assert close(np.mean((low <= 0) & (0 <= high)), 0.95, studies)
    assert np.nanmedian((high - low) / last) == pytest.approx(1 - narrower, abs=0.015)
    assert np.isnan(low).mean() < 0.006


# --- futility, tuning, pool ------------------------------------------------------------------------------------------


def ends(d, margin, N=20):
    """Pairs each study uses and whether it finds an effect, with futility, look by look through the public rule."""
    found, pairs = stop(d)
    used = []
    for x, n in zip(d, pairs, strict=True):
        hopeless = (k for k in range(s.FUTILE_FROM, n) if not within_reach(Claim([Contrast(x[:k], margin)], N)))
        used.append(next(hopeless, n))
    used = np.array(used)
    return found & (used == pairs), used


@pytest.mark.parametrize("effect, power", [(0.5, 0.36), (0.75, 0.70), (1.0, 0.92)])
def test_futility_costs_two_to_five_points_of_power(effect, power):
    d = np.random.default_rng(13).standard_normal((400, 20)) + effect
    found, _ = ends(d, 0.25)
    assert close(found.mean(), power, 400)


def test_futility_ends_hopeless_claims_at_half_the_price():
    _, used = ends(np.random.default_rng(14).standard_normal((300, 20)), 0.25)
    assert abs(used.mean() - 9.1) <= 4 * used.std() / sqrt(300) + 0.05


def tuned_offsets(rng, arms, curvature, step, vertex=True):
    """Distance, in doublings, of each arm's tuned rate from the optimum: 7 points, 3 tuning seeds, run noise .71 sd."""
    grid = np.arange(-3, 4) * step
    rates = 2.0**grid
    out = []
    for shift in rng.uniform(-step / 2, step / 2, arms):
        losses = curvature * (grid - shift) ** 2 + rng.standard_normal((3, 7)) * sqrt(0.5)
        found = tuned_rate(rates, losses)
        out.append(np.log2(found.rate if vertex else found.best) - shift)
    return np.array(out)


@pytest.mark.parametrize("vertex, expected", [(True, 0.06), (False, 0.15)])
def test_tuning_by_the_vertex_halves_false_positives(vertex, expected):
    rng, studies = np.random.default_rng(15), 1500
    excess = tuned_offsets(rng, 2 * studies, 1.0, 1.0, vertex) ** 2
    d = rng.standard_normal((studies, 20)) + (excess[:studies] - excess[studies:])[:, None]
    assert close(stop(d)[0].mean(), expected, studies)


def test_calibration_of_a_normal_pool_is_near_five_percent():
    rng = np.random.default_rng(16)
    rates = [false_positive_rate(rng.standard_normal(24), rng, pairings=2000, resamples=2) for _ in range(10)]
    assert close(np.mean([x.rate for x in rates]), 0.05, 2000)


# --- the specification's own size ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("N", [4, 7, 8, 14, 20, 25, 40, 50, 60])
def test_level_formula_on_fresh_paths(N):
    rng, smallest = np.random.default_rng(100 + N), []
    for _ in range(20):
        smallest.append(nominal_p(rng.standard_normal((20_000, N))).min(1))
    p = s.overall(np.concatenate(smallest), N)
    for level in (0.1, 0.05, 0.025, 0.01, 0.0033, 0.001):
        error = sqrt(level * (1 - level) / len(p))
        assert abs((p <= level).mean() - level) <= 0.04 * level + 4 * error


@pytest.mark.slow
def test_ledger_of_fifteen_end_to_end():
    """12 null claims and effects of 1, 2, 3, margin .5: each claim stops as soon as its word is final."""
    rng, ledgers, wrong, power = np.random.default_rng(17), 150, 0, np.zeros(3)
    effects = np.r_[np.zeros(12), 1, 2, 3]
    for _ in range(ledgers):
        d = rng.standard_normal((15, 20)) + effects[:, None]
        pairs = np.full(15, 4)
        while True:
            found = verdicts([Claim([Contrast(x[:n], 0.5)]) for x, n in zip(d, pairs, strict=True)], 15)
            going = np.array([v.verdict == "undecided" for v in found])
            if not going.any():
                break
            pairs[going] += 1
        wrong += any(v.verdict in ("supported", "refuted") for v in found[:12])
        power += [v.verdict == "supported" for v in found[12:]]
    assert wrong / ledgers <= 0.05 + 4 * sqrt(0.05 * 0.95 / ledgers)
    assert power[1] / ledgers > 0.97 and power[2] / ledgers > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("shared, expected", [(0.0, 0.050), (0.5, 0.035)])
def test_family_wise_error_at_full_size(shared, expected):
    rng, ledgers, m, N = np.random.default_rng(18), 8000, 15, 20
    d = rng.standard_normal((ledgers, m, N)) * sqrt(1 - shared) + rng.standard_normal((ledgers, 1, N)) * sqrt(shared)
    p = s.overall(nominal_p(d.reshape(-1, N)).min(1), N).reshape(ledgers, m)
    assert close(np.mean([any(s.holm(x, m)[0]) for x in p]), expected, ledgers)


@pytest.mark.slow
@pytest.mark.parametrize("curvature, expected", [(0.25, 0.09), (1.0, 0.06), (4.0, 0.05)])
def test_tuned_rates_at_full_size(curvature, expected):
    rng, studies = np.random.default_rng(19), 6000
    excess = curvature * tuned_offsets(rng, 2 * studies, curvature, 1.0) ** 2
    d = rng.standard_normal((studies, 20)) + (excess[:studies] - excess[studies:])[:, None]
    assert close(stop(d)[0].mean(), expected, studies)


@pytest.mark.slow
def test_skew_is_the_weak_spot_the_specification_admits():
    rng = np.random.default_rng(20)
    gamma = rng.gamma(4.0, size=(40_000, 20)) - 4.0  # skew 2 / sqrt(4) = 1
    assert close(stop(gamma)[0].mean(), 0.078, 40_000)
