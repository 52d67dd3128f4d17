"""All methods of the papers on `strings`, under the same loops: one table.

    python -m experiments.methods                   pre-train and adapt what is missing, then print the table
    python -m experiments.methods --tune            a search of learning rates, on dev tasks, seed 0

Every line is a few runs of `train.py` and `adapt.py`, in runs/methods/; a run that is there is not made again, so the
command can be stopped at any time and goes on where it was. Two run side by side, with one thread each (--jobs).
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import LEARNED
from evaluate import aligned, mean_std

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "methods"
KEEP = 300  # steps between the looks at training that `analyze.py` takes
METHODS = {  # a name for the table: (flags of train.py, variants of adapt.py, the first of which is searched)
    "Full": ("--method full", ("all", "lora")),
    "LoRA (Shared)": ("--method lora", ("all",)),
    "LoRA-big": ("--method lora --rank 16", ("all",)),
    "(IA)^3": ("--method ia3", ("all",)),
    "Private": ("--method private", ("all", "mu")),
    "Expert": ("--method expert", ("all",)),
    "Random by example": ("--method random", ("mu",)),
    "Random by task": ("--method random --random-by task", ("mu",)),
    "HyperFormer": ("--method hyperformer", ("all",)),
    "Task-MoE": ("--method task-moe", ("all",)),
    "AdapterSoup": ("--method adapter-soup", ("all",)),
    "Poly": ("--method poly", ("all", "z", "mu")),
    "MHR": ("--method mhr --heads 8", ("all", "z", "mu")),
}
RATES = {  # what --tune found: (pre-training, adaptation)
    "Full": ("--lr=0.001", "--lr=0.00033"),
    "LoRA (Shared)": ("--lr=0.005", "--lr=0.009"),
    "LoRA-big": ("--lr=0.0017", "--lr=0.009"),
    "(IA)^3": ("--lr=0.015", "--lr=0.009"),
    "Private": ("--lr=0.0017", "--lr=0.009"),
    "Expert": ("--lr=0.015", "--lr=0.001"),
    "Random by example": ("--lr=0.015", "--lr=0.003"),
    "Random by task": ("--lr=0.005", "--lr=0.003"),
    "HyperFormer": ("--lr=0.005 --lr-z=0.01", "--lr=0.003"),
    "Task-MoE": ("--lr=0.015", "--lr=0.001"),
    "AdapterSoup": ("--lr=0.0017", "--lr=0.009"),
    "Poly": ("--lr=0.015", "--lr=0.003"),
    "MHR": ("--lr=0.0017", "--lr=0.003"),
}


def run(script: str, flags: list[str], made: Path) -> dict:
    """What a script writes to the JSON file `made`; if that is there, the script is not run again."""
    if not made.exists():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, script, *flags]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nended with code {done.returncode}:\n{done.stderr[-2000:]}")
        print(f"{made.parent.name}: {done.stdout.splitlines()[-1]}", flush=True)
    return json.loads(made.read_text())


def pretrain(name: str, seed: int, root: Path, extra: tuple[str, ...] = ()) -> tuple[Path, dict]:
    """Pre-train a method of METHODS: (run folder, result). extra: more flags, which also name the folder."""
    folder = root / "_".join([name, str(seed), *extra]).replace(" ", "-").replace("--", "")
    flags = [*METHODS[name][0].split(), "--dataset", "strings", "--seed", str(seed), "--split", str(seed), *extra]
    flags += ["--keep-every", str(KEEP), "--resume", "--output-dir", str(folder)]
    return folder, run("train.py", flags, folder / "result.json")


def adapt(checkpoint: Path, variant: str, seed: int, extra: tuple[str, ...] = ()) -> dict:
    """Adapt a pre-training run to the held-out tasks (or what `extra` says): the result."""
    folder = checkpoint.parent / "_".join([checkpoint.name, variant, *extra]).replace("--", "")
    flags = ["--checkpoint", str(checkpoint), "--variant", variant, "--seed", str(seed), "--split", str(seed), *extra]
    return run("adapt.py", [*flags, "--resume", "--output-dir", str(folder)], folder / "result.json")


def few_shot_rates(name: str, variant: str) -> tuple[str, ...]:
    """The flags of RATES for adapt.py. After full fine-tuning, a fresh LoRA learns at LoRA's."""
    return tuple(RATES["LoRA (Shared)" if variant == "lora" else name][1].split())


