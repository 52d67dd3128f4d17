"""The benchmark compares like with like, and all its parts run, here on a small model and in two rounds."""

import inspect
import subprocess
import sys

import pytest
import torch
from transformers import T5ForConditionalGeneration

import train
from experiments import bench
from inject import freeze
from tests.helpers import small_config

POINT = dict(batch=4, length=8, rank=2, heads=4)
IDS = torch.arange(4)


@pytest.fixture
def small(monkeypatch):
    """A small backbone of the same kind, and a short grid."""
    config = small_config("t5")
    config.vocab_size = 32000  # batches have any of these tokens
    model = T5ForConditionalGeneration(config)
    freeze(model)
    monkeypatch.setattr(bench, "bare", lambda device: model)
    monkeypatch.setattr(bench, "BASE", POINT)
    monkeypatch.setattr(bench, "GRID", [dict(heads=2)])
    monkeypatch.setattr(bench, "GENERATIONS", [({}, True, 1)])
    monkeypatch.setattr(bench, "LAYER", (4, 8, 32))
    monkeypatch.setattr(bench, "LAYER_RUNS", 1)


def test_contestants_train_the_same_numbers(small):
    """PEFT's adapters are on the same layers as ours: as many parameters, with Z. The floor trains nothing."""
    count = {
        name: sum(p.numel() for p in bench.make(name, "cpu", 2, 4).parameters() if p.requires_grad)
        for name in ("floor", "LoRA", "PEFT LoRA", "Poly", "MHR", "PEFT Poly", "full")
    }
    assert count["floor"] == 0 and count["LoRA"] == count["PEFT LoRA"] > 0
    assert count["MHR"] == count["PEFT Poly"] > count["Poly"] > bench.SKILLS * count["LoRA"]
    assert count["full"] == sum(p.numel() for p in bench.bare("cpu").parameters())


def test_every_contestant_takes_the_whole_step(small):
    """The floor computes gradients of activations down to the first layer of both stacks; all others learn."""
    model, grads = bench.make("floor", "cpu", 2, 4), []
    for stack in (model.encoder, model.decoder):
        stack.block[0].register_full_backward_hook(lambda m, into, out: grads.append(into[0]))
    model(**bench.batch_of(4, 8, "cpu")).loss.backward()
    assert len(grads) == 2 and all(g.abs().sum() > 0 for g in grads)
    for name in ("LoRA", "PEFT LoRA", "Poly", "MHR", "PEFT Poly", "full"):
        torch.manual_seed(0)
        step = bench.training(name, POINT, "cpu", IDS)
        model = next(c.cell_contents for c in step.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        step()
        step()
        after = dict(model.named_parameters())
        assert all(not torch.equal(after[n], p) for n, p in before.items() if "lora_B" in n or n.endswith(".B")), name
        assert any(not torch.equal(after[n], p) for n, p in before.items()), name


def test_the_parts_run(small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "bench --rounds 2 --only train generate choices layer".split())
    bench.main()
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and f"{torch.get_num_threads()} threads" in said
    for title in ("mixed tasks", "Generation", "four choices", "One layer"):
        assert title in said
    assert said.count("b=4 l=8 r=2 h=2") == 1 and "merging" in said and "PEFT Poly" in said


def test_the_compiled_step_is_that_of_train(monkeypatch, capsys):
    """All but the compiler: its step gets the loss that `train.py --compile` would compile."""
    asked = []
    monkeypatch.setattr(train, "graph_of", lambda loss_of, model, cfg: asked.append(cfg.method) or loss_of)
    monkeypatch.setattr(sys, "argv", "bench --rounds 2 --only compile".split())
    bench.main()
    said = capsys.readouterr().out
    assert asked == ["lora", "mhr"] and "mhr, compiled" in said and "seconds of the first step: lora " in said


@pytest.mark.slow
def test_all_parts_run(small, monkeypatch, capsys):
    """Also adaptation, several points, beams, and the layer's real size."""
    for name, value in (("GRID", [{}, dict(heads=2)]), ("GENERATIONS", [({}, True, 1), ({}, False, 2)])):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "LAYER", (32, 64, 1024))
    monkeypatch.setattr(sys, "argv", "bench --rounds 2 --only train adapt generate choices layer".split())
    bench.main()
    said = capsys.readouterr().out
    for title in ("mixed tasks", "adaptation", "Generation", "four choices", "One layer"):
        assert title in said
    assert said.count("b=4 l=8 r=2 h=2") == 2 and said.count("b=4 l=8 r=2 h=4") == 5 and "mixed, beams" in said


def test_ratios_are_to_the_first(monkeypatch):
    """With made-up times: medians over rounds without the first one; each round starts with another contestant."""
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def run(name, seconds):
        order.append(name)
        now[0] += seconds

    runs = {name: lambda name=name, s=s: run(name, s) for name, s in {"a": 2.0, "b": 3.0, "c": 1.0}.items()}
    ratios = bench.ratios(runs, 3, "cpu")
    assert "".join(order) == "abcbcacababc"
    assert ratios == {"a": (1, 0), "b": (1.5, 0), "c": (0.5, 0), "seconds": (2.0, 0)}


def test_peak_memory_is_this_process_alone():
    """A small process that a large one starts does not inherit its peak."""
    code = f"from pathlib import Path\n{inspect.getsource(bench.peak_memory)}\nprint(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < bench.peak_memory() / 5


def test_no_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and "there is no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["--rounds 0", "--rounds -1", "--rounds 1", "--memory-of x", "--only x"])
def test_flags_that_cannot_be(monkeypatch, capsys, line):
    """One sentence that names the flag, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["bench", *line.split()])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and line.split()[0] in capsys.readouterr().err.split("error: ")[1]
