"""Tasks and batches.

A benchmark (`benchmarks/`) is three lists of tasks: `train` (multi-task pre-training), `dev` (for choosing settings)
and `test` (held out, for few-shot adaptation). A task has its own train, dev and test examples and names its metric.

The examples of a large mixture stay on disk (`benchmarks.tables.Rows`): the memory of a run does not grow with them,
except for one number a row, the order of an epoch. Nothing here knows about models; `collate` turns a batch of texts
into tensors.
"""

import functools
import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from plumbing.tables import shortened, visible, wrapped


class Example(NamedTuple):
    """input: the text that the model reads. outputs: the acceptable outputs (references), at least one.

    choices, label: for a task that is scored by choosing, all answers to choose from and the number of the right one.
    tail: the end of the input, to be kept if the input is too long (SuperNI's "\\nOutput:").
    """

    input: str
    outputs: tuple[str, ...]
    choices: tuple[str, ...] = ()
    label: int = -1
    tail: str = ""


@dataclass
class Task:
    """name: unique in its benchmark. metric: a key of `benchmarks.metrics.METRICS`. train, dev, test: its examples.

    also: further metrics to report. skills: what the task is truly made of, if known (strings). group: the kind of
    task, if the benchmark names one (SuperNI's category, T0's data set, CrossFit's task type).
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
    """train: the tasks of pre-training; the position of a task is its id. dev, test: tasks that it never sees."""

    train: list[Task]
    dev: list[Task]
    test: list[Task]


PARTS = ("train", "dev", "test")


class Item(NamedTuple):
    """One example of a batch: its task's number in the list given to `batches`, and one of its outputs to learn."""

    task: int
    example: Example
    output: str


WINDOW = 8  # batches within which examples are sorted by length: little padding, mixed tasks (results/mixing.md)


