"""All methods of the papers on `strings`, under the same loops: one table.

    python -m experiments.methods                   pre-train and adapt what is missing, then print the table
    python -m experiments.methods --tune            a search of learning rates, on dev tasks, seed 0
    python -m experiments.methods --tune --skills 2 3     the same for Poly, MHR and random routing with so many skills

Every line is a few runs of `train.py` and `adapt.py` in runs/. Existing runs are reused, so the command can be stopped
at any time and resumes. Two run in parallel, with one thread each (--jobs). The scores of a search are kept in
results/trials.jsonl, and what is there is not made again.
"""

import argparse
import json
import threading
import zlib
from pathlib import Path

from experiments.commands import ROOT, raw_lines, run, side_by_side
from plumbing.errors import exit_on_user_error
from plumbing.folders import append_line, check_numbers
from plumbing.tables import aligned, mean_std_text
from recipes import FEW_SHOT, LEARNED, PRETRAINING

KEEP_EVERY = 300  # --keep-every: steps between the adapters that `tools/analyze.py` looks at
RECIPE = json.dumps([PRETRAINING["strings"], FEW_SHOT["strings"], KEEP_EVERY])  # another recipe makes other runs
RECIPE = RECIPE.replace('"best_by"', '"keep"')  # its name when the values in results/ were made
RUNS = ROOT / "runs" / f"methods-{zlib.crc32(RECIPE.encode()):08x}"
NAVIGATION = "[README](../README.md) · [results](README.md)\n\n"  # on top of each page that is written to results/

METHODS = {  # name in the table: (flags of train.py, variants of adapt.py; the first one chooses its rates)
    "Full": ("--method full", ("all", "lora")),
    "LoRA (Shared)": ("--method lora", ("all",)),
    "LoRA-big": ("--method lora --rank 16", ("all",)),
    "(IA)^3": ("--method ia3", ("all",)),
    "Private": ("--method private", ("mu", "all")),  # "all" starts from scratch, whatever the pre-training
    "Expert": ("--method expert", ("all",)),
    "Random by example": ("--method random", ("mu",)),
    "Random by task": ("--method random --random-by task", ("mu",)),
    "HyperFormer": ("--method hyperformer", ("all",)),
    "Task-MoE": ("--method task-moe", ("all",)),
    "AdapterSoup": ("--method adapter-soup", ("all",)),
    "Poly": ("--method poly", ("all", "z", "mu")),
    "MHR": ("--method mhr --heads 8", ("all", "z", "mu")),
}
RATES = {  # found by --tune: flags of train.py, then of adapt.py for each variant
    "Full": ("--lr=0.00033", {"all": "--lr=0.00011", "lora": "--lr=0.003"}),
    "LoRA (Shared)": ("--lr=0.005", {"all": "--lr=0.027"}),
    "LoRA-big": ("--lr=0.0017", {"all": "--lr=0.003"}),
    "(IA)^3": ("--lr=0.045", {"all": "--lr=0.027"}),
    "Private": ("--lr=0.005", {"mu": "--lr=0.009", "all": "--lr=0.009"}),
    "Expert": ("--lr=0.015", {"all": "--lr=0.003"}),
    "Random by example": ("--lr=0.005", {"mu": "--lr=0.003"}),
    "Random by task": ("--lr=0.015", {"mu": "--lr=0.003"}),
    "HyperFormer": ("--lr=0.0017", {"all": "--lr=0.001"}),
    "Task-MoE": ("--lr=0.015", {"all": "--lr=0.003"}),
    "AdapterSoup": ("--lr=0.0017", {"all": "--lr=0.009"}),
    "Poly": ("--lr=0.015", {"all": "--lr=0.001", "z": "--lr-z=0.5", "mu": "--lr=0.003"}),
    "MHR": ("--lr=0.015", {"all": "--lr=0.003", "z": "--lr-z=0.5", "mu": "--lr=0.003"}),
}
SIZED = {  # methods that --tune --skills searches: further flags
    "Poly": (),
    "MHR": ("--heads=16",),
    "Random by example": (),
    "Random by task": (),
}


