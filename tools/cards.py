"""Model cards: the README.md beside the adapters that `tools.export` writes, in the form of the Hugging Face hub.

A card says what an adapter is, how to load it, its score if the run's result.json has one, how it was trained, and what
to cite. All of it comes from the files of the run.
"""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData
from torch import nn

import adapt
import train
from plumbing.flags import as_flag, unused
from plumbing.folders import check_numbers, read_json
from recipes import ROUTED

CITATION = Path(__file__).resolve().parents[1] / "CITATION.bib"
PAPERS = {"poly": "https://arxiv.org/abs/2202.13914", "mhr": "https://arxiv.org/abs/2211.03831"}
# The settings that matter, in this order; those without effect under the run's method are left out.
OF_PRETRAINING = (
    "dataset", "method", "adapter", "layers", "rank", "skills", "heads", "routing", "granularity", "random_by",
)  # fmt: skip
OF_ADAPTATION = ("variant", "split", "shots")
OF_BOTH = ("steps", "epochs", "batch_size", "optimizer", "lr", "lr_z", "seed")
ALL = (*OF_PRETRAINING, *OF_ADAPTATION, *OF_BOTH, "commit")


class Source(NamedTuple):
    """Where adapters come from."""

    folder: Path  # the run, of train.py or adapt.py
    base: train.Config  # of its pre-training
    adapted: adapt.Config | None = None  # of its adaptation
    split: str = ""  # of its adaptation

    @property
    def pretraining(self) -> Path:
        """The run folder of the pre-training."""
        return Path(self.adapted.checkpoint) if self.adapted else self.folder

    @property
    def adapter(self) -> str:
        """lora or ia3. (On a backbone that was trained in full, adapt.py puts a LoRA.)"""
        return "lora" if self.adapted and self.adapted.variant == "lora" else self.base.adapter

    @property
    def kind(self) -> str:
        """The kind of adapter, in words."""
        return f"LoRA of rank {self.base.rank}" if self.adapter == "lora" else "(IA)³"

    def in_short(self) -> dict:
        """What index.json says of all adapters: method, adapter, the rank of a LoRA, variant and split of adapt.py."""
        rank = {"rank": self.base.rank} if self.adapter == "lora" else {}
        new = {"variant": self.adapted.variant, "split": self.split} if self.adapted else {}
        return {"method": self.base.method, "adapter": self.adapter} | rank | new


def card_of_task(source: Source, task: str, backbone: str, model: nn.Module, size: int) -> str:
    """The card of one adapter. task: "" for all tasks, mu for the average of skills. size: how many numbers it has."""
    of = {"": "all tasks", "mu": "no task, the average of the skills"}.get(task) or code(task)
    what = f"A {source.kind} on {named(backbone)}: {size:,} parameters. {origin(source)}"
    lines = [
        f"from peft import {auto_class(model)}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {auto_class(model)}.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)',
    ]
    return card(source, backbone, f"{source.folder.resolve().name}: {of}", what, lines, scores(source, task))


def card_of_all(source: Source, tasks: list[str], backbone: str, model: nn.Module) -> str:
    """The card of a folder with one adapter for each task, in a subfolder of its name."""
    what = f"For each task a {source.kind} on {named(backbone)}; `index.json` names their folders. {origin(source)}"
    names = [task.replace(".", "_") for task in tasks[:2]]
    use = f"model.eval().generate(**batch, adapter_names={names})  # the task of each example"
    if source.adapter == "ia3":  # PEFT ignores adapter_names there
        use = f"model.set_adapter({names[0]!r})  # one task at a time: PEFT mixes only LoRAs in a batch"
    lines = [
        "import json",
        f"from peft import {auto_class(model)}",
        "",
        'tasks = json.load(open("index.json"))["tasks"]  # {task: folder}',
        f"model = {auto_class(model)}.from_pretrained('./' + next(iter(tasks.values())))",
        "for task, folder in tasks.items():",
        '    model.load_adapter(folder, adapter_name=task.replace(".", "_"))  # PEFT wants names without dots',
        use,
    ]
    return card(source, backbone, f"{source.folder.resolve().name}: {len(tasks)} tasks", what, lines, [])


