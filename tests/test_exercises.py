"""The checks of `exercises.md`: they check `solutions.py`, or with EXERCISES=my/answers.py set that file.

Each compares an answer with the repository's own layers or with sums written out, and fails with one line: what is
expected, the largest difference, a hint. Wrong answers, at the end, show that it can fail, and with which hint.
"""

import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import poly
from inject import freeze, inject
from layers import LORA_LAYERS
from lora import LoRA, LoRALinear
from mhr import MHRLinear, MHRRouter
from poly import PolyLinear, PolyRouter
from tests import solutions


class Answers:
    """A learner's file. A check that asks it for what is not written yet is skipped there."""

    def __init__(self, path: str, step: int):
        if not (Path(path).is_file() and path.endswith(".py")):
            pytest.fail(f"EXERCISES={path} is no Python file: make one, an empty one will do", pytrace=False)
        self._path = path
        spec = importlib.util.spec_from_file_location("answers", path)
        self._module, self._todo = importlib.util.module_from_spec(spec), f"step {step}: write {{}} in {path}"
        broken = None
        try:
            spec.loader.exec_module(self._module)
        except Exception as error:
            broken = f"{place(error, path)}. Hint: python {path} shows more"
        if broken:  # outside of `except`, or pytest prints both errors
            pytest.fail(broken, pytrace=False)

    def __getattr__(self, name: str):
        return getattr(self._module, name) if hasattr(self._module, name) else pytest.skip(self._todo.format(name))


@pytest.fixture
def my(request):
    path = os.environ.get("EXERCISES")
    return Answers(path, int(request.node.name.split("_")[2])) if path else solutions


@pytest.fixture(autouse=True)
def double_precision():
    """In double precision a wrong answer cannot pass for a rounding error."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def place(error: Exception, path: str) -> str:
    """Where in a learner's file an error arose, and what it says, on one line."""
    frames, file = traceback.extract_tb(error.__traceback__), Path(path).resolve()
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file]
    message = str(error).partition("\n")[0].rstrip(".")
    line = lines[-1] if lines else getattr(error, "lineno", None)  # a SyntaxError has one itself
    return f"{path}{f', line {line}' if line else ''}: {type(error).__name__}, {message}"


def check(step):
    """A check that fails with one line: its message, or, in a learner's file, the error and its place there."""

    @functools.wraps(step)
    def run(my):
        try:
            return step(my)
        except Exception as error:
            says, number = str(error).partition("\n")[0], int(step.__name__.split("_")[2])
            if not says.startswith("Expected: "):  # not one of our own assertions
                if not isinstance(my, Answers):
                    raise
                hint = f"are the arguments, their shapes and the names those of step {number} in exercises.md?"
                says = f"{place(error, my._path)}. Hint: {hint}"
        pytest.fail(says, pytrace=False)

    return run


def same(actual, expected: Tensor, words: str, hint: str):
    """Fails unless both tensors are equal but for rounding. words: what is expected."""
    assert isinstance(actual, Tensor), f"Expected: {words}. It is a {type(actual).__name__}, no tensor. Hint: {hint}"
    shapes = f"Its shape is {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.shape == expected.shape, f"Expected: {words}. {shapes}. Hint: {hint}"
    difference = (actual - expected).abs().max().item()
    equal = torch.allclose(actual.to(expected.dtype), expected, rtol=1e-6, atol=1e-9)
    assert equal, f"Expected: {words}. The largest difference is {difference:.2g}. Hint: {hint}"


def refused(error: type[Exception], hint: str, call, *args):
    """Fails unless the call raises this error."""
    try:
        call(*args)
    except error:
        return
    raise AssertionError(f"Expected: {error.__name__}. Nothing was raised. Hint: {hint}")


def problem(i=6, o=4, r=2, s=3, b=4, length=5):
    """x (b, l, i), a linear layer, A (s, i, r), B (s, r, o), w (b, s): four tasks, no two alike, and rank 2."""
    w = torch.randn(b, s).softmax(-1)
    return torch.randn(b, length, i), nn.Linear(i, o), torch.randn(s, i, r), torch.randn(s, r, o), w


