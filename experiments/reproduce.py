"""The papers' claims at laptop scale: one command per claim, five seeds, verdicts by one rule.

    python -m experiments.reproduce --claim all                  make what is missing, then results/claims.md
    python -m experiments.reproduce --claim mu zero-shot         some claims only
    python -m experiments.reproduce --claim mu --results again --runs again/runs     from scratch, elsewhere

A measure is a number taken from a pre-training run on `strings`: its held-out score after an adaptation, its zero-shot
score, or a number of `tools/analyze.py`. results/claims.jsonl has one line per measure and seed, with the flags that
made it; a value is made again only if its flags change. Missing values are made by the project's own commands, in the
runs that `experiments/methods.py` makes too, two in parallel.

A claim is a list of comparisons between measures, seed by seed:

    a > b    holds: a is above b; fails: it is below (paired t-test over seeds, two-sided, p < 0.05)
    a <= b   holds: a is above b by less than MARGIN, or below it; fails: by more (one-sided, p < 0.05)
    a ~ b    holds: they differ by less than MARGIN (two one-sided tests); fails: by more (one-sided)

Otherwise it is undecided. b may be a number, and each side a difference of two measures. A claim holds if all its
comparisons hold, does not hold here if one of them fails, and is otherwise undecided. There is no correction for
multiple comparisons: of nine independent ones without a true difference, one in five claims would not hold. The tasks
are always the same; the seed sets everything else. The page says what was known when the rule was made.
"""

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()


import argparse
import json
import threading
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.claims import (
    AS_ONE, CLAIMS, EXTRA, GRAINS, HEADS, MEASURES, ROUTED_OR_NOT, SHAPES, SKILLS, Claim, Measure, measures_of,
    parts_of,
)  # fmt: skip
from experiments.methods import (
    KEEP_EVERY, METHODS, NAVIGATION, RATES, ROOT, RUNS, adapt, few_shot_rates, pretrain, run, workers,
)  # fmt: skip
from plumbing.errors import RunError, UserError, exit_on_user_error
from plumbing.folders import check_numbers
from recipes import FEW_SHOT, PRETRAINING, VARIANTS
from tools import analyze, figures

SEEDS = (0, 1, 2, 3, 4)
MARGIN = 5.0  # points of exact match: what counts as close


# --- Values: from the raw file, or from runs --------------------------------------------------------------------------


def flags_of(measure: Measure) -> str:
    """All that determines a measure but the seed: the key of its line in the raw file. RUNS names the recipe."""
    rates = f"{RATES[measure.method][0]} {measure.flags}".strip()
    few = " ".join(few_shot_rates(measure.method, measure.then)) if measure.then in VARIANTS else ""
    then = f"{measure.then} {few or measure.steps or ''}".strip()
    return f"{METHODS[measure.method][0]} {rates} | {then} | {RUNS.name}"


def read_raw(path: Path) -> dict[tuple[str, int], dict]:
    """{(flags, seed): line} of a raw file; {} if there is none. Raises UserError for a damaged line."""
    lines = {}
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            value, (before, after) = line["value"], line["seconds"]
            check_numbers(path, value if isinstance(value, dict) else {"value": value})
            check_numbers(path, {"trained": line["trained"], "seed": line["seed"], "before": before, "after": after})
            new, commits = line["new task"], line["commits"]
            if type(commits) is not list or [type(commit) for commit in commits] != [str, str]:
                raise ValueError
            if not (new is None or type(new) is int):
                raise ValueError
            lines[line["flags"], line["seed"]] = line
        except (ValueError, KeyError, TypeError, RecursionError, UserError):
            raise UserError(f"{path}:{number} is damaged: delete this line, its value is then made again") from None
    return lines


def make_missing(names: list[str], seeds: tuple[int, ...], path: Path, runs: Path, jobs: int):
    """Make the values of these measures that the raw file lacks, and append each one as soon as it is made."""
    have, groups = read_raw(path), defaultdict(list)
    for name in names:
        measure = MEASURES[name]
        for seed in seeds:
            if (flags_of(measure), seed) not in have:
                groups[seed, measure.method, measure.flags].append(measure)  # measures of one run
    lock = threading.Lock()

    def make(group):
        (seed, method, flags), measures = group
        rates = RATES[method][0].split()
        checkpoint, trained = pretrain(method, seed, runs, (*rates, *flags.split()))
        for measure in measures:
            value, new, seconds, commit = ask(measure, checkpoint, trained, seed)
            line = {"flags": flags_of(measure), "seed": seed, "value": value, "trained": total(trained)}
            line |= {"new task": new, "seconds": [trained["seconds"], seconds]}
            line |= {"commits": [trained["commit"], commit]}
            with lock, open(path, "a") as file:
                file.write(json.dumps(line) + "\n")

    with workers(jobs) as pool:
        list(pool.map(make, sorted(groups.items())))


