"""Batches that are ready before the loop asks for them, so that the device does not wait for the host."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

DEPTH = 2  # how many batches wait while the model trains on one


class Part(NamedTuple):
    """What one forward and backward pass takes: a batch, or a part of it."""

    tensors: dict[str, Tensor]
    tasks: list[int]  # of its examples
    among: list[int]  # of those of the whole batch
    share: float  # of the batch's loss that is this part's


def parts_of(items: list, micro_batch: int, prepare, weight=len, batch=None, in_step: int = 1) -> list[Part]:
    """A batch, a list of `data.Item`s, in parts of micro_batch examples (0: in one).

    prepare(items): the tensors of a part. weight(items): how many examples or tokens its loss averages over.
    batch: the items of all processes, if `items` is one's share. in_step: how many processes share it and must get the
    same number of parts (--shard); the parts that one lacks are there without weight.
    """
    batch, most = batch or items, max(1, len(items) if in_step == 1 else -(-len(batch or items) // in_step))
    size = micro_batch or most
    ids, undivided = [item.task for item in batch], len(items) == len(batch) <= size
    whole = 1 if undivided else weight(batch)
    parts = [items[k : k + size] for k in range(0, len(items), size)]
    made = [Part(prepare(p), [i.task for i in p], ids, 1 if undivided else weight(p) / whole) for p in parts]
    lacking = 0 if in_step == 1 else -(-most // size) - len(made)
    return made + [Part(prepare(batch[:1]), ids[:1], ids, 0.0) for _ in range(lacking)]


def ahead(batches: Iterator[list], in_parts: Callable[[list], list[Part]]) -> Iterator[tuple[list, list[Part]]]:
    """Pairs (batch, in_parts(batch)) of endless batches: read, tokenised and padded in a thread.

    Tensors come in page-locked memory if there is a GPU, which can then copy them while it computes. An error is raised
    where its batch is due.
    """

    def one():
        batch = next(batches)
        return batch, [part._replace(tensors=pinned(part.tensors)) for part in in_parts(batch)]

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = deque(thread.submit(one) for _ in range(DEPTH))
        while True:
            pair = waiting.popleft().result()
            waiting.append(thread.submit(one))
            yield pair


def pinned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in page-locked memory; unchanged without a GPU."""
    gpu = torch.cuda.is_available()
    return {name: tensor.pin_memory() if gpu else tensor for name, tensor in tensors.items()}


def to_device(tensors: dict[str, Tensor], device) -> dict[str, Tensor]:
    """The tensors on the device. From page-locked memory nobody waits for the copy."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