def card(source: Source, backbone: str, title: str, what: str, lines: list[str], scores: list[str]) -> str:
    """A card in Markdown. lines: Python that loads the adapter. scores: the section about them, or nothing."""
    known = {} if is_local(backbone) else {"base_model": backbone}
    tags = list(dict.fromkeys([source.base.method, source.adapter]))
    load = ["In this folder:", "```python\n" + "\n".join(lines) + "\n```"]
    if backbone == "scratch":
        load = [f"Give `PeftModel.from_pretrained` {named(backbone)} and this folder."]
    elif is_local(backbone):
        load.append(
            "Before an upload, give the hub's name of the backbone: here as `base_model`, in adapter_config.json."
        )
    front = ModelCardData(**known, library_name="peft", tags=tags).to_yaml()
    return "\n\n".join(
        [
            f"---\n{front}\n---", f"# {title}", what, "## Load it", *load, *scores,
            "## How it was trained", settings(source), "## Citation",
            "```bibtex\n" + CITATION.read_text().strip() + "\n```\n",
        ]
    )  # fmt: skip


# --- Parts ------------------------------------------------------------------------------------------------------------


def is_local(backbone: str) -> bool:
    """Whether a backbone has no name on the hub, as far as can be told here."""
    return backbone in ("tiny", "scratch") or Path(backbone).is_dir()


def named(backbone: str) -> str:
    """A backbone in a sentence."""
    bundled = {"tiny": "the backbone `assets/tiny` of the code", "scratch": "the code's backbone `scratch`"}
    return bundled.get(backbone, code(backbone))


def code(text: str) -> str:
    """Any text as code in a line of Markdown."""
    line = " ".join(text.split())
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def auto_class(model: nn.Module) -> str:
    """PEFT's class that loads an adapter with its backbone."""
    return "AutoPeftModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoPeftModelForCausalLM"


def origin(source: Source) -> str:
    """How an adapter came about: by which method, and on how many tasks."""
    base, run = source.base, source.adapted
    method = f"[{base.method}]({PAPERS[base.method]})" if base.method in PAPERS else code(base.method)
    path = source.pretraining / "tasks.json"
    number = f"{len(read_json(path, tasks=list)['tasks'])} " if path.exists() else ""
    new = f", then on one new task (`adapt.py --variant {run.variant}`)" if run else ""
    mixed = " Its skills are mixed already: it is a plain adapter, with nothing left to route."
    mixed = mixed if base.method in ROUTED else ""
    return f"It was trained by the method {method} on {number}tasks of {code(base.dataset)}{new}.{mixed}"


def scores(source: Source, task: str) -> list[str]:
    """The section with a task's scores in the run's result.json; nothing if there are none."""
    path = source.folder / "result.json"
    found = read_json(path) if path.exists() else {}
    for key in ("splits", source.split, "metrics", task) if source.adapted else ("tasks", task):
        found = found.get(key) if isinstance(found, dict) else None
    if found is None:
        return []
    found = found if source.adapted else {"main metric": found}
    check_numbers(path, found)
    limit = source.adapted.test_examples if source.adapted else source.base.eval_examples
    on = f"{limit} test examples" if limit else "its test examples"
    return ["## Score", f"On {on}: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()) + "."]


def settings(source: Source) -> str:
    """A table of the settings that matter, with the commit of the code if the run knows it."""
    base, run = source.base, source.adapted
    columns = {"pre-training": chosen(base, source.pretraining, OF_PRETRAINING, unused(base, dict.fromkeys(ALL)))}
    if run:
        without = unused(base, dict.fromkeys(ALL), run.variant)
        columns["adaptation"] = chosen(run, source.folder, OF_ADAPTATION, without) | {"split": code(source.split)}
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in ALL]
    rows = [["", *columns], ["---"] * (1 + len(columns)), *(row for row in rows if any(row[1:]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def chosen(cfg, folder: Path, names: tuple[str, ...], without: list[str]) -> dict[str, str]:
    """The settings of a run by name, as code. without: flags that had no effect."""
    values = {name: getattr(cfg, name, "") for name in (*names, *OF_BOTH) if as_flag(name) not in without}
    path = folder / "provenance.json"
    values["commit"] = read_json(path, starts=list)["starts"][-1]["commit"] if path.exists() else ""
    empty = lambda name, value: value == "" or not value and name in ("steps", "epochs")  # noqa: E731
    return {name: code(str(value).replace("|", r"\|")) for name, value in values.items() if not empty(name, value)}
