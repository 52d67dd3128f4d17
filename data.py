"""Benchmarks -> tasks -> batches.

A benchmark is three lists of tasks: `train` (multi-task pre-training), `dev` (for choosing settings) and `test`
(held out, for few-shot adaptation). A task has its own train, dev and test examples and names its metric.

    strings, strings-single   embedded: compositions of string operations, with a known task-skill table
    t0                        P3's prompted data sets (Sanh et al. 2021), the papers' main benchmark
    superni                   Super-NaturalInstructions (Wang et al. 2022)
    crossfit                  the NLP Few-shot Gym (Ye et al. 2021)

The readers are in `benchmarks/`, one a file. Large mixtures stay memory-mapped (`Rows`): what a run holds in memory
does not grow with them, but for one number a row, the order of an epoch. Nothing here knows about models, but for
`collate`, which turns a batch of texts into tensors.
"""

import functools
import importlib
import inspect
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch

from config import UserError

datasets.disable_progress_bars()  # one a file would be hundreds


class Example(NamedTuple):
    """input: the text that the model reads. outputs: the acceptable outputs (references), at least one.

    choices: all answers to choose from, and label: which of them is right, where the task is scored by choosing.
    tail: the end of the input that must survive when the input is too long (SuperNI's "\\nOutput:").
    """

    input: str
    outputs: tuple[str, ...]
    choices: tuple[str, ...] = ()
    label: int = -1
    tail: str = ""


@dataclass
class Task:
    """name: unique in its benchmark. metric: a key of `metrics.METRICS`. train, dev, test: its examples.

    also: further metrics to report.
    skills: what the task is truly made of, where that is known (strings). group: the kind of task, where the benchmark
    names one (SuperNI's category, T0's data set, CrossFit's task type).
    """

    name: str
    metric: str
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    skills: tuple[str, ...] = ()
    group: str = ""
    also: tuple[str, ...] = ()


@dataclass
class Benchmark:
    """train: the tasks of multi-task pre-training; the position of a task is its id. dev, test: tasks that pre-training
    never sees."""

    train: list[Task]
    dev: list[Task]
    test: list[Task]


PARTS = ("train", "dev", "test")


READERS = {"strings": "strings", "strings-single": "strings", "t0": "t0", "superni": "superni", "crossfit": "crossfit"}


def load(
    dataset: str, data_dir: str = "", split: str = "0", parts: Sequence[str] = PARTS, instructions: bool = False,
    partition: str = "random.json",
) -> Benchmark:  # fmt: skip
    """Read a benchmark by name.

    split: which few-shot examples dev and test tasks get (see each reader). parts: the lists of tasks that are wanted;
    the others may come back empty. instructions: of strings. partition: of crossfit.
    Raises UserError for an unknown name, or a missing or broken file.
    """
    if dataset not in READERS:
        raise UserError(f"--dataset {dataset} is unknown: choose {', '.join(READERS)}")
    reader = importlib.import_module(f"benchmarks.{READERS[dataset]}")  # here, for readers import this file
    options = {"strings": dict(instructions=instructions), "crossfit": dict(partition=partition)}
    return reader.load(dataset, data_dir, split, parts, **options.get(dataset, {}))


def split_number(split: str, of: str) -> int:
    """--split where it is a whole number. of: the data set, and what more to say. Raises UserError for anything else,
    also for a second way to write a number, as 007."""
    if not re.fullmatch("0|[1-9][0-9]{0,17}", split):
        raise UserError(f"--split {split:.40} must be a whole number below 10^18 for {of}")
    return int(split)


# --- Large mixtures ---------------------------------------------------------------------------------------------------


