"""What a tracker's trouble costs a run: `python benchmarks/trackers.py` prints tables of measured seconds.

A nano run is trained with W&B and with MLflow while the server, a stand-in on loopback, refuses, hangs, answers status
500, nonsense or a redirection, is killed or frozen (SIGSTOP), and while W&B's own process is killed or frozen. Held up
is the time that training spends in calls of the tracker, and the process at its exit. Sync mends it: afterwards, with a
server that works, `sync` ends with every row there once. Then a sweep of four runs against a server that hangs.
"""

import argparse
import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from forking import Ambush, Child, nano, write_text  # noqa: E402
from mlflow_server import MlflowServer  # noqa: E402
from tracked import KEY, expected, own, points  # noqa: E402
from wandb_server import Server  # noqa: E402

from albert_ablate import cli  # noqa: E402
from albert_ablate.trackers.base import AXES  # noqa: E402
from albert_ablate.training import language  # noqa: E402
from albert_ablate.training.run import run  # noqa: E402

MIDDLE = 150  # of the moments of a run at which something can be made to happen
FIRST_ROWS = 1.5  # seconds at that moment, for rows to arrive before the trouble
SERVERS = {"wandb": Server, "mlflow": MlflowServer}
WORDS = {
    "well": "none",
    "refused": "connections are refused",
    "silent": "hangs: accepts, never answers",
    "error": "answers status 500",
    "nonsense": "answers nonsense",
    "redirect": "redirects to another host",
    "killed": "killed",
    "frozen": "frozen",
    "client killed": "W&B's own process is killed",
    "client frozen": "W&B's own process is frozen",
}
BEFORE = ("well", "refused", "silent", "error", "nonsense", "redirect")
MIDWAY = ("silent", "error", "nonsense", "redirect", "killed", "frozen")
CLIENT = ("client killed", "client frozen")


class Front:
    """A process that hands connections on to a server, to be killed or frozen as the server's own process would be.

    The server behind it keeps what it has, as a database would.
    """

    def __init__(self, target: str):
        self.target = int(target.rpartition(":")[2])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.child: Child | None = None

    def start(self) -> None:
        self.child = Child(self._serve)
        self.listener.close()

    def refuse(self) -> None:
        self.listener.close()

    def signal(self, number: int) -> None:
        assert self.child is not None
        self.child.kill(number)

    def mend(self, trouble: str) -> None:
        """The same address works again."""
        if trouble == "frozen":
            self.signal(signal.SIGCONT)
        elif trouble in ("killed", "refused"):
            port = int(self.url.rpartition(":")[2])
            self.listener = socket.create_server(("127.0.0.1", port))
            self.start()

    def stop(self) -> None:
        self.signal(signal.SIGKILL)

    def _serve(self) -> None:
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, to in ((client, server), (server, client)):
                threading.Thread(target=_pass_on, args=(source, to), daemon=True).start()


def _pass_on(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data)
    with contextlib.suppress(OSError):
        to.shutdown(socket.SHUT_WR)


def signal_client(number: int) -> None:
    """To W&B's own process."""
    rows = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True).stdout.splitlines()
    for pid, parent, name in (line.split(None, 2) for line in rows):
        if parent == str(os.getpid()) and "wandb-core" in name:
            os.kill(int(pid), number)


def in_child(work: Callable[[], Any], scratch: Path, url: str) -> tuple[Any, float, list[str]]:
    """What `work` gives in a child, the seconds of the child's exit, and the lines it has printed."""
    output = scratch / "said.txt"
    output.write_text("")

    def inner() -> Any:
        for name in [n for n in os.environ if n.startswith(("WANDB", "MLFLOW"))]:
            del os.environ[name]
        os.environ |= {"HOME": str(scratch), "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
        os.environ |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "MLFLOW_TRACKING_URI": url}
        both = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(both, 1)
        os.dup2(both, 2)
        atexit._clear()  # what the parent would do at its end
        value = work()
        began = time.perf_counter()
        threading._shutdown()  # type: ignore[attr-defined]  # as at the end of a command: what hangs there counts
        atexit._run_exitfuncs()
        return value, time.perf_counter() - began

    kind, value = Child(inner).wait()
    assert kind == "value", value
    return *value, [line for line in output.read_text().splitlines() if line.strip()]


class Timed:
    """A tracker whose calls are timed, in seconds of the thread that trains."""

    def __init__(self, tracker: Any, waited: list[float]):
        self.tracker, self.waited = tracker, waited

    def __getattr__(self, name: str) -> Any:
        plain = getattr(self.tracker, name)

        def timed(*args: Any) -> None:
            began = time.perf_counter()
            plain(*args)
            self.waited[0] += time.perf_counter() - began

        return timed


def trained(
    text: Path, place: Path, logger: str, url: str, lose: Callable[[], None] | None
) -> tuple[Path, float, list[str]]:
    """A run's folder, the seconds it is held up, and its lines; `lose` is called in its middle."""

    def work() -> tuple[str, float]:
        waited = [0.0]
        made = language.joined
        language.joined = lambda logger: Timed(made(logger), waited)  # type: ignore[attr-defined]

        def act() -> None:
            time.sleep(FIRST_ROWS)
            if lose is not None:
                lose()

        Ambush(MIDDLE, act).set()
        return run(nano(text, place, f"logger={logger}"))["folder"], waited[0]

    (folder, waited), leaving, said = in_child(work, text.parent, url)
    return Path(folder), waited + leaving, said


