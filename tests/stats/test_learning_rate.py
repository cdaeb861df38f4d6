"""Tuned rates, slack, planning and the pool's false positives against curves and formulas worked by hand."""

from math import inf, log, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from albert_ablate.stats import learning_rate as t
from albert_ablate.stats import sequential as s

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


def test_vertex_is_that_of_numpys_parabola():
    losses = np.array([[3.0, 2.5, 2.1, 2.3, 4.0], [3.1, 2.3, 2.2, 2.4, 4.2], [3.0, 2.4, 2.0, 2.5, inf]])
    a, b, _ = np.polyfit(np.log(RATES[1:4]), losses.mean(0)[1:4], 2)
    found = t.tuned_rate(RATES, losses)
    assert found.rate == pytest.approx(np.exp(-b / 2 / a)) and found.best == 4e-4 and found.curve[4] == inf


def test_rate_is_at_most_half_a_step_from_the_best():
    assert t.tuned_rate(RATES, three([9, 2.0, 1.9, 1.9, 9])).rate == pytest.approx(4e-4 * sqrt(2))
    assert t.tuned_rate(RATES, three([9, 1.9, 1.9, 2.0, 9])).rate == pytest.approx(2e-4 * sqrt(2))


def test_stuck_runs_enter_the_curve_with_the_loss_they_have():
    """Post-norm on a Markov language, measured: counted as infinite, stuck runs gave 0.01778, which had 1.280."""
    rates = [0.00316, 0.01, 0.0316, 0.1]
    losses = three([1.621, 1.071, 1.502, 1.535])
    stuck = np.tile([True, False, True, True], (3, 1))
    found = t.tuned_rate(rates, losses, diverged=stuck)
    a, b, _ = np.polyfit(np.log(rates[:3]), losses[0, :3], 2)
    assert found.rate == pytest.approx(np.exp(-b / 2 / a), rel=2e-3) == pytest.approx(0.01072, rel=2e-3)
    assert found.fitted and found.trains and not found.edge
    assert not t.tuned_rate(rates, losses, diverged=np.ones((3, 4), bool)).trains
    exploded = t.tuned_rate(rates, three([inf, 1.071, 1.502, 1.535]))
    assert (exploded.rate, exploded.fitted) == (0.01, False) and np.isnan(exploded.slack)


@pytest.mark.parametrize("grid", [RATES, [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]])
@pytest.mark.parametrize("curve", [[9, 2.5, 1.9, inf, inf], [5, 3.2, 2.2, inf, 9], [9, 3, 2.9, inf, inf]])
def test_the_curve_is_fitted_on_the_finite_side(grid, curve):
    a, b, _ = np.polyfit(np.arange(3), curve[:3], 2)
    at = -b / 2 / a if a > 0 else 2.0
    expected = np.interp(np.clip(at, 1.5, 2.0), np.arange(5), np.log(grid))
    for there in (True, False):  # and mirrored
        own = [1 / r for r in grid[::-1]] if there is False else grid
        found = t.tuned_rate(own, three(curve if there else curve[::-1]))
        assert np.log(found.rate) == pytest.approx(expected if there else -expected, abs=2e-3)
        assert found.fitted == (a > 0) and found.best == own[2 if there else -3]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.floats(0.5, 9), st.just(inf)), min_size=3, max_size=7))
def test_the_rate_stays_between_measured_finite_neighbors(curve):
    rates = 1e-3 * 2.0 ** np.arange(len(curve))
    found = t.tuned_rate(rates, three(curve))
    best = int(np.argmin(curve))
    low = rates[best - 1] if best and np.isfinite(curve[best - 1]) else rates[best]
    high = rates[best + 1] if best + 1 < len(curve) and np.isfinite(curve[best + 1]) else rates[best]
    if np.isfinite(curve[best]):
        assert low * (1 - 1e-12) <= found.rate <= high * (1 + 1e-12)
        assert found.fitted or found.rate == found.best


def test_edge_of_the_grid_is_flagged_and_not_extrapolated():
    for curve, rate in (([1, 2, 3, 4, 5], 1e-4), ([5, 4, 3, 2, 1], 16e-4)):
        found = t.tuned_rate(RATES, three(curve))
        assert found.edge and found.rate == rate and np.isnan(found.slack)


def test_an_arm_that_no_rate_trains_is_said_to_be_one():
    found = t.tuned_rate(RATES, three([inf] * 5))
    assert not found.trains and found.rate == 1e-4 and not found.edge


def test_rates_dropped_by_halving_do_not_count():
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


@pytest.mark.parametrize("v", [0.0, 0.25, 0.45])
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
    formula = noise**2 / (8 * c * h**2 * 3) * (1 + 12 * v**2)
    assert t.tuning_slack(noise, c, h, 3, v) == pytest.approx(formula)
    assert np.nanmean(slack) == pytest.approx(formula, rel=0.05)
    assert np.mean(excess) == pytest.approx(formula, rel=4 * sqrt(2 / 2000) + 0.02)
    known = stats.chi2.sf(t.SLACK_BOUND, 1)
    assert known == pytest.approx(0.05, abs=1e-3)  # over the bound were the spread known, and with 4 degrees of freedom
    beyond = stats.f.sf(t.SLACK_BOUND, 1, 4)
    assert beyond == pytest.approx(0.12, abs=0.005)
    above = np.mean(np.array(excess) > t.SLACK_BOUND * np.array(slack))
    assert abs(above - beyond) <= 4 * sqrt(beyond * (1 - beyond) / 2000) + 0.01


