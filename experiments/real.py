"""The papers' claims with a real language model on real tasks: CrossFit's, by Polytropon's recipe.

    python -m experiments.real --data-dir DIR --backbone FOLDER                 make what is missing, then the page
    python -m experiments.real --data-dir DIR --backbone FOLDER --minutes 12    the same for 12 minutes; again: goes on
    python -m experiments.real --data-dir DIR --backbone FOLDER --budget cpu    for two cores
    python -m experiments.real --page                                           the page and its figures alone

DIR has tasks of CrossFit in the gym's layout (docs/benchmarks.md); FOLDER is a language model with or without encoder.
results/real.jsonl gets a line as soon as a value is made, and results/real.md is written when the command ends,
whatever ended it. --runs holds what is half done: moved to another machine with real.jsonl, the command goes on there,
if DIR and FOLDER lie in the same place beside the repository. Weights whose values are all written down are deleted.
Computed sizes of a run that is half done: 50 MB with 8 skills and 8 heads, up to 170 MB with 64 heads or with kept
steps. Without its folder it begins again.

What is made, in which order and with which rates is in `real_runs.py`; verdicts follow the rule of `verdicts.py`, with
at least three seeds. Seeds and few-shot splits are paired: a difference is taken within a seed and a split, and a seed
counts when it has all splits.
"""

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()

import math
import re
import statistics
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments import claims, verdicts
from experiments.claim_figures import shown
from experiments.commands import ROOT, side_by_side
from experiments.methods import NAVIGATION
from experiments.real_command import arguments, carry_out, device_of, maker_of
from experiments.real_runs import (
    BUDGETS, METHODS, Budget, constant_key, failed_key, few_shot_flags, in_order, lowest, make_all, read_raw,
    search, setup_of, training_flags,
)  # fmt: skip
from experiments.verdicts import LEAST, MARGIN, judge, judged, verdict
from plumbing.errors import UserError, exit_on_user_error
from plumbing.tables import markdown, mean_std_text
from tools import figures

