"""A tracker, its server or its client that hangs or fails does not hold a run up; a sweep server is bounded."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from wandb_server import Server

from albert_ablate.config import ConfigError
from albert_ablate.studies.wandb_agent.agent import Agent, Slot
from albert_ablate.studies.wandb_agent.server import SweepServer, Unreachable
from albert_ablate.trackers import base as tracker
from albert_ablate.trackers import graphql

KEY = "secret0123456789" * 3


class Hanging(tracker.Tracker):
    """Hangs for ever in one of its acts."""

    NAME, SYNC = "Hanging", "wandb"

    def __init__(self, at: str):
        super().__init__()
        self.at, self.abandoned = at, 0

    def _do(self, name: str, *args: Any) -> None:
        if name == self.at:
            threading.Event().wait()

    begin, push, end = (lambda self, *args, n=n: self._do(n) for n in ("begin", "push", "end"))

    def abandon(self) -> None:
        self.abandoned += 1

    def sync_options(self) -> str:
        return " --project mine"


@pytest.mark.parametrize("at", ["begin", "push", "end"])
def test_a_hanging_tracker_is_given_up_naming_sync(at, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "LIMIT", 0.5)
    monkeypatch.setattr(tracker, "LIMIT_AT_BEGINNING", 0.1)
    hanging, quick = Hanging(at), Hanging("never")
    both = tracker.joined({"a": hanging, "b": quick})
    both.open(Path("runs/a b"), {}, {})
    both.send({})
    both.close({})
    assert capsys.readouterr().err == (
        "Hanging failed and the run continues (it has not taken everything in time); `albert-ablate sync 'runs/a b' "
        "--to wandb --project mine` sends what is missing once the run is done.\n"
    )
    assert (hanging.abandoned, quick.abandoned) == (1, 0)


@pytest.mark.parametrize("at", ["begin", "push", "end"])
def test_a_dead_server_is_waited_for_once_in_a_process(at, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "SLOW_FAILURE_SECONDS", 0.0)
    monkeypatch.setattr(tracker, "_unanswered", {})
    asked: list[str] = []

    class Dead(Hanging):
        def __init__(self, server: str):
            super().__init__(at)
            self.server = server

        def address(self) -> str:
            return self.server

        def _do(self, name: str, *args: Any) -> None:
            if name == self.at:
                asked.append(self.server)
                raise OSError("no answer")

    def session(server: str) -> None:
        dead = Dead(server)
        dead.open(Path("x"), {}, {})
        dead.send({})
        dead.close({})

    for server in ("a", "a", "b", "a"):
        session(server)
    assert asked == ["a", "b"]
    assert capsys.readouterr().err.count("albert-ablate sync x --to wandb") == 4  # each run's is missing
    monkeypatch.setattr(tracker, "RETRY_PAUSE_SECONDS", -1.0)
    tracker._unanswered.clear()
    for _ in range(2):
        session("a")
    assert asked == ["a", "b", "a", "a"]


# --- a sweep server --------------------------------------------------------------------------------------------------


def test_a_redirection_does_not_carry_the_key_to_another_host():
    heard: list[str] = []

    class Thief(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    thief = ThreadingHTTPServer(("127.0.0.1", 0), Thief)
    threading.Thread(target=thief.serve_forever, args=(0.05,), daemon=True).start()
    with Server("redirect") as server:
        server.elsewhere = f"http://127.0.0.1:{thief.server_port}/graphql"
        with pytest.raises(ConfigError, match="redirects to http://127.0.0.1:.* where the key is not sent"):
            SweepServer(server.url, KEY, "e", "p", "s").config()
    thief.shutdown()
    thief.server_close()
    assert heard == []


def test_answers_of_a_sweep_server_have_a_deadline_and_a_limit(monkeypatch):
    with Server("silent") as server:
        monkeypatch.setattr(graphql, "DEADLINE_SECONDS", 0.2)
        with pytest.raises(Unreachable, match="no complete answer within"):
            SweepServer(server.url, KEY, "e", "p", "s").config()
    monkeypatch.setattr(graphql, "DEADLINE_SECONDS", 20.0)
    with Server() as server:
        name = server.add_sweep({"parameters": {"seed": {"values": [0]}}, "description": "x" * 5000}, [])
        asked = SweepServer(server.url, KEY, "e", "p", name)
        assert asked.config()["description"] == "x" * 5000
        monkeypatch.setattr(graphql, "MAX_ANSWER_BYTES", 4096)
        with pytest.raises(Unreachable, match="its answer is larger than"):
            asked.config()
        for mode in ("error", "nonsense"):
            server.mode = mode
            with pytest.raises(Unreachable):
                asked.config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1, 1]\nb: *x", "has an alias"),
        ("a: &a [0, 0]\nb: &b [*a, *a]\nc: &c [*b, *b]", "has an alias"),
        ("a: [1", "cannot be read"),
        ("a: " + "[" * 300, "nested more than 20 deep"),
        ("a: " + "%" * 3000, "cannot be read"),
    ],
)
def test_a_sweep_of_hostile_yaml_is_refused(text, words, monkeypatch):
    server = SweepServer("http://nowhere", KEY, "e", "p", "s")
    monkeypatch.setattr(SweepServer, "_ask", lambda *args: {"project": {"sweep": {"config": text}}})
    with pytest.raises(ConfigError, match=words) as refused:
        server.config()
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def test_a_run_stopped_while_importing_is_not_called_killed():
    said: list[str] = []
    agent = Agent(SweepServer("http://nowhere", KEY, "e", "p", "s"), None, 1, say=said.append)  # type: ignore[arg-type]
    slot = Slot(None, "agent")  # type: ignore[arg-type]
    slot.run = "r1"
    agent._obey(slot, {"type": "exit"})
    agent._finish_run(slot, {"status": "killed", "error": "Its process was killed, often for lack of memory"})
    assert said == ["r1: stopped, resumable"] and not agent.ended.get("failed")
    slot.stopping, slot.run = False, "r2"
    agent._finish_run(slot, {"status": "killed", "error": "Its process was killed, often for lack of memory"})
    assert "lack of memory" in said[1]
    agent.say("x" * 5000)
    assert len(said[2]) < 1100