def total(result: dict) -> int:
    return sum(result["parameters"].values())


def ask(measure: Measure, checkpoint: Path, trained: dict, seed: int) -> tuple[float | dict, int | None, float, str]:
    """(value, parameters trained for a new task, seconds of adaptation, commit) of a measure of a pre-training run.

    A value over training is {step: value}.
    """
    if measure.then == "seen":
        return trained["mean"], None, 0.0, trained["commit"]
    if measure.then in VARIANTS:
        result = adapt(checkpoint, measure.then, seed, few_shot_rates(measure.method, measure.then))
        return result["mean"], total(result), result["seconds"], result["commit"]
    if measure.then == "zero-shot":
        value, commit = zero_shot(measure, checkpoint, seed)
        return value, None, 0.0, commit
    folder = checkpoint / "analysis-of-claims"
    flags = ["--checkpoint", str(checkpoint), "--output-dir", str(folder)]
    same_run = (m for m in MEASURES.values() if (m.method, m.flags) == (measure.method, measure.flags))
    flags += [] if any(m.then.startswith("alignment") for m in same_run) else ["--no-alignment"]  # it takes a minute
    analysis = run("tools.analyze", flags, folder / "analysis.json")
    if measure.then.startswith("alignment"):
        return {line["step"]: line[measure.then] for line in analysis["over_steps"]}, None, 0.0, analysis["commit"]
    value = analysis
    for key in measure.then.split("."):
        if "undefined" in value:
            raise RunError(f"{folder}: {measure.then} is undefined ({value['undefined']}), look at this run's losses")
        value = value[key]
    return value, None, 0.0, analysis["commit"]


def zero_shot(measure: Measure, checkpoint: Path, seed: int) -> tuple[float, str]:
    """(held-out score without examples after measure.steps more steps, commit). Routed methods are averaged first."""
    routed = measure.method in ("Poly", "MHR")
    if not measure.steps:  # the score of an adaptation before its first step
        variant = "mu" if routed else "all"
        result = adapt(checkpoint, variant, seed, few_shot_rates(measure.method, variant))
        return result["mean_before"], result["commit"]
    more = checkpoint.with_name(f"{checkpoint.name}_{measure.steps}-more")
    flags = ["--from-run", str(checkpoint), "--steps", str(measure.steps), *(["--method", "mu"] if routed else [])]
    run("train.py", [*flags, "--resume", "--output-dir", str(more)], more / "result.json")
    flags = ["--checkpoint", str(more), "--zero-shot", "--split", str(seed), "--save", str(more / "zero-shot.json")]
    result = run("evaluate.py", flags, more / "zero-shot.json")
    return result["mean"], result["commit"]


