"""show and report: records written by hand in the form that runs leave, drawn, and looked at by a browser."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from factories import edit_record, make_run, write_record
from published import published

from albert_ablate.analysis.measures import spike_score, spikes
from albert_ablate.analysis.numbers import human
from albert_ablate.analysis.tables import with_mean
from albert_ablate.cli import main
from albert_ablate.records import store
from albert_ablate.records.evaluation_results import write_evaluations
from albert_ablate.report import charts, render, report, show
from albert_ablate.report.contrasts import effect_text
from albert_ablate.report.files import write_csv, write_markdown
from albert_ablate.report.material import gather
from albert_ablate.report.page import Page, Section, Table
from albert_ablate.report.render import packed, safe_json
from albert_ablate.report.sections.factors import factorial_section
from albert_ablate.report.sections.ledger import effects_section
from albert_ablate.report.sections.rates import rates_section
from albert_ablate.report.sections.settings import SCOPE

pytest.importorskip("altair", reason="pip install 'albert_ablate[plot]'")
pytest.importorskip("vl_convert", reason="pip install 'albert_ablate[plot]'")

EVIL = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2"> | *x* {{ 7*7 }}'


def part(treatment, control, mean, low, high, pairs=5):
    return {
        "treatment": treatment, "control": control, "measure": "final loss", "unit": "log ratio", "direction": "lower",
        "margin": 0.005, "null": "0", "pairs": pairs, "mean": mean, "low": low, "high": high,
        "percent": None if isinstance(low, str) else [100 * mean, 100 * low, 100 * high], "finished": pairs, "lost": 0,
        "treatment_diverged": [1, pairs, 0.005, 0.7], "control_diverged": [0, pairs, 0.0, 0.5],
        "correlation": [0.8, 0.4, 0.95], "pairs_to_margin": [30, 20, "Infinity"], "rank": "agrees",
        "looks": [{"pairs": 4, "statistic": 3.1, "p": 0.05, "boundary": 0.0089}], "seeds": [0], "d": [0.1],
    }  # fmt: skip


def claim(name, verdict, parts):
    return {
        "name": name, "statement": EVIL, "sentence": f"At 4 layers: {verdict}.", "verdict": verdict, "reason": EVIL,
        "regime": "ample", "edited": True, "N": 20, "needs": "one", "p_effect": 0.01, "p_inside": 1.0, "parts": parts,
        "secondary": [], "cost": {"seconds": 12.0, "tokens": 1000, "runs": 8}, "notes": [EVIL],
    }  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A 2 x 2 study with a diverged and an unreadable run, tuning, evaluations, a ledger, and a hostile arm."""
    root = tmp_path_factory.mktemp("study")
    for i, norm in enumerate(("pre_ln", "post_ln")):
        for j, dropout in enumerate(("none", EVIL)):
            for seed in range(4):
                lost = 200 if (i, j, seed) == (1, 0, 3) else None
                make_run(root, {"norm": norm, "dropout": dropout}, seed, level=2 + 0.1 * i + 0.05 * j, lost=lost)
    torn = root / "0123456789ab" / "seed0"
    torn.mkdir(parents=True)
    (torn / "record.json").write_text('{"status": "fini')
    curve = [{"rate": 1e-3 * 2**k, "losses": [2 + 0.1 * (k - 1) ** 2, None if k == 3 else 2.1], "mean": 2.0,
              "seeds": [1_000_000, 1_000_001], "tokens": 100} for k in range(4)]  # fmt: skip
    (root / "tuning").mkdir()
    tuned = {"arm": EVIL, "rate": 2e-3, "curve": curve, "edge": None, "slack": 0.01, "trained": True, "tokens": 100}
    (root / "tuning" / "a.json").write_text(json.dumps(tuned))
    claims = [
        claim("4", "supported", [part("pre_ln", "none", 0.03, 0.02, 0.04)]),
        claim(EVIL, "inconclusive", [part(EVIL, "none", 0.001, "-Infinity", "Infinity")]),
        claim("14", "open", [part("full", "plain", "NaN", "NaN", "NaN", 0)]),
    ]
    family = {"size": 15, "alpha": 0.05}
    ledger = {"version": 1, "claims_file": "claims.yaml", "family": family, "claims": claims, "refusals": [EVIL]}
    (root / "ledger.json").write_text(json.dumps(ledger))
    return root


@pytest.fixture(scope="module")
def page_file(study, tmp_path_factory):
    target = tmp_path_factory.mktemp("out") / "report.html"
    assert main(["report", str(study), "-o", str(target)]) == 0
    return target


# --- thinning, depth maps, spikes ------------------------------------------------------------------------------------


def test_thinning_keeps_ends_and_every_spike():
    y = np.random.default_rng(0).normal(size=100_000)
    y[[777, 50_001]], y[60_000:60_010] = [99, -99], np.nan
    kept = charts.thinned(y, 200)
    assert len(kept) <= 202 and {0, 777, 50_001, 99_999} <= {*kept} and (np.diff(kept) > 0).all()
    assert np.isfinite(y[kept]).all()
    assert charts.thinned([3.0, np.inf, 1.0], 10).tolist() == [0, 2]
    for low, high in zip(range(0, 100_000, 2100), range(2100, 100_000, 2100), strict=False):
        inside = kept[(kept >= low) & (kept < high)]  # a stretch of two buckets keeps something of itself
        assert len(inside)


