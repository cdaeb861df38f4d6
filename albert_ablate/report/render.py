"""From a chart to Vega-Lite, PNG or SVG, and checks of the file to be written."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from albert_ablate.analysis.numbers import DIGITS
from albert_ablate.config import ConfigError
from albert_ablate.records.cache import cache_folder, read_cached, write_cached
from albert_ablate.report.style import HEIGHT, WIDTH, theme
from albert_ablate.streams import digest

UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
FORMATS = (".html", ".png", ".svg")


def require() -> None:
    """One sentence where the extra is not installed."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Charts need {error.name}: pip install 'albert_ablate[plot]'.") from None


def vega_bundle() -> str:
    """The JavaScript that draws charts on a page."""
    return begin_vega_bundle().result()


@cache
def begin_vega_bundle() -> Future[str]:
    """Begin to bundle that JavaScript in a thread: it takes seconds, in which the runs can be read."""
    return ThreadPoolExecutor(1).submit(_vega_bundle)


def _vega_bundle() -> str:
    """The bundle, from the user's cache folder where this version of it has been made before."""
    import vl_convert

    file = cache_folder() / "report" / f"vega-{version('vl-convert-python')}.js"
    known = read_cached(file)
    if known is not None:
        return known.decode()
    made = vl_convert.javascript_bundle(None)  # type: ignore[arg-type]
    write_cached(file, made.encode())
    return made


@contextmanager
def unchecked() -> Iterator[None]:
    """Charts made here are not compared with Altair's schema, which takes half of a report's time: tests do that."""
    import altair as alt

    with alt.utils.schemapi.debug_mode(False):
        yield


def specification(chart: Any) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """The chart as Vega-Lite, and its tables by the names that stand for them there."""
    import altair as alt

    frames: dict[str, pd.DataFrame] = {}
    names: dict[int, str] = {}

    def collect(data=None, **options):
        if data is None:
            return collect
        if id(data) not in names:
            names[id(data)] = f"table{len(names)}"
            frames[names[id(data)]] = data
        return {"name": names[id(data)]}

    alt.data_transformers.register("albert_ablate", collect)
    with alt.data_transformers.enable("albert_ablate"):
        return chart.to_dict(validate=False), frames  # validation takes half of a report's time


