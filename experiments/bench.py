"""What routing costs: ratios to the frozen backbone, beside PEFT, in one run.

    python -m experiments.bench                                the tables of results/bench.md, on the CPU
    python -m experiments.bench --device cuda                  the same on a GPU, with the backbone in bfloat16
    python -m experiments.bench --only train generate --rounds 5

The backbone is a T5 v1.1 of the size of T5-small (d_model 512, d_ff 1024, 8 + 8 layers) with random weights. Every time
is divided by the floor. For a training step the floor is the frozen backbone: its forward pass and the gradient of its
activations. For generation and scoring it is the bare backbone. The grid changes one number of its first point at a
time.

The contestants of a line are timed in turn, round after round, and each round starts with the next of them: other work
on the machine then slows all of them alike. A ratio is the median over rounds divided by the floor's; in brackets is
half the interquartile range of the rounds' ratios.

PEFT's Poly has as many splits as MHR has heads, so compare those two; our Poly has one head. For one task MHR generates
as `evaluate.py` does: merged once for all batches, if the backbone is float32 ("merging" is the time to merge and
unmerge). PEFT's adapters are not merged; its Poly cannot score choices, and crashes in beam search. On a GPU every
backbone is bfloat16, also that of "full"; the single layer is float32.
"""

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()


import argparse
import copy
import functools
import importlib.util
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils import logging

import train
from benchmarks.choices import _encoder_decoder_logits
from inject import freeze, inject, merge, task_ids, unmerge
from layers import LORA_LAYERS
from lora import LoRA, LoRALinear
from methods import build_model
from mhr import MHRLinear, MHRRouter
from plumbing.errors import exit_on_user_error
from plumbing.tables import aligned
from poly import PolyLinear, PolyRouter
from tools.estimate_memory import training_memory

TASKS, SKILLS, OUTPUT = 16, 8, 32
LAYER, LAYER_RUNS = (32, 64, 1024), 20  # the inputs of one layer: examples of different tasks, tokens, width
BASE = dict(batch=16, length=128, rank=1, heads=8)
GRID = [{}, dict(batch=1), dict(batch=8), dict(batch=32), dict(length=16), dict(length=512), dict(rank=16),
        dict(heads=1), dict(heads=64)]  # fmt: skip
GENERATIONS = [  # (change, one task, beams)
    ({}, True, 1), (dict(batch=1), True, 1), ({}, True, 4), ({}, False, 1), (dict(heads=64), False, 1), ({}, False, 4),
]  # fmt: skip
LINEARS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
NAMES = ("floor", "LoRA", "PEFT LoRA", "Poly", "MHR", "PEFT Poly", "full")  # the contestants


# --- Contestants ------------------------------------------------------------------------------------------------------


