"""The manual as a site: it builds without a warning, and holds what it is made from."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from albert_ablate.analysis.registry import MEASURES
from albert_ablate.config import options

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.process
def test_the_site_has_a_heading_for_every_option(site):
    for group, names in options().items():
        page = (site / "reference" / group / "index.html").read_text()
        assert {name for name in names if f'<h2 id="{name}"' not in page} == set()


@pytest.mark.process
def test_the_site_has_every_measure_and_command(site):
    measures = (site / "every_measure" / "index.html").read_text()
    assert {m for m in MEASURES if f"<code>{m}</code>" not in measures} == set()
    commands = re.findall(r'<h2 id="(\w+)"', (site / "commands" / "index.html").read_text())
    assert {"run", "sweep", "judge", "compare", "gate"} <= set(commands)


@pytest.mark.process
def test_the_site_fetches_nothing_from_other_hosts(site):
    for page in site.rglob("*.html"):
        found = re.findall(r'<(?:script|img|iframe|source)[^>]+src="(https?:[^"]+)"', page.read_text())
        found += re.findall(r'<link rel="stylesheet"[^>]+href="(https?:[^"]+)"', page.read_text())
        assert not found, page


def test_the_notebook_is_the_tutorial(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import colab

    assert (ROOT / "docs" / "tutorial.ipynb").read_text() == colab.notebook(), "python docs/colab.py"
    import nbformat

    nbformat.validate(nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4))
