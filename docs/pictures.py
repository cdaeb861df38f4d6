"""The pictures of docs/report.md, of real runs: `python docs/pictures.py FOLDER` writes docs/images/*.png.

It trains small runs in FOLDER (about ten minutes of one core; what is there is kept), makes the pages of `report` and
`show`, and takes a picture of each chart that docs/report.md shows. A chart is called by its heading.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
NAMED = {  # headings that hold names of arms or of one page alone -> file
    r"Looks: .*": "looks",
    r"Paired difference to .*, each seed": "paired_difference_each_seed",
    r".* at the end \(.*\), each seed": "validation_loss_each_seed",
    r"Every arm against every other.*": "every_arm_against_every_other",
    r"Seed against seed.*": "seed_against_seed",
    r"Validation loss \(.*": "validation_loss",
    r"Difference: .*": "difference",
    r"\S+ and \S+": "interactions",
}
WIDTH = 900
FILES = {
    "claims.yaml": """\
family: {name: pictures}
arms:
  pre: [norm=pre_ln]
  rezero: [norm=rezero]
  dropout: [norm=pre_ln, dropout=uniform, dropout.mean=0.1]
  both: [norm=rezero, dropout=uniform, dropout.mean=0.1]
  post: [norm=post_ln]
  post_dropout: [norm=post_ln, dropout=uniform, dropout.mean=0.1]
regimes:
  nano: {text: at 4 layers of width 32, overrides: [model=nano, budget.tokens=30_000, data.train_size=20_000]}
claims:
  - name: dropout_with_post_ln
    statement: Dropout lowers the test loss of Post-LN.
    parts: [{treatment: post_dropout, control: post, measure: test_loss}]
    tuned: []
    screen: {regime: nano, N: 8}
  - name: dropout_narrows_the_gap
    statement: Dropout narrows the gap between training and validation loss.
    parts: [{treatment: dropout, control: pre, measure: gap, margin: 0.01}]
    tuned: []
    screen: {regime: nano, N: 8}
  - name: rezero_trains_better
    statement: ReZero reaches a lower test loss than Pre-LN.
    parts: [{treatment: rezero, control: pre, measure: test_loss}]
    tuned: []
    screen: {regime: nano, N: 8}
  - name: post_ln_trains_better
    statement: Post-LN reaches a lower test loss than Pre-LN.
    parts: [{treatment: post, control: pre, measure: test_loss}]
    tuned: []
    screen: {regime: nano, N: 8}
  - name: dropout_with_rezero
    statement: Dropout lowers the test loss of ReZero.
    parts: [{treatment: both, control: rezero, measure: test_loss}]
    tuned: []
    screen: {regime: nano, N: 8}
""",
    "study.yaml": """\
program: run.py
method: grid
metric: {name: val_loss, goal: minimize}
parameters:
  model: {value: nano}
  budget.tokens: {value: 20_000}
  norm: {values: [pre_ln, rezero]}
  seed: {values: [0, 1, 2, 3]}
""",
    "search.yaml": """\
program: run.py
method: random
metric: {name: val_loss, goal: minimize}
run_cap: 20
parameters:
  model: {value: nano}
  model.layers: {values: [2, 3, 4]}
  budget.tokens: {value: 10_000}
  optimizer.lr: {distribution: log_uniform_values, min: 0.0005, max: 0.05}
  clip.max_norm: {values: [0.3, 1.0, 3.0]}
  optimizer.weight_decay: {distribution: uniform, min: 0.0, max: 0.3}
  norm: {values: [pre_ln, rezero]}
""",
}
COMMANDS = """
albert-ablate judge claims.yaml --run
albert-ablate tune study.yaml --runs tuned
albert-ablate sweep study.yaml --runs tuned
albert-ablate report tuned -o tuned.html
albert-ablate evaluate runs corruption units
albert-ablate report runs -o report.html
albert-ablate sweep search.yaml --runs search
albert-ablate report search -o search.html
cd runs/by-name
albert-ablate show model=nano,data*seed=0 -o ../../one.html
albert-ablate show model=nano,data*seed=0 model=nano,norm=rezero,data*seed=0 -o ../../two.html
"""


def file_of(heading: str) -> str:
    """The file of a chart: its heading in small letters, units left out."""
    for pattern, name in NAMED.items():
        if re.fullmatch(pattern, heading):
            return name
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r" \(.*\)", "", heading).lower()).strip("_")


def wanted() -> set[str]:
    return set(re.findall(r"\(images/(\w+)\.png\)", (IMAGES.parent / "report.md").read_text()))


def draw(page: Page, report: Path, done: set[str]) -> None:
    """Save what docs/report.md shows of a report and no page before it had."""
    page.set_viewport_size({"width": WIDTH, "height": 800})
    page.goto(report.resolve().as_uri())
    if report.stem == "report":  # the picture of README.md
        page.set_viewport_size({"width": 1200, "height": 800})
        page.wait_for_timeout(1500)
        page.screenshot(path=IMAGES / "report.png")
        page.set_viewport_size({"width": WIDTH, "height": 800})
    if report.stem == "search":  # whose chart has many axes
        page.set_viewport_size({"width": 1200, "height": 800})
    if page.locator("article.card").count():  # as it is before its details are unfolded
        page.locator("article.card").first.screenshot(path=IMAGES / "verdict.png")
        done.add("verdict")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    places: dict[str, Locator] = {}
    for figure in page.locator("figure").all():
        heading = figure.locator("h3").inner_text().strip()
        kind = "map" if figure.get_attribute("data-arm") and figure.get_attribute("data-group") else file_of(heading)
        places.setdefault(kind, figure)
    for name in sorted((places.keys() & wanted()) - done):
        if group := places[name].get_attribute("data-group"):  # only the charts of one quantity are shown at a time
            section = places[name].get_attribute("data-section")
            page.locator(f'select.groups[data-section="{section}"]').select_option(group)
        places[name].scroll_into_view_if_needed()
        page.wait_for_timeout(700)  # charts are drawn where they are seen
        places[name].screenshot(path=IMAGES / f"{name}.png")
        done.add(name)


def main(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", COMMANDS], cwd=folder, env=os.environ | {"PATH": path}, check=True)
    IMAGES.mkdir(exist_ok=True)
    done: set[str] = set()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 800})
        for name in ("report", "search", "tuned", "one", "two"):
            draw(page, folder / f"{name}.html", done)
        browser.close()
    if missing := wanted() - done:
        print(f"not on these pages: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
