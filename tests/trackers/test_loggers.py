"""TensorBoard, MLflow and several trackers at once mirror the run folder; `sync` sends finished folders, each once."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from factories import write
from forking import Child, forked, outcome
from tracked import configured, expected, killed_once_sent, nothing_leaked, offline_rows, own, points, prepared, session
from wandb_server import Server

from albert_ablate import cli
from albert_ablate.config import ConfigError, check, compose, to_container
from albert_ablate.records import store
from albert_ablate.records.history import read_history
from albert_ablate.trackers import base as tracker
from albert_ablate.trackers.base import AXES

INSTALLED = {"tensorboard": "tensorboard", "mlflow": "mlflow"}


def tensorboard_of(folder: Path | str) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float], Any]:
    """What TensorBoard's own reader finds: metrics, axes and summary, and the reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(f"{folder}/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    found: dict[tuple[str, int], float] = {}
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            assert (tag, event.step) not in found, f"{tag} twice at {event.step}"
            found[tag, event.step] = event.value
    rest = {key: v for key, v in found.items() if key[0] in AXES or key[0].startswith("summary/")}
    return {key: v for key, v in found.items() if key not in rest}, rest, reader


def mlflow_of(store: Path, identity: str) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float], Any]:
    os.environ |= {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store.as_uri())
    experiment = client.get_experiment_by_name("albert_ablate")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.identity = '{identity}'")
    found: dict[tuple[str, int], float] = {}
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            assert (key, metric.step) not in found, f"{key} twice at {metric.step}"
            found[key, metric.step] = metric.value
    rest = {key: v for key, v in found.items() if key[0] in AXES or key[0].startswith("summary/")}
    return {key: v for key, v in found.items() if key not in rest}, rest, run


@pytest.mark.process
def test_a_killed_run_gone_on_with_has_every_row_once_in_each(text, untracked, tmp_path, elsewhere, capfd):
    for name in INSTALLED.values():
        pytest.importorskip(name, reason=f"pip install 'albert_ablate[{name}]'")
    loggers = ("[wandb_offline,tensorboard,mlflow]", "[wandb,tensorboard,mlflow]")
    first, second = (configured(text, tmp_path / "runs", logger) for logger in loggers)
    assert Child(session(first, elsewhere, kill_at=250)).wait() == ("killed", signal.SIGKILL)
    assert "W&B" not in capfd.readouterr().err
    record = forked(session(second, elsewhere))
    assert capfd.readouterr().err.count("W&B: no key found, logging offline") == 1
    folder = Path(record["folder"])
    assert outcome(folder) == outcome(untracked["folder"])
    wanted = points(folder)
    assert len(wanted) > 150

    rows, summary, sent = offline_rows(folder)
    assert [own(row) for row in rows] == expected(folder) and summary["status"] == "finished"
    assert sent == (record["identity"], record["arm"])

    found, rest, reader = forked(lambda: tensorboard_of(folder)[:2] + (None,))
    assert found == pytest.approx(wanted, rel=1e-6)  # float32
    steps = {row["tokens"]: row for row in read_history(folder, "steps", None).to_pylist()}
    for axis in ("step", "seconds", "flops"):
        assert {t: v for (tag, t), v in rest.items() if tag == axis and t} == pytest.approx(
            {t: row[axis] for t, row in steps.items()}, rel=1e-6
        )
    assert rest["summary/val_loss", 4096] == pytest.approx(record["summary"]["val_loss"])

    found, rest, run = forked(lambda: mlflow_of(tmp_path / "runs" / "mlruns", record["identity"]))
    assert found == wanted  # to the last digit
    assert rest["summary/val_loss", 4096] == record["summary"]["val_loss"]
    assert (run.info.status, run.data.tags["status"], run.data.tags["arm"]) == ("FINISHED", "finished", record["arm"])
    assert run.data.params["optimizer.lr"] == "0.03" and run.data.params["dropout.mean"] == "0.1"
    assert run.data.params["norm._target_"] == record["config"]["norm"]["_target_"]
    assert nothing_leaked(folder, elsewhere)


ROW = dict.fromkeys(AXES, 1) | {"loss": math.inf, "lr": 0.5, "grad_norm": math.nan, "clipped": 0.0}
RECORD = {
    "identity": "id",
    "arm": "arm",
    "setting": "set",
    "label": "label",
    "name": "norm=x",
    "seed": 0,
    "sessions": 1,
    "created": 1e9,
}
RECORD |= {"config": {"seed": 0, "norm": {"_target_": "x", "eps": 1e-5}, "dropout": {"sites": ["hidden"]}}}
ENDS = {
    "finished": ("STATUS_SUCCESS", "FINISHED"),
    "diverged": ("STATUS_SUCCESS", "FINISHED"),
    "stopped": ("STATUS_UNKNOWN", "KILLED"),
    "failed": ("STATUS_FAILURE", "FAILED"),
    "running": ("STATUS_FAILURE", "FAILED"),  # a session that ended without a word
}


