"""Multi-head routing in your own model, from a frozen backbone to a plain model for one task.

    python -m examples.own_model

A T5 learns three string tasks in mixed batches. Of a fourth, reverse AND upper-case, it then trains the routing alone
(MHR-z): the skills are there already. Some 10 seconds on an idle CPU; nothing is downloaded, nothing stays on the disk.
"""

import random
import tempfile

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from inject import (
    adapter_parameters, add_tasks, check, freeze, inject, load_adapters, merge, routers, save_adapters, task_ids,
)  # fmt: skip
from layers import pattern_of
from lora import LoRA
from mhr import MHRLinear, MHRRouter

NAME = "assets/tiny"  # or yours, "google/flan-t5-base"; for a decoder: AutoModelForCausalLM, its labels are its inputs
TASKS = [  # the id of a task is its place
    lambda word: word[::-1],
    lambda word: word.upper(),
    lambda word: "".join(sorted(word)),
    lambda word: word[::-1].upper(),  # the new one
]
random.seed(0)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(NAME)


def adapted_model():
    """A frozen model, and in each layer four skills of rank 4, which each of three tasks mixes in four heads."""
    model = AutoModelForSeq2SeqLM.from_pretrained(NAME)
    freeze(model)
    make = lambda name, linear: MHRLinear(linear, LoRA(rank=4), MHRRouter(tasks=3, skills=4, heads=4))  # noqa: E731
    inject(model, make, pattern_of("lora", model))  # which layers: a named set, or names as ["q_proj", "v_proj"]
    return model


def tokens(texts: list[str]):
    """A batch of texts. Here all have the same length, so there is no padding to leave out of the loss."""
    return tokenizer(texts, return_tensors="pt")


def train(model, optimizer, ids: list[int], steps: int):
    """The usual loop, and one line more. Prints the first loss and the last."""
    model.train()
    for step in range(steps):
        words = ["".join(random.choices("abcdefghij", k=4)) for _ in ids]
        labels = tokens([TASKS[task](word) for task, word in zip(ids, words, strict=True)]).input_ids
        with task_ids(ids):  # the task of each example: each is computed with its own mixture of the skills
            loss = model(**tokens([f"do: {word}" for word in words]), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            print(f"    step {step + 1:3}: loss {loss.item():.3f}")
    model.eval()


# 1. Adapters in a frozen model; and that each of them is used, and sees the examples in their order.
model = adapted_model()
x = torch.arange(3, 24).view(3, 7)  # three examples of seven tokens, whatever they say
check(model, lambda: model(input_ids=x, labels=x).logits)

# 2. Two learning rates (Polytropon section 2.3): who uses which skill is settled before the skills are.
Z = [router.Z for router in routers(model)]
skills = [p for name, p in adapter_parameters(model).items() if not name.endswith(".Z")]
print(f"Three tasks: {sum(p.numel() for p in skills):,} numbers of skills, {sum(z.numel() for z in Z):,} of Z")
train(model, torch.optim.Adam([{"params": skills, "lr": 1e-2}, {"params": Z, "lr": 1e-1}]), [0, 1, 2] * 6, steps=150)

# 3. Save what was trained, and nothing of the backbone; load it into a fresh model.
with tempfile.TemporaryDirectory() as folder:
    save_adapters(model, f"{folder}/adapter.safetensors")
    model = adapted_model()
    load_adapters(model, f"{folder}/adapter.safetensors")

# 4. A new task: a new row in each Z, and nothing else is trained. Z is another parameter now: so is the optimiser.
add_tasks(model, 1)
freeze(model)
Z = [router.Z.requires_grad_() for router in routers(model)]
print(f"A new task: {sum(z[-1].numel() for z in Z):,} numbers of Z, and the skills as they are")
train(model, torch.optim.Adam(Z, lr=1e-1), [3] * 18, steps=40)

# 5. One batch of four different tasks.
with task_ids([0, 1, 2, 3]):
    answers = tokenizer.batch_decode(model.generate(**tokens(["do: head"] * 4)), skip_special_tokens=True)
print("head, under tasks 0 to 3:", *answers)

# 6. A plain Hugging Face model of one task, without adapters or task ids: save it, serve it.
merge(model, 3)
answers = tokenizer.batch_decode(model.generate(**tokens(["do: head"])), skip_special_tokens=True)
print("head, merged for task 3: ", *answers)
