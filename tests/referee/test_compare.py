"""`albert-ablate compare`: commands, tables and overrides, against the judge's own verdict."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from albert_ablate.cli import main
from albert_ablate.referee import runners
from albert_ablate.referee.answer import ACCEPT, INADMISSIBLE, REJECT, UNDECIDED, Answer, Contrast, picture
from albert_ablate.referee.ledger import Ledger
from albert_ablate.referee.sides import read_side
from albert_ablate.stats.verdicts import Claim, verdicts
from albert_ablate.stats.verdicts import Contrast as Differences

TABLE = {
    "a": [2.01, 2.00, 2.02, 1.99, 2.03, 2.00],
    "b": [1.95, 1.95, 1.955, 1.94, 1.97, 1.95],
    "c": [2.011, 2.0, 2.018, 1.992, 2.03, 2.001],
}


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def ask(*options):
        code = main(["compare", *map(str, options), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return ask


def table(tmp_path, rows=None, skip=()):
    rows = [(arm, s, v) for arm, values in TABLE.items() for s, v in enumerate(values)] if rows is None else rows
    text = "".join(f"{arm},{seed},{v}\n" for arm, seed, v in rows if (arm, seed) not in skip)
    (tmp_path / "t.csv").write_text(f"arm,seed,loss\n{text}")
    return ["--from", tmp_path / "t.csv", "--metric", "loss"]


@pytest.mark.parametrize(
    ("sides", "given", "workers"),
    [
        (["norm=pre_ln", "norm=rezero"], [], 2),
        (["norm=pre_ln", "norm=rezero"], ["--workers", "1"], 1),
        (["echo {seed}", "echo {seed}{seed}"], [], 1),  # side by side they would slow each other down
        (["echo {seed}", "echo {seed}{seed}"], ["--workers", "2"], 2),
    ],
)
def test_as_many_workers_as_asked_for(sides, given, workers, monkeypatch):
    asked = []
    monkeypatch.setattr("albert_ablate.referee.compare.compare", lambda question, work: asked.append(work) or 1 / 0)
    assert main(["compare", *sides, *given]) == 75
    assert asked[0].workers == workers


def test_a_table_is_judged_as_the_judge_does(ask, tmp_path):
    code, answer, _ = ask("a", "b", "c", *table(tmp_path))
    logs = {k: np.log(v) for k, v in TABLE.items()}
    own = verdicts([Claim([Differences(logs["a"] - logs[k], math.log(1.005))], 20) for k in "bc"], 2)
    assert [v.verdict for v in own] == ["supported", "no effect"]
    assert (code, [c["decision"] for c in answer["contrasts"]]) == (0, ["ACCEPT", "NO EFFECT"])
    for c, v in zip(answer["contrasts"], own, strict=True):
        part = v.parts[0]
        assert c["effect"] == pytest.approx({"mean": part.mean, "low": part.low, "high": part.high})
        assert (c["p"], c["level"], c["pairs"]) == (pytest.approx(v.p_effect), v.level_effect, 6)


def test_a_table_says_which_pair_to_run_next(ask, tmp_path):
    code, answer, _ = ask("a", "b", *table(tmp_path, skip={("b", 2)}))
    (c,) = answer["contrasts"]
    assert (code, c["pairs"], c["next_seed"]) == (75, 2, 2) and "3 pairs wait behind seed 2" in c["reason"]
    assert "Run next: seed 2 of a and b." in answer["notes"]
    assert ask("a", "b", *table(tmp_path, rows=[("a", 0, 1.0), ("b", 0, 2.0)]))[1]["contrasts"][0]["next_seed"] == 1


def test_what_asking_again_does_not_change_is_said(ask, tmp_path):
    noise = [2.0, 2.3, 1.8, 2.1, 2.4, 1.7]
    rows = [(arm, s, v) for arm, values in (("a", noise), ("b", noise[::-1])) for s, v in enumerate(values)]
    code, answer, _ = ask("a", "b", *table(tmp_path, rows=rows), "--max-pairs", 6)
    (c,) = answer["contrasts"]
    assert (code, c["next_seed"]) == (75, None)
    assert c["reason"].endswith("Asked again, this stays the answer; another --max-pairs is another question.")


def test_a_swapped_table_gives_the_opposite(ask, tmp_path):
    one, other = (ask(*order, *table(tmp_path))[1]["contrasts"][0] for order in ("ab", "ba"))
    assert (one["decision"], other["decision"]) == ("ACCEPT", "REJECT")
    assert one["effect"]["mean"] == pytest.approx(-other["effect"]["mean"]) and one["p"] == pytest.approx(other["p"])


BAD_TABLES = {
    "a,0,1\na,0,2\nb,0,1\n": "line 3: a, seed 0 is given twice",
    "a,0,low\nb,0,1\n": "line 2: loss must be a number or diverged, got 'low'",
    "a,x,1\nb,0,1\n": "line 2: the seed 'x' is not a whole number",
    "a,0,1\n": "has no arm b",
    "": "has no column arm",
}


@pytest.mark.parametrize("rows", BAD_TABLES)
def test_a_table_that_cannot_be_read_is_refused(ask, tmp_path, rows):
    (tmp_path / "t.csv").write_text(f"arm,seed,loss\n{rows}")
    code, answer, said = ask("a", "b", "--from", "t.csv", "--metric", "loss")
    assert code == 2 and BAD_TABLES[rows] in said and said.count("\n") == 1
    assert ask("a", "b", "--from", "gone.csv", "--metric", "loss")[0] == 2


def test_diverged_cells_are_outcomes(ask, tmp_path):
    rows = [(arm, s, "diverged" if arm == "b" else 2 + 0.1 * s) for arm in "ab" for s in range(10)]
    code, answer, _ = ask("a", "b", *table(tmp_path, rows=rows))
    assert code == 1 and answer["contrasts"][0]["diverged"] == {"baseline": 0, "candidate": 10}


@pytest.fixture
def calls(monkeypatch):
    made = []

    def instead(side, seed, metric, limit, folder, read=True):
        made.append((side.command.split()[1], seed))
        own = np.random.default_rng([seed, int(side.identity, 16)]).standard_normal()
        return metric or "loss", float(side.command.split()[1]) + 0.01 * own

    monkeypatch.setattr(runners, "run_command", instead)
    return made


def sides(*levels):
    return [f"run {x} {{seed}}" for x in levels]


def test_commands_run_until_decided_and_are_remembered(ask, calls):
    code, answer, said = ask(*sides(2.0, 1.9))
    (c,) = answer["contrasts"]
    assert (code, c["decision"], answer["runs"]) == (0, "ACCEPT", 2 * c["pairs"]) == (0, "ACCEPT", len(calls))
    assert [level for level, _ in calls[:4]] == ["2.0", "1.9", "1.9", "2.0"]
    assert said.count(": pair ") == c["pairs"]
    again = ask(*sides(2.0, 1.9))[1]
    assert again["recorded"] and again["contrasts"] == answer["contrasts"] and len(calls) == answer["runs"]


def test_a_control_is_shared_by_several_candidates(ask, calls):
    code, answer, _ = ask(*sides(2.0, 1.9, 2.1), "--max-pairs", 12)
    assert code == 0 and [c["decision"] for c in answer["contrasts"]] == ["ACCEPT", "REJECT"]
    assert len(calls) == len(set(calls)) == answer["runs"]
    assert answer["contrasts"][0]["level"] in (0.025, 0.05)  # a step of Holm over two


def test_a_comparison_goes_on_after_a_crash(ask, calls, monkeypatch):
    works, failed = runners.run_command, []

    def crashing(side, seed, *rest):
        if seed == 2 and not failed:
            failed.append(side.command)
            raise runners.Crash("exit code 1: no")
        return works(side, seed, *rest)

    monkeypatch.setattr(runners, "run_command", crashing)
    code, answer, _ = ask(*sides(2.0, 1.9))
    assert code == 2 and f"{failed[0]} failed with seed 2: exit code 1: no" in answer["sentence"]
    assert ask(*sides(2.0, 1.9))[0] == 0 and len(calls) == len(set(calls))


def test_crashes_as_outcomes_have_a_folder_of_their_own(ask, calls, monkeypatch):
    works, asked = runners.run_command, sides(2.0, 1.9)

    def crashing(side, seed, *rest):
        if side.command == asked[1]:
            raise runners.Crash("exit code 1: nan")
        return works(side, seed, *rest)

    monkeypatch.setattr(runners, "run_command", crashing)
    code, accident, _ = ask(*asked, "--max-pairs", 12)
    assert code == 2 and "exit code 1: nan" in accident["sentence"]
    # by hand, Fisher: 2 over 10 choose 5 = .0079 with 5 pairs is below the .0127 of a look, .0286 with 4 is not
    code, outcome, _ = ask(*asked, "--max-pairs", 12, "--crash-is-outcome")
    assert code == 1 and outcome["contrasts"][0]["diverged"] == {"baseline": 0, "candidate": 5}
    assert (
        outcome["folder"] != accident["folder"]
        and Ledger(Path(outcome["folder"])).entries_of("claim")[0]["crash_is_outcome"]
    )
    # the name without it follows from what it did before: a folder that is there is gone on with
    identities = [read_side(x).identity for x in asked]
    scale = f"Scale(margin={math.log1p(0.005)!r}, relative=True, higher=False)"
    kept = [*identities, "", scale, 12, False, ["tokens", "parameters", "flops"]]
    name = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:12]
    assert Path(accident["folder"]).name == name
    again = ask(*asked, "--max-pairs", 12, "--crash-is-outcome")[1]
    assert again["recorded"] and again["contrasts"] == outcome["contrasts"]


def test_the_time_of_a_command_can_be_the_measure(ask, calls, monkeypatch):
    now = [0.0]

    def clock():  # looked at before and after each command
        now[0] += calls and 0.01 * (1 + 3 * (calls[-1][0] == "3")) + 1e-4 * calls[-1][1] or 0.01
        return now[0]

    monkeypatch.setattr(runners, "clock", clock)
    code, answer, _ = ask(*sides(2, 3), "--metric", "seconds", "--workers", 3)
    assert code in (1, 75) and answer["contrasts"][0]["metric"] == "seconds"


@pytest.mark.parametrize(
    "options, said",
    [
        (["norm=pre_ln"], "needs two sides or more"),
        (["norm=pre_ln", "norm=pre_ln"], "are the same"),
        (["norm=pre_ln", "norm=rezero", "--max-pairs", 3], "--max-pairs=3 is not allowed"),
        (["norm=pre_ln", "norm=rezero", "--margin", 0.1], "must be a percentage"),
        (["norm=pre_ln", "run {seed}"], "are not of one kind"),
        (["norm=pre_ln", "norm=rezero", "--equal", "size"], "--equal=size is not allowed"),
        (["norm=pre_ln", "norm=rezero", "--measure", "nothing"], "nothing"),
        (["norm=pre_ln", "norm=rezero", "--budget", "soon"], "--budget=soon is not allowed"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(ask, tmp_path, options, said):
    code, _, heard = ask(*options)
    assert code == 2 and said in heard and heard.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def contrast(**more):
    kept = {"metric": "loss", "relative": True, "margin": math.log(1.01), "mean": 0.02, "low": 0.01, "high": 0.03}
    return Contrast("a", "b", more.pop("decision", ACCEPT), "Why.", **(kept | {"pairs": 5, "max_pairs": 12} | more))


def test_a_sentence_says_change_interval_and_pairs():
    # by hand: exp(-.02) - 1 = -1.98 %, exp(-.03) - 1 = -2.96 %, exp(-.01) - 1 = -0.995 %
    assert contrast().sentence() == (
        "b changed loss by -1.98 % against a (95 % interval -2.96 to -0.995; 5 pairs): ACCEPT. Why."
    )
    assert "+2.02 %" in contrast(higher=True).sentence()


def test_a_picture_shows_the_interval_against_the_margin():
    margin, interval = picture(contrast())
    zero = margin.index("0")
    assert margin[zero - 1] == margin[zero + 1] == "=" and margin.index("=") > interval.index("[")
    assert interval.index("[") < interval.index("o") < interval.index("]") < zero
    assert picture(contrast(low=-math.inf)) == []


def test_of_several_contrasts_the_best_is_the_answer():
    found = [contrast(decision=d) for d in (REJECT, UNDECIDED, INADMISSIBLE)]
    assert Answer("compare", found).exit_code == 75
    assert Answer("compare", [*found, contrast()]).exit_code == 0
    assert Answer("compare", found).markdown().count("\n| `b`") == 3


TINY = (
    "model=nano model.layers=1 model.width=16 model.heads=1 model.context=32 data=markov data.symbols=8 "
    "data.length=20_000 data.batch=4 budget.tokens=4_000 evaluation.tokens=256 evaluation.every=2_000"
)


@pytest.mark.slow
def test_overrides_are_trained_until_decided(ask, tmp_path):
    options = ["optimizer.lr=0.01", "optimizer.lr=0.0001", "--common", TINY, "--max-pairs", 6]
    code, answer, said = ask(*options)
    (c,) = answer["contrasts"]
    assert (code, c["decision"]) == (1, "REJECT"), said
    assert answer["runs"] == 2 * c["pairs"] == len([*(tmp_path / "runs").glob("*/seed*/record.json")])
    assert (tmp_path / answer["folder"] / "claims.yaml").exists()
    again = ask(*options)
    assert again[0] == 1 and again[1]["recorded"] and again[1]["contrasts"] == answer["contrasts"]


@pytest.mark.slow
def test_a_session_of_overrides(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = ["gate", "--session", "s", "--margin", "5%", "--common", TINY, "--max-pairs", "6", "--json"]
    slow, fast = "optimizer.lr=0.0001", "optimizer.lr=0.01"
    assert main([*options, "--baseline", slow, "--candidate", fast, "--workers", "2"]) == 0
    answer = json.loads(capfd.readouterr().out)
    seeds = {int(f.name[4:]) for f in (tmp_path / "runs").glob("*/seed*")}
    assert len(seeds) == 8 + answer["contrasts"][0]["pairs"] and min(seeds) >= 1000

    ticks = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr("albert_ablate.referee.session.clock", lambda: next(ticks))
        assert main([*options, "--candidate", "optimizer.lr=0.02", "--budget", "3s"]) == 75
    answer = json.loads(capfd.readouterr().out)
    ledger = tmp_path / "runs/sessions/s/ledger.jsonl"
    before, seed = ledger.read_bytes(), answer["contrasts"][0]["next_seed"] - 1
    for folder in (tmp_path / "runs").glob(f"*/seed{seed}"):
        shutil.rmtree(folder)
    assert main([*options, "--candidate", "optimizer.lr=0.02"]) == 2
    assert "that the ledger names are gone" in capfd.readouterr().err and ledger.read_bytes() == before
