"""CrossFit, the NLP Few-shot Gym (Ye, Lin and Ren, 2021; https://github.com/INK-USC/CrossFit), from its official files.

    <data-dir>/<task>/<task>_<k>_<split>_{train,dev,test}.tsv      splits 100 13 21 42 87
    <data-dir>/<partition>                                         which tasks are for training, dev and test

One example per line, the last line too ends in a line feed. Columns separated by tabs: input, output, other acceptable
outputs. Classification tasks have k = 16 examples per label, the others k = 32 in all. The test file is the same for
all splits.

Use of the files, as in Polytropon section 4.1: a training task learns from the train and dev files of all five splits,
concatenated, repeats included; a dev or test task is few-shot, with the train and dev file of one split. The code of
MHR's authors differs: it uses the dev files of training tasks for early stopping.
"""

import codecs
import glob
import itertools
from collections.abc import Sequence
from pathlib import Path

from data import PARTS, Benchmark, Example, Task
from plumbing.errors import UserError, say_once
from plumbing.folders import read_json

SPLITS = ("100", "13", "21", "42", "87")
TEST_LINES = 10_000  # the official code scores at most this many lines of a test file, the first ones
# The metric of each task as in CrossFit's metrics.py; ACC for every task not named here.
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
# The type of each of the gym's 160 tasks, by which Polytropon's EXPERT routes: the upper level of the CrossFit authors'
# ontology (INK-USC/CrossTaskMoE, playground/plot_utils/ontology.json, commit 251fb95). Its classification and question
# answering tasks are those of CrossFit's own partition files.
_TYPES = Path(__file__).with_name("crossfit_types.tsv").read_text(encoding="utf-8")
TYPE = dict(line.split("\t") for line in _TYPES.splitlines())


def load(dataset: str, data_dir: str, split: str, parts: Sequence[str], partition: str = "random.json") -> Benchmark:
    """The tasks of a partition that have a folder in data_dir; the others are named once on standard output.

    split: which few-shot examples dev and test tasks get. parts: the lists to read; the others are empty. partition: a
    file in data_dir, or a path to one elsewhere, in the format of CrossFit's dataloader/custom_tasks_splits.
    A training task's id is its place among the partition's sorted names. One without a folder keeps its place, without
    examples, so that the ids after it do not change.
    Raises UserError for a missing or broken file, and if none of the tasks has a folder.
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
    """The partition file, in the data folder or at its path. Raises UserError if it does not exist."""
    for path in (root / partition, Path(partition)):
        if path.is_file():
            return path
    raise UserError(
        f"--data-dir {root} has no {partition} (it holds {what_is_in(root)}): give the folder of CrossFit's task "
        "folders, with that file from CrossFit's dataloader/custom_tasks_splits, or the file's path by --partition"
    )


def what_is_in(root: Path) -> str:
    """What a folder seems to hold, for an error message."""
    if not root.is_dir():
        return "nothing: there is no such folder"
    if (root / "p3").is_dir() or (root / "few_shot").is_dir():
        return "what looks like T0, for --dataset t0"
    if (root / "tasks").is_dir() or (root / "splits").is_dir():
        return "what looks like Super-NaturalInstructions, for --dataset superni"
    names = sorted(path.name for path in root.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "") if names else "nothing"


def read_partition(path: Path) -> dict[str, list[str]]:
    """A partition file: {"train": names, "dev": names, "test": names}, sorted. A name is a folder's, never a path.

    The lists of dev and test tasks may be empty: some official partitions evaluate on their dev tasks. One of those
    (train_non_nli_test_nli.json) has a task both in train and in dev: this is allowed, with a note on standard output.
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
    """Whether a name can be that of a subfolder: not empty, no separator, not . or .."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def make_task(name: str, train: list[Example], dev: list[Example], test: list[Example]) -> Task:
    """A task with its metric, and its type as its group ("" for a task that is not one of the gym's)."""
    return Task(name, METRIC.get(name, "ACC"), train, dev, test, group=TYPE.get(name, ""))


def training_task(folder: Path, split: str) -> Task:
    """A task of pre-training: the train and dev files of all splits as train, no dev examples."""
    train = [example for s in SPLITS for part in ("train", "dev") for example in read_part(folder, s, part)]
    return make_task(folder.name, train, [], read_part(folder, split, "test"))


def few_shot_task(folder: Path, split: str) -> Task:
    """A held-out task: the train, dev and test file of one split."""
    train, dev, test = (read_part(folder, split, part) for part in PARTS)
    return make_task(folder.name, train, dev, test)


def read_part(folder: Path, split: str, part: str) -> list[Example]:
    """A task's train, dev or test examples in a split. Raises UserError unless there is exactly one such file."""
    name = folder.name
    files = sorted(folder.glob(f"{glob.escape(name)}_[0-9]*_{split}_{part}.tsv"))
    if len(files) != 1:
        raise UserError(
            f"{folder}: expected one file {name}_<k>_{split}_{part}.tsv, found {len(files)}: "
            + ("remove all but one" if files else "restore the file, or remove the folder to leave the task out")
        )
    return read_tsv(files[0], name, TEST_LINES if part == "test" else None)


def read_tsv(path: Path, task: str, limit: int | None = None) -> list[Example]:
    """Examples of one file, or of its first `limit` lines.

    Only "\n" ends a line: some inputs hold other characters at which str.splitlines would break.
    Raises UserError as `example_of` does, and for a file that has no lines or cannot be read. A file truncated between
    two lines goes unnoticed: the format has no count of lines.
    """
    try:
        with open(path, "rb") as lines:
            rows = list(itertools.islice(lines, limit))
        rows = [row.removeprefix(codecs.BOM_UTF8) for row in rows]  # of the file, or of those that were joined in it
        examples = [example_of(row, task, f"{path}:{number}") for number, row in enumerate(rows, 1)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not examples:
        raise UserError(f"{path} is empty: restore the file, it needs at least one example")
    return examples


def example_of(line: bytes, task: str, where: str) -> Example:
    """One line as CrossFit's code writes it for the model: " [task] input" and " output", each with a space before.

    Raises UserError, beginning with `where` ("file:line"), for a line without a line feed (every official line has
    one), that is not UTF-8, or that has no output or an empty one.
    """
    if not line.endswith(b"\n"):
        raise UserError(f"{where}: the file ends within this line: restore it, or end the line if it is whole")
    try:
        source, *outputs = line.decode("utf-8").strip().split("\t")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None
    if not outputs:
        raise UserError(f"{where}: expected an input, a tab and an output, found one column: fix or delete it")
    if not all(output.strip() for output in outputs):
        raise UserError(f"{where}: an output is empty: fill or delete it")
    if any("\r" in output for output in outputs):
        raise UserError(
            f"{where}: a carriage return in an output may hide the end of a line: end lines with line feeds"
        )
    return Example(f" [{task}] {source}", tuple(f" {output}" for output in outputs))
