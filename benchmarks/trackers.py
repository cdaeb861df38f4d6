"""What a tracker's trouble costs a run: `python benchmarks/trackers.py` prints a table of measured seconds.

A nano run is trained with W&B and with MLflow against servers on loopback that refuse, hang, answer 500 or nonsense,
die or freeze before the run or in its middle, and with W&B's own process killed or frozen. Held up is the time beyond
the same run without a tracker; mended says whether `sync`, with a server that works, has sent every row.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from forking import Ambush, Child, nano, write_text  # noqa: E402
from wandb_server import Server  # noqa: E402

from albert_ablate import cli  # noqa: E402
from albert_ablate.records.history import SCHEMAS, read_history  # noqa: E402
from albert_ablate.training.run import run  # noqa: E402

KEY = "secret0123456789" * 3
MIDDLE = 150  # of the moments of a run at which something can be made to happen
WANDB = ("error", "nonsense", "refuse", "silent", "gone", "client killed", "client frozen")
MLFLOW = ("error", "nonsense", "refuse", "silent", "gone")


class Proxy:
    """In front of a server: hands requests on (`mode` "well"), or misbehaves."""

    def __init__(self, target: str):
        import urllib.error
        import urllib.request

        self.mode, proxy = "well", self
        self.release = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.mode == "gone":
                    self.close_connection = True
                    return
                if proxy.mode == "silent":
                    proxy.release.wait()
                    return
                status, content = {"error": 500, "nonsense": 200, "refuse": 403}.get(proxy.mode), b"<html>.."
                if status is None:
                    headers = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept")}
                    request = urllib.request.Request(target + self.path, body or None, headers, method=self.command)
                    try:
                        with urllib.request.urlopen(request) as answer:
                            status, content = answer.status, answer.read()
                    except urllib.error.HTTPError as error:
                        status, content = error.code, error.read()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PATCH = do_PUT = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()


def mlflow_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """MLflow's own server on a database in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", str(folder)]
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
        time.sleep(0.1)
    raise RuntimeError(f"mlflow server did not start: {(folder / 'server.log').read_text()[-500:]}")


def signal_client(number: int) -> None:
    """To wandb's own process."""
    rows = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True).stdout.splitlines()
    for pid, parent, name in (line.split(None, 2) for line in rows):
        if parent == str(os.getpid()) and "wandb-core" in name:
            os.kill(int(pid), number)


def trained(
    text: Path, place: Path, logger: str, more: list[str], environment: dict, lose: Callable | None, output: Path
):
    """A run in a child: its record, what it has said, and its seconds from its first to its last moment."""

    def work() -> Any:
        os.environ.update(environment)
        error = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(error, 2)
        if lose:
            Ambush(MIDDLE, lose).set()
        began = time.perf_counter()
        record = run(nano(text, place, f"logger={logger}", *more))
        return record["folder"], time.perf_counter() - began

    began = time.perf_counter()
    kind, value = Child(work).wait()
    assert kind == "value", value
    return Path(value[0]), time.perf_counter() - began


def case(kind: str, trouble: str, when: str, text: Path, scratch: Path, target: str, plain: float) -> dict[str, Any]:
    """One row of the table."""
    place, output = scratch / f"{kind}-{trouble}-{when}".replace(" ", "-"), scratch / "said.txt"
    output.write_text("")
    reader, writer = os.pipe()
    environment = {"HOME": str(scratch), "WANDB_API_KEY": KEY, "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
    server: Any = Server().__enter__() if kind == "wandb" else Proxy(target)
    environment |= {"WANDB_BASE_URL": server.url} if kind == "wandb" else {"MLFLOW_TRACKING_URI": server.url}
    client = trouble.startswith("client")

    def lose() -> None:
        if client:
            signal_client(signal.SIGKILL if "killed" in trouble else signal.SIGSTOP)
        os.write(writer, b"x")
        time.sleep(0.2)

    def watch() -> None:
        os.read(reader, 1)
        server.mode = trouble

    if when == "middle" and not client:
        threading.Thread(target=watch, daemon=True).start()
    elif not client:
        server.mode = trouble
    folder, seconds = trained(text, place, kind, [], environment, lose if when == "middle" else None, output)
    said = [line for line in output.read_text().splitlines() if line.strip()]
    server.mode = "well"

    def send() -> int:
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return cli.main(["sync", str(folder), "--to", kind])

    code = Child(send).wait()
    rows = sum(len(read_history(folder, name, None)) for name in SCHEMAS)
    if kind == "wandb":
        (sent,) = server.runs.values() or [{"history": []}]
        mended = code == ("value", 0) and len(sent["history"]) >= len(read_history(folder, "steps", None))
        server.__exit__()
    else:
        mended = code == ("value", 0)
    return {
        "tracker": kind,
        "trouble": trouble,
        "when": when,
        "held up": seconds - plain,
        "sentences": sum("sync" in line for line in said),
        "lines": len(said),
        "mended": mended,
        "rows": rows,
        "said": said,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="wandb or mlflow")
    parser.add_argument("--trouble", nargs="*")
    parser.add_argument("--verbose", action="store_true", help="what each run has said")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        text = write_text(scratch / "text.txt")
        trained(text, scratch / "first", "none", [], {}, None, scratch / "said.txt")  # packs the text
        _, plain = trained(text, scratch / "plain", "none", [], {}, None, scratch / "said.txt")
        print(f"without a tracker {plain:.1f} s\n\n| tracker | trouble | when | held up, s | sentences | sync mends |")
        print("|---|---|---|---|---|---|", flush=True)
        for kind, troubles in (("wandb", WANDB), ("mlflow", MLFLOW)):
            if options.only not in (None, kind):
                continue
            if kind == "mlflow" and find_spec("flask") is None:
                print("MLflow is left out: its server needs the whole package, pip install mlflow.")
                continue
            process, target = mlflow_server(scratch) if kind == "mlflow" else (None, "")
            try:
                for trouble in ("well", *troubles):
                    if options.trouble and trouble not in options.trouble:
                        continue
                    for when in ("middle",) if trouble.startswith("client") else ("before", "middle"):
                        row = case(kind, trouble, when, text, scratch, target, plain)
                        counts = f"{row['sentences']} of {row['lines']} lines"
                        cells = (kind, trouble, when, f"{row['held up']:.1f}", counts, "yes" if row["mended"] else "NO")
                        print(f"| {' | '.join(cells)} |", flush=True)
                        if options.verbose:
                            print("\n".join(row["said"]), flush=True)
            finally:
                if process is not None:
                    os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