# --- Statistics -------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A comparison of a and b. seeds: a - b of each seed. difference, interval: their mean and its 95 % confidence
    interval. says: holds, fails or undecided."""

    seeds: list[float]
    difference: float
    interval: tuple[float, float]
    says: str


def judge(a: np.ndarray, relation: str, b: np.ndarray, margin: float = MARGIN) -> Verdict:
    """Compare two measures, given by their values (seeds,), by the rule at the top of this file."""
    d = np.asarray(a, float) - np.asarray(b, float)
    mean, error = d.mean(), stats.sem(d)
    half = error * stats.t.ppf(0.975, len(d) - 1)

    def above(bound: float, alternative: str = "greater") -> bool:
        """Whether the mean is significantly above a bound ("less": below). Without spread any difference counts."""
        if error == 0:
            return bool(mean > bound if alternative == "greater" else mean < bound)
        return bool(stats.ttest_1samp(d, bound, alternative=alternative).pvalue < 0.05)

    if relation == ">":
        holds, fails = mean - half > 0, mean + half < 0
    elif relation == "<=":
        holds, fails = above(margin, "less"), above(margin)
    elif relation == "~":
        holds, fails = above(margin, "less") and above(-margin), above(margin) or above(-margin, "less")
    else:
        raise ValueError(f"unknown relation {relation!r}: choose >, <= or ~")
    return Verdict(
        d.tolist(), mean, (mean - half, mean + half), "holds" if holds else "fails" if fails else "undecided"
    )


def verdict(parts: list[Verdict]) -> str:
    """The verdict on a whole claim."""
    if all(part.says == "holds" for part in parts):
        return "holds"
    return "does not hold here" if any(part.says == "fails" for part in parts) else "undecided"


# --- The page ---------------------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """A measure's values (seeds,) and their lines of the raw file."""

    values: np.ndarray
    lines: list[dict]

    @property
    def raw(self) -> list:
        return [line["value"] for line in self.lines]

    def __str__(self):
        digits = 1 if abs(self.values).max() > 1 else 3
        return " ± ".join(f"{x:.{digits}f}" for x in figures.mean_std(self.values))


def collect(raw: dict[tuple[str, int], dict], names: list[str], seeds: tuple[int, ...]) -> dict[str, Values]:
    """The values of those measures that have all seeds; a value over training counts as its mean."""
    measured = {}
    for name in names:
        lines = [raw.get((flags_of(MEASURES[name]), seed)) for seed in seeds]
        if all(lines):
            values = [line["value"] for line in lines]
            values = [np.mean(list(v.values())) if isinstance(v, dict) else v for v in values]
            measured[name] = Values(np.array(values), lines)
    return measured


def side(what: str | float, measured: dict[str, Values], seeds: tuple[int, ...]) -> np.ndarray:
    """The values (seeds,) of one side of a comparison: a measure, the difference of two, or a number."""
    values = [measured[name].values for name in parts_of(what)]
    return (values[0] - sum(values[1:])) if values else np.full(len(seeds), what, float)


def write_page(folder: Path, seeds: tuple[int, ...], names: list[str]):
    """Write claims.md and a figure for each of these claims, from the raw file in a folder."""
    raw = read_raw(folder / "claims.jsonl")
    for name in names:
        measured = collect(raw, measures_of(CLAIMS[name]), seeds)
        if measured.keys() == set(measures_of(CLAIMS[name])):
            FIGURES[CLAIMS[name].figure](measured, folder / f"claim-{name}")
    (folder / "claims.md").write_text(render(raw, seeds, names, folder.resolve() == ROOT / "results"))


def render(raw: dict[tuple[str, int], dict], seeds: tuple[int, ...], names: list[str], with_history: bool) -> str:
    """The page of these claims. A claim that lacks a value of a seed is listed as not made yet.

    with_history: for results/claims.md, what its numbers have behind them, and a line that leads back.
    """
    summary, stories, sections, used = [], [], [], []
    for name in names:
        claim, measured = CLAIMS[name], collect(raw, measures_of(CLAIMS[name]), seeds)
        if measured.keys() != set(measures_of(claim)):
            summary.append(f"| {name} | not made yet | | | | {claim.place} |")
            continue
        sides = [(side(a, measured, seeds), relation, side(b, measured, seeds)) for a, relation, b in claim.compare]
        parts = [judge(*compared) for compared in sides]
        by = {says: [worded(*c) for c, part in zip(claim.compare, parts, strict=True) if part.says == says]
              for says in ("holds", "fails", "undecided")}  # fmt: skip
        cells = (f"{len(by['holds'])} of {len(parts)}", "; ".join(by["fails"]), "; ".join(by["undecided"]))
        summary.append(f"| [{name}](#{name}) | {verdict(parts)} | {' | '.join(cells)} | {claim.place} |")
        stories.append(story(name, claim, parts, measured))
        sections.append(section(name, claim, measured, parts))
        used += [line for of in measured.values() for line in of.lines]
    commits = ", ".join(sorted({commit for line in used for commit in line["commits"]}))
    recipe, few = PRETRAINING["strings"], FEW_SHOT["strings"]
    about = dict(seeds=", ".join(map(str, seeds)), commits=commits, hours=hours(used), margin=MARGIN)
    about |= dict(steps=recipe["steps"], batch=recipe["batch_size"], rank=recipe["rank"], skills=recipe["skills"])
    about |= dict(shots=few["shots"], few_steps=few["steps"], few_batch=few["batch_size"], few_every=few["eval_every"])
    about |= dict(seen=recipe["eval_examples"], keep=KEEP_EVERY, examples=analyze.Config.examples)
    about |= dict(history=HISTORY if with_history else "", navigation=NAVIGATION if with_history else "")
    return PAGE.format(**about, summary="\n".join(summary), stories="\n".join(stories)) + "\n".join(sections)


