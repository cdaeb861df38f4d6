"""The tables that load_runs makes of W&B: offline files, and a server as its real client sees it."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from forking import forked, nano, write_text
from wandb_server import Server

from albert_ablate import load_runs
from albert_ablate.config import ConfigError
from albert_ablate.training.run import run

pytestmark = pytest.mark.process

SHARED = {
    "val_loss",
    "test_loss",
    "gap",
    "status",
    "seed",
    "arm",
    "setting",
    "label",
    "norm",
    "optimizer.lr",
    "identity",
}


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Path:
    """A folder of one finished run with its offline W&B file."""
    root = tmp_path_factory.mktemp("offline")
    text = write_text(root / "text.txt")

    def work() -> None:
        os.environ |= {"HOME": str(root), "WANDB_ERROR_REPORTING": "false"}
        run(nano(text, root / "runs", "budget.tokens=4096", "logger=wandb_offline", "logger.layers=true", "seed=3"))

    forked(work)
    return root / "runs"


def same_rows(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Equal but for what W&B has no place for: the hash of the order, and an evaluation's own clock."""
    keys = [c for c in ("step", "split", "layer", "sublayer") if c in ours]
    shown = [c for c in ours if c not in ("data_order", "seconds")]
    ours, theirs = (t.sort_values(keys).reset_index(drop=True)[shown] for t in (ours, theirs))
    pd.testing.assert_frame_equal(ours, theirs)


def test_an_offline_file_gives_the_tables_of_its_run_folder(offline):
    def work() -> None:
        (file,) = offline.rglob("*.wandb")
        ours, theirs = load_runs(offline), load_runs(file)
        for name in ("steps", "evals", "layers"):
            same_rows(ours.history(name), theirs.history(name))
        a, b = ours.summary.iloc[0], theirs.summary.iloc[0]
        assert all(a[k] == b[k] for k in SHARED), [k for k in SHARED if a[k] != b[k]]
        assert list(theirs.where(seed=3).history("steps", ["loss"])) == ["arm", "setting", "seed", "loss"]

    forked(work)


@pytest.mark.slow
def test_a_torn_offline_file_gives_its_rows_or_the_reason(offline, tmp_path):
    (file,) = offline.rglob("*.wandb")
    content = file.read_bytes()
    (tmp_path / "run-a.wandb").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "run-b.wandb").write_bytes(b":W&B\x00\x00\x00")
    (tmp_path / "run-c.wandb").write_bytes(b"something else")
    (tmp_path / "run-d.wandb").write_bytes(content[:3000] + bytes(200) + content[3200:])

    def work() -> None:
        runs = load_runs(tmp_path)
        summary = runs.summary.set_index("folder")
        assert summary.loc[str(tmp_path / "run-a.wandb"), "status"] == "running" and len(runs.steps)
        assert "before its run began" in summary.loc[str(tmp_path / "run-b.wandb"), "reason"]
        assert "does not begin as" in summary.loc[str(tmp_path / "run-c.wandb"), "reason"]
        assert "damaged at byte" in summary.loc[str(tmp_path / "run-d.wandb"), "reason"]

    forked(work)


class Project(Server):
    """A server with one project of finished runs; `rows` by run."""

    def __init__(self, runs: dict[str, dict[str, Any]]):
        super().__init__()
        self.kept = runs

    def _data(self, query: str, variables: dict) -> dict:
        if "query Runs(" in query:
            if variables["project"] != "kept":
                return {"project": None}
            edges = [{"node": self._node(name, kept), "cursor": name} for name, kept in self.kept.items()]
            page = {"endCursor": None, "hasNextPage": False}
            return {"project": {"internalId": "1", "runCount": len(edges), "readOnly": False,
                                "runs": {"edges": edges, "pageInfo": page}}}  # fmt: skip
        rows = self.kept.get(variables.get("name") or variables.get("runName") or variables.get("run"), {}).get(
            "rows", []
        )
        if "historyKeys" in query:
            return {"project": {"run": {"historyKeys": {"lastStep": len(rows) - 1, "sets": [], "keys": {}}}}}
        if "parquetHistory" in query:
            return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": rows[:1]}}}}
        if "history(minStep" in query:
            page = rows[variables["minStep"] : variables["maxStep"]]
            return {"project": {"run": {"history": [json.dumps(r) for r in page]}}}
        return super()._data(query, variables)

    @staticmethod
    def _node(name: str, kept: dict[str, Any]) -> dict:
        config = {k: {"value": v} for k, v in kept["config"].items()}
        return {
            "projectId": "1", "id": name, "tags": [], "name": name, "displayName": kept["label"], "sweepName": None,
            "state": "finished", "group": "g", "jobType": None, "commit": None, "readOnly": False, "description": "",
            "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00", "notes": None,
            "user": {"name": "u", "username": "u"}, "historyLineCount": len(kept["rows"]), "config": json.dumps(config),
            "systemMetrics": "{}", "summaryMetrics": json.dumps(kept["summary"]),
            "historyKeys": {"lastStep": len(kept["rows"]) - 1, "sets": [], "keys": {}},
        }  # fmt: skip


