"""Several processes, one run: each takes its share of every batch, and gradients are added up over all.

    accelerate launch --num_processes 2 train.py --method mhr --dataset strings     or: torchrun --nproc-per-node 2 ...

Started like this (or in any way that sets RANK, WORLD_SIZE and MASTER_ADDR), `train.py` does what one process would do
with the same batch, to rounding: every process holds the whole model, draws the same routing noise (`inject.task_ids`
is told all tasks of the batch), and weighs its loss by its share. `adapt.py` gives each process every n-th task. Only
the first process talks and writes; the run folder must be on a disk that all see. On CUDA each process takes the GPU of
its LOCAL_RANK. Without these variables all functions here do nothing.

Where the processes' random numbers part ways, each draws routing noise of its own, as in any data-parallel training:
with a backbone that has dropout, after a batch of fewer examples than processes, and under random routing by example.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from config import UserError


def join(device: str):
    """Meet the other processes, if there are any. device: cpu or cuda. Raises UserError for settings of accelerate that
    are not followed here, and without a GPU for this process."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(f"accelerate is set to {name}, but here every process holds the whole model: switch it off")
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise UserError(f"accelerate is set to mixed precision {precision}: set it to no, and use --precision")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device == "cuda":
            local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= gpus:
                raise UserError(f"process {local} of this machine has no GPU: start {gpus} processes, or --device cpu")
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def share(items: list) -> list:
    """This process's part of a list: every n-th item of n processes. May be empty."""
    return items[rank() :: dist.get_world_size()] if dist.is_initialized() else items


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def together(results: dict) -> dict:
    """The dictionaries of all processes as one, in each of them."""
    if not dist.is_initialized():
        return results
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    return {key: value for one in every for key, value in one.items()}


@torch.no_grad()
def add_up(parameters: list[nn.Parameter], loss: float, stop: int) -> tuple[float, bool]:
    """Gradients become their sums over all processes, where they are missing they count as zero. Returns the sum of the
    losses, and whether any process wants to stop, so that all stop after the same step.

    Gradients travel as one vector: a message has a price of its own, however small it is.
    """
    if not dist.is_initialized():
        return loss, bool(stop)
    total = torch.tensor([loss, stop], dtype=torch.float64, device=parameters[0].device)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = [p.grad for p in parameters]
    vector = parameters_to_vector(gradients)
    dist.all_reduce(total)
    dist.all_reduce(vector)
    vector_to_parameters(vector, gradients)
    return total[0].item(), bool(total[1].item())
