"""Tests import the files of the repository's root, which is no package: put the root on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
