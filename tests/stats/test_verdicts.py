"""Every word of the verdict, each from differences that call for it; parts; what the ledger keeps."""

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from albert_ablate.stats import sequential as s
from albert_ablate.stats.verdicts import Claim, Contrast, combine, deciding_look, verdicts, within_reach

WAVE = np.array([1, -1, 0.5, -0.5, 0.8, -0.8, 0.2, -0.2, 0.6, -0.6, 1, -1, 0.5, -0.5, 0.8, -0.8, 0.2, -0.2, 0.6, -0.6])


def judge(d, margin=0.1, N=20, m=1, needs="one", **contrast):
    d = d if isinstance(d, list) else [d]
    parts = [x if isinstance(x, Contrast) else Contrast(x, margin, **contrast) for x in d]
    return verdicts([Claim(parts, N, needs)], m)[0]


@pytest.mark.parametrize(
    "d, word",
    [
        ([], "open"),
        (3 + WAVE[:3], "undecided"),
        (3 + WAVE[:8], "supported"),
        (-3 + WAVE[:8], "refuted"),
        (0.01 * WAVE[:8], "no effect"),
        (0.03 + 0.01 * WAVE[:10], "no effect"),  # although it excludes 0
        (0.6 + WAVE[:7], "undecided"),
        (0.0 + WAVE[:8], "inconclusive"),  # out of reach
        (0.35 + WAVE, "inconclusive"),  # at N
        (np.full(6, 0.2), "inadmissible"),
        (np.full(8, nan), "inadmissible"),
        (np.r_[np.full(12, 2.0) + WAVE[:12], inf], "supported"),
        (np.r_[3 + WAVE[:12], -inf], "mixed"),
        (np.r_[-3 + WAVE[:12], inf], "mixed"),
        (np.r_[-3 + WAVE[:12], -inf], "refuted"),
        (np.full(8, inf), "supported"),  # only the control diverges, on every seed
        (np.full(5, inf), "supported"),  # by Fisher's test, which the signed rank needs 8 pairs for
        (np.full(4, inf), "undecided"),
        (np.tile([inf, -inf], 4), "undecided"),
        (np.tile([inf, -inf], 10), "inconclusive"),
        (np.r_[np.zeros(12), inf], "undecided"),
        (np.r_[np.zeros(13), inf], "undecided"),  # 8 diverged of 20 would do
        (np.r_[np.zeros(15), inf], "inadmissible"),  # at most 5 pairs that say something are left
        (np.r_[0.35 + WAVE, np.full(9, 99.0)], "inconclusive"),  # pairs beyond N are not looked at
    ],
)
def test_each_word_has_its_differences(d, word):
    found = judge(np.asarray(d, float))
    assert found.verdict == word and found.reason.endswith(".")


def test_equal_differences_of_a_discrete_measure_are_evidence():
    same = np.full(8, 0.4)
    found = judge(same, discrete=True)
    assert found.verdict == "supported" and judge(-same, discrete=True).verdict == "refuted"
    assert found.p_effect == s.overall(2.0**-7, 20) and found.parts[0].rank == "agrees"
    assert (found.parts[0].looks[-1].test, found.parts[0].low) == ("signed rank", -inf)
    assert judge(same[:7], discrete=True).verdict == "undecided" and judge(same).verdict == "inadmissible"
    assert judge(np.r_[same, 0.6], discrete=True).parts[0].looks[-1].test == "t"
    assert judge(np.zeros(8), discrete=True).verdict == "undecided"
    assert judge(np.zeros(20), discrete=True).verdict == "inconclusive"  # no difference seen proves none smaller


def test_out_of_reach_is_told_from_reaching_the_maximum():
    assert "Out of reach" in judge(WAVE[:8]).reason and "All 20 pairs" in judge(0.35 + WAVE).reason
    assert judge(np.r_[WAVE[:8], inf]).verdict == "undecided"


def test_reach_of_no_effect_is_that_of_the_90_percent_interval():
    d = WAVE[:8]
    narrow, wide = (s.FUTILE * s.critical(20, 20, level) * d.std(ddof=1) / 20**0.5 for level in (0.10, 0.05))
    between = (narrow + wide) / 2
    assert within_reach(Claim([Contrast(d, between)])) and not within_reach(Claim([Contrast(d, 0.99 * narrow)]))
    assert not within_reach(Claim([Contrast(d, between, "-margin")]))  # being inside is no verdict there


FLIP = {"supported": "refuted", "refuted": "supported"}


@settings(max_examples=40, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 20), st.lists(st.sampled_from([0.0, inf, -inf, nan]), min_size=20, max_size=20))
def test_swapping_the_arms_swaps_supported_and_refuted_only(effect, n, events):
    d = np.where(np.array(events) == 0, effect + WAVE, events)[:n]
    there, back = judge(d), judge(-d)
    assert back.verdict == FLIP.get(there.verdict, there.verdict)
    assert (there.p_effect, there.p_inside) == (back.p_effect, back.p_inside)
    assert (there.parts[0].low, there.parts[0].high, there.parts[0].lost) == (
        -back.parts[0].high, -back.parts[0].low, -back.parts[0].lost)  # fmt: skip


