"""How PEFT's Poly and the MHR authors' code keep an adapted layer, and reading their files.

PEFT's Poly and the authors' code keep a layer in the same three tensors (letters as in mhr.py):

    A (s, i, r)                  poly_lora_A, lora_a  (h, s, d, r)
    B (s, r, o)                  poly_lora_B, lora_b  (h, s, r, e)
    Z (t, s) or (t, h, s)        module_logits        (t, h s)

A file of theirs with one adapter for all tasks has lora_a (i, r) and lora_b (r, o) (older ones transposed), of (IA)^3
multi_lora_b (o), which is one where ours is zero.

Files of the authors' code are pickles: only tensors, numbers and text are read from them, no code is ever run.
"""

import dataclasses
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from plumbing.errors import UserError
from plumbing.folders import read_config, read_json

# --- Layouts ----------------------------------------------------------------------------------------------------------

PEFT_POLY = {"A": "poly_lora_A", "B": "poly_lora_B", "Z": "poly_router.module_logits"}
AUTHORS = {"A": "lora_a", "B": "lora_b", "Z": "selector.module_logits"}
AXES = {"A": 4, "B": 4, "Z": 2}  # of these tensors
AUTHORS_ONE = {  # files with one adapter for all tasks: names and axes of the tensors of a layer
    "lora": ({"A": "lora_a", "B": "lora_b"}, {"A": 2, "B": 2}), "ia3": ({"v": "multi_lora_b"}, {"v": 1}),
}  # fmt: skip


def to_blocks(layer: nn.Module) -> dict[str, Tensor]:
    """A routed layer's tensors in the layout of PEFT's Poly and the authors' code (table at the top); `poly`: h = 1."""
    A, B, h = layer.inventory["A"], layer.inventory["B"], getattr(layer.router, "heads", 1)
    return {
        "A": A.unflatten(1, (h, -1)).transpose(0, 1),  # s (h d) r -> h s d r
        "B": B.unflatten(2, (h, -1)).permute(2, 0, 1, 3),  # s r (h e) -> h s r e
        "Z": layer.router.Z.flatten(1),
    }


@torch.no_grad()
def from_blocks(layer: nn.Module, A: Tensor, B: Tensor, Z: Tensor):
    """The inverse of `to_blocks`, into a layer of the same sizes."""
    layer.inventory["A"].copy_(A.transpose(0, 1).flatten(1, 2))
    layer.inventory["B"].copy_(B.permute(1, 2, 0, 3).flatten(2, 3))
    layer.router.Z.copy_(Z.view_as(layer.router.Z))


def turn(tensors: dict[str, Tensor], layer: nn.Module):
    """Older files of the authors have a single LoRA the other way round: A (r, i), B (o, r)."""
    if "A" in tensors and tensors["A"].shape != layer.params["A"].shape:
        tensors |= {"A": tensors["A"].T, "B": tensors["B"].T}


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_peft_poly(folder: Path):
    """(layers as of `by_layer`, the known settings of the run) of a folder of PEFT's Poly."""
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "POLY":
        raise UserError(f"{folder} holds PEFT's {config.get('peft_type')}: only its POLY becomes a run")
    try:
        state = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'adapter_model.safetensors'} cannot be read: {error}") from None
    known = {"backbone": config.get("base_model_name_or_path") or "", "routing": "gumbel"}
    if not isinstance(known["backbone"], str):
        raise UserError(f"{folder / 'adapter_config.json'}: its base_model_name_or_path is no text: correct it")
    if (folder / "run.json").exists():
        known = dataclasses.asdict(read_config(train.Config, folder / "run.json"))
    return by_layer(state, "base_model.model.", PEFT_POLY, AXES, folder), known


