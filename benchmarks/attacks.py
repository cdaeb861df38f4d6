"""Damaged files against commands: what is said, what is harmless, what fails.

    python benchmarks/attacks.py [--repo CHECKOUT] [--only record.json evals.arrow ...] [--commands N] [--markdown FILE]

A small study is trained once: two arms, two seeds, one arm tuned, claims judged, one more run killed before its end.
Then one file of a run, of the token cache, of tuning, the ledger or the status index is damaged in a copy (emptied, cut
in half, its second half zeroed, one bit turned at each of two places, taken from another run), and every command that
reads it runs on the copy. Its output is compared with that on the undamaged copy. An outcome is

    same        the output does not move: the damage does no harm
    said        exit code 1 or 2 with a new line, or a new line that says what cannot be read
    silent      another output without such a line
    traceback   a Python traceback, or no end within a minute

--repo runs the same attacks on another checkout of the project, so that two states of the code can be compared.
"""

import argparse
import collections
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = (
    "model=nano model.layers=2 model.width=16 model.context=32 data=text_files data.batch=4 trainer=cpu "
    "trainer.threads=1 budget.tokens=4096 evaluation.tokens=512 evaluation.every=1024 diagnostics.every=4"
).split()
CLAIMS = """
arms: {pre: [norm=pre_ln], post: [norm=post_ln]}
regimes: {short: {text: at 2 layers, overrides: OVERRIDES}}
claims:
  - name: first
    statement: Pre-norm is better.
    parts: [{treatment: pre, control: post, measure: test_loss}]
    tuned: []
    screen: {regime: short, N: 6}
"""
SWEEP = """
command: [python, run.py, "${args_no_hyphens}"]
method: grid
parameters:
  norm: {values: [pre_ln, post_ln]}
  seed: {values: [0, 1]}
"""
TUNE = """
command: [python, run.py, "${args_no_hyphens}"]
method: grid
parameters:
  norm: {value: pre_ln}
"""
COMMIT = 6  # of the run that does not end, whose process dies after it
SECONDS = 60
VARIES = re.compile(
    r"\d+[.,]?\d*\s*(s|tokens/s|MB|ms|ago|h|min)\b|\d\d:\d\d(:\d\d)?|tokens/s\s+[\d,.]+|seconds\s+[\d,.]+"
)


# in a line that was not there before; a changed number beside the run's name does not count
TROUBLE = re.compile(
    r"cannot be (read|used|drawn)|unreadable|damaged|checksum|another run|is missing|cut off|left out|packed again"
    r"|begins again|goes on from|changed after|is no(t a)? (ledger|tuning)|could not be sent"
)


def damages(size: int) -> dict:
    """Name of a damage -> bytes to bytes; "other run" is done by the caller."""

    def turned(share: float):
        def turn(data: bytes) -> bytes:
            at = min(int(len(data) * share), len(data) - 1)
            return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

        return turn

    return {
        "empty": lambda data: b"",
        "cut": lambda data: data[: len(data) // 2],
        "zeroed": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        **{f"bit at {share:.0%}": turned(share) for share in (0.3, 0.7)},
    }


def child(repo: Path, place: Path) -> None:
    """In a process of the checkout under attack: train the study, then run commands as they are asked for on stdin."""
    import contextlib
    import io

    import pytorch_lightning  # noqa: F401  so that no forked command has to import it
    import torch

    from albert_ablate import compose, run
    from albert_ablate.cli import main

    torch.set_num_threads(1)
    text = place / "text.txt"
    words = [f"w{i % 37}{chr(97 + i % 23)}" for i in range(200)]
    text.write_text("".join(" ".join(words[(i * j + j) % 200] for j in range(9)) + ".\n" for i in range(2000)))
    os.environ["XDG_CACHE_HOME"] = str(place / "study" / "cache")
    overrides = [*TINY, f"data.path={text}"]
    for norm in ("pre_ln", "post_ln"):
        for seed in (0, 1):
            run(compose([*overrides, f"norm={norm}", f"seed={seed}", f"paths.runs={place}/study/runs"]))
    _kill_a_run(place, overrides)
    (place / "sweep.yaml").write_text(SWEEP)
    (place / "tune.yaml").write_text(TUNE)
    with contextlib.suppress(ImportError, AttributeError):  # of an earlier state of the code
        from albert_ablate.studies import states

        states.INDEX_WRITE_THRESHOLD = 1  # an index for however few runs
    quoted = "[" + ", ".join(f'"{o}"' for o in overrides) + "]"
    (place / "claims.yaml").write_text(CLAIMS.replace("OVERRIDES", quoted))
    with contextlib.redirect_stdout(io.StringIO()):
        main(["evaluate", f"{place}/study/runs", "clean"])
        main(["sync", f"{place}/study/runs", "--to", "tensorboard"])
        main(["tune", f"{place}/tune.yaml", "--runs", f"{place}/study/tuned", "--workers", "2", *overrides])
        main(["status", f"{place}/study/runs"])
        main(["judge", f"{place}/claims.yaml", "--runs", f"{place}/study/runs"])
        # what these import need not be imported again by each forked command
        first = str(sorted((place / "study" / "runs").glob("*/seed0"))[0])
        main(["report", f"{place}/study/runs", "--format", "csv", "-o", f"{place}/warm"])
        main(["show", first, "-o", f"{place}/warm.html"])
        main(["generate", first, "--prompt", "w1", "--tokens", "2"])
    print("READY", flush=True)
    for line in sys.stdin:
        name, folder, cwd = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            _command(name, Path(folder), place, overrides, Path(cwd))
        deadline = time.monotonic() + SECONDS
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if not done:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status) if done else "timeout"
        print(f"DONE {code}", flush=True)


