"""What `experiments/real.py` compares, and how its values are made: budgets, methods, the search of rates, the runs.

Learning rates come first: for each method the same search on the dev tasks, by their loss, with shorter training
(`search`). Then, of a seed and a method: pre-training, gradient alignment, and each variant on each few-shot split of
the test tasks. The order makes an early end most useful: LoRA, Poly and MHR of the first seed, then with scarce skills,
then the other seeds, then the other methods.
"""

import json
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.methods import run
from plumbing.backbones import load_backbone
from plumbing.errors import UserError
from plumbing.folders import read_json

# --- What is compared -------------------------------------------------------------------------------------------------

SETTING = "--dataset crossfit --layers self-attention --rank 4 --precision bf16"  # the rest: the recipe, and a budget
LOOKS = 5  # at gradient alignment, in training
METHODS = {  # name: (flags of train.py, variants of adapt.py; the first one chooses the rate of pre-training)
    "LoRA": ("--method lora", ("all",)),
    "Poly": ("--method poly --skills 8", ("all", "z", "mu")),
    "MHR": ("--method mhr --skills 8 --heads 8", ("all", "z", "mu")),
    "Poly, s = 2": ("--method poly --skills 2", ("all", "z", "mu")),
    "MHR, s = 2": ("--method mhr --skills 2 --heads 8", ("all", "z", "mu")),
    "LoRA-big": ("--method lora --rank 32", ("all",)),
    "MHR, h = 64": ("--method mhr --skills 8 --heads 64", ("all", "z", "mu")),
    "Random": ("--method random --skills 8", ("mu",)),
    "MHR, s = 2, h = 64": ("--method mhr --skills 2 --heads 64", ("all", "z", "mu")),
    "Random, s = 2": ("--method random --skills 2", ("mu",)),
}
CORE, SCARCE = ("LoRA", "Poly", "MHR"), ("Poly, s = 2", "MHR, s = 2")
ALIGNED = (*CORE, *SCARCE)  # whose gradient alignment is measured
RATES, Z_RATES = ("3e-4", "1e-3", "3e-3"), ("1e-2", "1e-1", "5e-1")  # tried by the search


class Budget(NamedTuple):
    """How much is trained and scored: flags of train.py and adapt.py beside the recipe's, and for the search."""

    says: str
    train: str
    steps: int
    few: str
    splits: tuple[int, ...]
    seeds: tuple[int, ...]
    search_steps: int
    search_few: str


BUDGETS = {
    "papers": Budget(
        "Polytropon's recipe whole: 30 epochs in batches of 32, then 1,000 few-shot steps of 8, five splits, 4 beams.",
        "", 12_540, "", (100, 13, 21, 42, 87), (0, 1, 2), 1_000, "--steps 300",
    ),
    "cpu": Budget(
        "What about four hours of two cores reach: 1,000 steps of 32 with inputs cut at 128 tokens, then 100 few-shot "
        "steps of 8, one split, greedy decoding, at most 100 test examples a task.",
        "--max-input 128 --max-output 16", 1_000,
        "--steps 100 --eval-every 20 --beams 1 --test-examples 100", (100,), (0, 1, 2),
        100, "--steps 60 --eval-every 20",
    ),
}  # fmt: skip


def in_order(seeds: tuple[int, ...]) -> list[tuple[int, str]]:
    """(seed, method) of all runs, those first that say most."""
    first, core = seeds[0], (*CORE, *SCARCE)
    head = [(first, name) for name in core] + [(seed, name) for seed in seeds[1:] for name in core]
    return head + [(seed, name) for seed in seeds for name in METHODS if name not in core]


# --- Values: from the raw file, or from runs --------------------------------------------------------------------------


def training_flags(name: str, budget: Budget, rate: str, seed: int, steps: int) -> str:
    """All that determines a pre-training but its data and backbone."""
    size = f"--steps {steps} --keep-every {steps // LOOKS}"
    return " ".join(f"{SETTING} {METHODS[name][0]} {budget.train} {size} --lr {rate} --seed {seed}".split())


