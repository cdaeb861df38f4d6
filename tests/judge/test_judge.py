"""`albert-ablate judge` on records made by hand: every verdict, every refusal, and the claims file of the project."""

import copy
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import types
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import scipy.stats
import yaml
from checkpoints import gpt2
from factories import edit_record, write_record
from published import published
from statsmodels.stats.multitest import multipletests

from albert_ablate.analysis import registry
from albert_ablate.analysis.registry import MEASURES, Evidence, Missing
from albert_ablate.cli import main
from albert_ablate.config import ConfigError, checked_config, run_identity, to_container
from albert_ablate.judge.claims import arms_of, read_claims
from albert_ablate.judge.ledger import judge, judge_and_register
from albert_ablate.judge.run_store import RunStore
from albert_ablate.judge.words import ratio_words
from albert_ablate.records.history import SCHEMAS
from albert_ablate.records.json_output import document, nonfinite_as_text
from albert_ablate.report.claims import draw_claims
from albert_ablate.stats import sequential as statistics
from albert_ablate.studies.judge_run import Budget, PairRunner
from albert_ablate.studies.spreads import expected as expected_pairs

SHORT = {"text": "at 2 layers", "overrides": ["model=nano", "model.layers=2", "budget.tokens=20_000"]}
CLAIM = {
    "name": "first",
    "statement": "Pre-norm is better.",
    "parts": [{"treatment": "pre", "control": "post", "measure": "test_loss"}],
    "tuned": [],
    "screen": {"regime": "short", "N": 12},
}
FILE = {
    "arms": {"pre": ["norm=pre_ln"], "post": ["norm=post_ln"]},
    "regimes": {"short": SHORT},
    "claims": [CLAIM],
}


def arm(norm):
    return (*SHORT["overrides"], f"norm={norm}")


@lru_cache
def composed(overrides):
    return checked_config([*overrides])


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


class Workbench:
    """A claims file and hand-made records, and what the command makes of them."""

    def __init__(self, folder):
        self.folder, self.runs = folder, folder / "runs"
        self.runs.mkdir()

    def run(self, norm, seed, loss, status="finished", **more):
        """A run's record; `more` replaces parts of it, by dotted key written with __."""
        cfg = to_container(composed(arm(norm)))
        cfg["optimizer"]["lr"] = more.pop("lr", cfg["optimizer"]["lr"])
        record = {
            "status": status, "seed": seed, "arm": f"arm-{norm}", "role": "confirmation", "config": cfg,
            "budget": {"tokens": 20_000}, "data": {"fingerprint": "text"},
            "summary": {"test_loss": loss, "tokens": 20_000, "parameters": 1000, "initial_loss": 5.0, "val_loss": loss},
            "proof": {"data_order": f"order{seed}", "initial_draws": {"w": "x"}}, "provenance": {"torch": "2"},
            "cost": {"seconds": 2.0, "flops": 2e9}, "histories": None, "error": None,
        }  # fmt: skip
        folder = self.runs / f"{norm}-{cfg['optimizer']['lr']:g}" / f"seed{seed}"
        write_record(folder, record, **more)
        return folder

    def pairs(self, treatment, control):
        for norm, losses in (("pre_ln", treatment), ("post_ln", control)):
            for seed, loss in enumerate(losses):
                status = "finished" if math.isfinite(loss) else "diverged"
                self.run(norm, seed, loss if math.isfinite(loss) else None, status)

    def file(self, **claim):
        """The claims file, with keys of its claim replaced."""
        tree = copy.deepcopy(FILE)
        tree["claims"][0] |= claim
        path = self.folder / "claims.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def judged(self, **claim):
        ledger = judge(read_claims(self.file(**claim)), self.runs)
        return published(document("ledger", nonfinite_as_text(ledger)), "ledger") and ledger["claims"][0]

    def command(self, *more, **claim):
        return main(["judge", str(self.file(**claim)), "--runs", str(self.runs), *more])


NOISE = np.random.default_rng(0).normal(size=12)
INF = math.inf


@pytest.mark.parametrize(
    "treatment, control, word",
    [
        (2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE, "supported"),
        (2.2 + 0.01 * NOISE, 2.0 + 0 * NOISE, "refuted"),
        (2.0 + 0.001 * NOISE, 2.0 + 0 * NOISE, "no effect"),
        (2.0 + 0.1 * NOISE, 2.0 + 0 * NOISE, "inconclusive"),
        (2.0 + 0.01 * NOISE[:3], 2.2 + 0 * NOISE[:3], "undecided"),
        ([*(2.0 + 0.01 * NOISE[1:]), INF], 2.3 + 0 * NOISE, "mixed"),
        (2.0 + 0.01 * NOISE, [INF] * 12, "supported"),
        ([], [], "open"),
    ],
)
def test_every_verdict(bench, treatment, control, word):
    bench.pairs(treatment, control)
    found = bench.judged()
    assert found["verdict"] == word
    assert word in found["sentence"]


def test_sentence_and_entry_say_what_was_found(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0.02 * NOISE)
    found = bench.judged()
    part = found["parts"][0]
    logs = np.log((2.2 + 0.02 * NOISE) / (2.0 + 0.01 * NOISE))
    assert part["mean"] == pytest.approx(logs.mean())
    assert part["percent"][0] == pytest.approx(100 * np.expm1(-logs.mean()))  # the loss falls
    assert part["percent"][1] < part["percent"][0] < part["percent"][2]
    assert part["correlation"][0] == pytest.approx(1, abs=1e-4)
    assert (part["pairs"], len(part["looks"]), part["seeds"]) == (12, 9, list(range(12)))
    assert found["sentence"].startswith("at 2 layers, pre changed test_loss against post by -9.")
    after = np.mean(logs[4:])
    assert found["tuned"] is False and len({*found["rates"].values()}) == 1
    assert found["sentence"].endswith(
        f"12 pairs; decided at pair 4, {100 * np.expm1(-after):.3g} % in the 8 pairs after it), not tuned "
        f"(learning rate {found['rates']['pre']:g}): supported. Registered with 24 of 24 runs there (exploratory)."
    )
    assert found["cost"] == {"seconds": 48.0, "tokens": 480_000, "runs": 24, "tuning_runs": 0}


FLAT = np.array([1, -1, 0.5, -0.5, 0.8, -0.8, 0.2, -0.2, 0.6, -0.6, 0.9, -0.9])


def test_the_sentence_says_what_is_missing(bench, capsys):
    def found(effect, noise, n=12, **claim):
        bench.pairs(2.0 * np.exp(-effect + noise * FLAT[:n]), 2.0 + 0 * FLAT[:n])
        return bench.judged(**claim)

    few = found(0.004, 0.003, 4)  # the half-width fits the margin long before the mean is told from it
    n = few["parts"][0]["missing"]["pairs"][0]
    assert few["verdict"] == "undecided" and 5 < n <= 12
    assert f"about {n - 4} more pairs" in few["sentence"] and "are missing to tell -0.399 from 0 %" in few["sentence"]
    long = found(0.0025, 0.01)
    assert long["verdict"] == "inconclusive" and "to tell -0.25 from " in long["sentence"]
    assert long["parts"][0]["missing"]["pairs"][0] > 12
    assert "a new claim on new seeds would need about" in long["sentence"] or "more than the 60" in long["sentence"]
    for effect, noise, word in ((0.05, 0.01, "supported"), (0.0, 0.001, "no effect")):
        decided = found(effect, noise)
        assert decided["verdict"] == word
        assert decided["parts"][0]["pairs_to_margin"] is None and "missing" not in decided["parts"][0]
        assert "missing" not in decided["sentence"] and "would need" not in decided["sentence"]
    assert bench.command() == 0
    assert "margin reached" not in capsys.readouterr().out


def test_a_verdict_that_later_pairs_do_not_repeat_is_said(bench, capsys):
    effect = np.r_[np.full(6, 0.06), np.full(6, -0.015)] + 0.008 * FLAT
    bench.pairs(2.0 * np.exp(-effect), 2.0 + 0 * FLAT)
    found = bench.judged()
    part = found["parts"][0]
    assert found["verdict"] == "supported" and part["decided_at"] == 4 and 0 < part["low"] < part["high"]
    at_the_end = statistics.interval(effect, 12)
    assert at_the_end[1] < 0 < at_the_end[2]  # which was printed, and holds zero
    after = 100 * np.expm1(-effect[4:].mean())
    assert f"decided at pair 4, {after:+.3g} % in the 8 pairs after it" in found["sentence"]
    assert bench.command() == 0 and "decided at pair 4" in " ".join(capsys.readouterr().out.split())


BETTER, WORSE = CLAIM["parts"][0], CLAIM["parts"][0] | {"treatment": "post", "control": "pre"}


@pytest.mark.parametrize(
    "effect, parts, word, detail",
    [
        (0.1, [BETTER], "supported", ""),
        (-0.1, [BETTER], "refuted", "opposite found"),
        (0.004, [BETTER | {"null": "margin", "margin": 0.02}], "no effect", "smaller than the margin"),
        (-0.1, [BETTER | {"null": "margin", "margin": 0.02}], "refuted", "opposite found"),
        (0.004, [BETTER | {"margin": 0.02}], "no effect", "smaller than the margin"),
        (0.0, [BETTER | {"margin": 0.02}], "no effect", ""),
        (0.1, [BETTER, WORSE], "refuted", "a part failed"),
        (0.004, [BETTER | {"margin": 0.001}, BETTER | {"margin": 0.02}], "refuted", "a part failed"),
        (-INF, [BETTER], "refuted", "the treatment never trains"),
        (INF, [BETTER], "supported", "the control never trains"),
    ],
)
def test_the_detail_says_what_a_verdict_leaves_open(bench, effect, parts, word, detail):
    lost = [INF] * 12
    losses = 2.0 * np.exp(-(effect if math.isfinite(effect) else 0) + 0.002 * FLAT)
    bench.pairs(lost if effect == -INF else losses, lost if effect == INF else 2.0 + 0 * FLAT)
    found = bench.judged(parts=parts, needs="all" if len(parts) > 1 else "one")
    assert (found["verdict"], found["detail"]) == (word, detail)
    assert f"): {word}{f' ({detail})' if detail else ''}. Registered" in found["sentence"]
    if detail == "a part failed":
        how = "opposite found" if WORSE in parts else "smaller than the margin"
        names = "post against pre" if WORSE in parts else "pre against post"
        assert found["reason"] == f"Part 2 fails, {names}, test_loss: {how}."


