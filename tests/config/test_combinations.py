"""Any combination of options either trains a step or is refused at once with a reason; all arms of a seed pair."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_contracts import NEEDS

from albert_ablate import build_model
from albert_ablate.config import ConfigError, checked_config, options
from albert_ablate.training.contracts import TINY, batches, train

VARIED = ("norm", "norm_type", "attention", "dropout", "dropout_time", "optimizer", "schedule", "clip", "loss")
OPTIONS = options()
ARMS = st.fixed_dictionaries(
    {group: st.sampled_from(OPTIONS[group]) for group in VARIED},
    optional={
        "model.tied": st.just("true"),
        "model.shared": st.just("true"),
        "dropout.mean": st.sampled_from(["0.05", "0.3"]),
        "data.accumulate": st.just("2"),
        "model.layers": st.sampled_from(["1", "3"]),
    },
)


def admissible(arm):
    """The checked configuration, or None where it is refused, which must be with one sentence."""
    overrides = {**dict(o.split("=", 1) for o in TINY), **arm}
    try:
        return checked_config([f"{k}={v}" for k, v in overrides.items()])
    except ConfigError as error:
        reason = str(error)
        assert reason and "\n" not in reason and "Traceback" not in reason
        return None


REFERENCE = {}  # parameter and shape -> hash of its draw, of all arms so far: they have one seed


def trains_and_pairs(arm):
    cfg = admissible(arm)
    if cfg is None:
        return False
    trained = train(cfg, steps=1)
    model, moved, trace = trained.model, trained.moved, trained.trace
    assert all(math.isfinite(x) for x in trace[0]), trace
    assert all(p.isfinite().all() for p in model.parameters())
    # a rule may skip the step; the first gradient of soap only makes its bases
    assert any(moved.values()) or float(trace[0][2]) == 1.0 or arm["optimizer"] == "soap"
    model.eval()
    with torch.no_grad():
        assert model(batches()[0][:, :-1]).isfinite().all()
    fresh = build_model(cfg)
    for name, draw in fresh.initial_draws.items():
        key = (name, tuple(fresh.get_parameter(name).shape))
        assert REFERENCE.setdefault(key, draw) == draw, f"{name} does not pair"
    return True


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(ARMS)
def test_any_combination_trains_a_step_or_is_refused(arm):
    trains_and_pairs(arm)


@pytest.mark.slow
@settings(max_examples=1000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(ARMS)
def test_a_thousand_combinations(arm):
    trains_and_pairs(arm)


def test_most_options_go_with_the_defaults():
    """The test above would be empty if everything were refused."""
    pairs = [(group, option) for group in VARIED for option in OPTIONS[group] if (group, option) not in NEEDS]
    assert sum(admissible({g: o}) is not None for g, o in pairs[::4]) > 0.7 * len(pairs[::4])
