"""Export: hand a run to PEFT or to plain Hugging Face code, and take PEFT's Poly and the authors' checkpoints back.

    python -m tools.export --checkpoint RUN --task NAME --format peft --output-dir DIR    a task: PEFT's LoRA or (IA)^3
    python -m tools.export --checkpoint RUN --task all --format peft --output-dir DIR     ... every task, a folder each
    python -m tools.export --checkpoint RUN --task mu --format merged --output-dir DIR    ... merged into a plain model
    python -m tools.export --checkpoint RUN --format peft-poly --output-dir DIR           all tasks of a Poly or MHR run
    python -m tools.export --checkpoint DIR_OR_FILE --format run --output-dir RUN         the way back, for adapt.py

--checkpoint is a run folder of train.py or adapt.py. With --format run it is a folder of PEFT's Poly or a checkpoint
file of the MHR authors' code (`layouts.py` reads them).

The adapter of one task is exact: skills are mixed before they are applied, so a mixture of LoRAs of rank r, also head
by head, is a LoRA of rank r. `peft` and `merged` fit every method but `full`, whose runs hold plain model folders
already. PEFT has no sparse fine-tuning: use `merged`. A run of train.py with one adapter takes no --task. PEFT's Poly
holds LoRA skills of `poly` and `mhr` with one router per layer, `--routing` sigmoid or gumbel (in training it always
draws noise), and no Conv1D (GPT-2). Anything else is refused in one sentence.

`peft` also writes a model card (`cards.py`) into each folder. With --task all there is DIR/TASK for each task that has
an adapter, DIR/index.json, which names them, and a card of the whole; `docs/serving.md` is about what to do with it.

The authors' files do not name their tasks, so the tasks of such a run are called 0, 1, 2, ...
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import as_flag, explicit_flags, flag
from plumbing.folders import new_run_folder, read_json, script_of, whole_folder, write_config, write_json
from recipes import ONE_ADAPTER, PRETRAINING, recipe

DATASETS = tuple(name for name in PRETRAINING if isinstance(name, str))


@dataclass
class Config:
    """Export a run to PEFT or as a merged model; import PEFT's Poly or a checkpoint of the MHR authors' code.

    examples:
      python -m tools.export --checkpoint runs/strings-mhr-0 --task all --output-dir exported
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
        "", "a task of the run; all (peft): each of them; mu: the average of skills; a run with one adapter needs none",
        group="with --format peft or merged",
    )  # fmt: skip
    split: str = flag("", "which split of an adaptation run, if it has several")
    backbone: str = flag("", "backbone of the run, if not where the checkpoint says", group="with --format run")
    dataset: str = flag("", "benchmark whose recipe the run follows, if the checkpoint does not say", DATASETS)


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import dataclasses
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import adapt
import train
from benchmarks.crossfit import is_folder_name
from evaluate import adapted_config
from inject import adapted_layers, merge, routers, save_adapters
from lora import LoRA
from methods import add_adapters, average_skills, collapse, count_parameters, load_adapter_file, load_run
from plumbing.backbones import TINY, advice_on_memory, load_backbone, save_backbone
from sft import SFT
from tools.cards import Source, card_of_all, card_of_task
from tools.layouts import PEFT_POLY, from_blocks, read_authors, read_peft_poly, to_blocks, turn

# --- One task -> one adapter ------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run that is open for export."""

    model: nn.Module  # with the run's adapters
    tokenizer: object
    backbone: str  # its name or folder
    tasks: list[str]  # those to export; [""]: the one adapter for all
    select: Callable[[str], int]  # puts a task's adapter into the model, returns the id under which its layers have it
    source: Source  # for the cards

    def adapter_of(self, task: str) -> dict[str, dict[str, Tensor]]:
        """The one adapter of a task: {layer: {"A", "B"}, or {"v"}}."""
        k = self.select(task)
        of = lambda layer: mixture(layer, k) if hasattr(layer, "router") else dict(layer.params)  # noqa: E731
        return {name: of(layer) for name, layer in adapted_layers(self.model).items()}


def open_run(cfg: Config) -> Run:
    """Open the run in --checkpoint. Raises UserError if it has no adapters, or not those of --task and --split."""
    folder = Path(cfg.checkpoint)
    return _adapted(cfg, folder) if script_of(folder) == "adapt.py" else _pretrained(cfg, folder)


