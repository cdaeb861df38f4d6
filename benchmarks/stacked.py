"""Do K runs train faster as one stack (`--stack K`) than one after the other? Whole runs, with histories and commits.

    python benchmarks/stacked.py [--models nano mini] [--runs 4 8 16] [--tokens 200_000] [--rounds 1] [OVERRIDES]

The runs differ in seed, learning rate, weight decay and dropout rate. Two processes of one thread train the same runs
at once, one as a stack and one run by run, so that what else the machine does slows both alike. Measured are CPU
seconds, from the first configuration to the last record, and the largest memory; the final weights have to be equal.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from typing import Any


def trained(stacked: bool, model: str, count: int, tokens: int, more: list[str]) -> tuple[float, float, list[str]]:
    """CPU seconds of all runs, GB of memory at most, and the hashes of the final weights."""
    from albert_ablate import compose
    from albert_ablate.training.run import run
    from albert_ablate.training.stack import together

    with tempfile.TemporaryDirectory() as folder:

        def configurations(runs: str, count: int, tokens: int) -> list[Any]:
            plain = ["norm=pre_ln", "dropout=depth_decay", "trainer=cpu", "trainer.threads=1", f"model={model}", *more]
            given = [*plain, f"budget.tokens={tokens}", f"paths.runs={folder}/{runs}"]
            lr, decay, mean = (
                (lambda k: 1e-3 * (1 + k % 3)),
                (lambda k: 0.1 * (1 + k % 2)),
                (lambda k: 0.05 + k % 4 / 100),
            )
            own = [
                [f"seed={k}", f"optimizer.lr={lr(k)}", f"optimizer.weight_decay={decay(k)}", f"dropout.mean={mean(k)}"]
                for k in range(count)
            ]
            return [compose([*given, *each]) for each in own]

        run(configurations("warm", 1, 5_000)[0])
        began = time.process_time()
        configs = configurations("runs", count, tokens)
        if stacked:
            records = together([lambda member, cfg=cfg: run(cfg, member=member) for cfg in configs])
        else:
            records = [run(cfg) for cfg in configs]
        seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return seconds, peak, [record["proof"]["final_weights"] for record in records]


def measure(model: str, count: int, tokens: int, rounds: int, more: list[str]) -> None:
    spawn, found = multiprocessing.get_context("spawn"), []
    for _ in range(rounds):
        with spawn.Pool(2, maxtasksperchild=1) as pool:
            found.append(pool.starmap(trained, [(side, model, count, tokens, more) for side in (False, True)], 1))
            pool.close()
            pool.join()
    ratios = [apart[0] / stacked[0] for apart, stacked in found]
    assert all(apart[2] == stacked[2] for apart, stacked in found), "the weights differ"
    apart, stacked = found[-1]
    print(
        f"{model}, {count} runs of {tokens:,} tokens: {statistics.median(ratios):.2f} times the runs a CPU second "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {apart[0] / count:.2f} and {stacked[0] / count:.2f} s a run, "
        f"{apart[1]:.2f} and {stacked[1]:.2f} GB, weights equal",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano", "mini"])
    parser.add_argument("--runs", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="key=value of every run")
    given = parser.parse_args()
    for model in given.models:
        for count in given.runs:
            measure(model, count, given.tokens, given.rounds, given.overrides)


if __name__ == "__main__":
    main()
