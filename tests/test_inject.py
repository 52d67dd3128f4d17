"""inject.py in real Hugging Face models: tiny random T5, BART, Llama and GPT-2, every method with every adapter."""

import copy
import enum
import json
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close
from transformers import (
    BartConfig, BartForConditionalGeneration, T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

import adapt
import inject as inject_module
import train
from baselines.fixed import FixedRouter
from ia3 import IA3, IA3Linear
from inject import (
    adapted_layers, adapter_parameters, add_tasks, fingerprint, freeze, inject, load_adapters, merge, merged,
    read_tensors, routers, save_adapters, task_ids, unmerge, write_tensors,
)  # fmt: skip
from layers import GRANULARITIES, LORA_LAYERS, named_layers, pattern_of
from lora import LoRA, LoRALinear
from methods import add_adapters, average_skills
from mhr import MHRRouter
from poly import PolyLinear, PolyRouter
from tests.helpers import (
    CLASSES, GIVEN, HEADS, IDS, LEARNED, NAMES, POLY_MHR, QUICK, RANK, ROUTED, SINGLE, SKILLS, TASKS, VOCAB, adapted,
    backbone, difference, gradients, grid, inputs, layer_maker, layers_of, logits, randomise, row, sweep,
)  # fmt: skip

CLOSE = 1e-5  # largest difference, relative to the largest value, that float32 may make

quick = lambda *case: case in QUICK  # noqa: E731
models = pytest.mark.parametrize("name", NAMES)
every_method = sweep("method, adapter", SINGLE + ROUTED, lambda *kind: quick("t5", *kind))
routed = sweep("method, adapter", ROUTED, lambda *kind: quick("t5", *kind))
everywhere = sweep("name, method, adapter", grid(SINGLE + ROUTED), quick)
routed_everywhere = sweep("name, method, adapter", grid(ROUTED), quick)
learned_everywhere = sweep("name, method, adapter", grid(LEARNED), quick)
tasks_differ = lambda method: method != "random"  # noqa: E731  in evaluation it mixes all skills alike, for any task


def noisy(method: str, routing: str = "gumbel") -> bool:
    """Whether training draws noise."""
    return method == "random" or (method in ("poly", "mhr") and routing != "sigmoid")


class Two(nn.Module):
    """The smallest model with two layers to adapt: 8 -> 12 -> 8 features."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def two(method="poly", adapter="lora", fresh=False, **options) -> Two:
    """An adapted `Two`, by default with adapters and logits far from their initial values."""
    torch.manual_seed(0)
    model = Two()
    freeze(model)
    inject(model, layer_maker(method, adapter, **options), "a|b")
    if not fresh:
        randomise(model)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name


def groups(layers) -> list[tuple[nn.Module, int]]:
    """The layers that mix together: the first of each group, which does it for all, and how many they are."""
    return [(same[0], len(same)) for same in inject_module._alike(layers, inject_module._kind_of_layer)]


def count_mixes(monkeypatch, model: nn.Module) -> list[tuple[nn.Module, int]]:
    """A list to which every call of `mix` adds its layer, and for how many layers it mixes."""
    mixed = []
    for layer in adapted_layers(model).values():

        def mix(w, inventory, own=layer):
            mixed.append((own, len(w)))
            return type(own).mix(own, w, inventory)

        monkeypatch.setattr(layer, "mix", mix)
    return mixed


# --- A model with adapters is the same model --------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("ids", [IDS, [2]], ids=["mixed", "one-task"])
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit(name, method, adapter, ids):
    batch = inputs(name)
    expected = backbone(name)(**batch).logits
    assert torch.equal(logits(adapted(name, method, adapter, fresh=True), batch, ids), expected)
    assert difference(logits(adapted(name, method, adapter), batch, ids), expected) > 0.05  # trained ones do


@routed_everywhere
def test_a_mixed_batch_equals_one_example_at_a_time(name, method, adapter):
    model, batch = adapted(name, method, adapter), inputs(name)
    together = logits(model, batch, IDS)
    apart = torch.cat([logits(model, row(batch, k), [IDS[k]]) for k in range(4)])
    assert difference(together, apart) < CLOSE
    if tasks_differ(method):
        assert difference(logits(model, batch, IDS[::-1]), apart) > 0.05  # the order of ids matters

    together = gradients(model, batch, IDS)
    singles = [gradients(model, row(batch, k), [IDS[k]]) for k in range(4)]
    assert any(key.endswith(".router.Z") for key in together) == ((method, adapter) in LEARNED)
    for key, g in together.items():
        assert g.abs().max() > 0, key
        assert difference(g, sum(single[key] for single in singles) / 4) < 5 * CLOSE, key  # the loss is the mean


@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_one_skill_per_task_and_rank_above_one_keep_examples_apart(method):
    """Mixing up examples is invisible with a batch of one, or with rank 1."""
    model, batch = adapted("t5", method, "lora", rank=4, tasks=4, skills=4), inputs("t5")
    for router in routers(model):
        eye = torch.eye(4) * 100 - 50
        router.Z.data.copy_(eye if method == "poly" else eye[:, None].expand_as(router.Z))
    apart = torch.cat([logits(model, row(batch, k), [3 - k]) for k in range(4)])
    assert difference(logits(model, batch, [3, 2, 1, 0]), apart) < CLOSE
    alone = adapted("t5", "lora", "lora", rank=4)  # and each is that skill's own LoRA
    for name, layer in adapted_layers(alone).items():
        for key, p in layer.params.items():
            p.data.copy_(model.get_submodule(name).inventory[key][2])
    assert difference(logits(alone, row(batch, 1), [0]), apart[1:2]) < CLOSE


@given(st.lists(st.integers(0, TASKS - 1), min_size=1, max_size=6), st.integers(1, 3), st.sampled_from(ROUTED))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_any_ids_and_any_repeat(ids, repeat, kind):
    """Rows k * repeat .. (k + 1) * repeat - 1 belong to the k-th id, whatever ids are equal."""
    model = two(*kind)
    x = torch.randn(len(ids) * repeat, 3, 8)
    with task_ids(ids):
        together = model(x)
    for k, task in enumerate(t for t in ids for _ in range(repeat)):
        with task_ids([task]):
            assert torch.allclose(model(x[k : k + 1])[0], together[k], atol=1e-5)


# --- Generation and choices: the number of rows changes between encoder and decoder -----------------------------------

GENERATION = {
    "greedy": dict(),
    "beams": dict(num_beams=4),
    "beams, 3 returned": dict(num_beams=4, num_return_sequences=3),
    "3 samples": dict(do_sample=True, top_k=1, num_return_sequences=3),  # top_k=1: sampling without chance
}


def generate(model, batch, ids, **options):
    mask = batch["attention_mask"]
    options = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6) | options
    with task_ids(ids):
        return model.generate(input_ids=batch["input_ids"], attention_mask=mask, **options)


@sweep(
    "name, method, adapter, mode",
    [(*kind, mode) for kind in grid(ROUTED) for mode in GENERATION],
    lambda *case: quick(*case[:3]) and case[3] in ("greedy", "beams, 3 returned") or case[:3] == ("t5", "mhr", "lora"),
)
def test_generation_on_a_mixed_batch_equals_one_example_at_a_time(name, method, adapter, mode):
    model, batch, options = adapted(name, method, adapter), inputs(name), GENERATION[mode]
    apart = torch.cat([generate(model, row(batch, k), [IDS[k]], **options) for k in range(4)])
    for _ in range(2):  # twice: nothing of the first call may be left
        assert torch.equal(generate(model, batch, IDS, **options), apart)
    if tasks_differ(method):
        assert not torch.equal(generate(model, batch, IDS[::-1], **options), apart)


@sweep("name, method, adapter", [kind for kind in grid(ROUTED) if kind[0] in ("t5", "bart")], quick)
@torch.no_grad()
def test_choices_scored_on_one_encoding_equal_each_pair_alone(name, method, adapter):
    """Encoder on b = 4 inputs, its states repeated for c = 3 choices each, decoder on 12 rows; ids stay 4."""
    model, batch, c = adapted(name, method, adapter), inputs(name), 3
    choices = torch.randint(3, VOCAB, (4, c, 5), generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        with task_ids(IDS):
            states = model.get_encoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            together = model(
                encoder_outputs=(states.repeat_interleave(c, 0),),
                attention_mask=batch["attention_mask"].repeat_interleave(c, 0),
                labels=choices.flatten(0, 1),
            ).logits.unflatten(0, (4, c))
        for k in range(4):
            for j in range(c):
                alone = logits(model, row(batch, k) | {"labels": choices[k, j : j + 1]}, [IDS[k]])
                assert difference(together[k, j], alone[0]) < CLOSE


# --- Gradient checkpointing: the layers run again during backward -----------------------------------------------------


ROUTINGS = [(*kind, "gumbel") for kind in grid(ROUTED)] + [(*kind, "sigmoid") for kind in grid(POLY_MHR)]


@sweep(
    "name, method, adapter, routing",
    ROUTINGS,
    lambda *case: quick(*case[:3]) and case[3] == "gumbel" or case[:3] == ("t5", "mhr", "lora"),
)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_gradient_checkpointing_changes_no_gradient(monkeypatch, name, method, adapter, routing, inside):
    """The layers run twice, and mix once: for the forward pass. inside: the backward pass is within the context.

    In float64: float32 cannot tell an error from sums that cancel.
    """
    model, batch = adapted(name, method, adapter, routing=routing).double().train(), inputs(name)
    layers, calls, mixed = list(adapted_layers(model).values()), [], count_mixes(monkeypatch, model)
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    torch.manual_seed(7)
    expected = gradients(model, batch, IDS)
    assert len(calls) == len(layers) and mixed == groups(layers)
    torch.manual_seed(8)
    moved = any(not torch.equal(g, expected[key]) for key, g in gradients(model, batch, IDS).items())
    assert moved == noisy(method, routing)

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(2):
        calls.clear()
        mixed.clear()
        torch.manual_seed(7)
        got = gradients(model, batch, IDS, inside)
        assert all(calls.count(layer) == 2 for layer in layers) and mixed == groups(layers)
        assert got.keys() == expected.keys()
        for key, g in got.items():
            assert difference(g, expected[key]) < 1e-12, key


@models
@pytest.mark.parametrize("before", [True, False], ids=["before-injection", "after"])
def test_reentrant_checkpointing_is_refused(name, before):
    model, batch = backbone(name).train(), inputs(name)
    freeze(model)
    reentrant = dict(gradient_checkpointing_kwargs={"use_reentrant": True})
    if before:
        model.gradient_checkpointing_enable(**reentrant)
    inject(model, layer_maker("mhr", "lora"), layers_of("lora", name))
    if not before:
        gradients(model, batch, IDS)
        model.gradient_checkpointing_enable(**reentrant)
    sentence = "reentrant gradient checkpointing cannot be used with routed layers: "
    sentence += "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        gradients(model, batch, IDS)
    assert inject_module._thread.now is None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(g.isfinite().all() for g in gradients(model, batch, IDS).values())


# --- Merging ----------------------------------------------------------------------------------------------------------


@everywhere
def test_merged_equals_routed_and_unmerge_restores_every_bit(name, method, adapter):
    model, batch = adapted(name, method, adapter), inputs(name)
    plain_keys = backbone(name).state_dict().keys()
    before, outputs = snapshot(model), logits(model, batch, IDS)
    originals = adapted_layers(model)
    weights = {key: layer.linear.weight for key, layer in originals.items()}
    merged = []
    for task in range(TASKS if (method, adapter) in ROUTED else 1):
        expected = logits(model, batch, [task])
        layers = merge(model, task)
        assert not adapted_layers(model) and not adapter_parameters(model) and not routers(model)
        assert model.state_dict().keys() == plain_keys
        assert {type(model.get_submodule(key)).__name__ for key in layers} <= {"Linear", "Conv1D"}
        with torch.no_grad():
            merged.append(model(**batch).logits)  # a plain model: no task ids
        assert difference(merged[-1], expected) < CLOSE
        unmerge(model, layers)
        assert_same_state(model, before)
        assert adapted_layers(model) == originals
        assert all(layer.linear.weight is weights[key] for key, layer in originals.items())
        assert torch.equal(logits(model, batch, IDS), outputs)
    if tasks_differ(method):
        assert all(difference(x, y) > 0.05 for x, y in zip(merged, merged[1:], strict=False))  # each task its own


@everywhere
def test_a_merged_model_is_an_ordinary_model_that_can_be_saved_and_loaded(name, method, adapter, tmp_path):
    model, batch = adapted(name, method, adapter), inputs(name)
    merge(model, 0)
    shapes = {key: value.shape for key, value in backbone(name).state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    model.save_pretrained(tmp_path)
    loaded = CLASSES[name].from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_merged_is_merge_for_a_while():
    model, batch = adapted("t5", "mhr", "lora"), inputs("t5")
    expected, before = logits(model, batch, [1]), snapshot(model)
    with pytest.raises(KeyError), merged(model, 1):
        with torch.no_grad():
            assert not adapted_layers(model) and difference(model(**batch).logits, expected) < CLOSE
        raise KeyError
    assert_same_state(model, before)
    with merged(backbone("t5"), 1):
        pass  # without adapters there is nothing to merge


COMPILED = sweep(
    "name, method, adapter",
    [(name, *kind) for name in ("two", "t5") for kind in (("mhr", "lora"), ("poly", "ia3"), ("mhr", "sft"))],
    lambda name, *_: name == "two",  # a T5 takes 3 to 10 seconds
)


def with_noise(name: str, method: str, adapter: str):
    """(model, a function that gives its loss): routers draw noise, without the backbone's dropout."""
    if name == "two":
        model, x = two(method, adapter), torch.randn(4, 3, 8)
        loss = lambda: model(x).square().sum()  # noqa: E731
    else:
        model, batch = adapted("t5", method, adapter), inputs("t5")
        loss = lambda: model(**batch, use_cache=False).loss  # noqa: E731
    for router in routers(model):
        router.train()
    return model, loss


@COMPILED
def test_compiling_breaks_no_graph(name, method, adapter):
    """`compiled` takes a model with routed layers whole, task ids and noise included, and follows other ids."""
    model, plain = with_noise(name, method, adapter)
    whole = inject_module.compiled(plain, model, fullgraph=True, backend="eager")

    def gradient(loss):
        torch.manual_seed(0)
        return torch.autograd.grad(loss(), routers(model)[0].Z)[0]

    for ids in (IDS, [2, 0, 1, 4]):
        with task_ids(ids):
            torch.testing.assert_close(gradient(whole), gradient(plain))


@COMPILED
def test_a_compiled_model_mixes_outside_its_graph(name, method, adapter):
    """torch.compile of the model itself: outputs and gradients are those of eager mode, for changing ids too."""
    model, plain = with_noise(name, method, adapter)
    parameters = [p for p in adapter_parameters(model).values() if p.requires_grad]

    def results(ids):
        torch.manual_seed(0)
        with task_ids(ids):
            loss = plain()
            return [loss, *torch.autograd.grad(loss, parameters)]

    batches = (IDS, [2, 0, 1, 4], [1] * 4, [0, 0, 3, 3])
    expected = [results(ids) for ids in batches]
    model.compile(backend="eager")
    for ids, want in zip(batches * 2, expected * 2, strict=True):
        torch.testing.assert_close(results(ids), want)
    with pytest.raises(IndexError, match=f"task id {TASKS} is out of range"):
        results([0, 1, 2, TASKS])
    with pytest.raises(RuntimeError, match="with task_ids"):
        plain()


@routed
def test_kept_adapters_are_mixed_once(monkeypatch, method, adapter):
    """Generation with task_ids(keep=True): the same tokens, each layer mixed once instead of once a token."""
    model, batch = adapted("t5", method, adapter), inputs("t5")
    mixed = count_mixes(monkeypatch, model)
    encoder, decoder = (groups(adapted_layers(part).values()) for part in (model.encoder, model.decoder))
    options = dict(input_ids=batch["input_ids"], max_new_tokens=4, min_new_tokens=4, num_beams=2)
    with torch.no_grad(), task_ids(IDS):
        expected = model.generate(**options)
    assert len(mixed) > len(encoder + decoder)
    mixed.clear()
    with torch.no_grad(), task_ids(IDS, keep=True):
        assert torch.equal(model.generate(**options), expected)
        assert mixed == encoder + decoder  # generation calls the encoder by itself
        with task_ids([2, 2, 2, 2], keep=True):  # a context of its own keeps its own
            other = model(**batch).logits
        torch.testing.assert_close(other, logits(model, batch, [2] * 4))
    with pytest.raises(RuntimeError, match="keep=True"), task_ids(IDS, keep=True):
        pass


@routed
def test_merging_draws_no_noise(method, adapter):
    model, batch = adapted("t5", method, adapter), inputs("t5")
    expected = logits(model, batch, [1])
    model.train()
    merge(model, 1)
    with torch.no_grad():
        assert difference(model(**batch).logits, expected) < CLOSE


@pytest.mark.parametrize("task", [-1, -TASKS, TASKS, 99])
@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_merging_an_unknown_task_is_an_error(method, task):
    model = two(method)
    before = snapshot(model)
    with pytest.raises(IndexError, match=rf"task id {task} is out of range.* 0 .. {TASKS - 1}"):
        merge(model, task)
    assert_same_state(model, before)


def test_merging_twice_or_nothing_is_an_error():
    model = two()
    merge(model, 0)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model, 0)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(Two(), 0)