def test_a_block_joins_sublayers_and_shows_the_worst_step():
    rows = pd.DataFrame(
        {"step": np.repeat([1, 2, 3, 4], 2), "tokens": np.repeat([10, 20, 30, 40], 2), "layer": 0,
         "sublayer": ["attention", "mlp"] * 4, "weight_norm": [1.0, 2.0] * 4, "grad_norm": [3, 4, 6, 8, 3, 4, 3, 4],
         "update_ratio": [0.5, 0.5] * 4, "residual_rms": [1, 2, 3, 7, 5, 6, 7, 1.5],
         "entropy": [2.0, np.nan, 1.0, np.nan, 3.0, np.nan, 4.0, np.nan]}
    )  # fmt: skip
    grad = charts.depth_map(rows, "grad_norm", columns=2)
    assert grad["value"].tolist() == [10.0, 5.0] and grad["tokens"].tolist() == [10, 30] and set(grad["layer"]) == {1}
    assert charts.depth_map(rows, "residual_rms", 2)["value"].tolist() == [7.0, 6.0]  # the stream after the last
    assert charts.depth_map(rows, "entropy", 2)["value"].tolist() == [1.0, 3.0]  # the least
    np.testing.assert_allclose(charts.depth_map(rows, "update_ratio", 4)["value"], 0.5)
    assert charts.depth_map(rows, "max_logit").empty
    old = rows.iloc[::2][["step", "tokens", "layer", "grad_norm"]]
    assert charts.depth_map(old, "grad_norm", 4)["value"].tolist() == [3, 6, 3, 3]


def test_a_column_lasts_until_the_next_logged_step():
    rows = pd.DataFrame({"step": [0, 1, 2], "tokens": [0, 10, 20], "layer": 0, "grad_norm": [1.0, np.nan, 4.0]})
    cells = charts.depth_map(rows, "grad_norm", until=23.0)
    assert cells[["tokens", "end", "value"]].values.tolist() == [[0, 10, 1], [20, 23, 4]]  # none for the lost step
    one = charts.depth_map(rows.head(1), "grad_norm", until=512.0)
    assert one[["tokens", "end"]].values.tolist() == [[0, 512]]


def test_colors_hold_zeros_negatives_and_non_finite_values():
    cells = pd.DataFrame({"tokens": 0.0, "end": 5.0, "layer": [1, 2, 3, 4], "value": [-3.0, 0.0, 1e-3, 1e3]})
    drawn = charts.heat_map(cells, "max_logit", depth=96, until=50.0).to_dict(validate=False)["encoding"]
    assert drawn["color"]["scale"]["type"] == "log" and drawn["color"]["field"] == "shade"
    assert drawn["y"]["scale"]["domain"] == [0.5, 96.5] and drawn["x"]["scale"]["domain"] == [0, 50]
    low, high = drawn["color"]["scale"]["domain"]
    chart = charts.heat_map(cells, "max_logit")
    assert (
        chart.data["shade"].between(low, high).all() and low > 0 and chart.data["value"].tolist() == [-3, 0, 1e-3, 1e3]
    )
    entropy = charts.heat_map(cells.iloc[2:], "entropy").to_dict(validate=False)["encoding"]["color"]["scale"]
    assert entropy["type"] == "linear" and entropy["domain"][0] == 0
    assert charts.color_range([1, 1.0001, 0.9999]) == pytest.approx([0.95, 1.05], abs=1e-3)  # noise is not a pattern
    assert charts.color_range([0, 0]) == [0, 1] and charts.color_range([-4, -3, -2]) == pytest.approx([-3.98, -2.04])


def test_a_picture_holds_no_line_that_the_renderer_dies_of():
    """tiny-skia ends the whole process where a line is 10^7 axis lengths long, as a diverged run's loss is."""
    batches = pd.DataFrame({"step": [1, 2, 3], "tokens": [1, 2, 3], "loss": [5.0, 1e8, 4.0]})
    evals = pd.DataFrame({"tokens": [0, 3], "series": "train", "loss": [5.5, 1e8], "bits_per_byte": [8.0, 1e8]})
    none = pd.DataFrame({"step": [], "tokens": [], "what": [], "value": []})
    lines = pd.DataFrame({"loss": [3.0], "what": ["unigram model"]})
    spec, frames = charts.specification(charts.run_losses(batches, evals, none, lines, 5.5))
    render._keep_near(spec, frames)
    drawn = [frame["loss"] for frame in frames.values() if "loss" in frame]
    assert len(drawn) == 3 and max(d.max() for d in drawn) < 30 and drawn[0].tolist()[::2] == [5.0, 4.0]
    assert batches["loss"].max() == evals["loss"].max() == 1e8


