"""How the time of a training step grows with depth, width, batch and threads: our decoder in the loop of peers.py.

    python benchmarks/growth.py [depth|width|batch|threads] [--rounds 8] [--threads 1]
    python benchmarks/growth.py paper [--mfu 0.4] [--peak 1e15]   # the article's model at GPU size, on assumptions

Depths 6 to 96 at width 32, widths 32 to 256 at 12 layers, batches of 2 to 32 sequences of 64 tokens at 24 layers of
width 64. The members of a series take turns; medians of CPU seconds with one thread, of seconds with more. threads: 1,
2, 4 and so on up to the cores of this machine, in seconds, at 24 layers of width 64, 12 of 256 and 96 of 32.
"""

import argparse
import os
import statistics
import time

import torch
from peers import WARM_UP, trainer

SERIES = {
    "depth": [(n, 32, 8) for n in (6, 12, 24, 48, 96)],
    "width": [(12, n, 8) for n in (32, 64, 128, 256)],
    "batch": [(24, 64, n) for n in (2, 4, 8, 16, 32)],
    "threads": [(24, 64, 8), (12, 256, 8), (96, 32, 8)],
}
TOKENS = 300e9  # of GPT-3


def series(name: str, rounds: int, threads: int) -> None:
    from albert_ablate import build_model, compose
    from albert_ablate.training.cost import flops_per_token

    cores = os.cpu_count() or 1
    counts = [2**i for i in range(cores.bit_length()) if 2**i <= cores] if name == "threads" else [threads]
    members = []
    for layers, width, batch in SERIES[name]:
        cfg = compose(["model=deep_96", f"model.layers={layers}", f"model.width={width}", f"data.batch={batch}"])
        rows = torch.randint(256, (batch, cfg.model.context + 1))
        step, flops = trainer(build_model(cfg).train()), flops_per_token(cfg)
        members += [((layers, width, batch), n, step, rows, flops) for n in counts]
    clock = time.process_time if counts == [1] and name != "threads" else time.perf_counter
    taken: list[list[float]] = [[] for _ in members]
    for i in range(WARM_UP + rounds):
        for (_, n, step, rows, _), seconds in zip(members, taken, strict=True):
            torch.set_num_threads(n)
            began = clock()
            step(rows)
            if i >= WARM_UP:
                seconds.append(clock() - began)
    print(f"{name}: layers, width, batch; threads; ms a step, tokens/s, GFLOP/s")
    for (shape, n, _, rows, flops), seconds in zip(members, taken, strict=True):
        middle = statistics.median(seconds)
        speed = rows[:, 1:].numel() / middle
        print(f"  {shape} {n}: {middle * 1e3:8.1f} {speed:9,.0f} {speed * flops / 1e9:6.1f}", flush=True)


def paper(mfu: float, peak: float) -> None:
    from albert_ablate import compose
    from albert_ablate.training.cost import flops_per_token, memory

    cfg = compose(["recipe=albert_agpt", "model=albert_agpt", "clip=norm", "data.batch=8"])
    each, parts = flops_per_token(cfg), memory(cfg)
    whole = sum(parts[name] for name in ("weights", "gradients", "moments"))
    print(f"{each / 1e9:.2f} GFLOP a token, {parts['weights'] / 4e9:.2f} billion parameters")
    for gpus in (8, 64):
        speed = gpus * peak * mfu / each
        print(
            f"{gpus} GPUs: {speed:,.0f} tokens/s, {TOKENS / speed / 86400:.1f} days for 300 billion; each holds "
            f"{whole / gpus / 2**30:.1f} GiB of weights, gradients and moments, and {parts['activations'] / 2**30:.0f} "
            f"GiB of activations of 8 sequences in float32"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["depth", "width", "batch"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of --peak that training uses")
    parser.add_argument("--peak", type=float, default=1e15, help="assumed operations a second of one GPU")
    given = parser.parse_args()
    for what in given.what:
        if what == "paper":
            paper(given.mfu, given.peak)
        else:
            series(what, given.rounds, given.threads)


if __name__ == "__main__":
    main()
