"""The papers' claims as comparisons between measures on `strings`: the data of `experiments/reproduce.py`.

A measure is a number taken from a pre-training run, with a value for each seed. A claim is a list of comparisons
between measures, judged by the rule at the top of verdicts.py.
"""

from typing import NamedTuple

from experiments.methods import METHODS, RATES

# --- Measures ---------------------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """A number for each seed.

    method: a key of METHODS, trained at its rates in RATES. flags: further flags of train.py. then: the number to take:
      a variant of adapt.py            the held-out score after it, percent
      seen                             the score on training tasks, percent
      zero-shot                        the held-out score without examples, percent, after `steps` more steps of
                                       multi-task training; routed methods are averaged first
      alignment, alignment_mixed       of gradients, the mean over the kept steps of training
      the path to a number in the analysis.json of tools/analyze.py, as mean.usage
    rates: others than those of RATES, in its form. since: a change of the code that this measure's values have, and
    those without it have not; a part of their name in the raw file.
    """

    method: str
    then: str = "all"
    flags: str = ""
    steps: int = 0
    rates: tuple[str, dict[str, str]] = ()
    since: str = ""


HEADS, SKILLS = (2, 16, 32), (2, 8, 16, 32)  # beside the recipe's
GRAINS = ("layer", "block", "blocks-2", "coder", "model")  # beside the recipe's linear
NEW = "windows of 8"  # of batches sorted by length (`data.batches`); values without this were made with 50
EXTRA = (0, 100, 400)  # steps of training after averaging: 0, 7 and 27 % of those before
TOLD = "--instructions"  # the input names the operations; without it nothing in the input says which task it is
ONE_SPEED = RATES["Poly"][0].split()[0].replace("--lr=", "--lr-z=")  # Z as slow as the skills
RECOVERY = (
    ("", "correlation"),
    (", chance (95 % point)", "chance_95"),
    (", lower bound", "low"),
    (", upper bound", "high"),
)
SHAPES = ("discreteness", "sparsity", "usage")
ROUTED_OR_NOT = ("LoRA (Shared)", "Poly", "MHR")
AS_ONE = {"LoRA (Shared)": "LoRA (Shared)", "Poly": "Poly-mu", "MHR": "MHR-mu"}  # one adapter for all
OTHER_SIZES = ("LoRA-big", "(IA)^3")

MEASURES = {
    **{name: Measure(name) for name in METHODS if name not in ("Private", "Random by example", "Random by task")},
    "HyperFormer": Measure("HyperFormer", rates=("--lr=0.0017 --lr-z=0.01", {"all": "--lr=0.003"})),  # as in results/
    "Full, then LoRA": Measure("Full", "lora"),
    "Private": Measure("Private"),
    "Private-mu": Measure("Private", "mu"),
    **{f"{name}-mu": Measure(name, "mu") for name in ("Random by example", "Random by task")},
    **{f"{name}-{variant}": Measure(name, variant) for name in ("Poly", "MHR") for variant in ("z", "mu")},
    **{f"MHR, {h} heads": Measure("MHR", "all", f"--heads={h}") for h in HEADS},
    **{f"MHR-z, {h} heads": Measure("MHR", "z", f"--heads={h}") for h in HEADS},
    **{f"MHR-z by {grain}": Measure("MHR", "z", f"--granularity={grain}") for grain in GRAINS},
    "MHR-z by blocks-2": Measure("MHR", "z", "--granularity=blocks-2", since=NEW),
    **{f"Poly, {s} skills": Measure("Poly", "all", f"--skills={s}") for s in SKILLS},
    **{f"Poly-z, {s} skills": Measure("Poly", "z", f"--skills={s}") for s in SKILLS},
    **{f"alignment of {name}, inventory": Measure(name, "alignment") for name in ROUTED_OR_NOT},
    **{f"alignment of {name}, mixtures": Measure(name, "alignment_mixed") for name in ROUTED_OR_NOT},
    **{f"{shape}, {s} skills": Measure("Poly", f"mean.{shape}", f"--skills={s}") for shape in SHAPES for s in SKILLS},
    **{f"{shape}, 4 skills": Measure("Poly", f"mean.{shape}") for shape in SHAPES},
    **{f"seen tasks, {s} skills": Measure("Poly", "seen", f"--skills={s}") for s in SKILLS},
    "seen tasks, 4 skills": Measure("Poly", "seen"),
    "seen tasks, one speed": Measure("Poly", "seen", ONE_SPEED),
    **{f"{shape}, one speed": Measure("Poly", f"mean.{shape}", ONE_SPEED) for shape in SHAPES},
    **{f"{shape}, random table": Measure("Random by task", f"mean.{shape}") for shape in SHAPES},
    **{f"recovery by {m}{what}": Measure(m, f"recovery.{key}") for m in ("Poly", "MHR") for what, key in RECOVERY},
    **{f"{AS_ONE[name]}, told, +{k} steps": Measure(name, "zero-shot", TOLD, k) for name in AS_ONE for k in EXTRA},
    **{f"{name}, told": Measure(name, "all", TOLD) for name in ("Full", "AdapterSoup", *OTHER_SIZES, *ROUTED_OR_NOT)},
    **{f"{name}-{variant}, told": Measure(name, variant, TOLD) for name in ("Poly", "MHR") for variant in ("z", "mu")},
    **{f"{name}-mu, told": Measure(name, "mu", TOLD) for name in ("Random by example", "Random by task")},
    "Full, then LoRA, told": Measure("Full", "lora", TOLD),
}  # fmt: skip


# --- Claims -----------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A claim of the papers.

    says: the claim in our words. place: where the papers make it. compare: [(a, relation, b)]; a and b are a measure, a
    number, or "measure - measure". also: further measures to show. figure: a key of claim_figures.FIGURES. note: what
    a reader must know of this setting.
    """

    says: str
    place: str
    compare: list[tuple[str, str, str | float]]
    also: tuple[str, ...] = ()
    figure: str = "dots"
    note: str = ""


