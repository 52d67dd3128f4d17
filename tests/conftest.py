"""What all tests share: one thread, the default signal handlers, and nothing remembered from the test before."""

import signal

import datasets
import huggingface_hub
import pytest
import torch

from benchmarks.tables import say_once

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job and nohup ignore them, and so would
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # every child of the tests


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """Forget what `say_once` has printed, and whether `reach_hub` found the hub silent."""
    say_once.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
