"""One table layer: report, show and the notebooks print the same numbers of the same runs."""

import json

import numpy as np
import pandas as pd
import pytest
from factories import edit_record, make_run
from scipy.stats import ttest_rel

from albert_ablate.analysis import registry, tables
from albert_ablate.analysis.load import Runs
from albert_ablate.analysis.registry import Evidence
from albert_ablate.cli import main
from albert_ablate.judge import admission
from albert_ablate.report import charts, show, study
from albert_ablate.report.material import gather
from albert_ablate.report.sections.curves import curves_section
from albert_ablate.report.sections.factors import factorial_section
from albert_ablate.report.sections.generalization import generalization_section
from albert_ablate.report.sections.leaderboard import leaderboard, leaderboard_section
from albert_ablate.report.sections.ledger import boundaries
from albert_ablate.report.sections.pairs import pairs_section
from albert_ablate.stats import sequential as statistics


@pytest.fixture(autouse=True)
def hand_written_records_are_evidence(monkeypatch):
    """Their identity is not that of their settings, which is what the judge asks first."""
    monkeypatch.setattr(admission, "refusal", lambda folder, record: None)


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
    figures = {f"summary__{name}": value for name, value in summary.items()}
    edit_record(folder, budget={"tokens": 1000}, data={"fingerprint": "x"}, **figures)


def two_arms(root, seeds, gaps):
    for norm in ("pre_ln", "post_ln"):
        for seed in range(seeds):
            record_of(make_run(root, {"norm": norm}, seed, full=False), gap=gaps[seed])


def test_two_seeds_have_the_t_interval_in_report_and_notebook(tmp_path):
    """Of 1.0 and 1.2: mean 1.1, s = sqrt(0.02), t(0.975, 1) = 12.7062, so +- 12.7062 * s / sqrt(2) = 1.27062."""
    two_arms(tmp_path, 2, [1.0, 1.2])
    m = gather(tmp_path, None)
    values = m.finished[["name", "seed", "gap"]].set_axis(["arm", "seed", "value"], axis=1)
    ours = tables.means(values, m.arms)
    notebook = study.means(study.values(study.read_study(tmp_path), ["gap"]))
    pd.testing.assert_frame_equal(ours, notebook)
    assert ours[["mean", "low", "high"]].to_numpy() == pytest.approx(np.array([[1.1, -0.17062, 2.37062]] * 2), abs=1e-5)
    figure = next(f for f in generalization_section(m).figures if f.title.startswith("Gap"))
    drawn = [layer.data for layer in figure.chart.layer if "low" in getattr(layer, "data", ())]
    pd.testing.assert_frame_equal(drawn[0].reset_index(drop=True), ours)


def test_a_mean_curve_is_the_same_in_report_and_notebook(tmp_path):
    """One seed of three has an evaluation of its own at step 150: the mean does not jump to it."""
    for seed in range(3):
        record_of(make_run(tmp_path, {"norm": "pre_ln"}, seed, steps=300, full=False), test_loss=2.0)
    record_of(make_run(tmp_path, {"norm": "pre_ln"}, 3, steps=290, full=False), test_loss=2.0)
    m = gather(tmp_path, None)
    figure = curves_section(m).figures[0]
    theirs = study.curves(study.read_study(tmp_path))
    keys = ["seed", "tokens"]
    mine = next(layer.data for layer in figure.chart.layer if "run" in getattr(layer, "data", ()))
    mine, theirs = (t.sort_values(keys)[[*keys, "loss", "mean", "low", "high"]].reset_index(drop=True)
                    for t in (mine, theirs))  # fmt: skip
    pd.testing.assert_frame_equal(mine, theirs, check_dtype=False)
    lone = theirs[theirs["seed"] == 3]  # evaluated at 58, 116, ... steps: nobody else was
    assert lone["mean"].isna().sum() >= 4 and np.isfinite(theirs.loc[theirs["seed"] == 0, "mean"]).all()


# --- pairs and baselines ---------------------------------------------------------------------------------------------


