"""The notebooks in analysis/: run on records that are made here, and stored as they should be."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from factories import SMALL

from albert_ablate import compose, run
from albert_ablate.analysis.registry import MEASURES
from albert_ablate.cli import main
from albert_ablate.config import ConfigError
from albert_ablate.judge.claims import read_claims
from albert_ablate.report import charts, study

pytest.importorskip("altair", reason="pip install 'albert_ablate[plot]'")
pytest.importorskip("vl_convert", reason="pip install 'albert_ablate[plot]'")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "analysis").glob("*.ipynb"))
NAMES = ["01_one_run", "02_convergence", "03_stability", "04_generalization", "05_verdicts"]
TINY = [*SMALL, "data=markov", "data.symbols=8",
        "data.length=20_000", "budget.tokens=3_000", "evaluation.every=750", "evaluation.tokens=256",
        "trainer.threads=1", "diagnostics.every=4"]  # fmt: skip
RATES = (0.01, 0.03)


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """Two arms at two learning rates, four seeds of one and one of the other, some evaluations, and a ledger."""
    root = tmp_path_factory.mktemp("records")
    small = ["evaluation=[clean,corruption,calibration]", "evaluation.corruption.tokens=256",
             "evaluation.corruption.rates=[0.0,0.3]", "evaluation.clean.tokens=256",
             "evaluation.calibration.tokens=256"]  # fmt: skip
    for norm in ("pre_ln", "post_ln"):
        for rate in RATES:
            more = small if rate == RATES[1] else []
            cfg = compose([*TINY, *more, f"norm={norm}", f"optimizer.lr={rate}", f"paths.runs={root}"])
            for seed in range(4 if rate == RATES[1] else 1):
                cfg.seed = seed
                run(cfg)
    claim = {
        "name": "pre_is_better", "statement": "Pre-norm is better.", "tuned": [], "screen": {"regime": "tiny", "N": 4},
        "parts": [{"treatment": "pre", "control": "post", "measure": "test_loss"}],
    }  # fmt: skip
    regime = {"text": "tiny", "overrides": [*TINY, f"optimizer.lr={RATES[1]}"]}
    arms = {"pre": ["norm=pre_ln"], "post": ["norm=post_ln"]}
    tree = {"arms": arms, "regimes": {"tiny": regime}, "claims": [claim]}
    (root / "claims.yaml").write_text(yaml.safe_dump(tree))
    assert main(["judge", str(root / "claims.yaml"), "--runs", str(root)]) == 0
    return root


def code_of(notebook):
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


def nbmake(records, *notebooks):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", *map(str, notebooks)]
    environment = os.environ | {study.FOLDER: str(records)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# --- running them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)
def test_a_notebook_runs_on_these_records_cell_by_cell(records, notebook, monkeypatch):
    monkeypatch.setenv(study.FOLDER, str(records))
    names, shown = {}, []
    for cell in code_of(notebook):
        tree = ast.parse(cell)
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, notebook.name, "exec"), names)
        if last is not None:
            shown.append(eval(compile(last, notebook.name, "eval"), names))
    pd.reset_option("display.max_colwidth")
    pictures = [v for v in shown if isinstance(v, charts.Drawn)]
    assert len(pictures) >= 3 and pictures[-1]._repr_png_().startswith(b"\x89PNG")
    assert not [v for v in shown if isinstance(v, str)]  # these records hold something for every chart
    assert all(len(v) for v in shown if isinstance(v, pd.DataFrame))


@pytest.mark.slow
@pytest.mark.process
def test_nbmake_runs_a_notebook(records):
    pytest.importorskip("nbmake", reason="pip install 'albert_ablate[test]'")
    made = nbmake(records, ROOT / "analysis" / "05_verdicts.ipynb")
    assert made.returncode == 0 and "1 passed" in made.stdout, made.stdout


@pytest.mark.process
@pytest.mark.slow
def test_nbmake_runs_every_notebook_and_sees_one_fail(records, tmp_path):
    pytest.importorskip("nbmake", reason="pip install 'albert_ablate[test]'")
    made = nbmake(records, *NOTEBOOKS)
    assert made.returncode == 0 and "5 passed" in made.stdout, made.stdout
    failed = nbmake(tmp_path, ROOT / "analysis" / "05_verdicts.ipynb")
    assert failed.returncode == 1 and "There is nothing to show" in failed.stdout


# --- as they are stored ----------------------------------------------------------------------------------------------


def test_the_five_notebooks_are_there():
    assert [f.stem for f in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)
def test_a_notebook_defines_nothing_and_is_prose_and_charts(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    banned = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.ListComp)
    for source in code_of(notebook):
        tree = ast.parse(source)
        assert not [n for n in ast.walk(tree) if isinstance(n, banned)], source
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.module in ("albert_ablate.analysis", "albert_ablate.report")
            if isinstance(node, ast.Import):
                assert [a.name for a in node.names] == ["pandas"]
    assert cells[0]["cell_type"] == "markdown" and sum(c["cell_type"] == "markdown" for c in cells) >= 4
    assert len(code_of(notebook)) <= 10


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)
def test_notebooks_are_stored_executed_without_machine_traces(notebook):
    text = notebook.read_text()
    assert len(text) < 300_000
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert all(c["outputs"] for c in cells)
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    for o in outputs:
        shown = json.dumps([v for k, v in o.get("data", {"text": o.get("text")}).items() if k != "image/png"])
        for trace in ("/home/", "/root", "/tmp", "/work", "/usr", "http://", "file:"):
            assert trace not in shown, shown[:300]


def test_the_stored_ledger_is_of_the_claims_of_the_project():
    names = [c.name for c in read_claims(ROOT / "sweeps" / "claims.yaml").claims]
    stored = (ROOT / "analysis" / "05_verdicts.ipynb").read_text()
    assert sum(name in stored for name in names) >= 2


# --- what they call --------------------------------------------------------------------------------------------------


def test_no_runs_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(study.FOLDER, str(tmp_path))
    with pytest.raises(ConfigError, match="holds no runs. Make some .* or set ALBERT_ABLATE_RUNS"):
        study.folder()
    monkeypatch.delenv(study.FOLDER)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="neither ../runs nor runs holds a run"):
        study.folder()
    (tmp_path / "runs" / "a" / "seed0").mkdir(parents=True)
    assert study.folder() == Path("runs")
    with pytest.raises(ConfigError, match="nothing to compare"):
        study.read_study(study.folder())


def test_an_arm_is_at_the_rate_of_most_seeds_and_has_a_grid(records):
    found = study.read_study(records)
    assert found.names == ["norm=post_ln", "norm=pre_ln"] and {len(v) for v in found.arms.values()} == {4}
    assert all(r.lr == RATES[1] for *_, r in found.runs()) and [*found.grids["norm=pre_ln"]] == [*RATES]
    rates = study.rates(found)
    assert len(rates) == 10 and set(rates["rate"]) == set(RATES)
    with pytest.raises(ConfigError, match="control=norm=none is unknown: the arms are norm=post_ln, norm=pre_ln"):
        study.compare(found, ["test_loss"], "norm=none")


def test_another_control_flips_every_difference_exactly(records):
    found = study.read_study(records)
    there, back = (study.differences(found, [*MEASURES], arm) for arm in found.names)
    pd.testing.assert_series_equal(there["measure"], back["measure"])
    np.testing.assert_array_equal(there["d"], -back["d"])
    run_alone = {n for n in MEASURES if MEASURES[n].evaluation in ("", "corruption", "calibration")}
    assert {*there["measure"]} == run_alone - {"macro_f1", "probe_macro_f1", "accuracy"}


def test_a_damaged_history_leaves_its_run_out_of_the_depths(records, tmp_path):
    shutil.copytree(records, tmp_path / "runs")
    whole = study.by_depth(study.read_study(tmp_path / "runs"), "grad_norm")
    file = sorted((tmp_path / "runs").glob("*/seed*/layers.arrow"))[0]
    file.write_bytes(file.read_bytes()[:-40])
    left = study.by_depth(study.read_study(tmp_path / "runs"), "grad_norm")
    assert left["run"].nunique() == whole["run"].nunique() - 1 > 0


def test_tables_agree_with_the_records(records):
    found = study.read_study(records)
    a, b = (found.arms[arm] for arm in found.names)
    d = study.differences(found, ["test_loss"]).set_index("seed")["d"]
    assert found.baseline == "norm=pre_ln"  # the default: norm=post_ln is the treatment
    assert d[3] == pytest.approx(np.log(b[3].summary_metric("test_loss") / a[3].summary_metric("test_loss")))
    row = study.compare(found, ["test_loss"]).iloc[0]
    assert row["mean"] == pytest.approx(d.mean()) and row["low"] < row["mean"] < row["high"]
    (verdict,) = study.judged(found, "test_loss", 0.005, N=4).values()
    assert verdict.parts[0].pairs == 4 and verdict.parts[0].mean == pytest.approx(d.mean())
    curve = study.curves(found)
    assert set(curve["tokens"]) == set(a[0].curve("validation")[0]) and (curve["low"] <= curve["mean"]).all()
    assert {*study.by_depth(found, "grad_norm")["when"]} == {"initialization", "end"}
    beside = study.beside(found, "test_loss")
    assert np.corrcoef(beside["control"], beside["value"])[0, 1] == pytest.approx(row["correlation"])
    assert beside[["control", "value"]].sum().abs().max() < 1e-12
    assert study.ledger(records)["name"].tolist() == ["pre_is_better"]


def test_diverged_runs_are_infinite_and_the_worst_values(records):
    found = study.read_study(records)
    pre = found.arms["norm=pre_ln"]
    lost = study.Study(records, found.arms | {"norm=pre_ln": pre | {0: Lost(pre[0])}}, found.grids)
    for name in ("test_loss", "speedup", "entropy_floor"):
        d = study.differences(lost, [name]).set_index("seed")["d"]
        assert d[0] == -np.inf and np.isfinite(d[1:]).all()
        assert study.differences(lost, [name], "norm=pre_ln").set_index("seed")["d"][0] == np.inf
    assert study.outcomes(lost).set_index("arm").loc["norm=pre_ln", ["diverged", "kinds"]].tolist() == [1, "1 stuck"]
    row = study.compare(lost, ["test_loss"]).iloc[0]
    assert (row["pairs"], row["finished"]) == (4, 3)
    assert len(study.ends(lost)) == 1 and len(study.beside(lost, "test_loss")) == 3


def test_one_seed_or_no_common_seed_gives_no_number(records):
    found = study.read_study(records)
    one, other = found.names
    apart = study.Study(records, {one: {0: found.arms[one][0]}, other: {1: found.arms[other][1]}}, found.grids)
    assert study.compare(apart, ["test_loss", "speedup"]).empty and study.beside(apart, "test_loss").empty
    assert [v.verdict for v in study.judged(apart, "test_loss", 0.005).values()] == ["open"]
    single = study.Study(records, {arm: {0: runs[0]} for arm, runs in found.arms.items()}, found.grids)
    row = study.compare(single, ["test_loss"]).iloc[0]
    assert row["pairs"] == 1 and np.isnan(row[["low", "high", "correlation"]].astype(float)).all()
    (verdict,) = study.judged(single, "test_loss", 0.005).values()
    assert verdict.verdict == "undecided" and study.look_table({"x": verdict}).empty
    chart = charts.drawn("one pair", charts.forest, study.forest_rows({"x": verdict}, 0.005))
    assert chart._repr_png_().startswith(b"\x89PNG")
    alone = study.Study(records, {one: found.arms[one]}, found.grids)
    with pytest.raises(ConfigError, match="needs two arms; there is only norm=post_ln"):
        study.compare(alone, ["test_loss"])
    with pytest.raises(ConfigError, match="measure=tst_loss is unknown"):
        study.values(found, ["tst_loss"])


class Lost:
    """A run as it is, but for its outcome."""

    diverged = True

    def __init__(self, run):
        self._run = run
        self.record = dict(run.record) | {
            "status": "diverged",
            "summary": dict(run.record["summary"]) | {"divergence": "stuck"},
        }

    def __getattr__(self, name):
        return getattr(self._run, name)


@pytest.mark.parametrize("arms", [1, 3])
def test_charts_are_drawn_from_little_and_infinite_values(arms):
    names = [f"arm{i}" for i in range(arms)]
    steps = pd.DataFrame({"arm": names, "pairs": 4, "statistic": 2.0, "boundary": [np.inf, *[6.0] * (arms - 1)]})
    depth = pd.DataFrame({"arm": names, "run": range(arms), "seed": 0, "block": 1, "when": "end", "value": 1.0})
    beside = pd.DataFrame({"arm": names, "seed": 0, "control": 2.0, "value": 2.0})
    for chart, table, more in ((charts.looks, steps, (names,)), (charts.by_depth, depth, (names, "norm")),
                               (charts.pairs, beside, (names, "none"))):  # fmt: skip
        assert charts.drawn("title", chart, table, *more)._repr_png_().startswith(b"\x89PNG")
        assert charts.drawn("title", chart, table.iloc[:0], *more) == "title: these runs have no data for it."
