"""How many tasks a batch holds, what padding costs, and whether that changes what is learnt.

    python -m experiments.mixing                        strings: 50 minutes on two cores; writes results/mixing.md
    python -m experiments.mixing --count                no training: tasks and padding alone
    python -m experiments.mixing --data-dir DIR         also for the official files in DIR/t0, DIR/superni, DIR/crossfit

`data.batches` sorts examples by length within windows of some batches, so that a batch holds similar lengths: less
padding, but tasks have lengths of their own. `window` (a setting of `train.Config`) is the size of a window in batches;
in one batch nothing is sorted.
"""

import argparse
import itertools
import statistics
from datetime import date
from pathlib import Path

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()

import benchmarks
import data
from experiments.bench import machine
from experiments.commands import ROOT, side_by_side
from experiments.methods import NAVIGATION, RATES, RUNS, adapt, few_shot_rates, pretrain
from plumbing.errors import exit_on_user_error
from plumbing.tables import aligned, mean_std_text
from recipes import PRETRAINING

WINDOWS, SEEDS, METHODS = (1, data.WINDOW, 50), (0, 1, 2), ("MHR", "Poly")
BATCHES = 400  # to count over
TEXT = """{navigation}# Tasks in a batch

    python -m experiments.mixing --data-dir DIR

Examples are sorted by length within a window of so many batches. Of the first {batches} batches of each benchmark's
recipe: the mean number of different tasks, as a share of the batch or of all tasks if these are fewer, and the share of
a batch's characters (inputs) that is padding.

{counts}

`strings`, {seeds} seeds, equal examples (1,500 steps of 64): scores, mean ± standard deviation. The window of
{window} is the recipe's; its runs are those of [methods.md](methods.md).

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


def one(method: str, window: int, seed: int) -> dict:
    """Train and adapt on strings, unless it is done; what the table needs. The recipe's window: runs of methods.py."""
    flags = () if window == data.WINDOW else (f"--window={window}",)
    checkpoint, trained = pretrain(method, seed, RUNS, (*RATES[method][0].split(), *flags))
    adapted = adapt(checkpoint, "all", seed, few_shot_rates(method, "all"))
    return {"seen": trained["mean"], "held-out": adapted["mean"]}


def scores(jobs: int) -> list[tuple[str, ...]]:
    """The second table as cells."""
    runs = list(itertools.product(METHODS, WINDOWS, SEEDS))
    found = dict(zip(runs, side_by_side(lambda run: one(*run), runs, jobs), strict=True))
    lines = [("method", "window", "seen tasks", "held-out tasks")]
    for method, window in itertools.product(METHODS, WINDOWS):
        several = [found[method, window, seed] for seed in SEEDS]
        cells = (mean_std_text([of[name] for of in several], "±") for name in ("seen", "held-out"))
        lines.append((method, str(window), *cells))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="no training")
    parser.add_argument("--data-dir", default="", help="folder with t0, superni and crossfit, in the official formats")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel")
    args = parser.parse_args()
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
        window=data.WINDOW, machine=machine("cpu"), date=date.today(),
    )  # fmt: skip
    (ROOT / "results" / "mixing.md").write_text(page)
    print(page)


if __name__ == "__main__":
    exit_on_user_error(main)
