"""The papers' claims at laptop scale: one command per claim, five seeds, verdicts by one rule.

    python -m experiments.reproduce --claim all                  make what is missing, then results/claims.md
    python -m experiments.reproduce --claim mu zero-shot         some claims only
    python -m experiments.reproduce --claim mu --results again --runs again/runs     from scratch, elsewhere
    python -m experiments.reproduce --device cuda --jobs 6 --results gpu --runs gpu/runs     on a GPU, six at a time
    python -m experiments.reproduce --device cuda --jobs 6 --results gpu --estimate          how long that would take

A page made elsewhere ends with a comparison: the same differences and verdicts, here and in results/.

Measures, runs and the rule of the verdicts are in `verdicts.py`, the figures in `claim_figures.py`. A claim of
`claims.py` or `scarce.py` is a list of comparisons between measures, seed by seed.
"""

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()


import argparse
import math
from pathlib import Path

from experiments import claims, scarce
from experiments.claim_figures import ALTS, FIGURES, reference, shown
from experiments.claims import Claim, measures_of, parts_of
from experiments.verdicts import (
    CLAIMS, LEAST, MARGIN, SEEDS, Values, Verdict, collect, commits_of, estimate, hours, judged, make_missing, read_raw,
    use_device, verdict,
)  # fmt: skip
from experiments.commands import ROOT
from experiments.methods import KEEP_EVERY, NAVIGATION, RUNS
from plumbing.errors import exit_on_user_error
from plumbing.tables import counted
from recipes import FEW_SHOT, PRETRAINING
from tools import analyze

# --- The page ---------------------------------------------------------------------------------------------------------


def claims_on_page(raw: dict[tuple[str, int], dict], seeds: tuple[int, ...], asked: list[str]) -> list[str]:
    """Those of `claims.py`, those asked for, and those of `scarce.py` that have all their values."""
    return [n for n in CLAIMS if n in claims.CLAIMS or n in asked or judged(CLAIMS[n], raw, seeds)]


def beside_results(raw: dict[tuple[str, int], dict], seeds: tuple[int, ...], names: list[str]) -> str:
    """The differences and verdicts of a page made elsewhere beside those of results/, as a section of that page."""
    there, lines = read_raw(ROOT / "results" / "claims.jsonl"), []
    for name in names:
        both = zip(judged(CLAIMS[name], raw, seeds), judged(CLAIMS[name], there, SEEDS), strict=False)
        for compared, (ours, theirs) in zip(CLAIMS[name].compare, both, strict=False):
            cells = " | ".join(f"{in_numbers(v)[0]} ({in_numbers(v)[1]}), {v.says}" for v in (ours, theirs))
            low, high = theirs.interval
            same, within = ("yes" if so else "no" for so in (ours.says == theirs.says, low <= ours.difference <= high))
            lines.append(f"| {name} | {worded(*compared)} | {cells} | {same} | {within} |")
    head = f"# Beside results/\n\nThose values are of commit {commits_of(there.values())}.\n{CHANGES}\n"
    head += "| claim | comparison | here | in results/ | same verdict | here within that interval |\n"
    head += "|---|---|---|---|---|---|\n"
    return head + "\n".join(lines) + "\n" if lines else ""


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
        if not (parts := judged(claim, raw, seeds)):
            summary.append(f"| {name} | not made yet | | | | {claim.place} |")
            continue
        by = {says: [worded(*c) for c, part in zip(claim.compare, parts, strict=True) if part.says == says]
              for says in ("holds", "fails", "undecided")}  # fmt: skip
        cells = (f"{len(by['holds'])} of {len(parts)}", "; ".join(by["fails"]), "; ".join(by["undecided"]))
        summary.append(f"| [{name}](#{name}) | {verdict(parts)} | {' | '.join(cells)} | {claim.place} |")
        stories.append(story(name, claim, parts, measured) + where_scarce(f"{name}-scarce", names, raw, seeds))
        sections.append(section(name, claim, measured, parts))
        used += [line for of in measured.values() for line in of.lines]
    recipe, few = PRETRAINING["strings"], FEW_SHOT["strings"]
    about = dict(seeds=", ".join(map(str, seeds)), commits=commits_of(used), hours=hours(used), margin=MARGIN)
    about |= dict(steps=recipe["steps"], batch=recipe["batch_size"], rank=recipe["rank"], skills=recipe["skills"])
    on_gpu = any(line.get("on") == "cuda" for line in used)
    about |= dict(
        runs=counted(len(seeds), "run"),
        judged="" if len(seeds) >= LEAST else TOO_FEW,
        where=", runs on a GPU side by side," if on_gpu else " of one core",
    )
    about |= dict(methods="[docs/methods.md](../docs/methods.md#what-each-is)" if with_history else "`docs/methods.md`")
    about |= dict(shots=few["shots"], few_steps=few["steps"], few_batch=few["batch_size"], few_every=few["eval_every"])
    about |= dict(seen=recipe["eval_examples"], keep=KEEP_EVERY, examples=analyze.Config.examples)
    left = ", ".join(name for name in scarce.CLAIMS if name not in names)
    told = SCARCE + f"Not made yet: {left}.\n" * bool(left)
    about |= dict(scarce=told if any(name in scarce.CLAIMS for name in names) else "")
    about |= dict(history=HISTORY if with_history else "", navigation=NAVIGATION if with_history else "")
    page = PAGE.format(**about, summary="\n".join(summary), stories="\n".join(stories)) + "\n".join(sections)
    return page + ("" if with_history else beside_results(raw, seeds, names))


