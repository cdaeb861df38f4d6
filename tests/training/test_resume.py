"""Exact resume: a run killed anywhere and started again ends as one that never was."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from forking import Ambush, Child, arguments, forked, nano, outcome, train, write_text

from albert_ablate.config import ConfigError, options
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import SCHEMAS
from albert_ablate.training.checkpoint import load_checkpoint
from albert_ablate.training.console import show_result
from albert_ablate.training.run import run
from run import main

VARIANTS = {
    "plain": [],
    "masks": [
        *("data.accumulate=2", "data.train_size=1500", "dropout=depth_decay", "dropout.mean=0.2"),
        *("clip=agc", "norm=rezero", "optimizer=sgd", "optimizer.lr=0.3"),
    ],
    "passes": ["data.train_size=1500", "data.accumulate=4", "norm=peri_ln", "schedule=wsd"],
    "attention": [
        *("dropout=uniform", "dropout.sites=[attention,hidden]", "attention=rotary", "norm=deepnorm"),
        *("clip=value", "optimizer=adam", "++model.tied=true", "loss.z_loss=1e-3"),
    ],
    "shared": ["++model.shared=true", "norm_type=rms_norm", "norm=sandwich_ln", "diagnostics.every=1", "clip=none"],
}
RARELY = "checkpoint.seconds=1000"  # commits at evaluations alone
# Quick tests use "masks" alone: micro-batches, passes that batches straddle, masks, clipping, gates and momentum.


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    train(configured("plain", text, text.parent / "first"))  # packs the text, so that no session counts that
    return text


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """Of each variant, once: what an uninterrupted run gives, and its moments (with RARELY)."""
    known: dict[str, tuple[dict, list[str]]] = {}

    def of(variant: str) -> tuple[dict, list[str]]:
        if variant not in known:
            cfg = configured(variant, text, tmp_path_factory.mktemp("reference"), RARELY)
            known[variant] = forked(lambda: watched(cfg))
        return known[variant]

    return of


@pytest.fixture(scope="module")
def cut(text, tmp_path_factory):
    """The runs folder of a run of "masks" that was killed half-way, copied to `runs`."""
    kept = tmp_path_factory.mktemp("cut")
    assert killed_at(configured("masks", text, kept), [400]) == 1
    return lambda runs: shutil.copytree(kept, runs, dirs_exist_ok=True, symlinks=True)


def configured(variant: str, text: Path, runs: Path, *overrides: str) -> dict:
    return nano(text, runs, "optimizer.lr=0.03", *VARIANTS[variant], *overrides)


def watched(cfg: dict) -> tuple[dict, list[str]]:
    watch = Ambush(at=-1)
    watch.set()
    return outcome(run(cfg)["folder"]), watch.log


def ambushed(cfg: dict, at: int, number: int = signal.SIGKILL, verbose: bool = False) -> dict:
    Ambush(at, lambda: os.kill(os.getpid(), number)).set()
    return run(cfg, verbose)


def killed_at(cfg: dict, moments: list[int], verbose: bool = False) -> int:
    """Kill sessions of a run at these moments, counted from each session's start; gives how many died of it."""
    ends = [Child(lambda at=at: ambushed(cfg, at, verbose=verbose)).wait() for at in moments]
    return ends.count(("killed", signal.SIGKILL))


@pytest.mark.process
def test_a_run_killed_in_an_evaluation_a_commit_or_at_its_end(reference, text, tmp_path):
    expected, log = reference("masks")
    commits = [i + 1 for i, name in enumerate(log) if name == "replace"]
    evaluations = [i + 1 for i, name in enumerate(log) if name == "batches"]
    for at in (evaluations[3], commits[2], len(log) - 2):
        cfg = configured("masks", text, tmp_path / str(at), RARELY)
        assert killed_at(cfg, [at]) == 1
        assert outcome(train(cfg)["folder"]) == expected


