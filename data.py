"""Benchmarks -> tasks -> batches.

A benchmark is three lists of tasks: `train` (multi-task pre-training), `dev` (for choosing settings) and `test`
(held out, for few-shot adaptation). A task has its own train, dev and test examples and names its metric.

    strings         embedded: compositions of string operations, with a known task-skill table
    strings-single  embedded: the single operations; what the bundled backbone was trained on
    crossfit        the official files of the NLP Few-shot Gym (Ye et al. 2021), `--data-dir`

Nothing here knows about models, but for `collate`, which turns a batch of texts into tensors.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from config import UserError, read_json


class Example(NamedTuple):
    """input: the text that the model reads. outputs: the acceptable outputs (references), at least one."""

    input: str
    outputs: tuple[str, ...]


@dataclass
class Task:
    """name: unique in its benchmark. metric: a key of `evaluate.METRICS`. train, dev, test: its examples.

    skills: what the task is truly made of, where that is known (strings); empty elsewhere.
    """

    name: str
    metric: str
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    skills: tuple[str, ...] = ()


@dataclass
class Benchmark:
    """train: the tasks of multi-task pre-training. dev, test: tasks that pre-training never sees."""

    train: list[Task]
    dev: list[Task]
    test: list[Task]


def load(dataset: str, data_dir: str = "", split: str = "0", instructions: bool = False) -> Benchmark:
    """Read a benchmark by name. split: which few-shot examples dev and test tasks get (see each reader).

    Raises UserError for an unknown name, or a missing or broken file.
    """
    if dataset == "strings":
        return strings(_integer(split), instructions)
    if dataset == "strings-single":
        return strings_single(_integer(split))
    if dataset == "crossfit":
        return crossfit(data_dir, split)
    raise UserError(f"--dataset {dataset} is unknown: choose strings, strings-single or crossfit")


def _integer(split: str) -> int:
    if not split.isdecimal():
        raise UserError(f"--split {split} must be a whole number for strings")
    return int(split)


# --- strings ----------------------------------------------------------------------------------------------------------
# The papers' story with a known answer. Eight operations on strings are the latent skills; a task applies two or three
# of them, always in the order of this table, so that a set of skills is a task. Without instructions the model sees
# only "task: string", as in CrossFit, and must find out from examples what to do; with them it reads the operations'
# names instead of "task", as in T0.

LETTERS = "abcdefghij"
STRINGS_PARTITION = 176  # the first number for which each operation is in >= 3 held-out tasks and >= 2 dev tasks
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


def compose(skills: tuple[str, ...], text: str) -> str:
    """Apply these operations to a string of LETTERS, in the order of OPERATIONS: compose(("reverse",), "abc") "cba"."""
    for name, operation in OPERATIONS.items():
        text = operation(text) if name in skills else text
    return text


@functools.cache  # a second call costs nothing; benchmarks are only read
def strings(split: int = 0, instructions: bool = False) -> Benchmark:
    """The embedded benchmark: all 84 sets of two or three operations, 64 train, 8 dev and 12 test tasks.

    Train tasks have 500 train, 20 dev and 100 test examples; dev and test tasks 32, 32 and 100. Every example is a
    function of (task, split number, instructions); the test examples do not even depend on the split number.
    """
    sets = [c for n in (2, 3) for c in itertools.combinations(OPERATIONS, n)]
    random.Random(STRINGS_PARTITION).shuffle(sets)  # fixed for ever, whatever the seed of a run
    train = [_string_task(skills, split, instructions, 500, 20, 100) for skills in sets[:64]]
    other = [_string_task(skills, split, instructions, 32, 32, 100) for skills in sets[64:]]
    return Benchmark(train, dev=other[:8], test=other[8:])


@functools.cache
def strings_single(split: int = 0) -> Benchmark:
    """The eight single operations, with instructions: 40,000 train, 100 dev and 100 test examples each."""
    train = [_string_task((name,), split, True, 40_000, 100, 100) for name in OPERATIONS]
    return Benchmark(train, dev=[], test=[])


def _string_task(skills: tuple[str, ...], split: int, instructions: bool, *sizes: int) -> Task:
    """A task whose train, dev and test examples, of these sizes, have no string in common."""
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
    found: dict[str, None] = {}
    while len(found) < count:
        text = "".join(rng.choices(LETTERS, k=rng.randint(4, 7)))
        if text not in without:
            found[text] = None
    return list(found)


# --- CrossFit ---------------------------------------------------------------------------------------------------------
# <data-dir>/<task>/<task>_<k>_<seed>_{train,dev,test}.tsv and a partition file <data-dir>/random.json, as published at
# https://github.com/INK-USC/CrossFit. One example a line, columns separated by tabs: input, output, other outputs.

CROSSFIT_SPLITS = ("100", "13", "21", "42", "87")
# The metric of each task as CrossFit's own metrics.py has it; every task not named here is measured by ACC.
_CROSSFIT_METRICS = {
    "Classification-F1": """
        ade_corpus_v2-classification ag_news amazon_polarity anli circa climate_fever codah dbpedia_14 discovery emo
        emotion ethos-directed_vs_generalized ethos-disability ethos-gender ethos-national_origin ethos-race
        ethos-religion ethos-sexual_orientation financial_phrasebank hate_speech18 hate_speech_offensive hatexplain
        health_fact imdb liar onestop_english paws poem_sentiment rotten_tomatoes scicite scitail sick sms_spam
        tab_fact trec trec-finegrained tweet_eval-emoji tweet_eval-emotion tweet_eval-hate tweet_eval-irony
        tweet_eval-offensive tweet_eval-sentiment tweet_eval-stance_abortion tweet_eval-stance_atheism
        tweet_eval-stance_climate tweet_eval-stance_feminist tweet_eval-stance_hillary wiki_auto wiki_qa
        yahoo_answers_topics yelp_polarity
    """,
    "EM": """
        acronym_identification ade_corpus_v2-dosage ade_corpus_v2-effect aslg_pc12 break-QDMR break-QDMR-high-level
        crawl_domain freebase_qa jeopardy kilt_ay2 kilt_hotpotqa kilt_nq kilt_trex kilt_zsre lama-conceptnet
        lama-google_re lama-squad lama-trex limit numer_sense proto_qa qa_srl search_qa spider squad-no_context
        superglue-multirc web_questions wikisql
    """,
    "QA-F1": "adversarialqa biomrc duorc hotpot_qa quoref ropes squad-with_context superglue-record tweet_qa",
    "Rouge-L": """
        aeslc common_gen cos_e e2e_nlg_cleaned eli5-askh eli5-asks eli5-eli5 empathetic_dialogues gigaword kilt_wow
        multi_news reddit_tifu-title reddit_tifu-tldr samsum wiki_bio wiki_split xsum
    """,
    "Matthew-Correlation": "glue-cola",
    "Pearson-Correlation": "app_reviews mocha yelp_review_full",
}
CROSSFIT_METRIC = {task: metric for metric, tasks in _CROSSFIT_METRICS.items() for task in tasks.split()}


def crossfit(data_dir: str, split: str = "100", partition: str = "random.json") -> Benchmark:
    """The tasks of a partition that have a folder in data_dir; the others are named once on standard output.

    Train tasks learn from the train and dev files of all five splits together (Polytropon section 4.1). Dev and test
    tasks are few-shot: the train and dev file of the one split named. Raises UserError for a missing or broken file.
    """
    if split not in CROSSFIT_SPLITS:
        raise UserError(f"--split {split} is not one of CrossFit's: choose {', '.join(CROSSFIT_SPLITS)}")
    if not data_dir:
        raise UserError("--dataset crossfit needs --data-dir, the folder of the few-shot gym's task folders")
    root = Path(data_dir)
    if not (root / partition).is_file():
        raise UserError(f"--data-dir {root} has no {partition}: give the folder that holds it and the task folders")
    names = _partition(root / partition)
    missing = [name for part in ("train", "dev", "test") for name in names[part] if not (root / name).is_dir()]
    if missing:
        print(f"crossfit: {len(missing)} tasks of {partition} have no folder in {root} and are left out")

    def tasks(part: str, splits: tuple[str, ...], merge: bool) -> list[Task]:
        return [_crossfit_task(root / name, splits, merge) for name in sorted(names[part]) if name not in missing]

    train = tasks("train", CROSSFIT_SPLITS, merge=True)
    benchmark = Benchmark(train, tasks("dev", (split,), merge=False), tasks("test", (split,), merge=False))
    if not benchmark.train:
        raise UserError(f"--data-dir {root} holds none of the training tasks of {partition}")
    return benchmark


def _partition(path: Path) -> dict[str, list[str]]:
    """A partition file: {"train": names, "dev": names, "test": names}. A name is a folder's, never a path."""
    parts = read_json(path)
    for part in ("train", "dev", "test"):
        names = parts.get(part)
        if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise UserError(f'{path}: expected "{part}" with a list of task names')
    return parts


