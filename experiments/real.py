"""The papers' claims with a real language model on real tasks: CrossFit's, by Polytropon's recipe.

    python -m experiments.real --data-dir DIR --backbone FOLDER                 make what is missing, then the page
    python -m experiments.real --data-dir DIR --backbone FOLDER --minutes 12    the same for 12 minutes; again: goes on
    python -m experiments.real --data-dir DIR --backbone FOLDER --budget cpu    for two cores
    python -m experiments.real --page                                           the page and its figures alone

DIR has tasks of CrossFit in the gym's layout (docs/benchmarks.md); FOLDER is a language model with or without encoder.
results/real.jsonl gets a line as soon as a value is made, and results/real.md is written when the command ends,
whatever ended it. --runs holds what is half done: moved to another machine with real.jsonl, the command goes on there
(DIR and FOLDER under the same names). Weights whose values are all written down are deleted, so that it stays small.

What is made, in which order and with which rates is in `real_runs.py`; verdicts follow the rule of `verdicts.py`, with
at least three seeds. Seeds and few-shot splits are paired: a difference is taken within a seed and a split.
"""

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()

import argparse
import math
import statistics
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments import verdicts
from experiments.methods import NAVIGATION, ROOT, OutOfTime, workers
from experiments.real_runs import (
    BUDGETS, METHODS, Budget, Maker, few_shot_flags, in_order, make_all, read_raw, search, training_flags,
    unpacked,
)  # fmt: skip
from experiments.verdicts import MARGIN, judge, judged, verdict
from plumbing.errors import exit_on_user_error
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
        "CrossFit, BART-large: MHR 57.8, Poly 56.7, LoRA 55.9 (MHR 2022 Tab. 2); T0, T5-XL: 69.1, 68.0, 66.0",
        ("few-shot", "few-shot-told", "few-shot-scarce"),
        (("MHR", ">", "Poly"), ("Poly", ">", "LoRA"), ("Poly", ">", "LoRA-big")),
    ),
    "z": Claim(
        "Training the routing alone comes close to training everything for MHR, not as close for Poly; MHR-z is above "
        "Poly-z, and more heads help it.",
        "T0, T5-XL: MHR-z 68.3, MHR 69.1, Poly-z 66.4, Poly 68.0 (MHR Tab. 2)",
        ("z", "z-scarce"),
        (
            ("MHR-z", "~", "MHR"), ("Poly - Poly-z", ">", "MHR - MHR-z"), ("MHR-z", ">", "Poly-z"),
            ("MHR-z, h = 64", ">", "MHR-z"),
        ),
    ),
    "mu": Claim(
        "The average of the skills, adapted as one adapter, keeps what routing gained, and is above LoRA.",
        "CrossFit, BART-large: Poly-μ 57.0, Poly 56.7, LoRA 55.9 (MHR 2022 Tab. 2)",
        ("mu", "mu-told", "mu-scarce"),
        (("Poly-mu", "~", "Poly"), ("MHR-mu", "~", "MHR"), ("Poly-mu", ">", "LoRA"), ("MHR-mu", ">", "LoRA")),
    ),
    "random": Claim(
        "Random routing, averaged, is no better than LoRA, and below the average of skills with learned routing.",
        "CrossFit, BART-large: Random-μ 55.7, LoRA 55.9, Poly-μ 57.0 (MHR 2022 Tab. 2)",
        ("random", "random-told", "random-scarce"),
        (("Random-mu", "<=", "LoRA"), ("Poly-mu", ">", "Random-mu"), ("MHR-mu", ">", "Random-mu")),
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
        "Where skills are scarce, MHR is further above Poly: 2 skills for the training tasks, not 8.",
        "not claimed there: our lead",
        ("scarce",),
        (
            ("MHR, s = 2 - Poly, s = 2", ">", "MHR - Poly"), ("MHR-z, s = 2 - Poly-z, s = 2", ">", "MHR-z - Poly-z"),
            ("MHR-z, s = 2", ">", "Poly-z, s = 2"), ("MHR, s = 2", ">", "Poly, s = 2"),
        ),
    ),
}  # fmt: skip


