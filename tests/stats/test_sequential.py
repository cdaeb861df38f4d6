"""The sequential procedure against scipy, statsmodels, enumeration by hand and STATISTICS.md's own figures."""

import subprocess
import sys
from itertools import product
from math import inf, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from albert_ablate.stats import sequential as s

NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 3))
QUICK = settings(max_examples=40, deadline=None)


def differences(low=4, high=20, outcomes=NUMBERS):
    return st.lists(outcomes, min_size=low, max_size=high).map(np.array)


DIVERGING = st.one_of(NUMBERS, NUMBERS, st.sampled_from([inf, -inf, nan, 0.0]))


def expected_crossings(a: float, N: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """P(some |t_n|, n = 4..N, has p <= a) under the normal null and its standard error, however rare the event.

    P(union of A_n) = sum over n of P(A_n) E[1 / number of A_m that hold | A_n], and P(A_n) = a. Given A_n: t_n from its
    own tail, the rest of the n values uniform on the sphere, radius chi_n, later values fresh.
    """
    total = variance = 0.0
    for n in range(4, N + 1):
        t = stats.t.isf(rng.uniform(0, a / 2, draws), n - 1)
        g = rng.standard_normal((draws, n))
        g -= g.mean(1, keepdims=True)
        radius = np.sqrt(rng.chisquare(n, draws))
        across = radius / np.sqrt(1 + t**2 / (n - 1))
        along = t * across / sqrt(n - 1)
        first = along[:, None] / sqrt(n) + across[:, None] * g / np.linalg.norm(g, axis=1, keepdims=True)
        x = np.concatenate([first, rng.standard_normal((draws, N - n))], axis=1)
        count = np.sum([s.p_effect(x[:, :m]) <= a * (1 + 1e-9) for m in range(4, N + 1)], axis=0)
        total, variance = total + np.mean(1 / count), variance + np.var(1 / count) / draws
    return a * total, a * sqrt(variance)


# --- levels ----------------------------------------------------------------------------------------------------------

TABLE = {5: (0.0323, 0.0672), 6: (0.0250, 0.0530), 8: (0.0181, 0.0393), 10: (0.0147, 0.0324), 12: (0.0127, 0.0282),
         16: (0.0103, 0.0231), 20: (0.0089, 0.0201), 30: (0.0070, 0.0161), 40: (0.0061, 0.0141), 50: (0.0055, 0.0129),
         60: (0.0052, 0.0120)}  # fmt: skip


@pytest.mark.parametrize("N", TABLE)
def test_level_per_look_is_the_one_of_the_specification(N):
    assert s.nominal(0.05, N) == pytest.approx(TABLE[N][0], abs=7e-5)
    assert s.nominal(0.10, N) == pytest.approx(TABLE[N][1], abs=7e-5)


def test_first_holm_step_of_fifteen():
    assert s.nominal(0.05 / 15, 20) == pytest.approx(0.00041, abs=5e-6)
    assert s.nominal(0.05 / 15, 40) == pytest.approx(0.00027, abs=6e-6)


def test_one_look_needs_no_correction():
    assert s.overall(0.03, 4) == 0.03 and s.nominal(0.05, 4) == pytest.approx(0.05)


@pytest.mark.parametrize("N", [5, 7, 14, 25, 50])
@pytest.mark.parametrize("level", [0.1, 0.05, 0.0033, 0.001])
def test_overall_level_is_true_at_maxima_it_was_not_fitted_to(N, level):
    true, error = expected_crossings(s.nominal(level, N), N, np.random.default_rng(N), draws=200)
    assert true == pytest.approx(level, rel=0.04, abs=3 * error)


@pytest.mark.parametrize("N", [8, 20, 60])
@pytest.mark.parametrize("a", [5e-5, 1e-6, 1e-10, 1e-14])
def test_tiny_p_values_are_never_understated(N, a):
    true, error = expected_crossings(a, N, np.random.default_rng(N), draws=60)
    assert s.overall(a, N) >= true - 4 * error and s.overall(a, N) <= (N - 3) * a * (1 + 1e-12)


@QUICK
@given(st.floats(1e-6, 0.5), st.integers(4, 60))
def test_nominal_inverts_overall(level, N):
    a = s.nominal(level, N)
    assert a <= level and s.overall(a, N) <= level * (1 + 1e-9) and s.overall(a * 1.0001, N) >= level * (1 - 1e-9)


@QUICK
@given(st.floats(1e-200, 1), st.floats(1e-200, 1), st.integers(4, 60))
def test_overall_never_falls_as_p_rises(a, b, N):
    assert s.overall(min(a, b), N) <= s.overall(max(a, b), N) <= 1 and s.overall(a, N) >= min(a, 1)


@pytest.mark.parametrize("N", [0, 3, 61, 7.5])
def test_maximum_outside_the_fit_is_refused(N):
    with pytest.raises(ValueError, match="whole number from 4 to 60"):
        s.overall(0.01, N)


# --- one look --------------------------------------------------------------------------------------------------------


@QUICK
@given(hnp.arrays(float, st.integers(2, 25), elements=NUMBERS, unique=True))
def test_p_effect_is_scipys_paired_t(d):
    assert s.p_effect(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=1e-9)


@QUICK
@given(hnp.arrays(float, st.integers(4, 25), elements=NUMBERS, unique=True), st.floats(0.01, 200))
def test_p_inside_is_twice_statsmodels_tost(d, margin):
    tost = DescrStatsW(d).ttost_mean(-margin, margin)[0]
    expected = min(1.0, 2 * tost) if abs(d.mean()) < margin else 1.0
    assert s.p_inside(d, margin) == pytest.approx(expected, rel=1e-9)


def test_signed_rank_is_scipys_exact_wilcoxon():
    rng = np.random.default_rng(0)
    for n in (4, 5, 8, 13, 20, 40):
        d = rng.standard_normal(n) + 0.4
        assert s.signed_rank(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, rel=1e-12)


def test_signed_rank_with_ties_by_enumerating_every_sign():
    for d in ([1, 1, -1, 2, 2, inf], [inf, inf, -inf, 3, 1, 0, nan, 2], [-inf, -inf, -inf], [0.5, 0.5, 0.5, 0.5, -0.1]):
        d = np.array(d, float)
        ranks = stats.rankdata(np.abs(d[~np.isnan(d) & (d != 0)]))
        won = ranks[d[~np.isnan(d) & (d != 0)] > 0].sum()
        sums = np.array([np.dot(signs, ranks) for signs in product([0, 1], repeat=len(ranks))])
        assert s.signed_rank(d) == pytest.approx(min(1, 2 * min(np.mean(sums <= won), np.mean(sums >= won))), rel=1e-12)


def test_signed_rank_of_pairs_that_say_nothing_is_one():
    assert s.signed_rank(np.array([0.0, nan, 0.0])) == 1.0 and s.sign(np.array([nan, 0.0])) == 0


def test_divergence_ranks_beyond_every_finite_difference():
    d = np.array([0.1, -3.0, 2.0, inf, 0.5, inf, -0.2, 1.0])
    assert s.p_effect(d) == s.signed_rank(np.where(np.isposinf(d), 1e9, d))


def test_never_inside_the_margin_where_a_run_diverged():
    d = np.array([0.01, -0.02, 0.01, 0.0, 0.005, inf])
    assert s.p_inside(d[:-1], 1.0) < 1e-6 and s.p_inside(d, 1.0) == 1.0 and s.p_inside(np.r_[d[:-1], nan], 1.0) == 1.0


def test_equal_differences_are_no_evidence_despite_rounding():
    assert s.p_effect(np.array([0.3 - 0.1, 0.5 - 0.3, 0.2, 0.7 - 0.5])) == 1.0
    assert s.p_inside(np.full(6, 0.2), 1.0) == 1.0
    assert s.p_effect(np.array([0.2, 0.2, 0.2, 0.2 + 1e-9])) < 1e-6


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 4e307])
def test_huge_and_tiny_differences_are_judged_as_others_are(scale):
    d = np.array([1.0, 3.0, 2.0, -1.0, 4.0, 2.0]) * scale
    plain = d / d.max()
    assert s.p_effect(d) == pytest.approx(s.p_effect(plain), rel=1e-6) and s.sign(d) == 1
    assert s.sign(np.array([1.7, 1.7, -1.7, -1.7, -1.0]) * 1e308) == -1  # the plain sum would overflow on its way
    assert s.interval(d)[1] / d.max() == pytest.approx(s.interval(plain)[1], rel=1e-5)


