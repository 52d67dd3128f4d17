"""The items of `experiments.gpu`: what is checked and timed on a GPU, each in a process of its own.

    python -m experiments.gpu_items training cuda FILE        one item; its record is written to FILE as JSON

Every item is a function (size, device, here, ...) of the sizes in SIZES; it returns a dictionary that goes into
results/gpu.json. On a CPU all of them run at a tiny size.
"""

import contextlib
import copy
import importlib.machinery
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from unittest import mock

ABSENT = {name for name in ("datasets", "rouge_score", "peft") if importlib.util.find_spec(name) is None}
for name in {"datasets", "rouge_score"} & ABSENT:  # only files and scores need them: all other items do without
    for module in (name, f"{name}.rouge_scorer"):
        sys.modules[module] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(module, None), __path__=[])

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Adafactor, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

import train
from experiments import bench
from inject import adapter_parameters, freeze, task_ids
from methods import add_adapters
from plumbing.ahead import Part, pinned
from plumbing.backbones import reason_of
from plumbing.errors import UserError
from plumbing.graph import graph_of
from plumbing.run import Run
from recipes import ONE_ADAPTER, PRETRAINING, recipe
from tools.estimate_memory import training_memory

ROOT = Path(__file__).resolve().parents[1]
LARGE = dict(d_model=1024, d_ff=2816, num_heads=16, num_layers=24, vocab_size=32128)
XL = dict(d_model=2048, d_ff=5120, num_heads=32, num_layers=24, vocab_size=32128)
SMALL = dict(d_model=64, d_ff=128, num_heads=1, num_layers=2, vocab_size=384)
SIZES = {  # few: layers of a model that compiles in a minute or two; lengths: tokens of inputs and outputs
    "cuda": dict(large=LARGE, xl=XL, few=6, batch=16, half=8, lengths=(256, 64), tasks=313, rounds=10, prompt=128,
                 new=24, strings=200, warm=100, steps=20),
    "cpu": dict(large=SMALL, xl=SMALL, few=1, batch=4, half=2, lengths=(24, 8), tasks=20, rounds=2, prompt=8,
                new=4, strings=12, warm=6, steps=10),
}  # fmt: skip
CONTESTANTS = ("floor", "LoRA", "Poly", "MHR, 8 heads", "MHR, 64 heads", "PEFT LoRA", "PEFT Poly")
ADAPTED = {"MHR": ("mhr", "lora"), "Poly": ("poly", "lora"), "LoRA": ("lora", "lora"), "(IA)^3": ("ia3", "ia3"),
           "SFT": ("shared", "sft"), "MHR of (IA)^3": ("mhr", "ia3"), "Poly of SFTs": ("poly", "sft")}  # fmt: skip
ACTIVITIES = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
PROFILED, SHOWN = 2, 12  # steps under the profiler; lines of a profile
VIEWS = set("view _unsafe_view t transpose permute unsqueeze squeeze expand slice select alias as_strided detach "
            "unbind split split_with_sizes reshape lift_fresh".split())  # fmt: skip


class Here:
    """What an item tells the process that started it. Without that (path None) nothing."""

    def __init__(self, path: Path | None = None):
        self.path, self.record = path, {}

    def fail(self, why: str):
        """Write that the item failed, with the result that was kept before."""
        self.keep(self.record | {"state": "failed", "why": why})

    def ready(self) -> float:
        """From here on nothing else may be timed: wait for the turn. Returns the seconds that are left."""
        if self.path is None:
            return math.inf
        self.path.with_suffix(".ready").touch()
        if not (line := sys.stdin.readline()):  # who would have sent it is gone
            sys.exit(1)
        return float(line)

    def keep(self, record: dict):
        """Write a record: the last one counts, also if this process then crashes."""
        self.record = record
        if self.path:
            whole = self.path.with_suffix(".tmp")
            whole.write_text(json.dumps(record))
            os.replace(whole, self.path)


# --- Models and steps -------------------------------------------------------------------------------------------------


