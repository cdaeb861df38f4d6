"""Sweeps of a W&B server: `wandb agent` and `albert-ablate agent` do what `albert-ablate sweep` does with the file.

The clients are the real ones, the server is a stand-in on loopback.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from forking import forked, outcome
from wandb_server import Server

from albert_ablate.analysis.wandb_reader import _row
from albert_ablate.cli import main
from albert_ablate.config import ConfigError
from albert_ablate.studies.states import state
from albert_ablate.studies.wandb_agent.agent import _setting
from albert_ablate.studies.wandb_agent.server import SweepGone, SweepServer, Unreachable

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "sweeps" / "smoke.yaml"
KEY = "secret0123456789" * 3  # 40 characters at least, or the client refuses it
COMMAND = ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]


def sweep_of(command=COMMAND, method="grid", **parameters):
    """A sweep of tiny runs: `data__symbols=[8]` stands for data.symbols with these values."""
    tree = yaml.safe_load(SMOKE.read_text())
    fixed = {k: v for k, v in tree["parameters"].items() if "value" in v} | {"budget.tokens": {"value": 4096}}
    varied = {k.replace("__", "."): {"values": v} for k, v in parameters.items()}
    return {"program": "run.py", "method": method, "parameters": fixed | varied, "command": command}


def environment(tmp_path, url):
    (tmp_path / "home").mkdir(exist_ok=True)
    own = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    told = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}:{own['PATH']}"  # `${interpreter}` is the word python
    return {**own, **told, "PATH": path, "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}


def enter(variables):
    """Make them this process's environment: nothing of the machine's own W&B settings is left."""
    os.environ.clear()
    os.environ.update(variables)


def place(tmp_path, name):
    """A working folder as a user has it: run.py, and runs below it."""
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    if not (folder / "run.py").exists():
        (folder / "run.py").symlink_to(ROOT / "run.py")
    return folder


def start(command, folder, tmp_path, url, **more):
    return subprocess.Popen(
        command, cwd=folder, env=environment(tmp_path, url), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, **more,
    )  # fmt: skip


def call(command, folder, tmp_path, url, code=0):
    process = start(command, folder, tmp_path, url)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == code, said
    return said


def agent(sweep, *options):
    return [sys.executable, "-m", "albert_ablate.cli", "agent", f"e/proj/{sweep}", *options]


def records(folder):
    """What the runs below a folder are, by their place."""
    found = sorted((folder / "runs").glob("*/seed*"))
    return {str(f.relative_to(folder)): outcome(f) for f in found}


def sent(server):
    """What the server has got, by a run's identity."""
    out = {}
    for run in server.runs.values():
        config, summary = json.loads(run["config"]), json.loads(run["summary"])
        kept = {k: v for k, v in summary.items() if k in ("val_loss", "status", "train_loss", "best_val_loss", "gap")}
        rows = [{k: v for k, v in r.items() if "loss" in k or k in ("tokens", "_step")} for r in run["history"]]
        out[config["identity"]["value"]] = (kept, rows, run["exit"], config["setting"]["value"])
    return out


# --- the server's words ----------------------------------------------------------------------------------------------


def test_what_the_server_says_is_taken_or_said_in_a_sentence():
    with Server() as stand_in:
        name = stand_in.add_sweep({"program": "run.py", "parameters": {"seed": {"values": [3, 4]}}})
        server = SweepServer(stand_in.url, KEY, "e", "proj", name)
        assert KEY not in repr(server)
        assert server.config()["parameters"] == {"seed": {"values": [3, 4]}}
        first, second = server.register(), server.register()
        given = [server.heartbeat(a, [])[0] for a in (first, second)]
        assert [(c["type"], c["args"]) for c in given] == [("run", {"seed": {"value": n}}) for n in (3, 4)]
        assert server.heartbeat(first, [given[0]["run_id"]]) == []
        stand_in.sweeps[name]["stop"].add(given[0]["run_id"])
        assert server.heartbeat(first, [given[0]["run_id"]])[0]["type"] == "stop"
        assert server.heartbeat(first, [])[0]["type"] == "exit"
        with pytest.raises(ConfigError, match="has no sweep e/proj/nothing"):
            SweepServer(stand_in.url, KEY, "e", "proj", "nothing").config()
        del stand_in.sweeps[name]
        with pytest.raises(SweepGone, match=f"no longer has e/proj/{name}"):
            server.heartbeat(first, [])
        stand_in.mode = "refuse"
        with pytest.raises(ConfigError, match="refuses e/proj/.*: status 403, permission denied"):
            server.config()
        for mode in ("null", "gone"):
            stand_in.mode = mode
            with pytest.raises(Unreachable):
                server.heartbeat(first, [])
    with pytest.raises(Unreachable):
        server.config()


