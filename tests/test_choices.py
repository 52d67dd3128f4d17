"""Scoring of choices and T-Few's losses: by hand, against loops, and against scoring every pair alone."""

import math
import string
from functools import cache

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks import choices
from benchmarks.choices import choice_log_probs, choice_scores, choose, t_few_loss
from data import Example
from inject import adapter_parameters, task_ids
from tests.helpers import IDS, NAMES, TASKS, adapted, difference

LIMITS = (32, 16)  # tokens: more than any text below has, where a test does not say otherwise
LABELS = [1, 0, 0, 3]
EXAMPLES = [  # prompts of 3, 9, 1 and 5 letters; 2, 3, 1 and 4 choices of 1 to 6 letters
    Example("abc", ("de",), ("d", "de"), 1),
    Example("zyxwvutsr", ("b",), ("b", "aaaaaa", "bb"), 0),
    Example("q", ("cde",), ("cde",), 0),
    Example("hello", ("hl",), ("h", "hello", "lo", "hl"), 3),
]
models = pytest.mark.parametrize("name", NAMES)
routed = pytest.mark.parametrize("method", ["poly", "mhr"])


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A letter is a token, and a space; ids and special tokens are those of the family (`helpers.small_config`)."""
    special = {"t5": ["<pad>", "</s>", "<s>"], "bart": ["<s>", "<pad>", "</s>"]}.get(name, ["<pad>", "<s>", "</s>"])
    tokenizer = Tokenizer(WordLevel({token: k for k, token in enumerate([*special, *string.ascii_lowercase, " "])}))
    tokenizer.pre_tokenizer = Split("", "isolated")
    around = {"t5": "$A </s>", "bart": "<s> $A </s>", "llama": "<s> $A", "gpt2": "$A"}[name]
    ids = [(token, k) for k, token in enumerate(special)]
    tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


# --- Oracles ----------------------------------------------------------------------------------------------------------


def pair_alone(model, tokenizer, text: str, choice: str) -> Tensor:
    """Log-probabilities (l,) of a choice's tokens, by one forward of the whole model on this pair, without padding."""
    x = tokenizer(text).input_ids
    if model.config.is_encoder_decoder:
        y = tokenizer(text_target=choice).input_ids
        logits = model(input_ids=torch.tensor([x]), labels=torch.tensor([y])).logits[0]
    else:
        y = tokenizer(f" {choice}" if choice else "", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([x + y]), use_cache=False).logits[0, len(x) - 1 : -1]
    return logits.log_softmax(-1)[range(len(y)), y]


def pairs_alone(model, tokenizer, examples: list[Example], ids: list[int]) -> list[list[Tensor]]:
    """`pair_alone` of every choice of every example, each under its own task."""
    log_ps = []
    for example, task in zip(examples, ids, strict=True):
        with task_ids([task]):
            log_ps.append([pair_alone(model, tokenizer, example.input, choice) for choice in example.choices])
    return log_ps


