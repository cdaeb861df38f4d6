"""Main module of one rank of a distributed run, started by `launch`: python -m albert_ablate.training.rank_main.

The first line of standard input is the job as JSON: {"cfg", "verbose", "answer"}. Rank 0 writes the file `answer`: the
record, or the sentence of the error that ended the run.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError
from albert_ablate.config.secrets import masked
from albert_ablate.training.errors import RunFailed
from albert_ablate.training.run import run


def main() -> int:
    """Train the job that is read from standard input; exit code 0 if there is a record."""
    task = json.loads(sys.stdin.readline())
    # from here on standard input carries nothing; its end is the sign that the launcher has died
    threading.Thread(target=_stop_with_launcher, daemon=True).start()
    first = os.environ["RANK"] == "0"
    answer: dict[str, Any]
    try:
        answer = {"record": run(task["cfg"], task["verbose"] and first)}
    except ConfigError as error:
        answer = {"mistake": str(error)}  # every rank meets the same mistake; the launcher prints rank 0's
    except RunFailed as error:
        answer = {"failure": str(error)}
        if not first:
            print(masked(str(error)), file=sys.stderr)
    if first:
        Path(task["answer"]).write_text(json.dumps(answer))
    return 0 if "record" in answer else 1


def _stop_with_launcher() -> None:
    """Send this rank a SIGTERM once standard input ends, which means that the launcher has died."""
    while os.read(0, 4096):  # not by sys.stdin, whose lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
