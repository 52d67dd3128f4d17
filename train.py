"""Multi-task pre-training: one model, many tasks, an adapter that each task mixes for itself.

    python train.py --method mhr --heads 8 --dataset strings        the bundled job, minutes on two CPU cores
    python train.py --method mhr --heads 8 --dataset crossfit --data-dir DIR --backbone FOLDER

Writes to the run folder: config.json (every setting), adapter.safetensors (adapters and routers; method full: the
folder backbone/ instead), log.jsonl (one line a logged step) and result.json.
"""

from dataclasses import dataclass

from config import (
    PRETRAINING, UserError, check_ranges, describe, exit_on_user_error, explicit_flags, flag, new_run_folder, recipe,
    write_json,
)  # fmt: skip

METHODS = ("full", "lora", "ia3", "shared", "poly", "mhr")


@dataclass
class Config:
    """Pre-train adapters on many tasks at once."""

    # What to learn, and on what
    method: str = flag("mhr", "what is trained (shared: one adapter for all tasks, as lora and ia3)", METHODS)
    dataset: str = flag("strings", "benchmark", ("strings", "strings-single", "crossfit"))
    data_dir: str = flag("", "folder of the benchmark's official files (crossfit)")
    split: str = flag("0", "strings: number that the examples are drawn from")
    instructions: bool = flag(False, "strings: the input names the operations")
    backbone: str = flag("tiny", "tiny (bundled), scratch (the same, untrained), or a Hugging Face name or folder")
    # Adapter and routing
    adapter: str = flag("lora", "what a skill is", ("lora", "ia3"))
    layers: str = flag("", "regular expression of the layers to adapt; none: by model type")
    rank: int = flag(1, "rank r of LoRA")
    skills: int = flag(8, "skills s in a layer's inventory")
    heads: int = flag(8, "heads h of mhr; must divide every adapted layer")
    routing: str = flag("gumbel", "how training turns logits into weights", ("gumbel", "sigmoid", "straight-through"))
    # Optimisation
    steps: int = flag(0, "optimiser steps; 0: by --epochs")
    epochs: int = flag(0, "passes over the training examples, if --steps is 0")
    batch_size: int = flag(64, "examples per step")
    lr: float = flag(1e-3, "learning rate of adapters (or of the backbone, method full)")
    lr_z: float = flag(1e-1, "learning rate of Z (dual-speed, Polytropon section 2.3)")
    weight_decay: float = flag(0.0, "of adapters; Z is never decayed")
    warmup: float = flag(0.06, "share of steps with rising learning rate; it then falls to 0")
    clip: float = flag(1.0, "largest gradient norm")
    max_input: int = flag(512, "tokens of an input")
    max_output: int = flag(64, "tokens of an output")
    checkpointing: bool = flag(False, "gradient checkpointing: less memory, more time")
    # The run
    seed: int = flag(0, "seed of initial values, order and noise")
    eval_examples: int = flag(0, "test examples per training task to score at the end; 0: none")
    log_every: int = flag(50, "steps between lines of log.jsonl")
    output_dir: str = flag("", "run folder; none: runs/DATASET-METHOD-SEED")
    device: str = flag("cpu", "cpu or cuda", ("cpu", "cuda"))


if __name__ == "__main__":  # Read the flags before the slow imports, so that --help and mistakes answer at once
    FLAGS = explicit_flags(Config, PRETRAINING)

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

import data
from evaluate import evaluate_tasks, mean
from ia3 import IA3, IA3Linear
from inject import (
    IA3_INPUT_SIDE, default_layers, freeze, inject, routers, save_adapters, task_ids,
)  # fmt: skip
from lora import LoRA, LoRALinear
from mhr import MHRLinear, MHRRouter
from poly import PolyLinear, PolyRouter

# --- The model --------------------------------------------------------------------------------------------------------

TINY = Path(__file__).parent / "assets" / "tiny"
SINGLE = {"lora": LoRALinear, "ia3": IA3Linear}  # a layer with one adapter, by --adapter


