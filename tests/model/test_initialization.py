"""What theory says of deep models before training, over depths up to 96, from the diagnostics of step 0."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from albert_ablate import build_model
from albert_ablate.config import checked_config
from albert_ablate.training.diagnostics import Probe

DEPTHS = [2, 4, 8, 16, 32, 64, 96]


def deep(option, layers, seed=0):
    width = ["model=nano", "model.width=64", "model.heads=4", "model.context=32"]
    model = build_model(checked_config([*width, f"model.layers={layers}", f"norm={option}", f"seed={seed}"]))
    rows = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(seed))
    return model, rows[:, :-1], rows[:, 1:]


def slope(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("option", "published", "within"), [("post_ln", 0.0, 0.15), ("pre_ln", -0.5, 0.12)])
def test_the_last_gradient_over_depth_is_xiong_s(option, published, within):
    """Xiong et al. 2020, theorem 1: the last block's last matrix has a gradient of order 1 for post-LN, L^(-1/2) for
    pre-LN."""
    norms = []
    for layers in DEPTHS:
        found = []
        for seed in (0, 1):
            model, tokens, targets = deep(option, layers, seed)
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
            found.append(torch.autograd.grad(loss, model.blocks[-1].mlp.down.weight)[0].norm().item())
        norms.append(np.mean(found))
    found = slope(DEPTHS, norms)
    print(f"{option}: gradient of the last matrix over depth, slope {found:.3f}, published {published}")
    assert abs(found - published) < within


def change_of_the_output(option, layers, rule, seed=0):
    """Root mean square change of what enters the head after one step on the blocks' matrices, by the bare gradient
    (SGD) or by its sign (Adam's first step)."""
    model, tokens, targets = deep(option, layers, seed)
    before = model.features(tokens)
    F.cross_entropy(model.head(before).flatten(0, 1), targets.flatten()).backward()
    with torch.no_grad():
        for p in model.blocks.parameters():
            if p.ndim == 2:
                p.sub_(0.01 * p.grad if rule == "sgd" else 1e-5 * p.grad.sign())
        return (model.features(tokens) - before).square().mean().sqrt().item()


@pytest.mark.parametrize("depths", [[6, 24], pytest.param([6, 12, 24, 48, 96], marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize(("rule", "published"), [("sgd", 0.0), ("adam", 0.5)])
def test_the_change_of_t_fixup_s_output_by_a_step_over_depth(rule, published, depths):
    """Huang et al. 2020: a step's change is bounded whatever the depth, which holds of SGD; Adam's steps, which have
    one size in all 2M sublayers, make it grow as the root of depth. Embedding and positions must both be small."""
    found = slope(depths, [np.mean([change_of_the_output("t_fixup", n, rule, s) for s in (0, 1)]) for n in depths])
    print(f"t_fixup: change of the output by a step of {rule} over depth, slope {found:.3f}, published {published}")
    assert abs(found - published) < 0.1


def stream(option, layers):
    """Root mean square of the stream after each block's MLP."""
    model, tokens, _ = deep(option, layers)
    probe = Probe(model, "gelu")
    with torch.no_grad(), probe.watching():
        model(tokens)
    return np.array([f["residual_rms"] for (_, s), f in sorted(probe.metrics().items()) if s == "mlp"])


def test_stream_size_over_depth_of_post_ln_and_pre_ln():
    """Xiong et al. 2020, lemma 2: E|x_l|^2 is d for post-LN and between (1 + l/2) d and (1 + 3l/2) d for pre-LN, both
    linear in l; ours starts from an embedding of variance 1.25 and has attention's mixing beside."""
    assert stream("post_ln", 96) == pytest.approx(np.ones(96), abs=1e-3)
    at = np.array([8, 16, 32, 64, 96])
    found = slope(at, stream("pre_ln", 96)[at - 1] ** 2)
    print(f"pre_ln: mean square of the stream over depth, slope {found:.3f}, published 1")
    assert 0.75 < found < 1.25


def residual(x):
    """|X - 1 x'| / |X|, x' the mean over tokens: 0 where all tokens are one (Dong et al. 2021, in Frobenius' norm)."""
    return ((x - x.mean(1, keepdim=True)).norm(dim=(1, 2)) / x.norm(dim=(1, 2))).mean().item()


@torch.no_grad()
def test_attention_alone_collapses_to_rank_one_over_depth():
    """Dong et al. 2021, 2103.03404: without skip connections and MLPs the distance to rank one vanishes exponentially
    or faster with depth; skip connections keep it."""
    model, tokens, _ = deep("pre_ln", 96)
    embedded = model.embedding(tokens) + model.positions.weight[:32]
    sizes = {}
    for skip in (0, 1):
        x, found = embedded.double(), []
        for block in model.double().stack:
            f = block.attention(block.around_attention.norm(x), block.around_attention, block.drop_weights,
                                block.drop_heads)  # fmt: skip
            x = skip * x + f
            found.append(residual(x))
        sizes[skip] = np.array(found)
    at = np.array([1, 4, 8, 16, 32])
    rate = np.polyfit(at, np.log(sizes[0][at - 1]), 1)[0]
    kept = np.polyfit([4, 8, 16, 32, 64, 96], np.log(sizes[1][[3, 7, 15, 31, 63, 95]]), 1)[0]
    print(f"ln of the distance to rank one by layer: {rate:.3f} without skip connections, {kept:.4f} with them")
    assert rate < -0.2 and sizes[0][31] < 1e-3 * sizes[0][0]
    assert abs(kept) < 0.02 and sizes[1][95] > 0.1
