"""Where the package's own options and studies lie: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

from albert_ablate.config.errors import ConfigError, nearest

STUDIES = {"albert_agpt": "claims"}  # names of shipped files that are called otherwise


def conf_folder() -> Path:
    """The folder of configuration groups."""
    return _shipped("conf")


def sweeps_folder() -> Path:
    """The folder of sweep files and of the article's claims."""
    return _shipped("sweeps")


def _shipped(name: str) -> Path:
    package = Path(__file__).parent.parent
    return next(p for p in (package / name, package.parent / name) if p.is_dir())


def study_file(path: str | Path) -> Path:
    """The sweep or claims file that is meant: the file of this path, or where there is none the shipped one of this
    name, `smoke` or `albert_agpt`. Raises ConfigError for a name that is neither."""
    path = Path(path)
    if path.exists() or len(path.parts) != 1 or path.suffix:
        return path
    name = path.name
    file = sweeps_folder() / f"{STUDIES.get(name, name)}.yaml"
    if not file.is_file():
        names = {f.stem for f in sweeps_folder().glob("*.yaml")} - set(STUDIES.values()) | set(STUDIES)
        raise ConfigError(f"{name} is not a file here, nor one that comes with the package: {nearest(name, names)}.")
    return file
