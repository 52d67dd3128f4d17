"""Metrics against hand-computed values and independent oracles; generation and choosing."""

import dataclasses
import math
import random
import re
import string
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

import benchmarks
import evaluate
import train
from benchmarks import metrics
from benchmarks.metrics import METRICS, XLINGUAL, score
from data import Benchmark, Example, Task
from evaluate import print_scores
from inject import adapter_parameters, inject, routers, task_ids
from layers import LORA_LAYERS
from lora import LoRA
from mhr import MHRLinear, MHRRouter
from plumbing.backbones import advice_on_memory
from plumbing.errors import RunError, UserError
from scoring import all_scores, by_group, constant_scores, evaluate_tasks, main_scores, mean, predict
from tests.helpers import run_folder


def examples(*references) -> list[Example]:
    """Examples by their references: a string, or a tuple of several."""
    return [Example("q", r if isinstance(r, tuple) else (r,)) for r in references]


LOCAL = METRICS.keys() - {XLINGUAL}  # that one needs a tokenizer of the hub


# --- Metrics by hand --------------------------------------------------------------------------------------------------


def test_crossfits_seven_metrics_are_there():
    assert set(METRICS) >= {
        "EM", "ACC", "QA-F1", "Rouge-L", "Classification-F1", "Matthew-Correlation", "Pearson-Correlation",
    }  # fmt: skip


@pytest.mark.parametrize("metric", sorted(LOCAL))
def test_perfect_predictions_score_100(metric):
    outputs = {
        "Matthew-Correlation": ["acceptable", "unacceptable", "acceptable"],
        "Pearson-Correlation": ["1", "2.5", "-3"],
    }.get(metric, ["one red apple", "two", "two"])
    assert score(metric, outputs, examples(*outputs)) == pytest.approx(100)


@pytest.mark.parametrize("metric", sorted(LOCAL))
def test_white_space_around_texts_is_stripped(metric):
    outputs = {
        "Matthew-Correlation": ["acceptable", "unacceptable"],
        "Pearson-Correlation": ["1", "2"],
    }.get(metric, ["red", "blue"])
    padded = [f"  {output}\n" for output in outputs]
    assert score(metric, padded, examples(*outputs)) == pytest.approx(100)
    assert score(metric, outputs, examples(*padded)) == pytest.approx(100)


@pytest.mark.parametrize("metric", sorted(LOCAL))
def test_no_examples_is_an_error(metric):
    with pytest.raises(ValueError, match="no examples"):
        score(metric, [], [])


@pytest.mark.parametrize("metric", sorted(LOCAL))
def test_a_prediction_too_few_is_an_error(metric):
    with pytest.raises(ValueError):
        score(metric, ["1", "2"], examples("1", "2", "3"))


@pytest.mark.parametrize(
    "metric, prediction, references, expected",
    [
        ("EM", "The  apple!", ("apple",), 100),  # case, article, punctuation, spaces
        ("EM", "an a-ppl.e", ("APPLE",), 100),
        ("EM", "then apple", ("apple",), 0),  # an article is a word
        ("EM", "apples", ("apple",), 0),
        ("EM", "red apple", ("apple red",), 0),  # the order counts
        ("EM", "blue", ("red", "blue"), 100),
        ("EM", "green", ("red", "blue"), 0),
        ("ACC", "Not Well-Formed", ("not well-formed",), 100),
        ("ACC", "the apple", ("apple",), 0),  # no normalisation but case
        ("ACC", "apple.", ("apple",), 0),
        ("ACC", "blue", ("red", "Blue"), 100),
        ("QA-F1", "red apple", ("a big red apple",), 80),  # 2 common, 2 and 3 words: 2*2/5
        ("QA-F1", "the the", ("the",), 0),  # nothing is left
        ("QA-F1", "red red", ("red",), 200 / 3),  # a word counts as often as it is common
        ("QA-F1", "red", ("blue", "red blue"), 200 / 3),
        ("QA-F1", "", ("red",), 0),
        ("Rouge-L", "the cat sat", ("the cat sat on the mat",), 100 * 2 * 3 / 9),
        ("Rouge-L", "a b c d", ("d c b a",), 25),  # the longest common subsequence is 1 long
        ("Rouge-L", "running dogs", ("run dog",), 100),  # stemmed
        ("Rouge-L", "red fox", ("blue", "one red fox"), 80),
        ("Rouge-L", "", ("red",), 0),
    ],
)
def test_example_wise_metrics_by_hand(metric, prediction, references, expected):
    assert score(metric, [prediction], examples(references)) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["EM", "ACC", "QA-F1", "Rouge-L"])
