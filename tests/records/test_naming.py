"""Names for people: what differs from the defaults; links by name; what W&B's environment says of a run."""

import os

import pytest

from albert_ablate import compose
from albert_ablate.config import checked_config
from albert_ablate.records.naming import display_name, link_by_name, name_of
from albert_ablate.trackers.wandb import Wandb


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "defaults"),
        (["seed=3", "trainer=cpu", "evaluation.tokens=512"], "defaults"),
        (["norm=post_ln", "model.layers=12"], "norm=post_ln model.layers=12"),
        (["norm=pre_ln", "optimizer.lr=0.01"], "optimizer.lr=0.01"),
        (["optimizer.betas=[0.8,0.9]", "budget.tokens=60_000"], "optimizer.betas=[0.8,0.9] budget.tokens=60000"),
        (["recipe=albert_agpt"], "recipe=albert_agpt"),
        (["recipe=albert_agpt", "clip=norm"], "recipe=albert_agpt clip=norm"),
        (["attention.qk_clip=1"], "attention.qk_clip=1"),
        (["data=text_files", "data.path=/some/where/t.txt"], "data=text_files data.path=t.txt"),
    ],
)
def test_a_run_is_named_by_what_differs_from_the_defaults(overrides, name):
    assert name_of(checked_config(overrides)) == name


def test_a_record_from_before_there_were_names_has_its_label():
    assert display_name({"label": "norm=post_ln", "seed": 1}) == "norm=post_ln seed=1"
    named = {"label": "norm=post_ln", "name": "norm=post_ln model.layers=2", "seed": 1}
    assert display_name(named) == "norm=post_ln model.layers=2 seed=1"


def test_links_by_name_lead_to_runs_and_are_not_counted(tmp_path):
    runs = tmp_path / "runs"
    for setting in ("aaa", "bbb"):  # one name, two settings: other text
        folder = runs / setting / "seed0"
        folder.mkdir(parents=True)
        for _ in range(2):  # trained, and gone on with
            link_by_name(folder, {"name": "norm=post_ln data.path=t.txt", "seed": 0})
    links = sorted(p.name for p in (runs / "by-name").iterdir())
    assert links == ["norm=post_ln,data.path=t.txt,seed=0", "norm=post_ln,data.path=t.txt,seed=0,bbb"]
    assert [(runs / "by-name" / n).resolve().parent.name for n in links] == ["aaa", "bbb"]
    assert len(list(runs.glob("*/seed*"))) == 2
    moved = runs.rename(tmp_path / "moved")
    assert (moved / "by-name" / links[0]).resolve() == (moved / "aaa" / "seed0").resolve()


def test_dead_links_are_replaced_and_strange_names_stay(tmp_path):
    first, second = tmp_path / "aaa" / "seed0", tmp_path / "bbb" / "seed0"
    first.mkdir(parents=True)
    link_by_name(first, {"name": "norm=../../x y", "seed": 0})
    (link,) = (tmp_path / "by-name").iterdir()
    assert link.parent == tmp_path / "by-name" and "/" not in link.name
    first.rmdir()
    second.mkdir(parents=True)
    link_by_name(second, {"name": "norm=../../x y", "seed": 0})
    assert [p.resolve() for p in (tmp_path / "by-name").iterdir()] == [second.resolve()]


def test_where_links_cannot_be_made_none_is(tmp_path):
    (tmp_path / "by-name").write_text("a file of this name")
    folder = tmp_path / "aaa" / "seed0"
    folder.mkdir(parents=True)
    link_by_name(folder, {"name": "x", "seed": 0})
    assert (tmp_path / "by-name").read_text() == "a file of this name"


def test_the_environment_counts_where_nothing_is_configured(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS"):
        monkeypatch.delenv(name, raising=False)
    none = Wandb()
    assert (none.project, none.name, none.group, none.tags) == ("albert_ablate", None, None, [])
    for name, value in {"PROJECT": "p", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a, b,"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    said = Wandb()
    assert (said.project, said.name, said.group, said.tags) == ("p", "n", "g", ["a", "b"])
    own = Wandb(project="mine", name="run", group="all", tags=("c",))
    assert (own.project, own.name, own.group, own.tags) == ("mine", "run", "all", ["c"])
    cfg = compose(["logger=wandb", "logger.tags=[x,y]", "logger.name=z", "logger.layers=true"])
    assert (cfg.logger.tags, cfg.logger.name, cfg.logger.layers) == (["x", "y"], "z", True) and os.environ["WANDB_NAME"]
