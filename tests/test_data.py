"""Benchmarks, batches and collation: embedded strings, CrossFit's files, tensors."""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import data
from config import UserError
from data import LETTERS, OPERATIONS, Example, Item, Task, batches, by_length, collate, compose, read_tsv
from evaluate import score

CROSSFIT = Path(__file__).parents[2] / "shared" / "data" / "crossfit"
needs_crossfit = pytest.mark.skipif(not CROSSFIT.is_dir(), reason=f"the CrossFit sample is not at {CROSSFIT}")

PAIRS_AND_TRIPLES = [c for n in (2, 3) for c in itertools.combinations(OPERATIONS, n)]


def string_of(example: Example) -> str:
    """The string of an example of the embedded benchmark, without what stands before it."""
    return example.input.rsplit(": ", 1)[1]


# --- strings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("sort", "cabda", "aabcd"),
        ("double", "abcd", "abcdd"),
        ("drop", "abcd", "bcd"),
        ("reverse", "abcde", "edcba"),
        ("swap", "abcde", "badce"),  # an odd last letter stays
        ("swap", "abcd", "badc"),
        ("rotate", "abcd", "bcda"),
        ("shift", "aij", "bja"),
        ("upper", "abj", "ABJ"),
    ],
)
def test_operation_by_hand(name, text, expected):
    assert OPERATIONS[name](text) == expected
    assert compose((name,), text) == expected


@pytest.mark.parametrize(
    "skills, text, expected",
    [
        (("sort", "reverse"), "bca", "cba"),
        (("reverse", "sort"), "bca", "cba"),  # the order is the table's, not the tuple's
        (("double", "drop"), "abc", "bcc"),
        (("drop", "swap", "upper"), "jabcd", "BADC"),
        (("double", "rotate", "shift"), "ij", "aaj"),  # ijj -> jji -> aaj
        ((), "abc", "abc"),
    ],
)
def test_compose_by_hand(skills, text, expected):
    assert compose(skills, text) == expected


def test_there_are_eight_operations():
    assert list(OPERATIONS) == ["sort", "double", "drop", "reverse", "swap", "rotate", "shift", "upper"]


def test_all_tasks_are_different_functions():
    rng = random.Random(0)
    texts = ["".join(rng.choices(LETTERS, k=rng.randint(4, 7))) for _ in range(50)]
    sets = [(name,) for name in OPERATIONS] + PAIRS_AND_TRIPLES
    functions = {tuple(compose(skills, text) for text in texts) for skills in sets}
    assert len(sets) == 8 + 84 and len(functions) == len(sets)


def test_the_metric_tells_all_tasks_apart():
    """A model that does another task's operations must not get full marks: the metric must see every operation."""
    every = data.strings()
    confused = []
    for task in every.train + every.dev + every.test:
        for skill in task.skills:  # leave one operation out
            fewer = tuple(s for s in task.skills if s != skill)
            wrong = [compose(fewer, string_of(example)) for example in task.test]
            if score(task.metric, wrong, task.test) > 99:
                confused.append((task.name, skill))
    assert not confused, f"{len(confused)} tasks cannot tell that an operation was left out: {confused[:4]} ..."


def test_partition_is_fixed_and_disjoint():
    benchmark = data.strings()
    parts = [[task.skills for task in part] for part in (benchmark.train, benchmark.dev, benchmark.test)]
    assert [len(part) for part in parts] == [64, 8, 12]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(PAIRS_AND_TRIPLES)
    other = data.strings(split=5, instructions=True)
    assert [[task.skills for task in part] for part in (other.train, other.dev, other.test)] == parts
    names = [task.name for part in (benchmark.train, benchmark.dev, benchmark.test) for task in part]
    assert len(set(names)) == 84


def cover(number: int) -> tuple[int, int]:
    """For this partition number the fewest held-out tasks, and dev tasks, that any one operation is in."""
    sets = list(PAIRS_AND_TRIPLES)
    random.Random(number).shuffle(sets)
    dev, test = (Counter(skill for skills in part for skill in skills) for part in (sets[64:72], sets[72:]))
    return min(test[name] for name in OPERATIONS), min(dev[name] for name in OPERATIONS)


