"""--compile: forward and backward pass of a training step as one graph, with CUDA graphs on a GPU.

The graph is made once, for any length, and recorded on a GPU once for each size of its tensors. So every batch gets the
same number of rows, and lengths are rounded up to a few sizes. What is added has no label and changes no loss.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from inject import compiled
from plumbing import processes
from plumbing.ahead import Part
from plumbing.errors import UserError


WORTH_COMPILING = 2000  # steps: the bundled model has then saved twice what compiling took


def graph_of(loss_of: Callable, model: nn.Module, cfg) -> Callable:
    """loss_of(tensors), a scalar, compiled; its backward pass too. Call it within `inject.task_ids`.

    Where a step calls it more than once and adds up gradients (--micro-batch), CUDA graphs are left out: they write the
    gradients to the same memory each time.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    recorded = on_gpu and not 0 < cfg.micro_batch < cfg.batch_size
    graph = compiled(loss_of, model, fullgraph=True, mode="reduce-overhead" if recorded else None)

    def call(tensors: dict[str, Tensor]) -> Tensor:
        for tensor in tensors.values():
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        if recorded:
            torch.compiler.cudagraph_mark_step_begin()
        return graph(tensors)

    return call


def refuse_what_cannot_compile(cfg):
    """Raise UserError if what torch.compile calls on this device is missing, or with --checkpointing."""
    if cfg.checkpointing:
        raise UserError("--compile does not go with --checkpointing, whose code in T5 cannot be a graph: leave one out")
    if cfg.device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile: on a GPU torch.compile needs the package triton: install it, or leave the flag out")
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl"))):
        raise UserError("--compile: torch.compile needs a C++ compiler (g++): install one, or leave the flag out")


def same_sizes(in_parts: Callable[[list], list[Part]], cfg, longest: int) -> Callable[[list], list[Part]]:
    """in_parts, whose parts are padded: to the same number of rows, and lengths to `rounded_up`."""
    rows = cfg.micro_batch or -(-cfg.batch_size // processes.count())

    def padded(batch: list) -> list[Part]:
        return [
            part._replace(
                tensors={name: widened(name, x, rows, longest) for name, x in part.tensors.items()},
                tasks=repeated(part.tasks, rows), among=repeated(part.among, cfg.batch_size),
            )
            for part in in_parts(batch)
        ]  # fmt: skip

    return padded


def repeated(ids: list[int], length: int) -> list[int]:
    """The ids, with the last one repeated up to a length."""
    return ids + ids[-1:] * (length - len(ids))


def widened(name: str, x: Tensor, rows: int, longest: int) -> Tensor:
    """A tensor (b, l) of `data.collate`, padded to (rows, `rounded_up` l).

    New rows repeat the last one, without labels: the attention of a row that is masked as a whole may be NaN.
    """
    fill = -100 if name == "labels" else 0
    wide = pad(x, (0, rounded_up(x.shape[1], longest) - x.shape[1]), value=fill)
    more = wide[-1:].expand(rows - len(x), -1)
    return torch.cat([wide, torch.full_like(more, fill) if name == "labels" else more])


def rounded_up(length: int, longest: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ..., or `longest` if that is smaller: from 16 on at most half more."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return max(length, min(size, longest))
