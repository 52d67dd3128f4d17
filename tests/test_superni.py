"""The Super-NaturalInstructions reader: prompt, cuts, official files, the hub's files, errors."""

import itertools
import json
import socket
import string
import time
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from transformers import ByT5Tokenizer

import benchmarks
import data
from benchmarks import load, superni
from data import Benchmark, Task
from plumbing.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "assets" / "samples" / "superni"
REAL = Path(__file__).parents[2] / "shared" / "data" / "superni"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the Super-NaturalInstructions sample is not at {REAL}")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Tables are written here, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer()  # a byte is a token, </s> ends the text


@pytest.fixture(scope="module")
def real():
    return load("superni", str(REAL), "13")


def task_file(count: int, **changes) -> dict:
    """A task file with `count` instances "question k" -> "answer k"; changes: fields to set, None to leave out."""
    instances = [{"id": f"id-{k}", "input": f"question {k}", "output": [f"answer {k}"]} for k in range(count)]
    task = {"Categories": ["Riddles", "Jokes"], "Definition": ["Answer the question"], "Instances": instances} | changes
    return {key: value for key, value in task.items() if value is not None}


def folder_of(root: Path, train: dict | None = None, test: dict | None = None) -> str:
    """An official folder under root. train, test: the content of each task's file; None for no file."""
    (root / "splits" / "default").mkdir(parents=True)
    (root / "tasks").mkdir()
    for part, tasks in (("train", train or {"task1_a": task_file(30)}), ("test", test or {"task9_z": task_file(130)})):
        (root / "splits" / "default" / f"{part}_tasks.txt").write_text("".join(f"{name}\n" for name in tasks))
        for name, content in tasks.items():
            if content is not None:
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                (root / "tasks" / f"{name}.json").write_bytes(content)
    return str(root)


def answers(examples) -> list[int]:
    """The numbers of the instances of a `task_file` that these examples are."""
    return [int(e.outputs[0].removeprefix("answer ")) for e in examples]


# --- The prompt -------------------------------------------------------------------------------------------------------


def example(definition: str, text: str, *outputs: str) -> data.Example:
    return superni.example({"definition": definition, "input": text, "outputs": outputs, "group": ""})


@pytest.mark.parametrize(
    "definition, text, expected",
    [
        ("Do it", "a b", "Task definition: Do it.\nNow complete the following example -\nInput: a b.\nOutput:"),
        ("Do it.", "a?", "Task definition: Do it.\nNow complete the following example -\nInput: a?\nOutput:"),
        (" Do it! \n", "\ta) ", "Task definition: Do it!\nNow complete the following example -\nInput: a)\nOutput:"),
        ("Do\nit", "a\n\nb", "Task definition: Do\nit.\nNow complete the following example -\nInput: a\n\nb.\nOutput:"),
        ("Wie?", "¿ähm…", "Task definition: Wie?\nNow complete the following example -\nInput: ¿ähm….\nOutput:"),
        ("Do it", " ", "Task definition: Do it.\nNow complete the following example -\nInput: .\nOutput:"),
    ],
)
def test_prompt_by_hand(definition, text, expected):
    assert example(definition, text, "x").input == expected


@pytest.mark.parametrize("mark", string.punctuation)
def test_no_full_stop_after_punctuation(mark):
    assert f"Input: a{mark}\nOutput:" in example("Do", "a" + mark, "x").input


def test_all_references_are_kept_and_stripped():
    assert example("Do", "a", " x", "y\n", "x").outputs == ("x", "y", "x")
    assert example("Do", "a", "x").tail == "\nOutput:"


