"""What routing learned: measures and figures of a run.

    python analyze.py --checkpoint runs/NAME            a run of train.py; of adapt.py, variants all and z: Z alone
    python analyze.py --checkpoint runs/NAME --step 300     as it was after step 300 (train.py --keep-every)
    python analyze.py --compare runs/*                  training curves, score against trained parameters, alignment

Prints a line for each router and the mean, and writes analysis.json and figures (PNG and SVG) to the run's folder
analysis/: Z as a heat map, the tree of tasks, the measures by layer, task similarities and gradient alignment; where
train.py kept adapters on the way, alignment and measures over steps.

The measures are functions for others to import: `discreteness`, `sparsity` and `usage` of Z (Polytropon equations 5 to
7), `task_similarity` and `hierarchy` (its figure 6), `recovery` of a known task-skill table (in no paper), and
`gradient_alignment` (MHR section 5.2, figure 3).

Shape key, as in poly.py: t tasks, s skills, h heads. An allocation is p (t, s), or (t, h, s): the probability that a
task uses a skill (in a head).
"""

from dataclasses import dataclass

from config import UserError, exit_on_user_error, explicit_flags, flag, read_config, read_json, write_json


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
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from scipy.special import entr
from scipy.stats import rankdata
from torch import nn
from tqdm import tqdm

import adapt
import data
import evaluate
import figures
import train
from backbone import build_model, load_adapter_file
from baselines.fixed import FixedRouter, given_table, skill_names
from inject import adapted_layers, routers, task_ids
from mhr import MHRRouter
from poly import PolyRouter

ALIGNMENT = "gradient alignment (mean cosine)"  # a label of figures

# --- Allocations, and measures of one ---------------------------------------------------------------------------------


def allocations(model: nn.Module) -> dict[str, np.ndarray]:
    """Each router's allocation, float64: {name of the first layer that it serves: (t, s), or (t, h, s) for mhr}.

    poly, mhr: sigmoid(Z), the probabilities of Polytropon equation 2, before a row is divided by its sum. A given table
    (expert, private, adapter-soup, random by task): the table. Other methods have no probability of a skill and give
    {}: one adapter for all; task-moe, whose weights compete for a sum of 1; hyperformer, whose weights have no bound;
    random by example.
    """
    first = {}
    for name, layer in adapted_layers(model).items():
        if hasattr(layer, "router"):
            first.setdefault(layer.router, name)  # a router that several layers share counts once
    found = {}
    for router, name in first.items():
        Z = router.Z.detach().double().cpu()
        if type(router) in (PolyRouter, MHRRouter):
            found[name] = torch.sigmoid(Z).numpy()
        elif type(router) is FixedRouter:
            found[name] = Z.numpy()
    return found


def discreteness(p: np.ndarray) -> float:
    """1 - mean over all cells of H(p) / log 2, H the entropy of a Bernoulli variable: 0 if all are 1/2, 1 if all are
    0 or 1 (Polytropon equation 5).

    The paper's text says what this returns; its formula lacks the "1 -" and gives the reverse.
    """
    entropy = entr(p) + entr(1 - p)
    return float(np.clip(1 - entropy.mean() / np.log(2), 0, 1))


def sparsity(p: np.ndarray) -> float:
    """The share of cells that are on, p rounded (Polytropon equation 6): 1 if every task uses every skill, so that less
    is sparser. Exactly 1/2 counts as off."""
    return float((p > 0.5).mean())


def usage(p: np.ndarray) -> float:
    """H(u) / log s, where u is the sum of p over tasks, divided by its total (Polytropon equation 7): 1 if all skills
    are used alike, 0 if only one is, or none.

    With heads: the mean over heads. A head that always takes the same skill is no balanced one, though another head may
    always take another. A single skill gives 1.
    """
    s = p.shape[-1]
    if s == 1:
        return 1.0
    columns = p.sum(0)  # (s,) or (h, s)
    total = columns.sum(-1, keepdims=True)
    share = columns / np.where(total > 0, total, 1)
    return float(np.clip(entr(share).sum(-1).mean() / np.log(s), 0, 1))


MEASURES = {"discreteness": discreteness, "sparsity": sparsity, "usage": usage}


