"""Parallel coordinates of random and bayes sweeps."""

import numpy as np
import pandas as pd
import pytest
from factories import edit_record, make_run

from albert_ablate.report import charts, report
from albert_ablate.report.charts_search import parallel_coordinates, placed

pytest.importorskip("altair", reason="pip install 'albert_ablate[plot]'")


def test_values_stand_by_size_and_names_at_equal_distances():
    at, ticks = placed(pd.Series([1.0, 2.0, 5.0]))
    assert at.tolist() == [0, 0.25, 1] and ticks["text"].tolist() == ["1", "2.33", "3.67", "5"]
    at, ticks = placed(pd.Series([1e-4, 1e-3, 1e-1]))  # three powers of ten: logarithmic
    assert at.tolist() == pytest.approx([0, 1 / 3, 1]) and ticks["text"].tolist() == ["0.0001", "0.001", "0.01", "0.1"]
    assert placed(pd.Series([1.0, 51.0, 101.0]))[0].tolist() == [0, 0.5, 1]  # evenly: not logarithmic
    at, ticks = placed(pd.Series(["b", "a", "c", "a"]))
    assert at.tolist() == [0.5, 0, 1, 0] and ticks["text"].tolist() == ["a", "b", "c"]
    assert placed(pd.Series([3.0, 3.0]))[0].tolist() == [0.5, 0.5]
    assert placed(pd.Series([True, False]))[1]["text"].tolist() == ["False", "True"]


def test_the_best_line_is_drawn_last_and_ends_at_its_loss():
    settings = pd.DataFrame({"lr": [1.0, 2.0], "norm": ["a", "b"]}, index=["x", "y"])
    chart = parallel_coordinates(settings, pd.Series({"x": 2.0, "y": 3.0}), "loss")
    _, frames = charts.specification(chart)
    lines = next(f for f in frames.values() if "order" in f)
    assert lines["arm"].tolist() == ["y"] * 3 + ["x"] * 3 and lines["axis"].tolist() == ["lr", "norm", "loss"] * 2
    assert lines["at"].tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("grid", [False, True])
def test_a_search_is_drawn_and_a_grid_is_not(tmp_path, grid, monkeypatch):
    assert report.search_section in report.SECTIONS
    monkeypatch.setattr(report, "SECTIONS", (report.search_section, report.methods_section))
    rng = np.random.default_rng(0)
    for i in range(20):
        lr, size = (1e-3 * (1 + i % 5), 1 + i // 5) if grid else (float(10 ** rng.uniform(-4, -1)), rng.uniform(0, 1))
        folder = make_run(tmp_path, {"norm": "pre_ln"}, steps=20, full=False, lr=lr + 1e-9 * i)
        edit_record(folder, config__optimizer__lr=lr, config__optimizer__weight_decay=size)
    titles = [section.title for section in report.make(tmp_path).sections]
    assert ("Search" in titles) == (not grid)
