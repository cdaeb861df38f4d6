"""A picture of the options: dropout over depth and time, and what each placement does to a deep model before training.

The placements are measured, not drawn from formulas: a decoder of each is built and run forward and backward once.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.config import ConfigError, compose, options

LAYERS, WIDTH, CONTEXT, BATCH, MEAN = 24, 32, 32, 4, 0.1
STEPS = 100  # of the budget, for shapes over time
OWN, REFERENCE = "#3b6fb6", "#9aa3af"
COLUMNS = 6
SPREAD = 3000.0  # how far from the median option's extremes a panel reaches


def dropouts() -> tuple[pd.DataFrame, list[str]]:
    """option, x, rate, over ("depth" or "time") of every shape at an equal mean; and notes.

    x: the block from 1 on, or the share of the budget spent, where the rate is that of a block at the mean.
    """
    from albert_ablate.model.build import build
    from albert_ablate.model.dropout import multiplier

    rows: list[tuple[str, float, float, str]] = []
    notes = []
    for name in options()["dropout"]:
        try:
            node = dict(compose([f"dropout={name}"]).dropout)
            made = build({**node, "mean": MEAN} if "mean" in node else node)
        except ConfigError as error:
            notes.append(f"dropout={name} is left out: {error}")
            continue
        rows += [(name, i + 1, made.rate(i, LAYERS), "depth") for i in range(LAYERS)]
    for name in options()["dropout_time"]:
        time = build(dict(compose(["dropout=uniform", f"dropout_time={name}"]).dropout_time))
        rows += [(name, (i + 0.5) / STEPS, MEAN * multiplier(time, i, STEPS), "time") for i in range(STEPS)]
    return pd.DataFrame(rows, columns=["option", "x", "value", "over"]), notes


def placements() -> tuple[pd.DataFrame, list[str]]:
    """option, x (block), value, over ("variance" or "gradient") of every placement at initialization; and notes.

    variance: of the residual stream as it leaves a block. gradient: norm of the loss's gradient over the block's
    parameters.
    """
    import torch

    torch.set_num_threads(1)
    tokens = torch.randint(0, 256, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    rows, notes = [], []
    for name in options()["norm"]:
        try:
            with warnings.catch_warnings(record=True) as said:
                profile = _profile(tokens, f"norm={name}")
            notes += [str(w.message) for w in said if str(w.message).startswith("norm=")]
        except ConfigError as error:
            try:  # learned positions do not suit each
                profile = _profile(tokens, f"norm={name}", "attention=rotary")
                notes.append(f"norm={name} is drawn with attention=rotary.")
            except ConfigError:
                notes.append(f"norm={name} is left out: {error}")
                continue
        rows += [(name, i + 1, value, over) for over, values in profile.items() for i, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["option", "x", "value", "over"]), notes


def _profile(tokens: Any, *overrides: str) -> Mapping[str, list[float]]:
    import torch

    from albert_ablate.model.build import build_model

    sizes = {"layers": LAYERS, "width": WIDTH, "heads": 4, "context": CONTEXT}
    # the optimizer is not used, and nGPT refuses weight decay
    cfg = compose([*overrides, "optimizer.weight_decay=0", *(f"model.{k}={v}" for k, v in sizes.items())])
    model = build_model(cfg).double().eval()  # without a norm, float32 overflows on the way back
    variance: list[float] = []

    def note(block: Any, given: Any, stream: Any) -> None:
        first = stream if isinstance(stream, torch.Tensor) else next(s for s in stream if isinstance(s, torch.Tensor))
        variance.append(first.detach().var().item())

    for block in model.stack:
        block.register_forward_hook(note)
    logits = model(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = []
    for block in model.stack:
        norms = [p.grad.norm() for p in block.parameters() if p.grad is not None]
        gradients.append(torch.stack(norms).norm().item() if norms else 0.0)
    return {"variance": variance, "gradient": gradients}


def picture(dropout: pd.DataFrame, norm: pd.DataFrame) -> Any:
    """Small multiples: one panel an option, in gray the option all others are compared with."""
    import altair as alt

    blocks, share = [1, LAYERS // 3, 2 * LAYERS // 3, LAYERS], [0, 0.5, 1]
    parts = [
        _grid(dropout, "depth", "uniform", f"Dropout rate by block, at mean {MEAN:g}", blocks),
        _grid(dropout, "time", "constant", f"Dropout rate over training, middle block, at mean {MEAN:g}", share),
        _grid(norm, "variance", "pre_ln", "Placements: variance of the residual stream after each block", blocks, True),
        _grid(norm, "gradient", "pre_ln", "Placements: gradient norm of each block's parameters", blocks, True),
    ]
    subtitle = [
        f"Placements as initialized: {LAYERS} blocks of width {WIDTH}, random tokens, one forward and backward pass.",
        "Gray: uniform, constant and pre_ln. A line that leaves its panel has its extreme in the title.",
    ]
    title = alt.Title("What the options do before training", subtitle=subtitle, anchor="start", offset=18, fontSize=16)
    return (
        alt.vconcat(*(p for p in parts if p is not None), spacing=30)
        .properties(title=title)
        .configure_view(stroke="#e3e6ea")
        .configure_axis(grid=False, labelFontSize=9)
        .configure_concat(spacing=12)
    )


def _grid(data: pd.DataFrame, over: str, reference: str, title: str, ticks: list, log: bool = False) -> Any:
    import altair as alt

    data = data[data["over"] == over]
    if data.empty:
        return None
    shown = data[np.isfinite(data["value"]) & ((data["value"] > 0) | (not log))]
    y_axis: dict[str, Any]
    if log:  # an option that explodes must not flatten the others
        ends = shown.groupby("option")["value"].agg(["min", "max"])
        low = max(ends["min"].min(), ends["min"].median() / SPREAD) / 1.5
        high = min(ends["max"].max(), ends["max"].median() * SPREAD) * 1.5
        scale = alt.Scale(type="log", domain=[low, high])
        decades = [10.0**n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        y_axis = {"format": "~g", "values": decades[:: max(1, len(decades) // 3)]}
    else:
        low, high = 0.0, float(shown["value"].max()) * 1.1
        scale, y_axis = alt.Scale(domain=[low, high]), {"format": "~g", "tickCount": 3}
    panels: list[Any] = []
    for i, name in enumerate(dict.fromkeys(data["option"])):
        own = shown[shown["option"] == name]
        x = alt.X(
            "x:Q",
            title=None,
            scale=alt.Scale(domain=[ticks[0], ticks[-1]], nice=False),
            axis=alt.Axis(values=ticks, format="~g"),
        )
        side = alt.Axis(labels=i % COLUMNS == 0, ticks=i % COLUMNS == 0, **y_axis)
        y = alt.Y("value:Q", title=None, scale=scale, axis=side)
        lines = [
            alt.Chart(shown[shown["option"] == which]).mark_line(color=color, strokeWidth=width, clip=True).encode(x, y)
            for which, color, width in ((reference, REFERENCE, 1), (name, OWN, 2))
        ]
        ended = data[data["option"] == name]["value"]
        out = own.empty or len(own) < len(ended) or own["value"].max() > high or own["value"].min() < low
        extreme = (
            max(ended, key=lambda v: abs(math.log(v / math.sqrt(low * high))) if v > 0 else math.inf) if out else 0
        )
        head = f"{name}: {extreme:.1g}" if out else name
        panels.append(
            alt.layer(*lines).properties(width=118, height=76, title=alt.Title(head, fontSize=11, fontWeight="normal"))
        )
    return alt.concat(*panels, columns=COLUMNS).properties(title=alt.Title(title, anchor="start", fontSize=13))


def draw(file: Path) -> list[str]:
    """Write the picture to `file` (.png, .svg or .html); gives notes on what was left out."""
    if file.suffix not in (".png", ".svg", ".html"):
        raise ConfigError(f"--plot {file} is not allowed: its name must end in .png, .svg or .html.")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot {file} cannot be written: there is no folder {file.parent}.")
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError:
        raise ConfigError("Pictures need altair: pip install 'albert_ablate[plot]'.") from None
    (dropout, left), (norm, out) = dropouts(), placements()
    picture(dropout, norm).save(file, **({"scale_factor": 2} if file.suffix == ".png" else {}))
    return left + out
