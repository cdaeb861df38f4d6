"""What our training step costs beside a bare loop over the same model: time, memory, clipping, loading.

    python benchmarks/step.py [--models nano mini deep_96] [--steps 60]

Time: inside one Lightning run, with the recorder, its histories and its layers rows on, ten of our steps alternate with
ten steps of a loop that knows only the model, the fused optimizer, clip_grad_norm_ and the batches; medians of the
segments are compared. Memory: peak resident set of a process that does only the one or only the other. Clipping and
loading: their time against that of forward and backward, alternating. Nothing here is a test: machines are noisy.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

SEGMENT = 10


def configuration(model: str, steps: int, runs: str):
    from albert_ablate import compose

    cfg = compose([f"model={model}", f"paths.runs={runs}", "trainer.threads=1", "evaluation.every=1_000_000_000"])
    cfg.budget.tokens = steps * cfg.data.batch * cfg.model.context
    return cfg


class BareLoop:
    """The loop a reader would write by hand."""

    def __init__(self, cfg) -> None:
        import torch
        import torch.nn.functional as F

        from albert_ablate import build_model
        from albert_ablate.data.corpora import WikipediaLeads
        from albert_ablate.data.packed import cache_folder, pack, take_blocks
        from albert_ablate.data.tokenizers import Bytes

        self.torch, self.F = torch, F
        self.model = build_model(cfg).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        tokens = pack(WikipediaLeads(), Bytes(), cache_folder(None)).train
        batch, context = cfg.data.batch, cfg.model.context
        self.batches = (
            torch.from_numpy(take_blocks(tokens, range(i * batch, (i + 1) * batch), context)) for i in range(10**9)
        )

    def step(self) -> float:
        rows = next(self.batches)
        loss = self.F.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def compare_time(model: str, steps: int) -> dict:
    """Seconds per step of both sides, medians over alternating segments."""
    from albert_ablate import run
    from albert_ablate.training.module import LanguageModel

    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as runs:
        cfg = configuration(model, steps, runs)
        loop = BareLoop(cfg)
        mark = [time.perf_counter()]

        def interleave(self, batch, batch_idx):
            if batch_idx % SEGMENT == 0:
                began = time.perf_counter()
                for _ in range(SEGMENT):
                    loop.step()
                now = time.perf_counter()
                ours.append((began - mark[0]) / SEGMENT)
                bare.append((now - began) / SEGMENT)
                mark[0] = time.perf_counter()
            return -1 if self.stop_requested else None

        original = LanguageModel.on_train_batch_start
        LanguageModel.on_train_batch_start = interleave  # type: ignore[method-assign]
        try:
            run(cfg)
        finally:
            LanguageModel.on_train_batch_start = original  # type: ignore[method-assign]
    ours, bare = ours[2:], bare[1:-1]  # the first of ours is start-up; each is paired with the loop's segment before it
    return {"ours": statistics.median(ours), "bare": statistics.median(bare), "segments": len(ours)}


def clipping_and_loading(model: str, rounds: int) -> dict:
    """Seconds of forward + backward, of each clipping rule, and of one batch's loading, alternating."""
    import torch

    from albert_ablate.data.packed import BatchOrder, block_count, cache_folder, pack, take_blocks
    from albert_ablate.model.build import build
    from albert_ablate.optim.clipping import AdaptiveClip, ClipNorm, ClipValue, global_norm

    cfg = configuration(model, 1, "unused")
    loop = BareLoop(cfg)
    tokens = pack(build(cfg.data), build(cfg.tokenizer), cache_folder(None)).train
    order = BatchOrder(block_count(tokens, cfg.model.context), cfg.data.batch, 0)
    named = list(loop.model.named_parameters())
    times: dict[str, list[float]] = {}

    def measure(name, act):
        began = time.perf_counter()
        act()
        times.setdefault(name, []).append(time.perf_counter() - began)

    for i in range(rounds):
        rows = next(loop.batches)

        def forward_backward(rows=rows):
            loss = loop.F.cross_entropy(loop.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            loop.model.zero_grad(set_to_none=True)
            loss.backward()

        measure("forward + backward", forward_backward)
        with torch.no_grad():
            norm, _ = global_norm([p.grad for _, p in named])
            for rule in (AdaptiveClip(), ClipNorm(), ClipValue()):
                measure(type(rule).__name__, lambda rule=rule, norm=norm: rule(named, norm))
            measure("norms", lambda: global_norm([p.grad for _, p in named]))
        measure("loading", lambda i=i: take_blocks(tokens, order.indices(i), cfg.model.context))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_memory(model: str, side: str, steps: int) -> int:
    """Peak resident bytes of a fresh process that does one side only."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import step\n"
    code += "print('PEAK', step.only(*sys.argv[2:4], int(sys.argv[4])))"
    here = __file__.rpartition("/")[0] or "."
    out = subprocess.run(
        [sys.executable, "-c", code, here, model, side, str(steps)], capture_output=True, text=True, check=True
    )
    return int(out.stdout.rsplit("PEAK", 1)[1])


def only(model: str, side: str, steps: int) -> int:
    """Peak resident bytes of this process after doing one side. Lightning is imported on both."""
    import pytorch_lightning  # noqa: F401
    import torch

    from albert_ablate import run
    from albert_ablate.training.cost import PeakMemory

    torch.set_num_threads(1)
    memory = PeakMemory()
    with tempfile.TemporaryDirectory() as runs:
        cfg = configuration(model, steps, runs)
        if side == "ours":
            run(cfg)
        else:
            loop = BareLoop(cfg)
            for _ in range(steps):
                loop.step()
    return memory.read(torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano", "mini", "deep_96"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    results = {}
    for model in options.models:
        t = compare_time(model, options.steps)
        c = clipping_and_loading(model, 10)
        memory = {side: peak_memory(model, side, 10) for side in ("ours", "bare")}
        results[model] = {"time": t, "parts": c, "memory": memory}
        base = c.pop("forward + backward")
        parts = ", ".join(f"{name} {value / base:.1%}" for name, value in c.items())
        print(
            f"{model:8} step {t['ours'] * 1e3:7.1f} ms, bare loop {t['bare'] * 1e3:7.1f} ms: "
            f"ratio {t['ours'] / t['bare']:.3f} ({t['segments']} segments of {SEGMENT}); "
            f"peak memory {memory['ours'] / 2**20:.0f} against {memory['bare'] / 2**20:.0f} MiB: "
            f"{memory['ours'] / memory['bare']:.3f}\n         of forward + backward: {parts}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