# --- Measures ---------------------------------------------------------------------------------------------------------


def label(name: str, variant: str) -> str:
    """A method after an adaptation: ("MHR, s = 2", "z") is "MHR-z, s = 2"."""
    method, comma, sizes = name.partition(",")
    return f"{method}{f'-{variant}' * (variant != 'all')}{comma}{sizes}"


def values_of(raw: dict[str, dict], budget: Budget) -> dict[str, dict[tuple, dict]]:
    """{measure: {(seed, split): its line's value}} of all that is made; of an alignment {(seed,): value}.

    "trained METHOD" is what pre-training says, for {(seed,)}.
    """
    found = {}
    for name, (_, variants) in METHODS.items():
        try:
            rate, few = search(name, budget, lambda flags, few: raw[f"{flags} | {few} --tasks dev"]["value"])
        except KeyError:  # the search of its rates is not done
            continue
        for seed in sorted({int(key.split()[-1]) for key in raw if " | " not in key}):  # of pre-trainings
            flags = training_flags(name, budget, rate, seed, budget.steps)
            if flags not in raw:
                continue
            found.setdefault(f"trained {name}", {})[seed,] = raw[flags]["value"]
            for of, over in raw.get(f"{flags} | alignment", {"value": {}})["value"].items():
                mean = {"mean": statistics.fmean(over.values())}
                found.setdefault(f"alignment of {name}, {of}", {})[seed,] = mean
            for variant in variants:
                for split in budget.splits:
                    key = f"{flags} | {few_shot_flags(variant, budget.few, split, few[variant], seed)} --tasks all"
                    if key in raw:
                        found.setdefault(label(name, variant), {})[seed, split] = raw[key]["value"]
    return found


def differences(measured: dict, a: str, b: str) -> dict[tuple, float]:
    """{(seed, split): a - b} where all that both sides name is made; a and b: a measure or "measure - measure"."""
    sides = [[measured.get(name, {}) for name in side.split(" - ")] for side in (a, b)]
    common = set.intersection(*(set(values) for side in sides for values in side))
    total = lambda side, key: side[0][key]["mean"] - sum(values[key]["mean"] for values in side[1:])  # noqa: E731
    return {key: total(sides[0], key) - total(sides[1], key) for key in sorted(common)}


def by_seed(values: dict[tuple, float]) -> list[float]:
    """The mean over splits of each seed."""
    return [
        statistics.fmean(v for key, v in values.items() if key[0] == seed) for seed in sorted({k[0] for k in values})
    ]


def enough(mean: float, std: float, most: int = 200) -> int | None:
    """The seeds after which a 95 % interval leaves out 0 if mean and deviation stay as they are; None: above `most`."""
    for n in range(3, most + 1):
        if stats.t.ppf(0.975, n - 1) * std / math.sqrt(n) < abs(mean):
            return n
    return None


# --- The page ---------------------------------------------------------------------------------------------------------

PAGE = """{navigation}# The papers' claims with a real language model

    python -m experiments.real --data-dir DIR --backbone FOLDER

Polytropon's benchmark and recipe: CrossFit's tasks, the backbone frozen, here in bfloat16, with LoRA of rank 4 on its
self-attention.{about} For each method the same search of learning rates, on the dev tasks alone
(`experiments/real_runs.py`); no test task was used to choose anything. Scores: the mean of the test tasks' official
metrics, in percent. All values, with their flags, commit, date and device, are in `real.jsonl`.

A verdict needs three seeds, and follows the rule of [claims.md](claims.md): "a > b" by a paired t-test at 5 %, "~" and
"<=" with a margin of {margin:g} points. "Signs as theirs": of the comparisons a > b, those whose mean is above 0,
whatever chance makes of it. "Would decide": seeds after which the interval leaves out zero if mean and
standard deviation stay as seen; with one seed the deviation is that of its few-shot splits.
{sections}"""
ABOUT = """ Model: SmolLM2-135M-Instruct, a 4-bit file that is dequantised when it is loaded. Data: a slice of the
gym's random partition, 29 tasks to train on, 3 to choose rates, 5 to test. The papers have BART-large, and 120, 20 and
20 tasks."""  # of results/ alone, not of a page that a reader makes


