"""Poly and MHR: the routed layers against naive loops, their routing, merging, learning, and how the files differ."""

import ast
import copy
import difflib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mhr
import poly
from baselines.fixed import FixedRouter, RandomRouter
from baselines.hyperformer import HyperRouter
from baselines.task_moe import TaskMoERouter
from ia3 import IA3, IA3Linear
from lora import LoRA, LoRALinear
from mhr import MHRLinear, MHRRouter
from poly import PolyLinear, PolyRouter
from sft import SFT, SFTLinear

ROOT = Path(__file__).resolve().parent.parent
ROUTINGS = ("gumbel", "sigmoid", "straight-through")
ADAPTERS = {"lora1": LoRA(1), "lora4": LoRA(4, alpha=2.0), "ia3-out": IA3("out"), "ia3-in": IA3("in")}
HEADS = {"poly": None, "mhr1": 1, "mhr4": 4}  # None: PolyLinear
I, O, TASKS, SKILLS = 8, 12, 5, 3  # noqa: E741

each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
each_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
each_routing = pytest.mark.parametrize("routing", ROUTINGS)
each_file = pytest.mark.parametrize("module", [poly, mhr], ids=["poly", "mhr"])


def fresh(adapter, heads, i=I, o=O, tasks=TASKS, skills=SKILLS, routing="gumbel", bias=True, seed=0):
    """A layer as it is made, in float32."""
    torch.manual_seed(seed)
    linear = nn.Linear(i, o, bias)
    if heads is None:
        return PolyLinear(linear, adapter, PolyRouter(tasks, skills, routing))
    return MHRLinear(linear, adapter, MHRRouter(tasks, skills, heads, routing))


def trained(*args, **kwargs):
    """A float64 layer with every parameter far from its initial value, so that no term can hide."""
    layer = fresh(*args, **kwargs).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def batch(b, length=3, i=I, dtype=torch.float64):
    return torch.randn(*((b, i) if length is None else (b, length, i)), dtype=dtype, requires_grad=True)


def gradients(y, x, layer, seed=0):
    """Gradients of x, Z and every inventory parameter, of a random projection of y."""
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return torch.autograd.grad((y * probe).sum(), [x, layer.router.Z, *layer.inventory.values()])


# --- The layer --------------------------------------------------------------------------------------------------------


def naive(layer, x, weights):
    """Row k of x with weights[k] over the skills, (s,) or (h, s): loops over rows, features, skills, positions."""
    linear, adapter, out = layer.linear, layer.adapter, []
    for x_k, w in zip(x, weights, strict=True):
        w = w[None] if w.dim() == 1 else w
        mixed = {}
        for name, inventory in layer.inventory.items():
            axis = {"A": 0, "B": 1, "v": 0}[name]  # the features: rows of A, columns of B, entries of v
            size, features = inventory.shape[axis + 1], []
            for j in range(size):
                head = j // (size // len(w))  # consecutive features belong to one head
                terms = [w[head, s] * inventory[s].select(axis, j) for s in range(len(inventory))]
                features.append(sum(terms))
            mixed[name] = torch.stack(features, axis)
        positions = []
        for x_l in x_k.reshape(-1, x.shape[-1]):
            if isinstance(adapter, LoRA):
                update = mixed["B"].T @ (mixed["A"].T @ x_l) * adapter.alpha / adapter.rank
                y = linear.weight @ x_l + linear.bias + update
            elif adapter.side == "out":
                y = (linear.weight @ x_l + linear.bias) * (1 + mixed["v"])
            else:
                y = linear.weight @ (x_l * (1 + mixed["v"])) + linear.bias
            positions.append(y)
        out.append(torch.stack(positions).reshape(*x_k.shape[:-1], -1))
    return torch.stack(out)


@st.composite
def calls(draw):
    """Sizes of a layer and one call of it: ids, or distinct tasks with rows; beams; 2-D or 3-D x; either mode."""
    n = draw(st.integers(1, 5))
    distinct = draw(st.booleans())
    tasks = draw(st.lists(st.integers(0, TASKS - 1), min_size=1, max_size=n, unique=distinct))
    rows = draw(st.lists(st.integers(0, len(tasks) - 1), min_size=n, max_size=n)) if distinct else None
    return {
        "d": draw(st.integers(1, 3)),
        "e": draw(st.integers(1, 3)),
        "skills": draw(st.integers(1, 4)),
        "routing": draw(st.sampled_from(ROUTINGS)),
        "train": draw(st.booleans()),
        "tasks": torch.tensor(tasks),
        "rows": None if rows is None else torch.tensor(rows),
        "beams": draw(st.integers(1, 3)),
        "length": draw(st.sampled_from([None, 1, 3])),
    }


