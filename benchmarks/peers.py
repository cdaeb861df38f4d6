"""Training tokens a second of our decoder beside other people's: one loop, optimizer and batch, in one process.

    python benchmarks/peers.py [--models mini deep_96 deep_96x64 12x256] [--threads 1] [--rounds 8] [--batch N]
        [--context N] [--precision bf16]

ours: the decoder that `model=` builds. plain: a GPT-2 written out below, as nanoGPT has it, with torch's attention.
torch: nn.TransformerEncoder with a causal mask. gpt2: that of transformers, with eager attention and with torch's.
x-transformers: its Decoder, without and with torch's attention (flash). All have Pre-LN, learned positions, GELU
without approximation, an MLP of four times the width, no dropout and a head of its own; gpt2 and torch have biases in
their matrices. products: the matrix products of a step alone, forward and backward, attention's over all T x T.

A round makes one step of each, in an order that moves on by one; the first two rounds warm up. Medians over rounds of
CPU seconds of the process with one thread; of seconds with more threads, where CPU seconds would hold the waiting, and
on a GPU (taken where there is one). bf16: forward passes of all under torch.autocast. Needs the extra `reference`. All
models are in memory at once: `--models gpt2_small` takes 12 GB at --batch 1.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODELS = {
    "mini": ["model=mini"],
    "deep_96": ["model=deep_96"],
    "deep_96x64": ["model=deep_96", "model.width=64"],
    "12x256": ["model=mini", "model.layers=12", "model.width=256"],
    "gpt2_small": ["model=gpt2_small"],
}
WARM_UP = 2


@dataclass
class Shape:
    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    batch: int
    device: str
    precision: str = "32"


# --- the models ------------------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.heads = s.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=False)
        self.output = nn.Linear(s.width, s.width, bias=False)
        self.up = nn.Linear(s.width, 4 * s.width, bias=False)
        self.down = nn.Linear(4 * s.width, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).split(D, dim=2)
        q, k, v = (z.view(B, T, self.heads, D // self.heads).transpose(1, 2) for z in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Trunk(nn.Module):
    """Embedding, positions, what `blocks` does with (B, T, D), final norm, head."""

    def __init__(self, s: Shape, blocks: nn.Module):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(s.vocabulary, s.width), nn.Embedding(s.context, s.width)
        self.blocks, self.norm = blocks, nn.LayerNorm(s.width)
        self.head = nn.Linear(s.width, s.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions.weight[: tokens.shape[1]])))


def plain(s: Shape) -> Callable[[Tensor], Tensor]:
    return Trunk(s, nn.Sequential(*(PlainBlock(s) for _ in range(s.layers))))


class CausalEncoder(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            s.width, s.heads, 4 * s.width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, s.layers, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(s.context))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, mask=self.mask, is_causal=True)


def torch_encoder(s: Shape) -> nn.Module:
    return Trunk(s, CausalEncoder(s))


def gpt2(attention: str) -> Callable[[Shape], nn.Module]:
    def make(s: Shape) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=s.vocabulary, n_positions=s.context, n_embd=s.width, n_layer=s.layers, n_head=s.heads,
            activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, attn_implementation=attention,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        return Called(model, lambda tokens: model(tokens).logits)

    return make


def x_transformers(flash: bool) -> Callable[[Shape], nn.Module]:
    def make(s: Shape) -> nn.Module:
        from x_transformers import Decoder, TransformerWrapper

        layers = Decoder(dim=s.width, depth=s.layers, heads=s.heads, attn_dim_head=s.width // s.heads,
                         attn_flash=flash, ff_no_bias=True)  # fmt: skip
        return TransformerWrapper(num_tokens=s.vocabulary, max_seq_len=s.context, attn_layers=layers)

    return make


class Called(nn.Module):
    """A model whose logits are had in its own way."""

    def __init__(self, model: nn.Module, logits: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)


PEERS: dict[str, Callable[[Shape], nn.Module]] = {
    "plain": plain,
    "torch": torch_encoder,
    "gpt2 eager": gpt2("eager"),
    "gpt2 sdpa": gpt2("sdpa"),
    "x-transformers": x_transformers(False),
    "x-transformers flash": x_transformers(True),
}


# --- a step ----------------------------------------------------------------------------------------------------------


def trainer(model: nn.Module, precision: str = "32") -> Callable[[Tensor], None]:
    """One step on (B, T + 1) tokens: cross-entropy, backward, clipping by norm, the fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    parameters = list(model.parameters())

    def step(rows: Tensor) -> None:
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def products(s: Shape) -> Callable[[Tensor], None]:
    """The matrix products of a step: three for each matrix (forward, gradient of the input, of the weights), six for
    each attention."""
    n, d, hd = s.batch * s.context, s.width, s.width // s.heads

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=s.device, dtype=torch.bfloat16 if s.precision == "bf16" else torch.float32)

    sizes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    matrices = [(drawn(n, i), drawn(o, i), drawn(n, o)) for i, o in sizes]
    head = (drawn(n, d), drawn(s.vocabulary, d), drawn(n, s.vocabulary))
    q, weights = drawn(s.batch * s.heads, s.context, hd), drawn(s.batch * s.heads, s.context, s.context)

    def three(x: Tensor, w: Tensor, g: Tensor) -> None:
        x @ w.T, g @ w, g.T @ x

    def step(rows: Tensor) -> None:
        for _ in range(s.layers):
            for x, w, g in matrices:
                three(x, w, g)
            for _ in range(2):
                q @ q.transpose(1, 2)
            for _ in range(4):
                weights @ q
        three(*head)

    return step


