"""Export: hand a run to PEFT or to plain Hugging Face code, and take PEFT's Poly and the authors' checkpoints back.

    python -m tools.export --checkpoint RUN --task NAME --format peft --output-dir DIR    a task: PEFT's LoRA or (IA)^3
    python -m tools.export --checkpoint RUN --task mu --format merged --output-dir DIR    ... merged into a plain model
    python -m tools.export --checkpoint RUN --format peft-poly --output-dir DIR           all tasks of a Poly or MHR run
    python -m tools.export --checkpoint DIR_OR_FILE --format run --output-dir RUN         the way back, for adapt.py

--checkpoint is a run folder of train.py or adapt.py. With --format run it is a folder of PEFT's Poly or a checkpoint
file of the MHR authors' code.

The adapter of one task is exact: skills are mixed before they are applied, so a mixture of LoRAs of rank r, also head
by head, is a LoRA of rank r. `peft` and `merged` fit every method but `full`, whose runs hold plain model folders
already. PEFT has no sparse fine-tuning: use `merged`. A run of train.py with one adapter takes no --task. PEFT's Poly
holds LoRA skills of `poly` and `mhr` with one router per layer, sigmoid or Gumbel-sigmoid (in training it always draws
noise), and no Conv1D (GPT-2). Anything else is refused in one sentence.

PEFT's Poly and the authors' code keep a layer in the same three tensors (letters as in mhr.py):

    A (s, i, r)                  poly_lora_A, lora_a  (h, s, d, r)
    B (s, r, o)                  poly_lora_B, lora_b  (h, s, r, e)
    Z (t, s) or (t, h, s)        module_logits        (t, h s)

A file of theirs with one adapter for all tasks has lora_a (i, r) and lora_b (r, o) (older ones transposed), of (IA)^3
multi_lora_b (o), which is one where ours is zero.

Files of the authors' code are pickles: only tensors, numbers and text are read from them, no code is ever run. They do
not name their tasks, so the tasks of such a run are called 0, 1, 2, ...
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import as_flag, explicit_flags, flag
from plumbing.folders import new_run_folder, read_config, read_json, script_of, whole_folder, write_config, write_json
from recipes import ONE_ADAPTER, PRETRAINING, recipe

DATASETS = tuple(name for name in PRETRAINING if isinstance(name, str))


@dataclass
class Config:
    """Export a run to PEFT or as a merged model; import PEFT's Poly or a checkpoint of the MHR authors' code.

    examples:
      python -m tools.export --checkpoint runs/strings-mhr-0 --task mu --format merged --output-dir merged
      python -m tools.export --checkpoint runs/strings-mhr-0 --format peft-poly --output-dir poly
    """

    checkpoint: str = flag(
        "", "run folder; with --format run: PEFT Poly folder, or .pt or .ckpt file of the authors", metavar="PATH",
        group="from what to what", required=True,
    )  # fmt: skip
    format: str = flag("peft", "what to write", ("peft", "merged", "peft-poly", "run"))
    output_dir: str = flag("", "new folder to write to", metavar="DIR", required=True)
    task: str = flag(
        "", "a task of the run, or mu, the average of all skills; a run with one adapter needs none",
        group="with --format peft or merged",
    )  # fmt: skip
    split: str = flag("", "which split of an adaptation run, if it has several")
    backbone: str = flag("", "backbone of the run, if not where the checkpoint says", group="with --format run")
    dataset: str = flag("", "benchmark whose recipe the run follows, if the checkpoint does not say", DATASETS)


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import dataclasses
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapt
import train
from evaluate import adapted_config
from inject import adapted_layers, merge, routers, save_adapters
from lora import LoRA
from methods import add_adapters, average_skills, collapse, count_parameters, load_adapter_file, load_run
from plumbing.backbones import TINY, advice_on_memory, load_backbone, save_backbone
from sft import SFT

# --- One task -> one adapter ------------------------------------------------------------------------------------------


def one_adapter(cfg: Config):
    """(model with the one adapter of --task in each layer and no router, tokenizer, name of its backbone)."""
    folder = Path(cfg.checkpoint)
    if script_of(folder) == "adapt.py":
        return _adapted(cfg, folder)
    base = held_whole(train.run_config(str(folder), device="cpu"))
    if base.method == "full":
        raise UserError(f"{folder} is a run of method full: {folder / 'backbone'} is a plain model folder already")
    if cfg.split:
        raise UserError(f"--split {cfg.split} is for runs of adapt.py, {folder} is one of train.py: leave it out")
    names = names_of_tasks(folder)
    if base.method not in ONE_ADAPTER:
        _check_task(cfg, ["mu", *names])
    elif cfg.task:
        raise UserError(f"--task {cfg.task}: {folder} has one adapter for all tasks, leave --task out")
    model, tokenizer = load_run(folder, base)
    if any(router.tasks != len(names) for router in routers(model)):
        raise UserError(f"{folder / 'tasks.json'} names {len(names)} tasks, its routers have another number of them")
    if cfg.task == "mu":
        average_skills(model, base.adapter)
    elif cfg.task:
        collapse(model, base.adapter, lambda layer: mixture(layer, names.index(cfg.task)))
    return model, tokenizer, base.backbone


def _adapted(cfg: Config, folder: Path):
    """`one_adapter` of an adaptation run. Needs no data: the saved files hold all that differs between tasks."""
    run = adapted_config(folder, device="cpu")
    base = held_whole(adapt.base_config(run))
    split = cfg.split or run.split[0]
    if split not in run.split or not cfg.split and len(run.split) > 1:
        given = f"--split {cfg.split}" if cfg.split else "--split is missing"
        raise UserError(f"{given}: {folder} has an adapter of each task for each of {', '.join(run.split)}")
    if base.method == "full" and run.variant != "lora":
        raise UserError(f"{folder} is a run of method full: {folder / split}/TASK are plain model folders already")
    _check_task(cfg, sorted(path.name.removesuffix(".safetensors") for path in (folder / split).glob("*.safetensors")))
    model, tokenizer = load_run(Path(run.checkpoint), base)
    if base.method == "adapter-soup" and run.variant == "all":  # `prepare` would embed the tasks, to weigh the adapters
        collapse(model, base.adapter, lambda layer: None)
    else:
        adapt.prepare(model, base, run)
    load_adapter_file(model, folder / split / f"{cfg.task}.safetensors")
    collapse(model, base.adapter, lambda layer: mixture(layer, 0))
    return model, tokenizer, str(Path(run.checkpoint) / "backbone") if base.method == "full" else base.backbone


def held_whole(base: train.Config) -> train.Config:
    """The settings of a run with its backbone not in 4 bits, into which nothing can be merged, but as its files are."""
    return dataclasses.replace(base, precision="auto") if base.precision == "nf4" else base


def names_of_tasks(folder: Path) -> list[str]:
    """The names in a run's tasks.json. Raises UserError if one is not a text."""
    names = read_json(folder / "tasks.json", tasks=list)["tasks"]
    if odd := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"{folder / 'tasks.json'}: {odd[0]!r:.60} is no name of a task: it was changed by hand")
    return names


