"""MLflow tracker: runs in a local store beside the run folders or on a tracking server."""

import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert_ablate.config import Location
from albert_ablate.config.secrets import with_password
from albert_ablate.records.folder import plain
from albert_ablate.records.naming import display_name
from albert_ablate.trackers.base import Rows, Tracker, merged, settings, status_of, summary_metrics

METRICS, PARAMS, LENGTH = 1000, 100, 6000  # MLflow's limits of a request, and of a parameter's characters


class MLflow(Tracker):
    """An MLflow run tagged with the run's identity: a metric per metric of the histories, its step the tokens so far.

    uri is what MLflow takes (http://..., sqlite:///...); null is MLFLOW_TRACKING_URI, or without it a file store in
    RUNS/mlruns. A password in it is not kept in files; a masked one is read from the environment. What is there is
    asked for when a session begins, metric by metric, and only the rest is sent: no row twice and no gap. Parameters
    are the configuration by dotted key; the summary's figures are metrics `summary/...`; tags hold arm, setting and
    status.
    experiment: null is MLFLOW_EXPERIMENT_NAME of the environment, or albert_ablate. layers: every layer's figures.
    """

    NAME, SYNC, PACKAGE, EXTRA = "MLflow", "mlflow", "mlflow", "mlflow"

    def __init__(self, uri: Location | None = None, experiment: str | None = None, layers: bool = False):
        super().__init__(layers)
        given = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = given and with_password(given, "logger.uri")
        self.experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "albert_ablate"

    def address(self) -> str | None:
        return f"MLflow {self.uri}" if self.uri and "://" in self.uri else None

    def sync_options(self) -> str:
        return f" --project {shlex.quote(self.experiment)}" if self.experiment != "albert_ablate" else ""

    def begin(self, folder: Path, record: Mapping, rows: Rows) -> None:
        # MLflow has put its file store behind this switch; the rest: no telemetry, and seconds of patience, not minutes
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the password of an address
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.tracking import MlflowClient

        self.client: Any = MlflowClient(tracking_uri=self.uri or store_of(folder).as_uri())
        experiment = self._experiment()
        existing = self.client.search_runs([experiment], f"tags.identity = '{record['identity']}'", max_results=1)
        run = existing[0] if existing else self._create(experiment, record)
        self.id, self.created, self.latest, self.tokens = run.info.run_id, record["created"], -1, 0
        if run.info.status != "RUNNING":
            self.client.update_run(self.id, status="RUNNING")
        self.sent = {(k, m.step) for k in run.data.metrics for m in self.client.get_metric_history(self.id, k)}
        self._params(record, run.data.params)
        self.push(rows)

    def push(self, rows: Rows) -> None:
        values = []
        for row in merged(rows, self.latest + 1, self.layers):
            self.latest, self.tokens = max(self.latest, row["step"]), max(self.tokens, row["tokens"])
            values += [(k, v, row["tokens"], self.created + row["seconds"]) for k, v in row.items() if k != "tokens"]
        self._metrics(values)

    def end(self, record: Mapping) -> None:
        status = status_of(record)
        self._metrics([(f"summary/{k}", v, self.tokens, time.time()) for k, v in summary_metrics(record).items()])
        self.client.set_tag(self.id, "status", status)
        words = {"finished": "FINISHED", "diverged": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.id, words[status])

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is None:
            try:
                return self.client.create_experiment(self.experiment)
            except MlflowException:  # another run has just made it
                experiment = self.client.get_experiment_by_name(self.experiment)
                if experiment is None:
                    raise
        return experiment.experiment_id

    def _create(self, experiment: str, record: Mapping) -> Any:
        tags = {key: str(record[key]) for key in ("identity", "arm", "setting", "seed")}
        return self.client.create_run(
            experiment, start_time=int(record["created"] * 1000), tags=tags, run_name=display_name(record)
        )

    def _params(self, record: Mapping, logged: Mapping[str, str]) -> None:
        """Log parameters that are not logged yet: MLflow refuses to change one, and a resumed run may have others."""
        from mlflow.entities import Param

        texts = {k: v if isinstance(v, str) else json.dumps(plain(v)) for k, v in settings(record).items()}
        new = [Param(k, v[:LENGTH]) for k, v in texts.items() if k not in logged]
        for start in range(0, len(new), PARAMS):
            self.client.log_batch(self.id, params=new[start : start + PARAMS])

    def _metrics(self, values: list[tuple[str, float, int, float]]) -> None:
        from mlflow.entities import Metric

        new = [v for v in values if (v[0], v[2]) not in self.sent]
        for start in range(0, len(new), METRICS):
            part = new[start : start + METRICS]
            self.client.log_batch(self.id, metrics=[Metric(k, v, int(at * 1000), step) for k, v, step, at in part])
            self.sent.update((k, step) for k, _, step, _ in part)


def store_of(folder: Path) -> Path:
    """RUNS/mlruns for RUNS/<setting>/seed<N>, and for the reproduction inside that."""
    seed = folder if folder.name.startswith("seed") else folder.parent
    return (seed.parent.parent / "mlruns").resolve()
