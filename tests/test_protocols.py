"""The papers' protocols from end to end: train, adapt and evaluate on T0, Super-NaturalInstructions and CrossFit.

Runs are tiny and in this process. Every metric is replaced by a fingerprint of the predictions, so that scores are
equal only if all predictions are. The samples in assets/ are always there; the real ones are used where they are.
"""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Adafactor, BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

import adapt
import benchmarks
import data
import evaluate
import scoring
import train
from benchmarks import metrics
from benchmarks.choices import labelled_tensors, loss_of_choices
from benchmarks.tables import Rows
from data import Benchmark, Example, Item, Task
from inject import adapter_parameters, inject, routers
from layers import GRANULARITIES, named_layers
from lora import LoRA, LoRALinear
from methods import add_adapters, build_model, load_run
from plumbing.backbones import load_backbone
from plumbing.errors import UserError
from plumbing.flags import as_flag, check_ranges, explicit_flags
from plumbing.folders import FIXED_BY_RUN
from plumbing.machine import fast_in_bf16
from poly import PolyLinear, PolyRouter
from recipes import FEW_SHOT, FIXED_TABLE, PRETRAINING
from scoring import over_splits
from tests import helpers
from tests.helpers import (
    difference, fingerprints_as_metrics, lines_of, read, same_tensors, save_as_backbone, small_backbone,
)  # fmt: skip
from tools.export import held_whole

SAMPLES = Path(__file__).resolve().parents[1] / "assets" / "samples"
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
DATASETS = ("t0", "superni", "crossfit")
NO_STEP = 5e-324  # a learning rate above 0, as the flags demand, that is 0 as a float32: nothing moves

TRAIN = dict(method="mhr", heads=4, rank=1, skills=2, steps=12, batch_size=4, max_input=40, max_output=6, lr=0.2) | {
    "seed": 1  # one with which adaptation moves every benchmark's scores
}
FEW = dict(steps=2, eval_every=2, batch_size=4, test_examples=6, lr=0.5, lr_z=0.5)
SPLITS = {"t0": ("42", "0"), "superni": ("13", "42"), "crossfit": ("100", "13")}
VARIANT = {"t0": "all", "superni": "mu", "crossfit": "z"}
PLURAL, FOLLOW = "task9101_sample_record_to_sentence", "task9102_sample_does_it_follow"
METRICS = {  # of the samples' test tasks, in order
    "t0": {"copa": ["Rank-ACC"], "rte": ["Rank-ACC"]},
    "superni": {PLURAL: ["Rouge-L", "SuperNI-EM"], FOLLOW: ["Rouge-L", "SuperNI-EM"]},
    "crossfit": {"glue-cola": ["Matthew-Correlation"], "quoref": ["QA-F1"]},
}
GROUPS = {
    "t0": {"super_glue/copa": "copa", "super_glue/rte": "rte"},
    "superni": {"Data to Text": PLURAL, "Textual Entailment": FOLLOW},
    "crossfit": {"classification": "glue-cola", "question answering": "quoref"},
}
# Trained for one task, counted by hand. Of the small T5's 3 attention and 2 feed-forward sub-layers, a linear has 16 +
# 16 or 16 + 32 values at rank 1: t0 two skills in all 12 + 6; superni one adapter in k, v and wi_1; crossfit Z.
COUNTS = {
    "t0": {"adapters": 2 * (12 * 32 + 6 * 48), "routing": 18 * 4 * 2},
    "superni": {"adapters": 6 * 32 + 2 * 48, "routing": 0},
    "crossfit": {"adapters": 0, "routing": 8 * 4 * 2},
}
TRUE_METRICS = dict(metrics.METRICS)


@pytest.fixture(scope="module", autouse=True)
def strict_metrics():
    with fingerprints_as_metrics():
        yield


