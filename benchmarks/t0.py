"""T0's benchmark on P3, the Public Pool of Prompts (Sanh et al. 2021, arXiv 2110.08207): a template makes a task.

    <data-dir>/[p3/]<config>/{train,validation,test}.{jsonl,parquet}    one config per (data set, template), as on the
                                                                    hub; test of ANLI and StoryCloze alone
    <data-dir>/few_shot/<task>/<k>_shot/<seed>_seed.jsonl           T-Few's samples (repository r-three/t-few, data/)

Train: the 313 configs of T0's training mixture, in the MHR authors' order, which is that of `t0_tasks.tsv` (config,
data set, subset, template, cap, choices or text). The cap is T-Few's: min(rows, 500,000 // templates of the data set).
Test: the 11 tasks of T-Few (Liu et al. 2022, arXiv 2205.05638), each with its templates in `t0_test_tasks.tsv` (task,
k, data set, config). The papers have no dev tasks.

T-Few draws a template each time it reads one of the k examples. Here a test task trains on all (example, template)
pairs, so each is as frequent as in T-Few. Dev and test are the same rows, because the papers report the best validation
accuracy: P3's validation rows, of ANLI and StoryCloze as in T-Few its test rows.
"""

import errno
import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import pyarrow
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet
from tqdm import tqdm

from benchmarks.tables import Rows, parts_of, table_of, unwritten_cache
from data import Benchmark, Example, Task
from plumbing.backbones import reach_hub
from plumbing.errors import UserError, say_once

REPOSITORY = "bigscience/P3"
REVISION = "main"  # unchanged since db48520 of March 2024, the first as parquet (only a full hash could be given)
STREAM = pyarrow.dataset.ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)  # not whole files
UNWRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}  # a file cannot be written
TEXTS = ("inputs_pretokenized", "targets_pretokenized")
FEATURES = {TEXTS[0]: "string", TEXTS[1]: "string", "answer_choices": ["string"], "label": "int64", "idx": "int64"}

# The fields of a few-shot row that every template of its data set shows: they identify its P3 row.
SHOWN = {
    "anli": ("premise", "hypothesis"),
    "super_glue/cb": ("premise", "hypothesis"),
    "super_glue/copa": ("premise", "choice1", "choice2"),
    "hellaswag": ("ctx_a", "ctx_b", "endings"),
    "super_glue/rte": ("premise", "hypothesis"),
    "story_cloze/2016": (*(f"input_sentence_{n}" for n in (1, 2, 3, 4)), "sentence_quiz1", "sentence_quiz2"),
    "super_glue/wic": ("sentence1", "sentence2", "word"),
    "winogrande/winogrande_xl": ("sentence", "option1", "option2"),
    "super_glue/wsc.fixed": ("text", "span1_text"),  # some templates replace the pronoun, span2_text
}


PARTS_OF = {"story": ("validation", "test"), "anli": ("train", "test")}  # what is read as train and as test rows


class Listed(NamedTuple):
    """A training task: its config, its data set with subset, its largest number of rows, whether it has choices."""

    config: str
    group: str
    cap: int
    choices: bool


def _lines(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()]


TRAIN = [
    Listed(config, f"{name}/{subset}" if subset else name, int(cap), kind == "choices")
    for config, name, subset, _, cap, kind in _lines("t0_tasks.tsv")
]
TEST: dict[str, list[str]] = {}  # task -> its configs
SHOTS, GROUP = {}, {}  # task -> k; task -> its data set
for _task, _k, _group, _config in _lines("t0_test_tasks.tsv"):
    TEST.setdefault(_task, []).append(_config)
    SHOTS[_task], GROUP[_task] = int(_k), _group
HAS_CHOICES = {task.config: task.choices for task in TRAIN} | {c: True for configs in TEST.values() for c in configs}


