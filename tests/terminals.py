"""Commands that write to a terminal, and what the terminal then shows."""

import os
import re
import subprocess


def on_pty(command, columns=80, **options):
    """What a command writes to a terminal of so many columns, and its exit code."""
    ours, its = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **options.pop("env", {})}
    child = subprocess.Popen(command, stdout=its, stderr=its, stdin=subprocess.DEVNULL, env=environment, **options)
    os.close(its)
    seen = b""
    try:
        while block := os.read(ours, 1 << 16):
            seen += block
    except OSError:  # EIO: the command has ended
        pass
    os.close(ours)
    return seen.decode(), child.wait()


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
