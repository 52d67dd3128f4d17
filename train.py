"""Multi-task pre-training: one model, many tasks, an adapter that each task mixes for itself.

    python train.py --method mhr --heads 8 --dataset strings        the bundled job, minutes on two CPU cores
    python train.py --method mhr --heads 8 --dataset t0             the papers' recipe; needs the hub and a large GPU
    python train.py --method mhr --heads 8 --dataset t0 --data-dir assets/samples/t0 --backbone tiny --steps 100
    python train.py --from-run RUN --method mu --steps 1000         average RUN's skills, train that one adapter on
    python train.py --resume --output-dir RUN                       resume an interrupted run

Writes to the run folder: config.json (every setting), adapter.safetensors (adapters and routers; method full: the
folder backbone/ instead), tasks.json (the names of tasks, and of skills if they have names), log.jsonl (one line a
logged step), provenance.json (what made it), predictions.jsonl (scored examples), result.json; method adapter-soup:
embeddings.safetensors; until the run is done: checkpoint.safetensors.
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import check_ranges, explicit_flags, fit_to_method, flag, in_use, setting, unused
from plumbing.folders import continued_config, read_config, read_json, resumed_config, write_config, write_json
from recipes import METHODS, PRETRAINING, recipe


@dataclass
class Config:
    """Pre-train adapters on many tasks at once.

    examples:
      python train.py --method mhr --heads 8 --dataset strings
      python train.py --method mhr --heads 8 --dataset superni --data-dir DIR
    """

    method: str = flag("mhr", "what is trained (mu: see --from-run)", METHODS, group="what to learn, and on what")
    from_run: str = flag("", "continue a finished run, with its settings; mu averages its skills first", metavar="RUN")
    dataset: str = flag("strings", "benchmark", ("strings", "strings-single", "t0", "superni", "crossfit"))
    data_dir: str = flag("", "folder of the benchmark's files; none: t0 and superni come from the hub", metavar="DIR")
    split: str = flag("0", "strings: seed of the examples; crossfit: its few-shot split", metavar="SPLIT")
    instructions: bool = flag(False, "strings: the input names the operations")
    partition: str = flag("random.json", "crossfit: file that lists the training, dev and test tasks", metavar="FILE")
    backbone: str = flag("tiny", "tiny (bundled), scratch (the same, untrained), or a Hugging Face name or folder")
    adapter: str = flag("lora", "what a skill is", ("lora", "ia3", "sft"), group="adapter and routing")
    layers: str = flag(
        "", "lora, ia3, light, attention, self-attention, all-linear; none: by adapter", metavar="NAME|REGEX"
    )
    rank: int = flag(1, "rank r of LoRA")
    density: float = setting(0.1, "sft: share of a layer's weights that may change")
    skills: int = flag(8, "skills s of a layer (private, expert, adapter-soup: set by the tasks)")
    heads: int = flag(8, "heads h of mhr; must divide every adapted layer")
    routing: str = flag("gumbel", "how training turns logits into weights", ("gumbel", "sigmoid", "straight-through"))
    granularity: str = flag(
        "linear", "which layers share a router: linear (none), layer (attention or feed-forward), block, blocks-N "
        "(N in a row), coder, model", metavar="NAME",
    )  # fmt: skip
    top_k: int = setting(2, "task-moe: skills that a task uses")
    random_by: str = flag("example", "random: each example or each task draws its skills", ("example", "task"))
    encoder: str = setting("", "adapter-soup: name or folder of the model that embeds tasks; none: the backbone")
    steps: int = flag(0, "optimiser steps; 0: by the recipe's epochs", group="optimisation")
    epochs: int = setting(0, "passes over the training examples, if steps is 0")
    batch_size: int = flag(64, "examples per step")
    window: int = setting(8, "batches within which examples are sorted by length (experiments/mixing.py)")
    micro_batch: int = flag(0, "examples per forward pass, to save memory; gradients of a step add up; 0: all")
    optimizer: str = setting("adamw", "adafactor: without relative steps", ("adamw", "adafactor"))
    scale_parameter: bool = setting(False, "adafactor: multiply the rate of a parameter by its RMS, at least 1e-3")
    lr: float = flag(1e-3, "learning rate of adapters (method full: of the backbone)")
    lr_z: float = flag(1e-1, "learning rate of Z (dual speed, Polytropon section 2.3)")
    weight_decay: float = setting(0.0, "of adapters; Z is never decayed")
    warmup: float = setting(0.06, "share of the steps in which learning rates rise; they then fall to 0")
    clip: float = flag(1.0, "largest gradient norm")
    max_input: int = flag(512, "tokens of an input")
    max_output: int = flag(64, "tokens of an output")
    precision: str = flag(
        "fp32", "of the backbone: bf16 (default on a GPU only), fp32, or nf4 (4 bits)", ("fp32", "bf16", "nf4")
    )
    shard: bool = flag(False, "under torchrun: split the backbone over the processes")
    checkpointing: bool = flag(False, "gradient checkpointing: less memory, more time")
    seed: int = flag(0, "seed of initial values, order and noise", group="the run")
    eval_examples: int = flag(0, "test examples per training task to score at the end; 0: none")
    log_every: int = flag(50, "steps between lines of log.jsonl")
    eval_every: int = flag(0, "steps between losses on unseen examples of the training tasks; 0: never")
    output_dir: str = flag("", "run folder; none: runs/DATASET-METHOD-SEED", metavar="DIR")
    keep_every: int = flag(0, "also keep the adapters of every N-th step, as adapter-N.safetensors; 0: only the last")
    save_every: str = flag("10m", "checkpoint interval: 200 is 200 steps, 10m is 10 minutes", metavar="STEPS|MINUTESm")
    resume: bool = flag(False, "resume the run in --output-dir, or start it if it is not there")
    overwrite: bool = flag(False, "replace the run in --output-dir")
    dry_run: bool = flag(False, "stop after a few steps: two examples in full, what a step takes; nothing is written")
    tensorboard: bool = flag(False, "also write the log for TensorBoard, to the run folder")
    compile: bool = flag(False, "compile the step: half a minute or more at the start, then faster (results/bench.md)")
    deterministic: bool = flag(False, "on CUDA: bit-identical runs, slower (on a CPU they always are)")
    device: str = flag("auto", "auto: cuda if there is one, else cpu", ("auto", "cpu", "cuda", "mps"))


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, PRETRAINING)

import dataclasses
import inspect
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import benchmarks
import data
from baselines.adapter_soup import embed_tasks
from inject import fingerprint, routers, task_ids, write_tensors
from methods import count_parameters, names_of_skills, probe, save_run, starting_point, use_checkpointing
from plumbing import processes
from plumbing.ahead import Part, ahead, parts_of, to_device
from plumbing.backbones import pick_device, warn_if_too_large
from plumbing.checkpoint import marks_of_tasks, run_tensors
from plumbing.folders import read_lines, refuse_other_tasks, remove_checkpoint, remove_run
from plumbing.graph import WORTH_COMPILING, graph_of, refuse_what_cannot_compile, same_sizes
from plumbing.large import precision_here, refuse_what_does_not_fit
from plumbing.machine import fast_in_bf16, peak_memory, record_start, report_dry_run
from plumbing.run import Run, refuse_nonfinite, run_in_folder
from plumbing.tables import counted, in_words
from scoring import score_training_tasks, tasks_to_score

# --- Optimisation -----------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, cfg) -> torch.optim.Optimizer:
    """cfg.optimizer over what is trainable, in two groups: adapters at cfg.lr, Z at cfg.lr_z without weight decay.

    The dual-speed learning rate of Polytropon section 2.3: a fast Z decides who uses which skill before the skills
    have settled. Decaying the logits Z would pull every task towards using all skills. The task embeddings of
    HyperFormer are a Z too; its two linear layers, which all tasks share, go with the adapters.
    """
    z = [router.Z for router in routers(model) if router.Z.requires_grad]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in z)]
    groups = [
        dict(params=rest, lr=cfg.lr, weight_decay=cfg.weight_decay),
        dict(params=z, lr=cfg.lr_z, weight_decay=0.0),
    ]
    groups = [group for group in groups if group["params"]]
    if cfg.optimizer == "adafactor":  # without relative steps; recipes.py says where rates are scaled by RMS
        from plumbing.adafactor import StackedAdafactor  # here: transformers takes seconds to import

        return StackedAdafactor(groups, cfg.scale_parameter)
    return torch.optim.AdamW(groups, fused=True)


def warmup_then_decay(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear up over the first warmup * steps steps, then linear down to 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def set_rates(optimizer: torch.optim.Optimizer, rates: list[float], factor: float):
    """Each parameter group's learning rate: its own, times a factor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor


