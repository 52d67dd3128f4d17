"""How much memory a training step takes, computed without weights and without a GPU.

    python -m tools.estimate_memory --backbone t5-xl --batch-size 16        256 + 256 tokens an example
    python -m tools.estimate_memory --backbone qwen3-8b --batch-size 8      also in 4 bits, and split over processes

The step is the forward and backward pass of `train.py`, on fake tensors, which have a size but no content. The peak of
live tensors is added up. Not counted: fragmentation in the allocator, buffers of libraries (on a CPU 10 to 15 % more
was measured: results/bench.md), and on CUDA the context (about half a GB).
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import check_ranges, explicit_flags, flag


@dataclass
class Config:
    """Print the memory that training takes with each method on a backbone.

    example:
      python -m tools.estimate_memory --backbone t5-xxl --batch-size 8 --max-input 512
    """

    backbone: str = flag(
        "t5-xl", "t5-xl, t5-xxl, bart-large, qwen3-8b, or a hub name, folder or config file", group="the step"
    )
    batch_size: int = flag(16, "examples per step (of several processes: of each)")
    max_input: int = flag(256, "tokens of each input")
    max_output: int = flag(256, "tokens of each output")
    training_tasks: int = flag(313, "number of training tasks, each with its rows of Z")


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import weakref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import train
from inject import adapter_parameters, task_ids
from methods import add_adapters, use_checkpointing
from plumbing.backbones import reason_of
from plumbing.large import blocks_of
from plumbing.tables import aligned
from tools.count_parameters import ROWS, meta_backbone

MOST_TOKENS = 10_000_000  # of a batch: a thousand times the papers', and its task ids are real tensors
SHOWN = ("full", "(IA)^3", "LoRA", "Poly", "MHR, 8 heads", "MHR, 64 heads")
OTHERWISE, WAYS = "MHR, 8 heads", ("nf4", "2 processes", "4 processes")


class Peak(TorchDispatchMode):
    """Follows every tensor created in its context: `peak` is the largest number of bytes that lived at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage(), given)
        return out

    def _follow(self, storage: torch.UntypedStorage, given: set[int]):
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or key in given:  # a view, or an operation in place
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int):
        self.alive.discard(key)
        self.now -= size


