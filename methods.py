"""From a method's name to a model: a backbone with the method's routers and adapters in it.

`cfg` is a `train.Config`; its fields backbone, device and precision, and those under "Adapter and routing", determine
the model.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from baselines.fixed import FixedRouter, RandomRouter, given_table, half_of_skills, skill_names
from baselines.hyperformer import HyperRouter
from baselines.task_moe import TaskMoERouter
from ia3 import IA3, IA3Linear
from inject import adapted_layers, check, freeze, inject, load_adapters, routers, save_adapters, task_ids
from layers import IA3_INPUT_SIDE, pattern_of, sharing_key
from lora import LoRA, LoRALinear
from mhr import MHRLinear, MHRRouter
from plumbing import processes
from plumbing.backbones import load_backbone, refuse_unfit, save_backbone
from plumbing.errors import UserError
from plumbing.folders import read_config, refuse_other_tasks
from plumbing.large import refuse_what_does_not_fit, shard
from poly import PolyLinear, PolyRouter
from recipes import FIXED_TABLE, ONE_ADAPTER
from sft import SFT, SFTLinear, SFTSkills

SINGLE = {"lora": LoRALinear, "ia3": IA3Linear, "sft": SFTLinear}  # a layer with one adapter, by --adapter

# --- Build ------------------------------------------------------------------------------------------------------------


def build_model(cfg, tasks: int, table: Tensor | None = None):
    """Load the backbone and put the method's adapters in: (model, tokenizer). tasks, table: see `make_router`.

    Under --shard the blocks are split over the processes, if there are several. Adapters are then drawn on the CPU.
    Raises UserError if the settings do not fit the backbone; the sentence names the layer.
    """
    refuse_what_does_not_fit(cfg)
    split = cfg.shard and processes.several()
    device, precision = ("cpu", "auto") if split else (cfg.device, cfg.precision)
    model, tokenizer = load_backbone(cfg.backbone, device, precision)
    if cfg.method != "full":
        add_adapters(model, cfg, tasks, table)
    if split:
        shard(model, cfg.device, cfg.precision)
    return model.to(cfg.device), tokenizer


def add_adapters(model: nn.Module, cfg, tasks: int, table: Tensor | None = None):
    """Freeze a backbone and put the method's adapters in. Raises UserError as `build_model`."""
    freeze(model)
    shared = {}  # granularity: layers with the same key share a router

    def make_layer(name: str, linear: nn.Module) -> nn.Module:
        """The adapted layer that replaces `linear`, for `inject`."""
        adapter = make_adapter(cfg, name)
        if cfg.method in ONE_ADAPTER:
            return SINGLE[cfg.adapter](linear, adapter)
        key = "model" if cfg.method in FIXED_TABLE else sharing_key(name, cfg.granularity)  # one fixed table for all
        if key not in shared:
            shared[key] = make_router(cfg, tasks, table)
        return routed_layer(cfg.method, cfg.adapter)(linear, adapter, shared[key])

    try:
        default = "ia3" if cfg.adapter == "ia3" else "lora"  # an SFT changes the layers that LoRA would
        inject(model, make_layer, pattern_of(cfg.layers or default, model))
    except ValueError as error:
        layers = f" --layers {cfg.layers}" if cfg.layers else ""
        raise UserError(f"--method {cfg.method} --backbone {cfg.backbone}{layers}: {error}") from None


class SFTPolyLinear(SFTSkills, PolyLinear):
    """A `PolyLinear` whose skills are SFTs."""


class SFTMHRLinear(SFTSkills, MHRLinear):
    """An `MHRLinear` whose skills are SFTs."""


def routed_layer(method: str, adapter: str) -> type:
    """The class of the routed layers of a method and --adapter."""
    if adapter == "sft":
        return SFTMHRLinear if method == "mhr" else SFTPolyLinear
    return MHRLinear if method == "mhr" else PolyLinear


def make_adapter(cfg, name: str):
    """The adapter (--adapter) of the layer of this name."""
    if cfg.adapter == "ia3":
        return IA3("in" if name.endswith(IA3_INPUT_SIDE) else "out")
    return SFT(cfg.density) if cfg.adapter == "sft" else LoRA(cfg.rank)


def make_router(cfg, tasks: int, table: Tensor | None = None) -> nn.Module:
    """A fresh router of a routed method for this many tasks. table (t, s): the table of a method that has one; None:
    each task uses all skills alike, until a file is loaded. Raises ValueError for settings out of range.
    """
    if cfg.method == "poly":
        return PolyRouter(tasks, cfg.skills, cfg.routing)
    if cfg.method == "mhr":
        return MHRRouter(tasks, cfg.skills, cfg.heads, cfg.routing)
    if cfg.method == "task-moe":
        return TaskMoERouter(tasks, cfg.skills, cfg.top_k)
    if cfg.method == "hyperformer":
        return HyperRouter(tasks, cfg.skills)
    if cfg.method == "random" and cfg.random_by == "example":
        return RandomRouter(tasks, cfg.skills)
    if cfg.method == "random":
        return FixedRouter(half_of_skills(tasks, cfg.skills))
    return FixedRouter(torch.ones(tasks, cfg.skills) if table is None else table)