@each_adapter
@each_heads
@settings(max_examples=12, deadline=None)
@given(call=calls(), seed=st.integers(0, 99))
def test_equals_naive_loops(adapter, heads, call, seed):
    """Outputs and gradients (x, Z, inventory) are those of the sums written as loops, under the same noise. Catches
    averaged outputs instead of parameters, heads cut along the wrong axis, examples mixed up by a reshape, beams
    repeated in the wrong order, rows ignored, and the one-task path going another way than the general one."""
    h = heads or 1
    layer = trained(adapter, heads, h * call["d"], h * call["e"], TASKS, call["skills"], call["routing"], seed=seed)
    layer.train(call["train"])
    tasks, rows, beams = call["tasks"], call["rows"], call["beams"]
    n = len(tasks) if rows is None else len(rows)
    x = batch(n * beams, call["length"], layer.in_features)
    torch.manual_seed(seed)
    weights = layer.router(tasks)
    of_row = [(k // beams if rows is None else int(rows[k // beams])) for k in range(n * beams)]
    expected = naive(layer, x, [weights[u] for u in of_row])
    torch.manual_seed(seed)
    y = layer(x, tasks, rows)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(y, x, layer), gradients(expected, x, layer), rtol=1e-9, atol=1e-9)


def hand_layer(heads):
    """Identity backbone; skill 1: A = (1, 0), B = (1, 0); skill 2: A = (0, 1), B = (0, 2)."""
    layer = fresh(LoRA(1), heads, 2, 2, tasks=2, skills=2, bias=False).eval()
    with torch.no_grad():
        layer.linear.weight.copy_(torch.eye(2))
        layer.inventory["A"].copy_(torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]]))
        layer.inventory["B"].copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]))
    return layer