def step_memory(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Peak bytes of forward and backward of a batch: with gradients of parameters, without parameters."""
    with Peak() as memory:
        train.token_loss(model, batch).backward()
    return memory.peak


def training_memory(
    backbone: str, batch_size: int, lengths: tuple[int, int], tasks: int, checkpointing: bool = False, **settings
) -> dict[str, int]:
    """Bytes of a method's training on so many tasks: {"backbone", "adapters", "AdamW", "step"}.

    A batch has as many different tasks as possible. lengths: tokens of the inputs and outputs. settings: fields of
    `train.Config`; adapters and AdamW's two averages of each gradient are float32 whatever its precision.
    """
    cfg = train.Config(backbone=backbone, **settings)
    ids = [k % tasks for k in range(batch_size)]
    with task_ids(ids), FakeTensorMode(allow_non_fake_inputs=True):  # not meta, where attention takes more memory
        model = meta_backbone(backbone, "cpu", torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
        if cfg.method != "full":
            add_adapters(model, cfg, tasks)
        if checkpointing:
            use_checkpointing(model)
        batch = fake_batch(model.config.is_encoder_decoder, batch_size, *lengths)
        try:
            step = step_memory(model.train(), batch)
        except Exception as error:  # a model from an arbitrary config can fail in any way
            raise UserError(f"--backbone {backbone}: it takes no training step: {reason_of(error)}") from None
    adapters = sum(p.numel() * p.element_size() for p in adapter_parameters(model).values())
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    averages = sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"backbone": parameters - adapters, "adapters": adapters, "AdamW": averages, "step": step}


IN_4_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes: 64 values share a scale of 8 bits, 256 such scales one of 32


def backbone_otherwise(model: nn.Module, way: str) -> tuple[int, int]:
    """Bytes that one GPU holds of a bfloat16 backbone, and the most that come and go while it computes.

    way: "nf4": a weight is multiplied as bfloat16. "2 processes" (--shard): the block that is computed is there whole,
    and the one that follows.
    """
    whole = sum(p.numel() for p in model.parameters())
    if way == "nf4":
        packed = [linear.weight.numel() for linear in linears_in_4_bits(model)]
        return 2 * (whole - sum(packed)) + round(IN_4_BITS * sum(packed)), 2 * max(packed)
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model).values()]
    return 2 * (whole - sum(blocks)) + 2 * sum(blocks) // int(way.split()[0]), 2 * 2 * max(blocks)


def linears_in_4_bits(model: nn.Module) -> list[nn.Linear]:
    """The layers that transformers holds in 4 bits: not the head, nor what a model wants precise (T5's wo)."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = model._keep_in_fp32_modules or ()
    head = model.get_output_embeddings()
    return [m for name, m in linears.items() if m is not head and not any(part in kept for part in name.split("."))]


def fake_batch(encoder_decoder: bool, size: int, max_input: int, max_output: int) -> dict[str, torch.Tensor]:
    """A batch as `train.tensors_of` makes it, every example of full length."""
    length = max_input if encoder_decoder else max_input + max_output
    x = torch.zeros(size, length, dtype=torch.long)
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x[:, -max_output:]}


def table(
    backbone: str, batch_size: int, lengths: tuple[int, int], tasks: int, shown: tuple[str, ...] = ()
) -> list[tuple[str, ...]]:
    """A table in GB (10^9 bytes) as cells, header first: the backbone in bfloat16, under method full in float32.

    shown: the methods, names of ROWS; none: SHOWN. The last lines hold the backbone otherwise: in 4 bits, or split over
    processes, each of which has its own batch.
    A method whose heads do not divide a layer has no numbers. Raises UserError for a batch of more than MOST_TOKENS.
    """
    if (tokens := batch_size * sum(lengths)) > MOST_TOKENS:
        given = f"--batch-size {batch_size} --max-input {lengths[0]} --max-output {lengths[1]}"
        raise UserError(f"{given} is a batch of {tokens:,} tokens, which fits nowhere: {MOST_TOKENS:,} at most")
    head = ("GB", "backbone", "adapters", "AdamW", "step", "in all", "step with --checkpointing", "in all")
    every = {}
    for name in tqdm(shown or SHOWN, desc="memory", unit="method", disable=None, leave=False):
        settings = ROWS[name] | dict(precision="fp32" if name == "full" else "bf16")
        try:
            with_or_without = [
                training_memory(backbone, batch_size, lengths, tasks, checkpointing, **settings)
                for checkpointing in (False, True)
            ]
        except UserError:
            if "heads" not in settings:
                raise
            with_or_without = []
        every[name] = with_or_without
    for way in WAYS if OTHERWISE in every else ():
        held, passing = backbone_otherwise(meta_backbone(backbone), way)
        every[f"{OTHERWISE}, {way}"] = [
            sizes | {"backbone": held, "step": sizes["step"] + passing} for sizes in every[OTHERWISE]
        ]
    return [head, *((name, *cells_of(sizes)) for name, sizes in every.items())]


def cells_of(with_or_without: list[dict[str, int]]) -> list[str]:
    """The cells of a line: the sizes without --checkpointing and their sum, the step with it and the sum; or none."""
    cells = []
    for checkpointing, sizes in enumerate(with_or_without):
        numbers = [*sizes.values(), sum(sizes.values())][3 * checkpointing :]
        cells += [f"{number / 1e9:.1f}" for number in numbers]
    return cells or ["-"] * 7


def main(flags: dict):
    cfg = Config(**flags)
    check_ranges(cfg)
    lengths = (cfg.max_input, cfg.max_output)
    print(aligned(table(cfg.backbone, cfg.batch_size, lengths, cfg.training_tasks), left=1))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
