"""Common random numbers: what two arms of one seed share, and the hashes that prove it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from forking import forked, nano, rows, train, write_text

from albert_ablate.config import check
from albert_ablate.data.packed import BatchOrder, chain
from albert_ablate.model.build import assemble
from albert_ablate.model.decoder import initial_draw
from albert_ablate.streams import digest, stream_seed

pytestmark = pytest.mark.process

ARMS = {
    "pre": ["norm=pre_ln"],
    "post": ["norm=post_ln", "norm_type=rms_norm", "optimizer=sgd", "optimizer.lr=0.1", "dropout=uniform"],
    "deep": ["model.layers=4", "norm=rezero", "data.accumulate=2", "attention=rotary"],
    "tied": ["++model.tied=true", "++model.hidden=24", "norm=deepnorm", "data.accumulate=4"],
    "scarce": ["data.train_size=1500"],
    "scarce_deep": ["data.train_size=1500", "model.layers=3", "data.accumulate=2", "clip=agc"],
    "other seed": ["seed=1"],
}


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("pairing")
    text = write_text(root / "text.txt")
    common = ("checkpoint.seconds=1000", "budget.tokens=2560", "evaluation.every=640")
    return {name: train(nano(text, root / "runs", *common, *arm)) for name, arm in ARMS.items()}


def shapes(record: dict) -> dict[str, torch.Size]:
    model = forked(
        lambda: {
            n: p.shape
            for n, p in assemble(
                check({**record["config"], "paths": {"runs": "runs", "cache": None}})
            ).named_parameters()
        }
    )
    return {name: model[name] for name in record["proof"]["initial_draws"]}


def data_order(record: dict) -> dict[int, str]:
    evals = rows(record["folder"], "evals").to_pylist()
    orders = {(r["step"], r["data_order"]) for r in evals}
    assert len(orders) == len({step for step, _ in orders}), "one order a step, the test rows included"
    return dict(orders)


@pytest.mark.parametrize("one, other", [("pre", "post"), ("pre", "deep"), ("post", "tied"), ("deep", "tied")])
def test_arms_of_a_seed_share_draws_and_batches(one, other, arms):
    a, b = arms[one], arms[other]
    draws_a, draws_b, shapes_a, shapes_b = *(r["proof"]["initial_draws"] for r in (a, b)), shapes(a), shapes(b)
    common = [n for n in draws_a if n in draws_b and shapes_a[n] == shapes_b[n]]
    assert len(common) >= 5 and all(draws_a[n] == draws_b[n] for n in common)
    assert all(draws_a[n] != draws_b[n] for n in draws_a if n in draws_b and n not in common)
    assert data_order(a) == data_order(b) and len(data_order(a)) == 5
    assert a["proof"]["data_order"] == b["proof"]["data_order"] == data_order(a)[20]


def test_every_draw_of_a_run_is_its_own(arms):
    for record in arms.values():
        draws = record["proof"]["initial_draws"]
        assert len(set(draws.values())) == len(draws)


def test_in_the_scarce_regime_batches_are_shared_too(arms):
    assert data_order(arms["scarce"]) == data_order(arms["scarce_deep"])
    assert arms["scarce"]["summary"]["passes"] > 1.5
    assert arms["scarce"]["proof"]["data_order"] != arms["pre"]["proof"]["data_order"]


def test_seeds_share_neither_draws_nor_batches(arms):
    a, b = arms["pre"]["proof"], arms["other seed"]["proof"]
    assert not set(a["initial_draws"].values()) & set(b["initial_draws"].values())
    orders = data_order(arms["pre"]), data_order(arms["other seed"])
    assert orders[0][0] == orders[1][0]  # the text alone
    assert all(orders[0][step] != orders[1][step] for step in orders[0] if step)


def test_the_hashes_are_what_they_say(arms):
    record = arms["scarce_deep"]
    for name, shape in shapes(record).items():
        generator = torch.Generator().manual_seed(stream_seed(0, "init", name))
        assert record["proof"]["initial_draws"][name] == digest(torch.randn(shape, generator=generator).numpy())
    order = BatchOrder((1500 - 1) // 32, 4, 0)
    proof = digest(record["data"]["fingerprint"].encode())
    for step in range(20):
        assert data_order(record).get(step, proof) == proof
        proof = chain(proof, order.indices(step))
    assert proof == record["proof"]["data_order"]


def test_the_batches_trained_on_are_those_of_the_order(tmp_path):
    """The tokens that reach the model, micro-batch by micro-batch, against the order and the packed text."""
    from albert_ablate.training.prepare import prepare
    from albert_ablate.training.run import run

    text = write_text(tmp_path / "text.txt")
    cfg = nano(text, tmp_path, "data.accumulate=2", "data.train_size=1500", "budget.tokens=2560")

    def work() -> tuple[np.ndarray, np.ndarray]:
        from albert_ablate.training.module import LanguageModel

        seen, step = [], LanguageModel.training_step

        def training_step(self, batch, index):
            seen.append(batch.numpy().copy())
            return step(self, batch, index)

        LanguageModel.training_step = training_step
        run(cfg)
        return np.concatenate(seen), np.array(prepare(cfg).dataset.train)

    seen, tokens = forked(work)
    blocks = (len(tokens) - 1) // 32
    passes = [np.random.Generator(np.random.PCG64(stream_seed(0, "data/order", p))).permutation(blocks) for p in (0, 1)]
    expected = np.concatenate(passes)[: 20 * 4]
    assert blocks == 46 and len(seen) == 80
    assert all((row == tokens[32 * i : 32 * i + 33]).all() for row, i in zip(seen, expected, strict=True))


def test_draws_at_scale_are_the_shared_draws_times_the_scale(tmp_path):
    from albert_ablate.model.build import build_model

    text = write_text(tmp_path / "text.txt")
    name = "blocks.1.mlp.down.weight"

    def weights(*overrides: str) -> torch.Tensor:
        return forked(lambda: build_model(nano(text, Path("runs"), *overrides)).get_parameter(name).detach())

    pre, deep = weights("norm=pre_ln"), weights("norm=deepnorm")
    draw = initial_draw(0, name, pre.shape)
    for scaled in (pre, deep):
        ratio = scaled / draw
        assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-5)
    assert not torch.equal(pre, deep)
