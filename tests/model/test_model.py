"""Norms, dropout, attention and initial weights against formulas and papers; placements are in test_placements.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import TINY

from albert_ablate import build_model, compose
from albert_ablate.config import checked_config, options
from albert_ablate.model.dropout import Clock, DepthDecay, DepthGrowth, Dropout, NoDropout, Uniform
from albert_ablate.model.norms import layer_norm, rms_norm

PLACEMENTS = options()["norm"]
NEEDS = {"ngpt": ["optimizer.weight_decay=0"], "mix_ln": ["model.layers=4"]}  # what an option refuses to be without


# --- norms -----------------------------------------------------------------------------------------------------------


def test_norm_types_compute_their_formulas():
    x = 3 * torch.randn(4, 8, dtype=torch.float64) + 1
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    torch.testing.assert_close(layer_norm(8, eps=0.1).double()(x), (x - mean) / (var + 0.1).sqrt())
    torch.testing.assert_close(rms_norm(8, eps=0.1).double()(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt())
    assert layer_norm(8, bias=False).bias is None


# --- the trunk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "attention"),
    [(n, a) for n in PLACEMENTS for a in ("learned", "rotary") if (n, a) != ("ngpt", "learned")],
)
def test_no_logit_depends_on_a_later_token(norm, attention):
    model = build_model(checked_config([*TINY, f"norm={norm}", f"attention={attention}", *NEEDS.get(norm, [])])).eval()
    with torch.no_grad():
        for p in model.parameters():  # so that gates and matrices at zero do not hide a leak
            if p.ndim == 0:
                p.fill_(0.5)
            elif not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    a = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[:, 7:] = (b[:, 7:] + 1) % 256
    with torch.no_grad():
        one, two = model(a), model(b)
    assert torch.equal(one[:, :7], two[:, :7]) and not torch.equal(one[:, 7:], two[:, 7:])
    assert one.shape == (2, 12, 256)


def test_rotary_scores_depend_on_distance_only_and_match_llama_s():
    from albert_ablate.model.attention import rotary_angles, rotate

    like = torch.zeros(1, dtype=torch.float64)
    cos, sin = rotary_angles(20, 8, 10_000.0, like)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    score = lambda i, j: float(rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j]))  # noqa: E731
    assert score(3, 1) == pytest.approx(score(15, 13), abs=1e-12) and score(3, 1) != pytest.approx(
        score(3, 2), abs=1e-3
    )
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, y = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    theirs = llama.apply_rotary_pos_emb(x, y, cos.float()[None], sin.float()[None])
    torch.testing.assert_close(rotate(x, cos.float(), sin.float()), theirs[0])


def test_tied_and_shared_models_have_the_parameters_they_should():
    def count(*overrides):
        return sum(p.numel() for p in build_model(checked_config([*TINY, *overrides])).parameters())

    d, v, t, layers = 16, 256, 12, 3
    block = 12 * d * d + 4 * d
    assert count() == 2 * v * d + t * d + layers * block + 2 * d
    assert count("model.tied=true") == count() - v * d
    assert count("model.shared=true") == count() - (layers - 1) * block
    assert count("model.bias=true") == count() + layers * (3 * d + d + 4 * d + d)
    assert count("attention=rotary") == count() - t * d


def test_shared_blocks_are_one_in_training_too():
    model = build_model(checked_config([*TINY, "model.shared=true", "norm=rezero", "dropout=depth_decay"]))
    assert model.blocks[2].mlp.up.weight is model.blocks[0].mlp.up.weight
    assert model.blocks[2].around_mlp.gate is model.blocks[0].around_attention.gate
    assert model.blocks[2].rate < model.blocks[0].rate


def test_initial_weights_have_their_scales_and_uniform_loss():
    model = build_model(checked_config(["model=mini", "norm=deepnorm"]))
    qkv = model.blocks[5].attention.qkv.weight.detach()
    xavier, beta = (2 / 128) ** 0.5, (8 * 24) ** -0.25
    for rows, std in zip(qkv.chunk(3), (xavier, xavier, beta * xavier), strict=True):
        assert rows.std().item() == pytest.approx(std, rel=0.05)
    assert model.blocks[5].mlp.up.weight.std().item() == pytest.approx(beta * (2 / 320) ** 0.5, rel=0.03)
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.03)
    rows = torch.randint(0, 256, (4, 129))
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(256), abs=0.4)


def test_architectures_of_one_seed_share_the_draws_they_can():
    a, b = (build_model(checked_config([*TINY, *o])) for o in (["norm=pre_ln"], ["norm=deepnorm", "model.layers=2"]))
    common = a.initial_draws.keys() & b.initial_draws.keys()
    assert len(common) == 11 and all(a.initial_draws[n] == b.initial_draws[n] for n in common)
    assert torch.equal(a.blocks[1].attention.qkv.weight[:32], b.blocks[1].attention.qkv.weight[:32])
    assert a.initial_draws != build_model(checked_config([*TINY, "seed=1"])).initial_draws
    wider = build_model(checked_config([*TINY, "model.hidden=20"])).initial_draws
    assert {n for n in wider if wider[n] != a.initial_draws[n]} == {n for n in wider if ".mlp." in n}


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 7, 96])
@pytest.mark.parametrize("schedule", [Uniform(0.2), DepthDecay(0.2), DepthGrowth(0.2), DepthDecay(0.2, spread=0.3)])
def test_schedules_have_the_mean_they_are_given(schedule, layers):
    rates = [schedule.rate(i, layers) for i in range(layers)]
    assert np.mean(rates) == pytest.approx(0.2, abs=1e-12)


def test_dropout_decay_growth_and_spread_over_depth():
    decay, growth = DepthDecay(0.1, 0.5), DepthGrowth(0.1, 0.5)
    assert [decay.rate(0, 11), decay.rate(10, 11)] == pytest.approx([0.15, 0.05])
    assert [decay.rate(i, 11) for i in range(11)] == pytest.approx([growth.rate(10 - i, 11) for i in range(11)])
    assert NoDropout().rate(3, 11) == 0


def drop(rate, micro_batch=0, seed=0, name="here", training=True):
    clock = Clock(seed)
    clock.set(micro_batch, 0)
    return Dropout(rate, name, clock).train(training)(torch.ones(200, 500))


def test_dropout_keeps_the_mean_and_scales_the_variance():
    y = drop(0.3)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert y.square().mean().item() == pytest.approx(1 / 0.7, abs=0.01)
    assert set(np.round(y.unique().tolist(), 5)) == {0.0, round(1 / 0.7, 5)}


def test_masks_are_nested_across_rates_and_named_by_site():
    low, high = drop(0.1) == 0, drop(0.4) == 0
    assert bool((low & ~high).sum() == 0) and 0 < low.sum() < high.sum()
    assert torch.equal(drop(0.1), drop(0.1))
    for other in (drop(0.1, micro_batch=1), drop(0.1, seed=1), drop(0.1, name="there")):
        agree = ((other == 0) & low).float().mean().item()
        assert agree == pytest.approx(0.01, abs=0.003)


def test_no_site_moves_another_s_draws():
    torch.manual_seed(1)
    a = drop(0.2)
    torch.rand(1000)
    assert torch.equal(a, drop(0.2))


@pytest.mark.parametrize("where", ["embedding", "attention", "residual", "hidden"])
def test_every_site_drops_in_training_and_none_in_evaluation(where):
    cfg = compose([*TINY, "dropout=uniform", "dropout.mean=0.5", f"dropout.sites=[{where}]"])
    model, plain = build_model(cfg), build_model(checked_config(TINY))
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = plain(tokens)
    assert not torch.allclose(model.train()(tokens), expected)
    torch.testing.assert_close(model.eval()(tokens), expected)


@pytest.mark.parametrize("schedule", [Uniform(0.2), DepthDecay(0.2), DepthGrowth(0.2)])
def test_residual_variance_under_dropout_is_that_of_branches(schedule):
    """Linear, centered branches: v_L = v_0 + sum of v_branch / (1 - p_l) (inverted dropout scales a square by that)."""
    generator = torch.Generator().manual_seed(0)
    layers, width = 24, 64
    x = torch.randn(4000, width, generator=generator)
    expected = x.square().mean().item()
    for layer in range(layers):
        rate = schedule.rate(layer, layers)
        branch = x @ torch.randn(width, width, generator=generator) * (0.3 / width**0.5)
        expected += branch.square().mean().item() / (1 - rate)
        x = x + Dropout(rate, f"site {layer}", Clock(0))(branch)
    assert x.square().mean().item() == pytest.approx(expected, rel=0.04)
    no_dropout = 1.09**layers
    assert expected > 1.2 * no_dropout