def names_of_skills(cfg, tasks: list) -> list[str]:
    """The names of the skills of a fixed table, [] for other methods. UserError if an expert's table has none."""
    seen = [task for task in tasks if len(task.train)]  # an untrained skill would only dilute averages
    names = skill_names(cfg.method, seen) if cfg.method in FIXED_TABLE else []
    if cfg.method == "expert" and not names:
        raise UserError(f"--method expert: nothing is known of the skills of these tasks of {cfg.dataset}")
    return names


def starting_point(cfg, tasks: list, skills: list[str]):
    """(model, tokenizer) before training: with fresh adapters, or with those of --from-run, averaged for method mu."""
    if not cfg.from_run:
        return build_model(cfg, len(tasks), given_table(cfg.method, tasks, skills) if skills else None)
    base = read_config(type(cfg), Path(cfg.from_run) / "config.json")
    refuse_other_tasks(Path(cfg.from_run), cfg.method, tasks)
    model, tokenizer = load_run(Path(cfg.from_run), dataclasses.replace(cfg, method=base.method))
    if cfg.method == "mu":
        average_skills(model, cfg.adapter)
    return model, tokenizer


@torch.no_grad()
def probe(model: nn.Module, tokenizer, cfg):
    """Before anything is trained: `refuse_unfit`, `inject.check` of the adapters, and that a decoder-only model looks
    back alone. Raises UserError.
    """
    refuse_unfit(model, tokenizer, cfg)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    x = (torch.arange(21, device=model.device).view(3, 7) + 3) % vocabulary
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    batch |= {"decoder_input_ids": x} if model.config.is_encoder_decoder else {}
    call = lambda: model(**batch, use_cache=False).logits  # noqa: E731
    try:
        if adapted_layers(model):
            check(model, call)
    except ValueError as error:
        raise UserError(f"--backbone {cfg.backbone}: {error}") from None
    if not model.config.is_encoder_decoder and looks_ahead(model, call):
        raise UserError(f"--backbone {cfg.backbone} is no language model: a token sees those after it")


@torch.enable_grad()
def looks_ahead(model: nn.Module, call) -> bool:
    """Whether the first token's logits (b, l, vocabulary), which call() computes, depend on the tokens after it: by
    their gradient, which is exactly zero in a causal model."""
    read = []

    def note(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        read.append(y.detach().requires_grad_())
        return read[-1].clone()  # which the model may change in place

    hook = model.get_input_embeddings().register_forward_hook(note)
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(gpus), task_ids([0]):
            first = call()[:, 0]
    finally:
        hook.remove()
    (by_input,) = torch.autograd.grad((first * torch.linspace(0, 1, first.shape[-1]).to(first)).sum(), read[:1])
    return bool((by_input[:, 1:] != 0).any())


# --- Load and save ----------------------------------------------------------------------------------------------------


def load_run(folder: Path, cfg):
    """A pre-trained run as it was saved: (model, tokenizer). cfg: its Config.

    Raises UserError if the run has not finished, or its file does not fit the backbone.
    """
    saved = folder / ("backbone" if cfg.method == "full" else "adapter.safetensors")
    if not saved.exists():
        raise UserError(f"{folder} has no {saved.name}: its training has not finished")
    if cfg.method == "full":
        return build_model(dataclasses.replace(cfg, backbone=str(saved)), tasks=1)
    model, tokenizer = build_model(cfg, tasks=1)  # routers then take the file's number of tasks
    load_adapter_file(model, saved)
    return model, tokenizer


def load_adapter_file(model: nn.Module, path: Path):
    """`inject.load_adapters`, with a UserError where the file does not fit."""
    try:
        load_adapters(model, str(path))
    except ValueError as error:
        raise UserError(str(error)) from None


def save_trained(model: nn.Module, tokenizer, path: Path):
    """Save what was trained: adapters and routers as PATH.safetensors, a model without adapters as the folder PATH."""
    if adapted_layers(model):
        save_adapters(model, f"{path}.safetensors")
    else:
        save_backbone(model, tokenizer, path)


def save_run(model: nn.Module, tokenizer, folder: Path, mark: str = ""):
    """Save what train.py trained, under its usual name and `mark`. Only the first of several processes saves."""
    if processes.first():
        save_trained(model, tokenizer, folder / f"{'adapter' if adapted_layers(model) else 'backbone'}{mark}")


def collapse(model: nn.Module, adapter: str, params_of):
    """Replace every routed layer by one with a single adapter, without routing.

    params_of(layer): the adapter's parameters {name: (...)}, or None for a fresh adapter.
    """
    for name, layer in adapted_layers(model).items():
        if hasattr(layer, "router"):
            model.set_submodule(name, SINGLE[adapter](layer.linear, layer.adapter, params_of(layer)))


def average_skills(model: nn.Module, adapter: str):
    """mu: `collapse` to the average of each layer's skills."""
    collapse(model, adapter, lambda layer: layer.average_skills())


def count_parameters(model: nn.Module) -> dict[str, int]:
    """The number of trainable parameters: Z of the routers, and the rest (skills, adapters, or the whole backbone)."""
    z = sum(router.Z.numel() for router in routers(model) if router.Z.requires_grad)
    return {"adapters": sum(p.numel() for p in model.parameters() if p.requires_grad) - z, "routing": z}


def use_checkpointing(model):
    """Gradient checkpointing: keep only the inputs of blocks, recompute the rest in the backward pass."""
    newer = "activation_checkpointing_enable"  # later releases of transformers warn of the older name
    getattr(model, newer, model.gradient_checkpointing_enable)({"use_reentrant": False})
