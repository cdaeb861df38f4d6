"""Handle Ctrl-C and SIGTERM for a while. Only the main thread can; in other threads nothing changes."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stops_handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Context in which `handler` receives Ctrl-C and SIGTERM."""
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
    """Notes the first Ctrl-C or SIGTERM, so that training stops at the next step; a second one ends the process.

    number: of the signal, None before there is one.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Context in which signals are noted."""
        with stops_handled(self._note):
            yield

    def listen(self) -> None:
        """Install the handler again, in case another one was installed meanwhile."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.number is not None:
            raise SystemExit(128 + number)  # Lightning turns a KeyboardInterrupt into exit code 1
        self.number = number
