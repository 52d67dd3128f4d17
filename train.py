"""Multi-task pre-training: one model, many tasks, an adapter that each task mixes for itself.

    python train.py --method mhr --heads 8 --dataset strings        the bundled job, minutes on two CPU cores
    python train.py --method mhr --heads 8 --dataset t0             the papers' recipe; needs the hub and a large GPU
    python train.py --method mhr --heads 8 --dataset t0 --data-dir assets/samples/t0 --backbone tiny --steps 100
    python train.py --from-run RUN --method mu --steps 1000         average RUN's skills, train that one adapter on
    python train.py --resume --output-dir RUN                       go on with a run that was cut off

Writes to the run folder: config.json (every setting), adapter.safetensors (adapters and routers; method full: the
folder backbone/ instead), tasks.json (the names of tasks, and of skills where they have names), log.jsonl (one line a
logged step) and result.json; method adapter-soup also embeddings.safetensors; checkpoint.safetensors until it is done.
"""

from dataclasses import dataclass

from config import (
    GIVEN, METHODS, PRETRAINING, ROUTED, UserError, check_ranges, describe, exit_on_user_error,
    explicit_flags, flag, read_config, read_json, recipe, resumed, unused, write_json,
)  # fmt: skip


@dataclass
class Config:
    """Pre-train adapters on many tasks at once."""

    # What to learn, and on what
    method: str = flag(
        "mhr", "what is trained (shared: one adapter for all tasks, as lora and ia3; mu: see --from-run)", METHODS
    )
    from_run: str = flag("", "go on from a run folder, with its settings; --method mu averages its skills first")
    dataset: str = flag("strings", "benchmark", ("strings", "strings-single", "t0", "superni", "crossfit"))
    data_dir: str = flag("", "folder of the benchmark's files; none: t0 and superni come from the hub")
    split: str = flag("0", "strings: number that the examples are drawn from")
    instructions: bool = flag(False, "strings: the input names the operations")
    partition: str = flag("random.json", "crossfit: file that says which tasks are for training, dev and test")
    backbone: str = flag("tiny", "tiny (bundled), scratch (the same, untrained), or a Hugging Face name or folder")
    # Adapter and routing
    adapter: str = flag("lora", "what a skill is", ("lora", "ia3", "sft"))
    layers: str = flag(
        "",
        "layers to adapt: lora, ia3, light, attention, self-attention, or a regular expression; none: by adapter",
    )
    rank: int = flag(1, "rank r of LoRA")
    density: float = flag(0.1, "sft: share of a layer's weights that may change")
    skills: int = flag(8, "skills s in a layer's inventory (private, expert, adapter-soup: 0, as the tasks say)")
    heads: int = flag(8, "heads h of mhr; must divide every adapted layer")
    routing: str = flag("gumbel", "how training turns logits into weights", ("gumbel", "sigmoid", "straight-through"))
    granularity: str = flag(
        "linear", "which layers share a router: linear (none), layer (attention or feed-forward), block, coder, model",
        ("linear", "layer", "block", "coder", "model"),
    )  # fmt: skip
    top_k: int = flag(2, "task-moe: skills that a task uses")
    random_by: str = flag("example", "random: what draws its skills, each example or each task", ("example", "task"))
    encoder: str = flag("", "adapter-soup: name or folder of the model that embeds tasks; none: the backbone")
    # Optimisation
    steps: int = flag(0, "optimiser steps; 0: by --epochs")
    epochs: int = flag(0, "passes over the training examples, in place of --steps")
    batch_size: int = flag(64, "examples per step")
    micro_batch: int = flag(0, "examples at a time, to save memory: gradients of a step add up; 0: all")
    optimizer: str = flag("adamw", "adamw, or adafactor with these learning rates as they are", ("adamw", "adafactor"))
    lr: float = flag(1e-3, "learning rate of adapters (or of the backbone, method full)")
    lr_z: float = flag(1e-1, "learning rate of Z (dual-speed, Polytropon section 2.3)")
    weight_decay: float = flag(0.0, "of adapters; Z is never decayed")
    warmup: float = flag(0.06, "share of steps with rising learning rate; it then falls to 0")
    clip: float = flag(1.0, "largest gradient norm")
    max_input: int = flag(512, "tokens of an input")
    max_output: int = flag(64, "tokens of an output")
    precision: str = flag(
        "fp32", "of the backbone: bf16 (on a GPU, where not said otherwise) or fp32", ("fp32", "bf16")
    )
    checkpointing: bool = flag(False, "gradient checkpointing: less memory, more time")
    # The run
    seed: int = flag(0, "seed of initial values, order and noise")
    eval_examples: int = flag(0, "test examples per training task to score at the end; 0: none")
    log_every: int = flag(50, "steps between lines of log.jsonl")
    output_dir: str = flag("", "run folder; none: runs/DATASET-METHOD-SEED")
    keep_every: int = flag(0, "also keep what is trained at every N-th step, as adapter-N.safetensors; 0: only the end")
    save_every: str = flag("10m", "how often to save a checkpoint: 200 is every 200 steps, 10m every 10 minutes")
    resume: bool = flag(False, "go on with the run in --output-dir where it was cut off; begin it if it is not there")
    deterministic: bool = flag(False, "on CUDA: the same bits in every run, slower (on a CPU it is so anyhow)")
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one", ("auto", "cpu", "cuda"))


