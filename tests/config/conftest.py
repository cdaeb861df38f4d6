"""What tests of conf folders of one's own share."""

import os
import sys

import pytest

from albert_ablate.config.folders import CONF


@pytest.fixture
def no_folders_named(monkeypatch):
    """No conf folder is named before, and none is left behind."""
    monkeypatch.delenv(CONF, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    os.environ.pop(CONF, None)
