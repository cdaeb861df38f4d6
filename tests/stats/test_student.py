"""Skew of paired differences and the t tests that are corrected for it, against scipy and by hand."""

from math import sqrt

import numpy as np
import pytest
from scipy import stats

from albert_ablate.stats import sequential as s
from albert_ablate.stats import student

CORRECTED, BOUNDED = s.Test("skew_corrected"), s.Test("skew_bounded")


def test_skew_is_scipys_and_its_error_is_that_of_normal_samples():
    d = np.random.default_rng(0).gamma(2, size=(20_000, 9))
    assert student.skew(d) == pytest.approx(stats.skew(d, axis=-1, bias=False), rel=1e-9)
    normal = student.skew(np.random.default_rng(1).standard_normal((20_000, 9)))
    assert normal.std() == pytest.approx(student.skew_error(9), rel=0.03)
    assert np.isnan(student.skew(np.full(5, 2.0)))


def test_johnsons_t_by_hand():
    d = np.array([0.1, 0.4, 0.2, 0.3, 1.9, 0.2, 0.5, 0.1])
    t, g = stats.ttest_1samp(d, 0).statistic, stats.skew(d, bias=False)
    modified = t + g * (1 / 6 + t**2 / 3) / sqrt(8)
    assert student.p_johnson(d) == pytest.approx(2 * stats.t.sf(modified, 7))
    assert student.p_johnson(-d) == student.p_johnson(d) == pytest.approx(student.p_johnson(d + 3, 3))
    low = d - 1.2  # the mean lies away from the tail, which makes t too large
    assert student.p_johnson(low) > s.p_effect(low) == pytest.approx(stats.ttest_1samp(low, 0).pvalue)
    assert s.p_effect(low, test=CORRECTED) == student.p_johnson(low)
    assert s.sequential(5 + d[:7], 0.1, 20, test=CORRECTED).effect == 1 and CORRECTED.first == 8


def test_halls_t_by_hand():
    d = np.array([0.1, 0.4, 0.2, 0.3, 1.9, 0.2, 0.5, 0.1])
    t, g = stats.ttest_1samp(d, 0).statistic, stats.skew(d, bias=False)
    g -= sqrt(6 * 8 * 7 / (6 * 9 * 11))  # one standard error in the direction of t
    a = g / (3 * sqrt(8))
    transformed = ((1 + a * t) ** 3 - 1) / (3 * a) + g / (6 * sqrt(8))  # the cubic that it is
    assert student.p_hall(d) == pytest.approx(2 * stats.t.sf(transformed, 7))
    assert student.p_hall(-d) == student.p_hall(d) == pytest.approx(student.p_hall(d + 3, 3))
    assert s.p_effect(d, test=BOUNDED) == max(student.p_hall(d), student.p_johnson(d), stats.ttest_1samp(d, 0).pvalue)
    even = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])  # without a skew it still asks for more than t
    assert student.p_hall(even) > stats.ttest_1samp(even, 0).pvalue
    assert s.sequential(5 + d[:7], 0.1, 20, test=BOUNDED).effect == 1 and BOUNDED.first == 8