def _pretrained(cfg: Config, folder: Path) -> Run:
    """`open_run` of a run of train.py: its tasks are the rows of Z."""
    base = held_whole(train.run_config(str(folder), device="cpu"))
    if base.method == "full":
        raise UserError(f"{folder} is a run of method full: {folder / 'backbone'} is a plain model folder already")
    if cfg.split:
        raise UserError(f"--split {cfg.split} is for runs of adapt.py, {folder} is one of train.py: leave it out")
    names, tasks = names_of_tasks(folder), [""]
    if base.method not in ONE_ADAPTER:
        tasks = chosen_tasks(cfg, names, "mu")
    elif cfg.task:
        raise UserError(f"--task {cfg.task}: {folder} has one adapter for all tasks, leave --task out")
    model, tokenizer = load_run(folder, base)
    if any(router.tasks != len(names) for router in routers(model)):
        raise UserError(f"{folder / 'tasks.json'} names {len(names)} tasks, its routers have another number of them")
    if cfg.task == "mu":
        average_skills(model, base.adapter)
    select = lambda task: names.index(task) if task in names else 0  # noqa: E731
    return Run(model, tokenizer, base.backbone, tasks, select, Source(folder, base))


def _adapted(cfg: Config, folder: Path) -> Run:
    """`open_run` of a run of adapt.py. Needs no data: the saved files hold all that differs between tasks."""
    run = adapted_config(folder, device="cpu")
    base = held_whole(adapt.base_config(run))
    split = cfg.split or run.split[0]
    if split not in run.split or not cfg.split and len(run.split) > 1:
        given = f"--split {cfg.split}" if cfg.split else "--split is missing"
        raise UserError(f"{given}: {folder} has an adapter of each task for each of {', '.join(run.split)}")
    if base.method == "full" and run.variant != "lora":
        raise UserError(f"{folder} is a run of method full: {folder / split}/TASK are plain model folders already")
    names = sorted(path.name.removesuffix(".safetensors") for path in (folder / split).glob("*.safetensors"))
    tasks = chosen_tasks(cfg, names)
    model, tokenizer = load_run(Path(run.checkpoint), base)
    if base.method == "adapter-soup" and run.variant == "all":  # `prepare` would embed the tasks, to weigh the adapters
        collapse(model, base.adapter, lambda layer: None)
    else:
        adapt.prepare(model, base, run)

    def select(task: str) -> int:
        load_adapter_file(model, folder / split / f"{task}.safetensors")
        return 0

    backbone = str(Path(run.checkpoint) / "backbone") if base.method == "full" else base.backbone
    return Run(model, tokenizer, backbone, tasks, select, Source(folder, base, run, split))


def held_whole(base: train.Config) -> train.Config:
    """The settings of a run with its backbone not in 4 bits, into which nothing can be merged, but as its files are;
    and not in bfloat16, whatever is fast here: what is merged is the same everywhere."""
    return dataclasses.replace(base, precision="auto" if base.precision == "nf4" else "fp32")


def names_of_tasks(folder: Path) -> list[str]:
    """The names in a run's tasks.json. Raises UserError if one is not a text."""
    names = read_json(folder / "tasks.json", tasks=list)["tasks"]
    if odd := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"{folder / 'tasks.json'}: {odd[0]!r:.60} is no name of a task: it was changed by hand")
    return names


def chosen_tasks(cfg: Config, names: list[str], *also: str) -> list[str]:
    """--task as a list: names if it is all, else itself. UserError if it is none of names, nor of `also`."""
    if cfg.task == "all" and names:
        return names
    if cfg.task in (*also, *names):
        return [cfg.task]
    problem = f"--task {cfg.task} is no task of {cfg.checkpoint}" if cfg.task else "--task is missing"
    known = [*(["all"] if cfg.format == "peft" else []), *also, *names]
    raise UserError(f"{problem}: choose from {', '.join(known)}" if names else f"{cfg.checkpoint} has no adapters yet")


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


def write_peft(model: nn.Module, params: dict[str, dict[str, Tensor]], backbone: str, folder: Path):
    """Write one LoRA or (IA)^3 as a PEFT folder. PEFT has A (r, i), B (o, r) and l = 1 + v.

    params: as of `Run.adapter_of`, for the adapted layers of the model.
    """
    peft, tensors, layers = import_peft(), {}, adapted_layers(model)
    adapter = next(iter(layers.values())).adapter
    if isinstance(adapter, LoRA):
        for name in layers:
            tensors[f"{name}.lora_A.weight"] = params[name]["A"].T
            tensors[f"{name}.lora_B.weight"] = params[name]["B"].T
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=endings(model, list(layers)))
    else:
        sides = {side: [n for n, layer in layers.items() if layer.adapter.side == side] for side in ("in", "out")}
        ends = {side: endings(model, names) for side, names in sides.items()}
        for name in layers:
            tensors[f"{name}.ia3_l"] = (1 + params[name]["v"]).unsqueeze(0 if name in sides["in"] else 1)
        config = peft.IA3Config(target_modules=ends["in"] + ends["out"], feedforward_modules=ends["in"])
        config.feedforward_modules = ends["in"]
    config.fan_in_fan_out = any(hasattr(layer.linear, "conv1d") for layer in layers.values())
    _write_peft(model, config, tensors, backbone, folder)