def mended(kind: str, server: Any, folder: Path) -> bool:
    """Whether the server has every row of the finished histories, each once."""
    if kind == "wandb":
        (sent,) = server.runs.values()
        return [own(row) for row in sent["history"]] == expected(folder)
    found = {k: v for k, v in server.points().items() if k[0] not in AXES and not k[0].startswith("summary/")}
    return found == points(folder)


def case(kind: str, trouble: str, midway: bool, text: Path) -> tuple[list[str], list[str]]:
    """One row of the table, and what the run has printed."""
    place = text.parent / f"{kind} {trouble} {midway}"
    ready, tell = os.pipe()
    done, told = os.pipe()
    with SERVERS[kind]() as server:
        server.elsewhere = "http://localhost:9/"
        front = Front(server.url)
        if trouble == "refused":
            front.refuse()
        else:
            front.start()

        def spoil() -> None:
            if trouble in ("killed", "frozen"):
                front.signal(signal.SIGKILL if trouble == "killed" else signal.SIGSTOP)
            else:
                server.mode = trouble

        def lose() -> None:  # in the run's process
            if trouble in CLIENT:
                signal_client(signal.SIGKILL if "killed" in trouble else signal.SIGSTOP)
            else:
                os.write(tell, b"x")
                os.read(done, 1)

        def watch() -> None:
            os.read(ready, 1)
            spoil()
            os.write(told, b"x")

        if midway and trouble not in CLIENT:
            threading.Thread(target=watch, daemon=True).start()
        elif not midway and trouble != "refused":
            server.mode = trouble
        folder, held, said = trained(text, place, kind, front.url, lose if midway else None)
        server.mode = "well"
        front.mend(trouble)
        code, _, sync_said = in_child(lambda: cli.main(["sync", str(folder), "--to", kind]), text.parent, front.url)
        whole = code == 0 and mended(kind, server, folder)
        front.stop()
    when = "in mid-run" if midway else "from the beginning"
    sentences = sum(f"albert-ablate sync {folder}" in line or f"albert-ablate sync '{folder}'" in line for line in said)
    cells = [{"wandb": "W&B", "mlflow": "MLflow"}[kind], WORDS[trouble], when, f"{held:.1f}"]
    return [*cells, f"{sentences} of {len(said)}", "yes" if whole else "NO"], said + (sync_said if not whole else [])


def swept(kind: str, workers: int, text: Path) -> list[str]:
    """A sweep of four runs with a server that hangs, beside the same without a tracker: a row of the second table."""
    seconds = {}
    for logger in ("none", kind):
        with SERVERS[kind]("silent") as server:
            place = text.parent / f"swept-{kind}-{workers}-{logger}"
            place.mkdir()
            file = place / "sweep.yaml"
            file.write_text("program: run.py\nmethod: grid\nparameters:\n  seed: {values: [0, 1, 2, 3]}\n")
            given = nano_arguments(text, place, logger)
            work = ["sweep", str(file), "--runs", str(place / "runs"), "--workers", str(workers), *given]
            began = time.perf_counter()
            code, _, said = in_child(lambda work=work: cli.main(work), text.parent, server.url)  # type: ignore[misc]
            seconds[logger] = time.perf_counter() - began
            assert code == 0, said
    lines = sum("albert-ablate sync" in line for line in said)
    name = {"wandb": "W&B", "mlflow": "MLflow"}[kind]
    return [name, str(workers), f"{seconds['none']:.1f}", f"{seconds[kind]:.1f}", str(lines)]


def nano_arguments(text: Path, place: Path, logger: str) -> list[str]:
    from forking import arguments

    return [a for a in arguments(text, place, f"logger={logger}") if not a.startswith("paths.runs=")]


def line(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SERVERS)
    parser.add_argument("--trouble", nargs="*", choices=WORDS)
    parser.add_argument("--verbose", action="store_true", help="print what each run has printed")
    options = parser.parse_args()
    kinds = [options.only] if options.only else [*SERVERS]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        text = write_text(Path(name) / "text.txt")
        trained(text, Path(name) / "first", "none", "", None)  # packs the text
        line(["tracker", "trouble", "when", "held up, s", "sentences of lines printed", "sync mends it"])
        line(["---", "---", "---", "---:", "---:", "---"])
        for kind in kinds:
            before = [(trouble, False) for trouble in BEFORE]
            midway = [(trouble, True) for trouble in (*MIDWAY, *(CLIENT if kind == "wandb" else ()))]
            for trouble, when in before + midway:
                if options.trouble is None or trouble in options.trouble:
                    cells, said = case(kind, trouble, when, text)
                    line(cells)
                    if options.verbose:
                        print("\n".join(said), flush=True)
        if options.trouble is None:
            print("\nFour runs of a sweep, whose server hangs:\n")
            line(["tracker", "workers", "without, s", "with, s", "sentences"])
            line(["---", "---:", "---:", "---:", "---:"])
            for kind in kinds:
                for workers in (1, 2):
                    line(swept(kind, workers, text))


if __name__ == "__main__":
    main()
