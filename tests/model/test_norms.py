"""Norm types against their formulas, libraries, their Jacobians, and what each token may see."""

import math
import signal

import pytest
import torch
from forking import Ambush, Child, nano, outcome, train, write_text
from torch import nn

from albert_ablate import build_model, compose
from albert_ablate.config import ConfigError
from albert_ablate.model import norms
from albert_ablate.training.run import run

D = 8
POINTWISE = [
    norms.layer_norm, norms.rms_norm, norms.zero_centred_rms_norm, norms.scale_norm, norms.simple_rms_norm,
    norms.l2_norm, norms.crms_norm, norms.dyt, norms.derf,
]  # fmt: skip


def sample(*shape, seed=0):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1


def shaken(make, **arguments):
    """The norm with other values than its first ones, so that every parameter shows."""
    norm, generator = make(D, **arguments).double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in norm.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return norm


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_worked_out_by_hand():
    x = torch.tensor([3.0, 4.0, 0.0, 0.0])  # |x| = 5, sum 7, sum of squares 25
    close = lambda y, z: torch.testing.assert_close(y, torch.tensor(z))  # noqa: E731
    close(norms.l2_norm(4)(x), [0.6, 0.8, 0.0, 0.0])
    close(norms.simple_rms_norm(4)(x), [1.2, 1.6, 0.0, 0.0])
    close(norms.scale_norm(4)(x), [1.2, 1.6, 0.0, 0.0])
    close(norms.rms_norm(4)(x), [1.2, 1.6, 0.0, 0.0])
    close(norms.zero_centred_rms_norm(4)(x), [1.2, 1.6, 0.0, 0.0])
    scale = math.sqrt((25 + 49) / 5)
    close(norms.crms_norm(4)(x), [3 / scale, 4 / scale, 0.0, 0.0])
    close(norms.dyt(4, alpha=0.25)(x), [math.tanh(0.75), math.tanh(1.0), 0.0, 0.0])
    close(norms.derf(4, alpha=0.25)(x), [math.erf(0.75), math.erf(1.0), 0.0, 0.0])


@pytest.mark.parametrize("make", [norms.scale_norm, norms.simple_rms_norm, norms.l2_norm])
def test_a_length_below_eps_counts_as_eps(make):
    x = sample(D)
    torch.testing.assert_close(make(D, eps=1e3)(x), make(D)(x).detach() * x.norm() / 1e3, rtol=1e-6, atol=0)


def test_gain_and_bias_are_there_or_are_not():
    names = lambda norm: {n for n, _ in norm.named_parameters()}  # noqa: E731
    assert names(norms.layer_norm(D)) == {"weight", "bias"}
    assert names(norms.layer_norm(D, bias=False)) == {"weight"}
    assert names(norms.layer_norm(D, gain=False)) == {"bias"}
    assert names(norms.layer_norm(D, gain=False, bias=False)) == set()
    for make in (norms.rms_norm, norms.crms_norm):
        assert names(make(D)) == {"weight"} and names(make(D, gain=False)) == set()
    assert names(norms.l2_norm(D)) == names(norms.simple_rms_norm(D)) == set()
    assert names(norms.scale_norm(D)) == {"scale"}
    assert names(norms.dyt(D)) == {"alpha", "weight", "bias"}
    assert names(norms.derf(D)) == {"alpha", "shift", "weight", "bias"}
    x, shifted = sample(5, D), shaken(norms.layer_norm, gain=False)
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(shifted(x), plain + shifted.bias)


def test_crms_is_the_layer_norm_of_one_number_more():
    x = sample(5, D)
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], -1)  # D + 1 numbers of mean 0
    expected = nn.functional.layer_norm(whole, (D + 1,), eps=1e-8)[..., :-1]
    torch.testing.assert_close(norms.crms_norm(D).double()(x), expected)


@pytest.mark.parametrize(
    ("name", "make", "translate"),
    [
        ("ScaleNorm", norms.scale_norm, lambda n: {"g": n.scale.view(1) / D**0.5}),
        ("SimpleRMSNorm", norms.simple_rms_norm, lambda n: {}),
        ("DynamicTanh", norms.dyt, lambda n: {"pre_tanh_scale": n.alpha, "gamma": n.weight, "beta": n.bias}),
        ("Derf", norms.derf, lambda n: {"alpha": n.alpha, "s": n.shift, "gamma": n.weight, "beta": n.bias}),
    ],
)
def test_norms_agree_with_x_transformers(name, make, translate):
    theirs = pytest.importorskip("x_transformers.x_transformers", reason="x-transformers is not installed")
    ours, x = shaken(make), sample(2, 5, D)
    other = getattr(theirs, name)(D).double()
    other.load_state_dict(translate(ours))
    torch.testing.assert_close(ours(x), other(x))