BLIND = (
    "Nothing in the input says which task it is, so methods without task ids cannot tell the training tasks apart; "
    "where it is told, see the claim [{0}](#{0})."
)
DISCRETE = "Discreteness is 1 if all sigmoid(Z) are 0 or 1, and 0 if all are 1/2."
OLD_RATES = "Learning rates are those found where the input says nothing (`results/methods.md`), not searched again."
OTHERS = ("LoRA (Shared)", "LoRA-big", "(IA)^3", "AdapterSoup", "Private", "HyperFormer", "Task-MoE", "Expert")
CLAIMS = {
    "few-shot": Claim(
        "After few-shot adaptation MHR is above Poly, and Poly above LoRA (Shared), also of a higher rank (LoRA-big), "
        "(IA)³, AdapterSoup, one adapter a task (Private), HyperFormer, Task-MoE and routing by experts (Expert).",
        "MHR Fig. 2, Tab. 2; Polytropon Tab. 1",
        [("MHR", ">", "Poly"), *(("Poly", ">", other) for other in OTHERS)],
        also=("Full", "Full, then LoRA"),
        note=BLIND.format("few-shot-told") + " AdapterSoup, "
        "which compares inputs, finds nothing to compare here. MHR's own Tab. 3 (T0-11B) has Poly level with MHR. "
        "Expert is told which operations a held-out task is made of; "
        "Polytropon's Expert on CrossFit knows only its type, one of four.",
    ),
    "few-shot-told": Claim(
        "The same where the input says what to do: MHR is above Poly, and Poly above LoRA (Shared), also of a higher "
        "rank (LoRA-big), (IA)³, and AdapterSoup.",
        "MHR Fig. 2, Tab. 2",
        [
            ("MHR, told", ">", "Poly, told"), ("Poly, told", ">", "LoRA (Shared), told"),
            ("Poly, told", ">", "LoRA-big, told"), ("Poly, told", ">", "(IA)^3, told"),
            ("Poly, told", ">", "AdapterSoup, told"),
        ],
        note="MHR's own Tab. 3 (T0-11B) has Poly level with MHR. The claim is that MHR is above; whether it is less "
        "than 5 points below is another question, which was not asked. " + OLD_RATES,
    ),
    "z": Claim(
        "Training Z alone, with orders of magnitude fewer parameters, comes close to training everything for MHR, and "
        "not as close for Poly; more heads help it, and so do routers that fewer layers share; with as few parameters "
        "as Poly-z, MHR-z scores higher.",
        "MHR Fig. 2 (right), section 5.1, A.2, A.2.1",
        [
            ("MHR-z", "~", "MHR"), ("Poly - Poly-z", ">", "MHR - MHR-z"), ("MHR-z", ">", "Poly-z"),
            ("MHR-z, 32 heads", ">", "MHR-z, 2 heads"), ("MHR-z", ">", "MHR-z by model"),
            ("MHR-z by block", ">", "Poly-z"),
        ],
        also=(
            "MHR-z, 16 heads", *(f"MHR-z by {grain}" for grain in ("layer", "blocks-2", "coder")),
            *(f"Poly-z, {s} skills" for s in SKILLS),
        ),
        figure="few_shot_parameters",
        note="One head is Poly. "
        "What Z alone does where the input says what to do is shown with the claim "
        "[mu-told](#mu-told-numbers). Whether MHR-z is above the methods without routing (section 5.1) was not asked; "
        "their values are in [few-shot](#few-shot-numbers).",
    ),
    "random": Claim(
        "The average of skills whose routing was random is no better than LoRA (Shared), that of private adapters is "
        "worse, and both are below the average of skills whose routing was learned.",
        "MHR sections 5.2, 5.3; MHR 2022 section 5, Tab. 2",
        [
            *((f"Random by {unit}-mu", "<=", "LoRA (Shared)") for unit in ("example", "task")),
            ("LoRA (Shared)", ">", "Private-mu"),
            *((f"{m}-mu", ">", f"Random by {unit}-mu") for m in ("Poly", "MHR") for unit in ("example", "task")),
            ("Poly-mu", ">", "Private-mu"),
        ],
        note=BLIND.format("random-told") + " As everywhere, <= allows 5 points: better by less counts as no better.",
    ),
    "random-told": Claim(
        "The same, without private adapters, where the input says what to do.",
        "MHR sections 5.2, 5.3; MHR 2022 section 5, Tab. 2",
        [
            *((f"Random by {unit}-mu, told", "<=", "LoRA (Shared), told") for unit in ("example", "task")),
            *(("Poly-mu, told", ">", f"Random by {unit}-mu, told") for unit in ("example", "task")),
            *(("MHR-mu, told", ">", f"Random by {unit}-mu, told") for unit in ("example", "task")),
        ],
        note=OLD_RATES,
    ),
    "alignment": Claim(
        "Over training, gradients of different tasks are more aligned in MHR than in Poly and in LoRA (Shared).",
        "MHR section 5.2, Fig. 3 (left)",
        [
            (f"alignment of MHR, {of}", ">", f"alignment of {name}, {of}")
            for of in ("inventory", "mixtures")
            for name in ("Poly", "LoRA (Shared)")
        ],
        figure="alignment",
        note='"Inventory": gradients of what is shared; tasks that use other skills share only part of it. '
        '"Mixtures": gradients of each task\'s own mixture. The paper does not say which it measured. The first look '
        "is at step 300 of 1,500. The paper's text does not say whether Poly is above LoRA; it is not judged here.",
    ),
    "mu": Claim(
        "Routing can be dropped after pre-training: the average of the skills (μ), adapted as one adapter, keeps what "
        "routing gained, and is above LoRA (Shared).",
        "MHR section 5.3, Tab. 4",
        [
            ("Poly-mu", "~", "Poly"), ("MHR-mu", "~", "MHR"),
            ("Poly-mu", ">", "LoRA (Shared)"), ("MHR-mu", ">", "LoRA (Shared)"),
        ],
        note=BLIND.format("mu-told") + " MHR 2022 Tab. 3 too has Poly above Poly-μ, on Natural Instructions. "
        "Whether Poly-μ is above AdapterSoup (section 5.3) was not asked; AdapterSoup's value is in "
        "[few-shot](#few-shot-numbers).",
    ),
    "mu-told": Claim(
        "The same where the input says what to do.",
        "MHR section 5.3, Tab. 4",
        [
            ("Poly-mu, told", "~", "Poly, told"), ("MHR-mu, told", "~", "MHR, told"),
            ("Poly-mu, told", ">", "LoRA (Shared), told"), ("MHR-mu, told", ">", "LoRA (Shared), told"),
        ],
        also=("Poly-z, told", "MHR-z, told"),
        note=OLD_RATES,
    ),
    "zero-shot": Claim(
        "Without examples of a held-out task, the average of the skills (μ) is below LoRA (Shared) as long as it is "
        "not trained further; after more steps of multi-task training MHR's is above LoRA (Shared) after as many.",
        "MHR section 5.3, Tab. 5 (T5-XL)",
        [
            ("LoRA (Shared), told, +0 steps", ">", "MHR-mu, told, +0 steps"),
            *((f"MHR-mu, told, +{k} steps", ">", f"LoRA (Shared), told, +{k} steps") for k in EXTRA[1:]),
        ],
        also=tuple(f"Poly-mu, told, +{k} steps" for k in EXTRA),
        figure="zero_shot",
        note=OLD_RATES + " Further training is at each run's own rate. On T0-11B, in the same table, the averages are "
        "above LoRA without further training too.",
    ),
    "heads": Claim(
        "More heads help more than more skills, which cost more parameters.",
        "MHR section 5.1, Fig. 3 (right)",
        [("MHR", ">", "Poly"), ("MHR, 16 heads", ">", "Poly, 8 skills"), ("MHR, 32 heads", ">", "Poly, 16 skills")],
        also=("MHR, 2 heads", "Poly, 2 skills", "Poly, 32 skills"),
        figure="multi_task_parameters",
        note="Parameters include Z of the 64 training tasks, which the papers leave out: without it heads are free, "
        "and both sides of a pair have as many, or MHR has fewer. One head is Poly. Learning rates are those of 8 "
        "heads and 4 skills.",
    ),
    "discrete": Claim(
        "Z becomes almost discrete, tasks use a smaller share of a larger inventory, and all skills are used about "
        "equally often.",
        "Polytropon section 4.3, Fig. 4",
        [
            *((f"{shape}, {s} skills", ">", 0.9) for shape in ("discreteness", "usage") for s in (4, 32)),
            ("sparsity, 4 skills", ">", "sparsity, 32 skills"),
        ],
        also=(
            *(f"{what}, {s} skills" for what in (*SHAPES, "seen tasks") for s in (*SKILLS, 4)),
            *(f"{shape}, random table" for shape in SHAPES),
        ),
        figure="by_skills",
        note=DISCRETE + " Usage is 1 if all skills are used equally often, and 0 if only one is. The bound of 0.9 is "
        "ours. High usage is no evidence of learning: an untrained Z has 1, and a table drawn at random about as much. "
        "Sparsity (the share of skills that are on) near one half is none either: a random table has that.",
    ),
    "two-speeds": Claim(
        "A Z that learns faster than the skills becomes more discrete, and tasks are learnt better.",
        "Polytropon sections 2.3, 4.3; section 3.3 (in reinforcement learning)",
        [
            ("discreteness, 4 skills", ">", "discreteness, one speed"),
            ("seen tasks, 4 skills", ">", "seen tasks, one speed"),
        ],
        also=tuple(f"{shape}, {k}" for shape in ("sparsity", "usage") for k in ("4 skills", "one speed")),
        figure="two_speeds",
        note=DISCRETE + ' "4 skills" has the two speeds of the recipe. Under "one speed" Z learns at the rate of the '
        "skills; no rate between was tried.",
    ),
    "expert": Claim(
        "Learned routing is as good as routing by the true table of skills, or better.",
        "Polytropon section 3.3, Fig. 2, Tab. 3; Tab. 1 (experts by type of task)",
        [("Expert", "<=", "Poly"), ("Expert", "<=", "MHR"), ("Expert", "<=", "Poly, 8 skills")],
        note="Asked is whether learned routing is at most 5 points below, which is weaker than what the papers have: "
        "Poly above experts, at equal size (here Poly with 8 skills; the interval of its difference is among the "
        "numbers), and without such a size in [few-shot](#few-shot). Expert has eight skills, one for each operation, "
        "and is given the rows of the held-out tasks too. To compare with MHR is ours.",
    ),
    "recovery": Claim(
        "Tasks that are alike share skills. Here: tasks that share operations have rows of Z more alike than by chance "
        "(rank correlation over pairs of tasks, against the 95 % point of what shuffled tasks give).",
        "Polytropon section 4.3, Fig. 5, 6",
        [(f"recovery by {name}", ">", f"recovery by {name}, chance (95 % point)") for name in ("Poly", "MHR")],
        also=tuple(f"recovery by {name}, {bound} bound" for name in ("Poly", "MHR") for bound in ("lower", "upper")),
        figure="recovery",
        note="The bounds are the 95 % interval of a bootstrap over tasks, of each seed.",
    ),
    "full": Claim(
        "Full fine-tuning is no substitute for routed adapters, also where the input says what to do.",
        "MHR 2022 Tab. 3",
        [("Poly, told", ">", "Full, told"), ("MHR, told", ">", "Full, told")],
        also=("LoRA (Shared), told", "Full, then LoRA, told"),
        note="The papers' own numbers are mixed: in that table full fine-tuning is above Poly-μ (66.1 and 65.9), and "
        "in MHR Tab. 6 full fine-tuning and then a LoRA is above Poly (68.9 and 68.0). " + OLD_RATES,
    ),
}  # fmt: skip


def parts_of(side: str | float) -> list[str]:
    """The measures that one side of a comparison names: none of a number, two of "measure - measure"."""
    return side.split(" - ") if isinstance(side, str) else []


def measures_of(claim: Claim) -> list[str]:
    """The names of the measures of a claim, those of its comparisons first."""
    named = [m for a, _, b in claim.compare for side in (a, b) for m in parts_of(side)]
    return list(dict.fromkeys([*named, *claim.also]))
