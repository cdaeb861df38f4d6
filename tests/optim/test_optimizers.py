"""Every optimizer against its formula worked by hand, against other libraries, and for exact resume."""

import copy
import math
import sys
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from factories import SMALL
from forking import nano, outcome, train, write_text
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from albert_ablate import build_model, compose
from albert_ablate.config import ConfigError, checked_config, options, parameters_of
from albert_ablate.model.build import build
from albert_ablate.model.decoder import Decoder
from albert_ablate.optim import optimizers
from albert_ablate.optim.groups import assert_covers, decay_groups, torch_param_groups
from albert_ablate.training.checkpoint import load_checkpoint
from albert_ablate.training.cost import flops_per_token

pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="the extra `optim` is not installed")

# --- formulas, in numpy's float64, a tensor at a time ---------------------------------------------------------------

STEPS = 7
RATES = [0.1, 0.1, 0.05, 0.05, 0.02, 0.1, 0.1]  # a schedule's


def draws(shape, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.normal(size=shape)
    return start, [rng.normal(size=shape) * (1 + 3 * (t == 4)) for t in range(STEPS)]


def ours(factory, shape, more=(), **settings):
    """Weights after each of the steps; `more`: shapes of further parameters beside it, which share its group."""
    params, streams = [], []
    for seed, size in enumerate((shape, *more)):
        start, gradients = draws(size, seed)
        params.append(nn.Parameter(torch.tensor(start)))
        streams.append(gradients)
    optimizer = factory(params, False, lr=RATES[0], **settings)
    trace = []
    for t, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, gradients in zip(params, streams, strict=True):
            p.grad = torch.tensor(gradients[t])
        optimizer.step()
        trace.append(params[0].detach().numpy().copy())
    return np.array(trace), optimizer, params


def by_hand(update, shape):
    w, gradients = draws(shape)
    trace, state = [], {}
    for t, (g, lr) in enumerate(zip(gradients, RATES, strict=True), start=1):
        w = update(w, g, lr, t, state)
        trace.append(w)
    return np.array(trace)


def adam_direction(g, t, s, b1, b2, eps):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    return s["m"] / (1 - b1**t) / (np.sqrt(s["v"] / (1 - b2**t)) + eps)


def hand_independent(w, g, lr, t, s):
    schedule = lr / RATES[0]
    return w - schedule * (RATES[0] * adam_direction(g, t, s, 0.8, 0.9, 1e-3) + 0.01 * w)


def hand_nadam(w, g, lr, t, s):
    k, after = (0.8 * (1 - 0.5 * 0.96 ** (i * 0.05)) for i in (t, t + 1))
    adam_direction(g, t, s, 0.8, 0.9, 0)
    s["k"] = s.get("k", 1) * k
    up = after * s["m"] / (1 - s["k"] * after) + (1 - k) * g / (1 - s["k"])
    return w * (1 - lr * 0.1) - lr * up / (np.sqrt(s["v"] / (1 - 0.9**t)) + 1e-3)


def hand_lion(w, g, lr, t, s):
    m = s.get("m", 0)
    s["m"] = 0.9 * m + 0.1 * g
    return w * (1 - lr * 0.1) - lr * np.sign(0.7 * m + 0.3 * g)


def hand_adafactor(w, g, lr, t, s):
    b2, mean = 1 - t**-0.7, lambda x: math.sqrt((x**2).mean())
    if g.ndim > 1:
        s["r"] = b2 * s.get("r", 0) + (1 - b2) * (g**2).mean(1, keepdims=True)
        s["c"] = b2 * s.get("c", 0) + (1 - b2) * (g**2).mean(0, keepdims=True)
        v = s["r"] * s["c"] / s["r"].mean()
    else:
        v = s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    u = g / np.sqrt(v)
    return w * (1 - lr * 0.1) - min(lr, t**-0.5) * max(0.5, mean(w)) * u / max(1, mean(u) / 1.1)


def hand_lamb(w, g, lr, t, s):
    u = adam_direction(g, t, s, 0.8, 0.9, 1e-3) + 0.1 * w
    ratio = np.linalg.norm(w) / np.linalg.norm(u) if w.ndim > 1 else 1.0
    return w - lr * ratio * u


def hand_cautious(w, g, lr, t, s):
    u = adam_direction(g, t, s, 0.8, 0.9, 1e-3)
    mask = u * g > 0
    return w * (1 - lr * 0.1) - lr * u * mask / max(mask.mean(), 1e-3)


def hand_stable(w, g, lr, t, s):
    u = adam_direction(g, t, s, 0.8, 0.9, 1e-3)
    rms = math.sqrt((g**2 / np.maximum(s["v"] / (1 - 0.9**t), 1e-6)).mean())
    lr = lr / max(1, rms)
    return w * (1 - lr * 0.1) - lr * u


def hand_spam(w, g, lr, t, s):
    """interval 5, warmup 2, grace 2, threshold 2: step 5 resets; steps 2, 3, 4 and 7 cut."""
    if t == 5:
        s["m"], s["v"] = 0 * g, 0 * g
    if t in (2, 3, 4, 7):
        cut = g**2 > 2 * s["v"]
        g = np.where(cut, np.sign(g) * np.sqrt(2 * s["v"]), g)
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    s["v"] = 0.9 * s.get("v", 0) + 0.1 * g**2
    # torch's CosineAnnealingLR(T_max=3) at 0 and 1, in the authors' code, is what is taken off the rate
    warm = {5: 1 - 0.99, 6: 1 - 0.99 * (1 + math.cos(math.pi / 3)) / 2}.get(t, 1)
    step = lr * warm * math.sqrt(1 - 0.9**t) / (1 - 0.8**t)
    return (w - step * s["m"] / (np.sqrt(s["v"]) + 1e-3)) * (1 - lr * 0.1)


def hand_schedule_free(y, g, lr, t, s):
    """With x, z and y written out, as in the paper."""
    x, z = s.get("x", y), s.get("z", y)
    s["v"] = 0.9 * s.get("v", 0) + 0.1 * g**2
    d = g / (np.sqrt(s["v"] / (1 - 0.9**t)) + 1e-3) + 0.1 * y
    s["peak"] = max(lr, s.get("peak", 0))
    s["total"] = s.get("total", 0) + s["peak"] ** 2
    c = s["peak"] ** 2 / s["total"]
    s["z"] = z - lr * d
    s["x"] = (1 - c) * x + c * s["z"]
    return 0.2 * s["z"] + 0.8 * s["x"]


def hand_sophia(w, g, lr, t, s):
    """Without an estimate of the curvature: h = 0, and the step is lr sign(m)."""
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    return w * (1 - lr * 0.1) - lr * np.sign(s["m"])


def hand_soap(w, g, lr, t, s, frequency=2):
    b1, b2 = 0.9, 0.8
    if t == 1:
        s["L"], s["R"] = (1 - b2) * g @ g.T, (1 - b2) * g.T @ g
        s["QL"], s["QR"] = (np.linalg.eigh(s[k])[1][:, ::-1] for k in "LR")
        return w
    k = t - 1  # the first gradient only makes the bases
    turned = s["QL"].T @ g @ s["QR"]
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * turned**2
    u = s["QL"] @ (s["QL"].T @ s["m"] @ s["QR"] / (np.sqrt(s["v"]) + 1e-6)) @ s["QR"].T
    w = (w - lr * math.sqrt(1 - b2**k) / (1 - b1**k) * u) * (1 - lr * 0.1)
    s["L"], s["R"] = b2 * s["L"] + (1 - b2) * g @ g.T, b2 * s["R"] + (1 - b2) * g.T @ g
    if k % frequency == 0:
        for axis, (basis, product) in enumerate((("QL", "L"), ("QR", "R"))):
            turned = s[product] @ s[basis]
            order = np.argsort(-(s[basis] * turned).sum(0), kind="stable")
            s["v"] = np.take(s["v"], order, axis)
            s[basis] = np.linalg.qr(turned[:, order])[0]
    return w


HALF = {"betas": (0.8, 0.9), "eps": 1e-3}
FORMULAS = {
    "independent_adamw": (hand_independent, {**HALF, "weight_decay": 0.01}),
    "nadam": (hand_nadam, {**HALF, "weight_decay": 0.1, "momentum_decay": 0.05}),
    "lion": (hand_lion, {"betas": (0.7, 0.9), "weight_decay": 0.1}),
    "adafactor": (hand_adafactor, {"weight_decay": 0.1, "beta2_decay": -0.7, "eps": 0.5, "d": 1.1}),
    "lamb": (hand_lamb, {**HALF, "weight_decay": 0.1}),
    "cautious": (hand_cautious, {**HALF, "weight_decay": 0.1}),
    "stable_adamw": (hand_stable, {**HALF, "weight_decay": 0.1}),
    "spam": (hand_spam, {**HALF, "weight_decay": 0.1, "interval": 5, "warmup": 2, "grace": 2, "threshold": 2.0}),
    "schedule_free": (hand_schedule_free, {**HALF, "weight_decay": 0.1}),
    "sophia": (hand_sophia, {"betas": (0.8, 0.9), "weight_decay": 0.1}),
}


@pytest.fixture
def double():
    """torch keeps step counters and NAdam's products in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(4, 3), (5,), ()], ids=["matrix", "vector", "scalar"])
@pytest.mark.parametrize("name", FORMULAS)
def test_optimizer_takes_the_steps_of_its_formula(name, shape, double):
    update, settings = FORMULAS[name]
    got, *_ = ours(getattr(optimizers, name), shape, more=[(3, 2)], **settings)
    expected = by_hand(update, shape)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert np.abs(np.diff(got, axis=0)).max() > 1e-4


@pytest.mark.parametrize("frequency", [2, 100])
def test_soap_takes_the_steps_of_its_formula(frequency):
    """The library's QR is in float32, which rounds the bases at 1e-7."""
    settings = {"betas": (0.9, 0.8), "eps": 1e-6, "weight_decay": 0.1, "frequency": frequency}
    got, *_ = ours(optimizers.soap, (4, 3), **settings)
    expected = by_hand(lambda *a: hand_soap(*a, frequency=frequency), (4, 3))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 if frequency == 2 else 1e-9)


