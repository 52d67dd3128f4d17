"""Memory and time to the first batch, from ten thousand to five million rows.

    python -m tests.stress.scale                 prints the table of results/scale.md

For each size it writes P3-format parquet files (10 configs of the training mixture, short random texts) to a temporary
folder, and reads them in a fresh process as `train.py` does: `benchmarks.load`, and 200 batches of 16.

There are two peaks. "Own" memory is what the process holds (RssAnon, sampled every 10 ms). The other one includes the
pages of memory-mapped files that it has touched; they belong to the system's file cache, which drops them when
something else needs the memory. The exit code is 1 if own memory grows by 200 MB or more, or a first batch takes more
than 30 s.

Linux only: memory is read from /proc.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from plumbing.errors import RunError, exit_on_user_error

SIZES = (10_000, 100_000, 1_000_000, 5_000_000)
CONFIGS = 10


def write_rows(folder: Path, rows: int, chunk: int = 10000):
    """Write `rows` rows over CONFIGS folders with one train.parquet each, a chunk at a time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarks.t0 import TRAIN

    rng = np.random.default_rng(0)
    for listed in [task for task in TRAIN if not task.choices][:CONFIGS]:
        path = folder / listed.config / "train.parquet"
        path.parent.mkdir(parents=True)
        schema = pa.schema([("inputs_pretokenized", pa.string()), ("targets_pretokenized", pa.string())])
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, rows // CONFIGS, chunk):
                numbers = range(start, min(start + chunk, rows // CONFIGS))
                lengths = rng.integers(5, 40, len(numbers))
                inputs = [f"row {n}: {'some words ' * k}" for n, k in zip(numbers, lengths, strict=True)]
                writer.write_table(pa.table([inputs, [f"answer {n}" for n in numbers]], schema=schema))


def own_memory() -> float:
    """The memory of this process without mapped files, in MB."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def watch(peak: list[float]):
    """Update peak[0], the largest own memory, forever."""
    while True:
        peak[0] = max(peak[0], own_memory())
        time.sleep(0.01)


def read_rows(folder: str):
    """In a fresh process: load, draw batches, print "rows seconds-to-first-batch own-MB all-MB"."""
    start, own = time.monotonic(), [0.0]
    threading.Thread(target=watch, args=(own,), daemon=True).start()
    import benchmarks.t0
    import data
    from benchmarks import load

    benchmarks.t0.TRAIN[:] = [task._replace(cap=10**9) for task in benchmarks.t0.TRAIN]  # no caps: all rows
    tasks = load("t0", folder, parts=("train",)).train
    batches = data.batches(tasks, batch_size=16, seed=0)
    next(batches)
    first = time.monotonic() - start
    for _ in range(199):
        next(batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    print(sum(len(task.train) for task in tasks), f"{first:.1f} {own[0]:.0f} {peak:.0f}")


def measure(sizes: tuple[int, ...]) -> bool:
    """Measure and print; returns whether memory and time are within the bounds. Raises RunError if reading fails."""
    measured = {"first": [], "later": []}  # (seconds to first batch, own memory in MB) of each size
    print("      rows   run  s to first batch  peak own MB  with mapped files MB")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "p3", size)
            environment = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache"}
            command = [sys.executable, "-m", "tests.stress.scale", "--read", folder]
            for run in ("first", "later"):  # the first one converts parquet to Arrow, later ones read its cache
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise RunError(f"reading {size:,} rows failed: {done.stderr.strip()[-500:]}")
                rows, seconds, own, everything = done.stdout.split()[-4:]
                print(f"{int(rows):>10,} {run:>5} {seconds:>17} {own:>12} {everything:>21}", flush=True)
                measured[run].append((float(seconds), float(own)))
    growth = {run: values[-1][1] - values[0][1] for run, values in measured.items()}
    print(f"own memory grows by {growth['first']:.0f} MB (first run), {growth['later']:.0f} MB (later runs)")
    return max(growth.values()) < 200 and max(s for values in measured.values() for s, _ in values) <= 30


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="sizes to measure")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").exists():
        parser.error("there is no /proc here to read the memory of a process from: run this on Linux")
    if not all(CONFIGS <= rows < 2**31 for rows in arguments.rows):
        parser.error(f"--rows must be at least {CONFIGS}, a row for each config, and below 2^31")
    if arguments.read:
        read_rows(arguments.read)
    else:
        sys.exit(not measure(tuple(arguments.rows)))


if __name__ == "__main__":
    exit_on_user_error(main)
