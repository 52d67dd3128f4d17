"""The papers' benchmarks, each read from its official files into tasks, and their scores.

    strings, strings-single   built in: compositions of string operations, with a known task-skill table
    t0                        P3's prompted data sets (Sanh et al. 2021), the papers' main benchmark
    superni                   Super-NaturalInstructions (Wang et al. 2022)
    crossfit                  the NLP Few-shot Gym (Ye et al. 2021)

Where to get the files, and the papers' recipes: docs/benchmarks.md.
"""

import importlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data import PARTS, Benchmark, Task
from plumbing.errors import UserError

READERS = {"strings": "strings", "strings-single": "strings", "t0": "t0", "superni": "superni", "crossfit": "crossfit"}


def load(
    dataset: str, data_dir: str = "", split: str = "0", parts: Sequence[str] = PARTS, instructions: bool = False,
    partition: str = "random.json",
) -> Benchmark:  # fmt: skip
    """Read a benchmark by name.

    split: which few-shot examples dev and test tasks get (see each reader). parts: the lists of tasks to read; the
    others may be empty. instructions: of strings. partition: of crossfit.
    Raises UserError for an unknown name, or a missing or damaged file.
    """
    if dataset not in READERS:
        raise UserError(f"--dataset {dataset} is unknown: choose {', '.join(READERS)}")
    reader = importlib.import_module(f"benchmarks.{READERS[dataset]}")  # its libraries take seconds to import
    options = {"strings": dict(instructions=instructions), "crossfit": dict(partition=partition)}
    return reader.load(dataset, data_dir, split, parts, **options.get(dataset, {}))


def load_for(cfg, split: str, parts: Sequence[str]) -> Benchmark:
    """`load` with the settings of a run, a `train.Config`."""
    return load(cfg.dataset, cfg.data_dir, split, parts, cfg.instructions, cfg.partition)


def held_out(benchmark: Benchmark, names: str) -> list[Task]:
    """The dev or test tasks that --tasks names: all (test tasks), dev, papers, or names joined by commas.

    papers: of superni, the 20 test tasks on which the MHR paper reports (a list that its authors published).
    Raises UserError for any other name, or if there are none.
    """
    if names == "papers":
        listed = (Path(__file__).parent / "superni_papers_tasks.txt").read_text(encoding="utf-8").split()
        if not (tasks := [task for task in benchmark.test if task.name in listed]):
            raise UserError("--tasks papers: none of the 20 tasks of superni in the MHR paper is here")
        return tasks
    if names in ("all", "dev"):
        tasks = benchmark.test if names == "all" else benchmark.dev
        if not tasks:
            raise UserError(f"--tasks {names}: there are no held-out {'test' if names == 'all' else 'dev'} tasks here")
        return tasks
    known = {task.name: task for task in benchmark.dev + benchmark.test}
    for name in names.split(","):
        if name not in known:
            raise UserError(f"--tasks {name} is no held-out task: choose all, dev, papers, or from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names.split(","))]


def few_shot(tasks: list[Task], split: str, shots: int, seed: int) -> list[Task]:
    """The tasks of a split that can be adapted to, each with `shots` of its train examples (0: all), drawn by the seed.

    Tasks that lack train, dev or test examples are named and left out. Raises UserError if none is left.
    """
    lacking = [task.name for task in tasks if not (task.train and task.dev and task.test)]
    if lacking:
        print(f"left out because they lack train, dev or test examples in split {split}: {', '.join(lacking)}")
    if len(lacking) == len(tasks):
        raise UserError(f"--tasks: none of {', '.join(lacking):.200} has train, dev and test examples")
    whole = [task for task in tasks if task.name not in lacking]
    # drawn, not the first ones: official files are sorted by label
    sizes = [min(shots or len(task.train), len(task.train)) for task in whole]
    drawn = [random.Random(seed).sample(task.train, n) for task, n in zip(whole, sizes, strict=True)]
    return [replace(task, train=few) for task, few in zip(whole, drawn, strict=True)]
