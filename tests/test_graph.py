"""What keeps a device busy: batches that are made ahead, batches of few sizes, and a step that is one graph."""

import itertools
import math
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import benchmarks
import train
from data import Item
from methods import build_model
from plumbing import graph
from plumbing.ahead import ahead
from plumbing.errors import UserError
from plumbing.graph import rounded_up, same_sizes
from tests.helpers import randomise, small_backbone

COMPILER = any(map(shutil.which, ("g++", "clang++", "cl")))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")


class Tensors(NamedTuple):
    tensors: dict


def numbers(batch: list) -> list[Tensors]:
    return [Tensors({"x": torch.tensor(batch)})]


# --- Ahead ------------------------------------------------------------------------------------------------------------


def test_batches_come_in_their_order_with_their_parts():
    pairs = itertools.islice(ahead(([k] for k in itertools.count()), numbers), 50)
    assert [(batch, parts[0].tensors["x"].tolist()) for batch, parts in pairs] == [([k], [k]) for k in range(50)]


def test_a_batch_is_ready_before_it_is_asked_for_and_not_many_are():
    made, ready = [], threading.Event()

    def work(batch):
        made.append(batch[0])
        if len(made) == 3:
            ready.set()
        return numbers(batch)

    pairs = ahead(([k] for k in itertools.count()), work)
    next(pairs)
    assert ready.wait(10) and made == [0, 1, 2]


def test_an_error_is_raised_where_its_batch_is_due():
    def work(batch):
        if batch == [3]:
            raise UserError("a bad row")
        return numbers(batch)

    pairs = ahead(([k] for k in itertools.count()), work)
    assert [next(pairs)[0] for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(UserError, match="a bad row"):
        next(pairs)


def test_its_thread_ends_with_it():
    pairs = ahead(([k] for k in itertools.count()), numbers)
    next(pairs)
    alive = threading.active_count()
    pairs.close()
    assert threading.active_count() == alive - 1


# --- Few sizes --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_lengths_are_rounded_up_to_few_sizes(length, longest):
    length = min(length, longest)
    size = rounded_up(length, longest)
    assert length <= size <= longest or size == length
    assert size <= max(16, length * 3 / 2)
    assert len({rounded_up(k, longest) for k in range(1, longest + 1)}) <= 2 * math.log2(max(2, longest))


def few_tasks(folder: Path, **settings):
    """(config, model in training mode, tokenizer, 7 items of 3 tasks) of a backbone of one layer."""
    options = dict(method="mhr", dataset="strings", heads=2, batch_size=8, backbone=small_backbone(folder / "backbone"))
    cfg = train.make_config(**options | settings)
    tasks = benchmarks.load_for(cfg, cfg.split, ("train",)).train[:3]
    torch.manual_seed(0)
    model, tokenizer = build_model(cfg, 3)
    randomise(model)
    items = [Item(k % 3, e, e.outputs[0]) for k, e in enumerate(itertools.chain(*(t.train[:3] for t in tasks)))]
    return cfg, model.train(), tokenizer, items[:7]


def step(cfg, model, tokenizer, items) -> tuple[float, list]:
    """Loss and gradients of one step on these items."""
    loss_of, in_parts = train.loss_and_parts(model, tokenizer, cfg)
    model.zero_grad()
    loss = train.backward_in_parts(loss_of, in_parts(items), "cpu")
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_padding_to_few_sizes_changes_no_gradient(monkeypatch, tmp_path, micro_batch):
    """The whole of --compile but the compiler: same loss and gradients from wider tensors of fixed rows."""
    cfg, model, tokenizer, items = few_tasks(tmp_path, routing="sigmoid", micro_batch=micro_batch)
    expected, seen = step(cfg, model, tokenizer, items), []
    monkeypatch.setattr(train, "graph_of", lambda loss_of, model, cfg: lambda t: seen.append(t) or loss_of(t))
    got = step(cfg.__class__(**vars(cfg) | dict(compile=True)), model, tokenizer, items)
    shapes = {name: {t[name].shape for t in seen} for name in seen[0]}
    rows = micro_batch or cfg.batch_size
    assert all(size[0] == rows and size[1] in (16, 24, 32, 48, 64) for sizes in shapes.values() for size in sizes)
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for g, e in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-5 * e.abs().max().item() + 1e-9)


def test_every_part_has_the_same_size():
    part = train.Part({"input_ids": torch.ones(2, 5), "labels": torch.ones(2, 17)}, [4, 5], [4, 5, 6], 0.4)
    cfg = SimpleNamespace(micro_batch=3, batch_size=7)
    (got,) = same_sizes(lambda batch: [part], cfg, longest=40)([])
    assert got.tensors["input_ids"].shape == (3, 16) and got.tensors["labels"].shape == (3, 24)
    assert got.tasks == [4, 5, 5] and got.among == [4, 5, 6, 6, 6, 6, 6] and got.share == 0.4
    assert (got.tensors["labels"] != -100).sum() == 2 * 17 and got.tensors["input_ids"][2].sum() == 5


# --- One graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, missing", [("cpu", "a C++ compiler"), ("cuda", "the package triton")])
def test_a_machine_that_cannot_compile_says_so(monkeypatch, device, missing):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^--compile: .*{missing.replace('+', '.')}"):
        graph.refuse_what_cannot_compile(train.Config(device=device))


def test_checkpointing_cannot_be_compiled(tmp_path):
    with pytest.raises(UserError, match="^--compile does not go with --checkpointing"):
        train.main(dict(compile=True, checkpointing=True, steps=1, output_dir=str(tmp_path / "run")))


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_is_one_graph_and_is_resumed_to_the_bit(tmp_path):
    """One graph for all batches; the run that is stopped and resumed ends as the other, and its settings say how."""
    torch._dynamo.reset()
    flags = dict(method="mhr", dataset="strings", heads=2, batch_size=16, eval_examples=0, compile=True)
    flags |= dict(log_every=1, seed=3, backbone=small_backbone(tmp_path / "backbone"))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    train.main(flags | dict(steps=12, output_dir=str(tmp_path / "whole")))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    stop_after(5, flags | dict(steps=12, save_every="5", output_dir=str(tmp_path / "cut")))
    train.main(dict(resume=True, output_dir=str(tmp_path / "cut")))
    saved = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "cut")]
    assert saved[0] == saved[1]
    assert '"compile": true' in (Path(tmp_path) / "cut" / "config.json").read_text()


def stop_after(steps: int, flags: dict):
    """A run that ends with an error behind so many steps."""
    real, calls = train.refuse_nonfinite, []

    def stop(*args):
        calls.append(args)
        if len(calls) > steps:
            raise KeyboardInterrupt
        real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "refuse_nonfinite", stop)
        train.main(flags)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_is_the_step(tmp_path):
    """Loss and gradients of the compiled step equal those of the eager one, without noise."""
    cfg, model, tokenizer, items = few_tasks(tmp_path, routing="sigmoid")
    expected = step(cfg, model, tokenizer, items)
    got = step(cfg.__class__(**vars(cfg) | dict(compile=True)), model, tokenizer, items)
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for g, e in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-5 * e.abs().max().item() + 1e-9)