def repository(linear, A, B, heads=None):
    """The repository's routed layer with these skills. heads: None for Poly."""
    router = MHRRouter(1, len(A), heads) if heads else PolyRouter(1, len(A))
    layer = (MHRLinear if heads else PolyLinear)(linear, LoRA(A.shape[2]), router)
    layer.inventory = nn.ParameterDict({"A": A, "B": B})
    return layer


class Watch(TorchFunctionMode):
    """Counts the calls of torch within a context, and notes how many entries the largest result has."""

    calls, largest = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        self.largest = max(self.largest, result.numel() if isinstance(result, Tensor) else 0)
        return result


# --- The steps --------------------------------------------------------------------------------------------------------


@check
def test_step_01_lora(my):
    """LoRA's forward is `LoRALinear`'s, bias and scale included; with B = 0 it is the linear layer's, to the bit."""
    x, linear, A, B, _ = problem()
    for alpha in (1.0, 3.0):
        y = my.lora(x, linear, A[0], B[0], alpha)
        expected = LoRALinear(linear, LoRA(2, alpha), {"A": A[0], "B": B[0]})(x)
        hint = "is the update multiplied by alpha / r, and the bias still there?"
        same(y, expected, "linear(x) and alpha / r times (x A) B", hint)
    equal = torch.equal(my.lora(x, linear, A[0], 0 * B[0]), linear(x))
    assert equal, "Expected: with B = 0 the very bits of linear(x). Hint: call `linear`, and add the update"


@check
def test_step_02_merge(my):
    """The merged weight gives LoRA's output in a plain linear layer, and the backbone keeps its own."""
    x, linear, A, B, _ = problem(i=4)  # square: a forgotten transpose has the right shape
    before, y = linear.weight.clone(), LoRALinear(linear, LoRA(2, 3.0), {"A": A[0], "B": B[0]})(x)
    weight = my.merge(linear, A[0], B[0], 3.0)
    kept = torch.equal(linear.weight, before)
    assert kept, "Expected: a new tensor, but the backbone was changed. Hint: `+`, not `+=` or `add_`"
    hint = "nn.Linear keeps its weight as (o, i), so the update is alpha / r times the transpose of A B"
    same(nn.functional.linear(x, weight, linear.bias), y, "step 1's output from the merged layer", hint)


@check
def test_step_03_averaging(my):
    """The two averages are two functions: by hand (in `exercises.md`), and in rank, r against s r."""
    A, B = torch.eye(2)[:, :, None], torch.tensor([[[1.0, 0]], [[0, 2]]])
    x, w = torch.tensor([[[2.0, 4]]]), torch.tensor([0.5, 0.5])
    words, hint = "by_parameters of the example by hand is (1.5, 3)", "mix A, mix B, then multiply: two sums over s"
    same(my.by_parameters(x, A, B, w), torch.tensor([[[1.5, 3]]]), words, hint)
    words, hint = "by_outputs of the example by hand is (1, 4)", "multiply for each skill, then mix: one sum over s"
    same(my.by_outputs(x, A, B, w), torch.tensor([[[1.0, 4]]]), words, hint)
    _, _, A, B, w = problem(i=9, o=8)
    updates = [f(torch.eye(9)[None], A, B, w[0])[0] for f in (my.by_parameters, my.by_outputs)]
    ranks = [int(torch.linalg.matrix_rank(update)) for update in updates]
    assert ranks == [2, 6], f"Expected: updates of rank r = 2 and s r = 6, not {ranks}. Hint: all skills take part"


