"""Hashes of the source of components: what they see, what they do not, and that they are part of who a run is."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from forking import nano, train

from albert_ablate import cli
from albert_ablate.config import (
    COMPONENTS,
    SIGNIFICANT,
    ConfigError,
    changed_code,
    check,
    checked_config,
    code,
    codes,
    identity,
    keys_of,
    option_files,
    read_yaml,
    refuse_changed_code,
    refuse_changed_own_code,
    target_of,
    to_container,
    unlike_code,
)
from albert_ablate.config.folders import folders_named
from albert_ablate.records import store
from albert_ablate.studies.launch import Study
from albert_ablate.studies.planned_runs import Planned
from albert_ablate.training.run import run

pytestmark = pytest.mark.usefixtures("no_folders_named")
PACKAGE = Path(code.__file__).parents[1]
MODULE = '''"""Placements."""
from albert_ablate.model.placements import PreLN, Site
import NAME_helper
from NAME_package.inner import factor  # of the branch


class Halved(PreLN):
    """x + scale f(N(x))."""

    def __init__(self, site: Site, /, scale: float = 0.5):
        """With a scale."""
        super().__init__(site)
        self.scale = scale * factor()

    def forward(self, x, f):
        return x + self.scale * f(self.norm(x))
'''


@pytest.fixture
def own(tmp_path, request):
    """A folder with an option and the local modules that its module imports, all of a name that no other test has."""
    name, place = f"code_{abs(hash(request.node.nodeid))}", tmp_path / "own"
    (place / f"{name}_package").mkdir(parents=True)
    (place / "conf" / "norm").mkdir(parents=True)
    (place / f"{name}.py").write_text(MODULE.replace("NAME", name))
    (place / f"{name}_helper.py").write_text("import torch\nUSED = 1\n")
    (place / f"{name}_package" / "__init__.py").write_text("")
    (place / f"{name}_package" / "inner.py").write_text("from .deep import factor\n")
    (place / f"{name}_package" / "deep.py").write_text("def factor():\n    return 1.0\n")
    (place / f"{name}_unrelated.py").write_text("x = 1\n")
    (place / "conf" / "norm" / "halved.yaml").write_text(f"_target_: {name}.Halved\n_partial_: true\nscale: 0.5\n")
    with folders_named([place / "conf"]):
        yield place


def named(own):
    return next(p.stem for p in own.glob("*.py") if p.stem.count("_") == 1)


def again(own):
    """As a process that is started anew sees it."""
    name = named(own)
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]
    importlib.invalidate_caches()
    code._first.clear()
    code._tree.cache_clear()
    from albert_ablate.config import components

    components._imported.cache_clear()
    components._parameters.cache_clear()
    return checked_config(["norm=halved", "model=nano"])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def who(cfg):
    return identity(cfg, "text"), keys_of(cfg), codes(cfg)["norm"]


def test_comments_layout_and_docstrings_are_no_code(own):
    before, file = who(again(own)), own / f"{named(own)}.py"
    edit(file, "  # of the branch", "  # of every branch")
    edit(file, '"""x + scale f(N(x))."""', '"""Another text,\n    on two lines."""')
    edit(file, '        """With a scale."""\n', "")
    edit(file, "return x + self.scale * f(self.norm(x))", "return (\n            x + self.scale * f(self.norm(x)))")
    (own / f"{named(own)}_unrelated.py").write_text("x = 2\n")
    assert who(again(own)) == before


EDITS = {
    "the class": ("NAME.py", "x + self.scale", "x - self.scale"),
    "a default": ("NAME.py", "scale: float = 0.5", "scale: float = 0.6"),
    "a helper": ("NAME_helper.py", "USED = 1", "USED = 2"),
    "a module behind a package": ("NAME_package/deep.py", "1.0", "2.0"),
    "the package": ("NAME_package/__init__.py", "", "import math\n"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_of_ones_own_code_is_another_run(what, own):
    before = who(again(own))
    file, old, new = EDITS[what]
    edit(own / file.replace("NAME", named(own)), old, new)
    after = who(again(own))
    assert all(x != y for x, y in zip(before, after, strict=True))
    assert before[0].arm != after[0].arm and before[1].arm != after[1].arm
    plain = keys_of(again(own), with_code=False)
    assert plain.arm not in (before[1].arm, after[1].arm)


def test_weights_of_other_own_code_are_not_loaded(own):
    cfg = again(own)
    record = {"config": to_container(cfg), "code": codes(cfg)}
    refuse_changed_own_code("runs/x", record)
    refuse_changed_own_code("runs/x", {**record, "code": {**codes(cfg), "clip": "another"}})  # of the package
    edit(own / f"{named(own)}.py", "x + self.scale", "x - self.scale")
    again(own)
    with pytest.raises(ConfigError, match=r"^runs/x was made by other code, the source of norm \(\w+.Halved\) has"):
        refuse_changed_own_code("runs/x", record)


def test_settings_of_the_package_have_no_code_in_their_identity(own):
    again(own)
    for overrides in ([], ["norm=rezero"], ["optimizer=muon", "clip=zclip"]):
        cfg = checked_config([*overrides, "model=nano"])
        assert keys_of(cfg) == keys_of(cfg, with_code=False) and set(codes(cfg)) >= {"norm", "optimizer", "model"}


def test_source_that_changed_since_its_import_is_refused(own):
    cfg = again(own)
    edit(own / f"{named(own)}.py", "x + self.scale", "x - self.scale")
    with pytest.raises(ConfigError, match=f"{named(own)}.py has changed since it was imported here: start the command"):
        identity(cfg, "text")
    edit(own / f"{named(own)}.py", "x - self.scale", "x +  self.scale")  # back again
    assert identity(cfg, "text") == identity(again(own), "text")


def test_a_library_counts_by_its_module_and_its_version(monkeypatch):
    target = "torch.optim.adamw.AdamW"
    assert code.local_files("torch.optim.adamw") == [Path(sys.modules["torch.optim.adamw"].__file__)]
    before = code.code_of(target)
    code._first.clear()
    monkeypatch.setattr(code, "_release", lambda package: f"{package} 0.0")
    assert code.code_of(target) != before
    code._first.clear()


# --- the package's own -----------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the package that the hashes are taken of, to be edited."""
    shutil.copytree(PACKAGE, tmp_path / "albert_ablate", ignore=shutil.ignore_patterns("__pycache__"))

    def module_file(name):
        place = tmp_path.joinpath(*name.split("."))
        return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)

    def clear():
        for cached in (code._of_package, code._definitions, code._tree):
            cached.cache_clear()

    monkeypatch.setattr(code, "module_file", module_file)
    clear()
    yield lambda: clear() or tmp_path / "albert_ablate"
    clear()


