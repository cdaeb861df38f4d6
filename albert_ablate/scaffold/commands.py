"""`albert-ablate init`, `new` and `check-component`. Torch is imported where it is used."""

from pathlib import Path
from typing import Annotated, Any

import typer

from albert_ablate.config import ConfigError


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; created if missing.")] = Path("."),
) -> None:
    """Create a working folder that runs as it is: a norm of your own, a sweep, claims, a notebook."""
    from albert_ablate.scaffold.init import folder_files
    from albert_ablate.scaffold.new import write_files

    files = folder_files(folder)
    write_files(files)
    for path in files:
        print(path)
    if folder != Path("."):
        print(f"cd {folder}")
    print("albert-ablate sweep study.yaml --config-dir conf")


def new(
    group: Annotated[
        str, typer.Argument(help="Group of the component: norm, norm_type, dropout, optimizer, schedule, clip or loss.")
    ],
    name: Annotated[str, typer.Argument(help="Name of the option and its module: small letters, digits and _.")],
    folder: Annotated[Path, typer.Option("--dir", help="Folder to write to.")] = Path("."),
) -> None:
    """Create a component of your own that runs as it is: class, YAML and test."""
    from albert_ablate.scaffold.new import component_files, write_files

    files = component_files(group, name, folder)
    write_files(files)
    for path in files:
        print(path)
    print(f"albert-ablate check-component {group}={name} --config-dir {folder / 'conf'}")
    print(f"albert-ablate run {group}={name} --config-dir {folder / 'conf'}")


def check_component(
    overrides: Annotated[
        list[str], typer.Argument(help="The component (norm=mine), then the overrides key=value that it needs.")
    ],
    tried: Annotated[
        list[str] | None, typer.Option("--try", help="NAME=VALUE: value to try for an argument (repeatable).")
    ] = None,
) -> int:
    """Check a component on a tiny model: it trains, depends on its seed alone, and each argument has an effect."""
    import yaml

    group, equals, option = overrides[0].partition("=")
    if not equals or any("=" not in text for text in (*overrides, *(tried or ()))):
        raise ConfigError("A component is written GROUP=OPTION, settings key=value: check-component norm=mine.")
    values: dict[str, Any] = {
        text.partition("=")[0].removeprefix(f"{group}."): yaml.safe_load(text.partition("=")[2]) for text in tried or ()
    }
    from albert_ablate.training.contracts import checks

    failed = 0
    for what, wrong in checks(group, option, overrides[1:], values):
        failed += bool(wrong)
        state = "not checked" if wrong is None else "FAILED" if wrong else "ok"
        print(f"{state:<11}  {what}{f': {wrong}' if wrong else ''}", flush=True)
    if failed:
        print(f"{group}={option} fails {failed} of its checks.")
    return 1 if failed else 0
