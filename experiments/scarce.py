"""The claims again where skills are scarce: data of `experiments/reproduce.py`, as `claims.py`.

    python -m experiments.methods --tune --skills 2 4 8 --methods Poly MHR     the rates below, on dev tasks
    python -m experiments.methods --tune --skills 2 --methods "Random by example" "Random by task"
    python -m experiments.reproduce --claim few-shot-scarce    a claim, as every other

On T0 the papers have 8 skills for 313 tasks, 39 tasks a skill; on CrossFit 8 for 120, which is 15. `strings` has 4 for
64 in its recipe, 16 tasks a skill, as CrossFit. Here it has 2, which is 32 and of 1, 2, 4 and 8 skills the nearest to
T0's (1 skill is LoRA, whatever the method). That is how the setting was chosen, and the comparisons below were written
down before any of their runs. What had been seen: four seeds of a pilot on dev tasks with the recipe's rates, where
MHR-z was 15 points above Poly-z, and the held-out scores of `claims.py`, Poly with 2 and 8 skills among them. MHR has
16 heads, as in that pilot. Rates are searched again for each number of skills, with the budget and the rule that all
methods had; another number of heads has those of 16.
"""

from experiments.claims import NEW, TOLD, Claim, Measure
from experiments.methods import RATES

SKILLS, TASKS = (2, 4, 8), 64
OTHER_HEADS = (2, 4, 8, 32)  # beside 16; one head is Poly

AT = {  # as RATES, at a number of skills
    ("Poly", 2): ("--lr=0.015", {"all": "--lr=0.003", "z": "--lr-z=0.17", "mu": "--lr=0.003"}),
    ("Poly", 4): ("--lr=0.015", {"all": "--lr=0.003", "z": "--lr-z=0.5", "mu": "--lr=0.003"}),
    ("Poly", 8): ("--lr=0.015", {"all": "--lr=0.003", "z": "--lr-z=0.5", "mu": "--lr=0.003"}),
    ("MHR", 2): ("--lr=0.015", {"all": "--lr=0.003", "z": "--lr-z=0.5", "mu": "--lr=0.009"}),
    ("MHR", 4): ("--lr=0.015", {"all": "--lr=0.001", "z": "--lr-z=0.5", "mu": "--lr=0.009"}),
    ("MHR", 8): ("--lr=0.015", {"all": "--lr=0.003", "z": "--lr-z=0.5", "mu": "--lr=0.003"}),
    ("Random by example", 2): ("--lr=0.005", {"mu": "--lr=0.003"}),
    ("Random by task", 2): ("--lr=0.015", {"mu": "--lr=0.009"}),
}


def at(method: str, skills: int, then: str = "all", flags: str = "", heads: int = 16) -> Measure:
    """The measure of a method with so many skills, at the rates found for it."""
    sizes = f"--skills={skills} --heads={heads}" if method == "MHR" else f"--skills={skills}"
    return Measure(method, then, f"{sizes} {flags}".strip(), rates=AT[method, skills], since=NEW)


def shared(then: str = "all", flags: str = "") -> Measure:
    """The same of LoRA, which is one skill."""
    return Measure("LoRA (Shared)", then, flags, rates=RATES["LoRA (Shared)"], since=NEW)


