"""Few-shot adaptation: a pre-trained run meets tasks that it has never seen, one at a time.

    python adapt.py --checkpoint runs/NAME --variant all --tasks all

Every task starts from the same checkpoint, learns from a few examples (--shots), stops early by the loss on its own
dev examples, and is scored on its test examples before and after. What is trained (MHR paper section 3):

    all   the skills and the new task's Z            (methods lora, ia3: the one adapter; full: the whole backbone)
    z     only the new task's Z: MHR-z, Poly-z
    mu    the average of the skills, as ONE adapter without routing: MHR-mu, Poly-mu

Writes to the run folder: config.json, TASK.safetensors for each task, log.jsonl and result.json.
"""

from dataclasses import dataclass

from config import (
    FEW_SHOT, UserError, check_ranges, describe, exit_on_user_error, explicit_flags, flag, new_run_folder,
    read_config, recipe, write_json,
)  # fmt: skip


@dataclass
class Config:
    """Adapt a pre-trained run to held-out tasks, each from a few examples."""

    checkpoint: str = flag("", "run folder of train.py to start from")
    variant: str = flag("all", "what is trained", ("all", "z", "mu"))
    tasks: str = flag("all", "all (test tasks), dev (dev tasks), or names joined by commas")
    data_dir: str = flag("", "folder of the benchmark's files, if it has moved since pre-training")
    split: str = flag("0", "which few-shot examples: strings any number, crossfit 100, 13, 21, 42 or 87")
    shots: int = flag(0, "train examples of a task to use; 0: all that the split has")
    steps: int = flag(1000, "optimiser steps per task")
    batch_size: int = flag(8, "examples per step")
    lr: float = flag(1e-3, "learning rate of adapters (or of the backbone, method full)")
    lr_z: float = flag(1e-1, "learning rate of Z")
    weight_decay: float = flag(0.0, "of adapters; Z is never decayed")
    warmup: float = flag(0.06, "share of steps with rising learning rate; it then falls to 0")
    clip: float = flag(1.0, "largest gradient norm")
    eval_every: int = flag(100, "steps between two looks at the dev loss")
    patience: int = flag(3, "looks without a lower dev loss before stopping")
    test_examples: int = flag(0, "test examples per task to score; 0: all")
    seed: int = flag(0, "seed of initial values, order and noise")
    output_dir: str = flag("", "run folder; none: CHECKPOINT-VARIANT")
    device: str = flag("cpu", "cpu or cuda", ("cpu", "cuda"))


if __name__ == "__main__":  # Read the flags before the slow imports, so that --help and mistakes answer at once
    FLAGS = explicit_flags(Config, FEW_SHOT)

import dataclasses
import json
import random
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import data
import train
from evaluate import evaluate_tasks, mean
from inject import adapted_layers, add_tasks, load_adapters, routers, save_adapters, task_ids

# --- Starting points --------------------------------------------------------------------------------------------------


def load_run(folder: Path, base: train.Config, tasks: int):
    """A pre-trained run as it was saved: (model, tokenizer). base: its Config. tasks: rows of Z to build first.

    Raises UserError if the run has not finished, or its file does not fit the backbone.
    """
    saved = folder / ("backbone" if base.method == "full" else "adapter.safetensors")
    if not saved.exists():
        raise UserError(f"--checkpoint {folder} has no {saved.name}: its training has not finished")
    if base.method == "full":
        return train.build_model(dataclasses.replace(base, backbone=str(saved)), tasks)
    model, tokenizer = train.build_model(base, tasks)
    _load(model, saved)
    return model, tokenizer


def _load(model: nn.Module, path: Path):
    try:
        load_adapters(model, str(path))
    except ValueError as error:
        raise UserError(str(error)) from None


def average_skills(model: nn.Module, adapter: str):
    """mu: replace every routed layer by one with a single adapter, the average of its skills. Routing is gone."""
    for name, layer in adapted_layers(model).items():
        if hasattr(layer, "router"):
            model.set_submodule(name, train.SINGLE[adapter](layer.linear, layer.adapter, layer.average_skills()))


def prepare(model: nn.Module, variant: str, adapter: str):
    """Turn a pre-trained model into the variant's starting point for ONE new task, with task id 0.

    all, z: Z is replaced by one fresh row (the rows of training tasks are of no use to a new one); z then trains
    nothing else. mu: the skills are averaged.
    """
    if variant == "mu":
        average_skills(model, adapter)
        return
    add_tasks(model, 1, keep=False)
    if variant == "z":
        for p in model.parameters():
            p.requires_grad_(False)
        for router in routers(model):
            router.requires_grad_(True)


