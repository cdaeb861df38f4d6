"""Ctrl-C and SIGTERM, handled for a while. Only the main thread can ask for it; elsewhere nothing changes."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stops_handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within it `handler` takes Ctrl-C and SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class StopSignal:
    """Notes the first Ctrl-C or SIGTERM, for a run to stop at its next boundary; a second one ends the process.

    number: of the signal, None before there is one.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        with stops_handled(self._note):
            yield

    def listen(self) -> None:
        """Take the signals again, from whatever handler was put in front meanwhile."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.number is not None:
            raise SystemExit(128 + number)  # Lightning turns a KeyboardInterrupt into exit code 1
        self.number = number
