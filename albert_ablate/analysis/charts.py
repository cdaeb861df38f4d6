"""Charts of records: tables in, Altair charts out. A chart draws what it is given and computes nothing else.

python -m albert_ablate.analysis.charts RUN_FOLDER -o run.png     (.html, .svg and .png)
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from albert_ablate.records.history import read_history

COLORS = {"batch": "#b8c4d6", "train": "#3b6fb6", "validation": "#d1495b"}


def curves(folder: Path):
    """One run over its tokens: losses, gradient norm before clipping and learning rate, gradient norm by depth."""
    import altair as alt

    record = json.loads((folder / "record.json").read_text())
    steps, evals, layers = (
        read_history(folder, name, record["histories"]).to_pandas() for name in ("steps", "evals", "layers")
    )
    layers = layers[layers["step"] > 0].assign(grad_norm=layers["grad_norm"] ** 2)
    layers = layers.groupby(["tokens", "layer"], as_index=False)["grad_norm"].sum()  # a block's, from its sublayers'
    layers["grad_norm"] **= 0.5
    x = alt.X("tokens:Q", title="tokens", axis=alt.Axis(format="~s", tickCount=5))
    color = alt.Color("series:N", title=None, scale=alt.Scale(domain=list(COLORS), range=list(COLORS.values())))
    batch = steps.assign(series="batch")
    held = evals[evals["split"] != "test"].rename(columns={"split": "series"})
    low = min(batch["loss"].min(), held["loss"].min())
    y = alt.Y("loss:Q", title="loss (nats per token)", scale=alt.Scale(domainMin=float(low), zero=False))
    unigram = pd.DataFrame({"loss": [record["summary"]["unigram_loss"]], "what": ["unigram model"]})
    losses = alt.layer(
        alt.Chart(batch).mark_line(strokeWidth=1).encode(x, y, color),
        alt.Chart(held)
        .mark_line(point=True)
        .encode(
            x,
            y,
            color,
            strokeDash=alt.condition("datum.series == 'validation'", alt.value([5, 3]), alt.value([1, 0])),
            tooltip=["tokens", "series", "loss", "bits_per_byte"],
        ),
        alt.Chart(unigram).mark_rule(strokeDash=[4, 3], color="#888").encode(y="loss:Q"),
        alt.Chart(unigram).mark_text(align="left", dx=4, dy=-6, x=0, color="#666").encode(y="loss:Q", text="what:N"),
    ).properties(title="Loss: each training batch, and both splits in evaluation mode", width=330, height=240)
    norm = alt.Y("grad_norm:Q", title="gradient norm", scale=alt.Scale(type="log"))
    norms = (
        alt.Chart(steps)
        .mark_line(strokeWidth=1, color=COLORS["train"])
        .encode(x, norm, tooltip=["step", "grad_norm", "clipped"])
        .properties(title="Gradient norm before clipping", width=330, height=105)
    )
    rate = (
        alt.Chart(steps)
        .mark_line(color="#555")
        .encode(x, alt.Y("lr:Q", title="learning rate", axis=alt.Axis(format="~g")))
        .properties(title="Learning rate", width=330, height=75)
    )
    depth = (
        alt.Chart(layers)
        .mark_rect()
        .encode(
            alt.X(
                "tokens:O",
                title="tokens",
                axis=alt.Axis(format=".2~s", labelOverlap="greedy", labelAngle=0, ticks=False),
            ),
            alt.Y("layer:O", title="block", axis=alt.Axis(labelOverlap=True, ticks=False)),
            alt.Color("grad_norm:Q", title="norm", scale=alt.Scale(type="log", scheme="viridis")),
            tooltip=["tokens", "layer", "grad_norm"],
        )
        .properties(title="Gradient norm by depth", width=330, height=240)
    )
    panels = [losses, alt.vconcat(norms, rate, spacing=14)]
    panels += [depth] if len(layers) else []
    return (
        alt.hconcat(*panels, spacing=30)
        .resolve_scale(color="independent")
        .properties(
            title=alt.Title(record["label"], subtitle=f"seed {record['seed']}, {record['status']}", anchor="start")
        )
        .configure_view(stroke=None)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw one run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("run.html"))
    options = parser.parse_args()
    if not (options.folder / "record.json").exists():
        print(f"{options.folder} is no run folder: it holds no record.json.", file=sys.stderr)
        return 2
    curves(options.folder).save(options.output, **({"scale_factor": 2} if options.output.suffix == ".png" else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
