"""What an agent says to W&B's sweep server: a few questions of its public GraphQL interface, over plain HTTP.

wandb's own functions for them are private, and keep silent about a server that does not answer.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.trackers.graphql import Refused, ask

RETRY_STATUSES = (408, 429)  # statuses below 500 that another try may change

SWEEP = """query SweepWithRuns($entity: String, $project: String, $sweep: String!) {
  project(name: $project, entityName: $entity) { sweep(sweepName: $sweep) { name state config } } }"""
REGISTER = """mutation CreateAgent($host: String!, $projectName: String, $entityName: String, $sweep: String!) {
  createAgent(input: {host: $host, projectName: $projectName, entityName: $entityName, sweep: $sweep}) {
    agent { id } } }"""
HEARTBEAT = """mutation Heartbeat($id: ID!, $metrics: JSONString, $runState: JSONString) {
  agentHeartbeat(input: {id: $id, metrics: $metrics, runState: $runState}) { agent { id } commands } }"""


MAX_DEPTH = 20  # levels of lists and mappings in a sweep: reading many costs the square of their number


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
        """ENTITY/PROJECT/SWEEP."""
        return "/".join(p for p in (self.entity, self.project, self.sweep) if p)

    def config(self) -> dict[str, Any]:
        """The sweep as its file says, and as the server keeps it."""
        import yaml

        where = {"entity": self.entity, "project": self.project, "sweep": self.sweep}
        sweep = (self._ask(SWEEP, where).get("project") or {}).get("sweep")
        if not sweep:
            raise ConfigError(f"{self.url} has no sweep {self.name}.")
        try:
            return _read(sweep["config"])
        except ConfigError as error:
            raise ConfigError(f"{self.name} {error}.") from None
        except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"{self.name} has a configuration that cannot be read: {why}.") from None

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
        except (ValueError, TypeError, RecursionError):
            raise Unreachable(f"its commands cannot be read: {str(commands)[:100]}") from None

    def _taken(self, data: Any, *path: str) -> Any:
        for key in path:
            data = data.get(key) if isinstance(data, dict) else None
        if not isinstance(data, dict):
            raise Unreachable(f"it answers without {'.'.join(path)}")
        return data

    def _ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        try:
            return ask(self.url, self.key, query, variables)
        except Refused as error:
            if error.status == 404:
                raise SweepGone(f"{self.url} no longer has {self.name}.") from None
            if error.status in RETRY_STATUSES or error.status >= 500:
                raise Unreachable(str(error)) from None
            raise ConfigError(f"{self.url} refuses {self.name}: {error}.") from None
        except OSError as error:
            raise Unreachable(str(error)) from None


def _read(text: str) -> Any:
    """A sweep's YAML. Aliases are refused: a few nested ones stand for more values than a memory holds."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"is nested more than {MAX_DEPTH} deep, which is not allowed from a server")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"has an alias (*{event.anchor[:50]}), which is not allowed from a server")
    return yaml.safe_load(text)
