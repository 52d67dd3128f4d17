"""The embedded benchmark `strings`: tasks composed of skills, with a known task-skill table.

Eight operations on strings are the latent skills. A task applies two or three of them, always in the order of the table
below, so a task is a set of skills. Without instructions every input is "task: string": the model must infer the task
from examples. With instructions the operations' names replace the word "task", as in T0.

`strings-single`, the single operations with instructions, is what the bundled backbone was trained on.
"""

import functools
import itertools
import random

from data import Benchmark, Example, Task
from plumbing.errors import UserError
from plumbing.flags import split_number

LETTERS = "abcdefghij"
PARTITION = 176  # the first number for which each operation is in >= 3 held-out tasks and >= 2 dev tasks
OPERATIONS = {
    "sort": lambda s: "".join(sorted(s)),
    "double": lambda s: s + s[-1],  # the last letter twice
    "drop": lambda s: s[1:],  # without the first letter
    "reverse": lambda s: s[::-1],
    "swap": lambda s: "".join(s[k + 1 : k + 2] + s[k] for k in range(0, len(s), 2)),  # neighbours: abcde -> badce
    "rotate": lambda s: s[1:] + s[:1],
    "shift": lambda s: "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in s),  # next letter, j -> a
    "upper": lambda s: s.upper(),
}


def load(dataset: str, data_dir: str, split: str, parts, instructions: bool = False) -> Benchmark:
    """strings or strings-single, all parts. split: a whole number, the seed of the train and dev examples.

    Raises UserError for another split, or for a data_dir: there are no files to read.
    """
    number = split_number(split, dataset)
    if data_dir:
        raise UserError(f"--data-dir {data_dir}: {dataset} is embedded and reads no files, leave the flag out")
    return strings_single(number) if dataset == "strings-single" else strings(number, instructions)


def compose(skills: tuple[str, ...], text: str) -> str:
    """Apply operations to a string of LETTERS, in the order of OPERATIONS: compose(("reverse",), "abc") is "cba"."""
    for name, operation in OPERATIONS.items():
        text = operation(text) if name in skills else text
    return text


@functools.cache  # benchmarks are never changed
def strings(split: int = 0, instructions: bool = False) -> Benchmark:
    """The embedded benchmark: all 84 sets of two or three operations, 64 train, 8 dev and 12 test tasks.

    Train tasks have 500 train, 20 dev and 100 test examples; dev and test tasks 32, 32 and 100. Every example is a
    function of (task, split, instructions); test examples are the same for all splits.
    """
    sets = [c for n in (2, 3) for c in itertools.combinations(OPERATIONS, n)]
    random.Random(PARTITION).shuffle(sets)  # the same for all runs, whatever their seed
    train = [_string_task(skills, split, instructions, 500, 20, 100) for skills in sets[:64]]
    other = [_string_task(skills, split, instructions, 32, 32, 100) for skills in sets[64:]]
    return Benchmark(train, dev=other[:8], test=other[8:])


@functools.cache
def strings_single(split: int = 0) -> Benchmark:
    """The eight single operations, with instructions: 40,000 train, 100 dev and 100 test examples each."""
    train = [_string_task((name,), split, True, 40_000, 100, 100) for name in OPERATIONS]
    return Benchmark(train, dev=[], test=[])


def _string_task(skills: tuple[str, ...], split: int, instructions: bool, *sizes: int) -> Task:
    """A task with train, dev and test examples of these sizes, without a string in common."""
    train, dev, test = sizes
    name = "+".join(skills)
    held_out = _distinct_strings(random.Random(f"{name} test"), test, without=frozenset())
    seen = _distinct_strings(random.Random(f"{name} {split}"), train + dev, without=frozenset(held_out))
    prefix = f"{' '.join(skills) if instructions else 'task'}: "  # the backbone has only seen "NAME: string"

    def examples(texts):
        return [Example(prefix + text, (compose(skills, text),)) for text in texts]

    return Task(name, "exact", examples(seen[:train]), examples(seen[train:]), examples(held_out), skills)


def _distinct_strings(rng: random.Random, count: int, without: frozenset[str]) -> list[str]:
    """`count` different strings of 4 to 7 LETTERS, none of them in `without`."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = "".join(rng.choices(LETTERS, k=rng.randint(4, 7)))
        if text not in without:
            texts[text] = None
    return list(texts)
