"""What a run folder, a record or a sweep file may name: the package's own components, and plug-ins the user has named.

Each target below would run code if it were called; none may even be imported.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from forking import forked, nano, train, write_text
from omegaconf import OmegaConf

from albert_ablate import build_model, cli
from albert_ablate.config import ConfigError, checked_config, conf_folder, construct, options, target_of
from albert_ablate.records.folder import DONE
from albert_ablate.training.generate import load_kept
from albert_ablate.training.run import run

MARK = "ran.txt"
TARGETS: dict[str, dict[str, Any]] = {
    "joblib": {"_target_": "joblib.load", "filename": "PICKLE"},
    "numpy": {"_target_": "numpy.load", "file": "PICKLE", "allow_pickle": True},
    "torch": {"_target_": "torch.load", "f": "PICKLE", "weights_only": False},
    "pandas": {"_target_": "pandas.read_pickle", "filepath_or_buffer": "PICKLE"},
    "pandas.eval": {"_target_": "pandas.eval", "expr": "@__import__('os').system('touch MARK')"},
    "shutil": {"_target_": "shutil.rmtree", "path": "VICTIM"},
    "runpy": {"_target_": "runpy.run_path", "path_name": "SCRIPT"},
    "eval": {"_target_": "builtins.eval", "_args_": ["open('MARK', 'w')"]},
    "subprocess.run": {"_target_": "subprocess.run", "args": ["touch", "MARK"]},
    "subprocess.getoutput": {"_target_": "subprocess.getoutput", "cmd": "touch MARK"},
    "hydra": {"_target_": "hydra.utils.get_method", "path": "os.system"},
    "os": {"_target_": "os.system", "command": "touch MARK"},
    "partial": {
        "_target_": "functools.partial",
        "_args_": [{"_target_": "hydra.utils.get_method", "path": "os.system"}],
    },
    "helper": {"_target_": "albert_ablate.records.atomic.replace_file", "path": "VICTIM/kept", "content": b"".decode()},
    "inside": {"_target_": "albert_ablate.config.importlib.import_module", "name": "antigravity"},
    "nothing": {"_target_": "os"},
}


class Touch:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.fixture
def traps(tmp_path) -> Path:
    """A pickle and a script that leave a mark, and a folder that is not to be removed."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "kept").write_text("kept")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Touch(str(tmp_path / MARK))))
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w')")
    return tmp_path


def aimed(node: Any, place: Path) -> Any:
    """A target's node with this place's files in it."""
    words = {"PICKLE": "trap.pkl", "SCRIPT": "trap.py", "VICTIM": "victim", "MARK": MARK}
    if isinstance(node, dict):
        return {k: aimed(v, place) for k, v in node.items()}
    if isinstance(node, list):
        return [aimed(v, place) for v in node]
    for word, name in words.items():
        node = node.replace(word, str(place / name)) if isinstance(node, str) else node
    return node


def unharmed(place: Path) -> bool:
    return not (place / MARK).exists() and (place / "victim" / "kept").read_text() == "kept"


def test_the_traps_would_work(traps):
    pickle.loads((traps / "trap.pkl").read_bytes())
    assert not unharmed(traps)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("done")
    text = write_text(place / "text.txt", 20_000)
    return Path(train(nano(text, place / "runs", "budget.tokens=1024"))["folder"])


def planted(done: Path, place: Path, node: Any, key: str = "dropout_time", status: str = "finished") -> Path:
    """A copy of the runs whose record's configuration names `node`."""
    if not done.is_relative_to(place):
        shutil.copytree(done.parent.parent, place / "runs", dirs_exist_ok=True)
    folder = place / "runs" / done.parent.name / done.name
    record = json.loads((folder / "record.json").read_text())
    record["config"][key] = node
    record.pop("checksums", None)  # as whoever forges a record would
    (folder / "record.json").write_text(json.dumps({**record, "status": status}))
    return folder


BUILDING = ("generate FOLDER --tokens 2", "evaluate FOLDER clean", "evaluate RUNS clean")
READING = ("show FOLDER", "status RUNS", "report RUNS", "sync RUNS --to tensorboard", "judge CLAIMS --runs RUNS")


@pytest.mark.process
@pytest.mark.parametrize("name", TARGETS)
def test_commands_that_build_refuse_foreign_targets(name, done, traps, capsys):
    folder = planted(done, traps, aimed(TARGETS[name], traps))
    for command in BUILDING:
        words = [str({"FOLDER": folder, "RUNS": traps / "runs"}.get(w, w)) for w in command.split()]
        assert cli.main(words) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and "is not a component of this package" in said and TARGETS[name]["_target_"] in said
    config = json.loads((folder / "record.json").read_text())["config"]
    for attempt in (lambda: load_kept(folder, "last"), lambda: build_model(config)):
        with pytest.raises(ConfigError, match="is not a component"):
            attempt()
    assert unharmed(traps)