def measure(allocations: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """{"layers": {router: {measure: value}}, "mean": {measure: mean over routers}}."""
    layers = {name: {m: f(p) for m, f in MEASURES.items()} for name, p in allocations.items()}
    return {"layers": layers, "mean": {m: statistics.fmean(v[m] for v in layers.values()) for m in MEASURES}}


# --- Tasks beside each other ------------------------------------------------------------------------------------------


def flat(allocations: dict[str, np.ndarray]) -> np.ndarray:
    """All allocations of a task beside each other: (t, n), n the skills of all routers and heads."""
    return np.concatenate([p.reshape(len(p), -1) for p in allocations.values()], axis=1)


def task_similarity(allocations: dict[str, np.ndarray]) -> np.ndarray:
    """(t, t): the cosine of two tasks' probabilities over all routers, heads and skills; between 0 and 1, 1 on the
    diagonal. A task that uses nothing is like no other."""
    rows = flat(allocations)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1)
    similarity = np.clip(rows @ rows.T, 0, 1)
    np.fill_diagonal(similarity, 1)
    return similarity


def hierarchy(similarity: np.ndarray) -> np.ndarray:
    """The tree of tasks, a scipy linkage (t - 1, 4): average linkage of 1 - similarity, like tasks side by side."""
    distance = squareform(1 - similarity, checks=False)
    return linkage(distance, "average", optimal_ordering=True)


def overlap(table: np.ndarray) -> np.ndarray:
    """(t, t): the skills that two tasks share, divided by those that either has (Jaccard), of a table (t, s) of 0 and
    1; 0 where neither has any."""
    on = (np.asarray(table) > 0).astype(float)
    both, sizes = on @ on.T, on.sum(1)
    return both / np.maximum(sizes[:, None] + sizes[None] - both, 1)


