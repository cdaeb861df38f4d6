"""Where options and studies lie: the package's own, beside it in a checkout and inside it in a wheel; those of conf
folders that the user names; those of installed plug-ins."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.metadata import entry_points
from pathlib import Path

from albert_ablate.config.errors import ConfigError, as_config_error, nearest
from albert_ablate.config.modules import folders_of_package

SHIPPED_ALIASES = {"albert_agpt": "claims"}  # names of shipped files that are called otherwise
CONF = "ALBERT_ABLATE_CONF"  # environment variable: conf folders of one's own, with `:` between (`;` on Windows)
PLUGINS = "albert_ablate.conf"  # group of entry points: packages that hold conf folders
FLAGS = ("--config-dir", "-cd")  # as Hydra spells it
SEARCHPATH = "hydra.searchpath"


def conf_folder() -> Path:
    """The folder of the package's configuration groups."""
    return _shipped("conf")


def sweeps_folder() -> Path:
    """The folder of sweep files and of the article's claims."""
    return _shipped("sweeps")


def _shipped(name: str) -> Path:
    package = Path(__file__).parent.parent
    return next(p for p in (package / name, package.parent / name) if p.is_dir())


# --- conf folders of one's own ---------------------------------------------------------------------------------------


def named_folders() -> tuple[Path, ...]:
    """The conf folders that ALBERT_ABLATE_CONF names, each once. Raises ConfigError for one that is not there."""
    folders = [Path(part).expanduser() for part in os.environ.get(CONF, "").split(os.pathsep) if part.strip()]
    return tuple(dict.fromkeys(_existing(path, f"{CONF}={path}") for path in folders))


def own_folders() -> tuple[Path, ...]:
    """All conf folders besides the package's own: those that the user names, then those of installed plug-ins."""
    plugins = _plugins(tuple(sys.path))
    return tuple(dict.fromkeys((*named_folders(), *(_existing(p, name) for p, name in plugins))))


def _existing(path: Path, title: str) -> Path:
    if not path.is_dir():
        raise ConfigError(f"{title} is not a folder.")
    return path.resolve()


@cache
def _plugins(search: tuple[str, ...]) -> tuple[tuple[Path, str], ...]:
    """The conf folder of each installed plug-in, and how its entry point is written. No plug-in is imported."""
    folders = []
    for point in entry_points(group=PLUGINS):
        places = folders_of_package(point.value)
        title = f"The conf folder of an installed plug-in ({point.name} = {point.value}, entry points {PLUGINS})"
        folders.append((Path(places[0]) if places else Path(point.value), title))
    return tuple(folders)


def name_folders(folders: Iterable[str | Path]) -> None:
    """Add conf folders to those that ALBERT_ABLATE_CONF names, so that the processes this one starts know them too."""
    names = [str(path) for path in named_folders()]
    for folder in folders:
        path = _existing(Path(folder).expanduser(), f"--config-dir={folder}")
        if os.pathsep in str(path):
            raise ConfigError(f"--config-dir={folder} is not allowed: a folder's name may hold no {os.pathsep}.")
        names.append(str(path))
    if names:
        os.environ[CONF] = os.pathsep.join(dict.fromkeys(names))


@contextmanager
def folders_named(folders: Iterable[str | Path] = ()) -> Iterator[None]:
    """Name conf folders for what happens inside; what is named there besides is forgotten at the end, too."""
    before = os.environ.get(CONF)
    try:
        name_folders(folders)
        yield
    finally:
        os.environ.pop(CONF, None)
        if before is not None:
            os.environ[CONF] = before


