"""Commands about studies: sweep, agent, tune, calibrate, judge, plan, status. Heavy imports stand inside them."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from albert_ablate.config import ConfigError
from albert_ablate.studies.packing import read_workers
from albert_ablate.studies.sweepfile import read_sweep


def plain_path(path: Path) -> Path:
    """A folder as it is named: Hydra, which hands it to the runs, would put something else for ${...}."""
    if "${" in str(path):
        raise ConfigError(f"{path} is not allowed as the folder of runs: a folder's name may not hold ${{...}}.")
    return path


SWEEP = Annotated[Path, typer.Argument(help="A W&B sweep file, or a shipped one's name: smoke.", show_default=False)]
RUNS = Annotated[Path, typer.Option(help="Folder of runs.", callback=plain_path)]
TUNED = Annotated[
    bool, typer.Option("--tuned/--untuned", help="Use the learning rates that `tune` found for these arms.")
]

WORKERS = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Processes here, one thread each; all cores if not given; auto: processes and threads by a measurement.",
    ),
]


def _workers(given: str | None) -> int:
    return (os.cpu_count() or 1) if given is None else read_workers(given)


def sweep(
    file: SWEEP,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for every run; hydra/launcher=ray for another launcher.")
    ] = None,
    runs: RUNS = Path("runs"),
    workers: WORKERS = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, their states and the time left.")] = False,
    tuned: TUNED = True,
) -> int:
    """Train what a sweep file still lacks, with no server: finished and diverged runs are kept, others go on."""
    from albert_ablate.studies.sweep import run_sweep
    from albert_ablate.training.console import hint

    asked = read_sweep(file)
    if not dry_run:
        hint(f"Watch it: {shlex.join(['albert-ablate', 'ui', str(runs), *(overrides or ()), '--sweep', str(file)])}")
    code = run_sweep(asked, runs, _workers(workers), overrides or (), dry_run, tuned)
    if code == 0 and not dry_run:
        hint(f"Next: {shlex.join(['albert-ablate', 'report', str(runs)])}")
    return code


def agent(
    sweep: Annotated[str, typer.Argument(help="ENTITY/PROJECT/SWEEP, as `wandb sweep` shows it.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for every run: your own settings.")] = None,
    entity: Annotated[str | None, typer.Option(help="Team or user; the key's own if not given.")] = None,
    project: Annotated[str | None, typer.Option(help="Project, where the sweep does not name it.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many runs.")] = None,
    runs: RUNS = Path("runs"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time, one thread each; all cores if not given.")
    ] = None,
    tuned: TUNED = True,
) -> int:
    """Train what a sweep on a W&B server hands out, in processes that stay warm; its values only choose and set."""
    from albert_ablate.studies.wandb_agent.agent import run_agent

    return run_agent(sweep, runs, workers or os.cpu_count() or 1, entity, project, count, tuple(overrides or ()), tuned)


def tune(
    file: SWEEP,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for every run.")] = None,
    runs: RUNS = Path("runs"),
    workers: WORKERS = None,
    rates: Annotated[int, typer.Option(help="Points of the grid, an odd number.")] = 7,
    step: Annotated[float, typer.Option(help="Factor between two rates: 2, or 3.16 for sqrt(10).")] = 2.0,
    seeds: Annotated[int, typer.Option(help="Tuning seeds, counted from 1,000,000.")] = 3,
    objective: Annotated[Literal["val_loss", "best_val_loss"], typer.Option(help="What is minimized.")] = "val_loss",
    force: Annotated[bool, typer.Option("--force", help="Work out anew what is tuned already, from its runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the arms, their grids and the price.")] = False,
) -> int:
    """Find the learning rate of each arm of a sweep file, with as many runs for every arm; `sweep` then uses it."""
    from albert_ablate.studies.tune import tune as tune_arms

    return tune_arms(
        read_sweep(file), runs, _workers(workers), overrides or (),
        rates, step, seeds, objective, force, dry_run,
    )  # fmt: skip


def calibrate(
    file: SWEEP,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for every run.")] = None,
    runs: RUNS = Path("runs"),
    workers: WORKERS = None,
    arm: Annotated[str | None, typer.Option(help="The control, such as norm=pre_ln; the file's first arm.")] = None,
    treatment: Annotated[
        list[str] | None, typer.Option(help="An arm to compare with it, as often as wanted; all others.")
    ] = None,
    count: Annotated[int, typer.Option(help="Runs of the control.")] = 24,
    measure: Annotated[str, typer.Option(help="A loss of the summary.")] = "test_loss",
    margin: Annotated[float, typer.Option(help="Of the measure, as a share: 0.005 is half a percent.")] = 0.005,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="What it would train, and the price.")] = False,
) -> int:
    """Noise over seeds, paired spread, reachable margins and false positives, from runs on fresh seeds."""
    from albert_ablate.studies.calibrate import calibrate as calibrate_arms

    return calibrate_arms(
        read_sweep(file), runs, _workers(workers), overrides or (),
        arm, treatment, count, measure, margin, dry_run,
    )  # fmt: skip


def status(
    runs: Annotated[Path, typer.Argument(help="A folder of runs.", callback=plain_path)] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="With --sweep: the key=value that the sweep was run with.")
    ] = None,
    sweep: Annotated[Path | None, typer.Option(help="Show the runs of this sweep file, those not begun too.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the runs as JSON in place of the table (schema: docs/referee.md).")
    ] = False,
) -> None:
    """Arms and seeds with state, progress, speed and time left, from the records alone."""
    from albert_ablate.studies.status import show_status

    show_status(runs, sweep, watch, overrides or (), as_json)


FORM = Annotated[Literal["screen", "full"], typer.Option(help="The claims' small or large form.")]


def judge(
    claims: Annotated[Path, typer.Argument(help="A claims file, or albert_agpt: the article's.", show_default=False)],
    runs: RUNS = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the ledger as JSON in place of the text (schema: docs/referee.md).")
    ] = False,
    ledger_file: Annotated[
        Path | None, typer.Option("--ledger", help="Where the ledger goes; RUNS/ledger.json.", show_default=False)
    ] = None,
    form: FORM = "screen",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Show and train only this claim; all are judged. May be given several times."),
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Train the cheapest next pair until all is decided.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="With --run: 3600s, or 5e8tokens, to spend.", show_default=False)
    ] = None,
    secondary: Annotated[
        bool, typer.Option("--secondary", help="With --run: then the secondary contrasts, to as many pairs.")
    ] = False,
    workers: Annotated[
        str, typer.Option(metavar="N|auto", help="With --run: processes, one thread each; auto: measured.")
    ] = "2",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The price of each claim in both forms.")] = False,
    format: Annotated[
        Literal["latex", "md", "csv"] | None,
        typer.Option(help="Print a table, with a paragraph on the method, in place of the ledger.", show_default=False),
    ] = None,
    plot: Annotated[
        Literal["png", "svg", "html"] | None,
        typer.Option(help="Draw each claim to RUNS/claims/plots.", show_default=False),
    ] = None,
    verify: Annotated[
        int, typer.Option(min=0, help="Train so many of the runs again, drawn at random, and compare.")
    ] = 0,
) -> int:
    """Judge claims from the records of runs: a verdict for each, with its interval, its cost and every look."""
    from albert_ablate.studies.judge_run import run_judge

    return run_judge(
        claims,
        runs,
        as_json,
        ledger_file,
        form,
        only or (),
        run,
        budget,
        secondary,
        read_workers(workers),
        dry_run,
        format,
        plot,
        verify,
    )


def plan(
    claims: Annotated[Path, typer.Argument(help="A claims file, such as sweeps/claims.yaml.", show_default=False)],
    runs: RUNS = Path("runs"),
    form: FORM = "screen",
    only: Annotated[list[str] | None, typer.Option(help="Plan only this claim; may be given several times.")] = None,
    effect: Annotated[
        list[str] | None,
        typer.Option(help="An effect of interest: 0.5% of log ratios, else in the measure's unit; 1, 2 and 4 margins."),
    ] = None,
    spread: Annotated[
        str | None,
        typer.Option(help="Spread of a pair's difference, as `calibrate` says it: 0.3%; from pairs or tuning runs."),
    ] = None,
) -> None:
    """Say what claims will take before they are run: pairs, runs and hours by effect, and reachable margins."""
    from albert_ablate.judge.claims import read_claims
    from albert_ablate.studies.power import show_plan

    show_plan(read_claims(claims), runs, form, only or (), effect or (), spread)
