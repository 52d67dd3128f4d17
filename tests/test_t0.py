"""The reader of T0's benchmark: task lists, files in both formats, few-shot rows, the hub, and every broken input."""

import functools
import json
import re
import resource
import shutil
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

import data
from benchmarks import load, t0
from benchmarks.tables import Rows
from plumbing.errors import UserError, say_once

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "assets" / "samples" / "t0"
REAL = ROOT.parent / "shared" / "data" / "t0"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the T0 sample is not at {REAL}")
SEEDS = ("42", "1024", "0")
TOPIC, WORDS = "ag_news_classify", "glue_mrpc_generate_paraphrase"  # a config with choices, one without


def row(number: int, target: str = "\nred", **more) -> dict:
    """A P3 row with choices, invented here, with white space around its texts as on the hub."""
    choices = more.pop("answer_choices", ["red ", "green"])
    return {
        "inputs_pretokenized": f" apple {number}? ",
        "targets_pretokenized": target,
        "answer_choices": choices,
    } | more


def write(folder: Path, config: str, split: str, rows: list, form: str = "jsonl") -> Path:
    """A split's file in the layout <folder>/<config>/<split>.<form>; rows are dicts, or lines as bytes."""
    path = folder / config / f"{split}.{form}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def train_of(folder: Path, config: str) -> data.Task:
    (task,) = [task for task in t0.load("t0", str(folder), "0", ("train",)).train if task.name == config]
    return task


@pytest.fixture(scope="module")
def real():
    """The real sample's training tasks, and its test tasks for each seed."""
    if not REAL.is_dir():
        pytest.skip(f"the T0 sample is not at {REAL}")
    return {"train": t0.load("t0", str(REAL), "42", ("train",)).train} | {
        seed: t0.load("t0", str(REAL), seed, ("test",)).test for seed in SEEDS
    }


# --- The lists --------------------------------------------------------------------------------------------------------


def test_the_training_list():
    configs = [task.config for task in t0.TRAIN]
    assert len(configs) == len(set(configs)) == 313
    groups = Counter(task.group for task in t0.TRAIN)
    assert len(groups) == 38 and len({group.split("/")[0] for group in groups}) == 34
    by_hand = {"glue/mrpc": 7, "glue/qqp": 6, "trec": 18, "adversarial_qa/droberta": 5, "quail": 13, "xsum": 10}
    assert {group: groups[group] for group in by_hand} == by_hand
    rows = t0._lines("t0_tasks.tsv")  # the order: by data set, subset ("None" without) and template, as one string
    keys = [f"{name}/{subset or None}/{template}" for _, name, subset, template, _, _ in rows]
    assert keys == sorted(keys)
    for config, name, subset, template, _, _ in rows:  # promptsource's names, other characters made underscores
        assert config == re.sub("[^A-Za-z0-9_.]+", "_", "_".join(filter(None, (name, subset, template))))