@QUICK
@given(differences(outcomes=DIVERGING))
def test_swapping_the_arms_flips_the_sign_and_nothing_else(d):
    assert s.p_effect(d) == s.p_effect(-d) and s.sign(d) == -s.sign(-d) and s.signed_rank(d) == s.signed_rank(-d)
    assert s.p_inside(d, 1.0) == s.p_inside(-d, 1.0)
    there, back = s.sequential(d, 1.0, 20), s.sequential(-d, 1.0, 20)
    assert (there.effect, there.inside, there.sign) == (back.effect, back.inside, -back.sign)
    (mean, low, high), (mean_, low_, high_) = s.interval(d), s.interval(-d)
    np.testing.assert_array_equal([mean, low, high], [-mean_, -high_, -low_])


def test_rank_direction_is_that_of_the_larger_rank_sum():
    assert s.sign(np.array([1.0, 2.0, -inf, nan])) == 0 and s.sign(np.array([1.0, 2.0, 0.0, 0.0, -inf, 3.0])) == 1
    assert s.sign(np.array([5.0, -1.0, -inf])) == -1


# --- the sequence ----------------------------------------------------------------------------------------------------


def test_before_the_fourth_pair_nothing_is_said():
    assert s.sequential([5.0, 5.1, 5.2], 1.0, 20) == (1.0, 1.0, 0.0)