def newton_schulz(g):
    x = g.astype(np.float64)
    x = x.T if len(x) > x.shape[1] else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(g) > g.shape[1] else x


@pytest.mark.parametrize(
    ("scale", "factor"), [("original", math.sqrt(2)), ("match_rms_adamw", 0.2 * math.sqrt(6))], ids=["jordan", "liu"]
)
def test_muon_takes_the_steps_of_its_formula_within_bfloat16(scale, factor):
    def update(w, g, lr, t, s):
        s["B"] = 0.9 * s.get("B", 0) + 0.1 * g
        return w * (1 - lr * 0.1) - lr * factor * newton_schulz(0.9 * s["B"] + 0.1 * g)

    got, *_ = ours(optimizers.muon, (6, 3), momentum=0.9, scale=scale, weight_decay=0.1)
    moved = np.abs(np.diff(got, axis=0)).max()
    np.testing.assert_allclose(got, by_hand(update, (6, 3)), rtol=0, atol=0.1 * moved)


def softmax_regression(seed=0):
    """Inputs (2, 3, 5) of a softmax regression onto 4 classes, its weights, and its probabilities (2, 3, 4)."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(2, 3, 5)), rng.normal(size=(4, 5))
    p = np.exp(x @ w.T)
    return x, w, p / p.sum(-1, keepdims=True)


def test_sophia_divides_by_squared_gradients_of_own_labels(double):
    """Steps 1 and 3 of interval 2, in two micro-batches, labels by inverting the cumulative probabilities."""
    x, w, _ = softmax_regression()
    weight, rng, m, h = nn.Parameter(torch.tensor(w)), np.random.default_rng(1), 0, 0
    optimizer = optimizers.sophia([weight], False, lr=0.1, betas=(0.8, 0.9), rho=30, interval=2, weight_decay=0.1)
    for t, lr in enumerate(RATES[:4], start=1):
        assert optimizer.due == (t % 2 == 1)
        if optimizer.due:
            s = 0
            for micro in x:
                p = np.exp(micro @ w.T)
                p /= p.sum(-1, keepdims=True)
                u = rng.random(3)
                labels = [np.flatnonzero(edges > draw)[0] for edges, draw in zip(p.cumsum(-1), u, strict=True)]
                s = s + (p - np.eye(4)[labels]).T @ micro / 6
                optimizer.sample((torch.tensor(micro) @ weight.T)[None], torch.tensor(u)[None])
            h = 0.9 * h + 0.1 * 6 * s**2
        g = rng.normal(size=w.shape)
        m = 0.8 * m + 0.2 * g
        w = w * (1 - lr * 0.1) - lr * np.clip(m / (30 * h), -1, 1)
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor(g)
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-9)
        assert not optimizer.sums
    assert 0 < np.mean(np.abs(m / (30 * h)) < 1) < 1  # some coordinates are clipped, some not


def test_sophias_estimate_is_the_gauss_newton_diagonal(double):
    """Of a softmax regression it is the mean over predictions of p (1 - p) x^2."""
    x, w, p = softmax_regression()
    exact = np.einsum("btv,btd->vd", p * (1 - p), x**2) / 6
    weight, inputs, total = nn.Parameter(torch.tensor(w)), torch.tensor(x), 0
    optimizer = optimizers.sophia([weight], False, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        optimizer.sums, optimizer.count = {}, 0
        optimizer.sample(inputs @ weight.T, torch.rand(2, 3, generator=generator))
        total = total + optimizer.sums[weight].square() / optimizer.count
    np.testing.assert_allclose(total.numpy() / 600, exact, rtol=0.3)


def test_sophia_s_further_backward_passes_count_in_the_cost():
    plain, more = (flops_per_token(composed(f"optimizer={o}")) for o in ("adamw", "sophia"))
    assert more == pytest.approx(plain * (3 + 2 / 10) / 3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss=r_drop", "dropout=uniform"], "loss=r_drop, whose two passes"),
        (["norm=pre_ln", "norm_type=power_norm"], "norm_type=power_norm, whose backward pass"),
        (["trainer=gpu", "trainer.precision=16-mixed"], "trainer.precision=16-mixed"),
        (["trainer.compile=true"], "trainer.compile=true, which allows one backward pass"),
        (["trainer=fsdp", "clip=norm"], None),
    ],
)
def test_settings_unfit_for_sophias_second_pass_are_refused(overrides, words):
    sentence = f"optimizer=sophia is not allowed with {words}" if words else "optimizer=sophia needs whole matrices"
    with pytest.raises(ConfigError, match=sentence):
        compose([*TINY, "optimizer=sophia", *overrides])


THEIRS = {
    "stable_adamw": lambda p: pytorch_optimizer.StableAdamW(p, lr=0.1, **HALF, weight_decay=0.1),
    "lion": lambda p: pytorch_optimizer.Lion(p, lr=0.1, betas=(0.7, 0.9), weight_decay=0.1),
}


def other(make, shape):
    start, gradients = draws(shape)
    p = nn.Parameter(torch.tensor(start))
    optimizer = make([p])
    getattr(optimizer, "train", lambda: None)()
    trace = []
    for g, rate in zip(gradients, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.tensor(g)
        optimizer.step()
        trace.append(p.detach().numpy().copy())
    return np.array(trace), optimizer, p


@pytest.mark.parametrize("name", THEIRS)
def test_optimizer_takes_pytorch_optimizer_s_steps(name):
    got, *_ = ours(getattr(optimizers, name), (4, 3), **FORMULAS[name][1])
    np.testing.assert_allclose(got, other(THEIRS[name], (4, 3))[0], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:You are using weight_decay")
@pytest.mark.parametrize(
    ("name", "theirs", "more"),
    [
        ("stable_adamw", "StableAdamW", {"weight_decay": 0.1}),
        ("independent_adamw", "AdamW", {"weight_decay": 0.01, "decouple_lr": True, "max_lr": RATES[0]}),
        ("lion", "Lion", {"weight_decay": 0.1, "betas": (0.7, 0.9), "eps": None}),
    ],
)
def test_optimizer_takes_optimi_s_steps(name, theirs, more):
    optimi = pytest.importorskip("optimi", reason="the package torch-optimi is not installed")
    settings = {k: v for k, v in (HALF | more).items() if v is not None}
    got, *_ = ours(getattr(optimizers, name), (4, 3), **FORMULAS[name][1])
    expected, *_ = other(lambda p: getattr(optimi, theirs)(p, lr=RATES[0], foreach=False, **settings), (4, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_schedule_free_is_the_authors_in_both_modes():
    schedulefree = pytest.importorskip("schedulefree", reason="the authors' package is not installed")
    got, optimizer, (p, *_) = ours(optimizers.schedule_free, (4, 3), **HALF, weight_decay=0.1)
    expected, theirs, q = other(lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1, **HALF, weight_decay=0.1), (4, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    theirs.eval()
    before = p.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, before)
    assert torch.equal(p, before)


def test_where_pytorch_optimizer_is_not_the_paper_s_ours_is():
    """LAMB: bias correction, and no cut of the norm at 10. Cautious: the mean over agreeing coordinates alone."""
    w, g = np.full((2, 2), 20.0), np.array([[1.0, -2.0], [3.0, 0.5]])
    p = nn.Parameter(torch.tensor(w))
    optimizer = optimizers.lamb([p], False, lr=0.01, eps=1e-12, weight_decay=0.0)
    p.grad = torch.tensor(g)
    optimizer.step()  # after one step m_hat / sqrt(v_hat) is sign(g), of norm 2; ||w|| is 40
    np.testing.assert_allclose(p.detach().numpy(), w - 0.01 * np.sign(g) * 20, rtol=1e-9)
    gate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = optimizers.cautious([gate], False, lr=0.01, eps=1e-12, weight_decay=0.0)
    gate.grad = torch.tensor(5.0, dtype=torch.float64)
    optimizer.step()
    assert gate.item() == pytest.approx(0.99)


@pytest.mark.parametrize(("mean", "factor"), [("gradient", 1.0), ("all", 4.0)])
def test_cautious_mean_ignores_embedding_rows_without_gradient(mean, factor):
    """One row of four has a gradient, and all of it agrees: AdamW's step, or by the authors' code four times that."""
    w = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
    optimizer = optimizers.cautious([w], False, lr=0.01, eps=1e-12, weight_decay=0.0, mean=mean)
    w.grad = torch.zeros_like(w)
    w.grad[1] = torch.tensor([3.0, -0.2])
    optimizer.step()  # Adam's first step is lr sign(g)
    expected = np.zeros((4, 2))
    expected[1] = [-0.01 * factor, 0.01 * factor]
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-9)


def test_a_row_that_spam_sees_late_moves():
    """Its second moment is 0 until its first gradient, of which nothing is cut."""
    w = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = optimizers.spam([w], False, lr=0.01, eps=1e-12, interval=500, grace=3)
    for step in range(1, 31):
        w.grad = torch.tensor([[1.0], [1.0 if step > 25 else 0.0]], dtype=torch.float64)
        optimizer.step()
    assert w[1].item() < -1e-3 and w[0].item() < w[1].item()


def test_spam_s_warm_up_is_the_authors():
    """150 steps, the first after a reset at a hundredth of the rate (0.99 comes off)."""
    assert parameters_of("albert_ablate.optim.optimizers.spam")["warmup"][1] == 150
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optimizers.spam([w], False, lr=1.0, betas=(0.0, 0.0), eps=1e-12, interval=5, warmup=3, grace=4)
    moved = []
    for _ in range(8):
        before = w.item()
        w.grad = torch.ones_like(w)
        optimizer.step()
        moved.append(before - w.item())
    cosine = [0.99 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(3)]
    np.testing.assert_allclose(moved, [1, 1, 1, 1, *(1 - c for c in cosine), 1], rtol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "stable_adamw", "nadam", "cautious", "soap", "sophia"])
def test_decay_without_gradient_shrinks_by_lr_times_decay(name):
    """(1 - 0.01 * 0.1)^100 = 0.904793; SOAP's first step only makes its bases."""
    w = nn.Parameter(torch.ones(3, 3))
    optimizer = getattr(optimizers, name)([w], False, lr=0.01, weight_decay=0.1)
    for _ in range(100 + (name == "soap")):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert w.detach().numpy() == pytest.approx(0.904793, abs=1e-5)


