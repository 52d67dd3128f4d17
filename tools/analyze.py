"""What routing learned: measures and figures of a run.

    python -m tools.analyze --checkpoint runs/NAME      a run of train.py; of adapt.py, variants all and z: Z alone
    python -m tools.analyze --checkpoint runs/NAME --step 300     as it was after step 300 (train.py --keep-every)
    python -m tools.analyze --compare runs/*            training curves, score against trained parameters, alignment

Prints a line for each router and the mean, and writes analysis.json and figures (PNG and SVG) to the run's folder
analysis/: Z as a heat map, the tree of tasks, the measures by layer, task similarities and gradient alignment; where
train.py kept adapters on the way, alignment and measures over steps.

The measures of Z are in `measures.py` (Polytropon section 4.3); here is `gradient_alignment` (MHR section 5.2, fig. 3).
Shape key, as in poly.py: t tasks, s skills, h heads.
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import explicit_flags, flag, one_job
from plumbing.folders import check_numbers, read_json, refuse_other_tasks, script_of, write_json


@dataclass
class Config:
    """Measure and draw what a run's routing learned, or compare runs."""

    checkpoint: str = flag("", "run folder of train.py, or of adapt.py with variant all or z")
    step: int = flag(0, "look at adapter-STEP.safetensors, which train.py --keep-every wrote; 0: at the end")
    compare: tuple = flag((), "run folders to compare in figures, instead of looking at one")
    tasks: str = flag("all", "all, or names of at least three tasks of the run joined by commas")
    examples: int = flag(32, "training examples per task for the gradient alignment")
    alignment: bool = flag(True, "measure the gradient alignment, the part that takes time")
    data_dir: str = flag("", "folder of the benchmark's files, if it has moved since training")
    output_dir: str = flag("", "where to write; none: CHECKPOINT/analysis, with --compare runs/analysis")
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one", ("auto", "cpu", "cuda"))


if __name__ == "__main__":  # read the flags before the slow imports, so that --help and mistakes answer at once
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
from tools import compare as comparison
from tools import figures
from tools.measures import MEASURES, allocations, flat, hierarchy, measure, overlap, recovery, task_similarity

ALIGNMENT = "gradient alignment (mean cosine)"  # a label of figures
USES = {  # the other flags that a job looks at, by its own
    "compare": ("output_dir",),
    "checkpoint": ("step", "tasks", "examples", "alignment", "data_dir", "output_dir", "device"),
}

# --- Gradients --------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(model: nn.Module):
    """A list to which every routed layer adds its mixture, each time that it runs in this context."""
    seen, routed = [], [layer for layer in adapted_layers(model).values() if hasattr(layer, "router")]
    for layer in routed:

        def adapters(*args, own=layer.adapters):
            found = own(*args)
            seen.extend(p for p in found.values() if p.requires_grad)
            return found

        layer.adapters = adapters
    try:
        yield seen
    finally:
        for layer in routed:
            del layer.adapters