def said_by(main, flags: dict) -> tuple:
    """(what main returns, what it prints)."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return main(flags), out.getvalue()


def refusal(main, flags: dict) -> str:
    """The one sentence with which main refuses these flags."""
    with pytest.raises(UserError) as caught:
        main(flags)
    sentence = str(caught.value)
    assert "\n" not in sentence and not re.search(r"[.!?] [A-Z]", sentence)
    return sentence


def score_again(folder: Path, **flags) -> dict[str, float]:
    return evaluate.evaluate(evaluate.Config(checkpoint=str(folder), **flags))


@dataclasses.dataclass
class Flow:
    """A pre-training run and an adaptation of it: their folders, and what each printed."""

    run: Path
    adapted: Path
    trained: str
    said: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("protocols")


@pytest.fixture(scope="module")
def small(folder) -> dict:
    """Flags of a short run on the small backbone."""
    return TRAIN | dict(backbone=small_backbone(folder / "small"), log_every=1)


@pytest.fixture(scope="module")
def flows(folder, small):
    """The flow of each data set on its bundled sample, made when it is first asked for."""
    made = {}

    def get(name: str) -> Flow:
        if name not in made:
            run, adapted = folder / name, folder / f"{name}-adapted"
            flags = small | dict(dataset=name, data_dir=str(SAMPLES / name), output_dir=str(run))
            _, trained = said_by(train.main, flags)
            few = FEW | dict(checkpoint=str(run), variant=VARIANT[name], split=SPLITS[name], output_dir=str(adapted))
            _, said = said_by(adapt.main, few)
            made[name] = Flow(run, adapted, trained, said)
        return made[name]

    return get


# --- The bundled samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_result_of_an_adaptation(flows, dataset):
    result, names = read(flows(dataset).adapted / "result.json"), list(METRICS[dataset])
    assert list(result["splits"]) == list(SPLITS[dataset])
    for split in result["splits"].values():
        assert list(split["tasks"]) == list(split["before"]) == list(split["stops"]) == names
        assert {name: list(scores) for name, scores in split["metrics"].items()} == METRICS[dataset]
        assert split["tasks"] == {name: next(iter(scores.values())) for name, scores in split["metrics"].items()}
        assert split["groups"] == {group: split["tasks"][name] for group, name in GROUPS[dataset].items()}
    assert result["metrics"] == {name: several[0] for name, several in METRICS[dataset].items()}
    assert result["parameters"] == COUNTS[dataset]

    one, other = (split["tasks"] for split in result["splits"].values())
    assert result["tasks"] == pytest.approx({name: (one[name] + other[name]) / 2 for name in names})
    means = [sum(tasks.values()) / 2 for tasks in (one, other)]
    assert [result["mean"], result["median"]] == pytest.approx([sum(means) / 2] * 2)
    assert result["std"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    before = [split["before"] for split in result["splits"].values()]
    assert result["mean_before"] == pytest.approx(sum(sum(b.values()) for b in before) / 4)
    assert result["before"] == pytest.approx({name: (before[0][name] + before[1][name]) / 2 for name in names})


def test_the_fingerprints_of_the_runs_differ(flows):
    """So the equalities in this file are not those of a model that always says the same."""
    for dataset in DATASETS:
        result = read(flows(dataset).adapted / "result.json")
        assert result["std"] > 0 or result["before"] != result["tasks"]


def test_summary_by_hand():
    def split(before, tasks):
        return {"before": before, "tasks": tasks, "groups": {"all": sum(tasks.values())}}

    splits = {
        "1": split({"a": 0.0, "b": 10.0}, {"a": 10.0, "b": 30.0}),  # means 5 and 20
        "2": split({"a": 2.0, "b": 20.0}, {"a": 20.0, "b": 80.0}),  # 11 and 50
        "3": split({"a": 1.0}, {"a": 26.0}),  # 1 and 26: b had no examples here
    }
    result = over_splits(splits)
    assert result["mean_before"] == pytest.approx(17 / 3) and result["mean"] == pytest.approx(32)
    assert result["std"] == pytest.approx((((20 - 32) ** 2 + (50 - 32) ** 2 + (26 - 32) ** 2) / 2) ** 0.5)
    assert result["medians"] == {"a": 20.0, "b": 55.0} and result["median"] == 37.5  # of each task, then over tasks
    assert result["groups"] == {"all": pytest.approx((40 + 100 + 26) / 3)}
    assert result["before"] == {"a": 1.0, "b": 15.0} and result["tasks"] == pytest.approx({"a": 56 / 3, "b": 55.0})
    assert result["splits"] == splits
    assert over_splits({"1": splits["1"]})["std"] == 0 and over_splits({"1": splits["1"]})["median"] == 20


@pytest.mark.parametrize("dataset", DATASETS)
def test_scoring_an_adaptation_again(flows, dataset, capsys):
    flow = flows(dataset)
    result = read(flow.adapted / "result.json")
    assert score_again(flow.adapted) == result["tasks"]
    said = capsys.readouterr().out
    for name, several in METRICS[dataset].items():
        mean = {m: statistics.fmean(s["metrics"][name][m] for s in result["splits"].values()) for m in several}
        *_, line = (
            line for line in said.splitlines() if line.startswith(f"{name} ")
        )  # the first ones are the preview's
        assert line.split()[1:] == [word for m in several for word in (m, f"{mean[m]:.1f}")]
    for group, name in GROUPS[dataset].items():
        assert re.search(rf"^\[{re.escape(group)}\] +{result['tasks'][name]:.1f}$", said, re.MULTILINE)


@pytest.mark.parametrize("dataset", DATASETS)
def test_zero_shot(flows, dataset):
    flow = flows(dataset)
    scores = score_again(flow.run, zero_shot=True, test_examples=6)
    assert list(scores) == list(METRICS[dataset])
    if VARIANT[dataset] != "mu":  # an adaptation with a fresh row of Z starts there
        assert scores == read(flow.adapted / "result.json")["splits"][SPLITS[dataset][0]]["before"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_constant_answer(flows, dataset, monkeypatch):
    """The floor for any model, counted by hand: the answer that is most frequent in training."""
    run = flows(dataset).run
    monkeypatch.setattr(metrics, "METRICS", TRUE_METRICS)
    scores = score_again(run, constant=True)
    tasks = benchmarks.load(dataset, str(SAMPLES / dataset), SPLITS[dataset][0]).test
    assert list(scores) == [task.name for task in tasks] == list(METRICS[dataset])
    if dataset == "t0":
        for task in tasks:
            place = Counter(e.label for e in task.train).most_common(1)[0][0]
            assert scores[task.name] == pytest.approx(100 * statistics.fmean(e.label == place for e in task.test))
    elif dataset == "superni":
        answer = Counter(e.outputs[0] for e in tasks[1].train).most_common(1)[0][0]
        assert " " not in answer  # of one word: Rouge-L is 0 or 100 there
        assert scores[FOLLOW] == pytest.approx(100 * statistics.fmean(answer in e.outputs for e in tasks[1].test))
        assert scores[FOLLOW] > 0
    else:
        assert scores["glue-cola"] == 0  # a constant has no correlation


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_start_up_print_shows_every_setting(flows, dataset):
    flow = flows(dataset)
    idle = {"top_k", "density", "random_by", "soup", "partition" * (dataset != "crossfit")}
    idle |= {"split"} if dataset != "crossfit" else set()
    for said, path in ((flow.trained, flow.run), (flow.said, flow.adapted)):
        shown = re.sub(r"\s+", " ", said) + " "
        unused = idle if path == flow.run else {"soup"} | {"z": {"lr"}, "mu": {"lr_z"}}.get(VARIANT[dataset], set())
        for name, value in read(path / "config.json").items():
            text = " ".join(value) if isinstance(value, list) else f"{value:,}" if type(value) is int else str(value)
            assert not value or name in unused or f" {name} {text} " in shown, name


@pytest.mark.parametrize("dataset", DATASETS)
def test_each_split_is_what_it_is_alone(flows, folder, dataset):
    together, alone = flows(dataset), folder / f"{dataset}-alone"
    split = SPLITS[dataset][1]
    flags = FEW | dict(checkpoint=str(together.run), variant=VARIANT[dataset], split=(split,), output_dir=str(alone))
    result = adapt.main(flags)
    assert result["splits"][split] == read(together.adapted / "result.json")["splits"][split]
    first = together.adapted / SPLITS[dataset][0]
    for name in METRICS[dataset]:
        file = f"{name}.safetensors"
        assert same_tensors(alone / split / file, together.adapted / split / file)
        best = result["splits"][split]["stops"][name]["best_step"]
        assert best == 0 or not same_tensors(first / file, together.adapted / split / file)


# --- The real samples, on the three kinds of backbone -----------------------------------------------------------------

# How many routers adapt two T5, BART (self-attention) or Llama layers: see ROUTER_NUMBERS in test_inject.py.
ROUTERS = {"t5": (36, 10, 4, 2, 1), "bart": (16, 4, 4, 2, 1), "llama": (14, 4, 2, 1, 1)}
REAL_TASK = {"t0": "copa", "superni": "task1622_disfl_qa_text_modication", "crossfit": "superglue-rte"}


@pytest.fixture(scope="module")
def backbones(folder) -> dict[str, str]:
    """A random T5, BART and Llama of two layers, saved with a tokenizer whose tokens are bytes."""
    torch.manual_seed(0)
    ends = dict(vocab_size=384, pad_token_id=0, eos_token_id=1)
    made = {
        "t5": T5ForConditionalGeneration(T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0, **ends)),
        "bart": BartForConditionalGeneration(BartConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, bos_token_id=None,
            decoder_start_token_id=1, forced_eos_token_id=None, **ends)),
        "llama": LlamaForCausalLM(LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, bos_token_id=None, **ends)),
    }  # fmt: skip
    return {name: save_as_backbone(model, folder / name) for name, model in made.items()}


def grid(kinds, quick: set[tuple]) -> list:
    """Pairs as parameters of a test, slow unless they are in `quick`, which has each value of a pair at least once."""
    return [pytest.param(*kind, marks=[] if kind in quick else pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize(
    "dataset, name",
    grid(itertools.product(DATASETS, ROUTERS), {("t0", "llama"), ("superni", "t5"), ("crossfit", "bart")}),
)
def test_real_files(folder, backbones, dataset, name):
    if not (REAL / dataset).is_dir():
        pytest.skip(f"the real sample of {dataset} is not here ({REAL / dataset})")
    run, few, task = folder / f"real-{dataset}-{name}", folder / f"few-{dataset}-{name}", REAL_TASK[dataset]
    flags = TRAIN | dict(dataset=dataset, data_dir=str(REAL / dataset), backbone=backbones[name], steps=2)
    trained, _ = said_by(train.main, flags | dict(output_dir=str(run)))
    assert trained["steps"] == 2 and 0 < trained["loss"] < 20
    flags = FEW | dict(checkpoint=str(run), tasks=task, split=SPLITS[dataset][:1], test_examples=2)
    result, _ = said_by(adapt.main, flags | dict(output_dir=str(few)))
    assert list(result["tasks"]) == [task] and result["parameters"]["routing"] > 0
    log = lines_of(few / "log.jsonl")
    assert [line["step"] for line in log] == [2] and 0 < log[0]["loss"] < 100
    assert score_again(few, test_examples=2) == result["tasks"]


@pytest.mark.parametrize(
    "name, granularity",
    grid(
        itertools.product(ROUTERS, GRANULARITIES),
        {("t5", "linear"), ("t5", "layer"), ("bart", "block"), ("llama", "coder"), ("bart", "model")},
    ),
)
def test_the_number_of_routers_is_printed(tmp_path, backbones, name, granularity):
    flags = TRAIN | dict(backbone=backbones[name], steps=1, eval_examples=0, granularity=granularity)
    _, said = said_by(train.main, flags | dict(output_dir=str(tmp_path / "run")))
    number = ROUTERS[name][GRANULARITIES.index(granularity)]
    assert " 1 step\n" in said and f"routing {64 * 4 * 2 * number:,}; {number} router" in said


# --- Recipes ----------------------------------------------------------------------------------------------------------

LARGE = dict(rank=1, skills=8, heads=8, routing="sigmoid", lr=1e-3, lr_z=1e-1, epochs=0, warmup=0.06)
PAPERS = {  # pre-training
    "t0": LARGE | dict(
        backbone="google/t5-xl-lm-adapt", layers="", optimizer="adafactor", steps=100_000, batch_size=16, clip=1.0,
        weight_decay=0.0, max_input=256, max_output=256, precision="bf16"),
    "superni": LARGE | dict(
        backbone="google/t5-xl-lm-adapt", layers="light", optimizer="adamw", steps=25_000, batch_size=8, clip=0.1,
        weight_decay=0.01, max_input=1024, max_output=128, precision="bf16"),
    "crossfit": dict(
        backbone="facebook/bart-large", layers="self-attention", optimizer="adamw", steps=0, epochs=30, batch_size=32,
        rank=16, skills=8, heads=8, routing="gumbel", lr=1e-3, lr_z=1e-2, warmup=0.06, clip=1.0, weight_decay=0.0,
        max_input=512, max_output=64, precision="fp32"),
}  # fmt: skip
FULL_LR = {"t0": 1e-4, "superni": 5e-5, "crossfit": 3e-5}  # ours: the papers do not say; few-shot the same
FULL_RATE = {dataset: {"lr": lr} for dataset, lr in FULL_LR.items()}
FEW_PAPERS = {
    "t0": dict(optimizer="adafactor", lr=3e-3, lr_z=1e-1, weight_decay=0.0, warmup=0.06, clip=1.0, choice_losses=True,
               best_by="score", split=("42", "1024", "0"), scale_parameter=True, beams=1),
    "superni": dict(optimizer="adamw", lr=1e-3, lr_z=1e-1, weight_decay=0.01, warmup=0.06, clip=0.1,
                    choice_losses=False, best_by="loss", split=("13", "42", "58"), beams=4),
    "crossfit": dict(optimizer="adamw", lr=1e-3, lr_z=1e-2, weight_decay=0.01, warmup=0.1, clip=1.0,
                     choice_losses=False, best_by="loss", split=("100", "13", "21", "42", "87"), beams=4),
}  # fmt: skip


def on(monkeypatch, device: str):
    """Whatever this machine has, --device auto is this device."""
    monkeypatch.setattr(train, "pick_device", lambda asked: device if asked == "auto" else asked)


@pytest.mark.parametrize("method", ["poly", "mhr"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_recipe_of_routed_ia3(dataset, method):
    """On T0 Adafactor's rate and scale are those of (IA)³, as in the authors' file of Poly; all else is Poly's, but for
    the layers, which are the adapter's own."""
    plain, ia3 = (vars(train.make_config(dataset=dataset, method=method, adapter=kind)) for kind in ("lora", "ia3"))
    own = dict(adapter="ia3", scale_parameter=True, lr=3e-4) if dataset == "t0" else dict(adapter="ia3", layers="")
    assert {name: value for name, value in ia3.items() if value != plain[name]} == own


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["full", "lora", "ia3", "shared", "poly", "mhr"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_recipe_of_pretraining(monkeypatch, dataset, method, device):
    on(monkeypatch, device)
    expected = PAPERS[dataset] | dict(method=method, dataset=dataset, device=device, seed=0, micro_batch=0)
    expected |= {"full": dict(lr=FULL_LR[dataset]), "ia3": dict(adapter="ia3", layers="")}.get(method, {})
    if dataset == "t0":  # Adafactor scales by RMS where the authors' files leave that on
        expected |= dict(scale_parameter=True, lr=3e-4) if method == "ia3" else dict(scale_parameter=False)
    if device == "cpu" or method == "full":  # full: bfloat16 weights would round most updates away
        expected["precision"] = "fp32"
    cfg = train.make_config(dataset=dataset, method=method)
    assert {name: getattr(cfg, name) for name in expected} == expected
    warm = cfg.warmup * cfg.steps
    assert dataset != "superni" or warm == pytest.approx(1500)  # the paper's number of steps


def test_precision_is_kept_where_it_is_given(monkeypatch):
    on(monkeypatch, "cpu")
    assert train.make_config(dataset="t0", precision="bf16").precision == "bf16"
    on(monkeypatch, "cuda")
    assert train.make_config(dataset="t0", precision="fp32").precision == "fp32"
    assert train.make_config(dataset="t0", device="cpu").precision == "fp32"


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_in_bf16_is_opened_in_what_is_fast_here(tmp_path, monkeypatch, fast):
    """Of CPUs only those that multiply bfloat16 keep it. What an export merges does not depend on that."""
    base = train.make_config(dataset="strings", precision="bf16", device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(base)))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": fast})
    opened = train.run_config(str(tmp_path), device="cpu")
    assert opened == dataclasses.replace(base, precision="bf16" if fast else "fp32")
    assert held_whole(opened).precision == "fp32" and not fast_in_bf16("mps")