def test_p_stands_beside_the_level_it_needed(bench):
    d = 0.005 + 0.006 * FLAT
    bench.pairs(2.0 * np.exp(-d), 2.0 + 0 * FLAT)
    tree = copy.deepcopy(FILE) | {"family": {"name": "mine", "size": 15}}
    path = bench.folder / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    found = judge(read_claims(path), bench.runs)["claims"][0]
    nominal = min(scipy.stats.ttest_1samp(d[:n], 0).pvalue for n in range(4, 13))
    p = statistics.overall(nominal, 12)
    assert 0.05 / 15 < p < 0.05 and found["verdict"] == "inconclusive"
    assert f"p = {p:.2g} with all looks counted; 0.0033 was needed (1st of 15 by Holm)." in found["notes"]
    at_step = statistics.running_interval(d, 12, 0.05 / 15)
    low, high = (f"{100 * np.expm1(-x):+.3g} %" for x in at_step[:0:-1])
    assert at_step[1] < 0 < found["parts"][0]["low"]
    said = (
        f"At the significance level that Holm leaves this claim, the interval of pre against post is {low} to {high}."
    )
    assert said in found["notes"]
    both = bench.judged(needs="all", parts=[BETTER, BETTER | {"null": "margin"}])  # the first part alone would do
    assert both["verdict"] == "inconclusive" and not any(n.startswith("At the level that") for n in both["notes"])
    alone = bench.judged()
    assert any(n.startswith(f"p = {p:.2g} with all looks counted; 0.05 was needed.") for n in alone["notes"])


@pytest.mark.parametrize("effect", [0.0, 0.012])
def test_the_verdict_turns_at_the_margin_that_is_said(bench, effect):
    bench.pairs(2.0 * np.exp(-effect - 0.004 * FLAT), 2.0 + 0 * FLAT)

    def judged(margin):
        found = bench.judged(parts=[BETTER | {"margin": float(margin)}])
        (note,) = [n for n in found["notes"] if n.startswith("By margin: ")]
        return found["verdict"], note

    _, note = judged(0.0005)
    percent = float(re.search(r"margins? (?:from|below) ([0-9.]+) %", note)[1])
    turn = np.log1p(percent / 100)
    assert judged(1.01 * turn)[0] == "no effect" and judged(0.99 * turn)[0] != "no effect"
    assert ("an effect for every margin below" in note) == (judged(0.99 * turn)[0] == "supported")


def test_margins_of_better_and_not_worse(bench):
    bench.pairs(2.0 * np.exp(-0.02 - 0.004 * FLAT), 2.0 + 0 * FLAT)
    for null, sign, words in (
        ("margin", 1, "better by any margin up to"),
        ("-margin", -1, "not worse by margins from"),
    ):
        part = BETTER | {"null": null, "margin": 0.5}
        if null == "-margin":
            part |= {"treatment": "post", "control": "pre"}
        (note,) = [n for n in bench.judged(parts=[part])["notes"] if n.startswith("By margin: ")]
        turn = np.log1p(float(re.search(rf"{words} ([0-9.]+) %", note)[1]) / 100)
        for factor, supported in ((1 - 0.01 * sign, True), (1 + 0.01 * sign, False)):
            found = bench.judged(parts=[part | {"margin": float(factor * turn)}])
            assert (found["verdict"] == "supported") == supported


def test_the_ledger_as_a_table_for_papers(bench, capsys):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    path = family(bench, {"statement": "50 % & more"}, {"name": "second", "parts": [BETTER | {"margin": 0.3}]}, size=3)
    shown = {}
    for form in ("latex", "md", "csv"):
        assert main(["judge", str(path), "--runs", str(bench.runs), "--format", form]) == 0
        shown[form] = capsys.readouterr().out
    ledger = json.loads((bench.runs / "ledger.json").read_text())
    assert r"50 \% \& more & supported" in shown["latex"] and r"test\_loss" in shown["latex"]
    assert shown["latex"].count(r"\\") == 3 and "| 50 % & more | supported |" in shown["md"]
    assert "2 claims were judged" in shown["md"] and "over 3 named tests was kept at 5 %" in shown["md"]
    rows = [*csv.DictReader(io.StringIO(shown["csv"]))]
    assert [float(r["mean"]) for r in rows] == [c["parts"][0]["mean"] for c in ledger["claims"]]
    p = [float(r["p_effect"]) for r in rows]
    expected = multipletests([*p, 1.0], method="holm")[1][:2]
    assert [float(r["p_adjusted"]) for r in rows] == pytest.approx(expected)


def test_a_claim_is_drawn_with_its_pairs_and_looks(bench):
    bench.pairs([*(2.0 + 0.02 * NOISE[:10]), 2.0, INF], [*(2.1 + 0 * NOISE[:10]), INF, 2.1])
    ledger = judge(read_claims(bench.file()), bench.runs)
    (file,) = draw_claims(ledger, bench.folder / "plots", "svg")
    text = file.read_text()
    assert file.name == "first.svg" and "Pre-norm is better." in text and "test_loss: better as claimed (%)" in text
    assert text.count("word: diverged") == 2  # both pairs with a diverged run


def test_a_plan_has_the_pairs_of_the_published_table(bench, capsys, monkeypatch):
    monkeypatch.setattr("albert_ablate.studies.price._flops_per_token", lambda cfg: 1e6)
    bench.run("pre_ln", 0, 2.0)
    path = bench.file(screen={"regime": "short", "N": 12})
    spread = ["--spread", "0.5%", "--effect", "0.5%", "--effect", "1%"]
    assert main(["plan", str(path), "--runs", str(bench.runs), *spread]) == 0
    shown = capsys.readouterr().out
    pairs = [(float(a), int(b)) for a, b in re.findall(r"([0-9.]+) pairs, found in ([0-9]+) %", shown)]
    for (n, power), (expected, found) in zip(pairs, ((8.8, 75), (5.3, 100)), strict=True):
        assert abs(n - expected) < 0.15 and abs(power - found) <= 2
    half = scipy.stats.t.isf(statistics.nominal(0.1, 12) / 2, 11) * math.log(1.005) / math.sqrt(12)
    assert f"the least is about {100 * math.expm1(half):.2g} %" in shown
    assert main(["plan", str(path), "--runs", str(bench.runs)]) == 0
    assert "its spread is unknown: tune or calibrate the arms, run 4 pairs" in capsys.readouterr().out
    assert main(["plan", str(path), "--runs", str(bench.runs), "--spread", "0.5"]) == 2


def test_the_moderated_test_takes_its_spread_from_tuning_runs(bench):
    own = composed(arm("pre_ln"))["optimizer"]["lr"]
    noise = np.random.default_rng(3).normal(size=(2, 3, 3))
    rates = [own / 2, own, 2 * own]
    for side, (norm, level) in enumerate((("pre_ln", 2.0), ("post_ln", 2.2))):
        losses = level * np.exp(0.01 * noise[side])
        for (seed, rate), loss in np.ndenumerate(losses):
            bench.run(norm, 1_000_000 + seed, float(loss), lr=rates[rate], role="tuning")
        curve = [
            {"rate": r, "losses": [level + (r != own)] * 3, "mean": level + (r != own), "tokens": 20_000} for r in rates
        ]  # fmt: skip
        write_tuning(bench, norm, own, curve=curve)
    bench.pairs(2.0 * np.exp(0.003 * FLAT[:3]), 2.2 + 0 * FLAT[:3])
    claim = {"tuned": ["optimizer.lr"], "test": "moderated"}
    found = bench.judged(**claim)
    part = found["parts"][0]
    prior = (0.01 * (noise[1] - noise[0])).var(0, ddof=1).mean()
    d = np.log(2.2 / 2.0) - 0.003 * FLAT[:3]
    t = d.mean() / np.sqrt((3 * prior + 2 * d.var(ddof=1)) / 5 / 3)
    assert part["looks"][0]["statistic"] == pytest.approx(t, rel=1e-6) and part["looks"][0]["pairs"] == 3
    assert found["verdict"] == "supported" and any(n.startswith("Judged by the moderated t") for n in found["notes"])
    for file in bench.runs.glob("pre_ln*/seed1000001"):
        shutil.rmtree(file)
    found = bench.judged(**claim)  # by the t test, from the fourth pair on
    assert found["verdict"] == "undecided" and found["parts"][0]["test"] == "t"
    assert any("no spread of test_loss can be taken from tuning runs" in n for n in found["notes"])


def test_skew_is_printed_and_its_test_can_be_asked_for(bench, capsys):
    d = 0.02 + 0.01 * np.random.default_rng(4).exponential(size=12)
    bench.pairs(2.0 * np.exp(-d), 2.0 + 0 * d)
    assert bench.command() == 0
    shown = " ".join(capsys.readouterr().out.split())
    skew = scipy.stats.skew(d, bias=False)
    assert f"skew of the differences {skew:+.1f} (standard error 0.6)" in shown
    for test in ("skew_bounded", "skew_corrected"):
        found = bench.judged(test=test)
        assert found["parts"][0]["looks"][0]["pairs"] == 8 and found["parts"][0]["test"] == test
    assert "Judged by the t test and Johnson's modified t, which must agree, from pair 8 on." in found["notes"]
    discrete = CLAIM["parts"][0] | {"measure": "parameters", "margin": 0.01}
    assert bench.judged(parts=[discrete], test="skew_corrected")["verdict"] == "no effect"


def test_the_statement_and_the_detail_are_printed(bench, capsys):
    bench.pairs(2.2 + 0.01 * NOISE, 2.0 + 0 * NOISE)
    assert bench.command() == 0
    shown = capsys.readouterr().out
    assert "REFUTED: opposite found" in shown and shown.splitlines()[1] == "   Pre-norm is better."


def test_a_speedup_is_said_in_tokens():
    def part(mean, low, high, measure="speedup", direction="higher"):
        return {"measure": measure, "treatment": "pre", "control": "post", "direction": direction, "mean": mean,
                "low": low, "high": high, "pairs": 8, "finished": 8}  # fmt: skip

    fewer = ratio_words(part(math.log(1 / 0.9957), math.log(1 / 1.012), math.log(1 / 0.98)))
    assert fewer == "pre needed 0.43 % fewer tokens than post (95 % interval 1.2 % more to 2 % fewer, 8 pairs)"
    slower = ratio_words(part(math.log(0.856), math.log(0.8), math.log(0.9)))  # not "changed by -14.4 %"
    assert slower == "pre needed 16.8 % more tokens than post (95 % interval 11.1 to 25, 8 pairs)"
    assert "no interval, 8 pairs" in ratio_words(part(0.1, -INF, INF))
    flops = ratio_words(part(-math.log(1 / 0.8), -0.5, -0.1, "speedup_flops", "lower"))
    assert flops.startswith("pre needed 20 % fewer FLOPs")
    assert "had 1 % less loss at equal FLOPs" in ratio_words(part(-math.log(0.99), 0.001, 0.02, "loss_at_equal_flops"))


