"""Provenance of a run: versions of code and libraries, machine. No user names, no environment variables."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("albert_ablate", "torch", "pytorch-lightning", "hydra-core", "torchmetrics", "numpy", "pyarrow")


def provenance(library: str | None = None) -> dict:
    """Versions of the code, Python and libraries, and the machine that this process runs on. library: one more, by
    which the model is made."""
    return {
        "code": code_version(),
        "libraries": {name: version for name in (*LIBRARIES, library) if name and (version := _version(name))},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def code_version() -> str | None:
    """Git commit of the checkout that the package runs from, with `+changed` if files differ; None if there is none."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    commit = next((line.split()[-1] for line in said if line.startswith("# branch.oid ")), "(initial)")
    changed = any(not line.startswith("#") for line in said)
    return None if commit == "(initial)" else commit + ("+changed" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
