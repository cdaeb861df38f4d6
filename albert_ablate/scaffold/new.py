"""`albert-ablate new`: a component of one's own, as one class or function, one YAML file and one test."""

import keyword
from collections.abc import Mapping
from pathlib import Path
from string import Template

from albert_ablate.config import ConfigError, folders_named, nearest, options
from albert_ablate.config.errors import unwritable
from albert_ablate.config.modules import module_file

TEMPLATES = Path(__file__).parent / "templates"
GROUPS = tuple(sorted(file.name.removesuffix(".yaml.txt") for file in TEMPLATES.glob("*.yaml.txt")))
TESTED = (
    "from albert_ablate.config import folders_named, target_of",
    "from albert_ablate.training.contracts import checks",
)


def component_files(group: str, name: str, folder: Path) -> dict[Path, str]:
    """The files of a new component, by path: its class or function, its YAML and its test.

    Raises ConfigError where there is no template for the group, or the name is taken or no name of a module.
    """
    if group not in GROUPS:
        raise ConfigError(f"{group} is not allowed here: new writes one of {nearest(group, GROUPS)}.")
    if not name.isidentifier() or not name.isascii() or name != name.lower() or keyword.iskeyword(name):
        raise ConfigError(f"{name} is not allowed as a name: small letters, digits and _, a letter first.")
    with folders_named([folder / "conf"] if (folder / "conf").is_dir() else []):
        if name in options()[group]:
            raise ConfigError(f"{group}={name} exists already: choose another name.")
    if module_file(name) or name in GROUPS:
        raise ConfigError(f"{name} is the name of an installed module, which Python would import: take another name.")
    words = {"group": group, "name": name, "Class": name.title().replace("_", "")}
    imports, _, formula = _read(f"{group}.test").rpartition("\n\ndef ")
    lines = sorted(
        [*filter(None, imports.splitlines()), *TESTED], key=lambda line: (line.split()[0] == "from", line.lower())
    )
    test = {"imports": "\n".join(lines) + "\n", "formula": f"def {formula.removeprefix('def ')}"}
    return {
        folder / f"{name}.py": Template(_read(f"{group}.py")).substitute(words),
        folder / "conf" / group / f"{name}.yaml": Template(_read(f"{group}.yaml")).substitute(words),
        folder / f"test_{name}.py": Template(Template(_read("test.py")).safe_substitute(test)).substitute(words),
    }


def _read(name: str) -> str:
    return (TEMPLATES / f"{name}.txt").read_text(encoding="utf-8")


def write_files(files: Mapping[Path, str]) -> None:
    """Write all of the files, or none where one is there already. Raises ConfigError."""
    if there := [path for path in files if path.exists()]:
        raise ConfigError(f"{there[0]} exists already: nothing was written.")
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise unwritable(path, error) from None
