"""Terminal output of a run: the banner before it, a progress bar during it, a table of results after it."""

import os
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from albert_ablate.evaluations.commands import show_evaluations
from albert_ablate.records.json_output import NO_BARS


def count(n: float) -> str:
    """1_234_567 -> 1.23 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g}"


def duration(seconds: float) -> str:
    """3723 -> 1 h 2 min; 75 -> 1 min 15 s."""
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 60} min {s % 60} s" if s >= 60 else f"{s} s"


def rough_duration(seconds: float) -> str:
    """What is only about known: 3723 -> 1 h 2 min; 75 -> 1 min; 7.2 -> 7 s."""
    whole = duration(seconds)
    return whole.partition(" min")[0] + " min" if 60 <= round(seconds) < 3600 else whole


def hint(text: str) -> None:
    """Tell who watches what to do next, on stderr: not in a pipe's output, and not under --quiet."""
    if sys.stderr.isatty() and not os.environ.get(NO_BARS):
        print(text, file=sys.stderr)


def banner(record: Mapping, estimate: float | None) -> str:
    """Describe what is trained in a few lines. estimate: seconds, None if unknown."""
    model, data, budget = record["model"], record["data"], record["budget"]
    lines = [
        f"{record['label']}, seed {record['seed']}",
        f"  model   {count(model['parameters'])} parameters"
        + (f", {model['layers']} layers" if model["layers"] else "")
        + (f", width {model['width']}" if model["width"] else ""),
    ]
    if "trunk" in record:
        trunk, held = record["trunk"], ", ".join(f"{n} {split}" for split, n in data["documents"].items())
        lines += [
            f"  trunk   {trunk['folder']}, {trunk['status']}, weights of step {trunk['step']}",
            f"  data    {len(data['classes'])} classes; documents: {held}; {budget['passes']:.2g} passes",
        ]
    else:
        lines.append(
            f"  data    {data['name']}, {count(data['train_tokens'])} training tokens, {budget['passes']:.2g} passes"
        )
    lines.append(
        f"  budget  {count(budget['tokens'])} tokens in {budget['steps']} steps, {count(budget['flops'])}FLOP"
        + (f", about {duration(estimate)}" if estimate else "")
    )
    if record.get("resumed_at"):
        lines.append(f"  resumes from step {record['resumed_at']}")
    return "\n".join(lines)


ROWS = [
    ("status", "status", "{}"),
    ("train loss", "train_loss", "{:.4f} nats/token"),
    ("validation loss", "val_loss", "{:.4f} nats/token"),
    ("bits per byte", "val_bits_per_byte", "{:.4f}"),
    ("gap", "gap", "{:+.4f} nats/token"),
    ("excess loss", "excess_loss", "{:.4f} nats/token"),
    ("test loss at best", "test_loss", "{:.4f} nats/token"),
    ("gradient norm", "grad_norm", "{:.3g}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("seconds", "seconds", "{:.1f}"),
]


CLASSIFIERS = [
    ("commonest class", "baseline_majority_"),
    ("tf-idf, words read by the model", "baseline_tfidf_seen_"),
    ("tf-idf, whole documents", "baseline_tfidf_"),
    ("frozen trunk, linear probe", "probe_"),
    ("fine-tuned trunk", ""),
]


def _show_classification(record: Mapping) -> None:
    """Print macro-F1 and accuracy on test documents beside the baselines."""
    summary, status = record["summary"], record["status"]
    table = Table(box=None, padding=(0, 2, 0, 0))
    kind = f" ({summary['divergence']})" if summary.get("divergence") else ""
    for column in (f"{status}{kind}", "macro-F1", "accuracy"):
        table.add_column(column, justify="left" if column.startswith(status) else "right", header_style="none")
    for title, prefix in CLASSIFIERS:
        values = [summary.get(f"{prefix}{name}") for name in ("macro_f1", "accuracy")]
        table.add_row(title, *("-" if x is None else f"{x:.3f}" for x in values))
    Console(file=sys.stdout, highlight=False).print(table)


def show_record(record: Mapping) -> None:
    """Print the end of a job: how it ended, its results, its folder."""
    if record.get("found"):
        print(f"{record['label']}, seed {record['seed']}: this run is done (force=true trains it again).")
    if record.get("reproduction"):
        print(f"Trained again: {record['reproduction']}.")
    if record["status"] == "stopped":
        print(f"Stopped at step {record['progress']['step']}; the same command continues from there.")
    show_result(record)
    if record.get("evaluations"):
        show_evaluations(record["evaluations"])
    print(record["folder"])


def exit_code(record: Mapping) -> int:
    """0 for a done run, 128 + the signal's number for one that a signal stopped."""
    return 128 + record["signal"] if record["status"] == "stopped" else 0


TOO_SHORT = "too short to beat the unigram model"


def show_result(record: Mapping) -> None:
    """Print the table of results from the record."""
    if "trunk" in record:
        return _show_classification(record)
    status = record["status"]
    if kind := record["summary"].get("divergence"):
        status += f" ({kind})"
    elif record["summary"].get("below_unigram") is False:
        status += f", {TOO_SHORT}"
    values = {**record["summary"], **record["cost"], "status": status}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    own = "module" in record["config"]["task"]  # a task of one's own, whose loss has units of its own
    for title, key, form in ROWS:
        value, form = values.get(key), form.replace(" nats/token", "") if own else form
        if own and key == "val_bits_per_byte":
            continue
        if key == "excess_loss" and value is None:  # known for synthetic languages only
            continue
        missing = "not finite" if status.startswith("diverged") and "loss" in key else "-"
        table.add_row(title, missing if value is None else form.format(value))
    Console(file=sys.stdout, highlight=False).print(table)


class Progress:
    """Progress bar over the run's tokens with loss and tokens/s, on stderr; rarely redrawn if that is no terminal."""

    def __init__(self, steps: int, tokens_per_step: int, shown: bool = True, unit: str = "tok"):
        self.steps, self.tokens_per_step, self.shown, self.unit = steps, tokens_per_step, shown, unit
        self.bar: tqdm | None = None

    def start(self, step: int) -> None:
        """Show the bar, `step` steps of it done."""
        watched = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.steps * self.tokens_per_step,
            initial=step * self.tokens_per_step,
            unit=self.unit,
            unit_scale=True,
            mininterval=0.2 if watched else 10.0,
            disable=not self.shown or bool(os.environ.get(NO_BARS)),
            dynamic_ncols=watched,
            file=sys.stderr,
        )

    def update(self, step: int, loss: float) -> None:
        """Advance the bar by one step and show its loss."""
        assert self.bar is not None
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update(self.tokens_per_step)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
