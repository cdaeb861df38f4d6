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
        typer.Argument(help="A second run, drawn beside the first with the difference.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="What to write: .html, .png or .svg; run.html.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's figures as JSON, draw nothing (schema: docs/referee.md).")
    ] = False,
) -> None:
    """Draw one run: losses, gradients, learning rate, and what happens in each layer; also while it runs. With a second
    run: both on common axes, and their difference."""
    from albert_ablate.report.show import as_document, draw

    if as_json and (output or other):
        given = f"-o {output}" if output else f"a second run ({other})"
        raise ConfigError(f"--json and {given} exclude each other: --json prints the figures of one run.")
    if as_json:
        print(document("run", as_document(run)))
        return
    output = output or Path("run.html")
    draw(run, output, other)
    print(output)


def report(
    runs: Annotated[
        Path, typer.Argument(help="A folder of runs; or a table, W&B project, TensorBoard or MLflow folder.")
    ] = Path("runs"),
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="What to write; report.html, report.md or a folder report.", show_default=False
        ),
    ] = None,
    format: Annotated[
        Literal["html", "md", "csv"], typer.Option(help="One page, Markdown with pictures, or tables.")
    ] = "html",
    ledger: Annotated[
        Path | None, typer.Option(help="What `judge` wrote; RUNS/ledger.json if it is there.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The arm that others are compared with: norm=pre_ln; by default the arm nearest to the defaults.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write all runs below a folder as one report: claims, leaderboard, curves, stability, generalization, cost."""
    from albert_ablate.report.report import write

    for file in write(runs, output, format, ledger, baseline):
        print(file)
