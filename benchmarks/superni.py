"""Super-NaturalInstructions (Wang et al. 2022; https://github.com/allenai/natural-instructions), English track.

A task whose file names another "Output_language" is scored as in the official cross-lingual track.

    <data-dir>/splits/default/{train,test}_tasks.txt      which tasks are for training and test, one name a line
    <data-dir>/tasks/<task>.json                          Definition, Categories, Instances (id, input, outputs), ...

Without a data_dir the hub's copy is used: one file per task, one line per (instance, reference), no categories.

Train, dev and test are cut as by the MHR authors (misc/create_ni_dataset.py of microsoft/mttl), with two differences.
They keep one random reference for dev and test; we score against all, as the official evaluation does. If a test task
has fewer than 100 + 200 instances, they fill train first; we halve the rest, so that dev is not empty.
"""

import itertools
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import huggingface_hub

from benchmarks.metrics import XLINGUAL, refuse_unread
from benchmarks.tables import Rows, parts_of, table_of
from data import Benchmark, Example, Task
from plumbing.backbones import reach_hub
from plumbing.errors import UserError, say_once
from plumbing.flags import split_number
from plumbing.folders import read_json

REPOSITORY = "Muennighoff/natural-instructions"  # made from the official tasks folder at commit 6174af6 of Dec 2022
REVISION = "a29a9757125f4bb1c26445ad0d2ef7d9b2cc9c4c"
TAIL = "\nOutput:"  # inputs that are too long are cut before it
# Largest number of instances in a task's train, dev and test. 100 is max_num_instances_per_task of the official
# Tk-Instruct scripts; the MHR authors' pretrain.json names a folder "42-100": seed 42, 100 instances.
CAP = 100
TRAIN_SEED = 42
FEWEST_HELD_OUT = 25  # of a training task whose file has at most CAP + 25 instances (MHR authors)
COLUMNS = {"definition": "string", "input": "string", "outputs": ["string"], "group": "string", "metric": "string"}


def load(dataset: str, data_dir: str, split: str, parts) -> Benchmark:
    """The tasks of splits/default, in the lists' order. No dev tasks; group is a task's category ("" from the hub).

    Training tasks: 100 instances drawn with a fixed seed are train, up to 100 others test, dev is empty. Of a file with
    125 or fewer, 25 (at most half) are test and the rest is train. A task without a file keeps its place and has no
    examples.
    Test tasks: the first 100 instances of the file are test, as in the official evaluation. Of the others, shuffled by
    the whole number `split` (the papers': 13, 42, 58), 100 are train and 100 dev, or half each if there are fewer. A
    task without a file is left out. A task of exactly 100 instances (task393) has a test set only.
    Raises UserError for a missing or broken file, and if the hub does not answer.
    """
    number = split_number(split, "superni: the papers' are 13, 42 and 58")
    files = {part: _files(part, data_dir) for part in ("train", "test") if part in parts}
    if both := sorted(files.get("train", {}).keys() & files.get("test", {}).keys()):
        raise UserError(f"--data-dir {data_dir}: {both[0]} is listed for train and for test: take it from one list")
    train = [_train_task(*item) for item in _tables(_train_rows, files.get("train", {}))]
    test = [_test_task(*item, number) for item in _tables(_rows, files.get("test", {})) if item[1] is not None]
    return Benchmark(train, [], test)


def example(row: dict) -> Example:
    """A row of the table as an Example: the MHR authors' prompt without demonstrations, and all references.

    Tk-Instruct's own prompt differs: it says "Definition: " instead of "Task definition: ", and has an empty line after
    the definition and a space after "Output:" (which cutting an input that is too long may lose).
    """
    definition = _stopped(f"Task definition: {row['definition'].strip()}")
    source = _stopped(f"Input: {row['input'].strip()}")
    text = f"{definition}\nNow complete the following example -\n{source}{TAIL}"
    return Example(text, tuple(output.strip() for output in row["outputs"]), tail=TAIL)


def _stopped(text: str) -> str:
    """Text with a full stop added, unless it ends in (ASCII) punctuation: the official rule."""
    return text if text[-1] in string.punctuation else text + "."


# --- Tasks ------------------------------------------------------------------------------------------------------------