HAVE_ALL = (("", "all"), ("-z", "z"), ("-mu", "mu"))
ROUTED = ("Poly", "MHR")
MEASURES = {
    **{f"{m}{v}, s = {s}": at(m, s, then) for m in ROUTED for s in SKILLS for v, then in HAVE_ALL},
    **{f"{m}, s = {s}, seen": at(m, s, "seen") for m in ROUTED for s in SKILLS},
    **{f"MHR{v}, s = 2, h = {h}": at("MHR", 2, then, heads=h) for h in OTHER_HEADS for v, then in HAVE_ALL[:2]},
    **{f"MHR, s = 2, h = {h}, seen": at("MHR", 2, "seen", heads=h) for h in OTHER_HEADS},
    **{f"Random by {unit}-mu, s = 2": at(f"Random by {unit}", 2, "mu") for unit in ("example", "task")},
    **{f"{shape}, s = 2": at("Poly", 2, f"mean.{shape}") for shape in ("discreteness", "sparsity", "usage")},
    **{f"alignment of {m}, {of}, s = 2": at(m, 2, f"alignment{key}")
       for m in ROUTED for of, key in (("inventory", ""), ("mixtures", "_mixed"))},
    **{f"{m}{v}, told, s = 2": at(m, 2, then, TOLD) for m in ROUTED for v, then in HAVE_ALL[:2]},
    "LoRA, s = 1": shared(),
    "LoRA, told, s = 1": shared(flags=TOLD),
    "alignment of LoRA, inventory, s = 1": shared("alignment"),
    "alignment of LoRA, mixtures, s = 1": shared("alignment_mixed"),
}  # fmt: skip