def batch_loss(model, tokenizer, items: list[data.Item], max_input: int, max_output: int) -> torch.Tensor:
    """`token_loss` of a batch of texts, which are cut to max_input and max_output tokens."""
    batch = tensors_of(model, tokenizer, items, max_input, max_output)
    return token_loss(model, to_device(batch, model.device))


def tensors_of(
    model, tokenizer, items: list[data.Item], max_input: int, max_output: int, whole: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of `data.collate` for a batch, on the CPU; unless it is to be whole, `only_labelled`."""
    examples, outputs = [item.example for item in items], [item.output for item in items]
    batch = data.collate(examples, outputs, tokenizer, model.config.is_encoder_decoder, max_input, max_output)
    return batch if whole else only_labelled(model, batch)


def only_labelled(model, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch, whose labels (b, l) for a decoder-only model become those of the last n positions, (b, n): no row has
    any before them that can be learnt."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return batch
    first = (batch["labels"] != -100).any(0).int().argmax().clamp(min=1)  # nothing predicts a row's first token
    return batch | {"labels": batch["labels"][:, first:]}


def token_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy averaged over the output tokens of a batch: a scalar. batch: of `tensors_of`.

    Not the model's own loss: T5 computes it in bfloat16 from bfloat16 logits, and a decoder-only model computes logits
    (b, l, vocabulary) for its inputs too, the largest tensor by far.
    """
    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    inputs["use_cache"] = False  # the keys and values that generation keeps would be copies
    if model.config.is_encoder_decoder:
        logits = model(**inputs, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)).logits
    elif (n := labels.shape[1]) < (length := inputs["input_ids"].shape[1]):
        before = torch.arange(length - n, length, device=labels.device) - 1  # positions: their number alone is slower
        logits = model(**inputs, logits_to_keep=before).logits
    else:  # the token at a position is predicted at the one before
        logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten())


