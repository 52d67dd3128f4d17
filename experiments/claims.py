"""What the papers claim, as comparisons between measures on `strings`: the data of `experiments/reproduce.py`.

A measure is a pre-training run and what is then asked of it; it has a value for each seed. A claim is a list of
comparisons between measures, under the rule that stands at the top of reproduce.py.
"""

from typing import NamedTuple

from experiments.methods import METHODS, RATES

# --- Measures ---------------------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """A number for each seed.

    method: a key of METHODS, trained at its rates in RATES. flags: more flags of train.py. then: what is asked of the
    run: a variant of adapt.py (the held-out score after it, percent), "seen" (the score on training tasks, percent),
    "zero-shot" (the held-out score without examples, percent, after `steps` more steps of multi-task training; routed
    methods are averaged first), "alignment" or "alignment_mixed" (of gradients, the mean over the steps that were kept
    in training), or the path to a number in what analyze.py writes, as "mean.usage".
    """

    method: str
    then: str = "all"
    flags: str = ""
    steps: int = 0


VARIANTS = ("all", "z", "mu", "lora")  # of adapt.py
HEADS, SKILLS, GRAINS = (2, 16, 32), (2, 8, 16, 32), ("layer", "block", "coder", "model")  # beside the recipe's
EXTRA = (0, 100, 400)  # steps of training after averaging: 0, 7 and 27 % of those before
TOLD = "--instructions"  # the input names the operations; else nothing in it says which task it is
ONE_SPEED = RATES["Poly"][0].split()[0].replace("--lr=", "--lr-z=")  # Z as slow as the skills
RECOVERY = (("", "correlation"), (", by chance", "chance_95"), (", lower bound", "low"), (", upper bound", "high"))
SHAPES = ("discreteness", "sparsity", "usage")
ROUTED_OR_NOT = ("LoRA (Shared)", "Poly", "MHR")
OTHER_SIZES = ("LoRA-big", "(IA)^3")

MEASURES = {
    **{name: Measure(name) for name in METHODS if name not in ("Private", "Random by example", "Random by task")},
    "Full, then LoRA": Measure("Full", "lora"),
    "Private": Measure("Private"),
    "Private-mu": Measure("Private", "mu"),
    **{f"{name}-mu": Measure(name, "mu") for name in ("Random by example", "Random by task")},
    **{f"{name}-{variant}": Measure(name, variant) for name in ("Poly", "MHR") for variant in ("z", "mu")},
    **{f"MHR, {h} heads": Measure("MHR", "all", f"--heads={h}") for h in HEADS},
    **{f"MHR-z, {h} heads": Measure("MHR", "z", f"--heads={h}") for h in HEADS},
    **{f"MHR-z by {grain}": Measure("MHR", "z", f"--granularity={grain}") for grain in GRAINS},
    **{f"Poly, {s} skills": Measure("Poly", "all", f"--skills={s}") for s in SKILLS},
    **{f"Poly-z, {s} skills": Measure("Poly", "z", f"--skills={s}") for s in SKILLS},
    **{f"alignment of {name}": Measure(name, "alignment") for name in ROUTED_OR_NOT},
    **{f"alignment in {name}": Measure(name, "alignment_mixed") for name in ROUTED_OR_NOT},
    **{f"{shape}, {s} skills": Measure("Poly", f"mean.{shape}", f"--skills={s}") for shape in SHAPES for s in SKILLS},
    **{f"{shape}, 4 skills": Measure("Poly", f"mean.{shape}") for shape in SHAPES},
    **{f"seen tasks, {s} skills": Measure("Poly", "seen", f"--skills={s}") for s in SKILLS},
    "seen tasks, 4 skills": Measure("Poly", "seen"),
    "seen tasks, one speed": Measure("Poly", "seen", ONE_SPEED),
    "discreteness, one speed": Measure("Poly", "mean.discreteness", ONE_SPEED),
    **{f"recovery by {m}{what}": Measure(m, f"recovery.{key}") for m in ("Poly", "MHR") for what, key in RECOVERY},
    **{f"{name}, told, {k} steps": Measure(name, "zero-shot", TOLD, k) for name in ROUTED_OR_NOT for k in EXTRA},
    **{f"{name}, told": Measure(name, "all", TOLD) for name in ("Full", "AdapterSoup", *OTHER_SIZES, *ROUTED_OR_NOT)},
    **{f"{name}-{variant}, told": Measure(name, variant, TOLD) for name in ("Poly", "MHR") for variant in ("z", "mu")},
    **{f"{name}-mu, told": Measure(name, "mu", TOLD) for name in ("Random by example", "Random by task")},
    "Full, then LoRA, told": Measure("Full", "lora", TOLD),
}  # fmt: skip


# --- Claims -----------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """says: the papers' sentence in our words. place: where it stands. compare: [(a, relation, b)], each a measure, a
    number, or "measure - measure". also: measures that are shown beside these. figure: a function of reproduce.FIGURES.
    note: what a reader must know of this setting."""

    says: str
    place: str
    compare: list[tuple[str, str, str | float]]
    also: tuple[str, ...] = ()
    figure: str = "dots"
    note: str = ""


BLIND = (
    "Nothing in the input says which task it is, so methods without task ids cannot tell the training tasks apart; "
    "where it is told, see the claim {}."
)
OTHERS = ("LoRA (Shared)", "LoRA-big", "(IA)^3", "AdapterSoup", "Private", "HyperFormer", "Task-MoE", "Expert")
CLAIMS = {
    "few-shot": Claim(
        "After few-shot adaptation MHR is above Poly, and Poly above one shared adapter (also a larger one), (IA)^3, "
        "AdapterSoup, one adapter a task, HyperFormer, Task-MoE and routing by experts.",
        "MHR Fig. 2, Tab. 2; Polytropon Tab. 1",
        [("MHR", ">", "Poly"), *(("Poly", ">", other) for other in OTHERS)],
        also=("Full", "Full, then LoRA"),
        note=BLIND.format("few-shot-told") + " AdapterSoup, which compares inputs, finds nothing to compare here.",
    ),
    "few-shot-told": Claim(
        "The same where the input says what to do: MHR is above Poly, and Poly above one shared adapter, also a larger "
        "one, (IA)^3, and AdapterSoup.",
        "MHR Fig. 2, Tab. 2",
        [
            ("MHR, told", ">", "Poly, told"), ("Poly, told", ">", "LoRA (Shared), told"),
            ("Poly, told", ">", "LoRA-big, told"), ("Poly, told", ">", "(IA)^3, told"),
            ("Poly, told", ">", "AdapterSoup, told"),
        ],
    ),
    "z": Claim(
        "Training the routing alone, with orders of magnitude fewer parameters, comes close to training everything for "
        "MHR, and not as close for Poly; more heads and finer granularity help it; with as few parameters as Poly-z it "
        "is above it.",
        "MHR Fig. 2 (right), section 5.1, A.2, A.2.1",
        [
            ("MHR-z", "~", "MHR"), ("Poly - Poly-z", ">", "MHR - MHR-z"), ("MHR-z", ">", "Poly-z"),
            ("MHR-z, 32 heads", ">", "MHR-z, 2 heads"), ("MHR-z", ">", "MHR-z by model"),
            ("MHR-z by block", ">", "Poly-z"),
        ],
        also=(
            "MHR-z, 16 heads", *(f"MHR-z by {grain}" for grain in ("layer", "coder")),
            *(f"Poly-z, {s} skills" for s in SKILLS),
        ),
        figure="few_shot_parameters",
    ),
    "random": Claim(
        "Random routing, averaged, is no better than LoRA, averaged private adapters are worse, and both are below the "
        "average of skills whose routing was learned.",
        "MHR section 5.2; MHR 2022 section 5, Tab. 2",
        [
            *((f"Random by {unit}-mu", "<=", "LoRA (Shared)") for unit in ("example", "task")),
            ("LoRA (Shared)", ">", "Private-mu"),
            *((f"{m}-mu", ">", f"Random by {unit}-mu") for m in ("Poly", "MHR") for unit in ("example", "task")),
            ("Poly-mu", ">", "Private-mu"),
        ],
        note=BLIND.format("random-told"),
    ),
    "random-told": Claim(
        "The same where the input says what to do.",
        "MHR section 5.2; MHR 2022 section 5, Tab. 2",
        [
            *((f"Random by {unit}-mu, told", "<=", "LoRA (Shared), told") for unit in ("example", "task")),
            *(("Poly-mu, told", ">", f"Random by {unit}-mu, told") for unit in ("example", "task")),
            *(("MHR-mu, told", ">", f"Random by {unit}-mu, told") for unit in ("example", "task")),
        ],
    ),
    "alignment": Claim(
        "Over training, gradients of different tasks are more aligned in MHR than in Poly and in LoRA.",
        "MHR section 5.2, Fig. 3 (left)",
        [
            *(("alignment of MHR", ">", f"alignment of {name}") for name in ("Poly", "LoRA (Shared)")),
            *(("alignment in MHR", ">", f"alignment in {name}") for name in ("Poly", "LoRA (Shared)")),
        ],
        figure="alignment",
        note='"alignment of": gradients of the shared inventory, which tasks that use other skills do not share; '
        '"alignment in": gradients of each task\'s own mixture. The paper does not say which it measured.',
    ),
    "mu": Claim(
        "Routing can be dropped after pre-training: the average of the skills, adapted as one adapter, keeps what "
        "routing gained, and is above LoRA.",
        "MHR section 5.3, Tab. 4",
        [
            ("Poly-mu", "~", "Poly"), ("MHR-mu", "~", "MHR"),
            ("Poly-mu", ">", "LoRA (Shared)"), ("MHR-mu", ">", "LoRA (Shared)"),
        ],
        note=BLIND.format("mu-told"),
    ),
    "mu-told": Claim(
        "The same where the input says what to do.",
        "MHR section 5.3, Tab. 4",
        [
            ("Poly-mu, told", "~", "Poly, told"), ("MHR-mu, told", "~", "MHR, told"),
            ("Poly-mu, told", ">", "LoRA (Shared), told"), ("MHR-mu, told", ">", "LoRA (Shared), told"),
        ],
        also=("Poly-z, told", "MHR-z, told"),
    ),
    "zero-shot": Claim(
        "Without examples the average of the skills as it is is poor; after more multi-task training that of MHR is "
        "above LoRA with as much more.",
        "MHR section 5.3, Tab. 5 (T5-XL)",
        [
            ("LoRA (Shared), told, 0 steps", ">", "MHR, told, 0 steps"),
            *((f"MHR, told, {k} steps", ">", f"LoRA (Shared), told, {k} steps") for k in EXTRA[1:]),
        ],
        also=tuple(f"Poly, told, {k} steps" for k in EXTRA),
    ),
    "heads": Claim(
        "More heads help more than more skills, which cost more parameters.",
        "MHR section 5.1, Fig. 3 (right), A.2",
        [("MHR", ">", "Poly"), ("MHR, 16 heads", ">", "Poly, 8 skills"), ("MHR, 32 heads", ">", "Poly, 16 skills")],
        also=("MHR, 2 heads", "Poly, 2 skills", "Poly, 32 skills"),
        figure="multi_task_parameters",
        note="Parameters include Z of the 64 training tasks, which the papers leave out: without them heads are free.",
    ),
    "discrete": Claim(
        "Z becomes all but discrete, tasks use a smaller share of a larger inventory, and all skills are used about "
        "equally often.",
        "Polytropon section 4.3, Fig. 4",
        [
            *((f"{shape}, {s} skills", ">", 0.9) for shape in ("discreteness", "usage") for s in (4, 32)),
            ("sparsity, 4 skills", ">", "sparsity, 32 skills"),
        ],
        also=tuple(f"{what}, {s} skills" for what in (*SHAPES, "seen tasks") for s in (*SKILLS, 4)),
        figure="by_skills",
    ),
    "two-speeds": Claim(
        "A Z that learns faster than the skills becomes more discrete, and tasks are learnt better.",
        "Polytropon section 2.3; section 3.3 (in reinforcement learning)",
        [
            ("discreteness, 4 skills", ">", "discreteness, one speed"),
            ("seen tasks, 4 skills", ">", "seen tasks, one speed"),
        ],
        figure="seen",
    ),
    "expert": Claim(
        "Learned routing is as good as routing by the true table of skills, or better.",
        "Polytropon Tab. 1, Fig. 2",
        [("Expert", "<=", "Poly"), ("Expert", "<=", "MHR"), ("Expert", "<=", "Poly, 8 skills")],
        note="Expert has eight skills, one for each operation, and is given the rows of the held-out tasks too.",
    ),
    "recovery": Claim(
        "Z finds part of the true table: tasks that share operations have rows more alike than by chance (rank "
        "correlation over pairs of tasks, against its 95 % point under shuffled tasks).",
        "Polytropon section 4.3, Fig. 5, 6",
        [(f"recovery by {name}", ">", f"recovery by {name}, by chance") for name in ("Poly", "MHR")],
        also=tuple(f"recovery by {name}, {bound} bound" for name in ("Poly", "MHR") for bound in ("lower", "upper")),
        figure="recovery",
        note="The bounds are the 95 % interval of a bootstrap over tasks, of each seed.",
    ),
    "full": Claim(
        "Full fine-tuning is no substitute for routed adapters, also where the input says what to do.",
        "MHR 2022 Tab. 3",
        [("Poly, told", ">", "Full, told"), ("MHR, told", ">", "Full, told")],
        also=("LoRA (Shared), told", "Full, then LoRA, told"),
    ),
}  # fmt: skip


def parts_of(side: str | float) -> list[str]:
    """The measures that one side of a comparison names: none of a number, two of "measure - measure"."""
    return side.split(" - ") if isinstance(side, str) else []


def measures_of(claim: Claim) -> list[str]:
    """The names of the measures of a claim, those of its comparisons first."""
    named = [m for a, _, b in claim.compare for side in (a, b) for m in parts_of(side)]
    return list(dict.fromkeys([*named, *claim.also]))