def _check_task(cfg: Config, names: list[str]):
    if cfg.task not in names:
        problem = f"--task {cfg.task} is no task of {cfg.checkpoint}" if cfg.task else "--task is missing"
        raise UserError(f"{problem}: choose from {', '.join(names)}")


def mixture(layer: nn.Module, task: int) -> dict[str, Tensor]:
    """A routed layer's mixture for one task, in evaluation mode: the parameters {name: (...)} of one adapter."""
    w = layer.router(torch.tensor([task]), sample=False)
    return {name: p[0] for name, p in layer.mix(w).items()}


# --- To PEFT ----------------------------------------------------------------------------------------------------------


def import_peft():
    try:
        import peft  # here: only this file needs it
    except ImportError:
        raise UserError("--format peft and peft-poly need the package peft: pip install 'peft>=0.18,<1'") from None
    return peft


def endings(model: nn.Module, names: list[str]) -> list[str]:
    """The shortest endings of names that match these layers and no other module, as PEFT's target_modules."""
    inside = tuple(f"{name}." for name in adapted_layers(model))  # modules of adapters are not in the backbone
    others = [f".{n}" for n, _ in model.named_modules() if n not in names and not n.startswith(inside)]
    ends = []
    for depth in range(1, 1 + max((name.count(".") + 1 for name in names), default=0)):
        ends = sorted({".".join(name.split(".")[-depth:]) for name in names})
        if not any(other.endswith(tuple(f".{end}" for end in ends)) for other in others):
            break
    return ends


def write_peft(model: nn.Module, backbone: str, folder: Path):
    """Write a model with one LoRA or (IA)^3 per layer as a PEFT folder. PEFT has A (r, i), B (o, r) and l = 1 + v."""
    peft, tensors, layers = import_peft(), {}, adapted_layers(model)
    adapter = next(iter(layers.values())).adapter
    if isinstance(adapter, LoRA):
        for name, layer in layers.items():
            tensors[f"{name}.lora_A.weight"] = layer.params["A"].T
            tensors[f"{name}.lora_B.weight"] = layer.params["B"].T
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=endings(model, list(layers)))
    else:
        sides = {side: [n for n, layer in layers.items() if layer.adapter.side == side] for side in ("in", "out")}
        ends = {side: endings(model, names) for side, names in sides.items()}
        for name, layer in layers.items():
            tensors[f"{name}.ia3_l"] = (1 + layer.params["v"]).unsqueeze(0 if name in sides["in"] else 1)
        config = peft.IA3Config(target_modules=ends["in"] + ends["out"], feedforward_modules=ends["in"])
        config.feedforward_modules = ends["in"]
    config.fan_in_fan_out = any(hasattr(layer.linear, "conv1d") for layer in layers.values())
    _write_peft(model, config, tensors, backbone, folder)