@torch.no_grad()
def mean_loss(model, tokenizer, items: list[data.Item], lengths, batch_size: int) -> float:
    """The loss in evaluation mode (no noise), averaged over batches by their examples. lengths: (max_input,
    max_output)."""
    was_training, total = model.training, 0.0
    model.eval()
    for batch in data.by_length(items, batch_size):
        with task_ids([item.task for item in batch]):
            total += batch_loss(model, tokenizer, batch, *lengths).item() * len(batch)
    model.train(was_training)
    return total / len(items)


def output_tokens(model, tokenizer, items: list[data.Item], max_output: int) -> int:
    """How many tokens `token_loss` averages over."""
    outputs = [item.output for item in items]
    return sum(map(len, data.encode_outputs(outputs, tokenizer, model.config.is_encoder_decoder, max_output)))


def backward_in_parts(loss_of, parts: list[Part], device) -> torch.Tensor:
    """Forward and backward over a batch in parts (`parts_of`); returns its mean loss, a scalar.

    loss_of(tensors): a scalar, the mean over a part. All parts draw the same routing noise, so a batch in parts has the
    loss and gradients of the whole (except for dropout in the backbone, and random routing by example, which repeat
    their draws in each part).
    """
    total = torch.zeros((), device=device)
    gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    for part in parts:
        with torch.random.fork_rng(gpu, enabled=part is not parts[-1]), task_ids(part.tasks, among=part.among):
            loss = loss_of(to_device(part.tensors, device)) * part.share
            loss.backward()
        total = total + loss.detach()
    return total


