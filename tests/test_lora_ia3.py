"""LoRA and (IA)^3 beside one linear layer: against naive loops, at initialisation, merged; each file copied alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ia3 import IA3, IA3Linear
from lora import LoRA, LoRALinear

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = {"lora1": LoRA(1), "lora4": LoRA(4, alpha=2.0), "ia3-out": IA3("out"), "ia3-in": IA3("in")}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())


def adapted(adapter, i=6, o=8, bias=True, seed=0):
    """A float64 layer whose adapter is far from its initial value, so that no term can hide."""
    torch.manual_seed(seed)
    layer = (LoRALinear if isinstance(adapter, LoRA) else IA3Linear)(nn.Linear(i, o, bias), adapter).double()
    for p in layer.params.values():
        nn.init.normal_(p)
    return layer


def naive(layer, x):
    """The two equations of MHR section 2.1 for ONE row x (i,), output feature by output feature, in python loops."""
    W, bias, p, y = layer.linear.weight, layer.linear.bias, layer.params, []
    for j in range(W.shape[0]):
        y_j = 0.0 if bias is None else bias[j]
        for k in range(W.shape[1]):
            x_k = x[k] * (1 + p["v"][k]) if layer.adapter == IA3("in") else x[k]
            y_j = y_j + W[j, k] * x_k
            if isinstance(layer.adapter, LoRA):
                for q in range(layer.adapter.rank):
                    y_j = y_j + layer.adapter.alpha / layer.adapter.rank * x[k] * p["A"][k, q] * p["B"][q, j]
        y.append(y_j * (1 + p["v"][j]) if layer.adapter == IA3("out") else y_j)
    return torch.stack(y)


@each_adapter
@settings(max_examples=10, deadline=None)
@given(st.sampled_from([(3,), (2, 3), (1, 1), (2, 0)]), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_equals_naive_loops(adapter, lead, i, o, bias):
    """Outputs and gradients are those of the written-out sums. Catches a lost alpha / r, a transposed A or B, a scale
    on the wrong side or forgotten on the bias. The leading axes are (b,), (b, l), and an empty sequence."""
    layer = adapted(adapter, i, o, bias)
    x = torch.randn(*lead, i, dtype=torch.float64, requires_grad=True)
    rows = [naive(layer, row) for row in x.reshape(-1, i)]
    expected = torch.stack(rows).reshape(*lead, o) if rows else x.new_zeros(*lead, o).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, expected)
    if rows:
        probe, inputs = torch.randn_like(y), [x, *layer.params.values()]
        got, want = (torch.autograd.grad((out * probe).sum(), inputs) for out in (y, expected))
        torch.testing.assert_close(got, want)


def test_the_letters_of_the_papers():
    """For a column x: MHR's W0 x + alpha A B^T x and Polytropon's eq. 4, (W0 + A B) x, letters as lora.py says."""
    layer = adapted(LoRA(2), bias=False)
    x, W, (A, B) = torch.randn(6, dtype=torch.float64), layer.linear.weight, (layer.params["A"], layer.params["B"])
    theirs_A, theirs_B = B.T, A  # MHR: (o, r) and (i, r)
    torch.testing.assert_close(layer(x), W @ x + 1 / 2 * theirs_A @ theirs_B.T @ x)
    theirs_A, theirs_B = B.T, A.T  # Polytropon: (o, r) and (r, i)
    torch.testing.assert_close(layer(x), (W + 1 / 2 * theirs_A @ theirs_B) @ x)


@each_adapter
def test_one_adapter_per_example_equals_one_by_one(adapter):
    """`apply` with stacked parameters gives each example its own adapter. Catches adapters that leak between the
    rows of a batch, invisible with a batch of one."""
    layers = [adapted(adapter, seed=k) for k in range(4)]
    linear, x = layers[0].linear, torch.randn(4, 3, 6, dtype=torch.float64)
    stacked = {name: torch.stack([layer.params[name] for layer in layers]) for name in layers[0].params}
    expected = [adapter.apply(linear, x[k], **layer.params) for k, layer in enumerate(layers)]
    torch.testing.assert_close(adapter.apply(linear, x, **stacked), torch.stack(expected))


@each_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_op_at_init(adapter, dtype):
    """A fresh adapter changes no bit of the output, in train and eval mode. Catches a B or v that does not start at
    zero, and an adapter that raises the precision of a bfloat16 backbone."""
    linear = nn.Linear(6, 8).to(dtype)
    layer = (LoRALinear if isinstance(adapter, LoRA) else IA3Linear)(linear, adapter)
    for x in (torch.randn(5, 3, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype)):
        assert torch.equal(layer.train()(x), linear(x)) and torch.equal(layer.eval()(x), linear(x))
        assert layer(x).dtype == dtype


def test_lora_init():
    """A is uniform within +-1/sqrt(3 i) (not PEFT's sqrt(h/i), not kaiming's 1/sqrt(i)), B zero, both float32."""
    for i, r in ((48, 1), (300, 4)):
        bound = (3 * i) ** -0.5
        p = LoRA(r).init(nn.Linear(i, 20).bfloat16())
        assert p["A"].shape == (i, r) and p["B"].shape == (r, 20)
        assert {q.dtype for q in p.values()} == {torch.float32} and p["B"].eq(0).all()
        many = torch.stack([LoRA(r).init(nn.Linear(i, 20))["A"] for _ in range(50)])
        assert 0.99 * bound < many.max() <= bound and -bound <= many.min() < -0.99 * bound
        assert many.std() == pytest.approx(bound / 3**0.5, rel=0.05)  # uniform, and not +-bound only


def test_ia3_init():
    """v is zero, float32, as long as the side that it scales."""
    for side, size in (("out", 8), ("in", 6)):
        v = IA3(side).init(nn.Linear(6, 8).bfloat16())["v"]
        assert v.shape == (size,) and v.dtype == torch.float32 and v.eq(0).all()


@each_adapter
@pytest.mark.parametrize("bias", [True, False])
def test_merged_equals_layer(adapter, bias):
    """The merged plain layer computes the same, in new frozen tensors; the original is untouched and merging twice
    changes nothing. Catches merging in place, a transposed update, and an (IA)^3 bias left unscaled."""
    layer, x = adapted(adapter, bias=bias), torch.randn(2, 3, 6, dtype=torch.float64)
    before = {name: p.clone() for name, p in layer.state_dict().items()}
    plain, again = layer.merged(), layer.merged(task=7)  # the task is ignored
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-12, atol=1e-12)
    assert type(plain) is nn.Linear and not any(p.requires_grad for p in plain.parameters())
    assert torch.equal(plain.weight, again.weight) and (plain.bias is None) == (not bias)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in layer.state_dict().items())


@each_adapter
def test_merged_bfloat16_is_rounded_once(adapter):
    """Merging into bfloat16 gives the float32 result rounded once. Catches rounding the update, which loses small
    updates, before adding it."""
    exact = adapted(adapter).float()
    exact.linear.bfloat16()
    merged = exact.merged()
    assert merged.weight.dtype == torch.bfloat16
    exact.linear.float()  # the same values, in float32
    assert torch.equal(merged.weight, exact.merged().weight.bfloat16())
    assert torch.equal(merged.bias, exact.merged().bias.bfloat16())


@each_adapter
@pytest.mark.parametrize("per_example", [False, True])
def test_gradcheck(adapter, per_example):
    """Analytic gradients equal finite differences, with one adapter for all and with one per example."""
    layer = adapted(adapter, 3, 2)
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.params.items(), strict=True)
    values = [torch.stack([v, 2 * v]) if per_example else v for v in values]
    values = [v.detach().requires_grad_() for v in values]
    run = lambda x, *p: adapter.apply(layer.linear, x, **dict(zip(names, p, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *values))


def test_second_derivatives_of_lora_are_an_error():
    """Not a wrong number."""
    layer, x = adapted(LoRA(2)), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("per_example", [False, True])
def test_lora_under_autocast(per_example):
    """In other people's training loops: the layer's own dtype comes out, and gradients of float32 parameters are
    float32 and near the exact ones."""
    layer, x, probe, grads = adapted(LoRA(2)).float(), torch.randn(2, 3, 6), torch.randn(2, 3, 8), []
    params = {k: torch.stack([v, 2 * v]) if per_example else v for k, v in layer.params.items()}
    params = {k: v.detach().requires_grad_() for k, v in params.items()}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer.adapter.apply(layer.linear, x, **params)
            assert y.dtype == layer.linear(x).dtype == (torch.bfloat16 if enabled else torch.float32)
        grads.append(torch.autograd.grad((y.float() * probe).sum(), list(params.values())))
    for want, got in zip(*grads, strict=True):
        assert got.dtype == torch.float32 and (got - want).norm() < 0.02 * want.norm()


def test_ia3_input_side_equals_papers_wi_1():
    """Scaling the input of T5's `wo` is scaling the output of `wi_1`, the authors' choice (a deviation of ia3.py)."""
    torch.manual_seed(0)
    wi_0, wi_1, wo = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
    x, v = torch.randn(2, 3, 4), torch.randn(6)
    paper = wo(nn.functional.gelu(wi_0(x)) * IA3("out").apply(wi_1, x, v))
    ours = IA3("in").apply(wo, nn.functional.gelu(wi_0(x)) * wi_1(x), v)
    torch.testing.assert_close(ours, paper)


@each_adapter
def test_answers_like_a_linear_layer(adapter):
    """T5 reads `self.wo.weight` in its forward. Given parameters are used, and the linear layer is kept, not copied."""
    linear = nn.Linear(6, 8)
    cls, p = LoRALinear if isinstance(adapter, LoRA) else IA3Linear, adapter.init(linear)
    layer = cls(linear, adapter, p)
    assert layer.weight is linear.weight and layer.bias is linear.bias and layer.linear is linear
    assert (layer.in_features, layer.out_features) == (6, 8)
    assert all(torch.equal(layer.params[name], p[name]) and layer.params[name].requires_grad for name in p)
    assert cls(nn.Linear(6, 8, bias=False), adapter).bias is None


def test_number_of_parameters():
    """r (i + o) for LoRA, o or i for (IA)^3: what the papers' tables count."""
    linear = nn.Linear(6, 8)
    count = lambda adapter: sum(p.numel() for p in adapter.init(linear).values())  # noqa: E731
    assert [count(a) for a in ADAPTERS.values()] == [14, 56, 8, 6]