def load(dataset: str, data_dir: str, split: str, parts) -> Benchmark:
    """Train: always 313 tasks, those without a config without rows. Test: the tasks that are there. Dev: none.

    data_dir: a folder as above; without one, or without configs in it, P3 comes from the hub. split: the seed of the
    few-shot files. Missing tasks are named once on standard output. Raises UserError for a broken or empty file, a
    folder without any of these files, or a hub that is needed and does not answer.
    """
    if "test" in parts and not data_dir:
        raise UserError(
            "--dataset t0: few-shot examples are not on the hub: give --data-dir DIR with T-Few's few_shot/ folder "
            "(data/few_shot of the repository r-three/t-few), or try the bundled sample: --data-dir assets/samples/t0"
        )
    folder = _config_folder(Path(data_dir)) if data_dir else None
    train = _train_tasks(folder) if "train" in parts else []
    return Benchmark(train, dev=[], test=_test_tasks(folder, Path(data_dir), split) if "test" in parts else [])


# --- Tasks ------------------------------------------------------------------------------------------------------------


def _train_tasks(folder: Path | None) -> list[Task]:
    """The 313 tasks. Dev and test are P3's validation rows, if it has any (wiki_bio's "val" is not read)."""
    rows = _read(folder, [task.config for task in TRAIN])
    if not rows:
        raise UserError(f"--data-dir {folder} holds test tasks only: give a folder with training tasks as well")
    if missing := len(TRAIN) - len(rows):
        say_once(
            f"t0: {missing} of {len(TRAIN)} training tasks have no folder in {folder or REPOSITORY} and are left out"
        )
    tasks = []
    for config, group, cap, choices in TRAIN:
        parts = rows.get(config, {})
        train, held_out = parts.get("train", []), parts.get("validation", [])
        if parts:
            train = Rows(train.table, train.example, size=cap)
        metric = "Rank-ACC" if choices else "Rouge-L"  # a template has choices in all rows or in none
        tasks.append(Task(config, metric, train, held_out, held_out, group=group))
    return tasks


def _test_tasks(folder: Path | None, root: Path, seed: str) -> list[Task]:
    """The test tasks that have a few-shot file of this seed and a config; the others are named once."""
    seeds = {path.name.removesuffix("_seed.jsonl") for path in root.glob("few_shot/*/*_shot/*_seed.jsonl")}
    if not seeds:
        raise UserError(f"--data-dir {root} has no few_shot/<task>/<k>_shot/<seed>_seed.jsonl: add T-Few's files")
    if seed not in seeds:
        raise UserError(f"--split {seed} is no seed of {root / 'few_shot'}: choose {', '.join(sorted(seeds))}")
    files = {task: root / "few_shot" / task / f"{k}_shot" / f"{seed}_seed.jsonl" for task, k in SHOTS.items()}
    listed = [task for task in TEST if files[task].is_file()]
    rows = _read(folder, [config for task in listed for config in TEST[task]])
    tasks = [task for task in listed if any(config in rows for config in TEST[task])]
    if not tasks:
        raise UserError(f"--data-dir {root} holds no test task: give P3 configs and few-shot files of the same tasks")
    if left_out := [task for task in TEST if task not in tasks]:
        say_once(f"t0: no rows or no few-shot file for {', '.join(left_out)} in {root}: left out")
    there = {task: sum(config in rows for config in TEST[task]) for task in tasks}
    if fewer := [f"{n} of {len(TEST[task])} of {task}" for task, n in there.items() if n < len(TEST[task])]:
        place = folder or REPOSITORY
        say_once(f"t0: not all templates have a folder in {place}, but {', '.join(fewer)}: the others are left out")
    return [_test_task(task, {c: rows[c] for c in TEST[task] if c in rows}, files[task]) for task in tasks]


