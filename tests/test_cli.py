"""The three scripts from their flags to their folders: what runs write, that they repeat, and how mistakes are told.

Commands run in this process (`command`), as the scripts' last lines do; a few run for themselves, where start-up
time or the exit code matters. The backbone is a random one with one layer of each kind, saved to a folder; every
metric is replaced by a fingerprint of the predictions, so that scores are equal only if all predictions are.
"""

import ast
import dataclasses
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapt
import benchmarks
import data
import evaluate
import recipes
import sft
import train
from baselines import adapter_soup
from baselines.adapter_soup import embed
from benchmarks import crossfit, strings
from inject import adapted_layers, adapter_parameters, merge, read_tensors, routers, task_ids, write_tensors
from methods import build_model, load_run
from plumbing.backbones import load_backbone, tiny_from_scratch
from plumbing.errors import RunError, UserError, exit_on_user_error
from plumbing.flags import explicit_flags
from plumbing.folders import read_config, refuse_other_tasks, write_json
from plumbing.tables import counted
from recipes import FEW_SHOT, FIXED_TABLE, PRETRAINING, ROUTED, VARIANTS
from tests.helpers import (
    change_json, contents, fingerprints_as_metrics, lines_of, read, same_tensors, small_backbone,
)  # fmt: skip
from tools import analyze
from tools.compare import compare

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "train": (train, PRETRAINING, {}),
    "adapt": (adapt, FEW_SHOT, {}),
    "evaluate": (evaluate, {}, evaluate.MOVED),
}

# The small backbone, counted by hand: an encoder layer has 4 attention and 3 feed-forward matrices, a decoder layer 8
# and 3; attention's are 16 x 16, the feed-forward ones 16 x 32 or 32 x 16.
LAYERS = 18
LORA_SIZE = 12 * 2 * (16 + 16) + 6 * 2 * (16 + 32)  # r = 2
SFT_SIZE = 12 * 13 + 6 * 26  # density 5 %, rounded
IA3_SIZE = 6 * 16 + 2 * 32  # keys and values at their output, the second feed-forward layer at its input
FULL_SIZE = 384 * 16 + 12 * 16 * 16 + 6 * 16 * 32 + 2 * 32 * 4 + 7 * 16  # embeddings, layers, positions, norms

SMALL = dict(
    dataset="strings", rank=2, skills=8, batch_size=8, steps=8, max_input=16, max_output=8, eval_examples=2,
    log_every=3, lr=0.05,
)  # fmt: skip
FEW = dict(steps=4, eval_every=2, batch_size=32, shots=8, test_examples=3, lr=0.02, lr_z=0.5)
ADAMW = train.Config(optimizer="adamw", lr=0.01, lr_z=0.5, weight_decay=0.1)
METHODS = {
    "full": dict(method="full", lr=1e-3),
    "lora": dict(method="lora"),
    "ia3": dict(method="ia3"),
    "shared": dict(method="shared"),
    "poly": dict(method="poly"),
    "mhr": dict(method="mhr"),
    "shared-ia3": dict(method="shared", adapter="ia3"),
    "poly-ia3": dict(method="poly", adapter="ia3"),
    "mhr-ia3": dict(method="mhr", adapter="ia3"),
    "shared-sft": dict(method="shared", adapter="sft"),
    "poly-sft": dict(method="poly", adapter="sft", density=0.05),
    "mhr-sft": dict(method="mhr", adapter="sft", density=0.05),
    "private": dict(method="private"),
    "expert": dict(method="expert"),
    "random": dict(method="random"),
    "random-by-task": dict(method="random", random_by="task"),
    "hyperformer": dict(method="hyperformer"),
    "task-moe": dict(method="task-moe"),
    "adapter-soup": dict(method="adapter-soup"),
    "private-ia3": dict(method="private", adapter="ia3"),
    "expert-sft": dict(method="expert", adapter="sft", density=0.05),
    "soup-sft": dict(method="adapter-soup", adapter="sft", density=0.05),
}
SIZES = {  # adapters, Z of 64 training tasks
    "full": (FULL_SIZE, 0),
    "lora": (LORA_SIZE, 0),
    "ia3": (IA3_SIZE, 0),
    "shared": (LORA_SIZE, 0),
    "poly": (8 * LORA_SIZE, 64 * 8 * LAYERS),
    "mhr": (8 * LORA_SIZE, 64 * 8 * 8 * LAYERS),
    "shared-ia3": (IA3_SIZE, 0),
    "poly-ia3": (8 * IA3_SIZE, 64 * 8 * 8),
    "mhr-ia3": (8 * IA3_SIZE, 64 * 8 * 8 * 8),
    "shared-sft": (12 * 26 + 6 * 51, 0),  # a tenth of 16 * 16 and of 16 * 32, rounded
    "poly-sft": (8 * SFT_SIZE, 64 * 8 * LAYERS),
    "mhr-sft": (8 * SFT_SIZE, 64 * 8 * 8 * LAYERS),
    "private": (64 * LORA_SIZE, 0),
    "expert": (8 * LORA_SIZE, 0),
    "random": (8 * LORA_SIZE, 0),
    "random-by-task": (8 * LORA_SIZE, 0),
    "hyperformer": (8 * LORA_SIZE + LAYERS * 2 * (8 * 8 + 8), 64 * 8 * LAYERS),
    "task-moe": (8 * LORA_SIZE, 64 * 8 * LAYERS),
    "adapter-soup": (64 * LORA_SIZE, 0),
    "private-ia3": (64 * IA3_SIZE, 0),
    "expert-sft": (8 * SFT_SIZE, 0),
    "soup-sft": (64 * SFT_SIZE, 0),
}
METHOD = {name: flags["method"] for name, flags in METHODS.items()}
PAIRS = (  # tried by default: every method and every adapter; the other pairs are slow
    "full", "lora", "ia3", "shared-sft", "poly-sft", "mhr", "mhr-ia3", "private-ia3", "expert-sft", "random",
    "random-by-task", "hyperformer", "task-moe", "adapter-soup",
)  # fmt: skip
ADAPTER = {name: flags.get("adapter", "ia3" if name == "ia3" else "lora") for name, flags in METHODS.items()}
OWN = ("private", "adapter-soup")  # methods with an adapter for each training task


def grid(kinds, quick=PAIRS) -> list:
    """Names of METHODS, or tuples that begin with one, as parameters of a test: slow unless the name is in `quick`."""
    each = [kind if isinstance(kind, tuple) else (kind,) for kind in kinds]
    return [pytest.param(*kind, marks=[] if kind[0] in quick else pytest.mark.slow) for kind in each]


def skills_of(name: str) -> int:
    return 64 if METHOD[name] in OWN else 8


def flags_of(name: str, **more) -> dict:
    """Flags of a small pre-training run; methods whose tasks say how many skills there are take no --skills."""
    small = {flag: value for flag, value in SMALL.items() if flag != "skills" or METHOD[name] not in FIXED_TABLE}
    return small | METHODS[name] | more


@pytest.fixture(scope="module", autouse=True)
def strict_metrics():
    with fingerprints_as_metrics() as patch:
        patch.setattr(adapter_soup, "EXAMPLES", 8)  # to save time
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that the runs of this file write."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def backbones(folder) -> list[str]:
    """Two backbones that differ in their embeddings."""
    return [small_backbone(folder / f"backbone{k}", shift=k) for k in (0, 1)]


@pytest.fixture(scope="module")
def two_layers(folder) -> str:
    """A backbone of two encoder and two decoder layers."""
    return small_backbone(folder / "two-layers", layers=2)


@pytest.fixture(scope="module")
def runs(folder, backbones):
    """Pre-training runs by key of METHODS, each made when it is first asked for."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder / f"pretrained-{name}"
            train.main(flags_of(name, backbone=backbones[0], output_dir=str(made[name])))
        return made[name]

    return get


HELD_OUT = [task.name for task in strings.strings().test]


@pytest.fixture(scope="module")
def adapted(folder, runs):
    """Adaptation runs by (method, variant) on the first two held-out tasks, each made when it is first asked for."""
    made = {}

    def get(name: str, variant: str = "all") -> Path:
        if (name, variant) not in made:
            made[name, variant] = folder / f"adapted-{name}-{variant}"
            adapt.main(
                FEW
                | dict(checkpoint=str(runs(name)), variant=variant, tasks=",".join(HELD_OUT[:2]))
                | dict(output_dir=str(made[name, variant]))
                | (dict(lr=1e-3) if (name, variant) == ("full", "all") else {})
            )
        return made[name, variant]

    return get


# --- Flags ------------------------------------------------------------------------------------------------------------


def python(*argv) -> tuple[subprocess.CompletedProcess, float]:
    """Run python in a process of its own: (what it did, its CPU seconds)."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # noqa: E731
    begin = used()
    wide = os.environ | {"COLUMNS": "999"}  # help without line breaks
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120, env=wide)
    return done, used() - begin


