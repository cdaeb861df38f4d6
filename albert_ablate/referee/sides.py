"""What is compared: overrides of this package, a shell command with {seed}, or a git ref and a command to run in it.

norm=peri_ln optimizer.lr=0.001       overrides
python train.py --seed {seed}         a command that prints METRIC name=value, or writes JSON to {json}
git:my-branch                         that commit, in a worktree of its own, and the command of --command
"""

import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError

OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@]*=.*", re.DOTALL)
METRIC = re.compile(r"^\s*METRIC\s+([^\s=]+)\s*=\s*(.*?)\s*$", re.MULTILINE)
# a number that says which seed: --seed 3, seed=3, SEED: 3, random_seed = 3, manual_seed(3)
SEED = re.compile(r"(\b\w*seed\w*[\"']?\s*[=:(,\s]\s*)\d+", re.IGNORECASE)


class Inadmissible(ConfigError):
    """Raised for a question that cannot be answered as it was asked: one sentence, exit code 2."""


class Crash(Exception):
    """Raised for a command that ended without a metric: its exit code or its time limit."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: overrides, a command, or a git ref with a command."""

    kind: str  # overrides, command, git
    text: str  # as it was given
    identity: str  # equal for sides that are the same thing to run
    overrides: tuple[str, ...] = ()
    command: str = ""
    tree: str = ""  # of a git side
    commit: str = ""

    def as_json(self) -> dict[str, str]:
        """The side as a ledger stores it."""
        return {"text": self.text, "kind": self.kind, "identity": self.identity} | (
            {"commit": self.commit} if self.commit else {}
        )


def read_side(text: str, common: Sequence[str] = (), command: str = "", repository: Path = Path()) -> Side:
    """Parse one side of a comparison; raises Inadmissible with one sentence if it is none."""
    text = text.strip()
    if text.startswith("git:"):
        return _git_side(text, command, repository)
    if "{seed}" in text:
        return Side("command", text, _hash("command", " ".join(text.split())), command=text)
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if words and all(OVERRIDE.fullmatch(word) for word in words):
        return _overrides_side(text, (*common, *words))
    raise Inadmissible(
        f"{text!r} is not allowed as a side: give overrides (norm=pre_ln), a command with {{seed}} in it, or git:REF."
    )


def _overrides_side(text: str, overrides: tuple[str, ...]) -> Side:
    from albert_ablate.config import check, compose, keys_of

    for o in overrides:
        if o.lstrip("+").partition("=")[0] in ("seed", "paths.runs"):
            raise Inadmissible(f"{o} is not allowed in a side: the seeds and the folder are chosen by this command.")
    cfg = check(compose([*overrides]))
    identity_parts = {"setting": keys_of(cfg).setting, "evaluation": cfg["evaluation"]}
    return Side(
        "overrides", text, _hash("overrides", json.dumps(identity_parts, sort_keys=True, default=str)), overrides
    )


def _git_side(text: str, command: str, repository: Path) -> Side:
    if "{seed}" not in command:
        raise Inadmissible(f"{text} needs --command with {{seed}} in it: what is run in a worktree of that ref.")
    ref = text.removeprefix("git:")
    commit = git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if commit is None:
        raise Inadmissible(f"{text}: {repository.resolve()} has no such ref.")
    moves = ref != commit  # a commit's own name says exactly what is meant
    if moves and commit == git(repository, "rev-parse", "HEAD") and git(repository, "status", "--porcelain", "-uno"):
        raise Inadmissible(f"{text}: the working tree has changes that the commit does not hold: commit them first.")
    tree = git(repository, "rev-parse", f"{commit}^{{tree}}") or ""
    return Side("git", text, _hash("git", tree, " ".join(command.split())), command=command, tree=tree, commit=commit)


