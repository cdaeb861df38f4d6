"""One table layer: report, show and the notebooks print the same numbers of the same runs."""

import json

import numpy as np
import pandas as pd
import pytest
from test_report import make_run

from albert_ablate.analysis import registry, report, show, study, tables
from albert_ablate.analysis.load import Runs
from albert_ablate.analysis.registry import Evidence


def spiky_run(root, steps):
    """A run with a training loss that is noise of size 1e-3 but for one step, two thirds in."""
    folder = make_run(root, {"norm": "a"}, steps=steps, full=False)
    record = json.loads((folder / "record.json").read_text())
    run = show.read_run(folder)
    loss = 2 + 1e-3 * np.random.default_rng(0).normal(size=steps)
    loss[2 * steps // 3] = 3.0
    return folder, record, run, loss


@pytest.mark.parametrize("steps", [60, 300, 3000])
def test_a_spike_that_is_scored_is_drawn(tmp_path, monkeypatch, steps):
    folder, record, run, loss = spiky_run(tmp_path, steps)
    evidence = Evidence(folder, record)
    monkeypatch.setattr(Evidence, "column", lambda self, history, name: loss)
    marks, window = show.spike_marks(run.steps.assign(loss=loss))
    drawn = (marks["what"] == "loss spike").sum()
    assert window == max(20, steps // 10)  # a tenth of the run, as the measure's description says
    one = {"arm": "a", "setting": "a", "seed": 0, "step": range(steps), "loss": loss, "grad_norm": 1.0}
    monkeypatch.setattr(Runs, "history", lambda self, name, columns: pd.DataFrame(one))
    table = Runs(pd.DataFrame()).spikes().iloc[0]
    assert table["loss"] == registry.spike_score(evidence)
    assert drawn == 1 and registry.spike_score(evidence) == pytest.approx(drawn / (steps - window))


def record_of(folder, **summary):
    """The run as the notebooks want it: with a budget and a test loss."""
    file = folder / "record.json"
    record = json.loads(file.read_text()) | {"budget": {"tokens": 1000}, "data": {"fingerprint": "x"}}
    record["summary"] |= summary
    file.write_text(json.dumps(record))


def two_arms(root, seeds, gaps):
    for norm in ("pre_ln", "post_ln"):
        for seed in range(seeds):
            record_of(make_run(root, {"norm": norm}, seed, full=False), gap=gaps[seed])


def test_two_seeds_have_the_t_interval_in_report_and_notebook(tmp_path):
    """Of 1.0 and 1.2: mean 1.1, s = sqrt(0.02), t(0.975, 1) = 12.7062, so +- 12.7062 * s / sqrt(2) = 1.27062."""
    two_arms(tmp_path, 2, [1.0, 1.2])
    m = report.gather(tmp_path, None)
    values = m.finished[["name", "seed", "gap"]].set_axis(["arm", "seed", "value"], axis=1)
    ours = tables.means(values, m.arms)
    notebook = study.means(study.values(study.read_study(tmp_path), ["gap"]))
    pd.testing.assert_frame_equal(ours, notebook)
    assert ours[["mean", "low", "high"]].to_numpy() == pytest.approx(np.array([[1.1, -0.17062, 2.37062]] * 2), abs=1e-5)
    figure = next(f for f in report.generalization_section(m).figures if f.title.startswith("Gap"))
    drawn = [layer.data for layer in figure.chart.layer if "low" in getattr(layer, "data", ())]
    pd.testing.assert_frame_equal(drawn[0].reset_index(drop=True), ours)


def test_a_mean_curve_is_the_same_in_report_and_notebook(tmp_path):
    """One seed of three has an evaluation of its own at step 150: the mean does not jump to it."""
    for seed in range(3):
        record_of(make_run(tmp_path, {"norm": "pre_ln"}, seed, steps=300, full=False), test_loss=2.0)
    record_of(make_run(tmp_path, {"norm": "pre_ln"}, 3, steps=290, full=False), test_loss=2.0)
    m = report.gather(tmp_path, None)
    figure = report.curves_section(m).figures[0]
    theirs = study.curves(study.read_study(tmp_path))
    keys = ["seed", "tokens"]
    mine = next(layer.data for layer in figure.chart.layer if "run" in getattr(layer, "data", ()))
    mine, theirs = (t.sort_values(keys)[[*keys, "loss", "mean", "low", "high"]].reset_index(drop=True)
                    for t in (mine, theirs))  # fmt: skip
    pd.testing.assert_frame_equal(mine, theirs, check_dtype=False)
    lone = theirs[theirs["seed"] == 3]  # evaluated at 58, 116, ... steps: nobody else was
    assert lone["mean"].isna().sum() >= 4 and np.isfinite(theirs.loc[theirs["seed"] == 0, "mean"]).all()
