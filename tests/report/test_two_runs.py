"""show RUN RUN_B: two runs on common axes, and their difference."""

import json

import numpy as np
import pandas as pd
import pytest
from factories import edit_record, make_run, write

from albert_ablate.cli import main
from albert_ablate.report import show, two_runs

pytest.importorskip("altair", reason="pip install 'albert_ablate[plot]'")
pytest.importorskip("vl_convert", reason="pip install 'albert_ablate[plot]'")


def beside(one, other):
    return two_runs.combine(show.read_run(one), show.read_run(other))


def histories(folder, tokens, batches, validation):
    at = np.array(tokens)
    axes = {"step": np.arange(1, len(at) + 1), "tokens": at, "seconds": at * 1.0, "flops": at * 1.0}
    steps = {**axes, "loss": batches, "lr": 0.1 + 0 * at, "grad_norm": 1.0 + 0 * at, "clipped": 0.0 * at}
    write(folder, "steps", steps)
    split = ["validation"] * len(at)
    write(folder, "evals", {**axes, "split": split, "loss": validation, "bits_per_byte": validation})


def test_the_difference_is_of_equal_tokens_in_percent(tmp_path):
    one, other = (make_run(tmp_path, {"norm": norm}) for norm in ("pre_ln", "post_ln"))
    histories(one, [10, 20, 30, 40], [4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 2.0, 1.0])
    histories(other, [10, 20, 30], [5.0, 3.0, 1.0], [5.0, 1.0, 2.0])
    two = beside(one, other)
    assert list(two.names) == ["norm=pre_ln", "norm=post_ln"] and two.paired
    held = two.both(lambda run: run.evals.rename(columns={"loss": "y"}))
    found = two_runs.difference(held, two.names)
    assert found.values.tolist() == [[10, 25.0], [20, -50.0], [30, 0.0]]
    assert two_runs.batch_difference(two).values.tolist() == [[10, 25.0], [20, 0.0], [30, -50.0]]
    histories(other, [15, 30], [5.0, 3.0], [5.0, 1.0])  # batches of another size
    assert not beside(one, other).paired


def test_two_runs_are_named_by_what_they_differ_in(tmp_path):
    first = make_run(tmp_path, {"norm": "pre_ln"})
    seed = make_run(tmp_path, {"norm": "pre_ln"}, seed=1)
    other = make_run(tmp_path, {"norm": "post_ln"}, seed=1)
    assert list(beside(first, seed).names) == ["seed 0", "seed 1"]
    assert list(beside(first, other).names) == ["norm=pre_ln, seed 0", "norm=post_ln, seed 1"]
    again = make_run(tmp_path / "again", {"norm": "pre_ln"})
    assert len({*beside(first, again).names}) == 2
    said = [text for s in two_runs.page(beside(first, other)).sections for text in s.text]
    assert any("have not seen the same batches" in text for text in said)


def test_a_ratio_of_maps_is_of_cells_that_both_have():
    one = pd.DataFrame({"tokens": [0, 10], "end": [10, 20], "layer": 1, "value": [2.0, 0.0]})
    other = pd.DataFrame({"tokens": [0, 10, 20], "end": [10, 20, 30], "layer": 1, "value": [6.0, 1.0, 5.0]})
    assert two_runs.change_of_maps(one, other, ratio=True).values.tolist() == [[0, 10, 1, 3.0]]  # 1 / 0 is no ratio
    assert two_runs.change_of_maps(one, other, ratio=False)["value"].tolist() == [4.0, 1.0]


@pytest.mark.parametrize("lost", [None, 200])
def test_two_runs_are_a_page_and_a_picture(tmp_path, lost):
    one, other = make_run(tmp_path, {"norm": "<b>"}), make_run(tmp_path, {"norm": "b"}, lost=lost, full=not lost)
    for name, begins in (("two.html", b"<!doctype html>"), *([] if lost else [("two.png", b"\x89PNG")])):
        assert main(["show", str(one), str(other), "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(begins)
    text = (tmp_path / "two.html").read_text()
    assert "norm=&lt;b&gt;" in text and "norm=<b>" not in text and 'id="filter"' not in text
    content = json.loads(text.split('id="content">')[1].split("</script>")[0])
    assert any("change of the loss (%)" in json.dumps(chart) for chart in content["charts"].values())


def test_runs_that_do_not_go_together_are_one_sentence(tmp_path, capsys):
    one, other = make_run(tmp_path, {"norm": "a"}), make_run(tmp_path, {"norm": "b"}, full=False)
    edit_record(other, data={"task": "topic"})
    out = ["-o", str(tmp_path / "x.html")]
    for second, said in ((one, "is given twice"), (other, "one of them classifies"), (tmp_path, "not a run folder")):
        assert main(["show", str(one), str(second), *out]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "x.html").exists()


def test_different_texts_are_compared_in_bits_per_byte(tmp_path):
    one, other = (make_run(tmp_path, {"norm": norm}, full=False) for norm in "ab")
    for folder, text in ((one, "x"), (other, "y")):
        edit_record(folder, data={"fingerprint": text})
    drawn = two_runs.page(beside(one, other))
    assert "Loss (bits per byte)" in [f.title for f in drawn.sections[0].figures]
    assert any("differ in text" in text for text in drawn.sections[0].text)