CLAIMS = """
arms: {pre: [norm=pre_ln], post: [norm=post_ln]}
regimes: {small: {text: small, overrides: [model=nano]}}
claims:
  - name: pre_is_better
    statement: Pre-LN is better.
    parts: [{treatment: pre, control: post, measure: test_loss}]
    screen: {regime: small, N: 4}
"""


@pytest.mark.process
def test_commands_that_only_read_build_nothing(done, traps, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path_factory.mktemp("pages"))  # where show and report write theirs
    folder = planted(done, traps, aimed(TARGETS["joblib"], traps))
    for key, name in (("norm", "os"), ("logger", "torch"), ("model", "shutil")):
        planted(folder, traps, aimed(TARGETS[name], traps), key)
    claims = traps / "claims.yaml"
    claims.write_text(CLAIMS)
    for command in READING:
        words = {"FOLDER": folder, "RUNS": traps / "runs", "CLAIMS": claims}
        assert cli.main([str(words.get(w, w)) for w in command.split()]) in (0, 1, 2)
        assert "Traceback" not in capsys.readouterr().err
    assert unharmed(traps)


@pytest.mark.process
def test_an_unfinished_planted_run_uses_the_users_config(done, traps):
    cfg = nano(done.parent.parent.parent / "text.txt", traps / "runs", "budget.tokens=1024")
    planted(done, traps, aimed(TARGETS["joblib"], traps), status="stopped")
    assert forked(lambda: run(cfg))["status"] in DONE
    assert unharmed(traps)


@pytest.mark.process
def test_a_task_on_a_planted_trunk_uses_the_users_config(done, traps):
    pytest.importorskip("sklearn", reason="pip install 'albert_ablate[classify]'")
    rows = "".join(f"{word} {i},{word}\n" for i in range(60) for word in ("fish", "bird"))
    (traps / "labels.csv").write_text(f"text,label\n{rows}")
    planted(done, traps, aimed(TARGETS["joblib"], traps))
    task = "task=classify task.data=file task.documents=16 task.batch=8 task.evaluations=1 task.mode=finetune".split()
    text = done.parent.parent.parent / "text.txt"
    cfg = nano(text, traps / "runs", "budget.tokens=1024", *task, f"task.path={traps / 'labels.csv'}")
    assert forked(lambda: run(cfg))["status"] in DONE
    assert unharmed(traps)


@pytest.fixture(scope="module")
def checked() -> dict[str, Any]:
    return checked_config(["model=nano", "data=text_files", "data.path=x"])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("form", ["argument", "list", "logger", "evaluation", "partial"])
def test_no_place_in_a_configuration_takes_another_target(name, form, traps, checked):
    cfg = dict(checked)
    node = aimed(TARGETS[name], traps)
    if form == "argument":
        cfg["clip"] = {**cfg["clip"], "limit": node}
    elif form == "list":
        cfg["dropout"] = {"_target_": "albert_ablate.model.dropout.Uniform", "mean": 0.1, "sites": [node]}
    elif form == "logger":
        cfg["logger"] = {"one": node, "two": {"_target_": "albert_ablate.trackers.base.NoLogger"}}
    elif form == "evaluation":
        cfg["evaluation"] = {**cfg["evaluation"], "clean": node}
    else:
        cfg["norm"] = {**node, "_partial_": True}
    with pytest.raises(ConfigError) as refused:
        build_model(cfg)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 3000
    with pytest.raises(ConfigError, match="is not a component of this package"):  # where a value may be anything
        construct({"_target_": "albert_ablate.trackers.base.NoLogger", "x": [{"y": node}]})
    assert unharmed(traps)