def test_older_files(tmp_path):
    """A definition that is a string, an output that is a string, instances without id."""
    old = task_file(1, Definition="Say it", Instances=[{"input": "a", "output": "b"}, {"input": "", "output": "c"}])
    one, two = load("superni", folder_of(tmp_path, test={"task9_z": old}), parts=("test",)).test[0].test
    assert one.input == "Task definition: Say it.\nNow complete the following example -\nInput: a.\nOutput:"
    assert one.outputs == ("b",) and two.outputs == ("c",)  # and an empty input is an input
    several = task_file(1, Definition=["First", "Second"], Instances=[{"input": "a", "output": ["b", "B"]}])
    (task,) = load("superni", folder_of(tmp_path / "new", test={"task9_z": several}), parts=("test",)).test
    assert "Second" not in task.test[0].input and "First." in task.test[0].input
    assert task.test[0].outputs == ("b", "B") and task.group == "Riddles" and task.metric == "Rouge-L"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(min_size=1, max_size=80), limit=st.integers(1, 200))
def test_a_cut_keeps_the_tail_and_the_limit(tokenizer, text, limit):
    whole = example("Do", text, "x")
    (row,) = data.encode_inputs([whole], tokenizer, limit)
    assert len(row) <= limit
    if len(tokenizer(whole.input).input_ids) <= limit:
        assert row == tokenizer(whole.input).input_ids
    elif limit >= 9:  # "\nOutput:" and </s>
        kept = tokenizer.decode(row, skip_special_tokens=True)
        assert kept.endswith("\nOutput:") and whole.input.startswith(kept.removesuffix("\nOutput:"))
        assert len(row) >= limit - 3  # what is lost: bytes of a character that was cut in two


# --- The cuts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, train, held_out",
    [
        (1, 1, 0),
        (40, 20, 20),
        (60, 35, 25),
        (125, 100, 25),
        (126, 100, 26),
        (150, 100, 50),
        (200, 100, 100),
        (400, 100, 100),
    ],
)
def test_cut_of_a_training_task(tmp_path, count, train, held_out):
    folder = folder_of(tmp_path, train={"task1_a": task_file(count)})
    (task,) = load("superni", folder, "1", ("train",)).train
    (again,) = load("superni", folder, "2", ("train",)).train
    drawn = answers(task.train) + answers(task.test)
    assert (len(task.train), len(task.dev), len(task.test)) == (train, 0, held_out)
    assert len(set(drawn)) == train + held_out and set(drawn) <= set(range(count))
    assert count < 20 or drawn != sorted(drawn)  # shuffled: files may be sorted by label
    assert answers(again.train) == answers(task.train) and answers(again.test) == answers(task.test)


@pytest.mark.parametrize(
    "count, train, dev, test",
    [
        (30, 0, 0, 30),
        (100, 0, 0, 100),
        (101, 1, 0, 100),
        (141, 21, 20, 100),
        (300, 100, 100, 100),
        (350, 100, 100, 100),
    ],
)
def test_cut_of_a_test_task(tmp_path, count, train, dev, test):
    folder = folder_of(tmp_path, test={"task9_z": task_file(count)})
    (task,) = load("superni", folder, "13", ("test",)).test
    drawn = answers(task.train) + answers(task.dev)
    assert (len(task.train), len(task.dev), len(task.test)) == (train, dev, test)
    assert answers(task.test) == list(range(test))  # the first 100 in file order
    assert len(set(drawn)) == train + dev and set(drawn) <= set(range(100, count))


def test_few_shot_examples_are_a_function_of_the_split(tmp_path):
    folder = folder_of(tmp_path, test={"task9_z": task_file(350)})
    one, again, other = (load("superni", folder, split, ("test",)).test[0] for split in ("13", "13", "42"))
    assert answers(one.train) == answers(again.train) and answers(one.dev) == answers(again.dev)
    assert set(answers(one.train)) != set(answers(other.train)) and answers(one.test) == answers(other.test)
    for split in ("x", "-1", "1.5", ""):
        with pytest.raises(UserError, match="--split .*whole number"):
            load("superni", folder, split)


# --- The samples ------------------------------------------------------------------------------------------------------