def config_of(shape: dict) -> T5Config:
    return T5Config(**shape, d_kv=64, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
                    tie_word_embeddings=False)  # fmt: skip


def backbone(shape: dict, device: str) -> T5ForConditionalGeneration:
    """A frozen T5 v1.1 with random weights, made on the device itself; on a GPU in bfloat16."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = T5ForConditionalGeneration(config_of(shape))
    finally:
        torch.set_default_dtype(before)
    freeze(model)
    return model.train()


def contestant(name: str, shape: dict, device: str, tasks: int) -> nn.Module:
    """A model with the adapters of one of CONTESTANTS, rank 1, on all linear layers."""
    model = backbone(shape, device)
    if name != "floor":
        return bench.adapted(model, name.split(",")[0], tasks, 1, 64 if "64" in name else 8).to(device)
    for stack in (model.encoder, model.decoder):  # zero, but with it every activation has a gradient, in a graph too
        stack.anchor = nn.Parameter(torch.zeros(shape["d_model"], dtype=model.dtype, device=device))
        stack.embed_tokens.register_forward_hook(lambda _, args, y, anchor=stack.anchor: y + anchor)
    return model


def batch_of(size: dict, device: str, rows: int) -> dict[str, torch.Tensor]:
    batch = bench.batch_of(rows, size["lengths"][0], device, size["lengths"][1], size["large"]["vocab_size"])
    return {key: value for key, value in batch.items() if key != "use_cache"}


def mixtures(rows: int, tasks: int) -> list[list[int]]:
    """Ids of several batches, each of as many tasks as possible."""
    return [[(rows * k + row) % tasks for row in range(rows)] for k in range(5)]


def step_of(name: str, model: nn.Module, batch: dict, ids: list[list[int]], graph: bool = False):
    """A function that takes a training step and returns its loss. ids: of its batches, in turn."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if name != "floor" else None
    loss_of, rows = partial(train.token_loss, model), len(ids[0])
    if graph:
        loss_of = graph_of(loss_of, model, train.Config(batch_size=rows))
    tensors = [torch.tensor(i, device=batch["labels"].device) for i in ids]
    turns = itertools.cycle(zip(ids, tensors, strict=True))

    def step() -> torch.Tensor:
        tasks, tensor = next(turns)
        with contextlib.nullcontext() if name.startswith("PEFT") else task_ids(tasks):
            loss = loss_of(batch | {"task_ids": tensor} if name == "PEFT Poly" else dict(batch))
            loss.backward()
        if optimizer:
            optimizer.step()
        for p in trained:
            p.grad = None
        return loss.detach()

    return step


# --- What is measured -------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches, without views: on a CPU they stand in for kernels."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def profiled(run, device: str, steps: int = PROFILED) -> dict:
    """The `summary` of steps of a function; on a CPU only a number of operations, as kernels."""
    if device == "cpu":
        with Operations() as operations:
            run()
        return {"kernels": operations.number}
    try:
        with torch.profiler.profile(activities=ACTIVITIES) as profiler:
            for _ in range(steps):
                run()
            torch.cuda.synchronize()
        return summary_of(profiler, steps)
    except Exception as error:  # the times are there without it
        return {"why": f"the profiler failed: {reason_of(error)}"}