def hours(lines: list[dict]) -> float:
    """Hours of training and adaptation, each run counted once however many measures it has."""
    runs = {(line["flags"].split(" | ")[0], line["seed"]): line["seconds"][0] for line in lines}
    adaptations = {(line["flags"], line["seed"]): line["seconds"][1] for line in lines}
    return (sum(runs.values()) + sum(adaptations.values())) / 3600


PAGE = """{navigation}# The papers' claims at laptop scale

The papers make claims about routing; each is tested here with five runs of every method that it compares, on a
benchmark of string-editing tasks whose skills are known (`strings`) and a model of 1.2 million parameters. That is
small: MHR's tables are of T5-XL, 3 billion parameters (Tab. 3: T0-11B), on T0's and Super-NaturalInstructions' tasks;
those of its 2022 version of BART-large on CrossFit and T5-Large on Natural Instructions; Polytropon's of BART-large
on CrossFit, and of an agent. A claim is a list of comparisons, each of two methods:

* **holds**: all come out as the paper says, by more than chance makes likely. In this setting you may rely on it.
* **does not hold here**: at least one contradicts the paper, by more than chance makes likely.
* **undecided**: neither. The claim may be true or not; five runs do not tell.

"a > b": a scores higher; "a ~ b": within {margin:g} points; "a <= b": at most {margin:g} points higher. LoRA (Shared):
`--method lora`, one LoRA for all tasks. A method's name alone: for a held-out task all of it is trained; "-z": that
task's row of Z alone; "-μ": one adapter, the average of the skills. "Told": the input names the task's operations.

None of this says what a large model does. Rules, caveats and numbers: [how it was judged](#how-it-was-judged).

| claim | verdict | comparisons that hold | that fail | that are undecided | the papers |
|---|---|---|---|---|---|
{summary}

{stories}
# How it was judged

Made by `python -m experiments.reproduce --claim all`; raw numbers, each with its flags and the commits of its training
and of what was then asked of it, are in `claims.jsonl`, and what is there is not made again.

**Setting.** `strings`, with its bundled backbone: 64 training tasks of 500 examples, {steps:,} steps of {batch}; then
12 held-out tasks of {shots} examples each, at most {few_steps} steps of {few_batch}, of which every {few_every} the
loss on 32 other examples of the task is taken, and the best is kept. Adapters of rank {rank} on all linear layers,
{skills} skills, MHR with 8 heads, if not said otherwise. Exact match on 100 test examples of a held-out task, {seen}
of a training task, in percent. Gradient alignment: the mean over training, every {keep} steps, with {examples} examples
a task. "Told": the input names the task's operations; else it is the same words for all tasks. Rates are those of
`results/methods.md`, searched for each method on other tasks; not again where the input is told, for other sizes, or
for further training.

**Rule**, of seeds {seeds}, which draw the examples, initial values, order and noise, but not the tasks:

| comparison | holds | fails |
|---|---|---|
| a > b | a is above b (paired t-test, two-sided, p < 0.05) | it is below |
| a <= b | a is above b by less than {margin:g} points, or below (one-sided, p < 0.05) | it is above by more |
| a ~ b | they differ by less than {margin:g} points (two one-sided tests) | they differ by more (one-sided) |

Else it is undecided. A claim holds if all its comparisons hold, and does not hold here if one fails. Nothing is
corrected for their number: with nine independent ones without any true difference, one in five claims would be said
not to hold. The papers' own differences between MHR and Poly are of -0.2 to 3 points. Five seeds are few: where
their differences have a standard deviation of 4 points, a true difference of 5 points is found in 56 % of cases, of 8
in 91 %, and true equality in 53 %. Intervals below are of 95 %; the one-sided tests of "<=" and "~" are
those of 90 %, which are narrower.
{history}
Pre-training and few-shot adaptation took {hours:.1f} hours of one core by the clock; analyses, zero-shot runs and
scores are not counted. Commit {commits}.

# Numbers

"""