@needs_real
def test_real_sample(real):
    assert (len(real.train), len(real.dev), len(real.test)) == (30, 0, 10)
    lists = {
        part: (REAL / "splits" / "default" / f"{part}_tasks.txt").read_text().split() for part in ("train", "test")
    }
    assert [task.name for task in real.train] == lists["train"] and [task.name for task in real.test] == lists["test"]
    for task in real.train + real.test:
        content = json.loads((REAL / "tasks" / f"{task.name}.json").read_text())
        instances = [(i["input"].strip(), tuple(o.strip() for o in i["output"])) for i in content["Instances"]]
        assert (task.metric, task.group) == ("Rouge-L", content["Categories"][0])
        read = [(e.input.split("Now complete the following example -\nInput: ")[1], e.outputs)
                for part in (task.train, task.dev, task.test) for e in part]  # fmt: skip
        official = [
            (text + ("" if text[-1] in string.punctuation else ".") + "\nOutput:", outputs)
            for text, outputs in instances
        ]
        assert Counter(read) <= Counter(official)  # no instance twice, and with all its references
        if task in real.test:
            assert [e.outputs for e in task.test] == [outputs for _, outputs in instances[:100]]
            few = 0 if task.name.startswith("task393") else 100
            assert (len(task.train), len(task.dev), len(task.test)) == (few, few, 100)
        else:
            assert (len(task.train), len(task.dev), len(task.test)) == (95, 0, 25)  # files cut at 120
    assert max(len(e.outputs) for task in real.test for e in task.test) > 10


@pytest.mark.parametrize("folder", [pytest.param(REAL, marks=needs_real), SAMPLE], ids=["real", "bundled"])
def test_padding(folder, tokenizer):
    """At most 15 % of the tokens of an epoch are padding, inputs and outputs together: the price of mixed batches."""
    tasks = load("superni", str(folder), parts=("train",)).train
    steps = -(-sum(len(task.train) for task in tasks) // 8)
    filled = total = 0
    for batch in itertools.islice(data.batches(tasks, 8, seed=0), steps):
        tensors = data.collate([i.example for i in batch], [i.output for i in batch], tokenizer, True, 1024, 128)
        filled += int(tensors["attention_mask"].sum()) + int((tensors["labels"] != -100).sum())
        total += tensors["attention_mask"].numel() + tensors["labels"].numel()
    assert 1 - filled / total <= 0.15


def test_gold_answers_score_100():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    benchmark = load("superni", str(REAL if REAL.is_dir() else SAMPLE), parts=("test",))
    for task in benchmark.test:
        for e in task.test:
            if any(scorer._tokenizer.tokenize(output) for output in e.outputs):  # ":-)" has no words to compare
                best = max(scorer.score(target, e.outputs[0])["rougeL"].fmeasure for target in e.outputs)
                assert best == pytest.approx(1), (task.name, e)


def test_bundled_sample():
    benchmark = load("superni", str(SAMPLE), "13")
    assert (len(benchmark.train), len(benchmark.dev), len(benchmark.test)) == (6, 0, 2)
    assert len({task.group for task in benchmark.test}) == 2 and len({task.group for task in benchmark.train}) == 6
    for task in benchmark.train:
        assert (len(task.train), len(task.dev), len(task.test)) == (35, 0, 25)
    for task in benchmark.test:
        assert (len(task.train), len(task.dev), len(task.test)) == (30, 30, 100)
    assert max(len(e.outputs) for task in benchmark.train for e in task.train) == 3
    every = [e for task in benchmark.train + benchmark.test for part in (task.train, task.dev, task.test) for e in part]
    assert len({e.input for e in every}) == len(every) and max(len(e.input) for e in every) < 500
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*")) < 300_000


# --- Lists and parts --------------------------------------------------------------------------------------------------


def test_only_the_parts_asked_for_are_read(tmp_path):
    folder = folder_of(tmp_path, train={"task1_a": b"{broken"})
    benchmark = load("superni", folder, parts=("dev", "test"))
    assert benchmark.train == [] and benchmark.dev == [] and len(benchmark.test) == 1
    with pytest.raises(UserError, match="task1_a"):
        load("superni", folder)
    assert load("superni", folder, parts=("dev",)) == data.Benchmark([], [], [])


def test_absent_tasks_are_named_once_and_keep_their_number(tmp_path, capsys):
    folder = folder_of(
        tmp_path,
        train={"task1_a": None, "task2_b": task_file(30), "task3_c": None},
        test={"task7_x": task_file(130), "task8_y": None},
    )
    benchmark = load("superni", folder)
    assert [(task.name, len(task.train)) for task in benchmark.train] == [
        ("task1_a", 0),
        ("task2_b", 15),
        ("task3_c", 0),
    ]
    assert [task.name for task in benchmark.test] == ["task7_x"]
    train, test = capsys.readouterr().out.splitlines()
    assert train.startswith("superni: 2 of 3 train tasks have no file in") and train.endswith("task1_a, task3_c")
    assert test.startswith("superni: 1 of 2 test tasks have no file in") and test.endswith("task8_y")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"task1_a\ntask2_b\n\ntask1_a\n", "train_tasks.txt:4: task1_a stands in line 1 already"),
        (b"task1_a\n../task2_b\n", r"train_tasks.txt:2: expected the name of a task, found '\.\./task2_b'"),
        (b"task1_a\ntask\xff\n", "train_tasks.txt is not UTF-8 at byte 12"),
        (b"\n \n", "train_tasks.txt lists no task"),
        (b"task1_a\ntask9_z\n", "task9_z is listed for train and for test"),
        (b"task5_e\n", r"none of the tasks of .*train_tasks.txt in tasks/ \(it holds splits, tasks\)"),
    ],
)
def test_broken_list(tmp_path, content, expected):
    folder = folder_of(tmp_path)
    (tmp_path / "splits" / "default" / "train_tasks.txt").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load("superni", folder)