def test_better_by_the_margin_and_not_worse_than_the_margin():
    assert judge(1.0 + 0.1 * WAVE[:8], margin=0.1, null="margin").verdict == "supported"
    assert judge(0.2 + 0.1 * WAVE[:8], margin=0.5).verdict == "no effect"
    assert judge(0.05 + 0.1 * WAVE[:8], margin=0.5, null="margin").verdict == "no effect"
    assert judge(0.05 + 0.1 * WAVE[:8], margin=0.5, null="-margin").verdict == "supported"
    assert judge(-1.0 + 0.1 * WAVE[:8], margin=0.5, null="-margin").verdict == "refuted"
    assert judge(2.0 + 0.1 * WAVE[:8], margin=0.5, null=0).verdict == "supported"


def test_a_whole_effect_within_the_tuning_slack_is_withheld():
    d = 0.5 + 0.1 * WAVE[:8]
    assert judge(d, slack=0.4).verdict == "supported" and judge(d, slack=0.6).verdict == "within tuning slack"
    assert judge(-d, slack=0.6).verdict == "within tuning slack"
    assert judge(0.01 * WAVE[:8], slack=0.6).verdict == "no effect"


def test_a_dead_factorial_cell_gives_mixed():
    found = judge(3 + WAVE[:8], mixed="The cell adam diverged on every seed.")
    assert (found.verdict, found.reason) == ("mixed", "The cell adam diverged on every seed.")


YES, NO, NULL, OPEN = 3 + WAVE[:10], -3 + WAVE[:10], 0.01 * WAVE[:10], 0.6 + WAVE[:7]


@pytest.mark.parametrize(
    "needs, parts, word",
    [
        ("all", [YES, YES], "supported"),
        ("all", [YES, OPEN], "undecided"),
        ("all", [YES, NO], "refuted"),
        ("all", [YES, NULL], "refuted"),
        ("all", [YES, Contrast(NULL, 0.1, "-margin")], "supported"),
        ("all", [NULL, NULL], "refuted"),
        ("all", [YES, np.r_[YES, -inf]], "mixed"),
        ("any", [YES, NO], "supported"),
        ("any", [OPEN, YES], "supported"),
        ("any", [NO, NO], "refuted"),
        ("any", [NULL, NULL], "no effect"),
        ("any", [NULL, OPEN], "undecided"),
        ("any", [NO, OPEN], "undecided"),
    ],
)
def test_parts_join_as_the_claim_needs(needs, parts, word):
    assert judge(parts, needs=needs).verdict == word


def test_joined_p_values_by_hand():
    p = [s.Sequential(0.01, 0.5, 1.0), s.Sequential(0.04, 0.3, 1.0), s.Sequential(0.02, 0.02, -1.0)]
    together = combine(p, "all")
    assert (together.effect, together.supports, together.deciding) == (pytest.approx(0.06), False, [2])
    assert together.inside == pytest.approx(0.06)
    assert combine(p[:2], "all").effect == 0.04 and combine(p[:2], "all").deciding == [0, 1]
    one_of = combine(p, "any")
    assert (one_of.effect, one_of.supports, one_of.deciding, one_of.inside) == (pytest.approx(0.03), True, [0], 0.5)


def test_all_parts_at_the_null_keep_five_percent():
    d = np.random.default_rng(0).standard_normal((2000, 3, 20))
    parts = s.sequential(d, 0.0, 20)
    wrong = [combine([s.Sequential(*x) for x in zip(*(v[i] for v in parts), strict=True)], "all").effect <= 0.05
             for i in range(2000)]  # fmt: skip
    assert np.mean(wrong) <= 0.05


def test_family_counts_claims_that_were_not_run():
    d = 1 + WAVE[:10]
    p = s.sequential(d, 0.0, 20).effect
    assert 0.05 / 15 < p <= 0.05
    claim = Claim([Contrast(d, 0.1)])
    assert verdicts([claim], 1)[0].verdict == "supported" and verdicts([claim], 15)[0].verdict == "undecided"
    assert verdicts([claim], 15)[0].level_effect == 0.05 / 15


def test_an_inadmissible_claim_still_counts_and_never_rejects():
    claims = [Claim([Contrast(np.full(6, 0.2), 0.1)]), Claim([Contrast(YES, 0.1)])]
    first, second = verdicts(claims, 2)
    assert first.verdict == "inadmissible" and "not a random measure" in first.reason
    assert second.verdict == "supported" and second.level_effect == 0.05 / 2