def of_recipe(folder: Path, dataset: str, method: str = "mhr") -> str:
    """A run folder with nothing but a recipe's settings."""
    folder.mkdir(exist_ok=True)
    settings = dataclasses.asdict(train.make_config(dataset=dataset, method=method))
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("method", ["full", "lora", "ia3", "shared", "poly", "mhr"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_recipe_of_few_shot(tmp_path, dataset, method):
    expected = FEW_PAPERS[dataset] | dict(steps=1000, batch_size=8, shots=0, variant="all", tasks="all", micro_batch=0)
    checkpoint = of_recipe(tmp_path, dataset, method)
    cfg = adapt.make_config(checkpoint=checkpoint)
    assert {name: getattr(cfg, name) for name in expected} == expected | (
        FULL_RATE[dataset] if method == "full" else {}
    )
    if method == "full":  # a fresh LoRA learns at the adapters' rate
        assert adapt.make_config(checkpoint=checkpoint, variant="lora").lr == expected["lr"]


def another(field: dataclasses.Field, value):
    """A value for a flag that is not its default here."""
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice not in (value, "auto"))
    if field.type is tuple:
        return ("13",)
    return {bool: lambda: not value, str: lambda: "other", int: lambda: value + 1, float: lambda: value + 0.25}[
        field.type
    ]()


def settings_with(module, table: dict, field: dataclasses.Field, value, **more):
    """The settings with this value, given by its flag, or from Python if it has none."""
    if field.metadata.get("setting"):
        return module.make_config(**more | {field.name: value})
    name, words = f"--{field.name.replace('_', '-')}", [value] if not isinstance(value, tuple) else value
    argv = [name if value else f"--no-{name[2:]}"] if field.type is bool else [name, *map(str, words)]
    return module.make_config(**more | explicit_flags(module.Config, table, argv))


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_setting_of_pretraining_overrides_its_recipe_and_nothing_else(monkeypatch, dataset):
    on(monkeypatch, "cpu")
    plain = train.make_config(dataset=dataset)
    for field in dataclasses.fields(train.Config):
        if field.name in ("from_run", "dataset"):
            continue
        value = another(field, getattr(plain, field.name))
        cfg = settings_with(train, PRETRAINING, field, value, dataset=dataset)
        assert getattr(cfg, field.name) == value
        follow = {
            "method": ("lr", "output_dir"), "device": ("precision",), "epochs": ("steps",),
            "steps": ("epochs", "output_dir"),
        }  # fmt: skip
        follow["adapter"] = ("layers", "lr", "scale_parameter") if dataset == "t0" else ("layers",)  # (IA)³ has its own
        follow = follow.get(field.name, ("output_dir",))
        changed = {name for name in vars(plain) if getattr(cfg, name) != getattr(plain, name)}
        assert changed <= {field.name, *follow}


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_setting_of_few_shot_overrides_its_recipe_and_nothing_else(tmp_path, dataset):
    checkpoint = of_recipe(tmp_path, dataset)
    plain = adapt.make_config(checkpoint=checkpoint)
    for field in dataclasses.fields(adapt.Config):
        if field.name == "checkpoint" or (dataset, field.name) == ("t0", "shots"):
            continue
        value = another(field, getattr(plain, field.name))
        cfg = settings_with(adapt, FEW_SHOT, field, value, checkpoint=checkpoint)
        given = getattr(cfg, field.name)
        assert (tuple(given) if field.type is tuple else given) == value
        changed = {name for name in vars(plain) if getattr(cfg, name) != getattr(plain, name)}
        assert changed <= {field.name, *(("output_dir",) if field.name == "variant" else ())}


@pytest.mark.parametrize("module", [train, adapt, evaluate])
def test_no_number_may_be_negative(module):
    for field in dataclasses.fields(module.Config):
        if field.type in (int, float):
            shown = field.name if field.metadata.get("setting") else as_flag(field.name)
            with pytest.raises(UserError, match=f"^{shown} "):
                check_ranges(module.Config(**{field.name: -1}))


@pytest.mark.parametrize("method, adapter", [("lora", "ia3"), ("ia3", "lora")])
def test_an_adapter_that_is_not_the_methods_is_refused(method, adapter):
    said = refusal(lambda flags: train.make_config(**flags), dict(method=method, adapter=adapter))
    assert f"--adapter {adapter}" in said and f"--method {method}" in said
    assert train.make_config(method=method, adapter=method).adapter == method


class Loaded(Exception):
    """Raised in place of loading something for minutes."""


@pytest.mark.parametrize("stop", ["benchmarks.load", "methods.load_backbone"])
@pytest.mark.parametrize("dataset", ["t0", "superni"])
def test_a_backbone_too_large_is_told_before_anything_is_loaded(monkeypatch, capsys, tmp_path, dataset, stop):
    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(stop, load)
    flags = dict(dataset=dataset, data_dir=str(SAMPLES / dataset), device="cpu", output_dir=str(tmp_path / "run"))
    with pytest.raises(Loaded):
        train.main(flags)
    said = capsys.readouterr().out
    assert "google/t5-xl-lm-adapt has 2.8 billion parameters, 11 GB in fp32" in said and "--backbone tiny" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(Loaded):
        train.main(flags | dict(backbone="tiny"))
    assert "billion" not in capsys.readouterr().out


# --- Continuing a run -------------------------------------------------------------------------------------------------


def skills_averaged(path: Path) -> dict[str, torch.Tensor]:
    """The adapter that a run's skills average to, by the names of a run with one adapter."""
    saved = load_file(path / "adapter.safetensors").items()
    return {name.replace(".inventory.", ".params."): v.mean(0) for name, v in saved if ".inventory." in name}


@pytest.fixture(scope="module")
def base(flows) -> Path:
    """A run of mhr to continue."""
    return flows("crossfit").run


@pytest.fixture(scope="module")
def mu(folder, base) -> Path:
    """The run whose skills were averaged and not trained further."""
    flags = dict(from_run=str(base), method="mu", steps=2, lr=NO_STEP, output_dir=str(folder / "mu"))
    train.main(flags)
    return folder / "mu"


def test_mu_starts_at_the_mean_of_the_skills(base, mu):
    one = load_file(mu / "adapter.safetensors")
    expected = skills_averaged(base)
    assert one.keys() == expected.keys() and len(one) == 2 * 8
    for name, value in one.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7)
        assert value.abs().max() > 1e-3  # the run had trained: not the zeros that B starts with


