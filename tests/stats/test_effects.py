"""Signed differences, intervals, contrasts and exact comparisons by hand and against scipy and statsmodels."""

from math import inf, log, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from albert_ablate.stats import effects as e
from albert_ablate.stats import sequential as s

QUICK = settings(max_examples=50, deadline=None)
LOSSES = st.floats(0.5, 9).map(lambda x: round(x, 3))
PAIRS = st.lists(st.tuples(LOSSES, LOSSES, st.booleans(), st.booleans()), min_size=1, max_size=12)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_only_the_gapless_prefix_of_the_named_order_is_judged():
    assert e.prefix([3, 1, 2, 0], {3: 1.0, 1: 1.0, 0: 1.0, 2: 1.0}, {3: 2.0, 1: 2.0, 0: 2.0}) == [3, 1]
    assert e.prefix([3, 1], {1: 1.0}, {3: 1.0, 1: 1.0}) == [] and e.prefix([0], {0: nan}, {0: 1.0}) == [0]
    with pytest.raises(ValueError, match="names a seed twice"):
        e.prefix([0, 1, 0], {})


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("log_scale", [False, True])
@QUICK
@given(pairs=PAIRS)
def test_swapping_the_arms_flips_every_difference_exactly(better, log_scale, pairs):
    a, b, a_lost, b_lost = map(np.array, zip(*pairs, strict=True))
    there = e.signed_difference(a, b, better, log_scale, a_lost, b_lost)
    np.testing.assert_array_equal(there, -e.signed_difference(b, a, better, log_scale, b_lost, a_lost))


def test_signed_difference_by_hand():
    d = e.signed_difference([2.0, 3.0, 1.0, nan], [2.5, 2.0, inf, nan], "lower", False, [0, 0, 0, 1], [0, 0, 1, 1])
    np.testing.assert_array_equal(d, [0.5, -1.0, inf, nan])
    assert e.signed_difference([1.0], [2.0], "higher", treatment_diverged=[True])[0] == -inf
    assert e.signed_difference([2.0], [4.0], log=True)[0] == log(4) - log(2)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (([1.0, nan], [1.0, 2.0]), "treatment's finished run 1 has no finite value"),
        (([1.0], [0.0], "lower", True), "log ratio needs positive values; the control's run 0 has 0"),
        (([1.0, 2.0], [1.0]), "one value per seed in each arm, got 2 and 1"),
    ],
)
def test_differences_that_would_mean_nothing_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        e.signed_difference(*arguments)


# --- intervals and descriptions --------------------------------------------------------------------------------------


@QUICK
@given(st.integers(1, 60), st.data(), st.sampled_from([0.05, 0.0089]))
def test_rate_interval_is_statsmodels_beta(n, data, level):
    k = data.draw(st.integers(0, n))
    assert e.rate_interval(k, n, level) == pytest.approx((k / n, *proportion_confint(k, n, level, "beta")), abs=1e-9)


def test_rate_interval_of_no_divergence_in_ten_by_hand():
    assert e.rate_interval(0, 10) == pytest.approx((0.0, 0.0, 1 - 0.025**0.1))
    with pytest.raises(ValueError, match="at least one run"):
        e.rate_interval(0, 0)


@pytest.mark.parametrize("r, low, high", [(0.76, 0.44, 0.91), (0.73, 0.39, 0.90), (-0.38, -0.73, 0.13)])
def test_correlation_interval_is_the_measured_tables(r, low, high):
    """The table's r is rounded too: its ends lie between those of r - .005 and r + .005, themselves rounded."""
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 17))
    x = (x - x.mean()) / x.std()
    noise = noise - noise.mean() - x * (noise @ x) / 17
    least, y, most = (a * x + np.sqrt(1 - a**2) * noise / noise.std() for a in (r - 0.005, r, r + 0.005))
    by_hand = np.tanh(np.arctanh(r) + np.array([-1, 1]) * stats.norm.isf(0.025) / np.sqrt(14))
    assert e.correlation(x, y) == pytest.approx((r, *by_hand), rel=1e-9)
    for end, value in ((1, low), (2, high)):
        assert e.correlation(x, least)[end] - 0.005 <= value <= e.correlation(x, most)[end] + 0.005
    assert e.correlation(y, x)[0] == pytest.approx(e.correlation(x, y)[0], rel=1e-12)
    assert e.correlation(np.r_[x, inf], np.r_[y, 1.0]) == e.correlation(x, y)


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_scipys_to_the_last_bit(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=4 + seed) * 10.0 ** (seed % 7 - 3)
    y = 2 * x + 1 if seed == 3 else x * (seed % 2) + rng.normal(size=len(x))
    scipys = stats.pearsonr(x, y)
    assert e.correlation(x, y) == (scipys.statistic, *scipys.confidence_interval(0.95))
    assert e.interquartile_mean(x) == stats.trim_mean(x, 0.25)
    k = int(rng.integers(len(x)))
    interval = stats.binomtest(k, len(x)).proportion_ci(0.99)
    assert e.rate_interval(k, len(x), 0.01)[1:] == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_correlation_refuses_three_pairs_and_constant_arms():
    with pytest.raises(ValueError, match="at least 4 pairs"):
        e.correlation([1, 2, 3, nan], [1, 2, 4, 5])
    with pytest.raises(ValueError, match="values that vary"):
        e.correlation([1, 1, 1, 1], [1, 2, 4, 5])