def batches(
    tasks: list[Task], batch_size: int, seed: int, start: int = 0, window: int = WINDOW
) -> Iterator[list[Item]]:
    """Endless batches over the train examples of all tasks, in epochs; an epoch sees each example once.

    So a task's share of the batches is its share of the examples. Examples of similar length share a batch: an epoch is
    shuffled and cut into windows of so many batches; a window is sorted by length and cut, its batches are shuffled.
    The last batch of an epoch may be smaller. If an example has several outputs, each epoch draws one. Everything is a
    function of (seed, epoch): start = n skips the first n batches without reading them.
    """
    ends = np.cumsum([len(task.train) for task in tasks])
    total, rows = int(ends[-1]), window * batch_size
    for epoch in itertools.count(start // (per_epoch := -(-total // batch_size))):
        order = np.arange(total, dtype=np.int32 if total < 2**31 else np.int64)
        np.random.default_rng([seed, epoch]).shuffle(order)
        skip = start - epoch * per_epoch if epoch == start // per_epoch else 0  # batches of this epoch
        for begin in range(skip // window * rows, total, rows):
            rng = random.Random(f"{seed} {epoch} {begin}")
            items = []
            for row in order[begin : begin + rows].tolist():
                t = int(np.searchsorted(ends, row, side="right"))
                example = tasks[t].train[row - int(ends[t]) + len(tasks[t].train)]
                items.append(Item(t, example, rng.choice(example.outputs)))
            cut = by_length(items, batch_size)
            yield from rng.sample(cut, len(cut))[max(0, skip - begin // batch_size) :]


def by_length(items: list[Item], batch_size: int) -> list[list[Item]]:
    """Sort a list by length in characters, first of the input, then of the output, and cut it into batches."""
    ordered = sorted(items, key=lambda item: (len(item.example.input), len(item.output)))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def drawn(tasks: list[Task], count: int) -> list[Item]:
    """So many training examples of all tasks (or all), the same at every call; no random state is changed."""
    return next(batches(tasks, min(count, sum(len(task.train) for task in tasks)), seed=0, window=1))


def preview(
    tasks: list[Task], tokenizer, encoder_decoder: bool, max_input: int, max_output: int, part: str = "train",
    whole: bool = False,
) -> str:  # fmt: skip
    """Two examples, and how long the inputs and outputs of 256 are, as text of at most 80 columns.

    part: train, dev or test. whole: the examples in up to 600 characters, with their line breaks, in the terminal's
    width; else one line each.
    """
    items = drawn([replace(task, train=getattr(task, part)) for task in tasks], 256)
    lines = []
    for item in random.Random(0).sample(items, min(2, len(items))):
        name = shortened(tasks[item.task].name, 19)
        for title, text in ((f"{name:21}", item.example.input), (f"{'->':>19}  ", item.output)):
            for line in in_full(text, shutil.get_terminal_size().columns - 21) if whole else [shortened(text, 59)]:
                lines.append(title + line)
                title = " " * 21
    most = 10**6  # more tokens than any text has
    outputs = encode_outputs([item.output for item in items], tokenizer, encoder_decoder, most)
    inputs = encode_inputs([item.example for item in items], tokenizer, most)
    for name, rows, limit in (("inputs", inputs, max_input), ("outputs", outputs, max_output)):
        lengths, cut = sorted(map(len, rows)), sum(len(row) > limit for row in rows) / len(rows)
        text = f"median {lengths[len(rows) // 2]} tokens, longest {lengths[-1]}, cut at {limit}: {cut:.1%}"
        lines.append(f"{f'{name} ({len(rows)} drawn)':21}{text}")
    return "\n".join(lines)


def in_full(text: str, width: int) -> list[str]:
    r"""A text of up to 600 characters, of a longer one the beginning and the end, as lines that end after each \n."""
    *parts, last = (text if len(text) <= 600 else f"{text[:400]}…{text[-199:]}").split("\n")
    parts = [visible(part) + r"\n" for part in parts] + [visible(last)]
    return [line for part in parts for line in wrapped(part, max(20, width))]


def collate(
    examples: list[Example],
    outputs: list[str] | None,
    tokenizer,
    encoder_decoder: bool,
    max_input: int,
    max_output: int,
) -> dict[str, torch.Tensor]:
    """Texts to the tensors of a Hugging Face model: input_ids, attention_mask (b, l), and labels if outputs are given.

    Texts that are too long keep their first max_input and max_output tokens (with a tail: see `encode_inputs`). Labels
    are -100 at padding. An encoder-decoder model reads the input and predicts the output. A decoder-only model reads
    both in one row, and labels are -100 at the input; without outputs its rows are padded on the left, for generation.
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
    """Token ids of the inputs, at most `limit` each: the first ones; if an example has a tail, also those of the tail.

    The cut with a tail is nearly that of the MHR authors' code for SuperNI: keep the first limit - len(tokens(tail))
    tokens, turn them back into text, append the tail. (Theirs loses the last token.)
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
    """Token ids of outputs, at most `limit` each, with the end-of-text token that the model must learn to produce.

    After the input of a decoder-only model an output starts with a space, as a word does in running text.
    """
    if encoder_decoder:
        return [tokens(tokenizer, text_target=output, truncation=True, max_length=limit) for output in outputs]
    return [continuation(tokenizer, output)[: limit - 1] + [tokenizer.eos_token_id] for output in outputs]


BEFORE = "a"  # some text that an output may follow


def continuation(tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on from another one, after a space.

    They are cut from a longer text: tokenizers of the Llama 2 kind put a space before whatever they are given, and
    would find two before " yes".
    """
    text = text if text[:1].isspace() else f" {text}"
    before = tokens(tokenizer, text=BEFORE, add_special_tokens=False)
    whole = tokens(tokenizer, text=BEFORE + text, add_special_tokens=False)
    alone = whole[: len(before)] != before  # it does not begin with the tokens of what is before
    return tokens(tokenizer, text=text, add_special_tokens=False) if alone else whole[len(before) :]


def tokens(tokenizer, **options) -> list[int]:
    """Token ids of one text, cached (do not change the list): the examples of a few-shot task are read many times.

    A text that is too long keeps its beginning, whatever side the tokenizer would cut.
    """
    return _tokens(tokenizer, len(tokenizer) if hasattr(tokenizer, "__len__") else 0, **options)


@functools.lru_cache(maxsize=4096)
def _tokens(tokenizer, size: int, **options) -> list[int]:
    """`tokens` of a tokenizer with so many tokens: when some are added, a text may have others."""
    tokenizer.truncation_side = "right"
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
