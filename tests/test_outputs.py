"""Outputs that README and docs show are what the commands above them print; docs/outputs.py writes them anew."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import outputs  # noqa: E402

CHEAP = re.compile(
    r"albert-ablate (measures|methods|\S+ --help|--help|--version)\b"
)  # load no torch, half a second each


def commands(page):
    lines = [line for block, *_ in outputs.shown(page.read_text()) for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


PAGES = [page for page in outputs.PAGES if commands(page)]
CHEAP_PAGES = [page for page in PAGES if all(map(CHEAP.match, commands(page)))]


def check(page):
    text = page.read_text()
    for now, shown, start, _ in outputs.printed(text):
        found = outputs.differences(now, shown)
        line = text[:start].count("\n") + 1
        assert not found, f"{page.name}:{line}: python docs/outputs.py {page.relative_to(ROOT)}\n" + "\n".join(found)


@pytest.mark.process
@pytest.mark.parametrize("page", CHEAP_PAGES, ids=lambda p: p.name)
def test_outputs_that_train_nothing_are_those_of_a_run(page):
    check(page)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("page", [p for p in PAGES if p not in CHEAP_PAGES], ids=lambda p: p.name)
def test_outputs_of_a_page_are_those_of_its_run(page):
    check(page)


def test_an_output_differs_where_a_line_does():
    page = "loss 2.9724 after 1 min 40 s\n5 runs, 4,972 tokens/s\n"
    assert not outputs.differences("5 runs, 12 tokens/s\nloss 2.9724 after 40.3 s\n", page)
    assert outputs.differences("loss 2.9725 after 40.3 s\n5 runs, 12 tokens/s\n", page) == [
        "- loss 2.9724 after TIME",
        "+ loss 2.9725 after TIME",
    ]
    assert outputs.differences("loss 2.9725, 3 s\n", "loss 2.9724, 3 s\n")
    table = "  screen  68  26  {}\n    expected: 49 / 44 runs, {} / {} hours at {} FLOPs/s\n"
    assert not outputs.differences(table.format("0.8", "0.59", "0.58", "2.1e+08"), table.format("?", 1, 2, "9e+09"))
    assert outputs.differences(page + "one more\n", page) == ["+ one more"]


def test_lines_that_are_not_shown_stand_as_dots():
    page = "first\n...\nlast 1.0\n"
    assert not outputs.differences("first\nmiddle\nlast 1.0\n", page)
    assert outputs.differences("first\nmiddle\nlast 1.5\n", page) == ["- last 1.0"]
    assert outputs.written("first\nmiddle\nmore\nlast 1.5\n", page) == "first\n...\nlast 1.5\n"
    assert outputs.written("a 1\nb 2\nc 3\nd 4\n", "...\nc 0\n...\nd 0\n") == "...\nc 3\n...\nd 4\n"


def test_commands_of_a_page_run_from_top_to_bottom():
    page = """
```
mkdir folder  # not a command that documentation shows
cd folder
```

```text
```

```yaml
# mine.yaml
arms: {}
```

```
cat mine.yaml
pwd
python -c "print('done')"
```

Words between a command and its output.

```text
arms: {}
```
"""
    (first, _, _, _), (second, shown, start, end) = outputs.printed(page)
    assert first == "" and second.splitlines()[0] == "arms: {}" and second.splitlines()[-1] == "done"
    assert page[start:end] == shown == "arms: {}\n"