# --- every option on disk -------------------------------------------------------------------------------------------

TINY = [*SMALL, "schedule=constant", "norm=rezero"]
SMALL = {  # so that six steps meet what matters: resets, refreshed bases
    "spam": ["optimizer.interval=4", "optimizer.warmup=2", "optimizer.grace=2", "optimizer.threshold=0.5"],
    "soap": ["optimizer.frequency=2"],
    "sophia": ["optimizer.interval=2", "optimizer.rho=1e3"],
}
NAMES = options()["optimizer"]


@cache
def composed(*overrides):
    return checked_config([*TINY, *overrides])


def started(name, *model_overrides, **settings):
    node = composed(f"optimizer={name}", *SMALL.get(name, []))["optimizer"]
    model = build_model(composed(*model_overrides))
    optimizer = build({**node, **settings}, decay_groups(model), True)
    assert_covers(optimizer, model)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def advance(model, optimizer, schedule, steps, skipped=()):
    """Steps with gradients drawn from each step's own stream; some parameters have none in odd steps."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            g = torch.randn(p.shape, generator=generator)
            p.grad = None if step % 2 and name.startswith(skipped or "nothing") else g
        if getattr(optimizer, "due", False):
            tokens = torch.randint(0, 256, (2, 16), generator=generator)
            optimizer.sample(model(tokens), torch.rand(2, 16, generator=generator))
        optimizer.step()
        schedule.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_checkpoint_three_steps_are_six_steps(name, tmp_path):
    random_state = torch.get_rng_state()
    whole = started(name)
    advance(*whole, range(6), skipped=("blocks.1.",))
    first = started(name)
    advance(*first, range(3), skipped=("blocks.1.",))
    kept = {"w": first[0].state_dict(), "o": first[1].state_dict(), "s": first[2].state_dict()}
    torch.save(kept, tmp_path / "kept.ckpt")
    second, kept = started(name), torch.load(tmp_path / "kept.ckpt", weights_only=True)
    for part, key in zip(second, "wos", strict=True):
        part.load_state_dict(kept[key])
    advance(*second, range(3, 6), skipped=("blocks.1.",))
    assert torch.equal(flat(second[0]), flat(whole[0]))
    assert flat(whole[0]).isfinite().all() and flat(whole[0]).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), random_state), "it drew from torch's global generator"


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 3])
def test_a_step_without_gradients_changes_nothing(name, after):
    model, optimizer, schedule = started(name)
    advance(model, optimizer, schedule, range(after))
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad(set_to_none=True)
    optimizer.step(lambda: None)
    assert torch.equal(flat(model), before)
    assert same(optimizer.state_dict(), state)


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_of_a_group_is_that_of_its_parameters_alone(name):
    """At a rate of 0 for all groups but one, only that one's parameters move."""
    model, optimizer, schedule = started(name, "norm=pre_ln")
    optimizer.param_groups[0]["lr"] = 0.0
    before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
    advance(model, optimizer, schedule, range(1))
    optimizer.param_groups[0]["lr"] = 0.0
    advance(model, optimizer, schedule, range(1, 2))
    moved = [
        [not torch.equal(p, old) for p, old in zip(group["params"], values, strict=True)]
        for group, values in zip(optimizer.param_groups, before, strict=True)
    ]
    assert len(moved) > 1 and not any(moved[0]) and all(map(all, moved[1:]))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("soap", "schedule_free")])
