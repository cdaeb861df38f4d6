"""Studies: a sweep file run with no server, never redone and never lost; where its runs stand."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forking import Child, arguments, forked, nano, outcome, prepare, write_text
from hydra.core.plugins import Plugins
from published import published

from albert_ablate.cli import main
from albert_ablate.config import checked_config
from albert_ablate.records import keys
from albert_ablate.records.folder import RunFolder
from albert_ablate.studies import jobs
from albert_ablate.studies.launch import launch_folder, launcher_of
from albert_ablate.studies.planned_runs import plan
from albert_ablate.studies.states import INDEX, INDEX_WRITE_THRESHOLD, has_ended, is_held, run_folders, state
from albert_ablate.studies.status import arms, cell, read_states
from albert_ablate.studies.sweepfile import read_sweep
from albert_ablate.training.run import run

ROOT = Path(__file__).parents[2]
BASIC = "hydra/launcher=basic"  # in this process, one after the other


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def given(text):
    """Overrides of every run of a study. What each forked sweep would do anew is done here."""
    asked = arguments(text, text.parent, "budget.tokens=1536", "checkpoint.seconds=1000")
    given = [o for o in asked if not o.startswith("paths.runs")]
    Plugins.instance()
    for norm in ("pre_ln", "post_ln"):
        prepare(checked_config([f"norm={norm}", *given]))
    return given


def sweep_file(tmp_path, seeds="0, 1", norms="pre_ln, post_ln", more=""):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"method: grid\nparameters:\n  norm: {{values: [{norms}]}}\n  seed: {{values: [{seeds}]}}\n{more}"
        "command: [python, run.py, '${args_no_hyphens}']\n"
    )
    return file


def sweep(tmp_path, file, *overrides, before=lambda: None):
    """`albert-ablate sweep` in a forked child: its exit code."""

    def work():
        before()
        return main(["sweep", str(file), "--runs", str(tmp_path / "runs"), *overrides])

    return forked(work)


def folders(tmp_path):
    return sorted((tmp_path / "runs").glob("*/seed*"))


def statuses(tmp_path):
    return [state(f)["status"] for f in folders(tmp_path)]


@pytest.mark.process
def test_a_sweep_trains_what_is_missing_and_nothing_else(text, given, tmp_path, capfd):
    file = sweep_file(tmp_path)
    assert sweep(tmp_path, file, BASIC, *given, "--dry-run") == 0
    said = capfd.readouterr().out
    assert "4 runs, 0 done, 4 to do" in said and "norm=post_ln seed=1: pending" in said
    assert "4 runs have no time estimate" in said and not (tmp_path / "runs").exists()
    assert sweep(tmp_path, file, BASIC, *given) == 0
    said = capfd.readouterr().out
    assert "4 of 4 runs are done, 0 failed" in said and "norm=pre_ln seed=0: " in said
    first = {f: (f / "record.json").stat().st_mtime_ns for f in folders(tmp_path)}
    assert len(first) == 4 and len({f.parent for f in first}) == 2
    cfg = nano(text, tmp_path / "alone", "budget.tokens=1536", "norm=post_ln", "seed=1")
    alone = forked(lambda: run(cfg))
    twin = tmp_path / "runs" / Path(alone["folder"]).relative_to(tmp_path / "alone")
    assert outcome(twin) == outcome(alone["folder"])  # the run that run.py makes, and where it puts it
    file = sweep_file(tmp_path, seeds="0, 1, 7", norms="pre_ln, post_ln")
    assert sweep(tmp_path, file, BASIC, *given, "--dry-run") == 0
    said = capfd.readouterr().out
    assert "6 runs, 4 done, 2 to do" in said and "norm=post_ln seed=7: pending, about " in said and "workers." in said
    assert sweep(tmp_path, file, BASIC, *given) == 0
    assert len(folders(tmp_path)) == 6 and "2 to do" in capfd.readouterr().out
    assert all((f / "record.json").stat().st_mtime_ns == at for f, at in first.items())
    assert sweep(tmp_path, sweep_file(tmp_path, seeds="0"), BASIC, *given) == 0
    assert len(folders(tmp_path)) == 6  # what the file no longer names stays


@pytest.mark.process
def test_a_failing_run_does_not_sink_the_others(given, tmp_path, capfd):
    file = sweep_file(tmp_path, seeds="0", norms="post_ln, pre_ln")

    def broken():
        from albert_ablate.training.recorder import Recorder

        end = Recorder.on_train_batch_end

        def on_train_batch_end(self, *args):
            if self.record["choices"]["norm"] == "post_ln":
                raise ZeroDivisionError("of all things")
            end(self, *args)

        Recorder.on_train_batch_end = on_train_batch_end

    assert sweep(tmp_path, file, BASIC, *given, before=broken) == 1
    said = capfd.readouterr().out
    assert "failed: norm=post_ln seed=0: " in said and "1 of 2 runs are done, 1 failed" in said
    failed = [state(f) for f in folders(tmp_path) if state(f)["status"] == "failed"]
    assert len(failed) == 1 and all("ZeroDivisionError: of all things" in r["error"] for r in failed)
    assert said.count("\nnorm=post_ln seed=0: The run failed") == 3  # attempts
    assert sweep(tmp_path, file, BASIC, *given) == 0  # failed is an accident
    assert not any(s == "failed" for s in statuses(tmp_path))


@pytest.mark.process
def test_a_run_that_kills_its_process_is_tried_three_times(given, tmp_path, capfd):
    file = sweep_file(tmp_path, seeds="0", norms="post_ln, pre_ln")

    def deadly():
        from forking import fork_workers

        from albert_ablate.training.recorder import Recorder

        fork_workers()
        end = Recorder.on_train_batch_end

        def on_train_batch_end(self, *args):
            if self.record["choices"]["norm"] == "post_ln":
                with (tmp_path / "deaths").open("a") as deaths:
                    deaths.write("x")
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
            end(self, *args)

        Recorder.on_train_batch_end = on_train_batch_end

    assert sweep(tmp_path, file, BASIC, *given, before=deadly) == 1
    assert "failed: norm=post_ln seed=0: Its process was killed" in capfd.readouterr().out
    assert (tmp_path / "deaths").read_text() == "xxx"
    kinds = {r["choices"]["norm"]: r for r in map(state, folders(tmp_path))}
    assert kinds["post_ln"]["status"] == "failed" and "lack of memory" in kinds["post_ln"]["error"]
    assert kinds["pre_ln"]["status"] in ("finished", "diverged")
    assert sweep(tmp_path, file, BASIC, *given) == 0  # three more of the next command


@pytest.mark.process
def test_a_full_disk_is_a_sentence_and_the_sweep_goes_on(text, given, tmp_path, capfd):
    file = sweep_file(tmp_path, seeds="0")

    def full():
        import errno

        from albert_ablate.records import history

        written, plain = [], history.History._write

        def write(self, buffer):
            written.append(len(buffer))
            if sum(written) > 5_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            plain(self, buffer)

        history.History._write = write
        Path.write_text = limited(Path.write_text, lambda: sum(written) > 5_000)

    def limited(write, is_full):
        def write_text(self, *args, **kwargs):
            if is_full():
                raise OSError(28, "No space left on device")
            return write(self, *args, **kwargs)

        return write_text

    assert sweep(tmp_path, file, BASIC, *given, before=full) == 1
    said = capfd.readouterr()
    assert "The sweep cannot continue: " in said.err and "No space left on device" in said.err, said
    assert "Traceback" not in said.err
    assert sweep(tmp_path, file, BASIC, *given) == 0
    cfg = nano(text, tmp_path / "alone", "budget.tokens=1536", "norm=pre_ln", "seed=0")
    alone = forked(lambda: run(cfg))
    assert outcome(tmp_path / "runs" / Path(alone["folder"]).relative_to(tmp_path / "alone")) == outcome(
        alone["folder"]
    )


@pytest.mark.process
def test_a_stopped_sweep_goes_on_where_it_was(text, given, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    file = sweep_file(tmp_path)
    assert sweep(whole, file, BASIC, *given) == 0

    def stopped_at(step: int):
        from albert_ablate.training.recorder import Recorder

        end = Recorder.on_train_batch_end

        def on_train_batch_end(self, *args):
            end(self, *args)
            if self.step == step and self.record["seed"] == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        Recorder.on_train_batch_end = on_train_batch_end

    assert sweep(parts, file, BASIC, *given, before=lambda: stopped_at(9)) == 143
    assert sorted(statuses(parts)).count("stopped") == 1 and len(folders(parts)) == 3
    assert sweep(parts, file, BASIC, *given, before=lambda: stopped_at(0)) == 0
    assert [outcome(f) for f in folders(parts)] == [outcome(f) for f in folders(whole)]


@pytest.mark.process
def test_a_run_that_another_process_trains_is_left_to_it(text, given, tmp_path, capfd):
    file = sweep_file(tmp_path, seeds="0", norms="pre_ln")
    cfg = nano(text, tmp_path / "runs", "budget.tokens=1536", "norm=pre_ln", "trainer.threads=1")

    def slow():
        from albert_ablate.training.recorder import Recorder

        end = Recorder.on_train_batch_end

        def on_train_batch_end(self, *args):
            end(self, *args)
            time.sleep(0.1)

        Recorder.on_train_batch_end = on_train_batch_end
        return run(cfg)

    owner = Child(slow)
    while not any(f.joinpath("record.json").exists() for f in folders(tmp_path)):
        time.sleep(0.02)
    assert state(folders(tmp_path)[0])["status"] == "running"
    assert sweep(tmp_path, file, BASIC, *given) == 0
    kind, record = owner.wait()
    assert kind == "value" and record["sessions"] == 1 and record["status"] in ("finished", "diverged")
    assert "being trained by another process" in capfd.readouterr().out


@pytest.mark.process
def test_a_wrong_setting_is_said_before_training(given, tmp_path, capfd):
    file = sweep_file(tmp_path, norms="pre_ln, none", more="  norm_type: {value: rms_norm}\n")
    assert sweep(tmp_path, file, BASIC, *given) == 2
    error = capfd.readouterr().err
    assert "study.yaml: norm=none: norm_type=rms_norm would do nothing" in error and error.count("\n") == 1
    assert not folders(tmp_path)


@pytest.mark.process
def test_a_folder_that_cannot_be_written_to_is_the_users_mistake(given, tmp_path, capfd):
    (tmp_path / "runs").write_text("a file")
    assert sweep(tmp_path, sweep_file(tmp_path), BASIC, *given) == 2
    assert f"--runs={tmp_path}/runs cannot be written to: Not a directory" in capfd.readouterr().err


@pytest.mark.process
def test_a_job_hands_back_its_result_and_no_configuration(given, tmp_path):
    """A command keeps the results of a launch until its end: in its process, and as another process sends them."""
    planned = plan(read_sweep(sweep_file(tmp_path, seeds="0, 1, 2")), [{"seed": s} for s in range(3)], tmp_path, given)

    def work():
        with launch_folder(planned, [[0], [1], [2]]) as folder, launcher_of([BASIC], folder) as launcher:
            (folder / "closed").touch()  # nothing is trained
            found = launcher.launch([[] for _ in planned], initial_job_idx=0)
            return [r.return_value for r in found], [len(pickle.dumps(r)) for r in found], [r.cfg for r in found[1:]]

    results, sizes, kept = forked(work)
    assert results == [{}] * 3 and max(sizes) < 2_000 and kept == [None, None]


@pytest.mark.process
def test_the_launcher_failing_is_said_and_ends_the_sweep(given, tmp_path, capfd):
    def broken():
        from hydra._internal.core_plugins.basic_launcher import BasicLauncher

        def launch(self, *args, **kwargs):
            raise OSError("no cluster")

        BasicLauncher.launch = launch

    assert sweep(tmp_path, sweep_file(tmp_path), BASIC, *given, before=broken) == 1
    assert "The launcher failed 3 times: OSError: no cluster" in capfd.readouterr().err


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_worker_at_a_step(number, given, tmp_path):
    given = [o for o in given if not o.startswith("budget")] + ["budget.tokens=200_000"]
    file = sweep_file(tmp_path)
    command = [sys.executable, "-m", "albert_ablate.cli", "sweep", str(file), "--runs", str(tmp_path / "runs")]
    command += ["--workers", "2", *given]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while sum(state(f)["status"] == "running" for f in folders(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, number)  # as a terminal does; the workers leave it to the command
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "the same command continues" in out
    assert statuses(tmp_path) == ["stopped", "stopped"]


@pytest.mark.process
def test_a_worker_whose_command_was_killed_ends_with_its_run(monkeypatch):
    monkeypatch.setattr(jobs, "PARENT_CHECK_SECONDS", 0.01)
    reader, writer = os.pipe()

    def command():
        parent = os.getpid()
        if os.fork() == 0:
            jobs._training.set()

            def end():
                os.write(writer, b"x")
                jobs._training.clear()

            threading.Timer(0.3, end).start()
            jobs._exit_with_parent(parent)
        os.kill(parent, signal.SIGKILL)

    owner = Child(command)
    os.close(writer)
    assert os.read(reader, 1) == b"x"  # written when the worker's run ends, and not before it does
    assert os.read(reader, 1) == b""  # the last to have it open has ended
    assert owner.wait() == ("killed", signal.SIGKILL)


# --- status ----------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_the_table_shows_every_run_of_the_file(text, given, tmp_path, capfd):
    file = sweep_file(tmp_path)
    runs = tmp_path / "runs"
    cfg = nano(text, runs, "budget.tokens=1536", "norm=pre_ln", "seed=1")
    forked(lambda: run(cfg))
    settings = read_sweep(file)
    jobs = [{"overrides": [*given, "norm=post_ln"]}, {"overrides": ["norm=post"]}]
    found = keys._apart(jobs)  # as in a process without torch
    assert found == keys._computed(jobs) and found[0] and found[1] is None
    table = arms(read_states(runs), runs, settings, given)
    assert list(table) == ["norm=pre_ln", "norm=post_ln"] and list(table["norm=pre_ln"]) == [0, 1]
    kinds = {(arm, seed): r["status"] for arm, row in table.items() for seed, r in row.items()}
    assert kinds.pop(("norm=pre_ln", 1)) in ("finished", "diverged") and set(kinds.values()) == {"pending"}
    assert main(["status", str(runs), *given, "--sweep", str(file)]) == 0
    assert "4 runs: 1 " in capfd.readouterr().out
    assert main(["status", str(runs), *given, "--sweep", str(file), "--json"]) == 0
    listed = published(capfd.readouterr().out, "status")
    assert listed["sweep"] == str(file) and sum(listed["counts"].values()) == 4 and listed["counts"]["pending"] == 3
    assert {(r["arm"], r["seed"], r["folder"]) for r in listed["runs"] if r["folder"]} == {
        ("norm=pre_ln", 1, str(folders(tmp_path)[0]))
    }
    assert main(["status", str(runs), *given, "budget.tokens=1_536", "model.tied=false", "--sweep", str(file)]) == 0
    assert "4 runs: 1 " in capfd.readouterr().out  # of one key given twice the last counts, and false is the default
    assert main(["status", str(runs), "--sweep", str(file)]) == 0
    said = capfd.readouterr()
    assert "4 runs: 4 pending" in said.out and "the overrides that the sweep was run with" in said.err
    assert main(["status", str(runs), "budget.tokens=4096", "hydra/launcher=ray", "--sweep", str(file)]) == 0
    assert "4 runs: 4 pending" in capfd.readouterr().out  # that budget has no runs
    assert main(["status", str(runs), "budget.tokens=4096"]) == 2
    assert "budget.tokens=4096 has no effect without --sweep" in capfd.readouterr().err
    planned = forked(lambda: [(p.label, p.seed, p.folder) for p in plan(settings, settings.settings(), runs, given)])
    assert ("norm=pre_ln", 1, folders(tmp_path)[0]) in planned


@pytest.mark.process
def test_a_state_is_what_the_record_and_the_lock_say(tmp_path):
    folder = RunFolder(tmp_path / "abc" / "seed0")
    folder.create()
    assert state(folder.path) == {"status": "pending"}
    record = {"status": "running", "progress": {"step": 25, "steps": 100}}
    record["cost"] = {"tokens_per_second": 1234.5, "seconds": 10.0}
    folder.write(record)
    assert state(folder.path)["status"] == "orphaned" and not is_held(folder.path)
    reader, writer = os.pipe()

    def hold():
        with folder.lock():
            os.write(writer, b"x")
            time.sleep(60)

    owner = Child(hold)
    os.read(reader, 1)
    assert state(folder.path)["status"] == "running"
    assert cell(state(folder.path)) == "running 25%, 1,234 tok/s, 30 s left"
    owner.kill()
    owner.wait()
    assert cell(state(folder.path)) == "orphaned 25%"
    (folder.path / "record.json").write_text("{")
    assert state(folder.path)["status"] == "unreadable"


@pytest.mark.process
def test_status_reads_without_torch_and_says_why_runs_failed(tmp_path, capsys):
    for seed, status in enumerate(("finished", "failed")):
        folder = RunFolder(tmp_path / "abc" / f"seed{seed}")
        folder.create()
        record = {"status": status, "label": "norm=[odd]", "seed": seed, "summary": {"val_loss": 2.5}, "cost": {}}
        error = "Traceback\n  line\nOSError: disk full" if status == "failed" else None
        folder.write({**record, "error": error, "progress": {"step": 1, "steps": 2}})
    code = "import sys; sys.modules['torch'] = None; from albert_ablate.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "finished 2.5000" in done.stdout and "failed 50%" in done.stdout and "norm=[odd]" in done.stdout
    assert "OSError: disk full" in done.stdout and "2 runs: 1 failed, 1 finished" in done.stdout
    assert main(["status", str(tmp_path), "--json"]) == 0
    listed = published(capsys.readouterr().out, "status")
    assert listed["counts"] == {"failed": 1, "finished": 1}
    failed = next(r for r in listed["runs"] if r["status"] == "failed")
    assert (failed["error"], failed["step"], failed["steps"]) == ("OSError: disk full", 1, 2)
    assert main(["status", str(tmp_path), "--json", "--watch"]) == 2


def test_no_folder_of_runs_is_said(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "No run has started yet.\n"


def test_an_index_of_records_is_never_believed_over_them(tmp_path):
    def write(seed, status, **more):
        folder = RunFolder(tmp_path / "abc" / f"seed{seed}")
        folder.create()
        about = {"status": status, "label": "norm=x", "config": {"optimizer": {"lr": 0.5}}, "choices": {"norm": "x"}}
        folder.write({**about, "summary": {"val_loss": float(seed)}, "cost": {}, "proof": {"a": "b"}, **more})

    for seed in range(INDEX_WRITE_THRESHOLD):
        write(seed, "finished")
    first = read_states(tmp_path)
    assert (tmp_path / INDEX).exists() and len(first) == INDEX_WRITE_THRESHOLD
    assert first[3]["config"] == {"optimizer": {"lr": 0.5}} and first[3]["lr"] == 0.5 and "proof" not in first[3]
    assert read_states(tmp_path) == first
    write(3, "failed", error="OSError:\ttab\nline")
    write(INDEX_WRITE_THRESHOLD, "running")
    by = {Path(r["folder"]).name: r for r in read_states(tmp_path, configured=False)}
    assert by["seed3"]["status"] == "failed" and by["seed3"]["error"] == "OSError:\ttab\nline"
    assert by[f"seed{INDEX_WRITE_THRESHOLD}"]["status"] == "orphaned" and "config" not in by["seed3"]
    (tmp_path / "abc" / "seed5" / "record.json").unlink()
    assert {Path(r["folder"]).name: r["status"] for r in read_states(tmp_path)}["seed5"] == "pending"
    write(5, "finished")
    assert all(has_ended(f) == (f.name not in ("seed3", f"seed{INDEX_WRITE_THRESHOLD}")) for f in run_folders(tmp_path))
    (tmp_path / INDEX).write_text("1\ngarbage\nabc/seed1\t1 2 3")
    assert len(read_states(tmp_path)) == INDEX_WRITE_THRESHOLD + 1
