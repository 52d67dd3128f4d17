"""The checks of `exercises.md`: they check `solutions.py`, or with EXERCISES=my/answers.py set that file.

Each compares an answer with the repository's own layers or with sums written out; wrong answers, at the end, show
that it can fail, and with which hint.
"""

import importlib.util
import inspect
import os
import re
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
        spec = importlib.util.spec_from_file_location("answers", path)
        self._module, self._todo = importlib.util.module_from_spec(spec), f"step {step}: write {{}} in {path}"
        spec.loader.exec_module(self._module)

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


def same(actual, expected: Tensor, hint: str):
    assert isinstance(actual, Tensor), f"expected a tensor, not {actual!r}: {hint}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}: {hint}"
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-9), f"wrong values: {hint}"


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


def test_step_01_lora(my):
    """LoRA's forward is `LoRALinear`'s, bias and scale included; with B = 0 it is the linear layer's, to the bit."""
    x, linear, A, B, _ = problem()
    for alpha in (1.0, 3.0):
        expected = LoRALinear(linear, LoRA(2, alpha), {"A": A[0], "B": B[0]})(x)
        same(my.lora(x, linear, A[0], B[0], alpha), expected, "W0 x, the bias, and alpha / r times (x A) B")
    assert torch.equal(my.lora(x, linear, A[0], 0 * B[0]), linear(x)), "B = 0 must change no bit"


def test_step_02_merge(my):
    """The merged weight gives LoRA's output in a plain linear layer, and the backbone keeps its own."""
    x, linear, A, B, _ = problem(i=4)  # square: a forgotten transpose has the right shape
    before, y = linear.weight.clone(), LoRALinear(linear, LoRA(2, 3.0), {"A": A[0], "B": B[0]})(x)
    weight = my.merge(linear, A[0], B[0], 3.0)
    assert torch.equal(linear.weight, before), "the backbone was changed: return a new tensor"
    hint = "the update is (o, i): alpha / r times the transpose of A B"
    same(nn.functional.linear(x, weight, linear.bias), y, hint)


def test_step_03_averaging(my):
    """The two averages are two functions: by hand (in `exercises.md`), and in rank, r against s r."""
    A, B = torch.eye(2)[:, :, None], torch.tensor([[[1.0, 0]], [[0, 2]]])
    x, w = torch.tensor([[[2.0, 4]]]), torch.tensor([0.5, 0.5])
    same(my.by_parameters(x, A, B, w), torch.tensor([[[1.5, 3]]]), "mix A, mix B, then multiply")
    same(my.by_outputs(x, A, B, w), torch.tensor([[[1.0, 4]]]), "multiply for each skill, then mix")
    _, _, A, B, w = problem(i=9, o=8)
    updates = [f(torch.eye(9)[None], A, B, w[0])[0] for f in (my.by_parameters, my.by_outputs)]
    assert [int(torch.linalg.matrix_rank(update)) for update in updates] == [2, 6], "the ranks are r and s r"


def test_step_04_relaxed_bernoulli(my):
    """Equation 2 as printed, and as `poly.py` has it under the same noise; rounded, 1 as often as sigmoid(z) says;
    its gradient is finite also for large logits."""
    z, u, hint = 3 * torch.randn(40), torch.rand(40), "sigmoid of (z + logit(u)) / temperature"
    for temperature in (1.0, 0.5):
        same(my.relaxed_bernoulli(z, u, temperature), printed(z, u, temperature), hint)
    torch.manual_seed(1)
    expected = poly.relaxed_bernoulli(z, 0.5)
    torch.manual_seed(1)
    same(my.relaxed_bernoulli(z, torch.rand_like(z), 0.5), expected, hint)
    on = my.relaxed_bernoulli(torch.full((20_000,), -1.0), torch.rand(20_000)) > 0.5
    assert abs(on.double().mean() - 0.269) < 0.02, "rounded, it is 1 with probability sigmoid(z)"  # sigmoid(-1)
    z = torch.tensor([-200.0, 200.0], requires_grad=True)
    my.relaxed_bernoulli(z, torch.tensor([0.3, 0.3])).sum().backward()
    assert z.grad.isfinite().all(), "NaN for large logits: log(sigmoid(z) / (1 - sigmoid(z))) is z itself"