if __name__ == "__main__":  # Read the flags before the slow imports, so that --help and mistakes answer at once
    FLAGS = explicit_flags(Config, PRETRAINING)

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import data
import parallel
from baselines.adapter_soup import embed_tasks
from baselines.fixed import given_table, skill_names
from evaluate import evaluate_tasks, mean
from inject import fingerprint, routers, save_adapters, task_ids, write_tensors
from backbone import (
    average_skills, build_model, load_run, make_deterministic, pick_device, save_backbone, warn_if_too_large,
)  # fmt: skip
from resume import (
    CHECKPOINT, Every, Progress, Signals, advice_on_memory, cut_log, finished, hold, load_checkpoint, marks_of_tasks,
    refuse_nonfinite, refuse_other_tasks, save_checkpoint, sync, tidy, write_line,
)  # fmt: skip

# --- Optimisation -----------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, cfg) -> torch.optim.Optimizer:
    """cfg.optimizer over what is trainable, in two groups: adapters at cfg.lr, Z at cfg.lr_z without weight decay.

    The dual-speed learning rate of Polytropon section 2.3: a fast Z decides who uses which skill before the skills
    have settled. Decaying the logits Z would pull every task towards using all skills. The task embeddings of
    HyperFormer are a Z too; its hidden layer, which all tasks share, goes with the adapters.
    """
    z = [router.Z for router in routers(model) if router.Z.requires_grad]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in z)]
    groups = [
        dict(params=rest, lr=cfg.lr, weight_decay=cfg.weight_decay),
        dict(params=z, lr=cfg.lr_z, weight_decay=0.0),
    ]
    groups = [group for group in groups if group["params"]]
    if cfg.optimizer == "adafactor":  # T-Few's and MHR's setting: no relative steps, no scaling by the parameters' size
        from transformers import Adafactor  # here: it takes seconds to import, and peft where that is installed

        return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False)
    return torch.optim.AdamW(groups, fused=True)


def warmup_then_decay(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: up in a line over the first warmup * steps steps, then down in a line to 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def batch_loss(model, tokenizer, items: list[data.Item], max_input: int, max_output: int) -> torch.Tensor:
    """Cross-entropy averaged over the output tokens of a batch: a scalar. Texts are cut to max_input, max_output."""
    examples, outputs = [item.example for item in items], [item.output for item in items]
    batch = data.collate(examples, outputs, tokenizer, model.config.is_encoder_decoder, max_input, max_output)
    return token_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()})


