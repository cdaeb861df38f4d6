"""Claims about runs of another trainer: what they prove, what has to be waived, and the verdict."""

import json
import math

import numpy as np
import pytest
import yaml

from albert_ablate.cli import main
from albert_ablate.config import ConfigError
from albert_ablate.judge.claims import read_claims
from albert_ablate.judge.ledger import judge
from albert_ablate.stats.verdicts import Claim, Contrast, verdicts

BASE, WIDE = [3.30, 3.25, 3.35, 3.28, 3.31, 3.27], [3.21, 3.15, 3.24, 3.19, 3.23, 3.16]
WAIVED = ["data_order", "tuning", "tokens"]


def table(folder, skip=(), more=""):
    rows = [(a, s, v) for a, own in (("base", BASE), ("wide", WIDE)) for s, v in zip((3, 7, 11, 42, 43, 1337), own)]  # noqa: B905
    text = "".join(f"{a},{s},{v},{1 - v / 10:.4f},adam\n" for a, s, v in rows if (a, s) not in skip)
    file = folder / "runs.csv"
    file.write_text(f"arm,seed,test_loss,accuracy_top1,optimizer\n{text}{more}")
    return file


def claims(folder, arms=None, **claim):
    part = {"treatment": "wide", "control": "base", "measure": "test_loss"} | claim.pop("part", {})
    tree = {
        "arms": arms or {"base": ["arm=base"], "wide": ["arm=wide"]},
        "regimes": {"theirs": {"text": "in their runs", "overrides": []}},
        "claims": [
            {"name": "wide", "statement": "Wide is better.", "parts": [part], "waives": WAIVED,
             "screen": {"regime": "theirs", "N": 6}} | claim
        ],
    }  # fmt: skip
    (folder / "claims.yaml").write_text(yaml.safe_dump(tree))
    return read_claims(folder / "claims.yaml")


def test_the_verdict_is_that_of_the_differences(tmp_path):
    (entry,) = judge(claims(tmp_path), table(tmp_path))["claims"]
    d = np.log(BASE) - np.log(WIDE)
    (expected,) = verdicts([Claim([Contrast(d, math.log(1.005))], 6)], 1)
    assert entry["verdict"] == expected.verdict == "supported" and entry["p_effect"] == expected.p_effect
    assert entry["parts"][0]["seeds"] == [3, 7, 11, 42, 43, 1337]
    assert entry["parts"][0]["d"] == pytest.approx(d) and entry["parts"][0]["mean"] == pytest.approx(
        expected.parts[0].mean
    )
    assert any("Not proven" in n and "the order of the data" in n for n in entry["notes"])


def test_arms_that_differ_in_a_slash_alone_are_two(tmp_path):
    lines = [f"{a},{s},{v}" for a, own in (("a/b", BASE), ("a_b", WIDE)) for s, v in enumerate(own)]
    (tmp_path / "t.csv").write_text("\n".join(["arm,seed,test_loss", *lines]))
    (entry,) = judge(claims(tmp_path, arms={"base": ["arm=a/b"], "wide": ["arm=a_b"]}), tmp_path / "t.csv")["claims"]
    assert entry["verdict"] == "supported" and entry["cost"]["runs"] == 12


@pytest.mark.parametrize("waived", [[], ["tuning"], ["data_order", "tokens"]])
def test_what_is_not_proven_has_to_be_waived(tmp_path, waived):
    (entry,) = judge(claims(tmp_path, waives=waived), table(tmp_path))["claims"]
    missing = [w for w in WAIVED if w not in waived]
    assert entry["verdict"] == "inadmissible" and f"waives: [{', '.join(missing)}]" in entry["reason"]


