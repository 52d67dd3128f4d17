"""What `experiments/real.py` compares, and how its values are made: budgets, methods, the search of rates, the runs.

Learning rates come first: for each method the same search on the dev tasks, by their loss, with shorter training
(`search`). Then, of a seed and a method: pre-training, gradient alignment, and each variant on each few-shot split of
the test tasks. The order makes an early end most useful: LoRA, Poly and MHR of the first seed, then with scarce skills,
then the other seeds, then the other methods.
"""

import json
import math
import os
import re
import shutil
import statistics
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import benchmarks
from data import Task
from experiments.commands import ROOT, Failed, raw_lines, run
from plumbing.backbones import load_backbone
from plumbing.checkpoint import LOWER_RATE
from plumbing.errors import UserError
from plumbing.folders import append_line, check_numbers, read_json, read_lines
from plumbing.machine import commit
from recipes import FEW_SHOT, PRETRAINING
from scoring import constant_scores, main_scores

# --- What is compared -------------------------------------------------------------------------------------------------

SETTING = "--dataset crossfit --layers self-attention --rank 4"  # the rest: the recipe, and a budget
SIZED = (".tsv", ".json", ".txt", ".gguf", ".safetensors")  # of data and of weights
LOOKS = 5  # at gradient alignment, in training
METHODS = {  # name: (flags of train.py, variants of adapt.py; the first one chooses the rate of pre-training)
    "LoRA": ("--method lora", ("all",)),
    "Poly": ("--method poly --skills 8", ("all", "z", "mu")),
    "MHR": ("--method mhr --skills 8 --heads 8", ("all", "z", "mu")),
    "Poly, s = 2": ("--method poly --skills 2", ("all", "z", "mu")),
    "MHR, s = 2": ("--method mhr --skills 2 --heads 8", ("all", "z", "mu")),
    "LoRA-big": ("--method lora --rank 32", ("all",)),
    "MHR, h = 64": ("--method mhr --skills 8 --heads 64", ("all", "z", "mu")),
    "Random": ("--method random --random-by task --skills 8", ("mu",)),
    "MHR, s = 2, h = 64": ("--method mhr --skills 2 --heads 64", ("all", "z", "mu")),
    "Random, s = 2": ("--method random --random-by task --skills 2", ("mu",)),
}
CORE, SCARCE = ("LoRA", "Poly", "MHR"), ("Poly, s = 2", "MHR, s = 2")
RATES, Z_RATES = ("3e-4", "1e-3", "3e-3"), ("1e-2", "1e-1", "5e-1")  # tried by the search; RATES[1] at first


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
    rates: tuple[str, ...] = RATES


BUDGETS = {
    "papers": Budget(
        "Polytropon's recipe, but for the rank of 4 (there 16) and bfloat16: 12,540 steps of 32, which are 30 epochs "
        "of 13,345 examples; then at most 1,000 few-shot steps of 8, five splits, 4 beams. For a GPU.",
        "--precision bf16", 12_540, "", (100, 13, 21, 42, 87), (0, 1, 2), 1_000, "--steps 300",
        (*RATES, "1e-2"),  # the budget below took 3e-3 in every search
    ),
    "cpu": Budget(
        "What some four hours of two cores that multiply bfloat16 (AMX) reach for LoRA, Poly and MHR, of one seed: "
        "bfloat16, 500 steps of 32, inputs cut at 128 tokens, then 60 few-shot steps of 8, one split, greedy decoding, "
        "at most 100 test examples a task.",
        "--precision bf16 --max-input 128 --max-output 16", 500,
        "--steps 60 --eval-every 20 --beams 1 --test-examples 100", (100,), (0, 1, 2),
        60, "--steps 30 --eval-every 10",
    ),
}  # fmt: skip


def in_order(seeds: tuple[int, ...]) -> list[tuple[int, str]]:
    """(seed, method) of all runs, those first that say most."""
    first, core = seeds[0], (*CORE, *SCARCE)
    head = [(first, name) for name in core] + [(seed, name) for seed in seeds[1:] for name in core]
    return head + [(seed, name) for seed in seeds for name in METHODS if name not in core]


# --- Values: from the raw file, or from runs --------------------------------------------------------------------------


def setup_of(data_dir: str, backbone: str, dataset: str = "crossfit", setting: str = SETTING) -> str:
    """What all values of a raw file have in common: data and backbone, by name and size, and a mark of the recipe."""
    recipe = zlib.crc32(json.dumps([PRETRAINING[dataset], FEW_SHOT[dataset], setting]).encode())
    size = lambda of: sum(path.stat().st_size for path in Path(of).rglob("*.*") if path.suffix in SIZED)  # noqa: E731
    data, model = (f"{Path(of).resolve().name} ({size(of):,} bytes)" for of in (data_dir, backbone))
    return f"{data}, {model}, recipe {recipe:08x}"