# --- Saving and loading -----------------------------------------------------------------------------------------------


@everywhere
def test_save_and_load_bit_for_bit(name, method, adapter, tmp_path):
    path, batch = tmp_path / "adapter.safetensors", inputs(name)
    model = adapted(name, method, adapter)
    save_adapters(model, str(path))
    assert os.listdir(tmp_path) == ["adapter.safetensors"]  # no .tmp left
    saved, metadata = read_tensors(str(path))
    assert metadata.keys() == {"backbone", "state", "sha256"} and metadata["backbone"] == fingerprint(model)
    assert json.loads(metadata["state"]).keys() == adapted_layers(model).keys()
    assert saved.keys() == adapter_parameters(model).keys() and saved
    names = [key for key in saved if not key.endswith((".router.hidden.weight", ".router.last.weight"))]  # its own
    assert not any(key.startswith("linear.") or ".linear." in key or key.endswith(".weight") for key in names)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    given = {"sft": ".place"}.get(adapter, ".router.Z" if (method, adapter) in GIVEN else None)  # saved, never trained
    assert trained == {key for key in saved if given is None or not key.endswith(given)} != set()
    assert all(v.dtype == (torch.int64 if key.endswith(".place") else torch.float32) for key, v in saved.items())

    other = adapted(name, method, adapter, seed=1, fresh=True)
    expected = logits(model, batch, IDS)
    assert not torch.equal(logits(other, batch, IDS), expected)
    load_adapters(other, str(path))
    assert torch.equal(logits(other, batch, IDS), expected)
    assert_same_state(other, snapshot(model))
    assert other.state_dict().keys() == model.state_dict().keys()
    trainable = lambda m: [key for key, p in m.named_parameters() if p.requires_grad]  # noqa: E731
    assert trainable(other) == trainable(model)


