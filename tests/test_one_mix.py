"""One mix for all layers of a model: the numbers of each layer by itself, in few operations, in any kind of call."""

import asyncio
import contextlib
import copy
import pickle
import random
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

import inject as inject_module
import train
from inject import (
    adapted_layers, adapter_parameters, compiled, freeze, inject, merged, mix_all, remember, routers, task_ids,
)  # fmt: skip
from layers import LORA_LAYERS
from lora import LoRA, LoRALinear
from mhr import MHRLinear, MHRRouter
from poly import PolyLinear, PolyRouter
from tests.helpers import (
    HEADS, IDS, NAMES, ROUTED, SKILLS, TASKS, adapted, backbone, difference, gradients, inputs, layer_maker, layers_of,
    logits, randomise,
)  # fmt: skip
from train import make_optimizer

OTHER = [2, 2, 1, 0]
CLOSE, GRADIENTS_CLOSE = dict(rtol=1e-5, atol=1e-5), dict(rtol=1e-4, atol=1e-4)
WHOLE = dict(fullgraph=True, backend="eager")
NOT_REENTRANT = dict(gradient_checkpointing_kwargs={"use_reentrant": False})
some_ids = st.lists(st.integers(0, TASKS - 1), min_size=1, max_size=6)
noisy = pytest.mark.parametrize("method, adapter", [("poly", "ia3"), ("mhr", "lora"), ("mhr", "sft")])


class Chain(nn.Module):
    """Four linear layers, from 8 features to 12 and back, twice. call: how each is called."""

    call = staticmethod(lambda block, x: block(x))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in [(8, 12), (12, 8)] * 2)

    def forward(self, x):
        for layer in self.layers:
            x = self.call(lambda x, layer=layer: torch.tanh(layer(x)), x)
        return x


def chain(method="mhr", adapter="lora", **options) -> Chain:
    torch.manual_seed(0)
    model = Chain()
    freeze(model)
    inject(model, layer_maker(method, adapter, **options), r"layers\.\d")
    randomise(model)
    return model.eval()


def draw(model: nn.Module, noise: bool = True) -> nn.Module:
    """The model with its routers in training mode or not, whatever its own."""
    for router in routers(model):
        router.train(noise)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in adapter_parameters(model).values() if p.requires_grad]


def results(model: nn.Module, x, ids, call=None) -> list[torch.Tensor]:
    """The output for x and the gradients of its square, with the same noise at every call."""
    torch.manual_seed(1)
    with task_ids(ids):
        y = (call or model)(x)
        return [y, *torch.autograd.grad(y.square().sum(), trained(model))]


def now(ids):
    """What the context of these ids says."""
    with task_ids(ids):
        return inject_module._ids.get()


def watch(model: nn.Module) -> list[tuple[nn.Module, dict]]:
    """A list to which every call of a routed layer adds (the layer, its mixture)."""
    seen = []
    for layer in adapted_layers(model).values():
        layer.register_forward_pre_hook(lambda m, _, kwargs: seen.append((m, kwargs["params"])), with_kwargs=True)
    return seen


# --- Few operations ---------------------------------------------------------------------------------------------------

VIEWS = set(
    "view _unsafe_view t transpose permute unsqueeze squeeze expand slice select alias as_strided detach unbind split "
    "split_with_sizes reshape lift_fresh".split()
)