def _write_peft(model, config, tensors: dict[str, Tensor], backbone: str, folder: Path):
    config.target_modules = sorted(config.target_modules)  # PEFT's set has another order in every process
    config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config.inference_mode = True
    if backbone != "scratch":  # an absolute path, if it is one: PEFT may be called from anywhere
        path = TINY if backbone == "tiny" else Path(backbone)
        config.base_model_name_or_path = str(path.resolve()) if path.is_dir() else backbone
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}": p.detach().contiguous() for name, p in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


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


PEFT_POLY = {"A": "poly_lora_A", "B": "poly_lora_B", "Z": "poly_router.module_logits"}
AUTHORS = {"A": "lora_a", "B": "lora_b", "Z": "selector.module_logits"}
AXES = {"A": 4, "B": 4, "Z": 2}  # of these tensors
AUTHORS_ONE = {  # files with one adapter for all tasks: names and axes of the tensors of a layer
    "lora": ({"A": "lora_a", "B": "lora_b"}, {"A": 2, "B": 2}), "ia3": ({"v": "multi_lora_b"}, {"v": 1}),
}  # fmt: skip
# The settings of a run that PEFT's Poly can hold.
POLY_HAS = {
    "method": ("poly", "mhr"), "adapter": ("lora",), "granularity": ("linear",), "routing": ("gumbel", "sigmoid"),
}  # fmt: skip


def export_poly(cfg: Config):
    """Write a run as a folder of PEFT's Poly, with run.json and tasks.json for `import_run`, which PEFT ignores."""
    peft, folder = import_peft(), Path(cfg.checkpoint)
    if script_of(folder) == "adapt.py":
        raise UserError(f"--format peft-poly needs a run of train.py: {folder} is one of adapt.py, use --format peft")
    base = held_whole(train.run_config(str(folder), device="cpu"))
    for name, values in POLY_HAS.items():
        if (value := getattr(base, name)) not in values:
            raise UserError(f"PEFT's Poly has no --{name} {value}, as {folder} has: use --format peft, for one task")
    model, _ = load_run(folder, base)
    layers = adapted_layers(model)
    if any(hasattr(layer.linear, "conv1d") for layer in layers.values()):
        raise UserError(f"PEFT's Poly has no Conv1D layers, as {folder} has: use --format peft, for one task")
    tensors = {f"{n}.{PEFT_POLY[key]}": p for n, layer in layers.items() for key, p in to_blocks(layer).items()}
    router = next(iter(layers.values())).router
    config = peft.PolyConfig(
        r=base.rank, n_tasks=router.tasks, n_skills=router.skills, n_splits=getattr(router, "heads", 1),
        target_modules=endings(model, list(layers)),
    )  # fmt: skip
    with whole_folder(new_run_folder(cfg.output_dir)) as out:
        _write_peft(model, config, tensors, base.backbone, out)
        write_json(out / "run.json", read_json(folder / "config.json"))
        write_json(out / "tasks.json", read_json(folder / "tasks.json"))
    print(f"{router.tasks} tasks, {len(layers)} layers, saved in {cfg.output_dir}")


# --- To a run ---------------------------------------------------------------------------------------------------------


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


