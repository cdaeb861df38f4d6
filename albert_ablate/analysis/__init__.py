"""Tables of runs and measures of one run or one pair. Imports no torch; pandas only where it is used."""

import importlib
from typing import Any

# module of each name; study, charts and show stood in this package until the report had one of its own
_LAZY = {
    "Runs": ("albert_ablate.analysis.load", "Runs"),
    "load_runs": ("albert_ablate.analysis.load", "load_runs"),
    "charts": ("albert_ablate.report.charts", None),
    "show": ("albert_ablate.report.show", None),
    "study": ("albert_ablate.report.study", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    imported = importlib.import_module(module)
    return getattr(imported, attribute) if attribute else imported
