"""What is dropped, how rates lie over depth and time, and what skipping saves."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import TINY
from forking import nano, rows, train, write_text
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from albert_ablate import build_model, compose
from albert_ablate.config import ConfigError, checked_config, options
from albert_ablate.model import dropout as d
from albert_ablate.model.build import assemble
from albert_ablate.model.loss import r_drop

SHAPES = [o for o in options()["dropout"] if o != "none"]
TIMES = [d.Constant(), d.Early(0.3), d.Early(0.3, "linear"), d.Late(0.35), d.Linear(), d.Linear(-0.5), d.Curriculum(),
         d.Exponential()]  # fmt: skip


def tokens(batch=4, length=12):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def model_of(*overrides):
    return build_model(checked_config([*TINY, *overrides]))


# --- over depth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 12, 54])
@pytest.mark.parametrize("option", SHAPES)
def test_rates_of_the_built_blocks_have_the_mean_they_are_given(option, layers):
    cfg = checked_config([*TINY, f"model.layers={layers}", f"dropout={option}", "dropout.mean=0.07"])
    rates = [block.rate for block in assemble(cfg).stack]
    assert len(rates) == layers and np.mean(rates) == pytest.approx(0.07, abs=1e-15)
    assert all(0 <= rate < 1 for rate in rates)


def test_shapes_over_depth_follow_their_formulas():
    rates = lambda shape, layers: [shape.rate(layer, layers) for layer in range(layers)]  # noqa: E731
    p = lambda values: pytest.approx(values, abs=1e-12)  # noqa: E731
    assert rates(d.Cosine(0.2), 3) == p([0.4, 0.2, 0.0])
    assert rates(d.Cosine(0.2, spread=0.5), 7)[1] == p(0.1 + 0.2 * (1 + math.cos(math.pi / 6)) / 2)
    r = 0.1 ** (1 / 3)
    highest = 0.2 * 4 * (1 - r) / (1 - r**4)  # mean p_max (1 - r^L) / (L (1 - r))
    assert rates(d.Geometric(0.2), 4) == p([highest * r**i for i in range(4)])
    assert rates(d.Step(0.2, share=0.25), 8) == p([0.8, 0.8, 0, 0, 0, 0, 0, 0])
    assert rates(d.Step(0.2, share=0.5, low=0.25), 4) == p([0.32, 0.32, 0.08, 0.08])
    assert rates(d.Triangle(0.2), 5) == p([w / 26 for w in (2, 6, 10, 6, 2)])
    assert rates(d.Triangle(0.2, spread=-1), 4) == p([0.3, 0.1, 0.1, 0.3])
    assert rates(d.LayerSkip(0.1), 5)[0] == 0
    skip = rates(d.LayerSkip(0.1), 5)
    assert [x / skip[-1] for x in skip] == p([math.exp(i * math.log(2) / 4) - 1 for i in range(5)])
    assert rates(d.DepthGrowth(0.25), 5) == p(list(np.linspace(0, 0.5, 5)))  # timm, torchscale


def test_huang_s_rule_leaves_40_of_54_blocks():
    """Stochastic depth's own example: p_L = 0.5 over 54 blocks, expected depth L - p_L (L + 1) / 2 = 40.25."""
    shape = d.Huang(0.5 * 55 / 108)
    rates = [shape.rate(layer, 54) for layer in range(54)]
    assert rates[0] == pytest.approx(0.5 / 54) and rates[-1] == pytest.approx(0.5)
    assert sum(1 - rate for rate in rates) == pytest.approx(40.25, abs=1e-12)


@pytest.mark.parametrize(
    "overrides",
    [
        ["dropout=huang", "dropout.mean=0.7"],
        ["dropout=step", "dropout.mean=0.7"],
        ["dropout=uniform", "dropout.mean=0.4", "dropout_time=early"],
        ["dropout=depth_decay", "dropout.mean=0.3", "dropout_time=linear"],
        ["dropout_time=late"],
        ["dropout=uniform", "dropout.sites=[stochastic_depth,layer_drop]"],
        ["dropout=uniform", "dropout.sites=[stochastic_depth]", "dropout_time=late"],
        ["loss=r_drop"],
        ["loss=r_drop", "dropout=uniform", "dropout.sites=[layer_drop]"],
    ],
)
def test_rates_of_one_and_settings_without_effect_are_refused(overrides):
    with pytest.raises(ConfigError, match=r"^[^\n]+\.$"):
        compose([*TINY, *overrides])


