"""Several decoders as one: losses, gradients and weights are those of each alone, bit for bit, for every option."""

import pytest
import torch

from albert_ablate import build_model, compose
from albert_ablate.config import construct
from albert_ablate.config.folders import conf_folder
from albert_ablate.model.attention import CausalAttention
from albert_ablate.model.build import assemble
from albert_ablate.model.loss import objective
from albert_ablate.model.stacked import StackedDecoder, unstackable

SMALL = ["model=nano", "model.layers=2", "model.context=16", "dropout=uniform"]
MODELS = 3
ALONE = {
    "norm=normformer": "scale heads",
    "norm=ngpt": "scale heads",
    "norm_type=power_norm": "a mean of its gradients",
    "dropout.sites=[layer_drop]": "skip blocks",
}
OPTIONS = [
    f"{group}={file.stem}" for group in ("norm", "norm_type") for file in sorted((conf_folder() / group).glob("*.yaml"))
]
MORE = [
    ["norm=mix_ln", "norm.share=0.5"],
    ["model.gated=true", "model.bias=true", "norm=fixup"],
    ["model.tied=true", "model.logit_softcap=3"],
    ["model.shared=true", "norm=rezero"],
    ["model.sigma_reparam=true", "model.embedding_norm=true"],
    ["attention.positions=rotary", "attention.kv_heads=2", "attention.qk_norm=rms_head"],
    ["attention.positions=none", "attention.qk_norm=l2", "attention.window=4"],
    ["attention.qk_norm=rms_whole", "attention.softcap=5"],
    ["attention.qk_clip=0.2"],
    ["loss=r_drop"],
    ["loss.z_loss=1e-3"],
    ["trainer.gradient_checkpointing=true"],
    ["dropout.sites=[token,head,drop_path,hidden]"],
    ["dropout.sites=[attention,embedding]", "attention.softcap=5"],
    ["dropout.sites=[attention]", "dropout_time=linear"],
]


def stepped(more, together):
    """Losses, gradients and weights of MODELS models over three steps, by model."""
    torch.set_num_threads(1)
    models, losses, gradients = [], [], []
    for seed in range(MODELS):
        cfg = compose([*SMALL, *more, f"dropout.mean={0.1 * (seed + ('loss=r_drop' in more))}", f"seed={seed}"])
        models.append(build_model(cfg).train())
    loss = construct(cfg.loss)
    stacked = StackedDecoder(models) if together else None
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    for step in range(3):
        draws = torch.Generator().manual_seed(step)
        rows = [torch.randint(256, (4, 17), generator=draws) for _ in models]
        for model in models:
            model.clock.set(step, 0, step, 3)
        if stacked is None:
            totals = [objective(loss, model, part)[0] for model, part in zip(models, rows, strict=True)]
            for total in totals:
                total.backward()
        else:
            times = 2 if "loss=r_drop" in more else 1
            logits = stacked(torch.cat([part[:, :-1].repeat(times, 1) for part in rows])).chunk(MODELS)
            totals = [loss(z, part[:, 1:])[0] for z, part in zip(logits, rows, strict=True)]
            torch.autograd.backward(totals)
        losses += [total.item() for total in totals]
        gradients += [p.grad.clone() for model in models for p in model.parameters()]
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            model.after_step()
            optimizer.zero_grad()
    weights = [tensor for model in models for tensor in model.state_dict().values()]
    return losses, gradients, weights


@pytest.mark.parametrize("more", [*([o] for o in OPTIONS if o not in {*ALONE, "norm=mix_ln"}), *MORE], ids=" ".join)
@pytest.mark.filterwarnings("ignore:norm=")
def test_equals_each_model_alone_bit_for_bit(more):
    alone, together = stepped(more, together=False), stepped(more, together=True)
    assert together[0] == alone[0]
    assert all(map(torch.equal, together[1], alone[1]))
    assert all(map(torch.equal, together[2], alone[2]))


@pytest.mark.parametrize("option", ALONE)
def test_says_what_cannot_be_stacked(option):
    model = assemble(
        compose([*SMALL, option, *(["attention=rotary", "optimizer.weight_decay=0"] * ("ngpt" in option))])
    )
    assert ALONE[option] in unstackable(model)


def test_components_of_ones_own_are_not_stacked(monkeypatch):
    model = assemble(compose(SMALL))
    assert unstackable(model) is None
    monkeypatch.setattr(type(model.stack[0].around_mlp), "__module__", "mine")
    assert unstackable(model) == "a placement of one's own"
    model.final_norm = type("Mine", (torch.nn.LayerNorm,), {})(32)
    monkeypatch.undo()
    assert "a norm of one's own" in unstackable(model)
    model.stack[0].attention.__class__ = type("Mine", (CausalAttention,), {})
    assert unstackable(model) == "an attention of one's own"
