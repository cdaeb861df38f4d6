"""No password, token or key is left in a file, a message, a report or a tracker; what is needed is read again."""

import json
import os
import signal
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from forking import Ambush, Child, arguments, forked, nano, write_text
from mlflow_server import MlflowServer
from tracked import points

from albert_ablate import cli
from albert_ablate.config import ConfigError
from albert_ablate.config.secrets import HANDED_ON, masked, with_password
from albert_ablate.records.folder import RunFolder
from albert_ablate.referee import commands as referee
from albert_ablate.studies.launch import without_passwords
from albert_ablate.studies.wandb_agent.agent import Agent
from albert_ablate.trackers.base import AXES, Tracker, reason
from albert_ablate.training import main as training
from albert_ablate.training.run import run
from run import main as run_main

PASSWORD, TOKEN, ENVIRONMENT = "hunter2-Xy", "hf_" + "aB3" * 12, "q9Zr-environment-key-77"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"see http://user:{PASSWORD}@host:5000/x, and more", "see http://user:***@host:5000/x, and more"),
        (f"postgresql://u:{PASSWORD}@h/db?sslmode=require", "postgresql://u:***@h/db?sslmode=require"),
        ("https://u:p@ss:w@h/x", "https://u:***@h/x"),
        ("https://0123456789abcdef0123@host/x", "https://***@host/x"),
        (f"http://h/x?api_key={PASSWORD}&a=1", "http://h/x?api_key=***&a=1"),
        (f"key {TOKEN}.", "key ***."),
        (f"said {ENVIRONMENT}!", "said ***!"),
        ("http://host:5000/a@b, git@host:x, s3://bucket/key", "http://host:5000/a@b, git@host:x, s3://bucket/key"),
        ("ssh://git@host/x", "ssh://git@host/x"),
    ],
)
def test_secrets_in_texts_are_masked_and_nothing_else(text, wanted, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", ENVIRONMENT)
    assert masked(text) == wanted


def test_options_named_as_secrets_are_masked(monkeypatch):
    monkeypatch.setenv("OTHER_TOKEN", "albert_ablate")  # a word of every configuration
    tree = {
        "logger": {"api_key": "abc", "password": None},
        "tokenizer": {"pad_token": "<pad>"},
        "x": ["albert_ablate.y"],
    }
    assert masked(tree) == tree | {"logger": {"api_key": "***", "password": None}}


def test_a_masked_address_takes_its_password_from_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "ALBERT_ABLATE_TRACKER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    kept = "http://user:***@host:5000/x"
    assert with_password("http://host", "uri") == "http://host"
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        with_password(kept, "uri")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a/b@c")
    assert with_password(kept, "uri") == "http://user:a%2Fb%40c@host:5000/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:other@elsewhere")
    assert with_password(kept, "uri") == "http://user:a%2Fb%40c@host:5000/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{PASSWORD}@host:5000/x")
    assert with_password(kept, "uri") == f"http://user:{PASSWORD}@host:5000/x"


def test_configured_mlflow_address_wins_over_the_environment(monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'albert_ablate[mlflow]'")
    from albert_ablate.trackers.mlflow import MLflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here:1")
    assert (MLflow().uri, MLflow("http://there:2").uri) == ("http://here:1", "http://there:2")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert MLflow().uri is None


@pytest.mark.process
def test_a_tracker_password_is_read_again_on_resume_and_sync(text, tmp_path, capfd):
    """A killed run goes on from the settings of its record, then is sent once more: the password is in no file."""
    pytest.importorskip("mlflow", reason="pip install 'albert_ablate[mlflow]'")
    with MlflowServer() as server:
        uri = server.url.replace("//", f"//user:{PASSWORD}@")

        def begun() -> None:
            Ambush(200).set()
            run(nano(text, tmp_path / "runs", "logger=mlflow", f"logger.uri={uri}"))

        assert Child(begun).wait() == ("killed", signal.SIGKILL)
        (folder,) = (tmp_path / "runs").glob("*/seed0")
        kept = RunFolder(folder).record()["config"]["logger"]
        assert kept["uri"] == uri.replace(PASSWORD, "***")
        cfg = {**nano(text, tmp_path / "runs", "logger=mlflow"), "logger": kept}

        def gone_on() -> tuple[str, int]:
            with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
                run(cfg)
            os.environ["MLFLOW_TRACKING_PASSWORD"] = PASSWORD
            status = run(cfg)["status"]
            os.environ["MLFLOW_TRACKING_URI"] = uri
            return status, cli.main(["sync", str(folder), "--to", "mlflow"])

        assert forked(gone_on) == ("finished", 0)
        sent = {k: v for k, v in server.points().items() if k[0] not in AXES and not k[0].startswith("summary/")}
        assert sent == points(folder)
        assert server.keys == {"Basic " + b64encode(f"user:{PASSWORD}".encode()).decode()}
    said = "".join(capfd.readouterr())
    assert PASSWORD not in said
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and PASSWORD.encode() in f.read_bytes()]


def test_an_old_record_is_read_without_its_password(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "record.json").write_text(
        json.dumps({"status": "finished", "seed": 0, "config": {"logger": {"uri": f"http://u:{PASSWORD}@h"}}})
    )
    assert folder.record() == {"status": "finished", "seed": 0, "config": {"logger": {"uri": "http://u:***@h"}}}
    folder.write({"status": "failed", "error": f"at http://u:{PASSWORD}@h"})
    assert PASSWORD not in (tmp_path / "record.json").read_text()


