"""Pages of the site that are made from something else: README, CHANGELOG, options, measures, commands, claims file."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
         "benchmarks/README.md": "benchmarks.md"}  # fmt: skip
MIDDLE, ROW = 360, 64  # of the diagram
COPIED = {"analysis/images": "images", "albert_ablate/schemas": "schemas"}  # folders: here, on the site


def on_config(config):
    """The pages of the options join the navigation."""
    groups = sorted(folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir())
    pages = [f"reference/{group}.md" for group in groups if any((ROOT / "conf" / group).glob("*.yaml"))]
    for entry in config.nav:
        if "Train" in entry:
            entry["Train"].insert(1, {"Every option": pages})
    return config


def on_files(files: Files, config) -> Files:
    """Add the made pages and the pictures that pages show."""
    made = {page: relinked((ROOT / source).read_text(), source) for source, page in PAGES.items()}
    made |= dict(options_pages()) | {"every_measure.md": measures_page(), "commands.md": commands_page()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for source, place in COPIED.items():
        for file in sorted((ROOT / source).iterdir()):
            if file.suffix in (".png", ".svg", ".json"):
                files.append(File.generated(config, f"{place}/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links of a page of docs/ to files beside that folder; the diagram of packages as a picture, since Mermaid would
    be fetched from another host."""
    if page.file.generated_by is not None:
        return markdown
    markdown = re.sub(r"```mermaid\n(.*?)```", lambda m: drawn(m[1]), markdown, flags=re.DOTALL)
    return relinked(markdown, f"docs/{page.file.src_uri}")


def drawn(graph: str) -> str:
    """A graph of `A --> B` lines as SVG: a package stands below all that import it."""
    arrows = re.findall(r"(\w+) --> (\w+)", graph)
    nodes = sorted({node for arrow in arrows for node in arrow})
    rank = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for above, below in arrows:
            rank[below] = max(rank[below], rank[above] + 1)
    rows = [[n for n in nodes if rank[n] == r] for r in range(max(rank.values()) + 1)]
    at: dict[str, tuple[float, float]] = {}
    for r, row in enumerate(rows):
        above = {n: [at[a][0] for a, b in arrows if b == n] or [MIDDLE] for n in row}
        row.sort(key=lambda n: sum(above[n]) / len(above[n]))  # below those that import it
        at |= {n: (2 * MIDDLE * (i + 1) / (len(row) + 1), 30 + ROW * r) for i, n in enumerate(row)}
    lines = [f'<path d="{arrow(at[a], at[b], [*at.values()])}" fill="none" stroke="currentColor" opacity="0.5" '
             'marker-end="url(#tip)"/>' for a, b in arrows]  # fmt: skip
    boxes = [f'<rect x="{x - 52:.0f}" y="{y - 15}" width="104" height="28" rx="5" stroke="currentColor" '
             'fill="var(--md-default-bg-color)"/>'
             f'<text x="{x:.0f}" y="{y + 4}" text-anchor="middle" fill="currentColor" font-size="13">{n}</text>'
             for n, (x, y) in at.items()]  # fmt: skip
    tip = ('<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
           '<path d="M0 0L8 4L0 8z" fill="currentColor"/></marker></defs>')  # fmt: skip
    size = f"0 0 {2 * MIDDLE} {ROW * len(rows)}"
    return (
        f'<svg viewBox="{size}" role="img" aria-label="packages and their imports">{tip}{"".join(lines + boxes)}</svg>'
    )


def arrow(start: tuple[float, float], end: tuple[float, float], boxes: list[tuple[float, float]]) -> str:
    """The path from a box down to another; where a box is in the way, it bends outwards."""
    (x1, y1), (x2, y2) = start, end
    hit = any(y1 < y < y2 and abs(x1 + (x2 - x1) * (y - y1) / (y2 - y1) - x) < 56 for x, y in boxes)
    out = (95 + 35 * (y2 - y1) / ROW) * (1 if x1 + x2 >= MIDDLE * 2 else -1) if hit else 0
    y1, y2 = y1 + 14, y2 - 16
    bend = f"{x1 + out:.0f} {y1 + ROW / 2:.0f} {x2 + out:.0f} {y2 - ROW / 2:.0f}" if out else f"{x1} {y1} {x2} {y2}"
    return f"M{x1:.0f} {y1}C{bend} {x2:.0f} {y2}"