def test_norms_agree_with_transformers():
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2", reason="transformers is not installed")
    olmo = pytest.importorskip("transformers.models.olmo.modeling_olmo")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = sample(2, 5, D).float()
    for make, theirs in ((norms.zero_centred_rms_norm, gemma.Gemma2RMSNorm), (norms.rms_norm, llama.LlamaRMSNorm)):
        ours, other = shaken(make).float(), theirs(D, eps=1e-6)
        other.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), other(x))
    torch.testing.assert_close(norms.layer_norm(D, bias=False, gain=False)(x), olmo.OlmoLayerNorm(D)(x))


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", POINTWISE, ids=lambda m: m.__name__)
def test_gradients_agree_with_finite_differences(make):
    norm = shaken(make)
    parameters = [p.detach().clone().requires_grad_() for p in norm.parameters()]
    names = [n for n, _ in norm.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (sample(3, D).requires_grad_(), *parameters))


def jacobian(norm, x):
    return torch.autograd.functional.jacobian(norm, x)


def test_jacobian_of_layer_norm_norm_and_lost_dimensions():
    x = sample(D)
    values = torch.linalg.svdvals(jacobian(norms.layer_norm(D, eps=1e-30).double(), x))
    torch.testing.assert_close(values[0], 1 / x.std(unbiased=False))
    assert (values > 1e-10).sum() == D - 2


@pytest.mark.parametrize("make", [norms.rms_norm, norms.zero_centred_rms_norm, norms.simple_rms_norm, norms.l2_norm])
def test_jacobian_of_rms_norm_norm_and_lost_dimension(make):
    x = sample(D)
    values = torch.linalg.svdvals(jacobian(make(D, eps=1e-30).double(), x))
    size = x.norm() if make is norms.l2_norm else x.square().mean().sqrt()
    torch.testing.assert_close(values[0], 1 / size)
    assert (values > 1e-10).sum() == D - 1


@pytest.mark.parametrize("make", [m for m in POINTWISE if m not in (norms.dyt, norms.derf)], ids=lambda m: m.__name__)
def test_a_norm_forgets_the_size_of_its_input(make):
    norm, x = shaken(make, eps=1e-20), sample(4, D)
    torch.testing.assert_close(norm(7 * x), norm(x))


@pytest.mark.parametrize("make", [norms.dyt, norms.derf])
def test_a_squash_is_bounded_by_its_gain(make):
    norm = shaken(make)
    y = norm(1e6 * sample(50, D))
    assert ((y - norm.bias).abs() <= norm.weight.abs() + 1e-12).all()
    slope = jacobian(make(D, alpha=0.3).double(), torch.zeros(D, dtype=torch.float64)).diagonal()
    torch.testing.assert_close(slope, torch.full_like(slope, 0.3 * (1 if make is norms.dyt else 2 / math.pi**0.5)))


# --- norms with statistics of several tokens -------------------------------------------------------------------------


def test_batch_norm_pools_batch_and_time_and_keeps_averages():
    norm, x = norms.batch_norm(D, momentum=0.2).double(), sample(4, 6, D)
    mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    torch.testing.assert_close(norm(x), (x - mean) / (var + 1e-5).sqrt())
    torch.testing.assert_close(norm.running_mean, 0.2 * mean)
    torch.testing.assert_close(norm.running_var, 0.8 + 0.2 * var * 24 / 23)
    expected = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(norm.eval()(x), expected)


def test_causal_batch_norm_uses_the_averages_from_before():
    norm, other = norms.batch_norm(D, causal=True).double(), norms.batch_norm(D).double()
    for seed in range(3):
        x = sample(4, 6, D, seed=seed)
        expected = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
        torch.testing.assert_close(norm(x), expected)
        other(x)
        torch.testing.assert_close(norm.running_var, other.running_var)
        torch.testing.assert_close(norm.running_mean, other.running_mean)
    norm(sample(4, 6, D).requires_grad_()).sum().backward()


