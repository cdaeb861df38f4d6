"""The manual as a site: it builds without a warning, and holds what it is made from."""

import ast
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from albert_ablate.analysis.registry import MEASURES
from albert_ablate.config import options
from albert_ablate.records.history import SCHEMAS

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


@pytest.mark.process
def test_links_within_the_site_lead_to_pages_and_headings(site):
    pages = {
        page.parent.resolve() if page.name == "index.html" else page.resolve(): page for page in site.rglob("*.html")
    }
    anchors = {place: set(re.findall(r'\bid="([^"]+)"', page.read_text())) for place, page in pages.items()}
    for place, page in pages.items():
        if page.name == "404.html":  # served from any address, its links begin at the site's root
            continue
        for link in map(html.unescape, re.findall(r'<a[^>]+href="([^"]+)"', page.read_text())):
            path, _, anchor = link.partition("#")
            if "://" in path or path.startswith(("mailto:", "data:")):
                continue
            target = (page.parent / path).resolve() if path else place
            target = target.parent if target.name == "index.html" else target
            assert target in pages or target.is_file(), f"{page.relative_to(site)}: {link}"
            assert not anchor or anchor == "__top" or anchor in anchors.get(target, {anchor}), f"{page}: {link}"


def test_the_picture_of_compare_is_the_run_of_the_tutorial():
    svg = html.unescape(re.sub(r"<[^>]*>", "", (ROOT / "docs" / "compare.svg").read_text()))
    command = 'albert-ablate compare norm=pre_ln norm=rezero --common "model=nano budget.tokens=50_000"\n```\n'
    shown = (ROOT / "docs" / "tutorial.md").read_text().split(command)[1].split("```")[1]
    sentence = shown.splitlines()[-1].split()
    assert "".join(sentence) in "".join(svg.split())


def test_errors_of_the_manual_are_in_the_source():
    source = "".join(path.read_text() for path in (ROOT / "albert_ablate").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # sentences that go over several lines
    page = (ROOT / "docs" / "errors.md").read_text()
    for sentence in re.findall(r"^\*\*(.*?)\.\*\*", page.split("## Frequent sentences")[1], re.M):
        fixed = [part.strip(" :.") for part in re.split(r"\b[A-Z]+\b|[`=(),]", sentence)]  # without what is filled in
        assert [part for part in fixed if len(part.split()) > 2 and part not in source] == [], sentence


def headings_of_charts():
    """What is fixed of each heading of a chart in the package's reports, without its unit."""
    for path in (ROOT / "albert_ablate" / "report").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Figure" and node.args:
                fixed = [
                    n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                yield from (text.split(" (")[0].strip(" :,") for text in fixed if len(text.split()) > 1)


def test_the_report_page_names_every_chart():
    page = " ".join((ROOT / "docs" / "report.md").read_text().lower().split())
    headings = set(headings_of_charts())
    assert len(headings) > 12 and {heading for heading in headings if heading.lower() not in page} == set()


def test_verdicts_of_the_manual_are_all():
    schema = json.loads((ROOT / "albert_ablate" / "schemas" / "ledger.schema.json").read_text())
    verdicts = set(re.findall(r'"verdict": \{"enum": \[(.*?)\]', json.dumps(schema))[0].replace('"', "").split(", "))
    page = (ROOT / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| ([a-z ]+?)(?::[a-z ]+)? \|", page.split("## What verdicts say")[1], re.M)
    assert set(rows) - {"verdict"} == verdicts


def test_the_run_folder_page_has_every_column():
    page = (ROOT / "docs" / "run_folder.md").read_text()
    for name, schema in SCHEMAS.items():
        section = page.split(f"### `{name}.arrow`")[1].split("\n## ")[0].split("\n### ")[0]
        cells = "".join(re.findall(r"^\| (.*?) \|", section, re.M))
        assert [column for column in schema.names if f"`{column}`" not in cells] == [], name


def test_the_notebook_is_the_tutorial(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import colab

    assert (ROOT / "docs" / "tutorial.ipynb").read_text() == colab.notebook(), "python docs/colab.py"
    import nbformat

    nbformat.validate(nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4))
