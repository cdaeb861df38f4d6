"""`compare` on a terminal: a line after each pair, and below the lines a panel of the contrasts so far that is drawn
again after each pair. What worker processes print meanwhile goes above the panel too."""

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any

from albert_ablate.config.secrets import masked
from albert_ablate.referee.answer import (
    ACCEPT,
    EXIT_CODES,
    INADMISSIBLE,
    NO_EFFECT,
    REJECT,
    UNDECIDED,
    Contrast,
    picture,
)

COLORS = {ACCEPT: "green", REJECT: "red", NO_EFFECT: "blue", UNDECIDED: "yellow", INADMISSIBLE: "magenta"}
PICTURE = re.compile(r"  ([ =0]{61}|[ \[\]o-]{61})  ")  # a line of `picture`
DECISION = re.compile(rf"\b({'|'.join(EXIT_CODES)})\b")


def on_terminal() -> bool:
    """Whether the standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@dataclass
class Lines(AbstractContextManager["Lines"]):
    """Output without a panel, for what is not a terminal: lines alone."""

    say: Callable[[str], None]

    def watch(self, contrasts: Sequence[Contrast]) -> None:
        """Show the contrasts after a pair, whose line has been printed."""

    def __exit__(self, *error: Any) -> None:
        pass


@dataclass
class Terminal(AbstractContextManager["Terminal"]):
    """Lines with colors, and below them a panel. live: whether there is a panel.

    While it is open the file descriptors 1 and, where it is a terminal, 2 are a pipe: a worker that wrote to the
    terminal itself would write into the panel.
    """

    console: Any = None  # rich's, of the terminal
    live: bool = True
    _contrasts: Sequence[Contrast] = ()
    _kept: dict[int, int] = field(default_factory=dict)  # what 1 and 2 were
    _panel: Any = None
    _reader: threading.Thread | None = None

    def __post_init__(self) -> None:
        from rich.console import Console

        if self.console is None:
            self.console = Console(file=os.fdopen(os.dup(1), "w"), highlight=False, force_terminal=True)

    def say(self, text: str) -> None:
        """Print a line in colors, secrets masked."""
        self.console.print(styled(masked(text)), soft_wrap=self.live)

    def watch(self, contrasts: Sequence[Contrast]) -> None:
        """Show these contrasts in the panel."""
        self._contrasts = contrasts
        if self._panel is not None:
            self._panel.update(panel(contrasts), refresh=True)

    def __enter__(self) -> "Terminal":
        from rich.live import Live

        sys.stdout.flush()
        reading, writing = os.pipe()
        self._kept = {fd: os.dup(fd) for fd in (1, 2) if fd == 1 or os.isatty(fd)}
        for fd in self._kept:
            os.dup2(writing, fd)
        os.close(writing)
        self._reader = threading.Thread(target=self._forward, args=(os.fdopen(reading, errors="replace"),), daemon=True)
        self._reader.start()
        if not self.live:
            return self
        self._panel = Live(panel(()), console=self.console, auto_refresh=False, transient=True, redirect_stdout=False,
                           redirect_stderr=False)  # fmt: skip
        self._panel.start()
        return self

    def _forward(self, written: IO[str]) -> None:
        for line in written:
            self.say(line.rstrip("\r\n"))

    def __exit__(self, *error: Any) -> None:
        sys.stdout.flush()
        for fd, original in self._kept.items():
            os.dup2(original, fd)
            os.close(original)
        assert self._reader is not None
        self._reader.join(timeout=1)  # workers that stay warm have the pipe open
        if self._panel is not None:
            self._panel.stop()
            self._panel = None


def panel(contrasts: Sequence[Contrast]) -> Any:
    """Render a panel: of each contrast the pairs, the change so far with its interval, and its text plot."""
    from rich.console import Group
    from rich.text import Text

    out: list[Any] = []
    for c in contrasts:
        state = f"{c.pairs} of at most {c.max_pairs} pairs"
        out.append(Text.assemble((c.candidate, "bold"), f" against {c.baseline}: {state}", *decided(c)))
        out += [styled(line) for line in picture(c)] or [Text("  the interval comes with the second pair", "dim")]
    return Group(*out) if out else Text("the first pair is being run", "dim")


def decided(c: Contrast) -> list[Any]:
    """The decision of a contrast in its color, for the panel; nothing while it is undecided."""
    return [] if c.decision == UNDECIDED else [", ", (c.decision, f"bold {COLORS[c.decision]}")]


def styled(line: str) -> Any:
    """Color a line: decisions, and the parts of a text plot."""
    from rich.text import Text

    out = Text(line)
    if PICTURE.match(line):
        out.highlight_regex(r"(?<=  )[ =0]*=[ =0]*(?=  )", "green")
        out.highlight_regex(r"\[[-o]*\]|\[[-o]*$", "bold cyan")
    for match in DECISION.finditer(line):
        out.stylize(f"bold {COLORS[match[1]]}", *match.span())
    return out