def _test_task(task: str, templates: dict[str, dict[str, Rows]], few_shot: Path) -> Task:
    """Learn from the few-shot rows under every template; score each validation row under one template, always the same.

    Row k is the same source row under all templates that keep the source's order. If the hub's do not, the scored rows
    are a sample of (row, template) in which a source row may occur twice or never.
    """
    shots = _read_shots(few_shot, task)
    by_template = [_find(shots, config, parts, few_shot) for config, parts in templates.items()]
    train = [example for same_row in zip(*by_template, strict=True) for example in same_row]
    sizes = {config: len(parts.get("validation", ())) for config, parts in templates.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        least, most = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
        raise UserError(
            f"{task}: its templates must have equally many validation rows, but {least} has {sizes[least]} and {most} "
            f"has {sizes[most]}: complete the validation files"
        )
    seen = {example.input for example in train}
    held_out = []
    for number in range(max(sizes.values())):
        config = random.Random(f"{task} {number}").choice(list(templates))
        example = templates[config]["validation"][number]
        if example.input not in seen:
            held_out.append(example)
    return Task(task, "Rank-ACC", train, held_out, held_out, group=GROUP[task])


# --- Few-shot rows ----------------------------------------------------------------------------------------------------


def _read_shots(path: Path, task: str) -> list[dict]:
    """The rows of a few-shot file: {"texts": what a P3 row must show, "label": .., "idx": ..}."""
    shots = []
    for place, row in _json_lines(path):
        texts = [text for name in SHOWN[GROUP[task]] for text in _as_list(row.get(name))]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{place}: expected the texts {', '.join(SHOWN[GROUP[task]])}")
        if type(row.get("label")) is not int or type(row.get("idx")) is not int:
            raise UserError(f"{place}: expected whole numbers as label and idx")
        shots.append({"texts": [_letters(text) for text in texts], "label": row["label"], "idx": row["idx"]})
    if len(shots) != SHOTS[task]:
        raise UserError(f"{path} holds {len(shots)} rows: expected {SHOTS[task]}, give T-Few's own file")
    return shots


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _letters(text: str) -> str:
    """Lower-case letters and digits alone: templates change case, punctuation and white space."""
    return re.sub(r"[\W_]+", "", text.lower())


def _find(shots: list[dict], config: str, parts: dict[str, Rows], few_shot: Path) -> list[Example]:
    """The P3 row of each few-shot row, under the template of this config.

    It shows the same texts and has the same label, and the same idx if P3 rows have one. The hub's rows have none, nor
    the source's order, which seqio, the pipeline that wrote P3, does not keep.
    Raises UserError if a few-shot row has no P3 row.
    """
    examples: dict[int, Example] = {}
    for rows in parts.values():
        batches = rows.table.iter(batch_size=1000)
        for batch in tqdm(batches, desc=f"few-shot rows of {config}", unit="k rows", leave=False, disable=None):
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(batch, values, strict=True))
                example, idx = rows.example(row), row.get("idx")
                shown = _letters(" ".join([example.input, *example.choices]))
                for k, shot in enumerate(shots):
                    same = example.label == shot["label"] and idx in (None, shot["idx"])
                    if same and k not in examples and _shows(shown, shot["texts"]):
                        examples[k] = example
            if len(examples) == len(shots):
                return [examples[k] for k in range(len(shots))]
    line = min(set(range(len(shots))) - set(examples)) + 1
    raise UserError(
        f"{few_shot}:{line}: no row of {config} shows these texts with this label: give the P3 rows that the few-shot "
        "files were drawn from"
    )


def _shows(shown: str, texts: list[str]) -> bool:
    """Whether `shown` holds all texts, without overlap."""
    for text in texts:
        if text not in shown:
            return False
        shown = shown.replace(text, " ", 1)
    return True


# --- P3 rows ----------------------------------------------------------------------------------------------------------


