"""Diagnostics by layer: each figure against its definition, worked out apart; nothing that is watched changes."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from factories import TINY
from forking import forked, nano, outcome, rows, train, write_text

from albert_ablate import build_model
from albert_ablate.analysis.measures import spike_score
from albert_ablate.config import check, checked_config
from albert_ablate.data.packed import BatchOrder, block_count, cache_folder, pack, take_blocks
from albert_ablate.model.build import build
from albert_ablate.model.decoder import ACTIVATIONS
from albert_ablate.optim.clipping import NoClip, global_norm
from albert_ablate.records.history import SCHEMAS, History, read_history
from albert_ablate.trackers.base import merged
from albert_ablate.training import step_stats
from albert_ablate.training.cost import flops_per_token, training_flops
from albert_ablate.training.diagnostics import FLAT, Probe, Weights, noise_parts
from albert_ablate.training.run import run

SHORT = ("budget.tokens=1024", "evaluation.every=1_000_000", "optimizer.lr=0.03")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def model_of(*more):
    cfg = checked_config([*TINY, *more])
    return build_model(cfg).train(), cfg


def tokens(batch=4):
    return torch.randint(0, 256, (batch, 12), generator=torch.Generator().manual_seed(3))


def seen(model, given, activation="gelu"):
    probe = Probe(model, activation)
    with probe.watching():
        model(given)
    return probe.metrics()


# --- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize(
    "more",
    [
        ["norm=pre_ln"],
        ["norm=parallel", "attention=rotary"],
        ["norm=residual_dual", "model.shared=true"],
        ["norm=ngpt", "attention=rotary", "optimizer.weight_decay=0"],
        ["norm=post_ln", "attention.window=5", "attention.softcap=0.5", "attention.kv_heads=1"],
        ["model.gated=true", "model.activation=silu", "attention=qk_norm"],
        ["dropout=uniform", "dropout.sites=[embedding,attention,head,hidden,residual,drop_path]"],
    ],
    ids=lambda more: more[0] + ("+" if len(more) > 1 else ""),
)
def test_figures_of_a_pass_are_what_their_definitions_give(more):
    """Against hooks of our own and attention weights written out."""
    model, cfg = model_of(*more)
    with torch.no_grad():
        expected, given = {}, tokens()
        qkv, z = {}, {}

        def note(place, what):
            return lambda module, args, out=None: expected.__setitem__((*place, what), (args[0], out))

        handles = []
        for layer, block in enumerate(model.stack):
            for name, module, around in block.sublayers:
                handles.append(module.register_forward_hook(note((layer, name), "function")))
                handles.append(around.register_forward_hook(note((layer, name), "stream")))
            mix, act = block.attention.mix, block.mlp.activation
            block.attention.mix = lambda q, k, v, s, d, i=layer, f=mix: (
                qkv.setdefault(i, (q, k, s)),
                f(q, k, v, s, d),
            )[1]
            block.mlp.activation = lambda x, i=layer, f=act: f(z.setdefault(i, x))
        plain = model(given)
        for handle in handles:
            handle.remove()
        for block in model.stack:
            del block.attention.mix, block.mlp.activation
            block.mlp.activation = ACTIVATIONS[cfg["model"]["activation"]]
        probe = Probe(model, cfg["model"]["activation"])
        with probe.watching():
            assert torch.equal(model(given), plain)
        found = probe.metrics()
        assert torch.equal(model(given), plain) and not any("mix" in b.attention.__dict__ for b in model.stack)
    near = lambda x: pytest.approx(float(x), rel=1e-4, abs=1e-5)  # noqa: E731
    rms = lambda x: x.double().square().mean().sqrt()  # noqa: E731
    assert set(found) == {(i, s) for i in range(3) for s in ("attention", "mlp")}
    for (layer, name), figures in found.items():
        (h, y), (_, x) = (expected[layer, name, what] for what in ("function", "stream"))
        x = x if isinstance(x, torch.Tensor) else x[0]
        assert figures["input_rms"] == near(rms(h)) and figures["output_rms"] == near(rms(y))
        assert figures["residual_rms"] == near(rms(x)) and figures["residual_mean"] == near(x.mean())
        assert figures["output_mean"] == near(y.mean())
    for layer, block in enumerate(model.stack):
        q, k, scale = qkv[layer]
        logits = (q[:2] @ k[:2].transpose(-1, -2)).double() * scale
        i, j = torch.arange(12)[:, None], torch.arange(12)
        there = (j <= i) & (j > i - (block.attention.window or 12))
        assert found[layer, "attention"]["max_logit"] == near(logits[..., there].max())
        cap = block.attention.softcap
        weights = (
            (logits if cap is None else cap * torch.tanh(logits / cap)).masked_fill(~there, -torch.inf).softmax(-1)
        )
        assert found[layer, "attention"]["entropy"] == near(torch.special.entr(weights).sum(-1).mean())
        a = ACTIVATIONS[cfg["model"]["activation"]](z[layer]).flatten(0, 1)
        assert found[layer, "mlp"]["dead"] == near((a.abs() < 1e-6).all(0).float().mean())


@pytest.mark.process
def test_uniform_causal_attention_has_its_mean_entropy():
    model, _ = model_of()
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[:32] = 0  # queries and keys
        figures = seen(model, tokens())[0, "attention"]
    assert figures["entropy"] == pytest.approx(math.lgamma(13) / 12, rel=1e-6) and figures["max_logit"] == 0


@pytest.mark.process
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dead_and_saturated_units_are_counted(activation):
    """Three quarters of the units are pushed far into a tail of the activation, by a bias."""
    model, _ = model_of("model.bias=true", f"model.activation={activation}")
    with torch.no_grad():
        mlp = model.blocks[1].mlp
        mlp.up.bias[:48] = -100.0
        if activation == "sigmoid":
            mlp.up.bias[:16] = 100.0  # flat, and alive
    figures = seen(model, tokens(), activation)[1, "mlp"]
    below = {"relu", "relu2"}  # the others are negligibly often below the edge by themselves
    assert figures["dead"] == {"identity": 0.0, "sigmoid": 0.5}.get(activation, 0.75) or activation in below
    assert figures["dead"] >= (0.0 if activation == "identity" else 0.5)
    if activation == "identity":
        assert "saturated" not in figures
    else:
        assert 0.75 <= figures["saturated"] < 0.9


@pytest.mark.parametrize("activation", FLAT)
def test_the_edges_are_where_the_slope_falls_below_a_thousandth(activation):
    edge, both = FLAT[activation]

    def slope(z):
        z = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        return abs(torch.autograd.grad(ACTIVATIONS[activation](z), z)[0].item())

    assert slope(edge - 1e-3) < 1e-3 and slope(edge - 3) < 1e-3
    assert slope(edge + 2e-3) > 1e-3
    assert (slope(-edge + 1e-3) < 1e-3) == both


@pytest.mark.process
def test_a_stream_whose_squares_overflow_has_its_size():
    model, _ = model_of("norm=none")
    with torch.no_grad():
        model.embedding.weight.mul_(1e25)
        figures = seen(model, tokens())
    assert 1e20 < figures[0, "attention"]["input_rms"] < 1e27


@pytest.mark.process
def test_a_non_finite_pass_has_no_live_units():
    model, _ = model_of()
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight.mul_(1e4)  # each query chooses one key
        model.blocks[0].mlp.down.weight.fill_(math.nan)
        figures = seen(model, tokens())
    assert figures[0, "mlp"]["dead"] == 0 and math.copysign(1, figures[0, "attention"]["entropy"]) == 1
    assert figures[0, "attention"]["entropy"] < 0.5
    for layer in (1, 2):
        assert math.isnan(figures[layer, "mlp"]["dead"]) and math.isnan(figures[layer, "mlp"]["saturated"])


# --- gradients, clipping, the step -----------------------------------------------------------------------------------


@pytest.mark.process
def test_norms_changes_and_ratios_are_those_of_the_parameters():
    model, _ = model_of("norm=rezero")
    with torch.no_grad():
        for block in model.stack:
            block.around_attention.gate.fill_(0.5)
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
    named = list(model.named_parameters())
    norm, each = global_norm([p.grad for _, p in named])
    weights, clip = Weights(named, model.places()), NoClip()
    clip(named, norm)
    weights.begin()
    weights.gradients(dict(zip([n for n, _ in named], each, strict=True)), None, clip)
    before = {n: p.detach().clone() for n, p in named}
    with torch.no_grad():
        for _, p in named:
            p.mul_(0.9)
    weights.end()
    found = weights.metrics(0.0, 1.0)
    for (layer, sublayer), figures in found.items():
        mine = [
            n for n in before if n.startswith((f"blocks.{layer}.{sublayer}.", f"blocks.{layer}.around_{sublayer}."))
        ]
        size = math.sqrt(sum(before[n].square().sum().item() for n in mine))
        gradient = math.sqrt(sum(dict(named)[n].grad.square().sum().item() for n in mine))
        assert figures["weight_norm"] == pytest.approx(size, rel=1e-5)
        assert figures["grad_norm"] == pytest.approx(gradient, rel=1e-5)
        assert figures["update_ratio"] == pytest.approx(0.1, rel=1e-5)
    blocks = sum(f["grad_norm"] ** 2 for f in found.values())
    rest = sum(p.grad.square().sum().item() for n, p in named if not n.startswith("blocks."))
    assert math.sqrt(blocks + rest) == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize(
    "clip", ["agc", "value clip.max_value=1e-4", "per_layer clip.max_norm=0.02", "adagc clip.absolute=0.1"]
)
def test_clipped_share_and_ratio_by_sublayer_are_recomputed(clip):
    model, cfg = model_of(*f"clip={clip}".split(), "norm=post_ln")
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
    named = list(model.named_parameters())
    before = {n: p.grad.clone() for n, p in named}
    norm, each = global_norm([p.grad for _, p in named])
    rule = build(cfg["clip"])
    rule.watched = True
    rule(named, norm)
    assert rule.common is None
    _, after = global_norm([p.grad for _, p in named])
    names, weights = [n for n, _ in named], Weights(named, model.places())
    weights.begin()
    weights.gradients(dict(zip(names, each, strict=True)), dict(zip(names, after, strict=True)), rule)
    for (layer, sublayer), figures in weights.metrics(0.0, None).items():
        mine = [
            n for n in before if n.startswith((f"blocks.{layer}.{sublayer}.", f"blocks.{layer}.around_{sublayer}."))
        ]
        changed, units, left = 0, 0, 0.0
        for n in mine:
            g, now = before[n], dict(named)[n].grad
            left += now.square().sum().item()
            if clip == "agc":
                g, now = (x if x.ndim > 1 else x[None] for x in (g, now))
                rows_changed = (now.norm(dim=1) < g.norm(dim=1) * (1 - 1e-5)).sum().item()
                changed, units = changed + rows_changed, units + len(g)
            elif clip.startswith("value"):
                changed, units = changed + (g != now).sum().item(), units + g.numel()
            else:
                changed, units = changed + bool(now.norm() < g.norm() * (1 - 1e-5)), units + 1
        size = math.sqrt(sum(before[n].square().sum().item() for n in mine))
        assert figures["clipped"] == pytest.approx(changed / units, rel=1e-6) and changed
        assert figures["clip_ratio"] == pytest.approx(math.sqrt(left) / size, rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize(
    ("clip", "share"),
    [
        (["clip.max_norm=0.1"], 1.0),
        (["clip=agc"], None),
        pytest.param(["clip=none"], 0.0, marks=pytest.mark.slow),
        pytest.param(["clip=per_layer", "clip.max_norm=0.01"], None, marks=pytest.mark.slow),
        pytest.param(["clip=per_layer", "clip.max_norm=0.05", "clip.unit=block"], None, marks=pytest.mark.slow),
        pytest.param(["clip=value", "clip.max_value=1e-3"], None, marks=pytest.mark.slow),
        pytest.param(["clip=adagc", "clip.absolute=0.1"], 1.0, marks=pytest.mark.slow),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_rows_of_a_run_agree_with_its_steps(clip, share, text, tmp_path):
    """What the layers say of clipping adds up to what the steps say of all, the trunk's part being clipped alike."""
    record = train(nano(text, tmp_path, *SHORT, *clip, "diagnostics.every=4", "data.accumulate=2"))
    steps = {r["step"]: r for r in rows(record["folder"], "steps").to_pylist()}
    layers = rows(record["folder"], "layers").to_pylist()
    assert sorted({r["step"] for r in layers}) == [0, 4, 8]
    for r in layers:
        step = steps[max(r["step"], 1)]
        assert 0 <= r["clipped"] <= 1 and 0 < r["clip_ratio"] <= 1 + 1e-6 and r["grad_norm"] < step["grad_norm"]
        assert (r["clip_ratio"] < 1 - 1e-6) == (r["clipped"] > 0)
        assert (r["update_ratio"] > 0) == (r["step"] > 0)
        if share is not None:
            assert r["clipped"] == share and step["clipped"] == share
            assert r["clip_ratio"] == pytest.approx(step["grad_norm_clipped"] / step["grad_norm"], rel=1e-4)
    for step in steps.values():
        assert step["grad_norm_clipped"] <= step["grad_norm"] * (1 + 1e-6) and step["logit_rms"] > 0
        assert math.isnan(step["noise_scale"]) or step["step"] in (1, 4, 8)
    if share is None:  # the blocks' part of the norm after clipping is no more than the whole
        for step in (0, 4, 8):
            after = sum((r["clip_ratio"] * r["grad_norm"]) ** 2 for r in layers if r["step"] == step)
            assert math.sqrt(after) <= steps[max(step, 1)]["grad_norm_clipped"] * (1 + 1e-5)
    first, again = ([{k: v for k, v in r.items()} for r in layers if r["step"] == s] for s in (0, 4))
    assert first[0]["tokens"] == first[0]["flops"] == 0 and len(first) == len(again) == 4


