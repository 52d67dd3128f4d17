"""What routing learned: measures and figures of a run.

    python -m tools.analyze --checkpoint runs/NAME      a run of train.py; of adapt.py, variants all and z: Z alone
    python -m tools.analyze --checkpoint runs/NAME --step 300     the same after step 300 (train.py --keep-every)
    python -m tools.analyze --compare runs/*            training curves, score against trained parameters, alignment

Prints the measures, each with how to read it, and their means by kind of sub-layer; with --routers also those of every
router. What is undefined says why. Writes analysis.json and figures (PNG and SVG) to the run's folder analysis/: Z as a
heat map, the tree of tasks, the measures by layer, task similarities and gradient alignment. If train.py kept adapters
during training, also alignment and measures over steps.

`tools/measures.py` has the measures of Z (Polytropon section 4.3), this file `gradient_alignment` (MHR section 5.2,
figure 3). Shape key, as in poly.py: t tasks, s skills, h heads.
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import explicit_flags, flag, one_job
from plumbing.folders import check_numbers, read_json, refuse_other_tasks, script_of, write_json


@dataclass
class Config:
    """Measure and draw what a run's routing learned, or compare runs.

    examples:
      python -m tools.analyze --checkpoint runs/strings-mhr-0
      python -m tools.analyze --compare runs/strings-mhr-0 runs/strings-poly-0
    """

    checkpoint: str = flag(
        "", "run folder of train.py, or of adapt.py with variant all or z", metavar="RUN", group="what to look at"
    )
    step: int = flag(0, "look at adapter-STEP.safetensors, of train.py --keep-every; 0: at the end", metavar="STEP")
    compare: tuple = flag((), "instead: run folders to compare in figures", metavar="RUN")
    tasks: str = flag("all", "all, or at least three tasks of the run, joined by commas", metavar="NAMES", group="how")
    examples: int = flag(32, "training examples per task for the gradient alignment")
    alignment: bool = flag(True, "measure the gradient alignment, the slow part")
    routers: bool = flag(False, "print one line a router")
    data_dir: str = flag("", "folder of the benchmark's files, if it has moved since training", metavar="DIR")
    output_dir: str = flag("", "where to write; none: CHECKPOINT/analysis, with --compare runs/analysis", metavar="DIR")
    device: str = flag("auto", "auto: cuda if there is one, else cpu", ("auto", "cpu", "cuda", "mps"))


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import dataclasses
import json
import random
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import adapt
import benchmarks
import data
import train
from baselines.fixed import given_table, skill_names
from evaluate import adapted_config, load_adapted
from inject import adapted_layers, routers, task_ids
from methods import build_model, load_adapter_file
from plumbing.backbones import advice_on_memory
from plumbing.tables import aligned
from recipes import LEARNED
from tools import compare as comparison
from tools import figures
from tools.measures import (
    MEASURES, allocations, flat, hierarchy, mean_of, measure, overlap, recovery, task_similarity,
)  # fmt: skip

ALIGNMENT = "gradient alignment (mean cosine)"  # a label of figures
READ = {  # how to read a measure
    "discreteness": "0: probabilities are 1/2 (at the start); 1: 0 or 1",
    "sparsity": "share of probabilities above 1/2; by chance about 1/2",
    "usage": "1: skills used alike (also by chance); 0: only one",
    "recovery": "rank correlation of Z with the true table, -1 to 1",
    "alignment": "mean cosine of tasks' gradients, -1 to 1; by chance 0",
    "of mixtures": "the same, of each task's own mixture of skills",
}
SHOWN = 8  # rows of a table that may be long
USES = {  # the companion flags of each job
    "compare": ("output_dir",),
    "checkpoint": ("step", "tasks", "examples", "alignment", "routers", "data_dir", "output_dir", "device"),
}

# --- Gradients --------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(model: nn.Module):
    """A list to which every routed layer adds its mixture each time it runs in this context."""
    seen, routed = [], [layer for layer in adapted_layers(model).values() if hasattr(layer, "router")]

    def record(layer: nn.Module, args: tuple, kwargs: dict):
        seen.extend(p for p in kwargs["params"].values() if p.requires_grad)

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in routed]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def gradient_alignment(model, tokenizer, tasks: list[data.Task], ids: list[int], examples: int, lengths):
    """Cosines (t, t) of the loss gradients of pairs of tasks, and their mean over pairs of different tasks.

    MHR section 5.2, figure 3 left. Returns {"shared": (mean, matrix), "mixed": (mean, matrix)}, since the paper does
    not say with respect to what:
    shared  all shared trained parameters: the inventories, not Z, which has rows of its own for each task. Tasks that
            use different skills have different gradients here, even if they want the same update.
    mixed   each task's own mixture of skills, so that only the update it wants counts.
    With one adapter for all tasks both are the same.

    tasks[k] has the task id ids[k]. examples: the size of its one batch of training examples (all, if it has fewer),
    the same at every call. lengths: (max_input, max_output) in tokens. The loss is `train.batch_loss` in evaluation
    mode, without routing noise or dropout. Memory: t gradients of each kind in float32, twice that while stacking.
    """
    own = {id(router.Z) for router in routers(model)}
    shared = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    gradients, was_training = {"shared": [], "mixed": []}, model.training
    model.eval()
    bar = tqdm(tasks, "gradients", unit="task", disable=None, leave=False)
    for task, t in zip(bar, ids, strict=True):
        drawn = random.Random(0).sample(range(len(task.train)), min(examples, len(task.train)))  # files may be sorted
        items = [data.Item(t, example, example.outputs[0]) for example in (task.train[row] for row in drawn)]
        with task_ids([t] * len(items)), recorded(model) as mixed:
            loss = train.batch_loss(model, tokenizer, items, *lengths)
            both = torch.autograd.grad(loss, [*shared, *mixed], materialize_grads=True)
        both = [g.detach().float().cpu() for g in both]
        own_mixture = [g.sum(0).flatten() for g in both[len(shared) :]]  # random by example: a mixture per example
        gradients["shared"].append(torch.cat([g.flatten() for g in both[: len(shared)]]))
        gradients["mixed"].append(torch.cat(own_mixture) if own_mixture else gradients["shared"][-1])
    model.train(was_training)
    return {of: cosines(torch.stack(rows)) for of, rows in gradients.items()}


def cosines(gradients: Tensor) -> tuple[float, np.ndarray]:
    """The cosines (t, t) of rows (t, n) and their mean over pairs of different rows. Overwrites `gradients`."""
    unit = gradients.div_(gradients.norm(dim=1, keepdim=True).clamp(min=1e-30))
    matrix = (unit @ unit.T).clamp(-1, 1).double().numpy()
    return float(matrix[np.triu_indices(len(matrix), 1)].mean()), matrix


# --- One run ----------------------------------------------------------------------------------------------------------


def analyze(cfg: Config) -> dict:
    """Measure the run in cfg.checkpoint, print and draw it; returns the content of analysis.json, which this writes."""
    if cfg.examples < 1 or cfg.step < 0:
        raise UserError("--examples must be above 0 and --step not negative")
    folder = Path(cfg.checkpoint)
    part = "".join(["-some-tasks" if cfg.tasks != "all" else "", f"-{cfg.step}" if cfg.step else ""])
    out = Path(cfg.output_dir or folder / f"analysis{part}")  # analysis/ is of the whole run: --compare reads it
    look = _adapted if script_of(folder) == "adapt.py" else _pretrained
    result, tasks, by_router = look(cfg, folder)
    names = [task.name for task in tasks]
    out.mkdir(parents=True, exist_ok=True)
    if by_router:
        similarity, table = task_similarity(by_router), true_table(tasks)
        result |= measure(by_router) | {"similarity": similarity.round(4).tolist()}
        unknown = {"undefined": "these tasks have no true table"}
        result["recovery"] = unknown if table is None else recovery(similarity, table)
        draw_routing(by_router, result["layers"], similarity, table, names, out)
    draw_alignment(result, out)
    write_json(out / "analysis.json", {"checkpoint": str(folder), "step": cfg.step, "tasks": names} | result)
    print(report(result, len(names), cfg.routers))
    print(f"\nanalysis.json and figures are in {out}")
    return result


def _pretrained(cfg: Config, folder: Path):
    """A run of train.py: ({"method", "granularity", "alignment", "over_steps"}, tasks, allocations of the tasks)."""
    base = train.run_config(cfg.checkpoint, cfg.data_dir, cfg.device)
    if base.method == "full":
        raise UserError(f"--checkpoint {folder} is of method full: it has no adapters to look at")
    kept = {int(path.stem[8:]): path for path in folder.glob("adapter-*.safetensors") if path.stem[8:].isdecimal()}
    path = folder / (f"adapter-{cfg.step}.safetensors" if cfg.step else "adapter.safetensors")
    if not path.exists():
        steps = ", ".join(map(str, sorted(kept))) or "none"
        raise UserError(f"{path} does not exist: give a --step that train.py --keep-every kept ({steps})")
    all_tasks = benchmarks.load_for(base, base.split, ("train",)).train
    refuse_other_tasks(folder, base.method, all_tasks)
    ids = choose(all_tasks, cfg.tasks)
    tasks, lengths = [all_tasks[t] for t in ids], (base.max_input, base.max_output)
    model, tokenizer = build_model(base, tasks=1)  # routers then take the file's number of tasks
    over_steps, result = [], {"method": base.method, "granularity": base.granularity}
    for step in sorted(kept) if not cfg.step else []:
        load_adapter_file(model, kept[step])
        line, by_router = {"step": step}, {name: p[ids] for name, p in allocations(model).items()}
        if cfg.alignment:
            cosine = gradient_alignment(model, tokenizer, tasks, ids, cfg.examples, lengths)
            line |= {"alignment": cosine["shared"][0], "alignment_mixed": cosine["mixed"][0]}
        over_steps.append(line | (measure(by_router)["mean"] if base.method in LEARNED and by_router else {}))
    load_adapter_file(model, path)
    if cfg.alignment:
        cosine = gradient_alignment(model, tokenizer, tasks, ids, cfg.examples, lengths)
        mean, matrix = cosine["shared"]
        result["alignment"] = {"mean": mean, "mixed": cosine["mixed"][0], "examples": cfg.examples}
        result["alignment"]["matrix"] = matrix.round(4).tolist()
    if over_steps and len(over_steps[0]) > 1:  # without alignment one adapter, or a fixed table, has nothing to say
        result["over_steps"] = over_steps
    return result, tasks, {name: p[ids] for name, p in allocations(model).items()}


def _adapted(cfg: Config, folder: Path):
    """The first split of a run of adapt.py: (as `_pretrained`, tasks, allocations, each task's from its own file)."""
    run = adapted_config(folder, cfg.data_dir, cfg.device)
    if run.variant not in ("all", "z") or cfg.step:
        what = f"--step {cfg.step} is for runs of train.py" if cfg.step else f"variant {run.variant} has no routing"
        raise UserError(f"--checkpoint {folder} is a run of adapt.py: {what}, leave it out")
    run = dataclasses.replace(run, split=run.split[:1])
    base, tasks, parts = adapt.base_config(run), [], defaultdict(list)
    at_random = base.method == "random" and base.random_by == "example"  # a new task then uses all skills: no table
    for _, task, model, _, _ in () if at_random else load_adapted(run, folder):
        tasks.append(task)
        for name, p in allocations(model).items():
            parts[name].append(p)
    if not parts:
        raise UserError(f"--checkpoint {folder} is of a method without probabilities of skills: nothing to look at")
    ids = choose(tasks, cfg.tasks)
    result = {"method": base.method, "granularity": base.granularity}
    return result, [tasks[t] for t in ids], {name: np.concatenate(p)[ids] for name, p in parts.items()}


def choose(tasks: list[data.Task], names: str) -> list[int]:
    """The numbers of the --tasks, of those with training examples. UserError for an unknown name or fewer than 3."""
    known = {task.name: t for t, task in enumerate(tasks) if len(task.train)}
    wanted = list(known) if names == "all" else list(dict.fromkeys(names.split(",")))
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"--tasks {unknown[0]} is no task of this run with examples: choose from {', '.join(known)}")
    if len(wanted) < 3:
        raise UserError(f"--tasks {names}: {len(wanted)} tasks are too few to compare, give three or more")
    return [known[name] for name in wanted]


