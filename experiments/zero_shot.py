"""Zero-shot transfer with a real language model (MHR section 5.3, Table 5): SuperNI's tasks, the average of the skills.

    python -m experiments.zero_shot --data-dir DIR --backbone FOLDER                 what is missing, then the page
    python -m experiments.zero_shot --data-dir DIR --backbone FOLDER --minutes 12    for 12 minutes; again: goes on
    python -m experiments.zero_shot --page                                           the page and its figure alone

DIR has tasks of SuperNI in the official layout (docs/benchmarks.md); FOLDER is a language model. Without examples of a
held-out task nothing says which skills it needs: the skills are averaged, and that one adapter is trained on the
multi-task mixture for some further steps. One LoRA is trained on for as many.

results/zero-shot.jsonl gets a line as soon as a value is made; --runs and all else is as in `experiments/real.py`. Each
method's learning rate comes from three short pre-trainings, by the loss on unseen examples of the training tasks. There
are no dev tasks, and no test task is used to choose anything.
"""

from plumbing.errors import exit_quietly_on_signals

if __name__ == "__main__":  # Ctrl-C during the slow imports
    exit_quietly_on_signals()

import math
import statistics
import threading
from collections.abc import Callable
from pathlib import Path

from experiments import verdicts
from experiments.claim_figures import shown
from experiments.commands import ROOT, Failed, side_by_side
from experiments.methods import NAVIGATION
from experiments.real import Claim, claims_table, comparisons_table
from experiments.real_command import arguments, carry_out, maker_of
from experiments.real_runs import Maker, forget, read_raw, remove_hollow, setup_of
from experiments.verdicts import MARGIN
from plumbing.checkpoint import LOWER_RATE
from plumbing.errors import exit_on_user_error
from plumbing.folders import read_lines
from plumbing.machine import commit
from plumbing.tables import markdown, mean_std_text
from scoring import main_scores
from tools import figures

# --- What is compared -------------------------------------------------------------------------------------------------

SETTING = "--dataset superni --layers self-attention --rank 4 --precision bf16 --max-input 256 --max-output 64"
METHODS = {  # name: (flags of train.py, the method of the further steps)
    "LoRA": ("--method lora", "lora"),
    "Poly-mu": ("--method poly --skills 8", "mu"),
    "MHR-mu": ("--method mhr --skills 8 --heads 8", "mu"),
}
RATES = ("3e-4", "1e-3", "3e-3")  # tried by the search
STEPS, SEARCH_STEPS = 950, 120  # of pre-training: of 8 examples, 2.7 passes over the slice's 2,850, as the authors'
FURTHER = (0, 50, 100, 200)
SEEDS = (0, 1, 2)
SCORE = "--beams 1 --batch-size 50"  # flags of evaluate.py
BACKBONE = "backbone alone"
UNTOUCHED = f"{SETTING} --method lora --steps 1 --lr 1e-30 --seed 0"  # B stays 0, to 29 digits

CLAIMS = {
    "averaged": Claim(
        "The average of the skills, as it is, is below one LoRA.",
        "T5-XL: LoRA 56.5, MHR-μ 48.0, Poly-μ 46.0; T0-11B the other way: 61.2, 63.5, 62.1 (MHR Tab. 5)",
        ("zero-shot",),
        (("LoRA", ">", "MHR-mu"), ("LoRA", ">", "Poly-mu")),
    ),
    "trained on": Claim(
        "After some further steps MHR's average is above one LoRA and above Poly's average.",
        "T5-XL, the first such column: MHR-μ 58.0, LoRA 56.0, Poly-μ 53.0; the next ones: 57.1, 56.1, 56.8 and 56.3, "
        "55.7, 56.3 (MHR Tab. 5)",
        ("zero-shot",),
        tuple((f"MHR-mu, +{k} steps", ">", f"{b}, +{k} steps") for k in FURTHER[1:] for b in ("LoRA", "Poly-mu")),
    ),
    "repaired": Claim(
        "Further steps help the averages.",
        "T5-XL: MHR-μ 48.0, then 58.0; Poly-μ 46.0, then 53.0 (MHR Tab. 5)",
        ("zero-shot",),
        tuple((f"{name}, +{FURTHER[1]} steps", ">", name) for name in ("MHR-mu", "Poly-mu")),
    ),
}


def label(name: str, further: int) -> str:
    """The name of a measure: "LoRA", and "LoRA, +50 steps" after further training."""
    return f"{name}, +{further} steps" if further else name


# --- Values -----------------------------------------------------------------------------------------------------------


