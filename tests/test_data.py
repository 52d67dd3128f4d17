"""The embedded benchmark, batches and collation (the other benchmarks have test files of their own)."""

import itertools
import random
import re
import resource
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks import load, strings
from benchmarks.metrics import score
from benchmarks.strings import LETTERS, OPERATIONS, compose
from benchmarks.tables import table_of
from data import Example, Item, Task, batches, by_length, collate
from plumbing.errors import UserError, exit_on_user_error

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
    every = strings.strings()
    confused = []
    for task in every.train + every.dev + every.test:
        for skill in task.skills:  # leave one operation out
            fewer = tuple(s for s in task.skills if s != skill)
            wrong = [compose(fewer, string_of(example)) for example in task.test]
            if score(task.metric, wrong, task.test) > 99:
                confused.append((task.name, skill))
    assert not confused, f"{len(confused)} tasks cannot tell that an operation was left out: {confused[:4]} ..."


def test_partition_is_fixed_and_disjoint():
    benchmark = strings.strings()
    parts = [[task.skills for task in part] for part in (benchmark.train, benchmark.dev, benchmark.test)]
    assert [len(part) for part in parts] == [64, 8, 12]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(PAIRS_AND_TRIPLES)
    other = strings.strings(split=5, instructions=True)
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
    good = [number for number in range(strings.PARTITION + 1) if cover(number)[0] >= 3 and cover(number)[1] >= 2]
    assert good == [strings.PARTITION]
    benchmark = strings.strings()
    held_out = Counter(skill for task in benchmark.test for skill in task.skills)
    dev = Counter(skill for task in benchmark.dev for skill in task.skills)
    assert all(held_out[name] >= 3 and dev[name] >= 2 for name in OPERATIONS)


def test_tasks_hold_true_examples_of_the_promised_number():
    benchmark = strings.strings()
    numbers = {"train": [500, 20, 100], "dev": [32, 32, 100], "test": [32, 32, 100]}
    for part, expected in numbers.items():
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
    benchmark = strings.strings(split=3)
    for task in benchmark.train + benchmark.dev + benchmark.test:
        texts = [string_of(example) for example in task.train + task.dev + task.test]
        assert len(set(texts)) == len(texts), task.name


def test_examples_are_a_function_of_the_split():
    one, again, other = strings.strings(1), strings.strings(1), strings.strings(2)
    assert one == again
    for a, b in zip(one.train + one.dev + one.test, other.train + other.dev + other.test, strict=True):
        assert a.test == b.test  # scores of different splits are on the same examples
        assert a.train != b.train and a.dev != b.dev
        assert not set(a.train) & set(a.test) and not set(b.train) & set(b.test)


def test_examples_do_not_depend_on_global_randomness():
    random.seed(1)
    one = strings.strings()
    random.seed(2)
    assert strings.strings() == one


def test_instructions_name_the_operations():
    plain, instructed = strings.strings(0, False), strings.strings(0, True)
    task, same = plain.train[5], instructed.train[5]
    assert same.skills == task.skills
    for a, b in zip(task.train + task.dev + task.test, same.train + same.dev + same.test, strict=True):
        assert b.input == f"{' '.join(task.skills)}: {string_of(a)}" and b.outputs == a.outputs


def test_strings_single():
    benchmark = strings.strings_single()
    assert [task.skills for task in benchmark.train] == [(name,) for name in OPERATIONS]
    assert benchmark.dev == [] and benchmark.test == []
    for task in benchmark.train:
        assert (len(task.train), len(task.dev), len(task.test)) == (40_000, 100, 100)
        assert len({e.input for e in task.train + task.dev + task.test}) == 40_200
        assert all(e.input.startswith(f"{task.name}: ") for e in task.train[:100])
        text = task.train[7].input.removeprefix(f"{task.name}: ")
        assert task.train[7].outputs == (compose(task.skills, text),)


def test_load_by_name():
    assert load("strings", split="4", instructions=True) == strings.strings(4, True)
    assert len(load("strings-single").train) == 8
    with pytest.raises(UserError, match="--dataset nonsense is unknown"):
        load("nonsense")
    for split in ("x", "-1", "1.5", ""):
        with pytest.raises(UserError, match="--split .*whole number"):
            load("strings", split=split)


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
        assert sorted((item.task, item.example.input) for batch in cut for item in batch) == everything
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
    lengths = [[len(item.example.input) + len(item.output) for item in batch] for batch in cut]
    return 1 - sum(map(sum, lengths)) / sum(max(row) * len(row) for row in lengths)