def gradient_alignment(model, tokenizer, tasks: list[data.Task], ids: list[int], examples: int, lengths):
    """The cosine (t, t) between the loss gradients of each pair of tasks, and its mean over the pairs of different
    tasks (MHR section 5.2, figure 3 left): {"shared": (mean, matrix), "mixed": (mean, matrix)}.

    tasks[k] has the task id ids[k]; examples: how many of its training examples make its one batch (all, if it has
    fewer), the same ones at every call. lengths: (max_input, max_output) in tokens. The loss is `train.batch_loss` in
    evaluation mode, without routing noise or dropout. The paper does not say with respect to what. shared: all that is
    trained and shared, the inventories, without Z, of which each task has rows of its own; tasks that use other skills
    then have other gradients, whatever they want. mixed: each task's own mixture, so that only what it wants counts.
    Of one adapter for all both are the same. Memory: t gradients of each, in float32, twice while they are stacked.
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
            found = torch.autograd.grad(loss, [*shared, *mixed], materialize_grads=True)
        found = [g.detach().float().cpu() for g in found]
        own_mixture = [g.sum(0).flatten() for g in found[len(shared) :]]  # random by example: a mixture per example
        gradients["shared"].append(torch.cat([g.flatten() for g in found[: len(shared)]]))
        gradients["mixed"].append(torch.cat(own_mixture) if own_mixture else gradients["shared"][-1])
    model.train(was_training)
    return {of: cosines(torch.stack(rows)) for of, rows in gradients.items()}


def cosines(gradients: Tensor) -> tuple[float, np.ndarray]:
    """(t, n), which this overwrites, to the cosines (t, t) of its rows and their mean over pairs of different rows."""
    unit = gradients.div_(gradients.norm(dim=1, keepdim=True).clamp(min=1e-30))
    matrix = (unit @ unit.T).clamp(-1, 1).double().numpy()
    return float(matrix[np.triu_indices(len(matrix), 1)].mean()), matrix


# --- One run ----------------------------------------------------------------------------------------------------------


def analyze(cfg: Config) -> dict:
    """Measure the run in cfg.checkpoint, print it, and write analysis.json and figures; returns what the file holds."""
    if cfg.examples < 1 or cfg.step < 0:
        raise UserError("--examples must be above 0 and --step not negative")
    folder = Path(cfg.checkpoint)
    part = "".join(["-some-tasks" if cfg.tasks != "all" else "", f"-{cfg.step}" if cfg.step else ""])
    out = Path(cfg.output_dir or folder / f"analysis{part}")  # analysis/ is of the whole run: --compare reads it
    look = _adapted if script_of(folder) == "adapt.py" else _pretrained
    result, tasks, found = look(cfg, folder)
    names = [task.name for task in tasks]
    out.mkdir(parents=True, exist_ok=True)
    if found:
        similarity = task_similarity(found)
        result |= measure(found) | {"similarity": similarity.round(4).tolist()}
        table = true_table(tasks)
        if table is not None:
            result["recovery"] = recovery(similarity, table)
        draw_routing(found, result["layers"], similarity, table, names, out)
    draw_alignment(result, out)
    write_json(out / "analysis.json", {"checkpoint": str(folder), "step": cfg.step, "tasks": names} | result)
    print(report(result))
    print(f"analysis.json and figures are in {out}")
    return result


def _pretrained(cfg: Config, folder: Path):
    """A run of train.py: ({"alignment", "over_steps"}, tasks, allocations of the tasks)."""
    base = train.run_config(cfg.checkpoint, cfg.data_dir, cfg.device)
    if base.method == "full":
        raise UserError(f"--checkpoint {folder} is of method full: it has no adapters to look at")
    kept = {int(path.stem[8:]): path for path in folder.glob("adapter-*.safetensors") if path.stem[8:].isdecimal()}
    path = folder / (f"adapter-{cfg.step}.safetensors" if cfg.step else "adapter.safetensors")
    if not path.exists():
        steps = ", ".join(map(str, sorted(kept))) or "none"
        raise UserError(f"{path} does not exist: give a --step that train.py --keep-every has kept ({steps})")
    all_tasks = benchmarks.load_for(base, base.split, ("train",)).train
    refuse_other_tasks(folder, base.method, all_tasks)
    ids = choose(all_tasks, cfg.tasks)
    tasks, lengths = [all_tasks[t] for t in ids], (base.max_input, base.max_output)
    model, tokenizer = build_model(base, tasks=1)  # routers then take the file's number of tasks
    over_steps, result = [], {"method": base.method}
    for step in sorted(kept) if not cfg.step else []:
        load_adapter_file(model, kept[step])
        line, found = {"step": step}, {name: p[ids] for name, p in allocations(model).items()}
        if cfg.alignment:
            cosine = gradient_alignment(model, tokenizer, tasks, ids, cfg.examples, lengths)
            line |= {"alignment": cosine["shared"][0], "alignment_mixed": cosine["mixed"][0]}
        over_steps.append(line | (measure(found)["mean"] if found else {}))
    load_adapter_file(model, path)
    if cfg.alignment:
        cosine = gradient_alignment(model, tokenizer, tasks, ids, cfg.examples, lengths)
        mean, matrix = cosine["shared"]
        result["alignment"] = {"mean": mean, "mixed": cosine["mixed"][0], "examples": cfg.examples}
        result["alignment"]["matrix"] = matrix.round(4).tolist()
    if over_steps and len(over_steps[0]) > 1:  # of one adapter, without alignment, there is nothing to say
        result["over_steps"] = over_steps
    return result, tasks, {name: p[ids] for name, p in allocations(model).items()}


def _adapted(cfg: Config, folder: Path):
    """A run of adapt.py, first split: ({"method"}, tasks, their allocations, each from its own file)."""
    run = adapted_config(folder, cfg.data_dir, cfg.device)
    if run.variant not in ("all", "z") or cfg.step:
        what = f"--step {cfg.step} is for runs of train.py" if cfg.step else f"variant {run.variant} has no routing"
        raise UserError(f"--checkpoint {folder} is a run of adapt.py: {what}, leave it out")
    run = dataclasses.replace(run, split=run.split[:1])
    base, tasks, parts = adapt.base_config(run), [], defaultdict(list)
    at_random = base.method == "random" and base.random_by == "example"  # a new task then has all skills: no table
    for _, task, model, _, _ in () if at_random else load_adapted(run, folder):
        tasks.append(task)
        for name, p in allocations(model).items():
            parts[name].append(p)
    if not parts:
        raise UserError(f"--checkpoint {folder} is of a method without probabilities of skills: nothing to look at")
    ids = choose(tasks, cfg.tasks)
    return {"method": base.method}, [tasks[t] for t in ids], {name: np.concatenate(p)[ids] for name, p in parts.items()}


def choose(tasks: list[data.Task], names: str) -> list[int]:
    """--tasks to the numbers of tasks that have training examples. UserError for an unknown name or fewer than 3."""
    known = {task.name: t for t, task in enumerate(tasks) if len(task.train)}
    wanted = list(known) if names == "all" else list(dict.fromkeys(names.split(",")))
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"--tasks {unknown[0]} is no task of this run with examples: choose from {', '.join(known)}")
    if len(wanted) < 3:
        raise UserError(f"--tasks {names}: {len(wanted)} tasks are too few to compare, give three or more")
    return [known[name] for name in wanted]


def true_table(tasks: list[data.Task]) -> np.ndarray | None:
    """The true table (t, s') of tasks (t, skills known, `strings`, else one column a group), None if nothing is known
    of one of them or all have the same."""
    if not all(task.skills or task.group for task in tasks):
        return None
    table = given_table("expert", tasks, skill_names("expert", tasks)).numpy()
    return None if (table == table[0]).all() else table


def report(result: dict) -> str:
    """The measures as text: a line for each router and their mean, recovery, alignment."""
    lines = []
    if "layers" in result:
        rows = [(name, *(f"{v[m]:.3f}" for m in MEASURES)) for name, v in result["layers"].items()]
        rows.append(("mean", *(f"{result['mean'][m]:.3f}" for m in MEASURES)))
        lines.append(aligned([("router, by its first layer", *MEASURES), *rows], left=1))
    else:
        lines.append(f"method {result['method']} has no probabilities of skills: no measures of Z")
    if "recovery" in result:
        text = "correlation {correlation:.3f}, 95 % interval {low:.3f} to {high:.3f}, p {p:.4f}; by chance {chance:.3f}"
        text = f"recovery of the true table: {text}, 95 % of the time below {{chance_95:.3f}}"
        lines.append(text.format(**result["recovery"]))
    for line in result.get("over_steps", []):
        lines.append(f"step {line['step']}: " + ", ".join(f"{k} {v:.3f}" for k, v in line.items() if k != "step"))
    if "alignment" in result:
        mean, mixed = (result["alignment"][key] for key in ("mean", "mixed"))
        lines.append(f"gradient alignment, mean cosine over pairs of tasks: {mean:.3f}, of their mixtures {mixed:.3f}")
    return "\n".join(lines)


def draw_routing(found, layers: dict, similarity: np.ndarray, table, names: list[str], out: Path):
    """The figures of Z. The one router that is shown alone is the most discrete."""
    tree = hierarchy(similarity)
    order = figures.leaves_list(tree)
    one = max(layers, key=lambda name: layers[name]["discreteness"])
    figures.allocation(found[one], one, flat(found), names, tree, out / "allocation")
    figures.task_tree(tree, names, out / "tasks")
    by_measure = {m: [values[m] for values in layers.values()] for m in MEASURES}
    figures.by_layer(by_measure, list(layers), out / "layers")
    panels = {"learned\n(cosine of allocations)": similarity[order][:, order]}
    if table is not None:
        panels["true\n(share of skills in common)"] = overlap(table)[order][:, order]
    figures.matrices(panels, out / "similarity", "similarity of two tasks")


def draw_alignment(result: dict, out: Path):
    """The figures of gradients, where they were measured: the matrix, and the mean and the measures over steps."""
    if "alignment" in result:
        matrix = np.array(result["alignment"]["matrix"])
        order = figures.leaves_list(hierarchy(np.array(result.get("similarity", (1 + matrix) / 2))))
        panels = {"": matrix[order][:, order]}
        figures.matrices(panels, out / "alignment", "cosine of two tasks' gradients", signed=True)
    if lines := result.get("over_steps"):
        if "alignment" in lines[0]:
            over = {result["method"]: [columns(lines, "alignment")]}
            figures.over_steps({"": over}, out / "alignment-over-steps", ALIGNMENT)
        if "usage" in lines[0]:
            series = {m: [columns(lines, m)] for m in MEASURES}
            figures.over_steps({"": series}, out / "measures-over-steps", "measure of Z, mean over layers")


# --- Several runs -----------------------------------------------------------------------------------------------------


def compare(cfg: Config):
    """Figures of several runs, and `tools/compare.py`'s table: training curves and, where `analyze` has measured it,
    alignment over steps of runs of train.py; score against trained parameters of runs of adapt.py. Runs that differ in
    their seed only are one line or point."""
    out = Path(cfg.output_dir or "runs/analysis")
    print(comparison.compare(cfg.compare))
    curves, alignment, points = defaultdict(list), defaultdict(list), defaultdict(list)
    labels = labels_of([Path(folder) for folder in cfg.compare])
    for folder, label in labels.items():
        result = read_json(folder / "result.json", parameters=dict)
        if "splits" in result:
            check_numbers(folder / "result.json", {"mean": result.get("mean")})
            points[label].append((sum(result["parameters"].values()), result["mean"]))
            continue
        curves[label].append(columns_of(folder / "log.jsonl", "loss"))
        measured = folder / "analysis" / "analysis.json"
        if measured.exists() and (found := columns_of(measured, "alignment"))[0]:
            alignment[label].append(found)
    for label, seeds in (*curves.items(), *alignment.items()):
        if not set.intersection(*(set(steps) for steps, _ in seeds)):
            raise UserError(f"--compare: the runs of {label} have no step in common to draw: give one of them")
    out.mkdir(parents=True, exist_ok=True)
    if curves:
        figures.over_steps({"": curves}, out / "training", "training loss (nats per token)", log=True)
    if alignment:
        figures.over_steps({"": alignment}, out / "alignment-over-steps", ALIGNMENT)
    if points:
        places = {label: {"": (v[0][0], *figures.mean_std([s for _, s in v]))} for label, v in points.items()}
        figures.performance({"": places}, out / "performance", "mean score of held-out tasks (%)")
    print(f"figures are in {out}")


def columns(lines: list[dict], name: str) -> tuple[list, list]:
    """(steps, values of this name)."""
    return [line["step"] for line in lines], [line[name] for line in lines]


def columns_of(path: Path, name: str) -> tuple[list, list]:
    """`columns` of a log.jsonl, or of an analysis.json, which may have none. Raises UserError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            lines = found.get("over_steps", []) if name in found else []  # --no-alignment: measures of Z alone
        elif not (lines := [json.loads(line) for line in text.splitlines()]):
            raise ValueError  # a finished run has logged its last step
        for line in lines:
            check_numbers(path, {key: line[key] for key in ("step", name)})
        return columns(lines, name)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}, leave this run out") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} was changed by hand: leave this run out") from None


def labels_of(folders: list[Path]) -> dict[Path, str]:
    """A short label for each finished run: `tools/compare.py`'s, without its settings (words with "=") where those are
    not needed to tell them apart. Raises UserError for runs of several data sets, or if none has finished."""
    full = {folder: comparison.name_of_run(folder) for folder in folders if (folder / "result.json").is_file()}
    if len({dataset for _, dataset in full.values()}) != 1:
        names = ", ".join(sorted({dataset for _, dataset in full.values()})) or "none that has finished"
        raise UserError(f"--compare: give finished runs of one data set, these are of {names}")
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