def test_poly_by_hand():
    """x = (2, 4), two tasks, two skills, rank 1; check it on paper.

    Task 0, w = (1/2, 1/2):  A = (1/2, 1/2),  x A = 1 + 2 = 3,      B = (1/2, 1),    y = (2, 4) + 3 B = (3.5, 7)
    Task 1, w = (3/4, 1/4):  A = (3/4, 1/4),  x A = 1.5 + 1 = 2.5,  B = (3/4, 1/2),  y = (2, 4) + 2.5 B = (3.875, 5.25)
    Averaging the OUTPUTS would give task 0 (2, 4) + 1/2 * 2 (1, 0) + 1/2 * 4 (0, 2) = (3, 8).
    """
    layer = hand_layer(None)
    with torch.no_grad():
        layer.router.Z.copy_(torch.tensor([[1.0, 1.0], [3.0, 1 / 3]]).log())  # sigmoid(log p / (1 - p)) = p
    y = layer(torch.tensor([[2.0, 4.0], [2.0, 4.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(y, torch.tensor([[3.5, 7.0], [3.875, 5.25]]))


def test_mhr_by_hand():
    """The layer of `test_poly_by_hand` with two heads, so d = e = 1; x = (2, 4).

    Head 1, w = (1/2, 1/2):  first row of A  = 1/2 * 1 + 1/2 * 0 = 1/2,   first column of B  = 1/2 * 1 + 1/2 * 0 = 1/2
    Head 2, w = (3/4, 1/4):  second row of A = 3/4 * 0 + 1/4 * 1 = 1/4,   second column of B = 3/4 * 0 + 1/4 * 2 = 1/2
    x A = 2 * 1/2 + 4 * 1/4 = 2,   y = (2, 4) + 2 (1/2, 1/2) = (3, 5)
    """
    layer = hand_layer(2)
    with torch.no_grad():
        layer.router.Z[0].copy_(torch.tensor([[1.0, 1.0], [3.0, 1 / 3]]).log())
    torch.testing.assert_close(layer(torch.tensor([[2.0, 4.0]]), torch.tensor([0])), torch.tensor([[3.0, 5.0]]))


@pytest.mark.parametrize("train", [True, False])
@each_routing
@each_adapter
def test_mhr_with_one_head_is_poly(adapter, routing, train):
    """Same parameters, same seed: the same sampled weights, outputs and gradients, to the bit (with rank > 1 the two
    files lay B out differently in memory, so the last bit may differ). Keeps the duplicated code honest."""
    a = trained(adapter, None, routing=routing).train(train)
    b = trained(adapter, 1, routing=routing).train(train)
    b.load_state_dict({k: v[:, None] if k == "router.Z" else v for k, v in a.state_dict().items()})
    x, tasks = batch(6), torch.tensor([3, 0, 3, 1, 4, 4])
    results = []
    for layer in (a, b):
        torch.manual_seed(1)
        w = layer.router(tasks)
        torch.manual_seed(1)
        y = layer(x, tasks)
        gx, gz, *rest = gradients(y, x, layer)
        results.append([w.reshape(6, SKILLS), y, gx, gz.reshape(TASKS, SKILLS), *rest])
    assert torch.equal(results[0][0], results[1][0])
    if adapter == ADAPTERS["lora4"]:
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    else:
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_routing
@each_heads
@each_adapter
def test_no_op_at_init(adapter, heads, routing, dtype):
    """A fresh layer changes no bit of the backbone's output, whatever the noise. Catches a mixture of fresh skills
    that is only nearly zero (or one), and an adapter that raises the precision of a bfloat16 backbone."""
    layer = fresh(adapter, heads, routing=routing)
    layer.linear.to(dtype)
    for length in (None, 3):
        x = batch(4, length, dtype=dtype)
        for tasks in ([0, 1, 4, 4], [2]):
            for mode in (True, False):
                y = layer.train(mode)(x, torch.tensor(tasks))
                assert torch.equal(y, layer.linear(x)) and y.dtype == dtype


@each_heads
@each_adapter
@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(4)))
def test_examples_do_not_interact(adapter, heads, order):
    """Permuting the batch permutes the output, and each row is what it is in a batch of its own. Four DIFFERENT tasks
    and rank 4: with fewer, the scrambling that the authors' code suffered is invisible."""
    layer, x, tasks = trained(adapter, heads).eval(), batch(4), torch.tensor([4, 0, 2, 1])
    y = layer(x, tasks)
    torch.testing.assert_close(layer(x[order], tasks[order]), y[order])
    for k in range(4):
        torch.testing.assert_close(layer(x[k : k + 1], tasks[k : k + 1]), y[k : k + 1])


@each_heads
@each_adapter
def test_one_task_batch_equals_general_path(adapter, heads):
    """The shortcut for a batch of one task changes nothing: with ids, with rows, with beams."""
    layer, x = trained(adapter, heads).eval(), batch(4)
    general = layer(x, torch.tensor([2, 2, 2, 2]))
    torch.testing.assert_close(layer(x, torch.tensor([2])), general)
    torch.testing.assert_close(layer(x, torch.tensor([2]), torch.tensor([0, 0, 0, 0])), general)
    torch.testing.assert_close(layer(x, torch.tensor([2]), torch.tensor([0, 0])), general)


@each_heads
@each_adapter
def test_repeat_is_read_off_the_shapes(adapter, heads):
    """Rows per example 1, 3, 1, 2 in a row, as between encoder, beams and choices: each example's copies stand next
    to each other, and no call leaves a trace. Catches a repeat that is stored (PEFT and the authors' code fail on the
    second call) or in tile order."""
    layer, x, tasks = trained(adapter, heads).eval(), batch(3), torch.tensor([4, 0, 2])
    y, attributes, state = layer(x, tasks), dict(layer.__dict__), copy.deepcopy(layer.state_dict())
    for beams in (1, 3, 1, 2):
        repeated = layer(x.repeat_interleave(beams, 0), tasks)
        torch.testing.assert_close(repeated, y.repeat_interleave(beams, 0))
    assert layer.__dict__ == attributes and all(torch.equal(p, state[k]) for k, p in layer.state_dict().items())
    assert tasks.tolist() == [4, 0, 2]


@each_heads
def test_one_sample_per_task(heads):
    """With distinct tasks and rows, two examples of a task get the same adapter also in training (a deviation named in
    poly.py); two calls get different ones."""
    layer, x = trained(LoRA(2), heads).train(), batch(1).repeat(4, 1, 1)
    y, again = (layer(x, torch.tensor([1, 3]), torch.tensor([0, 1, 0, 1])) for _ in range(2))
    torch.testing.assert_close(y[:2], y[2:])
    assert not torch.allclose(y[0], y[1]) and not torch.allclose(y, again)


@pytest.mark.parametrize("big", [60.0, float("inf")])
@pytest.mark.parametrize("train", [True, False])
@each_routing
@each_heads
@each_adapter
def test_one_hot_row_selects_one_skill(adapter, heads, routing, train, big):
    """A row of Z with one skill on gives that skill's adapter, per head that skill's block. Catches weights that are
    not normalised, and a skill axis mixed up with the head axis."""
    layer, x, h = trained(adapter, heads, routing=routing).train(train), batch(2), heads or 1
    chosen = [(k + 1) % SKILLS for k in range(h)]  # head k uses this skill
    with torch.no_grad():
        layer.router.Z[2] = -big
        for k, s in enumerate(chosen):
            layer.router.Z[2].view(h, SKILLS)[k, s] = big
    params = {}
    for name, p in layer.inventory.items():
        axis = 1 if name == "B" else 0
        blocks = [p[s].chunk(h, axis)[k] for k, s in enumerate(chosen)]
        params[name] = torch.cat(blocks, axis).detach()
    single = (LoRALinear if isinstance(adapter, LoRA) else IA3Linear)(layer.linear, adapter, params)
    torch.testing.assert_close(layer(x, torch.tensor([2])), single(x))


@each_heads
@each_adapter
def test_absent_tasks_get_exactly_zero_gradient(adapter, heads):
    """Z's gradient is exactly zero for tasks that are not in the batch, and not for those that are."""
    layer, x = trained(adapter, heads), batch(3)
    _, gz, *_ = gradients(layer(x, torch.tensor([1, 3, 1])), x, layer)
    assert [bool(row.any()) for row in gz] == [False, True, False, True, False]


@pytest.mark.parametrize("routing", ["gumbel", "sigmoid"])  # rounding has no derivative to compare with
@each_heads
@each_adapter
def test_gradcheck(adapter, heads, routing):
    """Analytic gradients (x, Z, inventory) equal finite differences, in training with the noise held fixed."""
    layer, tasks = trained(adapter, heads, 4, 4, 2, 2, routing).train(), torch.tensor([1, 0])
    x, names = batch(2, 2, 4), ["router.Z", *(f"inventory.{name}" for name in layer.inventory)]

    def run(x, *values):
        torch.manual_seed(0)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, tasks))

    assert torch.autograd.gradcheck(run, (x, *(layer.get_parameter(name) for name in names)))