@routed
def test_the_file_decides_the_number_of_tasks(method, adapter, tmp_path):
    path, batch = str(tmp_path / "x"), inputs("t5")
    model, other = adapted("t5", method, adapter), adapted("t5", method, adapter, tasks=1)
    save_adapters(model, path)
    load_adapters(other, path)
    assert [r.tasks for r in routers(other)] == [TASKS] * len(routers(model))
    assert torch.equal(logits(other, batch, IDS), logits(model, batch, IDS))


def test_a_shared_router_is_saved_once_and_stays_shared(tmp_path):
    path = str(tmp_path / "x")
    model, other = (adapted("t5", "poly", "lora", seed=s, router=PolyRouter(TASKS, SKILLS)) for s in (0, 1))
    save_adapters(model, path)
    with safe_open(path, "pt") as file:
        assert [key for key in file.keys() if key.endswith("Z")] == ["encoder.block.0.layer.0.SelfAttention.q.router.Z"]
    load_adapters(other, path)
    assert len(routers(other)) == 1
    assert torch.equal(logits(other, inputs("t5"), IDS), logits(model, inputs("t5"), IDS))
    with pytest.raises(ValueError, match="only in the model: it was saved with other adapter settings"):
        load_adapters(adapted("t5", "poly", "lora"), path)  # one router a layer