def write(folder: Path):
    """Write real.md and a figure for each budget of which something is made, from real.jsonl in a folder."""
    raw, sections = read_raw(folder / "real.jsonl"), []
    toy = verdicts.read_raw(ROOT / "results" / "claims.jsonl")
    for name, budget in BUDGETS.items():
        measured = values_of(raw, budget)
        if scores := {m: of for m, of in measured.items() if len(next(iter(of))) == 2}:
            of_seeds = {m: by_seed({key: value["mean"] for key, value in of.items()}) for m, of in scores.items()}
            reference = "LoRA" if "LoRA" in of_seeds else ""
            what = "mean score on the test tasks (%)"
            figures.by_method(of_seeds, folder / f"real-{name}", what, figures.PERCENT, reference)
            sections.append(section(name, budget, measured, scores, toy))
    text = "".join(sections) or "\nNothing is made yet.\n"
    about, navigation = (ABOUT, NAVIGATION) if folder.resolve() == ROOT / "results" else ("", "")
    (folder / "real.md").write_text(PAGE.format(navigation=navigation, margin=MARGIN, about=about, sections=text))


def section(name: str, budget: Budget, measured: dict, scores: dict, toy: dict) -> str:
    """A budget's part of the page: claims, scores, comparisons, training."""
    alt = "each method and variant on a line: its seeds as dots, their mean as a diamond, one LoRA as a dashed line"
    parts = [f"\n## Budget `{name}`\n", f"{budget.says}\n", claims_table(measured, toy), ""]
    parts += [f"![Mean scores: {alt}](real-{name}.png)\n", scores_table(measured, scores), ""]
    parts += ["### Comparisons\n", comparisons_table(measured), "", "### Pre-training\n", training_table(measured), ""]
    return "\n".join(parts)


def verdict_here(measured: dict, claim: Claim) -> tuple[str, list[tuple]]:
    """(verdict, [(comparison, differences by seed, what judge says)]) of a claim."""
    rows = []
    for a, relation, b in claim.compare:
        pairs = differences(measured, a, b)
        seeds = by_seed(pairs)
        part = judge(np.array(seeds), relation, np.zeros(len(seeds))) if len(seeds) >= 3 else None
        rows.append((f"{a} {relation} {b}", pairs, part))
    if not any(pairs for _, pairs, _ in rows):
        return "not made yet", rows
    if any(part is None for _, _, part in rows):
        return f"undecided: {max(len(by_seed(pairs)) for _, pairs, _ in rows)} of 3 seeds", rows
    return verdict([part for _, _, part in rows]), rows


def on_strings(name: str, raw: dict) -> str:
    """The verdict of a claim of `claims.md`, with a link, or that it is not made yet."""
    parts = judged(verdicts.CLAIMS[name], raw, verdicts.SEEDS)
    return f"[{name}](claims.md#{name}): {verdict(parts)}" if parts else f"{name}: not made yet"


def claims_table(measured: dict, toy: dict) -> str:
    lines = ["| the papers say | their numbers | on `strings` | here | signs as theirs |", "|---|---|---|---|---|"]
    for claim in CLAIMS.values():
        says, rows = verdict_here(measured, claim)
        made = [statistics.fmean(by_seed(pairs)) > 0 for what, pairs, _ in rows if pairs and " > " in what]
        beside = "; ".join(on_strings(name, toy) for name in claim.toy)
        lines.append(f"| {claim.says} | {claim.papers} | {beside} | {says} | {sum(made)} of {len(made)} |")
    return "\n".join(lines)