class Operations(TorchDispatchMode):
    """The operations that torch dispatches, by name, without those that move no data."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        self.names[name] += name not in VIEWS
        return f(*args, **(kwargs or {}))


def operations(make_layer, ids, layers=6, dtype=torch.float32, after=lambda model: None) -> tuple[Counter, int]:
    """Those of a forward and backward pass of a T5 beyond the frozen backbone's, and the number of its adapted layers.

    after(model): counted too, behind the backward pass, where there are adapters.
    """
    counts = []
    for make in (None, make_layer):
        config = T5Config(
            vocab_size=128, d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=layers, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config).to(dtype).train()
        freeze(model)
        if make:
            inject(model, make, LORA_LAYERS["t5"])
        else:  # gradients pass through all of a frozen backbone if its inputs want them
            for part in (model.encoder, model.decoder):
                part.embed_tokens.register_forward_hook(lambda _, args, y: y.detach().requires_grad_())
        batch = dict(input_ids=torch.randint(3, 128, (16, 8)), labels=torch.randint(3, 128, (16, 4)), use_cache=False)
        with task_ids(ids), Operations() as seen:
            model(**batch).loss.backward()
            if make:
                after(model)
        counts.append(seen.names)
    counts[1].subtract(counts[0])
    return counts[1], len(adapted_layers(model))


MAKE = {
    "lora": lambda _, linear: LoRALinear(linear, LoRA(1)),
    "poly": lambda _, linear: PolyLinear(linear, LoRA(1), PolyRouter(16, 8)),
    **{h: lambda _, linear, h=h: MHRLinear(linear, LoRA(1), MHRRouter(16, 8, h)) for h in (1, 8, 64)},
}


@pytest.mark.parametrize("ids", [list(range(16)), [3] * 16], ids=["16-tasks", "one-task"])
def test_a_routed_layer_costs_two_operations_more_than_lora(ids):
    cost = {}
    for name, make in MAKE.items():
        names, layers = operations(make, ids)
        cost[name] = names.total() / layers
    assert layers == 6 * 7 + 6 * 11 and 5 < cost["lora"] <= 7
    assert all(value <= cost["lora"] + 2 for value in cost.values()), cost


@pytest.mark.parametrize("name", ["poly", 1, 8, 64])
def test_a_step_of_the_t0_recipe_costs_few_operations(name):
    """All of it, as `train.py` takes it: forward, backward, clipping, Adafactor. The state is there before."""

    def clip_and_step(model):
        cfg = train.Config(lr=1e-3, lr_z=1e-1, optimizer="adafactor", scale_parameter=True)
        optimizer, grads = make_optimizer(model, cfg), [p.grad for p in trained(model)]
        with _disable_current_modes():  # not counted: an earlier step
            optimizer.step()
        assert all(g is p.grad for g, p in zip(grads, trained(model), strict=True))
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()

    names, layers = operations(MAKE[name], list(range(16)), after=clip_and_step)
    assert 7 < names.total() / layers <= 12, names.total() / layers


@pytest.mark.parametrize("name", ["poly", 8])
def test_a_mixture_is_cast_once(name):
    """To the backbone's bfloat16, in a number of operations that does not depend on the number of layers."""
    casts = [operations(MAKE[name], list(range(16)), layers, torch.bfloat16)[0]["_to_copy"] for layers in (1, 3)]
    assert casts[0] == casts[1] > 0
    model = Chain().bfloat16()
    inject(model, layer_maker("poly" if name == "poly" else "mhr", "lora"), r"layers\.\d")
    assert {p.dtype for p in trained(model)} == {torch.float32}
    seen = watch(model)
    with task_ids(IDS):
        model(torch.randn(4, 3, 8).bfloat16())
    assert {p.dtype for _, params in seen for p in params.values()} == {torch.bfloat16}


# --- The same numbers -------------------------------------------------------------------------------------------------

kind = st.tuples(
    st.sampled_from(sorted({method for method, _ in ROUTED})),
    st.sampled_from(["lora", "ia3", "sft"]),
    st.sampled_from([(8, 12), (12, 8), (8, 8)]),
    st.sampled_from([None, 1, 2]),  # which of the method's shared routers; None: its own
    st.booleans(),  # whether the router is frozen
)