def summary_of(profiler, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        return summary(json.loads(Path(folder, "trace.json").read_text(errors="replace"))["traceEvents"], steps)


def summary(events: list[dict], steps: int) -> dict:
    """Of a trace of so many steps, for one: ms in which the GPU was busy, kernels, and what there was most of.

    top: kernels by time, [name, ms, number]. operators: torch's, by number, [name, number]. Without any event of a GPU
    the profiler could not see it: then there is only the reason.
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")  # not the GPU's annotations, which span many kernels
    on_gpu = sorted((e["ts"], e["ts"] + e["dur"], e["name"], e["cat"]) for e in events if e.get("cat") in kinds)
    if not on_gpu:
        return {"why": "the profiler saw no kernels"}
    busy, last, by_name = 0.0, -math.inf, defaultdict(lambda: [0.0, 0])
    for begin, end, name, _ in on_gpu:  # they overlap where there are several streams
        busy, last = busy + max(0.0, end - max(begin, last)), max(last, end)
        by_name[name][0] += (end - begin) / 1000 / steps
        by_name[name][1] += 1
    top = sorted(by_name.items(), key=lambda item: -item[1][0])[:SHOWN]
    operators = Counter(e["name"] for e in events if e.get("cat") == "cpu_op").most_common(SHOWN)
    return {
        "busy": busy / 1000 / steps, "kernels": sum(cat == "kernel" for *_, cat in on_gpu) / steps,
        "top": [[name, ms, count / steps] for name, (ms, count) in top],
        "operators": [[name, count / steps] for name, count in operators],
    }  # fmt: skip


def memory(device: str, peak: bool = False) -> int:
    """Bytes of tensors on the GPU, now or (peak) at most since this was reset. On a CPU 0."""
    if device == "cpu":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def settle(run, device: str, before: int, times: int) -> tuple[float, float | None]:
    """Run a step until nothing is new in it, then once more: (loss, on a GPU peak MB beyond `before`)."""
    for _ in range(times):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    loss = run().item()
    return loss, (memory(device, peak=True) - before) / 2**20 if device == "cuda" else None


def contest(size: dict, device: str, here: Here, names, rows: int, ids: list[list[int]]) -> dict:
    """Training steps of contestants, in turn. One that cannot be made is noted in "lost", and the others go on."""
    runs, result = {}, {"seconds": {}, "loss": {}, "peak": {}, "lost": {}, "profile": {}}
    batch = batch_of(size, device, rows)
    for name in names:
        if name.startswith("PEFT") and "peft" in ABSENT:
            result["lost"][name] = "PEFT is not installed"
            continue
        try:
            before = memory(device)
            run = step_of(name, contestant(name, size["large"], device, size["tasks"]), batch, ids)
            result["loss"][name], result["peak"][name] = settle(run, device, before, 2)
            runs[name] = run
        except Exception as error:
            result["lost"][name] = reason_of(error)
    here.ready()
    result["seconds"] = bench.timed(runs, size["rounds"], device)
    result["wrong"] = [f"the loss of {name} is {x}" for name, x in result["loss"].items() if not math.isfinite(x)]
    here.keep(finished(result))
    for name, run in runs.items():
        result["profile"][name] = profiled(run, device)
    return result


def finished(result: dict) -> dict:
    """The record of an item that has a result: wrong if that says so."""
    wrong = result.get("wrong")
    return {"state": "wrong", "why": "; ".join(wrong), "result": result} if wrong else dict(state="done", result=result)


# --- Items: is it right? ----------------------------------------------------------------------------------------------


def small_model(kind: str) -> nn.Module:
    """A small T5 or Llama on the CPU, with weights so large that every part of it matters."""
    torch.manual_seed(0)
    if kind == "T5":
        config = T5Config(vocab_size=100, d_model=32, d_kv=12, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
                          feed_forward_proj="gated-gelu", decoder_start_token_id=0)  # fmt: skip
        model = T5ForConditionalGeneration(config)
    else:
        config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
        model = LlamaForCausalLM(config)
    randomise(model)
    return model


def randomise(model: nn.Module):
    """Random weights: of matrices anew (T5 does not divide its attention scores), of vectors near what they are."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and p.is_floating_point():
                p.normal_(0, 0.07 if ".q." in name else 0.25)
            elif p.is_floating_point():
                p.add_(0.1 * torch.randn_like(p))


def put_in(model: nn.Module, method: str, adapter: str) -> nn.Module:
    cfg = train.Config(method=method, adapter=adapter, rank=2, skills=3, heads=4, density=0.2, routing="sigmoid")
    add_adapters(model, cfg, 5)
    return model


def answers(model: nn.Module, ids: list[int]) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """(logits, loss, gradients) of a batch of four, on the CPU and in float64."""
    x = torch.arange(3, 3 + 4 * 7, device=model.device).view(4, 7) * 11 % 97 + 3
    labels = x[:, 1:6].contiguous() if model.config.is_encoder_decoder else x
    with task_ids(ids):
        output = model(input_ids=x, attention_mask=torch.ones_like(x), labels=labels, use_cache=False)
        output.loss.backward()
    grads = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().double().cpu(), output.loss.item(), grads


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of b; infinite if there is none."""
    value = ((a - b).abs().max() / b.abs().max()).item()
    return value if math.isfinite(value) else math.inf


def correctness(size: dict, device: str, here: Here) -> dict:
    """Outputs and gradients on the device beside those on the CPU in float64; bf16; injection before and after."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    lines, wrong = [], []
    for kind, adapted, ids in itertools.product(("T5", "Llama"), ADAPTED, ([3, 0, 4, 1], [2, 2, 2, 2])):
        if ids[0] == ids[1] and ADAPTED[adapted][0] in ONE_ADAPTER:  # it knows no tasks
            continue
        exact = put_in(small_model(kind), *ADAPTED[adapted]).double()
        randomise(exact)
        line = {"model": kind, "adapter": adapted, "tasks": len(set(ids))}
        logits, _, grads = answers(copy.deepcopy(exact), ids)
        for name, dtype, limit in (("float64", torch.float64, 1e-5), ("float32", torch.float32, 1e-3)):
            own, _, own_grads = answers(copy.deepcopy(exact).to(device, dtype), ids)
            line[name] = [difference(own, logits), max(difference(own_grads[n], g) for n, g in grads.items())]
            if grads.keys() != own_grads.keys() or not max(line[name]) <= limit:
                wrong.append(
                    f"{adapted} in {kind}, {line['tasks']} tasks, {name}: {max(line[name]):.1e} beside the CPU"
                )
        lines.append(line)
        if len(set(ids)) > 1 and adapted in ("MHR", "LoRA"):
            line["bf16"] = half_precision(exact, device, ids)
            if not max(line["bf16"]) <= 0.25:
                wrong.append(f"{adapted} in {kind}: bf16 differs from fp32 by {max(line['bf16']):.2f}")
    injection = before_and_after(device)
    wrong += [
        f"injected before and after moving to the device, not so: {name}" for name, yes in injection.items() if not yes
    ]
    return {"lines": lines, "injection": injection, "wrong": wrong}


def half_precision(exact: nn.Module, device: str, ids: list[int]) -> list[float]:
    """Relative differences of a bfloat16 backbone with float32 adapters to a float32 one: [loss, gradients]."""
    results, added = [], adapter_parameters(exact)
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(exact).to(device, torch.float32)
        for name, p in model.named_parameters():
            if name not in added:
                p.data = p.data.to(dtype)
        results.append(answers(model, ids)[1:])
    (loss, grads), (half_loss, half_grads) = results
    flat, half = (torch.cat([g[n].flatten() for n in grads]) for g in (grads, half_grads))
    return [abs(half_loss - loss) / abs(loss), ((half - flat).norm() / flat.norm()).item()]


def before_and_after(device: str) -> dict[str, bool]:
    """Adapters that are put in before the model moves to the device, and after."""
    before = put_in(small_model("T5"), "mhr", "lora")
    randomise(before)
    before = before.to(device)
    after = put_in(small_model("T5").to(device), "mhr", "lora")
    devices = {p.device.type for model in (before, after) for p in model.parameters()}
    after.load_state_dict(before.state_dict())
    equal = torch.equal(answers(before, [3, 0, 4, 1])[0], answers(after, [3, 0, 4, 1])[0])
    return {"every parameter, Z included, is on the device": devices == {device}, "the outputs are equal": equal}


def killed(flags: dict, at: int):
    """A run of train.py that is killed at a step."""

    class Killed(Run):
        def record(self, *args, **more):
            super().record(*args, **more)
            if self.now.step == at:
                os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(train, "Run", Killed):
        train.main(flags)


def deterministic(size: dict, device: str, here: Here, compile: bool = False) -> dict:
    """Whether a run gives the same bits again, and after SIGKILL and --resume."""
    steps = size["steps"]
    with tempfile.TemporaryDirectory() as folder:
        flags = dict(method="mhr", heads=8, steps=steps, batch_size=16, log_every=1, save_every="4", eval_examples=0,
                     device=device, deterministic=device == "cuda", compile=compile)  # fmt: skip
        runs = {name: flags | dict(output_dir=f"{folder}/{name}") for name in ("once", "again", "killed")}
        train.main(runs["once"])
        train.main(runs["again"])
        command = [sys.executable, "-m", "experiments.gpu_items", "killed", json.dumps(runs["killed"]), str(steps // 2)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the run that was to be killed ended with code {done.returncode}: {done.stdout[-300:]}")
        train.main(runs["killed"] | dict(resume=True))
        bits = {name: Path(flags["output_dir"], "adapter.safetensors").read_bytes() for name, flags in runs.items()}
    same = {"again": bits["again"] == bits["once"], "killed and resumed": bits["killed"] == bits["once"]}
    wrong = [f"{name}: other bits" for name, yes in same.items() if not yes and not compile]  # a graph: to be seen
    return {"same": same, "steps": steps, "wrong": wrong}


# --- Items: what does it cost? ----------------------------------------------------------------------------------------


def training(size: dict, device: str, here: Here) -> dict:
    """Steps of all contestants, each batch of as many tasks as possible."""
    return contest(size, device, here, CONTESTANTS, size["batch"], mixtures(size["batch"], size["tasks"]))


def adaptation(size: dict, device: str, here: Here) -> dict:
    """Steps on one task."""
    return contest(size, device, here, ("floor", "LoRA", "MHR, 8 heads"), size["half"], [[5] * size["half"]])


def compiled(size: dict, device: str, here: Here, name: str, whole: bool) -> dict:
    """Steps of a contestant in one graph, of the whole model or of few layers. Each step has other tasks."""
    shape = size["large"] if whole else size["large"] | dict(num_layers=size["few"])
    torch._dynamo.utils.counters.clear()
    before, start = memory(device), time.perf_counter()
    model = contestant(name, shape, device, size["tasks"])
    batch, ids = batch_of(size, device, size["batch"]), mixtures(size["batch"], size["tasks"])
    run = step_of(name, model, batch, ids, graph=True)
    run().item()
    result = {"compiling": time.perf_counter() - start, "layers": shape["num_layers"]}
    if device == "cuda":  # now: what a CUDA graph allocates later is not counted
        result["peak"] = (memory(device, peak=True) - before) / 2**20
        torch.cuda.empty_cache()
    here.ready()
    result["loss"], _ = settle(run, device, before, 3)  # a CUDA graph is recorded in the second step
    result["seconds"] = bench.timed({name: run}, size["rounds"], device)[name]
    result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    result["wrong"] = [] if result["graphs"] == 1 else [f"{result['graphs']} graphs instead of one"]
    here.keep(finished(result))
    return result | {"profile": profiled(run, device) if device == "cuda" else {}}


def recipe_step(size: dict, device: str, here: Here) -> dict:
    """Steps of T0's recipe for MHR on T5-XL, the whole of `train.py`'s, beside the floor."""
    here.ready()
    rows, result = size["half"], {"lost": {}}
    cfg = train.Config(**recipe(PRETRAINING, "t0", "mhr") | dict(method="mhr", heads=8, batch_size=rows))
    batch, ids = batch_of(size, device, rows), mixtures(rows, size["tasks"])
    floor = step_of("floor", contestant("floor", size["xl"], device, 1), batch, ids)
    before, model = memory(device), backbone(size["xl"], device)
    add_adapters(model, cfg, size["tasks"])
    optimizer = train.make_optimizer(model, cfg)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    tensors, turns = pinned({name: x.cpu() for name, x in batch.items()}), itertools.cycle(ids)

    def step(optimizer: torch.optim.Optimizer) -> torch.Tensor:
        tasks = next(turns)
        loss = train.backward_in_parts(partial(train.token_loss, model), [Part(tensors, tasks, tasks, 1)], device)
        norm = nn.utils.clip_grad_norm_(trained, cfg.clip)
        torch.stack([loss, norm]).tolist()  # as `Run.values` does
        optimizer.step()
        optimizer.zero_grad()
        return loss

    runs = {"floor": floor, "MHR, 8 heads": partial(step, optimizer)}
    result["loss"], peak = settle(runs["MHR, 8 heads"], device, before, 2)
    result["peak"] = {"MHR, 8 heads": peak}
    result["seconds"] = bench.timed(runs, size["rounds"], device)
    result["wrong"] = [] if math.isfinite(result["loss"]) else [f"the loss is {result['loss']}"]
    here.keep(finished(result))
    groups = [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
    theirs = partial(step, Adafactor(groups, scale_parameter=False, relative_step=False))
    result["seconds"] |= bench.timed({"with transformers' Adafactor": theirs}, 1, device)
    here.keep(finished(result))
    return result | {"profile": {name: profiled(run, device) for name, run in runs.items()}}


@torch.no_grad()
def generation(size: dict, device: str, here: Here) -> dict:
    """Greedy generation for a batch of many tasks, with mixtures that are kept and that are not."""
    here.ready()
    rows = size["batch"]
    batch = bench.batch_of(rows, size["prompt"], device, 1, size["large"]["vocab_size"])
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = dict(max_new_tokens=size["new"], min_new_tokens=size["new"], do_sample=False, num_beams=1)
    models = {name: contestant(name, size["large"], device, size["tasks"]).eval() for name in ("floor", "MHR, 8 heads")}
    for p in adapter_parameters(models["MHR, 8 heads"]).values():
        p.normal_(0, 8 / size["large"]["d_model"] ** 0.5)  # B is zero at first: all tasks would be alike

    def run(name: str, keep: bool = True) -> torch.Tensor:
        with task_ids(mixtures(rows, size["tasks"])[0], keep=keep):
            return models[name].generate(**batch, **options)

    runs = {name: partial(run, name) for name in models}
    result = {"seconds": bench.timed(runs, min(3, size["rounds"]), device)}
    result["equal"] = torch.equal(run("MHR, 8 heads"), run("MHR, 8 heads", keep=False))
    result["other"] = not torch.equal(run("MHR, 8 heads"), run("floor"))
    result["wrong"] = [] if result["equal"] else ["kept mixtures give other tokens"]
    here.keep(finished(result))
    return result | {"profile": {name: profiled(run, device, 1) for name, run in runs.items()}}


def strings(size: dict, device: str, here: Here, compile: bool = False) -> dict:
    """Steps of the README's main job without its evaluation, once all is warm."""
    steps, warm, moments, result = size["strings"], size["warm"], [], {}
    last, profiler = steps - PROFILED - 1, torch.profiler.profile(activities=ACTIVITIES) if device == "cuda" else None

    class Timed(Run):
        def record(self, *args, **more):
            super().record(*args, **more)
            if (step := self.now.step) == warm:
                here.ready()
            if warm <= step <= last:
                moments.append(time.perf_counter())
            if step == last:
                result["seconds"] = [b - a for a, b in itertools.pairwise(moments)]
                here.keep(finished(result))
            if step == last and profiler:
                profiler.start()
            if step == last + PROFILED and profiler:
                profiler.stop()

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train, "Run", Timed):
        flags = dict(method="mhr", heads=8, dataset="strings", steps=steps, eval_examples=0, compile=compile)
        result["loss"] = train.main(flags | dict(device=device, output_dir=f"{folder}/run"))["loss"]
    result["before"] = moments[0] - start
    return result | {"profile": summary_of(profiler, PROFILED) if profiler else {}}


def command(size: dict, device: str, here: Here) -> dict:
    """The README's command for T0 on the bundled sample, with a random T5-XL from a folder."""
    if "datasets" in ABSENT or "rouge_score" in ABSENT:
        raise UserError("it reads files and scores, for which datasets and rouge_score must be installed")
    shape = (
        size["xl"] if here.ready() >= 100 else size["xl"] | dict(num_layers=4)
    )  # 6 GB take a while to write and read
    with tempfile.TemporaryDirectory() as folder:
        backbone(shape, device).save_pretrained(f"{folder}/backbone")
        ByT5Tokenizer().save_pretrained(f"{folder}/backbone")
        if device == "cuda":
            torch.cuda.empty_cache()
        line = "train.py --method mhr --heads 8 --dataset t0 --data-dir assets/samples/t0 --steps"
        words = [*line.split(), str(size["steps"]), "--backbone", f"{folder}/backbone", "--output-dir", f"{folder}/run"]
        start, given = time.perf_counter(), ["--device", device]
        done = subprocess.run([sys.executable, *words, *given], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"it ended with code {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
        all_of_it, run = time.perf_counter() - start, json.loads(Path(folder, "run", "result.json").read_text())
    result = {"layers": shape["num_layers"], "in all": all_of_it} | {
        key: run[key] for key in ("loss", "steps", "seconds")
    }
    return result | {"wrong": [] if math.isfinite(run["loss"]) else [f"the loss is {run['loss']}"]}


def computed(size: dict, device: str, here: Here) -> dict:
    """MB that `tools.estimate_memory` computes for what the other items measure: {item: {contestant: MB}}."""
    methods = {"LoRA": dict(method="lora"), "Poly": dict(method="poly"), "MHR, 8 heads": dict(method="mhr", heads=8),
               "MHR, 64 heads": dict(method="mhr", heads=64)}  # fmt: skip
    cases = {"training": ("large", "batch", methods), "adaptation": ("large", "half", ("LoRA", "MHR, 8 heads")),
             "recipe": ("xl", "half", ("MHR, 8 heads",))}  # fmt: skip
    result = {}
    for item, (shape, rows, names) in cases.items():
        tasks = 1 if item == "adaptation" else size["tasks"]  # a batch has as many as there are
        with tempfile.TemporaryDirectory() as folder:
            config_of(size[shape]).save_pretrained(folder)
            settings = dict(precision="bf16" if device == "cuda" else "fp32", skills=8, rank=1)
            sizes = {
                name: training_memory(folder, size[rows], size["lengths"], tasks, **settings | methods[name])
                for name in names
            }
        leave_out = "AdamW" if item == "recipe" else ""  # which has Adafactor
        result[item] = {n: sum(v for k, v in s.items() if k != leave_out) / 2**20 for n, s in sizes.items()}
    return result


def machine(size: dict, device: str, here: Here) -> dict:
    """What all numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown processor")
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    cuda = f", CUDA {torch.version.cuda}" if device == "cuda" else ""
    where = f"{bench.machine(device)}{cuda}; {os.cpu_count()} cores of {processor}"
    return {"line": f"{where}; commit {commit or 'unknown'}; {time.strftime('%Y-%m-%d')}"}


def main(name: str, device: str, path: str, options: str = "{}"):
    """Write the record of an item: {"state": done, wrong, skipped or failed; "result" or "why"}."""
    here = Here(Path(path))
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no GPU here")
        logging.set_verbosity_error()
        here.keep(finished(globals()[name](SIZES[device], device, here, **json.loads(options))))
    except UserError as error:
        here.keep({"state": "skipped", "why": str(error)})
    except Exception as error:
        traceback.print_exc()  # into the log, whose end is kept too
        here.fail(reason_of(error))


if __name__ == "__main__":
    killed(json.loads(sys.argv[2]), int(sys.argv[3])) if sys.argv[1] == "killed" else main(*sys.argv[1:])