def test_mu_then_trains_one_adapter(base, mu, folder):
    result = train.main(dict(from_run=str(base), method="mu", steps=4, output_dir=str(folder / "mu-trained")))
    assert result["parameters"] == {"adapters": 8 * 32, "routing": 0}
    start, end = (load_file(path / "adapter.safetensors") for path in (mu, folder / "mu-trained"))
    assert start.keys() == end.keys() and not any(torch.equal(start[name], end[name]) for name in start)
    settings, before = read(folder / "mu-trained" / "config.json"), read(base / "config.json")
    changed = {name for name in settings if settings[name] != before[name]}
    assert changed == {"method", "from_run", "steps", "output_dir"}


def test_mu_continues_mu(mu, folder):
    flags = dict(from_run=str(mu), steps=1, lr=NO_STEP, output_dir=str(folder / "mu-again"))
    train.main(flags)
    assert read(folder / "mu-again" / "config.json")["method"] == "mu"
    assert same_tensors(mu / "adapter.safetensors", folder / "mu-again" / "adapter.safetensors")


def test_zero_shot_of_mu(base, mu):
    """Without a step it is the run whose skills are averaged by hand."""
    scores = score_again(mu, zero_shot=True, test_examples=6)
    cfg = train.run_config(str(base))
    model, tokenizer = load_run(base, cfg)
    adapt.prepare(model, cfg, adapt.Config(variant="mu"))
    tasks = benchmarks.load("crossfit", str(SAMPLES / "crossfit"), "100").test
    assert scores == scoring.evaluate_tasks(model, tokenizer, tasks, [0, 0], (40, 6), 6, beams=4)  # the recipe's


