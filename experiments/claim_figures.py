"""The figures of results/claims.md and what they show, in words; a claim names its own in FIGURES."""

from pathlib import Path

import numpy as np

from experiments import scarce
from experiments.claims import AS_ONE, EXTRA, GRAINS, HEADS, ROUTED_OR_NOT, SHAPES, SKILLS
from experiments.verdicts import Values, judge
from tools import figures


def shown(name: str) -> str:
    """The name of a measure on pages and in figures: Poly-μ for Poly-mu, (IA)³ for (IA)^3."""
    return name.replace("-mu", "-μ").replace("(IA)^3", "(IA)³")


SCORE = "exact match on held-out tasks (%)"


def reference(measured: dict[str, Values]) -> str:
    """The measure that a dot plot has a dashed line at, or ""."""
    usual = ("LoRA (Shared)", "LoRA (Shared), told", "LoRA, s = 1", "LoRA, told, s = 1")
    return next((name for name in usual if name in measured), "")


def draw_dots(measured: dict[str, Values], stem: Path, label: str):
    values = {shown(name): list(of.values) for name, of in measured.items()}
    figures.by_method(values, stem, label, figures.PERCENT, reference(measured))


def by_size(method: str, unit: str, sizes: tuple[int, ...], own: int) -> dict[str, str]:
    """{size: its measure} of a curve; own: the recipe's size, whose measure has the bare name of the method."""
    return {str(k): method if k == own else f"{method}, {k} {unit}" for k in sorted((*sizes, own))}


CURVES = {  # {panel: {curve: {point: its measure}}}; MHR with one head is Poly
    "new task": {
        "heads and skills": {
            "MHR-z by heads": {"1": "Poly-z"} | by_size("MHR-z", "heads", HEADS, 8),
            "Poly-z by skills": by_size("Poly-z", "skills", SKILLS, 4),
        },
        "who shares a router": {
            "MHR-z by who shares": {"linear": "MHR-z"} | {grain: f"MHR-z by {grain}" for grain in GRAINS},
            "MHR": {"": "MHR"},
            "Poly": {"": "Poly"},
        },
    },
    "trained": {
        "": {
            "MHR by heads": {"1": "Poly"} | by_size("MHR", "heads", HEADS, 8),
            "Poly by skills": by_size("Poly", "skills", SKILLS, 4),
        },
    },
}


def draw_parameters(measured: dict[str, Values], stem: Path, which: str, when: str):
    def point(name: str) -> tuple[float, list[float]]:
        return measured[name].lines[0][which], list(measured[name].values)

    panels = {
        title: {label: {mark: point(name) for mark, name in of.items()} for label, of in curves.items()}
        for title, curves in CURVES[which].items()
    }
    figures.performance(panels, stem, SCORE, when)


USUAL, SCARCE = {name: "" for name in ROUTED_OR_NOT}, {"LoRA": ", s = 1", "Poly": ", s = 2", "MHR": ", s = 2"}


def draw_alignment(measured: dict[str, Values], stem: Path, sizes: dict[str, str]):
    panels = {
        title: {
            f"{name}{size}": [
                ([int(k) for k in v], list(v.values())) for v in measured[f"alignment of {name}, {of}{size}"].raw
            ]
            for name, size in sizes.items()
        }
        for of, title in (("inventory", "the shared inventory"), ("mixtures", "each task's own mixture"))
    }
    figures.over_steps(panels, stem, "cosine of tasks' gradients", figures.COSINE)


LABELS = {"discreteness": "discreteness", "sparsity": "sparsity (share on)", "usage": "usage"}  # of SHAPES
SEEN = ("seen tasks", "score on seen tasks", 100)  # measure, label, divisor


def draw_by_skills(measured: dict[str, Values], stem: Path):
    sizes, series = sorted({*SKILLS, 4}), {}
    for what, label, scale in (*((shape, LABELS[shape], 1) for shape in SHAPES), SEEN):
        values = np.array([measured[f"{what}, {s} skills"].values for s in sizes]) / scale
        series[label] = [(sizes, seed.tolist()) for seed in values.T]
    figures.over_sizes(series, stem, "share, or measure of Z", figures.UNIT, "skills in the inventory")


def draw_zero_shot(measured: dict[str, Values], stem: Path):
    series = {}
    for name in AS_ONE.values():
        values = np.array([measured[f"{name}, told, +{k} steps"].values for k in EXTRA])
        series[shown(name)] = [(EXTRA, seed) for seed in values.T.tolist()]
    figures.over_steps({"": series}, stem, SCORE, figures.PERCENT, "steps of training after averaging")


def draw_tasks_per_skill(measured: dict[str, Values], stem: Path):
    kinds = (("seen tasks", "", ", seen"), ("held-out, all", "", ""), ("held-out, z", "-z", ""))
    series = {}
    for label, variant, seen in (*kinds, ("held-out, μ", "-mu", "")):
        pairs = [[measured[f"{m}{variant}, s = {s}{seen}"].values for m in scarce.ROUTED] for s in scarce.SKILLS]
        judged = [judge(mhr, ">", poly) for poly, mhr in pairs]
        series[label] = [
            (scarce.TASKS / s, one.difference, *one.interval) for s, one in zip(scarce.SKILLS, judged, strict=True)
        ]
    figures.differences(
        series, stem, "training tasks for each skill", "MHR - Poly (points)", {15: "CrossFit", 39: "T0"}
    )