def test_example_wise_metrics_are_averaged(metric):
    assert score(metric, ["red", "x", "y", "blue"], examples("red", "blue", "green", "blue")) == pytest.approx(50)


def test_classification_f1_by_hand():
    gold = examples("a", "a", "b", "b")
    # a: 2 of 3 right, both found: 0.8; b: 1 of 1 right, 1 of 2 found: 2/3
    assert score("Classification-F1", ["a", "a", "b", "a"], gold) == pytest.approx(100 * (0.8 + 2 / 3) / 2)
    # a word outside the labels is a class of its own, which nothing gold belongs to: (1 + 2/3 + 0) / 3
    assert score("Classification-F1", ["a", "a", "b", "zzz"], gold) == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert score("Classification-F1", ["A", "A", "B", "B"], gold) == 0  # exact strings
    assert score("Classification-F1", ["b", "a"], examples(("a", "b"), ("a", "b"))) == pytest.approx(100 / 3)


def test_matthews_by_hand():
    yes, no = "acceptable", "unacceptable"
    gold = examples(yes, yes, yes, no, no)
    # tp 2, fn 1, fp 1, tn 1: (2*1 - 1*1) / sqrt(3 * 3 * 2 * 2)
    assert score("Matthew-Correlation", [yes, yes, no, yes, no], gold) == pytest.approx(100 / 6)
    assert score("Matthew-Correlation", [no, no, no, yes, yes], gold) == pytest.approx(-100)
    assert score("Matthew-Correlation", [yes] * 5, gold) == 0  # not defined
    same = score("Matthew-Correlation", [yes, yes, "nonsense", yes, ""], gold)
    assert same == pytest.approx(100 / 6)  # everything else counts as unacceptable


def test_pearson_by_hand():
    gold = examples("1", "2", "3")
    assert score("Pearson-Correlation", ["10", "20", "30"], gold) == pytest.approx(100)
    assert score("Pearson-Correlation", ["3", "2.0", "1"], gold) == pytest.approx(-100)
    assert score("Pearson-Correlation", ["1", "3", "2"], gold) == pytest.approx(50)


@pytest.mark.parametrize("predictions", [["1", "2", "three"], ["1", "", "2"], ["2", "2", "2"]])
def test_pearson_is_0_where_it_is_not_defined(predictions):
    assert score("Pearson-Correlation", predictions, examples("1", "2", "3")) == 0
    assert score("Pearson-Correlation", ["1", "2", "3"], examples("4", "4", "4")) == 0
    assert score("Pearson-Correlation", ["1"], examples("1")) == 0


@pytest.mark.parametrize("word", ["nan", "inf", "-Infinity", "1e999"])
def test_pearson_of_words_that_float_accepts_is_a_number(word):
    """A model can write "nan": the score must still be a number, or result.json is no JSON."""
    assert math.isfinite(score("Pearson-Correlation", ["1", word, "3"], examples("1", "2", "3")))


# --- Metrics against independent oracles ------------------------------------------------------------------------------


def squad_words(text: str) -> list[str]:
    """SQuAD's normalisation, step by step."""
    text = text.lower()
    for mark in string.punctuation:
        text = text.replace(mark, "")
    return [word for word in re.findall(r"\S+", re.sub(r"\b(a|an|the)\b", " ", text))]


def squad_f1(prediction: str, reference: str) -> float:
    p, r = squad_words(prediction), squad_words(reference)
    common = sum(min(count, r.count(word)) for word, count in Counter(p).items())
    if common == 0:
        return 0.0
    precision, recall = common / len(p), common / len(r)
    return 2 * precision * recall / (precision + recall)


def lcs(a, b) -> int:
    """The length of the longest common subsequence, by its definition."""
    if not a or not b:
        return 0
    return 1 + lcs(a[1:], b[1:]) if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))


word = st.sampled_from(["the", "a", "An", "red", "Red", "fox", "fox.", "b-c", "bc", "!", "theory"])
text = st.lists(word, max_size=6).map(" ".join)
rows = st.lists(st.tuples(text, st.lists(text, min_size=1, max_size=3)), min_size=1, max_size=5)