def training_flags(name: str, rate: str, seed: int, steps: int = STEPS) -> str:
    """All that determines a pre-training but what its setup has (`setup_of`)."""
    look = f"--eval-every {steps}" * (steps == SEARCH_STEPS)
    return " ".join(f"{SETTING} {METHODS[name][0]} --steps {steps} {look} --lr {rate} --seed {seed}".split())


def key_of(flags: str, further: int) -> str:
    """The key of a zero-shot score in the raw file."""
    return f"{flags} | further {further} | {SCORE}"


def valid_loss(maker: Maker, flags: str) -> dict:
    """{"valid_loss": of a short pre-training, on unseen examples of the training tasks; None if it is not finite}."""

    def make():
        try:
            done = maker.pretrain(flags)
        except Failed as failed:
            if LOWER_RATE not in str(failed):
                raise
            return {"valid_loss": None, "commit": commit()}
        forget(ROOT / maker.folder(flags))
        last = read_lines(ROOT / maker.folder(flags) / "log.jsonl")[-1]
        return {"valid_loss": last["valid_loss"], "commit": done["commit"]}

    return maker.value(flags, make)


def search(name: str, look: Callable[[str], dict]) -> str:
    """The rate of a method, of three: that of the lowest loss after SEARCH_STEPS, seed 0. look(flags) gives it."""

    def loss(rate: str) -> float:
        found = look(training_flags(name, rate, 0, SEARCH_STEPS))["valid_loss"]
        return math.inf if found is None else found

    return min(RATES, key=loss)


def zero_shot(maker: Maker, flags: str, further: int, method: str) -> dict:
    """{"tasks": {name: score}, "mean"} on the held-out tasks, after a pre-training and further steps of a method."""

    def make():
        scored, folder = maker.folder(flags, f"scored {further}"), maker.folder(flags)
        if not (ROOT / scored / "scores.json").exists():
            folder = trained_on(maker, flags, further, method) if further else maker.weights(flags)
        places = ["--checkpoint", str(folder), "--data-dir", maker.where["--data-dir"], "--zero-shot"]
        done = maker.run("evaluate.py", scored, [*places, *SCORE.split()], "scores.json")
        tasks = {task: round(score, 3) for task, score in main_scores(done["tasks"]).items()}
        return {"tasks": tasks, "mean": done["mean"], "commit": done["commit"]}

    return maker.value(key_of(flags, further), make)


def trained_on(maker: Maker, flags: str, further: int, method: str) -> Path:
    """The folder of a run, with its weights, that trains another one on for so many steps of a method."""
    folder = maker.folder(flags, f"further {further}")
    remove_hollow(ROOT / folder)
    if not (ROOT / folder / "result.json").exists():
        on = ["--from-run", str(maker.weights(flags)), "--method", method, "--steps", str(further)]
        maker.run("train.py", folder, [*on, "--save-every", "2m", "--resume"])
    return folder


def make_all(maker: Maker, name: str, seed: int, lock: threading.Lock):
    """All values of a method and a seed. lock: of the method, so that two seeds do not both search."""
    if name == BACKBONE:
        zero_shot(maker, UNTOUCHED, 0, "lora")
        return forget(ROOT / maker.folder(UNTOUCHED))
    with lock:
        rate = search(name, lambda flags: valid_loss(maker, flags))
    flags = training_flags(name, rate, seed)
    for further in FURTHER:
        zero_shot(maker, flags, further, METHODS[name][1])
    for further in FURTHER:
        forget(ROOT / maker.folder(flags, *[f"further {further}"] * bool(further)))


# --- The page ---------------------------------------------------------------------------------------------------------

PAGE = """{navigation}# Zero-shot transfer with a real language model

    python -m experiments.zero_shot --data-dir DIR --backbone FOLDER

MHR's Table 5 on SuperNI's tasks: without examples of a held-out task, its adapter is the average of the skills, which
is trained on the multi-task mixture for some further steps; one LoRA is trained on for as many. {steps} steps of 8
examples, the backbone frozen, LoRA of rank 4 on its self-attention, bfloat16, inputs cut at 256 tokens; further steps
are at the same rate.{about} Scores: the mean Rouge-L of the held-out tasks' first 100 examples, greedy decoding. No
test task was used to choose anything. All values, with their flags, commit, date and device, are in `zero-shot.jsonl`.

A verdict needs three seeds, and follows the rule of `results/claims.md` with a margin of {margin:g} points. "Signs as
theirs" and "would decide" are as in `real.md`.
{sections}"""
ABOUT = """ Model: SmolLM2-135M-Instruct, a 4-bit file that is dequantised when it is loaded. Data: a slice of 30
training tasks (2,850 examples) and 10 test tasks. The papers have T5-XL and T0-11B, 756 and 119 tasks."""
ALT = "three curves over further steps, with bars of one standard deviation: one LoRA, Poly's and MHR's average"