# --- The loop ---------------------------------------------------------------------------------------------------------


def loss_and_parts(model, tokenizer, cfg: Config):
    """What `backward_in_parts` calls, loss_of(tensors), and what makes parts of a batch ahead of it; both for a graph
    with --compile."""
    prepare = partial(tensors_of, model, tokenizer, max_input=cfg.max_input, max_output=cfg.max_output)
    prepare = partial(prepare, whole=cfg.compile)  # a graph is recorded for each size: fewer sizes
    tokens = partial(output_tokens, model, tokenizer, max_output=cfg.max_output)
    loss_of = partial(token_loss, model)

    in_step = processes.count() if cfg.shard else 1

    def in_parts(batch: list[data.Item]) -> list[Part]:
        return parts_of(processes.share(batch), cfg.micro_batch, prepare, tokens, batch, in_step)

    if not cfg.compile:
        return loss_of, in_parts
    longest = cfg.max_input + (0 if model.config.is_encoder_decoder else cfg.max_output)
    return graph_of(loss_of, model, cfg), same_sizes(in_parts, cfg, longest)


def look_at(model, tokenizer, tasks: list[data.Task], cfg: Config):
    """What gives the validation loss: `mean_loss` of 256 test examples of training tasks, the same at every look."""
    if not cfg.eval_every:
        return None
    items = data.drawn([dataclasses.replace(task, train=task.test) for task in tasks], 256)
    return lambda: mean_loss(model, tokenizer, items, (cfg.max_input, cfg.max_output), cfg.batch_size)


def train_steps(model, tokenizer, tasks: list[data.Task], steps: int, cfg: Config, folder: Path) -> Run:
    """The training loop. Returns the finished run. Raises RunError if loss or gradients are not finite.

    `plumbing/run.py` does the rest: it resumes, sums over processes, logs, saves, and stops on a signal.
    """
    optimizer, (loss_of, in_parts) = make_optimizer(model, cfg), loss_and_parts(model, tokenizer, cfg)
    rates = [group["lr"] for group in optimizer.param_groups]
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    made_with = {"backbone": fingerprint(model), "data set": marks_of_tasks(tasks)}
    options = dict(save_every=cfg.save_every, log_every=cfg.log_every, resume=cfg.resume, made_with=made_with)
    options |= dict(look=look_at(model, tokenizer, tasks, cfg), look_every=cfg.eval_every, board=cfg.tensorboard)
    with Run(folder, run_tensors(model), optimizer, **options) as run:
        batches = data.batches(tasks, cfg.batch_size, cfg.seed, batches_before(cfg) + run.now.step, cfg.window)
        batches = ahead(batches, in_parts)
        for step in run.steps(steps, f"train {cfg.method}"):
            batch, parts = next(batches)  # 1 take a batch of many tasks
            set_rates(optimizer, rates, warmup_then_decay(step - 1, steps, cfg.warmup))  # 2 set the two learning rates
            loss = backward_in_parts(loss_of, parts, model.device)  # 3 forward, backward
            loss = run.sum_over_processes(loss)
            norm = nn.utils.clip_grad_norm_(trainable, cfg.clip)  # 4 clip
            loss, norm = run.values(loss, norm)
            refuse_nonfinite(loss, norm, step, batch, tasks)
            optimizer.step()  # 5 step
            optimizer.zero_grad()
            if cfg.keep_every and step % cfg.keep_every == 0:
                save_run(model, tokenizer, folder, f"-{step}")
            run.record(loss, norm)  # 6 record: log, save a checkpoint when due, stop if a signal asked for it
    return run


