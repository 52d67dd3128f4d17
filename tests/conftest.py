"""What all tests share: no GPU, one thread, the default signal handlers, nothing remembered from the test before."""

import functools
import os
import signal
import subprocess
import sys

HIDDEN = "GPUS_HIDDEN_FROM_TESTS"  # what CUDA_VISIBLE_DEVICES was; a variable, for the workers of pytest-xdist
os.environ.setdefault(HIDDEN, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: tests run on the CPU, but for those marked cuda
os.environ["OMP_NUM_THREADS"] = "1"  # also for processes that tests start: threads that wait for a core spin

import datasets
import huggingface_hub
import pytest
import torch

from plumbing.errors import say_once

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job and nohup ignore them, and so would
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # every child of the tests


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """Forget what `say_once` has printed, and whether `reach_hub` found the hub silent."""
    say_once.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def gpu() -> dict[str, str]:
    """The environment for processes of a test marked cuda: there the GPU can be seen. Skips the test without one."""
    if not gpu_there():
        pytest.skip("there is no CUDA GPU here")
    return gpu_environment()


def gpu_environment() -> dict[str, str]:
    """The environment as it was before this file hid the GPUs."""
    environment = {name: value for name, value in os.environ.items() if name not in (HIDDEN, "CUDA_VISIBLE_DEVICES")}
    before = os.environ[HIDDEN]
    return environment if before == "all" else environment | {"CUDA_VISIBLE_DEVICES": before}


@functools.cache
def gpu_there() -> bool:
    """Whether another process, with that environment, sees a GPU."""
    if torch.version.cuda is None:  # torch cannot see one: asking takes seconds
        return False
    code = "import torch; print(torch.cuda.is_available())"
    asked = [sys.executable, "-c", code]
    return subprocess.run(asked, env=gpu_environment(), capture_output=True, text=True).stdout.strip() == "True"