def test_step_05_weights(my):
    """The routers' weights, for Poly's Z and MHR's, without noise and with; a wrong id is refused, and a row without
    active skills gives zeros."""
    tasks = torch.tensor([4, 0, 4])
    for router in (PolyRouter(5, 3), MHRRouter(5, 3, 2)):
        Z = router.Z = nn.Parameter(3 * torch.randn(router.Z.shape))
        same(my.weights(Z, tasks), router.eval()(tasks), "sigmoid(z), divided by its sum over the skills")
        torch.manual_seed(1)
        u = torch.rand_like(Z[tasks])
        torch.manual_seed(1)
        same(my.weights(Z, tasks, u), router.train()(tasks), "with u, relaxed_bernoulli in place of sigmoid")
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            my.weights(Z, torch.tensor([0, bad]))
    off = my.weights(torch.full((1, 3), -torch.inf), torch.tensor([0]))
    same(off, torch.zeros(1, 3), "no active skill: weights of zero, not NaN")


def test_step_06_poly(my):
    """Both are `PolyLinear` for a batch of different tasks; the second calls torch no oftener for more examples."""
    x, linear, A, B, w = problem()
    layer = repository(linear, A, B)
    expected = layer.adapter.apply(linear, x, **layer.mix(w))
    for answer in ("poly_loop", "poly"):
        same(getattr(my, answer)(x, linear, A, B, w), expected, "each example has its own mixture of A and of B")
    calls = []
    for args in ((x, linear, A, B, w), problem(b=9)):
        with Watch() as seen:
            my.poly(*args)
        calls.append(seen.calls)
    assert calls[1] <= calls[0], "a loop over the examples: give einsum the axis b"


def test_step_07_late(my):
    """The weights applied after the multiplication with A: the same function, and no copy of A for each example."""
    x, linear, A, B, w = problem(i=64, o=3, r=2, s=2, b=16, length=1)
    layer = repository(linear, A, B)
    with Watch() as seen:
        y = my.poly_late(x, linear, A, B, w)
    same(y, layer.adapter.apply(linear, x, **layer.mix(w)), "two sums over skills, one for A and one for B")
    assert seen.largest < 16 * 64 * 2, "a result as large as b copies of A: multiply first, then mix"


