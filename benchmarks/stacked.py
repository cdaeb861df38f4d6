"""Do K runs train faster as one model whose parameters have a leading axis of K than one after the other?

    python benchmarks/stacked.py [--models nano mini] [--runs 4 8 16] [--threads 1] [--rounds 8] [--no-dropout [--vmap]]
    python benchmarks/stacked.py --check 200      # losses of the stack against those of separate runs

A prototype of a training step for Pre-LN with layer norm: the runs differ in seed, learning rate, weight decay and
dropout rate. apart: each run's model of ours with clipping by norm and the fused AdamW, one run after the other.
stacked: the same weights, masks and batches in batched matrix products, one attention over all sequences, gradients in
one buffer of K rows, clipped by row, and the fused AdamW on each row with its own learning rate and decay. vmap:
torch.func's vmap of the gradient of one model's loss, then the same optimizer; without dropout, whose masks
are drawn by each model's own sites. processes: two processes of one thread, each with half of the runs, one after the
other; only beside --threads 2.

Sides alternate in one process; medians over rounds of CPU seconds with one thread, of seconds with more. The memory
allocator is told to keep what is freed (GLIBC_KEEPS, Linux): otherwise the stack's large tensors are given back to the
system and taken anew within each step.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETAS, EPS, MAX_NORM = (0.9, 0.95), 1e-8, 1.0
WARM_UP = 1
GLIBC_KEEPS = {"MALLOC_TRIM_THRESHOLD_": str(2 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}


class Run:
    """One run: our model, its learning rate and its weight decay, as the loop of a single run has them."""

    def __init__(self, model: str, seed: int, dropout: bool = True, batch: int | None = None):
        from albert_ablate import build_model, compose

        rate = ["dropout=depth_decay", f"dropout.mean={0.05 + 0.01 * (seed % 4)}"] if dropout else ["dropout=none"]
        cfg = compose([f"model={model}", "norm=pre_ln", f"seed={seed}", *rate])
        self.model = build_model(cfg).train()
        self.lr, self.decay = 1e-3 * (1 + seed % 3), 0.1 * (1 + seed % 2)
        self.batch, self.context = batch or cfg.data.batch, cfg.model.context
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def optimize(self) -> None:
        groups = [
            {"params": [p for p in self.model.parameters() if (p.ndim > 1) is decays], "weight_decay": decay}
            for decays, decay in ((True, self.decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=BETAS, eps=EPS, fused=True)
        self.parameters = list(self.model.parameters())

    def rows(self) -> Tensor:
        """The next batch, (B, T + 1): text with something to learn, every token near the one before it."""
        self.model.clock.set(self.steps, 0)
        self.steps += 1
        steps = torch.randint(5, (self.batch, self.context + 1), generator=self.generator)
        return steps.cumsum(1) % 256

    def step(self) -> float:
        rows = self.rows()
        loss = F.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        return loss.item()


class Optimizer:
    """Clipping by norm and AdamW of K runs whose parameters are views of one (K, N) buffer, those that decay first."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        first = dict(runs[0].model.named_parameters())
        names = sorted(first, key=lambda name: first[name].ndim < 2)
        self.decayed = sum(p.numel() for p in first.values() if p.ndim > 1)
        values = [
            torch.cat([p.detach().flatten() for p in map(dict(r.model.named_parameters()).get, names)]) for r in runs
        ]
        self.weights = torch.stack(values)
        self.gradients, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        self.counts = [torch.zeros(()) for _ in runs for _ in range(2)]
        self.named, at = {}, 0
        for name in names:
            size = first[name].numel()
            shape = (len(runs), *first[name].shape)
            view = self.weights[:, at : at + size].unflatten(1, first[name].shape).view(shape).requires_grad_()
            view.grad = self.gradients[:, at : at + size].unflatten(1, first[name].shape)
            self.named[name] = view
            at += size

    @torch.no_grad()
    def step(self) -> None:
        norms = torch.linalg.vector_norm(self.gradients, dim=1)
        self.gradients.mul_((MAX_NORM / (norms + 1e-6)).clamp(max=1.0)[:, None])
        for k, run in enumerate(self.runs):
            for part, decay in ((slice(0, self.decayed), run.decay), (slice(self.decayed, None), 0.0)):
                count = self.counts[2 * k + (part.start > 0)]
                count += 1
                torch._fused_adamw_(
                    [self.weights[k, part]], [self.gradients[k, part]], [self.mean[k, part]], [self.square[k, part]],
                    [], [count], lr=run.lr, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPS,
                    amsgrad=False, maximize=False,
                )  # fmt: skip
        self.gradients.zero_()