# --- One task ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dev_loss(model, tokenizer, task: data.Task, lengths, batch_size: int) -> float:
    """The loss on the task's dev examples in evaluation mode (no noise), averaged over batches by their examples."""
    model.eval()
    items = [data.Item(0, e.input, e.outputs[0]) for e in task.dev]
    total = 0.0
    for batch in data.by_length(items, batch_size, window=len(items)):
        with task_ids([0] * len(batch)):
            total += train.batch_loss(model, tokenizer, batch, *lengths).item() * len(batch)
    model.train()
    return total / len(items)


def adapt_task(model, tokenizer, task: data.Task, lengths, cfg, log) -> dict:
    """Train what is trainable on one task, keep the values with the lowest dev loss.

    lengths: (max_input, max_output). Returns {"stopped": last step, "best_step": step of the values kept, "dev_loss"}.

    The same loop as `train.train_steps`, with a look at the dev loss every cfg.eval_every steps, the first one before
    training, so that a task that only gets worse keeps its starting values.
    """
    optimizer = train.make_optimizer(model, cfg.lr, cfg.lr_z, cfg.weight_decay)
    rate = lambda step: train.warmup_then_decay(step, cfg.steps, cfg.warmup)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    batches = data.batches([task], cfg.batch_size, cfg.seed)
    best_loss = dev_loss(model, tokenizer, task, lengths, cfg.batch_size)
    best_step, best = 0, [p.detach().clone() for p in trainable]
    for step in range(1, cfg.steps + 1):
        items = next(batches)
        with task_ids([0] * len(items)):
            loss = train.batch_loss(model, tokenizer, items, *lengths)
            loss.backward()
        nn.utils.clip_grad_norm_(trainable, cfg.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % cfg.eval_every == 0 or step == cfg.steps:
            now = dev_loss(model, tokenizer, task, lengths, cfg.batch_size)
            log.write(json.dumps({"task": task.name, "step": step, "loss": loss.item(), "dev_loss": now}) + "\n")
            log.flush()
            if now < best_loss:
                best_loss, best_step, best = now, step, [p.detach().clone() for p in trainable]
            elif step - best_step >= cfg.patience * cfg.eval_every:
                break
    with torch.no_grad():
        for p, value in zip(trainable, best, strict=True):
            p.copy_(value)
    return {"stopped": step, "best_step": best_step, "dev_loss": best_loss}


# --- All tasks --------------------------------------------------------------------------------------------------------


def choose_tasks(benchmark: data.Benchmark, names: str) -> list[data.Task]:
    """--tasks to tasks. Raises UserError for a name that is neither a dev nor a test task, or if there are none."""
    if names in ("all", "dev"):
        tasks = benchmark.test if names == "all" else benchmark.dev
        if not tasks:
            raise UserError(f"--tasks {names}: there are no held-out {'test' if names == 'all' else 'dev'} tasks here")
        return tasks
    known = {task.name: task for task in benchmark.dev + benchmark.test}
    for name in names.split(","):
        if name not in known:
            raise UserError(f"--tasks {name} is no held-out task: choose all, dev, or from {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def adapt(cfg: Config) -> dict:
    """Adapt to each chosen task from the same start and write the run folder; returns what result.json holds."""
    check_ranges(cfg)
    if cfg.steps == 0:
        raise UserError("--steps must be above 0, not 0")
    base = train_config(cfg)
    benchmark = data.load(base.dataset, base.data_dir, cfg.split, base.instructions)
    tasks = choose_tasks(benchmark, cfg.tasks)
    for task in tasks:
        if not (task.train and task.dev and task.test):
            raise UserError(f"task {task.name} needs train, dev and test examples to be adapted to and scored")
    torch.manual_seed(cfg.seed)
    model, tokenizer = load_run(Path(cfg.checkpoint), base, tasks=len(benchmark.train))
    prepare(model, cfg.variant, base.adapter)
    folder = new_run_folder(cfg.output_dir)
    write_json(folder / "config.json", dataclasses.asdict(cfg))
    print(describe(cfg))
    counts = train.count_parameters(model)
    print(f"{len(tasks)} tasks; trainable for each:", *(f"{k} {n:,}" for k, n in counts.items()))

    begin, lengths = time.monotonic(), (base.max_input, base.max_output)
    trainable = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trainable]  # every task starts here
    before = evaluate_tasks(model, tokenizer, tasks, [0] * len(tasks), lengths, cfg.test_examples)
    after, stops = {}, {}
    with open(folder / "log.jsonl", "a") as log:
        for task in (bar := tqdm(tasks, desc=f"adapt {cfg.variant}", unit="task", disable=None)):
            with torch.no_grad():
                for p, value in zip(trainable, start, strict=True):
                    p.copy_(value)
            torch.manual_seed(cfg.seed)  # a task's result does not depend on the tasks before it
            stops[task.name] = adapt_task(model, tokenizer, few_shot(task, cfg), lengths, cfg, log)
            after |= evaluate_tasks(model, tokenizer, [task], [0], lengths, cfg.test_examples)
            save_task(model, tokenizer, base, folder, task.name)
            bar.set_postfix(task=task.name, before=f"{before[task.name]:.1f}", after=f"{after[task.name]:.1f}")
            if bar.disable:
                print(f"{task.name:40} before {before[task.name]:5.1f}  after {after[task.name]:5.1f}", flush=True)
    result = {
        "mean_before": mean(before), "mean": mean(after), "seconds": round(time.monotonic() - begin, 1),
        "parameters": counts, "before": before, "tasks": after, "metrics": {t.name: t.metric for t in tasks},
        "stops": stops,
    }  # fmt: skip
    write_json(folder / "result.json", result)
    print(f"mean score of {len(tasks)} held-out tasks: before adaptation {result['mean_before']:.1f}, ", end="")
    print(f"after {result['mean']:.1f} ({result['seconds']:.0f} s, saved in {folder})")
    return result


def train_config(cfg: Config) -> train.Config:
    """The pre-training run's settings. Raises UserError if the checkpoint or the variant does not fit."""
    if not cfg.checkpoint:
        raise UserError("--checkpoint is missing: give a run folder of train.py")
    base = read_config(train.Config, Path(cfg.checkpoint) / "config.json")
    if cfg.variant != "all" and base.method not in ("poly", "mhr"):
        raise UserError(f"--variant {cfg.variant} needs a run of method poly or mhr, {cfg.checkpoint} is {base.method}")
    return dataclasses.replace(base, data_dir=cfg.data_dir or base.data_dir, device=cfg.device)


def few_shot(task: data.Task, cfg: Config) -> data.Task:
    """The task with --shots of its train examples (0: all), drawn by the seed: official files are sorted by label."""
    drawn = random.Random(cfg.seed).sample(task.train, min(cfg.shots or len(task.train), len(task.train)))
    return dataclasses.replace(task, train=drawn)


def save_task(model, tokenizer, base: train.Config, folder: Path, name: str):
    """Save what was adapted to one task under the task's name."""
    if base.method == "full":
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    else:
        save_adapters(model, str(folder / f"{name}.safetensors"))


def load_adapted(cfg: Config, folder: Path):
    """For each task of a finished adaptation run: (task, model, tokenizer, lengths), with the adapter saved for it."""
    base = train_config(cfg)
    benchmark = data.load(base.dataset, base.data_dir, cfg.split, base.instructions)
    model, tokenizer = load_run(Path(cfg.checkpoint), base, tasks=len(benchmark.train))
    prepare(model, cfg.variant, base.adapter)
    for task in choose_tasks(benchmark, cfg.tasks):
        if base.method == "full":
            model, tokenizer = train.build_model(dataclasses.replace(base, backbone=str(folder / task.name)), 1)
        elif not (path := folder / f"{task.name}.safetensors").is_file():
            raise UserError(f"{path} does not exist: the run in {folder} has not finished")
        else:
            _load(model, path)
        yield task, model, tokenizer, (base.max_input, base.max_output)


def make_config(**flags) -> Config:
    """A Config from explicit flags: what they leave open comes from the few-shot recipe of the run's data set."""
    start = Config(**flags)
    base = train_config(start)
    cfg = Config(**recipe(FEW_SHOT, base.dataset, base.method) | flags)
    if not cfg.output_dir:
        cfg.output_dir = f"{cfg.checkpoint.rstrip('/')}-{cfg.variant}"
    return cfg


def main(flags: dict) -> dict:
    return adapt(make_config(**flags))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