@check
def test_step_04_relaxed_bernoulli(my):
    """Equation 2 as printed, and as `poly.py` has it under the same noise; rounded, 1 as often as sigmoid(z) says;
    its gradient is finite also for large logits."""
    z, u, words = 3 * torch.randn(40), torch.rand(40), "sigmoid of (z + logit(u)) / temperature"
    same(my.relaxed_bernoulli(z, u), printed(z, u), words, "the noise is logit(u) = log(u / (1 - u)), added to z")
    hint = "the temperature divides the sum, z and noise"
    same(my.relaxed_bernoulli(z, u, 0.5), printed(z, u, 0.5), f"{words}, at temperature 0.5", hint)
    torch.manual_seed(1)
    expected = poly.relaxed_bernoulli(z, 0.5)
    torch.manual_seed(1)
    same(my.relaxed_bernoulli(z, torch.rand_like(z), 0.5), expected, "what poly.relaxed_bernoulli gives", hint)
    on = my.relaxed_bernoulli(torch.full((20_000,), -1.0), torch.rand(20_000)) > 0.5
    often = on.double().mean().item()
    assert abs(often - 0.269) < 0.02, (  # sigmoid(-1)
        f"Expected: rounded, it is 1 with probability sigmoid(-1) = 0.27, not {often:.2f}. Hint: u is uniform"
    )
    z = torch.tensor([-200.0, 200.0], requires_grad=True)
    my.relaxed_bernoulli(z, torch.tensor([0.3, 0.3])).sum().backward()
    hint = "log(sigmoid(z) / (1 - sigmoid(z))) is z itself"
    assert z.grad.isfinite().all(), f"Expected: a finite gradient for logits of 200, not NaN. Hint: {hint}"


@check
def test_step_05_weights(my):
    """The routers' weights, for Poly's Z and MHR's, without noise and with; a wrong id is refused, and a row without
    active skills gives zeros."""
    tasks = torch.tensor([4, 0, 4])
    for router in (PolyRouter(5, 3), MHRRouter(5, 3, 2)):
        Z = router.Z = nn.Parameter(3 * torch.randn(router.Z.shape))
        hint = "no softmax, and the sum is over the skills, the last axis"
        same(my.weights(Z, tasks), router.eval()(tasks), "sigmoid(Z[tasks]), divided by its sum", hint)
        torch.manual_seed(1)
        u = torch.rand_like(Z[tasks])
        torch.manual_seed(1)
        hint = "with u, relaxed_bernoulli takes the place of sigmoid"
        same(my.weights(Z, tasks, u), router.train()(tasks), "step 4's draw, divided by its sum", hint)
    for bad in (-1, 5):
        refused(IndexError, f"of 5 tasks {bad} is none", my.weights, Z, torch.tensor([0, bad]))
    off = my.weights(torch.full((1, 3), -torch.inf), torch.tensor([0]))
    same(off, torch.zeros(1, 3), "zeros where no skill is on", "add 1e-12 to the sum: 0 / 0 is NaN")


@check
def test_step_06_poly(my):
    """Both are `PolyLinear` for a batch of different tasks; the second calls torch no oftener for more examples."""
    x, linear, A, B, w = problem()
    layer = repository(linear, A, B)
    expected = layer.adapter.apply(linear, x, **layer.mix(w))
    for answer in ("poly_loop", "poly"):
        hint = "two sums over s, of A and of B; row k of w is for example k alone; 1 / r as in step 1"
        y = getattr(my, answer)(x, linear, A, B, w)
        same(y, expected, f"{answer}, each example with its own mixture of A and of B", hint)
    calls = []
    for args in ((x, linear, A, B, w), problem(b=9)):
        with Watch() as seen:
            my.poly(*args)
        calls.append(seen.calls)
    (few, many), hint = calls, "there is a loop over the examples; give einsum the axis b"
    assert many <= few, f"Expected: as many calls of torch for 9 examples as for 4, not {many} and {few}. Hint: {hint}"


@check
def test_step_07_late(my):
    """The weights applied after the multiplication with A: the same function, and no copy of A for each example."""
    x, linear, A, B, w = problem(i=64, o=3, r=2, s=2, b=16, length=1)
    layer = repository(linear, A, B)
    with Watch() as seen:
        y = my.poly_late(x, linear, A, B, w)
    hint = "two sums over skills, one after the other: after x A, and after B"
    same(y, layer.adapter.apply(linear, x, **layer.mix(w)), "what `poly` gives", hint)
    size, hint = seen.largest, "multiply x with every skill's A first, then mix"
    assert size < 16 * 64 * 2, f"Expected: no copies of A, as large as b i r = 2048, not {size} numbers. Hint: {hint}"


