"""Loggers of Lightning's and Trackio as mirrors of the run folder."""

import csv
import json
import math
import os
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from forking import forked
from tracked import configured, points, session

from albert_ablate.config import ConfigError
from albert_ablate.trackers.base import AXES, Several, joined
from albert_ablate.trackers.lightning import LightningTracker, lightning_logger

RECORD = {
    "identity": "id", "arm": "arm", "setting": "set", "label": "label", "name": "norm=x", "seed": 0, "sessions": 1,
    "created": 1e9, "status": "finished", "summary": {"val_loss": 2.5}, "config": {"seed": 0},
}  # fmt: skip


class Kept:
    """A logger as Lightning asks for one."""

    def __init__(self):
        self.rows, self.params, self.ended = [], {}, None

    def log_hyperparams(self, params):
        self.params = params

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))

    def save(self):
        pass

    def finalize(self, status):
        self.ended = status


def row(step):
    return dict.fromkeys(AXES, step) | {"loss": 3.0 - step, "lr": 0.5, "grad_norm": 1.0, "clipped": 0.0}


def test_a_run_that_goes_on_sends_what_is_missing(tmp_path):
    first, second = Kept(), Kept()
    mirror = LightningTracker(first)
    mirror.begin(tmp_path, RECORD, {"steps": [row(1)]})
    mirror.push({"steps": [row(2)]})
    on = LightningTracker(second)
    on.begin(tmp_path, RECORD, {"steps": [row(1), row(2), row(3)]})
    on.end(RECORD)
    assert [s for s, _ in first.rows] == [1, 2] and [s for s, _ in second.rows] == [3, 3]
    assert second.rows[0][1]["train/loss"] == 0.0 and second.rows[1][1] == {"summary/val_loss": 2.5}
    assert (first.ended, second.ended) == (None, "success") and second.params["run"] == "norm=x seed=0"
    other = LightningTracker(Kept())
    other.begin(tmp_path, RECORD | {"identity": "another"}, {"steps": [row(1)]})  # notes of another run do not count
    assert [s for s, _ in other.logger.rows] == [1]


def test_several_options_may_hold_a_logger_of_lightning():
    (one,) = joined({"csv": SimpleNamespace()}).trackers
    assert isinstance(joined({}), Several) and isinstance(one, LightningTracker)


@pytest.mark.process
def test_the_file_of_lightnings_logger_has_every_number(text, tmp_path, elsewhere):
    options = f"{{save_dir: {tmp_path}, name: mine, version: 0}}"
    cfg = configured(text, tmp_path / "runs", "lightning", f"logger.options={options}")
    record = forked(session(cfg, elsewhere))
    wanted = points(record["folder"])
    found = {}
    for line in csv.DictReader((tmp_path / "mine" / "version_0" / "metrics.csv").open()):
        found |= {(k, int(line["step"])): float(v) for k, v in line.items() if v and k not in ("step", *AXES)}
    summary = {key: found.pop(key) for key in list(found) if key[0].startswith("summary/")}
    assert found == pytest.approx(wanted, nan_ok=True) and len(found) > 150
    assert summary["summary/val_loss", 4096] == record["summary"]["val_loss"]
    assert "setting: " + record["setting"] in (tmp_path / "mine" / "version_0" / "hparams.yaml").read_text()


@pytest.mark.process
def test_trackio_has_every_number(text, tmp_path, elsewhere, monkeypatch):
    if find_spec("trackio") is None:  # its import would take the folder from the environment before the test sets it
        pytest.skip("pip install 'albert_ablate[trackio]'")
    os_dir = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(os_dir))
    cfg = configured(text, tmp_path / "runs", "trackio", "logger.project=mine")
    record = forked(session(cfg, elsewhere))
    rows = sqlite3.connect(os_dir / "mine.db").execute("select step, metrics from metrics").fetchall()
    found = {(k, step): v for step, text_ in rows for k, v in json.loads(text_).items() if not k.startswith("__")}
    found = {k: math.nan if v == "NaN" else v for k, v in found.items()}
    wanted = points(record["folder"])
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, nan_ok=True)
    assert found["summary/val_loss", 4096] == record["summary"]["val_loss"]
    assert os.listdir(os_dir) and Path(record["folder"], "sent_to_loggers.json").exists()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("CsvLogger", {}, "logger.name=CsvLogger is not allowed: it is one of CSVLogger"),
        ("CSVLogger", {"folder": "x"}, "CSVLogger does not take logger.options="),
        ("CometLogger", {}, "CometLogger needs a package that is not installed"),
    ],
)
def test_a_logger_that_cannot_be_made_is_one_sentence(name, options, says):
    with pytest.raises(ConfigError, match=says):
        lightning_logger(name, options)
