"""The command `albert-ablate`: runs are trained, swept, judged and shown.

A command is a function whose heavy imports stand inside it (`albert-ablate --help` loads neither torch nor Hydra),
registered in one line of COMMANDS. What a user gets wrong raises ConfigError: one sentence, exit code 2; a RuntimeError
that a command raises is one sentence and exit code 1.
"""

import atexit
import functools
import gc
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from albert_ablate.cli_help import GROUPS, epilog, panel_of
from albert_ablate.config import ConfigError, file_trouble, folders_named, without_folders
from albert_ablate.config.folders import SEARCHPATH
from albert_ablate.config.secrets import masked
from albert_ablate.evaluations import commands as evaluations
from albert_ablate.records.json_output import NO_BARS, output_to
from albert_ablate.referee import commands as referee
from albert_ablate.report import commands as analysis
from albert_ablate.scaffold import commands as scaffold
from albert_ablate.studies import commands as studies
from albert_ablate.training.generate import generate
from albert_ablate.ui import commands as ui

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        from albert_ablate import __version__

        print(f"albert-ablate {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ablation studies of language models. `albert-ablate run norm=pre_ln` trains one configuration, `sweep` trains
    many, `judge` tests claims about them.

    Set NO_COLOR=1 to switch colors off; ALBERT_ABLATE_NO_BARS=1 switches progress bars off."""


@app.command(
    add_help_option=False,
    rich_help_panel=panel_of("run"),
    epilog=epilog("run"),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def run(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Overrides key=value; -m for a grid of them; any flag of Hydra.")
    ] = None,
) -> int:
    """Train one configuration, or with -m a grid of them (the same as `python run.py`)."""
    return _run(arguments or [])


def _run(arguments: list[str]) -> int:
    """What `python run.py` does with these arguments, which Hydra reads from sys.argv."""
    from albert_ablate.training.main import command

    before, sys.argv = sys.argv, ["albert-ablate run", *arguments]
    try:
        return command()
    finally:
        sys.argv = before


CONFIG_DIR = Annotated[
    list[str] | None,
    typer.Option(
        "--config-dir", help="Add a folder of your own options: DIR/norm/mine.yaml becomes norm=mine (repeatable)."
    ),
]


QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
# commands whose output tells how far they are; what the others print is their result
SAY_PROGRESS = ("sweep", "tune", "agent", "calibrate", "evaluate", "sync")


def quietly(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with the option --quiet, under which it and the processes that it starts print errors alone."""

    @functools.wraps(command)
    def wrapped(*, quiet: bool = False, **given: Any) -> Any:
        if not quiet:
            return command(**given)
        os.environ[NO_BARS] = "1"
        with output_to(os.devnull):
            return command(**given)

    return _with_option(wrapped, command, "quiet", QUIET, False)


def _with_option(
    wrapped: Callable[..., Any], command: Callable[..., Any], name: str, annotation: Any, default: Any
) -> Callable[..., Any]:
    signature = inspect.signature(command)
    option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option]
    )
    wrapped.__annotations__ = {**command.__annotations__, name: annotation}
    return wrapped


def _without_searchpath(value: str | list[str]) -> tuple[Any, list[str]]:
    """Overrides, in a list or as words of a text ("norm=a hydra.searchpath=[b]"), without the folders they name."""
    if isinstance(value, str):
        kept, folders = without_folders(value.split())
        return " ".join(kept), folders
    texts, folders = [], list[str]()
    for text in value:
        kept, searched = without_folders(text.split() if SEARCHPATH in text else [text])
        texts += [" ".join(kept)] if kept else []
        folders += searched
    return texts, folders