@given(kinds=st.lists(kind, min_size=1, max_size=8), ids=some_ids, seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_all_at_once_equals_each_by_itself(kinds, ids, seed):
    """Layers of several shapes with several kinds of routers, own, shared and frozen: mixtures and gradients."""
    torch.manual_seed(seed)
    model, shared = nn.ModuleDict(), {}
    for k, (method, adapter, (i, o), which, _) in enumerate(kinds):
        layer = layer_maker(method, adapter, router=shared.get((method, which)))(str(k), nn.Linear(i, o))
        if which:
            shared[method, which] = layer.router
        model[str(k)] = layer
    randomise(model.eval())
    for layer, (*_, frozen) in zip(model.values(), kinds, strict=True):
        layer.router.requires_grad_(layer.router.Z.requires_grad and not frozen)
    together = mix_all(list(model.values()), now(ids))
    apart = {layer: layer.adapters(now(ids).tasks, now(ids).rows) for layer in model.values()}
    grads = []
    for mixed in (together, apart):
        weighted = [torch.linspace(1, 2, p.numel()).view_as(p) * p for m in mixed.values() for p in m.values()]
        grads.append(torch.autograd.grad(sum(p.sum() for p in weighted), trained(model), materialize_grads=True))
    assert_close(list(together.values()), list(apart.values()), **CLOSE)
    assert_close(*grads, **GRADIENTS_CLOSE)


@given(ids=some_ids)
@settings(max_examples=20, deadline=None)
def test_mixtures_by_a_loop(ids):
    """MHR with LoRA, from the papers' sums: by layer, example, head and skill."""
    model = chain()
    for layer, mixed in mix_all(list(model.layers), now(ids)).items():
        for k, task in enumerate(ids):
            on = torch.sigmoid(layer.router.Z[task])
            for name, axis in (("A", 0), ("B", 1)):
                skills = [p.chunk(HEADS, axis) for p in layer.inventory[name]]
                blocks = [sum(on[h, s] / on[h].sum() * skills[s][h] for s in range(SKILLS)) for h in range(HEADS)]
                assert_close(mixed[name].expand(len(ids), -1, -1)[k], torch.cat(blocks, axis), **CLOSE)


@pytest.mark.parametrize(
    "name, method, adapter", [("t5", "mhr", "lora"), ("gpt2", "poly", "ia3"), ("bart", "mhr", "sft")]
)
def test_a_layer_called_outside_its_model_equals_its_part(name, method, adapter):
    model, calls = adapted(name, method, adapter), []
    hooks = [m.register_forward_hook(lambda *call: calls.append(call)) for m in adapted_layers(model).values()]
    logits(model, inputs(name), IDS)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(hooks)
    with torch.no_grad(), task_ids(IDS):
        for layer, args, y in calls:
            assert_close(layer(*args), y, **CLOSE)


# --- Noise ------------------------------------------------------------------------------------------------------------


@noisy
def test_every_call_draws_afresh_and_examples_of_a_task_share(method, adapter):
    model, x = draw(chain(method, adapter)), torch.randn(4, 3, 8)
    seen, leaf = watch(model), {"lora": "A", "ia3": "v", "sft": "value"}[adapter]
    with task_ids([3, 0, 3, 3]):
        model(x), model(x)
    for (layer, one), (same, other) in zip(seen[:4], seen[4:], strict=True):
        assert layer is same and not torch.isclose(one[leaf], other[leaf]).all(-1).any()
        assert torch.equal(one[leaf][0], one[leaf][2]) and torch.equal(one[leaf][0], one[leaf][3])


@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_routers_draw_independently_and_a_shared_one_once(monkeypatch, method):
    """Weights of 400 tasks with logits of 0: uncorrelated between routers, equal for all layers of one router."""
    one = PolyRouter(400, SKILLS) if method == "poly" else MHRRouter(400, SKILLS, HEADS)
    for router, expected, off in ((None, torch.eye(4), 0.15), (one, torch.ones(4, 4), 1e-5)):
        model, weights = draw(chain(method, router=router, tasks=400)), {}
        for own in routers(model):
            nn.init.zeros_(own.Z)
        kind = type(model.layers[0])
        groups = {same[0]: same for same in inject_module._alike(model.layers, inject_module._kind_of_layer)}

        def mix(self, w, inventory, own=kind.mix, groups=groups, weights=weights):
            weights.update(zip(groups[self], w, strict=True))
            return own(self, w, inventory)

        with monkeypatch.context() as patch, task_ids(range(400)):
            patch.setattr(kind, "mix", mix)
            model(torch.randn(400, 8))
        w = torch.stack([weights[layer].flatten() for layer in model.layers])
        assert_close(torch.corrcoef(w), expected, rtol=0, atol=off)


@noisy
def test_parts_draw_what_the_whole_draws(method, adapter):
    model, x, ids = draw(chain(method, adapter)), torch.randn(6, 3, 8), [4, 0, 0, 2, 4, 1]
    whole, *_ = results(model, x, ids)
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        torch.manual_seed(1)
        with task_ids(ids[part], among=ids):
            assert_close(model(x[part]), whole[part], **CLOSE)


@noisy
def test_kept_mixtures_are_the_same_in_all_calls(method, adapter):
    """Also if routers draw, and the encoder is called first, by itself; another context draws anew."""
    model, batch = draw(adapted("t5", method, adapter)), inputs("t5")
    seen, layers, outputs = watch(model), len(adapted_layers(model)), []
    for _ in range(2):
        seen.clear()
        with torch.no_grad(), task_ids(IDS, keep=True):
            hidden = model.encoder(batch["input_ids"], batch["attention_mask"])[0]
            outputs += [model(**batch).logits, model(**batch).logits]
            assert torch.equal(model.encoder(batch["input_ids"], batch["attention_mask"])[0], hidden)
        mixtures = {}
        assert all(mixtures.setdefault(layer, params) is params for layer, params in seen)
        assert len(mixtures) == layers and len(seen) > 2 * layers
    assert torch.equal(outputs[0], outputs[1]) and difference(outputs[0], outputs[2]) > 1e-3


PARTS = {"t5": ["encoder"], "bart": ["model", "model.encoder"], "llama": ["model"], "gpt2": ["transformer"]}


@pytest.mark.parametrize("name, path", [(name, path) for name in NAMES for path in PARTS[name]])
def test_a_part_called_by_itself_mixes_once_and_draws_afresh(monkeypatch, name, path):
    model, x, mixes = draw(adapted(name, "mhr", "lora")), inputs(name)["input_ids"], []
    monkeypatch.setattr(inject_module, "mix_all", lambda layers, ids: mixes.append(layers) or mix_all(layers, ids))
    part = model.get_submodule(path)
    with task_ids(IDS), torch.no_grad():
        assert difference(part(x)[0], part(x)[0]) > 1e-3
    assert mixes == [list(adapted_layers(part).values())] * 2


# --- Layers that are computed again in the backward pass --------------------------------------------------------------

WHERE = pytest.mark.parametrize("where", ["inside", "outside", "thread", "thread-inside"])


def all_gradients(model, loss_of, where: str) -> list[torch.Tensor]:
    """Of everything trained; the backward pass is inside the context of IDS or outside, in this thread or another."""
    torch.manual_seed(1)
    model.zero_grad()
    with ThreadPoolExecutor(1) as pool:
        run = (lambda f: pool.submit(f).result()) if "thread" in where else (lambda f: f())
        with task_ids(IDS):
            loss = loss_of(model)
            if "inside" in where:
                run(loss.backward)
        if "inside" not in where:
            run(loss.backward)
    return [p.grad for p in trained(model)]


@WHERE
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_in_any_place(name, where):
    """Enabled before injection, or after it and a first step, with noise: the gradients without it."""
    loss, grads = lambda model: model(**inputs(name), use_cache=False).loss, []
    for when in ("never", "before", "after"):
        model = backbone(name).train()
        if when == "before":
            model.gradient_checkpointing_enable(**NOT_REENTRANT)
        freeze(model)
        torch.manual_seed(0)
        inject(model, layer_maker("mhr", "lora"), layers_of("lora", name))
        randomise(model)
        if when == "after":
            all_gradients(model, loss, where)
            model.gradient_checkpointing_enable(**NOT_REENTRANT)
        grads.append(all_gradients(model, loss, where))
    assert_close([grads[0]] * 2, grads[1:], **GRADIENTS_CLOSE)


@WHERE
@noisy
def test_remember_in_a_model_of_ones_own(method, adapter, where):
    model, x = draw(chain(method, adapter)), torch.randn(4, 3, 8)
    seen, loss = watch(model), lambda model: model(x).square().sum()
    plain = all_gradients(model, loss, where)
    seen.clear()
    model.call = lambda block, x: checkpoint(remember(block), x, use_reentrant=False)
    assert_close(all_gradients(model, loss, where), plain, **GRADIENTS_CLOSE)
    assert len(seen) == 8 and {id(m) for _, m in seen[:4]} == {id(m) for _, m in seen[4:]}
    model.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
    sentence = r"computed again in a backward .*checkpoint\(inject.remember\(function\), \.\.\., use_reentrant=False\)"
    with pytest.raises(RuntimeError, match=sentence):
        all_gradients(model, loss, where)


# --- Calls that end early ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("ids, part", [(IDS, False), (OTHER, False), (OTHER, True)], ids=["same", "other", "part"])
def test_a_call_after_one_that_was_interrupted(error, ids, part):
    """Inside the context of the first or after it, for the same or other ids: its own ids, and noise of its own."""
    model, batch = draw(adapted("t5", "mhr", "lora")), inputs("t5")

    def result():
        torch.manual_seed(5)
        return model.encoder(batch["input_ids"])[0] if part else model(**batch).logits

    def stop(*_):
        raise error

    with task_ids(ids):
        expected = result()
    with task_ids(IDS):
        for inside in (True, False):
            hook = model.encoder.block[1].register_forward_pre_hook(stop)
            with pytest.raises(error):
                model(**batch)
            hook.remove()
            assert error is KeyboardInterrupt or inject_module._thread.now is None
            if inside and ids is IDS:
                assert torch.equal(result(), expected)
            elif inside:
                with task_ids(ids):
                    assert torch.equal(result(), expected)
    assert inject_module._thread.now is None
    with task_ids(ids):
        assert torch.equal(result(), expected)
    with pytest.raises(RuntimeError, match="without task ids"):
        model(**batch)


@torch.no_grad()
def test_the_innermost_context_counts_within_a_call_too():
    model, x = chain(), torch.randn(4, 3, 8)

    def call(block, x):
        with task_ids(OTHER):
            return block(x)

    with task_ids(OTHER):
        expected = model(x)
    model.call = call
    with task_ids(IDS):
        assert_close(model(x), expected)


class Outer(nn.Module):
    """A model that calls another one, with routed layers of its own, in the middle of its forward pass."""

    call = staticmethod(lambda block, x: block(x))

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), chain("poly"), nn.Linear(8, 8)

    def forward(self, x):
        x = self.call(self.first, x)
        return self.call(self.last, x + self.inner(x))