def test_step_08_heads(my):
    """Feature j belongs to head j // (i / h), of A's rows and B's columns; one head is Poly; heads must divide."""
    _, linear, A, B, _ = problem(i=12, o=6, r=3)
    w, hint = torch.randn(4, 3, 3).softmax(-1), "head k is the k-th block of A's rows, of B's columns, mixed by w[:, k]"
    rows = [sum(w[:, j // 4, s, None] * A[s, j] for s in range(3)) for j in range(12)]
    columns = [sum(w[:, j // 2, s, None] * B[s, :, j] for s in range(3)) for j in range(6)]
    sums = {"A": torch.stack(rows, 1), "B": torch.stack(columns, 2)}
    one, three = repository(linear, A, B).mix(w[:, 0]), repository(linear, A, B, 3).mix(w)
    for weights, expected in ((w, sums), (w, three), (w[:, :1], one)):
        for mixed, name in zip(my.mix_heads(A, B, weights), "AB", strict=True):
            same(mixed, expected[name], f"{name}: {hint}")
    for i, o in ((10, 6), (12, 4)):
        with pytest.raises(ValueError):
            my.mix_heads(A[:, :i], B[:, :, :o], w)


def test_step_09_z_and_mu(my):
    """What a new task trains: a fresh row of Z alone, or one averaged adapter and no router."""
    _, linear, A, B, _ = problem(i=64, o=64, s=8)
    z, mu = (my.to_train(variant, A, B, torch.randn(5, 64, 8)) for variant in ("z", "mu"))
    assert (sorted(z), sorted(mu)) == (["Z"], ["A", "B"]), "z trains Z alone; mu trains A and B"
    assert z["Z"].shape == (1, 64, 8) and 0 < z["Z"].abs().max() <= 1e-3, "one fresh row of Z, drawn within +-1e-3"
    assert 432 * z["Z"].numel() == 221_184  # T5-XL: 432 layers
    for name, mean in repository(linear, A, B).average_skills().items():
        same(mu[name], mean, "mu is ONE adapter, the mean over the skills")
    assert all(p.requires_grad and p.is_leaf for p in (*z.values(), *mu.values())), "an optimiser wants leaf tensors"


def test_step_10_layer(my):
    """The layer is steps 5, 8 and 1, is its backbone at the start, repeats beams in a row, and draws noise per task."""
    linear, x, tasks, rows = nn.Linear(8, 4), torch.randn(3, 5, 8), torch.tensor([1, 3]), torch.tensor([1, 0, 1])
    layer = my.HeadLinear(linear, my.HeadRouter(tasks=4, skills=3, heads=2), rank=2)
    assert torch.equal(layer(x, tasks, rows), linear(x)), "a fresh layer changes no bit: B starts at zero"
    assert getattr(layer, "weight", None) is linear.weight, "T5 reads `wo.weight`: offer the linear layer's"
    for p in (layer.A, layer.B, layer.router.Z):
        nn.init.normal_(p)
    y, theirs = layer.eval()(x, tasks, rows), repository(linear, layer.A, layer.B, 2)
    mixed = theirs.mix(solutions.weights(layer.router.Z, tasks[rows]))
    same(y, theirs.adapter.apply(linear, x, **mixed), "each example has the weights of its own task, tasks[rows]")
    beams = layer(x.repeat_interleave(2, 0), tasks, rows)
    same(beams, y.repeat_interleave(2, 0), "an example's beams are consecutive rows of x")
    x = x[:1].repeat(3, 1, 1)
    y = layer.train()(x, tasks, rows)
    same(y[2], y[0], "examples of one task share their noise: one draw for each of `tasks`")
    assert not torch.allclose(y, layer(x, tasks, rows)), "in training mode every call draws new noise"


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


def test_step_10_t5(my):
    """One input, two tasks that want different answers: routed, the loss falls below 0.3 in 20 steps; as one task it
    cannot fall below ln 2. Only adapters change, and each learning rate reaches its own parameters."""
    batch = {"input_ids": torch.tensor([[5, 6, 7]] * 4), "labels": torch.tensor([[10], [20], [10], [20]])}
    model = small_t5(my, 2)
    for steps, lr, lr_z, moving in ((20, 0.05, 0.3, "ABZ"), (2, 0.05, 0, "AB"), (2, 0, 0.3, "Z")):
        old = {name: p.clone() for name, p in model.named_parameters()}
        losses = my.train(model, batch, [0, 1, 0, 1], steps, lr, lr_z)
        assert len(losses) == steps and (steps < 20 or losses[-1] < 0.3), f"20 losses, the last below 0.3, not {losses}"
        moved = {name.split(".")[-1] for name, p in model.named_parameters() if not torch.equal(p, old[name])}
        assert moved == set(moving), f"with lr {lr} and lr_z {lr_z}, {moved} moved, not {set(moving)}"
    assert min(my.train(small_t5(my, 1), batch, [0, 0, 0, 0], 20, 0.05, 0.3)) > 0.693, "below ln 2 as one task?"


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
    ("05_weights", "weights", lambda Z, tasks, u=None: Z[tasks].softmax(-1), "sigmoid(z)"),
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
    ("10_t5", "train", lambda *args: solutions.train(*args[:5], args[4]), "moved"),
]  # fmt: skip


@pytest.mark.parametrize("step, name, wrong, says", WRONG)
def test_a_wrong_answer_is_refused(step, name, wrong, says):
    """Each typical wrong answer fails its check, with the hint that is meant for it."""
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception), match=re.escape(says)):
        globals()[f"test_step_{step}"](SimpleNamespace(**(vars(solutions) | {name: wrong})))


def test_a_learners_file(tmp_path):
    """What is written in it is checked, what is not is skipped with a word what to write; no file: how to begin."""
    path = tmp_path / "my.py"
    with pytest.raises(pytest.fail.Exception, match="make one"):
        Answers(str(path), 1)
    path.write_text("def lora(x, linear, A, B, alpha=1.0):\n    return linear(x)\n")
    with pytest.raises(AssertionError, match="alpha / r"):
        test_step_01_lora(Answers(str(path), 1))
    with pytest.raises(pytest.skip.Exception, match="step 2: write merge in .*my.py"):
        test_step_02_merge(Answers(str(path), 2))


def test_the_text_names_what_is_checked():
    """Each command of `exercises.md` selects checks, each check has a command, and each signature is the answer's."""
    text = (Path(__file__).parents[1] / "docs" / "exercises.md").read_text()
    steps = {name for name in globals() if name.startswith("test_step_")}
    selected = [{name for name in steps if key in name} for key in re.findall(r"-k (step_\d\d)\n", text)]
    assert all(selected) and set().union(*selected) == steps
    for name, answer in inspect.getmembers(solutions, lambda member: inspect.getmodule(member) is solutions):
        for f in [answer] if inspect.isfunction(answer) else [answer.__init__, answer.forward]:
            assert inspect.getsource(f).splitlines()[0].strip() in text, name
