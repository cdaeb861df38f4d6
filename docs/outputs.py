"""Run the commands of README.md and docs/*.md, and write what they print below them.

python docs/outputs.py [--times] [PAGE ...]    # --times: also where only times and speeds have changed

A block that begins with ```text shows what the block of commands above it prints. The commands of a page run from top
to bottom in one new folder, which has run.py and sweeps/ of the checkout and the files that blocks of the page begin
with (`# mine.yaml`); `pip` and `pytest` are left out. A line `...` stands for lines that are not shown.
`tests/test_outputs.py` runs the same and compares, times and speeds aside.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("python ", "albert-ablate ", "cd ")  # what a line of a block of commands begins with
QUIET = {"ALBERT_ABLATE_NO_BARS": "1", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "WANDB_MODE": "offline",
         "OMP_WAIT_POLICY": "passive"}  # fmt: skip
LEFT_OUT = "pip() { :; }; pytest() { :; }\n"
TABLE_VALUES = r"(?m)^((?:tokens/s|seconds) +)[\d.,]+"  # of a run's last table
UNIT = r"(?:ms|s|min|h|days?|hours?|minutes?|seconds?)"
VARYING = [  # what differs from run to run or from machine to machine, and what stands for it in a comparison
    (TABLE_VALUES, r"\1NUMBER"),
    (r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?", "DATE"),
    (r"(?m)^(  (?:screen|full) .*?) +[\d.,?]+$", r"\1 HOURS"),  # of the table of judge --dry-run
    (rf"(?:(?:\d[\d.]* / )*\d[\d.,]*(?:e[+-]?\d+)? ?{UNIT}\b ?)+", "TIME "),
    (r"[\d.,]+(e[+-]?\d+)? ?[kMG]?( tokens| tok|FLOPs?)/s", "SPEED"),
    (r"\d+\.\d+\.\d+", "VERSION"),
]


def blocks(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Kind, content, and where the content begins and ends, of each block between fences."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield found[1], found[2], found.start(2), found.end(2)


def has_commands(kind: str, content: str) -> bool:
    return not kind and any(line.startswith((*COMMANDS, "pip ")) for line in content.splitlines())


def shown(text: str) -> list[tuple[str, str, int, int]]:
    """Commands whose output a page shows, that output, and where it stands; a file of the page has no commands."""
    parts, commands = [], ""
    for kind, content, start, end in blocks(text):
        if has_commands(kind, content):
            commands = content
        elif kind == "text" and commands:
            parts.append((commands, content, start, end))
            commands = ""
        elif kind in ("yaml", "python") and re.match(r"# \S+\.(yaml|py)\n", content):
            parts.append(("", content, start, end))
    return parts if any(commands for commands, *_ in parts) else []


def printed(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Run the commands of a page: for each output that it shows, the output now and that of the page with its place."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve() / "work"
        folder.mkdir()
        for name in ("run.py", "sweeps", "benchmarks"):
            (folder / name).symlink_to(ROOT / name)
        env = os.environ | QUIET | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        where, end_of_block = folder, Path(scratch) / "pwd"
        for commands, content, start, end in shown(text):
            if not commands:
                path = where / content.split("\n")[0].removeprefix("# ")
                if not path.exists():  # else a command has written it, and the page shows it
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(content.partition("\n")[2])
                continue
            script = f"{LEFT_OUT}{commands}pwd > {end_of_block}\n"
            done = subprocess.run(["bash", "-c", script], cwd=where, env=env, text=True, errors="replace",
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
            where = Path(end_of_block.read_text().strip())
            lines = done.stdout.replace(f"{folder}/", "").splitlines()
            yield "".join(f"{line.rstrip()}\n" for line in lines if line.strip()), content, start, end


def masked(output: str) -> list[str]:
    """The lines of an output without what varies from run to run."""
    for pattern, word in VARYING:
        output = re.sub(pattern, word, output)
    return [" ".join(line.split()) for line in output.splitlines()]


def differences(now: str, page: str) -> list[str]:
    """Lines that one of two outputs has and the other lacks, in any order: workers end in any. `...` is any lines."""
    new, old = Counter(masked(now)), Counter(masked(page))
    shortened = bool(old.pop("...", 0))
    return [f"- {line}" for line in old - new] + [f"+ {line}" for line in new - old if not shortened]


def written(now: str, page: str) -> str:
    """What the page is to show: as many lines before and after `...` as before; between two `...` those that begin with
    the same word."""
    lines, old = now.splitlines(), page.splitlines()
    if "..." not in old:
        return now
    before, after = old.index("..."), old[::-1].index("...")
    between = old[before : len(old) - after]
    starts = {line.split()[0]: line for line in reversed(lines)}
    middle = [starts.get(line.split()[0], line) for line in between]
    return "".join(f"{line}\n" for line in [*lines[:before], *middle, *lines[len(lines) - after :]])


def main(pages: list[Path], times: bool) -> None:
    for page in pages:
        text = before = page.read_text()
        for now, old, start, end in reversed(list(printed(text))):
            if times or differences(now, old) or not old.strip():
                text = text[:start] + written(now, old) + text[end:]
        if page.read_text() != before:
            sys.exit(f"{page.relative_to(ROOT)} has changed since its commands were started: run it again.")
        if text != before:
            page.write_text(text)
            print(f"{page.relative_to(ROOT)}: written")


if __name__ == "__main__":
    named = [Path(name).resolve() for name in sys.argv[1:] if name != "--times"]
    main(named or PAGES, "--times" in sys.argv)
