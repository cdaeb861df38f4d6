"""`albert-ablate compare` and `gate`: from two sides to one answer, for people and programs."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from albert_ablate.config import ConfigError
from albert_ablate.records.json_output import output_to_stderr
from albert_ablate.referee.display import Lines, Terminal, on_terminal
from albert_ablate.studies.commands import RUNS, STACK
from albert_ablate.studies.packing import AUTO, read_workers
from albert_ablate.studies.stacking import OFF, read_stack

Progress = Lines | Terminal
SIDE = 'overrides ("norm=pre_ln"), a command with {seed} in it, or git:REF (with --command)'
METRIC = Annotated[
    str,
    typer.Option(
        "--metric",
        "--measure",
        help="Metric to compare: a measure of runs (default test_loss), a METRIC that a command prints, or seconds.",
        show_default=False,
    ),
]
HIGHER = Annotated[
    bool, typer.Option("--higher", help="Higher values of a command's metric are better (default: lower).")
]
MARGIN = Annotated[str, typer.Option(help="Smallest change that matters: 0.5% relative, 0.02 in the metric's unit.")]
COMMAND = Annotated[str, typer.Option(help="Command to run in the worktree of a git side, containing {seed}.")]
COMMON = Annotated[str, typer.Option(help='Overrides of all sides: "model=nano budget.tokens=200_000".')]
EQUAL = Annotated[str, typer.Option(help="What must be equal on all sides, of tokens, parameters, flops.")]
BUDGET = Annotated[
    str | None,
    typer.Option(help="Stop after this much time; asked again it goes on: 90s, 10m, 2h.", show_default=False),
]
LIMIT = Annotated[
    str | None, typer.Option(help="Time limit of each run of a command: 90s, 10m, 2h.", show_default=False)
]
CRASH = Annotated[
    bool,
    typer.Option(
        "--crash-is-outcome", help="Count a failed command as a diverged run (default: an accident, tried again)."
    ),
]
WORKERS = Annotated[int, typer.Option(min=1, metavar="N", help="Runs in parallel.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of the text (schema: docs/referee.md).")]
MARKDOWN = Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of the text, for a pull request.")]


def compare(
    sides: Annotated[
        list[str] | None, typer.Argument(help=f"The baseline, then one or more candidates: {SIDE}.", show_default=False)
    ] = None,
    refs: Annotated[tuple[str, str] | None, typer.Option(help="Two git refs A B, short for git:A git:B.")] = None,
    metric: METRIC = "",
    higher: HIGHER = False,
    margin: MARGIN = "0.5%",
    max_pairs: Annotated[int, typer.Option(help="Maximum number of pairs per candidate, 4 to 60.")] = 20,
    tune: Annotated[bool, typer.Option("--tune/--no-tune", help="Tune the learning rates of overrides first.")] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Judge a table (columns arm, seed, METRIC), or a YAML that describes one; run nothing."
        ),
    ] = None,
    command: COMMAND = "",
    common: COMMON = "",
    equal: EQUAL = "tokens,parameters,flops",
    crash_is_outcome: CRASH = False,
    budget: BUDGET = None,
    limit: LIMIT = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Runs in parallel; auto measures the fastest split (overrides only). Default: 2 for overrides, the "
            "runs of a pair; 1 for commands, which may use all cores.",
            show_default=False,
        ),
    ] = None,
    stack: STACK = "off",
    runs: RUNS = Path("runs"),
    as_json: JSON = False,
    markdown: MARKDOWN = False,
) -> int:
    """Is B better than A? Run pairs of both, seed by seed, until a sequential test decides; answer in one sentence.

    Exit codes: ACCEPT 0 (better), REJECT 1 (worse), INADMISSIBLE 2, NO EFFECT 3, UNDECIDED 75 (ask again).
    """
    from albert_ablate.referee.compare import Execution, Question, compare_table
    from albert_ablate.referee.compare import compare as ask_for
    from albert_ablate.referee.sides import read_seconds

    def ask(progress: Progress) -> Any:
        named = (*(sides or ()), *(f"git:{r}" for r in refs or ()))
        trained = not any("{seed}" in s or s.startswith("git:") for s in named)
        measured = metric or ("test_loss" if trained else "")
        more = tune, tuple(equal.replace(",", " ").split()), crash_is_outcome
        question = Question(named, measured, margin, higher, max_pairs, tuple(common.split()), command, *more)
        if table is not None:
            return compare_table(table, question)
        limits = read_seconds("--limit", limit), read_seconds("--budget", budget)
        count = (2 if trained else 1) if workers is None else read_workers(workers)
        if count == AUTO and not trained:
            raise ConfigError("--workers=auto is not allowed with commands: it measures the training of overrides.")
        if (together := read_stack(stack)) != OFF and not trained:
            raise ConfigError(f"--stack={stack} is not allowed with commands: it is about the training of overrides.")
        execution = Execution(runs, progress.say, progress.watch, Path(), *limits, count, together)
        return ask_for(question, execution)

    return _answered("compare", ask, as_json, markdown)


def gate(
    session: Annotated[
        str, typer.Option(help="Name of the session, its folder below RUNS/sessions.", show_default=False)
    ],
    candidate: Annotated[str, typer.Option(help=f"The proposed change: {SIDE}.", show_default=False)],
    baseline: Annotated[str, typer.Option(help="The current version; needed by the first call only.")] = "",
    metric: METRIC = "",
    higher: HIGHER = False,
    margin: MARGIN = "0.5%",
    max_pairs: Annotated[int, typer.Option(help="Maximum number of pairs per proposal; 0: planned, 12 to 30.")] = 0,
    control: Annotated[
        str, typer.Option(help="Error to control: fwer (any false accept) or fdr (the share of false accepts).")
    ] = "fwer",
    alpha: Annotated[float, typer.Option(help="Error level of the whole session.")] = 0.05,
    command: COMMAND = "",
    evaluator: Annotated[
        list[str] | None,
        typer.Option(help="File or folder of the code that measures; the session refuses changes to it (repeatable)."),
    ] = None,
    common: COMMON = "",
    equal: EQUAL = "tokens,parameters,flops",
    confirm: Annotated[str, typer.Option(help="Test an accepted proposal again with these overrides added.")] = "",
    crash_is_outcome: CRASH = False,
    budget: BUDGET = None,
    limit: LIMIT = None,
    workers: WORKERS = 1,
    runs: RUNS = Path("runs"),
    as_json: JSON = False,
    markdown: MARKDOWN = False,
) -> int:
    """Accept or reject one proposed change; the error rate holds for all proposals of the session together.

    Exit codes: ACCEPT 0, REJECT 1, INADMISSIBLE 2, NO EFFECT 3, UNDECIDED 75 (ask again).
    """
    from albert_ablate.referee.ledger import Ledger
    from albert_ablate.referee.session import Session
    from albert_ablate.referee.session_settings import CallOptions, Settings, check_name, read_control
    from albert_ablate.referee.sides import Inadmissible, read_seconds
    from albert_ablate.stats.sequential import FIRST, MOST_PAIRS

    def ask(progress: Progress) -> Any:
        say = progress.say
        if max_pairs and not FIRST <= max_pairs <= MOST_PAIRS:
            raise Inadmissible(f"--max-pairs={max_pairs} is not allowed: 0, or from {FIRST} to {MOST_PAIRS}.")
        if not 0 < alpha <= 0.2:
            raise Inadmissible(f"--alpha={alpha} is not allowed: a number above 0, at most 0.2.")
        settings = Settings(
            read_control(control), alpha, margin, metric, higher, max_pairs, command, tuple(evaluator or ()),
            crash_is_outcome, tuple(common.split()), tuple(equal.replace(",", " ").split()),
        )  # fmt: skip
        folder = runs / "sessions" / check_name(session)
        limits = read_seconds("--limit", limit), read_seconds("--budget", budget)
        options = CallOptions(folder, runs, Path(), *limits, workers)
        ledger = Ledger(folder)
        if ledger.entries:
            return _held(ledger, lambda: Session(ledger, options, settings, say).ask(baseline, candidate, confirm))
        Session(ledger, options, settings, say).check(
            baseline, candidate, confirm
        )  # a refused question makes no folder
        return _held(ledger, lambda: Session(ledger, options, settings, say).ask(baseline, candidate, confirm))

    return _answered("gate", ask, as_json, markdown)


def mcp(runs: RUNS = Path("runs")) -> int:
    """Serve runs, comparisons, sessions and methods to an agent over MCP (stdio), read-only."""
    from albert_ablate.referee.mcp_server import server

    server(runs.resolve()).run("stdio")
    return 0


def _held(ledger: Any, ask: Callable[[], Any]) -> Any:
    with ledger.lock():
        return ask()


def _answered(command: str, ask: Callable[[Progress], Any], as_json: bool, markdown: bool) -> int:
    """Ask, print the answer in the wanted form, and give its exit code; what is not an answer is 2, 75, 130 or 143."""
    from albert_ablate.config.secrets import masked
    from albert_ablate.records.atomic import replace_file
    from albert_ablate.referee.answer import EXIT_CODES, INADMISSIBLE, UNDECIDED, inadmissible
    from albert_ablate.referee.runners import Stopped

    def say(text: str) -> None:
        print(masked(text), file=sys.stderr if aside else sys.stdout, flush=True)

    aside = as_json or markdown
    progress = Terminal() if command == "compare" and not aside and on_terminal() else Lines(say)
    try:
        with output_to_stderr() if aside else contextlib.nullcontext(), progress:
            answer = ask(progress)
        document = json.dumps(answer.document(), indent=1, allow_nan=False)
        if command == "compare" and Path(answer.folder).is_dir():
            replace_file(Path(answer.folder) / "answer.json", f"{document}\n".encode())
    except ConfigError as error:
        if as_json:
            print(json.dumps(inadmissible(command, masked(str(error))).document(), indent=1))
        print(masked(str(error)), file=sys.stderr)
        return EXIT_CODES[INADMISSIBLE]
    except Stopped as stopped:
        say("Stopped; the same command continues from here.")
        return 128 + stopped.number
    except (OSError, RuntimeError) as error:  # a full disk, a ledger in use: nothing was decided
        print(masked(f"{error}"), file=sys.stderr)
        return EXIT_CODES[UNDECIDED]
    except Exception:
        # Python's own exit code of an error is that of REJECT
        print(masked(traceback.format_exc()), file=sys.stderr)
        return EXIT_CODES[UNDECIDED]
    if as_json:
        print(document)
    elif markdown:
        print(answer.markdown(), end="")
    else:
        answer.show(progress.say)
    return answer.exit_code
