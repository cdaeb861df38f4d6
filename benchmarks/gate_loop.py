"""A loop of 30 proposals through `albert-ablate gate`: ten help, twenty do nothing, and what the loop keeps.

    python benchmarks/gate_loop.py FOLDER [--control fdr]

The program is a linear model trained by SGD, on data that hang on the seed; a proposal either gives it one feature
more, which lowers its loss, or takes the data in another order, which changes each run and nothing on average. Beside
`gate`, which the loop asks as a program would (exit code and --json), the same proposals by the rule "keep if one run
of the candidate is lower than one of the baseline, on a seed of its own". Everything that was run and decided stands in
FOLDER/runs/sessions/loop/ledger.jsonl.
"""

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from albert_ablate.cli import main as albert_ablate

TRAIN = '''"""python train.py --seed S --features K --block B: prints the test loss of K of 16 features."""
import random
import sys

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
k, block = int(given["--features"]), int(given["--block"])


def draw(seed, n):
    rng = random.Random(seed)
    rows = [[rng.gauss(0, 1) for _ in range(16)] for _ in range(n)]
    return [(x, sum(x) / 4 + rng.gauss(0, 1)) for x in rows]


train, test = draw(int(given["--seed"]), 300), draw("test", 500)
order = [i for start in range(block) for i in range(start, len(train), block)]
w = [0.0] * k
for step, (x, y) in enumerate(train[i] for i in order):
    error = sum(a * b for a, b in zip(w, x)) - y
    w = [a - 0.05 / (1 + step / 50) * error * b for a, b in zip(w, x)]
print(f"METRIC loss={sum((sum(a * b for a, b in zip(w, x)) - y) ** 2 for x, y in test) / len(test)}")
'''
PROPOSALS, REAL = 30, 10
FIRST = {"--features": 2, "--block": 1}


def command(setting: dict[str, int]) -> str:
    return f"{sys.executable} -S train.py --seed {{seed}} " + " ".join(f"{k} {v}" for k, v in setting.items())


def proposals() -> list[bool]:
    """Which of the proposals help, in the order in which they are made."""
    helps = [True] * REAL + [False] * (PROPOSALS - REAL)
    random.Random(1).shuffle(helps)
    return helps


def changed(kept: dict[str, int], helps: bool, number: int) -> dict[str, int]:
    return kept | ({"--features": kept["--features"] + 1} if helps else {"--block": 10 + number})


def gate(setting: dict[str, int], baseline: dict[str, int] | None, control: str) -> tuple[int, dict]:
    """Exit code and answer of one call."""
    first = ["--baseline", command(baseline)] if baseline else []
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        code = albert_ablate(
            ["gate", "--session", "loop", "--metric", "loss", "--margin", "2%", "--control", control, "--json"]
            + [*first, "--candidate", command(setting)]
        )
    return code, json.loads(said.getvalue())


def loss(setting: dict[str, int], seed: int) -> float:
    done = subprocess.run(command(setting).format(seed=seed), shell=True, capture_output=True, text=True, check=True)
    return float(done.stdout.partition("=")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--control", choices=["fwer", "fdr"], default="fwer")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(a.folder)
    Path("train.py").write_text(TRAIN)
    kept, runs, right = dict(FIRST), 0, {True: 0, False: 0}
    print(f"{'':>3} {'proposal':<18}{'pairs':>6}  {'change of the loss':<32}decision")
    for number, helps in enumerate(proposals(), 1):
        asked = changed(kept, helps, number)
        code, answer = gate(asked, kept if number == 1 else None, a.control)
        (c,) = answer["contrasts"]
        x, runs = c["change"], runs + answer["runs"]
        what = f"features {asked['--features']}" if helps else "(does nothing)"
        change = "" if x["mean"] is None else f"{x['mean']:+.1f} % ({x['low']:+.1f} to {x['high']:+.1f})"
        print(f"{number:>3} {what:<18}{c['pairs']:>6}  {change:<32}{answer['decision']}", flush=True)
        if code == 0:
            kept, right[helps] = asked, right[helps] + 1
    nothing = PROPOSALS - REAL
    print(f"gate kept {right[True]} of {REAL} that help and {right[False]} of {nothing} that do nothing; {runs} runs")
    print(f"ledger: {a.folder / 'runs/sessions/loop/ledger.jsonl'}, {answer['ledger_hash'][:16]}")
    alone, right = dict(FIRST), {True: 0, False: 0}
    for number, helps in enumerate(proposals(), 1):
        asked = changed(alone, helps, number)
        if loss(asked, 2 * number) < loss(alone, 2 * number + 1):
            alone, right[helps] = asked, right[helps] + 1
    print(f"keep if lower kept {right[True]} of {REAL} and {right[False]} of {nothing}; {2 * PROPOSALS} runs")


if __name__ == "__main__":
    main()