def test_sequential_p_by_hand():
    d = np.array([0.2, 0.4, 0.1, 0.5, 0.3])
    t4, t5 = (stats.ttest_1samp(d[:n], 0).pvalue for n in (4, 5))
    p = s.sequential(d, 0.1, 10)
    assert p.effect == s.overall(min(t4, t5), 10) and p.sign == 1 and p.inside == 0.5


def test_direction_is_that_of_the_look_with_the_smallest_p():
    d = np.array([1.0, 1.1, 0.9, 1.05, -50.0])
    assert d.mean() < 0 and s.sequential(d, 0.1, 10).sign == 1 and s.sequential(-d, 0.1, 10).sign == -1


@QUICK
@given(differences(low=5, high=11, outcomes=DIVERGING), st.floats(0, 5))
def test_sequential_p_never_rises_as_pairs_come_in(d, margin):
    p = [s.sequential(d[:n], margin, 20)[:2] for n in range(1, len(d) + 1)]
    assert (np.diff(p, axis=0) <= 0).all()


@QUICK
@given(st.lists(st.lists(DIVERGING, min_size=8, max_size=8), min_size=2, max_size=5))
def test_many_studies_at_once_equal_one_by_one(studies):
    together = s.sequential(np.array(studies), 0.5, 8)
    for i, d in enumerate(studies):
        assert tuple(x[i] for x in together) == tuple(s.sequential(d, 0.5, 8))


def test_pairs_beyond_the_named_maximum_change_nothing():
    d = np.random.default_rng(1).standard_normal(12)
    assert s.sequential(np.r_[d, 99, 99, 99], 0.5, 12) == s.sequential(d, 0.5, 12)
    assert s.interval(np.r_[d, 99], 12) == s.interval(d, 12)