def test_the_noise_scale_is_that_of_gradients_with_known_noise():
    """Gradients G + noise of covariance Sigma / tokens: S is tr(Sigma) and |G|^2 its square, both without bias."""
    draws = np.random.default_rng(0)
    G, std, b, B = np.full(50, 0.2), 3.0, 4, 16
    parts = []
    for _ in range(4000):
        small = G + std / math.sqrt(b) * draws.standard_normal((B // b, 50))
        parts.append(noise_parts(np.square(small[0]).sum(), np.square(small.mean(0)).sum(), b, B))
    S, square = np.mean(parts, 0)
    assert S == pytest.approx(50 * std**2, rel=0.03) and square == pytest.approx(50 * 0.04, rel=0.15)


@pytest.mark.process
def test_a_batch_in_one_piece_has_a_noise_scale(text, tmp_path, monkeypatch):
    """Step 1 again, from the initial weights: |g|^2 of one of the four sequences, and of all."""
    asked = []
    monkeypatch.setattr(step_stats, "noise_parts", lambda *given: asked.append(given) or noise_parts(*given))
    cfg = check(nano(text, tmp_path, *SHORT, "diagnostics.every=2"))
    record = run(cfg)
    noise = {r["step"]: r["noise_scale"] for r in rows(record["folder"], "steps").to_pylist()}
    assert len(asked) == 3 and all(math.isnan(v) for step, v in noise.items() if step not in (1, 4, 8))
    packed, context = pack(build(cfg["data"]), build(cfg["tokenizer"]), cache_folder(None)), cfg["model"]["context"]
    order = BatchOrder(block_count(packed.train, context), cfg["data"]["batch"], cfg["seed"])
    batch, model = torch.from_numpy(take_blocks(packed.train, order.indices(0), context)), build_model(cfg)
    squares = []
    for part in (batch[:1], batch):
        loss = F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        squares.append(sum(g.square().sum() for g in torch.autograd.grad(loss, [*model.parameters()])).item())
    assert asked[0] == pytest.approx((*squares, context, 4 * context), rel=1e-4)
    S, G = noise_parts(*asked[0])
    assert math.isnan(noise[1]) if G <= 0 else noise[1] == pytest.approx(S / G, rel=1e-6)


# --- nothing changes -------------------------------------------------------------------------------------------------

ARMS = {
    "parallel": ["norm=parallel", "dropout=uniform", "data.accumulate=2"],
    "residual_dual": ["norm=residual_dual", "model.shared=true", "norm_type=batch_norm"],
    "ngpt": ["norm=ngpt", "attention=rotary", "optimizer.weight_decay=0", "trainer.gradient_checkpointing=true"],
    "skips": [
        *("dropout=uniform", "dropout.mean=0.4", "dropout.sites=[layer_drop,attention,hidden]"),
        *("attention.qk_clip=0.5", "clip=agc", "optimizer=muon"),
    ],
    "r_drop": ["loss=r_drop", "dropout=uniform", "model.gated=true", "attention.softcap=2", "optimizer=schedule_free"]
    + ["schedule=constant", "trainer.gradient_checkpointing=true"],
}


@pytest.mark.process
@pytest.mark.parametrize("arm", [pytest.param(a, marks=pytest.mark.slow if a == "r_drop" else ()) for a in ARMS])
def test_diagnostics_leave_losses_and_weights_bit_for_bit(arm, text, tmp_path):
    off, on = (train(nano(text, tmp_path / str(n), *SHORT, *ARMS[arm], f"diagnostics.every={n}")) for n in (0, 1))
    plain, watched = (outcome(r["folder"]) for r in (off, on))
    assert plain["weights"] == watched["weights"] and plain["proof"] == watched["proof"]
    for history in ("steps", "evals"):
        strip = [
            [{k: v for k, v in r.items() if k != "noise_scale"} for r in o["rows"][history]] for o in (plain, watched)
        ]
        assert strip[0] == strip[1]
    first = [r for r in watched["rows"]["layers"] if r["step"] == 0]
    assert plain["rows"]["layers"] == first and len(first) == 4, "the initialization is there for every run"
    assert len(watched["rows"]["layers"]) == 4 * 9


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's compiler, about its own tensors
def test_measuring_compiled_blocks_leaves_training_the_same(text, tmp_path):
    compiled = [*SHORT, "trainer.compile=true", "norm_type=batch_norm", "dropout=uniform", "attention.qk_clip=0.5"]
    off, on, plain = (
        forked(lambda n=n, more=more: run(nano(text, tmp_path / f"{n}{len(more)}", *more, f"diagnostics.every={n}")))
        for n, more in ((0, compiled), (1, compiled), (1, compiled[:3] + compiled[4:]))
    )
    one, two, eager = (outcome(r["folder"]) for r in (off, on, plain))
    assert one["weights"] == two["weights"] and one["proof"] == two["proof"]
    for a, b in zip(two["rows"]["layers"][:4], eager["rows"]["layers"][:4], strict=True):
        for column in ("input_rms", "residual_rms", "entropy", "dead"):
            assert a[column] == b[column] or a[column] == pytest.approx(b[column], rel=1e-4)


# --- histories of other releases -------------------------------------------------------------------------------------

OLD = pa.schema([f for f in SCHEMAS["layers"] if f.name in "step tokens seconds flops layer grad_norm dropout".split()])


def old_row(step):
    return {"step": step, "tokens": step, "seconds": 0.0, "flops": 0.0, "layer": 1, "grad_norm": 2.0, "dropout": 0.1}


def test_an_older_history_is_read_and_gone_on_from(tmp_path):
    old = History(tmp_path, "layers")
    old.schema = OLD
    old.cut(0)
    old.append(**old_row(1))
    length = old.commit()
    old.append(**old_row(2))
    old.commit()
    old.close()
    new = History(tmp_path, "layers")
    for _ in range(2):  # killed before its first commit, and started again
        new.cut(length)
        assert new.table().schema == SCHEMAS["layers"] and new.table()["step"].to_pylist() == [1]
        new.pending = []
        new.append(**{f.name: 0.0 for f in SCHEMAS["layers"]} | old_row(5) | {"sublayer": "mlp"})
        length, before = (new.commit(), length) if _ else (length, length)
        new.close()
    table = read_history(tmp_path, "layers", {"layers": length})
    assert table.schema == SCHEMAS["layers"] and table["step"].to_pylist() == [1, 5]
    assert table["sublayer"].to_pylist() == [None, "mlp"] and math.isnan(table["entropy"][0].as_py())
    new.cut(length)
    new.finish()
    new.close()
    assert read_history(tmp_path, "layers", None)["grad_norm"].to_pylist() == [2.0, 2.0]


def test_a_tracker_gets_the_initialization_and_each_row_once():
    axes = {"tokens": 0, "seconds": 0.0, "flops": 0.0}
    layer = {"layer": 3, "sublayer": "mlp", "grad_norm": 2.0, "entropy": math.nan}
    later = {"steps": [{"step": 1, **axes, "tokens": 8, "loss": 4.0}], "layers": [{"step": 0, **axes, **layer}]}
    first = {"step": 1, **axes, "tokens": 8, "train/loss": 4.0}
    assert merged(later, 1, every_layer=True) == [{**first, "initial/3/mlp/grad_norm": 2.0}]
    later["layers"] += [{"step": 0, **axes, **layer, "layer": n, "grad_norm": g} for n, g in ((4, 5.0), (5, 1.0))]
    paths = {"initial/mlp/grad_norm/min": 1.0, "initial/mlp/grad_norm/median": 2.0, "initial/mlp/grad_norm/max": 5.0}
    assert merged(later, 1) == [{**first, **paths}]


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_phases_add_up_and_skipped_blocks_cost_nothing(text, tmp_path):
    dropped = ["dropout=uniform", "dropout.mean=0.5", "dropout.sites=[layer_drop]", "model.layers=4"]
    cfg = nano(text, tmp_path, "budget.tokens=4096", *dropped)
    record = train(cfg)
    cost = record["cost"]
    assert sum(cost["phases"].values()) == pytest.approx(cost["seconds"], rel=1e-9)
    assert all(value > 0 for value in cost["phases"].values())
    D, T = 16, 32  # 12 D^2 weights a block, and two products of T x T
    block = 3 * (2 * 12 * D * D + 2 * 2 * T * D)
    whole, blocks = training_flops(cfg)
    assert blocks == [block] * 4 and whole == 4 * block + 3 * 2 * 256 * D
    assert record["budget"]["flops"] == pytest.approx(flops_per_token(cfg) * 4096) == (whole - 2 * block) * 4096
    # counted apart: gradient norms by layer are absent where a block was left out
    left = (whole * 4096 - cost["flops"]) / (block * 128)
    assert left == round(left) and 40 < left < 88  # of 4 x 32 draws at 1/2
    flops = rows(record["folder"], "steps")["flops"].to_pylist()
    assert flops[-1] == cost["flops"] and all(
        0 < b - a <= whole * 128 for a, b in zip([0, *flops], flops, strict=False)
    )


@pytest.mark.process
def test_spike_scores_of_runs_are_those_of_their_steps(text, tmp_path):
    from albert_ablate import load_runs

    record = train(nano(text, tmp_path, *SHORT))
    runs = load_runs(tmp_path)
    (score,) = runs.spikes(window=3, deviations=2.0).to_dict("records")
    losses = rows(record["folder"], "steps")["loss"].to_pylist()
    assert score["loss"] == spike_score(losses, 3, 2.0) and score["setting"] == record["setting"]
    assert runs.spikes()["loss"].isna().all()
    assert json.loads((Path(record["folder"]) / "record.json").read_text())["cost"]["phases"]["forward"] > 0