@pytest.mark.process
@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(reference, text, tmp_path):
    expected, _ = reference("masks")
    cfg = configured("masks", text, tmp_path)
    assert killed_at(cfg, [200, 21, 300, 20, 77]) >= 4
    record = train(cfg)
    assert outcome(record["folder"]) == expected
    assert record["sessions"] >= 3


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trial", range(4))
def test_random_kills(variant, trial, reference, text, tmp_path):
    """Half by moments of disk use, half by the clock."""
    rng = random.Random(f"{variant} {trial}")
    expected, _ = reference(variant)
    commit = rng.choice(["checkpoint.seconds=0", "checkpoint.seconds=0.02", "checkpoint.seconds=1000"])
    cfg = configured(variant, text, tmp_path, commit)
    kills = 0
    for _ in range(5):
        if rng.random() < 0.5:
            kills += killed_at(cfg, [rng.randint(1, 300)])
        else:
            child = Child(lambda: run(cfg)["status"])
            time.sleep(rng.uniform(0.05, 0.5))
            child.kill()
            kills += child.wait() == ("killed", signal.SIGKILL)
    record = train(cfg)
    assert outcome(record["folder"]) == expected
    print(f"{variant} {trial}: {kills} kills, {record['sessions']} sessions after the first commit, {commit}")


@pytest.mark.process
@pytest.mark.slow
def test_a_kill_at_every_moment_of_the_first_and_last_commits(reference, text, tmp_path):
    expected, log = reference("plain")
    for at in [*range(1, 75), *range(len(log) - 75, len(log) + 1)]:
        cfg = configured("plain", text, tmp_path / str(at), RARELY)
        assert killed_at(cfg, [at]) == 1
        assert outcome(train(cfg)["folder"]) == expected, at


@pytest.mark.process
@pytest.mark.slow
def test_resume_is_exact_with_two_threads(text, tmp_path):
    expected = outcome(train(configured("masks", text, tmp_path / "whole", "trainer.threads=2"))["folder"])
    cfg = configured("masks", text, tmp_path / "parts", "trainer.threads=2")
    assert killed_at(cfg, [200, 300, 77]) == 3
    assert outcome(train(cfg)["folder"]) == expected


@pytest.mark.process
def test_a_signal_stops_at_the_next_step_and_resumes_exactly(reference, text, tmp_path, capsys):
    expected, log = reference("masks")
    cfg = configured("masks", text, tmp_path)
    within = {signal.SIGINT: log.index("batches") + 1, signal.SIGTERM: 300}  # the first evaluation; a commit
    for number, at in within.items():
        record = forked(lambda at=at, number=number: ambushed(cfg, at, number))
        assert record["status"] == "stopped" and record["signal"] == number
        assert RunFolder(Path(record["folder"])).record()["status"] == "stopped"
        show_result(record)
        assert "not finite" not in capsys.readouterr().out  # what is not known yet is not a divergence
    assert record["summary"]["tokens"] > 0
    finished = train(cfg)
    assert outcome(finished["folder"]) == expected
    assert finished["signal"] is None and finished["sessions"] == 3


@pytest.mark.process
def test_a_signal_in_the_finalization_lets_it_end(reference, text, tmp_path):
    expected, log = reference("masks")
    record = forked(lambda: ambushed(configured("masks", text, tmp_path, RARELY), len(log) - 20, signal.SIGTERM))
    assert record["signal"] is None and outcome(record["folder"]) == expected


@pytest.mark.process
def test_a_second_signal_stops_at_once(reference, text, tmp_path):
    expected, _ = reference("masks")
    cfg = configured("masks", text, tmp_path)

    def work():
        def twice():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

        Ambush(300, twice).set()
        run(cfg)

    kind, error = Child(work).wait()
    assert kind == "error" and isinstance(error, SystemExit) and error.code == 130
    assert outcome(train(cfg)["folder"]) == expected


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["forked", pytest.param("started", marks=pytest.mark.slow)])
def test_a_signal_ends_the_command_with_its_exit_code(how, number, text, tmp_path, capfd):
    command = ["run.py", *arguments(text, tmp_path, "budget.tokens=16_000")]

    def work() -> int:
        if how == "started":
            os.execv(sys.executable, [sys.executable, str(Path(__file__).parents[2] / "run.py"), *command[1:]])
        sys.argv = command
        return main()

    child = Child(work)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/seed0/record.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill(number)
    assert child.wait() == ({"forked": "value", "started": "exited"}[how], 128 + number)
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    folder = next(tmp_path.glob("*/seed0"))
    assert out.splitlines()[-1] == str(folder)
    record = RunFolder(folder).record()
    assert record["status"] == "stopped" and record["progress"]["step"] < record["budget"]["steps"]


