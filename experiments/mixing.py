"""How many tasks a batch holds, what padding costs, and whether that changes what is learnt.

    python -m experiments.mixing                        strings: 40 minutes on two cores; writes results/mixing.md
    python -m experiments.mixing --count                no training: tasks and padding alone
    python -m experiments.mixing --data-dir DIR         also for the official files in DIR/t0, DIR/superni, DIR/crossfit

`data.batches` sorts examples by length within windows of some batches, so that a batch holds similar lengths: less
padding, but tasks have lengths of their own. `window` (a setting of `train.Config`) is the size of a window in batches;
in one batch nothing is sorted.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()

import adapt
import benchmarks
import data
import train
from experiments.bench import machine
from experiments.commands import ROOT, side_by_side
from experiments.methods import NAVIGATION, RUNS
from plumbing.errors import exit_on_user_error
from plumbing.tables import aligned
from recipes import PRETRAINING

WINDOWS, SEEDS, METHODS = (1, 8, 50), (0, 1, 2), ("mhr", "poly")
BATCHES = 400  # to count over
TEXT = """{navigation}# Tasks in a batch

    python -m experiments.mixing --data-dir DIR

Examples are sorted by length within a window of so many batches. Of the first {batches} batches of each benchmark's
recipe: the mean number of different tasks, as a share of the batch or of all tasks if these are fewer, and the share of
a batch's characters (inputs) that is padding.

{counts}

`strings`, {seeds} seeds, equal examples (1,500 steps of 64): scores and seconds of training, mean ± standard deviation.

{scores}

{machine}; {date}.
"""


def counts(dataset: str, data_dir: str, windows=WINDOWS) -> list[tuple[str, ...]]:
    """Lines of a table: dataset, window, share of different tasks, share of padding."""
    given = PRETRAINING[dataset]
    tasks, size = benchmarks.load(dataset, data_dir, given.get("split", "0"), ("train",)).train, given["batch_size"]
    tasks = [task for task in tasks if len(task.train)]
    lines = []
    for window in windows:
        mixed, padding = [], []
        for batch in itertools.islice(data.batches(tasks, size, seed=0, window=window), BATCHES):
            lengths = [len(item.example.input) for item in batch]
            mixed.append(len({item.task for item in batch}) / min(len(batch), len(tasks)))
            padding.append(1 - sum(lengths) / (len(lengths) * max(lengths)))
        lines.append((dataset, str(window), *(f"{100 * statistics.fmean(x):.0f} %" for x in (mixed, padding))))
    return lines


def one(window: int, seed: int, method: str) -> dict:
    """Train and adapt on strings in this process, unless it is done; what the table needs."""
    folder = RUNS / f"mixing-{method}-{window}-{seed}"
    flags = dict(method=method, dataset="strings", window=window, seed=seed, output_dir=str(folder), device="cpu")
    trained = train.main(flags | {"resume": True})
    adapted = adapt.main(dict(checkpoint=str(folder), output_dir=f"{folder}-all", device="cpu", resume=True))
    return {"seen": trained["mean"], "held-out": adapted["mean"], "seconds": trained["seconds"]}


def scores(jobs: int) -> list[tuple[str, ...]]:
    """The second table as cells: every run in a process of its own."""
    runs = list(itertools.product(METHODS, WINDOWS, SEEDS))

    def run(method: str, window: int, seed: int) -> dict:
        command = [sys.executable, "-m", "experiments.mixing", "--one", str(window), str(seed), method]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    found = dict(zip(runs, side_by_side(lambda r: run(*r), runs, jobs), strict=True))
    lines = [("method", "window", "seen tasks", "held-out tasks", "seconds")]
    for method, window in itertools.product(METHODS, WINDOWS):
        several = [found[method, window, seed] for seed in SEEDS]
        cells = ([of[name] for of in several] for name in ("seen", "held-out", "seconds"))
        lines.append((method, str(window), *(f"{statistics.fmean(x):.1f} ± {statistics.stdev(x):.1f}" for x in cells)))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="no training")
    parser.add_argument("--data-dir", default="", help="folder with t0, superni and crossfit, in the official formats")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(int(args.one[0]), int(args.one[1]), args.one[2])))
        return
    lines = [("benchmark", "window", "different tasks", "padding"), *counts("strings", "")]
    for dataset in ("t0", "superni", "crossfit") if args.data_dir else ():
        lines += counts(dataset, str(Path(args.data_dir) / dataset))
    counted = aligned(lines, left=2)
    print(counted)
    if args.count:
        return
    indented = lambda text: "\n".join(f"    {line}".rstrip() for line in text.splitlines())  # noqa: E731
    scored = indented(aligned(scores(args.jobs), left=2))
    page = TEXT.format(
        navigation=NAVIGATION, batches=BATCHES, counts=indented(counted), seeds=len(SEEDS), scores=scored,
        machine=machine("cpu"), date=date.today(),
    )  # fmt: skip
    (ROOT / "results" / "mixing.md").write_text(page)
    print(page)


if __name__ == "__main__":
    exit_on_user_error(main)
