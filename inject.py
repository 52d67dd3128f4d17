"""Put adapters into a Hugging Face model, tell them the task of each example, save, load and merge them.

The one sibling that a copied `lora.py`, `ia3.py`, `poly.py` or `mhr.py` needs in a real model; it knows none of them,
only that an adapted layer keeps the layer that it replaced as `.linear` and offers `.merged(task)`, and that a routed
one has a `.router` and wants task ids.

    freeze(model)
    inject(model, lambda name, linear: PolyLinear(linear, LoRA(rank=1), PolyRouter(64, 8)), LORA_LAYERS["t5"])
    with task_ids([3, 3, 0, 7]):                   # the task of each example in the batch
        loss = model(**batch).loss
    loss.backward()                                # inside or outside, in whatever thread
    save_adapters(model, "adapter.safetensors")

A pattern or a list says which layers (`layers.py` has patterns). Task ids travel through a context instead of the
model's arguments, for no Hugging Face model would pass them on (`accept_task_ids` opens it around the call). A hook on
the model reads the innermost context at every call and mixes the adapters of all layers; a hook on each layer gives it
its own. The hooks stay for good (PEFT's Poly removes its hooks before backward, and then gradient checkpointing fails),
and nothing is written to a layer.
"""

import hashlib
import itertools
import json
import math
import os
import re
import reprlib
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import wraps
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# --- Task ids ---------------------------------------------------------------------------------------------------------


NO_IDS = "a routed layer was called without task ids: wrap the call in `with task_ids(ids):`, in the same thread"


class _Ids(NamedTuple):
    """What a `task_ids` context says."""

    tasks: Tensor  # (u,) distinct ids
    rows: Tensor  # (n,) which of them each example has
    largest: int
    batch: int  # how many ids there were, among which these are
    graph: int  # the backward pass that the context is in, or -1
    kept: dict | None  # layer -> its mixture, if mixtures are kept; model -> its pass, once all its layers are there


_ids: ContextVar[_Ids | None] = ContextVar("ids", default=None)  # each thread and each asyncio task has its own


@contextmanager
def task_ids(ids, among=None, keep=False):
    """Within this context, example k of a batch belongs to task ids[k]. Covers forward, backward and generation.

    ids (n,): a list or tensor of integers >= 0. A batch may have k n rows, each example k times in a row, as beam
    search and the scoring of choices have it; one that is stacked as a whole needs the ids k times. Contexts nest;
    leaving one restores the one around it. A new thread begins without ids.
    among: the ids of a larger batch that this one is a part of; routing noise is then drawn for all of its tasks, so
    that every part (in another process) draws the same. None: the batch is all there is.
    keep: each layer mixes its adapters once and keeps them until the context ends. For generation, which calls a layer
    for every token; an error if gradients are on, for nothing may be trained meanwhile.
    Raises ValueError if ids are not integers, negative, not among `among`, or not a flat list of at least one;
    RuntimeError if another context has not been left, as when a generator yields within one.
    """
    ids = _checked(ids)
    tasks, rows = torch.unique(ids if among is None else _checked(among), return_inverse=True)  # once a batch
    if among is not None:
        rows = torch.searchsorted(tasks, ids)
        if not torch.equal(tasks[rows.clamp(max=len(tasks) - 1)], ids):
            raise ValueError(f"task ids {ids.tolist()} are not all among {tasks.tolist()}")
    if keep and torch.is_grad_enabled():
        raise RuntimeError("task_ids(keep=True) is for torch.no_grad() alone: kept adapters would not learn")
    batch = len(ids if among is None else among)
    now = _Ids(tasks, rows, int(tasks[-1]), batch, torch._C._current_graph_task_id(), {} if keep else None)
    token = _ids.set(now)
    try:
        yield
    finally:
        if _ids.get() is not now:
            _ids.set(None)  # better none than those of another context
            raise RuntimeError("task_ids contexts are left in another order than entered: do not yield within one")
        _ids.reset(token)
        if _thread.now is not None and _thread.now.ids is now:  # Ctrl-C in a forward pass
            _thread.now = None


def _checked(ids) -> Tensor:
    """Task ids as a tensor (n,) of int64. Raises ValueError as `task_ids` says."""
    given = _kind(ids) if isinstance(ids, Tensor) else reprlib.repr(ids)
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 1 or len(ids) == 0 or not integers:
        raise ValueError(f"task ids must be a flat list of integers, one for each example, not {given}")
    ids = ids.long()
    if ids.min() < 0:
        raise ValueError(f"task ids must not be negative, got {int(ids.min())}")
    return ids


def accept_task_ids(model: nn.Module):
    """Let a model take `task_ids=` in its call and in `generate`, as a column of the batch: for a Trainer.

    `model(**batch, task_ids=ids)` is then `with task_ids(ids): model(**batch)`. Without it the context around the call
    counts, as before. The model becomes one of a subclass of the same name, which can be copied, not pickled.
    """
    model = unwrapped(model)

    def within(method):
        """The method, with task_ids as one more argument."""

        @wraps(method)
        def call(self, *args, **kwargs):
            ids = kwargs.pop("task_ids", None)
            with nullcontext() if ids is None else task_ids(ids):
                return method(self, *args, **kwargs)

        return call

    kind = type(model)
    own = {name: within(getattr(kind, name)) for name in ("__call__", "generate") if hasattr(kind, name)}
    model.__class__ = type(kind.__name__, (kind,), own | {"__module__": kind.__module__})


# --- One mix for all layers -------------------------------------------------------------------------------------------
# A layer alone needs some 30 small operations to route and mix, and a model has hundreds of layers: a GPU would wait
# for their launches most of the time. So the outermost call of a model mixes for all its layers at once, and each layer
# is given its mixture.


class _Batch(NamedTuple):
    """What a model was called with: the first two axes of its input, from which follows what each row of a layer is."""

    rows: int
    length: int


INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")  # or whatever tensor comes first


def _batch_of(args: tuple, kwargs: dict, ids: _Ids) -> _Batch:
    """The batch of a model's call: its first tensor, best one with as many rows as there are ids, or a multiple.

    Raises ValueError if there is none such.
    """
    given = [*args, *(kwargs.get(name) for name in INPUTS), *kwargs.values()]
    within = [x for one in given for x in (one.values() if isinstance(one, Mapping) else [one])]
    tensors = [x for x in within if isinstance(x, Tensor) and x.dim() > 0]
    x = next((x for x in tensors if x.shape[0] % len(ids.rows) == 0), tensors[0] if tensors else ids.rows)
    batch = _Batch(x.shape[0], x.shape[1] if x.dim() > 1 else 1)
    if batch.rows == 0 or batch.rows % len(ids.rows):
        raise ValueError(f"{len(ids.rows)} task ids for a batch of {batch.rows} rows: expected one per example")
    return batch


class _Pass(NamedTuple):
    """One call of a model: what its layers read in the forward pass, and again if they are computed again."""

    model: nn.Module | None  # whose call began it; None while a part of it is computed again
    inside: set[nn.Module]  # all modules of that model
    ids: _Ids
    batch: "_Batch"
    mixed: dict[nn.Module, dict[str, Tensor]]  # layer -> its mixture
    around: object  # the pass of another model, in which this one was called; or None


class _Thread(threading.local):
    """What this thread is computing now. A forward pass stays in one thread; its backward pass may be in another."""

    def __init__(self):
        self.now: _Pass | None = None
        self.given: _Ids | None = None  # ids that are inputs of a compiled function
        self.remembers = False  # whether it is in a function of `remember`


_thread = _Thread()


def _pass_now() -> _Pass | None:
    """The pass of this thread, if it is of the innermost context: another one's was interrupted, or is around it."""
    now = _thread.now
    if now is None or now.model is None or torch.compiler.is_compiling():
        return now
    return now if now.ids is _ids.get() else None


def _begin(model: nn.Module, args: tuple, kwargs: dict):
    """Forward pre-hook of a model and its parts: the outermost call mixes the adapters of all its layers, once."""
    now = _pass_now()
    if now is not None and (now.model is None or model in now.inside and model is not now.model):
        return
    around = None if now is None or now.model is model else now  # the same model: its last call was interrupted
    if torch.compiler.is_compiling() and _thread.given is None:
        _begin_outside(model, around, args, kwargs)
    else:
        _begin_with(model, _thread.given or _ids.get(), around, args, kwargs)


def _begin_with(model: nn.Module, ids: _Ids | None, around: _Pass | None, args: tuple, kwargs: dict):
    """Mix the adapters of all layers of the model for these ids. Without ids: nothing, until a layer is called."""
    if ids is None:
        return
    batch = _batch_of(args, kwargs, ids)
    if ids.kept is not None and model in ids.kept:
        _thread.now = ids.kept[model]._replace(around=around, batch=batch)
        return
    inside = set(model.modules())
    layers = [m for m in model.modules() if "router" in m._modules and "inventory" in m._modules]
    compiling = torch.compiler.is_compiling()
    if layers and not compiling:
        _refuse_unknown(ids)
    if layers and (torch.compiler.is_exporting() or not compiling and torch.jit.is_tracing()):
        raise RuntimeError("what is exported or traced would hold these task ids for good: merge one task first")
    kept = {} if ids.kept is None else ids.kept
    mixed = kept | mix_all([layer for layer in layers if layer not in kept], ids)
    _thread.now = _Pass(model, inside, ids, batch, mixed, around)
    if ids.kept is not None:
        kept |= mixed | {model: _thread.now}
    if torch.is_grad_enabled() and not compiling:
        for module in inside:
            if "_gradient_checkpointing_func" in vars(module):
                _remember_in(module)


@torch.compiler.disable(reason="torch.compile around a model is made by `inject.compiled`, which gives it task ids")
def _begin_outside(model: nn.Module, around: _Pass | None, args: tuple, kwargs: dict):
    """`_begin` of a model that was given to torch.compile itself: the mix stays outside its graph."""
    _begin_with(model, _ids.get(), around, args, kwargs)


def _refuse_unknown(ids: _Ids | None):
    """Raise RuntimeError in a backward pass, if the ids are of a context that was entered before it: it may be another
    one than the forward pass had."""
    graph = torch._C._current_graph_task_id()
    if graph != -1 and not _thread.remembers and (ids is None or ids.graph != graph):
        raise RuntimeError(
            "routed layers are computed again in a backward pass, where their tasks are unknown: use model."
            "gradient_checkpointing_enable(), or checkpoint(inject.remember(function), ..., use_reentrant=False)"
        )


def _end(model: nn.Module, args: tuple, output):
    """Forward hook of the same, also if the call failed: the pass is over."""
    if _thread.now is not None and _thread.now.model is model:
        _thread.now = _thread.now.around


def mix_all(layers: list[nn.Module], ids) -> dict[nn.Module, dict[str, Tensor]]:
    """What `adapters` gives for each of these routed layers, in few operations: {layer: {name: (n, ...)}}.

    Routers with the same settings draw and normalise together, layers of the same shapes mix together: what is stacked
    has an axis of k in front. A mixture is cast to its layer's type here, once.
    """
    weights, mixed = {}, {layer: {} for layer in layers}
    for same in _alike(dict.fromkeys(layer.router for layer in layers), _kind_of_router):
        first = same[0]
        if ids.largest >= first.tasks:
            raise IndexError(f"task id {ids.largest} is out of range: this model knows tasks 0 .. {first.tasks - 1}")
        tasks = (ids.tasks[ids.rows] if first.per_example else ids.tasks).to(first.Z.device, non_blocking=True)
        w = first(tasks)[None] if len(same) == 1 else first(tasks, Z=_stack([router.Z for router in same]))
        weights |= zip(same, w.unbind(), strict=True)
    for same in _alike(layers, _kind_of_layer):
        first, weight = same[0], same[0].linear.weight
        inventory = {name: _stack([layer.inventory[name] for layer in same]) for name in first.inventory}
        device = next(iter(inventory.values())).device
        w = torch.stack([weights[layer.router].to(device) for layer in same])  # (k, u, ...)
        if w.shape[1] > 1 and not first.router.per_example:
            w = w.index_select(1, ids.rows.to(device, non_blocking=True))
        for name, p in first.mix(w, inventory).items():  # (k, n, ...)
            if first.adapter.feature_axis and weight.is_floating_point():  # SFT adds values up before it casts
                p = p.to(weight.dtype)
            for layer, own in zip(same, p.unbind(), strict=True):
                mixed[layer][name] = own
    return mixed