def test_a_parameter_seen_late_takes_its_first_step_as_any_other(name):
    """Adam's first step is a sign; a counter shared with others would correct for steps it never took."""
    settings = {"spam": {"grace": 10**6}}.get(name, {})
    early, late = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    g = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, 2.0]])
    factory = getattr(optimizers, name)
    optimizer = factory([early, late], False, lr=0.01, weight_decay=0.0, **settings)
    for _ in range(5):
        early.grad = torch.ones(3, 2)
        optimizer.step()
    late.grad = g.clone()
    optimizer.step()
    alone = nn.Parameter(torch.ones(3, 2))
    single = factory([alone], False, lr=0.01, weight_decay=0.0, **settings)
    alone.grad = g.clone()
    single.step()
    torch.testing.assert_close(late, alone)


def test_without_the_library_one_sentence_names_the_extra(monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == "pytorch_optimizer"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r"optimizer=lion needs pytorch_optimizer, .*pip install 'albert_ablate\[opt"):
        optimizers.lion([nn.Parameter(torch.ones(1))], True, lr=0.1)
    optimizers.adamw([nn.Parameter(torch.ones(1))], True, lr=0.1)


# --- Muon is one optimizer ------------------------------------------------------------------------------------------


def test_muon_takes_the_blocks_matrices_and_adamw_all_else():
    model, optimizer, _ = started("muon", "norm=pre_ln", "model.bias=true")
    names = {id(p): n for n, p in model.named_parameters()}
    by_muon = {names[id(p)] for g in optimizer.param_groups if "ns_steps" in g for p in g["params"]}
    parts = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    assert by_muon == {f"blocks.{i}.{part}.weight" for i in range(2) for part in parts}


