"""W&B mirrors the run folder, offline and online, and can do a run no harm. The server is a stand-in on loopback."""

import itertools
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
from forking import Ambush, Child, forked, outcome
from mlflow_server import MlflowServer
from tracked import configured, expected, killed_once_sent, nothing_leaked, offline_rows, own, points, prepared, session
from wandb_server import Server

from albert_ablate import cli
from albert_ablate.trackers import wandb as mirror
from albert_ablate.training.run import run

pytestmark = pytest.mark.process


@pytest.mark.parametrize("moments", [(250,), pytest.param((150, 300), marks=pytest.mark.slow)])
def test_online_a_killed_run_gone_on_with_has_every_row_once(moments, text, untracked, tmp_path, elsewhere):
    cfg = configured(text, tmp_path / "runs", "wandb")
    with Server() as server:
        for moment in moments:
            assert 0 < len(killed_once_sent(cfg, elsewhere, server, moment)["history"]) < 33
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
def test_a_server_that_fails_at_the_start_does_no_harm(mode, text, untracked, tmp_path, elsewhere, capfd):
    with Server(mode) as server:
        record = forked(session(configured(text, tmp_path / "runs", "wandb"), elsewhere, server.url, patience=1))
    assert outcome(record["folder"]) == outcome(untracked["folder"])
    assert "the run continues" in capfd.readouterr().err
    if mode == "silent":
        assert [own(row) for row in offline_rows(Path(record["folder"]))[0]] == expected(Path(record["folder"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        *itertools.product(["wandb"], ["silent", "refuse", "error", "nonsense", "client", "frozen client"]),
        *itertools.product(["mlflow"], ["silent", "error", "nonsense", "redirect"]),
    ],
)
def test_a_loss_in_mid_run_is_one_sentence_and_sync_mends_it(kind, loss, text, untracked, tmp_path, elsewhere, capfd):
    if kind == "mlflow":
        pytest.importorskip("mlflow", reason="pip install 'albert_ablate[mlflow]'")
    reader, writer = os.pipe()
    cfg = configured(text, tmp_path / "runs", kind)

    def lose() -> None:
        if "client" in loss:  # wandb's own process
            number = "-STOP" if "frozen" in loss else "-KILL"
            subprocess.run(["pkill", number, "-P", str(os.getpid()), "wandb-core"], check=True)
        os.write(writer, b"x")

    def work() -> dict:
        os.environ["MLFLOW_TRACKING_URI"] = server.url
        Ambush(150, lose).set()
        return run(cfg)

    def send() -> int:
        os.environ["MLFLOW_TRACKING_URI"] = server.url
        return cli.main(["sync", record["folder"], "--to", kind])

    with Server() if kind == "wandb" else MlflowServer() as server:
        server.elsewhere = "http://localhost:9/"
        child = Child(prepared(work, elsewhere, server.url))
        os.read(reader, 1)
        if "client" not in loss:
            server.mode = loss
        outcome_kind, record = child.wait()
        assert outcome_kind == "value"
        assert outcome(record["folder"]) == outcome(untracked["folder"])
        said = capfd.readouterr().err.strip()
        assert f"`albert-ablate sync {record['folder']} --to {kind}` sends what is missing" in said and "\n" not in said
        server.mode = "well"
        assert forked(prepared(send, elsewhere, server.url)) == 0
        if kind == "wandb":
            (sent,) = server.runs.values()
            assert [own(row) for row in sent["history"]] == expected(Path(record["folder"]))
        else:
            assert server.points().items() >= points(record["folder"]).items()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_redirection_of_a_tracker_does_not_carry_its_key(kind, text, tmp_path, elsewhere):
    """To another host: the clients are other people's, so this watches them."""
    if kind == "mlflow":
        pytest.importorskip("mlflow", reason="pip install 'albert_ablate[mlflow]'")
    with Server() as other, Server("redirect") as server:
        server.elsewhere = other.url.replace("127.0.0.1", "localhost") + "/api"

        def work() -> dict:
            os.environ["MLFLOW_TRACKING_URI"] = server.url.replace("//", "//user:password@")
            return run(configured(text, tmp_path / "runs", kind, "budget.tokens=256"))

        assert forked(prepared(work, elsewhere, server.url))["status"] == "finished"
        assert any(key.startswith("Basic ") for key in server.keys) and other.keys == {""}


def test_the_state_of_a_run_on_wandb_says_whether_it_goes_on(tmp_path, elsewhere):
    cases = {
        "finished": (0, False),
        "diverged": (0, False),
        "stopped": (143, True),
        "failed": (1, False),
    }

    def work() -> None:
        for status in cases:
            tracker, folder = mirror.Wandb(), tmp_path / status
            folder.mkdir()
            record = {"identity": status, "arm": "arm", "setting": "set", "label": "label", "config": {"seed": 0}}
            tracker.start(folder, record, {})
            tracker.send({"steps": [dict.fromkeys(mirror.AXES, 0) | {"loss": math.inf, "grad_norm": math.nan}]})
            summary = {"val_loss": math.nan, "gap": None}
            tracker.start_closing({**record, "status": status, "signal": 15, "summary": summary})
            tracker.wait_closed()

    with Server() as server:
        forked(prepared(work, elsewhere, server.url, patience=30))
        for status, (code, goes_on) in cases.items():
            sent = server.runs[status]
            summary = json.loads(sent["summary"])
            assert (sent["exit"], sent["preempting"], summary["status"]) == (code, goes_on, status)
            assert str(sent["history"][0]["train/grad_norm"]).lower() == "nan"