def test_tokens_that_are_there_need_no_waiver_and_must_be_equal(tmp_path):
    rows = [(a, s, v, t) for a, own, t in (("base", BASE, 100), ("wide", WIDE, 100)) for s, v in enumerate(own)]
    for changed, verdict in ((100, "supported"), (200, "inadmissible")):
        lines = [f"{a},{s},{v},{changed if (a, s) == ('wide', 5) else t}" for a, s, v, t in rows]
        (tmp_path / "t.csv").write_text("\n".join(["arm,seed,test_loss,tokens", *lines]))
        (entry,) = judge(claims(tmp_path, waives=["data_order", "tuning"]), tmp_path / "t.csv")["claims"]
        assert entry["verdict"] == verdict
    assert "tokens must be equal; wide has 200 and base 100 (seed 5)" in entry["reason"]


def test_other_columns_are_measures_with_a_direction(tmp_path):
    part = {"measure": "column.accuracy_top1", "direction": "higher", "margin": 0.001}
    (entry,) = judge(claims(tmp_path, part=part), table(tmp_path))["claims"]
    d = (np.array(BASE) - np.array(WIDE)) / 10
    assert entry["parts"][0]["d"] == pytest.approx(d) and entry["parts"][0]["unit"] == "accuracy_top1"
    part = {"measure": "ratio.accuracy_top1", "direction": "higher"}
    (entry,) = judge(claims(tmp_path, part=part), table(tmp_path))["claims"]
    assert entry["parts"][0]["d"] == pytest.approx(np.log(1 - np.array(WIDE) / 10) - np.log(1 - np.array(BASE) / 10))


def test_a_missing_seed_holds_up_those_behind_it(tmp_path):
    (entry,) = judge(claims(tmp_path), table(tmp_path, skip=[("wide", 11)]))["claims"]
    assert entry["parts"][0]["pairs"] == 2
    assert "Seed 11 of wide is missing, and 3 pairs wait behind it." in entry["notes"]


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ({"base": ["arm=base"], "wide": ["arm=wyde"]}, "has no arm wyde: it has wide, base"),
        ({"base": ["arm=base"], "wide": ["norm=pre_ln"]}, "has no column norm"),
        ({"base": ["arm=base"], "wide": ["optimizer=sgd"]}, "has no optimizer sgd: it has adam"),
    ],
)
def test_an_arm_that_is_not_there_is_said(tmp_path, arms, says):
    with pytest.raises(ConfigError, match=says):
        judge(claims(tmp_path, arms=arms), table(tmp_path))


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        ({"part": {"measure": "grad_norm"}}, "has no grad_norm over its training"),
        ({"part": {"measure": "sharpness", "margin": 0.1}}, "sharpness needs runs of this project"),
        ({"part": {"measure": "column.bleu", "margin": 0.1}}, "has no bleu"),
        ({"arms": {"base": ["arm=base"], "wide": ["optimizer=adam"]}}, "more than once"),
        ({"arms": {"base": ["arm=base"], "wide": ["arm=base", "optimizer=adam"]}}, "are the same runs"),
    ],
)
def test_what_such_runs_cannot_answer_is_inadmissible(tmp_path, claim, says):
    (entry,) = judge(claims(tmp_path, **claim), table(tmp_path))["claims"]
    assert entry["verdict"] == "inadmissible" and says in entry["reason"]


def test_the_command_writes_beside_the_table(tmp_path, capsys):
    file = table(tmp_path, more="deep,3,3.0,0.7,adam\n")
    claims(tmp_path)
    assert main(["judge", str(tmp_path / "claims.yaml"), "--runs", str(file)]) == 0
    ledger = json.loads((tmp_path / "runs.csv.judge" / "ledger.json").read_text())
    assert "registered with 12 of 12 runs there" in ledger["claims"][0]["registration"]
    assert main(["judge", str(tmp_path / "claims.yaml"), "--runs", str(file), "--run"]) == 2
    assert "--run is not possible" in capsys.readouterr().err


def test_a_waiver_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"waives=.* is not allowed"):
        claims(tmp_path, waives=["everything"])