def test_caps_follow_the_rule():
    templates = Counter(task.group for task in t0.TRAIN)
    for task in t0.TRAIN:
        assert 1 <= task.cap <= 500_000 // templates[task.group], task.config
    caps = {task.group: task.cap for task in t0.TRAIN}
    assert len({(task.group, task.cap) for task in t0.TRAIN}) == len(caps)  # one cap a data set
    sizes = {
        "ag_news": 120_000,
        "amazon_polarity": 3_600_000,
        "glue/mrpc": 3_668,
        "imdb": 25_000,
        "dbpedia_14": 560_000,
    }
    for group, size in sizes.items():
        assert caps[group] == min(size, 500_000 // templates[group])


def test_the_test_list():
    assert {task: len(configs) for task, configs in t0.TEST.items()} == {
        "anli-r1": 15, "anli-r2": 15, "anli-r3": 15, "cb": 15, "copa": 8, "h-swag": 4, "rte": 10, "storycloze": 5,
        "wic": 10, "winogrande": 5, "wsc": 10,
    }  # fmt: skip
    configs = [config for configs in t0.TEST.values() for config in configs]
    assert len(configs) == len(set(configs)) == 112
    assert not set(configs) & {task.config for task in t0.TRAIN}
    assert t0.SHOTS == {
        "anli-r1": 50, "anli-r2": 50, "anli-r3": 50, "cb": 32, "copa": 32, "h-swag": 20, "rte": 32, "storycloze": 70,
        "wic": 32, "winogrande": 50, "wsc": 32,
    }  # fmt: skip
    assert set(t0.GROUP.values()) == set(t0.SHOWN)


@needs_real
def test_the_lists_are_the_official_ones():
    official = [line.split("\t") for line in (REAL / "train_tasks.txt").read_text(encoding="utf-8").splitlines()]
    assert [line[:4] for line in t0._lines("t0_tasks.tsv")] == official
    head, *rows = [line.split("\t") for line in (REAL / "train_tasks_meta.tsv").read_text().splitlines()]
    meta = [dict(zip(head, cells, strict=True)) for cells in rows]
    assert [task.cap for task in t0.TRAIN] == [int(cells["cap_tfew"]) for cells in meta]
    assert [task.choices for task in t0.TRAIN] == [cells["has_answer_choices"] == "True" for cells in meta]
    tests = [line.split("\t") for line in (REAL / "eval_tasks.txt").read_text(encoding="utf-8").splitlines()]
    assert [(task, config) for task, configs in t0.TEST.items() for config in configs] == [(r[0], r[1]) for r in tests]


# --- Rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_stripped_and_labelled():
    example = t0.as_example(row(1, "\ngreen "), True)
    assert example == data.Example("apple 1?", ("green",), ("red", "green"), 1)
    assert t0.as_example(row(1, " any words\n"), False) == data.Example("apple 1?", ("any words",))


@pytest.mark.parametrize(
    "broken, message",
    [
        (dict(targets_pretokenized=" \n"), "targets_pretokenized must be a text that is not empty"),
        (dict(targets_pretokenized=None), "targets_pretokenized must"),
        (dict(inputs_pretokenized=7), "inputs_pretokenized must"),
        (dict(inputs_pretokenized=""), "inputs_pretokenized must"),
        (dict(answer_choices="red"), "answer_choices must be a list"),
        (dict(answer_choices=None), "answer_choices must be a list"),
        (dict(answer_choices=["red", " "]), "answer_choices must be a list"),
        (dict(answer_choices=["red", 2]), "answer_choices must be a list"),
        (dict(answer_choices=[]), "the target 'red' is none of the answer_choices"),
        (dict(targets_pretokenized="blue"), "the target 'blue' is none of the answer_choices"),
        (dict(label=1), "the label 1 must be the number of the target"),
        (dict(label=2), "the label 2 must"),
        (dict(label=-2), "the label -2 must"),
        (dict(label="0"), "the label '0' must"),
        (dict(label=True), "the label True must"),
    ],
)
def test_broken_rows(tmp_path, broken, message):
    path = write(tmp_path, TOPIC, "train", [row(1), row(2) | broken, row(3)])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:2: {re.escape(message)}"):
        train_of(tmp_path, TOPIC)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"inputs_pretokenized": "a"', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: maximum recursion depth"),
        (b'{"idx": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'["a", "b"]', "expected a JSON object"),
        (b'{"inputs_pretokenized": "a"}', "targets_pretokenized must"),
        (b'{"inputs_pretokenized": "caf\xe9"}', "not UTF-8 at byte 28 of the line"),
        (json.dumps(row(1, idx="first")).encode(), "idx must be a whole number"),
        (json.dumps(row(1, idx=2**63)).encode(), "idx must be a whole number"),
        (json.dumps(row(1) | {"inputs_pretokenized": "\ud83d"}).encode(), "a text holds half a character"),
    ],
)
def test_broken_lines(tmp_path, line, message):
    path = write(tmp_path, TOPIC, "train", [row(1), row(2), line])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:3: {message}"):
        train_of(tmp_path, TOPIC)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_an_empty_split(tmp_path, form):
    write(tmp_path, TOPIC, "train", [row(1)])
    path = write(tmp_path, TOPIC, "validation", [row(1)], form)
    if form == "jsonl":
        path.write_bytes(b"")
    else:
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} holds no rows"):
        train_of(tmp_path, TOPIC)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_313_tasks_and_names_what_is_absent(tmp_path, capsys):
    write(tmp_path, TOPIC, "train", [row(n) for n in range(5)])
    write(tmp_path, WORDS, "train", [row(9, "some words", answer_choices=None)])
    write(tmp_path, WORDS, "validation", [row(8, "other words", answer_choices=["not", "read"])])
    benchmark = load("t0", str(tmp_path), "0", ("train",))
    assert (len(benchmark.train), benchmark.dev, benchmark.test) == (313, [], [])
    assert [task.name for task in benchmark.train] == [task.config for task in t0.TRAIN]
    assert {task.name: len(task.train) for task in benchmark.train if len(task.train)} == {TOPIC: 5, WORDS: 1}
    topic, words = train_of(tmp_path, TOPIC), train_of(tmp_path, WORDS)
    assert (topic.metric, words.metric, topic.group, words.group) == ("Rank-ACC", "Rouge-L", "ag_news", "glue/mrpc")
    assert isinstance(topic.train, Rows) and len(topic.dev) == len(topic.test) == 0
    assert list(words.dev) == list(words.test) == [data.Example("apple 8?", ("other words",))]
    out = capsys.readouterr().out.splitlines()
    assert (
        out[0] == f"t0: 311 of 313 training tasks have no folder in {tmp_path} and are left out" and len(out) == 1
    )  # said once


