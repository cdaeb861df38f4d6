"""Rules between components ask for traits: a component of any name that declares one is treated like ours."""

import pytest

from albert_ablate import compose
from albert_ablate.config import ConfigError
from albert_ablate.optim import optimizers
from albert_ablate.optim.clipping import AutoClip


@pytest.mark.parametrize(
    ("target", "trait", "given", "sentence"),
    [
        (optimizers.lion, "averages_weights", ["optimizer=lion", "attention.qk_clip=100"], "whose averages it would"),
        (optimizers.lion, "averages_weights", ["optimizer=lion", "model.sigma_reparam=true"], "whose averaged weights"),
        (
            optimizers.lion,
            "averages_weights",
            ["optimizer=lion", "norm=ngpt", "attention=rotary", "optimizer.weight_decay=0"],
            "the average of weights of length 1",
        ),
        (AutoClip, "skips_steps", ["clip=autoclip", "attention.qk_clip=100"], "whose skipped steps would count"),
    ],
)
def test_a_trait_is_enough_to_be_refused(monkeypatch, target, trait, given, sentence):
    compose(given)
    monkeypatch.setattr(target, trait, True, raising=False)
    with pytest.raises(ConfigError, match=sentence):
        compose(given)


def test_a_trait_is_enough_for_shards(monkeypatch):
    given = ["trainer=fsdp", "optimizer=lion"]
    with pytest.raises(ConfigError, match="take optimizer=adam or adamw or sgd, or trainer=ddp"):
        compose(given)
    monkeypatch.setattr(optimizers.lion, "works_on_shards", True, raising=False)
    compose(given)