def test_partition_number_is_the_first_that_covers_every_operation():
    good = [number for number in range(data.STRINGS_PARTITION + 1) if cover(number)[0] >= 3 and cover(number)[1] >= 2]
    assert good == [data.STRINGS_PARTITION]
    benchmark = data.strings()
    held_out = Counter(skill for task in benchmark.test for skill in task.skills)
    dev = Counter(skill for task in benchmark.dev for skill in task.skills)
    assert all(held_out[name] >= 3 and dev[name] >= 2 for name in OPERATIONS)


def test_tasks_hold_true_examples_of_the_promised_number():
    benchmark = data.strings()
    promise = " ".join(data.strings.__doc__.split())
    pattern = (
        r"Train tasks have (\d+) train, (\d+) dev and (\d+) test examples; dev and test tasks (\d+), (\d+) and (\d+)"
    )
    numbers = [int(number) for number in re.search(pattern, promise).groups()]
    for part, expected in (("train", numbers[:3]), ("dev", numbers[3:]), ("test", numbers[3:])):
        for task in getattr(benchmark, part):
            assert [len(task.train), len(task.dev), len(task.test)] == expected
            assert task.name == "+".join(task.skills)
            for example in task.train + task.dev + task.test:
                text = string_of(example)
                assert example.input == f"task: {text}"  # nothing tells the task
                assert 4 <= len(text) <= 7 and set(text) <= set(LETTERS)
                assert example.outputs == (compose(task.skills, text),)
    lengths = {len(string_of(e)) for e in benchmark.train[0].train}
    assert lengths == {4, 5, 6, 7}


def test_examples_of_a_task_do_not_overlap():
    benchmark = data.strings(split=3)
    for task in benchmark.train + benchmark.dev + benchmark.test:
        texts = [string_of(example) for example in task.train + task.dev + task.test]
        assert len(set(texts)) == len(texts), task.name


def test_examples_are_a_function_of_the_split():
    one, again, other = data.strings(1), data.strings(1), data.strings(2)
    assert one == again
    for a, b in zip(one.train + one.dev + one.test, other.train + other.dev + other.test, strict=True):
        assert a.test == b.test  # scores of different splits are on the same examples
        assert a.train != b.train and a.dev != b.dev
        assert not set(a.train) & set(a.test) and not set(b.train) & set(b.test)


def test_examples_do_not_depend_on_global_randomness():
    random.seed(1)
    one = data.strings()
    random.seed(2)
    assert data.strings() == one


def test_instructions_name_the_operations():
    plain, instructed = data.strings(0, False), data.strings(0, True)
    task, same = plain.train[5], instructed.train[5]
    assert same.skills == task.skills
    for a, b in zip(task.train + task.dev + task.test, same.train + same.dev + same.test, strict=True):
        assert b.input == f"{' '.join(task.skills)}: {string_of(a)}" and b.outputs == a.outputs


def test_strings_single():
    benchmark = data.strings_single()
    assert [task.skills for task in benchmark.train] == [(name,) for name in OPERATIONS]
    assert benchmark.dev == [] and benchmark.test == []
    for task in benchmark.train:
        assert (len(task.train), len(task.dev), len(task.test)) == (40_000, 100, 100)
        assert len({e.input for e in task.train + task.dev + task.test}) == 40_200
        assert all(e.input.startswith(f"{task.name}: ") for e in task.train[:100])
        text = task.train[7].input.removeprefix(f"{task.name}: ")
        assert task.train[7].outputs == (compose(task.skills, text),)


def test_load_by_name():
    assert data.load("strings", split="4", instructions=True) == data.strings(4, True)
    assert len(data.load("strings-single").train) == 8
    with pytest.raises(UserError, match="--dataset nonsense is unknown"):
        data.load("nonsense")
    for split in ("x", "-1", "1.5", ""):
        with pytest.raises(UserError, match="--split .*whole number"):
            data.load("strings", split=split)


# --- Batches ----------------------------------------------------------------------------------------------------------


def ragged_tasks(sizes=(37, 60, 5), longest=200) -> list[Task]:
    rng = random.Random(0)
    names = itertools.count()

    def examples(count):
        return [Example(f"{next(names)} " + "x" * rng.randint(1, longest), ("y",)) for _ in range(count)]

    return [Task(f"t{k}", "EM", examples(size), [], []) for k, size in enumerate(sizes)]