def git(repository: Path, *arguments: str) -> str | None:
    """Output of a git command, None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def refuse_same(a: Side, b: Side, repository: Path = Path()) -> None:
    """Raise Inadmissible if two sides differ in nothing but a seed."""
    if a.identity == b.identity:
        raise Inadmissible(f"{a.text} and {b.text} are the same: nothing differs.")
    same = False
    if a.kind == b.kind == "git":
        if a.tree != b.tree:
            same = _changes_seeds_only(git(repository, "diff", "-U0", a.commit, b.commit) or "")
        else:
            same = SEED.sub(r"\1", a.command) == SEED.sub(r"\1", b.command)
    elif a.kind == b.kind == "command":
        same = SEED.sub(r"\1", a.command) == SEED.sub(r"\1", b.command)
    if same:
        raise Inadmissible(f"{a.text} and {b.text} differ in a seed only: a changed seed is not a change.")


def _changes_seeds_only(diff: str) -> bool:
    def lines(mark: str) -> list[str]:
        return [x[1:] for x in diff.splitlines() if x.startswith(mark) and not x.startswith(mark * 3)]

    old, new = lines("-"), lines("+")
    return bool(old) and [SEED.sub(r"\1", x) for x in old] == [SEED.sub(r"\1", x) for x in new]


# --- running a command -----------------------------------------------------------------------------------------------


def run_command(side: Side, seed: int, metric: str, limit: float, folder: Path, read: bool = True) -> tuple[str, float]:
    """The name and value of the metric that a side's command gives for a seed; inf or nan where it gives that. With
    read=False no metric is looked for, and the value is 0.

    Raises Crash where the command fails or exceeds its time, Inadmissible where its metrics cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "metrics.json"
        command = side.command.replace("{seed}", str(seed)).replace("{json}", shlex.quote(str(place)))
        with open(Path(scratch) / "output", "w+b") as output:
            process = subprocess.Popen(
                command, shell=True, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(None if math.isinf(limit) else limit)
            except subprocess.TimeoutExpired:
                raise Crash(f"it exceeded its limit of {limit:g} s") from None
            finally:
                _end(process)
            output.seek(0)
            printed = output.read().decode(errors="replace")
        if code:
            last = next((x.strip() for x in reversed(printed.splitlines()) if x.strip()), "it said nothing")
            raise Crash(f"exit code {code}: {last[:200]}")
        return _metric(printed, place, metric, side) if read else ("", 0.0)


def _end(process: subprocess.Popen) -> None:
    """Kill the processes that a command may have left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _metric(output: str, place: Path, metric: str, side: Side) -> tuple[str, float]:
    metrics: list[tuple[str, Any]] = METRIC.findall(output)
    if place.exists():
        try:
            written = json.loads(place.read_text(), object_pairs_hook=list)
            metrics += [(str(name), value) for name, value in written]
        except (ValueError, TypeError):
            raise Inadmissible(f"{side.text} wrote a file to {{json}} that is not a JSON mapping.") from None
    names = [name for name, _ in metrics]
    if not metric and len(set(names)) > 1:
        raise Inadmissible(
            f"{side.text} gave several metrics ({', '.join(dict.fromkeys(names))}): name one by --metric."
        )
    values = [value for name, value in metrics if not metric or name == metric]
    expected = f"METRIC {metric or 'name'}=value"
    if not values:
        others = f"; it gave {', '.join(dict.fromkeys(names))}" if names else ""
        raise Inadmissible(f"{side.text} printed no line {expected} and wrote no such value to {{json}}{others}.")
    if len(values) > 1:
        raise Inadmissible(f"{side.text} gave the metric {metric or names[0]} {len(values)} times: give it once.")
    try:
        if isinstance(values[0], bool):
            raise ValueError
        return metric or names[0], float(values[0])
    except (TypeError, ValueError):
        raise Inadmissible(f"{side.text} gave {metric or names[0]}={values[0]}, which is not a number.") from None


class Worktrees:
    """Git worktrees below a folder, one per commit; the user's own working tree is never touched."""

    def __init__(self, repository: Path, folder: Path):
        self.repository, self.folder = repository.resolve(), folder.resolve()

    def folder_of(self, side: Side) -> Path:
        """Folder in which a side's command runs: its worktree, or the repository for one that is not a git ref."""
        if side.kind != "git":
            return self.repository
        place = self.folder / side.commit[:16]
        if not (place / ".git").exists():
            git(self.repository, "worktree", "prune")
            if git(self.repository, "worktree", "add", "--detach", "--force", str(place), side.commit) is None:
                raise Inadmissible(f"{side.text}: git could not make a worktree of it at {place}.")
        return place

    def clear(self) -> None:
        """Remove all worktrees of the folder."""
        for place in self.folder.glob("*"):
            git(self.repository, "worktree", "remove", "--force", str(place))


def evaluator_hash(paths: Sequence[str], side: Side, repository: Path) -> str:
    """Of the files that measure, as the side has them: of its commit, or of the folder its command runs in; of this
    package's own code for overrides."""
    out = hashlib.sha256()
    if side.kind == "overrides":
        root = Path(__file__).parent.parent
        for file in sorted(root.rglob("*.py")):
            out.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    for name in paths:
        if side.kind == "git":
            content = git(repository, "rev-parse", "--verify", "--quiet", f"{side.commit}:{name}")
            if content is None:
                raise Inadmissible(f"--evaluator={name}: {side.text} has no such file.")
            out.update(f"{name}\n{content}\n".encode())
            continue
        place = repository / name
        if not place.exists():
            raise Inadmissible(f"--evaluator={name}: there is no such file or folder.")
        for file in sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]:
            if "__pycache__" not in file.parts and ".git" not in file.parts:
                out.update(f"{file.relative_to(repository)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return out.hexdigest()


# --- what a number means ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How two values become one difference (positive: the candidate is better), and the margin in the same unit."""

    margin: float
    relative: bool  # differences are log ratios
    higher: bool = False  # is better

    def difference(self, baseline: float, candidate: float) -> float:
        """Difference of one pair; a value that is not finite is a diverged run: +-inf for one, nan for two."""
        gone = [not math.isfinite(x) for x in (baseline, candidate)]
        if any(gone):
            return math.nan if all(gone) else math.inf if gone[0] else -math.inf
        if self.relative and min(baseline, candidate) <= 0:
            raise Inadmissible(
                f"A margin in % needs values above 0, got {min(baseline, candidate):g}: give --margin as a number."
            )
        d = math.log(baseline / candidate) if self.relative else baseline - candidate
        return -d if self.higher else d


def read_margin(text: str, higher: bool = False) -> Scale:
    """Parse a margin: 0.5% is relative, 0.02 is in the metric's unit."""
    relative = text.strip().endswith("%")
    try:
        value = float(text.strip().rstrip("%"))
        if not (0 < value < math.inf):
            raise ValueError
    except ValueError:
        raise Inadmissible(f"--margin={text} is not allowed: a number above 0, or a percentage such as 0.5%.") from None
    return Scale(math.log1p(value / 100) if relative else value, relative, higher)


def read_seconds(option: str, text: str | None) -> float:
    """Parse a duration, 90, 90s, 10m or 2h, to seconds; infinite if there is none."""
    if text is None:
        return math.inf
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|m|h|)\s*", text)
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600, "": 1}[match[2]] if match else 0.0
    if not seconds > 0:
        raise Inadmissible(f"{option}={text} is not allowed: write 90s, 10m or 2h.")
    return seconds


def clock() -> float:
    """Seconds of a monotonic clock."""
    return time.monotonic()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