# --- Merging and averaging --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@each_routing
@each_heads
@each_adapter
def test_merged_equals_layer(adapter, heads, routing, bias):
    """merged(task) is the routed layer in evaluation, also when asked for in training mode, in new frozen tensors; the
    original is untouched. Catches noise in the merge, another task's row, and merging in place."""
    layer, x = trained(adapter, heads, routing=routing, bias=bias), batch(2)
    before = copy.deepcopy(layer.state_dict())
    for task in range(TASKS):
        plain = layer.train().merged(task)
        assert type(plain) is nn.Linear and not any(p.requires_grad for p in plain.parameters())
        torch.testing.assert_close(plain(x), layer.eval()(x, torch.tensor([task])), rtol=1e-9, atol=1e-9)
        for p in plain.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in layer.state_dict().items())


@each_heads
@each_adapter
def test_merged_bfloat16_is_rounded_once(adapter, heads):
    """Merging into a bfloat16 weight gives the float32 result, rounded once."""
    layer = trained(adapter, heads).float()
    layer.linear.bfloat16()
    merged = layer.merged(3)
    layer.linear.float()  # the same values, in float32
    assert merged.weight.dtype == merged.bias.dtype == torch.bfloat16
    assert torch.equal(merged.weight, layer.merged(3).weight.bfloat16())
    assert torch.equal(merged.bias, layer.merged(3).bias.bfloat16())


@each_heads
@each_adapter
def test_average_skills(adapter, heads):
    """mu: the elementwise mean of the skills, which is the layer under uniform weights, as ONE trainable adapter."""
    layer, x = trained(adapter, heads).eval(), batch(2)
    mean = layer.average_skills()
    for name, p in layer.inventory.items():
        torch.testing.assert_close(mean[name], sum(p[s] for s in range(SKILLS)) / SKILLS)
    single = (LoRALinear if isinstance(adapter, LoRA) else IA3Linear)(layer.linear, adapter, mean)
    nn.init.zeros_(layer.router.Z)
    torch.testing.assert_close(single(x), layer(x, torch.tensor([0])))
    before = copy.deepcopy(layer.inventory.state_dict())
    for p in single.params.values():
        assert p.requires_grad and p.is_leaf
        nn.init.zeros_(p)
    assert all(torch.equal(p, before[name]) for name, p in layer.inventory.state_dict().items())  # no shared memory


@each_adapter
def test_averaging_parameters_is_not_averaging_outputs(adapter):
    """With LoRA (mean A)(mean B) is not mean (A B); with (IA)^3, linear in its one vector, the two agree."""
    layer, x = trained(adapter, None).eval(), batch(2)
    nn.init.zeros_(layer.router.Z)
    skills = [{name: p[s] for name, p in layer.inventory.items()} for s in range(SKILLS)]
    outputs = sum(adapter.apply(layer.linear, x, **skill) for skill in skills) / SKILLS
    agree = torch.allclose(layer(x, torch.tensor([0])), outputs)
    assert agree == isinstance(adapter, IA3)


# --- Making layers and routers ----------------------------------------------------------------------------------------


@each_heads
def test_init(heads):
    """A near and within 1/sqrt(3 i) whatever the number of heads (PEFT's is sqrt(3 h) times that), B zero, Z near and
    within 1e-3, float32 also on a bfloat16 backbone, and no two skills, tasks or heads alike."""
    layer = fresh(LoRA(4), heads, 64, 64, tasks=50, skills=6)
    layer = (PolyLinear if heads is None else MHRLinear)(layer.linear.bfloat16(), LoRA(4), layer.router)
    A, B, Z, bound = *layer.inventory.values(), layer.router.Z, (3 * 64) ** -0.5
    assert A.shape == (6, 64, 4) and B.shape == (6, 4, 64)
    assert Z.shape == ((50, 6) if heads is None else (50, heads, 6))
    assert {p.dtype for p in (A, B, Z)} == {torch.float32} and B.eq(0).all()
    assert 0.98 * bound < A.max() <= bound and -bound <= A.min() < -0.98 * bound
    assert 0.95e-3 < Z.max() <= 1e-3 and -1e-3 <= Z.min() < -0.95e-3
    assert len(A.flatten(1).unique(dim=0)) == 6 and len(Z.view(-1, 6).unique(dim=0)) == 50 * (heads or 1)


@each_heads
@each_adapter
def test_number_of_parameters(adapter, heads):
    """Skills count s times one adapter, whatever the heads; Z counts t h s."""
    layer = fresh(adapter, heads)
    one = sum(p.numel() for p in adapter.init(layer.linear).values())
    assert sum(p.numel() for p in layer.inventory.values()) == SKILLS * one
    assert sum(p.numel() for p in layer.router.parameters()) == TASKS * (heads or 1) * SKILLS


@each_heads
def test_answers_like_a_linear_layer_and_shares_its_router(heads):
    """T5 reads `self.wo.weight` in its forward. The linear layer is kept, not copied. One router object may serve
    several layers: one Z for both."""
    a, linear = fresh(LoRA(), heads), nn.Linear(8, 4, bias=False)
    b = type(a)(linear, IA3(), a.router)
    assert b.linear is linear and b.weight is linear.weight
    assert a.weight is a.linear.weight and a.bias is a.linear.bias and (a.in_features, a.out_features) == (I, O)
    assert b.bias is None
    both = nn.ModuleList([a, b])
    assert sum("router" in name for name, _ in both.named_parameters()) == 1
    a.router.add_tasks(1)
    assert b.router.tasks == TASKS + 1