def training_flags(name: str, budget: Budget, rate: str, seed: int, steps: int) -> str:
    """All that determines a pre-training but what its setup has (`setup_of`)."""
    size = f"--steps {steps}" + f" --keep-every {steps // LOOKS}" * (steps == budget.steps and name in CORE)
    return " ".join(f"{SETTING} {METHODS[name][0]} {budget.train} {size} --lr {rate} --seed {seed}".split())


def few_shot_flags(variant: str, budget: str, split: int, rate: str, seed: int) -> str:
    """All that determines an adaptation but what it starts from. rate: of Z under z."""
    return " ".join(f"--variant {variant} {budget} --split {split} {rate} --seed {seed}".split())


KEY = r"(best )?constant \| |[^|]*--seed \d+( \| |$)"  # how all begin: flags of train.py, but those without a model
NEEDED = {  # in a value whose key is such; there are no other keys
    r"--tasks all$|^(best )?constant ": ("tasks", "mean", "before", "parameters"), r"--tasks dev$": ("dev_loss",),
    r"--batch-size \d+$": ("tasks", "mean"), r" \| alignment$": ("inventory", "mixtures"), r" \| failed$": ("says",),
    r"^[^|]*--steps \d+( --keep-every \d+)? --lr \S+ --seed \d+$": ("loss", "parameters", "seconds"),
    r"--eval-every \d+ --lr \S+ --seed \d+$": ("valid_loss",),
}  # fmt: skip


def read_raw(path: Path) -> dict[str, dict]:
    """{key: line} of a raw file; {} if there is none. Raises UserError for a damaged line."""

    def key(line: dict) -> str:
        texts, value = [line[name] for name in ("key", "commit", "made", "on", "setup")], line["value"]
        if not isinstance(value, dict) or any(type(text) is not str for text in texts):
            raise ValueError
        needed = [set(names) for pattern, names in NEEDED.items() if re.search(pattern, line["key"])]
        if not needed or not re.match(KEY, line["key"]) or not all(value.keys() >= names for names in needed):
            raise ValueError
        losses = dict(zip(("first", "last"), value.get("loss", (0, 0)), strict=True))
        numbers = {name: value[name] for name in ("mean", "before", "seconds") if name in value}
        numbers |= {name: value[name] for name in ("dev_loss", "valid_loss") if value.get(name) is not None}
        check_numbers(path, *(value[name] for name in ("tasks", "inventory", "mixtures") if name in value))
        check_numbers(path, losses, {"none": 0} | numbers, {"none": 0} | value.get("parameters", {}))
        return line["key"]

    return raw_lines(path, key)