def test_arguments_that_are_none_are_said_to_be():
    assert _setting({"seed": {"value": 3}, "norm": {"value": "pre_ln"}}) == {"seed": 3, "norm": "pre_ln"}
    for arguments in (None, [], "seed", {"seed": 3}, {"seed": [3]}):
        with pytest.raises(ConfigError, match="its arguments cannot be read"):
            _setting(arguments)


DENIED = [
    (sweep_of(norm___target_=["os.system"]), "'norm._target_=os.system' is not allowed from a sweep"),
    (sweep_of(paths__runs=["/tmp/x"]), "paths.runs is set by the user"),
    (sweep_of(data__path=["/etc/passwd"]), "data.path is set by the user"),
    (sweep_of(seed=["${oc.env:HOME}"]), "is not allowed from a sweep"),
    (sweep_of(dropout__sites=[["a", ["b"]]]), "dropout.sites=['b'] is not allowed"),
    (sweep_of(**{f"x{i}": [*range(100)] for i in range(20)}), "x0=49 is unknown"),  # 10^40 settings
    (sweep_of(seed=["[" + ", " * 300]), "is not allowed from a sweep"),
    (sweep_of(norm=["pre_ln", "nothing"]), "norm=nothing is not an option"),
    (sweep_of(model__nothing=[1]), "model.nothing=1 is unknown"),
    (sweep_of(optimizer__lr=[-1.0]), "optimizer.lr=-1.0 is not allowed"),
    (sweep_of([*COMMAND, "paths.runs=/tmp/x"]), "paths.runs is set by the user"),
    (sweep_of([*COMMAND, "norm=${oc.env:HOME}"]), "is not supported"),
    (sweep_of(["rm", "-r", "${args_no_hyphens}"]), "it must be a list with run.py"),
    (sweep_of() | {"program": "train.py"}, "program=train.py is not allowed"),
    (sweep_of() | {"method": "hyperband"}, "method=hyperband is not allowed"),
]


@pytest.mark.process
def test_a_sweep_that_decides_too_much_is_refused_before_any_run(tmp_path, capfd):
    def work(url):
        enter(environment(tmp_path, url))
        os.chdir(place(tmp_path, "here"))
        return [main(["agent", f"e/proj/sweep{i}", "--workers", "1"]) for i in range(len(DENIED))]

    with Server() as server:
        for tree, _ in DENIED:
            server.add_sweep(tree, [])
        assert forked(lambda: work(server.url)) == [2] * len(DENIED)
        assert not [r for r in server.requests if "CreateAgent" in r or "Heartbeat" in r] and not server.runs
    said = capfd.readouterr().err.splitlines()
    for line, (_, words) in zip([x for x in said if x.startswith("e/proj/")], DENIED, strict=True):
        assert words in line
    assert [f.name for f in place(tmp_path, "here").iterdir()] == ["run.py"]


@pytest.mark.process
def test_without_a_key_a_project_or_a_server_a_sentence_says_so(tmp_path, capfd):
    def work(key, *names, **more):
        def inner():
            enter(environment(tmp_path, "http://127.0.0.1:9") | {"WANDB_API_KEY": key} | more)
            os.chdir(tmp_path)
            return [main(["agent", name]) for name in names]

        return forked(inner), capfd.readouterr().err.splitlines()

    codes, said = work("", "e/p/s")
    assert codes == [2] and "W&B has no key" in said[-1]
    codes, said = work(KEY, "e/p/s", WANDB_MODE="offline")
    assert codes == [2] and "WANDB_MODE=offline" in said[-1]
    codes, said = work(KEY, "s", "a/b/c/d", "e/p/s")
    assert codes == [2, 2, 1] and "s needs its project" in said[-3] and "a/b/c/d does not name a sweep" in said[-2]
    assert "http://127.0.0.1:9 does not answer" in said[-1]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.slow