def four_seeds(root):
    """pre_ln has test losses of 2.0, 2.1, 2.2, 2.3, post_ln of 1 % more and a little; the last of post_ln diverged."""
    for norm, factor in (("pre_ln", 1.0), ("post_ln", 1.01)):
        for seed in range(4):
            lost = 200 if (norm, seed) == ("post_ln", 3) else None
            folder = make_run(root, {"norm": norm}, seed, level=2 * factor, lost=lost, full=False)
            record_of(folder, test_loss=(2 + 0.1 * seed) * factor * (1 + 0.001 * seed * (norm == "post_ln")))


def test_leaderboard_and_notebook_print_one_paired_difference(tmp_path):
    """ln(1.01), ln(1.01 * 1.001), ln(1.01 * 1.002): by hand mean 0.010949, s = 0.0009995, and t(0.975, 2) = 4.30265."""
    four_seeds(tmp_path)
    m = gather(tmp_path, None)
    row = leaderboard(m).set_index("arm").loc["norm=post_ln"]
    theirs = study.compare(study.read_study(tmp_path), ["test_loss"]).iloc[0]
    assert m.baseline == "norm=pre_ln" and theirs["treatment"] == "norm=post_ln"
    assert row[["difference", "low", "high"]].tolist() == pytest.approx(
        [100 * np.expm1(-theirs[k]) for k in ("mean", "high", "low")], abs=1e-12
    )
    half = 4.30265 * 0.0009995 / 3**0.5
    assert row["difference"] == pytest.approx(100 * np.expm1(0.010949), abs=1e-3)
    assert row["high"] == pytest.approx(100 * np.expm1(0.010949 + half), abs=1e-3)
    assert row[["seeds", "diverged", "pairs", "finished_pairs", "better"]].tolist() == [4, 1, 4, 3, 0]
    assert m.arms == ("norm=pre_ln", "norm=post_ln") and row["val_loss_sd"] > 0  # the best first
    text = " ".join(leaderboard_section(m).text)
    assert "Exploratory: 1 comparison with the baseline, norm=pre_ln" in text


def test_difference_over_tokens_has_the_interval_of_its_pairs(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(arm, seed, t, 2 + 0.1 * rng.random()) for arm in "abc" for seed in range(4) for t in (10, 20)]
    curves = pd.DataFrame(rows, columns=["arm", "seed", "tokens", "loss"])
    found = tables.differences_by(curves, "b", "tokens").set_index(["arm", "tokens"])
    for arm in "ac":
        own = curves.pivot(index=["tokens", "seed"], columns="arm", values="loss").loc[20]
        mean, low, high = tables.mean_interval(np.log(own["b"] / own[arm]))
        at = found.loc[(arm, 20)]
        assert at[["mean", "low", "high"]].tolist() == pytest.approx([tables.percent(x) for x in (mean, high, low)])
        assert at["pairs"] == 4
    assert set(found.index.get_level_values(0)) == {"a", "c"}


def test_baseline_is_the_arm_nearest_to_the_defaults():
    settings = pd.DataFrame(
        {"norm": ["rezero", "pre_ln", "pre_ln", "none"], "dropout": ["none", "uniform", "none", "none"],
         "optimizer.lr": [0.1, 0.1, 0.2, 0.3]},
        index=["norm=rezero dropout=none", "norm=pre_ln dropout=uniform", "norm=pre_ln dropout=none", "norm=none"],
    )  # fmt: skip
    assert tables.baseline(settings) == "norm=pre_ln dropout=none"  # conf/config.yaml: pre_ln, no dropout
    assert tables.baseline(settings, "norm=rezero") == "norm=rezero dropout=none"
    for wrong, said in (("norm=pre_ln", "could be 2 arms"), ("norm=post_ln", "is not an arm"), ("", "is not an arm")):
        with pytest.raises(tables.ConfigError, match=said):
            tables.baseline(settings, wrong)


def test_the_baseline_has_the_size_that_most_arms_have():
    """conf/config.yaml: model mini of pre_ln for 200,000 tokens. Here it is one run beside a study at another size."""
    settings = pd.DataFrame(
        {"model": ["mini", "nano", "nano", "nano"], "norm": ["pre_ln", "rezero", "pre_ln", "deepnorm"],
         "budget.tokens": [200_000, 20_000, 20_000, 20_000]},
        index=["mini", "rezero", "pre_ln", "deepnorm"],
    )  # fmt: skip
    assert tables.baseline(settings) == "pre_ln"
    assert tables.of_other_size(settings, "pre_ln") == (["mini"], ["model", "budget.tokens"])
    assert tables.baseline(settings.iloc[:2]) == "mini"  # as many of each: that nearest to the defaults


