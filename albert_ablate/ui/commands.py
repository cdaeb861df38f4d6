"""`albert-ablate ui`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from albert_ablate.config import ConfigError
from albert_ablate.records.store import require_runs_folder
from albert_ablate.studies.commands import plain_path


def ui(
    runs: Annotated[Path, typer.Argument(help="A folder of runs; it may be empty.", callback=plain_path)] = Path(
        "runs"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="With --sweep: the overrides that the sweep was run with.")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="Show only the runs of this sweep file, also those not started.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Port to serve on; default: 8321, or a free one if that is taken.",
            show_default=False,
        ),
    ] = None,
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
    """Serve the report to a browser on this machine and update it while runs train; stop with Ctrl-C."""
    from albert_ablate.report import render
    from albert_ablate.studies.sweep_settings import own_overrides
    from albert_ablate.studies.sweepfile import read_sweep

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"`ui` needs the package {error.name}: pip install 'albert_ablate[ui]'.") from None
    render.require()
    if sweep is None or runs.exists():  # the sweep's own hint names `ui` before its first run makes the folder
        require_runs_folder(runs)
    found = None if sweep is None else read_sweep(sweep)
    if overrides and found is None:
        raise ConfigError(f"{overrides[0]} has no effect without --sweep: overrides say how a sweep was run.")

    from albert_ablate.ui.live import Pages
    from albert_ablate.ui.server import serve

    pages = Pages(runs, found, own_overrides(overrides or ()) if found else (), ledger, baseline)
    print("Stop with Ctrl-C.", file=sys.stderr)
    serve(pages, port, lambda address: print(address, flush=True))