PAGE = """{navigation}# The papers' claims at laptop scale

The papers make claims about routing; each is tested here with {runs} of every method that it compares, on a
benchmark of string-editing tasks whose skills are known (`strings`) and a model of 1.2 million parameters. That is
small: MHR's tables are mostly of T5-XL, 3 billion parameters (also T0-3B and T0-11B), on T0's and
Super-NaturalInstructions' tasks; those of its 2022 version mostly of BART-large on CrossFit and T5-Large on Natural
Instructions; Polytropon's of BART-large on CrossFit, and of an agent. A claim is a list of comparisons, each of two
methods:

* **holds**: all come out as the paper says, by more than chance makes likely. In this setting the claim is supported.
* **does not hold here**: at least one contradicts the paper, by more than chance makes likely.
* **undecided**: neither. The claim may be true or not.{judged}

"a > b": a scores higher; "a ~ b": within {margin:g} points; "a <= b": at most {margin:g} points higher. LoRA (Shared):
`--method lora`, one LoRA for all tasks. A method's name alone: for a held-out task all of it is trained; "-z": that
task's row of Z alone; "-μ": one adapter, the average of the skills; "seen": new examples of the training tasks, with
nothing trained further. "Told": the input names the task's operations. s: skills; h: heads (-scarce: 16 if not said).
What Expert, Task-MoE, HyperFormer, AdapterSoup, Private and Random (by example, by task) are: {methods}.

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
{scarce}
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
Pre-training and few-shot adaptation took {hours:.1f} hours{where} by the clock; analyses, zero-shot runs and
scores are not counted. Commit {commits}.

# Numbers

"""

SCARCE = """
**Scarce skills**, the claims that end in -scarce: 2 skills (s), which is 32 tasks a skill where the recipe has 16; the
papers have 39 on T0, 15 on CrossFit. MHR has 16 heads (h), and batches are sorted less (below). Rates were searched
again for each number of skills, by the same rule on the same dev tasks (`trials.jsonl`), but not for LoRA, other
numbers of heads, nor where the input is told. Heads vary with 2 skills alone, and with 2 alone were random routing,
alignment, discreteness and inputs that say what to do asked again. `experiments/scarce.py` says how the setting was
chosen, and what had been seen by then.
"""
TOO_FEW = f" With fewer than {LEAST} seeds all are."
CHANGES = """Values in results/claims.md, but for scarce skills and MHR-z by blocks-2, are from before two changes:
batches were sorted by length within 50 batches, now 8 (`data.batches`), and HyperFormer ended at its ReLU, now in a
linear layer. For the new one a search found other learning rates (`results/methods.md`); the claims keep the old ones.
"""
HISTORY = """
Not blind: when the rule was written, scores of other rates had been seen, and when these runs were made, scores of
these very settings, seeds 0 to 2 ([LOG.md](LOG.md)). Seeds 3 and 4 are new; the tables have the differences of each
seed, in order. A seed fixes a value only as far as rounding goes: seed 1 of MHR gave 78.1 ([methods.md](methods.md))
and, with products taken in another order, 69.3.

All values were made with torch 2.13.0 (CPU), on two cores of an AMD EPYC, on 2026-11-23, those of scarce skills from
2026-11-28 on. MHR-z by blocks-2 is of 2026-11-27, and its machine was not written down.
{changes}
Three comparisons are decided by a hair, at p of 0.044 to 0.0498: Poly > Expert (few-shot); MHR, 16 heads > Poly, 8
skills (heads); and alignment of MHR, inventory > alignment of LoRA (Shared), inventory, on which alone the verdict of
alignment rests.

The same claims on real tasks with a real language model, as far as they were run: [real.md](real.md).
""".replace("{changes}", CHANGES)  # of results/claims.md alone, not of a page that a reader makes


def where_scarce(name: str, names: list[str], raw: dict[tuple[str, int], dict], seeds: tuple[int, ...]) -> str:
    """What a claim says of its twin with scarce skills, if the page has it."""
    if name not in names or not (parts := judged(CLAIMS[name], raw, seeds)):
        return ""
    hold = sum(part.says == "holds" for part in parts)
    says = f"**{verdict(parts)}** ({hold} of {len(parts)} comparisons hold), [{name}](#{name})"
    return f"\nWhere skills are scarce, with other rates, heads and batches: {says}.\n"