@pytest.mark.parametrize("warmup", [0, 2])
def test_power_norm_follows_its_recursions(warmup):
    """Forward, phi and the approximate backward pass, written out step by step from the authors' code."""
    norm = norms.power_norm(D, forward_rate=0.9, backward_rate=0.8, warmup=warmup).double()
    phi, nu, eps = torch.ones(D).double(), torch.zeros(D).double(), 1e-5
    for step in range(1, 5):
        x, d = sample(3, 4, D, seed=step), sample(3, 4, D, seed=-step % 97)
        y = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).requires_grad_()
        square = y.detach().square().mean((0, 1))
        z = y.detach() / ((square if step <= warmup else phi) + eps).sqrt()
        if step < warmup:
            phi = phi * (step - 1) / step + square / step
        phi = 0.9 * phi + 0.1 * square
        d_prime = d - 0.2 * nu * z
        nu = nu + (d_prime * z).mean((0, 1))
        norm.zero_grad()
        ours = x.clone().requires_grad_()
        out = norm(ours)
        torch.testing.assert_close(out, z)
        out.backward(d)
        torch.testing.assert_close(norm.phi, phi)
        torch.testing.assert_close(norm.drift, nu)
        inner = torch.autograd.grad(
            torch.nn.functional.rms_norm(again := x.clone().requires_grad_(), (D,), eps=eps),
            again,
            d_prime / (square + eps).sqrt(),
        )[0]
        torch.testing.assert_close(ours.grad, inner)
    torch.testing.assert_close(norm.eval()(x), y.detach() / (phi + eps).sqrt())


LEAKS = {
    "norm_type=batch_norm": True,
    "norm_type=batch_norm norm_type.causal=true": False,
    "norm_type=power_norm norm_type.warmup=3": True,
    "norm_type=power_norm": False,
    "norm_type=layer_norm": False,
}


@pytest.mark.process
@pytest.mark.parametrize(("options", "leaks"), LEAKS.items())
def test_what_a_token_sees_in_training(options, leaks):
    """A later token of its sequence and a token of another sequence, changed one at a time."""
    cfg = compose(["model=nano", "model.layers=2", "model.width=16", "model.context=12", *options.split()])
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))

    def logits(change=None, training=True):
        changed = tokens.clone()
        if change is not None:
            changed[change] = (changed[change] + 1) % 256
        with torch.no_grad():
            model = build_model(cfg)
            model(tokens)  # the second micro-batch is looked at, when there are averages
            return model.train(training)(changed)[0, :8]

    for change in ((0, 9), (1, 2)):
        assert torch.equal(logits(change), logits()) != leaks
        assert torch.equal(logits(change, training=False), logits(training=False))


@pytest.mark.parametrize("option", ["batch_norm", "power_norm"])
def test_statistics_are_filled_kept_in_checkpoints_and_hashed(option):
    from albert_ablate.model.weights import weights_hash

    cfg = compose(["model=nano", "model.layers=2", f"norm_type={option}", "model.shared=true"])
    model = build_model(cfg)
    buffers = dict(model.named_buffers())
    assert buffers and set(buffers) <= set(model.state_dict())
    for name, buffer in buffers.items():
        assert (buffer == (1 if name.endswith(("phi", "running_var")) else 0)).all(), name
    before = weights_hash(model)
    model(torch.zeros(1, 4, dtype=torch.long))
    assert weights_hash(model) != before == weights_hash(build_model(cfg))


@pytest.mark.process
@pytest.mark.parametrize("option", ["batch_norm", "power_norm"])
def test_statistics_survive_a_kill_and_a_cost_estimate(option, tmp_path):
    text = write_text(tmp_path / "text.txt")
    more = (f"norm_type={option}", "budget.tokens=2560", "evaluation.every=640")
    whole = outcome(train(nano(text, tmp_path / "whole", *more), verbose=True)["folder"])
    cfg = nano(text, tmp_path / "killed", *more)
    assert Child(lambda: (Ambush(150).set(), run(cfg))).wait() == ("killed", signal.SIGKILL)
    record = train(cfg)
    assert record["sessions"] == 2 and record["resumed_at"] > 0
    assert outcome(record["folder"]) == whole


@pytest.mark.parametrize("option", ["batch_norm", "power_norm"])
def test_statistics_of_several_devices_are_refused(option):
    with pytest.raises(ConfigError, match="would differ between devices"):
        compose([f"norm_type={option}", "trainer=ddp_cpu", "trainer.devices=2"])