def token_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`batch_loss` of the tensors that `data.collate` makes."""
    if not model.config.is_encoder_decoder:
        return model(**batch, use_cache=False).loss  # the keys and values that generation keeps would be copies
    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    decoder = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(**inputs, decoder_input_ids=decoder, use_cache=False).logits
    # not left to the model: T5 would take the loss of bfloat16 logits in bfloat16
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def output_tokens(model, tokenizer, items: list[data.Item], max_output: int) -> int:
    """How many tokens `batch_loss` averages over."""
    outputs = [item.output for item in items]
    return sum(map(len, data.encode_outputs(outputs, tokenizer, model.config.is_encoder_decoder, max_output)))


def backward_in_parts(loss_of, items: list[data.Item], micro_batch: int, weight=len, batch=None) -> float:
    """Forward and backward over a batch in parts of micro_batch examples (0: all at once); returns the mean loss.

    loss_of(items): a scalar, an average over what weight(items) counts, examples or tokens. All parts draw the same
    routing noise, so a batch in parts has the loss and gradients of the whole (but for dropout in the backbone, and
    random routing by example, which repeat their draws in each part).
    batch: the items of all processes, where `items` is one's share.
    """
    batch, total, size = batch or items, 0.0, micro_batch or max(1, len(items))
    ids, undivided = [item.task for item in batch], len(items) == len(batch) <= size
    whole = 1 if undivided else weight(batch)
    gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    for k in range(0, len(items), size):
        part, last = items[k : k + size], k + size >= len(items)
        with torch.random.fork_rng(gpu, enabled=not last), task_ids([item.task for item in part], among=ids):
            loss = loss_of(part) * (1 if undivided else weight(part) / whole)
            loss.backward()
        total += loss.item()
    return total


def use_checkpointing(model):
    """Keep the inputs of blocks only, and compute the rest again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable parameters: Z of the routers, and all others (skills, adapters, or the whole backbone)."""
    z = sum(router.Z.numel() for router in routers(model) if router.Z.requires_grad)
    return {"adapters": sum(p.numel() for p in model.parameters() if p.requires_grad) - z, "routing": z}


# --- The loop ---------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> dict:
    """Pre-train as cfg says and write the run folder; returns what result.json holds."""
    check_ranges(cfg)
    Every(cfg.save_every)
    if cfg.deterministic:
        make_deterministic()
    parallel.join(cfg.device)
    folder = Path(cfg.output_dir)
    advice = "a smaller --micro-batch (the same batch in parts) or --checkpointing"
    with hold(folder, "python train.py"), advice_on_memory(advice):
        return finished(folder, cfg.resume) or run(cfg, folder)


def run(cfg: Config, folder: Path) -> dict:
    """`train` in a folder that this process holds."""
    print(describe(cfg))
    warn_if_too_large(cfg)
    tasks = load_tasks(cfg, cfg.split, ("train",)).train
    steps, scored = steps_to_take(cfg, tasks), tasks_to_score(cfg, tasks)
    torch.manual_seed(cfg.seed)
    skills = names_of_skills(cfg, tasks)
    cfg.skills = len(skills) or cfg.skills
    if (folder / "tasks.json").exists() and (folder / "config.json").exists():  # a run to go on with
        refuse_other_tasks(folder, cfg.method, tasks)
    model, tokenizer = starting_point(cfg, tasks, skills)
    if cfg.checkpointing:
        use_checkpointing(model)
    embeddings = embed_tasks(cfg, tasks) if cfg.method == "adapter-soup" else None  # now: a wrong --encoder is told
    if parallel.first() and not (folder / "config.json").exists():  # which says that the rest is there
        write_json(folder / "tasks.json", {"tasks": [task.name for task in tasks], "skills": skills})
        write_json(folder / "config.json", dataclasses.asdict(cfg) | {"resume": False})
    counts, sizes = count_parameters(model), [len(task.train) for task in tasks if len(task.train)]
    print(f"{len(sizes)} training tasks, {sum(sizes):,} examples, {steps:,} steps,", end=" ")
    print(f"{len(routers(model))} routers; trainable:", *(f"{name} {count:,}" for name, count in counts.items()))
    done = train_steps(model.train(), tokenizer, tasks, steps, cfg, folder)
    if parallel.first():
        save_run(model, tokenizer, cfg, folder)
        if embeddings is not None:
            write_tensors({"embeddings": embeddings}, folder / "embeddings.safetensors")
    result = {"steps": steps, "loss": done.loss, "seconds": round(done.seconds, 1), "parameters": counts}
    result |= score(model, tokenizer, tasks, scored, cfg)
    if parallel.first():
        write_json(folder / "result.json", result)
        tidy(folder)
    parallel.wait()
    print(f"{done.seconds:.0f} s of training, final loss {done.loss:.4f}, saved in {folder}")
    return result


def score(model, tokenizer, tasks: list[data.Task], scored: list[int], cfg: Config) -> dict:
    """{"mean", "tasks": {name: main score}} of the training tasks with these numbers, {} if there are none."""
    if not scored:
        return {}
    mine, lengths = parallel.share(scored), (cfg.max_input, cfg.max_output)
    found = evaluate_tasks(model, tokenizer, [tasks[t] for t in mine], mine, lengths, cfg.eval_examples)
    found = parallel.together(found)
    scores = {tasks[t].name: found[tasks[t].name] for t in scored}
    print(f"training tasks, {cfg.eval_examples} unseen examples each: mean score {mean(scores):.1f}")
    return {"mean": mean(scores), "tasks": scores}


def steps_to_take(cfg: Config, tasks: list[data.Task]) -> int:
    """--steps, or what --epochs makes. Raises UserError if there is nothing to train."""
    examples = sum(len(task.train) for task in tasks)
    if examples == 0:
        raise UserError(f"--data-dir {cfg.data_dir}: the training tasks have no examples")
    steps = cfg.steps or cfg.epochs * -(-examples // cfg.batch_size)
    if steps == 0:
        raise UserError("nothing to train: give --steps or --epochs above 0")
    return steps


def tasks_to_score(cfg: Config, tasks: list[data.Task]) -> list[int]:
    """The numbers of the training tasks to score at the end. Raises UserError if --eval-examples finds none."""
    scored = [t for t, task in enumerate(tasks) if task.test] if cfg.eval_examples else []
    if cfg.eval_examples and not scored:
        raise UserError(f"--eval-examples {cfg.eval_examples}: no training task has test examples")
    return scored


def load_tasks(cfg: Config, split: str, parts: tuple[str, ...]) -> data.Benchmark:
    """The benchmark that a run is about: `data.load` with the run's settings."""
    return data.load(cfg.dataset, cfg.data_dir, split, parts, cfg.instructions, cfg.partition)