@functools.cache
def bare(device: str) -> T5ForConditionalGeneration:
    """The backbone, frozen; the same weights for all."""
    torch.manual_seed(0)
    config = T5Config(d_model=512, d_ff=1024, d_kv=64, num_heads=6, num_layers=8, feed_forward_proj="gated-gelu",
                      dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
    model = T5ForConditionalGeneration(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    freeze(model)
    return model


def make(name: str, device: str, rank: int, heads: int) -> nn.Module:
    """A contestant by name: floor, full, LoRA, Poly, MHR, PEFT LoRA or PEFT Poly (with `heads` splits)."""
    model = copy.deepcopy(bare(device))
    if name == "floor":  # the first layer's inputs require a gradient, so every activation gets one
        for module in (model.encoder, model.decoder):
            module.embed_tokens.register_forward_hook(lambda m, args, y: y.detach().requires_grad_())
    elif name == "full":
        model.requires_grad_(True)
    else:
        model = adapted(model, name, TASKS, rank, heads)
    return model.to(device)


def adapted(model: nn.Module, name: str, tasks: int, rank: int, heads: int) -> nn.Module:
    """A frozen T5 with the adapters of a contestant."""
    if name.startswith("PEFT"):
        from peft import LoraConfig, PolyConfig, get_peft_model

        options = dict(r=rank, target_modules=LINEARS, task_type="SEQ_2_SEQ_LM")
        poly = dict(n_tasks=tasks, n_skills=SKILLS, n_splits=heads)
        config = PolyConfig(**options, **poly) if name == "PEFT Poly" else LoraConfig(**options, lora_alpha=1)
        return get_peft_model(model, config)
    adapter = LoRA(rank)
    layer = {
        "LoRA": lambda _, linear: LoRALinear(linear, adapter),
        "Poly": lambda _, linear: PolyLinear(linear, adapter, PolyRouter(tasks, SKILLS)),
        "MHR": lambda _, linear: MHRLinear(linear, adapter, MHRRouter(tasks, SKILLS, heads)),
    }[name]
    inject(model, layer, LORA_LAYERS["t5"])
    return model


def batch_of(size: int, length: int, device: str, labels: int = OUTPUT, vocabulary: int = 32000) -> dict:
    """A batch of random tokens {name: tensor}, with so many labels an example."""
    x = torch.randint(3, vocabulary, (size, length), device=device)
    labels = torch.randint(3, vocabulary, (size, labels), device=device)
    return dict(input_ids=x, attention_mask=torch.ones_like(x), labels=labels, use_cache=False)


# --- Timing -----------------------------------------------------------------------------------------------------------


def timed(runs: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """{name: its seconds in each round}. runs: {name: function to time}."""
    names, seconds = list(runs), {name: [] for name in runs}
    for k in range(rounds + 1):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            start = time.perf_counter()
            runs[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if k:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(runs: dict, rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """{name: (median seconds / the first one's median, half the interquartile range of the rounds' ratios)}.

    runs: {name: function to time}. "seconds": the first one's median itself.
    """
    seconds = timed(runs, rounds, device)
    floor = next(iter(seconds.values()))
    result = {}
    for name, values in seconds.items():
        low, _, high = statistics.quantiles([a / b for a, b in zip(values, floor, strict=True)], n=4)
        result[name] = statistics.median(values) / statistics.median(floor), (high - low) / 2
    return result | {"seconds": (statistics.median(floor), 0.0)}


def training(name: str, point: dict, device: str, ids: torch.Tensor):
    """A function that takes one training step: forward, backward, AdamW."""
    model = make(name, device, point["rank"], point["heads"]).train()
    batch = batch_of(point["batch"], point["length"], device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True) if trained else None

    def step():
        if name == "PEFT Poly":
            model(**batch, task_ids=ids).loss.backward()
        else:
            with task_ids(ids):
                model(**batch).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


def bench_train(point: dict, device: str, rounds: int, one_task: bool = False) -> dict:
    """The `ratios` of a training step at a point of the grid."""
    names = ["floor", "LoRA", "PEFT LoRA", "Poly", "MHR", "PEFT Poly"] + (["full"] if point == BASE else [])
    ids = torch.zeros(point["batch"], dtype=torch.long) if one_task else torch.arange(point["batch"]) % TASKS
    return ratios({n: training(n, point, device, ids.to(device)) for n in names}, rounds, device)


def generation(name: str, point: dict, device: str, ids: torch.Tensor, beams: int):
    """A function that generates 24 tokens for a batch. With one task MHR's adapters are merged beforehand."""
    model = make(name, device, point["rank"], point["heads"]).eval()
    batch = batch_of(len(ids), point["length"], device)
    del batch["labels"], batch["use_cache"]
    if name == "MHR" and len(ids.unique()) == 1 and model.dtype == torch.float32:
        merge(model, int(ids[0]))
    options = dict(max_new_tokens=24, min_new_tokens=24, num_beams=beams, do_sample=False)

    @torch.no_grad()
    def run():
        if name == "PEFT Poly":
            model.generate(**batch, **options, task_ids=ids)
        else:
            with task_ids(ids, keep=True):
                model.generate(**batch, **options)

    return run


def bench_generate(point: dict, device: str, rounds: int, one_task: bool, beams: int) -> dict:
    """The `ratios` of generating a batch, and of merging if it is of one task."""
    names = ["floor", "PEFT LoRA", "MHR"] + (["PEFT Poly"] if beams == 1 else [])
    ids = torch.zeros(point["batch"], dtype=torch.long) if one_task else torch.arange(point["batch"]) % TASKS
    runs = {name: generation(name, point, device, ids.to(device), beams) for name in names}
    if one_task:
        model = make("MHR", device, point["rank"], point["heads"])
        runs["merging"] = lambda: unmerge(model, merge(model, 0))
    return ratios(runs, rounds, device)


def bench_choices(point: dict, device: str, rounds: int) -> dict:
    """The `ratios` of scoring four choices of 8 tokens for each example of mixed tasks. The encoder runs once."""
    ids = torch.arange(point["batch"], device=device) % TASKS
    batch = batch_of(point["batch"], point["length"], device)
    del batch["labels"], batch["use_cache"]
    tokens = torch.randint(3, 32000, (4 * point["batch"], 8), device=device)
    runs = {}
    for name in ("floor", "PEFT LoRA", "MHR"):
        model = make(name, device, point["rank"], point["heads"]).eval()
        model = model.get_base_model() if name == "PEFT LoRA" else model  # with its adapters in it
        score = functools.partial(_encoder_decoder_logits, model, batch, tokens, 4)
        runs[name] = functools.partial(_within, ids, score)
    return ratios(runs, rounds, device)


@torch.no_grad()
def _within(ids: torch.Tensor, run):
    with task_ids(ids, keep=True):
        return run()


def bench_layer(device: str, rounds: int) -> dict:
    """The `ratios` of forward and backward through one square layer, with adapters of rank 16."""
    x, ids = torch.randn(LAYER, device=device, requires_grad=True), torch.arange(LAYER[0], device=device)
    gradient, linear = torch.randn(LAYER, device=device), nn.Linear(LAYER[2], LAYER[2], device=device)
    linear.requires_grad_(False)
    layers = {"floor": linear}
    for heads in (1, 8):
        layers[f"MHR, {heads} heads"] = MHRLinear(linear, LoRA(16), MHRRouter(LAYER[0], SKILLS, heads)).to(device)
        layers[f"PEFT Poly, {heads} heads"] = _peft_layer(linear, heads).to(device)

    def run(name: str, layer: nn.Module):
        ids_for = {"floor": {}, "PEFT": {"task_ids": ids}}.get(name.split()[0], {"tasks": ids})
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        for _ in range(LAYER_RUNS):
            torch.autograd.grad(layer(x, **ids_for), wanted, gradient)

    return ratios({name: functools.partial(run, name, layer) for name, layer in layers.items()}, rounds, device)


def _peft_layer(linear: nn.Linear, heads: int) -> nn.Module:
    from peft import PolyConfig
    from peft.tuners.poly.layer import Linear

    return Linear(linear, "a", PolyConfig(r=16, n_tasks=LAYER[0], n_skills=SKILLS, n_splits=heads))


def bench_compile(device: str, rounds: int) -> tuple[dict, dict[str, float]]:
    """The `ratios` of a training step of the bundled model as `train.py --compile` takes it, beside the eager one; and
    the seconds of each first step, compiling included. 64 examples of 64 tasks, 32 + 16 tokens, 4 skills, 8 heads.
    """
    runs, first = {}, {}
    for method in ("lora", "mhr"):
        for compiled in (False, True):
            name = f"{method}{', compiled' * compiled}"
            runs[name], start = bundled_step(method, device, compiled), time.perf_counter()
            runs[name]()
            first[name] = time.perf_counter() - start
    return ratios(runs, rounds, device), first


def bundled_step(method: str, device: str, compiled: bool):
    """A function that takes one training step of the bundled model: forward, backward, AdamW."""
    cfg = train.Config(method=method, rank=4, skills=4, heads=8, device=device, batch_size=64, compile=compiled)
    model, tokenizer = build_model(cfg, 64)
    loss_of, _ = train.loss_and_parts(model.train(), tokenizer, cfg)
    optimizer, batch = train.make_optimizer(model, cfg), batch_of(64, 32, device, labels=16, vocabulary=300)
    del batch["use_cache"]

    def step():
        with task_ids(range(64)):
            loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- Memory and start-up ----------------------------------------------------------------------------------------------


def bench_memory(device: str) -> list[tuple[str, ...]]:
    """A table as cells: peak MB of three training steps in a fresh process, beyond its imports; on the CPU what
    `tools.estimate_memory` computes; seconds to the first step."""
    lines = [("", "MB", "computed", "seconds to the first step")]
    for name in NAMES:
        command = [sys.executable, "-m", "experiments.bench", "--memory-of", name, "--device", device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # it prints its own errors
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}")
        peak, first = done.stdout.split()
        computed = f"{computed_memory(name):.0f}" if name in COMPUTED and device == "cpu" else ""
        lines.append((name, f"{float(peak):.0f}", computed, f"{float(first):.1f}"))
    return lines


COMPUTED = {
    "LoRA": dict(method="lora"), "Poly": dict(method="poly", skills=SKILLS),
    "MHR": dict(method="mhr", skills=SKILLS, heads=BASE["heads"]), "full": dict(method="full"),
}  # fmt: skip


def computed_memory(name: str) -> float:
    """MB that `training_memory` computes for a contestant."""
    with tempfile.TemporaryDirectory() as folder:
        bare("cpu").config.save_pretrained(folder)
        lengths = BASE["length"], OUTPUT
        sizes = training_memory(folder, BASE["batch"], lengths, TASKS, rank=BASE["rank"], **COMPUTED[name])
    return sum(sizes.values()) / 2**20


def peak_memory() -> float:
    """The peak memory of this process in MB (Linux). In `getrusage` a process inherits its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory_of(name: str, device: str):
    """Print the peak MB of this process in three training steps, beyond its imports, and the seconds to the first."""
    if name.startswith("PEFT"):
        import peft  # noqa: F401  now: imports are not timed
    imports, start = peak_memory(), time.perf_counter()
    step = training(name, BASE, device, torch.arange(BASE["batch"]).to(device) % TASKS)
    bare.cache_clear()  # the original of its copy
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    step()
    step()
    print(torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_memory() - imports, first)


# --- The tables -------------------------------------------------------------------------------------------------------


def with_bar(lines, name: str) -> Iterable:
    """The lines of a table, with a progress bar."""
    return tqdm(lines, desc=name, unit="line", disable=None, leave=False)


def label_of(point: dict) -> str:
    return f"b={point['batch']} l={point['length']} r={point['rank']} h={point['heads']}"


def print_table(title: str, lines: dict[str, dict[str, tuple[float, float]]]):
    """Print a line for each point and a column for each contestant: ratio (spread). seconds: of the floor."""
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    cells = [["", *names]]
    for label, line in lines.items():
        texts = [f"{line[n][0]:.3f}" if n == "seconds" else f"{line[n][0]:.2f} ({line[n][1]:.2f})" if n in line else ""
                 for n in names]  # fmt: skip
        cells.append([label, *texts])
    print(f"\n{title}\n\n{aligned(cells, left=1)}", flush=True)


def machine(device: str) -> str:
    """The machine and the versions that the times depend on."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    packages = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name)]
    return f"{device}, {where}, {platform.machine()}, {', '.join(f'{name} {version(name)}' for name in packages)}"


def arguments() -> argparse.Namespace:
    """The command line. Exits with one sentence for flags that cannot be."""
    parts = ("train", "adapt", "generate", "choices", "layer", "compile", "memory")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=11, help="at least 2")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="tables to make")
    parser.add_argument("--memory-of", default="", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    if not importlib.util.find_spec("peft"):
        parser.error("the comparison needs PEFT: pip install peft")
    return args


def main():
    args = arguments()
    logging.set_verbosity_error()
    if args.memory_of:
        memory_of(args.memory_of, args.device)
        return
    device, rounds = args.device, args.rounds
    print(f"{machine(device)}; {rounds} rounds")
    points = {label_of(BASE | change): BASE | change for change in GRID}
    if "train" in args.only:
        lines = {label: bench_train(point, device, rounds) for label, point in with_bar(points.items(), "train")}
        print_table("Training step, a batch of mixed tasks", lines)
    if "adapt" in args.only:
        each = with_bar(points.items(), "adapt")
        lines = {label: bench_train(point, device, rounds, one_task=True) for label, point in each}
        print_table("Training step, one task: adaptation", lines)
    if "generate" in args.only:
        lines = {}
        for change, one, beams in with_bar(GENERATIONS, "generate"):
            label = f"{label_of(BASE | change)}, {'one task' if one else 'mixed'}, {'beams' if beams > 1 else 'greedy'}"
            lines[label] = bench_generate(BASE | change, device, rounds, one, beams)
        print_table("Generation of 24 tokens", lines)
    if "choices" in args.only:
        print_table("Scoring of four choices", {label_of(BASE): bench_choices(BASE, device, rounds)})
    if "layer" in args.only:
        print_table("One layer, 1024 x 1024, r=16, 32 tasks", {"forward and backward": bench_layer(device, rounds)})
    if "compile" in args.only:
        line, first = bench_compile(device, rounds)
        print_table("Training step of the bundled model, with --compile", {"b=64 l=32 r=4 h=8": line})
        print("seconds of the first step:", ", ".join(f"{name} {seconds:.1f}" for name, seconds in first.items()))
    if "memory" in args.only:
        print(f"\nPeak memory of a training step, {label_of(BASE)}\n\n{aligned(bench_memory(device), left=1)}")


if __name__ == "__main__":
    exit_on_user_error(main)
