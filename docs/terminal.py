"""The terminal picture of docs/referee.md: a real run of `compare` from nothing, with what it prints on a terminal.

python docs/terminal.py docs/compare.svg
"""

import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console

from albert_ablate.referee.compare import Question, Work, compare
from albert_ablate.referee.display import Terminal

SIDES, COMMON = ("norm=pre_ln", "norm=rezero"), "model=nano budget.tokens=50_000"
WIDTH = 116
# without fonts from the network
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace("Fira Code, ", "")


def main(target: Path) -> None:
    console = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True, highlight=False)
    console.print(f'$ albert-ablate compare "{SIDES[0]}" "{SIDES[1]}" --common "{COMMON}"')
    with tempfile.TemporaryDirectory() as folder, Terminal(console, live=False) as terminal:
        question = Question(SIDES, common=tuple(COMMON.split()))
        answer = compare(question, Work(Path(folder), terminal.say, terminal.watch, workers=2))
        answer.folder = answer.folder.replace(f"{folder}/", "runs/")
        answer.show(terminal.say)
    target.write_text(console.export_svg(title="albert-ablate compare", code_format=FORMAT))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