def load_backbone(name: str, device: str):
    """A model and its tokenizer: "tiny", "scratch", a hub name, or a folder with a model or one GGUF file.

    Raises UserError if there is none, or CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here, use --device cpu")
    if name == "scratch":
        return tiny_from_scratch().to(device), ByT5Tokenizer()
    source = str(TINY) if name == "tiny" else name
    gguf = sorted(Path(source).glob("*.gguf")) if Path(source).is_dir() else []
    options = {"gguf_file": gguf[0].name} if gguf and not (Path(source) / "config.json").exists() else {}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(source, dtype=torch.float32, **options)
        return model.to(device), AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"--backbone {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def tiny_from_scratch() -> T5ForConditionalGeneration:
    """The tiny byte-level T5 v1.1 with random weights: 3 + 3 layers, d_model 128, d_ff 256, 4 heads of 32."""
    config = T5Config(
        vocab_size=384, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
        relative_attention_max_distance=32, dropout_rate=0.0, tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)  # whatever the run's seed: an adapter trained on it must meet the same one when loaded
        return T5ForConditionalGeneration(config)


def build_model(cfg: Config, tasks: int):
    """Load the backbone and put the method's adapters in: (model, tokenizer). tasks: rows of Z.

    Raises UserError if the settings do not fit the backbone; the sentence names the layer.
    """
    model, tokenizer = load_backbone(cfg.backbone, cfg.device)
    if cfg.method == "full":
        return model, tokenizer
    freeze(model)

    def make_layer(name: str, linear: nn.Linear) -> nn.Module:
        side = "in" if name.endswith(IA3_INPUT_SIDE) else "out"
        spec = IA3(side) if cfg.adapter == "ia3" else LoRA(cfg.rank)
        if cfg.method == "poly":  # one router per layer: the papers' finest granularity
            return PolyLinear(linear, spec, PolyRouter(tasks, cfg.skills, cfg.routing))
        if cfg.method == "mhr":
            return MHRLinear(linear, spec, MHRRouter(tasks, cfg.skills, cfg.heads, cfg.routing))
        return SINGLE[cfg.adapter](linear, spec)

    try:
        inject(model, make_layer, cfg.layers or default_layers(model.config.model_type, cfg.adapter))
    except ValueError as error:
        layers = f" --layers {cfg.layers}" if cfg.layers else ""
        raise UserError(f"--method {cfg.method} --backbone {cfg.backbone}{layers}: {error}") from None
    return model.to(cfg.device), tokenizer


# --- Optimisation -----------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, lr: float, lr_z: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trainable, in two groups: adapters at lr, Z at lr_z without weight decay.

    The dual-speed learning rate of Polytropon section 2.3: a fast Z decides who uses which skill before the skills
    have settled. Decaying the logits Z would pull every task towards using all skills.
    """
    z = [p for router in routers(model) for p in router.parameters() if p.requires_grad]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in z)]
    groups = [dict(params=rest, lr=lr, weight_decay=weight_decay), dict(params=z, lr=lr_z, weight_decay=0.0)]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def warmup_then_decay(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: up in a line over the first warmup * steps steps, then down in a line to 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def batch_loss(model, tokenizer, items: list[data.Item], max_input: int, max_output: int) -> torch.Tensor:
    """Cross-entropy averaged over the output tokens of a batch: a scalar. Texts are cut to max_input, max_output."""
    inputs, outputs = [item.input for item in items], [item.output for item in items]
    batch = data.collate(inputs, outputs, tokenizer, model.config.is_encoder_decoder, max_input, max_output)
    return model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable parameters: those of routers (Z) and all others (skills, adapters, or the whole backbone)."""
    z = sum(p.numel() for router in routers(model) for p in router.parameters() if p.requires_grad)
    return {"adapters": sum(p.numel() for p in model.parameters() if p.requires_grad) - z, "routing": z}


# --- The loop ---------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> dict:
    """Pre-train as cfg says and write the run folder; returns what result.json holds."""
    check_ranges(cfg)
    benchmark = data.load(cfg.dataset, cfg.data_dir, cfg.split, cfg.instructions)
    examples = sum(len(task.train) for task in benchmark.train)
    steps = cfg.steps or cfg.epochs * -(-examples // cfg.batch_size)
    if examples == 0:
        raise UserError(f"--data-dir {cfg.data_dir}: the training tasks have no examples")
    if steps == 0:
        raise UserError("nothing to train: give --steps or --epochs above 0")
    if cfg.eval_examples and (empty := [task.name for task in benchmark.train if not task.test]):
        raise UserError(f"--eval-examples {cfg.eval_examples}: task {empty[0]} has no test examples")
    torch.manual_seed(cfg.seed)
    model, tokenizer = build_model(cfg, tasks=len(benchmark.train))
    if cfg.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    folder = new_run_folder(cfg.output_dir)
    write_json(folder / "config.json", dataclasses.asdict(cfg))
    print(describe(cfg))
    counts = count_parameters(model)
    print(f"{len(benchmark.train)} training tasks, {examples:,} examples, {steps:,} steps; trainable:", end=" ")
    print(*(f"{name} {count:,}" for name, count in counts.items()))

    start = time.monotonic()
    model.train()
    loss = train_steps(model, tokenizer, data.batches(benchmark.train, cfg.batch_size, cfg.seed), steps, cfg, folder)
    seconds = time.monotonic() - start
    save_run(model, tokenizer, cfg, folder)
    result = {"steps": steps, "loss": loss, "seconds": round(seconds, 1), "parameters": counts}
    if cfg.eval_examples:
        ids = list(range(len(benchmark.train)))
        scores = evaluate_tasks(
            model, tokenizer, benchmark.train, ids, (cfg.max_input, cfg.max_output), cfg.eval_examples
        )
        result |= {"mean": mean(scores), "tasks": scores}
        print(f"training tasks, {cfg.eval_examples} unseen examples each: mean score {result['mean']:.1f}")
    write_json(folder / "result.json", result)
    print(f"{seconds:.0f} s of training, final loss {loss:.4f}, saved in {folder}")
    return result


def train_steps(model, tokenizer, batches: Iterator[list[data.Item]], steps: int, cfg: Config, folder: Path) -> float:
    """The loop: batch, learning rate, forward, backward, step, log. Returns the mean loss of the last logged steps."""
    optimizer = make_optimizer(model, cfg.lr, cfg.lr_z, cfg.weight_decay)
    rate = lambda step: warmup_then_decay(step, steps, cfg.warmup)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    recent, seconds, begin = [], 0.0, time.monotonic()
    bar = tqdm(range(1, steps + 1), desc=f"train {cfg.method}", unit="step", disable=None)
    with open(folder / "log.jsonl", "a") as log:
        for step in bar:
            items = next(batches)
            with task_ids([item.task for item in items]):
                loss = batch_loss(model, tokenizer, items, cfg.max_input, cfg.max_output)
                loss.backward()
            norm = nn.utils.clip_grad_norm_(trainable, cfg.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            if step % cfg.log_every == 0 or step == steps:
                seconds, mean_loss = time.monotonic() - begin, sum(recent) / len(recent)
                lr = scheduler.get_last_lr()[0]
                line = {"step": step, "loss": mean_loss, "norm": norm.item(), "lr": lr, "seconds": round(seconds, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{mean_loss:.3f}")
                if bar.disable:  # not a terminal: plain lines, ten or so in all
                    if step % max(cfg.log_every, steps // 10 // cfg.log_every * cfg.log_every) == 0 or step == steps:
                        print(f"step {step}/{steps}  loss {mean_loss:.4f}  {seconds:.0f} s", flush=True)
                recent = []
    return mean_loss


def save_run(model, tokenizer, cfg: Config, folder: Path):
    """Save what was trained: adapters and routers, or for method full a Hugging Face model folder."""
    if cfg.method == "full":
        model.save_pretrained(folder / "backbone")
        tokenizer.save_pretrained(folder / "backbone")
    else:
        save_adapters(model, str(folder / "adapter.safetensors"))


def make_config(**flags) -> Config:
    """A Config from explicit flags: what they leave open comes from the recipe of their data set and method."""
    start = Config(**flags)
    cfg = Config(**recipe(PRETRAINING, start.dataset, start.method) | flags)
    if cfg.method in ("lora", "ia3"):
        cfg.adapter = cfg.method
    if not cfg.output_dir:
        cfg.output_dir = f"runs/{cfg.dataset}-{cfg.method}-{cfg.seed}"
    return cfg


def main(flags: dict) -> dict:
    return train(make_config(**flags))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