def train(cfg: Config) -> dict:
    """Pre-train as cfg says and write the run folder; returns the content of result.json."""
    advice = "a smaller --micro-batch (the same batch in parts), --checkpointing, --precision nf4 or --shard"
    usual = dataclasses.asdict(Config()) | recipe(PRETRAINING, cfg.dataset, cfg.method, cfg.adapter)
    return run_in_folder(train_in, cfg, "train.py", advice, in_use(cfg, usual))


def train_in(folder: Path, cfg: Config) -> dict:
    """`train` in a folder that this process has locked."""
    warn_if_too_large(cfg)
    if cfg.compile:
        refuse_what_cannot_compile(cfg)
    refuse_what_does_not_fit(cfg)  # now, not after the data are read
    if cfg.shard and not processes.several():
        raise UserError(
            "--shard splits the backbone over processes: torchrun --nproc-per-node 2 train.py ..., or --no-shard"
        )
    tasks = benchmarks.load_for(cfg, cfg.split, ("train",)).train
    steps, scored = steps_to_take(cfg, tasks), tasks_to_score(cfg, tasks)
    if cfg.eval_every and not any(len(task.test) for task in tasks):
        raise UserError(f"--eval-every {cfg.eval_every}: no training task has unseen examples")
    torch.manual_seed(cfg.seed)
    skills = names_of_skills(cfg, tasks)
    cfg.skills = len(skills) or cfg.skills
    if not cfg.overwrite and (folder / "tasks.json").exists() and (folder / "config.json").exists():  # to resume
        refuse_other_tasks(folder, cfg.method, tasks)
    model, tokenizer = starting_point(cfg, tasks, skills)
    if cfg.checkpointing:
        use_checkpointing(model)
    probe(model, tokenizer, cfg)
    embeddings = embed_tasks(cfg, tasks) if cfg.method == "adapter-soup" else None  # early, to refuse a wrong encoder
    if cfg.overwrite and processes.first():
        remove_run(folder)
    if processes.first() and not (folder / "config.json").exists():  # config.json comes last: it marks a run
        write_json(folder / "tasks.json", {"tasks": [task.name for task in tasks], "skills": skills})
        write_config(folder, cfg)
    if processes.first():
        record_start(folder)
    lengths = (cfg.max_input, cfg.max_output)
    print(data.preview(tasks, tokenizer, model.config.is_encoder_decoder, *lengths, whole=cfg.dry_run))
    counts, sizes = count_parameters(model), [len(task.train) for task in tasks if len(task.train)]
    print(f"{'training':21}{counted(len(sizes), 'task')}, {sum(sizes):,} examples, {counted(steps, 'step')}")
    print(f"{'trainable':21}{in_words(counts)}; {counted(len(routers(model)), 'router')}")
    if cfg.dry_run:
        few = dataclasses.replace(cfg, log_every=1, keep_every=0, eval_every=0, tensorboard=False)
        train_steps(model.train(), tokenizer, tasks, 3, few, folder)
        seconds = [line["seconds"] for line in read_lines(folder / "log.jsonl")] if processes.first() else [0.0]
        step = (seconds[-1] - seconds[0]) / 2
        return report_dry_run(step, steps, max(0.0, seconds[0] - step) if cfg.compile else 0.0)
    if steps >= WORTH_COMPILING and not (cfg.compile or cfg.shard or cfg.precision == "nf4"):
        print(f"{'faster':21}--compile saves a quarter of a step, after half a minute (docs/gpu.md)")
    done = train_steps(model.train(), tokenizer, tasks, steps, cfg, folder).now
    save_run(model, tokenizer, folder)
    if processes.first() and embeddings is not None:
        write_tensors({"embeddings": embeddings}, folder / "embeddings.safetensors")
    result = {"steps": steps, "loss": done.loss, "seconds": round(done.seconds, 1), "parameters": counts}
    result["examples_per_second"] = round(steps * cfg.batch_size / done.seconds, 1)
    result |= score_training_tasks(model, tokenizer, tasks, scored, cfg, folder)
    result["peak_memory_gb"] = peak_memory()
    if processes.first():
        write_json(folder / "result.json", result)
        remove_checkpoint(folder)
    processes.wait()
    print(f"{done.seconds:.0f} s of training, final loss {done.loss:.4f}, saved in {folder}")
    return result


