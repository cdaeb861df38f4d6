"""What the diagnostics cost, and what skipping blocks saves. Ratios of steps that alternate in one process.

    python benchmarks/diagnostics.py overhead [--models mini deep_96] [--steps 60] [--every 25]
    python benchmarks/diagnostics.py skips [--models mini deep_96] [--steps 60] [--mean 0.5] [--site layer_drop]

overhead: inside one Lightning run every second step is logged, every other one of these with a gradient of its own for
the noise scale; the medians of the ratio of a logged step's time to the mean of its two neighbors', of both kinds, what
they make at `every`, and the phases of that run as its record has them. skips: one step of an arm with layer_drop (or
stochastic_depth) beside one step of the same arm without, on the same tokens, as often; the ratio of their times beside
the ratio of their operations as they were counted. Times are the processor's, of one thread, which other work on the
machine disturbs less. Nothing here is a test.
"""

import argparse
import json
import statistics
import tempfile
import time


def overhead(model: str, steps: int, every: int) -> dict:
    """Excess of a logged step over its unlogged neighbors, and what that makes of training at `every`."""
    from albert_ablate import compose, run
    from albert_ablate.training.module import LanguageModel

    marks: list[float] = []

    def mark(self, batch, batch_idx):
        marks.append(time.process_time())
        return -1 if self.stop_requested else None

    original = LanguageModel.on_train_batch_start
    LanguageModel.on_train_batch_start = mark  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as runs:
            more = ["trainer.threads=1", "evaluation.every=1_000_000_000", "checkpoint.seconds=100000"]
            cfg = compose([f"model={model}", f"paths.runs={runs}", "diagnostics.every=2", *more])
            cfg.evaluation.tokens = cfg.model.context
            cfg.budget.tokens = (steps + 1) * cfg.data.batch * cfg.model.context
            phases = run(cfg)["cost"]["phases"]
    finally:
        LanguageModel.on_train_batch_start = original  # type: ignore[method-assign]
    times = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    # times[i] is of step i + 1: the even ones are logged, each between two that are not; every fourth has the noise
    excess = {i: 2 * times[i] / (times[i - 1] + times[i + 1]) - 1 for i in range(3, len(times) - 1, 2)}
    kinds = [[x for i, x in excess.items() if (i + 1) % 4 == kind] for kind in (2, 0)]
    plain, noise = (statistics.median(kind) for kind in kinds)
    return {
        "ratio": 1 + (plain + noise) / 2 / every,
        "logged": plain,
        "with_noise": noise,
        "quartiles": [statistics.quantiles(kind, n=4)[::2] for kind in kinds],
        "pairs": len(excess),
        "step": statistics.median(times[2::2]),
        "phases": phases,
    }


def skips(model: str, steps: int, mean: float, site: str) -> dict:
    """Time and operations of training steps that leave blocks out, over those of steps that do not."""
    import torch
    import torch.nn.functional as F

    from albert_ablate import build_model, compose
    from albert_ablate.config import check
    from albert_ablate.training.cost import training_flops

    torch.set_num_threads(1)
    arms = {"with": ["dropout=uniform", f"dropout.mean={mean}", f"dropout.sites=[{site}]"], "without": []}
    models = {}
    for name, more in arms.items():
        cfg = check(compose([f"model={model}", *more]))
        models[name] = build_model(cfg).train()
    whole, blocks = training_flops(cfg)
    shape = (cfg["data"]["batch"], cfg["model"]["context"] + 1)
    rows = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    optimizers = {n: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for n, m in models.items()}

    def seconds(name: str, step: int) -> float:
        m = models[name]
        m.clock.set(step, 0)
        began = time.process_time()
        optimizers[name].zero_grad(set_to_none=True)
        F.cross_entropy(m(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizers[name].step()
        return time.process_time() - began

    pairs, left = [], []
    for step in range(steps + 2):
        pairs.append((seconds("with", step), seconds("without", step)))
        stack = models["with"].stack
        left.append(1 - sum(f for f, block in zip(blocks, stack, strict=True) if block.skip.skips()) / whole)
    pairs, left = pairs[2:], left[2:]
    return {"time": sum(a for a, _ in pairs) / sum(b for _, b in pairs), "flops": statistics.mean(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "skips"])
    parser.add_argument("--models", nargs="+", default=["mini", "deep_96"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--mean", type=float, default=0.5)
    parser.add_argument("--site", choices=["layer_drop", "stochastic_depth"], default="layer_drop")
    parser.add_argument("--json", help="write the figures there too")
    chosen = parser.parse_args()
    results = {}
    for model in chosen.models:
        if chosen.what == "overhead":
            r = results[model] = overhead(model, chosen.steps or 60, chosen.every)
            (low, high), (low_noise, high_noise) = r["quartiles"]
            print(
                f"{model:8} a logged step costs {r['logged']:.0%} (quartiles {low:.0%} to {high:.0%}), with the noise "
                f"scale {r['with_noise']:.0%} ({low_noise:.0%} to {high_noise:.0%}; {r['pairs']} steps in all) of a "
                f"step of {r['step'] * 1e3:.0f} ms more: ratio {r['ratio']:.4f} at every {chosen.every}\n"
                f"         phases, seconds: {', '.join(f'{k} {v:.2f}' for k, v in r['phases'].items())}",
                flush=True,
            )
        else:
            r = results[model] = skips(model, chosen.steps or 60, chosen.mean, chosen.site)
            print(
                f"{model:8} {chosen.site} {chosen.mean}: time {r['time']:.3f}, operations {r['flops']:.3f}", flush=True
            )
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
