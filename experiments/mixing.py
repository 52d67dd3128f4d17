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
from importlib.metadata import version
from pathlib import Path

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()

import adapt
import benchmarks
import data
import train
from experiments import methods
from experiments.commands import ROOT, run, side_by_side
from experiments.methods import NAVIGATION, RUNS
from plumbing.errors import exit_on_user_error
from plumbing.flags import explicit_flags
from plumbing.folders import read_json
from plumbing.machine import cpu
from plumbing.tables import aligned, mean_std_text
from recipes import FEW_SHOT, PRETRAINING

WINDOWS, SEEDS, METHODS = (1, data.WINDOW, 50), (0, 1, 2), ("MHR", "Poly")
COUNTED, BATCHES = (1, 2, 4, 8, 16, 50), 400  # windows to count over so many batches
TEXT = """{navigation}# Tasks in a batch

    python -m experiments.mixing --data-dir DIR

Examples are sorted by length within a window of so many batches. Of the first {batches} batches of each benchmark's
recipe: the mean number of different tasks, as a share of the batch or of all tasks if these are fewer, and the share of
a batch's characters (inputs) that is padding.

{counts}

The recipes' window is {window}, chosen by these counts before any score was seen: of the windows that were counted, the
smallest with less than a fifth of padding everywhere.

`strings`, {seeds} seeds, equal examples (1,500 steps of 64): scores, mean ± standard deviation. The runs with a window
of {window} are those of [methods.md](methods.md). The other benchmarks were counted only.

{scores}

Commit {commits}; one core of {cpu} for each run, torch {torch}; {date}.
"""


def counts(dataset: str, data_dir: str, windows=COUNTED) -> list[tuple[str, ...]]:
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


def make(method: str, window: int, seed: int, folder: str):
    """Train and adapt on strings, in this process: `window` is a setting of the recipe, not a flag."""
    common, split = dict(seed=seed, device="cpu", resume=True), str(seed)
    rates, few_shot = methods.RATES[method][0].split(), methods.few_shot_rates(method, "all")
    flags = explicit_flags(train.Config, PRETRAINING, [*methods.METHODS[method][0].split(), *rates])
    train.main(flags | dict(dataset="strings", window=window, split=split, output_dir=folder) | common)
    flags = explicit_flags(adapt.Config, FEW_SHOT, list(few_shot))
    adapt.main(flags | dict(checkpoint=folder, split=(split,), output_dir=f"{folder}-all") | common)


def one(method: str, window: int, seed: int) -> dict:
    """What the table needs of a run, which is made unless it is there; the recipe's window is that of `methods.py`."""
    if window == data.WINDOW:
        checkpoint, trained = methods.pretrain(method, seed, RUNS, tuple(methods.RATES[method][0].split()))
        adapted = methods.adapt(checkpoint, "all", seed, methods.few_shot_rates(method, "all"))
    else:
        folder = RUNS / f"mixing-{method}-{window}-{seed}"
        given = ["--one", method, str(window), str(seed), str(folder)]
        adapted = run("experiments.mixing", given, Path(f"{folder}-all") / "result.json")
        trained = read_json(folder / "result.json", mean=float)
    return {"seen": trained["mean"], "held-out": adapted["mean"], "commit": adapted["commit"]}


def scores(jobs: int) -> tuple[list[tuple[str, ...]], str]:
    """(the second table as cells, the commits that its runs were made at)."""
    runs = list(itertools.product(METHODS, WINDOWS, SEEDS))
    found = dict(zip(runs, side_by_side(lambda run: one(*run), runs, jobs), strict=True))
    lines = [("method", "window", "seen tasks", "held-out tasks")]
    for method, window in itertools.product(METHODS, WINDOWS):
        several = [found[method, window, seed] for seed in SEEDS]
        cells = (mean_std_text([of[name] for of in several], "±") for name in ("seen", "held-out"))
        lines.append((method, str(window), *cells))
    return lines, ", ".join(sorted({of["commit"] for of in found.values()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="no training")
    parser.add_argument("--data-dir", default="", help="folder with t0, superni and crossfit, in the official formats")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, window, seed, folder = args.one
        return make(method, int(window), int(seed), folder)
    lines = [("benchmark", "window", "different tasks", "padding"), *counts("strings", "")]
    for dataset in ("t0", "superni", "crossfit") if args.data_dir else ():
        lines += counts(dataset, str(Path(args.data_dir) / dataset))
    counted = aligned(lines, left=2)
    print(counted)
    if args.count:
        return
    indented = lambda text: "\n".join(f"    {line}".rstrip() for line in text.splitlines())  # noqa: E731
    lines, commits = scores(args.jobs)
    page = TEXT.format(
        navigation=NAVIGATION, batches=BATCHES, counts=indented(counted), seeds=len(SEEDS), window=data.WINDOW,
        scores=indented(aligned(lines, left=2)), commits=commits, cpu=cpu(), torch=version("torch"), date=date.today(),
    )  # fmt: skip
    (ROOT / "results" / "mixing.md").write_text(page)
    print(page)


if __name__ == "__main__":
    exit_on_user_error(main)