def import_run(cfg: Config):
    """Write a folder of PEFT's Poly or a checkpoint of the authors' code as a run folder of train.py."""
    source = Path(cfg.checkpoint)
    layers, known = read_peft_poly(source) if source.is_dir() else read_authors(source)
    known |= {name: value for name in ("backbone", "dataset") if (value := getattr(cfg, name))}
    for name in ("backbone", "dataset"):
        if not known.get(name):
            raise UserError(f"--{name} is missing: {source} does not name one")
    first = next(iter(layers.values()))
    if one := "Z" not in first:  # one adapter for all tasks
        method, t = known.pop("method"), 1
        fixed = dict(method=method, adapter=method, output_dir=cfg.output_dir)
        fixed |= {"rank": min(first["A"].shape)} if method == "lora" else {}
    else:
        (h, s, _, r), t = first["A"].shape, len(first["Z"])
        method = "mhr" if h > 1 or known.get("method") == "mhr" else "poly"
        fixed = dict(method=method, adapter="lora", rank=r, skills=s, granularity="linear", output_dir=cfg.output_dir)
        fixed |= {"heads": h} if method == "mhr" else {}
    model, _ = load_backbone(known["backbone"], "cpu")
    if absent := layers.keys() - dict(model.named_modules()):
        raise UserError(f"{source}: --backbone {known['backbone']} has no layer {min(absent)}")
    pattern = rf"(.*\.)?({'|'.join(map(re.escape, endings(model, list(layers))))})"
    start = recipe(PRETRAINING, known["dataset"], method) | dict(layers=pattern, device="cpu")
    base = train.Config(**start | known | fixed)
    add_adapters(model, base, tasks=t)
    if (adapted := adapted_layers(model)).keys() != layers.keys():
        raise UserError(f"{source / 'run.json'} is of another run: its layers are not those of the weights")
    for name, layer in adapted.items():
        if one:
            turn(layers[name], layer)
        for key, own in (layer.params if one else to_blocks(layer)).items():
            if (given := layers[name][key].shape) != own.shape:
                raise UserError(f"{source}: {key} of layer {name} is {tuple(given)} and should be {tuple(own.shape)}")
            if not bool(layers[name][key].isfinite().all()):
                raise UserError(f"{source}: {key} of layer {name} holds numbers that are not finite")
        if one:
            for key, p in layer.params.items():
                p.data.copy_(layers[name][key])
        else:
            from_blocks(layer, **layers[name])
    tasks = {"tasks": [str(k) for k in range(t)], "skills": []}
    if source.is_dir() and (source / "tasks.json").exists() and len(names_of_tasks(source)) == t:
        tasks = read_json(source / "tasks.json", skills=list)
    with whole_folder(new_run_folder(cfg.output_dir)) as folder:
        save_adapters(model, str(folder / "adapter.safetensors"))
        write_config(folder, base)
        write_json(folder / "tasks.json", tasks)
        counts = count_parameters(model)
        write_json(folder / "result.json", {"steps": 0, "seconds": 0.0, "parameters": counts})  # no steps of train.py
    counted = f"{len(layers)} layers" if one else f"{t} tasks, {len(layers)} layers, {s} skills of rank {r}, {h} heads"
    print(f"method {method}, {counted}, saved in {cfg.output_dir}")


def turn(tensors: dict[str, Tensor], layer: nn.Module):
    """Older files of the authors have a single LoRA the other way round: A (r, i), B (o, r)."""
    if "A" in tensors and tensors["A"].shape != layer.params["A"].shape:
        tensors |= {"A": tensors["A"].T, "B": tensors["B"].T}


# --- Main -------------------------------------------------------------------------------------------------------------


def export_task(cfg: Config):
    """Write one task as a PEFT folder, or merged as a Hugging Face model folder."""
    if cfg.format == "peft":
        import_peft()  # fail now: loading the backbone may take minutes
    with torch.no_grad():
        model, tokenizer, backbone = one_adapter(cfg)
    layers = adapted_layers(model)
    if cfg.format == "peft" and isinstance(next(iter(layers.values())).adapter, SFT):
        raise UserError("--format peft: PEFT has no sparse fine-tuning, use --format merged")
    folder = new_run_folder(cfg.output_dir)
    if cfg.format == "peft":
        with whole_folder(folder) as temporary:
            write_peft(model, backbone, temporary)
    else:
        merge(model, 0)
        save_backbone(model, tokenizer, folder)
    print(f"{f'task {cfg.task}' if cfg.task else 'one adapter'}, {len(layers)} layers, saved in {folder}")


def check(cfg: Config):
    """Raise UserError for a flag that is missing or does not fit the format."""
    for name in ("checkpoint", "output_dir"):
        if not getattr(cfg, name):
            raise UserError(f"{as_flag(name)} is missing")
    for name in ("task", "split", "backbone", "dataset"):
        formats = ("peft", "merged") if name in ("task", "split") else ("run",)
        if getattr(cfg, name) and cfg.format not in formats:
            raise UserError(f"--{name} does not fit --format {cfg.format}: leave it out")
    if not Path(cfg.checkpoint).exists():
        raise UserError(f"--checkpoint {cfg.checkpoint} does not exist")
    if Path(cfg.output_dir).is_dir() and any(Path(cfg.output_dir).iterdir()):
        raise UserError(f"--output-dir {cfg.output_dir} is not empty: choose another folder")


def main(flags: dict):
    """Write what --format says. Raises UserError as `check`, or if the run is not what the format needs."""
    cfg = Config(**flags)
    check(cfg)
    with advice_on_memory("a machine that has more (the backbone is held in float32)", then=""):
        {"peft-poly": export_poly, "run": import_run}.get(cfg.format, export_task)(cfg)


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