def test_interquartile_mean_ignores_a_quarter_at_each_end():
    assert e.interquartile_mean([-99, 1, 2, 3, 4, 5, 6, inf]) == np.mean([2, 3, 4, 5])
    with pytest.raises(ValueError, match="not NaN"):
        e.interquartile_mean([1.0, nan])


@QUICK
@given(st.lists(LOSSES, min_size=1, max_size=8), st.lists(LOSSES, min_size=1, max_size=8))
def test_probability_of_improvement_is_mann_whitneys_u(treatment, control):
    p = e.probability_of_improvement(treatment, control, "higher")
    assert p == pytest.approx(stats.mannwhitneyu(treatment, control).statistic / len(treatment) / len(control))
    assert p == 1 - e.probability_of_improvement(control, treatment, "higher") or p == pytest.approx(
        1 - e.probability_of_improvement(control, treatment, "higher"), rel=1e-15
    )
    assert p == e.probability_of_improvement(control, treatment, "lower")


def test_a_diverged_run_loses_every_comparison():
    assert e.probability_of_improvement([1.0, inf], [2.0, 3.0]) == 0.5
    with pytest.raises(ValueError, match="not NaN"):
        e.probability_of_improvement([nan], [1.0])


# --- factorial -------------------------------------------------------------------------------------------------------


def test_factorial_effects_by_hand():
    #           b off  b on
    one_seed = [[10.0, 12.0], [11.0, 19.0]]  # rows: a off, a on
    found = e.factorial_effects([one_seed], ["a", "b"])
    assert found["a",][0] == (11 + 19) / 2 - (10 + 12) / 2
    assert found["b",][0] == (12 + 19) / 2 - (10 + 11) / 2
    assert found["a", "b"][0] == (19 - 12) - (11 - 10)


def test_factorial_effects_are_least_squares_coefficients():
    rng = np.random.default_rng(1)
    cells = rng.standard_normal((1, 2, 2, 2, 2))
    names = ["norm", "dropout", "adam", "agc"]
    codes = np.array(np.meshgrid(*[[-0.5, 0.5]] * 4, indexing="ij")).reshape(4, -1)
    found = e.factorial_effects(cells, names)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    design = np.column_stack([np.ones(16), *codes, *(codes[i] * codes[j] for i, j in pairs)])
    fitted = np.linalg.lstsq(design, cells.ravel(), rcond=None)[0][1:]
    keys = [(n,) for n in names] + [(names[i], names[j]) for i, j in pairs]
    np.testing.assert_allclose([found[k][0] for k in keys], fitted, atol=1e-12)
    assert list(found) == keys


def test_switching_a_factor_round_flips_its_effects_exactly():
    cells = np.random.default_rng(2).standard_normal((5, 2, 2, 2))
    there, back = (e.factorial_effects(x, "abc") for x in (cells, cells[:, ::-1]))
    for key in there:
        if key[0] == "a":
            np.testing.assert_array_equal(there[key], -back[key])
    np.testing.assert_allclose(there["b", "c"], back["b", "c"], rtol=1e-12)