SAVED = dict(method="mhr", adapter="lora")
REFUSED = {
    "rank": SAVED | dict(rank=RANK + 1),
    "heads": SAVED | dict(heads=2),
    "skills": SAVED | dict(skills=SKILLS + 1),
    "adapter": SAVED | dict(adapter="ia3"),
    "adapter, same layers": SAVED | dict(adapter="ia3", layers=named_layers("lora", "t5")),
    "method poly": SAVED | dict(method="poly"),
    "method lora": SAVED | dict(method="lora"),
    "fewer layers": SAVED | dict(layers=r".*\.q"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_file_of_other_adapters_is_refused(setting, tmp_path):
    path = str(tmp_path / "saved")
    save_adapters(adapted("t5", **SAVED), path)
    model = adapted("t5", **REFUSED[setting])
    before, objects = snapshot(model), list(model.parameters())
    with pytest.raises(ValueError) as error:
        load_adapters(model, path)
    message = str(error.value)
    name = re.match(rf"{re.escape(path)}: (\S+) is ", message)[1]
    assert name in adapter_parameters(model) or name in adapter_parameters(adapted("t5", **SAVED))
    assert "\n" not in message and len(message) < 300
    assert_same_state(model, before)
    assert all(p is q for p, q in zip(model.parameters(), objects, strict=True))


def poly_with(adapter, routing="gumbel", shared=(0, 1, 2, 3)):
    """A function that gives a maker of Poly's layers. shared: which of four routers each layer has."""

    def new():
        own = [PolyRouter(TASKS, SKILLS, routing) for _ in range(4)]
        return lambda name, linear: PolyLinear(linear, adapter, own[shared[int(name)]])

    return new


class Scaled(PolyLinear):
    """A layer with a setting of its own."""

    def __init__(self, linear, scale):
        super().__init__(linear, LoRA(2), PolyRouter(TASKS, SKILLS))
        self.scale = scale


class Own:
    """An adapter of somebody's own."""

    feature_axis, init, apply, merge = LoRA.feature_axis, LoRA().init, LoRA().apply, LoRA().merge

    def __init__(self, strength):
        self.strength = strength


one_lora = lambda alpha: lambda: lambda _, linear: LoRALinear(linear, LoRA(2, alpha=alpha))  # noqa: E731
one_ia3 = lambda side: lambda: lambda _, linear: IA3Linear(linear, IA3(side))  # noqa: E731
scaled = lambda scale: lambda: lambda _, linear: Scaled(linear, scale)  # noqa: E731
UNLIKE = {  # makers of layers of the same names and shapes, that compute something else; and what the error names
    "alpha": (poly_with(LoRA(2, alpha=16.0)), poly_with(LoRA(2)), r"LoRA\(.*alpha=16\) .*LoRA\(.*alpha=1\)"),
    "alpha of one": (one_lora(16.0), one_lora(1.0), r"LoRA\(.*alpha=16\) .*LoRA\(.*alpha=1\)"),
    "side": (one_ia3("in"), one_ia3("out"), r"IA3\(side=in\) .*IA3\(side=out\)"),
    "routing": (poly_with(LoRA(2), "sigmoid"), poly_with(LoRA(2)), r"PolyRouter\(.*sigmoid\) .*PolyRouter\(.*gumbel\)"),
    "sharing": (
        poly_with(LoRA(2), shared=(0, 1, 0, 1)), poly_with(LoRA(2), shared=(0, 1, 1, 1)),
        "the router of layer 0 in the file, the router of layer 1 ",
    ),
    "of one's own": (poly_with(Own(2.5)), poly_with(Own(2)), r"Own\(strength=2.5\) in the file, Own\(strength=2\) "),
    "the layer's": (scaled(2), scaled(3), r"Scaled\(scale=2\) in the file, Scaled\(scale=3\) "),
}  # fmt: skip


def square(new, seed: int) -> nn.Module:
    """A model of four equal layers with adapters from a maker new(), with values that matter."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    freeze(model)
    inject(model, new(), r"\d")
    torch.manual_seed(seed)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("one, other, says", UNLIKE.values(), ids=UNLIKE)
def test_a_file_of_other_settings_with_the_same_shapes_is_refused(one, other, says, tmp_path):
    """Its tensors fit, but the model would be another function. Made in the same way, it is the same one."""
    path, x = str(tmp_path / "saved"), torch.randn(len(IDS), 3, 8)
    model = square(one, seed=1)
    save_adapters(model, path)
    with task_ids(IDS):
        expected = model(x)
    wrong = square(other, seed=2)
    before = snapshot(wrong)
    with pytest.raises(ValueError, match=rf": layer \d has {says}.*in the model: inject the same$") as error:
        load_adapters(wrong, path)
    assert "\n" not in str(error.value)
    assert_same_state(wrong, before)
    right = square(one, seed=2)
    load_adapters(right, path)
    with task_ids(IDS):
        assert torch.equal(right(x), expected)


def test_a_file_without_settings_is_read(tmp_path):
    """As files were before they had them."""
    path, model, other = str(tmp_path / "saved"), two(), two(fresh=True)
    tensors = {name: p.detach() for name, p in adapter_parameters(model).items()}
    write_tensors(tensors, path, backbone=fingerprint(model))
    load_adapters(other, path)
    assert_same_state(other, snapshot(model))


class Routing(str, enum.Enum):  # noqa: UP042  which prints as Routing.G
    """A text with another name."""

    G = "gumbel"


@pytest.mark.parametrize(
    "one, other",
    [
        (poly_with(LoRA(2, alpha=16.0)), poly_with(LoRA(np.int64(2), alpha=16))),
        (poly_with(LoRA(2, alpha=0.5)), poly_with(LoRA(2, alpha=np.float32(0.5)))),
        (poly_with(LoRA(2, alpha=2.0)), poly_with(LoRA(2, alpha=torch.tensor(2.0)))),
        (poly_with(IA3()), poly_with(IA3(), Routing.G)),
        (poly_with(Own(None)), poly_with(Own([1]))),  # no number and no text: nothing is known
    ],
)
def test_the_same_settings_may_be_written_in_other_ways(one, other, tmp_path):
    """And a router may be compiled."""
    path, model, same = str(tmp_path / "saved"), square(one, seed=1), square(other, seed=2)
    same[1].router = torch.compile(same[1].router)
    save_adapters(model, path)
    load_adapters(same, path)
    assert_close(list(adapter_parameters(same).values()), list(adapter_parameters(model).values()), rtol=0, atol=0)
    save_adapters(same, path)
    load_adapters(model, path)


def test_a_router_that_the_model_owns_too(tmp_path):
    path, model = str(tmp_path / "saved"), Two()
    before, model.router = fingerprint(model), PolyRouter(TASKS, SKILLS)
    freeze(model)
    inject(model, lambda _, linear: PolyLinear(linear, LoRA(2), model.router), "a|b")
    assert fingerprint(model) == before
    save_adapters(model, path)
    load_adapters(model, path)


def with_a_head(seed: int) -> nn.Module:
    """A model with adapters and a head that is drawn anew, and trained with them."""
    model = two()
    torch.manual_seed(seed)
    model.b = nn.Sequential(model.b, nn.Linear(8, 2))
    return model


def test_what_is_trained_beside_the_adapters_is_saved_with_them(tmp_path):
    """A head, which is new in each process. Into a model where it is frozen too."""
    path, x = str(tmp_path / "saved"), torch.randn(4, 3, 8)
    model, frozen = with_a_head(1), with_a_head(2)
    save_adapters(model, path)
    assert read_tensors(path)[0].keys() == adapter_parameters(model).keys() | {"b.1.weight", "b.1.bias"}
    freeze(frozen)
    for other in (with_a_head(2), frozen):
        load_adapters(other, path)
        with task_ids(IDS[:4]):
            assert torch.equal(other(x), model(x))
    half = with_a_head(2)
    half.b[1].bfloat16()
    load_adapters(half, path)
    assert torch.equal(half.b[1].weight, model.b[1].weight.bfloat16())
    assert not any(p.requires_grad for p in frozen.parameters())
    changed = with_a_head(2)
    changed.a.linear.weight.data[0] += 1
    before = snapshot(changed)
    with pytest.raises(ValueError, match="another backbone"):
        load_adapters(changed, path)
    without = two()
    without.b = nn.Sequential(without.b)
    with pytest.raises(ValueError, match="b.1.bias is only in the file"):
        load_adapters(without, path)
    assert_same_state(changed, before)


SPOILT = {  # what a file says of the first layer's places and values, and what is wrong with that
    "beyond the weight": (lambda place, value: (place + 96, value), "a.params.place names places outside its layer"),
    "below 0": (lambda place, value: (place - 96, value), "a.params.place names places outside its layer"),
    "fewer places": (lambda place, value: (place[1:], value), "a.params.place names .* not one for each value"),
    "fewer values": (lambda place, value: (place, value[1:]), "a.params.place names .* not one for each value"),
    "no integers": (lambda place, value: (place.float(), value), r"a.params.place is \(19,\) of torch.float32"),
    "two axes": (lambda place, value: (place[None], value[None]), r"a.params.place is \(1, 19\)"),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_a_file_of_impossible_places_is_refused(spoil, message, tmp_path):
    """Of a single SFT, whose number of places is free; the first layer has 96 weights, of which 19 may change."""
    path, model = str(tmp_path / "saved"), two("shared", "sft")
    tensors = {key: p.detach().clone() for key, p in adapter_parameters(model).items()}
    place, value = spoil(tensors["a.params.place"], tensors["a.params.value"])
    tensors |= {"a.params.place": place.contiguous(), "a.params.value": value.contiguous()}
    write_tensors(tensors, path, backbone=fingerprint(model))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        load_adapters(model, path)
    assert "\n" not in str(error.value)
    assert_same_state(model, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    path, model = str(tmp_path / "saved"), two("poly")
    before, other = snapshot(model), copy.deepcopy(model)
    other.a.inventory["A"].data[1, 2, 0] = value
    save_adapters(other, path)
    with pytest.raises(ValueError, match="a.inventory.A holds numbers that are not finite"):
        load_adapters(model, path)
    assert_same_state(model, before)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_is_noticed(tmp_path_factory, place, bit):
    """Anywhere in the file: header or content. No bit of a parameter is ever read wrong."""
    folder = tmp_path_factory.mktemp("flipped")
    model = two("poly")
    save_adapters(model, str(folder / "saved"))
    content = bytearray((folder / "saved").read_bytes())
    content[place % len(content)] ^= 1 << bit
    (folder / "saved").write_bytes(content)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        load_adapters(model, str(folder / "saved"))
    assert "\n" not in str(error.value)
    assert_same_state(model, before)


@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_a_file_of_skills_with_impossible_places_is_refused(method, tmp_path):
    path, model, outside = str(tmp_path / "saved"), two(method, "sft"), two(method, "sft")
    outside.a.inventory["place"].data[1, 2] = 96
    save_adapters(outside, path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="a.inventory.place names places outside its layer"):
        load_adapters(model, path)
    assert_same_state(model, before)


def test_the_file_decides_the_number_of_places(tmp_path):
    """An average of SFTs has the places of all: it fits a model with an SFT of any density."""
    path, x = str(tmp_path / "x"), torch.randn(4, 3, 8)
    model, other = two("poly", "sft"), two("shared", "sft", fresh=True)
    average_skills(model, "sft")
    save_adapters(model, path)
    assert len(model.a.params["place"]) > len(other.a.params["place"]) == 19
    load_adapters(other, path)
    assert torch.equal(other(x), model(x)) and other.a.params.keys() == model.a.params.keys()
    assert {key for key, p in other.named_parameters() if p.requires_grad} == {"a.params.value", "b.params.value"}


def test_other_shapes_are_named_in_the_message(tmp_path):
    path = str(tmp_path / "saved")
    save_adapters(two("poly", rank=4), path)
    with pytest.raises(ValueError, match=r"inventory.A is \(3, 8, 4\) of torch.float32, the model has \(3, 8, 2\) of"):
        load_adapters(two("poly", rank=2), path)
    half = two("poly", rank=4).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"of torch.float32, the model has .* of torch.bfloat16"):
        load_adapters(half, path)


@models
def test_another_backbone_is_refused(name, tmp_path):
    path = str(tmp_path / "saved")
    save_adapters(adapted(name, "poly", "lora"), path)
    other = backbone(name, seed=1)
    freeze(other)
    inject(other, layer_maker("poly", "lora"), named_layers("lora", name))
    before = snapshot(other)
    with pytest.raises(ValueError, match="another backbone"):
        load_adapters(other, path)
    assert_same_state(other, before)
    with pytest.raises(ValueError, match="only in the file"):
        load_adapters(backbone(name), path)  # the right one, but nothing was injected


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "5", "[]", '{"sha256": 1}'])
def test_odd_metadata_is_refused(tmp_path, text):
    """Nested too deep, a number of too many digits, no JSON, no object: one sentence, the model is as before."""
    model, path = two("poly"), str(tmp_path / "adapter.safetensors")
    before = snapshot(model)
    inject_module.save_file(adapter_parameters(model), path, metadata={"saved": text})
    with pytest.raises(ValueError, match="adapter.safetensors is (no whole safetensors file|damaged)"):
        load_adapters(model, path)
    assert_same_state(model, before)


def test_overwriting_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "adapter.safetensors"
    first, second = two("poly"), two("poly")
    randomise(second)
    save_adapters(first, str(path))
    old = path.read_bytes()

    def fails_half_way(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(inject_module, "save_file", fails_half_way)
        with pytest.raises(OSError, match="disk full"):
            save_adapters(second, str(path))
    assert path.read_bytes() == old
    save_adapters(second, str(path))
    assert path.read_bytes() != old and os.listdir(tmp_path) == [path.name]
    load_adapters(first, str(path))
    assert_same_state(first, snapshot(second))


# --- Fingerprint ------------------------------------------------------------------------------------------------------


@everywhere
def test_fingerprint_sees_the_backbone_and_not_the_adapters(name, method, adapter):
    bare = fingerprint(backbone(name))
    assert re.fullmatch(r"[0-9a-f]{16}", bare)
    model = adapted(name, method, adapter)
    assert fingerprint(model) == bare
    randomise(model)
    add_tasks(model, 2)
    assert fingerprint(model) == bare
    assert fingerprint(copy.deepcopy(model)) == bare
    layers = merge(model, 0)
    assert fingerprint(model) != bare  # other weights
    unmerge(model, layers)
    assert fingerprint(model) == bare


@models
def test_fingerprint_does_not_depend_on_precision(name):
    assert fingerprint(backbone(name).to(torch.bfloat16)) == fingerprint(backbone(name))
    half = adapted(name, "poly", "lora").to(torch.bfloat16)
    assert fingerprint(half) == fingerprint(backbone(name))
    assert fingerprint(half.float()) == fingerprint(backbone(name))  # rounded, as if loaded from a bfloat16 file


@models
def test_fingerprint_differs_for_other_weights(name):
    assert fingerprint(backbone(name, seed=1)) != fingerprint(backbone(name))
    bare = fingerprint(backbone(name))
    model = backbone(name)
    for key, p in model.named_parameters():  # the first value of any parameter is enough
        value = p.data.view(-1)[0].clone()
        p.data.view(-1)[0] += 1
        assert fingerprint(model) != bare, key
        p.data.view(-1)[0] = value
    assert fingerprint(model) == bare


def test_fingerprint_is_the_same_when_a_layer_is_called_linear():
    model = nn.ModuleDict({"block": nn.ModuleDict({"linear": nn.Linear(4, 4)})})
    before = fingerprint(model)
    inject(model, layer_maker("lora", "lora"), r"block\.linear")
    assert fingerprint(model) == before


@pytest.mark.parametrize("adapter", ["lora", "ia3", "sft"])
def test_adapters_of_a_float32_model_fit_the_same_model_in_bfloat16(adapter, tmp_path):
    path = str(tmp_path / "x")
    model = adapted("t5", "mhr", adapter)
    save_adapters(model, path)
    half = backbone("t5").to(torch.bfloat16)
    inject(half, layer_maker("mhr", adapter), layers_of(adapter, "t5"))
    load_adapters(half, path)
    own = adapter_parameters(half)
    assert all(torch.equal(p, own[key]) for key, p in adapter_parameters(model).items())


# --- More tasks -------------------------------------------------------------------------------------------------------


@routed_everywhere
def test_added_tasks_leave_the_old_ones_alone(name, method, adapter):
    """And a new one starts as its router's documentation says, and learns where there is something to learn."""
    model, batch = adapted(name, method, adapter), inputs(name)
    outputs, rows = logits(model, batch, IDS), [r.Z.detach().clone() for r in routers(model)]
    add_tasks(model, 2)
    assert all(r.tasks == TASKS + 2 and torch.equal(r.Z[:TASKS], Z) for r, Z in zip(routers(model), rows, strict=True))
    for r in routers(model):
        if (method, adapter) in GIVEN:
            assert (r.Z[TASKS:] == 1).all()
        elif method == "hyperformer":
            assert 0.01 < r.Z[TASKS:].std() < 10
        else:
            assert 0 < r.Z[TASKS:].abs().max() <= 1e-3
    assert torch.equal(logits(model, batch, IDS), outputs)
    if tasks_differ(method):
        assert difference(logits(model, batch, [TASKS] * 4), outputs) > 0.05  # the new task exists
    if (method, adapter) in GIVEN:
        return

    optimizer = torch.optim.Adam([r.Z for r in routers(model)], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with task_ids([TASKS] * 4):
            model(**batch).loss.backward()
        for r in routers(model):
            assert r.Z.grad[TASKS].abs().max() > 0
            assert not r.Z.grad[:TASKS].any() and not r.Z.grad[TASKS + 1 :].any()  # zero, to the bit
        optimizer.step()
    for r, Z in zip(routers(model), rows, strict=True):
        assert torch.equal(r.Z[:TASKS], Z) and r.Z[TASKS].abs().max() > 0.1
    assert torch.equal(logits(model, batch, IDS), outputs)


@learned_everywhere
def test_tasks_absent_from_the_batch_get_no_gradient(name, method, adapter):
    grads = gradients(adapted(name, method, adapter), inputs(name), IDS)
    for key in (key for key in grads if key.endswith(".Z")):
        assert not grads[key][2].any()
        assert all(grads[key][task].abs().max() > 0 for task in IDS)


@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_tasks_can_be_replaced_and_a_shared_router_grows_once(method):
    router = PolyRouter(TASKS, SKILLS) if method == "poly" else MHRRouter(TASKS, SKILLS, HEADS)
    model = two(method, router=router)
    old = router.Z.detach().clone()
    add_tasks(model, 2)
    assert router.tasks == TASKS + 2
    add_tasks(model, 3, keep=False)
    assert router.tasks == 3 and router.Z.shape[1:] == old.shape[1:]
    assert router.Z.abs().max() <= 1e-3 < old.abs().max()


# --- What is trained --------------------------------------------------------------------------------------------------


def step(model, batch, ids, lr=0.01):
    """One optimiser step on everything trainable; the values from before it."""
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    with task_ids(ids):
        model(**batch).loss.backward()
    optimizer.step()
    return before


@everywhere
def test_frozen_but_for_the_adapters(name, method, adapter):
    model = adapted(name, method, adapter)
    own = adapter_parameters(model)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    kept = {key for key in own if key.endswith(".place") or (key.endswith(".Z") and (method, adapter) in GIVEN)}
    assert trainable == own.keys() - kept
    before = step(model, inputs(name), IDS)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in trainable), key
    bare = backbone(name).state_dict()  # and what did not change is the backbone, every tensor of it
    frozen = {key.replace(".linear.", "."): v for key, v in model.state_dict().items() if key not in own}
    assert frozen.keys() == bare.keys()
    for key, value in frozen.items():
        turned = name == "gpt2" and f"{key.removesuffix('.weight')}.linear.weight" in model.state_dict()
        assert torch.equal(value.T if turned else value, bare[key]), key


@learned_everywhere
def test_z_only_changes_nothing_but_z(name, method, adapter):
    model = adapted(name, method, adapter)
    adapt.prepare(model, train.Config(method=method, adapter=adapter), adapt.Config(variant="z"))
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{layer}.router.Z" for layer in adapted_layers(model)}
    before = step(model, inputs(name), [0])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (not key.endswith(".router.Z")), key


# --- Task ids ---------------------------------------------------------------------------------------------------------


def test_contexts_nest_and_are_restored_after_leaving_and_after_an_error():
    model, x = two(), torch.randn(1, 3, 8)
    outputs = []
    for task in range(3):
        with task_ids([task]):
            outputs.append(model(x))
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    with task_ids([0]):
        with task_ids([1]):
            with task_ids([2]):
                assert torch.equal(model(x), outputs[2])
            assert torch.equal(model(x), outputs[1])
            with pytest.raises(KeyError), task_ids([2]):
                raise KeyError
            assert torch.equal(model(x), outputs[1])
            with pytest.raises(ValueError), task_ids([-1]):
                pass
            assert torch.equal(model(x), outputs[1])
        assert torch.equal(model(x), outputs[0])
    with pytest.raises(RuntimeError):
        model(x)


BAD_IDS = {
    "floats": [0.0, 1.0],
    "float tensor": torch.tensor([1.0]),
    "bools": [True, False],
    "bool tensor": torch.tensor([True]),
    "negative": [0, -1],
    "negative tensor": torch.tensor([-1]),
    "2-D": [[0, 1]],
    "2-D tensor": torch.zeros(2, 2, dtype=torch.long),
    "0-D": torch.tensor(0),
    "a number": 3,
    "empty": [],
    "empty tensor": torch.zeros(0, dtype=torch.long),
    "words": ["a"],
}


@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=BAD_IDS)
def test_ids_that_are_none(ids):
    with pytest.raises(ValueError), task_ids(ids):
        pytest.fail("the context was entered")
    assert inject_module._ids.get() is None


@routed_everywhere
def test_missing_wrong_and_unknown_ids_are_errors(name, method, adapter):
    model, batch = adapted(name, method, adapter), inputs(name)
    with pytest.raises(RuntimeError, match="with task_ids"):
        model(**batch)
    with pytest.raises(ValueError, match="3 task ids for a batch of 4 rows"):
        logits(model, batch, [0, 1, 2])
    with pytest.raises(ValueError, match="5 task ids for a batch of 4 rows"):
        logits(model, batch, [0, 1, 2, 3, 4])
    with pytest.raises(IndexError, match=rf"task id {TASKS} is out of range.* 0 .. {TASKS - 1}"):
        logits(model, batch, [0, 1, TASKS, 2])
    with pytest.raises(IndexError):
        logits(model, batch, [TASKS])
    assert logits(model, batch, [TASKS - 1]).isfinite().all()  # the last one is known


def test_all_kinds_of_integers_are_accepted():
    model, x = two(), torch.randn(4, 3, 8)
    kinds = [IDS, tuple(IDS), torch.tensor(IDS).numpy()]
    kinds += [torch.tensor(IDS, dtype=kind) for kind in (torch.int64, torch.int32, torch.int16, torch.uint8)]
    kinds += [torch.tensor(IDS).numpy().astype(kind) for kind in ("uint8", "uint16", "uint32", "uint64")]
    outputs = []
    for ids in kinds:
        with task_ids(ids):
            outputs.append(model(x))
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_adapters_without_a_router_need_no_ids():
    for method, adapter in SINGLE:
        model, x = two(method, adapter), torch.randn(4, 3, 8)
        bare = model(x)
        with task_ids([99, 0]):
            assert torch.equal(model(x), bare)


def test_a_layer_called_with_ids_of_its_own_needs_no_context():
    model, x = two(), torch.randn(2, 3, 8)
    with task_ids([3, 1]):
        expected = model.a(x)
    ids = torch.tensor([3, 1])
    assert torch.allclose(model.a(x, ids), expected, atol=1e-6)
    with task_ids([0, 0]):  # they go before the context's
        assert torch.allclose(model.a(x, tasks=ids), expected, atol=1e-6)


@routed_everywhere
def test_forward_backward_and_generation_write_no_state(name, method, adapter):
    """Neither the ids, nor the context, nor any attribute of a module; and nothing remains of a pass."""

    def state():
        modules = set(model.modules())
        held = [v for m in modules for v in [m, *m._parameters.values(), *m._buffers.values(), *m._modules.values()]]
        hooks = {m: (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in modules}
        return {(id(m), key, id(v)) for m in modules for key, v in vars(m).items()}, set(map(id, held)), hooks

    def ended():
        return inject_module._thread.now is None and inject_module._thread.given is None

    model, batch, ids = adapted(name, method, adapter), inputs(name), torch.tensor(IDS)
    with task_ids(ids):
        context = inject_module._ids.get()
        copies = [t.clone() if torch.is_tensor(t) else t for t in context]
        before, values = state(), snapshot(model)
        loss = model(**batch).loss
        assert ended()
        loss.backward()
        assert ended()
        model.generate(input_ids=batch["input_ids"], num_beams=2, num_return_sequences=2, max_new_tokens=3)
        assert ended() and state() == before
        for module, hooks in before[2].items():  # those that injection installs, for good
            routed, whole = hasattr(module, "router"), hasattr(module, "get_input_embeddings")
            assert hooks == (routed + whole, whole, 0), module
        assert_same_state(model, values)
        assert inject_module._ids.get() is context
        for now, then in zip(context, copies, strict=True):
            assert torch.equal(now, then) if torch.is_tensor(now) else now == then
    assert ids.tolist() == IDS and inject_module._ids.get() is None


# --- Injection --------------------------------------------------------------------------------------------------------


def expected_names(name: str, adapter: str) -> set[str]:
    """The layers to adapt in the tiny models, spelled out."""
    lora = adapter != "ia3"
    if name == "t5":
        attention, forward = ("q", "k", "v", "o") if lora else ("k", "v"), ("wi_0", "wi_1", "wo") if lora else ("wo",)
        sub = {"encoder": [("SelfAttention", attention), ("DenseReluDense", forward)]}
        sub["decoder"] = [("SelfAttention", attention), ("EncDecAttention", attention), ("DenseReluDense", forward)]
        return {
            f"{coder}.block.{n}.layer.{k}.{module}.{linear}"
            for coder in sub
            for n in (0, 1)
            for k, (module, linears) in enumerate(sub[coder])
            for linear in linears
        }
    if name == "bart":
        if lora:
            linears = {c: [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] for c in ("encoder", "decoder")}
        else:
            linears = {"encoder": ["self_attn.k_proj", "self_attn.v_proj", "fc2"]}
            linears["decoder"] = linears["encoder"] + ["encoder_attn.k_proj", "encoder_attn.v_proj"]
        return {f"model.{coder}.layers.{n}.{x}" for coder in linears for n in (0, 1) for x in linears[coder]}
    if name == "llama":
        attention, forward = ("q", "k", "v", "o") if lora else ("k", "v"), ("gate", "up", "down") if lora else ("down",)
        linears = [f"self_attn.{x}_proj" for x in attention] + [f"mlp.{x}_proj" for x in forward]
        return {f"model.layers.{n}.{x}" for n in (0, 1) for x in linears}
    linears = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"] if lora else ["attn.c_attn", "mlp.c_proj"]
    return {f"transformer.h.{n}.{x}" for n in (0, 1) for x in linears}


@everywhere
def test_the_default_layers_are_replaced_and_no_others(name, method, adapter):
    model = backbone(name)
    order = [key for key, _ in model.named_modules()]
    old = {key: model.get_submodule(key) for key in expected_names(name, adapter)}
    replaced = inject(model, layer_maker(method, adapter), layers_of(adapter, model.config.model_type))
    assert set(replaced) == expected_names(name, adapter) and len(replaced) == len(set(replaced))
    assert replaced == [key for key in order if key in old]  # model order
    assert list(adapted_layers(model)) == replaced
    assert len(routers(model)) == (len(replaced) if (method, adapter) in ROUTED else 0)
    for key in replaced:
        layer, linear = model.get_submodule(key), old[key]
        assert isinstance(layer.linear, nn.Linear)
        if name != "gpt2":
            assert layer.linear is linear and layer.weight is linear.weight
        else:  # a Conv1D became a linear layer on the same memory
            assert layer.weight.shape == linear.weight.T.shape and torch.equal(layer.weight, linear.weight.T)
            assert layer.weight.data_ptr() == linear.weight.data_ptr() and layer.bias is linear.bias
        assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
        if adapter == "ia3":
            scaled_at_input = key.endswith((".wo", ".fc2", ".down_proj", ".mlp.c_proj"))
            assert layer.adapter.side == ("in" if scaled_at_input else "out")


@models
def test_a_model_prints_a_line_for_each_layer(name):
    """Blocks that are alike are printed once, as torch does: two lines of T5's, which differ in their first block."""
    printed = str(adapted(name, "mhr", "lora")).splitlines()
    mine = [line for line in printed if "MHR" in line]
    assert all(
        re.fullmatch(r" +\(\w+\): MHRLinear\(\d+ -> \d+, LoRA\(.*\), MHRRouter\(tasks=5, .*\)\)", x) for x in mine
    )
    assert len(printed) == len(str(backbone(name)).splitlines()) and max(map(len, mine)) <= 120


def test_an_unknown_family_has_no_default():
    for adapter in ("lora", "ia3"):
        with pytest.raises(ValueError, match="no layers of a model of type 'bert' are named here"):
            named_layers(adapter, "bert")


BAD_PATTERNS = {"nothing": (r".*\.query", "no layer's name matches"), "a part": (r"SelfAttention", "no layer's")}
BAD_PATTERNS |= {
    "a beginning": (r"encoder\.block\.0\.layer\.0\.Self", "no layer's name matches"),
    "an embedding": (r"shared", "layer shared is of type Embedding \\(torch\\), only linear"),
    "a linear and a norm": (r".*\.(q|layer_norm)", "layer_norm is of type T5LayerNorm \\(transformers\\), only linear"),
    "everything": (r".*", "only linear layers can be adapted"),
}


@pytest.mark.parametrize("pattern, message", BAD_PATTERNS.values(), ids=BAD_PATTERNS)
def test_a_pattern_that_does_not_fit_is_refused(pattern, message):
    model = backbone("t5")
    modules, before = dict(model.named_modules()), snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject(model, layer_maker("poly", "lora"), pattern)
    assert dict(model.named_modules()) == modules
    assert_same_state(model, before)


def test_injecting_walks_over_a_model_as_often_whatever_its_size(monkeypatch):
    """Once for each layer took most of the time on T5-XL: all its modules for each of 432 layers."""
    walk, walked, counts = nn.Module.named_modules, [], []
    monkeypatch.setattr(
        nn.Module, "named_modules", lambda of, *rest, **more: walked.append(of) or walk(of, *rest, **more)
    )
    for layers in (1, 9):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        assert len(inject(model, layer_maker("mhr", "lora"), r"\d")) == layers
        counts.append(sum(of is model for of in walked))
    assert 0 < counts[0] == counts[1]


@routed
@pytest.mark.parametrize("training", [False, True])
def test_injected_layers_are_in_the_mode_of_the_model(method, adapter, training):
    """from_pretrained returns a model in evaluation mode: there must be no noise until somebody calls .train()."""
    model = backbone("t5").train(training)
    inject(model, layer_maker(method, adapter), layers_of(adapter, "t5"))
    randomise(model)
    assert {m.training for m in model.modules()} == {training}
    outputs = [logits(model, inputs("t5"), IDS) for _ in range(2)]
    assert torch.equal(*outputs) == (not (training and noisy(method)))


@pytest.mark.parametrize("training", [False, True])
def test_unmerged_layers_are_in_the_mode_of_the_model(training):
    model = two().train(not training)
    layers = merge(model, 0)
    model.train(training)  # while merged
    unmerge(model, layers)
    assert {m.training for m in model.modules()} == {training}


@models
def test_injecting_twice_is_refused(name):
    model = adapted(name, "poly", "lora")
    modules = dict(model.named_modules())
    for pattern in (named_layers("lora", name), r".*lm_head"):
        with pytest.raises(ValueError, match="already has adapters"):
            inject(model, layer_maker("lora", "lora"), pattern)
    assert dict(model.named_modules()) == modules


BAD_HEADS = [  # heads 32 divide the first layer of each model's order but not this one
    ("t5", "lora", 5, "encoder.block.0.layer.0.SelfAttention.q", 32, 48),
    ("llama", "lora", 32, "model.layers.0.self_attn.k_proj", 32, 16),
    ("gpt2", "lora", 64, "transformer.h.0.attn.c_attn", 32, 96),
    ("llama", "ia3", 64, "model.layers.0.self_attn.k_proj", 32, 16),
]


@pytest.mark.parametrize("name, adapter, heads, layer, i, o", BAD_HEADS)
def test_heads_that_do_not_divide_a_layer_are_refused(name, adapter, heads, layer, i, o):
    model = backbone(name)
    modules, before = dict(model.named_modules()), snapshot(model)
    message = rf"layer {re.escape(layer)}: {heads} heads do not divide \d+, .*a layer of {i} inputs and {o} outputs"
    with pytest.raises(ValueError, match=message):
        inject(model, layer_maker("mhr", adapter, heads=heads), layers_of(adapter, name))
    assert dict(model.named_modules()) == modules
    assert_same_state(model, before)


# --- Slips: what is given is of another kind --------------------------------------------------------------------------

poly = lambda name, linear: PolyLinear(linear, LoRA(1), PolyRouter(TASKS, SKILLS))  # noqa: E731
bare = lambda make, pattern="a|b": inject(Two(), make, pattern)  # noqa: E731
one_argument = lambda linear: LoRALinear(linear)  # noqa: E731
NO_MODEL = "give a loaded model, such as AutoModel.from_pretrained(...), not a str"
NO_FUNCTION = "make_layer must be a function, such as lambda name, linear: LoRALinear(linear, LoRA(rank=1)), not "
FAILED = "layer a: make_layer(name, linear) failed: "
NO_LAYER = "layer a: make_layer(name, linear) must return a layer around this `linear`, which this "
SLIPS = [  # what somebody calls, and the kind and the sentence of the error
    *((lambda task=task: merge(two(), task), TypeError, f"merge takes the id of one task, an integer, not {task!r}")
      for task in ("boolq", [3], 3.0, True, None)),
    (lambda: merge(two("lora"), "boolq"), TypeError, "merge takes the id of one task, an integer, not 'boolq'"),
    (lambda: merged(two(), "boolq").__enter__(), TypeError, "merge takes the id of one task, an integer, not 'boolq'"),
    *((lambda ids=ids: task_ids(ids).__enter__(), ValueError,
       f"task ids must be a flat list of integers, one for each example, not {ids!r}")
      for ids in ("boolq", [0, "1"], 3, None, [], [[0], [1, 2]], [0.5], {"a": 1})),
    *((lambda count=count: add_tasks(two(), count), ValueError,
       f"add_tasks takes how many tasks to add, an integer of at least 1, not {count!r}")
      for count in (-1, 0, 1.5, "boolq", ["boolq"])),
    (lambda: bare(LoRA(1)), TypeError, NO_FUNCTION + "LoRA(rank=1, alpha=1.0)"),
    (lambda: bare(LoRALinear), TypeError, NO_FUNCTION + "<class 'lora.LoRALinear'>"),
    (lambda: bare("a|b", poly), TypeError, NO_FUNCTION + "'a|b'"),
    (lambda: bare(one_argument), TypeError, FAILED + "<lambda>() takes 1 positional argument but 2 were given"),
    (lambda: bare(lambda _, linear: PolyLinear(linear, PolyRouter(5, 3), LoRA(1))), TypeError,
     FAILED + "'LoRA' object has no attribute 'skills'"),
    (lambda: bare(lambda _, linear: PolyLinear(linear, LoRA(1), MHRRouter(5, 3, 4))), TypeError,
     FAILED + "MHRRouter has heads: give PolyLinear a PolyRouter, or take MHRLinear"),
    (lambda: bare(lambda name, linear: None), TypeError, NO_LAYER + "NoneType is not"),
    (lambda: bare(lambda name, linear: LoRA(1)), TypeError, NO_LAYER + "LoRA is not"),
    (lambda: bare(lambda name, linear: linear), TypeError, NO_LAYER + "Linear is not"),
    (lambda: bare(lambda name, _: poly(name, nn.Linear(8, 12))), TypeError, NO_LAYER + "PolyLinear is not"),
    (lambda: bare(poly, None), ValueError, "give a pattern, or a list of names of layers, not None"),
    (lambda: inject("gpt2", poly, "a"), TypeError, NO_MODEL),
    (lambda: freeze("gpt2"), TypeError, NO_MODEL),
    (lambda: save_adapters("a.safetensors", two()), TypeError, NO_MODEL),
    (lambda: save_adapters(Two(), "a.safetensors"), ValueError,
     "nothing to save: this model has no adapters: inject them, or unmerge those that are merged"),
    (lambda: save_adapters(two(), "no/a.safetensors"), OSError,
     "[Errno 2] cannot be written: No such file or directory: 'no/a.safetensors'"),
    (lambda: save_adapters(two(), None), TypeError, "expected str, bytes or os.PathLike object, not NoneType"),
    (lambda: load_adapters(two(), "a.safetensors"), ValueError,
     "a.safetensors is no whole safetensors file: No such file or directory: a.safetensors"),
    (lambda: inject_module.check(Two(), lambda: None), ValueError,
     "nothing to check: this model has no adapters, inject them first"),
    (lambda: inject_module.check(two(), {}), TypeError,
     "check takes a function, such as lambda: model(**batch), not a dict"),
    (lambda: named_layers("lorra", "t5"), ValueError,
     "no set of layers is called 'lorra': choose lora, ia3, light, attention, self-attention"),
    (lambda: LoRA("1"), ValueError, "rank must be an integer of at least 1, not '1'"),
    (lambda: PolyRouter(["boolq"], 8), ValueError,
     "the sizes of a router must be integers of at least 1, not (['boolq'], 8)"),
    (lambda: MHRRouter(5, 8, 0.5), ValueError, "the sizes of a router must be integers of at least 1, not (5, 8, 0.5)"),
    (lambda: FixedRouter([[1, 0]]), TypeError, "give FixedRouter a tensor, torch.tensor(table), not a list"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, sentence", SLIPS)
def test_a_slip_gets_one_sentence(call, kind, sentence, tmp_path, monkeypatch):
    """And leaves no file behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == sentence
    assert not os.listdir(tmp_path)


def test_adapters_are_not_saved_as_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot be written: Is a directory: '.*folder'"):
        save_adapters(two(), str(tmp_path / "folder"))
    assert os.listdir(tmp_path) == ["folder"]


def test_a_slip_in_make_layer_leaves_the_model_unchanged():
    model = Two()
    before = dict(model.named_modules())
    for make in (lambda name, linear: poly(name, linear) if name == "a" else None, lambda linear: linear, LoRALinear):
        with pytest.raises(TypeError):
            inject(model, make, "a|b")
        assert dict(model.named_modules()) == before


def test_a_model_that_is_none_of_the_known_has_no_named_layers():
    with pytest.raises(ValueError, match="no layers of a model of type None are named here"):
        pattern_of("lora", Two())


# --- Which layers share a router --------------------------------------------------------------------------------------

# Routers of a model of two layers, or two and two, by granularity and by hand. T5: 7 linears in 2 sub-layers of the
# encoder's blocks, 11 in 3 of the decoder's. BART, by default self-attention alone: 4 in 1.
ROUTER_NUMBERS = {"t5": (36, 10, 4, 2, 1), "bart": (16, 4, 4, 2, 1), "llama": (14, 4, 2, 1, 1), "gpt2": (8, 4, 2, 1, 1)}
SHARING = [(n, g, number) for n in NAMES for g, number in zip(GRANULARITIES, ROUTER_NUMBERS[n], strict=True)]


def shared(name: str, method: str, granularity: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = backbone(name)
    small = dict(skills=SKILLS, heads=HEADS, rank=RANK, density=0.2, granularity=granularity)
    add_adapters(model, train.Config(method=method, **small), TASKS, torch.eye(TASKS, SKILLS) + 0.1)
    randomise(model)
    return model


@sweep(
    "name, granularity, number, method",
    [(*case, method) for case in SHARING for method in ("poly", "mhr", "hyperformer")],
    lambda *case: case[3] == "mhr" or case[0] == "t5" and case[1] in ("layer", "model"),
)
def test_granularity(name, granularity, number, method, tmp_path):
    """So many routers, each Z saved once; loaded, they are shared as before; a mixed batch stays right."""
    path, batch = str(tmp_path / "x"), inputs(name)
    model, other = (shared(name, method, granularity, seed) for seed in (0, 1))
    assert len(routers(model)) == number
    expected = logits(model, batch, IDS)
    apart = torch.cat([logits(model, row(batch, k), [IDS[k]]) for k in range(4)])
    assert difference(expected, apart) < CLOSE
    save_adapters(model, path)
    with safe_open(path, "pt") as file:
        assert sum(key.endswith(".router.Z") for key in file.keys()) == number
    assert not torch.equal(logits(other, batch, IDS), expected)
    load_adapters(other, path)
    assert len(routers(other)) == number and torch.equal(logits(other, batch, IDS), expected)
    finer = GRANULARITIES[max(0, GRANULARITIES.index(granularity) - 1)]
    if len(routers(fine := shared(name, method, finer, 0))) > number:
        with pytest.raises(ValueError, match="only in the model"):
            load_adapters(fine, path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", ["private", "expert", "adapter-soup"])
def test_a_table_that_is_given_is_one_for_all_layers(method, granularity):
    assert len(routers(shared("t5", method, granularity, 0))) == 1


# --- The papers' parameter counts -------------------------------------------------------------------------------------

LIGHT = r".*\.(SelfAttention|EncDecAttention|DenseReluDense)\.(k|v|wi_1)"
CROSS = r".*\.(self_attn|encoder_attn)\.(q|k|v|out)_proj"
COUNTS = [  # backbone, method, settings, layers, number of adapted layers, trained parameters
    ("t5-xl", "mhr", dict(tasks=1, skills=8, rank=1, heads=64), None, 432, 17_694_720 + 221_184),
    ("t5-xl", "ia3", {}, None, 192, 540_672),
    ("t5-xl", "ia3", {}, LIGHT, 192, 540_672),  # the authors' place of the third vector
    ("bart-large", "lora", dict(rank=16), None, 96, 3_145_728),
    ("bart-large", "lora", dict(rank=16), CROSS, 144, 4_718_592),
]


@pytest.mark.parametrize("sizes, method, options, layers, number, trained", COUNTS)
def test_parameter_counts_of_the_papers(sizes, method, options, layers, number, trained):
    """Adapted layers and trained parameters; `test_counts.py` has the whole table."""
    adapter = "ia3" if method == "ia3" else "lora"
    with torch.device("meta"):
        if sizes == "bart-large":
            model = BartForConditionalGeneration(BartConfig())  # the default configuration
        else:
            xl = dict(d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=24, vocab_size=32128)
            model = T5ForConditionalGeneration(
                T5Config(**xl, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
            )
    freeze(model)
    layers = layers or named_layers(adapter, model.config.model_type)
    assert len(inject(model, layer_maker(method, adapter, **options), layers)) == number
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in adapter_parameters(model).values()) == trained


# --- Particular models ------------------------------------------------------------------------------------------------


def test_scaling_the_input_of_wo_equals_scaling_the_output_of_wi_1():
    """(IA)^3 on T5: our place of the feed-forward vector and the authors'."""
    ours, theirs, batch = backbone("t5"), backbone("t5"), inputs("t5")
    inject(ours, lambda name, linear: IA3Linear(linear, IA3("in")), r".*\.wo")
    inject(theirs, lambda name, linear: IA3Linear(linear, IA3("out")), r".*\.wi_1")
    randomise(ours)
    for x, y in zip(adapted_layers(ours).values(), adapted_layers(theirs).values(), strict=True):
        y.params["v"].data.copy_(x.params["v"])
    with torch.no_grad():
        expected = theirs(**batch).logits
        assert difference(ours(**batch).logits, expected) < CLOSE
        assert difference(backbone("t5")(**batch).logits, expected) > 0.05


@sweep(
    "method, adapter, dtype",
    [(*kind, dtype) for kind in SINGLE + ROUTED for dtype in (torch.bfloat16, torch.float16)],
    lambda *case: case[2] == torch.bfloat16 and quick("t5", *case[:2]) or case[:2] == ("mhr", "lora"),
)
def test_t5_in_half_precision_with_wo_in_float32(method, adapter, dtype, tmp_path):
    """T5 reads `self.wo.weight` in its forward, to turn its input into the type of that weight."""
    assert "wo" in T5ForConditionalGeneration._keep_in_fp32_modules
    expected = logits(adapted("t5", method, adapter), inputs("t5"), IDS)
    backbone("t5").save_pretrained(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    for key, module in model.named_modules():
        if key.endswith(".wo"):
            module.float()  # transformers does so itself for some half types
    freeze(model)
    torch.manual_seed(0)
    inject(model, layer_maker(method, adapter), layers_of(adapter, "t5"))
    randomise(model)
    model.eval()
    own = adapter_parameters(model)
    kinds = {key: p.dtype for key, p in model.named_parameters() if key not in own}
    assert all(kind == (torch.float32 if ".wo." in key else dtype) for key, kind in kinds.items())
    assert {torch.float32, dtype} == set(kinds.values())
    y = logits(model, inputs("t5"), IDS)
    assert y.dtype == dtype
    assert difference(y.float(), expected) < (0.03 if dtype == torch.float16 else 0.2)  # other tasks: about 1
    grads = gradients(model, inputs("t5"), IDS)
    assert grads.keys() == {key for key, p in own.items() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in own.values() if p.is_floating_point())
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads.values())


@every_method
def test_merging_in_bfloat16_rounds_once(method, adapter):
    model = backbone("llama").to(torch.bfloat16)
    inject(model, layer_maker(method, adapter), layers_of(adapter, "llama"))
    randomise(model)
    exact = copy.deepcopy(model).float()
    merge(model, 0), merge(exact, 0)
    for key, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact.state_dict()[key].to(torch.bfloat16)), key


# --- Copies -----------------------------------------------------------------------------------------------------------


@routed_everywhere
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_keep_working_and_are_independent(name, method, adapter, duplicate):
    model, batch = adapted(name, method, adapter), inputs(name)
    expected = logits(model, batch, IDS)
    twin = duplicate(model)
    assert torch.equal(logits(twin, batch, IDS), expected)
    with pytest.raises(RuntimeError, match="with task_ids"):
        twin(**batch)
    randomise(twin)
    assert difference(logits(twin, batch, IDS), expected) > 0.05
    assert torch.equal(logits(model, batch, IDS), expected)


@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_a_shared_router_is_one_z_with_the_sum_of_gradients(method, duplicate):
    router = PolyRouter(TASKS, SKILLS) if method == "poly" else MHRRouter(TASKS, SKILLS, HEADS)
    apart = two(method)
    apart.b.router.Z.data.copy_(apart.a.router.Z)
    shared = two(method, router=router)
    for mine, other in zip(adapted_layers(shared).values(), adapted_layers(apart).values(), strict=True):
        mine.load_state_dict(other.state_dict())
    shared = duplicate(shared)
    assert shared.a.router is shared.b.router and len(routers(shared)) == 1
    assert [key for key in adapter_parameters(shared) if key.endswith("Z")] == ["a.router.Z"]
    x = torch.randn(4, 3, 8)
    with task_ids(IDS):
        assert difference(shared(x), apart(x)) < CLOSE  # one batched product or two: they round differently
        shared(x).square().sum().backward()
        apart(x).square().sum().backward()
    one, other = apart.a.router.Z.grad, apart.b.router.Z.grad
    assert one.abs().max() > 0 and other.abs().max() > 0
    assert difference(shared.a.router.Z.grad, one + other) < CLOSE


def test_the_example_of_the_docstring(tmp_path):
    """The commands at the top of inject.py, on a T5 with the sizes of the tests."""
    model, batch, path = backbone("t5"), inputs("t5"), str(tmp_path / "adapter.safetensors")
    scope = dict(vars(inject_module)) | dict(
        PolyLinear=PolyLinear, LoRA=LoRA, PolyRouter=PolyRouter, LORA_LAYERS=LORA_LAYERS
    )
    lines = [line[4:] for line in inject_module.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 6
    code = "\n".join(lines).replace('"adapter.safetensors"', repr(path))
    exec(code, scope | dict(model=model, batch=batch))
    assert os.path.exists(path) and len(adapted_layers(model)) == 36
    assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_a_layer_with_one_adapter_takes_given_parameters():
    """What mu needs: an injected single adapter with the values of another."""
    source, model, x = two("lora"), Two(), torch.randn(2, 3, 8)
    model.load_state_dict({key.replace(".linear", ""): v for key, v in source.state_dict().items() if "linear" in key})
    given = {key: dict(layer.params) for key, layer in adapted_layers(source).items()}
    inject(model, lambda name, linear: LoRALinear(linear, LoRA(RANK), given[name]), "a|b")
    assert torch.equal(model(x), source(x))