def _crossfit_task(folder: Path, splits: tuple[str, ...], merge: bool) -> Task:
    """Read one task. merge: train on the train and dev files together, each example once (dev is then empty)."""
    name, files = folder.name, {}
    for split in splits:
        for part in ("train", "dev", "test"):
            found = sorted(folder.glob(f"{name}_*_{split}_{part}.tsv".replace("[", "[[]")))
            if len(found) != 1:
                raise UserError(f"{folder}: expected one file {name}_<k>_{split}_{part}.tsv, found {len(found)}")
            files[split, part] = read_tsv(found[0], name)
    train = [e for split in splits for e in files[split, "train"]]
    dev = [e for split in splits for e in files[split, "dev"]]
    test = files[splits[0], "test"]  # the same in every split
    if merge:  # the splits overlap
        train, dev = list(dict.fromkeys(train + dev)), []
    return Task(name, CROSSFIT_METRIC.get(name, "ACC"), train, dev, test)


def read_tsv(path: Path, task: str) -> list[Example]:
    """Examples of one file, written as CrossFit writes them: " [task] input" and " output".

    Lines end at "\\n" alone: some inputs hold other characters that str.splitlines would break at.
    Raises UserError with file and line for a line without an output or a file that is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    examples = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() and number > text.count("\n"):
            continue  # after the last line end
        source, *outputs = line.strip().split("\t")
        if not outputs or not source:
            raise UserError(f"{path}:{number}: expected an input, a tab and an output, found {len(outputs) + 1} column")
        examples.append(Example(f" [{task}] {source}", tuple(" " + output for output in outputs)))
    return examples


# --- Batches ----------------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One example of a batch: its task's number in the list given to `batches`, its input and one of its outputs."""

    task: int
    input: str
    output: str