def as_example(row: dict, has_choices: bool) -> Example:
    """A P3 row as an Example, without the white space around its texts (a target is often "\\nYes").

    has_choices: whether the row must have answer_choices, one of them the target; otherwise they are not read.
    Raises ValueError with what is wrong with the row.
    """
    for name in TEXTS:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{name} must be a text that is not empty")
    source, target = (row[name].strip() for name in TEXTS)
    if not has_choices:
        return Example(source, (target,))
    choices = row.get("answer_choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("answer_choices must be a list of texts that are not empty")
    choices = tuple(choice.strip() for choice in choices)
    if target not in choices:
        raise ValueError(f"the target {target!r} is none of the answer_choices")
    label = choices.index(target) if row.get("label") is None else row["label"]
    if type(label) is not int or not 0 <= label < len(choices) or choices[label] != target:
        raise ValueError(f"the label {label!r} must be the number of the target among the answer_choices, from 0")
    return Example(source, (target,), choices, label)


def _read(folder: Path | None, configs: list[str]) -> dict[str, dict[str, Rows]]:
    """{config: {"train": rows, "validation": rows}} of the configs that a folder has, or from the hub.

    All JSON files become one table on disk; the parquet files of each part become a table of their own.
    """
    folder = folder or _download(configs)
    files = {config: _files(folder / config) for config in configs if (folder / config).is_dir()}
    json_files = [paths[0] for parts in files.values() for paths in parts.values() if paths[0].suffix == ".jsonl"]
    tables = parts_of(table_of(_read_jsonl, json_files, FEATURES), len(json_files))
    by_path = dict(zip(json_files, tables, strict=True))
    rows: dict[str, dict[str, Rows]] = {config: {} for config in files}
    for config, parts in tqdm(files.items(), desc="P3", unit="config", leave=False, disable=None):
        for part, paths in parts.items():
            table = by_path[paths[0]] if paths[0] in by_path else _read_parquet(paths, HAS_CHOICES[config])
            place = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent}/{paths[0].name.split('-')[0]}-*.parquet"
            # Checked on access: checking millions at the start would take minutes.
            rows[config][part] = Rows(table, functools.partial(_checked, table, HAS_CHOICES[config], place))
    return rows


# --- From a folder ----------------------------------------------------------------------------------------------------


def _config_folder(root: Path) -> Path | None:
    """The folder of the configs: DIR/p3 or DIR itself; None if DIR has few-shot files alone.

    Raises UserError if it holds neither, with what it seems to be.
    """
    for folder in (root / "p3", root):
        if any((folder / config).is_dir() for config in HAS_CHOICES):
            return folder
    if (root / "few_shot").is_dir():
        return None
    raise UserError(f"--data-dir {root} holds no P3 config (a folder such as ag_news_classify): {_seems(root)}")