@given(rows)
@settings(max_examples=150, deadline=None)
def test_squad_metrics_against_an_oracle(rows):
    predictions, gold = [p for p, _ in rows], [Example("q", tuple(rs)) for _, rs in rows]
    em = np.mean([max(squad_words(p) == squad_words(r) for r in rs) for p, rs in rows])
    f1 = np.mean([max(squad_f1(p, r) for r in rs) for p, rs in rows])
    acc = np.mean([max(p.strip().lower() == r.strip().lower() for r in rs) for p, rs in rows])
    assert score("EM", predictions, gold) == pytest.approx(100 * em)
    assert score("QA-F1", predictions, gold) == pytest.approx(100 * f1)
    assert score("ACC", predictions, gold) == pytest.approx(100 * acc)


letters = st.lists(st.sampled_from("abcd"), min_size=1, max_size=6)


@given(letters, letters)
@settings(max_examples=80, deadline=None)
def test_rouge_l_against_an_oracle(p, r):
    expected = 100 * 2 * lcs(p, r) / (len(p) + len(r))
    assert score("Rouge-L", [" ".join(p)], examples(" ".join(r))) == pytest.approx(expected)


def macro_f1(gold: list[str], guess: list[str]) -> float:
    of_labels = []
    for label in set(gold) | set(guess):
        true = sum(g == p == label for g, p in zip(gold, guess, strict=True))
        of_labels.append(2 * true / (gold.count(label) + guess.count(label)))
    return float(np.mean(of_labels))


@given(st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), st.sampled_from(["x", "y", "z", "w"])), min_size=1))
@settings(max_examples=80, deadline=None)
def test_classification_f1_against_oracles(pairs):
    gold, guess = [g for g, _ in pairs], [p for _, p in pairs]
    value = score("Classification-F1", guess, examples(*gold))
    assert value == pytest.approx(100 * macro_f1(gold, guess))
    assert value == pytest.approx(100 * f1_score(gold, guess, average="macro", zero_division=0))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2))
@settings(max_examples=80, deadline=None)
def test_matthews_against_scikit_learn(pairs):
    name = {True: "acceptable", False: "unacceptable"}
    gold, guess = [g for g, _ in pairs], [p for _, p in pairs]
    value = score("Matthew-Correlation", [name[p] for p in guess], examples(*(name[g] for g in gold)))
    assert value == pytest.approx(100 * matthews_corrcoef(gold, guess))


def test_pearson_against_scipy_and_numpy():
    rng = random.Random(0)
    for _ in range(20):
        gold, guess = ([round(rng.uniform(-5, 5), 3) for _ in range(8)] for _ in range(2))
        value = score("Pearson-Correlation", list(map(str, guess)), examples(*map(str, gold)))
        assert value == pytest.approx(100 * pearsonr(gold, guess).statistic)
        assert value == pytest.approx(100 * np.corrcoef(gold, guess)[0, 1])


def test_mean_is_over_tasks():
    assert mean({"a": 10.0, "b": 40.0}) == 25.0


# --- SuperNI's two metrics, and gold answers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, prediction, references, expected",
    [
        ("SuperNI-EM", "The  Apple!", ("the apple",), 100),  # case, punctuation, spaces
        ("SuperNI-EM", "apple", ("the apple",), 0),  # an article is a word like any other
        ("EM", "apple", ("the apple",), 100),  # SQuAD's drops it
        ("SuperNI-EM", "an apple", ("a red apple", "apple", "An apple."), 100),  # the best of several references
        ("SuperNI-EM", "two", ("one", "three"), 0),
        ("SuperNI-EM", "", ("yes",), 0),
        ("SuperNI-EM", "yes", ("",), 0),
        ("SuperNI-EM", "...", ("",), 100),  # nothing is left of either
        ("SuperNI-EM", "CAF\u00c9 \u00dcbung", ("caf\u00e9 \u00fcbung",), 100),  # letters outside ASCII have case too
        ("SuperNI-EM", "cafe", ("caf\u00e9",), 0),
        ("SuperNI-EM", "\u65e5\u672c", ("\u65e5\u672c",), 100),
        ("SuperNI-EM", "it\u2019s", ("its",), 0),  # a typographic apostrophe is no ASCII punctuation
        ("SuperNI-EM", "it's", ("its",), 100),
        ("Rouge-L", "the red fox", ("a blue fox", "the red dog", "fox"), 200 / 3),  # 1/3, 2/3, 2*1/4
        ("Rouge-L", "red fox", ("red dog", "blue fox"), 50),  # both references are as good
        ("Rouge-L", "", ("yes", "no"), 0),
        ("Rouge-L", "yes", ("", "Yes."), 100),
        ("Rouge-L", "", ("",), 0),  # rouge-score: no token, no score
        ("Rouge-L", "die \u00dcbung eins", ("die \u00fcbung eins",), 100),
    ],
)  # fmt: skip
def test_superni_metrics_by_hand(metric, prediction, references, expected):
    assert score(metric, [prediction], examples(references)) == pytest.approx(expected)


