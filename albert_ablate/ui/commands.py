"""`albert-ablate ui`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from albert_ablate.config import ConfigError
from albert_ablate.studies.commands import plain_path


def ui(
    runs: Annotated[Path, typer.Argument(help="A folder of runs; it may still be empty.", callback=plain_path)] = Path(
        "runs"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="With --sweep: the key=value that the sweep was run with.")
    ] = None,
    sweep: Annotated[Path | None, typer.Option(help="Show the runs of this sweep file, those not begun too.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="8321, or a free one where that is taken.", show_default=False)
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="What `judge` wrote; RUNS/ledger.json if it is there.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The arm that others are compared with: norm=pre_ln.", show_default=False)
    ] = None,
) -> None:
    """Show the report in a browser on this machine, and follow the runs while they train; Ctrl-C ends it."""
    from albert_ablate.report import render
    from albert_ablate.studies.sweep_settings import own_overrides
    from albert_ablate.studies.sweepfile import read_sweep

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"A page of this machine needs {error.name}: pip install 'albert_ablate[ui]'.") from None
    render.require()
    if runs.exists() and not runs.is_dir():
        raise ConfigError(f"{runs} is not a folder of runs.")
    if (runs / "record.json").exists():
        raise ConfigError(f"{runs} is one run, not a folder of runs: `albert-ablate show` draws it.")
    found = None if sweep is None else read_sweep(sweep)
    if overrides and found is None:
        raise ConfigError(f"{overrides[0]} would do nothing: it says how a sweep was run, give its file with --sweep.")

    from albert_ablate.ui.live import Pages
    from albert_ablate.ui.server import serve

    pages = Pages(runs, found, own_overrides(overrides or ()) if found else (), ledger, baseline)
    print("Ctrl-C ends it.", file=sys.stderr)
    serve(pages, port, lambda address: print(address, flush=True))
