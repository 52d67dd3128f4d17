"""Measures of routing with known answers, gradient alignment against a direct computation, figures, the command."""

import json
import re
import shutil
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.image import imread
from matplotlib.path import Path as Outline
from safetensors.torch import load_file
from scipy.cluster.hierarchy import fcluster
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr
from torch import nn

import adapt
import train
from benchmarks.strings import OPERATIONS, strings
from data import Example, Item, Task
from inject import adapted_layers, adapter_parameters, routers, task_ids
from methods import build_model
from plumbing.errors import RunError, UserError
from plumbing.folders import write_config
from poly import PolyRouter
from tests import helpers
from tests.helpers import (
    bars_of, boxes_of, change_json, check_legible, drawn, numbers_of, small_backbone, texts_of,
)  # fmt: skip
from tools import analyze, figures
from tools.analyze import choose, gradient_alignment
from tools.measures import (
    MEASURES, allocations, discreteness, hierarchy, measure, overlap, recovery, sparsity, spearman, task_similarity,
    usage,
)  # fmt: skip

BLOCKS = np.kron(np.eye(2), np.ones((4, 2)))  # 8 tasks, 4 skills: the first four tasks use the first two skills


# --- Measures of one allocation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "p, expected",
    [
        (np.eye(4), (1, 1 / 4, 1)),  # one-hot
        (np.full((6, 4), 0.5), (0, 0, 1)),  # undecided
        (BLOCKS, (1, 1 / 2, 1)),
        (np.ones((6, 4)), (1, 1, 1)),
        (np.eye(4)[[0, 0, 0]], (1, 1 / 4, 0)),  # one skill does it all
        (np.zeros((3, 4)), (1, 0, 0)),
        (np.ones((3, 1)), (1, 1, None)),  # there is but one skill: nothing to share out
        (np.array([[1, 0], [1, 0], [1, 0], [0, 1]]), (1, 1 / 2, 0.811278)),  # H(3/4, 1/4) in bits
        (np.array([[0.25, 0.75]]), (1 - 0.811278, 1 / 2, 0.811278)),
    ],
)
def test_measures_by_hand(p, expected):
    """Discreteness, sparsity and usage have the values that equations 5 (one less it) to 7 give by hand."""
    assert [f(p) for f in MEASURES.values()] == [x if x is None else pytest.approx(x, abs=1e-6) for x in expected]


def test_usage_is_taken_in_each_head():
    """Two heads that always take one skill, each another one, are not balanced, though all skills are used alike."""
    p = np.zeros((5, 2, 2))
    p[:, 0, 0] = p[:, 1, 1] = 1
    assert usage(p) == 0
    assert usage(p.reshape(10, 2)) == 1


PROBABILITIES = st.one_of(st.tuples(*[st.integers(1, 6)] * 2), st.tuples(*[st.integers(1, 6)] * 3)).flatmap(
    lambda shape: arrays(float, shape, elements=st.floats(0, 1))
)


@given(PROBABILITIES)
@settings(max_examples=60, deadline=None)
def test_measures_are_between_0_and_1_whatever_tasks_and_skills_are_called(p):
    """Every measure is in [0, 1] and stays the same when tasks and skills change places."""
    for f in (discreteness, sparsity, usage) if p.shape[-1] > 1 else (discreteness, sparsity):
        assert 0 <= f(p) <= 1
        assert f(p[::-1, ..., ::-1]) == pytest.approx(f(p), abs=1e-9)


def test_means_are_of_the_routers_where_a_measure_is_defined():
    """A router of one skill has no usage, and does not count in its mean; if all are such, there is none."""
    one, two = np.ones((3, 1)), np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
    measured = measure({"a": one, "b": two})
    assert measured["layers"]["a"]["usage"] is None and measured["mean"]["usage"] == usage(two)
    assert measured["mean"]["sparsity"] == (sparsity(one) + sparsity(two)) / 2
    assert measure({"a": one})["mean"]["usage"] is None


@given(st.floats(0, 0.5), st.floats(0, 0.5))
@settings(max_examples=40, deadline=None)
def test_discreteness_grows_with_the_distance_from_one_half(a, b):
    """The further probabilities are from 1/2, the more discrete."""
    low, high = sorted((a, b))
    assert discreteness(np.array([[0.5 + low]])) <= discreteness(np.array([[0.5 + high]])) + 1e-9


# --- Allocations of a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, shape", [("poly", (5, 3)), ("mhr", (5, 4, 3))])
def test_allocations_are_the_probabilities_of_every_router(method, shape):
    """poly and mhr: one allocation a router, sigmoid(Z), under the name of its layer."""
    model = helpers.adapted("t5", method, "lora")
    by_router = allocations(model)
    assert len(by_router) == len(routers(model))
    for name, p in by_router.items():
        assert p.shape == shape
        Z = model.get_submodule(name).router.Z.detach().numpy()
        np.testing.assert_allclose(p, 1 / (1 + np.exp(-Z.astype(float))), rtol=1e-12)


def test_a_shared_router_counts_once():
    """Layers that share a router have one allocation, under the first one's name."""
    model = build_model(train.Config(method="poly", backbone="scratch", granularity="coder", device="cpu"), tasks=4)[0]
    names = list(allocations(model))
    assert [name.split(".")[0] for name in names] == ["encoder", "decoder"]
    assert all(model.get_submodule(name).router is router for name, router in zip(names, routers(model), strict=True))
    assert names == [next(n for n in adapted_layers(model) if n.startswith(coder)) for coder in ("encoder", "decoder")]


def test_a_fixed_table_is_its_own_allocation():
    """expert: the table, with discreteness 1."""
    by_router = allocations(helpers.adapted("t5", "expert", "lora"))
    assert all((p == helpers.TABLES["expert"].numpy()).all() for p in by_router.values())
    assert {discreteness(p) for p in by_router.values()} == {1}


@pytest.mark.parametrize("method", ["lora", "task-moe", "hyperformer", "random"])
def test_other_methods_have_no_allocation(method):
    """One adapter, competing weights, unbounded weights and random weights are no probabilities of skills."""
    assert allocations(helpers.adapted("t5", method, "lora")) == {}