def few_shot_flags(variant: str, budget: str, split: int, rate: str, seed: int) -> str:
    """All that determines an adaptation but what it starts from. rate: of Z under z."""
    return " ".join(f"--variant {variant} {budget} --split {split} {rate} --seed {seed}".split())


def read_raw(path: Path) -> dict[str, dict]:
    """{key: line} of a raw file; {} if there is none. Raises UserError for a damaged line."""
    lines = {}
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            ok = isinstance(line["key"], str) and isinstance(line["value"], dict)
            if not ok or any(type(line[key]) is not str for key in ("commit", "made", "on")):
                raise ValueError
            lines[line["key"]] = line
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}:{number} is damaged: delete this line, its value is then made again") from None
    return lines


class Maker:
    """Makes values by the project's own commands until the time is over, and writes each one down.

    where: flags of train.py for data and backbone; device: cpu or cuda. Neither is part of a key.
    """

    def __init__(self, raw: Path, runs: Path, where: list[str], device: str, until: float):
        self.raw, self.runs, self.where, self.device, self.until = raw, runs, where, device, until
        self.lines, self.lock = read_raw(raw), threading.Lock()

    def value(self, key: str, make: Callable[[], tuple[dict, Path]]) -> dict:
        """The value of a key; make() gives it with the folder of the run that it is of, if it is not there yet."""
        if key not in self.lines:
            value, folder = make()
            start = read_json(folder / "provenance.json", starts=list)["starts"][-1]
            on = start["gpus"][0] if self.device == "cuda" else f"one core of {start['cpu']}"
            line = {"key": key, "value": value, "commit": start["commit"], "made": start["date"][:10], "on": on}
            with self.lock, open(self.raw, "a") as file:
                file.write(json.dumps(line) + "\n")
            self.lines[key] = line
        return self.lines[key]["value"]

    def run(self, script: str, flags: list[str], result: Path) -> dict:
        return run(script, [*flags, "--device", self.device], result, self.until)

    def pretrain(self, flags: str) -> Path:
        """The folder of a pre-training that is done."""
        folder = self.folder(flags)
        if (folder / "result.json").exists() and not (folder / "adapter.safetensors").exists():
            shutil.rmtree(folder)  # its weights were deleted when all its values were there: others are asked for now
        named = [*flags.split(), *self.where, "--save-every", "2m", "--resume", "--output-dir", str(folder)]
        self.run("train.py", named, folder / "result.json")
        return folder

    def trained(self, flags: str) -> dict:
        """{"loss": means of the first and of the last twentieth, "parameters", "seconds"} of a pre-training."""

        def make():
            folder = self.pretrain(flags)
            losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
            part, done = max(1, len(losses) // 20), read_json(folder / "result.json", seconds=float, parameters=dict)
            ends = [sum(of) / len(of) for of in (losses[:part], losses[-part:])]
            return {"loss": ends, "parameters": done["parameters"], "seconds": done["seconds"]}, folder

        return self.value(flags, make)

    def adapted(self, flags: str, few: str, tasks: str) -> dict:
        """{"tasks": {name: score}, "mean", "before": their mean, "dev_loss": mean, "seconds"} of an adaptation."""

        def make():
            base = self.folder(flags)
            folder = base.with_name(f"{base.name}-{zlib.crc32(few.encode()):08x}-{tasks}")
            if not (folder / "result.json").exists():
                self.pretrain(flags)
            named = ["--checkpoint", str(base), *few.split(), "--tasks", tasks, "--resume", "--output-dir", str(folder)]
            done = self.run("adapt.py", named, folder / "result.json")
            split = next(path for path in folder.iterdir() if path.name.isdecimal())
            stops = [read_json(path, stops=dict)["stops"]["dev_loss"] for path in split.glob("*.json")]
            scores = {name: round(score, 3) for name, score in done["tasks"].items()}
            forget(folder)
            value = {"tasks": scores, "mean": done["mean"], "before": done["mean_before"], "seconds": done["seconds"]}
            return value | {"dev_loss": sum(stops) / len(stops), "parameters": done["parameters"]}, folder

        return self.value(f"{flags} | {few} --tasks {tasks}", make)

    def alignment(self, flags: str) -> dict:
        """{"inventory", "mixtures": {step: mean cosine of the training tasks' gradients}} of a pre-training."""

        def make():
            base = self.pretrain(flags)
            named = ["--checkpoint", str(base), "--examples", "16", "--output-dir", str(base / "analysis")]
            done = self.run("tools.analyze", named, base / "analysis" / "analysis.json")
            keys = {"inventory": "alignment", "mixtures": "alignment_mixed"}
            return {of: {str(line["step"]): line[key] for line in done["over_steps"]} for of, key in keys.items()}, base

        return self.value(f"{flags} | alignment", make)

    def folder(self, flags: str) -> Path:
        return self.runs / f"{zlib.crc32(flags.encode()):08x}"


def unpacked(backbone: str, folder: Path) -> str:
    """The backbone of a GGUF file as a folder of safetensors, made once: every run then loads it in a second, where
    dequantising takes 15. Any other backbone as it is."""
    if not list(Path(backbone).glob("*.gguf")) or (Path(backbone) / "config.json").exists():
        return backbone
    if not folder.exists():
        model, tokenizer = load_backbone(backbone, "cpu")
        shutil.rmtree(part := folder.with_name(f"{folder.name}.part"), ignore_errors=True)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    return str(folder)


def forget(folder: Path):
    """Delete the weights in a run folder."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()


# --- Rates, and a whole run -------------------------------------------------------------------------------------------


def search(name: str, budget: Budget, trial: Callable[[str, str], dict]) -> tuple[str, dict[str, str]]:
    """The rates of a method: (of pre-training, {variant: flag of adapt.py}), by the loss on the dev tasks.

    trial(flags of train.py, flags of adapt.py) returns what `Maker.adapted` does. Seed 0, the first few-shot split.
    First the rate of pre-training, of three, by the first variant at the middle rate; then each variant's rate, of
    three (under z that of Z). So every method has 3 short pre-trainings, and 3 trials for each variant.
    """

    def loss(rate: str, variant: str, few: str) -> float:
        flags = training_flags(name, budget, rate, 0, budget.search_steps)
        few_flags = few_shot_flags(variant, f"{budget.search_few} --test-examples 1", budget.splits[0], few, 0)
        return trial(flags, few_flags)["dev_loss"]

    variants = METHODS[name][1]
    best = min(RATES, key=lambda rate: loss(rate, variants[0], f"--lr {RATES[1]}"))
    few = {
        variant: [f"--lr-z {rate}" for rate in Z_RATES] if variant == "z" else [f"--lr {rate}" for rate in RATES]
        for variant in variants
    }
    return best, {v: min(flags, key=lambda flag: loss(best, v, flag)) for v, flags in few.items()}  # noqa: B023


def make_all(maker: Maker, name: str, budget: Budget, seed: int, lock: threading.Lock):
    """All values of a seed and a method. lock: of the method, so that two seeds do not both search."""
    with lock:
        rate, few = search(name, budget, lambda flags, few: maker.adapted(flags, few, "dev"))
        for short in RATES:
            forget(maker.folder(training_flags(name, budget, short, 0, budget.search_steps)))
    flags = training_flags(name, budget, rate, seed, budget.steps)
    maker.trained(flags)
    for split in budget.splits:
        for variant in METHODS[name][1]:
            maker.adapted(flags, few_shot_flags(variant, budget.few, split, few[variant], seed), "all")
    if name in ALIGNED:
        maker.alignment(flags)
    forget(maker.folder(flags))