ADDRESS, HIDDEN = f"http://user:{PASSWORD}@host:5000", "http://user:***@host:5000"
CONFIG = {"logger": {"uri": ADDRESS, "api_key": TOKEN}, "seed": 0}


def test_config_yaml_is_written_without_secrets(tmp_path):
    RunFolder(tmp_path).write_config(CONFIG)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == {"logger": {"uri": HIDDEN, "api_key": "***"}, "seed": 0}


def test_a_sweep_hands_passwords_on_in_the_environment(monkeypatch):
    monkeypatch.setenv(HANDED_ON, "")
    assert without_passwords([f"logger.uri={ADDRESS}", "seed=1"]) == [f"logger.uri={HIDDEN}", "seed=1"]
    assert with_password(HIDDEN, "logger.uri") == ADDRESS


def test_no_secret_is_in_what_a_tracker_or_an_agent_says(monkeypatch, capsys):
    failed = Tracker()
    failed.folder, failed.failure_reported = Path("runs"), False
    failed.report_failure(f"at {ADDRESS}")
    assert capsys.readouterr().err == f"{failed.NAME} failed and the run continues (at {HIDDEN}).\n"
    assert reason(OSError(f"at {ADDRESS}")) == f"OSError: at {HIDDEN}"
    said: list[str] = []
    Agent(None, None, 1, say=said.append).say(f"at {ADDRESS}")  # type: ignore[arg-type]
    assert said == [f"at {HIDDEN}"]


@pytest.mark.parametrize(("kind", "code"), [(ConfigError, 2), (RuntimeError, 1)])
def test_no_secret_of_an_error_is_printed(kind, code, monkeypatch, capsys):
    def refuse(*args: object, **options: object) -> None:
        raise kind(f"{ADDRESS} is not allowed.")

    monkeypatch.setattr(cli, "app", refuse)
    assert cli.main(["show", "x"]) == code
    if kind is ConfigError:
        monkeypatch.setattr(training, "_compose_and_run", refuse)
        monkeypatch.setattr("sys.argv", ["run.py", "seed=1"])
        assert run_main() == 2
    assert set(capsys.readouterr().err.splitlines()) == {f"{HIDDEN} is not allowed."}


def test_no_secret_is_in_a_traceback_that_nobody_foresaw(monkeypatch, capsys):
    def broken(*args: object, **options: object) -> None:
        raise LookupError(ADDRESS)

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr("albert_ablate.referee.compare.compare", broken)
    assert cli.main(["show", "x"]) == 1
    assert referee.compare(["norm=pre_ln", "norm=rezero"]) == 75  # 1 would say REJECT
    said = capsys.readouterr().err
    assert said.count("Traceback") == 2 and said.count(f"LookupError: {HIDDEN}") == 2 and ADDRESS not in said


@pytest.mark.process
def test_no_secret_is_left_in_folder_report_or_output(tmp_path, capfd):
    """A run, one that goes wrong, and all that reads them, with secrets of every kind planted."""
    pytest.importorskip("mlflow", reason="pip install 'albert_ablate[mlflow]'")
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.send_error(500, f"{PASSWORD} {ENVIRONMENT}")

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    uri = f"http://user:{PASSWORD}@127.0.0.1:{server.server_port}"
    text, runs, out = write_text(tmp_path / "text.txt"), tmp_path / "runs", tmp_path / "report.html"
    given = [*arguments(text, runs, "logger=[mlflow,wandb_offline]", "budget.tokens=512"), f"logger.mlflow.uri={uri}"]

    def work() -> list[int]:
        import sys

        home = tmp_path / "home"
        home.mkdir()
        os.environ |= {"SOME_TOKEN": ENVIRONMENT, "HF_TOKEN": TOKEN, "HOME": str(home), "WANDB_API_KEY": "k" * 39 + "7"}
        os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        os.chdir(home)
        codes = []
        for more in ([], [], ["logger.mlflow.experiment=1{"], ["logger.mlflow.nothing=1"], [f"model.width={TOKEN}"]):
            sys.argv = ["run.py", *given, *more]
            codes.append(run_main())
        os.environ["MLFLOW_TRACKING_URI"] = uri
        folder = next(runs.glob("*/seed0"))
        reads = [
            ["show", folder],
            ["report", runs, "--output", out],
            ["status", runs],
            ["sync", runs, "--to", "mlflow"],
        ]
        return codes + [cli.main([str(word) for word in command]) for command in reads]

    codes = forked(work)
    server.shutdown()
    server.server_close()
    said = "".join(capfd.readouterr())
    assert codes[:2] == [0, 0] and all(codes[2:5]), said
    assert "MLflow" in said and "***@127.0.0.1" in (next(runs.glob("*/seed0")) / "config.yaml").read_text()
    assert seen and all(word.startswith("Basic ") for word in seen)  # the server was told the password
    files = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    for secret in (PASSWORD, TOKEN, ENVIRONMENT, "k" * 39 + "7"):
        assert secret not in said
        assert not [f for f, content in files.items() if secret.encode() in content]
