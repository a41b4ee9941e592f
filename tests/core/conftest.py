"""Fixtures that the tests of the command share."""
import pytest
from initialized import here, write_images

from ddinit import processes


@pytest.fixture
def in_process(monkeypatch):
    """Let the command do its work in this process, where nothing can abort."""
    monkeypatch.setattr(processes, "in_child", here)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A pattern for 24 images."""
    return write_images(str(tmp_path_factory.mktemp("images")), 24)
