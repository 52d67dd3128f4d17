"""Tests import the files of the repository's root, which is no package: put the root on the path."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny models: more threads only wait for each other