@pytest.mark.parametrize(
    "files, expected",
    [
        (None, "there is no such folder"),
        ([], "it is empty"),
        (["p3/rte_base/train.jsonl", "few_shot/rte/32_shot/0_seed.jsonl"], "it looks like a folder for --dataset t0"),
        (["rte_base/train.parquet"], "it looks like a folder for --dataset t0"),
        (["random.json", "glue-rte/glue-rte_16_13_train.tsv"], "it looks like a folder for --dataset crossfit"),
        (["glue-rte/glue-rte_16_13_train.tsv"], "it looks like a folder for --dataset crossfit"),
        (["task1_a.json", "b", "c", "d"], r"it holds b, c, d, \.\.\."),
    ],
)
def test_folder_of_something_else(tmp_path, files, expected):
    folder = tmp_path / "data"
    for name in files or []:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    if files == []:
        folder.mkdir()
    with pytest.raises(UserError, match=rf"^--data-dir \S+ has no splits/default/train_tasks.txt \({expected}\): give"):
        load("superni", str(folder))


# --- Broken files -----------------------------------------------------------------------------------------------------

GOOD = {"id": "x", "input": "a", "output": ["b"]}


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"Definition": ["x"],\n "Instances": [,]}', r"task1_a.json:2 is not valid JSON"),
        (b'{"Definition": ["\xff"]}', "task1_a.json is not UTF-8 at byte 17"),
        (b"[1]", "task1_a.json holds no JSON object"),
        (b"", "task1_a.json:1 is not valid JSON"),
        (task_file(5, Definition=None), 'task1_a.json has no "Definition"'),
        (task_file(5, Categories=None), 'task1_a.json has no "Categories"'),
        (task_file(5, Instances=None), 'task1_a.json has no "Instances"'),
        (task_file(5, Definition=[]), 'task1_a.json: "Definition" must be'),
        (task_file(5, Definition=[" "]), 'task1_a.json: "Definition" must be'),
        (task_file(5, Definition=7), 'task1_a.json: "Definition" must be'),
        (task_file(5, Categories={"a": 1}), 'task1_a.json: "Categories" must be'),
        (task_file(5, Instances={"a": 1}), 'task1_a.json: "Instances" must be a list'),
        (task_file(0), "task1_a.json has no instances"),
        (task_file(5, Instances=[GOOD, "a"]), r"task1_a.json: Instances\[1\] must be an object"),
        (task_file(5, Instances=[GOOD, {"output": ["b"]}]), r"task1_a.json: Instances\[1\] must have an \"input\""),
        (task_file(5, Instances=[GOOD | {"input": 5}]), r"task1_a.json: Instances\[0\] must have an \"input\""),
        (task_file(5, Instances=[GOOD | {"input": "\ud800"}]), r"task1_a.json: Instances\[0\] must have an \"input\""),
        (task_file(5, Instances=[{"input": "a"}]), r"task1_a.json: Instances\[0\] must have an \"output\""),
        (task_file(5, Instances=[GOOD, GOOD | {"output": []}]), r"Instances\[1\] must have an \"output\""),
        (task_file(5, Instances=[GOOD | {"output": ["b", " "]}]), r"Instances\[0\] must have an \"output\""),
        (task_file(5, Instances=[GOOD | {"output": ""}]), r"Instances\[0\] must have an \"output\""),
        (task_file(5, Instances=[GOOD | {"output": [3]}]), r"Instances\[0\] must have an \"output\""),
    ],
)
def test_broken_task_file(tmp_path, content, expected):
    folder = folder_of(tmp_path, train={"task0_good": task_file(3), "task1_a": content})
    with pytest.raises(UserError, match=expected) as caught:
        load("superni", folder)
    assert "\n" not in str(caught.value)