class Rows(Sequence):
    """Examples in a table on disk, read and made when they are asked for.

    table: a memory-mapped datasets.Dataset. example: turns one of its rows (a dict) into an Example. size: how many
    of the rows to show (default: all), evenly spaced, so that a table sorted by label stays balanced.
    """

    def __init__(self, table: datasets.Dataset, example: Callable[[dict], Example], size: int | None = None):
        self.table, self.example = table, example
        self.size = len(table) if size is None else min(size, len(table))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k):
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(self.size))]
        if not -self.size <= k < self.size:
            raise IndexError(f"row {k} of {self.size}")
        return self.example(self.table[int(k) % self.size * len(self.table) // self.size])


def table_of(read: Callable, files: list[Path], features: dict) -> datasets.Dataset:
    """All rows that `read(path)` yields for these files, in order, as one memory-mapped table with a column "file".

    read: a generator function; its rows are dicts with the keys of features, which gives each column's type ("string",
    "int64" or ["string"] for a list). "file" is the file's number in the list. The table is written once to the cache
    of `datasets` and found again as long as reader and files are the same (by name, size and time of last change).
    Raises UserError as `read` does, OSError if the cache cannot be written.
    """
    types = {name: datasets.List(datasets.Value(t[0])) if isinstance(t, list) else datasets.Value(t)
             for name, t in (features | {"file": "int32"}).items()}  # fmt: skip
    # a tuple: datasets would cut a list into shards and call the generator once for each
    stamps = tuple((str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    source = inspect.getsource(inspect.getmodule(read))
    if not stamps:
        return datasets.Dataset.from_dict({name: [] for name in types}, features=datasets.Features(types))
    try:
        return datasets.Dataset.from_generator(
            _rows_of_files,
            features=datasets.Features(types),
            gen_kwargs={"read": read, "stamps": stamps, "source": source},
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise unwritten_cache(cause) from None


def unwritten_cache(cause: OSError) -> OSError:
    """What to raise if the cache of `datasets` cannot be written: the cause, with the folder and a way out."""
    reason = (cause.strerror or str(cause)).splitlines()[-1]  # datasets puts lines of its own before it
    reason = f"the cache of datasets cannot be written ({reason}): make room, or set HF_DATASETS_CACHE to another"
    return OSError(cause.errno, reason, str(datasets.config.HF_DATASETS_CACHE))


def _rows_of_files(read: Callable, stamps: tuple, source: str) -> Iterator[dict]:
    for number, (path, *_) in enumerate(stamps):
        try:
            for row in read(Path(path)):
                yield row | {"file": number}
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def parts_of(table: datasets.Dataset, files: int) -> list[datasets.Dataset]:
    """The rows of each file of a `table_of` so many files, as views: nothing is copied."""
    ends = np.searchsorted(table.with_format("numpy")["file"][:], np.arange(files + 1))
    return [table.select(range(a, b) if a < b else []) for a, b in itertools.pairwise(ends.tolist())]


@functools.cache
def say_once(text: str):
    """Print a line, once in a process: a benchmark is read anew for each split, and lacks the same files each time."""
    print(text)


def reach_hub():
    """Ask once, for at most 5 seconds, whether the hub answers; if not, use only what is cached from now on.

    The libraries would ask for each file again and again, for 20 seconds and more.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the network does: the loaders then say what is missing
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


# --- Batches ----------------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One example of a batch: its task's number in the list given to `batches`, and one of its outputs to learn."""

    task: int
    example: Example
    output: str


WINDOW = 50  # batches: examples are sorted by length within so many


def batches(tasks: list[Task], batch_size: int, seed: int, start: int = 0) -> Iterator[list[Item]]:
    """Endless batches over the train examples of all tasks, in epochs; an example is seen once an epoch.

    So a task's share is its share of the examples. Examples of like length share a batch: each epoch is shuffled and
    cut into windows of WINDOW batches; a window is sorted by length and cut, and its batches are shuffled. An epoch's
    last batch may be smaller. Where an example has several outputs, each epoch draws one. Everything is a function of
    (seed, epoch): start = n gives what comes after the first n batches, without reading those.
    """
    ends = np.cumsum([len(task.train) for task in tasks])
    total, window = int(ends[-1]), WINDOW * batch_size
    for epoch in itertools.count(start // (per_epoch := -(-total // batch_size))):
        order = np.arange(total, dtype=np.int32 if total < 2**31 else np.int64)
        np.random.default_rng([seed, epoch]).shuffle(order)
        skip = start - epoch * per_epoch if epoch == start // per_epoch else 0  # batches of this epoch
        for begin in range(skip // WINDOW * window, total, window):
            rng = random.Random(f"{seed} {epoch} {begin}")
            items = []
            for row in order[begin : begin + window].tolist():
                t = int(np.searchsorted(ends, row, side="right"))
                example = tasks[t].train[row - int(ends[t]) + len(tasks[t].train)]
                items.append(Item(t, example, rng.choice(example.outputs)))
            cut = by_length(items, batch_size)
            yield from rng.sample(cut, len(cut))[max(0, skip - begin // batch_size) :]


def by_length(items: list[Item], batch_size: int) -> list[list[Item]]:
    """Cut a list into batches after sorting it by length in characters: of the input, then of the output."""
    ordered = sorted(items, key=lambda item: (len(item.example.input), len(item.output)))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def collate(
    examples: list[Example],
    outputs: list[str] | None,
    tokenizer,
    encoder_decoder: bool,
    max_input: int,
    max_output: int,
) -> dict[str, torch.Tensor]:
    """Texts to the tensors of a Hugging Face model: input_ids, attention_mask (b, l), and labels if outputs are given.

    Over-long texts keep their first max_input and max_output tokens, or what `encode_inputs` says. Padding is masked in
    labels by -100. Encoder-decoder models read the input and are asked for the output. Decoder-only models read the
    input and the output in one row, and labels mask the input; without outputs the rows are padded on the left, for
    generation.
    """
    source = encode_inputs(examples, tokenizer, max_input)
    if outputs is None:
        return pad_rows(source, tokenizer, left=not encoder_decoder)
    target = encode_outputs(outputs, tokenizer, encoder_decoder, max_output)
    if encoder_decoder:
        return pad_rows(source, tokenizer) | {"labels": pad(target, -100)}
    labels = pad([[-100] * len(s) + t for s, t in zip(source, target, strict=True)], -100)
    return pad_rows([s + t for s, t in zip(source, target, strict=True)], tokenizer) | {"labels": labels}


def encode_inputs(examples: list[Example], tokenizer, limit: int) -> list[list[int]]:
    """Token ids of the inputs, at most `limit` each: the first ones, and where an example has a tail, the tail's.

    The cut with a tail is that of SuperNI's official code: keep the first limit - len(tokens(tail)) tokens, turn them
    back into text, append the tail.
    """
    rows = [tokens(tokenizer, text=e.input) for e in examples]
    for k, (example, row) in enumerate(zip(examples, rows, strict=True)):
        if len(row) > limit and example.tail:
            keep = max(0, limit - len(tokens(tokenizer, text=example.tail)))
            text = tokenizer.decode(row[:keep], skip_special_tokens=True) + example.tail
        elif len(row) > limit:
            text = example.input
        else:
            continue
        rows[k] = tokens(tokenizer, text=text, truncation=True, max_length=limit)
    return rows


def encode_outputs(outputs: list[str], tokenizer, encoder_decoder: bool, limit: int) -> list[list[int]]:
    """Token ids of outputs, at most `limit` each, with the end-of-text token that the model must learn to say.

    After the input of a decoder-only model an output starts with a space, which such models expect before a word.
    """
    if encoder_decoder:
        return [tokens(tokenizer, text_target=output, truncation=True, max_length=limit) for output in outputs]
    outputs = [output if output[:1].isspace() else f" {output}" for output in outputs]
    options = dict(truncation=True, max_length=limit - 1, add_special_tokens=False)
    return [tokens(tokenizer, text=output, **options) + [tokenizer.eos_token_id] for output in outputs]


@functools.lru_cache(maxsize=4096)
def tokens(tokenizer, **options) -> list[int]:
    """Token ids of one text, kept for the next call with the same one (do not change the list): a few-shot task's
    examples come again and again."""
    return tokenizer(**options).input_ids


def pad_rows(rows: list[list[int]], tokenizer, left: bool = False) -> dict[str, torch.Tensor]:
    """Ragged token ids to input_ids and attention_mask (b, longest); padded on the right, or on the left."""
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"input_ids": pad(rows, fill, left), "attention_mask": pad([[1] * len(row) for row in rows], 0, left)}


def pad(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """Ragged rows to one tensor (b, longest), filled with `value` on the right, or on the left."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows, strict=True)])
