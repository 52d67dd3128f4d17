"""Zero-shot transfer with a real language model: the experiment of MHR's Table 5 (section 5.3), on SuperNI's tasks.

    python -m experiments.zero_shot --data-dir DIR --backbone FOLDER                 what is missing, then the page
    python -m experiments.zero_shot --data-dir DIR --backbone FOLDER --minutes 12    for 12 minutes; again: goes on
    python -m experiments.zero_shot --page                                           the page and its figure alone

DIR has tasks of SuperNI in the official layout (docs/benchmarks.md); FOLDER is a language model. Without examples of a
held-out task nothing says which skills it needs: the skills are averaged, and that one adapter is trained on the
multi-task mixture for some further steps. One LoRA gets as many further steps.

results/zero-shot.jsonl gets a line as soon as a value is made. The command is stopped, resumed and moved as
`experiments/real.py`. A method's learning rate comes from three short pre-trainings, by the loss on unseen examples of
the training tasks: there are no dev tasks, and no test task is used to choose anything.
"""

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()

import math
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments import verdicts
from experiments.claim_figures import shown
from experiments.commands import ROOT, Failed, made_by, side_by_side
from experiments.methods import NAVIGATION
from experiments.real import Claim, claims_table, comparisons_table, lost, training_table
from experiments.real_command import arguments, carry_out, device_of, maker_of
from experiments.real_runs import Maker, forget, lowest, read_raw, refuse_other, remove_hollow, setup_of, unless_failed
from plumbing.errors import UserError, exit_on_user_error
from plumbing.folders import read_lines
from plumbing.machine import commit
from plumbing.tables import markdown, mean_std_text
from scoring import main_scores
from tools import figures

# --- What is compared -------------------------------------------------------------------------------------------------

PRECISION = "--precision bf16"  # of further steps too: on a CPU train.py takes fp32 unless it is given
SETTING = f"--dataset superni --layers self-attention --rank 4 {PRECISION} --max-input 256 --max-output 64"
METHODS = {  # name: (flags of train.py, the method of the further steps)
    "LoRA": ("--method lora", "lora"),
    "Poly-mu": ("--method poly --skills 8", "mu"),
    "MHR-mu": ("--method mhr --skills 8 --heads 8", "mu"),
}
RATES = ("3e-4", "1e-3", "3e-3")  # tried by the search
STEPS, SEARCH_STEPS = 950, 120  # of pre-training, 8 examples each: 2.7 passes over the slice's 2,850, as the authors'
FURTHER = (0, 50, 100, 200)
SEEDS = (0, 1, 2)
SCORE = "--beams 1 --batch-size 50"  # flags of evaluate.py
BACKBONE = "backbone alone"
UNTOUCHED = f"{SETTING} --method lora --steps 1 --lr 1e-30 --seed 0"  # B is 0 at first, and then 1e-30

CLAIMS = {
    "zero-shot": Claim(
        "The average of the skills is below LoRA as long as it is not trained further; after more steps MHR's is above "
        "LoRA after as many.",
        "T5-XL, without further steps: LoRA 56.5, MHR-μ 48.0; with: MHR-μ 58.0, 57.1, 56.3, LoRA 56.0, 56.1, 55.7. "
        "T0-11B: LoRA 61.2, MHR-μ 63.5; MHR-μ 64.5, 64.5, 64.4, LoRA 61.6, 61.5, 61.5 (MHR Tab. 5)",
        ("zero-shot",),
        (("LoRA", ">", "MHR-mu"), *((f"MHR-mu, +{k} steps", ">", f"LoRA, +{k} steps") for k in FURTHER[1:])),
    ),
    "zero-shot, Poly": Claim(
        "The average of MHR's skills is above that of Poly's, without further steps and after the first ones.",
        "T5-XL: MHR-μ 48.0, 58.0, 57.1, 56.3, Poly-μ 46.0, 53.0, 56.8, 56.3. T0-11B: MHR-μ 63.5, 64.5, 64.5, 64.4, "
        "Poly-μ 62.1, 63.6, 63.9, 64.4 (MHR Tab. 5)",
        (),
        (("MHR-mu", ">", "Poly-mu"), *((f"MHR-mu, +{k} steps", ">", f"Poly-mu, +{k} steps") for k in FURTHER[1:3])),
    ),
}