@pytest.mark.parametrize("make", [PolyRouter, lambda t, s, *r: MHRRouter(t, s, 2, *r)], ids=["poly", "mhr"])
def test_bad_router_settings_are_refused(make):
    """Sizes below 1 and an unknown routing are a ValueError at once."""
    for args in ((0, 2), (2, 0), (-1, 2), (2, 2, "softmax"), (2, 2, "")):
        with pytest.raises(ValueError):
            make(*args)
    with pytest.raises(ValueError):
        MHRRouter(2, 2, 0)


@pytest.mark.parametrize("adapter,heads", [(LoRA(), 3), (LoRA(), 8), (LoRA(), 24), (IA3("out"), 8), (IA3("in"), 3)])
def test_heads_must_divide_the_layer(adapter, heads):
    """A ValueError that names the sizes when the layer is made, not a RuntimeError in a later reshape (PEFT, mttl).
    3 divides the 12 outputs only, 8 the 8 inputs only, 24 neither."""
    with pytest.raises(ValueError, match=rf"{heads} heads .* 8 inputs and 12 outputs"):
        fresh(adapter, heads)


def test_ia3_cuts_one_side_only():
    """(IA)^3 has nothing to cut on the other side, so the heads need not divide it."""
    for side, heads in (("out", 3), ("in", 8)):
        assert fresh(IA3(side), heads)(batch(2, dtype=torch.float32), torch.tensor([0, 1])).shape == (2, 3, O)


@each_heads
@each_adapter
def test_bad_calls_are_refused(adapter, heads):
    """Ids out of range or negative (PEFT and the authors' code take row -1) are an IndexError, also in `merged`; a
    number of ids that does not divide the batch is a ValueError."""
    layer = fresh(adapter, heads)
    for bad in (-1, TASKS, 10**9):
        for tasks in ([bad], [0, bad]):
            with pytest.raises(IndexError, match="0 .. 4"):
                layer(batch(2, dtype=torch.float32), torch.tensor(tasks))
        with pytest.raises(IndexError):
            layer.merged(bad)
    for b, n in ((4, 3), (2, 4), (3, 2)):
        for tasks, rows in ((torch.zeros(n).long(), None), (torch.tensor([0, 1]), torch.zeros(n).long())):
            with pytest.raises(ValueError, match=f"{n} task ids for a batch of {b} rows"):
                layer(batch(b, dtype=torch.float32), tasks, rows)


@each_heads
def test_add_tasks(heads):
    """keep=True leaves the old rows bit for bit, keep=False replaces them; new rows start within 1e-3, and work."""
    layer = trained(LoRA(2), heads)
    router, old = layer.router, layer.router.Z.detach().clone()
    router.add_tasks(3)
    assert router.tasks == TASKS + 3 and torch.equal(router.Z[:TASKS], old)
    assert 0 < router.Z[TASKS:].abs().min() and router.Z[TASKS:].abs().max() <= 1e-3
    assert router.Z.dtype == old.dtype and router.Z.requires_grad and router.Z.is_leaf
    assert dict(layer.named_parameters())["router.Z"] is router.Z
    layer(batch(2), torch.tensor([TASKS + 2, 0]))
    router.add_tasks(2, keep=False)
    assert router.Z.shape == (2, *old.shape[1:]) and router.Z.abs().max() <= 1e-3 and router.Z.dtype == old.dtype
    with pytest.raises(IndexError):
        layer(batch(2), torch.tensor([2, 0]))


# --- Routing ----------------------------------------------------------------------------------------------------------

logits = st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=4)


@each_file
@settings(max_examples=30, deadline=None)
@given(z=logits, routing=st.sampled_from(ROUTINGS), sample=st.booleans())
def test_weights_are_a_soft_partition(module, z, routing, sample):
    """Weights are non-negative and sum to 1 over the skills, along the last axis only. A row of straight-through
    routing may be empty: then it sums to 0. Catches a lost or misplaced normalisation."""
    z = torch.tensor(z).reshape(1, -1, 3)
    w = module.soft_partition(z, routing, sample)
    total = w.sum(-1)
    allowed = (total - 1).abs() < 1e-5
    if routing == "straight-through":
        allowed |= total == 0
    assert w.shape == z.shape and bool((w >= 0).all() and allowed.all())


def test_evaluation_weights_are_normalised_sigmoids():
    """Without noise, w_j = sigmoid(z_j) / sum sigmoid(z): here 1/2 and 1/4 become 2/3 and 1/3, rounded 0 or 1."""
    z = torch.tensor([0.5 / 0.5, 0.25 / 0.75]).log()
    for module in (poly, mhr):
        torch.testing.assert_close(module.soft_partition(z, "gumbel", False), torch.tensor([2 / 3, 1 / 3]))
        torch.testing.assert_close(module.soft_partition(z, "sigmoid", True), torch.tensor([2 / 3, 1 / 3]))
        z3 = torch.tensor([1.0, -1.0, 2.0])
        torch.testing.assert_close(module.soft_partition(z3, "straight-through", False), torch.tensor([0.5, 0, 0.5]))