def epoch_of(tasks, batch_size, seed, epoch=0) -> list[list[Item]]:
    count = -(-sum(len(task.train) for task in tasks) // batch_size)
    return list(itertools.islice(batches(tasks, batch_size, seed), epoch * count, (epoch + 1) * count))


@pytest.mark.parametrize("batch_size", [1, 7, 102, 1000])
def test_every_example_once_an_epoch(batch_size):
    tasks = ragged_tasks()
    everything = sorted((t, e.input) for t, task in enumerate(tasks) for e in task.train)
    for epoch in range(3):
        cut = epoch_of(tasks, batch_size, 0, epoch)
        assert sorted((item.task, item.input) for batch in cut for item in batch) == everything
        sizes = sorted(len(batch) for batch in cut)
        assert sizes[1:] == [batch_size] * (len(sizes) - 1)
        assert sizes[0] == (102 % batch_size or batch_size)


def test_batches_are_a_function_of_the_seed():
    tasks = ragged_tasks()
    assert epoch_of(tasks, 8, 3) == epoch_of(tasks, 8, 3)
    assert epoch_of(tasks, 8, 3) != epoch_of(tasks, 8, 4)
    assert epoch_of(tasks, 8, 3) != epoch_of(tasks, 8, 3, epoch=1)
    random.seed(9)
    assert epoch_of(tasks, 8, 3, epoch=2) == epoch_of(tasks, 8, 3, epoch=2)


def waste(cut) -> float:
    """The share of padding in the batches."""
    lengths = [[len(item.input) + len(item.output) for item in batch] for batch in cut]
    return 1 - sum(map(sum, lengths)) / sum(max(row) * len(row) for row in lengths)


def test_like_lengths_share_a_batch_in_random_order():
    tasks = ragged_tasks((300, 300), longest=200)
    cut = epoch_of(tasks, 10, 0)
    flat = [item for batch in cut for item in batch]
    random.Random(1).shuffle(flat)
    shuffled = [flat[k : k + 10] for k in range(0, len(flat), 10)]
    assert waste(shuffled) > 0.35  # so there was something to save
    assert waste(cut) < 0.05
    longest = [max(len(item.input) for item in batch) for batch in cut]
    falls = sum(a > b for a, b in itertools.pairwise(longest))
    assert 15 < falls < 45  # of 59 pairs of neighbours: batches come in random order
    assert any(len({item.task for item in batch}) == 2 for batch in cut)  # tasks are mixed


def test_by_length_sorts_within_windows_only():
    items = [Item(0, "x" * n, "") for n in (5, 1, 4, 2, 9, 3)]
    assert [[len(i.input) for i in b] for b in by_length(items, 2, window=4)] == [[1, 2], [4, 5], [3, 9]]
    assert [[len(i.input) for i in b] for b in by_length(items, 4, window=6)] == [[1, 2, 3, 4], [5, 9]]


def test_one_of_several_outputs_is_drawn():
    task = Task("t", "EM", [Example("q", ("a", "b", "c")), Example("p", ("d",))], [], [])
    drawn = Counter()
    for epoch in range(60):
        (batch,) = epoch_of([task], 2, 0, epoch)
        drawn.update((item.input, item.output) for item in batch)
    assert drawn["p", "d"] == 60
    assert set(drawn) == {("q", "a"), ("q", "b"), ("q", "c"), ("p", "d")}
    assert all(drawn["q", output] >= 10 for output in "abc")


# --- Collation --------------------------------------------------------------------------------------------------------
# ByT5: a byte is a token, its number 3 higher; </s> is 1 and ends every encoded text, <pad> is 0.


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer()


def token_ids(text: str, end: bool = True) -> list[int]:
    return [byte + 3 for byte in text.encode()] + [1] * end


def test_collate_encoder_decoder(tokenizer):
    batch = collate(["ab", "abcd"], ["xyz", "x"], tokenizer, True, 10, 10)
    assert batch["input_ids"].tolist() == [token_ids("ab") + [0, 0], token_ids("abcd")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [token_ids("xyz"), token_ids("x") + [-100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collate_decoder_only(tokenizer):
    batch = collate(["ab", "abcd"], ["xyz", "x"], tokenizer, False, 10, 10)
    assert batch["input_ids"].tolist() == [token_ids("ab") + token_ids("xyz"), token_ids("abcd") + token_ids("x")]
    assert batch["labels"].tolist() == [[-100] * 3 + token_ids("xyz"), [-100] * 5 + token_ids("x")]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 7]
    batch = collate(["ab", "a"], ["xyz", "x"], tokenizer, False, 10, 10)
    assert batch["input_ids"].tolist()[1] == token_ids("a") + token_ids("x") + [0] * 3
    assert batch["labels"].tolist()[1] == [-100] * 2 + token_ids("x") + [-100] * 3
    assert batch["attention_mask"].tolist()[1] == [1] * 4 + [0] * 3


def test_collate_truncates(tokenizer):
    batch = collate(["abcdef"], ["uvwxyz"], tokenizer, True, 4, 3)
    assert batch["input_ids"].shape == (1, 4) and batch["input_ids"].tolist()[0][:3] == token_ids("abc", end=False)
    assert batch["labels"].shape == (1, 3) and batch["labels"].tolist()[0][:2] == token_ids("uv", end=False)
    batch = collate(["abcdef"], ["uvwxyz"], tokenizer, False, 4, 3)
    assert batch["input_ids"].shape == (1, 4 + 3)
    assert batch["labels"].tolist() == [[-100] * 4 + token_ids("uv")]  # cut, and still ended
    batch = collate(["abcdef"], None, tokenizer, True, 4, 3)
    assert batch["input_ids"].shape == (1, 4)


def test_collate_for_generation(tokenizer):
    batch = collate(["a", "abc"], None, tokenizer, True, 10, 10)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [token_ids("a") + [0, 0], token_ids("abc")]
    batch = collate(["a", "abc"], None, tokenizer, False, 10, 10)
    assert batch["input_ids"].tolist() == [[0, 0] + token_ids("a"), token_ids("abc")]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1] * 4]


def test_collate_without_a_pad_token_pads_with_the_end_token(tokenizer):
    class NoPad:
        pad_token_id, eos_token_id = None, tokenizer.eos_token_id

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    batch = collate(["a", "abc"], ["x", "x"], NoPad(), False, 10, 10)
    assert batch["input_ids"].tolist()[0] == token_ids("a") + token_ids("x") + [1, 1]
    assert batch["attention_mask"].tolist()[0] == [1] * 4 + [0, 0]
    assert batch["labels"].tolist()[0] == [-100] * 2 + token_ids("x") + [-100, -100]


def random_model(encoder_decoder: bool):
    torch.manual_seed(0)
    sizes = dict(vocab_size=384, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    if encoder_decoder:
        config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, **sizes)
        model = T5ForConditionalGeneration(config).eval()
        for name, p in model.named_parameters():
            if "EncDecAttention" in name:
                p.data *= 5  # so that outputs depend on the input
        return model
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=4, bos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_padding_does_not_change_the_loss(tokenizer, encoder_decoder):
    """The loss of a batch is the mean of the examples' losses, weighted by their numbers of output tokens."""
    model = random_model(encoder_decoder)
    inputs, outputs = ["ab", "abcdefgh", "xyzxy"], ["x", "yyzz", "aaaaaaaaa"]
    with torch.no_grad():
        whole = model(**collate(inputs, outputs, tokenizer, encoder_decoder, 20, 20)).loss
        alone = [
            model(**collate([i], [o], tokenizer, encoder_decoder, 20, 20)).loss
            for i, o in zip(inputs, outputs, strict=True)
        ]
    tokens = torch.tensor([len(output) + 1.0 for output in outputs])
    torch.testing.assert_close(whole, (torch.stack(alone) * tokens).sum() / tokens.sum(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, torch.stack(alone).mean(), rtol=1e-4)  # so the weighting mattered


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_padding_does_not_change_what_is_generated(tokenizer, encoder_decoder):
    model = random_model(encoder_decoder)
    inputs = ["ab", "abcdefgh", "xyzxy"]

    def outputs(texts):
        batch = collate(texts, None, tokenizer, encoder_decoder, 20, 20)
        out = model.generate(**batch, max_new_tokens=6, do_sample=False)
        return (out if encoder_decoder else out[:, batch["input_ids"].shape[1] :]).tolist()

    alone = [outputs([text])[0] for text in inputs]
    assert len(set(map(tuple, alone))) == len(inputs)  # the model does look at its input
    assert outputs(inputs) == alone


# --- CrossFit: reading ------------------------------------------------------------------------------------------------


def write_task(root: Path, name: str, rows: list[str], k=4, splits=data.CROSSFIT_SPLITS):
    """A task folder in the gym's layout: in every split the same lines in train, dev and test."""
    (root / name).mkdir(parents=True)
    for split, part in itertools.product(splits, ("train", "dev", "test")):
        (root / name / f"{name}_{k}_{split}_{part}.tsv").write_bytes("".join(r + "\n" for r in rows).encode())


@pytest.fixture
def gym(tmp_path):
    """Two training tasks, a dev and a test task, invented here."""
    for name in ("colour", "shape-a_b", "size", "taste"):
        write_task(tmp_path, name, ["red apple\tred", "green pear\tgreen"])
    names = {"train": ["shape-a_b", "colour", "not_here"], "dev": ["size"], "test": ["taste"]}
    (tmp_path / "random.json").write_text(json.dumps(names | {"all": sum(names.values(), [])}))
    return tmp_path


def test_crossfit_format(gym, capsys):
    benchmark = data.load("crossfit", str(gym), "13")
    assert [task.name for task in benchmark.train] == ["colour", "shape-a_b"]
    assert "1 tasks" in capsys.readouterr().out  # not_here is reported
    expected = [
        Example(" [shape-a_b] red apple", (" red",)),
        Example(" [shape-a_b] green pear", (" green",)),
    ]
    assert benchmark.train[1].train == expected and benchmark.train[1].dev == []
    assert benchmark.train[1].test == expected
    assert benchmark.test[0].dev == [
        Example(" [taste] red apple", (" red",)),
        Example(" [taste] green pear", (" green",)),
    ]
    assert benchmark.dev[0].metric == "ACC" and benchmark.dev[0].skills == ()


def test_train_tasks_merge_the_splits_and_test_tasks_do_not(gym):
    for split in data.CROSSFIT_SPLITS:
        for part in ("train", "dev"):
            for name in ("colour", "taste"):
                row = f"{part} {split}\tred\nshared\tred\n"
                (gym / name / f"{name}_4_{split}_{part}.tsv").write_text(row)
    benchmark = data.crossfit(str(gym), "21")
    inputs = [e.input.removeprefix(" [colour] ") for e in benchmark.train[0].train]
    assert Counter(inputs) == Counter(
        [f"{part} {split}" for split in data.CROSSFIT_SPLITS for part in ("train", "dev")] + ["shared"]
    )
    (taste,) = benchmark.test
    assert [e.input for e in taste.train] == [" [taste] train 21", " [taste] shared"]
    assert [e.input for e in taste.dev] == [" [taste] dev 21", " [taste] shared"]


def test_crossfit_needs_a_folder_with_a_partition(gym, tmp_path):
    with pytest.raises(UserError, match="--data-dir"):
        data.crossfit("")
    with pytest.raises(UserError, match=r"--data-dir .*missing has no random\.json"):
        data.crossfit(str(tmp_path / "missing"))
    (gym / "random.json").unlink()
    with pytest.raises(UserError, match=r"--data-dir .*has no random\.json"):
        data.crossfit(str(gym))


@pytest.mark.parametrize(
    "content", [b"{", b'{"train": ["colour"]}', b"[]", b"\xff\xfe", b'{"train": 3, "dev": [], "test": []}']
)
def test_broken_partition_file_is_named(gym, content):
    (gym / "random.json").write_bytes(content)
    with pytest.raises(UserError, match=r"random\.json"):
        data.crossfit(str(gym))


def test_partition_without_any_training_task(gym):
    (gym / "random.json").write_text(json.dumps({"train": ["nowhere"], "dev": ["size"], "test": ["taste"]}))
    with pytest.raises(UserError, match="none of the training tasks"):
        data.crossfit(str(gym))


def test_unknown_split(gym):
    with pytest.raises(UserError, match="--split 7 .*100, 13, 21, 42, 87"):
        data.crossfit(str(gym), "7")


@pytest.mark.parametrize("task, part", [("colour", "train"), ("taste", "dev"), ("size", "test")])
def test_missing_split_file(gym, task, part):
    (gym / task / f"{task}_4_100_{part}.tsv").unlink()
    with pytest.raises(UserError, match=rf"{task}_<k>_100_{part}\.tsv, found 0"):
        data.crossfit(str(gym), "100")


def test_two_files_for_one_split(gym):
    (gym / "colour" / "colour_8_42_dev.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match=r"colour_<k>_42_dev\.tsv, found 2"):
        data.crossfit(str(gym))


@pytest.mark.parametrize(
    "content, line",
    [
        ("a\tb\none column\nc\td\n", 2),
        ("a\tb\n\nc\td\n", 2),  # an empty line in the middle
        ("a\tb\nc\td\n\n", 3),  # an empty line at the end
        ("one column", 1),
        ("a\tb\nan input and a tab\t\n", 2),
        ("a\tb\n\tan output\n", 2),
    ],
)
def test_lines_without_an_output_are_refused(gym, content, line):
    path = gym / "taste" / "taste_4_100_train.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:{line}: "):
        data.crossfit(str(gym), "100")


def test_a_file_that_is_not_utf8_is_named(gym):
    path = gym / "taste" / "taste_4_100_test.tsv"
    path.write_bytes(b"caf\xe9\tb\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: not UTF-8 at byte 3"):
        data.crossfit(str(gym), "100")


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "t.tsv"
    odd = "a\x1cb\x1dc\x0bd\x85e\u2028f\rg"
    path.write_bytes(f"{odd}\tx\nq\ty z\tw\n".encode())
    assert read_tsv(path, "t") == [Example(f" [t] {odd}", (" x",)), Example(" [t] q", (" y z", " w"))]


def test_windows_line_ends_and_a_missing_last_line_end(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"a\tx\r\nb\ty")
    assert read_tsv(path, "t") == [Example(" [t] a", (" x",)), Example(" [t] b", (" y",))]


cell = st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"]), min_size=1, max_size=12)
clean = cell.filter(lambda text: text == text.strip())


@given(st.lists(st.tuples(clean, st.lists(clean, min_size=1, max_size=3)), max_size=8))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("tsv") / "t.tsv"
    path.write_bytes("".join("\t".join([source, *outputs]) + "\n" for source, outputs in rows).encode())
    expected = [Example(f" [t] {source}", tuple(f" {output}" for output in outputs)) for source, outputs in rows]
    assert read_tsv(path, "t") == expected


# --- CrossFit: the real sample ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return data.crossfit(str(CROSSFIT), "100")


def manifest() -> dict[str, list[str]]:
    """The manifest's tables: task name to the row's cells (task, kind, k, metric, train, dev, test, ...)."""
    lines = (CROSSFIT / "MANIFEST.md").read_text().split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row for row in rows if row[0] != "task"}


def raw_lines(task: str, part: str, splits=data.CROSSFIT_SPLITS) -> list[bytes]:
    return [
        line
        for split in splits
        for path in (CROSSFIT / task).glob(f"{task}_*_{split}_{part}.tsv")
        for line in path.read_bytes().split(b"\n")
        if line
    ]


@needs_crossfit
def test_real_tasks_by_partition(real):
    partition = json.loads((CROSSFIT / "random.json").read_text())
    assert (len(real.train), len(real.dev), len(real.test)) == (29, 3, 5)
    for part in ("train", "dev", "test"):
        names = [task.name for task in getattr(real, part)]
        assert names == sorted(name for name in partition[part] if (CROSSFIT / name).is_dir())


@needs_crossfit
def test_real_metrics_are_the_manifests(real):
    rows = manifest()
    found = {task.name: task.metric for task in real.train + real.dev + real.test}
    assert len(found) == 37 and found == {name: row[3] for name, row in rows.items()}


@needs_crossfit
def test_real_sizes_are_the_manifests(real):
    rows = manifest()
    for task in real.dev + real.test:
        sizes = [int(rows[task.name][k].split(" of ")[0]) for k in (4, 5, 6)]
        assert [len(task.train), len(task.dev), len(task.test)] == sizes, task.name
    for task in real.train:
        assert len(task.test) == int(rows[task.name][6].split(" of ")[0]), task.name


@needs_crossfit
def test_real_train_tasks_merge_all_splits_once(real):
    repeated = 0
    for task in real.train:
        lines = raw_lines(task.name, "train") + raw_lines(task.name, "dev")
        distinct = {line.decode().strip() for line in lines}
        assert len(set(task.train)) == len(task.train) == len(distinct), task.name
        assert task.dev == []
        repeated += len(lines) - len(distinct)
    assert repeated > 100  # so there was something to merge


@needs_crossfit
def test_real_texts_are_the_files(real):
    for task in real.train + real.dev + real.test:
        lines = [line.decode().strip().split("\t") for line in raw_lines(task.name, "test", ("100",))]
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
    other = data.crossfit(str(CROSSFIT), "87")
    assert other.train == real.train  # pre-training sees all splits anyway
    for a, b in zip(real.dev + real.test, other.dev + other.test, strict=True):
        assert a.name == b.name and a.test == b.test
        assert a.train != b.train and a.dev != b.dev
