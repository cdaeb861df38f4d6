"""A stand-in for MLflow's tracking server on loopback: experiments, runs, parameters, tags, every metric it is sent.

A metric that is sent twice is there twice, unlike with MLflow's own database.
"""

import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

from wandb_server import Server


class MlflowServer(Server):
    """`with MlflowServer() as server:` listens at `server.url`. For `mode` see Server."""

    def __init__(self, mode: str = "well"):
        super().__init__(mode)
        self.experiments: dict[str, str] = {}  # name -> id

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        address = urlsplit(path)
        asked = {k: v[0] for k, v in parse_qs(address.query).items()} | body
        what = address.path.partition("/mlflow/")[2]
        self.requests.append(what)
        if what == "experiments/get-by-name":
            name = asked["experiment_name"]
            if name not in self.experiments:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"no experiment {name}"}
            return 200, {"experiment": {"experiment_id": self.experiments[name], "name": name}}
        if what == "experiments/create":
            self.experiments[asked["name"]] = number = str(len(self.experiments) + 1)
            return 200, {"experiment_id": number}
        if what == "runs/search":
            wanted = asked.get("filter", "''").split("'")[1]
            return 200, {"runs": [self._run(r) for r in self.runs.values() if r["tags"].get("identity") == wanted]}
        if what == "runs/create":
            name = f"run{len(self.runs)}"
            tags = {t["key"]: t["value"] for t in asked["tags"]}
            self.runs[name] = {"id": name, "status": "RUNNING", "tags": tags, "params": {}, "metrics": {}}
            return 200, {"run": self._run(self.runs[name])}
        if not (run := self.runs.get(asked.get("run_id", ""))):
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"{what} is unknown"}
        if what == "runs/update":
            run["status"] = asked.get("status", run["status"])
            return 200, {"run_info": self._run(run)["info"]}
        if what == "runs/log-batch":
            for metric in asked.get("metrics", []):
                run["metrics"].setdefault(metric["key"], []).append(metric)
            run["params"] |= {p["key"]: p["value"] for p in asked.get("params", [])}
        if what == "runs/set-tag":
            run["tags"][asked["key"]] = asked["value"]
        if what == "metrics/get-history":
            return 200, {"metrics": run["metrics"].get(asked["metric_key"], [])}
        return 200, {"run": self._run(run)} if what == "runs/get" else {}

    def _run(self, run: dict[str, Any]) -> dict:
        info = {"run_id": run["id"], "experiment_id": "1", "status": run["status"], "lifecycle_stage": "active"}
        data = {k: [{"key": a, "value": b} for a, b in run[k].items()] for k in ("tags", "params")}
        last = [max(points, key=lambda m: int(m.get("step", 0))) for points in run["metrics"].values()]
        return {"info": {**info, "start_time": int(time.time() * 1000)}, "data": {**data, "metrics": last}}

    def points(self) -> dict[tuple[str, int], float]:
        """(metric, step) -> value of the only run; AssertionError where one is there twice."""
        (run,) = self.runs.values()
        found: dict[tuple[str, int], float] = {}
        for key, sent in run["metrics"].items():
            for metric in sent:
                place = (key, int(metric.get("step", 0)))
                assert place not in found, f"{key} twice at {place[1]}"
                found[place] = float(metric["value"])
        return found