def test_a_link_to_a_file(tmp_path):
    folder = folder_of(tmp_path, test={"task9_z": task_file(3)})
    path = tmp_path / "tasks" / "task9_z.json"
    path.symlink_to(path.rename(tmp_path / "stored"))
    assert len(load("superni", folder, parts=("test",)).test[0].test) == 3


def test_a_mended_file_is_read_anew(tmp_path):
    folder = folder_of(tmp_path, test={"task9_z": task_file(3)})
    assert len(load("superni", folder, parts=("test",)).test[0].test) == 3
    (tmp_path / "tasks" / "task9_z.json").write_text(json.dumps(task_file(4)))
    assert len(load("superni", folder, parts=("test",)).test[0].test) == 4


# --- The hub ----------------------------------------------------------------------------------------------------------


def hub_lines(task: str, count: int) -> list[dict]:
    """Lines as the hub has them, one an (instance, reference): instance k has k % 3 + 1 references."""
    return [
        {"task_name": task, "id": f"{task}-{k}", "definition": "Say", "inputs": f"in {k}", "targets": f"out {k} {r}"}
        for k in range(count)
        for r in range(k % 3 + 1)
    ]


def hub_folder(root: Path, part: str, tasks: dict[str, list]) -> Path:
    (root / part).mkdir(parents=True, exist_ok=True)
    for task, lines in tasks.items():
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (root / part / f"{task}_{part}.jsonl").write_text(text)
    return root


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, replaced at the library's edge by a folder in its layout; gives the folder and the calls."""
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(superni, "reach_hub", lambda: None)
    return tmp_path, calls


# One task of each official list.
TRAIN, TEST = "task697_mmmlu_answer_generation_formal_logic", "task1356_xlsum_title_generation"


def test_official_lists():
    train, test = (superni._names(ROOT / "benchmarks" / f"superni_{part}_tasks.txt") for part in ("train", "test"))
    assert (len(train), len(test)) == (756, 119) and not set(train) & set(test)
    assert TRAIN in train and TEST in test and "task393_plausible_result_generation" in test
    if REAL.is_dir():
        for part, names in (("train", train), ("test", test)):
            assert names == (REAL / "splits" / "official" / f"{part}_tasks.txt").read_text().split()