def test_an_unknown_baseline_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    for norm in ("pre_ln", "post_ln"):
        make_run(tmp_path, {"norm": norm}, full=False, steps=20)
    target = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "-o", str(target), "--baseline", "norm=x"]) == 2
    said = capsys.readouterr().err
    assert "'norm=x' is not an arm: give one of" in said and said.count("\n") == 1 and not target.exists()
    assert main(["report", str(tmp_path), "-o", str(target), "--baseline", "norm=post_ln"]) == 0
    assert "with the baseline, norm=post_ln" in target.read_text()


def test_a_seven_by_two_factorial_has_distinct_labels(tmp_path):
    for norm in "abcdefg":
        for dropout in ("x", "y"):
            make_run(tmp_path, {"norm": norm, "dropout": dropout}, steps=20, full=False)
    m = gather(tmp_path, None)
    section = factorial_section(m)
    assert [f.title for f in section.figures] == ["norm and dropout"] and not section.missing
    looks = dict(zip(m.arms, zip(m.arms.colors, m.arms.dashes, strict=True), strict=True))
    assert len({*looks.values()}) == 14 <= charts.SHOWN_ARMS
    assert looks["norm=c dropout=x"][0] == looks["norm=c dropout=y"][0]  # color is the first factor, dash the second
    assert looks["norm=a dropout=x"][1] == looks["norm=g dropout=x"][1]
    names = [f.title for f in curves_section(m).figures if f.small]
    assert sorted(names) == [f"norm={x}" for x in "abcdefg"]


def test_the_boundary_is_drawn_to_the_planned_pairs():
    steps = pd.DataFrame({"pairs": [4, 5], "boundary": [statistics.critical(n, 12) for n in (4, 5)]})
    ahead = boundaries(steps, 12).set_index("pairs")["boundary"]
    assert list(ahead.index) == list(range(4, 13))
    assert ahead.tolist() == pytest.approx([statistics.critical(n, 12) for n in range(4, 13)], rel=1e-6)
    assert boundaries(steps.assign(boundary=np.inf), 12).empty


def test_every_pair_of_arms_has_its_t_interval():
    rng = np.random.default_rng(0)
    loss = 2 + 0.1 * rng.random((3, 6))
    runs = pd.DataFrame({"arm": np.repeat(["a", "b", "c"], 6), "seed": np.tile(range(6), 3), "value": loss.ravel()})
    runs["diverged"] = (runs["arm"] == "c") & (runs["seed"] == 5)
    table = tables.all_paired(runs, ["a", "b", "c"]).set_index(["arm", "control"])
    assert len(table) == 6 and table.loc[("c", "a"), "pairs"] == 5
    found = ttest_rel(np.log(loss[1]), np.log(loss[0]))  # SciPy's, of the log ratio
    ends = found.confidence_interval(0.95)
    expected = 100 * np.expm1([np.log(loss[1] / loss[0]).mean(), ends.low, ends.high])
    np.testing.assert_allclose(table.loc[("b", "a"), ["mean", "low", "high"]].astype(float), expected)
    forth, back = table.loc[("b", "a"), "mean"] / 100, table.loc[("a", "b"), "mean"] / 100
    assert (1 + forth) * (1 + back) == pytest.approx(1)


def test_pairs_of_arms_are_drawn_for_few_arms_only(tmp_path):
    for i in range(4):
        for seed in range(3):
            make_run(tmp_path, {"norm": f"n{i}"}, seed, level=2 + 0.1 * i, steps=30)
    m = gather(tmp_path, None)
    section = pairs_section(m)
    assert [f.title.split(":")[0] for f in section.figures] == ["Every arm against every other", "Seed against seed"]
    m.arms = charts.Arms([*m.arms, *map(str, range(12))])
    assert [f.title.split(":")[0] for f in pairs_section(m).figures] == ["Seed against seed"]