def test_a_model_that_calls_another_one():
    """Each was injected by itself; all layers are given a mixture, under checkpointing too."""
    torch.manual_seed(3)
    outer, x = Outer(), torch.randn(4, 3, 8)
    inner, outer.inner = outer.inner, nn.Identity()  # `inject` refuses a model that has adapters
    inject(outer, layer_maker("mhr", "lora"), "first|last")
    outer.inner = inner
    randomise(outer)
    seen, plain = watch(draw(outer.eval())), all_gradients(outer, lambda m: m(x).square().sum(), "outside")
    assert len(seen) == 6
    outer.call = lambda block, x: checkpoint(remember(block), x, use_reentrant=False)
    assert_close(all_gradients(outer, lambda m: m(x).square().sum(), "outside"), plain, **GRADIENTS_CLOSE)
    assert inject_module._thread.now is None


# --- Threads, and tasks of asyncio ------------------------------------------------------------------------------------


def test_threads_have_ids_of_their_own():
    """Eight at once on one model, with checkpointing: outputs and gradients of each alone."""
    model, batch, start = draw(adapted("t5", "mhr", "lora").train(), False), inputs("t5"), threading.Barrier(8)
    model.gradient_checkpointing_enable(**NOT_REENTRANT)

    def run(seed: int):
        with task_ids(torch.randint(TASKS, (4,), generator=torch.Generator().manual_seed(seed))):
            output = model(**batch, use_cache=False)
        return [output.logits, *torch.autograd.grad(output.loss, trained(model))]

    def together(seed: int):
        start.wait()
        return [run(seed) for _ in range(3)]

    alone = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(together, range(8)), alone, strict=True):
            assert_close(got, [expected] * 3)
    assert difference(alone[0][0], alone[1][0]) > 0.05


