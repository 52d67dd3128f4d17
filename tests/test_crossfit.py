"""CrossFit: the official files, the papers' use of them, malformed ones, the bundled sample, a real one."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks
import data
from benchmarks import crossfit
from benchmarks.crossfit import METRIC, SPLITS, TEST_LINES, TYPE, read_tsv
from data import PARTS, Example
from plumbing.errors import UserError

CROSSFIT = Path(__file__).parents[2] / "shared" / "data" / "crossfit"
needs_crossfit = pytest.mark.skipif(not CROSSFIT.is_dir(), reason=f"the CrossFit sample is not at {CROSSFIT}")
SAMPLE = Path(__file__).parents[1] / "assets" / "samples" / "crossfit"


def load(root, split="100", parts=PARTS, **options) -> data.Benchmark:
    return benchmarks.load("crossfit", str(root), split, parts, **options)


def write_task(root: Path, name: str, rows: list[str], k=4):
    """A task folder in the gym's layout: in every split the same lines in train, dev and test."""
    (root / name).mkdir(parents=True)
    for split, part in itertools.product(SPLITS, PARTS):
        (root / name / f"{name}_{k}_{split}_{part}.tsv").write_bytes("".join(r + "\n" for r in rows).encode())


def write_partition(path: Path, train: list[str], dev: list[str], test: list[str]):
    path.write_text(json.dumps({"train": train, "dev": dev, "test": test}))


@pytest.fixture
def gym(tmp_path):
    """Two training tasks, a dev and a test task, invented here; a third training task has no folder."""
    root = tmp_path / "gym"
    for name in ("colour", "shape-a_b", "size", "taste"):
        write_task(root, name, ["red apple\tred", "green pear\tgreen"])
    write_partition(root / "random.json", ["shape-a_b", "colour", "not_here"], ["size"], ["taste"])
    return root


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_format(gym):
    benchmark = load(gym, "13")
    assert benchmark.test[0].dev == [
        Example(" [taste] red apple", (" red",)),
        Example(" [taste] green pear", (" green",)),
    ]
    expected = [Example(" [shape-a_b] red apple", (" red",)), Example(" [shape-a_b] green pear", (" green",))]
    assert benchmark.train[2].test == expected
    (task,) = benchmark.dev
    assert (task.name, task.metric, task.skills, task.group) == ("size", "ACC", (), "")


def test_a_training_task_without_a_folder_keeps_its_id(gym, capsys):
    train = load(gym).train
    assert [task.name for task in train] == ["colour", "not_here", "shape-a_b"]
    assert train[1].train == train[1].dev == train[1].test == []
    assert train[0].train and train[2].train
    assert "1 tasks of random.json have no folder" in (said := capsys.readouterr().out) and "not_here" in said
    load(gym, "13")
    assert capsys.readouterr().out == ""  # said once


def test_absent_held_out_tasks_are_left_out_and_named(gym, capsys):
    write_partition(gym / "random.json", ["colour"], ["size", "hue"], ["age", "taste"])
    benchmark = load(gym)
    assert [task.name for task in benchmark.dev + benchmark.test] == ["size", "taste"]
    assert "2 tasks" in (said := capsys.readouterr().out) and "hue, age" in said


def test_only_the_parts_asked_for_are_read(gym, capsys):
    for path in [*gym.glob("taste/*"), *gym.glob("size/*")]:
        path.write_bytes(b"\xff\n")  # would be refused
    benchmark = load(gym, parts=("train",))
    assert len(benchmark.train) == 3 and benchmark.dev == benchmark.test == []
    for part, name in (("dev", "size"), ("test", "taste")):
        with pytest.raises(UserError, match=f"{name}_4_100_train.tsv:1: not UTF-8"):
            load(gym, parts=(part,))
    capsys.readouterr()
    write_task(gym, "new", ["a\tb"])
    write_partition(gym / "random.json", ["colour", "missing"], [], ["new"])
    benchmark = load(gym, parts=("test",))
    assert [task.name for task in benchmark.test] == ["new"] and benchmark.train == benchmark.dev == []
    assert capsys.readouterr().out == ""  # the missing training task was not asked for