CLAIMS = {
    "scarce": Claim(
        "Our lead, not the papers' words: with 2 skills MHR is further above Poly than with 8, on seen tasks, and on "
        "held-out tasks after training everything, the routing alone, or the averaged skills.",
        "the pilot in results/LOG.md",
        [
            (f"MHR{v}, s = 2{seen} - Poly{v}, s = 2{seen}", ">", f"MHR{v}, s = 8{seen} - Poly{v}, s = 8{seen}")
            for v, seen in (("", ", seen"), ("", ""), ("-z", ""), ("-mu", ""))
        ],
        also=tuple(
            f"{m}{v}, s = 4{seen}"
            for v, seen in (("", ", seen"), ("", ""), ("-z", ""), ("-mu", ""))
            for m in ROUTED
        ),
        figure="tasks_per_skill",
        note="With one skill the two are the same LoRA. 2 and 8 skills are 32 and 8 tasks a skill; the papers have 39 "
        "on T0 and 15 on CrossFit. Looked at afterwards: from 8 skills to 2 Poly-z loses 13.5 (7.3 to 19.8), and "
        "MHR-z's +2.2 is within chance (-1.5 to 5.9); with everything trained MHR has +5.0 (-0.2 to 10.2), Poly -1.2 "
        "(-3.6 to 1.3): neither alone is beyond chance, their difference is. All this is where the input says nothing. "
        "Where it says what to do, MHR with 2 skills is below Poly (few-shot-told-scarce).",
    ),
    "few-shot-scarce": Claim(
        "Where skills are scarce, after few-shot adaptation MHR is above Poly, and Poly above one LoRA for all tasks.",
        "MHR Fig. 2, Tab. 2; Polytropon Tab. 1",
        [("MHR, s = 2", ">", "Poly, s = 2"), ("Poly, s = 2", ">", "LoRA, s = 1")],
        note="The other methods of the claim few-shot were not run again.",
    ),
    "few-shot-told-scarce": Claim(
        "Where skills are scarce and the input says what to do, MHR is above Poly, Poly above one LoRA for all tasks, "
        "and with the routing alone MHR is above Poly and loses less by it.",
        "MHR Fig. 2, Tab. 2",
        [
            ("MHR, told, s = 2", ">", "Poly, told, s = 2"), ("Poly, told, s = 2", ">", "LoRA, told, s = 1"),
            ("MHR-z, told, s = 2", ">", "Poly-z, told, s = 2"),
            ("Poly, told, s = 2 - Poly-z, told, s = 2", ">", "MHR, told, s = 2 - MHR-z, told, s = 2"),
        ],
        note="Rates are those found where the input says nothing, not searched again.",
    ),
    "z-scarce": Claim(
        "Where skills are scarce, training the routing alone comes close to training everything for MHR, not as close "
        "for Poly, and MHR-z is above Poly-z; more heads help it.",
        "MHR Fig. 2 (right), section 5.1",
        [
            ("MHR-z, s = 2", "~", "MHR, s = 2"),
            ("Poly, s = 2 - Poly-z, s = 2", ">", "MHR, s = 2 - MHR-z, s = 2"),
            ("MHR-z, s = 2", ">", "Poly-z, s = 2"), ("MHR-z, s = 2, h = 32", ">", "MHR-z, s = 2, h = 2"),
        ],
        note="With 16 heads MHR-z trains 16 numbers for each one of Poly-z. The claim z also compares the two at the "
        "same size, by sharing routers; this one does not. Looked at afterwards: with the same 216 numbers, MHR-z with "
        "2 skills and 2 heads is 5.6 below Poly-z with 4 skills (2.5 to 8.7). More heads help up to 8 (76.2); 32 have "
        "73.9.",
    ),
    "mu-scarce": Claim(
        "Where skills are scarce, the average of the skills, adapted as one adapter, keeps what routing gained, and is "
        "above LoRA.",
        "MHR section 5.3, Tab. 4",
        [
            ("Poly-mu, s = 2", "~", "Poly, s = 2"), ("MHR-mu, s = 2", "~", "MHR, s = 2"),
            ("Poly-mu, s = 2", ">", "LoRA, s = 1"), ("MHR-mu, s = 2", ">", "LoRA, s = 1"),
        ],
    ),
    "heads-scarce": Claim(
        "Where skills are scarce, more heads help more than more skills, which cost more parameters.",
        "MHR section 5.1, Fig. 3 (right)",
        [
            ("MHR, s = 2", ">", "Poly, s = 2"), ("MHR, s = 2", ">", "Poly, s = 4"),
            ("MHR, s = 2, h = 32", ">", "Poly, s = 8"),
        ],
        also=(
            *(f"MHR, s = 2, h = {h}" for h in OTHER_HEADS[:-1]), *(f"MHR, s = 2, h = {h}, seen" for h in OTHER_HEADS),
            "MHR, s = 2, seen", "Poly, s = 2, seen", "Poly-z, s = 2", "MHR-z, s = 2",
            *(f"MHR-z, s = 2, h = {h}" for h in OTHER_HEADS),
        ),
        figure="over_heads",
        note="One head is Poly.",
    ),
    "random-scarce": Claim(
        "Where skills are scarce, random routing, averaged, is no better than LoRA, and below the average of skills "
        "whose routing was learned.",
        "MHR sections 5.2, 5.3; MHR 2022 section 5, Tab. 2",
        [
            *((f"Random by {unit}-mu, s = 2", "<=", "LoRA, s = 1") for unit in ("example", "task")),
            *((f"{m}-mu, s = 2", ">", f"Random by {unit}-mu, s = 2") for m in ROUTED for unit in ("example", "task")),
        ],
    ),
    "alignment-scarce": Claim(
        "Where skills are scarce, over training, gradients of different tasks are more aligned in MHR than in Poly and "
        "in LoRA.",
        "MHR section 5.2, Fig. 3 (left)",
        [
            (f"alignment of MHR, {of}, s = 2", ">", f"alignment of {name}")
            for of in ("inventory", "mixtures")
            for name in (f"Poly, {of}, s = 2", f"LoRA, {of}, s = 1")
        ],
        figure="alignment_scarce",
        note="The papers' reason for MHR. What is measured is said with the claim alignment.",
    ),
    "discrete-scarce": Claim(
        "Where skills are scarce, Z becomes almost discrete, and the skills are used about equally often.",
        "Polytropon section 4.3, Fig. 4",
        [("discreteness, s = 2", ">", 0.9), ("usage, s = 2", ">", 0.9)],
        also=("sparsity, s = 2",),
        figure="shapes",
        note="The bound of 0.9 is ours, as in the claim discrete.",
    ),
}  # fmt: skip