def test_rouge_of_another_script(monkeypatch, capsys):
    """rouge-score reads a-z and 0-9 alone: a right answer in another script would score 0. It is refused, or scored by
    the tokens of GPT-2, as in the official cross-lingual track; a mark without letters is said to score 0."""
    for text in (
        "\u732b\u5750",
        "\u6211\u4eec\u57282020\u5e74\u53c2\u52a0\u4e86",
        "\u043a\u043e\u0448\u043a\u0430",
        "\u0642\u0637\u0629",
    ):
        with pytest.raises(UserError, match='^Rouge-L reads the letters a-z .* by "Output_language" in its file'):
            score("Rouge-L", [text], examples((text,)))
    assert score("Rouge-L", ["?", "a cat"], examples(("?",), ("a cat",))) == 50
    assert "1 of 2 references, as '?', have few or none" in capsys.readouterr().out
    byte_level = ByteLevelTokenizer()
    monkeypatch.setattr(metrics.AutoTokenizer, "from_pretrained", lambda name, **options: byte_level)
    metrics._scorer.cache_clear()
    for right, wrong in (("\u732b\u5750 \u57ab", "\u72d7"), ("a cat", "dogs")):
        assert score(XLINGUAL, [right], examples((right,))) == 100
        assert score(XLINGUAL, [wrong], examples((right,))) < 50
    monkeypatch.setattr(metrics.AutoTokenizer, "from_pretrained", lambda name, **options: 1 / 0)
    metrics._scorer.cache_clear()
    with pytest.raises(UserError, match="needs the tokenizer of gpt2 from the hub, which does not answer"):
        score(XLINGUAL, ["x"], examples(("x",)))
    metrics._scorer.cache_clear()


class ByteLevelTokenizer:
    """Stands for GPT-2's tokenizer: characters as tokens, with its mark of a space before a word."""

    def tokenize(self, text: str) -> list[str]:
        return [f"\u0120{c}" if k and text[k - 1] == " " else c for k, c in enumerate(text) if c != " "]


def test_superni_metrics_are_averaged_over_examples_not_references():
    gold = examples(("red fox", "red", "fox"), "blue")
    assert score("SuperNI-EM", ["fox", "green"], gold) == 50
    assert score("Rouge-L", ["red fox", "green"], gold) == 50


def test_accuracy_of_choices_is_exact():
    gold = [Example("q", ("Yes",), ("Yes", "yes", "No"), 0)] * 4
    assert score("Rank-ACC", ["Yes", "yes", "No", "Yes"], gold) == 50


@pytest.mark.parametrize("name, split", [("t0", "0"), ("superni", "0"), ("crossfit", "13")])
def test_gold_answers_of_the_bundled_samples_score_100(name, split, tmp_path, monkeypatch):
    """Every task, each of its metrics, each of the references."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # tables are not written to the user's cache
    benchmark = benchmarks.load(name, str(Path(evaluate.__file__).parent / "assets" / "samples" / name), split)
    tasks = [task for part in (benchmark.train, benchmark.dev, benchmark.test) for task in part if len(task.test)]
    assert len(tasks) >= 8
    for task in tasks:
        test = list(task.test)
        by_choice = task.metric == "Rank-ACC"
        gold = [e.choices[e.label] if by_choice else e.outputs[0] for e in test]
        last = gold if by_choice or task.metric == "Pearson-Correlation" else [e.outputs[-1] for e in test]
        for metric in (task.metric, *task.also):
            assert score(metric, gold, test) == pytest.approx(100), (task.name, metric)
            assert score(metric, last, test) == pytest.approx(100), (task.name, metric)
            assert score(metric, gold[1:] + gold[:1], test) < 99, (task.name, metric)  # others' answers do not


# --- Generation -------------------------------------------------------------------------------------------------------

TASKS, LENGTHS = 4, (24, 6)


@pytest.fixture(scope="module")
def model():
    """A random T5 whose four tasks have strongly different MHR adapters, and sampling in training mode."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    inject(model, lambda name, linear: MHRLinear(linear, LoRA(4), MHRRouter(TASKS, 3, heads=2)), LORA_LAYERS["t5"])
    with torch.no_grad():
        for router in routers(model):
            router.Z.uniform_(-4, 4)
        for name, p in adapter_parameters(model).items():
            if not name.endswith(".Z"):
                p.uniform_(-1, 1)
        model.shared.weight *= 0.1  # outputs that change from token to token
        model.lm_head.weight *= 0.3
        model.lm_head.weight[:36] = model.lm_head.weight[131:] = 0  # and are printable
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer()


