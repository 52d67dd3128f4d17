"""Long runs: does the memory of the process, the number of its open files or its log grow with the steps?

    python -m tests.stress.longrun --steps 20000          two runs; prints the tables of the results page

Runs train.py (Poly, the tiny backbone, batches of 4) on `strings`, whose examples are in memory, then for a quarter of
the steps on the bundled sample of t0, whose examples are memory-mapped. It watches each process from outside: every
20 ms it reads the resident memory, the number of open files, and the log, which tells the step. Every --every steps it
makes a row, with the least of both since the row before: what exceeds that is given back.

In the first half of a run pools fill up. In the second half memory may grow by --allowed bytes a step (the median slope
over all pairs of rows) and no file may stay open. The log may have LINE bytes for each of its lines. The exit code is 1
if anything grows.

Linux only: memory and files are read from /proc.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plumbing.errors import exit_on_user_error
from plumbing.tables import aligned

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "assets" / "samples" / "t0"
LINE = 200  # bytes


def resident(process: Path) -> int:
    """Memory in use, bytes. process: its folder in /proc."""
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def last_step(log: Path) -> tuple[int, int]:
    """(step of the last whole line of a log, bytes of the log); (0, 0) before there is one."""
    if not log.exists():
        return 0, 0
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1000))
        lines = file.read().split(b"\n")[:-1]
    return (json.loads(lines[-1])["step"], size) if lines else (0, 0)


def watched(command: list[str], log: Path, every: int) -> list[tuple[int, int, int, int, float]]:
    """Run a command; for each `every` steps (step, resident bytes, open files, bytes of log, seconds). Of bytes and
    files it is the least since the row before. Prints each row at once. Ends the program if the command fails."""
    start, rows, memory, files = time.monotonic(), [], [], []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a tiny model: more threads only wait for each other
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors) as child,
    ):
        process = Path("/proc") / str(child.pid)
        while child.poll() is None:
            time.sleep(0.02)
            step, size = last_step(log)
            try:
                now = resident(process), len(os.listdir(process / "fd"))
            except OSError:  # it has just ended
                continue
            if not step or not now[0]:  # it is still loading, or has just ended
                continue
            memory.append(now[0])
            files.append(now[1])
            if step // every > (rows[-1][0] // every if rows else 0):
                rows.append((step, min(memory), min(files), size, time.monotonic() - start))
                memory, files = [], []
                print("step {:,}  {:,} bytes  {} files  log {:,}  {:.0f} s".format(*rows[-1]), flush=True)
        if child.returncode:
            errors.seek(0)
            reason = errors.read().strip()[-500:]
            sys.exit(f"error: {' '.join(command)} ended with {child.returncode}: {reason}")
    return rows


def slope(rows: list[tuple]) -> float:
    """Bytes of memory a step: the median over all pairs of rows, which a single jump does not change."""
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(rows, 2))


def verdict(rows: list[tuple], allowed: float, log_every: int) -> tuple[str, bool]:
    """The line under a table, and whether nothing grows. allowed: bytes of memory a step in the second half."""
    half = [row for row in rows if row[0] >= rows[-1][0] / 2]
    first, last = half[0], half[-1]
    growth, files, line = slope(half), last[2] - first[2], last[3] / (last[0] // log_every or 1)
    good = growth <= allowed and files <= 0 and line <= LINE
    text = (
        f"steps {first[0]:,} to {last[0]:,}: memory {growth:+,.0f} bytes a step (allowed {allowed:g}), in all "
        f"{(last[1] - first[1]) / 1e6:+.1f} MB, open files {files:+d}; log {last[3] / last[0]:.1f} bytes a step, "
        f"{line:.0f} a line (allowed {LINE}): {'flat' if good else 'IT GROWS'}"
    )
    return text, good


def command_of(dataset: str, steps: int, log_every: int, folder: str) -> list[str]:
    """The command of a run with the run folder `folder`/run."""
    flags = f"--method poly --dataset {dataset} --steps {steps} --batch-size 4 --eval-examples 0 --device cpu "
    flags += f"--backbone tiny --log-every {log_every} --save-every 1m --output-dir {folder}/run"
    flags += f" --data-dir {SAMPLE} --max-input 32 --max-output 8" if dataset == "t0" else ""
    return [sys.executable, "train.py", *flags.split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="on strings; on t0 a quarter")
    parser.add_argument("--every", type=int, default=0, help="steps between two rows; 0: a twentieth of a run's steps")
    parser.add_argument("--log-every", type=int, default=50, help="as for train.py; only log lines make rows")
    parser.add_argument("--allowed", type=float, default=500.0, help="growth of memory in bytes a step")
    args = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        parser.error("there is no /proc here to read the memory of a process from: run this on Linux")
    if not 80 <= args.steps < 2**31 or not 0 <= 4 * 4 * args.every <= args.steps:
        parser.error("--steps must be from 80 to 2^31, and a quarter of it at least four times --every, not below 0")
    if not 0 < args.log_every <= args.steps // 16 or not 0 <= args.allowed < math.inf:
        parser.error("--log-every must be from 1 to a sixteenth of --steps, --allowed a number of bytes from 0 on")
    good, texts = True, []
    for dataset, steps in (("strings", args.steps), ("t0", args.steps // 4)):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
            command = command_of(dataset, steps, args.log_every, folder)
            rows = watched(command, Path(folder) / "run" / "log.jsonl", args.every or steps // 20)
        if len(rows) < 4:
            sys.exit(f"error: the run on {dataset} was over after {len(rows)} rows: give more --steps")
        text, flat = verdict(rows, args.allowed, args.log_every)
        texts += [report(dataset, rows), text]
        good &= flat
    print("", *texts, sep="\n")
    sys.exit(not good)


def report(dataset: str, rows: list[tuple]) -> str:
    """The table of a run."""
    table = [(dataset, "least memory, MB", "open files", "log, bytes", "seconds")]
    table += [(f"{s:,}", f"{m / 1e6:.1f}", str(f), f"{n:,}", f"{t:.0f}") for s, m, f, n, t in rows]
    return aligned(table, left=0)


if __name__ == "__main__":
    exit_on_user_error(main)