def test_slack_bound_of_old_files_takes_the_factor_they_lack():
    curve = [{"rate": r, "mean": m, "tokens": 9} for r, m in ((1e-3, 2.0), (2e-3, 1.0), (4e-3, 1.5), (8e-3, None))]
    old = {"curve": curve, "tokens": 9, "slack": 0.01, "rate": 2e-3 * 2**0.4, "step": 2.0}
    assert t.slack_bound(old) == pytest.approx(3.84 * 0.01 * (1 + 12 * 0.16))
    assert t.slack_bound(old | {"rule": "moving window"}) == pytest.approx(0.0384)
    assert np.isnan(t.slack_bound(old | {"slack": None}))


def test_a_window_moves_to_its_end_at_most_four_times():
    assert t.next_rate({2: 3.0, 3: 2.0, 4: 2.5}) is None
    assert t.next_rate({2: 1.0, 3: 2.0, 4: 2.5}) == 1 and t.next_rate({0: 1.0, 1: 2.0, 2: 2.5}) == -1
    assert t.next_rate({4: 3.0, 5: 2.0, 6: 1.5}) == 7 and t.next_rate({4: inf, 5: inf, 6: inf}) is None
    assert t.next_rate(dict(enumerate([7.0, 6, 5, 4, 3, 2, 1]))) is None  # three and four more
    assert t.next_rate({4: 3.0, 5: 2.0, 6: inf}) is None  # its neighbor ran
    assert t.adjacent_rate({2: 3.0, 3: 2.0, 4: 2.5}) == 5 and t.adjacent_rate({2: 2.1, 3: 2.0, 4: 2.5}) == 1
    assert t.tuning_price(7).worst == 7 / 4 + 7 * 3 and t.tuning_price(5, 2).worst == 5 / 4 + 7 * 2


def simulated_window(rng, curvature, optimum, rates):
    """Means by place of one arm after its moves, noise 1 a run, three seeds; and what adds a rate."""
    first = [curvature * (k - optimum - 0.3) ** 2 + rng.standard_normal() for k in range(rates)]
    best, means = int(np.argmin(first)), {}

    def add(k):
        means[k] = curvature * (k - optimum) ** 2 + rng.standard_normal() / sqrt(3)

    for k in (best - 1, best, best + 1):
        add(k)
    while (k := t.next_rate(means)) is not None:
        add(k)
    return means, add


@pytest.mark.parametrize("curvature, alone", [(1.0, 10.4), (4.0, 9.7)])
def test_moving_windows_leave_no_arm_at_an_edge(curvature, alone):
    """JUDGE-2, section 3: full runs of one arm, five rates and the optimum within 1.5 steps of the middle."""
    rng, runs, moves = np.random.default_rng(11), [], []
    for _ in range(1000):
        arms = [simulated_window(rng, curvature, 2 + rng.uniform(-1.5, 1.5), 5) for _ in range(2)]
        runs.append(3 * len(arms[0][0]))
        while len({len(m) for m, _ in arms}) > 1 or any(t.next_rate(m) is not None for m, _ in arms):
            ready = [(k, add) for m, add in arms if (k := t.next_rate(m)) is not None]
            short = [(t.adjacent_rate(m), add) for m, add in arms if len(m) < max(len(x) for x, _ in arms)]
            for k, add in ready or short:
                add(k)
        assert all(min(m, key=m.get) not in (min(m), max(m)) for m, _ in arms)
        moves.append(len(arms[0][0]) - t.WINDOW)
    assert np.mean(runs) == pytest.approx(alone, abs=0.4)
    assert abs(np.mean(moves) - t.EXPECTED_MOVES) < 0.45  # .5 to 1.3 by curvature


# --- planning --------------------------------------------------------------------------------------------------------


def test_spread_interval_by_scipy():
    x = np.random.default_rng(1).standard_normal(12)
    low, high = np.sqrt(11 * x.var(ddof=1) / stats.chi2.ppf([0.9, 0.1], 11))
    assert t.spread(x, 0.2) == pytest.approx((x.std(ddof=1), low, high))


def test_pairs_to_margin_is_the_first_that_fits():
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


def test_pairs_to_margin_depends_on_the_spread_alone():
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


def test_missing_pairs_are_the_first_that_would_decide():
    d = 0.5 + np.array([1, -1, 0.5, -0.5, 0.8, -0.8])
    n, low, high = t.pairs_missing(d, 0.6, 40, 0.01)
    scale = d.std(ddof=1)

    def half(m):
        return stats.t.isf(s.nominal(0.01, 40) / 2, m - 1) * scale / sqrt(m)

    assert half(n) <= 0.6 < half(n - 1) and 6 < low < n < high
    assert 12 < t.pairs_missing(d, 0.6, 12, 0.01)[0] < n  # another claim's, whose level is that of more looks
    assert t.pairs_missing(d, 9.0, 20) is None  # nothing is missing


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