def test_the_agent_trains_its_runs_and_survives_a_refused_one(tmp_path):
    """The first draw holds two values that do not go together."""
    draws = [{"norm": "none", "norm_type": "rms_norm"}, {"norm": "pre_ln"}]
    tree = sweep_of(
        method="random", dropout=["uniform"], dropout__mean=[0.1], dropout__sites=[["embedding", "residual"]]
    )
    base = {k: p.get("value", p.get("values", [None])[0]) for k, p in tree["parameters"].items()}
    with Server() as server:
        name = server.add_sweep(tree, [base | {"seed": 1} | d for d in draws])
        folder = place(tmp_path, "here")
        said = call(agent(name, "--workers", "1"), folder, tmp_path, server.url, code=1)
        refused, told = (server.runs[f"{name}run{i}"] for i in range(2))
    (run,) = records(folder)
    record = state(folder / run)
    assert "norm_type=rms_norm would do nothing" in said
    assert f"e/proj/{name}: 1 {record['status']}, 1 failed." in said and not refused["history"]
    config = json.loads(told["config"])
    assert config["identity"]["value"] == record["identity"] and told["exit"] == 0 and told["sweep"] == name
    assert config["norm"]["value"] == "pre_ln" and "PreLN" in str(config["norm_settings"])
    assert json.loads(told["summary"])["val_loss"] == pytest.approx(record["summary"]["val_loss"])
    read = _row("", told["name"], "", "finished", {k: v["value"] for k, v in config.items()}, {})
    assert (read["norm"], read["optimizer.lr"], read["model.width"]) == ("pre_ln", 0.01, 32)
    assert len(told["history"]) == record["progress"]["steps"] + 1
    assert not [f for f in folder.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


@pytest.mark.process
@pytest.mark.slow
def test_the_smoke_sweep_ends_alike_in_all_three_ways(tmp_path):
    with Server() as server:
        here = place(tmp_path, "sweep")
        command = [sys.executable, "-m", "albert_ablate.cli", "sweep", str(SMOKE), "--workers", "2"]
        call(command, here, tmp_path, server.url)
        expected = records(here)
        assert len(expected) == 4 and not server.runs

        there = place(tmp_path, "wandb")
        said = call(["wandb", "sweep", "-p", "proj", str(SMOKE)], there, tmp_path, server.url)
        assert "sweep0" in said
        call(["wandb", "agent", "e/proj/sweep0"], there, tmp_path, server.url)
        assert records(there) == expected
        theirs = sent(server)
        assert {run["sweep"] for run in server.runs.values()} == {"sweep0"} and len(theirs) == 4

        server.runs.clear()
        warm = place(tmp_path, "warm")
        call(["wandb", "sweep", "-p", "proj", str(SMOKE)], warm, tmp_path, server.url)
        call(agent("sweep1", "--workers", "2"), warm, tmp_path, server.url)
        assert records(warm) == expected
        assert sent(server) == theirs

        server.runs.clear()  # runs that are there already: the server sees the same
        server.add_sweep(server.sweeps["sweep0"]["config"])
        server.add_sweep(server.sweeps["sweep0"]["config"])
        call(["wandb", "agent", "--count", "2", "e/proj/sweep2"], here, tmp_path, server.url)
        call(agent("sweep3", "--count", "2", "--workers", "1"), here, tmp_path, server.url)
        assert len(server.runs) == 4 and all(kept == theirs[who] for who, kept in sent(server).items())
        assert all(state(here / run)["sessions"] == 1 for run in records(here))


@pytest.mark.process
@pytest.mark.slow
def test_wandbs_own_agent_gives_the_same_name_and_result(tmp_path):
    """`wandb.agent(ID, function)`, as in a notebook."""
    code = (
        "import albert_ablate, wandb\n"
        "from albert_ablate.studies.sweepfile import overrides_of\n"
        "from albert_ablate.training.swept import run_swept\n"
        "from albert_ablate.trackers.wandb import swept_keys\n"
        "import os, yaml\n"
        "def function():\n"
        "    given = yaml.safe_load(open(os.environ['WANDB_SWEEP_PARAM_PATH']))\n"
        "    given = {k: v['value'] for k, v in given.items() if k != 'wandb_version'}\n"
        "    run_swept(albert_ablate.compose([*overrides_of(given), 'logger=wandb']))\n"
        "wandb.agent('e/proj/sweep0', function, count=1)\n"
    )
    with Server() as server:
        server.add_sweep(sweep_of(seed=[0]))
        folder = place(tmp_path, "here")
        call([sys.executable, "-c", code], folder, tmp_path, server.url)
        (run,) = server.runs.values()
    assert run["name"] == "sweep0run0" and run["exit"] == 0 and run["history"]
    assert json.loads(run["config"])["identity"]["value"] == state(folder / next(iter(records(folder))))["identity"]


@pytest.mark.process
@pytest.mark.slow
def test_run_py_under_wandb_agent_refuses_server_paths(tmp_path):
    with Server() as server:
        server.add_sweep(sweep_of(norm=["pre_ln"], paths__runs=[str(tmp_path / "stolen")]))
        server.add_sweep(sweep_of(seed=["${oc.env:WANDB_API_KEY}"]))
        server.add_sweep(sweep_of(norm___target_=["os.system"]))
        folder = place(tmp_path, "here")
        for name in server.sweeps:
            said = call(["wandb", "agent", "--count", "1", f"e/proj/{name}"], folder, tmp_path, server.url)
            assert "is not allowed from a sweep" in said and KEY not in said
        assert not [run for run in server.runs.values() if run["history"]]
    assert not (folder / "runs").exists() and not (tmp_path / "stolen").exists()


def until(found, process, seconds=200):
    """Wait for what `found` gives."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.2)
    return value


def running(folder):
    found = (folder / "runs").glob("*/seed*")
    return [f for f in found if state(f)["status"] == "running" and state(f)["progress"]["step"] > 0]


LONG = {"budget.tokens": {"value": 400_000}, "checkpoint.seconds": {"value": 0.2}}


def long_sweep(**parameters):
    tree = sweep_of(**parameters)
    return tree | {"parameters": tree["parameters"] | LONG}


@pytest.mark.process
@pytest.mark.slow
def test_a_signal_stops_the_agent_and_the_same_command_goes_on(tmp_path):
    with Server() as server:
        name = server.add_sweep(long_sweep(seed=[0]))
        folder = place(tmp_path, "here")
        process = start(agent(name, "--workers", "2"), folder, tmp_path, server.url)
        until(lambda: running(folder), process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 130 and "the same command continues" in said and "Traceback" not in said
        (run,) = (folder / "runs").glob("*/seed*")
        assert state(run)["status"] == "stopped"
        (told,) = server.runs.values()
        assert told["preempting"] and told["exit"] == 143
        call(agent(name, "--workers", "1"), folder, tmp_path, server.url)
        assert (state(run)["status"], state(run)["sessions"], told["exit"]) == ("finished", 2, 0)
        steps = [r["_step"] for r in told["history"]]
        assert steps == list(range(len(steps))) and len(server.runs) == 1


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_run_is_recorded_and_a_lost_server_awaited(tmp_path):
    with Server() as server:
        name = server.add_sweep(long_sweep(seed=[0, 1]))
        folder = place(tmp_path, "here")
        process = start(agent(name, "--workers", "1"), folder, tmp_path, server.url)
        (run,) = until(lambda: running(folder), process)
        os.kill(int((run / "lock").read_text().split()[1]), signal.SIGKILL)
        until(lambda: state(run)["status"] == "failed", process)
        assert "Its process was killed, often for lack of memory" in state(run)["error"]
        (other,) = until(lambda: running(folder), process)
        server.mode = "gone"
        time.sleep(8)
        server.mode = "well"
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 1 and f"e/proj/{name}: 1 failed, 1 finished" in said
        assert said.count("does not answer") == 1 and said.count("answers again") == 1
        assert state(other)["status"] == "finished" and state(run)["proof"]["initial_draws"] is not None
        server.add_sweep(server.sweeps[name]["config"])
        call(agent("sweep1", "--workers", "2"), folder, tmp_path, server.url)  # failed is an accident
        assert state(run)["status"] == "finished" and state(other)["sessions"] == 1


@pytest.mark.process
@pytest.mark.slow
def test_a_run_out_of_memory_is_recorded_with_the_reason(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (20 << 30, 20 << 30))

    with Server() as server:
        name = server.add_sweep(sweep_of(model__width=[32_768, 32], model__layers=[4]))
        folder = place(tmp_path, "here")
        process = start(agent(name, "--workers", "1"), folder, tmp_path, server.url, preexec_fn=limit)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 1 and "1 failed" in said
    found = {state(f)["config"]["model"]["width"]: state(f) for f in (folder / "runs").glob("*/seed*")}
    assert found[32]["status"] in ("finished", "diverged")
    assert found[32_768]["status"] == "failed" and "memory" in found[32_768]["error"]