def test_contrast_per_seed_covers_where_pooling_does_not():
    """Seed x factor interaction of 1 sd: the per-seed t covers 95 %, least squares with seed blocks about half."""
    rng, studies, n = np.random.default_rng(3), 3000, 5
    cells = rng.standard_normal((studies, n, 2, 2, 2)) * 0.5
    cells[:, :, 1] += rng.standard_normal((studies, n, 1, 1))
    d = np.array([e.factorial_effects(x, "abc")["a",] for x in cells])
    covers = np.abs(d.mean(1)) <= stats.t.isf(0.025, n - 1) * d.std(1, ddof=1) / np.sqrt(n)
    assert abs(covers.mean() - 0.95) <= 4 * np.sqrt(0.95 * 0.05 / studies)
    codes = np.array(np.meshgrid(*[[-0.5, 0.5]] * 3, indexing="ij")).reshape(3, -1)
    design = np.column_stack([*np.tile(codes, n), *np.repeat(np.eye(n), 8, axis=0).T])
    flat = cells.reshape(studies, -1).T
    beta, rss = np.linalg.lstsq(design, flat, rcond=None)[:2]
    df = 8 * n - 3 - n
    error = np.sqrt(rss / df * np.linalg.inv(design.T @ design)[0, 0])
    assert (np.abs(beta[0]) <= stats.t.isf(0.025, df) * error).mean() < 0.75


def test_factorial_refuses_missing_cells_skips_diverged_seeds():
    with pytest.raises(ValueError, match=r"2 factors need cells of shape \(seeds, 2, 2\)"):
        e.factorial_effects(np.zeros((3, 2)), ["a", "b"])
    cells = np.arange(8.0).reshape(2, 2, 2)
    cells[1, 0, 0] = inf
    assert np.isnan(e.factorial_effects(cells, "ab")["a", "b"][1]) and e.factorial_effects(cells, "ab")["a",][0] == 2


def test_more_than_the_sum_is_full_minus_singles():
    full, base, singles = [1.0, 2.0], [5.0, 5.0], [[4.5, 4.6, 4.7, 4.8], [4.0, 4.5, 4.25, 4.25]]
    by_hand = [-(f + 3 * b - sum(x)) for f, b, x in zip(full, base, singles, strict=True)]
    np.testing.assert_allclose(e.more_than_the_sum(full, base, singles), by_hand, rtol=1e-12)
    np.testing.assert_array_equal(e.more_than_the_sum(full, base, singles, "higher"),
                                  -e.more_than_the_sum(full, base, singles))  # fmt: skip


def test_additive_factors_do_no_more_than_the_sum():
    gains = np.array([0.5, 0.25, 0.125, 1.0])
    assert e.more_than_the_sum([4.0 - gains.sum()], [4.0], [4.0 - gains])[0] == 0


def test_a_diverged_cell_is_no_interaction():
    d = e.more_than_the_sum([1.0, 1.0], [inf, 2.0], [[1.5] * 4, [1.5] * 4])
    assert np.isnan(d[0]) and d[1] == 1 - 4 * 0.5 + 0  # gain of all 1, of the four 2


# --- learning rates, measures without noise --------------------------------------------------------------------------


def test_rate_sensitivity_by_hand():
    losses = [[3.0, 2.0, 5.0, inf], [2.0, 2.0, 2.0, nan]]
    np.testing.assert_allclose(e.rate_sensitivity(losses, [4.0, 6.0]), [(3 + 2 + 4 + 4) / 4 - 2, (2 * 3 + 6) / 4 - 2])
    with pytest.raises(ValueError, match="at least 2 rates"):
        e.rate_sensitivity([[1.0]], 4.0)
    with pytest.raises(ValueError, match="must be finite"):
        e.rate_sensitivity(losses, [4.0, nan])


def test_flops_are_compared_exactly():
    found = e.compare_exactly([100.0] * 5, [200.0] * 3, margin=log(1.005))
    assert (found.verdict, found.difference) == ("supported", log(200) - log(100))
    back = e.compare_exactly([200.0] * 3, [100.0] * 5, margin=log(1.005))
    assert (back.verdict, back.difference) == ("refuted", -found.difference)
    assert e.compare_exactly([100.0], [100.4], margin=log(1.005)).verdict == "no effect"
    with pytest.raises(ValueError, match="one finite number per arm; the control has"):
        e.compare_exactly([100.0], [100.0, 101.0], margin=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
def test_sensitivity_per_seed_covers(n):
    """Quadratic curves with a cliff at the top rate, run noise .05: the specification says .935 to .988."""
    rng, studies, grid = np.random.default_rng(4), 4000, np.arange(-3, 4)
    truth = rng.standard_normal((400_000, 7)) * 0.05
    curve = np.where(grid == 3, 9.0, 2 + 0.05 * grid**2)
    target = e.rate_sensitivity(curve + truth, 4.0).mean()
    d = np.array([e.rate_sensitivity(curve + rng.standard_normal((n, 7)) * 0.05, 4.0) for _ in range(studies)])
    covered = np.mean([low <= target <= high for _, low, high in map(s.paired_interval, d)])
    assert 0.935 <= covered <= 0.988