@pytest.mark.parametrize("status", ENDS)
def test_tensorboard_holds_configuration_and_outcome(status, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'albert_ablate[tensorboard]'")
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Status

    from albert_ablate.trackers.tensorboard import TensorBoard

    board = TensorBoard()
    board.open(tmp_path, RECORD, {})
    board.send({"steps": [ROW]})
    board.close({**RECORD, "status": status, "summary": {"val_loss": math.nan, "gap": None, "divergence": "stuck"}})
    found, rest, reader = tensorboard_of(tmp_path)
    assert found["train/loss", 1] == math.inf and math.isnan(found["train/grad_norm", 1])
    assert math.isnan(rest["summary/val_loss", 1]) and not [k for k in rest if k[0] in ("summary/gap", "tokens")]
    told = [reader.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in ("config", "status")]
    assert "norm.eps: 1e-05" in told[0] and told[1] == ("failed" if status == "running" else status)
    plugin = reader.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    assert (start.hparams["norm.eps"].number_value, start.group_name) == (1e-5, "id")
    assert start.hparams["dropout.sites"].string_value == '["hidden"]'
    end = metadata.parse_session_end_info_plugin_data(plugin[metadata.SESSION_END_INFO_TAG])
    assert Status.Name(end.status) == ENDS[status][0] and end.end_time_secs == 1e9 + 1


@pytest.mark.parametrize("status", ENDS)
def test_mlflow_holds_how_the_run_ended_and_goes_on(status, tmp_path):
    pytest.importorskip("mlflow", reason="pip install 'albert_ablate[mlflow]'")
    from albert_ablate.trackers.mlflow import MLflow

    folder = tmp_path / "set" / "seed0"
    folder.mkdir(parents=True)
    for known in ([], [ROW]):  # the second session begins with the rows of the first
        flow = MLflow()
        flow.begin(folder, RECORD, {"steps": known})
        assert mlflow_of(tmp_path / "mlruns", "id")[2].info.status == "RUNNING"
        flow.push({"steps": [ROW | {"step": 1 + len(known), "tokens": 1 + len(known)}]})
        flow.end({**RECORD, "status": status, "summary": {"val_loss": math.nan, "gap": None}})
    found, rest, run = mlflow_of(tmp_path / "mlruns", "id")
    assert found["train/loss", 2] == math.inf and math.isnan(found["train/grad_norm", 1])
    assert (run.info.status, run.info.run_name) == (ENDS[status][1], "norm=x seed=0")
    assert run.data.params["norm.eps"] == "1e-05"


@pytest.mark.parametrize("name", INSTALLED)
def test_a_missing_tracker_package_is_refused_before_any_work(name, text, tmp_path, monkeypatch):
    from albert_ablate import run

    for module in [m for m in sys.modules if m.partition(".")[0] == INSTALLED[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(tracker, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"is not installed: pip install 'albert_ablate\[{name}\]'\.$"):
        run(configured(text, tmp_path / "runs", f"[wandb_offline,{name}]"))
    assert not (tmp_path / "runs").exists()


class Faulty(tracker.Tracker):
    NAME = "Faulty"

    def __init__(self, at: str):
        super().__init__()
        self.at, self.called = at, []

    def _do(self, name: str, *args: Any) -> None:
        self.called.append(name)
        if name == self.at:
            raise OSError("no\nluck")

    begin, push, end = (lambda self, *args, n=n: self._do(n) for n in ("begin", "push", "end"))


@pytest.mark.parametrize("at", ["begin", "push", "end"])
def test_a_tracker_that_fails_says_so_once_and_the_others_go_on(at, capsys):
    bad, good = Faulty(at), Faulty("never")
    both = tracker.joined({"bad": bad, "good": good})
    both.open(Path(), RECORD, {})
    both.send({})
    both.send({})
    both.close(RECORD)
    assert good.called == ["begin", "push", "push", "end"]
    assert bad.called == {"begin": ["begin"], "push": ["begin", "push"], "end": good.called}[at]
    assert capsys.readouterr().err == "Faulty failed and the run continues (OSError: no luck).\n"


@pytest.mark.process
@pytest.mark.slow
def test_a_run_whose_tracker_cannot_write_ends_as_without_it(text, untracked, tmp_path, elsewhere, capfd):
    pytest.importorskip("tensorboard", reason="pip install 'albert_ablate[tensorboard]'")
    cfg = configured(text, tmp_path / "runs", "[tensorboard,wandb_offline]")
    folder = tmp_path / "runs" / untracked["setting"] / "seed0"
    folder.mkdir(parents=True)
    (folder / "tensorboard").write_text("in the way")
    record = forked(session(cfg, elsewhere))
    assert capfd.readouterr().err.count("TensorBoard failed and the run continues") == 1
    assert outcome(record["folder"]) == outcome(untracked["folder"])
    assert [own(row) for row in offline_rows(folder)[0]] == expected(folder)


# --- several on the command line -------------------------------------------------------------------------------------


def test_several_loggers_are_a_list_with_own_settings():
    cfg = compose(["logger=[wandb_offline,mlflow]", "logger.wandb_offline.project=mine", "logger.mlflow.experiment=x"])
    assert cfg.choices.logger == "[mlflow,wandb_offline]"
    assert set(cfg.logger) == {"wandb_offline", "mlflow"}
    assert (cfg.logger.wandb_offline.mode, cfg.logger.wandb_offline.project) == ("offline", "mine")
    assert (cfg.logger.mlflow.experiment, cfg.logger.mlflow.uri) == ("x", None)
    assert check(cfg) == check(to_container(check(cfg)))
    assert compose(["logger=[wandb]", "logger.project=x"]) == compose(["logger=wandb", "logger.project=x"])
    for first, last in (("wandb", "[tensorboard,mlflow]"), ("[tensorboard,mlflow]", "wandb"), ("none", "[mlflow]")):
        assert compose([f"logger={first}", f"logger={last}"]).logger == compose([f"logger={last}"]).logger


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["logger=[tensorbord,mlflow]"], "logger=tensorbord is not an option: logger is one of tensorboard"),
        (["logger=[none,mlflow]"], "each once, and not none"),
        (["logger=[mlflow,mlflow]"], "each once, and not none"),
        (["logger=[]"], "a list names one or more options"),
        (["logger=[mlflow],none"], "one list a command"),
        (["logger=[wandb,wandb_offline]"], "two of them are one tracker"),
        (["logger=[mlflow,wandb]", "logger.project=x"], "logger.project=x is not allowed: with logger="),
        (["logger=[mlflow,wandb]", "logger.tensorboard.x=1"], "is not allowed: with logger="),
        (["logger=[mlflow,wandb]", "logger.wandb.projct=x"], "logger.wandb.projct=x is unknown"),
        (["logger=[mlflow,wandb]", "logger.wandb.mode=x"], "logger.wandb.mode=x is not allowed: it must be online"),
    ],
)
def test_a_wrong_list_of_loggers_is_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(ConfigError) as refused:
        compose(overrides)
    assert sentence in str(refused.value) and str(refused.value).count("\n") == 0