def _write_peft(model, config, tensors: dict[str, Tensor], backbone: str, folder: Path):
    config.target_modules = sorted(config.target_modules)  # PEFT's set has another order in every process
    config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config.inference_mode = True
    config.base_model_name_or_path = address(backbone)
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}": p.detach().contiguous() for name, p in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def address(backbone: str) -> str | None:
    """Where PEFT finds a backbone, called from anywhere: a name on the hub, an absolute path, None for scratch."""
    path = TINY if backbone == "tiny" else Path(backbone)
    return None if backbone == "scratch" else str(path.resolve()) if path.is_dir() else backbone


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


# --- Main -------------------------------------------------------------------------------------------------------------


def export_task(cfg: Config):
    """Write one task, or all, as PEFT folders, or one merged as a Hugging Face model folder."""
    if cfg.format == "peft":
        import_peft()  # fail now: loading the backbone may take minutes
    with torch.no_grad():
        run = open_run(cfg)
        layers = adapted_layers(run.model)
        if cfg.format == "peft" and isinstance(next(iter(layers.values())).adapter, SFT):
            raise UserError("--format peft: PEFT has no sparse fine-tuning, use --format merged")
        if cfg.task == "all":
            write_all(cfg, run)
        elif cfg.format == "peft":
            with new_folder(cfg) as folder:
                write_task(run, run.tasks[0], folder)
        else:
            k = run.select(run.tasks[0])  # before the folder is made: the file may be damaged
            folder = new_run_folder(cfg.output_dir)
            merge(run.model, k)
            save_backbone(run.model, run.tokenizer, folder)
    what = f"{len(run.tasks)} tasks" if cfg.task == "all" else f"task {cfg.task}" if cfg.task else "one adapter"
    print(f"{what}, {len(layers)} layers, saved in {cfg.output_dir}")


@contextmanager
def new_folder(cfg: Config):
    """Write to the folder that this yields, which then becomes --output-dir; a UserError leaves nothing behind."""
    folder = new_run_folder(cfg.output_dir)
    try:
        with whole_folder(folder) as temporary:
            yield temporary
    except UserError:
        folder.rmdir()  # it is empty
        raise


def write_task(run: Run, task: str, folder: Path):
    """Write a task's adapter and its card into a folder."""
    write_peft(run.model, params := run.adapter_of(task), run.backbone, folder)
    size = sum(p.numel() for layer in params.values() for p in layer.values())
    card = card_of_task(run.source, task, run.backbone, run.model, size)
    (folder / "README.md").write_text(card, encoding="utf-8")


RESERVED = ("index.json", "README.md")  # beside the folders of tasks


def write_all(cfg: Config, run: Run):
    """Write a folder for each task, one after another, with index.json and a card of the whole.

    Raises UserError if a task's name cannot be a folder's, or its file is damaged.
    """
    for k, name in enumerate(run.tasks):
        if not is_folder_name(name) or not name.isprintable() or name in (*RESERVED, *run.tasks[:k]):
            raise UserError(f"{cfg.checkpoint}: task {name!r:.60} cannot have a folder: export the others by name")
    with new_folder(cfg) as folder:
        for task in tqdm(run.tasks, desc="export", unit="task", disable=None):
            (folder / task).mkdir()
            write_task(run, task, folder / task)
        index = {"tasks": {task: task for task in run.tasks}, "base_model": address(run.backbone)}
        write_json(folder / "index.json", index | run.source.in_short() | {"checkpoint": cfg.checkpoint})
        card = card_of_all(run.source, run.tasks, run.backbone, run.model)
        (folder / "README.md").write_text(card, encoding="utf-8")


def check(cfg: Config):
    """Raise UserError for a flag that is missing or does not fit the format."""
    for name in ("checkpoint", "output_dir"):
        if not getattr(cfg, name):
            raise UserError(f"{as_flag(name)} is missing")
    for name in ("task", "split", "backbone", "dataset"):
        formats = ("peft", "merged") if name in ("task", "split") else ("run",)
        if getattr(cfg, name) and cfg.format not in formats:
            raise UserError(f"--{name} does not fit --format {cfg.format}: leave it out")
    if cfg.task == "all" and cfg.format == "merged":
        raise UserError("--task all fits --format peft alone, for a merged model is as large as the backbone: name one")
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