HISTORY = """
Not blind: when the rule was written, scores of other rates had been seen, and when these runs were made, scores of
these very settings, seeds 0 to 2 ([LOG.md](LOG.md)). Seeds 3 and 4 are new: hence the differences seed by seed. A
seed fixes a value only as far as rounding goes: seed 1 of MHR gave 78.1 ([methods.md](methods.md)) and, with products
taken in another order, 69.3.

Three comparisons are decided by a hair, at p of 0.044 to 0.0498: Poly > Expert (few-shot); MHR, 16 heads > Poly, 8
skills (heads); and alignment of MHR, inventory > alignment of LoRA (Shared), inventory, on which alone the verdict of
alignment rests.

What few-shot adaptation, z and μ give on real tasks with a real model, in two seeds of a small budget, is in
[smollm.md](smollm.md): there MHR and Poly are close together, and LoRA is above both.
"""  # of results/claims.md alone, not of a page that a reader makes


def shown(name: str) -> str:
    """The name of a measure on pages and in figures: Poly-μ for Poly-mu, (IA)³ for (IA)^3."""
    return name.replace("-mu", "-μ").replace("(IA)^3", "(IA)³")


def worded(a: str | float, relation: str, b: str | float) -> str:
    """A comparison in the names that are shown."""
    return shown(f"{a} {relation} {b}")


def story(name: str, claim: Claim, parts: list[Verdict], measured: dict[str, Values]) -> str:
    """A claim for people who do not do statistics: what the papers say, what came out here, a figure."""
    by = {"fails": [], "undecided": [], "holds": []}
    for comparison, part in zip(claim.compare, parts, strict=True):
        by[part.says].append(f"{worded(*comparison)} ({part.difference:+.{digits_of(part)}f} on average)")
    agree = sum(part.says == "holds" for part in parts)
    out = f"{agree} of {len(parts)} comparisons agree with the papers."
    out += f" Contradicted: {'; '.join(by['fails'])}." if by["fails"] else ""
    out += f" Not decided: {'; '.join(by['undecided'])}." if by["undecided"] else ""
    text = f"## {name}\n\nThe papers say: {claim.says} ({claim.place}.)\n\n"
    text += f"Here: **{verdict(parts)}**. {out} {claim.note}".rstrip()
    return f"{text}\n\n![{alt(name, claim, measured)}](claim-{name}.png)\n"


def alt(name: str, claim: Claim, measured: dict[str, Values]) -> str:
    """What the figure of a claim shows, for those who do not see it: the kind of plot, its axes, and means.

    The means are those of all measures that the claim compares, or of more than six the highest and the lowest.
    """
    of = {shown(m): measured[m] for a, _, b in claim.compare for side in (a, b) for m in parts_of(side)}
    few = len(of) <= 6
    listed = of if few else [choose(of, key=lambda m: of[m].values.mean()) for choose in (max, min)]
    means = "; ".join(f"{m} {str(of[m]).split(' ± ')[0]}" for m in listed)
    line = f" A dashed line marks {reference(measured)}." if claim.figure == "dots" and reference(measured) else ""
    return f"Claim {name}. {ALTS[claim.figure]}{line} {'Means' if few else 'Highest and lowest mean'}: {means}."


def digits_of(part: Verdict) -> int:
    """The digits behind the point of a comparison: one of percent, three of a measure between 0 and 1."""
    return 1 if max(map(abs, (part.difference, *part.interval))) > 1 else 3


def section(name: str, claim: Claim, measured: dict[str, Values], parts: list[Verdict]) -> str:
    """The numbers of a claim: comparisons and values."""
    spent = hours([line for of in measured.values() for line in of.lines])
    text = [f"## {name}: numbers", "", f"({spent:.1f} hours of one core, some for other claims too.)", ""]
    text += ["| comparison | difference | 95 % interval | | seed by seed |", "|---|---:|---:|---|---|"]
    for comparison, part in zip(claim.compare, parts, strict=True):
        digits = digits_of(part)
        low, high = (f"{x:+.{digits}f}" for x in part.interval)
        mean, *each = (f"{x:+.{digits}f}" for x in (part.difference, *part.seeds))
        text.append(f"| {worded(*comparison)} | {mean} | {low} to {high} | {part.says} | {' '.join(each)} |")
    text += ["", "| measure | flags | trained on all tasks | for a new task | mean ± std |", "|---|---|---:|---:|---:|"]
    for measure, of in measured.items():
        first, flags = of.lines[0], of.lines[0]["flags"].rsplit(" | ", 1)[0].replace("|", "→")
        new = f"{first['new task']:,}" if first["new task"] else ""
        text.append(f"| {shown(measure)} | `{flags}` | {first['trained']:,} | {new} | {of} |")
    return "\n".join([*text, "", ""])


