"""Long runs: does the memory of the process, the number of its open files or its log grow with the steps?

    python -m experiments.longrun --steps 20000          both runs; the tables are for the results

Trains Poly with the tiny backbone and batches of 4, as `train.py` does, each run in a process of its own: on `strings`,
which is in memory, and a quarter of the steps on the bundled sample of t0, which is memory-mapped. Every 10 steps it
looks at the memory that the process has in use (resident). What counts of --every steps is the least of it, for what is
above that is given back. The first half of a run sees pools that fill up. In the second half memory may grow by
--allowed bytes a step (the median of the slopes between any two rows) and no file may stay open. The log may have LINE
bytes for each of its lines, one every --log-every steps. The exit code is 1 if anything grows.

Linux only: memory and files are read from /proc.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from config import exit_on_user_error

PROC = Path("/proc/self")
SAMPLE = Path(__file__).resolve().parents[1] / "assets" / "samples" / "t0"
LINE = 200  # bytes


def resident() -> int:
    """Memory in use, bytes."""
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir(PROC / "fd"))


def sampled(flags: dict, every: int, look_every: int = 10) -> list[tuple[int, int, int, int, float]]:
    """Run train.main(flags); after each `every` steps (step, least resident bytes since the row before, open files,
    bytes of log, seconds). A row is printed as soon as it is there."""
    import train

    log, begin, rows, seen = Path(flags["output_dir"]) / "log.jsonl", time.monotonic(), [], []
    real, step = train.refuse_nonfinite, 0

    def look(*args):
        """In the place of what the loop calls once a step."""
        nonlocal step
        real(*args)
        step += 1
        if step % look_every == 0 or step % every == 0:
            seen.append(resident())
        if step % every == 0:
            rows.append((step, min(seen), open_files(), log.stat().st_size, time.monotonic() - begin))
            seen.clear()
            print("step {:,}  {:,} bytes  {} files  log {:,}  {:.0f} s".format(*rows[-1]), flush=True)

    train.refuse_nonfinite = look
    try:
        train.main(flags)
    finally:
        train.refuse_nonfinite = real
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


def settings(dataset: str, steps: int, log_every: int) -> dict:
    """The flags of a run."""
    flags = dict(
        method="poly", dataset=dataset, steps=steps, batch_size=4, eval_examples=0, device="cpu", backbone="tiny",
        log_every=log_every, save_every="1m",
    )  # fmt: skip
    return flags | (dict(data_dir=str(SAMPLE), max_input=32, max_output=8) if dataset == "t0" else {})


def run(flags: dict, every: int, rows):
    """In a process of its own: `sampled`, the rows being sent."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"  # before datasets is imported
        rows.send(sampled(flags | dict(output_dir=f"{folder}/run"), every))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="on strings; on t0 a quarter")
    parser.add_argument("--every", type=int, default=0, help="steps between two rows; 0: a twentieth of a run's steps")
    parser.add_argument("--log-every", type=int, default=50, help="as train.py")
    parser.add_argument("--allowed", type=float, default=500.0, help="bytes of memory a step that are no fault")
    args = parser.parse_args()
    if not (PROC / "statm").exists():
        parser.error("there is no /proc here to read the memory of a process from: run this on Linux")
    if not 80 <= args.steps < 2**31 or not 0 <= 4 * 4 * args.every <= args.steps:
        parser.error("--steps must be from 80 to 2^31, and a quarter of it at least four times --every, not below 0")
    if not 0 < args.log_every <= args.steps // 4 or not 0 <= args.allowed < math.inf:
        parser.error("--log-every must be from 1 to a quarter of --steps, --allowed a number of bytes from 0 on")
    context, good, texts = multiprocessing.get_context("spawn"), True, []
    for dataset, steps in (("strings", args.steps), ("t0", args.steps // 4)):
        ours, theirs = context.Pipe()
        flags = settings(dataset, steps, args.log_every)
        process = context.Process(target=exit_on_user_error, args=(run, flags, args.every or steps // 20, theirs))
        process.start()
        theirs.close()
        try:
            rows = ours.recv()
        except EOFError:
            process.join()
            sys.exit(f"error: the run on {dataset} ended with {process.exitcode}")
        process.join()
        texts.append(report(dataset, rows))
        text, flat = verdict(rows, args.allowed, args.log_every)
        texts.append(text)
        good &= flat
    print("", *texts, sep="\n")
    sys.exit(not good)


def report(dataset: str, rows: list[tuple]) -> str:
    from evaluate import aligned

    table = [(dataset, "least memory, MB", "open files", "log, bytes", "seconds")]
    table += [(f"{s:,}", f"{m / 1e6:.1f}", str(f), f"{n:,}", f"{t:.0f}") for s, m, f, n, t in rows]
    return aligned(table, left=0)


if __name__ == "__main__":
    exit_on_user_error(main)