def label(name: str, further: int) -> str:
    """The name of a measure: "LoRA", and "LoRA, +50 steps" after further training."""
    return f"{name}, +{further} steps" if further else name


# --- Values -----------------------------------------------------------------------------------------------------------


def training_flags(name: str, rate: str, seed: int, steps: int) -> str:
    """All that determines a pre-training but what its setup has (`setup_of`)."""
    look = f"--eval-every {steps}" * (steps == SEARCH_STEPS)
    return " ".join(f"{SETTING} {METHODS[name][0]} --steps {steps} {look} --lr {rate} --seed {seed}".split())


def further_flags(name: str, further: int) -> str:
    """All that determines further steps but the run that they begin with, which has the rest."""
    return f"--method {METHODS[name][1]} --steps {further} {PRECISION}" if further else ""


def key_of(flags: str, further: str) -> str:
    """The key of a zero-shot score in the raw file."""
    return " | ".join(part for part in (flags, further, SCORE) if part)


def valid_loss(maker: Maker, flags: str) -> dict:
    """The loss of a short pre-training on unseen examples of the training tasks: {"valid_loss": it, or None}."""

    def make():
        log = ROOT / maker.folder(flags) / "log.jsonl"
        try:
            at, loss = maker.pretrain(flags)["commit"], read_lines(log)[-1]["valid_loss"]
        except Failed as failed:
            refuse_other(failed)
            at, loss = commit(), math.nan
        forget(log.parent)
        return {"valid_loss": loss if math.isfinite(loss) else None, "commit": at}

    return maker.value(flags, make)


def search(name: str, look: Callable[[str], dict]) -> tuple[str, dict[str, float | None]]:
    """A method's rate, and the loss of each: the lowest after SEARCH_STEPS, seed 0. look(flags): `valid_loss`.

    Training that fails has no loss. Raises UserError if all do.
    """
    losses = {rate: look(training_flags(name, rate, 0, SEARCH_STEPS))["valid_loss"] for rate in RATES}
    return lowest(losses, f"{name}, --lr"), losses


def zero_shot(maker: Maker, flags: str, further: str) -> dict:
    """The held-out tasks' scores after a pre-training and further steps: {"tasks": {name: score}, "mean", "trained"}.

    "trained": the commits that trained last (`commands.made_by`).
    """

    def make():
        scored, folder = maker.folder(flags, f"{further} {SCORE}"), maker.folder(flags)
        if not (ROOT / scored / "scores.json").exists():
            folder = trained_on(maker, flags, further) if further else maker.weights(flags)
        places = ["--checkpoint", str(folder), "--data-dir", maker.where["--data-dir"], "--zero-shot"]
        done = maker.run("evaluate.py", scored, [*places, *SCORE.split()], "scores.json")
        trained = made_by(ROOT / (maker.folder(flags, further) if further else folder) / "result.json")
        tasks = {task: round(score, 3) for task, score in main_scores(done["tasks"]).items()}
        return {"tasks": tasks, "mean": done["mean"], "commit": done["commit"], "trained": trained}

    return maker.value(key_of(flags, further), make)


def trained_on(maker: Maker, flags: str, further: str) -> Path:
    """The folder of a run, with its weights, of further steps after a pre-training."""
    folder = maker.folder(flags, further)
    remove_hollow(ROOT / folder)
    if not (ROOT / folder / "result.json").exists():
        base = ["--from-run", str(maker.weights(flags)), "--data-dir", maker.where["--data-dir"]]
        maker.run("train.py", folder, [*base, *further.split(), "--save-every", "2m", "--resume"])
    return folder