def test_training_tasks_learn_from_all_splits_and_held_out_tasks_from_one(gym):
    """Polytropon 4.1: all train and dev files of a training task are concatenated, repeats included."""
    for split, part, name in itertools.product(SPLITS, PARTS, ("colour", "taste")):
        (gym / name / f"{name}_4_{split}_{part}.tsv").write_text(f"{part} {split}\tred\nshared\tred\n")
    benchmark = load(gym, "21")
    inputs = Counter(e.input.removeprefix(" [colour] ") for e in benchmark.train[0].train)
    assert inputs == Counter({f"{part} {split}": 1 for split in SPLITS for part in ("train", "dev")} | {"shared": 10})
    assert benchmark.train[0].dev == []
    (taste,) = benchmark.test
    assert [e.input for e in taste.train] == [" [taste] train 21", " [taste] shared"]
    assert [e.input for e in taste.dev] == [" [taste] dev 21", " [taste] shared"]
    assert [e.input for e in taste.test] == [" [taste] test 21", " [taste] shared"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_split(gym, split):
    (gym / "taste" / f"taste_4_{split}_train.tsv").write_text(f"only {split}\tred\n")
    for other in SPLITS:
        assert (load(gym, other).test[0].train[0].input == f" [taste] only {split}") == (other == split)


def test_unknown_split(gym):
    with pytest.raises(UserError, match="--split 7 .*100, 13, 21, 42, 87"):
        load(gym, "7")


def test_the_first_test_lines_are_scored(gym):
    lines = "".join(f"{n}\tx\n" for n in range(TEST_LINES + 5))
    for part in ("train", "test"):
        (gym / "taste" / f"taste_4_100_{part}.tsv").write_text(lines)
    (taste,) = load(gym).test
    assert len(taste.test) == TEST_LINES == 10_000 and taste.test[-1].input == " [taste] 9999"
    assert len(taste.train) == TEST_LINES + 5


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "t.tsv"
    odd = "a\x1cb\x1dc\x0bd\x85e\u2028f\rg"
    path.write_bytes(f"{odd}\tx\nq\ty z\tw\n".encode())
    assert read_tsv(path, "t") == [Example(f" [t] {odd}", (" x",)), Example(" [t] q", (" y z", " w"))]


def test_windows_line_ends(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"a\tx\r\nb\ty\r\n")
    assert read_tsv(path, "t") == [Example(" [t] a", (" x",)), Example(" [t] b", (" y",))]


cell = st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"]), min_size=1, max_size=12)
clean = cell.filter(lambda text: text == text.strip())
answer = clean.filter(lambda text: "\r" not in text)  # where it would hide the end of a line


@given(st.lists(st.tuples(clean, st.lists(answer, min_size=1, max_size=3)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("tsv") / "t.tsv"
    path.write_bytes("".join("\t".join([source, *outputs]) + "\n" for source, outputs in rows).encode())
    expected = [Example(f" [t] {source}", tuple(f" {output}" for output in outputs)) for source, outputs in rows]
    assert read_tsv(path, "t") == expected


def test_metrics_of_all_160_tasks():
    """How many tasks have which metric: counted in CrossFit's metrics.py, where 51 of its 160 tasks have ACC."""
    assert Counter(METRIC.values()) == {
        "Classification-F1": 51,
        "EM": 28,
        "Rouge-L": 17,
        "QA-F1": 9,
        "Pearson-Correlation": 3,
        "Matthew-Correlation": 1,
    }


def test_types_of_all_160_tasks():
    """How many tasks have which type: counted in the authors' ontology."""
    lines = Path(crossfit.__file__).with_name("crossfit_types.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(TYPE) == 160 and set(METRIC) <= set(TYPE)  # no task is there twice
    assert Counter(TYPE.values()) == {
        "classification": 65,
        "question answering": 51,
        "other": 31,
        "conditional generation": 13,
    }


def test_the_group_of_a_task_is_its_type(gym):
    """Wherever the task is read, and whether its folder is there or not; a task that is not the gym's has none."""
    for name in ("glue-rte", "piqa", "samsum"):
        write_task(gym, name, ["a\tb"])
    write_partition(gym / "random.json", ["colour", "boolq", "glue-rte"], ["size", "piqa"], ["samsum", "taste"])
    benchmark = load(gym)
    assert {task.name: task.group for task in benchmark.train + benchmark.dev + benchmark.test} == {
        "boolq": "question answering",  # has no folder
        "colour": "",
        "glue-rte": "classification",
        "piqa": "other",
        "size": "",
        "samsum": "conditional generation",
        "taste": "",
    }


# --- Partitions -------------------------------------------------------------------------------------------------------


def test_any_partition_file(gym, tmp_path):
    write_partition(gym / "other.json", ["taste"], ["colour"], [])  # some official ones have no test tasks
    write_partition(tmp_path / "elsewhere.json", ["size"], [], ["colour"])
    benchmark = load(gym, partition="other.json")
    assert [[t.name for t in tasks] for tasks in (benchmark.train, benchmark.dev, benchmark.test)] == [
        ["taste"],
        ["colour"],
        [],
    ]
    assert load(gym, parts=("test",), partition="other.json").test == []
    benchmark = load(gym, partition=str(tmp_path / "elsewhere.json"))
    assert [task.name for task in benchmark.train + benchmark.test] == ["size", "colour"]


def test_the_data_folder_comes_before_the_working_folder(gym, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_partition(tmp_path / "random.json", ["taste"], [], [])
    write_partition(tmp_path / "here.json", ["size"], [], [])
    assert load(gym).train[0].name == "colour"
    assert load(gym, partition="here.json").train[0].name == "size"


def test_a_partition_file_that_is_nowhere(gym):
    with pytest.raises(UserError, match=r"--data-dir .* has no gone\.json .*--partition"):
        load(gym, partition="gone.json")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b'{"train": ["colour"]}',
        b"[]",
        b"\xff\xfe",
        b'{"train": 3, "dev": [], "test": []}',
        b'{"train": [3], "dev": [], "test": []}',
        b'{"train": "colour", "dev": [], "test": []}',
        b'{"train": [], "dev": ["size"], "test": ["taste"]}',
        b'{"train": [""], "dev": [], "test": []}',
        b'{"train": [".."], "dev": [], "test": []}',
        b'{"train": ["a/b"], "dev": [], "test": []}',
        b'{"train": ["a\\u0000"], "dev": [], "test": []}',
    ],
)
def test_broken_partition_file_is_named(gym, content):
    (gym / "random.json").write_bytes(content)
    with pytest.raises(UserError, match=r"random\.json"):
        load(gym)


@pytest.mark.parametrize("name", ["a/b", "..", "../../x", ""])
def test_a_task_of_a_partition_is_no_path(gym, name):
    """Beside tasks that are there, so that nothing else is wrong with the file."""
    content = json.loads((gym / "random.json").read_text())
    (gym / "random.json").write_text(json.dumps(content | {"train": [*content["train"], name]}))
    with pytest.raises(UserError, match="random.json.*expected"):
        load(gym)


@pytest.mark.parametrize("one, other", [("train", "test"), ("dev", "test")])
def test_a_task_in_two_lists(gym, one, other):
    lists = {"train": ["colour"], "dev": [], "test": []}
    for part in (one, other):
        lists[part].append("size")
    write_partition(gym / "random.json", **lists)
    with pytest.raises(UserError, match=f'task size is in "{one}" and in "{other}"'):
        load(gym)


def test_a_task_for_training_and_development_is_said(gym, capsys):
    """An official partition file has this."""
    write_partition(gym / "random.json", ["colour", "size"], ["size"], ["taste"])
    benchmark = load(gym)
    assert [task.name for task in benchmark.train] == ["colour", "size"] and benchmark.dev[0].name == "size"
    assert 'has size in "train" and in "dev"' in capsys.readouterr().out


@pytest.mark.parametrize("part", PARTS)
def test_a_task_named_twice(gym, part):
    lists = {"train": ["colour"], "dev": [], "test": []}
    lists[part] = ["size", "colour", "size"] if part == "train" else ["size", "size"]
    write_partition(gym / "random.json", **lists)
    with pytest.raises(UserError, match=f'task size is named twice in "{part}"'):
        load(gym)


# --- Malformed folders and files --------------------------------------------------------------------------------------


def test_a_folder_is_needed(tmp_path):
    with pytest.raises(UserError, match="needs --data-dir.*assets/samples/crossfit"):
        load("")
    with pytest.raises(UserError, match=r"--data-dir .*missing has no random\.json \(it holds nothing.*no such folder"):
        load(tmp_path / "missing")


@pytest.mark.parametrize(
    "made, holds",
    [
        ("p3/x", "T0, for --dataset t0"),
        ("few_shot/x", "T0, for --dataset t0"),
        ("tasks/task1.json", "Super-NaturalInstructions, for --dataset superni"),
        ("splits/default", "Super-NaturalInstructions, for --dataset superni"),
        (".", r"\(it holds nothing\)"),
        ("pictures/holidays", r"\(it holds pictures\)"),
    ],
)
@pytest.mark.parametrize("partition", [False, True])
def test_a_folder_of_something_else(tmp_path, made, holds, partition):
    """What is there is said, whether the partition file is missing or its tasks are."""
    root = tmp_path / "other"
    (root / made).mkdir(parents=True)
    write_partition(tmp_path / "p.json", ["colour"], ["size"], ["taste"])
    options = {"partition": str(tmp_path / "p.json")} if partition else {}
    with pytest.raises(UserError, match=f"--data-dir .*{holds}"):
        load(root, **options)


def test_partition_without_any_task_that_is_here(gym):
    write_partition(gym / "random.json", ["nowhere"], ["size"], ["gone"])
    for parts, kind in ((PARTS, "training"), (("train",), "training"), (("test",), "held-out")):
        with pytest.raises(UserError, match=rf"--data-dir .*no {kind} task of random\.json .*colour, .* and 2 more"):
            load(gym, parts=parts)
    assert load(gym, parts=("dev", "test")).dev  # one of them is enough


@pytest.mark.parametrize("task, part", [("colour", "train"), ("taste", "dev"), ("size", "test"), ("colour", "test")])
def test_missing_split_file(gym, task, part):
    (gym / task / f"{task}_4_100_{part}.tsv").unlink()
    with pytest.raises(UserError, match=rf"{task}_<k>_100_{part}\.tsv, found 0"):
        load(gym)


def test_two_files_for_one_split(gym):
    (gym / "colour" / "colour_8_42_dev.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match=r"colour_<k>_42_dev\.tsv, found 2"):
        load(gym)


def test_a_folder_in_the_place_of_a_file(gym):
    path = gym / "taste" / "taste_4_100_dev.tsv"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} cannot be read"):
        load(gym)


@pytest.mark.parametrize("task, part", [("colour", "train"), ("taste", "train"), ("taste", "dev"), ("taste", "test")])
def test_an_empty_file_is_named(gym, task, part):
    path = gym / task / f"{task}_4_100_{part}.tsv"
    path.write_text("")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is empty"):
        load(gym)


@pytest.mark.parametrize(
    "content, line",
    [
        ("a\tb\none column\nc\td\n", 2),
        ("a\tb\n\nc\td\n", 2),  # an empty line in the middle
        ("a\tb\nc\td\n\n", 3),  # an empty line at the end
        ("\n", 1),
        ("one column", 1),
        ("a\tb\nan input and a tab\t\n", 2),
        ("a\tb\n\tan output\n", 2),
        ("a\tb\nc\t\td\n", 2),  # an empty output before another
        ("a\tb\nc\td\t \te\n", 2),
    ],
)
@pytest.mark.parametrize("task", ["colour", "taste"])
def test_lines_without_an_output_are_refused(gym, task, content, line):
    path = gym / task / f"{task}_4_100_train.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:{line}: "):
        load(gym)


def test_a_line_that_is_not_utf8_is_named(gym):
    path = gym / "taste" / "taste_4_100_test.tsv"
    path.write_bytes(b"tea\tb\ncaf\xe9\tb\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:2: not UTF-8 at byte 3"):
        load(gym)


# --- The bundled sample -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample():
    return load(SAMPLE)


def test_the_sample_has_every_metric_and_type(sample):
    tasks = sample.train + sample.dev + sample.test
    assert [len(part) for part in (sample.train, sample.dev, sample.test)] == [6, 1, 2]
    assert {task.metric for task in tasks} == {"ACC", *METRIC.values()}
    assert all(task.train for task in tasks)  # every task of its partition is there
    names = json.loads((SAMPLE / "random.json").read_text())["all"]
    assert sorted(names) == sorted(task.name for task in tasks)
    assert {task.group for task in sample.train} == set(TYPE.values())  # and pre-training has every type


@pytest.mark.parametrize("split", SPLITS)
def test_the_sample_has_the_gyms_sizes(split):
    sample = load(SAMPLE, split)
    for task in sample.train:
        assert len(task.train) == 5 * 64 and len(task.test) == 40, task.name
    for task in sample.dev + sample.test:
        assert (len(task.train), len(task.dev), len(task.test)) == (32, 32, 40), task.name
        shown = {e.input for e in task.train} | {e.input for e in task.dev}
        assert len(shown) == 64 and not shown & {e.input for e in task.test}, task.name
    for path in SAMPLE.glob(f"*/*_16_{split}_*.tsv"):
        labels = Counter(line.split("\t")[1] for line in path.read_text().splitlines())
        assert len(labels) == 2 and len(set(labels.values())) == 1, path.name


def test_the_sample_has_several_references_and_is_small(sample):
    (task,) = [task for task in sample.train if task.name == "web_questions"]
    assert any(len(e.outputs) > 1 for e in task.train) and any(len(e.outputs) > 1 for e in task.test)
    assert sum(path.stat().st_size for path in SAMPLE.glob("**/*") if path.is_file()) < 400_000


def test_the_samples_test_does_not_depend_on_the_split(sample):
    other = load(SAMPLE, "87")
    for a, b in zip(sample.dev + sample.test, other.dev + other.test, strict=True):
        assert a.test == b.test and a.train != b.train and a.dev != b.dev
    assert other.train == sample.train


# --- The real sample --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return load(CROSSFIT)


def present(tasks: list[data.Task]) -> list[data.Task]:
    return [task for task in tasks if task.train]


def manifest() -> dict[str, list[str]]:
    """The manifest's tables: task name to the row's cells (task, kind, k, metric, train, dev, test, ...)."""
    lines = (CROSSFIT / "MANIFEST.md").read_text().split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row for row in rows if row[0] != "task"}


def raw_lines(task: str, split: str, part: str) -> list[str]:
    """The lines of a file, read another way."""
    (path,) = (CROSSFIT / task).glob(f"{task}_*_{split}_{part}.tsv")
    return [line.strip() for line in path.read_bytes().decode().split("\n") if line]


@needs_crossfit
def test_real_tasks_by_partition(real):
    partition = json.loads((CROSSFIT / "random.json").read_text())
    assert [task.name for task in real.train] == sorted(partition["train"]) and len(real.train) == 120
    assert (len(present(real.train)), len(real.dev), len(real.test)) == (29, 3, 5)
    for part in PARTS:
        names = [task.name for task in present(getattr(real, part))]
        assert names == sorted(name for name in partition[part] if (CROSSFIT / name).is_dir())


@needs_crossfit
def test_every_metric_is_of_a_task_of_the_official_partition():
    names = json.loads((CROSSFIT / "random.json").read_text())["all"]
    assert len(names) == 160 and set(METRIC) <= set(names)


@needs_crossfit
def test_every_task_of_the_official_partition_has_a_type(real):
    partition = json.loads((CROSSFIT / "random.json").read_text())
    assert sorted(TYPE) == sorted(partition["all"])
    assert {task.name: task.group for task in real.train} == {name: TYPE[name] for name in partition["train"]}
    assert Counter(task.group for task in real.train) == {
        "classification": 45,
        "question answering": 42,
        "other": 25,
        "conditional generation": 8,
    }


@needs_crossfit
def test_real_types_fit_the_format(real):
    """Classification has fixed labels; here the answers to questions and what is generated are free; other has both."""
    rows = manifest()
    for task in present(real.train) + real.dev + real.test:
        fixed = rows[task.name][1] == "classification"
        assert task.group == "other" or fixed == (task.group == "classification"), task.name


@needs_crossfit
def test_real_metrics_are_the_manifests(real):
    rows = manifest()
    metrics = {task.name: task.metric for task in present(real.train) + real.dev + real.test}
    assert len(metrics) == 37 and metrics == {name: row[3] for name, row in rows.items()}


@needs_crossfit
def test_real_sizes_are_the_manifests(real):
    rows = manifest()
    for task in present(real.train) + real.dev + real.test:
        train, dev, test = (int(rows[task.name][k].split(" of ")[0]) for k in (4, 5, 6))
        assert len(task.test) == test, task.name
        if task in real.train:
            assert len(task.train) == 5 * (train + dev) and task.dev == [], task.name
        else:
            assert (len(task.train), len(task.dev)) == (train, dev), task.name


@needs_crossfit
def test_real_train_tasks_concatenate_all_splits(real):
    for task in present(real.train):
        lines = [line for s in SPLITS for part in ("train", "dev") for line in raw_lines(task.name, s, part)]
        written = [
            "\t".join([e.input.removeprefix(f" [{task.name}] "), *(o[1:] for o in e.outputs)]) for e in task.train
        ]
        assert Counter(written) == Counter(lines), task.name


@needs_crossfit
def test_real_texts_are_the_files(real):
    for task in present(real.train) + real.dev + real.test:
        lines = [line.split("\t") for line in raw_lines(task.name, "100", "test")]
        assert [e.input for e in task.test] == [f" [{task.name}] {line[0]}" for line in lines]
        assert [e.outputs for e in task.test] == [tuple(" " + output for output in line[1:]) for line in lines]


@needs_crossfit
def test_real_control_characters_survive(real):
    (task,) = [task for task in real.train if task.name == "onestop_english"]
    texts = [example.input for example in task.train + task.test]
    assert any("\x1c" in text or "\x1d" in text for text in texts)
    assert {e.outputs for e in task.train} == {(" elementary",), (" intermediate",), (" advance",)}


@needs_crossfit
def test_real_questions_have_several_answers(real):
    (task,) = [task for task in real.train if task.name == "web_questions"]
    several = sum(len(example.outputs) > 1 for example in task.test)
    assert several > 0.2 * len(task.test)
    assert all(len(e.outputs) == 1 for t in real.test for e in t.test)


@needs_crossfit
def test_real_few_shot_splits_differ_and_the_test_does_not(real):
    other = load(CROSSFIT, "87")
    assert other.train == real.train  # pre-training sees all splits anyway
    for a, b in zip(real.dev + real.test, other.dev + other.test, strict=True):
        assert a.name == b.name and a.test == b.test
        assert a.train != b.train and a.dev != b.dev


# --- Files that were cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"a\tb\nc\t", b"a\tb\nc\tgre", b"a\tb\nc\tgreen", b"a\tb\nc\tgreen\r", b"a\tb\nc"])
def test_a_file_that_was_cut_within_a_line_is_refused(gym, content):
    """Every official line ends in a line feed. Without it "gre" would be taken for the whole answer "green"."""
    path = gym / "taste" / "taste_4_100_train.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:2: "):
        load(gym)


def test_a_cut_beyond_the_lines_that_are_scored_is_not_read(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"a\tx\nb\ty\nc\tz")
    assert len(read_tsv(path, "t", 2)) == 2
    with pytest.raises(UserError, match=r"t\.tsv:3: the file ends within this line"):
        read_tsv(path, "t", 3)


@needs_crossfit
def test_every_real_file_ends_in_a_line_feed():
    files = list(CROSSFIT.glob("*/*.tsv"))
    assert len(files) == 555 and all(path.read_bytes().endswith(b"\n") for path in files)
