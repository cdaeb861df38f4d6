"""Client of a W&B server's public GraphQL API over plain HTTP, with a deadline and a size limit per request."""

import base64
import json
import threading
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage
from typing import IO, Any

DEADLINE_SECONDS = 20.0  # seconds for a whole answer, however slowly it comes
MAX_ANSWER_BYTES = 4 << 20  # bytes of an answer

ROWS = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) { bucket(name: $name, missingOk: true) { historyLineCount } } }"""


class Refused(OSError):
    """Raised for an HTTP status other than 200."""

    def __init__(self, status: int, message: str):
        super().__init__(f"status {status}{message}")
        self.status, self.said = status, message


class _Stay(urllib.request.HTTPRedirectHandler):
    """Refuses redirections, which would send the API key to whichever host the answer names."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        raise Refused(code, f", it redirects to {newurl[:200]}, where the key is not sent")


def ask(url: str, key: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Send a GraphQL query to the server at `url` and return its data.

    Raises Refused, or OSError if the answer is missing, late, too large or without data."""
    got: list[dict[str, Any] | Exception] = []
    thread = threading.Thread(target=lambda: got.append(_answer(url, key, query, variables)), daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    if not got:
        raise TimeoutError(f"no complete answer within {DEADLINE_SECONDS:.0f} s")
    if isinstance(got[0], Exception):
        raise got[0]
    return got[0]


def history_rows(url: str, key: str, entity: str | None, project: str, run: str) -> int:
    """Number of history rows that the server has of a run."""
    data = ask(url.rstrip("/"), key, ROWS, {"entity": entity, "project": project, "name": run})
    try:
        return int(data["model"]["bucket"]["historyLineCount"])
    except (KeyError, TypeError, ValueError):
        return 0


def _answer(url: str, key: str, query: str, variables: dict[str, Any]) -> dict[str, Any] | Exception:
    token = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}", "User-Agent": "albert-ablate"}
    body = json.dumps({"query": query, "variables": variables}).encode()
    try:
        request = urllib.request.Request(f"{url}/graphql", body, headers)
        with urllib.request.build_opener(_Stay).open(request, timeout=2 * DEADLINE_SECONDS) as answer:
            content = answer.read(MAX_ANSWER_BYTES + 1)
        if len(content) > MAX_ANSWER_BYTES:
            return OSError(f"its answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
        tree = json.loads(content)
    except urllib.error.HTTPError as error:
        return Refused(error.code, message_of(error.read(MAX_ANSWER_BYTES)))
    except (OSError, HTTPException, ValueError, RecursionError) as error:
        if isinstance(error, Refused):
            return error
        return OSError(str(getattr(error, "reason", error)) or type(error).__name__)
    if not isinstance(tree, dict) or not isinstance(tree.get("data"), dict):
        return OSError(f"no data{message_of(content)}")
    return tree["data"]


def message_of(body: bytes) -> str:
    """Message in the body of an error's answer, to end a sentence with."""
    try:
        return ", " + " ".join(str(json.loads(body)["errors"][0]["message"]).split())[:200].rstrip(".")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