def test_runs_that_are_done_are_counted_with_those_of_tuning(bench):
    bench.pairs([2.0, 2.1, INF], [2.2, 2.3, 2.1])
    bench.run("pre_ln", 1_000_000, 2.0, role="tuning")
    bench.run("pre_ln", 4, 2.0, status="failed")
    assert PairRunner(read_claims(bench.file()), bench.runs, "screen", (), False, 1, Budget(), print).done() == 7


def test_only_the_gapless_prefix_is_judged(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    for file in bench.runs.glob("post_ln*/seed5/record.json"):
        file.unlink()
    assert bench.judged()["parts"][0]["seeds"] == [0, 1, 2, 3, 4]


def test_runs_of_other_arms_rates_and_roles_are_not_taken(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    before = bench.judged()
    bench.run("pre_ln", 0, 9.0, lr=0.7)
    bench.run("rezero", 0, 9.0)
    bench.run("pre_ln", 1_000_000, 9.0)
    assert bench.judged() == before


@pytest.mark.parametrize(
    "change, said",
    [
        ({"data__fingerprint": "other"}, "Mixed corpora or tokenizers"),
        ({"proof__data_order": "other"}, "different data or another order"),
        ({"budget__tokens": 30_000}, "tokens must be equal"),
        ({"summary__parameters": 2000}, "parameters must be equal within 2 %"),
        ({"cost__flops": 4e9}, "flops must be equal within 5 %"),
        ({"summary__test_loss": None}, "finished without a finite test_loss"),
        ({"status": "failed", "sessions": 3, "error": "a\nOSError: full"}, "failed after 3 attempts: OSError: full"),
    ],
)
def test_an_unfair_pair_makes_the_claim_inadmissible(bench, change, said):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    bench.run("pre_ln", 3, 2.0, **{"status": "finished"} | change)
    found = bench.judged()
    assert found["verdict"] == "inadmissible"
    assert said in found["reason"]


def test_code_that_changed_between_seeds_is_refused(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    for norm, level in (("pre_ln", 2.0), ("post_ln", 2.2)):
        for seed, noise in enumerate(NOISE):
            code = {"norm": norm, "clip": "new" if norm == "pre_ln" and seed > 2 else "old"}
            bench.run(norm, seed, level + 0.01 * noise * (norm == "pre_ln"), code=code)
    found = bench.judged()
    assert found["verdict"] == "inadmissible"
    assert "The code of clip changed between seeds 0 and 3 of pre: train them by one code" in found["reason"]


def test_code_that_differs_between_the_arms_is_noted(bench):
    for norm, level, clip in (("pre_ln", 2.0, "new"), ("post_ln", 2.2, "old")):
        for seed, noise in enumerate(NOISE):
            code = {"norm": norm, "clip": clip, "optimizer": "x"}
            bench.run(norm, seed, level + 0.01 * noise * (norm == "pre_ln"), code=code)
    found = bench.judged()
    assert found["verdict"] == "supported"
    assert "The code of components that the arms share differs between them: clip." in found["notes"]


def test_what_differs_and_is_allowed_is_noted(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    bench.run("pre_ln", 0, 2.0, provenance={"torch": "3"}, proof__initial_draws={"w": "y"})
    found = bench.judged()
    assert found["verdict"] == "supported"
    assert "Provenance differs between the arms: torch." in found["notes"]
    assert "pre and post share 0 of 1 initial draws of a seed." in found["notes"]


def write_tuning(bench, norm, rate, **more):
    folder = bench.runs / "tuning"
    folder.mkdir(exist_ok=True)
    curve = [{"rate": rate, "losses": [2.0], "mean": more.pop("mean", 2.0), "seeds": [1_000_000], "tokens": 20_000}]
    found = {"rate": rate, "curve": curve, "edge": None, "slack": 0.0, "tokens": 20_000, "trained": True, "runs": [],
             "rule": "moving window", "fitted": True}  # fmt: skip
    (folder / f"arm-{norm}.json").write_text(json.dumps(found | more))


def test_arms_are_judged_at_their_tuned_rates(bench):
    tuned = {"tuned": ["optimizer.lr"]}
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    assert "The learning rate of pre is not tuned" in bench.judged(**tuned)["reason"]
    own = composed(arm("post_ln"))["optimizer"]["lr"]
    write_tuning(bench, "post_ln", own)
    write_tuning(bench, "pre_ln", 0.5)
    assert bench.judged(**tuned)["verdict"] == "open"  # no run at 0.5 yet
    for seed in range(12):
        bench.run("pre_ln", seed, 3.0 + 0.01 * NOISE[seed], lr=0.5)
    assert bench.judged(**tuned)["verdict"] == "refuted"
    write_tuning(bench, "pre_ln", 0.5, slack=5.0)
    assert bench.judged(**tuned)["verdict"] == "within tuning slack"
    assert bench.judged(**tuned)["parts"][0]["tuning_slack"] == pytest.approx(3.84 * 5.0 / 2.2)
    write_tuning(bench, "pre_ln", 0.5, slack=None)
    unknown = bench.judged(**tuned)
    assert unknown["verdict"] == "refuted" and unknown["parts"][0]["tuning_slack"] == "unknown"
    assert "The tuning slack of pre is unknown: it is not held against the verdict." in unknown["notes"]
    write_tuning(bench, "pre_ln", 0.5, fitted=False)
    assert any("No parabola was fitted for pre" in n for n in bench.judged(**tuned)["notes"])


def test_unlike_or_edge_tuning_is_refused_and_run_tunes_on(bench):
    tuned = {"tuned": ["optimizer.lr"]}
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    own = composed(arm("post_ln"))["optimizer"]["lr"]
    write_tuning(bench, "post_ln", own)

    def lacking():
        runner = PairRunner(read_claims(bench.file(**tuned)), bench.runs, "screen", (), False, 1, Budget(), print)
        return {(j.arm, j.rate) for j in runner._lacking(())["first"][0]}

    unlike = {"rule": None, "rates": 5, "step": 3.16, "objective": "val_loss", "seeds": [1_000_000], "tokens": 30_000}
    for key, value in unlike.items():
        write_tuning(bench, "pre_ln", own, **{key: value})
        found = bench.judged(**tuned)
        assert found["verdict"] == "inadmissible" and "pre and post were tuned with another " in found["reason"]
        assert found["reason"].endswith("albert-ablate judge --run tunes them alike.")
        assert lacking() == {("pre", None), ("post", None)}
    more = [{"rate": r, "losses": [2.0] * 3, "mean": 2.0, "tokens": 20_000} for r in (own, 2 * own)]
    write_tuning(bench, "pre_ln", own, curve=more)
    assert "number of full runs (6 and 1)" in bench.judged(**tuned)["reason"] and len(lacking()) == 2
    for rule, said, jobs in (
        (None, "the highest that was run, by an older rule", {("pre", None), ("post", None)}),
        ("moving window", "after four moves of the window", set()),
    ):
        write_tuning(bench, "post_ln", own, rule=rule)
        write_tuning(bench, "pre_ln", own, edge="high", rule=rule)
        assert said in bench.judged(**tuned)["reason"] and lacking() <= jobs
    write_tuning(bench, "pre_ln", own)
    write_tuning(bench, "post_ln", own)
    assert bench.judged(**tuned)["verdict"] == "supported"


def test_of_several_levels_tuning_seeds_choose(bench):
    part = {"treatment": ["pre", "post"], "control": "base", "measure": "test_loss"}
    tree = copy.deepcopy(FILE)
    tree["arms"]["base"] = ["norm=rezero"]
    tree["claims"][0] |= {"parts": [part], "tuned": ["optimizer.lr"]}
    path = bench.folder / "claims.yaml"
    path.write_text(yaml.safe_dump(tree))
    bench.pairs(2.0 + 0.01 * NOISE, 1.0 + 0.01 * NOISE)  # the level with the better test loss is not the one chosen
    own = composed(arm("pre_ln"))["optimizer"]["lr"]
    for seed in range(12):
        bench.run("rezero", seed, 2.2)
    assert "has not been tuned" in judge(read_claims(path), bench.runs)["claims"][0]["reason"]
    for norm, mean in (("pre_ln", 1.9), ("post_ln", 2.1), ("rezero", 2.5)):
        write_tuning(bench, norm, own, mean=mean)
    found = judge(read_claims(path), bench.runs)["claims"][0]
    assert found["parts"][0]["treatment"] == "pre"
    assert found["verdict"] == "supported"


def test_the_inside_of_a_curve_against_the_better_of_its_ends(bench):
    tree = copy.deepcopy(FILE)
    tree["arms"] |= {"zero": ["norm=rezero"], "end": ["norm=none"], "low": ["norm=deepnorm"]}
    part = {"treatment": ["pre", "post"], "control": "zero", "other_end": "end", "measure": "test_loss"}
    tree["claims"][0]["parts"] = [part | {"null": "margin", "margin": 0.02}]
    path = bench.folder / "claims.yaml"
    path.write_text(yaml.safe_dump(tree))
    losses = {"pre_ln": 2.0 + 0.01 * NOISE, "post_ln": 2.1 + 0 * NOISE, "rezero": 2.3 - 0.02 * NOISE,
              "none": 2.3 + 0.03 * NOISE}  # fmt: skip
    for norm, values in losses.items():
        for seed, loss in enumerate(values):
            bench.run(norm, seed, float(loss))
    found = judge(read_claims(path), bench.runs)["claims"][0]
    logs = {norm: np.log(values) for norm, values in losses.items()}
    d = np.minimum(logs["rezero"], logs["none"]) - (logs["pre_ln"] + logs["post_ln"]) / 2
    assert found["parts"][0]["d"] == pytest.approx(d) and found["verdict"] == "supported"
    assert "the mean of pre and post changed test_loss against the better of zero and end by -" in found["sentence"]
    bench.run("none", 0, None, "diverged")  # the worse end, which another can be
    bench.run("rezero", 1, None, "diverged")
    d = judge(read_claims(path), bench.runs)["claims"][0]["parts"][0]["d"]
    assert d[:2] == pytest.approx([logs[n][i] - (logs["pre_ln"] + logs["post_ln"])[i] / 2
                                   for i, n in enumerate(("rezero", "none"))])  # fmt: skip
    bench.run("post_ln", 2, None, "diverged")
    assert judge(read_claims(path), bench.runs)["claims"][0]["parts"][0]["d"][2] == -INF
    tree["claims"][0]["parts"] = [part | {"other_end": "zero"}]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="other_end=zero is not allowed"):
        read_claims(path)


def test_a_measure_without_noise_is_compared_exactly(bench):
    bench.pairs([2.0] * 4, [2.0] * 4)
    part = {"treatment": "pre", "control": "post", "measure": "flops_per_token", "margin": 0.01}
    assert bench.judged(parts=[part], equal={})["verdict"] == "no effect"
    for seed in range(4):
        bench.run("pre_ln", seed, 2.0, cost__flops=1e9)
    assert bench.judged(parts=[part], equal={})["verdict"] == "supported"


def test_more_than_the_sum_by_hand(bench):
    tree = copy.deepcopy(FILE)
    tree["arms"] |= {"one": ["norm=rezero"], "two": ["norm=none"]}
    part = {"treatment": "pre", "control": "post", "singles": ["one", "two"], "measure": "gap", "margin": 0.01}
    tree["claims"][0]["parts"] = [part]
    path = bench.folder / "claims.yaml"
    path.write_text(yaml.safe_dump(tree))
    for norm, gap in (("pre_ln", 1.0), ("post_ln", 2.0), ("rezero", 1.9), ("none", 1.8)):
        for seed in range(5):
            bench.run(norm, seed, 2.0, summary__gap=gap + (0.001 * NOISE[seed] if norm == "none" else 0))
    found = judge(read_claims(path), bench.runs)["claims"][0]
    assert found["verdict"] == "supported"
    assert found["parts"][0]["mean"] == pytest.approx(0.7, abs=0.01)  # 1.0 gained, .1 + .2 by the parts


def test_a_grid_of_rates(bench):
    part = {"treatment": "pre", "control": "post", "measure": "diverging_share", "direction": "higher", "margin": 0.1}
    form = {"regime": "short", "N": 8, "grid": [0.001, 0.004, 0.016, 0.064]}
    for seed in range(8):
        for k, rate in enumerate(form["grid"]):
            bench.run("post_ln", seed, 2.0, lr=rate)
            bench.run("pre_ln", seed, 2.0, "diverged" if k >= 2 - seed % 2 else "finished", lr=rate)
    found = bench.judged(parts=[part], screen=form)
    assert found["verdict"] == "supported"
    assert found["parts"][0]["d"] == [0.5, 0.75] * 4


def test_a_screen_may_ask_of_the_initialization(bench):
    part = {"treatment": "pre", "control": "post", "measure": "depth_imbalance", "margin": 0.1}
    for norm, first, status in (("pre_ln", 2.0, "diverged"), ("post_ln", math.nan, "finished")):
        for seed in range(12):
            folder = bench.run(norm, seed, 2.0, status)
            history(folder, "layers", step=[0, 0, 25, 25], layer=[0, 1, 0, 1], grad_norm=[first + seed, 1.0, 9.0, 9.0])
    screen = {"regime": "short", "N": 12, "measure": "depth_imbalance_init"}
    beside = [part, part | {"treatment": "post", "control": "pre"}, part | {"measure": "test_loss"}]
    # no rate has acted, so none need be tuned
    found = bench.judged(parts=[part], tuned=["optimizer.lr"], screen=screen, secondary=beside)
    assert found["parts"][0]["treatment_mean"] == pytest.approx(np.log(2.0 + np.arange(12)).mean())
    assert found["parts"][0]["d"] == [INF] * 12
    assert found["verdict"] == "supported"
    assert "pre against post" in found["sentence"] and "post diverged in 12" in found["sentence"]
    assert [p["measure"] for p in found["secondary"]] == ["depth_imbalance_init"]  # what it can be asked, no copy
    assert bench.command(parts=[part], screen=screen | {"measure": "test_loss"}) == 2  # another unit than the margin's


def test_the_price_is_of_what_run_trains(bench, monkeypatch, capsys):
    monkeypatch.setattr("albert_ablate.studies.price._flops_per_token", lambda overrides: 1e6)
    bench.run("pre_ln", 0, 2.0, cost__flops=3e9, cost__seconds=1.0)
    bench.run("pre_ln", 1, 2.0, cost__flops=1.0, cost__seconds=100.0)  # a short run says little about speed
    assert bench.command("--dry-run", "--only", "frist") == 2
    beside = [{"treatment": "pre", "control": "post", "measure": "rank_last", "rate_factor": 2}]  # runs of its own
    assert bench.command("--dry-run", secondary=beside, tuned=["optimizer.lr"]) == 0
    shown = capsys.readouterr().out
    expected, worst = (2 * (5 / 4 + rates * 3) for rates in (3.9, 7))  # five rates at a quarter, then three seeds each
    runs = 2 * 12 + worst
    hours = runs * 20_000 * 1e6 / 3e9 / 3600
    assert (
        f"{'screen':<8}{runs:>8,.0f}{expected:>9,.0f}{worst:>9,.0f}{runs * 20_000:>10.2g}{runs * 2e10:>10.2g}"
        f"{hours:>10,.1f}"
    ) in shown
    # one claim at N = 12: 8.8, 5.3 and 4.4 pairs, as docs/verdicts.md has them
    line = re.search(r"expected at 1 / 2 / 3 spreads: (.+) pairs, (.+) runs, (.+) hours", shown)
    pairs, runs, hours = ([float(x) for x in text.split(" / ")] for text in line.groups())
    assert pairs == pytest.approx([8.8, 5.3, 4.4], abs=0.15)
    assert runs == pytest.approx([2 * n + expected for n in pairs], abs=0.6)
    assert hours == pytest.approx([n * 20_000 * 1e6 / 3e9 / 3600 for n in runs], rel=0.06)


def test_expected_pairs_follow_the_spread_where_it_is_known(bench, monkeypatch, capsys):
    monkeypatch.setattr("albert_ablate.studies.price._flops_per_token", lambda overrides: 1e6)
    d = [0.01, -0.01, 0.01, -0.01]  # of log losses: a spread of .01155
    bench.pairs([2.0 * math.exp(x) for x in d], [2.0] * 4)
    margin = math.expm1(0.01155)  # one spread
    part = {"treatment": "pre", "control": "post", "measure": "test_loss", "margin": math.log1p(margin)}
    assert bench.command("--dry-run", parts=[part]) == 0
    line = re.search(r"expected at 1 / 2 / 4 margins: (.+) pairs", capsys.readouterr().out)
    assert [float(x) for x in line[1].split(" / ")] == pytest.approx([8.8, 5.3, 4.1], abs=0.15)


def test_expected_pairs_of_claims_of_several_parts():
    alone, power = expected_pairs((1.0,), 12, 0.05)
    assert expected_pairs((1.0, 9.0), 12, 0.05, "all") == pytest.approx((alone, power), abs=0.2)
    both, rarer = expected_pairs((1.0, 1.0), 12, 0.05, "all")
    assert both > alone and rarer == pytest.approx(power**2, abs=0.03)  # independent
    assert expected_pairs((3.0, 0.0), 12, 0.05, "any")[0] == pytest.approx(
        expected_pairs((3.0,), 12, 0.025)[0], abs=0.1
    )


def test_arms_that_differ_by_one_grid_share_are_told_apart(bench):
    part = {"treatment": "pre", "control": "post", "measure": "diverging_share", "direction": "higher", "margin": 0.1}
    form = {"regime": "short", "N": 8, "grid": [0.001, 0.004, 0.016, 0.064]}
    for seed in range(8):
        for k, rate in enumerate(form["grid"]):
            bench.run("post_ln", seed, 2.0, lr=rate)
            bench.run("pre_ln", seed, 2.0, "diverged" if k >= 2 else "finished", lr=rate)
    found = bench.judged(parts=[part], screen=form)
    assert (found["verdict"], found["parts"][0]["looks"][-1]["test"]) == ("supported", "signed rank")


def test_secondary_contrasts_get_the_primarys_pairs(bench):
    tree = copy.deepcopy(FILE)
    tree["arms"] |= {"zero": ["norm=rezero"], "deep": ["norm=deepnorm"]}
    beside = [CLAIM["parts"][0] | {"treatment": name} for name in ("zero", "deep")]
    tree["claims"][0]["secondary"] = beside
    path = bench.folder / "claims.yaml"
    path.write_text(yaml.safe_dump(tree))

    def lacking():
        runner = PairRunner(read_claims(path), bench.runs, "screen", (), True, 1, Budget(), print)
        return [[(j.arm, j.seed) for j in jobs] for jobs in runner._lacking(())["first"]], runner.next()

    bench.pairs(2.0 + 0.01 * NOISE[:3], 2.2 + 0 * NOISE[:3])
    for seed in range(2):
        bench.run("rezero", seed, 2.0)
    (primary, secondary), found = lacking()
    assert primary == [("pre", 3), ("post", 3)] and secondary == [("zero", 2), ("deep", 0)]
    assert [j.arm for j in found[1]] == ["pre", "post"]
    bench.pairs(2.0 + 0.01 * NOISE[:4], 2.2 + 0 * NOISE[:4])
    (primary, secondary), found = lacking()
    assert primary == [] and [j.arm for j in found[1]] == ["zero", "deep"]  # the control is there already
    for norm in ("rezero", "deepnorm"):
        for seed in range(4):
            bench.run(norm, seed, 2.0)
    assert lacking() == ([[], []], None)


# --- attacks on the ledger (those that no other test here tries) ------------------------------------------------------


def test_one_seed_copied_to_twelve_numbers_is_refused(bench):
    for seed in range(12):  # the numbers, orders and identities edited too
        bench.run("pre_ln", seed, 2.0)
        bench.run("post_ln", seed, 2.2)
    found = bench.judged()
    assert found["verdict"] == "inadmissible"
    assert found["reason"] == "All 12 differences equal 0.0953102: not a random measure; compare it exactly."


def test_runs_of_other_code_are_noted_between_seeds_too(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    assert not any("Provenance" in n for n in bench.judged()["notes"])
    for folder in bench.runs.glob("*/seed*"):
        if int(folder.name[4:]) >= 6:
            edit_record(folder, provenance={"torch": "3"})
    assert "Provenance differs between the seeds of an arm: torch." in bench.judged()["notes"]
    for folder in bench.runs.glob("pre_ln*/seed*"):
        edit_record(folder, provenance={"torch": "4"})
    notes = bench.judged()["notes"]
    assert "Provenance differs between the arms: torch." in notes and not any("of an arm" in n for n in notes)


def test_a_run_in_another_precision_is_of_another_arm(bench):
    bench.pairs([], 2.2 + 0 * NOISE)
    for seed in range(12):
        bench.run("pre_ln", seed, 2.0 + 0.01 * NOISE[seed], config__trainer__precision="bf16-mixed")
    found = bench.judged()
    assert found["verdict"] == "open" and found["parts"][0]["pairs"] == 0


def test_seeds_picked_by_outcome_are_exploratory(bench):
    bench.pairs(2.0 + 0.1 * NOISE, 2.0 + 0 * NOISE)
    best = [int(s) for s in np.argsort(NOISE)]
    found = bench.judged(seeds=best)
    assert found["parts"][0]["seeds"] == best
    assert (
        found["registration"] == "registered with 24 of 24 runs there (exploratory)"
        and "exploratory" in found["sentence"]
    )


def test_arms_swapped_after_the_first_look_are_an_edit(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    assert bench.command() == 0
    swapped = [CLAIM["parts"][0] | {"treatment": "post", "control": "pre"}]
    found = bench.judged(parts=swapped)
    assert found["edited"] and "Edited since it was registered (what it compares)." in found["sentence"]


def test_the_margin_of_a_claim_stands_beside_what_it_decides(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    found = bench.judged(parts=[CLAIM["parts"][0] | {"margin": 0.5}])
    assert found["verdict"] == "no effect" and found["detail"] == "smaller than the margin"
    (note,) = [n for n in found["notes"] if n.startswith("By margin: ")]
    assert note.endswith(f"; that of the claim is {100 * math.expm1(0.5):.3g} %.")


def test_untuned_arms_are_said_with_their_rates(bench):
    arms = {"pre": ["norm=pre_ln", "optimizer.lr=0.01"], "post": ["norm=post_ln"]}
    bench.pairs([], 2.2 + 0 * NOISE)
    for seed in range(12):
        bench.run("pre_ln", seed, 2.0 + 0.01 * NOISE[seed], lr=0.01)
    path = bench.folder / "rates.yaml"
    path.write_text(yaml.safe_dump(FILE | {"arms": arms}))
    found = judge(read_claims(path), bench.runs)["claims"][0]
    own = composed(arm("post_ln"))["optimizer"]["lr"]
    assert found["tuned"] is False and found["rates"] == {"pre": 0.01, "post": own}
    assert f", not tuned (learning rates pre 0.01, post {own:g}): supported." in found["sentence"]
    exact = {"treatment": "pre", "control": "post", "measure": "parameters", "margin": 0.01}
    assert bench.judged(parts=[exact])["tuned"] is None  # no rate acts on it


def test_a_tuned_rate_that_is_not_of_its_own_curve_is_refused(bench):
    own = composed(arm("post_ln"))["optimizer"]["lr"]
    rates = [own / 2, own, 2 * own]
    losses = np.array([[2.2, 2.0, 2.1], [2.25, 2.0, 2.15], [2.15, 2.05, 2.1]])
    left, middle, right = losses.mean(0)  # by hand: the vertex of the parabola in log rate
    vertex = own * 2 ** ((left - right) / (2 * (left - 2 * middle + right)))
    curve = [
        {"rate": r, "losses": column.tolist(), "mean": column.mean(), "tokens": 20_000}
        for r, column in zip(rates, losses.T, strict=True)
    ]
    for norm, level in (("pre_ln", 2.0), ("post_ln", 2.2)):
        for seed in range(12):
            bench.run(norm, seed, level + 0.01 * NOISE[seed] * (level == 2.0), lr=float(f"{vertex:.4g}"))
        write_tuning(bench, norm, float(f"{vertex:.4g}"), curve=curve)
    tuned = {"tuned": ["optimizer.lr"]}
    assert bench.judged(**tuned)["verdict"] == "supported"
    write_tuning(bench, "pre_ln", float(f"{1.2 * vertex:.4g}"), curve=curve)
    found = bench.judged(**tuned)
    assert found["verdict"] == "inadmissible"
    assert (
        f"The tuning file of pre says a learning rate of {1.2 * vertex:.4g}, and its own losses lead to"
        in found["reason"]
    )
    write_tuning(bench, "pre_ln", float(f"{1.2 * vertex:.4g}"), curve=curve, rule=None)
    write_tuning(bench, "post_ln", float(f"{vertex:.4g}"), curve=curve, rule=None)
    assert bench.judged(**tuned)["verdict"] == "open"  # by an older rule, whose formula was another


def test_a_control_that_always_diverges_decides_in_a_family(bench):
    path = family(bench, {}, size=15)
    for pairs, word in ((6, "undecided"), (7, "supported"), (12, "supported")):  # Fisher's exact test, N = 12
        bench.pairs(2.0 + 0.01 * NOISE[:pairs], [INF] * pairs)
        found = judge(read_claims(path), bench.runs)["claims"][0]
        assert (found["verdict"], found["parts"][0]["pairs"]) == (word, pairs)
    assert found["detail"] == "the control never trains"


# --- files and the command -------------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_ledger_byte_for_byte(bench, capsys):
    bench.pairs([*(2.0 + 0.01 * NOISE[:9]), INF], [*(2.2 + 0 * NOISE[:9]), INF])
    assert bench.command() == 0
    first = (bench.runs / "ledger.json").read_bytes()
    assert bench.command("--ledger", str(bench.folder / "again.json")) == 0
    assert (bench.folder / "again.json").read_bytes() == first
    assert str(bench.folder).encode() not in first
    ledger = json.loads(first, parse_constant=lambda word: pytest.fail(f"{word} is no strict JSON"))
    assert ledger["claims"][0]["parts"][0]["d"][-1] == "NaN"
    assert "SUPPORTED" in capsys.readouterr().out


def test_json_prints_the_ledger_and_nothing_else(bench, capfd):
    bench.pairs([*(2.0 + 0.01 * NOISE[:9]), INF], [*(2.2 + 0 * NOISE[:9]), INF])
    assert bench.command("--json", "--plot", "svg") == 0
    said = capfd.readouterr()
    found = published(said.out, "ledger")
    written = json.loads((bench.runs / "ledger.json").read_text())
    assert found == {k: v for k, v in written.items() if k != "checksum"}
    assert found["claims"][0]["verdict"] == "supported" and "plots/first.svg" in said.err
    published((bench.runs / "ledger.json").read_text(), "ledger")
    for other, sentence in (
        (["--dry-run"], "--json and --dry-run exclude each other."),
        (["--format", "md"], "--json and --format=md exclude each other"),
        (["elsewhere.json"], "unexpected extra argument"),  # it took a file once
    ):
        assert bench.command("--json", *other) == 2
        said = capfd.readouterr()
        assert sentence in said.err and said.err.count("\n") == 1 and not said.out


def lacking_of(path, runs, only=()):
    return PairRunner(read_claims(path), runs, "screen", (), False, 1, Budget(), print)._lacking(only)


def family(bench, *claims, **family):
    path = bench.folder / "family.yaml"
    path.write_text(yaml.safe_dump(FILE | {"claims": [CLAIM | c for c in claims], "family": {"name": "f"} | family}))
    return path


def how(path, bench, register=True):
    """By claim how it is registered, after a look."""
    ledger = (judge_and_register if register else judge)(read_claims(path), bench.runs, "screen")
    return {c["name"]: c["registration"] for c in ledger["claims"]} | {"gone": ledger["gone"]}


def test_a_claim_is_registered_before_its_runs_or_is_exploratory(bench):
    first, second = {"name": "first"}, {"name": "second", "statement": "Later."}
    path = family(bench, first, size=3)
    lacking_of(path, bench.runs)  # as --run begins
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    assert how(path, bench)["first"] == "registered before its runs"
    found = judge(read_claims(path), bench.runs)["claims"][0]
    assert found["sentence"].endswith("supported. Registered before its runs.") and not found["edited"]
    path = family(bench, first, second, size=3)  # inside the family's size
    later = "added later with 24 of 24 runs there (exploratory)"
    assert how(path, bench) == {"first": "registered before its runs", "second": later, "gone": []}
    shutil.rmtree(bench.runs / "claims")
    assert how(path, bench)["first"] == "registered with 24 of 24 runs there (exploratory)"


def test_runs_of_the_control_alone_are_not_exploration(bench):
    bench.pairs([], 2.2 + 0 * NOISE)
    path = family(bench, {})
    assert how(path, bench, register=False)["first"] == how(path, bench)["first"]  # the same ledger before and after
    assert how(path, bench)["first"] == "registered with 12 of 24 runs there"


def test_what_is_changed_after_a_judged_pair_is_marked(bench, capsys):
    margin = {"parts": [CLAIM["parts"][0] | {"margin": 0.02}]}
    turned = {"statement": "Post-norm is better."}
    path = family(bench, {}, size=3)
    lacking_of(path, bench.runs)
    path = family(bench, margin, size=3)
    assert how(path, bench)["first"] == "registered before its runs"  # no pair was judged: the claim may change
    bench.pairs(2.0 + 0.01 * NOISE[:4], 2.2 + 0 * NOISE[:4])
    assert how(path, bench)["first"] == "registered before its runs"
    assert how(family(bench, {}, size=3), bench)["first"] == "edited since it was registered (what it compares)"
    both = how(family(bench, turned, size=3), bench)["first"]
    assert both == "edited since it was registered (its statement and what it compares)"
    path = family(bench, margin | turned, size=3)
    assert how(path, bench)["first"] == "edited since it was registered (its statement)"
    assert main(["judge", str(path), "--runs", str(bench.runs)]) == 0
    assert "Not pre-registered: edited since" in " ".join(capsys.readouterr().out.split())
    renamed = how(family(bench, margin | {"name": "other"}, size=3), bench)
    assert renamed == {"other": "renamed since it was registered as first", "gone": []}
    deleted = how(family(bench, {"name": "new", "statement": "New."}, size=3), bench)
    assert "first was registered and is no longer in the file: Pre-norm is better." in deleted["gone"]
    size = how(family(bench, margin, size=2), bench)["first"]
    assert size == "edited since it was registered (what it compares)"


def test_older_registrations_of_single_claims_are_read(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    path = family(bench, {"full": {"regime": "short", "N": 20}})
    file = read_claims(path)
    folder = bench.runs / "claims"
    folder.mkdir()
    kept = {"hash": file.hash(file.claims[0], "screen"), "statement": CLAIM["statement"]}
    (folder / "first.screen.json").write_text(json.dumps(kept))
    words = "registered at its first judged pair, by a version that did not count runs"
    assert how(path, bench)["first"] == words and how(path, bench)["first"] == words
    ledger = judge(read_claims(path), bench.runs)
    assert ledger["family"]["tests"] == 1  # each form had a family of its own, and only the screen was looked at
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "first.screen.json").write_text(json.dumps(kept | {"hash": "another"}))
    assert how(path, bench)["first"] == "edited since it was registered (what it compares)"


def test_hashes_of_claims_are_those_of_older_versions():
    """Registered with the project's file at commit c2182eb."""
    file = read_claims("sweeps/claims.yaml")
    hashes = {c.name: file.hash(c, "screen", named=False) for c in file.claims}
    assert hashes["dropout_narrows_the_gap"] == "4a398683d69d77ec" and hashes["more_than_the_sum"] == "453556f6f565b06e"


def test_screen_and_full_share_the_family_s_level(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    full = {"full": {"regime": "short", "N": 20}}

    def level(form="screen", **options):
        file = read_claims(family(bench, full, size=2, **options))
        found = judge_and_register(file, bench.runs, form)
        return [c["level_effect"] for c in found["claims"]], found["family"]

    # four tests of which one is found; of both forms that are looked at the smaller p comes first
    assert level() == ([0.05 / 4], {"name": "f", "size": 2, "alpha": 0.05, "forms": ["screen", "full"], "tests": 4})
    (of_full,), _ = level("full")
    (of_screen,), _ = level("screen")
    assert sorted([of_full, of_screen]) == [0.05 / 4, 0.05 / 3]
    shutil.rmtree(bench.runs / "claims")
    assert level(forms=["screen"])[0] == [0.05 / 2]  # named before
    assert level("full", forms=["screen"])[1]["tests"] == 4  # another form was looked at all the same
    assert level(forms=["screen"])[1]["tests"] == 4  # and stays so
    shutil.rmtree(bench.runs / "claims")
    for form in ("full", "screen"):  # as many claims as the family is large
        found = judge_and_register(read_claims(family(bench, full, size=1, forms=["screen"])), bench.runs, form)
        assert found["family"]["tests"] == 2
    # named in a file that was registered without: the claim is no other one, and the tests stay as many as they were
    shutil.rmtree(bench.runs / "claims")
    for options, tests, edited in (({}, 4, False), ({"forms": ["screen"]}, 4, False), ({"forms": ["full"]}, 4, False)):
        ledger = judge_and_register(read_claims(family(bench, full, size=2, **options)), bench.runs, "screen")
        assert (ledger["family"]["tests"], ledger["claims"][0]["edited"]) == (tests, edited)
    shutil.rmtree(bench.runs / "claims")
    assert level(forms=["screen"])[1]["tests"] == 2
    ledger = judge_and_register(read_claims(family(bench, full, size=2)), bench.runs, "screen")
    assert ledger["family"]["tests"] == 2 and ledger["claims"][0]["edited"]  # left out later
    with pytest.raises(ConfigError, match="family.forms=.*is not allowed: it is a list, of screen and full"):
        read_claims(family(bench, full, forms=["huge"]))


def test_only_shows_some_and_judges_all(bench, capsys):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    path = family(bench, {}, {"name": "second", "parts": [BETTER | {"margin": 0.02}]})
    assert main(["judge", str(path), "--runs", str(bench.runs)]) == 0
    whole, shown = (bench.runs / "ledger.json").read_bytes(), capsys.readouterr().out
    assert "first" in shown and "second" in shown
    assert main(["judge", str(path), "--runs", str(bench.runs), "--only", "second"]) == 0
    assert (bench.runs / "ledger.json").read_bytes() == whole
    shown = capsys.readouterr().out
    assert " 2 second" in shown and "first" not in shown.replace("1st", "")
    assert main(["judge", str(path), "--runs", str(bench.runs), "--only", "third"]) == 2
    assert list(lacking_of(path, bench.runs, ["second"])) == ["second"]


def test_verify_counts_the_runs_that_end_alike(bench, capsys, monkeypatch):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    asked = []

    def planned_of(job, runs, extra):
        assert extra == ["force=true"]
        (folder,) = runs.glob(f"{'pre_ln' if job.arm == 'pre' else 'post_ln'}-*/seed{job.seed}")
        yield types.SimpleNamespace(folder=folder, name=job.arm, overrides=(job.arm,))

    def run(arm):
        asked.append(arm)
        return {"reproduction": "reproduced" if len(asked) > 1 else "differs"}

    monkeypatch.setattr("albert_ablate.studies.judge_run.planned_of", planned_of)
    monkeypatch.setattr("albert_ablate.studies.judge_run.compose", lambda overrides: overrides[0])
    monkeypatch.setattr("albert_ablate.training.run.run", run)
    assert bench.command("--verify", "3") == 1 and len(asked) == 3
    shown = capsys.readouterr().out
    assert "2 of 3 runs, drawn at random from 24, reproduced bit for bit." in shown and ": differs" in shown
    assert bench.command("--verify", "40") == 0 and len(asked) == 27  # each once


def test_a_claim_is_frozen_by_its_first_judged_pair(bench, capsys):
    bench.pairs(2.0 + 0.01 * NOISE, [])

    def seen():
        return json.loads((bench.runs / "claims" / "claims.json").read_text())["claims"]["first"]["forms"]["screen"][
            "seen"
        ]

    assert bench.command() == 0 and not seen()  # runs of one arm are no pair
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    untuned = {"tuned": ["optimizer.lr"]}
    assert bench.command(**untuned) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is not tuned: albert-ablate judge --run tunes it, or set tuned: [] in the claim." in said
    assert "2.2 nats" not in said and not seen()
    assert bench.command(tuned=[]) == 0  # the advice
    assert not bench.judged(tuned=[])["edited"] and "SUPPORTED" in capsys.readouterr().out
    assert bench.judged(**untuned)["reason"].endswith("judge --run tunes it.")  # no advice that would brand it now


@pytest.mark.parametrize(
    "change, said",
    [
        ({"parts": [{"treatment": "pre", "control": "psot", "measure": "test_loss"}]}, "control=psot is unknown"),
        ({"parts": [{"treatment": "pre", "control": "post", "measure": "tst_loss"}]}, "is one of test_loss"),
        ({"parts": [{"treatment": "pre", "control": "post", "measure": "gap"}]}, "needs margin, in nats"),
        ({"parts": [{"treatment": "pre", "measure": "test_loss"}]}, "control is missing"),
        ({"parts": [{"treatment": "pre", "control": "pre", "measure": "gap", "margin": 1}]}, "pre is the control"),
        ({"screen": {"regime": "short", "N": 13}}, "a whole number 4 to 12"),
        ({"screen": {"regime": "shrt"}}, "regime=shrt is unknown: it is one of short"),
        ({"needs": "all"}, "needs=all is not allowed with 1 parts"),
        ({"markin": 1}, "markin is unknown"),
        ({"test": "moderatd"}, "test=moderatd is not allowed: it is one of moderated"),
        ({"test": "skew_corrected", "screen": {"regime": "short", "N": 6}}, "needs N of 8 or more, got 6"),
        ({"test": "moderated"}, "takes its spread from tuning runs"),
        ({"seeds": [0, 1]}, "must name 12 or more different seeds"),
        ({"tuned": ["clip.factor"]}, "only optimizer.lr is tuned"),
        ({"tuned": "optimizer.lr"}, "it is a list"),
        ({"screen": {"regime": "short", "rates": 4}}, "an odd number of rates, at least 5"),
        ({"screen": {"regime": "short", "step": 1.5}}, "steps of 2, or of 3.16"),
        ({"screen": {"regime": "short", "grid": "0.1"}}, "a list of learning rates"),
        (
            {"screen": {"regime": "short", "measure": "gap"}},
            "judged in nats, lower is better, the contrast's test_loss",
        ),
        ({"parts": [CLAIM["parts"][0] | {"measure": "domains.marsian"}]}, "a corpus is one of airports"),
    ],
)
def test_mistakes_in_a_claim_are_one_sentence(bench, capsys, change, said):
    bench.pairs([2.0], [2.0])
    assert bench.command(**change) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "norm, said",
    [
        ("norm=nrom", "norm=nrom is not an option"),
        ("model.layer=2", "model.layer=2 is unknown: model=nano takes layers"),
    ],
)
def test_an_arm_that_does_not_compose_is_one_sentence(bench, capsys, norm, said):
    bench.pairs([2.0], [2.0])
    tree = FILE | {"arms": {"pre": [norm], "post": ["norm=post_ln"]}}
    (bench.folder / "c.yaml").write_text(yaml.safe_dump(tree))
    assert main(["judge", str(bench.folder / "c.yaml"), "--runs", str(bench.runs)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "other, said",
    [
        (["norm=pre_ln"], "pre and post are the same arm: nothing differs."),
        (["norm=post_ln", "data=stdlib"], "Different data: data is WikipediaLeads in pre and StandardLibrary in post."),
        (["norm=post_ln", "data.batch=4"], "Different data: data.batch is 8 in pre and 4 in post."),
        (["norm=post_ln", "tokenizer=bpe"], "Different data: tokenizer is Bytes in pre and BytePairs in post."),
    ],
)
def test_arms_that_are_no_contrast_are_refused_first(bench, other, said):
    path = bench.folder / "claims.yaml"
    path.write_text(yaml.safe_dump(FILE | {"arms": {"pre": ["norm=pre_ln"], "post": other}}))
    ledger = judge(read_claims(path), bench.runs)["claims"][0]
    assert (ledger["verdict"], ledger["reason"]) == ("inadmissible", said)


def test_empty_folders_and_unknown_claims_are_one_sentence(bench, capsys):
    assert bench.command() == 2
    assert "holds no runs" in capsys.readouterr().err
    bench.pairs([2.0], [2.1])
    assert bench.command("--only", "frist") == 2
    assert "has no claim frist: it has first" in capsys.readouterr().err
    assert bench.command("--budget", "3h", "--run") == 2
    assert "write 3600s or 5e8tokens" in capsys.readouterr().err
    assert bench.command("--budget", "3s") == 2


def test_one_seed_or_no_common_seed_is_no_verdict(bench):
    bench.pairs([2.0], [2.2])
    one = bench.judged()
    assert one["verdict"] == "undecided"
    assert (one["parts"][0]["low"], one["parts"][0]["high"]) == (-INF, INF)
    for file in bench.runs.glob("pre_ln*/seed0/record.json"):
        file.unlink()
    bench.run("pre_ln", 7, 2.0)
    assert bench.judged()["verdict"] == "open"


def test_an_unreadable_record_is_named(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    (bench.run("rezero", 0, 2.0) / "record.json").write_text("{")
    (said,) = judge(read_claims(bench.file()), bench.runs)["refusals"]
    assert "rezero" in said and "cannot be read" in said


def test_a_missing_seed_is_named_with_the_pairs_behind_it(bench, capsys):
    bench.pairs(2.0 + 0.1 * NOISE, 2.2 + 0 * NOISE)
    (file,) = bench.runs.glob("pre_ln*/seed4/record.json")
    file.write_text(file.read_text()[:60])  # cut off
    assert bench.command() == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Seed 4 of pre is missing, and 7 pairs wait behind it: pre_ln-" in said
    assert "seed4/record.json cannot be read" in said and "Not counted: pre_ln-" in said
    file.unlink()
    assert "Seed 4 of pre is missing, and 7 pairs wait behind it." in bench.judged()["notes"]
    bench.run("pre_ln", 3, 2.0, "stopped")
    found = bench.judged()
    assert found["verdict"] == "undecided" and "Seed 3 of pre is missing, and 7 pairs wait" in found["reason"]
    for seed in range(5, 12):
        (file,) = bench.runs.glob(f"post_ln*/seed{seed}/record.json")
        file.unlink()
    assert "Seed" not in " ".join(bench.judged()["notes"])  # only the next one


@pytest.mark.parametrize("key, value", [("tokens", 256), ("every", 5000)])
def test_arms_must_agree_in_how_they_are_evaluated(bench, key, value):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    assert bench.judged()["verdict"] == "supported"
    for file in bench.runs.glob("pre_ln*/*/record.json"):
        edit_record(file.parent, **{f"config__evaluation__{key}": value})
    found = bench.judged()
    assert found["verdict"] == "inadmissible"
    assert (
        f"pre and post were evaluated differently (seed 0): evaluation.{key} is {value} in one and" in found["reason"]
    )
    exact = {"treatment": "pre", "control": "post", "measure": "parameters", "margin": 0.01}
    assert bench.judged(parts=[exact])["verdict"] == "no effect"  # which no evaluation touches


def test_arms_evaluated_unlike_are_refused_before_training(bench):
    path = bench.folder / "claims.yaml"
    arms = {"pre": ["norm=pre_ln", "evaluation.every=5000"], "post": ["norm=post_ln"]}
    path.write_text(yaml.safe_dump(FILE | {"arms": arms}))
    found = judge(read_claims(path), bench.runs)["claims"][0]
    assert (
        found["verdict"] == "inadmissible"
        and "Evaluated differently: evaluation.every is 5000 in pre" in found["reason"]
    )


def test_evaluations_of_other_weights_or_settings_are_no_pair(bench):
    part = {"treatment": "pre", "control": "post", "measure": "corruption_masked", "margin": 0.01}

    def entries(weights, tokens, value):
        found = {"rows": [], "summary": {"masked_area": value}, "settings": {"tokens": tokens}, "weights": weights}
        return json.dumps({"corruption": found | {"weights_hash": "x"}})

    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    for name, value, own in (("post_ln", 0.5, ("last", 512)), ("pre_ln", 0.3, ("best", 512))):
        for folder in bench.runs.glob(f"{name}*/*"):
            (folder / "evaluations.json").write_text(entries(*own, value + 0.01 * NOISE[int(folder.name[4:])] ** 2))
    reason = bench.judged(parts=[part])["reason"]
    assert "corruption.weights is best in one and last in the other" in reason
    for folder in bench.runs.glob("pre_ln*/*"):
        (folder / "evaluations.json").write_text(entries("last", 256, 0.3))
    assert "corruption.tokens is 256 in one and 512 in the other" in bench.judged(parts=[part])["reason"]


def identified(bench):
    """Settings and identities that the folders' names and seeds agree with."""
    for folder in bench.runs.glob("*/seed*"):
        seed = int(folder.name[4:])
        edit_record(folder, setting=folder.parent.name, identity=run_identity(folder.parent.name, seed))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"identity": "000000000000"}, "its identity is 000000000000, and that of pre_ln-"),
        ({"setting": "another"}, "and says that it is another/seed6"),
        ({"seed": 7}, "and says that it is"),
        ({"role": "tuning"}, "its role is tuning, and seed 6 is one of confirmation"),
        ({"reproductions": [{"verdict": "reproduced"}, {"verdict": "differs"}]}, "retraining it gave other weights"),
    ],
)
def test_a_record_that_contradicts_itself_is_no_evidence(bench, capsys, change, said):
    bench.pairs(2.0 + 0.1 * NOISE, 2.2 + 0 * NOISE)
    assert bench.judged()["parts"][0]["pairs"] == 12
    (folder,) = bench.runs.glob("pre_ln*/seed6")
    edit_record(folder, **change)
    assert bench.command() == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown and "Seed 6 of pre is missing, and 5 pairs wait behind it" in shown
    ledger = json.loads((bench.runs / "ledger.json").read_text())
    assert any(said in text for text in ledger["refusals"]) and ledger["claims"][0]["parts"][0]["pairs"] == 6


def test_two_seeds_copied_to_ten_more_numbers_decide_nothing(bench):
    bench.pairs(2.0 + 0.001 * NOISE[:2], 2.2 + 0 * NOISE[:2])
    for place in [*bench.runs.glob("*/seed[01]")]:
        for n in range(2, 12):
            if n % 2 == int(place.name[4:]):
                shutil.copytree(place, place.with_name(f"seed{n}"))
                edit_record(place.with_name(f"seed{n}"), seed=n)
    assert bench.judged()["parts"][0]["pairs"] == 2  # the identities are those of other seeds
    identified(bench)  # edited too
    found = bench.judged()
    assert found["verdict"] == "inadmissible" and "Seeds 0 and 2 of pre have the same order of data" in found["reason"]
    for folder in bench.runs.glob("*/seed*"):
        proof = {
            "data_order": f"order{folder.name}",
            "final_weights": f"{folder.parent.name}{int(folder.name[4:]) % 2}",
        }
        edit_record(folder, proof=proof)
    assert "Seeds 0 and 2 of pre have the same final weights" in bench.judged()["reason"]


def test_a_second_record_and_an_edited_loss_are_refused(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    (folder,) = bench.runs.glob("pre_ln*/seed3")
    twin = bench.runs / "a_first_in_order" / "seed3"
    shutil.copytree(folder, twin)
    edit_record(twin, setting=twin.parent.name, identity=run_identity(twin.parent.name, 3))
    assert bench.judged()["verdict"] == "supported"  # the same record, twice
    record = json.loads((folder / "record.json").read_text())
    edit_record(twin, summary=record["summary"] | {"test_loss": 1.0})
    assert "Seed 3 of pre has 2 records that differ: a_first_in_order/seed3 and" in bench.judged()["reason"]
    shutil.rmtree(twin.parent)
    loss = record["summary"]["test_loss"]
    history(folder, "evals", split=["validation", "test", "test"], loss=[record["summary"]["val_loss"], 2.5, loss])
    assert bench.judged()["verdict"] == "supported"
    edit_record(folder, summary=record["summary"] | {"test_loss": 1.9})
    found = bench.judged()
    assert (
        found["verdict"] == "inadmissible" and "has a test_loss of 1.9 in its summary and of 2.00105" in found["reason"]
    )


def test_a_damaged_history_is_refused_in_a_sentence(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    (folder,) = bench.runs.glob("pre_ln*/seed3")
    (folder / "evals.arrow").write_bytes(b"")
    found = bench.judged()
    assert found["verdict"] == "inadmissible" and "seed3 cannot be used" in found["reason"]


def test_a_measure_of_evaluations_says_how_far_apart_they_lie(bench):
    part = {"treatment": "pre", "control": "post", "measure": "speedup"}
    for norm, factor in (("pre_ln", 1.0), ("post_ln", 1.3)):
        evidence(bench, norm, factor, lr=composed(arm(norm))["optimizer"]["lr"])
    (note,) = [n for n in bench.judged(parts=[part], equal={})["notes"] if "read from" in n]
    assert note == "speedup is read from 4 evaluations on validation text, 1,000 tokens apart: it tells nothing finer."


def test_a_lacking_evaluation_names_the_command_and_waits(bench):
    bench.pairs(2.0 + 0.01 * NOISE, 2.2 + 0 * NOISE)
    part = {"treatment": "pre", "control": "post", "measure": "corruption_masked", "margin": 0.01}
    found = bench.judged(parts=[part])
    assert found["verdict"] == "open"
    assert "albert-ablate evaluate pre_ln" in found["reason"] and found["reason"].endswith(" corruption")


# --- measures --------------------------------------------------------------------------------------------------------


def history(folder, name, **columns):
    """A finished history of these columns, the others nan."""
    n = len(next(iter(columns.values())))
    rows = {
        f.name: columns.get(f.name, [""] * n if f.type == pa.string() else np.full(n, np.nan)) for f in SCHEMAS[name]
    }
    rows |= {k: columns.get(k, np.arange(n)) for k in ("step", "tokens", "layer") if k in rows}
    table = pa.table({f.name: pa.array(rows[f.name], f.type) for f in SCHEMAS[name]})
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def evidence(bench, norm, factor, lr=0.001):
    """A run with everything a measure may ask for; `factor` separates two arms."""
    folder = bench.run(norm, 0, 2.0 * factor, lr=lr, summary__gap=0.1 * factor, summary__best_val_loss=2.0 * factor,
                       summary__train_loss=1.8 * factor, summary__test_loss_last=2.0 * factor,
                       summary__test_bits_per_byte=3.0 * factor, summary__val_bits_per_byte=3.0 * factor,
                       summary__macro_f1=0.5 / factor, summary__probe_macro_f1=0.5 / factor,
                       summary__accuracy=0.5 / factor, summary__parameters=1000 * factor,
                       cost__flops=2e9 * factor)  # fmt: skip
    steps = np.arange(1, 61)
    history(folder, "steps", step=steps, tokens=steps * 100, loss=2 + factor / steps, grad_norm=factor * np.ones(60))
    at = np.repeat([100, 200, 300, 400], 2)
    losses = np.array([3.0, 3.1, 2.5, 2.7, 2.0, 2.4, 1.8, 2.3]) + 0.1 * factor
    history(folder, "evals", step=at, tokens=at * 10, flops=at * 1e6, split=["train", "validation"] * 4, loss=losses)
    step, layer = np.repeat([0, 10, 20], 8), np.tile(np.repeat(np.arange(4), 2), 3)
    sizes = (1 + layer) ** float(factor)
    history(folder, "layers", step=step, layer=layer, sublayer=["attention", "mlp"] * 12, grad_norm=sizes,
            weight_norm=sizes, update_ratio=0.01 * sizes, input_rms=sizes, residual_rms=sizes * (1 + step),
            entropy=np.tile([2.0 / factor, np.nan], 12), max_logit=np.tile([5.0 * factor, np.nan], 12))  # fmt: skip
    figures = {
        "corruption": {f"{k}_area": 0.1 * factor for k in ("masked", "noisy", "swapped")},
        "units": {f"rise_{k}": 0.1 * factor for k in (1, 2, 5, 10, 20, 30)},
        "sharpness": {"eigenvalue": 3.0 * factor, "rise": 0.2 * factor},
        "representation": {f"rank_{k}": 9.0 / factor for k in ("first", "middle", "last")},
        "calibration": {"error": 0.1 * factor}, "memorization": {"excess": 0.1 * factor},
        "domains": {"bible": 2.0 * factor},
    }  # fmt: skip
    entries = {
        k: {"rows": [], "summary": v, "settings": {}, "weights": "last", "weights_hash": "x"}
        for k, v in figures.items()
    }
    (folder / "evaluations.json").write_text(json.dumps(entries))
    return Evidence(folder, json.loads((folder / "record.json").read_text()))


@pytest.mark.parametrize("name", [*MEASURES, "domains.bible"])
def test_swapping_the_arms_flips_every_measure_exactly(bench, name):
    m = registry.measure(name)
    margin = {"margin": 0.01}
    part = {"treatment": "pre", "control": "post", "measure": name} | margin
    grid = [0.001, 0.002] if m.kind == "grid" else []
    form = {"regime": "short", "N": 4} | ({"grid": grid} if grid else {})
    own = composed(arm("pre_ln"))["optimizer"]["lr"]
    for norm, factor in (("pre_ln", 1.0), ("post_ln", 1.3)):
        for rate in grid or [own]:
            folder = evidence(bench, norm, factor * (rate / 0.001) ** 0.1 if grid else factor, lr=rate).folder
            if grid and name != "rate_sensitivity" and norm == "post_ln" and rate == 0.002:
                record = json.loads((folder / "record.json").read_text())
                (folder / "record.json").write_text(json.dumps(record | {"status": "diverged"}))
    claim = {"equal": {}, "screen": form}
    (d,) = bench.judged(parts=[part], **claim)["parts"][0]["d"]
    (swapped,) = bench.judged(parts=[part | {"treatment": "post", "control": "pre"}], **claim)["parts"][0]["d"]
    assert swapped == -d
    equal = ("spike_score", "grad_spike_score", "residual_drift")  # here, by construction
    assert name in equal or d != 0
    if name not in (*equal, "speedup", "speedup_flops", "gap_at_equal_training_loss", "gap_at_best"):
        assert d > 0  # the factor makes every measure of the control worse


def test_measures_by_layer_by_hand(bench):
    run = evidence(bench, "pre_ln", 1.0)
    sizes = np.repeat([1.0, 2.0, 3.0, 4.0], 2)
    assert registry.input_spread(run) == pytest.approx(np.log(sizes).std())
    assert registry.depth_imbalance_init(run) == pytest.approx(np.log(4))
    assert registry.depth_imbalance(run) == pytest.approx(np.log(4))
    assert registry.residual_drift(run) == pytest.approx(np.log(21 / 11) / 2)  # steps 10 and 20
    assert registry.weight_norm(run) == pytest.approx(np.sqrt(2 * (1 + 4 + 9 + 16)))
    assert registry.largest_update_ratio(run) == pytest.approx(0.04)
    assert registry.gap_at_best(run) == pytest.approx(0.5)
    assert registry.activation_growth(run) == pytest.approx(np.log(4) / 4)
    assert (registry.entropy_floor(run), registry.largest_logit(run)) == (2.0, 5.0)
    assert registry.mean_val_loss(run) == pytest.approx((3.2 / 2 + 2.8 + 2.5 + 2.4 / 2) / 3)


def test_a_history_without_the_column_names_what_is_needed(bench):
    folder = bench.run("pre_ln", 0, 2.0)
    history(folder, "layers", step=[1, 1], layer=[0, 1])
    with pytest.raises(Missing, match="no update_ratio by layer while it trains"):
        registry.largest_update_ratio(Evidence(folder, json.loads((folder / "record.json").read_text())))


# --- the project's own claims ----------------------------------------------------------------------------------------


def test_the_fifteen_claims_are_read_and_screens_are_small():
    file = read_claims("sweeps/claims.yaml")
    assert len(file.claims) == file.size == 15 and file.forms == ("screen",)
    assert all(set(c.forms) == {"screen", "full"} for c in file.claims)
    assert all(c.forms["screen"].N <= 12 and c.forms["screen"].rates == 5 for c in file.claims)
    small = [c for c in file.claims if "12 layers" in file.regime(c, "screen")]
    assert [(c.name, c.forms["screen"].measure) for c in file.claims if c not in small] == [
        ("gradients_neither_explode_nor_vanish", "depth_imbalance_init")  # at 96 layers, before the first step
    ]


@pytest.mark.slow
def test_every_arm_of_every_claim_composes():
    file = read_claims("sweeps/claims.yaml")
    for overrides in {
        file.overrides(c, p, form, a)
        for c in file.claims for form in c.forms for p in (*c.parts, *c.secondary) for a in arms_of(p)
    }:  # fmt: skip
        composed(overrides)


@pytest.mark.process
@pytest.mark.slow
def test_a_claim_on_a_checkpoint_is_priced_run_and_judged(tmp_path, capsys):
    """Two fine-tunings of one small GPT-2, with and without dropout; its folder spelled in two ways is one arm."""
    there = gpt2(tmp_path / "gpt2")
    short = ["model=pretrained", f"model.path={there}", "data=markov", "data.length=60_000", "data.symbols=8",
             "budget.tokens=4096", "optimizer.lr=0.001", "evaluation.tokens=512"]  # fmt: skip
    arms = {"plain": ["norm=pre_ln"], "dropped": ["dropout=uniform"], "again": [f"model.path={tmp_path}/./gpt2"]}
    claim = CLAIM | {"screen": {"regime": "short", "N": 4}, "parts": [CLAIM["parts"][0] | {"margin": 0.0}]}
    claim["parts"][0] |= {"treatment": "dropped", "control": "plain"}
    same = CLAIM | {"name": "same", "parts": [claim["parts"][0] | {"treatment": "again"}]}
    tree = {"arms": arms, "regimes": {"short": {"text": "short", "overrides": short}}, "claims": [claim, same]}
    file, runs = tmp_path / "claims.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(tree))
    assert main(["judge", str(file), "--runs", str(runs), "--dry-run"]) == 0
    assert re.search(r"screen +8 +0 +0 +3.3e\+04", capsys.readouterr().out)  # 8 runs of 4096 tokens, none for tuning
    assert main(["judge", str(file), "--runs", str(runs), "--run", "--workers", "1"]) == 0
    ledger = json.loads((runs / "ledger.json").read_text())["claims"]
    assert [c["parts"][0]["seeds"] for c in ledger] == [[0, 1, 2, 3], []] and len([*runs.glob("*/seed*")]) == 8
    assert ledger[0]["verdict"] not in ("open", "inadmissible") and "same arm" in ledger[1]["reason"]


@pytest.mark.process
@pytest.mark.slow
def test_the_judge_trains_what_is_undecided(tmp_path, capsys):
    """Real nano runs: two arms, tuning left out, then an evaluation; the second time nothing is trained."""
    short = ["model=nano", "model.layers=2", "data=markov", "data.length=60_000", "data.symbols=8",
             "budget.tokens=60_000", "optimizer.lr=0.01", "evaluation.tokens=1024"]  # fmt: skip
    parts = [{"treatment": "pre", "control": "post", "measure": "test_loss"}]
    beside = {"name": "beside", "statement": "s", "parts": [parts[0] | {"measure": "corruption_masked", "margin": 0.1}]}
    claims = [
        CLAIM | {"screen": {"regime": "short", "N": 4}},
        beside | {"tuned": [], "screen": {"regime": "short", "N": 4}},
    ]
    tree = {"arms": FILE["arms"], "regimes": {"short": {"text": "short", "overrides": short}}, "claims": claims}
    file, runs = tmp_path / "claims.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(tree))
    assert main(["judge", str(file), "--runs", str(runs), "--run", "--workers", "1"]) == 0
    ledger = json.loads((runs / "ledger.json").read_text())
    assert [len(c["parts"][0]["seeds"]) for c in ledger["claims"]] == [4, 4]
    assert all(c["verdict"] not in ("open", "undecided", "inadmissible") for c in ledger["claims"])
    assert len([*runs.glob("*/seed*")]) == 8  # shared by both claims
    before = (runs / "ledger.json").read_bytes()
    light = "import sys; from albert_ablate.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", light, "judge", str(file), "--runs", str(runs)], check=True)
    assert (runs / "ledger.json").read_bytes() == before
    capsys.readouterr()
    assert main(["judge", str(file), "--runs", str(runs), "--run"]) == 0
    assert "seed=" not in capsys.readouterr().out
    assert (runs / "ledger.json").read_bytes() == before
    assert main(["judge", str(file), "--runs", str(runs), "--verify", "1"]) == 0
    assert "1 of 1 runs, drawn at random from 8, reproduced bit for bit." in capsys.readouterr().out


def test_runs_before_a_correction_are_not_of_its_arm(tmp_path):
    """T-Fixup's learned positions were drawn too large: such runs are no evidence about the placement as it is now."""
    bench = Workbench(tmp_path)
    for seed in range(5):
        bench.run("t_fixup", seed, 2.0, revisions={})
        bench.run("t_fixup", seed + 10, 2.0, revisions={"norm": 2})
        bench.run("pre_ln", seed + 10, 2.1)
    read = RunStore(bench.runs)
    assert [r.record["seed"] for r in read.runs_of(arm("t_fixup"))] == [10, 11, 12, 13, 14]
    assert [r.record["seed"] for r in read.runs_of(arm("t_fixup"), outdated=True)] == [0, 1, 2, 3, 4]