@pytest.fixture(scope="module")
def inputs():
    rng = random.Random(1)
    return [
        Example("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 20))), (f"out{k}",)) for k in range(12)
    ]


IDS = [0, 1, 2, 3, 3, 1, 0, 0, 2, 1, 1, 3]


def one_by_one(model, tokenizer, inputs, ids, beams=1) -> list[str]:
    """The oracle: each example alone, straight through the model."""
    texts = []
    for example, task in zip(inputs, ids, strict=True):
        encoded = tokenizer(example.input, return_tensors="pt")
        with task_ids([task]), torch.no_grad():
            out = model.generate(**encoded, max_new_tokens=LENGTHS[1], num_beams=beams, do_sample=False)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_keeps_order_and_tasks_whatever_the_batch_size(model, tokenizer, inputs, beams):
    expected = one_by_one(model, tokenizer, inputs, IDS, beams)
    assert len(set(expected)) > 6
    assert one_by_one(model, tokenizer, inputs, [0] * 12, beams) != expected  # the tasks matter
    for batch_size in (1, 5, 64):
        outputs = predict(model, tokenizer, inputs, IDS, LENGTHS, batch_size, beams)
        assert outputs == [(text, []) for text in expected]


def test_generate_does_what_the_number_of_beams_says(model, tokenizer, inputs, monkeypatch):
    assert predict(model, tokenizer, inputs, IDS, LENGTHS, 8, 3) != predict(model, tokenizer, inputs, IDS, LENGTHS, 8)
    seen, original = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **k: seen.append(k) or original(**k))
    predict(model, tokenizer, inputs[:2], [0, 0], LENGTHS, 8, 4)
    assert [call["num_beams"] for call in seen] == [4] and seen[0]["max_new_tokens"] == LENGTHS[1]


@pytest.mark.parametrize("training", [True, False])
def test_generate_is_without_noise_and_restores_the_mode(model, tokenizer, inputs, training):
    expected = predict(model.eval(), tokenizer, inputs, IDS, LENGTHS, 8)
    model.train(training)
    try:
        assert predict(model, tokenizer, inputs, IDS, LENGTHS, 8) == expected
        assert all(module.training == training for module in model.modules())
    finally:
        model.eval()


def test_generate_leaves_no_gradient(model, tokenizer, inputs):
    predict(model, tokenizer, inputs[:2], [0, 1], LENGTHS, 2)
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_generate_cuts_long_inputs(model, tokenizer, inputs):
    long = [Example("abcdefghij" * 9, ("x",))]
    short = [Example(("abcdefghij" * 9)[: LENGTHS[0] - 1], ("x",))]  # and the end token
    assert predict(model, tokenizer, long, [2], LENGTHS, 8) == predict(model, tokenizer, short, [2], LENGTHS, 8)


def test_evaluate_tasks_scores_every_task_with_its_own_adapter(model, tokenizer, inputs, monkeypatch):
    seen = {}
    monkeypatch.setitem(METRICS, "EM", lambda p, r: seen.setdefault(r[0][0], p) and float(len(seen)))
    tasks = [Task(f"t{k}", "EM", [], [], inputs[k::4]) for k in range(4)]  # t0 has examples 0, 4, 8, and so on
    ids = [2, 0, 3, 1]
    scores = evaluate_tasks(model, tokenizer, tasks, ids, LENGTHS, batch_size=5)
    assert scores == {"t0": 1.0, "t1": 2.0, "t2": 3.0, "t3": 4.0}
    for k, task in enumerate(tasks):
        assert seen[f"out{k}"] == one_by_one(model, tokenizer, task.test, [ids[k]] * 3)