@each_routing
@each_heads
def test_noise_follows_the_mode(heads, routing):
    """Evaluation is deterministic; training repeats under a seed and differs without; "sigmoid" never has noise; and
    `sample` overrides the mode. Logits of 0.3 so that straight-through too can come out either way."""
    router, tasks = fresh(LoRA(), heads, skills=64, routing=routing).router, torch.tensor([0, 3])
    nn.init.constant_(router.Z, 0.3)
    draw = lambda **kw: router(tasks, **kw)  # noqa: E731
    router.eval()
    quiet = draw()
    assert torch.equal(quiet, draw()) and torch.equal(quiet, draw(sample=False))
    router.train()
    torch.manual_seed(0)
    noisy = draw()
    torch.manual_seed(0)
    assert torch.equal(noisy, draw()) and torch.equal(draw(sample=False), quiet)
    assert torch.equal(noisy, draw()) == (routing == "sigmoid") == torch.equal(noisy, quiet)
    assert torch.equal(router.eval()(tasks, sample=True), quiet) == (routing == "sigmoid")


@each_file
def test_relaxed_bernoulli_is_equation_2(module, monkeypatch):
    """The stable form equals the paper's: sigmoid(log[ sigmoid(z) u / ((1 - sigmoid(z)) (1 - u)) ] / temperature)."""
    z = torch.linspace(-10, 10, 41, dtype=torch.float64)[:, None].expand(41, 99)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).expand(41, 99)
    monkeypatch.setattr(torch, "rand_like", lambda _: u)
    p = torch.sigmoid(z)
    for temperature in (0.5, 1.0, 3.0):
        paper = torch.sigmoid(torch.log(p * u / ((1 - p) * (1 - u))) / temperature)
        torch.testing.assert_close(module.relaxed_bernoulli(z, temperature), paper, rtol=1e-9, atol=1e-12)


@each_file
def test_relaxed_bernoulli_survives_the_ends_of_u(module, monkeypatch):
    """torch.rand can return 0, once in 2^24 draws; log 0 would meet an infinite logit as infinity minus infinity."""
    inf = float("inf")
    for end in (0.0, 1.0):
        monkeypatch.setattr(torch, "rand_like", lambda z, end=end: torch.full_like(z, end))
        sample = module.relaxed_bernoulli(torch.tensor([-inf, -1e4, 0.0, 1e4, inf]))
        assert sample[[0, 1, 3, 4]].tolist() == [0, 0, 1, 1] and 0 < sample[2] < 1


@pytest.mark.parametrize("z,temperature", [(-2.0, 1.0), (0.0, 1.0), (1.5, 1.0), (0.7, 0.5), (-0.7, 3.0)])
def test_relaxed_bernoulli_distribution(z, temperature):
    """Kolmogorov-Smirnov distance (p > 0.001) to the exact distribution P(sample <= q) = sigmoid(temperature logit(q)
    - z) and to torch's RelaxedBernoulli. In particular a sample exceeds 1/2 with probability sigmoid(z)."""
    torch.manual_seed(0)
    n = 20_000
    full = torch.full((n,), z, dtype=torch.float64)
    ours = poly.relaxed_bernoulli(full, temperature).sort().values
    theirs = torch.distributions.RelaxedBernoulli(temperature, logits=full).sample().sort().values
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    exact = torch.sigmoid(temperature * torch.logit(ours) - z)
    assert (exact - steps).abs().max() < 1.95 / n**0.5
    between = torch.searchsorted(theirs, ours, right=True) / n
    assert (between - steps).abs().max() < 1.95 * (2 / n) ** 0.5
    assert (ours > 0.5).double().mean() == pytest.approx(torch.sigmoid(full[0]).item(), abs=0.015)