def test_null_shifts_the_effect_but_not_the_margin_around_zero():
    d = np.random.default_rng(2).standard_normal(10) * 0.1
    shifted = s.sequential(d, 0.5, 10, null=0.5)
    assert shifted.effect == s.sequential(d - 0.5, 0.5, 10).effect and shifted.sign == -1
    assert shifted.inside == s.sequential(d, 0.5, 10).inside < 0.05
    assert s.sequential(d, 0.5, 10, null=-0.5).inside == 0.5 and s.sequential(d, 0.5, 10, null=-0.5).sign == 1


@QUICK
@given(differences(low=4, high=20))
def test_interval_excludes_zero_exactly_where_the_look_rejects(d):
    _, low, high = s.interval(d, 20)
    assert (low > 0 or high < 0) == (s.p_effect(d) <= s.nominal(0.05, 20))


def test_midranks_are_scipys():
    rng = np.random.default_rng(0)
    d = rng.integers(-3, 4, (500, 12)) + rng.normal(size=(500, 12)) * (rng.random((500, 12)) < 0.5)
    for value in (np.inf, -np.inf, np.nan):
        d[rng.random(d.shape) < 0.1] = value
    for row, doubled in zip(d, s.doubled_ranks(d), strict=True):
        says = ~np.isnan(row) & (row != 0)
        assert (doubled[says] == 2 * stats.rankdata(np.abs(row[says]))).all() and not doubled[~says].any()


def test_interval_by_scipy():
    d = np.random.default_rng(3).standard_normal(9)
    low, high = stats.t.interval(1 - s.nominal(0.05, 20), 8, d.mean(), stats.sem(d))
    assert s.interval(d, 20) == pytest.approx((d.mean(), low, high), rel=1e-12)
    assert s.interval(np.r_[d, inf, nan], 20) == s.interval(d, 20)
    low, high = stats.t.interval(0.95, 8, d.mean(), stats.sem(d))
    assert s.paired_interval(d) == pytest.approx((d.mean(), low, high), rel=1e-12)


def test_interval_without_spread_has_no_end():
    assert s.interval([0.3], 20) == (0.3, -inf, inf) and s.interval([0.25] * 5, 20) == (0.25, -inf, inf)
    assert s.interval([inf, nan], 20)[1:] == (-inf, inf)


@QUICK
@given(differences(low=1, high=20, outcomes=DIVERGING), st.floats(0.1, 3), st.sampled_from([0.05, 0.05 / 3, 0.05 / 15]))
def test_ledger_shows_each_crossing(d, margin, level):
    a, wide = s.nominal(level, 20), s.nominal(2 * level, 20)
    steps = s.looks(d, margin, 20, level)
    assert [x.pairs for x in steps] == list(range(4, len(d) + 1))
    for x in steps:
        if not abs(x.p / a - 1) < 1e-9:
            assert (abs(x.statistic) >= x.boundary) == (x.p <= a)
        if abs((p := s.p_inside(d[: x.pairs], margin)) / wide - 1) > 1e-9:
            assert (x.inside >= x.inside_boundary) == (p <= wide)


def test_ledger_statistics_are_scipys():
    d = np.array([0.2, 0.4, 0.1, -0.5, 0.3, inf])
    four, five, six = s.looks(d, 0.1, 20)
    assert (four.test, five.test, six.test) == ("t", "t", "signed rank")
    assert five.statistic == pytest.approx(stats.ttest_1samp(d[:5], 0).statistic, rel=1e-12)
    assert five.boundary == pytest.approx(stats.t.isf(s.nominal(0.05, 20) / 2, 4), rel=1e-9)
    assert six.statistic == 1 + 2 + 3 + 4 - 5 + 6 and six.boundary == inf and six.inside == -inf


# --- other tests -----------------------------------------------------------------------------------------------------

MODERATED, CORRECTED, BOUNDED = s.Test("moderated", 0.7), s.Test("skew_corrected"), s.Test("skew_bounded")