def test_tasks_of_asyncio_have_ids_of_their_own():
    model, x = chain(), torch.randn(1, 3, 8)

    async def run(task: int):
        with task_ids([task]):
            await asyncio.sleep(0)
            one = model(x)
            await asyncio.sleep(0.001)
            return one, model(x)

    async def together():
        return await asyncio.gather(*(run(k % TASKS) for k in range(50)))

    alone = [asyncio.run(run(k))[0] for k in range(TASKS)]
    for k, pair in enumerate(asyncio.run(together())):
        assert all(torch.equal(y, alone[k % TASKS]) for y in pair)


# --- Compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, adapter", [("poly", "ia3"), ("mhr", "lora"), ("mhr", "sft"), ("hyperformer", "lora")])
@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointing"])
def test_one_graph_for_all_ids(method, adapter, again):
    """Of any number of distinct tasks: outputs and gradients of eager mode."""
    model, x, graphs, numbers = chain(method, adapter), torch.randn(6, 3, 8), [], random.Random(0)
    call = compiled(lambda x: model(x), model, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)
    if again:
        model.call = lambda block, x: checkpoint(remember(block), x, use_reentrant=False)
    for k in range(20):
        ids = numbers.choices(range(1 + k % TASKS), k=6)
        assert_close(results(model, x, ids, call), results(model, x, ids), **GRADIENTS_CLOSE)
    assert len(graphs) == 1
    with pytest.raises(IndexError, match=f"task id {TASKS} is out of range: this model knows tasks 0 .. {TASKS - 1}"):
        results(model, x, [TASKS] + [0] * 5, call)
    with pytest.raises(RuntimeError, match="without task ids"):
        call(x)