def test_96_layers_and_many_steps_stay_thin():
    n, layers = 400, 96
    rows = pd.DataFrame({"step": np.repeat(np.arange(n), layers), "layer": np.tile(np.arange(layers), n)})
    rows = rows.assign(tokens=rows["step"] * 10, grad_norm=1.0)
    rows.loc[rows["step"].eq(333) & rows["layer"].eq(50), "grad_norm"] = 1e9
    cells = charts.depth_map(rows, "grad_norm")
    assert len(cells) == charts.MAX_COLUMNS * layers and cells["value"].max() == 1e9


def test_spikes_are_those_that_the_score_counts():
    x = np.random.default_rng(1).normal(size=3000)
    x[2000], x[2500] = 50, np.nan
    found = spikes(x, 1000)
    assert np.flatnonzero(found).tolist() == [2000, 2500] and spike_score(x, 1000) == 2 / 2000
    assert not spikes(x[:10], 1000).any() and np.isnan(spike_score(x[:10], 1000))


# --- show ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "full"), [(None, True), (200, True), (None, False), (1, True)])
def test_a_run_is_drawn_whatever_became_of_it(tmp_path, lost, full):
    folder = make_run(tmp_path, {"norm": EVIL}, lost=lost if lost != 1 else 2, full=full)
    target = tmp_path / "run.html"
    assert main(["show", str(folder), "-o", str(target)]) == 0
    text = target.read_text()
    assert EVIL not in text and ("diverged" in text) == bool(lost)
    assert text.count("</script>") == 3 and ("Not in this run" in text) == (not full)
    wanted = set(charts.QUANTITIES) if full else {"grad_norm"}
    assert set(show.maps(show.read_run(folder))) == wanted


@pytest.mark.parametrize(
    ("kind", "begins"), [("png", b"\x89PNG"), pytest.param("svg", b"<svg", marks=pytest.mark.slow)]
)
def test_a_run_is_a_picture_too(tmp_path, kind, begins):
    folder = make_run(tmp_path, {"norm": "pre_ln"}, lost=200)
    target = tmp_path / f"run.{kind}"
    assert main(["show", str(folder), "-o", str(target)]) == 0
    assert target.read_bytes().startswith(begins) and target.stat().st_size > 20_000


@pytest.mark.parametrize("lost", [None, 200])
def test_a_run_is_json_too(tmp_path, capsys, monkeypatch, lost):
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path, {"norm": EVIL}, lost=lost)
    entry = {
        "rows": [],
        "summary": {"f1": 0.5, "odd": math.nan},
        "settings": {},
        "weights": "last",
        "weights_hash": "x",
    }
    write_evaluations(folder, {"topic": entry})
    before = sorted(tmp_path.rglob("*"))
    assert main(["show", str(folder), "--json"]) == 0
    found = published(capsys.readouterr().out, "run")
    record = store.read(folder)
    assert found["status"] == record["status"] and found["figures"]["seconds"] == record["cost"]["seconds"]
    assert found["evaluations"] == {"topic": {"f1": 0.5, "odd": None}}
    assert [e["step"] for e in found["evals"]] == show.read_run(folder).evals["step"].tolist()
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["show", str(folder), "--json", "-o", "run.png"]) == 2
    assert "--json and -o run.png exclude each other" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "gone"), "--json"]) == 2
    assert not capsys.readouterr().out


def test_a_run_that_goes_on_is_drawn_from_what_it_committed(tmp_path):
    from albert_ablate.records.history import SCHEMAS, History

    folder = make_run(tmp_path, {"norm": "pre_ln"})
    committed = {}
    for name in SCHEMAS:
        history = History(folder, name)
        history.cut(0)
        row = {f.name: "train" if pa.types.is_string(f.type) else 1 for f in SCHEMAS[name]}
        history.append(**row)
        committed[name] = history.commit()
        history.close()
        (folder / f"{name}.arrow").unlink()
    edit_record(folder, status="running", histories=committed)
    assert main(["show", str(folder), "-o", str(tmp_path / "run.html")]) == 0
    edit_record(folder, histories={})
    with pytest.raises(show.ConfigError, match="has committed no step"):
        show.read_run(folder)


def test_a_classifying_run_has_losses_per_document(tmp_path):
    folder = make_run(tmp_path, {"norm": "pre_ln"}, full=False)
    scores = {"macro_f1": 0.5, "probe_macro_f1": 0.4, "baseline_tfidf_macro_f1": 0.9}
    edit_record(folder, data={"task": "topic"}, **{f"summary__{name}": score for name, score in scores.items()})
    drawn = show.page(show.read_run(folder))
    (figures,) = [dict(s.tables[0].rows.itertuples(index=False)) for s in drawn.sections if s.title == "All metrics"]
    assert figures["macro-F1 of tf-idf and logistic regression"] == 0.9
    assert any("nats per document" in title for title in figures)
    assert not any("per token" in title or section.missing for title in figures for section in drawn.sections)


