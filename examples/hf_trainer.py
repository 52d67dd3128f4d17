"""Routed adapters in transformers' Trainer: two learning rates, gradient checkpointing, small checkpoints, resuming.

    python -m examples.hf_trainer

It trains MHR on three string tasks, some 15 seconds on an idle CPU, and saves to runs/hf-trainer. Stop it and start it
again: it resumes after the last checkpoint, and ends as if it had not been stopped. Nothing is downloaded.
"""

import os
import random

from torch.optim import AdamW
from transformers import (
    AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed,
)  # fmt: skip
from transformers.trainer_utils import get_last_checkpoint

from inject import accept_task_ids, adapter_parameters, freeze, inject, load_adapters, routers, save_adapters
from layers import pattern_of
from lora import LoRA
from mhr import MHRLinear, MHRRouter

NAME = "assets/tiny"  # the bundled T5; or yours on the hub, such as "google/flan-t5-base"
TASKS = [lambda word: word[::-1], str.upper, lambda word: "".join(sorted(word))]  # the id of a task is its place


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold the adapters instead of the whole model. Nothing else in it is changed."""

    def _save(self, output_dir=None, state_dict=None):
        os.makedirs(output_dir or self.args.output_dir, exist_ok=True)
        save_adapters(self.model, f"{output_dir or self.args.output_dir}/adapter.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_adapters(self.model, f"{resume_from_checkpoint}/adapter.safetensors")

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def rows(tokenizer, count: int, seed: int) -> list[dict]:
    """Examples of all tasks in turn. `task_ids` is a column like any other, one integer for each example."""
    draw, examples = random.Random(seed), []
    for task in (k % len(TASKS) for k in range(count)):
        word = "".join(draw.choices("abcdefghij", k=4))
        examples.append({**tokenizer(f"do: {word}", text_target=TASKS[task](word)), "task_ids": task})
    return examples


def make_trainer(folder: str, steps: int = 120) -> Trainer:
    """A Trainer of a frozen model with MHR in it, which saves to a folder."""
    set_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(NAME), AutoModelForSeq2SeqLM.from_pretrained(NAME)

    freeze(model)
    layers = pattern_of("lora", model)
    inject(model, lambda _, linear: MHRLinear(linear, LoRA(rank=4), MHRRouter(len(TASKS), skills=4, heads=4)), layers)
    accept_task_ids(model)  # all that a Trainer needs: the model takes task_ids from the batch

    Z = [router.Z for router in routers(model)]
    skills = [p for name, p in adapter_parameters(model).items() if not name.endswith(".Z")]
    optimizer = AdamW([{"params": skills, "lr": 1e-2}, {"params": Z, "lr": 1e-1}], weight_decay=0.0)
    settings = TrainingArguments(
        folder, max_steps=steps, save_steps=max(1, steps // 4), logging_steps=max(1, steps // 4), report_to=[],
        per_device_train_batch_size=18, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,  # else it drops task_ids, which the model's forward does not name
    )  # fmt: skip
    return AdapterTrainer(
        model, settings, DataCollatorForSeq2Seq(tokenizer),
        train_dataset=rows(tokenizer, 2000, seed=0), eval_dataset=rows(tokenizer, 60, seed=1),
        optimizers=(optimizer, None),  # None: the Trainer's own schedule, which scales both rates
    )  # fmt: skip


def main(folder: str = "runs/hf-trainer", steps: int = 120):
    """Train, or resume where a run in the folder was stopped."""
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    trainer = make_trainer(folder, steps)
    trainer.train(resume_from_checkpoint=last)
    print(f"loss on new words: {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