def pretrain(name: str, seed: int, root: Path, extra: tuple[str, ...] = ()) -> tuple[Path, dict]:
    """Pre-train a method of METHODS: (run folder, result). extra: further flags, also part of the folder's name."""
    folder = root / "_".join([name, str(seed), *extra]).replace(" ", "-").replace("--", "")
    flags = [*METHODS[name][0].split(), "--dataset", "strings", "--seed", str(seed), "--split", str(seed), *extra]
    flags += ["--keep-every", str(KEEP_EVERY), "--resume", "--output-dir", str(folder)]
    return folder, run("train.py", flags, folder / "result.json")


def adapt(checkpoint: Path, variant: str, seed: int, extra: tuple[str, ...] = ()) -> dict:
    """Adapt a pre-training run to the test tasks, unless `extra` names others: the result."""
    folder = checkpoint.parent / "_".join([checkpoint.name, variant, *extra]).replace("--", "")
    flags = ["--checkpoint", str(checkpoint), "--variant", variant, "--seed", str(seed), "--split", str(seed), *extra]
    return run("adapt.py", [*flags, "--resume", "--output-dir", str(folder)], folder / "result.json")


def few_shot_rates(name: str, variant: str) -> tuple[str, ...]:
    """The flags of RATES for adapt.py."""
    return tuple(RATES[name][1][variant].split())


# --- The table --------------------------------------------------------------------------------------------------------


def one_seed(name: str, seed: int, root: Path) -> dict[str, tuple[dict, dict]]:
    """{variant: (result of the pre-training, result of the adaptation)}, at the rates of RATES."""
    checkpoint, trained = pretrain(name, seed, root, tuple(RATES[name][0].split()))
    return {
        variant: (trained, adapt(checkpoint, variant, seed, few_shot_rates(name, variant)))
        for variant in METHODS[name][1]
    }


def table(results: dict[str, list[dict]]) -> str:
    """One line per method and variant, scores over seeds. results: {name: what `one_seed` returns for each seed}."""
    lines = [("method", "variant", "trained on all tasks", "and Z", "for a new task", "seen tasks", "held-out tasks")]
    for name, seeds in results.items():
        for variant in METHODS[name][1]:
            pairs = [seed[variant] for seed in seeds]
            trained, adapted = (result["parameters"] for result in pairs[0])
            counts = (trained["adapters"], trained["routing"], sum(adapted.values()))
            scores = [mean_std_text([pair[k]["mean"] for pair in pairs]) for k in (0, 1)]
            lines.append((name, variant, *(f"{n:,}" for n in counts), *scores))
    return aligned(lines)


# --- Tuning -----------------------------------------------------------------------------------------------------------

TRIALS = ROOT / "results" / "trials.jsonl"  # a line for each dev score of a search
TRIAL = ("method", "pre-training", "variant", "few-shot")  # its key
writing = threading.Lock()


def read_trials() -> dict[tuple[str, ...], dict]:
    """{(method, flags of train.py, variant, flags of adapt.py): line} of TRIALS. Raises UserError if it is damaged."""

    def key(line: dict) -> tuple[str, ...]:
        check_numbers(TRIALS, {"dev": line["dev"]})
        return tuple(line[part] for part in TRIAL)

    return raw_lines(TRIALS, key)


def dev_score(name: str, root: Path, flags: tuple[str, ...], variant: str, few_flags: tuple[str, ...]) -> float:
    """The score of dev tasks with these flags of train.py and adapt.py, seed 0: from TRIALS, or made and kept there."""
    key = (name, " ".join(flags), variant, " ".join(few_flags))
    if key in (kept := read_trials()):
        return kept[key]["dev"]
    checkpoint, _ = pretrain(name, 0, root, flags)
    result = adapt(checkpoint, variant, 0, ("--tasks=dev", *few_flags))
    with writing:
        append_line(TRIALS, dict(zip(TRIAL, key, strict=True)) | {"dev": result["mean"], "commit": result["commit"]})
    return result["mean"]


