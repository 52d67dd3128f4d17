"""Few-shot adaptation: a pre-trained run meets tasks that it has never seen, one at a time.

    python adapt.py --checkpoint runs/NAME --variant all --tasks all
    python adapt.py --resume --output-dir runs/NAME-all              go on with the tasks that are not done

Every task starts from the same checkpoint, learns from a few examples (--shots), stops early by the loss on its own
dev examples (t0: by the score, as the papers), and is scored on its test examples before and after. With several
--split values all of it is done once for each: other few-shot examples of the same tasks. What is trained (MHR paper
section 3):

    all   the skills and the new task's Z            (methods lora, ia3, mu: the one adapter; full: the whole backbone)
    z     only the new task's Z: MHR-z, Poly-z       (any method that learns a Z)
    mu    the average of the skills, as ONE adapter without routing: MHR-mu, Poly-mu, Random-mu, Private-mu
    lora  a fresh LoRA on a backbone that was fine-tuned in full (MHR appendix A.1, table 6; "all" after "full" is
          table 3 of its first version)

mu of other methods is in no paper; of HyperFormer it takes 1/s of each row of its last layer. An average of SFTs is
larger than one: of 8 with 10 % of a layer's weights each it has about 1 - 0.9^8 = 57 %.

Where routing is given, not learned, "all" means: expert the skills that the new task has by the table (all alike where
it has none: held-out data sets of T0, categories of SuperNI); random all skills alike; private an adapter from scratch
(Polytropon section 2.5: nothing is shared, so nothing is carried over); adapter-soup ONE adapter, the average of those
of the --soup most similar training tasks.

Writes to the run folder: config.json, for each task SPLIT/TASK.safetensors and SPLIT/TASK.json (its scores), log.jsonl
and result.json.
"""

from dataclasses import dataclass

from config import (
    FEW_SHOT, VARIANTS, UserError, check_numbers, check_ranges, describe, exit_on_user_error, explicit_flags, flag,
    read_config, read_json, recipe, resumed, unused, write_json,
)  # fmt: skip


@dataclass
class Config:
    """Adapt a pre-trained run to held-out tasks, each from a few examples."""

    checkpoint: str = flag("", "run folder of train.py to start from")
    variant: str = flag("all", "what is trained", tuple(VARIANTS))
    soup: int = flag(5, "adapter-soup: how many training tasks' adapters are averaged")
    tasks: str = flag("all", "all (test tasks), dev (dev tasks), or names joined by commas")
    data_dir: str = flag("", "folder of the benchmark's files, if it has moved since pre-training")
    split: tuple = flag(("0",), "few-shot examples: any number; t0, crossfit: a seed of their files. Several: in turn")
    shots: int = flag(0, "train examples of a task to use; 0: all that the split has")
    steps: int = flag(1000, "optimiser steps per task")
    batch_size: int = flag(8, "examples per step")
    micro_batch: int = flag(0, "examples at a time, to save memory: gradients of a step add up; 0: all")
    optimizer: str = flag("adamw", "adamw, or adafactor with these learning rates as they are", ("adamw", "adafactor"))
    lr: float = flag(1e-3, "learning rate of adapters (or of the backbone, method full)")
    lr_z: float = flag(1e-1, "learning rate of Z")
    weight_decay: float = flag(0.0, "of adapters; Z is never decayed")
    warmup: float = flag(0.06, "share of steps with rising learning rate; it then falls to 0")
    clip: float = flag(1.0, "largest gradient norm")
    choice_losses: bool = flag(False, "add T-Few's two losses over the answer choices to the language-model loss")
    keep: str = flag("loss", "keep the values with the best dev loss, or dev score", ("loss", "score"))
    eval_every: int = flag(100, "steps between two looks at the dev examples")
    patience: int = flag(3, "looks without a better value before stopping")
    test_examples: int = flag(0, "test examples per task to score (with --keep score: dev examples too); 0: all")
    eval_batch: int = flag(64, "examples per batch when scoring")
    seed: int = flag(0, "seed of initial values, order and noise")
    output_dir: str = flag("", "run folder; none: CHECKPOINT-VARIANT")
    resume: bool = flag(False, "go on with the run in --output-dir where it was cut off; begin it if it is not there")
    deterministic: bool = flag(False, "on CUDA: the same bits in every run, slower (on a CPU it is so anyhow)")
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one", ("auto", "cpu", "cuda"))


