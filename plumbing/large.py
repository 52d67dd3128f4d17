"""Backbones that are larger than a GPU: 4-bit weights (--precision nf4), or blocks split over processes (--shard).

Neither is home-made: bitsandbytes' layers, loaded by transformers, and torch's `fully_shard`. What is trained, adapters
and routers, stays float32 and whole.

nf4: linear layers inside blocks are held in 4 bits, as in QLoRA (https://arxiv.org/abs/2305.14314, section 3), and
multiplied in bfloat16 (on a CPU in float32). T5's `wo` stays bfloat16: its code reads that weight's type.

--shard: each process holds an equal part of every block, and the whole of what is outside blocks: embeddings, the head,
the last norm. A block is put together just before it is computed and taken apart after it, forward and backward. So all
processes must compute in step: each gets as many parts of a batch as the others (`ahead.parts_of`), and all score the
same examples.

Either way the model remembers the fingerprint of the checkpoint that it was loaded from: an adapter that was trained on
a 4-bit or a split backbone fits the same backbone held whole.
"""

import importlib.util
import warnings

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from inject import adapter_parameters, fingerprint
from plumbing import processes
from plumbing.errors import UserError


def refuse_what_does_not_fit(cfg):
    """Raise UserError for settings (a `train.Config`) that exclude --precision nf4, --shard or --device mps."""
    four_bits = cfg.precision == "nf4"
    on_mps = {"--precision nf4": four_bits, "--shard": cfg.shard, "--compile": cfg.compile}
    on_mps["--micro-batch, whose parts draw the same noise,"] = cfg.micro_batch  # torch.mps cannot fork its generator
    if cfg.device == "mps" and (flags := [flag for flag, given in on_mps.items() if given]):
        raise UserError(f"{flags[0]} does not work with --device mps: leave one of them out")
    if four_bits and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--precision nf4 needs another package: pip install bitsandbytes, or use --precision bf16")
    if four_bits and cfg.shard:
        raise UserError("--shard does not split 4-bit weights: leave it out, or use --precision bf16")
    flag = "--precision nf4" if four_bits else "--shard"
    if not (four_bits or cfg.shard):
        return
    if cfg.method == "full":
        raise UserError(f"{flag} is for a frozen backbone, which --method full trains: leave one of them out")
    if cfg.compile:
        raise UserError(f"{flag} does not go with --compile: leave one of them out")
    if four_bits and cfg.adapter == "sft":
        raise UserError("--adapter sft changes single weights, which share their scale in 4 bits: use --precision bf16")
    if four_bits and cfg.backbone == "scratch":
        raise UserError("--backbone scratch has no files to load in 4 bits: leave --precision nf4 out")


def precision_here(precision: str) -> str:
    """The precision of a run that is opened here: bf16 where nf4 needs a package that is missing."""
    if precision == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        print("bitsandbytes is not installed: the backbone, in 4 bits when it was trained, is loaded whole")
        return "bf16"
    return precision


# --- 4 bits -----------------------------------------------------------------------------------------------------------


def in_four_bits(model: nn.Module, loader, source: str, device: str, **options) -> nn.Module:
    """The model once more, with its linear layers in 4 bits; its fingerprint is that of `model`.

    loader: the class that loaded `model` from `source`, with these options.
    """
    mark, kind = fingerprint(model), torch.float32 if device == "cpu" else torch.bfloat16
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    model = loader.from_pretrained(source, quantization_config=bits, dtype=kind, device_map={"": device}, **options)
    packed = [module for module in model.modules() if getattr(getattr(module, "weight", None), "quant_state", None)]
    if not packed:
        raise ValueError("transformers holds none of its layers in 4 bits: use --precision bf16")
    for module in packed:  # some CPUs have a faster form of a weight, which has no gradient and cannot be undone
        module.support_avx512bf16_for_cpu = False
    model.fingerprint_of_checkpoint = mark
    return model


# --- Blocks split over processes --------------------------------------------------------------------------------------


def shard(model: nn.Module, device: str, precision: str):
    """Split the blocks of an adapted model, which lies on the CPU, over all processes; the rest goes to `device` whole.

    A model that transformers has just loaded on the CPU from safetensors files is these files, mapped into memory: all
    processes of a machine see the same pages. Only one block at a time is converted and moved, so no process ever holds
    the whole backbone. (Of old pickled files, and of weights that transformers converts, each process has a copy in the
    host's memory for the time of loading.)
    """
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # T5's blocks do; nobody changes it in place
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.fingerprint_of_checkpoint = fingerprint(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    adapters = set(adapter_parameters(model).values())
    options = dict(mesh=init_device_mesh(device, (processes.count(),)), reshard_after_forward=True)
    blocks = blocks_of(model)
    for block in blocks.values():
        for p in set(block.parameters()) - adapters:
            p.data = p.data.to(dtype).contiguous()  # GPT-2's are transposed views
        fully_shard(block, ignored_params=adapters, **options)
    split = {p for block in blocks.values() for p in block.parameters()}
    for p in set(model.parameters()) - split - adapters:
        p.data = p.data.to(device, dtype)
    for name in {name.rpartition(".")[0].rpartition(".")[0] for name in blocks}:  # "encoder" of "encoder.block.3"
        stack = model.get_submodule(name)  # is called before its blocks: it gathers the next one during this one
        fully_shard(stack, ignored_params=set(stack.parameters()) - split | adapters, **options)
    model.to(device)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The Transformer blocks of a model by name: the modules that are numbered first in their names."""
    numbers = {name: [part.isdecimal() for part in name.split(".")] for name, _ in model.named_modules()}
    return {name: model.get_submodule(name) for name, at in numbers.items() if at[-1] and sum(at) == 1}


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has split the model."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())
