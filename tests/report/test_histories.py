"""What a report keeps of histories between two reports, and when it reads them again."""

import json

import numpy as np
import pandas as pd
import pytest
from factories import make_run, write

from albert_ablate.analysis.thinning import depth_map
from albert_ablate.cli import main
from albert_ablate.records.cache import cache_folder
from albert_ablate.report import histories, html, report
from albert_ablate.report.material import gather


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in (0, 1):
        for norm in ("pre_ln", "post_ln"):
            make_run(tmp_path / "runs", {"norm": norm}, seed, steps=60)
    return tmp_path / "runs"


def read(runs, monkeypatch):
    """The curves, and of how many histories the files were read."""
    asked = []
    monkeypatch.setattr(histories, "read_history", lambda *a, f=histories.read_history: (asked.append(a), f(*a))[1])
    m = gather(runs, None)
    return m.histories, m, len(asked)


def test_unchanged_histories_are_not_read_again(runs, monkeypatch):
    first, _, asked = read(runs, monkeypatch)
    assert asked == 8  # evaluations and steps of four runs
    again, m, asked = read(runs, monkeypatch)
    assert asked == 0
    pd.testing.assert_frame_equal(first.evals, again.evals)
    pd.testing.assert_frame_equal(first.batches, again.batches)
    changed = m.rows["folder"].iloc[0]
    rows = {"tokens": [0.0, 9.0], "step": [0, 9], "split": ["validation"] * 2, "loss": [5.0, 1.5]}
    write(type(runs)(changed), "evals", rows)
    third, _, asked = read(runs, monkeypatch)
    assert asked == 2 and third.evals[third.evals["run"] == 0]["loss"].tolist() == [5.0, 1.5]
    kept, before = (h.evals[h.evals["run"] == 1].reset_index(drop=True) for h in (third, first))
    pd.testing.assert_frame_equal(kept, before)


def test_a_damaged_cache_is_made_anew(runs, monkeypatch):
    first, _, _ = read(runs, monkeypatch)
    (file,) = cache_folder().rglob("curves-*.arrow")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    again, _, asked = read(runs, monkeypatch)
    assert asked == 8 and again.evals.equals(first.evals)


def test_maps_of_depth_are_kept_as_they_were(runs, monkeypatch):
    m = gather(runs, None)
    first, again = (histories.read_maps(runs, m.rows, {}, ("grad_norm", "entropy"), 12) for _ in range(2))
    from albert_ablate.records.history import read_history

    layers = read_history(type(runs)(m.rows["folder"].iloc[0]), "layers", None).to_pandas()
    for maps in (first[0], again[0]):
        assert set(maps) == {"grad_norm", "entropy"}
        for quantity, cells in maps.items():
            pd.testing.assert_frame_equal(cells, depth_map(layers, quantity, 12), check_dtype=False)


def test_a_page_is_written_again_only_when_something_changed(runs, tmp_path, monkeypatch):
    pytest.importorskip("vl_convert")
    monkeypatch.setattr(report, "SECTIONS", (report.methods_section,))
    made = []
    monkeypatch.setattr(html, "html", lambda p: (made.append(p), "<p>page</p>")[1])
    target = tmp_path / "report.html"

    def times(*more):
        before = len(made)
        assert main(["report", str(runs), "-o", str(target), *more]) == 0
        return len(made) - before

    assert [times(), times()] == [1, 0]
    target.write_text(target.read_text().replace("page", "edited"))
    assert [times(), times()] == [1, 0]
    assert times("--baseline", "norm=post_ln") == 1
    record = next(runs.glob("*/seed1/record.json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"label": "another"}))
    assert [times("--baseline", "norm=post_ln"), times("--baseline", "norm=post_ln")] == [1, 0]


def test_a_page_with_a_warning_says_it_again(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("vl_convert")
    monkeypatch.setattr(report, "SECTIONS", (report.curves_section,))
    next(runs.glob("*/seed1/steps.arrow")).write_bytes(b"torn")
    for _ in range(2):
        assert main(["report", str(runs), "-o", str(tmp_path / "report.html")]) == 0
        assert "Histories of 1 run cannot be read" in capsys.readouterr().err


def test_a_map_joins_sublayers_as_pandas_does():
    rng, steps, layers = np.random.default_rng(0), 30, 5
    n = steps * layers * 2
    rows = pd.DataFrame({"step": np.repeat(np.arange(steps), layers * 2), "weight_norm": rng.random(n)})
    rows["tokens"], rows["layer"] = rows["step"] * 10, np.tile(np.repeat(np.arange(layers), 2), steps)
    rows["sublayer"], rows["grad_norm"] = np.tile(["attention", "mlp"], n // 2), rng.lognormal(size=n)
    rows["entropy"] = np.where(rng.random(n) < 0.3, np.nan, rng.random(n))
    rows["update_ratio"] = rng.random(n)
    each = rows.assign(square=rows["grad_norm"] ** 2, changed=(rows["update_ratio"] * rows["weight_norm"]) ** 2)
    each["weight"] = each["weight_norm"] ** 2
    block = each.groupby(["step", "layer"])[["square", "changed", "weight"]].sum()
    block["entropy"] = each.groupby(["step", "layer"])["entropy"].min()
    block["grad_norm"], block["update_ratio"] = block["square"] ** 0.5, (block["changed"] / block["weight"]) ** 0.5
    block = block.reset_index().assign(column=lambda t: t["step"] // 3)  # ten columns of three steps
    for quantity, worst in (("grad_norm", "max"), ("update_ratio", "max"), ("entropy", "min")):
        expected = block.groupby(["column", "layer"])[quantity].agg(worst).dropna()
        found = depth_map(rows, quantity, 10).set_index(["tokens", "layer"])["value"]
        np.testing.assert_allclose(found.to_numpy(), expected.to_numpy())
