"""`albert-ablate init`: a small working folder, all of which runs as it is written."""

from pathlib import Path

from albert_ablate.scaffold.new import component_files

FILES = Path(__file__).parent / "folder"
COMPONENT = "norm", "half_branch"


def folder_files(folder: Path) -> dict[Path, str]:
    """The files of a working folder, by path: a component with its test, a sweep, claims, a notebook, what they are."""
    files = component_files(*COMPONENT, folder)
    for file in sorted(FILES.glob("*.txt")):
        files[folder / file.name.removesuffix(".txt")] = file.read_text(encoding="utf-8")
    return files