if __name__ == "__main__":  # Read the flags before the slow imports, so that --help and mistakes answer at once
    FLAGS = explicit_flags(Config, FEW_SHOT)

import dataclasses
import functools
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import data
import parallel
import train
from backbone import (
    SINGLE, add_adapters, average_skills, build_model, collapse, load_adapter_file, load_backbone, load_run,
    make_deterministic, pick_device, save_backbone, warn_if_too_large,
)  # fmt: skip
from baselines.adapter_soup import embed, soup_weights
from baselines.fixed import FixedRouter, RandomRouter, given_table
from choices import choice_log_probs, t_few_loss
from evaluate import all_scores, by_group, evaluate_tasks, main_scores, over_splits
from inject import adapted_layers, add_tasks, read_tensors, routers, save_adapters, task_ids
from resume import advice_on_memory, cut_log, finished, hold, marks_of_model, marks_of_tasks, refuse_other, sync, tidy

# --- The starting point -----------------------------------------------------------------------------------------------


def prepare(model: nn.Module, base: train.Config, cfg: Config) -> Callable[[data.Task], None]:
    """Turn a pre-trained model into the variant's starting point for ONE new task, with task id 0.

    Returns begin(task), which gives everything that is trained the values that this task starts from. For most methods
    they are the same for all tasks: fresh rows of Z in place of those of the training tasks, and what was pre-trained.
    """
    if cfg.variant == "lora":
        add_adapters(model, dataclasses.replace(base, method="lora", adapter="lora"), tasks=1)
        model.to(base.device)
    elif cfg.variant == "mu":
        average_skills(model, base.adapter)
    elif base.method == "private":
        collapse(model, base.adapter, lambda layer: None)  # fresh
    elif base.method == "adapter-soup":
        return begin_with_soup(model, base, cfg)
    else:
        add_tasks(model, 1, keep=False)
        for layer in adapted_layers(model).values():
            if isinstance(getattr(layer, "router", None), RandomRouter):  # a new task draws nothing any more
                layer.router = FixedRouter(layer.router.Z)
    if cfg.variant == "z":
        for p in model.parameters():
            p.requires_grad_(False)
        for router in routers(model):
            router.Z.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    @torch.no_grad()
    def begin(task: data.Task):
        """Back to the start; under expert with the skills that the task has."""
        for p, value in zip(trained, start, strict=True):
            p.copy_(value)
        if base.method == "expert" and cfg.variant == "all":
            skills = read_json(path := Path(cfg.checkpoint) / "tasks.json", skills=list)["skills"]
            if len(skills) != base.skills:
                raise UserError(f"{path} names {len(skills)} skills, the run has {base.skills}: it was changed by hand")
            for router in routers(model):
                router.Z.copy_(given_table("expert", [task], skills))

    return begin