def _stack(parameters: list[Tensor]) -> Tensor:
    """Parameters of one shape as one tensor, whose gradient is made contiguous once, not once for each of them."""
    if len(parameters) == 1:
        return parameters[0][None]
    stacked = torch.stack(parameters)
    if stacked.requires_grad and not torch.compiler.is_compiling():
        stacked.register_hook(Tensor.contiguous)
    return stacked


def _alike(items, kind) -> list[list]:
    """Items of the same kind(item) side by side, in order; one whose kind cannot be compared stays alone."""
    groups = {}
    for item in items:
        try:
            groups.setdefault(kind(item), []).append(item)
        except TypeError:  # a setting that has no hash
            groups[item] = [item]
    return list(groups.values())


def _kind_of_router(router: nn.Module):
    """What routers have in common that can be one with a stacked Z; a router that is more than its Z stays alone."""
    more = router._buffers or len(list(router.parameters())) > 1
    if more or router._forward_hooks or router._forward_pre_hooks:
        return router
    return type(router), _settings(router), router.Z.shape, router.Z.dtype, router.Z.device, router.Z.requires_grad


def _kind_of_layer(layer: nn.Module):
    """What layers have in common that can mix together. An SFT, as large as its layer, is not worth a second copy."""
    if not layer.adapter.feature_axis:
        return layer
    shapes = tuple((name, p.shape, p.dtype, p.device) for name, p in layer.inventory.items())
    weights = (layer.router.per_example, layer.router.Z.shape[1:])
    return type(layer), _settings(layer), shapes, weights, layer.linear.weight.dtype


def _settings(module: nn.Module) -> tuple:
    """All public attributes of a module that are no parts of it."""
    return tuple([(name, value) for name, value in vars(module).items() if name[0] != "_"])


def _give_mixture(layer: nn.Module, args: tuple, kwargs: dict):
    """Forward pre-hook of every routed layer: add its task ids and its mixture to the call."""
    if len(args) > 1 or "tasks" in kwargs:
        return None  # called directly, with ids of its own
    if not args:  # by keyword, under the name that a linear layer or this one gives it
        args, kwargs = (kwargs.get("input", kwargs.get("x")),), {}
    now = _pass_now()
    if torch.compiler.is_compiling() and layer._number < 0:  # never: read, so that a graph is of this layer alone
        return None
    if now is not None and layer in now.mixed:
        params = now.mixed[layer]
        if all(len(p) == 1 for p in params.values()):  # one adapter for all rows, whatever they are
            return args, kwargs | {"tasks": now.ids.tasks[:1], "params": params}
        _refuse_rows(layer, args[0], now)
        return args, kwargs | {"tasks": now.ids.tasks, "rows": now.ids.rows, "params": params}
    ids = now.ids if now is not None else _ids.get()
    if now is None and hasattr(layer, "inventory"):
        _refuse_unknown(ids)
    if ids is None:
        raise RuntimeError(NO_IDS)
    if now is not None and len(ids.tasks) > 1:
        _refuse_rows(layer, args[0], now)
    device = args[0].device
    own = {"tasks": ids.tasks.to(device, non_blocking=True), "rows": ids.rows.to(device, non_blocking=True)}
    if not hasattr(layer, "inventory"):  # a layer of another kind, that routes for itself
        return args, kwargs | own
    if now is None and len(ids.tasks) > 1 and len(args[0]) != len(ids.rows):
        raise ValueError(
            f"{len(ids.rows)} task ids for {len(args[0])} rows of a layer that is called outside its model's forward "
            "pass: which task each row belongs to is not known"
        )
    kept = {} if ids.kept is None else ids.kept
    if layer not in kept:  # called outside its model: it mixes alone
        kept |= mix_all([layer], ids)
    return args, kwargs | own | {"params": kept[layer]}


def _refuse_rows(layer: nn.Module, x: Tensor, now: _Pass):
    """Raise ValueError unless a layer's rows are those of the model's input, or (OPT) all its tokens in their order."""
    rows, length = now.batch
    if x.shape[0] == rows or x.dim() == 2 and x.shape[0] == rows * length:
        return
    name = next((name for name, m in now.model.named_modules() if m is layer), "") if now.model else ""
    raise ValueError(
        f"layer {name} was called with {x.shape[0]} rows, its model with {rows}: which task each row belongs to is not "
        "known. Leave the layer out, or take batches of one task"
    )


# --- Passes that are computed again, or compiled ----------------------------------------------------------------------


def remember(function):
    """A function that, whenever it is called, sees the pass and the task ids of now: for gradient checkpointing.

    The backward pass calls it again, after the model's call has ended, and perhaps in another thread.
    """
    if torch.compiler.is_compiling():
        return function  # the graph knows what it computes again
    now, ids = _thread.now and _thread.now._replace(model=None), _ids.get()

    def within(*args, **kwargs):
        """The function, as it would be called then."""
        before, token = (_thread.now, _thread.remembers), _ids.set(ids)
        _thread.now, _thread.remembers = now, True
        try:
            return function(*args, **kwargs)
        finally:
            _ids.reset(token)
            _thread.now, _thread.remembers = before

    return within