class Stack:
    """K runs as one model. x (K, B T, D)."""

    def __init__(self, runs: Sequence[Run]):
        self.runs, self.optimizer = runs, Optimizer(runs)
        self.w = self.optimizer.named
        model = runs[0].model
        self.layers, self.heads, self.vocabulary = len(model.stack), model.stack[0].attention.heads, 256

    def linear(self, x: Tensor, name: str) -> Tensor:
        return torch.bmm(x, self.w[name + ".weight"].transpose(1, 2))

    def norm(self, x: Tensor, name: str) -> Tensor:
        gain, bias = self.w[name + ".weight"], self.w[name + ".bias"]
        return torch.addcmul(bias[:, None], F.layer_norm(x, x.shape[-1:]), gain[:, None])

    def drop(self, x: Tensor, site: Callable[[Any], Any]) -> Tensor:
        """Each run's own mask at its own rate: its model's site draws it."""
        sites = [site(run.model) for run in self.runs]
        if not any(s.now for s in sites):
            return x
        masks = torch.empty_like(x)
        for mask, s in zip(masks, sites, strict=True):
            s.seed_generator(x.device)
            mask.uniform_().ge_(s.now).mul_(1 / (1 - s.now))
        return x * masks

    def block(self, x: Tensor, layer: int) -> Tensor:
        at, (K, N, D), T = f"blocks.{layer}", x.shape, self.runs[0].context
        h = self.linear(self.norm(x, f"{at}.around_attention.norm"), f"{at}.attention.qkv")
        q, k, v = h.view(K * N // T, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(K, N, D)
        x = x + self.drop(self.linear(mixed, f"{at}.attention.output"), lambda m: m.stack[layer].drop_attention)
        h = F.gelu(self.linear(self.norm(x, f"{at}.around_mlp.norm"), f"{at}.mlp.up"))
        return x + self.drop(self.linear(h, f"{at}.mlp.down"), lambda m: m.stack[layer].drop_mlp)

    def losses(self, rows: Tensor) -> Tensor:
        """(K, B, T + 1) -> (K,)."""
        K, B, T = rows.shape[0], rows.shape[1], rows.shape[2] - 1
        offset = torch.arange(K)[:, None, None] * self.vocabulary
        x = F.embedding(rows[..., :-1] + offset, self.w["embedding.weight"].flatten(0, 1))
        x = (x + self.w["positions.weight"][:, None, :T]).flatten(1, 2)
        x = self.drop(x, lambda m: m.drop_embedding)
        for layer in range(self.layers):
            x = self.block(x, layer)
        logits = self.linear(self.norm(x, "final_norm"), "head")
        each = F.cross_entropy(logits.flatten(0, 1), rows[..., 1:].flatten(), reduction="none")
        return each.view(K, B * T).mean(1)

    def step(self) -> list[float]:
        losses = self.losses(torch.stack([run.rows() for run in self.runs]))
        losses.sum().backward()
        self.optimizer.step()
        return losses.tolist()


class Vmapped:
    """K runs by torch.func: the gradient of one model's loss, vmapped over stacked parameters."""

    def __init__(self, runs: Sequence[Run]):
        self.runs, self.optimizer = runs, Optimizer(runs)
        self.w = {name: p.detach() for name, p in self.optimizer.named.items()}
        model = runs[0].model

        def loss(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
            logits = torch.func.functional_call(model, parameters, (rows[:, :-1],))
            return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

        self.both = torch.func.vmap(torch.func.grad_and_value(loss))

    def step(self) -> list[float]:
        gradients, losses = self.both(self.w, torch.stack([run.rows() for run in self.runs]))
        for name, view in self.optimizer.named.items():
            assert view.grad is not None
            view.grad.copy_(gradients[name])
        self.optimizer.step()
        return losses.tolist()


def made(model: str, count: int, dropout: bool, batch: int | None, optimize: bool) -> list[Run]:
    runs = [Run(model, seed, dropout, batch) for seed in range(count)]
    for run in runs if optimize else ():
        run.optimize()
    return runs


def check(model: str, count: int, steps: int, batch: int | None) -> None:
    """The largest difference of a loss between the stack and separate runs."""
    stack, apart = Stack(made(model, count, True, batch, False)), made(model, count, True, batch, True)
    worst = 0.0
    for _ in range(steps):
        worst = max(worst, *(abs(a - run.step()) for a, run in zip(stack.step(), apart, strict=True)))
    print(f"{model}, {count} runs, {steps} steps: losses apart by at most {worst:.1e}", flush=True)


def half(model: str, count: int, batch: int | None, dropout: bool, rounds: int, gate: Any) -> None:
    """A process with half of the runs: a step of each whenever the gate opens."""
    torch.set_num_threads(1)
    runs = made(model, count, dropout, batch, True)
    for _ in range(rounds):
        gate.wait()
        for run in runs:
            run.step()
        gate.wait()


def measure(model: str, count: int, rounds: int, batch: int | None, dropout: bool, vmap: bool) -> None:
    threads, total = torch.get_num_threads(), WARM_UP + rounds
    apart = made(model, count, dropout, batch, True)
    sides: dict[str, Callable[[], Any]] = {
        "apart": lambda: [run.step() for run in apart],
        "stacked": Stack(made(model, count, dropout, batch, False)).step,
    }
    if vmap:
        sides["vmap"] = Vmapped(made(model, count, dropout, batch, False)).step
    workers = []
    if threads > 1:
        spawn = multiprocessing.get_context("spawn")
        gate = spawn.Barrier(3)
        workers = [
            spawn.Process(target=half, args=(model, count // 2, batch, dropout, total, gate), daemon=True)
            for _ in range(2)
        ]
        for worker in workers:
            worker.start()
        sides["processes"] = lambda: (gate.wait(), gate.wait())
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(total):
        for side, step in sides.items():
            began = clock()
            step()
            if i >= WARM_UP:
                taken[side].append(clock() - began)
    for worker in workers:
        worker.join()
    base, kind = statistics.median(taken["apart"]), "dropout" if dropout else "no dropout"
    print(f"{model}, {count} runs, {kind}, {threads} threads: ms a step of one run, speed over apart")
    for side, seconds in taken.items():
        ratios = sorted(a / s for a, s in zip(taken["apart"], seconds, strict=True))
        here = statistics.median(seconds)
        print(
            f"  {side:20} {here / count * 1e3:7.2f}  {base / here:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano", "mini"])
    parser.add_argument("--runs", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, help="sequences of a run; that of data=wikipedia_en where not given")
    parser.add_argument("--no-dropout", action="store_true", help="in place of depth_decay, each run its own mean")
    parser.add_argument("--vmap", action="store_true", help="only with --no-dropout")
    parser.add_argument("--check", type=int, metavar="STEPS", help="compare losses instead")
    parser.add_argument("--usual-memory", action="store_true", help="leave the memory allocator as it is")
    given = parser.parse_args()
    if not given.usual_memory and GLIBC_KEEPS.keys() - os.environ.keys():  # read by a process when it begins
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **GLIBC_KEEPS})
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", "grad and param do not obey|There is a performance drop")
    for model in given.models:
        for count in given.runs:
            if given.check:
                check(model, count, given.check, given.batch)
            else:
                measure(model, count, given.rounds, given.batch, not given.no_dropout, given.vmap)


if __name__ == "__main__":
    main()