def test_like_lengths_share_a_batch_in_random_order():
    tasks = ragged_tasks((300, 300), longest=200)
    cut = epoch_of(tasks, 10, 0)
    flat = [item for batch in cut for item in batch]
    random.Random(1).shuffle(flat)
    shuffled = [flat[k : k + 10] for k in range(0, len(flat), 10)]
    assert waste(shuffled) > 0.35  # so there was something to save
    assert waste(cut) < 0.12
    longest = [max(len(item.example.input) for item in batch) for batch in cut]
    falls = sum(a > b for a, b in itertools.pairwise(longest))
    assert 15 < falls < 45  # of 59 pairs of neighbours: batches come in random order
    assert any(len({item.task for item in batch}) == 2 for batch in cut)  # tasks are mixed


def test_by_length_sorts_and_cuts():
    items = [Item(0, Example("x" * n, ("",)), "") for n in (5, 1, 4, 2, 9, 3)]
    assert [[len(i.example.input) for i in b] for b in by_length(items, 2)] == [[1, 2], [3, 4], [5, 9]]
    assert [[len(i.example.input) for i in b] for b in by_length(items, 4)] == [[1, 2, 3, 4], [5, 9]]


def test_one_of_several_outputs_is_drawn():
    task = Task("t", "EM", [Example("q", ("a", "b", "c")), Example("p", ("d",))], [], [])
    drawn = Counter()
    for epoch in range(60):
        (batch,) = epoch_of([task], 2, 0, epoch)
        drawn.update((item.example.input, item.output) for item in batch)
    assert drawn["p", "d"] == 60
    assert set(drawn) == {("q", "a"), ("q", "b"), ("q", "c"), ("p", "d")}
    assert all(drawn["q", output] >= 10 for output in "abc")


# --- Collation --------------------------------------------------------------------------------------------------------
# ByT5: a byte is a token, its number 3 higher; </s> is 1 and ends every encoded text, <pad> is 0.


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer()


def inputs_of(texts: list[str]) -> list[Example]:
    return [Example(text, ("",)) for text in texts]


def token_ids(text: str, end: bool = True) -> list[int]:
    return [byte + 3 for byte in text.encode()] + [1] * end


def test_collate_encoder_decoder(tokenizer):
    batch = collate(inputs_of(["ab", "abcd"]), ["xyz", "x"], tokenizer, True, 10, 10)
    assert batch["input_ids"].tolist() == [token_ids("ab") + [0, 0], token_ids("abcd")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [token_ids("xyz"), token_ids("x") + [-100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collate_decoder_only(tokenizer):
    batch = collate(inputs_of(["ab", "abcd"]), [" xyz", " x"], tokenizer, False, 10, 10)
    assert batch["input_ids"].tolist() == [token_ids("ab") + token_ids(" xyz"), token_ids("abcd") + token_ids(" x")]
    assert batch["labels"].tolist() == [[-100] * 3 + token_ids(" xyz"), [-100] * 5 + token_ids(" x")]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 8]
    batch = collate(inputs_of(["ab", "a"]), [" xyz", " x"], tokenizer, False, 10, 10)
    assert batch["input_ids"].tolist()[1] == token_ids("a") + token_ids(" x") + [0] * 3
    assert batch["labels"].tolist()[1] == [-100] * 2 + token_ids(" x") + [-100] * 3
    assert batch["attention_mask"].tolist()[1] == [1] * 5 + [0] * 3


@pytest.mark.parametrize("output", ["xyz", " xyz"])
def test_an_output_starts_with_one_space_after_the_input_of_a_decoder_only_model(tokenizer, output):
    batch = collate(inputs_of(["ab"]), [output], tokenizer, False, 10, 10)
    assert batch["input_ids"].tolist() == [token_ids("ab") + token_ids(" xyz")]
    batch = collate(inputs_of(["ab"]), [output], tokenizer, True, 10, 10)
    assert batch["labels"].tolist() == [token_ids(output)]  # an encoder-decoder's output is as it is


def test_collate_truncates(tokenizer):
    batch = collate(inputs_of(["abcdef"]), ["uvwxyz"], tokenizer, True, 4, 3)
    assert batch["input_ids"].shape == (1, 4) and batch["input_ids"].tolist()[0][:3] == token_ids("abc", end=False)
    assert batch["labels"].shape == (1, 3) and batch["labels"].tolist()[0][:2] == token_ids("uv", end=False)
    batch = collate(inputs_of(["abcdef"]), [" vwxyz"], tokenizer, False, 4, 3)
    assert batch["input_ids"].shape == (1, 4 + 3)
    assert batch["labels"].tolist() == [[-100] * 4 + token_ids(" v")]  # cut, and still ended
    batch = collate(inputs_of(["abcdef"]), None, tokenizer, True, 4, 3)
    assert batch["input_ids"].shape == (1, 4)


def test_collate_for_generation(tokenizer):
    batch = collate(inputs_of(["a", "abc"]), None, tokenizer, True, 10, 10)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [token_ids("a") + [0, 0], token_ids("abc")]
    batch = collate(inputs_of(["a", "abc"]), None, tokenizer, False, 10, 10)
    assert batch["input_ids"].tolist() == [[0, 0] + token_ids("a"), token_ids("abc")]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1] * 4]


