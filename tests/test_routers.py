"""The baselines' routers, sparse fine-tuning as an adapter, and which layers share a router."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from baselines.adapter_soup import soup_weights
from baselines.fixed import FixedRouter, RandomRouter, given_table, half_of_skills, labels, skill_names
from baselines.hyperformer import HyperRouter
from baselines.task_moe import TaskMoERouter
from data import Task
from layers import GRANULARITIES, LORA_LAYERS, sharing_key
from lora import LoRA, LoRALinear
from methods import SFTMHRLinear, SFTPolyLinear
from mhr import MHRRouter
from poly import PolyLinear, PolyRouter
from sft import SFT, SFTLinear

TASKS, SKILLS, IDS = 5, 3, torch.tensor([1, 1, 3, 0])
DISTINCT, ROWS = torch.tensor([0, 1, 3]), torch.tensor([1, 1, 2, 0])  # IDS, as `inject.task_ids` gives them

ROUTERS = {
    "shared": lambda: FixedRouter(torch.ones(TASKS, 1)),
    "private": lambda: FixedRouter(torch.eye(TASKS)),
    "expert": lambda: FixedRouter(torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]])),
    "random": lambda: RandomRouter(TASKS, SKILLS),
    "task-moe": lambda: TaskMoERouter(TASKS, SKILLS, k=2),
    "hyperformer": lambda: HyperRouter(TASKS, SKILLS),
}
routers = pytest.mark.parametrize("name", ROUTERS)


def layer_of(name: str, adapter=None) -> PolyLinear:
    """A layer with random values in its skills, so that tasks differ, and random logits or embeddings."""
    torch.manual_seed(0)
    kind = SFTPolyLinear if isinstance(adapter, SFT) else PolyLinear
    layer = kind(nn.Linear(8, 12), adapter or LoRA(4), ROUTERS[name]())
    for p in layer.inventory.values():
        if p.is_floating_point():
            p.data.normal_()
    if layer.router.Z.requires_grad:
        layer.router.Z.data.normal_()
    return layer.eval()


# --- Routers ----------------------------------------------------------------------------------------------------------


@routers
@pytest.mark.parametrize("adapter", [LoRA(4), SFT(0.25)], ids=["lora", "sft"])
def test_a_mixed_batch_equals_one_example_at_a_time(name, adapter):
    layer, x = layer_of(name, adapter), torch.randn(4, 2, 8)
    together = layer(x, DISTINCT, ROWS)
    torch.testing.assert_close(together, layer(x, IDS), rtol=1e-5, atol=1e-6)
    for k, task in enumerate(IDS):
        torch.testing.assert_close(together[k], layer(x[k : k + 1], task[None])[0], rtol=1e-5, atol=1e-6)
    repeated = layer(x.repeat_interleave(3, dim=0), DISTINCT, ROWS)  # as beams
    torch.testing.assert_close(repeated, together.repeat_interleave(3, dim=0), rtol=1e-5, atol=1e-6)


@routers
def test_merged_equals_routed(name):
    layer, x = layer_of(name), torch.randn(4, 2, 8)
    for task in range(TASKS):
        torch.testing.assert_close(layer.merged(task)(x), layer(x, torch.tensor([task])), rtol=1e-5, atol=1e-6)


@routers
def test_an_untrained_layer_is_its_backbone(name):
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 12), torch.randn(4, 2, 8)
    layer = PolyLinear(linear, LoRA(2), ROUTERS[name]())
    assert torch.equal(layer.train()(x, DISTINCT, ROWS), linear(x))


@routers
def test_ids_out_of_range(name):
    for ids in ([-1], [TASKS]):
        with pytest.raises(IndexError, match=r"task ids must be in 0 \.\. 4"):
            ROUTERS[name]()(torch.tensor(ids))


@routers
def test_tasks_are_added_after_or_in_place_of_the_old(name):
    router = ROUTERS[name]()
    old, trains = router.Z.detach().clone(), router.Z.requires_grad
    router.add_tasks(2)
    assert torch.equal(router.Z[:TASKS], old) and router.tasks == TASKS + 2
    router.add_tasks(1, keep=False)
    assert router.tasks == 1 and router.Z.shape == (1, old.shape[1]) and router.Z.requires_grad == trains


def test_fixed_weights_by_hand():
    expert = ROUTERS["expert"]()
    expected = [[1 / 2, 1 / 2, 0], [0, 1, 0], [0, 1 / 2, 1 / 2], [1 / 3] * 3, [0, 0, 1]]
    torch.testing.assert_close(expert(torch.arange(5)), torch.tensor(expected))
    assert torch.equal(ROUTERS["shared"]()(torch.arange(5)), torch.ones(5, 1))
    assert torch.equal(ROUTERS["private"]()(torch.arange(5)), torch.eye(5))
    assert not [p for p in expert.parameters() if p.requires_grad]
    expert.add_tasks(1)
    torch.testing.assert_close(expert(torch.tensor([5])), torch.full((1, 3), 1 / 3))  # a new task uses all alike


def test_shared_is_one_lora():
    layer, x = layer_of("shared"), torch.randn(4, 2, 8)
    single = LoRALinear(layer.linear, layer.adapter, {name: p[0].detach() for name, p in layer.inventory.items()})
    torch.testing.assert_close(layer(x, DISTINCT, ROWS), single(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("table", [torch.zeros(2, 3), torch.tensor([[1.0, -1.0]]), torch.ones(3)])
def test_a_table_that_is_none(table):
    with pytest.raises(ValueError, match="a table"):
        FixedRouter(table)


def test_a_router_keeps_a_table_of_its_own():
    """safetensors writes no two tensors that share memory; and one router's Z may be set without another's."""
    table = torch.ones(2, 3)
    one, other = FixedRouter(table), FixedRouter(table)
    one.Z.data.zero_()
    assert torch.equal(table, torch.ones(2, 3)) and torch.equal(other.Z, table)


def tasks_of(*descriptions: tuple) -> list[Task]:
    """Tasks without examples from (name, skills, group)."""
    return [Task(name, "EM", [], [], [], skills, group) for name, skills, group in descriptions]


def test_given_tables_by_hand():
    tasks = tasks_of(("a", ("sort", "drop"), "x"), ("b", ("drop",), ""), ("c", (), "questions"), ("d", (), ""))
    assert [labels("expert", task) for task in tasks] == [("sort", "drop"), ("drop",), ("questions",), ()]
    names = skill_names("expert", tasks)
    assert names == ["sort", "drop", "questions"]  # what a task is made of goes before its group
    table = given_table("expert", tasks, names)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]  # of the last one nothing is known
    new = tasks_of(("e", ("drop", "new"), ""), ("f", ("new",), ""), ("g", (), "sort"))
    assert given_table("expert", new, names).tolist() == [[0, 1, 0], [1, 1, 1], [1, 0, 0]]
    for method in ("private", "adapter-soup"):  # whatever is known of them
        assert skill_names(method, tasks) == ["a", "b", "c", "d"]
        assert torch.equal(given_table(method, tasks, ["a", "b", "c", "d"]), torch.eye(4))
        assert given_table(method, new, ["a", "b", "c", "d"]).tolist() == [[1] * 4] * 3  # none of them is known


@pytest.mark.parametrize("skills, half", [(1, 1), (2, 1), (5, 3), (8, 4)])
def test_half_of_the_skills_at_random(skills, half):
    torch.manual_seed(0)
    table = half_of_skills(2000, skills)
    assert set(table.unique().tolist()) <= {0.0, 1.0} and (table.sum(-1) == half).all()
    assert ((table.mean(0) - half / skills).abs() < 0.05).all()  # each skill alike
    again = half_of_skills(2000, skills)
    assert torch.equal(table, again) == (skills == 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 10**6))
def test_soup_weights_against_a_loop(tasks, n, seed):
    """1/n for the n nearest tasks, or for all if there are fewer."""
    torch.manual_seed(seed)
    embeddings, new = torch.randn(tasks, 4), torch.randn(4)
    cosine = [(row @ new / row.norm() / new.norm()).item() for row in embeddings]
    best = sorted(range(tasks), key=lambda k: -cosine[k])[:n]
    w = soup_weights(embeddings, new, n)
    assert w.shape == (1, tasks) and w[0].tolist() == pytest.approx([(k in best) / len(best) for k in range(tasks)])


def test_random_routing_draws_for_each_example():
    router = RandomRouter(2, 4).train()
    torch.manual_seed(0)
    w = router(torch.zeros(4000, dtype=torch.long))
    on = w > 0
    assert abs(on.float().mean().item() - 0.5) < 0.02  # each skill with probability 1/2
    joint = (on[:, 0] & on[:, 1]).float().mean().item()
    assert abs(joint - 0.25) < 0.03  # whatever the others do
    sums = w.sum(-1)
    torch.testing.assert_close(sums[on.any(-1)], torch.ones(int(on.any(-1).sum())))
    assert (sums[~on.any(-1)] == 0).all() and (~on.any(-1)).any()
    assert torch.equal(router.eval()(torch.tensor([0, 1])), torch.full((2, 4), 0.25))
    layer, x = layer_of("random").train(), torch.randn(1, 2, 8).expand(64, 2, 8)
    y = layer(x, torch.tensor([0]), torch.zeros(64, dtype=torch.long))
    assert len(y[:, 0, 0].unique()) > 4  # one task, one input, many draws


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 10**6))
def test_task_moe_against_a_loop(skills, k, seed):
    k = min(k, skills)
    torch.manual_seed(seed)
    router = TaskMoERouter(3, skills, k)
    router.Z.data.normal_()
    for task, w in enumerate(router(torch.arange(3)).tolist()):
        p = router.Z[task].softmax(-1).tolist()
        kept = sorted(range(skills), key=lambda s: -p[s])[:k]
        total = sum(p[s] for s in kept)
        assert w == pytest.approx([p[s] / total if s in kept else 0.0 for s in range(skills)], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_task_moe_of_infinite_logits(dtype):
    """Rows of all -inf or all +inf give two even weights; one +inf takes all; in every row they sum to 1, and gradients
    are finite."""
    inf, router = torch.inf, TaskMoERouter(4, 4, k=2).to(dtype)
    router.Z.data = torch.tensor([[-inf] * 4, [inf] * 4, [0, inf, 1, -inf], [0, -inf, -inf, -inf]], dtype=dtype)
    w = router(torch.arange(4))
    assert [sorted(row) for row in w[:2].tolist()] == [[0, 0, 0.5, 0.5]] * 2
    assert w[2:].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    w.square().sum().backward()
    assert bool(router.Z.grad.isfinite().all())


def test_task_moe_trains_the_kept_logits_only():
    router = TaskMoERouter(2, 4, k=2)
    router.Z.data = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    (router(torch.tensor([0])) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert (router.Z.grad[0, :2] != 0).all() and (router.Z.grad[0, 2:] == 0).all() and (router.Z.grad[1] == 0).all()
    for k in (1, 5):  # one skill alone has weight 1 whatever Z says
        with pytest.raises(ValueError, match=f"2 <= k <= s, not {k} of 4"):
            TaskMoERouter(2, 4, k)


@pytest.mark.parametrize("units", [2, 4])
def test_every_task_has_weights_of_both_signs_under_hyperformer(units):
    """Also where the ReLU turns off all of a task's units: what follows it has a bias."""
    torch.manual_seed(0)
    routers = [HyperRouter(1, units) for _ in range(2000)]
    weights = torch.cat([router(torch.tensor([0])) for router in routers])
    off = [not bool((router.hidden(router.Z) > 0).any()) for router in routers]
    assert sum(off) / len(routers) == pytest.approx(2**-units, rel=0.2)
    assert bool(weights.all()) and 0.4 < (weights > 0).float().mean() < 0.6