def loops(log_ps: list[list[Tensor]], labels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(L_LM, L_LN, L_UL) by their definitions. log_ps: the log-probabilities of each example's choices' tokens."""
    lm, ln, ul = [], [], []
    for of_choices, label in zip(log_ps, labels, strict=True):
        scores = [sum(tokens) / len(tokens) for tokens in of_choices]
        ln.append(torch.log(sum(torch.exp(s) for s in scores)) - scores[label])
        lm += [-p for p in of_choices[label]]
        ul += [-torch.log(1 - torch.exp(p) + 0.01) for k, ps in enumerate(of_choices) if k != label for p in ps]
    return sum(lm) / len(lm), sum(ln) / len(ln), sum(ul) / len(ul) if ul else torch.tensor(0.0)


def padded(log_ps: list[list]) -> tuple[Tensor, Tensor]:
    """Lists of token log-probabilities to what `choice_log_probs` returns: (log p, mask) (b, c, l)."""
    c, length = max(map(len, log_ps)), max(len(tokens) for of_choices in log_ps for tokens in of_choices)
    log_p, mask = torch.zeros(len(log_ps), c, length), torch.zeros(len(log_ps), c, length, dtype=torch.bool)
    for i, of_choices in enumerate(log_ps):
        for j, tokens in enumerate(of_choices):
            log_p[i, j, : len(tokens)] = torch.as_tensor(tokens)
            mask[i, j, : len(tokens)] = True
    return log_p, mask


def together(model, tokenizer, examples=EXAMPLES, ids=IDS, limits=LIMITS) -> tuple[Tensor, Tensor]:
    with task_ids(ids):
        return choice_log_probs(model, tokenizer, examples, *limits)


def assert_close(x: Tensor, y: Tensor):
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# --- Scores and losses on given probabilities -------------------------------------------------------------------------


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_scores_by_hand():
    # the second choice has the larger sum, -log 16 against -log 64, and is shorter: -log 16 / 1 < -log 64 / 3 = -log 4
    scores = choice_scores(*padded([[log(1 / 4, 1 / 4, 1 / 4), log(1 / 16)], [log(1 / 2)]]))
    torch.testing.assert_close(scores, torch.tensor([log(1 / 4, 1 / 16), [math.log(1 / 2), -math.inf]]))


# One term at a time: a right token of p = 1 has L_LM = 0; wrong tokens of p = 0.01 have L_UL = -log(1 - p + 0.01) = 0;
# where the wrong choices' scores are far below the right one's, L_LN = 0.
BY_HAND = {
    # averaged over the 4 tokens; over the 2 examples it would be (4 + 4/3) / 2
    "LM": ([[[-4.0]], [[-4.0, 0.0, 0.0]]], [0, 0], 8 / 4),
    # scores 0, log 0.01, log 0.01: the three tokens of a choice do not make it less likely
    "LN": ([[log(1), log(0.01, 0.01, 0.01), log(0.01)]], [0], math.log(1.02)),
    "LN, mean": ([[log(1), log(0.01)], [log(0.01, 0.01), log(0.01), log(1, 1)]], [0, 2], math.log(1.01 * 1.02) / 2),
    # averaged over the 4 tokens of all wrong choices, not over choices or examples
    "UL": (
        [[log(1), [math.log(0.5), -999.0, math.log(0.2)]], [[-999.0], log(1)]],
        [0, 1],
        -(math.log(0.51) + math.log(0.81) + 2 * math.log(1.01)) / 4,
    ),
    # scores (log 1/2 + log 1/4) / 2 and log 1/10
    "all": (
        [[log(1 / 10), log(1 / 2, 1 / 4)]],
        [1],
        math.log(8) / 2 + math.log(1 + 8**0.5 / 10) - math.log(1 - 0.1 + 0.01),
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_losses_by_hand(case):
    log_ps, labels, expected = BY_HAND[case]
    assert t_few_loss(*padded(log_ps), torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-5)


token = st.floats(-6, -1 / 64, width=32)
ragged = st.lists(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=3)


@given(ragged, st.data())
@settings(max_examples=40, deadline=None)
def test_loss_and_gradient_equal_the_loops(values, draw):
    labels = [draw.draw(st.integers(0, len(of_choices) - 1)) for of_choices in values]
    log_ps = [[torch.tensor(tokens, requires_grad=True) for tokens in of_choices] for of_choices in values]
    leaves = [tokens for of_choices in log_ps for tokens in of_choices]
    loss, expected = t_few_loss(*padded(log_ps), torch.tensor(labels)), sum(loops(log_ps, labels))
    assert_close(loss, expected)
    for gradient, by_loops in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert_close(gradient, by_loops)


def loss_and_gradient(log_p: Tensor, mask: Tensor, labels: list[int]) -> tuple[float, Tensor]:
    log_p = log_p.clone().requires_grad_()
    loss = t_few_loss(log_p, mask, torch.tensor(labels))
    loss.backward()
    return loss.item(), log_p.grad


def test_absent_choices_have_no_influence():
    log_p, mask = padded([[log(0.5), log(0.2, 0.3), log(0.1)], [log(0.4), log(0.6)]])
    expected, _ = loss_and_gradient(log_p, mask, [1, 0])
    log_p[1, 2] = torch.tensor([-0.1, -30.0])  # the second example has no third choice
    loss, gradient = loss_and_gradient(log_p, mask, [1, 0])
    assert loss == expected
    assert torch.all(gradient[1, 2] == 0) and torch.all(gradient[mask] != 0)


def test_unlikelihood_of_a_certain_wrong_token_is_finite():
    loss, gradient = loss_and_gradient(*padded([[log(1), log(1)]]), [0])
    assert loss == pytest.approx(0 + math.log(2) - math.log(0.01), rel=1e-5)
    # d/d log p of -log(1 - p + 0.01) is p / (1 - p + 0.01)
    assert gradient.flatten().tolist() == pytest.approx([-1 - 0.5, 0.5 + 1 / 0.01], rel=1e-4)


def test_one_choice_leaves_the_language_model_loss():
    loss, gradient = loss_and_gradient(*padded([[log(0.5, 0.25)], [log(0.125)]]), [0, 0])
    assert loss == pytest.approx(math.log(2 * 4 * 8) / 3)
    assert gradient[0, 0].tolist() == pytest.approx([-1 / 3, -1 / 3])


def test_tiny_probabilities():
    """exp underflows; the loss and its gradient must not."""
    loss, gradient = loss_and_gradient(*padded([[[-1e4], [-1e4, -1e4]], [[-1e4], [-1e4]]]), [0, 1])
    assert loss == pytest.approx(1e4 + math.log(2) - math.log(1.01))
    assert gradient.isfinite().all()
    assert gradient[:, :, 0].tolist() == [pytest.approx([-0.5 - 0.25, 0.125]), pytest.approx([0.25, -0.5 - 0.25])]


# --- Log-probabilities of a batch: every pair alone is the oracle -----------------------------------------------------


@models
@routed
@torch.no_grad()
def test_a_mixed_batch_equals_every_pair_alone(name, method):
    """Prompts and choices of different lengths, different numbers of choices, four tasks, in one batch."""
    model, tokenizer = adapted(name, method, "lora"), tokenizer_of(name)
    log_p, mask = together(model, tokenizer)
    expected, expected_mask = padded(pairs_alone(model, tokenizer, EXAMPLES, IDS))
    assert torch.equal(mask, expected_mask)
    assert torch.all(log_p[~mask] == 0)
    assert_close(log_p, expected)
    assert difference(together(model, tokenizer, ids=IDS[::-1])[0], expected) > 0.01  # the tasks differ


@models
@routed
def test_gradients_equal_those_of_every_pair_alone(name, method):
    model, tokenizer = adapted(name, method, "lora"), tokenizer_of(name)
    parameters = adapter_parameters(model)
    loss = t_few_loss(*together(model, tokenizer), torch.tensor(LABELS))
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    naive = sum(loops(pairs_alone(model, tokenizer, EXAMPLES, IDS), LABELS))
    expected = dict(zip(parameters, torch.autograd.grad(naive, parameters.values()), strict=True))
    assert_close(loss, naive)
    assert {key.rsplit(".", 1)[1] for key in gradients} == {"A", "B", "Z"}
    for key, gradient in gradients.items():
        assert difference(gradient, expected[key]) < 1e-4, key
        if key.endswith(".Z"):
            assert len(gradient) == TASKS and torch.all(gradient[2] == 0), key  # task 2 is not in the batch
            assert all(gradient[t].any() for t in IDS), key


@models
@torch.no_grad()
def test_long_texts_are_cut(name):
    model, tokenizer = adapted(name, "mhr", "lora"), tokenizer_of(name)
    long = [Example("abcdefghij", ("x",), ("klmnop", "q")), Example("ab", ("x",), ("klmnop",))]
    start, end = {"t5": (4, 2), "bart": (3, 1), "llama": (4, 1), "gpt2": (5, 1)}[name]  # letters beside other tokens
    cut = [Example("abcdefghij"[:start], ("x",), ("klmnop"[:end], "q")), Example("ab", ("x",), ("klmnop"[:end],))]
    log_p, mask = together(model, tokenizer, long, [3, 0], limits=(5, 3))
    expected, expected_mask = padded(pairs_alone(model, tokenizer, cut, [3, 0]))
    assert log_p.shape == (2, 2, 3) and torch.equal(mask, expected_mask)
    assert_close(log_p, expected)


@models
@torch.no_grad()
def test_one_token_a_choice(name):
    """The smallest max_output leaves the end-of-text token (BART: its limit cuts what is written before it too)."""
    model, tokenizer = adapted(name, "mhr", "lora"), tokenizer_of(name)
    log_p, mask = together(model, tokenizer, limits=(32, 2 if name == "bart" else 1))
    assert log_p.shape == (4, 4, 2 if name == "bart" else 1)
    empty = [Example(e.input, e.outputs, ("",) * len(e.choices)) for e in EXAMPLES]
    assert_close(log_p, padded(pairs_alone(model, tokenizer, empty, IDS))[0])


@torch.no_grad()
def test_a_tokenizer_without_padding_token():
    """As GPT-2's: padding is then the end-of-text token, which is also the last token of each choice."""
    model = adapted("gpt2", "mhr", "lora")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("gpt2").backend_tokenizer, eos_token="</s>")
    assert tokenizer.pad_token_id is None
    log_p, mask = together(model, tokenizer)
    assert_close(log_p, together(model, tokenizer_of("gpt2"))[0])
    assert mask[2, 0].tolist() == [True] * 5 + [False] * 3