def true_table(tasks: list[data.Task]) -> np.ndarray | None:
    """The true table (t, s') of tasks: the skills of `strings`, elsewhere one column per group of tasks.

    None if nothing is known of one of them, or if all have the same.
    """
    if not all(task.skills or task.group for task in tasks):
        return None
    table = given_table("expert", tasks, skill_names("expert", tasks)).numpy()
    return None if (table == table[0]).all() else table


def report(result: dict, tasks: int, routers: bool = False) -> str:
    """The measures of so many tasks as text of at most 80 columns. routers: with a line for each of them."""
    parts, layers = [], result.get("layers", {})
    if layers:
        of = f"means over {len(layers)} routers" if len(layers) > 1 else "one router"
        fixed = "" if result["method"] in LEARNED else "; Z is fixed, not learned"
        parts.append(f"method {result['method']}, {tasks} tasks; of Z: {of}{fixed}")
    else:
        parts.append(f"method {result['method']} has no probabilities of skills: no measures of Z")
    rows = [("measure", "value", "how to read it"), *(rows_of_z(result) if layers else [])]
    if "alignment" in result:
        mean, mixed = (shown(result["alignment"][key]) for key in ("mean", "mixed"))
        rows += [("alignment", mean, READ["alignment"])]
        rows += [("  of mixtures", mixed, READ["of mixtures"])] if layers else []
    if len(rows) > 1:
        parts.append(aligned(rows, left=3))
    if kinds := by_kind(result):
        parts.append(aligned([("by kind of sub-layer", "routers", *MEASURES), *kinds], left=1))
    if "over_steps" in result:
        parts.append(table_over_steps(result["over_steps"], with_mixtures=bool(layers)))
    if routers and layers:
        each = [(name, *(shown(v[m]) for m in MEASURES)) for name, v in layers.items()]
        parts.append(aligned([("router, by its first layer", *MEASURES), *each], left=1))
    return "\n\n".join(parts)