def test_hyperformer_is_the_network_that_gives_the_adapter():
    """Embedding -> linear -> ReLU -> linear -> A and B of the task's LoRA: the last has the inventory."""
    layer, x = layer_of("hyperformer"), torch.randn(4, 2, 8)
    y, router = layer(x, DISTINCT, ROWS), layer.router
    for k, task in enumerate(IDS.tolist()):
        hidden = (router.Z[task] @ router.hidden.weight.T + router.hidden.bias).clamp(min=0)
        hidden = hidden @ router.last.weight.T + router.last.bias
        A, B = (sum(h * skill for h, skill in zip(hidden, layer.inventory[name], strict=True)) for name in "AB")
        torch.testing.assert_close(y[k], layer.linear(x[k]) + x[k] @ A @ B / 4, rtol=1e-5, atol=1e-5)
    sizes = [p.numel() for p in router.parameters()]
    assert sizes == [TASKS * SKILLS, *[SKILLS * SKILLS, SKILLS] * 2]


# --- Sparse fine-tuning -----------------------------------------------------------------------------------------------


def dense(adapter: SFT, linear: nn.Linear, value, place) -> torch.Tensor:
    """D by a loop."""
    D = torch.zeros(linear.out_features, linear.in_features)
    for v, p in zip(value, place.tolist(), strict=True):
        D[p // linear.in_features, p % linear.in_features] += v
    return D


def test_sft_by_a_loop():
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 12), torch.randn(4, 2, 8)
    layer = SFTLinear(linear, SFT(0.25))
    value, place = layer.params["value"], layer.params["place"]
    assert len(value) == len(place) == 24 and len(place.unique()) == 24 and bool((value == 0).all())
    assert torch.equal(layer(x), linear(x))
    value.data.normal_()
    D = dense(layer.adapter, linear, value, place)
    torch.testing.assert_close(layer(x), x @ (linear.weight + D).T + linear.bias)
    torch.testing.assert_close(layer.merged()(x), layer(x))
    assert [name for name, p in layer.named_parameters() if p.requires_grad and "params" in name] == ["params.value"]
    (grad,) = torch.autograd.grad(layer(x).square().sum(), value)
    D = D.detach().requires_grad_()
    (full,) = torch.autograd.grad((x @ (linear.weight + D).T + linear.bias).square().sum(), D)
    torch.testing.assert_close(grad, full.flatten()[place])  # the gradient of the entries that it may change


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_sft_under_mhr_by_a_loop(heads):
    """Each block of rows of D is mixed with the weights of its head; one head is Poly."""
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 12), torch.randn(4, 2, 8)
    layer = SFTMHRLinear(linear, SFT(0.25), MHRRouter(TASKS, SKILLS, heads)).eval()
    layer.inventory["value"].data.normal_()
    layer.router.Z.data.normal_()
    y = layer(x, DISTINCT, ROWS)
    Ds = [dense(layer.adapter, linear, *(layer.inventory[n][s] for n in ("value", "place"))) for s in range(SKILLS)]
    for k, task in enumerate(IDS):
        w = layer.router(task[None])[0]
        D = torch.cat([sum(w[h, s] * Ds[s].chunk(heads)[h] for s in range(SKILLS)) for h in range(heads)])
        torch.testing.assert_close(y[k], linear(x[k]) + x[k] @ D.T, rtol=1e-5, atol=1e-5)
    if heads == 1:
        poly = SFTPolyLinear(linear, layer.adapter, PolyRouter(TASKS, SKILLS)).eval()
        poly.router.Z.data, poly.inventory = layer.router.Z.data[:, 0], layer.inventory
        assert torch.equal(poly(x, DISTINCT, ROWS), y)
    mean = SFTLinear(linear, layer.adapter, layer.average_skills())
    torch.testing.assert_close(mean(x), linear(x) + x @ (sum(Ds) / SKILLS).T, rtol=1e-5, atol=1e-5)
    assert len(mean.params["place"].unique()) == len(mean.params["place"]) <= SKILLS * 24
    with pytest.raises(ValueError, match="5 heads do not divide 12"):
        SFTMHRLinear(linear, SFT(), MHRRouter(TASKS, SKILLS, 5))