def embedded(chart: Any) -> tuple[str, str]:
    """The chart for a page: a digest, and JSON of its specification and tables, {"spec", "tables"}: as wide as its
    place, without the legend of the arms where the page's filter is that."""
    spec, frames = specification(chart)
    filtered = any(p["name"] == "arms" for p in spec.get("params", ()))

    def walk(node: Any) -> None:
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                walk(child)
        if filtered and isinstance(node, dict) and node.get("field") == "arm" and "legend" in node:
            node["legend"] = None

    walk(spec)
    spec.pop("config", None)
    spec.setdefault("height", HEIGHT)
    spec |= {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    text = safe_json({"spec": spec, "tables": {name: packed(frame) for name, frame in frames.items()}})
    return digest(text.encode()), text


def safe_json(value: Any) -> str:
    """JSON that stands safely in a script element: no text of it can end the element or begin another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029]", lambda m: UNSAFE[m.group()], text)


def packed(frame: pd.DataFrame) -> dict[str, Any]:
    """A table by column, numbers rounded: {"n": rows, "c": {name: values, or {"u": unique values, "i": indices}}}."""
    columns: dict[str, Any] = {}
    for name in frame:
        column = frame[name]
        if column.dtype.kind in "biuf":
            values = _numbers(column.to_numpy())
        else:
            values = [
                None if v is None or v is pd.NA or v != v else v if isinstance(v, bool | int) else str(v)
                for v in column.to_numpy(object)  # ten times as fast as going through a column of texts
            ]
        unique = list(dict.fromkeys(values))
        if 4 * len(unique) < len(values):
            index = {v: i for i, v in enumerate(unique)}
            columns[str(name)] = {"u": unique, "i": [index[v] for v in values]}
        else:
            columns[str(name)] = values
    return {"n": len(frame), "c": columns}


def _numbers(values: np.ndarray) -> list[Any]:
    if values.dtype.kind in "bui":
        return values.tolist()
    whole = np.isfinite(values) & (values == np.round(values)) & (np.abs(values) < 1e15)
    return [
        int(v) if i else float(f"{v:.{DIGITS + 1}g}") if math.isfinite(v) else None
        for v, i in zip(values.tolist(), whole.tolist(), strict=True)
    ]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON can hold them: what is not finite is null."""
    plain = frame.astype(object).where(frame.notna() & ~frame.isin([np.inf, -np.inf]), None)
    return json.loads(json.dumps(plain.to_dict("records"), default=lambda v: v.item()))


class Drawn:
    """A chart as a notebook shows and stores it: a small PNG, that needs nothing to be looked at."""

    def __init__(self, chart: Any, title: str = ""):
        import altair as alt

        if title:
            chart = chart.properties(title=alt.Title(title, offset=14))
        joined = isinstance(chart, alt.HConcatChart | alt.VConcatChart)
        self.chart = chart if joined else chart.properties(width=WIDTH - 120)

    def _repr_png_(self) -> bytes:
        return picture(self.chart, ".png", scale=1.1)


def drawn(title: str, chart: Callable[..., Any], table: pd.DataFrame, *more: Any) -> Drawn | str:
    """`chart` of the table, for a notebook; a sentence where the table is empty."""
    return f"{title}: these runs have no data for it." if table.empty else Drawn(chart(table, *more), title)


def picture(chart: Any, suffix: str, scale: float = 2, arms: Sequence[str] = ()) -> bytes:
    """The chart as PNG (twice the pixels) or SVG, on white, in the colors of the page's arms."""
    import vl_convert

    spec, frames = specification(chart)
    _keep_near(spec, frames)
    if not {"hconcat", "vconcat", "concat"} & {*spec}:
        spec.setdefault("height", HEIGHT)
    spec |= {
        "datasets": {name: records(frame) for name, frame in frames.items()},
        "config": theme(arms=arms),
        "padding": 10,
    }
    if suffix == ".svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    return vl_convert.vegalite_to_png(spec, scale=scale)


def _keep_near(node: dict[str, Any], frames: dict[str, pd.DataFrame], table: str = "") -> None:
    """Move what lies more than four lengths of its axis beyond it to there, where it is cut off all the same: the
    renderer ends the process where a diverged run's loss is a line of 10^7 axis lengths."""
    table = (node.get("data") or {}).get("name", table)
    encoding = node.get("encoding") or {}
    for channel in ("x", "y"):
        coded = encoding.get(channel) or {}
        scale = coded.get("scale") or {}
        linear = coded.get("type") == "quantitative" and scale.get("type", "linear") == "linear"
        if table not in frames or not linear or not isinstance(scale.get("domain"), list):
            continue
        low, high = scale["domain"]
        for name in (channel, f"{channel}2"):
            if (field := (encoding.get(name) or {}).get("field")) in frames[table]:
                frames[table] = frames[table].copy()
                frames[table][field] = frames[table][field].clip(5 * low - 4 * high, 5 * high - 4 * low)
    for part in ("layer", "concat", "hconcat", "vconcat"):
        for child in node.get(part, ()):
            _keep_near(child, frames, table)


def writable(output: Path, suffixes: Sequence[str] = FORMATS) -> None:
    """One sentence where nothing can be written to `output`, before the work: a file, without suffixes a folder."""
    if suffixes and output.suffix not in suffixes:
        allowed = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]
        raise ConfigError(f"{output} cannot be written: its name must end in {allowed}.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output} cannot be written: there is no folder {output.parent}.")
    if output.exists() and output.is_dir() == bool(suffixes):
        raise ConfigError(f"{output} cannot be written: it is a {'folder' if suffixes else 'file'}.")
    if not os.access(output if output.is_dir() else output.absolute().parent, os.W_OK):
        raise ConfigError(f"{output} cannot be written: permission denied.")