def _kill_a_run(place: Path, overrides: list[str]) -> None:
    """A run in study/unfinished whose process dies after a commit."""
    from albert_ablate import compose, run
    from albert_ablate.records.folder import RunFolder

    pid = os.fork()
    if pid == 0:
        write, left = RunFolder.write, iter(range(COMMIT))

        def last_write(folder, record):
            write(folder, record)
            if next(left, None) is None:
                os._exit(0)

        RunFolder.write = last_write
        given = [*overrides, "checkpoint.seconds=0", "norm=pre_ln", f"paths.runs={place}/study/unfinished"]
        run(compose(given))
        os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit("the run that was to be killed has ended")


def _command(name: str, study: Path, place: Path, overrides: list[str], out: Path) -> None:
    """One command in a forked process, its output in the file `out`; never returns."""
    code = 1
    try:
        fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.environ["XDG_CACHE_HOME"] = str(study / "cache")
        os.environ["COLUMNS"] = "200"
        from albert_ablate import cli, compose, load_runs, run
        from albert_ablate.config import ConfigError

        first = sorted((study / "runs").glob("*/seed0"))[0]
        runs = study / ("tuned" if name.startswith("tune") or name.endswith(" tuned") else "runs")
        if name == "load_runs":
            found = load_runs(str(runs))
            columns = [c for c in ("status", "val_loss", "test_loss", "reason") if c in found.summary]
            print(found.summary[columns].to_string())
            for history, column in (("evals", "loss"), ("steps", "loss"), ("layers", "grad_norm")):
                table = found.history(history, ["tokens", column])
                print(history, len(table), f"{table[column].sum():.6f}")
            code = 0
        elif name == "run":
            try:
                whole = place / "study" / first.relative_to(study) / "config.yaml"
                choice = "pre_ln" if "PreLN" in whole.read_text() else "post_ln"
                record = run(compose([*overrides, f"norm={choice}", "seed=0", f"paths.runs={runs}"]))
                print({k: record["summary"].get(k) for k in ("val_loss", "test_loss")}, record["status"])
                code = 0
            except (ConfigError, RuntimeError) as error:
                print(error)
                code = 2
        elif name == "go on":
            record = run(compose([*overrides, "norm=pre_ln", f"paths.runs={study}/unfinished"]))
            print({k: record["summary"].get(k) for k in ("val_loss", "test_loss")}, record["proof"]["final_weights"])
            code = 0
        elif name == "train":  # a seed that is not there yet: reads the token cache
            record = run(compose([*overrides, "norm=pre_ln", "seed=5", f"paths.runs={runs}"]))
            print({k: record["summary"].get(k) for k in ("val_loss", "test_loss")}, record["status"])
            code = 0
        else:
            arguments = {
                "status": ["status", runs],
                "judge": ["judge", place / "claims.yaml", "--runs", runs],
                "show": ["show", first, "-o", study / "show.html"],
                "report": ["report", runs, "--format", "csv", "-o", study / "tables"],
                "evaluate": ["evaluate", first, "units"],
                "sync": ["sync", runs, "--to", "tensorboard"],
                "sweep": ["sweep", place / "sweep.yaml", "--runs", runs, "--workers", "1", "--untuned", *overrides],
                "tune": ["tune", place / "tune.yaml", "--runs", runs, "--workers", "1", *overrides],
                "generate": ["generate", first, "--prompt", "w1", "--tokens", "20", "--temperature", "0"],
            }[name.removesuffix(" tuned")]
            code = cli.main([str(a) for a in arguments])
            if name.startswith("report"):
                for table in sorted((study / "tables").rglob("*.csv")):
                    print(table.name, table.read_text())
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


RUN_COMMANDS = ("status", "judge", "load_runs", "report", "show", "run", "sync", "sweep")
TARGETS = {  # file, below the study -> the commands that read it
    "record.json": RUN_COMMANDS + ("evaluate", "generate"),
    "config.yaml": ("generate", "evaluate", "show", "run"),
    "evaluations.json": ("load_runs", "report", "evaluate", "judge"),
    "steps.arrow": ("load_runs", "report", "show"),
    "evals.arrow": ("load_runs", "report", "show", "judge"),
    "layers.arrow": ("load_runs", "report", "show"),
    "checkpoints/best.ckpt": ("generate", "evaluate"),
    "checkpoints/last.ckpt": ("evaluate",),
    "synced.json": ("sync", "status"),
    "unfinished/checkpoints/resume.ckpt": ("go on",),
    "unfinished/checkpoints/best.ckpt": ("go on",),
    "unfinished/steps.arrows": ("go on",),
    "unfinished/evals.arrows": ("go on",),
    "tuning": ("tune", "judge tuned", "report tuned"),
    ".status": ("status",),
    "ledger.json": ("report", "judge"),
    "cache/train.npy": ("train",),
    "cache/validation.npy": ("train",),
    "cache/test.npy": ("train",),
    "cache/facts.json": ("train",),
}


