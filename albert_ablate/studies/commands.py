"""Commands about studies: sweep, agent, tune, calibrate, judge, plan, status. Heavy imports stand inside them."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from albert_ablate.config import ConfigError
from albert_ablate.studies.packing import read_workers
from albert_ablate.studies.stacking import read_stack
from albert_ablate.studies.sweepfile import read_sweep


def plain_path(path: Path) -> Path:
    """A folder as it is named: Hydra, which hands it to the runs, would put something else for ${...}."""
    if "${" in str(path):
        raise ConfigError(f"{path} is not allowed as the folder of runs: a folder's name may not hold ${{...}}.")
    return path


SWEEP = Annotated[
    Path, typer.Argument(help="A sweep file (W&B format), or the name of a shipped one: smoke.", show_default=False)
]
RUNS = Annotated[Path, typer.Option(help="Folder of runs, read and written.", callback=plain_path)]
TUNED = Annotated[
    bool, typer.Option("--tuned/--untuned", help="Use the learning rates that `tune` found, where there are any.")
]

WORKERS = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Runs trained in parallel, one thread each; auto measures the fastest split into processes and threads. "
        "Default: all cores.",
        show_default=False,
    ),
]


STACK = Annotated[
    str,
    typer.Option(
        metavar="K|off",
        help="Train up to K runs of equal shapes as one in each worker: the same numbers, up to K times the memory.",
    ),
]


def _workers(given: str | None) -> int:
    return (os.cpu_count() or 1) if given is None else read_workers(given)


def sweep(
    file: SWEEP,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides key=value of every run; hydra/launcher=ray to train elsewhere."),
    ] = None,
    runs: RUNS = Path("runs"),
    workers: WORKERS = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List runs, their status and the estimated time; train nothing.")
    ] = False,
    tuned: TUNED = True,
    stack: STACK = "off",
) -> int:
    """Train the runs of a sweep file, without a server; finished and diverged runs are skipped, others resume."""
    from albert_ablate.studies.sweep import run_sweep
    from albert_ablate.training.console import hint

    asked = read_sweep(file)
    if not dry_run:
        hint(f"Watch it: {shlex.join(['albert-ablate', 'ui', str(runs), *(overrides or ()), '--sweep', str(file)])}")
    code = run_sweep(asked, runs, _workers(workers), overrides or (), dry_run, tuned, stack=read_stack(stack))
    if code == 0 and not dry_run:
        hint(f"Next: {shlex.join(['albert-ablate', 'report', str(runs)])}")
    return code


def agent(
    sweep: Annotated[str, typer.Argument(help="ENTITY/PROJECT/SWEEP, as `wandb sweep` prints it.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides key=value of every run.")] = None,
    entity: Annotated[
        str | None, typer.Option(help="W&B team or user; default: that of your API key.", show_default=False)
    ] = None,
    project: Annotated[str | None, typer.Option(help="W&B project, if SWEEP does not name it.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after this many runs.")] = None,
    runs: RUNS = Path("runs"),
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Runs trained in parallel, one thread each. Default: all cores."),
    ] = None,
    tuned: TUNED = True,
) -> int:
    """Run a W&B sweep agent with persistent workers. Values of the sweep may only select options and set numbers."""
    from albert_ablate.studies.wandb_agent.agent import run_agent

    return run_agent(sweep, runs, workers or os.cpu_count() or 1, entity, project, count, tuple(overrides or ()), tuned)


def tune(
    file: SWEEP,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides key=value of every run.")] = None,
    runs: RUNS = Path("runs"),
    workers: WORKERS = None,
    rates: Annotated[int, typer.Option(help="Number of learning rates per arm (odd).")] = 7,
    step: Annotated[float, typer.Option(help="Ratio of neighboring learning rates.")] = 2.0,
    seeds: Annotated[
        int, typer.Option(help="Seeds per learning rate (from 1,000,000 on, so that judged runs have others).")
    ] = 3,
    objective: Annotated[Literal["val_loss", "best_val_loss"], typer.Option(help="Loss to minimize.")] = "val_loss",
    force: Annotated[bool, typer.Option("--force", help="Choose again for arms that are tuned already.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List arms, learning rates and the estimated time; train nothing.")
    ] = False,
    stack: STACK = "off",
) -> int:
    """Tune the learning rate of each arm of a sweep file, with the same number of runs per arm."""
    from albert_ablate.studies.tune import tune as tune_arms

    return tune_arms(
        read_sweep(file), runs, _workers(workers), overrides or (),
        rates, step, seeds, objective, force, dry_run, stack=read_stack(stack),
    )  # fmt: skip


def calibrate(
    file: SWEEP,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides key=value of every run.")] = None,
    runs: RUNS = Path("runs"),
    workers: WORKERS = None,
    arm: Annotated[
        str | None, typer.Option(help="Control arm, such as norm=pre_ln; default: the first of the file.")
    ] = None,
    treatment: Annotated[
        list[str] | None, typer.Option(help="Arm to compare with the control (repeatable); default: all others.")
    ] = None,
    count: Annotated[int, typer.Option(help="Number of runs of the control.")] = 24,
    measure: Annotated[str, typer.Option(help="Loss to compare, one of a run's summary.")] = "test_loss",
    margin: Annotated[
        float, typer.Option(help="Smallest relative change that matters: 0.005 is half a percent.")
    ] = 0.005,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what it would train and the estimated time; train nothing.")
    ] = False,
) -> int:
    """Measure the noise between seeds with new runs: spread, paired spread, resolvable margins, false positives."""
    from albert_ablate.studies.calibrate import calibrate as calibrate_arms

    return calibrate_arms(
        read_sweep(file), runs, _workers(workers), overrides or (),
        arm, treatment, count, measure, margin, dry_run,
    )  # fmt: skip


def status(
    runs: Annotated[Path, typer.Argument(help="A folder of runs.", callback=plain_path)] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="With --sweep: the overrides that the sweep was run with.")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="Show only the runs of this sweep file, also those not started.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds until Ctrl-C.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table (schema: docs/referee.md).")
    ] = False,
) -> None:
    """Show status, progress, speed and time left of every run, by arm and seed."""
    from albert_ablate.studies.status import show_status

    show_status(runs, sweep, watch, overrides or (), as_json)


FORM = Annotated[
    Literal["screen", "full"], typer.Option(help="Form of the claims: screen (small runs) or full (large runs).")
]


def judge(
    claims: Annotated[
        Path, typer.Argument(help="A claims file, or the name of a shipped one: albert_agpt.", show_default=False)
    ],
    runs: RUNS = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the text (schema: docs/referee.md).")
    ] = False,
    ledger_file: Annotated[
        Path | None,
        typer.Option(
            "--ledger", help="File to write the ledger of verdicts to; default: RUNS/ledger.json.", show_default=False
        ),
    ] = None,
    form: FORM = "screen",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Show and train only this claim (repeatable); all are judged."),
    ] = None,
    run: Annotated[
        bool,
        typer.Option(
            "--run", help="Train the pairs of runs that are missing, cheapest first, until every claim is decided."
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="With --run: stop after this much training: 3600s or 5e8tokens.", show_default=False),
    ] = None,
    secondary: Annotated[
        bool,
        typer.Option(
            "--secondary", help="With --run: afterwards train the secondary contrasts, up to the same number of pairs."
        ),
    ] = False,
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="With --run: runs trained in parallel (2: those of a pair), one thread each; auto measures.",
        ),
    ] = "2",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate the cost of each claim in both forms; judge and train nothing.")
    ] = False,
    format: Annotated[
        Literal["latex", "md", "csv"] | None,
        typer.Option(help="Print a table and a paragraph on the method instead of the ledger.", show_default=False),
    ] = None,
    plot: Annotated[
        Literal["png", "svg", "html"] | None,
        typer.Option(help="Draw a chart of each claim into RUNS/claims/plots.", show_default=False),
    ] = None,
    verify: Annotated[
        int, typer.Option(min=0, help="Retrain this many of the runs, drawn at random, and compare the results.")
    ] = 0,
    stack: STACK = "off",
) -> int:
    """Test the claims of a file on the runs: a verdict for each, with its interval, its cost and every look.

    Verdicts without an answer:

    open: no pair of runs yet. undecided: more pairs may decide.

    inconclusive: all planned pairs are there, or more are unlikely to decide.

    inadmissible: the runs cannot be compared.
    """
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
        read_stack(stack),
    )


def plan(
    claims: Annotated[
        Path, typer.Argument(help="A claims file, or the name of a shipped one: albert_agpt.", show_default=False)
    ],
    runs: RUNS = Path("runs"),
    form: FORM = "screen",
    only: Annotated[list[str] | None, typer.Option(help="Plan only this claim (repeatable).")] = None,
    effect: Annotated[
        list[str] | None,
        typer.Option(
            help="Effect size to plan for (repeatable): 0.5%, or in the measure's unit. Default: 1, 2 and 4 margins."
        ),
    ] = None,
    spread: Annotated[
        str | None,
        typer.Option(
            help="Standard deviation of a pair's difference, as `calibrate` prints it: 0.3%. Default: from the runs."
        ),
    ] = None,
) -> None:
    """Estimate the pairs, runs and hours that claims need, by effect size, and the margins that can be resolved."""
    from albert_ablate.judge.claims import read_claims
    from albert_ablate.studies.power import show_plan

    show_plan(read_claims(claims), runs, form, only or (), effect or (), spread)