def test_the_cap_spreads_over_the_rows(tmp_path, monkeypatch):
    capped = [task._replace(cap=4) if task.config == TOPIC else task for task in t0.TRAIN]
    monkeypatch.setattr(t0, "TRAIN", capped)
    write(tmp_path, TOPIC, "train", [row(n) for n in range(12)])
    assert [example.input for example in train_of(tmp_path, TOPIC).train] == [f"apple {n}?" for n in (0, 3, 6, 9)]


def test_p3_may_be_a_folder_of_its_own(tmp_path):
    write(tmp_path / "p3", TOPIC, "train", [row(1)])
    assert len(train_of(tmp_path, TOPIC).train) == 1


def test_parquet_equals_json(tmp_path):
    rows = [row(n, ["red", " green\n"][n % 2], label=n % 2, idx=n) for n in range(7)]
    write(tmp_path / "j", TOPIC, "train", rows)
    with_ids = [r | {"inputs": [1, 2], "targets": [3]} for r in rows]  # the hub's other columns
    write(tmp_path / "p", TOPIC, "train", with_ids, "parquet")
    write(tmp_path / "s", TOPIC, "train-00000-of-00002", with_ids[:3], "parquet")  # as a download of the hub's folder
    write(tmp_path / "s", TOPIC, "train-00001-of-00002", with_ids[3:], "parquet")
    tasks = [train_of(tmp_path / name, TOPIC).train for name in "jps"]
    assert list(tasks[0]) == list(tasks[1]) == list(tasks[2]) and len(tasks[0]) == 7
    assert "inputs" not in tasks[1].table.column_names


def test_a_changed_parquet_file_is_read_again(tmp_path):
    for number in (1, 2):
        write(tmp_path, TOPIC, "train", [row(number)], "parquet")
        assert train_of(tmp_path, TOPIC).train[0].input == f"apple {number}?"


@pytest.mark.parametrize("second", ["train.parquet", "train-00000-of-00001.parquet"])
def test_two_files_for_one_split(tmp_path, second):
    path = write(tmp_path, TOPIC, "train", [row(1)])
    (path.parent / second).touch()
    with pytest.raises(UserError, match=f"{TOPIC} holds train.jsonl and {second}: keep one"):
        train_of(tmp_path, TOPIC)


