"""Switch Python's cyclic garbage collector off where many objects without cycles are made, or stay."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Disable the garbage collector: it would scan all records, rows and charts again and again, and find nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def preload(library: str) -> None:
    """Import a library whose half a million objects live as long as the process: the collector does not scan them while
    they are made, nor in any later collection, the one at the exit included."""
    if library not in sys.modules:
        with without_collector():
            importlib.import_module(library)
        gc.freeze()