class Maker:
    """Makes values by the project's own commands until the time is over, and writes each one down.

    setup: what all values of a raw file have in common, beside what is in their keys. where: flags of train.py for data
    and backbone. on: the device in words. Raises UserError if the raw file is of another setup.
    """

    def __init__(self, raw: Path, runs: Path, setup: str, where: dict[str, str], device: str, on: str, until: float):
        self.raw, self.runs, self.setup, self.where, self.device = raw, runs, setup, where, device
        self.on, self.until, self.lines, self.lock = on, until, read_raw(raw), threading.Lock()
        if others := {line["setup"] for line in self.lines.values()} - {setup}:
            raise UserError(f"{raw} has values of {others.pop()}, these would be of {setup}: give another --results")

    def value(self, key: str, make: Callable[[], dict]) -> dict:
        """The value of a key; make() gives it, and the "commit" that it was made at, if it is not there yet."""
        if key not in self.lines:
            value = make()
            line = {"key": key, "value": value, "commit": value.pop("commit"), "made": str(date.today()), "on": self.on}
            with self.lock:
                append_line(self.raw, line | {"setup": self.setup})
            self.lines[key] = line
        return self.lines[key]["value"]

    def folder(self, *flags: str) -> Path:
        """The folder of a run: relative, so that it is the same on another machine."""
        names = [f"{zlib.crc32(f'{self.setup} {text}'.encode()):08x}" for text in flags]
        return Path(os.path.relpath(self.runs, ROOT)) / "-".join(names)

    def run(self, script: str, folder: Path, flags: list[str], result: str = "result.json") -> dict:
        to = ["--output-dir", str(folder)]
        if script == "evaluate.py":
            (ROOT / folder).mkdir(parents=True, exist_ok=True)
            to = ["--save", str(folder / result)]
        named = [*flags, "--device", self.device, *to]
        return run(script, named, ROOT / folder / result, self.until)

    def pretrain(self, flags: str) -> dict:
        """The result of a pre-training."""
        where = [word for flag, value in self.where.items() for word in (flag, value)]
        return self.run("train.py", self.folder(flags), [*flags.split(), *where, "--save-every", "2m", "--resume"])

    def weights(self, flags: str) -> Path:
        """The folder of a pre-training with its weights, which are deleted once all values that need them are there."""
        remove_hollow(ROOT / self.folder(flags))
        self.pretrain(flags)
        return self.folder(flags)

    def trained(self, flags: str) -> dict:
        """{"loss", "parameters", "seconds"} of a pre-training. loss: means of the first and of the last twentieth of
        its log, at least of one line, which is the mean over `log_every` steps."""

        def make():
            done = self.pretrain(flags)
            losses = [line["loss"] for line in read_lines(ROOT / self.folder(flags) / "log.jsonl")]
            part = max(1, len(losses) // 20)
            ends = [sum(of) / len(of) for of in (losses[:part], losses[-part:])]
            return {"loss": ends} | {key: done[key] for key in ("parameters", "seconds", "commit")}

        return self.value(flags, make)

    def adapted(self, flags: str, few: str, tasks: str) -> dict:
        """{"tasks": {name: score}, "mean", "before": their mean, "dev_loss": mean, "seconds"} of an adaptation.

        dev_loss is None if it is not finite.
        """

        def make():
            folder = self.folder(flags, f"{few} --tasks {tasks}")
            if not (ROOT / folder / "result.json").exists():
                self.weights(flags)
            base = ["--checkpoint", str(self.folder(flags)), "--data-dir", self.where["--data-dir"]]
            done = self.run("adapt.py", folder, [*base, *few.split(), "--tasks", tasks, "--resume"])
            split = next(path for path in (ROOT / folder).iterdir() if path.name.isdecimal())
            stops = [read_json(path, stops=dict)["stops"]["dev_loss"] for path in split.glob("*.json")]
            scores = {name: round(score, 3) for name, score in done["tasks"].items()}
            forget(ROOT / folder)
            value = {"tasks": scores, "mean": done["mean"], "before": done["mean_before"]}
            value |= {key: done[key] for key in ("parameters", "seconds", "commit")}
            loss = sum(stops) / len(stops)
            return value | {"dev_loss": loss if math.isfinite(loss) else None}

        return self.value(f"{flags} | {few} --tasks {tasks}", make)

    def tried(self, flags: str, few: str) -> dict:
        """`adapted` on the dev tasks; {"dev_loss": None} if pre-training at this rate is not finite."""
        try:
            return self.adapted(flags, few, "dev")
        except Failed as failed:
            refuse_other(failed)
            return self.value(f"{flags} | {few} --tasks dev", lambda: {"dev_loss": None, "commit": commit()})

    def constant(self, split: int, few: str, of: str) -> dict:
        """The scores of answers that are always the same, a floor: of each task's few examples the "most frequent" one,
        or the "best", by the test examples themselves."""

        def make():
            limit = re.search(r"--test-examples (\d+)", few)
            scores = {}
            for task in self.test_tasks(split):
                answers = [[example] for example in task.train] if of == "best" else [task.train]
                tried = [replace(task, train=answer) for answer in answers]
                most = max(
                    main_scores(constant_scores([one], int(limit[1]) if limit else 0))[task.name] for one in tried
                )
                scores[task.name] = round(most, 3)
            mean = statistics.fmean(scores.values())
            return {"tasks": scores, "mean": mean, "before": mean, "parameters": {}, "commit": commit()}

        return self.value(constant_key(split, few, of), make)

    def test_tasks(self, split: int) -> list[Task]:
        where = benchmarks.load("crossfit", str(ROOT / self.where["--data-dir"]), str(split), ("test",))
        return benchmarks.held_out(where, "all")

    def alignment(self, flags: str) -> dict:
        """{"inventory", "mixtures": {step: mean cosine of the training tasks' gradients}} of a pre-training."""

        def make():
            base = self.folder(flags)
            if not (ROOT / base / "analysis" / "analysis.json").exists():
                self.weights(flags)
            of_run = ["--checkpoint", str(base), "--data-dir", self.where["--data-dir"], "--examples", "16"]
            done = self.run("tools.analyze", base / "analysis", of_run, "analysis.json")
            keys = {"inventory": "alignment", "mixtures": "alignment_mixed"}
            over = {of: {str(line["step"]): line[key] for line in done["over_steps"]} for of, key in keys.items()}
            return over | {"commit": done["commit"]}

        return self.value(f"{flags} | alignment", make)


def constant_key(split: int, few: str, of: str) -> str:
    """The key of `Maker.constant`; few: a budget's flags of adapt.py."""
    return f"{'best ' * (of == 'best')}constant | --split {split} {few}".rstrip()


def unpacked(backbone: str) -> str:
    """The backbone of a GGUF file as a folder of safetensors in runs/, made once: every run then loads it in a second,
    where dequantising takes 15. Any other backbone as it is. Of folders the path from ROOT."""
    files = sorted(Path(backbone).glob("*.gguf"))
    if not Path(backbone).is_dir():
        return backbone
    if not files or (Path(backbone) / "config.json").exists():
        return os.path.relpath(backbone, ROOT)
    folder = ROOT / "runs" / f"unpacked-{files[0].stem}-{files[0].stat().st_size}"
    if not folder.exists():
        model, tokenizer = load_backbone(backbone, "cpu")
        folder.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as part:
            model.save_pretrained(f"{part}/model")
            tokenizer.save_pretrained(f"{part}/model")
            Path(part, "model").rename(folder)
    return os.path.relpath(folder, ROOT)


def remove_hollow(folder: Path):
    """Delete a finished run whose weights are gone."""
    if (folder / "result.json").exists() and not (folder / "adapter.safetensors").exists():
        gone = folder.with_name(f"{folder.name}-gone")  # a part of a folder would be refused
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def forget(folder: Path):
    """Delete the weights in a run folder."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()


# --- Rates, and a whole run -------------------------------------------------------------------------------------------


def lowest(losses: dict[str, float | None], of: str) -> str:
    """The rate whose loss is the lowest. None: training failed. Raises UserError if it failed at all of them."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        raise UserError(f"{of}: training fails at all of {', '.join(losses)}: is this the right --backbone?")
    return min(finite, key=finite.get)


def search(name: str, budget: Budget, trial: Callable[[str, str], dict]) -> tuple[str, dict[str, str], dict]:
    """The rates of a method, by the loss on the dev tasks: (of pre-training, {variant: flag of adapt.py}, {what was
    searched: {rate: loss}}).

    trial(flags of train.py, flags of adapt.py) returns what `Maker.adapted` does. Seed 0, the first few-shot split.
    First the rate of pre-training, by the first variant at RATES[1]; then each variant's rate (under z that of Z). So
    every method has as many short pre-trainings, and as many trials for each variant. A rate at which training fails is
    the worst. Raises UserError if it fails at all of them.
    """

    def loss(rate: str, variant: str, few: str) -> float | None:
        flags = training_flags(name, budget, rate, 0, budget.search_steps)
        few_flags = few_shot_flags(variant, f"{budget.search_few} --test-examples 1", budget.splits[0], few, 0)
        return trial(flags, few_flags)["dev_loss"]

    variants, few = METHODS[name][1], {}
    losses = {"pre-training": {rate: loss(rate, variants[0], f"--lr {RATES[1]}") for rate in budget.rates}}
    best = lowest(losses["pre-training"], f"{name}, --lr")
    for variant in variants:
        flag, rates = ("--lr-z", Z_RATES) if variant == "z" else ("--lr", budget.rates)
        losses[variant] = {rate: loss(best, variant, f"{flag} {rate}") for rate in rates}
        few[variant] = f"{flag} {lowest(losses[variant], f'{name}, {flag}')}"
    return best, few, losses


def refuse_other(failed: Failed):
    """Raise it again unless it says that training was not finite."""
    if LOWER_RATE not in str(failed):
        raise failed


def failed_key(flags: str) -> str:
    """The key of the line that says that a run of these flags of train.py, or what follows it, is not finite."""
    return f"{flags} | failed"


def unless_failed(maker: Maker, flags: str, make: Callable[[], None]):
    """make() what a run of these flags has, unless it failed before; that it is not finite is written down."""
    if failed_key(flags) in maker.lines:
        return
    try:
        make()
    except Failed as failed:
        refuse_other(failed)
        says = {"says": str(failed).splitlines()[-1], "commit": commit()}
        maker.value(failed_key(flags), lambda: says)


def make_all(maker: Maker, name: str, budget: Budget, seed: int, lock: threading.Lock):
    """All values of a seed and a method. lock: of the method, so that two seeds do not both search.

    If training is not finite that is written down, and the rest of this run is left out.
    """
    with lock:
        rate, few, _ = search(name, budget, maker.tried)
        for short in budget.rates:
            forget(ROOT / maker.folder(training_flags(name, budget, short, 0, budget.search_steps)))
    flags = training_flags(name, budget, rate, seed, budget.steps)
    unless_failed(maker, flags, lambda: make_run(maker, name, budget, seed, flags, few))
    forget(ROOT / maker.folder(flags))


def make_run(maker: Maker, name: str, budget: Budget, seed: int, flags: str, few: dict[str, str]):
    """A pre-training, its adaptations and gradient alignment. few: the rate of each variant, as `search` gives it."""
    maker.trained(flags)
    for split in budget.splits:
        for variant in METHODS[name][1]:
            maker.adapted(flags, few_shot_flags(variant, budget.few, split, few[variant], seed), "all")
    if name in CORE:  # those of the claim
        maker.alignment(flags)
