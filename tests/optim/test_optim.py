"""Optimizers, schedules and clipping against torch, closed forms and the papers' formulas."""

import math

import pytest
import torch
from torch import nn

from albert_ablate import build_model
from albert_ablate.config import checked_config
from albert_ablate.optim import schedules
from albert_ablate.optim.clipping import AdaptiveClip, ClipNorm, ClipValue, NoClip, global_norm, unit_norms
from albert_ablate.optim.optimizers import adam, adamw, assert_covers, decay_groups, sgd


def model_with_gradients(seed=0, scale=1.0):
    """A matrix, a vector, a scalar and a head, with gradients of different sizes."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.up = nn.Linear(5, 7)
    model.twin = nn.Linear(5, 7)
    model.gate = nn.Parameter(torch.zeros(()))
    model.head = nn.Linear(7, 3, bias=False)
    for p in model.parameters():
        p.grad = scale * torch.randn_like(p)
    return model


def clip(rule, model):
    named = list(model.named_parameters())
    norm, each = global_norm([p.grad for _, p in named])
    return float(rule(named, norm)), float(norm), each


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


# --- clipping --------------------------------------------------------------------------------------------------------


def test_global_norm_is_that_of_all_elements_in_one_vector():
    model = model_with_gradients()
    _, norm, each = clip(NoClip(), model)
    assert norm == pytest.approx(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item(), rel=1e-6)
    assert [e.item() for e in each] == pytest.approx([p.grad.norm().item() for p in model.parameters()])


@pytest.mark.parametrize(("max_norm", "share"), [(0.5, 1.0), (1e6, 0.0)])
def test_clip_norm_is_torch_s(max_norm, share):
    ours, theirs = model_with_gradients(), model_with_gradients()
    assert clip(ClipNorm(max_norm), ours)[0] == share
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clip_value_is_torch_s_and_counts_elements():
    ours, theirs = model_with_gradients(), model_with_gradients()
    before = torch.cat([p.grad.flatten() for p in ours.parameters()])
    share, *_ = clip(ClipValue(0.7), ours)
    torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.7)
    assert share == pytest.approx((before.abs() > 0.7).float().mean().item())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def agc_by_the_paper(w, g, factor, eps):
    """Brock et al. 2021, equation 3, a unit at a time."""
    units = [(w, g)] if w.ndim < 2 else list(zip(w, g, strict=True))
    out = []
    for wi, gi in units:
        ratio = factor * max(wi.norm().item(), eps) / max(gi.norm().item(), 1e-6)
        out.append(gi * min(1.0, ratio))
    return out[0] if w.ndim < 2 else torch.stack(out)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_agc_is_the_papers_rule_and_leaves_the_head(scale):
    factor, eps = 0.03, 1e-3
    model = model_with_gradients(scale=scale)
    before = gradients(model)
    share, *_ = clip(AdaptiveClip(factor, eps), model)
    units = clipped = 0
    for name, p in model.named_parameters():
        expected = before[name] if name.startswith("head.") else agc_by_the_paper(p.data, before[name], factor, eps)
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-9)
        if not name.startswith("head."):
            rows = [0] if p.ndim < 2 else range(len(p))
            units += len(rows)
            clipped += sum(
                bool((p.grad[i] != before[name][i]).any()) if p.ndim else bool(p.grad != before[name]) for i in rows
            )
    assert share == pytest.approx(clipped / units)


def test_after_agc_no_units_gradient_exceeds_its_share():
    model = model_with_gradients(scale=100.0)
    clip(AdaptiveClip(0.01, 1e-3), model)
    for name, p in model.named_parameters():
        if not name.startswith("head."):
            limit = 0.01 * unit_norms([p]).clamp(min=1e-3)
            assert (unit_norms([p.grad]) <= limit * (1 + 1e-6)).all(), name


def test_agc_passes_over_parameters_without_a_gradient():
    model = model_with_gradients()
    model.twin.weight.grad = None
    before = model.up.weight.grad.clone()
    named = list(model.named_parameters())
    norm, _ = global_norm([p.grad for _, p in named if p.grad is not None])
    AdaptiveClip(0.01)(named, norm)
    assert model.twin.weight.grad is None and not torch.equal(model.up.weight.grad, before)


# --- optimizers ------------------------------------------------------------------------------------------------------

PAIRS = [
    (lambda g: sgd(g, True, lr=0.1, momentum=0.8, weight_decay=0.01),
     lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.01)),
    (lambda g: adam(g, True, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
     lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)),
    (lambda g: adamw(g, True, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
     lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["sgd", "adam", "adamw"])
def test_optimizer_takes_torch_s_steps(ours, theirs):
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    one, two = ours([a]), theirs([b])
    for _ in range(10):
        g = torch.randn(4, 3)
        a.grad, b.grad = g.clone(), g.clone()
        one.step()
        two.step()
    torch.testing.assert_close(a, b)


def after_decay_alone(optimizer, steps=100):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()


def test_decay_without_gradient_shrinks_by_lr_times_decay():
    """(1 - 0.01 * 0.1)^100 = 0.904793; coupled Adam normalizes the decay and moves by about lr a step instead."""
    w, v = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    after_decay_alone(adamw([w], True, lr=0.01, weight_decay=0.1))
    assert w.detach().numpy() == pytest.approx(0.904793, abs=1e-5)
    after_decay_alone(sgd([v], True, lr=0.01, momentum=0.0, weight_decay=0.1))
    assert v.detach().numpy() == pytest.approx(0.904793, abs=1e-5)
    u = nn.Parameter(torch.ones(3, 3))
    after_decay_alone(adam([u], True, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1))
    assert u.detach().max() < 0.3


@pytest.mark.parametrize(
    "overrides", [[], ["model.tied=true"], ["model.shared=true"], ["norm=rezero"], ["model.bias=true"]]
)
def test_decay_groups_hold_each_parameter_once(overrides):
    model = build_model(checked_config(["model=nano", *overrides]))
    optimizer = adamw(decay_groups(model), True, lr=0.01, weight_decay=0.1)
    assert_covers(optimizer, model)
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])


def test_a_parameter_in_two_groups_or_in_none_is_noticed():
    model = nn.Linear(3, 3)
    with pytest.raises(AssertionError, match="in no group, or in two"):
        assert_covers(torch.optim.SGD([model.weight], lr=1.0), model)


# --- schedules -------------------------------------------------------------------------------------------------------


def test_schedules_take_the_values_of_their_formulas():
    cos = lambda t: schedules.warmup_cosine(t, warmup=0.2, final=0.1)  # noqa: E731
    assert [cos(t) for t in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    assert cos(0.4) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    lin = lambda t: schedules.warmup_linear(t, warmup=0.2, final=0.0)  # noqa: E731
    assert [lin(t) for t in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert [schedules.constant(t, warmup=0.5) for t in (0.25, 0.5, 1.0)] == [0.5, 1.0, 1.0]
    root = lambda t: schedules.inverse_sqrt(t, warmup=0.16)  # noqa: E731
    assert [root(t) for t in (0.0, 0.04, 0.16, 0.36, 0.64, 1.0)] == pytest.approx([0, 0.25, 1, 2 / 3, 0.5, 0.4])
    vaswani = lambda t: min(t**-0.5, t * 0.16**-1.5)  # noqa: E731
    assert [root(t) for t in (0.1, 0.3, 0.9)] == pytest.approx([0.4 * vaswani(t) for t in (0.1, 0.3, 0.9)])
    for shape, middle in (("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("square", 0.75)):
        wsd = lambda t, shape=shape: schedules.wsd(t, warmup=0.1, decay=0.4, shape=shape)  # noqa: E731
        assert [wsd(t) for t in (0.05, 0.1, 0.6, 0.8, 1.0)] == pytest.approx([0.5, 1.0, 1.0, middle, 0.0])


@pytest.mark.parametrize("shape", [schedules.constant, schedules.warmup_cosine, schedules.warmup_linear, schedules.wsd])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.8])
def test_schedules_stay_within_zero_and_one_and_have_no_jump(shape, warmup):
    n = 1000
    values = [shape((k + 0.5) / n, warmup=warmup) for k in range(n)]
    assert all(0 < v <= 1 for v in values)
    assert max(abs(b - a) for a, b in zip(values, values[1:], strict=False)) <= 0.08  # sqrt leaves 1 steeply


@pytest.mark.parametrize("warmup", [0.05, 0.8])
def test_inverse_sqrt_peaks_at_one_where_the_warmup_ends(warmup):
    values = [schedules.inverse_sqrt((k + 0.5) / 1000, warmup=warmup) for k in range(1000)]
    assert 0 < min(values) and max(values) == pytest.approx(1, abs=0.01) and max(values) <= 1
    assert abs(values.index(max(values)) / 1000 - warmup) <= 1e-3 and schedules.inverse_sqrt(warmup, warmup=warmup) == 1


@pytest.mark.parametrize(
    "shape", [schedules.constant, schedules.warmup_cosine, schedules.warmup_linear, schedules.inverse_sqrt]
)
def test_a_warmup_of_the_whole_budget_rises_to_its_end(shape):
    assert [shape(t, warmup=1.0) for t in (0.25, 0.999, 1.0)] == pytest.approx([0.25, 0.999, 1.0])


@pytest.mark.parametrize("norm", ["rezero", "pre_ln"])
@pytest.mark.parametrize("tied", [False, True])
def test_agc_follows_the_paper_on_a_whole_model(norm, tied):
    options = ["model.layers=2", "model.bias=true", f"model.tied={str(tied).lower()}", f"norm={norm}"]
    model = build_model(checked_config(["model=nano", *options]))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    model.embedding.weight.grad[3] = 0  # a token that was not seen
    before = gradients(model)
    clip(AdaptiveClip(0.02, 1e-3), model)
    for name, p in model.named_parameters():
        expected = before[name] if name == "head.weight" else agc_by_the_paper(p.data, before[name], 0.02, 1e-3)
        torch.testing.assert_close(p.grad, expected, rtol=2e-6, atol=1e-9, msg=name)
    assert ("head.weight" in before) != tied  # a tied head is the embedding, and is clipped as one