def batches(tasks: list[Task], batch_size: int, seed: int) -> Iterator[list[Item]]:
    """Endless batches over the train examples of all tasks, in epochs; an example is seen once an epoch.

    Examples of like length share a batch: each epoch is shuffled, sorted by length within windows of 50 batches, cut,
    and the batches shuffled again. An epoch's last batch may be smaller. Where an example has several outputs, each
    epoch draws one. Everything is a function of (seed, epoch).
    """
    index = [(t, k) for t, task in enumerate(tasks) for k in range(len(task.train))]
    for epoch in itertools.count():
        rng = random.Random(f"{seed} {epoch}")
        items = []
        for t, k in rng.sample(index, len(index)):
            example = tasks[t].train[k]
            items.append(Item(t, example.input, rng.choice(example.outputs)))
        yield from rng.sample(cut := by_length(items, batch_size, window=50 * batch_size), len(cut))


def by_length(items: list[Item], batch_size: int, window: int) -> list[list[Item]]:
    """Cut a list into batches after sorting each window of it by length in characters."""
    ordered = []
    for start in range(0, len(items), window):
        ordered += sorted(items[start : start + window], key=lambda item: len(item.input) + len(item.output))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def collate(inputs: list[str], outputs: list[str] | None, tokenizer, encoder_decoder: bool, max_input, max_output):
    """Texts to the tensors of a Hugging Face model: input_ids, attention_mask (b, l), and labels if outputs are given.

    Over-long texts keep their first max_input and max_output tokens. Padding is masked in labels by -100.
    Encoder-decoder models read the input and are asked for the output. Decoder-only models read the input and the
    output in one row, and labels mask the input; without outputs the rows are padded on the left, for generation.
    """
    source = tokenizer(inputs, truncation=True, max_length=max_input, add_special_tokens=True).input_ids
    if outputs is None:
        ids = _pad(source, _pad_id(tokenizer), left=not encoder_decoder)
        return {"input_ids": ids, "attention_mask": _pad([[1] * len(s) for s in source], 0, left=not encoder_decoder)}
    if encoder_decoder:
        target = tokenizer(text_target=outputs, truncation=True, max_length=max_output).input_ids
        labels = _pad(target, -100)
    else:
        target = tokenizer(outputs, truncation=True, max_length=max_output - 1, add_special_tokens=False).input_ids
        target = [t + [tokenizer.eos_token_id] for t in target]
        labels = _pad([[-100] * len(s) + t for s, t in zip(source, target, strict=True)], -100)
        source = [s + t for s, t in zip(source, target, strict=True)]
    ids, mask = _pad(source, _pad_id(tokenizer)), _pad([[1] * len(s) for s in source], 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _pad_id(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _pad(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """Ragged rows to one tensor (b, longest), filled with `value` on the right, or on the left."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows, strict=True)])