def straight_through_case(module, active, sample):
    """For every row with `active` of 3 skills on: weights, their gradient, and what both should be."""
    torch.manual_seed(0)
    z = torch.randn(400, 3, requires_grad=True)
    probe = torch.randn(400, 3)
    torch.manual_seed(1)
    relaxed = module.relaxed_bernoulli(z) if sample else torch.sigmoid(z)
    hard = (relaxed > 0.5).float().requires_grad_()
    expected = hard / hard.sum(-1, keepdim=True).clamp(min=1)
    (at_hard,) = torch.autograd.grad((expected * probe).sum(), hard)
    (want,) = torch.autograd.grad(relaxed, z, at_hard)  # the relaxed sample's gradient, as if it had not been rounded
    torch.manual_seed(1)
    w = module.soft_partition(z, "straight-through", sample)
    (got,) = torch.autograd.grad((w * probe).sum(), z)
    rows = hard.sum(-1) == active
    assert rows.sum() > 20
    return w[rows], expected[rows], got[rows], want[rows]


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("active", [0, 1, 2, 3])
@each_file
def test_straight_through(module, active, sample):
    """Forward: 0 or 1, divided by the number of skills that are on; none on gives zero weights. Backward: the gradient
    of that division at the rounded values, through the relaxed sample as if it had not been rounded."""
    w, expected, got, want = straight_through_case(module, active, sample)
    torch.testing.assert_close(w, expected)
    assert w.eq(0).all() == (active == 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extreme", [float("inf"), 1e4])
@pytest.mark.parametrize("sample", [True, False])
@each_routing
@each_file
def test_extreme_logits_stay_finite(module, routing, sample, extreme):
    """Logits of +-1e4 and +-infinity, also a row of only the lowest, give finite weights and gradients. Catches 0/0,
    log 0, and infinity minus infinity."""
    rows = [[extreme, -extreme, 0.0], [-extreme] * 3, [extreme] * 3, [0.0, 0.0, -extreme]]
    z = torch.tensor(rows * 50, requires_grad=True)
    w = module.soft_partition(z, routing, sample)
    (w * torch.arange(3.0)).sum().backward()
    assert w.isfinite().all() and z.grad.isfinite().all()
    assert w[1].eq(0).all()  # no skill at all: the backbone
    torch.testing.assert_close(w[2], torch.full((3,), 1 / 3))


@each_heads
@each_adapter
def test_no_active_skill_is_the_backbone(adapter, heads):
    """Straight-through with every skill off: the layer is its backbone, and Z gets a finite gradient. It can switch
    (IA)^3 on again; with LoRA it is zero, for A and B are both zero there, and only noise switches a skill on."""
    layer, x = trained(adapter, heads, routing="straight-through").eval(), batch(2)
    nn.init.constant_(layer.router.Z, -1.0)
    y = layer(x, torch.tensor([0, 1]))
    torch.testing.assert_close(y, layer.linear(x))
    _, gz, *_ = gradients(y, x, layer)
    assert gz.isfinite().all() and bool(gz[:2].any()) == isinstance(adapter, IA3)


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["gumbel", "sigmoid"])
@pytest.mark.parametrize("heads", [None, 2], ids=["poly", "mhr2"])
def test_contradictory_tasks(heads, routing):
    """The papers' point. Two tasks, the same inputs x, targets +x D and -x D. One shared LoRA can do no better than
    predict their mean, zero: it ends at the analytic floor mean((x D)^2). Routed skills solve both tasks."""
    torch.manual_seed(0)
    thin = lambda: torch.randn(8, 1) @ torch.randn(1, 8) / 8  # noqa: E731
    D, x, tasks = thin(), torch.randn(32, 8), torch.tensor([0, 1]).repeat_interleave(32)
    linear = nn.Linear(8, 8, bias=False).requires_grad_(False)
    linear.weight.copy_(thin())  # rank 1, so that a LoRA of rank 2 can cancel it and reach the floor
    inputs, targets = torch.cat([x, x]), torch.cat([x @ D, -x @ D])
    floor = (x @ D).square().mean().item()

    def fit(layer, groups, *args):
        optimiser = torch.optim.Adam(groups)
        for _ in range(400):
            loss = (layer(inputs, *args) - targets).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return (layer.eval()(inputs, *args) - targets).square().mean().item()

    shared = LoRALinear(linear, LoRA(2))
    assert fit(shared, [{"params": shared.params.parameters(), "lr": 3e-2}]) == pytest.approx(floor, rel=1e-3)
    router = PolyRouter(2, 4, routing) if heads is None else MHRRouter(2, 4, heads, routing)
    routed = (PolyLinear if heads is None else MHRLinear)(linear, LoRA(2), router)
    groups = [{"params": routed.inventory.parameters(), "lr": 3e-2}, {"params": router.parameters(), "lr": 1e-1}]
    rows = torch.tensor([0, 1]).repeat_interleave(32)
    assert fit(routed, groups, torch.tensor([0, 1]), rows) < 0.01 * floor
    assert (routed(inputs, tasks) - targets).square().mean() < 0.01 * floor


# --- Parity with PEFT -------------------------------------------------------------------------------------------------