@pytest.mark.process
def test_trackers_are_imported_only_where_asked_for():
    code = "import sys; sys.modules['torch'] = None\n"
    code += "\n".join(f"import albert_ablate.trackers.{m}" for m in ("base", "tensorboard", "mlflow", "wandb", "sync"))
    code += "\nassert not {'tensorboard', 'mlflow', 'wandb', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- sync ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(untracked, tmp_path) -> Path:
    """A finished run, a copy that diverged, one that is still to go on."""
    for name, status in (("a", "finished"), ("b", "diverged"), ("c", "stopped")):
        folder = tmp_path / "runs" / name / "seed0"
        shutil.copytree(untracked["folder"], folder)
        store.write(folder, {**store.read(folder), "status": status, "identity": name})
        for file in folder.glob("*.arrow"):  # histories name the run that they are of, unless an old release wrote them
            with pa.OSFile(str(file)) as source:
                columns = pa.ipc.open_file(source).read_all()
            write(folder, file.stem, {name: columns[name] for name in columns.column_names})
    return tmp_path / "runs"


def synced(runs: Path, elsewhere: Path, url: str | None, *arguments: str, key: bool = True) -> Callable[[], int]:
    def work() -> int:
        if not key:
            del os.environ["WANDB_API_KEY"]
        return cli.main(["sync", str(runs), *arguments])

    return prepared(work, elsewhere, url)


def notes(runs: Path) -> list[str]:
    return sorted(f.parent.parent.name for f in runs.rglob("synced.json"))


