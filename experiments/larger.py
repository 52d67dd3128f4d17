"""Backbones larger than a GPU: what 4 bits and --shard take, computed for large ones and measured on a small one.

    python -m experiments.larger                 some minutes on two CPU cores; writes results/larger.md

Needs bitsandbytes. Every measurement is a process of its own, or two of them that share the backbone.
"""

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()


import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

import train
from experiments.bench import bare, machine
from experiments.methods import NAVIGATION
from methods import build_model
from plumbing import processes
from plumbing.backbones import load_backbone, save_backbone
from plumbing.errors import exit_on_user_error
from plumbing.tables import aligned
from tools.count_parameters import meta_backbone
from tools.estimate_memory import OTHERWISE, backbone_otherwise, linears_in_4_bits, table

ROOT = Path(__file__).resolve().parents[1]
LARGE = {"t5-xxl": (8, (512, 64)), "qwen3-8b": (8, (512, 64))}  # backbone: examples a step, tokens of input and output
STEPS = 20
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
TEXT = """{navigation}# Backbones larger than a GPU

    python -m experiments.larger

`--shard` splits the blocks of a frozen backbone over processes, `--precision nf4` holds its linear layers in 4 bits.
Training, resuming, adaptation, generation, beams, choices and export work with both. Refused, in one sentence each:
method `full`, `--compile`, merging into such weights (`tools.export` takes the backbone as its files are), `--shard`
with 4 bits, and in 4 bits also `--adapter sft` and models whose linear layers are of a class of their own (Falcon).
`adapt.py` and `evaluate.py` of a `--shard` run are started under `torchrun`, or alone where one GPU is enough.

## Computed for large backbones

GB (10^9 bytes) on each GPU by `python -m tools.estimate_memory`: rank 1, 8 skills, 313 tasks, {examples} examples a
step (of several processes: of each), {tokens} tokens. Without weights and without a GPU; fragmentation, the buffers of
the allocator and of libraries, and CUDA's context are not counted. T5's `wo`, a fifth of T5-XXL, stays bfloat16 among
4-bit layers.

{computed}

## Measured on a small one

T5 of 8 + 8 layers of width 512 ({parameters:,} parameters), MHR, 8 heads, on the CPU. "held": bytes of the backbone's
tensors in one process, in MB (10^6 bytes). "loading": the most private memory of a process while the model was loaded
and given its adapters, beyond that before it (pages of a file that are mapped into memory are not private).

{measured}

In 4 bits what stays whole is float32 on a CPU, bfloat16 on a GPU; "computed" counts it as on this CPU.

## Split and whole

The bundled backbone in float32, MHR, 8 heads, {steps} steps of `train.py` by two processes with `--shard`: the largest
difference of an adapter parameter (A, B or Z; the largest is {largest:.2f}) from two processes without it is
{from_two:.1e}, from one process {from_one:.1e}, both more than the 1e-5 that was aimed at. It is rounding: gradients
agree within 1e-5 of the largest, and AdamW turns those near zero into steps, at Z's rate of 0.1. With SGD instead
{steps} steps differ by less than 1e-5, in double precision by less than 1e-9 (`tests/test_parallel.py`).

{machine}; {date}.
"""