def test_collate_without_a_pad_token_pads_with_the_end_token(tokenizer):
    class NoPad:
        pad_token_id, eos_token_id = None, tokenizer.eos_token_id

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    batch = collate(inputs_of(["a", "abc"]), [" x", " x"], NoPad(), False, 10, 10)
    assert batch["input_ids"].tolist()[0] == token_ids("a") + token_ids(" x") + [1, 1]
    assert batch["attention_mask"].tolist()[0] == [1] * 5 + [0, 0]
    assert batch["labels"].tolist()[0] == [-100] * 2 + token_ids(" x") + [-100, -100]


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
        whole = model(**collate(inputs_of(inputs), outputs, tokenizer, encoder_decoder, 20, 20)).loss
        alone = [
            model(**collate(inputs_of([i]), [o], tokenizer, encoder_decoder, 20, 20)).loss
            for i, o in zip(inputs, outputs, strict=True)
        ]
    space = not encoder_decoder  # which is a token of the output there
    tokens = torch.tensor([len(output) + space + 1.0 for output in outputs])
    torch.testing.assert_close(whole, (torch.stack(alone) * tokens).sum() / tokens.sum(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, torch.stack(alone).mean(), rtol=1e-4)  # so the weighting mattered


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_padding_does_not_change_what_is_generated(tokenizer, encoder_decoder):
    model = random_model(encoder_decoder)
    inputs = ["ab", "abcdefgh", "xyzxy"]

    def outputs(texts):
        batch = collate(inputs_of(texts), None, tokenizer, encoder_decoder, 20, 20)
        out = model.generate(**batch, max_new_tokens=6, do_sample=False)
        return (out if encoder_decoder else out[:, batch["input_ids"].shape[1] :]).tolist()

    alone = [outputs([text])[0] for text in inputs]
    assert len(set(map(tuple, alone))) == len(inputs)  # the model does look at its input
    assert outputs(inputs) == alone


# --- A cache that cannot be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset, count", [("t0", lambda b: sum(len(t.train) for t in b.test)), ("superni", lambda b: len(b.test))]
)
@pytest.mark.parametrize("limit", [100, 3000])
def test_a_cache_that_cannot_be_written(dataset, count, limit, tmp_path, monkeypatch, capsys):
    """As on a full disk: one sentence that names the cache of `datasets`, exit code 1; with room, all is read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    sample = Path(__file__).resolve().parents[1] / "assets" / "samples" / dataset
    split = {"t0": "42", "superni": "13"}[dataset]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            exit_on_user_error(load, dataset, str(sample), split, ("test",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1
    assert said.startswith(f"error: {tmp_path}: ") and "large" in said and "HF_DATASETS_CACHE" in said
    assert count(load(dataset, str(sample), split, ("test",))) > 0


def test_an_error_of_a_reader_stays_what_it_is(tmp_path, monkeypatch):
    """A UserError stays a UserError; a file that cannot be read, or a bug in a reader, is not called a full disk."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="^a file$"):
        table_of(_refusing, [tmp_path / "file"], {"text": "string"})
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'file'))} cannot be read: Input/output error"):
        table_of(_unreadable, [tmp_path / "file"], {"text": "string"})
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        table_of(_mistaken, [tmp_path / "file"], {"text": "string"})


def _refusing(path):
    yield {"text": "a"}
    raise UserError("a file")


def _unreadable(path):
    yield {"text": "a"}
    raise OSError(5, "Input/output error")


def _mistaken(path):
    yield {"text": "a"}
    raise KeyError("a")