SCORE = "exact match on held-out tasks (%)"


def reference(measured: dict[str, Values]) -> str:
    """The measure that a dot plot has a dashed line at, or ""."""
    return next((name for name in ("LoRA (Shared)", "LoRA (Shared), told") if name in measured), "")


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


def draw_alignment(measured: dict[str, Values], stem: Path):
    panels = {
        title: {
            name: [([int(k) for k in v], list(v.values())) for v in measured[f"alignment of {name}, {of}"].raw]
            for name in ROUTED_OR_NOT
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
    figures.over_skills(series, stem, "share, or measure of Z")


def draw_zero_shot(measured: dict[str, Values], stem: Path):
    series = {}
    for name in AS_ONE.values():
        values = np.array([measured[f"{name}, told, +{k} steps"].values for k in EXTRA])
        series[shown(name)] = [(EXTRA, seed) for seed in values.T.tolist()]
    figures.over_steps({"": series}, stem, SCORE, figures.PERCENT, "steps of training after averaging")


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
    "alignment": "Two panels of three curves, LoRA (Shared), Poly and MHR: the cosine of tasks' gradients over the "
    "steps of training, with bars of one standard deviation; left of the shared inventory, right of each task's own "
    "mixture",
    "zero_shot": f"Three curves, {SCORE} over steps of training after averaging, with bars of one standard "
    "deviation: LoRA (Shared), Poly-μ and MHR-μ.",
    "by_skills": "Four curves over the number of skills, 2 to 32, from 0 to 1 with bars of one standard deviation: "
    "discreteness, sparsity and usage of Z, and the score on seen tasks.",
}
FIGURES = {
    "dots": lambda measured, stem: draw_dots(measured, stem, SCORE),
    "two_speeds": draw_two_speeds,
    "recovery": draw_recovery,
    "few_shot_parameters": lambda measured, stem: draw_parameters(measured, stem, "new task", "for a new task"),
    "multi_task_parameters": lambda measured, stem: draw_parameters(measured, stem, "trained", "on all tasks"),
    "alignment": draw_alignment,
    "zero_shot": draw_zero_shot,
    "by_skills": draw_by_skills,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    claims = f"all, or of: {', '.join(CLAIMS)}"
    parser.add_argument("--claim", nargs="+", choices=["all", *CLAIMS], default=["all"], metavar="NAME", help=claims)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of raw numbers, page, figures")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs; existing ones are reused")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel")
    parser.add_argument("--page", action="store_true", help="only write the page, from the values in the raw file")
    args = parser.parse_args()
    if len(set(args.seeds)) < max(3, len(args.seeds)) or min(args.seeds) < 0:
        parser.error("--seeds: the tests need at least three, all different and none negative")
    if args.jobs < 1:
        parser.error("--jobs must be above 0")
    if tuple(args.seeds) != SEEDS and args.results.resolve() == ROOT / "results":
        parser.error("--seeds: give --results too, for results/ holds the values of the seeds that are compared")
    names = list(CLAIMS) if "all" in args.claim else args.claim
    for name in ("results",) if args.page else ("results", "runs"):
        try:
            getattr(args, name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--{name} {getattr(args, name)} cannot be made: {error.strerror}")
    measures = list(dict.fromkeys(m for name in names for m in measures_of(CLAIMS[name])))
    if not args.page:
        make_missing(measures, tuple(args.seeds), args.results / "claims.jsonl", args.runs, args.jobs)
    write_page(args.results, tuple(args.seeds), list(CLAIMS))
    print((args.results / "claims.md").read_text().removeprefix(NAVIGATION).split("\n## ")[0])


if __name__ == "__main__":
    exit_on_user_error(main)