@pytest.mark.parametrize("split", [True, False])
def test_fused_queries_keys_and_values_are_three_matrices_or_one(split):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(12, 4, generator=generator)
    fused, pieces = nn.Parameter(w.clone()), [nn.Parameter(x.clone()) for x in (w.chunk(3) if split else [w])]
    group = {"params": [fused], "kind": "matrices", "factors": {}, "parts": 3}
    optimizer = optimizers.muon([group], False, lr=0.02, weight_decay=0.1, split=split)
    theirs = torch.optim.Muon(pieces, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        fused.grad = torch.randn(12, 4, generator=generator)
        for piece, g in zip(pieces, fused.grad.chunk(3) if split else [fused.grad], strict=True):
            piece.grad = g.clone()
        optimizer.step()
        theirs.step()
    assert torch.equal(fused, torch.cat(pieces))


# --- which parameters decay, and placements' multipliers --------------------------------------------------------------


def decaying(*overrides):
    """Names of the parameters that decay."""
    cfg = checked_config(["model=nano", "model.layers=2", *overrides])
    model = build_model(cfg)
    optimizer = build(cfg["optimizer"], decay_groups(model), False)
    assert_covers(optimizer, model)
    held = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    return {n for n, p in model.named_parameters() if id(p) in held}, dict(model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_by_default_matrices_embeddings_and_head_decay(name):
    for tied in ("true", "false"):
        model, optimizer, _ = started(name, f"model.tied={tied}", "model.bias=true", weight_decay=0.1)
        for group in optimizer.param_groups:
            assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_the_kinds_that_decay_are_chosen():
    held, named = decaying("optimizer.decay=[matrices]", "model.bias=true")
    assert held == {n for n in named if n.startswith("blocks.") and named[n].ndim == 2}
    held, named = decaying("optimizer.decay=[embeddings]", "attention=learned")
    assert held == {"embedding.weight", "positions.weight"}
    held, named = decaying("optimizer.decay=[gains]")
    assert held and all(n.endswith("norm.weight") and named[n].ndim == 1 for n in held)
    held, named = decaying("optimizer.decay=[biases]", "model.bias=true", "norm_type=layer_norm")
    assert held == {n for n in named if n.endswith(".bias")}


def test_a_tied_head_decays_with_both_its_kinds_or_not_at_all():
    assert "embedding.weight" not in decaying("model.tied=true", "optimizer.decay=[matrices]")[0]
    assert "embedding.weight" in decaying("model.tied=true", "optimizer.decay=[embeddings,head]")[0]
    with pytest.raises(ConfigError, match=r"decay=\[matrices,head\] contradicts model.tied=true.*list both or neither"):
        decaying("model.tied=true", "optimizer.decay=[matrices,head]")


def test_gates_never_decay():
    held, named = decaying("norm=rezero", "optimizer.decay=[matrices,embeddings,head,biases]", "model.bias=true")
    assert {n for n in named if n not in held} == {n for n in named if n.endswith("gate")} != set()


def test_a_choice_of_kinds_that_would_do_nothing_is_refused():
    with pytest.raises(ConfigError, match="optimizer.decay=gains would do nothing: this model has no gains"):
        decaying("norm=rezero", "optimizer.decay=[matrices,gains]")
    with pytest.raises(ConfigError, match="would do nothing: optimizer.weight_decay is 0"):
        decaying("optimizer=sgd", "optimizer.decay=[matrices]")


@pytest.mark.parametrize("name", NAMES)
def test_a_group_for_each_distinct_set_of_multipliers(name, monkeypatch):
    factors = {"up": {"lr": 0.5, "eps": 2.0}, "head": {"weight_decay": 3.0}}
    monkeypatch.setattr(
        Decoder, "multipliers", lambda self, n: next((f for part, f in factors.items() if part in n), {})
    )
    model, optimizer, _ = started(name, "norm=pre_ln", weight_decay=0.1)
    cfg = composed(f"optimizer={name}", *SMALL.get(name, []))["optimizer"]
    found = {n: g for g in optimizer.param_groups for n, p in model.named_parameters() for q in g["params"] if p is q}
    decay = 0.1 / cfg["lr"] if name == "independent_adamw" else 0.1
    assert optimizer.param_groups[0]["lr"] == cfg["lr"]  # the one that is logged
    up, head, down = found["blocks.0.mlp.up.weight"], found["head.weight"], found["blocks.0.mlp.down.weight"]
    assert up["lr"] == cfg["lr"] / 2 and head["lr"] == down["lr"] == cfg["lr"]
    expected = decay if name == "independent_adamw" else 3 * decay  # which knows no multiplier
    assert down["weight_decay"] == pytest.approx(decay) and head["weight_decay"] == pytest.approx(expected)
    assert found["blocks.1.mlp.up.weight"] is up
    if isinstance(down.get("eps"), float) and name != "muon":  # Muon's eps only guards a division by zero
        assert (down["eps"], up["eps"]) == (cfg["eps"], 2 * cfg["eps"])


def test_independent_decay_is_the_same_at_any_rate():
    for factors in ({}, {"lr": 0.25}):
        w = nn.Parameter(torch.ones(2, 2))
        group = {"params": [w], "kind": "matrices", "factors": factors, "parts": 0}
        optimizer = optimizers.independent_adamw([group], False, lr=0.5, weight_decay=0.01)
        w.grad = torch.zeros(2, 2)
        optimizer.step()
        assert w.detach().numpy() == pytest.approx(0.99)


DECOUPLED = ["adamw", "independent_adamw", "nadam", "lion", "adafactor", "muon", "cautious", "stable_adamw", "spam"]
DECOUPLED += ["soap", "sophia", "sgd"]  # sgd's coupled decay is the same arithmetic while its momentum is 0


@cache
def scaled(norm, width, layers):
    """A model whose multipliers count from width 32 and depth 4."""
    shape = [f"model.width={width}", f"model.layers={layers}", "model.heads=2", f"norm={norm}"]
    return build_model(checked_config(["model=nano", "norm.base_width=32", "norm.base_layers=4", *shape]))


@pytest.mark.filterwarnings("ignore:norm=")
@pytest.mark.parametrize("norm", ["completep", "depth_mup"])
@pytest.mark.parametrize("name", DECOUPLED)
def test_the_decay_of_a_step_under_multipliers_is_what_was_asked(name, norm):
    """Of every matrix: lr wd m_L^(a-1), the placement's table, at any width; independent decay wd alone (item by item:
    Dey et al. 2025, 2505.01618, table 1; Wortsman et al. 2023, 2309.14322)."""
    lr, wd, layers = 0.01, 0.1, 8
    for width in (32, 64, 128):
        model = copy.deepcopy(scaled(norm, width, layers))
        settings = {"lr": lr, "weight_decay": wd} | ({"momentum": 0.0} if name == "sgd" else {})
        optimizer = getattr(optimizers, name)(decay_groups(model), False, **settings)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(2 if name == "soap" else 1):  # whose first gradient makes the bases
            optimizer.step()
        for n, p in model.named_parameters():
            if p.ndim < 2:
                assert torch.equal(p, before[n]), n
                continue
            deeper = (layers / 4) ** ({"completep": 1.0, "depth_mup": 0.5}[norm] - 1) if n.startswith("blocks.") else 1
            asked = wd if name == "independent_adamw" else lr * wd * deeper
            found = 1 - (p / before[n])[before[n].abs() > 1e-3].mean().item()
            assert found == pytest.approx(asked, rel=2e-3), (n, width)


@pytest.mark.filterwarnings("ignore:norm=")
@pytest.mark.parametrize("norm", ["completep", "depth_mup"])
@pytest.mark.parametrize("name", ["adam", "lamb", "schedule_free"])
def test_decay_under_multipliers_where_it_is_not_a_factor(name, norm):
    """Adam's coupled decay is wd m_N w in the gradient, as in MuAdam of the package mup. LAMB's step has the length
    lr |w| whatever decays in it. Schedule-free decays z by lr wd y, and at first y = z."""
    lr, wd = 0.01, 0.1
    shape = ["model.width=64", "model.layers=8", f"norm={norm}", "norm.base_width=32", "norm.base_layers=4"]
    model = build_model(checked_config(["model=nano", *shape]))
    optimizer = getattr(optimizers, name)(decay_groups(model), False, lr=lr, weight_decay=wd)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        if p.ndim < 2:
            continue
        inside, deeper = n.startswith("blocks."), {"completep": 1.0, "depth_mup": 2**-0.5}[norm]
        if name == "adam":
            assert groups[id(p)]["weight_decay"] == pytest.approx(wd * (2 if inside else 1))
            continue
        now = optimizer.state[p]["z"] if name == "schedule_free" else p
        found = 1 - (now / before[n])[before[n].abs() > 1e-3].mean().item()
        if name == "lamb":
            assert found == pytest.approx(lr * (deeper / 2 if inside else 1), rel=2e-3), n
        else:
            assert found == pytest.approx(lr * wd * (deeper if inside else 1), rel=2e-3), n


def test_groups_with_the_same_multipliers_are_merged():
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "kind": k, "factors": {}, "parts": 0} for k in "ab"]
    assert len(torch_param_groups(groups, (), 0.1, 0.1)) == 1


