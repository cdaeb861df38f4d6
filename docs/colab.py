"""The tutorial as a notebook for Colab: `python docs/colab.py` writes docs/tutorial.ipynb from docs/tutorial.md."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
INSTALLED = {  # what a checkout says, and what an installed package says
    "pip install -e '.[plot]'": "%pip install 'albert_ablate[plot]'",
    "python run.py": "!albert-ablate run",
    "albert-ablate": "!albert-ablate",
}


def command(line: str) -> str:
    """A line of a terminal as a line of a cell."""
    for typed, there in INSTALLED.items():
        line = re.sub(rf"^{re.escape(typed)}", there, line)
    return line


def cells(text: str) -> list[dict]:
    """Markdown between the fences; commands as code; a YAML block as the file that its first line names."""
    found = []
    text = re.sub(r"^```text\n.*?^```\n", "", text, flags=re.M | re.S)  # what the cells print
    for i, part in enumerate(re.split(r"^```(?:\w*)\n(.*?)^```\n", text, flags=re.M | re.S)):
        part = part.strip()
        if not part:
            continue
        if i % 2 == 0:
            links = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", part)  # the pages are not beside a notebook
            found.append({"cell_type": "markdown", "metadata": {}, "source": links.splitlines(keepends=True)})
            continue
        if named := re.match(r"# (\S+\.yaml)\n", part):
            source = f"%%writefile {named[1]}\n{part[named.end() :]}"
        else:
            source = "\n".join(map(command, part.splitlines()))
        cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
        found.append({**cell, "source": source.splitlines(keepends=True)})
    return [{**cell, "id": f"cell-{i}"} for i, cell in enumerate(found)]


def notebook() -> str:
    """The notebook as its file holds it."""
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {
        "cells": cells((DOCS / "tutorial.md").read_text()),
        "metadata": kernel,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (DOCS / "tutorial.ipynb").write_text(notebook())
