"""Sigma reparametrization against torch's spectral norm and the singular values themselves."""

import pytest
import torch
from factories import SMALL
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from albert_ablate import build_model, compose
from albert_ablate.config import ConfigError, checked_config
from albert_ablate.model.sigma import SigmaLinear
from albert_ablate.training.cost import training_flops


def linear(rows, width=12, bias=True):
    torch.manual_seed(0)
    made = SigmaLinear(nn.Linear(width, sum(rows), bias=bias), rows)
    made.settle()
    return made


def drift(made):
    with torch.no_grad():
        made.weight += 0.1 * torch.randn_like(made.weight)
        made.gamma.mul_(1.7)


def test_the_map_is_torchs_spectral_norm_times_gamma():
    made, x = linear([10]), torch.randn(5, 12)
    drift(made)
    theirs = nn.Linear(12, 10)
    theirs.load_state_dict({"weight": made.weight, "bias": made.bias})
    theirs = spectral_norm(theirs).eval()  # in evaluation it leaves its vectors alone
    kept = theirs.parametrizations.weight[0]
    kept._u.copy_(made.v)
    kept._v.copy_(made.u[0])
    out = nn.functional.linear(x, made.gamma.detach() * theirs.weight, theirs.bias)
    assert torch.allclose(made(x), out, atol=1e-6)
    made(x).square().sum().backward()
    out.square().sum().backward()
    assert torch.allclose(made.weight.grad, theirs.parametrizations.weight.original.grad, atol=1e-4)
    unit = made.weight.detach() / made.sigma().detach()
    by_hand = (2 * made(x) * (x @ unit.T)).sum()  # d/d gamma of |gamma W x / sigma + b|^2
    assert made.gamma.grad.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_each_stacked_matrix_has_its_own_singular_value():
    made = linear([8, 4, 4])
    own = [torch.linalg.matrix_norm(w, 2) for w in made.weight.split([8, 4, 4])]
    assert torch.allclose(made.gamma, torch.stack(own), rtol=1e-5)
    drift(made)
    for _ in range(300):
        made.iterate()
    own = [torch.linalg.matrix_norm(w, 2) for w in made.weight.split([8, 4, 4])]
    assert torch.allclose(made.sigma(), torch.stack(own), rtol=1e-4)
    effective = made(torch.eye(12)).T - made.bias[:, None]
    norms = torch.stack([torch.linalg.matrix_norm(w, 2) for w in effective.split([8, 4, 4])])
    assert torch.allclose(norms, made.gamma, rtol=1e-4)  # gamma is the spectral norm, whatever the weight


@pytest.mark.parametrize("more", [[], ["model.shared=true"], ["model.gated=true", "norm=post_ln"], ["norm=parallel"]])
def test_a_model_begins_as_the_plain_one_then_iterates(more):
    plain, own = (build_model(checked_config([*SMALL, *more, *extra])) for extra in ([], ["model.sigma_reparam=true"]))
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plain(tokens), own(tokens), atol=1e-4) and own.initial_draws == plain.initial_draws
    matrix = own.stack[0].attention.qkv
    assert matrix.rows == [16, 16, 16] and len(own.reparametrized) == 2 * (5 if "model.gated=true" in more else 4)
    drift(matrix)
    u, w = matrix.u.clone(), matrix.weight.detach()[:16]
    own(tokens).sum().backward()
    own(tokens)
    assert torch.equal(matrix.u, u)  # however often the model is asked
    own.after_step()
    v = nn.functional.normalize(w @ u[0], dim=0)
    assert torch.allclose(matrix.u[0], nn.functional.normalize(w.T @ v, dim=0))


@pytest.mark.parametrize(
    "more",
    [
        ["norm=ngpt", "attention=rotary", "optimizer.weight_decay=0"],
        ["norm=fixup"],
        ["attention.qk_clip=50"],
        ["optimizer=schedule_free", "schedule=constant"],
        ["trainer=fsdp", "clip=norm"],
    ],
)
def test_what_it_contradicts_is_refused(more):
    with pytest.raises(ConfigError, match="model.sigma_reparam=true is not allowed with"):
        compose([*SMALL, "model.sigma_reparam=true", *more])


def test_what_it_costs_can_be_counted_before_training():
    plain, own = (checked_config([*SMALL, *more]) for more in ([], ["model.sigma_reparam=true"]))
    assert training_flops(own)[0] == pytest.approx(training_flops(plain)[0], rel=0.01)