def private_memory() -> int:
    """Bytes of this process that are not pages of files (Linux)."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def measure(folder: str, way: str, out: str):
    """Load a backbone in one way, in this process, and write down what it held and took."""
    processes.join("cpu")
    precision = "bf16" if "processes" in way else way
    cfg = train.Config(method="mhr", backbone=folder, device="cpu", precision=precision, shard="processes" in way)
    build_model(dataclasses.replace(cfg, backbone="tiny"), tasks=16)  # now: what is imported is not measured
    before, most, done = private_memory(), [0], threading.Event()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], private_memory())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    model, _ = build_model(cfg, tasks=16)
    done.set()
    thread.join()
    if processes.first():
        Path(out).write_text(json.dumps({"held": held(model), "loading": most[0] - before}))
    processes.wait()


def held(model: nn.Module) -> int:
    """Bytes of the frozen tensors of a model in this process, with the scales of 4-bit ones."""
    total = 0
    for p in model.parameters():
        if not p.requires_grad:
            local = p.to_local() if hasattr(p, "to_local") else p
            total += local.numel() * local.element_size()
            if state := getattr(p, "quant_state", None):
                total += state.absmax.numel() + 4 * state.state2.absmax.numel()
    return total


def measured() -> tuple[list[tuple[str, ...]], int]:
    """A table as cells, and the number of parameters of its backbone."""
    lines = [("", "held", "computed", "loading")]
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(bare("cpu"), load_backbone("tiny", "cpu")[1], Path(folder) / "model")
        plain = meta_backbone(f"{folder}/model")
        whole = sum(p.numel() for p in plain.parameters())
        for way in ("fp32", "bf16", "nf4", "2 processes"):
            start = TORCHRUN if "processes" in way else [sys.executable]
            out = f"{folder}/out.json"
            command = ["-m", "experiments.larger", "--measure", f"{folder}/model", way, out]
            subprocess.run([*start, *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
            found = json.loads(Path(out).read_text())
            computed = {"fp32": 4 * whole, "bf16": 2 * whole}.get(way) or backbone_otherwise(plain, way)[0]
            if way == "nf4":
                computed += 2 * sum(p.numel() for p in whole_in_4_bits(plain))
            cells = (found["held"], computed, found["loading"])
            lines.append((f"split over {way}" if "processes" in way else way, *(f"{n / 1e6:.0f}" for n in cells)))
    return lines, whole


def whole_in_4_bits(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that stay whole when linear layers are held in 4 bits."""
    packed = {linear.weight for linear in linears_in_4_bits(model)}
    return [p for p in model.parameters() if p not in packed]


def split_and_whole() -> tuple[float, float, float]:
    """(largest value, largest difference from two whole ones, from one) of the adapters that two processes trained for
    STEPS steps with --shard."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--method mhr --dataset strings --steps {STEPS} --eval-examples 0 --device cpu".split()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        one = [sys.executable, "train.py", *flags, "--output-dir", f"{folder}/one"]
        two = [*TORCHRUN, "train.py", *flags, "--output-dir", f"{folder}/two"]
        split = [*TORCHRUN, "train.py", *flags, "--shard", "--output-dir", f"{folder}/split"]
        for command in (one, two, split):
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        one, two, split = (load_file(f"{folder}/{name}/adapter.safetensors") for name in ("one", "two", "split"))
    apart = lambda other: max((split[name] - other[name]).abs().max().item() for name in other)  # noqa: E731
    return max(tensor.abs().max().item() for tensor in one.values()), apart(two), apart(one)


def computed() -> str:
    """The tables of LARGE: the backbone in bfloat16 and otherwise."""
    texts = []
    for backbone, (size, lengths) in LARGE.items():
        lines = table(backbone, size, lengths, 313, shown=(OTHERWISE,))
        texts.append(aligned([(backbone, *lines[0][1:]), *lines[1:]], left=1))
    return "\n\n".join(texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    rows, parameters = measured()
    largest, from_two, from_one = split_and_whole()
    (examples, lengths), *_ = LARGE.values()
    indented = lambda text: "\n".join(f"    {line}".rstrip() for line in text.splitlines())  # noqa: E731
    page = TEXT.format(
        navigation=NAVIGATION,
        examples=examples, tokens=" + ".join(map(str, lengths)), computed=indented(computed()), parameters=parameters,
        measured=indented(aligned(rows, left=1)), steps=STEPS, largest=largest, from_two=from_two, from_one=from_one,
        machine=f"{machine('cpu')}, bitsandbytes {version('bitsandbytes')}", date=date.today(),
    )  # fmt: skip
    (ROOT / "results" / "larger.md").write_text(page)
    print(page)


if __name__ == "__main__":
    exit_on_user_error(main)
