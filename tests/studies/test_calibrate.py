"""`albert-ablate calibrate`: what it prints against numbers worked out from the finals it was given."""

import json
import math

import numpy as np
import pytest
import yaml
from forking import arguments, write_text
from scipy import stats

from albert_ablate.cli import main
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.tuning import FIRST_CALIBRATION_SEED, role
from albert_ablate.stats.sequential import nominal
from albert_ablate.studies.calibrate import calibration
from albert_ablate.studies.launch import Study

NOISE = np.random.default_rng(7).normal(0, 0.01, 24)
SHIFT = {"pre_ln": 0.0, "post_ln": 0.02, "none": math.inf}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def calibrate(text, tmp_path, monkeypatch):
    asked = []

    def complete(self, planned):
        for p in planned:
            asked.append(p)
            k = p.seed - FIRST_CALIBRATION_SEED
            norm = p.cfg["choices"]["norm"]
            loss = 2.0 * math.exp(NOISE[k] + SHIFT[norm] + (NOISE[-k] / 2 if norm == "post_ln" else 0))
            status = "finished" if math.isfinite(loss) else "diverged"
            folder = RunFolder(p.folder)
            folder.create()
            folder.write({"status": status, "seed": p.seed, "summary": {"test_loss": loss}, "cost": {}})
        return {}

    monkeypatch.setattr(Study, "complete", complete)

    def command(*more):
        file = tmp_path / "study.yaml"
        file.write_text(
            "method: grid\nparameters:\n  norm: {values: [pre_ln, post_ln, none]}\n  seed: {values: [0, 1]}\n"
            "command: [python, run.py, '${args_no_hyphens}']\n"
        )
        given = [o for o in arguments(text, tmp_path / "runs") if not o.startswith("paths.runs")]
        return main(["calibrate", str(file), "--runs", str(tmp_path / "runs"), *given, *more])

    command.asked = asked
    return command


def test_spread_and_half_widths_are_those_of_the_formulas(calibrate, tmp_path, capsys):
    assert calibrate() == 0
    (file,) = (tmp_path / "runs" / "calibration").iterdir()
    found = json.loads(file.read_text())
    assert found["spread"][0] == pytest.approx(NOISE.std(ddof=1))
    d = -0.02 - np.array([NOISE[-k] / 2 for k in range(4)])
    entry = found["treatments"]["norm=post_ln"]
    assert entry["mean"] == pytest.approx(d.mean()) and entry["spread"][0] == pytest.approx(d.std(ddof=1))
    wide = stats.t.ppf(1 - nominal(0.05, 20) / 2, 19) * d.std(ddof=1) / math.sqrt(20)
    assert entry["half_widths"]["20"] == pytest.approx(wide)
    assert 0 <= found["false_positives"]["low"] <= found["false_positives"]["high"] <= 0.3
    said = capsys.readouterr().out
    assert "norm=none: 0 of 4 pairs finished: no paired spread" in said and "margin 0.5 %; half-widths" in said
    narrow = stats.t.ppf(1 - nominal(0.1, 20) / 2, 19) * d.std(ddof=1) / math.sqrt(20)
    reach = "within" if narrow <= math.log1p(0.005) else "out of"
    assert f"20 pairs +-{100 * wide:.3g} % (no effect {reach} reach)" in said
    assert "24 runs of norm=pre_ln, 4 of each of 2 treatments; 32 to do" in said
    seeds = sorted(p.seed for p in calibrate.asked if p.label == "norm=pre_ln")
    assert seeds == [FIRST_CALIBRATION_SEED + k for k in range(24)] and role(seeds[0]) == "calibration"


def test_a_plan_takes_the_spread_of_a_calibration(calibrate, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("albert_ablate.studies.price._flops_per_token", lambda cfg: 1e6)
    assert calibrate() == 0
    given = [o for o in arguments(text, tmp_path / "runs") if not o.startswith("paths.runs")]
    claims = tmp_path / "claims.yaml"
    arms = {norm: [f"norm={norm}"] for norm in ("pre_ln", "post_ln", "rezero")}
    sides = {"a": ("post_ln", "pre_ln"), "b": ("pre_ln", "post_ln"), "c": ("rezero", "pre_ln")}
    asked = [
        {
            "name": name, "statement": name, "tuned": [], "screen": {"regime": "r", "N": 12},
            "parts": [{"treatment": treatment, "control": control, "measure": "test_loss"}],
        }
        for name, (treatment, control) in sides.items()
    ]  # fmt: skip
    regime = {"text": "here", "overrides": given}
    claims.write_text(yaml.safe_dump({"arms": arms, "regimes": {"r": regime}, "claims": asked}))

    def said():
        capsys.readouterr()
        code = main(["plan", str(claims), "--runs", str(tmp_path / "runs")])
        return code, "".join(capsys.readouterr())

    code, shown = said()
    paired = np.array([NOISE[-k] / 2 for k in range(4)]).std(ddof=1)
    unpaired = NOISE.std(ddof=1) * math.sqrt(2)
    # a against b is b against a, and an arm that was not calibrated has the unpaired spread of the other
    assert code == 0 and shown.count(f"{100 * math.expm1(paired):.2g} % (of 4 pairs of a calibration)") == 2
    assert f"{100 * math.expm1(unpaired):.2g} % (of 24 calibration runs of one arm, unpaired)" in shown
    (file,) = (tmp_path / "runs" / "calibration").iterdir()
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k != "keys"}))  # of an older release
    code, shown = said()
    assert code == 0 and shown.count("its spread is unknown") == 3
    file.write_text(json.dumps(content | {"unpaired_spread": "wide"}))
    code, shown = said()
    assert code == 2 and f"{file} cannot be read (" in shown and shown.strip().endswith("or calibrate again.")


def test_the_arms_can_be_named(calibrate, capsys):
    assert calibrate("--arm", "norm=post_ln", "--treatment", "norm=pre_ln", "--dry-run") == 0
    assert "24 runs of norm=post_ln, 4 of each of 1 treatments" in capsys.readouterr().out
    assert calibrate(*["--treatment", "norm=none"] * 2, "--dry-run") == 0
    assert "4 of each of 1 treatments" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--arm", "norm=pre_lm"], "has no arm norm=pre_lm"),
        (["--treatment", "norm=pre_ln"], "cannot be a treatment too"),
        (["--count", "10"], "--count=10 is not allowed"),
        (["--measure", "gap"], "--measure=gap is not allowed"),
        (["--margin", "0"], "--margin=0 is not allowed"),
        (["seed=1"], "seed=1 is not allowed"),
    ],
)
def test_what_cannot_be_calibrated_is_one_sentence(calibrate, capsys, more, sentence):
    assert calibrate(*more) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not calibrate.asked


def test_an_arm_that_always_diverges_has_no_spread():
    with pytest.raises(RuntimeError, match="there is no spread"):
        calibration({"a": [math.inf] * 24}, "a", "test_loss", 0.005)
    with pytest.raises(RuntimeError, match="there is no noise"):
        calibration({"a": [2.5] * 24}, "a", "test_loss", 0.005)