def names_of_skills(cfg: Config, tasks: list[data.Task]) -> list[str]:
    """The skills of a method whose allocation is given, by name; [] for the others. UserError if there are none."""
    seen = [task for task in tasks if len(task.train)]  # a skill that nothing trains would only dilute averages
    names = skill_names(cfg.method, seen) if cfg.method in GIVEN else []
    if cfg.method == "expert" and not names:
        raise UserError(f"--method expert: nothing is known of the skills of these tasks of {cfg.dataset}")
    return names


def starting_point(cfg: Config, tasks: list[data.Task], skills: list[str]):
    """(model, tokenizer) before training: fresh adapters, or those of --from-run, averaged for method mu."""
    if not cfg.from_run:
        return build_model(cfg, len(tasks), given_table(cfg.method, tasks, skills) if skills else None)
    base = read_config(Config, Path(cfg.from_run) / "config.json")
    refuse_other_tasks(Path(cfg.from_run), cfg.method, tasks)
    model, tokenizer = load_run(Path(cfg.from_run), dataclasses.replace(cfg, method=base.method))
    if cfg.method == "mu":
        average_skills(model, cfg.adapter)
    return model, tokenizer


def steps_before(cfg: Config) -> int:
    """How many batches of this very order --from-run has seen: training goes on after them. 0 if the order differs."""
    if not cfg.from_run:
        return 0
    base = read_config(Config, Path(cfg.from_run) / "config.json")
    same = (base.seed, base.batch_size, base.from_run) == (cfg.seed, cfg.batch_size, "")
    return read_json(Path(cfg.from_run) / "result.json", steps=int)["steps"] if same else 0


