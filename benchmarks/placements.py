"""What each placement costs beside pre_ln, and what it does to a 96-layer model.

    python benchmarks/placements.py cost [--model mini] [--rounds 20] [--options keel ngpt]
    python benchmarks/placements.py train [--model deep_96] [--steps 300] [--options ...] [--runs FOLDER]

cost: forward, backward, fused AdamW and what the placement does after a step, each step of it next to a step of pre_ln
on the same tokens; medians of CPU time, which other work on the machine moves less. train: the table "all placements
after 300 steps of deep_96 on the default corpus": loss, status, gradient norm, seconds; runs already in the folder are
read. Nothing here is a test: machines are noisy.
"""

import argparse
import json
import statistics
import time

NEEDS = {"ngpt": ["attention=rotary", "optimizer.weight_decay=0"]}  # what an option refuses to be without


class Stepper:
    """Training steps of one placement on fixed tokens."""

    def __init__(self, option: str, model: str, more: list[str]) -> None:
        import torch

        from albert_ablate import build_model, compose
        from albert_ablate.config import check
        from albert_ablate.model.build import build
        from albert_ablate.optim.optimizers import decay_groups

        cfg = check(compose([f"model={model}", f"norm={option}", *more]))
        self.model = build_model(cfg).train()
        self.optimizer = build(cfg["optimizer"], decay_groups(self.model), True)
        shape = (cfg["data"]["batch"], cfg["model"]["context"] + 1)
        self.rows = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))

    def seconds(self) -> float:
        """CPU time of one step."""
        import torch.nn.functional as F

        began = time.process_time()
        loss = F.cross_entropy(self.model(self.rows[:, :-1]).flatten(0, 1), self.rows[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.model.after_step()
        return time.process_time() - began


def cost(options: list[str], model: str, rounds: int) -> dict:
    """Median seconds of a step of each option and of the pre_ln steps between them, and the median of the ratios."""
    import torch

    torch.set_num_threads(1)
    results, beside = {}, {}
    for option in options:
        more = NEEDS.get(option, [])
        if tuple(more) not in beside:
            beside[tuple(more)] = Stepper("pre_ln", model, more)
        other, plain = Stepper(option, model, more), beside[tuple(more)]
        pairs = [(other.seconds(), plain.seconds()) for _ in range(rounds + 2)][2:]
        ratio = statistics.median(a / b for a, b in pairs)
        ours, base = (statistics.median(column) for column in zip(*pairs, strict=True))
        results[option] = {"step": ours, "pre_ln": base, "ratio": ratio}
        print(f"{option:18} {ours * 1e3:7.1f} ms, pre_ln {base * 1e3:7.1f} ms: ratio {ratio:.3f}", flush=True)
    return results


def train(options: list[str], model: str, steps: int, runs: str) -> dict:
    """What each option's record says after `steps` steps."""
    import albert_ablate

    results = {}
    print(f"{'placement':18} {'train':>7} {'val':>7} {'grad norm':>10} {'seconds':>8}  status")
    for option in options:
        overrides = [f"model={model}", f"norm={option}", f"paths.runs={runs}", "trainer.threads=1"]
        cfg = albert_ablate.compose([*overrides, *NEEDS.get(option, [])])
        cfg.budget.tokens = steps * cfg.data.batch * cfg.model.context
        record = albert_ablate.run(cfg)
        found = {k: record["summary"].get(k) for k in ("train_loss", "val_loss", "grad_norm", "divergence")}
        results[option] = found | {"status": record["status"], "seconds": record["cost"]["seconds"]}
        losses = " ".join(f"{found[k]:7.3f}" if found[k] is not None else "      -" for k in ("train_loss", "val_loss"))
        norm = f"{found['grad_norm']:10.3g}" if found["grad_norm"] is not None else f"{'-':>10}"
        kind = f" ({found['divergence']})" if found["divergence"] else ""
        print(f"{option:18} {losses} {norm} {results[option]['seconds']:8.1f}  {record['status']}{kind}", flush=True)
    return results


def main() -> None:
    from albert_ablate.config import options as listing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "train"])
    parser.add_argument("--model", help="default: mini for cost, deep_96 for train")
    parser.add_argument("--options", nargs="+", default=listing()["norm"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--json", help="write the figures there too")
    chosen = parser.parse_args()
    if chosen.what == "cost":
        results = cost(chosen.options, chosen.model or "mini", chosen.rounds)
    else:
        results = train(chosen.options, chosen.model or "deep_96", chosen.steps, chosen.runs)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