def rate_of(raw: dict[str, dict], name: str) -> str | None:
    """The rate of a method as `search` found it; None if it is not done."""
    try:
        return search(name, lambda flags: raw[flags]["value"])
    except KeyError:
        return None


def values_of(raw: dict[str, dict]) -> dict[str, dict[tuple, dict]]:
    """{measure: {(seed,): its line's value}} of all that is made."""
    seeds = sorted({int(key.split(" | ")[0].split()[-1]) for key in raw})
    keys = {label(BACKBONE, 0): {(0,): key_of(UNTOUCHED, 0)}}
    for name in METHODS:
        if rate := rate_of(raw, name):
            for k in FURTHER:
                keys[label(name, k)] = {(seed,): key_of(training_flags(name, rate, seed), k) for seed in seeds}
    made = {of: {at: raw[key]["value"] for at, key in each.items() if key in raw} for of, each in keys.items()}
    return {measure: values for measure, values in made.items() if values}


def scores_table(measured: dict[str, dict]) -> str:
    tasks = list(next(iter(next(iter(measured.values())).values()))["tasks"])
    lines = [("after", "seeds", "mean", *tasks)]
    for name, of in measured.items():
        each = list(of.values())
        by_task = [f"{statistics.fmean(value['tasks'][task] for value in each):.1f}" for task in tasks]
        lines.append((shown(name), str(len(each)), mean_std_text([value["mean"] for value in each], "±"), *by_task))
    return markdown(lines, left=1)


def draw(measured: dict[str, dict], folder: Path):
    """The means over further steps: of each method the seeds that have all."""
    series = {}
    for name in METHODS:
        of = [measured.get(label(name, k), {}) for k in FURTHER]
        whole = sorted(set.intersection(*map(set, of)))
        if whole:
            series[shown(name)] = [(FURTHER, [values[seed]["mean"] for values in of]) for seed in whole]
    what = "mean Rouge-L, held-out tasks (%)"
    if series:
        figures.over_steps({"": series}, folder / "zero-shot", what, figures.PERCENT, "further steps")
    return bool(series)


def write(folder: Path):
    """Write zero-shot.md, and its figure if a method has all its steps, from zero-shot.jsonl in a folder."""
    raw, here = read_raw(folder / "zero-shot.jsonl"), folder.resolve() == ROOT / "results"
    toy, measured = verdicts.read_raw(ROOT / "results" / "claims.jsonl"), values_of(raw)
    parts = ["\nNothing is made yet.\n"]
    if measured:
        rates = "; ".join(f"{shown(name)} {rate}" for name in METHODS if (rate := rate_of(raw, name)))
        parts = ["", claims_table(CLAIMS, measured, (), toy, here), ""]
        parts += [f"![Scores: {ALT}](zero-shot.png)\n"] * draw(measured, folder)
        parts += ["### Scores\n", scores_table(measured), "", "### Comparisons\n"]
        parts += [comparisons_table(CLAIMS, measured, ()), "", "### Learning rates\n"]
        parts += [f"The best of {', '.join(RATES)} by the loss on unseen examples of the training tasks, after "]
        parts[-1] += f"{SEARCH_STEPS} steps, seed 0: {rates}.\n"
    about, navigation = (ABOUT, NAVIGATION) if here else ("", "")
    filled = PAGE.format(navigation=navigation, steps=STEPS, about=about, margin=MARGIN, sections="\n".join(parts))
    (folder / "zero-shot.md").write_text(filled)


# --- The command ------------------------------------------------------------------------------------------------------


def make(args):
    """Make what is missing: a seed of all methods first. Raises OutOfTime."""
    maker = maker_of(args, "zero-shot", setup_of(args.data_dir, args.backbone, "superni", SETTING))
    locks = {name: threading.Lock() for name in METHODS} | {BACKBONE: threading.Lock()}
    runs = [(BACKBONE, 0), *((name, seed) for seed in args.seeds or SEEDS for name in METHODS)]
    side_by_side(lambda run: make_all(maker, *run, locks[run[0]]), runs, args.jobs)


def main():
    args = arguments(__doc__, "SuperNI's tasks, in the official layout", "zero-shot")
    carry_out(args, lambda: make(args), write, "zero-shot")


if __name__ == "__main__":
    exit_on_user_error(main)