# --- over time -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("time", TIMES, ids=lambda t: type(t).__name__)
def test_factors_over_time_have_a_mean_of_one(time, steps):
    factors = [d.multiplier(time, step, steps) for step in range(steps)]
    assert np.mean(factors) == pytest.approx(1, abs=1e-12) and min(factors) >= 0
    assert (time.spent(0), time.spent(1)) == pytest.approx((0, 1), abs=1e-12)


def test_shapes_over_time_follow_their_formulas():
    at = lambda time, t: d.multiplier(time, round(t * 10_000), 10_000)  # noqa: E731
    p = lambda x: pytest.approx(x, abs=2e-3)  # noqa: E731
    assert [at(d.Early(0.25), t) for t in (0, 0.2, 0.3, 0.9)] == p([4, 4, 0, 0])
    assert [at(d.Early(0.25, "linear"), t) for t in (0, 0.125, 0.3)] == p([8, 4, 0])
    assert [at(d.Late(0.2), t) for t in (0, 0.1, 0.3, 0.9)] == p([0, 0, 1.25, 1.25])
    assert [at(d.Linear(), t) for t in (0, 0.5, 0.9)] == p([0, 1, 1.8])
    plateau = 1 / (1 - (1 - math.exp(-10)) / 10)
    assert [at(d.Curriculum(), t) for t in (0, 0.1, 0.5)] == p(
        [plateau * (1 - math.exp(-10 * t)) for t in (0, 0.1, 0.5)]
    )
    ratio = at(d.Exponential(), 0.3) / at(d.Exponential(), 0.8)
    assert ratio == p((math.exp(0.3 * math.log(2)) - 1) / (math.exp(0.8 * math.log(2)) - 1))


@pytest.mark.process
def test_depth_and_time_combine_and_histories_show_the_rate(tmp_path):
    text = write_text(tmp_path / "text.txt")
    more = ("dropout=depth_decay", "dropout.mean=0.1", "dropout_time=early", "dropout_time.until=0.5")
    cfg = nano(text, tmp_path, *more, "budget.tokens=1280", "diagnostics.every=1", "data.accumulate=2")
    record = train(cfg)
    layers = [r for r in rows(record["folder"], "layers").to_pylist() if r["step"]]
    found = {(r["step"], r["layer"]): r["dropout"] for r in layers}
    expected = {(s, l): (0.4 if s <= 5 else 0.0) * (1 - l) for s in range(1, 11) for l in (0, 1)}  # noqa: E741
    assert found == pytest.approx(expected, abs=1e-7)
    assert np.mean(list(found.values())) == pytest.approx(record["summary"]["mean_dropout"], abs=1e-7)


@pytest.mark.parametrize(
    ("sites", "rates"), [("embedding", (0, 0)), ("hidden", (0, 0.2)), ("head", (0.2, 0)), ("layer_drop", (0.2, 0.2))]
)
def test_the_rate_in_force_is_that_of_sites_in_the_sublayer(sites, rates):
    model = model_of("dropout=uniform", "dropout.mean=0.2", f"dropout.sites=[{sites}]")
    assert {tuple(block.rate_now(part) for part in ("attention", "mlp")) for block in model.stack} == {rates}


@pytest.mark.process
def test_the_factor_in_force_reaches_every_mask():
    model, plain = model_of("dropout=uniform", "dropout.mean=0.2", "dropout_time=late"), model_of()
    expected = plain(tokens())
    model.clock.set(0, 0, 0, 10)
    torch.testing.assert_close(model.train()(tokens()), expected)
    model.clock.set(0, 0, 9, 10)
    assert not torch.allclose(model(tokens()), expected)


# --- kinds -----------------------------------------------------------------------------------------------------------


