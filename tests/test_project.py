"""The project's own rules: layers, what imports torch, the README, the picture."""

import ast
import subprocess
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO

from albert_ablate import run
from albert_ablate.config import checked_config, options

ROOT = Path(__file__).parent.parent
SECRET = "a-key-of-the-environment-0123456789"
LAYERS = [
    {"streams", "collector"},
    {"config"},
    {"records"},
    {"trackers", "data", "stats"},
    {"model", "optim"},
    {"evaluations"},
    {"training", "analysis"},
    {"judge", "scaffold"},
    {"report"},
    {"studies"},
    {"referee"},
    {"ui"},
    {"cli"},
]
FILES = sorted(
    f
    for f in (ROOT / "albert_ablate").rglob("*.py")
    if f.parent.name != "albert_ablate" or f.stem in ("cli", "streams", "collector")
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(tree):
    """Modules of the package that a module imports anywhere, also inside its functions: (module, at the top level)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "albert_ablate":
            modules = [node.module] if "." in node.module else [f"{node.module}.{a.name}" for a in node.names]
            yield from ((m.split(".")[1], node in tree.body) for m in modules)


@pytest.mark.parametrize("file", FILES, ids=lambda f: ".".join(f.relative_to(ROOT / "albert_ablate").parts))
def test_imports_go_to_lower_layers_only(file):
    parts = file.relative_to(ROOT / "albert_ablate").with_suffix("").parts
    for other, _ in imported(ast.parse(file.read_text())):
        if other in RANK:
            assert other == parts[0] or RANK[other] < RANK[parts[0]], other


@pytest.mark.process
def test_records_and_reports_are_read_without_torch():
    rooms = ("config", "records", "trackers", "stats", "analysis", "report", "ui")
    modules = [f"albert_ablate.{'.'.join(f.relative_to(ROOT / 'albert_ablate').with_suffix('').parts)}" for f in FILES]
    modules = [m for m in modules if m.split(".")[1] in rooms]
    code = "import sys; sys.modules['torch'] = None\n" + "\n".join(f"import {m}" for m in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_docs_name_every_option_on_disk():
    page = (ROOT / "docs" / "options.md").read_text()
    missing = [f"{group}={name}" for group, names in options().items() for name in names if f"`{name}`" not in page]
    assert set(missing) <= {"evaluation=standard", "loss=cross_entropy"}, missing


def public(tree):
    """Public functions and classes of a module, without the methods."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


@pytest.mark.parametrize("package", sorted({f.relative_to(ROOT / "albert_ablate").parts[0] for f in FILES}))
def test_public_functions_and_classes_have_docstrings(package):
    files = [f for f in FILES if f.relative_to(ROOT / "albert_ablate").parts[0] == package]
    lacking = [
        f"{f.relative_to(ROOT)}:{node.lineno} {node.name}"
        for f in files
        for node in public(ast.parse(f.read_text()))
        if not (ast.get_docstring(node) or "").strip()
    ]
    assert not lacking


# whose methods an own class may override without saying again what they do
LIBRARY_CLASSES = {
    c.__name__: c
    for c in (
        torch.nn.Module,
        torch.nn.BatchNorm1d,
        torch.nn.Linear,
        torch.optim.Optimizer,
        pl.LightningModule,
        pl.LightningDataModule,
        pl.Callback,
        LightningEnvironment,
        TorchCheckpointIO,
    )  # fmt: skip
}


def overrides(node, name, classes):
    """Whether a class inherits a method or attribute of this name; `classes` are those of the package by name."""
    for base in (ast.unparse(b).partition("[")[0].rpartition(".")[2] for b in node.bases):
        named = [c for c in classes.get(base, ()) if c is not node]
        if hasattr(LIBRARY_CLASSES.get(base), name) or any(
            name in defined(c) or overrides(c, name, classes) for c in named
        ):
            return True
    return False


def defined(node):
    """Names of the methods and annotated attributes of a class."""
    return {getattr(n, "name", None) or getattr(getattr(n, "target", None), "id", None) for n in node.body}


def test_public_methods_have_docstrings():
    """Methods and properties of public classes, but those that override one."""
    trees = {f: ast.parse(f.read_text()) for f in FILES}
    classes = {}
    for node in (n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        classes.setdefault(node.name, []).append(node)
    lacking = [
        f"{f.relative_to(ROOT)}:{method.lineno} {node.name}.{method.name}"
        for f, tree in trees.items()
        for node in public(tree)
        if isinstance(node, ast.ClassDef)
        for method in public(node)
        if not (ast.get_docstring(method) or "").strip()
        and not any(ast.unparse(d).endswith(".setter") for d in method.decorator_list)
        and not overrides(node, method.name, classes)
    ]
    assert not lacking


def test_names_of_tests_are_at_most_sixty_characters():
    trees = [ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py")]
    names = [n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert len(names) > 1000 and not [name for name in names if name.startswith("test") and len(name) > 60]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run on a language whose entropy rate is known."""
    runs = tmp_path_factory.mktemp("runs")
    tiny = ["model=nano", "model.layers=2", "model.width=32", "data=markov", "data.symbols=8", "data.length=60_000"]
    tiny += ["optimizer.lr=1e-2", "budget.tokens=150_000", "evaluation.every=30_000", "trainer.threads=1"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SOME_API_KEY", SECRET)
        return run(checked_config([*tiny, f"paths.runs={runs}"]))


def test_a_small_model_comes_near_the_entropy_rate(finished):
    summary = finished["summary"]
    assert finished["status"] == "finished"
    assert summary["excess_loss"] == pytest.approx(summary["val_loss"] - finished["data"]["entropy_rate"])
    assert -0.02 < summary["excess_loss"] < 0.1
    assert summary["initial_loss"] > 5 and summary["unigram_loss"] > finished["data"]["entropy_rate"] + 0.1


@pytest.mark.parametrize("kind", ["html", pytest.param("png", marks=pytest.mark.slow)])  # as tests/report draws them
def test_a_run_can_be_drawn(finished, tmp_path, kind):
    pytest.importorskip("vl_convert")
    from albert_ablate.report.show import draw

    target = tmp_path / f"run.{kind}"
    draw(Path(finished["folder"]), target)
    assert target.stat().st_size > 5_000 and (kind == "html" or target.read_bytes().startswith(b"\x89PNG"))


def test_the_run_folder_says_nothing_of_the_environment(finished):
    files = [f for f in Path(finished["folder"]).rglob("*") if f.is_file()]
    assert len(files) >= 7 and not any(SECRET.encode() in f.read_bytes() for f in files)


def test_citation_names_this_version_and_licence():
    """By the schema of the Citation File Format 1.2.0: its required keys, and none that it does not know."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {
        "abstract",
        "authors",
        "cff-version",
        "commit",
        "contact",
        "date-released",
        "doi",
        "identifiers",
        "keywords",
    }
    known |= {"license", "license-url", "message", "preferred-citation", "references", "repository", "title", "type"}
    assert {"authors", "cff-version", "message", "title"} <= set(cited) <= known | {"url", "version"}
    assert cited["cff-version"] == "1.2.0" and cited["type"] in ("software", "dataset")
    assert all(set(author) & {"name", "family-names"} for author in cited["authors"])
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert len(set(cited["keywords"])) == len(cited["keywords"])


def test_facts_at_the_top_of_the_readme_are_true():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    facts = f"Python {project['requires-python'].removeprefix('>=')} or newer · {project['license']} · typed"
    assert facts in (ROOT / "README.md").read_text().split("##")[0]
    assert "Apache License" in (ROOT / "LICENSE").read_text() and (ROOT / "albert_ablate" / "py.typed").exists()


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem)
def test_issue_templates_are_forms(file):
    form = yaml.safe_load(file.read_text())
    assert {"name", "description", "body"} <= set(form)
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown"), field
        assert field["attributes"]["label"] and set(field) <= {"type", "id", "attributes", "validations"}, field


def test_the_diagram_of_packages_is_what_they_import():
    spec = spec_from_file_location("packages", ROOT / "docs" / "packages.py")
    packages = module_from_spec(spec)
    spec.loader.exec_module(packages)
    assert packages.diagram() in packages.PAGE.read_text(), "run `make diagram`"
