"""The command line of `run.py` and `albert-ablate run`: help, arguments, composition by Hydra, one call of `train` for
each job, exit code."""

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from albert_ablate.collector import preload
from albert_ablate.config import (
    ConfigError,
    as_config_error,
    conf_folder,
    each_once,
    file_trouble,
    folders_named,
    lacking,
    options,
    own_option_files,
    prepared,
    quoted,
    search,
    without_folders,
)
from albert_ablate.config.secrets import masked

Train = Callable[[Any], tuple[int, float | None]]  # of one job: exit code and objective
HELP = """Train one arm of an ablation, or find it if it is already trained.

  python run.py norm=pre_ln dropout=depth_decay          one arm
  python run.py -m norm=pre_ln,post_ln seed=0,1,2        a grid of arms and seeds
  python run.py model=deep_96 budget.tokens=1_000_000 data=text_files data.path=my.txt

Choose one option in each group (the default stands first):

{groups}

Several trackers at once: logger=[wandb_offline,tensorboard] logger.wandb_offline.project=mine
Evaluated at the end, or added to a run that is done: evaluation=[domains,corruption] evaluation.corruption.tokens=65536
Components of your own: --config-dir DIR, a folder that holds norm/mine.yaml, adds norm=mine
Any number can be set by its key: seed=1 budget.tokens=1e6 model.layers=12 dropout.mean=0.2 optimizer.lr=3e-4
schedule.warmup=0.1 data.batch=32 data.train_size=200_000 evaluation.every=50_000 trainer.threads=1 paths.runs=DIR
force=true (train a finished run again and compare) accept_code=true (take one that other code made)
debug=true (tracebacks)
`python run.py --cfg job` shows the whole configuration; --hydra-help is Hydra's own help.
"""


def train(cfg: Any) -> tuple[int, float | None]:
    """Train one job as Hydra composed it: returns exit code and objective, the validation loss in nats per token."""
    # imported here, so that --help and mistaken arguments are answered without torch
    preload("torch")
    from albert_ablate.trackers.wandb import agent_run
    from albert_ablate.training.console import exit_code, show_record
    from albert_ablate.training.launch import is_first
    from albert_ablate.training.run import run
    from albert_ablate.training.swept import composed, run_swept

    cfg = composed(cfg)  # compose: the options taken; under a W&B agent the learning rate tuned for the arm
    first = is_first(cfg)  # of the processes of a distributed run rank 0 alone prints
    record = (run_swept if agent_run() else run)(cfg, verbose=first)  # identify, find or train, record
    if first:
        show_record(record)
    return exit_code(record) if first else 0, record["summary"]["val_loss"]


def help_text() -> str:
    """Groups and options from the folder listing of conf/; the defaults from its config.yaml, read as text."""
    defaults = {}
    for line in (conf_folder() / "config.yaml").read_text().splitlines():
        group, colon, option = line.strip().removeprefix("- ").partition(": ")
        if line.startswith("  - ") and colon:
            defaults[group] = option
    rows = []
    for group, names in options().items():
        first = [n for n in names if n == defaults.get(group)]
        rows.append(f"  {group:<11} {' '.join(first + [n for n in names if n not in first])}")
    own_options = [f"{file.parent.name}={file.stem} ({file.parent.parent})" for file in own_option_files()]
    rows += ["", f"Of your own: {', '.join(own_options)}"] if own_options else []
    return HELP.format(groups="\n".join(rows))


def command(train: Train = train) -> int:
    """Run the command line in sys.argv: compose each job and call `train` for it.

    Exit code: 0 finished or diverged; 130 Ctrl-C, 143 SIGTERM; 2 the user's mistake; 1 anything later."""
    atexit.register(gc.freeze)  # at the exit there is nothing to collect, and a million objects to scan
    arguments = sys.argv[1:]
    debug = any(a.lower() == "debug=true" for a in arguments)
    folders = list[str]()
    try:
        if not os.environ.get("WANDB_SWEEP_ID"):  # else they are a server's, which may name no folder
            arguments, folders = without_folders(arguments)
        with folders_named(folders), tempfile.TemporaryDirectory(prefix="albert_ablate_") as scratch:
            return _compose_and_run(train, arguments, debug, scratch)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if debug:
            print(masked(traceback.format_exc()), file=sys.stderr)
        if isinstance(error, OSError) and (trouble := file_trouble(error)):
            return _say(trouble[0], trouble[1])
        return _say(as_config_error(error), 2)