def rows_of_z(result: dict) -> list[tuple[str, str, str]]:
    """The rows (measure, value, how to read it) of Z; the last column says why a value is undefined."""
    rows = [(m, shown(v), READ[m] if v is not None else "(there is one skill)") for m, v in result["mean"].items()]
    found = result["recovery"]
    if "undefined" in found:
        return [*rows, ("recovery", "undefined", f"({found['undefined']})")]
    rows.append(("recovery", shown(found["correlation"]), READ["recovery"]))
    rows.append(("", "", "95 % interval {low:.3f} to {high:.3f}".format(**found)))
    return [*rows, ("", "", "by chance 95 % are below {chance_95:.3f}; p {p:.4f}".format(**found))]


def shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def by_kind(result: dict) -> list[tuple[str, ...]]:
    """Rows (kind of sub-layer, routers, means of the measures); none if routers serve more than a sub-layer, or if the
    kinds are one or many."""
    kinds = defaultdict(list)
    for name, values in result.get("layers", {}).items():
        kinds[f"{figures.block(name)[0]} {'.'.join(name.split('.')[-2:-1])}".strip()].append(values)
    if result["granularity"] not in ("linear", "layer") or not 1 < len(kinds) <= SHOWN:
        return []
    means = {kind: mean_of(rows) for kind, rows in kinds.items()}
    return [(kind, str(len(kinds[kind])), *(shown(mean[m]) for m in MEASURES)) for kind, mean in means.items()]