def _tables(read: Callable, files: dict[str, Path | None]) -> list[tuple[str, datasets.Dataset | None]]:
    """Each task's name and its rows from `read`, memory-mapped; None for a task without a file."""
    paths = [path for path in files.values() if path]
    tables = iter(parts_of(table_of(read, paths, COLUMNS), len(paths)))
    return [(name, next(tables) if path else None) for name, path in files.items()]


def _train_task(name: str, table: datasets.Dataset | None) -> Task:
    """A training task from its rows in the order of `_train_rows`."""
    if table is None:
        return Task(name, "Rouge-L", [], [], [], also=("SuperNI-EM",))
    count = len(table)
    held_out = count - CAP if count > CAP + FEWEST_HELD_OUT else min(FEWEST_HELD_OUT, count // 2)
    train, test = (_some(table, range(a, b)) for a, b in itertools.pairwise((0, count - held_out, count)))
    return Task(name, table[0]["metric"], train, [], test, group=table[0]["group"], also=("SuperNI-EM",))


def _test_task(name: str, table: datasets.Dataset, split: int) -> Task:
    """A test task from its rows in the file's order."""
    rest = list(range(CAP, len(table)))
    random.Random(split).shuffle(rest)
    shots = min(CAP, -(-len(rest) // 2))
    parts = rest[:shots], rest[shots : shots + CAP], range(min(CAP, len(table)))
    parts = (_some(table, part) for part in parts)
    return Task(name, table[0]["metric"], *parts, group=table[0]["group"], also=("SuperNI-EM",))


def _some(table: datasets.Dataset, rows: Sequence[int]) -> Sequence[Example]:
    return Rows(table.select(rows), example) if rows else []  # select refuses an empty range at the end


# --- Which files ------------------------------------------------------------------------------------------------------


def _files(part: str, data_dir: str) -> dict[str, Path | None]:
    """The tasks of the part's list and their files, None for a missing one; says once which are missing."""
    if data_dir:
        listing = Path(data_dir) / "splits" / "default" / f"{part}_tasks.txt"
        if not listing.is_file():
            raise _not_superni(Path(data_dir), f"no splits/default/{listing.name}")
        folder, ending = Path(data_dir) / "tasks", ".json"
    else:
        listing = Path(__file__).with_name(f"superni_{part}_tasks.txt")
        folder, ending = _download(part), f"_{part}.jsonl"
    files = {name: folder / (name + ending) for name in _names(listing)}
    absent = [name for name, path in files.items() if not path.is_file()]
    if len(absent) == len(files):
        raise _not_superni(folder.parent, f"none of the tasks of {listing} in {folder.name}/")
    if absent:
        some = ", ".join(absent[:3]) + (", ..." if absent[3:] else "")
        say_once(
            f"superni: {len(absent)} of {len(files)} {part} tasks have no file in {folder} and are left out: {some}"
        )
    return {name: None if name in absent else path for name, path in files.items()}


def _names(listing: Path) -> list[str]:
    """The task names of a list, one per line. Raises UserError for a repeated name, a path, or an empty list."""
    try:
        lines = listing.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{listing} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{listing} is not UTF-8 at byte {error.start}") from None
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not re.fullmatch(r"[\w.-]*", name):
            raise UserError(f"{listing}:{number}: expected the name of a task, found {name!r}")
        if name in names:
            raise UserError(f"{listing}:{number}: {name} stands in line {names[name]} already: remove one of the two")
        if name:
            names[name] = number
    if not names:
        raise UserError(f"{listing} lists no task: write one name a line")
    return list(names)


def _not_superni(root: Path, lack: str) -> UserError:
    """The error for a folder that lacks something, with what it seems to hold instead."""
    entries = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if not root.is_dir():
        holds = "there is no such folder"
    elif not entries:
        holds = "it is empty"
    elif "p3" in entries or any(root.glob("*/*.jsonl")) or any(root.glob("*/*.parquet")):
        holds = "it looks like a folder for --dataset t0"
    elif "random.json" in entries or any(root.glob("*/*_train.tsv")):
        holds = "it looks like a folder for --dataset crossfit"
    else:
        holds = f"it holds {', '.join(entries[:3])}{', ...' if entries[3:] else ''}"
    return UserError(f"--data-dir {root} has {lack} ({holds}): give the official folder with splits/ and tasks/")


def _download(part: str) -> Path:
    """The folder of the part's files from the hub, or from its cache. Raises UserError if neither has them."""
    reach_hub()
    try:
        # Not datasets.load_dataset: it would make a table of all 5 million lines, of which few are used.
        root = huggingface_hub.snapshot_download(
            REPOSITORY, repo_type="dataset", revision=REVISION, allow_patterns=f"{part}/*.jsonl"
        )
        if not any((Path(root) / part).glob("*.jsonl")):
            raise FileNotFoundError(part)  # offline, and only the other part is in the cache
        return Path(root) / part
    except Exception as error:  # network and disk fail in any way
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "the hub does not answer" if offline else f"the download from the hub failed ({type(error).__name__})"
        raise UserError(
            f"--dataset superni: {why}: give --data-dir DIR (the official folder with splits/ and tasks/), or try the "
            "bundled sample: --data-dir assets/samples/superni --backbone tiny"
        ) from None


# --- What is in a file ------------------------------------------------------------------------------------------------


def _train_rows(path: Path) -> Iterator[dict]:
    """The rows of a training task that are used, in an order with a fixed seed: train first, then test."""
    rows = list(_rows(path))
    random.Random(TRAIN_SEED).shuffle(rows)
    yield from rows[: 2 * CAP]


def _rows(path: Path) -> Iterator[dict]:
    """All instances of one task in the file's order. Raises UserError if it has none."""
    rows = _official_rows(path) if path.suffix == ".json" else _hub_rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} has no instances: take the task from the list, or get the file anew")
    yield from itertools.chain([first], rows)


def _official_rows(path: Path) -> Iterator[dict]:
    task = read_json(path)
    for key in ("Definition", "Categories", "Instances"):
        if key not in task:
            raise UserError(f'{path} has no "{key}": it is no task file of Super-NaturalInstructions')
    # The official code reads the first definition; older files have a string instead of a list.
    definition, group = (_first_text(task[key], f'{path}: "{key}"') for key in ("Definition", "Categories"))
    languages = task.get("Output_language") or ["English"]
    english, every = languages in ("English", ["English"]), []
    if not isinstance(task["Instances"], list):
        raise UserError(f'{path}: "Instances" must be a list of objects')
    for k, instance in enumerate(task["Instances"]):
        place = f"{path}: Instances[{k}]"
        if not isinstance(instance, dict):
            raise UserError(f'{place} must be an object with "input" and "output"')
        outputs = instance.get("output")
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if not _is_text(instance.get("input")):
            raise UserError(f'{place} must have an "input", a string')
        if not isinstance(outputs, list) or not outputs or not all(_is_text(o) and o.strip() for o in outputs):
            raise UserError(f'{place} must have an "output", a list of one or more strings that are not empty')
        every += outputs
        row = {"definition": definition, "input": instance["input"], "outputs": outputs, "group": group}
        yield row | {"metric": "Rouge-L" if english else XLINGUAL}
    if english and every:
        refuse_unread(every, f"{path}: ")


def _first_text(value, place: str) -> str:
    """The first of a list of texts, or a single text."""
    text = value[0] if isinstance(value, list) and value else value
    if not _is_text(text) or not text.strip():
        raise UserError(f"{place} must be a list of strings, the first not empty")
    return text


def _is_text(value) -> bool:
    """Whether a value from JSON is a string that can be written as UTF-8: half of a surrogate pair cannot."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _hub_rows(path: Path) -> Iterator[dict]:
    """The hub's lines, joined by instance: its references stand in consecutive lines."""
    for _, lines in itertools.groupby(_hub_lines(path), key=lambda line: (line["id"], line["inputs"])):
        first, *more = lines
        outputs = [line["targets"] for line in (first, *more)]
        row = {"definition": first["definition"], "input": first["inputs"], "outputs": outputs, "group": ""}
        yield row | {"metric": "Rouge-L"}


def _hub_lines(path: Path) -> Iterator[dict]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8; nested too deep
                raise UserError(f"{path}:{number} is not valid JSON in UTF-8: {error}") from None
            keys = ("id", "definition", "inputs", "targets")
            if not isinstance(row, dict) or not all(_is_text(row.get(key)) for key in keys):
                raise UserError(f"{path}:{number} must be an object with the strings {', '.join(keys)}")
            if not row["definition"].strip() or not row["targets"].strip():
                raise UserError(f"{path}:{number} has an empty definition or target")
            yield row
