"""Tuned rates, slack, planning and the pool's false positives against curves and formulas worked by hand."""

from math import inf, log, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from albert_ablate.analysis import statistics as s
from albert_ablate.analysis import tuning as t

RATES = [1e-4, 2e-4, 4e-4, 8e-4, 16e-4]


def three(curve):
    return np.tile(np.array(curve, float), (3, 1))


@settings(max_examples=50, deadline=None)
@given(st.floats(-1.4, 1.4), st.floats(0.1, 5), st.sampled_from([2.0, sqrt(10)]))
def test_vertex_of_a_true_parabola_is_found(optimum, curvature, step):
    rates = 1e-3 * step ** np.arange(-2.0, 3)
    found = t.tuned_rate(rates, three(curvature * (np.arange(-2, 3) - optimum) ** 2))
    assert found.rate == pytest.approx(1e-3 * step**optimum, rel=1e-6) and not found.edge and found.trains
    assert found.slack == pytest.approx(0, abs=1e-12)


def test_vertex_is_that_of_numpys_parabola_through_the_mean_of_the_seeds():
    losses = np.array([[3.0, 2.5, 2.1, 2.3, 4.0], [3.1, 2.3, 2.2, 2.4, 4.2], [3.0, 2.4, 2.0, 2.5, inf]])
    a, b, _ = np.polyfit(np.log(RATES[1:4]), losses.mean(0)[1:4], 2)
    found = t.tuned_rate(RATES, losses)
    assert found.rate == pytest.approx(np.exp(-b / 2 / a)) and found.best == 4e-4 and found.curve[4] == inf


def test_rate_is_at_most_half_a_step_from_the_best():
    assert t.tuned_rate(RATES, three([9, 2.0, 1.9, 1.9, 9])).rate == pytest.approx(4e-4 * sqrt(2))
    assert t.tuned_rate(RATES, three([9, 2.5, 1.9, inf, inf])).rate == pytest.approx(4e-4 / sqrt(2))
    assert t.tuned_rate(RATES, three([9, inf, 1.9, 2.5, 9])).rate == pytest.approx(4e-4 * sqrt(2))
    assert t.tuned_rate(RATES, three([9, inf, 1.9, inf, 9])).rate == 4e-4


def test_edge_of_the_grid_is_flagged_and_not_extrapolated():
    for curve, rate in (([1, 2, 3, 4, 5], 1e-4), ([5, 4, 3, 2, 1], 16e-4)):
        found = t.tuned_rate(RATES, three(curve))
        assert found.edge and found.rate == rate and np.isnan(found.slack)


def test_an_arm_that_no_rate_trains_is_said_to_be_one():
    found = t.tuned_rate(RATES, three([inf] * 5))
    assert not found.trains and found.rate == 1e-4 and not found.edge


def test_rates_dropped_by_halving_do_not_count_and_missing_neighbors_are_named():
    losses = three([9, 2.5, 2.0, 2.5, 9])
    losses[1:, [0, 4]] = nan
    losses[0, 0] = 1.0  # one lucky seed at a dropped rate
    assert t.tuned_rate(RATES, losses).best == 4e-4
    losses[2, 3] = nan
    with pytest.raises(ValueError, match=r"needs its neighbors on 3 tuning seeds: run \[0.0008\]"):
        t.tuned_rate(RATES, losses)
    with pytest.raises(ValueError, match="no rate has more than 2"):
        t.tuned_rate(RATES, losses[:2])


@pytest.mark.parametrize(
    "rates",
    [[1e-3, 2e-3], [2e-3, 1e-3, 4e-3], [1e-3, 2e-3, 9e-3], [0, 1e-3, 2e-3], [1e-3, nan, 4e-3], [1e-3, 2e-3, inf]],
)
def test_a_grid_without_equal_rising_log_steps_is_refused(rates):
    with pytest.raises(ValueError, match="got"):
        t.tuned_rate(rates, three([1.0] * len(rates)))


@pytest.mark.parametrize("v", [0.0, 0.25])
def test_slack_is_the_expected_loss_above_the_optimum(v):
    rng, c, h, noise = np.random.default_rng(0), 6.0, log(2), 0.1
    grid = np.arange(-2, 3)
    rates = 2.0**grid
    excess, slack = [], []
    for _ in range(2000):
        seed_level = rng.standard_normal((3, 1))  # shared by the rates, so no noise of the vertex
        found = t.tuned_rate(rates, c * (h * (grid - v)) ** 2 + seed_level + noise * rng.standard_normal((3, 5)))
        excess.append(c * (log(found.rate) - h * v) ** 2)
        slack.append(found.slack)
    formula = noise**2 / (8 * c * h**2 * 3)
    assert t.tuning_slack(noise, c, h, 3) == pytest.approx(formula)
    assert np.mean(slack) == pytest.approx(formula, rel=0.05)
    assert np.mean(excess) == pytest.approx(formula * (1 + 12 * v**2), rel=4 * sqrt(2 / 2000) + 0.02)