def _compose_and_run(train: Train, arguments: list[str], debug: bool, scratch: str) -> int:
    """Compose and run all jobs of one command. Hydra's own output files, which nobody reads, go to `scratch`."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return 0
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes: list[int] = []
    if os.environ.get("WANDB_SWEEP_ID"):
        from albert_ablate.config.untrusted import as_settings

        arguments = as_settings(arguments)
    _check_arguments(arguments)
    if os.environ.get("WANDB_SWEEP_ID"):  # they are a server's, handed over by `wandb agent`
        from albert_ablate.config.untrusted import refuse_untrusted, with_wandb_logger

        refuse_untrusted(arguments)
        arguments = with_wandb_logger(without_lacking(arguments))
    if {"-sc", "--shell-completion"} & set(arguments):
        given = list(arguments)  # Hydra's own words, which it wants as they are
    else:
        given = _given(arguments, scratch)
    begun: list[bool] = []

    @hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")
    def task(cfg: Any) -> float | None:
        begun.append(True)
        code, objective = _attempted(train, cfg, debug)
        codes.append(code)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise KeyboardInterrupt  # the rest of a grid is left for next time
        return objective

    before, sys.argv = sys.argv, [sys.argv[0], *given]
    try:
        with _masked_output(arguments), _composed_once(arguments):
            task()
    except KeyboardInterrupt:
        if not codes or not codes[-1]:
            raise
        return codes[-1]
    except (ValueError, OSError) as error:  # on its own flags and folders Hydra raises whatever comes to hand
        is_users_mistake = isinstance(error, ConfigError | HydraException | OmegaConfBaseException)
        if begun or is_users_mistake or (isinstance(error, OSError) and file_trouble(error)):
            raise
        raise ConfigError(f"Hydra: {' '.join(str(error).split()).rstrip('.')}.") from None
    finally:
        sys.argv = before
    return max(codes, default=0)


@contextlib.contextmanager
def _masked_output(arguments: list[str]) -> Iterator[None]:
    """Print what Hydra shows of a configuration (--cfg, --info) without its passwords."""
    if not {"--cfg", "-c", "--info", "-i"} & {a.partition("=")[0] for a in arguments}:
        yield
        return
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            yield
    finally:
        print(masked(shown.getvalue()), end="")


@contextlib.contextmanager
def _composed_once(arguments: list[str]) -> Iterator[None]:
    """Hydra composes a job twice, the first time for `hydra.mode` alone: not where nothing can set that."""
    from hydra._internal.hydra import Hydra

    before = Hydra.get_mode
    if not any("hydra" in a for a in arguments):
        Hydra.get_mode = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = before  # type: ignore[method-assign]


def _given(arguments: list[str], scratch: str) -> list[str]:
    """The arguments in the order that Hydra's argparse needs: flags first, then all overrides together."""
    from hydra._internal.utils import get_args_parser

    overrides = each_once([a for a in arguments if "=" in a and not a.startswith("-")])
    given = [a for a in arguments if "=" not in a or a.startswith("-")] + prepared(overrides)
    if not any(a.startswith("hydra.sweep.dir=") for a in overrides):
        given.append(f"hydra.sweep.dir={quoted(scratch)}")
    given += search()
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    if "--version" not in given:
        parser.parse_args(given)
    return given


def _refuse_flag(message: str) -> NoReturn:
    raise ConfigError(f"{message.rstrip('.')}.")


def _check_arguments(arguments: list[str]) -> None:
    """Refuse arguments that Hydra would answer with a page of usage or a traceback: unknown flags, missing keys."""
    from hydra._internal.utils import get_args_parser

    flags = get_args_parser()._option_string_actions
    sweeper = any(a.lstrip("+").startswith("hydra/sweeper=") for a in arguments)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        key = name.lstrip("-+~")
        if name == "--experimental-rerun":
            raise ConfigError(f"{name} is not allowed: repeat the command of a run to resume it.")
        if key == "hydra.sweeper.params" and not sweeper:
            raise ConfigError(f"{argument} is not allowed: the values of a grid are written -m seed=0,1.")
        if name.startswith("-") and name not in flags:
            write = f"{key}={value}" if equals else f"{key}=VALUE"
            raise ConfigError(f"{argument} is unknown: settings are written without dashes, {write}.")
        if equals and not key:
            raise ConfigError(f"'{argument}' cannot be read as key=value: it has no key.")


def without_lacking(arguments: list[str]) -> list[str]:
    """Drop values of a sweep that the chosen option does not have, as `albert-ablate sweep` does.

    Example: a grid over dropout and dropout.mean holds dropout=none dropout.mean=0.1; dropout.mean is dropped.
    """
    taken = dict(a.partition("=")[::2] for a in arguments)
    left = [key for key in taken if lacking(key, taken, lambda group: options()[group])]
    for key in left:
        group = key.partition(".")[0]
        print(f"{key}={taken[key]} is ignored: {group}={taken[group]} has no such setting.", file=sys.stderr)
    return [a for a in arguments if a.partition("=")[0] not in left]


def _attempted(train: Train, cfg: Any, debug: bool) -> tuple[int, float | None]:
    """Call `train` for one job; an error is printed as one sentence and becomes the exit code."""
    from albert_ablate.training.errors import RunFailed
    from albert_ablate.training.launch import is_first

    try:
        return train(cfg)
    except (ConfigError, RunFailed) as error:
        if debug:
            print(masked(traceback.format_exc()), file=sys.stderr)
        if isinstance(error, RunFailed):
            return _say(error, 1), None
        return _say(error, 2) if is_first(cfg) else 2, None  # every rank meets the same mistake


def _say(error: object, code: int) -> int:
    print(masked(str(error)), file=sys.stderr)
    return code