def table_over_steps(lines: list[dict], with_mixtures: bool) -> str:
    """The values at kept steps, at most SHOWN of them: the first, the last and some between."""
    some = sorted({round(k) for k in np.linspace(0, len(lines) - 1, min(SHOWN, len(lines)))})
    names = {m: m for m in MEASURES} | {"alignment": "alignment", "alignment_mixed": "of mixtures"}
    names = {key: name for key, name in names.items() if key in lines[0] and (with_mixtures or "mix" not in key)}
    rows = [(str(lines[k]["step"]), *(shown(lines[k][key]) for key in names)) for k in some]
    title = "" if len(some) == len(lines) else f"{len(some)} of {len(lines)} kept steps; analysis.json has all\n"
    return title + aligned([("step", *names.values()), *rows], left=0)


def draw_routing(by_router, layers: dict, similarity: np.ndarray, table, names: list[str], out: Path):
    """The figures of Z. The router shown alone is the most discrete one."""
    tree = hierarchy(similarity)
    order = figures.leaves_list(tree)
    one = max(layers, key=lambda name: layers[name]["discreteness"])
    figures.allocation(by_router[one], one, flat(by_router), names, tree, out / "allocation")
    figures.task_tree(tree, names, out / "tasks")
    by_measure = {m: [values[m] for values in layers.values()] for m in MEASURES}
    figures.by_layer(by_measure, list(layers), out / "layers")
    panels = {"learned\n(cosine of allocations)": similarity[order][:, order]}
    if table is not None:
        panels["true\n(share of skills in common)"] = overlap(table)[order][:, order]
    figures.matrices(panels, out / "similarity", "similarity of two tasks")


def draw_alignment(result: dict, out: Path):
    """The figures of what was measured: cosines of gradients, their mean over steps, measures of Z over steps."""
    if "alignment" in result:
        matrix = np.array(result["alignment"]["matrix"])
        order = figures.leaves_list(hierarchy(np.array(result.get("similarity", (1 + matrix) / 2))))
        panels = {"gradients of what tasks share": matrix[order][:, order]}
        figures.matrices(panels, out / "alignment", "cosine of two tasks' gradients", signed=True)
    if lines := result.get("over_steps"):
        if "alignment" in lines[0]:
            over = {result["method"]: [columns(lines, "alignment")]}
            figures.over_steps({"": over}, out / "alignment-over-steps", ALIGNMENT, figures.COSINE)
        if "usage" in lines[0]:
            series = {m: [columns(lines, m)] for m in MEASURES if lines[0][m] is not None}
            label = "measure of Z, mean over layers"
            figures.over_steps({"": series}, out / "measures-over-steps", label, figures.UNIT)