def _remember_in(module: nn.Module):
    """Make a module of a model remember in its gradient checkpointing. RuntimeError if that is reentrant: it would lose
    the gradients of the mixtures, which are not among the inputs of what it computes again."""
    checkpoint = module._gradient_checkpointing_func
    if isinstance(checkpoint, _Remembering):
        return
    if getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
        fix = "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        raise RuntimeError(f"reentrant gradient checkpointing cannot be used with routed layers: model.{fix}")
    module._gradient_checkpointing_func = _Remembering(checkpoint)


class _Remembering(NamedTuple):
    """A checkpointing function whose function remembers."""

    checkpoint: Callable

    def __call__(self, function, *args, **kwargs):
        return self.checkpoint(remember(function), *args, **kwargs)


def compiled(function, model: nn.Module, **options):
    """torch.compile(function, **options) for a function that calls a model with routed layers, within `task_ids`.

    Mixing becomes a part of the graph, and task ids are inputs of it: other ids do not compile again, nor does another
    number of distinct ones, for they are repeated up to the length of the batch. (So routing draws more noise than
    without compiling.) Raises IndexError as a layer would. Make it anew after `add_tasks`.
    """
    known = min((router.tasks for router in routers(model)), default=math.inf)

    def with_ids(tasks: Tensor, rows: Tensor, *args, **kwargs):
        _thread.given = None if tasks is None else _Ids(tasks, rows, -1, len(rows), -1, None)
        try:
            return function(*args, **kwargs)
        finally:
            _thread.given = None

    with_ids.__code__ = with_ids.__code__.replace()  # a copy: torch limits how often one code object is compiled
    graph = torch.compile(with_ids, **options)

    def call(*args, **kwargs):
        """The graph's output for the ids of this context."""
        ids = _ids.get()
        if ids is None and known < math.inf:
            raise RuntimeError(NO_IDS)
        if ids is None:
            return graph(None, None, *args, **kwargs)
        _refuse_unknown(ids)
        if ids.largest >= known:
            raise IndexError(f"task id {ids.largest} is out of range: this model knows tasks 0 .. {known - 1}")
        device = next(model.parameters()).device
        tasks = torch.cat([ids.tasks, ids.tasks[-1:].expand(ids.batch - len(ids.tasks))])
        return graph(tasks.to(device, non_blocking=True), ids.rows.to(device, non_blocking=True), *args, **kwargs)

    return call


# --- Injection --------------------------------------------------------------------------------------------------------


_numbers = itertools.count()  # of routed layers: all are different


def freeze(model: nn.Module):
    """No parameter of the model is trained from here on, also none of its adapters; those injected afterwards are."""
    for p in unwrapped(model).parameters():
        p.requires_grad_(False)


def inject(model: nn.Module, make_layer, pattern: str | list[str]) -> list[str]:
    """Replace every linear layer whose full name matches `pattern` (re.fullmatch) by make_layer(name, linear).

    pattern: or a list of names, or of their last parts, as PEFT has it: ["q_proj", "v_proj"].
    GPT-2's Conv1D, a linear layer with its weight stored (i, o), becomes an nn.Linear that shares its memory.
    Returns the names replaced, in model order. Raises ValueError, with the model unchanged, if nothing matches (or
    nothing one of the names), a match is no linear layer or would not be called (`_refuse_unused`), the model already
    has adapters or is in DistributedDataParallel, or make_layer refuses a layer (its name is added); TypeError if
    make_layer is no such function.
    """
    _refuse_parallel(model)
    model = unwrapped(model)
    if adapted_layers(model):
        raise ValueError("this model already has adapters: load it anew, or train those")
    if not callable(make_layer) or isinstance(make_layer, type):
        example = "lambda name, linear: LoRALinear(linear, LoRA(rank=1))"
        raise TypeError(f"make_layer must be a function, such as {example}, not {reprlib.repr(make_layer)}")
    made = []
    for (name, *also), module in _matches(model, pattern):
        if type(module).__name__ == "Conv1D":
            module = _as_linear(module)
        if not name or not isinstance(module, nn.Linear):
            what = f"layer {name}" if name else "the model itself"
            kind = f"{type(module).__name__} ({type(module).__module__.split('.')[0]})"  # PEFT has a Linear too
            raise ValueError(f"{what} is of type {kind}, only linear layers can be adapted: {pattern!r}")
        _refuse_unused(model, name, also)
        try:
            layer = make_layer(name, module)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
        except (TypeError, AttributeError) as error:
            raise TypeError(f"layer {name}: make_layer(name, linear) failed: {error}") from error
        if not isinstance(layer, nn.Module) or layer._modules.get("linear") is not module:
            what = f"which this {type(layer).__name__} is not"
            raise TypeError(f"layer {name}: make_layer(name, linear) must return a layer around this `linear`, {what}")
        made.append((name, layer))
    first = set()  # the routers so far
    for name, layer in made:
        if hasattr(layer, "router"):
            if layer.router in first:  # transformers saves a shared parameter once, if it is told so
                layer._tied_weights_keys = {f"router.{p}": "" for p, _ in layer.router.named_parameters()}
            first.add(layer.router)
            if layer.router.Z.device != layer.weight.device:
                layer.router.to(layer.weight.device)
            layer._number = next(_numbers)
            layer.register_forward_pre_hook(_give_mixture, with_kwargs=True)
        _put(model, name, layer)
    if routers(model):
        for part in model.modules():  # what may be called by itself: an encoder, a decoder, a model without its head
            if part is model or hasattr(part, "get_input_embeddings"):
                part.register_forward_pre_hook(_begin, with_kwargs=True)
                part.register_forward_hook(_end, always_call=True)
    return [name for name, _ in made]


