"""How many parameters each method trains, exactly, on any backbone, without its weights.

    python -m tools.count_parameters --backbone t5-xl

The backbone is built from its config on torch's meta device. `train.py`'s own code puts the adapters in, and
`adapt.prepare` decides what a new task trains: the table always agrees with real runs.
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import check_ranges, explicit_flags, flag
from recipes import VARIANTS


@dataclass
class Config:
    """Print how many parameters each method trains on a backbone.

    example:
      python -m tools.count_parameters --backbone bart-large --training-tasks 120
    """

    backbone: str = flag(
        "t5-xl", "t5-xl, t5-xxl, bart-large, or a hub name, folder or config file", group="what to count"
    )
    training_tasks: int = flag(313, "number of training tasks, each with its rows of Z")


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import dataclasses
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import adapt
import train
from layers import named_layers
from methods import add_adapters, count_parameters
from plumbing.backbones import reach_hub, reason_of, refuse_endless
from plumbing.tables import aligned

CONFIGS = Path(__file__).resolve().parents[1] / "assets" / "configs"  # for use without the hub
# What the papers compare, by their names. "l-": light layers, that is keys, values and one of the feed-forward.
# "attention": queries, keys, values and outputs, from which some of the papers' l- numbers follow.
ROWS = {
    "full": dict(method="full"),
    "(IA)^3": dict(method="ia3", adapter="ia3"),
    "LoRA": dict(method="lora"),
    "LoRA-big": dict(method="lora", rank=16),
    "Private, AdapterSoup": dict(method="private"),
    "Expert, 4 skills": dict(method="expert", skills=4),
    "Random": dict(method="random"),
    "HyperFormer": dict(method="hyperformer"),
    "Task-MoE": dict(method="task-moe"),
    "Poly": dict(method="poly"),
    "MHR, 8 heads": dict(method="mhr", heads=8),
    "MHR, 64 heads": dict(method="mhr", heads=64),
    "Poly (IA)^3": dict(method="poly", adapter="ia3"),
    "Poly SFT, 10 %": dict(method="poly", adapter="sft"),
    "Poly, rank 16": dict(method="poly", rank=16),
    "l-LoRA": dict(method="lora", layers="light"),
    "l-LoRA-big": dict(method="lora", layers="light", rank=16),
    "l-Poly": dict(method="poly", layers="light"),
    "l-MHR, 32 heads": dict(method="mhr", layers="light", heads=32),
    "l-MHR, 64 heads": dict(method="mhr", layers="light", heads=64),
    "attention: LoRA-big": dict(method="lora", layers="attention", rank=16),
    "attention: MHR, 32 heads": dict(method="mhr", layers="attention", heads=32),
    "attention: MHR, 64 heads": dict(method="mhr", layers="attention", heads=64),
}


def meta_backbone(name: str, device: str = "meta", dtype: torch.dtype = torch.float32):
    """A model from its config: t5-xl, t5-xxl, bart-large (bundled), a hub name, a folder, or a config.json file.

    On the meta device it has no weights. Raises UserError if there is no such config, or its model's layers have no
    names here.
    """
    bundled = CONFIGS / f"{name}.json"
    if not bundled.exists() and not Path(name).exists():
        reach_hub()
    try:
        config = AutoConfig.from_pretrained(bundled if bundled.exists() else name, trust_remote_code=False)
        refuse_endless(config.to_dict())
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device(device):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
            if not getattr(config, "scale_decoder_outputs", True):
                # T5 v1.1 has an output layer of its own, which transformers 5 ties until it sees the weights
                model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    except Exception as error:  # each model fails on a broken config in its own way
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
        reason = reason_of(error)
        if "Unrecognized configuration class" in reason:
            reason = f"a {config.model_type} model is no language model"
        raise UserError(f"--backbone {name}: no model can be built: {reason} (bundled: {known})") from None
    try:
        named_layers("lora", config.model_type)
    except ValueError:
        why = f"the layers of a {config.model_type} model have no names here"
        raise UserError(f"--backbone {name}: {why}, give one of another type") from None
    return model


def count(backbone: str, tasks: int, **settings) -> dict[str, int]:
    """Parameters that one method trains: {"adapters", "Z"} in pre-training, and by variant for one new task.

    Variants ("all", "z", "mu", "lora") are those that the method has; mu of SFTs is left out, since its size depends on
    how many of their random places coincide. tasks: of pre-training. settings: fields of `train.Config` (default: rank
    1, 8 skills). The model is built for one task; every further task has as many rows of Z, and under private and
    adapter-soup one more skill.
    """
    cfg, skills = train.Config(backbone=backbone, **settings), 1
    if cfg.method in ("private", "adapter-soup"):  # the same sizes: a skill a task, and one adapter for a new task
        cfg, skills = dataclasses.replace(cfg, method="private", skills=1), tasks
    model = meta_backbone(backbone)
    if cfg.method != "full":
        add_adapters(model, cfg, tasks=1)
    numbers = count_parameters(model)
    counts = {"adapters": skills * numbers["adapters"], "Z": tasks * numbers["routing"]}
    for variant, methods in VARIANTS.items():
        if cfg.method in methods and not (variant == "mu" and cfg.adapter == "sft"):
            adapt.prepare(model, dataclasses.replace(cfg, device="meta"), adapt.Config(variant=variant))
            counts[variant] = sum(count_parameters(model).values())
    return counts


def table(backbone: str, tasks: int) -> list[tuple[str, ...]]:
    """A table over ROWS as cells, header first. A method whose heads do not divide a layer has no numbers.

    Raises UserError for a backbone whose layers have no names here.
    """
    columns = ("adapters", "Z", "all", "z", "mu", "lora")
    new = (f"a new task: {c}" for c in columns[2:])
    lines = [("method", "rank", "trained on all tasks", f"Z of {tasks} tasks", *new)]
    for name, settings in tqdm(ROWS.items(), desc="count", unit="method", disable=None, leave=False):
        try:
            counts = count(backbone, tasks, **settings)
        except UserError:
            if "heads" not in settings:
                raise
            counts = {}
        rank = str(settings.get("rank", 1)) if settings.get("adapter", "lora") == "lora" and name != "full" else ""
        lines.append((name, rank, *(f"{counts[c]:,}" if counts.get(c) else "-" for c in columns)))
    return lines


def main(flags: dict):
    cfg = Config(**flags)
    check_ranges(cfg)
    print(aligned(table(cfg.backbone, cfg.training_tasks)))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
