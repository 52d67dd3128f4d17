"""The papers' settings: names of methods and variants, and the recipe of each benchmark. Nothing but data.

A run's defaults are what its benchmark says, changed by what (benchmark, method) and then (benchmark, method, adapter)
say; flags override all. Sources (docs/benchmarks.md): the MHR authors' configuration files (t0: after T-Few) and
Polytropon's appendix A.2. "strings" is ours; a search on dev tasks found its learning rates for each method
(results/methods.md; some variants and sizes have others, which `experiments/methods.py` gives as flags). Warm-up is a
share of the steps (SuperNI: of 25,000).

Adafactor's scale by RMS (`scale_parameter`) is on by default in T-Few and in the MHR authors' code. Their pre-training
files of Poly and MHR on T0 switch it off, and their LoRA is run as Poly with one skill; those of (IA)^3, alone and as
Poly's skills, and of few-shot adaptation keep it. With it, steps are small at first: 1e-4 for a fresh Z, 3e-6 for a
zero B. Rates: theirs, where a file of theirs names one: 3e-4 for (IA)^3 on T0. A single LoRA and a single (IA)^3 on
SuperNI have 5e-5 in theirs; here they have the 1e-3 of Poly. Methods without files of theirs have Poly's settings.

Full fine-tuning holds its weights in fp32: in bfloat16 most updates at such rates round to nothing.
"""

# Methods, by how a task gets its adapter.
ONE_ADAPTER = ("lora", "ia3", "shared", "mu")  # one adapter for all tasks: no router
FIXED_TABLE = ("private", "expert", "adapter-soup")  # routed by a fixed table, which sets the number of skills
LEARNED = ("poly", "mhr", "hyperformer", "task-moe")  # routed by a Z that is trained
ROUTED = (*FIXED_TABLE, "random", *LEARNED)
METHODS = ("full", *ONE_ADAPTER, *ROUTED)
VARIANTS = {"all": METHODS, "z": LEARNED, "mu": ROUTED, "lora": ("full",)}  # what adapt.py trains, after which

PRETRAINING = {
    "strings": dict(
        backbone="tiny", rank=4, skills=4, routing="gumbel", steps=1500, epochs=0, batch_size=64, optimizer="adamw",
        lr=5e-3, lr_z=1e-1, weight_decay=0.0, warmup=0.06, clip=1.0, max_input=64, max_output=32, precision="fp32",
        eval_examples=20,
    ),
    "strings-single": dict(
        backbone="scratch", rank=2, skills=8, routing="gumbel", steps=6000, epochs=0, batch_size=64, optimizer="adamw",
        lr=1e-3, lr_z=5e-2, weight_decay=0.0, warmup=0.06, clip=1.0, max_input=64, max_output=32, precision="fp32",
        eval_examples=100,
    ),
    "t0": dict(
        backbone="google/t5-xl-lm-adapt", rank=1, skills=8, routing="sigmoid", steps=100_000, epochs=0,
        batch_size=16, optimizer="adafactor", scale_parameter=False, lr=1e-3, lr_z=1e-1, weight_decay=0.0, warmup=0.06,
        clip=1.0, max_input=256, max_output=256, precision="bf16", eval_examples=0,
    ),
    "superni": dict(
        backbone="google/t5-xl-lm-adapt", layers="light", rank=1, skills=8, routing="sigmoid", steps=25_000, epochs=0,
        batch_size=8, optimizer="adamw", lr=1e-3, lr_z=1e-1, weight_decay=0.01, warmup=0.06, clip=0.1, max_input=1024,
        max_output=128, precision="bf16", eval_examples=0,
    ),
    "crossfit": dict(
        split="100", backbone="facebook/bart-large", layers="self-attention", rank=16, skills=8, routing="gumbel",
        steps=0, epochs=30, batch_size=32, optimizer="adamw", lr=1e-3, lr_z=1e-2, weight_decay=0.0, warmup=0.06,
        clip=1.0, max_input=512, max_output=64, precision="fp32", eval_examples=0,
    ),
    ("strings", "full"): dict(lr=3.3e-4),
    **{("strings", m): dict(lr=1.5e-2) for m in ("expert", "task-moe", "poly", "mhr")},
    **{("strings", m): dict(lr=1.7e-3) for m in ("hyperformer", "adapter-soup")},
    ("strings", "ia3"): dict(lr=4.5e-2),
    ("t0", "full"): dict(lr=1e-4, precision="fp32"),
    ("t0", "ia3"): dict(scale_parameter=True, lr=3e-4),
    **{("t0", m, "ia3"): dict(scale_parameter=True, lr=3e-4) for m in ("poly", "mhr")},
    ("superni", "full"): dict(lr=5e-5, precision="fp32"),
    ("crossfit", "full"): dict(lr=3e-5),
}  # fmt: skip
FEW_SHOT = {
    "strings": dict(
        shots=32, split=("0",), steps=100, batch_size=32, optimizer="adamw", lr=3e-3, lr_z=5e-1, weight_decay=0.0,
        warmup=0.06, clip=1.0, choice_losses=False, best_by="loss", eval_every=10, patience=5,
    ),
    "t0": dict(
        shots=0, split=("42", "1024", "0"), steps=1000, batch_size=8, optimizer="adafactor", scale_parameter=True,
        lr=3e-3, lr_z=1e-1, weight_decay=0.0, warmup=0.06, clip=1.0, choice_losses=True, best_by="score",
        eval_every=200, patience=5,
    ),
    "superni": dict(
        shots=0, split=("13", "42", "58"), steps=1000, batch_size=8, optimizer="adamw", lr=1e-3, lr_z=1e-1,
        weight_decay=0.01, warmup=0.06, clip=0.1, choice_losses=False, best_by="loss", eval_every=100, patience=3,
        beams=4,
    ),
    "crossfit": dict(
        shots=0, split=("100", "13", "21", "42", "87"), steps=1000, batch_size=8, optimizer="adamw", lr=1e-3,
        lr_z=1e-2, weight_decay=0.01, warmup=0.1, clip=1.0, choice_losses=False, best_by="loss", eval_every=100,
        patience=3, beams=4,
    ),
    ("strings", "full"): dict(lr=1.1e-4),
    **{("strings", m): dict(lr=2.7e-2) for m in ("lora", "shared", "ia3")},
    **{("strings", m): dict(lr=9e-3) for m in ("private", "adapter-soup")},
    ("strings", "hyperformer"): dict(lr=1e-3),
    ("t0", "full"): dict(lr=1e-4),
    ("superni", "full"): dict(lr=5e-5),
    ("crossfit", "full"): dict(lr=3e-5),
}  # fmt: skip


def recipe(recipes: dict, dataset: str, method: str, adapter: str = "lora") -> dict:
    """The defaults of a benchmark, changed by those of (benchmark, method) and (benchmark, method, adapter)."""
    keys = dataset, (dataset, method), (dataset, method, adapter)
    return {name: value for key in keys for name, value in recipes.get(key, {}).items()}