def test_what_cannot_be_drawn_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    folder = make_run(tmp_path, {"norm": "pre_ln"})

    def said(*arguments: str) -> str:
        assert main([*arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and error.endswith(".")
        return error

    out = str(tmp_path / "run.html")
    assert "holds no record.json; a run in it is" in said("show", str(tmp_path), "-o", out)
    assert "must end in .html, .png or .svg" in said("show", str(folder), "-o", "x.pdf")
    assert "no folder" in said("show", str(folder), "-o", str(tmp_path / "nowhere" / "x.png"))
    (folder / "steps.arrow").write_bytes(b"ARROW1 torn")
    assert "steps cannot be read" in said("show", str(folder), "-o", out)
    (folder / "steps.arrow").unlink()
    assert "is missing" in said("show", str(folder), "-o", out)
    (folder / "record.json").write_text("{")
    assert "cannot be read" in said("show", str(folder), "-o", out)
    (tmp_path / "afile").touch()
    assert "nowhere does not exist" in said("report", str(tmp_path / "nowhere"))
    assert "no run that can be read" in said("report", str(tmp_path), "-o", out)
    assert "There is no ledger" in said("report", str(tmp_path), "-o", out, "--ledger", str(tmp_path / "l.json"))
    assert "afile is not a folder of runs" in said("report", str(tmp_path / "afile"), "-o", out)
    assert "it is a file" in said("report", str(tmp_path), "--format", "csv", "-o", str(tmp_path / "afile"))
    assert "must end in .md" in said("report", str(tmp_path), "--format", "md", "-o", out)
    (tmp_path / "l.json").write_text('{"claims": 3}')
    assert "is not a ledger" in said("report", str(tmp_path), "-o", out, "--ledger", str(tmp_path / "l.json"))


# --- report ----------------------------------------------------------------------------------------------------------


def test_no_text_from_elsewhere_is_markup(page_file):
    text = page_file.read_text()
    assert text.count("</script>") == 3 and "<img src=x" not in text and "window.hacked=1</script>" not in text
    assert "{{ 7*7 }}" in text  # a name is not a template
    content = re.search(r'id="content">(.*?)</script>', text, re.S).group(1)
    assert not set("<>&") & set(content) and any(EVIL in arm for arm in json.loads(content)["arms"])
    tuning = next(c for c in json.loads(content)["charts"].values() if "learning rate" in json.dumps(c))
    assert "indexof(arms" not in json.dumps(tuning) and '"legend": {' in json.dumps(tuning)  # the filter has other arms
    assert json.loads(safe_json({"x": "</script>&\u2028"})) == {"x": "</script>&\u2028"}
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r'(?:src|href)="(?!data:|#)', markup)  # nothing is fetched


def test_csv_holds_the_tables(study, tmp_path):
    page = report.make(study)
    write_csv(page, tmp_path / "tables")
    table = pd.read_csv(tmp_path / "tables" / "divergence.csv")
    assert table["diverged"].sum() == 1 and table["seeds"].tolist() == [4] * 4
    # Clopper and Pearson: of 1 of 4 from 0.6 to 80.6 %, of 0 of 4 up to 60.2 %
    bounds = table[["share", "low", "high"]].round(3).drop_duplicates().sort_values("share")
    assert bounds.values.tolist() == [[0, 0, 0.602], [0.25, 0.006, 0.806]] and table["non_finite"].sum() == 1
    for section in page.sections:
        for ours in section.tables:
            theirs = pd.read_csv(tmp_path / "tables" / f"{ours.name}.csv")
            assert list(theirs) == [str(c) for c in ours.rows] and len(theirs) == len(ours.rows), ours.name
            for c in ours.rows.select_dtypes("number"):
                np.testing.assert_array_equal(theirs[str(c)].astype(float), ours.rows[c].astype(float))
    ledger = pd.read_csv(tmp_path / "tables" / "ledger.csv")
    assert ledger[["mean", "low", "high"]].values.tolist()[0] == [0.03, 0.02, 0.04] and np.isinf(ledger["high"][1])
    effects = pd.read_csv(tmp_path / "tables" / "interactions.csv").set_index("effect")["mean"]
    assert effects["norm x dropout"] == pytest.approx(0, abs=1e-9)
    assert effects["norm: pre_ln minus post_ln"] == pytest.approx(-0.1)


@pytest.mark.slow
def test_markdown_has_its_charts_beside_it(study, tmp_path):
    target = tmp_path / "report.md"
    assert main(["report", str(study), "--format", "md", "-o", str(target)]) == 0
    text = target.read_text()
    pictures = re.findall(r"\]\((report_files/\S+\.png)\)", text)
    assert len(pictures) > 8 and all((tmp_path / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert "<script>" not in text.replace(r"\<script\>", "") and SCOPE in text


def test_what_is_absent_is_left_out_with_a_line(tmp_path):
    make_run(tmp_path, {"norm": "pre_ln"}, full=False)
    page = report.make(tmp_path)
    missing = {section.title: " ".join(section.missing) for section in page.sections if section.missing}
    assert (
        "judge" in missing["Claims"] and "tune" in missing["Learning rates"] and "evaluate" in missing["Generalization"]
    )
    assert "diagnostics.every" in missing["Depth by tokens"] and "cross" in missing["Interactions"]
    assert "one arm only" in missing["Configurations"]


def test_arms_are_named_by_the_settings_that_differ(tmp_path):
    for lr in (1e-3, 2e-3, 4e-3):  # the last has another kind of divergence, and no evaluations
        make_run(tmp_path, {"norm": "pre_ln", "dropout": "none"}, lr=lr, lost=100 if lr == 4e-3 else None)
    make_run(tmp_path, {"norm": "post_ln", "dropout": "none"})
    m = gather(tmp_path, None)
    assert sorted(m.arms) == ["norm=post_ln", *(f"norm=pre_ln optimizer.lr={lr}" for lr in (0.001, 0.002, 0.004))]
    assert list(m.settings) == ["norm", "optimizer.lr"]
    section = rates_section(m)
    assert [f.title for f in section.figures] == ["Learning-rate sensitivity"] and len(section.tables[0].rows) == 3
    found = section.tables[1].rows.iloc[0]  # the diverged run counts as the initial loss, 5.5
    low = m.rows.set_index("optimizer.lr")["val_loss"][0.001]
    assert found["mean"] == pytest.approx((5.5 - low) / 3) and found["rates"] == 3


def test_a_mean_is_drawn_where_most_seeds_were_evaluated(tmp_path):
    rows = [(run, t, 1.0 + run) for run in (0, 1, 2) for t in (0, 10, 20)] + [(3, t, 9.0) for t in (0, 10, 15)]
    held = pd.DataFrame(rows, columns=["run", "tokens", "loss"]).assign(arm="a")
    over = with_mean(held).drop_duplicates("tokens").set_index("tokens")
    assert over["mean"].to_dict() == {0: 3.75, 10: 3.75, 20: 2.0, 15: pytest.approx(np.nan, nan_ok=True)}
    assert over["high"][10] == 9 and over["low"][20] == 1 and len(with_mean(held)) == len(held)


def test_cells_of_a_factorial_have_equal_settings_elsewhere(tmp_path):
    for i, norm in enumerate("ab"):
        for j, dropout in enumerate("xy"):
            for seed in range(3):
                make_run(tmp_path, {"norm": norm, "dropout": dropout}, seed, level=2 + 0.1 * i + 0.2 * j, full=False)
    make_run(tmp_path, {"norm": "a", "dropout": "x"}, level=9.0, lr=4e-3, full=False)  # one cell alone at this rate
    section = factorial_section(gather(tmp_path, None))
    assert [f.title for f in section.figures] == ["norm and dropout"]
    table = section.tables[0].rows.set_index("effect")
    assert table["mean"].tolist() == pytest.approx([0.1, 0.2, 0.0], abs=1e-9) and set(table["seeds"]) == {3}


def test_runs_on_different_texts_compare_in_bits_per_byte(tmp_path):
    for norm in ("a", "b"):
        steps = 300 if norm == "a" else 200  # the cost differs
        folder = make_run(tmp_path, {"norm": norm, "data": "text_files"}, steps=steps, full=False)
        edit_record(folder, data={"fingerprint": norm}, summary__val_bits_per_byte=3.0)
    page = report.make(tmp_path)
    assert "The runs differ in text" in page.subtitle
    titles = [f.title for s in page.sections for f in s.figures]
    assert "Validation loss (bits per byte)" in titles and not any("each batch" in t for t in titles)
    chart = next(f.chart for s in page.sections for f in s.figures if f.title == "Loss over training FLOPs")
    assert "bits per byte" in json.dumps(charts.specification(chart)[0])


def test_a_page_names_no_folder_and_obeys_no_control_character(tmp_path):
    make_run(tmp_path / "runs", {"norm": "\u202eevil\x1b[31m \ud800"})
    make_run(tmp_path / "runs", {"norm": "b"}, steps=4)
    (tmp_path / "runs" / "bad" / "seed0").mkdir(parents=True)
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    markup = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert main(["report", str(tmp_path / "runs"), "--format", "csv", "-o", str(tmp_path / "tables")]) == 0
    assert "bad/seed0" in pd.read_csv(tmp_path / "tables" / "unreadable.csv")["folder"].tolist()
    assert str(tmp_path) not in text and not set("\u202e\x1b") & set(markup) and "norm=\ufffdevil" in markup
    assert "1 more cannot be read" in markup and "bad/seed0" in markup


def test_an_effect_is_said_as_the_change_of_the_measure():
    p = {"mean": 0.03, "low": 0.01, "high": 0.05, "direction": "lower", "unit": "nats", "rank": "agrees"}
    assert effect_text(p) == "−0.03 nats (−0.05 to −0.01)"  # the claim says lower, and it is
    assert effect_text(p | {"direction": "higher"}) == "+0.03 nats (+0.01 to +0.05)"
    assert effect_text(p | {"log": True, "singles": ["a"]}) == "+0.03 (log ratio) (+0.01 to +0.05)"
    assert effect_text(p | {"percent": [-3, "-Infinity", 1]}) == "−3 % (−∞ to +1)"
    assert effect_text(p | {"mean": 0.0, "rank": "not tested"}) == "+0 nats (exact)"


def test_a_ledger_with_a_broken_contrast_is_one_sentence(tmp_path, capsys):
    make_run(tmp_path, {"norm": "a"}, steps=20)
    for broken in ({"treatment": "a"}, part("a", "b", "high", 0, 0), part("a", "b", 0, 0, 0) | {"looks": [3]}):
        claims = [{"name": "x", "verdict": "supported", "parts": [broken]}]
        (tmp_path / "ledger.json").write_text(json.dumps({"claims": claims}))
        assert main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 2
        said = capsys.readouterr().err
        assert "is not a ledger" in said and said.count("\n") == 1


def test_contrasts_of_one_name_have_a_row_each(study):
    m = gather(study, None)
    twice = [part("a", "b", 0.01, 0, 0.02), part("a", "b", 0.2, 0.1, 1.3)]
    m.ledger = {"claims": [claim("c", "undecided", twice), claim("no", "inadmissible", twice[:1])]}
    section = effects_section(m)
    _, frames = charts.specification(section.figures[0].chart)
    rows = [set(f["row"]) for f in frames.values() if "row" in f]
    assert max(map(len, rows)) == 2 and section.text == ["Not drawn, because inadmissible: no."]


def test_numbers_of_one_size_align_and_settings_stay_short():
    rows = pd.DataFrame(
        {"loss": [2.6175, 2.9, np.nan], "lr": [0.002, 2.0, 0.128], "n": [3, 20_000, 5], "p": [0.5, 1.2e-5, 0.01]}
    )
    assert Table("t", rows).cells == [
        ["2.618", "0.002", "3", "0.5"], ["2.900", "2", "20,000", "1.2 × 10⁻⁵"], ["–", "0.128", "5", "0.01"],
    ]  # fmt: skip
    assert Table("t", rows.assign(arm="a")).numeric == [True] * 4 + [False]


def test_markdown_escapes_and_leaves_long_folded_tables_to_csv(tmp_path):
    short, long = pd.DataFrame({"a|b": [EVIL, "- x"]}), pd.DataFrame({"n": range(100)})
    section = Section(
        "S", ["1. no *list*", "+ none"], [Table("short", short), Table("long", long, "Long", folded=True)]
    )
    (file,) = write_markdown(Page("T", "", [section]), tmp_path / "r.md")
    text = file.read_text()
    assert "1\\. no \\*list\\*" in text and "\n\\+ none" in text and "| a\\|b |" in text
    assert r"\<script\>window.hacked=1" in text and "(100 rows: --format csv has them, in long.csv.)" in text


def test_tuning_runs_are_no_results(tmp_path):
    make_run(tmp_path, {"norm": "pre_ln"})
    make_run(tmp_path, {"norm": "pre_ln"}, seed=1_000_000, role="tuning")
    m = gather(tmp_path, None)
    assert m.rows["seed"].tolist() == [0] and "tuning" in m.notes[0]


def test_numbers_survive_packing_and_are_short_in_words():
    frame = pd.DataFrame({"x": [0.123456789, np.nan, np.inf, 3.0], "arm": ["a"] * 4})
    assert packed(frame) == {"n": 4, "c": {"x": [0.12346, None, None, 3], "arm": ["a"] * 4}}
    assert packed(pd.DataFrame({"arm": ["a"] * 9}))["c"]["arm"] == {"u": ["a"], "i": [0] * 9}
    assert [human(v) for v in (None, np.nan, 200_000, -0.5, 1.5e12, np.inf, True)] == [
        "–", "–", "200,000", "−0.5", "1.5 × 10¹²", "∞", "yes"]  # fmt: skip
    # tokens per second were 1.816e+04 once
    assert [human(v) for v in (18_160.4, 9999.6, 1234, 0.98614, 1e-4, 2.5e-6, -0.0)] == [
        "18,160", "10,000", "1234", "0.9861", "0.0001", "2.5 × 10⁻⁶", "0"]  # fmt: skip
    assert [human(v, 3, sign=True) for v in (0.0305, -0.4, 0.0, np.inf)] == ["+0.0305", "−0.4", "+0", "+∞"]


@pytest.mark.slow
def test_a_thousand_runs_make_a_page_under_10_mb(tmp_path):
    base = make_run(tmp_path / "base", {"norm": "n", "dropout": "d"}, steps=10_000, layers=12)
    record = json.loads((base / "record.json").read_text())
    record.pop("checksums", None)  # of its own content
    for arm in range(100):
        for seed in range(10):
            folder = tmp_path / "runs" / f"{arm:012x}" / f"seed{seed}"
            folder.mkdir(parents=True)
            for file in ("steps.arrow", "evals.arrow", "layers.arrow", "evaluations.json"):
                (folder / file).hardlink_to(base / file)
            own = {
                "setting": folder.parent.name,
                "seed": seed,
                "choices": {"norm": f"n{arm // 10}", "dropout": f"d{arm % 10}"},
            }
            write_record(folder, record, **own)
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size < 10e6


# --- in a browser ----------------------------------------------------------------------------------------------------


def opened(browser, file, width=1280, scheme="light"):
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.trouble = []
    page.on("console", lambda m: page.trouble.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.trouble.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else page.trouble.append(r.url))
    page.goto(f"file://{file}")
    return page


def drawn(page) -> int:
    """Brings every visible figure into view; gives how many there are, once all are drawn."""
    page.evaluate("document.querySelectorAll('main details').forEach(d => { d.open = true; })")
    figures = page.locator("figure[data-chart]:not([hidden])")
    for i in range(figures.count()):
        figures.nth(i).scroll_into_view_if_needed()
    page.wait_for_function("!document.querySelector('figure[data-chart]:not([hidden]):not([data-drawn])')")
    return figures.count()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_no_heading_runs_under_the_png_button(browser, page_file, width):
    page = opened(browser, page_file, width)
    drawn(page)
    hidden = page.evaluate("""[...document.querySelectorAll("figure:not([hidden])")].flatMap(figure => {
        const button = figure.querySelector(".save"), heading = figure.querySelector("h3");
        if (!button || !heading || !button.offsetParent) return [];
        const text = document.createRange(); text.selectNodeContents(heading);
        const b = button.getBoundingClientRect();
        return [...text.getClientRects()].some(r => r.right > b.left && r.top < b.bottom && r.bottom > b.top)
            ? [heading.textContent] : [];
    })""")
    assert hidden == []


def titled(page, title):
    return page.locator("figure[data-chart]:not([hidden])", has=page.locator("h3", has_text=title)).first


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_chart_is_drawn_at_any_width_and_in_both_schemes(browser, page_file, width, scheme):
    page = opened(browser, page_file, width, scheme)
    assert drawn(page) >= 12 and not page.trouble
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out of a phone
    assert page.evaluate("window.hacked") is None
    inked = """[...document.querySelectorAll('figure[data-drawn] canvas')].every(c => {
        const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();
        for (let i = 0; i < p.length && seen.size < 5; i += 4) seen.add(p[i] + ',' + p[i+1] + ',' + p[i+2]);
        return seen.size >= 5; })"""
    assert page.evaluate(inked)


@pytest.mark.slow
def test_filter_hover_and_choice_of_quantity_work(browser, page_file):
    page = opened(browser, page_file)
    before = drawn(page)
    curves = titled(page, "Validation loss (nats per token)")
    number = curves.get_attribute("data-chart")
    whole = curves.locator("canvas").evaluate("c => c.toDataURL()")
    page.locator("#filter summary").click()
    page.locator("#filter input[type=checkbox]").first.uncheck()
    page.wait_for_function(
        "([n, whole]) => document.querySelector(`figure[data-chart='${n}'] canvas`).toDataURL() !== whole",
        arg=[number, whole],
    )
    assert page.locator("#leaderboard ~ .scroll tr[data-arm]:visible").count() == 3  # the tables follow
    assert page.locator("#count").inner_text() == "3 of 4 arms shown"
    assert page.locator("figure[data-chart]:not([hidden])").count() == before - 1  # its heat map goes
    page.locator("#none").click()
    assert page.locator("figure[data-arm]:not([hidden])").count() == 0
    page.locator("#all").click()
    select = page.locator("select.groups")
    select.select_option(label=charts.QUANTITIES["entropy"])
    assert page.locator("figure[data-group]:not([hidden])").first.get_attribute("data-group").startswith("Attention")
    assert drawn(page) == before
    canvas = page.locator("figure.small[data-group]:not([hidden]) canvas").first
    canvas.scroll_into_view_if_needed()
    canvas.hover(position={"x": 110, "y": 60})
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "block" in page.locator("#vg-tooltip-element").inner_text()
    page.emulate_media(color_scheme="dark")
    drawn(page)
    assert not page.trouble


@pytest.mark.slow
def test_arms_can_be_found_and_all_charts_print(browser, tmp_path):
    for i in range(9):
        make_run(tmp_path / "runs", {"norm": f"n{i}"}, steps=20, full=False)
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]) == 0
    page = opened(browser, tmp_path / "report.html")
    page.wait_for_function("!document.querySelector('figure[data-chart]:not([hidden]):not([data-drawn])')")
    page.locator("#filter summary").click()
    page.fill("#find", "n7")
    assert page.locator("#filter label:visible").count() == 1
    page.locator("#only").click()
    assert page.locator("#count").inner_text() == "1 of 9 arms shown" and not page.trouble


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_filter_is_small_and_covers_no_heading(browser, page_file, width):
    page = opened(browser, page_file, width)
    top, bottom = (f"e => e.getBoundingClientRect().{side}" for side in ("top", "bottom"))
    known = "h => getComputedStyle(document.documentElement).getPropertyValue('--sticky') === h + 'px'"
    for unfold in (False, True):
        if unfold:
            page.locator("#filter summary").click()
        bar = page.locator("#filter").evaluate("e => e.offsetHeight")
        assert bar < (60 if not unfold else 450)  # of a window of 900
        page.wait_for_function(known, arg=bar)
        for name in ("loss-curves", "generalization", "interactions"):
            page.locator(f"nav a[href='#{name}']").evaluate("e => e.click()")
            page.wait_for_timeout(50)
            assert page.locator(f"#{name}").evaluate(top) >= page.locator("#filter").evaluate(bottom)


@pytest.mark.slow
def test_tables_sort_by_click_and_key_and_say_so(browser, page_file):
    page = opened(browser, page_file)
    table = page.locator("#leaderboard ~ .scroll table").first
    head = table.locator("th", has=page.get_by_role("button", name="validation loss", exact=True))
    at = head.evaluate("e => e.cellIndex")

    def column():
        values = "(rows, i) => rows.map(r => r.cells[i].dataset.v)"
        return [float(v) for v in table.locator("tbody tr").evaluate_all(values, at)]

    first = column()
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending" and column() == sorted(first)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending" and column() == sorted(first)[::-1]
    other = table.locator("th", has_text="arm").first
    other.locator("button").click()
    assert head.get_attribute("aria-sort") is None and other.get_attribute("aria-sort") == "ascending"
    arms = table.locator("tbody tr td:first-child").all_inner_texts()
    assert [a.strip() for a in arms] == sorted(a.strip() for a in arms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "says"),
    [
        ("Validation loss (nats per token)", "tokens"),
        ("Training loss of each batch", "tokens"),
        ("each seed", "seed"),
        ("Validation over training loss", "train"),
        ("Paired difference to the baseline over tokens", "difference"),
        ("Tuning", "learning rate"),
        ("Loss under masked tokens", "rise"),
    ],
)
def test_a_hover_gives_the_nearest_points_numbers(browser, page_file, title, says):
    page = opened(browser, page_file)
    figure = titled(page, title)
    figure.scroll_into_view_if_needed()
    canvas = figure.locator("canvas")
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for x, y in ((0.4, 0.35), (0.6, 0.55)):  # no point is just there
        canvas.hover(position={"x": box["width"] * x, "y": box["height"] * y})
        page.wait_for_selector("#vg-tooltip-element.visible", timeout=5000)
        said = page.locator("#vg-tooltip-element").inner_text()
        assert says in said and "undefined" not in said and not page.trouble, said


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_axe_finds_nothing(browser, study, page_file, width, scheme):
    """npm install axe-core in some folder, and AXE_CORE=that folder/node_modules/axe-core/axe.min.js."""
    file = Path(os.environ.get("AXE_CORE") or "node_modules/axe-core/axe.min.js")
    if not file.is_file():
        pytest.skip("no axe-core: npm install axe-core")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(f"file://{page_file}")
    drawn(page)
    page.locator("#filter summary").click()
    page.evaluate(file.read_text())
    found = page.evaluate("async () => (await axe.run()).violations.map(v => v.id + ': ' + v.nodes[0].html)")
    assert found == []


