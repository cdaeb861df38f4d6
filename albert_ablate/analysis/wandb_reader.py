"""The tables of `load_runs` from W&B: a project or sweep on a server, or the `.wandb` files of offline runs.

What is read is what our mirror wrote (records/wandb.py): one row a step, whose keys are unfolded into the histories.
Rows of one step share its clock there, so an evaluation's seconds are those of its step.
Proofs of pairing and provenance are not on W&B: verdicts need the run folders.
"""

import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from albert_ablate.config import ConfigError
from albert_ablate.config.dotted import dotted, is_internal
from albert_ablate.records.fields import Wrong, check_fields
from albert_ablate.records.history import SCHEMAS
from albert_ablate.records.store import plain
from albert_ablate.records.tuning import role

PREFIX = "wandb:"
BLOCK, HEADER = 32768, 7
PATHS = {
    "steps": re.compile(r"train/(?P<column>\w+)"),
    "evals": re.compile(r"eval/(?P<split>\w+)/(?P<column>\w+)"),
    "layers": re.compile(r"(?:layers|(?P<initial>initial))/(?P<layer>\d+)/(?:(?P<sublayer>[a-z]+)/)?(?P<column>\w+)"),
}
STATES = {"finished": "finished", "running": "running", "preempting": "stopped", "preempted": "stopped"}