def test_evaluate_tasks_limit(model, tokenizer, inputs, monkeypatch):
    counts = []
    monkeypatch.setitem(METRICS, "EM", lambda p, r: counts.append([x[0] for x in r]) or 0.0)
    tasks = [Task("a", "EM", [], [], inputs[:5]), Task("b", "EM", [], [], inputs[5:7])]
    evaluate_tasks(model, tokenizer, tasks, [0, 1], LENGTHS, limit=3)
    evaluate_tasks(model, tokenizer, tasks, [0, 1], LENGTHS)
    assert counts == [["out0", "out1", "out2"], ["out5", "out6"], [f"out{k}" for k in range(5)], ["out5", "out6"]]


def test_evaluate_tasks_uses_the_tasks_metric(model, tokenizer, inputs):
    same = [Example(e.input, (p,)) for e, p in zip(inputs, one_by_one(model, tokenizer, inputs, [1] * 12), strict=True)]
    tasks = [Task("right", "ACC", [], [], same), Task("wrong", "Rouge-L", [], [], inputs)]
    scores = evaluate_tasks(model, tokenizer, tasks, [1, 1], LENGTHS)
    assert scores == {"right": 100.0, "wrong": 0.0}


# --- Choosing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions():
    """12 examples with 2 to 5 choices of 1 to 5 letters."""
    rng = random.Random(2)
    word = lambda most: "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, most)))  # noqa: E731
    choices = [tuple(dict.fromkeys(word(5) for _ in range(2 + k % 4))) for k in range(12)]
    return [Example(word(20), (c[0],), c, 0) for c in choices]


@torch.no_grad()
def chosen_one_by_one(model, tokenizer, questions, ids) -> list[str]:
    """The oracle: every choice alone as the labels of its input; the smallest mean loss over tokens wins."""
    texts = []
    for example, task in zip(questions, ids, strict=True):
        losses = []
        for choice in example.choices:
            labels = tokenizer(choice, return_tensors="pt").input_ids
            with task_ids([task]):
                losses.append(model(**tokenizer(example.input, return_tensors="pt"), labels=labels).loss.item())
        texts.append(example.choices[losses.index(min(losses))])
    return texts


def test_choosing_keeps_order_and_tasks_whatever_the_batch_size(model, tokenizer, questions):
    expected = chosen_one_by_one(model, tokenizer, questions, IDS)
    assert chosen_one_by_one(model, tokenizer, questions, [0] * 12) != expected  # the tasks matter
    assert [q.choices.index(text) for q, text in zip(questions, expected, strict=True)] != [0] * 12
    for batch_size in (1, 5, 64):
        outputs = predict(model, tokenizer, questions, IDS, LENGTHS, batch_size, by_choice=True)
        assert [text for text, _ in outputs] == expected
        for question, (text, scores) in zip(questions, outputs, strict=True):
            assert len(scores) == len(question.choices) and question.choices[scores.index(max(scores))] == text


@pytest.mark.parametrize("training", [True, False])
def test_choosing_is_without_noise_and_restores_the_mode(model, tokenizer, questions, training):
    expected = predict(model.eval(), tokenizer, questions, IDS, LENGTHS, 8, by_choice=True)
    model.train(training)
    try:
        assert predict(model, tokenizer, questions, IDS, LENGTHS, 8, by_choice=True) == expected
        assert all(module.training == training for module in model.modules())
    finally:
        model.eval()


def test_all_scores_mixes_choosing_and_generating(model, tokenizer, inputs, questions):
    """Each task's gold is what its own adapter gives, so that only that adapter scores 100."""
    ids = [2, 0, 3, 1]
    written = {t: one_by_one(model, tokenizer, inputs, [t] * 12) for t in (0, 1)}
    taken = {t: chosen_one_by_one(model, tokenizer, questions, [t] * 12) for t in (2, 3)}
    gold = {t: [e._replace(outputs=(text,)) for e, text in zip(inputs, written[t], strict=True)] for t in written}
    gold |= {t: [e._replace(outputs=(text,)) for e, text in zip(questions, taken[t], strict=True)] for t in taken}
    metric = {0: "exact", 1: "exact", 2: "Rank-ACC", 3: "Rank-ACC"}
    tasks = [Task(f"t{t}", metric[t], [], [], gold[t]) for t in ids]
    scores = all_scores(model, tokenizer, tasks, ids, LENGTHS, batch_size=5)
    assert list(scores.items()) == [(f"t{t}", {metric[t]: 100.0}) for t in ids]  # in the order of the tasks
    others = all_scores(model, tokenizer, tasks, [3, 1, 2, 0], LENGTHS, batch_size=5)
    assert all(values[metric[t]] < 100 for t, values in zip(ids, others.values(), strict=True))


