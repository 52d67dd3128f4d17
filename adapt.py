"""Few-shot adaptation: a pre-trained run meets tasks that it has never seen, one at a time.

    python adapt.py --checkpoint runs/NAME --variant all --tasks all
    python adapt.py --resume --output-dir runs/NAME-all              resume with the tasks that are not done

Every task starts from the same checkpoint, learns from a few examples (--shots), stops early by the loss on its own
dev examples (t0: by the score, as the papers do), and is scored on its test examples before and after. Several --split
values repeat all of it with other few-shot examples of the same tasks. What is trained (MHR paper section 3):

    all   the skills and the new task's Z            (methods lora, ia3, mu: the one adapter; full: the whole backbone)
    z     only the new task's Z: MHR-z, Poly-z       (any method that learns a Z)
    mu    the average of the skills, as ONE adapter without routing: MHR-mu, Poly-mu, Random-mu, Private-mu
    lora  a fresh LoRA on a backbone that was fine-tuned in full (MHR appendix A.1, table 6; "all" after "full" is
          table 3 of its first version)

No paper has mu of other methods; for HyperFormer it is 1/s of each row of its last layer. An average of SFTs is larger
than one. Where routing is fixed, "all" trains, for expert: the skills that the table assigns to the task (all, equally,
if none); random: all skills, equally; private: a fresh adapter (Polytropon section 2.5: nothing is shared);
adapter-soup: ONE adapter, the average of those of the most similar training tasks.

Writes to the run folder: config.json, for each task SPLIT/TASK.safetensors and SPLIT/TASK.json (its scores), log.jsonl,
predictions.jsonl (scored examples; those before adaptation in before.predictions.jsonl), provenance.json (what made it)
and result.json.
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import as_flag, explicit_flags, flag, in_use, setting, unused
from plumbing.folders import (
    mark_of_run,
    read_skills,
    remove_checkpoint,
    remove_run,
    resumed_config,
    write_config,
    write_json,
)
from recipes import FEW_SHOT, VARIANTS, recipe


@dataclass
class Config:
    """Adapt a pre-trained run to held-out tasks, each from a few examples.

    example:
      python adapt.py --checkpoint runs/strings-mhr-0 --variant z --tasks dev
    """

    checkpoint: str = flag("", "run of train.py to start from", metavar="RUN", group="what to learn", required=True)
    variant: str = flag("all", "what is trained", tuple(VARIANTS))
    soup: int = setting(5, "adapter-soup: how many training tasks' adapters are averaged")
    tasks: str = flag(
        "all", "all (test tasks), dev, papers (superni: MHR's 20), or names joined by commas", metavar="NAMES"
    )
    data_dir: str = flag("", "folder of the benchmark's files, if it has moved since pre-training", metavar="DIR")
    split: tuple = flag(("0",), "few-shot examples: a number; t0, crossfit: a seed of their files", metavar="SPLIT")
    shots: int = flag(0, "train examples of a task to use; 0: all that the split has")
    steps: int = flag(1000, "optimiser steps per task", group="optimisation")
    batch_size: int = flag(8, "examples per step")
    micro_batch: int = flag(0, "examples per forward pass, to save memory; gradients of a step add up; 0: all")
    optimizer: str = setting("adamw", "adafactor: without relative steps", ("adamw", "adafactor"))
    scale_parameter: bool = setting(False, "adafactor: multiply the rate of a parameter by its RMS, at least 1e-3")
    lr: float = flag(1e-3, "learning rate of adapters (method full: of the backbone)")
    lr_z: float = flag(1e-1, "learning rate of Z")
    weight_decay: float = setting(0.0, "of adapters; Z is never decayed")
    warmup: float = setting(0.06, "share of the steps in which learning rates rise; they then fall to 0")
    clip: float = flag(1.0, "largest gradient norm")
    choice_losses: bool = setting(False, "add T-Few's two losses over the answer choices to the language-model loss")
    best_by: str = setting("loss", "keep the values with the best dev loss, or dev score", ("loss", "score"))
    eval_every: int = flag(100, "steps between two looks at the dev examples")
    patience: int = setting(3, "looks without improvement before stopping")
    test_examples: int = flag(0, "test examples per task to score (t0: dev examples too); 0: all", group="the run")
    eval_batch: int = flag(64, "examples per batch when scoring")
    beams: int = flag(1, "beams of beam search when scoring; 1 is greedy")
    seed: int = flag(0, "seed of initial values, order and noise")
    output_dir: str = flag("", "run folder; none: CHECKPOINT-VARIANT", metavar="DIR")
    resume: bool = flag(False, "resume the run in --output-dir, or start it if it is not there")
    overwrite: bool = flag(False, "replace the run in --output-dir")
    dry_run: bool = flag(False, "stop after a few steps: two examples in full, what a step takes; nothing is written")
    tensorboard: bool = flag(False, "also write the log for TensorBoard, to the run folder")
    deterministic: bool = flag(False, "on CUDA: bit-identical runs, slower (on a CPU they always are)")
    device: str = flag("auto", "auto: cuda if there is one, else cpu", ("auto", "cpu", "cuda", "mps"))


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, FEW_SHOT, moved={"keep": "is best_by now, a setting of the recipe in recipes.py"})

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import benchmarks
import data
import train
from baselines.adapter_soup import find_soups
from baselines.fixed import FixedRouter, RandomRouter, given_table
from benchmarks.choices import labelled_tensors, loss_of_choices
from inject import adapted_layers, add_tasks, routers
from methods import (
    SINGLE, add_adapters, average_skills, collapse, count_parameters, load_run, save_trained, use_checkpointing,
)  # fmt: skip
from plumbing import processes
from plumbing.ahead import ahead
from plumbing.backbones import warn_if_too_large
from plumbing.checkpoint import marks_of_model
from plumbing.large import is_sharded
from plumbing.machine import peak_memory, record_start, report_dry_run
from plumbing.run import Log, run_in_folder
from plumbing.tasks import InStep, TaskRun
from plumbing.tables import counted, in_words
from scoring import all_scores, evaluate_tasks, of_split, over_splits, summary

# --- The starting point -----------------------------------------------------------------------------------------------


def prepare(model: nn.Module, base: train.Config, cfg: Config) -> Callable[[data.Task], None]:
    """Turn a pre-trained model into the variant's starting point for ONE new task, with task id 0.

    Returns begin(task), which sets everything that is trained to its values at the start of this task. For most methods
    these are the same for all tasks: a fresh row of Z, and what was pre-trained.
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
        """Back to the start; under expert with the skills of the task."""
        for p, value in zip(trained, start, strict=True):
            p.copy_(value)
        if base.method == "expert" and cfg.variant == "all":
            skills = read_skills(Path(cfg.checkpoint), base.skills)
            for router in routers(model):
                router.Z.copy_(given_table("expert", [task], skills))

    return begin


