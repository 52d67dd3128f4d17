"""The machinery beside the papers' concepts: flags, errors, run folders, checkpoints, processes, backbones."""

import os

# Before torch is loaded, which every command does after this package. Threads that wait for each other spin, by GNU's
# default so long that a step takes many times its time beside another busy process (results/LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
