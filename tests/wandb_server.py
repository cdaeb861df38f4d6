"""A stand-in for W&B's server on loopback: enough of its GraphQL endpoint and file stream for logging and for sweeps.

It keeps what real runs keep: history lines by offset, the summary, the config, the exit code. A sweep hands out the
product of its lists (or `draws` where a test sets them), a run to one agent at a time, a preempted one once more.
"""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

BROKEN = {"error": 500, "nonsense": 200, "redirect": 302}  # status of what is no answer


class Server:
    """`with Server() as server:` listens at `server.url`. `mode` makes it misbehave:

    "well"; "null": mutations answer null; "silent": requests are accepted and never answered; "refuse": status 403;
    "gone": connections are closed without a word; "error": status 500; "nonsense": 200 with what is no JSON;
    "redirect": to another host.
    """

    def __init__(self, mode: str = "well"):
        self.mode = mode
        self.elsewhere = "http://127.0.0.1:9/"
        self.runs: dict[str, dict[str, Any]] = {}
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.agents: dict[str, str] = {}  # agent -> sweep
        self.lock = threading.RLock()
        self.requests: list[str] = []
        self.keys: set[str] = set()  # what requests have had as their Authorization
        self.release = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.keys.add(self.headers.get("Authorization", ""))
                if server.mode == "gone":
                    self.close_connection = True
                    return
                if server.mode == "silent":
                    server.release.wait()
                    return
                if server.mode in BROKEN:
                    status = BROKEN[server.mode]
                    self.send_response(status)
                    self.send_header("Location", server.elsewhere)
                    self.send_header("Content-Length", "8")
                    self.end_headers()
                    self.wfile.write(b"<html>..")
                    return
                upload = self.command == "PUT" or "/otel/" in self.path  # of files and telemetry: taken, not kept
                with server.lock:
                    if server.mode == "refuse":
                        status, answer = 403, {"errors": [{"message": "permission denied"}]}
                    else:
                        status, answer = (200, {}) if upload else server.answer(self.path, json.loads(body or b"{}"))
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_PATCH = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # type: ignore[method-assign]  # a killed client hangs up
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        if path.endswith("/file_stream"):
            return 200, self._stream(path.split("/")[-2], body)
        query = body.get("query", "")
        self.requests.append(query.split("(")[0].split("{")[0].strip() or path)
        if self.mode == "null" and query.lstrip().startswith("mutation"):
            return 200, {"data": {}}
        variables = body.get("variables") or {}
        if "agentHeartbeat" in query and self.agents[variables["id"]] not in self.sweeps:
            return 404, {"errors": [{"message": "sweep not found"}]}
        return 200, {"data": self._data(query, variables)}

    def _data(self, query: str, variables: dict) -> dict:
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
        if "RunResumeStatus" in query:
            return {
                "model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": self._resume(variables)}
            }
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in variables.get("files", [])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "upsertSweep" in query:
            name = self.add_sweep(yaml.safe_load(variables["config"]))
            place = {"id": "p", "name": variables["projectName"], "entity": {"id": "e", "name": "e"}}
            return {"upsertSweep": {"sweep": {"name": name, "project": place}, "configValidationWarnings": []}}
        if "SweepWithRuns" in query:
            sweep = self.sweeps.get(variables["sweep"])
            found = sweep and {"id": "s", "name": variables["sweep"], "config": yaml.dump(sweep["config"])}
            return {"project": {"sweep": found and {**found, "state": "RUNNING", "runs": {"edges": []}}}}
        if "createAgent" in query:
            agent = f"agent{len(self.agents)}"
            self.agents[agent] = variables["sweep"]
            return {"createAgent": {"agent": {"id": agent}}}
        if "agentHeartbeat" in query:
            commands = self._commands(self.agents[variables["id"]], json.loads(variables["runState"]))
            return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def add_sweep(self, config: dict, draws: list[dict] | None = None) -> str:
        """A new sweep of these settings: its id."""
        if draws is None:
            lists = {k: p.get("values", [p.get("value")]) for k, p in config["parameters"].items()}
            draws = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = {"config": config, "queue": list(draws), "handed": {}, "again": [], "stop": set()}
        return name

    def _commands(self, name: str, running: dict[str, bool]) -> list[dict]:
        """What an agent is to do: one run at a time, stop what is to be stopped, exit when there is no more."""
        sweep = self.sweeps[name]
        if running:
            return [{"type": "stop", "run_id": run} for run in running if run in sweep["stop"]]
        if sweep["again"]:
            run, kind = sweep["again"].pop(0), "resume"
        elif sweep["queue"]:
            run, kind = f"{name}run{len(sweep['handed'])}", "run"
            sweep["handed"][run] = sweep["queue"].pop(0)
            self.runs[run] = self._new() | {"name": run, "project": "proj"}  # it is there before the client is
        else:
            return [{"type": "exit"}]
        args = {key: {"value": value} for key, value in sweep["handed"][run].items()}
        return [{"type": kind, "run_id": run, "program": sweep["config"].get("program"), "args": args}]

    def handed(self, name: str) -> dict[str, dict]:
        """Runs of a sweep by their ids: the settings that an agent was given."""
        return self.sweeps[name]["handed"]

    def _new(self) -> dict:
        return {"history": [], "summary": "{}", "exit": None, "preempting": False, "posts": 0}

    def _upsert(self, variables: dict) -> dict:
        run = self.runs.setdefault(variables["name"], self._new())
        run |= {k: v for k, v in variables.items() if v is not None}
        return {
            "id": "id",
            "name": run["name"],
            "displayName": run.get("displayName"),
            "description": "",
            "config": run.get("config") or "{}",
            "sweepName": None,
            "historyLineCount": len(run["history"]),
            "project": {"id": "p", "name": run["project"], "entity": {"id": "e", "name": run.get("entity", "e")}},
        }

    def _resume(self, variables: dict) -> dict | None:
        run = self.runs.get(variables.get("name", ""))
        if run is None:
            return None
        return {
            "id": "id",
            "name": run["name"],
            "displayName": run.get("displayName"),
            "config": run.get("config") or "{}",
            "summaryMetrics": run["summary"],
            "historyLineCount": len(run["history"]),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(r) for r in run["history"][-1:]]),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": '{"t": 1}' if run.get("config") else "{}",
        }

    def _stream(self, name: str, body: dict) -> dict:
        """Lines are put at their offset."""
        run = self.runs.get(name, self._new())
        run["posts"] += 1
        for file, part in (body.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                start = part["offset"]
                run["history"][start : start + len(part["content"])] = [json.loads(line) for line in part["content"]]
            elif file == "wandb-summary.json":
                run["summary"] = part["content"][-1]
        if body.get("preempting"):
            run["preempting"] = True
        if body.get("complete"):
            run["exit"] = body.get("exitcode")
            for sweep in self.sweeps.values():
                if run["preempting"] and run["exit"] and name in sweep["handed"]:
                    sweep["again"].append(name)
        return {}