GROUPS = {  # of --help: the title of each, and the flag that it begins with
    "train": {
        "what to learn, and on what": "method", "adapter and routing": "adapter", "optimisation": "steps",
        "the run": "seed",
    },
    "adapt": {"what to learn": "checkpoint", "optimisation": "steps", "the run": "test-examples"},
    "evaluate": {"what to score": "checkpoint", "how": "test-examples"},
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_fast_and_complete(script):
    """No torch is loaded; flags stand in groups, each with its metavar or choices and its defaults; examples end it."""
    module, table, _ = SCRIPTS[script]
    done, seconds = python("-X", "importtime", f"{script}.py", "--help")
    assert done.returncode == 0 and seconds < 0.5
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in imported and not imported & {"torch", "transformers", "numpy", "sklearn", "scipy"}

    assert [(title, first) for title, first in re.findall(r"\n\n([\w ,]+):\n  --([\w-]+)", done.stdout)] == list(
        GROUPS[script].items()
    )
    assert re.search(rf"\n\nexamples?:\n(  python {script}\.py --.+\n)+$", done.stdout)
    entries = re.split(r"\n  (?=-)|\n\n", done.stdout)
    for field in dataclasses.fields(module.Config):
        flag = "--" + field.name.replace("_", "-")
        shown = [" ".join(e.split()) for e in entries if re.match(rf"{flag}[ ,\n]", e)]
        if field.metadata.get("setting"):  # of the recipe
            assert shown == []
            continue
        (entry,) = shown
        assert " ".join(field.metadata["help"].split()) in entry
        defaults = {d: r[field.name] for d, r in table.items() if field.name in r}
        words = {d: " ".join(v) if isinstance(v, tuple) else v for d, v in defaults.items()}
        own = "none" if field.default == "" else " ".join(field.default) if field.type is tuple else str(field.default)
        says = [f"{words[d]} ({d})" for d in defaults if isinstance(d, str)]
        says += [f"else {own}"] if says and len(says) < sum(isinstance(d, str) for d in table) else []
        says += ["some methods have their own"] if any(isinstance(d, tuple) for d in defaults) else []
        says = says or [own]
        assert entry.endswith("[required]" if field.name == "checkpoint" else f"[default: {', '.join(says)}]")
        takes = {bool: f", --no-{flag[2:]}", int: " N", float: " X"}.get(field.type, r" [A-Z|m]+")
        choices = field.metadata["choices"]
        takes = f" {{{','.join(choices)}}}" if 0 < len(choices) <= 6 else takes
        assert re.match(f"{flag}{takes} ", entry)
        assert len(choices) <= 6 or f": {', '.join(choices)} [" in entry


@pytest.mark.parametrize("command", ["train.py", "adapt.py", "evaluate.py", "-m tools.compare", "-m tools.show"])
def test_help_fits_80_columns_and_cuts_no_name(monkeypatch, command):
    """Nothing is wider; a line never ends within a flag or another word with hyphens."""
    monkeypatch.setenv("COLUMNS", "80")
    done = subprocess.run([sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("-")]


def refused(script: str, argv: list[str], capsys) -> str:
    """The one line with which a script's command line is refused, with code 2."""
    module, table, moved = SCRIPTS[script]
    with pytest.raises(SystemExit) as end:
        explicit_flags(module.Config, table, argv, moved)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "script, argv, named",
    [
        ("train", ["--nonsense", "3"], "--nonsense"),
        ("train", ["--dataset", "nonsense"], "--dataset"),
        ("adapt", ["--nonsense"], "--nonsense"),
        ("evaluate", ["--beams", "many"], "--beams"),
    ],
)
def test_a_mistaken_flag_is_refused_at_once(script, argv, named):
    done, _ = python("-X", "importtime", f"{script}.py", *argv)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == ""
    assert len(said) == 1 and named in said[0] and "--help" in said[0]
    assert " torch\n" not in done.stderr  # refused before the slow imports


@pytest.mark.parametrize(
    "script, argv, says",
    [
        (
            "train",
            "--warmup 0.1",
            "--warmup is a setting of the recipe, not a flag: set it for the benchmark in recipes.py",
        ),
        ("train", "--optimizer adamw", "--optimizer is a setting of the recipe"),
        ("train", "--top-k=3", "--top-k is a setting of the recipe"),
        ("train", "--epochs 2", "--epochs is a setting of the recipe"),
        ("adapt", "--no-choice-losses", "--choice-losses is a setting of the recipe"),
        ("adapt", "--soup 3", "--soup is a setting of the recipe"),
        ("adapt", "--keep score", "--keep"),
        ("evaluate", "--compare x", "--compare is a command now: python -m tools.compare RUN"),
        ("evaluate", "--memory 16", "--memory is a command now: python -m tools.estimate_memory --backbone NAME"),
        ("evaluate", "--count-parameters", "--count-parameters is a command now: python -m tools.count_parameters"),
    ],
)
def test_a_former_flag_is_refused_with_what_to_do_instead(script, argv, says, capsys):
    assert says in refused(script, argv.split(), capsys)


@pytest.mark.parametrize("script", ["train", "adapt"])
def test_settings_of_the_recipe_are_no_flags(script, capsys):
    """Each is refused on the command line, whatever its value, and has a default or a recipe that sets it."""
    module, table, _ = SCRIPTS[script]
    settings = [field for field in dataclasses.fields(module.Config) if field.metadata.get("setting")]
    assert len(settings) >= 7
    for field in settings:
        flag = "--" + field.name.replace("_", "-")
        assert f"{flag} is a setting of the recipe" in refused(script, [flag, str(field.default)], capsys)


def test_each_script_ends_with_code_2_and_one_sentence():
    """The scripts' own last lines, one after the other in one process: torch takes seconds to import."""
    code = """
import runpy, sys
for argv in (["train.py", "--steps", "-1"], ["adapt.py", "--checkpoint", "no/such/run"], ["evaluate.py"]):
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
        print("no exit")
    except SystemExit as end:
        print(end.code)
"""
    done, _ = python("-c", code)
    assert done.stdout.split() == ["2", "2", "2"]
    said = [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]
    assert len(said) == 3 and all(line.startswith("error: ") for line in said)
    for line, named in zip(said, ("--steps", "no/such/run/config.json", "--checkpoint"), strict=True):
        assert named in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_used(script):
    """A flag that nothing reads is a lie. `cfg` is the name of the settings wherever they are read."""
    module, *_ = SCRIPTS[script]
    of_run = ["methods.py", "scoring.py", "benchmarks/__init__.py", "baselines/adapter_soup.py", "plumbing/run.py"]
    more = {"train": of_run, "adapt": ["train.py", "plumbing/run.py"], "evaluate": []}[script]
    read_fields = {
        node.attr
        for file in (f"{script}.py", *more)
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg"
    }
    assert {field.name for field in dataclasses.fields(module.Config)} <= read_fields


def test_recipes_name_only_settings():
    for table, module in ((PRETRAINING, train), (FEW_SHOT, adapt)):
        names = {field.name for field in dataclasses.fields(module.Config)}
        assert all(set(recipe) <= names for recipe in table.values())


def test_given_flags_win_over_the_recipe_and_the_recipe_over_defaults(runs):
    assert train.make_config(dataset="crossfit").rank == PRETRAINING["crossfit"]["rank"] == 16
    assert train.make_config(dataset="crossfit", rank=3).rank == 3
    assert train.make_config(method="lora").lr == PRETRAINING["strings"]["lr"]
    assert train.make_config(method="full").lr == PRETRAINING["strings", "full"]["lr"] != PRETRAINING["strings"]["lr"]
    assert train.make_config(method="full", lr=0.5).lr == 0.5
    assert train.make_config(steps=0).steps == 0  # given, though it is the default of the class
    assert train.make_config(method="ia3").adapter == "ia3"
    assert train.make_config(method="mhr", seed=4).output_dir == "runs/strings-mhr-4"
    few = adapt.make_config(checkpoint=f"{runs('mhr')}/", variant="mu", lr=0.5)
    assert few.shots == FEW_SHOT["strings"]["shots"] and few.lr == 0.5
    assert few.output_dir == f"{runs('mhr')}-mu"


def test_all_settings_are_printed_at_the_start(runs, folder, backbones, capsys):
    train.main(SMALL | dict(method="lora", steps=1, backbone=backbones[0], output_dir=str(folder / "printed")))
    ignored, *lines = capsys.readouterr().out.splitlines()
    assert ignored == "ignored with --method lora --adapter lora --dataset strings: --skills"
    shown, idle = (
        " ".join(lines),
        ("skills", "heads", "routing", "granularity", "lr_z", "random_by", "top_k", "density"),
    )
    for name, value in read(folder / "printed" / "config.json").items():
        if value and name not in (*idle, "partition"):
            assert f"{name} {value:,}" in shown if type(value) is int else f"{name} {value}" in shown


# --- Pre-training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grid(METHODS))
def test_a_run_writes_its_folder(runs, name):
    run = runs(name)
    saved = {path.name for path in run.iterdir()}
    what = "backbone" if name == "full" else "adapter.safetensors"
    embeddings = {"embeddings.safetensors"} if METHOD[name] == "adapter-soup" else set()
    records = {"config.json", "tasks.json", "log.jsonl", "result.json", "predictions.jsonl", "provenance.json"}
    assert saved == {*records, what} | embeddings

    cfg = train.Config(**read(run / "config.json"))
    assert {field: getattr(cfg, field) for field in flags_of(name)} == flags_of(name)
    assert cfg.skills == skills_of(name)

    tasks = [task.name for task in strings.strings().train]
    known = sorted(strings.OPERATIONS) if METHOD[name] == "expert" else sorted(tasks) if METHOD[name] in OWN else []
    names = read(run / "tasks.json")
    assert names["tasks"] == tasks and sorted(names["skills"]) == known

    log = lines_of(run / "log.jsonl")
    assert [line["step"] for line in log] == [3, 6, 8]
    assert all(line["loss"] > 0 and line["norm"] > 0 and line["seconds"] >= 0 for line in log)
    assert [line["lr"] for line in log] == pytest.approx([cfg.lr * left / 7 for left in (6, 3, 1)])  # warm-up: step 1

    result = read(run / "result.json")
    assert result["steps"] == 8 and result["loss"] == log[-1]["loss"]
    assert list(result["tasks"]) == tasks
    assert result["mean"] == pytest.approx(sum(result["tasks"].values()) / 64)
    assert (result["parameters"]["adapters"], result["parameters"]["routing"]) == SIZES[name]


@pytest.mark.parametrize("name", grid(name for name in METHODS if name != "full"))
def test_the_adapter_file_holds_what_was_trained_and_nothing_else(runs, name):
    tensors = load_file(runs(name) / "adapter.safetensors")
    routing = {key: value for key, value in tensors.items() if key.endswith(".router.Z")}
    fixed = routing if METHOD[name] not in recipes.LEARNED else {}
    trained = {key: value for key, value in tensors.items() if key not in fixed and not key.endswith(".place")}
    z = sum(value.numel() for key, value in trained.items() if key in routing)
    assert (sum(value.numel() for value in trained.values()) - z, z) == SIZES[name]
    start = [key for key in trained if key.endswith({"lora": ".B", "ia3": ".v", "sft": ".value"}[ADAPTER[name]])]
    assert len(start) == (8 if ADAPTER[name] == "ia3" else LAYERS)
    assert all(trained[key].abs().max() > 0 for key in start)  # they start at zero
    if z:
        assert all(value.abs().max() > 1e-3 for value in routing.values())  # all but HyperFormer's start within 1e-3
    else:
        assert len(routing) == (LAYERS if METHOD[name] == "random" else METHOD[name] in FIXED_TABLE)  # one for all


def test_fixed_tables(runs):
    """The tables in the runs' files, compared with a loop over the 64 training tasks."""
    z = {name: [v for k, v in load_file(runs(name) / "adapter.safetensors").items() if k.endswith(".router.Z")]
         for name in ("private", "adapter-soup", "expert", "random", "random-by-task")}  # fmt: skip
    assert torch.equal(z["private"][0], torch.eye(64)) and torch.equal(z["adapter-soup"][0], torch.eye(64))
    names = read(runs("expert") / "tasks.json")["skills"]
    for task, row in zip(strings.strings().train, z["expert"][0].tolist(), strict=True):
        assert [name for name, on in zip(names, row, strict=True) if on] == [n for n in names if n in task.skills]
    assert all(torch.equal(table, torch.ones(64, 8)) for table in z["random"])
    assert all((table.sum(-1) == 4).all() for table in z["random-by-task"])  # half of the skills
    assert all(len(table.unique(dim=0)) > 20 for table in z["random-by-task"])  # drawn for each task, of 70 halves
    assert not torch.equal(*z["random-by-task"][:2])  # and for each layer


@pytest.fixture(scope="module")
def learnt(folder, backbones) -> Path:
    """A run of method full whose loss has fallen."""
    flags = SMALL | dict(method="full", lr=1e-2, steps=90, log_every=30, eval_examples=0, backbone=backbones[0])
    train.main(flags | dict(output_dir=str(folder / "learnt")))
    return folder / "learnt"


def test_training_learns(learnt):
    losses = [line["loss"] for line in lines_of(learnt / "log.jsonl")]
    result = read(learnt / "result.json")
    assert losses[0] > losses[1] > losses[2] == result["loss"] and losses[2] < losses[0] / 2
    assert "mean" not in result and "tasks" not in result


@pytest.mark.parametrize(
    "name", ["full", "mhr", "poly", "lora", "poly-sft", "random", "random-by-task", "hyperformer", "adapter-soup"]
)
def test_the_same_seed_gives_the_same_run(runs, folder, backbones, name):
    torch.manual_seed(12345)  # what went before must not matter
    again = folder / f"again-{name}"
    train.main(flags_of(name, backbone=backbones[0], output_dir=str(again)))
    saved = "backbone/model.safetensors" if name == "full" else "adapter.safetensors"
    assert same_tensors(runs(name) / saved, again / saved)
    timeless = [[line | {"seconds": 0} for line in lines_of(run / "log.jsonl")] for run in (runs(name), again)]
    assert timeless[0] == timeless[1]
    assert read(runs(name) / "result.json")["tasks"] == read(again / "result.json")["tasks"]


@pytest.mark.parametrize("name", ["full", "mhr"])
def test_another_seed_gives_another_run(runs, folder, backbones, name):
    other = folder / f"other-{name}"
    train.main(SMALL | METHODS[name] | dict(backbone=backbones[0], output_dir=str(other), seed=1))
    saved = "backbone/model.safetensors" if name == "full" else "adapter.safetensors"
    assert not same_tensors(runs(name) / saved, other / saved)
    assert lines_of(runs(name) / "log.jsonl")[0]["loss"] != lines_of(other / "log.jsonl")[0]["loss"]


@pytest.mark.parametrize("name", ["full", "mhr"])
def test_keep_every_saves_what_was_trained_then_and_changes_nothing(runs, folder, backbones, name):
    """--keep-every 4 of 8 steps saves two files; the last one equals the end, which is that of a run without it."""
    run, file = folder / f"every-{name}", "backbone{}/model.safetensors" if name == "full" else "adapter{}.safetensors"
    steps = SMALL["steps"]
    train.main(flags_of(name, backbone=backbones[0], output_dir=str(run), keep_every=steps // 2))
    assert same_tensors(runs(name) / file.format(""), run / file.format(""))
    assert same_tensors(run / file.format(""), run / file.format(f"-{steps}"))
    assert not same_tensors(run / file.format(""), run / file.format(f"-{steps // 2}"))
    assert len(list(run.glob(file.format("-*")))) == 2 and not list(runs(name).glob(file.format("-*")))


def test_gradient_checkpointing_changes_no_result(runs, folder, backbones):
    """The layers run twice in a step, with the same losses."""
    flags = SMALL | dict(method="mhr", routing="sigmoid", steps=3, log_every=1, eval_examples=0, backbone=backbones[0])
    train.main(flags | dict(output_dir=str(folder / "plain")))
    train.main(flags | dict(output_dir=str(folder / "checkpointed"), checkpointing=True))
    plain, checkpointed = (
        [line["loss"] for line in lines_of(folder / name / "log.jsonl")] for name in ("plain", "checkpointed")
    )
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def build(method: str, backbone: str):
    return build_model(train.make_config(dataset="strings", method=method, backbone=backbone), tasks=5)[0]


@pytest.mark.parametrize("method", ["mhr", "hyperformer"])
def test_two_learning_rates_and_no_decay_of_z(backbones, method):
    """HyperFormer's network, which all tasks share, is no Z."""
    model = build(method, backbones[0])
    optimizer = train.make_optimizer(model, ADAMW)
    rest, z = optimizer.param_groups
    assert (rest["lr"], rest["weight_decay"], z["lr"], z["weight_decay"]) == (0.01, 0.1, 0.5, 0.0)
    assert {id(p) for p in z["params"]} == {id(router.Z) for router in routers(model)}
    assert len(z["params"]) == LAYERS
    both = [id(p) for p in rest["params"] + z["params"]]
    assert len(both) == len(set(both))
    assert set(both) == {id(p) for p in adapter_parameters(model).values()}

    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    for p in rest["params"] + z["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # no gradient: only decay moves anything
    for name, p in adapter_parameters(model).items():
        expected = before[name] if name.endswith(".Z") else before[name] * (1 - 0.01 * 0.1)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_without_routers_there_is_one_group(backbones):
    model = build("lora", backbones[0])
    (group,) = train.make_optimizer(model, ADAMW).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    model = build("mhr", backbones[0])
    for name, p in adapter_parameters(model).items():
        p.requires_grad_(name.endswith(".Z"))
    (group,) = train.make_optimizer(model, ADAMW).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)


def test_warmup_then_decay():
    values = [train.warmup_then_decay(step, 10, 0.2) for step in range(11)]
    assert values == pytest.approx([1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert [train.warmup_then_decay(step, 4, 0.0) for step in range(4)] == pytest.approx([1, 1, 2 / 3, 1 / 3])
    assert [train.warmup_then_decay(step, 4, 1.0) for step in range(4)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert train.warmup_then_decay(0, 1, 0.06) == 1
    assert all(0 < train.warmup_then_decay(step, 37, 0.06) <= 1 for step in range(37))


@pytest.mark.parametrize("name", ["lora", "mhr"])
def test_the_backbone_stays_frozen(backbones, name):
    model = build(name, backbones[0])
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model)) != set()


@pytest.mark.parametrize(
    "granularity, number",
    [("linear", 2 * LAYERS), ("layer", 10), ("block", 4), ("blocks-2", 2), ("coder", 2), ("model", 1)],
)
def test_granularity(folder, two_layers, capsys, granularity, number):
    """The number of routers of two encoder and two decoder layers, as printed, as saved, and as adapted."""
    run, few = folder / f"shared-{granularity}", folder / f"shared-{granularity}-few"
    flags = dict(granularity=granularity, backbone=two_layers, steps=2, eval_examples=0, output_dir=str(run))
    train.main(flags_of("poly", **flags))
    said = f"adapters {16 * LORA_SIZE:,}, routing {64 * 8 * number:,}; {counted(number, 'router')}\n"
    assert said in capsys.readouterr().out
    assert sum(key.endswith(".router.Z") for key in load_file(run / "adapter.safetensors")) == number
    result = adapt.main(FEW | dict(checkpoint=str(run), tasks=HELD_OUT[0], output_dir=str(few), variant="z"))
    assert result["parameters"] == {"adapters": 0, "routing": 8 * number}
    assert evaluate.evaluate(evaluate.Config(checkpoint=str(few))) == result["tasks"]


def test_the_window_is_that_of_the_batches(folder, monkeypatch):
    given, batches = [], data.batches
    monkeypatch.setattr(data, "batches", lambda *args, **more: given.append(args[4:]) or batches(*args, **more))
    train.main(flags_of("lora", window=3, steps=1, eval_examples=0, output_dir=str(folder / "window")))
    assert (3,) in given


@pytest.mark.parametrize("name", ["hyperformer", "random", "private"])
def test_granularity_of_the_others(folder, two_layers, name):
    """Routers that hold more than a Z, or that adaptation replaces. A fixed table is shared by all layers anyway."""
    run, few = folder / f"shared-{name}", folder / f"shared-{name}-few"
    flags = dict(granularity="block", backbone=two_layers, steps=2, eval_examples=0, output_dir=str(run))
    train.main(flags_of(name, **flags))
    leaves = [key.rsplit(".", 1)[1] for key in load_file(run / "adapter.safetensors")]
    assert leaves.count("Z") == (1 if name == "private" else 4)
    assert leaves.count("bias") == leaves.count("weight") == (8 if name == "hyperformer" else 0)
    result = adapt.main(FEW | dict(checkpoint=str(run), tasks=HELD_OUT[0], output_dir=str(few)))
    assert evaluate.evaluate(evaluate.Config(checkpoint=str(few))) == result["tasks"]


# --- Adaptation -------------------------------------------------------------------------------------------------------

ADAPTED = [(name, variant) for variant, fits in VARIANTS.items() for name in METHODS if METHOD[name] in fits]
LEARNED = [name for name in METHODS if METHOD[name] in recipes.LEARNED]


@pytest.mark.parametrize("name, variant", grid(ADAPTED))
def test_an_adaptation_writes_its_folder(runs, adapted, name, variant):
    checkpoint = contents(runs(name))
    run = adapted(name, variant)
    assert contents(runs(name)) == checkpoint  # it only reads the pre-training run
    suffix = "" if (name, variant) == ("full", "all") else ".safetensors"
    examples = {"predictions.jsonl", "before.predictions.jsonl"}
    records = {"config.json", "log.jsonl", "result.json", "provenance.json", *examples}
    assert {path.name for path in run.iterdir()} == {*records, "0"}
    saved = {f"{task}{end}" for task in HELD_OUT[:2] for end in (suffix, ".json")}
    assert {path.name for path in (run / "0").iterdir()} == saved

    result = read(run / "result.json")
    assert list(result["tasks"]) == list(result["before"]) == list(result["splits"]["0"]["stops"]) == HELD_OUT[:2]
    assert result["mean"] == pytest.approx(sum(result["tasks"].values()) / 2)
    assert result["mean_before"] == pytest.approx(sum(result["before"].values()) / 2)
    log = lines_of(run / "log.jsonl")
    assert [(line["task"], line["step"]) for line in log] == [(task, step) for task in HELD_OUT[:2] for step in (2, 4)]
    for task, stop in result["splits"]["0"]["stops"].items():
        seen = {line["step"]: line["dev_loss"] for line in log if line["task"] == task}
        assert stop["stopped"] == 4 and stop["best_step"] in (0, 2, 4)
        assert (
            stop["dev_loss"] <= min(seen.values()) and seen.get(stop["best_step"], stop["dev_loss"]) == stop["dev_loss"]
        )


@pytest.mark.parametrize("name, variant", grid(ADAPTED))
def test_what_is_trained(runs, adapted, name, variant):
    """Parameter counts: all with one row of Z, Z alone, or one adapter (an average of SFTs has all of their places)."""
    adapters, z = SIZES[name]
    averaged = variant == "mu" or METHOD[name] == "adapter-soup"
    if averaged and ADAPTER[name] == "sft":
        chosen = range(skills_of(name)) if variant == "mu" else nearest(runs(name), strings.strings().test[0], 5)
        places = [v for k, v in load_file(runs(name) / "adapter.safetensors").items() if k.endswith(".place")]
        expected = sum(len(place[list(chosen)].unique()) for place in places), 0
        assert expected[0] <= len(chosen) * SFT_SIZE
    elif averaged or METHOD[name] == "private":
        expected = {"lora": LORA_SIZE, "ia3": IA3_SIZE}[ADAPTER[name]], 0
    else:
        expected = {"all": (adapters, z // 64), "z": (0, z // 64), "lora": (LORA_SIZE, 0)}[variant]
    counts = read(adapted(name, variant) / "result.json")["parameters"]
    assert (counts["adapters"], counts["routing"]) == expected


@pytest.mark.parametrize("name", grid(LEARNED))
def test_z_changes_nothing_but_z(runs, adapted, name):
    before = load_file(runs(name) / "adapter.safetensors")
    after = [load_file(adapted(name, "z") / f"0/{task}.safetensors") for task in HELD_OUT[:2]]
    stops = read(adapted(name, "z") / "result.json")["splits"]["0"]["stops"]
    for tensors, task in zip(after, HELD_OUT, strict=False):
        assert tensors.keys() == before.keys()
        for key, value in tensors.items():
            if key.endswith(".router.Z"):
                assert value.shape == (1, *before[key].shape[1:])
                assert stops[task]["best_step"] == 0 or value.abs().max() > 1e-3  # it has left its start
            else:
                assert torch.equal(value, before[key]), key
    assert max(stop["best_step"] for stop in stops.values()) > 0
    assert any(not torch.equal(after[0][key], after[1][key]) for key in before)


def layers_off(tensors: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """The routers of a HyperFormer of which no hidden unit is on: no gradient passes to what is before the ReLU."""
    routers = [key.removesuffix("hidden.bias") for key in tensors if key.endswith(".hidden.bias")]
    hidden = {r: tensors[r + "Z"] @ tensors[r + "hidden.weight"].T + tensors[r + "hidden.bias"] for r in routers}
    off = [r for r, values in hidden.items() if not bool((values > 0).any())]
    return tuple(r + rest for r in off for rest in ("hidden", "last.weight"))


@pytest.mark.parametrize("name", grid(n for n in METHODS if METHOD[n] in ROUTED and METHOD[n] not in OWN))
def test_all_changes_skills_and_z(runs, adapted, name):
    """But not the places of an SFT, nor the routing that is fixed: see `test_expert`."""
    before = load_file(runs(name) / "adapter.safetensors")
    best = read(adapted(name) / "result.json")["splits"]["0"]["stops"]
    task = max(best, key=lambda task: best[task]["best_step"])
    assert best[task]["best_step"] > 0
    after = load_file(adapted(name) / f"0/{task}.safetensors")
    places = [key for key in before if key.endswith(".place")]
    off = layers_off(after)
    assert len(off) / 2 <= LAYERS / 10  # one of 256 has none of 8 units on
    skills = [key for key in before if not key.endswith((".place", ".router.Z")) and not key.startswith(off)]
    assert before.keys() == after.keys() and all(not torch.equal(before[key], after[key]) for key in skills)
    assert all(torch.equal(before[key], after[key]) for key in places) and bool(places) == (ADAPTER[name] == "sft")


@pytest.mark.parametrize(
    "name, variant",
    grid((n, v) for n, v in ADAPTED if ADAPTER[n] == "lora" and (v in ("mu", "lora") or METHOD[n] in OWN)),
)
def test_what_is_one_adapter_is_of_the_lora_kind(runs, adapted, name, variant):
    lora = load_file(runs("lora") / "adapter.safetensors")
    one = load_file(adapted(name, variant) / f"0/{HELD_OUT[0]}.safetensors")
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in lora.items()}


WORSE = dict(steps=50, eval_every=1, patience=3, lr=1e6, lr_z=1e6, clip=1e9, warmup=0.0)


@pytest.mark.parametrize("name, variant", [("mhr", "all"), ("mhr", "mu"), ("lora", "all")])
def test_a_task_that_only_gets_worse_keeps_its_start(learnt, folder, name, variant):
    base, run, task = folder / f"base-{name}-{variant}", folder / f"worse-{name}-{variant}", HELD_OUT[2]
    flags = SMALL | METHODS[name] | dict(steps=1, lr=1e-4, eval_examples=0, backbone=str(learnt / "backbone"))
    train.main(flags | dict(output_dir=str(base)))
    flags = FEW | WORSE | dict(checkpoint=str(base), variant=variant, tasks=task, output_dir=str(run))
    result = adapt.main(flags)
    stop = result["splits"]["0"]["stops"][task]
    dev = [line["dev_loss"] for line in lines_of(run / "log.jsonl")]
    assert not any(loss < stop["dev_loss"] for loss in dev)  # so it did get worse
    assert (stop["best_step"], stop["stopped"]) == (0, 3)  # patience x eval_every
    assert result["before"] == result["tasks"]
    start, saved = load_file(base / "adapter.safetensors"), load_file(run / f"0/{task}.safetensors")
    for key, value in saved.items():
        if key.endswith(".router.Z"):
            assert value.abs().max() <= 1e-3  # a fresh row
        elif variant == "mu":
            torch.testing.assert_close(value, start[key.replace(".params.", ".inventory.")].mean(0), rtol=0, atol=1e-7)
        else:
            assert torch.equal(value, start[key])


@pytest.mark.parametrize(
    "losses, best_step, stopped",
    [
        ([5, 4, 3, 2, 1], 8, 8),  # better at every look: the last values
        ([5, 4, 6, 3, 7], 6, 8),
        ([5, 6, 7, 8, 9], 0, 4),  # two looks without a lower loss: stop
        ([5, 4, 4, 4, 1], 2, 6),  # as low is not lower
        ([5, 6, 4, 7, 3], 8, 8),
    ],
)
def test_early_stopping_keeps_the_values_of_the_lowest_dev_loss(runs, monkeypatch, losses, best_step, stopped):
    model, tokenizer = load_run(runs("lora"), train.run_config(str(runs("lora"))))
    task = strings.strings().test[0]
    seen, log = [], []

    def dev_loss(model, *_):
        seen.append({name: p.detach().clone() for name, p in adapter_parameters(model).items()})
        return float(losses[len(seen) - 1])

    monkeypatch.setattr(train, "mean_loss", dev_loss)
    cfg = adapt.Config(steps=8, eval_every=2, patience=2, batch_size=4, lr=0.01)
    stop = adapt.adapt_task(model, tokenizer, task, (16, 8), cfg, SimpleNamespace(write=log.append))
    assert (stop["best_step"], stop["stopped"]) == (best_step, stopped)
    assert stop["dev_loss"] == losses[best_step // 2]
    assert len(seen) == 1 + stopped // 2 and len(log) == stopped // 2
    at_the_end, best = adapter_parameters(model), seen[best_step // 2]
    assert all(torch.equal(at_the_end[name], best[name]) for name in best)
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in best)


def test_dev_loss_is_per_example_and_without_noise(runs):
    base = train.run_config(str(runs("mhr")))
    model, tokenizer = load_run(runs("mhr"), base)
    adapt.prepare(model, base, adapt.Config())
    task = strings.strings().test[1]
    model.train()
    items = [data.Item(0, e, e.outputs[0]) for e in task.dev]
    losses = [train.mean_loss(model, tokenizer, items, (16, 8), size) for size in (1, 32)]
    assert losses[1] == train.mean_loss(model, tokenizer, items, (16, 8), 32)
    assert model.training and all(p.grad is None for p in model.parameters())
    # with batches of one it is the plain mean of the examples' losses
    model.eval()
    with torch.no_grad(), task_ids([0]):
        alone = [train.batch_loss(model, tokenizer, [data.Item(0, e, e.outputs[0])], 16, 8).item() for e in task.dev]
    assert losses[0] == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    "name, variant",
    [(n, "all") for n in ("mhr", "lora", "full", "expert", "private", "adapter-soup", "soup-sft", "random")]
    + [("poly", "z"), ("hyperformer", "z"), ("mhr", "mu"), ("full", "lora")],
)
def test_every_task_starts_from_the_checkpoint(runs, adapted, folder, name, variant):
    """The second task of a list has the same result as alone."""
    together, alone, task = adapted(name, variant), folder / f"alone-{name}-{variant}", HELD_OUT[1]
    flags = FEW | dict(checkpoint=str(runs(name)), variant=variant, tasks=task, output_dir=str(alone))
    adapt.main(flags | (dict(lr=1e-3) if (name, variant) == ("full", "all") else {}))
    one, both = read(alone / "result.json"), read(together / "result.json")
    assert one["splits"]["0"]["stops"][task] == both["splits"]["0"]["stops"][task]
    assert one["tasks"][task] == both["tasks"][task]
    saved = f"0/{task}/model.safetensors" if (name, variant) == ("full", "all") else f"0/{task}.safetensors"
    assert same_tensors(alone / saved, together / saved)


def test_another_adaptation_seed_gives_another_run(runs, adapted, folder):
    other = folder / "adapted-seed-1"
    flags = FEW | dict(checkpoint=str(runs("mhr")), tasks=HELD_OUT[0], output_dir=str(other), seed=1)
    adapt.main(flags)
    assert not same_tensors(other / f"0/{HELD_OUT[0]}.safetensors", adapted("mhr") / f"0/{HELD_OUT[0]}.safetensors")


def test_few_shot_draws_by_the_seed():
    task = strings.strings().test[0]
    draw = lambda shots, seed=0: benchmarks.few_shot([task], "0", shots, seed)[0].train  # noqa: E731
    assert len(draw(5)) == 5 and set(draw(5)) < set(task.train) and len(set(draw(5))) == 5
    assert draw(5) == draw(5) != draw(5, seed=1)
    assert draw(5) != task.train[:5]  # official files are sorted by label
    assert sorted(draw(0)) == sorted(draw(99)) == sorted(task.train)
    (whole,) = benchmarks.few_shot([task], "0", 5, 0)
    assert whole.dev == task.dev and whole.test == task.test


def test_choosing_tasks():
    benchmark = strings.strings()
    assert benchmarks.held_out(benchmark, "all") == benchmark.test
    assert benchmarks.held_out(benchmark, "dev") == benchmark.dev
    names = [benchmark.test[3].name, benchmark.dev[1].name]
    assert [task.name for task in benchmarks.held_out(benchmark, ",".join(names))] == names


def test_weights_that_a_config_does_not_use_are_told(tmp_path, capsys):
    """A config.json with fewer layers than the file of weights: a note. With more: refused, they would be random."""
    small_backbone(tmp_path / "cut", layers=2)
    path = tmp_path / "cut" / "config.json"
    for layers, told in ((2, False), (1, True)):
        change_json(path, num_decoder_layers=layers)
        load_backbone(str(tmp_path / "cut"), "cpu")
        assert ("of its weights are not used, as decoder.block.1." in capsys.readouterr().out) == told
    change_json(path, num_decoder_layers=3)
    with pytest.raises(UserError, match="its file has no decoder.block.2"):
        load_backbone(str(tmp_path / "cut"), "cpu")


def test_a_folder_with_a_gguf_file_alone(tmp_path, monkeypatch):
    """All three loaders get the file's name. The model is no longer marked as quantised, because save_pretrained would
    refuse it. A folder with a config.json is an ordinary one."""
    calls, cleared = [], []
    model = nn.Linear(1, 1)
    model.hf_quantizer = SimpleNamespace(remove_quantization_config=cleared.append)

    def loader(kind, result):
        monkeypatch.setattr(
            f"plumbing.backbones.{kind}.from_pretrained", lambda source, **o: calls.append((kind, source, o)) or result
        )

    loader("AutoConfig", LlamaConfig())
    loader("AutoModelForCausalLM", (model, {"missing_keys": set()}))
    loader("AutoTokenizer", "tokenizer")
    (tmp_path / "model.Q4.gguf").touch()
    assert load_backbone(str(tmp_path), "cpu")[1] == "tokenizer"
    assert cleared == [model]
    assert [(kind, options.get("gguf_file")) for kind, _, options in calls] == [
        (kind, "model.Q4.gguf") for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    ]
    (tmp_path / "config.json").touch()
    calls.clear()
    load_backbone(str(tmp_path), "cpu")
    assert len(calls) == 3 and not any("gguf_file" in options for _, _, options in calls)


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_backbones_run_no_code(tmp_path, backbones):
    """Neither the code in a folder, nor a pickle in place of its weights; each is refused in one sentence."""
    sign, code, weights = tmp_path / "it ran", tmp_path / "code", tmp_path / "weights"
    for folder in (code, weights):
        shutil.copytree(backbones[0], folder)
    remote = {"auto_map": {n: f"mine.{n}" for n in ("AutoConfig", "AutoModelForSeq2SeqLM")}, "model_type": "mine"}
    change_json(code / "config.json", **remote)
    (code / "mine.py").write_text(f"open({str(sign)!r}, 'w')")
    with pytest.raises(UserError, match="asks to run code of its own, which is never allowed here"):
        load_backbone(str(code), "cpu")
    (weights / "model.safetensors").unlink()
    torch.save({"shared.weight": Hostile(sign)}, weights / "pytorch_model.bin")
    with pytest.raises(UserError, match="--backbone .* cannot be loaded"):
        load_backbone(str(weights), "cpu")
    assert not sign.exists()


NO_MEMORY = (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 GB"))


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", [(nn.Module, "to"), (AutoModelForSeq2SeqLM, "from_pretrained")])
def test_a_backbone_larger_than_memory(backbones, monkeypatch, where, error):
    """A RunError that says what to do: the backbone's files are in order."""

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(*where, full)
    with pytest.raises(RunError, match="not enough memory to load --backbone .*: use one that is smaller"):
        load_backbone(backbones[0], "cpu")


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8])
def test_weights_stored_as_integers_are_refused(tmp_path, backbones, kind):
    shutil.copytree(backbones[0], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["decoder.final_layer_norm.weight"] = weights["decoder.final_layer_norm.weight"].to(kind)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded: its decoder.final_layer_norm.weight is stored as [IU]"):
        load_backbone(str(path.parent), "cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_are_not_finite_are_refused(tmp_path, backbones, value, precision):
    shutil.copytree(backbones[0], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["decoder.final_layer_norm.weight"][3] = value
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        UserError, match="cannot be loaded: its decoder.final_layer_norm.weight has values that are not finite"
    ):
        load_backbone(str(path.parent), "cpu", precision)


@pytest.mark.parametrize(
    "change",
    [dict(d_model="wide"), dict(num_layers=4), dict(d_model=17), dict(model_type="nothing"), dict(vocab_size=None)],
    ids=str,
)
def test_broken_backbone_configs_are_one_sentence(tmp_path, backbones, change):
    shutil.copytree(backbones[0], tmp_path / "broken")
    path = tmp_path / "broken" / "config.json"
    change_json(path, **change)
    with pytest.raises(UserError, match="--backbone .*broken cannot be loaded: .*bundled"):
        load_backbone(str(path.parent), "cpu")


def test_a_run_on_the_untrained_backbone_can_be_adapted_and_scored(folder):
    """--backbone scratch is drawn anew in each process: it must be the same one that was trained on."""
    run, few = folder / "scratch", folder / "scratch-few"
    train.main(SMALL | METHODS["mhr"] | dict(backbone="scratch", output_dir=str(run), steps=2, eval_examples=0))
    torch.manual_seed(99)
    result = adapt.main(FEW | dict(checkpoint=str(run), tasks=HELD_OUT[0], output_dir=str(few), seed=3))
    torch.manual_seed(98)
    assert evaluate.evaluate(evaluate.Config(checkpoint=str(few))) == result["tasks"]


# --- Where a new task starts under the baselines ----------------------------------------------------------------------


def few_of(task: data.Task) -> data.Task:
    """A task with the few examples that the runs of this file adapt to."""
    return benchmarks.few_shot([task], "0", FEW["shots"], 0)[0]


def begun(run: Path, task: data.Task, variant: str = "all", change=lambda model: None, **flags) -> nn.Module:
    """The model with which a task's adaptation starts. change: done to the run's model before that."""
    cfg = adapt.Config(checkpoint=str(run), variant=variant, shots=FEW["shots"], **flags)
    base = adapt.base_config(cfg)
    model, _ = load_run(run, base)
    change(model)
    torch.manual_seed(0)
    adapt.prepare(model, base, cfg)(few_of(task))
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, task: int = 0) -> torch.Tensor:
    """Logits for two inputs of bytes under a task id."""
    x = torch.arange(10, 26).view(2, 8)
    with task_ids([task, task]):
        return model(input_ids=x, labels=x + 1).logits


def nearest(run: Path, task: data.Task, n: int) -> list[int]:
    """The n training tasks that are most like a new one with its few examples, by a loop over cosines."""
    encoder, tokenizer = load_backbone(read(run / "config.json")["backbone"], "cpu")
    new, known = embed(encoder, tokenizer, few_of(task), SMALL["max_input"]), load_file(run / "embeddings.safetensors")
    cosines = [(new @ row / (new.norm() * row.norm())).item() for row in known["embeddings"]]
    return sorted(range(len(cosines)), key=lambda k: -cosines[k])[:n]


def test_expert(runs, adapted):
    """A new task uses the skills that the table assigns; its row of Z is not trained."""
    names = read(runs("expert") / "tasks.json")["skills"]
    for task in strings.strings().test[:2]:
        expected = torch.tensor([[float(name in task.skills) for name in names]])
        saved = load_file(adapted("expert") / f"0/{task.name}.safetensors")
        assert all(torch.equal(value, expected) for key, value in saved.items() if key.endswith(".Z"))
        assert all(torch.equal(router.Z, expected) for router in routers(begun(runs("expert"), task)))
    one, other = strings.strings().test[:2]
    assert not torch.equal(outputs(begun(runs("expert"), one)), outputs(begun(runs("expert"), other)))
    unknown = begun(runs("expert"), dataclasses.replace(one, skills=("translate",)))
    torch.testing.assert_close(outputs(unknown), outputs(begun(runs("expert"), one, "mu")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["random", "random-by-task"])
def test_random(runs, name):
    """A new task mixes all skills alike, as mu does, also in training: nothing is drawn."""
    task = strings.strings().test[0]
    model = begun(runs(name), task).train()
    expected = outputs(begun(runs(name), task, "mu"))
    for _ in range(2):
        torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(router.Z, torch.ones(1, 8)) for router in routers(model))


@pytest.mark.parametrize("name", ["private", "private-ia3"])
def test_private(runs, backbones, name):
    """A new task starts from the backbone, whatever the adapters of the training tasks have become."""
    task = strings.strings().test[0]
    one, other = (adapter_parameters(begun(runs(name), task, change=change)) for change in (lambda model: None, spoil))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(outputs(begun(runs(name), task)), outputs(load_backbone(backbones[0], "cpu")[0].eval()))
    assert not torch.equal(outputs(begun(runs(name), task, "mu")), outputs(begun(runs(name), task)))


@torch.no_grad()
def spoil(model: nn.Module):
    for p in adapter_parameters(model).values():
        p.add_(1)


@pytest.mark.parametrize("name, n", [("adapter-soup", 1), ("adapter-soup", 5), ("soup-sft", 1), ("soup-sft", 3)])
def test_adapter_soup_starts_at_an_average(runs, name, n):
    """The average of the adapters of the n most similar training tasks; for n = 1 the model of that task."""
    task, saved = strings.strings().test[1], load_file(runs(name) / "adapter.safetensors")
    model, chosen = begun(runs(name), task, soup=n), nearest(runs(name), task, n)
    for layer, module in adapted_layers(model).items():
        skills = {key: saved[f"{layer}.inventory.{key}"][chosen] for key in module.params}
        if ADAPTER[name] == "sft":
            D = sft.dense(**module.params, size=tuple(module.weight.shape))
            each = zip(skills["value"], skills["place"], strict=True)
            torch.testing.assert_close(D, sum(sft.dense(v, p, D.shape) for v, p in each) / n)
        else:
            assert all(torch.allclose(module.params[key], p.mean(0), atol=1e-7) for key, p in skills.items())
    if n == 1:
        whole = load_run(runs(name), train.run_config(str(runs(name))))[0].eval()
        merge(whole, chosen[0])
        torch.testing.assert_close(outputs(model), outputs(whole), rtol=1e-4, atol=1e-4)


def test_adapter_soup_of_all_tasks_is_mu(runs):
    task = strings.strings().test[0]
    everything, mu = begun(runs("adapter-soup"), task, soup=999), begun(runs("adapter-soup"), task, "mu")
    torch.testing.assert_close(outputs(everything), outputs(mu), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "llama"])
@torch.no_grad()
def test_the_embedding_of_a_task_by_a_loop(backbones, llama, monkeypatch, kind):
    """The mean over tokens, then over inputs, computed without padding, one input at a time. At most EXAMPLES inputs
    count, evenly spaced over the task. Inputs of 13 bytes are cut to 12 tokens."""
    encoder, tokenizer = load_backbone(llama if kind == "llama" else backbones[0], "cpu")
    body = encoder.model if kind == "llama" else encoder.encoder
    task = dataclasses.replace(strings.strings().test[0], train=strings.strings().test[0].train[:10])
    monkeypatch.setattr(adapter_soup, "EXAMPLES", 4)
    rows = [tokenizer(e.input, truncation=True, max_length=12).input_ids for e in task.train[::3]]
    assert len(rows) == 4 and len({len(row) for row in rows}) > 1 and max(len(row) for row in rows) == 12
    expected = sum(body(torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows) / 4
    torch.testing.assert_close(embed(encoder, tokenizer, task, 12, batch_size=3), expected, rtol=1e-4, atol=1e-5)


def test_another_model_may_embed_the_tasks(folder, backbones, llama):
    run, few = folder / "encoder", folder / "encoder-few"
    flags = flags_of("adapter-soup", backbone=backbones[0], encoder=llama, steps=1, eval_examples=0)
    train.main(flags | dict(output_dir=str(run)))
    assert load_file(run / "embeddings.safetensors")["embeddings"].shape == (64, 32)
    result = adapt.main(FEW | dict(checkpoint=str(run), tasks=HELD_OUT[0], output_dir=str(few)))
    assert evaluate.evaluate(evaluate.Config(checkpoint=str(few))) == result["tasks"]


def test_lora_on_a_full_run(runs, adapted, folder):
    """It starts as the fine-tuned backbone, is saved without the backbone, and is a LoRA whatever --adapter said."""
    few, whole = read(adapted("full", "lora") / "result.json"), read(adapted("full") / "result.json")
    assert few["before"] == whole["before"] and few["parameters"] == {"adapters": LORA_SIZE, "routing": 0}
    saved = adapted("full", "lora") / f"0/{HELD_OUT[0]}.safetensors"
    assert saved.stat().st_size < 0.5 * (runs("full") / "backbone/model.safetensors").stat().st_size
    odd = folder / "full-ia3"
    shutil.copytree(runs("full"), odd)
    change_json(odd / "config.json", adapter="ia3")
    own = adapter_parameters(begun(odd, strings.strings().test[0], "lora"))
    assert {key.rsplit(".", 1)[1] for key in own} == {"A", "B"}


@pytest.mark.parametrize(
    "name",
    grid(["private", "poly-sft", "soup-sft", "expert", "random", "hyperformer"], quick=("poly-sft", "hyperformer")),
)
def test_mu_of_every_kind_continues(runs, folder, name):
    """One adapter, the average of all: saved, loaded, trained on and adapted, though SFTs then have more places."""
    run, more, few = (folder / f"mu-{name}{part}" for part in ("", "-more", "-few"))
    flags = dict(from_run=str(runs(name)), method="mu", steps=1, output_dir=str(run))
    result = train.main(flags | dict(lr=5e-324))  # above 0, as the flags demand, but 0 as a float32
    assert evaluate.evaluate(evaluate.Config(checkpoint=str(run), test_examples=2)) == result["tasks"]
    task = strings.strings().test[0]
    torch.testing.assert_close(outputs(begun(run, task)), outputs(begun(runs(name), task, "mu")), rtol=1e-4, atol=1e-4)
    train.main(dict(from_run=str(run), steps=1, lr=0.05, output_dir=str(more)))
    one, other = load_file(run / "adapter.safetensors"), load_file(more / "adapter.safetensors")
    assert {key: p.shape for key, p in one.items()} == {key: p.shape for key, p in other.items()}
    assert all(torch.equal(p, other[key]) == key.endswith(".place") for key, p in one.items())
    result = adapt.main(FEW | dict(checkpoint=str(more), tasks=HELD_OUT[0], output_dir=str(few)))
    assert evaluate.evaluate(evaluate.Config(checkpoint=str(few))) == result["tasks"]


# --- Scoring again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, variant", grid(ADAPTED))
def test_scoring_an_adaptation_again_gives_its_scores(adapted, capsys, tmp_path, name, variant):
    torch.manual_seed(777)  # there is nothing random in scoring
    run = adapted(name, variant)
    capsys.readouterr()
    cfg = evaluate.Config(checkpoint=str(run), save=str(tmp_path / "again.json"))
    assert evaluate.evaluate(cfg) == read(run / "result.json")["tasks"]
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"  (exact )?\d+\.\d$", line)]
    assert [line.split()[0] for line in lines] == [*HELD_OUT[:2], "mean"]


Z_OF_64 = 64 * 8  # of one layer
OTHER_PAIRS = {  # (method, adapter): parameters in pre-training; what METHODS above does not have
    ("private", "sft"): (64 * SFT_SIZE, 0),
    ("expert", "ia3"): (8 * IA3_SIZE, 0),
    ("random", "ia3"): (8 * IA3_SIZE, 0),
    ("random", "sft"): (8 * SFT_SIZE, 0),
    ("hyperformer", "ia3"): (8 * IA3_SIZE + 8 * 2 * (8 * 8 + 8), 8 * Z_OF_64),
    ("hyperformer", "sft"): (8 * SFT_SIZE + LAYERS * 2 * (8 * 8 + 8), LAYERS * Z_OF_64),
    ("task-moe", "ia3"): (8 * IA3_SIZE, 8 * Z_OF_64),
    ("task-moe", "sft"): (8 * SFT_SIZE, LAYERS * Z_OF_64),
    ("adapter-soup", "ia3"): (64 * IA3_SIZE, 0),
}


def test_every_pair_of_method_and_adapter_is_in_the_tests():
    """All pairs at least among the slow ones; by default each method and each adapter."""
    tested = {(METHOD[name], ADAPTER[name]) for name in METHODS} | OTHER_PAIRS.keys()
    assert {(method, adapter) for method in ROUTED for adapter in ("lora", "ia3", "sft")} <= tested
    assert {METHOD[name] for name in PAIRS} == {*recipes.METHODS} - {"mu"}  # which only continues another run
    assert {ADAPTER[name] for name in PAIRS} == {"lora", "ia3", "sft"}


@pytest.mark.slow
@pytest.mark.parametrize("method, adapter", OTHER_PAIRS)
def test_the_other_pairs_of_method_and_adapter(backbones, tmp_path, method, adapter):
    """They train, adapt in each of their variants, and what is saved scores as it did."""
    flags = {k: v for k, v in SMALL.items() if k != "skills" or method not in FIXED_TABLE} | dict(eval_examples=0)
    flags |= dict(method=method, adapter=adapter, density=0.05, backbone=backbones[0], output_dir=str(tmp_path / "run"))
    counts = train.main(flags)["parameters"]
    assert (counts["adapters"], counts["routing"]) == OTHER_PAIRS[method, adapter]
    for variant in [variant for variant, fits in VARIANTS.items() if method in fits]:
        few = FEW | dict(checkpoint=str(tmp_path / "run"), variant=variant, tasks=HELD_OUT[0], steps=2)
        result = adapt.main(few | dict(output_dir=str(tmp_path / variant)))
        assert result["splits"]["0"]["stops"][HELD_OUT[0]]["stopped"] == 2
        assert evaluate.evaluate(evaluate.Config(checkpoint=str(tmp_path / variant))) == result["tasks"]


@pytest.mark.parametrize(
    "name",
    grid(
        ["mhr", "expert", "private", "adapter-soup", "soup-sft", "hyperformer", "task-moe"],
        quick=("mhr", "expert", "adapter-soup", "hyperformer"),
    ),
)
def test_zero_shot(runs, folder, capsys, monkeypatch, name):
    whole = strings.strings()  # shared by all tests: change a copy
    few = [dataclasses.replace(task, test=task.test[:4]) for task in whole.test]
    whole = dataclasses.replace(whole, test=few)
    monkeypatch.setattr(strings, "strings", lambda *_: whole)
    before = contents(runs(name))
    capsys.readouterr()
    save = folder / f"zero-shot-{name}.json"
    cfg = evaluate.Config(checkpoint=str(runs(name)), zero_shot=True, save=str(save))
    one, again = evaluate.evaluate(cfg), evaluate.evaluate(dataclasses.replace(cfg, save=f"{save}.again"))
    assert read(save)["mean"] == pytest.approx(sum(one.values()) / len(one))
    assert {task: next(iter(scores.values())) for task, scores in read(save)["tasks"].items()} == one
    assert list(one) == HELD_OUT
    assert contents(runs(name)) == before
    assert capsys.readouterr().out.count("mean ") == 2
    assert one == again  # a fresh row of Z is as good as uniform: no seed matters


def test_comparing_runs(runs, adapted):
    folders = [str(runs("lora")), str(runs("mhr")), str(adapted("mhr")), str(adapted("mhr", "mu"))]
    above, _, below = compare(tuple(folders)).partition("\nrun ")
    title, _, shared = above.replace("\n", " ").partition(" ")
    assert title == "strings" and shared.startswith("all runs: ") and "; adaptations: " in shared
    _, *lines = below.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["lora", "mhr", "mhr", "mhr"]
    first = next(line for line in lines if line[: len("lora r=2 ")] == "lora r=2 ")
    assert first.split()[-2] == f"{read(runs('lora') / 'result.json')['mean']:.1f}"
    assert sum("exact" in line for line in lines if line[0] != " ") >= 2  # both adaptations say their metric


# --- A decoder-only model on files in CrossFit's format ---------------------------------------------------------------


def write_gym(root: Path):
    """A miniature gym, invented here: 3 training tasks, 1 dev and 2 test tasks; splits differ."""
    fruits, colours = ["apple", "pear", "plum", "cherry", "lime", "fig"], ["red", "green", "blue"]
    names = {"train": ["colour", "echo", "last-letter_x"], "dev": ["first"], "test": ["length", "shout"]}
    answers = {
        "colour": lambda k, f: colours[k % 3],
        "echo": lambda k, f: f"{f}\tthe {f}",
        "last-letter_x": lambda k, f: f[-1],
        "first": lambda k, f: f[0],
        "length": lambda k, f: "long" if len(f) > 4 else "short",
        "shout": lambda k, f: f.upper(),
    }
    for task, answer in answers.items():
        (root / task).mkdir(parents=True)
        for split in crossfit.SPLITS:
            for part in ("train", "dev", "test"):
                number = 0 if part == "test" else int(split) + (part == "dev")
                rows = [f"{colours[(k + number) % 3]} {f}\t{answer(k + number, f)}\n" for k, f in enumerate(fruits)]
                (root / task / f"{task}_6_{split}_{part}.tsv").write_text("".join(rows))
    (root / "random.json").write_text(json.dumps(names | {"all": sorted(answers)}))


@pytest.fixture(scope="module")
def gym(folder) -> str:
    write_gym(folder / "gym")
    return str(folder / "gym")


@pytest.fixture(scope="module")
def llama(folder) -> str:
    """A tiny random Llama and a byte-level tokenizer without merges, saved as one Hugging Face folder."""
    path = folder / "llama"
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(path)
    vocab = {"<pad>": 0, "</s>": 1} | {c: k + 2 for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def llama_run(folder, gym, llama) -> Path:
    flags = dict(dataset="crossfit", data_dir=gym, split="100", backbone=llama, method="mhr", heads=4, rank=2, skills=3)
    flags |= dict(steps=4, batch_size=8, max_input=40, max_output=8, lr=0.05, log_every=1, eval_examples=100)
    train.main(flags | dict(output_dir=str(folder / "llama-run")))
    return folder / "llama-run"


def test_a_decoder_only_run(llama_run, capsys):
    result = read(llama_run / "result.json")
    assert list(result["tasks"]) == ["colour", "echo", "last-letter_x"]
    tensors = load_file(llama_run / "adapter.safetensors")
    assert sum(".router.Z" in key for key in tensors) == 2 * 4  # crossfit's recipe: self-attention's q, k, v, o
    assert tensors["model.layers.1.self_attn.o_proj.router.Z"].shape == (3, 4, 3)
    scores = evaluate.evaluate(evaluate.Config(checkpoint=str(llama_run)))
    assert scores == result["tasks"]


@pytest.mark.parametrize("variant", ["all", "z", "mu"])
def test_a_decoder_only_adaptation(llama_run, folder, variant):
    run = folder / f"llama-{variant}"
    flags = FEW | dict(shots=0, test_examples=0, checkpoint=str(llama_run), variant=variant, split=("13",))
    result = adapt.main(flags | dict(output_dir=str(run)))
    assert list(result["tasks"]) == ["length", "shout"] and result["metrics"] == {"length": "ACC", "shout": "ACC"}
    assert max(stop["best_step"] for stop in result["splits"]["13"]["stops"].values()) > 0
    assert evaluate.evaluate(evaluate.Config(checkpoint=str(run))) == result["tasks"]


def test_epochs(gym, llama, folder):
    examples = sum(len(task.train) for task in benchmarks.load("crossfit", str(gym), "100").train)
    assert examples > 20 and examples % 8
    flags = dict(dataset="crossfit", data_dir=gym, split="100", backbone=llama, method="ia3", epochs=2, batch_size=8)
    result = train.main(flags | dict(max_input=40, max_output=8, output_dir=str(folder / "epochs")))
    assert result["steps"] == 2 * (examples // 8 + 1)


def test_the_gym_may_have_moved(llama_run, gym, folder):
    moved = folder / "moved-gym"
    shutil.copytree(gym, moved)
    copy = folder / "moved-run"
    shutil.copytree(llama_run, copy)
    change_json(copy / "config.json", data_dir="/no/longer/there")
    with pytest.raises(UserError, match="/no/longer/there"):
        evaluate.evaluate(evaluate.Config(checkpoint=str(copy)))
    scores = evaluate.evaluate(evaluate.Config(checkpoint=str(copy), data_dir=str(moved)))
    assert scores == read(llama_run / "result.json")["tasks"]
    few = FEW | dict(
        checkpoint=str(copy), tasks="first", split=("21",), data_dir=str(moved), output_dir=str(folder / "m")
    )
    assert list(adapt.main(few)["tasks"]) == ["first"]


def test_crossfit_trains_without_naming_a_split(gym, llama, folder):
    """Pre-training reads all five splits: --split has nothing to say there."""
    flags = dict(dataset="crossfit", data_dir=gym, backbone=llama, method="lora", rank=2, steps=1, batch_size=4)
    result = train.main(flags | dict(max_input=40, max_output=8, output_dir=str(folder / "no-split")))
    assert result["steps"] == 1


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def command(script: str, argv: list[str], capsys) -> str:
    """Run a script's command line in this process. It must end with code 2 and one sentence, which is returned."""
    module, table, moved = SCRIPTS[script]
    capsys.readouterr()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no answer in 120 seconds"))
    signal.alarm(120)
    try:
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(module.main, explicit_flags(module.Config, table, argv, moved))
    finally:
        signal.alarm(0)
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code == 2 and len(said) == 1
    return said[0]


@pytest.fixture(scope="module")
def places(folder, backbones, gym, runs, adapted, llama_run) -> dict:
    """The paths that the command lines below name, broken ones among them."""
    where = {"backbone": backbones[0], "gym": gym, "missing": folder / "missing", "cfrun": llama_run}
    where |= {"private": runs("private"), "private_few": adapted("private"), "ia3": runs("ia3")}
    where |= {"mhr": runs("mhr"), "lora": runs("lora"), "full": runs("full"), "few": adapted("mhr")}

    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    where |= {"empty": folder / "empty", "file": folder / "file"}

    def copied(name: str, source, **changes) -> Path:
        """A copy of a run with these settings changed."""
        shutil.copytree(source, folder / name)
        change_json(folder / name / "config.json", **changes)
        where[name] = folder / name
        return folder / name

    for name, content in (("broken", '{"method": '), ("list", "[]"), ("number", "7"), ("bytes", b"\xff\xfe")):
        path = copied(f"config_{name}", runs("mhr")) / "config.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    copied("newer", runs("mhr"), invented=1)
    copied("other_backbone", runs("mhr"), backbone=backbones[1])
    copied("other_heads", runs("mhr"), heads=4)
    copied("other_rank", runs("lora"), rank=4)
    copied("other_layers", runs("lora"), layers=r"encoder.*SelfAttention\.q")
    copied("single", runs("lora"), dataset="strings-single", instructions=True)
    (copied("unfinished", runs("mhr")) / "adapter.safetensors").unlink()
    (copied("unfinished_soup", runs("adapter-soup")) / "embeddings.safetensors").unlink()
    (copied("no_names", runs("expert")) / "tasks.json").unlink()
    copied("other_density", runs("poly-sft"), density=0.02)
    shutil.rmtree(copied("unfinished_full", runs("full")) / "backbone")
    whole = (runs("mhr") / "adapter.safetensors").read_bytes()
    for name, content in (("garbage", b"garbage" * 99), ("truncated", whole[: len(whole) // 2]), ("emptied", b"")):
        (copied(f"adapter_{name}", runs("mhr")) / "adapter.safetensors").write_bytes(content)
        (copied(f"few_{name}", adapted("mhr")) / f"0/{HELD_OUT[1]}.safetensors").write_bytes(content)
    (copied("few_missing", adapted("mhr")) / f"0/{HELD_OUT[1]}.safetensors").unlink()

    for name, file, content in (
        ("backbone_bad_config", "config.json", b"{"),
        ("backbone_unknown_type", "config.json", b'{"model_type": "nonsense"}'),
        ("backbone_no_type", "config.json", b"{}"),
        ("backbone_garbage", "model.safetensors", b"garbage" * 99),
        ("backbone_truncated", "model.safetensors", (Path(backbones[0]) / "model.safetensors").read_bytes()[:30_000]),
    ):
        shutil.copytree(backbones[0], folder / name)
        (folder / name / file).write_bytes(content)
        where[name] = folder / name
    shutil.copytree(backbones[0], folder / "backbone_no_weights")
    (folder / "backbone_no_weights" / "model.safetensors").unlink()
    where["backbone_no_weights"] = folder / "backbone_no_weights"

    shutil.copytree(gym, folder / "bad_gym")
    (folder / "bad_gym" / "echo" / "echo_6_21_dev.tsv").write_text("a\tb\nonly one column\n")
    where["bad_gym"] = folder / "bad_gym"
    shutil.copytree(gym, folder / "no_test_gym")
    (folder / "no_test_gym" / "random.json").write_text(json.dumps({"train": ["echo"], "dev": [], "test": []}))
    where["no_test_gym"] = folder / "no_test_gym"
    for name, files in (
        ("emptied_test_gym", "echo/echo_6_*_test.tsv"),
        ("emptied_dev_gym", "first/first_6_*_dev.tsv"),
        ("emptied_train_gym", "*/*_6_*_[td]*[nv].tsv"),
    ):
        shutil.copytree(gym, folder / name)
        paths = list((folder / name).glob(files))
        assert paths
        for path in paths:
            path.write_text("")
        where[name] = folder / name
    return where


TRAIN = (
    "--dataset strings --backbone {backbone} --steps 1 --batch-size 2 --max-input 16 --max-output 8 --eval-examples 0 "
)
CROSSFIT = "--dataset crossfit --split 100 --backbone {backbone} --steps 1 --batch-size 2 --max-output 8 "
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")


@pytest.mark.parametrize(
    "argv, named",
    [
        ("--dataset nonsense", "--dataset.*nonsense"),
        ("--method nonsense", "--method.*nonsense"),
        ("--nonsense 3", "--nonsense"),
        ("--step 3", "--step"),  # no abbreviations
        ("--steps many", "--steps.*many"),
        (TRAIN + "--steps 0", "--steps"),
        (TRAIN + "--steps -5", "--steps"),
        (TRAIN + "--batch-size 0", "--batch-size must be above 0"),
        (TRAIN + "--lr -1", "--lr must be above 0"),
        (TRAIN + "--lr 0", "--lr must be above 0"),
        (TRAIN + "--lr nan", "--lr"),
        (TRAIN + "--lr-z -0.1", "--lr-z must be above 0"),
        (TRAIN + "--rank 0", "--rank must be above 0"),
        (TRAIN + "--skills 0", "--skills must be above 0"),
        (TRAIN + f"--rank {10**20}", "--rank must be below 2.31"),
        (TRAIN + f"--skills {2**31}", "--skills must be below 2.31"),
        (TRAIN + f"--steps {2**31}", "--steps must be below 2.31"),
        (TRAIN + f"--seed {2**63}", "--seed must not be negative or huge"),
        (TRAIN + "--heads 0", "--heads must be above 0"),
        (TRAIN + "--max-output 0", "--max-output must be above 0"),
        (TRAIN + "--log-every 0", "--log-every must be above 0"),
        (TRAIN + "--clip 0", "--clip"),
        (CROSSFIT + "--data-dir {gym} --eval-examples -1", "--eval-examples"),
        (TRAIN + "--split x", "--split x"),
        (TRAIN + "--method mhr --heads 7", r"layer encoder\.block\.0\.layer\.0\.SelfAttention\.q: 7 heads .*16"),
        (TRAIN + "--method mhr --heads 32", r"SelfAttention\.q: 32 heads .*16"),
        (TRAIN + "--method private --skills 4", "--skills does not fit --method private"),
        (TRAIN + "--method expert --skills 4", "--skills does not fit --method expert"),
        (TRAIN + "--method lora --adapter sft", "--adapter sft does not fit --method lora"),
        (TRAIN + "--adapter sft --method mhr --heads 7", r"layer encoder\.block\.0\.layer\.0\..*\.q: 7 heads .*16"),
        (TRAIN + "--method task-moe --skills 1", "--method task-moe: top_k 2 must be at least 2 and at most --skills"),
        (TRAIN + "--method random --random-by layer", "--random-by.*layer"),
        (TRAIN + "--warmup 0.1", "--warmup is a setting of the recipe"),
        (TRAIN + "--granularity head", "--granularity.*head"),
        (TRAIN + "--granularity block --layers lm_head", "lm_head is in no numbered block: use --granularity linear"),
        (CROSSFIT + "--data-dir {gym} --method expert", "--method expert: nothing is known of the skills"),
        (TRAIN + "--layers no_such_layer", "no_such_layer"),
        (TRAIN + "--layers encoder", "layer encoder is of type T5Stack"),
        (TRAIN + "--layers (", r"--layers"),
        (TRAIN + "--backbone {missing}", "--backbone .*missing"),
        (TRAIN + "--backbone {empty}", "--backbone .*empty"),
        (TRAIN + "--backbone {file}", "--backbone .*file"),
        (TRAIN + "--backbone {backbone_bad_config}", "--backbone .*backbone_bad_config"),
        (TRAIN + "--backbone {backbone_unknown_type}", "--backbone .*backbone_unknown_type"),
        (TRAIN + "--backbone {backbone_no_type}", "--backbone .*backbone_no_type"),
        (TRAIN + "--backbone {backbone_no_weights}", "--backbone .*backbone_no_weights"),
        (TRAIN + "--backbone {backbone_garbage}", "--backbone .*backbone_garbage"),
        (TRAIN + "--backbone {backbone_truncated}", "--backbone .*backbone_truncated"),
        pytest.param(TRAIN + "--device cuda", "--device cuda", marks=no_gpu),
        (CROSSFIT, "--data-dir"),
        (CROSSFIT + "--data-dir {missing}", "--data-dir .*missing"),
        (CROSSFIT + "--data-dir {empty}", r"--data-dir .*random\.json"),
        (CROSSFIT + "--data-dir {bad_gym}", r"echo_6_21_dev\.tsv:2"),
        (CROSSFIT + "--data-dir {gym} --split 7", "--split 7"),
        (CROSSFIT + "--data-dir {emptied_test_gym} --eval-examples 2", "echo"),
        (CROSSFIT + "--data-dir {emptied_train_gym}", "emptied_train_gym|no .*examples"),
    ],
)
def test_train_tells_mistakes(places, tmp_path, capsys, argv, named):
    argv = [word.format(**places) for word in argv.split()]
    said = command("train", [*argv, "--output-dir", str(tmp_path / "out")], capsys)
    assert re.search(named, said), said
    assert not (tmp_path / "out").exists()  # nothing is left behind


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(weight_decay=-1.0), "weight_decay must not be negative"),
        (dict(warmup=1.5), "warmup is a share of the steps and must not be above 1, not 1.5"),
        (dict(method="poly", adapter="sft", density=1.5), "density must be above 0 and at most 1, not 1.5"),
        (dict(density=0.0), "density must be above 0"),
        (dict(top_k=0), "top_k must be above 0"),
        (dict(method="task-moe", skills=2, top_k=3), "top_k 3 must be at least 2 and at most --skills 2"),
        (dict(method="task-moe", top_k=1), "--method task-moe: top_k 1 must be at least 2"),
        (dict(steps=0, epochs=0), "nothing to train: give --steps above 0"),
        (dict(method="adapter-soup", encoder="no/such"), "encoder no/such cannot be loaded"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_recipe_cannot_say_to_train(backbones, tmp_path, settings, says):
    small = dict(backbone=backbones[0], steps=1, eval_examples=0, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"^{says}|: {says}"):
        train.main(small | settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(weight_decay=-1.0), "weight_decay must not be negative"),
        (dict(soup=0), "soup must be above 0"),
        (dict(patience=0), "patience must be above 0"),
    ],
    ids=str,
)
def test_what_a_recipe_cannot_say_to_adapt(runs, tmp_path, settings, says):
    with pytest.raises(UserError, match=f"^{says}"):
        adapt.main(FEW | dict(checkpoint=str(runs("mhr")), output_dir=str(tmp_path / "out")) | settings)
    assert not (tmp_path / "out").exists()


ADAPT = "--steps 1 --batch-size 2 --eval-every 1 --test-examples 1 --tasks dev "


@pytest.mark.parametrize(
    "argv, named",
    [
        ("", "--checkpoint"),
        ("--checkpoint {missing}", "missing"),
        ("--checkpoint {empty}", r"empty/config\.json"),
        ("--checkpoint {file}", "file"),
        ("--checkpoint {mhr} --variant nonsense", "--variant.*nonsense"),
        ("--checkpoint {lora} --variant z", "--variant z .*lora"),
        ("--checkpoint {lora} --variant mu", "--variant mu .*lora"),
        ("--checkpoint {full} --variant z", "--variant z .*full"),
        ("--checkpoint {full} --variant mu", "--variant mu .*full"),
        ("--checkpoint {ia3} --variant mu", "--variant mu .*ia3"),
        ("--checkpoint {private} --variant z", "--variant z .* poly, mhr, hyperformer, task-moe, .* private"),
        ("--checkpoint {mhr} --variant lora", "--variant lora needs a run of method full, .* is mhr"),
        ("--checkpoint {unfinished_soup}", r"unfinished_soup/embeddings\.safetensors does not exist"),
        ("--checkpoint {no_names}", r"no_names/tasks\.json"),
        ("--checkpoint {other_density}", r"other_density.*inventory\.place"),
        ("--checkpoint {mhr} --tasks nonsense", "--tasks nonsense"),
        ("--checkpoint {mhr} --tasks reverse", "--tasks reverse"),
        ("--checkpoint {mhr} --steps 0", "--steps must be above 0"),
        ("--checkpoint {mhr} --lr -1", "--lr must be above 0"),
        ("--checkpoint {mhr} --lr-z 0", "--lr-z must be above 0"),
        ("--checkpoint {mhr} --eval-every 0", "--eval-every must be above 0"),
        ("--checkpoint {mhr} --shots -1", "--shots"),
        ("--checkpoint {cfrun} --split 100 --test-examples -1", "--test-examples"),
        ("--checkpoint {mhr} --split x", "--split x"),
        pytest.param("--checkpoint {mhr} --device cuda", "--device cuda", marks=no_gpu),
        ("--checkpoint {few}", r"config\.json"),  # a run of adapt.py
        ("--checkpoint {config_broken}", r"config_broken/config\.json:1"),
        ("--checkpoint {config_list}", r"config_list/config\.json"),
        ("--checkpoint {config_number}", r"config_number/config\.json"),
        ("--checkpoint {config_bytes}", r"config_bytes/config\.json"),
        ("--checkpoint {newer}", r"newer/config\.json.*invented"),
        ("--checkpoint {other_backbone}", "other_backbone.*another backbone"),
        ("--checkpoint {other_heads}", r"other_heads.*router\.Z"),
        ("--checkpoint {other_rank}", r"other_rank.*params"),
        ("--checkpoint {other_layers}", r"other_layers.*only in the file"),
        ("--checkpoint {unfinished}", r"unfinished has no adapter\.safetensors"),
        ("--checkpoint {unfinished_full}", "unfinished_full has no backbone"),
        ("--checkpoint {adapter_garbage}", r"adapter_garbage"),
        ("--checkpoint {adapter_truncated}", r"adapter_truncated"),
        ("--checkpoint {adapter_emptied}", r"adapter_emptied"),
        ("--checkpoint {single} --tasks all", "held-out|--tasks"),  # strings-single has no held-out tasks
        ("--checkpoint {cfrun} --split 100 --data-dir {no_test_gym} --tasks all", "held-out|--tasks|no_test_gym"),
        ("--checkpoint {cfrun} --split 7", "--split 7"),
        ("--checkpoint {cfrun} --split 100 --data-dir {emptied_dev_gym}", "first"),
        ("--checkpoint {cfrun} --split 100 --data-dir {missing}", "--data-dir .*missing"),
    ],
)
def test_adapt_tells_mistakes(places, tmp_path, capsys, argv, named):
    argv = [word.format(**places) for word in (ADAPT + argv).split()]
    said = command("adapt", [*argv, "--output-dir", str(tmp_path / "out")], capsys)
    assert re.search(named, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, named",
    [
        ("", "--checkpoint"),
        ("--zero-shot", "--checkpoint"),
        ("--checkpoint {missing}", "missing"),
        ("--checkpoint {empty}", r"empty/config\.json"),
        ("--checkpoint {file}", "file"),
        ("--checkpoint {config_broken}", r"config_broken/config\.json:1"),
        ("--checkpoint {config_list}", r"config_list/config\.json"),
        ("--checkpoint {config_number}", r"config_number/config\.json"),
        ("--checkpoint {few} --zero-shot", "--zero-shot"),
        ("--checkpoint {few} --batch-size 0", "--batch-size must be above 0"),
        ("--checkpoint {few} --beams 0", "--beams must be above 0"),
        ("--checkpoint {few} --device nonsense", "--device"),
        pytest.param("--checkpoint {few} --device cuda", "--device cuda", marks=no_gpu),
        ("--checkpoint {private_few} --zero-shot", "--zero-shot"),
        ("--checkpoint {unfinished_soup} --zero-shot", r"unfinished_soup/embeddings\.safetensors does not exist"),
        ("--checkpoint {few_missing}", r"few_missing/.*\.safetensors does not exist"),
        ("--checkpoint {few_garbage}", r"few_garbage/.*\.safetensors"),
        ("--checkpoint {few_truncated}", r"few_truncated/.*\.safetensors"),
        ("--checkpoint {few_emptied}", r"few_emptied/.*\.safetensors"),
        ("--checkpoint {unfinished}", r"unfinished has no adapter\.safetensors"),
        ("--checkpoint {adapter_garbage}", "adapter_garbage"),
        ("--checkpoint {other_backbone}", "other_backbone.*another backbone"),
        ("--checkpoint {single} --zero-shot", "held-out|--zero-shot"),
    ],
)
def test_evaluate_tells_mistakes(places, capsys, argv, named):
    said = command("evaluate", [word.format(**places) for word in argv.split()], capsys)
    assert re.search(named, said), said


@pytest.mark.parametrize(
    "odd, says",
    [
        (dict(rank=10**20), "--rank must be"), (dict(skills=2**31), "--skills must be"),
        (dict(rank=0), "--rank must be"), (dict(heads=-1), "--heads must be"),
        (dict(method="nonsense"), "field 'method' is 'nonsense'"), (dict(device="mars"), "field 'device' is 'mars'"),
        (dict(method="lora", adapter="nonsense"), "field 'adapter' is 'nonsense'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_run_says_of_itself_is_checked(runs, tmp_path, odd, says):
    """A value in config.json that no flag can have is refused before anything is loaded."""
    shutil.copytree(runs("mhr"), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    change_json(path, **odd)
    with pytest.raises(UserError, match=says):
        adapt.main(dict(checkpoint=str(tmp_path / "run"), output_dir=str(tmp_path / "few")))
    assert not (tmp_path / "few").exists()


def test_the_names_of_skills_are_counted(runs, tmp_path):
    """expert: a tasks.json with more or fewer skills than the run has is refused."""
    shutil.copytree(runs("expert"), tmp_path / "run")
    path = tmp_path / "run" / "tasks.json"
    for skills in ([], ["sort"], [*read(path)["skills"], "more"]):
        change_json(path, skills=skills)
        with pytest.raises(UserError, match=f"tasks.json names {len(skills)} skills, the run has"):
            adapt.main(dict(checkpoint=str(tmp_path / "run"), output_dir=str(tmp_path / "few"), tasks="sort+double"))


def test_rows_of_other_tasks_are_not_used(runs, tmp_path):
    """A routed run is refused if the data now has other training tasks, or another order, by all that would use its
    rows of Z; the first task that differs is named. One adapter for all has no rows. Imported runs number their tasks.
    """
    names = read(runs("mhr") / "tasks.json")["tasks"]
    swapped = [names[0], names[2], names[1], *names[3:]]
    using = (
        lambda run: evaluate.evaluate(evaluate.Config(checkpoint=run)),
        lambda run: analyze.main(dict(checkpoint=run)),
        lambda run: train.main(dict(from_run=run, steps=1, output_dir=str(tmp_path / "more"))),
        lambda run: train.train_in(Path(run), read_config(train.Config, Path(run) / "config.json")),  # --resume
    )
    for k, (made, says) in enumerate(
        [(swapped, "training task 1 is"), (names[:-1], f"training task {len(names) - 1} is")]
    ):
        shutil.copytree(runs("mhr"), tmp_path / str(k))
        (tmp_path / str(k) / "tasks.json").write_text(json.dumps({"tasks": made, "skills": []}))
        for use in using:
            with pytest.raises(UserError, match=f"{says} .*that of the data .*--data-dir"):
                use(str(tmp_path / str(k)))
    (tmp_path / "0" / "tasks.json").write_text(json.dumps({"tasks": [str(t) for t in range(len(names))], "skills": []}))
    assert refuse_other_tasks(tmp_path / "0", "mhr", strings.strings().train) is None
    with pytest.raises(UserError, match="training task 0 is '0', that of the data None"):
        refuse_other_tasks(tmp_path / "0", "mhr", [])
    assert refuse_other_tasks(tmp_path / "0", "lora", []) is None


def test_epochs_and_steps_replace_each_other():
    by_epochs, by_steps = train.make_config(epochs=2), train.make_config(dataset="crossfit", steps=7)
    tasks = strings.strings().train
    assert train.steps_to_take(by_epochs, tasks) == 2 * 64 * 500 // 64
    assert by_epochs.steps == 0 and by_steps.epochs == 0 and train.steps_to_take(by_steps, tasks) == 7
    with pytest.raises(UserError, match="steps 7 and epochs 2: give one of them"):
        train.make_config(steps=7, epochs=2)


def test_a_run_of_another_script_is_named(runs, adapted):
    """A run of adapt.py in place of one of train.py, or the reverse: the sentence says which script made it."""
    with pytest.raises(UserError, match="it is a run of adapt.py, not of train.py"):
        adapt.main(dict(checkpoint=str(adapted("mhr"))))
    with pytest.raises(UserError, match="it is a run of adapt.py, not of train.py"):
        train.main(dict(output_dir=str(adapted("mhr")), resume=True))
    with pytest.raises(UserError, match="it is a run of train.py, not of adapt.py"):
        adapt.main(dict(output_dir=str(runs("mhr")), resume=True))


def test_flags_that_adaptation_does_not_use_are_named(runs, capsys):
    """Flags that have no effect with the variant or the method are named; a task named twice is one task."""
    for method, variant, name in {("mhr", "z", "lr"), ("mhr", "mu", "lr_z"), ("lora", "all", "lr_z")}:
        adapt.make_config(**{"checkpoint": str(runs(method)), "variant": variant, name: 1})
        assert capsys.readouterr().out.endswith(f": --{name.replace('_', '-')}\n")
    for method, variant, name in {("mhr", "z", "lr_z"), ("mhr", "all", "lr")}:
        adapt.make_config(**{"checkpoint": str(runs(method)), "variant": variant, name: 1})
        assert "ignored" not in capsys.readouterr().out
    benchmark = strings.strings()
    assert [task.name for task in benchmarks.held_out(benchmark, f"{HELD_OUT[1]},{HELD_OUT[1]}")] == [HELD_OUT[1]]


@pytest.mark.parametrize(
    ("dataset", "name", "value"),
    [("t0", "split", "42"), ("superni", "instructions", True), ("strings", "partition", "x.json")],
)
def test_flags_of_other_data_sets_are_named(capsys, dataset, name, value):
    train.make_config(dataset=dataset, **{name: value})
    assert capsys.readouterr().out.endswith(f"--dataset {dataset}: --{name}\n")
    train.make_config(dataset="crossfit", split="13", partition="x.json")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("split", ["007", "-1", "1.5", "9" * 5000, "x", ""])
def test_splits_are_whole_numbers_written_in_one_way(split):
    with pytest.raises(UserError, match="^--split .{0,40} must be a whole number below 10.18 for strings$"):
        strings.load("strings", "", split, ())


def test_flags_that_are_not_utf8_are_refused(tmp_path, capsys):
    """A path that is not UTF-8 would end the run later, when it is written or printed."""
    odd = os.fsdecode(b"run\xff")
    for Config, argv in ((train.Config, ["--output-dir", odd]), (adapt.Config, ["--split", "0", odd])):
        with pytest.raises(SystemExit) as end:
            explicit_flags(Config, {}, argv)
        assert end.value.code == 2 and f"argument {argv[0]}: it is not valid UTF-8" in capsys.readouterr().err


def test_a_folder_in_use_is_left_as_it_is(runs, adapted, places, capsys):
    used = [runs("mhr"), adapted("mhr")]
    before = [contents(run) for run in used]
    for run in used:
        said = command("train", [*TRAIN.format(**places).split(), "--output-dir", str(run)], capsys)
        assert "--output-dir" in said and str(run) in said
        argv = [*ADAPT.split(), "--checkpoint", str(runs("lora")), "--output-dir", str(run)]
        said = command("adapt", argv, capsys)
        assert "--output-dir" in said and str(run) in said
    assert [contents(run) for run in used] == before


def test_an_output_folder_that_cannot_be_made(places, capsys):
    for path in (places["file"], places["file"] / "below"):
        said = command("train", [*TRAIN.format(**places).split(), "--output-dir", str(path)], capsys)
        assert "--output-dir" in said and str(path) in said
    assert places["file"].read_text() == "not a folder"


def test_interrupting_is_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        exit_on_user_error(interrupted)
    assert end.value.code == 130 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("a\nb is\r\nwrong"), OSError(2, "is gone", "a\nb"), RunError("x\ny")])
def test_a_failure_is_one_line(capsys, error):
    """Also if the name of a file in it has line breaks."""

    def fail():
        raise error

    with pytest.raises(SystemExit):
        exit_on_user_error(fail)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"name": "é", "value": 1})
    assert read(path) == {"name": "é", "value": 1}
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert read(path) == {"name": "é", "value": 1}


def test_adapter_files_name_their_backbone(runs, adapted):
    """By a fingerprint that is the same before and after adaptation; so a wrong backbone can be refused."""
    marks = set()
    for path in (runs("mhr") / "adapter.safetensors", adapted("mhr", "mu") / f"0/{HELD_OUT[0]}.safetensors"):
        marks.add(read_tensors(str(path))[1]["backbone"])
    assert len(marks) == 1 and marks != {None}


def test_the_tiny_architecture_is_what_the_counts_say():
    model = tiny_from_scratch()
    assert sum(p.numel() for p in model.parameters()) == 1_231_232
    assert not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())


# --- Files of a run that were changed by hand -------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train", "adapt"])
def test_a_run_has_no_value_that_its_flags_cannot_have(script, tmp_path):
    """read_config refuses what the command line refuses, naming file, field and value, and reads what it takes."""
    Config, path = SCRIPTS[script][0].Config, tmp_path / "config.json"
    for field in dataclasses.fields(Config):
        for value in field.metadata["choices"]:
            cfg = Config(**{field.name: value})
            write_json(path, dataclasses.asdict(cfg))
            assert read_config(Config, path) == cfg
        for odd in ["nonsense"] * bool(field.metadata["choices"]) + [[], [5], [{}]] * (field.type is tuple):
            path.write_text(json.dumps(dataclasses.asdict(Config()) | {field.name: odd}))
            with pytest.raises(UserError, match=rf"config\.json: field '{field.name}' is") as refused:
                read_config(Config, path)
            assert repr(odd) in str(refused.value)


@pytest.mark.parametrize("script", ["train", "adapt"])
def test_a_config_of_an_earlier_version_is_read(script, tmp_path):
    """It had `resume` in it, and best_by as `keep`; a field that it lacks gets its default."""
    Config, path = SCRIPTS[script][0].Config, tmp_path / "config.json"
    cfg = Config(seed=3, output_dir="runs/a", **{"best_by": "score"} if script == "adapt" else {})
    former = {"keep" if name == "best_by" else name: value for name, value in dataclasses.asdict(cfg).items()}
    assert former["resume"] is False
    write_json(path, former)
    assert read_config(Config, path) == cfg
    marker = {"train": "adapter", "adapt": "variant"}[script]  # by which the two kinds of run are told apart
    write_json(path, {name: former[name] for name in ("seed", "output_dir", marker)})
    assert read_config(Config, path) == Config(seed=3, output_dir="runs/a")


@pytest.mark.parametrize("odd", [dict(invented=1), dict(resume=True), dict(plot=["a"]), dict(best_by="loss")], ids=str)
def test_a_field_that_no_version_had_is_refused(odd, tmp_path):
    path, (name,) = tmp_path / "config.json", odd
    write_json(path, dataclasses.asdict(train.Config()) | odd)
    with pytest.raises(UserError, match=rf"^{path}: field '{name}' is unknown: it is of another version, or [a-z ]+$"):
        read_config(train.Config, path)


def test_a_run_of_an_earlier_version_is_used_as_ever(runs, adapted, tmp_path):
    """Its config.json has `resume`, and best_by as `keep`: it is scored, adapted, and resumed like a new one."""
    run, few = tmp_path / "run", tmp_path / "few"
    shutil.copytree(runs("mhr"), run)
    shutil.copytree(adapted("mhr"), few)
    settings = read(few / "config.json")
    settings |= {"resume": False, "keep": settings.pop("best_by"), "checkpoint": str(run)}
    write_json(few / "config.json", settings)
    change_json(run / "config.json", resume=False)
    for folder, limit in ((run, SMALL["eval_examples"]), (few, 0)):
        cfg = evaluate.Config(checkpoint=str(folder), test_examples=limit)
        assert evaluate.evaluate(cfg) == read(folder / "result.json")["tasks"]
    result = adapt.main(FEW | dict(checkpoint=str(run), tasks=HELD_OUT[0], output_dir=str(tmp_path / "more")))
    assert result["tasks"] == {HELD_OUT[0]: read(few / "result.json")["tasks"][HELD_OUT[0]]}

    for name in ("result.json", f"0/{HELD_OUT[1]}.json"):  # as if it had been interrupted during the second task
        (few / name).unlink()
    assert adapt.main(dict(resume=True, output_dir=str(few)))["tasks"] == read(adapted("mhr") / "result.json")["tasks"]
    for name in ("result.json", "log.jsonl", "adapter.safetensors"):  # in its first step
        (run / name).unlink()
    train.main(dict(resume=True, output_dir=str(run)))
    assert same_tensors(run / "adapter.safetensors", runs("mhr") / "adapter.safetensors")


def test_levels_of_an_agent_are_checked_one_by_one(tmp_path):
    """experiments/babyai.py, whose flag --levels takes several of its choices."""
    from experiments import babyai

    cfg, path = babyai.Config(levels=tuple(babyai.LEVELS)[1:3]), tmp_path / "config.json"
    write_json(path, dataclasses.asdict(cfg))
    assert read_config(babyai.Config, path) == cfg
    write_json(path, dataclasses.asdict(cfg) | {"levels": [tuple(babyai.LEVELS)[0], "nonsense"]})
    with pytest.raises(UserError, match="field 'levels' is 'nonsense', which is none of"):
        read_config(babyai.Config, path)


def test_damaged_embeddings_are_refused(runs, tmp_path):
    """adapter-soup: anything but one finite embedding for each adapter is refused before a task begins."""
    shutil.copytree(runs("adapter-soup"), tmp_path / "run")
    path, task = tmp_path / "run" / "embeddings.safetensors", strings.strings().test[0]
    good = read_tensors(path)[0]["embeddings"]
    broken = good.clone()
    broken[3, 5] = torch.nan
    for tensors in (
        {"embeddings": broken},
        {"embeddings": good[1:]},  # one too few
        {"embeddings": good[:, 1:].contiguous()},
        {"embeddings": good[0]},
        {"embeddings": good.double()},
        {"others": good},
        read_tensors(tmp_path / "run" / "adapter.safetensors")[0],
    ):
        write_tensors(tensors, path)
        with pytest.raises(UserError, match=r"embeddings\.safetensors holds no 64 finite embeddings of size 16"):
            begun(tmp_path / "run", task)
    write_tensors({"embeddings": good}, path)
    begun(tmp_path / "run", task)


@pytest.mark.parametrize(
    "odd",
    [
        dict(metrics={}), dict(metrics={"EM": "many"}), dict(metrics={"EM": None}), dict(metrics={"EM": {}}),
        dict(metrics={"EM": math.nan}), dict(metrics={"EM": 10**400}), dict(metrics=[5]), dict(before=math.inf),
        dict(seconds=-math.inf), dict(seconds=True),
    ],
    ids=lambda odd: f"{odd!s:.30}",
)  # fmt: skip
def test_damaged_scores_of_a_task_are_refused(adapted, tmp_path, odd):
    """A task's result file with anything but scores is refused on --resume, and nothing is changed."""
    shutil.copytree(adapted("mhr", "mu"), few := tmp_path / "few")
    (few / "result.json").unlink()
    path = few / "0" / f"{HELD_OUT[0]}.json"
    change_json(path, **odd)
    before = contents(few) | {"provenance.json": ""}  # where the new start is on record
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: "):
        adapt.main(dict(resume=True, output_dir=str(few)))
    assert contents(few) | {"provenance.json": ""} == before


# --- Signals ----------------------------------------------------------------------------------------------------------

STARTING = """
import sys, time
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from plumbing.errors import exit_on_user_error
from plumbing.flags import explicit_flags, flag

@dataclass
class Config:
    "A script."
    seed: int = flag(0, "seed")

FLAGS = explicit_flags(Config, {{}})
print("importing", flush=True)
{slow}
def main(flags):
    print("at work", flush=True)
    time.sleep(20)
exit_on_user_error(main, FLAGS)
"""
SWALLOWS = "try:\n    time.sleep(20)\nexcept BaseException:\n    time.sleep(20)"  # as some libraries' imports do


@pytest.mark.parametrize("slow", [SWALLOWS, "pass"], ids=["import", "main"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_at_the_start(number, code, slow):
    """A process that gets a signal during its imports or at work exits at once, without a traceback, with the code that
    shells use for this signal. Of Ctrl-C it dies: a shell ends its loop only then."""
    program = STARTING.format(root=str(ROOT), slow=slow)
    child = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert child.stdout.readline() == "importing\n"
    if slow == "pass":
        assert child.stdout.readline() == "at work\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (code, "")


def test_a_script_is_stopped_before_torch_is_there():
    """train.py itself, by Ctrl-C while it imports torch."""
    argv = [sys.executable, "-X", "importtime", "train.py"]
    child = subprocess.Popen(argv, cwd=ROOT, stdout=-1, stderr=-1, text=True)
    for line in child.stderr:
        if line.split("|")[-1].strip().startswith("torch."):
            break
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == -signal.SIGINT and "Traceback" not in err and out == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_so_during_imports(number):
    """nohup, and a shell's background jobs, which ignore Ctrl-C."""
    program = STARTING.format(root=str(ROOT), slow="time.sleep(0.2)\nsys.exit(5)")
    ignoring = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n"
    child = subprocess.Popen([sys.executable, "-c", ignoring + program], stdout=-1, stderr=-1, text=True)
    assert child.stdout.readline() == "importing\n"
    child.send_signal(number)
    assert child.communicate(timeout=20) == ("", "") and child.returncode == 5


def test_flags_of_somebody_else_change_no_handler():
    """Only a script that reads its own command line handles signals; fuzzing and tests call the reader too."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    explicit_flags(train.Config, PRETRAINING, [])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