def scores_table(measured: dict, scores: dict) -> str:
    tasks = list(next(iter(next(iter(scores.values())).values()))["tasks"])
    lines = [("method", "seeds x splits", "for a new task", "before", "after", *tasks)]
    for name, of in scores.items():
        each = list(of.values())
        mean = mean_std_text(by_seed({key: value["mean"] for key, value in of.items()}), "±")
        before = statistics.fmean(value["before"] for value in each)
        by_task = [f"{statistics.fmean(value['tasks'][task] for value in each):.1f}" for task in tasks]
        new = f"{sum(each[0]['parameters'].values()):,}"
        lines.append((name, str(len(each)), new, f"{before:.1f}", mean, *by_task))
    return markdown(lines, left=1)


def comparisons_table(measured: dict) -> str:
    lines = [("claim", "comparison", "seed by seed", "mean", "verdict", "would decide")]
    for name, claim in CLAIMS.items():
        for what, pairs, part in verdict_here(measured, claim)[1]:
            seeds, digits = by_seed(pairs), 3 if name == "alignment" else 1
            mean = statistics.fmean(seeds) if seeds else 0.0
            spread = seeds if len(seeds) > 1 else list(pairs.values())
            need = enough(mean, statistics.stdev(spread)) if len(spread) > 1 and " > " in what else None
            decides = "" if len(spread) < 2 or " > " not in what else f"{need} seeds" if need else "more than 200 seeds"
            shown = " ".join(f"{x:+.{digits}f}" for x in seeds) or "not made yet"
            says = part.says if part else "undecided" if seeds else ""
            lines.append((name, what, shown, f"{mean:+.{digits}f}" if seeds else "", says, decides))
    return markdown(lines, left=2)


def training_table(measured: dict) -> str:
    lines = [("method", "seeds", "adapters", "and Z", "loss, first and last twentieth", "seconds")]
    for name in METHODS:
        if of := list(measured.get(f"trained {name}", {}).values()):
            ends = " to ".join(f"{statistics.fmean(value['loss'][k] for value in of):.2f}" for k in (0, 1))
            counts = [f"{of[0]['parameters'][kind]:,}" for kind in ("adapters", "routing")]
            lines.append((name, str(len(of)), *counts, ends, mean_std_text([value["seconds"] for value in of], "±")))
    return markdown(lines, left=1)


# --- The command ------------------------------------------------------------------------------------------------------


def make(args):
    """Make what is missing. Raises OutOfTime."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget, until = BUDGETS[args.budget], time.monotonic() + 60 * args.minutes
    where = ["--data-dir", args.data_dir, "--backbone", unpacked(args.backbone, args.runs / "backbone")]
    maker = Maker(args.results / "real.jsonl", args.runs, where, device, until)
    locks = {name: threading.Lock() for name in METHODS}
    with workers(args.jobs) as pool:
        runs = in_order(tuple(args.seeds) or budget.seeds)
        list(pool.map(lambda run: make_all(maker, run[1], budget, run[0], locks[run[1]]), runs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="", help="folder of CrossFit's tasks, in the gym's layout")
    parser.add_argument("--backbone", default="", help="folder of a model, or a Hugging Face name")
    parser.add_argument("--budget", choices=BUDGETS, default="papers", help="how much is trained and scored")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the next call goes on")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, also on one GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="those of the budget if not given")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of raw numbers, page, figures")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "real", help="folder of what is half done")
    parser.add_argument("--page", action="store_true", help="only write the page, from the values in the raw file")
    args = parser.parse_args()
    if not args.page and not (args.data_dir and args.backbone):
        parser.error("--data-dir and --backbone are needed, but for --page")
    if args.jobs < 1 or args.minutes <= 0 or any(seed < 0 for seed in args.seeds):
        parser.error("--jobs and --minutes must be above 0, --seeds not negative")
    for name in ("results",) if args.page else ("results", "runs"):
        try:
            getattr(args, name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--{name} {getattr(args, name)} cannot be made: {error.strerror}")
    read_raw(args.results / "real.jsonl")  # a damaged line is said before anything is made
    try:
        if not args.page:
            make(args)
    except OutOfTime:
        print(f"{args.minutes:g} minutes are over: the same command goes on")
    finally:
        write(args.results)
    print(f"{args.results / 'real.md'} is written")


if __name__ == "__main__":
    exit_on_user_error(main)
