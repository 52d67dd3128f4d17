"""Tests import the files of the repository's root, which is no package: put the root on the path."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny models: more threads only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job and nohup ignore them, and so would
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # every child of the tests


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """A test must not depend on those before it in its process: on what `data.say_once` has said, or on whether
    `data.reach_hub` found the hub silent."""
    import data
    from benchmarks.tables import say_once  # here: the path is set above

    say_once.cache_clear()
    monkeypatch.setattr(data.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data.datasets.config, "HF_HUB_OFFLINE", False)
