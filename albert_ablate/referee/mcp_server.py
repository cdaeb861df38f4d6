"""A read-only MCP server: what has been run, compared, decided, and what can be varied. Four tools, no other access.

It reads below one folder of runs, which is named when it is started, and writes nothing.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.records import store
from albert_ablate.referee.ledger import Ledger
from albert_ablate.referee.session_settings import check_name

MOST_RUNS = 200


def runs(root: Path, status: str = "", limit: int = 50) -> list[dict[str, Any]]:
    """Runs: setting, seed, label, status, losses in nats per token; of one status (finished, ...) if asked."""
    out: list[dict[str, Any]] = []
    for folder in store.run_folders(root) if root.is_dir() else ():
        record = store.read(folder)
        if not isinstance(record, store.Record) or status and record["status"] != status:
            continue
        summary = record["summary"]
        losses = {k: summary.get(k) for k in ("val_loss", "test_loss") if k in summary}
        place = {"setting": folder.parent.name, "seed": record["seed"], "label": record.get("label")}
        out.append({**place, "status": record["status"], **losses})
        if len(out) >= min(limit, MOST_RUNS):
            break
    return out


def result(root: Path, name: str = "") -> dict[str, Any]:
    """The answer of a comparison, as `albert-ablate compare --json` gave it last; the names of all without a name."""
    if not name:
        return {"comparisons": sorted(f.parent.name for f in root.glob("compare/*/answer.json"))}
    place = root / "compare" / check_name(name) / "answer.json"
    try:
        return json.loads(place.read_text())
    except (OSError, ValueError):
        raise ConfigError(f"There is no comparison {name} below {root}.") from None


def ledger(root: Path, session: str = "") -> dict[str, Any]:
    """A session: its settings, what is kept now, every proposal with its verdict, the hash of its ledger, which is
    checked; the names of all without a name."""
    if not session:
        return {"sessions": sorted(f.parent.name for f in root.glob("sessions/*/ledger.jsonl"))}
    ledger = Ledger(root / "sessions" / check_name(session))
    if not ledger.entries:
        raise ConfigError(f"There is no session {session} below {root}.")
    verdicts = {v["proposal"]: v for v in ledger.entries_of("verdict")}
    shown = ("decision", "reason", "pairs", "mean", "low", "high", "p", "level")
    proposals, baseline = [], ledger.entries[0]["baseline"]["text"]
    for p in ledger.entries_of("proposal"):
        v = verdicts.get(p["proposal"])
        verdict = {k: v[k] for k in shown} if v else {"decision": "UNDECIDED"}
        same = {"confirmation": p["confirmation"]} if p["confirmation"] else {}
        sides = {"candidate": p["candidate"]["text"], "baseline": p["baseline"]["text"]}
        proposals.append({"proposal": p["proposal"], **sides, **same, **verdict})
        if verdict["decision"] == "ACCEPT" and not p["confirmation"]:
            baseline = p["candidate"]["text"]
    return {
        "session": session, "settings": ledger.entries[0]["settings"], "kept": baseline, "proposals": proposals,
        "entries": len(ledger.entries), "ledger_hash": ledger.hash,
    }  # fmt: skip


def methods(kind: str = "") -> list[dict[str, Any]]:
    """What can be varied: option, formula, source and defaults; of one group (norm, dropout, ...) if asked."""
    from albert_ablate.report.methods import methods

    return [asdict(m) for m in methods(kind or None)]


def server(root: Path) -> Any:
    """The server with its four tools; ConfigError where the package `mcp` is not installed."""
    try:
        from mcp.server import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
        from mcp.types import ToolAnnotations
    except ImportError:
        raise ConfigError("The MCP server needs the package mcp: pip install 'albert_ablate[mcp]'.") from None

    def said(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except ConfigError as error:
            raise ToolError(str(error)) from None

    made = MCPServer("albert-ablate")
    reads = ToolAnnotations(read_only_hint=True)

    @made.tool(name="runs", description=runs.__doc__, annotations=reads)
    def _runs(status: str = "", limit: int = 50) -> list[dict[str, Any]]:
        return said(runs, root, status, limit)

    @made.tool(name="compare_result", description=result.__doc__, annotations=reads)
    def _result(name: str = "") -> dict[str, Any]:
        return said(result, root, name)

    @made.tool(name="ledger", description=ledger.__doc__, annotations=reads)
    def _ledger(session: str = "") -> dict[str, Any]:
        return said(ledger, root, session)

    @made.tool(name="methods", description=methods.__doc__, annotations=reads)
    def _methods(kind: str = "") -> list[dict[str, Any]]:
        return said(methods, kind)

    return made