def test_fisher_is_scipys_on_every_table():
    for n in (3, 5, 8, 12):
        for control, treatment in product(range(n + 1), repeat=2):
            both = min(control, treatment) // 2
            lost = [nan] * both + [inf] * (control - both) + [-inf] * (treatment - both)
            if len(lost) <= n:
                d = np.array(lost + [0.3] * (n - len(lost)))
                table = [[control, n - control], [treatment, n - treatment]]
                assert s.fisher(d) == pytest.approx(stats.fisher_exact(table).pvalue, rel=1e-9)


def test_pairs_that_fisher_needs_where_a_control_always_diverges():
    for N, level, needed in ((12, 0.05, 5), (20, 0.05, 5), (40, 0.05, 6), (12, 0.05 / 15, 7), (20, 0.05 / 15, 8)):
        before, there = (s.sequential(np.full(n, inf), 0.1, N) for n in (needed - 1, needed))
        assert there.effect <= level < before.effect and there.sign == before.sign == 1.0
    assert s.sequential(np.full(5, -inf), 0.1, 20).sign == -1.0
    (four, five) = s.looks(np.full(5, inf), 0.1, 20)
    assert (five.test, five.statistic, five.boundary) == ("Fisher's exact test", 5.0, 5.0)
    assert four.p == pytest.approx(2 / 70) and four.boundary == inf


def test_moderated_t_by_hand():
    d = np.array([0.3, 0.5, 0.1])
    spread = (3 * 0.7 + 2 * d.var(ddof=1)) / 5
    t = d.mean() / sqrt(spread / 3)
    assert s.p_effect(d, test=MODERATED) == pytest.approx(2 * stats.t.sf(t, 5))
    inside = (0.9 - d.mean()) / sqrt(spread / 3)
    assert s.p_inside(d, 0.9, MODERATED) == pytest.approx(2 * stats.t.sf(inside, 5))
    half = stats.t.isf(s.nominal(0.05, 20, MODERATED) / 2, 5) * sqrt(spread / 3)
    assert s.interval(d, 20, test=MODERATED) == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert s.sequential(d, 0.1, 20, test=MODERATED).effect == s.overall(s.p_effect(d, test=MODERATED), 20, MODERATED)
    assert s.p_effect(np.full(3, 0.2), test=MODERATED) == 1  # equal differences are no random measure here either


@pytest.mark.parametrize("N, level", [(4, 0.05), (12, 0.05), (20, 0.05), (20, 0.0033), (50, 0.1)])
def test_level_of_the_moderated_t_is_inverted(N, level):
    a = s.nominal(level, N, MODERATED)
    assert s.overall(a, N, MODERATED) == pytest.approx(level, rel=1e-6) and a < level
    assert s.overall(1e-9, N, MODERATED) < s.overall(1e-7, N, MODERATED) < s.overall(6e-5, N, MODERATED)


@pytest.mark.parametrize("name, prior", [("t", 1.0), ("moderated", 0.0), ("moderated", nan), ("moderatd", 1.0)])
def test_tests_that_do_not_exist_are_refused(name, prior):
    with pytest.raises(ValueError, match="A test is one of|cannot have a prior"):
        s.Test(name, prior)


@QUICK
@given(differences(3), st.sampled_from([MODERATED, CORRECTED, BOUNDED]))
def test_looks_of_other_tests_show_each_crossing(d, test):
    a, wide = s.nominal(0.05, 20, test), s.nominal(0.1, 20, test)
    steps = s.looks(d, 5.0, 20, test=test)
    assert [x.pairs for x in steps] == list(range(test.first, len(d) + 1))
    for x in steps:
        assert x.p == s.p_effect(d[: x.pairs], test=test)
        if abs(x.p / a - 1) > 1e-9:
            assert (abs(x.statistic) >= x.boundary) == (x.p <= a)
        if abs((p := s.p_inside(d[: x.pairs], 5.0, test)) / wide - 1) > 1e-9:
            assert (x.inside >= x.inside_boundary) == (p <= wide)