def site(kind, rate, micro_batch=0, rank=0, **more):
    clock = d.Clock(0)
    clock.set(micro_batch, rank)
    return kind(rate, "here", clock, **more)


def test_what_each_kind_drops_and_how_it_rescales():
    x = torch.ones(400, 6, 5)
    path = site(d.DropPath, 0.3)(x)
    assert (path == path[:, :1, :1]).all() and path[:, 0, 0].unique().tolist() == pytest.approx([0, 1 / 0.7])
    ids = torch.arange(200).view(10, 20) % 100
    rows_ = site(d.DropToken, 0.3).rows(torch.ones(10, 20, 5), ids, 100)
    assert torch.equal(rows_[:5], rows_[5:]) and 0.15 < (rows_ == 0).float().mean() < 0.45  # the same tokens again
    assert (rows_ == rows_[..., :1]).all() and rows_.max().item() == pytest.approx(1 / 0.7)
    heads = site(d.DropHead, 0.4)(torch.ones(300, 4, 6, 5))
    kept = (heads[:, :, 0, 0] != 0).sum(1)
    assert set(kept.tolist()) == {0, 1, 2, 3, 4} and (heads == heads[:, :, :1, :1]).all()
    torch.testing.assert_close(heads[:, :, 0, 0].sum(1), torch.where(kept > 0, 4.0, 0.0))  # H / kept
    for kind in (d.DropPath, d.DropHead):
        assert torch.equal(site(kind, 0.4).eval()(torch.ones(3, 4, 6, 5)), torch.ones(3, 4, 6, 5))


@pytest.mark.parametrize("kind", [d.DropPath, d.DropHead])
def test_masks_are_nested_across_rates(kind):
    x = torch.ones(200, 4, 3, 2)[:, :, 0] if kind is d.DropPath else torch.ones(200, 4, 3, 2)
    low, high = site(kind, 0.1)(x) == 0, site(kind, 0.5)(x) == 0
    assert not (low & ~high).any() and 0 < low.sum() < high.sum()


@pytest.mark.parametrize("kind", [d.Dropout, d.DropToken])
def test_masks_are_those_of_float32_where_training_is_bfloat16(kind):
    """Drawn as bfloat16, which has 256 of them, a rate of 0.001 would drop 0.003."""
    site = kind(0.001, "test", d.Clock(0)).train()
    like = torch.ones(1)
    expected = site.mask((1000, 1000), like, 0.001)
    assert 0.0009 < (expected == 0).float().mean() < 0.0011
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does with trainer.precision=bf16-true
    try:
        mask = site.mask((1000, 1000), like, 0.001)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(mask, expected)


def test_skips_are_nested_shared_by_ranks_and_as_frequent():
    skips = lambda rate, rank=0: [site(d.Skip, rate, m, rank, rescale=False).skips() for m in range(4000)]  # noqa: E731
    low, high = skips(0.1), skips(0.5)
    assert all(h for a, h in zip(low, high, strict=True) if a)
    assert np.mean(low) == pytest.approx(0.1, abs=0.02) and np.mean(high) == pytest.approx(0.5, abs=0.03)
    assert skips(0.5, rank=3) == high


KINDS = ["token", "head", "drop_path", "stochastic_depth", "layer_drop"]


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_zero_and_evaluation_drop_nothing(kind):
    expected = model_of()(tokens())
    zero = model_of("dropout=uniform", "dropout.mean=0", f"dropout.sites=[{kind}]").train()
    assert torch.equal(zero(tokens()), expected)
    model = model_of("dropout=uniform", "dropout.mean=0.9", f"dropout.sites=[{kind}]").train()
    assert not torch.allclose(model(tokens()), expected)
    assert torch.equal(model(tokens()), model(tokens()))  # of one micro-batch
    assert torch.equal(model.eval()(tokens()), expected) == (kind != "stochastic_depth")


