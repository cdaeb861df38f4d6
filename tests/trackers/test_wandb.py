"""W&B mirrors the run folder, offline and online, and can do a run no harm. The server is a stand-in on loopback."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from forking import Ambush, Child, forked, outcome
from tracked import configured, expected, nothing_leaked, offline_rows, own, prepared, session
from wandb_server import Server

from albert_ablate.trackers import wandb as mirror
from albert_ablate.training.run import run


@pytest.mark.parametrize("moments", [(250,), pytest.param((150, 300), marks=pytest.mark.slow)])
def test_online_a_killed_run_gone_on_with_has_every_row_once(moments, text, untracked, tmp_path, elsewhere):
    cfg = configured(text, tmp_path / "runs", "wandb")
    with Server() as server:
        for moment in moments:
            assert Child(session(cfg, elsewhere, server.url, moment)).wait() == ("killed", signal.SIGKILL)
            (sent,) = server.runs.values()
            assert 0 < len(sent["history"]) < 33
        record = forked(session(cfg, elsewhere, server.url))
        (sent,) = server.runs.values()
    folder = Path(record["folder"])
    assert [own(row) for row in sent["history"]] == expected(folder)
    assert outcome(record["folder"]) == outcome(untracked["folder"])
    assert (sent["name"], sent["groupName"]) == (record["identity"], record["arm"])
    config = json.loads(sent["config"])
    assert config["seed"]["value"] == 0
    assert "tokens" in str(config["_wandb"]["value"]["m"])  # the step metric
    summary = json.loads(sent["summary"])
    assert (summary["status"], sent["exit"], sent["preempting"]) == ("finished", 0, False)
    assert summary["val_loss"] == record["summary"]["val_loss"]
    assert nothing_leaked(folder, elsewhere)


@pytest.mark.parametrize("mode", ["silent", pytest.param("null", marks=pytest.mark.slow)])
def test_a_server_that_fails_at_the_start_costs_a_run_seconds_and_nothing_else(
    mode, text, untracked, tmp_path, elsewhere, capfd
):
    began = time.perf_counter()
    with Server(mode) as server:
        record = forked(session(configured(text, tmp_path / "runs", "wandb"), elsewhere, server.url, patience=1))
    assert time.perf_counter() - began < 45
    assert outcome(record["folder"]) == outcome(untracked["folder"])
    assert "the run goes on" in capfd.readouterr().err
    if mode == "silent":
        assert [own(row) for row in offline_rows(Path(record["folder"]))[0]] == expected(Path(record["folder"]))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["silent", "refuse", "error", "nonsense", "client", "frozen client"])
def test_a_server_or_a_client_lost_in_mid_run_costs_it_seconds_and_nothing_else(
    loss, text, untracked, tmp_path, elsewhere
):
    reader, writer = os.pipe()

    def lose() -> None:
        if "client" in loss:  # wandb's own process
            number = "-STOP" if "frozen" in loss else "-KILL"
            subprocess.run(["pkill", number, "-P", str(os.getpid()), "wandb-core"], check=True)
        os.write(writer, b"x")

    def work() -> dict:
        Ambush(150, lose).set()
        return run(cfg)

    cfg = configured(text, tmp_path / "runs", "wandb")
    with Server() as server:
        child = Child(prepared(work, elsewhere, server.url))
        os.read(reader, 1)
        if "client" not in loss:
            server.mode = loss
        began = time.perf_counter()
        kind, record = child.wait()
    assert kind == "value"
    assert time.perf_counter() - began < 45
    assert outcome(record["folder"]) == outcome(untracked["folder"])


def test_the_state_of_a_run_on_wandb_says_whether_it_goes_on(tmp_path, elsewhere):
    cases = {
        "finished": (0, False),
        "diverged": (0, False),
        "stopped": (143, True),
        "failed": (1, False),
    }

    def work() -> None:
        trackers = {status: mirror.Wandb() for status in cases}
        for status, tracker in trackers.items():
            folder = tmp_path / status
            folder.mkdir()
            record = {"identity": status, "arm": "arm", "setting": "set", "label": "label", "config": {"seed": 0}}
            tracker.start(folder, record, {})
            tracker.send({"steps": [dict.fromkeys(mirror.AXES, 1) | {"loss": math.inf, "grad_norm": math.nan}]})
            summary = {"val_loss": math.nan, "gap": None}
            tracker.start_closing({**record, "status": status, "signal": 15, "summary": summary})
        for tracker in trackers.values():
            tracker.wait_closed()

    with Server() as server:
        forked(prepared(work, elsewhere, server.url))
        for status, (code, goes_on) in cases.items():
            sent = server.runs[status]
            summary = json.loads(sent["summary"])
            assert (sent["exit"], sent["preempting"], summary["status"]) == (code, goes_on, status)
            assert str(sent["history"][0]["train/grad_norm"]).lower() == "nan"