@check
def test_step_08_heads(my):
    """Feature j belongs to head j // (i / h), of A's rows and B's columns; one head is Poly; heads must divide."""
    _, linear, A, B, _ = problem(i=12, o=6, r=3)
    w = torch.randn(4, 3, 3).softmax(-1)
    rows = [sum(w[:, j // 4, s, None] * A[s, j] for s in range(3)) for j in range(12)]
    columns = [sum(w[:, j // 2, s, None] * B[s, :, j] for s in range(3)) for j in range(6)]
    sums = {"A": torch.stack(rows, 1), "B": torch.stack(columns, 2)}
    one, three = repository(linear, A, B).mix(w[:, 0]), repository(linear, A, B, 3).mix(w)
    for weights, expected, heads in ((w, sums, "3 heads"), (w, three, "3 heads"), (w[:, :1], one, "1 head, as Poly")):
        for mixed, name, parts in zip(my.mix_heads(A, B, weights), "AB", ("rows", "columns"), strict=True):
            hint = f"head k is the k-th block of neighbouring {parts} of {name}, unflatten(axis, (heads, -1))"
            same(mixed, expected[name], f"{name} of {heads}, block k mixed by w[:, k]", hint)
    for i, o in ((10, 6), (12, 4)):
        hint = f"3 heads do not divide {i} and {o}; check both, `chunk` does not"
        refused(ValueError, hint, my.mix_heads, A[:, :i], B[:, :, :o], w)


@check
def test_step_09_z_and_mu(my):
    """What a new task trains: a fresh row of Z alone, or one averaged adapter and no router."""
    _, linear, A, B, _ = problem(i=64, o=64, s=8)
    z, mu = (my.to_train(variant, A, B, torch.randn(5, 64, 8)) for variant in ("z", "mu"))
    for names, variant, keys in ((sorted(z), "z", ["Z"]), (sorted(mu), "mu", ["A", "B"])):
        hint = "z trains Z alone; mu trains A and B, and has no router"
        assert names == keys, f"Expected: variant {variant} trains {keys}, not {names}. Hint: {hint}"
    shape, largest = tuple(z["Z"].shape), z["Z"].abs().max().item()
    assert shape == (1, 64, 8) and 0 < largest <= 1e-3, (
        f"Expected: one fresh row of Z, (1, 64, 8), within 1e-3, not {shape} and up to {largest:.2g}."
        " Hint: the new task has no row yet, draw it"
    )
    assert 432 * z["Z"].numel() == 221_184  # T5-XL: 432 layers
    for name, mean in repository(linear, A, B).average_skills().items():
        hint = "mu is ONE adapter: average over the axis of the skills"
        same(mu[name], mean, f"{name}, the mean over the skills", hint)
    leaves = all(p.requires_grad and p.is_leaf for p in (*z.values(), *mu.values()))
    assert leaves, "Expected: leaf tensors that require gradients. Hint: .detach().requires_grad_()"


@check
def test_step_10_layer(my):
    """The layer is steps 5, 8 and 1, is its backbone at the start, repeats beams in a row, and draws noise per task."""
    linear, x, tasks, rows = nn.Linear(8, 4), torch.randn(3, 5, 8), torch.tensor([1, 3]), torch.tensor([1, 0, 1])
    layer = my.HeadLinear(linear, my.HeadRouter(tasks=4, skills=3, heads=2), rank=2)
    equal = torch.equal(layer(x, tasks, rows), linear(x))
    assert equal, "Expected: a fresh layer gives the very bits of linear(x). Hint: B starts at zero"
    offered = getattr(layer, "weight", None) is linear.weight
    assert offered, (
        "Expected: the layer has the linear layer's `weight`. Hint: T5 reads `wo.weight`; make it a property"
    )
    for p in (layer.A, layer.B, layer.router.Z):
        nn.init.normal_(p)
    y, theirs = layer.eval()(x, tasks, rows), repository(linear, layer.A, layer.B, 2)
    mixed = theirs.mix(solutions.weights(layer.router.Z, tasks[rows]))
    words = "each example with the weights of its own task"
    same(y, theirs.adapter.apply(linear, x, **mixed), words, "example k is of task tasks[rows[k]]")
    beams, hint = layer(x.repeat_interleave(2, 0), tasks, rows), "view x as (n, -1, i) before, as (b, l, o) after"
    same(beams, y.repeat_interleave(2, 0), "the same for an example's beams, consecutive rows of x", hint)
    x = x[:1].repeat(3, 1, 1)
    y = layer.train()(x, tasks, rows)
    hint = "ask the router for `tasks`, then take [rows]: one draw for each of `tasks`"
    same(y[2], y[0], "examples of one task share their noise", hint)
    renewed = not torch.allclose(y, layer(x, tasks, rows))
    assert renewed, "Expected: in training mode every call draws new noise. Hint: torch.rand_like in HeadRouter.forward"


TWO_ANSWERS = {"input_ids": torch.tensor([[5, 6, 7]] * 4), "labels": torch.tensor([[10], [20], [10], [20]])}


def small_t5(my, tasks: int) -> nn.Module:
    """A random T5 with the learner's layers, under gradient checkpointing: backward runs them again."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=1, dropout_rate=0.0, use_cache=False,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).train()
    freeze(model)
    inject(model, lambda name, linear: my.HeadLinear(linear, my.HeadRouter(tasks, 4, 4), 4), LORA_LAYERS["t5"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@check
def test_step_10_t5(my):
    """One input, two tasks that want different answers: routed, the loss falls below 0.3 in 20 steps; as one task it
    cannot fall below ln 2. Only adapters change, and each learning rate reaches its own parameters."""
    model = small_t5(my, 2)
    for steps, lr, lr_z, moving in ((20, 0.05, 0.3, "ABZ"), (2, 0.05, 0, "AB"), (2, 0, 0.3, "Z")):
        old = {name: p.clone() for name, p in model.named_parameters()}
        losses = my.train(model, TWO_ANSWERS, [0, 1, 0, 1], steps, lr, lr_z)
        assert len(losses) == steps, f"Expected: {steps} losses, not {len(losses)}. Hint: one loss.item() a step"
        hint = "is the forward pass inside of task_ids, and zero_grad() called?"
        assert steps < 20 or losses[-1] < 0.3, f"Expected: a loss below 0.3, not {losses[-1]:.2f}. Hint: {hint}"
        moved = {name.split(".")[-1] for name, p in model.named_parameters() if not torch.equal(p, old[name])}
        which = f"with lr {lr} and lr_z {lr_z} {' '.join(moving)} move, not {' '.join(sorted(moved)) or 'nothing'}"
        assert moved == set(moving), f"Expected: {which}. Hint: two groups, parameters .Z at lr_z, the others at lr"
    least = min(my.train(small_t5(my, 1), TWO_ANSWERS, [0, 0, 0, 0], 20, 0.05, 0.3))
    hint = "are labels and ids those that were given?"
    assert least > 0.693, f"Expected: as one task no loss below ln 2 = 0.693, not {least:.3f}. Hint: {hint}"


# --- Wrong answers ----------------------------------------------------------------------------------------------------


def printed(z, u, temperature=1.0):
    """Equation 2 as it is printed: right, but its gradient is NaN where sigmoid(z) is rounded to 1."""
    p = z.sigmoid()
    return (p * u / ((1 - p) * (1 - u))).log().div(temperature).sigmoid()


def outputs(x, linear, A, B, w):
    """Poly with the outputs of the skills averaged instead of their parameters."""
    return linear(x) + torch.einsum("bs,bli,sir,sro->blo", w, x, A, B) / A.shape[-1]


def scrambled(x, linear, A, B, w):
    """A reshape that moves entries from one example to another: invisible with a batch of one."""
    A = torch.einsum("bs,sir->ibr", w, A).reshape(len(x), A.shape[1], -1)
    return solutions.lora(x, linear, A, torch.einsum("bs,sro->bro", w, B))


def interleaved(A, B, w):
    """Heads as every h-th feature, not as consecutive ones."""
    A = torch.einsum("bhs,sdhr->bdhr", w, A.unflatten(1, (-1, w.shape[1]))).flatten(1, 2)
    return A, torch.einsum("bhs,sreh->breh", w, B.unflatten(2, (-1, w.shape[1]))).flatten(2, 3)


def chunked(A, B, w):
    """`chunk` cuts 10 features into blocks of 4, 4 and 2 and says nothing."""
    A = [torch.einsum("bs,sdr->bdr", w[:, k], block) for k, block in enumerate(A.chunk(w.shape[1], 1))]
    B = [torch.einsum("bs,sre->bre", w[:, k], block) for k, block in enumerate(B.chunk(w.shape[1], 2))]
    return torch.cat(A, 1), torch.cat(B, 2)


def layer_given(change):
    """Step 10 with other tasks and rows: change(tasks, rows, b) gives them."""

    def forward(self, x, tasks, rows):
        return solutions.HeadLinear.forward(self, x, *change(tasks, rows, len(x)))

    return type("Wrong", (solutions.HeadLinear,), {"forward": forward})


WRONG = [  # step, name, wrong answer, what the check says
    ("01_lora", "lora", lambda x, layer, A, B, alpha: layer(x) + alpha * (x @ A @ B), "alpha / r"),
    ("01_lora", "lora", lambda x, layer, A, B, alpha: x @ layer.weight.T + alpha / 2 * (x @ A @ B), "the bias"),
    ("02_merge", "merge", lambda layer, A, B, alpha: layer.weight + alpha / 2 * (A @ B), "transpose"),
    ("02_merge", "merge", lambda layer, A, B, alpha: layer.weight.data.add_(alpha / 2 * (A @ B).T), "was changed"),
    ("03_averaging", "by_parameters", solutions.by_outputs, "mix A, mix B"),
    ("04_relaxed_bernoulli", "relaxed_bernoulli", lambda z, u, t=1.0: (z / t).sigmoid(), "logit(u)"),
    ("04_relaxed_bernoulli", "relaxed_bernoulli", lambda z, u, t=1.0: (z / t + u.logit()).sigmoid(), "temperature"),
    ("04_relaxed_bernoulli", "relaxed_bernoulli", lambda z, u, t=1.0: (z - (-u.log()).log()).sigmoid(), "logit(u)"),
    ("04_relaxed_bernoulli", "relaxed_bernoulli", printed, "NaN"),
    ("05_weights", "weights", lambda Z, tasks, u=None: Z[tasks].softmax(-1), "no softmax"),
    ("05_weights", "weights", lambda Z, tasks, u=None: Z[tasks].sigmoid(), "divided by its sum"),
    ("05_weights", "weights", lambda Z, tasks, u=None: (Z.sigmoid() / Z.sigmoid().sum(0))[tasks], "over the skills"),
    ("05_weights", "weights", lambda Z, tasks, u=None: solutions.weights(Z, tasks % len(Z), u), "IndexError"),
    ("06_poly", "poly", outputs, "own mixture"),
    ("06_poly", "poly", scrambled, "own mixture"),
    ("06_poly", "poly", solutions.poly_loop, "a loop"),
    ("07_late", "poly_late", outputs, "two sums"),
    ("07_late", "poly_late", solutions.poly, "copies of A"),
    ("08_heads", "mix_heads", interleaved, "k-th block"),
    ("08_heads", "mix_heads", chunked, "ValueError"),
    ("09_z_and_mu", "to_train", lambda v, A, B, Z: solutions.to_train("mu", A, B, Z) | {"Z": Z}, "z trains Z alone"),
    ("09_z_and_mu", "to_train", lambda v, A, B, Z: {"Z": Z[-1:]} if v == "z" else {"A": A, "B": B}, "one fresh row"),
    ("09_z_and_mu", "to_train", lambda v, A, B, Z: {"Z": Z[:1] * 1e-4} if v == "z" else {"A": A, "B": B}, "ONE"),
    ("10_layer", "HeadLinear", type("NoWeight", (solutions.HeadLinear,), {"weight": None}), "wo.weight"),
    ("10_layer", "HeadLinear", layer_given(lambda tasks, rows, b: (tasks, 0 * rows)), "its own task"),
    ("10_layer", "HeadLinear", layer_given(lambda tasks, rows, b: (tasks, rows.repeat(b // len(rows)))), "consecutive"),
    ("10_layer", "HeadLinear", layer_given(lambda tasks, rows, b: (tasks[rows], torch.arange(len(rows)))), "share"),
    ("10_t5", "train", lambda *args: solutions.train(*args[:5], args[4]), "two groups"),
]  # fmt: skip


@pytest.mark.parametrize("step, name, wrong, says", WRONG)
def test_a_wrong_answer_is_refused(step, name, wrong, says):
    """Each typical wrong answer fails its check, with the hint that is meant for it."""
    with pytest.raises(pytest.fail.Exception, match=re.escape(says)) as failed:
        globals()[f"test_step_{step}"](SimpleNamespace(**(vars(solutions) | {name: wrong})))
    message = str(failed.value)
    assert re.fullmatch(r"Expected: [^\n]+ Hint: [^\n]+", message) and len(message) < 220, message


def test_a_learners_file(tmp_path):
    """What is written in it is checked, what is not is skipped with a word what to write; no file: how to begin."""
    path = tmp_path / "my.py"
    with pytest.raises(pytest.fail.Exception, match="make one"):
        Answers(str(path), 1)
    path.write_text("x = 1\nx = = 2\n")
    with pytest.raises(pytest.fail.Exception, match=rf"^{path}, line 2: SyntaxError, .*\. Hint: .*$"):
        Answers(str(path), 1)
    path.write_text("def lora(x, linear, A, B, alpha=1.0):\n    return linear(x)\n")
    with pytest.raises(pytest.fail.Exception, match="alpha / r"):
        test_step_01_lora(Answers(str(path), 1))
    with pytest.raises(pytest.skip.Exception, match="step 2: write merge in .*my.py"):
        test_step_02_merge(Answers(str(path), 2))


TEXT = (Path(__file__).parents[1] / "docs" / "exercises.md").read_text()


MISTAKES = """
def lora(x, linear, A, B, alpha=1.0):
    return linear(x) + alpha * (x @ A @ B)
def merge(linear, A, B, alpha=1.0):
    return linear.weight + alpha / r * (A @ B).T
def by_parameters(x, A, B, w):
    return x @ A @ B * w
def relaxed_bernoulli(z, u, temperature=1.0):
    return [z, u]
def weights(Z, tasks, u=None):
    return Z[tasks].softmax(-1)
"""


def test_what_a_learner_sees(tmp_path):
    """The command of the text prints one line for each mistake, with its place where it is an error."""
    (command,) = re.findall(r"EXERCISES=my/answers.py python (.* -k step_01)\n", TEXT)
    path = tmp_path / "answers.py"
    path.write_text(MISTAKES)
    words = [sys.executable, *command.removesuffix("_01").split()]
    asked = dict(cwd=Path(__file__).parents[1], env=os.environ | {"EXERCISES": str(path)})
    printed = subprocess.run(words, capture_output=True, text=True, **asked).stdout
    failures, skipped = printed.partition("= FAILURES =")[2].split("= short test summary")
    lines = [line for line in failures.splitlines()[1:] if line[:2] not in ("__", "==")]
    expected = (
        r"Expected: .*\. The largest difference is \d.*\. Hint: .*alpha / r.*",
        rf"{path}, line 5: NameError, name 'r' is not defined\. Hint: .* step 2 .*",
        r"Expected: by_parameters .*\. Its shape is \(2, 1, 2\), not \(1, 1, 2\)\. Hint: .*",
        r"Expected: .*\. It is a list, no tensor\. Hint: .*logit.*",
        r"Expected: .*\. The largest difference is \d.*\. Hint: no softmax.*",
    )
    assert len(lines) == len(expected), printed
    assert all(re.fullmatch(says, line) for says, line in zip(expected, lines, strict=True)), lines
    assert f"step 6: write poly_loop in {path}" in skipped


def test_the_predictions_come_true():
    """Each step asks one question, and its answer is what solutions.py computes."""
    my, steps = solutions, re.split(r"^## \d+\. ", TEXT, flags=re.M)[1:]
    answers = [re.findall(r"<b>Predict:</b>[^<]*</summary>\n\n(.*?)\n\n</details>", step, re.S) for step in steps]
    assert [len(found) for found in answers] == [1] * 10

    def says(step: int, *numbers: str):
        assert all(number in answers[step - 1][0] for number in numbers), (step, numbers)

    x, linear, A, B, w = problem(r=1)
    a, b = (p[0].clone().requires_grad_() for p in (A, 0 * B))
    my.lora(x, linear, a, b).square().sum().backward()
    assert a.grad.abs().max() == 0 < b.grad.abs().max()

    change = my.merge(linear, A[0], B[0]) - linear.weight
    assert torch.linalg.matrix_rank(change) == 1 and (change != 0).all()

    one, half = (x, A[:1], B[:1]), torch.tensor([0.5])
    assert torch.allclose(my.by_outputs(*one, half), x @ A[0] @ B[0] / 2)
    assert torch.allclose(my.by_parameters(*one, half), x @ A[0] @ B[0] / 4)

    u = torch.rand(100_000)
    assert torch.allclose(my.relaxed_bernoulli(torch.zeros(100_000), u), u)
    often = torch.sigmoid(torch.tensor(5.0)).item()
    says(4, f"{100 * often:.1f} %")
    assert abs((my.relaxed_bernoulli(torch.full_like(u, 5), u) > 0.5).double().mean() - often) < 1e-3

    Z, tasks = torch.tensor([[5.0] * 3, [0.0] * 3]), torch.arange(2)
    assert torch.allclose(my.weights(Z, tasks), torch.tensor(1 / 3))
    draws = torch.stack([my.weights(Z, tasks, torch.rand(2, 3)) for _ in range(1000)])
    near, far = (draws - 1 / 3).abs().mean((0, 2))
    assert near < 0.02 and far > 0.1

    swap = [1, 0, 2]
    assert torch.allclose(my.poly(x, linear, A[swap], B[swap], w[:, swap]), my.poly(x, linear, A, B, w))

    sizes = [math.prod(shape) for shape in ((2048, 1), (512, 8, 1), (1, 8, 1))]  # (i, r), (l, s, r)
    says(7, *(f" {size:,} " for size in sizes))

    A, B = torch.randn(2, 8, 1), torch.randn(2, 1, 8)
    for heads, row in ((4, 8), (1, 2)):
        chosen = torch.tensor(list(itertools.product(range(2), repeat=heads)))
        mixed = torch.cat([p.flatten(1) for p in my.mix_heads(A, B, nn.functional.one_hot(chosen, 2).double())], 1)
        says(8, str(len(mixed.unique(dim=0))), str(row))
        assert heads * 2 == row

    attention, feed_forward = 24 * (4 + 8), 48 * 3  # T5-XL's linear layers: 24 encoder blocks and 24 decoder blocks
    mu, z = attention * (2048 + 2048) + feed_forward * (2048 + 5120), (attention + feed_forward) * 8
    says(9, f"{mu:,}", f"{z:,}")
    assert mu == 10 * 64 * z and 64 * z == 221_184

    losses = my.train(small_t5(my, 2), TWO_ANSWERS, [0, 1, 0, 1], 20, 0, 0.3)
    assert len(set(losses)) == 1


def test_the_text_names_what_is_checked():
    """Each command of `exercises.md` selects checks, each check has a command, and each signature is the answer's."""
    steps = {name for name in globals() if name.startswith("test_step_")}
    selected = [{name for name in steps if key in name} for key in re.findall(r"-k (step_\d\d)\n", TEXT)]
    assert all(selected) and set().union(*selected) == steps
    for name, answer in inspect.getmembers(solutions, lambda member: inspect.getmodule(member) is solutions):
        for f in [answer] if inspect.isfunction(answer) else [answer.__init__, answer.forward]:
            assert inspect.getsource(f).splitlines()[0].strip() in TEXT, name