def peft_twin(layer, adapter, heads):
    """PEFT's Poly layer, n_splits = heads, with our weights copied in."""
    pytest.importorskip("peft")
    from peft import PolyConfig
    from peft.tuners.poly.layer import Linear

    h, r = heads or 1, adapter.rank
    twin = Linear(
        copy.deepcopy(layer.linear), "a", PolyConfig(r=r, n_tasks=TASKS, n_skills=SKILLS, n_splits=h)
    ).double()
    A, B = layer.inventory["A"].detach(), layer.inventory["B"].detach()
    twin.poly_lora_A["a"].data = A.reshape(SKILLS, h, I // h, r).transpose(0, 1).clone()
    twin.poly_lora_B["a"].data = B.reshape(SKILLS, r, h, O // h).permute(2, 0, 1, 3).clone()
    twin.poly_router["a"].module_logits.data = layer.router.Z.detach().reshape(TASKS, h * SKILLS).clone()
    return twin


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("rank", [1, 4])
@each_heads
def test_parity_with_peft(heads, rank, train):
    """PEFT's Poly (n_splits 1 and 4) computes the same outputs and gradients; in training too, for under one seed both
    draw the same uniform numbers (four different tasks, since PEFT draws per example and we draw per task)."""
    layer = trained(LoRA(rank), heads).train(train)
    twin = peft_twin(layer, LoRA(rank), heads).train(train)
    x, tasks = batch(4), torch.tensor([4, 0, 3, 1])
    torch.manual_seed(7)
    ours = layer(x, tasks)
    torch.manual_seed(7)
    theirs = twin(x, task_ids=tasks)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    probe = torch.randn_like(ours)
    gx, gz, ga, gb = torch.autograd.grad((ours * probe).sum(), [x, layer.router.Z, *layer.inventory.values()])
    Z, A, B = twin.poly_router["a"].module_logits, twin.poly_lora_A["a"], twin.poly_lora_B["a"]
    px, pz, pa, pb = torch.autograd.grad((theirs * probe).sum(), [x, Z, A, B])
    pa = pa.transpose(0, 1).reshape(ga.shape)
    pb = pb.permute(1, 2, 0, 3).reshape(gb.shape)
    torch.testing.assert_close([gx, gz, ga, gb], [px, pz.view_as(gz), pa, pb], rtol=1e-6, atol=1e-6)


def test_differences_from_peft_are_as_stated():
    """What lora.py and poly.py say about PEFT: A starts within sqrt(h/i), a negative id takes the last task's row, and
    two examples of one task get different noise. Tells us when a new PEFT makes those sentences wrong."""
    pytest.importorskip("peft")
    from peft import PolyConfig
    from peft.tuners.poly.layer import Linear

    A = Linear(nn.Linear(64, 64), "a", PolyConfig(r=4, n_tasks=2, n_skills=8, n_splits=4)).poly_lora_A["a"]
    assert 0.98 * (4 / 64) ** 0.5 < A.abs().max() <= (4 / 64) ** 0.5
    layer = trained(LoRA(2), 4)
    twin, x = peft_twin(layer, LoRA(2), 4).eval(), batch(1).repeat(2, 1, 1)
    assert torch.equal(twin(x, task_ids=torch.tensor([-1, -1])), twin(x, task_ids=torch.tensor([TASKS - 1] * 2)))
    y = twin.train()(x, task_ids=torch.tensor([1, 1]))
    assert not torch.allclose(y[0], y[1])


# --- The two files ----------------------------------------------------------------------------------------------------


def test_a_layer_prints_as_one_line():
    """Its sizes, its adapter and its router with all settings that count."""
    linear, router = nn.Linear(8, 12), MHRRouter(5, 3, 4)
    layer, other = MHRLinear(linear, LoRA(2), router), PolyLinear(linear, IA3("in"), PolyRouter(5, 3, "sigmoid"))
    assert str(layer) == "MHRLinear(8 -> 12, LoRA(rank=2, alpha=1.0), MHRRouter(tasks=5, skills=3, heads=4, gumbel))"
    assert str(other) == "PolyLinear(8 -> 12, IA3(side='in'), PolyRouter(tasks=5, skills=3, sigmoid))"
    router.add_tasks(2)
    assert "MHRRouter(tasks=7, " in str(layer)
    assert str(LoRALinear(linear, LoRA(2))) == "LoRALinear(8 -> 12, LoRA(rank=2, alpha=1.0))"
    assert str(IA3Linear(linear)) == "IA3Linear(8 -> 12, IA3(side='out'))"
    assert str(SFTLinear(linear, SFT(0.5))) == "SFTLinear(8 -> 12, SFT(density=0.5))"
    assert str(FixedRouter(torch.eye(3))) == "FixedRouter(tasks=3, skills=3)"
    assert str(RandomRouter(3, 4)) == "RandomRouter(tasks=3, skills=4)"
    assert str(HyperRouter(3, 4)) == "HyperRouter(tasks=3, skills=4)"
    assert str(TaskMoERouter(3, 4)) == "TaskMoERouter(tasks=3, skills=4, k=2)"


def functions(file, prefix):
    """The code of every function of a file, without docstrings and comments, by name ("X" for the prefix), in order."""
    code, tree = {}, ast.parse((ROOT / file).read_text().replace(prefix, "X"))
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef):
                node.body = node.body[1:] if ast.get_docstring(node) else node.body
                code[f"{getattr(owner, 'name', 'file')}.{node.name}"] = ast.unparse(node)
    return code


def test_diff_of_poly_and_mhr_is_the_head_axis():
    """`diff poly.py mhr.py` is the lesson (mhr.py promises it): the same functions in the same order, and code that
    differs in four of them only. Catches a fix made in one of the two files, and a file that drifts away."""
    ours, theirs = functions("poly.py", "Poly"), functions("mhr.py", "MHR")
    assert list(ours) == list(theirs)
    differ = [name for name in ours if ours[name] != theirs[name]]
    assert differ == ["XRouter.__init__", "XRouter.fresh", "XLinear.__init__", "XLinear.mix"]
    bodies = [(ROOT / file).read_text().split('"""', 2)[2].splitlines() for file in ("poly.py", "mhr.py")]
    changed = [line for line in difflib.ndiff(*bodies) if line[0] in "+-"]
    assert len(changed) <= 50
    whole = difflib.ndiff(*((ROOT / file).read_text().splitlines() for file in ("poly.py", "mhr.py")))
    assert sum(line[0] in "+-" for line in whole) <= 70  # docstrings too: it is read as a lesson