# --- Tasks beside each other ------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    """The cosine of what all routers say: 1 for equal rows, 0 for disjoint ones, and for a row of nothing."""
    layers = {"a": np.array([[1, 0], [1, 0], [0, 1], [0, 0]]), "b": np.array([[1, 0], [0, 1], [0, 1], [0, 0.0]])}
    expected = [[1, 0.5, 0, 0], [0.5, 1, 0.5, 0], [0, 0.5, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(task_similarity(layers), expected, atol=1e-12)


@given(PROBABILITIES)
@settings(max_examples=40, deadline=None)
def test_similarity_is_a_similarity(p):
    """Symmetric, in [0, 1], 1 on the diagonal; heads are as further skills."""
    similarity = task_similarity({"a": p})
    assert similarity.min() >= 0 and similarity.max() <= 1 and (np.diag(similarity) == 1).all()
    np.testing.assert_allclose(similarity, similarity.T, atol=1e-12)
    np.testing.assert_allclose(similarity, task_similarity({"a": p.reshape(len(p), -1)}), atol=1e-12)


def test_the_tree_finds_planted_groups():
    """Tasks that share skills join first: cut in two, the tree of a noisy block-diagonal Z is its blocks."""
    noise = np.random.default_rng(0).uniform(0, 0.2, BLOCKS.shape)
    tree = hierarchy(task_similarity({"a": np.abs(BLOCKS - noise)}))
    groups = fcluster(tree, 2, "maxclust")
    assert len(set(groups[:4])) == len(set(groups[4:])) == 1 and groups[0] != groups[4]


def test_overlap_by_hand_and_by_scipy():
    """Jaccard's index, 0 for two tasks without skills."""
    table = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    expected = [[1, 1 / 3, 0, 0], [1 / 3, 1, 1 / 2, 0], [0, 1 / 2, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(overlap(table), expected)
    drawn = np.random.default_rng(0).random((12, 5)) < 0.5
    drawn[:, 0] = True
    np.testing.assert_allclose(overlap(drawn), 1 - squareform(pdist(drawn, "jaccard")), atol=1e-12)


# --- Recovery ---------------------------------------------------------------------------------------------------------


def random_table(rng, tasks: int = 20, skills: int = 8) -> np.ndarray:
    """Three of the skills for each task."""
    return (rng.random((tasks, skills)).argsort(1) < 3).astype(float)


def test_a_planted_table_is_recovered_with_other_skills_and_heads():
    """Skills may be renamed, split and spread over heads: what is recovered is who shares with whom."""
    rng = np.random.default_rng(0)
    table = random_table(rng)
    renamed = table[:, rng.permutation(8)]
    exact = recovery(task_similarity({"a": renamed}), table, draws=200)
    assert exact["correlation"] == pytest.approx(1) and exact["p"] == pytest.approx(1 / 201)
    split = np.stack([renamed, renamed * 0.9], axis=1)  # (t, 2, 8): two heads
    assert recovery(task_similarity({"a": split}), table, draws=200)["correlation"] == pytest.approx(1)


def test_a_mixture_of_true_skills_is_recovered_in_part():
    """Four learned skills, each two of the eight true ones: above chance, below one, interval around it."""
    table = random_table(np.random.default_rng(0))
    merged = np.maximum(table[:, :4], table[:, 4:])
    partly = recovery(task_similarity({"a": merged}), table, draws=200)
    assert partly["chance_95"] < partly["low"] < partly["correlation"] < partly["high"] < 1
    assert partly["p"] == pytest.approx(1 / 201)


@pytest.fixture(scope="module")
def at_random() -> list[dict[str, float]]:
    """`recovery` for 40 pairs of unrelated tables."""
    rng = np.random.default_rng(1)
    similar = [task_similarity({"a": rng.random((20, 4))}) for _ in range(40)]
    return [recovery(similarity, random_table(rng), draws=40) for similarity in similar]


def test_a_random_table_is_not_recovered(at_random):
    """Chance is 0 and the test holds its level: about 5 % of the p-values are below 0.05, half are below 1/2."""
    assert abs(np.mean([one["chance"] for one in at_random])) < 0.01
    assert abs(np.mean([one["correlation"] for one in at_random])) < 0.05
    p = np.array([one["p"] for one in at_random])
    assert (p < 0.05).mean() <= 0.12
    assert 0.3 < (p < 0.5).mean() < 0.7


def test_the_bootstrap_leaves_pairs_of_a_task_with_itself_out(at_random):
    """Drawn twice, a task is like itself whatever was learned: counted, the intervals would lie above 0."""
    assert abs(np.mean([one["low"] + one["high"] for one in at_random]) / 2) < 0.03
    covered = np.mean([one["low"] <= 0 <= one["high"] for one in at_random])
    assert covered >= 0.85


def test_sets_of_two_or_three_skills_are_recovered_too():
    """As `strings` has them: cosine and Jaccard's index order the pairs alike, so that the true table itself has 1."""
    table = np.array([[o in task.name for o in OPERATIONS] for task in strings().train], float)
    assert recovery(task_similarity({"a": table}), table, draws=20)["correlation"] == pytest.approx(1)


def test_the_interval_covers_what_is_partly_recovered():
    """Of tasks drawn from many, with a noisy table that recovers about 0.6: most intervals hold the value of all."""
    rng = np.random.default_rng(2)
    table = random_table(rng, 600)
    noisy = np.clip(table + rng.normal(0, 0.45, table.shape), 0, None)
    whole = recovery(task_similarity({"a": noisy}), table, draws=2)["correlation"]
    assert 0.5 < whole < 0.8
    parts = [rng.choice(600, 64, replace=False) for _ in range(12)]
    intervals = [recovery(task_similarity({"a": noisy[k]}), table[k], draws=50) for k in parts]
    assert np.mean([one["low"] <= whole <= one["high"] for one in intervals]) >= 0.8


def test_recovery_is_seeded():
    """The same seed gives the same numbers, another one other draws of the same correlation."""
    rng = np.random.default_rng(0)
    similarity, table = task_similarity({"a": rng.random((10, 4))}), random_table(rng, 10)
    first, other = recovery(similarity, table, draws=50), recovery(similarity, table, draws=50, seed=1)
    assert first == recovery(similarity, table, draws=50) != other
    assert first["correlation"] == other["correlation"]


def test_recovery_of_what_is_the_same_for_all_pairs_is_undefined():
    """A constant similarity, also but for rounding or for the noise of a fresh Z, or a constant table: no number."""
    rng = np.random.default_rng(0)
    table = random_table(rng)
    fresh = 1 / (1 + np.exp(-rng.uniform(-1e-3, 1e-3, (20, 32))))  # poly.INIT
    for p in (np.full((20, 4), 0.3), np.full((20, 4), 0.3) + rng.normal(0, 1e-12, (20, 4)), fresh):
        assert recovery(task_similarity({"a": p}), table, 20) == {"undefined": "all pairs of tasks are equally similar"}
    learned = task_similarity({"a": rng.random((20, 4))})
    for same in (np.ones((20, 3)), np.eye(20)):
        why = {"undefined": "in the true table all pairs are equally similar"}
        assert recovery(learned, same, 20) == why


def test_the_bootstrap_leaves_draws_without_an_order_out():
    """Of three tasks most draws have one pair, or pairs that are all alike: no correlation of 0 among the others."""
    similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    found = recovery(similarity, np.array([[1, 1, 0], [1, 1, 0], [0, 1, 1]]), draws=200)
    assert found["low"] == found["high"] == found["correlation"] == pytest.approx(np.sqrt(3) / 2)


@pytest.mark.parametrize("tasks, rows", [(2, 2), (5, 4)])
def test_recovery_refuses_sizes_that_do_not_fit(tasks, rows):
    """Fewer than three tasks, or two numbers of tasks, are a ValueError."""
    with pytest.raises(ValueError, match="tasks"):
        recovery(np.eye(tasks), np.eye(rows))


def test_spearman_is_scipys():
    """With ties too."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, 30), rng.integers(0, 9, 30)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(spearman(x, np.ones(30))) and np.isnan(spearman(x[:0], y[:0]))


# --- Gradient alignment -----------------------------------------------------------------------------------------------


def task(name: str, *pairs: tuple[str, str]) -> Task:
    """A task with these (input, output) training examples."""
    examples = [Example(text, (output,)) for text, output in pairs]
    return Task(name, "exact", examples, [], [])


TASKS = [
    task("copy", ("ab", "ab"), ("cde", "cde"), ("f", "f")),
    task("reverse", ("ab", "ba"), ("cde", "edc"), ("f", "f")),
    task("upper", ("ab", "AB"), ("cde", "CDE")),
]


def tiny(method: str):
    """A model with adapters whose values matter, and its tokenizer."""
    torch.manual_seed(0)
    cfg = train.Config(method=method, backbone="scratch", rank=2, skills=3, heads=4, device="cpu")
    model, tokenizer = build_model(cfg, tasks=len(TASKS))
    helpers.randomise(model)
    return model, tokenizer


@pytest.mark.parametrize("method", ["lora", "poly", "mhr"])
def test_alignment_is_the_cosine_of_the_gradients_of_what_is_shared(method):
    """Against backward passes one by one, over all adapter parameters but Z, in float64."""
    model, tokenizer = tiny(method)
    mean, matrix = gradient_alignment(model.train(), tokenizer, TASKS, [0, 1, 2], 10, (16, 16))["shared"]
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()
    gradients = []
    for t, one in enumerate(TASKS):
        model.zero_grad()
        with task_ids([t] * len(one.train)):
            train.batch_loss(model, tokenizer, [Item(t, e, e.outputs[0]) for e in one.train], 16, 16).backward()
        own = {name: p for name, p in adapter_parameters(model).items() if not name.endswith("router.Z")}
        assert all(p.requires_grad for p in own.values())
        gradients.append(torch.cat([p.grad.double().flatten() for p in own.values()]))
    cosine = [[torch.cosine_similarity(a, b, dim=0).item() for b in gradients] for a in gradients]
    np.testing.assert_allclose(matrix, cosine, atol=1e-5)
    assert mean == pytest.approx((cosine[0][1] + cosine[0][2] + cosine[1][2]) / 3, abs=1e-5)
    assert len({round(abs(x), 3) for row in cosine for x in row}) > 2  # the case tells pairs apart


def test_the_same_examples_give_1_and_skills_apart_give_0():
    """Two tasks with the same examples: 1 under one adapter; 0 under Poly, if they share no skill."""
    same = [TASKS[0], TASKS[0]]
    model, tokenizer = tiny("lora")
    assert gradient_alignment(model, tokenizer, same, [0, 1], 10, (16, 16))["shared"][0] == pytest.approx(1, abs=1e-5)
    model, tokenizer = tiny("poly")
    for router in routers(model):
        router.Z.data = torch.eye(3) * 80 - 40
    assert gradient_alignment(model, tokenizer, same, [0, 1], 10, (16, 16))["shared"][0] == pytest.approx(0, abs=1e-5)
    for router in routers(model):
        router.Z.data[1] = router.Z.data[0]
    assert gradient_alignment(model, tokenizer, same, [0, 1], 10, (16, 16))["shared"][0] == pytest.approx(1, abs=1e-5)


def test_alignment_of_mixtures_does_not_see_who_uses_which_skill():
    """Two tasks with the same examples, each with its own skill, of equal values: the gradients of their mixtures are
    equal, those of the inventory orthogonal. And the model is left as it was."""
    model, tokenizer = tiny("poly")
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in layer.inventory.values():
                p.copy_(p[:1].expand_as(p).clone())
            layer.router.Z.copy_(torch.eye(3) * 80 - 40)
    cosine = gradient_alignment(model, tokenizer, [TASKS[0]] * 2, [0, 1], 10, (16, 16))
    assert cosine["mixed"][0] == pytest.approx(1, abs=1e-5) and cosine["shared"][0] == pytest.approx(0, abs=1e-5)
    for layer in adapted_layers(model).values():
        assert len(layer._forward_pre_hooks) == 1 and not {"adapters", "mix", "forward"} & vars(layer).keys()


@pytest.mark.parametrize("method", ["lora", "poly", "mhr", "random"])
def test_alignment_of_mixtures_is_that_of_the_merged_adapters(method):
    """Against gradients of each layer's A and B for one task, taken as leaves. lora: the same as of what is shared.
    random by example: every example has a mixture, whose gradients are summed for tasks of any number of examples."""
    model, tokenizer = tiny(method)
    alignment = gradient_alignment(model, tokenizer, TASKS, [0, 1, 2], 10, (16, 16))
    if method == "lora":
        np.testing.assert_array_equal(alignment["mixed"][1], alignment["shared"][1])
        return
    model.eval()
    gradients = []
    for t, one in enumerate(TASKS):
        leaves, hooks = [], []
        for layer in adapted_layers(model).values():
            params = {n: p.detach().requires_grad_() for n, p in layer.adapters(torch.tensor([t])).items()}
            leaves += params.values()
            give = lambda _, args, kwargs, params=params: (args, kwargs | {"params": params})  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(give, with_kwargs=True))
        with task_ids([t] * len(one.train)):
            train.batch_loss(model, tokenizer, [Item(t, e, e.outputs[0]) for e in one.train], 16, 16).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in leaves]).double())
        for hook in hooks:
            hook.remove()
    cosine = [[torch.cosine_similarity(a, b, dim=0).item() for b in gradients] for a in gradients]
    np.testing.assert_allclose(alignment["mixed"][1], cosine, atol=1e-5)


def test_alignment_by_hand(monkeypatch):
    """Opposite gradients give -1, orthogonal ones 0, whatever their length; a task that learns nothing 0."""
    vectors = torch.tensor([[1.0, 0], [-3, 0], [0, 2], [0, 0]])
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2))
    monkeypatch.setattr(train, "batch_loss", lambda m, tokenizer, items, *_: (vectors[items[0].task] * m.w).sum())
    mean, matrix = gradient_alignment(model, None, [TASKS[0]] * 4, [0, 1, 2, 3], 1, (16, 16))["shared"]
    np.testing.assert_allclose(matrix, [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], atol=1e-7)
    assert mean == pytest.approx(-1 / 6)


def test_alignment_takes_so_many_examples_the_same_at_every_call(monkeypatch):
    """--examples of them, spread over a list that may be sorted, and all where there are fewer."""
    seen = []

    def loss(model, tokenizer, items, *_):
        seen.append([int(item.example.input) for item in items])
        return model.w.sum()

    monkeypatch.setattr(train, "batch_loss", loss)
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2))
    tasks = [task(str(n), *((str(k), "x") for k in range(n))) for n in (100, 3)]
    for _ in range(2):
        gradient_alignment(model, None, tasks, [0, 1], 10, (16, 16))["shared"]
    assert seen[:2] == seen[2:] and len(set(seen[0])) == 10 and max(seen[0]) > 50 and sorted(seen[1]) == [0, 1, 2]


# --- Figures ----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
NAMES = [f"task-{k}" for k in range(8)]
TREE = hierarchy(task_similarity({"a": RNG.random((8, 4))}))
LINES = {name: [([1, 2, 3], RNG.random(3)) for _ in range(n)] for name, n in {"LoRA": 1, "MHR": 3}.items()}
LONG = {m: [(range(1, 41), 1 + RNG.random(40)) for _ in range(2)] for m in ("LoRA", "Poly", "MHR")}
LAYERS = [f"{c}.block.{k}.q" for c in ("encoder", "decoder") for k in (0, 1)]
DRAWINGS = {
    "allocation": lambda stem: figures.allocation(BLOCKS, "encoder.block.0.q", RNG.random((8, 40)), NAMES, TREE, stem),
    "allocation-heads": lambda stem: figures.allocation(
        RNG.random((8, 3, 4)), "model.layers.1.q", RNG.random((8, 40)), NAMES, TREE, stem
    ),
    "task_tree": lambda stem: figures.task_tree(TREE, NAMES, stem),
    "matrices": lambda stem: figures.matrices({"a": RNG.random((8, 8)), "b": overlap(BLOCKS)}, stem, "similarity"),
    "matrices-signed": lambda stem: figures.matrices({"": RNG.normal(size=(8, 8))}, stem, "cosine", signed=True),
    "by_layer": lambda stem: figures.by_layer({m: RNG.random(4) for m in MEASURES}, LAYERS, stem),
    "over_steps": lambda stem: figures.over_steps({"": LINES}, stem, "alignment", figures.COSINE),
    "over_steps-log": lambda stem: figures.over_steps({"a": LONG, "b": LONG}, stem, "loss", figures.LOSS),
    "over_sizes": lambda stem: figures.over_sizes(LINES, stem, "usage", figures.UNIT, "skills in the inventory"),
    "differences": lambda stem: figures.differences(
        {name: [(x, k - 1, k - 3, k + 2.5) for x in (8, 16, 64 / 3, 32)] for k, name in enumerate(LINES)},
        stem,
        "tasks for each skill",
        "difference (points)",
        {39: "the papers"},
    ),
    "performance": lambda stem: figures.performance(
        {"": {"LoRA": {"": (10, [3.0])}, "MHR": {"2": (99, [4, 6.0]), "4": (120, [5, 7.0])}}}, stem, "score"
    ),
    "by_method": lambda stem: figures.by_method(
        {"LoRA": [3.0], "MHR": [5, 6.0]}, stem, "score", figures.PERCENT, reference="LoRA"
    ),
    "by_episodes": lambda stem: figures.by_episodes(
        {level: {m: [np.linspace(0, 1, 50)] for m in ("skilled", "shared lr=0.1")} for level in ("GoTo", "all")},
        stem,
        100,
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_written_as_png_and_svg_and_not_empty(name, tmp_path):
    """Both files are there; the picture is white in the corner and has a share of other colours."""
    DRAWINGS[name](tmp_path / name)
    pixels = imread(tmp_path / f"{name}.png")[..., :3]
    assert (pixels[0, 0] == 1).all()
    assert 0.005 < (pixels < 0.9).any(-1).mean() < 0.9
    assert xml.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_legible(name, monkeypatch):
    """No text is cut off or lies on another or on an error bar, and every figure with bars says what they are."""
    check_legible(drawn(monkeypatch, lambda: DRAWINGS[name]("unused")))


def test_a_figure_has_the_same_bytes_again(tmp_path):
    """Made anew from the same numbers, a figure changes nothing in a repository."""
    for stem in ("a", "b"):
        figures.task_tree(TREE, NAMES, tmp_path / stem)
    for ending in ("png", "svg"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


@pytest.mark.parametrize(
    "counts, says",
    [([1, 1], "One seed: no bars."), ([5, 5], "Bars: ± one standard deviation over 5 seeds."),
     ([3, 5], "Bars: ± one standard deviation over 3 to 5 seeds."),
     ([1, 3], "Bars: ± one standard deviation over 1 to 3 seeds, none for one seed.")],
)  # fmt: skip
def test_figures_say_what_bars_are(counts, says, monkeypatch):
    """By the number of seeds; and the bars are so long: the standard deviation (n - 1)."""
    assert figures.deviation(counts) == says
    series = {f"m{k}": [([1, 2], RNG.random(2)) for _ in range(n)] for k, n in enumerate(counts)}
    figure = drawn(monkeypatch, lambda: figures.over_steps({"": series}, "", "y", figures.COSINE))
    assert [text.get_text() for text in figure.texts] == [says]
    found = [container[2][0].get_segments() for container in figure.axes[0].containers if container[2]]
    several = [np.array([values for _, values in seeds]) for seeds in series.values() if len(seeds) > 1]
    assert len(found) == len(several)
    for segments, values in zip(found, several, strict=True):
        ends = np.array([segment[:, 1] for segment in segments])
        np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * values.std(0, ddof=1))
        np.testing.assert_allclose(ends.mean(1), values.mean(0))


@pytest.mark.parametrize("least", [figures.PERCENT, figures.UNIT, figures.COSINE, figures.SIMILARITY])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_range_holds_all_values_and_spans_enough(least, data):
    """Never less than its span, every value inside, and no further out than its bounds if the values are within."""
    low, high = sorted(data.draw(st.tuples(*[st.floats(least.low, least.high)] * 2)))
    start, end = least.around(low, high)
    assert end - start >= least.span - 1e-9 and start <= low + 1e-9 and end >= high - 1e-9
    assert start >= least.low - 1e-9 and end <= least.high + 1e-9
    beyond = least.around(least.low - 9, least.high + 9)
    assert beyond == (least.low - 9, least.high + 9)


def test_values_that_hardly_differ_look_alike(monkeypatch):
    """Scores, measures, cosines, similarities and losses: an axis, or the colours, span what is meaningful."""
    near = lambda of: [([1, 2, 3], [of, of + 1e-4, of])]  # noqa: E731

    def over(of, least):
        figure = drawn(monkeypatch, lambda: figures.over_steps({"": {"a": near(of)}}, "", "y", least))
        return figure.axes[0].get_ylim()

    assert np.ptp(over(0.5, figures.UNIT)) >= 1 and np.ptp(over(0.02, figures.COSINE)) >= 0.2
    low, high = over(2, figures.LOSS)
    assert high / low >= 4
    points = {"a": {"": (99, [50, 50.05])}, "b": {"": (99, [50.01, 50.04])}}
    figure = drawn(monkeypatch, lambda: figures.performance({"": points}, "", "score"))
    low, high = figure.axes[0].get_ylim()
    assert high - low >= 20 and low < 50 < high
    matrix = 0.98 + RNG.random((8, 8)) / 100
    figure = drawn(monkeypatch, lambda: figures.matrices({"a": matrix}, "", "similarity"))
    low, high = figure.axes[0].images[0].get_clim()
    assert high - low == pytest.approx(0.2) and high == 1
    figure = drawn(monkeypatch, lambda: figures.matrices({"a": matrix - 0.98}, "", "cosine", signed=True))
    assert figure.axes[0].images[0].get_clim() == (-0.2, 0.2)
    similar = hierarchy(task_similarity({"a": 1 + RNG.random((8, 4)) / 100}))
    figure = drawn(monkeypatch, lambda: figures.task_tree(similar, NAMES, ""))
    assert np.ptp(figure.axes[0].get_xlim()) >= 0.2


@pytest.mark.parametrize("counts", [[64_512], [64_512, 64_600], [216, 1_728], [32, 259_776], [9, 3 * 10**9]])
def test_the_logarithmic_axis_has_numbers(monkeypatch, counts):
    """Two or more, whatever the parameters, and none over another; also where losses hardly differ."""
    points = {f"m{k}": {"": (count, [50.0])} for k, count in enumerate(counts)}
    for panels in ({"": points}, {"a": points, "b": points}):
        figure = drawn(monkeypatch, lambda panels=panels: figures.performance(panels, "", "score"))
        check_legible(figure)
        for ax in figure.axes:
            assert len(numbers_of(ax.xaxis)) >= 2
    losses = {"": {"a": [([1, 2, 3], [1 + n / 1e12 for n in (*counts, 1, 1, 1)][:3])]}}
    figure = drawn(monkeypatch, lambda: figures.over_steps(losses, "", "loss", figures.LOSS))
    assert len(numbers_of(figure.axes[0].yaxis)) >= 2


@pytest.mark.parametrize("first", [2.0, 2.5, 3.1, 4.2, 5.5, 7.3, 9.4])
@pytest.mark.parametrize("falls", [0.05, 0.4, 0.8, 1.5, 2.5, 4.0])
def test_the_axis_of_a_loss_has_enough_numbers(monkeypatch, first, falls):
    """Three or more, mostly four, wherever the losses are; none over another."""
    losses = {"": {"a": [([1, 2, 3], [first, first / 10 ** (falls / 2), first / 10**falls])]}}
    figure = drawn(monkeypatch, lambda: figures.over_steps(losses, "", "loss", figures.LOSS))
    check_legible(figure)
    assert len(numbers_of(figure.axes[0].yaxis)) >= (4 if falls < 0.9 else 3)


def test_numbers_in_short():
    assert [figures.in_short(x) for x in (0.5, 32, 200, 3000, 2e6, 1e9)] == ["0.5", "32", "200", "3k", "2M", "1B"]


@pytest.mark.parametrize("steps", [[20, 40, 60], list(range(10, 1510, 10))])
def test_error_bars_do_not_cover_each_other(monkeypatch, steps):
    """Those of three methods at the same steps stand apart: beside each other, or at other steps if there are many."""
    series = {m: [(steps, RNG.random(len(steps))) for _ in range(3)] for m in ("LoRA", "Poly", "MHR")}
    figure = drawn(monkeypatch, lambda: figures.over_steps({"": series}, "", "cosine", figures.COSINE))
    places = sorted(bar[0, 0] for bar in bars_of(figure.axes[0]))
    assert len(places) <= 3 * 10 and min(np.diff(places)) > 2
    shown = {container.get_label() for container in figure.axes[0].containers}
    assert shown == set(series) and not figure.axes[0].patches


def test_a_matrix_without_differences_says_so(monkeypatch):
    """Its panel has its one value in words and no colours; the other panel is drawn."""
    panels = {"learned": np.eye(8), "true": overlap(BLOCKS)}
    figure = drawn(monkeypatch, lambda: figures.matrices(panels, "", "similarity"))
    check_legible(figure)
    learned, true = figure.axes[:2]
    assert not learned.images and true.images
    assert [text.get_text() for text in learned.texts] == ["not drawn:\n0.000\nfor all pairs of tasks"]
    tree = hierarchy(np.eye(8))
    figure = drawn(monkeypatch, lambda: figures.task_tree(tree, NAMES, ""))
    assert "order means nothing" in figure.texts[0].get_text()


def test_an_undefined_measure_is_not_drawn(monkeypatch):
    """No line, and no name in the legend."""
    measures = {"discreteness": [0.5] * 4, "usage": [None] * 4}
    figure = drawn(monkeypatch, lambda: figures.by_layer(measures, LAYERS, ""))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["discreteness"]


def test_labels_of_points_cover_neither_each_other_nor_points(monkeypatch):
    """Ten methods, some at one place but for a hair."""
    places = {"LoRA": (64512, 30.5), "LoRA-big": (258048, 35), "Poly": (258264, 72.5), "Poly-z": (216, 62.4),
              "Poly-mu": (64512, 61), "MHR": (259776, 69.6), "MHR-z": (1728, 65.2), "MHR-mu": (64512, 59.9),
              "(IA)^3": (14000, 20), "AdapterSoup": (64512, 25)}  # fmt: skip
    points = {label: {"": (count, [score - 1, score + 1])} for label, (count, score) in places.items()}
    figure = drawn(monkeypatch, lambda: figures.performance({"": points}, "", "score"))
    check_legible(figure)
    ax = figure.axes[0]
    boxes = dict(zip([text.get_text() for text in ax.texts], boxes_of(ax.texts), strict=True))
    assert boxes.keys() == places.keys()
    for label, box in boxes.items():
        assert not any(box.contains(*ax.transData.transform(place)) for place in places.values()), label


def test_marks_of_curves_stand_at_their_own_points(monkeypatch):
    """Of two curves that meet, no mark lies on a bar, a line or another mark, and each is nearest to its own point."""
    heads = {"1": (216, [68, 75.6]), "2": (432, [74.8, 75.2]), "8": (1728, [71, 79]), "32": (6912, [71, 77])}
    skills = {"4": (216, [68, 75.6]), "8": (432, [71, 76]), "16": (864, [72.6, 75.8]), "32": (1728, [72.5, 78.7])}
    whole = {"linear": (1728, [71, 79]), "layer": (900, [70, 76]), "model": (32, [52, 64.8])}
    panels = {"a": {"heads": heads, "skills": skills}, "b": {"sharing": whole, "MHR": {"": (259776, [70, 83])}}}
    figure = drawn(monkeypatch, lambda: figures.performance(panels, "", "score"))
    check_legible(figure)
    assert [text.get_text() for text in figure.axes[1].texts] == ["linear", "layer", "model", "MHR"]
    ax = figure.axes[0]
    curves = [container[0].get_transform().transform(container[0].get_xydata()) for container in ax.containers]
    owners = [(k, point) for k, curve in enumerate(curves) for point in curve]
    colours = [container[0].get_color() for container in ax.containers]
    for (k, (x, _)), text, box in zip(owners, ax.texts, boxes_of(ax.texts), strict=True):
        assert text.get_color() == colours[k] and abs((box.x0 + box.x1) / 2 - x) < 30
        assert not any(Outline(curve).intersects_bbox(box, filled=False) for curve in curves), text.get_text()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["heads", "skills", "sharing"]


@pytest.mark.parametrize("names", [["MHR", "Poly"], [f"alignment of method {k}" for k in range(6)]])
def test_the_legend_and_the_axis_of_lines_are_not_cut(monkeypatch, names):
    """With as many and as long labels as any figure of the repository, of several seeds."""
    series = {name: [([2, 4, 8], RNG.random(3)) for _ in range(5)] for name in names}
    label = "cosine of tasks' gradients"
    for draw in (
        lambda: figures.over_steps({"": series}, "", label, figures.COSINE),
        lambda: figures.over_sizes(series, "", label, figures.UNIT, "heads"),
    ):
        figure = drawn(monkeypatch, draw)
        check_legible(figure)
        assert {*names, label} <= {text.get_text() for text in texts_of(figure)}


def test_the_first_and_the_last_method_are_whole(monkeypatch):
    """Their lines are half a row inside the axes."""
    values = {"Poly": [1.0, 2], "MHR": [3, 4.0]}
    figure = drawn(monkeypatch, lambda: figures.by_method(values, "", "score", figures.PERCENT))
    assert figure.axes[0].get_ylim() == (1.5, -0.5)


@pytest.mark.parametrize("count", [5, 120])
def test_names_of_tasks_do_not_overlap(monkeypatch, count):
    """The tree of up to 120 tasks has readable labels: all of them, none covers another, none is cut off."""
    tree = hierarchy(task_similarity({"a": np.random.default_rng(0).random((count, 4))}))
    names = [f"superglue-of-middling-length-{k}" for k in range(count)]
    figure = drawn(monkeypatch, lambda: figures.task_tree(tree, names, ""))
    check_legible(figure)
    assert sorted(label.get_text() for label in figure.axes[0].get_yticklabels()) == sorted(names)


@pytest.mark.parametrize("shape", [(2,), (4,), (8,), (32,), (64,), (3, 4), (16, 4), (64, 8)])
@pytest.mark.parametrize("count, name", [(3, "wiki_hop_original_choose_best_object_interrogative_"), (9, "task-")])
def test_numbers_of_skills_and_heads_do_not_overlap(monkeypatch, shape, count, name):
    """In the heat map of one router, whose first one is always said; no title and no label is cut off, also not for few
    tasks or long names."""
    one, names = RNG.random((count, *shape)), [f"{name}{k}" for k in range(count)]
    tree, layer = hierarchy(task_similarity({"a": one})), "encoder.block.11.layer.0.SelfAttention.q"
    every = one.reshape(count, -1)
    figure = drawn(monkeypatch, lambda: figures.allocation(one, layer, every, names, tree, ""))
    check_legible(figure)
    labels = figure.axes[0].get_xticklabels()
    boxes = boxes_of(labels)
    assert labels[0].get_text() == "1" and len(labels) == min(shape[0], len(labels)) >= min(shape[0], 6)
    assert all(left.x1 + 2 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_long_names_keep_both_ends():
    """32 letters at most, an ellipsis between, so that names that differ at an end stay apart."""
    name = "wiki_hop_original_choose_best_object_interrogative_2"
    short = figures.shortened(name)
    assert len(short) == 32 and name.startswith(short.split("…")[0]) and name.endswith(short.split("…")[1])
    assert figures.shortened(name[:32]) == name[:32]


# --- The command ------------------------------------------------------------------------------------------------------

SOME = "drop+rotate,double+reverse,sort+reverse+upper,reverse+rotate"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of four steps: two seeds of mhr, poly, lora; and poly adapted to four tasks (z, mu)."""
    root = tmp_path_factory.mktemp("runs")
    small = dict(dataset="strings", steps=4, log_every=1, batch_size=8, eval_examples=0, rank=1)
    small |= dict(backbone=small_backbone(root / "backbone", layers=2), layers=r".*SelfAttention\.q")  # 4 layers
    for name, flags in {
        "poly": dict(method="poly", skills=2), "mhr": dict(method="mhr", heads=4, keep_every=2),
        "mhr1": dict(method="mhr", heads=4, keep_every=2, seed=1), "lora": dict(method="lora"),
        "random": dict(method="random", random_by="task", keep_every=2),
    }.items():  # fmt: skip
        train.main(small | flags | dict(output_dir=str(root / name)))
    tasks = "sort+reverse+swap,rotate+shift+upper,sort+double,double+upper"
    few = dict(steps=1, shots=4, test_examples=1, tasks=tasks)
    for variant in ("z", "mu"):
        adapt.main(dict(checkpoint=str(root / "poly"), variant=variant, output_dir=str(root / variant)) | few)
    return root


def look(folder, **flags) -> dict:
    """`analyze.main` on a run folder, with four of its tasks and few examples: what it wrote."""
    flags = dict(tasks=SOME, examples=4, output_dir=str(folder / "analysis")) | flags
    analyze.main(dict(checkpoint=str(folder)) | flags)
    return json.loads((Path(flags["output_dir"]) / "analysis.json").read_text())


def pictures(folder) -> set[str]:
    """The names of the figures in a folder, each of which is there as PNG and SVG."""
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {path.stem for path in folder.glob("*.svg")}
    return names


@pytest.fixture(scope="module")
def of_mhr(runs) -> dict:
    """The analysis of the run mhr, in its folder."""
    return look(runs / "mhr")


def test_a_routed_run(runs, of_mhr):
    """mhr: measures of every router and their mean, recovery, alignment now and over the kept steps, all figures."""
    assert len(of_mhr["layers"]) == 4 and of_mhr["tasks"] == SOME.split(",")
    for m in MEASURES:
        assert of_mhr["mean"][m] == pytest.approx(np.mean([values[m] for values in of_mhr["layers"].values()]))
    assert [line["step"] for line in of_mhr["over_steps"]] == [2, 4]
    assert of_mhr["over_steps"][1]["alignment"] == of_mhr["alignment"]["mean"]  # step 4 is the last one
    matrix = np.array(of_mhr["alignment"]["matrix"])
    assert matrix[np.triu_indices(4, 1)].mean() == pytest.approx(of_mhr["alignment"]["mean"], abs=1e-4)
    assert set(of_mhr["recovery"]) == {"correlation", "low", "high", "chance", "chance_95", "p"}
    assert pictures(runs / "mhr" / "analysis") == {
        "allocation", "tasks", "layers", "similarity", "alignment", "alignment-over-steps", "measures-over-steps",
    }  # fmt: skip


def test_the_rows_of_the_chosen_tasks_are_measured(runs, of_mhr):
    """--tasks takes the named tasks' own rows of Z from the file."""
    saved = load_file(runs / "mhr" / "adapter.safetensors")
    names, rows = json.loads((runs / "mhr" / "tasks.json").read_text())["tasks"], SOME.split(",")
    chosen = [names.index(name) for name in rows]
    for layer, values in of_mhr["layers"].items():
        p = torch.sigmoid(saved[f"{layer}.router.Z"][chosen].double()).numpy()
        assert values == {m: pytest.approx(f(p)) for m, f in MEASURES.items()}


def test_the_report_has_the_numbers(of_mhr):
    """Means, recovery and alignment to three places; a line a router only if asked for."""
    text, with_routers = analyze.report(of_mhr, 4), analyze.report(of_mhr, 4, routers=True)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert {m: lines[m][1] for m in MEASURES} == {m: f"{of_mhr['mean'][m]:.3f}" for m in MEASURES}
    assert lines["recovery"][1] == f"{of_mhr['recovery']['correlation']:.3f}"
    assert lines["alignment"][1] == f"{of_mhr['alignment']['mean']:.3f}"
    assert f"  of mixtures  {of_mhr['alignment']['mixed']:.3f}" in text
    assert f"by chance 95 % are below {of_mhr['recovery']['chance_95']:.3f}" in text
    steps = [line.split() for line in text.splitlines() if line.split()[:1] in (["2"], ["4"])]
    assert steps == [
        [str(line["step"]), *(f"{line[k]:.3f}" for k in (*MEASURES, "alignment", "alignment_mixed"))]
        for line in of_mhr["over_steps"]
    ]
    assert not any(name in text for name in of_mhr["layers"]) and with_routers.startswith(text)
    lines = {line.split()[0]: line.split()[1:] for line in with_routers.splitlines() if line}
    assert {name: lines[name] for name in of_mhr["layers"]} == {
        name: [f"{values[m]:.3f}" for m in MEASURES] for name, values in of_mhr["layers"].items()
    }


def test_the_command_prints_routers_if_asked(runs, capsys, monkeypatch, tmp_path):
    """--routers; and the measures come before anything by layer."""
    monkeypatch.setattr(figures, "save", lambda *_: None)  # to save time
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    for asked in (False, True):
        look(runs / "poly", alignment=False, routers=asked, output_dir=str(tmp_path))
        text = capsys.readouterr().out
        assert (layer in text) == asked and text.startswith(
            "method poly, 4 tasks; of Z: means over 4 routers\n\nmeasure"
        )


def of_many_routers(granularity="linear", steps=5) -> dict:
    """The analysis of the bundled model in results/, with kept steps and an alignment."""
    result = json.loads((Path(__file__).parents[1] / "results" / "routing-poly.json").read_text())
    result["over_steps"] = [result["over_steps"][0] | {"step": 100_000 - k} for k in range(steps)][::-1]
    return result | {"granularity": granularity, "alignment": {"mean": -0.0039, "mixed": 0.5}}


def test_the_report_of_the_bundled_model_fits_a_terminal():
    """40 lines of 80 columns, however many steps were kept; the means of kinds are those of their routers."""
    result = of_many_routers(steps=300)
    text = analyze.report(result, 64)
    lines = text.splitlines()
    assert len(lines) + 2 <= 40 and max(map(len, lines)) <= 80
    assert "8 of 300 kept steps" in text
    steps = [line.split()[0] for line in lines[-8:]]
    assert (steps[0], steps[-1]) == ("99701", "100000") and len(set(steps)) == 8
    assert max(map(len, analyze.report(result, 64, routers=True).splitlines())) <= 80
    rows = {" ".join(line.split()[:-4]): line.split()[-4:] for line in lines if "Attention" in line or "Dense" in line}
    assert rows.keys() == {f"{coder} {kind}" for coder, kind in (
        ("encoder", "SelfAttention"), ("encoder", "DenseReluDense"), ("decoder", "SelfAttention"),
        ("decoder", "EncDecAttention"), ("decoder", "DenseReluDense"),
    )}  # fmt: skip
    own = [v for name, v in result["layers"].items() if name.startswith("decoder") and "EncDec" in name]
    means = [f"{np.mean([v[m] for v in own]):.3f}" for m in MEASURES]
    assert rows["decoder EncDecAttention"] == [str(len(own)), *means]


@pytest.mark.parametrize("granularity", ["block", "blocks-2", "coder", "model"])
def test_routers_of_more_than_a_sub_layer_have_no_kind(granularity):
    """Their name is that of their first layer only."""
    assert "by kind" in analyze.report(of_many_routers("layer"), 64)
    assert "by kind" not in analyze.report(of_many_routers(granularity), 64)


@pytest.mark.parametrize("p, table, why", [
    (np.full((4, 2), 0.4), BLOCKS[2:6], "all pairs of tasks are equally similar"),
    (BLOCKS[2:6], np.eye(4), "in the true table all pairs are equally similar"),
])  # fmt: skip
def test_what_is_undefined_says_why(p, table, why):
    """No number, no p, in 80 columns; usage of one skill too."""
    result = {"method": "poly", "granularity": "model", "recovery": recovery(task_similarity({"a": p}), table)}
    text = analyze.report(result | measure({"a": p[:, :1]}), 4)
    assert re.search(rf"^recovery +undefined +\({why}\)$", text, re.M)
    assert re.search(r"^usage +undefined +\(there is one skill\)$", text, re.M)
    assert "chance 95" not in text and "interval" not in text and max(map(len, text.splitlines())) <= 80


def test_tasks_without_a_true_table_have_no_recovery(runs, monkeypatch, tmp_path):
    """The analysis says so, on the page and in its file; nothing is drawn of it."""
    monkeypatch.setattr(analyze, "true_table", lambda tasks: None)
    result = look(runs / "poly", alignment=False, output_dir=str(tmp_path))
    assert result["recovery"] == {"undefined": "these tasks have no true table"}
    assert "undefined  (these tasks have no true table)" in analyze.report(result, 4)


def test_a_fixed_table_is_not_said_to_be_learned():
    """Of a random or given table the report says that it is fixed."""
    result = of_many_routers() | {"method": "random"}
    assert analyze.report(result, 64).splitlines()[0].endswith("Z is fixed, not learned")
    assert "fixed" not in analyze.report(of_many_routers(), 64)


def test_a_fixed_table_has_no_measures_over_steps(runs, tmp_path):
    """It is the same at all of them: no table, no figure."""
    result = look(runs / "random", alignment=False, output_dir=str(tmp_path))
    assert result["mean"]["discreteness"] == 1 and "over_steps" not in result
    assert pictures(tmp_path) == {"allocation", "tasks", "layers", "similarity"}


def test_how_to_read_the_measures_is_true():
    """A fresh Z has a discreteness of 0 and uses skills alike; by chance half of the probabilities are above 1/2."""
    fresh = torch.sigmoid(PolyRouter(500, 8).Z.detach().double()).numpy()
    assert discreteness(fresh) == pytest.approx(0, abs=1e-5) and usage(fresh) == pytest.approx(1, abs=1e-5)
    assert sparsity(fresh) == pytest.approx(0.5, abs=0.05)
    at_random = np.random.default_rng(0).random((500, 8))
    assert sparsity(at_random) == pytest.approx(0.5, abs=0.05) and usage(at_random) > 0.99
    gradients = torch.randn(20, 10_000, generator=torch.Generator().manual_seed(0))
    assert analyze.cosines(gradients)[0] == pytest.approx(0, abs=0.01)


def test_an_earlier_step(runs, of_mhr, tmp_path, monkeypatch):
    """--step 2 is what the run was after step 2."""
    monkeypatch.setattr(figures, "save", lambda *_: None)  # to save time
    result, over = look(runs / "mhr", step=2, output_dir=str(tmp_path)), of_mhr["over_steps"][0]
    assert "over_steps" not in result and result["step"] == 2
    assert result["alignment"]["mean"] == over["alignment"] and result["mean"]["usage"] == over["usage"]
    assert result["mean"]["usage"] != of_mhr["mean"]["usage"]


def test_without_gradients_the_measures_over_steps_are_there(runs, of_mhr, tmp_path):
    """--no-alignment: Z over the kept steps, no cosine; --compare then draws no alignment for this run."""
    result = look(runs / "mhr", alignment=False, output_dir=str(tmp_path / "mhr" / "analysis"))
    assert [line.keys() - {"step"} for line in result["over_steps"]] == [set(MEASURES)] * 2
    assert [line["usage"] for line in result["over_steps"]] == [line["usage"] for line in of_mhr["over_steps"]]
    assert pictures(tmp_path / "mhr" / "analysis") == {
        "allocation",
        "tasks",
        "layers",
        "similarity",
        "measures-over-steps",
    }
    assert analyze.columns_of(tmp_path / "mhr" / "analysis" / "analysis.json", "alignment") == ([], [])


def test_one_adapter_has_alignment_alone(runs, capsys):
    """lora: no Z to measure, which it says; the alignment and its figure are there."""
    result = look(runs / "lora")
    assert "layers" not in result and -1 <= result["alignment"]["mean"] <= 1
    assert "no probabilities of skills" in capsys.readouterr().out
    assert pictures(runs / "lora" / "analysis") == {"alignment"}


def test_a_run_of_adapt(runs, monkeypatch):
    """Variant z: each new task's row from its own file, no alignment."""
    monkeypatch.setattr(figures, "save", lambda *_: None)  # to save time
    result = look(runs / "z", tasks="all")
    assert len(result["tasks"]) == 4 and len(result["layers"]) == 4 and "alignment" not in result
    rows = [load_file(runs / "z" / "0" / f"{name}.safetensors") for name in result["tasks"]]
    p = {layer: np.concatenate([torch.sigmoid(row[f"{layer}.router.Z"].double()) for row in rows])
         for layer in result["layers"]}  # fmt: skip
    np.testing.assert_allclose(result["similarity"], task_similarity(p), atol=1e-4)
    assert np.ptp(np.concatenate(list(p.values()), 1), axis=0).max() > 0.01


def test_random_by_example_has_nothing_to_look_at(tmp_path, monkeypatch):
    """Neither after pre-training nor after an adaptation, in which a new task uses all skills."""
    write_config(tmp_path, adapt.Config(checkpoint="x"))
    monkeypatch.setattr(analyze, "load_adapted", None)
    monkeypatch.setattr(adapt, "base_config", lambda _: train.Config(method="random", random_by="example"))
    with pytest.raises(UserError, match="without probabilities of skills"):
        analyze.main(dict(checkpoint=str(tmp_path)))


def test_comparison(runs, of_mhr, tmp_path, capsys):
    """Runs of train.py as curves, one a method; alignment where it was measured; adaptations as points."""
    names = ("mhr", "mhr1", "lora", "poly", "z")
    labels = analyze.labels_of([runs / name for name in names])
    assert list(labels.values()) == ["mhr", "mhr", "lora", "poly", "poly-z"]
    analyze.main(dict(compare=tuple(str(runs / name) for name in names), output_dir=str(tmp_path)))
    assert pictures(tmp_path) == {"training", "alignment-over-steps", "performance"}
    assert "poly" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, flags, says",
    [
        ("nothing", {}, "config.json cannot be read"),
        ("mhr", dict(step=3), r"adapter-3.safetensors does not exist.*\(2, 4\)"),
        ("mhr", dict(tasks="drop+rotate,nonsense,sort+shift"), "--tasks nonsense is no task"),
        ("mhr", dict(tasks="drop+rotate,reverse+rotate"), "2 tasks are too few"),
        ("mhr", dict(examples=0), "--examples must be above 0"),
        ("mhr", dict(step=-1), "--step not negative"),
        ("mu", dict(tasks="all"), "variant mu has no routing"),
        ("z", dict(tasks="all", step=2), "--step 2 is for runs of train.py"),
    ],
)
def test_mistakes_are_one_sentence(runs, name, flags, says):
    """What the user can mend is a UserError that says what to do."""
    with pytest.raises(UserError, match=says) as error:
        look(runs / name, **flags)
    assert "\n" not in str(error.value)


def test_mistakes_in_comparisons(runs, tmp_path):
    """Nothing asked for, nothing finished and several data sets are refused."""
    with pytest.raises(UserError, match="--checkpoint RUN"):
        analyze.main({})
    with pytest.raises(UserError, match="none of these has finished"):
        analyze.main(dict(compare=(str(tmp_path),), output_dir=str(tmp_path)))
    shutil.copytree(runs / "lora", tmp_path / "t0")
    change_json(tmp_path / "t0" / "config.json", dataset="t0")
    with pytest.raises(UserError, match="^--compare: give runs of one data set, these are of strings, t0$"):
        analyze.main(dict(compare=(str(runs / "lora"), str(tmp_path / "t0")), output_dir=str(tmp_path)))


def changed(runs, tmp_path, name: str, file: str, text: str) -> tuple[str, ...]:
    """Two run folders to compare: a whole one, and a copy of another in which one file has this text."""
    copy = tmp_path / name
    shutil.copytree(runs / name, copy)
    (copy / file).parent.mkdir(exist_ok=True)
    (copy / file).write_text(text)
    return str(runs / "lora"), str(copy)


STEP_1 = '{"step": 1, "loss": 2.0}\n'
BAD_FILES = [
    ("poly", "log.jsonl", '{"step": 1, "loss": "low"}'), ("poly", "log.jsonl", STEP_1 + '{"step": 2, "loss": NaN}'),
    ("poly", "log.jsonl", '{"step": "one", "loss": 2.0}'), ("poly", "log.jsonl", '{"step": 1, "loss": 1e400}'),
    ("poly", "log.jsonl", '{"step": 1}'), ("poly", "log.jsonl", "[]"), ("poly", "log.jsonl", ""),
    ("poly", "log.jsonl", "[" * 10**5), ("poly", "log.jsonl", STEP_1 + "{"),
    ("poly", "analysis/analysis.json", '{"alignment": {}, "over_steps": [{"step": 1}]}'),
    ("poly", "analysis/analysis.json", '{"alignment": {}, "over_steps": 5}'),
    ("poly", "analysis/analysis.json", '{"alignment": {}, "over_steps": [{"step": 1, "alignment": null}]}'),
    ("poly", "analysis/analysis.json", '{"alignment": {}, "over_steps": {"step": 1}}'),
    ("poly", "analysis/analysis.json", "5"),
    ("z", "result.json", '{"seconds": 1.0, "parameters": {"adapters": 9}, "splits": %s}'),
    ("z", "result.json", '{"seconds": 1.0, "parameters": {"adapters": 9}, "splits": %s, "mean": "best"}'),
]  # fmt: skip


@pytest.mark.parametrize("name, file, text", BAD_FILES, ids=[f"{file} {text:.30}" for _, file, text in BAD_FILES])
def test_comparison_of_changed_files(runs, tmp_path, name, file, text):
    """Words, NaN or nothing in place of a run's numbers: one sentence that names the file, and no figure."""
    text = text.replace("%s", '{"0": {"before": {"a": 1.0}, "tasks": {"a": 2.0}}}')
    folders, out = changed(runs, tmp_path, name, file, text), tmp_path / "out"
    with pytest.raises(UserError, match=f"^{tmp_path / name / file}") as refused:
        analyze.main(dict(compare=folders, output_dir=str(out)))
    assert "\n" not in str(refused.value) and not out.exists()


def test_comparison_of_a_run_without_its_log(runs, tmp_path):
    _, copy = changed(runs, tmp_path, "poly", "note", "")
    (Path(copy) / "log.jsonl").unlink()
    with pytest.raises(UserError, match="log.jsonl cannot be read"):
        analyze.main(dict(compare=(copy,), output_dir=str(tmp_path / "out")))


def test_seeds_without_a_step_in_common_are_not_an_empty_line(runs, tmp_path):
    """Alignment that was measured at other steps (--keep-every) has no mean over seeds."""
    text = '{"alignment": {}, "over_steps": [{"step": %d, "alignment": 0.5}]}'
    one, other = (
        changed(runs, tmp_path, name, "analysis/analysis.json", text % k) for name, k in (("mhr", 2), ("mhr1", 3))
    )
    with pytest.raises(UserError, match="^--compare: the runs of mhr have no step in common"):
        analyze.main(dict(compare=(one[1], other[1]), output_dir=str(tmp_path / "out")))


def test_one_job_at_a_time(runs, tmp_path, capsys):
    """Looking at a run and comparing are two jobs, and flags of the other one are named."""
    with pytest.raises(UserError, match="^--compare and --checkpoint are two jobs"):
        analyze.main(dict(compare=("a",), checkpoint="b"))
    with pytest.raises(UserError, match="does not exist"):
        analyze.main(dict(compare=(str(tmp_path / "typo"),), step=3, output_dir=str(tmp_path)))
    assert capsys.readouterr().out == "ignored with --compare: --step\n"


def test_method_full_is_refused(tmp_path):
    """It has no adapters."""
    write_config(tmp_path, train.make_config(method="full", dataset="strings", output_dir=str(tmp_path)))
    with pytest.raises(UserError, match="method full"):
        analyze.main(dict(checkpoint=str(tmp_path)))


def test_tasks_without_examples_are_left_out():
    """A task that training never saw has a row of Z that means nothing."""
    tasks = [*TASKS, task("empty"), task("last", ("a", "a"))]
    assert choose(tasks, "all") == [0, 1, 2, 4]
    assert choose(tasks, "last,copy,upper") == [4, 0, 2]


def test_an_allocation_of_one_column_can_be_drawn(tmp_path):
    """One skill and one router for the whole model: there is nothing to order."""
    assert figures.by_likeness(np.ones((4, 1))).tolist() == [0]
    tree = hierarchy(np.eye(4))
    figures.allocation(np.ones((4, 1)), "model", np.ones((4, 1)), list("abcd"), tree, tmp_path / "z")
    assert (tmp_path / "z.png").stat().st_size > 0


def test_a_look_at_a_part_does_not_replace_the_whole(tmp_path, monkeypatch):
    """--step and --tasks write into folders of their own: --compare reads analysis/."""
    wrote = []
    monkeypatch.setattr(analyze, "script_of", lambda folder: "train.py")
    monkeypatch.setattr(analyze, "_pretrained", lambda cfg, folder: ({}, [], {}))
    monkeypatch.setattr(analyze, "report", lambda *_: "")
    monkeypatch.setattr(analyze, "write_json", lambda path, content: wrote.append(path.parent.name))
    for flags in ({}, {"step": 300}, {"tasks": "a,b,c"}, {"step": 300, "tasks": "a,b,c"}):
        analyze.analyze(analyze.Config(checkpoint=str(tmp_path), **flags))
    assert wrote[0] == "analysis" and len(set(wrote)) == 4


def test_an_analysis_without_memory_is_one_sentence(tmp_path, monkeypatch):
    """It says what takes less; there is nothing to --resume, and no folder is left."""

    def full(cfg, folder):
        raise MemoryError()

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(analyze, "_pretrained", full)
    with pytest.raises(RunError, match="^there is not enough memory: try --no-alignment, or fewer --tasks$"):
        analyze.main({"checkpoint": str(tmp_path)})
    assert not (tmp_path / "analysis").exists()
