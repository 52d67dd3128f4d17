"""AdapterSoup (Chronopoulou et al. 2023, https://arxiv.org/abs/2302.07027), as in the MHR paper section 4.1.

Pre-training: one adapter per task, nothing shared: a `FixedRouter` whose table is the identity. Adaptation: a new task
trains ONE adapter, which starts as the average of the adapters of the n most similar training tasks. Similarity is the
cosine of two tasks' embeddings: a text encoder's hidden states, averaged over the tokens of an input and over the
task's training inputs.

Shape key, as in poly.py: b examples, l sequence length, t tasks; d is the encoder's width.

Unlike `poly.py`: which adapters a new task gets is looked up, not learned, and only after training.

Deviations:
* One run trains all adapters, with tasks mixed in each batch, not one run per task. The updates are the same but for
  what the optimiser shares: the clipped norm, and moments that decay while a task is not in the batch.
* On T0 a task is a (data set, template), 313 adapters; the paper's 84M parameters are 38 adapters, one per data set.
* A task's embedding is averaged over at most EXAMPLES of its training inputs, evenly spaced.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Task, collate
from inject import read_tensors
from plumbing.backbones import load_backbone
from plumbing.errors import UserError

EXAMPLES = 200


@torch.no_grad()
def embed(encoder, tokenizer, task: Task, max_input: int, batch_size: int = 16) -> Tensor:
    """The embedding (d,) of a task, float32 on the CPU.

    encoder: any Hugging Face model without adapters; of an encoder-decoder model its encoder is used, of a language
    model the part below its head. Inputs are cut to max_input tokens.
    """
    body = encoder.get_encoder() if encoder.config.is_encoder_decoder else encoder.base_model
    examples = task.train[:: max(1, -(-len(task.train) // EXAMPLES))]
    total = torch.zeros(encoder.config.hidden_size)
    for start in range(0, len(examples), batch_size):
        chosen = [examples[k] for k in range(start, min(start + batch_size, len(examples)))]
        batch = collate(chosen, None, tokenizer, True, max_input, 0)  # True: pads on the right
        batch = {name: tensor.to(encoder.device) for name, tensor in batch.items()}
        hidden = body(**batch).last_hidden_state.float()  # (b, l, d)
        mask = batch["attention_mask"][..., None]
        total += ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).sum(0).cpu()
    return total / len(examples)


def embed_tasks(cfg, tasks: list[Task]) -> Tensor:
    """The embeddings (s, d) of the tasks that have examples. cfg: a `train.Config`."""
    encoder, tokenizer = load_encoder(cfg)
    bar = tqdm([task for task in tasks if len(task.train)], desc="embed", unit="task", disable=None)
    return torch.stack([embed(encoder, tokenizer, task, cfg.max_input) for task in bar])


def load_encoder(cfg):
    """The model that embeds tasks, in evaluation mode, and its tokenizer: cfg.encoder, or the run's own backbone."""
    name = cfg.encoder or cfg.backbone
    device, precision = (
        ("cpu", "fp32") if cfg.shard else (cfg.device, cfg.precision)
    )  # a split one has no room beside it
    encoder, tokenizer = load_backbone(name, device, precision, encoder=bool(cfg.encoder))
    return encoder.eval(), tokenizer


def soup_weights(embeddings: Tensor, new: Tensor, n: int) -> Tensor:
    """Weights (1, t) over training tasks: equal for the n (or all) whose embeddings (t, d) are nearest to new (d,)."""
    cosine = torch.cosine_similarity(embeddings, new[None], dim=-1)  # (t,)
    best = cosine.topk(min(n, len(cosine))).indices
    return torch.zeros(1, len(cosine)).index_fill_(1, best, 1 / len(best))


def find_soups(cfg, path: Path, tasks: int, n: int) -> Callable[[Task], Tensor]:
    """A function from a new task to its `soup_weights`, by the embeddings that a run has saved.

    cfg: the run's `train.Config`. path: its embeddings.safetensors. tasks: its number of adapters. Raises UserError if
    the file is missing, damaged, or not of this run; the function raises it for a task without training inputs.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: its training has not finished")
    try:
        embeddings = read_tensors(path)[0].get("embeddings", torch.empty(0))
    except ValueError as error:
        raise UserError(str(error)) from None
    encoder, tokenizer = load_encoder(cfg)
    d = encoder.config.hidden_size
    if (embeddings.shape, embeddings.dtype) != ((tasks, d), torch.float32) or not bool(embeddings.isfinite().all()):
        raise UserError(f"{path} holds no {tasks} finite embeddings of size {d}: not of this run, or of this encoder")

    def weights_of(task: Task) -> Tensor:
        if not len(task.train):
            raise UserError(f"adapter-soup: task {task.name} has no training inputs to find similar tasks by")
        return soup_weights(embeddings, embed(encoder, tokenizer, task, cfg.max_input), n)

    return weights_of