def with_own_folders(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with the option --config-dir, which also takes hydra.searchpath=[...] wherever it takes overrides."""

    @functools.wraps(command)
    def wrapped(*, config_dir: list[str] | None = None, **given: Any) -> Any:
        folders = list(config_dir or ())
        for name, value in given.items():
            if SEARCHPATH in str(value):
                given[name], searched = _without_searchpath(value)
                folders += searched
        with folders_named(folders):
            return command(**given)

    return _with_option(wrapped, command, "config_dir", CONFIG_DIR, None)


Tracker = Literal["wandb", "tensorboard", "mlflow"]


def sync(
    runs: Annotated[Path, typer.Argument(help="A folder of runs, or one run folder.")] = Path("runs"),
    to: Annotated[Tracker, typer.Option(help="Tracker to send runs to.")] = "wandb",
    project: Annotated[
        str | None,
        typer.Option(
            help="W&B project or MLflow experiment; default: WANDB_PROJECT, else albert_ablate.", show_default=False
        ),
    ] = None,
    entity: Annotated[
        str | None, typer.Option(help="W&B team or user; default: that of your API key.", show_default=False)
    ] = None,
) -> None:
    """Upload finished and diverged runs to a tracker; what was uploaded before is skipped."""
    from albert_ablate.trackers.sync import sync_runs

    sync_runs(runs, to, project, entity, say=print)


def methods(
    kind: Annotated[str | None, typer.Argument(help="List one group only: norm, dropout, optimizer, data, ...")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table (schema: docs/referee.md).")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw dropout by depth, and residual variance and gradients of each norm, to this file."),
    ] = None,
) -> None:
    """List every option that can be varied, with formula, source and defaults."""
    from albert_ablate.report.methods import show_methods

    show_methods(kind, as_json, plot)


def measures(
    word: Annotated[
        str | None, typer.Argument(help="List only measures whose name or description contains this word.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table (schema: docs/referee.md).")
    ] = False,
) -> None:
    """List the measures that claims and comparisons can use, with unit, direction and requirements."""
    from albert_ablate.report.measures import show_measures

    show_measures(word, as_json)


COMMANDS: dict[str, Callable[..., Any]] = {
    "sync": sync,
    "methods": methods,
    "measures": measures,
    "sweep": studies.sweep,
    "agent": studies.agent,
    "status": studies.status,
    "evaluate": evaluations.evaluate,
    "generate": generate,
    "show": analysis.show,
    "report": analysis.report,
    "ui": ui.ui,
    "tune": studies.tune,
    "calibrate": studies.calibrate,
    "judge": studies.judge,
    "compare": referee.compare,
    "plan": studies.plan,
    "gate": referee.gate,
    "mcp": referee.mcp,
    "init": scaffold.init,
    "new": scaffold.new,
    "check-component": scaffold.check_component,
}
for name in sorted(COMMANDS, key=lambda n: [*chain(*GROUPS.values())].index(n)):
    function = COMMANDS[name]
    function = quietly(function) if name in SAY_PROGRESS else function
    app.command(name, rich_help_panel=panel_of(name), epilog=epilog(name))(with_own_folders(function))


def main(arguments: list[str] | None = None) -> int:
    """Run a command: its exit code."""
    atexit.register(gc.freeze)  # at the exit there is nothing to collect, and a million objects to scan
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given[:1] == ["run"]:  # as they are: typer would take --help, and put flags elsewhere
            return _run(given[1:])
        code = app(arguments, prog_name="albert-ablate", standalone_mode=False)
    except ConfigError as error:
        print(masked(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, typer.Exit):
            return error.exit_code
        if isinstance(error, typer.Abort):
            return 130
        if hasattr(error, "format_message"):  # the parser's own: an unknown option, a missing argument
            if message := error.format_message():  # type: ignore[attr-defined]
                print(masked(f"{message.rstrip('.')}."), file=sys.stderr)
            return 2
        if isinstance(error, OSError) and (trouble := file_trouble(error)):
            print(masked(trouble[0]), file=sys.stderr)
            return trouble[1]
        if isinstance(error, RuntimeError):
            print(masked(str(error)), file=sys.stderr)
            return 1
        print(masked(traceback.format_exc()), file=sys.stderr)  # Python's own would show passwords
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