def _matches(model: nn.Module, pattern: str | list[str]) -> list[tuple[list[str], nn.Module]]:
    """The modules whose first name a pattern matches, each with all its names. Raises ValueError if there are none, or
    none for a name of a list."""
    if isinstance(pattern, re.Pattern):
        pattern = pattern.pattern
    names = []
    if not isinstance(pattern, str):
        names = list(pattern) if isinstance(pattern, Iterable) and not isinstance(pattern, Mapping) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"give a pattern, or a list of names of layers, not {reprlib.repr(pattern)}")
        pattern = "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in names)
    named = {}
    for name, module in model.named_modules(remove_duplicate=False):
        named.setdefault(module, []).append(name)
    try:
        matches = [(names, module) for module, names in named.items() if re.fullmatch(pattern, names[0])]
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
    if not matches:
        raise ValueError(f"no layer's name matches the pattern {pattern!r}")
    found = [f".{first}" for (first, *_), _ in matches]
    if absent := [name for name in names if not any(of.endswith(f".{name}") for of in found)]:
        raise ValueError(f"this model has no layer {absent[0]}: give the names that it has, or a pattern")
    return matches


def _refuse_unused(model: nn.Module, name: str, also: list[str]):
    """Raise ValueError for a linear layer whose weight is read, so that an adapter around it would do nothing: the
    kinds that are known, and one that has other names `also`. `check` finds the others."""
    parts = name.split(".")
    *_, owner, layer = around = [model.get_submodule(".".join(parts[:k])) for k in range(len(parts) + 1)]
    kind, settings = type(owner).__name__, getattr(owner, "config", None) or getattr(model, "config", None)
    why = ""
    if isinstance(owner, nn.MultiheadAttention):
        why = "nn.MultiheadAttention reads its weight:"
    elif isinstance(owner, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        why = "nn.TransformerEncoder reads its weight in evaluation: torch.backends.mha.set_fastpath_enabled(False), or"
    elif name.endswith("dt_proj") or "mamba" in kind.lower() and name.endswith(("x_proj", "out_proj")):
        why = f"{kind} reads its weight:"
    elif kind.startswith("Bloom") and getattr(settings, "slow_but_exact", False) and settings.pretraining_tp > 1:
        why = "BLOOM reads its weight with slow_but_exact: set that to False, or"
    elif layer.weight.device.type == "meta" and any(hasattr(module, "_hf_hook") for module in around):
        why = "accelerate has offloaded its weight: load the model whole, or"
    if also:
        why = f"it is also {also[0]}, where it would stay as it is:"
    if why:
        raise ValueError(f"layer {name} cannot be adapted, {why} leave it out of the pattern")


def _refuse_parallel(model: nn.Module):
    """Raise ValueError for DistributedDataParallel: it sums the gradients of the parameters that it was made with."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("DistributedDataParallel would not see new parameters: do this before the model is wrapped")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what wraps it whole: torch.compile's, DistributedDataParallel's, or the like.

    Raises TypeError for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"give a loaded model, such as AutoModel.from_pretrained(...), not a {type(model).__name__}")
    while list(model._modules) in (["module"], ["_orig_mod"]) and not model._parameters:
        model = next(iter(model._modules.values()))
    return model


def _put(model: nn.Module, name: str, layer: nn.Module):
    """Replace a layer by another, in the same mode: a model in evaluation mode stays so in all its layers."""
    layer.train(model.get_submodule(name).training)
    model.set_submodule(name, layer)


def _as_linear(conv: nn.Module) -> nn.Linear:
    """A Conv1D of the GPT-2 kind as a linear layer: the transposed weight is a view of the same memory."""
    linear = nn.Linear(*conv.weight.shape, device="meta").train(conv.training)
    linear.weight = nn.Parameter(conv.weight.data.T, requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias
    linear.conv1d = type(conv)  # for `merge`, which must give the model back the kind of layer that it had
    return linear


def _as_conv1d(linear: nn.Linear, conv1d: type) -> nn.Module:
    """The way back: a linear layer as a Conv1D."""
    conv = conv1d(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.data.T.contiguous(), requires_grad=False)
    conv.bias = linear.bias
    return conv


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers of a model by name: those that `inject` put there."""
    named = unwrapped(model).named_modules()
    is_adapted = lambda m: hasattr(m, "merged") and "linear" in m._modules  # noqa: E731  what wraps a layer is not
    return {name: m for name, m in named if is_adapted(m)}


def routers(model: nn.Module) -> list[nn.Module]:
    """The distinct routers of a model, in model order; a shared one counts once."""
    return list(dict.fromkeys(layer.router for layer in adapted_layers(model).values() if hasattr(layer, "router")))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that injection added, by name: adapters and routers, without the layers that they wrap."""
    added = {}
    for layer, module in adapted_layers(model).items():
        own = {name: p for name, p in module.named_parameters() if not name.startswith("linear.")}
        added |= {f"{layer}.{name}": p for name, p in own.items()}
    first = {id(p): name for name, p in reversed(added.items())}  # a shared router counts once, under its first name
    return {name: p for name, p in added.items() if first[id(p)] == name}


def _plain(name: str) -> str:
    """A parameter's or layer's name without what wraps a part of the model: torch.compile, or torch's checkpointing."""
    return re.sub(r"\.(_orig_mod|_checkpoint_wrapped_module)(?=\.|$)", "", f".{name}")[1:]


def check(model: nn.Module, forward: Callable):
    """Find adapters that would do nothing, or serve rows of unknown tasks, before anything is trained.

    forward(): a call of the model with three examples of seven tokens each, best returning its output. It is called in
    training mode, and in evaluation mode, where some models take a faster path; random states stay as they were.
    Raises ValueError, with the layer's name, for a layer that is never called, or without gradients, whose output is
    not used, or (routed) whose rows are not those of the examples in their order; and if there are no adapters.
    """
    model = unwrapped(model)
    layers, training = adapted_layers(model), {module: module.training for module in model.modules()}
    if not callable(forward):
        raise TypeError(f"check takes a function, such as lambda: model(**batch), not a {type(forward).__name__}")
    if not layers:
        raise ValueError("nothing to check: this model has no adapters, inject them first")
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(gpus), task_ids([0, 0, 0]):
            model.train()
            _refuse_uncalled(layers, forward)
            model.eval()
            _refuse_rows_of_others(model, layers, forward)
    finally:
        for module, was in training.items():
            module.training = was


def _calls(layers: dict[str, nn.Module], forward: Callable) -> tuple[dict[str, list], object]:
    """What each layer got and gave in a call of the model, {name: [(x, y), ...]}, and what forward() returned."""
    calls = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():
        note = lambda _, args, kwargs, y, of=name: calls[of].append(((*args, *kwargs.values())[0], y))  # noqa: E731
        handles.append(layer.register_forward_hook(note, with_kwargs=True))
    try:
        return calls, forward()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _refuse_uncalled(layers: dict[str, nn.Module], forward: Callable):
    """Raise ValueError for a layer that is never called in training. Some models leave layers out at random; an expert
    that no token was sent to is another matter."""
    left = {name for name in layers if "expert" not in name}
    for seed in range(8):
        torch.manual_seed(seed)
        left -= {name for name, calls in _calls(layers, forward)[0].items() if calls}
        if not left:
            return
    raise ValueError(f"layer {min(left)} is never called in training: its adapter would do nothing, leave it out")


@torch.enable_grad()
def _refuse_rows_of_others(model: nn.Module, layers: dict[str, nn.Module], forward: Callable):
    """Raise ValueError for what is wrong with a layer's calls in evaluation, seen by shapes and gradients: the rows of
    one example depend on no other example, and what the model returns depends on every layer."""
    read, handles = [], []

    def note(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        read.append(y.detach().requires_grad_())
        return read[-1].clone()  # which the model may change in place

    def note_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        leaf = lambda x: note(module, (), x) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        return tuple(map(leaf, args)), {name: leaf(x) for name, x in kwargs.items()}

    handles.append(model.register_forward_pre_hook(note_inputs, with_kwargs=True))
    handles += [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        calls, output = _calls(layers, forward)
    finally:
        for handle in handles:
            handle.remove()
    for name, pairs in calls.items():
        if not pairs and "expert" not in name:
            raise ValueError(f"layer {name} is never called in evaluation: its adapter would do nothing, leave it out")
        trained = any(p.requires_grad for own, p in layers[name].named_parameters() if not own.startswith("linear."))
        if pairs and trained and not any(y.requires_grad for _, y in pairs):
            raise ValueError(f"layer {name} is called without gradients: its adapter would never learn, leave it out")
        for x, _ in pairs if hasattr(layers[name], "router") else ():
            _refuse_shape(name, tuple(x.shape[:-1]))
    if not all(is_whole(layer.linear.weight) or layer.linear.weight.dtype == torch.uint8 for layer in layers.values()):
        return  # split weights are gathered for one backward pass, not for several
    routed = {name: pairs for name, pairs in calls.items() if hasattr(layers[name], "router")}
    examples = [leaf for leaf in read if leaf.shape[0] == 3]
    for name, pairs in routed.items() if _mixed(routed.values(), examples) else ():
        if _mixed([pairs], examples):
            raise ValueError(f"layer {name} is called with rows that are not those of the examples: leave it out")
    _refuse_unused_outputs(calls, output)


def _refuse_shape(name: str, shape: tuple):
    """Raise ValueError unless a layer's input has three rows, or is all 21 tokens in one axis."""
    if shape and shape[0] == 7:
        raise ValueError(f"layer {name} is called with the tokens as its first axis: leave it out")
    if shape[:1] != (3,) and shape != (21,):
        rows = shape[0] if shape else "no"
        raise ValueError(f"layer {name} is called with {rows} rows for 3 examples: leave it out")


def _mixed(several: Iterable[list], examples: list[Tensor]) -> bool:
    """Whether the rows of one example, in inputs of layers, have a gradient to another example."""
    inputs = [x for pairs in several for x, _ in pairs if x.requires_grad]
    for k in range(3 if inputs and examples else 0):
        rows = [x[k] if x.shape[0] == 3 else x[7 * k : 7 * k + 7] for x in inputs]
        weighted = sum((row * torch.rand_like(row)).sum().float() for row in rows)
        by_leaf = torch.autograd.grad(weighted, examples, retain_graph=True, allow_unused=True)
        if any(bool((g[[i for i in range(3) if i != k]] != 0).any()) for g in by_leaf if g is not None):
            return True
    return False


def _refuse_unused_outputs(calls: dict[str, list], output):
    """Raise ValueError for a layer whose output nothing that the model returns depends on."""
    within = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else [output]
    )
    tensors = [x for x in within if isinstance(x, Tensor) and x.requires_grad]
    ys = [(name, y) for name, pairs in calls.items() for _, y in pairs if y.requires_grad]
    if not tensors or not ys:
        return
    total = sum(x.float().sum() for x in tensors)
    by_output = torch.autograd.grad(total, [y for _, y in ys], retain_graph=True, allow_unused=True)
    used = {name for (name, _), g in zip(ys, by_output, strict=True) if g is not None}
    if unused := [name for name, _ in ys if name not in used]:
        raise ValueError(f"layer {unused[0]} is called, but its output is not used: leave it out")


def add_tasks(model: nn.Module, count: int, keep: bool = True):
    """Every router gets `count` fresh tasks: after the old ones, which stay bit for bit, or in their place.

    Z is then a new parameter: make the optimiser afterwards. Without routers nothing is to be done. Raises ValueError
    unless count is an integer of at least 1, and for DistributedDataParallel.
    """
    _refuse_parallel(model)
    if not hasattr(count, "__index__") or count < 1:
        raise ValueError(f"add_tasks takes how many tasks to add, an integer of at least 1, not {count!r}")
    for router in routers(model):
        router.add_tasks(count, keep)


# --- Merging ----------------------------------------------------------------------------------------------------------


def merge(model: nn.Module, task: int) -> dict[str, nn.Module]:
    """Put plain linear layers, with the adapter of one task merged in, in the place of the adapted ones.

    The model is then an ordinary Hugging Face model. Returns the adapted layers for `unmerge`: they keep the original
    weights, untouched, so undoing is exact to the bit, at the price of a second copy of those weights meanwhile.
    Raises ValueError if there are no adapters or a weight is not whole, IndexError if the task is out of range,
    TypeError if it is no integer.
    """
    model = unwrapped(model)
    layers = adapted_layers(model)
    if isinstance(task, bool) or not hasattr(task, "__index__"):
        raise TypeError(f"merge takes the id of one task, an integer, not {task!r}")
    if not layers:
        raise ValueError("nothing to merge: this model has no adapters")
    for name, layer in layers.items():
        known = layer.router.tasks if hasattr(layer, "router") else None
        if known is not None and not 0 <= task < known:
            raise IndexError(f"task id {task} is out of range: this model knows tasks 0 .. {known - 1}")
        if not is_whole(layer.linear.weight):
            raise ValueError(
                f"layer {name}: nothing can be merged into a weight that is quantised, or split over processes: export "
                "the LoRA, or load the backbone whole in bfloat16 or float32"
            )
    plain = {name: layer.merged(task) for name, layer in layers.items()}
    for name, linear in plain.items():
        conv1d = getattr(layers[name].linear, "conv1d", None)
        _put(model, name, _as_conv1d(linear, conv1d) if conv1d else linear)
    model._is_merged = True
    return layers


def is_whole(weight: Tensor) -> bool:
    """Whether a weight holds its numbers: it is neither quantised nor split over processes (a DTensor)."""
    return weight.is_floating_point() and not hasattr(weight, "full_tensor")


def unmerge(model: nn.Module, layers: dict[str, nn.Module]):
    """Undo `merge`: put the layers that it returned back."""
    model = unwrapped(model)
    for name, layer in layers.items():
        _put(model, name, layer)
    if layers:
        model._is_merged = False


@contextmanager
def merged(model: nn.Module, task: int):
    """`merge` for the length of a context, then `unmerge`. A model that never had adapters stays as it is; ValueError
    for one that is merged already."""
    if getattr(unwrapped(model), "_is_merged", False) and not adapted_layers(model):
        raise ValueError("this model is merged for a task already: unmerge it first")
    layers = merge(model, task) if adapted_layers(model) else {}
    try:
        yield
    finally:
        unmerge(model, layers)


# --- Saving and loading -----------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """A short hash of the backbone: name, shape and up to 64 evenly spaced values of each of its parameters.

    Neither adapters nor the parameters named in `without` enter, so it is the same before and after injection. Values
    are rounded to bfloat16 first, so a backbone loaded in bfloat16 or float32 is the same backbone. Weights that are
    quantised or split over processes say little of the checkpoint: whoever loads it so sets
    `fingerprint_of_checkpoint` on the model, which is then the answer.
    """
    model = unwrapped(model)
    if known := getattr(model, "fingerprint_of_checkpoint", None):
        return known
    sha = hashlib.sha256()
    layers = adapted_layers(model)
    for name, p in _others(model).items():
        if name in without:
            continue
        owner, _, leaf = name.rpartition(".")
        if owner.removesuffix(".linear") in layers:  # the name that the parameter had before injection
            name = f"{owner.removesuffix('.linear')}.{leaf}"
        p = p.detach() if p.is_contiguous() else p.detach().T  # a Conv1D that `inject` turned: turn it back
        values = p.flatten()[:: -(-p.numel() // 64) or 1].to("cpu", torch.bfloat16).contiguous()
        sha.update(f"{_plain(name)} {tuple(p.shape)}".encode())
        sha.update(values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def save_adapters(model: nn.Module, path: str):
    """Write adapters and routers to a safetensors file, and all other parameters that require a gradient: a head, if it
    is trained too; without `freeze` the whole backbone. Of frozen parameters it has a fingerprint, of buffers nothing.

    Raises ValueError if there are no adapters, OSError as `write_tensors`.
    """
    model = unwrapped(model)
    added = adapter_parameters(model)
    if not added:
        raise ValueError("nothing to save: this model has no adapters: inject them, or unmerge those that are merged")
    beside = {name: p for name, p in _others(model).items() if p.requires_grad}
    tensors = {_plain(name): p.detach().contiguous().cpu() for name, p in (added | beside).items()}
    write_tensors(tensors, path, backbone=fingerprint(model, without=beside), state=json.dumps(_described(model)))


def _others(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, by name, that injection did not add."""
    added = set(map(id, adapter_parameters(model).values()))
    return {name: p for name, p in model.named_parameters() if id(p) not in added}


def _described(model: nn.Module) -> dict[str, list[str]]:
    """What tensors do not tell of each adapted layer: the kinds and settings of it, its adapter and its router, and
    which layer is the first with that router."""
    first, described = {}, {}
    for name, layer in adapted_layers(model).items():
        described[_plain(name)] = parts = [_text(layer)]
        if hasattr(layer, "adapter"):
            parts.append(_text(layer.adapter))
        if hasattr(layer, "router"):
            router = unwrapped(layer.router)
            parts += [_text(router), f"the router of layer {first.setdefault(router, _plain(name))}"]
    return described


def _text(part) -> str:
    """The kind of a layer, an adapter or a router, and its public attributes that are numbers or texts.

    Without the numbers of tasks and of changed weights, which may differ between a file and a model.
    """
    settings = []
    for name, value in getattr(part, "__dict__", {}).items():
        if name[0] != "_" and name not in ("training", "tasks", "density"):
            with suppress(TypeError, ValueError, RuntimeError):  # what is no number
                value = f"{float(value):g}"  # 16, 16.0 and numpy's are the same
            if isinstance(value, str):
                settings.append(f"{name}={str.__str__(value)}")
    return f"{type(part).__name__}({', '.join(settings)})"


def write_tensors(tensors: dict[str, Tensor], path: str, **metadata: str):
    """Write a safetensors file whole or not at all: under another name, synced to the disk, then renamed.

    A digest of the tensors, and of the metadata's `state`, goes with it. Raises OSError if it cannot be written; an
    older file of that name stays.
    """
    temporary = f"{os.fspath(path)}.tmp"
    try:
        open(temporary, "wb").close()  # fails in the words of the system, not of safetensors
        sha = digest(tensors, metadata.get("state", ""))
        one = json.dumps(metadata | {"sha256": sha})  # one entry: safetensors writes several in any order
        save_file(tensors, temporary, metadata={"saved": one})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # fsync the directory, so that the rename survives a power cut
            number = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
    except (OSError, SafetensorError) as error:  # SafetensorError: how safetensors calls a full disk
        with suppress(OSError):
            os.remove(temporary)
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        raise OSError(number, f"cannot be written: {reason}", str(path)) from None


def read_tensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of `write_tensors`, and its metadata. Raises ValueError unless they are as written."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("saved", "{}"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # not the file's own pages
    except (OSError, SafetensorError, ValueError, RecursionError) as error:  # JSON: no JSON, or nested too deep
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    whole = isinstance(metadata, dict) and metadata.get("sha256") == digest(tensors, str(metadata.get("state", "")))
    if not whole:
        raise ValueError(f"{path} is damaged: its content is not what was saved, or something else has written it")
    return tensors, metadata


def digest(tensors: dict[str, Tensor], state: str = "") -> str:
    """SHA-256 of names, types, shapes and bytes, and of a text that is saved with them."""
    sha = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {_kind(tensor)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@torch.no_grad()
def load_adapters(model: nn.Module, path: str):
    """Read a file of `save_adapters` into a model with the same adapters injected, bit for bit.

    What may have another length in the file, the number of tasks in a Z and of changed weights in an SFT that is an
    average, becomes a new parameter of that length: make the optimiser afterwards. What was trained beside the adapters
    is read too, also into a head that is frozen here; it, and Z, are cast to the type that they have here.
    Raises ValueError, with the model unchanged, if the file is damaged, holds a number that is not finite, or belongs
    to another backbone or adapters of other kinds, shapes or settings, naming the first difference.
    """
    saved, metadata = read_tensors(path)
    model = unwrapped(model)
    named = adapter_parameters(model)
    beside = {name: p for name, p in _others(model).items() if _plain(name) in saved}
    if metadata.get("backbone") != fingerprint(model, without=beside):
        half = any(p.dtype == torch.float16 for p in model.parameters())
        raise ValueError(
            f"{path} was trained on another backbone: load the model that it was trained on"
            + half * " (a float16 one, as here, may not be known again: load in bfloat16 or float32, then .half())"
        )
    named |= beside
    full, own = {_plain(name): name for name in named}, {_plain(name): p for name, p in named.items()}
    for name in sorted(saved.keys() ^ own.keys()):
        at = "file" if name in saved else "model"
        what = "adapter settings, or another head" if at == "file" else "adapter settings, inject those"
        raise ValueError(f"{path}: {name} is only in the {at}: it was saved with other {what}")
    for name, p in own.items():
        if name.endswith(".router.Z") or full[name] in beside:  # Z once followed torch's default type
            saved[name] = saved[name].to(p.dtype) if saved[name].is_floating_point() else saved[name]
        _refuse_unfit(path, saved, name, p)
        if name.endswith(".place"):
            weight = model.get_submodule(re.sub(r"\.(params|inventory)\.place$", "", full[name])).weight
            _refuse_places(path, saved, name, weight.numel())
    _refuse_other_settings(model, path, metadata)
    for name, p in own.items():
        if saved[name].shape == p.shape:
            p.copy_(saved[name])
        else:
            owner, _, leaf = full[name].rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(saved[name].to(p.device), p.requires_grad))


def _refuse_unfit(path: str, saved: dict[str, Tensor], name: str, p: Tensor):
    """Raise ValueError unless a saved tensor is finite and of the type and shape of a parameter."""
    free = name.endswith((".router.Z", ".params.value", ".params.place"))  # the length of the first axis is free
    if saved[name].dtype != p.dtype or saved[name].dim() != p.dim() or saved[name].shape[free:] != p.shape[free:]:
        raise ValueError(f"{path}: {name} is {_kind(saved[name])}, the model has {_kind(p)}")
    if saved[name].is_floating_point() and not bool(saved[name].isfinite().all()):
        raise ValueError(f"{path}: {name} holds numbers that are not finite")


def _refuse_places(path: str, saved: dict[str, Tensor], name: str, size: int):
    """Raise ValueError unless an SFT has one value for each place, all within a weight of this size."""
    values, places = saved[name.removesuffix("place") + "value"], saved[name]
    if values.shape != places.shape or not bool(((places >= 0) & (places < size)).all()):
        raise ValueError(f"{path}: {name} names places outside its layer, or not one for each value")


def _refuse_other_settings(model: nn.Module, path: str, metadata: dict):
    """Raise ValueError unless the layers of a model are described as in a file, or the file has no descriptions."""
    try:
        described = {name: list(parts) for name, parts in dict(json.loads(metadata.get("state", "{}"))).items()}
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: it does not say what its layers were") from None
    for name, parts in _described(model).items():
        for was, now in itertools.zip_longest(described.get(name, parts), parts):
            if was != now:
                raise ValueError(f"{path}: layer {name} has {was} in the file, {now} in the model: inject the same")


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"