def placed(target: str, study: Path) -> tuple[Path | None, Path | None]:
    """The file to damage, and that of another run or split with which to replace it."""
    runs = study / "runs"
    if target.startswith("cache/"):
        found = sorted(p for p in (study / "cache").rglob(target.partition("/")[2]))
        others = [p for p in found[0].parent.glob("*.npy") if p != found[0]] if found else []
        return (found or [None])[0], others[0] if others and target.endswith(".npy") else None
    if target == "tuning":
        found = sorted((study / "tuned" / "tuning").glob("*.json"))
        return (found or [None])[0], None
    if target.startswith("unfinished/"):
        name = target.partition("/")[2]
        found = sorted((study / "unfinished").glob(f"*/seed0/{name}"))
        others = sorted(runs.glob(f"*/seed1/{name}"))
        return (found or [None])[0], (others or [None])[0]
    if target in (".status", "ledger.json"):
        file = runs / target
        return (file if file.exists() else None), None
    first = sorted(runs.glob("*/seed0"))[0]
    file = first / target
    return (file if file.exists() else None), first.parent / "seed1" / target


def plain(text: str, study: Path) -> str:
    """Output without what differs between two undisturbed calls: times, rates and the copy's own place."""
    return VARIES.sub("#", text.replace(str(study), "STUDY"))


def outcome(clean: str, text: str, code: str, clean_code: str) -> str:
    if "Traceback (most recent call last)" in text or code == "timeout" or code.startswith("-"):
        return "traceback"
    if text == clean and code == clean_code:
        return "same"
    before = set(clean.splitlines())
    new = "\n".join(line for line in text.splitlines() if line not in before)
    return "said" if (code in ("1", "2") and new.strip()) or TROUBLE.search(new) else "silent"


def attack(repo: Path, only: list[str], say, most: int | None = None) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="attacks_") as scratch:
        place = Path(scratch)
        plugins = repo / "albert_ablate" / "plugins"
        environment = {**os.environ, "PYTHONPATH": f"{repo}:{plugins}", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(place), "--repo", str(repo)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=place
        ) as process:
            assert process.stdin and process.stdout

            def answer() -> str:
                for line in process.stdout:
                    if line.startswith(("READY", "DONE")):
                        return line.split()[-1]
                raise SystemExit("the attacked process has ended")

            def ask(name: str, study: Path) -> tuple[str, str]:
                out = place / "output.txt"
                process.stdin.write(f"{name}\t{study}\t{out}\n")
                process.stdin.flush()
                code = answer()
                return plain(out.read_text(errors="replace"), study), code

            answer()
            study, clean = place / "study", {}
            for name in dict.fromkeys(c for t in only for c in TARGETS[t][:most]):
                copy = place / "copy"
                shutil.copytree(study, copy, symlinks=True)
                clean[name] = ask(name, copy)
                shutil.rmtree(copy)
            for target in only:
                file, other = placed(target, study)
                if file is None:
                    say(f"| {target} | is not there | | | |")
                    continue
                kinds = damages(file.stat().st_size)
                if other is not None and other.exists():
                    kinds["other run's"] = lambda data, other=other: other.read_bytes()
                found: collections.Counter = collections.Counter()
                worst = []
                for kind, change in kinds.items():
                    for name in TARGETS[target][:most]:
                        copy = place / "copy"
                        shutil.copytree(study, copy, symlinks=True)
                        damaged = copy / file.relative_to(study)
                        damaged.write_bytes(change(damaged.read_bytes()))
                        text, code = ask(name, copy)
                        result = outcome(clean[name][0], text, code, clean[name][1])
                        found[result] += 1
                        if result in ("silent", "traceback"):
                            worst.append(f"{name} on {kind}: {result}")
                        shutil.rmtree(copy)
                counts += found
                cells = " | ".join(str(found[k]) for k in ("same", "said", "silent", "traceback"))
                say(f"| {target} | {cells} | {'; '.join(worst)} |")
            process.stdin.close()
            process.wait(SECONDS)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), default=list(TARGETS), metavar="FILE")
    parser.add_argument("--commands", type=int, help="only so many commands on each file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.repo, given.child)
        return
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say("| file | same | said | silent | traceback | what is silent or fails |")
    say("| --- | --- | --- | --- | --- | --- |")
    counts = attack(given.repo.resolve(), given.only, say, given.commands)
    total = " | ".join(str(counts[k]) for k in ("same", "said", "silent", "traceback"))
    say(f"| all | {total} | |")
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