# --- The table --------------------------------------------------------------------------------------------------------


def one_seed(name: str, seed: int, root: Path) -> dict[str, tuple[dict, dict]]:
    """{variant: (result of the pre-training, result of the adaptation)}, at the rates of RATES."""
    checkpoint, trained = pretrain(name, seed, root, tuple(RATES[name][0].split()))
    return {
        variant: (trained, adapt(checkpoint, variant, seed, few_shot_rates(name, variant)))
        for variant in METHODS[name][1]
    }


def table(results: dict[str, list[dict]]) -> str:
    """results: {name: what `one_seed` returns for each seed}. One line a method and variant, scores over seeds."""
    lines = [("method", "variant", "trained on all tasks", "for a new task", "seen tasks", "held-out tasks")]
    for name, seeds in results.items():
        for variant in METHODS[name][1]:
            pairs = [seed[variant] for seed in seeds]
            counts = [f"{sum(pairs[0][k]['parameters'].values()):,}" for k in (0, 1)]
            scores = [mean_std([pair[k]["mean"] for pair in pairs]) for k in (0, 1)]
            lines.append((name, variant, *counts, *scores))
    return aligned(lines)


# --- Tuning -----------------------------------------------------------------------------------------------------------


def tune(name: str, root: Path) -> list[tuple[str, ...]]:
    """Lines (method, flags of train.py, flags of adapt.py, dev score, mark) of one method's search; the best is marked.

    The same search for each: pre-training at a third, once and three times 5e-3 (full: 1e-3); for methods that learn a
    Z also a Z ten times slower, at the best of these; then few-shot adaptation to the dev tasks at a third, once and
    three times 3e-3 (full: 1e-3). One step after the other, each keeping the best so far. Seed 0.
    """
    method, variant, lines = METHODS[name][0].split()[1], METHODS[name][1][0], {}
    lr, few_lr = (1e-3, 1e-3) if method == "full" else (5e-3, 3e-3)

    def trial(flags: dict, few_flags: dict) -> float:
        text, few_text = (tuple(f"--{k}={v:.2g}" for k, v in d.items()) for d in (flags, few_flags))
        checkpoint, _ = pretrain(name, 0, root, text)
        score = adapt(checkpoint, variant, 0, ("--tasks=dev", *few_text))["mean"]
        lines[text, few_text] = score
        return score

    def best(choices: list[tuple[dict, dict]]) -> tuple[dict, dict]:
        return max(choices, key=lambda choice: trial(*choice))

    now = best([({"lr": lr * f}, {"lr": few_lr}) for f in (1 / 3, 1, 3)])
    if method in LEARNED:
        now = best([now, (now[0] | {"lr-z": 1e-2}, now[1])])
    best([(now[0], {"lr": few_lr * f}) for f in (1, 1 / 3, 3)])
    first = max(lines, key=lines.get)  # of equal ones the first
    cells = ((" ".join(a), " ".join(b), f"{v:.1f}", "<-" if (a, b) == first else "") for (a, b), v in lines.items())
    return [(name, *line) for line in cells]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--tune", action="store_true", help="search learning rates on dev tasks instead")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        if args.tune:
            found = pool.map(lambda name: tune(name, RUNS), args.methods)
            head = ("method", "pre-training", "few-shot", "dev score", "")
            print(aligned([head, *(line for lines in found for line in lines)]))
            return
        runs = [(name, seed) for seed in args.seeds for name in args.methods]
        found = list(pool.map(lambda r: one_seed(*r, RUNS), runs))
    by_name = {name: [f for r, f in zip(runs, found, strict=True) if r[0] == name] for name in args.methods}
    print(table(by_name))


if __name__ == "__main__":
    main()
