"""Names of settings from plain rows, as a table of them would be named, and what judge and status do not load."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from factories import make_run

from albert_ablate.analysis.setting_names import setting_names
from albert_ablate.analysis.tables import settings_and_names

ROOT = Path(__file__).parents[2]


def rows_of(*settings, **common):
    return [{**common, **s, "setting": f"{i:012x}", "label": "run"} for i, s in enumerate(settings)]


@pytest.mark.parametrize(
    ("settings", "columns", "names"),
    [
        ([{"norm": "pre_ln"}, {"norm": "rezero"}], ["norm"], ["norm=pre_ln", "norm=rezero"]),
        ([{"norm": "a"}, {"norm": "a"}], [], ["run", "run (000000)"]),
        ([{"model.layers": 12}, {"model.layers": 24}], ["model.layers"], ["model.layers=12", "model.layers=24"]),
        ([{"model.layers": 12000}, {}], ["model.layers"], ["model.layers=12000", "model.layers=nan"]),
        ([{"model.layers": 12000}, {"model.layers": 1}], ["model.layers"], ["model.layers=1", "model.layers=12,000"]),
        ([{"data.size": None}, {"data.size": 5}], ["data.size"], ["data.size=5", "data.size=nan"]),
        ([{"data.path": None}, {"data.path": "x"}], ["data.path"], ["data.path=nan", "data.path=x"]),
        (
            [{"optimizer.lr": 0.1, "norm.x": 1}, {"optimizer.lr": 1e-5, "norm.x": 1}, {"norm.x": True}],
            ["norm.x", "optimizer.lr"],
            ["norm.x=1 optimizer.lr=0.1", "norm.x=1 optimizer.lr=1e-05", "norm.x=yes"],
        ),
        ([{"logger": "a", "other.x": 1}, {"logger": "b", "other.x": 2}], [], ["run", "run (000000)"]),
    ],
)
def test_names_are_those_of_a_table_of_the_same_rows(settings, columns, names):
    rows = rows_of(*settings, model="nano")
    found, named = setting_names(rows)
    assert (found, list(named.values())) == (columns, names)
    table, also_named = settings_and_names(pd.DataFrame(rows))
    assert (list(table.columns), also_named, list(table.index)) == (columns, named, list(named))


def test_the_first_row_of_a_setting_counts():
    rows = rows_of({"norm": "a"}, {"norm": "b"})
    assert setting_names([*rows, {**rows[0], "norm": "c"}]) == setting_names(rows)


@pytest.mark.process
def test_status_and_figures_of_the_judge_load_no_pandas(tmp_path):
    folder = make_run(tmp_path, {"norm": "a"}, steps=40)
    script = f"""
import json, sys
from pathlib import Path
from albert_ablate.analysis.registry import Evidence
from albert_ablate.cli import main
from albert_ablate.records.store import read
from albert_ablate.stats import effects, learning_rate, online, sequential
import albert_ablate.studies.judge_run
main(["status", {str(tmp_path)!r}])
folder = Path({str(folder)!r})
print(len(Evidence(folder, read(folder)).curve("validation")[0]))
x = [1.0, 2.0, 4.0, 3.0, float("inf")]
effects.correlation(x, [5.0, 1.0, 2.0, 4.0, 0.0]), effects.rate_interval(1, 5), effects.interquartile_mean(x)
sequential.p_effect(x), learning_rate.spread(x[:4]), online.pairs_for(0.05), online.signed_ranks(x)
print(sorted({{"torch", "pandas", "scipy.stats"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-2:] == ["6", "[]"]


def test_what_a_table_lacks_is_named_as_what_rows_lack():
    rows = rows_of({"model.layers": 1, "norm": "a"}, {"norm": "b"}, {"model.layers": 2.5, "norm": "b"})
    assert setting_names(pd.DataFrame(rows).to_dict("records")) == setting_names(rows)