@pytest.mark.parametrize("make", [lambda: LoRA(0), lambda: LoRA(-1), lambda: IA3("both"), lambda: IA3("")])
def test_bad_settings_are_refused(make):
    """A rank below 1 and an unknown side are a ValueError at once, not a wrong shape or a silent default later."""
    with pytest.raises(ValueError):
        make()


# --- Promises about the files -----------------------------------------------------------------------------------------

ONE_ADAPTER = """
import {file}, torch

linear = torch.nn.Linear(4, 6)
layer = {file}.{cls}Linear(linear, {file}.{cls}())
x = torch.randn(2, 3, 4)
assert torch.equal(layer(x), linear(x))
layer(x).square().mean().backward()
torch.optim.SGD([p for p in layer.params.parameters() if p.requires_grad], lr=1.0).step()
assert not torch.equal(layer(x), linear(x))
assert torch.allclose(layer.merged()(x), layer(x), atol=1e-5)
"""
ROUTED = """
import {file}, torch

class Shift:  # an adapter of our own: add a vector to the output
    feature_axis = {{"c": 0}}
    def init(self, linear):
        return {{"c": torch.zeros(linear.out_features)}}
    def apply(self, linear, x, c):
        return linear(x) + c.unsqueeze(-2)
    def merge(self, weight, bias, c):
        return weight.clone(), bias + c

linear = torch.nn.Linear(4, 6)
layer = {file}.{cls}Linear(linear, Shift(), {file}.{cls}Router(3, 2{heads}))
x, tasks = torch.randn(4, 5, 4), torch.tensor([2, 0, 2, 2])
assert torch.equal(layer(x, tasks), linear(x))
layer(x, tasks).square().mean().backward()
torch.optim.SGD(layer.inventory.parameters(), lr=1.0).step()
y = layer.eval()(x, tasks)
assert not torch.allclose(y, linear(x))
assert torch.allclose(layer.merged(2)(x[:1]), y[:1], atol=1e-5)
assert layer.average_skills()["c"].shape == (6,)
"""
THREE_FILES = """
import torch
from torch import nn
from inject import adapted_layers, freeze, inject, load_adapters, merge, save_adapters, task_ids, unmerge
from lora import LoRA
from poly import PolyLinear, PolyRouter

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    freeze(model)
    inject(model, lambda name, linear: PolyLinear(linear, LoRA(rank=2), PolyRouter(3, 2)), "0|2")
    return model

model, x = build(), torch.randn(4, 5, 6)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
with task_ids([0, 1, 2, 0]):
    before = model(x).square().sum()
    before.backward()
    optimizer.step()
    model.eval()
    assert model(x).square().sum() < before
    save_adapters(model, "adapter.safetensors")
    other = build().eval()
    load_adapters(other, "adapter.safetensors")
    assert torch.equal(other(x), model(x))
with task_ids([1]):
    y = model(x)
layers = merge(model, 1)
assert torch.allclose(model(x), y, atol=1e-5) and not adapted_layers(model)
unmerge(model, layers)
"""
USES = {  # the files that are copied into an empty folder: what is done with them there
    "lora": ONE_ADAPTER.format(file="lora", cls="LoRA"),
    "ia3": ONE_ADAPTER.format(file="ia3", cls="IA3"),
    "sft": ONE_ADAPTER.format(file="sft", cls="SFT"),
    "poly": ROUTED.format(file="poly", cls="Poly", heads=""),
    "mhr": ROUTED.format(file="mhr", cls="MHR", heads=", 2"),
    "inject lora poly": THREE_FILES,
}
IN_EACH_FOLDER = """
import os, runpy, sys, torch

for folder in sys.argv[1:]:
    os.chdir(folder)
    sys.path.insert(0, folder)
    runpy.run_path("use.py")
    own = [name for name, module in sys.modules.items() if (getattr(module, "__file__", "") or "").startswith(folder)]
    print(*sorted(own))
    sys.path.remove(folder)
    for name in own:
        del sys.modules[name]
assert "transformers" not in sys.modules
"""