def plain(row, without):
    return {k: v for k, v in row.items() if k not in without}


@pytest.mark.process
def test_how_a_run_is_watched_may_change_between_its_sessions(reference, cut, text, tmp_path):
    expected, _ = reference("masks")
    cut(tmp_path)
    change = ("evaluation.every=700", "diagnostics.every=0", "trainer.threads=2")
    record = train(configured("masks", text, tmp_path, *change))
    result = outcome(record["folder"])
    assert result["weights"]["last.ckpt"] == expected["weights"]["last.ckpt"]
    own = ("logit_rms", "noise_scale", "grad_norm_clipped")  # seen where diagnostics look
    assert [plain(r, own) for r in result["rows"]["steps"]] == [plain(r, own) for r in expected["rows"]["steps"]]
    assert record["provenance"]["threads"] == 1
    evals = result["rows"]["evals"]
    assert len({(row["step"], row["split"]) for row in evals}) == len(evals)
    best = min((row["loss"], row["step"]) for row in evals if row["split"] == "validation")
    assert (record["summary"]["best_val_loss"], result["weights"]["best.ckpt"]["step"]) == best


@pytest.mark.process
def test_best_weights_belong_to_a_step_that_was_committed(text, tmp_path):
    """Killed after an evaluation that was the best, on the point of its commit: the third of these commits."""
    cfg = configured("plain", text, tmp_path, RARELY)

    def work():
        replace, seen = os.replace, []

        def last_time(source, target):
            seen.append(str(target))
            if sum(name.endswith("resume.ckpt") for name in seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = last_time
        run(cfg)

    assert Child(work).wait() == ("killed", signal.SIGKILL)
    checkpoints = next(tmp_path.glob("*/seed0")) / "checkpoints"
    assert not (checkpoints / "resume.ckpt").exists()
    assert load_checkpoint(checkpoints / "resume.previous.ckpt")["global_step"] == 11
    assert load_checkpoint(checkpoints / "best.ckpt")["step"] == 11


@pytest.mark.process
def test_the_evaluation_sample_of_an_unfinished_run_stays(cut, text, tmp_path):
    cut(tmp_path)
    with pytest.raises(ConfigError, match="evaluation.tokens=1024 is not allowed: this run began with 512"):
        train(configured("masks", text, tmp_path, "evaluation.tokens=1024"))


@pytest.mark.process
def test_a_damaged_checkpoint_makes_the_run_begin_again(text, tmp_path, capfd):
    (whole,) = (text.parent / "first").glob("*/seed0")
    spoilt = tmp_path / whole.parent.name / whole.name
    shutil.copytree(whole, spoilt)
    record = RunFolder(whole).record()
    RunFolder(spoilt).write({**record, "status": "running"})
    (spoilt / "checkpoints" / "resume.ckpt").write_bytes(b"torn")
    train(configured("plain", text, tmp_path))
    assert "resume.ckpt cannot be read" in capfd.readouterr().err
    assert outcome(spoilt) == outcome(whole)


@pytest.mark.process
def test_costs_add_up_over_sessions(text, tmp_path):
    cfg = configured("plain", text, tmp_path)
    first = forked(lambda: ambushed(cfg, 500, signal.SIGTERM))
    last = train(cfg)
    assert 0 < first["cost"]["seconds"] < last["cost"]["seconds"]
    assert 0 < first["cost"]["training_seconds"] < last["cost"]["training_seconds"] < last["cost"]["seconds"]
    assert first["cost"]["flops"] < last["cost"]["flops"] == last["budget"]["flops"]
    assert last["cost"]["tokens_per_second"] == pytest.approx(4096 / last["cost"]["training_seconds"])
    assert last["cost"]["peak_memory_bytes"] > 50e6


def damaged(content: bytes, how: str) -> bytes:
    half = len(content) // 2
    if how == "cut":
        return content[:half]
    if how == "zeroed":
        return content[:half] + bytes(len(content) - half)
    return content[:half] + bytes([content[half] ^ 16]) + content[half + 1 :]


QUICK = [("steps.arrows", "bit"), ("checkpoints/best.ckpt", "missing")]
DAMAGE = [
    (where, how)
    for where in ("checkpoints/resume.ckpt", "checkpoints/best.ckpt", *(f"{n}.arrows" for n in SCHEMAS))
    for how in ("bit", "cut", "zeroed", "missing")
]


@pytest.mark.process
@pytest.mark.parametrize("name, how", [pytest.param(*d, marks=[pytest.mark.slow] * (d not in QUICK)) for d in DAMAGE])
def test_a_damaged_commit_is_said_and_the_run_ends_the_same(name, how, reference, cut, text, tmp_path, capfd):
    expected, _ = reference("masks")
    cfg = configured("masks", text, tmp_path)
    cut(tmp_path)
    (file,) = tmp_path.glob(f"*/seed0/{name}")
    if name == "checkpoints/best.ckpt":
        best = load_checkpoint(file)["step"]
        assert 0 <= best < load_checkpoint(file.with_name("resume.ckpt"))["global_step"]
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(damaged(file.read_bytes(), how))
    assert outcome(train(cfg)["folder"]) == expected
    err = capfd.readouterr().err
    silent = how == "missing" and name == "checkpoints/resume.ckpt"  # as a run that was killed while it wrote it
    said = err.count("starts again from step 0") + err.count("resumes from its previous commit")
    assert silent or f"{file} cannot be read" in err and said == 1


@pytest.mark.process
def test_a_run_goes_on_from_the_commit_before_a_damaged_one(reference, text, tmp_path, capfd):
    expected, _ = reference("masks")
    cfg = configured("masks", text, tmp_path)
    assert killed_at(cfg, [400]) == 1
    (newest,) = tmp_path.glob("*/seed0/checkpoints/resume.ckpt")
    before = load_checkpoint(newest.with_name("resume.previous.ckpt"))["global_step"]
    assert 0 < before < load_checkpoint(newest)["global_step"]
    newest.write_bytes(damaged(newest.read_bytes(), "bit"))
    record = train(cfg)
    assert record["resumed_at"] == before and outcome(record["folder"]) == expected
    err = capfd.readouterr().err
    assert f"{newest} cannot be read" in err and f"resumes from its previous commit, at step {before}." in err
    assert not list(newest.parent.glob("*.previous.ckpt"))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("how", ["bit", "another run's"])
def test_a_run_without_a_whole_commit_begins_again(how, reference, text, tmp_path, capfd):
    expected, _ = reference("masks")
    cfg = configured("masks", text, tmp_path)
    other = configured("masks", text, tmp_path / "other", "seed=1")
    assert killed_at(cfg, [400]) == killed_at(other, [400]) == 1
    (newest,) = tmp_path.glob("*/seed0/checkpoints/resume.ckpt")
    (theirs,) = tmp_path.glob("other/*/seed1/checkpoints/resume.ckpt")
    for name in ("resume.ckpt", "resume.previous.ckpt"):
        file = newest.with_name(name)
        whole = file.read_bytes() if how == "bit" else theirs.with_name(name).read_bytes()
        file.write_bytes(damaged(whole, "bit") if how == "bit" else whole)
    record = train(cfg)
    assert record["resumed_at"] == 0 and outcome(record["folder"]) == expected
    err = capfd.readouterr().err
    assert err.count("cannot be read") == 2 and err.count(": the run starts again from step 0.") == 1
    assert how == "bit" or "that of another run" in err


def test_a_damaged_checkpoint_is_seen_wherever_a_bit_turns(tmp_path):
    """Either it is refused, or the bit is one that says nothing: of a zip file's padding."""
    import torch

    from albert_ablate.training.checkpoint import AtomicCheckpointIO

    file, value = tmp_path / "x.ckpt", torch.arange(8.0)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": value}, "step": 3}, file)
    whole, refused = file.read_bytes(), 0
    for at in range(0, len(whole), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            found = load_checkpoint(file)
        except Exception:
            refused += 1
        else:
            assert found["step"] == 3 and torch.equal(found["state_dict"]["w"], value), at
    assert refused > len(whole) // 5 // 5


def awkward() -> dict[str, list[str]]:
    """Settings that keep state of their own: all clipping rules, optimizers, norm types and more. Those with a + put
    several together, for the quick tests."""
    extra = {
        "schedule_free": ["schedule=constant"],
        **{name: ["dropout=uniform"] for name in options()["dropout_time"]},
    }
    found = {
        f"{group}={name}": [f"{group}={name}", *extra.get(name, [])]
        for group in ("clip", "optimizer", "norm_type", "dropout_time")
        for name in options()[group]
    }
    accumulated = ["dropout=uniform", "data.accumulate=2"]
    return found | {
        "r_drop": ["loss=r_drop", "dropout=uniform"],
        "qk_clip": ["attention.qk_clip=0.01", *accumulated],
        "sigma_reparam": ["++model.sigma_reparam=true"],
        "bpe": ["tokenizer=bpe", "tokenizer.vocabulary=300"],
        "many passes": ["data.train_size=700", "data.accumulate=4"],
        "64-true": ["trainer.precision=64-true", "optimizer=spam", "clip=autoclip"],
        "accumulation": ["data.accumulate=4", "dropout=uniform", "clip=skip_step"],  # which looks at the loss
        "ngpt": ["norm=ngpt", "attention=rotary", "optimizer.weight_decay=0"],  # renormalized after each step
        "admin_profiled": ["norm=admin_profiled"],  # which measures a pass before the first step
        "r_drop + qk_clip + accumulation + batch_norm + autoclip + spam": [
            *("loss=r_drop", "attention.qk_clip=0.01", *accumulated, "dropout_time=linear", "norm_type=batch_norm"),
            *("clip=autoclip", "optimizer=spam"),
        ],
        "sigma_reparam + bpe + passes + 64-true + adagc + sophia": [
            *("++model.sigma_reparam=true", "tokenizer=bpe", "tokenizer.vocabulary=300", "data.train_size=700"),
            *("trainer.precision=64-true", "clip=adagc", "optimizer=sophia"),
        ],
    }


AWKWARD = awkward()


@pytest.mark.process
@pytest.mark.parametrize("setting", [pytest.param(s, marks=[pytest.mark.slow] * ("+" not in s)) for s in AWKWARD])
def test_a_setting_with_state_of_its_own_resumes_exactly(setting, text, tmp_path):
    """Killed twice. The killed sessions and the last one estimate the cost before training; the whole one does not."""
    tokens, moments = ("2048", ((50, 110), (40, 90))) if "+" in setting else ("4096", ((100, 250), (60, 200)))
    usual = ["optimizer.lr=0.003", f"budget.tokens={tokens}"]
    given = dict(o.split("=", 1) for o in [*usual, *AWKWARD[setting]])
    overrides = [f"{key}={value}" for key, value in given.items()]
    expected = outcome(train(nano(text, tmp_path / "whole", *overrides))["folder"])
    cfg, rng = nano(text, tmp_path / "parts", *overrides), random.Random(setting)
    kills = killed_at(cfg, [rng.randint(*m) for m in moments], verbose=True)
    record = train(cfg, verbose=True)
    assert kills == 2 and record["sessions"] >= 2
    assert outcome(record["folder"]) == expected


CLASSIFYING = {
    "both": [],
    "probe": ["task.mode=probe"],
    "stateful": [
        *("norm_type=batch_norm", "dropout=uniform", "dropout_time=linear", "attention.qk_clip=0.01"),
        *("task.weights=last", "task.pool=last", "data.accumulate=2"),
    ],
}


def classifying(kind: str, text: Path, folder: Path, runs: str, *more: str) -> dict:
    """A fine-tuning of 24 steps and 3 evaluations on 120 made-up documents in `folder`, or a probe."""
    pytest.importorskip("sklearn", reason="pip install 'albert_ablate[classify]'")
    rng, words = random.Random(0), {"fish": "fin gill reef tide".split(), "bird": "wing nest sky egg".split()}
    lines = [f"{' '.join(rng.choices(words[k], k=6))},{k}" for k in rng.choices(["fish", "bird"], k=120)]
    (folder / "labels.csv").write_text("\n".join(["text,label", *dict.fromkeys(lines)]))
    task = ["task=classify", "task.data=file", "task.batch=8", f"task.path={folder / 'labels.csv'}"]
    if kind != "probe":  # which fine-tunes nothing
        task += ["task.documents=192", "task.evaluations=3"]
    usual = ["optimizer.lr=0.003", "budget.tokens=2048"]
    return nano(text, folder / runs, *task, *usual, *CLASSIFYING[kind], *more)


def ends(record: dict) -> list[dict]:
    """Of a classification run and of the language model that it builds on."""
    runs = Path(record["folder"]).parents[1]
    return [outcome(record["folder"]), outcome(runs / record["trunk"]["folder"])]


def struck(cfg: dict, owner, name: str, at: int) -> bool:
    """Whether a session was killed in the `at`-th call of a function."""

    def work() -> None:
        plain, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        setattr(owner, name, call)
        run(cfg)

    return Child(work).wait() == ("killed", signal.SIGKILL)


@pytest.mark.process
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "stateful")) for k in CLASSIFYING])
def test_a_killed_classification_ends_as_if_it_had_not_been(kind, text, tmp_path):
    """Killed in its language model, twice in fine-tuning, in an evaluation, in its baselines and at its end."""
    expected = ends(train(classifying(kind, text, tmp_path, "whole")))
    from albert_ablate.training import classification_recorder, classifier
    from albert_ablate.training.recorder import History

    cfg = classifying(kind, text, tmp_path, "parts")
    quick, steps = kind == "stateful", (classifier.ClassificationModule, "training_step")
    kills = quick or killed_at(cfg, [200]) == 1
    if kind != "probe":
        kills &= struck(cfg, *steps, 5)
        (unfinished,) = (r for r in map(read_record, tmp_path.glob("parts/*/seed0")) if "trunk" in r)
        assert unfinished["progress"]["step"] == 4
        kills &= quick or struck(cfg, *steps, 6) and struck(cfg, classification_recorder, "scores", 2)
    kills &= struck(cfg, classification_recorder, "baselines", 1) and struck(cfg, History, "finish", 2)
    assert kills
    record = train(cfg)
    assert record["resumed_at"] == (0 if kind == "probe" else 23)  # the last commit before training was over
    assert ends(record) == expected


def read_record(folder: Path) -> dict:
    record = RunFolder(folder).record()
    assert record is not None
    return record


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("trial", range(6))
def test_random_kills_of_a_classification(trial, text, tmp_path):
    """At moments of disk use, from the first commit of the fine-tuning on: its trunk is there."""
    rng = random.Random(f"classification {trial}")
    kind = rng.choice(["both", "stateful"])
    expected = ends(train(classifying(kind, text, tmp_path, "parts", RARELY)))
    for folder in (tmp_path / "parts").glob("*/seed0"):
        if "trunk" in read_record(folder):
            shutil.rmtree(folder)
    commit = rng.choice(["checkpoint.seconds=0", "checkpoint.seconds=1000"])
    cfg = classifying(kind, text, tmp_path, "parts", commit)
    kills = killed_at(cfg, [rng.randint(1, 90) for _ in range(5)])
    record = train(cfg)
    assert kills >= 3 and ends(record) == expected
    print(f"{kind} {trial}: {kills} kills, {record['sessions']} sessions after the first commit, {commit}")
