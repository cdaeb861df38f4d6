"""A page as HTML: one file that holds everything it needs, or what `albert-ablate ui` hands out.

A file has Vega once, the tables behind the charts by column, and a chart is drawn when it comes into view. Nothing is
fetched, and a policy in the page forbids it. Whatever comes from records is escaped.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from albert_ablate.analysis.numbers import visible
from albert_ablate.report import files, render, style
from albert_ablate.report.page import Page, Section
from albert_ablate.streams import digest

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Live:
    """What a page of a server has in place of what a file holds. version: changes with the page. addresses: of
    page.css, page.js and vega.js. home: that of the page of all runs, where this is another one."""

    version: str
    addresses: Mapping[str, str]
    home: str = ""


@cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(FOLDER),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup is ours
    )


def html(page: Page, live: Live | None = None) -> str:
    """The page as one file; live: as a page that asks its server for the next version of itself."""
    figures = [figure for section in page.sections for figure in section.all_figures]
    every = page.arms if isinstance(page.arms, style.Arms) else style.Arms(page.arms)
    themes = {
        "light": style.theme(arms=every),
        "dark": style.theme(dark=True, arms=every) | {"background": "transparent"},
    }
    content = render.safe_json({"arms": list(page.arms), "shown": style.SHOWN_ARMS, "themes": themes})
    charts = ",".join(f'"{name}":{text}' for name, text in dict(f.embedded for f in figures).items())
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            live=live,
            arms=list(zip(every, every.colors, every.dashes, strict=True)),
            content=f'{content[:-1]},"charts":{{{charts}}}}}',
            style="" if live else stylesheet(),
            script="" if live else script(),
            vega="" if live else render.vega_bundle(),
            dashes=[" ".join(map(str, d)) for d in style.DASHES],
            number_of={arm: i for i, arm in enumerate(every)},
            markup_of=partial(_cached_markup, appearance=sorted(zip(every, every.colors, every.dashes, strict=True)))
            if live
            else _fresh_markup,
            digest=lambda text: digest(str(text).encode()),
        )
    )


def _fresh_markup(section: Section, contents: Callable[[Section], Any]) -> Any:
    return contents(section)


def _cached_markup(section: Section, contents: Callable[[Section], Any], appearance: Any) -> Any:
    """The markup of a section, as long as it is the same section of arms that look the same."""
    if section.markup is None or section.markup[0] != appearance:
        section.markup = appearance, contents(section)
    return section.markup[1]


def stylesheet(live: bool = False) -> str:
    """The style sheet of pages; live: with what only pages of a server have."""
    return _environment().get_template("page.css.j2").render(light=style.LIGHT, dark=style.DARK, live=live)


def script() -> str:
    """The JavaScript of pages: drawing, filter, sorting, and following a server."""
    return (FOLDER / "page.js").read_text(encoding="utf-8")


def write_html(page: Page, output: Path, inputs: str = "") -> list[Path]:
    """inputs: a digest of all that the page was made from, by which `is_current` knows the file again."""
    content = html(page).encode()
    if inputs and not any(section.warnings for section in page.sections):  # which must be said again
        content += _stamp(inputs, content)
    files.replace(output, content)
    return [output]


def is_current(output: Path, inputs: str) -> bool:
    """Whether the file is a page made from just these inputs, and has not been changed since."""
    try:
        content = output.read_bytes()
    except OSError:
        return False
    stamp = _stamp(inputs, b"")
    return content.endswith(_stamp(inputs, content[: -len(stamp)]))


def _stamp(inputs: str, content: bytes) -> bytes:
    return f"<!-- {inputs} {hashlib.sha256(content).hexdigest()} -->\n".encode()