def on_server(url: str, home: Path, work) -> Any:
    def inner() -> Any:
        os.environ |= {"HOME": str(home), "WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40}
        os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_CACHE_DIR": str(home)}
        return work()

    return forked(inner)


def test_a_project_on_a_server_gives_the_same_tables(tmp_path):
    rows = [{"_step": i, "step": i, "tokens": 8 * i, "seconds": i / 2, "flops": 1.0 * i} for i in range(4)]
    for row in rows[1:]:
        row |= {"train/loss": 3.0 - row["step"] / 10, "train/lr": 0.1, "layers/0/grad_norm": 0.5}
    rows[3] |= {"train/loss": "NaN", "eval/validation/loss": 2.5, "eval/validation/accuracy": 0.25}
    config = {"seed": 1, "arm": "a", "setting": "s", "choices": {"norm": "pre_ln"}, "optimizer": {"lr": 0.1}}
    summary = {"status": "diverged", "val_loss": "Infinity", "_step": 3, "train/loss": 1}
    kept = {
        "one": {"config": config, "summary": summary, "rows": rows, "label": "norm=pre_ln"},
        "other": {"config": {"lr": 1}, "summary": {}, "rows": [], "label": "someone's"},
        "seedless": {"config": config | {"seed": "one"}, "summary": {}, "rows": [], "label": "theirs"},
    }

    def work() -> None:
        runs = load_runs("wandb:team/kept")
        first = runs.summary.iloc[0]
        assert first["status"] == "diverged" and first["val_loss"] == float("inf") and first["norm"] == "pre_ln"
        assert first["optimizer.lr"] == 0.1 and first["role"] == "confirmation"
        assert "not a run of albert_ablate" in runs.summary.iloc[1]["reason"]
        assert "its seed is 'one'" in runs.summary.iloc[2]["reason"]
        assert runs.steps["loss"].tolist()[:2] == pytest.approx([2.9, 2.8]) and runs.steps["loss"].isna().tolist()[2]
        assert runs.evals[["step", "split", "loss", "accuracy"]].values.tolist() == [[3, "validation", 2.5, 0.25]]
        assert runs.layers["grad_norm"].tolist() == [0.5] * 3 and set(runs.layers["layer"]) == {0}
        for address, says in (
            ("wandb:team/gone", "cannot be read from W&B"),
            ("wandb:team", "does not name a project"),
        ):
            with pytest.raises(ConfigError, match=says):
                load_runs(address)

    with Project(kept) as server:
        on_server(server.url, tmp_path, work)


HOSTILE = {  # configuration and summary, as JSON by key
    "nested": ({"seed": "[" * 20_000}, {}),
    "no JSON": ({"seed": "{"}, {}),
    "no text": ({"arm": "[1]"}, {}),
    "no choice": ({"choices": "[1]"}, {}),
    "no option": ({"choices": '{"norm": {"a": 1}}'}, {}),
    "no status": ({}, {"status": "[1]"}),
    "another status": ({}, {"status": '"well"'}),
    "huge": ({"seed": "1" + "0" * 400}, {}),
    "a huge figure": ({}, {"val_loss": "1" + "0" * 400}),
    "a deep setting": ({"optimizer": '{"a":' * 900 + "1" + "}" * 900}, {}),
    "a rate of words": ({"optimizer": '{"lr": "fast"}'}, {}),
}


def test_an_offline_file_with_hostile_json_is_a_row(tmp_path):
    def work() -> None:
        from wandb.proto import wandb_internal_pb2 as messages

        def part(record: Any) -> bytes:
            content = b"\x01" + record.SerializeToString()
            return struct.pack("<IH", zlib.crc32(content), len(content) - 1) + content

        plainly = {"seed": "0", "arm": '"a"', "setting": '"s"'}
        for name, (config, summary) in {"fine": ({}, {"val_loss": "2.5"}), **HOSTILE}.items():
            run, end = messages.Record(), messages.Record()
            run.run.run_id = name
            for key, value in (plainly | config).items():
                run.run.config.update.add(key=key, value_json=value)
            end.summary.update.add(key="x", value_json="1")
            for key, value in summary.items():
                end.summary.update.add(key=key, value_json=value)
            (tmp_path / f"run-{name}.wandb").write_bytes(b":W&B\x00\x00\x00" + part(run) + part(end))
        summary = load_runs(tmp_path).summary.set_index("folder")
        reasons = summary["reason"].rename(lambda folder: Path(folder).stem.removeprefix("run-"))
        assert len(summary) == len(HOSTILE) + 1 and pd.isna(reasons.pop("fine"))
        assert summary.loc[str(tmp_path / "run-fine.wandb"), "val_loss"] == 2.5
        assert summary["status"].notna().sum() == 1 and reasons.str.contains("read|not a run").all(), reasons.to_dict()

    forked(work)