def tune(name: str, root: Path, sizes: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """One method's search as lines (method, flags of train.py, variant, flags of adapt.py, dev score, mark).

    sizes: further flags of all its pre-training. Each variant's best is marked.

    All methods are searched by one rule, with seed 0. Each step starts at the best of the one before:
    1. the rate of pre-training, around 5e-3 (full: 1e-3), by the score of the first variant at 3e-3 (full: 1e-3);
    2. for methods that learn a Z, whether a Z ten times slower is better;
    3. each variant's rate, around 3e-3 (full: 1e-3); under z the rate of Z, around the recipe's.
    A rate is tried at 1/3, 1 and 3 times its start, and further while the best is at an edge (`search`).
    """
    method, variants, lines = METHODS[name][0].split()[1], METHODS[name][1], {}
    lr, few_lr = (1e-3, 1e-3) if method == "full" else (5e-3, 3e-3)

    def trial(flags: dict, variant: str, few_flags: dict) -> float:
        text, few_text = (tuple(f"--{k}={v:.2g}" for k, v in d.items()) for d in (flags, few_flags))
        lines[text, variant, few_text] = score = dev_score(name, root, (*text, *sizes), variant, few_text)
        return score

    start = {"lr": few_lr}
    flags = {"lr": search(lambda rate: trial({"lr": rate}, variants[0], start), lr)}
    if method in LEARNED:
        flags = max(flags, flags | {"lr-z": 1e-2}, key=lambda f: trial(f, variants[0], start))
    for variant in variants:
        key, middle = ("lr-z", FEW_SHOT["strings"]["lr_z"]) if variant == "z" else ("lr", few_lr)
        middle = 3e-3 if variant == "lora" else middle
        search(lambda rate: trial(flags, variant, {key: rate}), middle)  # noqa: B023, it is called here
    chosen = tuple(f"--{k}={v:.2g}" for k, v in flags.items())
    best = {v: max((line for line in lines if line[:2] == (chosen, v)), key=lines.get) for v in variants}
    return [
        (name, " ".join((*a, *sizes)), v, " ".join(b), f"{score:.1f}", "<-" if (a, v, b) == best[v] else "")
        for (a, v, b), score in lines.items()
    ]


def search(score, middle: float, most: int = 7) -> float:
    """The best of middle / 3, middle and middle * 3, and further by factors of 3 while the best is at an edge.

    At most `most` values. Of equal scores the first wins, in the order middle, lower, higher.
    """
    tried = {middle * f: score(middle * f) for f in (1, 1 / 3, 3)}
    while (best := max(tried, key=tried.get)) in (min(tried), max(tried)) and len(tried) < most:
        further = best / 3 if best == min(tried) else best * 3
        tried[further] = score(further)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel")
    parser.add_argument("--tune", action="store_true", help="search learning rates on dev tasks instead")
    sized = f"with --tune: search those of {', '.join(SIZED)} at each of these numbers of skills"
    parser.add_argument("--skills", type=int, nargs="+", default=[], metavar="N", help=sized)
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs must be above 0")
    for name in ("seeds", "methods"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name} names one twice")
    if min(args.seeds) < 0:
        parser.error("--seeds must not be negative")
    if args.skills and not (args.tune and min(args.skills) > 0 and set(args.methods) & set(SIZED)):
        parser.error(f"--skills goes with --tune and with {' or '.join(SIZED)}, and must be above 0")
    if args.tune:
        named = [(name, more) for name, more in SIZED.items() if name in args.methods]
        sized = [(name, (f"--skills={s}", *more)) for s in args.skills for name, more in named]
        usual = [(name, ()) for name in args.methods]
        searches = side_by_side(lambda search: tune(search[0], RUNS, search[1]), sized or usual, args.jobs)
        head = ("method", "pre-training", "variant", "few-shot", "dev score", "")
        print(aligned([head, *(line for lines in searches for line in lines)], left=4))
        return
    runs = [(name, seed) for seed in args.seeds for name in args.methods]
    results = side_by_side(lambda r: one_seed(*r, RUNS), runs, args.jobs)
    print(table({name: [of for r, of in zip(runs, results, strict=True) if r[0] == name] for name in args.methods}))


if __name__ == "__main__":
    exit_on_user_error(main)
