"""The values of measures, made once and read from a raw file, and the rule that compares them.

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

import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments import claims, scarce
from experiments.claims import Claim, Measure, measures_of, parts_of
from experiments.commands import ROOT, raw_lines, refuse_absent_gpu, run, side_by_side
from experiments.methods import METHODS, RATES, RUNS, adapt, pretrain
from plumbing.errors import RunError, UserError
from plumbing.folders import append_line, check_numbers
from recipes import PRETRAINING, VARIANTS
from tools import figures


SEEDS = (0, 1, 2, 3, 4)
LEAST = 3  # seeds with which a comparison is judged
MARGIN = 5.0  # points of exact match: what counts as close
CLAIMS, MEASURES = claims.CLAIMS | scarce.CLAIMS, claims.MEASURES | scarce.MEASURES


# --- Values: from the raw file, or from runs --------------------------------------------------------------------------


def rates_of(measure: Measure) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The flags of train.py that set a measure's rates, and those of adapt.py for each variant."""
    pretraining, few_shot = measure.rates or RATES[measure.method]
    return pretraining.split(), {variant: tuple(flags.split()) for variant, flags in few_shot.items()}


def flags_of(measure: Measure) -> str:
    """All that determines a measure but the seed: the key of its line in the raw file. RUNS names the recipe."""
    rates, few_shot = rates_of(measure)
    few = " ".join(few_shot[measure.then]) if measure.then in VARIANTS else ""
    then = f"{measure.then} {few or measure.steps or ''}".strip()
    recipe = RUNS.name + f", {measure.since}" * bool(measure.since)
    return f"{METHODS[measure.method][0]} {' '.join([*rates, measure.flags]).strip()} | {then} | {recipe}"


def read_raw(path: Path) -> dict[tuple[str, int], dict]:
    """{(flags, seed): line} of a raw file; {} if there is none. Raises UserError for a damaged line."""

    def key(line: dict) -> tuple[str, int]:
        value, (before, after) = line["value"], line["seconds"]
        check_numbers(path, value if isinstance(value, dict) else {"value": value})
        check_numbers(path, {"trained": line["trained"], "seed": line["seed"], "before": before, "after": after})
        new, commits = line["new task"], line["commits"]
        if type(commits) is not list or [type(commit) for commit in commits] != [str, str]:
            raise ValueError
        if not (new is None or type(new) is int):
            raise ValueError
        return line["flags"], line["seed"]

    return raw_lines(path, key)


def make_missing(names: list[str], seeds: tuple[int, ...], path: Path, runs: Path, jobs: int, device: str = "cpu"):
    """Make the values of these measures that the raw file lacks, and append each one as soon as it is made.

    device: where scripts run, for the lines. Raises UserError if the file has values that were made on another, or is
    that of results/ and lacks a value of earlier code, which this code does not make.
    """
    have, groups, ours = read_raw(path), defaultdict(list), path.resolve() == ROOT / "results" / "claims.jsonl"
    for name in names:
        measure = MEASURES[name]
        for seed in seeds:
            if (flags_of(measure), seed) not in have:
                if ours and not measure.since:
                    what = f"{path} lacks {name} of seed {seed}, which earlier code made"
                    raise UserError(f"{what}: take its line from git, or give another --results")
                groups[seed, measure.method, (*rates_of(measure)[0], *measure.flags.split())].append(measure)
    lock = threading.Lock()
    if others := {line.get("on", "cpu") for line in have.values()} - {device}:
        raise UserError(f"{path} has values made on {others.pop()}: give another --results, or --device")

    def make(group):
        (seed, method, flags), measures = group  # measures of one run
        checkpoint, trained = pretrain(method, seed, runs, flags)
        for measure in measures:
            value, new, seconds, commit = ask(measure, checkpoint, trained, seed)
            line = {"flags": flags_of(measure), "seed": seed, "value": value, "trained": total(trained)}
            line |= {"new task": new, "seconds": [trained["seconds"], seconds]}
            line |= {"commits": [trained["commit"], commit], "on": device}
            with lock:
                append_line(path, line)

    side_by_side(make, sorted(groups.items(), key=lambda group: group[0]), jobs)