def schedules() -> str:
    """The learning rate over the budget by each schedule with its defaults, as SVG."""
    from albert_ablate.config import compose, construct, options

    panels = []
    for i, name in enumerate(options()["schedule"]):
        rate = construct(compose([f"schedule={name}"]).schedule)
        points = " ".join(f"{x:.1f},{90 - 70 * rate((x + 0.5) / 120):.1f}" for x in range(120))
        panels.append(f'<g transform="translate({4 + i * 144} 0)">'
                      f'<text x="0" y="12" fill="currentColor" font-size="11">{name}</text>'
                      '<path d="M0 20V90H120" fill="none" stroke="currentColor" opacity="0.4"/>'
                      f'<polyline points="{points}" fill="none" stroke="#3b6fb6" stroke-width="2"/></g>')  # fmt: skip
    words = "Learning rate over the budget, as a share of its peak, with the defaults below."
    return (
        f'<svg viewBox="0 0 {144 * len(panels)} 94" role="img" aria-label="{words}">{"".join(panels)}</svg>\n\n{words}'
    )


def relinked(text: str, source: str) -> str:
    """The text of a file of the repository as it is on the site: its links, and outputs with a class for extra.css."""

    def link(match: re.Match) -> str:
        target, _, anchor = match[1].partition("#")
        if "://" in target or not target:
            return match[0]
        place = (ROOT / source).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        place = PAGES.get(place, place.removeprefix("docs/"))
        for folder, there in COPIED.items():
            place = place.replace(folder, there)
        return f"]({place}{'#' + anchor if anchor else ''})"

    text = re.sub(r"^```text$", "``` { .text .printed }", text, flags=re.MULTILINE)
    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def options_pages() -> Iterator[tuple[str, str]]:
    """A page for each group of options: formula, source and defaults, as `albert-ablate methods` prints them."""
    from albert_ablate.report.methods import methods

    groups: dict[str, list] = {}
    for method in methods():
        groups.setdefault(method.kind, []).append(method)
    for kind, own in sorted(groups.items()):
        parts = [
            f"# {kind}",
            f"What `{kind}=NAME` takes. Made from the components, as `albert-ablate methods {kind}` is.",
        ]
        if kind in ("norm", "dropout", "dropout_time"):
            parts.append("![every option before training](../images/methods.png)")
        if kind == "schedule":
            parts.append(schedules())
        for m in own:
            parts.append(f"## {m.option}")
            if m.formula:
                parts.append(f"`{m.formula}`" if "`" not in m.formula else m.formula)
            cited = [f"{s['authors']} {s['year']}" + (f", [arXiv {s['arxiv']}](https://arxiv.org/abs/{s['arxiv']})"
                     if s["arxiv"] else "") for s in m.sources]  # fmt: skip
            if cited:
                parts.append("Source: " + "; ".join(cited) + ".")
            if m.license:
                parts.append(f"License: {m.license}. Origin: {m.origin}.")
            if m.defaults:
                rows = [[f"`{kind}.{k}`", f"`{json.dumps(v)}`"] for k, v in m.defaults.items()]
                parts.append(table(["key", "default"], rows))
        yield f"reference/{kind}.md", "\n\n".join(parts) + "\n"


def measures_page() -> str:
    """Every measure that a claim may ask for, from the registry."""
    from albert_ablate.analysis.registry import MEASURES
    from albert_ablate.report.measures import measure_facts

    rows = [
        [f"`{m['name']}`", m["text"], m["unit"], m["better"], m["scale"], m["of"],
         f"`albert-ablate evaluate RUN {m['evaluation']}`" if m["evaluation"] else ""]
        for m in map(measure_facts, MEASURES.values())
    ]  # fmt: skip
    head = ["measure", "what it is", "unit", "better", "judged as", "of", "needs"]
    return f"""# Every measure

What `measure:` of a [claim](claims_file.md) and `--metric` of `compare` take; made from the registry. Besides these
`domains.CORPUS` is bits per byte on another corpus, and `column.NAME` and `ratio.NAME` are columns of
[runs of other trainers](others_runs.md).

{table(head, rows)}
"""


def commands_page() -> str:
    """The help of every command, as the terminal prints it."""
    from typer.main import get_command

    from albert_ablate.cli import app

    tool = get_command(app)
    parts = ["# Commands", "`albert-ablate COMMAND --help` prints the same."]
    for name, command in sorted(tool.commands.items()):  # type: ignore[attr-defined]
        parts.append(f"## {name}")
        parts.append((command.help or "").split("\f")[0].strip())
        rows = []
        for p in command.params:
            words = getattr(p, "help", None) or ""
            shown = "/".join([*p.opts, *p.secondary_opts]) if p.param_type_name == "option" else p.name.upper()
            rows.append([f"`{shown}`", words])
        if rows:
            parts.append(table(["argument or option", "what it does"], rows))
    return "\n\n".join(parts) + "\n"