def test_sft_learns_with_adam():
    torch.manual_seed(0)
    layer, x = SFTLinear(nn.Linear(8, 4), SFT(0.5)), torch.randn(64, 8)
    before = layer.linear.weight.clone()
    target = x @ dense(layer.adapter, layer.linear, torch.randn(16), layer.params["place"]).T + layer.linear(x).detach()
    optimizer = torch.optim.Adam([p for p in layer.params.parameters() if p.requires_grad], lr=0.05)
    for _ in range(300):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4 and torch.equal(layer.linear.weight, before)


@pytest.mark.parametrize("examples", [0, 6])  # one adapter, or one for each of six examples
def test_what_sft_keeps_for_backward_is_proportional_to_its_entries(examples):
    """No dense D waits between the passes; x does, as for LoRA. Gradients by finite differences."""
    torch.manual_seed(0)
    linear, kept = nn.Linear(64, 96).requires_grad_(False), []
    adapter = SFT(0.01)
    params = [adapter.init(linear) for _ in range(max(1, examples))]
    value, place = (torch.stack([p[name] for p in params]) for name in ("value", "place"))
    if not examples:
        value, place = value[0], place[0]
    value.requires_grad_()
    x = torch.randn(6, 2, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        adapter.apply(linear, x, value, place).sum().backward()
    assert 0 < sum(kept) < x.numel() + 4 * value.numel() + 96 < 64 * 96 / 2
    small = nn.Linear(3, 2).double()
    value = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    place, x = torch.randint(6, (2, 4)), torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: adapter.apply(small, x, v, place), (x, value))


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="density"):
        SFT(density)


