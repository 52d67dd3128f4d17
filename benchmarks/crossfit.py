"""CrossFit, the NLP Few-shot Gym (Ye, Lin and Ren, 2021; https://github.com/INK-USC/CrossFit), from its official files.

    <data-dir>/<task>/<task>_<k>_<split>_{train,dev,test}.tsv      splits 100 13 21 42 87
    <data-dir>/<partition>                                         which tasks are for training, dev and test

One example a line, also the last one with a line end; columns separated by tabs: input, output, other acceptable
outputs. Classification tasks have k = 16 examples a label, the others k = 32 in all. The test file does not depend on
the split.

Use of the files, as in Polytropon section 4.1: a training task learns from the train and dev files of all five splits,
one after the other, repeats included ("we concatenate"); a dev or test task is few-shot, with the train and dev file of
one split. Unlike this, the code of MHR's authors keeps the dev files of training tasks for early stopping.
"""

import glob
import itertools
from collections.abc import Sequence
from pathlib import Path

from plumbing.errors import UserError
from plumbing.folders import read_json
from benchmarks.tables import say_once
from data import PARTS, Benchmark, Example, Task

SPLITS = ("100", "13", "21", "42", "87")
TEST_LINES = 10_000  # the official code scores no more than the first so many lines of a test file
# The metric of each task as CrossFit's own metrics.py has it; every task not named here is measured by ACC.
_METRICS = {
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
METRIC = {task: metric for metric, tasks in _METRICS.items() for task in tasks.split()}
# The type of each of the gym's 160 tasks, by which Polytropon's EXPERT routes: the upper level of its authors' ontology
# in their next paper's repository (INK-USC/CrossTaskMoE, playground/plot_utils/ontology.json, commit 251fb95). Its
# classification and question answering tasks are those of CrossFit's own partition files.
_TYPES = Path(__file__).with_name("crossfit_types.tsv").read_text(encoding="utf-8")
TYPE = dict(line.split("\t") for line in _TYPES.splitlines())


def load(dataset: str, data_dir: str, split: str, parts: Sequence[str], partition: str = "random.json") -> Benchmark:
    """The tasks of a partition that have a folder in data_dir; the others are named once on standard output.

    split: the few-shot examples of dev and test tasks. parts: the lists to read; the others come back empty.
    partition: a file in data_dir, or a path to one elsewhere, in the form of CrossFit's dataloader/custom_tasks_splits.
    A training task's id is its place among the partition's sorted names: without a folder it stays, with no examples,
    so that the ids of those after it stay too.
    Raises UserError for a missing or broken file, and if none of the tasks is here.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split} is not one of CrossFit's: choose {', '.join(SPLITS)}")
    if not data_dir:
        raise UserError(
            "--dataset crossfit needs --data-dir, the folder of the few-shot gym's task folders: to try it on a small "
            "sample give --data-dir assets/samples/crossfit --backbone tiny"
        )
    root = Path(data_dir)
    names = read_partition(find_partition(root, partition))
    wanted = list(dict.fromkeys(name for part in parts for name in names[part]))
    absent = [name for name in wanted if not (root / name).is_dir()]
    needed = names["train"] if "train" in parts else wanted
    if needed and set(needed) <= set(absent):
        raise UserError(
            f"--data-dir {root} has no {'training' if 'train' in parts else 'held-out'} task of {partition} (it holds "
            f"{what_is_in(root)}): give the folder that holds the task folders"
        )
    if absent:
        some = ", ".join(absent[:3]) + (", ..." if absent[3:] else "")
        say_once(f"crossfit: {len(absent)} tasks of {partition} have no folder in {root} and are left out: {some}")
    train, dev, test = (names[part] if part in parts else [] for part in PARTS)
    return Benchmark(
        [make_task(name, [], [], []) if name in absent else training_task(root / name, split) for name in train],
        [few_shot_task(root / name, split) for name in dev if name not in absent],
        [few_shot_task(root / name, split) for name in test if name not in absent],
    )


def find_partition(root: Path, partition: str) -> Path:
    """The partition file: in the data folder, or else wherever its path leads. Raises UserError if it is nowhere."""
    for path in (root / partition, Path(partition)):
        if path.is_file():
            return path
    raise UserError(
        f"--data-dir {root} has no {partition} (it holds {what_is_in(root)}): give the folder of CrossFit's task "
        "folders, with that file from CrossFit's dataloader/custom_tasks_splits, or the file's path by --partition"
    )


def what_is_in(root: Path) -> str:
    """What a folder seems to hold, in words, for an error message."""
    if not root.is_dir():
        return "nothing, for there is no such folder"
    if (root / "p3").is_dir() or (root / "few_shot").is_dir():
        return "what looks like T0, for --dataset t0"
    if (root / "tasks").is_dir() or (root / "splits").is_dir():
        return "what looks like Super-NaturalInstructions, for --dataset superni"
    names = sorted(path.name for path in root.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "") if names else "nothing"


def read_partition(path: Path) -> dict[str, list[str]]:
    """A partition file: {"train": names, "dev": names, "test": names}, sorted. A name is a folder's, never a path.

    The lists of dev and test tasks may be empty: some official partitions evaluate on their dev tasks. One of those
    (train_non_nli_test_nli.json) has a task both in train and in dev: that is allowed and said on standard output.
    Raises UserError for anything else.
    """
    content = read_json(path)
    for part in PARTS:
        names = content.get(part)
        if not isinstance(names, list) or not all(isinstance(n, str) and is_folder_name(n) for n in names):
            raise UserError(f'{path}: expected "{part}" with a list of task names: give a partition file of CrossFit')
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f'{path}: task {twice[0]} is named twice in "{part}": name it once')
    if not content["train"]:
        raise UserError(f'{path}: "train" is empty: name at least one training task')
    for one, other in itertools.combinations(PARTS, 2):
        both = sorted(set(content[one]) & set(content[other]))
        if both and (one, other) == ("train", "dev"):
            say_once(
                f'crossfit: {path} has {", ".join(both)} in "train" and in "dev": dev tasks that pre-training sees'
            )
        elif both:
            raise UserError(f'{path}: task {both[0]} is in "{one}" and in "{other}": leave it in one of them')
    return {part: sorted(content[part]) for part in PARTS}


def is_folder_name(name: str) -> bool:
    """Whether a name is that of a folder right here: not empty, no separator, not the folder above."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def make_task(name: str, train: list[Example], dev: list[Example], test: list[Example]) -> Task:
    """A task with its metric and, as its group, its type: "" for a task that is not of the gym."""
    return Task(name, METRIC.get(name, "ACC"), train, dev, test, group=TYPE.get(name, ""))


def training_task(folder: Path, split: str) -> Task:
    """A task of pre-training: the train and dev files of all splits to learn from, no dev examples left."""
    train = [example for s in SPLITS for part in ("train", "dev") for example in read_split(folder, s, part)]
    return make_task(folder.name, train, [], read_split(folder, split, "test"))


def few_shot_task(folder: Path, split: str) -> Task:
    """A held-out task: the train, dev and test file of one split."""
    train, dev, test = (read_split(folder, split, part) for part in PARTS)
    return make_task(folder.name, train, dev, test)


def read_split(folder: Path, split: str, part: str) -> list[Example]:
    """The examples of one file of a task. Raises UserError unless there is exactly one such file."""
    name = folder.name
    found = sorted(folder.glob(f"{glob.escape(name)}_[0-9]*_{split}_{part}.tsv"))
    if len(found) != 1:
        raise UserError(
            f"{folder}: expected one file {name}_<k>_{split}_{part}.tsv, found {len(found)}: "
            + ("remove all but one" if found else "restore the file, or remove the folder to leave the task out")
        )
    return read_tsv(found[0], name, TEST_LINES if part == "test" else None)


def read_tsv(path: Path, task: str, limit: int | None = None) -> list[Example]:
    """Examples of one file, or of its first `limit` lines.

    Lines end at "\n" alone: some inputs hold other characters that str.splitlines would break at.
    Raises UserError as `example_of` does, and for a file that has no lines or cannot be read. A file that was cut
    between two lines looks whole: the format has no count of them.
    """
    try:
        with open(path, "rb") as lines:
            numbered = enumerate(itertools.islice(lines, limit), 1)
            examples = [example_of(line, task, f"{path}:{number}") for number, line in numbered]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not examples:
        raise UserError(f"{path} is empty: restore the file, it needs at least one example")
    return examples


def example_of(line: bytes, task: str, where: str) -> Example:
    """One line as CrossFit's code writes it for the model: " [task] input" and " output", each with a space before.

    where: "file:line", with which a UserError begins: the line has no end, as every line of the official files has, is
    not UTF-8, has no output, or an empty one.
    """
    if not line.endswith(b"\n"):
        raise UserError(f"{where}: the file ends within this line: restore it, or end the line if it is whole")
    try:
        source, *outputs = line.decode("utf-8").strip().split("\t")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None
    if not outputs:
        raise UserError(f"{where}: expected an input, a tab and an output, found one column: mend or delete the line")
    if not all(output.strip() for output in outputs):
        raise UserError(f"{where}: an output is empty: fill or delete it")
    return Example(f" [{task}] {source}", tuple(f" {output}" for output in outputs))