def test_signed_rank_floors_of_the_specification():
    assert (s.rank_pairs(20), s.rank_pairs(40), s.rank_pairs(20, 0.05 / 15)) == (8, 9, 13)
    assert s.signed_rank(np.arange(1.0, 9)) <= s.nominal(0.05, 20) < s.signed_rank(np.arange(1.0, 8))


def test_rank_check_says_when_it_cannot_say():
    rng = np.random.default_rng(4)
    assert s.rank_check(rng.standard_normal(7) + 9) == "cannot say yet"
    assert s.rank_check(rng.standard_normal(12) + 3) == "agrees"
    assert s.rank_check(np.r_[np.linspace(1, 1.1, 12), -9.0], 13) == "agrees"
    outlier = np.r_[1.0, 1.3, 0.7, -0.01, 14.0, 1.2, 0.9, 1.1, 1.4, 0.8, 1.5]
    assert s.p_effect(outlier) > s.nominal(0.05, 20) and s.signed_rank(outlier) <= s.nominal(0.05, 20)
    assert s.rank_check(outlier) == "disagrees"


# --- family ----------------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=8), st.integers(0, 7))
def test_holm_counts_claims_not_run_as_one(p, unrun):
    """Holm (1979): the ordered p_(1) <= ... <= p_(m) are rejected as long as p_(i) <= alpha / (m + 1 - i)."""
    m, rejected_in_order = len(p) + unrun, []
    for i, value in enumerate(sorted(p), 1):
        if value > 0.05 / (m + 1 - i):
            break
        rejected_in_order.append(value)
    rejected, levels = s.holm(p, m)
    assert rejected == [x in rejected_in_order for x in p]
    assert rejected == [x <= level for x, level in zip(p, levels, strict=True)]


@pytest.mark.slow
@settings(QUICK, max_examples=15)  # multipletests takes 60 ms a call, and its import seconds
@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=8), st.integers(0, 7))
def test_holm_is_statsmodels_with_claims_not_run_counted_as_one(p, unrun):
    from statsmodels.stats.multitest import multipletests

    rejected, levels = s.holm(p, len(p) + unrun)
    padded = p + [1.0] * unrun
    assert rejected == list(multipletests(padded, 0.05, "holm")[0][: len(p)])
    assert rejected == [x <= level for x, level in zip(p, levels, strict=True)]


def test_holm_levels_by_hand():
    rejected, levels = s.holm([0.04, 0.001, 0.012, 0.2], 5)
    assert rejected == [False, True, True, False]
    assert levels == pytest.approx([0.05 / 3, 0.05 / 5, 0.05 / 4, 0.05 / 3])


def test_one_claim_too_many_for_the_family_is_refused():
    with pytest.raises(ValueError, match="named with 2 claims, and 3 are judged"):
        s.holm([0.1, 0.2, 0.3], 2)
    with pytest.raises(ValueError, match="p-value for every claim"):
        s.holm([0.1, nan], 2)
    with pytest.raises(ValueError, match="p-value for every claim judged, got 1.5"):
        s.holm([1.5], 2)
    assert s.holm([], 3) == ([], [])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "d, sentence",
    [
        ([0.5], "at least 2"),
        ([nan, nan, nan], "Every difference is NaN"),
        ([0.1, 0.2, inf], "no finite difference"),
        ([0.2, 0.2, 0.2], "not a random measure"),
    ],
)
def test_unusable_differences_are_refused_each_with_its_sentence(d, sentence):
    with pytest.raises(ValueError, match=sentence):
        s.paired_interval(d)


def test_pairs_of_the_rank_test_and_levels_out_of_range():
    assert s.rank_pairs(20) == 8
    with pytest.raises(ValueError, match="at least 2 differences"):
        s.p_effect([1.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        s.nominal(5, 20)


@pytest.mark.process
def test_import_costs_only_numpy():
    code = (
        "import sys, albert_ablate.stats.sequential, albert_ablate.stats.effects, "
        "albert_ablate.stats.learning_rate, albert_ablate.stats.verdicts; "
        "print(sorted({'torch', 'scipy', 'pandas', 'statsmodels'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
