"""Measures on curves whose answer can be worked out by hand; every measure of two arms flips with its arms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_ablate.analysis.measures import (
    cost_per_verdict,
    depth_imbalance,
    entropy_floor,
    first_reached,
    gap_at_equal_training_loss,
    growth_exponent,
    largest_logit,
    largest_stable_rate,
    largest_update,
    loss_at_equal_budget,
    mean_loss,
    roughness,
    speedup,
    speedup_over_control,
    spike_score,
    spread_over_depth,
)

FAST, SLOW = ([100, 200, 400], [4.0, 2.0, 1.5]), ([100, 200, 400], [4.0, 3.0, 2.0])


def test_a_loss_is_reached_on_the_straight_line_between_points():
    assert first_reached(FAST, 3.0) == 150 and first_reached(FAST, 4.0) == 100 and first_reached(FAST, 1.0) == math.inf
    assert first_reached(([1, 2, 3], [5, 1, 4]), 3.0) == 1.5  # the first time, whatever comes later


def test_speedup_is_to_the_worse_final_loss():
    assert speedup(FAST, SLOW) == pytest.approx(math.log(400 / 200))
    assert speedup(FAST, FAST) == 0
    with pytest.raises(ValueError, match="judged as diverged"):
        speedup(FAST, ([1, 2], [3, math.nan]))


def test_an_arm_beats_its_copy_at_most_by_the_controls_loss():
    lucky, unlucky = ([1, 2, 3, 4], [4, 3, 2, 2.5]), ([1, 2, 3, 4], [4, 3, 2.4, 2.5])
    assert speedup_over_control(FAST, SLOW) == pytest.approx(math.log(400 / 200))
    assert speedup_over_control(SLOW, FAST) == -math.inf
    assert speedup_over_control(lucky, unlucky) > 0 and speedup_over_control(unlucky, lucky) > 0
    assert speedup(lucky, unlucky) == -speedup(unlucky, lucky)


def test_loss_at_an_equal_budget_is_that_of_the_smaller_end():
    longer = ([0, 800], [4.0, 2.0])  # 3.0 at 400, where FAST has ended with 1.5
    assert loss_at_equal_budget(FAST, longer) == pytest.approx(math.log(2)) == -loss_at_equal_budget(longer, FAST)
    with pytest.raises(ValueError, match="no x in common"):
        loss_at_equal_budget(FAST, ([500, 600], [1, 1]))
    with pytest.raises(ValueError, match="finite positive losses"):
        loss_at_equal_budget(FAST, ([100, 400], [1, math.nan]))


curves = st.lists(st.floats(0.5, 9), min_size=2, max_size=12)


@settings(max_examples=200, deadline=None)
@given(curves, curves)
def test_measures_of_two_arms_flip_exactly(a, b):
    a, b = [9.5, *a], [9.5, *b]
    one, two = (np.arange(1, len(a) + 1), a), (np.arange(1, len(b) + 1), b)
    assert speedup(one, two) == -speedup(two, one)
    assert loss_at_equal_budget(one, two) == -loss_at_equal_budget(two, one)
    n = min(len(a), len(b))
    assert gap_at_equal_training_loss((a[:n], b[:n]), (b[:n], a[:n])) == -gap_at_equal_training_loss(
        (b[:n], a[:n]), (a[:n], b[:n])
    )


def test_mean_loss_is_the_area_over_the_length():
    assert mean_loss(([0, 1, 3], [4, 2, 2])) == pytest.approx((3 + 4) / 3)


def test_spike_score_counts_planted_spikes_and_nothing_else():
    values = np.random.default_rng(0).standard_normal(6000)
    assert spike_score(values) == 0
    values[[2000, 3500, 5000]] += 30
    assert spike_score(values) == 3 / 5000
    assert spike_score(1e6 + 1e-3 * values) == 3 / 5000  # small changes on a large level
    assert math.isnan(spike_score(values[:1000]))
    assert spike_score([1.0] * 20 + [1.1, 1.0, math.nan], window=20) == pytest.approx(2 / 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=12, max_size=40), st.integers(2, 10))
def test_spike_score_is_its_definition(values, window):
    x = np.array(values)
    far = []
    for i in range(window, len(x)):
        before = x[i - window : i]
        far.append(abs(x[i] - before.mean()) >= 2 * before.std() and abs(x[i] - before.mean()) > 1e-9)
    near = [
        abs(abs(x[i] - x[i - window : i].mean()) - 2 * x[i - window : i].std()) < 1e-6 for i in range(window, len(x))
    ]
    if not any(near):  # rounding decides there
        assert spike_score(x, window, 2.0) == pytest.approx(np.mean(far))


def test_stability_measures_by_hand():
    assert roughness([3, 2, 3, 2]) == 1 and math.isnan(roughness([3]))
    rates = [1e-2, 1e-3, 1e-1, 1e-4]
    assert largest_stable_rate(rates, [False, False, True, False]) == 1e-2
    assert (
        largest_stable_rate(rates, [False, True, False, False]) == 1e-4
    )  # what is above an unstable one does not count
    assert largest_stable_rate(rates, [False, False, False, True]) == 0
    assert depth_imbalance([8, 1, 2]) == pytest.approx(math.log(4)) == depth_imbalance([2, 1, 8])
    assert growth_exponent(1, math.e**6, 12) == pytest.approx(0.5)
    layers = [[2.0, math.nan, 1.5], [1.9, math.nan, -0.1]]  # logged steps x places in depth
    assert (entropy_floor(layers), largest_logit(layers), largest_update(layers)) == (-0.1, 2.0, 2.0)
    assert spread_over_depth([1, math.e**2]) == pytest.approx(1) and spread_over_depth([[3, 3], [1, 1]]) == 0
    assert spread_over_depth([[1, math.nan, math.e**2], [math.nan] * 3]) == pytest.approx(1)


def test_generalization_measures_by_hand():
    # training losses meet at 2.0: the treatment's validation loss is then 2.5, the control's 3.0
    treatment, control = ([4, 3, 1], [4, 3, 2]), ([4, 2], [4, 3])
    assert gap_at_equal_training_loss(treatment, control) == pytest.approx(0.5)


def test_a_verdict_costs_all_runs_over_what_they_decided():
    words = ["supported", "undecided", "no effect", "inadmissible", "mixed", "inconclusive", "refuted", "open"]
    assert cost_per_verdict([10.0, 20.0, 30.0], words) == 20 and cost_per_verdict([1.0], ["open"]) == math.inf


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: mean_loss(([1], [2])), "at least two points"),
        (lambda: first_reached(([2, 1], [1, 1]), 1), "must rise"),
        (lambda: first_reached(([1, 2], [1]), 1), "as many x as y"),
        (lambda: largest_stable_rate([1], []), "Each rate needs an outcome"),
        (lambda: depth_imbalance([0, 1]), "gradients in the first and the last"),
        (lambda: spike_score([1] * 5, window=1), "at least two values"),
        (lambda: growth_exponent(0, 1, 3), "positive sizes"),
        (lambda: spread_over_depth([math.nan, math.nan]), "must be positive"),
        (lambda: spread_over_depth([1.0, 0.0]), "must be positive"),
        (lambda: entropy_floor([[math.nan]]), "at least one value"),
        (lambda: speedup_over_control(FAST, ([1, 2], [3, math.nan])), "finite final loss"),
    ],
)
def test_numbers_that_make_no_measure_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