def server_rows(address: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """A row of the summary, and how to read a history, of every run of `wandb:entity/project[/sweep]`."""
    parts = address.removeprefix(PREFIX).strip("/").split("/")
    for run in server_runs(address):
        name = f"{PREFIX}{'/'.join(parts[:2])}/{run.id}"
        config, summary = dict(run.config), {k: _number(v) for k, v in dict(run.summary).items()}
        row = _row(name, run.id, run.name, run.state, config, summary)
        yield row, partial(_table, run.scan_history)


def server_runs(address: str) -> list[Any]:
    """W&B's own runs of `wandb:entity/project[/sweep]`; ConfigError where there are none or they cannot be read."""
    parts = address.removeprefix(PREFIX).strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ConfigError(
            f"{address} does not name a project: write wandb:entity/project, or wandb:entity/project/sweep."
        )
    import wandb
    from wandb.errors import Error

    try:
        runs = list(
            wandb.Api(timeout=60).runs(
                "/".join(parts[:2]), filters={"sweep": parts[2]} if len(parts) == 3 else {}, lazy=False
            )
        )
    except (Error, ValueError, OSError) as error:  # whatever keeps its client from the project
        raise ConfigError(f"{address} cannot be read from W&B: {' '.join(str(error).split())}.") from None
    if not runs:
        raise ConfigError(f"{address} holds no run.")
    return runs


def offline_rows(files: Iterable[Path]) -> Iterator[tuple[dict[str, Any], Any]]:
    """The same from `.wandb` files. Of several of one run the last counts: a session begins from the start."""
    latest: dict[str, tuple[dict[str, Any], Any]] = {}
    for file in sorted(files, key=lambda f: f.name):
        try:
            run, config, summary, rows, code = _unpacked(file)
        except Exception as error:  # messages and JSON in it may be anything
            reason = f"{file.name} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            latest[str(file)] = {"folder": str(file), "status": None, "reason": reason}, None
            continue
        state = "running" if code is None else "finished" if code == 0 else "stopped" if code > 128 else "failed"
        row = _row(str(file), run.run_id, run.display_name, state, config, summary)
        latest[run.run_id] = row, partial(_table, lambda rows=rows: rows)
    yield from latest.values()


def _row(folder: str, identity: str, label: str, state: str, config: Mapping, summary: Mapping) -> dict[str, Any]:
    row: dict[str, Any] = {"folder": folder, "status": None, "reason": None}
    if not {"seed", "arm", "setting"} <= config.keys():
        return row | {"reason": "it is not a run of albert_ablate: its configuration has no arm, setting and seed"}
    metrics = {
        k: v
        for k, v in summary.items()
        if not k.startswith("_") and "/" not in k and k != "status" and (k == "divergence" or _is_number(v))
    }
    status = {"status": summary["status"]} if "status" in summary else {}
    settings = {name: value for name, value in config.items() if isinstance(value, Mapping) and name != "choices"}
    named = {key: config[key] for key in ("seed", "arm", "setting", "label", "identity", "choices") if key in config}
    try:
        check_fields(plain({"status": "finished", **named, "config": settings, "summary": metrics} | status))
    except (Wrong, RecursionError) as error:
        return row | {"reason": f"it is not a run of albert_ablate: {error}"}
    row |= {
        "label": config.get("label", label),  # the run's name on W&B may be anything
        "arm": config["arm"],
        "setting": config["setting"],
        "identity": config.get("identity", identity),
        "seed": config["seed"],
        "role": role(config["seed"]),
        "status": status.get("status", STATES.get(state, "failed")),
    }
    row |= {group: option for group, option in (config.get("choices") or {}).items()}
    for name, value in config.items():
        if isinstance(value, Mapping) and name != "choices":
            group = name.removesuffix("_settings")  # which a sweep that sets the group itself makes of it
            row |= {key: v for key, v in dotted(value, f"{group}.") if not is_internal(key)}
    return row | metrics


def _table(scan: Any, name: str) -> pa.Table:
    """The history `name` out of a run's rows, in their order."""
    schema, path = SCHEMAS[name], PATHS[name]
    out: list[dict[str, Any]] = []
    for row in scan():
        axes = {k: row.get(k) for k in ("step", "tokens", "seconds", "flops")}
        if axes["step"] is None:
            continue
        rows: dict[tuple, dict[str, Any]] = {}
        for key, value in row.items():
            match = path.fullmatch(key)
            if match and match["column"] in schema.names:
                labels = {k: int(v) if k == "layer" else v for k, v in match.groupdict().items() if k != "column"}
                # what the first step found at initialization is in its row
                begin = {"step": 0, "tokens": 0, "flops": 0.0} if labels.pop("initial", None) else {}
                entry = rows.setdefault((bool(begin), *labels.values()), {**axes, **labels, **begin})
                entry[match["column"]] = _number(value)
        out += rows.values()
    columns = [_column([row.get(f.name) for row in out], f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _column(values: list, kind: pa.DataType) -> pa.Array:
    if pa.types.is_floating(kind):
        values = [math.nan if v is None else float(v) for v in values]
    return pa.array(values, kind)


def _number(value: Any) -> Any:
    """A number that JSON has no word for is sent as text."""
    return (
        {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value, value)
        if isinstance(value, str)
        else value
    )


def _unpacked(file: Path) -> tuple[Any, dict[str, Any], dict[str, Any], list[dict[str, Any]], int | None]:
    """Run, configuration, summary, rows and exit code of a `.wandb` file."""
    run, config, summary, rows, code = None, dict[str, Any](), dict[str, Any](), list[dict[str, Any]](), None
    for record in _records(file.read_bytes()):
        if record.HasField("run"):
            run = record.run
            config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif record.HasField("config"):
            config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
        elif record.HasField("summary"):
            summary |= {_key(item): _number(json.loads(item.value_json)) for item in record.summary.update}
        elif record.HasField("history"):
            rows.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif record.HasField("exit"):
            code = record.exit.exit_code
    if run is None:
        raise ValueError("it was cut off before its run began")
    return run, config, summary, rows, code


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(data: bytes) -> Iterator[Any]:
    """The records of a LevelDB log: blocks of 32 KiB, chunks of checksum (4 bytes), length (2), kind (1) and content.

    What was torn off at the end is left out, as a run that was killed leaves it.
    """
    from wandb.proto import wandb_internal_pb2 as messages

    if data[:4] != b":W&B":
        raise ValueError("it does not begin as a .wandb file")
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        end = at + HEADER + length
        if kind not in (1, 2, 3, 4) or end > len(data):
            return
        if zlib.crc32(data[at + HEADER - 1 : end]) != checksum:
            if not data[end:].strip(b"\0"):
                return
            raise ValueError(f"it is damaged at byte {at}")
        parts += data[at + HEADER : end]
        at = end
        if kind in (1, 4):  # whole, or the last part
            yield messages.Record.FromString(parts)  # type: ignore[attr-defined]
            parts = b""