def begin_with_soup(model: nn.Module, base: train.Config, cfg: Config) -> Callable[[data.Task], None]:
    """AdapterSoup's begin(task): every layer gets the average of the adapters of the most similar training tasks."""
    routed = adapted_layers(model)
    skills = next(iter(routed.values())).router.skills
    weights_of = find_soups(base, Path(cfg.checkpoint) / "embeddings.safetensors", skills, cfg.soup)

    @torch.no_grad()
    def begin(task: data.Task):
        """Replace all routed layers by the average of the adapters that suit the task."""
        w = weights_of(task)
        for name, layer in routed.items():
            params = {key: p[0] for key, p in layer.mix(w.to(base.device)).items()}
            if "place" in params:  # of the chosen SFTs alone: values of the others are zero, but would be trained
                chosen = (w[0] > 0).repeat_interleave(len(params["place"]) // w.shape[1])
                params = {key: p[chosen.to(p.device)] for key, p in params.items()}
            model.set_submodule(name, SINGLE[base.adapter](layer.linear, layer.adapter, params))

    return begin


# --- One task: the loop -----------------------------------------------------------------------------------------------


def dev_value(model, tokenizer, task: data.Task, lengths, cfg) -> float:
    """What early stopping minimises: the dev loss, or for a recipe with best_by "score" minus the dev score."""
    if cfg.best_by == "loss":
        items = [data.Item(0, e, e.outputs[0]) for e in task.dev]
        return train.mean_loss(model, tokenizer, items, lengths, cfg.batch_size)
    on_dev = dataclasses.replace(task, test=task.dev)
    how = (cfg.test_examples, cfg.eval_batch, cfg.beams)
    return -evaluate_tasks(model, tokenizer, [on_dev], [0], lengths, *how)[task.name]


def adapt_task(model, tokenizer, task: data.Task, lengths, cfg, log: Log, split: str = "") -> dict:
    """Train what is trainable on one task; keep the values with the best dev value.

    lengths: (max_input, max_output). Returns {"stopped": last step, "best_step": step of the values kept, "dev_loss"}
    (or "dev_score"). A loss that is not finite ends this task, not those after it.

    The loop of `train.train_steps`, with a look at the dev examples every cfg.eval_every steps. The first look is
    before training: a task that only gets worse keeps its starting values.
    """
    optimizer = train.make_optimizer(model, cfg)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    of_choices, of_tokens = (labelled_tensors, loss_of_choices), (train.tensors_of, train.token_loss)
    prepare, loss_of = of_choices if cfg.choice_losses else of_tokens
    prepare = partial(prepare, model, tokenizer, max_input=lengths[0], max_output=lengths[1])
    # T-Few's three losses average over three different counts: its parts are weighted by examples, nearly the same
    weight = len if cfg.choice_losses else partial(train.output_tokens, model, tokenizer, max_output=lengths[1])
    key, sign = ("dev_loss", 1) if cfg.best_by == "loss" else ("dev_score", -1)
    together = InStep(is_sharded(model))
    best_value, best_step = together.agreed(dev_value(model, tokenizer, task, lengths, cfg)), 0
    best = [p.detach().clone() for p in trained]
    model.train()
    batches = data.batches([task], cfg.batch_size, cfg.seed)
    batches = ahead(batches, partial(together.parts_of, micro_batch=cfg.micro_batch, prepare=prepare, weight=weight))
    for step in range(1, cfg.steps + 1):
        _, parts = next(batches)  # 1 take a batch of this task
        train.set_rates(optimizer, rates, train.warmup_then_decay(step - 1, cfg.steps, cfg.warmup))  # 2 set the rates
        loss = train.backward_in_parts(partial(loss_of, model), parts, model.device)  # 3 forward, backward
        loss = together.sum(trained, loss)
        norm = nn.utils.clip_grad_norm_(trained, cfg.clip)  # 4 clip
        loss, norm = torch.stack([loss, norm]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            print(f"{task.name}: loss or gradients are not finite in step {step}: the best values before are kept")
            break
        optimizer.step()  # 5 step
        optimizer.zero_grad()
        if step % cfg.eval_every == 0 or step == cfg.steps:  # 6 record: look at the dev examples
            value = together.agreed(dev_value(model, tokenizer, task, lengths, cfg))
            log.write({"split": split, "task": task.name, "step": step, "loss": loss, key: sign * value})
            if value < best_value:
                best_value, best_step, best = value, step, [p.detach().clone() for p in trained]
            elif step - best_step >= cfg.patience * cfg.eval_every:
                break
    with torch.no_grad():
        for p, value in zip(trained, best, strict=True):
            p.copy_(value).grad = None  # the gradient of a step that was not taken
    return {"stopped": step, "best_step": best_step, key: sign * best_value}


def try_task(model, tokenizer, task: data.Task, lengths, cfg, folder: Path) -> dict:
    """--dry-run: what a step takes, from runs of 1 and of 4 steps, which look at the dev examples equally often."""
    seconds, few = [], dataclasses.replace(cfg, eval_every=cfg.steps + 4)
    with TaskRun(folder, {}, is_sharded(model)) as run:
        for steps in (1, 1, 4):  # the first one warms up
            start = time.monotonic()
            adapt_task(model, tokenizer, task, lengths, dataclasses.replace(few, steps=steps), run)
            seconds.append(time.monotonic() - start)
    return report_dry_run((seconds[2] - seconds[1]) / 3, cfg.steps)


# --- All tasks --------------------------------------------------------------------------------------------------------


def tasks_to_adapt(base: train.Config, split: str, cfg: Config) -> list[data.Task]:
    """The chosen tasks of one split with their few-shot examples. Raises UserError if there are none, or if one has no
    answer choices for T-Few's losses."""
    tasks = benchmarks.held_out(benchmarks.load_for(base, split, ("dev", "test")), cfg.tasks)
    tasks = benchmarks.few_shot(tasks, split, cfg.shots, cfg.seed)
    if cfg.choice_losses and (without := [task.name for task in tasks if not task.train[0].choices]):
        raise UserError(f"--tasks {without[0]} has no answer choices, which T-Few's losses need: leave it out")
    return tasks


def adapt(cfg: Config) -> dict:
    """Adapt to each chosen task from the same start and write the run folder; returns the content of result.json."""
    for name in ("steps", "beams", "eval_every"):
        if getattr(cfg, name) == 0:
            raise UserError(f"{as_flag(name)} must be above 0, not 0")
    base, advice = base_config(cfg), "a smaller --micro-batch (the same batch in parts) or --eval-batch"
    usual = dataclasses.asdict(Config()) | few_shot_recipe(base, cfg.variant)
    return run_in_folder(adapt_in, cfg, "adapt.py", advice, in_use(base, usual, cfg.variant))


def adapt_in(folder: Path, cfg: Config) -> dict:
    """`adapt` in a folder that this process has locked."""
    base = base_config(cfg)
    warn_if_too_large(base)
    splits = {split: tasks_to_adapt(base, split, cfg) for split in cfg.split}
    torch.manual_seed(cfg.seed)
    model, tokenizer = load_run(Path(cfg.checkpoint), base)
    made_with = marks_of_model(model)
    if base.checkpointing:
        use_checkpointing(model)
    begin = prepare(model, base, cfg)
    begin(next(iter(splits.values()))[0])
    if cfg.overwrite and processes.first():
        remove_run(folder)
    if processes.first() and not (folder / "config.json").exists():
        write_config(folder, cfg)
    if processes.first():
        record_start(folder)
    counts, first = count_parameters(model), next(iter(splits.values()))
    lengths, results = (base.max_input, base.max_output), {}
    print(data.preview(first, tokenizer, model.config.is_encoder_decoder, *lengths, whole=cfg.dry_run))
    few = f"{counted(len(first), 'task')}, each from {len(first[0].train)} examples"
    print(f"{'adaptation':21}{few}{f', in {len(splits)} splits' * (len(splits) > 1)}")
    print(f"{'trainable for each':21}{in_words(counts)}")
    if cfg.dry_run:
        return try_task(model.train(), tokenizer, first[0], lengths, cfg, folder)
    scoring = dict(lengths=lengths, limit=cfg.test_examples, batch_size=cfg.eval_batch, beams=cfg.beams)
    with TaskRun(folder, made_with, is_sharded(model), cfg.tensorboard) as run:
        for split, tasks in splits.items():
            for task in run.tasks(tasks, split, f"adapt {cfg.variant}, split {split}"):
                begin(task)
                lines = {"before": [], "after": []}
                before = evaluate_tasks(model, tokenizer, [task], [0], **scoring, lines=lines["before"])[task.name]
                torch.manual_seed(cfg.seed)  # a task's result does not depend on the tasks before it
                start = time.monotonic()
                stops = adapt_task(model, tokenizer, task, lengths, cfg, run, split)
                pace = stops["stopped"] * min(cfg.batch_size, len(task.train)) / (time.monotonic() - start)
                metrics = all_scores(model, tokenizer, [task], [0], **scoring, lines=lines["after"])[task.name]
                if run.writes:
                    save_trained(model, tokenizer, folder / split / task.name)
                run.record(lines, before=before, stops=stops, metrics=metrics, examples_per_second=pace)
            results[split] = of_split(run.results(), tasks)
    metrics = {task.name: task.metric for tasks in splits.values() for task in tasks}
    result = over_splits(results) | {"seconds": round(run.seconds, 1), "parameters": counts, "metrics": metrics}
    result |= {"examples_per_second": run.pace(), "peak_memory_gb": peak_memory()}
    result["made_from"] = mark_of_run(Path(cfg.checkpoint))
    if processes.first():
        write_json(folder / "result.json", result)
        remove_checkpoint(folder)
    processes.wait()
    print(f"{summary(result, len(first))}\n{result['seconds']:.0f} s, saved in {folder}")
    return result


# --- Settings ---------------------------------------------------------------------------------------------------------


def base_config(cfg: Config) -> train.Config:
    """The pre-training run's settings. Raises UserError if the checkpoint or the variant does not fit."""
    if not cfg.checkpoint:
        raise UserError("--checkpoint is missing: give a run folder of train.py")
    base = train.run_config(cfg.checkpoint, cfg.data_dir, cfg.device)
    if base.method not in (fits := VARIANTS[cfg.variant]):
        needs = f"--variant {cfg.variant} needs a run of method {', '.join(fits)}"
        raise UserError(f"{needs}, {cfg.checkpoint} is {base.method}")
    return base


def few_shot_recipe(base: train.Config, variant: str) -> dict:
    """The recipe's settings after this pre-training: full's own rates are not those of a LoRA after it."""
    return recipe(FEW_SHOT, base.dataset, "" if variant == "lora" else base.method)


def make_config(**flags) -> Config:
    """A Config from explicit flags; the rest comes from the few-shot recipe of the run's benchmark."""
    if cfg := resumed_config(Config, flags):
        return cfg
    start = Config(**flags)
    base = base_config(start)
    cfg = Config(**few_shot_recipe(base, start.variant) | flags)
    if base.dataset == "t0" and cfg.shots:
        raise UserError("--shots does not fit t0, whose few-shot files fix the examples: leave it out")
    if len(set(cfg.split)) < len(cfg.split):
        raise UserError(f"--split {' '.join(cfg.split)} names a split twice")
    if ignored := unused(base, flags, cfg.variant):
        print(f"ignored with --variant {cfg.variant} of a run of method {base.method}: {', '.join(ignored)}")
    if not cfg.output_dir:
        cfg.output_dir = f"{cfg.checkpoint.rstrip('/')}-{cfg.variant}"
        if cfg.resume:
            return make_config(**flags | {"output_dir": cfg.output_dir})
    return cfg


def main(flags: dict) -> dict:
    return adapt(make_config(**flags))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