REACHED = [
    ("model/placements/pre.py", "return x + f(self.norm(x))", "return f(self.norm(x))", {"norm"}),
    ("model/placements/base.py", "return usual * self.gain(role)", "return usual", {"norm", "model", "attention"}),
    ("optim/optimizers.py", "betas=_pair(betas), fused=fused", "betas=_pair(betas)", {"optimizer"}),
    ("optim/schedules.py", "1 - math.sqrt(u)", "1 - u", set()),  # of another schedule
    ("optim/adaptive.py", "import math", "import math\nX = 1", set()),
    ("config/errors.py", "one sentence", "a sentence", set()),
    ("model/norms.py", '"""(x - mean(x))', '"""(x - its mean)', set()),
    ("streams.py", "MASK = (1 << 63) - 1", "MASK = (1 << 62) - 1", {"model", "attention", "data"}),
]


@pytest.mark.parametrize(("file", "old", "new", "groups"), REACHED, ids=[f"{f}:{o}" for f, o, *_ in REACHED])
def test_an_edit_of_the_package_concerns_what_reaches_it(file, old, new, groups, copied):
    cfg = checked_config(["model=nano"])
    copied()
    before = codes(cfg)
    edit(copied() / file, old, new)
    after = codes(cfg)
    changed = {group for group in before if before[group] != after[group]}
    assert changed == groups or file == "streams.py" and "model" in changed