def use_device(device: str):
    """Let all runs use this device: a script takes the GPU that it sees. Raises UserError if torch sees none."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    refuse_absent_gpu(device)


def estimate(names: list[str], seeds: tuple[int, ...], path: Path, device: str, jobs: int) -> str:
    """What making these measures would take: the runs that the raw file lacks, by steps measured now.

    A step of a method counts as MHR's. An adaptation takes its share of a pre-training as in results/. Runs side by
    side are taken not to slow each other down, so on one GPU it may be longer.
    """
    import torch

    import train

    torch.set_num_threads(1)  # as runs have
    have, there = read_raw(path), read_raw(ROOT / "results" / "claims.jsonl").values()
    missing = [(seed, m) for name in names for seed in seeds if (flags_of(m := MEASURES[name]), seed) not in have]
    trainings = len({(seed, m.method, *rates_of(m)[0], m.flags) for seed, m in missing})
    adaptations = len([m for _, m in missing if m.then in VARIANTS])
    before, after = (sum(line["seconds"][k] for line in there if line["seconds"][1]) for k in (0, 1))
    tried = train.main(dict(method="mhr", dataset="strings", device=device, dry_run=True))
    one = tried["seconds_per_step"] * PRETRAINING["strings"]["steps"]
    hours = (trainings + adaptations * after / before) * one / 3600
    each = f"{trainings} pre-trainings of {one:.0f} s, {adaptations} adaptations of {one * after / before:.0f} s"
    return f"missing: {each}: {hours:.1f} hours, {jobs} at a time {hours / jobs:.1f}; analyses and zero-shot come to it"


def total(result: dict) -> int:
    return sum(result["parameters"].values())


def ask(measure: Measure, checkpoint: Path, trained: dict, seed: int) -> tuple[float | dict, int | None, float, str]:
    """(value, parameters trained for a new task, seconds of adaptation, commit) of a measure of a pre-training run.

    A value over training is {step: value}.
    """
    if measure.then == "seen":
        return trained["mean"], None, 0.0, trained["commit"]
    if measure.then in VARIANTS:
        result = adapt(checkpoint, measure.then, seed, rates_of(measure)[1][measure.then])
        return result["mean"], total(result), result["seconds"], result["commit"]
    if measure.then == "zero-shot":
        value, commit = zero_shot(measure, checkpoint, seed)
        return value, None, 0.0, commit
    run_of = lambda m: (m.method, m.flags, rates_of(m)[0])  # noqa: E731
    same_run = (m for m in MEASURES.values() if run_of(m) == run_of(measure))
    less = [] if any(m.then.startswith("alignment") for m in same_run) else ["--no-alignment"]  # which takes a minute
    folder = checkpoint / "".join(["analysis-of-claims", *less])
    flags = ["--checkpoint", str(checkpoint), "--output-dir", str(folder), *less]
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
        result = adapt(checkpoint, variant, seed, rates_of(measure)[1][variant])
        return result["mean_before"], result["commit"]
    more = checkpoint.with_name(f"{checkpoint.name}_{measure.steps}-more")
    flags = ["--from-run", str(checkpoint), "--steps", str(measure.steps), *(["--method", "mu"] if routed else [])]
    run("train.py", [*flags, "--resume", "--output-dir", str(more)], more / "result.json")
    flags = ["--checkpoint", str(more), "--zero-shot", "--split", str(seed), "--save", str(more / "zero-shot.json")]
    result = run("evaluate.py", flags, more / "zero-shot.json")
    return result["mean"], result["commit"]


# --- Values over seeds ------------------------------------------------------------------------------------------------


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


def hours(lines: list[dict]) -> float:
    """Hours of training and adaptation, each run counted once however many measures it has."""
    run_of = lambda line: (*line["flags"].split(" | ")[::2], line["seed"])  # noqa: E731, its flags, and its recipe
    runs = {run_of(line): line["seconds"][0] for line in lines}
    adaptations = {(line["flags"], line["seed"]): line["seconds"][1] for line in lines}
    return (sum(runs.values()) + sum(adaptations.values())) / 3600


def commits_of(lines: Iterable[dict]) -> str:
    """The commits that made these values, each once."""
    return ", ".join(sorted({commit for line in lines for of in line["commits"] for commit in of.split(", ")}))


# --- Statistics -------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A comparison of a and b. seeds: a - b of each seed. difference, interval: their mean and its 95 % confidence
    interval. says: holds, fails or undecided."""

    seeds: list[float]
    difference: float
    interval: tuple[float, float]
    says: str


def judge(a: np.ndarray, relation: str, b: np.ndarray, margin: float = MARGIN) -> Verdict:
    """Compare two measures, given by their values (seeds,), by the rule at the top of this file.

    Below LEAST seeds nothing is decided.
    """
    d = np.asarray(a, float) - np.asarray(b, float)
    if len(d) < LEAST:
        return Verdict(d.tolist(), d.mean(), (-math.inf, math.inf), "undecided")
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


def judged(claim: Claim, raw: dict[tuple[str, int], dict], seeds: tuple[int, ...]) -> list[Verdict]:
    """What the rule says to each comparison of a claim; nothing if a value is not made yet."""
    measured = collect(raw, measures_of(claim), seeds)
    if measured.keys() != set(measures_of(claim)):
        return []
    sides = [(side(a, measured, seeds), relation, side(b, measured, seeds)) for a, relation, b in claim.compare]
    return [judge(*compared) for compared in sides]