def test_stochastic_depth_scales_branches_in_evaluation():
    model, plain = model_of("dropout=huang", "dropout.mean=0.3", "dropout.sites=[stochastic_depth]").eval(), model_of()
    for block in plain.stack:
        for matrix in (block.attention.output, block.mlp.down):
            matrix.weight.data *= 1 - model.blocks[plain.stack.index(block)].rate
    torch.testing.assert_close(model(tokens()), plain(tokens()))
    assert [block.rate for block in model.stack] == pytest.approx([0.15, 0.3, 0.45])


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "norm"),
    [("layer_drop", norm) for norm in options()["norm"]]
    + [(kind, norm) for kind in ("drop_path", "stochastic_depth") for norm in ("pre_ln", "post_ln", "residual_dual")],
)
def test_every_placement_drops_and_a_skipped_block_is_identity(kind, norm):
    needs = {"ngpt": ["attention=rotary", "optimizer.weight_decay=0"], "mix_ln": ["norm.share=0.5"]}.get(norm, [])
    model = model_of("dropout=uniform", "dropout.mean=0.5", f"dropout.sites=[{kind}]", f"norm={norm}", *needs).train()
    skipped = set()
    for micro_batch in range(6):
        model.clock.set(micro_batch, 0)
        model.zero_grad(set_to_none=True)
        out = model(tokens())
        assert out.isfinite().all()
        out.square().mean().backward()
        for block in model.stack:
            stream = model.first.begin(torch.ones(1, 2, 16))
            assert not block.skip.skips() or block(stream) is stream
            if block.skip.skips():
                skipped.add(micro_batch)
                assert all(p.grad is None for p in block.mlp.parameters())
    assert bool(skipped) == (kind != "drop_path")


@pytest.mark.process
def test_skipping_saves_work_in_proportion_and_zeroing_does_not():
    def flops(*overrides, micro_batch=0):
        model = model_of(*overrides, "model.layers=8").train()
        model.clock.set(micro_batch, 0)
        with FlopCounterMode(display=False) as counter:
            model(tokens()).sum().backward()
        return counter.get_total_flops(), sum(block.skip.skips() for block in model.stack)

    whole, _ = flops()
    without = (whole - flops("dropout=uniform", "dropout.mean=0.999999", "dropout.sites=[layer_drop]")[0]) / 8
    for kind in ("stochastic_depth", "layer_drop"):
        for micro_batch in range(3):
            count, skipped = flops(
                "dropout=uniform", "dropout.mean=0.5", f"dropout.sites=[{kind}]", micro_batch=micro_batch
            )
            assert 0 < skipped < 8 and count == whole - skipped * without
    for kind in ("drop_path", "head", "hidden", "attention", "residual", "embedding", "token"):
        assert flops("dropout=uniform", "dropout.mean=0.5", f"dropout.sites=[{kind}]")[0] >= whole


@pytest.mark.process
def test_recomputed_blocks_draw_the_same_masks():
    sites = "dropout.sites=[residual,hidden,attention,head,drop_path,layer_drop]"
    model = model_of("dropout=uniform", "dropout.mean=0.3", sites).train()
    gradients = []
    for again in (False, True):
        model.zero_grad()
        x = model.embedding(tokens())
        for block in model.stack:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
        x.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- R-Drop ----------------------------------------------------------------------------------------------------------


def test_r_drop_is_mean_loss_plus_half_alpha_divergences():
    logits = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    a, b = logits[:2].flatten(0, 1), logits[2:].flatten(0, 1)
    losses = [F.cross_entropy(x, targets.flatten()) for x in (a, b)]
    kl = lambda x, y: F.kl_div(y.log_softmax(-1), x.log_softmax(-1), reduction="batchmean", log_target=True)  # noqa: E731
    total, plain = r_drop(logits, targets, alpha=3.0)
    torch.testing.assert_close(plain, sum(losses) / 2)
    torch.testing.assert_close(total, plain + 1.5 * (kl(a, b) + kl(b, a)))
    same, alone = r_drop(logits[:2].repeat(2, 1, 1), targets, alpha=3.0)
    torch.testing.assert_close(same, alone)


def test_r_drop_counts_twice_in_the_cost():
    from albert_ablate.training.cost import flops_per_token

    plain = checked_config([*TINY, "dropout=uniform"])
    assert flops_per_token(checked_config([*TINY, "dropout=uniform", "loss=r_drop"])) == 2 * flops_per_token(plain)
