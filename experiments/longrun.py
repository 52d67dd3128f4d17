"""A long run: does the memory of the process, the number of its open files or its log grow with the steps?

    python -m experiments.longrun --steps 20000          some 20 minutes on one core; the table is for the results

Trains Poly on `strings` with the tiny backbone and batches of 4, as `train.py` does, in this process, and looks every
1,000 steps at the memory that the process has in use (resident), at its open files and at log.jsonl. The first looks
see pools that fill up; growth is therefore counted from a tenth of the steps on. The exit code is 1 if memory grew by
more than --allowed-mb, or any file stayed open.

Linux only: memory and files are read from /proc.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

PROC = Path("/proc/self")


def resident() -> int:
    """Memory in use, bytes."""
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir(PROC / "fd"))


def sampled(flags: dict, every: int) -> list[tuple[int, int, int, int, float]]:
    """Run train.main(flags); after each `every` steps (step, resident bytes, open files, bytes of log, seconds)."""
    import train

    log, begin, rows = Path(flags["output_dir"]) / "log.jsonl", time.monotonic(), []
    real, step = train.refuse_nonfinite, 0

    def look(*args):
        """In the place of what the loop calls once a step."""
        nonlocal step
        real(*args)
        step += 1
        if step % every == 0:
            rows.append((step, resident(), open_files(), log.stat().st_size, time.monotonic() - begin))

    train.refuse_nonfinite = look
    try:
        train.main(flags)
    finally:
        train.refuse_nonfinite = real
    return rows


def verdict(rows: list[tuple], allowed: float) -> tuple[str, bool]:
    """The line under the table, and whether all is well. allowed: MB of growth."""
    first = next(row for row in rows if row[0] >= rows[-1][0] / 10)
    last = rows[-1]
    growth, files = (last[1] - first[1]) / 1e6, last[2] - first[2]
    good = growth <= allowed and files <= 0
    text = (
        f"steps {first[0]:,} to {last[0]:,}: memory {growth:+.1f} MB (allowed {allowed:g}), open files {files:+d}, "
        f"log {1000 * last[3] / last[0]:,.0f} bytes per 1,000 steps: {'flat' if good else 'IT GROWS'}"
    )
    return text, good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=1000, help="steps between two looks")
    parser.add_argument("--log-every", type=int, default=50, help="as train.py")
    parser.add_argument("--allowed-mb", type=float, default=20.0, help="growth of memory that is no fault")
    args = parser.parse_args()
    if not (PROC / "statm").exists():
        sys.exit("error: there is no /proc here to read the memory of a process from: run this on Linux")
    if args.steps < args.every or args.every < 1:
        sys.exit(f"error: --steps {args.steps} must be at least --every {args.every}, and that at least 1")
    from evaluate import aligned

    with tempfile.TemporaryDirectory() as folder:
        flags = dict(
            method="poly", dataset="strings", steps=args.steps, batch_size=4, eval_examples=0, device="cpu",
            log_every=args.log_every, save_every="1m", output_dir=str(Path(folder) / "run"),
        )  # fmt: skip
        rows = sampled(flags, args.every)
    table = [("step", "memory, MB", "open files", "log, bytes", "seconds")]
    table += [(f"{s:,}", f"{m / 1e6:.1f}", str(f), f"{n:,}", f"{t:.0f}") for s, m, f, n, t in rows]
    text, good = verdict(rows, args.allowed_mb)
    print(aligned(table, left=0), text, sep="\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