@models
@torch.no_grad()
def test_longer_choices_of_another_example_change_no_score(name):
    model, tokenizer = adapted(name, "mhr", "lora"), tokenizer_of(name)
    neighbour = Example("zzzzzzzzzzzz", ("x",), ("yyyyyyyyyyyy", "x", "xx", "xxx", "xxxx"))
    for example, task in zip(EXAMPLES, IDS, strict=True):
        alone = choice_scores(*together(model, tokenizer, [example], [task]))[0]
        beside = choice_scores(*together(model, tokenizer, [example, neighbour], [task, 2]))[0]
        assert_close(beside[: len(alone)], alone)
        assert torch.all(beside[len(alone) :] == -torch.inf)


text = st.text(string.ascii_lowercase, min_size=1, max_size=8)
example = st.builds(
    lambda x, ys, task: (Example(x, ("x",), tuple(ys)), task),
    text, st.lists(text, min_size=1, max_size=3), st.integers(0, TASKS - 1),
)  # fmt: skip


@models
@given(st.lists(example, min_size=2, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_the_order_of_a_batch_does_not_matter(name, batch, rng):
    model, tokenizer, order = routed_model(name), tokenizer_of(name), list(range(len(batch)))
    rng.shuffle(order)
    scores = choice_scores(*together(model, tokenizer, *zip(*batch, strict=True)))
    permuted = choice_scores(*together(model, tokenizer, *zip(*(batch[k] for k in order), strict=True)))
    assert_close(permuted, scores[order])


@cache
def routed_model(name: str):
    return adapted(name, "mhr", "lora")


# --- Choosing ---------------------------------------------------------------------------------------------------------


@models
def test_choose_takes_the_best_score_of_pairs_alone(name):
    model, tokenizer = adapted(name, "mhr", "lora"), tokenizer_of(name)
    with task_ids(IDS):
        chosen, found = choose(model, tokenizer, EXAMPLES, *LIMITS)
    with torch.no_grad():
        log_ps = pairs_alone(model, tokenizer, EXAMPLES, IDS)
    scores = [[(sum(tokens) / len(tokens)).item() for tokens in of_choices] for of_choices in log_ps]
    assert chosen == [s.index(max(s)) for s in scores]
    assert [pytest.approx(row, abs=1e-4) for row in scores] == found
    assert len(set(chosen)) > 1


@pytest.mark.parametrize(
    "of_choices, best",
    [
        ([log(1 / 16), log(1 / 4, 1 / 4, 1 / 4)], 1),  # less likely as a whole, but longer
        ([log(0.2), log(0.5), log(0.5), log(0.5, 0.5)], 1),  # a tie: the first of the best
        ([[-1e9], [-1e9]], 0),  # and not one that is absent
    ],
)
def test_choose_by_hand(monkeypatch, of_choices, best):
    four = [[-1.0]] * 4  # beside it, so that an example with fewer choices has absent ones
    monkeypatch.setattr(choices, "choice_tensors", lambda *args: {})
    monkeypatch.setattr(choices, "choice_log_probs", lambda *args: padded([of_choices, four]))
    examples = [Example("", ("",), tuple("abcd"[: len(own)])) for own in (of_choices, four)]
    chosen, scores = choose(SimpleNamespace(device="cpu"), None, examples, *LIMITS)
    assert chosen == [best, 0] and scores == [pytest.approx([sum(x) / len(x) for x in of_choices]), [-1.0] * 4]


def test_choose_takes_no_gradient(monkeypatch):
    seen = []
    monkeypatch.setattr(choices, "choice_tensors", lambda *args: {})
    monkeypatch.setattr(
        choices, "choice_log_probs", lambda *args: seen.append(torch.is_grad_enabled()) or padded([[[0.0]]])
    )
    choose(SimpleNamespace(device="cpu"), None, [Example("", ("",), ("a",))], *LIMITS)
    assert seen == [False] and torch.is_grad_enabled()


# --- The input is read once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_the_encoder_reads_each_input_once(name):
    model, encoder, decoder = adapted(name, "mhr", "lora"), [], []
    model.get_encoder().register_forward_hook(lambda module, args, out: encoder.append(out.last_hidden_state.shape))
    model.get_decoder().register_forward_hook(lambda module, args, out: decoder.append(out.last_hidden_state.shape))
    log_p, _ = together(model, tokenizer_of(name))
    (b, length, _), c = encoder[0], 4
    assert len(encoder) == 1 and b == 4 and length == len(tokenizer_of(name)("zyxwvutsr").input_ids)
    assert [shape[:2] for shape in decoder] == [(4 * c, log_p.shape[2])]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_one_stack_reads_each_input_once(name):
    model, shapes = adapted(name, "mhr", "lora"), []
    model.get_decoder().register_forward_hook(lambda module, args, out: shapes.append(out.last_hidden_state.shape[:2]))
    log_p, _ = together(model, tokenizer_of(name))
    longest = len(tokenizer_of(name)("zyxwvutsr").input_ids)
    assert shapes == [(4, longest), (4 * 4, log_p.shape[2] - 1)]  # nothing follows the end of a choice
