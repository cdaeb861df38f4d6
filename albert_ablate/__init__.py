"""albert_ablate: what normalization, dropout, weight decay, optimizer and clipping do to deep language models.

What the command line does, a notebook can: `compose(overrides)`, `build_model(cfg)`, `run(cfg)`,
`load_runs(path)`. Imports are lazy, so that reading records costs no torch.
"""

import importlib

__version__ = "0.1.0"

_LAZY = {
    "compose": "albert_ablate.config",
    "build_model": "albert_ablate.model.build",
    "run": "albert_ablate.training.run",
    "load_runs": "albert_ablate.analysis.load",
}
__all__ = list(_LAZY)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