def train_steps(model, tokenizer, tasks: list[data.Task], steps: int, cfg: Config, folder: Path) -> Progress:
    """The loop: batch, learning rate, forward, backward, step, log, save. With --resume it begins where the checkpoint
    is. Raises RunError if loss or gradients are no longer finite."""
    optimizer, every, checkpoint = make_optimizer(model, cfg), Every(cfg.save_every), folder / CHECKPOINT
    now, made_with = Progress(), {"backbone": fingerprint(model), "data set": marks_of_tasks(tasks)}
    if cfg.resume and checkpoint.exists():
        now = load_checkpoint(checkpoint, model, optimizer, made_with)
        print(f"going on after step {now.step:,}")
    parallel.wait()  # until all have read it
    if parallel.first():
        cut_log(folder / "log.jsonl", lambda line: line["step"] <= now.step)
    loss_of = lambda items: batch_loss(model, tokenizer, items, cfg.max_input, cfg.max_output)  # noqa: E731
    weight = lambda items: output_tokens(model, tokenizer, items, cfg.max_output)  # noqa: E731
    batches = data.batches(tasks, cfg.batch_size, cfg.seed, start=steps_before(cfg) + now.step)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    rates, start = [group["lr"] for group in optimizer.param_groups], time.monotonic() - now.seconds
    bar = tqdm(
        range(now.step + 1, steps + 1), f"train {cfg.method}", steps, initial=now.step, unit="step", disable=None
    )
    with open(folder / "log.jsonl" if parallel.first() else os.devnull, "a") as log, Signals() as signals:
        for step in bar:
            batch = next(batches)
            set_rates(optimizer, rates, warmup_then_decay(step - 1, steps, cfg.warmup))
            loss = backward_in_parts(loss_of, parallel.share(batch), cfg.micro_batch, weight, batch)
            loss, stop = parallel.add_up(trainable, loss, signals.caught)
            norm = nn.utils.clip_grad_norm_(trainable, cfg.clip).item()
            refuse_nonfinite(loss, norm, step, batch, tasks)
            optimizer.step()
            optimizer.zero_grad()
            now = now.after(step, loss, time.monotonic() - start)
            if step % cfg.log_every == 0 or step == steps:
                now = now.logged()
                write_line(log, bar, now, norm, optimizer.param_groups[0]["lr"], cfg.log_every)
            if cfg.keep_every and step % cfg.keep_every == 0 and parallel.first():
                save_run(model, tokenizer, cfg, folder, f"-{step}")
            if (every.due(step) or stop or step == steps) and parallel.first():
                sync(log)
                save_checkpoint(checkpoint, model, optimizer, now, made_with)
            if stop:
                print(f"stopped after step {step}")
                parallel.wait()  # until it is saved: launchers kill the others when one ends
                sys.exit(128 + (signals.caught or signal.SIGTERM))
    return now