# --- Granularity ------------------------------------------------------------------------------------------------------

MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(num_layers=24, feed_forward_proj="gated-gelu")),
    "bart": lambda: BartForConditionalGeneration(BartConfig()),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=3)),
}
ALL_LINEARS = LORA_LAYERS | {"bart": r".*_attn\.(q|k|v|out)_proj|.*\.fc[12]"}
# Routers by hand. T5, 24 + 24 blocks: 2 sub-layers in the encoder's, 3 in the decoder's; BART, 12 + 12: the same.
ROUTER_NUMBERS = {
    "t5": (432, 24 * 2 + 24 * 3, 48, 2, 1),
    "bart": (12 * 6 + 12 * 10, 12 * 2 + 12 * 3, 24, 2, 1),
    "llama": (4 * 7, 4 * 2, 4, 1, 1),
    "gpt2": (3 * 4, 3 * 2, 3, 1, 1),
}


@pytest.mark.parametrize("n", [1, 2, 3, 24, 999])
def test_blocks_in_a_row_share_a_router(n):
    """Of encoder and decoder each; one block is `block`, all are `coder`."""
    names = [f"{coder}.block.{k}.layer.0.SelfAttention.q" for coder in ("encoder", "decoder") for k in range(24)]
    keys = [sharing_key(name, f"blocks-{n}") for name in names]
    assert len(set(keys)) == 2 * -(-24 // n)
    for coder in (0, 24):
        assert [keys[coder + k] == keys[coder + k + 1] for k in range(23)] == [(k + 1) % n > 0 for k in range(23)]


@pytest.mark.parametrize("name", MODELS)
def test_granularity_follows_module_structure(name):
    with torch.device("meta"):
        model = MODELS[name]()
    names = [key for key, _ in model.named_modules() if re.fullmatch(ALL_LINEARS[name], key)]
    numbers = tuple(len({sharing_key(key, granularity) for key in names}) for granularity in GRANULARITIES)
    assert numbers == ROUTER_NUMBERS[name]
    for finer, coarser in zip(GRANULARITIES, GRANULARITIES[1:], strict=False):  # each level refines the next
        pairs = {(sharing_key(key, finer), sharing_key(key, coarser)) for key in names}
        assert len(pairs) == len({fine for fine, _ in pairs})


def test_granularity_by_hand():
    name = "decoder.block.3.layer.1.EncDecAttention.q"
    expected = [name, "decoder.block.3.layer.1.EncDecAttention", "decoder.block.3", "decoder", "model"]
    assert [sharing_key(name, granularity) for granularity in GRANULARITIES] == expected
    assert sharing_key("model.encoder.layers.0.fc1", "layer") == sharing_key("model.encoder.layers.0.fc2", "layer")
    for n, key in ((1, "decoder.block.3x1"), (2, "decoder.block.1x2"), (4, "decoder.block.0x4")):
        assert sharing_key(name, f"blocks-{n}") == key  # block 3 is in the second pair and the first four
    for wrong in ("blocks-0", "blocks-", "blocks-x", "blocks"):
        with pytest.raises(ValueError, match="unknown granularity"):
            sharing_key(name, wrong)
    with pytest.raises(ValueError, match="lm_head is in no numbered block"):
        sharing_key("lm_head", "block")
    with pytest.raises(ValueError, match="unknown granularity"):
        sharing_key(name, "head")