# --- the measurement -------------------------------------------------------------------------------------------------


def contestants(
    name: str, batch: int | None, context: int | None, device: str, precision: str
) -> tuple[Shape, dict[str, Callable[[Tensor], None]], dict]:
    from albert_ablate import build_model, compose

    shorter = [f"model.context={context}"] if context else []
    cfg = compose([*MODELS[name], "norm=pre_ln", "dropout=none", *shorter])
    m = cfg.model
    own = build_model(cfg)
    vocabulary = own.head.out_features
    s = Shape(m.layers, m.width, m.heads, m.context, vocabulary, batch or cfg.data.batch, device, precision)
    torch.manual_seed(0)
    models = {"ours": own, **{peer: make(s) for peer, make in PEERS.items()}}
    steps = {peer: trainer(model.to(device).train(), precision) for peer, model in models.items()}
    sizes = {peer: sum(p.numel() for p in model.parameters()) for peer, model in models.items()}
    return s, steps | {"products": products(s)}, sizes


def measure(name: str, rounds: int, batch: int | None, context: int | None, device: str, precision: str = "32") -> dict:
    s, steps, sizes = contestants(name, batch, context, device, precision)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {peer: [] for peer in steps}
    names = list(steps)
    for i in range(WARM_UP + rounds):
        rows = torch.randint(s.vocabulary, (s.batch, s.context + 1), device=device)
        for peer in names[i % len(names) :] + names[: i % len(names)]:
            began = clock()
            steps[peer](rows)
            if device != "cpu":
                torch.cuda.synchronize()
            if i >= WARM_UP:
                taken[peer].append(clock() - began)
    tokens = s.batch * s.context
    medians = {peer: statistics.median(values) for peer, values in taken.items()}
    return {
        peer: {
            "tokens/s": tokens / seconds,
            "of ours": medians["ours"] / seconds,
            # pairs of one round, so that what the machine did meanwhile falls on both
            "range": sorted(o / t for o, t in zip(taken["ours"], taken[peer], strict=True))[:: max(1, rounds - 1)],
            "parameters": sizes.get(peer),
        }
        for peer, seconds in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini", "deep_96", "deep_96x64", "12x256"], choices=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, help="sequences; that of data=wikipedia_en where not given")
    parser.add_argument("--context", type=int, help="tokens of a sequence; that of the model where not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--json", help="write the figures there too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else f"{given.threads} threads"
    results = {}
    for name in given.models:
        results[name] = found = measure(name, given.rounds, given.batch, given.context, given.device, given.precision)
        print(
            f"{name}, {card}, {given.precision}: tokens/s, over ours (least and most of a round), parameters",
            flush=True,
        )
        for peer, f in found.items():
            low, high = f["range"][0], f["range"][-1]
            size = f"{f['parameters']:,}" if f["parameters"] else ""
            print(
                f"  {peer:21} {f['tokens/s']:10,.0f}  {f['of ours']:.2f} ({low:.2f} to {high:.2f})  {size}", flush=True
            )
    if given.json:
        with open(given.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