def test_files_work_alone(tmp_path):
    """The promise of the repository: copy a file, or inject.py and what it is to inject, and it runs. poly and mhr take
    any adapter (four names, see `Shift`). Catches an import of a sibling, a dependency on LoRA. -I keeps the repository
    off the path; one process for all, since it takes seconds to import torch."""
    folders = [tmp_path / files.replace(" ", "-") for files in USES]
    for folder, (files, use) in zip(folders, USES.items(), strict=True):
        folder.mkdir()
        (folder / "use.py").write_text(use)
        for file in files.split():
            (folder / f"{file}.py").write_text((ROOT / f"{file}.py").read_text())
    command = [sys.executable, "-I", "-c", IN_EACH_FOLDER, *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(USES)


@pytest.mark.parametrize("file", ["lora.py", "ia3.py", "sft.py", "poly.py", "mhr.py"])
def test_file_imports_only_torch_and_the_standard_library(file):
    """Wherever an import stands, also inside a function. Catches a new dependency."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert "torch" in imported and imported <= {"torch", *sys.stdlib_module_names}


def test_ia3_file_mirrors_lora_file():
    """ "The rest of the file is the same, in the same order" (ia3.py): same names top to bottom, and the wrapper class
    is the same code. Catches a fix made in one of the two files only."""
    trees = []
    for file, cls in (("lora", "LoRA"), ("ia3", "IA3")):
        tree = ast.parse((ROOT / f"{file}.py").read_text().replace(cls, "ADAPTER"))
        for node in ast.walk(tree):
            if ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else False:
                node.body = node.body[1:]  # code only
        trees.append(tree)
    trees[0].body = [n for n in trees[0].body if getattr(n, "name", "") != "AddLowRank"]  # LoRA's alone
    names = [[n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)] for tree in trees]
    wrappers = [ast.dump(next(n for n in t.body if getattr(n, "name", "") == "ADAPTERLinear")) for t in trees]
    assert names[0] == names[1] and wrappers[0] == wrappers[1]