def set_rates(optimizer: torch.optim.Optimizer, rates: list[float], factor: float):
    """Each parameter group's learning rate: its own, times a factor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor


def save_run(model, tokenizer, cfg: Config, folder: Path, mark: str = ""):
    """Save what was trained: adapters and routers, or for method full a Hugging Face model folder. mark: added to the
    name."""
    if cfg.method == "full":
        save_backbone(model, tokenizer, folder / f"backbone{mark}")
    else:
        save_adapters(model, str(folder / f"adapter{mark}.safetensors"))


def make_config(**flags) -> Config:
    """A Config from explicit flags; what they leave open comes from the run that is gone on from, or from the recipe of
    the data set and method. Raises UserError if the flags contradict that run."""
    start = Config(**flags)
    if start.resume and start.output_dir and (path := Path(start.output_dir) / "config.json").exists():
        cfg = resumed(Config, path, flags)
        cfg.device = pick_device(cfg.device)
        return cfg
    if start.steps and start.epochs:
        raise UserError(f"--steps {start.steps} and --epochs {start.epochs}: give one of them")
    duration = {"epochs": 0} if start.steps else {"steps": 0} if start.epochs else {}  # it replaces the recipe's
    if start.from_run:
        cfg = _config_from_run(start, flags)
    else:
        if start.method == "mu":
            raise UserError("--method mu averages the skills of a finished run: give it by --from-run")
        cfg = Config(**recipe(PRETRAINING, start.dataset, start.method) | duration | flags)
        if cfg.method in ("lora", "ia3"):
            if flags.get("adapter", cfg.method) != cfg.method:
                raise UserError(f"--adapter {cfg.adapter} does not fit --method {cfg.method}: leave --adapter out")
            cfg.adapter = cfg.method
        if cfg.method in GIVEN:
            if "skills" in flags:
                raise UserError(f"--skills does not fit --method {cfg.method}, whose tasks say how many: leave it out")
            cfg.skills = 0
        if cfg.method == "task-moe" and not 2 <= cfg.top_k <= cfg.skills:
            raise UserError(f"--top-k {cfg.top_k} must be at least 2 and at most --skills {cfg.skills}")
        if cfg.adapter == "ia3" and "layers" not in flags:
            cfg.layers = ""  # the recipes' layers are LoRA's
    if ignored := unused(cfg, flags):
        given = f"--method {cfg.method} --adapter {cfg.adapter} --dataset {cfg.dataset}"
        print(f"changes nothing with {given}: {', '.join(ignored)}")
    cfg.device = pick_device(cfg.device)
    if cfg.device == "cpu" and "precision" not in flags:
        cfg.precision = "fp32"  # bfloat16 saves a GPU's memory; on a CPU it only costs time
    if not cfg.output_dir:
        name = f"{cfg.from_run.rstrip('/')}-{cfg.method}-{cfg.steps}-steps"
        cfg.output_dir = name if cfg.from_run else f"runs/{cfg.dataset}-{cfg.method}-{cfg.seed}"
        if cfg.resume:
            return make_config(**flags | {"output_dir": cfg.output_dir})
    return cfg


FIXED_BY_RUN = (
    "dataset", "backbone", "adapter", "layers", "rank", "density", "skills", "heads", "granularity", "top_k", "encoder",
    "random_by", "instructions", "partition",
)  # fmt: skip


def _config_from_run(start: Config, flags: dict) -> Config:
    """The settings of --from-run, changed by the flags that may change."""
    base = read_config(Config, Path(start.from_run) / "config.json")
    if "steps" not in flags:
        raise UserError("--from-run needs --steps: how many to train on")
    for name in FIXED_BY_RUN:
        if name in flags and flags[name] != getattr(base, name):
            given = f"--{name.replace('_', '-')} {flags[name]}"
            raise UserError(f"{given} does not fit --from-run {start.from_run}, whose is {getattr(base, name)}")
    method = flags.get("method", base.method)
    if method != base.method and not (method == "mu" and base.method in ROUTED):
        raise UserError(
            f"--method {method} cannot go on from a run of method {base.method}: mu goes on from a routed method"
        )
    own = {"method": method, "output_dir": start.output_dir, "device": start.device, "epochs": 0}  # device: of here
    return dataclasses.replace(base, **flags | own)


def main(flags: dict) -> dict:
    return train(make_config(**flags))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