# Settings of the authors' code that change the function of a layer, with the values that are supported here.
PLAIN = {
    "poly_granularity": ("finegrained",), "router_granularity": ("finegrained",), "poly_selector": ("poly", None),
    "router_selector": ("poly", None), "poly_average_correction": (False,), "poly_use_shared_skill": (False,),
    "module_logits_l2_norm": (False,), "module_logits_dropout": (0,), "lora_warmup": (False,),
    "lora_scaling_rank": (0, None),
}  # fmt: skip
KINDS = {"n_splits": int, "n_skills": int, "lora_alpha": (int, float), "model": str, "dataset": str}  # read here


def read_authors(path: Path):
    """`read_peft_poly` for a checkpoint of the authors' code: PyTorch Lightning's state_dict and hyper_parameters."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {code[1]}" if code else "it may be damaged"
        raise UserError(f"{path} is refused: it holds more than tensors, numbers and text: {reason}") from None
    hyper, state = (content.get(k) if isinstance(content, dict) else None for k in ("hyper_parameters", "state_dict"))
    if not isinstance(hyper, dict) or not isinstance(state, dict):
        raise UserError(f"{path} has no state_dict and hyper_parameters: give a checkpoint of the authors' training")
    for name in (*KINDS, *PLAIN):
        value = hyper.get(name)
        if value is not None and not isinstance(value, KINDS.get(name, (bool, int, float, str))):
            raise UserError(f"{path}: its {name} is of type {type(value).__name__}, so it is not the authors' file")
    for name, plain in PLAIN.items():
        if hyper.get(name, plain[0]) not in plain:
            raise UserError(f"{path}: its {name} is {hyper[name]}, which is not supported here")
    alpha = hyper.get("lora_alpha") or 1.0
    if not abs(alpha) < 1e6:
        raise UserError(f"{path}: its lora_alpha is no scale: the file was changed")
    known = {
        "backbone": hyper.get("model") or "",
        "dataset": {"t0": "t0", "ni": "superni", "xfit": "crossfit"}.get(str(hyper.get("dataset")), ""),
    }
    if (kind := hyper.get("model_modifier")) in AUTHORS_ONE and not any("module_logits" in str(name) for name in state):
        layers = by_layer(state, "model.", *AUTHORS_ONE[kind], path)
        for layer in layers.values():
            if kind == "lora":
                layer["B"] *= alpha
            else:
                layer["v"] -= 1  # ours is the difference from one
        return layers, known | {"method": kind}
    layers = by_layer(state, "model.", AUTHORS, AXES, path)
    for name, layer in layers.items():
        if list(layer["A"].shape[:2]) != [hyper.get("n_splits", 1), hyper.get("n_skills")]:  # later versions swap them
            raise UserError(f"{path}: {name}.lora_a does not begin with its n_splits and n_skills")
        layer["B"] *= alpha  # ours is 1
    relaxed = "gumbel" if hyper.get("module_logits_relaxed_bernoulli", True) else "sigmoid"
    return layers, known | {"routing": "straight-through" if hyper.get("module_logits_straight_through") else relaxed}


def by_layer(state: dict, prefix: str, names: dict, axes: dict, source: Path) -> dict[str, dict[str, Tensor]]:
    """Group tensors by layer: {layer: {"A", "B", "Z"}}. UserError for any other tensor, or if one is missing.

    prefix: before the layer's name in a tensor's. names: {"A": its ending, ...}, axes: {"A": how many, ...}. source:
    for the message.
    """
    layers, keys = {}, {name: key for key, name in names.items()}
    for full, tensor in state.items():
        match = re.fullmatch(rf"{re.escape(prefix)}(.+)\.({'|'.join(map(re.escape, keys))})", str(full))
        if not match or not isinstance(tensor, Tensor):
            raise UserError(f"{source}: {full} is no part of {'a Poly of LoRAs' if 'Z' in names else 'its adapters'}")
        layers.setdefault(match[1], {})[keys[match[2]]] = tensor.float()
    for layer, tensors in layers.items():
        for key, number in axes.items():
            if key not in tensors or tensors[key].dim() != number:
                raise UserError(f"{source}: layer {layer} has no {names[key]} of {number} axes")
    if not layers:
        raise UserError(f"{source} has no layers")
    return layers