def test_a_config_without_a_training_file(tmp_path):
    write(tmp_path, TOPIC, "validation", [row(1)])
    with pytest.raises(UserError, match=f"{TOPIC} has no train.jsonl or train.parquet"):
        train_of(tmp_path, TOPIC)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda r: {k: v for k, v in r.items() if k != "answer_choices"},
            "answer_choices must be of type list<string>",
        ),
        (lambda r: r | {"answer_choices": [1, 2]}, r"answer_choices must be .*, but is list<int>"),
        (lambda r: r | {"targets_pretokenized": 3}, "targets_pretokenized must be of type string, but is int"),
        (lambda r: {"text": "a"}, "inputs_pretokenized must be of type string, but is missing"),
    ],
)
def test_parquet_with_another_schema(tmp_path, change, message):
    path = write(tmp_path, TOPIC, "train", [change(row(1))], "parquet")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: column {message}"):
        train_of(tmp_path, TOPIC)


def test_a_file_that_is_no_parquet(tmp_path):
    path = write(tmp_path, TOPIC, "train", [row(1)], "parquet")
    whole = path.read_bytes()
    for content in (b"not parquet at all", whole[:-40]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} is no readable parquet file"):
            train_of(tmp_path, TOPIC)
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])  # the schema is whole, the rows are not
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} cannot be read to its end"):
        train_of(tmp_path, TOPIC)


def test_a_full_disk_is_not_called_a_broken_parquet_file(tmp_path, monkeypatch):
    """What cannot be written is the cache of `datasets`: it is named, as for the other formats; with room, all is
    read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "data", TOPIC, "train", [row(n) for n in range(100)], "parquet")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="the cache of datasets cannot be written.*too large") as failed:
            train_of(tmp_path / "data", TOPIC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.value.filename == str(tmp_path / "cache")
    assert len(train_of(tmp_path / "data", TOPIC).train) == 100


@pytest.mark.parametrize(
    "broken, message",
    [
        (dict(targets_pretokenized="blue"), "none of"),
        (dict(inputs_pretokenized=None), "inputs"),
        (dict(label=5), "label"),
    ],
)
def test_a_broken_parquet_row_is_named_when_it_is_read(tmp_path, broken, message):
    rows = [row(n, label=0) for n in range(5)]
    path = write(tmp_path, TOPIC, "train", [*rows, rows[0] | broken, rows[1]], "parquet")
    train = train_of(tmp_path, TOPIC).train
    assert train[4].input == "apple 4?"
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}, row 6: .*{message}"):
        train[5]


def make_superni(folder: Path):
    (folder / "tasks").mkdir()
    (folder / "tasks" / "task001_x.json").write_text("{}")


def make_crossfit(folder: Path):
    (folder / "random.json").write_text("{}")


@pytest.mark.parametrize(
    "make, message",
    [
        (make_superni, "--dataset superni"),
        (lambda folder: (folder / "splits").mkdir(), "--dataset superni"),
        (make_crossfit, "--dataset crossfit"),
        (lambda folder: None, "it is empty"),
        (lambda folder: (folder / "notes").touch(), "it holds notes"),
        (lambda folder: folder.rmdir(), "there is no such folder"),
    ],
)
def test_the_folder_of_something_else(tmp_path, make, message):
    folder = tmp_path / "other"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=f"^--data-dir {re.escape(str(folder))} holds no P3 config .*{message}"):
        load("t0", str(folder), "0")


def test_a_folder_without_training_tasks(tmp_path):
    write(tmp_path, t0.TEST["rte"][0], "train", [row(1)])
    with pytest.raises(UserError, match="holds test tasks only"):
        load("t0", str(tmp_path), "0", ("train",))


def test_a_table_of_many_rows_is_not_held(tmp_path):
    """200,000 rows are 60 MB as Python strings; what Python holds after reading all over them is far less."""
    texts = [f"{n} " + "word " * 40 for n in range(200_000)]
    path = tmp_path / WORDS / "train.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({name: texts for name in t0.TEXTS}), path)
    del texts
    tracemalloc.start()
    train = train_of(tmp_path, WORDS).train
    assert len(train) == 3_668  # the cap
    seen = {train[k].input.split()[0] for k in range(0, len(train), 10)}
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(seen) == 367 and held < 20e6


# --- Few-shot tasks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(tmp_path):
    """A copy of the bundled sample that a test may break."""
    for path in SAMPLE.rglob("*.jsonl"):
        copy = tmp_path / path.relative_to(SAMPLE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path


def edit(path: Path, number: int, change):
    """Change a line (counted from 1) of a JSON lines file; a change to None deletes it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number - 1] = change(rows[number - 1])
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if r is not None))


