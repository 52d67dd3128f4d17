"""Long runs: does the memory of the process, the number of its open files or its log grow with the steps?

    python -m tests.stress.longrun --steps 20000          both runs; the tables are for the results

Trains Poly with the tiny backbone and batches of 4 by `train.py`, each run in a process of its own: on `strings`, which
is in memory, and a quarter of the steps on the bundled sample of t0, which is memory-mapped. Every 20 ms it looks at
the process from outside: its memory in use (resident), its open files, and its log, which says the step. A row is made
at every --every steps; its memory is the least since the row before, for what is above that is given back. The first
half of a run sees pools that fill up. In the second half memory may grow by --allowed bytes a step (the median of the
slopes between any two rows) and no file may stay open. The log may have LINE bytes for each of its lines, one every
--log-every steps. The exit code is 1 if anything grows.

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


def watched(command: list[str], log: Path, every: int, cwd: Path = ROOT) -> list[tuple[int, int, int, int, float]]:
    """Run a command; after each `every` steps (step, least resident bytes since the row before, open files, bytes of
    log, seconds). A row is printed as soon as it is there. Exits if the command fails."""
    begin, rows, least = time.monotonic(), [], math.inf
    child = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = Path("/proc") / str(child.pid)
    while child.poll() is None:
        time.sleep(0.02)
        try:
            step, size = last_step(log)
            least, files = min(least, resident(process)), len(os.listdir(process / "fd"))
        except (OSError, IndexError):  # it has just ended
            continue
        if step // every > (rows[-1][0] // every if rows else 0):
            rows.append((step, least, files, size, time.monotonic() - begin))
            least = math.inf
            print("step {:,}  {:,} bytes  {} files  log {:,}  {:.0f} s".format(*rows[-1]), flush=True)
    if child.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {child.returncode}: {child.stderr.read().strip()[-500:]}")
    return rows


def slope(rows: list[tuple]) -> float:
    """Bytes of memory a step: the median over all pairs of rows, which one jump, up or down, does not move."""
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(rows, 2))


def verdict(rows: list[tuple], allowed: float, log_every: int) -> tuple[str, bool]:
    """The line under a table, and whether all is well. allowed: bytes of memory a step in the second half."""
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
    """The command line of a run."""
    flags = f"--method poly --dataset {dataset} --steps {steps} --batch-size 4 --eval-examples 0 --device cpu "
    flags += f"--backbone tiny --log-every {log_every} --save-every 1m --output-dir {folder}/run"
    flags += f" --data-dir {SAMPLE} --max-input 32 --max-output 8" if dataset == "t0" else ""
    return [sys.executable, "train.py", *flags.split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="on strings; on t0 a quarter")
    parser.add_argument("--every", type=int, default=0, help="steps between two rows; 0: a twentieth of a run's steps")
    parser.add_argument("--log-every", type=int, default=50, help="as train.py; a row is made at a line of the log")
    parser.add_argument("--allowed", type=float, default=500.0, help="bytes of memory a step that are no fault")
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
    table = [(dataset, "least memory, MB", "open files", "log, bytes", "seconds")]
    table += [(f"{s:,}", f"{m / 1e6:.1f}", str(f), f"{n:,}", f"{t:.0f}") for s, m, f, n, t in rows]
    return aligned(table, left=0)


if __name__ == "__main__":
    exit_on_user_error(main)