def test_hub_files(hub, capsys):
    root, calls = hub
    hub_folder(root, "train", {TRAIN: hub_lines(TRAIN, 60)})
    hub_folder(root, "test", {TEST: hub_lines(TEST, 140)})
    benchmark = load("superni", "", "13")
    assert [repository for repository, _ in calls] == ["Muennighoff/natural-instructions"] * 2
    for part, (_, options) in zip(("train", "test"), calls, strict=True):
        revision = "a29a9757125f4bb1c26445ad0d2ef7d9b2cc9c4c"
        assert options == {"repo_type": "dataset", "revision": revision, "allow_patterns": f"{part}/*.jsonl"}
    assert len(benchmark.train) == 756 and [t.name for t in benchmark.train if len(t.train)] == [TRAIN]
    (task,) = benchmark.test
    assert (task.name, task.group, task.metric) == (TEST, "", "Rouge-L")
    assert (len(task.train), len(task.dev), len(task.test)) == (20, 20, 100)
    for k, e in enumerate(task.test):
        assert e.input == f"Task definition: Say.\nNow complete the following example -\nInput: in {k}.\nOutput:"
        assert e.outputs == tuple(f"out {k} {r}" for r in range(k % 3 + 1))
    assert "755 of 756 train tasks have no file" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, expected",
    [
        ("{broken", ":2 is not valid JSON"),
        ("[" * 100_000, ":2 is not valid JSON"),
        ("[]", ":2 must be an object with the strings id, definition, inputs, targets"),
        ('{"id": "a", "definition": "b", "inputs": "c"}', ":2 must be an object"),
        ('{"id": "a", "definition": "b", "inputs": "c", "targets": ["d"]}', ":2 must be an object"),
        ('{"id": "a", "definition": "b", "inputs": "c", "targets": " "}', ":2 has an empty definition or target"),
    ],
)
def test_broken_hub_line(hub, line, expected):
    root, _ = hub
    hub_folder(root, "test", {TEST: [hub_lines(TEST, 1)[0], line]})
    with pytest.raises(UserError, match=f"{TEST}_test.jsonl{expected}"):
        load("superni", "", parts=("test",))


def test_empty_hub_file(hub):
    hub_folder(hub[0], "test", {TEST: []})
    with pytest.raises(UserError, match="has no instances"):
        load("superni", "", parts=("test",))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No name can be looked up, and the hub's cache is an empty folder, which it gives."""

    def refuse(*args, **kwargs):
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


NO_HUB = (
    "--dataset superni: the hub does not answer: give --data-dir DIR (the official folder with splits/ and tasks/), "
    "or try the bundled sample: --data-dir assets/samples/superni --backbone tiny"
)


def test_no_network(no_network):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load("superni")
    assert str(caught.value) == NO_HUB and time.monotonic() - start < 15


def test_no_network_but_a_cache(no_network):
    """The library itself finds what it once downloaded, in its own layout."""
    repository = no_network / "datasets--Muennighoff--natural-instructions"
    snapshot = repository / "snapshots" / "a29a9757125f4bb1c26445ad0d2ef7d9b2cc9c4c"
    file = hub_folder(snapshot, "test", {TEST: hub_lines(TEST, 140)}) / "test" / f"{TEST}_test.jsonl"
    (repository / "blobs").mkdir()
    file.symlink_to(file.rename(repository / "blobs" / "0123abcd"))
    assert [task.name for task in load("superni", parts=("test",)).test] == [TEST]
    with pytest.raises(UserError) as caught:  # only the test tasks are cached
        load("superni", parts=("train",))
    assert str(caught.value) == NO_HUB


def test_a_download_that_breaks_off(hub, monkeypatch):
    def snapshot_download(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"the download from the hub failed \(OSError\): give --data-dir DIR"):
        load("superni")


def test_the_papers_twenty_tasks():
    """--tasks papers: the published list, all of them test tasks; another benchmark has none."""
    names = Path(benchmarks.__file__).with_name("superni_papers_tasks.txt").read_text().split()
    official = Path(benchmarks.__file__).with_name("superni_test_tasks.txt").read_text().split()
    assert len(set(names)) == len(names) == 20 and set(names) < set(official)
    tasks = [Task(name, "Rouge-L", [], [], []) for name in official]
    chosen = benchmarks.held_out(Benchmark([], [], tasks), "papers")
    assert {task.name for task in chosen} == set(names) and len(chosen) == 20
    with pytest.raises(UserError, match="^--tasks papers: none of the 20 tasks of superni"):
        benchmarks.held_out(Benchmark([], [], [Task("x", "ACC", [], [], [])]), "papers")
