"""The classes and options that docs/own_models.md shows are trained as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from forking import train, write_text

from albert_ablate import build_model
from albert_ablate.config import checked_config, folders_named

PAGE = (Path(__file__).parents[1] / "docs" / "own_models.md").read_text()


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The page's modules and its conf folder, as its reader writes them."""
    tiny, curve = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    model, task = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    files = {"my_models.py": tiny, "my_task.py": curve, "conf/model/tiny.yaml": model, "conf/task/curve.yaml": task}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with folders_named([Path("conf")]):
        yield tmp_path


def small(*words):
    given = ["budget.steps=6", "trainer=cpu", "trainer.threads=1", "evaluation.tokens=64", "paths.cache=cache"]
    return checked_config([*words, *given])


@pytest.mark.process
def test_the_model_of_the_page_is_trained(shown):
    text = write_text(shown / "text.txt")
    cfg = small("model=tiny", "model.context=16", "data=text_files", f"data.path={text}", "data.batch=4")
    tokens = torch.zeros(1, 16, dtype=torch.long)
    assert build_model(cfg)(tokens).shape == (1, 16, 256)
    record = train(cfg)
    assert record["status"] == "finished" and record["model"]["layers"] == 2
    assert "blocks.0.weight_ih_l0" in record["proof"]["initial_draws"]


@pytest.mark.process
def test_the_module_of_the_page_is_trained(shown):
    record = train(small("task=curve", "data.batch=32", "optimizer.lr=0.02"))
    assert record["status"] == "finished" and record["summary"]["test_loss"] is None
    assert record["budget"]["tokens"] == 6 * 32 and record["data"]["train_tokens"] == 1800