def test_a_checkpointed_model_compiles_whole():
    model, batch = draw(adapted("llama", "mhr", "lora").train(), False), inputs("llama")
    model.gradient_checkpointing_enable(**NOT_REENTRANT)
    model.disable_input_require_grads()  # its hook cannot be traced
    loss = lambda _: model(**batch, use_cache=False).loss  # noqa: E731
    call = compiled(loss, model, fullgraph=True, backend="aot_eager")
    assert_close(results(model, None, IDS, call), results(model, None, IDS, loss), **GRADIENTS_CLOSE)


def test_a_process_may_compile_many_models():
    """More than the times that dynamo compiles one function."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            model, x = chain("poly", "ia3"), torch.randn(4, 3, 8)
            results(model, x, IDS, compiled(lambda x, model=model: model(x), model, **WHOLE))


def test_a_model_without_routers_compiles_as_any_other():
    model, x = chain("lora", "lora"), torch.randn(4, 3, 8)
    for call in (compiled(lambda x: model(x), model, **WHOLE), torch.compile(model, **WHOLE)):
        assert_close(call(x), model(x))


class Masked(PolyRouter):
    """A router that leaves a skill out: a number of its own that is no parameter."""

    def __init__(self, out: int):
        super().__init__(TASKS, SKILLS)
        self.register_buffer("mask", torch.arange(SKILLS) != out)

    def forward(self, tasks, sample=None, Z=None):
        return super().forward(tasks, sample, Z) * self.mask


class Scaled(PolyLinear):
    """A layer with a setting of its own, which its mixture depends on."""

    def mix(self, w, inventory=None):
        return {name: p * self.scale for name, p in super().mix(w, inventory).items()}


def scaled(linear: nn.Module, scale) -> Scaled:
    layer = Scaled(linear, LoRA(2), PolyRouter(TASKS, SKILLS))
    layer.scale = scale
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda k, linear: PolyLinear(linear, LoRA(2), Masked(k % SKILLS)),
        lambda k, linear: MHRLinear(linear, LoRA(2), MHRRouter(TASKS, SKILLS, heads=(1, 2, 4, 4)[k])),
        lambda k, linear: scaled(linear, k + 1.0),
        lambda k, linear: scaled(linear, torch.tensor(k + 1.0)),
    ],
    ids=["a buffer", "heads", "a setting", "a setting that has no hash"],
)
def test_layers_and_routers_that_differ_are_not_mixed_as_one(make):
    """Each gives what it gives by itself."""
    model, x, numbers = Chain(), torch.randn(4, 3, 8), iter(range(4))
    freeze(model)
    inject(model, lambda name, linear: make(next(numbers), linear), r"layers\.\d")
    randomise(model.eval())
    with task_ids(IDS):
        got = model(x)
    for layer in model.layers:
        x = torch.tanh(layer(x, torch.tensor(IDS)))
    assert_close(got, x, **CLOSE)


def test_a_hook_of_a_router_is_called():
    model, seen = chain(), []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, w: seen.append(module))
    with task_ids(IDS):
        model(torch.randn(4, 3, 8))
    assert seen == routers(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ids_are_not_held_by_a_graph_that_outlives_them():
    """torch.export and torch.jit.trace would serve the ids of their example for good; a merged model has none."""
    model, x = chain(), torch.randn(4, 3, 8)
    for export in (lambda m: torch.export.export(m, (x,)), lambda m: torch.jit.trace(m, (x,))):
        with (
            task_ids(IDS),
            pytest.raises(RuntimeError, match="would hold these task ids for good: merge one task first"),
        ):
            export(model)
        with merged(model, 1):
            export(model)


@noisy
def test_a_whole_model_that_is_computed_again_has_its_own_ids(method, adapter):
    """`remember` around a call of the model itself: the backward pass may be in another context, or in none."""
    model, x = chain(method, adapter), torch.randn(4, 3, 8)
    expected = results(model, x, IDS)[1:]
    for around in (lambda: task_ids(IDS), lambda: task_ids([1, 1, 0, 0]), contextlib.nullcontext):
        with task_ids(IDS):
            loss = checkpoint(remember(lambda x: model(x).square().sum()), x, use_reentrant=False)
        with around():
            assert_close(list(torch.autograd.grad(loss, trained(model))), expected, **GRADIENTS_CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_that_is_computed_again_without_remembering_is_an_error(reentrant):
    """It would have the ids of the context of the backward pass."""
    model, x = chain(), torch.randn(4, 3, 8, requires_grad=True)
    with task_ids(IDS):
        loss = checkpoint(lambda x: model(x).square().sum(), x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=r"computed again in a backward .*checkpoint\(inject.remember"):
            loss.backward()
        call = compiled(lambda x: model(x).square().sum(), model, backend="eager")
        loss = checkpoint(call, x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=r"computed again in a backward .*checkpoint\(inject.remember"):
            loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_ids_that_are_given_in_the_backward_pass_are_known(reentrant):
    """By what is computed again, or by a hook that calls the model; and one adapter for all needs none."""
    model, x = chain(), torch.randn(4, 3, 8, requires_grad=True)
    expected, seen = results(model, x, IDS)[1:], []

    def within(x):
        with task_ids(IDS):
            return model(x).square().sum()

    def hook(_):
        with torch.no_grad():
            seen.append(within(x))

    with task_ids(OTHER):
        model.layers[0].inventory["A"].register_hook(hook)
        checkpoint(within, x, use_reentrant=reentrant).backward()
    assert_close([p.grad for p in trained(model)], expected, **GRADIENTS_CLOSE)
    assert len(seen) == 1 and seen[0] == within(x)
    with merged(model, 1):
        checkpoint(lambda x: model(x).square().sum(), x, use_reentrant=reentrant).backward()


@noisy
def test_parts_that_are_compiled_have_their_own_mixtures(method, adapter):
    """Layers of one shape, each compiled: a graph is not taken for the next layer, nor for another model's."""
    torch._dynamo.reset()
    for _ in range(2):
        model, x = chain(method, adapter), torch.randn(4, 3, 8)
        expected = results(model, x, IDS)
        for layer in model.layers:
            layer.compile(backend="eager")
        for _ in range(2):
            assert_close(results(model, x, IDS), expected, **GRADIENTS_CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_inductor():
    model, x = chain(), torch.randn(4, 3, 8)
    call = compiled(lambda x: model(x), model, fullgraph=True)
    for ids in (IDS, OTHER):
        assert_close(results(model, x, ids, call), results(model, x, ids), **GRADIENTS_CLOSE)


# --- What remains as it was -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_a_checkpointed_model_is_independent(duplicate):
    model, batch = adapted("t5", "mhr", "lora").train(), inputs("t5")
    model.gradient_checkpointing_enable(**NOT_REENTRANT)
    model.disable_input_require_grads()  # its hook, a function in a function, cannot be pickled
    torch.manual_seed(1)
    expected = gradients(model, batch, IDS)
    twin = duplicate(model)
    with torch.no_grad():
        for p in trained(model):
            p.zero_()
    torch.manual_seed(1)
    assert_close(gradients(twin, batch, IDS, inside=False), expected, **GRADIENTS_CLOSE)


@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_names_are_those_of_files_saved_before(method):
    leaves = ["linear.weight", "linear.bias", "router.Z", "inventory.A", "inventory.B"]
    assert list(chain(method).state_dict()) == [f"layers.{k}.{leaf}" for k in range(4) for leaf in leaves]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("method, adapter", ROUTED)
def test_adapters_are_made_on_the_device_of_their_layers(method, adapter, shared):
    model = Chain().to("meta")
    own = layer_maker(method, adapter)("", nn.Linear(8, 8)).router if shared else None
    inject(model, layer_maker(method, adapter, router=own), r"layers\.\d")
    assert {p.device.type for p in adapter_parameters(model).values()} == {"meta"}
    assert len(routers(model)) == (1 if shared else 4)


# --- The device is not waited for -------------------------------------------------------------------------------------


class Waits(TorchFunctionMode):
    """Counts what a GPU would be waited for: numbers taken out of tensors, and shapes that depend on values. Task ids,
    whole numbers that lie on the host, are not counted."""

    TAKEN = ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.TAKEN and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [dict(method="mhr"), dict(method="poly", optimizer="adafactor", micro_batch=4)])
def test_a_training_step_waits_once(tmp_path, settings):
    """For its loss and gradient norm, together; five steps more wait five times more."""
    counts = []
    for steps in (3, 8):
        flags = dict(dataset="strings", backbone="scratch", heads=4, batch_size=8, device="cpu", eval_examples=0)
        cfg = train.make_config(
            **flags | settings, steps=steps, save_every="1000", output_dir=str(tmp_path / f"{steps}")
        )
        with Waits() as waits:
            train.train(cfg)
        counts.append(waits.count)
    assert counts[1] - counts[0] == 5