def test_adapting_mu(mu, folder):
    few = folder / "mu-few"
    flags = FEW | dict(checkpoint=str(mu), split=("100",), tasks="quoref")
    result = adapt.main(flags | dict(output_dir=str(few)))
    assert result["parameters"] == {"adapters": 8 * 32, "routing": 0}
    assert score_again(few) == result["tasks"]
    for variant in ("z", "mu"):
        assert f"--variant {variant}" in refusal(adapt.main, flags | dict(variant=variant))


@pytest.fixture(scope="module")
def small_runs(folder, small):
    """Runs of one step on the sample of crossfit, by method and routing."""
    made = {}

    def get(method: str, routing: str = "gumbel") -> Path:
        if (method, routing) not in made:
            made[method, routing] = folder / f"small-{method}-{routing}"
            flags = small | dict(dataset="crossfit", data_dir=str(SAMPLES / "crossfit"), method=method, steps=1)
            if method in FIXED_TABLE:
                del flags["skills"]  # the tasks say how many
            train.main(flags | dict(routing=routing, output_dir=str(made[method, routing])))
        return made[method, routing]

    return get


@pytest.mark.parametrize("method", ["poly", "lora", "full", "expert", "private", "random", "hyperformer"])
def test_a_continued_run_starts_from_its_own_values(small_runs, folder, method):
    base, more = small_runs(method), folder / f"more-{method}"
    saved = "backbone/model.safetensors" if method == "full" else "adapter.safetensors"
    train.main(dict(from_run=str(base), steps=2, seed=5, lr=NO_STEP, lr_z=NO_STEP, output_dir=str(more)))
    assert same_tensors(base / saved, more / saved)
    moved = folder / f"moved-{method}"
    train.main(dict(from_run=str(base), steps=2, output_dir=str(moved)))
    assert not same_tensors(base / saved, moved / saved)


def test_what_a_model_is_made_of_is_fixed_by_the_run(small_runs, tmp_path):
    for name in FIXED_BY_RUN:
        field = next(f for f in dataclasses.fields(train.Config) if f.name == name)
        value = another(field, getattr(train.Config(**read(small_runs("mhr") / "config.json")), name))
        flags = dict(from_run=str(small_runs("mhr")), steps=1, output_dir=str(tmp_path / "out"))
        said = refusal(train.main, flags | {name: value})
        assert said.startswith(f"--{name.replace('_', '-')} {value} does not fit --from-run "), said


SHAPES = (dict(method="mhr"), dict(method="poly", adapter="sft"), dict(method="task-moe"), dict(method="random"))


def test_every_setting_that_shapes_a_model_is_fixed_by_the_run(small):
    """Settings that change the tensors in a run's file, or how a router turns them into weights. Not --routing, which
    may change, nor the method, which is checked apart."""
    whole, _ = load_backbone(small["backbone"], "cpu")
    few = dict(skills=4, heads=4, layers=r".*0\.SelfAttention\.(q|k)")

    def shape(**settings):
        model = copy.deepcopy(whole)
        cfg = train.Config(**few | settings)
        add_adapters(model, cfg, 3)
        kinds = [(type(r), getattr(r, "k", 0)) for r in routers(model)]
        return {key: p.shape for key, p in adapter_parameters(model).items()}, kinds

    shaping = set()
    for base in SHAPES:
        plain = shape(**base)
        for field in dataclasses.fields(train.Config):
            if field.name not in ("method", "routing"):
                value = getattr(train.Config(**few | base), field.name)
                other = {"layers": "self-attention", "heads": 8, "granularity": "block"}.get(field.name) or another(
                    field, value
                )
                if shape(**base | {field.name: other}) != plain:
                    shaping.add(field.name)
    expected = {"adapter", "layers", "rank", "density", "skills", "heads", "granularity", "top_k", "random_by"}
    assert expected == shaping < set(FIXED_BY_RUN)


@pytest.mark.parametrize(
    "base, flags, named",
    [
        ("mhr", dict(steps=1, rank=7), "--rank 7 .*whose is 1"),
        ("mhr", dict(steps=1, dataset="t0"), "--dataset t0 .*whose is crossfit"),
        ("mhr", dict(steps=1, heads=2), "--heads 2 .*whose is 4"),
        ("mhr", dict(steps=1, backbone="scratch"), "--backbone scratch .*whose is .*small"),
        ("mhr", dict(steps=1, method="lora"), "--method lora cannot continue a run of method mhr"),
        ("lora", dict(steps=1, method="mu"), "--method mu cannot continue a run of method lora"),
        ("full", dict(steps=1, method="mu"), "--method mu cannot continue a run of method full"),
        ("mhr", dict(method="mu"), "--steps"),
        ("mhr", {}, "--steps"),
        ("", dict(method="mu", steps=1), "--from-run"),
        ("nowhere", dict(steps=1), "nowhere/config.json"),
    ],
)
def test_what_cannot_be_continued(small_runs, tmp_path, base, flags, named):
    run = {"": "", "nowhere": str(tmp_path / "nowhere")}.get(base) if base in ("", "nowhere") else str(small_runs(base))
    said = refusal(train.main, dict(from_run=run, output_dir=str(tmp_path / "out")) | flags)
    assert re.search(named, said), said
    assert not (tmp_path / "out").exists()


