import subprocess

import pytest
import torch

from tests import fresh
from weft.backbones import reload

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def forked_processes():
    """What is loaded again to be verified is loaded by a process that is forked, not started: seconds each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reload, "subprocess", fresh.FORKED)
        yield


@pytest.fixture
def started_processes(monkeypatch):
    """Unless a test asks for the real thing."""
    monkeypatch.setattr(reload, "subprocess", subprocess)
