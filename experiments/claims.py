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
    methods are averaged first), "alignment" (of gradients, the mean over the steps that were kept in training), or the
    path to a number in what analyze.py writes, as "mean.usage".
    """

    method: str
    then: str = "all"
    flags: str = ""
    steps: int = 0


VARIANTS = ("all", "z", "mu", "lora")  # of adapt.py
HEADS, SKILLS, GRAINS = (2, 16, 32), (2, 8, 16, 32), ("layer", "block", "coder", "model")  # beside the recipe's
EXTRA = (0, 100, 400)  # steps of training after averaging: 0, 7 and 27 % of those before
TOLD = "--instructions"  # the input names the operations, as zero-shot needs
ONE_SPEED = RATES["Poly"][0].split()[0].replace("--lr=", "--lr-z=")  # Z as slow as the skills
SHAPES = ("discreteness", "sparsity", "usage")
ZERO_SHOT = ("LoRA (Shared)", "Poly", "MHR")

MEASURES = {
    **{name: Measure(name, variants[0]) for name, (_, variants) in METHODS.items()},
    "Full, then LoRA": Measure("Full", "lora"),
    "Private-mu": Measure("Private", "mu"),
    **{f"{name}-{variant}": Measure(name, variant) for name in ("Poly", "MHR") for variant in ("z", "mu")},
    **{f"MHR, {h} heads": Measure("MHR", "all", f"--heads={h}") for h in HEADS},
    **{f"MHR-z, {h} heads": Measure("MHR", "z", f"--heads={h}") for h in HEADS},
    **{f"MHR-z by {grain}": Measure("MHR", "z", f"--granularity={grain}") for grain in GRAINS},
    **{f"Poly, {s} skills": Measure("Poly", "all", f"--skills={s}") for s in SKILLS},
    **{f"Poly-z, {s} skills": Measure("Poly", "z", f"--skills={s}") for s in SKILLS},
    **{f"alignment of {name}": Measure(name, "alignment") for name in ZERO_SHOT},
    **{f"{shape}, {s} skills": Measure("Poly", f"mean.{shape}", f"--skills={s}") for shape in SHAPES for s in SKILLS},
    **{f"{shape}, 4 skills": Measure("Poly", f"mean.{shape}") for shape in SHAPES},
    "discreteness, one speed": Measure("Poly", "mean.discreteness", ONE_SPEED),
    "seen tasks": Measure("Poly", "seen"),
    "seen tasks, one speed": Measure("Poly", "seen", ONE_SPEED),
    **{f"recovery by {name}": Measure(name, "recovery.correlation") for name in ("Poly", "MHR")},
    **{f"recovery by chance, {name}": Measure(name, "recovery.chance_95") for name in ("Poly", "MHR")},
    **{f"{name}, {k} steps": Measure(name, "zero-shot", TOLD, k) for name in ZERO_SHOT for k in EXTRA},
    **{f"{name}, told": Measure(name, "all", TOLD) for name in ("Full", *ZERO_SHOT)},
    "Full, then LoRA, told": Measure("Full", "lora", TOLD),
}


# --- Claims -----------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """says: the papers' sentence in our words. place: where it stands. compare: [(measure, relation, measure or
    number)]. also: measures that the figure shows beside those compared. figure: a function of FIGURES."""

    says: str
    place: str
    compare: list[tuple[str, str, str | float]]
    also: tuple[str, ...] = ()
    figure: str = "dots"


OTHERS = ("LoRA (Shared)", "LoRA-big", "(IA)^3", "AdapterSoup", "Private", "HyperFormer", "Task-MoE", "Expert")
CLAIMS = {
    "few-shot": Claim(
        "After few-shot adaptation MHR is above Poly, and Poly above one shared adapter (also a larger one), (IA)^3, "
        "AdapterSoup, one adapter a task, HyperFormer, Task-MoE and routing by experts.",
        "MHR Fig. 2, Tab. 2; Polytropon Tab. 1",
        [("MHR", ">", "Poly"), *(("Poly", ">", other) for other in OTHERS)],
        also=("Full", "Full, then LoRA"),
    ),
    "z": Claim(
        "Training the routing alone comes close to training everything for MHR, and does not for Poly; more heads and "
        "finer granularity help it.",
        "MHR Fig. 2 (right), Fig. 3 (right), A.2.1",
        [
            ("MHR-z", "~", "MHR"), ("Poly", ">", "Poly-z"), ("MHR-z", ">", "Poly-z"),
            ("MHR-z, 32 heads", ">", "MHR-z, 2 heads"), ("MHR-z", ">", "MHR-z by model"),
        ],
        also=(
            "MHR-z, 16 heads", *(f"MHR-z by {grain}" for grain in GRAINS[:-1]),
            *(f"Poly-z, {s} skills" for s in SKILLS),
        ),
        figure="few_shot_parameters",
    ),
    "random": Claim(
        "Random routing, averaged, is no better than LoRA, and averaged private adapters are worse.",
        "MHR section 5.2; MHR 2022 section 4",
        [
            ("Random by example", "<=", "LoRA (Shared)"), ("Random by task", "<=", "LoRA (Shared)"),
            ("LoRA (Shared)", ">", "Private-mu"),
        ],
        also=("Poly-mu", "MHR-mu"),
    ),
    "alignment": Claim(
        "Over training, gradients of different tasks are more aligned in MHR than in Poly, and in Poly than in LoRA.",
        "MHR section 5.2, Fig. 3 (left)",
        [("alignment of MHR", ">", "alignment of Poly"), ("alignment of Poly", ">", "alignment of LoRA (Shared)")],
        figure="alignment",
    ),
    "mu": Claim(
        "Routing can be dropped after pre-training: the average of the skills, adapted as one adapter, keeps what "
        "routing gained, and is above LoRA.",
        "MHR section 5.3, Tab. 4",
        [
            ("Poly-mu", "~", "Poly"), ("MHR-mu", "~", "MHR"),
            ("Poly-mu", ">", "LoRA (Shared)"), ("MHR-mu", ">", "LoRA (Shared)"),
        ],
    ),
    "zero-shot": Claim(
        "Without examples the average of the skills as it is is poor; after more multi-task training it is above LoRA "
        "with as much more.",
        "MHR section 5.3, Tab. 5",
        [
            ("LoRA (Shared), 0 steps", ">", "Poly, 0 steps"), ("LoRA (Shared), 0 steps", ">", "MHR, 0 steps"),
            *((f"{m}, {k} steps", ">", f"LoRA (Shared), {k} steps") for m in ("Poly", "MHR") for k in EXTRA[1:]),
        ],
    ),
    "heads": Claim(
        "More heads help more than more skills, which cost more parameters.",
        "MHR section 5.1, Fig. 3 (right), A.2",
        [("MHR", ">", "Poly"), ("MHR, 16 heads", ">", "Poly, 8 skills"), ("MHR, 32 heads", ">", "Poly, 16 skills")],
        also=("MHR, 2 heads", "Poly, 2 skills", "Poly, 32 skills"),
        figure="multi_task_parameters",
    ),
    "discrete": Claim(
        "Z becomes discrete, tasks use a smaller share of a larger inventory, and all skills are used about equally "
        "often.",
        "Polytropon section 4.3, Fig. 4",
        [
            ("discreteness, 4 skills", ">", 0.5), ("discreteness, 32 skills", ">", 0.5),
            ("usage, 4 skills", ">", 0.9), ("usage, 32 skills", ">", 0.9),
            ("sparsity, 4 skills", ">", "sparsity, 32 skills"),
        ],
        also=tuple(f"{shape}, {s} skills" for shape in SHAPES for s in SKILLS),
        figure="by_skills",
    ),
    "two-speeds": Claim(
        "A Z that learns faster than the skills becomes more discrete, and seen tasks are learnt better.",
        "Polytropon section 2.3, 3.3",
        [("discreteness, 4 skills", ">", "discreteness, one speed"), ("seen tasks", ">", "seen tasks, one speed")],
        figure="none",
    ),
    "expert": Claim(
        "Learned routing is as good as routing by the true table of skills, or better.",
        "Polytropon Tab. 1, Fig. 2",
        [("Expert", "<=", "Poly"), ("Expert", "<=", "MHR")],
    ),
    "recovery": Claim(
        "Z finds part of the true table: tasks that share operations have rows more alike than by chance (rank "
        "correlation over pairs of tasks, against its 95 % point under shuffled tasks).",
        "Polytropon section 4.3, Fig. 5, 6",
        [(f"recovery by {name}", ">", f"recovery by chance, {name}") for name in ("Poly", "MHR")],
        figure="recovery",
    ),
    "full": Claim(
        "Full fine-tuning is no substitute for routed adapters, also where the input says what to do.",
        "MHR 2022 Tab. 3",
        [
            ("Poly, told", ">", "Full, told"), ("MHR, told", ">", "Full, told"),
            ("Poly, told", ">", "Full, then LoRA, told"),
        ],
        also=("LoRA (Shared), told",),
    ),
}  # fmt: skip


def measures_of(claim: Claim) -> list[str]:
    """The names of the measures of a claim, those of its comparisons first."""
    named = [m for a, _, b in claim.compare for m in (a, b) if isinstance(m, str)]
    return list(dict.fromkeys([*named, *claim.also]))