# --- schedule-free in a run -------------------------------------------------------------------------------------------


def test_schedule_free_refuses_a_decaying_schedule():
    for shape in set(options()["schedule"]) - {"constant"}:
        with pytest.raises(ConfigError, match=f"schedule={shape} contradicts optimizer=schedule_free.*=constant"):
            compose(["optimizer=schedule_free", f"schedule={shape}"])


@pytest.mark.process
def test_a_schedule_free_run_evaluates_its_averages(tmp_path):
    text = write_text(tmp_path / "text.txt")
    options = ["optimizer=schedule_free", "schedule=constant", "optimizer.lr=0.01"]
    often, seldom = (
        outcome(train(nano(text, tmp_path / every, *options, f"evaluation.every={every}"))["folder"])
        for every in ("300", "4096")
    )
    assert often["weights"]["last.ckpt"] == seldom["weights"]["last.ckpt"]
    assert often["rows"]["steps"] == seldom["rows"]["steps"]
    cfg = nano(text, tmp_path / "300", *options, "evaluation.every=300")
    folder = next((tmp_path / "300").glob("*/seed0"))
    from albert_ablate.data.packed import cache_folder, pack
    from albert_ablate.training.ranks import Ranks
    from albert_ablate.training.validation import Evaluator

    model = build_model(cfg)
    model.load_state_dict(load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"])
    packed = pack(build(cfg["data"]), build(cfg["tokenizer"]), cache_folder(cfg["paths"]["cache"]))
    loss = Evaluator(packed, 32, 512, Ranks()).evaluate(model, "validation", nullcontext())["loss"]
    assert loss == often["summary"]["val_loss"]


@pytest.mark.parametrize("saved", [[], ["head.weight", "embedding.weight"]])
def test_a_checkpoint_of_another_parameter_order_is_refused(saved):
    """torch would hand its state to parameters of other shapes; a fused step then writes past their end."""
    from types import SimpleNamespace

    from albert_ablate.training.module import LanguageModel

    cfg = checked_config(["model=nano", "model.layers=1"])
    module = LanguageModel(build_model(cfg), cfg, 10)
    module._trainer = SimpleNamespace(default_root_dir="runs/a/seed0")
    module.on_load_checkpoint({"micro_batches": 5, "clip": {}, "order": saved})
    with pytest.raises(ConfigError, match="another version .* remove runs/a/seed0"):
        module.configure_optimizers()