def test_five_pairs_with_a_divergence_never_reach_the_level():
    found = judge(np.array([0.5, inf, 0.3, 0.8]), N=5)
    assert found.verdict == "inadmissible" and "signed rank needs 6 pairs" in found.reason
    assert judge(np.array([0.5, inf, 0.3, 0.8]), N=8).verdict == "undecided"


def test_a_verdict_before_the_divergence_stands():
    assert judge(np.r_[3 + WAVE[:4], -3.0, inf], N=6).verdict == "supported"
    assert judge(np.r_[0.001 * WAVE[:5], inf], N=6).verdict == "no effect"


def test_ledger_of_looks_agrees_with_the_verdict():
    claims = [Claim([Contrast(x, 0.1)]) for x in (YES, NO, NULL, OPEN, 0.3 + WAVE)]
    for found in verdicts(claims, 7):
        steps = found.parts[0].looks
        assert any(abs(x.statistic) >= x.boundary for x in steps) == (found.p_effect <= found.level_effect)
        assert any(x.inside >= x.inside_boundary for x in steps) == (found.p_inside <= found.level_inside)


def test_same_differences_same_ledger():
    claims = [Claim([Contrast(YES, 0.1)]), Claim([Contrast(np.r_[WAVE, inf], 0.1)])]
    assert repr(verdicts(claims, 3)) == repr(verdicts(claims, 3))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1.5, 1.5), st.integers(4, 20), st.sampled_from(["0", "margin", "-margin"]))
def test_a_decided_claims_interval_excludes_its_null_value(seed, effect, n, null):
    rng = np.random.default_rng(seed)
    d = np.r_[effect + rng.standard_normal(n), rng.standard_normal(20 - n) - effect]  # what is decided may turn later
    found, shift = judge(d, null=null, margin=0.3), {"0": 0.0, "margin": 0.3, "-margin": -0.3}[null]
    part = found.parts[0]
    if found.verdict in ("supported", "refuted"):
        assert not part.low <= shift <= part.high
        way = "greater" if found.verdict == "supported" else "less"
        p = [2 * stats.ttest_1samp(d[:k], shift, alternative=way).pvalue for k in range(4, 21)]
        assert deciding_look(part, found.verdict) == 4 + [x <= s.nominal(0.05, 20) for x in p].index(True)
    elif found.verdict != "no effect":
        assert part.low <= shift <= part.high


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(-1.5, 1.5),
    st.integers(3, 20),
    st.sampled_from(["moderated", "skew_corrected", "skew_bounded"]),
)
def test_intervals_of_other_tests_agree_with_their_verdicts(seed, effect, n, name):
    rng = np.random.default_rng(seed)
    d = np.r_[effect + rng.standard_normal(n), rng.standard_normal(20 - n) - effect]
    found = judge(d, margin=0.3, test=s.Test(name, 1.0 if name == "moderated" else 0.0))
    part = found.parts[0]
    if found.verdict in ("supported", "refuted"):
        assert not part.low <= 0 <= part.high and deciding_look(part, found.verdict) >= part.looks[0].pairs
    elif found.verdict != "no effect" and name == "moderated":
        assert part.low <= 0 <= part.high


def test_an_interval_is_the_intersection_over_looks():
    d = np.r_[2 + WAVE[:8], -1.0 + WAVE[8:]]
    each = [s.interval(d[:n], 20) for n in range(4, 21)]
    part = judge(d).parts[0]
    assert (part.low, part.high) == (max(x[1] for x in each), min(x[2] for x in each))
    assert each[-1][1] < 0 < part.low and 4 < deciding_look(part, "supported") <= 8 and part.mean == each[-1][0]
    drift = np.r_[0.1 * WAVE[:6], 1 + 0.01 * np.arange(14)]  # early looks are sure of 0, the last of far more
    (low, high), torn = zip(*(s.interval(drift[:n], 20)[1:] for n in range(4, 21)), strict=True), judge(drift).parts[0]
    assert max(low) > min(high) and np.isnan([torn.low, torn.high]).all() and torn.mean == drift.mean()
    assert s.running_interval(WAVE[:3], 20) == s.interval(WAVE[:3], 20)


def test_part_reports_the_seeds_where_both_finished():
    part = judge(np.r_[1.0, 2.0, 3.0, 4.0, inf, nan, -inf, inf]).parts[0]
    assert (part.pairs, part.finished, part.lost, part.mean) == (8, 4, 1, 2.5)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Contrast([1.0], -0.1), "finite number that is not negative"),
        (lambda: Contrast([1.0], 0.1, "half"), "one of 0, margin, -margin"),
        (lambda: Claim([Contrast([1.0], 0.1)] * 2), "needs 'one' cannot have 2"),
        (lambda: Claim([], needs="all"), "cannot have 0"),
        (lambda: Claim([Contrast([1.0], 0.1)], needs="most"), "one of one, all, any"),
        (lambda: judge(YES, N=80), "from 4 to 60, got 80"),
    ],
)
def test_contradictory_claims_are_refused_with_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