@pytest.mark.process
def test_sync_sends_each_finished_run_once_and_mends_a_loss(runs, elsewhere, capfd):
    lost = {"b"}

    class Lossy(Server):
        def _stream(self, name: str, body: dict) -> dict:
            return {} if name in lost else super()._stream(name, body)  # takes rows and keeps none

    options = ("--project", "mine", "--entity", "team")
    with Lossy() as server:
        assert forked(synced(runs, elsewhere, server.url, *options)) == 1
        told = capfd.readouterr()
        assert "the server did not receive every row" in told.err and "1 sent before it" in told.err
        assert notes(runs) == ["a"]
        lost.clear()
        assert forked(synced(runs, elsewhere, server.url, *options)) == 0
        told = capfd.readouterr()
        assert set(server.runs) == {"a", "b"} and notes(runs) == ["a", "b"]
        assert f"{runs}/c/seed0 is stopped, not sent." in told.out
        assert "1 sent to W&B 127.0.0.1" in told.out and "1 had been sent before" in told.out
        for name, status in (("a", "finished"), ("b", "diverged")):
            sent = server.runs[name]
            assert [own(row) for row in sent["history"]] == expected(runs / name / "seed0")
            assert (json.loads(sent["summary"])["status"], sent["exit"]) == (status, 0)
            assert (sent["project"], sent["entity"]) == ("mine", "team")
        before = json.dumps(server.runs), len(server.requests)
        assert forked(synced(runs, elsewhere, server.url, *options)) == 0
        assert (json.dumps(server.runs), len(server.requests)) == before
        assert "Nothing sent to W&B" in (out := capfd.readouterr().out) and "2 had been sent before" in out
    assert [f for f in elsewhere.rglob("*") if f.is_file()] == [] == list(runs.rglob("wandb"))
    assert nothing_leaked(runs, elsewhere)


@pytest.mark.process
@pytest.mark.slow
def test_sync_where_the_server_has_part_of_a_run_sends_the_rest(text, runs, untracked, tmp_path, elsewhere):
    with Server() as server:
        cfg = configured(text, tmp_path / "live", "wandb")
        sent = killed_once_sent(cfg, elsewhere, server, 300)
        assert 0 < len(sent["history"]) < 33
        assert forked(synced(Path(untracked["folder"]), elsewhere, server.url)) == 0
        assert len(server.runs) == 1
        rows = [{k: v for k, v in own(row).items() if k != "seconds"} for row in sent["history"]]
        wanted = [{k: v for k, v in row.items() if k != "seconds"} for row in expected(Path(untracked["folder"]))]
        assert rows == wanted
    (Path(untracked["folder"]) / "synced.json").unlink()


@pytest.mark.process
@pytest.mark.parametrize(
    ("mode", "key", "code", "sentence"),
    [
        ("well", False, 2, "W&B has no key: set WANDB_API_KEY or call `wandb login`."),
        ("refuse", True, 1, "could not be sent to W&B"),
        pytest.param("silent", True, 1, "could not be sent to W&B", marks=pytest.mark.slow),
    ],
)
def test_a_failed_sync_is_one_sentence_and_marks_nothing(mode, key, code, sentence, runs, elsewhere, capfd):
    with Server(mode) as server:
        assert forked(synced(runs, elsewhere, server.url, key=key)) == code
    said = capfd.readouterr().err.strip()
    assert sentence in said and said.count("\n") == 0
    assert notes(runs) == []


@pytest.mark.process
@pytest.mark.parametrize("to", INSTALLED)
def test_sync_to_a_local_tracker_gives_what_a_live_one_has(to, runs, capsys):
    pytest.importorskip(INSTALLED[to], reason=f"pip install 'albert_ablate[{to}]'")
    assert cli.main(["sync", str(runs / "a"), "--to", to]) == 0 == cli.main(["sync", str(runs / "a"), "--to", to])
    assert "Nothing sent" in capsys.readouterr().out
    folder = runs / "a" / "seed0"
    found = tensorboard_of(folder)[0] if to == "tensorboard" else mlflow_of(runs / "mlruns", "a")[0]
    assert found == pytest.approx(points(folder), rel=1e-6)


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["NOWHERE"], "NOWHERE does not exist"),
        (["RUNS", "--to", "tensorboard", "--entity", "team"], "--entity team is not allowed"),
        (["RUNS", "--to", "tensorboard", "--project", "x"], "--project x is not allowed"),
        (["RUNS", "--to", "tensorbord"], "tensorbord"),
    ],
)
def test_a_wrong_sync_is_one_sentence_and_exit_code_2(arguments, sentence, runs, capsys):
    assert cli.main(["sync", *(str(runs) if a == "RUNS" else a for a in arguments)]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and "\n" not in said