def begin_with_soup(model: nn.Module, base: train.Config, cfg: Config) -> Callable[[data.Task], None]:
    """AdapterSoup's begin(task): every layer gets the average of the adapters of the most similar training tasks."""
    if not (path := Path(cfg.checkpoint) / "embeddings.safetensors").exists():
        raise UserError(f"{path} does not exist: its training has not finished")
    try:
        embeddings, routed = read_tensors(path)[0].get("embeddings", torch.empty(0)), adapted_layers(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    encoder = load_backbone(base.encoder or base.backbone, base.device, base.precision, encoder=bool(base.encoder))
    s, d = next(iter(routed.values())).router.skills, encoder[0].config.hidden_size
    if (embeddings.shape, embeddings.dtype) != ((s, d), torch.float32) or not bool(embeddings.isfinite().all()):
        raise UserError(f"{path} holds no {s} finite embeddings of size {d}: it is not of this run or this encoder")

    @torch.no_grad()
    def begin(task: data.Task):
        """Put the average of the adapters that suit the task in the place of all routed layers."""
        if not len(task.train):
            raise UserError(f"adapter-soup: task {task.name} has no training inputs to find similar tasks by")
        w = soup_weights(embeddings, embed(encoder[0].eval(), encoder[1], task, base.max_input), cfg.soup)
        for name, layer in routed.items():
            params = {key: p[0] for key, p in layer.mix(w.to(base.device)).items()}
            if "place" in params:  # of the chosen SFTs alone: the values of the others are zero, but would be trained
                kept = (w[0] > 0).repeat_interleave(len(params["place"]) // w.shape[1])
                params = {key: p[kept.to(p.device)] for key, p in params.items()}
            model.set_submodule(name, SINGLE[base.adapter](layer.linear, layer.adapter, params))

    return begin


# --- One task ---------------------------------------------------------------------------------------------------------


def loss_of_choices(model, tokenizer, items: list[data.Item], max_input: int, max_output: int) -> torch.Tensor:
    """T-Few's loss (`choices.t_few_loss`) of a batch: a scalar. Raises UserError for an example without choices."""
    examples = [item.example for item in items]
    if not all(e.choices for e in examples):
        raise UserError("--choice-losses needs examples with answer choices: use --no-choice-losses here")
    labels = torch.tensor([e.label for e in examples], device=model.device)
    return t_few_loss(*choice_log_probs(model, tokenizer, examples, max_input, max_output), labels)


@torch.no_grad()
def dev_loss(model, tokenizer, task: data.Task, lengths, batch_size: int) -> float:
    """The loss on the task's dev examples in evaluation mode (no noise), averaged over batches by their examples."""
    model.eval()
    items = [data.Item(0, e, e.outputs[0]) for e in task.dev]
    total = 0.0
    for batch in data.by_length(items, batch_size):
        with task_ids([0] * len(batch)):
            total += train.batch_loss(model, tokenizer, batch, *lengths).item() * len(batch)
    model.train()
    return total / len(items)


def dev_value(model, tokenizer, task: data.Task, lengths, cfg) -> float:
    """What early stopping makes small: the dev loss, or with --keep score minus the dev score."""
    if cfg.keep == "loss":
        return dev_loss(model, tokenizer, task, lengths, cfg.batch_size)
    on_dev = dataclasses.replace(task, test=task.dev)
    score = evaluate_tasks(model, tokenizer, [on_dev], [0], lengths, cfg.test_examples, cfg.eval_batch)[task.name]
    model.train()
    return -score


def adapt_task(model, tokenizer, task: data.Task, lengths, cfg, log, split: str = "") -> dict:
    """Train what is trainable on one task, keep the values with the best dev value.

    lengths: (max_input, max_output). Returns {"stopped": last step, "best_step": step of the values kept, "dev_loss"}
    (with --keep score: "dev_score"). A loss that is not finite ends it: one task must not keep all others waiting.

    The same loop as `train.train_steps`, with a look at the dev examples every cfg.eval_every steps, the first one
    before training, so that a task that only gets worse keeps its starting values.
    """
    optimizer = train.make_optimizer(model, cfg)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    batches = data.batches([task], cfg.batch_size, cfg.seed)
    loss_of = loss_of_choices if cfg.choice_losses else train.batch_loss
    loss_of = functools.partial(loss_of, model, tokenizer, max_input=lengths[0], max_output=lengths[1])
    # T-Few's three losses average over three different counts: its parts weigh by examples, which is not quite the same
    tokens = functools.partial(train.output_tokens, model, tokenizer, max_output=lengths[1])
    weight = len if cfg.choice_losses else tokens
    best_value = dev_value(model, tokenizer, task, lengths, cfg)
    best_step, best = 0, [p.detach().clone() for p in trained]
    key, sign = ("dev_loss", 1) if cfg.keep == "loss" else ("dev_score", -1)
    for step in range(1, cfg.steps + 1):
        train.set_rates(optimizer, rates, train.warmup_then_decay(step - 1, cfg.steps, cfg.warmup))
        loss = train.backward_in_parts(loss_of, next(batches), cfg.micro_batch, weight)
        if not math.isfinite(loss) or not nn.utils.clip_grad_norm_(trained, cfg.clip).isfinite():
            print(f"{task.name}: loss or gradients are not finite in step {step}: the best values before are kept")
            break
        optimizer.step()
        optimizer.zero_grad()
        if step % cfg.eval_every == 0 or step == cfg.steps:
            now = dev_value(model, tokenizer, task, lengths, cfg)
            line = {"split": split, "task": task.name, "step": step, "loss": loss, key: sign * now}
            log.write(json.dumps(line) + "\n")
            log.flush()
            if now < best_value:
                best_value, best_step, best = now, step, [p.detach().clone() for p in trained]
            elif step - best_step >= cfg.patience * cfg.eval_every:
                break
    with torch.no_grad():
        for p, value in zip(trained, best, strict=True):
            p.copy_(value).grad = None  # of a step that was not taken
    return {"stopped": step, "best_step": best_step, key: sign * best_value}


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
    return [known[name] for name in dict.fromkeys(names.split(","))]


def tasks_to_adapt(base: train.Config, split: str, cfg: Config) -> list[data.Task]:
    """The chosen tasks of one split with their few-shot examples; those that lack examples are named and left out.

    Raises UserError if none is left, or if one has no answer choices for --choice-losses.
    """
    tasks = choose_tasks(train.load_tasks(base, split, ("dev", "test")), cfg.tasks)
    lacking = [task.name for task in tasks if not (task.train and task.dev and task.test)]
    if lacking:
        print(f"left out, for they lack train, dev or test examples in split {split}: {', '.join(lacking)}")
    if len(lacking) == len(tasks):
        raise UserError(f"--tasks {cfg.tasks}: no task has train, dev and test examples to be adapted to and scored")
    chosen = [few_shot(task, cfg) for task in tasks if task.name not in lacking]
    if cfg.choice_losses and (without := [task.name for task in chosen if not task.train[0].choices]):
        raise UserError(f"--choice-losses: {without[0]} has no answer choices: use --no-choice-losses here")
    return chosen


def few_shot(task: data.Task, cfg: Config) -> data.Task:
    """The task with --shots of its train examples (0: all), drawn by the seed: official files are sorted by label."""
    drawn = random.Random(cfg.seed).sample(task.train, min(cfg.shots or len(task.train), len(task.train)))
    return dataclasses.replace(task, train=drawn)


def adapt(cfg: Config) -> dict:
    """Adapt to each chosen task from the same start and write the run folder; returns what result.json holds."""
    check_ranges(cfg)
    if cfg.steps == 0:
        raise UserError("--steps must be above 0, not 0")
    if cfg.deterministic:
        make_deterministic()
    parallel.join(pick_device(cfg.device))
    folder = Path(cfg.output_dir)
    advice = "a smaller --micro-batch (the same batch in parts) or --eval-batch"
    with hold(folder, "python adapt.py"), advice_on_memory(advice):
        return finished(folder, cfg.resume) or run(cfg, folder)


def run(cfg: Config, folder: Path) -> dict:
    """`adapt` in a folder that this process holds."""
    print(describe(cfg))
    base = train_config(cfg)
    warn_if_too_large(base)
    splits = {split: tasks_to_adapt(base, split, cfg) for split in cfg.split}
    torch.manual_seed(cfg.seed)
    model, tokenizer = load_run(Path(cfg.checkpoint), base)
    made_with = marks_of_model(model)
    if base.checkpointing:
        train.use_checkpointing(model)
    begin = prepare(model, base, cfg)
    begin(next(iter(splits.values()))[0])
    if parallel.first() and not (folder / "config.json").exists():
        write_json(folder / "config.json", dataclasses.asdict(cfg) | {"resume": False})
    if parallel.first():
        cut_log(folder / "log.jsonl", lambda line: (folder / line["split"] / f"{line['task']}.json").exists())
    parallel.wait()
    counts, number = train.count_parameters(model), len(next(iter(splits.values())))
    print(f"{number} tasks in {len(splits)} splits; trainable for each:", *(f"{k} {n:,}" for k, n in counts.items()))
    results, seconds = {}, 0.0
    with open(folder / "log.jsonl", "a") as log:
        for split, tasks in splits.items():
            what = (tasks, begin, split, base, cfg, folder, log, made_with)
            results[split], spent = adapt_split(model, tokenizer, *what)
            seconds += spent
    metrics = {task.name: task.metric for tasks in splits.values() for task in tasks}
    result = over_splits(results) | {"seconds": round(seconds, 1), "parameters": counts, "metrics": metrics}
    if parallel.first():
        write_json(folder / "result.json", result)
        tidy(folder)
    parallel.wait()
    over = f", mean of {len(splits)} splits (std {result['std']:.1f}, median {result['median']:.1f})"
    print(f"mean score of {number} held-out tasks: before adaptation {result['mean_before']:.1f}, after", end=" ")
    print(f"{result['mean']:.1f}{over if len(splits) > 1 else ''} ({result['seconds']:.0f} s, saved in {folder})")
    return result


def adapt_split(model, tokenizer, tasks, begin, split, base, cfg, folder: Path, log, made_with) -> tuple[dict, float]:
    """Adapt to the tasks of one split, each from its starting values (begin: see `prepare`), and save each; what is
    saved already is not done again, and refused if it was not made_with the same (`resume.refuse_other`).

    Returns {"before", "tasks": {task: main score}, "groups": {group: mean}, "metrics": {task: {metric: score}},
    "stops"}, and the seconds that it took, in earlier sittings too (of several processes: that this one took).
    """
    lengths, found = (base.max_input, base.max_output), {}
    scoring = dict(lengths=lengths, limit=cfg.test_examples, batch_size=cfg.eval_batch)
    (folder / split).mkdir(parents=True, exist_ok=True)
    share, title = parallel.share(tasks), f"adapt {cfg.variant}, split {split}"
    for task in (bar := tqdm(share, desc=title, unit="task", disable=None)):
        done, made = folder / split / f"{task.name}.json", made_with | {"data set": marks_of_tasks([task])}
        if not done.exists():
            begin(task)
            start = time.monotonic()
            one = {"before": evaluate_tasks(model, tokenizer, [task], [0], **scoring)[task.name]}
            torch.manual_seed(cfg.seed)  # a task's result does not depend on the tasks before it
            one["stops"] = adapt_task(model, tokenizer, task, lengths, cfg, log, split)
            one["metrics"] = all_scores(model, tokenizer, [task], [0], **scoring)[task.name]
            save_task(model, tokenizer, folder / split, task.name)
            sync(log)
            write_json(done, one | {"seconds": time.monotonic() - start, "made_with": made})
        one = found[task.name] = read_json(done, before=float, stops=dict, metrics=dict, seconds=float, made_with=dict)
        check_numbers(done, one["metrics"], {"before": one["before"], "seconds": one["seconds"]})
        refuse_other(done, one["made_with"], made)
        then, now = one["before"], main_scores({task.name: one["metrics"]})[task.name]
        bar.set_postfix(task=task.name, before=f"{then:.1f}", after=f"{now:.1f}")
        if bar.disable:
            print(f"{task.name:40} split {split:5} before {then:5.1f}  after {now:5.1f}", flush=True)
    seconds, found = sum(one["seconds"] for one in found.values()), parallel.together(found)
    before, after, stops = ({t.name: found[t.name][key] for t in tasks} for key in ("before", "metrics", "stops"))
    tasks_after = main_scores(after)
    groups = by_group(tasks_after, tasks)
    return {"before": before, "tasks": tasks_after, "groups": groups, "metrics": after, "stops": stops}, seconds


def train_config(cfg: Config) -> train.Config:
    """The pre-training run's settings. Raises UserError if the checkpoint or the variant does not fit."""
    if not cfg.checkpoint:
        raise UserError("--checkpoint is missing: give a run folder of train.py")
    base = read_config(train.Config, Path(cfg.checkpoint) / "config.json")
    check_ranges(base)
    if base.method not in (fits := VARIANTS[cfg.variant]):
        needs = f"--variant {cfg.variant} needs a run of method {', '.join(fits)}"
        raise UserError(f"{needs}, {cfg.checkpoint} is {base.method}")
    device = pick_device(cfg.device)
    precision = base.precision if device == "cuda" else "fp32"  # as in train.make_config
    return dataclasses.replace(base, data_dir=cfg.data_dir or base.data_dir, device=device, precision=precision)


def save_task(model, tokenizer, folder: Path, name: str):
    """Save what was adapted to one task under the task's name."""
    if not adapted_layers(model):  # method full
        save_backbone(model, tokenizer, folder / name)
    else:
        save_adapters(model, str(folder / f"{name}.safetensors"))


def load_adapted(cfg: Config, folder: Path):
    """For each split and task of a finished adaptation run: (split, task, model, tokenizer, lengths), with the adapter
    saved for it."""
    base = train_config(cfg)
    model, tokenizer = load_run(Path(cfg.checkpoint), base)
    begin = prepare(model, base, cfg)
    for split in cfg.split:
        for task in tasks_to_adapt(base, split, cfg):
            if base.method == "full" and cfg.variant != "lora":
                saved = str(folder / split / task.name)
                model, tokenizer = build_model(dataclasses.replace(base, backbone=saved), 1)
            elif not (path := folder / split / f"{task.name}.safetensors").is_file():
                raise UserError(f"{path} does not exist: the run in {folder} has not finished")
            else:
                begin(task)
                load_adapter_file(model, path)
            yield split, task, model, tokenizer, (base.max_input, base.max_output)


def make_config(**flags) -> Config:
    """A Config from explicit flags: what they leave open comes from the few-shot recipe of the run's data set."""
    start = Config(**flags)
    if start.resume and start.output_dir and (path := Path(start.output_dir) / "config.json").exists():
        return resumed(Config, path, flags)
    base = train_config(start)
    method = "" if start.variant == "lora" else base.method  # full's own rates are not those of a LoRA after it
    cfg = Config(**recipe(FEW_SHOT, base.dataset, method) | flags)
    if base.dataset == "t0" and cfg.shots:
        raise UserError("--shots does not fit t0, whose few-shot files fix the examples: leave it out")
    if len(set(cfg.split)) < len(cfg.split):
        raise UserError(f"--split {' '.join(cfg.split)} names a split twice")
    if ignored := unused(base, flags, cfg.variant):
        print(f"changes nothing with --variant {cfg.variant} of a run of method {base.method}: {', '.join(ignored)}")
    if not cfg.output_dir:
        cfg.output_dir = f"{cfg.checkpoint.rstrip('/')}-{cfg.variant}"
        if cfg.resume:
            return make_config(**flags | {"output_dir": cfg.output_dir})
    return cfg


def main(flags: dict) -> dict:
    return adapt(make_config(**flags))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
