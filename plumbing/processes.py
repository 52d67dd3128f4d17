"""Several processes, one run: each takes its share of every batch, and gradients are summed over all.

    torchrun --nproc-per-node 2 train.py --method mhr --dataset strings     on GPUs also: accelerate launch ...

Started like this (or in any way that sets RANK, WORLD_SIZE and MASTER_ADDR), `train.py` computes what one process would
compute on the same batch, up to rounding: every process holds the whole model, draws the same routing noise
(`inject.task_ids` is told all tasks of the batch), and weights its loss by its share. `adapt.py` gives each process
every n-th task. (Under --shard, `large.py`, a process holds a part of the backbone; all adapt to the same task, each
with its share of every batch, and all score the same examples.) Only the first process prints and writes; all must see
the disk of the run folder. On CUDA each process takes the GPU of its LOCAL_RANK. Without these variables every function
here does nothing.

In three cases the random states diverge, and each process draws its own noise, as in any data-parallel training: with a
backbone that has dropout, after a batch with fewer examples than processes, under random routing by example.

Nothing here loads torch before the processes meet.
"""

import atexit
import os
import sys

from plumbing.errors import UserError


def join(device: str):
    """Meet the other processes, if there are any. device: cpu or cuda.

    Raises UserError for settings of accelerate that are not supported here, or if there is no GPU for this process.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(f"accelerate is set to {name}: switch it off, and use --shard to split the backbone")
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise UserError(f"accelerate is set to mixed precision {precision}: set it to no, and use --precision")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not _dist():
        import torch
        import torch.distributed as dist

        if device == "cuda":
            local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= gpus:
                raise UserError(f"process {local} of this machine has no GPU: start {gpus} processes, or --device cpu")
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cpu":  # otherwise threads of gloo may abort a process that has finished
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def _dist():
    """torch.distributed if several processes have met, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def several() -> bool:
    return _dist() is not None


def rank() -> int:
    return dist.get_rank() if (dist := _dist()) else 0


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def count() -> int:
    return dist.get_world_size() if (dist := _dist()) else 1


def share(items: list) -> list:
    """This process's part of a list: every n-th item of n processes. May be empty."""
    return items[dist.get_rank() :: dist.get_world_size()] if (dist := _dist()) else items


def wait():
    """Wait until all processes are here."""
    if dist := _dist():
        dist.barrier()


def together(results: dict) -> dict:
    """Merge the dictionaries of all processes; each process gets the whole."""
    if not (dist := _dist()):
        return results
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    return {key: value for one in every for key, value in one.items()}


def as_first(value: float) -> float:
    """The first process's value, for all."""
    if not (dist := _dist()):
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def sum_gradients(parameters: list, loss, stop: int) -> tuple:
    """Replace each gradient by its sum over all processes; a missing one counts as zero.

    loss: a scalar. Returns the sum of the losses and that of `stop`, two scalars on the device: if any
    process wants to stop, all stop after the same step. Gradients travel as one vector: a message has a fixed cost,
    however small it is.
    """
    import torch
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    total = torch.stack([loss, torch.full_like(loss, stop)])
    if not (dist := _dist()):
        return total.unbind()
    with torch.no_grad():
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in parameters]
        vector = parameters_to_vector(gradients)
        dist.all_reduce(total)
        dist.all_reduce(vector)
        vector_to_parameters(vector, gradients)
    return total.unbind()