# --- Few-shot adaptation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, best_step, stopped",
    [
        ([5, 6, 7, 8, 9], 8, 8),
        ([5, 4, 3, 2, 1], 0, 4),  # two looks without a better score: stop
        ([5, 6, 6, 6, 9], 2, 6),  # as good is not better
        ([5, 4, 6, 3, 2], 4, 8),
    ],
)
def test_best_by_score_keeps_the_values_of_the_best_dev_score(base, monkeypatch, scores, best_step, stopped):
    cfg = train.run_config(str(base))
    model, tokenizer = load_run(base, cfg)
    adapt.prepare(model, cfg, adapt.Config())
    dev = [Example("dev", ("x",))]
    task = Task("t", "EM", [Example("train", ("y",))], dev, [Example("test", ("z",))])
    seen, log = [], []

    def evaluate_tasks(model, tokenizer, tasks, ids, lengths, limit, batch_size, beams):
        given = (tasks[0].test, ids, lengths, limit, batch_size, beams)
        assert given == (dev, [0], (16, 8), 3, 5, 4)  # never the test examples
        seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        return {"t": float(scores[len(seen) - 1])}

    monkeypatch.setattr(adapt, "evaluate_tasks", evaluate_tasks)
    few = adapt.Config(
        steps=8,
        eval_every=2,
        patience=2,
        batch_size=1,
        lr=0.01,
        best_by="score",
        test_examples=3,
        eval_batch=5,
        beams=4,
    )
    stop = adapt.adapt_task(model, tokenizer, task, (16, 8), few, SimpleNamespace(write=log.append), "7")
    assert stop == {"stopped": stopped, "best_step": best_step, "dev_score": scores[best_step // 2]}
    assert [line["dev_score"] for line in log] == scores[1 : 1 + stopped // 2] and log[0]["split"] == "7"
    at_the_end = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(at_the_end, seen[best_step // 2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


def test_choice_losses_need_choices(flows, tmp_path):
    flags = FEW | dict(checkpoint=str(flows("crossfit").run), split=("100",), output_dir=str(tmp_path / "out"))
    said = refusal(adapt.main, flags | dict(choice_losses=True))
    assert said == "--tasks glue-cola has no answer choices, which T-Few's losses need: leave it out"
    assert not (tmp_path / "out").exists()


def test_shots_do_not_fit_t0(tmp_path):
    checkpoint = of_recipe(tmp_path, "t0")
    assert "--shots" in refusal(lambda flags: adapt.make_config(**flags), dict(checkpoint=checkpoint, shots=4))


def test_a_split_named_twice(tmp_path):
    for dataset, splits in (("crossfit", ("100", "13", "100")), ("superni", ("42", "42"))):
        flags = dict(checkpoint=of_recipe(tmp_path, dataset), split=splits)
        said = refusal(lambda flags: adapt.make_config(**flags), flags)
        assert f"--split {' '.join(splits)} " in said and "twice" in said


def write_superni(root: Path, sizes: dict[str, int]) -> str:
    """Test tasks of these many instances, invented here, in the official format."""
    (root / "splits" / "default").mkdir(parents=True)
    (root / "tasks").mkdir()
    (root / "splits" / "default" / "test_tasks.txt").write_text("".join(f"{name}\n" for name in sizes))
    for name, size in sizes.items():
        instances = [{"id": f"{name}-{k}", "input": f"{k} pears", "output": [f"{k + 1}"]} for k in range(size)]
        task = {"Definition": ["Add one."], "Categories": ["Sums"], "Instances": instances}
        (root / "tasks" / f"{name}.json").write_text(json.dumps(task))
    return str(root)


def test_a_task_without_train_examples_is_named_and_left_out(flows, tmp_path):
    """As task393, which has exactly the 100 instances of its test set."""
    run = str(flows("superni").run)
    folder = write_superni(tmp_path / "data", {"task1_hundred": 100, "task2_more": 104})
    flags = FEW | dict(checkpoint=run, data_dir=folder, split=("13", "42"), output_dir=str(tmp_path / "few"))
    result, said = said_by(adapt.main, flags)
    assert list(result["tasks"]) == ["task2_more"]
    for split in ("13", "42"):
        assert f"left out because they lack train, dev or test examples in split {split}: task1_hundred\n" in said
    assert score_again(tmp_path / "few") == result["tasks"]
    zero_shot = score_again(Path(run), data_dir=folder, zero_shot=True, test_examples=2)
    assert list(zero_shot) == ["task1_hundred", "task2_more"]  # that needs no train examples
    assert list(score_again(Path(run), data_dir=folder, constant=True)) == ["task2_more"]

    alone = write_superni(tmp_path / "alone", {"task1_hundred": 100})
    said = refusal(adapt.main, flags | dict(data_dir=alone, output_dir=str(tmp_path / "none")))
    assert said == "--tasks: none of task1_hundred has train, dev and test examples"
    assert not (tmp_path / "none").exists()


# --- Optimisation -----------------------------------------------------------------------------------------------------


def even_tasks() -> list[Task]:
    """Three tasks of four examples each whose inputs differ in length; outputs and choices are all of three bytes."""
    tasks = []
    for t in range(3):
        examples = []
        for k in range(4):
            choices = (f"{t}{k}a", f"{t}{k}b")
            examples.append(Example("x" * (2 + 3 * k + t), (choices[k % 2],), choices, k % 2))
        tasks.append(Task(f"task{t}", "Rank-ACC", examples, examples, examples))
    return tasks


@pytest.mark.parametrize("loss", ["batch", "choices"])
def test_gradients_of_parts_add_up(loss):
    torch.manual_seed(0)
    cfg = train.make_config(**TRAIN | dict(backbone="tiny", routing="sigmoid"))
    model, tokenizer = build_model(cfg, tasks=3)
    helpers.randomise(model)
    model.double().train()
    prepare, function = (train.tensors_of, train.token_loss) if loss == "batch" else (labelled_tensors, loss_of_choices)
    items = [Item(t, e, e.outputs[0]) for t, task in enumerate(even_tasks()) for e in task.train]
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(size: int):
        model.zero_grad()
        parts = train.parts_of(items, size, lambda part: prepare(model, tokenizer, part, 40, 8))
        value = train.backward_in_parts(partial(function, model), parts, "cpu")
        return value.item(), [p.grad.clone() for p in trained]

    whole, expected = gradients(0)
    assert all(g.abs().max() > 0 for g in expected)
    for size in (1, 5, 99):
        value, grads = gradients(size)
        assert value == pytest.approx(whole, rel=1e-5)
        for grad, all_at_once in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, all_at_once, rtol=1e-5, atol=1e-7 * all_at_once.abs().max().item())


@pytest.mark.parametrize("script", ["train", "adapt", "adapt with choices"])
def test_micro_batches_in_the_scripts(small, small_runs, tmp_path, monkeypatch, script):
    """The gradients of the first step, as each script clips them."""
    tasks, seen, base = even_tasks(), [], small_runs("mhr", "sigmoid")
    monkeypatch.setattr(benchmarks, "load_for", lambda *_: Benchmark(tasks, [], tasks[:1]))
    clip = nn.utils.clip_grad_norm_

    def record(parameters, largest):
        seen.append([p.grad.clone() for p in parameters])
        return clip(parameters, largest)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", record)
    for k, size in enumerate((0, 3)):
        if script == "train":
            flags = small | dict(routing="sigmoid", steps=1, batch_size=12)
            train.main(flags | dict(micro_batch=size, output_dir=str(tmp_path / f"{k}")))
        else:
            flags = FEW | dict(checkpoint=str(base), split=("100",), steps=1, choice_losses="choices" in script)
            adapt.main(flags | dict(micro_batch=size, output_dir=str(tmp_path / f"{k}")))
    whole, parts = seen
    assert any(g.abs().max() > 0 for g in whole)
    for grad, all_at_once in zip(parts, whole, strict=True):
        torch.testing.assert_close(grad, all_at_once, rtol=1e-5, atol=5e-5 * all_at_once.abs().max().item())


class Routed(nn.Module):
    """One routed layer whose values and gradients are set by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = PolyLinear(nn.Linear(6, 4), LoRA(2), PolyRouter(5, 3))
        self.layer.linear.requires_grad_(False)
        for p in self.parameters():
            p.data.normal_()
            p.grad = torch.randn_like(p) if p.requires_grad else None


def adafactor_step(p: torch.Tensor, grad: torch.Tensor, lr: float, decay: float) -> torch.Tensor:
    """The first step of Adafactor (Shazeer and Stern 2018, algorithm 4) over the last two axes, without relative steps.

    Its second moments start at zero and decay by 1 - 1 ** -0.8 = 0: they are the squares of this gradient.
    """
    square = grad**2 + 1e-30
    rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
    update = grad / (rows * columns / rows.mean(-2, keepdim=True)).sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    return p - lr * decay * p - lr * update


@pytest.mark.parametrize("scaled", [False, True])
def test_adafactor_steps_with_two_learning_rates(scaled):
    """scaled: each rate times the root mean square of its parameter, at least 1e-3."""
    cfg = train.Config(optimizer="adafactor", lr=3e-3, lr_z=1e-1, weight_decay=0.25, scale_parameter=scaled)
    model, same_start = Routed(), Routed()
    named = {name: p for name, p in same_start.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in named.items()} == {
        "layer.router.Z": (5, 3), "layer.inventory.A": (3, 6, 2), "layer.inventory.B": (3, 2, 4)
    }  # fmt: skip
    by_hand = {}
    for name, p in named.items():
        lr, decay = (1e-1, 0.0) if name.endswith("Z") else (3e-3, 0.25)
        scale = max(1e-3, p.data.square().mean().sqrt().item()) if scaled else 1.0
        by_hand[name] = adafactor_step(p.data, p.grad, lr * scale, decay)
    train.make_optimizer(model, cfg).step()
    for name, p in named.items():  # transformers' own, each parameter for itself
        lr, decay = (1e-1, 0.0) if name.endswith("Z") else (3e-3, 0.25)
        own = dict(scale_parameter=scaled, relative_step=False, warmup_init=False)
        Adafactor([p], lr=lr, weight_decay=decay, **own).step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, named[name]) if not scaled else difference(p.data, named[name].data) < 1e-6
            torch.testing.assert_close(p.data, by_hand[name], rtol=1e-5, atol=1e-6)


# --- Batches and rows -------------------------------------------------------------------------------------------------


class Counted(Sequence):
    """Examples that note which of them are read."""

    def __init__(self, name: str, size: int, log: list):
        self.name, self.size, self.log = name, size, log

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k: int) -> Example:
        self.log.append((self.name, k))
        return Example(f"{self.name} {k} {'x' * (k % 13)}", ("a", "bb", "ccc"))


SIZES = (31, 0, 70, 54)  # rows of four tasks, 155 in all


def counted() -> tuple[list[Task], list]:
    log = []
    return [Task(f"t{t}", "EM", Counted(f"t{t}", size, log), [], []) for t, size in enumerate(SIZES)], log


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 200]), epoch=st.integers(0, 2), border=st.integers(0, 4), off=st.integers(-2, 2),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_batches_from_the_middle(size, epoch, border, off, seed):
    """start = n gives what comes after n batches, and reads no row of the windows before."""
    per_epoch = -(-sum(SIZES) // size)
    start = max(0, epoch * per_epoch + min(border * data.WINDOW, per_epoch) + off)
    tasks, log = counted()
    whole = list(itertools.islice(data.batches(tasks, size, seed), start + 3))
    later, log_later = counted()
    rest = data.batches(later, size, seed, start)
    first = next(rest)
    reads = list(log_later)
    assert [first, next(rest), next(rest)] == whole[start:]

    begun, within = divmod(start, per_epoch)  # the window that the first batch is in
    window = within // data.WINDOW * data.WINDOW * size
    length = min(data.WINDOW * size, sum(SIZES) - window)
    before = begun * sum(SIZES) + window
    assert reads == log[before : before + length]


def test_a_tasks_share_of_an_epoch_is_its_share_of_the_rows():
    tasks, log = counted()
    for batch in itertools.islice(data.batches(tasks, 4, 0), -(-sum(SIZES) // 4)):
        assert all(item.example.input.startswith(f"t{item.task} ") for item in batch)
    assert Counter(name for name, _ in log) == {"t0": 31, "t2": 70, "t3": 54}
    assert len(set(log)) == 155


def numbers(size: int | None) -> Rows:
    """Rows that say their place in a table of ten."""
    table = datasets.Dataset.from_dict({"n": list(range(10))})
    return Rows(table, lambda row: Example(str(row["n"]), ("",)), size)


def test_rows():
    places = lambda rows: [int(e.input) for e in rows]  # noqa: E731
    assert places(numbers(None)) == places(numbers(10)) == places(numbers(99)) == list(range(10))
    assert places(numbers(4)) == [0, 2, 5, 7]  # evenly spaced
    assert places(numbers(5)) == [0, 2, 4, 6, 8] and places(numbers(1)) == [0] and places(numbers(0)) == []
    rows = numbers(4)
    assert len(rows) == 4 and places([rows[-1], rows[-4], rows[3]]) == [7, 0, 7]
    for piece in (slice(1, 3), slice(None, 2), slice(-2, None), slice(None, None, -1), slice(3, 99), slice(9, 12)):
        assert places(rows[piece]) == [0, 2, 5, 7][piece]
    for k in (4, -5, 10):
        with pytest.raises(IndexError):
            rows[k]
    with pytest.raises(IndexError):
        numbers(0)[0]


# --- Without network --------------------------------------------------------------------------------------------------


class NoNetwork:
    """A session each of whose requests fails."""

    def __getattr__(self, name):
        def request(*_, **__):
            raise ConnectionError("no network in this test")

        return request


@pytest.mark.parametrize(
    "flags, named",
    [
        (dict(dataset="t0"), "--dataset t0.*--data-dir assets/samples/t0"),
        (dict(dataset="superni"), "--dataset superni.*--data-dir assets/samples/superni"),
        (dict(dataset="strings", backbone="google/t5-xl-lm-adapt"), "--backbone google/t5-xl-lm-adapt.*tiny"),
    ],
)
def test_no_network(tmp_path, flags, named):
    modules = huggingface_hub.constants, datasets.config
    before = [module.HF_HUB_OFFLINE for module in modules]
    with pytest.MonkeyPatch.context() as patch:  # what a script then switches off is on again for the next test
        for module in modules:
            patch.setattr(module, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        patch.setattr(huggingface_hub.utils._http, "_GLOBAL_CLIENT", NoNetwork())
        begin = time.monotonic()
        said = refusal(train.main, flags | dict(device="cpu", output_dir=str(tmp_path / "run")))
        assert time.monotonic() - begin < 15
        assert [module.HF_HUB_OFFLINE for module in modules] == [True, True]  # asked once, and not again
    assert re.search(named, said), said
    assert not (tmp_path / "run").exists()
    assert [module.HF_HUB_OFFLINE for module in modules] == before


# --- Named sets of layers ---------------------------------------------------------------------------------------------


def t5_names(attention: str, feed_forward: str, cross: bool) -> set[str]:
    """Layers of the tiny T5: two blocks each, feed-forward last."""
    names = set()
    for k in range(2):
        names |= {f"encoder.block.{k}.layer.0.SelfAttention.{x}" for x in attention}
        names |= {f"decoder.block.{k}.layer.0.SelfAttention.{x}" for x in attention}
        names |= {f"decoder.block.{k}.layer.1.EncDecAttention.{x}" for x in attention if cross}
        if feed_forward:
            names |= {f"encoder.block.{k}.layer.1.DenseReluDense.{feed_forward}"}
            names |= {f"decoder.block.{k}.layer.2.DenseReluDense.{feed_forward}"}
    return names


def bart_names(attention: list[str], feed_forward: bool, cross: bool) -> set[str]:
    names = set()
    for k in range(2):
        for coder, kinds in (("encoder", ["self_attn"]), ("decoder", ["self_attn"] + ["encoder_attn"] * cross)):
            layer = f"model.{coder}.layers.{k}"
            names |= {f"{layer}.{kind}.{x}_proj" for kind in kinds for x in attention}
            names |= {f"{layer}.fc1"} if feed_forward else set()
    return names


def llama_names(attention: str, feed_forward: bool) -> set[str]:
    names = {f"model.layers.{k}.self_attn.{x}_proj" for k in range(2) for x in attention}
    return names | ({f"model.layers.{k}.mlp.up_proj" for k in range(2)} if feed_forward else set())


def gpt2_names(*linears: str) -> set[str]:
    return {f"transformer.h.{k}.{x}" for k in range(2) for x in linears}


ALL_OF_BART = ["q", "k", "v", "out"]
NAMED = {
    ("light", "t5"): t5_names("kv", "wi_1", cross=True),
    ("light", "bart"): bart_names(["k", "v"], feed_forward=True, cross=True),
    ("light", "llama"): llama_names("kv", feed_forward=True),
    ("light", "gpt2"): gpt2_names("attn.c_attn", "mlp.c_fc"),
    ("attention", "t5"): t5_names("qkvo", "", cross=True),
    ("attention", "bart"): bart_names(ALL_OF_BART, feed_forward=False, cross=True),
    ("attention", "llama"): llama_names("qkvo", feed_forward=False),
    ("attention", "gpt2"): gpt2_names("attn.c_attn", "attn.c_proj"),
    ("self-attention", "t5"): t5_names("qkvo", "", cross=False),
    ("self-attention", "bart"): bart_names(ALL_OF_BART, feed_forward=False, cross=False),
    ("self-attention", "llama"): llama_names("qkvo", feed_forward=False),
    ("self-attention", "gpt2"): gpt2_names("attn.c_attn", "attn.c_proj"),
}


def adapted_on_meta(kind: str, settings, layers: str, rank: int = 1) -> tuple[list[str], int]:
    """(names of the layers adapted, values of LoRA) in a model that takes no memory."""
    with torch.device("meta"):
        model = helpers.CLASSES[kind](settings)
        names = inject(model, lambda name, linear: LoRALinear(linear, LoRA(rank)), named_layers(layers, kind))
    return names, sum(p.numel() for p in adapter_parameters(model).values())


@pytest.mark.parametrize("layers, kind", NAMED)
def test_named_layers(layers, kind):
    names, _ = adapted_on_meta(kind, helpers.small_config(kind), layers)
    assert len(names) == len(set(names)) and set(names) == NAMED[layers, kind]


def test_light_layers_of_a_t5_without_gate():
    settings = helpers.small_config("t5")
    settings.feed_forward_proj, settings.is_gated_act = "relu", False
    names, _ = adapted_on_meta("t5", settings, "light")
    assert set(names) == t5_names("kv", "wi", cross=True)


def test_named_layers_of_the_recipes_backbones():
    """BART-large and T5-XL v1.1, as the papers count them."""
    bart = BartConfig(
        d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16, decoder_attention_heads=16,
        encoder_ffn_dim=4096, decoder_ffn_dim=4096,
    )  # fmt: skip
    names, values = adapted_on_meta("bart", bart, PRETRAINING["crossfit"]["layers"], PRETRAINING["crossfit"]["rank"])
    assert (len(names), values) == (96, 3_145_728)
    t5 = T5Config(d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=24, feed_forward_proj="gated-gelu")
    names, values = adapted_on_meta("t5", t5, PRETRAINING["superni"]["layers"])
    assert (len(names), values) == (192, 933_888)
