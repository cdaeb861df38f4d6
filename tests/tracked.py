"""Runs in children that have a tracker, and what it is to hold of them: worked out from the finished histories."""

import json
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forking import Ambush, Child, forked, nano

from albert_ablate.records.history import SCHEMAS, read_history
from albert_ablate.trackers import wandb as mirror
from albert_ablate.training.run import run

KEY = "secret0123456789" * 3  # 40 characters at least, or the client refuses it


def configured(text: Path, runs: Path, logger: str, *overrides: str) -> dict[str, Any]:
    return nano(text, runs, "optimizer.lr=0.03", "dropout=uniform", "dropout.mean=0.1", f"logger={logger}", *overrides)


def prepared(work: Callable[[], Any], elsewhere: Path, url: str | None = None, patience: int = 3) -> Callable[[], Any]:
    """`work` for a child: with this W&B server, or none, and little patience."""

    def inner() -> Any:
        for name in [n for n in os.environ if n.startswith(("WANDB", "XDG"))]:
            del os.environ[name]
        os.environ |= {"HOME": str(elsewhere / "home"), "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
        if url:
            os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
        os.chdir(elsewhere / "cwd")
        mirror.START = mirror.END = patience
        return work()

    return inner


def session(
    cfg: dict,
    elsewhere: Path,
    url: str | None = None,
    kill_at: int | None = None,
    patience: int = 3,
    act: Callable[[], Any] = lambda: os.kill(os.getpid(), signal.SIGKILL),
) -> Callable[[], dict]:
    """The run as work for a child, which acts at a moment of its life: by default it is killed."""

    def work() -> dict:
        if kill_at is not None:
            Ambush(kill_at, act).set()
        return run(cfg)

    return prepared(work, elsewhere, url, patience)


def killed_once_sent(cfg: dict, elsewhere: Path, server: Any, kill_at: int) -> dict:
    """Kill a run at a moment of its life, once the server has rows of it: what the server has of its only run."""
    reader, writer = os.pipe()

    def stand() -> None:
        os.write(writer, b"x")
        time.sleep(600)

    child = Child(session(cfg, elsewhere, server.url, kill_at, act=stand))
    os.close(writer)
    assert os.read(reader, 1) == b"x", child.wait()
    while not any(sent["history"] for sent in server.runs.values()):
        time.sleep(0.05)
    child.kill()
    assert child.wait() == ("killed", signal.SIGKILL)
    (sent,) = server.runs.values()
    return sent


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


def points(folder: Path | str) -> dict[tuple[str, int], float]:
    """(metric, tokens) -> value, as a tracker is to have it: straight from the finished histories."""
    out: dict[tuple[str, int], float] = {}
    for name in SCHEMAS:
        for row in over_depth(Path(folder)) if name == "layers" else read_history(Path(folder), name, None).to_pylist():
            first = name == "layers" and row["step"] == 0  # known, and sent, when the first step has been taken
            place = f"{'initial' if first else 'layers'}/{row.get('sublayer')}"
            path = {"steps": "train", "evals": f"eval/{row.get('split')}", "layers": place}[name]
            tokens = 128 if first else row["tokens"]
            new = {(f"{path}/{k}", tokens): v for k, v in row.items() if k not in mirror.NOT_METRICS and v == v}
            assert not new.keys() & out.keys()
            out |= new
    return out


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
