"""Do K runs train faster as one stack (`--stack K`) than one after the other? Whole runs, with histories and commits.

    python benchmarks/stacked.py [--models nano mini] [--runs 4 8 16] [--tokens 200_000] [--rounds 3] [-- OVERRIDES]

The runs differ in seed, learning rate, weight decay and dropout rate. Both sides train the same runs in this process,
one thread, each round in folders of its own, alternating; CPU seconds of the process from the first configuration to
the last record. The final weights of both are compared. The memory allocator is told to keep what is freed
(GLIBC_KEEPS, Linux); --usual-memory leaves it as it is.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

GLIBC_KEEPS = {"MALLOC_TRIM_THRESHOLD_": str(2 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}


def configurations(model: str, count: int, tokens: int, runs: str, more: list[str]) -> list[Any]:
    """Those of the runs: each has its own seed, learning rate, weight decay and dropout rate."""
    from albert_ablate import compose

    return [
        compose(
            [
                f"model={model}",
                "norm=pre_ln",
                "trainer=cpu",
                "trainer.threads=1",
                f"budget.tokens={tokens}",
                f"seed={k}",
                f"optimizer.lr={1e-3 * (1 + k % 3)}",
                f"optimizer.weight_decay={0.1 * (1 + k % 2)}",
                "dropout=depth_decay",
                f"dropout.mean={0.05 + 0.01 * (k % 4)}",
                f"paths.runs={runs}",
                *more,
            ]
        )
        for k in range(count)
    ]


def trained(configs: list[Any], stacked: bool) -> tuple[float, list[dict[str, Any]]]:
    """CPU seconds of all runs, and their records."""
    from albert_ablate.training.run import run
    from albert_ablate.training.stack import together

    began = time.process_time()
    if stacked:
        records = together([lambda member, cfg=cfg: run(cfg, member=member) for cfg in configs])
    else:
        records = [run(cfg) for cfg in configs]
    return time.process_time() - began, records


def measure(model: str, count: int, tokens: int, rounds: int, more: list[str]) -> None:
    ratios, seconds = [], {False: [0.0], True: [0.0]}
    with tempfile.TemporaryDirectory() as folder:
        make = partial(configurations, model, count, tokens)
        trained(make(str(Path(folder) / "warm"), more)[:1], False)
        for i in range(rounds):
            proofs = {}
            for stacked in (False, True) if i % 2 else (True, False):
                took, records = trained(make(str(Path(folder) / f"{i}{stacked}"), more), stacked)
                seconds[stacked].append(took)
                proofs[stacked] = [record["proof"]["final_weights"] for record in records]
            assert proofs[True] == proofs[False], "the weights differ"
            ratios.append(seconds[False][-1] / seconds[True][-1])
    apart, together = (statistics.median(seconds[side][1:]) / count for side in (False, True))
    print(
        f"{model}, {count} runs of {tokens:,} tokens: {apart:.2f} s a run apart, {together:.2f} s stacked, "
        f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f}), weights equal",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano", "mini"])
    parser.add_argument("--runs", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--usual-memory", action="store_true", help="leave the memory allocator as it is")
    parser.add_argument("overrides", nargs="*", help="key=value of every run")
    given = parser.parse_args()
    if not given.usual_memory and GLIBC_KEEPS.keys() - os.environ.keys():  # read by a process when it begins
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **GLIBC_KEEPS})
    for model in given.models:
        for count in given.runs:
            measure(model, count, given.tokens, given.rounds, given.overrides)


if __name__ == "__main__":
    main()