def test_all_scores_reports_further_metrics(model, tokenizer, inputs):
    texts = one_by_one(model, tokenizer, inputs[:2], [1, 1])
    gold = [Example(e.input, (f"the {p}",)) for e, p in zip(inputs[:2], texts, strict=True)]
    scores = all_scores(model, tokenizer, [Task("a", "EM", [], [], gold, also=("exact", "ACC"))], [1], LENGTHS)
    assert list(scores["a"].items()) == [("EM", 100.0), ("exact", 0.0), ("ACC", 0.0)]  # the main metric first
    assert main_scores(scores) == {"a": 100.0}


@pytest.mark.parametrize("metric", ["exact", "Rank-ACC"])
def test_all_scores_names_a_task_without_examples(model, tokenizer, inputs, metric):
    tasks = [Task("full", "exact", [], [], inputs), Task("empty", metric, [], [], [])]
    with pytest.raises(UserError, match="empty has no test examples"):
        all_scores(model, tokenizer, tasks, [0, 1], LENGTHS)


# --- Without a model: constant answers, groups, the printed table -----------------------------------------------------


def test_constant_score_is_the_most_frequent_training_output():
    train = examples("red", ("blue", "red", "red"), ("blue", "green"), "green")  # the first outputs count
    test = examples("blue", "red", ("red", "blue"), "a blue")
    task = Task("a", "exact", train, [], test, also=("EM",))
    assert constant_scores([task]) == {"a": {"exact": 50.0, "EM": 75.0}}
    assert constant_scores([task], limit=1) == {"a": {"exact": 100.0, "EM": 100.0}}


def test_constant_choice_is_the_most_frequent_place():
    """The texts of choices change from example to example; a place that is too far back is the last one."""
    train = [Example("q", (c[k],), c, k) for c, k in [("ab", 0), ("cde", 2), ("fgh", 2)]]
    test = [Example("q", (c[k],), tuple(c), k) for c, k in [("ijk", 2), ("lm", 1), ("nop", 0), ("qrst", 3)]]
    scores = constant_scores([Task("a", "Rank-ACC", train, [], test), Task("b", "Rank-ACC", train[:1], [], test)])
    assert scores == {"a": {"Rank-ACC": 50.0}, "b": {"Rank-ACC": 25.0}}  # a: k and m are right; b: n


def test_constant_scores_only_tasks_with_training_and_test_examples(monkeypatch):
    x = examples("x")
    both, lacking = Task("a", "EM", x, [], x), [Task("b", "EM", x, [], []), Task("c", "EM", [], [], x)]
    monkeypatch.setattr(train, "run_config", lambda *args: train.make_config(dataset="strings"))
    monkeypatch.setattr(benchmarks, "load_for", lambda *args: Benchmark([], [], tasks))
    cfg, tasks = evaluate.Config(checkpoint="run", constant=True), [lacking[0], both, lacking[1]]
    assert evaluate._score_held_out(cfg, Path("run"), None) == ({"a": {"EM": 100.0}}, [both])
    tasks = lacking
    with pytest.raises(UserError, match="--constant: no held-out task"):
        evaluate._score_held_out(cfg, Path("run"), None)


def test_groups_by_hand():
    tasks = [Task(name, "EM", [], [], [], group=group) for name, group in zip("abcd", ["z", "y", "z", ""], strict=True)]
    groups = by_group({"a": 10.0, "b": 20.0, "c": 40.0, "d": 90.0}, tasks)
    assert list(groups.items()) == [("y", 20.0), ("z", 25.0)]  # sorted; a task of no group is in none
    assert by_group({"d": 90.0}, tasks[3:]) == {}