def test_every_component_of_the_package_has_a_code():
    empty = code.digest(size=6)
    for group in set(COMPONENTS) & set(SIGNIFICANT):
        for name, file in option_files()[group].items():
            target = read_yaml(file)["_target_"]
            assert code.code_of(target) != empty, (group, name)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from forking import write_text

    place = tmp_path_factory.mktemp("done")
    cfg = nano(write_text(place / "text.txt", 20_000), place / "runs", "budget.tokens=1024")
    return cfg, Path(train(cfg)["folder"])


def made_by_other_code(folder, **changes):
    """The record as another source would have written it; gives what is to be written back."""
    content = store.read(folder).content
    store.write(folder, {**content, "code": {**content["code"], **changes}})
    return content


@pytest.mark.process
def test_a_run_that_other_code_made_is_not_silently_found(done):
    cfg, folder = done
    assert run(cfg)["found"] and set(store.read(folder).code) >= {"norm", "model", "optimizer", "clip", "data"}
    kept = made_by_other_code(folder, norm="another", clip="another")
    said = "was made by other code, the source of norm=pre_ln and clip=norm has changed since: force=true trains it"
    try:
        with pytest.raises(ConfigError, match=said):
            run(cfg)
        assert run({**cfg, "accept_code": True})["found"]
        assert train({**cfg, "force": True})["reproduction"] == "reproduced"  # other code, the same weights
        assert run(cfg)["found"]
    finally:
        store.write(folder, kept)


@pytest.mark.process
def test_a_study_does_not_count_a_run_of_other_code(done):
    cfg, folder = done
    planned = Planned("norm=pre_ln", 0, (), folder, "arm", check(cfg))
    assert Study([], 1).complete([planned]) == {}
    kept = made_by_other_code(folder, norm="another")
    try:
        with pytest.raises(ConfigError, match="the source of norm=pre_ln has changed since: force=true"):
            Study([], 1).complete([planned])
        accepted = Planned("norm=pre_ln", 0, (), folder, "arm", check({**cfg, "accept_code": True}))
        assert Study([], 1).complete([accepted]) == {}
    finally:
        store.write(folder, kept)


@pytest.mark.process
def test_a_record_that_names_no_code_is_found_as_before(done):
    cfg, folder = done
    kept = store.read(folder).content
    older = {key: value for key, value in kept.items() if key != "code"}
    try:
        store.write(folder, older)
        assert run(cfg)["found"] and not changed_code(store.read(folder), cfg)
    finally:
        store.write(folder, kept)


def test_an_unfinished_run_of_other_code_is_not_gone_on_with():
    cfg = checked_config(["model=nano"])
    record = {"code": {**codes(cfg), "optimizer": "another"}}
    with pytest.raises(ConfigError, match="^runs/x was begun by other code, the source of optimizer=adamw has changed"):
        refuse_changed_code("runs/x", record, cfg, begun=True)
    refuse_changed_code("runs/x", record, check({**cfg, "accept_code": True}), begun=True)


def test_only_one_component_of_two_sources_is_unlike():
    norm = {"_target_": "a.B"}
    a = {"config": {"norm": norm}, "code": {"norm": "1"}}
    assert unlike_code(a, {**a, "code": {"norm": "2"}}) == ["norm"]
    assert not unlike_code(a, a) and not unlike_code(a, {**a, "code": {}})
    assert not unlike_code(a, {"config": {"norm": {"_target_": "a.C"}}, "code": {"norm": "2"}})
    again = {"verdict": "reproduced", "code": {"norm": "1"}}
    assert not unlike_code(a, {**a, "code": {"norm": "2"}, "reproductions": [again]})
    assert unlike_code(a, {**a, "code": {"norm": "2"}, "reproductions": [{**again, "verdict": "differs"}]})


def test_a_class_is_hashed_as_it_was_imported(own):
    cfg = again(own)
    assert code._first[named(own)][0] == code.code_of(cfg.norm._target_)
    assert target_of(cfg.norm._target_).__name__ == "Halved" and cli.main(["methods", "norm"]) == 0