def steps_to_take(cfg: Config, tasks: list[data.Task]) -> int:
    """--steps, or what the recipe's epochs make. Raises UserError if there is nothing to train."""
    if (examples := sum(len(task.train) for task in tasks)) == 0:
        raise UserError(f"--data-dir {cfg.data_dir}: the training tasks have no examples")
    if not (cfg.steps or cfg.epochs):
        raise UserError("nothing to train: give --steps above 0")
    return cfg.steps or cfg.epochs * -(-examples // cfg.batch_size)


def batches_before(cfg: Config) -> int:
    """Batches that --from-run has already consumed, if the data order is unchanged; else 0."""
    if not cfg.from_run:
        return 0
    base = read_config(Config, Path(cfg.from_run) / "config.json")
    same = (base.seed, base.batch_size, base.window, base.from_run) == (cfg.seed, cfg.batch_size, cfg.window, "")
    return read_json(Path(cfg.from_run) / "result.json", steps=int)["steps"] if same else 0


# --- Settings ---------------------------------------------------------------------------------------------------------


def make_config(**flags) -> Config:
    """A Config from explicit flags; the rest comes from --from-run, or from the recipe of benchmark and method.

    Raises UserError if the flags contradict that run, or the run that --resume finds.
    """
    start = Config(**flags)
    if start.steps and start.epochs:
        raise UserError(f"steps {start.steps} and epochs {start.epochs}: give one of them")
    duration = {"epochs": 0} if start.steps else {"steps": 0} if start.epochs else {}  # it replaces the recipe's
    if cfg := resumed_config(Config, flags):
        return dataclasses.replace(cfg, device=pick_device(cfg.device))
    if start.from_run:
        cfg = continued_config(Config, flags)  # plumbing/folders.py lists what must stay as it was
    else:
        cfg = Config(**recipe(PRETRAINING, start.dataset, start.method, start.adapter) | duration | flags)
        fit_to_method(cfg, flags)
    if ignored := unused(cfg, flags):
        given = f"--method {cfg.method} --adapter {cfg.adapter} --dataset {cfg.dataset}"
        print(f"ignored with {given}: {', '.join(ignored)}")
    cfg.device = pick_device(cfg.device)
    if cfg.device != "cuda" and "precision" not in flags:
        cfg.precision = "fp32"  # bfloat16 saves a GPU's memory; most CPUs are slower with it
    if not cfg.output_dir:
        name = f"{cfg.from_run.rstrip('/')}-{cfg.method}-{cfg.steps}-steps"
        cfg.output_dir = name if cfg.from_run else f"runs/{cfg.dataset}-{cfg.method}-{cfg.seed}"
        if cfg.resume:
            return make_config(**flags | {"output_dir": cfg.output_dir})
    return cfg


def run_config(folder: str, data_dir: str = "", device: str = "auto") -> Config:
    """The settings of a run of train.py, as they are on this machine. Raises UserError for any other folder."""
    base = read_config(Config, Path(folder) / "config.json")
    check_ranges(base)
    device = pick_device(device)
    precision = precision_here(base.precision)
    precision = "fp32" if precision == "bf16" and not fast_in_bf16(device) else precision
    return dataclasses.replace(base, data_dir=data_dir or base.data_dir, device=device, precision=precision)


def main(flags: dict) -> dict:
    return train(make_config(**flags))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