# --- planning --------------------------------------------------------------------------------------------------------


def test_spread_interval_by_scipy():
    x = np.random.default_rng(1).standard_normal(12)
    low, high = np.sqrt(11 * x.var(ddof=1) / stats.chi2.ppf([0.9, 0.1], 11))
    assert t.spread(x, 0.2) == pytest.approx((x.std(ddof=1), low, high))


def test_pairs_to_margin_is_the_first_at_which_the_half_width_fits():
    d = np.random.default_rng(2).standard_normal(8)
    pairs, low, high = t.pairs_to_margin(d, 0.6)
    n, scale = int(pairs), d.std(ddof=1)
    for m, fits in ((n, True), (n - 1, False)):
        half = stats.t.isf(s.nominal(0.05, m) / 2, m - 1) * scale / sqrt(m)
        assert (half <= 0.6) == fits
    assert low < pairs < high
    tight = t.pairs_to_margin(d, 0.05)[0]
    level = s.nominal(0.05, 60)
    assert tight == pytest.approx((stats.norm.isf(level / 2) * scale / 0.05) ** 2, rel=0.01)


def test_pairs_to_margin_depends_on_the_spread_and_not_on_the_effect():
    d = np.random.default_rng(3).standard_normal(10)
    assert t.pairs_to_margin(d, 0.5) == t.pairs_to_margin(d + 7, 0.5) == t.pairs_to_margin(-d, 0.5)
    assert t.pairs_to_margin(np.r_[d, inf, nan], 0.5) == t.pairs_to_margin(d, 0.5)
    assert t.pairs_to_margin(2 * d, 1.0) == t.pairs_to_margin(d, 0.5)
    with pytest.raises(ValueError, match="positive margin"):
        t.pairs_to_margin(d, 0.0)
    with pytest.raises(ValueError, match="positive margin"):
        t.pairs_to_margin(d, nan)
    with pytest.raises(ValueError, match="not a random measure"):
        t.pairs_to_margin([1.0, 1.0, 1.0], 0.5)


def test_eighty_percent_range_of_pairs_covers_eighty_percent():
    rng = np.random.default_rng(4)
    true = t._pairs(0.6, 0.05)
    ranges = np.array([t.pairs_to_margin(x, 0.6)[1:] for x in rng.standard_normal((400, 8))])
    covered = ((ranges[:, 0] <= true) & (true <= ranges[:, 1])).mean()
    assert abs(covered - 0.8) <= 4 * sqrt(0.16 / 400)


def test_reach_of_the_specifications_examples():
    """A margin of .35 sd is out of reach at 10 to 40 pairs; one of 1 sd comes within 10."""
    d = np.array([-1.0, -0.5, 0.5, 1.0])
    d = d / d.std(ddof=1)
    assert not any(t.reach(d, 0.35).reached.values()) and all(t.reach(d, 1.0).reached.values())
    assert t.reach(d, 1.0).half_widths[20] == pytest.approx(stats.t.isf(s.nominal(0.05, 20) / 2, 19) / sqrt(20))


# --- the pool --------------------------------------------------------------------------------------------------------


def test_false_positive_rate_is_a_count_of_rejecting_pairings():
    finals = np.random.default_rng(5).standard_normal(24)
    found = t.false_positive_rate(finals, np.random.default_rng(6), pairings=500, resamples=20)
    order = np.random.default_rng(6).permuted(np.tile(np.arange(24), (500, 1)), axis=1)
    rejected = [s.sequential(finals[o[::2]] - finals[o[1::2]], 0.0, 12).effect <= 0.05 for o in order]
    assert found.rate == np.mean(rejected) and 0 <= found.low < found.high <= 1
    assert (found.runs, found.pairs, found.pairings) == (24, 12, 500)
    again = t.false_positive_rate(finals, np.random.default_rng(6), pairings=500, resamples=20)
    assert again == found


def test_diverged_finals_go_through_the_signed_rank():
    finals = np.r_[np.random.default_rng(7).standard_normal(21), inf, inf, nan]
    found = t.false_positive_rate(finals, np.random.default_rng(8), pairings=300, resamples=5)
    assert 0 < found.rate < 0.12


def test_pools_that_can_say_nothing_are_refused():
    rng = np.random.default_rng(9)
    with pytest.raises(ValueError, match="bootstrap over 19 runs"):
        t.false_positive_rate(rng.standard_normal(19), rng)
    with pytest.raises(ValueError, match="at most 12 pairs, not 20"):
        t.false_positive_rate(rng.standard_normal(24), rng, N=20)
    with pytest.raises(ValueError, match="no random measure"):
        t.false_positive_rate(np.ones(24), rng)