def recovery(similarity: np.ndarray, table: np.ndarray, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """How much of a true task-skill table (t, s') is in the similarity (t, t) that a model learned for the tasks.

    correlation: Spearman's, over all pairs of different tasks, between similarity and `overlap` of the table. Two tasks
    should be alike if they share skills, so learned skills need no match to true ones, and may be fewer or more. In
    chance the tasks' names are permuted (Mantel's test): `chance` the mean and `chance_95` the 95 % point of the
    correlation, `p` the share of permutations that reach the observed one, which counts as one of them. `low`, `high`:
    the 95 % interval of a bootstrap over tasks, percentiles; pairs of a task with itself, drawn twice, are left out,
    for they are alike whatever was learned. 0 where one side is the same for all pairs.
    Raises ValueError for fewer than three tasks, or a table of another number of tasks.
    """
    t = len(table)
    if t < 3 or similarity.shape != (t, t):
        raise ValueError(f"recovery needs three tasks or more and one table, not {similarity.shape} and {t} tasks")
    truth, rng = overlap(table), np.random.default_rng(seed)
    a, b = np.triu_indices(t, 1)
    observed = spearman(similarity[a, b], truth[a, b])
    orders = [rng.permutation(t) for _ in range(draws)]
    chance = np.array([spearman(similarity[o[a], o[b]], truth[a, b]) for o in orders])
    again = []
    for drawn in rng.integers(t, size=(draws, t)):
        i, j = drawn[a], drawn[b]
        different = i != j
        again.append(spearman(similarity[i, j][different], truth[i, j][different]))
    low, high = np.percentile(again, [2.5, 97.5])
    p = (1 + (chance >= observed - 1e-12).sum()) / (1 + draws)
    values = dict(correlation=observed, low=low, high=high, chance=chance.mean(), chance_95=np.percentile(chance, 95))
    return {name: float(value) for name, value in (values | {"p": p}).items()}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors; 0 if one of them is constant or empty, where it is not defined."""
    if len(x) == 0 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


# --- Gradients --------------------------------------------------------------------------------------------------------


def gradient_alignment(model, tokenizer, tasks: list[data.Task], ids: list[int], examples: int, lengths):
    """(mean, matrix): the cosine (t, t) between the loss gradients of each pair of tasks, and its mean over the pairs
    of different tasks (MHR section 5.2, figure 3 left).

    tasks[k] has the task id ids[k]; examples: how many of its training examples make its one batch (all, if it has
    fewer), the same ones at every call. lengths: (max_input, max_output) in tokens. The loss is `train.batch_loss` in
    evaluation mode, without routing noise or dropout. The paper does not say with respect to what: here all that is
    trained and shared, the inventories (or the one adapter), without Z, of which each task has rows of its own.
    Holds t gradients in float32: 64 tasks and 258,048 parameters are 66 MB.
    """
    own = {id(router.Z) for router in routers(model)}
    shared = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    gradients = torch.empty(len(tasks), sum(p.numel() for p in shared))
    was_training = model.training
    model.eval()
    bar = tqdm(tasks, "gradients", unit="task", disable=None, leave=False)
    for k, (task, t) in enumerate(zip(bar, ids, strict=True)):
        drawn = random.Random(0).sample(range(len(task.train)), min(examples, len(task.train)))  # files may be sorted
        items = [data.Item(t, example, example.outputs[0]) for example in (task.train[row] for row in drawn)]
        with task_ids([t] * len(items)):
            loss = train.batch_loss(model, tokenizer, items, *lengths)
            found = torch.autograd.grad(loss, shared, materialize_grads=True)
        gradients[k] = torch.cat([g.detach().float().flatten().cpu() for g in found])
    model.train(was_training)
    unit = gradients.div_(gradients.norm(dim=1, keepdim=True).clamp(min=1e-30))
    matrix = (unit @ unit.T).clamp(-1, 1).double().numpy()
    pairs = np.triu_indices(len(tasks), 1)
    return float(matrix[pairs].mean()), matrix


# --- One run ----------------------------------------------------------------------------------------------------------


def analyze(cfg: Config) -> dict:
    """Measure the run in cfg.checkpoint, print it, and write analysis.json and figures; returns what the file holds."""
    if cfg.examples < 1 or cfg.step < 0:
        raise UserError("--examples must be above 0 and --step not negative")
    folder = Path(cfg.checkpoint)
    out = Path(cfg.output_dir or folder / "analysis")
    look = _adapted if "checkpoint" in read_json(folder / "config.json") else _pretrained
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
    base = adapt.train_config(adapt.Config(checkpoint=str(folder), data_dir=cfg.data_dir, device=cfg.device))
    if base.method == "full":
        raise UserError(f"--checkpoint {folder} is of method full: it has no adapters to look at")
    kept = {int(path.stem[8:]): path for path in folder.glob("adapter-*.safetensors") if path.stem[8:].isdecimal()}
    path = folder / (f"adapter-{cfg.step}.safetensors" if cfg.step else "adapter.safetensors")
    if not path.exists():
        steps = ", ".join(map(str, sorted(kept))) or "none"
        raise UserError(f"{path} does not exist: give a --step that train.py --keep-every has kept ({steps})")
    all_tasks = train.load_tasks(base, base.split, ("train",)).train
    ids = choose(all_tasks, cfg.tasks)
    tasks, lengths = [all_tasks[t] for t in ids], (base.max_input, base.max_output)
    model, tokenizer = build_model(base, tasks=1)  # routers then take the file's number of tasks
    over_steps, result = [], {"method": base.method}
    for step in sorted(kept) if cfg.alignment and not cfg.step else []:
        load_adapter_file(model, kept[step])
        mean, _ = gradient_alignment(model, tokenizer, tasks, ids, cfg.examples, lengths)
        found = {name: p[ids] for name, p in allocations(model).items()}
        over_steps.append({"step": step, "alignment": mean} | (measure(found)["mean"] if found else {}))
    load_adapter_file(model, path)
    if cfg.alignment:
        mean, matrix = gradient_alignment(model, tokenizer, tasks, ids, cfg.examples, lengths)
        result["alignment"] = {"mean": mean, "examples": cfg.examples, "matrix": matrix.round(4).tolist()}
    if over_steps:
        result["over_steps"] = over_steps
    return result, tasks, {name: p[ids] for name, p in allocations(model).items()}


def _adapted(cfg: Config, folder: Path):
    """A run of adapt.py, first split: ({"method"}, tasks, their allocations, each from its own file)."""
    run = read_config(adapt.Config, folder / "config.json")
    if run.variant not in ("all", "z") or cfg.step:
        what = f"--step {cfg.step} is for runs of train.py" if cfg.step else f"variant {run.variant} has no routing"
        raise UserError(f"--checkpoint {folder} is a run of adapt.py: {what}, leave it out")
    run = dataclasses.replace(run, split=run.split[:1], data_dir=cfg.data_dir or run.data_dir, device=cfg.device)
    tasks, parts = [], defaultdict(list)
    for _, task, model, _, _ in adapt.load_adapted(run, folder):
        tasks.append(task)
        for name, p in allocations(model).items():
            parts[name].append(p)
    if not parts:
        raise UserError(f"--checkpoint {folder} is of a method without probabilities of skills: nothing to look at")
    ids, base = choose(tasks, cfg.tasks), adapt.train_config(run)
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
        lines.append(evaluate.aligned([("router, by its first layer", *MEASURES), *rows], left=1))
    else:
        lines.append(f"method {result['method']} has no probabilities of skills: no measures of Z")
    if "recovery" in result:
        text = "correlation {correlation:.3f}, 95 % interval {low:.3f} to {high:.3f}, p {p:.4f}; by chance {chance:.3f}"
        text = f"recovery of the true table: {text}, 95 % of the time below {{chance_95:.3f}}"
        lines.append(text.format(**result["recovery"]))
    for line in result.get("over_steps", []):
        lines.append(f"step {line['step']}: " + ", ".join(f"{k} {v:.3f}" for k, v in line.items() if k != "step"))
    if "alignment" in result:
        lines.append(f"gradient alignment, mean cosine over pairs of tasks: {result['alignment']['mean']:.3f}")
    return "\n".join(lines)


def draw_routing(found, layers: dict, similarity: np.ndarray, table, names: list[str], out: Path):
    """The figures of Z. The one layer that is shown alone is the most discrete."""
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
        over = {result["method"]: [columns(lines, "alignment")]}
        figures.over_steps(over, out / "alignment-over-steps", ALIGNMENT)
        if "usage" in lines[0]:
            series = {m: [columns(lines, m)] for m in MEASURES}
            figures.over_steps(series, out / "measures-over-steps", "measure of Z, mean over layers")


# --- Several runs -----------------------------------------------------------------------------------------------------


def compare(cfg: Config):
    """Figures of several runs, and `evaluate.compare`'s table: training curves and, where `analyze` has measured it,
    alignment over steps of runs of train.py; score against trained parameters of runs of adapt.py. Runs that differ in
    their seed only are one line or point."""
    out = Path(cfg.output_dir or "runs/analysis")
    print(evaluate.compare(cfg.compare))
    curves, alignment, points = defaultdict(list), defaultdict(list), defaultdict(list)
    labels = labels_of([Path(folder) for folder in cfg.compare])
    for folder, label in labels.items():
        result = read_json(folder / "result.json", parameters=dict)
        if "splits" in result:
            points[label].append((sum(result["parameters"].values()), result["mean"]))
            continue
        try:
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            curves[label].append(columns(lines, "loss"))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{folder / 'log.jsonl'} was changed by hand: leave this run out") from None
        measured = folder / "analysis" / "analysis.json"
        if measured.exists() and (lines := read_json(measured).get("over_steps")):
            alignment[label].append(columns(lines, "alignment"))
    out.mkdir(parents=True, exist_ok=True)
    if curves:
        figures.over_steps(curves, out / "training", "training loss (nats per token)", log=True)
    if alignment:
        figures.over_steps(alignment, out / "alignment-over-steps", ALIGNMENT)
    if points:
        places = {label: (v[0][0], *figures.mean_std([score for _, score in v])) for label, v in points.items()}
        figures.performance(places, out / "performance", "mean score of held-out tasks (%)")
    print(f"figures are in {out}")


def columns(lines: list[dict], name: str) -> tuple[list, list]:
    """(steps, values of this name)."""
    return [line["step"] for line in lines], [line[name] for line in lines]


def labels_of(folders: list[Path]) -> dict[Path, str]:
    """A short label for each finished run: `evaluate.compare`'s, without its settings (words with "=") where those are
    not needed to tell them apart. Raises UserError for runs of several data sets, or if none has finished."""
    full = {folder: evaluate.name_of_run(folder) for folder in folders if (folder / "result.json").is_file()}
    if len({dataset for _, dataset in full.values()}) != 1:
        names = ", ".join(sorted({dataset for _, dataset in full.values()})) or "none that has finished"
        raise UserError(f"--compare: give finished runs of one data set, these are of {names}")
    bare = lambda label: " ".join(w for w in label.split() if "=" not in w).replace(" -> ", "-")  # noqa: E731
    texts = {label for label, _ in full.values()}
    alone = {label: sum(bare(label) == bare(other) for other in texts) == 1 for label in texts}
    return {folder: bare(label) if alone[label] else label for folder, (label, _) in full.items()}


def main(flags: dict):
    """Look at one run, or compare several. Raises UserError if nothing is asked for."""
    cfg = Config(**flags)
    if cfg.compare:
        compare(cfg)
    elif cfg.checkpoint:
        analyze(cfg)
    else:
        raise UserError("give --checkpoint RUN to look at a run, or --compare RUN RUN ... to compare runs")


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