def make_all(maker: Maker, name: str, seed: int, lock: threading.Lock):
    """All values of a method and a seed. lock: of the method, so that two seeds do not both search.

    If training is not finite that is written down, and the rest of this run is left out.
    """
    if name == BACKBONE:
        zero_shot(maker, UNTOUCHED, "")
        return forget(ROOT / maker.folder(UNTOUCHED))
    with lock:
        rate, _ = search(name, lambda flags: valid_loss(maker, flags))
    flags, all_further = training_flags(name, rate, seed, STEPS), [further_flags(name, k) for k in FURTHER]

    def make():
        maker.trained(flags)
        for further in all_further:
            zero_shot(maker, flags, further)

    unless_failed(maker, flags, make)
    for further in all_further:
        forget(ROOT / (maker.folder(flags, further) if further else maker.folder(flags)))


# --- The page ---------------------------------------------------------------------------------------------------------

PAGE = """{navigation}# Zero-shot transfer with a real language model

    python -m experiments.zero_shot --data-dir DIR --backbone FOLDER

The experiment of MHR's Table 5, on SuperNI's tasks. Without examples of a held-out task, its adapter is the average of
the skills, which is trained on the multi-task mixture for some further steps; one LoRA gets as many. The paper's
numbers are accuracies of large models on other tasks: compare signs, not sizes. Its numbers of further steps
are not in the text that we have; these are ours.{about}

Each training step has 8 examples, inputs are cut at 256 tokens and outputs at 64, all is in bfloat16. The backbone is
frozen; its self-attention has LoRA of rank 4, or 8 skills of it, MHR's with 8 heads. The rest is SuperNI's recipe
(`recipes.py`). Pre-training has {steps} steps: as many passes over the data as the authors'. Further steps are at the
rate of their pre-training, which rises and falls again; the rate of an average is therefore that of its routed
pre-training. Scores: Rouge-L, the mean of the held-out tasks, of their first 100 examples, with greedy decoding. No
test task was used to choose anything. All values, with their flags, commits, date and device, are in
`zero-shot.jsonl`.

A verdict needs three seeds, and follows the rule of `results/claims.md`: "a > b" by a paired t-test at 5 %. "Signs as
theirs": the comparisons whose mean is above 0, whatever chance makes of it. "Would decide": the seeds after which
the rule decides if mean and standard deviation stay as seen, so that it takes two seeds to say. Nothing is corrected
for the number of comparisons.
{sections}"""
ABOUT = """ Model: SmolLM2-135M-Instruct, a 4-bit file that is dequantised when it is loaded. Data: a slice of SuperNI,
30 tasks to train on, with 2,850 examples, and 10 test tasks. Not blind: scores of this model on these tasks, of smaller
budgets and after few-shot adaptation, had been seen ([smollm.md](smollm.md)) before the claims were written down."""


def rates_of(raw: dict[str, dict], name: str) -> tuple[str, dict[str, float | None]] | None:
    """The rate of a method and the losses of all, as `search` found them; None if it is not done."""
    try:
        return search(name, lambda flags: raw[flags]["value"])
    except (KeyError, UserError):  # not all there, or not finite at any rate
        return None


def runs_of(raw: dict[str, dict]) -> Iterator[tuple[str, int, str]]:
    """(method, seed, its flags of train.py) of all runs that may be in a raw file."""
    seeds = sorted({int(key.split(" | ")[0].split()[-1]) for key in raw})
    for name in METHODS:
        if found := rates_of(raw, name):
            yield from ((name, seed, training_flags(name, found[0], seed, STEPS)) for seed in seeds)


def values_of(raw: dict[str, dict]) -> dict[str, dict[tuple, dict]]:
    """{measure: {(seed,): its line's value}} of all that is made; "trained METHOD" is what pre-training says."""
    keys = {BACKBONE: {(0,): key_of(UNTOUCHED, "")}}
    for name, seed, flags in runs_of(raw):
        keys.setdefault(f"trained {name}", {})[seed,] = flags
        for k in FURTHER:
            keys.setdefault(label(name, k), {})[seed,] = key_of(flags, further_flags(name, k))
    made = {of: {at: raw[key]["value"] for at, key in each.items() if key in raw} for of, each in keys.items()}
    return {measure: values for measure, values in made.items() if values}