# --- The claims -------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """says: the claim. papers: what they report. toy: claims of `claims.md` that are the same on `strings`. compare: as
    in `claims.py`."""

    says: str
    papers: str
    toy: tuple[str, ...]
    compare: tuple[tuple[str, str, str], ...]


CLAIMS = {
    "few-shot": Claim(
        "After few-shot adaptation MHR is above Poly, and Poly above one LoRA, also a larger one.",
        "CrossFit, BART-large: MHR 57.8, Poly 56.7, LoRA 55.9 (MHR 2022 Tab. 2); T0, T5-XL: MHR, h = 64, 69.1, Poly "
        "68.0, LoRA 66.0 (MHR Fig. 2, Tab. 6)",
        ("few-shot", "few-shot-told", "few-shot-scarce", "few-shot-told-scarce"),
        (("MHR", ">", "Poly"), ("Poly", ">", "LoRA"), ("Poly", ">", "LoRA-big")),
    ),
    "z": Claim(
        "Training the routing alone comes close to training everything for MHR, not as close for Poly; MHR-z is above "
        "Poly-z, and more heads help it.",
        "T0, T5-XL, h = 64: MHR-z 68.3, MHR 69.1, Poly-z 66.4, Poly 68.0 (MHR Fig. 2, Tab. 6)",
        ("z", "z-scarce"),
        (
            ("MHR-z", "~", "MHR"), ("Poly - Poly-z", ">", "MHR - MHR-z"), ("MHR-z", ">", "Poly-z"),
            ("MHR-z, h = 64", ">", "MHR-z"),
        ),
    ),
    "μ": Claim(
        "The average of the skills, adapted as one adapter, keeps what routing gained, and is above LoRA.",
        "CrossFit, BART-large: Poly-μ 57.0, Poly 56.7, LoRA 55.9 (MHR 2022 Tab. 2)",
        ("mu", "mu-told", "mu-scarce"),
        (("Poly-mu", "~", "Poly"), ("MHR-mu", "~", "MHR"), ("Poly-mu", ">", "LoRA"), ("MHR-mu", ">", "LoRA")),
    ),
    "random": Claim(
        "Random routing, averaged, is no better than LoRA, and below the average of skills with learned routing.",
        "CrossFit, BART-large: Random-μ 55.7, LoRA 55.9, Poly-μ 57.0 (MHR 2022 Tab. 2)",
        ("random", "random-told", "random-scarce"),
        (
            ("Random-mu", "<=", "LoRA"), ("Poly-mu", ">", "Random-mu"), ("MHR-mu", ">", "Random-mu"),
            ("Random-mu, s = 2", "<=", "LoRA"),
        ),
    ),
    "heads": Claim(
        "More heads help, and more than more skills.",
        "T0, T5-XL: Poly 68.0, MHR, h = 64, 69.1 (MHR Fig. 2, Tab. 6; Fig. 3 (right))",
        ("heads", "heads-scarce"),
        (
            ("MHR, h = 64", ">", "MHR"), ("MHR, h = 64", ">", "Poly"), ("MHR, s = 2, h = 64", ">", "MHR, s = 2"),
            ("MHR, s = 2, h = 64", ">", "Poly"),
        ),
    ),
    "alignment": Claim(
        "Over training, gradients of different tasks are more aligned in MHR than in Poly and in LoRA.",
        "T0, T5-XL: MHR Fig. 3 (left), without numbers",
        ("alignment", "alignment-scarce"),
        tuple(
            (f"alignment of MHR, {of}", ">", f"alignment of {name}, {of}")
            for of in ("inventory", "mixtures") for name in ("Poly", "LoRA")
        ),
    ),
    "scarce": Claim(
        "With 2 skills MHR is further above Poly than with 8.",
        "not claimed there: our lead",
        ("scarce", "z-scarce", "few-shot-scarce", "few-shot-told-scarce"),
        (
            ("MHR, s = 2 - Poly, s = 2", ">", "MHR - Poly"), ("MHR-z, s = 2 - Poly-z, s = 2", ">", "MHR-z - Poly-z"),
            ("MHR-z, s = 2", ">", "Poly-z, s = 2"), ("MHR, s = 2", ">", "Poly, s = 2"),
        ),
    ),
}  # fmt: skip


CONSTANT = {"most frequent": "constant answers", "best": "best constant answers"}  # of `Maker.constant`: its row


# --- Measures ---------------------------------------------------------------------------------------------------------


def label(name: str, variant: str) -> str:
    """A method after an adaptation: ("MHR, s = 2", "z") is "MHR-z, s = 2"."""
    method, comma, sizes = name.partition(",")
    return f"{method}{f'-{variant}' * (variant != 'all')}{comma}{sizes}"


def rates_of(raw: dict[str, dict], name: str, budget: Budget) -> tuple[str, dict[str, str], dict] | None:
    """The rates of a method as `search` found them, and the losses; None if it found none yet."""
    try:
        return search(name, budget, lambda flags, few: raw[f"{flags} | {few} --tasks dev"]["value"])
    except (KeyError, UserError):  # not all there, or not finite at any rate
        return None


def values_of(raw: dict[str, dict], budget: Budget) -> dict[str, dict[tuple, dict]]:
    """{measure: {(seed, split): its line's value}} of all that is made; of an alignment {(seed,): value}.

    "trained METHOD" is what pre-training says, for {(seed,)}.
    """
    found = {}
    for split in budget.splits:
        for of, row in CONSTANT.items():
            if (key := constant_key(split, budget.few, of)) in raw:
                found.setdefault(row, {})[0, split] = raw[key]["value"]
    for name, seed, flags, few in runs_of(raw, budget):
        if flags in raw:
            found.setdefault(f"trained {name}", {})[seed,] = raw[flags]["value"]
            for of, over in raw.get(f"{flags} | alignment", {"value": {}})["value"].items():
                mean = {"mean": statistics.fmean(over.values())}
                found.setdefault(f"alignment of {name}, {of}", {})[seed,] = mean
            for variant in METHODS[name][1]:
                for split in budget.splits:
                    key = f"{flags} | {few_shot_flags(variant, budget.few, split, few[variant], seed)} --tasks all"
                    if key in raw:
                        found.setdefault(label(name, variant), {})[seed, split] = raw[key]["value"]
    return found


def runs_of(raw: dict[str, dict], budget: Budget) -> Iterator[tuple[str, int, str, dict[str, str]]]:
    """(method, seed, its flags of train.py, each variant's rate) of all runs that may be in a raw file."""
    seeds = sorted({int(key.split()[-1]) for key in raw if " | " not in key})  # of pre-trainings
    for name in METHODS:
        if found := rates_of(raw, name, budget):
            for seed in seeds:
                yield name, seed, training_flags(name, budget, found[0], seed, budget.steps), found[1]


def differences(measured: dict, a: str, b: str) -> dict[tuple, float]:
    """{(seed, split): a - b} where all that both sides name is made; a and b: a measure or "measure - measure"."""
    sides = [[measured.get(name, {}) for name in side.split(" - ")] for side in (a, b)]
    common = set.intersection(*(set(values) for side in sides for values in side))
    total = lambda side, key: side[0][key]["mean"] - sum(values[key]["mean"] for values in side[1:])  # noqa: E731
    return {key: total(sides[0], key) - total(sides[1], key) for key in sorted(common)}


def whole_seeds(of: dict[tuple, Any], splits: tuple[int, ...]) -> dict[tuple, Any]:
    """Of the values for (seed, split) those of the seeds that have all splits; alignments, for (seed,), have none."""
    return {key: value for key, value in of.items() if len(key) == 1 or all((key[0], k) in of for k in splits)}


def by_seed(values: dict[tuple, float], splits: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Means over the splits: of the seeds that have all of them, and of those that have some."""
    found, whole = ([], []), whole_seeds(values, splits)
    for seed in sorted({key[0] for key in values}):
        of = {key: value for key, value in values.items() if key[0] == seed}
        found[not of.keys() <= whole.keys()].append(statistics.fmean(of.values()))
    return found


def enough(relation: str, mean: float, std: float, most: int = 200) -> int | None:
    """The seeds after which `judge` decides if mean and deviation stay as they are; None: above `most`."""
    away = {">": abs(mean), "<=": abs(mean - MARGIN), "~": abs(abs(mean) - MARGIN)}[relation]  # from what is undecided
    sure = 0.975 if relation == ">" else 0.95  # two-sided, one-sided
    return next((n for n in range(3, most + 1) if stats.t.ppf(sure, n - 1) * std / math.sqrt(n) < away), None)


# --- The page ---------------------------------------------------------------------------------------------------------

PAGE = """{navigation}# The papers' claims with a real language model

    python -m experiments.real --data-dir DIR --backbone FOLDER

Polytropon's benchmark and recipe: CrossFit's tasks, the backbone frozen, with LoRA of rank 4 on its
self-attention.{about} For each method the same search of learning rates, on the dev tasks alone
(`experiments/real_runs.py`); no test task was used to choose anything. Scores: the mean of the test tasks' official
metrics, in percent. Constant answers: always the most frequent answer of a task's few examples, the first of them where
several are; best constant answers: always the one that scores highest, chosen with the labels of the test examples. Up
to there a score may be that of one answer. All values, with their flags, commit, date and device, are in `real.jsonl`.

A verdict needs three seeds, and follows the rule of `results/claims.md`: "a > b" by a paired t-test at 5 %, "~" and
"<=" with a margin of {margin:g} points, which is more than the papers' own differences: they tell whether a method is
far off, not whether it keeps a gain of a point or two. Nothing is corrected for the number of comparisons, and all
seeds have the same tasks. "Signs as theirs": of the comparisons a > b, those whose mean, as printed below, is above 0,
whatever chance makes of it. "Would decide": the seeds after which the rule decides if mean and standard deviation stay
as seen. With one seed the deviation is that of the same comparison on `strings`, if it was made there: a real model's
may be several times larger, and the number of seeds with it.

Claims of `results/claims.md` that are not asked here: {left}.
{sections}"""
ABOUT = """ Model: SmolLM2-135M-Instruct, a 4-bit file that is dequantised when it is loaded. Data: a slice of the
gym's random partition, 29 tasks to train on, 3 to choose rates, 5 to test. The papers have BART-large, and 120, 20 and
20 tasks: 15 tasks a skill with their 8 skills, where 8 skills have 3.6 here, and 2 skills 14.5. Not blind: scores of
this model on these test tasks, of smaller budgets ([smollm.md](smollm.md)), had been seen before the claims below and
their rule were written down; the comparisons of heads, and of Random-μ with 2 skills, came when the seed below had been
seen."""  # of results/ alone
PARTS_ALIGNED = ("inventory", "mixtures")
ALIGNMENT = (
    "The mean cosine between the training tasks' gradients, with 16 examples a task, over five looks in training: of "
    "the shared inventory of skills, and of each task's own mixture. The papers' reason for MHR. With one LoRA the two "
    "are the same; where they are for Poly or MHR, it is as if all tasks mixed alike.\n"
)
EDGES = (
    "A * is at an edge of what was tried: beyond it a rate may be better. In pre-training and under `all` Z learns at "
    "the recipe's 1e-2; Polytropon also tried 1e-1."
)


def write(folder: Path):
    """Write real.md and a figure for each budget of which something is made, from real.jsonl in a folder."""
    raw, sections, here = read_raw(folder / "real.jsonl"), [], folder.resolve() == ROOT / "results"
    toy = verdicts.read_raw(ROOT / "results" / "claims.jsonl")
    for name, budget in BUDGETS.items():
        measured = values_of(raw, budget)
        scores = {m: of for m, of in measured.items() if len(next(iter(of))) == 2}
        if scores.keys() - set(CONSTANT.values()):
            of_seeds = {shown(m): means(of, budget) for m, of in scores.items()}
            reference = "LoRA" if "LoRA" in of_seeds else ""
            what = "mean score on the test tasks (%)"
            figures.by_method(of_seeds, folder / f"real-{name}", what, figures.PERCENT, reference)
            sections.append(section(name, budget, measured, scores, raw, toy, here))
    text = "".join(sections) or "\nNothing is made yet.\n"
    about, navigation = (ABOUT, NAVIGATION) if here else ("", "")
    left = ", ".join(name for name in claims.CLAIMS if not any(name in claim.toy for claim in CLAIMS.values()))
    filled = PAGE.format(navigation=navigation, margin=MARGIN, about=about, left=left, sections=text)
    (folder / "real.md").write_text(filled)


def means(of: dict[tuple, dict], budget: Budget) -> list[float]:
    """The mean scores of a measure by seed: of the seeds that have all splits, or of all if none has."""
    whole, part = by_seed({key: value["mean"] for key, value in of.items()}, budget.splits)
    return whole or part


def section(name: str, budget: Budget, measured: dict, scores: dict, raw: dict, toy: dict, here: bool) -> str:
    """A budget's part of the page: claims, scores, comparisons, training, rates."""
    alt = "each method and variant on a line: its seeds as dots, their mean as a diamond, one LoRA as a dashed line"
    edges = [at_edge for *_, at_edge in searched(raw, budget)]
    seen = f"Of {len(edges)} rates {sum(edges)} are at an edge of what was tried ([below](#learning-rates)).\n"
    parts = [f"\n## Budget `{name}`\n", f"{budget.says}\n", claims_table(CLAIMS, measured, budget.splits, toy, here)]
    parts += ["", f"![Mean scores: {alt}](real-{name}.png)\n", seen, scores_table(budget, scores), ""]
    parts += ["### Comparisons\n", "In brackets: seeds without all their splits.\n"]
    parts += [comparisons_table(CLAIMS, measured, budget.splits, toy), ""]
    parts += ["### Gradient alignment\n", ALIGNMENT, alignment_table(measured), ""]
    runs = ((name, seed, flags) for name, seed, flags, _ in runs_of(raw, budget))
    parts += ["### Pre-training\n", training_table(METHODS, measured), "", *lost(runs, raw)]
    steps = f"{budget.search_steps:,} of the {budget.steps:,} steps"
    parts += ["### Learning rates\n", f"The lowest loss on the dev tasks, after {steps}, seed 0. {EDGES}\n"]
    return "\n".join([*parts, rates_table(raw, budget), ""])


def lost(runs: Iterable[tuple[str, int, str]], raw: dict) -> list[str]:
    """What a page says of the runs (method, seed, flags of train.py) that were not finite, if there are any."""
    names = [f"{name} of seed {seed}" for name, seed, flags in runs if failed_key(flags) in raw]
    return [f"Training was not finite, and what followed was left out: {', '.join(names)}.\n"] * bool(names)


def verdict_here(measured: dict, splits: tuple[int, ...], claim: Claim) -> tuple[str, list[tuple]]:
    """(verdict, [(comparison, differences, what judge says if three seeds are whole)]) of a claim."""
    rows = []
    for a, relation, b in claim.compare:
        pairs = differences(measured, a, b)
        seeds = by_seed(pairs, splits)[0]
        part = judge(np.array(seeds), relation, np.zeros(len(seeds))) if len(seeds) >= LEAST else None
        rows.append((f"{shown(a)} {relation} {shown(b)}", pairs, part))
    if not any(pairs for _, pairs, _ in rows):
        return "not made yet", rows
    parts = [part for _, _, part in rows if part]
    if len(parts) < len(rows) and verdict(parts) != "does not hold here":  # which one comparison is enough for
        return f"undecided: {len(parts)} of {len(rows)} comparisons have three seeds", rows
    return verdict(parts), rows


def on_strings(name: str, raw: dict, here: bool) -> str:
    """The verdict of a claim of `claims.md`, or that it is not made yet. here: with a link."""
    parts = judged(verdicts.CLAIMS[name], raw, verdicts.SEEDS)
    linked = f"[`{name}`](claims.md#{name})" if parts and here else f"`{name}`"
    return f"{linked}: {verdict(parts) if parts else 'not made yet'}"


def claims_table(claims: dict[str, Claim], measured: dict, splits: tuple[int, ...], toy: dict, here: bool) -> str:
    lines = ["| the claim | the papers' numbers | on `strings` | here | signs as theirs |", "|---|---|---|---|---|"]
    for name, claim in claims.items():
        says, rows = verdict_here(measured, splits, claim)
        compared = [whole_seeds(pairs, splits) for what, pairs, _ in rows if " > " in what]
        made = [round(statistics.fmean(pairs.values()), digits_of(name)) for pairs in compared if pairs]
        signs = f"{sum(mean > 0 for mean in made)} of {len(made)}"
        beside = "; ".join(on_strings(twin, toy, here) for twin in claim.toy)
        lines.append(f"| {claim.says} | {claim.papers} | {beside} | {says} | {signs} |")
    return "\n".join(lines)


def scores_table(budget: Budget, scores: dict) -> str:
    tasks = list(next(iter(next(iter(scores.values())).values()))["tasks"])
    lines = [("method", "seeds x splits", "for a new task", "before", "after", *tasks)]
    for name, of in scores.items():
        each = list((whole_seeds(of, budget.splits) or of).values())
        before = statistics.fmean(value["before"] for value in each)
        by_task = [f"{statistics.fmean(value['tasks'][task] for value in each):.1f}" for task in tasks]
        new = f"{sum(each[0]['parameters'].values()):,}"
        mean = mean_std_text(means(of, budget), "±")
        lines.append((shown(name), str(len(each)), new, f"{before:.1f}", mean, *by_task))
    return markdown(lines, left=1)


def comparisons_table(claims: dict[str, Claim], measured: dict, splits: tuple[int, ...], toy: dict) -> str:
    lines = [("claim", "comparison", "seed by seed", "mean", "95 % interval", "verdict", "would decide")]
    for name, claim in claims.items():
        for (what, pairs, part), compared in zip(verdict_here(measured, splits, claim)[1], claim.compare, strict=True):
            (whole, some), digits = by_seed(pairs, splits), digits_of(name)
            each = [f"{x:+.{digits}f}" for x in whole] + [f"({x:+.{digits}f})" for x in some]
            mean = f"{statistics.fmean(whole):+.{digits}f}" if whole else ""
            says = part.says if part else "undecided" if pairs else ""
            interval = f"{part.interval[0]:+.{digits}f} to {part.interval[1]:+.{digits}f}" if part else ""
            decides = would_decide(compared[1], whole, spread_on_strings(compared, claim, toy)) if whole else ""
            lines.append((name, what, " ".join(each) or "not made yet", mean, interval, says, decides))
    return markdown(lines, left=2)


def digits_of(claim: str) -> int:
    """The digits behind the point of a claim's differences: scores are percent, cosines below 1."""
    return 3 if claim == "alignment" else 1


def names_on_strings(side: str) -> tuple[str, str]:
    """What a measure, or a difference of two, is called in `claims.py`, and in `scarce.py`."""
    side = side.replace("Random-mu", "Random by task-mu")
    own = {part: f"{part}, s = {1 if part == 'LoRA' else 8}" for part in side.split(" - ") if ", s = " not in part}
    sized = " - ".join(own.get(part, part) for part in side.split(" - "))
    return re.sub(r"\bLoRA\b(?!-big)", "LoRA (Shared)", side), sized


def spread_on_strings(comparison: tuple[str, str, str], claim: Claim, toy: dict) -> float:
    """The standard deviation between seeds that a comparison has on `strings`, in the first of a claim's twins that
    has it; 0 if none has."""
    a, relation, b = comparison
    same = {(x, relation, y) for x, y in zip(names_on_strings(a), names_on_strings(b), strict=True)}
    for twin in (verdicts.CLAIMS[name] for name in claim.toy):
        for theirs, part in zip(twin.compare, judged(twin, toy, verdicts.SEEDS), strict=False):
            if theirs in same:
                return statistics.stdev(part.seeds)
    return 0.0


def would_decide(relation: str, seeds: list[float], usual: float) -> str:
    """How many seeds would decide, by their deviation, or by the usual one if there is one seed."""
    if not (spread := statistics.stdev(seeds) if len(seeds) > 1 else usual):
        return ""
    need = enough(relation, statistics.fmean(seeds), spread)
    return f"{need} seeds" if need else "more than 200 seeds"


def training_table(methods: Iterable[str], measured: dict) -> str:
    lines = [("method", "seeds", "adapters", "and Z", "loss, at first and at last", "seconds")]
    for name in methods:
        if of := list(measured.get(f"trained {name}", {}).values()):
            ends = " to ".join(f"{statistics.fmean(value['loss'][k] for value in of):.2f}" for k in (0, 1))
            counts = [f"{of[0]['parameters'][kind]:,}" for kind in ("adapters", "routing")]
            seconds = mean_std_text([value["seconds"] for value in of], "±")
            lines.append((shown(name), str(len(of)), *counts, ends, seconds))
    return markdown(lines, left=1)


def alignment_table(measured: dict) -> str:
    lines = [("method", "seeds", *PARTS_ALIGNED)]
    for name in METHODS:
        of = [measured.get(f"alignment of {name}, {part}", {}).values() for part in PARTS_ALIGNED]
        if any(of):
            means = (mean_std_text([value["mean"] for value in each], "±", 3) for each in of)
            lines.append((shown(name), str(len(of[0])), *means))
    return markdown(lines, left=1)


def searched(raw: dict[str, dict], budget: Budget) -> Iterator[tuple[str, str, dict, str, bool]]:
    """(method, what was searched, {rate: loss}, the rate taken, whether it is the first or last) of all searches."""
    for name in METHODS:
        found = rates_of(raw, name, budget)
        for of, tried in found[2].items() if found else ():
            best, rates = lowest(tried, name), list(tried)
            yield name, of, tried, best, best in (rates[0], rates[-1])


def rates_table(raw: dict[str, dict], budget: Budget) -> str:
    """What `search` tried for each method, and the loss of each."""
    most = len(budget.rates)
    lines = [("method", "searched", *("rate: loss",) * most, "taken")]
    for name, of, tried, best, at_edge in searched(raw, budget):
        each = [f"{rate}: {'failed' if loss is None else f'{loss:.3f}'}" for rate, loss in tried.items()]
        each += [""] * (most - len(each))
        lines.append((name, of.replace("mu", "μ"), *each, best + "*" * at_edge))
    return markdown(lines, left=2)


# --- The command ------------------------------------------------------------------------------------------------------


def make(args):
    """Make what is missing. Raises OutOfTime."""
    if (args.budget == "cpu") != (device_of(args) == "cpu"):  # so no table has values of both
        raise UserError("--budget papers is for a GPU, --budget cpu for a CPU: give the other, or --device")
    budget, maker = BUDGETS[args.budget], maker_of(args, "real", setup_of(args.data_dir, args.backbone))
    locks = {name: threading.Lock() for name in METHODS}
    for split in budget.splits:
        for of in CONSTANT:
            maker.constant(split, budget.few, of)
    runs = in_order(tuple(args.seeds) or budget.seeds)
    side_by_side(lambda run: make_all(maker, run[1], budget, run[0], locks[run[1]]), runs, args.jobs)


def main():
    args = arguments(__doc__, "CrossFit's tasks, in the gym's layout", "real", BUDGETS)
    carry_out(args, lambda: make(args), write, "real")


if __name__ == "__main__":
    exit_on_user_error(main)