def without_folders(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command without those that name conf folders, and these folders.

    --config-dir DIR, --config-dir=DIR, -cd DIR and hydra.searchpath=[DIR,file://DIR,pkg://package.conf].
    """
    overrides_left, folders = list[str](), list[str]()
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name in FLAGS:
            folder = value if equals else next(waiting, None)
            if folder is None:
                raise ConfigError(f"{name} needs a folder: {FLAGS[0]} DIR.")
            folders.append(folder)
        elif equals and name.lstrip("+") == SEARCHPATH:
            folders += _searched(argument.lstrip("+"))
        else:
            overrides_left.append(argument)
    return overrides_left, folders


def _searched(override: str) -> list[str]:
    """The folders in hydra.searchpath=[...]."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        value = OverridesParser.create().parse_override(override).value()
    except Exception as error:
        raise as_config_error(error) from None
    folders = []
    for place in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
        if not isinstance(place, str):
            raise ConfigError(f"{override} is not allowed: it holds folders, {SEARCHPATH}=[DIR].")
        scheme, separator, rest = place.partition("://")
        if separator and scheme not in ("file", "pkg"):
            raise ConfigError(f"{SEARCHPATH}=[{place}] is not allowed: a place is DIR, file://DIR or pkg://PACKAGE.")
        if scheme == "pkg" and separator:
            places = folders_of_package(rest.replace("/", "."))
            if not places:
                raise ConfigError(f"{SEARCHPATH}=[{place}] is not allowed: there is no package {rest}.")
            folders.append(places[0])
        else:
            folders.append(rest if separator else place)
    return folders


def extend_path() -> None:
    """Make the modules beside the conf folders that the user names importable: they count after installed ones."""
    for folder in named_folders():
        if str(folder.parent) not in sys.path:
            sys.path.append(str(folder.parent))


# --- options ---------------------------------------------------------------------------------------------------------


def options() -> dict[str, list[str]]:
    """Configuration groups and the options in each, from the listing of all conf folders."""
    return {group: sorted(files) for group, files in option_files().items()}


def option_files() -> dict[str, dict[str, Path]]:
    """The YAML file of every option, by group and name.

    Raises ConfigError for two options of one name, and for a folder of one's own that is no group of options.
    """
    by_group = {folder.name: _yaml_files(folder) for folder in _folders_in(conf_folder())}
    for folder in own_folders():
        for place in (p for p in _folders_in(folder) if p.name.isidentifier()):
            files = [*_yaml_files(place).values()]
            if place.name not in by_group and files and place.name != "hydra":
                raise ConfigError(
                    f"{place} holds options of no group: the nearest are {nearest(place.name, by_group)}."
                )
            for file in files if place.name in by_group else ():
                other = by_group[place.name].setdefault(file.stem, file)
                if other != file:
                    raise ConfigError(
                        f"{place.name}={file.stem} is defined in two folders, {other.parent} and {file.parent}: "
                        "give one of the two files another name."
                    )
    return by_group


def _folders_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [folder / name for name in sorted(entry.name for entry in entries if entry.is_dir())]


def _yaml_files(folder: Path) -> dict[str, Path]:
    """By name. Listed again once the folder has changed: every composition of a configuration asks several times."""
    changed = os.stat(folder).st_mtime_ns
    settled = time.time_ns() - changed > 2e9  # a change right after another one may leave the folder's time as it is
    return dict(_listed(folder, changed) if settled else _listed.__wrapped__(folder, changed))


@lru_cache(256)
def _listed(folder: Path, changed: int) -> dict[str, Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): folder / name for name in names}


def option_file(group: str, name: str) -> Path:
    """The YAML file of an option, the package's own or the user's; of one that is not there, where it would lie."""
    shipped = conf_folder() / group / f"{name}.yaml"
    return option_files().get(group, {}).get(name) or shipped if own_folders() else shipped


def conf_stamps() -> tuple[tuple[str, int], ...]:
    """Every YAML file that a configuration may be composed from, and when it was last changed."""
    folders = [conf_folder(), *_folders_in(conf_folder())]
    files = [*(file for folder in folders for file in _yaml_files(folder).values()), *own_option_files()]
    return tuple((str(file), os.stat(file).st_mtime_ns) for file in files)


def own_option_files() -> list[Path]:
    """The YAML files of all options besides the package's own."""
    shipped = conf_folder()
    if not own_folders():
        return []
    return sorted(f for files in option_files().values() for f in files.values() if f.parent.parent != shipped)


def study_file(path: str | Path) -> Path:
    """The sweep or claims file that is meant: the file of this path, or where there is none the shipped one of this
    name, `smoke` or `albert_agpt`. Raises ConfigError for a name that is neither."""
    path = Path(path)
    if path.exists() or len(path.parts) != 1 or path.suffix:
        return path
    name = path.name
    file = sweeps_folder() / f"{SHIPPED_ALIASES.get(name, name)}.yaml"
    if not file.is_file():
        names = {f.stem for f in sweeps_folder().glob("*.yaml")} - set(SHIPPED_ALIASES.values()) | set(SHIPPED_ALIASES)
        raise ConfigError(f"{name} is not a file here, nor one that comes with the package: {nearest(name, names)}.")
    return file
