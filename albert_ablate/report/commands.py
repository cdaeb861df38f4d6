"""What `albert-ablate` draws and writes of runs: show, report."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from albert_ablate.config import ConfigError
from albert_ablate.records.json_output import document


def show(
    run: Annotated[Path, typer.Argument(help="A run folder: runs/SETTING/seedN.", show_default=False)],
    other: Annotated[
        Path | None,
        typer.Argument(help="A second run to draw on the same axes, with the difference.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="File to write: .html, .png or .svg; default: run.html.", show_default=False
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's metrics as JSON, draw nothing (schema: docs/referee.md).")
    ] = False,
) -> None:
    """Draw one run, finished or running: losses, gradients, learning rate, statistics of each layer. Given two runs,
    draw both on the same axes with their difference."""
    from albert_ablate.report.show import as_document, draw

    if as_json and (output or other):
        given = f"-o {output}" if output else f"a second run ({other})"
        raise ConfigError(f"--json and {given} exclude each other: --json prints the metrics of one run.")
    if as_json:
        print(document("run", as_document(run)))
        return
    output = output or Path("run.html")
    draw(run, output, other)
    print(output)


def report(
    runs: Annotated[
        Path,
        typer.Argument(
            help="A folder of runs; or a table, W&B project, TensorBoard or MLflow folder of another trainer."
        ),
    ] = Path("runs"),
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File or folder to write; default: report.html, report.md, or the folder report for csv.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["html", "md", "csv"], typer.Option(help="One HTML page, Markdown with pictures, or CSV tables.")
    ] = "html",
    ledger: Annotated[
        Path | None,
        typer.Option(help="Ledger that `judge` wrote; default: RUNS/ledger.json, if it exists.", show_default=False),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Arm to compare the others with: norm=pre_ln; default: the arm nearest to the default configuration.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a report on all runs of a folder: claims, leaderboard, curves, stability, generalization, cost."""
    from albert_ablate.report.report import write

    for file in write(runs, output, format, ledger, baseline):
        print(file)
