"""What each clipping rule costs beside a training step (forward, backward, fused AdamW) of one model, interleaved.

    python benchmarks/clipping.py [--model deep_96] [--rounds 30]

In every round each rule in conf/clip acts once on the gradients of that round, after a step has been timed; shares of
medians of CPU time. Rules with a warmup of their own are taken past it first. The global norm, which every run computes
and logs whatever its rule, is timed by itself. Nothing here is a test: machines are noisy.
"""

import argparse
import json
import statistics
import time


def measure(model: str, rounds: int) -> dict[str, float]:
    """Median seconds of the step, of the global norm and of each rule."""
    import torch
    import torch.nn.functional as F

    from albert_ablate import build_model, compose
    from albert_ablate.config import options
    from albert_ablate.model.build import build
    from albert_ablate.optim.clipping import global_norm

    torch.set_num_threads(1)
    cfg = compose([f"model={model}"])
    net = build_model(cfg).train()
    named = list(net.named_parameters())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    short = {"zclip": {"warmup": 2}, "adagc": {"warmup": 1}, "skip_step": {"sigma": 1e9}}  # a full history, no skip
    rules = {n: build({**compose([f"clip={n}"])["clip"], **short.get(n, {})}) for n in options()["clip"]}
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {}
    for i in range(-3, rounds):
        rows = torch.randint(0, 256, (cfg.data.batch, cfg.model.context + 1), generator=generator)
        began = time.process_time()
        loss = F.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        net.zero_grad(set_to_none=True)
        loss.backward()
        middle = time.process_time()
        gradients = [p.grad.clone() for _, p in named if p.grad is not None]
        spent = {}
        with torch.no_grad():
            for name, rule in rules.items():
                torch._foreach_copy_([p.grad for _, p in named if p.grad is not None], gradients)
                norm, _ = global_norm(gradients)
                start = time.process_time()
                rule(named, norm, loss)
                spent[name] = time.process_time() - start
            start = time.process_time()
            global_norm(gradients)
            spent["the global norm"] = time.process_time() - start
        start = time.process_time()
        optimizer.step()
        spent["step"] = middle - began + time.process_time() - start
        for name, seconds in spent.items() if i >= 0 else ():
            times.setdefault(name, []).append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deep_96")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", help="write the figures there too")
    given = parser.parse_args()
    seconds = measure(given.model, given.rounds)
    step = seconds.pop("step")
    print(f"{given.model}: step {step * 1e3:.1f} ms")
    for name, value in sorted(seconds.items(), key=lambda pair: pair[1]):
        print(f"  {name:16} {value * 1e3:6.2f} ms  {value / step:5.1%}")
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"step": step, **seconds}, file, indent=1)


if __name__ == "__main__":
    main()