def test_the_bundled_sample(capsys):
    benchmark = load("t0", str(SAMPLE), "42")
    out = capsys.readouterr().out
    assert "307 of 313" in out and "2 of 8 of copa, 2 of 10 of rte" in out and "wsc in" in out and out.count("\n") == 3
    there = [task for task in benchmark.train if len(task.train)]
    assert [len(task.train) for task in there] == [32] * 6 and [len(task.dev) for task in there] == [12] * 6
    assert len({task.group for task in there}) == 3 and Counter(t.metric for t in there) == {
        "Rank-ACC": 5,
        "Rouge-L": 1,
    }
    for task in there:
        for rows in (task.train, task.dev):
            labels = Counter(example.label for example in rows)
            assert len(set(labels.values())) == 1, task.name  # balanced
    assert [(task.name, task.group) for task in benchmark.test] == [
        ("copa", "super_glue/copa"),
        ("rte", "super_glue/rte"),
    ]
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*.jsonl")) < 200_000


@pytest.mark.parametrize("seed", SEEDS)
def test_few_shot_rows_of_the_bundled_sample(seed):
    for task in t0.load("t0", str(SAMPLE), seed, ("test",)).test:
        path = SAMPLE / "few_shot" / task.name / "32_shot" / f"{seed}_seed.jsonl"
        shots = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(task.train) == 2 * len(shots) == 64 and task.metric == "Rank-ACC"
        for k, example in enumerate(task.train):  # the templates of the first row, of the second row, ...
            assert shots[k // 2]["premise"] in example.input and example.label == shots[k // 2]["label"]
        assert task.dev is task.test and len(task.dev) == 20
        assert not {example.input for example in task.train} & {example.input for example in task.test}


def test_validation_rows_are_the_same_for_all_seeds_and_use_all_templates():
    first, *others = [t0.load("t0", str(SAMPLE), seed, ("test",)).test for seed in SEEDS]
    for task, *same in zip(first, *others, strict=True):
        assert all(task.dev == other.dev and task.train != other.train for other in same)
        drawn = Counter()
        for config in t0.TEST[task.name]:
            path = SAMPLE / "p3" / config / "validation.jsonl"
            if path.is_file():
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                drawn[config] = sum(
                    a["inputs_pretokenized"].strip() == b.input for a, b in zip(rows, task.dev, strict=True)
                )
        assert sum(drawn.values()) == 20 and min(drawn.values()) > 0 and len(drawn) == 2


def test_rows_are_found_without_idx_and_in_any_order(sample):
    """On the hub P3 rows have no idx, and their order is not the source's."""
    expected = t0.load("t0", str(sample), "0", ("test",)).test
    for path in sample.glob("p3/super_glue_*/train.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for r in rows:
            del r["idx"]
        path.write_text("".join(json.dumps(r) + "\n" for r in reversed(rows)))
    assert t0.load("t0", str(sample), "0", ("test",)).test == expected


def test_a_few_shot_row_in_validation_is_taken_out_of_it(sample):
    for path in sample.glob("p3/super_glue_rte_*/train.jsonl"):
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join(rest) + "\n")
        with open(path.with_name("validation.jsonl"), "a") as file:
            file.write(first + "\n")
    texts = (sample / "few_shot/rte/32_shot/42_seed.jsonl").read_text()
    assert '"idx": 0}' in texts  # so the row that was moved is a few-shot row
    rte = t0.load("t0", str(sample), "42", ("test",)).test[1]
    assert (len(rte.train), len(rte.test)) == (64, 20)


def test_unknown_seed(sample):
    with pytest.raises(UserError, match=r"--split 13 is no seed of .*few_shot: choose 0, 1024, 42"):
        t0.load("t0", str(sample), "13", ("test",))


def test_tasks_without_a_file_of_the_seed_are_named(sample, capsys):
    (sample / "few_shot/rte/32_shot/0_seed.jsonl").unlink()
    assert [task.name for task in t0.load("t0", str(sample), "0", ("test",)).test] == ["copa"]
    assert "few-shot file for anli-r1" in (out := capsys.readouterr().out) and "rte" in out.splitlines()[0]


def test_few_shot_files_are_needed(sample):
    for path in sample.glob("few_shot/*/*/*"):
        path.unlink()
    with pytest.raises(UserError, match="has no few_shot/<task>/<k>_shot/<seed>_seed.jsonl"):
        t0.load("t0", str(sample), "0", ("test",))
    assert len(t0.load("t0", str(sample), "0", ("train",)).train) == 313  # which does not need them


def test_few_shot_files_of_other_tasks(sample):
    (sample / "few_shot" / "rte").rename(sample / "few_shot" / "cb")
    (sample / "few_shot" / "copa").rename(sample / "few_shot" / "wsc")
    with pytest.raises(UserError, match="holds no test task"):
        t0.load("t0", str(sample), "0", ("test",))


@pytest.mark.parametrize(
    "number, change, message",
    [
        (3, lambda r: r | {"label": 1 - r["label"]}, r":3: no row of super_glue_rte_\w+ shows these texts"),
        (4, lambda r: r | {"idx": 47 - r["idx"]}, ":4: no row of"),
        (5, lambda r: r | {"premise": "Nothing of the kind."}, ":5: no row of"),
        (6, lambda r: r | {"premise": 6}, ":6: expected the texts premise, hypothesis"),
        (7, lambda r: {k: v for k, v in r.items() if k != "hypothesis"}, ":7: expected the texts"),
        (8, lambda r: r | {"label": "0"}, ":8: expected whole numbers as label and idx"),
        (9, lambda r: {k: v for k, v in r.items() if k != "idx"}, ":9: expected whole numbers"),
        (10, lambda r: [r], ":10: expected a JSON object"),
        (11, lambda r: None, " holds 31 rows: expected 32"),
    ],
)
def test_broken_few_shot_files(sample, number, change, message):
    path = sample / "few_shot/rte/32_shot/42_seed.jsonl"
    edit(path, number, change)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{message}"):
        t0.load("t0", str(sample), "42", ("test",))


def test_templates_with_unequal_validation(sample):
    edit(sample / "p3/super_glue_copa_best_option/validation.jsonl", 2, lambda r: None)
    with pytest.raises(UserError, match="copa: its templates .*best_option has 19 and .*more_likely has 20"):
        t0.load("t0", str(sample), "42", ("test",))
    (sample / "p3/super_glue_copa_best_option/validation.jsonl").unlink()
    with pytest.raises(UserError, match="best_option has 0"):
        t0.load("t0", str(sample), "42", ("test",))


def test_story_cloze_may_lack_a_train_split(tmp_path):
    config = "story_cloze_2016_Choose_Story_Ending"
    write(tmp_path, config, "validation", [row(1)])
    write(tmp_path, config, "test", [row(2), row(3)])
    (parts,) = t0._read(tmp_path, [config]).values()
    assert [example.input for example in parts["train"]] == ["apple 1?"] and len(parts["validation"]) == 2


# --- The real sample --------------------------------------------------------------------------------------------------


def test_real_training_tasks(real):
    there = [task for task in real["train"] if len(task.train)]
    assert len(there) == 29 and len({task.group for task in there}) == 9
    assert Counter(task.metric for task in there) == {"Rank-ACC": 26, "Rouge-L": 3}
    for task in there:
        rows = [json.loads(line) for line in (REAL / "p3" / task.name / "train.jsonl").read_text().splitlines()]
        assert len(task.train) == len(rows) and len(task.dev) > 0
        for raw, example in zip(rows, task.train, strict=True):
            texts = [example.input, *example.outputs, *example.choices]
            assert all(text and text == text.strip() for text in texts)
            assert (example.label == raw["label"] and example.choices[example.label] == example.outputs[0]) \
                if task.metric == "Rank-ACC" else example.choices == ()  # fmt: skip


def test_real_test_tasks(real):
    for seed in SEEDS:
        tasks = real[seed]
        assert [task.name for task in tasks] == [
            "anli-r1",
            "anli-r2",
            "cb",
            "copa",
            "h-swag",
            "rte",
            "winogrande",
            "wsc",
        ]
        for task in tasks:
            assert len(task.train) == t0.SHOTS[task.name] * len(t0.TEST[task.name])
            assert not {example.input for example in task.train} & {example.input for example in task.test}
            assert len(task.test) > 40 and all(e.choices[e.label] == e.outputs[0] for e in [*task.train, *task.test])


@needs_real
@pytest.mark.parametrize("task", ["anli-r1", "cb", "copa", "h-swag", "rte", "winogrande", "wsc"])
def test_texts_find_the_rows_that_idx_finds(task):
    """As on the hub, without idx. Some source rows of wsc differ in the pronoun alone: texts cannot tell them apart."""
    path = REAL / "few_shot" / task / f"{t0.SHOTS[task]}_shot" / "0_seed.jsonl"
    configs = t0.TEST[task][:3]
    with_idx = t0._read(REAL / "p3", configs)
    for config, parts in with_idx.items():
        shots = t0._read_shots(path, task)
        without = {name: Rows(r.table.remove_columns("idx"), r.example) for name, r in parts.items()}
        a, b = t0._find(shots, config, parts, path), t0._find(shots, config, without, path)
        assert sum(x != y for x, y in zip(a, b, strict=True)) <= (2 if task == "wsc" else 0)


# --- The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(sample, tmp_path_factory, monkeypatch):
    """huggingface_hub.snapshot_download, from a folder in P3's layout: parquet shards, with token ids and without idx.

    Only the sample's configs are there, and listed. Returns the calls.
    """
    root, cache, calls = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache"), []
    for path in sorted(sample.glob("p3/*/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{name: r[name] for name in r if name not in ("idx", "label")} for r in rows]
        rows = [r | {"inputs": [1, 2], "targets": [3]} for r in rows]
        write(root, path.parent.name, f"{path.stem}-00000-of-00001", rows, "parquet")
        write(root, path.parent.name, "test-00000-of-00001", [{"unused": 1}], "parquet")

    def download(repository, repo_type, revision, allow_patterns):
        calls.append((repository, repo_type, revision))
        names = [str(path.relative_to(root)) for path in root.rglob("*.parquet")]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(exist_ok=True)
            (cache / name).write_bytes((root / name).read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(t0, "reach_hub", lambda: calls.append("reach_hub"))
    there = [folder.name for folder in root.iterdir()]
    monkeypatch.setattr(t0, "TRAIN", [task for task in t0.TRAIN if task.config in there])
    few = {task: [config for config in configs if config in there] for task, configs in t0.TEST.items()}
    monkeypatch.setattr(t0, "TEST", {task: configs for task, configs in few.items() if configs})
    calls.append(cache)
    return calls


def test_training_from_the_hub(hub):
    tasks = load("t0", "", "0", ("train",)).train
    expected = t0.load("t0", str(SAMPLE), "0", ("train",)).train
    assert [list(task.train) for task in tasks] == [list(task.train) for task in expected]
    assert [list(task.dev) for task in tasks] == [list(task.dev) for task in expected]
    cache, *calls = hub
    assert calls == ["reach_hub", ("bigscience/P3", "dataset", "main")]
    files = {f"{task.name}/{split}-00000-of-00001.parquet" for task in tasks for split in ("train", "validation")}
    assert {str(path.relative_to(cache)) for path in cache.rglob("*.parquet")} == files  # no test split, no test task
    texts = {"inputs_pretokenized", "targets_pretokenized"}
    for task in tasks:
        assert set(task.train.table.column_names) == texts | ({"answer_choices"} if task.name != WORDS else set())


def test_few_shot_with_rows_from_the_hub(hub, sample):
    expected = t0.load("t0", str(sample), "42", ("test",)).test
    shutil.rmtree(sample / "p3")
    tasks = t0.load("t0", str(sample), "42", ("test",)).test
    assert tasks == expected and len(tasks) == 2
    configs = {config for configs in t0.TEST.values() for config in configs}
    assert {path.name for path in hub[0].iterdir()} == configs


def test_the_hub_is_asked_for_what_is_read(monkeypatch):
    """StoryCloze has no train rows there; ANLI is scored on its test rows."""
    asked = []
    monkeypatch.setattr(t0, "reach_hub", lambda: None)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, allow_patterns, **__: asked.extend(allow_patterns)
    )
    with pytest.raises(UserError):
        t0._download(["story_cloze_2016_Answer_Given_options", "anli_GPT_3_style_r1", TOPIC])
    splits = ("validation", "test", "train", "test", "train", "validation")
    assert [name.split("/")[1] for name in asked] == [f"{split}-*.parquet" for split in splits]


def test_few_shot_needs_a_folder():
    with pytest.raises(
        UserError, match="few-shot examples are not on the hub: give --data-dir DIR .*assets/samples/t0"
    ):
        load("t0", "", "0", ("test",))


def test_a_config_that_the_hub_lacks(hub, monkeypatch, capsys):
    """It is named, as one that a folder lacks; none at all is an error."""
    other = t0.Listed("imdb_Movie_Expressed_Sentiment", "imdb", 25_000, True)
    monkeypatch.setattr(t0, "TRAIN", [*t0.TRAIN, other])
    say_once.cache_clear()
    assert len(load("t0", "", "0", ("train",)).train[-1].train) == 0
    assert "have no folder in bigscience/P3 and are left out" in capsys.readouterr().out
    monkeypatch.setattr(t0, "TRAIN", [other])
    message = r"bigscience/P3 cannot be loaded from the hub: .*--data-dir \(FileNotFoundError: no files of imdb_Movie"
    with pytest.raises(UserError, match=message):
        load("t0", "", "0", ("train",))


def test_no_network(monkeypatch, tmp_path):
    """The real libraries, with a hub that nobody answers for and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    download = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "nothing")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    begin = time.monotonic()
    with pytest.raises(
        UserError,
        match="^--dataset t0: the hub does not answer: give --data-dir DIR .*assets/samples/t0 --backbone tiny$",
    ):
        load("t0", "", "0", ("train",))
    assert time.monotonic() - begin < 15


# --- ANLI -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_anli_is_scored_on_its_test_rows(tmp_path, capsys, form):
    """As T-Few and MHR do; where there are none, on validation rows, which is said."""
    config = next(c for configs in t0.TEST.values() for c in configs if c.startswith("anli"))
    say_once.cache_clear()
    for number, split in enumerate(("train", "validation", "test")):
        write(tmp_path, config, split, [row(number)], form)
    assert t0._read(tmp_path, [config])[config]["validation"][0].input == "apple 2?"
    assert capsys.readouterr().out == ""
    for other in (TOPIC, config):
        for number, split in enumerate(("train", "validation")):
            write(tmp_path / "without", other, split, [row(number)], form)
    assert t0._read(tmp_path / "without", [config])[config]["validation"][0].input == "apple 1?"
    assert "ANLI is scored on its validation rows" in capsys.readouterr().out
    write(tmp_path, TOPIC, "test", [row(5)], form)
    for number, split in enumerate(("train", "validation")):
        write(tmp_path, TOPIC, split, [row(number)], form)
    assert t0._read(tmp_path, [TOPIC])[TOPIC]["validation"][0].input == "apple 1?"  # of others validation, as ever
