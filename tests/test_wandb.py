"""W&B mirrors the run folder, offline and online, and can do a run no harm. The server is a stand-in on loopback."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forking import Ambush, Child, forked, nano, outcome, train, write_text
from wandb_server import Server

from albert_ablate.records import wandb as mirror
from albert_ablate.records.history import SCHEMAS, read_history
from albert_ablate.training.run import run

KEY = "secret0123456789" * 3  # 40 characters at least, or the client refuses it


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory) -> dict[str, Any]:
    """What the run gives without W&B."""
    return outcome(train(configured(text, tmp_path_factory.mktemp("plain"), "none"))["folder"])


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """Home and working folder of a child, both to stay empty."""
    (tmp_path / "elsewhere" / "home").mkdir(parents=True)
    (tmp_path / "elsewhere" / "cwd").mkdir()
    return tmp_path / "elsewhere"


def configured(text: Path, runs: Path, logger: str, *overrides: str) -> dict[str, Any]:
    return nano(text, runs, "optimizer.lr=0.03", "dropout=uniform", "dropout.mean=0.1", f"logger={logger}", *overrides)


def prepared(work: Callable[[], Any], elsewhere: Path, url: str | None = None) -> Callable[[], Any]:
    """`work` for a child: with this W&B server, or none, and little patience."""

    def inner() -> Any:
        for name in [n for n in os.environ if n.startswith(("WANDB", "XDG"))]:
            del os.environ[name]
        os.environ |= {"HOME": str(elsewhere / "home"), "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
        if url:
            os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
        os.chdir(elsewhere / "cwd")
        mirror.START = mirror.END = 3
        return work()

    return inner


def session(
    cfg: dict, elsewhere: Path, url: str | None = None, kill_at: int | None = None, after: float = 1.5
) -> Callable[[], dict]:
    """The run as work for a child, killed some seconds after a moment of its life."""

    def kill() -> None:
        time.sleep(after)  # let some rows go out
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> dict:
        if kill_at is not None:
            Ambush(kill_at, kill).set()
        return run(cfg)

    return prepared(work, elsewhere, url)


def over_depth(folder: Path) -> list[dict]:
    """Least, median and largest over depth of each figure of the layers, by pandas."""
    table = read_history(folder, "layers", None).to_pandas()
    figures = [c for c in table if c not in (*mirror.NOT_METRICS, "step")]
    out = []
    for (step, sublayer), part in table.groupby(["step", "sublayer"], sort=False):
        row = {k: part.iloc[0][k].item() for k in mirror.AXES} | {"step": step, "sublayer": sublayer}
        for name in figures:
            if part[name].notna().any():
                row |= {f"{name}/{k}": getattr(part[name], k)() for k in ("min", "median", "max")}
        out.append(row)
    return out


def expected(folder: Path, every_layer: bool = False) -> list[dict]:
    """The rows W&B is to have, from the finished histories."""
    rows: dict[tuple[bool, int], dict] = {}
    for name in SCHEMAS:
        short = name == "layers" and not every_layer
        for row in over_depth(folder) if short else read_history(folder, name, None).to_pylist():
            late = row.get("split") == "test" and row["step"] < 32  # of the weights that were best, evaluated last
            first = name == "layers" and row["step"] == 0  # known, and sent, when the first step has been taken
            place = f"{'initial' if first else 'layers'}/{row.get('layer', '')}/{row.get('sublayer')}".replace(
                "//", "/"
            )
            path = {"steps": "train", "evals": f"eval/{row.get('split')}", "layers": place}[name]
            values = {f"{path}/{k}": v for k, v in row.items() if k not in mirror.NOT_METRICS and v == v}
            into = rows.setdefault((late, 1 if first else row["step"]), {k: row[k] for k in mirror.AXES})
            assert not values.keys() & into.keys()
            into |= values
    return [{"_step": number, **rows[key]} for number, key in enumerate(sorted(rows))]


def own(row: dict) -> dict:
    """A row without what W&B adds to it."""
    return {k: v for k, v in row.items() if k not in ("_timestamp", "_runtime", "_wandb")}


def read_offline(file: Path) -> list:
    """The records of a `.wandb` file, a LevelDB log: blocks of 32 KiB, chunks of checksum, length, kind and content."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def offline_rows(folder: Path) -> tuple[list[dict], dict, tuple[str, str]]:
    """The rows, the summary and the run of the only offline segment of a run folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return forked(lambda: unpacked(read_offline(file)))


def unpacked(records: list) -> tuple[list[dict], dict, tuple[str, str]]:
    def values(items) -> dict:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    rows = [values(r.history.item) for r in records if r.HasField("history")]
    summaries = [values(r.summary.update) for r in records if r.HasField("summary")]
    begun = next(r.run for r in records if r.HasField("run"))
    return rows, {k: v for update in summaries for k, v in update.items()}, (begun.run_id, begun.run_group)


def nothing_leaked(folder: Path, elsewhere: Path) -> bool:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return not [f for f in files if KEY.encode() in f.read_bytes()] and not [
        f for f in elsewhere.rglob("*") if f.is_file()
    ]


def test_online_a_killed_and_resumed_run_has_every_row_once_and_the_same_weights(text, plain, tmp_path, elsewhere):
    cfg = configured(text, tmp_path / "runs", "wandb")
    with Server() as server:
        for moment in (150, 300):
            assert Child(session(cfg, elsewhere, server.url, moment)).wait() == ("killed", signal.SIGKILL)
            (sent,) = server.runs.values()
            assert 0 < len(sent["history"]) < 33
        record = forked(session(cfg, elsewhere, server.url))
        (sent,) = server.runs.values()
    folder = Path(record["folder"])
    assert [own(row) for row in sent["history"]] == expected(folder)
    assert outcome(record["folder"]) == plain
    assert (sent["name"], sent["groupName"]) == (record["identity"], record["arm"])
    config = json.loads(sent["config"])
    assert config["seed"]["value"] == 0
    assert "tokens" in str(config["_wandb"]["value"]["m"])  # the step metric
    summary = json.loads(sent["summary"])
    assert (summary["status"], sent["exit"], sent["preempting"]) == ("finished", 0, False)
    assert summary["val_loss"] == record["summary"]["val_loss"]
    assert nothing_leaked(folder, elsewhere)


def test_offline_a_killed_and_resumed_run_is_one_whole_segment(text, plain, tmp_path, elsewhere, capfd):
    first, second = (configured(text, tmp_path / "runs", logger) for logger in ("wandb_offline", "wandb"))
    assert Child(session(first, elsewhere, kill_at=200, after=0)).wait() == ("killed", signal.SIGKILL)
    assert "W&B" not in capfd.readouterr().err
    record = forked(session(second, elsewhere))
    assert capfd.readouterr().err.count("W&B: no key found, logging offline") == 1
    rows, summary, sent = offline_rows(Path(record["folder"]))
    assert [own(row) for row in rows] == expected(Path(record["folder"]))
    assert sent == (record["identity"], record["arm"])
    assert summary["status"] == "finished"
    assert outcome(record["folder"]) == plain
    assert nothing_leaked(Path(record["folder"]), elsewhere)


@pytest.mark.parametrize("mode", ["silent", pytest.param("null", marks=pytest.mark.slow)])
def test_a_server_that_fails_at_the_start_costs_a_run_seconds_and_nothing_else(
    mode, text, plain, tmp_path, elsewhere, capfd
):
    began = time.perf_counter()
    with Server(mode) as server:
        record = forked(session(configured(text, tmp_path / "runs", "wandb"), elsewhere, server.url))
    assert time.perf_counter() - began < 45
    assert outcome(record["folder"]) == plain
    assert "the run goes on" in capfd.readouterr().err
    if mode == "silent":
        assert [own(row) for row in offline_rows(Path(record["folder"]))[0]] == expected(Path(record["folder"]))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["silent", "refuse", "error", "nonsense", "client", "frozen client"])
def test_a_server_or_a_client_lost_in_mid_run_costs_it_seconds_and_nothing_else(loss, text, plain, tmp_path, elsewhere):
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
    assert outcome(record["folder"]) == plain


def test_the_state_of_a_run_on_wandb_says_whether_it_goes_on(tmp_path, elsewhere):
    cases = {
        "finished": (0, False),
        "diverged": (0, False),
        "stopped": (143, True),
        "failed": (1, False),
    }

    def work() -> None:
        for status in cases:
            folder = tmp_path / status
            folder.mkdir()
            record = {"identity": status, "arm": "arm", "setting": "set", "label": "label", "config": {"seed": 0}}
            tracker = mirror.Wandb()
            tracker.open(folder, record, {})
            tracker.send({"steps": [dict.fromkeys(mirror.AXES, 1) | {"loss": math.inf, "grad_norm": math.nan}]})
            tracker.close({**record, "status": status, "signal": 15, "summary": {"val_loss": math.nan, "gap": None}})

    with Server() as server:
        forked(prepared(work, elsewhere, server.url))
        for status, (code, goes_on) in cases.items():
            sent = server.runs[status]
            summary = json.loads(sent["summary"])
            assert (sent["exit"], sent["preempting"], summary["status"]) == (code, goes_on, status)
            assert str(sent["history"][0]["train/grad_norm"]).lower() == "nan"


def test_wandb_is_not_imported_unless_asked_for(text, tmp_path):
    def imported() -> bool:
        run(configured(text, tmp_path, "none", "budget.tokens=256"))
        return "wandb" in sys.modules

    before = "wandb" in sys.modules
    assert before or not forked(imported)