def worded(a: str | float, relation: str, b: str | float) -> str:
    """A comparison in the names that are shown."""
    return shown(f"{a} {relation} {b}")


def story(name: str, claim: Claim, parts: list[Verdict], measured: dict[str, Values]) -> str:
    """A claim for people who do not do statistics: what the papers say, what came out here, a figure."""
    by = {"fails": [], "undecided": [], "holds": []}
    for comparison, part in zip(claim.compare, parts, strict=True):
        by[part.says].append(f"{worded(*comparison)} ({part.difference:+.{digits_of(part)}f} on average)")
    agree = sum(part.says == "holds" for part in parts)
    as_said = "agree with the papers" if name.removesuffix("-scarce") in claims.CLAIMS else "come out as asked"
    out = f"{agree} of {len(parts)} comparisons {as_said}."
    out += f" Contradicted: {'; '.join(by['fails'])}." if by["fails"] else ""
    out += f" Not decided: {'; '.join(by['undecided'])}." if by["undecided"] else ""
    whose = "The papers say" if name in claims.CLAIMS else "Asked here"
    text = f"## {name}\n\n{whose}: {claim.says} ({claim.place}.)\n\n"
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
    return 1 if max(abs(x) for x in (part.difference, *part.interval) if math.isfinite(x)) > 1 else 3


def in_numbers(part: Verdict) -> tuple[str, str]:
    """The difference of a comparison, and its interval."""
    mean, low, high = (f"{x:+.{digits_of(part)}f}" for x in (part.difference, *part.interval))
    return mean, f"{low} to {high}" if math.isfinite(part.interval[0]) else "no interval"


def section(name: str, claim: Claim, measured: dict[str, Values], parts: list[Verdict]) -> str:
    """The numbers of a claim: comparisons and values."""
    spent = hours([line for of in measured.values() for line in of.lines])
    text = [f"## {name}: numbers", "", f"({spent:.1f} hours of runs, some for other claims too.)", ""]
    text += ["| comparison | difference | 95 % interval | | seed by seed |", "|---|---:|---:|---|---|"]
    for comparison, part in zip(claim.compare, parts, strict=True):
        (mean, interval), each = in_numbers(part), [f"{x:+.{digits_of(part)}f}" for x in part.seeds]
        text.append(f"| {worded(*comparison)} | {mean} | {interval} | {part.says} | {' '.join(each)} |")
    text += ["", "| measure | flags | trained on all tasks | for a new task | mean ± std |", "|---|---|---:|---:|---:|"]
    for measure, of in measured.items():
        first, flags = of.lines[0], of.lines[0]["flags"].rsplit(" | ", 1)[0].replace("|", "→")
        new = f"{first['new task']:,}" if first["new task"] else ""
        text.append(f"| {shown(measure)} | `{flags}` | {first['trained']:,} | {new} | {of} |")
    return "\n".join([*text, "", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    listed = f"all, or of: {', '.join(CLAIMS)}"
    parser.add_argument("--claim", nargs="+", choices=["all", *CLAIMS], default=["all"], metavar="NAME", help=listed)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of raw numbers, page, figures")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs; existing ones are reused")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel")
    parser.add_argument("--page", action="store_true", help="only write the page, from the values in the raw file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where runs are made")
    parser.add_argument("--estimate", action="store_true", help="only say how long it would take, from a few steps")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error("--seeds must be all different, and none negative")
    if args.jobs < 1:
        parser.error("--jobs must be above 0")
    if tuple(args.seeds) != SEEDS and args.results.resolve() == ROOT / "results":
        parser.error("--seeds: give --results too, for results/ holds the values of the seeds that are compared")
    if args.device == "cuda" and args.results.resolve() == ROOT / "results":
        parser.error("--device cuda: give --results and --runs too, for results/ holds values made on CPUs")
    if args.device == "cuda" and args.runs.resolve() == RUNS.resolve() and not (args.page or args.estimate):
        parser.error("--device cuda: give --runs too, for this folder holds runs of CPUs, which would be reused")
    names = list(CLAIMS) if "all" in args.claim else args.claim
    for name in ("results",) if args.page else ("results", "runs"):
        try:
            getattr(args, name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--{name} {getattr(args, name)} cannot be made: {error.strerror}")
    measures = list(dict.fromkeys(m for name in names for m in measures_of(CLAIMS[name])))
    use_device(args.device)
    if args.estimate:
        print(estimate(measures, tuple(args.seeds), args.results / "claims.jsonl", args.device, args.jobs))
        return
    if not args.page:
        make_missing(measures, tuple(args.seeds), args.results / "claims.jsonl", args.runs, args.jobs, args.device)
    asked = [] if "all" in args.claim else names
    raw = read_raw(args.results / "claims.jsonl")
    write_page(args.results, tuple(args.seeds), claims_on_page(raw, tuple(args.seeds), asked))
    print((args.results / "claims.md").read_text().removeprefix(NAVIGATION).split("\n## ")[0])


if __name__ == "__main__":
    exit_on_user_error(main)