def scores_table(scores: dict[str, dict]) -> str:
    tasks = list(next(iter(next(iter(scores.values())).values()))["tasks"])
    lines = [("method", "seeds", "mean", *tasks)]
    for name, of in scores.items():
        each = list(of.values())
        by_task = [f"{statistics.fmean(value['tasks'][task] for value in each):.1f}" for task in tasks]
        lines.append((shown(name), str(len(each)), mean_std_text([value["mean"] for value in each], "±"), *by_task))
    return markdown(lines, left=1)


def rates_table(raw: dict[str, dict]) -> str:
    lines = [("method", *(f"--lr {rate}" for rate in RATES), "taken")]
    for name in METHODS:
        if found := rates_of(raw, name):
            best, losses = found
            edge = "*" * (best in (RATES[0], RATES[-1]))
            each = ["failed" if loss is None else f"{loss:.3f}" for loss in losses.values()]
            lines.append((shown(name), *each, best + edge))
    return markdown(lines, left=1)


def curves(measured: dict[str, dict]) -> dict[str, list[tuple]]:
    """{method: [(further steps, means) of each seed that has all]}, for `figures.over_steps`."""
    series = {}
    for name in METHODS:
        of = [measured.get(label(name, k), {}) for k in FURTHER]
        if whole := sorted(set.intersection(*map(set, of))):
            series[shown(name)] = [(FURTHER, [values[seed]["mean"] for values in of]) for seed in whole]
    return series


def write(folder: Path):
    """Write zero-shot.md, and its figure if a method has all its steps, from zero-shot.jsonl in a folder."""
    raw, here = read_raw(folder / "zero-shot.jsonl"), folder.resolve() == ROOT / "results"
    toy, measured = verdicts.read_raw(ROOT / "results" / "claims.jsonl"), values_of(raw)
    scores = {measure: of for measure, of in measured.items() if not measure.startswith("trained")}
    parts = ["", claims_table(CLAIMS, measured, (), toy, here), ""] if scores else ["\nNothing is made yet.\n"]
    if series := curves(measured):
        what = "Rouge-L, held-out tasks (%)"
        figures.over_steps({"": series}, folder / "zero-shot", what, figures.PERCENT, "further steps")
        alt = f"mean scores over further steps: {', '.join(series)}"
        parts += [f"![A curve for each method, {alt}](zero-shot.png)\n"]
    if scores:
        parts += ["### Scores\n", scores_table(scores), "", "### Comparisons\n"]
        parts += [comparisons_table(CLAIMS, measured, (), toy), "", "### Pre-training\n"]
        parts += [training_table(METHODS, measured), "", *lost(runs_of(raw), raw), "### Learning rates\n"]
        parts += [f"The loss on unseen examples of training tasks after {SEARCH_STEPS} steps, seed 0. *: an edge.\n"]
        parts += [rates_table(raw), ""]
    about, navigation = (ABOUT, NAVIGATION) if here else ("", "")
    filled = PAGE.format(navigation=navigation, steps=STEPS, about=about, sections="\n".join(parts))
    (folder / "zero-shot.md").write_text(filled)


# --- The command ------------------------------------------------------------------------------------------------------


def make(args):
    """Make what is missing: a seed of all methods first. Raises OutOfTime."""
    setup = setup_of(args.data_dir, args.backbone, "superni", SETTING)
    maker = maker_of(args, "zero-shot", f"{setup}, on {device_of(args)}")  # values of a CPU and a GPU do not mix
    locks = {name: threading.Lock() for name in METHODS} | {BACKBONE: threading.Lock()}
    runs = [(BACKBONE, 0), *((name, seed) for seed in args.seeds or SEEDS for name in METHODS)]
    side_by_side(lambda run: make_all(maker, *run, locks[run[0]]), runs, args.jobs)


def main():
    args = arguments(__doc__, "SuperNI's tasks, in the official layout", "zero-shot")
    carry_out(args, lambda: make(args), write, "zero-shot")


if __name__ == "__main__":
    exit_on_user_error(main)