def test_late_losses_use_the_axis_of_runs_that_did_not_diverge():
    rows = [("a", 0, 2.5), ("a", 0, 2.4), ("b", 1, 60.0), ("b", 1, 40.0)]
    evals = pd.DataFrame(rows, columns=["arm", "run", "loss"]).assign(
        seed=0, tokens=[1, 2, 1, 2], mean=1, low=1, high=1
    )
    ends = pd.DataFrame({"arm": ["b"], "run": [1], "seed": [0], "tokens": [2], "loss": [40.0], "divergence": ["stuck"]})
    for lost, (low, high) in ((ends, (2.4, 2.5)), (ends.iloc[:0], (2.4, 60.0))):
        drawn, _ = charts.specification(charts.loss_curves(evals, lost, ["a", "b"], "nats per token", None))
        (domain,) = {tuple(layer["encoding"]["y"]["scale"]["domain"]) for layer in drawn["layer"]}
        assert domain == pytest.approx((low - 0.03 * (high - low), high + 0.03 * (high - low)))


def test_the_legend_of_points_shows_points():
    """A piece of line as a symbol has no fill: in a chart of points alone the legend would be names without symbols."""
    points = pd.DataFrame({"arm": ["a", "b"], "seed": 0, "control": [0.0, 1.0], "value": [1.0, 0.0]})
    drawn, _ = charts.specification(charts.pairs(points, ["a", "b"], "c"))
    legends = [layer["encoding"]["color"]["legend"] for layer in drawn["layer"] if "color" in layer["encoding"]]
    assert [legend["symbolType"] for legend in legends] == ["circle"]


def test_a_picture_which_has_no_filter_draws_every_arm():
    arms = [f"arm{i}" for i in range(charts.SHOWN_ARMS + 3)]
    values = pd.DataFrame({"arm": arms, "seed": 0, "value": 1.0})
    drawn, _ = charts.specification(charts.strip(values, values.assign(mean=1.0, low=1.0, high=1.0), arms, "loss"))
    assert [p["value"] for p in drawn["params"] if p["name"] == "arms"] == [arms]