def draw_over_heads(measured: dict[str, Values], stem: Path):
    heads = sorted((1, 16, *scarce.OTHER_HEADS))
    name = lambda h, v: {1: f"Poly{v}, s = 2", 16: f"MHR{v}, s = 2"}.get(h, f"MHR{v}, s = 2, h = {h}")  # noqa: E731
    series = {}
    for label, variant, seen in (("seen tasks", "", ", seen"), ("held-out, all", "", ""), ("held-out, z", "-z", "")):
        values = np.array([measured[f"{name(h, variant)}{seen}"].values for h in heads])
        series[label] = [(heads, seed.tolist()) for seed in values.T]
    figures.over_sizes(series, stem, "exact match (%)", figures.PERCENT, "heads")


def draw_recovery(measured: dict[str, Values], stem: Path):
    values, bars = {}, {}
    for name in ("Poly", "MHR"):
        values[name] = list(measured[f"recovery by {name}"].values)
        bars[name] = tuple(measured[f"recovery by {name}, {bound} bound"].values.mean() for bound in ("lower", "upper"))
        values[f"{name}, chance (95 % point)"] = list(measured[f"recovery by {name}, chance (95 % point)"].values)
    says = "Bars: 95 % interval of a bootstrap over tasks, mean over seeds; chance: ± one standard deviation."
    label = "rank correlation of Z and the true table"
    figures.by_method(values, stem, label, figures.UNIT, bars=bars, says=says)


def draw_two_speeds(measured: dict[str, Values], stem: Path):
    values = {
        f"{label}, {speeds}": list(measured[f"{what}, {of}"].values / scale)
        for what, label, scale in (("discreteness", "discreteness", 1), SEEN)
        for of, speeds in (("4 skills", "two speeds"), ("one speed", "one speed"))
    }
    figures.by_method(values, stem, "measure of Z; share of exact matches", figures.UNIT)


def draw_shapes(measured: dict[str, Values], stem: Path):
    values = {LABELS[name.split(",")[0]]: list(of.values) for name, of in measured.items()}
    figures.by_method(values, stem, "measure of Z", figures.UNIT)


ALIGNMENT = (
    "Two panels of three curves, {}, Poly and MHR: the cosine of tasks' gradients over the steps of training, with "
    "bars of one standard deviation; left of the shared inventory, right of each task's own mixture."
)
A_DOT_PLOT = "A dot plot, a row for each measure: grey dots are seeds, diamonds their means, bars"
ALTS = {  # what the figures of FIGURES show, for those who do not see them
    "dots": f"{A_DOT_PLOT} one standard deviation, along an axis of {SCORE}.",
    "two_speeds": f"{A_DOT_PLOT} one standard deviation, along an axis from 0 to 1: discreteness of Z and share of "
    "exact matches on seen tasks, each with two learning rates and with one.",
    "recovery": f"{A_DOT_PLOT} the 95 % interval of a bootstrap over tasks, along an axis of the rank correlation of Z "
    "and the true table.",
    "few_shot_parameters": f"Two panels of curves, {SCORE} against the parameters trained for a new task, with bars of "
    "one standard deviation: left by number of heads and of skills, right by which layers share a router.",
    "multi_task_parameters": f"Two curves, {SCORE} against the parameters trained on all tasks, with bars of one "
    "standard deviation: MHR by number of heads, Poly by number of skills.",
    "alignment": ALIGNMENT.format("LoRA (Shared)"),
    "alignment_scarce": ALIGNMENT.format("LoRA"),
    "shapes": f"{A_DOT_PLOT} one standard deviation, along an axis from 0 to 1: discreteness, usage and sparsity of Z.",
    "zero_shot": f"Three curves, {SCORE} over steps of training after averaging, with bars of one standard "
    "deviation: LoRA (Shared), Poly-μ and MHR-μ.",
    "by_skills": "Four curves over the number of skills, 2 to 32, from 0 to 1 with bars of one standard deviation: "
    "discreteness, sparsity and usage of Z, and the score on seen tasks.",
    "tasks_per_skill": "Four curves over the number of training tasks for each skill, 8 to 32, with dotted "
    "lines at the papers' 15 and 39: MHR minus Poly in points, with bars of 95 % intervals, on seen tasks and on "
    "held-out tasks by variant.",
    "over_heads": "Three curves over the number of heads, 1 to 32, with bars of one standard deviation: exact match on "
    "seen tasks, and on held-out tasks by variant.",
}
FIGURES = {
    "dots": lambda measured, stem: draw_dots(measured, stem, SCORE),
    "two_speeds": draw_two_speeds,
    "recovery": draw_recovery,
    "few_shot_parameters": lambda measured, stem: draw_parameters(measured, stem, "new task", "for a new task"),
    "multi_task_parameters": lambda measured, stem: draw_parameters(measured, stem, "trained", "on all tasks"),
    "alignment": lambda measured, stem: draw_alignment(measured, stem, USUAL),
    "alignment_scarce": lambda measured, stem: draw_alignment(measured, stem, SCARCE),
    "shapes": draw_shapes,
    "zero_shot": draw_zero_shot,
    "by_skills": draw_by_skills,
    "tasks_per_skill": draw_tasks_per_skill,
    "over_heads": draw_over_heads,
}
