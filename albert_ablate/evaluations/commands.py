"""`albert-ablate evaluate`, and the table of results that run.py prints as well. Torch is imported where it is used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from albert_ablate.config import ConfigError, check, compose, evaluations_of
from albert_ablate.records.folder import DONE, RunFolder


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs.", show_default=False)],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Evaluations (domains, corruption, ...; default: all) and their settings: corruption.tokens=65536."
        ),
    ] = None,
    weights: Annotated[
        Literal["last", "best"],
        typer.Option(help="Saved weights to use: of the last step, or of the best validation loss."),
    ] = "last",
    force: Annotated[bool, typer.Option("--force", help="Run evaluations again that are done already.")] = False,
) -> None:
    """Evaluate the saved weights of finished and diverged runs: other text domains, corrupted text, sharpness, ..."""
    evaluate_runs(run, names or (), weights, force)


def evaluate_runs(path: Path, names: Sequence[str], weights: Literal["last", "best"], force: bool) -> None:
    """Make and print the missing evaluations of every run at or below `path`; unfinished runs are named and skipped."""
    from albert_ablate.records.folder import recorded_folders

    nodes = chosen(names)
    folders = recorded_folders(path)
    if len(folders) > 1:
        done = [folder for folder in folders if _done(folder)]
        if not done:
            raise ConfigError(f"{path} holds no finished or diverged run.")
        folders = done

    from albert_ablate.evaluations.evaluate import evaluate_run

    for folder in folders:
        print(folder, flush=True)
        show_evaluations(evaluate_run(folder, nodes, weights, force, say=lambda text: print(text, flush=True)))


def _done(folder: Path) -> bool:
    try:
        record = RunFolder(folder).record()
    except ConfigError as error:  # one of many: the others are evaluated
        print(f"{error} Not evaluated.")
        return False
    if record is not None and record["status"] in DONE:
        return True
    print(f"{folder} is {record['status'] if record else 'gone'}, not evaluated.")
    return False


def chosen(words: Sequence[str]) -> dict[str, dict]:
    """Evaluations by name, with their configuration, of names and settings as on the command line."""
    names = [word for word in words if "=" not in word] or ["all"]
    settings = [word if word.startswith("evaluation.") else f"evaluation.{word}" for word in words if "=" in word]
    return evaluations_of(check(compose([f"evaluation=[{','.join(names)}]", *settings])))


def show_evaluations(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the summary metrics of each evaluation, and corpora that are not installed."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    missing: dict[str, str] = {}
    for name, entry in entries.items():
        for figure, value in entry["summary"].items():
            table.add_row(f"{name}.{figure}", "not finite" if value != value else f"{value:.4g}")
        missing |= {row["corpus"]: row["missing"] for row in entry["rows"] if row.get("missing")}
    Console(highlight=False).print(table)
    for corpus, why in missing.items():
        print(f"{corpus} is left out: {why}")
