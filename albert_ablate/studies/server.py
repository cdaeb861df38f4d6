"""What an agent says to W&B's sweep server: a few questions of its public GraphQL interface, over plain HTTP.

wandb's own functions for them are private, and keep silent about a server that does not answer.
"""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from albert_ablate.config import ConfigError

TIMEOUT = 20  # seconds
PASSING = (408, 429)  # statuses below 500 that another try may change

SWEEP = """query SweepWithRuns($entity: String, $project: String, $sweep: String!) {
  project(name: $project, entityName: $entity) { sweep(sweepName: $sweep) { name state config } } }"""
REGISTER = """mutation CreateAgent($host: String!, $projectName: String, $entityName: String, $sweep: String!) {
  createAgent(input: {host: $host, projectName: $projectName, entityName: $entityName, sweep: $sweep}) {
    agent { id } } }"""
HEARTBEAT = """mutation Heartbeat($id: ID!, $metrics: JSONString, $runState: JSONString) {
  agentHeartbeat(input: {id: $id, metrics: $metrics, runState: $runState}) { agent { id } commands } }"""


class Unreachable(RuntimeError):
    """The server does not answer, or not with what was asked for; it may later."""


class SweepGone(RuntimeError):
    """The server knows this sweep, or this agent of it, no longer."""


@dataclass(frozen=True)
class SweepServer:
    """A sweep on a server."""

    url: str
    key: str = field(repr=False)
    entity: str | None
    project: str
    sweep: str

    @property
    def name(self) -> str:
        return "/".join(p for p in (self.entity, self.project, self.sweep) if p)

    def config(self) -> dict[str, Any]:
        """The sweep as its file says, and as the server keeps it."""
        import yaml

        where = {"entity": self.entity, "project": self.project, "sweep": self.sweep}
        found = (self._ask(SWEEP, where).get("project") or {}).get("sweep")
        if not found:
            raise ConfigError(f"{self.url} has no sweep {self.name}.")
        try:
            return yaml.safe_load(found["config"])
        except (yaml.YAMLError, TypeError, KeyError) as error:
            raise ConfigError(f"{self.name} has a configuration that cannot be read: {error}.") from None

    def register(self) -> str:
        """A new agent: its id."""
        where = {"entityName": self.entity, "projectName": self.project, "sweep": self.sweep}
        return self._taken(self._ask(REGISTER, {"host": "albert-ablate", **where}), "createAgent", "agent")["id"]

    def heartbeat(self, agent: str, running: Iterable[str]) -> list[dict[str, Any]]:
        """Say which runs an agent has in work: what it is to do next."""
        state = {"id": agent, "metrics": "{}", "runState": json.dumps(dict.fromkeys(running, True))}
        commands = self._taken(self._ask(HEARTBEAT, state), "agentHeartbeat")["commands"]
        try:
            return [dict(command) for command in json.loads(commands)]
        except (ValueError, TypeError):
            raise Unreachable(f"its commands cannot be read: {str(commands)[:100]}") from None

    def _taken(self, data: Any, *path: str) -> Any:
        for key in path:
            data = data.get(key) if isinstance(data, dict) else None
        if not isinstance(data, dict):
            raise Unreachable(f"it answers without {'.'.join(path)}")
        return data

    def _ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        token = base64.b64encode(f"api:{self.key}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}", "User-Agent": "albert-ablate"}
        body = json.dumps({"query": query, "variables": variables}).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{self.url}/graphql", body, headers), timeout=TIMEOUT
            ) as answer:
                content = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = _message(error.read())
            if error.code == 404:
                raise SweepGone(f"{self.url} knows {self.name} no longer.") from None
            if error.code in PASSING or error.code >= 500:
                raise Unreachable(f"status {error.code}{said}") from None
            raise ConfigError(f"{self.url} refuses {self.name}: status {error.code}{said}.") from None
        except (OSError, HTTPException, ValueError) as error:
            raise Unreachable(str(getattr(error, "reason", error)) or type(error).__name__) from None
        if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
            raise Unreachable(f"no data{_message(json.dumps(content).encode())}")
        return content["data"]


def _message(body: bytes) -> str:
    """What an error's answer says, as the end of a sentence."""
    try:
        return ", " + " ".join(str(json.loads(body)["errors"][0]["message"]).split())[:200].rstrip(".")
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