@pytest.mark.process
def test_interpolations_in_a_folder_are_text(done, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", "secret")
    asked: list[str] = []
    OmegaConf.register_new_resolver("planted", lambda *a: asked.append("ran"), replace=True)
    for written in ("${oc.env:PLANTED}", "${planted:x}"):
        node = {"_target_": "albert_ablate.data.corpora.TextFiles", "path": written, "batch": 4}
        cfg = yaml.safe_load((done / "config.yaml").read_text())
        folder = planted(done, tmp_path, {**cfg["data"], **node}, "data")
        with pytest.raises(ConfigError) as refused:
            from albert_ablate.evaluations.evaluate import evaluate_run

            evaluate_run(folder, {"clean": {"_target_": "albert_ablate.evaluations.clean.Clean"}}, "last")
        assert "secret" not in str(refused.value) and not asked


@pytest.mark.process
def test_config_yaml_of_a_folder_is_for_people_alone(done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "kept")
    ask = ["generate", str(tmp_path / "kept"), "--tokens", "20", "--temperature", "0"]
    assert cli.main(ask) == 0
    said = capsys.readouterr().out
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for content in ("\n".join(lines), "dropout_time: {_target_: os.system}", ""):
        (tmp_path / "kept" / "config.yaml").write_text(content)
        assert cli.main(ask) == 0 and capsys.readouterr().out == said


# --- what may be built -----------------------------------------------------------------------------------------------


def test_every_shipped_option_may_be_built():
    for group, names in options().items():
        for name in names:
            text = (conf_folder() / group / f"{name}.yaml").read_text()
            for node in [yaml.safe_load(text), *(v for v in yaml.safe_load(text).values() if isinstance(v, dict))]:
                if "_target_" in node:
                    assert callable(target_of(node["_target_"]))


@pytest.mark.parametrize(
    "path",
    ["records.wandb.NoLogger", "records.wandb.Wandb", "records.tracker.NoLogger", "records.mlflow.MLflow"]
    + ["records.tensorboard.TensorBoard", "training.evaluations.clean.Clean", "model.pretrained.Pretrained"]
    + ["training.evaluations.domains.Domains", "training.evaluations.sharpness.Sharpness"],
)
def test_targets_of_old_records_still_resolve(path):
    assert target_of(f"albert_ablate.{path}").__name__ == path.rpartition(".")[2]


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_plugin.py").write_text(
        "from os import system\nfrom collections import OrderedDict\n"
        "class Mine:\n    def __init__(self, x: float = 1.0, inner: object = None):\n"
        "        self.x, self.inner = x, inner\n"
    )
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("ALBERT_ABLATE_TRUST", raising=False)
    sys.modules.pop("my_plugin", None)


@pytest.mark.parametrize("trust", ["my_plugin", "my_plugin.Mine", "other, my_plugin"])
def test_a_plug_in_is_built_where_the_user_has_named_it(trust, plugin, monkeypatch):
    node = {"_target_": "my_plugin.Mine", "x": 2, "inner": [{"_target_": "my_plugin.Mine", "x": 3}]}
    with pytest.raises(ConfigError, match="set ALBERT_ABLATE_TRUST to its module"):
        construct(node)
    assert "my_plugin" not in sys.modules  # not even imported
    monkeypatch.setenv("ALBERT_ABLATE_TRUST", trust)
    made = construct(node)
    assert (made.x, made.inner[0].x) == (2, 3)


@pytest.mark.parametrize("path", ["my_plugin.system", "my_plugin.OrderedDict", "my_pluginx.Mine", "my_plugin"])
def test_what_a_named_plug_in_imports_is_not_named_with_it(path, plugin, monkeypatch):
    monkeypatch.setenv("ALBERT_ABLATE_TRUST", "my_plugin")
    with pytest.raises(ConfigError):
        target_of(path)
    monkeypatch.setenv("ALBERT_ABLATE_TRUST", "my_plugin,collections.OrderedDict")
    assert target_of("my_plugin.OrderedDict").__name__ == "OrderedDict"


def test_a_plug_in_that_breaks_is_one_sentence(plugin, monkeypatch):
    monkeypatch.setenv("ALBERT_ABLATE_TRUST", "broken_plugin")
    said = r"^_target_=broken_plugin.X cannot be imported: division by zero \(broken_plugin.py, line 1\).$"
    with pytest.raises(ConfigError, match=said):
        target_of("broken_plugin.X")


@pytest.mark.parametrize("where", ["parameters", "command"])
def test_a_sweep_file_may_name_no_other_target(where, tmp_path, capsys):
    sweep = {"method": "grid", "parameters": {"seed": {"values": [0, 1]}}, "command": ["python", "run.py"]}
    sweep["metric"] = {"name": "val_loss", "goal": "minimize"}
    if where == "parameters":
        sweep["parameters"]["dropout_time._target_"] = {"value": "os.system"}  # type: ignore[index]
    else:
        sweep["command"] += ["dropout_time._target_=os.system"]  # type: ignore[operator]
    sweep["command"] += ["${args_no_hyphens}"]  # type: ignore[operator]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--runs", str(tmp_path / "runs"), "--dry-run"]) in (1, 2)
    captured = capsys.readouterr()
    assert (
        "is not a component of this package" in captured.err + captured.out
        or "not allowed from a sweep" in captured.err
    )