def _seems(root: Path) -> str:
    """What a folder without P3 configs is, and what to do."""
    if not root.is_dir():
        return "there is no such folder, give another or the bundled sample, assets/samples/t0"
    if (root / "splits").is_dir() or any(root.glob("tasks/*.json")):
        return "it seems to be Super-NaturalInstructions, which is --dataset superni"
    if (root / "random.json").is_file() or any(root.glob("*/*_train.tsv")):
        return "it seems to be CrossFit, which is --dataset crossfit"
    names = ", ".join(sorted(path.name for path in root.iterdir())[:3])
    return f"it {f'holds {names}' if names else 'is empty'}, give another or the bundled sample, assets/samples/t0"


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of a config's "train" and "validation": one of JSON lines, one of parquet, or the hub's shards."""
    files = {}
    for part in ("train", "validation", "test"):
        forms = [[folder / f"{part}.jsonl"], [folder / f"{part}.parquet"], sorted(folder.glob(f"{part}-*.parquet"))]
        forms = [paths for paths in forms if paths and paths[0].is_file()]
        if len(forms) > 1:
            raise UserError(f"{folder} holds {forms[0][0].name} and {forms[1][0].name}: keep one of them")
        if forms:
            files[part] = forms[0]
    if folder.name.startswith("story_cloze") and "train" not in files:  # the hub has its validation and test rows alone
        files = {"train": files.pop("validation", None), "validation": files.pop("test", None)}
    if folder.name.startswith("anli") and "test" in files:
        files["validation"] = files["test"]  # T-Few and MHR score ANLI on its test rows
    elif folder.name.startswith("anli"):
        say_once("t0: ANLI is scored on its validation rows: there are no test rows, on which T-Few and MHR score it")
    if not files.get("train"):
        raise UserError(f"{folder} has no train.jsonl or train.parquet: add it, or delete the folder")
    return {part: files[part] for part in ("train", "validation") if files.get(part)}


def _read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a JSON lines file, each one checked. Raises UserError with file and line."""
    for place, row in _json_lines(path):
        try:
            example = as_example(row, HAS_CHOICES[path.parent.name])
            "".join([example.input, *example.outputs, *example.choices]).encode()
        except UnicodeEncodeError:
            raise UserError(f"{place}: a text holds half a character (\\ud800 to \\udfff): fix or delete it") from None
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if "idx" in row and (type(row["idx"]) is not int or not 0 <= row["idx"] < 2**63):
            raise UserError(f"{place}: idx must be a whole number from 0")
        label = example.label if example.choices else None
        texts = {TEXTS[0]: example.input, TEXTS[1]: example.outputs[0], "answer_choices": list(example.choices)}
        yield texts | {"label": label, "idx": row.get("idx")}


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for each line. Raises UserError for a line that is no JSON object, or an empty file."""
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line") from None
            except (ValueError, RecursionError) as error:  # also a number of too many digits; nested too deep
                raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, one a line")
            yield f"{path}:{number}", row
    if not number:
        raise UserError(f"{path} holds no rows: fill it, or delete it")


def _read_parquet(paths: list[Path], has_choices: bool) -> datasets.Dataset:
    """A table of the needed columns (most of P3 is token ids). Only the schema is checked here."""
    wanted = {TEXTS[0]: "string", TEXTS[1]: "string"} | ({"answer_choices": "list<string>"} if has_choices else {})
    columns = list(wanted)
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is no readable parquet file: {str(error).splitlines()[0]}") from None
        if not rows:
            raise UserError(f"{path} holds no rows: fill it, or delete it")
        types = {field.name: _type(field.type) for field in schema}
        for name, kind in wanted.items():
            if types.get(name) != kind:
                raise UserError(f"{path}: column {name} must be of type {kind}, but is {types.get(name, 'missing')}")
        columns = list(wanted) + [name for name in ("label", "idx") if types.get(name) == "int"]
    try:
        return datasets.Dataset.from_parquet(
            [str(path) for path in paths], columns=columns, batch_size=1000, fragment_scan_options=STREAM
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in UNWRITTEN:
            raise unwritten_cache(cause) from None
        raise UserError(f"{paths[0]} cannot be read to its end: {cause}") from None


def _type(kind: pyarrow.DataType) -> str:
    """The name of an Arrow type, the same for variants that hold the same values."""
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return f"list<{_type(kind.value_type)}>"
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return "string"
    return "int" if pyarrow.types.is_integer(kind) else str(kind)


def _checked(table: datasets.Dataset, has_choices: bool, place: str, row: dict) -> Example:
    """A row as an Example. Raises UserError with the file and the row's number."""
    try:
        return as_example(row, has_choices)
    except ValueError as error:
        raise UserError(f"{place}, row {_number(table, row)}: {error}") from None


def _number(table: datasets.Dataset, row: dict) -> int:
    """The number, from 1, of the first row of a table that equals this one; only rows with its input are compared."""
    column, text = table.data.column(TEXTS[0]), row[TEXTS[0]]
    same = column.is_null() if text is None else pyarrow.compute.equal(column, text)
    numbers = pyarrow.compute.indices_nonzero(same).to_pylist()
    return next(number for number in numbers if table[number] == row) + 1


# --- From the hub -----------------------------------------------------------------------------------------------------


def _download(configs: list[str]) -> Path:
    """A folder with the hub's parquet files of these configs, without unused test rows; cached files are reused.

    Not datasets.load_dataset, which reads P3's list of 660 configs again for each config (about 3 seconds, even if all
    is cached) and downloads all test rows. Raises UserError if the hub does not answer or has none of the configs.
    """
    reach_hub()
    wanted = [
        f"{config}/{part}-*.parquet"
        for config in configs
        for part in PARTS_OF.get(config.split("_")[0], ("train", "validation"))
    ]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(REPOSITORY, repo_type="dataset", revision=REVISION, allow_patterns=wanted)
        )
        if not any((folder / config).is_dir() for config in configs):
            raise FileNotFoundError(f"no files of {configs[0]}")
    except Exception as error:  # the library raises errors of many kinds without a common base
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError(
                "--dataset t0: the hub does not answer: give --data-dir DIR (a folder of <config>/<split>.jsonl or "
                ".parquet), or try the bundled sample: --data-dir assets/samples/t0 --backbone tiny"
            ) from None
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"--dataset t0: {REPOSITORY} cannot be loaded from the hub: try again or give --data-dir ({reason})"
        ) from None
    return folder
