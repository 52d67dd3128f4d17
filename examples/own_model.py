"""Multi-head routing in your own model, from a frozen backbone to a plain model for one task.

    python -m examples.own_model

A T5 learns three string tasks in mixed batches. Of a fourth, reverse AND upper-case, it then trains the routing alone
(MHR-z): the skills are there already. Some 10 seconds on an idle CPU; nothing is downloaded, nothing stays on the disk.
"""

import tempfile
from random import choices

from torch.optim import Adam
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from inject import adapter_parameters, add_tasks, freeze, inject, load_adapters, merge, routers, save_adapters, task_ids
from layers import pattern_of
from lora import LoRA
from mhr import MHRLinear, MHRRouter

NAME = "assets/tiny"  # or yours, "google/flan-t5-base"; for a decoder: AutoModelForCausalLM, its labels are its inputs
# The id of a task is its place. The last one is the new one.
TASKS = [lambda word: word[::-1], str.upper, lambda word: "".join(sorted(word)), lambda word: word[::-1].upper()]
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(NAME)


def adapted_model():
    """A frozen model, and in each layer four skills of rank 4, which each of three tasks mixes in four heads."""
    model = AutoModelForSeq2SeqLM.from_pretrained(NAME)
    freeze(model)
    layers = pattern_of("lora", model)  # a named set; or give names yourself, as ["q_proj", "v_proj"]
    inject(model, lambda name, linear: MHRLinear(linear, LoRA(rank=4), MHRRouter(tasks=3, skills=4, heads=4)), layers)
    return model  # one that docs/own-model.md does not list: call inject.check(model, forward) once


def tokens(texts: list[str]):
    """A batch of texts. Here all have the same length, so there is no padding to leave out of the loss."""
    return tokenizer(texts, return_tensors="pt")


def train(model, optimizer, ids: list[int], steps: int):
    """The usual loop, and one line more."""
    model.train()
    for _ in range(steps):
        words = ["".join(choices("abcdefghij", k=4)) for _ in ids]
        labels = tokens([TASKS[task](word) for task, word in zip(ids, words, strict=True)]).input_ids
        with task_ids(ids):  # the task of each example: each is computed with its own mixture of the skills
            loss = model(**tokens([f"do: {word}" for word in words]), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    print(f"loss after {steps} steps: {loss.item():.3f}")


# 1. Two learning rates (Polytropon section 2.3): who uses which skill is settled before the skills are.
model = adapted_model()
Z = [router.Z for router in routers(model)]
skills = [p for name, p in adapter_parameters(model).items() if not name.endswith(".Z")]
train(model, Adam([{"params": skills, "lr": 1e-2}, {"params": Z, "lr": 1e-1}]), ids=[0, 1, 2] * 6, steps=150)

# 2. Save what was trained, and nothing of the backbone; load it into a fresh model.
with tempfile.TemporaryDirectory() as folder:
    save_adapters(model, f"{folder}/adapter.safetensors")
    model = adapted_model()
    load_adapters(model, f"{folder}/adapter.safetensors")

# 3. A new task: a new row in each Z, and nothing else is trained. Z is another parameter now: so is the optimiser.
add_tasks(model, 1)
freeze(model)
Z = [router.Z.requires_grad_() for router in routers(model)]
train(model, Adam(Z, lr=1e-1), ids=[3] * 18, steps=40)

# 4. One batch of four different tasks.
with task_ids([0, 1, 2, 3]):
    answers = tokenizer.batch_decode(model.generate(**tokens(["do: head"] * 4)), skip_special_tokens=True)
print("head, under tasks 0 to 3:", *answers)

# 5. A plain Hugging Face model of one task, without adapters or task ids: save it, serve it.
merge(model, 3)
answers = tokenizer.batch_decode(model.generate(**tokens(["do: head"])), skip_special_tokens=True)
print("head, merged for task 3: ", *answers)
