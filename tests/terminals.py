"""Commands that write to a terminal, and what the terminal then shows."""

import os
import re
import subprocess
import sys

from forking import Child


def on_pty(command, columns=80, **options):
    """What a command writes to a terminal of so many columns, and its exit code."""
    ours, its = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **options.pop("env", {})}
    child = subprocess.Popen(command, stdout=its, stderr=its, stdin=subprocess.DEVNULL, env=environment, **options)
    return _written(ours, its), child.wait()


def forked_on_pty(work, columns, env):
    """What `work`, which gives an exit code, writes to a terminal from a forked process, and its exit code."""
    ours, its = os.openpty()

    def on_it():
        for descriptor in (0, 1, 2):
            os.dup2(its, descriptor)
        os.close(its)
        os.close(ours)
        os.environ |= {"TERM": "xterm", "COLUMNS": str(columns), **env}
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        code = work()
        sys.stdout.flush()
        return code

    child = Child(on_it)
    return _written(ours, its), child.wait()[1]


def _written(ours, its):
    """All that is written to the end `its` of a terminal, until nobody has it open any more."""
    os.close(its)
    seen = b""
    try:
        while block := os.read(ours, 1 << 16):
            seen += block
    except OSError:  # EIO: the command has ended
        pass
    os.close(ours)
    return seen.decode()


def lines_shown(written):
    """The lines of a terminal, wide enough, after what was written to it: text, CR, LF, and erasing to a line's end."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[K|\r|\n|[^\x1b\r\n]+", written):
        line = lines[-1]
        if part == "\n":
            lines.append("")
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            lines[-1] = line[:column]
        else:
            lines[-1] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return lines
