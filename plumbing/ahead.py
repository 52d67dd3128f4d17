"""Batches that are ready before the loop asks for them, so that the device does not wait for the host."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

DEPTH = 2  # how many batches wait while the model trains on one


def ahead(batches: Iterator[list], parts_of: Callable[[list], list]) -> Iterator[tuple[list, list]]:
    """Pairs (batch, parts_of(batch)) of endless batches: read, tokenised and padded in a thread.

    Each part has `tensors`, a dictionary; they come in page-locked memory if there is a GPU, which can then copy them
    while it computes. An error is raised where its batch is due.
    """

    def one():
        batch = next(batches)
        return batch, [part._replace(tensors=pinned(part.tensors)) for part in parts_of(batch)]

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