# --- Several runs -----------------------------------------------------------------------------------------------------


def compare(cfg: Config):
    """Draw several runs, and print the table of `tools/compare.py`.

    Runs of train.py: training curves and, if `analyze` has measured it, alignment over steps. Runs of adapt.py: score
    against trained parameters. Runs that differ only in their seed make one line or point.
    """
    out = Path(cfg.output_dir or "runs/analysis")
    print(comparison.compare(cfg.compare))
    curves, alignment, points = defaultdict(list), defaultdict(list), defaultdict(list)
    labels = labels_of([Path(folder) for folder in cfg.compare])
    for folder, label in labels.items():
        result = read_json(folder / "result.json", parameters=dict)
        if script_of(folder) == "adapt.py":
            check_numbers(folder / "result.json", {"mean": result.get("mean")})
            points[label].append((sum(result["parameters"].values()), result["mean"]))
            continue
        curves[label].append(columns_of(folder / "log.jsonl", "loss"))
        measured = folder / "analysis" / "analysis.json"
        if measured.exists() and (over_steps := columns_of(measured, "alignment"))[0]:
            alignment[label].append(over_steps)
    for label, seeds in (*curves.items(), *alignment.items()):
        if not set.intersection(*(set(steps) for steps, _ in seeds)):
            raise UserError(f"--compare: the runs of {label} have no step in common to draw: give one of them")
    out.mkdir(parents=True, exist_ok=True)
    if curves:
        figures.over_steps({"": curves}, out / "training", "training loss (nats per token)", figures.LOSS)
    if alignment:
        figures.over_steps({"": alignment}, out / "alignment-over-steps", ALIGNMENT, figures.COSINE)
    if points:
        places = {label: {"": (seeds[0][0], [score for _, score in seeds])} for label, seeds in points.items()}
        figures.performance({"": places}, out / "performance", "mean score of held-out tasks (%)")
    print(f"figures are in {out}")


def columns(lines: list[dict], name: str) -> tuple[list, list]:
    """(steps, values of this name)."""
    return [line["step"] for line in lines], [line[name] for line in lines]


def columns_of(path: Path, name: str) -> tuple[list, list]:
    """`columns` of a log.jsonl, or of an analysis.json ([], [] if it lacks them). UserError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            analysis = json.loads(text)
            lines = analysis.get("over_steps", []) if name in analysis else []  # --no-alignment: measures of Z alone
        elif not (lines := [json.loads(line) for line in text.splitlines()]):
            raise ValueError  # a finished run has at least logged its last step
        for line in lines:
            check_numbers(path, {key: line[key] for key in ("step", name)})
        return columns(lines, name)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}, leave this run out") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} was changed by hand: leave this run out") from None


def labels_of(folders: list[Path]) -> dict[Path, str]:
    """A short label for each finished run: `tools/compare.py`'s, without settings (words with "=") if it stays unique.

    Raises UserError for runs of several data sets.
    """
    done = [folder for folder in folders if (folder / "result.json").is_file()]
    full = {folder: (str(name), dataset) for folder in done for name, dataset in [comparison.name_of_run(folder)]}
    if len(datasets := {dataset for _, dataset in full.values()}) > 1:
        raise UserError(f"--compare: give runs of one data set, these are of {', '.join(sorted(datasets))}")
    bare = lambda label: " ".join(w for w in label.split() if "=" not in w).replace(" -> ", "-")  # noqa: E731
    texts = {label for label, _ in full.values()}
    alone = {label: sum(bare(label) == bare(other) for other in texts) == 1 for label in texts}
    return {folder: bare(label) if alone[label] else label for folder, (label, _) in full.items()}


def main(flags: dict):
    """Look at one run, or compare several. Raises UserError if nothing is asked for, or both."""
    cfg = Config(**flags)
    one_job(cfg, flags, USES)
    if cfg.compare:
        compare(cfg)
    elif cfg.checkpoint:
        with advice_on_memory("--no-alignment, or fewer --tasks", then=""):
            analyze(cfg)
    else:
        raise UserError("give --checkpoint RUN to look at a run, or --compare RUN RUN ... to compare runs")


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
