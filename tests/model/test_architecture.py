"""Attention variants, gated MLPs, model sizes, recomputation, compilation and cost against formulas and libraries."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from factories import TINY

from albert_ablate import build_model, compose
from albert_ablate.config import ConfigError, checked_config, identity
from albert_ablate.model.attention import CausalAttention, band
from albert_ablate.model.build import assemble
from albert_ablate.model.decoder import ACTIVATIONS, default_hidden
from albert_ablate.model.dropout import Clock, Dropout
from albert_ablate.model.loss import cross_entropy
from albert_ablate.model.norms import layer_norm, rms_norm, zero_centred_rms_norm
from albert_ablate.model.placements import NoNorm, Site
from albert_ablate.training.cost import flops_per_token, memory


def attention(width=16, heads=4, context=9, layer=0, **more):
    made = CausalAttention(width, heads, context, False, layer, **more)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return made


def around():
    return NoNorm(Site(layer_norm, 0, 1, "attention", width=16, rows=48, inner=16, heads=4, vocabulary=5))


def output(made, x):
    return made(x, around(), *(Dropout(0.0, "here", Clock(0)) for _ in range(2)))


def by_hand(made, x, kv_heads, d, norm_q=lambda q: q, norm_k=lambda k: k, scale=None, cap=None, window=None):
    """Loops over heads, queries and keys."""
    w_q, w_k, w_v = made.qkv.weight.split([4 * d, kv_heads * d, kv_heads * d])
    q, k, v = norm_q(x @ w_q.T), norm_k(x @ w_k.T), x @ w_v.T
    out = torch.zeros(x.shape[0], x.shape[1], 4 * d)
    for b in range(x.shape[0]):
        for head in range(4):
            own, shared = slice(head * d, head * d + d), head // (4 // kv_heads)
            theirs = slice(shared * d, shared * d + d)
            for t in range(x.shape[1]):
                first = 0 if window is None else max(0, t - window + 1)
                s = torch.stack([q[b, t, own] @ k[b, u, theirs] for u in range(first, t + 1)])
                s = s * (d**-0.5 if scale is None else scale)
                s = s if cap is None else cap * torch.tanh(s / cap)
                out[b, t, own] = s.softmax(0) @ v[b, first : t + 1, theirs]
    return out @ made.output.weight.T


def per_head(f, d):
    return lambda x: f(x.unflatten(-1, (-1, d))).flatten(-2)


def rms(x, g):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * g


def layer(x, g):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * g


@pytest.mark.parametrize(
    ("more", "hand"),
    [
        ({}, {}),
        ({"kv_heads": 2}, {"kv_heads": 2}),
        ({"kv_heads": 1, "head_width": 6}, {"kv_heads": 1, "d": 6}),
        ({"softcap": 2.0, "kv_heads": 2}, {"cap": 2.0, "kv_heads": 2}),
        ({"window": 3}, {"window": 3}),
        ({"window": 3, "softcap": 1.5}, {"window": 3, "cap": 1.5}),
        ({"scale": 0.3}, {"scale": 0.3}),
    ],
)
def test_attention_computes_its_formula(more, hand):
    made, x = attention(**more), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    hand = {"kv_heads": 4, "d": 4} | hand
    torch.testing.assert_close(output(made, x), by_hand(made, x, **hand), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["rms_head", "rms_whole", "layer_head", "l2"])
def test_qk_norm_computes_its_formula(kind):
    made, x = attention(qk_norm=kind, kv_heads=2), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    if kind == "l2":
        hand = {"scale": made.cosine.gain, "norm_q": per_head(lambda z: z / z.norm(dim=-1, keepdim=True), 4)}
        hand["norm_k"] = hand["norm_q"]
    else:
        g_q, g_k = made.query_norm.weight, made.key_norm.weight
        f = layer if kind == "layer_head" else rms
        assert g_q.shape == ((16,) if kind == "rms_whole" else (4,)) and g_k.shape == (
            (8,) if kind == "rms_whole" else (4,)
        )
        hand = {"norm_q": lambda z: f(z, g_q), "norm_k": lambda z: f(z, g_k)}
        if kind != "rms_whole":
            hand = {"norm_q": per_head(hand["norm_q"], 4), "norm_k": per_head(hand["norm_k"], 4)}
    torch.testing.assert_close(output(made, x), by_hand(made, x, 2, 4, **hand), rtol=1e-4, atol=1e-4)


def test_l2_qk_norm_starts_at_henry_s_gain_and_the_others_at_one():
    assert build_model(checked_config([*TINY, "attention.qk_norm=l2"])).blocks[0].attention.cosine.gain.item() == (
        pytest.approx(math.log2(12**2 - 12))
    )
    assert build_model(checked_config([*TINY, "attention=qk_norm"])).blocks[1].attention.key_norm.weight.eq(1).all()


def test_a_window_sees_the_last_few_and_full_blocks_see_all():
    assert band(4, 2, torch.device("cpu")).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, True],
    ]
    model = build_model(checked_config([*TINY, "attention.window=4", "attention.full_every=2"]))
    assert [block.attention.window for block in model.blocks] == [4, None, 4]


def test_attention_dropout_with_softcap_keeps_the_mean():
    made, x = attention(softcap=50.0), torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1))
    site, drawn = Dropout(0.3, "here", Clock(0)), []
    for step in range(400):
        site.clock.set(step, 0)
        drawn.append(made(x, around(), site, Dropout(0.0, "heads", Clock(0))).detach())
    samples, expected = torch.stack(drawn), made(x, around(), site.eval(), Dropout(0.0, "heads", Clock(0))).detach()
    assert not torch.equal(samples[0], samples[1])
    error = samples.std(0) / 20  # of a mean of 400
    assert bool(((samples.mean(0) - expected).abs() < 5 * error).all())


def test_muon_takes_grouped_queries_keys_values_as_matrices():
    from albert_ablate.optim import optimizers
    from albert_ablate.optim.groups import decay_groups

    model = build_model(checked_config([*TINY, "attention.kv_heads=1", "norm=none"]))
    w = model.blocks[0].attention.qkv.weight
    pieces = [torch.nn.Parameter(x.detach().clone()) for x in w.split([16, 8, 8])]
    ours = optimizers.muon(decay_groups(model), False, lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(pieces, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        w.grad = torch.randn(w.shape)
        for piece, g in zip(pieces, w.grad.split([16, 8, 8]), strict=True):
            piece.grad = g.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(w, torch.cat(pieces))


def test_grouped_rows_are_drawn_each_at_its_own_scale():
    cfg = compose(["model=nano", "model.width=64", "model.heads=4", "attention.kv_heads=2", "norm=deepnorm"])
    rows = build_model(cfg).blocks[1].attention.qkv.weight.detach().split([64, 32, 32])
    beta = (8 * 4) ** -0.25
    for part, std in zip(rows, [(2 / 128) ** 0.5, (2 / 96) ** 0.5, beta * (2 / 96) ** 0.5], strict=True):
        assert part.std().item() == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid", "identity"])
def test_gated_mlp_is_shazeers_equation_at_equal_parameters(activation):
    gated = ["model.gated=true", f"model.activation={activation}"]
    model = build_model(checked_config([*TINY, "norm=none", *gated, "model.hidden=24"]))
    mlp, x = model.blocks[0].mlp, torch.randn(2, 5, 16)
    expected = (ACTIVATIONS[activation](x @ mlp.gate.weight.T) * (x @ mlp.up.weight.T)) @ mlp.down.weight.T
    torch.testing.assert_close(mlp(x, model.blocks[0].around_mlp, model.blocks[0].drop_hidden), expected)
    plain = build_model(checked_config([*TINY, "norm=none", "model.hidden=24"]))
    name = "blocks.0.mlp.up.weight"
    assert model.initial_draws[name] == plain.initial_draws[name]
    for width in (64, 768, 1536, 4096):
        assert 3 * default_hidden(width, True) == pytest.approx(2 * default_hidden(width, False), rel=1.5 / width * 4)


def test_a_swiglu_layer_is_that_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2)
    theirs, model = (
        llama.LlamaMLP(config),
        build_model(checked_config([*TINY, "model.gated=true", "model.activation=silu"])),
    )
    mlp, x = model.blocks[0].mlp, torch.randn(2, 5, 16)
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(theirs, f"{name}_proj").weight.copy_(getattr(mlp, name).weight)
    ours = mlp(x, model.blocks[0].around_mlp, model.blocks[0].drop_hidden)
    torch.testing.assert_close(ours, theirs(x))


def test_softcapped_logits_and_embedding_scale():
    tokens = torch.randint(0, 256, (2, 12))
    plain, capped = (build_model(checked_config([*TINY, *o])) for o in ([], ["model.logit_softcap=0.7"]))
    torch.testing.assert_close(capped(tokens), 0.7 * torch.tanh(plain(tokens) / 0.7))
    tied, scaled, four = (
        build_model(checked_config([*TINY, *o]))
        for o in (["model.tied=true"], ["model.tied=true", "model.embedding_scale=1"], ["model.embedding_scale=4"])
    )
    assert (tied.embedding_scale, scaled.embedding_scale, four.embedding_scale) == (4, 1, 4)
    assert not torch.equal(tied(tokens), scaled(tokens))


def test_z_loss_and_its_gradient_are_those_of_log_z_squared():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) + 1
    targets = torch.randint(0, 7, (2, 5), generator=generator)
    total, plain = cross_entropy(logits.requires_grad_(), targets, z_loss=0.3)
    log_z = logits.detach().exp().sum(-1, keepdim=True).log()
    assert plain.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    assert (total - plain).item() == pytest.approx(0.3 * log_z.square().mean().item())
    gradient = torch.autograd.grad(total - plain, logits)[0]
    torch.testing.assert_close(gradient, 0.3 * 2 * log_z * logits.detach().softmax(-1) / 10)


def test_zero_centred_rms_norm_is_rms_norm_with_shifted_gain():
    x = torch.randn(3, 8)
    ours, theirs = zero_centred_rms_norm(8, eps=0.1), rms_norm(8, eps=0.1)
    assert torch.equal(ours(x), theirs(x)) and ours.weight.eq(0).all()
    with torch.no_grad():
        ours.weight.fill_(0.5)
        theirs.weight.fill_(1.5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attention.kv_heads=3"], "attention.kv_heads=3 is not allowed: it must divide model.heads=2"),
        (["attention.window=12"], "attention.window=12 would do nothing"),
        (["attention.full_every=2"], "attention.full_every=2 would do nothing"),
        (["attention.window=4", "attention.full_every=1"], "attention.window=4 would do nothing"),
        (["attention.qk_eps=0.1"], "attention.qk_eps=0.1 would do nothing"),
        (["attention.qk_norm=l2", "attention.scale=1"], "attention.scale=1.0 contradicts attention.qk_norm=l2"),
        (["attention=rotary", "attention.head_width=3"], "attention.head_width=3 is odd"),
    ],
)
def test_contradictions_are_refused_in_a_sentence(overrides, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        compose([*TINY, *overrides])


# --- sizes and cost --------------------------------------------------------------------------------------------------


def test_gpt2_small_has_gpt2_s_parameters():
    model = assemble(checked_config(["model=gpt2_small", "tokenizer=bpe", "tokenizer.vocabulary=50257"]))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_albert_shares_one_block_over_96_layers():
    shared, deep = (build_model(checked_config([f"model={m}"])) for m in ("albert_96_shared", "deep_96"))
    assert len(shared.blocks) == 96 and shared.blocks[95].mlp.up.weight is shared.blocks[0].mlp.up.weight
    block = sum(p.numel() for p in deep.blocks[0].parameters())
    assert sum(p.numel() for p in deep.parameters()) - sum(p.numel() for p in shared.parameters()) == 95 * block


def test_albert_agpt_costs_what_the_closed_form_says():
    cfg = compose(["model=albert_agpt", "data.batch=1"])
    layers, D, H, T, V = 96, 1536, 12, 2048, 256
    parameters = layers * (12 * D * D + 4 * D) + 2 * V * D + T * D + 2 * D
    assert parameters == 2_722_434_048
    # a product costs two operations; scores and mixing are T x D each; backward twice forward
    assert flops_per_token(cfg) == 3 * (2 * (layers * 12 * D * D + V * D) + layers * 2 * 2 * T * D)
    parts = memory(cfg)
    assert (parts["weights"], parts["gradients"], parts["moments"]) == (4 * parameters, 4 * parameters, 8 * parameters)
    # kept, in numbers of 4 bytes: stream and norm twice, q k v, mixed values, hidden before and after gelu; statistics
    block = 4 * (T * D * (2 * 2 + 3 + 1 + 2 * 4) + 2 * 2 * T + H * T)
    # outside: token numbers (twice: inputs and targets are one here), stream, normed stream, log probabilities
    trunk = 8 * T + 4 * (2 * T * D + 2 * T + T * V) + 4
    assert parts["activations"] == pytest.approx(layers * block + trunk, rel=1e-4)
    few = ["model=albert_agpt", "data.batch=1", "model.layers=3", "trainer.gradient_checkpointing=true"]
    assert memory(compose(few))["activations"] == pytest.approx(block + 3 * 4 * T * D + trunk, rel=1e-4)


# --- recomputation and compilation -----------------------------------------------------------------------------------

DROPPED = ["dropout=depth_decay", "dropout.sites=[embedding,attention,residual,hidden]"]


def three_steps(*overrides):
    torch.set_num_threads(1)
    model = build_model(checked_config([*TINY, *overrides])).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(3):
        model.clock.set(step, 0)
        rows = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.grad for n, p in model.named_parameters()}


def test_recomputed_blocks_give_the_same_bits_under_dropout():
    plain, again = three_steps(*DROPPED), three_steps(*DROPPED, "trainer.gradient_checkpointing=true")
    assert plain[0] == again[0] and plain[0] != three_steps()[0]
    assert all(torch.equal(g, again[1][n]) for n, g in plain[1].items())


def test_identity_ignores_recomputation_but_not_compilation():
    plain, again, made = (
        identity(compose([*TINY, *o]), "text")
        for o in ([], ["trainer.gradient_checkpointing=true"], ["trainer.compile=true"])
    )
    assert plain == again and plain.setting != made.setting


PEAK = """
import sys, torch
from albert_ablate import build_model, compose
from albert_ablate.training.cost import PeakMemory
torch.set_num_threads(1)
more = ["trainer.gradient_checkpointing=true"] if sys.argv[1] == "1" else []
model = build_model(checked_config(["model=mini", *more])).train()
tokens = torch.zeros(16, 128, dtype=torch.long)
before = PeakMemory()
model(tokens).logsumexp(-1).sum().backward()
print(before.read(torch.device("cpu")))
"""


@pytest.mark.process
@pytest.mark.slow
def test_recomputation_lowers_the_peak_memory():
    peak = [int(subprocess.check_output([sys.executable, "-c", PEAK, arg], text=True)) for arg in "01"]
    assert peak[1] < 0.75 * peak[0], peak


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's compiler, about its own tensors
@pytest.mark.slow
@pytest.mark.parametrize("more", [[], DROPPED, ["attention.softcap=2", "model.gated=true", *DROPPED]])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_give_the_same_losses(more, recompute):
    made = ["trainer.compile=true", f"trainer.gradient_checkpointing={str(recompute).lower()}"]
    plain, compiled = three_steps(*more), three_steps(*more, *made)
    assert compiled[0] == pytest.approx(plain[0], abs=1e-5)
    for name, g in plain[1].items():
        torch.testing.assert_close(compiled[1][name], g, rtol=1e-3, atol=1e-5)


def test_without_a_compiler_one_sentence_says_so(monkeypatch):
    from torch._inductor import config as inductor

    from albert_ablate.model.build import verify_compiler

    verify_compiler("cpu")
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(ConfigError, match="needs a C.. compiler"):
        verify_compiler("cpu")
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.parametrize("norm", ["pre_ln", "rezero"])
def test_a_normalized_embedding_has_unit_variance(norm):
    cfg = compose(["model=nano", f"norm={norm}", "norm_type=rms_norm", "model.embedding_norm=true"])
    model, entered = build_model(cfg), []
    model.blocks[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    model(torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(entered[0].square().mean(-1), torch.ones(2, 9), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_qk_clip_brings_the_largest_logit_of_a_head_to_tau(bias):
    cfg = compose(["model=nano", "model.width=16", f"model.bias={bias}", "attention=rotary", "attention.qk_clip=1.0"])
    model = build_model(cfg).train()
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.qkv.weight[:8] *= 9  # queries of the first head
        if bias:
            attention.qkv.bias.fill_(0.1)
    before, rows = (
        attention.qkv.weight.clone(),
        torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0)),
    )

    def largest():
        model(rows)
        return attention.largest.clone()

    first = largest()
    assert first[0] > 1
    expected = first.clamp(max=1)
    model.after_step()
    scale = (1 / first.clamp(min=1)).sqrt().repeat_interleave(8)
    torch.testing.assert_close(attention.qkv.weight, before * torch.cat([scale, scale, torch.ones(16)])[:, None])
    assert attention.largest is None
    torch.testing.assert_close(largest(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["attention=qk_norm"], "would do nothing"),
        (["norm=hybrid_norm"], "would do nothing"),
        (["attention.kv_heads=1"], "heads that share keys"),
        (["clip=skip_step"], "clip=skip_step"),
        (["optimizer=schedule_free", "schedule=constant"], "optimizer=schedule_free"),
        (["trainer=fsdp"], "trainer.strategy=fsdp"),
    ],
)
def test_qk_clip_is_refused_where_it_would_do_nothing_or_harm(overrides, sentence):
    from albert_ablate.config import ConfigError

    with pytest.raises(ConfigError, match=sentence):
        compose(["model=nano", *overrides, "attention.qk_clip=100"])