def test_printed_scores_by_hand(capsys):
    scores = {
        "short": {"Rouge-L": 50.04, "EM": 0.0},
        "a longer name": {"Rouge-L": 100.0, "EM": 25.0},
        "c": {"ACC": 9.0},
    }
    print_scores(scores, {"group": 75.0})
    width = len("mean of main metrics")
    assert capsys.readouterr().out.splitlines() == [
        f"{'short':{width}}  Rouge-L 50.0  EM 0.0",
        f"{'a longer name':{width}}  Rouge-L 100.0  EM 25.0",
        f"{'c':{width}}  ACC 9.0",
        f"{'[group]':{width}}  75.0",
        f"{'mean of main metrics':{width}}  53.0",  # (50.04 + 100 + 9) / 3
        f"{'mean Rouge-L':{width}}  75.0",
        f"{'mean EM':{width}}  12.5",  # of the tasks that have it
        f"{'mean ACC':{width}}  9.0",
    ]


def test_printed_scores_of_one_metric_are_short_and_aligned(capsys):
    print_scores({"a name that is longer than the last line": {"ACC": 1.0}, "b": {"ACC": 2.0}}, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["1.0", "2.0", "1.5"]
    assert {line.rindex("  ") for line in lines} == {len("a name that is longer than the last line")}


# --- The command line -------------------------------------------------------------------------------------------------

TRAIN = dataclasses.asdict(train.make_config(method="mhr", dataset="strings", output_dir="x"))


@pytest.mark.parametrize("flags", [{}, dict(zero_shot=True), dict(constant=True), dict(save="x.json")], ids=str)
def test_scoring_needs_a_run(flags):
    """No run is looked for in the current folder."""
    with pytest.raises(UserError, match="^--checkpoint is missing: give a run folder of train.py or adapt.py$"):
        evaluate.main(flags)


def test_two_jobs_at_a_time_are_refused():
    with pytest.raises(UserError, match="^--zero-shot and --constant are two jobs: give one of them$"):
        evaluate.main(dict(zero_shot=True, constant=True, checkpoint="b"))


@pytest.mark.parametrize(
    "flags, ignored",
    [
        (dict(split="999", beams=2), "--checkpoint: --split"),
        (dict(constant=True, split="999", test_examples=3, beams=2, batch_size=2), "--constant: --beams, --batch-size"),
        (dict(zero_shot=True, split="999", test_examples=3, batch_size=2, beams=2, save="x.json"), ""),
        (dict(save="x.json", test_examples=3, batch_size=2, beams=2, data_dir="d", device="cpu"), ""),
    ],
)
def test_ignored_flags_are_named(monkeypatch, capsys, flags, ignored):
    """Before anything is loaded: those that another job would use."""
    monkeypatch.setattr(evaluate, "evaluate", lambda cfg: None)
    evaluate.main(dict(checkpoint="run") | flags)
    assert capsys.readouterr().out == (f"ignored with {ignored}\n" if ignored else "")


@pytest.mark.parametrize("place", ["r/config.json", "r", "no/such/x.json", "r/config.json/x.json", "r/" + "x" * 254])
def test_a_file_that_cannot_be_saved_is_refused_first(tmp_path, monkeypatch, place):
    """A file or folder that exists, and a place where none can be made: before the run is read; nothing is changed."""
    folder = Path(run_folder(tmp_path / "r", TRAIN))
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr(evaluate, "script_of", lambda *_: pytest.fail("the run was read"))
    with pytest.raises(UserError, match=f"^--save {tmp_path / place}") as refused:
        evaluate.main(dict(checkpoint=str(folder), save=str(tmp_path / place)))
    assert "\n" not in str(refused.value)
    assert [p.name for p in folder.iterdir()] == ["config.json"] and (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("[..] can't allocate memory: 9"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: f"{error!s:.40}",
)  # fmt: skip
def test_scoring_without_memory_is_one_sentence_with_advice(monkeypatch, tmp_path, error):
    """However torch says it; there is nothing to --resume."""

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(evaluate, "load_run", full)
    folder = run_folder(tmp_path / "r", TRAIN | {"method": "lora"})
    with pytest.raises(RunError, match="^there is not enough memory: try a smaller --batch-size") as failed:
        evaluate.main(dict(checkpoint=folder))
    assert "--resume" not in str(failed.value) and "\n" not in str(failed.value)


def test_another_error_of_cuda_is_not_called_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="^CUDA error: device-side assert"), advice_on_memory(""):
        raise RuntimeError("CUDA error: device-side assert triggered")
